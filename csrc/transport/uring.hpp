#pragma once
// io_uring by its system calls, as much of it as the poller needs: one ring, one submitting thread.

#if __has_include(<linux/io_uring.h>) && __has_include(<sys/syscall.h>)
#include <linux/io_uring.h>
#include <sys/syscall.h>
#endif

#if defined(IORING_SETUP_DEFER_TASKRUN) && defined(__NR_io_uring_setup)
#define KVWIRE_HAS_URING 1

#include <cstddef>
#include <cstdint>
#include <string>

#include "transport/socket.hpp"

namespace kvwire {

class Uring {
public:
    explicit Uring(unsigned entries);  // throws RESOURCES_EXHAUSTED: there is none to be had
    ~Uring();
    Uring(const Uring&) = delete;

    // By the thread that is to be the only one to call what follows.
    void enable();
    // Cleared, to be filled in; null when the queue is full: submit() first.
    io_uring_sqe* next();
    void submit();
    // Submits, and waits for a completion; -1: for ever.
    void submit_and_wait(int timeout_ms);
    // Calls take(cqe) for each completion, up to `most`.
    template <class Take>
    void reap(size_t most, Take&& take);

    // From any thread: all that was queued before the call has reached the kernel.
    bool is_submitted() const;

private:
    void enter(unsigned wait_for, unsigned flags, const void* argument, size_t argument_bytes);

    Fd fd_;
    uint8_t* rings_ = nullptr;
    size_t rings_bytes_ = 0, sqes_bytes_ = 0;
    io_uring_sqe* sqes_ = nullptr;
    io_uring_cqe* cqes_ = nullptr;
    // Tails are the producer's: ours for submissions, the kernel's for completions.
    uint32_t *sq_head_ = nullptr, *sq_tail_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
    uint32_t sq_mask_ = 0, cq_mask_ = 0;
};

template <class Take>
void Uring::reap(size_t most, Take&& take) {
    uint32_t head = *cq_head_;
    const uint32_t tail = __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE);
    for (; head != tail && most > 0; ++head, --most) take(cqes_[head & cq_mask_]);
    __atomic_store_n(cq_head_, head, __ATOMIC_RELEASE);
}

}  // namespace kvwire

#endif
