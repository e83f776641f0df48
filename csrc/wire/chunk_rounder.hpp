#pragma once
// Rounds and codes the chunks of a segment of which something is lossy (FORMAT.md section 9.3).

#include <memory>
#include <vector>

#include "codec/quantised.hpp"
#include "plan/placement.hpp"
#include "wire/control.hpp"
#include "wire/frames.hpp"
#include "wire/segment_rounding.hpp"

namespace kvwire {

class ChunkRounder {
public:
    // Writes the payload of the chunk of `header` to `*body`, and fills in the codec, both
    // checksums and payload_bytes. What does not shrink, or must go raw, is there raw: the rounded
    // bytes. `tables`: the link's, as for ChunkEncoder.
    void encode(const Placement& placement, const SegmentRounding& rounding, SendTables* tables,
                FrameHeader* header, Bytes* body);

private:
    std::shared_ptr<const CodeTable> table_of(uint32_t index) const;
    void note_nested(const uint8_t* payload) const;

    QuantisedEncoder encoder_;
    QuantisedDecoder decoder_;
    std::vector<QuantisedPart> parts_;
    std::vector<CodeEntry*> entries_;  // of all that is nested in parts_
    Bytes raw_;
};

}  // namespace kvwire
