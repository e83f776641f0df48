"""Staging where something goes wrong: refused calls, tables that are too large, forks."""

import ctypes
import os
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from faults import eventually
from standin_device import Event
from test_staging import Cache, device, gauss, hybrid, staging

import kvwire
from kvwire.control import Item
from kvwire.errors import (
    ErrorCode, FormatError, InternalError, LimitError, TransferCancelled, UnsupportedError,
    UsageError,
)
from kvwire.kernels import code_plan, slices, staged_receiver, staged_sender
from kvwire.kernels.code_plan import Payload, ReadPlan
from kvwire.layout import CacheSpec, DType, attention, recurrent
from kvwire.limits import ITEM_COUNT_MAX
from kvwire.tiered import CodeTable, Part, encode_tiered

__all__ = ["device"]


def small_spec():
    return CacheSpec("m", (attention([0], kv_heads=2, head_dim=64, block_tokens=16),))


def fails_on(device, monkeypatch, stream, call, error):
    """Have `call` of the device raise, where it is about `stream`."""
    true = getattr(device, call)

    def failing(*args):
        if args[-1] is stream:
            raise error
        return true(*args)
    monkeypatch.setattr(device, call, failing)


@pytest.mark.parametrize("error", [InternalError("it is lost"), RuntimeError("it is lost")],
                         ids=["of the device", "any other"])
@pytest.mark.parametrize("stream, call", [("_compute", "record"), ("_copy", "to_host"),
                                          ("_copy", "record")])
def test_a_device_that_refuses_a_call_leaves_nobody_waiting_to_send(device, monkeypatch, stream,
                                                                    call, error):
    spec = small_spec()
    source, target = Cache(spec, device, 1), Cache(spec, None, 2, writable=True)
    with kvwire.Receiver() as receiver, \
            kvwire.Sender(receiver.address, codec="raw", staging=staging(device)) as sender:
        transfer = sender.open(receiver.expect(target.memory).id, source.memory)
        staged = transfer._staged
        fails_on(device, monkeypatch, getattr(staged, stream), call, error)
        push = transfer.push(0)
        assert push.wait(30)
        eventually(lambda: transfer._source.reading == 0)
        with pytest.raises(InternalError, match="it is lost"):
            transfer.result(30)
        staged._thread.join(30)
        assert staged.ring.free_count == staged.ring.count
        assert transfer._source.to_hand == transfer._source.reading == 0


@pytest.mark.parametrize("call", ["to_device", "record"])
def test_a_device_that_refuses_a_call_leaves_nobody_waiting_to_receive(device, monkeypatch, call):
    spec = small_spec()
    source, target = Cache(spec, None, 1), Cache(spec, device, 2, writable=True)
    with kvwire.Receiver(staging=staging(device)) as receiver, \
            kvwire.Sender(receiver.address, codec="raw") as sender:
        ticket = receiver.expect(target.memory)
        fails_on(device, monkeypatch, ticket._staged._stream, call, RuntimeError("it is lost"))
        sender.send(ticket.id, source.memory)
        eventually(lambda: ticket._staged._broken and ticket._target.writing == 0)
        with pytest.raises(InternalError, match="RuntimeError: it is lost"):
            ticket.result(30)


@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_a_bad_block_id_on_the_device_fails_its_own_transfer_only(device, monkeypatch, side):
    spec, true = small_spec(), device.launch
    sending, receiving = (device if side == one else None for one in ("sender", "receiver"))
    sources = [Cache(spec, sending, seed) for seed in (1, 2)]
    targets = [Cache(spec, receiving, seed, writable=True) for seed in (3, 4)]

    def launch(kernel, grid, args, stream):
        table = ctypes.c_int64.from_address(args[4])
        device.enqueue(stream, lambda: setattr(table, "value", 1 << 40))
        true(kernel, grid, args, stream)

    def all_is_back(staged):
        return staged.ring.free_count == staged.ring.count if side == "sender" else \
            staged.zone.rooms_free == staged.room_count
    with kvwire.Receiver(staging=staging(device)) as receiver, \
            kvwire.Sender(receiver.address, codec="raw", staging=staging(device)) as sender:
        tickets = [receiver.expect(target.memory) for target in targets]
        transfers = [sender.open(ticket.id, source.memory)
                     for ticket, source in zip(tickets, sources)]
        monkeypatch.setattr(device, "launch", launch)
        transfers[0].push_all().finish()
        mine, theirs = (transfers, tickets) if side == "sender" else (tickets, transfers)
        with pytest.raises(UsageError, match="entry 0 of the segment's block tables"):
            mine[0].result(30)
        with pytest.raises(TransferCancelled):
            theirs[0].result(30)
        staged = mine[0]._staged
        eventually(lambda: all_is_back(staged))
        monkeypatch.setattr(device, "launch", true)
        transfers[1].push_all().finish().result(30)
        tickets[1].result(30)
        assert not staged._broken
        eventually(lambda: all_is_back(staged))
    assert targets[1].content(spec, [0]) == sources[1].content(spec, [0])


