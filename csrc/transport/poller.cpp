#include "transport/poller.hpp"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "transport/socket.hpp"

namespace kvwire {
namespace {

class EpollPoller : public Poller {
public:
    EpollPoller()
        : epoll_(::epoll_create1(EPOLL_CLOEXEC)), wake_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
        if (!epoll_ || !wake_)
            throw Error(ErrorCode::RESOURCES_EXHAUSTED,
                        "no epoll or eventfd to be had: " + error_text(errno));
        watch(wake_.get(), WAKE_KEY, EPOLLIN);
    }
    const char* name() const override { return "epoll"; }

    void watch(int fd, uint64_t key, uint32_t events) override {
        if (control(EPOLL_CTL_ADD, fd, key, events) != 0)
            throw Error(ErrorCode::INTERNAL, "epoll_ctl: " + error_text(errno));
    }
    void modify(int fd, uint64_t key, uint32_t events) override {
        control(EPOLL_CTL_MOD, fd, key, events);
    }
    void unwatch(int fd, uint64_t key) override { control(EPOLL_CTL_DEL, fd, key, 0); }

    void wake() override {
        const uint64_t one = 1;
        (void)!::write(wake_.get(), &one, sizeof one);
    }

    size_t wait(Event* events, int timeout_ms) override {
        epoll_event ready[EVENTS_MAX];
        const int count = ::epoll_wait(epoll_.get(), ready, EVENTS_MAX, timeout_ms);
        for (int i = 0; i < count; ++i) {
            events[i] = {ready[i].data.u64, ready[i].events};
            uint64_t ignored;
            if (events[i].key == WAKE_KEY) (void)!::read(wake_.get(), &ignored, sizeof ignored);
        }
        return count < 0 ? 0 : size_t(count);
    }

private:
    int control(int operation, int fd, uint64_t key, uint32_t events) {
        epoll_event event{};
        event.events = events;
        event.data.u64 = key;
        return ::epoll_ctl(epoll_.get(), operation, fd, &event);
    }

    Fd epoll_, wake_;
};

}  // namespace

std::unique_ptr<Poller> make_poller(std::string* note) {
    const char* wish = std::getenv("KVWIRE_IO");
    if (wish && std::strcmp(wish, "io_uring") == 0) {
        if (auto poller = make_uring_poller(note)) return poller;
    } else if (wish && *wish && std::strcmp(wish, "epoll") != 0) {
        throw Error(ErrorCode::USAGE, std::string("KVWIRE_IO is \"") + wish +
                                          "\"; it can be \"epoll\" or \"io_uring\"");
    }
    return std::make_unique<EpollPoller>();
}

}  // namespace kvwire
