"""A cache file is whole or not there, and whatever is read of it is what was saved, or an error."""

import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import cache_specs
from vectors.generate import LINK, TRANSFER, cache_memory, file_bytes, hybrid_spec
from vectors.read import stored_vectors

from kvwire.codec import Codec
from kvwire.errors import (
    ErrorCode, FormatError, KvwireError, RefusedError, SpecMismatchError, UsageError,
)
from kvwire.files import FileWriter, inspect, load, save
from kvwire.layout import (
    Axis, CacheSpec, attention, convolution, latent, recurrent, sliding_window,
)
from kvwire.memory import CacheMemory

PAGED = CacheSpec("paged", (
    attention([0, 2], kv_heads=2, head_dim=8, block_tokens=4, order="HND", fused=True),
    sliding_window([1], 32, kv_heads=1, head_dim=8, block_tokens=4),
    convolution([1, 3], {"q": 8, "k": 4}, columns=3)))


def noise(shape, item_bytes, seed):
    """Return elements of any bits; few different ones, so that LZ4 has something to do."""
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 8, math.prod(shape) * item_bytes, dtype=np.uint8)
    return data.view(f"V{item_bytes}").reshape(shape)


def paged_memory(spec, tokens, seed=0, **options):
    """Return memory of paged groups in shuffled blocks, of a pool twice as large."""
    start, stop = tokens
    size = max(group.block_tokens for group in spec.groups)
    count = -(-stop // size) - start // size
    arrays = {}
    for number, (group, layer, tensor) in enumerate(
            (group, layer, tensor) for group in spec.groups for layer in group.layers
            for tensor in group.tensors):
        shape = [tensor.block_tokens if axis.axis == Axis.TOKEN else axis.held
                 for axis in tensor.axes]
        shape = [2 * count, *shape] if tensor.has_tokens else shape
        arrays[layer, tensor.name] = noise(shape, tensor.dtype.item_bytes, seed + number)
    blocks = random.Random(seed).sample(range(2 * count), count)
    return CacheMemory(spec, arrays, tokens=tokens, block_ids=blocks, **options), arrays, blocks


def contiguous(array, blocks, token_axis, start, stop):
    """Return the tokens [start, stop) of a paged array, its TOKEN axis whole again."""
    pages = np.moveaxis(array[blocks], 0, token_axis)
    shape = [*pages.shape[:token_axis], -1, *pages.shape[token_axis + 2:]]
    skipped = start % pages.shape[token_axis + 1]
    index = [slice(None)] * (len(shape) - 1)
    index[token_axis] = slice(skipped, skipped + stop - start)
    return pages.reshape(shape)[tuple(index)]


@pytest.mark.parametrize("codec", ["raw", "lz4"])
@pytest.mark.parametrize("tokens", [(0, 0), (0, 1), (6, 76), (0, 400)])
def test_a_paged_cache_comes_back_contiguous(tmp_path, codec, tokens):
    memory, arrays, blocks = paged_memory(PAGED, tokens)
    save(tmp_path / "cache", memory, codec=codec, metadata={"length": tokens[1]})
    found = load(tmp_path / "cache")
    start, stop = tokens
    for layer in (0, 2):
        expected = contiguous(arrays[layer, "kv"], blocks, 1, start, stop)
        assert found[layer, "kv"].tobytes() == expected.tobytes()
        assert found[layer, "kv"].shape == expected.shape
    window = max(start, stop - 32)
    for name in "kv":
        expected = contiguous(arrays[1, name], blocks, 0, start, stop)[window - start:]
        assert found[1, name].tobytes() == expected.tobytes()
    for layer in (1, 3):
        assert found[layer, "conv"].tobytes() == arrays[layer, "conv"].tobytes()
    assert os.listdir(tmp_path) == ["cache"]


def test_inspect_says_what_a_file_holds(tmp_path):
    memory, _, _ = paged_memory(PAGED, (6, 76))
    save(tmp_path / "cache", memory, metadata={"first_token": 42, "name": "x"})
    found = inspect(tmp_path / "cache")
    assert found.spec == PAGED and found.tokens == (6, 76) and found.layers == (0, 1, 2, 3)
    assert found.metadata == {"first_token": 42, "name": "x"}
    assert found.raw_bytes == memory.bytes
    assert found.file_bytes == (tmp_path / "cache").stat().st_size > found.raw_bytes
    assert (found.segment_count, found.chunk_count) == (4, 4)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=cache_specs(), tokens=st.integers(0, 40), cut=st.tuples(st.integers(0, 50),
       st.integers(0, 50)).map(sorted), codec=st.sampled_from(list(Codec)[:2]), data=st.data())
