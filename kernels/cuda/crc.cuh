// CRC32C by lanes: each thread goes down a column of words by Horner's rule, over as many rows as
// lie side by side, and the columns are added up at the end, as kernels/crc_math.py explains.
// Sums do not depend on the order of their terms.
#pragma once

#include "cta.cuh"

namespace kvwire {

constexpr int CRC_ROW_BYTES = 4 * THREADS;
constexpr int CRC_SPAN_BYTES = 65'536;  // of a block that does nothing else
constexpr int CRC_DIGITS = 7;  // of 5 bits: a table of 32 words, one in each bank, has no conflicts

// Bytes of all tables, in uint32: see crc_math.cuda_tables().
struct CrcTables {
    uint32_t step[CRC_DIGITS][32];  // a digit of a register, one row on
    uint32_t weight[THREADS];       // of each column in the remainder of a text
    uint32_t power[64];             // x^(8 * 2^k)
};

struct CrcMemory {  // shared
    uint32_t step[CRC_DIGITS][32];
    uint32_t sums[WARPS];
    uint32_t remainder;  // of what was folded: the first thread's
};

KVWIRE_DEVICE uint32_t crc_multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
#pragma unroll 2
    for (int bit = 31; bit >= 0; --bit) {
        product ^= b & (0u - (a >> bit & 1));
        b = b >> 1 ^ (0x82F63B78u & (0u - (b & 1)));
    }
    return product;
}

// The remainder of a text that is added piece by piece. Without tables it does nothing.
class RunningCrc {
public:
    // Needs a sync() before the first add().
    KVWIRE_DEVICE RunningCrc(const CrcTables* tables, CrcMemory& memory)
        : tables_(tables), memory_(memory) {
        if (tables && threadIdx.x < CRC_DIGITS * 32)
            memory_.step[threadIdx.x / 32][threadIdx.x % 32] =
                tables->step[threadIdx.x / 32][threadIdx.x % 32];
        if (threadIdx.x == 0) memory_.remainder = 0;
    }

    // Adds `count` bytes of shared memory. All threads; includes sync()s where count is no
    // multiple of CRC_ROW_BYTES.
    KVWIRE_DEVICE void add(DeviceCta& cta, const uint8_t* text, int count) {
        if (!tables_) return;
        const int rows = (count + CRC_ROW_BYTES - 1) / CRC_ROW_BYTES;
        const int lead = rows * CRC_ROW_BYTES - count;
        if (lead == 0) {
            const uint32_t* const words = reinterpret_cast<const uint32_t*>(text) + threadIdx.x;
#pragma unroll 4
            for (int row = 0; row < rows; ++row)
                column_ = stepped(column_) ^ words[row * THREADS];
            pending_bytes_ += count;
            return;
        }
        fold(cta);
#pragma unroll 1
        for (int row = 0; row < rows; ++row) {
            const int at = row * CRC_ROW_BYTES + 4 * int(threadIdx.x) - lead;
            uint32_t word = 0;
            for (int byte = 0; byte < 4; ++byte)
                if (at + byte >= 0) word |= uint32_t(text[at + byte]) << 8 * byte;
            column_ = stepped(column_) ^ word;
        }
        pending_bytes_ = count;
        fold(cta);
    }

    // Adds the remainder, `behind` bytes before a chunk's end, to `*crc`, and begins anew. All
    // threads; includes sync()s.
    KVWIRE_DEVICE void flush(DeviceCta& cta, int64_t behind, uint32_t* crc) {
        if (!tables_) return;
        fold(cta);
        if (!cta.leads()) return;
        add_bits(crc, moved(memory_.remainder, behind));
        memory_.remainder = 0;
    }

private:
    KVWIRE_DEVICE uint32_t stepped(uint32_t state) const {
        uint32_t next = memory_.step[0][state & 31];
#pragma unroll
        for (int digit = 1; digit < CRC_DIGITS; ++digit)
            next ^= memory_.step[digit][state >> 5 * digit & 31];
        return next;
    }

    KVWIRE_DEVICE uint32_t moved(uint32_t remainder, int64_t bytes) const {
#pragma unroll 1
        for (int k = 0; remainder != 0 && bytes >> k != 0; ++k)
            if (bytes >> k & 1) remainder = crc_multiply(remainder, tables_->power[k]);
        return remainder;
    }

    // The columns to memory_.remainder.
    KVWIRE_DEVICE void fold(DeviceCta& cta) {
        if (pending_bytes_ == 0) return;
        const uint32_t sum = __reduce_xor_sync(
            ALL_LANES, crc_multiply(column_, tables_->weight[threadIdx.x]));
        if (threadIdx.x % 32 == 0) memory_.sums[threadIdx.x / 32] = sum;
        cta.sync();
        if (cta.leads()) {
            uint32_t remainder = moved(memory_.remainder, pending_bytes_);
            for (int warp = 0; warp < WARPS; ++warp) remainder ^= memory_.sums[warp];
            memory_.remainder = remainder;
        }
        cta.sync();
        column_ = 0;
        pending_bytes_ = 0;
    }

    const CrcTables* tables_;
    CrcMemory& memory_;
    uint32_t column_ = 0;
    int pending_bytes_ = 0;
};

}  // namespace kvwire
