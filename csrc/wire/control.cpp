#include "wire/control.hpp"

#include "checksum/crc32c.hpp"
#include "wire/manifest.hpp"
#include "wire/reader.hpp"

namespace kvwire {

bool is_text(const std::string& text, bool may_hold_nul) {
    const auto* s = reinterpret_cast<const uint8_t*>(text.data());
    const size_t n = text.size();
    for (size_t i = 0; i < n;) {
        const uint8_t c = s[i];
        size_t follow = 9;
        if (c < 0x80) follow = 0;
        if (c >= 0xC2 && c < 0xF5) follow = c < 0xE0 ? 1 : c < 0xF0 ? 2 : 3;
        if ((c == 0 && !may_hold_nul) || follow == 9 || n - i <= follow) return false;
        for (size_t k = 1; k <= follow; ++k)
            if ((s[i + k] & 0xC0) != 0x80) return false;
        if ((c == 0xE0 && s[i + 1] < 0xA0) || (c == 0xED && s[i + 1] > 0x9F) ||
            (c == 0xF0 && s[i + 1] < 0x90) || (c == 0xF4 && s[i + 1] > 0x8F))
            return false;
        i += follow + 1;
    }
    return true;
}

Bytes encode(const Grant& grant) {
    return FieldWriter().number(grant.window_bytes).number(grant.codecs)
        .number(grant.chunk_bytes_max).take();
}

Grant decode_grant(ByteSpan payload) {
    FieldReader in(payload, "GRANT");
    Grant grant;
    grant.window_bytes = in.number<uint64_t>();
    grant.codecs = in.number<uint32_t>();
    grant.chunk_bytes_max = in.number<uint32_t>();
    in.at_end();
    if (grant.chunk_bytes_max < limits::chunk_bytes_min ||
        grant.chunk_bytes_max > limits::chunk_bytes_max)
        in.fail(ErrorCode::FIELD_INVALID, "chunk_bytes_max out of range", limits::chunk_bytes_max,
                grant.chunk_bytes_max);
    if (grant.window_bytes < limits::chunk_bytes_min)
        in.fail(ErrorCode::FIELD_INVALID, "window_bytes holds no chunk", limits::chunk_bytes_min,
                grant.window_bytes);
    if (!(grant.codecs & 1)) in.fail(ErrorCode::FIELD_INVALID, "codecs lack raw", 1, grant.codecs);
    return grant;
}

Bytes encode(const SegmentAnnouncement& segment) {
    FieldWriter out;
    out.number(segment.raw_bytes).number(segment.chunk_bytes)
        .number(uint32_t(segment.items.size()));
    for (const Item& item : segment.items)
        out.number(item.group).number(item.tensor).number(item.layer).number(item.token_start)
            .number(item.token_stop);
    return out.take();
}

SegmentAnnouncement decode_segment(ByteSpan payload) {
    FieldReader in(payload, "SEGMENT");
    SegmentAnnouncement segment;
    segment.raw_bytes = in.number<uint64_t>();
    segment.chunk_bytes = in.number<uint32_t>();
    const uint32_t count = in.number<uint32_t>();
    if (segment.raw_bytes > limits::segment_bytes_max)
        in.fail(ErrorCode::SEGMENT_INVALID, "raw_bytes over the limit", limits::segment_bytes_max,
                segment.raw_bytes);
    if (segment.chunk_bytes < limits::chunk_bytes_min ||
        segment.chunk_bytes > limits::chunk_bytes_max ||
        segment.chunk_bytes % limits::chunk_bytes_min)
        in.fail(ErrorCode::SEGMENT_INVALID, "chunk_bytes is no multiple of 4096, or too large",
                limits::chunk_bytes_max, segment.chunk_bytes);
    if (count < 1 || count > limits::item_count_max || uint64_t(count) * ITEM_BYTES != in.rest())
        in.fail(ErrorCode::SEGMENT_INVALID, "item_count differs from the payload",
                in.rest() / ITEM_BYTES, count);
    segment.items.resize(count);
    for (Item& item : segment.items) {
        item.group = in.number<uint16_t>();
        item.tensor = in.number<uint16_t>();
        item.layer = in.number<uint32_t>();
        item.token_start = in.number<uint64_t>();
        item.token_stop = in.number<uint64_t>();
    }
    return segment;
}

Bytes encode(const SegmentEnd& end) {
    return FieldWriter().number(end.chunk_count).number(end.digest).take();
}

SegmentEnd decode_segment_end(ByteSpan payload) {
    FieldReader in(payload, "SEGMENT_END");
    SegmentEnd end;
    end.chunk_count = in.number<uint32_t>();
    end.digest = in.number<uint32_t>();
    in.at_end();
    return end;
}

Bytes encode(const End& end) {
    return FieldWriter().number(end.segment_count).number(end.digest).number(end.raw_bytes)
        .number(end.metadata_count).zeros(6)
        .data(end.metadata.data(), end.metadata.size()).take();
}

End decode_end(ByteSpan payload) {
    FieldReader in(payload, "END");
    End end;
    end.segment_count = in.number<uint32_t>();
    if (end.segment_count > limits::segment_count_max)
        in.fail(ErrorCode::INCOMPLETE, "segment_count over the limit",
                limits::segment_count_max, end.segment_count);
    end.digest = in.number<uint32_t>();
    end.raw_bytes = in.number<uint64_t>();
    end.metadata_count = in.number<uint16_t>();
    in.zeros(6);
    const size_t metadata_start = in.offset();
    check_metadata(in, end.metadata_count);
    in.at_end();
    end.metadata.assign(payload.data + metadata_start, payload.data + payload.size);
    return end;
}

Bytes encode(const std::vector<ReceiptEntry>& entries) {
    FieldWriter out;
    for (const ReceiptEntry& entry : entries)
        out.number(entry.segment_index).number(entry.chunk_first).number(entry.chunk_count)
            .number(entry.digest);
    return out.take();
}

std::vector<ReceiptEntry> decode_receipt(ByteSpan payload) {
    FieldReader in(payload, "RECEIPT");
    std::vector<ReceiptEntry> entries(payload.size / RECEIPT_BYTES);
    for (ReceiptEntry& entry : entries) {
        entry.segment_index = in.number<uint32_t>();
        entry.chunk_first = in.number<uint32_t>();
        entry.chunk_count = in.number<uint32_t>();
        entry.digest = in.number<uint32_t>();
        if (entry.chunk_count == 0 ? entry.chunk_first != 0 : entry.digest != 0)
            in.fail(ErrorCode::FIELD_INVALID, "entry mixes chunks and whole segment", 0,
                    entry.chunk_count);
    }
    in.at_end();
    return entries;
}

Bytes encode(const std::vector<RepairEntry>& entries) {
    FieldWriter out;
    for (const RepairEntry& entry : entries)
        out.number(entry.segment_index).number(entry.chunk_index).number(entry.attempt)
            .number(uint16_t(entry.reason)).zeros(2).number(entry.expected).number(entry.actual);
    return out.take();
}

std::vector<RepairEntry> decode_repair(ByteSpan payload) {
    FieldReader in(payload, "REPAIR");
    std::vector<RepairEntry> entries(payload.size / REPAIR_BYTES);
    for (RepairEntry& entry : entries) {
        entry.segment_index = in.number<uint32_t>();
        entry.chunk_index = in.number<uint32_t>();
        entry.attempt = in.number<uint32_t>();
        entry.reason = ErrorCode(in.number<uint16_t>());
        if (entry.reason != ErrorCode::PAYLOAD_CORRUPT && entry.reason != ErrorCode::RAW_CORRUPT &&
            entry.reason != ErrorCode::CODED_INVALID && entry.reason != ErrorCode::TABLE_UNKNOWN)
            in.fail(ErrorCode::FIELD_INVALID, "reason is no chunk error", 0,
                    uint64_t(entry.reason));
        in.zeros(2);
        entry.expected = in.number<uint32_t>();
        entry.actual = in.number<uint32_t>();
    }
    in.at_end();
    return entries;
}

Bytes encode(const Error& abort) {
    size_t message_bytes = abort.message.size();
    if (message_bytes > limits::message_bytes_max) {
        message_bytes = limits::message_bytes_max;  // cut between characters
        while (message_bytes && (uint8_t(abort.message[message_bytes]) & 0xC0) == 0x80)
            --message_bytes;
    }
    return FieldWriter().number(uint16_t(abort.code)).number(uint16_t(message_bytes)).zeros(4)
        .number(abort.expected).number(abort.actual).number(abort.offset)
        .data(reinterpret_cast<const uint8_t*>(abort.message.data()), message_bytes).take();
}

Error decode_abort(ByteSpan payload) {
    FieldReader in(payload, "ABORT");
    Error error;
    error.remote = true;
    error.code = ErrorCode(in.number<uint16_t>());
    const uint16_t message_bytes = in.number<uint16_t>();
    in.zeros(4);
    error.expected = in.number<uint64_t>();
    error.actual = in.number<uint64_t>();
    error.offset = in.number<uint64_t>();
    if (message_bytes != in.rest())
        in.fail(ErrorCode::FIELD_INVALID, "message_bytes differs from the payload", in.rest(),
                message_bytes);
    error.message = in.text(message_bytes);
    if (!is_text(error.message, true))
        in.fail(ErrorCode::FIELD_INVALID, "message is not UTF-8", 0, 0);
    if (error.code == ErrorCode::OK || error_name(error.code) == nullptr)
        error.code = ErrorCode::INTERNAL;
    return error;
}

Bytes encode(const Pull& pull) {
    return FieldWriter().id(pull.offer_id).number(pull.token_start).number(pull.token_stop)
        .number(pull.source_rank).number(pull.destination_rank)
        .number(pull.destination_rank_count).zeros(10).take();
}

Pull decode_pull(ByteSpan payload) {
    FieldReader in(payload, "PULL");
    Pull pull;
    pull.offer_id = in.id();
    pull.token_start = in.number<uint64_t>();
    pull.token_stop = in.number<uint64_t>();
    pull.source_rank = in.number<uint16_t>();
    pull.destination_rank = in.number<uint16_t>();
    pull.destination_rank_count = in.number<uint16_t>();
    in.zeros(10);
    if (pull.token_stop < pull.token_start || pull.token_stop > limits::token_count_max)
        in.fail(ErrorCode::TOKENS_MISMATCH, "token range runs backwards or too far",
                pull.token_start, pull.token_stop);
    if (pull.destination_rank >= pull.destination_rank_count ||
        pull.destination_rank_count > limits::rank_count_max ||
        pull.source_rank >= limits::rank_count_max)
        in.fail(ErrorCode::RANK_UNEXPECTED, "a rank is out of range", pull.destination_rank_count,
                pull.destination_rank);
    return pull;
}

Bytes encode(const Done& done) {
    return FieldWriter().number(done.raw_bytes).number(done.digest).zeros(4).take();
}

Done decode_done(ByteSpan payload) {
    FieldReader in(payload, "DONE");
    Done done;
    done.raw_bytes = in.number<uint64_t>();
    done.digest = in.number<uint32_t>();
    in.zeros(4);
    return done;
}

uint32_t digest_chunk(uint32_t digest, uint64_t raw_offset, uint32_t raw_bytes, uint32_t raw_crc) {
    uint8_t record[16];
    store_le<uint64_t>(record, raw_offset);
    store_le<uint32_t>(record + 8, raw_bytes);
    store_le<uint32_t>(record + 12, raw_crc);
    return crc32c(digest, record, sizeof record);
}

uint32_t digest_segment(uint32_t digest, uint32_t segment_index, uint32_t segment_digest,
                        uint64_t raw_bytes) {
    uint8_t record[16];
    store_le<uint32_t>(record, segment_index);
    store_le<uint32_t>(record + 4, segment_digest);
    store_le<uint64_t>(record + 8, raw_bytes);
    return crc32c(digest, record, sizeof record);
}

}  // namespace kvwire
