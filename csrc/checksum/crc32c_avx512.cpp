// Folding with 512-bit carry-less multiplications (Gopal et al., "Fast CRC Computation for
// Generic Polynomials Using PCLMULQDQ", Intel 2009): a 16-byte lane is moved d bytes towards
// the end of the text by multiplying its halves with powers of x, and added to what stands there.
#if defined(__x86_64__)

#if !defined(__clang__)
// GCC 12 warns inside its own intrinsics (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "base/bytes.hpp"
#include "checksum/crc32c_math.hpp"
#include "checksum/crc32c_variants.hpp"

#define KVWIRE_TARGET \
    __attribute__((target("sse4.2,pclmul,avx512f,avx512vl,vpclmulqdq")))

namespace kvwire {
namespace {

constexpr size_t kRegisterBytes = sizeof(__m512i);
constexpr size_t kStrideBytes = 4 * kRegisterBytes;

// Factors that move a lane on by `bytes`. A reflected 64 x 64 bit product carries a factor x, and
// a 32-bit residue in a 64-bit half a factor x^32; the first half is worth x^64 more.
constexpr int64_t first_half(size_t bytes) { return crc32c_math::x_to_the(8 * bytes + 31); }
constexpr int64_t second_half(size_t bytes) { return crc32c_math::x_to_the(8 * bytes - 33); }

template <size_t bytes>
KVWIRE_TARGET inline __m512i factors() {
    constexpr int64_t kFirst = first_half(bytes), kSecond = second_half(bytes);
    return _mm512_set_epi64(kSecond, kFirst, kSecond, kFirst, kSecond, kFirst, kSecond, kFirst);
}

KVWIRE_TARGET inline __m512i fold(__m512i lanes, __m512i factor, __m512i onto) {
    constexpr int kXorOfThree = 0x96;
    return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(lanes, factor, 0x00),
                                     _mm512_clmulepi64_epi128(lanes, factor, 0x11), onto,
                                     kXorOfThree);
}

KVWIRE_TARGET inline __m512i load(const uint8_t* at) { return _mm512_loadu_si512(at); }

// The CRC register after the 64 bytes that `lanes` stand for.
KVWIRE_TARGET inline uint32_t reduce(__m512i lanes) {
    constexpr int64_t k1 = first_half(48), k2 = second_half(48), k3 = first_half(32),
                      k4 = second_half(32), k5 = first_half(16), k6 = second_half(16);
    const __m512i to_last = _mm512_set_epi64(0, 0, k6, k5, k4, k3, k2, k1);
    const __m512i last_only = _mm512_maskz_mov_epi64(0xC0, lanes);
    const __m512i moved = fold(lanes, to_last, last_only);
    const __m128i sum = _mm_xor_si128(
        _mm_xor_si128(_mm512_castsi512_si128(moved), _mm512_extracti32x4_epi32(moved, 1)),
        _mm_xor_si128(_mm512_extracti32x4_epi32(moved, 2), _mm512_extracti32x4_epi32(moved, 3)));
    const uint64_t state = _mm_crc32_u64(0, static_cast<uint64_t>(_mm_cvtsi128_si64(sum)));
    return static_cast<uint32_t>(
        _mm_crc32_u64(state, static_cast<uint64_t>(_mm_extract_epi64(sum, 1))));
}

}  // namespace

KVWIRE_TARGET uint32_t crc32c_avx512(uint32_t crc, const void* data, size_t size) {
    if (size < kStrideBytes) return crc32c_sse42(crc, data, size);
    const auto* at = static_cast<const uint8_t*>(data);
    const __m512i start = _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(~crc)));
    __m512i a = _mm512_xor_si512(load(at), start);
    __m512i b = load(at + 64), c = load(at + 128), d = load(at + 192);
    at += kStrideBytes, size -= kStrideBytes;

    const __m512i by_stride = factors<kStrideBytes>();
    for (; size >= kStrideBytes; at += kStrideBytes, size -= kStrideBytes) {
        a = fold(a, by_stride, load(at));
        b = fold(b, by_stride, load(at + 64));
        c = fold(c, by_stride, load(at + 128));
        d = fold(d, by_stride, load(at + 192));
    }
    const __m512i by_register = factors<kRegisterBytes>();
    __m512i lanes = fold(fold(fold(a, by_register, b), by_register, c), by_register, d);
    for (; size >= kRegisterBytes; at += kRegisterBytes, size -= kRegisterBytes) {
        lanes = fold(lanes, by_register, load(at));
    }
    return crc32c_sse42(~reduce(lanes), at, size);
}

}  // namespace kvwire

#endif
