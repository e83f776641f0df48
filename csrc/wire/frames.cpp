#include "wire/frames.hpp"

#include <cstring>

#include "base/bytes.hpp"
#include "checksum/crc32c.hpp"

namespace kvwire {
namespace {

[[noreturn]] void fail(ErrorCode code, const std::string& what, uint64_t expected, uint64_t actual,
                       uint64_t offset) {
    throw Error(code, what, expected, actual, offset);
}

void require_zero(const uint8_t* in, size_t offset, size_t count, const char* where) {
    for (size_t i = offset; i < offset + count; ++i)
        if (in[i] != 0)
            fail(ErrorCode::RESERVED_BIT_SET,
                 std::string(where) + ": reserved byte " + std::to_string(i) + " is not 0", 0,
                 in[i], i);
}

struct PayloadRule {
    uint64_t min, max, step;  // payload_bytes = min + k * step; step 0: anything up to max
};

PayloadRule payload_rule(FrameType type, const FrameLimits& limit) {
    const uint64_t control = limit.control_bytes_max;
    switch (type) {
        case FrameType::MANIFEST: return {MANIFEST_FIXED_BYTES, control, 0};
        case FrameType::GRANT: return {GRANT_BYTES, GRANT_BYTES, 0};
        case FrameType::SEGMENT:
            return {SEGMENT_FIXED_BYTES + ITEM_BYTES,
                    SEGMENT_FIXED_BYTES + limits::item_count_max * ITEM_BYTES, ITEM_BYTES};
        case FrameType::CHUNK: return {1, limit.payload_bytes_max, 0};
        case FrameType::SEGMENT_END: return {SEGMENT_END_BYTES, SEGMENT_END_BYTES, 0};
        case FrameType::END:
            return {END_FIXED_BYTES, END_FIXED_BYTES + limits::metadata_bytes_max, 0};
        case FrameType::RECEIPT:
            return {RECEIPT_BYTES, limits::receipt_count_max * RECEIPT_BYTES, RECEIPT_BYTES};
        case FrameType::REPAIR:
            return {REPAIR_BYTES, limits::repair_count_max * REPAIR_BYTES, REPAIR_BYTES};
        case FrameType::ABORT:
            return {ABORT_FIXED_BYTES, ABORT_FIXED_BYTES + limits::message_bytes_max, 0};
        case FrameType::PULL: return {PULL_BYTES, PULL_BYTES, 0};
        case FrameType::DONE: return {DONE_BYTES, DONE_BYTES, 0};
        case FrameType::INDEX: return {0, limits::index_bytes_max, 8};
        case FrameType::COMMIT: return {COMMIT_BYTES, COMMIT_BYTES, 0};
        case FrameType::CLOSE: return {0, 0, 0};
        default: return {0, control, 0};
    }
}

void check_payload_bytes(const FrameHeader& header, const FrameLimits& limit) {
    const PayloadRule rule = payload_rule(header.type, limit);
    const uint64_t bytes = header.payload_bytes;
    const std::string name = frame_type_name(header.type);
    if (bytes > rule.max)
        fail(ErrorCode::LIMIT_EXCEEDED,
             name + ": payload_bytes " + std::to_string(bytes) + " over the limit of " +
                 std::to_string(rule.max),
             rule.max, bytes, header_at::PAYLOAD_BYTES);
    if (bytes < rule.min || (rule.step && (bytes - rule.min) % rule.step))
        fail(ErrorCode::TRUNCATED,
             name + ": payload_bytes " + std::to_string(bytes) + " does not hold its structure",
             rule.min, bytes, header_at::PAYLOAD_BYTES);
}

void field_must_be_zero(const FrameHeader& header, bool is_zero, const char* field, size_t offset) {
    if (!is_zero)
        fail(ErrorCode::FIELD_INVALID,
             std::string(frame_type_name(header.type)) + ": " + field + " must be 0", 0, 1, offset);
}

void check_chunk_fields(const FrameHeader& header) {
    if (header.raw_bytes == 0 || header.raw_bytes > limits::chunk_bytes_max)
        fail(ErrorCode::FIELD_INVALID,
             "CHUNK: raw_bytes " + std::to_string(header.raw_bytes) + " out of range",
             limits::chunk_bytes_max, header.raw_bytes, header_at::RAW_BYTES);
    if (header.attempt > limits::attempt_max)
        fail(ErrorCode::LIMIT_EXCEEDED,
             "CHUNK: attempt " + std::to_string(header.attempt) + " over the limit",
             limits::attempt_max, header.attempt, header_at::ATTEMPT);
    if (header.raw_offset % limits::chunk_bytes_min)
        fail(ErrorCode::FIELD_INVALID, "CHUNK: raw_offset is on no grid of chunks",
             limits::chunk_bytes_min, header.raw_offset, header_at::RAW_OFFSET);
    // Codec and table are judged with the transfer: they fail it, not the lane.
    if (header.codec == 0) {
        if (header.payload_bytes != header.raw_bytes)
            fail(ErrorCode::FIELD_INVALID, "CHUNK: raw codec, but payload_bytes != raw_bytes",
                 header.raw_bytes, header.payload_bytes, header_at::PAYLOAD_BYTES);
        if (header.payload_crc != header.raw_crc)
            fail(ErrorCode::FIELD_INVALID, "CHUNK: raw codec, but payload_crc != raw_crc",
                 header.raw_crc, header.payload_crc, header_at::PAYLOAD_CRC);
    } else if (header.payload_bytes >= header.raw_bytes) {
        fail(ErrorCode::FIELD_INVALID, "CHUNK: coded payload is not smaller than its raw bytes",
             header.raw_bytes, header.payload_bytes, header_at::PAYLOAD_BYTES);
    }
}

void check_fields(const FrameHeader& header) {
    const bool chunk = header.type == FrameType::CHUNK;
    const bool segment = chunk || header.type == FrameType::SEGMENT ||
                         header.type == FrameType::SEGMENT_END;
    const bool link_wide = header.type == FrameType::ABORT || header.type == FrameType::CLOSE;
    if (header.type == FrameType::CLOSE)
        field_must_be_zero(header, header.transfer_id.is_zero(), "transfer_id",
                           header_at::TRANSFER_ID);
    else if (!link_wide && header.transfer_id.is_zero())
        fail(ErrorCode::FIELD_INVALID,
             std::string(frame_type_name(header.type)) + ": transfer_id is zero", 1, 0,
             header_at::TRANSFER_ID);
    if (!segment)
        field_must_be_zero(header, header.segment_index == 0, "segment_index",
                           header_at::SEGMENT_INDEX);
    else if (header.segment_index >= limits::segment_count_max)
        fail(ErrorCode::LIMIT_EXCEEDED,
             "segment_index " + std::to_string(header.segment_index) + " over the limit",
             limits::segment_count_max - 1, header.segment_index, header_at::SEGMENT_INDEX);
    if (chunk) return check_chunk_fields(header);
    field_must_be_zero(header, header.attempt == 0, "attempt", header_at::ATTEMPT);
    field_must_be_zero(header, header.raw_offset == 0, "raw_offset", header_at::RAW_OFFSET);
    field_must_be_zero(header, header.raw_bytes == 0, "raw_bytes", header_at::RAW_BYTES);
    field_must_be_zero(header, header.raw_crc == 0, "raw_crc", header_at::RAW_CRC);
    field_must_be_zero(header, header.table_index == 0, "table_index", header_at::TABLE_INDEX);
    field_must_be_zero(header, header.codec == 0, "codec", header_at::CODEC);
}

}  // namespace

bool FrameHeader::is_known() const {
    const auto holds_entries = [this](size_t entry_bytes) {
        return payload_bytes > 0 && payload_bytes % entry_bytes == 0 &&
               payload_bytes / entry_bytes <= limits::table_entry_count_max;
    };
    switch (type) {
        case FrameType::PING: case FrameType::PONG: return payload_bytes == PING_BYTES;
        case FrameType::TABLE_NAMES: return holds_entries(TABLE_NAME_BYTES);
        case FrameType::TABLE_ANSWER: return holds_entries(TABLE_ANSWER_BYTES);
        case FrameType::TABLE: return payload_bytes >= TABLE_FIXED_BYTES;
        case FrameType::SPEEDS: return true;  // what it holds is judged by who hears it
        default: return !skippable();
    }
}

const char* frame_type_name(FrameType type) {
    switch (type) {
        case FrameType::MANIFEST: return "MANIFEST";
        case FrameType::GRANT: return "GRANT";
        case FrameType::SEGMENT: return "SEGMENT";
        case FrameType::CHUNK: return "CHUNK";
        case FrameType::SEGMENT_END: return "SEGMENT_END";
        case FrameType::END: return "END";
        case FrameType::RECEIPT: return "RECEIPT";
        case FrameType::REPAIR: return "REPAIR";
        case FrameType::ABORT: return "ABORT";
        case FrameType::PULL: return "PULL";
        case FrameType::DONE: return "DONE";
        case FrameType::INDEX: return "INDEX";
        case FrameType::COMMIT: return "COMMIT";
        case FrameType::CLOSE: return "CLOSE";
        case FrameType::TABLE_NAMES: return "TABLE_NAMES";
        case FrameType::TABLE_ANSWER: return "TABLE_ANSWER";
        case FrameType::TABLE: return "TABLE";
        case FrameType::PING: return "PING";
        case FrameType::PONG: return "PONG";
        case FrameType::SPEEDS: return "SPEEDS";
    }
    return uint8_t(type) >= SKIPPABLE_TYPE_MIN ? "skippable frame" : "unknown frame";
}

std::string hex(const Id& id) {
    static const char digits[] = "0123456789abcdef";
    std::string text;
    for (uint8_t byte : id.bytes) {
        text += digits[byte >> 4];
        text += digits[byte & 15];
    }
    return text;
}

std::string hex32(uint32_t value) {
    static const char digits[] = "0123456789ABCDEF";
    std::string text = "0x";
    for (int shift = 28; shift >= 0; shift -= 4) text += digits[(value >> shift) & 15];
    return text;
}

void encode_greeting(const Greeting& g, uint8_t* out) {
    std::memset(out, 0, GREETING_BYTES);
    std::memcpy(out, GREETING_MAGIC, sizeof GREETING_MAGIC);
    store_le<uint16_t>(out + greeting_at::VERSION, g.version);
    store_le<uint16_t>(out + greeting_at::VERSION_MIN, g.version_min);
    out[greeting_at::ROLE] = uint8_t(g.role);
    store_le<uint16_t>(out + greeting_at::FLAGS, g.flags);
    std::memcpy(out + greeting_at::LINK_ID, g.link_id.bytes.data(), 16);
    store_le<uint16_t>(out + greeting_at::LANE_INDEX, g.lane_index);
    store_le<uint16_t>(out + greeting_at::LANE_COUNT, g.lane_count);
    store_le<uint32_t>(out + greeting_at::CODECS, g.codecs);
    store_le<uint32_t>(out + greeting_at::PAYLOAD_BYTES_MAX, g.payload_bytes_max);
    store_le<uint32_t>(out + greeting_at::CONTROL_BYTES_MAX, g.control_bytes_max);
    store_le<uint32_t>(out + greeting_at::TRANSFERS_MAX, g.transfers_max);
    store_le<uint32_t>(out + greeting_at::GREETING_CRC,
                       crc32c(0, out, greeting_at::GREETING_CRC));
}

Greeting decode_greeting(const uint8_t* in) {
    using namespace greeting_at;
    if (std::memcmp(in, GREETING_MAGIC, sizeof GREETING_MAGIC) != 0)
        fail(ErrorCode::BAD_MAGIC, "greeting: these are not kvwire's first bytes", 0, in[0], MAGIC);
    const uint32_t stated = load_le<uint32_t>(in + GREETING_CRC);
    const uint32_t actual = crc32c(0, in, GREETING_CRC);
    if (stated != actual)
        fail(ErrorCode::GREETING_CORRUPT,
             "greeting: checksum " + hex32(stated) + " stated, " + hex32(actual) + " computed",
             stated, actual, GREETING_CRC);
    Greeting g;
    g.version = load_le<uint16_t>(in + VERSION);
    g.version_min = load_le<uint16_t>(in + VERSION_MIN);
    if (g.version < 1 || g.version_min < 1 || g.version_min > g.version ||
        g.version_min > FORMAT_VERSION)
        fail(ErrorCode::VERSION_UNSUPPORTED,
             "greeting: peer speaks versions " + std::to_string(g.version_min) + " to " +
                 std::to_string(g.version) + ", this side speaks 1",
             FORMAT_VERSION, g.version_min, VERSION);
    const uint8_t role = in[ROLE];
    if (role < 1 || role > 3)
        fail(ErrorCode::FIELD_INVALID, "greeting: role " + std::to_string(role), 3, role, ROLE);
    g.role = Role(role);
    require_zero(in, RESERVED_A, 1, "greeting");
    const uint16_t flags = load_le<uint16_t>(in + FLAGS);
    if (flags & GREETING_FLAGS_RESERVED)
        fail(ErrorCode::RESERVED_BIT_SET, "greeting: reserved flag set", 0, flags, FLAGS);
    g.flags = flags & (GREETING_FLAG_PROOF | GREETING_FLAG_JOIN);
    if (g.flags == GREETING_FLAG_JOIN)
        fail(ErrorCode::FIELD_INVALID, "greeting: a lane that joins a link must prove it", 0, flags,
             FLAGS);
    std::memcpy(g.link_id.bytes.data(), in + LINK_ID, 16);
    g.lane_index = load_le<uint16_t>(in + LANE_INDEX);
    g.lane_count = load_le<uint16_t>(in + LANE_COUNT);
    g.codecs = load_le<uint32_t>(in + CODECS);
    g.payload_bytes_max = load_le<uint32_t>(in + PAYLOAD_BYTES_MAX);
    g.control_bytes_max = load_le<uint32_t>(in + CONTROL_BYTES_MAX);
    g.transfers_max = load_le<uint32_t>(in + TRANSFERS_MAX);
    const auto invalid = [](const char* field, uint64_t value, size_t offset) {
        fail(ErrorCode::FIELD_INVALID,
             std::string("greeting: ") + field + " " + std::to_string(value) + " is out of range",
             0, value, offset);
    };
    if (g.link_id.is_zero()) invalid("link_id", 0, LINK_ID);
    if (g.lane_count < 1 || g.lane_count > limits::lane_count_max)
        invalid("lane_count", g.lane_count, LANE_COUNT);
    if (g.lane_index >= g.lane_count) invalid("lane_index", g.lane_index, LANE_INDEX);
    if (!(g.codecs & 1)) invalid("codecs", g.codecs, CODECS);
    if (g.payload_bytes_max < limits::payload_bytes_min)
        invalid("payload_bytes_max", g.payload_bytes_max, PAYLOAD_BYTES_MAX);
    if (g.control_bytes_max < limits::control_bytes_min)
        invalid("control_bytes_max", g.control_bytes_max, CONTROL_BYTES_MAX);
    if (g.transfers_max < 1) invalid("transfers_max", 0, TRANSFERS_MAX);
    require_zero(in, RESERVED_B, 8, "greeting");
    return g;
}

void encode_header(const FrameHeader& h, uint8_t* out) {
    using namespace header_at;
    std::memset(out, 0, HEADER_BYTES);
    std::memcpy(out, FRAME_MAGIC, sizeof FRAME_MAGIC);
    out[TYPE] = uint8_t(h.type);
    store_le<uint32_t>(out + PAYLOAD_BYTES, h.payload_bytes);
    std::memcpy(out + TRANSFER_ID, h.transfer_id.bytes.data(), 16);
    store_le<uint32_t>(out + SEGMENT_INDEX, h.segment_index);
    store_le<uint32_t>(out + ATTEMPT, h.attempt);
    store_le<uint64_t>(out + RAW_OFFSET, h.raw_offset);
    store_le<uint32_t>(out + RAW_BYTES, h.raw_bytes);
    store_le<uint32_t>(out + RAW_CRC, h.raw_crc);
    store_le<uint32_t>(out + PAYLOAD_CRC, h.payload_crc);
    store_le<uint32_t>(out + TABLE_INDEX, h.table_index);
    out[CODEC] = h.codec;
    store_le<uint32_t>(out + HEADER_CRC, crc32c(0, out, HEADER_CRC));
}

FrameHeader decode_header(const uint8_t* in, const FrameLimits& limit) {
    using namespace header_at;
    if (std::memcmp(in, FRAME_MAGIC, sizeof FRAME_MAGIC) != 0)
        fail(ErrorCode::BAD_MAGIC, "frame: no frame starts here", FRAME_MAGIC[0], in[0], MAGIC);
    const uint32_t stated = load_le<uint32_t>(in + HEADER_CRC);
    const uint32_t actual = crc32c(0, in, HEADER_CRC);
    if (stated != actual)
        fail(ErrorCode::HEADER_CORRUPT,
             "frame header: checksum " + hex32(stated) + " stated, " + hex32(actual) + " computed",
             stated, actual, HEADER_CRC);
    FrameHeader h;
    h.type = FrameType(in[TYPE]);
    if (!h.skippable() && (in[TYPE] == 0 || in[TYPE] > uint8_t(FrameType::CLOSE)))
        fail(ErrorCode::TYPE_UNKNOWN, "frame type " + std::to_string(in[TYPE]) + " is not known", 0,
             in[TYPE], TYPE);
    if (in[FLAGS] & HEADER_FLAGS_RESERVED)
        fail(ErrorCode::RESERVED_BIT_SET, "frame header: reserved flag set", 0, in[FLAGS], FLAGS);
    h.payload_bytes = load_le<uint32_t>(in + PAYLOAD_BYTES);
    std::memcpy(h.transfer_id.bytes.data(), in + TRANSFER_ID, 16);
    h.segment_index = load_le<uint32_t>(in + SEGMENT_INDEX);
    h.attempt = load_le<uint32_t>(in + ATTEMPT);
    h.raw_offset = load_le<uint64_t>(in + RAW_OFFSET);
    h.raw_bytes = load_le<uint32_t>(in + RAW_BYTES);
    h.raw_crc = load_le<uint32_t>(in + RAW_CRC);
    h.payload_crc = load_le<uint32_t>(in + PAYLOAD_CRC);
    h.table_index = load_le<uint32_t>(in + TABLE_INDEX);
    h.codec = in[CODEC];
    check_payload_bytes(h, limit);
    if (!h.skippable()) check_fields(h);
    require_zero(in, RESERVED, 2, "frame header");
    return h;
}

void check_control_payload(const FrameHeader& header, const uint8_t* payload) {
    const uint32_t actual = crc32c(0, payload, header.payload_bytes);
    if (actual != header.payload_crc)
        fail(ErrorCode::CONTROL_CORRUPT,
             std::string(frame_type_name(header.type)) + ": payload checksum " +
                 hex32(header.payload_crc) + " stated, " + hex32(actual) + " computed",
             header.payload_crc, actual, 0);
}

}  // namespace kvwire
