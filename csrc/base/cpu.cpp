#include "base/cpu.hpp"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace kvwire {
namespace {

#if defined(__x86_64__)

uint64_t read_xcr0() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t{high} << 32 | low;
}

CpuFeatures detect() {
    CpuFeatures found;
    uint32_t eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return found;
    found.sse42 = ecx & bit_SSE4_2;
    found.pclmul = ecx & bit_PCLMUL;
    found.aes = ecx & bit_AES;
    found.popcnt = ecx & bit_POPCNT;
    // A CPU bit alone is not enough: the kernel must also save the wide registers.
    if (!(ecx & bit_OSXSAVE)) return found;
    constexpr uint64_t kYmmState = 0x06, kZmmState = 0xE6;
    const uint64_t saved = read_xcr0();
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return found;
    found.bmi2 = ebx & bit_BMI2;
    if ((saved & kYmmState) == kYmmState) {
        found.avx2 = ebx & bit_AVX2;
        found.vpclmulqdq = ecx & bit_VPCLMULQDQ;
    }
    if ((saved & kZmmState) == kZmmState) {
        found.avx512f = ebx & bit_AVX512F;
        found.avx512bw = ebx & bit_AVX512BW;
        found.avx512vl = ebx & bit_AVX512VL;
        found.avx512vbmi = ecx & bit_AVX512VBMI;
        found.avx512vbmi2 = ecx & bit_AVX512VBMI2;
        found.avx512vpopcntdq = ecx & bit_AVX512VPOPCNTDQ;
    }
    return found;
}

#elif defined(__aarch64__) && defined(__linux__)

CpuFeatures detect() {
    CpuFeatures found;
    const unsigned long caps = getauxval(AT_HWCAP);
    found.arm_crc32 = caps & HWCAP_CRC32;
    found.arm_pmull = caps & HWCAP_PMULL;
    found.aes = caps & HWCAP_AES;
    return found;
}

#else

CpuFeatures detect() { return {}; }

#endif

}  // namespace

const CpuFeatures& cpu_features() {
    static const CpuFeatures features = detect();
    return features;
}

}  // namespace kvwire
