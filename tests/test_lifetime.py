"""Who keeps what alive, for how long: arrays, handles, endpoints, threads, processes."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import kvwire
from faults import Held, Proxy, eventually, fails, same_content

SPEC = kvwire.CacheSpec("m", (kvwire.attention(range(2), kv_heads=2, head_dim=8, dtype="fp16"),))
TOKENS = 6
PREAMBLE = """
import gc, os, signal, sys, threading, time
import numpy as np
import kvwire
def memory(array, writable=False):
    return kvwire.tensor_memory({"a": array}, writable=writable)
"""


def run_python(script, timeout_s=30, **options):
    """Run a script that has PREAMBLE; returns the finished process."""
    environment = {**os.environ, "MALLOC_PERTURB_": "170"}  # freed memory is garbage at once
    return subprocess.run([sys.executable, "-c", PREAMBLE + textwrap.dedent(script)], text=True,
                          capture_output=True, timeout=timeout_s, env=environment, **options)


def prints(script, *lines, timeout_s=30):
    done = run_python(script, timeout_s)
    assert (done.returncode, done.stdout.split("\n")[:-1]) == (0, list(lines)), done.stderr


class Watched(np.ndarray):
    """An array that tells when, and on which thread, it dies."""


def watched(log, count=64, fill=0):
    array = np.full(count, fill, np.float32).view(Watched)
    weakref.finalize(array, lambda: log.append(threading.get_native_id()))
    return array


def collected(log, count):
    def look():
        gc.collect()
        return len(log) >= count
    return eventually(look, 5)


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def threads():
    return len(os.listdir("/proc/self/task"))


def test_arrays_live_while_in_flight_and_die_on_a_python_thread():
    log = []
    with kvwire.Receiver() as receiver, Proxy(receiver.address, bytes_per_s=400_000) as proxy:
        with kvwire.Sender(proxy.address) as sender:
            source = watched(log, 40_000, 7)
            target = watched(log, 40_000)
            ticket = kvwire.receive(receiver, {"a": target})
            transfer = sender.send(ticket.id, kvwire.tensor_memory({"a": source}))
            del source, target
            gc.collect()
            assert eventually(lambda: transfer.progress().wire_bytes)
            assert log == []
            transfer.result(20)
            ticket.result(20)
            del transfer, ticket
            assert collected(log, 2), "kept after the end, though nobody holds a handle"
    assert set(log) <= {threading.get_native_id()}


def test_arrays_of_dropped_handles_are_kept_until_the_end():
    log = []
    with kvwire.Receiver() as receiver, Proxy(receiver.address, bytes_per_s=400_000) as proxy:
        with kvwire.Sender(proxy.address) as sender:
            source, target = watched(log, 20_000, 7), watched(log, 20_000)
            ticket = kvwire.receive(receiver, {"a": target})
            sender.send(ticket.id, kvwire.tensor_memory({"a": source}))
            del source
            gc.collect()
            ticket.result(20)
            assert (np.asarray(target) == 7).all() and log == []


def test_a_push_returns_its_memory_exactly_when_it_completes():
    with kvwire.Receiver() as receiver, kvwire.Sender(receiver.address) as sender:
        source, target = Held(SPEC, TOKENS, 1), Held(SPEC, TOKENS, 2, writable=True)
        transfer = sender.open(b"x" * 16, source.memory)
        pushes = [transfer.push(0), transfer.push(1)]
        time.sleep(0.1)
        assert not any(push.done() for push in pushes)
        ticket = receiver.expect(target.memory, ticket_id=b"x" * 16)
        assert all(push.wait(10) for push in pushes)
        assert not transfer.done() and ticket.layers_ready() == {0, 1}
        transfer.finish().result(10)


def test_endpoints_without_close_are_collected():
    before = threads(), descriptors()
    log = []

    def use():
        receiver = kvwire.Receiver()
        sender = kvwire.Sender(receiver.address)
        target = watched(log)
        ticket = kvwire.receive(receiver, {"a": target})
        sender.send(ticket.id, kvwire.tensor_memory({"a": np.ones(64, np.float32)})).result(10)
        ticket.result(10)

    use()
    assert collected(log, 1)
    assert eventually(lambda: threads() <= before[0]), "an I/O thread outlives its endpoint"
    assert eventually(lambda: descriptors() <= before[1])


def test_open_transfers_do_not_keep_endpoints_for_ever():
    before = threads()
    log = []

    def use():
        receiver = kvwire.Receiver()
        kvwire.receive(receiver, {"a": watched(log)})  # nobody will ever send
    use()
    assert collected(log, 1)
    assert eventually(lambda: threads() <= before)


def test_close_returns_everything():
    receiver = kvwire.Receiver()
    sender = kvwire.Sender(receiver.address)
    source, target = Held(SPEC, TOKENS, 1), Held(SPEC, TOKENS, 2, writable=True)
    ticket = receiver.expect(target.memory)
    transfer = sender.open(ticket.id, source.memory)
    push = transfer.push(0)
    assert eventually(lambda: ticket.progress().granted)
    sender.close()
    sender.close()
    assert push.done() and transfer.exception().code == kvwire.ErrorCode.CLOSED
    fails(ticket, kvwire.TransferError, kvwire.ErrorCode.CLOSED)
    receiver.close()
    for call in (sender.stats, lambda: sender.open(ticket.id, source.memory), receiver.stats,
                 lambda: transfer.push(1), lambda: receiver.expect(target.memory)):
        with pytest.raises(kvwire.UsageError, match="closed"):
            call()


def test_a_thousand_transfers_leave_nothing_behind():
    with kvwire.Receiver() as receiver, kvwire.Sender(receiver.address) as sender:
        def one(seed):
            source, target = Held(SPEC, TOKENS, seed), Held(SPEC, TOKENS, 2, writable=True)
            ticket = receiver.expect(target.memory)
            transfer = sender.send(ticket.id, source.memory)
            transfer.result(20)
            ticket.result(20)
            assert same_content(source, target)

        for seed in range(100):
            one(seed)
        gc.collect()
        before = descriptors(), threads(), resident_bytes()
        for seed in range(900):
            one(seed)
        gc.collect()
        # A joined thread may be listed for a moment more.
        assert eventually(lambda: (descriptors(), threads()) == before[:2])
        assert resident_bytes() - before[2] < 16 << 20
        assert sender.stats()["open_transfers"] == receiver.stats()["open_transfers"] == 0


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_many_transfers_at_once_from_many_threads():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with kvwire.Receiver() as receiver, kvwire.Sender(receiver.address) as sender:
            def one(seed):
                source, target = Held(SPEC, TOKENS, seed), Held(SPEC, TOKENS, 2, writable=True)
                ticket = receiver.expect(target.memory)
                transfer = sender.send(ticket.id, source.memory)
                transfer.result(60)
                ticket.result(60)
                return same_content(source, target)

            with ThreadPoolExecutor(32) as pool:
                assert all(pool.map(one, range(400)))
    finally:
        sys.setswitchinterval(interval)


def test_two_hundred_open_at_once():
    with kvwire.Receiver() as receiver, kvwire.Sender(receiver.address) as sender:
        pairs = [(Held(SPEC, TOKENS, n), Held(SPEC, TOKENS, 0, writable=True)) for n in range(200)]
        tickets = [receiver.expect(target.memory) for _, target in pairs]
        transfers = [sender.open(ticket.id, source.memory)
                     for ticket, (source, _) in zip(tickets, pairs)]
        pushes = [transfer.push(layer) for layer in (1, 0) for transfer in transfers]
        for transfer in reversed(transfers):
            transfer.finish()
        for ticket, transfer, (source, target) in zip(tickets, transfers, pairs):
            ticket.result(30)
            transfer.result(30)
            assert same_content(source, target)
        assert all(push.done() for push in pushes)


def test_relinking_a_hundred_times_leaves_nothing_behind():
    with kvwire.Receiver() as receiver:
        for number in range(101):
            with kvwire.Sender(receiver.address) as sender:
                sender.connect(10)
            if number == 0:
                assert eventually(lambda: receiver.stats()["connections"] == 0)
                before = descriptors(), threads()
        assert eventually(lambda: receiver.stats()["connections"] == 0)
        assert eventually(lambda: (descriptors(), threads()) == before)


def test_a_done_rank_may_leave_before_its_ticket_ends():
    prints("""
        tensors = lambda: memory(np.zeros(64, np.float32), True)
        receiver = kvwire.Receiver()
        ticket = receiver.expect(tensors(), source_ranks=2)
        with kvwire.Sender(receiver.address) as sender:
            sender.send(ticket.id, memory(np.ones(64, np.float32)), source_rank=(0, 2)).result(5)
        while receiver.stats()["links"]:
            time.sleep(0.01)
        ticket.cancel()
        print(type(ticket.exception()).__name__)
    """, "TransferCancelled")


def test_a_ticket_id_is_bound_once():
    prints("""
        receiver = kvwire.Receiver()
        first = receiver.expect(memory(np.zeros(4), True), ticket_id=b"t" * 16)
        try:
            receiver.expect(memory(np.zeros(4), True), ticket_id=b"t" * 16)
        except kvwire.UsageError as error:
            print("refused")
        print(first.done(), receiver.stats()["links"])
    """, "refused", "False 0")


@pytest.mark.timeout(20)
def test_handles_may_be_collected_inside_any_call():
    """An error's traceback makes a cycle of them; a collection frees it wherever it happens."""
    class Collecting(dict):
        def items(self):
            gc.collect()
            return super().items()

    began = time.monotonic()
    with kvwire.Receiver() as receiver:
        receiver._lent = Collecting(receiver._lent)
        gc.disable()
        try:
            ended = kvwire.receive(receiver, {"x": np.zeros(10, np.uint8)})
            ended.cancel()
            ended.cycle, gone = ended, weakref.ref(ended)
            del ended
            kvwire.receive(receiver, {"x": np.zeros(10, np.uint8)}).cancel()
            assert gone() is None
        finally:
            gc.enable()
    assert time.monotonic() - began < 10, "a timeout inside __del__ is not raised"


