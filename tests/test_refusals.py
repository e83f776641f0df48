"""Refusals, deadlines and cancels: by type, with the same words on both sides, and final."""

import random
import time
from dataclasses import replace

import numpy as np
import pytest

import kvwire
from faults import POISON, Ends, Held, Proxy, eventually, fail_both, fails, same_content
from kvwire.errors import ErrorCode
from kvwire.layout import CacheSpec

TOKENS = 21
LAYERS = 3


def attention_spec(**options):
    options = {"kv_heads": 4, "head_dim": 16, "dtype": "bf16"} | options
    return CacheSpec("m", (kvwire.attention(range(LAYERS), **options),))


SPEC = attention_spec()


@pytest.fixture
def ends():
    with Ends() as made:
        yield made


def caches(spec=SPEC, tokens=TOKENS, held=None, **options):
    return (Held(spec, tokens, 1, **options),
            Held(held or spec, tokens, 2, writable=True))


@pytest.mark.parametrize("call", [
    lambda ends, memory: ends.sender.open("zz", memory),
    lambda ends, memory: ends.sender.open(b"short", memory),
    lambda ends, memory: ends.sender.open(b"x" * 16, {}),
    lambda ends, memory: ends.sender.offer(None),
    lambda ends, memory: ends.sender.open(b"x" * 16, memory, source_rank=(1, 1)),
    lambda ends, memory: ends.sender.open(b"x" * 16, memory, source_rank=(0, 5000)),
    lambda ends, memory: ends.sender.open(b"x" * 16, memory, codec="zstd"),
    lambda ends, memory: ends.sender.open(b"x" * 16, memory, carry=SPEC.select((0,))),
    lambda ends, memory: ends.sender.open(b"x" * 16, memory, deadline_s=-1),
    lambda ends, memory: ends.sender.open(b"x" * 16, memory, link="zz"),
    lambda ends, memory: ends.receiver.expect(memory),
    lambda ends, memory: ends.receiver.expect(None),
    lambda ends, memory: ends.receiver.expect(Held(SPEC, 1, writable=True).memory,
                                              source_ranks=[]),
    lambda ends, memory: ends.receiver.expect(Held(SPEC, 1, writable=True).memory,
                                              source_ranks=[-1]),
    lambda ends, memory: ends.receiver.expect(Held(SPEC, 1, writable=True).memory,
                                              source_ranks=[0], source_rank_count=70_000),
    lambda ends, memory: kvwire.Sender("nowhere"), lambda ends, memory: kvwire.Sender(),
    lambda ends, memory: kvwire.Sender("h:1", chunk_bytes=5000),
    lambda ends, memory: kvwire.Sender("127.0.0.1:1", lanes=0),
    lambda ends, memory: kvwire.Sender("127.0.0.1:1", lanes=65),
    lambda ends, memory: kvwire.Sender("127.0.0.1:1", lanes=-1),
    lambda ends, memory: kvwire.Receiver("127.0.0.1:99999"),
    lambda ends, memory: kvwire.Receiver(("127.0.0.1", 0)),
    lambda ends, memory: kvwire.Receiver(chunk_bytes_max=1),
    lambda ends, memory: kvwire.Receiver(window_bytes=1),
    lambda ends, memory: kvwire.Receiver(ends.receiver.address),
])
def test_wrong_calls_are_refused_by_type(ends, call):
    with pytest.raises(kvwire.UsageError):
        call(ends, Held(SPEC, TOKENS, 1).memory)


@pytest.mark.parametrize("views, legal", [
    (lambda x: (x, x), False), (lambda x: (x[:4], x[3:7]), False),
    (lambda x: (x[::2], x[4:]), False), (lambda x: (x[:4], x[4:]), True),
    (lambda x: (x[::2], x[1::2]), True), (lambda x: (x.reshape(4, 2)[:, 0], x[1::2]), True),
])
def test_destinations_that_overlap_are_refused(views, legal):
    a, b = views(np.zeros(8, np.float32))
    if legal:
        assert kvwire.tensor_memory({"a": a, "b": b}, writable=True)
    else:
        with pytest.raises(kvwire.UsageError):
            kvwire.tensor_memory({"a": a, "b": b}, writable=True)
    assert kvwire.tensor_memory({"a": a, "b": b}), "sources may overlap as they like"


