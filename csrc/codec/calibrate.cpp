#include "codec/calibrate.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <tuple>

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
    double bits = 0;  // per element
};

// The cheapest code for `total` elements of which `counts` are at a distance that may get a rank.
Code cheapest_code(const Counts& counts, int distances, uint64_t total) {
    std::vector<uint8_t> by_count(static_cast<size_t>(distances));
    std::iota(by_count.begin(), by_count.end(), uint8_t{0});
    std::stable_sort(by_count.begin(), by_count.end(),
                     [&](uint8_t a, uint8_t b) { return counts[a] > counts[b]; });
    Code best;
    uint64_t least = UINT64_MAX;
    for (const Shape& shape : shapes()) {
        uint64_t bits = 0, left = total;
        for (size_t rank = 0; rank < shape.bits.size(); ++rank) {
            bits += counts[by_count[rank]] * shape.bits[rank];
            left -= counts[by_count[rank]];
        }
        bits += left * uint64_t(shape.literal_bits);
        if (bits < least) best.shape = &shape, least = bits;
    }
    best.bits = double(least) / double(std::max<uint64_t>(total, 1));
    by_count.resize(best.shape->bits.size());
    best.offsets = by_count;
    return best;
}

// ---- bases

// What the residuals of a line are about: exponents trail off further down than up.
constexpr int MIDDLE = 20;
constexpr size_t STRETCH_MAX = 256;
// Where averages are rounded. Equally good both ways, at 0, refining finds no way out.
constexpr double PHASE = 0.25;
constexpr size_t ROUGHLY = 5;  // one in so many stretches
using Bytes = std::array<uint8_t, STRETCH_MAX>;
using SignedBytes = std::array<int8_t, STRETCH_MAX>;

uint8_t median(const std::vector<uint8_t>& exponents) {
    std::array<uint64_t, 256> counts{};
    const size_t step = 1 + exponents.size() / 1024;
    for (size_t at = 0; at < exponents.size(); at += step) ++counts[exponents[at]];
    counts[0] = 0;  // zeros say nothing about the rest
    const uint64_t all = std::accumulate(counts.begin(), counts.end(), uint64_t{0});
    size_t value = 0;
    for (uint64_t below = 0; 2 * below < all;) below += counts[++value];
    return uint8_t(value);
}

// `bases` of neighbouring lines, with `step`, else the one of all.
void subtract(const uint8_t* __restrict bases, bool step, size_t count, Bytes* __restrict from) {
    const uint8_t base = bases[0];
    if (step) {
        for (size_t i = 0; i < count; ++i) (*from)[i] -= bases[i];
    } else {
        for (size_t i = 0; i < count; ++i) (*from)[i] -= base;
    }
}

// Adds to each line what its elements bring: neighbours, with `step`, are of neighbouring lines.
void add_up(const SignedBytes& values, size_t count, bool step, int32_t* __restrict lines) {
    if (step) {
        for (size_t i = 0; i < count; ++i) lines[i] += values[i];
    } else {
        int32_t sum = 0;
        for (size_t i = 0; i < count; ++i) sum += values[i];
        *lines += sum;
    }
}

// Bases for the rows and columns of a sample. All arithmetic is modulo 256: it is reduced to the
// element's exponent bits only where exponents are counted and where a table is made.
class Fit {
public:
    Fit(const Sample& sample, BaseAxes axes, uint8_t first_base);

    // Moves bases by what the residuals of their lines are off on average, rows and columns by
    // turns; then finds the code.
    void average();
    // Moves bases a step at a time to where their lines cost less under the code, and finds the
    // code anew, until that gains nothing any more.
    void refine();

    const Code& code() const { return code_; }
    std::vector<uint8_t> bases() const;  // as a table has them

private:
    // Those that have a base each; without axes all elements are one line.
    struct Lines {
        uint8_t axes;
        bool step;  // from one element to the next
        std::vector<uint8_t> bases;

        Lines(const BasePattern& pattern, uint8_t line_axes, uint8_t base)
            : axes(line_axes), step(line_axes >> (BasePattern::AXES - 1) & 1),
              bases(BasePattern{pattern.extents, line_axes, 0}.row_count(), base) {}
        uint8_t base(uint32_t line, size_t i) const { return bases[line + (step ? i : 0)]; }
    };
    // Neighbours along the innermost axis.
    struct Stretch {
        size_t start, count;
        uint32_t row, column;  // of the first
    };

    // Those at `every`-th places only: enough for a code, not for bases.
    void find_code(size_t every);
    void find_stretches();
    void residuals(const Stretch& stretch, Bytes* out) const;
    void average(Lines* lines, uint32_t Stretch::* line);
    bool move(Lines* lines, uint32_t Stretch::* line);

    const Sample& sample_;
    bool has_columns_;
    Lines rows_, columns_;
    std::vector<Stretch> stretches_;
    Code code_;
};

