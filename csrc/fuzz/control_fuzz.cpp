// Control payloads of every type: refused by their code, or the same when written again, since
// every value has exactly one encoding.

#include "fuzz/fuzz.hpp"
#include "wire/manifest.hpp"

namespace kvwire {
namespace {

Bytes decoded_and_encoded(FrameType type, ByteSpan payload) {
    switch (type) {
        case FrameType::MANIFEST: return encode(decode_manifest(payload));
        case FrameType::GRANT: return encode(decode_grant(payload));
        case FrameType::SEGMENT: return encode(decode_segment(payload));
        case FrameType::SEGMENT_END: return encode(decode_segment_end(payload));
        case FrameType::END: return encode(decode_end(payload));
        case FrameType::RECEIPT: return encode(decode_receipt(payload));
        case FrameType::REPAIR: return encode(decode_repair(payload));
        case FrameType::ABORT: return encode(decode_abort(payload));
        case FrameType::PULL: return encode(decode_pull(payload));
        case FrameType::DONE: return encode(decode_done(payload));
        default: return Bytes(payload.data, payload.data + payload.size);
    }
}

}  // namespace
}  // namespace kvwire

// The first byte: the type.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace kvwire;
    if (size < 1) return 0;
    FrameHeader header;  // a lane reads no payload of another size
    header.type = fuzz::type_of(data[0] % 18);
    const ByteSpan payload{data + 1, size - 1};
    uint8_t sealed[HEADER_BYTES];
    header.transfer_id.bytes[0] = header.type < FrameType::CLOSE;
    header.payload_bytes = uint32_t(payload.size);
    encode_header(header, sealed);
    return fuzz::run([&] {
        Bytes again;
        if (fuzz::refusal([&] {
                decode_header(sealed, FrameLimits{});
                again = decoded_and_encoded(header.type, payload);
            }) != ErrorCode::OK)
            return;
        // An unknown error is read as INTERNAL.
        const size_t same_from = header.type == FrameType::ABORT ? sizeof(uint16_t) : 0;
        CHECK_EQ(again.size(), payload.size);
        CHECK(std::equal(again.begin() + same_from, again.end(), payload.data + same_from));
    });
}
