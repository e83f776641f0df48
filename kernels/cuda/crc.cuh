// CRC32C by lanes: each thread goes down a column of words by Horner's rule, and the columns are
// added up, as kernels/crc_math.py explains. Sums do not depend on the order of their terms.
#pragma once

#include "cta.cuh"

namespace kvwire {

// Bytes of all tables, in uint32: see crc_math.cuda_tables().
struct CrcTables {
    uint32_t step[4][256];      // byte b of a register, one row of THREADS words on
    uint32_t weight[THREADS];   // of each lane in the remainder of a text
    uint32_t power[64];         // x^(8 * 2^k)
};

KVWIRE_DEVICE uint32_t crc_multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (int bit = 31; bit >= 0; --bit) {
        product ^= b & (0u - (a >> bit & 1));
        b = b >> 1 ^ (0x82F63B78u & (0u - (b & 1)));
    }
    return product;
}

// Remainder of `count` bytes at `text` times x^(8 * behind), in lanes[0]. `lanes`: THREADS words.
// Both are shared memory; begins and ends with a sync().
template <class Cta>
KVWIRE_DEVICE uint32_t crc_remainder(Cta& cta, const CrcTables& tables, const uint8_t* text,
                                     int count, int64_t behind, uint32_t* lanes) {
    constexpr int ROW_BYTES = 4 * THREADS;
    const int rows = (count + ROW_BYTES - 1) / ROW_BYTES, lead = rows * ROW_BYTES - count;
    cta.sync();
    cta.spread(THREADS, [&](int lane) {
        uint32_t state = 0;
        for (int row = 0; row < rows; ++row) {
            const int at = row * ROW_BYTES + 4 * lane - lead;
            uint32_t word = 0;
            if (at >= 0 && at % 4 == 0)
                word = *reinterpret_cast<const uint32_t*>(text + at);
            else
                for (int byte = 0; byte < 4; ++byte)
                    if (at + byte >= 0) word |= uint32_t(text[at + byte]) << 8 * byte;
            state = tables.step[0][state & 255] ^ tables.step[1][state >> 8 & 255] ^
                    tables.step[2][state >> 16 & 255] ^ tables.step[3][state >> 24] ^ word;
        }
        lanes[lane] = crc_multiply(state, tables.weight[lane]);
    });
    cta.sync();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        cta.spread(half, [&](int lane) { lanes[lane] ^= lanes[lane + half]; });
        cta.sync();
    }
    uint32_t remainder = lanes[0];
    for (int k = 0; behind >> k != 0; ++k)
        if (behind >> k & 1) remainder = crc_multiply(remainder, tables.power[k]);
    cta.sync();
    return remainder;
}

}  // namespace kvwire
