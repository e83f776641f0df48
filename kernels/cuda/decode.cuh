// FORMAT.md section 9.1, reading: a block decodes strips one after another, sixteen elements a
// thread, and brings each to its pages.
#pragma once

#include "copy.cuh"
#include "crc.cuh"
#include "elements.cuh"

namespace kvwire {

// A row of kernels/code_plan.py.
struct StripRow {
    int64_t raw_offset, count, bases_at, code_at, chunk, item_bytes, form, body_at, tail_at,
        tail_bytes;
};

struct DecodeMemory {  // shared
    alignas(16) uint8_t raw[STRIP_BYTES_MAX];
    alignas(16) uint8_t distances[STRIP_ELEMENTS];
    // Elements that go on to the next tier, in turns.
    alignas(16) uint16_t waiting[2][STRIP_ELEMENTS];
    CrcMemory crc;
    int scan[WARPS];
};

KVWIRE_DEVICE bool unused_bits(const uint8_t* planes, int count, int width) {
    bool found = false;
#pragma unroll 1
    for (int bit = 0; bit < width && count % 8 != 0; ++bit)
        found |= planes[bit * plane_bytes(count) + count / 8] >> count % 8 != 0;
    return found;
}

// The offsets of a table's ranks, from the next tier's on.
struct Offsets {
    uint64_t low, high;

    KVWIRE_DEVICE explicit Offsets(const uint8_t* at) {
        const Word16 all = *reinterpret_cast<const Word16*>(at);
        low = all.low;
        high = all.high;
    }
    KVWIRE_DEVICE void skip(int count) {  // 1, 3, 7 or 15
        const int bits = 8 * (count % 8);
        if (count > 8) {
            low = high;
            high = 0;
        }
        low = low >> bits | high << (64 - bits);
        high >>= bits;
    }
};

// Offsets of sixteen digits, four planes, in the elements' order; of a tier's last digit anything.
KVWIRE_DEVICE void look_up(const uint32_t (&planes)[DIGIT_BITS_MAX], int bits,
                           const Offsets& offsets, uint32_t (&found)[4]) {
    const uint32_t low = planes[0] | planes[1] << 16, high = planes[2] | planes[3] << 16;
    uint32_t column[4];  // elements i, i + 4, i + 8, i + 12
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t a = low >> i & 0x11111111, b = high >> i & 0x11111111;
        const uint32_t digits = ((a | a >> 15) & 0x3333) | ((b << 2 | b >> 13) & 0xCCCC);
        column[i] = __byte_perm(uint32_t(offsets.low), uint32_t(offsets.low >> 32),
                                digits & 0x7777);
        if (bits > 3) {
            const uint32_t upper = __byte_perm(uint32_t(offsets.high),
                                               uint32_t(offsets.high >> 32), digits & 0x7777);
            const uint32_t is_upper = __byte_perm(0xFF00, 0, digits >> 3 & 0x1111);
            column[i] = chosen(is_upper, upper, column[i]);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int order = half == 0 ? 0x5140 : 0x7362;
        const uint32_t a = __byte_perm(column[0], column[1], order);
        const uint32_t b = __byte_perm(column[2], column[3], order);
        found[2 * half] = __byte_perm(a, b, 0x5410);
        found[2 * half + 1] = __byte_perm(a, b, 0x7632);
    }
}

// What is left of a strip's tiers to read.
struct Tiers {
    int64_t tier_bits;  // from the next tier on; 0: only literals are left
    Offsets offsets;
    int left, tail_at;
    uint16_t *come, *go;  // elements that came to the next tier; room for those that go on

