// CUDA C++ for g++: each thread of a block is a fiber, what its threads do together a meeting of
// fibers. Comes in front of a .cu file (-include). simt.cpp has the meetings.
#pragma once

#include <limits.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

#include "races.hpp"

#define __CUDACC__ 1
#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
// At function scope static too, and the block of such variables can be found, to be poisoned.
#define __shared__ thread_local

struct uint3 {
    unsigned x, y, z;
};
using dim3 = uint3;
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define SIMT_VECTOR(NAME, TYPE)                                                       \
    struct alignas(2 * sizeof(TYPE)) NAME##2 { TYPE x, y; };                          \
    struct alignas(sizeof(TYPE) < 8 ? 4 * sizeof(TYPE) : 16) NAME##4 { TYPE x, y, z, w; }; \
    inline NAME##2 make_##NAME##2(TYPE x, TYPE y) { return {x, y}; }                  \
    inline NAME##4 make_##NAME##4(TYPE x, TYPE y, TYPE z, TYPE w) { return {x, y, z, w}; }
SIMT_VECTOR(uchar, unsigned char)
SIMT_VECTOR(ushort, unsigned short)
SIMT_VECTOR(int, int)
SIMT_VECTOR(uint, unsigned)
SIMT_VECTOR(longlong, long long)
SIMT_VECTOR(ulonglong, unsigned long long)
#undef SIMT_VECTOR

namespace simt {

enum Meeting : int {
    BLOCK_SYNC, BLOCK_OR, BLOCK_AND, BLOCK_COUNT,
    WARP_SYNC, BALLOT, ANY, ALL, SHUFFLE, SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_XOR,
    REDUCE_ADD, REDUCE_AND, REDUCE_OR, REDUCE_XOR, REDUCE_MIN, REDUCE_MAX, MATCH_ANY, MATCH_ALL,
};

// Waits for the others of the block, or of the warp where `mask` says so; returns its outcome.
uint64_t meet(Meeting meeting, uint32_t mask, uint64_t value = 0, int lane = 0, int width = 32);
void pause();          // others may go first
void atomic_pause();   // now and then
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void copy_later(void* to, const void* from, size_t bytes, size_t zeros);
void copies_commit();
void copies_wait(size_t batches_under_way);
long long clock();

template <class T>
uint64_t to_bits(T value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles take 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return bits;
}
template <class T>
T of_bits(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof(T));
    return value;
}

using Call = std::function<void(void**)>;
void add_kernel(const char* name, std::vector<size_t> parameter_bytes, Call call);

template <class... Args, size_t... I>
void unpack(void (*kernel)(Args...), void** parameters, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<Args>*>(parameters[I])...);
}

struct Kernel {
    template <class... Args>
    Kernel(const char* name, void (*kernel)(Args...)) {
        add_kernel(name, {sizeof(Args)...}, [kernel](void** parameters) {
            unpack(kernel, parameters, std::index_sequence_for<Args...>());
        });
    }
};

}  // namespace simt

// Lets simt_launch find a kernel; its signature says what its parameters are.
#define KERNEL(NAME) static const simt::Kernel simt_kernel_##NAME(#NAME, NAME)

// ---- what threads do together

inline void __syncthreads() { simt::meet(simt::BLOCK_SYNC, 0); }
inline int __syncthreads_or(int value) { return int(simt::meet(simt::BLOCK_OR, 0, value != 0)); }
inline int __syncthreads_and(int value) { return int(simt::meet(simt::BLOCK_AND, 0, value != 0)); }
inline int __syncthreads_count(int value) {
    return int(simt::meet(simt::BLOCK_COUNT, 0, value != 0));
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFF) { simt::meet(simt::WARP_SYNC, mask); }
inline unsigned __ballot_sync(unsigned mask, int value) {
    return unsigned(simt::meet(simt::BALLOT, mask, value != 0));
}
inline int __any_sync(unsigned mask, int value) {
    return int(simt::meet(simt::ANY, mask, value != 0));
}
inline int __all_sync(unsigned mask, int value) {
    return int(simt::meet(simt::ALL, mask, value != 0));
}

#define SIMT_SHUFFLE(NAME, MEETING)                                                        \
    template <class T>                                                                     \
    T NAME(unsigned mask, T value, int lane, int width = 32) {                             \
        return simt::of_bits<T>(                                                           \
            simt::meet(simt::MEETING, mask, simt::to_bits(value), lane, width));           \
    }
SIMT_SHUFFLE(__shfl_sync, SHUFFLE)
SIMT_SHUFFLE(__shfl_up_sync, SHUFFLE_UP)
SIMT_SHUFFLE(__shfl_down_sync, SHUFFLE_DOWN)
SIMT_SHUFFLE(__shfl_xor_sync, SHUFFLE_XOR)
#undef SIMT_SHUFFLE

#define SIMT_REDUCE(NAME, MEETING)                                                         \
    template <class T>                                                                     \
    T NAME(unsigned mask, T value) {                                                       \
        static_assert(sizeof(T) == 4 && std::is_integral<T>::value, "32 bits");            \
        return T(simt::meet(simt::MEETING, mask, uint64_t(int64_t(value))));               \
    }
