"""vLLM as it is run: the serving example as typed, metrics, cache events, secured hand-offs, and
the benchmark."""

import base64
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import msgspec
import zmq
from faults import eventually
from test_security import KEY, OTHER_KEY, Authority, needs_openssl, needs_tls
from vllm_engines import Engine
from vllm_models import make

import kvwire
from kvwire.errors import KvwireError

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parent.parent
PORT = 17400
EVENTS = "tcp://127.0.0.1:17490"
NEW_TOKENS = 16
START_SECONDS_MAX = 900


def prompt(tokens, seed):
    return [(7 * i * i + 3 * i + 1 + 11 * seed) % 500 for i in range(tokens)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models"), "llama")


def configurations(kind, folder):
    """Return the security of prefill and of decode, and that of a stranger."""
    if kind == "tls":
        authority, stranger = Authority(folder, "ca"), Authority(folder, "other")
        names = ("ca", "certificate", "key")

        def files(tls):
            return {"kind": "tls", **{name: str(getattr(tls, name)) for name in names}}
        return (files(authority.tls("prefill")), files(authority.tls("decode")),
                stranger.tls("prefill"))
    config = {"kind": "hmac", "key": base64.b64encode(KEY).decode()}
    return config, config, kvwire.HmacAdmission(OTHER_KEY)


@needs_openssl
@needs_tls
@pytest.mark.parametrize("kind", ["tls", pytest.param("hmac", marks=pytest.mark.long)])
def test_hand_offs_are_secured(model, tmp_path, kind):
    """Pushed and pulled; and who has another certificate or secret stays out."""
    ours, theirs, stranger = configurations(kind, tmp_path)
    settings = {"model": str(model), "dtype": "float32", "enable_prefix_caching": False}
    addresses = {"prefill": f"127.0.0.1:{PORT + 10}", "decode": f"127.0.0.1:{PORT}"}
    prefill = Engine(**settings, transfer={
        "kv_role": "kv_producer", "kv_connector_extra_config": {
            "prefill_listen": addresses["prefill"], "security": ours}})
    decode = Engine(**settings, transfer={
        "kv_role": "kv_consumer", "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"decode_listen": addresses["decode"], "security": theirs}})
    try:
        prefill.wait_ready()
        decode.wait_ready()
        ticket = secrets.token_hex(16)
        decode.add("push", prompt(200, 1), NEW_TOKENS, {
            "do_remote_prefill": True, "ticket": ticket})
        prefill.add("push", prompt(200, 1), 1, {
            "do_remote_decode": True, "ticket": ticket,
            "decode_addresses": [addresses["decode"]]})
        answer = prefill.generate("pull", prompt(200, 2), 1, {"do_remote_decode": True})
        decode.add("pull", prompt(200, 2), NEW_TOKENS, answer["params"])
        for seed, name in enumerate(("push", "pull"), 1):
            split = decode.output(name)
            assert split["finish"] == "length"  # the policy is to fail
            assert split["tokens"] == decode.generate(
                f"alone-{name}", prompt(200, seed), NEW_TOKENS)["tokens"]
        assert decode.status()["totals"]["decode_handoffs"] == 2
        for security in (stranger, None):
            with kvwire.Sender(addresses["decode"], security=security) as sender:
                with pytest.raises(KvwireError):
                    sender.connect()
        assert decode.generate("after", prompt(80, 3), 2)["finish"] == "length"
    finally:
        prefill.stop()
        decode.stop()


class Typed:
    """The commands of a README's blocks, run by bash as they stand."""

    def __init__(self, folder, commands):
        self.log = open(folder / "log", "w+")
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            ["bash", "-c", commands.rstrip() + " &\nwait -n"], cwd=ROOT, stdout=self.log,
            stderr=self.log, start_new_session=True, env={
                **os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1",
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])})

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(60)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass
        self.log.close()

    def said(self):
        self.log.seek(0)
        return self.log.read()[-6000:]


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.read().decode()
    except OSError:
        return None


def completion(port, body):
    with urllib.request.urlopen(urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"}), timeout=300) as response:
        return json.loads(response.read())["choices"][0]["text"]


def with_tokenizer(folder):
    """Give a random model a tokenizer: one token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def typed_in(command, model):
    """Return what a command of the README prints."""
    return subprocess.run(
        ["bash", "-c", f"MODEL={model}\n{command}"], capture_output=True, text=True, timeout=600,
        check=True).stdout


def stored_tokens(subscriber):
    """Return the tokens of the blocks that the engine says it has stored."""
    found = []
    while subscriber.poll(1000):
        _, _, batch = subscriber.recv_multipart()
        for event in msgspec.msgpack.decode(batch)[1]:
            if event["type"] == "BlockStored":
                found += event["token_ids"]
    return found


def test_the_example_works_as_typed(model, tmp_path):
    """But for a smaller model, eagerly and in fp32; and with cache events, to see them."""
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "examples" / "README.md").read_text(), re.S)
    start, ask = blocks[:2]
    name = with_tokenizer(model)
    start = re.sub(r"MODEL=\S+", f"MODEL={name}", start, count=1)
    start = start.replace("$MODEL --port", "$MODEL --enforce-eager --dtype float32 --port")
    events = json.dumps({"enable_kv_cache_events": True, "endpoint": EVENTS.replace(
        "127.0.0.1", "*")})
    start = start.replace("--port 8200", f"--port 8200 --kv-events-config '{events}'")
    with Typed(tmp_path, start) as typed, zmq.Context() as context, \
            context.socket(zmq.SUB) as subscriber:
        subscriber.connect(EVENTS)
        subscriber.subscribe(b"")
        assert eventually(lambda: typed.process.poll() is not None or all(
            get(f"http://127.0.0.1:{port}/health") is not None for port in (8100, 8200)),
            START_SECONDS_MAX) and typed.process.poll() is None, typed.said()
        answered = typed_in(ask, name)
        body = json.loads(typed_in(ask.partition("|")[0], name))
        text = json.loads(answered)["choices"][0]["text"]
        assert text and text == completion(8100, body)  # prefill's engine, by itself
        metrics = get("http://127.0.0.1:8200/metrics")
        counted = dict(re.findall(r"^vllm:kvwire_decode_(\w+)_total\{.*\} (\S+)$", metrics, re.M))
        assert float(counted["handoffs"]) == 1 and float(counted["cache_bytes"]) > 100_000
        sent = get("http://127.0.0.1:8100/metrics")
        assert re.search(r"^vllm:kvwire_prefill_wire_bytes_total\{.*\} [1-9]", sent, re.M)
        assert len(stored_tokens(subscriber)) > len(body["prompt"]) - 200  # whole blocks only


def test_the_smallest_benchmark(tmp_path):
    """In fp32, in which kvwire takes any CPU's caches."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.engine", "--engine-python", sys.executable, "--models",
         "llama", "--systems", "kvwire", "--links", "loopback", "--dtype", "float32", "--chunk",
         "64", "--prompts", "129", "--rounds", "1", "--overhead-rounds", "1", "--json",
         tmp_path / "rows.json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, *rows = json.loads((tmp_path / "rows.json").read_text())
    split = next(row for row in rows if row.get("system") == "kvwire")
    assert split["identical"] and split["cache_bytes"] == 128 * 3 * 2 * 2 * 32 * 4
    assert {row["connector"] for row in rows if "step" in row} == {"none", "idle", "saving"}
