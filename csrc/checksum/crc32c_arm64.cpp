// As crc32c_sse42.cpp, with Arm's CRC32 and polynomial-multiply instructions.
#if defined(__aarch64__)

#include <arm_acle.h>
#include <arm_neon.h>

#include "base/bytes.hpp"
#include "checksum/crc32c_math.hpp"
#include "checksum/crc32c_variants.hpp"

#define KVWIRE_TARGET __attribute__((target("+crc+crypto")))

namespace kvwire {
namespace {

template <size_t bytes>
KVWIRE_TARGET inline uint32_t shift(uint32_t state) {
    constexpr uint32_t kFactor = crc32c_math::x_to_the(8 * bytes - 33);
    const poly128_t product = vmull_p64(static_cast<poly64_t>(state), kFactor);
    return __crc32cd(0, vgetq_lane_u64(vreinterpretq_u64_p128(product), 0));
}

template <size_t block_bytes>
KVWIRE_TARGET inline uint32_t sum_blocks(uint32_t state, const uint8_t*& at, size_t& size) {
    for (; size >= 3 * block_bytes; at += 3 * block_bytes, size -= 3 * block_bytes) {
        uint32_t second = 0, third = 0;
        for (const uint8_t* p = at; p < at + block_bytes; p += 8) {
            state = __crc32cd(state, load_le<uint64_t>(p));
            second = __crc32cd(second, load_le<uint64_t>(p + block_bytes));
            third = __crc32cd(third, load_le<uint64_t>(p + 2 * block_bytes));
        }
        state = shift<2 * block_bytes>(state) ^ shift<block_bytes>(second) ^ third;
    }
    return state;
}

}  // namespace

KVWIRE_TARGET uint32_t crc32c_arm64(uint32_t crc, const void* data, size_t size) {
    const auto* at = static_cast<const uint8_t*>(data);
    uint32_t state = ~crc;
    state = sum_blocks<256>(state, at, size);
    state = sum_blocks<64>(state, at, size);
    for (; size >= 8; at += 8, size -= 8) state = __crc32cd(state, load_le<uint64_t>(at));
    for (; size > 0; ++at, --size) state = __crc32cb(state, *at);
    return ~state;
}

}  // namespace kvwire

#endif
