#include "codec/code_book.hpp"

#include <algorithm>

#include "base/bytes.hpp"

namespace kvwire {
namespace {

constexpr double DRIFT = 1.02, GAIN = 0.99;
constexpr uint64_t PATIENCE_MIN = uint64_t{1} << 16, PATIENCE_MAX = uint64_t{1} << 30;
constexpr size_t EXTENTS_KEPT = 32;
constexpr size_t EXTENTS_AT = 24;  // in a code table

int token_axis_of(const CodeKey& key) {
    for (size_t axis = 0; axis < key.extents.size(); ++axis)
        if (key.extents[axis] == 0) return int(axis);
    return -1;
}

}  // namespace

CodeEntry::CodeEntry(const CodeKey& key, std::shared_ptr<std::atomic<uint64_t>> book_bytes)
    : book_bytes_(std::move(book_bytes)), token_axis_(token_axis_of(key)),
      patience_(PATIENCE_MIN) {}

void CodeEntry::hold(uint64_t bytes) {
    *book_bytes_ += bytes - bytes_;
    bytes_ = bytes;
}

CodeEntry::Table CodeEntry::table(uint32_t tokens, const std::function<Table()>& make) {
    if (wants_calibration()) {
        const std::lock_guard<std::mutex> lock(calibration_);
        if (wants_calibration())
            if (Table made = make()) put(std::move(made));
    }
    return with_tokens(tokens);
}

bool CodeEntry::wants_calibration() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return !table_ || has_drifted_;
}

CodeEntry::Table CodeEntry::with_tokens(uint32_t tokens) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!table_ || token_axis_ < 0) return table_;
    const auto found = of_tokens_.find(tokens);
    if (found != of_tokens_.end()) return found->second;
    if (of_tokens_.size() >= EXTENTS_KEPT) {
        of_tokens_.clear();
        hold(table_->memory_bytes());
    }
    Table made = with_extent(*table_, token_axis_, tokens);
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

std::shared_ptr<const CodeTable> with_extent(const CodeTable& table, int axis, uint32_t extent) {
    std::vector<uint8_t> bytes = table.bytes();
    store_le<uint32_t>(bytes.data() + EXTENTS_AT + 4 * axis, extent);
    size_t taken;
    return CodeTable::parse(bytes.data(), bytes.size(), &taken);
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
    std::vector<uint8_t> tier_bits, offsets;
    for (int tier = 0; tier < table.tier_count(); ++tier)
        tier_bits.push_back(uint8_t(table.tier_bits(tier)));
    for (int rank = 0; rank < table.rank_count(); ++rank) offsets.push_back(table.offset(rank));
    *position -= first * step;
    return CodeTable::make(table.dtype(), tier_bits, offsets, part, kept);
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
        entries_.emplace(key, Kept{std::make_shared<CodeEntry>(key, bytes_), {}}).first;
    made->second.asked = asked_.insert(asked_.end(), &made->first);
    return made->second.entry;
}

bool CodeBook::put(const CodeKey& key, std::shared_ptr<const CodeTable> table) {
    const BasePattern& pattern = table->pattern();
    bool suits = table->dtype() == key.dtype;
    for (size_t axis = 0; axis < key.extents.size(); ++axis) {
        if (key.extents[axis] == 0)
            suits &= !((pattern.row_axes | pattern.column_axes) >> axis & 1);
        else
            suits &= pattern.extents[axis] == key.extents[axis];
    }
    if (suits) entry(key)->put(std::move(table));
    return suits;
}

CodeBook::Tables CodeBook::tables() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    Tables tables;
    for (const auto& [key, kept] : entries_)
        if (auto table = kept.entry->canonical()) tables.emplace_back(key, std::move(table));
    return tables;
}

}  // namespace kvwire
