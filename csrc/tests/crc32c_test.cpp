#include "checksum/crc32c.hpp"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "tests/test.hpp"

namespace kvwire {
namespace {

uint32_t bitwise(uint32_t crc, const uint8_t* data, size_t size) {
    uint32_t state = ~crc;
    for (size_t i = 0; i < size; ++i) {
        state ^= data[i];
        for (int bit = 0; bit < 8; ++bit) state = state >> 1 ^ (state & 1 ? 0x82F63B78 : 0);
    }
    return ~state;
}

std::vector<uint8_t> pattern(size_t size) {
    std::vector<uint8_t> bytes(size);
    uint32_t state = 1;
    for (uint8_t& byte : bytes) byte = (state = state * 1664525 + 1013904223) >> 24;
    return bytes;
}

// Each size gets a heap block of its own, so the sanitizer sees any read past its end.
TEST(crc32c_variants_read_only_their_bytes_and_agree) {
    const std::vector<uint8_t> text = pattern(20000);
    for (size_t size = 0; size < text.size(); size += size < 1200 ? 1 : 613) {
        std::unique_ptr<uint8_t[]> exact(new uint8_t[size]);
        std::copy_n(text.begin(), size, exact.get());
        const uint32_t expected = bitwise(0x12345678, exact.get(), size);
        for (const Crc32cVariant& variant : crc32c_variants()) {
            if (!variant.supported) continue;
            CHECK_EQ(variant.function(0x12345678, exact.get(), size), expected);
        }
    }
}

TEST(crc32c_check_value) {
    CHECK_EQ(crc32c(0, "123456789", 9), 0xE3069283u);
    CHECK_EQ(crc32c(0, nullptr, 0), 0u);
}

TEST(crc32c_combine_joins_any_split) {
    const std::vector<uint8_t> text = pattern(500);
    const uint32_t whole = crc32c(0, text.data(), text.size());
    for (size_t cut = 0; cut <= text.size(); ++cut) {
        const uint32_t a = crc32c(0, text.data(), cut);
        const uint32_t b = crc32c(0, text.data() + cut, text.size() - cut);
        CHECK_EQ(crc32c_combine(a, b, text.size() - cut), whole);
    }
}

}  // namespace
}  // namespace kvwire