def test_nobody_listens():
    with kvwire.Sender("127.0.0.1:1") as sender:
        with pytest.raises(kvwire.TransferError) as caught:
            sender.connect(5)
        assert caught.value.code == ErrorCode.CONNECT_FAILED
        transfer = sender.send(b"x" * 16, Held(SPEC, TOKENS, 1).memory)
        fails(transfer, kvwire.TransferError, ErrorCode.CONNECT_FAILED)


def test_a_lost_link_is_made_again(ends):
    ends.sender.connect(5)
    address = ends.receiver.address
    ends.receiver.close()
    with kvwire.Receiver(address) as again:
        assert eventually(lambda: ends.sender.stats()["links"] == 0)
        source, target = caches()
        ticket = again.expect(target.memory)
        ends.sender.send(ticket.id, source.memory).result(10)
        ticket.result(10)


def test_a_ticket_may_be_bound_after_the_manifest_came(ends):
    source, target = caches()
    transfer = ends.sender.send(b"late" * 4, source.memory)
    assert not transfer._native.wait(0.2) and not transfer.progress().granted
    ticket = ends.receiver.expect(target.memory, ticket_id=b"late" * 4)
    transfer.result(10)
    ticket.result(10)
    assert same_content(source, target)


def test_a_ticket_that_is_never_bound_is_unknown():
    with Ends(receiver={"patience_s": 0.3}) as ends:
        transfer = ends.sender.send(b"x" * 16, Held(SPEC, TOKENS, 1).memory)
        error = fails(transfer, kvwire.TicketError, ErrorCode.TICKET_UNKNOWN, 5)
        assert error.remote


def test_an_ended_ticket_is_expired(ends):
    source, target = caches()
    ticket = ends.receiver.expect(target.memory)
    ticket.cancel()
    fails(ends.sender.send(ticket.id, source.memory), kvwire.TicketError,
          ErrorCode.TICKET_EXPIRED)
    ticket = ends.receiver.expect(target.memory, deadline_s=0.05)
    fails(ticket, kvwire.TransferTimeout, ErrorCode.DEADLINE_EXCEEDED)
    fails(ends.sender.send(ticket.id, source.memory), kvwire.TicketError,
          ErrorCode.TICKET_EXPIRED)


def test_deadlines_of_either_side(ends):
    source, target = caches()
    ticket = ends.receiver.expect(target.memory, deadline_s=0.3)
    transfer = ends.sender.open(ticket.id, source.memory)
    transfer.push(0).wait(10)
    ticket_error = fails(ticket, kvwire.TransferTimeout, ErrorCode.DEADLINE_EXCEEDED)
    assert ticket_error.layers[0] == "ready" and not ticket_error.remote
    assert fails(transfer, kvwire.TransferTimeout, ErrorCode.DEADLINE_EXCEEDED).remote
    ticket = ends.receiver.expect(target.memory)
    transfer = ends.sender.open(ticket.id, source.memory, deadline_s=0.3)
    assert not fails(transfer, kvwire.TransferTimeout, ErrorCode.DEADLINE_EXCEEDED).remote
    assert fails(ticket, kvwire.TransferTimeout, ErrorCode.DEADLINE_EXCEEDED).remote


def test_a_deadline_that_is_met_does_no_harm(ends):
    source, target = caches()
    ticket = ends.receiver.expect(target.memory, deadline_s=3)
    transfer = ends.sender.send(ticket.id, source.memory, deadline_s=3)
    transfer.result(10)
    ticket.result(10)
    time.sleep(3.1)
    assert transfer.exception() is ticket.exception() is None


