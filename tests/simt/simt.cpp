// Blocks one after another, the threads of a block as fibers that are switched where they meet.
// `seed` says in which order they run, and what shared memory holds at first: 0 forward, 1
// backward and the last to be ready first, others at random.
#include "simt.hpp"

#include "context.hpp"

#include <link.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

Order order;

namespace {

constexpr unsigned THREADS_MAX = 1024;
const char* const NAMES[] = {
    "__syncthreads", "__syncthreads_or", "__syncthreads_and", "__syncthreads_count",
    "__syncwarp", "__ballot_sync", "__any_sync", "__all_sync", "__shfl_sync", "__shfl_up_sync",
    "__shfl_down_sync", "__shfl_xor_sync", "__reduce_add_sync", "__reduce_and_sync",
    "__reduce_or_sync", "__reduce_xor_sync", "__reduce_min_sync", "__reduce_max_sync",
    "__match_any_sync", "__match_all_sync"};

struct Copy {
    void* to;
    const void* from;
    size_t bytes, zeros;
};

struct Fiber {
    Context context;
    bool left, waits;
    Meeting meeting;
    uint32_t mask;  // of the lanes it waits for; 0: all of the block
    uint64_t value, outcome;
    int lane, width;
    std::vector<std::vector<Copy>> copies;  // by batch, the last one not committed yet
};

struct Described {
    std::vector<size_t> parameter_bytes;
    Call call;
};

// Built at its first use, by whichever static initialiser comes first.
std::map<std::string, Described>& kernels() {
    static std::map<std::string, Described> all;
    return all;
}

struct Machine {
    Context main;
    Fiber fibers[THREADS_MAX];
    char* stacks = nullptr;
    const Call* call = nullptr;
    void** parameters = nullptr;
    unsigned threads = 0, current = 0, left = 0, waiting_block = 0;
    std::vector<unsigned> ready;
    size_t next = 0;  // of `ready`, in order
    uint32_t arrived[THREADS_MAX / 32], gone[THREADS_MAX / 32];
    uint32_t met[THREADS_MAX][32];  // when a thread and a lane of its warp met at __syncwarp
    uint64_t seed = 0, random = 0;
    std::string error;
    std::deque<std::string> faults;  // those that callers hold
    long long ticks = 0;
};
Machine machine;
std::mutex one_launch;

uint64_t draw() {
    uint64_t& x = machine.random;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return x;
}

void set_ready(unsigned thread) {
    machine.fibers[thread].waits = false;
    machine.ready.push_back(thread);
}

// Puts threads [begin, end) that `chosen` holds for to the ready ones.
template <class F>
void release(unsigned begin, unsigned end, F chosen) {
    for (unsigned i = begin; i < end; ++i) {
        const unsigned thread = machine.seed == 0 ? i : begin + end - 1 - i;
        if (chosen(thread)) set_ready(thread);
    }
}

unsigned next_thread() {
    std::vector<unsigned>& ready = machine.ready;
    if (machine.seed == 0) {
        const unsigned thread = ready[machine.next++];
        if (machine.next == ready.size()) {
            ready.clear();
            machine.next = 0;
        }
        return thread;
    }
    if (machine.seed > 1) std::swap(ready[draw() % ready.size()], ready.back());
    const unsigned thread = ready.back();
    ready.pop_back();
    return thread;
}

void to_main() { change(machine.fibers[machine.current].context, machine.main); }

uint64_t reduced(Meeting meeting, uint64_t a, uint64_t b) {
    const int64_t x = int64_t(a), y = int64_t(b);
    switch (meeting) {
        case REDUCE_ADD: return a + b;
        case REDUCE_AND: return a & b;
        case REDUCE_OR: return a | b;
        case REDUCE_XOR: return a ^ b;
        case REDUCE_MIN: return uint64_t(x < y ? x : y);
        default: return uint64_t(x < y ? y : x);
    }
}

int source_of(const Fiber& fiber, int self) {
    const int low = self & ~(fiber.width - 1), high = low + fiber.width;
    int source = low | (fiber.lane & (fiber.width - 1));
    if (fiber.meeting == SHUFFLE_UP) source = self - fiber.lane;
    if (fiber.meeting == SHUFFLE_DOWN) source = self + fiber.lane;
    if (fiber.meeting == SHUFFLE_XOR) source = self ^ fiber.lane;
    const bool out = fiber.meeting == SHUFFLE_UP ? source < low : source >= high;
    return out ? self : source;
}

void conclude_warp(Fiber* lanes, uint32_t mask, Meeting meeting) {
    uint32_t set = 0;
    bool first = true, same = true;
    uint64_t sum = 0, one = 0;
    for (int lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const uint64_t value = lanes[lane].value;
        if (value) set |= 1u << lane;
        if (first) one = value;
        same &= value == one;
        sum = first ? value : reduced(meeting, sum, value);
        first = false;
    }
    for (int lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        Fiber& fiber = lanes[lane];
        switch (meeting) {
            case WARP_SYNC: fiber.outcome = 0; break;
            case BALLOT: fiber.outcome = set; break;
            case ANY: fiber.outcome = set != 0; break;
            case ALL: fiber.outcome = set == mask; break;
            case MATCH_ALL: fiber.outcome = same ? mask : 0; break;
            case MATCH_ANY:
                fiber.outcome = 0;
                for (int other = 0; other < 32; ++other)
                    if (mask >> other & 1 && lanes[other].value == fiber.value)
                        fiber.outcome |= 1u << other;
                break;
            case SHUFFLE: case SHUFFLE_UP: case SHUFFLE_DOWN: case SHUFFLE_XOR: {
                const int source = source_of(fiber, lane);
                if (!(mask >> source & 1))
                    fail("lane %d reads lane %d in %s, which mask %08x leaves out", lane, source,
                         NAMES[meeting], mask);
                fiber.outcome = lanes[source].value;
                break;
            }
            default: fiber.outcome = sum;
        }
    }
}

void meet_warp(unsigned thread, Fiber& fiber) {
    const unsigned warp = thread / 32, lane = thread % 32;
    Fiber* const lanes = &machine.fibers[warp * 32];
    const uint32_t mask = fiber.mask;
    const char* const name = NAMES[fiber.meeting];
    if (!(mask >> lane & 1)) fail("lane %u is not in its own mask %08x at %s", lane, mask, name);
    if (fiber.width <= 0 || fiber.width > 32 || (fiber.width & (fiber.width - 1)))
        fail("width %d of %s is no power of two up to 32", fiber.width, name);
    const unsigned here = std::min(32u, machine.threads - warp * 32);
    const uint32_t missing = here == 32 ? 0 : ~0u << here;
    if (mask & (machine.gone[warp] | missing))
        fail("warp %u: lanes %08x have left, and lane %u waits for them at %s", warp,
             mask & (machine.gone[warp] | missing), lane, name);
    machine.arrived[warp] |= 1u << lane;
    bool all = (machine.arrived[warp] & mask) == mask;
    for (unsigned other = 0; other < here; ++other) {
        if (!((mask & machine.arrived[warp]) >> other & 1)) continue;
        const Fiber& met = lanes[other];
        if (met.mask == mask && met.meeting == fiber.meeting) continue;
        if (met.mask >> lane & 1)
            fail("warp %u: lane %u is at %s with mask %08x, lane %u at %s with mask %08x", warp,
                 lane, name, mask, other, NAMES[met.meeting], met.mask);
        all = false;
    }
    if (!all) return;
    conclude_warp(lanes, mask, fiber.meeting);
    ++order.time;
    for (unsigned a = 0; a < 32 && fiber.meeting == WARP_SYNC && touched; ++a)
        for (unsigned b = 0; b < 32; ++b)
            if (mask >> a & mask >> b & 1) machine.met[warp * 32 + a][b] = order.time;
    machine.arrived[warp] &= ~mask;
    release(warp * 32, warp * 32 + here, [&](unsigned i) { return mask >> i % 32 & 1; });
}

void meet_block(unsigned thread, Fiber& fiber) {
    if (machine.left > 0)
        fail("%u threads have left, and thread %u waits for them at %s", machine.left, thread,
             NAMES[fiber.meeting]);
    if (++machine.waiting_block < machine.threads) return;
    machine.waiting_block = 0;
    order.barrier = ++order.time;
    uint64_t count = 0;
    for (unsigned i = 0; i < machine.threads; ++i) {
        if (machine.fibers[i].meeting != fiber.meeting)
            fail("thread %u is at %s, thread %u at %s", thread, NAMES[fiber.meeting], i,
                 NAMES[machine.fibers[i].meeting]);
        count += machine.fibers[i].value;
    }
    for (unsigned i = 0; i < machine.threads; ++i)
        machine.fibers[i].outcome = fiber.meeting == BLOCK_OR    ? count != 0
                                    : fiber.meeting == BLOCK_AND ? count == machine.threads
                                                                 : count;
    release(0, machine.threads, [](unsigned) { return true; });
}

void leave(unsigned thread) {
    machine.fibers[thread].left = true;
    machine.left++;
    machine.gone[thread / 32] |= 1u << thread % 32;
    if (machine.waiting_block)
        fail("thread %u left, and %u others wait for it at a barrier of the block", thread,
             machine.waiting_block);
    for (unsigned other = thread / 32 * 32; other < thread / 32 * 32 + 32; ++other) {
        const Fiber& fiber = machine.fibers[other];
        if (other < machine.threads && fiber.waits && fiber.mask >> thread % 32 & 1)
            fail("thread %u left, and lane %u of its warp waits for it at %s", thread, other % 32,
                 NAMES[fiber.meeting]);
    }
}

void fiber_main() {
    (*machine.call)(machine.parameters);
    leave(machine.current);
    to_main();
    abort();
}

// ---- shared memory

struct Range {
    char* start;
    size_t bytes;
};

thread_local char in_shared_memory;  // brings the block of this library's thread_locals into being

int find_shared(dl_phdr_info* info, size_t, void* found) {
    const char* const mine = reinterpret_cast<const char*>(&machine);
    bool here = false;
    size_t bytes = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const ElfW(Phdr)& header = info->dlpi_phdr[i];
        const char* const start = reinterpret_cast<const char*>(info->dlpi_addr + header.p_vaddr);
        if (header.p_type == PT_LOAD && mine >= start && mine < start + header.p_memsz)
            here = true;
        if (header.p_type == PT_TLS) bytes = header.p_memsz;
    }
    if (here) *static_cast<Range*>(found) = {static_cast<char*>(info->dlpi_tls_data), bytes};
    return here;
}

