#pragma once
// How a loop waits: for readiness of descriptors, level-triggered, by epoll or by io_uring.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace kvwire {

class Poller {
public:
    static constexpr size_t EVENTS_MAX = 64;
    static constexpr uint64_t WAKE_KEY = 0, KEY_MIN = uint64_t(1) << 32;
    struct Event {
        uint64_t key;
        uint32_t events;  // EPOLLIN and so on
    };

    virtual ~Poller() = default;
    virtual const char* name() const = 0;

    // From any thread, but not two at once. Keys, from KEY_MIN up, are never used again. After
    // unwatch() the descriptor may be closed; an event that was on its way may still come.
    virtual void watch(int fd, uint64_t key, uint32_t events) = 0;
    virtual void modify(int fd, uint64_t key, uint32_t events) = 0;
    virtual void unwatch(int fd, uint64_t key) = 0;
    virtual void wake() = 0;  // from any thread, at any time: an event with WAKE_KEY

    // By one thread, for ever the same. Returns how many events there are, up to EVENTS_MAX.
    virtual size_t wait(Event* events, int timeout_ms) = 0;
};

// As KVWIRE_IO says, "epoll" or "io_uring"; by default epoll. Where the system does not let us have
// what it names, `*note` says so and it is epoll. Throws USAGE when it names something else.
std::unique_ptr<Poller> make_poller(std::string* note);

// Null, and `*note` says why, where the kernel or a sandbox forbids it or the build lacks it.
std::unique_ptr<Poller> make_uring_poller(std::string* note);

}  // namespace kvwire
