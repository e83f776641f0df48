#if KVWIRE_TLS
#include "transport/tls_stream.hpp"

#include <openssl/err.h>
#include <openssl/x509_vfy.h>

#include <algorithm>
#include <cstring>

#include "wire/format.hpp"

namespace kvwire {
namespace {

constexpr size_t BATCH_RECORDS = 16;  // to a system call; all of them stay in the cache
constexpr size_t HANDSHAKE_PIECE_BYTES = 4096;
// So small a record passes through `spill_`: what is not data must not lie in somebody's pages.
constexpr size_t SMALL_BYTES = 512;
constexpr size_t LARGE_READ_BYTES = 64 << 10;
constexpr uint8_t KEY_UPDATE[] = {24, 0, 0, 1, 0}, KEY_UPDATE_WANTED[] = {24, 0, 0, 1, 1};
constexpr uint8_t NEW_SESSION_TICKET = 4;
constexpr uint8_t CLOSE_NOTIFY[] = {1, 0};

constexpr char EXPORTER[] = "EXPORTER-kvwire-admission";

Digest from_hex(const char* digits) {
    Digest digest;
    for (size_t i = 0; i < digest.size(); ++i)
        digest[i] = uint8_t(std::stoi(std::string(digits + 2 * i, 2), nullptr, 16));
    return digest;
}

}  // namespace

std::string tls_error_text() {
    const unsigned long error = ERR_peek_error();
    const char* const reason = ERR_reason_error_string(error);
    ERR_clear_error();
    return reason ? reason : "";
}

TlsStream::TlsStream(Fd fd, SSL* ssl, bool dialled, const TlsOptions& options)
    : Stream(std::move(fd)), ssl_(ssl), dialled_(dialled), with_psk_(!options.psk_key.empty()),
      records_per_key_max_(options.records_per_key_max) {
    SSL_set_bio(ssl, BIO_new(BIO_s_mem()), BIO_new(BIO_s_mem()));
    SSL_set_app_data(ssl, this);
}

// ---- handshake

void TlsStream::on_secret(const SSL* ssl, const char* line) {
    const std::string text(line);
    const size_t last = text.rfind(' ');
    if (last == std::string::npos || text.size() - last - 1 != 2 * sizeof(Digest)) return;
    TlsStream& stream = *static_cast<TlsStream*>(SSL_get_app_data(ssl));
    if (text.rfind("CLIENT_TRAFFIC_SECRET_0 ", 0) == 0)
        stream.client_secret_ = from_hex(line + last + 1);
    else if (text.rfind("SERVER_TRAFFIC_SECRET_0 ", 0) == 0)
        stream.server_secret_ = from_hex(line + last + 1);
}

IoStatus TlsStream::shake_hands() {
    for (;;) {
        ERR_clear_error();
        const int done = SSL_do_handshake(ssl_.get());
        const int wants = done == 1 ? SSL_ERROR_NONE : SSL_get_error(ssl_.get(), done);
        collect_handshake();
        const IoResult put = flush();
        if (wants != SSL_ERROR_NONE && wants != SSL_ERROR_WANT_READ) handshake_failed();
        if (put.status == IoStatus::FAILED) throw failure(put, "send");
        if (done == 1) {
            hands_are_shaken();
            return IoStatus::OK;
        }
        uint8_t piece[HANDSHAKE_PIECE_BYTES];
        const iovec iov{piece, sizeof piece};
        const IoResult got = Stream::receive(&iov, 1);
        if (got.status == IoStatus::WOULD_BLOCK) return got.status;
        if (got.status != IoStatus::OK)
            throw Error(ErrorCode::PEER_CLOSED,
                        "the peer closed during the TLS handshake: does it use TLS, and trust "
                        "this side?");
        spoke_cleartext_ = got.bytes >= sizeof GREETING_MAGIC &&
                           std::memcmp(piece, GREETING_MAGIC, sizeof GREETING_MAGIC) == 0;
        BIO_write(SSL_get_rbio(ssl_.get()), piece, int(got.bytes));
    }
}

void TlsStream::collect_handshake() {
    BIO* const from = SSL_get_wbio(ssl_.get());
    const size_t bytes = BIO_ctrl_pending(from);
    if (bytes == 0) return;
    out_.resize(out_end_ + bytes);
    BIO_read(from, out_.data() + out_end_, int(bytes));
    out_end_ += bytes;
}

void TlsStream::hands_are_shaken() {
    SSL* const ssl = ssl_.get();
    if (with_psk_ && !SSL_session_reused(ssl))
        throw Error(ErrorCode::ADMISSION_REFUSED, "TLS: the peer did not use the shared key");
    Secrets secrets;
    uint8_t exported[2 * sizeof(Digest)];
    const int suite = SSL_CIPHER_get_cipher_nid(SSL_get_current_cipher(ssl));
    if (!client_secret_ || !server_secret_ ||
        SSL_export_keying_material(ssl, exported, sizeof exported, EXPORTER, sizeof EXPORTER - 1,
                                   nullptr, 0, 0) != 1)
        throw Error(ErrorCode::INTERNAL, "TLS: OpenSSL gives no keys: " + tls_error_text());
    std::memcpy(secrets.key.data(), exported, sizeof(Digest));
    std::memcpy(secrets.channel.data(), exported + sizeof(Digest), sizeof(Digest));
    secrets_ = secrets;
    const EVP_CIPHER* const cipher =
        suite == NID_chacha20_poly1305 ? EVP_chacha20_poly1305() : EVP_aes_128_gcm();
    opener_ = std::make_unique<TlsCipher>(cipher, false,
                                          dialled_ ? *server_secret_ : *client_secret_);
    sealer_ = std::make_unique<TlsCipher>(cipher, true,
                                          dialled_ ? *client_secret_ : *server_secret_);
    // Records that came right behind the handshake.
    BIO* const from = SSL_get_rbio(ssl);
    in_.resize(std::max(BIO_ctrl_pending(from), 2 * TLS_RECORD_BYTES_MAX));
    in_end_ = size_t(std::max(0, BIO_read(from, in_.data(), int(in_.size()))));
    ssl_.reset();
    has_unread_ = whole_record();
}

void TlsStream::handshake_failed() {
    const long verdict = SSL_get_verify_result(ssl_.get());
    Error why(ErrorCode::ADMISSION_REFUSED, "");
    why.remote = ERR_GET_REASON(ERR_peek_error()) >= SSL_AD_REASON_OFFSET;
    const std::string reason = tls_error_text();
    if (spoke_cleartext_)
        why.message = "TLS: the peer speaks cleartext: give both sides the same security";
    else if (verdict != X509_V_OK && !why.remote)
        why.message = std::string("TLS: the peer's certificate is not accepted: ") +
                      X509_verify_cert_error_string(verdict);
    else
        why.message = std::string(why.remote ? "TLS: refused by the peer: " : "TLS: ") + reason;
    throw why;
}

// ---- receiving

IoResult TlsStream::receive(const iovec* iov, size_t iov_count) {
    IovecCursor into(iov, iov_count);
    const size_t wanted = into.rest(LARGE_READ_BYTES);
    size_t bytes = take_spilled(&into);
    for (;;) {
        while (!failure_ && !ended_ && into.rest(1) && whole_record()) bytes += open_record(&into);
        if (failure_) return {IoStatus::FAILED, 0, 0};
        if (bytes > 0) break;
        if (ended_) return {IoStatus::CLOSED, 0, 0};
        const IoResult got = fetch(wanted);
        if (got.status != IoStatus::OK) return got;
    }
    has_unread_ = spill_begin_ < spill_end_ || whole_record() || ended_ || failure_;
    return {IoStatus::OK, bytes, 0};
}

IoResult TlsStream::fetch(size_t wanted) {
    const size_t room = (wanted >= LARGE_READ_BYTES ? BATCH_RECORDS : 2) * TLS_RECORD_BYTES_MAX;
    if (in_.size() < room) in_.resize(room);
    std::memmove(in_.data(), in_.data() + in_begin_, in_end_ - in_begin_);
    in_end_ -= in_begin_;
    in_begin_ = 0;
    const iovec iov{in_.data() + in_end_, in_.size() - in_end_};
    const IoResult got = Stream::receive(&iov, 1);
    in_end_ += got.bytes;
    return got;
}

bool TlsStream::whole_record() {
    if (in_end_ - in_begin_ < TLS_HEADER_BYTES) return false;
    const uint8_t* const header = in_.data() + in_begin_;
    const size_t bytes = tls_record_bytes(header);
    if (header[0] != uint8_t(TlsContent::DATA) || bytes < TLS_RECORD_OVERHEAD_BYTES ||
        bytes > TLS_RECORD_BYTES_MAX) {
        fail("no record of data begins here");
        return false;
    }
    return in_end_ - in_begin_ >= bytes;
}

size_t TlsStream::take_spilled(IovecCursor* into) {
    size_t bytes = 0;
    while (spill_begin_ < spill_end_) {
        const iovec piece = into->take(spill_end_ - spill_begin_);
        if (piece.iov_len == 0) break;
        std::memcpy(piece.iov_base, spill_.data() + spill_begin_, piece.iov_len);
        spill_begin_ += piece.iov_len;
        bytes += piece.iov_len;
    }
    return bytes;
}

// Returns how many bytes of data it has placed.
size_t TlsStream::open_record(IovecCursor* into) {
    if (spill_.empty()) spill_.resize(TLS_PLAIN_BYTES_MAX);
    const uint8_t* const record = in_.data() + in_begin_;
    const size_t record_bytes = tls_record_bytes(record);
    const bool small = record_bytes <= SMALL_BYTES;
    IovecCursor nowhere(nullptr, 0);
    const TlsCipher::Opened opened = opener_->open(record, small ? &nowhere : into, spill_.data());
    in_begin_ += record_bytes;
    if (!opened.authentic) {
        fail("a record is not the peer's: something on the path has changed it");
        return 0;
    }
    if (opened.content != TlsContent::DATA) {
        take_control(opened.content, small ? opened.bytes : 0);
        return 0;
    }
    spill_begin_ = 0;
    spill_end_ = opened.spilled;
    return opened.bytes - opened.spilled + take_spilled(into);
}

// `bytes` bytes in the spill buffer that are no data.
void TlsStream::take_control(TlsContent content, size_t bytes) {
    const uint8_t* const data = spill_.data();
    const auto equals = [&](const uint8_t(&update)[5]) {
        return bytes == sizeof update && std::memcmp(data, update, sizeof update) == 0;
    };
    if (content == TlsContent::ALERT && bytes == 2) {
        if (data[1] == CLOSE_NOTIFY[1])
            ended_ = true;
        else
            fail(std::string("refused by the peer: ") + SSL_alert_desc_string_long(data[1]), true);
    } else if (content == TlsContent::HANDSHAKE && (equals(KEY_UPDATE) ||
                                                    equals(KEY_UPDATE_WANTED))) {
        opener_->update_keys();
        if (equals(KEY_UPDATE_WANTED)) update_wanted_ = true;
    } else if (content != TlsContent::HANDSHAKE || bytes == 0 || data[0] != NEW_SESSION_TICKET) {
        fail("a record of content " + std::to_string(int(content)) + " has no place here");
    }
}

void TlsStream::fail(const std::string& why, bool remote) {
    failure_ = Error(ErrorCode::ADMISSION_REFUSED, "TLS: " + why);
    failure_.remote = remote;
}

Error TlsStream::failure(const IoResult& result, const char* doing) const {
    return result.error == 0 && failure_ ? failure_ : Stream::failure(result, doing);
}

// Up to a record of what is to come may be here already, and then not come to the socket.
void TlsStream::set_receive_mark(int bytes) {
    Stream::set_receive_mark(std::max(1, bytes - int(TLS_RECORD_BYTES_MAX)));
}

// ---- sending

IoResult TlsStream::send(const iovec* iov, size_t iov_count) {
    const IoResult before = flush();
    if (before.status != IoStatus::OK) return before;
    const bool wanted = update_wanted_.exchange(false);
    if (wanted || sealer_->records() >= records_per_key_max_) {
        seal_control(TlsContent::HANDSHAKE, KEY_UPDATE, sizeof KEY_UPDATE);
        sealer_->update_keys();
    }
    IovecCursor from(iov, iov_count);
    const size_t bytes = seal_records(&from);
    const IoResult put = flush();
    return {put.status, bytes, put.error};
}

size_t TlsStream::seal_records(IovecCursor* from) {
    const size_t total = from->rest(BATCH_RECORDS * TLS_PLAIN_BYTES_MAX);
    const size_t records = (total + TLS_PLAIN_BYTES_MAX - 1) / TLS_PLAIN_BYTES_MAX;
    const size_t room = out_end_ + total + records * TLS_RECORD_OVERHEAD_BYTES;
    if (out_.size() < room) out_.resize(room);
    for (size_t done = 0; done < total;) {
        const size_t bytes = std::min(total - done, TLS_PLAIN_BYTES_MAX);
        out_end_ += sealer_->seal(from, bytes, TlsContent::DATA, out_.data() + out_end_);
        done += bytes;
    }
    return total;
}

void TlsStream::seal_control(TlsContent content, const void* data, size_t bytes) {
    const iovec iov{const_cast<void*>(data), bytes};
    IovecCursor from(&iov, 1);
    out_.resize(std::max(out_.size(), out_end_ + bytes + TLS_RECORD_OVERHEAD_BYTES));
    out_end_ += sealer_->seal(&from, bytes, content, out_.data() + out_end_);
}

void TlsStream::close() {
    if (sealer_ && !has_unsent()) {
        seal_control(TlsContent::ALERT, CLOSE_NOTIFY, sizeof CLOSE_NOTIFY);
        flush();
    }
    Stream::close();
}

IoResult TlsStream::flush() {
    while (out_begin_ < out_end_) {
        const iovec iov{out_.data() + out_begin_, out_end_ - out_begin_};
        const IoResult put = Stream::send(&iov, 1);
        if (put.status != IoStatus::OK) return {put.status, 0, put.error};
        out_begin_ += put.bytes;
    }
    out_begin_ = out_end_ = 0;
    return {};
}

}  // namespace kvwire
#endif
