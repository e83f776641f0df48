#pragma once
// Takes the bytes of a placement in order, where they lie or through a buffer of the caller's.

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>

#include "plan/placement.hpp"

namespace kvwire {

class RunCursor {
public:
    // From `offset` on. The placement is borrowed.
    RunCursor(const Placement& placement, uint64_t offset, uint64_t bytes)
        : placement_(placement), offset_(offset), left_(bytes),
          by_run_(placement.suits_iovecs()) {}

    // The next `bytes` bytes in place, or nullptr where they do not lie side by side. Then, and
    // only then, gather() or scatter() takes them.
    uint8_t* in_place(size_t bytes);

    void gather(size_t bytes, uint8_t* out);
    // CRC32C of `crc` and the bytes in place; skipped ones count as they are in `in`.
    uint32_t scatter(size_t bytes, const uint8_t* in, uint32_t crc);

private:
    static constexpr size_t RUNS_MAX = 64;
    bool refill();
    void advance(size_t bytes);

    const Placement& placement_;
    uint64_t offset_, left_;  // left_: not yet in runs_
    const bool by_run_;
    iovec runs_[RUNS_MAX];
    size_t first_ = 0, count_ = 0;
};

}  // namespace kvwire
