#pragma once
// The record layer of TLS 1.3 (RFC 8446, section 5) in one direction, after the handshake.

#include <openssl/evp.h>

#include <cstdint>
#include <memory>

#include "base/sha256.hpp"
#include "transport/socket.hpp"

namespace kvwire {

constexpr size_t TLS_HEADER_BYTES = 5, TLS_TAG_BYTES = 16, TLS_PLAIN_BYTES_MAX = 16384;
constexpr size_t TLS_RECORD_OVERHEAD_BYTES = TLS_HEADER_BYTES + 1 + TLS_TAG_BYTES;
constexpr size_t TLS_RECORD_BYTES_MAX = TLS_PLAIN_BYTES_MAX + TLS_RECORD_OVERHEAD_BYTES;

enum class TlsContent : uint8_t { ALERT = 21, HANDSHAKE = 22, DATA = 23 };

// Walks through the bytes of an iovec array.
class IovecCursor {
public:
    IovecCursor(const iovec* iov, size_t count) : iov_(iov), end_(iov + count) {}
    iovec take(size_t bytes_max);  // the next piece in one place; empty at the end
    size_t rest(size_t bytes_max) const;  // bytes ahead, counted no further than this

private:
    const iovec* iov_;
    const iovec* const end_;
    size_t offset_ = 0;
};

// The keys of one direction, and the cipher under them.
class TlsCipher {
public:
    TlsCipher(const EVP_CIPHER* cipher, bool encrypts, const Digest& traffic_secret);
    void update_keys();
    uint64_t records() const { return sequence_; }  // under the present keys

    // Makes a record of the next `bytes` bytes, at most TLS_PLAIN_BYTES_MAX; returns its length.
    size_t seal(IovecCursor* from, size_t bytes, TlsContent content, uint8_t* out);

    struct Opened {
        bool authentic = false;
        TlsContent content{};
        size_t bytes = 0;    // of content
        size_t spilled = 0;  // the last so many of them found no room in `into`
    };
    // `record` with its header, which has been checked. The cursor moves also where the content is
    // not authentic: the stream ends there, and nothing that was placed counts.
    Opened open(const uint8_t* record, IovecCursor* into, uint8_t* spill);

private:
    void set_keys();
    void begin(const uint8_t* header);
    void crypt(void* out, const void* in, size_t bytes);

    struct Free {
        void operator()(EVP_CIPHER_CTX* context) const { EVP_CIPHER_CTX_free(context); }
    };
    const EVP_CIPHER* const cipher_;
    const bool encrypts_;
    const std::unique_ptr<EVP_CIPHER_CTX, Free> context_;
    Digest secret_;
    uint8_t iv_[12];
    uint64_t sequence_ = 0;
};

inline size_t tls_record_bytes(const uint8_t* header) {
    return TLS_HEADER_BYTES + (size_t(header[3]) << 8 | header[4]);
}

}  // namespace kvwire
