"""How long a routing decision takes with many cached prefixes, one thread, warm."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np

from bench import measure
from bench.prfaas_tables import fit_case_study
from kvwire.prfaas.pool.blocks import Chain
from kvwire.prfaas.pool.hashes import HASH_BYTES
from kvwire.prfaas.pool.metadata import EmbeddedIndex
from kvwire.prfaas.router import Router, RouteRequest, Rule
from kvwire.prfaas.view import ClusterView, NodeView

__all__ = ["measure_router"]

BLOCK_TOKENS = 512
TREE = 16   # prompts that share their first half
STRETCHES = 10  # a busy machine has calmer moments: the best of so many medians is given too
HOMES = 3   # nodes that such prompts are kept on, at most
NODES = {"remote": 4, "local": 3}


def measure_router(block_count: int, decisions: int = 20_000,
                   seed: int = 1) -> list[dict[str, object]]:
    """Return a row for each rule and regime: microseconds of `Router.route`.

    Each of the seven nodes holds random chains until `block_count` different blocks are known;
    requests ask for prefixes of these and go on, as long as the case study's distribution says.
    """
    rng = np.random.default_rng(seed)
    case = fit_case_study().remote_prefill
    names = [f"{cluster}/{number}" for cluster, count in NODES.items() for number in range(count)]
    index, tenant_key = EmbeddedIndex(), rng.bytes(HASH_BYTES)
    chains = _fill(index, tenant_key, names, block_count, case.lengths, rng)
    requests = _requests(chains, tenant_key, case.lengths, min(decisions, 4096), rng)
    rows = []
    for rule, sooner_s in ((Rule.PUBLISHED, math.inf), (Rule.PRICED, math.inf),
                           (Rule.PRICED, 1.0)):
        router = Router(index, BLOCK_TOKENS, case.prfaas.profile, case.local.profile, rule=rule,
                        sooner_s=sooner_s)
        for abundant in (True, False):
            view = _view(abundant)
            took_us = _time(router, requests, view, decisions)
            rows.append({
                "case": "router", "rule": rule.value, "sooner": sooner_s < math.inf,
                "regime": "abundant" if abundant else "scarce", "blocks": index.block_count(),
                "decisions": decisions, "us_median": round(float(np.median(took_us)), 2),
                "us_median_best": round(min(float(np.median(stretch)) for stretch in
                                            np.array_split(took_us, STRETCHES)), 2),
                "us_p99": round(float(np.percentile(took_us, 99)), 2)})
    return rows


def _time(router: Router, requests: Sequence[RouteRequest], view: ClusterView,
          decisions: int) -> np.ndarray:
    took = np.empty(decisions)
    for number in range(decisions):
        request = requests[number % len(requests)]
        began = time.perf_counter()
        router.route(request, view)
        took[number] = time.perf_counter() - began
        if number % 4096 == 0:
            measure.progress(f"router: {number:,} of {decisions:,}")
    measure.progress("")
    return took * 1e6


def _fill(index: EmbeddedIndex, tenant_key: bytes, names: Sequence[str], block_count: int,
          lengths: object, rng: np.random.Generator) -> list[list[bytes]]:
    """Publish chains, TREE at a time with a common first half, each on one to HOMES nodes."""
    chains: list[list[bytes]] = []
    while index.block_count() < block_count:
        blocks = max(2, int(lengths.sample(rng, 1)[0]) // BLOCK_TOKENS)
        shared = [rng.bytes(HASH_BYTES) for _ in range(blocks // 2)]
        homes = [str(name) for name in rng.choice(names, HOMES, replace=False)]
        for _ in range(TREE):
            chain = shared + [rng.bytes(HASH_BYTES) for _ in range(blocks - len(shared))]
            states = chain[blocks // 2 - 1::max(1, blocks // 4)]
            for name in homes[:rng.integers(1, len(homes) + 1)]:
                index.publish(name, Chain(tenant_key, chain[0]), chain, states)
            chains.append(chain)
        if len(chains) % 4096 == 0:
            measure.progress(f"router: {index.block_count():,} blocks known")
    return chains


def _requests(chains: list[list[bytes]], tenant_key: bytes, lengths: object, count: int,
              rng: np.random.Generator) -> list[RouteRequest]:
    """Prompts that begin as a known one does and go on differently; one in four is new."""
    requests = []
    for tokens in lengths.sample(rng, count):
        known = chains[rng.integers(len(chains))] if rng.random() < 0.75 else []
        blocks = int(tokens) // BLOCK_TOKENS
        kept = known[:rng.integers(1, len(known) + 1)] if known else []
        hashes = (kept + [rng.bytes(HASH_BYTES) for _ in range(blocks)])[:blocks]
        requests.append(RouteRequest(int(tokens), tuple(hashes), tenant_key))
    return requests


def _view(abundant: bool) -> ClusterView:
    sides = {cluster: tuple(NodeView(f"{cluster}/{number}", 0.3 * number)
                            for number in range(count)) for cluster, count in NODES.items()}
    return ClusterView(sides["remote"], sides["local"], 19_400, abundant=abundant, link_gbps=90)
