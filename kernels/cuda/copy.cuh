// Pages to one contiguous segment and back, by the rows of kernels/copy_plan.py.
#pragma once

#include "cta.cuh"

namespace kvwire {

constexpr int LEVELS = 5;

struct Leg {
    int64_t wire_offset, wire_step, address, run_bytes, iterations;
    int64_t counts[LEVELS], strides[LEVELS], table_steps[LEVELS];
    int64_t block_stride, table_start, block_count;
};
static_assert(sizeof(Leg) == 8 * (8 + 3 * LEVELS), "a row of kernels/copy_plan.py");

// The last i below `count` with starts[i * step] <= value.
KVWIRE_DEVICE int64_t last_at_most(const int64_t* starts, int64_t step, int64_t count,
                                   int64_t value) {
    int64_t low = 0;
    for (int64_t high = count; high - low > 1;) {
        const int64_t middle = (low + high) / 2;
        if (starts[middle * step] <= value)
            low = middle;
        else
            high = middle;
    }
    return low;
}

// Where iteration `n` of a leg lies; null: nowhere, or its block id is out of range, which is
// reported and never followed.
KVWIRE_DEVICE uint8_t* place_of(const Leg& leg, int64_t n, const int64_t* block_ids,
                                int64_t* bad_entry) {
    if (leg.address == 0) return nullptr;
    int64_t address = leg.address, entry = leg.table_start;
    for (int level = LEVELS - 1; level >= 0; --level) {
        if (leg.counts[level] == 1) continue;
        const int64_t index = n % leg.counts[level];
        n /= leg.counts[level];
        address += index * leg.strides[level];
        entry += index * leg.table_steps[level];
    }
    if (leg.block_count > 0) {
        const int64_t block = block_ids[entry];
        if (block < 0 || block >= leg.block_count) {
            lower_to(bad_entry, entry);
            return nullptr;
        }
        address += block * leg.block_stride;
    }
    return reinterpret_cast<uint8_t*>(address);
}

// The fp8 e4m3 code nearest to a bf16 number: kernels/narrow.py.
KVWIRE_DEVICE uint8_t e4m3_of_bf16(uint16_t bits) {
    const int magnitude = bits & 0x7FFF, sign = bits >> 15 << 7;
    if (magnitude > 0x7F80) return uint8_t(sign | 0x7F);
    if (magnitude >= 121 << 7) {
        const int code = ((magnitude + 7 + (magnitude >> 4 & 1)) >> 4) - (120 << 3);
        return uint8_t(sign | (code < 0x7E ? code : 0x7E));
    }
    const int significand = (magnitude & 0x7F) | 0x80, exponent = magnitude >> 7;
    const int places = exponent < 115 ? 10 : 125 - exponent;
    const int half = (1 << (places - 1)) - 1 + (significand >> places & 1);
    return uint8_t(sign | (significand + half) >> places);
}

// How a word of a page goes to the segment, which has SHRINK times fewer bytes.
struct AsItIs {
    static constexpr int SHRINK = 1;
    template <class Word>
    static KVWIRE_DEVICE Word of(Word word) { return word; }
};

struct ToE4m3 {
    static constexpr int SHRINK = 2;
    static KVWIRE_DEVICE uint8_t of(uint16_t word) { return e4m3_of_bf16(word); }
    static KVWIRE_DEVICE uint32_t of(uint64_t word) {
        uint32_t codes = 0;
        for (int i = 0; i < 4; ++i)
            codes |= uint32_t(e4m3_of_bf16(uint16_t(word >> 16 * i))) << 8 * i;
        return codes;
    }
};

// A tile of `rows` iterations by `words` words of one leg; `addresses` has room for `rows`.
template <class Word, bool PACK, class Change = AsItIs, class Cta>
KVWIRE_DEVICE void copy_tile(Cta& cta, int64_t tile, const Leg* legs, const int64_t* tile_starts,
                             int64_t leg_count, const int64_t* block_ids, uint8_t* segment,
                             int64_t* bad_entry, int rows, int words, uint8_t** addresses) {
    const int64_t number = last_at_most(tile_starts, 1, leg_count, tile);
    const Leg& leg = legs[number];
    const int64_t run_words = leg.run_bytes / int64_t(sizeof(Word));
    const int64_t across = (run_words + words - 1) / words;
    const int64_t within = tile - tile_starts[number];
    const int64_t first = within / across * rows, word = within % across * words;
    const int64_t left = leg.iterations - first, wide = run_words - word;
    const int here = int(left < rows ? left : rows), width = int(wide < words ? wide : words);
    cta.spread(here, [&](int row) {
        addresses[row] = place_of(leg, first + row, block_ids, bad_entry);
    });
    cta.sync();
    cta.spread(here * words, [&](int i) {  // `words` is a power of two
        const int row = i / words, column = i % words;
        if (column >= width) return;
        uint8_t* const page = addresses[row];
        uint8_t* const wire =
            segment + (leg.wire_offset + (first + row) * leg.wire_step +
                       word * int64_t(sizeof(Word))) / Change::SHRINK;
        if constexpr (PACK) {
            const Word from =
                page ? reinterpret_cast<const Word*>(page)[word + column] : Word{};
            using Sent = decltype(Change::of(from));
            reinterpret_cast<Sent*>(wire)[column] = Change::of(from);
        } else if (page) {
            reinterpret_cast<Word*>(page)[word + column] =
                reinterpret_cast<const Word*>(wire)[column];
        }
    });
    cta.sync();
}

// A segment, where it lies: side by side at `bytes`, or, where that is null, in pages.
struct Segment {
    uint8_t* bytes;
    const Leg* legs;
    int64_t leg_count;
    const int64_t* block_ids;
    int64_t* bad_entry;

    // The address of the byte at `offset`, and how many from there on lie side by side.
    KVWIRE_DEVICE uint8_t* find(int64_t offset, int64_t* count) const {
        if (bytes) {
            *count = INT64_MAX;
            return bytes + offset;
        }
        int64_t number = last_at_most(&legs[0].wire_offset, sizeof(Leg) / 8, leg_count, offset);
        for (;; --number) {  // the legs of a piece take turns
            const Leg& leg = legs[number];
            const int64_t n = (offset - leg.wire_offset) / leg.wire_step;
            const int64_t within = (offset - leg.wire_offset) % leg.wire_step;
            if (within >= leg.run_bytes) continue;
            *count = leg.run_bytes - within;
            uint8_t* const run = place_of(leg, n, block_ids, bad_entry);
            return run ? run + within : nullptr;
        }
    }
};

// Bytes [offset, offset + count) of a segment to or from `buffer`; what has no place is 0. No
// sync().
template <bool READ, class Cta>
KVWIRE_DEVICE void move_range(Cta& cta, const Segment& segment, int64_t offset, int count,
                              uint8_t* buffer) {
    for (int at = 0; at < count;) {
        int64_t run = 0;
        uint8_t* const place = segment.find(offset + at, &run);
        const int here = run < count - at ? int(run) : count - at;
        if (READ && !place)
            cta.spread(here, [&](int i) { buffer[at + i] = 0; });
        else if (READ)
            copy_bytes(cta, buffer + at, place, here);
        else if (place)
            copy_bytes(cta, place, buffer + at, here);
        at += here;
    }
}

}  // namespace kvwire