    KVWIRE_DEVICE int bits() const { return tier_width(tier_bits, 0); }
};

// Reads the next tier, which lies at `planes`: offsets of elements that end here to
// memory.distances. Ends with a sync().
template <bool IS_FIRST, class Group>
KVWIRE_DEVICE void read_tier(Group& group, const uint8_t* planes, Tiers& tiers,
                             DecodeMemory& memory) {
    const int bits = tiers.bits(), each = plane_bytes(tiers.left);
    const int here = own_part(tiers.left), from = EACH * int(threadIdx.x);
    uint32_t going = (1u << here) - 1, came[EACH / 2] = {};
    const auto element = [&](int i) {
        return IS_FIRST ? uint32_t(from + i) : came[i / 2] >> 16 * (i % 2) & 0xFFFF;
    };
    if (here > 0) {
        if constexpr (!IS_FIRST) load_quads(tiers.come + from, came);
        uint32_t digit[DIGIT_BITS_MAX] = {0, 0, 0, 0}, found[4], ending = going;
#pragma unroll
        for (int bit = 0; bit < DIGIT_BITS_MAX; ++bit) {
            if (bit >= bits) break;
            digit[bit] = load_bits(planes + bit * each + from / 8, here);
        }
#pragma unroll
        for (int bit = 0; bit < DIGIT_BITS_MAX; ++bit)  // not above: loads would wait in turn
            if (bit < bits) going &= digit[bit];
        ending &= ~going;
        look_up(digit, bits, tiers.offsets, found);
        if constexpr (IS_FIRST) {
            store_quads(memory.distances + from, found);
        } else {
#pragma unroll
            for (int i = 0; i < EACH; ++i)
                if (ending >> i & 1)
                    memory.distances[element(i)] = uint8_t(found[i / 4] >> 8 * (i % 4));
        }
    }
    uint16_t* next = tiers.go + group.scan(__popc(going), &tiers.left);
    if (going != 0) {
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (going >> i & 1) *next++ = uint16_t(element(i));
    }
    group.sync();
    uint16_t* const done = tiers.come;
    tiers.come = tiers.go;
    tiers.go = done;
    tiers.offsets.skip((1 << bits) - 1);
    tiers.tier_bits >>= 4;
}

// Reads tiers from a tail while more than `most` elements are left. False: they break a rule.
template <class Group>
KVWIRE_DEVICE bool read_on(Group& group, const uint8_t* tail, int tail_bytes, int most,
                           Tiers& tiers, DecodeMemory& memory) {
    while (tiers.bits() > 0 && tiers.left > most) {
        const uint8_t* const planes = tail + tiers.tail_at;
        tiers.tail_at += tiers.bits() * plane_bytes(tiers.left);
        if (tiers.tail_at > tail_bytes || unused_bits(planes, tiers.left, tiers.bits()))
            return false;
        read_tier<false>(group, planes, tiers, memory);
    }
    return true;
}

// Reads literals to memory.distances. False, in any thread: they break a rule.
template <class Group>
KVWIRE_DEVICE bool read_literals(Group& group, int rest_bits, const uint8_t* tail, int tail_bytes,
                                 const Tiers& tiers, DecodeMemory& memory) {
    if (tiers.tail_at + tiers.left != tail_bytes) return false;
    bool is_right = true;
    group.spread(tiers.left, [&](int i) {
        const uint8_t literal = tail[tiers.tail_at + i];
        is_right &= literal >> (8 - rest_bits) == 0;
        memory.distances[tiers.come[i]] = literal;
    });
    return is_right;
}

// Distances of a strip of form TIERED to memory.distances. False: its planes break a rule.
// Includes sync()s, the last one behind all that it writes. When one warp can do the rest, it does.
KVWIRE_DEVICE bool read_tiers(DeviceCta& cta, int rest_bits, int64_t tier_bits,
                              const Offsets& offsets, const uint8_t* planes, const uint8_t* tail,
                              int tail_bytes, int count, DecodeMemory& memory) {
    if (unused_bits(planes, count, tier_width(tier_bits, 0))) return false;
    Tiers tiers = {tier_bits, offsets, count, 0, memory.waiting[0], memory.waiting[1]};
    read_tier<true>(cta, planes, tiers, memory);
    bool is_right = read_on(cta, tail, tail_bytes, WARP_ELEMENTS, tiers, memory);
    if (is_right && tiers.left > WARP_ELEMENTS) {
        is_right = read_literals(cta, rest_bits, tail, tail_bytes, tiers, memory);
    } else if (is_right && threadIdx.x < 32) {
        FirstWarp warp;
        is_right = read_on(warp, tail, tail_bytes, -1, tiers, memory) &&
                   read_literals(warp, rest_bits, tail, tail_bytes, tiers, memory);
    }
    return !cta.any(!is_right);
}

// Decodes one strip of form TIERED to memory.raw. False: its planes break a rule.
template <int WIDTH>
KVWIRE_DEVICE bool decode_tiered(DeviceCta& cta, const uint8_t* coded, const StripRow& strip,
                                 int rest_bits, int64_t tier_bits, const uint8_t* blob,
                                 DecodeMemory& memory) {
    constexpr int WHOLE = WIDTH == 1 ? 0 : WIDTH - 1;
    const int count = int(strip.count), here = own_part(count), from = EACH * int(threadIdx.x);
    const uint8_t* const body = coded + strip.body_at;
    const uint8_t* const planes = body + count * WHOLE;
    if (unused_bits(planes, count, rest_bits)) return false;
    uint32_t whole[WHOLE_WORDS<WIDTH>], base[4], top[4], raw[4 * WIDTH];
    if constexpr (WIDTH == 2)
        if (here > 0) load_words(body + from * WHOLE, here * WHOLE, whole);
    if (!read_tiers(cta, rest_bits, tier_bits, Offsets(blob + strip.code_at + OFFSETS_AT),
                    planes + rest_bits * plane_bytes(count), coded + strip.tail_at,
                    int(strip.tail_bytes), count, memory))
        return false;
    if (here > 0) {
        // Twelve words are too many to be kept meanwhile.
        if constexpr (WIDTH == 4) load_words(body + from * WHOLE, here * WHOLE, whole);
        load_bases(blob + strip.bases_at + from, base);
        load_quads(memory.distances + from, top);
        const uint32_t mask = every_byte(0xFF >> rest_bits);
#pragma unroll
        for (int i = 0; i < 4; ++i) top[i] = (bytes_plus(top[i], base[i]) & mask) << rest_bits;
        for (int bit = 0; bit < rest_bits; ++bit)
            bits_to_bytes(load_bits(planes + bit * plane_bytes(count) + from / 8, here), bit, top);
        join<WIDTH>(top, whole, raw);
        store_quads(memory.raw + from * WIDTH, raw);
    }
    return true;
}

// Decodes one strip to memory.raw. False: its planes break a rule. Ends with a sync().
template <int WIDTH>
KVWIRE_DEVICE bool decode_strip(DeviceCta& cta, const uint8_t* coded, const StripRow& strip,
                                int64_t dtype, int64_t tier_bits, const uint8_t* blob,
                                DecodeMemory& memory) {
    const int width = int(strip.item_bytes), bytes = int(strip.count) * width;
    bool is_right = true;
    if (strip.form == CONSTANT) {
        const uint8_t* const item = coded + strip.tail_at;
        cta.spread(bytes, [&](int i) { memory.raw[i] = item[i % width]; });
    } else if (strip.form == EXACT) {
        copy_bytes(memory.raw, coded + strip.body_at, bytes);
    } else {
        is_right = decode_tiered<WIDTH>(cta, coded, strip, rest_bits_of(dtype), tier_bits, blob,
                                        memory);
    }
    cta.sync();
    return is_right;
}

// Decodes strips numbers[0] to numbers[count - 1] to their places. Where the planes of one break a
// rule nothing of it is written, and `chunk_invalid` of its chunk is set. Adds the remainders of
// what was written to the sums in `crcs`; `chunk_stops` says where each chunk ends. WIDTH: item
// bytes of the format; opaque strips may have others.
template <int WIDTH>
KVWIRE_DEVICE void decode_strips(DeviceCta& cta, const uint8_t* coded, const StripRow* strips,
                                 const int64_t* numbers, int count, int64_t dtype,
                                 int64_t tier_bits, const uint8_t* blob, const Segment& segment,
                                 RunningCrc& crc, const int64_t* chunk_stops, uint32_t* crcs,
                                 int32_t* chunk_invalid, DecodeMemory& memory) {
    int chunk = -1;  // of what `crc` has
    int64_t end = 0;
    for (int n = 0; n < count; ++n) {
        const StripRow& strip = strips[numbers[n]];
        if (chunk >= 0 && (strip.chunk != chunk || strip.raw_offset != end)) {
            crc.flush(cta, chunk_stops[chunk] - end, crcs + chunk);
            chunk = -1;
        }
        cta.sync();
        if (!decode_strip<WIDTH>(cta, coded, strip, dtype, tier_bits, blob, memory)) {
            if (cta.leads()) set_flag(chunk_invalid + strip.chunk);
            continue;
        }
        const int bytes = int(strip.count) * int(strip.item_bytes);
        crc.add(cta, memory.raw, bytes);
        move_range<WRITE>(segment, strip.raw_offset, bytes, memory.raw);
        chunk = int(strip.chunk);
        end = strip.raw_offset + bytes;
    }
    if (chunk >= 0) crc.flush(cta, chunk_stops[chunk] - end, crcs + chunk);
}

}  // namespace kvwire
