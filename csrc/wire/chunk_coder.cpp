#include "wire/chunk_coder.hpp"

#include <algorithm>

#include "checksum/crc32c.hpp"
#include "plan/run_cursor.hpp"
#include "wire/link_tables.hpp"
#include "wire/segment_coding.hpp"

namespace kvwire {
namespace {

// Tables are named once at most, and what went wrong twice goes raw.
constexpr uint32_t CODED_ATTEMPTS_MAX = 2;

}  // namespace

bool ChunkEncoder::encode(Codec codec, const Placement& placement, uint32_t item_bytes,
                          const SegmentCoding* coding, SendTables* tables,
                          FrameHeader* header, Bytes* body) {
    size_t bytes = 0;
    was_usual_ = true;
    if (codec == Codec::LZ4) bytes = encode_lz4(placement, item_bytes, header, body);
    if (codec == Codec::TIERED && coding && header->attempt < CODED_ATTEMPTS_MAX)
        bytes = encode_tiered(placement, *coding, header->attempt == 0 ? tables : nullptr,
                              header, body);
    if (bytes == 0 || bytes >= header->raw_bytes) return false;
    header->codec = uint8_t(codec);
    header->payload_bytes = uint32_t(bytes);
    header->payload_crc = crc32c(0, body->data(), bytes);
    return true;
}

size_t ChunkEncoder::encode_lz4(const Placement& placement, uint32_t item_bytes,
                                FrameHeader* header, Bytes* body) {
    gathered_.resize(header->raw_bytes);
    scratch_.resize(header->raw_bytes);
    body->resize(header->raw_bytes);
    placement.gather(header->raw_offset, header->raw_bytes, gathered_.data());
    header->raw_crc = crc32c(0, gathered_.data(), header->raw_bytes);
    return kvwire::encode(Codec::LZ4, gathered_.data(), header->raw_bytes, item_bytes,
                          body->data(), body->size(), scratch_.data());
}

size_t ChunkEncoder::encode_tiered(const Placement& placement, const SegmentCoding& coding,
                                   SendTables* tables, FrameHeader* header, Bytes* body) {
    if (!tiered_) tiered_ = std::make_unique<TieredEncoder>();
    scratch_.resize(std::max(scratch_.size(), STRIP_BYTES_MAX));
    body->resize(header->raw_bytes);
    was_usual_ = coding.parts(SegmentCoding::samples_of(placement), header->raw_offset,
                              header->raw_bytes, tables, &parts_, &entries_);
    tiered_->begin(parts_, body->data(), header->raw_bytes - 1);
    RunCursor cursor(placement, header->raw_offset, header->raw_bytes);
    uint32_t crc = 0;
    while (const size_t bytes = tiered_->next_bytes()) {
        const uint8_t* strip = cursor.in_place(bytes);
        if (!strip) {
            cursor.gather(bytes, scratch_.data());
            strip = scratch_.data();
        }
        crc = crc32c(crc, strip, bytes);
        tiered_->strip(strip);
    }
    header->raw_crc = crc;
    const size_t bytes = tiered_->finish();
    if (bytes > 0) note_parts(body->data(), parts_, entries_.data());
    return bytes;
}

Landing ChunkDecoder::decode(const FrameHeader& header, const uint8_t* payload,
                             const Placement& placement, const ReceiveTables* tables) {
    if (Codec(header.codec) == Codec::TIERED)
        return decode_strips(tiered_, header, payload, placement, tables);
    if (!quantised_) quantised_ = std::make_unique<QuantisedDecoder>();
    return decode_strips(*quantised_, header, payload, placement, tables);
}

template <class Decoder>
Landing ChunkDecoder::decode_strips(Decoder& decoder, const FrameHeader& header,
                                    const uint8_t* payload, const Placement& placement,
                                    const ReceiveTables* tables) {
    const auto table_of = [tables](uint32_t index) -> std::shared_ptr<const CodeTable> {
        return tables ? tables->find(index) : nullptr;
    };
    const ErrorCode found =
        decoder.begin(payload, header.payload_bytes, header.raw_bytes, table_of);
    if (found != ErrorCode::OK) return {found, header.payload_crc};
    RunCursor cursor(placement, header.raw_offset, header.raw_bytes);
    uint32_t crc = 0;
    while (const size_t bytes = decoder.next_bytes()) {
        uint8_t* const place = cursor.in_place(bytes);
        if (!decoder.strip(place ? place : strip_))
            return {ErrorCode::CODED_INVALID, header.payload_crc};
        crc = place ? crc32c(crc, place, bytes) : cursor.scatter(bytes, strip_, crc);
    }
    return {crc == header.raw_crc ? ErrorCode::OK : ErrorCode::RAW_CORRUPT, crc};
}

}  // namespace kvwire