Range shared_memory() {
    *const_cast<volatile char*>(&in_shared_memory) = 1;
    Range found = {nullptr, 0};
    dl_iterate_phdr(find_shared, &found);
    return found;
}

// ---- blocks

void run_block(const Range& shared) {
    for (size_t at = 0; at < shared.bytes; at += 8) {
        const uint64_t poison = machine.seed == 0 ? 0xA5A5A5A5A5A5A5A5 : draw();
        memcpy(shared.start + at, &poison, std::min<size_t>(8, shared.bytes - at));
    }
    machine.left = machine.waiting_block = 0;
    machine.ready.clear();
    machine.next = 0;
    memset(machine.arrived, 0, sizeof(machine.arrived));
    memset(machine.gone, 0, sizeof(machine.gone));
    memset(machine.met, 0, sizeof(machine.met));
    order.barrier = ++order.time;
    ++order.block;
    for (unsigned i = 0; i < machine.threads; ++i) {
        Fiber& fiber = machine.fibers[i];
        fiber.left = fiber.waits = false;
        fiber.copies.assign(1, {});
        begin(fiber.context, machine.stacks + i * (STACK_BYTES + 4096) + 4096, fiber_main);
    }
    release(0, machine.threads, [](unsigned) { return true; });
    while (!machine.ready.empty() && machine.error.empty()) {
        machine.current = next_thread();
        threadIdx = {machine.current, 0, 0};
        order.thread = machine.current;
        change(machine.main, machine.fibers[machine.current].context);
    }
    if (!machine.error.empty() || machine.left == machine.threads) return;
    unsigned waiting = 0;
    while (!machine.fibers[waiting].waits) ++waiting;
    machine.error = "deadlock: thread " + std::to_string(waiting) + " waits at " +
                    NAMES[machine.fibers[waiting].meeting];
    for (unsigned i = waiting; i < machine.threads; ++i)
        if (machine.fibers[i].waits &&
            machine.fibers[i].meeting != machine.fibers[waiting].meeting) {
            machine.error += ", thread " + std::to_string(i) + " at " +
                             NAMES[machine.fibers[i].meeting];
            break;
        }
}

