"""Arrays of every library as memory, and what `CacheMemory` refuses about them."""

import gc
import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest

from kvwire.buffers import Buffer
from kvwire.control import Item
from kvwire.errors import UnsupportedError, UsageError
from kvwire.layout import (
    REQUEST_LAYER, CacheSpec, DType, GroupKind, attention, recurrent, request_tensor,
    sliding_window,
)
from kvwire.memory import CacheMemory


class DLPackOnly:
    """Hides everything about an array but its DLPack export."""

    def __init__(self, array, device=None, old=False):
        self.array, self.device, self.old = array, device, old

    def __dlpack_device__(self):
        return self.device or self.array.__dlpack_device__()

    def __dlpack__(self, **options):
        if self.old and options:
            raise TypeError("no such keyword")
        return self.array.__dlpack__(**options)


def test_numpy_strides_flags_and_dtype():
    array = np.arange(24, dtype=np.float32).reshape(4, 6)[::-1, ::2]
    buffer = Buffer.of(array)
    assert buffer.address == array.ctypes.data
    assert (buffer.shape, buffer.strides) == ((4, 3), (-24, 8))
    assert (buffer.item_bytes, buffer.dtype_name, buffer.read_only) == (4, "float32", False)
    array.flags.writeable = False
    assert Buffer.of(array).read_only


def test_buffer_protocol():
    raw = bytearray(12)
    buffer = Buffer.of(raw)
    assert (buffer.shape, buffer.item_bytes, buffer.read_only) == ((12,), 1, False)
    with pytest.raises(BufferError):
        raw.extend(b"moves the memory")
    view = memoryview(raw).cast("I")[::-1]
    assert (Buffer.of(view).strides, Buffer.of(view).item_bytes) == ((-4,), 4)
    assert Buffer.of(b"abc").read_only


@pytest.mark.parametrize("old", [False, True])
def test_dlpack(old):
    array = np.arange(24, dtype=np.int64).reshape(4, 6)[:, ::2]
    buffer = Buffer.of(DLPackOnly(array, old=old))
    assert buffer.address == array.ctypes.data
    assert (buffer.shape, buffer.strides) == ((4, 3), (48, 16))
    assert (buffer.item_bytes, buffer.dtype_name, buffer.read_only) == (8, "int64", False)


def test_dlpack_read_only_and_other_devices():
    array = np.zeros(4, np.float32)
    array.flags.writeable = False
    assert Buffer.of(DLPackOnly(array)).read_only
    assert Buffer.of(array).device is None
    assert Buffer.of(DLPackOnly(array, device=(2, 1))).device == "cuda:1"
    with pytest.raises(UnsupportedError, match="device type 7, id 1"):
        Buffer.of(DLPackOnly(array, device=(7, 1)))


def test_torch():
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(2, 8, 3, dtype=torch.bfloat16).transpose(0, 1)[1:]
    buffer = Buffer.of(tensor)
    assert buffer.address == tensor.data_ptr()
    assert (buffer.shape, buffer.strides) == ((7, 2, 3), (6, 48, 2))
    buffer.check_dtype(DType.BF16, "x")
    fp8 = torch.zeros(3).to(torch.float8_e4m3fn)
    Buffer.of(fp8).check_dtype(DType.E4M3, "x")
    Buffer.of(torch.nn.Parameter(torch.zeros(3))).check_dtype(DType.FP32, "x")
    for exported in (tensor, fp8):
        ours, theirs = Buffer.of(exported), Buffer.of(DLPackOnly(exported))
        assert (ours.address, ours.shape, ours.strides, ours.dtype_name) == (
            theirs.address, theirs.shape, theirs.strides, theirs.dtype_name)
    with pytest.raises(UnsupportedError, match="device meta"):
        Buffer.of(torch.zeros(3, device="meta"))
    with pytest.raises(UnsupportedError, match="sparse"):
        Buffer.of(torch.zeros(3).to_sparse())


def test_torch_is_not_imported():
    code = ("import sys, numpy, kvwire.memory as m\n"
            "m.Buffer.of(numpy.zeros(3)); m.Buffer.of(b'x')\n"
            "assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("array, dtype, fits", [
    (np.zeros(1, np.float32), DType.FP32, True),
    (np.zeros(1, np.float16), DType.FP16, True),
    (np.zeros(1, np.float16), DType.BF16, False),
    (np.zeros(1, np.uint16), DType.BF16, True),
    (np.zeros(1, np.int16), DType.FP16, True),
    (np.zeros(1, "V2"), DType.BF16, True),
    (np.zeros(1, np.uint8), DType.E4M3, True),
    (np.zeros(1, np.int8), DType.E4M3, False),
    (np.zeros(1, np.int8), DType.BYTES, True),
    (np.zeros(1, np.bool_), DType.BYTES, True),
    (np.zeros(1, np.bool_), DType.INT8, False),
    (np.zeros(1, np.float32), DType.INT32, False),
    (np.zeros(1, np.float64), DType.FP32, False),
    (np.zeros(1, np.complex64), DType.INT64, False),
])
def test_dtypes(array, dtype, fits):
    buffer = Buffer.of(array)
    if fits:
        buffer.check_dtype(dtype, "tensor k")
    else:
        with pytest.raises(UsageError, match=f"tensor k: the array holds .* the spec says "
                                             f"{dtype.name.lower()}"):
            buffer.check_dtype(dtype, "tensor k")


