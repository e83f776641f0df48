"""One vLLM engine, the work of a process of its own: `main`, for tests.

It takes commands and gives answers over a pipe. The engine runs in this process, a step at a time,
so that a test can stop between two of them.

    {"add": id, "prompt": [...], "max_tokens": n, "params": {...}}    a request
    {"abort": id}  {"abort": id, "computed_tokens": n}: at once, or when so many are computed
    {"status": true}  {"stop": true}
    ← {"ready": 1}  {"status": {...}}  {"digests": {...}, "id", "side"}
    ← {"id", "tokens", "finish", "params", "cached"}
"""

import hashlib
import os
import threading
from queue import Empty, SimpleQueue

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1",
               "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def digests(memory):
    """SHA-256 of each layer's bytes, read in plain Python."""
    from kvwire.plan import gather
    layers = sorted({layer for group in memory.spec.groups for layer in group.layers})
    found = {}
    for layer in layers:
        for number, item in enumerate(memory.items(layer)):
            group = memory.spec.groups[item.group_index]
            tensor = group.tensors[item.tensor_index]
            found[f"{group.label}.{layer}.{tensor.name}.{number}"] = hashlib.sha256(
                gather(memory.spec, [item], memory.leaves)).hexdigest()[:16]
    return found


def tell_digests(say):
    """Have both sides digest what they hand off, before and after."""
    from kvwire.connectors import decode_side, prefill_side
    finish, has_ended = prefill_side.PrefillSide.finish, decode_side.DecodeSide._has_ended

    def finish_and_tell(self, request_id, block_ids):
        finish(self, request_id, block_ids)
        made = self._open[request_id]
        memory = self._pool.source(made.tokens, made.block_ids, made.states)
        say({"id": request_id, "side": "prefill", "digests": digests(memory)})

    def look_and_tell(self, made, now):
        ended = has_ended(self, made, now)
        if ended and made.error is None:
            request_id = next(key for key, value in self._open.items() if value is made)
            say({"id": request_id, "side": "decode", "digests": digests(made.ticket.memory)})
        return ended

    prefill_side.PrefillSide.finish = finish_and_tell
    decode_side.DecodeSide._has_ended = look_and_tell


def make_engine(settings):
    from vllm import EngineArgs, LLMEngine
    from vllm.config import KVTransferConfig
    transfer = settings.pop("transfer", None)
    if transfer is not None:
        transfer = KVTransferConfig(kv_connector="KvwireConnector",
                                    kv_connector_module_path="kvwire.connectors.vllm", **transfer)
    arguments = {"skip_tokenizer_init": True, "enforce_eager": True, "dtype": "bfloat16",
                 "max_model_len": 1024, "max_num_seqs": 16} | settings
    return LLMEngine.from_engine_args(EngineArgs(kv_transfer_config=transfer, **arguments))


def keep_totals():
    """Return a dict that holds the sums of what the connector reports to vLLM."""
    from kvwire.connectors.vllm_worker import Worker
    sums, take = {}, Worker.totals

    def take_and_keep(self):
        taken = take(self)
        for name, value in taken.items():
            sums[name] = sums.get(name, 0) + value
        return taken

    Worker.totals = take_and_keep
    return sums


class Peer:
    def __init__(self, engine, pipe, totals, repetition_penalty):
        self.engine, self.pipe, self.say, self.totals = engine, pipe, pipe.send, totals
        self.scheduler = engine.engine_core.engine_core.scheduler
        self.repetition_penalty = repetition_penalty
        self.commands, self.aborts = SimpleQueue(), {}
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        try:
            while True:
                self.commands.put(self.pipe.recv())
        except (EOFError, OSError):
            self.commands.put({"stop": True})

    def add(self, name, prompt, max_tokens, params=None):
        from vllm import SamplingParams
        extra = {"kv_transfer_params": params} if params else None
        self.engine.add_request(name, {"prompt_token_ids": prompt}, SamplingParams(
            temperature=0, max_tokens=max_tokens, detokenize=False, ignore_eos=True,
            repetition_penalty=self.repetition_penalty, extra_args=extra))

    def abort_computed(self):
        """Carry out the aborts that waited for this; vLLM's own request ids have a suffix."""
        for name, tokens in list(self.aborts.items()):
            if any(key.startswith(name + "-") and request.num_computed_tokens >= tokens
                   for key, request in self.scheduler.requests.items()):
                self.engine.abort_request([name])
                del self.aborts[name]

    def status(self):
        pool = self.scheduler.kv_cache_manager.block_pool
        return {"requests": len(self.scheduler.requests), "free_blocks": pool.get_num_free_blocks(),
                "blocks": pool.num_gpu_blocks, "totals": self.totals}

    def run(self):
        # The kernels of vLLM 0.32's CPU build crash when the first pass of all is one token long.
        self.add("warm-up", [(3 * i + 5) % 400 for i in range(64)], 2)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        self.say({"ready": 1})
        idle = False
        while True:
            try:
                command = self.commands.get(timeout=0.01 if idle else 0)
            except Empty:
                command = None
            if command is not None:
                if "stop" in command:
                    return
                if "computed_tokens" in command:
                    self.aborts[command["abort"]] = command["computed_tokens"]
                elif "abort" in command:
                    self.engine.abort_request([command["abort"]])
                elif "status" in command:
                    self.say({"status": self.status()})
                else:
                    self.add(command["add"], command["prompt"], command["max_tokens"],
                             command.get("params"))
                if "status" not in command:  # who asks again and again holds nothing up
                    continue
            outputs = self.engine.step()
            for output in outputs:
                if output.finished:
                    self.say({"id": output.request_id,
                              "tokens": list(output.outputs[0].token_ids),
                              "finish": output.outputs[0].finish_reason,
                              "cached": output.num_cached_tokens,
                              "params": output.kv_transfer_params})
            self.abort_computed()
            idle = not outputs and not self.scheduler.running


def main(settings, pipe, log):
    """Serve one engine, of these vllm.EngineArgs.

    Args:
        settings: also "transfer", a KVTransferConfig; "digests", whether to tell them;
            "repetition_penalty", of every request; "environment" and "namespace", of this process.
        log: the path of a file for what is printed.
    """
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(settings.pop("environment", {}))
    if namespace := settings.pop("namespace", None):
        from bench.netlab import enter
        enter(namespace)
    if settings.pop("digests", False):
        tell_digests(pipe.send)
    penalty = settings.pop("repetition_penalty", 1.0)
    totals = keep_totals() if "transfer" in settings else {}
    engine = make_engine(settings)
    Peer(engine, pipe, totals, penalty).run()
    engine.engine_core.shutdown()
