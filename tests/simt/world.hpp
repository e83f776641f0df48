// What tests/simt/libcuda.cpp keeps: devices, memory between red zones, streams with a thread
// each, events. One lock for all of it, which no work of a stream is done under.
#pragma once

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cuda_types.hpp"

namespace {

constexpr int DEVICES = 2;
constexpr size_t RED_BYTES = 256, QUARANTINE_BYTES = 256 << 20;
constexpr unsigned char RED = 0xE1, FREED = 0xDD, FRESH = 0xCB;

struct Task {
    std::function<CUresult(bool lost)> run;
    std::vector<uint64_t> touches;  // addresses inside what it reads and writes
};

struct Stream {
    int device;
    std::deque<Task> tasks;  // the first may be running
    bool closing = false;
    uint64_t random;
};

struct Event {
    int device;
    unsigned flags;
    uint64_t recorded = 0, reached = 0;
    double reached_s = 0;
};

struct Function {
    std::string name;
    int device;
};

struct Memory {
    unsigned char* room;  // from the first red zone on
    size_t bytes;
    bool pinned;
};

struct Device {
    CUresult lost = SUCCESS;  // what all calls answer from then on
    int retained = 0;
    std::shared_ptr<Stream> default_stream;
};

struct Fail {
    std::string name;  // of a call; "*": any
    int left;
    CUresult code;
};

struct World {
    std::mutex lock;
    std::condition_variable changed;
    bool initialised = false;
    Device devices[DEVICES];
    std::map<uint64_t, Memory> memory, freed;  // by address
    std::deque<uint64_t> quarantine;
    size_t quarantine_bytes = 0;
    std::map<uint64_t, std::shared_ptr<Stream>> streams;
    int closing = 0;  // streams that were destroyed and may have still to do
    std::map<uint64_t, std::shared_ptr<Event>> events;
    std::map<uint64_t, int> modules;  // the device of each
    std::map<uint64_t, Function> functions;
    uint64_t next_handle = 0x10000;  // never given twice, and nothing lies there
    std::vector<Fail> fails;
    unsigned slow_us = 0;  // at least, before each piece of work
    std::string faults;  // of the caller, a line each
    std::map<std::string, int> calls;
    pthread_key_t contexts;  // of each thread: a stack of devices
};
World& world = *new World;  // threads outlive main()

template <class Handle>
uint64_t number(Handle handle) { return uint64_t(uintptr_t(handle)); }
template <class Handle>
Handle handle_of(uint64_t given) { return reinterpret_cast<Handle>(uintptr_t(given)); }
uint64_t new_handle() { return world.next_handle += 16; }

CUcontext context_of(int device) { return handle_of<CUcontext>(0xC0000 + uint64_t(device)); }

// The device of a context; -1: there is none, or nobody holds it.
int device_of(CUcontext context) {
    for (int device = 0; device < DEVICES; ++device)
        if (context == context_of(device) && world.devices[device].retained > 0) return device;
    return -1;
}

std::vector<int>& stack_of_thread() {
    auto* stack = static_cast<std::vector<int>*>(pthread_getspecific(world.contexts));
    if (!stack) {
        stack = new std::vector<int>;
        pthread_setspecific(world.contexts, stack);
    }
    return *stack;
}

void note(const std::string& fault) { world.faults += fault + "\n"; }

// ---- memory

using Found = std::map<uint64_t, Memory>::iterator;

// What of `held` has all of [address, address + bytes) inside; its end: nothing.
Found find(std::map<uint64_t, Memory>& held, uint64_t address, size_t bytes) {
    Found after = held.upper_bound(address);
    if (after == held.begin()) return held.end();
    const Found found = std::prev(after);
    const bool inside = address - found->first <= found->second.bytes &&
                        bytes <= found->second.bytes - (address - found->first);
    return inside ? found : held.end();
}

bool on_device(uint64_t address, size_t bytes) {
    const Found found = find(world.memory, address, bytes);
    return found != world.memory.end() && !found->second.pinned;
}

bool is_pinned(const void* room, size_t bytes) {
    const Found found = find(world.memory, number(room), bytes);
    return found != world.memory.end() && found->second.pinned;
}

uint64_t allocate(size_t bytes, bool pinned) {
    const size_t padded = (bytes + RED_BYTES - 1) / RED_BYTES * RED_BYTES;
    auto* const room =
        static_cast<unsigned char*>(aligned_alloc(RED_BYTES, padded + 2 * RED_BYTES));
    if (!room) return 0;
    memset(room, RED, padded + 2 * RED_BYTES);
    memset(room + RED_BYTES, FRESH, bytes);
    world.memory[number(room + RED_BYTES)] = {room, bytes, pinned};
    return number(room + RED_BYTES);
}

void check_red(const char* where, uint64_t address, const Memory& memory) {
    const size_t end = (memory.bytes + RED_BYTES - 1) / RED_BYTES * RED_BYTES + 2 * RED_BYTES;
    for (size_t at = 0; at < end; ++at) {
        if (at == RED_BYTES) at += memory.bytes;
        if (at < end && memory.room[at] != RED) {
            char text[160];
            snprintf(text, sizeof(text), "%s: written %td bytes from the start of %zu at %#zx",
                     where, ptrdiff_t(at) - ptrdiff_t(RED_BYTES), memory.bytes, size_t(address));
            note(text);
            return;
        }
    }
}

// Gives memory back. What a lost context was about to do with it no longer counts, but may go on.
CUresult release(const char* where, uint64_t address, bool pinned, bool lost) {
    const Found found = world.memory.find(address);
    if (found == world.memory.end() || found->second.pinned != pinned) {
        note(std::string(where) + (world.freed.count(address) ? ": freed twice"
                                                              : ": no such memory"));
        return INVALID_VALUE;
    }
    const auto busy = [&](const Stream& stream) {
        for (const Task& task : stream.tasks)
            for (uint64_t touched : task.touches)
                if (find(world.memory, touched, 0) == found) return true;
        return false;
    };
    bool in_use = false;
    for (auto& each : world.streams) in_use |= busy(*each.second);
    for (Device& each : world.devices)
        in_use |= each.default_stream && busy(*each.default_stream);
    if (in_use && !lost) note(std::string(where) + ": freed while work on it is enqueued");
    check_red(where, address, found->second);
    if (!lost) memset(found->second.room + RED_BYTES, FREED, found->second.bytes);
    world.quarantine.push_back(address);
    world.quarantine_bytes += found->second.bytes;
    world.freed[address] = found->second;
    world.memory.erase(found);
    while (world.quarantine_bytes > QUARANTINE_BYTES) {
        const Memory oldest = world.freed[world.quarantine.front()];
        world.freed.erase(world.quarantine.front());
        world.quarantine.pop_front();
        world.quarantine_bytes -= oldest.bytes;
        free(oldest.room);
    }
    return SUCCESS;
}

// ---- streams

double now_s() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return double(now.tv_sec) + double(now.tv_nsec) / 1e9;
}

