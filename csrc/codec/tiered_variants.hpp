// What the tiered code does to the elements of one strip, once for each instruction set. Each is
// compiled under baseline flags, with the instruction set named per function; tiered.cpp decides
// which may run. No kernel reads or writes a byte beyond what it is told to, except in the arrays
// of distances, which are the coder's own and have SLACK bytes behind them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/bytes.hpp"
#include "codec/code_table.hpp"

namespace kvwire {

// The cut of an element, FORMAT.md section 9.1.
template <class Item_, int EXPONENT_BITS>
struct ElementCut {
    using Item = Item_;
    static constexpr size_t BYTES = sizeof(Item);
    static constexpr int BITS = 8 * int(BYTES);
    static constexpr int VERBATIM_BITS = BITS - EXPONENT_BITS;
    static constexpr size_t WHOLE = VERBATIM_BITS / 8;  // bytes of the verbatim value
    static constexpr size_t REST = VERBATIM_BITS % 8;   // and its bit planes
    static constexpr uint8_t EXPONENT_MASK = uint8_t((1 << EXPONENT_BITS) - 1);
};

using Fp32 = ElementCut<uint32_t, 8>;
using Fp16 = ElementCut<uint16_t, 5>;
using Bf16 = ElementCut<uint16_t, 8>;
using E4m3 = ElementCut<uint8_t, 4>;
using E5m2 = ElementCut<uint8_t, 5>;

constexpr size_t plane_bytes(size_t count) { return (count + 7) / 8; }

struct TieredKernels {
    static constexpr size_t SLACK = 64;

    // Cuts `count` elements: verbatim values to `body`, distances from `bases` to `distances`.
    using Split = void (*)(const uint8_t* raw, const uint8_t* bases, size_t count, uint8_t* body,
                           uint8_t* distances);
    // Puts them together again.
    using Join = void (*)(const uint8_t* body, const uint8_t* bases, const uint8_t* distances,
                          size_t count, uint8_t* raw);

    const char* name;
    bool supported;
    std::array<Split, 5> split;  // by dtype - 1, as the table of element formats
    std::array<Join, 5> join;

