// 64 elements at a time with AVX2, in two halves: the sign bits of bytes are the bit planes, and
// BMI2's extract and deposit move the bytes of 8 elements between tiers.
#if defined(__x86_64__)

#include <immintrin.h>

#include "base/cpu.hpp"
#include "codec/tiered_variants.hpp"

#define KVWIRE_TARGET __attribute__((target("avx2,popcnt,bmi2")))

namespace kvwire {
namespace {

constexpr size_t HALF = 32;  // elements, one byte of a register each
constexpr size_t BLOCK = 2 * HALF;

KVWIRE_TARGET inline __m256i load(const uint8_t* at) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}
KVWIRE_TARGET inline __m256i load_twice(const uint8_t* at) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}
KVWIRE_TARGET inline void store(uint8_t* at, __m256i value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), value);
}

// Bit `bit` of each byte.
KVWIRE_TARGET inline uint32_t plane_of(__m256i bytes, int bit) {
    return uint32_t(_mm256_movemask_epi8(_mm256_slli_epi16(bytes, 7 - bit)));
}

// All ones in the bytes whose bit is set.
KVWIRE_TARGET inline __m256i bytes_of(uint32_t bits) {
    const __m256i source = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202,
                                              0x0303030303030303);
    const __m256i single = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(int(bits)), source);
    return _mm256_cmpeq_epi8(_mm256_and_si256(spread, single), single);
}

// ---- elements: split32() stores the verbatim values of 32 and returns their exponents

// The lower bytes of 32 words in order.
KVWIRE_TARGET inline __m256i low_bytes(__m256i a, __m256i b) {
    const __m256i low = _mm256_set1_epi16(0xFF);
    return _mm256_permute4x64_epi64(
        _mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low)), 0xD8);
}

KVWIRE_TARGET inline __m256i rotated_16(__m256i x) {
    return _mm256_or_si256(_mm256_slli_epi16(x, 1), _mm256_srli_epi16(x, 15));
}

// Stores the verbatim values, 3 bytes each, of 8 elements; overwrites the 4 bytes behind them.
KVWIRE_TARGET inline __m256i split8(const uint8_t* raw, uint8_t* whole) {
    const __m256i x = load(raw);
    const __m256i rotated = _mm256_or_si256(_mm256_slli_epi32(x, 1), _mm256_srli_epi32(x, 31));
    const __m256i dense = _mm256_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1,
                                           0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    const __m256i verbatim = _mm256_shuffle_epi8(rotated, dense);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(whole), _mm256_castsi256_si128(verbatim));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(whole + 12),
                     _mm256_extracti128_si256(verbatim, 1));
    return _mm256_srli_epi32(rotated, 24);
}

