#include "codec/codec.hpp"

#include <algorithm>
#include <climits>
#include <cstring>

#include "codec/lz4.hpp"
#include "codec/planes.hpp"

namespace kvwire {
namespace {

constexpr uint32_t bit(Codec codec) { return 1u << static_cast<uint8_t>(codec); }

size_t encode_lz4(const uint8_t* raw, size_t raw_bytes, uint32_t item_bytes, uint8_t* out,
                  size_t out_max, uint8_t* scratch) {
    const Lz4* lz4 = lz4_library();
    if (!lz4 || raw_bytes == 0 || raw_bytes > INT_MAX || item_bytes == 0) return 0;
    // One byte less than the source is all that a coding worth sending may take.
    const size_t limit = std::min(out_max, raw_bytes - 1);
    if (limit == 0) return 0;
    if (item_bytes > 1) {
        split_planes(raw, raw_bytes, item_bytes, scratch);
        raw = scratch;
    }
    const int coded = lz4->compress(reinterpret_cast<const char*>(raw),
                                    reinterpret_cast<char*>(out), static_cast<int>(raw_bytes),
                                    static_cast<int>(limit));
    return coded > 0 ? static_cast<size_t>(coded) : 0;
}

bool decode_lz4(const uint8_t* coded, size_t coded_bytes, uint32_t item_bytes, uint8_t* raw,
                size_t raw_bytes, uint8_t* scratch) {
    const Lz4* lz4 = lz4_library();
    if (!lz4 || coded_bytes == 0 || coded_bytes > INT_MAX || raw_bytes == 0 ||
        raw_bytes > INT_MAX || item_bytes == 0) {
        return false;
    }
    uint8_t* planes = item_bytes > 1 ? scratch : raw;
    const int decoded = lz4->decompress(reinterpret_cast<const char*>(coded),
                                        reinterpret_cast<char*>(planes),
                                        static_cast<int>(coded_bytes), static_cast<int>(raw_bytes));
    if (decoded < 0 || static_cast<size_t>(decoded) != raw_bytes) return false;
    if (item_bytes > 1) join_planes(scratch, raw_bytes, item_bytes, raw);
    return true;
}

}  // namespace

uint32_t codecs_available() {
    return bit(Codec::RAW) | bit(Codec::TIERED) | bit(Codec::QUANTISED) |
           (lz4_library() ? bit(Codec::LZ4) : 0);
}

const char* codec_name(Codec codec) {
    switch (codec) {
        case Codec::RAW: return "RAW";
        case Codec::LZ4: return "LZ4";
        case Codec::TIERED: return "TIERED";
        case Codec::QUANTISED: return "QUANTISED";
    }
    return nullptr;
}

size_t coded_bytes_max(Codec codec, size_t raw_bytes) {
    switch (codec) {
        case Codec::RAW: return raw_bytes;
        case Codec::LZ4: return raw_bytes == 0 ? 0 : raw_bytes - 1;
        case Codec::TIERED: case Codec::QUANTISED: return 0;
    }
    return 0;
}

size_t encode(Codec codec, const uint8_t* raw, size_t raw_bytes, uint32_t item_bytes, uint8_t* out,
              size_t out_max, uint8_t* scratch) {
    switch (codec) {
        case Codec::RAW: case Codec::TIERED: case Codec::QUANTISED: return 0;
        case Codec::LZ4: return encode_lz4(raw, raw_bytes, item_bytes, out, out_max, scratch);
    }
    return 0;
}

bool decode(Codec codec, const uint8_t* coded, size_t coded_bytes, uint32_t item_bytes,
            uint8_t* raw, size_t raw_bytes, uint8_t* scratch) {
    switch (codec) {
        case Codec::RAW:
            if (coded_bytes != raw_bytes) return false;
            if (raw_bytes != 0) std::memcpy(raw, coded, raw_bytes);
            return true;
        case Codec::LZ4:
            return decode_lz4(coded, coded_bytes, item_bytes, raw, raw_bytes, scratch);
        case Codec::TIERED: case Codec::QUANTISED: return false;
    }
    return false;
}

}  // namespace kvwire
