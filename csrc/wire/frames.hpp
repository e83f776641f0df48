#pragma once
// Greeting and frame header (FORMAT.md sections 5, 6): encode, and decode with every check in
// order. Decoding throws Error; nothing here allocates but the error's message.

#include <cstdint>
#include <string>

#include "base/error.hpp"
#include "wire/format.hpp"

namespace kvwire {

struct Greeting {
    uint16_t version = FORMAT_VERSION;
    uint16_t version_min = 1;
    Role role = Role::SENDER;
    uint16_t flags = 0;  // GREETING_FLAG_*
    Id link_id;
    uint16_t lane_index = 0;
    uint16_t lane_count = 1;
    uint32_t codecs = 1;
    uint32_t payload_bytes_max = uint32_t(limits::chunk_bytes_max);
    uint32_t control_bytes_max = uint32_t(limits::control_bytes_max);
    uint32_t transfers_max = 1024;
};

struct FrameHeader {
    FrameType type{};
    uint32_t payload_bytes = 0;
    Id transfer_id;
    uint32_t segment_index = 0;
    uint32_t attempt = 0;
    uint64_t raw_offset = 0;
    uint32_t raw_bytes = 0;
    uint32_t raw_crc = 0;
    uint32_t payload_crc = 0;
    uint32_t table_index = 0;
    uint8_t codec = 0;

    bool skippable() const { return uint8_t(type) >= SKIPPABLE_TYPE_MIN; }
    bool is_known() const;
};

// What this end accepts from the peer.
struct FrameLimits {
    uint32_t payload_bytes_max = uint32_t(limits::chunk_bytes_max);
    uint32_t control_bytes_max = uint32_t(limits::control_bytes_max);
};

void encode_greeting(const Greeting& greeting, uint8_t* out);
Greeting decode_greeting(const uint8_t* in);

void encode_header(const FrameHeader& header, uint8_t* out);
FrameHeader decode_header(const uint8_t* in, const FrameLimits& limits);

// Checks a control payload against the header's checksum; throws CONTROL_CORRUPT.
void check_control_payload(const FrameHeader& header, const uint8_t* payload);

const char* frame_type_name(FrameType type);
std::string hex(const Id& id);
std::string hex32(uint32_t value);

}  // namespace kvwire