def test_the_interpreter_ends_with_transfers_open():
    prints("""
        receiver = kvwire.Receiver()
        sender = kvwire.Sender(receiver.address)
        source, target = np.ones(1 << 23, np.float32), np.zeros(1 << 23, np.float32)
        ticket = receiver.expect(memory(target, True))
        transfer = sender.send(ticket.id, memory(source))
        idle = receiver.expect(memory(np.zeros(4), True))
        while not transfer.progress().wire_bytes:
            pass
        print("open")
    """, "open")


def test_the_interpreter_ends_with_daemon_threads_waiting():
    prints("""
        receiver = kvwire.Receiver()
        ticket = receiver.expect(memory(np.zeros(4), True))
        def wait():
            try:
                ticket.result()
            except kvwire.KvwireError:
                pass
        for _ in range(8):
            threading.Thread(target=wait, daemon=True).start()
        time.sleep(0.2)
        print("waiting")
    """, "waiting")


def test_fork_is_detected_in_the_child_and_harmless_to_the_parent():
    prints("""
        receiver = kvwire.Receiver()
        sender = kvwire.Sender(receiver.address)
        source, target = np.ones(4), np.zeros(4)
        ticket = receiver.expect(memory(target, True))
        transfer = sender.open(ticket.id, memory(source))
        layer = 0xFFFFFFFF
        child = os.fork()
        if child == 0:
            calls = (lambda: receiver.expect(memory(target, True)), lambda: transfer.push(layer),
                     transfer.finish, ticket.result, ticket.cancel, transfer.cancel, sender.stats,
                     lambda: ticket.wait_layer(layer), sender.connect,
                     lambda: sender.send(ticket.id, memory(source)))
            for call in calls:
                try:
                    call()
                except kvwire.ForkedError:
                    continue
                os._exit(9)
            receiver.close()
            del sender, ticket, transfer
            gc.collect()
            sys.exit(0)
        print(os.waitpid(child, 0)[1])
        transfer.push_all().finish().result(5)
        ticket.result(5)
        print(target.sum())
    """, "0", "4.0")


