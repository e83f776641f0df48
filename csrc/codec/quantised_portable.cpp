#include "codec/quantised_loops.hpp"

namespace kvwire::quantised {

const Kernels& kernels_portable() { return KERNELS; }

}  // namespace kvwire::quantised
