// FORMAT.md section 9.1, sixteen elements to a thread: in registers, four bytes at a time.
#pragma once

#include "cta.cuh"

namespace kvwire {

constexpr int EACH = 16;
constexpr int STRIP_ELEMENTS = EACH * THREADS;
constexpr int WARP_ELEMENTS = EACH * 32;  // so many are no work for a block
constexpr int STRIP_BYTES_MAX = 4 * STRIP_ELEMENTS;
constexpr int TIERS_MAX = 4;
constexpr int DIGIT_BITS_MAX = 4;
constexpr int OFFSETS_AT = 256;  // of a code: behind the digits of each distance
template <int BYTES>
struct Width {
    static constexpr int value = BYTES;
};
enum StripForm { TIERED = 0, EXACT = 1, CONSTANT = 2 };

// Rotated left by a bit, an element is, from the top: its exponent, rest_bits, and whole bytes.
// Exponent and rest_bits share a byte.
KVWIRE_DEVICE int rest_bits_of(int64_t dtype) {
    return dtype == 4 ? 4 : dtype == 2 || dtype == 5 ? 3 : 0;
}
KVWIRE_DEVICE int item_bytes_of(int64_t dtype) {
    return dtype == 1 ? 4 : dtype == 2 || dtype == 3 ? 2 : 1;
}

KVWIRE_DEVICE int tier_width(int64_t tier_bits, int tier) {
    return int(tier_bits >> 4 * tier & 15);
}

KVWIRE_DEVICE int plane_bytes(int count) { return (count + 7) / 8; }

// How many of `count` elements are this thread's: those from EACH * threadIdx.x on.
KVWIRE_DEVICE int own_part(int count) {
    const int left = count - EACH * int(threadIdx.x);
    return left < 0 ? 0 : left < EACH ? left : EACH;
}

KVWIRE_DEVICE uint32_t every_byte(uint32_t byte) { return byte * 0x01010101; }

// Byte by byte, modulo 256.
KVWIRE_DEVICE uint32_t bytes_minus(uint32_t a, uint32_t b) {
    return ((a | 0x80808080) - (b & 0x7F7F7F7F)) ^ ((a ^ ~b) & 0x80808080);
}
KVWIRE_DEVICE uint32_t bytes_plus(uint32_t a, uint32_t b) {
    return ((a & 0x7F7F7F7F) + (b & 0x7F7F7F7F)) ^ ((a ^ b) & 0x80808080);
}

// The bits of `a` where `mask` has them, else those of `b`.
KVWIRE_DEVICE uint32_t chosen(uint32_t mask, uint32_t a, uint32_t b) {
    return (a & mask) | (b & ~mask);
}

struct alignas(16) Quad {
    uint32_t word[4];
};

// COUNT words at a multiple of 16.
template <int COUNT>
KVWIRE_DEVICE void load_quads(const void* from, uint32_t (&words)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT / 4; ++i) {
        const Quad quad = static_cast<const Quad*>(from)[i];
#pragma unroll
        for (int j = 0; j < 4; ++j) words[4 * i + j] = quad.word[j];
    }
}
template <int COUNT>
KVWIRE_DEVICE void store_quads(void* to, const uint32_t (&words)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT / 4; ++i)
        static_cast<Quad*>(to)[i] = {{words[4 * i], words[4 * i + 1], words[4 * i + 2],
                                      words[4 * i + 3]}};
}

// The first `bytes` bytes of COUNT words, anywhere; what is behind them is 0, or stays.
template <int COUNT>
KVWIRE_DEVICE void load_words(const uint8_t* from, int bytes, uint32_t (&words)[COUNT]) {
    if (bytes == 4 * COUNT && uintptr_t(from) % 16 == 0) return load_quads(from, words);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        words[i] = 0;
#pragma unroll
        for (int byte = 0; byte < 4; ++byte)
            if (4 * i + byte < bytes) words[i] |= uint32_t(from[4 * i + byte]) << 8 * byte;
    }
}
template <int COUNT>
KVWIRE_DEVICE void store_words(uint8_t* to, int bytes, const uint32_t (&words)[COUNT]) {
    if (bytes == 4 * COUNT && uintptr_t(to) % 16 == 0) return store_quads(to, words);
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
#pragma unroll
        for (int byte = 0; byte < 4; ++byte)
            if (4 * i + byte < bytes) to[4 * i + byte] = uint8_t(words[i] >> 8 * byte);
}

// Sixteen bytes at any address, from aligned words around them.
KVWIRE_DEVICE void load_bases(const uint8_t* from, uint32_t (&bases)[4]) {
    const int shift = int(uintptr_t(from) % 4) * 8;
    if (uintptr_t(from) % 16 == 0) return load_quads(from, bases);
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(from - shift / 8);
    uint32_t low = words[0];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t high = i < 3 || shift != 0 ? words[i + 1] : 0;
        bases[i] = __funnelshift_r(low, high, shift);
        low = high;
    }
}

