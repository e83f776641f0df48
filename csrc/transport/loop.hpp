#pragma once
// One event-loop thread: epoll, tasks from other threads, timers. Everything that a link owns is
// touched on this thread only.

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

#include "transport/socket.hpp"

namespace kvwire {

class Loop {
public:
    using Task = std::function<void()>;
    using TimerKey = std::pair<uint64_t, uint64_t>;  // due, serial

    class Handler {
    public:
        virtual ~Handler() = default;
        virtual void on_events(uint32_t epoll_events) = 0;
    };

    Loop();
    ~Loop();  // stops and joins, after the tasks posted by then

    // From any thread. False (and the task is dropped) when the loop has stopped.
    bool post(Task task);
    // Runs `task` on the loop and waits for it; on the loop's own thread runs it at once. What it
    // throws is thrown here.
    bool call(const Task& task);

    // On the loop thread only. A watched handler is kept alive until unwatch().
    void watch(const Fd& fd, uint32_t epoll_events, std::shared_ptr<Handler> handler);
    void modify(const Fd& fd, uint32_t epoll_events);
    void unwatch(const Fd& fd);
    TimerKey timer(uint64_t due_ns, Task task);
    void cancel(const TimerKey& key);

    static uint64_t now_ns();
    void stop();
    bool forked() const { return ::getpid() != process_; }
    uint64_t internal_errors() const { return internal_errors_; }

private:
    void run();
    void guarded(const Task& task);
    void run_tasks();
    int run_timers();  // milliseconds until the next one, -1: none

    Fd epoll_, wake_;
    std::mutex mutex_;
    std::vector<Task> tasks_;
    bool stopped_ = false;
    std::atomic<bool> stopping_{false};
    std::atomic<uint64_t> internal_errors_{0};
    const pid_t process_ = ::getpid();
    struct Watch { uint64_t serial; std::shared_ptr<Handler> handler; };
    std::map<int, Watch> watches_;
    uint64_t serial_ = 0;
    std::map<TimerKey, Task> timers_;
    std::unique_ptr<std::thread> thread_;
};

}  // namespace kvwire
