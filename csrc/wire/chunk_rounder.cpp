#include "wire/chunk_rounder.hpp"

#include "checksum/crc32c.hpp"
#include "codec/codec.hpp"

namespace kvwire {
namespace {

// Whatever went wrong twice is not tried again.
constexpr uint32_t CODED_ATTEMPTS_MAX = 2;

}  // namespace

void ChunkRounder::encode(const Placement& placement, const SegmentRounding& rounding,
                          FrameHeader* header, Bytes* body) {
    raw_.resize(header->raw_bytes);
    placement.gather(header->raw_offset, raw_.size(), raw_.data());
    rounding.parts(placement, header->raw_offset, raw_.size(), &parts_);
    body->resize(quantised_bytes_max(parts_));
    const size_t bytes = encoder_.encode(parts_, raw_.data(), body->data(), body->size());

    // What the receiver will make of it is what the checksums are of.
    const auto no_tables = [](uint32_t) { return nullptr; };
    if (decoder_.begin(body->data(), bytes, raw_.size(), no_tables) != ErrorCode::OK)
        throw Error(ErrorCode::INTERNAL, "what was rounded cannot be decoded");
    for (size_t at = 0; const size_t strip_bytes = decoder_.next_bytes(); at += strip_bytes)
        if (!decoder_.strip(raw_.data() + at))
            throw Error(ErrorCode::INTERNAL, "what was rounded cannot be decoded");
    const bool coded = bytes < raw_.size() && header->attempt < CODED_ATTEMPTS_MAX;
    if (!coded) body->swap(raw_);
    header->codec = uint8_t(coded ? Codec::QUANTISED : Codec::RAW);
    header->payload_bytes = uint32_t(coded ? bytes : header->raw_bytes);
    header->payload_crc = crc32c(0, body->data(), header->payload_bytes);
    header->raw_crc = coded ? crc32c(0, raw_.data(), raw_.size()) : header->payload_crc;
}

}  // namespace kvwire
