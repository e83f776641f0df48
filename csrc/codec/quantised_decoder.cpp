#include <algorithm>
#include <utility>

#include "base/bytes.hpp"
#include "codec/quantised.hpp"
#include "codec/quantised_kernels.hpp"
#include "codec/quantised_layout.hpp"
#include "codec/small_floats.hpp"

namespace kvwire {

using namespace quantised;

namespace {

constexpr size_t STRIP = STRIP_ELEMENTS;

bool is_zero(const uint8_t* bytes, size_t count) {
    return std::all_of(bytes, bytes + count, [](uint8_t byte) { return byte == 0; });
}

// Of the bf16 numbers at `bytes`, the first `scales` are scales, the other `minima` need no sign.
bool are_bounded(const uint8_t* bytes, size_t scales, size_t minima) {
    for (size_t i = 0; i < scales + minima; ++i) {
        const uint16_t bits = load_le<uint16_t>(bytes + 2 * i);
        if ((bits & 0x7FFF) >= SCALE_STOP || (i < scales && bits >> 15)) return false;
    }
    return true;
}

void load_scales(const uint8_t* bytes, size_t count, std::vector<float>* scales) {
    scales->resize(count);
    for (size_t i = 0; i < count; ++i)
        (*scales)[i] = Bf16::widen(load_le<uint16_t>(bytes + 2 * i));
}

}  // namespace

QuantisedDecoder::QuantisedDecoder(const char* variant)
    : kernels_(kernels(variant)) {}

ErrorCode QuantisedDecoder::begin(const uint8_t* payload, size_t payload_bytes, size_t raw_bytes,
                                  TieredDecoder::TableOf table_of) {
    table_of_ = std::move(table_of);
    parts_.clear();
    part_ = 0;
    for (size_t taken; payload_bytes > 0; payload += taken, payload_bytes -= taken) {
        const ErrorCode error = read_part(payload, payload_bytes, raw_bytes, &taken);
        if (error != ErrorCode::OK) return error;
        raw_bytes -= size_t(parts_.back().shape.raw_bytes());
    }
    if (parts_.empty() || raw_bytes != 0) return ErrorCode::CODED_INVALID;
    return enter();
}

// Checks and keeps the part that `bytes` begin with, `*taken` bytes long.
ErrorCode QuantisedDecoder::read_part(const uint8_t* bytes, size_t left, size_t raw_left,
                                      size_t* taken) {
    if (left < HEADER_BYTES) return ErrorCode::CODED_INVALID;
    const size_t raw_bytes = load_le<uint32_t>(bytes);
    const size_t coded_bytes = load_le<uint32_t>(bytes + 4);
    if (coded_bytes < HEADER_BYTES || coded_bytes > left || coded_bytes % ALIGNMENT != 0)
        return ErrorCode::CODED_INVALID;
    Part part;
    QuantisedPart& shape = part.shape;
    shape.rung = Rung(bytes[8]);
    shape.dtype = bytes[9];
    shape.lattice.row_axes = bytes[10];
    shape.lattice.column_axes = bytes[11];
    for (size_t axis = 0; axis < Lattice::AXES; ++axis)
        shape.lattice.extents[axis] = load_le<uint32_t>(bytes + 16 + 4 * axis);
    if (!shape.valid() || !is_zero(bytes + 12, 4) || raw_bytes > raw_left ||
        shape.raw_bytes() != raw_bytes)
        return ErrorCode::CODED_INVALID;

    const Lattice& lattice = shape.lattice;
    const bool grouped = is_grouped(shape.rung);
    const size_t scales = scale_count(shape), scale_bytes = padded(2 * scales);
    part.scales = bytes + HEADER_BYTES;
    if (scale_bytes > coded_bytes - HEADER_BYTES) return ErrorCode::CODED_INVALID;
    part.rest = part.scales + scale_bytes;
    part.rest_bytes = coded_bytes - HEADER_BYTES - scale_bytes;
    part.first_count = grouped ? scales / 2 : scales ? size_t(lattice.rows()) : 0;
    part.second_count = scales - part.first_count;
    const size_t minima = grouped ? part.second_count : 0;
    if (!are_bounded(part.scales, scales - minima, minima) ||
        !is_zero(part.scales + 2 * scales, scale_bytes - 2 * scales))
        return ErrorCode::CODED_INVALID;
    if (grouped) {
        const size_t count = size_t(lattice.count());
        const int bits = code_bits(shape.rung);
        const size_t code_bytes = packed_bytes(count, bits);
        if (part.rest_bytes != padded(code_bytes) ||
            !is_zero(part.rest + code_bytes, part.rest_bytes - code_bytes))
            return ErrorCode::CODED_INVALID;
        uint8_t codes[BLOCK];
        kernels_.unpack(part.rest + code_bytes - 8 * size_t(bits), 1, bits, codes);
        const size_t used = (count - 1) % BLOCK + 1;
        if (!is_zero(codes + used, BLOCK - used)) return ErrorCode::CODED_INVALID;
    } else if (const ErrorCode error = begin_nested(part); error != ErrorCode::OK) {
        return error;
    }
    parts_.push_back(std::move(part));
    *taken = coded_bytes;
    return ErrorCode::OK;
}

ErrorCode QuantisedDecoder::begin_nested(const Part& part) {
    const size_t elements = size_t(part.shape.lattice.count());
    const size_t bytes = part.shape.rung == Rung::BF16 ? 2 * elements : elements;
    return tiered_.begin(part.rest, part.rest_bytes, bytes, table_of_);
}

// Makes ready for the first strip of the part that is next, if any.
ErrorCode QuantisedDecoder::enter() {
    element_ = 0;
    narrow_.clear();
    if (part_ == parts_.size()) return ErrorCode::OK;
    const Part& part = parts_[part_];
    load_scales(part.scales, part.first_count, &first_);
    load_scales(part.scales + 2 * part.first_count, part.second_count, &second_);
    return is_grouped(part.shape.rung) ? ErrorCode::OK : begin_nested(part);
}

size_t QuantisedDecoder::next_bytes() const {
    if (part_ == parts_.size()) return 0;
    const QuantisedPart& part = parts_[part_].shape;
    if (part.rung == Rung::EXACT) return tiered_.next_bytes();
    return std::min(STRIP, size_t(part.lattice.count()) - element_) * item_bytes(part.dtype);
}

bool QuantisedDecoder::strip(uint8_t* raw) {
    const Part& part = parts_[part_];
    const size_t bytes = next_bytes(), count = bytes / item_bytes(part.shape.dtype);
    if (part.shape.rung == Rung::EXACT) {
        if (!tiered_.strip(raw)) return false;
    } else {
        alignas(64) float values[STRIP];
        if (!widen(part, count, values)) return false;
        kernels_.narrow(part.shape.dtype, values, count, raw);
    }
    element_ += count;
    if (element_ < part.shape.lattice.count()) return true;
    ++part_;
    return enter() == ErrorCode::OK;
}

// The next `count` elements.
bool QuantisedDecoder::widen(const Part& part, size_t count, float* values) {
    const Lattice& lattice = part.shape.lattice;
    if (is_grouped(part.shape.rung)) {
        alignas(64) uint8_t codes[STRIP];
        const int bits = code_bits(part.shape.rung);
        kernels_.unpack(part.rest + packed_bytes(element_, bits), div_ceil(count, BLOCK), bits,
                        codes);
        runs(lattice, element_, count, [&](size_t at, size_t taken, size_t group, bool steps) {
            kernels_.from_groups(codes + at, taken, {&first_[group], steps},
                                 {&second_[group], steps}, values + at);
        });
        return true;
    }
    if (narrow_.empty()) {
        narrow_.resize(size_t(lattice.count()) * (part.shape.rung == Rung::BF16 ? 2 : 1));
        size_t at = 0;
        while (const size_t taken = tiered_.next_bytes()) {
            if (!tiered_.strip(narrow_.data() + at)) return false;
            at += taken;
        }
    }
    if (part.shape.rung == Rung::BF16) {
        kernels_.widen(quantised::BF16, narrow_.data() + 2 * element_, count, values);
        return true;
    }
    const uint8_t* const codes = narrow_.data() + element_;
    if (part.shape.rung == Rung::INT8_GRID) kernels_.from_integers(codes, count, values);
    else if (!kernels_.from_e4m3(codes, count, values)) return false;
    lattice.lines(element_, count, [&](const Lattice::Line& line) {
        kernels_.multiply(values + line.at, line.count, {&first_[line.row], lattice.row_steps()},
                          column_scales(lattice, second_, line));
    });
    return true;
}

}  // namespace kvwire
