// What races.cpp must know of a launch, and what simt.cpp tells it. Without races.cpp nobody asks.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace simt {

// BEGIN, END: of an asynchronous copy to it.
enum Touch { READ, WRITE, ATOMIC, BEGIN, END };

struct Order {
    bool running = false;
    unsigned thread = 0;
    uint32_t launch = 0, block = 0;  // counted over all launches
    uint32_t time = 0;               // meetings of this process
    uint32_t barrier = 0;            // when this block last met as a whole
    const char* shared = nullptr;
    size_t shared_bytes = 0;
    const char* stacks = nullptr;
    size_t stacks_bytes = 0;
};
extern Order order;

// When two lanes of a warp last met at __syncwarp, which alone orders what they read and write.
uint32_t met(unsigned thread, unsigned other);

void touched(const void* address, size_t bytes, Touch touch) __attribute__((weak));

}  // namespace simt
