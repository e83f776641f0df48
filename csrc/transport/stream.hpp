#pragma once
// The bytes of one lane, over its socket: as they are, or inside TLS (tls.hpp). Nothing blocks. One
// thread may receive while another sends.

#include <cstdint>
#include <memory>
#include <string>

#include "base/sha256.hpp"
#include "transport/socket.hpp"

namespace kvwire {

class Stream {
public:
    explicit Stream(Fd fd) : fd_(std::move(fd)) {}
    virtual ~Stream() = default;

    const Fd& fd() const { return fd_; }

    // To be called when the socket is connected, and again when it is readable or writable, until
    // it is OK. Throws ADMISSION_REFUSED, PEER_CLOSED.
    virtual IoStatus shake_hands() { return IoStatus::OK; }

    // A short count: nothing more can be had before the socket is readable again.
    virtual IoResult receive(const iovec* iov, size_t iov_count) {
        return kvwire::receive(fd_, iov, iov_count);
    }
    // Bytes of a full buffer are at hand although the socket may not become readable.
    virtual bool has_unread() const { return false; }

    // May say WOULD_BLOCK and still have taken `bytes`, which are the stream's from then on.
    virtual IoResult send(const iovec* iov, size_t iov_count) {
        return kvwire::send(fd_, iov, iov_count);
    }
    // Taken bytes wait for the socket to be writable, and then for a send() of nothing.
    virtual bool has_unsent() const { return false; }

    // What a result that is FAILED means.
    virtual Error failure(const IoResult& result, const char* doing) const {
        return Error(ErrorCode::PEER_CLOSED, std::string(doing) + ": " + error_text(result.error));
    }
    virtual void close() { fd_.reset(); }
    virtual void set_receive_mark(int bytes) { kvwire::set_receive_mark(fd_, bytes); }

    // Once hands are shaken, known to the two ends alone (FORMAT.md section 5.1). Not in cleartext.
    struct Secrets {
        Digest key, channel;
    };
    virtual const Secrets* secrets() const { return nullptr; }

protected:
    Fd fd_;
};

}  // namespace kvwire