@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_cancel_before_the_manifest_and_before_the_grant(ends, side):
    source, target = caches()
    transfer = ends.sender.send(b"x" * 16, source.memory)
    if side == "sender":
        transfer.cancel()
        fails(transfer, kvwire.TransferCancelled, ErrorCode.CANCELLED)
        time.sleep(0.3)  # the ABORT is on its way
        ticket = ends.receiver.expect(target.memory, ticket_id=b"x" * 16, deadline_s=0.3)
        fails(ticket, kvwire.TransferTimeout, ErrorCode.DEADLINE_EXCEEDED)
    else:
        ticket = ends.receiver.expect(target.memory, ticket_id=b"y" * 16)
        ticket.cancel()
        fails(ticket, kvwire.TransferCancelled, ErrorCode.CANCELLED)
        assert ticket.report() == dict.fromkeys(range(LAYERS), "unwritten")
        transfer.cancel()
    assert all(transfer._native.pushes_returned())
    assert target.is_poison()


BIG = attention_spec(kv_heads=8, head_dim=128)
BIG_TOKENS = 700  # 8.6 MB


@pytest.mark.parametrize("codec", ["raw", "lz4"])
@pytest.mark.parametrize("side", ["sender", "receiver"])
@pytest.mark.parametrize("block_tokens", [0, 16])
def test_nothing_is_written_once_cancel_has_returned(side, codec, block_tokens):
    spec = BIG.with_block_tokens(block_tokens)
    with Ends(bytes_per_s=6_000_000, chunk_bytes=1 << 20) as ends:
        source, target = caches(spec, BIG_TOKENS)
        ticket = ends.receiver.expect(target.memory)
        transfer = ends.sender.open(ticket.id, source.memory, codec=codec).push_all()
        assert eventually(lambda: ticket.progress().verified_bytes > 2 << 20)
        (transfer if side == "sender" else ticket).cancel()
        for _ in range(20 if side == "receiver" else 0):
            target.poison()
            time.sleep(0.02)
            assert target.is_poison()
        fail_both(ticket, transfer, kvwire.TransferCancelled, ErrorCode.CANCELLED, side)
        target.poison()
        time.sleep(0.2)
        assert target.is_poison()
        after, fresh = caches(SPEC)
        ticket = ends.receiver.expect(fresh.memory)  # the link lives on
        ends.sender.send(ticket.id, after.memory).result(20)
        ticket.result(10)
        assert same_content(after, fresh)


def test_cancel_at_any_moment_is_final():
    """Cancels race with arrivals; whoever wins, both sides end and nothing moves afterwards."""
    rng = random.Random(3)
    with Ends(lanes=4, chunk_bytes=1 << 16) as ends:
        for round_number in range(60):
            source, target = caches(BIG, 100)
            ticket = ends.receiver.expect(target.memory)
            transfer = ends.sender.send(ticket.id, source.memory)
            time.sleep(rng.random() * 0.003)
            (ticket if round_number % 2 else transfer).cancel()
            if round_number % 2:
                before = [raw.copy() for raw in target.storage]
            assert ticket._native.wait(5) and transfer._native.wait(5)
            if round_number % 2:
                assert all((a == b).all() for a, b in zip(before, target.storage))
            if ticket.exception() is None:
                assert same_content(source, target)
            assert all(transfer._native.pushes_returned())


def test_the_source_is_not_read_once_cancel_has_returned():
    with Ends(bytes_per_s=6_000_000, chunk_bytes=1 << 20) as ends:
        source, target = caches(BIG, BIG_TOKENS)
        expected = source.content()
        ticket = ends.receiver.expect(target.memory)
        transfer = ends.sender.open(ticket.id, source.memory).push_all()
        assert eventually(lambda: ticket.progress().verified_bytes > 1 << 20)
        transfer.cancel()
        for raw in source.storage:
            raw[:] = 0x33
        fails(ticket, kvwire.TransferCancelled, ErrorCode.CANCELLED)
        got = target.content()
        for key in got:  # what came is the source's, a hole, or the zeros that fill its place
            ours, theirs = (array.view(np.uint8) for array in (expected[key], got[key]))
            assert np.isin(theirs[theirs != ours], (POISON, 0)).all()


MISMATCHES = {
    "model": (replace(SPEC, model="other"), "model"),
    "dtype": (attention_spec(dtype="fp32"), "dtype"),
    "heads": (attention_spec(kv_heads=2), "HEAD"),
    "dim": (attention_spec(head_dim=8), "DIM"),
    "value_dim": (attention_spec(value_dim=32), "leaf v"),
    "layers": (CacheSpec("m", (kvwire.attention(range(1, 4), kv_heads=4, head_dim=16),)),
               "layer 3"),
    "kind": (CacheSpec("m", (kvwire.sliding_window(range(3), 99, kv_heads=4, head_dim=16),)),
             "SLIDING_WINDOW"),
    "name": (CacheSpec("m", (kvwire.auxiliary(range(3), "z", dim=4),)), "leaf z"),
}


