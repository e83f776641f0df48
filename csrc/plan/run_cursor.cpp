#include "plan/run_cursor.hpp"

#include <algorithm>
#include <cstring>

#include "checksum/crc32c.hpp"

namespace kvwire {

// Short runs are walked by the placement itself: an iovec each would cost more than the copy.
bool RunCursor::refill() {
    if (first_ < count_) return true;
    uint64_t covered = 0;
    count_ = placement_.iovecs(offset_, left_, runs_, RUNS_MAX, &covered);
    first_ = 0;
    offset_ += covered;
    left_ -= covered;
    return count_ > 0;
}

void RunCursor::advance(size_t bytes) {
    iovec& run = runs_[first_];
    run.iov_base = static_cast<uint8_t*>(run.iov_base) + bytes;
    run.iov_len -= bytes;
    if (run.iov_len == 0) ++first_;
}

uint8_t* RunCursor::in_place(size_t bytes) {
    if (!by_run_ || !refill() || runs_[first_].iov_len < bytes) return nullptr;
    uint8_t* const at = static_cast<uint8_t*>(runs_[first_].iov_base);
    advance(bytes);
    return at;
}

void RunCursor::gather(size_t bytes, uint8_t* out) {
    if (!by_run_) {
        placement_.gather(offset_, bytes, out);
        offset_ += bytes;
        return;
    }
    while (bytes > 0 && refill()) {
        const size_t part = std::min(bytes, runs_[first_].iov_len);
        std::memcpy(out, runs_[first_].iov_base, part);
        advance(part);
        out += part;
        bytes -= part;
    }
}

uint32_t RunCursor::scatter(size_t bytes, const uint8_t* in, uint32_t crc) {
    if (!by_run_) {
        placement_.scatter(offset_, bytes, in);
        offset_ += bytes;
        if (placement_.has_skips()) return crc32c(crc, in, bytes);
        return placement_.crc32c(offset_ - bytes, bytes, crc);
    }
    while (bytes > 0 && refill()) {
        const size_t part = std::min(bytes, runs_[first_].iov_len);
        std::memcpy(runs_[first_].iov_base, in, part);
        crc = crc32c(crc, runs_[first_].iov_base, part);
        advance(part);
        in += part;
        bytes -= part;
    }
    return crc;
}

}  // namespace kvwire
