// Where the pieces of a part lie (FORMAT.md section 9.1): what encoder and decoder share.
#pragma once

#include "codec/tiered.hpp"
#include "codec/tiered_variants.hpp"

namespace kvwire {

namespace part_at {
constexpr size_t RAW_BYTES = 0, CODED_BYTES = 4, TABLE_INDEX = 8, POSITION = 12;
}  // namespace part_at
constexpr size_t PART_HEADER_BYTES = 16;
constexpr size_t PART_ALIGNMENT = 16;

constexpr int FORM_SHIFT = 14;
constexpr uint16_t TAIL_BYTES_MASK = (1 << FORM_SHIFT) - 1;

constexpr size_t part_padded(size_t bytes) {
    return (bytes + PART_ALIGNMENT - 1) / PART_ALIGNMENT * PART_ALIGNMENT;
}

inline size_t item_bytes_of(const CodeTable* table) {
    return table ? table->format().item_bytes : 1;
}

inline size_t index_bytes(size_t raw_bytes, size_t item_bytes) {
    return part_padded(2 * div_ceil(raw_bytes, STRIP_ELEMENTS * item_bytes));
}

// Where tier 1 begins in the body of a strip of form TIERED.
inline size_t tier_1_at(const CodeTable& table, size_t count) {
    const size_t verbatim_bits = table.format().verbatim_bits;
    return count * (verbatim_bits / 8) + verbatim_bits % 8 * plane_bytes(count);
}

inline size_t body_bytes(const CodeTable& table, size_t count) {
    return tier_1_at(table, count) + size_t(table.tier_bits(0)) * plane_bytes(count);
}

// Asks for memory that is soon to be read or written, and does not wait for it. There need be none.
template <int WRITTEN>
inline void prefetch(const uint8_t* at, size_t bytes) {
    constexpr size_t LINE_BYTES = 64;
    for (size_t i = 0; i < bytes; i += LINE_BYTES) __builtin_prefetch(at + i, WRITTEN, 2);
}

}  // namespace kvwire
