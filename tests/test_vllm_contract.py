"""The connector against vLLM's own classes, without an engine: what the factory, the scheduler and
the metrics ask of it."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1, KVConnectorRole, supports_hma,
)
from vllm.v1.core.sched.output import CachedRequestData
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor, KVQuantMode, MambaSpec,
    MLAAttentionSpec, SlidingWindowSpec,
)

import kvwire
from kvwire.connectors import vllm as connector
from standin_device import StandInDevice
from standin_tensors import DeviceTensors, plain
from kvwire.connectors.handoff import Pull, Push
from kvwire.connectors.vllm_layout import Engine, spec_leaves
from kvwire.connectors.vllm_stats import Stats
from kvwire.layout import GroupKind

pytestmark = pytest.mark.vllm

BLOCK = 32
ATTENTION = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=8, dtype=torch.bfloat16)
STATES = MambaSpec(block_size=BLOCK, shapes=((3, 48), (4, 8, 8)),
                   dtypes=(torch.bfloat16, torch.float32),
                   page_size_padded=ATTENTION.page_size_bytes)
TICKET = "ab" * 16


def transfer_config(role="kv_both", **extra):
    return KVTransferConfig(kv_connector="KvwireConnector",
                            kv_connector_module_path="kvwire.connectors.vllm", kv_role=role,
                            kv_connector_extra_config=extra)


def vllm_config(transfer, **parallel):
    ranks = {"rank": 0, "tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    return SimpleNamespace(
        kv_transfer_config=transfer, parallel_config=SimpleNamespace(**ranks | parallel),
        model_config=SimpleNamespace(model="/models/tiny", hf_text_config=SimpleNamespace()),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        compilation_config=SimpleNamespace(static_forward_context={}))


def cache_config():
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=[
        KVCacheGroupSpec(["model.layers.0.mixer"], STATES),
        KVCacheGroupSpec(["model.layers.1.attn"], ATTENTION)])


def make(role, config=None):
    return KVConnectorFactory.create_connector(
        config or vllm_config(transfer_config()), role, cache_config())


def request(name, tokens, params):
    ids = list(range(tokens))
    return SimpleNamespace(request_id=name, kv_transfer_params=params, prompt_token_ids=ids,
                           _all_token_ids=list(ids), num_prompt_tokens=tokens, max_tokens=16,
                           lora_request=None, cache_salt=None, mm_features=[])


def scheduled(name, before, count, blocks, new=True, preempted=()):
    """One step's SchedulerOutput, as far as a connector looks at it."""
    cached = CachedRequestData.make_empty()
    if not new and name is not None:
        cached.req_ids, cached.num_computed_tokens = [name], [before]
    return SimpleNamespace(
        preempted_req_ids=set(preempted), scheduled_cached_reqs=cached,
        scheduled_new_reqs=[SimpleNamespace(req_id=name, num_computed_tokens=before)]
        if new and name else [],
        num_scheduled_tokens={name: count} if name else {},
        kv_connector_block_state=SimpleNamespace(get_block_ids=lambda _: blocks))


def test_the_factory_takes_it():
    transfer = transfer_config()
    found = KVConnectorFactory.get_connector_class(transfer)
    assert found is connector.KvwireConnector and supports_hma(found)
    assert KVConnectorFactory.supports_hma_config(transfer)
    for role in KVConnectorRole:
        made = make(role)
        assert made.role is role and made.requires_kv_delivery
    assert not connector.KvwireConnector.__abstractmethods__


def test_it_answers_every_method_of_the_base():
    """A release that renames a hook we rely on is noticed here."""
    ours = {name for name in vars(connector.KvwireConnector) if not name.startswith("_")}
    unknown = {name for name in ours if not hasattr(KVConnectorBase_V1, name)}
    assert unknown <= {"request_finished_all_groups", "supports_sleep_mode"}  # SupportsHMA, 0.33


@pytest.mark.parametrize("extra, parallel, error, words", [
    ({"lane": 1}, {}, kvwire.UsageError, "has lane"),
    ({}, {"pipeline_parallel_size": 2}, kvwire.UnsupportedError, "pipeline_parallel_size is 2"),
    ({}, {"decode_context_parallel_size": 2}, kvwire.UnsupportedError, "decode_context"),
    ({}, {"use_ubatching": True}, kvwire.UnsupportedError, "enable_dbo or ubatch_size"),
])
def test_bad_settings_stop_the_engine_at_start(extra, parallel, error, words):
    with pytest.raises(error, match=words):
        make(KVConnectorRole.WORKER, vllm_config(transfer_config(**extra), **parallel))


