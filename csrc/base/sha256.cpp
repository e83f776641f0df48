#include "base/sha256.hpp"

#include <algorithm>
#include <cstring>

namespace kvwire {
namespace {

constexpr size_t BLOCK_BYTES = 64;

constexpr uint32_t ROUND_CONSTANTS[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

uint32_t rotated(uint32_t value, int bits) { return value >> bits | value << (32 - bits); }

uint32_t load_be32(const uint8_t* in) {
    return uint32_t(in[0]) << 24 | uint32_t(in[1]) << 16 | uint32_t(in[2]) << 8 | in[3];
}

void store_be32(uint8_t* out, uint32_t value) {
    for (int i = 0; i < 4; ++i) out[i] = uint8_t(value >> (24 - 8 * i));
}

}  // namespace

void Sha256::block(const uint8_t* data) {
    uint32_t w[64];
    for (int i = 0; i < 16; ++i) w[i] = load_be32(data + 4 * i);
    for (int i = 16; i < 64; ++i) {
        const uint32_t s0 = rotated(w[i - 15], 7) ^ rotated(w[i - 15], 18) ^ w[i - 15] >> 3;
        const uint32_t s1 = rotated(w[i - 2], 17) ^ rotated(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    auto [a, b, c, d, e, f, g, h] = state_;
    for (int i = 0; i < 64; ++i) {
        const uint32_t s1 = rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25);
        const uint32_t s0 = rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22);
        const uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + ROUND_CONSTANTS[i] + w[i];
        const uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    const uint32_t sums[8] = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; ++i) state_[i] += sums[i];
}

void Sha256::update(ByteSpan data) {
    for (size_t at = 0; at < data.size;) {
        const size_t filled = bytes_ % BLOCK_BYTES;
        const size_t part = std::min(BLOCK_BYTES - filled, data.size - at);
        std::memcpy(pending_ + filled, data.data + at, part);
        at += part;
        bytes_ += part;
        if (bytes_ % BLOCK_BYTES == 0) block(pending_);
    }
}

Digest Sha256::finish() {
    static const uint8_t padding[BLOCK_BYTES] = {0x80};
    const uint64_t bits = bytes_ * 8;
    const size_t filled = bytes_ % BLOCK_BYTES;
    update({padding, (filled < 56 ? 56 : 120) - filled});
    uint8_t length[8];
    store_be32(length, uint32_t(bits >> 32));
    store_be32(length + 4, uint32_t(bits));
    update({length, sizeof length});
    Digest digest;
    for (int i = 0; i < 8; ++i) store_be32(digest.data() + 4 * i, state_[i]);
    return digest;
}

Digest hmac_sha256(ByteSpan key, std::initializer_list<ByteSpan> parts) {
    Digest short_key;
    if (key.size > BLOCK_BYTES) {
        Sha256 hash;
        hash.update(key);
        short_key = hash.finish();
        key = span_of(short_key);
    }
    uint8_t inner_pad[BLOCK_BYTES], outer_pad[BLOCK_BYTES];
    for (size_t i = 0; i < BLOCK_BYTES; ++i) {
        const uint8_t byte = i < key.size ? key.data[i] : 0;
        inner_pad[i] = byte ^ 0x36;
        outer_pad[i] = byte ^ 0x5c;
    }
    Sha256 inner, outer;
    inner.update({inner_pad, BLOCK_BYTES});
    for (const ByteSpan& part : parts) inner.update(part);
    outer.update({outer_pad, BLOCK_BYTES});
    outer.update(span_of(inner.finish()));
    return outer.finish();
}

bool equal_secrets(const Digest& a, const Digest& b) {
    volatile uint8_t difference = 0;
    for (size_t i = 0; i < a.size(); ++i) difference = difference | (a[i] ^ b[i]);
    return difference == 0;
}

}  // namespace kvwire
