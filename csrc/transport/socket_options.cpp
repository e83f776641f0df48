#include "transport/socket_options.hpp"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <cerrno>
#include <fstream>

#include "base/error.hpp"
#include "transport/socket.hpp"

namespace kvwire {
namespace {

constexpr int DSCP_MAX = 63;
constexpr size_t CONGESTION_NAME_BYTES = 17;  // the kernel's 16 and an end

std::string first_line(const char* path) {
    std::ifstream file(path);
    std::string line;
    std::getline(file, line);
    return line;
}

int set_congestion_control(int fd, const std::string& name) {
    const int failed = ::setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name.data(),
                                    socklen_t(name.size()));
    return failed ? errno : 0;
}

}  // namespace

void check(const SocketOptions& options) {
    if (options.dscp < -1 || options.dscp > DSCP_MAX)
        throw Error(ErrorCode::USAGE, "dscp must be 0 to 63", DSCP_MAX, uint64_t(options.dscp));
    if (options.congestion_control.empty()) return;
    const Fd probe(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    const int error = set_congestion_control(probe.get(), options.congestion_control);
    if (error == 0) return;
    const bool forbidden = error == EPERM;
    const std::string have = first_line(
        forbidden ? "/proc/sys/net/ipv4/tcp_allowed_congestion_control"
                  : "/proc/sys/net/ipv4/tcp_available_congestion_control");
    throw Error(ErrorCode::USAGE,
                "congestion control '" + options.congestion_control + "' cannot be used: " +
                    error_text(error) + "; this kernel " + (forbidden ? "allows: " : "has: ") +
                    have);
}

void apply(int fd, const SocketOptions& options) {
    if (!options.congestion_control.empty())
        set_congestion_control(fd, options.congestion_control);
    if (options.dscp < 0) return;
    const int traffic_class = options.dscp << 2;  // the two low bits are the kernel's, for ECN
    // A socket of IPv6 may carry IPv4; one of IPv4 refuses the other's option, rightly.
    ::setsockopt(fd, IPPROTO_IP, IP_TOS, &traffic_class, sizeof traffic_class);
    ::setsockopt(fd, IPPROTO_IPV6, IPV6_TCLASS, &traffic_class, sizeof traffic_class);
}

void prefer_bbr(int fd) {
    char name[CONGESTION_NAME_BYTES] = {};
    socklen_t bytes = sizeof name - 1;
    if (::getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, &bytes) != 0) return;
    const std::string system = name;
    if (system == "cubic" || system == "reno") set_congestion_control(fd, "bbr");
}

void set_pacing_rate(int fd, uint64_t bytes_per_s) {
    const unsigned long rate = bytes_per_s ? bytes_per_s : ~0ul;
    ::setsockopt(fd, SOL_SOCKET, SO_MAX_PACING_RATE, &rate, sizeof rate);
}

void set_unsent_max(int fd, uint32_t bytes) {
    ::setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &bytes, sizeof bytes);
}

}  // namespace kvwire