def test_any_part_of_any_spec_comes_back(tmp_path, spec, tokens, cut, codec, data):
    spec = spec.with_block_tokens(0)
    memory = cache_memory_of(spec, tokens)
    path = tmp_path / "any"
    with open(path, "wb") as file:
        FileWriter(file, LINK).write(memory[0], codec, {}, TRANSFER, chunk_bytes=4096)
    layers = data.draw(st.sets(st.sampled_from(inspect(path).layers), min_size=1))
    found = load(path, layers=layers, tokens=tuple(cut))
    names = {(layer, tensor.name) for group in spec.groups for layer in layers & set(group.layers)
             for tensor in group.tensors}
    assert {key[-2:] for key in found} == names
    for key, array in found.items():
        index, layer, name = key if len(key) == 3 else (None, *key)
        for number, group in enumerate(spec.groups):
            for tensor in group.tensors:
                if layer in group.layers and tensor.name == name and index in (None, number):
                    expected = memory[1][number, layer, name]
                    if tensor.has_tokens:
                        axis = [each.axis for each in tensor.axes].index(Axis.TOKEN)
                        first = max(0, tokens - group.window_tokens) if group.window_tokens else 0
                        low = max(first, cut[0])
                        rows = slice(low, max(low, min(tokens, cut[1])))
                        expected = expected[(slice(None),) * axis + (rows,)]
                    assert array.tobytes() == expected.tobytes()


def cache_memory_of(spec, tokens):
    arrays = {(number, layer, tensor.name): noise(
        [tokens if axis.axis == Axis.TOKEN else axis.held for axis in tensor.axes],
        tensor.dtype.item_bytes, number) for number, group in enumerate(spec.groups)
        for layer in group.layers for tensor in group.tensors}
    return CacheMemory(spec, arrays, tokens=tokens), arrays


def test_a_file_fills_pages_of_another_order(tmp_path):
    source, arrays, blocks = paged_memory(PAGED, (6, 76))
    save(tmp_path / "cache", source)
    spec = CacheSpec("paged", (attention([0, 2], kv_heads=2, head_dim=8, block_tokens=16),))
    target, filled, places = paged_memory(spec, (6, 76), seed=9, writable=True)
    assert load(tmp_path / "cache", target) is None
    for layer in (0, 2):
        heads = contiguous(arrays[layer, "kv"], blocks, 1, 6, 76)
        for name, part in (("k", heads[:, :, :8]), ("v", heads[:, :, 8:])):
            rows = contiguous(filled[layer, name], places, 0, 6, 76)
            assert rows.tobytes() == np.moveaxis(part, 0, 1).tobytes()


def test_a_chosen_part_fills_nothing_else(tmp_path):
    save(tmp_path / "cache", paged_memory(PAGED, (0, 64))[0])
    target, filled, places = paged_memory(PAGED, (0, 64), seed=9, writable=True)
    before = {key: array.copy() for key, array in filled.items()}
    load(tmp_path / "cache", target, layers=[2], tokens=(10, 20))
    whole = load(tmp_path / "cache")
    for key, array in filled.items():
        assert (key == (2, "kv")) == (array.tobytes() != before[key].tobytes())
    after, old = (contiguous(arrays[2, "kv"], places, 1, 0, 64) for arrays in (filled, before))
    assert after[:, 10:20].tobytes() == whole[2, "kv"][:, 10:20].tobytes()
    assert after[:, :10].tobytes() == old[:, :10].tobytes()
    assert after[:, 20:].tobytes() == old[:, 20:].tobytes()


