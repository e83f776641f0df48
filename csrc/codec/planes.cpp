#include "codec/planes.hpp"

#include <algorithm>
#include <cstring>

// Inlined into a call with a constant width, -O3 turns these plain loops into the target's vector
// shuffles. SSE2 alone gives 8 to 50 GB/s in cache, several times LZ4: no need for intrinsics.
#define KVWIRE_INLINE static inline __attribute__((always_inline))

namespace kvwire {
namespace {

// Splitting reads its source once per plane, so it goes by blocks that stay in the first cache.
constexpr size_t kBlockItems = 2048;

KVWIRE_INLINE void split(const uint8_t* __restrict raw, size_t items, size_t width,
                         uint8_t* __restrict planes) {
    for (size_t start = 0; start < items; start += kBlockItems) {
        const size_t stop = std::min(items, start + kBlockItems);
        for (size_t plane = 0; plane < width; ++plane) {
            uint8_t* __restrict target = planes + plane * items;
            for (size_t i = start; i < stop; ++i) target[i] = raw[i * width + plane];
        }
    }
}

KVWIRE_INLINE void join(const uint8_t* __restrict planes, size_t items, size_t width,
                        uint8_t* __restrict raw) {
    for (size_t i = 0; i < items; ++i) {
        for (size_t plane = 0; plane < width; ++plane) {
            raw[i * width + plane] = planes[plane * items + i];
        }
    }
}

void copy(const uint8_t* source, size_t bytes, uint8_t* target) {
    if (bytes != 0) std::memcpy(target, source, bytes);
}

}  // namespace

void split_planes(const uint8_t* raw, size_t raw_bytes, uint32_t item_bytes, uint8_t* planes) {
    const size_t items = raw_bytes / item_bytes, done = items * item_bytes;
    switch (item_bytes) {
        case 1: return copy(raw, raw_bytes, planes);
        case 2: split(raw, items, 2, planes); break;
        case 4: split(raw, items, 4, planes); break;
        case 8: split(raw, items, 8, planes); break;
        default: split(raw, items, item_bytes, planes);
    }
    copy(raw + done, raw_bytes - done, planes + done);
}

void join_planes(const uint8_t* planes, size_t raw_bytes, uint32_t item_bytes, uint8_t* raw) {
    const size_t items = raw_bytes / item_bytes, done = items * item_bytes;
    switch (item_bytes) {
        case 1: return copy(planes, raw_bytes, raw);
        case 2: join(planes, items, 2, raw); break;
        case 4: join(planes, items, 4, raw); break;
        case 8: join(planes, items, 8, raw); break;
        default: join(planes, items, item_bytes, raw);
    }
    copy(planes + done, raw_bytes - done, raw + done);
}

}  // namespace kvwire
