#include "wire/chunk_rounder.hpp"

#include "base/bytes.hpp"
#include "checksum/crc32c.hpp"
#include "codec/codec.hpp"

namespace kvwire {
namespace {

constexpr size_t CODED_BYTES_AT = 4, RUNG_AT = 8;  // in a part
// Whatever went wrong twice is not tried again.
constexpr uint32_t CODED_ATTEMPTS_MAX = 2;

}  // namespace

void ChunkRounder::encode(const Placement& placement, const SegmentRounding& rounding,
                          SendTables* tables, FrameHeader* header, Bytes* body) {
    raw_.resize(header->raw_bytes);
    placement.gather(header->raw_offset, raw_.size(), raw_.data());
    rounding.parts(placement, header->raw_offset, raw_.size(),
                   header->attempt == 0 ? tables : nullptr, &parts_, &entries_);
    body->resize(quantised_bytes_max(parts_));
    const size_t bytes = encoder_.encode(parts_, raw_.data(), body->data(), body->size());

    // What the receiver will make of it is what the checksums are of.
    const auto tables_used = [this](uint32_t index) { return table_of(index); };
    if (decoder_.begin(body->data(), bytes, raw_.size(), tables_used) != ErrorCode::OK)
        throw Error(ErrorCode::INTERNAL, "what was rounded cannot be decoded");
    for (size_t at = 0; const size_t strip_bytes = decoder_.next_bytes(); at += strip_bytes)
        if (!decoder_.strip(raw_.data() + at))
            throw Error(ErrorCode::INTERNAL, "what was rounded cannot be decoded");
    note_nested(body->data());
    const bool coded = bytes < raw_.size() && header->attempt < CODED_ATTEMPTS_MAX;
    if (!coded) body->swap(raw_);
    header->codec = uint8_t(coded ? Codec::QUANTISED : Codec::RAW);
    header->payload_bytes = uint32_t(coded ? bytes : header->raw_bytes);
    header->payload_crc = crc32c(0, body->data(), header->payload_bytes);
    header->raw_crc = coded ? crc32c(0, raw_.data(), raw_.size()) : header->payload_crc;
}

std::shared_ptr<const CodeTable> ChunkRounder::table_of(uint32_t index) const {
    for (const QuantisedPart& part : parts_)
        for (const CodedPart& nested : part.nested)
            if (nested.table && nested.table_index == index) return nested.table;
    return nullptr;
}

void ChunkRounder::note_nested(const uint8_t* payload) const {
    CodeEntry* const* entries = entries_.data();
    for (const QuantisedPart& part : parts_) {
        const bool was_rounded = Rung(payload[RUNG_AT]) == part.rung;  // else it went EXACT
        if (was_rounded) note_parts(payload + nested_offset(part), part.nested, entries);
        entries += part.nested.size();
        payload += load_le<uint32_t>(payload + CODED_BYTES_AT);
    }
}

}  // namespace kvwire
