"""vLLM hands caches off over kvwire: real engines, prefill and decode in processes of their own.

Random models can be degenerate, so the bytes of the caches are compared as well as the tokens.
"""

import pytest

pytest.importorskip("vllm")

from faults import UP, Fault, Proxy, eventually
from vllm_engines import Pair
from vllm_models import make

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

NEW_TOKENS = 16
# The decode engine reads N - 1 tokens and one more; so must the engine it is compared with.
PROMPT_TOKENS = {"qwen3_next": 641}
PORT = 17300


def prompt(tokens, seed=0):
    return [(7 * i * i + 3 * i + 1 + 11 * seed) % 500 for i in range(tokens)]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("name", ["llama", "granitemoehybrid", "qwen3_next", "falcon_h1",
                                  "deepseek_v2", "gpt_oss", "gemma3"])
def test_split_equals_unsplit(models, name):
    tokens = PROMPT_TOKENS.get(name, 301)
    with Pair(make(models, name), PORT, digests=True, enable_prefix_caching=False,
              max_num_batched_tokens=tokens - 1) as pair:
        for how, seed in ((pair.push, 0), (pair.pull, 1)):
            request = f"{how.__name__}"
            how(request, prompt(tokens, seed), NEW_TOKENS)
            split = pair.decode.output(request)
            assert split["finish"] == "length"  # the policy is to fail
            assert pair.prefill.digests(request) == pair.decode.digests(request)
            unsplit = pair.decode.generate(f"un{request}", prompt(tokens, seed), NEW_TOKENS)
            assert split["tokens"] == unsplit["tokens"]


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1)])
def test_tensor_parallelism_may_differ(models, ranks):
    """In fp32: two ranks add up in another order than one."""
    with Pair(make(models, "granitemoehybrid"), PORT + 200, enable_prefix_caching=False,
              dtype="float32", max_num_batched_tokens=300,
              prefill={"tensor_parallel_size": ranks[0]},
              decode={"tensor_parallel_size": ranks[1]}) as pair:
        for how in (pair.push, pair.pull):
            how(how.__name__, prompt(301), NEW_TOKENS)
            split = pair.decode.output(how.__name__)
            assert split["finish"] == "length"  # the policy is to fail
            assert split["tokens"] == pair.decode.generate(
                f"un{how.__name__}", prompt(301), NEW_TOKENS)["tokens"]


def test_only_missing_tokens_travel(models):
    """A prefix that the decode engine has stays where it is; and prefill may have one, too."""
    row_bytes = 3 * 2 * 2 * 32 * 4  # layers, heads, K and V, head size, fp32
    with Pair(make(models, "llama"), PORT + 300, dtype="float32", block_size=32) as pair:
        for how, seed in ((pair.push, 0), (pair.pull, 1)):
            pair.decode.generate(f"first-{seed}", prompt(200, seed), 1)
            before = pair.decode.status()["totals"].get("decode_cache_bytes", 0)
            how(f"next-{seed}", prompt(301, seed), NEW_TOKENS)
            split = pair.decode.output(f"next-{seed}")
            after = pair.decode.status()["totals"]["decode_cache_bytes"]
            assert after - before == (300 - 192) * row_bytes
            assert split["tokens"] == pair.decode.generate(
                f"un-{seed}", prompt(301, seed), NEW_TOKENS)["tokens"]


# One pair for the faults: few blocks, so that requests are preempted; fp32, so that an engine draws
# the same tokens whatever it has in its batch.
@pytest.fixture(scope="module")
def pair(models):
    with Pair(make(models, "llama"), PORT + 100, policy="recompute", dtype="float32",
              block_size=32, num_gpu_blocks_override=80, enable_prefix_caching=False,
              max_num_batched_tokens=128) as made:
        yield made


def unsplit(pair, tokens, seed, count=NEW_TOKENS):
    return pair.decode.generate(f"alone-{seed}-{tokens}", prompt(tokens, seed), count)["tokens"]


def all_is_given_back(engine):
    """Nothing is left of any request; block 0 is vLLM's own."""
    return eventually(lambda: (status := engine.status())["requests"] == 0
                      and status["free_blocks"] == status["blocks"] - 1, 60)


@pytest.mark.parametrize("kind", ["flip", "cut"])
def test_harm_on_the_wire_is_repaired(pair, kind):
    seed = 20 + (kind == "cut")
    with Proxy(f"127.0.0.1:{pair.decode_port}", Fault(None, UP, 60_000, kind)) as proxy:
        pair.push(kind, prompt(301, seed), NEW_TOKENS, through=proxy.address)
        split = pair.decode.output(kind)
        assert proxy.fired
    assert split["cached"] == 300 and split["tokens"] == unsplit(pair, 301, seed)


@pytest.mark.parametrize("side", ["decode", "prefill"])
def test_an_aborted_request_leaves_nothing(pair, side):
    with Proxy(f"127.0.0.1:{pair.decode_port}", bytes_per_s=20_000) as proxy:
        pair.push(f"abort-{side}", prompt(301, 30), NEW_TOKENS, through=proxy.address)
        assert eventually(lambda: sum(proxy.passed.values()) > 20_000, 60)
        getattr(pair, side).say(abort=f"abort-{side}")
        if side == "prefill":  # decode recomputes what will not come
            split = pair.decode.output(f"abort-{side}")
            assert split["tokens"] == unsplit(pair, 301, 30)
    assert all_is_given_back(pair.decode) and all_is_given_back(pair.prefill)


def test_many_requests_under_preemption(pair):
    count = 50
    sizes = [60 + 7 * (number % 30) for number in range(count)]
    for number, tokens in enumerate(sizes):
        how = pair.push if number % 2 else pair.pull
        how(f"many-{number}", prompt(tokens, number), NEW_TOKENS)
    split = [pair.decode.output(f"many-{number}") for number in range(count)]
    assert all(answer["finish"] == "length" for answer in split)
    for number, tokens in enumerate(sizes):
        pair.decode.add(f"alone-{number}", prompt(tokens, number), NEW_TOKENS)
    for number, answer in enumerate(split):
        assert answer["tokens"] == pair.decode.output(f"alone-{number}")["tokens"], number
    assert all_is_given_back(pair.decode) and all_is_given_back(pair.prefill)


def test_nonsense_from_the_router_costs_one_request(pair):
    for number, params in enumerate((
            {"do_remote_prefill": True}, {"do_remote_prefill": True, "ticket": "x"},
            {"do_remote_prefill": True, "offer": "0" * 32, "prefill_addresses": ["127.0.0.1:1"]})):
        answer = pair.decode.generate(f"odd-{number}", prompt(90, 40), NEW_TOKENS, params)
        assert answer["tokens"] == unsplit(pair, 90, 40)
    assert all_is_given_back(pair.decode)


def test_prefill_killed_while_it_sends(pair):
    with Proxy(f"127.0.0.1:{pair.decode_port}", bytes_per_s=20_000) as proxy:
        pair.push("killed", prompt(301, 50), NEW_TOKENS, through=proxy.address)
        assert eventually(lambda: sum(proxy.passed.values()) > 20_000, 60)
        pair.prefill.kill()
        split = pair.decode.output("killed")
    assert split["finish"] == "length" and split["tokens"] == unsplit(pair, 301, 50)
    assert all_is_given_back(pair.decode)
