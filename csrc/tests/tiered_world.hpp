// Tables, elements and whole payloads of the tiered code, for its test and its fuzz target.
#pragma once

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "codec/tiered.hpp"
#include "tests/fenced.hpp"
#include "tests/plan_world.hpp"

namespace kvwire::test {

using Table = std::shared_ptr<const CodeTable>;

inline std::vector<const char*> supported_variants() {
    std::vector<const char*> names;
    for (const TieredVariantInfo& variant : tiered_variants())
        if (variant.supported) names.push_back(variant.name);
    return names;
}

// Any table of a dtype; bases near those of numbers around 1.
inline Table any_table(uint8_t dtype, Random& random) {
    const unsigned symbols = 1u << element_format(dtype)->exponent_bits;
    std::vector<uint8_t> tier_bits;
    unsigned bits = 0, ranks = 0;
    for (uint64_t tier = pick(random, 1, CodeTable::TIERS_MAX); tier > 0; --tier) {
        const unsigned width = unsigned(pick(random, 1, CodeTable::TIER_BITS_MAX));
        const unsigned more = (1u << width) - 1;
        if (bits + width > CodeTable::DIGIT_BITS_MAX ||
            ranks + more > std::min(symbols, unsigned(CodeTable::RANKS_MAX)))
            break;
        bits += width;
        ranks += more;
        tier_bits.push_back(uint8_t(width));
    }
    if (tier_bits.empty()) tier_bits.push_back(uint8_t(ranks = 1));
    static constexpr unsigned windows[] = {16, 32, 64, 256};
    const unsigned window = std::min(symbols, windows[pick(random, 0, 3)]);
    std::vector<uint8_t> offsets(window);
    for (unsigned i = 0; i < window; ++i) offsets[i] = uint8_t(i);
    for (unsigned i = 0; i < ranks; ++i)
        std::swap(offsets[i], offsets[pick(random, i, window - 1)]);
    offsets.resize(ranks);
    BasePattern pattern;
    for (uint32_t& extent : pattern.extents) extent = uint32_t(pick(random, 1, 4));
    pattern.row_axes = uint8_t(pick(random, 0, 15));
    pattern.column_axes = uint8_t(pick(random, 0, 15));
    std::vector<uint8_t> bases(pattern.row_count() + pattern.column_count());
    for (size_t i = 0; i < bases.size(); ++i)
        bases[i] = uint8_t(i < pattern.row_count() ? (symbols / 2 - window / 3 + i % 3) % symbols
                                                   : i % 2);
    return CodeTable::make(dtype, tier_bits, offsets, pattern, bases);
}

// `count` elements: noise, constant, or sign and mantissa at random with exponents that crowd.
inline void fill_elements(uint8_t* raw, size_t count, uint8_t dtype, Random& random) {
    const ElementFormat& format = *element_format(dtype);
    const size_t item_bytes = format.item_bytes;
    std::vector<uint8_t> noise(count * item_bytes);
    random.fill(noise);
    const uint64_t kind = pick(random, 0, 7);
    const uint32_t middle = 1u << (format.exponent_bits - 1);
    for (size_t i = 0; i < count; ++i) {
        uint32_t item = 0;
        std::memcpy(&item, &noise[(kind == 0 ? 0 : i) * item_bytes], item_bytes);
        if (kind > 1) {
            const int below = item == 0 ? 9 : __builtin_ctz(item);
            const uint32_t exponent = (middle - uint32_t(below)) & (2 * middle - 1);
            const int mantissa_bits = format.verbatim_bits - 1;
            item &= ~((2 * middle - 1) << mantissa_bits);
            item |= exponent << mantissa_bits;
        }
        std::memcpy(raw + i * item_bytes, &item, item_bytes);
    }
}

// What a variant makes of `parts`; empty: they do not fit. Every strip is read from memory that
// ends where it ends.
inline std::vector<uint8_t> encode_fenced(const char* variant, const std::vector<CodedPart>& parts,
                                          const std::vector<uint8_t>& raw, size_t out_max) {
    const Fenced out(out_max);
    TieredEncoder encoder(variant);
    encoder.begin(parts, out.data(), out_max);
    for (size_t at = 0, bytes; (bytes = encoder.next_bytes()) > 0; at += bytes) {
        const Fenced strip(raw.data() + at, bytes);
        encoder.strip(strip.data());
    }
    const size_t coded = encoder.finish();
    CHECK(coded <= out_max);
    CHECK(out.untouched_before());
    return {out.data(), out.data() + std::min(coded, out_max)};
}

struct Decoded {
    ErrorCode code = ErrorCode::OK;
    std::vector<uint8_t> raw;  // nothing unless OK

    bool operator==(const Decoded& other) const {
        return code == other.code && raw == other.raw;
    }
};

// Every strip is written to memory that ends where it ends.
inline Decoded decode_fenced(const char* variant, const std::vector<uint8_t>& payload,
                             size_t raw_bytes, const std::map<uint32_t, Table>& tables = {}) {
    const Fenced coded(payload);
    TieredDecoder decoder(variant);
    Decoded decoded;
    decoded.code = decoder.begin(coded.data(), payload.size(), raw_bytes, [&](uint32_t index) {
        const auto found = tables.find(index);
        return found == tables.end() ? nullptr : found->second;
    });
    while (const size_t bytes = decoder.next_bytes()) {
        const Fenced strip(bytes);
        if (!decoder.strip(strip.data())) {
            decoded.code = ErrorCode::CODED_INVALID;
            decoded.raw.clear();
            break;
        }
        CHECK(strip.untouched_before());
        decoded.raw.insert(decoded.raw.end(), strip.data(), strip.data() + bytes);
    }
    CHECK(decoded.code != ErrorCode::OK || decoded.raw.size() == raw_bytes);
    return decoded;
}

}  // namespace kvwire::test
