#include "codec/calibrate.hpp"

#include <algorithm>
#include <map>
#include <numeric>
#include <stdexcept>

#include "base/bytes.hpp"

namespace kvwire {
namespace {

using Sample = Calibrator::Sample;

// ---- codes: tiers and ranks

// Ranks go to distances below this only: two 16-byte look-ups find them.
constexpr int DISTANCES = 32;

struct Shape {
    std::vector<uint8_t> tier_bits;
    std::vector<uint8_t> bits;  // by rank: what an element with it costs
    int literal_bits;
};

void add_shapes(std::vector<uint8_t> tier_bits, int digit_bits, std::vector<uint8_t> bits,
                std::vector<Shape>* shapes) {
    if (!tier_bits.empty()) shapes->push_back({tier_bits, bits, digit_bits + 8});
    if (tier_bits.size() == CodeTable::TIERS_MAX) return;
    for (int width = 1; width <= CodeTable::TIER_BITS_MAX; ++width) {
        const int all_bits = digit_bits + width;
        const size_t ranks = bits.size() + (size_t{1} << width) - 1;
        if (all_bits > CodeTable::DIGIT_BITS_MAX || ranks > CodeTable::RANKS_MAX) break;
        auto longer = tier_bits;
        longer.push_back(uint8_t(width));
        auto more_bits = bits;
        more_bits.resize(ranks, uint8_t(all_bits));
        add_shapes(longer, all_bits, more_bits, shapes);
    }
}

// All that FORMAT.md allows.
const std::vector<Shape>& shapes() {
    static const std::vector<Shape> all = [] {
        std::vector<Shape> found;
        add_shapes({}, 0, {}, &found);
        return found;
    }();
    return all;
}

using Counts = std::array<uint64_t, DISTANCES>;  // of elements, by distance

struct Code {
    const Shape* shape = nullptr;
    std::vector<uint8_t> offsets;
    uint64_t bits = UINT64_MAX;  // of all elements
};

// The cheapest code for `total` elements of which `counts` are at a distance that may get a rank.
Code cheapest_code(const Counts& counts, int distances, uint64_t total) {
    std::vector<uint8_t> by_count(static_cast<size_t>(distances));
    std::iota(by_count.begin(), by_count.end(), uint8_t{0});
    std::stable_sort(by_count.begin(), by_count.end(),
                     [&](uint8_t a, uint8_t b) { return counts[a] > counts[b]; });
    Code best;
    for (const Shape& shape : shapes()) {
        uint64_t bits = 0, left = total;
        for (size_t rank = 0; rank < shape.bits.size(); ++rank) {
            bits += counts[by_count[rank]] * shape.bits[rank];
            left -= counts[by_count[rank]];
        }
        bits += left * uint64_t(shape.literal_bits);
        if (bits < best.bits) best.shape = &shape, best.bits = bits;
    }
    by_count.resize(best.shape->bits.size());
    best.offsets = by_count;
    return best;
}

// ---- lines: elements that share a base

constexpr int SLOTS = 64, OUTSIDE = SLOTS - 1;
// Where a base lies below the middle of its elements: exponents trail off downwards.
constexpr int MIDDLE = 20;

// A histogram for each line of the values in a window of SLOTS from `low` on; exponents of less
// than 8 bits all fit, and distances go round.
struct Lines {
    uint8_t low = 0;
    size_t count = 0;
    std::vector<uint32_t> slots;

    Lines(size_t line_count, uint8_t window_low)
        : low(window_low), count(line_count), slots(line_count * SLOTS) {}
};

// One line with enough around it that any base and any distance may be looked up.
class View {
public:
    static constexpr int LOWEST = -DISTANCES, HIGHEST = SLOTS - 1;

