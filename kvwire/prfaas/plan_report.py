"""A plan in words and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

from kvwire.prfaas.profiles import GBPS
from kvwire.prfaas.throughput import Deployment, Plan, solve

__all__ = ["as_json", "text"]

LENGTHS = (1024, 8192, 32768, 131072)


def as_json(deployment: Deployment, plan: Plan) -> dict[str, object]:
    """Return the plan's fields, with null for an infinite threshold, and the all-local plan."""
    def fields(plan: Plan) -> dict[str, object]:
        return {name: None if value == math.inf else value for name, value in asdict(plan).items()}

    alone = _all_local(deployment)
    return {"deployment": deployment.name, "plan": fields(plan),
            "all_local": alone and fields(alone)}


def text(deployment: Deployment, plan: Plan) -> str:
    """Return the plan as lines for a terminal."""
    lines = [deployment.name, "", *_decisions(plan), "", *_stages(deployment, plan)]
    alone = _all_local(deployment)
    if alone is not None:
        ratio = plan.lambda_max_rps / alone.lambda_max_rps
        lines += ["", f"without the remote cluster: {alone.lambda_max_rps:.2f} requests/s "
                  f"({alone.prefill_nodes} prefill, {alone.decode_nodes} decode nodes); with it "
                  f"{ratio:.2f} times that"]
    return "\n".join([*lines, "", *_by_length(deployment)])


def _all_local(deployment: Deployment) -> Plan | None:
    """The same local nodes, free to change roles, without the remote cluster."""
    if deployment.prfaas is None or deployment.local.nodes < 2:
        return None
    local = replace(deployment.local, prefill_nodes=None)
    return solve(replace(deployment, local=local, prfaas=None, link=None, threshold_tokens=None))


def _decisions(plan: Plan) -> list[str]:
    threshold = ("nothing is offloaded" if not plan.offloaded_share else
                 f"{plan.threshold_tokens:,.0f} uncached tokens; longer requests are offloaded")
    return [f"threshold       {threshold}",
            f"nodes           {plan.prfaas_nodes} remote prefill, {plan.prefill_nodes} local "
            f"prefill, {plan.decode_nodes} decode",
            f"sustained       {plan.lambda_max_rps:.2f} requests/s, bound by "
            f"{' and '.join(plan.bound_by)}"]


def _stages(deployment: Deployment, plan: Plan) -> list[str]:
    rows = []
    if plan.prfaas_nodes:
        rows += [f"remote prefill  {plan.theta_prfaas_rps:6.2f} requests/s of "
                 f"{plan.long_tokens:,.0f} tokens, {plan.offloaded_share:.1%} of all; "
                 f"{plan.remote_prefill_s:.2f} s each, first token after "
                 f"{plan.remote_ttft_s:.2f} s",
                 f"link            {plan.egress_gbps:6.2f} Gbit/s of "
                 f"{deployment.link.goodput_gbps:g} ({plan.link_utilisation:.0%}); "
                 f"{plan.wire_bytes / 1e6:,.0f} MB a request"]
    return rows + [
        f"local prefill   {plan.theta_prefill_rps:6.2f} requests/s of {plan.short_tokens:,.0f} "
        f"tokens; {plan.local_prefill_s:.2f} s each",
        f"decode          {plan.theta_decode_rps:6.2f} requests/s of "
        f"{deployment.output_tokens:,.0f} tokens"]


def _by_length(deployment: Deployment) -> list[str]:
    local, remote = deployment.local.profile, deployment.prfaas
    head = f"{'tokens':>8} {'cache MB':>9} {'local s':>8}"
    if remote:
        head += f" {'remote s':>8} {'Phi_kv Gbit/s':>14} {'wire MB':>8} {'wire s':>7}"
    rows = [head]
    for tokens in LENGTHS:
        row = (f"{tokens:>8,} {local.cache_bytes(tokens) / 1e6:>9,.0f} "
               f"{local.prefill_s(tokens):>8.2f}")
        if remote:
            wire = deployment.wire
            sent = remote.profile.wire_bytes(tokens, 0, wire.kv_ratio, wire.state_ratio)
            row += (f" {remote.profile.prefill_s(tokens):>8.2f} "
                    f"{remote.profile.kv_throughput_gbps(tokens):>14.2f} {sent / 1e6:>8,.0f} "
                    f"{sent * GBPS / deployment.link.goodput_gbps:>7.2f}")
        rows.append(row)
    return rows