def test_specs_of_vllm_are_known():
    mla = MLAAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    window = SlidingWindowSpec(block_size=BLOCK, num_kv_heads=2, head_size=8,
                               dtype=torch.bfloat16, sliding_window=64)
    found = [[place.kind for place in spec_leaves("layers.0", spec, Engine())]
             for spec in (ATTENTION, window, mla, STATES)]
    assert found == [[GroupKind.FULL_ATTENTION], [GroupKind.SLIDING_WINDOW], [GroupKind.LATENT],
                     [GroupKind.CONVOLUTION, GroupKind.RECURRENT]]
    assert spec_leaves("layers.0", window, Engine())[0].window_tokens == 63
    quantised = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=8,
                                  dtype=torch.uint8, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR)
    with pytest.raises(kvwire.UnsupportedError, match="FP8_PER_TENSOR"):
        spec_leaves("layers.0", quantised, Engine())


def test_prefill_sends_chunks_and_ends_one_token_early():
    scheduler = make(KVConnectorRole.SCHEDULER)
    asked = request("p", 71, {"do_remote_decode": True, "ticket": TICKET,
                              "decode_addresses": ["127.0.0.1:7300"]})
    scheduler.on_new_request(asked)
    assert asked.num_prompt_tokens == len(asked._all_token_ids) == 70 and asked.max_tokens == 1
    first = scheduler.build_connector_meta(scheduled("p", 0, 40, ([5], [1, 2])))
    chunk = first.chunks["p"]
    assert chunk.begin.route == Push(TICKET, ("127.0.0.1:7300",)) and chunk.begin.tokens == 70
    assert (chunk.stop, chunk.new_blocks, chunk.states) == (40, [[], [1, 2]], None)
    last = scheduler.build_connector_meta(scheduled("p", 40, 30, ([5], [1, 2, 3]), new=False))
    chunk = last.chunks["p"]
    assert (chunk.begin, chunk.stop, chunk.new_blocks) == (None, 70, [[], [3]])
    assert chunk.states == [[5], [1, 2, 3]]
    after = scheduler.build_connector_meta(scheduled("p", 70, 1, ([5], [1, 2, 3]), new=False))
    assert not after.chunks
    held, params = scheduler.request_finished_all_groups(asked, ([5], [1, 2, 3]))
    assert held and params == {"do_remote_prefill": True, "ticket": TICKET, "prefill_ranks": 1}
    assert scheduler.build_connector_meta(scheduled(None, 0, 0, ())).ended == {"p": True}


def test_a_preempted_prefill_begins_again_with_all_its_blocks():
    scheduler = make(KVConnectorRole.SCHEDULER)
    scheduler.on_new_request(asked := request("p", 71, {"do_remote_decode": True}))
    first = scheduler.build_connector_meta(scheduled("p", 0, 40, ([5], [1, 2])))
    assert isinstance(first.chunks["p"].begin.route, Pull)
    assert scheduler.build_connector_meta(
        scheduled(None, 0, 0, (), preempted=["p"])).preempted == ["p"]
    again = scheduler.build_connector_meta(scheduled("p", 0, 70, ([6], [3, 4, 7]), new=False))
    assert again.chunks["p"].new_blocks == [[], [3, 4, 7]] and again.chunks["p"].begin is None
    held, params = scheduler.request_finished_all_groups(asked, ())
    assert held and set(params) == {"do_remote_prefill", "offer", "prefill_addresses"}


def test_an_aborted_prefill_is_told_to_the_workers():
    scheduler = make(KVConnectorRole.SCHEDULER)
    scheduler.on_new_request(asked := request("p", 71, {"do_remote_decode": True}))
    scheduler.build_connector_meta(scheduled("p", 0, 40, ([5], [1, 2])))
    assert scheduler.request_finished_all_groups(asked, ()) == (True, None)
    assert scheduler.build_connector_meta(scheduled(None, 0, 0, ())).ended == {"p": False}
    scheduler.on_new_request(late := request("q", 71, {"do_remote_decode": True}))
    assert scheduler.request_finished_all_groups(late, ()) == (False, None)


@pytest.mark.parametrize("hit", [0, 32])
def test_decode_asks_for_what_is_missing(hit):
    scheduler = make(KVConnectorRole.SCHEDULER)
    asked = request("d", 71, {"do_remote_prefill": True, "ticket": TICKET})
    for _ in range(2):  # vLLM may ask again
        assert scheduler.get_num_new_matched_tokens(asked, hit) == (70 - hit, True)
    blocks = SimpleNamespace(get_block_ids=lambda: ([5], [1, 2, 3]))
    scheduler.update_state_after_alloc(asked, blocks, 70 - hit)
    scheduler.update_state_after_alloc(asked, blocks, 0)
    step = scheduler.build_connector_meta(scheduled(None, 0, 0, ()))
    receive = step.receives["d"]
    assert (receive.route, receive.tokens) == (Push(TICKET), (hit, 70))
    assert receive.block_ids == [[5], [1, 2, 3]] and not receive.problem
    assert scheduler.get_num_new_matched_tokens(asked, 0) == (0, False)  # once only
    assert scheduler.request_finished_all_groups(asked, ()) == (False, None)
    assert scheduler.build_connector_meta(scheduled(None, 0, 0, ())).dropped == ["d"]


