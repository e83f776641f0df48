#include <algorithm>
#include <cstring>

#include "codec/tiered_layout.hpp"

namespace kvwire {
namespace {

// A tail that is too long to be used may still be written: all planes of lower tiers, all literals.
constexpr size_t TAIL_ROOM_BYTES =
    CodeTable::DIGIT_BITS_MAX * plane_bytes(STRIP_ELEMENTS) + STRIP_ELEMENTS;

bool is_constant(const uint8_t* raw, size_t bytes, size_t item_bytes) {
    return std::memcmp(raw, raw + item_bytes, bytes - item_bytes) == 0;
}

}  // namespace

TieredEncoder::TieredEncoder(const char* variant) : kernels_(tiered_kernels(variant)) {}

void TieredEncoder::begin(const std::vector<CodedPart>& parts, uint8_t* out, size_t out_max) {
    parts_ = &parts;
    part_ = 0;
    out_ = body_ = out;
    out_stop_ = out + out_max;
    fits_ = true;
    if (!parts.empty()) open_part();
}

bool TieredEncoder::room(size_t bytes) {
    if (size_t(out_stop_ - body_) < bytes) fits_ = false;
    return fits_;
}

void TieredEncoder::open_part() {
    const CodedPart& part = (*parts_)[part_];
    const size_t index = index_bytes(part.raw_bytes, item_bytes_of(part.table.get()));
    const bool inside = part.table && part.table_index == TABLE_INSIDE;
    const size_t table = inside ? part.table->bytes().size() : 0;
    raw_done_ = tails_bytes_ = 0;
    if (!room(PART_HEADER_BYTES + table + index)) return;
    header_ = body_;
    store_le<uint32_t>(header_ + part_at::RAW_BYTES, part.raw_bytes);
    store_le<uint32_t>(header_ + part_at::TABLE_INDEX, part.table ? part.table_index : TABLE_NONE);
    store_le<uint32_t>(header_ + part_at::POSITION, part.position);
    if (inside) std::memcpy(header_ + PART_HEADER_BYTES, part.table->bytes().data(), table);
    index_ = header_ + PART_HEADER_BYTES + table;
    std::memset(index_, 0, index);
    body_ = index_ + index;
}

void TieredEncoder::close_part() {
    const size_t used = size_t(body_ - header_) + tails_bytes_;
    const size_t padding = part_padded(used) - used;
    if (!room(tails_bytes_ + padding)) return;
    std::copy_n(tails_.data(), tails_bytes_, body_);
    std::memset(body_ + tails_bytes_, 0, padding);
    body_ += tails_bytes_ + padding;
    store_le<uint32_t>(header_ + part_at::CODED_BYTES, uint32_t(body_ - header_));
}

size_t TieredEncoder::next_bytes() const {
    if (part_ == parts_->size()) return 0;
    const CodedPart& part = (*parts_)[part_];
    return std::min(part.raw_bytes - raw_done_,
                    STRIP_ELEMENTS * item_bytes_of(part.table.get()));
}

// Body and tail of a strip of form TIERED; returns the length of the tail.
size_t TieredEncoder::encode_strip(const uint8_t* raw, size_t count, uint8_t* tail) {
    const CodedPart& part = (*parts_)[part_];
    const CodeTable& table = *part.table;
    const uint64_t element = part.position + raw_done_ / table.format().item_bytes;
    const uint8_t* bases = table.bases(uint32_t(element % table.period()), count, bases_.data(),
                                       kernels_.add_base);
    kernels_.split[table.dtype() - 1u](raw, bases, count, body_, distances_.data());
    size_t left = count;
    uint8_t* at = tail;
    for (int tier = 0, shift = 0; tier < table.tier_count(); ++tier) {
        const int width = table.tier_bits(tier);
        uint8_t* const planes = tier == 0 ? body_ + tier_1_at(table, count) : at;
        if (tier > 0) at += size_t(width) * plane_bytes(left);
        left = kernels_.put_tier(table, shift, width, distances_.data(), left, planes);
        shift += width;
    }
    std::memcpy(at, distances_.data(), left);
    return size_t(at - tail) + left;
}

TieredEncoder::Coded TieredEncoder::code_strip(const uint8_t* raw, size_t bytes, uint8_t* tail) {
    const CodeTable* const table = (*parts_)[part_].table.get();
    const size_t item_bytes = item_bytes_of(table);
    if (is_constant(raw, bytes, item_bytes)) {
        std::memcpy(tail, raw, item_bytes);
        return {StripForm::CONSTANT, 0, item_bytes};
    }
    const size_t body = table ? body_bytes(*table, bytes / item_bytes) : bytes;
    if (body < bytes && room(body)) {
        const size_t tail_bytes = encode_strip(raw, bytes / item_bytes, tail);
        if (body + tail_bytes < bytes) return {StripForm::TIERED, body, tail_bytes};
    }
    if (room(bytes)) std::memcpy(body_, raw, bytes);
    return {StripForm::EXACT, bytes, 0};
}

void TieredEncoder::strip(const uint8_t* raw) {
    const size_t bytes = next_bytes();
    if (fits_) {
        if (tails_.size() < tails_bytes_ + TAIL_ROOM_BYTES)
            tails_.resize(2 * tails_bytes_ + TAIL_ROOM_BYTES);
        const Coded coded = code_strip(raw, bytes, tails_.data() + tails_bytes_);
        store_le<uint16_t>(index_, uint16_t(size_t(coded.form) << FORM_SHIFT | coded.tail_bytes));
        index_ += sizeof(uint16_t);
        if (fits_) body_ += coded.body_bytes;
        tails_bytes_ += coded.tail_bytes;
    }
    raw_done_ += bytes;
    if (raw_done_ < (*parts_)[part_].raw_bytes) return;
    if (fits_) close_part();
    raw_done_ = 0;
    if (++part_ < parts_->size() && fits_) open_part();
}

size_t TieredEncoder::finish() { return fits_ ? size_t(body_ - out_) : 0; }

}  // namespace kvwire
