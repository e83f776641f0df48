// The loops of the lossy rungs, over elements that lie side by side. What they compute is exact or
// rounded as FORMAT.md says, so all variants give the same bits. Arrays must not overlap.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvwire::quantised {

constexpr uint8_t FP32 = 1, FP16 = 2, BF16 = 3, E4M3 = 4, BYTES = 7;  // FORMAT.md section 7.1

constexpr size_t GROUP = 64;  // places of a row that share a scale and a minimum
constexpr size_t BLOCK = 64;  // codes that are packed together

// A number for each element, or one for all.
struct Numbers {
    const float* first;
    bool steps;
};

struct Kernels {
    // Elements of FP32, FP16 or BF16, unaligned, to and from binary32.
    void (*widen)(uint8_t dtype, const uint8_t* raw, size_t count, float* values);
    void (*narrow)(uint8_t dtype, const float* values, size_t count, uint8_t* raw);
    // False when one is NaN, infinite, or of a magnitude of 2^58 or more.
    bool (*can_round)(uint8_t dtype, const uint8_t* raw, size_t count);

    // Takes the values into their ranges: of each one; or of all, which are at most GROUP.
    void (*widen_range)(const float* values, size_t count, bool steps, float* low, float* high);
    // The same for magnitudes divided by `over`, 0 where that is 0; null: not divided.
    void (*raise_largest)(const float* values, size_t count, Numbers over, bool steps,
                          float* largest);

    // Codes 0 to `top`, and back; 0 where the scale is 0.
    void (*to_groups)(const float* values, size_t count, Numbers scale, Numbers minimum, float top,
                      uint8_t* codes);
    void (*from_groups)(const uint8_t* codes, size_t count, Numbers scale, Numbers minimum,
                        float* values);

    // By row × column; null: no columns. A quotient by 0 is 0.
    void (*divide)(float* values, size_t count, Numbers row, Numbers column);
    void (*multiply)(float* values, size_t count, Numbers row, Numbers column);

    void (*to_integers)(const float* values, size_t count, uint8_t* codes);  // -127 to 127
    void (*from_integers)(const uint8_t* codes, size_t count, float* values);
    void (*to_e4m3)(const float* values, size_t count, uint8_t* codes);
    bool (*from_e4m3)(const uint8_t* codes, size_t count, float* values);  // false: one is NaN

    // `blocks` of BLOCK codes of 8, 6 or 4 bits.
    void (*pack)(const uint8_t* codes, size_t blocks, int bits, uint8_t* packed);
    void (*unpack)(const uint8_t* packed, size_t blocks, int bits, uint8_t* codes);
};

const Kernels& kernels_portable();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
#endif

struct Variant {
    const char* name;
    bool supported;
    const Kernels& (*kernels)();
};

// Fastest first: "avx2", "portable". Wider vectors gain nothing: measured.
const std::vector<Variant>& variants();
// Those that `variant` names; null: those that the environment variable KVWIRE_QUANTISED names,
// else the first supported ones. Throws std::invalid_argument for a name that is not among them.
const Kernels& kernels(const char* variant);

}  // namespace kvwire::quantised