def test_pages_are_not_written_after_a_launch_that_was_half_enqueued(device, monkeypatch):
    spec = small_spec()
    source, target = Cache(spec, None, 1), Cache(spec, device, 2, writable=True)
    for array in source.arrays.values():
        array[...] = 0x1234
    with kvwire.Receiver(staging=staging(device)) as receiver, \
            kvwire.Sender(receiver.address, codec="raw") as sender:
        staged, _ = receiver._staged_for("cuda:0")
        behind, true, refused = Event(), device.record, []
        device.wait_for(staged._stream, behind)

        def record(stream):
            if stream is staged._stream and not refused:
                refused.append(threading.Timer(0.3, behind.reached.set))
                refused[0].start()
                raise LimitError("no room for an event", code=ErrorCode.RESOURCES_EXHAUSTED)
            return true(stream)
        monkeypatch.setattr(device, "record", record)
        ticket = receiver.expect(target.memory)
        sender.send(ticket.id, source.memory)
        with pytest.raises(LimitError, match="no room for an event"):
            ticket.result(30)
        ticket.cancel()
        with device.access():  # the engine has its pages back
            for array in target.arrays.values():
                array[...] = 0x7777
        refused[0].join()
        true(staged._stream).wait()
        with device.access():
            assert all((array == 0x7777).all() for array in target.arrays.values())


def test_no_page_locked_memory_fails_its_transfer_only(device, monkeypatch):
    spec, true, refused = small_spec(), device.pinned, []

    def pinned(count):
        if not refused:
            refused.append(count)
            raise LimitError("no page-locked memory", code=ErrorCode.RESOURCES_EXHAUSTED)
        return true(count)
    with kvwire.Receiver() as receiver, \
            kvwire.Sender(receiver.address, codec="raw", staging=staging(device)) as sender:
        sender._staged_for("cuda:0")
        monkeypatch.setattr(device, "pinned", pinned)
        for fails in (True, False, False):
            source, target = Cache(spec, device, 1), Cache(spec, None, 2, writable=True)
            ticket = receiver.expect(target.memory)
            transfer = sender.send(ticket.id, source.memory)
            if fails:
                with pytest.raises(LimitError, match="no page-locked memory"):
                    transfer.result(30)
                continue
            transfer.result(30)
            assert source.content(spec, [0]) == target.content(spec, [0])


@pytest.mark.parametrize("codec", ["raw", "tiered"])
def test_a_last_slice_that_fails_is_no_end(device, monkeypatch, codec):
    """Both sides hear of the slice, not of bytes that did not come."""
    spec, true = small_spec(), staged_sender.CopyPlan.of_items
    source, target = Cache(spec, device, 1), Cache(spec, None, 2, writable=True)

    def of_items(*arguments):
        made = true(*arguments)
        made.block_ids[0] = 1 << 20
        return made
    monkeypatch.setattr(staged_sender.CopyPlan, "of_items", of_items)
    with kvwire.Receiver() as receiver, \
            kvwire.Sender(receiver.address, codec=codec,
                          staging=staging(device, slice_bytes=1 << 20)) as sender:
        ticket = receiver.expect(target.memory)
        transfer = sender.open(ticket.id, source.memory)
        staged, order = transfer._staged, []
        handed, fail = staged._handed, staged._fail
        monkeypatch.setattr(staged, "_handed", lambda *a: (order.append("handed"), handed(*a)))
        monkeypatch.setattr(staged, "_fail", lambda *a: (order.append("failed"), fail(*a)))
        transfer.push_all().finish()
        with pytest.raises(UsageError, match="block"):
            transfer.result(30)
        with pytest.raises(TransferCancelled):
            ticket.result(30)
    assert order[0] == "failed"


def test_slices_keep_to_what_a_segment_may_hold():
    spec = CacheSpec("m", (recurrent([0], heads=1, key_dim=1, value_dim=2),))
    items = [Item(0, 0, 0)] * (ITEM_COUNT_MAX + 4)
    assert [len(part) for part in slices.slices_of(spec, items, 1 << 20)] == [
        ITEM_COUNT_MAX, 4]