template <class Cut>
KVWIRE_TARGET inline __m256i split32(const uint8_t* raw, uint8_t* whole, uint8_t* planes,
                                     size_t stride) {
    const __m256i mask = _mm256_set1_epi8(char(Cut::EXPONENT_MASK));
    if constexpr (Cut::BYTES == 2) {
        const __m256i a = rotated_16(load(raw)), b = rotated_16(load(raw + HALF));
        store(whole, low_bytes(a, b));
        const __m256i upper = low_bytes(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
        for (size_t bit = 0; bit < Cut::REST; ++bit)
            store_le<uint32_t>(planes + bit * stride, plane_of(upper, int(bit)));
        return _mm256_and_si256(_mm256_srli_epi16(upper, int(Cut::REST)), mask);
    } else if constexpr (Cut::BYTES == 4) {
        const __m256i a = split8(raw, whole), b = split8(raw + HALF, whole + 24);
        const __m256i c = split8(raw + 2 * HALF, whole + 48);
        const __m256i d = split8(raw + 3 * HALF, whole + 72);
        const __m256i packed = _mm256_packus_epi16(_mm256_packus_epi32(a, b),
                                                   _mm256_packus_epi32(c, d));
        return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    } else {
        // Not rotated: the sign, which is bit 0 of the verbatim value, is the top bit.
        const __m256i items = load(raw);
        for (size_t bit = 0; bit < Cut::REST; ++bit)
            store_le<uint32_t>(planes + bit * stride, plane_of(items, bit ? int(bit) - 1 : 7));
        return _mm256_and_si256(_mm256_srli_epi16(items, int(Cut::REST) - 1), mask);
    }
}

// `bytes` with `bit` set where the plane says so.
KVWIRE_TARGET inline __m256i add_plane(__m256i bytes, const uint8_t* plane, int bit) {
    return _mm256_or_si256(bytes, _mm256_and_si256(bytes_of(load_le<uint32_t>(plane)),
                                                   _mm256_set1_epi8(char(bit))));
}

// Reads 4 bytes behind the verbatim values of 8 elements.
KVWIRE_TARGET inline void join8(__m128i exponents, const uint8_t* whole, uint8_t* raw) {
    const __m256i spread = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,
                                            0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
    const __m256i verbatim = _mm256_loadu2_m128i(reinterpret_cast<const __m128i*>(whole + 12),
                                                 reinterpret_cast<const __m128i*>(whole));
    const __m256i tops = _mm256_slli_epi32(_mm256_cvtepu8_epi32(exponents), 24);
    const __m256i x = _mm256_or_si256(tops, _mm256_shuffle_epi8(verbatim, spread));
    store(raw, _mm256_or_si256(_mm256_srli_epi32(x, 1), _mm256_slli_epi32(x, 31)));
}

template <class Cut>
KVWIRE_TARGET inline void join32(__m256i exponents, const uint8_t* whole, const uint8_t* planes,
                                 size_t stride, uint8_t* raw) {
    if constexpr (Cut::BYTES == 2) {
        __m256i upper = _mm256_slli_epi16(exponents, int(Cut::REST));
        for (size_t bit = 0; bit < Cut::REST; ++bit)
            upper = add_plane(upper, planes + bit * stride, 1 << bit);
        const __m256i low = _mm256_permute4x64_epi64(load(whole), 0xD8);
        const __m256i high = _mm256_permute4x64_epi64(upper, 0xD8);
        const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
        store(raw, _mm256_or_si256(_mm256_srli_epi16(a, 1), _mm256_slli_epi16(a, 15)));
        store(raw + HALF, _mm256_or_si256(_mm256_srli_epi16(b, 1), _mm256_slli_epi16(b, 15)));
    } else if constexpr (Cut::BYTES == 4) {
        const __m128i low = _mm256_castsi256_si128(exponents);
        const __m128i high = _mm256_extracti128_si256(exponents, 1);
        join8(low, whole, raw);
        join8(_mm_srli_si128(low, 8), whole + 24, raw + HALF);
        join8(high, whole + 48, raw + 2 * HALF);
        join8(_mm_srli_si128(high, 8), whole + 72, raw + 3 * HALF);
    } else {
        __m256i items = _mm256_slli_epi16(exponents, int(Cut::REST) - 1);
        for (size_t bit = 0; bit < Cut::REST; ++bit)
            items = add_plane(items, planes + bit * stride, bit ? 1 << (bit - 1) : 0x80);
        store(raw, items);
    }
}

// The 4 bytes that FP32 touches behind the last whole verbatim values are tier 1's, at least:
// those that split() spoils are written after it.
template <class Cut>
KVWIRE_TARGET void split(const uint8_t* raw, const uint8_t* bases, size_t count, uint8_t* body,
                         uint8_t* distances) {
    const size_t stop = count / HALF * HALF;
    const __m256i mask = _mm256_set1_epi8(char(Cut::EXPONENT_MASK));
    uint8_t* const planes = body + count * Cut::WHOLE;
    for (size_t i = 0; i < stop; i += HALF) {
        const __m256i exponents = split32<Cut>(raw + i * Cut::BYTES, body + i * Cut::WHOLE,
                                               planes + i / 8, plane_bytes(count));
        store(distances + i,
              _mm256_and_si256(mask, _mm256_sub_epi8(exponents, load(bases + i))));
    }
    split_from<Cut>(stop, raw, bases, count, body, distances);
}

template <class Cut>
KVWIRE_TARGET void join(const uint8_t* body, const uint8_t* bases, const uint8_t* distances,
                        size_t count, uint8_t* raw) {
    const size_t stop = count / HALF * HALF;
    const __m256i mask = _mm256_set1_epi8(char(Cut::EXPONENT_MASK));
    const uint8_t* const planes = body + count * Cut::WHOLE;
    for (size_t i = 0; i < stop; i += HALF) {
        const __m256i exponents =
            _mm256_and_si256(mask, _mm256_add_epi8(load(distances + i), load(bases + i)));
        join32<Cut>(exponents, body + i * Cut::WHOLE, planes + i / 8, plane_bytes(count),
                    raw + i * Cut::BYTES);
    }
    join_from<Cut>(stop, body, bases, distances, count, raw);
}

// ---- tiers

// One tier's digits of distances, in the upper bits of a byte. From the 33rd on none has a rank.
class Digits {
public:
    KVWIRE_TARGET Digits(const uint8_t* digits, int shift, int width) {
        const __m128i up = _mm_cvtsi32_si128(8 - shift - width);
        const __m256i top = _mm256_set1_epi8(char(0xFF << (8 - width)));
        low_ = _mm256_and_si256(_mm256_sll_epi16(load_twice(digits), up), top);
        high_ = _mm256_and_si256(_mm256_sll_epi16(load_twice(digits + 16), up), top);
    }
    KVWIRE_TARGET __m256i of(__m256i distances) const {
        const __m256i is_far = _mm256_cmpeq_epi8(
            distances, _mm256_max_epu8(distances, _mm256_set1_epi8(char(HALF))));
        const __m256i is_high = _mm256_slli_epi16(distances, 3);
        const __m256i near = _mm256_and_si256(distances, _mm256_set1_epi8(0x0F));
        return _mm256_or_si256(is_far, _mm256_blendv_epi8(_mm256_shuffle_epi8(low_, near),
                                                          _mm256_shuffle_epi8(high_, near),
                                                          is_high));
    }

private:
    __m256i low_, high_;
};

// A byte of ones for each bit of the lowest byte of `bits`.
KVWIRE_TARGET inline uint64_t eight_bytes_of(uint64_t bits) {
    const uint64_t lowest = _pdep_u64(bits, 0x0101010101010101);
    return (lowest << 8) - lowest;
}

// Moves those of 64 distances that `on` names to `target`; returns the place behind them.
KVWIRE_TARGET inline uint8_t* compress(const uint8_t* distances, uint64_t on, uint8_t* target) {
    for (size_t i = 0; i < BLOCK; i += 8, on >>= 8) {
        store_le(target, _pext_u64(load_le<uint64_t>(distances + i), eight_bytes_of(on)));
        target += _mm_popcnt_u64(on & 0xFF);
    }
    return target;
}

template <int WIDTH>
KVWIRE_TARGET inline void planes_of(const Digits& digits, const uint8_t* distances,
                                    uint64_t* planes) {
    __m256i low = digits.of(load(distances)), high = digits.of(load(distances + HALF));
    for (int bit = WIDTH - 1; bit >= 0; --bit) {
        planes[bit] = uint32_t(_mm256_movemask_epi8(low)) |
                      uint64_t(uint32_t(_mm256_movemask_epi8(high))) << HALF;
        low = _mm256_add_epi8(low, low);
        high = _mm256_add_epi8(high, high);
    }
}

template <int WIDTH>
KVWIRE_TARGET size_t put_tier(const uint8_t* table, int shift, uint8_t* distances, size_t count,
                              uint8_t* planes) {
    const Digits digits(table, shift, WIDTH);
    const size_t stride = plane_bytes(count), stop = count / BLOCK * BLOCK;
    uint8_t* target = distances;  // never ahead of what was read
    uint64_t latest[WIDTH] = {};  // of each plane
    for (size_t i = 0; i < stop; i += BLOCK) {
        planes_of<WIDTH>(digits, distances + i, latest);
        uint64_t on = ~uint64_t(0);
        for (int bit = 0; bit < WIDTH; ++bit) {
            store_le(planes + size_t(bit) * stride + i / 8, latest[bit]);
            on &= latest[bit];
        }
        target = compress(distances + i, on, target);
    }
    if (stop < count) {
        uint64_t last[WIDTH];
        planes_of<WIDTH>(digits, distances + stop, last);
        const uint64_t there = _bzhi_u64(~uint64_t(0), unsigned(count - stop));
        uint64_t on = there;
        for (int bit = 0; bit < WIDTH; ++bit) {
            store_last_bits(planes + size_t(bit) * stride, stride, stop > 0, latest[bit],
                            last[bit] & there);
            on &= last[bit];
        }
        target = compress(distances + stop, on, target);
    }
    return size_t(target - distances);
}

size_t put_tier_of(const CodeTable& table, int shift, int width, uint8_t* distances, size_t count,
                   uint8_t* planes) {
    static constexpr decltype(&put_tier<1>) kernels[CodeTable::TIER_BITS_MAX] = {
        put_tier<1>, put_tier<2>, put_tier<3>, put_tier<4>};
    if (table.offset_stop() > int(HALF))
        return tiered_portable().put_tier(table, shift, width, distances, count, planes);
    return kernels[width - 1](table.digits().data(), shift, distances, count, planes);
}

KVWIRE_TARGET size_t count_on(const uint8_t* planes, size_t count, int width) {
    const size_t bytes = plane_bytes(count), stop = bytes / 8 * 8;
    uint64_t on = 0;
    for (size_t at = 0; at < bytes; at += 8) {
        uint64_t all = ~uint64_t(0);
        for (int bit = 0; bit < width; ++bit) {
            const uint8_t* const plane = planes + size_t(bit) * bytes;
            all &= at < stop ? load_le<uint64_t>(plane + at)
                             : load_last_bits(plane, bytes, stop > 0);
        }
        on += uint64_t(_mm_popcnt_u64(all));
    }
    return size_t(on);
}

// Where 8 bytes come from that a mask deposits: the next one each, or (top bit) a zero.
constexpr std::array<std::array<uint8_t, 8>, 256> make_orders() {
    std::array<std::array<uint8_t, 8>, 256> orders{};
    for (size_t mask = 0; mask < orders.size(); ++mask) {
        uint8_t next = 0;
        for (size_t i = 0; i < 8; ++i) orders[mask][i] = mask >> i & 1 ? next++ : 0x80;
    }
    return orders;
}
alignas(64) constexpr std::array<std::array<uint8_t, 8>, 256> ORDERS = make_orders();

// The next bytes of `lower` in the 16 places that `on` names, elsewhere 0.
KVWIRE_TARGET inline __m128i expand16(const uint8_t* lower, uint64_t on) {
    const auto* const first = reinterpret_cast<const __m128i*>(ORDERS[on & 0xFF].data());
    const auto* const second = reinterpret_cast<const __m128i*>(ORDERS[on >> 8 & 0xFF].data());
    const __m128i behind = _mm_set_epi64x(
        int64_t(uint64_t(_mm_popcnt_u64(on & 0xFF)) * 0x0101010101010101), 0);
    const __m128i order = _mm_unpacklo_epi64(_mm_loadl_epi64(first), _mm_loadl_epi64(second));
    return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lower)),
                            _mm_add_epi8(order, behind));
}

