// Slicing by eight: one table look-up per byte, eight bytes per step.
#include <array>

#include "base/bytes.hpp"
#include "checksum/crc32c_math.hpp"
#include "checksum/crc32c_variants.hpp"

namespace kvwire {
namespace {

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// tables[k][b] is byte b followed by k zero bytes.
constexpr Tables make_tables() {
    Tables tables{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t state = byte;
        for (int bit = 0; bit < 8; ++bit) state = crc32c_math::times_x(state);
        tables[0][byte] = state;
    }
    for (size_t k = 1; k < 8; ++k) {
        for (size_t byte = 0; byte < 256; ++byte) {
            const uint32_t before = tables[k - 1][byte];
            tables[k][byte] = before >> 8 ^ tables[0][before & 0xFF];
        }
    }
    return tables;
}

constexpr Tables kTables = make_tables();

}  // namespace

uint32_t crc32c_portable(uint32_t crc, const void* data, size_t size) {
    const auto* at = static_cast<const uint8_t*>(data);
    uint32_t state = ~crc;
    for (; size >= 8; at += 8, size -= 8) {
        const uint64_t word = load_le<uint64_t>(at) ^ state;
        state = 0;
        for (int byte = 0; byte < 8; ++byte) state ^= kTables[7 - byte][word >> 8 * byte & 0xFF];
    }
    for (; size > 0; ++at, --size) state = state >> 8 ^ kTables[0][(state ^ *at) & 0xFF];
    return ~state;
}

}  // namespace kvwire
