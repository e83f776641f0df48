"""The same objects under asyncio: one descriptor, no thread per wait."""

import asyncio
import statistics
import threading
import time

import numpy as np
import pytest

import kvwire
from faults import Held, same_content

SPEC = kvwire.CacheSpec("m", (kvwire.attention(range(3), kv_heads=2, head_dim=8, dtype="fp16"),))
TOKENS = 6
PATIENCE_S = 10


@pytest.fixture
def ends():
    with kvwire.Receiver() as receiver, kvwire.Sender(receiver.address) as sender:
        yield sender, receiver


def caches(seed=1):
    return Held(SPEC, TOKENS, seed), Held(SPEC, TOKENS, 2, writable=True)


def run(main):
    return asyncio.run(asyncio.wait_for(main, PATIENCE_S))


def test_transfer_ticket_layers_and_pushes_are_awaitable(ends):
    sender, receiver = ends

    async def main():
        source, target = caches()
        ticket = receiver.expect(target.memory)
        transfer = sender.open(ticket.id, source.memory)
        for layer in (2, 0, 1):
            waiting = asyncio.ensure_future(ticket.layer(layer))
            await asyncio.sleep(0.01)
            assert not waiting.done()
            await transfer.push(layer)
            await waiting
            assert layer in ticket.layers_ready()
        transfer.finish({"first": 5})
        sent, got = await asyncio.gather(transfer, ticket)
        assert sent.verified_bytes == got.verified_bytes == SPEC.bytes(TOKENS)
        assert ticket.metadata == {"first": 5} and same_content(source, target)
        await transfer, await ticket, await ticket.layer(1)  # once more, after the end

    run(main())


def test_many_waits_need_no_threads(ends):
    sender, receiver = ends

    async def one(seed):
        source, target = caches(seed)
        ticket = receiver.expect(target.memory)
        transfer = sender.open(ticket.id, source.memory)
        waits = [asyncio.ensure_future(ticket.layer(layer)) for layer in range(3)]
        waits += [asyncio.ensure_future(wait_for(ticket)) for _ in range(3)]
        await asyncio.sleep(0)
        transfer.push_all().finish()
        await asyncio.gather(*waits, wait_for(transfer))
        return same_content(source, target)

    async def main():
        before = threading.active_count()
        results = asyncio.gather(*(one(seed) for seed in range(150)))
        await asyncio.sleep(0.01)
        assert threading.active_count() == before
        assert all(await results)

    run(main())


async def wait_for(handle):
    return await handle


@pytest.mark.parametrize("side", ["ticket", "transfer"])
def test_errors_are_raised_where_they_are_awaited(ends, side):
    sender, receiver = ends

    async def main():
        source, target = caches()
        ticket = receiver.expect(target.memory)
        transfer = sender.open(ticket.id, source.memory)
        push = transfer.push(0)
        await push
        waits = [asyncio.ensure_future(wait) for wait in (
            wait_for(ticket), wait_for(transfer), ticket.layer(2), wait_for(transfer.push(1)))]
        await asyncio.sleep(0.05)
        {"ticket": ticket, "transfer": transfer}[side].cancel()
        results = await asyncio.gather(*waits, return_exceptions=True)
        assert [type(result) for result in results] == [
            kvwire.TransferCancelled] * 3 + [type(None)]
        assert results[0].remote == (side == "transfer") != results[1].remote
        await ticket.layer(0)  # what was ready stays ready

    run(main())


def test_a_cancelled_task_leaves_the_transfer_alone(ends):
    sender, receiver = ends

    async def main():
        source, target = caches()
        ticket = receiver.expect(target.memory)
        transfer = sender.open(ticket.id, source.memory)
        for wait in (wait_for(ticket), wait_for(transfer), ticket.layer(1)):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(wait, 0.02)
        waits = [asyncio.ensure_future(wait_for(ticket)) for _ in range(3)]
        await asyncio.sleep(0.01)
        waits[1].cancel()
        transfer.push_all().finish()
        results = await asyncio.gather(*waits, return_exceptions=True)
        assert [isinstance(result, asyncio.CancelledError) for result in results] == [
            False, True, False]
        assert same_content(source, target)

    run(main())


def test_loops_may_follow_one_another(ends):
    sender, receiver = ends

    async def main():
        source, target = caches()
        ticket = receiver.expect(target.memory)
        transfer = sender.send(ticket.id, source.memory)
        await asyncio.gather(ticket, transfer)
        return same_content(source, target)

    assert all(run(main()) for _ in range(3))


