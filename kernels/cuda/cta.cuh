// What the threads of a block do together. tests/simt runs the same source on a CPU.
#pragma once

#include <stdint.h>

#define KVWIRE_DEVICE __device__ __forceinline__

namespace kvwire {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr unsigned ALL_LANES = 0xFFFFFFFF;

// The sum of `mine` over this lane of a warp and those below it.
KVWIRE_DEVICE int scan_warp(int mine) {
    if (!__any_sync(ALL_LANES, mine != 0)) return 0;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int lower = __shfl_up_sync(ALL_LANES, mine, step);
        if (int(threadIdx.x) % 32 >= step) mine += lower;
    }
    return mine;
}

class DeviceCta {
public:
    // `room`: WARPS words of shared memory.
    KVWIRE_DEVICE explicit DeviceCta(int* room) : room_(room) {}

    // f(i) for all i below `count`, in any order. What others then read needs a sync().
    template <class F>
    KVWIRE_DEVICE void spread(int count, F f) {
#pragma unroll 1
        for (int i = threadIdx.x; i < count; i += THREADS) f(i);
    }
    KVWIRE_DEVICE void sync() { __syncthreads(); }
    KVWIRE_DEVICE bool leads() const { return threadIdx.x == 0; }

    // Whether `found` holds in any thread. Includes a sync().
    KVWIRE_DEVICE bool any(bool found) { return __syncthreads_or(found) != 0; }

    // The sum of `mine` over the threads below this one; `*total`: over all. Includes a sync();
    // another has to follow before the next scan.
    KVWIRE_DEVICE int scan(int mine, int* total) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int before = scan_warp(mine);  // of this warp, with this thread
        if (lane == 31) room_[warp] = before;
        __syncthreads();
        const unsigned of_warp = lane < WARPS ? room_[lane] : 0;
        *total = int(__reduce_add_sync(ALL_LANES, of_warp));
        return before - mine + int(__reduce_add_sync(ALL_LANES, lane < warp ? of_warp : 0));
    }

private:
    int* room_;
};

// The first warp of a block by itself; the others wait for what it makes.
class FirstWarp {
public:
    template <class F>
    KVWIRE_DEVICE void spread(int count, F f) {
#pragma unroll 1
        for (int i = threadIdx.x; i < count; i += 32) f(i);
    }
    KVWIRE_DEVICE void sync() { __syncwarp(); }
    KVWIRE_DEVICE int scan(int mine, int* total) {
        const int before = scan_warp(mine);
        *total = __shfl_sync(ALL_LANES, before, 31);
        __syncwarp();
        return before - mine;
    }
};

KVWIRE_DEVICE void add_bits(uint32_t* word, uint32_t bits) { atomicXor(word, bits); }
KVWIRE_DEVICE void set_flag(int32_t* word) { atomicOr(word, 1); }
KVWIRE_DEVICE void lower_to(int64_t* word, int64_t value) {
    atomicMin(reinterpret_cast<long long*>(word), static_cast<long long>(value));
}

struct alignas(16) Word16 {
    uint64_t low, high;
};

// Words of `count` bytes; returns how many bytes are left over. No sync().
template <class Word>
KVWIRE_DEVICE int copy_words(uint8_t* to, const uint8_t* from, int count) {
    const int words = count / int(sizeof(Word));
#pragma unroll 4
    for (int i = threadIdx.x; i < words; i += THREADS)
        reinterpret_cast<Word*>(to)[i] = reinterpret_cast<const Word*>(from)[i];
    return count % int(sizeof(Word));
}

// `count` bytes, as wide as both addresses allow. No sync().
KVWIRE_DEVICE void copy_bytes(uint8_t* to, const uint8_t* from, int count) {
    const uint64_t places = uint64_t(uintptr_t(to)) | uint64_t(uintptr_t(from));
    int left = count;
    if (places % 16 == 0)
        left = copy_words<Word16>(to, from, count);
    else if (places % 4 == 0)
        left = copy_words<uint32_t>(to, from, count);
    copy_words<uint8_t>(to + (count - left), from + (count - left), left);
}

}  // namespace kvwire
