// FORMAT.md section 9.1 by blocks of threads: strips in shared memory, each source byte read once.
#pragma once

#include "copy.cuh"
#include "crc.cuh"

namespace kvwire {

constexpr int STRIP_ELEMENTS = 4096;
constexpr int STRIP_BYTES_MAX = 4 * STRIP_ELEMENTS;
constexpr int PART_HEADER_BYTES = 16;
constexpr int OFFSETS_AT = 256;  // of a code: behind the digits of each distance
constexpr int TIERS_MAX = 4;
enum StripForm { TIERED = 0, EXACT = 1, CONSTANT = 2 };
constexpr int FORM_SHIFT = 14;

// Rows of kernels/code_plan.py.
struct ChunkRow {
    int64_t raw_offset, raw_bytes, out_offset, first_part, part_count;
};
struct PartRow {
    int64_t raw_bytes, table_index, position, first_strip, strip_count, inside_at, inside_bytes,
        code_at, dtype, tier_bits, bases_at, period;
};
struct StripRow {
    int64_t raw_offset, count, bases_at, code_at, chunk, item_bytes, form, body_at, tail_at,
        tail_bytes;
};

// The cut of an element: exponent bits above verbatim ones, once rotated left by a bit.
struct Cut {
    int item_bytes, exponent_bits, verbatim_bits;
};

KVWIRE_DEVICE Cut cut_of(int64_t dtype) {
    switch (dtype) {
        case 1: return {4, 8, 24};
        case 2: return {2, 5, 11};
        case 3: return {2, 8, 8};
        case 4: return {1, 4, 4};
        case 5: return {1, 5, 3};
        default: return {1, 0, 8};  // opaque
    }
}

KVWIRE_DEVICE uint32_t load_item(const uint8_t* raw, int i, int item_bytes) {
    if (item_bytes == 4) return reinterpret_cast<const uint32_t*>(raw)[i];
    return item_bytes == 2 ? reinterpret_cast<const uint16_t*>(raw)[i] : raw[i];
}

KVWIRE_DEVICE void store_item(uint8_t* raw, int i, int item_bytes, uint32_t item) {
    if (item_bytes == 4)
        reinterpret_cast<uint32_t*>(raw)[i] = item;
    else if (item_bytes == 2)
        reinterpret_cast<uint16_t*>(raw)[i] = uint16_t(item);
    else
        raw[i] = uint8_t(item);
}

KVWIRE_DEVICE uint32_t rotated(uint32_t item, int bits) {
    return (item << 1 | item >> (bits - 1)) & uint32_t((uint64_t{1} << bits) - 1);
}

KVWIRE_DEVICE int tier_width(int64_t tier_bits, int tier) {
    return int(tier_bits >> 4 * tier & 15);
}

struct StripMemory {  // shared
    alignas(16) uint8_t raw[STRIP_BYTES_MAX];
    alignas(16) uint8_t coded[STRIP_BYTES_MAX + 64];
    uint8_t distances[2][STRIP_ELEMENTS];
    uint32_t lanes[THREADS];
};

struct Coded {
    int form, body_bytes, tail_bytes;
};

// Codes the `count` elements in memory.raw: body, then tail, to memory.coded, where the form is
// TIERED. Ends with a sync().
template <class Cta>
KVWIRE_DEVICE Coded encode_strip(Cta& cta, const Cut& cut, int64_t tier_bits, const uint8_t* code,
                                 const uint8_t* bases, int count, StripMemory& memory) {
    const uint8_t* const raw = memory.raw;
    const int width = cut.item_bytes, bytes = count * width;
    const Coded exact = {EXACT, bytes, 0};
    if (!cta.any(bytes - width, [&](int i) { return raw[i] != raw[i + width]; }))
        return {CONSTANT, 0, width};
    const int whole = cut.verbatim_bits / 8, rest = cut.verbatim_bits % 8;
    int at = count * whole + rest * plane_bytes(count);
    const int body_bytes = at + tier_width(tier_bits, 0) * plane_bytes(count);
    if (tier_bits == 0 || body_bytes >= bytes) return exact;
    cta.spread(count, [&](int i) {
        const uint32_t item = rotated(load_item(raw, i, width), 8 * width);
        for (int byte = 0; byte < whole; ++byte)
            memory.coded[i * whole + byte] = uint8_t(item >> 8 * byte);
        memory.distances[0][i] = uint8_t((item >> cut.verbatim_bits) - bases[i]) &
                                 uint8_t((1 << cut.exponent_bits) - 1);
    });
    cta.planes(count, rest, [&](int i) {
        return rotated(load_item(raw, i, width), 8 * width) >> 8 * whole;
    }, memory.coded + count * whole);
    cta.sync();
    int left = count, shift = 0;
    for (int tier = 0; tier < TIERS_MAX && tier_width(tier_bits, tier) > 0; ++tier) {
        const int bits = tier_width(tier_bits, tier), last = (1 << bits) - 1;
        const uint8_t* const from = memory.distances[tier % 2];
        uint8_t* const to = memory.distances[1 - tier % 2];
        if (at + bits * plane_bytes(left) >= bytes) return exact;
        const auto digit = [&](int i) { return code[from[i]] >> shift & last; };
        cta.planes(left, bits, digit, memory.coded + at);
        at += bits * plane_bytes(left);
        left = cta.compact(left, [&](int i) { return digit(i) == last; },
                           [&](int i, int rank) { to[rank] = from[i]; });
        shift += bits;
        if (tier + 1 == TIERS_MAX || tier_width(tier_bits, tier + 1) == 0) {
            if (at + left >= bytes) return exact;
            cta.spread(left, [&](int i) { memory.coded[at + i] = to[i]; });
            cta.sync();
        }
    }
    return {TIERED, body_bytes, at + left - body_bytes};
}

KVWIRE_DEVICE void store_le32(uint8_t* out, uint32_t value) {
    for (int byte = 0; byte < 4; ++byte) out[byte] = uint8_t(value >> 8 * byte);
}

KVWIRE_DEVICE int64_t padded(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// What a chunk is coded into: `slot`, of its raw bytes; tails wait in `tails`, of as many.
struct Slot {
    uint8_t* out;
    uint8_t* tails;
    int64_t bytes;
    bool fits;  // the code is shorter so far

    KVWIRE_DEVICE bool room(int64_t end) {
        if (end >= bytes) fits = false;
        return fits;
    }
};

// Codes a part from `at` of the slot on; returns where it ends.
template <class Cta>
KVWIRE_DEVICE int64_t encode_part(Cta& cta, const Segment& segment, int64_t raw_offset,
                                  int64_t chunk_stop, const PartRow& part, const uint8_t* blob,
                                  const CrcTables* crc_tables, uint32_t* crc, int64_t at,
                                  Slot& slot, StripMemory& memory) {
    const Cut cut = cut_of(part.dtype);
    const int64_t index_at = at + PART_HEADER_BYTES + part.inside_bytes;
    int64_t body_at = index_at + padded(2 * part.strip_count), tail_bytes = 0;
    if (slot.room(body_at)) {
        cta.spread(int(part.inside_bytes), [&](int i) {
            slot.out[at + PART_HEADER_BYTES + i] = blob[part.inside_at + i];
        });
        cta.spread(int(body_at - index_at), [&](int i) { slot.out[index_at + i] = 0; });
    }
    const int64_t elements = part.raw_bytes / cut.item_bytes;
    for (int64_t first = 0; first < elements; first += STRIP_ELEMENTS) {
        const int count =
            int(elements - first < STRIP_ELEMENTS ? elements - first : STRIP_ELEMENTS);
        const int64_t start = raw_offset + first * cut.item_bytes;
        const int bytes = count * cut.item_bytes;
        cta.sync();
        move_range<true>(cta, segment, start, bytes, memory.raw);
        cta.sync();
        if (crc_tables)
            *crc ^= crc_remainder(cta, *crc_tables, memory.raw, bytes,
                                  chunk_stop - start - bytes, memory.lanes);
        if (!slot.fits) continue;
        const uint8_t* const bases =
            blob + part.bases_at + (part.position + first) % part.period;
        const Coded coded = encode_strip(cta, cut, part.tier_bits, blob + part.code_at, bases,
                                         count, memory);
        if (!slot.room(body_at + coded.body_bytes + tail_bytes + coded.tail_bytes)) continue;
        const uint8_t* const from = coded.form == TIERED ? memory.coded : memory.raw;
        copy_bytes(cta, slot.out + body_at, from, coded.body_bytes);
        copy_bytes(cta, slot.tails + tail_bytes,
                   from + (coded.form == TIERED ? coded.body_bytes : 0), coded.tail_bytes);
        if (cta.leads()) {
            const int entry = coded.form << FORM_SHIFT | coded.tail_bytes;
            slot.out[index_at + first / STRIP_ELEMENTS * 2] = uint8_t(entry);
            slot.out[index_at + first / STRIP_ELEMENTS * 2 + 1] = uint8_t(entry >> 8);
        }
        body_at += coded.body_bytes;
        tail_bytes += coded.tail_bytes;
    }
    const int64_t used = body_at + tail_bytes - at, stop = at + padded(used);
    cta.sync();
    if (!slot.room(stop)) return stop;
    copy_bytes(cta, slot.out + body_at, slot.tails, tail_bytes);
    cta.spread(int(stop - at - used), [&](int i) { slot.out[at + used + i] = 0; });
    if (cta.leads()) {
        store_le32(slot.out + at, uint32_t(part.raw_bytes));
        store_le32(slot.out + at + 4, uint32_t(stop - at));
        store_le32(slot.out + at + 8, uint32_t(part.table_index));
        store_le32(slot.out + at + 12, uint32_t(part.position));
    }
    cta.sync();
    return stop;
}

// A chunk without parts: its bytes to `out` as they are, each read once. Begins with a sync().
template <class Cta>
KVWIRE_DEVICE uint32_t copy_raw(Cta& cta, const Segment& segment, const ChunkRow& chunk,
                                const CrcTables* crc_tables, uint8_t* out, StripMemory& memory) {
    uint32_t remainder = 0;
    for (int64_t done = 0; done < chunk.raw_bytes; done += STRIP_BYTES_MAX) {
        const int64_t left = chunk.raw_bytes - done;
        const int bytes = int(left < STRIP_BYTES_MAX ? left : STRIP_BYTES_MAX);
        cta.sync();
        move_range<true>(cta, segment, chunk.raw_offset + done, bytes, memory.raw);
        cta.sync();
        if (crc_tables)
            remainder ^= crc_remainder(cta, *crc_tables, memory.raw, bytes, left - bytes,
                                       memory.lanes);
        copy_bytes(cta, out + done, memory.raw, bytes);
    }
    return remainder;
}

// Codes one chunk into its slot: raw where the code does not make it shorter, or where it has no
// parts. `*coded_bytes`: what lies there. With `crc_tables` the sum of the raw bytes' remainders is
// added to `*crc`.
template <class Cta>
KVWIRE_DEVICE void encode_chunk(Cta& cta, const Segment& segment, const ChunkRow& chunk,
                                const PartRow* parts, const uint8_t* blob,
                                const CrcTables* crc_tables, uint8_t* out, uint8_t* tails,
                                int64_t* coded_bytes, uint32_t* crc, StripMemory& memory) {
    Slot slot = {out + chunk.out_offset, tails + chunk.out_offset, chunk.raw_bytes, true};
    int64_t raw_offset = chunk.raw_offset, at = 0;
    const int64_t stop = chunk.raw_offset + chunk.raw_bytes;
    uint32_t remainder = 0;
    if (chunk.part_count == 0) {
        remainder = copy_raw(cta, segment, chunk, crc_tables, slot.out, memory);
        at = chunk.raw_bytes;
    }
    for (int64_t number = 0; number < chunk.part_count; ++number) {
        const PartRow& part = parts[chunk.first_part + number];
        at = encode_part(cta, segment, raw_offset, stop, part, blob, crc_tables, &remainder, at,
                         slot, memory);
        raw_offset += part.raw_bytes;
    }
    if (!slot.fits) {
        cta.sync();
        for (int64_t done = 0; done < chunk.raw_bytes; done += STRIP_BYTES_MAX) {
            const int64_t left = chunk.raw_bytes - done;
            move_range<true>(cta, segment, chunk.raw_offset + done,
                             int(left < STRIP_BYTES_MAX ? left : STRIP_BYTES_MAX),
                             slot.out + done);
        }
    }
    if (cta.leads()) {
        *coded_bytes = slot.fits ? at : chunk.raw_bytes;
        if (crc_tables) add_bits(crc, remainder);
    }
}

// ---- decoding

struct ReadMemory {  // shared
    alignas(16) uint8_t raw[STRIP_BYTES_MAX];
    uint16_t elements[2][STRIP_ELEMENTS];
    uint8_t distances[STRIP_ELEMENTS];
    uint32_t lanes[THREADS];
};

KVWIRE_DEVICE uint32_t bit_of(const uint8_t* plane, int i) { return plane[i / 8] >> i % 8 & 1; }

KVWIRE_DEVICE bool unused_bits(const uint8_t* planes, int count, int width) {
    bool found = false;
    for (int bit = 0; bit < width && count % 8 != 0; ++bit)
        found |= planes[bit * plane_bytes(count) + count / 8] >> count % 8 != 0;
    return found;
}

// Distances of a strip of form TIERED to memory.distances. False: its planes break a rule.
template <class Cta>
KVWIRE_DEVICE bool read_tiers(Cta& cta, const Cut& cut, int64_t tier_bits, const uint8_t* offsets,
                              const uint8_t* planes, const uint8_t* tail, int tail_bytes,
                              int count, ReadMemory& memory) {
    cta.spread(count, [&](int i) { memory.elements[0][i] = uint16_t(i); });
    cta.sync();
    int left = count, tail_at = 0;
    const uint16_t* element = memory.elements[0];
    for (int tier = 0; tier < TIERS_MAX && tier_width(tier_bits, tier) > 0; ++tier) {
        const int bits = tier_width(tier_bits, tier), last = (1 << bits) - 1;
        const int bytes = plane_bytes(left);
        if (tier > 0) {  // never beyond the tail
            planes = tail + tail_at;
            tail_at += bits * bytes;
            if (tail_at > tail_bytes) return false;
        }
        if (unused_bits(planes, left, bits)) return false;
        element = memory.elements[tier % 2];
        uint16_t* const next = memory.elements[1 - tier % 2];
        const auto digit = [&](int i) {
            int value = 0;
            for (int bit = 0; bit < bits; ++bit) value |= bit_of(planes + bit * bytes, i) << bit;
            return value;
        };
        cta.spread(left, [&](int i) {
            if (digit(i) != last) memory.distances[element[i]] = offsets[digit(i)];
        });
        left = cta.compact(left, [&](int i) { return digit(i) == last; },
                           [&](int i, int rank) { next[rank] = element[i]; });
        offsets += last;
        element = next;
    }
    if (tail_at + left != tail_bytes) return false;
    const uint8_t* const literals = tail + tail_at;
    if (cta.any(left, [&](int i) { return literals[i] >> cut.exponent_bits != 0; })) return false;
    cta.spread(left, [&](int i) { memory.distances[element[i]] = literals[i]; });
    cta.sync();
    return true;
}

// Decodes one strip to its place. Where its planes break a rule nothing is written, and
// `chunk_invalid` of its chunk is set. With `crc_tables`: adds the remainder of what it wrote,
// `chunk_stops` says where each chunk ends.
template <class Cta>
KVWIRE_DEVICE void decode_strip(Cta& cta, const uint8_t* coded, const StripRow& strip,
                                int64_t dtype, int64_t tier_bits, const uint8_t* blob,
                                const Segment& segment, const CrcTables* crc_tables,
                                const int64_t* chunk_stops, uint32_t* crcs,
                                int32_t* chunk_invalid, ReadMemory& memory) {
    const int count = int(strip.count), width = int(strip.item_bytes), bytes = count * width;
    const uint8_t* const body = coded + strip.body_at;
    const uint8_t* const tail = coded + strip.tail_at;
    if (strip.form == CONSTANT) {
        cta.spread(bytes, [&](int i) { memory.raw[i] = tail[i % width]; });
    } else if (strip.form == EXACT) {
        copy_bytes(cta, memory.raw, body, bytes);
    } else {
        const Cut cut = cut_of(dtype);
        const int whole = cut.verbatim_bits / 8, rest = cut.verbatim_bits % 8;
        const uint8_t* const planes = body + count * whole;
        if (unused_bits(planes, count, rest) ||
            !read_tiers(cta, cut, tier_bits, blob + strip.code_at + OFFSETS_AT,
                        planes + rest * plane_bytes(count), tail, int(strip.tail_bytes), count,
                        memory)) {
            if (cta.leads()) set_flag(chunk_invalid + strip.chunk);
            return;
        }
        const uint8_t* const bases = blob + strip.bases_at;
        cta.spread(count, [&](int i) {
            const uint32_t exponent =
                (memory.distances[i] + bases[i]) & ((1u << cut.exponent_bits) - 1);
            uint32_t item = exponent << cut.verbatim_bits;
            for (int byte = 0; byte < whole; ++byte)
                item |= uint32_t(body[i * whole + byte]) << 8 * byte;
            for (int bit = 0; bit < rest; ++bit)
                item |= bit_of(planes + bit * plane_bytes(count), i) << (8 * whole + bit);
            store_item(memory.raw, i, width, item >> 1 | (item & 1) << (8 * width - 1));
        });
    }
    cta.sync();
    if (crc_tables) {
        const uint32_t remainder =
            crc_remainder(cta, *crc_tables, memory.raw, bytes,
                          chunk_stops[strip.chunk] - strip.raw_offset - bytes, memory.lanes);
        if (cta.leads()) add_bits(crcs + strip.chunk, remainder);
    }
    move_range<false>(cta, segment, strip.raw_offset, bytes, memory.raw);
}

// Adds the remainder of the bytes [start, start + count) of a segment, `behind` before the chunk's
// end.
template <class Cta>
KVWIRE_DEVICE void crc_range(Cta& cta, const Segment& segment, const CrcTables& tables,
                             int64_t start, int count, int64_t behind, uint32_t* crc,
                             StripMemory& memory) {
    move_range<true>(cta, segment, start, count, memory.raw);
    const uint32_t remainder =
        crc_remainder(cta, tables, memory.raw, count, behind, memory.lanes);
    if (cta.leads()) add_bits(crc, remainder);
}

}  // namespace kvwire
