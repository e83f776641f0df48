// Makes code tables from data: which bases, tiers and ranks of FORMAT.md section 9.1 are cheapest.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "codec/code_table.hpp"

namespace kvwire {

// A way to give out bases: the masks of a BasePattern.
struct BaseAxes {
    uint8_t row_axes = 0;
    uint8_t column_axes = 0;
};

struct Calibration {
    std::shared_ptr<const CodeTable> table;
    // What exponents coded with the table should take per element; its own bytes do not count.
    double exponent_bits = 0;
};

// Takes samples of one tensor. They cost a byte each until the calibrator is destroyed.
class Calibrator {
public:
    static constexpr size_t ELEMENTS_MAX = size_t{1} << 24;

    // `extents` as in a BasePattern. Tries the `candidates` that are lawful with them; where there
    // is none, one base for all. A table pays for its bytes with what it saves on so many
    // `elements_to_code`; 0: it is free. Throws std::invalid_argument for a dtype without exponent
    // and for extents whose product is not a lawful period.
    Calibrator(uint8_t dtype, const std::array<uint32_t, BasePattern::AXES>& extents,
               std::vector<BaseAxes> candidates, uint64_t elements_to_code = 0);

    // `elements` elements at `raw`, which needs no alignment; the first one lies at `position` in
    // the pattern, taken modulo the period. What is more than ELEMENTS_MAX is passed over.
    void add(uint64_t position, const uint8_t* raw, size_t elements);

    uint64_t elements() const { return sample_.exponents.size(); }

    // The cheapest table for the samples so far. Without any: a lawful table.
    Calibration finish() const;

    // What was added, as exponents.
    struct Sample {
        struct Run {
            uint32_t position;
            size_t elements;
        };
        uint8_t exponent_bits;
        BasePattern pattern;  // without axes that count
        std::vector<Run> runs;
        std::vector<uint8_t> exponents;
    };

private:
    uint8_t dtype_;
    std::vector<BaseAxes> candidates_;
    uint64_t elements_to_code_;
    Sample sample_;
};

// So many samples make a good table of `bases` bases.
constexpr uint64_t sample_elements(uint64_t bases) { return 65'536 + 16 * bases; }

struct SampleRun {
    uint64_t start;
    uint64_t elements;
};

// What to look at where all of `elements` are too many: short runs, together `wanted` elements to
// twice as many, spread so that they meet every row and every column of any pattern.
std::vector<SampleRun> sample_runs(uint64_t elements, uint64_t wanted);

}  // namespace kvwire
