// Pages to one contiguous segment and back, by the rows of kernels/copy_plan.py.
#pragma once

#include <cuda_pipeline.h>
#include <string.h>

#include "cta.cuh"

namespace kvwire {

constexpr int LEVELS = 5;

struct Leg {
    int64_t wire_offset, wire_step, address, run_bytes, iterations;
    int64_t counts[LEVELS], strides[LEVELS], table_steps[LEVELS];
    int64_t block_stride, table_start, block_count;
};
static_assert(sizeof(Leg) == 8 * (8 + 3 * LEVELS), "a row of kernels/copy_plan.py");

// Halves [low, high) until at most `most` are left, among them the last i with
// starts[i * step] <= value, or `low`.
KVWIRE_DEVICE void narrow_down(const int64_t* starts, int step, int64_t value, int most, int& low,
                               int& high) {
    while (high - low > most) {
        const int middle = (low + high) / 2;
        if (starts[int64_t(middle) * step] <= value)
            low = middle;
        else
            high = middle;
    }
}

// Where iteration `n` of a leg lies; null: nowhere, or its block id is out of range, which is
// reported and never followed.
KVWIRE_DEVICE uint8_t* place_of(const Leg& leg, int64_t n, const int64_t* block_ids,
                                int64_t* bad_entry) {
    int64_t address = leg.address, entry = leg.table_start;
    const int64_t block_count = leg.block_count, block_stride = leg.block_stride;
    for (int level = LEVELS - 1; n > 0 && level >= 0; --level) {
        if (leg.counts[level] == 1) continue;
        const int64_t outer = n / leg.counts[level], index = n - outer * leg.counts[level];
        n = outer;
        address += index * leg.strides[level];
        entry += index * leg.table_steps[level];
    }
    if (block_count > 0) {
        const int64_t block = block_ids[entry];
        if (block < 0 || block >= block_count) {
            lower_to(bad_entry, entry);
            return nullptr;
        }
        address += block * block_stride;
    }
    return leg.address ? reinterpret_cast<uint8_t*>(address) : nullptr;
}

// The fp8 e4m3 code nearest to a bf16 number: kernels/narrow.py. Below the least normal number its
// unit is 2^-9, the lowest bit of a float that is 2^14 and little more: the addition rounds.
KVWIRE_DEVICE uint32_t e4m3_of_bf16(uint32_t bits) {
    const uint32_t magnitude = bits & 0x7FFF, sign = bits >> 8 & 0x80, wide = magnitude << 16;
    const uint32_t normal = ((magnitude + 7 + (magnitude >> 4 & 1)) >> 4) - (120 << 3);
    const uint32_t top = magnitude > 0x7F80 ? 0x7F : 0x7E;
    float value;
    memcpy(&value, &wide, sizeof value);
    value += 16384;
    uint32_t tiny;
    memcpy(&tiny, &value, sizeof tiny);
    const uint32_t code = magnitude >= 121 << 7 ? (normal < top ? normal : top) : tiny & 0xF;
    return sign | code;
}

// How a word of a page goes to the segment, which has SHRINK times fewer bytes.
struct AsItIs {
    static constexpr int SHRINK = 1;
    template <class Word>
    static KVWIRE_DEVICE Word of(Word word) { return word; }
};

struct ToE4m3 {
    static constexpr int SHRINK = 2;
    static KVWIRE_DEVICE uint8_t of(uint16_t word) { return uint8_t(e4m3_of_bf16(word)); }
    static KVWIRE_DEVICE uint32_t of(uint64_t word) {
        uint32_t codes = 0;
        for (int i = 0; i < 4; ++i) codes |= e4m3_of_bf16(uint16_t(word >> 16 * i)) << 8 * i;
        return codes;
    }
};

// What nobody needs again soon is the first to leave the caches.
template <class Word>
KVWIRE_DEVICE Word load_once(const Word* from) { return __ldcs(from); }
KVWIRE_DEVICE Word16 load_once(const Word16* from) {
    const ulonglong2 pair = __ldcs(reinterpret_cast<const ulonglong2*>(from));
    return {pair.x, pair.y};
}

// Words that a thread has loaded before it stores the first.
template <class Word>
constexpr int IN_FLIGHT = sizeof(Word) < 8 ? 8 : 4;
constexpr int TILE_ROWS_MAX = 256;

// A tile while it is copied, in shared memory: its leg, and where each of its rows begins.
struct alignas(16) TileRow {
    uint8_t *page, *wire;
};
struct Tile {
    TileRow rows[TILE_ROWS_MAX];
    Leg leg;
    int leg_number;
};

// Copies a tile of `rows` iterations by `words` words, a power of two, of one leg. Before its first
// byte memory is waited for three times: where legs begin, the leg, block ids. May be called again
// at once: what a slow thread still reads is overwritten behind the next call's first sync().
template <class Word, bool PACK, class Change = AsItIs>
KVWIRE_DEVICE void copy_tile(DeviceCta& cta, int64_t number, const Leg* legs,
                             const int64_t* tile_starts, int64_t leg_count,
                             const int64_t* block_ids, uint8_t* segment, int64_t* bad_entry,
                             int rows, int words, Tile& tile) {
    constexpr int WORD_BYTES = sizeof(Word), LEG_WORDS = sizeof(Leg) / 8;
    int low = 0, high = int(leg_count);
    narrow_down(tile_starts, 1, number, THREADS, low, high);
    const int thread = threadIdx.x;
    const int64_t* const starts = tile_starts + low + thread;
    if (thread < high - low && starts[0] <= number && number < starts[1])
        tile.leg_number = low + thread;
    cta.sync();
    const int64_t within = number - tile_starts[tile.leg_number];
    if (thread < LEG_WORDS)
        reinterpret_cast<int64_t*>(&tile.leg)[thread] =
            reinterpret_cast<const int64_t*>(legs + tile.leg_number)[thread];
    cta.sync();
    const Leg& leg = tile.leg;
    const int shift = 31 - __clz(words);
    const int64_t run_words = leg.run_bytes / WORD_BYTES;
    const int64_t across = (run_words + words - 1) >> shift, down = within / across;
    const int64_t first = down * rows, word = (within - down * across) << shift;
    const int64_t left = leg.iterations - first, wide = run_words - word;
    const int here = int(left < rows ? left : rows), width = int(wide < words ? wide : words);
    if (thread < here) {
        const int64_t n = first + thread, inside = word * WORD_BYTES;
        uint8_t* const run = place_of(leg, n, block_ids, bad_entry);
        const int64_t offset = leg.wire_offset + n * leg.wire_step + inside;
        tile.rows[thread] = {run ? run + inside : nullptr, segment + offset / Change::SHRINK};
    }
    cta.sync();
    using Sent = decltype(Change::of(Word{}));
    constexpr int TOGETHER = IN_FLIGHT<Word>;
    const int count = here << shift;
    for (int begin = thread; begin < count; begin += TOGETHER * THREADS) {
        Word held[TOGETHER];
        uint8_t* to[TOGETHER];
        bool moves[TOGETHER];
        for (int k = 0; k < TOGETHER; ++k) {
            const int at = begin + k * THREADS, column = at & (words - 1);
            const auto [page, wire] = tile.rows[(at < count ? at : count - 1) >> shift];
            const bool is_inside = at < count && column < width;
            const Word* const from = reinterpret_cast<const Word*>(PACK ? page : wire);
            held[k] = is_inside && page ? load_once(from + column) : Word{};
            moves[k] = is_inside && (PACK || page);
            to[k] = PACK ? wire : page;
        }
        for (int k = 0; k < TOGETHER; ++k) {
            const int column = (begin + k * THREADS) & (words - 1);
            if (moves[k]) reinterpret_cast<Sent*>(to[k])[column] = Change::of(held[k]);
        }
    }
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
        int number = 0, end = int(leg_count);
        narrow_down(&legs[0].wire_offset, sizeof(Leg) / 8, offset, 1, number, end);
        const int64_t last_offset = legs[number].wire_offset, step = legs[number].wire_step;
        const int64_t last_n = (offset - last_offset) / step;
        const int64_t last_within = offset - last_offset - last_n * step;
        for (;; --number) {  // the legs of a piece take turns, all with the same step
            const Leg& leg = legs[number];
            int64_t n = last_n, within = last_within + last_offset - leg.wire_offset;
            if (within >= step) {
                within -= step;
                ++n;
            }
            if (within >= leg.run_bytes) continue;
            *count = leg.run_bytes - within;
            uint8_t* const run = place_of(leg, n, block_ids, bad_entry);
            return run ? run + within : nullptr;
        }
    }
};

