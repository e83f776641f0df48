// What this CPU can do and the operating system lets us use, found out once.
#pragma once

namespace kvwire {

struct CpuFeatures {
    bool sse42 = false;
    bool pclmul = false;
    bool aes = false;
    bool popcnt = false;
    bool bmi2 = false;
    bool avx2 = false;
    bool avx512f = false;
    bool avx512bw = false;
    bool avx512vl = false;
    bool avx512vbmi = false;
    bool avx512vbmi2 = false;
    bool avx512vpopcntdq = false;
    bool vpclmulqdq = false;
    bool arm_crc32 = false;
    bool arm_pmull = false;
};

const CpuFeatures& cpu_features();

}  // namespace kvwire
