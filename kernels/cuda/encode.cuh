// FORMAT.md section 9.1, writing: a block codes a chunk strip by strip, sixteen elements a thread.
// Each source byte is read once; the next strip is on its way while one is coded.
#pragma once

#include "copy.cuh"
#include "crc.cuh"
#include "elements.cuh"

namespace kvwire {

constexpr int PART_HEADER_BYTES = 16;
constexpr int FORM_SHIFT = 14;

// Rows of kernels/code_plan.py.
struct ChunkRow {
    int64_t raw_offset, raw_bytes, out_offset, first_part, part_count;
};
struct PartRow {
    int64_t raw_bytes, table_index, position, first_strip, strip_count, inside_at, inside_bytes,
        code_at, dtype, tier_bits, bases_at, period;
};

struct EncodeMemory {  // shared
    alignas(16) uint8_t raw[2][STRIP_BYTES_MAX];
    alignas(16) uint8_t waiting[STRIP_ELEMENTS];  // distances of what goes on to the next tier
    uint32_t spread[TIERS_MAX][256];  // digits of a distance, bit p in byte p
    CrcMemory crc;
    int scan[WARPS], tail_bytes;
};

// The digits of all distances, tier by tier, from the code of a table. Needs a sync().
KVWIRE_DEVICE void spread_digits(DeviceCta& cta, const uint8_t* code, int64_t tier_bits,
                                 EncodeMemory& memory) {
    cta.spread(256, [&](int distance) {
        uint32_t digits = code[distance];
        for (int tier = 0; tier < TIERS_MAX; ++tier) {
            const int bits = tier_width(tier_bits, tier);
            memory.spread[tier][distance] =
                (digits & ((1u << bits) - 1)) * 0x00204081 & 0x01010101;
            digits >>= bits;
        }
    });
}

struct Coded {
    int form, body_bytes, tail_bytes;
};

// How far the tiers of a strip have been written.
struct TiersWritten {
    int tier, left;        // the next one, and how many elements came to it
    int first_bytes, all_bytes;  // of the first tier; of all so far
};

// Writes tiers while there are some and more than `most` elements are left: planes of the first to
// `planes`, all others to `tail`. A thread has its sixteen distances of the first tier in
// `distances`. False: it would take `bytes_max` or more. Ends with a sync().
template <class Group>
KVWIRE_DEVICE bool write_tiers(Group& group, int64_t tier_bits, uint32_t (&distances)[4], int most,
                               int bytes_max, uint8_t* planes, uint8_t* tail,
                               TiersWritten& written, EncodeMemory& memory) {
    int& left = written.left;
    for (int& tier = written.tier; tier < TIERS_MAX && left > most; ++tier) {
        const int bits = tier_width(tier_bits, tier), each = plane_bytes(left);
        if (bits == 0) break;
        if (tier > 0) planes = tail + (written.all_bytes - written.first_bytes);
        written.all_bytes += bits * each;
        if (written.all_bytes >= bytes_max) return false;
        if (tier == 0) written.first_bytes = written.all_bytes;
        const int here = own_part(left);
        uint32_t going = 0;
        if (here > 0) {
            if (tier > 0) load_quads(memory.waiting + EACH * threadIdx.x, distances);
            uint32_t halves[2] = {0, 0};
#pragma unroll
            for (int i = 0; i < EACH; ++i)
                halves[i / 8] += memory.spread[tier][distances[i / 4] >> 8 * (i % 4) & 255]
                                 << i % 8;
            going = (1u << here) - 1;
            halves[0] &= every_byte(going & 255);
            halves[1] &= every_byte(going >> 8);
#pragma unroll
            for (int bit = 0; bit < DIGIT_BITS_MAX; ++bit) {
                if (bit >= bits) break;
                const uint32_t plane =
                    __byte_perm(halves[0], halves[1], bit | (bit + 4) << 4) & 0xFFFF;
                store_bits(planes + bit * each + 2 * threadIdx.x, here, plane);
                going &= plane;
            }
        }
        uint8_t* next = memory.waiting + group.scan(__popc(going), &left);
        if (going != 0) {  // all have read what waited before
#pragma unroll
            for (int i = 0; i < EACH; ++i)
                if (going >> i & 1) *next++ = uint8_t(distances[i / 4] >> 8 * (i % 4));
        }
        group.sync();
    }
    return true;
}

// Writes what is left as literals. Returns the tail's bytes; -1: all together has `bytes_max` or
// more.
template <class Group>
KVWIRE_DEVICE int write_literals(Group& group, int bytes_max, uint8_t* tail,
                                 const TiersWritten& written, EncodeMemory& memory) {
    if (written.all_bytes + written.left >= bytes_max) return -1;
    const int at = written.all_bytes - written.first_bytes;
    group.spread(written.left, [&](int i) { tail[at + i] = memory.waiting[i]; });
    return at + written.left;
}

// Codes `count` distances: planes of the first tier to `planes`, all else to `tail`. Returns the
// tail's bytes; -1: both together have `bytes_max` or more. Includes sync()s, one behind the first
// tier. When one warp can do the rest, it does.
KVWIRE_DEVICE int write_distances(DeviceCta& cta, int64_t tier_bits, uint32_t (&distances)[4],
                                  int count, int bytes_max, uint8_t* planes, uint8_t* tail,
                                  EncodeMemory& memory) {
    TiersWritten written = {0, count, 0, 0};
    if (!write_tiers(cta, tier_bits, distances, WARP_ELEMENTS, bytes_max, planes, tail, written,
                     memory))
        return -1;
    if (written.left > WARP_ELEMENTS)
        return write_literals(cta, bytes_max, tail, written, memory);
    if (threadIdx.x < 32) {
        FirstWarp warp;
        const bool fits = write_tiers(warp, tier_bits, distances, -1, bytes_max, planes, tail,
                                      written, memory);
        const int tail_bytes = fits ? write_literals(warp, bytes_max, tail, written, memory) : -1;
        if (cta.leads()) memory.tail_bytes = tail_bytes;
    }
    cta.sync();
    return memory.tail_bytes;
}

// Codes the `count` elements in `raw`, body to `body` and tail to `tail`, but nothing that would
// take `room` bytes or more. Begins with nobody working on `memory`, includes sync()s.
template <int WIDTH>
KVWIRE_DEVICE Coded encode_strip(DeviceCta& cta, int rest_bits, int64_t tier_bits,
                                 const uint8_t* bases, const uint8_t* raw, int count, uint8_t* body,
                                 uint8_t* tail, int room, EncodeMemory& memory) {
    const int here = own_part(count), bytes = count * WIDTH, from = EACH * int(threadIdx.x);
    uint32_t words[4 * WIDTH];
    load_quads(raw + from * WIDTH, words);
    bool differs = false;
    if (here == EACH) {
        const uint32_t first = WIDTH == 1   ? every_byte(raw[0])
                               : WIDTH == 2 ? (raw[0] | raw[1] << 8) * 0x00010001u
                                            : *reinterpret_cast<const uint32_t*>(raw);
        uint32_t bits = 0;
#pragma unroll
        for (int i = 0; i < 4 * WIDTH; ++i) bits |= words[i] ^ first;
        differs = bits != 0;
    } else {
        for (int i = 0; i < here * WIDTH; ++i)
            differs |= raw[from * WIDTH + i] != raw[i % WIDTH];
    }
    if (!cta.any(differs)) {
        if (WIDTH < room) cta.spread(WIDTH, [&](int i) { tail[i] = raw[i]; });
        return {CONSTANT, 0, WIDTH};
    }
    constexpr int WHOLE = WIDTH == 1 ? 0 : WIDTH - 1;
    const int verbatim_bytes = count * WHOLE + rest_bits * plane_bytes(count);
    const int body_bytes = verbatim_bytes + tier_width(tier_bits, 0) * plane_bytes(count);
    int tail_bytes = -1;
    if (tier_bits != 0 && body_bytes < bytes) {
        if (body_bytes >= room) return {TIERED, body_bytes, 0};
        uint32_t top[4], whole[WHOLE_WORDS<WIDTH>], base[4] = {0, 0, 0, 0};
        split<WIDTH>(words, top, whole);
        if (here > 0) {
            if constexpr (WIDTH > 1) store_words(body + from * WHOLE, here * WHOLE, whole);
            for (int bit = 0; bit < rest_bits; ++bit)
                store_bits(body + count * WHOLE + bit * plane_bytes(count) + from / 8, here,
                           bits_of_bytes(top, bit) & ((1u << here) - 1));
            load_bases(bases + from, base);
        }
        const uint32_t mask = every_byte(0xFF >> rest_bits);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            top[i] = bytes_minus(top[i] >> rest_bits & mask, base[i]) & mask;
        tail_bytes = write_distances(cta, tier_bits, top, count, bytes - verbatim_bytes,
                                     body + verbatim_bytes, tail, memory);
    }
    if (tail_bytes >= 0) return {TIERED, body_bytes, tail_bytes};
    if (bytes < room) copy_bytes(body, raw, bytes);
    return {EXACT, bytes, 0};
}

KVWIRE_DEVICE void store_le32(uint8_t* out, uint32_t value) {
    for (int byte = 0; byte < 4; ++byte) out[byte] = uint8_t(value >> 8 * byte);
}

KVWIRE_DEVICE int padded(int bytes) { return (bytes + 15) / 16 * 16; }

// What a chunk is coded into: `out`, of its raw bytes; tails wait in `tails`, of as many.
struct Slot {
    uint8_t* out;
    uint8_t* tails;
    int bytes;
    bool fits;  // the code is shorter so far

