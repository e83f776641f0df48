// The tiered exponent code (FORMAT.md section 9.1), one strip at a time: so the caller can read
// strips from the engine's pages and write them there, and checksum each while it is in cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "base/error.hpp"
#include "codec/code_table.hpp"

namespace kvwire {

constexpr uint32_t TABLE_INSIDE = 0;
constexpr uint32_t TABLE_NONE = 0xFFFFFFFF;  // the part is opaque
constexpr size_t STRIP_BYTES_MAX = STRIP_ELEMENTS * 4;

// Consecutive bytes of a chunk that are coded alike.
struct CodedPart {
    uint32_t raw_bytes = 0;
    std::shared_ptr<const CodeTable> table;  // null: opaque
    uint32_t position = 0;                   // of the first element in the table's pattern
    uint32_t table_index = TABLE_INSIDE;     // else the link's
};

// What any encoder may need for these parts: `out` of this size is always enough.
size_t tiered_bytes_max(const std::vector<CodedPart>& parts);

// Writes the payload straight into `out`; only tails are kept aside until their part ends.
class TieredEncoder {
public:
    // Both are borrowed until finish(). Reusable: buffers are kept from chunk to chunk.
    void begin(const std::vector<CodedPart>& parts, uint8_t* out, size_t out_max);

    // Bytes of the strip that strip() takes next; 0 after the last.
    size_t next_bytes() const;
    void strip(const uint8_t* raw);

    // Length of the payload; 0 when it does not fit `out_max`.
    size_t finish();

    // (the builder of this class adds its private parts)
};

// Hands out strips in order. Every length and index is checked before it is used.
class TieredDecoder {
public:
    // The link's table of an index (neither TABLE_INSIDE nor TABLE_NONE); null: not known.
    using TableOf = std::function<std::shared_ptr<const CodeTable>(uint32_t index)>;

    // OK, CODED_INVALID or TABLE_UNKNOWN: of all parts, before any strip is decoded. `payload` is
    // borrowed until the last strip.
    ErrorCode begin(const uint8_t* payload, size_t payload_bytes, size_t raw_bytes,
                    const TableOf& table_of);
    uint32_t table_missing() const;  // the index, after TABLE_UNKNOWN

    size_t next_bytes() const;  // 0 after the last
    // False, with anything in `raw`, when the strip is CODED_INVALID. Writes next_bytes() bytes.
    [[nodiscard]] bool strip(uint8_t* raw);
};

// Names of the compiled strip kernels, fastest first: "avx512", "avx2", "portable".
struct TieredVariantInfo {
    const char* name;
    bool supported;
};
std::vector<TieredVariantInfo> tiered_variants();
// The one in use: what the environment variable KVWIRE_TIERED names, else the first supported one.
// Throws std::invalid_argument for one that is unknown or not supported.
const char* tiered_active();

}  // namespace kvwire
