#pragma once
// How the elements of an item repeat along the stream (FORMAT.md sections 7.2 and 9.1): what the
// bases of its code table may depend on.

#include <array>
#include <cstdint>
#include <vector>

#include "plan/placement.hpp"

namespace kvwire {

struct StreamPattern {
    static constexpr int AXES = 4;
    static constexpr uint64_t BASES_MAX = 65'536;

    // Outer to inner, ones first. The token axis, where it lies inside another, has the extent 0:
    // that of a stretch takes its place.
    std::array<uint32_t, AXES> extents = {1, 1, 1, 1};
    int token_axis = -1;

    // Axes that may count in the row and in the column bases, bit per axis.
    struct Bases {
        uint8_t row_axes = 0, column_axes = 0;
        bool operator==(const Bases& other) const {
            return row_axes == other.row_axes && column_axes == other.column_axes;
        }
    };
    std::vector<Bases> choices;  // finest first; the last is one base for all

    // Elements of one repetition; may exceed 32 bits.
    uint64_t period(uint32_t tokens) const;
};

StreamPattern stream_pattern(GroupKind kind, const TensorDesc& tensor);

// Consecutive bytes of an item in which the pattern repeats; `tokens` is the extent of the token
// axis, 0 where the pattern has none.
struct Stretch {
    uint64_t bytes = 0;
    uint32_t tokens = 0;
};

// All of the item: one stretch, or three where pages are cut: a first partial block, the whole
// ones, and a last partial block.
std::vector<Stretch> stretches(const TensorDesc& tensor, const Item& item);

}  // namespace kvwire
