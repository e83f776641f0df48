// Code tables of the tiered exponent code (FORMAT.md section 9.1).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace kvwire {

// How an element is cut: exponent bits above verbatim ones, once rotated left by a bit.
struct ElementFormat {
    uint8_t item_bytes;
    uint8_t exponent_bits;
    uint8_t verbatim_bits;
};

// nullptr: the tiered code does not know the dtype (a number of FORMAT.md section 7.1).
const ElementFormat* element_format(uint8_t dtype);

constexpr size_t STRIP_ELEMENTS = 4096;

// How bases repeat along the elements: axes outer to inner, and which of them count where.
struct BasePattern {
    static constexpr int AXES = 4;
    std::array<uint32_t, AXES> extents = {1, 1, 1, 1};
    uint8_t row_axes = 0;
    uint8_t column_axes = 0;

    uint64_t period() const;
    uint64_t row_count() const;     // at least 1
    uint64_t column_count() const;  // 0 without column axes
};

// sums[i] = (values[i] + base) & mask, which `sums` and `values` may not share.
using AddBase = void (*)(const uint8_t* values, uint8_t base, uint8_t mask, size_t count,
                         uint8_t* sums);
void add_base_portable(const uint8_t* values, uint8_t base, uint8_t mask, size_t count,
                       uint8_t* sums);

// Immutable, so any thread may use it.
class CodeTable {
public:
    static constexpr int TIERS_MAX = 4;
    static constexpr int TIER_BITS_MAX = 4;
    static constexpr int DIGIT_BITS_MAX = 8;  // of all tiers together
    static constexpr int RANKS_MAX = 16;
    static constexpr uint64_t BASES_MAX = 65'536;
    static constexpr uint64_t PERIOD_MAX = (uint64_t{1} << 31) - 1;
    static constexpr size_t FIXED_BYTES = 48;
    static constexpr size_t ALIGNMENT = 16;
    static constexpr size_t BYTES_MAX = FIXED_BYTES + BASES_MAX;

    // The table that `bytes` begin with, `*taken` bytes long; nullptr when it breaks a rule.
    // `elements` that it will serve: few do not pay for spreading out the pattern, nor may a peer
    // make us do it for nothing.
    static std::shared_ptr<const CodeTable> parse(const uint8_t* bytes, size_t count,
                                                  size_t* taken, uint64_t elements = UINT64_MAX);

    // `bases`: row_count() row bases, then column_count() column bases. nullptr as above.
    static std::shared_ptr<const CodeTable> make(uint8_t dtype,
                                                 const std::vector<uint8_t>& tier_bits,
                                                 const std::vector<uint8_t>& offsets,
                                                 const BasePattern& pattern,
                                                 const std::vector<uint8_t>& bases);

    const std::vector<uint8_t>& bytes() const { return bytes_; }  // as they travel
    uint8_t dtype() const { return bytes_[0]; }
    const ElementFormat& format() const { return *format_; }
    int tier_count() const { return tier_count_; }
    int tier_bits(int tier) const { return bytes_[2 + size_t(tier)]; }
    int rank_count() const { return rank_count_; }
    uint8_t offset(int rank) const { return offsets()[rank]; }
    const uint8_t* offsets() const { return bytes_.data() + 8; }  // 2 x RANKS_MAX are readable
    // As it lies here, with what was worked out of it.
    size_t memory_bytes() const { return sizeof *this + bytes_.size() + unrolled_.size(); }
    const BasePattern& pattern() const { return pattern_; }
    uint32_t period() const { return period_; }

    // Distance from the base -> digits of all tiers, the first tier's in the low bits; all ones
    // for a distance without a rank.
    const std::array<uint8_t, 256>& digits() const { return digits_; }
    // All offsets are below this: how wide a look-up the encoder needs.
    int offset_stop() const { return offset_stop_; }

    // The bases of `count` elements from `position` (below the period) on, at most STRIP_ELEMENTS:
    // in the table itself or written to `scratch`, which has STRIP_ELEMENTS + OVERREAD_BYTES. So
    // many bytes more may be read behind them.
    static constexpr size_t OVERREAD_BYTES = 63;
    const uint8_t* bases(uint32_t position, size_t count, uint8_t* scratch,
                         AddBase add_base) const;

private:
    CodeTable() = default;
    bool set_up(uint64_t elements);
    void unroll();
    void fill(uint32_t position, size_t count, uint8_t* out, AddBase add_base) const;
    void fill_line(uint32_t row, uint32_t column, size_t count, uint8_t* out,
                   AddBase add_base) const;

    std::vector<uint8_t> bytes_;
    const ElementFormat* format_ = nullptr;
    BasePattern pattern_;
    int tier_count_ = 0, rank_count_ = 0, offset_stop_ = 0;
    uint32_t row_count_ = 0;
    uint32_t period_ = 1;
    uint32_t base_period_ = 1;  // the same without outer axes that do not count
    std::array<uint8_t, 256> digits_;
    // Of a short period: as many repetitions that any strip lies inside. Else empty.
    std::vector<uint8_t> unrolled_;
};

}  // namespace kvwire