    View(const Lines& lines, size_t line, int exponent_bits) {
        const uint32_t* slots = lines.slots.data() + line * SLOTS;
        if (exponent_bits == 8) {
            values_.fill(0);
            std::copy(slots, slots + OUTSIDE, values_.begin() - LOWEST);
        } else {
            const unsigned mask = (1u << exponent_bits) - 1;
            for (unsigned i = 0; i < values_.size(); ++i) values_[i] = slots[i & mask];
        }
    }
    // Elements by distance from `base`, LOWEST to HIGHEST.
    const uint32_t* from(int base) const { return values_.data() + base - LOWEST; }

private:
    std::array<uint32_t, DISTANCES + SLOTS + DISTANCES> values_;
};

// Bases of all lines of a kind, in slots, and the code that suits them.
struct Fit {
    std::vector<int8_t> bases;
    Code code;
};

int middle_of(const uint32_t* slots) {
    const uint64_t all = std::accumulate(slots, slots + OUTSIDE, uint64_t{0});
    if (all == 0) return -1;
    int slot = 0;
    for (uint64_t below = slots[0]; 2 * below < all;) below += slots[++slot];
    return slot;
}

Counts joint_counts(const Lines& lines, const std::vector<int8_t>& bases, int exponent_bits) {
    std::vector<uint32_t> sums(DISTANCES);
    for (size_t line = 0; line < lines.count; ++line) {
        const View view(lines, line, exponent_bits);
        const uint32_t* counts = view.from(bases[line]);
        for (int distance = 0; distance < DISTANCES; ++distance)
            sums[size_t(distance)] += counts[distance];
    }
    Counts counts;
    std::copy(sums.begin(), sums.end(), counts.begin());
    return counts;
}

// Moves each base by at most a slot to where its line costs least under `code`.
bool move_bases(const Lines& lines, const Code& code, int exponent_bits,
                std::vector<int8_t>* bases) {
    const Shape& shape = *code.shape;
    bool moved = false;
    for (size_t line = 0; line < lines.count; ++line) {
        const View view(lines, line, exponent_bits);
        const auto saved = [&](int base) {
            const uint32_t* counts = view.from(base);
            uint64_t bits = 0;
            for (size_t rank = 0; rank < shape.bits.size(); ++rank)
                bits += uint64_t(counts[code.offsets[rank]]) *
                        uint32_t(shape.literal_bits - shape.bits[rank]);
            return bits;
        };
        const int base = (*bases)[line];
        int best = base;
        uint64_t most = saved(base);
        for (const int other : {base - 1, base + 1}) {
            if (other < View::LOWEST || other > View::HIGHEST) continue;
            const uint64_t bits = saved(other);
            if (bits > most) most = bits, best = other;
        }
        moved |= best != base;
        (*bases)[line] = int8_t(best);
    }
    return moved;
}

constexpr int ROUNDS_MAX = 6;
constexpr double FITTED_BASE_BITS = 1.4427;  // 1 / ln 2

// Code and bases by turns, each the best for the other, from the lines' medians on.
Fit fit(const Lines& lines, int exponent_bits, uint64_t total) {
    const int distances = std::min(DISTANCES, 1 << exponent_bits);
    std::vector<uint32_t> all(SLOTS);
    for (size_t at = 0; at < lines.slots.size(); ++at) all[at % SLOTS] += lines.slots[at];
    const int middle = std::max(0, middle_of(all.data()));
    Fit best;
    best.bases.resize(lines.count);
    for (size_t line = 0; line < lines.count; ++line) {
        const int own = middle_of(lines.slots.data() + line * SLOTS);
        best.bases[line] = int8_t((own < 0 ? middle : own) - MIDDLE);
    }
    best.code = cheapest_code(joint_counts(lines, best.bases, exponent_bits), distances, total);
    for (int round = 0; round < ROUNDS_MAX; ++round) {
        auto bases = best.bases;
        if (!move_bases(lines, best.code, exponent_bits, &bases)) break;
        const Counts counts = joint_counts(lines, bases, exponent_bits);
        Code code = cheapest_code(counts, distances, total);
        const bool settled = code.bits > best.code.bits - best.code.bits / 1024;
        if (code.bits < best.code.bits) best = {std::move(bases), std::move(code)};
        if (settled) break;
    }
    return best;
}

// ---- the sample's elements

uint64_t lines_along(const BasePattern& pattern, uint8_t axes) {
    return BasePattern{pattern.extents, axes, 0}.row_count();
}

// The line of each element, where lines are told apart by `axes`.
std::vector<uint16_t> line_numbers(const Sample& sample, uint8_t axes) {
    constexpr int inner = BasePattern::AXES - 1;
    const auto& extents = sample.pattern.extents;
    const uint32_t length = extents[inner];
    const uint16_t step = axes >> inner & 1;
    const auto period = uint32_t(sample.pattern.period());
    std::vector<uint16_t> numbers(sample.exponents.size());
    uint16_t* out = numbers.data();
    for (const auto& run : sample.runs) {
        uint32_t position = run.position;
        for (size_t left = run.elements; left > 0;) {
            uint32_t first = 0, rest = position, stride = period;
            for (int axis = 0; axis < BasePattern::AXES; ++axis) {
                const uint32_t extent = extents[size_t(axis)];
                stride /= extent;
                if (axes >> axis & 1) first = first * extent + rest / stride;
                rest %= stride;
            }
            const size_t count = std::min<size_t>(left, length - position % length);
            for (size_t i = 0; i < count; ++i) out[i] = uint16_t(first + i * step);
            out += count;
            left -= count;
            position = uint32_t((position + count) % period);
        }
    }
    return numbers;
}

Lines count_lines(const std::vector<uint8_t>& values, const std::vector<uint16_t>& numbers,
                  size_t lines, uint8_t low, int exponent_bits) {
    Lines found(lines, low);
    const unsigned mask = (1u << exponent_bits) - 1;
    for (size_t i = 0; i < values.size(); ++i) {
        const unsigned slot = std::min<unsigned>((values[i] - low) & mask, OUTSIDE);
        ++found.slots[size_t(numbers[i]) * SLOTS + slot];
    }
    return found;
}

// Where a window begins that has the middle of `values` where most lines fit into it.
uint8_t window_low(const std::vector<uint8_t>& values, int exponent_bits) {
    if (exponent_bits < 8 || values.empty()) return 0;
    std::array<uint32_t, 256> counts{};
    const size_t step = 1 + values.size() / 1024;
    for (size_t i = 0; i < values.size(); i += step) ++counts[values[i]];
    uint32_t all = std::accumulate(counts.begin() + 1, counts.end(), 0u), below = 0;
    int value = 1;  // zeros say nothing about the rest
    while (value < 255 && 2 * (below += counts[size_t(value)]) < all) ++value;
    return uint8_t(value - 2 * MIDDLE);
}

// The lines along `coarse` axes, out of those along `fine` axes that include them.
Lines merge_lines(const Lines& lines, const BasePattern& pattern, uint8_t fine, uint8_t coarse) {
    Lines merged(lines_along(pattern, coarse), lines.low);
    for (size_t line = 0; line < lines.count; ++line) {
        size_t rest = line, target = 0, stride = 1;
        for (int axis = BasePattern::AXES - 1; axis >= 0; --axis) {
            const uint32_t extent = pattern.extents[size_t(axis)];
            if (!(fine >> axis & 1)) continue;
            if (coarse >> axis & 1) target += rest % extent * stride, stride *= extent;
            rest /= extent;
        }
        for (size_t slot = 0; slot < SLOTS; ++slot)
            merged.slots[target * SLOTS + slot] += lines.slots[line * SLOTS + slot];
    }
    return merged;
}

// Histograms of the exponents themselves, for each set of row axes. Elements are gone through
// only where no finer set has been counted before.
std::map<uint8_t, Lines> count_rows(const Sample& sample, const std::vector<BaseAxes>& candidates) {
    std::vector<uint8_t> wanted;
    for (const BaseAxes& axes : candidates) wanted.push_back(axes.row_axes);
    std::stable_sort(wanted.begin(), wanted.end(), [](uint8_t a, uint8_t b) {
        return __builtin_popcount(a) > __builtin_popcount(b);
    });
    const uint8_t low = window_low(sample.exponents, sample.exponent_bits);
    std::map<uint8_t, Lines> counted;
    for (const uint8_t axes : wanted) {
        if (counted.count(axes)) continue;
        const auto finer = std::find_if(counted.begin(), counted.end(), [&](const auto& other) {
            return (other.first & axes) == axes;
        });
        counted.emplace(axes, finer != counted.end()
            ? merge_lines(finer->second, sample.pattern, finer->first, axes)
            : count_lines(sample.exponents, line_numbers(sample, axes),
                          lines_along(sample.pattern, axes), low, sample.exponent_bits));
    }
    return counted;
}

struct Bases {
    BaseAxes axes;
    std::vector<uint8_t> rows, columns;
    Code code;
};

std::vector<uint8_t> real_bases(const Lines& lines, const Fit& fit, int exponent_bits) {
    const unsigned mask = (1u << exponent_bits) - 1;
    std::vector<uint8_t> bases(fit.bases.size());
    for (size_t i = 0; i < bases.size(); ++i)
        bases[i] = uint8_t(unsigned(fit.bases[i] + lines.low) & mask);
    return bases;
}

// Rows and columns by turns, each fitted to what the other leaves.
Bases fit_both(const Sample& sample, BaseAxes axes, const Lines& first_rows) {
    const int exponent_bits = sample.exponent_bits;
    const uint64_t total = sample.exponents.size();
    const auto row_of = line_numbers(sample, axes.row_axes);
    const auto column_of = line_numbers(sample, axes.column_axes);
    Bases best{axes, real_bases(first_rows, fit(first_rows, exponent_bits, total), exponent_bits),
               std::vector<uint8_t>(lines_along(sample.pattern, axes.column_axes)), {}};
    Bases next = best;
    std::vector<uint8_t> left(total);
    for (int turn = 0; turn < ROUNDS_MAX; ++turn) {
        const bool is_column = turn % 2 == 0;
        const auto& own_of = is_column ? column_of : row_of;
        const auto& other_of = is_column ? row_of : column_of;
        auto& own = is_column ? next.columns : next.rows;
        const auto& other = is_column ? next.rows : next.columns;
        for (size_t i = 0; i < left.size(); ++i)
            left[i] = uint8_t(sample.exponents[i] - other[other_of[i]]);
        const Lines lines = count_lines(left, own_of, own.size(),
                                        window_low(left, exponent_bits), exponent_bits);
        Fit found = fit(lines, exponent_bits, total);
        own = real_bases(lines, found, exponent_bits);
        next.code = std::move(found.code);
        const bool settled = next.code.bits > best.code.bits - best.code.bits / 1024;
        if (next.code.bits < best.code.bits) best = next;
        if (settled) break;
    }
    return best;
}

}  // namespace

Calibrator::Calibrator(uint8_t dtype, const std::array<uint32_t, BasePattern::AXES>& extents,
                       std::vector<BaseAxes> candidates, uint64_t elements_to_code)
    : dtype_(dtype), elements_to_code_(elements_to_code) {
    const ElementFormat* format = element_format(dtype);
    if (!format) throw std::invalid_argument("calibration: the dtype has no exponent");
    sample_.exponent_bits = format->exponent_bits;
    sample_.pattern.extents = extents;
    const uint64_t period = sample_.pattern.period();
    if (period < 1 || period > CodeTable::PERIOD_MAX)
        throw std::invalid_argument("calibration: the extents make no pattern");
    candidates_.push_back({});
    for (const BaseAxes axes : candidates) {
        const BasePattern pattern{extents, axes.row_axes, axes.column_axes};
        const bool lawful = axes.row_axes < 16 && axes.column_axes < 16;
        if (lawful && pattern.row_count() + pattern.column_count() <= CodeTable::BASES_MAX)
            candidates_.push_back(axes);
    }
}

namespace {

template <class T>
void append_exponents(const uint8_t* raw, size_t elements, const ElementFormat& format,
                      std::vector<uint8_t>* exponents) {
    const size_t before = exponents->size();
    exponents->resize(before + elements);
    uint8_t* out = exponents->data() + before;
    // The verbatim bits but the sign lie below.
    const int shift = format.verbatim_bits - 1;
    const T mask = T((1u << format.exponent_bits) - 1);
    for (size_t i = 0; i < elements; ++i)
        out[i] = uint8_t(load_le<T>(raw + i * sizeof(T)) >> shift & mask);
}

}  // namespace

void Calibrator::add(uint64_t position, const uint8_t* raw, size_t elements) {
    if (elements == 0) return;
    const ElementFormat& format = *element_format(dtype_);
    sample_.runs.push_back({uint32_t(position % sample_.pattern.period()), elements});
    switch (format.item_bytes) {
        case 1: append_exponents<uint8_t>(raw, elements, format, &sample_.exponents); break;
        case 2: append_exponents<uint16_t>(raw, elements, format, &sample_.exponents); break;
        default: append_exponents<uint32_t>(raw, elements, format, &sample_.exponents); break;
    }
}

Calibration Calibrator::finish() const {
    const int exponent_bits = sample_.exponent_bits;
    const uint64_t total = elements();
    const double per_element = 1.0 / double(std::max<uint64_t>(total, 1));
    const auto counted = count_rows(sample_, candidates_);
    Calibration best;
    double least = 0;
    for (const BaseAxes axes : candidates_) {
        const Lines& rows = counted.at(axes.row_axes);
        Bases bases;
        if (axes.column_axes) {
            bases = fit_both(sample_, axes, rows);
        } else {
            Fit found = fit(rows, exponent_bits, total);
            bases = {axes, real_bases(rows, found, exponent_bits), {}, std::move(found.code)};
        }
        BasePattern pattern = sample_.pattern;
        pattern.row_axes = axes.row_axes;
        pattern.column_axes = axes.column_axes;
        std::vector<uint8_t> all = bases.rows;
        all.insert(all.end(), bases.columns.begin(), bases.columns.end());
        auto table = CodeTable::make(dtype_, bases.code.shape->tier_bits, bases.code.offsets,
                                     pattern, all);
        // Bases are fitted to the sample, other elements cost more (Akaike's criterion).
        const double bits = (double(bases.code.bits) + FITTED_BASE_BITS * double(all.size())) *
                            per_element;
        const double with_table = elements_to_code_ == 0 ? bits
            : bits + 8.0 * double(table->bytes().size()) / double(elements_to_code_);
        if (best.table && with_table >= least) continue;
        best = {std::move(table), bits};
        least = with_table;
    }
    return best;
}

std::vector<SampleRun> sample_runs(uint64_t elements, uint64_t wanted) {
    constexpr uint64_t RUN = 64;
    const uint64_t places = wanted == 0 ? 1 : div_ceil(elements, wanted);
    if (places <= 1) return elements ? std::vector<SampleRun>{{0, elements}}
                                     : std::vector<SampleRun>{};
    std::vector<SampleRun> runs;
    // The fractional parts of multiples of the golden ratio leave no place out for long.
    uint32_t turn = 0;
    for (uint64_t at = 0; at < elements; at += RUN * places, turn += 0x9E3779B9u) {
        const uint64_t start = at + (uint64_t(turn) * places >> 32) * RUN;
        if (start < elements) runs.push_back({start, std::min(RUN, elements - start)});
    }
    return runs;
}

}  // namespace kvwire
