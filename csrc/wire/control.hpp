#pragma once
// Control payloads (FORMAT.md section 7), all but MANIFEST: encode, and decode with every check
// that needs no other state. Decoding throws Error.

#include <cstdint>
#include <string>
#include <vector>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "plan/placement.hpp"
#include "wire/format.hpp"

namespace kvwire {

using Bytes = std::vector<uint8_t>;

struct Grant {
    uint64_t window_bytes = 0;
    uint32_t codecs = 1;
    uint32_t chunk_bytes_max = 0;
};

struct SegmentAnnouncement {
    uint64_t raw_bytes = 0;
    uint32_t chunk_bytes = 0;
    std::vector<Item> items;

    uint32_t chunk_count() const {
        return chunk_bytes ? uint32_t(div_ceil<uint64_t>(raw_bytes, chunk_bytes)) : 0;
    }
    uint32_t chunk_raw_bytes(uint32_t chunk_index) const {
        const uint64_t rest = raw_bytes - uint64_t(chunk_index) * chunk_bytes;
        return uint32_t(rest < chunk_bytes ? rest : chunk_bytes);
    }
};

struct SegmentEnd {
    uint32_t chunk_count = 0;
    uint32_t digest = 0;
};

// Metadata stays encoded in C++: it is for the application, and only checked here.
struct End {
    uint32_t segment_count = 0;
    uint32_t digest = 0;
    uint64_t raw_bytes = 0;
    uint16_t metadata_count = 0;
    Bytes metadata;
};

struct ReceiptEntry {
    uint32_t segment_index = 0;
    uint32_t chunk_first = 0;
    uint32_t chunk_count = 0;  // 0: the whole segment, with its digest
    uint32_t digest = 0;
};

struct RepairEntry {
    uint32_t segment_index = 0;
    uint32_t chunk_index = 0;
    uint32_t attempt = 0;
    ErrorCode reason{};
    uint32_t expected = 0;
    uint32_t actual = 0;
};

struct Pull {
    Id offer_id;
    uint64_t token_start = 0;
    uint64_t token_stop = 0;
    uint16_t source_rank = 0;
    uint16_t destination_rank = 0;
    uint16_t destination_rank_count = 1;
};

struct Done {
    uint64_t raw_bytes = 0;
    uint32_t digest = 0;
};

Bytes encode(const Grant& grant);
Bytes encode(const SegmentAnnouncement& segment);
Bytes encode(const SegmentEnd& end);
Bytes encode(const End& end);
Bytes encode(const std::vector<ReceiptEntry>& entries);
Bytes encode(const std::vector<RepairEntry>& entries);
Bytes encode(const Error& abort);
Bytes encode(const Pull& pull);
Bytes encode(const Done& done);

Grant decode_grant(ByteSpan payload);
SegmentAnnouncement decode_segment(ByteSpan payload);
SegmentEnd decode_segment_end(ByteSpan payload);
End decode_end(ByteSpan payload);
std::vector<ReceiptEntry> decode_receipt(ByteSpan payload);
std::vector<RepairEntry> decode_repair(ByteSpan payload);
Error decode_abort(ByteSpan payload);  // `.remote` is set
Pull decode_pull(ByteSpan payload);
Done decode_done(ByteSpan payload);

// Section 8: one step of a segment's or transfer's digest; both start at 0.
uint32_t digest_chunk(uint32_t digest, uint64_t raw_offset, uint32_t raw_bytes, uint32_t raw_crc);
template <class Chunk>  // with a raw_crc
uint32_t segment_digest(const SegmentAnnouncement& announcement, const std::vector<Chunk>& chunks) {
    uint32_t digest = 0;
    for (uint32_t i = 0; i < chunks.size(); ++i)
        digest = digest_chunk(digest, uint64_t(i) * announcement.chunk_bytes,
                              announcement.chunk_raw_bytes(i), chunks[i].raw_crc);
    return digest;
}
uint32_t digest_segment(uint32_t digest, uint32_t segment_index, uint32_t segment_digest,
                        uint64_t raw_bytes);

}  // namespace kvwire
