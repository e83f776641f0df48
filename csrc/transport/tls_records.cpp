#if KVWIRE_TLS
#include "transport/tls_records.hpp"

#include <algorithm>
#include <cstring>

#include "base/error.hpp"

namespace kvwire {
namespace {

// RFC 8446, section 7.1, for what fits one SHA-256.
Digest expand_label(const Digest& secret, const std::string& label, uint8_t bytes) {
    const std::string full = "tls13 " + label;
    std::string info{'\0', char(bytes), char(full.size())};
    info += full + '\0' + '\1';  // no context; the one block of HKDF-Expand
    return hmac_sha256(span_of(secret),
                       {{reinterpret_cast<const uint8_t*>(info.data()), info.size()}});
}

void require(int succeeded) {
    if (succeeded != 1) throw Error(ErrorCode::INTERNAL, "TLS: OpenSSL's cipher failed");
}

}  // namespace

iovec IovecCursor::take(size_t bytes_max) {
    while (iov_ != end_ && offset_ == iov_->iov_len) {
        ++iov_;
        offset_ = 0;
    }
    if (iov_ == end_) return {nullptr, 0};
    const size_t bytes = std::min(bytes_max, iov_->iov_len - offset_);
    const iovec piece{static_cast<uint8_t*>(iov_->iov_base) + offset_, bytes};
    offset_ += bytes;
    return piece;
}

size_t IovecCursor::rest(size_t bytes_max) const {
    size_t bytes = 0;
    for (const iovec* iov = iov_; iov != end_ && bytes < bytes_max; ++iov)
        bytes += iov->iov_len - (iov == iov_ ? offset_ : 0);
    return std::min(bytes, bytes_max);
}

TlsCipher::TlsCipher(const EVP_CIPHER* cipher, bool encrypts, const Digest& traffic_secret)
    : cipher_(cipher), encrypts_(encrypts), context_(EVP_CIPHER_CTX_new()),
      secret_(traffic_secret) {
    set_keys();
}

void TlsCipher::set_keys() {
    const Digest key = expand_label(secret_, "key", uint8_t(EVP_CIPHER_key_length(cipher_)));
    const Digest iv = expand_label(secret_, "iv", sizeof iv_);
    std::memcpy(iv_, iv.data(), sizeof iv_);
    sequence_ = 0;
    require(EVP_CipherInit_ex(context_.get(), cipher_, nullptr, key.data(), nullptr, encrypts_));
}

void TlsCipher::update_keys() {
    secret_ = expand_label(secret_, "traffic upd", uint8_t(secret_.size()));
    set_keys();
}

void TlsCipher::begin(const uint8_t* header) {
    uint8_t nonce[sizeof iv_];
    std::memcpy(nonce, iv_, sizeof iv_);
    for (int i = 0; i < 8; ++i) nonce[sizeof iv_ - 1 - i] ^= uint8_t(sequence_ >> (8 * i));
    ++sequence_;
    require(EVP_CipherInit_ex(context_.get(), nullptr, nullptr, nullptr, nonce, -1));
    crypt(nullptr, header, TLS_HEADER_BYTES);
}

void TlsCipher::crypt(void* out, const void* in, size_t bytes) {
    int done = 0;
    require(EVP_CipherUpdate(context_.get(), static_cast<uint8_t*>(out), &done,
                             static_cast<const uint8_t*>(in), int(bytes)));
}

size_t TlsCipher::seal(IovecCursor* from, size_t bytes, TlsContent content, uint8_t* out) {
    const size_t length = bytes + 1 + TLS_TAG_BYTES;
    const uint8_t header[TLS_HEADER_BYTES] = {uint8_t(TlsContent::DATA), 3, 3,
                                              uint8_t(length >> 8), uint8_t(length)};
    std::memcpy(out, header, sizeof header);
    uint8_t* at = out + TLS_HEADER_BYTES;
    begin(header);
    for (size_t left = bytes; left > 0;) {
        const iovec piece = from->take(left);
        crypt(at, piece.iov_base, piece.iov_len);
        at += piece.iov_len;
        left -= piece.iov_len;
    }
    crypt(at++, &content, 1);
    int none = 0;
    require(EVP_CipherFinal_ex(context_.get(), at, &none));
    require(EVP_CIPHER_CTX_ctrl(context_.get(), EVP_CTRL_AEAD_GET_TAG, TLS_TAG_BYTES, at));
    return TLS_HEADER_BYTES + length;
}

TlsCipher::Opened TlsCipher::open(const uint8_t* record, IovecCursor* into, uint8_t* spill) {
    const uint8_t* at = record + TLS_HEADER_BYTES;
    Opened opened;
    opened.bytes = tls_record_bytes(record) - TLS_RECORD_OVERHEAD_BYTES;
    begin(record);
    for (size_t left = opened.bytes; left > 0;) {
        const iovec piece = into->take(left);
        if (piece.iov_len == 0) {
            opened.spilled = left;
            crypt(spill, at, left);
            at += left;
            break;
        }
        crypt(piece.iov_base, at, piece.iov_len);
        at += piece.iov_len;
        left -= piece.iov_len;
    }
    crypt(&opened.content, at++, 1);
    uint8_t tag[TLS_TAG_BYTES];
    std::memcpy(tag, at, sizeof tag);
    require(EVP_CIPHER_CTX_ctrl(context_.get(), EVP_CTRL_AEAD_SET_TAG, sizeof tag, tag));
    int none = 0;
    opened.authentic = EVP_CipherFinal_ex(context_.get(), tag, &none) == 1;
    return opened;
}

}  // namespace kvwire
#endif
