#include "base/error.hpp"

namespace kvwire {

const char* error_name(ErrorCode code) {
    switch (code) {
        case ErrorCode::OK: return "OK";
        case ErrorCode::BAD_MAGIC: return "BAD_MAGIC";
        case ErrorCode::VERSION_UNSUPPORTED: return "VERSION_UNSUPPORTED";
        case ErrorCode::GREETING_CORRUPT: return "GREETING_CORRUPT";
        case ErrorCode::HEADER_CORRUPT: return "HEADER_CORRUPT";
        case ErrorCode::RESERVED_BIT_SET: return "RESERVED_BIT_SET";
        case ErrorCode::TYPE_UNKNOWN: return "TYPE_UNKNOWN";
        case ErrorCode::FIELD_INVALID: return "FIELD_INVALID";
        case ErrorCode::LIMIT_EXCEEDED: return "LIMIT_EXCEEDED";
        case ErrorCode::CONTROL_CORRUPT: return "CONTROL_CORRUPT";
        case ErrorCode::TRUNCATED: return "TRUNCATED";
        case ErrorCode::ROLE_CONFLICT: return "ROLE_CONFLICT";
        case ErrorCode::STATE_INVALID: return "STATE_INVALID";
        case ErrorCode::TICKET_UNKNOWN: return "TICKET_UNKNOWN";
        case ErrorCode::TICKET_EXPIRED: return "TICKET_EXPIRED";
        case ErrorCode::SPEC_MISMATCH: return "SPEC_MISMATCH";
        case ErrorCode::TOKENS_MISMATCH: return "TOKENS_MISMATCH";
        case ErrorCode::RANK_UNEXPECTED: return "RANK_UNEXPECTED";
        case ErrorCode::OVERLAP: return "OVERLAP";
        case ErrorCode::CODEC_UNSUPPORTED: return "CODEC_UNSUPPORTED";
        case ErrorCode::TABLE_UNKNOWN: return "TABLE_UNKNOWN";
        case ErrorCode::TRANSFER_UNKNOWN: return "TRANSFER_UNKNOWN";
        case ErrorCode::TRANSFER_DUPLICATE: return "TRANSFER_DUPLICATE";
        case ErrorCode::SEGMENT_INVALID: return "SEGMENT_INVALID";
        case ErrorCode::INCOMPLETE: return "INCOMPLETE";
        case ErrorCode::PAYLOAD_CORRUPT: return "PAYLOAD_CORRUPT";
        case ErrorCode::RAW_CORRUPT: return "RAW_CORRUPT";
        case ErrorCode::CODED_INVALID: return "CODED_INVALID";
        case ErrorCode::RETRIES_EXHAUSTED: return "RETRIES_EXHAUSTED";
        case ErrorCode::DIGEST_MISMATCH: return "DIGEST_MISMATCH";
        case ErrorCode::SOURCE_CHANGED: return "SOURCE_CHANGED";
        case ErrorCode::CANCELLED: return "CANCELLED";
        case ErrorCode::DEADLINE_EXCEEDED: return "DEADLINE_EXCEEDED";
        case ErrorCode::OFFER_UNKNOWN: return "OFFER_UNKNOWN";
        case ErrorCode::RESOURCES_EXHAUSTED: return "RESOURCES_EXHAUSTED";
        case ErrorCode::PEER_CLOSED: return "PEER_CLOSED";
        case ErrorCode::CONNECT_FAILED: return "CONNECT_FAILED";
        case ErrorCode::GREETING_TIMEOUT: return "GREETING_TIMEOUT";
        case ErrorCode::LINK_LOST: return "LINK_LOST";
        case ErrorCode::CLOSED: return "CLOSED";
        case ErrorCode::LINK_UNKNOWN: return "LINK_UNKNOWN";
        case ErrorCode::ADMISSION_REFUSED: return "ADMISSION_REFUSED";
        case ErrorCode::USAGE: return "USAGE";
        case ErrorCode::UNSUPPORTED: return "UNSUPPORTED";
        case ErrorCode::FORKED: return "FORKED";
        case ErrorCode::FILE_NOT_COMMITTED: return "FILE_NOT_COMMITTED";
        case ErrorCode::FILE_INDEX_CORRUPT: return "FILE_INDEX_CORRUPT";
        case ErrorCode::INTERNAL: return "INTERNAL";
    }
    return nullptr;
}

}  // namespace kvwire
