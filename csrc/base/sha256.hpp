#pragma once
// SHA-256 (FIPS 180-4) and HMAC (RFC 2104) for a few hundred bytes per lane: small, not fast.

#include <array>
#include <cstdint>
#include <initializer_list>

#include "base/bytes.hpp"

namespace kvwire {

using Digest = std::array<uint8_t, 32>;

class Sha256 {
public:
    void update(ByteSpan data);
    Digest finish();  // the object is used up

private:
    void block(const uint8_t* data);

    std::array<uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                   0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    uint8_t pending_[64];
    uint64_t bytes_ = 0;
};

// Of the parts, one after another.
Digest hmac_sha256(ByteSpan key, std::initializer_list<ByteSpan> parts);

// Takes the same time wherever the two differ.
bool equal_secrets(const Digest& a, const Digest& b);

inline ByteSpan span_of(const Digest& digest) { return {digest.data(), digest.size()}; }

}  // namespace kvwire
