#include <algorithm>
#include <cstring>

#include "codec/tiered_layout.hpp"

namespace kvwire {
namespace {

bool is_zero(const uint8_t* bytes, size_t count) {
    return std::all_of(bytes, bytes + count, [](uint8_t byte) { return byte == 0; });
}

bool unused_bits_are_zero(const uint8_t* planes, size_t count, int width) {
    if (count % 8 == 0) return true;
    uint8_t last = 0;
    for (int bit = 1; bit <= width; ++bit) last |= planes[size_t(bit) * plane_bytes(count) - 1];
    return last >> count % 8 == 0;
}

// Copies the element at `raw` over all `bytes`, doubling what is done.
void repeat(uint8_t* raw, size_t item_bytes, size_t bytes) {
    for (size_t done = item_bytes; done < bytes; done *= 2)
        std::memcpy(raw + done, raw, std::min(done, bytes - done));
}

}  // namespace

TieredDecoder::TieredDecoder(const char* variant) : kernels_(tiered_kernels(variant)) {}

ErrorCode TieredDecoder::begin(const uint8_t* payload, size_t payload_bytes, size_t raw_bytes,
                               TableOf table_of) {
    table_of_ = std::move(table_of);
    payload_stop_ = payload + payload_bytes;
    size_t raw_left = raw_bytes;
    ErrorCode code = payload_bytes > 0 ? ErrorCode::OK : ErrorCode::CODED_INVALID;
    Part later, *part = &part_;  // only the first is kept: a payload may have very many
    for (const uint8_t* at = payload; code == ErrorCode::OK && at < payload_stop_;
         at = part->stop, part = &later) {
        code = read_part(at, raw_left, part);
        raw_left -= part->raw_left;
    }
    if (code == ErrorCode::OK && raw_left > 0) code = ErrorCode::CODED_INVALID;
    if (code != ErrorCode::OK) part_.raw_left = 0;
    return code;
}

ErrorCode TieredDecoder::read_part(const uint8_t* bytes, size_t raw_left, Part* part) {
    const size_t left = size_t(payload_stop_ - bytes);
    if (left < PART_HEADER_BYTES) return ErrorCode::CODED_INVALID;
    const size_t coded_bytes = load_le<uint32_t>(bytes + part_at::CODED_BYTES);
    if (coded_bytes < PART_HEADER_BYTES || coded_bytes > left || coded_bytes % PART_ALIGNMENT != 0)
        return ErrorCode::CODED_INVALID;
    part->stop = bytes + coded_bytes;
    part->raw_left = load_le<uint32_t>(bytes + part_at::RAW_BYTES);
    if (part->raw_left < 1 || part->raw_left > raw_left) return ErrorCode::CODED_INVALID;
    const uint32_t table_index = load_le<uint32_t>(bytes + part_at::TABLE_INDEX);
    const uint8_t* at = bytes + PART_HEADER_BYTES;
    part->table = nullptr;
    if (table_index == TABLE_INSIDE) {
        size_t taken = 0;
        part->table = CodeTable::parse(at, size_t(part->stop - at), &taken, part->raw_left);
        if (!part->table) return ErrorCode::CODED_INVALID;
        at += taken;
    } else if (table_index != TABLE_NONE) {
        part->table = table_of_ ? table_of_(table_index) : nullptr;
        table_missing_ = table_index;
        if (!part->table) return ErrorCode::TABLE_UNKNOWN;
    }
    part->position = load_le<uint32_t>(bytes + part_at::POSITION);
    if (part->position >= (part->table ? part->table->period() : 1) || !check_strips(at, part))
        return ErrorCode::CODED_INVALID;
    return ErrorCode::OK;
}

// `bytes`: index, bodies and tails, to the end of the part. Finds where each of them begins.
bool TieredDecoder::check_strips(const uint8_t* bytes, Part* part) const {
    const CodeTable* const table = part->table.get();
    const size_t item_bytes = item_bytes_of(table), left = size_t(part->stop - bytes);
    if (part->raw_left % item_bytes != 0) return false;
    const size_t elements = part->raw_left / item_bytes;
    const size_t strips = div_ceil(elements, STRIP_ELEMENTS);
    const size_t index = index_bytes(part->raw_left, item_bytes);
    if (index > left || !is_zero(bytes + 2 * strips, index - 2 * strips)) return false;
    size_t bodies = 0, tails = 0;
    for (size_t strip = 0; strip < strips; ++strip) {
        const uint16_t entry = load_le<uint16_t>(bytes + 2 * strip);
        const size_t count = std::min(STRIP_ELEMENTS, elements - strip * STRIP_ELEMENTS);
        const size_t tail = entry & TAIL_BYTES_MASK;
        tails += tail;
        switch (StripForm(entry >> FORM_SHIFT)) {
            case StripForm::TIERED:
                if (!table) return false;
                bodies += body_bytes(*table, count);
                break;
            case StripForm::EXACT:
                if (tail != 0) return false;
                bodies += count * item_bytes;
                break;
            case StripForm::CONSTANT:
                if (tail != item_bytes) return false;
                break;
            default: return false;
        }
    }
    const size_t used = index + bodies + tails;
    if (used > left || part_padded(bodies + tails) != left - index ||
        !is_zero(bytes + used, left - used))
        return false;
    part->index = bytes;
    part->body = bytes + index;
    part->tail = part->body + bodies;
    return true;
}

size_t TieredDecoder::next_bytes() const {
    return std::min(part_.raw_left, STRIP_ELEMENTS * item_bytes_of(part_.table.get()));
}

bool TieredDecoder::strip(uint8_t* raw) {
    const CodeTable* const table = part_.table.get();
    const size_t bytes = next_bytes(), item_bytes = item_bytes_of(table);
    const size_t count = bytes / item_bytes;
    const uint16_t entry = load_le<uint16_t>(part_.index);
    const size_t tail_bytes = entry & TAIL_BYTES_MASK;
    size_t body_taken = 0;
    switch (StripForm(entry >> FORM_SHIFT)) {
        case StripForm::TIERED:
            body_taken = body_bytes(*table, count);
            prefetch<0>(part_.body + body_taken, body_taken);  // for the next strip
            prefetch<1>(raw + bytes, bytes);
            if (!decode_strip(count, tail_bytes, raw)) return false;
            break;
        case StripForm::EXACT:
            std::memcpy(raw, part_.body, bytes);
            body_taken = bytes;
            break;
        case StripForm::CONSTANT:
            std::memcpy(raw, part_.tail, item_bytes);
            repeat(raw, item_bytes, bytes);
            break;
    }
    part_.index += sizeof entry;
    part_.body += body_taken;
    part_.tail += tail_bytes;
    if (table) part_.position = uint32_t((uint64_t(part_.position) + count) % table->period());
    part_.raw_left -= bytes;
    if (part_.raw_left > 0 || part_.stop == payload_stop_) return true;
    return read_part(part_.stop, SIZE_MAX, &part_) == ErrorCode::OK;
}

bool TieredDecoder::decode_strip(size_t count, size_t tail_bytes, uint8_t* raw) {
    const CodeTable& table = *part_.table;
    const int tiers = table.tier_count();
    const uint8_t* planes[CodeTable::TIERS_MAX] = {part_.body + tier_1_at(table, count)};
    size_t counts[CodeTable::TIERS_MAX + 1] = {count};  // elements that come to each tier
    const uint8_t* at = part_.tail;
    const uint8_t* const tail_stop = part_.tail + tail_bytes;
    const int verbatim_bits = table.format().verbatim_bits;
    const uint8_t* const verbatim_planes = part_.body + count * size_t(verbatim_bits / 8);
    if (!unused_bits_are_zero(verbatim_planes, count, verbatim_bits % 8)) return false;
    for (int tier = 0; tier < tiers; ++tier) {
        const int width = table.tier_bits(tier);
        if (tier > 0) {
            const size_t bytes = size_t(width) * plane_bytes(counts[tier]);
            if (size_t(tail_stop - at) < bytes) return false;
            planes[tier] = at;
            at += bytes;
        }
        if (!unused_bits_are_zero(planes[tier], counts[tier], width)) return false;
        counts[tier + 1] = kernels_.count_on(planes[tier], counts[tier], width);
    }
    const size_t literals = counts[tiers];
    uint8_t* lower = distances_[0].data();
    uint8_t* distances = distances_[1].data();
    if (size_t(tail_stop - at) != literals) return false;
    const auto too_large = [&](uint8_t literal) {
        return literal >> table.format().exponent_bits != 0;
    };
    if (std::any_of(at, tail_stop, too_large)) return false;
    std::memcpy(lower, at, literals);
    int first = table.rank_count();
    for (int tier = tiers - 1; tier >= 0; --tier) {
        const int width = table.tier_bits(tier);
        first -= (1 << width) - 1;
        kernels_.get_tier(table.offsets() + first, width, planes[tier], counts[tier], lower,
                          distances);
        std::swap(lower, distances);
    }
    const uint8_t* const bases =
        table.bases(part_.position, count, bases_.data(), kernels_.add_base);
    kernels_.join[table.dtype() - 1u](part_.body, bases, lower, count, raw);
    return true;
}

}  // namespace kvwire
