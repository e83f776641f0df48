#pragma once
// How long the calling thread has computed. A reading takes half a microsecond: take samples.

#include <ctime>

#include <cstdint>

namespace kvwire {

inline uint64_t thread_cpu_ns() {
    timespec now;
    ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return uint64_t(now.tv_sec) * 1'000'000'000 + uint64_t(now.tv_nsec);
}

// True for one call in EVERY, the first included: which piece of work to time.
class Sampler {
public:
    static constexpr uint32_t EVERY = 8;
    bool next() { return calls_++ % EVERY == 0; }

private:
    uint32_t calls_ = 0;
};

}  // namespace kvwire
