// How the parts of the lossy rungs lie in memory: what encoder and decoder share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "codec/quantised.hpp"
#include "codec/quantised_kernels.hpp"

namespace kvwire::quantised {

constexpr size_t HEADER_BYTES = 32;
constexpr size_t ALIGNMENT = 16;
constexpr uint16_t SCALE_STOP = 0x5D80;  // for bits 0 to 14 of a scale or minimum

inline size_t padded(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

inline size_t item_bytes(uint8_t dtype) { return dtype == FP32 ? 4 : dtype == BYTES ? 1 : 2; }
inline bool is_scaled(Rung rung) { return rung == Rung::E4M3 || rung == Rung::INT8_GRID; }
inline bool is_grouped(Rung rung) { return rung >= Rung::INT8; }
inline float largest_code(Rung rung) { return rung == Rung::E4M3 ? 448.0f : 127.0f; }
inline int code_bits(Rung rung) { return rung == Rung::INT8 ? 8 : rung == Rung::INT6 ? 6 : 4; }

inline uint64_t group_count(const Lattice& lattice) {
    return lattice.rows() * ((lattice.places() + GROUP - 1) / GROUP);
}

// Scales and minima.
inline size_t scale_count(const QuantisedPart& part) {
    const Lattice& lattice = part.lattice;
    if (is_scaled(part.rung)) return size_t(lattice.rows() + lattice.columns());
    return is_grouped(part.rung) ? size_t(2 * group_count(lattice)) : 0;
}

inline size_t packed_bytes(size_t codes, int bits) {
    return (codes + BLOCK - 1) / BLOCK * 8 * size_t(bits);
}

inline Numbers column_scales(const Lattice& lattice, const std::vector<float>& scales,
                             const Lattice::Line& line) {
    if (scales.empty()) return {nullptr, false};
    return {&scales[line.column], lattice.column_steps()};
}

// visit(first, count, group, steps) for `count` elements from `from` on: `first` counts from there,
// and groups are those from `group` on if they step, else all that one.
template <class Visit>
void runs(const Lattice& lattice, size_t from, size_t count, Visit&& visit) {
    const size_t rows = size_t(lattice.rows());
    lattice.lines(from, count, [&](const Lattice::Line& line) {
        if (lattice.row_steps())
            return visit(line.at, line.count, line.place / GROUP * rows + line.row, true);
        for (size_t done = 0; done < line.count;) {
            const size_t place = line.place + done;
            const size_t taken = std::min(GROUP - place % GROUP, line.count - done);
            visit(line.at + done, taken, place / GROUP * rows + line.row, false);
            done += taken;
        }
    });
}

void store_header(const QuantisedPart& part, size_t coded_bytes, uint8_t* out);

}  // namespace kvwire::quantised
