// Byte planes: FORMAT.md section 9. The bytes of the elements that vary least (sign, exponent) come
// to lie side by side, where LZ4 finds them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvwire {

// Both sides hold `raw_bytes` and must not overlap; `item_bytes` is at least 1.
void split_planes(const uint8_t* raw, size_t raw_bytes, uint32_t item_bytes, uint8_t* planes);
void join_planes(const uint8_t* planes, size_t raw_bytes, uint32_t item_bytes, uint8_t* raw);

}  // namespace kvwire
