"""What breaks, and when."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from kvwire.errors import UsageError
from kvwire.prfaas.simulator.nodes import Request, Stage

if TYPE_CHECKING:
    from kvwire.prfaas.simulator.simulation import Simulation

__all__ = ["Fault", "FaultKind", "plan_faults"]


class FaultKind(str, Enum):
    """REMOTE: the remote cluster is dead, with all that it held. LINK: it runs at `speed` of its
    rate, both ways; at 0 it is a blackhole. PREFILL, DECODE: one local engine restarts.
    REMOTE_PREFILL: one remote engine restarts."""

    REMOTE = "remote"
    LINK = "link"
    PREFILL = "prefill"
    DECODE = "decode"
    REMOTE_PREFILL = "remote-prefill"


@dataclass(frozen=True)
class Fault:
    """From `begin_s` to `end_s`; `node` is that of an engine, `speed` a link's."""

    kind: FaultKind
    begin_s: float
    end_s: float
    node: int = 0
    speed: float = 0.0

    def __post_init__(self):
        if not 0 <= self.begin_s < self.end_s:
            raise UsageError(f"fault {self.kind.value}: from {self.begin_s} s to {self.end_s} s "
                             "is no stretch of time")
        if not 0 <= self.speed:
            raise UsageError(f"fault {self.kind.value}: speed is {self.speed}, below 0")


def plan_faults(simulation: Simulation, faults: list[Fault]) -> None:
    """Make the faults happen; call it before `run`.

    A dead cluster, a silent link and a lost engine are noticed `detect_s` after they began: what
    was there is then routed again. A slow link is not noticed here but by the policy's control.

    Raises: UsageError for a fault of something that the deployment does not have.
    """
    for fault in faults:
        nodes = {FaultKind.PREFILL: simulation.local, FaultKind.DECODE: simulation.decode,
                 FaultKind.REMOTE_PREFILL: simulation.remote}.get(fault.kind)
        if fault.kind in (FaultKind.REMOTE, FaultKind.LINK):
            missing = simulation.remote is None
        else:
            missing = nodes is None or not 0 <= fault.node < nodes.node_count
        if missing:
            raise UsageError(f"fault {fault.kind.value}, node {fault.node}: the deployment has "
                             "no such thing")
        broken = _Broken(simulation, fault)
        simulation.queue.at(fault.begin_s, broken.begin)
        simulation.queue.at(fault.begin_s + simulation.detect_s, broken.notice)
        simulation.queue.at(fault.end_s, broken.end)


class _Broken:
    def __init__(self, simulation: Simulation, fault: Fault):
        self.simulation = simulation
        self.fault = fault
        self.over = False
        self.lost: list[Request] = []

    def begin(self, _: object) -> None:
        simulation, fault = self.simulation, self.fault
        if fault.kind is FaultKind.LINK:
            simulation.link.set_speed(fault.speed)
            simulation.back_link.set_speed(fault.speed)
        elif fault.kind is FaultKind.REMOTE:
            for node in range(simulation.remote.node_count):
                simulation.remote.stop(node)
            for request in simulation.live.values():
                sending = request.stage in (Stage.PREFILL, Stage.TRANSFER)
                if sending and request.choice.remote and request.transfer is not None:
                    request.transfer.link.cancel(request.transfer)  # its source is gone
            simulation.copies.remote_up = False
            simulation.copies.drop(lambda source, target: source.remote or target.remote)
        elif fault.kind is FaultKind.DECODE:
            self.lost = simulation.decode.stop(fault.node)
        else:
            self._nodes().stop(fault.node)

    def _nodes(self):
        simulation = self.simulation
        local = self.fault.kind is FaultKind.PREFILL
        return simulation.local if local else simulation.remote

    def notice(self, _: object) -> None:
        """The router learns of it, and what was lost is routed again."""
        simulation, fault = self.simulation, self.fault
        if fault.kind is FaultKind.REMOTE:
            self._route_again(self._at_remote(), remote_up=self.over)
            if simulation.remote_cache is not None:
                simulation.remote_cache.lose()
        elif fault.kind is FaultKind.LINK:
            if fault.speed == 0 and not self.over:
                self._route_again(self._at_remote(), link_up=False)
                simulation.copies.drop(lambda source, target: source.remote != target.remote)
        elif fault.kind is FaultKind.DECODE:
            for request in self.lost:
                self._resume(request)
        else:
            self._route_again(self._nodes().requests_of(fault.node))

    def _at_remote(self) -> list[Request]:
        """Return all whose cache is to come from the remote cluster, or to go there first."""
        stages = (Stage.DISPATCH, Stage.PREFILL_QUEUE, Stage.PREFILL, Stage.TRANSFER)
        return [request for request in self.simulation.live.values()
                if request.stage in stages
                and (request.choice.remote or request.transfer is not None)]

    def _route_again(self, requests: list[Request], **known: bool) -> None:
        simulation = self.simulation
        for name, value in known.items():
            setattr(simulation, name, value)
        for request in requests:
            simulation.take_back(request)
        for request in requests:
            simulation.route(request)

    def _resume(self, request: Request) -> None:
        """Prefill again what the user has seen; the rest is still to be generated."""
        simulation = self.simulation
        if request.index not in simulation.live:
            return
        made = int((self.fault.begin_s - request.stage_since_s) / simulation.decode.token_s)
        made = min(made, request.output_tokens - 1)
        request.tokens += made
        request.output_tokens -= made
        simulation.expect(request)
        simulation.route(request)

    def end(self, _: object) -> None:
        simulation, fault = self.simulation, self.fault
        self.over = True
        if fault.kind is FaultKind.LINK:
            simulation.link.set_speed(1.0)
            simulation.back_link.set_speed(1.0)
            simulation.link_up = True
        elif fault.kind is FaultKind.REMOTE:
            for node in range(simulation.remote.node_count):
                simulation.remote.start(node)
            simulation.remote_up = simulation.copies.remote_up = True
        elif fault.kind is FaultKind.DECODE:
            simulation.decode.start(fault.node)
        else:
            self._nodes().start(fault.node)
        simulation.route_parked()
