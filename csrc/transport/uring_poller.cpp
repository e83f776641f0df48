#include "transport/poller.hpp"
#include "transport/uring.hpp"

#ifdef KVWIRE_HAS_URING

#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace kvwire {
namespace {

constexpr unsigned ENTRIES = 256;
constexpr uint64_t REMOVAL_KEY = 1;

// One poll request per watched descriptor, asked for again after each event: the kernel looks anew
// then, which makes it level-triggered. Only the waiting thread talks to the ring; the others leave
// word in `dirty_` and `removed_`, which go out with its next wait, in the same system call.
class UringPoller : public Poller {
public:
    UringPoller() : ring_(ENTRIES), wake_(::eventfd(0, EFD_CLOEXEC)) {
        if (!wake_) throw Error(ErrorCode::RESOURCES_EXHAUSTED, "eventfd: " + error_text(errno));
    }
    const char* name() const override { return "io_uring"; }

    void watch(int fd, uint64_t key, uint32_t events) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        watches_[key] = {fd, events, 0};
        touch(key);
    }

    void modify(int fd, uint64_t key, uint32_t events) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        Watch& watch = watches_.at(key);
        watch = {fd, events, watch.asked};
        // What is no longer wanted is left out when it comes.
        if (events & ~watch.asked) touch(key);
    }

    void unwatch(int, uint64_t key) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = watches_.find(key);
        if (found == watches_.end()) return;
        const bool asked = found->second.asked != 0;
        watches_.erase(found);
        // A request on its way names the descriptor by its number, which is free from now on.
        while (!ring_.is_submitted()) ::sched_yield();
        if (!asked) return;
        removed_.push_back(key);  // until then the kernel keeps the connection open
        if (waiting_) wake();
    }

    void wake() override {
        const uint64_t one = 1;
        (void)!::write(wake_.get(), &one, sizeof one);
    }

    size_t wait(Event* events, int timeout_ms) override {
        if (!std::exchange(enabled_, true)) ring_.enable();
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            request();
            waiting_ = true;
        }
        ring_.submit_and_wait(timeout_ms);
        const std::lock_guard<std::mutex> lock(mutex_);
        waiting_ = false;
        while (!ring_.is_submitted()) ring_.submit();  // the kernel had no memory for it
        size_t told = 0;
        ring_.reap(EVENTS_MAX, [&](const io_uring_cqe& cqe) {
            if (cqe.user_data == WAKE_KEY) {
                wake_asked_ = false;
                events[told++] = {WAKE_KEY, EPOLLIN};
            }
            if (cqe.user_data < KEY_MIN) return;
            const auto found = watches_.find(cqe.user_data);
            if (found == watches_.end()) return;
            Watch& watch = found->second;
            watch.asked = 0;
            dirty_.push_back(cqe.user_data);
            if (cqe.res == -ECANCELED) return;
            const uint32_t happened = cqe.res < 0 ? uint32_t(EPOLLERR) : uint32_t(cqe.res);
            const uint32_t wanted = happened & (watch.events | EPOLLERR | EPOLLHUP);
            if (wanted) events[told++] = {cqe.user_data, wanted};
        });
        return told;
    }

private:
    // Errors and hang-ups are always told, so that 0 can stand for "not asked for".
    static constexpr uint32_t ALWAYS = EPOLLERR | EPOLLHUP;
    struct Watch {
        int fd = -1;
        uint32_t events = 0;
        uint32_t asked = 0;  // the events of the request that is with the kernel, or 0
    };

    void touch(uint64_t key) {
        dirty_.push_back(key);
        if (waiting_) wake();
    }

    io_uring_sqe& sqe(uint8_t operation, uint64_t key) {
        io_uring_sqe* next = ring_.next();
        while (!next) {
            ring_.submit();
            next = ring_.next();
        }
        next->opcode = operation;
        next->user_data = key;
        return *next;
    }

    void request() {
        for (const uint64_t key : removed_) sqe(IORING_OP_POLL_REMOVE, REMOVAL_KEY).addr = key;
        removed_.clear();
        for (const uint64_t key : dirty_) {
            const auto found = watches_.find(key);
            if (found == watches_.end()) continue;
            Watch& watch = found->second;
            const uint32_t wanted = watch.events | ALWAYS;
            if ((wanted & ~watch.asked) == 0) continue;
            if (watch.asked == 0) {
                io_uring_sqe& add = sqe(IORING_OP_POLL_ADD, key);
                add.fd = watch.fd;
                add.poll32_events = wanted;
            } else {
                // Too late for it, an event is coming: then it is asked for anew in any case.
                io_uring_sqe& update = sqe(IORING_OP_POLL_REMOVE, REMOVAL_KEY);
                update.addr = key;
                update.len = IORING_POLL_UPDATE_EVENTS;
                update.poll32_events = wanted;
            }
            watch.asked = wanted;
        }
        dirty_.clear();
        if (wake_asked_) return;
        wake_asked_ = true;
        io_uring_sqe& read = sqe(IORING_OP_READ, WAKE_KEY);
        read.fd = wake_.get();
        read.addr = reinterpret_cast<uintptr_t>(&wakes_);
        read.len = sizeof wakes_;
    }

    Uring ring_;
    Fd wake_;
    uint64_t wakes_ = 0;  // the kernel reads the eventfd into it
    std::mutex mutex_;    // for what follows
    std::unordered_map<uint64_t, Watch> watches_;
    std::vector<uint64_t> dirty_, removed_;
    bool waiting_ = false;
    bool wake_asked_ = false, enabled_ = false;  // the waiting thread's own
};

}  // namespace

std::unique_ptr<Poller> make_uring_poller(std::string* note) {
    try {
        return std::make_unique<UringPoller>();
    } catch (const Error& error) {
        *note = error.message;
        return nullptr;
    }
}

}  // namespace kvwire

#else

namespace kvwire {

std::unique_ptr<Poller> make_uring_poller(std::string* note) {
    *note = "no io_uring: built without the kernel's headers of it (6.1 or later)";
    return nullptr;
}

}  // namespace kvwire

#endif
