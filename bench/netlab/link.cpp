// link serve CONTROL_FD SEED: two network namespaces joined by a link that can be made bad.
// link enter NAMESPACE PARENT_PID COMMAND..: runs a command in one, until it or the parent ends.
//
// It says {"left": fd, "right": fd} on the control socket (SOCK_SEQPACKET): its descriptors of the
// namespaces, each holding one TAP device "netlab". Then answers requests, one a datagram, until
// the other end is closed; namespaces and devices end with this process.

#include <fcntl.h>
#include <linux/if_tun.h>
#include <malloc.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <map>
#include <system_error>

#include "path.hpp"

namespace netlab {
namespace {

constexpr int kFramesPerTurn = 64;

[[noreturn]] void fail(const std::string& what) {
    throw std::system_error(errno, std::generic_category(), what);
}

int64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1'000'000'000LL + now.tv_nsec;
}

// One end: a network namespace and the TAP device in it.
struct End {
    int space = -1;
    int tap = -1;

    // Leaves the calling thread in the new namespace.
    void open() {
        if (unshare(CLONE_NEWNET) != 0) fail("unshare(CLONE_NEWNET)");
        space = ::open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
        if (space < 0) fail("/proc/thread-self/ns/net");
        tap = ::open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
        if (tap < 0) fail("/dev/net/tun");
        ifreq request{};
        std::strcpy(request.ifr_name, "netlab");
        request.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        if (ioctl(tap, TUNSETIFF, &request) != 0) fail("TUNSETIFF");
        if (ioctl(tap, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4) != 0) fail("TUNSETOFFLOAD");
    }
};

class Laboratory {
public:
    Laboratory(int control, uint64_t seed)
        : control_(control), paths_{Path(0, seed), Path(1, seed + 1)} {
        for (End& end : ends_) end.open();
        say("{\"left\":" + std::to_string(ends_[0].space) +
            ",\"right\":" + std::to_string(ends_[1].space) + "}");
    }

