#include "codec/quantised_kernels.hpp"
#include "codec/small_floats.hpp"

#if defined(__x86_64__)
#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
#include "codec/quantised_loops.hpp"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace kvwire::quantised {

const Kernels& kernels_avx2() { return KERNELS; }

}  // namespace kvwire::quantised
#endif
