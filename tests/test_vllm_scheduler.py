"""The connector's half inside vLLM's own Scheduler; the workers are imitated.

What vLLM's unit tests ask of its connectors (tests/v1/kv_connector/unit: the lifecycles of remote
prefill and decode, load failures), asked of this one.
"""

import json

import pytest

pytest.importorskip("vllm")

import torch
from vllm import EngineArgs, SamplingParams
from vllm.config import KVTransferConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

pytestmark = pytest.mark.vllm

BLOCK = 32
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
         "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
         "intermediate_size": 64, "vocab_size": 512, "max_position_embeddings": 1024}
ATTENTION = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=16, dtype=torch.float32)
STATES = MambaSpec(block_size=BLOCK, shapes=((3, 48), (4, 8, 8)),
                   dtypes=(torch.float32, torch.float32),
                   page_size_padded=ATTENTION.page_size_bytes)
TICKET = "ab" * 16
PUSHED = {"do_remote_prefill": True, "ticket": TICKET}
TO_PUSH = {"do_remote_decode": True, "ticket": TICKET, "decode_addresses": ["127.0.0.1:7300"]}


class Engine:
    """A scheduler, and workers that answer what they are told to."""

    def __init__(self, folder, role, policy="fail", blocks=64, hybrid=False, prefix_caching=False):
        (folder / "config.json").write_text(json.dumps(LLAMA))
        config = EngineArgs(
            str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=512,
            max_num_batched_tokens=64, max_num_seqs=8, block_size=BLOCK,
            enable_prefix_caching=prefix_caching, num_gpu_blocks_override=blocks,
            kv_transfer_config=KVTransferConfig(
                kv_connector="KvwireConnector", kv_connector_module_path="kvwire.connectors.vllm",
                kv_role=role, kv_load_failure_policy=policy,
                kv_connector_extra_config={"prefill_listen": "127.0.0.1:7200"}),
        ).create_engine_config()
        config.cache_config.num_gpu_blocks = blocks
        groups = [KVCacheGroupSpec(["model.layers.0.attn"], ATTENTION)]
        if hybrid:
            groups.append(KVCacheGroupSpec(["model.layers.1.mixer"], STATES))
        self.blocks = blocks
        self.scheduler = Scheduler(
            config, KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups),
            StructuredOutputManager(config), BLOCK)
        self.hasher = get_request_block_hasher(BLOCK, sha256)

    def add(self, name, tokens, params, max_tokens=4):
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True,
                                  extra_args={"kv_transfer_params": params} if params else None)
        request = Request(name, list(range(1, tokens + 1)), sampling, None,
                          block_hasher=self.hasher)
        self.scheduler.add_request(request)
        return request

    def step(self, **says):
        """Schedule and compute a step; the workers say `says`. Return what was scheduled, the
        connector's part, and what is told to the router."""
        scheduled = self.scheduler.schedule()
        names = list(scheduled.num_scheduled_tokens)
        sampled = [[7] if self.is_at_end(name) else [] for name in names]
        outputs = self.scheduler.update_from_output(scheduled, ModelRunnerOutput(
            names, {name: index for index, name in enumerate(names)}, sampled,
            kv_connector_output=KVConnectorOutput(**says) if says else None))
        told = [output for of_client in outputs.values() for output in of_client.outputs]
        return dict(scheduled.num_scheduled_tokens), scheduled.kv_connector_metadata, told

    def is_at_end(self, name):
        request = self.scheduler.requests[name]
        return request.num_computed_tokens >= request.num_tokens

    def is_empty(self):
        scheduler = self.scheduler
        free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        return not (scheduler.requests or scheduler.running or len(scheduler.waiting)) and (
            free == self.blocks - 1)


@pytest.fixture(scope="module", autouse=True)
def hashes():
    init_none_hash(sha256)


@pytest.mark.parametrize("hybrid", [False, True])
def test_decode_waits_for_the_cache_and_computes_one_token(tmp_path, hybrid):
    engine = Engine(tmp_path, "kv_consumer", hybrid=hybrid)
    request = engine.add("d", 71, dict(PUSHED), max_tokens=2)
    counts, step, _ = engine.step()
    assert not counts and request.status is RequestStatus.WAITING_FOR_REMOTE_KVS
    receive = step.receives["d"]
    held = engine.scheduler.kv_cache_manager.get_block_ids("d")
    assert receive.tokens == (0, 70)
    assert receive.block_ids[0] == list(held[0]) and len(held[0]) == 3
    assert not hybrid or receive.block_ids[1] == list(held[1])[-1:]
    assert engine.step()[0] == {}  # it waits
    engine.step(finished_recving={"d"})
    counts, _, told = engine.step()
    assert counts == {"d": 1} and told[0].new_token_ids == [7]
    assert engine.step()[2][0].finish_reason is not None and engine.is_empty()


