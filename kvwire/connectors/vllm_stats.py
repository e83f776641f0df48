"""The connector's counters, as vLLM logs them and exports them to Prometheus."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics, KVConnectorStats,
)

__all__ = ["PromMetrics", "Stats"]

_COUNTERS = {
    "handoffs": "Caches handed off and verified.",
    "failures": "Hand-offs that failed.",
    "cache_bytes": "Bytes of cache handed off, verified.",
    "wire_bytes": "Bytes of payload that they took on the wire.",
    "repaired_chunks": "Chunks that travelled again because they came spoilt.",
    "retries": "Hand-offs begun again because the decode side did not know of them yet.",
    "overlapped_bytes": "Bytes that had arrived when the last ones were pushed.",
    "seconds": "Seconds from the beginning of each hand-off to its end.",
}
_SIDES = ("prefill", "decode")


@dataclass
class Stats(KVConnectorStats):
    """Sums by side and counter; those that are 0 are left out."""

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        found: dict[str, int | float] = {}
        for side in _SIDES:
            held = {name: self.data.get(f"{side}_{name}", 0) for name in _COUNTERS}
            if not any(held.values()):
                continue
            ended = held["handoffs"] + held["failures"]
            found |= {
                f"{side}: hand-offs": held["handoffs"], "failures": held["failures"],
                "MB": round(held["cache_bytes"] / 1e6, 2),
                "ratio": round(held["cache_bytes"] / max(held["wire_bytes"], 1), 3),
                "overlap": round(held["overlapped_bytes"] / max(held["cache_bytes"], 1), 3),
                "repaired chunks": held["repaired_chunks"], "retries": held["retries"],
                "mean ms": round(1e3 * held["seconds"] / max(ended, 1), 2),
            }
        return found

    def is_empty(self) -> bool:
        return not any(self.data.values())


class PromMetrics(KVConnectorPromMetrics):
    """One counter of each kind and side, "vllm:kvwire_prefill_cache_bytes" and so on."""

    def __init__(self, vllm_config, metric_types, labelnames, per_engine_labelvalues):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        made = {f"{side}_{name}": self._counter_cls(
            name=f"vllm:kvwire_{side}_{name}", documentation=f"{words} {side.capitalize()} side.",
            labelnames=labelnames) for side in _SIDES for name, words in _COUNTERS.items()}
        self._counters = {name: {engine: counter.labels(*values)
                                 for engine, values in per_engine_labelvalues.items()}
                          for name, counter in made.items()}

    def observe(self, transfer_stats_data: dict, engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            if name in self._counters:
                self._counters[name][engine_idx].inc(value)
