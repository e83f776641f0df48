// One function per instruction set. They are compiled under baseline flags, with the
// instruction set named per function, so only crc32c.cpp decides which may run.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvwire {

uint32_t crc32c_portable(uint32_t crc, const void* data, size_t size);
#if defined(__x86_64__)
uint32_t crc32c_sse42(uint32_t crc, const void* data, size_t size);
uint32_t crc32c_avx512(uint32_t crc, const void* data, size_t size);
#elif defined(__aarch64__)
uint32_t crc32c_arm64(uint32_t crc, const void* data, size_t size);
#endif

}  // namespace kvwire
