#include "transport/loop.hpp"

#include <condition_variable>
#include <ctime>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <csignal>
#include <unistd.h>

namespace kvwire {
namespace {
constexpr int EVENTS_MAX = 64;
}

uint64_t Loop::now_ns() {
    timespec now;
    ::clock_gettime(CLOCK_MONOTONIC, &now);
    return uint64_t(now.tv_sec) * 1'000'000'000 + uint64_t(now.tv_nsec);
}

Loop::Loop()
    : epoll_(::epoll_create1(EPOLL_CLOEXEC)), wake_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
    if (!epoll_ || !wake_) throw Error(ErrorCode::INTERNAL, "no epoll or eventfd to be had");
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u64 = 0;
    ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, wake_.get(), &event);
    thread_ = std::make_unique<std::thread>([this] { run(); });
}

Loop::~Loop() { stop(); }

void Loop::stop() {
    if (::getpid() != process_) {  // after a fork the thread is the parent's: nothing to join
        (void)thread_.release();
        return;
    }
    stopping_ = true;
    const uint64_t one = 1;
    (void)!::write(wake_.get(), &one, sizeof one);
    if (thread_ && thread_->joinable()) thread_->join();
}

bool Loop::post(Task task) {
    bool wake;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (stopped_) return false;
        wake = tasks_.empty();
        tasks_.push_back(std::move(task));
    }
    if (wake) {
        const uint64_t one = 1;
        (void)!::write(wake_.get(), &one, sizeof one);
    }
    return true;
}

bool Loop::call(const Task& task) {
    if (thread_ && std::this_thread::get_id() == thread_->get_id()) {
        task();
        return true;
    }
    struct Sync {
        std::mutex mutex;
        std::condition_variable done;
        bool finished = false, ran = false;
        std::exception_ptr thrown;
    };
    // The waiter is released also when the loop drops the task unrun.
    struct Guard {
        explicit Guard(std::shared_ptr<Sync> s) : sync(std::move(s)) {}
        ~Guard() {
            std::lock_guard<std::mutex> lock(sync->mutex);
            sync->finished = true;
            sync->done.notify_all();
        }
        std::shared_ptr<Sync> sync;
    };
    const auto sync = std::make_shared<Sync>();
    auto guard = std::make_shared<Guard>(sync);
    const bool posted = post([&task, guard = std::move(guard)] {
        try {
            task();
        } catch (...) {
            guard->sync->thrown = std::current_exception();
        }
        std::lock_guard<std::mutex> lock(guard->sync->mutex);
        guard->sync->ran = true;
    });
    if (!posted) return false;
    std::unique_lock<std::mutex> lock(sync->mutex);
    sync->done.wait(lock, [&] { return sync->finished; });
    if (sync->thrown) std::rethrow_exception(sync->thrown);
    return sync->ran;
}

// An error that reaches this far is a bug of ours, or no memory: the thread, and all other
// transfers, outlive it.
void Loop::guarded(const Task& task) {
    try {
        task();
    } catch (...) {
        ++internal_errors_;
    }
}

void Loop::watch(const Fd& fd, uint32_t epoll_events, std::shared_ptr<Handler> handler) {
    Watch& watch = watches_[fd.get()];
    watch = {++serial_, std::move(handler)};
    epoll_event event{};
    event.events = epoll_events;
    event.data.u64 = watch.serial << 32 | uint32_t(fd.get());
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd.get(), &event) != 0)
        throw Error(ErrorCode::INTERNAL, "epoll_ctl: " + error_text(errno));
}

void Loop::modify(const Fd& fd, uint32_t epoll_events) {
    epoll_event event{};
    event.events = epoll_events;
    event.data.u64 = watches_.at(fd.get()).serial << 32 | uint32_t(fd.get());
    ::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, fd.get(), &event);
}

void Loop::unwatch(const Fd& fd) {
    if (!watches_.erase(fd.get())) return;
    ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd.get(), nullptr);
}

Loop::TimerKey Loop::timer(uint64_t due_ns, Task task) {
    const TimerKey key{due_ns, ++serial_};
    timers_.emplace(key, std::move(task));
    return key;
}

void Loop::cancel(const TimerKey& key) { timers_.erase(key); }

void Loop::run_tasks() {
    std::vector<Task> tasks;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        tasks.swap(tasks_);
    }
    for (Task& task : tasks) {
        guarded(task);
        task = nullptr;  // what it holds dies before the next one runs
    }
}

int Loop::run_timers() {
    while (!timers_.empty()) {
        const uint64_t now = now_ns();
        const auto first = timers_.begin();
        if (first->first.first > now) {
            const uint64_t wait_ms = (first->first.first - now) / 1'000'000 + 1;
            return int(wait_ms < 60'000 ? wait_ms : 60'000);
        }
        const Task task = std::move(first->second);
        timers_.erase(first);
        guarded(task);
    }
    return -1;
}

void Loop::run() {
    // Signals are the application's business: none is to be handled here.
    sigset_t all;
    sigfillset(&all);
    ::pthread_sigmask(SIG_BLOCK, &all, nullptr);
    ::prctl(PR_SET_NAME, "kvwire-io");
    epoll_event events[EVENTS_MAX];
    while (!stopping_) {
        const int wait_ms = run_timers();
        const int count = ::epoll_wait(epoll_.get(), events, EVENTS_MAX, wait_ms);
        for (int i = 0; i < count; ++i) {
            if (events[i].data.u64 == 0) {
                uint64_t ignored;
                (void)!::read(wake_.get(), &ignored, sizeof ignored);
                continue;
            }
            const int fd = int(events[i].data.u64 & 0xFFFFFFFF);
            const auto found = watches_.find(fd);
            // An earlier event of this batch may have closed it, or another have taken its number.
            if (found == watches_.end() || found->second.serial != events[i].data.u64 >> 32)
                continue;
            const std::shared_ptr<Handler> alive = found->second.handler;
            guarded([&] { alive->on_events(events[i].events); });
        }
        run_tasks();
    }
    for (bool left = true; left;) {
        run_tasks();
        std::lock_guard<std::mutex> lock(mutex_);
        left = !tasks_.empty();
        stopped_ = !left;
    }
    watches_.clear();
    timers_.clear();
}

}  // namespace kvwire
