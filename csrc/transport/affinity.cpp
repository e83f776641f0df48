#include "transport/affinity.hpp"

namespace kvwire {
namespace {
constexpr uint64_t HELD_NS = 100'000'000;
constexpr uint64_t STAY_NS = 2'000'000;  // lanes of several cores must not drive it to and fro
}

size_t Affinity::cores() {
    cpu_set_t allowed;
    if (::sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 1;
    return size_t(CPU_COUNT(&allowed));
}

void Affinity::follow(int core, uint64_t now_ns) {
    followed_ns_ = now_ns;
    if (core == core_ || core < 0 || core >= CPU_SETSIZE) return;
    if (core_ >= 0 && now_ns - moved_ns_ < STAY_NS) return;
    if (core_ < 0 && ::sched_getaffinity(0, sizeof allowed_, &allowed_) != 0) return;
    if (!CPU_ISSET(core, &allowed_)) return;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    if (::sched_setaffinity(0, sizeof one, &one) != 0) return;
    core_ = core;
    moved_ns_ = now_ns;
}

bool Affinity::holds(uint64_t now_ns) {
    if (core_ < 0) return false;
    if (now_ns - followed_ns_ < HELD_NS) return true;
    ::sched_setaffinity(0, sizeof allowed_, &allowed_);
    core_ = -1;
    return false;
}

}  // namespace kvwire