def test_a_ticket_id_that_is_open_stays_with_its_first_ticket(device):
    spec = small_spec()
    source = Cache(spec, None, 1)
    first, second = (Cache(spec, device, seed, writable=True) for seed in (2, 3))
    with kvwire.Receiver(staging=staging(device)) as receiver, \
            kvwire.Sender(receiver.address, codec="raw") as sender:
        ticket = receiver.expect(first.memory, ticket_id=bytes(range(16)))
        with pytest.raises(UsageError, match="bound already"):
            receiver.expect(second.memory, ticket_id=ticket.id)
        sender.send(ticket.id, source.memory)
        ticket.result(30)


def test_who_waits_for_a_ticket_to_be_bound_learns_that_it_was_not(device):
    memory = Cache(small_spec(), device, 2, writable=True).memory
    with kvwire.Receiver(staging=staging(device)) as receiver:
        staged, _ = receiver._staged_for("cuda:0")
        target, found = staged.add(bytes(16), memory, device.engine_event()), []
        waiting = threading.Thread(target=lambda: found.append(
            staged._target_of(SimpleNamespace(ticket_id=bytes(16)))), daemon=True)
        waiting.start()
        staged.bound(target, None)
        waiting.join(30)
        assert found == [None]


def test_a_ticket_that_is_being_bound_while_the_device_breaks_fails(device):
    memory, cancelled = Cache(small_spec(), device, 2, writable=True).memory, []
    with kvwire.Receiver(staging=staging(device)) as receiver:
        staged, _ = receiver._staged_for("cuda:0")
        target = staged.add(bytes(16), memory, device.engine_event())
        staged._break_down(InternalError("it is lost"))
        staged.bound(target, SimpleNamespace(cancel=lambda: cancelled.append(1),
                                             progress=lambda: (0, 0, 0, False, bool(cancelled))))
        assert cancelled and isinstance(target.error, InternalError)


def test_what_kernels_cannot_decode_is_asked_for_again_and_comes_raw(device, monkeypatch):
    def period(table):
        raise UnsupportedError("too long for a kernel")
    spec = small_spec()
    source, target = Cache(spec, None, 1), Cache(spec, device, 2, writable=True)
    for array in source.arrays.values():
        array[...] = gauss(np.random.default_rng(1), array.shape, "uint16")
    with kvwire.Receiver(staging=staging(device)) as receiver, \
            kvwire.Sender(receiver.address, codec="tiered") as sender:
        ticket = receiver.expect(target.memory)
        monkeypatch.setattr(code_plan, "_base_period", period)
        transfer = sender.send(ticket.id, source.memory)
        assert ticket.result(30).repaired_chunks > 0
        transfer.result(30)
    assert target.content(spec, [0]) == source.content(spec, [0])


def test_payloads_that_are_too_much_together_are_decoded_apart(device, monkeypatch):
    spec, true, most = small_spec(), ReadPlan.of_payloads, []

    def of_payloads(payloads, tables):
        most.append(len(payloads))
        if len(payloads) > 1:
            raise FormatError("too much", code=ErrorCode.CODED_INVALID)
        return true(payloads, tables)
    source, target = Cache(spec, None, 1), Cache(spec, device, 2, writable=True)
    gate = Event()
    device.wait_for(device.engine, gate)  # so that chunks gather behind the first
    with kvwire.Receiver(staging=staging(device)) as receiver, \
            kvwire.Sender(receiver.address, codec="raw", chunk_bytes=4096) as sender:
        ticket = receiver.expect(target.memory)
        monkeypatch.setattr(ReadPlan, "of_payloads", of_payloads)
        sender.send(ticket.id, source.memory)
        zone, count = ticket._staged.zone, ticket._staged.room_count
        eventually(lambda: zone.rooms_free == 0)
        gate.reached.set()
        assert ticket.result(60).repaired_chunks == 0
        assert max(most) > 1
        eventually(lambda: zone.rooms_free == count)
    assert target.content(spec, [0]) == source.content(spec, [0])


