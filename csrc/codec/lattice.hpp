// Which row, column and place of its row each element of a part has (FORMAT.md section 9.3).
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

namespace kvwire {

struct Lattice {
    static constexpr int AXES = 4;
    static constexpr int INNER = AXES - 1;
    static constexpr uint64_t COUNT_MAX = (uint64_t{1} << 31) - 1;
    std::array<uint32_t, AXES> extents = {1, 1, 1, 1};  // outer to inner
    uint8_t row_axes = 0, column_axes = 0;

    // Elements that differ only along the innermost axis. Rows advance with them where that axis is
    // one of the row's, else places do; columns where it is one of the column's.
    struct Line {
        size_t at;  // of the first, from where lines() began
        size_t count;
        size_t row, column, place;
    };

    uint8_t place_axes() const { return uint8_t(~row_axes & 0x0F); }
    bool row_steps() const { return row_axes >> INNER & 1; }
    bool column_steps() const { return column_axes >> INNER & 1; }

    uint64_t count() const { return product(0x0F); }
    uint64_t rows() const { return product(row_axes); }
    uint64_t columns() const { return column_axes ? product(column_axes) : 0; }
    uint64_t places() const { return product(place_axes()); }

    // More than COUNT_MAX is COUNT_MAX + 1.
    uint64_t product(uint8_t axes) const {
        uint64_t product = 1;
        for (int axis = 0; axis < AXES; ++axis)
            if (axes >> axis & 1)
                product = std::min(product * extents[size_t(axis)], COUNT_MAX + 1);
        return product;
    }

    // visit(Line) for `count` elements from `from` on.
    template <class Visit>
    void lines(size_t from, size_t count, Visit&& visit) const {
        const size_t length = extents[INNER];
        for (size_t at = 0; at < count;) {
            std::array<uint32_t, AXES> place;
            size_t rest = from + at;
            for (int axis = AXES; axis-- > 0; rest /= extents[size_t(axis)])
                place[size_t(axis)] = uint32_t(rest % extents[size_t(axis)]);
            const size_t run = std::min(length - place[INNER], count - at);
            visit(Line{at, run, number(row_axes, place), number(column_axes, place),
                       number(place_axes(), place)});
            at += run;
        }
    }

private:
    size_t number(uint8_t axes, const std::array<uint32_t, AXES>& place) const {
        size_t number = 0;
        for (int axis = 0; axis < AXES; ++axis)
            if (axes >> axis & 1) number = number * extents[size_t(axis)] + place[size_t(axis)];
        return number;
    }
};

}  // namespace kvwire
