// Included once by each quantised_*.cpp, which says for which vectors: written so that the compiler
// vectorises, without a call that could be shared between those files.
#pragma once

#include <cstring>
#include <type_traits>

#include "codec/quantised_kernels.hpp"
#include "codec/small_floats.hpp"

namespace kvwire::quantised {
namespace {

// Adds to what is below 2^22 so that the last place, where the sum is rounded, is 1.
constexpr float UNSIGNED_RULER = 8388608.0f, SIGNED_RULER = 12582912.0f;
constexpr uint32_t EXACT_EXPONENT = 127 + 58;

template <class Loop>
KVWIRE_INLINE void with(bool flag, Loop loop) {
    if (flag) loop(std::true_type());
    else loop(std::false_type());
}

KVWIRE_INLINE float quotient(float value, float by) {
    return float_of(choose(by > 0, bits_of(value / by), 0));
}

template <class Format>
KVWIRE_INLINE void widen_16(const uint8_t* raw, size_t count, float* values) {
    for (size_t i = 0; i < count; ++i) {
        uint16_t code;
        std::memcpy(&code, raw + 2 * i, 2);
        values[i] = Format::widen(code);
    }
}

template <class Format>
KVWIRE_INLINE void narrow_16(const float* values, size_t count, uint8_t* raw) {
    for (size_t i = 0; i < count; ++i) {
        const uint16_t code = uint16_t(Format::narrow(values[i]));
        std::memcpy(raw + 2 * i, &code, 2);
    }
}

void widen(uint8_t dtype, const uint8_t* raw, size_t count, float* values) {
    if (dtype == FP32) std::memcpy(values, raw, 4 * count);
    else if (dtype == FP16) widen_16<Fp16>(raw, count, values);
    else widen_16<Bf16>(raw, count, values);
}

void narrow(uint8_t dtype, const float* values, size_t count, uint8_t* raw) {
    if (dtype == FP32) std::memcpy(raw, values, 4 * count);
    else if (dtype == FP16) narrow_16<Fp16>(values, count, raw);
    else narrow_16<Bf16>(values, count, raw);
}

template <class Word>
KVWIRE_INLINE bool all_below(const uint8_t* raw, size_t count, Word stop) {
    Word too_large = 0;
    for (size_t i = 0; i < count; ++i) {
        Word word;
        std::memcpy(&word, raw + sizeof word * i, sizeof word);
        too_large |= Word(word & Word(~Word(0)) >> 1) >= stop;
    }
    return !too_large;
}

bool can_round(uint8_t dtype, const uint8_t* raw, size_t count) {
    if (dtype == FP32) return all_below<uint32_t>(raw, count, EXACT_EXPONENT << 23);
    return all_below<uint16_t>(raw, count, dtype == FP16 ? 0x7C00 : EXACT_EXPONENT << 7);
}

void widen_range(const float* values, size_t count, bool steps, float* low, float* high) {
    if (steps) {
        for (size_t i = 0; i < count; ++i) low[i] = values[i] < low[i] ? values[i] : low[i];
        for (size_t i = 0; i < count; ++i) high[i] = values[i] > high[i] ? values[i] : high[i];
        return;
    }
    // Folded in halves, because the compiler may not reorder comparisons by itself.
    float lows[GROUP], highs[GROUP];
    for (size_t i = 0; i < GROUP; ++i) lows[i] = *low, highs[i] = *high;
    std::memcpy(lows, values, 4 * count);
    std::memcpy(highs, values, 4 * count);
    for (size_t half = GROUP / 2; half > 0; half /= 2) {
        for (size_t i = 0; i < half; ++i)
            lows[i] = lows[i + half] < lows[i] ? lows[i + half] : lows[i];
        for (size_t i = 0; i < half; ++i)
            highs[i] = highs[i + half] > highs[i] ? highs[i + half] : highs[i];
    }
    *low = lows[0] < *low ? lows[0] : *low;
    *high = highs[0] > *high ? highs[0] : *high;
}

// Magnitudes are ordered as their bits are.
template <bool EACH, bool DIVIDED, bool OVER_EACH>
KVWIRE_INLINE void raise(const float* values, size_t count, const float* over, float* largest) {
    int32_t all;
    std::memcpy(&all, largest, 4);
    for (size_t i = 0; i < count; ++i) {
        const float size = float_of(bits_of(values[i]) & MAGNITUDE);
        const float ratio = DIVIDED ? quotient(size, over[OVER_EACH ? i : 0]) : size;
        if (EACH) {
            largest[i] = ratio > largest[i] ? ratio : largest[i];
        } else {
            const int32_t bits = int32_t(bits_of(ratio));
            all = bits > all ? bits : all;
        }
    }
    if (!EACH && count > 0) std::memcpy(largest, &all, 4);
}

void raise_largest(const float* values, size_t count, Numbers over, bool steps, float* largest) {
    with(steps, [&](auto each) {
        if (!over.first) return raise<each, false, false>(values, count, nullptr, largest);
        with(over.steps, [&](auto over_each) {
            raise<each, true, over_each>(values, count, over.first, largest);
        });
    });
}

void to_groups(const float* values, size_t count, Numbers scale, Numbers minimum, float top,
               uint8_t* codes) {
    with(scale.steps, [&](auto each) {
        for (size_t i = 0; i < count; ++i) {
            const size_t own = each ? i : 0;
            const float place = quotient(values[i] - minimum.first[own], scale.first[own]);
            const float code = place < top ? place : top;
            codes[i] = uint8_t(bits_of(code + UNSIGNED_RULER));
        }
    });
}

void from_groups(const uint8_t* codes, size_t count, Numbers scale, Numbers minimum,
                 float* values) {
    with(scale.steps, [&](auto each) {
        for (size_t i = 0; i < count; ++i) {
            const size_t own = each ? i : 0;
            values[i] = float(codes[i]) * scale.first[own] + minimum.first[own];
        }
    });
}

template <class Apply>
KVWIRE_INLINE void by_grid(float* values, size_t count, Numbers row, Numbers column, Apply apply) {
    constexpr float one = 1.0f;
    if (!column.first) column = {&one, false};
    with(row.steps, [&](auto rows) {
        with(column.steps, [&](auto columns) {
            for (size_t i = 0; i < count; ++i)
                values[i] = apply(values[i], row.first[rows ? i : 0],
                                  column.first[columns ? i : 0]);
        });
    });
}

void divide(float* values, size_t count, Numbers row, Numbers column) {
    by_grid(values, count, row, column,
            [](float value, float r, float c) { return quotient(value, r * c); });
}

void multiply(float* values, size_t count, Numbers row, Numbers column) {
    by_grid(values, count, row, column,
            [](float value, float r, float c) { return value * r * c; });
}

void to_integers(const float* values, size_t count, uint8_t* codes) {
    const uint32_t top = bits_of(127.0f);
    for (size_t i = 0; i < count; ++i) {
        const uint32_t bits = bits_of(values[i]), size = bits & MAGNITUDE;
        const float code = float_of(choose(size < top, size, top) | (bits & ~MAGNITUDE));
        codes[i] = uint8_t(bits_of(code + SIGNED_RULER));
    }
}

void from_integers(const uint8_t* codes, size_t count, float* values) {
    for (size_t i = 0; i < count; ++i) values[i] = float(int8_t(codes[i]));
}

void to_e4m3(const float* values, size_t count, uint8_t* codes) {
    for (size_t i = 0; i < count; ++i) codes[i] = uint8_t(E4m3::narrow(values[i]));
}

bool from_e4m3(const uint8_t* codes, size_t count, float* values) {
    uint8_t is_nan = 0;
    for (size_t i = 0; i < count; ++i) is_nan |= uint8_t(codes[i] << 1) == 0xFE;
    for (size_t i = 0; i < count; ++i) values[i] = E4m3::widen(codes[i]);
    return !is_nan;
}

void pack(const uint8_t* codes, size_t blocks, int bits, uint8_t* packed) {
    if (bits == 8) std::memcpy(packed, codes, BLOCK * blocks);
    if (bits == 8) return;
    for (size_t block = 0; block < blocks; ++block, codes += BLOCK, packed += 8 * bits) {
        for (size_t i = 0; i < 32; ++i) packed[i] = uint8_t((codes[i] & 15) | codes[i + 32] << 4);
        for (size_t i = 0; bits == 6 && i < 16; ++i)
            packed[32 + i] = uint8_t(codes[i] >> 4 | codes[i + 16] >> 4 << 2 |
                                     codes[i + 32] >> 4 << 4 | codes[i + 48] >> 4 << 6);
    }
}

void unpack(const uint8_t* packed, size_t blocks, int bits, uint8_t* codes) {
    if (bits == 8) std::memcpy(codes, packed, BLOCK * blocks);
    if (bits == 8) return;
    for (size_t block = 0; block < blocks; ++block, codes += BLOCK, packed += 8 * bits) {
        for (size_t i = 0; i < 32; ++i) codes[i] = packed[i] & 15;
        for (size_t i = 0; i < 32; ++i) codes[i + 32] = packed[i] >> 4;
        for (size_t i = 0; bits == 6 && i < 16; ++i) {
            const uint8_t pairs = packed[32 + i];
            codes[i] |= uint8_t((pairs & 3) << 4);
            codes[16 + i] |= uint8_t((pairs >> 2 & 3) << 4);
            codes[32 + i] |= uint8_t((pairs >> 4 & 3) << 4);
            codes[48 + i] |= uint8_t(pairs >> 6 << 4);
        }
    }
}

constexpr Kernels KERNELS = {widen,       narrow,        can_round, widen_range, raise_largest,
                             to_groups,   from_groups,   divide,    multiply,    to_integers,
                             from_integers, to_e4m3,     from_e4m3, pack,        unpack};

}  // namespace
}  // namespace kvwire::quantised
