"""kvwire's connector with a clock in it, for `bench.engine_peer`."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field

from kvwire.connectors.vllm import KvwireConnector

__all__ = ["PROBE", "ProbedConnector"]

_CALLS = ("on_new_request", "get_num_new_matched_tokens", "update_state_after_alloc",
          "build_connector_meta", "update_connector_output", "request_finished_all_groups",
          "bind_connector_metadata", "start_load_kv", "wait_for_layer_load", "save_kv_layer",
          "wait_for_save", "get_transfer_results", "get_kv_connector_stats")


@dataclass
class Probe:
    """What happened in this process since `reset`.

    Attributes:
        connector_ns: spent in the connector's calls, on the engine's thread.
        marks: times of time.monotonic_ns, and bytes at these times; of one request.
        totals: the connector's counters.
    """

    connector_ns: int = 0
    marks: dict[str, int] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)

    def reset(self) -> None:
        self.__init__()


PROBE = Probe()


class ProbedConnector(KvwireConnector):
    """Notes when the last `wait_for_save` of a hand-off began, and when it was received."""

    def wait_for_save(self):
        now = time.monotonic_ns()
        for request_id, chunk in self._step().chunks.items():
            if chunk.states is not None:
                PROBE.marks["saved_ns"] = now
                if request_id in self._worker._prefill:  # it has not failed already
                    PROBE.marks |= self._sent_bytes(request_id)
        super().wait_for_save()

    def get_transfer_results(self, finished_req_ids):
        results = super().get_transfer_results(finished_req_ids)
        if results.finished_recving:
            PROBE.marks["received_ns"] = time.monotonic_ns()
        return results

    def get_kv_connector_stats(self):
        stats = super().get_kv_connector_stats()
        for name, value in stats.data.items() if stats else ():
            PROBE.totals[name] = PROBE.totals.get(name, 0) + value
        return stats

    def _sent_bytes(self, request_id: str) -> dict[str, int]:
        """Return what has a receipt, and what of the whole are states."""
        made = self._worker._prefill._open[request_id]
        states = made.states or self._worker._prefill._pool.staged_states()
        return {"arrived_bytes": sum(stream.transfer.progress().verified_bytes
                                     for stream in made.streams if stream.transfer is not None),
                "state_bytes": sum(array.nbytes for array in states.values())}


def _timed(name: str):
    call = getattr(ProbedConnector, name)

    @functools.wraps(call)
    def timed(self, *arguments, **options):
        began = time.perf_counter_ns()
        try:
            return call(self, *arguments, **options)
        finally:
            PROBE.connector_ns += time.perf_counter_ns() - began

    return timed


for _name in _CALLS:
    setattr(ProbedConnector, _name, _timed(_name))