def test_a_forked_child_may_use_endpoints_of_its_own():
    prints("""
        receiver = kvwire.Receiver()
        child = os.fork()
        target = np.zeros(4)
        if child == 0:
            with kvwire.Receiver() as mine, kvwire.Sender(mine.address) as sender:
                ticket = mine.expect(memory(target, True))
                sender.send(ticket.id, memory(np.ones(4))).result(5)
                sys.exit(int(target.sum()))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """, "4")


def test_a_receiver_without_descriptors_waits_for_some():
    prints("""
        import resource, socket, subprocess
        receiver = kvwire.Receiver()
        flood = subprocess.Popen([sys.executable, "-c", (
            "import socket, sys; sys.stdin.readline();"
            "many = [socket.create_connection(('127.0.0.1', int(sys.argv[1]))) for _ in range(40)];"
            "print('up', flush=True); sys.stdin.read()"), receiver.address.split(":")[1]],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        few = len(os.listdir("/proc/self/fd")) + 12
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
        flood.stdin.write("go\\n")
        flood.stdin.flush()
        flood.stdout.readline()
        busy = time.process_time()
        time.sleep(0.5)
        print("idle", time.process_time() - busy < 0.3, receiver.stats()["connections"] < 40)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        flood.communicate()
        target = np.zeros(4)
        ticket = receiver.expect(memory(target, True))
        with kvwire.Sender(receiver.address) as sender:
            sender.send(ticket.id, memory(np.ones(4))).result(10)
        print(target.sum())
    """, "idle True True", "4.0")


