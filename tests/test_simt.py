"""The stand-in for a GPU that runs the CUDA kernels: what they do wrong together is found."""

import ctypes

import numpy as np
import pytest
from cuda_host import SIMT, Host, build, launch, loaded
from test_cuda_host import test_coded_from_pages_and_decoded_into_pages as coded_and_decoded

THREADS = 64


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    path = tmp_path_factory.mktemp("simt") / "faults.so"
    build(path, SIMT / "faults.cpp")
    return loaded(path)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("kernel, arrays, said", [
    ("leaves_a_barrier", 0, "thread 5 left|1 threads have left"),
    ("leaves_a_warp", 1, "thread 40 left|lanes 00000100 have left"),
    ("meets_in_different_places", 1, "__any_sync.*__shfl_sync|__shfl_sync.*__any_sync"),
    ("different_barriers", 1, "__syncthreads_or.*__syncthreads|__syncthreads.*__syncthreads_or"),
    ("waits_for_each_other", 0, "deadlock: thread 0 waits at __syncthreads, thread 16 at "
                                "__syncwarp"),
    ("reads_a_lane_left_out", 1, "reads lane 20 in __shfl_sync, which mask 0000ffff leaves out"),
])
def test_meetings_that_never_happen_are_told(faults, kernel, arrays, said, seed):
    with pytest.raises(AssertionError, match=said):
        launch(faults, kernel, (1, 1), THREADS, [np.zeros(THREADS, np.int32)] * arrays, seed)


def outcomes(faults, kernel, *more):
    """Return the outcome of a kernel under several orders of its threads."""
    made = []
    for seed in range(4):
        out = np.zeros(THREADS, np.uint32)
        launch(faults, kernel, (1, 1), THREADS, [out, *more], seed)
        made.append(out.tolist())
    return made


def test_what_is_not_waited_for_shows(faults):
    numbers = np.arange(1, THREADS + 1, dtype=np.uint32)
    found = outcomes(faults, "forgets_a_barrier")
    assert len({tuple(each) for each in found}) > 1
    for each in outcomes(faults, "forgets_to_wait", numbers):
        assert not set(each) & set(numbers.tolist())
    assert len({tuple(each) for each in outcomes(faults, "reads_before_it_writes")}) == 4


@pytest.mark.parametrize("seed", range(6))
def test_what_is_right_goes_through(faults, seed):
    numbers = np.random.default_rng(seed).integers(0, 1 << 20, 256, dtype=np.uint32)
    out = np.zeros(4, np.uint64)
    launch(faults, "sums", (1, 1), 256, [out, numbers], seed)
    total = int(numbers.sum(dtype=np.uint64))
    assert out.tolist() == [total, total, 1, int((numbers & 1).sum())]


def test_bits(faults):
    out = np.zeros(8, np.uint32)
    launch(faults, "bits", (1, 1), 1, [out, 0x1899AA3B, 0xCCDDEEFF])
    assert [hex(each) for each in out] == [
        "0xccee18aa", "0xff3b00ff", "0xddeeff18", "0xff1899aa", "0xdc559918", "0xb", "0x0",
        "0x18"]


def test_a_kernel_is_called_by_name_and_grid(faults):
    with pytest.raises(AssertionError):
        launch(faults, "none_of_it", (1, 1), THREADS, [])
    with pytest.raises(AssertionError, match="no such grid"):
        launch(faults, "waits_for_each_other", (1, 1), 1025, [])


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    path = tmp_path_factory.mktemp("simt") / "watched.so"
    build(path, SIMT / "faults.cpp", races=True)
    return loaded(path)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_races_are_told_in_any_order(watched, seed):
    numbers = np.arange(256, dtype=np.uint32)

    def told(kernel, said, grid=1, arrays=()):
        with pytest.raises(AssertionError, match=said):
            launch(watched, kernel, (grid, 1), THREADS, [np.zeros(256, np.uint64), *arrays], seed)
    told("forgets_a_barrier", "a race: thread .* of shared memory")
    told("writes_what_others_read", "a race: thread .* byte .* of shared memory")
    told("forgets_to_wait", "asynchronous copy to it is under way", arrays=[numbers])
    tells_unwritten = ctypes.c_bool.in_dll(watched, "simt_tells_unwritten")
    tells_unwritten.value = True
    told("reads_before_it_writes", "reads byte .* of shared memory, which nobody wrote")
    tells_unwritten.value = False
    told("sums", "a race between blocks", grid=2, arrays=[numbers])
    test_what_is_right_goes_through(watched, seed)
    out = np.zeros(256, np.uint32)
    launch(watched, "turns_words_by_warps", (1, 1), 256, [out], seed)
    assert out.tolist() == (numbers ^ 31).tolist()


@pytest.mark.parametrize("order, grid, seed", [
    ("NHD", 1 << 30, 2),
    pytest.param("HND", 1, 1, marks=pytest.mark.long),
    pytest.param("NHD", 3, 0, marks=pytest.mark.long)])
def test_no_kernel_races(order, grid, seed):
    host = Host(grid, seed, races=True)
    coded_and_decoded(host, order)