@pytest.mark.parametrize("thing, error", [
    (np.zeros(1, object), UnsupportedError), (np.zeros(1, ">f4"), UnsupportedError),
    (3, UsageError), ([1, 2], UsageError), (None, UsageError),
])
def test_what_is_no_array(thing, error):
    with pytest.raises(error):
        Buffer.of(thing)


PAGED = CacheSpec("m", (attention([0, 2], kv_heads=2, head_dim=4, block_tokens=4),))


def pages(spec=PAGED, blocks=8):
    return {(layer, tensor.name): np.zeros((blocks, 4, 2, 4), np.uint16)
            for group in spec.groups for layer in group.layers for tensor in group.tensors}


def test_memory_keeps_its_arrays_alive():
    class Array(np.ndarray):
        pass
    array = np.zeros((4, 2, 4), np.uint16).view(Array)
    gone = weakref.ref(array)
    spec = CacheSpec("m", (attention([0], kv_heads=2, head_dim=4),))
    memory = CacheMemory(spec, {(0, "k"): array, (0, "v"): array}, tokens=4)
    native = memory.native
    del array
    gc.collect()
    assert gone() is not None and len(native) == 2
    del memory, native
    gc.collect()
    assert gone() is None


def test_ranges_bytes_and_items():
    spec = CacheSpec("m", (*PAGED.groups, sliding_window([2], 5, kv_heads=1, head_dim=4),
                           recurrent([1, 2], heads=2, key_dim=3, value_dim=4)))
    state = spec.groups[2].tensors[0].name
    arrays = {(0, layer, name): array for (layer, name), array in pages(PAGED).items()}
    arrays |= {(1, 2, name): np.zeros((1, 1, 20, 1, 4), np.uint16) for name in "kv"}
    arrays |= {layer: {state: np.zeros((2, 4, 3), np.float32)} for layer in (1, 2)}
    memory = CacheMemory(spec, arrays, tokens=(6, 20), block_ids=[5, 0, 3, 2])
    assert [memory.token_range(group) for group in range(3)] == [(6, 20), (15, 20), (6, 20)]
    assert memory.bytes == 2 * 14 * 32 + 5 * 16 + 2 * 96
    assert memory.items(0) == [Item(0, 0, 0, 6, 20), Item(0, 1, 0, 6, 20)]
    assert memory.items(1) == [Item(2, 0, 1)]
    assert memory.items(2, (8, 16)) == [
        Item(0, 0, 2, 8, 16), Item(0, 1, 2, 8, 16), Item(1, 0, 2, 15, 16), Item(1, 1, 2, 15, 16),
        Item(2, 0, 2)]
    assert memory.items(2, (0, 6), states=False) == []


def test_a_group_may_hold_a_range_of_its_own():
    spec = CacheSpec("m", (sliding_window([0], 5, kv_heads=1, head_dim=4),))
    arrays = {(0, name): np.zeros((4, 1, 4), np.uint16) for name in "kv"}
    with pytest.raises(UsageError, match=r"extent 4, but tokens \[0, 20\) are 20"):
        CacheMemory(spec, arrays, tokens=20)
    memory = CacheMemory(spec, arrays, tokens=20, group_tokens={0: (16, 20)})
    assert memory.token_range(0) == (16, 20)
    leaf = memory.leaves[GroupKind.SLIDING_WINDOW, 0, "k"]
    assert leaf.tokens.offsets(np.int64(17)) == 8


def test_placeholders_behind_the_window_are_not_looked_at():
    spec = CacheSpec("m", (sliding_window([0], 5, kv_heads=2, head_dim=4, block_tokens=4),))
    ids = [-1, -1, 99, 3, 1]
    memory = CacheMemory(spec, pages(spec), tokens=20, block_ids=ids, writable=True)
    assert memory.token_range(0) == (15, 20) and len(memory.native) == 2
    with pytest.raises(UsageError, match=r"block_ids\[4\] is 8, but the array has 8 blocks"):
        CacheMemory(spec, pages(spec), tokens=20, block_ids=[0, 0, 0, 3, 8], writable=True)