    KVWIRE_DEVICE bool room(int end) {
        if (end >= bytes) fits = false;
        return fits;
    }
};

// Codes a part from `at` of the slot on; returns where it ends. Begins with nobody working on
// `memory`, and leaves it so.
template <int WIDTH>
KVWIRE_DEVICE int encode_part(DeviceCta& cta, const Segment& segment, int64_t raw_offset,
                              const PartRow& part, const uint8_t* blob, RunningCrc& crc, int at,
                              Slot& slot, EncodeMemory& memory) {
    const int rest_bits = rest_bits_of(part.dtype);
    const int index_at = at + PART_HEADER_BYTES + int(part.inside_bytes);
    int body_at = index_at + padded(2 * int(part.strip_count)), tail_bytes = 0;
    if (slot.room(body_at)) {
        cta.spread(int(part.inside_bytes), [&](int i) {
            slot.out[at + PART_HEADER_BYTES + i] = blob[part.inside_at + i];
        });
        cta.spread(body_at - index_at, [&](int i) { slot.out[index_at + i] = 0; });
    }
    const int elements = int(part.raw_bytes) / WIDTH;
    const auto count_at = [&](int first) {
        return elements - first < STRIP_ELEMENTS ? elements - first : STRIP_ELEMENTS;
    };
    // Not beyond kernels/code_plan.py's PERIOD_MAX.
    const uint32_t period = uint32_t(part.period), step = STRIP_ELEMENTS % period;
    uint32_t base = uint32_t(part.position) % period;
    if (part.tier_bits != 0) spread_digits(cta, blob + part.code_at, part.tier_bits, memory);
    move_range<READ>(segment, raw_offset, count_at(0) * WIDTH, memory.raw[0]);
    for (int strip = 0, first = 0; first < elements; ++strip, first += STRIP_ELEMENTS) {
        const int count = count_at(first);
        const uint8_t* const raw = memory.raw[strip % 2];
        end_read(cta);
        if (const int next = first + STRIP_ELEMENTS; next < elements)
            move_range<READ>(segment, raw_offset + next * WIDTH, count_at(next) * WIDTH,
                             memory.raw[1 - strip % 2]);
        crc.add(cta, raw, count * WIDTH);
        if (!slot.fits) continue;
        const Coded coded = encode_strip<WIDTH>(
            cta, rest_bits, part.tier_bits, blob + part.bases_at + base, raw, count,
            slot.out + body_at, slot.tails + tail_bytes, slot.bytes - body_at - tail_bytes,
            memory);
        if (!slot.room(body_at + coded.body_bytes + tail_bytes + coded.tail_bytes)) continue;
        if (cta.leads()) {
            const int entry = coded.form << FORM_SHIFT | coded.tail_bytes;
            slot.out[index_at + 2 * strip] = uint8_t(entry);
            slot.out[index_at + 2 * strip + 1] = uint8_t(entry >> 8);
        }
        body_at += coded.body_bytes;
        tail_bytes += coded.tail_bytes;
        base += step;
        if (base >= period) base -= period;
    }
    const int used = body_at + tail_bytes - at, stop = at + padded(used);
    cta.sync();
    if (!slot.room(stop)) return stop;
    copy_bytes(slot.out + body_at, slot.tails, tail_bytes);
    cta.spread(stop - at - used, [&](int i) { slot.out[at + used + i] = 0; });
    if (cta.leads()) {
        store_le32(slot.out + at, uint32_t(part.raw_bytes));
        store_le32(slot.out + at + 4, uint32_t(stop - at));
        store_le32(slot.out + at + 8, uint32_t(part.table_index));
        store_le32(slot.out + at + 12, uint32_t(part.position));
    }
    return stop;
}

// Bytes [offset, offset + count) of a segment to `crc`, and, where `out` is not null, to `out`.
KVWIRE_DEVICE void read_through(DeviceCta& cta, const Segment& segment, int64_t offset,
                                int count, RunningCrc& crc, uint8_t* out,
                                EncodeMemory& memory) {
    const auto bytes_at = [&](int done) {
        return count - done < STRIP_BYTES_MAX ? count - done : STRIP_BYTES_MAX;
    };
    cta.sync();
    move_range<READ>(segment, offset, bytes_at(0), memory.raw[0]);
    for (int turn = 0, done = 0; done < count; ++turn, done += STRIP_BYTES_MAX) {
        end_read(cta);
        if (const int next = done + STRIP_BYTES_MAX; next < count)
            move_range<READ>(segment, offset + next, bytes_at(next), memory.raw[1 - turn % 2]);
        crc.add(cta, memory.raw[turn % 2], bytes_at(done));
        if (out) copy_bytes(out + done, memory.raw[turn % 2], bytes_at(done));
    }
}

// Codes one chunk into its slot: raw where the code does not make it shorter, or where it has no
// parts. `*coded_bytes`: what lies there. Adds the remainder of the raw bytes to `*crc_sum`. Ends
// with a sync().
KVWIRE_DEVICE void encode_chunk(DeviceCta& cta, const Segment& segment, const ChunkRow& chunk,
                                const PartRow* parts, const uint8_t* blob, RunningCrc& crc,
                                uint8_t* out, uint8_t* tails, int64_t* coded_bytes,
                                uint32_t* crc_sum, EncodeMemory& memory) {
    Slot slot = {out + chunk.out_offset, tails + chunk.out_offset, int(chunk.raw_bytes), true};
    int64_t raw_offset = chunk.raw_offset;
    int at = 0;
    if (chunk.part_count == 0) {
        read_through(cta, segment, raw_offset, slot.bytes, crc, slot.out, memory);
        at = slot.bytes;
    }
    for (int64_t number = 0; number < chunk.part_count; ++number) {
        const PartRow& part = parts[chunk.first_part + number];
        const auto encode = [&](auto width) {
            return encode_part<decltype(width)::value>(cta, segment, raw_offset, part, blob, crc,
                                                       at, slot, memory);
        };
        const int width = item_bytes_of(part.dtype);
        at = width == 2 ? encode(Width<2>{}) : width == 4 ? encode(Width<4>{}) : encode(Width<1>{});
        raw_offset += part.raw_bytes;
    }
    crc.flush(cta, 0, crc_sum);
    if (!slot.fits) {
        RunningCrc nothing(nullptr, memory.crc);
        read_through(cta, segment, chunk.raw_offset, slot.bytes, nothing, slot.out, memory);
    }
    if (cta.leads()) *coded_bytes = slot.fits ? at : slot.bytes;
    cta.sync();
}

}  // namespace kvwire
