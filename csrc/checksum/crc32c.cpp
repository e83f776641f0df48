#include "checksum/crc32c.hpp"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "base/cpu.hpp"
#include "checksum/crc32c_math.hpp"
#include "checksum/crc32c_variants.hpp"

namespace kvwire {
namespace {

const Crc32cVariant& pick() {
    const char* forced = std::getenv("KVWIRE_CRC32C");
    std::string supported;
    for (const Crc32cVariant& variant : crc32c_variants()) {
        if (!variant.supported) continue;
        if (!forced || !*forced || std::string(forced) == variant.name) return variant;
        supported += std::string(supported.empty() ? "" : ", ") + variant.name;
    }
    throw std::invalid_argument("KVWIRE_CRC32C=" + std::string(forced) +
                                ": no such CRC32C variant on this CPU; supported: " + supported);
}

const Crc32cVariant& active() {
    static const Crc32cVariant& variant = pick();
    return variant;
}

}  // namespace

const std::vector<Crc32cVariant>& crc32c_variants() {
    [[maybe_unused]] const CpuFeatures& cpu = cpu_features();
    static const std::vector<Crc32cVariant> variants = {
#if defined(__x86_64__)
        {"avx512", cpu.avx512f && cpu.avx512vl && cpu.vpclmulqdq && cpu.sse42 && cpu.pclmul,
         crc32c_avx512},
        {"sse42", cpu.sse42 && cpu.pclmul, crc32c_sse42},
#elif defined(__aarch64__)
        {"arm64", cpu.arm_crc32 && cpu.arm_pmull, crc32c_arm64},
#endif
        {"portable", true, crc32c_portable},
    };
    return variants;
}

const char* crc32c_active() { return active().name; }

uint32_t crc32c(uint32_t crc, const void* data, size_t size) {
    return active().function(crc, data, size);
}

uint32_t crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t b_bytes) {
    using namespace crc32c_math;
    // Powers of x^8 rather than x, because 8 * b_bytes may wrap.
    uint32_t shift = 1u << 31, power = x_to_the(8);
    for (; b_bytes != 0; b_bytes >>= 1, power = multiply(power, power)) {
        if (b_bytes & 1) shift = multiply(shift, power);
    }
    return multiply(crc_a, shift) ^ crc_b;
}

}  // namespace kvwire
