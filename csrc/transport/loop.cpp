#include "transport/loop.hpp"

#include <csignal>
#include <sched.h>
#include <ctime>
#include <exception>
#include <sys/prctl.h>
#include <system_error>
#include <utility>

namespace kvwire {
namespace {
constexpr uint64_t FOR_EVER = ~uint64_t(0);

// After an event of few bytes another is likely to follow at once (a round trip), and a sleeping
// core takes longer to wake than both ends to answer: so the loop polls for a moment before it
// sleeps. Amid bulk transfers, where it would only take time from others, it does not.
constexpr uint64_t POLL_NS = 50'000;
constexpr size_t BULK_BYTES = 64 << 10;
constexpr uint64_t BULK_NS = 2'000'000;
constexpr int LET_GO_MS = 100;
}  // namespace

Loop::Loop() : poller_(make_poller(&poller_note_)) {}

Loop::~Loop() { stop(); }

void Loop::start(std::function<int()> between) {
    try {
        thread_ = std::make_unique<std::thread>(
            [this, between = std::move(between)] { run(between); });
    } catch (const std::system_error& error) {
        throw Error(ErrorCode::RESOURCES_EXHAUSTED,
                    std::string("no thread to be had: ") + error.what());
    }
}

void Loop::wake() { poller_->wake(); }

void Loop::stop() {
    stopping_ = true;
    wake();
    if (thread_ && thread_->joinable()) thread_->join();
    watches_.clear();
}

void Loop::abandon() { (void)thread_.release(); }

void Loop::guarded(const std::function<void()>& step) {
    try {
        step();
    } catch (...) {
        ++internal_errors_;
    }
}

void Loop::watch(const Fd& fd, uint32_t epoll_events, std::shared_ptr<Handler> handler) {
    std::lock_guard<std::mutex> lock(watches_mutex_);
    Watch& watch = watches_[fd.get()];
    watch = {++serial_ << 32 | uint32_t(fd.get()), std::move(handler)};
    poller_->watch(fd.get(), watch.key, epoll_events);
}

void Loop::modify(const Fd& fd, uint32_t epoll_events) {
    std::lock_guard<std::mutex> lock(watches_mutex_);
    poller_->modify(fd.get(), watches_.at(fd.get()).key, epoll_events);
}

void Loop::unwatch(const Fd& fd) {
    std::shared_ptr<Handler> gone;  // dies after the lock
    std::lock_guard<std::mutex> lock(watches_mutex_);
    const auto found = watches_.find(fd.get());
    if (found == watches_.end()) return;
    gone = std::move(found->second.handler);
    poller_->unwatch(fd.get(), found->second.key);
    watches_.erase(found);
}

// Null: an earlier event of the batch has closed it, or another has taken its number.
std::shared_ptr<Loop::Handler> Loop::find(uint64_t key) {
    std::lock_guard<std::mutex> lock(watches_mutex_);
    const auto found = watches_.find(int(key & 0xFFFFFFFF));
    if (found == watches_.end() || found->second.key != key) return nullptr;
    return found->second.handler;
}

void Loop::run(const std::function<int()>& between) {
    // Signals are the application's business: none is to be handled here.
    sigset_t all;
    sigfillset(&all);
    ::pthread_sigmask(SIG_BLOCK, &all, nullptr);
    ::prctl(PR_SET_NAME, "kvwire-io");
    (void)std::uncaught_exceptions();  // what throwing needs is had now, not when memory is out
    Poller::Event events[Poller::EVENTS_MAX];
    while (!stopping_) {
        const size_t count = wait(events, between());
        for (size_t i = 0; i < count; ++i)
            if (const auto handler = find(events[i].key))
                guarded([&] { handler->on_events(events[i].events); });
    }
    poller_->wait(events, 0);  // lets go of what was unwatched last
}

size_t Loop::wait(Poller::Event* events, int wait_ms) {
    const uint64_t start_ns = Loops::now_ns();
    const size_t moved_bytes = moved_bytes_.exchange(0, std::memory_order_relaxed);
    if (moved_bytes >= BULK_BYTES) polls_from_ns_ = start_ns + BULK_NS;
    const bool polls = moved_bytes > 0 && start_ns >= polls_from_ns_;
    while (polls && Loops::now_ns() - start_ns < POLL_NS) {
        if (const size_t count = poller_->wait(events, 0)) return count;
        ::sched_yield();
    }
    if (affinity_.holds(start_ns) && (wait_ms < 0 || wait_ms > LET_GO_MS)) wait_ms = LET_GO_MS;
    return poller_->wait(events, wait_ms);
}

void Loop::follow(int core) { affinity_.follow(core, Loops::now_ns()); }

uint64_t Loops::now_ns() {
    timespec now;
    ::clock_gettime(CLOCK_MONOTONIC, &now);
    return uint64_t(now.tv_sec) * 1'000'000'000 + uint64_t(now.tv_nsec);
}

void Lock::lock() { loops_.mutex_.lock(); }

void Lock::unlock() {
    if (loops_.to_notify_.empty()) return loops_.mutex_.unlock();
    std::vector<std::shared_ptr<Notified>> notified;
    notified.swap(loops_.to_notify_);
    for (const auto& each : notified) each->is_queued_ = false;
    loops_.mutex_.unlock();
    for (const auto& each : notified) each->notify();
}

void Loops::notify_later(std::shared_ptr<Notified> notified) {
    if (notified->is_queued_) return;
    notified->is_queued_ = true;
    to_notify_.push_back(std::move(notified));
}

Loops::Loops(size_t threads) {
    for (size_t i = 0; i < threads; ++i) {
        try {
            auto loop = std::make_unique<Loop>();
            if (i > 0) loop->start([] { return -1; });
            loops_.push_back(std::move(loop));
        } catch (const Error&) {
            if (i == 0) throw;
            break;  // fewer will do
        }
    }
    first().start([this] { return run_due(); });
}

Loops::~Loops() { stop(); }

void Loops::stop() {
    if (forked()) {
        for (auto& loop : loops_) loop->abandon();
        return;
    }
    for (auto& loop : loops_) loop->stop();
    Lock lock(*this);
    while (!tasks_.empty()) run_tasks();
    stopped_ = true;
    (void)std::exchange(timers_, {});  // what they hold may cancel others as it goes
}

bool Loops::call(const Task& task) {
    if (forked()) return false;  // the lock may be a lost thread's for ever
    std::vector<Task> after;
    struct Guard {
        ~Guard() { after_call = nullptr; }
        std::vector<Task>*& after_call;
    };
    {
        Lock lock(*this);
        if (stopped_) return false;
        const Guard guard{after_call_};
        after_call_ = &after;
        task();
    }
    for (Task& each : after) each();
    return true;
}

bool Loops::after_call(Task task) {
    if (!after_call_) return false;
    after_call_->push_back(std::move(task));
    return true;
}

void Loops::post(Task task) {
    tasks_.push_back(std::move(task));
    if (tasks_.size() == 1) first().wake();
}

Loops::TimerKey Loops::timer(uint64_t due_ns, Task task) {
    const TimerKey key{due_ns, ++serial_};
    timers_.emplace(key, std::move(task));
    if (due_ns < waits_until_ns_) first().wake();
    return key;
}

void Loops::cancel(const TimerKey& key) { timers_.erase(key); }

Loop& Loops::next() { return *loops_[dealt_++ % loops_.size()]; }

uint64_t Loops::internal_errors() const {
    uint64_t errors = 0;
    for (const auto& loop : loops_) errors += loop->internal_errors();
    return errors;
}

void Loops::run_tasks() {
    std::vector<Task> tasks;
    tasks.swap(tasks_);
    for (Task& task : tasks) {
        first().guarded(task);
        task = nullptr;  // what it holds dies before the next one runs
    }
}

int Loops::run_due() {
    Lock lock(*this);
    waits_until_ns_ = 0;
    run_tasks();
    while (!timers_.empty()) {
        const uint64_t now = now_ns();
        const auto first_due = timers_.begin();
        if (first_due->first.first > now) {
            waits_until_ns_ = first_due->first.first;
            const uint64_t wait_ms = (waits_until_ns_ - now) / 1'000'000 + 1;
            return tasks_.empty() ? int(wait_ms < 60'000 ? wait_ms : 60'000) : 0;
        }
        const Task task = std::move(first_due->second);
        timers_.erase(first_due);
        first().guarded(task);
    }
    waits_until_ns_ = FOR_EVER;
    return tasks_.empty() ? -1 : 0;
}

}  // namespace kvwire
