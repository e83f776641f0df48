#include "codec/quantised_kernels.hpp"
#include "codec/small_floats.hpp"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2")
#include "codec/quantised_loops.hpp"
#pragma GCC pop_options

namespace kvwire::quantised {

const Kernels& kernels_avx2() { return KERNELS; }

}  // namespace kvwire::quantised
#endif
