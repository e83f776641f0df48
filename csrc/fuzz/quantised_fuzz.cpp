// The lossy rungs: whatever is decoded, nothing lies outside the buffers, and all variants say the
// same; what is encoded decodes, and bytes that cannot be rounded come back as they were.

#include "codec/quantised.hpp"

#include "codec/quantised_kernels.hpp"
#include "fuzz/fuzz.hpp"

namespace kvwire {
namespace {

using fuzz::Bytes;
using test::pick;
using test::Random;

constexpr size_t RAW_BYTES_MAX = 1 << 16;

struct Decoded {
    ErrorCode code;
    Bytes raw;
};

Decoded decode(const Bytes& payload, size_t raw_bytes, const char* variant) {
    QuantisedDecoder decoder(variant);
    const ErrorCode code = decoder.begin(payload.data(), payload.size(), raw_bytes,
                                         [](uint32_t) { return nullptr; });
    if (code != ErrorCode::OK) return {code, {}};
    Bytes raw;
    while (const size_t bytes = decoder.next_bytes()) {
        CHECK(bytes <= STRIP_BYTES_MAX && raw.size() + bytes <= raw_bytes);
        Bytes strip(bytes);  // of that size, for the sanitizers
        if (!decoder.strip(strip.data())) return {ErrorCode::CODED_INVALID, {}};
        raw.insert(raw.end(), strip.begin(), strip.end());
    }
    CHECK(raw.size() == raw_bytes);
    return {ErrorCode::OK, raw};
}

Decoded decode_by_all(const Bytes& payload, size_t raw_bytes) {
    const Decoded first = decode(payload, raw_bytes, "portable");
    for (const TieredVariantInfo& variant : quantised_variants()) {
        if (!variant.supported) continue;
        const Decoded other = decode(payload, raw_bytes, variant.name);
        CHECK(other.code == first.code && other.raw == first.raw);
    }
    return first;
}

QuantisedPart any_part(Random& choices, size_t raw_max) {
    using namespace quantised;
    QuantisedPart part;
    part.rung = Rung(pick(choices, 0, 6));
    part.dtype = part.rung == Rung::EXACT  ? BYTES
                 : part.rung == Rung::BF16 ? FP32
                                           : uint8_t(pick(choices, FP32, quantised::BF16));
    size_t left = std::max<size_t>(raw_max / 4, 1);
    for (size_t axis = Lattice::AXES; axis-- > 0;) {
        part.lattice.extents[axis] = uint32_t(pick(choices, 1, std::min<size_t>(left, 5000)));
        left /= part.lattice.extents[axis];
    }
    part.lattice.row_axes = uint8_t(pick(choices, 0, 15));
    part.lattice.column_axes = uint8_t(pick(choices, 0, 15));
    if (part.rung != Rung::E4M3 && part.rung != Rung::INT8_GRID) part.lattice.column_axes = 0;
    if (part.rung <= Rung::BF16) part.lattice.row_axes = 0;
    CHECK(part.valid() && part.raw_bytes() <= std::max<size_t>(raw_max, 4));
    return part;
}

Bytes encode(const std::vector<QuantisedPart>& parts, const Bytes& raw, size_t room,
             const char* variant) {
    Bytes out(room);
    out.resize(QuantisedEncoder(variant).encode(parts, raw.data(), out.data(), room));
    return out;
}

void round_trip(Random& choices, const uint8_t* data, size_t size) {
    std::vector<QuantisedPart> parts;
    size_t raw_bytes = 0;
    for (uint64_t part = pick(choices, 0, 1); part < 2; ++part) {
        parts.push_back(any_part(choices, size));
        raw_bytes += size_t(parts.back().raw_bytes());
    }
    Bytes raw(raw_bytes);
    for (size_t i = 0; i < raw_bytes; ++i) raw[i] = data[i % size];

    const size_t room = quantised_bytes_max(parts);
    Bytes payload = encode(parts, raw, room, "portable");
    CHECK(!payload.empty());
    for (const TieredVariantInfo& variant : quantised_variants())
        if (variant.supported) CHECK(encode(parts, raw, room, variant.name) == payload);
    CHECK(encode(parts, raw, pick(choices, 0, payload.size() - 1), "portable").empty());
    const Decoded decoded = decode_by_all(payload, raw_bytes);
    CHECK(decoded.code == ErrorCode::OK);
    size_t at = 0, part_at = 0;
    for (const QuantisedPart& part : parts) {
        const size_t bytes = size_t(part.raw_bytes());
        if (Rung(payload[at + 8]) == Rung::EXACT)
            CHECK(std::memcmp(&raw[part_at], &decoded.raw[part_at], bytes) == 0);
        at += load_le<uint32_t>(&payload[at + 4]);
        part_at += bytes;
    }
    fuzz::change(payload, choices);
    decode_by_all(payload, raw_bytes);
}

}  // namespace
}  // namespace kvwire

// The first bytes: what to do, and a length; then choices, and data.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace kvwire;
    if (size < 24) return 0;
    const size_t length = load_le<uint16_t>(data + 1);
    return fuzz::run([&] {
        if (data[0] & 1) {
            decode_by_all(fuzz::Bytes(data + 3, data + size), std::min(length, RAW_BYTES_MAX));
            return;
        }
        test::Random choices(ByteSpan{data + 3, 20});
        round_trip(choices, data + 23, size - 23);
    });
}
