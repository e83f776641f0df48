// The lossy rungs (FORMAT.md section 9.3). The encoder rounds; the decoder says what the rounded
// elements are, to the bit, on either side.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "codec/lattice.hpp"
#include "codec/tiered.hpp"

namespace kvwire {

namespace quantised {
struct Kernels;
}

enum class Rung : uint8_t { EXACT, BF16, E4M3, INT8_GRID, INT8, INT6, INT4 };

// Consecutive elements of a chunk that are rounded alike.
struct QuantisedPart {
    Rung rung = Rung::EXACT;
    uint8_t dtype = 0;  // a number of FORMAT.md section 7.1; BYTES where they go EXACT
    Lattice lattice;
    // For the elements as they travel; none: one opaque part. No rung with groups has any.
    std::vector<CodedPart> nested;

    uint64_t raw_bytes() const;
    // Whether FORMAT.md allows rung, dtype and axes together, and the extents are not 0.
    bool valid() const;
};

// The elements that a rung rounds to and the tiered code can make smaller; nothing: there are none.
std::optional<uint8_t> rounded_dtype(Rung rung);
// Where in a coded part its nested payload begins.
size_t nested_offset(const QuantisedPart& part);

// What any encoder may need for these parts: `out` of this size is always enough.
size_t quantised_bytes_max(const std::vector<QuantisedPart>& parts);

// One thread at a time; buffers are kept from chunk to chunk.
class QuantisedEncoder {
public:
    // `variant` as quantised_variants() names it; none: what the environment variable
    // KVWIRE_QUANTISED names, else the fastest. Throws std::invalid_argument for an unknown one.
    explicit QuantisedEncoder(const char* variant = nullptr);

    // Codes `raw`, which the parts cover, and returns the length of the payload; 0 when it does not
    // fit `out_max`. What travels is what QuantisedDecoder makes of the payload. All parts are
    // valid().
    size_t encode(const std::vector<QuantisedPart>& parts, const uint8_t* raw, uint8_t* out,
                  size_t out_max);

    // The elements of a part, of a rung without groups, as they travel, until the next call;
    // null: it goes EXACT.
    const uint8_t* narrowed(const QuantisedPart& part, const uint8_t* raw);

private:
    size_t part(const QuantisedPart& part, const uint8_t* raw, uint8_t* out, size_t out_max);
    size_t nested(const std::vector<CodedPart>& parts, const uint8_t* bytes, size_t count,
                  uint8_t* out, size_t out_max);
    size_t scaled(const QuantisedPart& part, const uint8_t* raw, uint8_t* out, size_t out_max);
    void narrow(const QuantisedPart& part, const uint8_t* raw);
    size_t grouped(const QuantisedPart& part, const uint8_t* raw, uint8_t* out, size_t out_max);
    void find_grid(const QuantisedPart& part, const uint8_t* raw);
    void find_groups(const QuantisedPart& part, const uint8_t* raw);
    template <class Visit>
    void strips(const QuantisedPart& part, const uint8_t* raw, Visit&& visit) const;
    bool can_round(const QuantisedPart& part, const uint8_t* raw) const;

    const quantised::Kernels& kernels_;
    TieredEncoder tiered_;
    std::vector<CodedPart> opaque_;
    std::vector<uint8_t> narrow_;
    std::vector<float> first_, second_;  // scales and minima; or rows' and columns' scales
};

// Hands out strips in order. Every length and index is checked before it is used. One thread at a
// time.
class QuantisedDecoder {
public:
    explicit QuantisedDecoder(const char* variant = nullptr);  // as QuantisedEncoder

    // OK, CODED_INVALID or TABLE_UNKNOWN: of all parts, before any strip is decoded. `payload` is
    // borrowed until the last strip, and till then `table_of` may be asked again.
    ErrorCode begin(const uint8_t* payload, size_t payload_bytes, size_t raw_bytes,
                    TieredDecoder::TableOf table_of);
    uint32_t table_missing() const { return tiered_.table_missing(); }  // after TABLE_UNKNOWN

    size_t next_bytes() const;  // at most STRIP_BYTES_MAX; 0 after the last
    // False, with anything in `raw`, when the strip is CODED_INVALID. Writes next_bytes() bytes.
    [[nodiscard]] bool strip(uint8_t* raw);

private:
    struct Part {
        QuantisedPart shape;
        const uint8_t* scales;  // bf16, as they travel
        size_t first_count, second_count;
        const uint8_t* rest;  // the nested payload, or codes
        size_t rest_bytes;
    };
    ErrorCode read_part(const uint8_t* bytes, size_t left, size_t raw_left, size_t* taken);
    ErrorCode begin_nested(const Part& part);
    ErrorCode enter();
    bool widen(const Part& part, size_t count, float* values);

    const quantised::Kernels& kernels_;
    TieredDecoder::TableOf table_of_;
    TieredDecoder tiered_;
    std::vector<Part> parts_;
    size_t part_ = 0, element_ = 0;  // the next strip's
    std::vector<uint8_t> narrow_;    // of the part, once its first strip was asked for
    std::vector<float> first_, second_;
};

// Names of the compiled variants, fastest first: "avx2", "portable".
std::vector<TieredVariantInfo> quantised_variants();
// The one in use. Throws as the encoder does.
const char* quantised_active();

}  // namespace kvwire
