// The tiered exponent code (FORMAT.md section 9.1), one strip at a time: so the caller can read
// strips from the engine's pages and write them there, and checksum each while it is in cache.
#pragma once

#include <array>
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
constexpr size_t STRIP_SCRATCH_BYTES = STRIP_ELEMENTS + CodeTable::OVERREAD_BYTES + 1;

struct TieredKernels;  // tiered_variants.hpp
enum class StripForm : uint8_t { TIERED = 0, EXACT = 1, CONSTANT = 2 };

// Consecutive bytes of a chunk that are coded alike: at least one, and whole elements.
struct CodedPart {
    uint32_t raw_bytes = 0;
    std::shared_ptr<const CodeTable> table;  // null: opaque
    uint32_t position = 0;                   // of the first element, below the table's period
    uint32_t table_index = TABLE_INSIDE;     // else the link's
};

// What any encoder may need for these parts: `out` of this size is always enough.
size_t tiered_bytes_max(const std::vector<CodedPart>& parts);

// Writes the payload straight into `out`; only tails are kept aside until their part ends. One
// thread at a time; buffers are kept from chunk to chunk.
class TieredEncoder {
public:
    // `variant` as tiered_variants() names it; none: tiered_active(). Throws as that does.
    explicit TieredEncoder(const char* variant = nullptr);

    // Both are borrowed until finish().
    void begin(const std::vector<CodedPart>& parts, uint8_t* out, size_t out_max);

    // Bytes of the strip that strip() takes next; 0 after the last.
    size_t next_bytes() const;
    void strip(const uint8_t* raw);

    // Length of the payload; 0 when it does not fit `out_max`, of which anything may be written.
    size_t finish();

private:
    struct Coded {
        StripForm form;
        size_t body_bytes;
        size_t tail_bytes;
    };
    bool room(size_t bytes);
    Coded code_strip(const uint8_t* raw, size_t bytes, uint8_t* tail);
    void open_part();
    void close_part();
    size_t encode_strip(const uint8_t* raw, size_t count, uint8_t* tail);

    const TieredKernels& kernels_;
    const std::vector<CodedPart>* parts_ = nullptr;
    size_t part_ = 0;      // of parts_
    size_t raw_done_ = 0;  // of the part
    uint8_t* out_ = nullptr;
    uint8_t* out_stop_ = nullptr;
    uint8_t* header_ = nullptr;  // of the part
    uint8_t* index_ = nullptr;   // its next entry
    uint8_t* body_ = nullptr;    // where the next one goes
    bool fits_ = true;
    std::vector<uint8_t> tails_;
    size_t tails_bytes_ = 0;
    alignas(64) std::array<uint8_t, STRIP_SCRATCH_BYTES> bases_;
    alignas(64) std::array<uint8_t, STRIP_SCRATCH_BYTES> distances_;
};

// Hands out strips in order. Every length and index is checked before it is used. One thread at a
// time.
class TieredDecoder {
public:
    // The link's table of an index (neither TABLE_INSIDE nor TABLE_NONE); null: not known.
    using TableOf = std::function<std::shared_ptr<const CodeTable>(uint32_t index)>;

    explicit TieredDecoder(const char* variant = nullptr);  // as TieredEncoder

    // OK, CODED_INVALID or TABLE_UNKNOWN: of all parts, before any strip is decoded. `payload` is
    // borrowed until the last strip, and till then `table_of` may be asked again.
    ErrorCode begin(const uint8_t* payload, size_t payload_bytes, size_t raw_bytes,
                    TableOf table_of);
    uint32_t table_missing() const { return table_missing_; }  // the index, after TABLE_UNKNOWN

    size_t next_bytes() const;  // 0 after the last
    // False, with anything in `raw`, when the strip is CODED_INVALID. Writes next_bytes() bytes.
    [[nodiscard]] bool strip(uint8_t* raw);

private:
    struct Part {
        std::shared_ptr<const CodeTable> table;  // null: opaque
        size_t raw_left = 0;
        uint32_t position = 0;           // of the next strip
        const uint8_t* index = nullptr;  // entries, bodies and tails of the strips that are left
        const uint8_t* body = nullptr;
        const uint8_t* tail = nullptr;
        const uint8_t* stop = nullptr;  // of the part
    };
    ErrorCode read_part(const uint8_t* bytes, size_t raw_left, Part* part);
    bool check_strips(const uint8_t* bytes, Part* part) const;
    bool decode_strip(size_t count, size_t tail_bytes, uint8_t* raw);

    const TieredKernels& kernels_;
    TableOf table_of_;
    uint32_t table_missing_ = 0;
    const uint8_t* payload_stop_ = nullptr;
    Part part_;
    alignas(64) std::array<uint8_t, STRIP_SCRATCH_BYTES> bases_;
    alignas(64) std::array<std::array<uint8_t, STRIP_SCRATCH_BYTES>, 2> distances_;
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