SIMT_REDUCE(__reduce_add_sync, REDUCE_ADD)
SIMT_REDUCE(__reduce_and_sync, REDUCE_AND)
SIMT_REDUCE(__reduce_or_sync, REDUCE_OR)
SIMT_REDUCE(__reduce_xor_sync, REDUCE_XOR)
SIMT_REDUCE(__reduce_min_sync, REDUCE_MIN)
SIMT_REDUCE(__reduce_max_sync, REDUCE_MAX)
#undef SIMT_REDUCE

template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
    return unsigned(simt::meet(simt::MATCH_ANY, mask, simt::to_bits(value)));
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* same) {
    const unsigned lanes = unsigned(simt::meet(simt::MATCH_ALL, mask, simt::to_bits(value)));
    *same = lanes != 0;
    return lanes;
}

// ---- atomics: fibers are switched at meetings only, so that plain updates are atomic

#define SIMT_UNSEEN __attribute__((no_sanitize("thread")))  // of races.cpp, which is told instead
#define SIMT_ATOMIC(NAME, UPDATE)                                                          \
    template <class T>                                                                     \
    SIMT_UNSEEN T NAME(T* word, std::common_type_t<T> value) {                             \
        static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics take 4 or 8 bytes");      \
        simt::atomic_pause();                                                              \
        if (simt::touched) simt::touched(word, sizeof(T), simt::ATOMIC);                   \
        const T old = *word;                                                               \
        *word = UPDATE;                                                                    \
        return old;                                                                        \
    }
SIMT_ATOMIC(atomicAdd, T(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(value)))
SIMT_ATOMIC(atomicSub, T(std::make_unsigned_t<T>(old) - std::make_unsigned_t<T>(value)))
SIMT_ATOMIC(atomicAnd, old & value)
SIMT_ATOMIC(atomicOr, old | value)
SIMT_ATOMIC(atomicXor, old ^ value)
SIMT_ATOMIC(atomicMin, value < old ? value : old)
SIMT_ATOMIC(atomicMax, value > old ? value : old)
SIMT_ATOMIC(atomicExch, value)
#undef SIMT_ATOMIC

template <class T>
SIMT_UNSEEN T atomicCAS(T* word, std::common_type_t<T> expected, std::common_type_t<T> value) {
    simt::atomic_pause();
    if (simt::touched) simt::touched(word, sizeof(T), simt::ATOMIC);
    const T old = *word;
    if (old == expected) *word = value;
    return old;
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { simt::pause(); }
inline long long clock64() { return simt::clock(); }
[[noreturn]] inline void __trap() { simt::fail("__trap()"); }

// ---- copies that run behind the thread's back: none before it waits for them

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
    simt::copy_later(to, from, bytes, zeros);
}
inline void __pipeline_commit() { simt::copies_commit(); }
inline void __pipeline_wait_prior(size_t batches) { simt::copies_wait(batches); }

// ---- loads and stores with hints

#define SIMT_LOAD(NAME)                         \
    template <class T>                          \
    T NAME(const T* from) { return *from; }
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldca)
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldcs)
SIMT_LOAD(__ldcv)
SIMT_LOAD(__ldlu)
#undef SIMT_LOAD
#define SIMT_STORE(NAME)                                                        \
    template <class T>                                                          \
    void NAME(T* to, const std::common_type_t<T>& value) { *to = value; }
SIMT_STORE(__stcg)
SIMT_STORE(__stcs)
SIMT_STORE(__stwb)
SIMT_STORE(__stwt)
#undef SIMT_STORE

// ---- bits

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1) << (31 - bit);
    return reversed;
}
inline unsigned long long __brevll(unsigned long long x) {
    return (unsigned long long)__brev(unsigned(x)) << 32 | __brev(unsigned(x >> 32));
}
// Byte i of the outcome is the byte of `high:low` that nibble i names; its top bit spreads a sign.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t both = uint64_t(high) << 32 | low;
    unsigned outcome = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned nibble = selector >> 4 * i & 15;
        unsigned byte = unsigned(both >> 8 * (nibble & 7)) & 255;
        if (nibble & 8) byte = byte & 128 ? 255 : 0;
        outcome |= byte << 8 * i;
    }
    return outcome;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift) {
    return shift >= 32 ? low : __funnelshift_l(low, high, shift);
}
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
    return shift >= 32 ? high : __funnelshift_r(low, high, shift);
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}

#define SIMT_BYTES(NAME, BYTE)                                                             \
    inline unsigned NAME(unsigned a, unsigned b) {                                         \
        unsigned outcome = 0;                                                              \
        for (int shift = 0; shift < 32; shift += 8) {                                      \
            const unsigned x = a >> shift & 255, y = b >> shift & 255;                     \
            outcome |= ((BYTE) & 255) << shift;                                            \
        }                                                                                  \
        return outcome;                                                                    \
    }
SIMT_BYTES(__vadd4, x + y)
SIMT_BYTES(__vsub4, x - y)
SIMT_BYTES(__vcmpeq4, x == y ? 255u : 0u)
SIMT_BYTES(__vcmpne4, x != y ? 255u : 0u)
SIMT_BYTES(__vcmpgeu4, x >= y ? 255u : 0u)
SIMT_BYTES(__vcmpgtu4, x > y ? 255u : 0u)
SIMT_BYTES(__vcmpltu4, x < y ? 255u : 0u)
SIMT_BYTES(__vminu4, x < y ? x : y)
SIMT_BYTES(__vmaxu4, x > y ? x : y)
#undef SIMT_BYTES

template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    return T(a) < T(b) ? T(b) : T(a);
}
