#pragma once
// TCP sockets: the only file that knows the system's socket calls. Everything is non-blocking.

#include <sys/uio.h>

#include <cstdint>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "transport/socket_options.hpp"

namespace kvwire {

class Fd {
public:
    Fd() = default;
    explicit Fd(int fd) : fd_(fd) {}
    Fd(Fd&& other) noexcept : fd_(other.release()) {}
    Fd& operator=(Fd&& other) noexcept;
    ~Fd() { reset(); }

    int get() const { return fd_; }
    explicit operator bool() const { return fd_ >= 0; }
    int release();
    void reset();

private:
    int fd_ = -1;
};

struct Address {
    std::string host;
    uint16_t port = 0;
};

// Raw socket addresses of a host, in the resolver's order. Blocks; throws CONNECT_FAILED.
std::vector<std::vector<uint8_t>> resolve(const Address& address);

// Throws USAGE when the address cannot be listened on. `port` comes back as bound.
Fd listen_tcp(const Address& address, const SocketOptions& options, uint16_t* port);
// An empty Fd when there is none.
Fd accept_tcp(const Fd& listener, const SocketOptions& options, bool* would_block);
// The peer's address without what it may choose freely: the port, and the lower half of IPv6.
std::string network_of(const Fd& fd);

// Starts connecting; completion shows as writability.
Fd connect_tcp(const std::vector<uint8_t>& socket_address, const SocketOptions& options);
int connect_result(const Fd& fd);  // errno of the finished attempt, 0: connected

enum class IoStatus { OK, WOULD_BLOCK, CLOSED, FAILED };
struct IoResult {
    IoStatus status = IoStatus::OK;
    size_t bytes = 0;
    int error = 0;  // errno when FAILED
};
IoResult receive(const Fd& fd, const iovec* iov, size_t iov_count);
size_t unread_bytes(const Fd& fd);
// The socket counts as readable when it holds so many bytes.
void set_receive_mark(const Fd& fd, int bytes);
// The core that took in the latest bytes, -1: not known.
int incoming_core(const Fd& fd);
bool is_same_host(const Fd& fd);  // as far as the peer's address tells
IoResult send(const Fd& fd, const iovec* iov, size_t iov_count);

// A second line behind PING: the kernel gives a connection up when its bytes find no answer for so
// long, or the host is gone. 0: as it likes.
void set_patience(const Fd& fd, uint64_t ms);
void acknowledge_now(const Fd& fd);

std::string error_text(int error);

}  // namespace kvwire
