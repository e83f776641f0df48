#include <algorithm>
#include <cstring>
#include <limits>

#include "base/bytes.hpp"
#include "codec/quantised.hpp"
#include "codec/quantised_kernels.hpp"
#include "codec/quantised_layout.hpp"
#include "codec/small_floats.hpp"

namespace kvwire {

using namespace quantised;

namespace {

constexpr size_t STRIP = STRIP_ELEMENTS;

// Writes bf16 numbers and the padding behind them.
uint8_t* store_scales(const std::vector<float>& first, const std::vector<float>& second,
                      uint8_t* out) {
    uint8_t* const start = out;
    for (const std::vector<float>* numbers : {&first, &second})
        for (const float number : *numbers) {
            store_le<uint16_t>(out, uint16_t(bits_of(number) >> 16));
            out += 2;
        }
    uint8_t* const end = start + padded(size_t(out - start));
    std::fill(out, end, uint8_t(0));
    return end;
}

}  // namespace

QuantisedEncoder::QuantisedEncoder(const char* variant) : kernels_(kernels(variant)) {}

bool QuantisedEncoder::can_round(const QuantisedPart& part, const uint8_t* raw) const {
    return kernels_.can_round(part.dtype, raw, size_t(part.lattice.count()));
}

// visit(first element, count, their values), which it may change, strip by strip.
template <class Visit>
void QuantisedEncoder::strips(const QuantisedPart& part, const uint8_t* raw, Visit&& visit) const {
    alignas(64) float values[STRIP];
    const size_t count = size_t(part.lattice.count());
    for (size_t at = 0; at < count; at += STRIP) {
        const size_t taken = std::min(STRIP, count - at);
        kernels_.widen(part.dtype, raw + at * item_bytes(part.dtype), taken, values);
        visit(at, taken, values);
    }
}

size_t quantised_bytes_max(const std::vector<QuantisedPart>& parts) {
    size_t bytes = 0;
    for (const QuantisedPart& part : parts) {
        // A part that goes EXACT after all is one opaque part, whatever `nested` says.
        const size_t elements = size_t(part.lattice.count());
        const size_t opaque =
            tiered_bytes_max({CodedPart{uint32_t(part.raw_bytes()), nullptr, 0, TABLE_NONE}});
        const size_t nested = part.nested.empty() ? 0 : tiered_bytes_max(part.nested);
        const size_t codes =
            is_grouped(part.rung) ? padded(packed_bytes(elements, code_bits(part.rung))) : 0;
        bytes += HEADER_BYTES + padded(2 * scale_count(part)) + std::max({opaque, nested, codes});
    }
    return bytes;
}

size_t QuantisedEncoder::encode(const std::vector<QuantisedPart>& parts, const uint8_t* raw,
                                uint8_t* out, size_t out_max) {
    size_t done = 0;
    for (const QuantisedPart& part : parts) {
        const size_t coded = this->part(part, raw, out + done, out_max - done);
        if (coded == 0) return 0;
        done += coded;
        raw += part.raw_bytes();
    }
    return done;
}

size_t QuantisedEncoder::part(const QuantisedPart& part, const uint8_t* raw, uint8_t* out,
                              size_t out_max) {
    const size_t raw_bytes = size_t(part.raw_bytes());
    if (part.rung != Rung::EXACT && !can_round(part, raw)) {
        QuantisedPart exact;
        exact.dtype = BYTES;
        exact.lattice.extents[Lattice::INNER] = uint32_t(raw_bytes);
        return this->part(exact, raw, out, out_max);
    }
    if (out_max < HEADER_BYTES) return 0;
    uint8_t* const body = out + HEADER_BYTES;
    const size_t body_max = out_max - HEADER_BYTES;
    size_t body_bytes;
    switch (part.rung) {
        case Rung::EXACT: body_bytes = nested(part.nested, raw, raw_bytes, body, body_max); break;
        case Rung::BF16:
        case Rung::E4M3:
        case Rung::INT8_GRID: body_bytes = scaled(part, raw, body, body_max); break;
        default: body_bytes = grouped(part, raw, body, body_max);
    }
    if (body_bytes == 0) return 0;
    store_header(part, HEADER_BYTES + body_bytes, out);
    return HEADER_BYTES + body_bytes;
}

size_t QuantisedEncoder::nested(const std::vector<CodedPart>& parts, const uint8_t* bytes,
                                size_t count, uint8_t* out, size_t out_max) {
    opaque_.resize(1);
    opaque_[0].raw_bytes = uint32_t(count);
    tiered_.begin(parts.empty() ? opaque_ : parts, out, out_max);
    while (const size_t taken = tiered_.next_bytes()) {
        tiered_.strip(bytes);
        bytes += taken;
    }
    return tiered_.finish();
}

// first_: the rows' scales, second_: the columns'.
void QuantisedEncoder::find_grid(const QuantisedPart& part, const uint8_t* raw) {
    const Lattice& lattice = part.lattice;
    const float top = largest_code(part.rung);
    first_.assign(lattice.rows(), 0.0f);
    second_.assign(lattice.columns(), 0.0f);
    strips(part, raw, [&](size_t at, size_t count, const float* values) {
        lattice.lines(at, count, [&](const Lattice::Line& line) {
            kernels_.raise_largest(values + line.at, line.count, {nullptr, false},
                                   lattice.row_steps(), &first_[line.row]);
        });
    });
    for (float& scale : first_) scale = bf16_up(second_.empty() ? scale / top : scale);
    if (second_.empty()) return;
    strips(part, raw, [&](size_t at, size_t count, const float* values) {
        lattice.lines(at, count, [&](const Lattice::Line& line) {
            kernels_.raise_largest(values + line.at, line.count,
                                   {&first_[line.row], lattice.row_steps()},
                                   lattice.column_steps(), &second_[line.column]);
        });
    });
    for (float& scale : second_) scale = bf16_up(scale / top);
}

size_t QuantisedEncoder::scaled(const QuantisedPart& part, const uint8_t* raw, uint8_t* out,
                                size_t out_max) {
    const size_t scale_bytes = padded(2 * scale_count(part));
    if (out_max < scale_bytes) return 0;
    narrow(part, raw);
    store_scales(first_, second_, out);
    const size_t nested_bytes = nested(part.nested, narrow_.data(), narrow_.size(),
                                       out + scale_bytes, out_max - scale_bytes);
    return nested_bytes ? scale_bytes + nested_bytes : 0;
}

const uint8_t* QuantisedEncoder::narrowed(const QuantisedPart& part, const uint8_t* raw) {
    if (part.rung == Rung::EXACT || !can_round(part, raw)) return nullptr;
    narrow(part, raw);
    return narrow_.data();
}

// narrow_, and their scales.
void QuantisedEncoder::narrow(const QuantisedPart& part, const uint8_t* raw) {
    const Lattice& lattice = part.lattice;
    narrow_.resize(size_t(lattice.count()) * (part.rung == Rung::BF16 ? 2 : 1));
    first_.clear();
    second_.clear();
    if (part.rung == Rung::BF16)
        return strips(part, raw, [&](size_t at, size_t count, const float* values) {
            kernels_.narrow(quantised::BF16, values, count, narrow_.data() + 2 * at);
        });
    find_grid(part, raw);
    strips(part, raw, [&](size_t at, size_t count, float* values) {
        lattice.lines(at, count, [&](const Lattice::Line& line) {
            kernels_.divide(values + line.at, line.count, {&first_[line.row], lattice.row_steps()},
                            column_scales(lattice, second_, line));
        });
        const auto code = part.rung == Rung::E4M3 ? kernels_.to_e4m3 : kernels_.to_integers;
        code(values, count, narrow_.data() + at);
    });
}

// first_: the groups' scales, second_: their minima.
void QuantisedEncoder::find_groups(const QuantisedPart& part, const uint8_t* raw) {
    const size_t groups = size_t(group_count(part.lattice));
    const float top = float((1 << code_bits(part.rung)) - 1);
    first_.assign(groups, -std::numeric_limits<float>::infinity());  // the largest, for now
    second_.assign(groups, std::numeric_limits<float>::infinity());
    strips(part, raw, [&](size_t at, size_t count, const float* values) {
        runs(part.lattice, at, count, [&](size_t first, size_t taken, size_t group, bool steps) {
            kernels_.widen_range(values + first, taken, steps, &second_[group], &first_[group]);
        });
    });
    for (size_t group = 0; group < groups; ++group) {
        // Adding 0 makes 0 of -0.
        second_[group] = bf16_down(second_[group] + 0.0f);
        first_[group] = bf16_up((first_[group] - second_[group] + 0.0f) / top);
    }
}

size_t QuantisedEncoder::grouped(const QuantisedPart& part, const uint8_t* raw, uint8_t* out,
                                 size_t out_max) {
    const int bits = code_bits(part.rung);
    const size_t elements = size_t(part.lattice.count());
    const size_t code_bytes = packed_bytes(elements, bits);
    const size_t body_bytes = padded(2 * scale_count(part)) + padded(code_bytes);
    if (out_max < body_bytes) return 0;
    find_groups(part, raw);
    uint8_t* const packed = store_scales(first_, second_, out);
    strips(part, raw, [&](size_t at, size_t count, const float* values) {
        alignas(64) uint8_t codes[STRIP];
        runs(part.lattice, at, count, [&](size_t first, size_t taken, size_t group, bool steps) {
            kernels_.to_groups(values + first, taken, {&first_[group], steps},
                               {&second_[group], steps}, float((1 << bits) - 1), codes + first);
        });
        const size_t blocks = div_ceil(count, BLOCK);
        std::fill(codes + count, codes + blocks * BLOCK, uint8_t(0));
        kernels_.pack(codes, blocks, bits, packed + packed_bytes(at, bits));
    });
    std::fill(packed + code_bytes, out + body_bytes, uint8_t(0));
    return body_bytes;
}

}  // namespace kvwire
