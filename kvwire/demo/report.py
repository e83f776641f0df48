"""What the demo says, on a terminal and elsewhere."""

from __future__ import annotations

import os
import shutil
import textwrap
import time
from itertools import zip_longest
from typing import TextIO

from kvwire.demo.router import Outcome

__all__ = ["Console", "describe"]

_KIND_WORDS = {"full_attention": "KV", "latent": "MLA latent", "sliding_window": "window KV",
               "recurrent": "state", "convolution": "conv state", "auxiliary": "auxiliary"}
_LABEL_WIDTH = 11
_COLUMN_WIDTH = 33
_TOKENS_PER_ROW = 8


class Console:
    """Lines that stay, and on a terminal one line of status that does not.

    Elsewhere the status is a line each time another phase begins.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._live = stream.isatty()
        self._coloured = self._live and "NO_COLOR" not in os.environ
        self._phase, self._phase_began = "", 0.0

    def line(self, text: str = "") -> None:
        self._put(("\r\x1b[K" if self._live else "") + text + "\n")

    def status(self, phase: str, detail: str = "") -> None:
        if phase != self._phase:
            self._phase, self._phase_began = phase, time.monotonic()
            if not self._live:
                self._put(f"  … {phase}\n")
        if self._live:
            seconds = f"{time.monotonic() - self._phase_began:.0f} s"
            text = f"  … {phase}: {', '.join(filter(None, (detail, seconds)))}"
            self._put("\r\x1b[K" + text[:shutil.get_terminal_size().columns - 1])

    def strong(self, text: str, good: bool | None = None) -> str:
        """Return the text in bold, green or red."""
        if not self._coloured:
            return text
        return f"\x1b[1{'' if good is None else ';32' if good else ';31'}m{text}\x1b[0m"

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._put("\r\x1b[K")

    def _put(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def describe(outcome: Outcome, console: Console) -> list[str]:
    """Return the lines that tell how one model's hand-off went."""
    total = sum(outcome.cache_bytes.values())
    kinds = ", ".join(f"{words} {outcome.cache_bytes[kind]:,}"
                      for kind, words in _KIND_WORDS.items() if kind in outcome.cache_bytes)
    rows = [
        ("prompt", f"{outcome.prompt_tokens:,} tokens, prefill took "
                   f"{outcome.prefill_seconds:.1f} s"),
        ("cache", f"{total:,} bytes: {kinds}"),
        ("transfer", f"{outcome.wire_bytes:,} wire bytes, {outcome.transfer_seconds * 1e3:.1f} ms, "
                     f"{total / outcome.transfer_seconds / 1e9:.2f} GB/s of cache; first layer "
                     f"after {outcome.first_layer_seconds * 1e3:.1f} ms"),
        *_both_runs(outcome),
        ("", _verdict(outcome, console)),
        ("", _control_verdict(outcome, console)),
    ]
    if outcome.repaired_chunks:
        rows.insert(3, ("repaired", f"{outcome.repaired_chunks:,} chunks travelled again"))
    return [f"  {label:{_LABEL_WIDTH}}{text}" for label, text in rows]


def _both_runs(outcome: Outcome) -> list[tuple[str, str]]:
    """Return the rows that show the tokens of both runs side by side."""
    unsplit, split = ((_wrapped(outcome.unsplit_text), _wrapped(outcome.split_text))
                      if outcome.speaks else (_numbers(outcome.unsplit), _numbers(outcome.split)))
    pairs = [("one process", "split in two"), *zip_longest(unsplit, split, fillvalue="")]
    return [("" if row else "output", f"{left:{_COLUMN_WIDTH}}| {right}")
            for row, (left, right) in enumerate(pairs)]


def _verdict(outcome: Outcome, console: Console) -> str:
    if outcome.identical:
        return (f"{console.strong('identical', True)}: {len(outcome.split)} tokens, and "
                f"{outcome.tensor_count} tensors bit for bit")
    faults, wrong = [], outcome.wrong_tensors
    if outcome.unsplit != outcome.split:
        faults.append(f"tokens from number {_first_difference(outcome.unsplit, outcome.split)} on")
    if wrong:
        some = ", ".join(wrong[:4]) + (" ..." if len(wrong) > 4 else "")
        faults.append(f"{len(wrong)} of {outcome.tensor_count} tensors ({some})")
    if outcome.verified_bytes != sum(outcome.cache_bytes.values()):
        faults.append(f"verified bytes ({outcome.verified_bytes:,})")
    return f"{console.strong('DIFFERENT', False)}: {'; '.join(faults)}"


def _control_verdict(outcome: Outcome, console: Console) -> str:
    control = outcome.control
    zeroed = f"with {control.tensor} of layer {control.layer} zeroed"
    changed = sum(a != b for a, b in zip(control.tokens, outcome.split))
    if not outcome.control_differs:
        return f"{console.strong('control DOES NOT DIFFER', False)} {zeroed}: it proves nothing"
    what = (f"{changed} of {len(outcome.split)} tokens change" if changed
            else f"logits change by {control.logits_change:.2g}, no token does")
    return f"{console.strong('control differs', True)}: {zeroed}, {what}"


def _first_difference(left: list[int], right: list[int]) -> int:
    return next((number for number, (a, b) in enumerate(zip_longest(left, right), 1) if a != b))


def _wrapped(text: str) -> list[str]:
    visible = "".join(letter if letter.isprintable() else " " for letter in text)
    return textwrap.wrap(visible, _COLUMN_WIDTH - 1) or [""]


def _numbers(tokens: list[int]) -> list[str]:
    return ["".join(f"{token:<4}" for token in tokens[at:at + _TOKENS_PER_ROW]).rstrip()
            for at in range(0, len(tokens), _TOKENS_PER_ROW)]
