"""Codec "auto": what the receiver reports, what the sender makes of it, and what it brings."""

import random
import statistics
import time

import numpy as np
import pytest

import kvwire
from kvwire import _native
from kvwire.codec import Codec
from kvwire.layout import DType
from kvwire.speeds import SPEED, SPEEDS, Speeds

LAYERS, TOKENS = 8, 4096
SPEC = kvwire.CacheSpec("m", (
    kvwire.attention(range(LAYERS), kv_heads=4, head_dim=64, dtype="bf16"),
    kvwire.recurrent([LAYERS], heads=8, key_dim=64, value_dim=64),
))
BYTES = LAYERS * 2 * TOKENS * 4 * 64 * 2 + 8 * 64 * 64 * 4


def bf16(array):
    return (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def cache(writable=False, seed=1):
    """Keys and values whose exponents are as unequal as real ones."""
    rng = np.random.default_rng(seed)
    make = (lambda *shape: np.zeros(shape, np.float32)) if writable else (
        lambda *shape: rng.standard_normal(shape, np.float32))
    arrays = {(layer, name): bf16(make(TOKENS, 4, 64)) for layer in range(LAYERS)
              for name in ("k", "v")}
    arrays[LAYERS, "state"] = make(8, 64, 64)
    return kvwire.CacheMemory(SPEC, arrays, tokens=TOKENS, writable=writable), arrays


def test_both_implementations_read_speeds_alike():
    speeds = Speeds(4_000_000_000, 2, {(Codec.RAW, DType.BF16): 16_000_000_000,
                                            (Codec.TIERED, DType.FP32): 1})
    data = speeds.encode()
    assert len(data) == SPEEDS.bytes + 2 * SPEED.bytes
    assert Speeds.decode(data) == speeds and _native.decode_speeds(data) == data
    rng, heard = random.Random(1), 0
    for _ in range(3000):
        changed = bytearray(data[:rng.choice((len(data), rng.randrange(len(data) + 1)))])
        for _ in range(rng.randrange(3)):
            if changed:
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        found = Speeds.decode(bytes(changed))
        native = _native.decode_speeds(bytes(changed))
        assert (found is None) == (native is None)
        if found is not None:
            heard += 1
            assert native == found.encode()
    assert heard > 500


def test_auto_delivers_and_says_what_it_chose():
    with kvwire.Receiver() as receiver, kvwire.Sender(receiver.address, codec="auto") as sender:
        for seed in range(4):
            memory, source = cache(seed=seed)
            target, arrived = cache(writable=True)
            ticket = receiver.expect(target)
            sender.send(ticket.id, memory).result(60)
            ticket.result(60)
            for name, array in source.items():
                assert (arrived[name] == array).all(), name
        stats = sender.links()[0].stats()
        assert receiver.links()[0].stats().codecs == ()
    choices = {(choice.group_kind, choice.dtype): choice for choice in stats.codecs}
    assert set(choices) == {("full_attention", "bf16"), ("recurrent", "fp32")}
    keys = choices["full_attention", "bf16"]
    assert keys.codec in ("raw", "tiered") and keys.why
    measured = {estimate.codec: estimate for estimate in keys.estimates}
    assert set(measured) == {"raw", "tiered"}
    assert measured["raw"].ratio == 1 and 1.3 < measured["tiered"].ratio < 1.8
    assert measured["raw"].encode_gbps > measured["tiered"].encode_gbps > 0
    assert keys.send_gbps > 0


def test_auto_does_not_try_what_a_histogram_says_will_not_shrink():
    slow = kvwire.LinkOptions(bandwidth_max_gbps=0.2)
    rng = np.random.default_rng(1)
    spec = kvwire.CacheSpec("m", (SPEC.groups[0],))

    def memory(writable):
        arrays = {(layer, name): rng.integers(0, 1 << 16, (TOKENS, 4, 64), np.uint16)
                  for layer in range(LAYERS) for name in ("k", "v")}
        return kvwire.CacheMemory(spec, arrays, tokens=TOKENS, writable=writable)

    with kvwire.Receiver() as receiver, \
            kvwire.Sender(receiver.address, codec="auto", link_options=slow) as sender:
        ticket = receiver.expect(memory(True))
        sent = sender.send(ticket.id, memory(False)).result(60)
        choice = sender.links()[0].stats().codecs[0]
    assert choice.codec == "raw" and sent.wire_bytes == LAYERS * 2 * TOKENS * 4 * 64 * 2
    tiered = {estimate.codec: estimate for estimate in choice.estimates}["tiered"]
    assert 0.9 < tiered.ratio < 1.05 and not tiered.encode_gbps


def test_auto_codes_for_a_slow_link_and_fixed_codecs_choose_nothing():
    slow = kvwire.LinkOptions(bandwidth_max_gbps=0.2)
    with kvwire.Receiver() as receiver, \
            kvwire.Sender(receiver.address, codec="auto", link_options=slow) as sender:
        memory, _ = cache()
        for _ in range(2):
            ticket = receiver.expect(cache(writable=True)[0])
            progress = sender.send(ticket.id, memory).result(60)
        keys = sender.links()[0].stats().codecs[0]
        assert keys.codec == "tiered" and keys.why.startswith("tiered brings")
        assert 0.1 < keys.bandwidth_gbps < 1  # the kernel paces not very exactly
        assert progress.wire_bytes < BYTES / 1.2
        ticket = receiver.expect(cache(writable=True)[0])
        fixed = sender.send(ticket.id, memory, codec="raw").result(60)
        assert fixed.wire_bytes == BYTES


def usual_seconds(limit_gbps):
    """In turn, so that what else the machine does hits all alike; the first rounds are to learn."""
    memory, _ = cache()
    target, _ = cache(writable=True)
    paced = kvwire.LinkOptions(bandwidth_max_gbps=limit_gbps)
    repeats = max(1, round((limit_gbps or 10) / 0.5))
    seconds = {codec: [] for codec in ("raw", "tiered", "auto")}
    with kvwire.Receiver() as receiver:
        senders = {codec: kvwire.Sender(receiver.address, codec=codec, link_options=paced)
                   for codec in seconds}
        for _ in range(12):
            for codec, sender in senders.items():
                began = time.monotonic()
                for _ in range(repeats):
                    ticket = receiver.expect(target)
                    sender.send(ticket.id, memory).result(60)
                    ticket.result(60)
                seconds[codec].append(time.monotonic() - began)
        for sender in senders.values():
            sender.close()
    return {codec: statistics.median(times[4:]) for codec, times in seconds.items()}


# On loopback the codecs share the cores with what sends, and with whatever else runs.
@pytest.mark.long
@pytest.mark.parametrize("limit_gbps, slower_max",
                         [(0.5, 1.15), (1, 1.15), (5, 1.15), (None, 1.35)])
def test_auto_brings_about_as_much_as_the_best_codec(limit_gbps, slower_max):
    """Other work on the machine can spoil a measurement, not make one: the best of five counts."""
    found = []
    for _ in range(5):
        usual = usual_seconds(limit_gbps)
        found.append(usual["auto"] / min(usual["raw"], usual["tiered"]))
        if found[-1] < slower_max:
            return
    pytest.fail(f"auto takes {found} times as long as the best codec")


def test_a_codec_that_is_none_is_refused():
    with kvwire.Receiver() as receiver, kvwire.Sender(receiver.address) as sender:
        with pytest.raises(kvwire.UsageError, match="codec is 'best'"):
            sender.open(bytes(16), cache()[0], codec="best")