void make_stacks() {
    const size_t each = STACK_BYTES + 4096;
    void* const room = mmap(nullptr, each * THREADS_MAX, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) abort();
    machine.stacks = static_cast<char*>(room);
    for (unsigned i = 0; i < THREADS_MAX; ++i) mprotect(machine.stacks + i * each, 4096, PROT_NONE);
}

}  // namespace

uint32_t met(unsigned thread, unsigned other) { return machine.met[thread][other % 32]; }

void add_kernel(const char* name, std::vector<size_t> parameter_bytes, Call call) {
    kernels()[name] = {std::move(parameter_bytes), std::move(call)};
}

void fail(const char* format, ...) {
    char text[300];
    va_list args;
    va_start(args, format);
    const int length =
        snprintf(text, sizeof(text), "block (%u, %u): ", blockIdx.x, blockIdx.y);
    vsnprintf(text + length, sizeof(text) - size_t(length), format, args);
    va_end(args);
    machine.error = text;
    to_main();
    abort();
}

uint64_t meet(Meeting meeting, uint32_t mask, uint64_t value, int lane, int width) {
    const unsigned thread = machine.current;
    Fiber& fiber = machine.fibers[thread];
    fiber.meeting = meeting;
    fiber.mask = mask;
    fiber.value = value;
    fiber.lane = lane;
    fiber.width = width;
    fiber.waits = true;
    if (meeting <= BLOCK_COUNT)
        meet_block(thread, fiber);
    else
        meet_warp(thread, fiber);
    to_main();
    return fiber.outcome;
}