def test_no_tokens_need_no_blocks():
    for tokens in (0, (7, 7)):
        memory = CacheMemory(PAGED, pages(), tokens=tokens, block_ids=[], writable=True)
        assert (memory.bytes, memory.items(0)) == (0, [])
        assert len(memory.native) == 4


def test_names_that_two_groups_share():
    states = recurrent([0], heads=1, key_dim=2, value_dim=2)
    name = states.tensors[0].name
    spec = CacheSpec("m", (replace(states, kind=GroupKind.AUXILIARY), states))
    state = np.zeros((1, 2, 2), np.float32)
    with pytest.raises(UsageError, match=rf"give arrays\[0, 0, '{name}'\]"):
        CacheMemory(spec, {(0, name): state})
    other = state.copy()
    memory = CacheMemory(spec, {(0, 0, name): state, (1, 0, name): other})
    found = CacheMemory(spec, lambda group, layer, name: (state, other)[group])
    for which in (memory, found):
        assert which.leaves[GroupKind.RECURRENT, 0, name].address == other.ctypes.data


def test_request_tensors():
    spec = CacheSpec("m", (request_tensor("ids", (3,), "int64"),))
    with pytest.raises(UsageError, match=r"arrays has no \(4294967295, 'ids'\)"):
        CacheMemory(spec, {})
    memory = CacheMemory(spec, {REQUEST_LAYER: {"ids": np.zeros(3, np.int64)}})
    assert memory.items(REQUEST_LAYER) == [Item(0, 0, REQUEST_LAYER)]


def changed(key, array):
    return pages() | {key: array}


READ_ONLY = np.zeros((8, 4, 2, 4), np.uint16)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize("arrays, options, words", [
    (pages(), {}, "group 0 is paged but has no block_ids"),
    (pages(), {"block_ids": {1: [0]}}, "group 0 is paged but has no block_ids"),
    (pages(), {"block_ids": [0, 1]}, "need 3 blocks of 4 tokens, but block_ids has 2"),
    (pages(), {"block_ids": [0, 1.5, 2]}, "must be a sequence of integers"),
    (pages(), {"block_ids": [[0], [1], [2]]}, "must be a sequence of integers"),
    (pages(), {"block_ids": [0, -1, 2]},
     r"group 0 \(full_attention\), layer 0, tensor k: block_ids\[1\] is -1"),
    (changed((2, "v"), np.zeros((2, 4, 2, 4), np.uint16)), {"block_ids": [0, 1, 2]},
     r"layer 2, tensor v: block_ids\[2\] is 2, but the array has 2 blocks"),
    (pages(), {"block_ids": [4, 1, 4]}, r"block_ids\[0\] and block_ids\[2\] are both 4"),
    (pages(), {"block_ids": [0, 1, 2], "tokens": (9, 5)}, r"tokens is \(9, 5\)"),
    (pages(), {"block_ids": [0, 1, 2], "tokens": -1}, "tokens is -1"),
    ({(0, "k"): pages()[0, "k"]}, {"block_ids": [0, 1, 2]}, r"arrays has no \(0, 'v'\)"),
    (changed((0, "v"), np.zeros((8, 2, 4, 4), np.uint16)), {"block_ids": [0, 1, 2]},
     r"layer 0, tensor v: the array has shape \[8, 2, 4, 4\], the spec says "
     r"\[block_count, 4, 2, 4\]"),
    (changed((0, "v"), np.zeros((2, 8, 4, 2, 4), np.uint16)), {"block_ids": [0, 1, 2]}, "shape"),
    (changed((0, "v"), np.zeros((4, 2, 4), np.uint16)), {"block_ids": [0, 1, 2]}, "shape"),
    (changed((0, "v"), np.zeros((8, 4, 2, 4), np.float32)), {"block_ids": [0, 1, 2]},
     "tensor v: the array holds float32"),
    (changed((0, "k"), READ_ONLY), {"block_ids": [0, 1, 2]}, "read-only"),
    (changed((0, "k"), np.broadcast_to(np.zeros(4, np.uint16), (8, 4, 2, 4))),
     {"block_ids": [0, 1, 2]}, "read-only"),
    (changed((0, "k"), np.lib.stride_tricks.as_strided(
        np.zeros(4, np.uint16), (8, 4, 2, 4), (0, 0, 0, 2))), {"block_ids": [0, 1, 2]},
     "stride 0"),
])
def test_what_a_destination_refuses(arrays, options, words):
    with pytest.raises(UsageError, match=words):
        CacheMemory(PAGED, arrays, **{"tokens": (2, 12), "writable": True, **options})


def test_what_a_source_allows():
    arrays = changed((0, "k"), READ_ONLY) | {(0, "v"): np.zeros((1, 8, 4, 2, 4), np.uint16)}
    memory = CacheMemory(PAGED, arrays, tokens=(2, 12), block_ids=[4, 4, 4])
    assert memory.bytes == 2 * 10 * 32
