#include "transport/tls.hpp"

#if !KVWIRE_TLS

namespace kvwire {

const char* tls_library() { return nullptr; }

std::shared_ptr<const TlsContext> make_tls_context(const TlsOptions&) {
    throw Error(ErrorCode::UNSUPPORTED,
                "this kvwire was built without OpenSSL, so it has no TLS: install its headers "
                "(on Debian: libssl-dev) and build kvwire again");
}

}  // namespace kvwire

#else

#include <openssl/err.h>
#include <openssl/ssl.h>

#include "base/cpu.hpp"
#include "transport/tls_stream.hpp"

namespace kvwire {
namespace {

constexpr size_t CERTIFICATES_BYTES_MAX = 32 << 10;
// Both of SHA-256, as everything here; the dialler's order decides.
constexpr char AES_FIRST[] = "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256";
constexpr char CHACHA_FIRST[] = "TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256";
constexpr uint8_t PSK_SUITE[2] = {0x13, 0x01};

template <class T, void (*FREE)(T*)>
struct Freed {
    void operator()(T* pointer) const { FREE(pointer); }
};
using Context = std::unique_ptr<SSL_CTX, Freed<SSL_CTX, SSL_CTX_free>>;
using Session = std::unique_ptr<SSL_SESSION, Freed<SSL_SESSION, SSL_SESSION_free>>;

void usage(const std::string& what) {
    const std::string reason = tls_error_text();
    throw Error(ErrorCode::USAGE, "TLS: " + what + (reason.empty() ? "" : ": " + reason));
}

int no_passphrase(char*, int, int, void*) { return -1; }  // and no question on the terminal

class OpenSslContext : public TlsContext {
public:
    explicit OpenSslContext(const TlsOptions& options)
        : options_(options), context_(SSL_CTX_new(TLS_method())) {
        SSL_CTX* const context = context_.get();
        ERR_clear_error();
        SSL_CTX_set_app_data(context, this);
        SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION);
        SSL_CTX_set_ciphersuites(context, cpu_features().aes ? AES_FIRST : CHACHA_FIRST);
        SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
        SSL_CTX_set_num_tickets(context, 0);
        SSL_CTX_set_max_cert_list(context, CERTIFICATES_BYTES_MAX);
        SSL_CTX_set_keylog_callback(context, &TlsStream::on_secret);
        options.psk_key.empty() ? use_certificates() : use_psk();
    }

    std::unique_ptr<Stream> wrap(Fd fd, bool dialled) const override {
        ERR_clear_error();
        SSL* const ssl = SSL_new(context_.get());
        if (!ssl) throw Error(ErrorCode::INTERNAL, "TLS: " + tls_error_text());
        dialled ? SSL_set_connect_state(ssl) : SSL_set_accept_state(ssl);
        // Without a certificate of the dialler's a pre-shared key is all the proof there is.
        if (!options_.psk_key.empty() && !dialled) SSL_set_verify(ssl, SSL_VERIFY_NONE, nullptr);
        return std::make_unique<TlsStream>(std::move(fd), ssl, dialled, options_);
    }

private:
    void use_certificates() {
        SSL_CTX* const context = context_.get();
        SSL_CTX_set_verify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
        SSL_CTX_set_default_passwd_cb(context, &no_passphrase);
        if (SSL_CTX_load_verify_locations(context, options_.ca_file.c_str(), nullptr) != 1)
            usage("ca " + options_.ca_file + " does not serve");
        const char* const chain = options_.certificate_file.c_str();
        if (SSL_CTX_use_certificate_chain_file(context, chain) != 1)
            usage("certificate " + options_.certificate_file + " does not serve");
        const char* const key = options_.key_file.c_str();
        if (SSL_CTX_use_PrivateKey_file(context, key, SSL_FILETYPE_PEM) != 1)
            usage("key " + options_.key_file + " does not serve");
        if (options_.peer_name.empty()) return;
        X509_VERIFY_PARAM* const rules = SSL_CTX_get0_param(context);
        const char* const name = options_.peer_name.c_str();
        if (X509_VERIFY_PARAM_set1_ip_asc(rules, name) != 1 &&
            X509_VERIFY_PARAM_set1_host(rules, name, 0) != 1)
            usage("peer_name " + options_.peer_name + " is no name");
        ERR_clear_error();
    }

    // The dialler trusts no certificate, so that a peer without the key has none to show.
    void use_psk() {
        SSL_CTX_set_verify(context_.get(), SSL_VERIFY_PEER, nullptr);
        SSL_CTX_set_psk_use_session_callback(context_.get(), &OpenSslContext::on_psk_use);
        SSL_CTX_set_psk_find_session_callback(context_.get(), &OpenSslContext::on_psk_find);
    }

    SSL_SESSION* session(SSL* ssl) const {
        Session made(SSL_SESSION_new());
        const SSL_CIPHER* const cipher = SSL_CIPHER_find(ssl, PSK_SUITE);
        const std::vector<uint8_t>& key = options_.psk_key;
        const bool fits = cipher && made &&
                          SSL_SESSION_set1_master_key(made.get(), key.data(), key.size()) == 1 &&
                          SSL_SESSION_set_cipher(made.get(), cipher) == 1 &&
                          SSL_SESSION_set_protocol_version(made.get(), TLS1_3_VERSION) == 1;
        return fits ? made.release() : nullptr;
    }

    static const OpenSslContext& of(SSL* ssl) {
        return *static_cast<const OpenSslContext*>(SSL_CTX_get_app_data(SSL_get_SSL_CTX(ssl)));
    }

    static int on_psk_use(SSL* ssl, const EVP_MD*, const uint8_t** identity, size_t* identity_bytes,
                          SSL_SESSION** session) {
        const std::string& name = of(ssl).options_.psk_identity;
        *identity = reinterpret_cast<const uint8_t*>(name.data());
        *identity_bytes = name.size();
        *session = of(ssl).session(ssl);
        return *session != nullptr;
    }

    static int on_psk_find(SSL* ssl, const uint8_t* identity, size_t identity_bytes,
                           SSL_SESSION** session) {
        const std::string given(reinterpret_cast<const char*>(identity), identity_bytes);
        const bool known = given == of(ssl).options_.psk_identity;
        *session = known ? of(ssl).session(ssl) : nullptr;
        return 1;
    }

    const TlsOptions options_;
    const Context context_;
};

}  // namespace

const char* tls_library() { return OpenSSL_version(OPENSSL_VERSION); }

std::shared_ptr<const TlsContext> make_tls_context(const TlsOptions& options) {
    return std::make_shared<OpenSslContext>(options);
}

}  // namespace kvwire
#endif
