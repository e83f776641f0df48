#pragma once
// The I/O threads of an endpoint: each a loop that lanes are dealt to, and one lock for all that
// they share. Timers and posted tasks run on the first of them, with the lock held.

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <sys/types.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "transport/affinity.hpp"
#include "transport/poller.hpp"
#include "transport/socket.hpp"

namespace kvwire {

class Loops;

// Something with waiting threads. They are woken once the lock is free, so as not to run into it.
class Notified {
public:
    virtual ~Notified() = default;
    virtual void notify() = 0;  // without the lock, from any thread

private:
    friend class Loops;
    friend class Lock;
    bool is_queued_ = false;
};

// The lock of an endpoint. Letting go of it wakes those who wait for what was done under it.
class Lock {
public:
    explicit Lock(Loops& loops) : loops_(loops) { lock(); }
    ~Lock() { unlock(); }
    Lock(const Lock&) = delete;
    void lock();
    void unlock();

private:
    Loops& loops_;
};

class Loop {
public:
    class Handler {
    public:
        virtual ~Handler() = default;
        virtual void on_events(uint32_t epoll_events) = 0;  // without the lock
    };

    Loop();
    ~Loop();

    // From any thread. A watched handler is kept alive until unwatch(); an event that was on its
    // way may still reach it afterwards.
    void watch(const Fd& fd, uint32_t epoll_events, std::shared_ptr<Handler> handler);
    void modify(const Fd& fd, uint32_t epoll_events);
    void unwatch(const Fd& fd);
    void wake();
    // So many bytes were sent or received for a handler; from any thread.
    void moved(size_t bytes) { moved_bytes_.fetch_add(bytes, std::memory_order_relaxed); }

    // On its own thread: the bytes that it reads come in on this core.
    void follow(int core);

    // Runs until stop(). `between` is called before each wait and returns how long that may last,
    // in milliseconds, -1: for ever.
    void start(std::function<int()> between);
    void stop();     // and joins
    void abandon();  // in a forked child, where the thread does not exist
    uint64_t internal_errors() const { return internal_errors_; }
    const char* poller_name() const { return poller_->name(); }
    const std::string& poller_note() const { return poller_note_; }

    // Runs `step`. An error that reaches this far is a bug of ours, or no memory: the thread, and
    // all other transfers, outlive it.
    void guarded(const std::function<void()>& step);

private:
    void run(const std::function<int()>& between);
    size_t wait(Poller::Event* events, int wait_ms);
    std::shared_ptr<Handler> find(uint64_t key);

    std::string poller_note_;
    const std::unique_ptr<Poller> poller_;
    std::atomic<bool> stopping_{false};
    std::atomic<uint64_t> internal_errors_{0};
    std::atomic<size_t> moved_bytes_{0};  // since the last wait
    uint64_t polls_from_ns_ = 0;          // not before: this loop is busy with bulk
    Affinity affinity_;
    struct Watch { uint64_t key; std::shared_ptr<Handler> handler; };
    std::mutex watches_mutex_;
    std::map<int, Watch> watches_;
    uint64_t serial_ = 0;
    std::unique_ptr<std::thread> thread_;
};

class Loops {
public:
    using Task = std::function<void()>;
    using TimerKey = std::pair<uint64_t, uint64_t>;  // due, serial

    explicit Loops(size_t threads);
    ~Loops();  // stops and joins, after the tasks posted by then

    // Without the lock: takes it and runs `task` here. False (and it is not run) when stopped.
    bool call(const Task& task);
    // Inside a call(): `task` runs when that has let go of the lock, in the same thread. False
    // elsewhere.
    bool after_call(Task task);

    // With the lock.
    void notify_later(std::shared_ptr<Notified> notified);
    void post(Task task);
    TimerKey timer(uint64_t due_ns, Task task);
    void cancel(const TimerKey& key);
    Loop& next();            // lanes are dealt in turn
    Loop& first() { return *loops_.front(); }

    static uint64_t now_ns();
    void stop();             // without the lock, from none of the threads
    bool forked() const { return ::getpid() != process_; }
    uint64_t internal_errors() const;

private:
    friend class Lock;
    int run_due();  // tasks and timers; milliseconds until the next timer
    void run_tasks();

    std::mutex mutex_;
    std::vector<std::unique_ptr<Loop>> loops_;
    size_t dealt_ = 0;
    std::vector<Task>* after_call_ = nullptr;
    std::vector<std::shared_ptr<Notified>> to_notify_;
    std::vector<Task> tasks_;
    std::map<TimerKey, Task> timers_;
    uint64_t serial_ = 0;
    uint64_t waits_until_ns_ = 0;  // the first loop: 0 while it does not wait
    bool stopped_ = false;
    const pid_t process_ = ::getpid();
};

}  // namespace kvwire