def test_chunks_larger_than_a_room_are_pinned_and_answered_together(device, monkeypatch):
    spec, gate, addresses, said = small_spec(), Event(), [], []
    monkeypatch.setattr(staged_receiver, "ROOM_BYTES", 4096)
    source, target = Cache(spec, None, 1), Cache(spec, device, 2, writable=True)
    left = len(source.content(spec, [0])[0])
    chunks = [min(12 << 10, left - at) for at in range(0, left, 12 << 10)]
    device.wait_for(device.engine, gate)  # so that chunks gather behind the first
    with kvwire.Receiver(staging=staging(device)) as receiver, \
            kvwire.Sender(receiver.address, codec="raw", chunk_bytes=12 << 10) as sender:
        ticket = receiver.expect(target.memory)
        staged, verdict = ticket._staged, ticket._staged._verdict

        def recorded(verdicts):
            said.append(len(verdicts))
            addresses.extend(landed.address for landed, _, _ in verdicts)
            verdict(verdicts)
        monkeypatch.setattr(staged, "_verdict", recorded)
        sender.send(ticket.id, source.memory)
        rooms = sum(-(-count // 4096) for count in chunks)
        eventually(lambda: staged.zone.rooms_free == staged.room_count - rooms)
        gate.reached.set()
        ticket.result(30)
        eventually(lambda: staged.zone.rooms_free == staged.room_count)
    first = staged._pinned.ctypes.data
    assert all(first <= at < first + staged._pinned.nbytes for at in addresses)
    assert sum(said) == len(addresses) == len(chunks) > len(said)
    assert target.content(spec, [0]) == source.content(spec, [0])


def table_of_period(period, first=0):
    return CodeTable(DType.BF16, (2, 2), tuple(range(6)), (period,), row_axes=1,
                     row_bases=bytes([first]) + bytes(period - 1))


def test_tables_of_a_payload_take_no_more_than_they_may(monkeypatch):
    raw = gauss(np.random.default_rng(1), 1000, "uint16").tobytes()

    def plan_of(count):
        coded = encode_tiered(raw * count, [Part(len(raw), table_of_period(5000, number))
                                            for number in range(count)])
        return ReadPlan.of_payloads([Payload(coded, 0, 0, count * len(raw))])
    monkeypatch.setattr(code_plan, "READ_BLOB_BYTES_MAX", 30_000)
    assert len(plan_of(3).blob) <= 30_000
    with pytest.raises(FormatError, match="too many for a kernel") as caught:
        plan_of(4)
    assert caught.value.code == ErrorCode.CODED_INVALID


def test_unrolled_bases_are_kept_up_to_a_number_of_bytes(monkeypatch):
    monkeypatch.setattr(code_plan, "KEPT_BYTES_MAX", 400_000)
    kept, blob = code_plan._Kept(), code_plan._Blob()
    monkeypatch.setattr(code_plan, "_kept", kept)
    tables = [CodeTable(DType.BF16, (2, 2), tuple(range(6)), (7, 10_007 + n), 1, 2, bytes(range(7)),
                        bytes(n % 251 for n in range(10_007 + n))) for n in range(8)]
    for table in tables:
        _, at, period = blob.of(table)
        assert period == table.period
        assert blob.data[at:at + period + 4096] == table.bases(0, period + 4096).astype(
            np.uint8).tobytes()
        assert 0 < kept.bytes <= 400_000
    assert kept.look_up(tables[-1], 1) is kept.look_up(tables[-1], 1)


def test_a_push_asks_each_transfer_once_and_keeps_priorities(device, monkeypatch):
    spec = hybrid()
    source, target = Cache(spec, device, 1), Cache(spec, None, 2, writable=True)
    with kvwire.Receiver(patience_s=60) as receiver, \
            kvwire.Sender(receiver.address, codec="raw", staging=staging(device)) as sender:
        transfer = sender.open(bytes(16), source.memory)  # no ticket: no grant
        staged, asked = transfer._staged, []
        first = [transfer.push(layer, priority=layer) for layer in (1, 3, 5)]
        with staged.changed:
            order = [-entry[0] for entry in transfer._source.waiting]
            assert len(order) > 3 and order == sorted(order, reverse=True)
            true = transfer._source.granted
            monkeypatch.setattr(transfer._source, "granted", lambda: asked.append(1) or true())
            assert staged._first_granted() is None and len(asked) == 1
            assert len(transfer._source.waiting) == len(order)
        transfer.cancel()
        assert all(push.wait(30) for push in first)
        again = receiver.expect(target.memory)
        sender.send(again.id, source.memory)
        again.result(30)
    assert target.content(spec) == source.content(spec)


def test_a_forked_child_closes_nothing_and_does_not_hang(device):
    spec, locked, child_ended = small_spec(), threading.Event(), threading.Event()
    source, target = Cache(spec, device, 1), Cache(spec, device, 2, writable=True)
    with kvwire.Receiver(staging=staging(device)) as receiver, \
            kvwire.Sender(receiver.address, staging=staging(device)) as sender:
        ticket = receiver.expect(target.memory)
        transfer = sender.open(ticket.id, source.memory)

        def hold():
            with ticket._staged.changed, transfer._staged.changed, receiver._staged_lock, \
                    sender._staged_lock:
                locked.set()
                child_ended.wait(100)
        holder = threading.Thread(target=hold)
        holder.start()
        assert locked.wait(30)
        if (child := os.fork()) == 0:
            signal.alarm(30)
            for closed in (sender, receiver, ticket._staged, transfer._staged):
                closed.close()
            os._exit(7)
        try:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        finally:
            child_ended.set()
            holder.join(30)
        transfer.push_all().finish().result(30)
        ticket.result(30)
    assert target.content(spec, [0]) == source.content(spec, [0])
