"""Lossy transfers end to end: what may be rounded is, what may not is exact, all is verified."""

import numpy as np
import pytest

import kvwire
from kvwire import DType, Lossy, UsageError

TOKENS = 700
BLOCK = 16
FIRST, LAST = 4, 128
HEADS, DIM = 3, 64


def values_of(words: np.ndarray) -> np.ndarray:
    if words.dtype == np.float32 or words.dtype == np.float16:
        return words.astype(np.float32)
    return (words.astype(np.uint32) << 16).view(np.float32)


def words_like(values: np.ndarray, dtype: DType) -> np.ndarray:
    if dtype == DType.BF16:
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16 if dtype == DType.FP16 else np.float32)


def attention_spec(order: str, block_tokens: int, dtype: DType = DType.BF16) -> kvwire.CacheSpec:
    return kvwire.CacheSpec("lossy", (
        kvwire.attention([0, 2], kv_heads=HEADS, head_dim=DIM, dtype=dtype,
                         block_tokens=block_tokens, order=order),
        kvwire.recurrent([1], heads=4, key_dim=32, value_dim=48)))


def arrays_of(spec: kvwire.CacheSpec, order: str, block_tokens: int, blocks: int,
              dtype: DType = DType.BF16, seed: int | None = None) -> dict:
    shape = {"N": block_tokens or TOKENS, "H": HEADS, "D": DIM}
    pages = ((blocks,) if block_tokens else ()) + tuple(shape[letter] for letter in order)
    random = np.random.default_rng(seed)

    def filled(kind, wanted):
        if seed is None:
            return np.zeros_like(words_like(np.zeros(wanted), kind))
        return words_like(random.standard_normal(wanted), kind)

    arrays = {(layer, name): filled(dtype, pages) for layer in (0, 2) for name in ("k", "v")}
    return arrays | {(1, "state"): filled(DType.FP32, (4, 48, 32))}


def memory_of(spec, arrays, block_tokens, ids, writable=False):
    paged = {"block_ids": ids} if block_tokens else {}
    return kvwire.CacheMemory(spec, arrays, tokens=TOKENS, writable=writable, **paged)


def by_token(array: np.ndarray, order: str, block_tokens: int, ids) -> np.ndarray:
    """Return [token, head, dim]."""
    if block_tokens:
        array = array[ids]
    token, head, dim = (order.index(letter) - 3 for letter in "NHD")
    array = np.moveaxis(array, (token, head, dim), (-3, -2, -1))
    return array.reshape(-1, HEADS, DIM)[:TOKENS]