@pytest.mark.parametrize("field", MISMATCHES)
def test_specs_that_differ_are_refused_by_field(ends, field):
    theirs, words = MISMATCHES[field]
    source, target = Held(theirs, TOKENS, 1), Held(SPEC, TOKENS, 2, writable=True)
    ticket = ends.receiver.expect(target.memory)
    transfer = ends.sender.send(ticket.id, source.memory)
    error = fail_both(ticket, transfer, kvwire.SpecMismatchError, ErrorCode.SPEC_MISMATCH)
    assert words.lower() in str(error).lower(), error
    assert target.is_poison() and set(error.layers.values()) == {"unwritten"}


@pytest.mark.parametrize("theirs", [TOKENS - 1, (1, TOKENS), (1, TOKENS + 1), 0])
def test_token_counts_that_differ_are_refused(ends, theirs):
    source, target = Held(SPEC, theirs, 1), Held(SPEC, TOKENS, 2, writable=True)
    ticket = ends.receiver.expect(target.memory)
    transfer = ends.sender.send(ticket.id, source.memory)
    fail_both(ticket, transfer, kvwire.RefusedError, ErrorCode.TOKENS_MISMATCH)


def test_pushing_the_same_bytes_twice_is_an_overlap(ends):
    source, target = caches()
    ticket = ends.receiver.expect(target.memory)
    transfer = ends.sender.open(ticket.id, source.memory)
    transfer.push(0, tokens=(0, 5))
    transfer.push(0, tokens=(4, 6))
    fail_both(ticket, transfer, kvwire.OverlapError, ErrorCode.OVERLAP)


def test_finishing_too_early_is_incomplete(ends):
    source, target = caches()
    ticket = ends.receiver.expect(target.memory)
    transfer = ends.sender.open(ticket.id, source.memory)
    transfer.push(1)
    transfer.finish()
    error = fails(ticket, kvwire.RefusedError, ErrorCode.INCOMPLETE)
    assert error.layers == {0: "unwritten", 1: "ready", 2: "unwritten"}
    assert fails(transfer, kvwire.RefusedError, ErrorCode.INCOMPLETE).remote


def test_changed_source_memory_is_found_when_it_must_be_read_again():
    flips = []

    def edit(lane, way, head, payload):
        if head[2] == 4 and not flips:
            flips.append(1)
            for raw in source.storage:
                raw[:] = 0
            return bytes([payload[0] ^ 1]) + payload[1:]
        return payload

    with kvwire.Receiver() as receiver, Proxy(receiver.address, edit=edit) as proxy:
        with kvwire.Sender(proxy.address) as sender:
            source, target = caches()
            ticket = receiver.expect(target.memory)
            transfer = sender.send(ticket.id, source.memory)
            error = fails(transfer, kvwire.UsageError, ErrorCode.SOURCE_CHANGED)
            assert error.expected != error.actual and not error.remote
            assert fails(ticket, kvwire.UsageError, ErrorCode.SOURCE_CHANGED).remote


def test_more_open_transfers_than_the_peer_allows_are_refused():
    with Ends(receiver={"transfers_max": 3}) as ends:
        pairs = [caches() for _ in range(5)]
        tickets = [ends.receiver.expect(target.memory) for _, target in pairs]
        transfers = [ends.sender.open(ticket.id, source.memory)
                     for ticket, (source, _) in zip(tickets, pairs)]
        for transfer in transfers[3:]:
            fails(transfer, kvwire.LimitError, ErrorCode.RESOURCES_EXHAUSTED)
        for transfer, ticket in list(zip(transfers, tickets))[:3]:
            transfer.push_all().finish().result(10)
            ticket.result(10)
        assert not tickets[4].done()
        source, target = pairs[4]
        ends.sender.send(tickets[4].id, source.memory).result(10)