def test_others_are_computed_while_one_waits(tmp_path):
    engine = Engine(tmp_path, "kv_consumer")
    engine.add("d", 71, dict(PUSHED))
    engine.add("other", 40, None)
    assert engine.step()[0] == {"other": 40}
    assert engine.step(finished_recving={"d"})[0] == {"other": 1}
    assert engine.step()[0] == {"other": 1, "d": 1}


def test_a_prefix_that_is_here_is_not_asked_for(tmp_path):
    engine = Engine(tmp_path, "kv_consumer", prefix_caching=True)
    engine.add("first", 64, None, max_tokens=1)
    engine.step()
    engine.step()
    engine.add("d", 71, dict(PUSHED))
    assert engine.step()[1].receives["d"].tokens == (64, 70)


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_what_did_not_come_is_left_to_the_policy(tmp_path, policy):
    engine = Engine(tmp_path, "kv_consumer", policy)
    engine.add("d", 71, dict(PUSHED), max_tokens=1)
    engine.step()
    told = engine.step(finished_recving={"d"}, failed_recving={"d"})[2]
    if policy == "fail":
        assert [str(output.finish_reason) for output in told] == ["error"]
    else:  # all of it, here, in the chunks that a step has room for
        assert engine.step()[0] == {"d": 64} and engine.step()[0] == {"d": 7}
    engine.step()
    assert engine.is_empty()


@pytest.mark.parametrize("filled", [True, False])
def test_blocks_are_kept_until_nothing_is_written_to_them(tmp_path, filled):
    engine = Engine(tmp_path, "kv_consumer")
    engine.add("d", 71, dict(PUSHED))
    engine.step()
    engine.scheduler.finish_requests(["d"], RequestStatus.FINISHED_ABORTED)
    assert not engine.is_empty()
    assert engine.step()[1].dropped == ["d"]
    assert not engine.is_empty()
    engine.step(finished_recving={"d"}, failed_recving=set() if filled else {"d"})
    engine.step()
    assert engine.is_empty()


def test_a_cache_for_which_there_is_no_room_comes_later(tmp_path):
    engine = Engine(tmp_path, "kv_consumer", blocks=6)
    engine.add("first", 100, None, max_tokens=2)
    engine.add("d", 71, dict(PUSHED), max_tokens=1)
    receives = []
    for _ in range(6):
        receives += engine.step()[1].receives
    assert receives == ["d"]
    engine.step(finished_recving={"d"})
    engine.step()
    assert engine.is_empty()


@pytest.mark.parametrize("params", [TO_PUSH, {"do_remote_decode": True}])
def test_prefill_keeps_its_blocks_until_they_are_sent(tmp_path, params):
    engine = Engine(tmp_path, "kv_producer")
    engine.add("p", 71, dict(params))
    counts, step, _ = engine.step()
    assert counts == {"p": 64} and step.chunks["p"].stop == 64
    counts, step, told = engine.step()
    assert counts == {"p": 6} and step.chunks["p"].states is not None
    answer = told[0].kv_transfer_params
    assert str(told[0].finish_reason) == "length" and answer["do_remote_prefill"]
    assert ("ticket" in params) == ("ticket" in answer) != ("offer" in answer)
    assert engine.step()[1].ended == {"p": True}
    assert not engine.is_empty()
    engine.step(finished_sending={"p"})
    assert engine.is_empty()


def test_an_aborted_prefill_keeps_its_blocks_until_nothing_is_read(tmp_path):
    engine = Engine(tmp_path, "kv_producer")
    engine.add("p", 71, dict(TO_PUSH))
    engine.step()
    engine.scheduler.finish_requests(["p"], RequestStatus.FINISHED_ABORTED)
    assert engine.step()[1].ended == {"p": False}
    assert not engine.is_empty()
    engine.step(finished_sending={"p"})
    assert engine.is_empty()


def test_a_prefill_that_was_never_begun_leaves_at_once(tmp_path):
    engine = Engine(tmp_path, "kv_producer")
    engine.add("p", 71, dict(TO_PUSH))
    engine.scheduler.finish_requests(["p"], RequestStatus.FINISHED_ABORTED)
    assert engine.is_empty()
