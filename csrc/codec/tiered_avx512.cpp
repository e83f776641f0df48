// 64 elements at a time with AVX-512 VBMI and VBMI2: byte permutations take elements apart, mask
// registers are the bit planes, and compressing and expanding bytes moves elements between tiers.
#if defined(__x86_64__)

#if !defined(__clang__)
// GCC 12 warns inside its own intrinsics (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <algorithm>

#include "base/cpu.hpp"
#include "codec/tiered_variants.hpp"

#define KVWIRE_TARGET                                                                        \
    __attribute__((                                                                          \
        target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vpopcntdq,popcnt,bmi2")))

namespace kvwire {
namespace {

constexpr size_t LANES = 64;  // elements, one byte of a register each

template <class Of>
constexpr std::array<uint8_t, LANES> bytes_by_lane(Of of) {
    std::array<uint8_t, LANES> bytes{};
    for (size_t lane = 0; lane < LANES; ++lane) bytes[lane] = uint8_t(of(lane));
    return bytes;
}

KVWIRE_TARGET inline __m512i load(const uint8_t* at) { return _mm512_loadu_si512(at); }
KVWIRE_TARGET inline __m512i load(const std::array<uint8_t, LANES>& bytes) {
    return _mm512_loadu_si512(bytes.data());
}
KVWIRE_TARGET inline void store(uint8_t* at, __m512i value) { _mm512_storeu_si512(at, value); }

// ---- elements: split64() stores the verbatim values of 64 and returns their exponents

template <int SHIFT>
constexpr auto every_second = bytes_by_lane([](size_t lane) { return 2 * lane + SHIFT; });

template <class Cut>
KVWIRE_TARGET inline __m512i split64(const uint8_t* raw, uint8_t* whole, uint8_t* planes,
                                     size_t stride) {
    if constexpr (Cut::BYTES == 2) {
        const __m512i a = load(raw), b = load(raw + LANES);
        const __m512i c = _mm512_shldi_epi16(a, a, 1), d = _mm512_shldi_epi16(b, b, 1);
        store(whole, _mm512_permutex2var_epi8(c, load(every_second<0>), d));
        const __m512i upper = _mm512_permutex2var_epi8(c, load(every_second<1>), d);
        for (size_t bit = 0; bit < Cut::REST; ++bit)
            store_le<uint64_t>(planes + bit * stride,
                               _mm512_test_epi8_mask(upper, _mm512_set1_epi8(char(1 << bit))));
        if constexpr (Cut::REST == 0) return upper;
        return _mm512_and_si512(_mm512_srli_epi16(upper, Cut::REST),
                                _mm512_set1_epi8(Cut::EXPONENT_MASK));
    } else if constexpr (Cut::BYTES == 4) {
        // Byte k of the verbatim values is byte k % 3 of element k / 3; each register that is
        // stored has its bytes from two that were loaded.
        static constexpr auto first = bytes_by_lane([](size_t k) { return k / 3 * 4 + k % 3; });
        static constexpr auto second =
            bytes_by_lane([](size_t k) { return (k + 64) / 3 * 4 + (k + 64) % 3 - 64; });
        static constexpr auto third =
            bytes_by_lane([](size_t k) { return (k + 128) / 3 * 4 + (k + 128) % 3 - 128; });
        static constexpr auto tops = bytes_by_lane([](size_t k) { return k % 32 * 4 + 3; });
        const __m512i a = _mm512_rol_epi32(load(raw), 1);
        const __m512i b = _mm512_rol_epi32(load(raw + LANES), 1);
        const __m512i c = _mm512_rol_epi32(load(raw + 2 * LANES), 1);
        const __m512i d = _mm512_rol_epi32(load(raw + 3 * LANES), 1);
        store(whole, _mm512_permutex2var_epi8(a, load(first), b));
        store(whole + LANES, _mm512_permutex2var_epi8(b, load(second), c));
        store(whole + 2 * LANES, _mm512_permutex2var_epi8(c, load(third), d));
        const __m512i lower = _mm512_permutex2var_epi8(a, load(tops), b);
        const __m512i upper = _mm512_permutex2var_epi8(c, load(tops), d);
        return _mm512_shuffle_i64x2(lower, upper, 0x44);
    } else {
        // Not rotated: the sign, which is bit 0 of the verbatim value, is the top bit.
        const __m512i items = load(raw);
        for (size_t bit = 0; bit < Cut::REST; ++bit) {
            const char in_item = char(bit ? 1 << (bit - 1) : 0x80);
            store_le<uint64_t>(planes + bit * stride,
                               _mm512_test_epi8_mask(items, _mm512_set1_epi8(in_item)));
        }
        return _mm512_and_si512(_mm512_srli_epi16(items, Cut::REST - 1),
                                _mm512_set1_epi8(Cut::EXPONENT_MASK));
    }
}

// Sets `bit` in the bytes that a plane says, where it is 0.
KVWIRE_TARGET inline __m512i add_plane(__m512i bytes, const uint8_t* plane, int bit) {
    const __mmask64 is_set = load_le<uint64_t>(plane);
    return _mm512_mask_add_epi8(bytes, is_set, bytes, _mm512_set1_epi8(char(bit)));
}

template <int HALF>
constexpr auto interleaved =
    bytes_by_lane([](size_t lane) { return lane / 2 + 32 * HALF + lane % 2 * 64; });

template <class Cut>
KVWIRE_TARGET inline void join64(__m512i exponents, const uint8_t* whole, const uint8_t* planes,
                                 size_t stride, uint8_t* raw) {
    if constexpr (Cut::BYTES == 2) {
        __m512i upper = exponents;
        if constexpr (Cut::REST > 0) upper = _mm512_slli_epi16(upper, Cut::REST);
        for (size_t bit = 0; bit < Cut::REST; ++bit)
            upper = add_plane(upper, planes + bit * stride, 1 << bit);
        const __m512i lower = load(whole);
        const __m512i a = _mm512_permutex2var_epi8(lower, load(interleaved<0>), upper);
        const __m512i b = _mm512_permutex2var_epi8(lower, load(interleaved<1>), upper);
        store(raw, _mm512_shrdi_epi16(a, a, 1));
        store(raw + LANES, _mm512_shrdi_epi16(b, b, 1));
    } else if constexpr (Cut::BYTES == 4) {
        static constexpr auto spread = bytes_by_lane([](size_t k) { return k / 4 * 3 + k % 4; });
        static constexpr auto last_spread =
            bytes_by_lane([](size_t k) { return k / 4 * 3 + k % 4 + 16; });
        static constexpr auto tops = bytes_by_lane([](size_t k) { return k / 4; });
        constexpr __mmask64 top_bytes = 0x8888888888888888;
        for (int quarter = 0; quarter < 4; ++quarter) {
            // The last one's load ends where the verbatim values end.
            const __m512i bytes = load(whole + (quarter < 3 ? 48 * quarter : 128));
            const __m512i below =
                _mm512_permutexvar_epi8(load(quarter < 3 ? spread : last_spread), bytes);
            const __m512i lanes = _mm512_add_epi8(load(tops), _mm512_set1_epi8(char(16 * quarter)));
            const __m512i items =
                _mm512_mask_permutexvar_epi8(below, top_bytes, lanes, exponents);
            store(raw + LANES * size_t(quarter), _mm512_ror_epi32(items, 1));
        }
    } else {
        __m512i items = _mm512_slli_epi16(exponents, Cut::REST - 1);
        for (size_t bit = 0; bit < Cut::REST; ++bit)
            items = add_plane(items, planes + bit * stride, bit ? 1 << (bit - 1) : 0x80);
        store(raw, items);
    }
}

template <class Cut>
KVWIRE_TARGET void split(const uint8_t* raw, const uint8_t* bases, size_t count, uint8_t* body,
                         uint8_t* distances) {
    const size_t stop = count / LANES * LANES;
    const __m512i mask = _mm512_set1_epi8(char(Cut::EXPONENT_MASK));
    uint8_t* const planes = body + count * Cut::WHOLE;
    for (size_t i = 0; i < stop; i += LANES) {
        const __m512i exponents = split64<Cut>(raw + i * Cut::BYTES, body + i * Cut::WHOLE,
                                               planes + i / 8, plane_bytes(count));
        store(distances + i,
              _mm512_and_si512(mask, _mm512_sub_epi8(exponents, load(bases + i))));
    }
    split_from<Cut>(stop, raw, bases, count, body, distances);
}

template <class Cut>
KVWIRE_TARGET void join(const uint8_t* body, const uint8_t* bases, const uint8_t* distances,
                        size_t count, uint8_t* raw) {
    const size_t stop = count / LANES * LANES;
    const __m512i mask = _mm512_set1_epi8(char(Cut::EXPONENT_MASK));
    const uint8_t* const planes = body + count * Cut::WHOLE;
    for (size_t i = 0; i < stop; i += LANES) {
        const __m512i exponents =
            _mm512_and_si512(mask, _mm512_add_epi8(load(distances + i), load(bases + i)));
        join64<Cut>(exponents, body + i * Cut::WHOLE, planes + i / 8, plane_bytes(count),
                    raw + i * Cut::BYTES);
    }
    join_from<Cut>(stop, body, bases, distances, count, raw);
}

// ---- tiers

// The digits of 64 distances. NARROW: from the 63rd on none has a rank.
template <bool NARROW>
struct Digits {
    __m512i table[NARROW ? 1 : 4];

    KVWIRE_TARGET explicit Digits(const uint8_t* digits) {
        for (__m512i& part : table) {
            part = load(digits);
            digits += LANES;
        }
    }
    KVWIRE_TARGET __m512i of(__m512i distances) const {
        if constexpr (NARROW) {
            const __m512i nearest = _mm512_min_epu8(distances, _mm512_set1_epi8(LANES - 1));
            return _mm512_permutexvar_epi8(nearest, table[0]);
        } else {
            const __m512i low = _mm512_permutex2var_epi8(table[0], distances, table[1]);
            const __m512i high = _mm512_permutex2var_epi8(table[2], distances, table[3]);
            return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(distances), high);
        }
    }
};

template <bool NARROW, int WIDTH>
KVWIRE_TARGET size_t put_tier(const uint8_t* table, int shift, uint8_t* distances, size_t count,
                              uint8_t* planes) {
    const Digits<NARROW> digits(table);
    const size_t stride = plane_bytes(count), stop = count / LANES * LANES;
    uint8_t* on = distances;  // never ahead of what was read
    __m512i bits[WIDTH];
    uint64_t latest[WIDTH];  // of each plane
    for (int bit = 0; bit < WIDTH; ++bit) bits[bit] = _mm512_set1_epi8(char(1 << (shift + bit)));
    for (size_t i = 0; i < stop; i += LANES) {
        const __m512i these = load(distances + i), codes = digits.of(these);
        uint64_t all = ~uint64_t(0);
        for (int bit = 0; bit < WIDTH; ++bit) {
            latest[bit] = _mm512_test_epi8_mask(codes, bits[bit]);
            store_le(planes + size_t(bit) * stride + i / 8, latest[bit]);
            all &= latest[bit];
        }
        store(on, _mm512_maskz_compress_epi8(all, these));
        on += _mm_popcnt_u64(all);
    }
    if (stop < count) {
        const __m512i these = load(distances + stop), codes = digits.of(these);
        const __mmask64 there = _bzhi_u64(~uint64_t(0), unsigned(count - stop));
        uint64_t all = there;
        for (int bit = 0; bit < WIDTH; ++bit) {
            const uint64_t plane = _mm512_mask_test_epi8_mask(there, codes, bits[bit]);
            store_last_bits(planes + size_t(bit) * stride, stride, stop > 0, latest[bit], plane);
            all &= plane;
        }
        store(on, _mm512_maskz_compress_epi8(all, these));
        on += _mm_popcnt_u64(all);
    }
    return size_t(on - distances);
}

size_t put_tier_of(const CodeTable& table, int shift, int width, uint8_t* distances, size_t count,
                   uint8_t* planes) {
    static constexpr decltype(&put_tier<true, 1>) kernels[2][CodeTable::TIER_BITS_MAX] = {
        {put_tier<false, 1>, put_tier<false, 2>, put_tier<false, 3>, put_tier<false, 4>},
        {put_tier<true, 1>, put_tier<true, 2>, put_tier<true, 3>, put_tier<true, 4>}};
    const bool narrow = table.offset_stop() < int(LANES);
    return kernels[narrow][width - 1](table.digits().data(), shift, distances, count, planes);
}

KVWIRE_TARGET size_t count_on(const uint8_t* planes, size_t count, int width) {
    const size_t bytes = plane_bytes(count);
    __m512i on = _mm512_setzero_si512();
    for (size_t at = 0; at < bytes; at += LANES) {
        const __mmask64 there = _bzhi_u64(~uint64_t(0), unsigned(std::min(bytes - at, LANES)));
        __m512i all = _mm512_maskz_loadu_epi8(there, planes + at);
        for (int bit = 1; bit < width; ++bit)
            all = _mm512_and_si512(
                all, _mm512_maskz_loadu_epi8(there, planes + size_t(bit) * bytes + at));
        on = _mm512_add_epi64(on, _mm512_popcnt_epi64(all));
    }
    return size_t(_mm512_reduce_add_epi64(on));
}

// The distances of the digits in `planes`. Where all bits are set: anything.
template <int WIDTH>
struct Distances {
    __m512i table[WIDTH <= 2 ? 3 : 1];

    KVWIRE_TARGET explicit Distances(const uint8_t* offsets) {
        if constexpr (WIDTH <= 2)
            for (int digit = 0; digit < 3; ++digit)
                table[digit] = _mm512_set1_epi8(char(offsets[digit]));
        else
            table[0] = _mm512_broadcast_i32x4(
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(offsets)));
    }
    KVWIRE_TARGET __m512i of(const uint64_t* planes) const {
        if constexpr (WIDTH <= 2) {
            __m512i distances = table[0];
            if constexpr (WIDTH == 2) {
                distances = _mm512_mask_mov_epi8(distances, planes[0], table[1]);
                distances = _mm512_mask_mov_epi8(distances, planes[1], table[2]);
            }
            return distances;
        } else {
            __m512i digits = _mm512_maskz_set1_epi8(planes[0], 1);
            for (int bit = 1; bit < WIDTH; ++bit)
                digits = _mm512_mask_add_epi8(digits, planes[bit], digits,
                                              _mm512_set1_epi8(char(1 << bit)));
            return _mm512_shuffle_epi8(table[0], digits);
        }
    }
};

template <int WIDTH>
KVWIRE_TARGET void get_tier(const uint8_t* offsets, const uint8_t* planes, size_t count,
                            const uint8_t* lower, uint8_t* distances) {
    const Distances<WIDTH> here(offsets);
    const size_t stride = plane_bytes(count), stop = count / LANES * LANES;
    uint64_t bits[WIDTH];
    for (size_t i = 0; i < stop; i += LANES) {
        uint64_t all = ~uint64_t(0);
        for (int bit = 0; bit < WIDTH; ++bit)
            all &= bits[bit] = load_le<uint64_t>(planes + size_t(bit) * stride + i / 8);
        store(distances + i, _mm512_mask_expand_epi8(here.of(bits), all, load(lower)));
        lower += _mm_popcnt_u64(all);
    }
    if (stop < count) {
        uint64_t all = ~uint64_t(0);
        for (int bit = 0; bit < WIDTH; ++bit)
            all &= bits[bit] = load_last_bits(planes + size_t(bit) * stride, stride, stop > 0);
        store(distances + stop, _mm512_mask_expand_epi8(here.of(bits), all, load(lower)));
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
    const __m512i bases = _mm512_set1_epi8(char(base)), kept = _mm512_set1_epi8(char(mask));
    for (size_t i = 0; i < count; i += LANES) {
        const __mmask64 there = _bzhi_u64(~uint64_t(0), unsigned(std::min(count - i, LANES)));
        const __m512i these = _mm512_maskz_loadu_epi8(there, values + i);
        _mm512_mask_storeu_epi8(sums + i, there,
                                _mm512_and_si512(_mm512_add_epi8(these, bases), kept));
    }
}

}  // namespace

const TieredKernels& tiered_avx512() {
    const CpuFeatures& cpu = cpu_features();
    static const TieredKernels kernels = {
        "avx512",
        cpu.avx512f && cpu.avx512bw && cpu.avx512vl && cpu.avx512vbmi && cpu.avx512vbmi2 &&
            cpu.avx512vpopcntdq && cpu.popcnt && cpu.bmi2,
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