def test_both_sides_name_the_same_prompt():
    scheduler = make(KVConnectorRole.SCHEDULER)
    scheduler.on_new_request(request("p", 71, {"do_remote_decode": True}))
    begin = scheduler.build_connector_meta(
        scheduled("p", 0, 70, ([5], [1, 2, 3]))).chunks["p"].begin
    blocks = SimpleNamespace(get_block_ids=lambda: ([5], [1, 2, 3]))
    prompts = set()
    for name, salt in (("d", None), ("e", "salt")):
        asked = request(name, 71, {"do_remote_prefill": True, "ticket": TICKET})
        asked.cache_salt = salt
        scheduler.update_state_after_alloc(asked, blocks, 70)
        step = scheduler.build_connector_meta(scheduled(None, 0, 0, ()))
        prompts.add(step.receives[name].prompt)
    assert begin.prompt in prompts and len(prompts) == 2


@pytest.mark.parametrize("params", [
    {"do_remote_prefill": True}, {"do_remote_prefill": True, "ticket": "x"},
    {"do_remote_prefill": True, "offer": TICKET}])
def test_nonsense_is_left_to_the_failure_policy(params):
    scheduler = make(KVConnectorRole.SCHEDULER)
    asked = request("d", 71, params)
    blocks = SimpleNamespace(get_block_ids=lambda: ([5], [1, 2, 3]))
    scheduler.update_state_after_alloc(asked, blocks, 70)
    receive = scheduler.build_connector_meta(scheduled(None, 0, 0, ())).receives["d"]
    assert receive.route is None and "kv_transfer_params" in receive.problem


@pytest.mark.parametrize("role, params", [
    ("kv_producer", {"do_remote_prefill": True, "ticket": TICKET}),
    ("kv_consumer", {"do_remote_decode": True})])
def test_the_other_role_is_not_played(role, params):
    scheduler = make(KVConnectorRole.SCHEDULER, vllm_config(transfer_config(role)))
    scheduler.on_new_request(asked := request("r", 71, params))
    assert asked.num_prompt_tokens == 71
    assert scheduler.get_num_new_matched_tokens(asked, 0) == (0, False)


def test_what_has_no_hand_off_is_left_alone():
    scheduler = make(KVConnectorRole.SCHEDULER)
    for params in (None, {}, {"do_remote_decode": True, "ticket": "x"}):
        plain = request("r", 71, params)
        scheduler.on_new_request(plain)
        assert plain.num_prompt_tokens == 71
        assert scheduler.get_num_new_matched_tokens(plain, 0) == (0, False)
        assert scheduler.request_finished_all_groups(plain, ()) == (False, None)
    short = request("s", 1, {"do_remote_decode": True})
    scheduler.on_new_request(short)
    assert short.num_prompt_tokens == 1


@pytest.fixture
def device(monkeypatch):
    made = StandInDevice()
    monkeypatch.setattr(kvwire.Staging, "open", lambda self, name: made)
    yield made
    made.close()


