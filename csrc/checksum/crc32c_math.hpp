// Polynomials over GF(2) modulo the Castagnoli polynomial, in CRC32C's bit-reflected form:
// bit 31 of a word is the coefficient of x^0, bit 0 that of x^31. Appending n zero bytes to a
// text multiplies its CRC register by x^(8n), which is all that folding and combining do.
#pragma once

#include <cstdint>

namespace kvwire::crc32c_math {

constexpr uint32_t kPolynomial = 0x82F63B78;

constexpr uint32_t times_x(uint32_t a) { return a & 1 ? a >> 1 ^ kPolynomial : a >> 1; }

constexpr uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1, b = times_x(b)) {
        if (a & bit) product ^= b;
    }
    return product;
}

constexpr uint32_t x_to_the(uint64_t exponent) {
    uint32_t result = 1u << 31, power = 1u << 30;
    for (; exponent != 0; exponent >>= 1, power = multiply(power, power)) {
        if (exponent & 1) result = multiply(result, power);
    }
    return result;
}

}  // namespace kvwire::crc32c_math
