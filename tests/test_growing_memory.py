"""Sources whose blocks become known while they are sent; receivers that lack only some tokens."""

from dataclasses import replace

import numpy as np
import pytest

import kvwire
from faults import fails
from kvwire.errors import ErrorCode
from kvwire.layout import CacheSpec

TOKENS = 18
SPEC = CacheSpec("grows", (
    kvwire.attention((0, 1), kv_heads=2, head_dim=8, block_tokens=4, fused=True),
    kvwire.sliding_window((2,), 7, kv_heads=1, head_dim=8, block_tokens=4),
))
IDS = [7, 3, 9, 1, 5]


def pool(seed):
    rng = np.random.default_rng(seed)
    arrays = {(layer, "kv"): rng.integers(0, 1 << 16, (12, 4, 2, 16), np.uint16)
              for layer in (0, 1)}
    return arrays | {(2, name): rng.integers(0, 1 << 16, (12, 4, 1, 8), np.uint16)
                     for name in ("k", "v")}


def rows(arrays, key, block_ids, tokens):
    return np.stack([arrays[key][block_ids[token // 4], token % 4] for token in tokens])


@pytest.fixture
def ends():
    with kvwire.Receiver() as receiver, kvwire.Sender(receiver.address) as sender:
        yield receiver, sender


def test_blocks_are_added_between_pushes(ends):
    receiver, sender = ends
    here, there = pool(1), pool(2)
    source = kvwire.CacheMemory(SPEC, here, tokens=TOKENS, block_ids=IDS[:1], growing=True)
    target = kvwire.CacheMemory(SPEC, there, tokens=TOKENS, block_ids=[11, 10, 8, 6, 4],
                                writable=True)
    ticket = receiver.expect(target)
    transfer = sender.open(ticket.id, source)
    sent = 0
    for count in range(1, len(IDS) + 1):
        if count > 1:
            for group in range(2):
                source.extend_blocks(group, IDS[count - 1:count])
        stop = min(4 * count, TOKENS)
        for layer in range(3):
            transfer.push_items(source.items(layer, (sent, stop)))
        sent = stop
    transfer.finish().result(10)
    ticket.result(10)
    for key in here:
        held = range(TOKENS - 7 if key[0] == 2 else 0, TOKENS)
        assert (rows(here, key, IDS, held) == rows(there, key, [11, 10, 8, 6, 4], held)).all()


def test_tokens_of_unknown_blocks_are_not_pushed(ends):
    receiver, sender = ends
    source = kvwire.CacheMemory(SPEC, pool(1), tokens=TOKENS, block_ids=IDS[:2], growing=True)
    transfer = sender.open("00" * 16, source)
    transfer.push(0, tokens=(0, 8))
    with pytest.raises(kvwire.UsageError, match="token 8 lies in a block that is not known"):
        transfer.push(0, tokens=(8, 9))
    for group in range(2):
        source.extend_blocks(group, IDS[2:])
    transfer.push(0, tokens=(8, TOKENS))
    source.forget_blocks()
    with pytest.raises(kvwire.UsageError, match="token 3 "):
        transfer.push(1, tokens=(0, 4))


def test_growing_tables_are_checked():
    source = kvwire.CacheMemory(SPEC, pool(1), tokens=TOKENS, block_ids=IDS[:2], growing=True)
    with pytest.raises(kvwire.UsageError, match=r"block_ids\[3\] is 12, but the arrays have 12"):
        source.extend_blocks(0, [0, 12])
    with pytest.raises(kvwire.UsageError, match=r"block_ids\[2\] is -1"):
        source.extend_blocks(0, [-1])
    assert source.blocks_known(0) == 2
    early = kvwire.CacheMemory(SPEC, pool(1), tokens=TOKENS, block_ids=IDS[:1], growing=True)
    early.extend_blocks(1, [-1, 2, 3, 4, 99])  # left behind by the window; beyond the last token
    assert early.blocks_known(1) == 5
    fixed = kvwire.CacheMemory(SPEC, pool(1), tokens=TOKENS, block_ids=IDS)
    with pytest.raises(kvwire.UsageError, match="growing=True"):
        fixed.extend_blocks(0, [1])
    with pytest.raises(kvwire.UsageError, match="a destination binds all its blocks"):
        kvwire.CacheMemory(SPEC, pool(1), tokens=TOKENS, block_ids=IDS, growing=True,
                           writable=True)


def test_native_tables_refuse_what_does_not_fit():
    from kvwire import _native
    table = _native.BlockTable([1, 2, 3])
    for first, ids in ((3, [1]), (2, [1, 2]), (4, [])):
        with pytest.raises(kvwire.UsageError, match="do not lie in a table of 3"):
            table.fill(first, ids)
    with pytest.raises(kvwire.UsageError, match="start at 0"):
        table.fill(0, [-1])
    table.fill(1, [5, 6])


@pytest.mark.parametrize("start", [4, 8, TOKENS])
def test_a_sender_that_has_more_may_open_another_transfer(ends, start):
    receiver, sender = ends
    here, there = pool(1), pool(2)
    target = kvwire.CacheMemory(SPEC, there, tokens=(start, TOKENS),
                                block_ids=IDS[start // 4:], writable=True)
    ticket = receiver.expect(target)
    everything = kvwire.CacheMemory(SPEC, here, tokens=TOKENS, block_ids=IDS)
    error = fails(sender.send(ticket.id, everything), kvwire.RefusedError,
                  ErrorCode.TOKENS_MISMATCH)
    assert error.remote and not ticket.done()
    assert TOKENS - error.expected == start
    part = kvwire.CacheMemory(SPEC, here, tokens=(start, TOKENS), block_ids=IDS[start // 4:])
    sender.send(ticket.id, part).result(10)
    ticket.result(10)
    for key in here:
        held = range(max(start, TOKENS - 7) if key[0] == 2 else start, TOKENS)
        if held:
            assert (rows(here, key, IDS, held) == rows(there, key, IDS, held)).all()


def test_a_sender_that_has_less_fails_the_ticket(ends):
    receiver, sender = ends
    target = kvwire.CacheMemory(SPEC, pool(2), tokens=TOKENS, block_ids=IDS, writable=True)
    ticket = receiver.expect(target)
    part = kvwire.CacheMemory(replace(SPEC), pool(1), tokens=(4, TOKENS), block_ids=IDS[1:])
    fails(sender.send(ticket.id, part), kvwire.RefusedError, ErrorCode.TOKENS_MISMATCH)
    fails(ticket, kvwire.RefusedError, ErrorCode.TOKENS_MISMATCH)
