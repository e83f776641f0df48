#pragma once
// A Stream inside TLS 1.3: see tls.hpp.

#include <openssl/ssl.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "transport/tls.hpp"
#include "transport/tls_records.hpp"

namespace kvwire {

std::string tls_error_text();  // OpenSSL's latest reason in this thread; takes it

class TlsStream : public Stream {
public:
    // Takes `ssl`.
    TlsStream(Fd fd, SSL* ssl, bool dialled, const TlsOptions& options);

    IoStatus shake_hands() override;
    IoResult receive(const iovec* iov, size_t iov_count) override;
    bool has_unread() const override { return has_unread_.load(std::memory_order_relaxed); }
    IoResult send(const iovec* iov, size_t iov_count) override;
    bool has_unsent() const override { return out_begin_ < out_end_; }
    Error failure(const IoResult& result, const char* doing) const override;
    void close() override;
    void set_receive_mark(int bytes) override;
    const Secrets* secrets() const override { return secrets_ ? &*secrets_ : nullptr; }

    static void on_secret(const SSL* ssl, const char* line);  // OpenSSL's key log

private:
    struct Free {
        void operator()(SSL* ssl) const { SSL_free(ssl); }
    };
    void collect_handshake();
    void hands_are_shaken();
    [[noreturn]] void handshake_failed();

    IoResult fetch(size_t wanted);
    bool whole_record();
    size_t take_spilled(IovecCursor* into);
    size_t open_record(IovecCursor* into);
    void take_control(TlsContent content, size_t bytes);
    void fail(const std::string& why, bool remote = false);

    size_t seal_records(IovecCursor* from);
    void seal_control(TlsContent content, const void* data, size_t bytes);
    IoResult flush();

    std::unique_ptr<SSL, Free> ssl_;  // until hands are shaken
    const bool dialled_, with_psk_;
    const uint64_t records_per_key_max_;
    bool spoke_cleartext_ = false;
    std::optional<Digest> client_secret_, server_secret_;
    std::optional<Secrets> secrets_;

    // The receiving thread's.
    std::unique_ptr<TlsCipher> opener_;
    std::vector<uint8_t> in_;     // records as received
    size_t in_begin_ = 0, in_end_ = 0;
    std::vector<uint8_t> spill_;  // content for which the reader had no room
    size_t spill_begin_ = 0, spill_end_ = 0;
    bool ended_ = false;          // the peer will write nothing more
    std::atomic<bool> has_unread_{false};
    Error failure_;

    // The sending thread's.
    std::unique_ptr<TlsCipher> sealer_;
    std::vector<uint8_t> out_;
    size_t out_begin_ = 0, out_end_ = 0;
    std::atomic<bool> update_wanted_{false};  // by the peer
};

}  // namespace kvwire
