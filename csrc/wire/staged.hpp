#pragma once
// Chunks that a device has read, checked and coded already: what is left is to send them.

#include <cstdint>
#include <vector>

#include "codec/codec.hpp"

namespace kvwire {

struct StagedChunk {
    const uint8_t* payload = nullptr;  // borrowed until the push completes
    uint32_t payload_bytes = 0;
    uint32_t raw_crc = 0;
    Codec codec = Codec::RAW;
};

// All chunks of one segment, in order.
struct StagedSegment {
    uint32_t chunk_bytes = 0;
    std::vector<StagedChunk> chunks;
};

}  // namespace kvwire