def hand_off(lossy, order="NHD", block_tokens=BLOCK, dtype=DType.BF16, allow=True, lanes=2,
             codec="raw", seed=1):
    """Return ({(layer, tensor): (source, destination)} [token, head, dim], wire and raw bytes)."""
    spec = attention_spec(order, block_tokens, dtype)
    blocks = -(-TOKENS // BLOCK) + 3
    random = np.random.default_rng(seed)
    here, there = (random.permutation(blocks)[:-(-TOKENS // BLOCK)].tolist() for _ in range(2))
    source = arrays_of(spec, order, block_tokens, blocks, dtype, seed)
    target = arrays_of(spec, order, block_tokens, blocks, dtype)
    with kvwire.Receiver("127.0.0.1:0", allow_lossy=allow) as receiver, \
            kvwire.Sender(receiver.address, lanes=lanes, codec=codec) as sender:
        ticket = receiver.expect(memory_of(spec, target, block_tokens, there, writable=True),
                                 deadline_s=60)
        sent = sender.send(ticket.id, memory_of(spec, source, block_tokens, here),
                           lossy=lossy).result(60)
        ticket.result(60)
    pairs = {(layer, name): (by_token(source[layer, name], order, block_tokens, here),
                             by_token(target[layer, name], order, block_tokens, there))
             for layer in (0, 2) for name in ("k", "v")}
    pairs[1, "state"] = source[1, "state"], target[1, "state"]
    return pairs, sent


def error_of(pair) -> float:
    source, target = map(values_of, pair)
    return float(np.linalg.norm(target - source) / np.linalg.norm(source))


def same(pair) -> bool:
    return pair[0].tobytes() == pair[1].tobytes()


LAYOUTS = [("NHD", BLOCK), ("HND", BLOCK), ("NHD", 0), ("HND", 0), ("HDN", BLOCK)]


@pytest.mark.parametrize("order, block_tokens", LAYOUTS)
@pytest.mark.parametrize("rung, bound", [("int8", 0.01), ("int6", 0.04), ("int4", 0.15),
                                         ("fp8", 0.05)])
def test_keys_and_values_are_rounded(order, block_tokens, rung, bound):
    pairs, sent = hand_off(Lossy(keys=rung, values=rung), order, block_tokens)
    edge = BLOCK if order != "NHD" and block_tokens else 1
    for layer in (0, 2):
        for name in ("k", "v"):
            source, target = pairs[layer, name]
            assert 0 < error_of((source, target)) < bound, (layer, name)
            assert same((source[:FIRST], target[:FIRST]))
            assert same((source[-LAST:], target[-LAST:]))
            middle = slice(FIRST + edge, -LAST - edge)
            assert (source[middle] != target[middle]).any((1, 2)).all()
    assert same(pairs[1, "state"])
    rounded = 1 - (FIRST + LAST + 3 * edge) / TOKENS
    bits = {"int8": 9, "int6": 7, "int4": 5, "fp8": 8.5}[rung]
    state_bytes = pairs[1, "state"][0].nbytes
    kv_bytes = sent.verified_bytes - state_bytes
    assert sent.wire_bytes < state_bytes + kv_bytes * (1 - rounded * (1 - bits / 16)) * 1.05


@pytest.mark.parametrize("rung, bound", [("bf16", 0.003), ("int8", 0.012), ("fp8", 0.05)])
def test_states_are_rounded(rung, bound):
    pairs, _ = hand_off(Lossy(states=rung))
    assert 0 < error_of(pairs[1, "state"]) < bound
    assert all(same(pair) for key, pair in pairs.items() if key != (1, "state"))


@pytest.mark.parametrize("dtype", [DType.FP32, DType.FP16])
def test_other_elements(dtype):
    pairs, _ = hand_off(Lossy(keys="int6", values="int8"), dtype=dtype)
    for layer in (0, 2):
        assert 0 < error_of(pairs[layer, "v"]) < 0.01 < error_of(pairs[layer, "k"]) < 0.04


def test_keys_alone():
    pairs, _ = hand_off(Lossy(keys="int6"))
    assert same(pairs[0, "v"]) and same(pairs[1, "state"]) and not same(pairs[0, "k"])


@pytest.mark.parametrize("codec", ["raw", "tiered"])
def test_nothing_is_rounded_where_the_receiver_does_not_allow_it(codec):
    pairs, _ = hand_off(Lossy(keys="int4", values="int4", states="int8"), allow=False, codec=codec)
    assert all(map(same, pairs.values()))


def test_nothing_is_rounded_unless_it_is_asked_for():
    pairs, _ = hand_off(None)
    assert all(map(same, pairs.values()))


def test_what_stays_exact_is_coded():
    _, raw = hand_off(Lossy(keys="int6", values="int6"))
    pairs, tiered = hand_off(Lossy(keys="int6", values="int6"), codec="tiered")
    assert tiered.wire_bytes < 0.97 * raw.wire_bytes and same(pairs[1, "state"])


def test_what_arrives_does_not_depend_on_lanes():
    lossy = Lossy(keys="int4", values="int6", states="int8")
    (one, _), (four, _) = hand_off(lossy, lanes=1), hand_off(lossy, lanes=4)
    assert all(same((one[key][1], four[key][1])) for key in one)


def test_what_cannot_be_rounded_is_a_usage_error():
    with pytest.raises(UsageError, match="keys is 'int5'"):
        Lossy(keys="int5")
    with pytest.raises(UsageError, match="states is 'int4'"):
        Lossy(states="int4")
    attention = kvwire.attention([0], kv_heads=2, head_dim=8, dtype="e4m3", block_tokens=4)
    with pytest.raises(UsageError, match="'k' is e4m3"):
        Lossy(keys="int4").roundings(kvwire.CacheSpec("m", (attention,)))
    with pytest.raises(UsageError, match="no states to round"):
        Lossy(states="bf16").roundings(kvwire.CacheSpec("m", (attention,)))
    fused = kvwire.attention([0], kv_heads=2, head_dim=8, dtype="bf16", block_tokens=4, fused=True)
    with pytest.raises(UsageError, match="fused"):
        Lossy(keys="int4").roundings(kvwire.CacheSpec("m", (fused,)))
    assert Lossy(keys="int4", values="int4").roundings(kvwire.CacheSpec("m", (fused,)))


LAYERS = (0, 1)
STATES = kvwire.CacheSpec("states", (
    kvwire.recurrent(LAYERS, heads=8, key_dim=128, value_dim=128),))
PAGES = kvwire.CacheSpec("pages", (
    kvwire.attention(LAYERS, kv_heads=4, head_dim=64, dtype="bf16", block_tokens=BLOCK),))


def spread_state(random) -> np.ndarray:
    """A state's scale depends on its row and on its column."""
    rows, columns = (2.0 ** random.uniform(-6, 6, (8, *ends)) for ends in ((128, 1), (1, 128)))
    return (random.standard_normal((8, 128, 128)) * rows * columns).astype(np.float32)


def spread_pages(random) -> np.ndarray:
    """A key's scale depends on its channel."""
    channels = 2.0 ** random.uniform(-4, 0, (4, 64))
    return words_like(random.standard_normal((64, BLOCK, 4, 64)) * channels, DType.BF16)


def send_twice(spec, filled, lossy, codec):
    """Return what arrived in two transfers over one link, and bytes on the wire of each."""
    random = np.random.default_rng(3)
    names = ("state",) if spec is STATES else ("k", "v")
    source = {(layer, name): filled(random) for layer in LAYERS for name in names}
    paged = {} if spec is STATES else {"block_ids": range(64)}
    arrived, wire_bytes = [], []
    with kvwire.Receiver("127.0.0.1:0", allow_lossy=True) as receiver, \
            kvwire.Sender(receiver.address, codec=codec, lanes=1) as sender:
        for _ in range(2):
            target = {key: np.zeros_like(array) for key, array in source.items()}
            memory, into = (kvwire.CacheMemory(spec, arrays, tokens=64 * BLOCK,
                                               writable=arrays is target, **paged)
                            for arrays in (source, target))
            ticket = receiver.expect(into, deadline_s=60)
            sent = sender.send(ticket.id, memory, lossy=lossy).result(60)
            ticket.result(60)
            assert sent.repaired_chunks == 0
            arrived.append(target)
            wire_bytes.append(sent.wire_bytes)
    raw_bytes = sum(array.nbytes for array in source.values())
    return arrived, [raw_bytes / count for count in wire_bytes]


@pytest.mark.parametrize("spec, filled, lossy, ratio", [
    (STATES, spread_state, Lossy(states="bf16"), 2.7),
    (STATES, spread_state, Lossy(states="fp8"), 4.3),
    (PAGES, spread_pages, Lossy(keys="fp8", values="fp8"), 2.1)])
def test_what_was_rounded_is_coded(spec, filled, lossy, ratio):
    """By tables of its own, the same bytes as without, and no worse in the next transfer."""
    plain, (of_plain, _) = send_twice(spec, filled, lossy, "raw")
    coded, ratios = send_twice(spec, filled, lossy, "tiered")
    assert ratios[0] > ratio > 1.05 * of_plain and ratios[1] >= 0.999 * ratios[0]
    for found in coded:
        assert all(found[key].tobytes() == array.tobytes() for key, array in plain[0].items())


@pytest.mark.parametrize("block_tokens", [0, BLOCK])
@pytest.mark.parametrize("rung, bound", [("int8", 0.01), ("int6", 0.04), ("int4", 0.15),
                                         ("fp8", 0.05)])
def test_latents_are_rounded_as_values(rung, bound, block_tokens):
    spec = kvwire.CacheSpec("mla", (kvwire.latent([0], latent_dim=128, rope_dim=64, dtype="bf16",
                                                  block_tokens=block_tokens),))
    ids = np.random.default_rng(4).permutation(-(-TOKENS // BLOCK)).tolist()
    shape = (len(ids), BLOCK, 192) if block_tokens else (TOKENS, 192)
    source = words_like(np.random.default_rng(5).standard_normal(shape), DType.BF16)
    target = np.zeros_like(source)
    with kvwire.Receiver("127.0.0.1:0", allow_lossy=True) as receiver, \
            kvwire.Sender(receiver.address) as sender:
        ticket = receiver.expect(memory_of(spec, {(0, "mla"): target}, block_tokens, ids, True))
        sender.send(ticket.id, memory_of(spec, {(0, "mla"): source}, block_tokens, ids),
                    lossy=Lossy(latents=rung)).result(60)
        ticket.result(60)
    found, wanted = ((array[ids] if block_tokens else array).reshape(-1, 192)[:TOKENS]
                     for array in (target, source))
    assert same((found[:FIRST], wanted[:FIRST])) and same((found[-LAST:], wanted[-LAST:]))
    middle = values_of(found)[FIRST:-LAST], values_of(wanted)[FIRST:-LAST]
    error = np.linalg.norm(middle[0] - middle[1], axis=1) / np.linalg.norm(middle[1], axis=1)
    assert 0 < error.min() and error.max() < bound
