#pragma once
// TLS 1.3 for lanes. OpenSSL shakes hands: certificates, key exchange, traffic secrets. The records
// after that are made here with OpenSSL's ciphers, as kernel TLS would: many to a system call,
// straight from and into the iovecs, and both directions at once. Through SSL_read and SSL_write
// the same bytes cost 1.6 times the processor time (measured).

#include <memory>
#include <string>
#include <vector>

#include "transport/stream.hpp"

namespace kvwire {

struct TlsOptions {
    // Mutual certificates, PEM files: authorities of the peer, own chain, own key.
    std::string ca_file, certificate_file, key_file;
    std::string peer_name;  // DNS name or IP address in the peer's certificate; empty: any
    // Or an external pre-shared key.
    std::string psk_identity;
    std::vector<uint8_t> psk_key;
    // Of the 2^24.5 full records that RFC 8446 section 5.5 allows under one key.
    uint64_t records_per_key_max = 1 << 24;
};

class TlsContext {
public:
    virtual ~TlsContext() = default;
    virtual std::unique_ptr<Stream> wrap(Fd fd, bool dialled) const = 0;
};

// "OpenSSL 3.0.22 ...", or nullptr when kvwire was built without it.
const char* tls_library();

// Throws USAGE for files and keys that do not serve, UNSUPPORTED when there is no tls_library().
std::shared_ptr<const TlsContext> make_tls_context(const TlsOptions& options);

}  // namespace kvwire
