#pragma once
// Tells an event loop of the application's (asyncio) that handles have news: one eventfd for all of
// an endpoint, and a list in which each handle stands at most once.

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <sys/eventfd.h>
#include <unistd.h>
#include <unordered_set>
#include <vector>

#include "transport/socket.hpp"

namespace kvwire {

class Notifier {
public:
    // The descriptor is made, and marks are kept, from the first call on.
    int fd() {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!fd_) fd_ = Fd(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
        if (!fd_) {
            throw Error(ErrorCode::RESOURCES_EXHAUSTED,
                        std::string("no descriptor to be had for asyncio: ") + strerror(errno));
        }
        return fd_.get();
    }

    void mark(uint64_t handle) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!fd_ || !marked_.insert(handle).second || marked_.size() > 1) return;
        const uint64_t one = 1;
        (void)!::write(fd_.get(), &one, sizeof one);
    }

    std::vector<uint64_t> drain() {
        std::lock_guard<std::mutex> lock(mutex_);
        uint64_t ignored;
        if (fd_) (void)!::read(fd_.get(), &ignored, sizeof ignored);
        std::vector<uint64_t> handles(marked_.begin(), marked_.end());
        marked_.clear();
        return handles;
    }

private:
    std::mutex mutex_;
    Fd fd_;
    std::unordered_set<uint64_t> marked_;
};

}  // namespace kvwire