def test_only_the_chunks_needed_are_read(tmp_path, monkeypatch):
    spec = CacheSpec("large", (latent(range(8), latent_dim=512, rope_dim=64),))
    memory, arrays = cache_memory_of(spec, 4096)
    save(tmp_path / "cache", memory)
    read = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: read.append(args[1]) or pread(*args))
    found = load(tmp_path / "cache", layers=[3], tokens=(1000, 1010))
    assert found[3, "mla"].tobytes() == arrays[0, 3, "mla"][1000:1010].tobytes()
    assert sum(read) < 2 * (1 << 20)


def test_states_come_whole_whatever_tokens_are_wanted(tmp_path):
    memory, arrays, _ = paged_memory(PAGED, (0, 64))
    save(tmp_path / "cache", memory)
    found = load(tmp_path / "cache", tokens=(1000, 2000))
    assert found[3, "conv"].tobytes() == arrays[3, "conv"].tobytes()
    assert found[0, "kv"].shape == (2, 0, 16)


@pytest.mark.parametrize("change, error, words", [
    (lambda spec: CacheSpec("paged", (attention([9], kv_heads=2, head_dim=8),)),
     SpecMismatchError, "layer 9, leaf k: not in the file"),
    (lambda spec: CacheSpec("paged", (attention([0], kv_heads=2, head_dim=8, dtype="fp16"),)),
     SpecMismatchError, "dtype"),
    (lambda spec: CacheSpec("paged", (attention([0], kv_heads=4, head_dim=8),)),
     SpecMismatchError, "head")])
def test_memory_that_does_not_fit_is_refused(tmp_path, change, error, words):
    save(tmp_path / "cache", paged_memory(PAGED, (0, 64))[0])
    spec = change(PAGED)
    memory, _ = cache_memory_of(spec, 64)
    with pytest.raises(error, match=words):
        load(tmp_path / "cache", memory)


def test_tokens_that_the_file_lacks_are_refused(tmp_path):
    save(tmp_path / "cache", paged_memory(PAGED, (0, 64))[0])
    memory, _ = cache_memory_of(CacheSpec("paged", (attention([0], kv_heads=2, head_dim=8),)), 65)
    with pytest.raises(RefusedError, match="token 64 is not in the file") as caught:
        load(tmp_path / "cache", memory)
    assert caught.value.code == ErrorCode.TOKENS_MISMATCH


def test_wrong_calls(tmp_path):
    memory, arrays = cache_memory_of(hybrid_spec(0), 4)
    path = tmp_path / "cache"
    for call in (lambda: save(path, memory, arrays), lambda: save(path, memory, codec="zip"),
                 lambda: save(path, memory, metadata={"a": object()}),
                 lambda: save(path, memory, metadata={str(n): n for n in range(65)})):
        with pytest.raises(UsageError):
            call()
        assert os.listdir(tmp_path) == []
    save(path, memory)
    for call in (lambda: load(path, layers=[99]), lambda: load(path, tokens=(5, 4))):
        with pytest.raises(UsageError):
            call()
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")


@pytest.mark.parametrize("vector", stored_vectors("file"), ids=str)
def test_vectors(tmp_path, vector):
    path = tmp_path / "vector"
    path.write_bytes(vector.data)
    if vector.error:
        with pytest.raises(KvwireError) as caught:
            load(path)
        assert caught.value.code == vector.code
        return
    found, memory = load(path), cache_memory(hybrid_spec(0), 40, numbers="tiered" in str(vector))
    assert inspect(path).metadata == {"first_token": 42}
    save(tmp_path / "again", memory, metadata={"first_token": 42})
    for key, array in load(tmp_path / "again").items():
        assert found[key].tobytes() == array.tobytes()


@pytest.fixture(scope="module")
def small():
    return file_bytes(Codec.LZ4), file_bytes()


def outcome(path, data):
    path.write_bytes(data)
    try:
        return {key: array.tobytes() for key, array in load(path).items()}
    except FormatError:
        return None


