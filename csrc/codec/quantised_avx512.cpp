#include "codec/quantised_kernels.hpp"
#include "codec/small_floats.hpp"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,prefer-vector-width=512")
#include "codec/quantised_loops.hpp"
#pragma GCC pop_options

namespace kvwire::quantised {

const Kernels& kernels_avx512() { return KERNELS; }

}  // namespace kvwire::quantised
#endif
