// Bytes that nobody can guess.
#pragma once

#include <cstddef>

namespace kvwire {

// At most 256, which the kernel gives in one piece. Throws INTERNAL when it gives none.
void random_bytes(void* out, size_t count);

}  // namespace kvwire