Fit::Fit(const Sample& sample, BaseAxes axes, uint8_t first_base)
    : sample_(sample), has_columns_(axes.column_axes != 0),
      rows_(sample.pattern, axes.row_axes, first_base),
      columns_(sample.pattern, axes.column_axes, 0) {
    find_stretches();
}

void Fit::find_stretches() {
    constexpr int inner = BasePattern::AXES - 1;
    const auto& extents = sample_.pattern.extents;
    const auto period = uint32_t(sample_.pattern.period());
    size_t start = 0;
    stretches_.reserve(sample_.runs.size());
    for (const auto& run : sample_.runs) {
        uint32_t position = run.position;
        for (size_t left = run.elements; left > 0;) {
            uint32_t row = 0, column = 0, rest = position, stride = period;
            for (int axis = 0; axis < BasePattern::AXES; ++axis) {
                const uint32_t extent = extents[size_t(axis)];
                stride /= extent;
                if (rows_.axes >> axis & 1) row = row * extent + rest / stride;
                if (columns_.axes >> axis & 1) column = column * extent + rest / stride;
                rest %= stride;
            }
            const size_t count = std::min({left, size_t(extents[inner] - position % extents[inner]),
                                           STRETCH_MAX});
            stretches_.push_back({start, count, row, column});
            start += count;
            left -= count;
            position = uint32_t((position + count) % period);
        }
    }
}

void Fit::residuals(const Stretch& stretch, Bytes* out) const {
    std::copy_n(sample_.exponents.data() + stretch.start, stretch.count, out->data());
    subtract(rows_.bases.data() + stretch.row, rows_.step, stretch.count, out);
    if (has_columns_)
        subtract(columns_.bases.data() + stretch.column, columns_.step, stretch.count, out);
}

void Fit::average(Lines* lines, uint32_t Stretch::* line) {
    std::vector<int32_t> sums(lines->bases.size()), counts(lines->bases.size());
    Bytes left;
    SignedBytes off, is_counted;
    for (const Stretch& stretch : stretches_) {
        residuals(stretch, &left);
        const uint8_t* exponents = sample_.exponents.data() + stretch.start;
        for (size_t i = 0; i < stretch.count; ++i) {
            is_counted[i] = exponents[i] != 0;  // zeros say nothing about the rest
            off[i] = int8_t(uint8_t(left[i] - MIDDLE) & uint8_t(-is_counted[i]));
        }
        add_up(off, stretch.count, lines->step, sums.data() + stretch.*line);
        add_up(is_counted, stretch.count, lines->step, counts.data() + stretch.*line);
    }
    for (size_t i = 0; i < sums.size(); ++i) {
        if (counts[i]) lines->bases[i] += uint8_t(std::lrint(double(sums[i]) / counts[i] + PHASE));
    }
}

void Fit::average() {
    average(&rows_, &Stretch::row);
    if (has_columns_) {
        average(&columns_, &Stretch::column);
        average(&rows_, &Stretch::row);
        average(&columns_, &Stretch::column);
    }
    find_code(ROUGHLY);
}

void Fit::find_code(size_t every) {
    std::array<std::array<uint32_t, 256>, 4> tables{};  // so that equal neighbours do not wait
    Bytes left;
    size_t seen = 0;
    for (size_t at = 0; at < stretches_.size(); at += every) {
        const size_t count = stretches_[at].count;
        residuals(stretches_[at], &left);
        for (size_t i = 0; i < count; ++i) ++tables[i % 4][left[i]];
        seen += count;
    }
    const int distances = std::min(DISTANCES, 1 << sample_.exponent_bits);
    const size_t mask = (size_t{1} << sample_.exponent_bits) - 1;
    Counts counts{};
    for (size_t left_over = 0; left_over < 256; ++left_over) {
        if (int(left_over & mask) >= distances) continue;
        for (const auto& table : tables) counts[left_over & mask] += table[left_over];
    }
    code_ = cheapest_code(counts, distances, seen);
}

// What an element pays for leaving a tier: more, where its residual is not in it or above.
struct Toll {
    uint8_t low, span, bits;
};

std::vector<Toll> tolls(const Code& code) {
    std::vector<Toll> found;
    const auto& tier_bits = code.shape->tier_bits;
    uint8_t low = 255, high = 0;
    size_t rank = 0;
    for (size_t tier = 0; tier < tier_bits.size(); ++tier) {
        for (size_t stop = rank + (size_t{1} << tier_bits[tier]) - 1; rank < stop; ++rank) {
            low = std::min(low, code.offsets[rank]);
            high = std::max(high, code.offsets[rank]);
        }
        const bool is_last = tier + 1 == tier_bits.size();
        found.push_back({low, uint8_t(high - low), is_last ? uint8_t(8) : tier_bits[tier + 1]});
    }
    return found;
}