// Bits of a plane: those of sixteen elements, of which `count` are there; the rest is 0.
KVWIRE_DEVICE uint32_t load_bits(const uint8_t* from, int count) {
    if (count > 8 && uintptr_t(from) % 2 == 0) return *reinterpret_cast<const uint16_t*>(from);
    return (count > 0 ? from[0] : 0) | (count > 8 ? from[1] << 8 : 0);
}
KVWIRE_DEVICE void store_bits(uint8_t* to, int count, uint32_t bits) {
    if (count > 8 && uintptr_t(to) % 2 == 0) {
        *reinterpret_cast<uint16_t*>(to) = uint16_t(bits);
        return;
    }
    if (count > 0) to[0] = uint8_t(bits);
    if (count > 8) to[1] = uint8_t(bits >> 8);
}

template <int WIDTH>
constexpr int WHOLE_WORDS = WIDTH == 1 ? 1 : 4 * (WIDTH - 1);  // of 1 none is used

// Elements, side by side in `raw`, to their top bytes and their whole ones.
template <int WIDTH>
KVWIRE_DEVICE void split(const uint32_t (&raw)[4 * WIDTH], uint32_t (&top)[4],
                         uint32_t (&whole)[WHOLE_WORDS<WIDTH>]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32_t item[WIDTH];
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
            const uint32_t word = raw[WIDTH * i + j];
            if constexpr (WIDTH == 1) item[j] = chosen(0xFEFEFEFE, word << 1, word >> 7);
            if constexpr (WIDTH == 2) item[j] = chosen(0xFFFEFFFE, word << 1, word >> 15);
            if constexpr (WIDTH == 4) item[j] = word << 1 | word >> 31;
        }
        if constexpr (WIDTH == 1) top[i] = item[0];
        if constexpr (WIDTH == 2) {
            top[i] = __byte_perm(item[0], item[1], 0x7531);
            whole[i] = __byte_perm(item[0], item[1], 0x6420);
        }
        if constexpr (WIDTH == 4) {
            top[i] = __byte_perm(__byte_perm(item[0], item[1], 0x0073),
                                 __byte_perm(item[2], item[3], 0x0073), 0x5410);
            whole[3 * i] = __byte_perm(item[0], item[1], 0x4210);
            whole[3 * i + 1] = __byte_perm(item[1], item[2], 0x5421);
            whole[3 * i + 2] = __byte_perm(item[2], item[3], 0x6542);
        }
    }
}

// And back.
template <int WIDTH>
KVWIRE_DEVICE void join(const uint32_t (&top)[4], const uint32_t (&whole)[WHOLE_WORDS<WIDTH>],
                        uint32_t (&raw)[4 * WIDTH]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32_t item[WIDTH];
        if constexpr (WIDTH == 1) item[0] = top[i];
        if constexpr (WIDTH == 2) {
            item[0] = __byte_perm(whole[i], top[i], 0x5140);
            item[1] = __byte_perm(whole[i], top[i], 0x7362);
        }
        if constexpr (WIDTH == 4) {
            const uint32_t a = whole[3 * i], b = whole[3 * i + 1], c = whole[3 * i + 2];
            item[0] = __byte_perm(a, top[i], 0x4210);
            item[1] = __byte_perm(__byte_perm(a, b, 0x0543), top[i], 0x5210);
            item[2] = __byte_perm(__byte_perm(b, c, 0x0432), top[i], 0x6210);
            item[3] = __byte_perm(c, top[i], 0x7321);
        }
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
            const uint32_t word = item[j];
            uint32_t& to = raw[WIDTH * i + j];
            if constexpr (WIDTH == 1) to = chosen(0x7F7F7F7F, word >> 1, word << 7);
            if constexpr (WIDTH == 2) to = chosen(0x7FFF7FFF, word >> 1, word << 15);
            if constexpr (WIDTH == 4) to = word >> 1 | word << 31;
        }
    }
}

// Bit `bit` of sixteen bytes, and sixteen bits to that bit of sixteen bytes that have it not.
KVWIRE_DEVICE uint32_t bits_of_bytes(const uint32_t (&bytes)[4], int bit) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        bits |= ((bytes[i] >> bit & 0x01010101) * 0x01020408 >> 24 & 15) << 4 * i;
    return bits;
}
KVWIRE_DEVICE void bits_to_bytes(uint32_t bits, int bit, uint32_t (&bytes)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        bytes[i] |= ((bits >> 4 * i & 15) * 0x00204081 & 0x01010101) << bit;
}

}  // namespace kvwire