@pytest.mark.parametrize("on_device", [False, True])
def test_a_cache_crosses_between_two_workers(device, on_device):
    """Both workers of an engine of each kind, over real views; a step at a time."""
    from vllm.v1.kv_cache_interface import create_kv_cache_views
    from vllm.v1.kv_cache_layout import KVCacheLayout

    workers, tensors = [], []
    for role, extra in (("kv_producer", {}), ("kv_consumer", {"decode_listen": "127.0.0.1:0"})):
        made = make(KVConnectorRole.WORKER, vllm_config(transfer_config(role, **extra)))
        page = STATES.page_size_bytes
        raw = torch.randint(-128, 128, (8 * page,), dtype=torch.int8)
        held = {}
        for name, spec in (("model.layers.0.mixer", STATES), ("model.layers.1.attn", ATTENTION)):
            place = KVCacheTensor(8 * page, [name], 8 * page, page)
            [held[name]] = create_kv_cache_views(raw, spec, 8, KVCacheLayout.LBHNC, place)
        if on_device:
            held = {name: DeviceTensors(device).of(each) for name, each in held.items()}
        made.register_kv_caches(held)
        workers.append(made)
        tensors.append(held)
    prefill, decode = workers
    address = decode._worker._decode._receiver.address
    scheduler = make(KVConnectorRole.SCHEDULER)
    asked = request("p", 41, {"do_remote_decode": True, "ticket": TICKET,
                              "decode_addresses": [address]})
    wanted = request("d", 41, {"do_remote_prefill": True, "ticket": TICKET})
    scheduler.on_new_request(asked)
    blocks = SimpleNamespace(get_block_ids=lambda: ([4], [6, 2]))
    scheduler.update_state_after_alloc(wanted, blocks, 40)
    step = scheduler.build_connector_meta(scheduled("p", 0, 40, ([5], [1, 3])))
    for worker in workers:
        worker.bind_connector_metadata(step if worker is prefill else type(step)())
    prefill.save_kv_layer("model.layers.1.attn", None, None)
    decode.clear_connector_metadata()
    decode.bind_connector_metadata(type(step)(receives=step.receives))
    decode.start_load_kv(None)
    prefill.wait_for_save()
    scheduler.request_finished_all_groups(asked, ())
    prefill.bind_connector_metadata(scheduler.build_connector_meta(scheduled(None, 0, 0, ())))
    prefill.wait_for_save()
    sent, received = set(), set()
    from faults import eventually

    def both_ended():
        sent.update(prefill.get_transfer_results(set()).finished_sending)
        results = decode.get_transfer_results(set())
        received.update(results.finished_recving)
        assert not results.failed_recving
        return sent == {"p"} and received == {"d"}

    assert eventually(both_ended)
    here, there = ({name: plain(each) for name, each in held.items()} for held in tensors)
    attention = [held["model.layers.1.attn"].view(torch.int16) for held in (here, there)]
    with device.access():
        assert torch.equal(here["model.layers.0.mixer"][5], there["model.layers.0.mixer"][4])
        assert torch.equal(attention[0][1], attention[1][6])
        assert torch.equal(attention[0][3, :, :8], attention[1][2, :, :8])
    assert (any(k.startswith("kvwire_decode") for k in device.launches)) == on_device
    stats = [worker.get_kv_connector_stats() for worker in workers]
    assert stats[0].data["prefill_handoffs"] == stats[1].data["decode_handoffs"] == 1
    assert stats[1].reduce()["ratio"] == 1.0
    for worker in workers:
        worker.shutdown()


def test_a_gpu_that_kernels_cannot_run_on_stops_the_engine_at_start():
    device = StandInDevice()
    made = make(KVConnectorRole.WORKER, vllm_config(transfer_config("kv_producer")))
    place = torch.zeros(8, 2, BLOCK, 16, dtype=torch.bfloat16)
    tensors = {"model.layers.0.mixer": torch.zeros(8, 1, 1, 1312, dtype=torch.int8),
               "model.layers.1.attn": place}
    with pytest.raises(kvwire.UnsupportedError, match="on cuda:0, and the back end is 'cpu'"):
        made.register_kv_caches({name: DeviceTensors(device).of(each)
                                 for name, each in tensors.items()})
    device.close()


@pytest.mark.parametrize("second_runner", [False, True])
def test_preempted_hand_offs_fail_where_blocks_are_cleared_early(second_runner):
    config, suspended = vllm_config(transfer_config("kv_producer")), []
    config.use_v2_model_runner = second_runner

    class Prefill(set):
        def suspend(self, name, *, overwritten):
            suspended.append((name, overwritten))
    made = make(KVConnectorRole.WORKER, config)
    made._worker._prefill = Prefill({"p"})
    made.handle_preemptions(SimpleNamespace(preempted=["p", "q"]))
    assert suspended == [("p", second_runner)]


def test_stats_add_up():
    total = Stats({"prefill_handoffs": 1, "prefill_cache_bytes": 2e6})
    total.aggregate(Stats({"prefill_handoffs": 2, "decode_failures": 1}))
    assert total.data["prefill_handoffs"] == 3 and not total.is_empty()
    assert total.reduce()["prefill: hand-offs"] == 3
    total.reset()
    assert total.is_empty() and total.reduce() == {}


def test_counters_reach_prometheus():
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
    registry = CollectorRegistry()

    class Local(Counter):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **{"registry": registry} | named)

    metrics = connector.KvwireConnector.build_prom_metrics(
        vllm_config(transfer_config()), {Counter: Local, Gauge: Gauge, Histogram: Histogram},
        ["engine"], {0: ["0"]})
    metrics.observe({"decode_wire_bytes": 7, "unknown": 1}, 0)
    metrics.observe({"decode_wire_bytes": 5}, 0)
    assert registry.get_sample_value("vllm:kvwire_decode_wire_bytes_total", {"engine": "0"}) == 12
