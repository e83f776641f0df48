// Races: two threads touch a byte, one of them writes it, and no barrier is between. Kernels that
// are compiled with -fsanitize=thread tell of what they touch; that sanitizer's own library, which
// knows nothing of blocks, is not linked.
#include "simt.hpp"

#include <memory>
#include <unordered_map>

// Kernels may read what nobody wrote, and make nothing of it.
extern "C" bool simt_tells_unwritten;
bool simt_tells_unwritten = false;

namespace simt {
namespace {

constexpr size_t PAGE_BYTES = 4096;

struct Past {  // a touch
    uint32_t block = 0, time = 0;
    uint16_t thread = 0;
    bool was = false, atomic = false, under_way = false;
};

struct Byte {
    uint32_t launch = 0, block = 0;  // of the first touch
    Past wrote, read, read_elsewhere;  // the last of each; the third by another warp
};

struct Page {
    Byte bytes[PAGE_BYTES];
};
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;

Byte& byte_at(uintptr_t address) {
    static uintptr_t last = 0;
    static Page* page = nullptr;
    if (!page || last != address / PAGE_BYTES) {
        last = address / PAGE_BYTES;
        std::unique_ptr<Page>& found = pages[last];
        if (!found) found = std::make_unique<Page>();
        page = found.get();
    }
    return page->bytes[address % PAGE_BYTES];
}

// Whether a touch of this launch may come after `order`'s thread as well as before.
bool races(const Past& past, bool atomic) {
    if (!past.was || (past.atomic && atomic)) return false;
    if (past.block != order.block) return true;
    if (past.thread == order.thread || past.time < order.barrier) return false;
    return past.thread / 32 != order.thread / 32 || past.time >= met(past.thread, order.thread);
}

[[noreturn]] void tell(const Past& past, const char* before, const char* now, uintptr_t address,
                       bool shared) {
    if (past.block != order.block)
        fail("a race between blocks: another one %s byte %#zx, thread %u %s it", before,
             size_t(address), order.thread, now);
    fail("a race: thread %u %s byte %zu of %s memory, thread %u %s it, and no barrier between",
         past.thread, before, size_t(shared ? address - uintptr_t(order.shared) : address),
         shared ? "shared" : "global", order.thread, now);
}

}  // namespace

void touched(const void* where, size_t bytes, Touch touch) {
    const uintptr_t first = uintptr_t(where);
    if (!order.running || first - uintptr_t(order.stacks) < order.stacks_bytes) return;
    const bool shared = first - uintptr_t(order.shared) < order.shared_bytes;
    for (uintptr_t address = first; address < first + bytes; ++address) {
        Byte& byte = byte_at(address);
        const bool old = shared && byte.block != order.block;  // of a block that has ended
        if (old || byte.launch != order.launch) byte = Byte{order.launch, order.block, {}, {}, {}};
        const bool atomic = touch == ATOMIC;
        const Past now = {order.block, order.time, uint16_t(order.thread), true, atomic,
                          touch == BEGIN};
        if (touch == END) {
            byte.wrote = now;
            continue;
        }
        if (byte.wrote.under_way)
            fail("thread %u touches byte %zu of shared memory while thread %u's asynchronous copy "
                 "to it is under way", order.thread, size_t(address - uintptr_t(order.shared)),
                 byte.wrote.thread);
        const char* const does = touch == READ ? "reads" : atomic ? "updates" : "writes";
        if (races(byte.wrote, atomic))
            tell(byte.wrote, byte.wrote.atomic ? "updated" : "wrote", does, address, shared);
        if (touch == READ) {
            if (shared && !byte.wrote.was && simt_tells_unwritten)
                fail("thread %u reads byte %zu of shared memory, which nobody wrote",
                     order.thread, size_t(address - uintptr_t(order.shared)));
            if (byte.read.was && byte.read.thread / 32 != now.thread / 32)
                byte.read_elsewhere = byte.read;
            byte.read = now;
            continue;
        }
        for (const Past* past : {&byte.read, &byte.read_elsewhere})
            if (races(*past, false)) tell(*past, "read", does, address, shared);
        byte.wrote = now;
    }
}

}  // namespace simt

// ---- what -fsanitize=thread calls

#define SIMT_TOUCH(NAME, BYTES, TOUCH) \
    extern "C" void NAME(void* address) { simt::touched(address, BYTES, simt::TOUCH); }
#define SIMT_TOUCHES(BYTES)                                           \
    SIMT_TOUCH(__tsan_read##BYTES, BYTES, READ)                       \
    SIMT_TOUCH(__tsan_write##BYTES, BYTES, WRITE)                     \
    SIMT_TOUCH(__tsan_unaligned_read##BYTES, BYTES, READ)             \
    SIMT_TOUCH(__tsan_unaligned_write##BYTES, BYTES, WRITE)
SIMT_TOUCHES(1)
SIMT_TOUCHES(2)
SIMT_TOUCHES(4)
SIMT_TOUCHES(8)
SIMT_TOUCHES(16)
extern "C" void __tsan_read_range(void* address, size_t bytes) {
    simt::touched(address, bytes, simt::READ);
}
extern "C" void __tsan_write_range(void* address, size_t bytes) {
    simt::touched(address, bytes, simt::WRITE);
}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
