"""Drives vLLM engines in processes of their own, as a router would."""

import json
import os
import queue
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
START_SECONDS_MAX = 900
ANSWER_SECONDS_MAX = 300


class Engine:
    """One engine; `settings` are vllm.EngineArgs, and of the connector `transfer`."""

    def __init__(self, **settings):
        if settings.get("tensor_parallel_size", 1) > 1:
            settings |= {"distributed_executor_backend": "mp"}
        bind = "|".join(map(str, range(settings.get("tensor_parallel_size", 1))))
        self._log = tempfile.TemporaryFile("w+")
        self._answers, self._kept = queue.SimpleQueue(), []
        paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "vllm_peer.py"), json.dumps(settings)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)} | (
                {"VLLM_CPU_OMP_THREADS_BIND": bind} if "|" in bind else {}))
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put({"dead": True})

    def wait_ready(self):
        self.wait(lambda answer: "ready" in answer, START_SECONDS_MAX)
        return self

    def wait(self, condition, seconds=ANSWER_SECONDS_MAX):
        """Return the first answer that suits; others are kept."""
        for answer in self._kept:
            if condition(answer):
                self._kept.remove(answer)
                return answer
        end = time.monotonic() + seconds
        while True:
            try:
                answer = self._answers.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no answer in {seconds} s; {self.log()}") from None
            if "dead" in answer:
                raise AssertionError(f"the engine died: {self.log()}")
            if condition(answer):
                return answer
            self._kept.append(answer)

    def say(self, **command):
        print(json.dumps(command), file=self.process.stdin, flush=True)

    def add(self, name, prompt, max_tokens, params=None):
        self.say(add=name, prompt=prompt, max_tokens=max_tokens, params=params)

    def output(self, name):
        return self.wait(lambda answer: answer.get("id") == name and "tokens" in answer)

    def generate(self, name, prompt, max_tokens, params=None):
        self.add(name, prompt, max_tokens, params)
        return self.output(name)

    def digests(self, name):
        """Return what the connector says of a request's cache; its ids have a suffix."""
        return self.wait(lambda answer: "digests" in answer
                         and answer["id"].startswith(name + "-"))["digests"]

    def status(self):
        """Return counts of what the engine holds, at some step after now."""
        self.say(status=True)
        return self.wait(lambda answer: "status" in answer)["status"]

    def log(self):
        self._log.seek(0)
        return self._log.read()[-4000:]

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        if self.process.poll() is None:
            try:
                self.say(stop=True)
                self.process.wait(60)
            except (OSError, subprocess.TimeoutExpired):
                self.kill()
        self._log.close()


class Pair:
    """A prefill and a decode engine, and what a router says to them."""

    def __init__(self, model, base_port, policy="fail", prefill=None, decode=None, **both):
        self.decode_port, self.prefill_port = base_port, base_port + 10
        settings = {"model": str(model), **both}
        self.prefill = Engine(**settings | (prefill or {}), transfer={
            "kv_role": "kv_producer", "kv_connector_extra_config": {
                "prefill_listen": f"127.0.0.1:{self.prefill_port}", "lease_s": 60}})
        self.decode = Engine(**settings | (decode or {}), transfer={
            "kv_role": "kv_consumer", "kv_load_failure_policy": policy,
            "kv_connector_extra_config": {
                "decode_listen": f"127.0.0.1:{self.decode_port}", "lease_s": 60}})
        self.prefill_ranks, self.decode_ranks = ((settings | (own or {})).get(
            "tensor_parallel_size", 1) for own in (prefill, decode))

    def __enter__(self):
        try:
            self.prefill.wait_ready()
            self.decode.wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc):
        for engine in (self.prefill, self.decode):
            engine.stop()

    def push(self, name, prompt, max_tokens, through=None):
        """Ask both at once; `through`: the address of a proxy before the decode engine."""
        ticket = secrets.token_hex(16)
        self.decode.add(name, prompt, max_tokens, {
            "do_remote_prefill": True, "ticket": ticket, "prefill_ranks": self.prefill_ranks})
        self.prefill.add(name, prompt, 1, {
            "do_remote_decode": True, "ticket": ticket,
            "decode_addresses": [through] if through else [
                f"127.0.0.1:{self.decode_port + rank}" for rank in range(self.decode_ranks)]})

    def pull(self, name, prompt, max_tokens):
        """Ask prefill, then decode with what prefill answered."""
        answer = self.prefill.generate(name, prompt, 1, {
            "do_remote_decode": True, "decode_ranks": self.decode_ranks})
        self.decode.add(name, prompt, max_tokens, answer["params"])
