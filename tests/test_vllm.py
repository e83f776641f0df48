"""vLLM hands caches off over kvwire: real engines, prefill and decode in processes of their own.

Random models can be degenerate, so the bytes of the caches are compared as well as the tokens.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm_engines import Pair, prompt
from vllm_models import MODELS, dtype, make, missing

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parent.parent
NEW_TOKENS = 16
CHUNK_TOKENS = 128
# More than one of the blocks that its states need.
PROMPT_TOKENS = {"qwen3_next": 700, "qwen3_5": 700}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def continues(pair, how, asked, same_bytes=True):
    """Hand `asked` off with the token that the decode engine alone drew next; see that both engines
    hold the same cache, and that what follows is what followed there. Return both.

    So the last token is read by itself in either case. That vLLM is told to read the prompt in two
    parts is not enough: its MLA kernels for CPUs take it as a whole, and compute otherwise.
    """
    name = f"{how.__name__}-{len(asked)}"
    first, *alone = pair.decode.generate(f"alone-{name}", asked, NEW_TOKENS + 1)["tokens"]
    how(name, [*asked, first], NEW_TOKENS)
    split = pair.decode.output(name)
    assert split["finish"] == "length"  # the policy is to fail
    if same_bytes:
        assert pair.prefill.digests(name) == pair.decode.digests(name)
    assert split["tokens"] == alone
    return first, alone


@pytest.mark.parametrize("name", MODELS)
def test_split_equals_unsplit(models, name):
    if lacking := missing(name):
        pytest.skip(f"{name} does not run in this build of vLLM, which lacks {lacking}")
    with Pair(make(models, name), dtype=dtype(name), digests=True,
              max_num_batched_tokens=CHUNK_TOKENS) as pair:
        for how, seed in ((pair.push, 0), (pair.pull, 1)):
            asked = prompt(PROMPT_TOKENS.get(name, 300), seed)
            first, alone = continues(pair, how, asked)
            # With another cache it would have been seen.
            other = pair.decode.generate(f"other-{seed}", [*reversed(asked), first], NEW_TOKENS)
            assert other["tokens"] != alone


# What reads a built model file is in the environment that kvwire itself is built in.
READ_TRAINED = """
import json, sys, torch
from kvwire.demo import models
folder, text = sys.argv[1:]
trained = models.load(models.TRAINED)
trained.model.to(torch.bfloat16).save_pretrained(folder)
print(json.dumps(trained.tokens(open(text).read())))
"""


def test_a_trained_model_reads_a_text(models):
    python, path = ROOT / ".venv" / "bin" / "python", models / "smollm2"
    if not python.exists():
        pytest.skip(f"{python} is not there: make test-vllm builds it")
    ids = json.loads(subprocess.run(
        [python, "-c", READ_TRAINED, path, ROOT / "LICENSE"], cwd=ROOT, check=True,
        stdout=subprocess.PIPE, text=True).stdout)
    with Pair(path, dtype=dtype("smollm2"), digests=True, repetition_penalty=1.0,
              max_num_batched_tokens=CHUNK_TOKENS) as pair:
        for how, asked in ((pair.push, ids[:600]), (pair.pull, ids[600:1000])):
            _, alone = continues(pair, how, asked)
            assert len(set(alone)) > NEW_TOKENS // 2


# From here on in fp32: ranks add up in another order, blocks are read in other portions.

@pytest.mark.parametrize("ranks", [(1, 2), (2, 1), (2, 2)])
def test_tensor_parallelism_may_differ(models, ranks):
    with Pair(make(models, "granitemoehybrid"), dtype="float32",
              prefill={"tensor_parallel_size": ranks[0]},
              decode={"tensor_parallel_size": ranks[1]}) as pair:
        continues(pair, pair.push, prompt(300), same_bytes=False)
        continues(pair, pair.pull, prompt(299, 1), same_bytes=False)


@pytest.mark.parametrize("block_tokens", [(32, 96), (128, 32)])
def test_block_sizes_may_differ(models, block_tokens):
    with Pair(make(models, "gemma3"), dtype="float32", max_num_batched_tokens=CHUNK_TOKENS,
              prefill={"block_size": block_tokens[0]},
              decode={"block_size": block_tokens[1]}) as pair:
        continues(pair, pair.push, prompt(300), same_bytes=False)
        continues(pair, pair.pull, prompt(299, 1), same_bytes=False)


def test_only_missing_tokens_travel(models):
    """A prefix that the decode engine has stays where it is; and prefill may have one, too."""
    row_bytes = 3 * 2 * 2 * 32 * 4  # layers, heads, K and V, head size, fp32
    with Pair(make(models, "llama"), dtype="float32", block_size=32,
              enable_prefix_caching=True) as pair:
        for how, seed in ((pair.push, 0), (pair.pull, 1)):
            pair.decode.generate(f"first-{seed}", prompt(200, seed), 1)
            before = pair.decode.status()["totals"].get("decode_cache_bytes", 0)
            how(f"next-{seed}", prompt(301, seed), NEW_TOKENS)
            split = pair.decode.output(f"next-{seed}")
            after = pair.decode.status()["totals"]["decode_cache_bytes"]
            assert after - before == (300 - 192) * row_bytes
            assert split["tokens"] == pair.decode.generate(
                f"un-{seed}", prompt(301, seed), NEW_TOKENS)["tokens"]
