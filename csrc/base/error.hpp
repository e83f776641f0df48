#pragma once
// ErrorCode: FORMAT.md section 11. Error: the one exception of the C++ core, and the value that
// crosses threads and the wire.

#include <cstdint>
#include <exception>
#include <string>
#include <utility>

namespace kvwire {

enum class ErrorCode : uint16_t {
    OK = 0,
    BAD_MAGIC = 100,
    VERSION_UNSUPPORTED = 101,
    GREETING_CORRUPT = 102,
    HEADER_CORRUPT = 103,
    RESERVED_BIT_SET = 104,
    TYPE_UNKNOWN = 105,
    FIELD_INVALID = 106,
    LIMIT_EXCEEDED = 107,
    CONTROL_CORRUPT = 108,
    TRUNCATED = 109,
    ROLE_CONFLICT = 110,
    STATE_INVALID = 111,
    TICKET_UNKNOWN = 200,
    TICKET_EXPIRED = 201,
    SPEC_MISMATCH = 202,
    TOKENS_MISMATCH = 203,
    RANK_UNEXPECTED = 204,
    OVERLAP = 205,
    CODEC_UNSUPPORTED = 206,
    TABLE_UNKNOWN = 207,
    TRANSFER_UNKNOWN = 208,
    TRANSFER_DUPLICATE = 209,
    SEGMENT_INVALID = 210,
    INCOMPLETE = 211,
    PAYLOAD_CORRUPT = 212,
    RAW_CORRUPT = 213,
    CODED_INVALID = 214,
    RETRIES_EXHAUSTED = 215,
    DIGEST_MISMATCH = 216,
    SOURCE_CHANGED = 217,
    CANCELLED = 218,
    DEADLINE_EXCEEDED = 219,
    OFFER_UNKNOWN = 220,
    RESOURCES_EXHAUSTED = 221,
    PEER_CLOSED = 300,
    CONNECT_FAILED = 301,
    GREETING_TIMEOUT = 302,
    LINK_LOST = 303,
    CLOSED = 304,
    LINK_UNKNOWN = 305,
    ADMISSION_REFUSED = 306,
    USAGE = 400,
    UNSUPPORTED = 401,
    FORKED = 402,
    FILE_NOT_COMMITTED = 500,
    FILE_INDEX_CORRUPT = 501,
    INTERNAL = 900,
};

// Name as in FORMAT.md, or nullptr for a number that is not in the table.
const char* error_name(ErrorCode code);

struct Error : std::exception {
    ErrorCode code = ErrorCode::OK;
    bool remote = false;  // found and reported by the peer
    std::string message;
    uint64_t expected = 0;
    uint64_t actual = 0;
    uint64_t offset = 0;

    Error() = default;
    Error(ErrorCode code_, std::string message_, uint64_t expected_ = 0, uint64_t actual_ = 0,
          uint64_t offset_ = 0)
        : code(code_), message(std::move(message_)), expected(expected_), actual(actual_),
          offset(offset_) {}

    explicit operator bool() const { return code != ErrorCode::OK; }
    const char* what() const noexcept override { return message.c_str(); }
};

}  // namespace kvwire