void pause() {
    set_ready(machine.current);
    to_main();
}

void atomic_pause() {
    if (machine.seed > 1 && draw() % 8 == 0) pause();
}

void copy_later(void* to, const void* from, size_t bytes, size_t zeros) {
    if (bytes != 4 && bytes != 8 && bytes != 16) fail("an asynchronous copy of %zu bytes", bytes);
    if ((uintptr_t(to) | uintptr_t(from)) % bytes != 0 || zeros > bytes)
        fail("an asynchronous copy of %zu bytes is not aligned", bytes);
    if (touched) touched(to, bytes, BEGIN);
    machine.fibers[machine.current].copies.back().push_back({to, from, bytes, zeros});
}

void copies_commit() { machine.fibers[machine.current].copies.emplace_back(); }

void copies_wait(size_t batches_under_way) {
    auto& copies = machine.fibers[machine.current].copies;
    while (copies.size() - 1 > batches_under_way) {
        for (const Copy& copy : copies.front()) {
            if (touched) touched(copy.from, copy.bytes - copy.zeros, READ);
            if (touched) touched(copy.to, copy.bytes, END);
            memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
            memset(static_cast<char*>(copy.to) + copy.bytes - copy.zeros, 0, copy.zeros);
        }
        copies.erase(copies.begin());
    }
}

long long clock() { return ++machine.ticks; }

}  // namespace simt

// Runs a kernel to its end. `parameters`: the address of each, as cuLaunchKernel takes them.
// Returns null, or what went wrong.
extern "C" const char* simt_launch(const char* name, unsigned grid_x, unsigned grid_y,
                                   unsigned threads, void** parameters, uint64_t seed) {
    using namespace simt;
    const std::lock_guard<std::mutex> lock(one_launch);
    machine.error.clear();
    const auto kernel = kernels().find(name);
    if (kernel == kernels().end()) {
        machine.error = std::string("there is no kernel ") + name;
    } else if (threads == 0 || threads > THREADS_MAX || grid_x == 0 || grid_y == 0) {
        machine.error = "no such grid";
    } else {
        if (!machine.stacks) make_stacks();
        machine.call = &kernel->second.call;
        machine.parameters = parameters;
        machine.threads = threads;
        machine.seed = seed;
        machine.random = seed * 0x9E3779B97F4A7C15 + 1;
        blockDim = {threads, 1, 1};
        gridDim = {grid_x, grid_y, 1};
        const Range shared = shared_memory();
        order.shared = shared.start;
        order.shared_bytes = shared.bytes;
        order.stacks = machine.stacks;
        order.stacks_bytes = (STACK_BYTES + 4096) * THREADS_MAX;
        ++order.launch;
        order.running = true;
        const uint64_t blocks = uint64_t(grid_x) * grid_y;
        for (uint64_t i = 0; i < blocks && machine.error.empty(); ++i) {
            const uint64_t block = seed == 1 ? blocks - 1 - i : i;
            blockIdx = {unsigned(block % grid_x), unsigned(block / grid_x), 0};
            run_block(shared);
        }
        order.running = false;
    }
    if (machine.error.empty()) return nullptr;
    machine.faults.push_back(machine.error);
    return machine.faults.back().c_str();
}

// How many parameters a kernel takes; -1: there is none of that name.
extern "C" int simt_parameters(const char* name) {
    const auto kernel = simt::kernels().find(name);
    return kernel == simt::kernels().end() ? -1 : int(kernel->second.parameter_bytes.size());
}

extern "C" size_t simt_parameter_bytes(const char* name, int number) {
    return simt::kernels().at(name).parameter_bytes.at(size_t(number));
}