def test_a_loop_that_was_left_waiting_does_not_disturb_the_next(ends):
    sender, receiver = ends
    source, target = caches()
    ticket = receiver.expect(target.memory)

    async def give_up():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(ticket, 0.05)

    run(give_up())
    loop = asyncio.new_event_loop()
    abandoned = loop.create_task(wait_for(ticket))
    loop.run_until_complete(asyncio.sleep(0.01))

    async def main():
        transfer = sender.send(ticket.id, source.memory)
        await asyncio.gather(ticket, transfer)

    run(main())
    abandoned.cancel()
    loop.run_until_complete(asyncio.gather(abandoned, return_exceptions=True))
    loop.close()
    assert same_content(source, target)


def test_two_loops_at_once_work_or_are_refused(ends):
    sender, receiver = ends
    pairs = [caches(seed) for seed in range(2)]
    tickets = [receiver.expect(target.memory) for _, target in pairs]
    outcomes = {}

    def wait(number):
        try:
            outcomes[number] = run(wait_for(tickets[number]))
        except Exception as error:  # noqa: BLE001 - the kind is what is tested
            outcomes[number] = error

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.2)
    for ticket, (source, _) in zip(tickets, pairs):
        sender.send(ticket.id, source.memory).result(10)
    start = time.monotonic()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
    assert time.monotonic() - start < PATIENCE_S / 2, "nobody woke the other loop"
    for outcome in outcomes.values():
        assert isinstance(outcome, (kvwire.Progress, kvwire.UsageError)), repr(outcome)
    assert len(outcomes) == 2
    assert any(isinstance(outcome, kvwire.Progress) for outcome in outcomes.values())


@pytest.mark.parametrize("from_thread", [False, True])
def test_close_wakes_everybody(from_thread):
    async def main():
        receiver = kvwire.Receiver()
        _, target = caches()
        ticket = receiver.expect(target.memory)
        waits = [asyncio.ensure_future(wait) for wait in (
            wait_for(ticket), ticket.layer(1), wait_for(ticket))]
        await asyncio.sleep(0.05)
        if from_thread:
            await asyncio.to_thread(receiver.close)
        else:
            receiver.close()
        results = await asyncio.gather(*waits, return_exceptions=True)
        assert [result.code for result in results] == [kvwire.ErrorCode.CLOSED] * 3

    run(main())


def test_what_has_ended_can_be_awaited_after_close():
    async def main():
        async with kvwire.Receiver() as receiver:
            async with kvwire.Sender(receiver.address) as sender:
                source, target = caches()
                ticket = receiver.expect(target.memory)
                transfer = sender.send(ticket.id, source.memory)
                await asyncio.gather(ticket, transfer)
        assert (await ticket).ended and (await transfer).ended
        await ticket.layer(0)

    run(main())


def test_unknown_layers_are_refused_at_once(ends):
    _, receiver = ends

    async def main():
        ticket = receiver.expect(caches()[1].memory)
        with pytest.raises(kvwire.UsageError, match="layer 9"):
            await ticket.layer(9)

    run(main())


def test_the_loop_stays_responsive_while_much_arrives(ends):
    sender, receiver = ends
    source, target = (np.full(1 << 26, value, np.uint8) for value in (7, 0))

    async def main():
        ticket = kvwire.receive(receiver, {"a": target})
        transfer = sender.send(ticket.id, kvwire.tensor_memory({"a": source}))
        pauses, done = [], asyncio.gather(ticket, transfer)
        while not done.done():
            start = time.monotonic()
            await asyncio.sleep(0.001)
            pauses.append(time.monotonic() - start)
        await done
        assert statistics.median(pauses) < 0.1  # single ones may be the machine's

    run(main())
    assert (target == 7).all()


def test_closing_from_many_threads_wakes_everybody_who_waits():
    async def main():
        for _ in range(60):
            receiver = kvwire.Receiver()
            ticket = kvwire.receive(receiver, {"x": np.zeros(10, np.uint8)})
            waiting = asyncio.ensure_future(failing(ticket))
            closing = [asyncio.to_thread(receiver.close) for _ in range(3)]
            late = asyncio.ensure_future(failing(ticket))
            await asyncio.gather(*closing)
            assert ticket.done()
            assert await waiting == await late == kvwire.ErrorCode.CLOSED

    async def failing(ticket):
        try:
            await ticket
        except kvwire.KvwireError as error:
            return error.code

    run(main())