    // Writes the planes of one tier, which bits `shift` up to `shift + width` of the table's
    // digits make; moves the distances that go on to the front and returns how many they are.
    size_t (*put_tier)(const CodeTable& table, int shift, int width, uint8_t* distances,
                       size_t count, uint8_t* planes);
    // How many of the `count` elements of a tier go on.
    size_t (*count_on)(const uint8_t* planes, size_t count, int width);
    // The distances of a tier's `count` elements: from `offsets` of its digits, or, where it goes
    // on, the next of `lower`. 16 offsets are readable.
    void (*get_tier)(const uint8_t* offsets, int width, const uint8_t* planes, size_t count,
                     const uint8_t* lower, uint8_t* distances);
    AddBase add_base;
};

const TieredKernels& tiered_portable();
#if defined(__x86_64__)
const TieredKernels& tiered_avx2();
const TieredKernels& tiered_avx512();
#endif

// The kernels of a variant; of none, those in use. Throws std::invalid_argument for one that is
// unknown or not supported.
const TieredKernels& tiered_kernels(const char* variant);

// Up to 8 bytes of a plane as bits: those behind the end are 0, or are not written.
inline uint64_t load_bits(const uint8_t* plane, size_t bytes) {
    if (bytes >= 8) return load_le<uint64_t>(plane);
    uint64_t bits = 0;
    for (size_t i = 0; i < bytes; ++i) bits |= uint64_t(plane[i]) << 8 * i;
    return bits;
}

inline void store_bits(uint8_t* plane, uint64_t bits, size_t bytes) {
    if (bytes >= 8) return store_le(plane, bits);
    for (size_t i = 0; i < bytes; ++i) plane[i] = uint8_t(bits >> 8 * i);
}

// The same for what is left at the end of a plane of `bytes`, by way of the whole words before it,
// if there are any: without a branch on how much it is, which nobody can predict.
inline uint64_t load_last_bits(const uint8_t* plane, size_t bytes, bool behind_words) {
    const size_t left = (bytes - 1) % 8 + 1;
    if (!behind_words) return load_bits(plane, left);
    return load_le<uint64_t>(plane + bytes - 8) >> 8 * (8 - left);
}

// `latest`: the last of those words.
inline void store_last_bits(uint8_t* plane, size_t bytes, bool behind_words, uint64_t latest,
                            uint64_t bits) {
    const size_t left = (bytes - 1) % 8 + 1;
    if (!behind_words) return store_bits(plane, bits, left);
    const uint64_t before = latest >> 4 * left >> 4 * left;
    store_le(plane + bytes - 8, before | bits << 8 * (8 - left));
}

// Bit `bit` of 8 bytes as a byte of a plane, and back: 1 in the bytes that the plane's byte names.
inline uint8_t gather_plane(uint64_t bytes, size_t bit) {
    return uint8_t((bytes >> bit & 0x0101010101010101) * 0x0102040810204080 >> 56);
}

inline uint64_t spread_plane(uint8_t plane) {
    const uint64_t single = plane * uint64_t(0x0101010101010101) & 0x8040201008040201;
    return (single + 0x7F7F7F7F7F7F7F7F) >> 7 & 0x0101010101010101;
}

// ---- portable kernels from one element on: also for what is left behind the whole registers.
// `first` is a multiple of 8; pointers and counts are those of the strip.

template <class Cut>
void split_from(size_t first, const uint8_t* raw, const uint8_t* bases, size_t count,
                uint8_t* body, uint8_t* distances) {
    using Item = typename Cut::Item;
    uint8_t* const planes = body + count * Cut::WHOLE;
    for (size_t i = first; i < count; i += 8) {
        uint64_t rest = 0;  // what goes into planes, a byte for each element
        for (size_t k = 0; k < 8 && i + k < count; ++k) {
            const Item item = load_le<Item>(raw + (i + k) * Cut::BYTES);
            const Item rotated = Item(item << 1 | item >> (Cut::BITS - 1));
            for (size_t byte = 0; byte < Cut::WHOLE; ++byte)
                body[(i + k) * Cut::WHOLE + byte] = uint8_t(rotated >> 8 * byte);
            if constexpr (Cut::REST > 0)
                rest |= uint64_t(uint8_t(rotated >> 8 * Cut::WHOLE)) << 8 * k;
            distances[i + k] =
                uint8_t((rotated >> Cut::VERBATIM_BITS) - bases[i + k]) & Cut::EXPONENT_MASK;
        }
        for (size_t bit = 0; bit < Cut::REST; ++bit)
            planes[bit * plane_bytes(count) + i / 8] = gather_plane(rest, bit);
    }
}

template <class Cut>
void join_from(size_t first, const uint8_t* body, const uint8_t* bases, const uint8_t* distances,
               size_t count, uint8_t* raw) {
    using Item = typename Cut::Item;
    const uint8_t* const planes = body + count * Cut::WHOLE;
    for (size_t i = first; i < count; i += 8) {
        uint64_t rest = 0;
        for (size_t bit = 0; bit < Cut::REST; ++bit)
            rest |= spread_plane(planes[bit * plane_bytes(count) + i / 8]) << bit;
        for (size_t k = 0; k < 8 && i + k < count; ++k) {
            const Item exponent = Item((distances[i + k] + bases[i + k]) & Cut::EXPONENT_MASK);
            Item rotated = Item(exponent << Cut::VERBATIM_BITS);
            for (size_t byte = 0; byte < Cut::WHOLE; ++byte)
                rotated |= Item(Item(body[(i + k) * Cut::WHOLE + byte]) << 8 * byte);
            if constexpr (Cut::REST > 0)
                rotated |= Item(Item(uint8_t(rest >> 8 * k)) << 8 * Cut::WHOLE);
            store_le<Item>(raw + (i + k) * Cut::BYTES,
                           Item(rotated >> 1 | rotated << (Cut::BITS - 1)));
        }
    }
}

}  // namespace kvwire
