"""One vLLM engine of ``python -m bench.engine``, in a process of its own and vLLM's environment.

Commands come and answers go as lines of JSON on the standard streams:

    {"add": id, "prompt": [...], "max_tokens": n, "params": {...}}      {"stop": true}
    ← {"ready": true}
    ← {"id", "tokens", "finish", "params", "began_ns", "first_ns", "last_ns", "connector_ns",
       "steps", "marks", "totals"}

Times are of time.monotonic_ns, which all processes of a machine share. The engine's loop is that
of vLLM's EngineCoreProc, which sleeps 1 ms after a step that computed nothing.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from queue import Empty, SimpleQueue

from bench import netlab

_IDLE_SLEEP_S = 0.001
_REPETITION_PENALTY = 1.5  # random models fall into loops, in which a wrong cache would not show
_WARM_UP_TOKENS = 64  # the CPU kernels of vLLM 0.32 crash when the first pass of all has one token


class Peer:
    """The loop of one engine; it answers one request at a time in full."""

    def __init__(self, settings: dict[str, object], answers):
        from vllm import EngineArgs, LLMEngine
        from vllm.config import KVTransferConfig

        from bench.engine_probe import PROBE
        transfer = settings.pop("transfer", None)
        self._engine = LLMEngine.from_engine_args(EngineArgs(
            skip_tokenizer_init=True, enforce_eager=True, max_num_seqs=8,
            enable_prefix_caching=False,
            kv_transfer_config=KVTransferConfig(**transfer) if transfer else None, **settings))
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self._probe, self._answers = PROBE, answers
        self._times: dict[str, dict[str, int]] = {}
        self._steps = self._scheduled = 0
        self._count_scheduled()
        self._commands: SimpleQueue = SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def run(self) -> None:
        self._add({"add": "warm-up", "prompt": list(range(1, 1 + _WARM_UP_TOKENS)),
                   "max_tokens": 2})
        while not self._step():
            pass
        self._say({"ready": True})
        while True:
            busy = self._scheduler.has_requests() or self._engine.has_unfinished_requests()
            try:
                command = self._commands.get(block=not busy)
            except Empty:
                for answer in self._step():
                    self._say(answer)
                continue
            if "stop" in command:
                break
            self._add(command)
        self._engine.engine_core.shutdown()

    def _add(self, command: dict[str, object]) -> None:
        from vllm import SamplingParams
        params = command.get("params")
        self._probe.reset()
        self._steps = 0
        self._times[command["add"]] = {"began_ns": time.monotonic_ns()}
        self._engine.add_request(
            command["add"], {"prompt_token_ids": command["prompt"]},
            SamplingParams(temperature=0, max_tokens=command["max_tokens"], detokenize=False,
                           ignore_eos=True, repetition_penalty=_REPETITION_PENALTY,
                           extra_args={"kv_transfer_params": params} if params else None))

    def _step(self) -> list[dict[str, object]]:
        """Return the answers to the requests that it finished."""
        answers = []
        self._scheduled = 0
        outputs = self._engine.step()
        now = time.monotonic_ns()
        if self._scheduled:
            self._steps += 1
        else:
            time.sleep(_IDLE_SLEEP_S)
        for output in outputs:
            times = self._times[output.request_id]
            if output.outputs[0].token_ids:
                times.setdefault("first_ns", now)
                times["last_ns"] = now
            if output.finished:
                answers.append({
                    "id": output.request_id, "tokens": list(output.outputs[0].token_ids),
                    "finish": output.outputs[0].finish_reason,
                    "params": output.kv_transfer_params, **self._times.pop(output.request_id),
                    **vars(self._probe), "steps": self._steps})
        return answers

    def _count_scheduled(self) -> None:
        schedule = self._scheduler.schedule

        def counted(*arguments, **options):
            scheduled = schedule(*arguments, **options)
            self._scheduled += scheduled.total_num_scheduled_tokens
            return scheduled

        self._scheduler.schedule = counted

    def _read(self) -> None:
        for line in sys.stdin:
            self._commands.put(json.loads(line))
        self._commands.put({"stop": True})

    def _say(self, answer: dict[str, object]) -> None:
        print(json.dumps(answer), file=self._answers, flush=True)


def main() -> None:
    # Whatever vLLM prints goes to stderr.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    settings = json.loads(sys.argv[1])
    if (namespace := settings.pop("namespace")) is not None:
        netlab.enter(namespace)  # threads that start later are there too
    Peer(settings, answers).run()


if __name__ == "__main__":
    main()