// The distances of 64 digits, whose planes are 8 bytes each: those of `offsets`; where a digit
// says to go on, the next of `lower`. Returns the place behind those that were taken.
template <int WIDTH>
KVWIRE_TARGET inline const uint8_t* get64(__m256i offsets, const uint8_t* planes, size_t stride,
                                          const uint8_t* lower, uint8_t* distances) {
    uint64_t on = ~uint64_t(0);
    for (int bit = 0; bit < WIDTH; ++bit)
        on &= load_le<uint64_t>(planes + size_t(bit) * stride);
    for (size_t half = 0; half < 2; ++half, on >>= HALF) {
        __m256i digits = _mm256_setzero_si256();
        for (int bit = 0; bit < WIDTH; ++bit)
            digits = add_plane(digits, planes + size_t(bit) * stride + 4 * half, 1 << bit);
        const size_t behind = size_t(_mm_popcnt_u64(on & 0xFFFF));
        const __m256i moved = _mm256_set_m128i(expand16(lower + behind, on >> 16),
                                               expand16(lower, on));
        store(distances + half * HALF,
              _mm256_or_si256(_mm256_shuffle_epi8(offsets, digits), moved));
        lower += _mm_popcnt_u64(on & 0xFFFFFFFF);
    }
    return lower;
}

