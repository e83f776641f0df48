// CRC32C (Castagnoli, RFC 3720): the one checksum of the format.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvwire {

// Extends `crc`, which covers the bytes before `data`; start with 0.
// crc32c(0, "123456789", 9) == 0xE3069283.
using Crc32cFunction = uint32_t (*)(uint32_t crc, const void* data, size_t size);

uint32_t crc32c(uint32_t crc, const void* data, size_t size);

// The CRC of A followed by B, from the CRCs of both and the length of B; reads no data.
uint32_t crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t b_bytes);

struct Crc32cVariant {
    const char* name;
    bool supported;
    Crc32cFunction function;
};

// Every variant compiled in, fastest first; only supported ones may be called.
const std::vector<Crc32cVariant>& crc32c_variants();

// Name of the variant behind crc32c(): the one that the environment variable KVWIRE_CRC32C
// names, else the first supported one. Throws std::invalid_argument for a name that is
// unknown or not supported here; so does crc32c(), hence call this one once at start-up.
const char* crc32c_active();

}  // namespace kvwire
