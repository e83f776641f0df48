"""Harm on the path of coded chunks and of the frames about their tables: repaired or refused."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from faults import ADMISSION_BYTES, DOWN, HEADER_BYTES, UP, Fault
from test_faults import LEASE_S, Run
from tiered_data import Warm

import kvwire
from kvwire.errors import KvwireError
from kvwire.layout import CacheSpec
from kvwire.tiered import OPAQUE, PART
from kvwire.wire import FrameType

SPEC = CacheSpec("t", (kvwire.attention((0,), kv_heads=2, head_dim=16, dtype="e5m2"),))
TOKENS = 140  # K and V in three chunks of 4 KiB
SECONDS_MAX = 300


@pytest.fixture(scope="module")
def receiver():
    with kvwire.Receiver(lease_s=0) as made:
        yield made


@pytest.fixture(scope="module")
def patient_receiver():
    with kvwire.Receiver(lease_s=LEASE_S) as made:
        yield made


def two_transfers(receiver, *faults, **options):
    """Return what the transfers on one link ended with, (sender's, receiver's) of each.

    The first one names its tables; parts of the second refer to them. There is no second where the
    first has failed, or the link has ended after it.
    """
    with Run(receiver, *faults, spec=SPEC, tokens=TOKENS, chunk_bytes=4096, codec="tiered",
             contents=Warm, **options) as run:
        outcomes = [run.settle()]
        if outcomes == [(None, None)]:
            try:
                run.send(receiver)
            except KvwireError as error:
                return [*outcomes, (error, None)]
            outcomes.append(run.settle())
        return outcomes


def parts_of(payload):
    """Yield (offset, header) of each part."""
    at = 0
    while at < len(payload):
        header = PART.unpack(payload, at)
        yield at, header
        at += header["coded_bytes"]


class Recorder:
    """Of one lane in each direction: what passed, and where the coded bytes of its parts lie."""

    def __init__(self):
        self.kinds, self.indices, self.coded = [], [], {UP: [], DOWN: []}
        self._offset = dict.fromkeys((UP, DOWN), ADMISSION_BYTES)

    def __call__(self, lane, way, head, payload):
        self.kinds.append(head[2])
        if head[2] == FrameType.CHUNK and head[56] == 2:
            for at, part in parts_of(payload):
                self.indices.append(part["table_index"])
                start = self._offset[way] + HEADER_BYTES + at + PART.bytes
                start += 16 + (part["table_index"] == 0) * 128  # its index and table
                self.coded[way].append(range(start, start + part["coded_bytes"] - PART.bytes))
        self._offset[way] += HEADER_BYTES + len(payload)
        return payload

    def places(self, step):
        """Every byte of both streams, of the coded ones only each `step`th."""
        seldom = {way: {at for run in runs for at in run if at % step}
                  for way, runs in self.coded.items()}
        return [(way, at) for way in (UP, DOWN) for at in range(self._offset[way])
                if at not in seldom[way]]


def recorded(receiver):
    recorder = Recorder()
    assert two_transfers(receiver, edit=recorder) == 2 * [(None, None)]
    return recorder


def test_tables_are_named_sent_and_referred_to(receiver):
    recorder = recorded(receiver)
    for kind in (FrameType.TABLE_NAMES, FrameType.TABLE_ANSWER, FrameType.TABLE):
        assert kind in recorder.kinds
    assert {0, 1, 2} <= set(recorder.indices) <= {0, 1, 2, OPAQUE}


def flip_in_turn(receiver, places, lanes=1, **options):
    rng = random.Random(lanes)

    def one(place):
        fault = Fault(0, *place, "flip", 1 << rng.randrange(8))
        return place, two_transfers(receiver, fault, lanes=lanes, **options)

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(one, places))


def unseen_share(outcomes):
    return sum(ends == 2 * [(None, None)] for _, ends in outcomes) / len(outcomes)


@pytest.mark.timeout(SECONDS_MAX)
def test_bytes_flipped_in_turn(receiver):
    """Of what is coded one in 291, of all else one in three."""
    places = recorded(receiver).places(97)[::3]
    assert len(places) > 700
    assert 0.02 < unseen_share(flip_in_turn(receiver, places)) < 1


@pytest.mark.timeout(SECONDS_MAX)
def test_on_one_of_two_lanes_flips_are_never_noticed(receiver, patient_receiver):
    places = recorded(receiver).places(97)[::5]
    outcomes = flip_in_turn(patient_receiver, places, 2, lease_s=LEASE_S)
    assert unseen_share(outcomes) > 0.95, [ends for _, ends in outcomes if ends[0][0]][:9]


@pytest.mark.long
@pytest.mark.timeout(6 * SECONDS_MAX)
def test_every_byte_flipped_in_turn(receiver):
    outcomes = flip_in_turn(receiver, recorded(receiver).places(1))
    assert 0.5 < unseen_share(outcomes) < 1  # most are in payloads, and repaired