template <int WIDTH>
KVWIRE_TARGET void get_tier(const uint8_t* offsets, const uint8_t* planes, size_t count,
                            const uint8_t* lower, uint8_t* distances) {
    uint8_t here[16] = {};  // 0 for the digit that says to go on
    std::memcpy(here, offsets, (1 << WIDTH) - 1);
    const __m256i table = load_twice(here);
    const size_t stride = plane_bytes(count), stop = count / BLOCK * BLOCK;
    for (size_t i = 0; i < stop; i += BLOCK)
        lower = get64<WIDTH>(table, planes + i / 8, stride, lower, distances + i);
    if (stop < count) {
        uint8_t last[8 * WIDTH];
        for (int bit = 0; bit < WIDTH; ++bit)
            store_le(last + 8 * bit,
                     load_last_bits(planes + size_t(bit) * stride, stride, stop > 0));
        get64<WIDTH>(table, last, 8, lower, distances + stop);
    }
}

void get_tier_of(const uint8_t* offsets, int width, const uint8_t* planes, size_t count,
                 const uint8_t* lower, uint8_t* distances) {
    static constexpr decltype(&get_tier<1>) kernels[CodeTable::TIER_BITS_MAX] = {
        get_tier<1>, get_tier<2>, get_tier<3>, get_tier<4>};
    kernels[width - 1](offsets, planes, count, lower, distances);
}

KVWIRE_TARGET void add_base(const uint8_t* values, uint8_t base, uint8_t mask, size_t count,
                            uint8_t* sums) {
    const size_t stop = count / HALF * HALF;
    const __m256i bases = _mm256_set1_epi8(char(base)), kept = _mm256_set1_epi8(char(mask));
    for (size_t i = 0; i < stop; i += HALF)
        store(sums + i, _mm256_and_si256(_mm256_add_epi8(load(values + i), bases), kept));
    add_base_portable(values + stop, base, mask, count - stop, sums + stop);
}

}  // namespace

const TieredKernels& tiered_avx2() {
    const CpuFeatures& cpu = cpu_features();
    static const TieredKernels kernels = {
        "avx2",
        cpu.avx2 && cpu.popcnt && cpu.bmi2,
        {split<Fp32>, split<Fp16>, split<Bf16>, split<E4m3>, split<E5m2>},
        {join<Fp32>, join<Fp16>, join<Bf16>, join<E4m3>, join<E5m2>},
        put_tier_of,
        count_on,
        get_tier_of,
        add_base,
    };
    return kernels;
}

}  // namespace kvwire

#endif
