#pragma once
// Rounds and codes the chunks of a segment of which something is lossy (FORMAT.md section 9.3).

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
    // bytes.
    void encode(const Placement& placement, const SegmentRounding& rounding, FrameHeader* header,
                Bytes* body);

private:
    QuantisedEncoder encoder_;
    QuantisedDecoder decoder_;
    std::vector<QuantisedPart> parts_;
    Bytes raw_;
};

}  // namespace kvwire
