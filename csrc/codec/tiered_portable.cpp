#include "codec/tiered_variants.hpp"

namespace kvwire {
namespace {

template <class Cut>
void split(const uint8_t* raw, const uint8_t* bases, size_t count, uint8_t* body,
           uint8_t* distances) {
    split_from<Cut>(0, raw, bases, count, body, distances);
}

template <class Cut>
void join(const uint8_t* body, const uint8_t* bases, const uint8_t* distances, size_t count,
          uint8_t* raw) {
    join_from<Cut>(0, body, bases, distances, count, raw);
}

size_t put_tier(const CodeTable& table, int shift, int width, uint8_t* distances, size_t count,
                uint8_t* planes) {
    const uint8_t* const digits = table.digits().data();
    const int last = (1 << width) - 1;
    size_t on = 0;
    for (size_t i = 0; i < count; i += 8) {
        uint64_t eight = 0;
        for (size_t k = 0; k < 8 && i + k < count; ++k) {
            const uint8_t distance = distances[i + k];
            const int digit = digits[distance] >> shift & last;
            eight |= uint64_t(digit) << 8 * k;
            distances[on] = distance;  // on <= i + k
            on += digit == last;
        }
        for (int bit = 0; bit < width; ++bit)
            planes[size_t(bit) * plane_bytes(count) + i / 8] = gather_plane(eight, size_t(bit));
    }
    return on;
}

size_t count_on(const uint8_t* planes, size_t count, int width) {
    const size_t bytes = plane_bytes(count);
    int on = 0;
    for (size_t at = 0; at < bytes; at += 8) {
        uint64_t all = ~uint64_t(0);
        for (int bit = 0; bit < width; ++bit)
            all &= load_bits(planes + size_t(bit) * bytes + at, bytes - at);
        on += __builtin_popcountll(all);
    }
    return size_t(on);
}

void get_tier(const uint8_t* offsets, int width, const uint8_t* planes, size_t count,
              const uint8_t* lower, uint8_t* distances) {
    const int last = (1 << width) - 1;
    for (size_t i = 0; i < count; i += 8) {
        uint64_t eight = 0;
        for (int bit = 0; bit < width; ++bit)
            eight |= spread_plane(planes[size_t(bit) * plane_bytes(count) + i / 8]) << bit;
        for (size_t k = 0; k < 8; ++k, eight >>= 8) {  // there is room behind the last
            const int digit = eight & 0x0F, on = digit == last;
            const uint8_t here = offsets[digit];
            distances[i + k] = uint8_t(here ^ ((here ^ *lower) & -on));  // nobody can predict it
            lower += on;
        }
    }
}

}  // namespace

const TieredKernels& tiered_portable() {
    static const TieredKernels kernels = {
        "portable",
        true,
        {split<Fp32>, split<Fp16>, split<Bf16>, split<E4m3>, split<E5m2>},
        {join<Fp32>, join<Fp16>, join<Bf16>, join<E4m3>, join<E5m2>},
        put_tier,
        count_on,
        get_tier,
        add_base_portable,
    };
    return kernels;
}

}  // namespace kvwire