void work(std::shared_ptr<Stream> stream) {
    std::unique_lock<std::mutex> lock(world.lock);
    for (;;) {
        world.changed.wait(lock, [&] { return stream->closing || !stream->tasks.empty(); });
        if (stream->tasks.empty()) {
            --world.closing;
            world.changed.notify_all();
            return;
        }
        const bool lost = world.devices[stream->device].lost != SUCCESS;
        stream->random = stream->random * 6364136223846793005 + 1442695040888963407;
        const unsigned late = unsigned(stream->random >> 40);
        const unsigned wait_us = world.slow_us + (late % 4 == 0 ? late / 4 % 500 : 0);
        lock.unlock();
        if (wait_us) usleep(wait_us);
        const CUresult result = stream->tasks.front().run(lost);
        lock.lock();
        if (result && !lost) world.devices[stream->device].lost = result;
        stream->tasks.pop_front();
        world.changed.notify_all();
    }
}

std::shared_ptr<Stream> new_stream(int device) {
    auto stream = std::make_shared<Stream>();
    stream->device = device;
    stream->random = new_handle();
    std::thread(work, stream).detach();
    return stream;
}

void enqueue(Stream& stream, std::function<CUresult(bool)> run,
             std::vector<uint64_t> touches = {}) {
    stream.tasks.push_back({std::move(run), std::move(touches)});
    world.changed.notify_all();
}

// Waits for all of a stream, or until the device is lost.
void drain(std::unique_lock<std::mutex>& lock, Stream& stream) {
    world.changed.wait(lock, [&] { return stream.tasks.empty(); });
}

// ---- calls

// What every entry point begins with. `result`: what it must answer, where that is not SUCCESS.
struct Entry {
    std::unique_lock<std::mutex> lock{world.lock};
    const char* name;
    int device = -1;  // of the context that is current
    CUresult result = SUCCESS;

    explicit Entry(const char* name, bool needs_context = true) : name(name) {
        ++world.calls[name];
        const std::vector<int>& stack = stack_of_thread();
        if (!stack.empty()) device = stack.back();
        if (!world.initialised) {
            refuse(NOT_INITIALISED, "cuInit was not called");
        } else if (needs_context && device < 0) {
            refuse(INVALID_CONTEXT, "no context is current on this thread");
        } else if (needs_context && world.devices[device].lost) {
            result = world.devices[device].lost;
        } else {
            inject(needs_context);
        }
    }

    void inject(bool in_context) {
        for (Fail& fail : world.fails) {
            const bool meant = fail.name == name || (fail.name == "*" && in_context);
            if (!meant || --fail.left != 0) continue;
            result = fail.code;
            if (fail.code >= ILLEGAL_ADDRESS && device >= 0)
                world.devices[device].lost = fail.code;
        }
    }

    CUresult refuse(CUresult code, const char* why) {
        note(std::string(name) + ": " + std::to_string(code) + ": " + why);
        return result = code;
    }

    // The stream of a handle, which must be of the current context; null: refused.
    std::shared_ptr<Stream> stream(CUstream handle) {
        if (!handle) {
            std::shared_ptr<Stream>& stream = world.devices[device].default_stream;
            if (!stream) stream = new_stream(device);
            return stream;
        }
        const auto found = world.streams.find(number(handle));
        if (found == world.streams.end()) {
            refuse(INVALID_HANDLE, "no such stream");
        } else if (found->second->device != device) {
            refuse(INVALID_HANDLE, "a stream of another context");
        } else {
            return found->second;
        }
        return nullptr;
    }

    std::shared_ptr<Event> event(CUevent handle) {
        const auto found = world.events.find(number(handle));
        if (found != world.events.end()) return found->second;
        refuse(INVALID_HANDLE, "no such event");
        return nullptr;
    }

    // Whether device memory is where it is said to be, and host memory is none of a device.
    bool has_device(uint64_t address, size_t bytes) {
        if (bytes == 0 || on_device(address, bytes)) return true;
        refuse(INVALID_VALUE, "not inside device memory");
        return false;
    }
    bool has_host(const void* room, size_t bytes) {
        if (bytes == 0 || (room && !on_device(number(room), 0))) return true;
        refuse(INVALID_VALUE, "not in host memory");
        return false;
    }
};

#define ENTER(...)            \
    Entry entry(__VA_ARGS__); \
    if (entry.result) return entry.result

}  // namespace
