#include "transport/uring.hpp"

#ifdef KVWIRE_HAS_URING

#include <cerrno>
#include <csignal>
#include <cstring>
#include <linux/time_types.h>
#include <sys/mman.h>
#include <unistd.h>

namespace kvwire {
namespace {

// Completions are then posted only when the ring's own thread asks for them.
constexpr unsigned SETUP = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
                           IORING_SETUP_R_DISABLED | IORING_SETUP_SUBMIT_ALL;
constexpr unsigned NEEDED = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_EXT_ARG;

[[noreturn]] void refuse(const std::string& why) {
    throw Error(ErrorCode::RESOURCES_EXHAUSTED, "no io_uring: " + why);
}

std::string reason(int error) {
    if (error == EPERM) return "not permitted here (sysctl kernel.io_uring_disabled, or a sandbox)";
    if (error == ENOSYS) return "the kernel has none, or a sandbox hides it";
    if (error == EINVAL) return "the kernel is older than 6.1";
    return error_text(error);
}

}  // namespace

Uring::Uring(unsigned entries) {
    io_uring_params params{};
    params.flags = SETUP;
    fd_ = Fd(int(::syscall(__NR_io_uring_setup, entries, &params)));
    if (!fd_) refuse(reason(errno));
    if ((params.features & NEEDED) != NEEDED) refuse("the kernel's is incomplete");
    const size_t sq_bytes = params.sq_off.array + params.sq_entries * sizeof(uint32_t);
    const size_t cq_bytes = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
    rings_bytes_ = sq_bytes > cq_bytes ? sq_bytes : cq_bytes;
    sqes_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
    const auto map = [this](size_t bytes, uint64_t at) {
        return ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_.get(),
                      off_t(at));
    };
    void* rings = map(rings_bytes_, IORING_OFF_SQ_RING);
    if (rings == MAP_FAILED) refuse(reason(errno));
    rings_ = static_cast<uint8_t*>(rings);
    void* sqes = map(sqes_bytes_, IORING_OFF_SQES);
    if (sqes == MAP_FAILED) {
        const int error = errno;
        ::munmap(rings_, rings_bytes_);
        refuse(reason(error));
    }
    sqes_ = static_cast<io_uring_sqe*>(sqes);
    const auto at = [this](uint32_t offset) {
        return reinterpret_cast<uint32_t*>(rings_ + offset);
    };
    sq_head_ = at(params.sq_off.head);
    sq_tail_ = at(params.sq_off.tail);
    cq_head_ = at(params.cq_off.head);
    cq_tail_ = at(params.cq_off.tail);
    sq_mask_ = *at(params.sq_off.ring_mask);
    cq_mask_ = *at(params.cq_off.ring_mask);
    cqes_ = reinterpret_cast<io_uring_cqe*>(rings_ + params.cq_off.cqes);
    for (uint32_t i = 0; i < params.sq_entries; ++i) at(params.sq_off.array)[i] = i;
}

Uring::~Uring() {
    ::munmap(sqes_, sqes_bytes_);
    ::munmap(rings_, rings_bytes_);
}

void Uring::enable() {
    ::syscall(__NR_io_uring_register, fd_.get(), IORING_REGISTER_ENABLE_RINGS, nullptr, 0);
}

io_uring_sqe* Uring::next() {
    const uint32_t tail = *sq_tail_;
    if (tail - __atomic_load_n(sq_head_, __ATOMIC_ACQUIRE) > sq_mask_) return nullptr;
    io_uring_sqe* sqe = &sqes_[tail & sq_mask_];
    std::memset(sqe, 0, sizeof *sqe);
    __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
    return sqe;
}

bool Uring::is_submitted() const {
    return __atomic_load_n(sq_head_, __ATOMIC_ACQUIRE) ==
           __atomic_load_n(sq_tail_, __ATOMIC_ACQUIRE);
}

void Uring::enter(unsigned wait_for, unsigned flags, const void* argument, size_t argument_bytes) {
    const uint32_t queued = *sq_tail_ - __atomic_load_n(sq_head_, __ATOMIC_ACQUIRE);
    ::syscall(__NR_io_uring_enter, fd_.get(), queued, wait_for, flags, argument, argument_bytes);
}

void Uring::submit() { enter(0, 0, nullptr, 0); }

void Uring::submit_and_wait(int timeout_ms) {
    __kernel_timespec timeout{timeout_ms / 1000, (timeout_ms % 1000) * 1'000'000LL};
    io_uring_getevents_arg argument{};
    argument.sigmask_sz = _NSIG / 8;
    if (timeout_ms > 0) argument.ts = reinterpret_cast<uintptr_t>(&timeout);
    enter(timeout_ms != 0, IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG, &argument,
          sizeof argument);
}

}  // namespace kvwire

#endif
