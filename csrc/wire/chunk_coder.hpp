#pragma once
// Codes chunks from the source pages and decodes them into the destination's. With the tiered code
// a strip is read or written where it lies, and its checksum is made while it is in cache; LZ4
// works on a copy of the whole chunk.

#include <cstdint>
#include <memory>
#include <vector>

#include "base/error.hpp"
#include "codec/codec.hpp"
#include "codec/quantised.hpp"
#include "codec/tiered.hpp"
#include "plan/placement.hpp"
#include "wire/control.hpp"
#include "wire/frames.hpp"

namespace kvwire {

class CodeEntry;
class ReceiveTables;
class SegmentCoding;
class SendTables;

class ChunkEncoder {
public:
    // Codes the chunk of `header` into the front of `*body`, and fills in the codec, both checksums
    // and payload_bytes. False, with anything in `*body`: it does not shrink, or must go raw.
    // For TIERED: `coding` is that of its segment, `tables` the link's (null: all go inside).
    bool encode(Codec codec, const Placement& placement, uint32_t item_bytes,
                const SegmentCoding* coding, SendTables* tables, FrameHeader* header,
                Bytes* body);
    // The last chunk was coded as others of its kind will be: its tables were there already.
    bool was_usual() const { return was_usual_; }

private:
    size_t encode_lz4(const Placement& placement, uint32_t item_bytes, FrameHeader* header,
                      Bytes* body);
    size_t encode_tiered(const Placement& placement, const SegmentCoding& coding,
                         SendTables* tables, FrameHeader* header, Bytes* body);

    std::unique_ptr<TieredEncoder> tiered_;
    std::vector<CodedPart> parts_;
    std::vector<CodeEntry*> entries_;  // of parts_
    bool was_usual_ = true;
    Bytes gathered_, scratch_;
};

struct Landing {
    ErrorCode verdict = ErrorCode::OK;  // or what costs the chunk (section 11)
    uint32_t crc = 0;                   // as computed
};

class ChunkDecoder {
public:
    // Decodes the TIERED or QUANTISED payload of `header`, whose own checksum was right, to its
    // place. `tables`: the link's; null: it has none.
    Landing decode(const FrameHeader& header, const uint8_t* payload, const Placement& placement,
                   const ReceiveTables* tables);

private:
    template <class Decoder>
    Landing decode_strips(Decoder& decoder, const FrameHeader& header, const uint8_t* payload,
                          const Placement& placement, const ReceiveTables* tables);

    TieredDecoder tiered_;
    std::unique_ptr<QuantisedDecoder> quantised_;  // once it was needed
    alignas(64) uint8_t strip_[STRIP_BYTES_MAX];
};

}  // namespace kvwire
