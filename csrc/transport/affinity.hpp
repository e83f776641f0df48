#pragma once
// Where an I/O thread runs. Between two processes of one host, the bytes of a lane lie in the cache
// of the core that sent them. When there are more I/O threads than cores, some share a core anyway:
// then the receiving thread goes where its bytes are, which here made a byte up to three times
// cheaper than from another core's cache (bench/README.md).

#include <sched.h>

#include <cstddef>
#include <cstdint>

namespace kvwire {

class Affinity {
public:
    static size_t cores();  // that the calling thread may use

    // By the thread itself. Goes to `core`, if it may, until let_go().
    void follow(int core, uint64_t now_ns);
    // Lets go when the last follow() is long past; true while it still holds.
    bool holds(uint64_t now_ns);

private:
    cpu_set_t allowed_;  // before it first followed
    int core_ = -1;      // -1: none
    uint64_t followed_ns_ = 0, moved_ns_ = 0;
};

}  // namespace kvwire
