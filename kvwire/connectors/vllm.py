"""kvwire as a connector of vLLM: prefill in one engine, decode in another. vLLM 0.32, 0.33.

    vllm serve MODEL --kv-transfer-config '{
        "kv_connector": "KvwireConnector", "kv_connector_module_path": "kvwire.connectors.vllm",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"prefill_listen": "127.0.0.1:7200"}}'

The decode engine has ``"kv_role": "kv_consumer"`` and, where caches are to be pushed to it,
``"decode_listen"``. All settings: `kvwire.connectors.options.Options`. What a router says to each
engine: `kvwire.connectors.handoff`. Hybrid models keep vLLM's hybrid cache manager.

This file only hands vLLM's calls on: `vllm_scheduler` decides, `vllm_worker` does it, `vllm_layout`
knows where vLLM keeps what. What goes wrong with one request is reported as that request's
(`failed_recving`), and vLLM recomputes or fails it as `kv_load_failure_policy` says.

There are no cache events of its own: what arrives lies in the engine's own blocks, and vLLM says of
these what it stores and evicts (`kv_events_config`).

Of 0.33 the source was read, against 0.32's. The layer hooks, their order, the metadata and the
specs are the same. New are sleep mode's hooks (refused below) and quantised caches (refused by
name, as all are); loads may begin steps after a request got its blocks, and nothing is bound here
before they do.
"""

from __future__ import annotations

import os

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1, KVConnectorRole, KVConnectorTransferResults, SupportsHMA,
)

from kvwire.connectors.options import Options
from kvwire.connectors.vllm_layout import Engine
from kvwire.connectors.vllm_scheduler import Scheduler, Step
from kvwire.connectors.vllm_stats import PromMetrics, Stats
from kvwire.connectors.vllm_worker import Worker
from kvwire.errors import UnsupportedError

__all__ = ["KvwireConnector"]

_MAMBA_GROUPS = ("n_groups", "mamba_n_groups", "mamba_ngroups")


class KvwireConnector(KVConnectorBase_V1, SupportsHMA):
    """See above. One object in the scheduler, one in each worker."""

    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        options = Options.of(transfer.kv_connector_extra_config or {})
        engine = describe_engine(vllm_config, options)
        sides = {"prefills": transfer.is_kv_producer, "decodes": transfer.is_kv_consumer}
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = Scheduler(kv_cache_config, options, engine.count, **sides)
        else:
            self._worker = Worker(vllm_config, kv_cache_config, options, engine, **sides)

    # The worker's half, in the order in which a step calls it.

    def register_kv_caches(self, kv_caches):
        self._worker.register(kv_caches)

    def handle_preemptions(self, kv_connector_metadata):
        self._worker.suspend(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata):
        super().bind_connector_metadata(connector_metadata)
        self._worker.begin(connector_metadata)

    def start_load_kv(self, forward_context, **kwargs):
        self._worker.receive(self._step())

    def wait_for_layer_load(self, layer_name):
        pass  # a request is scheduled when all of its cache is in place

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        if self.has_connector_metadata():
            self._worker.layer_computed(self._step(), layer_name)

    def wait_for_save(self):
        self._worker.end(self._step())

    def get_transfer_results(self, finished_req_ids):
        worker = self._worker
        worker.poll()
        return KVConnectorTransferResults(worker.sent, worker.received, worker.failed)

    def get_kv_connector_stats(self):
        if self._worker is None:
            return None
        stats = Stats({name: value for name, value in self._worker.totals().items() if value})
        return None if stats.is_empty() else stats

    def shutdown(self):
        if self._worker is not None:
            self._worker.close()

    # The scheduler's half.

    def on_new_request(self, request):
        self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    def get_loaded_kv_cache_group_ids(self, request):
        # Groups named here are not zeroed first. But only the tokens that come are written, and
        # what the rest of their last block holds, kernels may multiply by 0: it must be no NaN.
        return ()

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        self._scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output):
        return self._scheduler.build_step(scheduler_output)

    def update_connector_output(self, connector_output):
        self._scheduler.received(connector_output.finished_recving or set())

    def request_finished_all_groups(self, request, block_ids):
        return self._scheduler.finished(request)

    def request_finished(self, request, block_ids):
        return self._scheduler.finished(request)

    # For the class as a whole.

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config):
        return True  # save_kv_layer is called between the layers

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config):
        return False  # 0.33 asks; while an engine sleeps, its peers' hand-offs would find no cache

    @classmethod
    def build_kv_connector_stats(cls, data=None):
        return Stats(data or {})

    @classmethod
    def build_prom_metrics(cls, vllm_config, metric_types, labelnames, per_engine_labelvalues):
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def _step(self) -> Step:
        return self._get_connector_metadata()


def describe_engine(vllm_config: object, options: Options) -> Engine:
    """Return what the layout needs of vLLM's configuration.

    Raises: UnsupportedError for ways to divide a model that hand-off does not know.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    for field in ("pipeline_parallel_size", "decode_context_parallel_size",
                  "prefill_context_parallel_size"):
        if getattr(parallel, field, 1) > 1:
            raise UnsupportedError(f"{field} is {getattr(parallel, field)}; kvwire hands off "
                                   "between tensor-parallel ranks only: set it to 1")
    if getattr(parallel, "use_ubatching", False):
        raise UnsupportedError("enable_dbo or ubatch_size divides a step: a layer is reported when "
                               "its first part is computed, and would leave half done. Start "
                               "without them")
    text = model.hf_text_config
    latent = getattr(text, "kv_lora_rank", None) or 0, getattr(text, "qk_rope_head_dim", None) or 0
    groups = (getattr(text, name, None) for name in _MAMBA_GROUPS)
    return Engine(
        model=options.model or os.path.basename(os.path.normpath(model.model)),
        rank=_tensor_rank(), count=parallel.tensor_parallel_size,
        latent_dims=latent, mamba_groups=next((found for found in groups if found), None),
        conv_columns_last=_conv_columns_last())


def _tensor_rank() -> int:
    """Return this worker's rank; of a scheduler, which has none, 0."""
    from vllm.distributed import get_tensor_model_parallel_rank, model_parallel_is_initialized
    return get_tensor_model_parallel_rank() if model_parallel_is_initialized() else 0


def _conv_columns_last() -> bool:
    from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
    return is_conv_state_dim_first()