// Every 32nd word of `bytes` bytes, from `lane` on; from null: zeros.
template <class Word>
KVWIRE_DEVICE void copy_lane(uint8_t* to, const uint8_t* from, int bytes, int lane) {
    constexpr int TOGETHER = 4;
    const int count = bytes / int(sizeof(Word));
    for (int first = lane; first < count; first += TOGETHER * 32) {
        Word held[TOGETHER];
        for (int k = 0; k < TOGETHER; ++k) {
            const bool is_there = from && first + 32 * k < count;
            held[k] = is_there ? reinterpret_cast<const Word*>(from)[first + 32 * k] : Word{};
        }
        for (int k = 0; k < TOGETHER; ++k)
            if (first + 32 * k < count) reinterpret_cast<Word*>(to)[first + 32 * k] = held[k];
    }
}

// Bytes [offset, offset + count) of a segment to or from `buffer`; what has no place is 0. No
// sync(). Each warp finds the runs of its share, so that all of them wait for memory together.
// What is read is there when end_read() returns.
enum Move { WRITE, READ };
template <Move MOVE>
KVWIRE_DEVICE void move_range(const Segment& segment, int64_t offset, int count, uint8_t* buffer) {
    const int lane = threadIdx.x % 32, share = (count + 16 * WARPS - 1) / (16 * WARPS) * 16;
    const int begin = int(threadIdx.x) / 32 * share;
    const int stop = begin + share < count ? begin + share : count;
    for (int at = begin; at < stop;) {
        int64_t run = 0;
        uint8_t* const place = segment.find(offset + at, &run);
        const int here = run < stop - at ? int(run) : stop - at;
        uint8_t* const to = MOVE == WRITE ? place : buffer + at;
        const uint8_t* const from = MOVE == WRITE ? buffer + at : place;
        const uint64_t ends = uint64_t(uintptr_t(to)) | uint64_t(uintptr_t(from)) | uint64_t(here);
        at += here;
        if (!to) continue;
        if (MOVE == READ && from && ends % 16 == 0)
#pragma unroll 4
            for (int i = 16 * lane; i < here; i += 16 * 32)
                __pipeline_memcpy_async(to + i, from + i, 16);
        else if (MOVE == WRITE && ends % 16 == 0)
            copy_lane<Word16>(to, from, here, lane);
        else if (ends % 4 == 0)
            copy_lane<uint32_t>(to, from, here, lane);
        else
            copy_lane<uint8_t>(to, from, here, lane);
    }
    if (MOVE == READ) __pipeline_commit();
}
KVWIRE_DEVICE void end_read(DeviceCta& cta) {
    __pipeline_wait_prior(0);
    cta.sync();
}

}  // namespace kvwire
