#include "codec/code_book.hpp"

#include <algorithm>

namespace kvwire {
namespace {

constexpr double DRIFT = 1.02, GAIN = 0.99;
constexpr uint64_t PATIENCE_MIN = uint64_t{1} << 16, PATIENCE_MAX = uint64_t{1} << 30;
constexpr size_t EXTENTS_KEPT = 32;

// The same code where bases repeat along other axes, but in the same order.
std::shared_ptr<const CodeTable> with_pattern(const CodeTable& table, const BasePattern& pattern,
                                              const std::vector<uint8_t>& bases) {
    std::vector<uint8_t> tier_bits, offsets;
    for (int tier = 0; tier < table.tier_count(); ++tier)
        tier_bits.push_back(uint8_t(table.tier_bits(tier)));
    for (int rank = 0; rank < table.rank_count(); ++rank) offsets.push_back(table.offset(rank));
    return CodeTable::make(table.dtype(), tier_bits, offsets, pattern, bases);
}

std::vector<uint8_t> bases_of(const CodeTable& table) {
    const BasePattern& pattern = table.pattern();
    const uint8_t* const bases = table.bytes().data() + CodeTable::FIXED_BYTES;
    return {bases, bases + pattern.row_count() + pattern.column_count()};
}

}  // namespace

CodeEntry::CodeEntry(std::shared_ptr<std::atomic<uint64_t>> book_bytes)
    : book_bytes_(std::move(book_bytes)), patience_(PATIENCE_MIN) {}

void CodeEntry::hold(uint64_t bytes) {
    *book_bytes_ += bytes - bytes_;
    bytes_ = bytes;
}

CodeEntry::Table CodeEntry::table(TokenAxis tokens, const std::function<Table()>& make) {
    if (wants_calibration()) {
        const std::lock_guard<std::mutex> lock(calibration_);
        if (wants_calibration())
            if (Table made = make())
                put(tokens.axis < 0 ? std::move(made) : without_axis(*made, tokens.axis));
    }
    return with_tokens(tokens);
}

bool CodeEntry::wants_calibration() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return !table_ || has_drifted_;
}

CodeEntry::Table CodeEntry::with_tokens(TokenAxis tokens) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!table_ || tokens.axis < 0) return table_;
    const auto found = of_tokens_.find(tokens);
    if (found != of_tokens_.end()) return found->second;
    if (of_tokens_.size() >= EXTENTS_KEPT) {
        of_tokens_.clear();
        hold(table_->memory_bytes());
    }
    Table made = with_axis(*table_, tokens.axis, tokens.extent);
    if (!made) return nullptr;
    hold(bytes_ + made->memory_bytes());
    return of_tokens_[tokens] = std::move(made);
}

void CodeEntry::put(Table table) {
    const std::lock_guard<std::mutex> lock(mutex_);
    table_ = std::move(table);
    of_tokens_.clear();
    hold(table_->memory_bytes());
    has_drifted_ = false;
    usual_bits_ = 0;
    elements_ = 0;
}

// A table that did not become better by being made again is left alone for ever longer: some
// parts of a tensor are worse than others.
void CodeEntry::coded(double coded_bits, uint64_t elements) {
    const std::lock_guard<std::mutex> lock(mutex_);
    elements_ += elements;
    if (usual_bits_ == 0) {
        usual_bits_ = coded_bits;
        if (drifted_bits_ > 0)
            patience_ = coded_bits < GAIN * drifted_bits_ ? PATIENCE_MIN
                                                          : std::min(2 * patience_, PATIENCE_MAX);
    }
    if (coded_bits <= DRIFT * usual_bits_ || elements_ < patience_ || has_drifted_) return;
    has_drifted_ = true;
    drifted_bits_ = coded_bits;
}

CodeEntry::Table CodeEntry::canonical() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return table_;
}

