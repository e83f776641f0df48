"""Shared by the tests of the prefix-cache pool: a slow pool, a tiny hybrid model, traces."""

import hashlib
import random

import numpy as np

import kvwire
from kvwire.prfaas.pool.hashes import CacheKey

BLOCK_TOKENS = 16
SPEC = kvwire.CacheSpec("tiny", (
    kvwire.attention([1, 4], kv_heads=2, head_dim=8, dtype="bf16", order="HND"),
    kvwire.recurrent([0, 3], heads=2, key_dim=4, value_dim=8),
    kvwire.convolution([0, 3], {"q": 8, "k": 8}, columns=3),
    kvwire.sliding_window([2], 24, kv_heads=1, head_dim=8, dtype="bf16"),
))
KEY = CacheKey("tenant", "tiny", SPEC.fingerprint(), b"tokenizer")
TENANT = KEY.digest()


def names(path):
    """Hashes of a path of small numbers: equal for equal prefixes."""
    return [hashlib.sha256(bytes(path[:end])).digest()[:16] for end in range(1, len(path) + 1)]


class SlowPool:
    """What `PrefixPool` with `Lru` must do, by search instead of indices. Prefixes are tuples."""

    def __init__(self, capacity, state_blocks):
        self.capacity, self.state_blocks = capacity, state_blocks
        self.now = self.held = 0  # held: blocks of reservations and transfers
        self.blocks, self.states = {}, {}          # prefix -> stamp of the last use
        self.block_leases, self.state_leases = [], []

    def free(self):
        return (self.capacity - self.held - len(self.blocks)
                - self.state_blocks * len(self.states))

    def use(self, table, prefix):
        self.now += 1
        table[prefix] = self.now

    def deepest(self, path):
        return max((end for end in range(len(path) + 1) if path[:end] in self.blocks), default=0)

    def usable(self, path):
        held = self.deepest(path)
        if not self.state_blocks:
            return held
        return max((end for end in range(held + 1) if path[:end] in self.states), default=0)

    def is_end(self, prefix):
        return prefix not in self.states and not any(
            other[:len(prefix)] == prefix and other != prefix for other in self.blocks)

    def evict_one(self):
        ends = [(stamp, prefix, self.states) for prefix, stamp in self.states.items()
                if prefix not in self.state_leases]
        ends += [(stamp, prefix, self.blocks) for prefix, stamp in self.blocks.items()
                 if prefix not in self.block_leases and self.is_end(prefix)]
        if not ends:
            return False
        stamp, prefix, table = min(ends, key=lambda end: end[0])
        del table[prefix]
        if table is self.blocks and len(prefix) > 1:
            parent = prefix[:-1]
            self.blocks[parent] = max(self.blocks[parent], stamp)
        return True

    def make_room(self, count):
        if count > self.capacity:
            return False
        while self.free() < count:
            if not self.evict_one():
                return False
        return True

    def reserve(self, path, checkpoints):
        start = self.deepest(path)
        missing = [end for end in checkpoints if path[:end] not in self.states]
        count = len(path) - start + self.state_blocks * len(missing)
        self.block_leases.append(path[:start])
        if not self.make_room(count):
            self.block_leases.remove(path[:start])
            return None
        self.held += count
        return path, start, missing, count

    def abort(self, reservation):
        path, start, _, count = reservation
        self.block_leases.remove(path[:start])
        self.held -= count

    def commit(self, reservation):
        path, start, missing, _ = reservation
        self.abort(reservation)
        for end in range(start + 1, len(path) + 1):
            self.blocks.setdefault(path[:end], 0)
        new = [end for end in missing if path[:end] not in self.states]
        for end in new:
            self.states[path[:end]] = 0
        leased = self.lease(path)
        for end in new:
            if path[:end] != leased:
                self.use(self.states, path[:end])
        if path and path != leased:
            self.use(self.blocks, path)
        return leased

    def lease(self, path):
        prefix = path[:self.usable(path)]
        self.block_leases.append(prefix)
        self.state_leases.append(prefix)
        if prefix:
            self.use(self.blocks, prefix)
            if self.state_blocks:
                self.use(self.states, prefix)
        return prefix

    def release(self, prefix):
        self.block_leases.remove(prefix)
        self.state_leases.remove(prefix)


