"""vLLM hands caches off over kvwire: real engines, prefill and decode in processes of their own.

Random models can be degenerate, so the bytes of the caches are compared as well as the tokens.
"""

import pytest

pytest.importorskip("vllm")

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
            assert split["finish"] == "length" and split["cached"] in (0, tokens - 1)
            assert pair.prefill.digests(request) == pair.decode.digests(request)
            unsplit = pair.decode.generate(f"un{request}", prompt(tokens, seed), NEW_TOKENS)
            assert split["tokens"] == unsplit["tokens"]
