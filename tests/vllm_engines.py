"""Drives vLLM engines in processes of their own, as a router would."""

import contextlib
import multiprocessing
import os
import queue
import secrets
import socket
import tempfile
import threading
import time
from functools import cache
from pathlib import Path

import vllm_peer

HERE = Path(__file__).parent
START_SECONDS_MAX = 900
ANSWER_SECONDS_MAX = 300
# Random models fall into loops, in which a wrong cache would not show.
REPETITION_PENALTY = 1.5


@cache
def forks():
    """Return the context that makes processes which have vLLM imported: that takes longer than all
    the rest."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [
        str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")]))
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["vllm_peer", "vllm.v1.engine.llm_engine", "vllm.v1.engine.core",
                                 "vllm.v1.worker.cpu_worker", "kvwire.connectors.vllm"])
    return made


class Engine:
    """One engine; for `settings` see `vllm_peer.main`."""

    def __init__(self, **settings):
        ranks = settings.get("tensor_parallel_size", 1)
        if ranks > 1:
            settings |= {"distributed_executor_backend": "mp", "environment": {
                "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))}}
        self._log = tempfile.NamedTemporaryFile("r")
        self._answers, self._kept = queue.SimpleQueue(), []
        self._pipe, theirs = forks().Pipe()
        self.process = forks().Process(target=vllm_peer.main,
                                       args=(settings, theirs, self._log.name))
        self.process.start()
        theirs.close()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        try:
            while True:
                self._answers.put(self._pipe.recv())
        except (EOFError, OSError):
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
        self._pipe.send(command)

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
        self.process.join()

    def stop(self):
        with contextlib.suppress(OSError):
            self.say(stop=True)
        self.process.join(60)
        if self.process.is_alive():
            self.kill()
        self._log.close()


class Pair:
    """A prefill and a decode engine, and what a router says to them.

    Args:
        policy: kv_load_failure_policy of the decode engine.
        link: a bench.netlab.Link to put between them; prefill is on its left.
        prefill, decode: settings of one of them; `both`: of both.
    """

    def __init__(self, model, policy="fail", lease_s=60, link=None, prefill=None, decode=None,
                 **both):
        settings = {"model": str(model), "enable_prefix_caching": False,
                    "repetition_penalty": REPETITION_PENALTY, **both}
        own = [settings | (prefill or {}), settings | (decode or {})]
        hosts = ["127.0.0.1"] * 2
        if link is not None:
            hosts = link.address["left"], link.address["right"]
            for values, side in zip(own, ("left", "right")):
                values["namespace"] = link.namespace(side)
        self.prefill_ranks, self.decode_ranks = (
            values.get("tensor_parallel_size", 1) for values in own)
        port = free_ports(self.prefill_ranks + self.decode_ranks)
        self.prefill_address = f"{hosts[0]}:{port}"
        self.decode_addresses = [f"{hosts[1]}:{port + self.prefill_ranks + rank}"
                                 for rank in range(self.decode_ranks)]
        options = {"lease_s": lease_s, "allow_unauthenticated": link is not None}
        self.prefill = Engine(**own[0], transfer={
            "kv_role": "kv_producer", "kv_connector_extra_config": {
                "prefill_listen": self.prefill_address, **options}})
        self.decode = Engine(**own[1], transfer={
            "kv_role": "kv_consumer", "kv_load_failure_policy": policy,
            "kv_connector_extra_config": {"decode_listen": self.decode_addresses[0], **options}})

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
            "decode_addresses": [through] if through else self.decode_addresses})

    def pull(self, name, prompt, max_tokens, through=None):
        """Ask prefill, then decode with what prefill answered; `through`: a proxy before it."""
        params = self.prefill.generate(name, prompt, 1, {
            "do_remote_decode": True, "decode_ranks": self.decode_ranks})["params"]
        if through:
            params["prefill_addresses"] = [through]
        self.decode.add(name, prompt, max_tokens, params)


def free_ports(count):
    """Return the first of `count` ports in a row that nobody listens on."""
    while True:
        with contextlib.ExitStack() as held:
            first = held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            try:
                for port in range(first + 1, first + count):
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
            except (OSError, OverflowError):
                continue
        return first


def prompt(tokens, seed=0):
    return [(7 * i * i + 3 * i + 1 + 11 * seed) % 500 for i in range(tokens)]
