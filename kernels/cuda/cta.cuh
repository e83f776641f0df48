// What the threads of a block do together. The algorithms are written against it once: DeviceCta
// runs them on a GPU, HostCta one thread after another on a CPU, where property tests hold them to
// the reference.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define KVWIRE_DEVICE __device__ __forceinline__
#else
#define KVWIRE_DEVICE inline
#endif

namespace kvwire {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;

KVWIRE_DEVICE int plane_bytes(int count) { return (count + 7) / 8; }

#if defined(__CUDACC__)

class DeviceCta {
public:
    // `room`: WARPS + 1 words of shared memory.
    __device__ explicit DeviceCta(int* room) : room_(room) {}

    // f(i) for all i below `count`, in any order. What others then read needs a sync().
    template <class F>
    __device__ __forceinline__ void spread(int count, F f) {
        for (int i = threadIdx.x; i < count; i += THREADS) f(i);
    }
    // f(i) for all i below THREADS.
    template <class F>
    __device__ __forceinline__ void each(F f) { f(int(threadIdx.x)); }
    __device__ __forceinline__ void sync() { __syncthreads(); }
    __device__ __forceinline__ bool leads() const { return threadIdx.x == 0; }

    // Whether test(i) holds for any i. Includes a sync().
    template <class F>
    __device__ __forceinline__ bool any(int count, F test) {
        int found = 0;
        for (int i = threadIdx.x; i < count && !found; i += THREADS) found = test(i);
        return __syncthreads_or(found) != 0;
    }

    // Bit plane b of value(i) for i below `count` to out + b * plane_bytes(count). No sync().
    template <class F>
    __device__ __forceinline__ void planes(int count, int width, F value, uint8_t* out) {
        const int bytes = plane_bytes(count), lane = threadIdx.x % 32;
        for (int first = threadIdx.x - lane; first < count; first += THREADS) {
            const int i = first + lane;
            const unsigned mine = i < count ? value(i) : 0;
            for (int bit = 0; bit < width; ++bit) {
                const unsigned plane = __ballot_sync(0xFFFFFFFF, mine >> bit & 1);
                if (lane < 4 && first / 8 + lane < bytes)
                    out[bit * bytes + first / 8 + lane] = uint8_t(plane >> 8 * lane);
            }
        }
    }

    // place(i, rank) for all i that keep(i), ranked in order. Returns how many. Includes sync()s.
    template <class Keep, class Place>
    __device__ __forceinline__ int compact(int count, Keep keep, Place place) {
        const int each = (count + THREADS - 1) / THREADS, lane = threadIdx.x % 32;
        const int begin = min(count, int(threadIdx.x) * each), end = min(count, begin + each);
        int mine = 0;
        for (int i = begin; i < end; ++i) mine += keep(i);
        int before = mine;  // of this warp, with this thread
        for (int step = 1; step < 32; step *= 2) {
            const int lower = __shfl_up_sync(0xFFFFFFFF, before, step);
            if (lane >= step) before += lower;
        }
        if (lane == 31) room_[threadIdx.x / 32] = before;
        __syncthreads();
        int rank = before - mine, total = 0;
        for (int warp = 0; warp < WARPS; ++warp) {
            if (warp < int(threadIdx.x) / 32) rank += room_[warp];
            total += room_[warp];
        }
        for (int i = begin; i < end; ++i)
            if (keep(i)) place(i, rank++);
        __syncthreads();
        return total;
    }

private:
    int* room_;
};

KVWIRE_DEVICE void add_bits(uint32_t* word, uint32_t bits) { atomicXor(word, bits); }
KVWIRE_DEVICE void set_flag(int32_t* word) { atomicOr(word, 1); }
KVWIRE_DEVICE void lower_to(int64_t* word, int64_t value) {
    atomicMin(reinterpret_cast<long long*>(word), static_cast<long long>(value));
}

#else

class HostCta {
public:
    template <class F>
    void spread(int count, F f) {
        for (int i = 0; i < count; ++i) f(i);
    }
    void sync() {}
    bool leads() const { return true; }

    template <class F>
    bool any(int count, F test) {
        bool found = false;
        for (int i = 0; i < count && !found; ++i) found = test(i);
        return found;
    }

    template <class F>
    void planes(int count, int width, F value, uint8_t* out) {
        const int bytes = plane_bytes(count);
        for (int at = 0; at < width * bytes; ++at) out[at] = 0;
        for (int i = 0; i < count; ++i)
            for (int bit = 0; bit < width; ++bit)
                out[bit * bytes + i / 8] |= uint8_t((value(i) >> bit & 1) << i % 8);
    }

    template <class Keep, class Place>
    int compact(int count, Keep keep, Place place) {
        int total = 0;
        for (int i = 0; i < count; ++i)
            if (keep(i)) place(i, total++);
        return total;
    }
};

inline void add_bits(uint32_t* word, uint32_t bits) { *word ^= bits; }
inline void set_flag(int32_t* word) { *word = 1; }
inline void lower_to(int64_t* word, int64_t value) { *word = value < *word ? value : *word; }

#endif

struct alignas(16) Word16 {
    uint64_t low, high;
};

// `count` bytes, as wide as both ends allow. No sync().
template <class Cta>
KVWIRE_DEVICE void copy_bytes(Cta& cta, uint8_t* to, const uint8_t* from, int64_t count) {
    const uint64_t ends = uint64_t(uintptr_t(to)) | uint64_t(uintptr_t(from)) | uint64_t(count);
    if (ends % 16 == 0) {
        cta.spread(int(count / 16), [&](int i) {
            reinterpret_cast<Word16*>(to)[i] = reinterpret_cast<const Word16*>(from)[i];
        });
    } else if (ends % 4 == 0) {
        cta.spread(int(count / 4), [&](int i) {
            reinterpret_cast<uint32_t*>(to)[i] = reinterpret_cast<const uint32_t*>(from)[i];
        });
    } else {
        cta.spread(int(count), [&](int i) { to[i] = from[i]; });
    }
}

}  // namespace kvwire
