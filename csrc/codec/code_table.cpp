#include "codec/code_table.hpp"

#include <algorithm>
#include <cstring>

#include "base/bytes.hpp"

namespace kvwire {
namespace {

// Longer patterns are worked out strip by strip instead: a copy of them would crowd the cache.
constexpr uint64_t UNROLLED_PERIOD_MAX = 32 << 10;

constexpr ElementFormat FORMATS[] = {
    {4, 8, 24}, {2, 5, 11}, {2, 8, 8}, {1, 4, 4}, {1, 5, 3},  // FP32, FP16, BF16, E4M3, E5M2
};

uint64_t product(const BasePattern& pattern, uint8_t axes) {
    uint64_t count = 1;
    for (int axis = 0; axis < BasePattern::AXES; ++axis) {
        if (!(axes >> axis & 1)) continue;
        count *= pattern.extents[size_t(axis)];
        if (count > CodeTable::PERIOD_MAX) return CodeTable::PERIOD_MAX + 1;
    }
    return count;
}

bool is_below(const uint8_t* values, size_t count, unsigned stop) {
    return std::all_of(values, values + count, [stop](uint8_t value) { return value < stop; });
}

bool is_zero(const uint8_t* values, size_t count) { return is_below(values, count, 1); }

size_t padded(size_t bytes) {
    return (bytes + CodeTable::ALIGNMENT - 1) / CodeTable::ALIGNMENT * CodeTable::ALIGNMENT;
}

}  // namespace

void add_base_portable(const uint8_t* __restrict values, uint8_t base, uint8_t mask, size_t count,
                       uint8_t* __restrict sums) {
    for (size_t i = 0; i < count; ++i) sums[i] = uint8_t(values[i] + base) & mask;
}

const ElementFormat* element_format(uint8_t dtype) {
    return dtype >= 1 && dtype <= std::size(FORMATS) ? &FORMATS[dtype - 1] : nullptr;
}

uint64_t BasePattern::period() const { return product(*this, 0x0F); }
uint64_t BasePattern::row_count() const { return product(*this, row_axes); }
uint64_t BasePattern::column_count() const {
    return column_axes ? product(*this, column_axes) : 0;
}

std::shared_ptr<const CodeTable> CodeTable::parse(const uint8_t* bytes, size_t count,
                                                  size_t* taken, uint64_t elements) {
    if (count < FIXED_BYTES) return nullptr;
    const uint64_t bases = uint64_t(load_le<uint32_t>(bytes + 40)) + load_le<uint32_t>(bytes + 44);
    if (bases > BASES_MAX) return nullptr;
    *taken = padded(FIXED_BYTES + size_t(bases));
    if (*taken > count) return nullptr;
    std::shared_ptr<CodeTable> table(new CodeTable);
    table->bytes_.assign(bytes, bytes + *taken);
    return table->set_up(elements) ? table : nullptr;
}

std::shared_ptr<const CodeTable> CodeTable::make(uint8_t dtype,
                                                 const std::vector<uint8_t>& tier_bits,
                                                 const std::vector<uint8_t>& offsets,
                                                 const BasePattern& pattern,
                                                 const std::vector<uint8_t>& bases) {
    if (tier_bits.size() > TIERS_MAX || offsets.size() > RANKS_MAX || bases.size() > BASES_MAX)
        return nullptr;
    std::vector<uint8_t> bytes(padded(FIXED_BYTES + bases.size()));
    bytes[0] = dtype;
    bytes[1] = uint8_t(tier_bits.size());
    std::copy(tier_bits.begin(), tier_bits.end(), bytes.begin() + 2);
    bytes[6] = pattern.row_axes;
    bytes[7] = pattern.column_axes;
    std::copy(offsets.begin(), offsets.end(), bytes.begin() + 8);
    for (size_t axis = 0; axis < BasePattern::AXES; ++axis)
        store_le<uint32_t>(bytes.data() + 24 + 4 * axis, pattern.extents[axis]);
    const uint64_t columns = pattern.column_count();
    if (pattern.row_count() + columns != bases.size()) return nullptr;
    store_le<uint32_t>(bytes.data() + 40, uint32_t(bases.size() - columns));
    store_le<uint32_t>(bytes.data() + 44, uint32_t(columns));
    std::copy(bases.begin(), bases.end(), bytes.begin() + FIXED_BYTES);
    size_t taken;
    return parse(bytes.data(), bytes.size(), &taken);
}

// False when bytes_, whose length is right, break another rule.
bool CodeTable::set_up(uint64_t elements) {
    const uint8_t* bytes = bytes_.data();
    format_ = element_format(bytes[0]);
    tier_count_ = bytes[1];
    if (!format_ || tier_count_ < 1 || tier_count_ > TIERS_MAX) return false;
    int digit_bits = 0;
    for (int tier = 0; tier < TIERS_MAX; ++tier) {
        const int bits = tier_bits(tier);
        if (tier < tier_count_ ? bits < 1 || bits > TIER_BITS_MAX : bits != 0) return false;
        digit_bits += bits;
        rank_count_ += (1 << bits) - 1;
    }
    if (digit_bits > DIGIT_BITS_MAX || rank_count_ > RANKS_MAX) return false;
    const unsigned symbols = 1u << format_->exponent_bits;
    const size_t ranks = size_t(rank_count_);
    if (!is_below(bytes + 8, ranks, symbols) || !is_zero(bytes + 8 + ranks, RANKS_MAX - ranks))
        return false;
    for (size_t axis = 0; axis < BasePattern::AXES; ++axis)
        pattern_.extents[axis] = load_le<uint32_t>(bytes + 24 + 4 * axis);
    pattern_.row_axes = bytes[6];
    pattern_.column_axes = bytes[7];
    const uint64_t period = pattern_.period();
    if (bytes[6] > 15 || bytes[7] > 15 || period < 1 || period > PERIOD_MAX) return false;
    period_ = uint32_t(period);
    const uint32_t rows = load_le<uint32_t>(bytes + 40), columns = load_le<uint32_t>(bytes + 44);
    if (rows != pattern_.row_count() || columns != pattern_.column_count()) return false;
    row_count_ = rows;
    const size_t bases = size_t(rows) + columns;
    if (!is_below(bytes + FIXED_BYTES, bases, symbols) ||
        !is_zero(bytes + FIXED_BYTES + bases, bytes_.size() - FIXED_BYTES - bases))
        return false;
    digits_.fill(uint8_t((1 << digit_bits) - 1));
    std::array<bool, 256> seen{};
    int rank = 0;
    for (int tier = 0, shift = 0; tier < tier_count_; shift += tier_bits(tier++)) {
        const int stop = (1 << tier_bits(tier)) - 1;
        for (int digit = 0; digit < stop; ++digit, ++rank) {
            const uint8_t distance = offset(rank);
            if (seen[distance]) return false;
            seen[distance] = true;
            digits_[distance] = uint8_t(digit << shift | ((1 << shift) - 1));
            offset_stop_ = std::max(offset_stop_, distance + 1);
        }
    }
    base_period_ = 1;
    for (size_t axis = 0; axis < BasePattern::AXES; ++axis)
        if (base_period_ > 1 || (bytes[6] | bytes[7]) >> axis & 1)
            base_period_ *= pattern_.extents[axis];
    if (base_period_ <= std::min(elements, UNROLLED_PERIOD_MAX)) unroll();
    return true;
}

void CodeTable::unroll() {
    unrolled_.resize(base_period_ + STRIP_ELEMENTS + OVERREAD_BYTES);
    fill(0, base_period_, unrolled_.data(), add_base_portable);
    for (size_t done = base_period_; done < unrolled_.size();) {  // twice as many each time
        const size_t count = std::min(done, unrolled_.size() - done);
        std::memcpy(unrolled_.data() + done, unrolled_.data(), count);
        done += count;
    }
}

// Line by line, which is along the innermost axis; the odometer of the others is turned by steps.
void CodeTable::fill(uint32_t position, size_t count, uint8_t* out, AddBase add_base) const {
    constexpr size_t axes = BasePattern::AXES, inner = axes - 1;
    const auto& extents = pattern_.extents;
    std::array<uint32_t, axes> at, row_steps{}, column_steps{};
    uint32_t row = 0, column = 0, row_step = 1, column_step = 1;
    for (size_t axis = axes; axis-- > 0; position /= extents[axis]) {
        at[axis] = position % extents[axis];
        if (pattern_.row_axes >> axis & 1) {
            row += at[axis] * row_step;
            row_steps[axis] = row_step;
            row_step *= extents[axis];
        }
        if (pattern_.column_axes >> axis & 1) {
            column += at[axis] * column_step;
            column_steps[axis] = column_step;
            column_step *= extents[axis];
        }
    }
    while (count > 0) {
        const size_t length = std::min<size_t>(count, extents[inner] - at[inner]);
        fill_line(row, column, length, out, add_base);
        out += length;
        count -= length;
        row -= at[inner] * row_steps[inner];
        column -= at[inner] * column_steps[inner];
        at[inner] = 0;
        for (size_t axis = inner; axis-- > 0;) {
            row += row_steps[axis];
            column += column_steps[axis];
            if (++at[axis] < extents[axis]) break;
            row -= extents[axis] * row_steps[axis];
            column -= extents[axis] * column_steps[axis];
            at[axis] = 0;
        }
    }
}

void CodeTable::fill_line(uint32_t row, uint32_t column, size_t count, uint8_t* out,
                          AddBase add_base) const {
    const uint8_t mask = uint8_t((1u << format_->exponent_bits) - 1);
    const uint8_t* const rows = bytes_.data() + FIXED_BYTES + row;
    const uint8_t* const columns = bytes_.data() + FIXED_BYTES + row_count_ + column;
    const bool rows_vary = pattern_.row_axes >> (BasePattern::AXES - 1) & 1;
    const bool columns_vary = pattern_.column_axes >> (BasePattern::AXES - 1) & 1;
    const uint8_t column_base = pattern_.column_axes ? columns[0] : 0;
    if (rows_vary && columns_vary) {
        for (size_t i = 0; i < count; ++i) out[i] = uint8_t(rows[i] + columns[i]) & mask;
    } else if (rows_vary) {
        add_base(rows, column_base, mask, count, out);
    } else if (columns_vary) {
        add_base(columns, rows[0], mask, count, out);
    } else {
        std::memset(out, uint8_t(rows[0] + column_base) & mask, count);
    }
}

const uint8_t* CodeTable::bases(uint32_t position, size_t count, uint8_t* scratch,
                                AddBase add_base) const {
    if (!unrolled_.empty()) return unrolled_.data() + position % base_period_;
    fill(position, count, scratch, add_base);
    return scratch;
}

}  // namespace kvwire