@pytest.mark.parametrize("which, step", [
    pytest.param(0, 5, id="lz4"),
    pytest.param(1, 13, id="raw"),
    pytest.param(0, 1, id="lz4, every byte", marks=pytest.mark.long),
])
def test_no_flipped_byte_is_loaded_wrong(tmp_path, small, which, step):
    good, path = small[which], tmp_path / "flipped"
    expected = outcome(path, good)
    refused = 0
    for offset in range(0, len(good), step):
        bad = good[:offset] + bytes((good[offset] ^ 1 << offset % 8,)) + good[offset + 1:]
        found = outcome(path, bad)
        assert found in (None, expected), offset
        refused += found is None
    assert refused > 0.9 * len(good) / step


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.long)])
def test_no_cut_file_is_loaded(tmp_path, small, step):
    good, path = small[0], tmp_path / "cut"
    for length in range(0, len(good), step):
        assert outcome(path, good[:length]) is None, length


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_patched_file_is_loaded_wrong(tmp_path, small, data):
    good, path = small[0], tmp_path / "patched"
    start = data.draw(st.integers(0, len(good)))
    stop = data.draw(st.integers(start, min(len(good), start + 200)))
    bad = good[:start] + data.draw(st.binary(max_size=200)) + good[stop:]
    assert outcome(path, bad) in (None, outcome(path, good))


HUGE = {"latent": latent(range(4096), latent_dim=1 << 24, rope_dim=1 << 24),
        "recurrent": recurrent(range(4096), heads=1 << 24, key_dim=1 << 14, value_dim=1)}


@pytest.mark.parametrize("kind", HUGE)
def test_a_hostile_spec_costs_no_memory(tmp_path, kind):
    """A manifest may claim anything; arrays are made only for what the file's chunks can fill."""
    spec = CacheSpec("huge", (HUGE[kind],))
    memory = CacheMemory(CacheSpec("huge", ()), {}, tokens=1)
    path = tmp_path / "huge"
    with open(path, "wb") as file:
        FileWriter(file, LINK).write(memory_with(memory, spec), Codec.RAW, {}, TRANSFER)
    if kind == "recurrent":
        with pytest.raises(SpecMismatchError, match="layer 0, leaf state: not in the file"):
            load(path)
    else:
        assert all(array.size == 0 for array in load(path).values())


def memory_with(memory, spec):
    """Return memory that says it holds `spec`, but brings no item."""
    memory.spec = spec
    memory.tokens = (0, 1 << 32)
    memory.items = lambda layer: []
    return memory


@pytest.mark.parametrize("number", range(12))
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, number):
    path = tmp_path / "cache"
    memory, _ = cache_memory_of(hybrid_spec(0), 40)
    save(path, memory, metadata={"version": 1})
    old, left = path.read_bytes(), [number]

    def put(self, data):
        left[0] -= 1
        if left[0] < 0:
            raise OSError("no space left on device")
        original(self, data)

    original = FileWriter._put
    monkeypatch.setattr(FileWriter, "_put", put)
    with pytest.raises(OSError, match="no space left"):
        save(path, memory, metadata={"version": 2})
    assert os.listdir(tmp_path) == ["cache"] and path.read_bytes() == old


WRITER = """
import sys
import numpy as np
from kvwire.files import save
from kvwire.layout import CacheSpec, latent
spec = CacheSpec("m", (latent(range(4), latent_dim=512, rope_dim=64),))
version = 0
while True:
    version += 1
    arrays = {(layer, "mla"): np.full((512, 576), version, np.uint16) for layer in range(4)}
    save(sys.argv[1], spec, arrays, tokens=512, metadata={"version": version})
    print(version, flush=True)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "cache"
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    for _ in range(5):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)],
                                  stdout=subprocess.PIPE)
        writer.stdout.readline()
        time.sleep(choose.uniform(0, 0.1))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        version = inspect(path).metadata["version"]
        assert version >= 1
        for array in load(path).values():
            assert (array == version).all()
