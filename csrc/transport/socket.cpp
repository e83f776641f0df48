#include "transport/socket.hpp"

#include <arpa/inet.h>
#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

namespace kvwire {
namespace {

constexpr int BACKLOG = 512;
constexpr int KEEPALIVE_IDLE_S = 30;
constexpr int LOOPBACK_SEND_BUFFER_BYTES = 256 << 10;
constexpr uint32_t UNSENT_BYTES_MAX = 256 << 10;

bool is_loopback(const sockaddr* name) {
    if (name->sa_family == AF_INET)
        return (ntohl(reinterpret_cast<const sockaddr_in*>(name)->sin_addr.s_addr) >> 24) == 127;
    return name->sa_family == AF_INET6 &&
           IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<const sockaddr_in6*>(name)->sin6_addr);
}

void prepare(int fd, const sockaddr* peer, const SocketOptions& options) {
    const int one = 1;
    ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    // Loopback holds nothing on the way, so a deep queue only lets bytes fall out of the cache
    // between the kernel's two copies: a quarter of the processor time of a transfer (measured).
    // Real links need the depth, and keep the kernel's autotuning; there what has not left yet is
    // kept short, so that what is urgent has little before it.
    if (is_loopback(peer)) {
        ::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &LOOPBACK_SEND_BUFFER_BYTES,
                     sizeof LOOPBACK_SEND_BUFFER_BYTES);
    } else {
        set_unsent_max(fd, UNSENT_BYTES_MAX);
        prefer_bbr(fd);
    }
    apply(fd, options);
}

// Of family AF_UNSPEC when it is not connected any more.
sockaddr_storage peer_of(const Fd& fd) {
    sockaddr_storage peer{};
    socklen_t bytes = sizeof peer;
    ::getpeername(fd.get(), reinterpret_cast<sockaddr*>(&peer), &bytes);
    return peer;
}

std::string describe(const Address& address) {
    return address.host + ":" + std::to_string(address.port);
}

IoResult failed() {
    if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)
        return {IoStatus::WOULD_BLOCK, 0, 0};
    return {IoStatus::FAILED, 0, errno};
}

}  // namespace

Fd& Fd::operator=(Fd&& other) noexcept {
    if (this != &other) {
        reset();
        fd_ = other.release();
    }
    return *this;
}

int Fd::release() {
    const int fd = fd_;
    fd_ = -1;
    return fd;
}

void Fd::reset() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
}

std::string error_text(int error) {
    char buffer[128];
    return ::strerror_r(error, buffer, sizeof buffer);
}

std::vector<std::vector<uint8_t>> resolve(const Address& address) {
    addrinfo hints{};
    hints.ai_family = AF_UNSPEC;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_NUMERICSERV;
    addrinfo* found = nullptr;
    const std::string port = std::to_string(address.port);
    const int status = ::getaddrinfo(address.host.c_str(), port.c_str(), &hints, &found);
    if (status != 0)
        throw Error(ErrorCode::CONNECT_FAILED,
                    "cannot resolve " + describe(address) + ": " + ::gai_strerror(status));
    std::vector<std::vector<uint8_t>> result;
    for (const addrinfo* a = found; a; a = a->ai_next) {
        const auto* bytes = reinterpret_cast<const uint8_t*>(a->ai_addr);
        result.emplace_back(bytes, bytes + a->ai_addrlen);
    }
    ::freeaddrinfo(found);
    return result;
}

Fd listen_tcp(const Address& address, const SocketOptions& options, uint16_t* port) {
    const auto resolved = resolve(address);
    const auto* name = reinterpret_cast<const sockaddr*>(resolved[0].data());
    Fd fd(::socket(name->sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    const int one = 1;
    if (fd) ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    apply(fd.get(), options);
    if (!fd || ::bind(fd.get(), name, socklen_t(resolved[0].size())) != 0 ||
        ::listen(fd.get(), BACKLOG) != 0)
        throw Error(ErrorCode::USAGE,
                    "cannot listen on " + describe(address) + ": " + error_text(errno));
    sockaddr_storage bound{};
    socklen_t bytes = sizeof bound;
    ::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&bound), &bytes);
    *port = ntohs(bound.ss_family == AF_INET6
                      ? reinterpret_cast<sockaddr_in6*>(&bound)->sin6_port
                      : reinterpret_cast<sockaddr_in*>(&bound)->sin_port);
    return fd;
}