    void run() {
        while (!closed_) {
            for (int side : {0, 1}) deliver(side);
            for (int side : {0, 1}) receive(side);
            wait();
        }
    }

private:
    void wait() {
        pollfd polled[] = {
            {ends_[0].tap, POLLIN, 0}, {ends_[1].tap, POLLIN, 0}, {control_, POLLIN, 0}};
        const int64_t due = std::min(paths_[0].next_due_ns(), paths_[1].next_due_ns());
        const int64_t left = std::min<int64_t>(std::max<int64_t>(due - now_ns(), 0), 1'000'000'000);
        const timespec timeout{left / 1'000'000'000, left % 1'000'000'000};
        if (ppoll(polled, 3, &timeout, nullptr) < 0 && errno != EINTR) fail("ppoll");
        if (polled[2].revents != 0) answer();
    }

    void receive(int side) {
        for (int i = 0; i < kFramesPerTurn; ++i) {
            if (spare_ == nullptr) spare_ = new_frame(kFrameBytesMax);
            const ssize_t got = read(ends_[side].tap, spare_->data(), kFrameBytesMax);
            if (got < 0 && (errno == EAGAIN || errno == EIO)) return;  // EIO: not up yet
            if (got < 0) fail("reading a TAP device");
            FramePtr frame = shrunk(std::move(spare_), static_cast<size_t>(got));
            const Headers headers(*frame);
            Flow* flow = headers.tcp ? &flow_of(side, headers, *frame) : nullptr;
            if (flow != nullptr && flow->cut)
                reset(side, *flow);
            else
                paths_[side].take(std::move(frame), headers, flow, now_ns());
        }
    }

    void deliver(int side) {
        const int64_t now = now_ns();
        for (int i = 0; i < kFramesPerTurn; ++i) {
            const FramePtr frame = paths_[side].due(now);
            if (frame == nullptr) return;
            write_to(1 - side, *frame);
        }
    }

    void write_to(int side, Frame& frame) {
        if (write(ends_[side].tap, frame.data(), frame.bytes) < 0 && errno != EIO)
            fail("writing a TAP device");
    }

    Flow& flow_of(int side, const Headers& headers, Frame& frame) {
        const uint16_t ports[2] = {side == 0 ? headers.source_port : headers.destination_port,
                                   side == 0 ? headers.destination_port : headers.source_port};
        Flow& flow = flows_[static_cast<uint32_t>(ports[0]) << 16 | ports[1]];
        constexpr uint8_t kSyn = 0x02, kAck = 0x10;
        if ((headers.flags & (kSyn | kAck)) == kSyn) flow = Flow{};  // the ports serve a new one
        std::copy(ports, ports + 2, flow.ports);
        const size_t opening = std::min<size_t>(frame.bytes, sizeof flow.opening[side]);
        if (headers.tcp_at == kIpAt + sizeof(iphdr))
            std::memcpy(flow.opening[side], frame.data(), opening);
        return flow;
    }

    // Tell one end of a connection that it is no more.
    void reset(int side, const Flow& flow) {
        if (flow.opening[side][kIpAt] != 0) write_to(side, *reset_answering(flow.opening[side]));
    }

    void cut(const std::set<uint16_t>& ports) {
        for (auto& [key, flow] : flows_) {
            if (!ports.empty() && !flow.matches(ports)) continue;
            flow.cut = true;
            for (int side : {0, 1}) {
                paths_[side].cut(&flow);
                reset(side, flow);
            }
        }
    }

    void answer() {
        char text[4096];
        const ssize_t got = recv(control_, text, sizeof text, MSG_DONTWAIT);
        if (got < 0 && errno == EAGAIN) return;
        if (got <= 0) {
            closed_ = true;
            return;
        }
        std::istringstream words(std::string(text, static_cast<size_t>(got)));
        std::string verb;
        words >> verb;
        if (verb == "set") return configure(words);
        if (verb == "stats")
            return say("{\"left\":{" + paths_[0].json() + "},\"right\":{" + paths_[1].json() +
                       "}}");
        if (verb == "flow") return say(flow_json(words));
        if (verb == "flows") return say(ports_json());
        if (verb == "cut") {
            cut(ports_of(words));
            return say("{}");
        }
        say("{\"error\":\"unknown request " + verb + "\"}");
    }

    void configure(std::istringstream& words) {
        Settings settings;
        words >> settings.rate_bps >> settings.delay_ns >> settings.jitter_ns >> settings.loss >>
            settings.queue_bytes >> settings.blackhole;
        if (!words) return say("{\"error\":\"set needs six numbers, then ports\"}");
        settings.blackholed_ports = ports_of(words);
        for (Path& path : paths_) path.configure(settings);
        say("{}");
    }

    static std::set<uint16_t> ports_of(std::istringstream& words) {
        std::set<uint16_t> ports;
        for (unsigned port; words >> port;) ports.insert(static_cast<uint16_t>(port));
        return ports;
    }

    std::string flow_json(std::istringstream& words) {
        uint32_t left = 0, right = 0;
        words >> left >> right;
        const auto found = flows_.find(left << 16 | right);
        if (found == flows_.end()) return "{\"error\":\"no such connection\"}";
        const Flow& flow = found->second;
        return "{\"left\":{" + flow.count[0].json() + "},\"right\":{" + flow.count[1].json() + "}}";
    }

    // The latest come first: all may be more than a datagram holds.
    std::string ports_json() const {
        std::string text = "[";
        for (const auto& [key, flow] : flows_) {
            if (text.size() > 60'000) break;
            text += (text.size() > 1 ? ",[" : "[") + std::to_string(key >> 16) + "," +
                    std::to_string(key & 0xFFFF) + "]";
        }
        return text + "]";
    }

    void say(const std::string& text) {
        if (send(control_, text.data(), text.size(), MSG_NOSIGNAL) < 0) closed_ = true;
    }

    const int control_;
    bool closed_ = false;
    End ends_[2];
    Path paths_[2];
    std::map<uint32_t, Flow> flows_;  // by left port, right port; frames point into it
    FramePtr spare_;
};

int serve(int control, uint64_t seed) {
    // Heap blocks, not mappings, for frames in flight: fresh pages cost more than the copy.
    mallopt(M_MMAP_THRESHOLD, 1 << 25);
    mallopt(M_TRIM_THRESHOLD, 1 << 29);
    // A wire does not wait for a core; without the permission it does.
    const sched_param first{1};
    sched_setscheduler(0, SCHED_RR, &first);
    Laboratory(control, seed).run();
    return 0;
}

int enter(const char* space, int parent, char** command) {
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0) fail("PR_SET_PDEATHSIG");
    if (getppid() != parent) return 1;  // it died before it could be watched
    const int descriptor = open(space, O_RDONLY | O_CLOEXEC);
    if (descriptor < 0 || setns(descriptor, CLONE_NEWNET) != 0) fail(space);
    execvp(command[0], command);
    fail(command[0]);
}

int run(int count, char** words) {
    const std::string verb = count > 1 ? words[1] : "";
    if (verb == "serve" && count == 4)
        return serve(std::atoi(words[2]), std::strtoull(words[3], nullptr, 10));
    if (verb == "enter" && count > 4) return enter(words[2], std::atoi(words[3]), words + 4);
    std::fprintf(stderr, "usage: link serve FD SEED | link enter NAMESPACE PARENT_PID COMMAND\n");
    return 2;
}

}  // namespace
}  // namespace netlab

int main(int count, char** words) {
    try {
        return netlab::run(count, words);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