// What elements pay less or more with a base that is one lower and one higher.
void compare(const Bytes& left, size_t count, const std::vector<Toll>& to_pay,
             SignedBytes* lower, SignedBytes* higher) {
    std::fill_n(lower->begin(), count, int8_t{0});
    std::fill_n(higher->begin(), count, int8_t{0});
    for (const Toll toll : to_pay) {
        const auto pays = [toll](uint8_t residual) {
            return uint8_t(-(uint8_t(residual - toll.low) > toll.span)) & toll.bits;
        };
        for (size_t i = 0; i < count; ++i) {
            const int here = pays(left[i]);
            (*lower)[i] = int8_t((*lower)[i] + pays(uint8_t(left[i] + 1)) - here);
            (*higher)[i] = int8_t((*higher)[i] + pays(uint8_t(left[i] - 1)) - here);
        }
    }
}

bool Fit::move(Lines* lines, uint32_t Stretch::* line) {
    const auto to_pay = tolls(code_);
    std::vector<int32_t> lower(lines->bases.size()), higher(lines->bases.size());
    Bytes left;
    SignedBytes low, high;
    for (const Stretch& stretch : stretches_) {
        residuals(stretch, &left);
        compare(left, stretch.count, to_pay, &low, &high);
        add_up(low, stretch.count, lines->step, lower.data() + stretch.*line);
        add_up(high, stretch.count, lines->step, higher.data() + stretch.*line);
    }
    bool moved = false;
    for (size_t i = 0; i < lower.size(); ++i) {
        if (std::min(lower[i], higher[i]) >= 0) continue;
        lines->bases[i] += lower[i] < higher[i] ? uint8_t(-1) : uint8_t{1};
        moved = true;
    }
    return moved;
}

void Fit::refine() {
    constexpr int ROUNDS_MAX = 4;
    for (int round = 0; round < ROUNDS_MAX; ++round) {
        const auto before = std::make_tuple(rows_.bases, columns_.bases, code_);
        bool moved = move(&rows_, &Stretch::row);
        if (has_columns_) moved |= move(&columns_, &Stretch::column);
        if (!moved) break;
        find_code(ROUGHLY);
        const double bits = std::get<2>(before).bits;
        if (code_.bits > bits) std::tie(rows_.bases, columns_.bases, code_) = before;
        if (code_.bits > bits * 0.999) break;
    }
    find_code(1);
}

std::vector<uint8_t> Fit::bases() const {
    std::vector<uint8_t> all = rows_.bases;
    if (has_columns_) all.insert(all.end(), columns_.bases.begin(), columns_.bases.end());
    for (uint8_t& base : all) base &= uint8_t((1u << sample_.exponent_bits) - 1);
    return all;
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
    for (const BaseAxes axes : candidates) {
        const BasePattern pattern{extents, axes.row_axes, axes.column_axes};
        const bool lawful = axes.row_axes < 16 && axes.column_axes < 16;
        if (lawful && pattern.row_count() + pattern.column_count() <= CodeTable::BASES_MAX)
            candidates_.push_back(axes);
    }
    if (candidates_.empty()) candidates_.push_back({});
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
    elements = std::min(elements, ELEMENTS_MAX - sample_.exponents.size());
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
    const auto first_base = uint8_t(median(sample_.exponents) - MIDDLE);
    std::optional<Fit> best;
    BaseAxes best_axes;
    double least = 0;
    for (const BaseAxes axes : candidates_) {
        Fit fit(sample_, axes, first_base);
        fit.average();
        // Bases are fitted to the sample; other elements cost more (Akaike's criterion).
        double base_bits = 1.4427 / double(std::max<uint64_t>(elements(), 1));
        if (elements_to_code_) base_bits += 8.0 / double(elements_to_code_);
        const double bits = fit.code().bits + base_bits * double(fit.bases().size());
        if (best && bits >= least) continue;
        best.emplace(std::move(fit));
        best_axes = axes;
        least = bits;
    }
    best->refine();
    BasePattern pattern = sample_.pattern;
    pattern.row_axes = best_axes.row_axes;
    pattern.column_axes = best_axes.column_axes;
    const Code& code = best->code();
    return {CodeTable::make(dtype_, code.shape->tier_bits, code.offsets, pattern, best->bases()),
            code.bits};
}

std::vector<SampleRun> sample_runs(uint64_t elements, uint64_t wanted) {
    constexpr uint64_t RUN = 64;
    std::vector<SampleRun> runs;
    const uint64_t places = elements / std::max<uint64_t>(wanted, 1);
    if (places <= 1 && elements) runs.push_back({0, elements});
    if (places <= 1) return runs;
    // The fractional parts of multiples of the golden ratio leave no place out for long.
    uint32_t turn = 0;
    for (uint64_t at = 0; at < elements; at += RUN * places, turn += 0x9E3779B9u) {
        const uint64_t start = at + (uint64_t(turn) * places >> 32) * RUN;
        if (start < elements) runs.push_back({start, std::min(RUN, elements - start)});
    }
    return runs;
}

}  // namespace kvwire