Fd accept_tcp(const Fd& listener, const SocketOptions& options, bool* would_block) {
    sockaddr_storage peer{};
    socklen_t peer_bytes = sizeof peer;
    auto* name = reinterpret_cast<sockaddr*>(&peer);
    Fd fd(::accept4(listener.get(), name, &peer_bytes, SOCK_NONBLOCK | SOCK_CLOEXEC));
    // Anything but "none left" concerns one connection, or passes (EMFILE): try again later.
    *would_block = !fd && (errno == EAGAIN || errno == EWOULDBLOCK);
    if (fd) prepare(fd.get(), name, options);
    return fd;
}

std::string network_of(const Fd& fd) {
    const sockaddr_storage peer = peer_of(fd);
    const auto text = [](const void* bytes, size_t count) {
        return std::string(static_cast<const char*>(bytes), count);
    };
    if (peer.ss_family == AF_UNSPEC) return {};
    if (peer.ss_family == AF_INET)
        return text(&reinterpret_cast<const sockaddr_in&>(peer).sin_addr, 4);
    const in6_addr& address = reinterpret_cast<const sockaddr_in6&>(peer).sin6_addr;
    return IN6_IS_ADDR_V4MAPPED(&address) ? text(&address.s6_addr[12], 4) : text(&address, 8);
}

Fd connect_tcp(const std::vector<uint8_t>& socket_address, const SocketOptions& options) {
    const auto* name = reinterpret_cast<const sockaddr*>(socket_address.data());
    Fd fd(::socket(name->sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (!fd) throw Error(ErrorCode::CONNECT_FAILED, "socket: " + error_text(errno));
    prepare(fd.get(), name, options);
    if (::connect(fd.get(), name, socklen_t(socket_address.size())) != 0 && errno != EINPROGRESS)
        throw Error(ErrorCode::CONNECT_FAILED, "connect: " + error_text(errno));
    return fd;
}

int connect_result(const Fd& fd) {
    int error = 0;
    socklen_t bytes = sizeof error;
    if (::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &bytes) != 0) return errno;
    return error;
}

IoResult receive(const Fd& fd, const iovec* iov, size_t iov_count) {
    msghdr message{};
    message.msg_iov = const_cast<iovec*>(iov);
    message.msg_iovlen = iov_count;
    const ssize_t bytes = ::recvmsg(fd.get(), &message, MSG_DONTWAIT);
    if (bytes < 0) return failed();
    if (bytes == 0) return {IoStatus::CLOSED, 0, 0};
    return {IoStatus::OK, size_t(bytes), 0};
}

size_t unread_bytes(const Fd& fd) {
    int bytes = 0;
    return ::ioctl(fd.get(), FIONREAD, &bytes) == 0 ? size_t(bytes) : 0;
}

void set_receive_mark(const Fd& fd, int bytes) {
    ::setsockopt(fd.get(), SOL_SOCKET, SO_RCVLOWAT, &bytes, sizeof bytes);
}

int incoming_core(const Fd& fd) {
    int core = -1;
    socklen_t bytes = sizeof core;
    return ::getsockopt(fd.get(), SOL_SOCKET, SO_INCOMING_CPU, &core, &bytes) == 0 ? core : -1;
}

bool is_same_host(const Fd& fd) {
    const sockaddr_storage peer = peer_of(fd);
    return is_loopback(reinterpret_cast<const sockaddr*>(&peer));
}

void set_patience(const Fd& fd, uint64_t ms) {
    const auto set = [&](int level, int option, int value) {
        ::setsockopt(fd.get(), level, option, &value, sizeof value);
    };
    set(IPPROTO_TCP, TCP_USER_TIMEOUT, int(std::min<uint64_t>(ms, INT_MAX)));
    set(SOL_SOCKET, SO_KEEPALIVE, 1);
    set(IPPROTO_TCP, TCP_KEEPIDLE, KEEPALIVE_IDLE_S);
    set(IPPROTO_TCP, TCP_KEEPINTVL, KEEPALIVE_IDLE_S);
}

void acknowledge_now(const Fd& fd) {
    const int one = 1;
    ::setsockopt(fd.get(), IPPROTO_TCP, TCP_QUICKACK, &one, sizeof one);
}

IoResult send(const Fd& fd, const iovec* iov, size_t iov_count) {
    msghdr message{};
    message.msg_iov = const_cast<iovec*>(iov);
    message.msg_iovlen = iov_count;
    const ssize_t bytes = ::sendmsg(fd.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (bytes < 0) return failed();
    return {IoStatus::OK, size_t(bytes), 0};
}

}  // namespace kvwire