def audit(pool):
    """Count again what a pool holds; every slot must have one owner."""
    blocks = list(pool._index.values())
    slots = [block.slot for block in blocks]
    for block in blocks:
        assert block.parent is None or pool._index[block.parent.hash] is block.parent
        assert block.children == sum(other.parent is block for other in blocks)
        slots += block.state.slots if block.state else ()
    said = pool.stats()
    assert len(set(slots)) == len(slots) and not set(slots) & set(pool._slots)
    assert said.free_blocks + len(slots) + said.reserved_blocks + said.transfer_blocks == (
        said.capacity_blocks)
    assert len(set(pool._slots)) == len(pool._slots)
    assert pool._slots_used - len(pool._slots) == said.capacity_blocks - said.free_blocks


def expected_bytes(name, count):
    """The bytes that the tensor of a block or checkpoint called `name` must have."""
    seed = int.from_bytes(hashlib.sha256(name).digest()[:8], "little")
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8)


def slot_bytes(tier, slot):
    """The bytes of a slot, writable."""
    size = tier.geometry.block_bytes
    return np.frombuffer(tier._memory, np.uint8)[slot * size:(slot + 1) * size]


def pages(store, hashes, slots):
    """(what the page of KV at a slot must be, what it is) for every tensor of every block."""
    for name, slot in zip(hashes, slots):
        for (group, layer, tensor), array in store.tier._arrays.items():
            page = array[slot]
            wanted = expected_bytes(name + f"{layer}{tensor}".encode(), page.nbytes)
            yield wanted.view(page.dtype).reshape(page.shape), page


def state_tensors(store, name, slots, tokens):
    """(what a checkpoint's tensor must be, what it is), of windows the newest tokens."""
    for key in store.tier._states:
        tensor = store.tier._state_array(key, slots)
        wanted = expected_bytes(name + f"{key[1]}{key[2]}".encode(), tensor.nbytes)
        wanted = wanted.view(tensor.dtype).reshape(tensor.shape)
        window = store.tier.spec.groups[key[0]].window_tokens
        held = min(tokens, window) if window else tensor.shape[0]
        yield wanted[:held], tensor[:held]


def put(store, hashes, tenant_key=TENANT, checkpoints=None):
    """Write what `store` lacks of a prefix, each block and state made from its name."""
    with store.write(hashes, tenant_key, checkpoints) as new:
        reservation = new.reservation
        for wanted, page in pages(store, hashes[reservation.start:], reservation.slots):
            page[...] = wanted
        for depth, slots in reservation.checkpoints.items():
            for wanted, tensor in state_tensors(store, hashes[depth - 1], slots,
                                                depth * store.tier.geometry.block_tokens):
                tensor[...] = wanted
        return new.commit()


def check_lease(store, hashes, lease):
    """Every byte under a lease is that of the prefix."""
    found = lease.chain()
    assert [block.hash for block in found] == hashes[:lease.blocks]
    for wanted, page in pages(store, hashes, [block.slot for block in found]):
        assert (wanted == page).all()
    if lease.state_slots:
        for wanted, tensor in state_tensors(store, hashes[lease.blocks - 1], lease.state_slots,
                                            lease.tokens):
            assert (wanted == tensor).all()


def conversations(seed, requests, *, systems=4, opening_blocks=12, turn_blocks=4):
    """Yield the block hashes of prompts as people make them: a few shared beginnings, texts of
    very different lengths, most asked about once, the others in interleaved turns, each of which
    repeats all before it."""
    rng = random.Random(seed)
    beginnings = [[rng.randbytes(16) for _ in range(3)] for _ in range(systems)]
    chats = []
    for _ in range(requests):
        if not chats or rng.random() < 0.6:
            length = min(int(rng.lognormvariate(0, 1) * opening_blocks) + 1, 40 * opening_blocks)
            chat = rng.choice(beginnings) + [rng.randbytes(16) for _ in range(length)]
            if rng.random() < 0.3:
                chats.append(chat)
        else:
            # The longer ago somebody wrote, the less likely he writes again.
            chat = chats.pop(-1 - min(int(rng.expovariate(0.03)), len(chats) - 1))
            chat.extend(rng.randbytes(16) for _ in range(rng.randint(1, 2 * turn_blocks)))
            chats.append(chat)
        yield list(chat)