std::shared_ptr<const CodeTable> with_axis(const CodeTable& table, int axis, uint32_t extent) {
    BasePattern pattern = table.pattern();
    if (pattern.extents[0] != 1 || (pattern.row_axes | pattern.column_axes) & 1) return nullptr;
    std::copy_n(pattern.extents.begin() + 1, axis, pattern.extents.begin());
    pattern.extents[size_t(axis)] = extent;
    const unsigned outer = (2u << axis) - 1;  // those that move out by one, and the new one
    for (uint8_t* axes : {&pattern.row_axes, &pattern.column_axes})
        *axes = uint8_t((*axes & outer) >> 1 | (*axes & ~outer));
    return with_pattern(table, pattern, bases_of(table));
}

std::shared_ptr<const CodeTable> without_axis(const CodeTable& table, int axis) {
    BasePattern pattern = table.pattern();
    if ((pattern.row_axes | pattern.column_axes) >> axis & 1) return nullptr;
    pattern.extents = without_axis(pattern.extents, axis);
    const unsigned outer = (1u << axis) - 1;
    for (uint8_t* axes : {&pattern.row_axes, &pattern.column_axes})
        *axes = uint8_t((*axes & outer) << 1 | (*axes & ~outer));
    return with_pattern(table, pattern, bases_of(table));
}

std::array<uint32_t, BasePattern::AXES> without_axis(
    std::array<uint32_t, BasePattern::AXES> extents, int axis) {
    std::copy_backward(extents.begin(), extents.begin() + axis, extents.begin() + axis + 1);
    extents[0] = 1;
    return extents;
}

std::shared_ptr<const CodeTable> outer_range(const CodeTable& table, uint32_t count,
                                             uint32_t* position) {
    const BasePattern& pattern = table.pattern();
    int axis = 0;
    while (axis < BasePattern::AXES - 1 && pattern.extents[size_t(axis)] == 1) ++axis;
    const uint8_t bit = uint8_t(1 << axis);
    if (!(pattern.row_axes & bit) || (pattern.column_axes && !(pattern.column_axes & bit)))
        return nullptr;
    const uint32_t extent = pattern.extents[size_t(axis)], step = table.period() / extent;
    const uint32_t first = *position / step, stop = (*position + count - 1) / step + 1;
    BasePattern part = pattern;
    part.extents[size_t(axis)] = stop - first;
    const uint8_t* bases = table.bytes().data() + CodeTable::FIXED_BYTES;
    std::vector<uint8_t> kept;
    for (const uint64_t bases_of_all : {pattern.row_count(), pattern.column_count()}) {
        const uint64_t each = bases_of_all / extent;
        kept.insert(kept.end(), bases + first * each, bases + stop * each);
        bases += bases_of_all;
    }
    *position -= first * step;
    return with_pattern(table, part, kept);
}

std::shared_ptr<CodeEntry> CodeBook::entry(const CodeKey& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = entries_.find(key);
    if (found != entries_.end()) {
        asked_.splice(asked_.end(), asked_, found->second.asked);
        return found->second.entry;
    }
    for (int dropped = 0; dropped < 2 && is_full(); ++dropped) {  // who is in use is still counted
        entries_.erase(entries_.find(*asked_.front()));
        asked_.pop_front();
    }
    const auto made =
        entries_.emplace(key, Kept{std::make_shared<CodeEntry>(bytes_), {}}).first;
    made->second.asked = asked_.insert(asked_.end(), &made->first);
    return made->second.entry;
}

bool CodeBook::put(CodeKey key, std::shared_ptr<const CodeTable> table) {
    for (int axis = 0; axis < BasePattern::AXES && table; ++axis) {
        if (key.extents[size_t(axis)] != 0) continue;
        key.extents = without_axis(key.extents, axis);
        table = without_axis(*table, axis);
    }
    if (!table || table->dtype() != key.dtype || table->pattern().extents != key.extents)
        return false;
    entry(key)->put(std::move(table));
    return true;
}

CodeBook::Tables CodeBook::tables() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    Tables tables;
    for (const auto& [key, kept] : entries_)
        if (auto table = kept.entry->canonical()) tables.emplace_back(key, std::move(table));
    return tables;
}

}  // namespace kvwire
