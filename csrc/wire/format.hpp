#pragma once
// FORMAT.md as constants. Nothing else lives here; tests compare every number with the document.

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

namespace kvwire {

constexpr uint8_t GREETING_MAGIC[8] = {0x4B, 0x56, 0x57, 0x49, 0x52, 0x45, 0x0D, 0x0A};
constexpr uint8_t FRAME_MAGIC[2] = {0x4B, 0x57};
constexpr uint16_t FORMAT_VERSION = 1;
constexpr size_t GREETING_BYTES = 64;
constexpr size_t HEADER_BYTES = 64;

enum class Role : uint8_t { SENDER = 1, RECEIVER = 2, FILE = 3 };

enum class FrameType : uint8_t {
    MANIFEST = 0x01, GRANT = 0x02, SEGMENT = 0x03, CHUNK = 0x04, SEGMENT_END = 0x05, END = 0x06,
    RECEIPT = 0x07, REPAIR = 0x08, ABORT = 0x09, PULL = 0x0A, DONE = 0x0B, INDEX = 0x0C,
    COMMIT = 0x0D, CLOSE = 0x0E, PING = 0x80, PONG = 0x81,
    TABLE_NAMES = 0x82, TABLE_ANSWER = 0x83, TABLE = 0x84, SPEEDS = 0x85,
};
constexpr uint8_t SKIPPABLE_TYPE_MIN = 0x80;

// Offsets of header and greeting fields (FORMAT.md sections 5 and 6).
namespace greeting_at {
enum : size_t {
    MAGIC = 0, VERSION = 8, VERSION_MIN = 10, ROLE = 12, RESERVED_A = 13, FLAGS = 14, LINK_ID = 16,
    LANE_INDEX = 32, LANE_COUNT = 34, CODECS = 36, PAYLOAD_BYTES_MAX = 40, CONTROL_BYTES_MAX = 44,
    TRANSFERS_MAX = 48, RESERVED_B = 52, GREETING_CRC = 60,
};
}
namespace header_at {
enum : size_t {
    MAGIC = 0, TYPE = 2, FLAGS = 3, PAYLOAD_BYTES = 4, TRANSFER_ID = 8, SEGMENT_INDEX = 24,
    ATTEMPT = 28, RAW_OFFSET = 32, RAW_BYTES = 40, RAW_CRC = 44, PAYLOAD_CRC = 48, TABLE_INDEX = 52,
    CODEC = 56, UNUSED = 57, RESERVED = 58, HEADER_CRC = 60,
};
}
constexpr uint16_t GREETING_FLAGS_RESERVED = 0x00FF;
constexpr uint16_t GREETING_FLAG_PROOF = 0x0100, GREETING_FLAG_JOIN = 0x0200;
constexpr uint8_t HEADER_FLAGS_RESERVED = 0x0F;
constexpr uint8_t TENSOR_FLAG_REPLICATED = 0x01;

// Fixed parts of control payloads (section 7).
constexpr size_t MANIFEST_FIXED_BYTES = 64, GRANT_BYTES = 16, SEGMENT_FIXED_BYTES = 16,
                 ITEM_BYTES = 24, SEGMENT_END_BYTES = 8, END_FIXED_BYTES = 24, RECEIPT_BYTES = 16,
                 REPAIR_BYTES = 24, ABORT_FIXED_BYTES = 32, PULL_BYTES = 48, DONE_BYTES = 16,
                 COMMIT_BYTES = 32, PING_BYTES = 8, TABLE_NAME_BYTES = 24,
                 TABLE_ANSWER_BYTES = 8, TABLE_FIXED_BYTES = 8, SPEEDS_FIXED_BYTES = 16,
                 SPEED_BYTES = 16;

// Section 10.
namespace limits {
constexpr uint64_t chunk_bytes_min = 4096, chunk_bytes_max = 4194304, payload_bytes_min = 65536,
                   control_bytes_min = 65536, control_bytes_max = 1048576,
                   index_bytes_max = 67108864, lane_count_max = 64, rank_count_max = 4096,
                   group_count_max = 64, tensor_count_max = 16, layer_count_max = 4096,
                   axis_count_max = 5, slice_count_max = 16, extent_max = 16777216,
                   name_bytes_max = 255, metadata_count_max = 64, metadata_bytes_max = 65536,
                   message_bytes_max = 1024, item_count_max = 4096, receipt_count_max = 4096,
                   repair_count_max = 2730, segment_count_max = 65536,
                   segment_bytes_max = 1099511627776, token_count_max = 4294967296,
                   attempts_max = 8, attempt_max = 65535, leaf_count_max = 262144,
                   waiting_manifests_max = 64, ended_transfers_min = 4096,
                   greeting_timeout_ms = 5000, admission_key_bytes_min = 16,
                   admissions_max = 256, admissions_per_address_max = 64, lease_ms = 10000,
                   stall_ms = 200, table_count_max = 4096, table_entry_count_max = 1024,
                   table_bytes_max = 16777216, speed_count_max = 64;
static_assert(chunk_bytes_max % chunk_bytes_min == 0);
static_assert(SEGMENT_FIXED_BYTES + item_count_max * ITEM_BYTES <= control_bytes_max);
static_assert(receipt_count_max * RECEIPT_BYTES <= control_bytes_min);
static_assert(repair_count_max * REPAIR_BYTES <= control_bytes_min);
static_assert(END_FIXED_BYTES + metadata_bytes_max <= control_bytes_max);
static_assert(segment_bytes_max / chunk_bytes_min < UINT32_MAX);
}  // namespace limits

struct Id {
    std::array<uint8_t, 16> bytes{};
    bool operator==(const Id& other) const { return bytes == other.bytes; }
    bool operator!=(const Id& other) const { return bytes != other.bytes; }
    bool operator<(const Id& other) const { return bytes < other.bytes; }
    bool is_zero() const { return bytes == std::array<uint8_t, 16>{}; }
};

struct IdHash {
    size_t operator()(const Id& id) const {
        size_t value;  // ids are random: any eight bytes are a hash
        std::memcpy(&value, id.bytes.data(), sizeof value);
        return value;
    }
};

}  // namespace kvwire
