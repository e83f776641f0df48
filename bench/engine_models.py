"""The models and prompts of ``python -m bench.engine``."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from bench.build import ROOT

__all__ = ["MODELS", "ModelMissing", "TRAINED", "known", "make", "prompt"]

TRAINED = "smollm2"
MODELS = (TRAINED, "qwen3_next", "llama")
_TINY_VOCABULARY = 500
_FOLDER = ROOT / ".build" / "engine"


class ModelMissing(Exception):
    """The model cannot be made here; says why."""


def known() -> list[str]:
    """Return the names that `make` takes."""
    listed = re.findall(r'^    "(\w+)": \(', (ROOT / "tests" / "vllm_models.py").read_text(), re.M)
    return [TRAINED, *listed]


def make(name: str, python: Path) -> Path:
    """Return the folder of a model in bf16, made there unless it is there already.

    Args:
        name: `TRAINED`, or of tests/vllm_models.py: tiny, with random weights.
        python: of vLLM's environment, whose transformers writes the random ones.
    """
    folder = _FOLDER / name
    if (folder / "config.json").exists():
        return folder
    if name == TRAINED:
        _demo_model().model.bfloat16().save_pretrained(folder)
        return folder
    done = subprocess.run([python, ROOT / "tests" / "vllm_models.py", _FOLDER, name],
                          capture_output=True, text=True)
    if done.returncode != 0:
        raise ModelMissing(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return folder


def prompt(name: str, tokens: int) -> list[int]:
    """Return the ids of real text (Python's documentation), or of the random models any."""
    if name != TRAINED:
        return [(7 * i * i + 3 * i + 1) % _TINY_VOCABULARY for i in range(tokens)]
    from pydoc_data.topics import topics
    text = "\n\n".join(topics[topic] for topic in sorted(topics))
    ids = _demo_model().tokens(text[:tokens * 12])
    if len(ids) < tokens:
        raise ModelMissing(f"the text has {len(ids)} tokens, {tokens} are asked for")
    return ids[:tokens]


def _demo_model() -> object:
    from kvwire.demo import models
    from kvwire.errors import UsageError
    try:
        return models.load(models.TRAINED)
    except (UsageError, ImportError) as error:
        raise ModelMissing(f"{TRAINED}: {error}") from None
