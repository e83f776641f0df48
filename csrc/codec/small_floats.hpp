// Binary32 to and from narrower floating-point numbers, without branches, so that loops over them
// are vectorised. Subnormal numbers must not be flushed to zero in this thread.
#pragma once

#include <cstdint>
#include <cstring>

// Files that are compiled for wider vectors include this: so no copy of theirs may be shared.
#define KVWIRE_INLINE inline __attribute__((always_inline))

namespace kvwire {

KVWIRE_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

KVWIRE_INLINE float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

constexpr uint32_t MAGNITUDE = 0x7FFFFFFF;

// By masks, because a compiler must not make branches of it.
KVWIRE_INLINE uint32_t choose(bool condition, uint32_t yes, uint32_t no) {
    const uint32_t mask = -uint32_t(condition);
    return (yes & mask) | (no & ~mask);
}

// A format of 1 sign bit, `EXPONENT` bits and `MANTISSA` bits; `TOP` is its largest finite code.
template <int EXPONENT, int MANTISSA, uint32_t TOP>
struct SmallFloat {
    static constexpr int BIAS = (1 << (EXPONENT - 1)) - 1;
    static constexpr int SHIFT = 23 - MANTISSA;
    static constexpr int SIGN_SHIFT = 31 - EXPONENT - MANTISSA;
    static constexpr uint32_t CODE_MASK = (uint32_t{1} << (EXPONENT + MANTISSA)) - 1;

    // To nearest, ties to even; what would become infinite, to TOP.
    static KVWIRE_INLINE uint32_t narrow(float value) {
        const uint32_t bits = bits_of(value), magnitude = bits & MAGNITUDE;
        const uint32_t half = (1u << (SHIFT - 1)) - 1 + (magnitude >> SHIFT & 1);
        const uint32_t normal = ((magnitude + half) >> SHIFT) - (uint32_t(127 - BIAS) << MANTISSA);
        // Its last place is that of the format's subnormal numbers: the sum is rounded there.
        constexpr uint32_t ruler = uint32_t(127 + 23 + 1 - BIAS - MANTISSA) << 23;
        const uint32_t subnormal = bits_of(float_of(magnitude) + float_of(ruler)) - ruler;
        const uint32_t code =
            choose(magnitude < uint32_t(128 - BIAS) << 23, subnormal, normal);
        return (code < TOP ? code : TOP) | (bits >> 31 << (EXPONENT + MANTISSA));
    }

    // Finite codes only.
    static KVWIRE_INLINE float widen(uint32_t code) {
        const float magnitude = float_of((code & CODE_MASK) << SHIFT) * float_of(SCALE_BITS);
        return float_of(bits_of(magnitude) | (code & ~CODE_MASK) << SIGN_SHIFT);
    }

private:
    static constexpr uint32_t SCALE_BITS = uint32_t(254 - BIAS) << 23;
};

using Bf16 = SmallFloat<8, 7, 0x7F7F>;
using Fp16 = SmallFloat<5, 10, 0x7BFF>;
using E4m3 = SmallFloat<4, 3, 0x7E>;

// The next bf16 away from zero, and the next one below, as binary32. Of finite numbers.
KVWIRE_INLINE float bf16_up(float value) {
    return float_of((bits_of(value) + 0xFFFF) & 0xFFFF0000);
}
KVWIRE_INLINE float bf16_down(float value) {
    const uint32_t bits = bits_of(value);
    return float_of((bits + (bits >> 31 ? 0xFFFF : 0)) & 0xFFFF0000);
}

}  // namespace kvwire
