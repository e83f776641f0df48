"""A seed, and the run that it stands for: what travels, how, and everything that goes wrong."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import kvwire
from bench.campaign.cargo import Cargo

__all__ = ["DOWN", "Harm", "LEASE_S", "Misfortune", "Plan", "UP", "make_cargoes", "make_plan"]

UP, DOWN = "up", "down"  # from the dialler to the listener, and back
ANY_FRAME = 0
MANIFEST, GRANT, SEGMENT, CHUNK, SEGMENT_END, END, RECEIPT, REPAIR = range(1, 9)
DONE, CLOSE = 0x0B, 0x0E
LEASE_S = 3.0  # of the shared endpoints, too
_PATIENT_S = 8.0  # where a run must deliver, for the sake of a busy machine


@dataclass(frozen=True)
class Harm:
    """What the proxy does at one place of one stream.

    Attributes:
        kind: a method of `proxy.Stream`.
        connection: which one, as the proxy accepts them; None: every one.
        once: only the connection that gets there first.
        at: byte of the stream; or, with `frame` set, of the frame (-1: its last).
        frame: (type, n): the n-th frame of this type, 0 any type; None: no frame.
        value: the kind's measure: a mask, bytes, seconds, another connection.
    """

    kind: str
    connection: int | None
    way: str
    at: int
    frame: tuple[int, int] | None = None
    value: float = 0
    once: bool = False


@dataclass(frozen=True)
class Misfortune:
    """What befalls a process or what its owner does to it.

    Attributes:
        kind: "cancel", "close", "kill", "stop", "memory" or "files".
        side: "sending" or "receiving".
        after_s: since the start of the run.
        value: bytes of memory, file descriptors beyond those in use, or seconds to be stopped.
    """

    kind: str
    side: str
    after_s: float
    value: float = 0


@dataclass
class Plan:
    """One run. `name` is the family of harm, as the statistics count it."""

    seed: int
    name: str
    cargoes: list[Cargo]
    mode: str = "push"  # the receiver listens; "pull": the sender does, "reach": likewise, opened
    security: str = "none"  # or "hmac", "psk"
    lease_s: float = LEASE_S
    lanes: int = 2
    codec: str = "raw"
    chunk_bytes: int = 4096
    deadline_s: float = 0.5
    bind_after_s: float = 0.0
    rounds: int = 1  # of transfers over the same link, one after another
    by_layer: bool = False
    in_parts: bool = False  # token ranges, in any order, with priorities
    pause_s: float = 0.0
    reuse_source: bool = False
    bytes_per_s: float = 0.0  # 0: as fast as it goes
    piece_bytes: int = 1 << 18
    refused: tuple[int, ...] = ()  # connections reset at once
    mute: tuple[int, ...] = ()  # connections that are accepted and never answered
    harms: list[Harm] = field(default_factory=list)
    misfortune: Misfortune | None = None
    restart: bool = False
    must_deliver: bool = False
    sabotage: str = ""  # for tests of the campaign itself: "wrong byte", "late write" or "leak"
    size: str = "small"


def make_plan(seed: int, large: bool = False) -> Plan:
    """Return the run of this seed; always the same one."""
    rng = random.Random(f"kvwire fault campaign {seed} {large}")
    names = list(FAMILIES)
    name, = rng.choices(names, [FAMILIES[each][0] for each in names])
    plan = Plan(seed, name, make_cargoes(seed, large))
    if large:
        plan.size, plan.deadline_s = "large", rng.uniform(1.5, 3.0)
        plan.chunk_bytes = rng.choice((64 << 10, 256 << 10, 1 << 20))
    else:
        plan.deadline_s = rng.uniform(0.25, 0.6)
        plan.chunk_bytes = rng.choice((4096, 4096, 8192, 32768, 262144))
    plan.mode = rng.choices(("push", "pull", "reach"), (6, 1, 1))[0]
    plan.lanes = rng.choice((1, 1, 2, 2, 2, 3, 4))
    plan.codec = rng.choice(("raw", "lz4", "tiered", "tiered"))
    plan.by_layer = rng.random() < 0.5
    plan.pause_s = rng.choice((0, 0, 0.002, 0.01)) if plan.by_layer else 0
    plan.in_parts = rng.random() < 0.3
    plan.reuse_source = not large and rng.random() < 0.3
    if plan.mode == "push" and rng.random() < 0.2:
        plan.bind_after_s = rng.uniform(0, 0.1)
    plan.security = rng.choices(("none", "hmac", "psk"), (6, 1, 2))[0]
    if plan.security == "psk" and not kvwire.backends()["tls"]:
        plan.security = "hmac"
    plan.lease_s = rng.choice((0, 0.2, 1.0, 3.0))
    if plan.mode == "push" and rng.random() < 0.2:
        plan.rounds = 2
    FAMILIES[name][1](rng, plan)
    if plan.misfortune:
        plan.rounds = 1
    if plan.must_deliver:
        plan.deadline_s, plan.lease_s = _PATIENT_S, LEASE_S
    return plan


def make_cargoes(seed: int, large: bool = False) -> list[Cargo]:
    """Return what the run of this seed carries: at most 1.6 MiB in all; `large`: 64 to 81 MiB."""
    rng = random.Random(f"kvwire fault cargo {seed} {large}")
    if large:
        return [Cargo(seed, 8, rng.randint(2048, 2600), 8, 128)]
    return [_small_cargo(rng, seed * 4 + n) for n in range(rng.choice((1, 1, 1, 2, 3)))]


def _small_cargo(rng: random.Random, seed: int) -> Cargo:
    return Cargo(seed, rng.randint(1, 4), rng.choice((0, 1, 15, 16, 33, 100, 200)),
                 rng.choice((1, 2, 4)), rng.choice((8, 16, 64)))


def _connection(rng: random.Random, plan: Plan) -> dict[str, object]:
    """One of the first lanes, whichever gets there first, a later, re-dialled one, or all."""
    draw = rng.random()
    if draw < 0.45:
        return {"connection": rng.randrange(plan.lanes)}
    if draw < 0.8:
        return {"connection": None, "once": True}
    return {"connection": None if draw < 0.9 else rng.randrange(plan.lanes, 2 * plan.lanes + 1)}


def _place(rng: random.Random, plan: Plan) -> dict[str, object]:
    """Draw a place: any byte of a stream, or any byte of a frame of some type."""
    way = rng.choice((UP, UP, DOWN))
    place = _connection(rng, plan) | {"way": way}
    sending = (way == UP) == (plan.mode == "push")
    if plan.security == "psk" or rng.random() < 0.5:
        longest = 500
        if sending:
            whole = sum(_payload_bytes(cargo) for cargo in plan.cargoes)
            longest = rng.choice((1500, 1500 + whole // plan.lanes))
        return place | {"at": int(rng.random() ** 2 * longest)}
    types = (MANIFEST, SEGMENT, CHUNK, CHUNK, SEGMENT_END, END, CLOSE) if sending else (
        GRANT, RECEIPT, RECEIPT, REPAIR, DONE, CLOSE)
    frame = rng.choice((ANY_FRAME, *types)), int(rng.random() ** 4 * 12)
    return place | {"frame": frame, "at": rng.choice((0, rng.randrange(64), rng.randrange(4096),
                                                      -1))}


def _payload_bytes(cargo: Cargo) -> int:
    return cargo.layers * 2 * cargo.tokens * cargo.heads * cargo.head_dim * 2


def _frame_place(rng: random.Random, plan: Plan) -> dict[str, object]:
    plan.security = "none"  # frames can be seen
    place = _place(rng, plan)
    return place | {"frame": place.get("frame") or (ANY_FRAME, rng.randrange(20)), "at": 0}


def _nothing(rng: random.Random, plan: Plan) -> None:
    plan.must_deliver = True


def _delays(rng: random.Random, plan: Plan) -> None:
    """Slow, cut into small pieces, or late: a delay only delays."""
    plan.must_deliver = True
    if plan.size == "small":
        plan.piece_bytes = rng.choice((1 << 18, 1000, 63, 7))
        if plan.piece_bytes < 1000:
            plan.cargoes = [Cargo(plan.seed, 1, 20, 1, 8)]
        elif rng.random() < 0.5:
            plan.bytes_per_s = rng.uniform(1e6, 1e7)
    else:
        plan.bytes_per_s = rng.uniform(1e8, 4e8)
    for _ in range(rng.randint(0, 4)):
        plan.harms.append(Harm("stall", **_place(rng, plan), value=rng.uniform(0.001, 0.1)))


def _flips(rng: random.Random, plan: Plan) -> None:
    for _ in range(rng.choice((1, 1, 2, 5, 12))):
        place = _place(rng, plan)
        if rng.random() < 0.4:  # a payload, which is repaired
            place |= {"frame": (CHUNK, int(rng.random() ** 2 * 20)), "at": rng.randrange(64, 4096),
                      "way": UP if plan.mode == "push" else DOWN}
        plan.harms.append(Harm("flip", **place, value=1 << rng.randrange(8)))


def _ranges(rng: random.Random, plan: Plan) -> None:
    """Bytes that vanish, come twice, or come from nowhere."""
    for _ in range(rng.choice((1, 1, 2))):
        count = rng.choice((1, rng.randrange(1, 64), 64, rng.randrange(1, 5000)))
        plan.harms.append(Harm(rng.choice(("drop", "repeat", "invent")), **_place(rng, plan),
                               value=count))


def _frames_again(rng: random.Random, plan: Plan) -> None:
    """Whole frames twice: a repetition has no effect but its answer."""
    plan.must_deliver = True
    for _ in range(rng.choice((1, 2, 4))):
        plan.harms.append(Harm("repeat_frame", **_frame_place(rng, plan)))


def _frames_elsewhere(rng: random.Random, plan: Plan) -> None:
    """Whole frames lost, later than their successors, or on another lane."""
    for _ in range(rng.choice((1, 2, 4))):
        plan.harms.append(Harm(rng.choice(("move_frame", "move_frame", "drop_frame")),
                               **_frame_place(rng, plan), value=rng.randrange(plan.lanes)))


def _cuts(rng: random.Random, plan: Plan) -> None:
    for _ in range(rng.choice((1, 1, 2, plan.lanes))):
        kind = rng.choice(("cut", "cut", "finish", "cut_near", "cut_far", "half_close"))
        plan.harms.append(Harm(kind, **_place(rng, plan)))


def _late_place(rng: random.Random, plan: Plan) -> dict[str, object]:
    """A place behind greetings and handshakes, met once."""
    plan.must_deliver = True
    place = _place(rng, plan)
    if "frame" not in place:
        place["at"] += 2000 if plan.security == "psk" else 200
    return place | {"once": place["connection"] is None}


def _lanes_lost(rng: random.Random, plan: Plan) -> None:
    """Lanes that are cut, each once; they are dialled again, and the transfer carries on."""
    for _ in range(rng.choice((1, 2, 3, plan.lanes))):
        plan.harms.append(Harm(rng.choice(("cut", "finish")), **_late_place(rng, plan)))


def _lane_stalled(rng: random.Random, plan: Plan) -> None:
    """One of several lanes passes nothing more, one way; the others carry on."""
    plan.lanes = rng.choice((2, 3, 4))
    place = _late_place(rng, plan) | {"connection": rng.randrange(plan.lanes)}
    plan.harms.append(Harm("blackhole", **place))


def _stalls(rng: random.Random, plan: Plan) -> None:
    for _ in range(rng.choice((1, 1, 2, plan.lanes))):
        kind, longest = rng.choice((("stall", 0.3), ("stall", 1.0), ("blackhole", 0)))
        plan.harms.append(Harm(kind, **_place(rng, plan), value=rng.uniform(0.01, longest or 1)))


def _dials(rng: random.Random, plan: Plan) -> None:
    """Connections that are refused, or accepted and never served."""
    some = rng.sample(range(plan.lanes + 2), rng.randint(1, plan.lanes + 1))
    middle = rng.randint(0, len(some))
    plan.refused, plan.mute = tuple(some[:middle]), tuple(some[middle:])
    if rng.random() < 0.3:
        _cuts(rng, plan)


def _everything(rng: random.Random, plan: Plan) -> None:
    for each in rng.sample((_flips, _ranges, _frames_again, _frames_elsewhere, _cuts, _stalls,
                            _ends), 3):
        each(rng, plan)
    plan.must_deliver = False


def _ends(rng: random.Random, plan: Plan) -> None:
    """One side cancels or closes in the middle; sometimes something stalls meanwhile."""
    longest = 0.06
    if rng.random() < 0.6:
        _slowed(rng, plan)
        longest = 0.2
    plan.misfortune = Misfortune(rng.choice(("cancel", "close")), _side(rng),
                                 rng.random() ** 2 * longest)
    if rng.random() < 0.4:
        _stalls(rng, plan)


def _killed(rng: random.Random, plan: Plan) -> None:
    _slowed(rng, plan)
    plan.misfortune = Misfortune("kill", _side(rng), rng.random() ** 2 * 0.2)
    plan.restart = rng.random() < 0.7
    plan.mode = "push" if plan.restart else plan.mode


def _stopped(rng: random.Random, plan: Plan) -> None:
    _slowed(rng, plan)
    plan.misfortune = Misfortune("stop", _side(rng), rng.random() ** 2 * 0.1,
                                 rng.uniform(0.05, 0.8))


def _short_of_memory(rng: random.Random, plan: Plan) -> None:
    plan.misfortune = Misfortune("memory", _side(rng), 0, rng.choice((3, 8, 12, 30, 80)) << 20)


def _short_of_files(rng: random.Random, plan: Plan) -> None:
    plan.misfortune = Misfortune("files", _side(rng), 0, rng.randint(0, 5))


def _cache_file(rng: random.Random, plan: Plan) -> None:
    plan.mode = "file"
    plan.cargoes = [_small_cargo(rng, plan.seed * 4 + n) for n in range(2)]
    kind = rng.choice(("full", "kill", "damage"))
    plan.misfortune = Misfortune(kind, "sending", rng.random() ** 2 * 0.05, rng.random())


def _slowed(rng: random.Random, plan: Plan) -> None:
    """Slow enough that what happens by the clock happens in the middle."""
    whole = sum(_payload_bytes(cargo) for cargo in plan.cargoes)
    plan.bytes_per_s = max(1e5, whole / rng.uniform(0.02, 0.3) / plan.lanes)


def _side(rng: random.Random) -> str:
    return rng.choice(("sending", "receiving"))


FAMILIES: dict[str, tuple[float, Callable[[random.Random, Plan], None]]] = {
    "nothing": (2, _nothing),
    "delays": (6, _delays),
    "flips": (18, _flips),
    "byte ranges": (12, _ranges),
    "frames repeated": (8, _frames_again),
    "frames moved or lost": (10, _frames_elsewhere),
    "cuts": (16, _cuts),
    "lanes lost": (10, _lanes_lost),
    "a lane stalled": (4, _lane_stalled),
    "stalls": (6, _stalls),
    "refused and silent connections": (5, _dials),
    "cancel and close": (8, _ends),
    "several at once": (4, _everything),
    "killed processes": (1.5, _killed),
    "stopped processes": (1, _stopped),
    "memory limits": (0.7, _short_of_memory),
    "descriptor limits": (0.7, _short_of_files),
    "cache files": (1.1, _cache_file),
}
