"""vLLM engines in processes of their own, and what a router says to a pair of them."""

from __future__ import annotations

import json
import os
import queue
import secrets
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from bench.build import ROOT

__all__ = ["Engine", "EngineFailed", "Pair", "Place", "SYSTEMS", "Setup", "installed"]

_START_SECONDS_MAX = 900
_ANSWER_SECONDS_MAX = 600
_LOG_LINES = 15
_KVWIRE_PORT = 17800
_SIDE_PORT = 17850
_PEERS = ROOT / ".build" / "peers"  # what `make peers` installs
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class EngineFailed(Exception):
    """An engine died, or did not answer; says what it wrote last."""


@dataclass(frozen=True)
class Setup:
    """How engines are started.

    Attributes:
        python: of vLLM's environment.
        arguments: vllm.EngineArgs of all engines of a model.
        cores: of the prefill and of the decode engine. As many each as the other: two machines.
    """

    python: Path
    arguments: Mapping[str, object]
    cores: Mapping[str, str]


@dataclass(frozen=True)
class Place:
    """Where a side runs, and under which address the other side finds it.

    Attributes:
        namespace: of `bench.netlab.Link`; None: this machine's own.
    """

    address: str
    namespace: str | None = None


class Engine:
    """One engine; of its connector `transfer`, as of vllm.config.KVTransferConfig."""

    def __init__(self, setup: Setup, place: Place, cores: str,
                 transfer: Mapping[str, object] | None = None,
                 environment: Mapping[str, str] | None = None):
        self._log = tempfile.TemporaryFile("w+")
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        settings = {**setup.arguments, "transfer": transfer, "namespace": place.namespace}
        paths = [str(ROOT), *filter(None, [(environment or {}).get("PYTHONPATH"),
                                           os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [str(setup.python), "-m", "bench.engine_peer", json.dumps(settings)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, cwd=ROOT,
            env={**os.environ, **_ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": cores,
                 **(environment or {}), "PYTHONPATH": os.pathsep.join(paths)})
        threading.Thread(target=self._read, daemon=True).start()

    def wait_ready(self) -> None:
        self._next(_START_SECONDS_MAX)

    def add(self, name: str, prompt: Sequence[int], max_tokens: int,
            params: Mapping[str, object] | None = None) -> None:
        self._say(add=name, prompt=prompt, max_tokens=max_tokens, params=params)

    def output(self) -> dict[str, object]:
        """Return the answer to the only request."""
        return self._next(_ANSWER_SECONDS_MAX)

    def generate(self, *request: object) -> dict[str, object]:
        self.add(*request)
        return self.output()

    def stop(self) -> None:
        try:
            if self._process.poll() is None:
                self._say(stop=True)
                self._process.wait(60)
        except (EngineFailed, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _say(self, **command: object) -> None:
        try:
            print(json.dumps(command), file=self._process.stdin, flush=True)
        except OSError:
            raise EngineFailed(f"the engine died: {self._last_words()}") from None

    def _next(self, seconds: float) -> dict[str, object]:
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise EngineFailed(f"no answer in {seconds} s: {self._last_words()}") from None
        if answer is None:
            raise EngineFailed(f"the engine died: {self._last_words()}")
        return answer

    def _read(self) -> None:
        for line in self._process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put(None)

    def _last_words(self) -> str:
        self._log.seek(0)
        return "\n".join(self._log.read().splitlines()[-_LOG_LINES:])


Addresses = Mapping[str, str]
Params = dict[str, object]


@dataclass(frozen=True)
class System:
    """A connector: how both engines are configured for it, and what a router tells them.

    Attributes:
        transfer: (side, addresses of both) -> KVTransferConfig.
        prefill_params: (a number of its own for each request, addresses) -> kv_transfer_params.
        decode_params: the same, and both engines are asked at once; None: decode is given what
            prefill answered.
        environment: (side, addresses of both) -> environment variables.
    """

    transfer: Callable[[str, Addresses], Params]
    prefill_params: Callable[[str, Addresses], Params]
    decode_params: Callable[[str, Addresses], Params] | None = None
    environment: Callable[[str, Addresses], dict[str, str]] = field(
        default=lambda side, addresses: {})


def _kvwire(codec: str) -> System:
    def transfer(side: str, addresses: Addresses) -> Params:
        own = {"codec": codec} if side == "prefill" else {
            "decode_listen": f"{addresses['decode']}:{_KVWIRE_PORT}",
            "allow_unauthenticated": True}
        return {"kv_connector": "ProbedConnector", "kv_load_failure_policy": "fail",
                "kv_connector_module_path": "bench.engine_probe",
                "kv_role": "kv_producer" if side == "prefill" else "kv_consumer",
                "kv_connector_extra_config": {"lease_s": 60, **own}}

    return System(
        transfer,
        lambda number, addresses: {
            "do_remote_decode": True, "ticket": number,
            "decode_addresses": [f"{addresses['decode']}:{_KVWIRE_PORT}"]},
        lambda number, addresses: {"do_remote_prefill": True, "ticket": number})


def _nixl() -> System:
    return System(
        lambda side, addresses: {
            "kv_connector": "NixlConnector", "kv_buffer_device": "cpu",
            "kv_role": "kv_producer" if side == "prefill" else "kv_consumer",
            "kv_load_failure_policy": "fail"},
        lambda number, addresses: {"do_remote_decode": True, "do_remote_prefill": False},
        environment=lambda side, addresses: {
            "PYTHONPATH": str(_PEERS), "UCX_TLS": "tcp",
            "VLLM_NIXL_SIDE_CHANNEL_HOST": addresses[side],
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(_SIDE_PORT + (side == "decode"))})


def installed() -> list[str]:
    """Return the systems that can run here, in order."""
    return [name for name in SYSTEMS if name != "nixl" or (_PEERS / "nixl").exists()]


SYSTEMS = {"kvwire": _kvwire("raw"), "kvwire-tiered": _kvwire("tiered"), "nixl": _nixl()}


class Pair:
    """A prefill and a decode engine of one system."""

    def __init__(self, setup: Setup, system: str, places: Mapping[str, Place]):
        self._system = SYSTEMS[system]
        addresses = {side: place.address for side, place in places.items()}
        self._addresses = addresses
        with ExitStack() as engines:
            made = {}
            for side, place in places.items():
                made[side] = Engine(setup, place, setup.cores[side],
                                    self._system.transfer(side, addresses),
                                    self._system.environment(side, addresses))
                engines.callback(made[side].stop)
            for engine in made.values():
                engine.wait_ready()
            self.prefill, self.decode = made["prefill"], made["decode"]
            self._engines = engines.pop_all()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exc: object) -> None:
        self._engines.close()

    def hand_off(self, name: str, prompt: Sequence[int], max_tokens: int
                 ) -> tuple[int, dict[str, object], dict[str, object]]:
        """Return when it was asked (time.monotonic_ns), and the answers of prefill and decode."""
        system, number = self._system, secrets.token_hex(16)
        asked = time.monotonic_ns()
        if system.decode_params is not None:
            self.decode.add(name, prompt, max_tokens, system.decode_params(number, self._addresses))
        self.prefill.add(name, prompt, 1, system.prefill_params(number, self._addresses))
        sent = self.prefill.output()
        if system.decode_params is None:
            self.decode.add(name, prompt, max_tokens, sent["params"])
        return asked, sent, self.decode.output()
