"""What goes wrong between two real vLLM engines: repaired, recomputed or failed; never a wrong
token, and nothing is left behind.

In fp32, so that an engine draws the same tokens whatever else is in its batch; few blocks, so that
requests are preempted.
"""

import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from faults import UP, Fault, Proxy, eventually
from vllm_engines import Pair, prompt
from vllm_models import make

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

NEW_TOKENS = 16
LEASE_S = 30
SLOW = 20_000  # bytes per second: a request of 300 tokens takes 23 s
ENGINES = {"dtype": "float32", "block_size": 32, "num_gpu_blocks_override": 80,
           "max_num_batched_tokens": 128, "lease_s": LEASE_S}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models"), "llama")


# One pair for each policy. Each ends with the test that kills an engine.
@pytest.fixture(scope="module")
def recompute(llama):
    with Pair(llama, policy="recompute", **ENGINES) as pair:
        yield pair


@pytest.fixture(scope="module")
def fail(llama):
    with Pair(llama, policy="fail", **ENGINES) as pair:
        yield pair


def unsplit(pair, tokens, seed, count=NEW_TOKENS):
    return pair.decode.generate(f"alone-{seed}-{tokens}", prompt(tokens, seed), count)["tokens"]


def all_is_given_back(engine):
    """Nothing is left of any request; block 0 is vLLM's own."""
    seen = {}

    def is_empty():
        seen.update(engine.status())
        return seen["requests"] == 0 and seen["free_blocks"] == seen["blocks"] - 1

    try:
        return eventually(is_empty, 4 * LEASE_S)
    except AssertionError:
        raise AssertionError(f"not given back in {4 * LEASE_S} s: {seen}") from None


def handed_off(pair):
    return pair.decode.status()["totals"].get("decode_handoffs", 0)


def is_healthy(pair, seed):
    """Both engines are empty, and hand off as ever."""
    assert all_is_given_back(pair.decode) and all_is_given_back(pair.prefill)
    before = handed_off(pair)
    for how in (pair.push, pair.pull):
        name = f"after-{how.__name__}-{seed}"
        how(name, prompt(200, seed), NEW_TOKENS)
        assert pair.decode.output(name)["tokens"] == unsplit(pair, 200, seed)
    assert handed_off(pair) == before + 2


def slowed(pair):
    return Proxy(pair.decode_addresses[0], bytes_per_s=SLOW)


def is_under_way(proxy):
    return eventually(lambda: sum(proxy.passed.values()) > SLOW, 60)


@pytest.mark.parametrize("kind", ["flip", "cut"])
def test_harm_on_the_wire_is_repaired(fail, kind):
    seed = 20 + (kind == "cut")
    with Proxy(fail.decode_addresses[0], Fault(None, UP, 60_000, kind)) as proxy:
        fail.push(kind, prompt(301, seed), NEW_TOKENS, through=proxy.address)
        split = fail.decode.output(kind)
        assert proxy.fired
    assert (split["finish"], split["cached"]) == ("length", 300)
    assert split["tokens"] == unsplit(fail, 301, seed)


def abort_before_prefill_is_asked(pair, name):
    pair.decode.add(name, prompt(301, 30), NEW_TOKENS,
                    {"do_remote_prefill": True, "ticket": "ab" * 16})
    assert eventually(lambda: pair.decode.status()["requests"] == 1, 60)
    pair.decode.say(abort=name)


def abort_decode_under_way(pair, name):
    with slowed(pair) as proxy:
        pair.push(name, prompt(301, 30), NEW_TOKENS, through=proxy.address)
        assert is_under_way(proxy)
        pair.decode.say(abort=name)
        assert all_is_given_back(pair.decode) and all_is_given_back(pair.prefill)


def abort_decode_while_it_draws(pair, name):
    before = handed_off(pair)
    pair.push(name, prompt(301, 30), 700)
    assert eventually(lambda: handed_off(pair) > before, 60)
    pair.decode.say(abort=name)


def abort_prefill_before_its_first_step(pair, name):
    pair.prefill.add(name, prompt(700, 30), 1, {"do_remote_decode": True})
    pair.prefill.say(abort=name)


def abort_an_offer_that_nobody_takes(pair, name):
    pair.prefill.generate(name, prompt(301, 30), 1, {"do_remote_decode": True})
    pair.prefill.say(abort=name)


@pytest.mark.parametrize("abort", [
    abort_before_prefill_is_asked, abort_decode_under_way, abort_decode_while_it_draws,
    abort_prefill_before_its_first_step, abort_an_offer_that_nobody_takes])
def test_an_aborted_request_leaves_nothing(recompute, abort):
    abort(recompute, abort.__name__)
    is_healthy(recompute, 31)


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_prefill_aborts_when_half_is_sent(request, policy):
    pair = request.getfixturevalue(policy)
    pair.prefill.say(abort="gone", computed_tokens=128)
    pair.push("gone", prompt(301, 32), NEW_TOKENS)
    expect(pair, policy, pair.decode.output("gone"), 301, 32)
    is_healthy(pair, 33)


def expect(pair, policy, answer, tokens, seed):
    """The cache did not come: the request was computed or it failed, by the policy."""
    if policy == "recompute":
        assert answer["finish"] == "length" and answer["tokens"] == unsplit(pair, tokens, seed)
    else:
        assert answer["finish"] == "error" and not answer["tokens"]


NONSENSE = (
    {"do_remote_prefill": True}, {"do_remote_prefill": True, "ticket": "x"},
    {"do_remote_prefill": True, "offer": "0" * 32, "prefill_addresses": ["127.0.0.1:1"]})


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_nonsense_from_the_router_costs_one_request(request, policy):
    pair = request.getfixturevalue(policy)
    for number, params in enumerate(NONSENSE):
        answer = pair.decode.generate(f"odd-{number}", prompt(90, 40), NEW_TOKENS, params)
        expect(pair, policy, answer, 90, 40)
    is_healthy(pair, 41)