@pytest.mark.parametrize("wait", [
    "ticket.result()", "ticket.result(20)", "ticket.wait_layer(0xFFFFFFFF)", "push.wait()",
    "transfer.result()", "ticket.result(on_progress=lambda progress: None)",
])
def test_an_interrupt_ends_a_wait_at_once(wait):
    prints(f"""
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & has it ignored
        receiver = kvwire.Receiver()
        sender = kvwire.Sender(receiver.address)
        ticket = receiver.expect(memory(np.zeros(4), True))
        transfer = sender.open(b"n" * 16, memory(np.zeros(4)))
        push = transfer.push(0xFFFFFFFF)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        try:
            {wait}
        except KeyboardInterrupt:
            print("interrupted", time.monotonic() - start < 10)
    """, "interrupted True", timeout_s=40)


@pytest.mark.parametrize("timeout_s", [9e9, 1e12, float("inf")])
def test_very_long_timeouts_are_long(timeout_s):
    with kvwire.Receiver() as receiver:
        ticket = kvwire.receive(receiver, {"a": np.zeros(4)}, deadline_s=timeout_s)
        threading.Timer(0.3, ticket.cancel).start()
        with pytest.raises(kvwire.TransferCancelled):
            ticket.result(timeout_s)


@pytest.mark.parametrize("deadline_s", [-1, float("nan")])
def test_deadlines_are_not_negative(deadline_s):
    with kvwire.Receiver() as receiver, kvwire.Sender(receiver.address) as sender:
        with pytest.raises(kvwire.UsageError):
            kvwire.receive(receiver, {"a": np.zeros(4)}, deadline_s=deadline_s)
        with pytest.raises(kvwire.UsageError):
            sender.open(b"x" * 16, kvwire.tensor_memory({"a": np.zeros(4)}),
                        deadline_s=deadline_s)


PEERS = {
    "sender": """
        source = np.ones(1 << 24, np.uint8)
        sender = kvwire.Sender(sys.argv[1])
        transfer = sender.send(sys.argv[2], memory(source))
        transfer.result()
    """,
    "receiver": """
        receiver = kvwire.Receiver()
        ticket = receiver.expect(memory(np.zeros(1 << 24, np.uint8), True), ticket_id=b"t" * 16)
        print(receiver.address, flush=True)
        ticket.result()
    """,
}


def spawned(role, *arguments):
    return subprocess.Popen([sys.executable, "-c", PREAMBLE + textwrap.dedent(PEERS[role]),
                             *arguments], stdout=subprocess.PIPE, text=True)


def test_a_killed_sender_is_noticed_when_its_lease_is_over():
    with kvwire.Receiver(lease_s=0.5) as receiver, \
            Proxy(receiver.address, bytes_per_s=2_000_000) as proxy:
        target = np.zeros(1 << 24, np.uint8)
        ticket = kvwire.receive(receiver, {"a": target})
        process = spawned("sender", proxy.address, ticket.id)
        assert eventually(lambda: ticket.progress().wire_bytes, 20)
        process.send_signal(signal.SIGKILL)
        process.wait()
        start = time.monotonic()
        with pytest.raises(kvwire.TransferError) as caught:
            ticket.result(30)
        assert time.monotonic() - start < 10
        assert caught.value.layers == ticket.report() == {0xFFFFFFFF: "partly written"}


def test_a_killed_receiver_is_noticed_when_its_lease_is_over():
    process = spawned("receiver")
    address = process.stdout.readline().strip()
    with Proxy(address, bytes_per_s=2_000_000) as proxy, \
            kvwire.Sender(proxy.address, lease_s=0.5) as sender:
        source = np.ones(1 << 24, np.uint8)
        transfer = sender.send(b"t" * 16, kvwire.tensor_memory({"a": source}))
        assert eventually(lambda: transfer.progress().wire_bytes, 20)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        start = time.monotonic()
        with pytest.raises(kvwire.PeerClosedError):
            transfer.result(30)
        assert time.monotonic() - start < 10
        assert all(transfer._native.pushes_returned())
