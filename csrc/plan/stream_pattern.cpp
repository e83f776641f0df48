#include "plan/stream_pattern.hpp"

#include <algorithm>

namespace kvwire {
namespace {

constexpr uint32_t ANY_TOKENS = 0;

// An axis and, bit per choice of bases, whether it counts in the row and in the column.
struct Counted {
    Axis axis{};
    uint64_t extent = 1;
    uint32_t row = 0, column = 0;
    bool is_token() const { return axis == Axis::TOKEN; }
};
using Axes = std::vector<Counted>;

// Choice 0 is the one that suits the kind best; each `count` adds one.
enum Choice : uint32_t { BEST = 1, OUTER = 2, ONE = 4 };

Axes axes_of(const TensorDesc& tensor) {
    Axes axes;
    for (const AxisDesc& desc : tensor.axes) {
        uint64_t extent = 0;
        for (const Slice& slice : desc.slices) extent += slice.extent();
        if (desc.axis == Axis::TOKEN)
            extent = ANY_TOKENS;
        else if (extent == 1)
            continue;
        if (desc.axis != Axis::TOKEN || !axes.empty()) axes.push_back({desc.axis, extent, 0, 0});
    }
    return axes;
}

// A state is about an outer product: what its rows and columns have in common adds up. Everything
// else has channels.
void count(GroupKind kind, Axes& axes) {
    std::vector<Counted*> counted;
    for (Counted& axis : axes)
        if (!axis.is_token() && axis.axis != Axis::COLUMN) counted.push_back(&axis);
    if (counted.empty()) return;
    for (Counted* axis : counted) axis->row = BEST;
    counted[0]->row |= OUTER;
    if (kind != GroupKind::RECURRENT || counted.size() < 2) return;
    for (Counted* axis : counted) axis->column = BEST;
    counted[counted.size() - 1]->row &= ~uint32_t(BEST);
    counted[counted.size() - 2]->column = 0;
}

// Joins neighbours that count alike, in choice BEST at least: a code table has four axes.
void merge(Axes& axes, uint32_t* choices) {
    while (axes.size() > StreamPattern::AXES) {
        size_t at = 0;
        const auto differ = [&] {
            return (axes[at].row ^ axes[at + 1].row) | (axes[at].column ^ axes[at + 1].column);
        };
        while (axes[at].is_token() || axes[at + 1].is_token() || differ() & BEST) ++at;
        *choices &= ~differ();
        axes[at].extent *= axes[at + 1].extent;
        axes.erase(axes.begin() + ptrdiff_t(at) + 1);
    }
}

uint64_t product(const Axes& axes, uint32_t Counted::*role, uint32_t choice) {
    uint64_t product = 1;
    for (const Counted& axis : axes)
        if (axis.*role & choice && __builtin_mul_overflow(product, axis.extent, &product))
            return UINT64_MAX;
    return product;
}

}  // namespace

uint64_t StreamPattern::period(uint32_t tokens) const {
    uint64_t period = 1;
    for (int axis = 0; axis < AXES; ++axis) {
        const uint64_t extent = axis == token_axis ? tokens : extents[size_t(axis)];
        if (__builtin_mul_overflow(period, extent, &period)) return UINT64_MAX;
    }
    return period;
}

StreamPattern stream_pattern(GroupKind kind, const TensorDesc& tensor) {
    Axes axes = axes_of(tensor);
    count(kind, axes);
    uint32_t choices = BEST | OUTER | ONE;
    merge(axes, &choices);
    StreamPattern pattern;
    const size_t shift = StreamPattern::AXES - axes.size();
    for (size_t at = 0; at < axes.size(); ++at) {
        pattern.extents[shift + at] = uint32_t(std::min<uint64_t>(axes[at].extent, UINT32_MAX));
        if (axes[at].is_token()) pattern.token_axis = int(shift + at);
    }
    for (const uint32_t choice : {BEST, OUTER, ONE}) {
        if (!(choices & choice)) continue;
        StreamPattern::Bases bases;
        for (size_t at = 0; at < axes.size(); ++at) {
            if (axes[at].row & choice) bases.row_axes |= uint8_t(1 << (shift + at));
            if (axes[at].column & choice) bases.column_axes |= uint8_t(1 << (shift + at));
        }
        const uint64_t rows = product(axes, &Counted::row, choice);
        const uint64_t columns =
            bases.column_axes ? product(axes, &Counted::column, choice) : 0;
        const bool known = std::find(pattern.choices.begin(), pattern.choices.end(), bases) !=
                           pattern.choices.end();
        if (!known && rows <= StreamPattern::BASES_MAX &&
            columns <= StreamPattern::BASES_MAX - rows)
            pattern.choices.push_back(bases);
    }
    return pattern;
}

std::vector<Stretch> stretches(const TensorDesc& tensor, const Item& item) {
    const uint64_t bytes = item_raw_bytes(tensor, item);
    if (bytes == 0) return {};
    const Axes axes = axes_of(tensor);
    const bool inside = std::any_of(axes.begin(), axes.end(),
                                    [](const Counted& axis) { return axis.is_token(); });
    if (!inside) return {{bytes, 0}};
    const uint64_t start = item.token_start, stop = item.token_stop, block = tensor.block_tokens;
    if (block == 0) return {{bytes, uint32_t(std::min<uint64_t>(stop - start, UINT32_MAX))}};
    const uint64_t row_bytes = tensor.row_bytes();
    const uint64_t first = std::min(stop, (start + block - 1) / block * block);
    const uint64_t last = std::max(first, stop / block * block);
    std::vector<Stretch> found;
    if (first > start) found.push_back({(first - start) * row_bytes, uint32_t(first - start)});
    if (last > first) found.push_back({(last - first) * row_bytes, uint32_t(block)});
    if (stop > last) found.push_back({(stop - last) * row_bytes, uint32_t(stop - last)});
    return found;
}

}  // namespace kvwire
