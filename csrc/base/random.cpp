#include "base/random.hpp"

#include <sys/random.h>

#include "base/error.hpp"

namespace kvwire {

void random_bytes(void* out, size_t count) {
    if (::getrandom(out, count, 0) != ssize_t(count))
        throw Error(ErrorCode::INTERNAL, "getrandom failed");
}

}  // namespace kvwire