def test_a_silent_link_costs_one_lease(fail):
    with slowed(fail) as proxy:
        fail.push("silent", prompt(301, 42), NEW_TOKENS, through=proxy.address)
        assert is_under_way(proxy)
        proxy.silent = True
        expect(fail, "fail", fail.decode.output("silent"), 301, 42)
    is_healthy(fail, 43)


def test_many_requests_under_preemption(recompute):
    pair, count = recompute, 50
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


class Storm:
    """Does harm to about one frame in so many that pass: a byte is flipped, or the link cut."""

    def __init__(self, flips, cuts, seed=0):
        self._flips, self._cuts, self._random = flips, cuts, random.Random(seed)
        self.flipped = self.cut = 0

    def __call__(self, lane, way, header, payload):
        if self._random.random() * self._cuts < 1:
            self.cut += 1
            raise ConnectionResetError
        if payload and self._random.random() * self._flips < 1:
            self.flipped += 1
            payload = bytearray(payload)
            payload[self._random.randrange(len(payload))] ^= 1 << self._random.randrange(8)
        return bytes(payload)


# Of every 25 requests: of one prefill never hears, one each is aborted on either side.
FORGOTTEN, ABORTED, GIVEN_UP = 3, 7, 11


@pytest.mark.long
def test_no_token_is_wrong_in_a_storm(recompute):
    pair, count, at_once = recompute, 500, 50
    sizes = [60 + 7 * (number % 37) for number in range(count)]
    harm = Storm(flips=40, cuts=600)
    before, wrong, finished = handed_off(pair), [], 0
    with Proxy(pair.decode_addresses[0], edit=harm) as to_decode, \
            Proxy(pair.prefill_address, edit=harm) as to_prefill:
        for first in range(0, count, at_once):
            batch = range(first, first + at_once)
            for number in batch:
                ask(pair, number, sizes[number], to_decode.address, to_prefill.address)
            batch = [number for number in batch if number % 25 != ABORTED]
            split = [pair.decode.output(f"storm-{number}") for number in batch]
            for number in batch:
                pair.decode.add(f"calm-{number}", prompt(sizes[number], number), NEW_TOKENS)
            for number, answer in zip(batch, split):
                finished += answer["finish"] == "length"
                if answer["tokens"] != pair.decode.output(f"calm-{number}")["tokens"]:
                    wrong.append(number)
    assert all_is_given_back(pair.decode) and all_is_given_back(pair.prefill)
    counts = (f"{finished} finished, {handed_off(pair) - before} caches handed off, {harm.flipped} "
              f"bytes flipped, {harm.cut} cuts, wrong: {wrong}; {pair.decode.status()['totals']}")
    print(counts)
    assert not wrong and finished == count - count // 25, counts
    assert harm.flipped and harm.cut and handed_off(pair) - before > count // 2, counts


def ask(pair, number, tokens, to_decode, to_prefill):
    name, asked, kind = f"storm-{number}", prompt(tokens, number), number % 25
    if kind == FORGOTTEN:
        pair.decode.add(name, asked, NEW_TOKENS, {
            "do_remote_prefill": True, "offer": f"{number:032x}",
            "prefill_addresses": [to_prefill]})
    elif number % 2:
        pair.push(name, asked, NEW_TOKENS, through=to_decode)
    else:
        pair.pull(name, asked, NEW_TOKENS, through=to_prefill)
    if kind == ABORTED:
        pair.decode.say(abort=name)
    elif kind == GIVEN_UP:
        pair.prefill.say(abort=name)


@pytest.mark.long
def test_a_line_that_loses_and_breaks(llama):
    """1 Gbit/s, 20 ms, one segment in 500 lost; all connections are reset after every tenth."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from bench.build import BuildError
    from bench.netlab import Link, LinkUnavailable
    try:
        link = Link(rate_gbit=1, rtt_ms=20, loss=0.002)
    except (LinkUnavailable, BuildError) as error:
        pytest.skip(str(error))
    count = 60
    with link, Pair(llama, policy="recompute", link=link, **ENGINES) as pair:
        for number in range(count):
            how = pair.push if number % 2 else pair.pull
            how(f"line-{number}", prompt(301, number), NEW_TOKENS)
            if number % 10 == 9:
                link.cut()
        split = [pair.decode.output(f"line-{number}") for number in range(count)]
        for number, answer in enumerate(split):
            assert answer["tokens"] == unsplit(pair, 301, number), number
        assert all_is_given_back(pair.decode) and all_is_given_back(pair.prefill)
        assert handed_off(pair) > count // 2
        lost = {side: counts["lost"] for side, counts in link.stats().items()}
        print(f"{handed_off(pair)} of {count} handed off, segments lost: {lost}")
        assert sum(lost.values()) > 0


# These two kill an engine of the pair they are given: the last for it.

@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_prefill_killed_while_it_sends(request, policy):
    pair = request.getfixturevalue(policy)
    with slowed(pair) as proxy:
        pair.push("killed", prompt(301, 50), NEW_TOKENS, through=proxy.address)
        assert is_under_way(proxy)
        pair.prefill.kill()
        for lane in proxy.lanes:  # its kernel would still send what it had taken
            proxy.cut(lane)
        expect(pair, policy, pair.decode.output("killed"), 301, 50)
    assert all_is_given_back(pair.decode)
    assert len(unsplit(pair, 200, 51)) == NEW_TOKENS
