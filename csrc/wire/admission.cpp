#include "wire/admission.hpp"

#include <algorithm>
#include <cstring>

#include "checksum/crc32c.hpp"

namespace kvwire {
namespace {

constexpr uint8_t TLS_ALERT = 0x15, TLS_HANDSHAKE = 0x16;
constexpr size_t DIGEST_BYTES = sizeof(Digest);

// 16 bytes each, zeros included, so that no two MACs are ever of the same text.
constexpr size_t LABEL_BYTES = 16;
constexpr char DIALLER[LABEL_BYTES] = "kvwire dialler";
constexpr char ACCEPTOR[LABEL_BYTES] = "kvwire acceptor";
constexpr char LINK_KEY[LABEL_BYTES] = "kvwire link key";

ByteSpan span_of(const char* label) {
    return {reinterpret_cast<const uint8_t*>(label), LABEL_BYTES};
}

[[noreturn]] void refuse(const std::string& why) {
    throw Error(ErrorCode::ADMISSION_REFUSED, "admission: " + why);
}

}  // namespace

Admission::Admission(const AdmissionTerms& terms, bool dials)
    : dials_(dials), own_(terms.own), nonce_(terms.nonce), channel_(terms.channel) {}

Admission Admission::dial(const AdmissionTerms& terms, Bytes key) {
    Admission made(terms, true);
    made.key_ = std::move(key);
    made.own_.flags |= GREETING_FLAG_PROOF;
    made.put_greeting();
    made.put(made.nonce_);
    return made;
}

Admission Admission::accept(const AdmissionTerms& terms, KeyOf key_of) {
    Admission made(terms, false);
    made.key_of_ = std::move(key_of);
    return made;
}

void Admission::expect(State state, size_t bytes) {
    state_ = state;
    received_ = 0;
    expected_ = bytes;
}

void Admission::put_greeting() {
    encode_greeting(own_, own_bytes_);
    out_.insert(out_.end(), own_bytes_, own_bytes_ + GREETING_BYTES);
    answered_ = true;
}

void Admission::put(const Digest& digest) { out_.insert(out_.end(), digest.begin(), digest.end()); }

Bytes Admission::take_output() { return std::exchange(out_, {}); }

Digest Admission::received_digest(size_t offset) const {
    Digest digest;
    std::memcpy(digest.data(), in_ + offset, digest.size());
    return digest;
}

Digest Admission::keyed(const char* label) const {
    return hmac_sha256({key_.data(), key_.size()},
                       {span_of(label), {greeting_of(true), GREETING_BYTES},
                        {greeting_of(false), GREETING_BYTES},
                        kvwire::span_of(dials_ ? nonce_ : peer_nonce_),
                        kvwire::span_of(dials_ ? peer_nonce_ : nonce_),
                        kvwire::span_of(channel_)});
}

void Admission::check_proof(const char* label, const Digest& given) {
    if (equal_secrets(keyed(label), given)) return;
    refuse(own_.flags & GREETING_FLAG_JOIN ? "the peer does not prove the key of this link"
                                           : "the two sides hold different keys, or only one has "
                                             "any: give both the same security");
}

void Admission::advance(size_t bytes) {
    received_ += bytes;
    // Strangers are told so at their first wrong byte, not after 64.
    const size_t check = std::min(received_, sizeof GREETING_MAGIC);
    if (state_ == State::GREETING && std::memcmp(in_, GREETING_MAGIC, check) != 0)
        throw Error(ErrorCode::BAD_MAGIC,
                    in_[0] == TLS_ALERT || in_[0] == TLS_HANDSHAKE
                        ? "greeting: the peer speaks TLS: give both sides the same security"
                        : "greeting: these are not kvwire's first bytes",
                    GREETING_MAGIC[0], in_[0]);
    if (received_ == expected_) step();
}

void Admission::step() {
    switch (state_) {
        case State::GREETING:
            peer_ = decode_greeting(in_);
            std::memcpy(peer_bytes_, in_, GREETING_BYTES);
            check_role();
            return dials_ ? dialler_greeted() : acceptor_greeted();
        case State::NONCE: {
            peer_nonce_ = received_digest(0);
            put_greeting();
            put(nonce_);
            put(keyed(ACCEPTOR));
            link_key_ = keyed(LINK_KEY);
            return expect(State::PROOF, DIGEST_BYTES);
        }
        case State::PROOF:
            check_proof(DIALLER, received_digest(0));
            return expect(State::DONE, 0);
        case State::ANSWER:
            peer_nonce_ = received_digest(0);
            check_proof(ACCEPTOR, received_digest(DIGEST_BYTES));
            put(keyed(DIALLER));
            link_key_ = keyed(LINK_KEY);
            return expect(State::DONE, 0);
        case State::REFUSAL:
        case State::REASON: return refused_by_peer();
        case State::DONE: return;
    }
}

void Admission::check_role() const {
    if (peer_.role == own_.role)
        throw Error(ErrorCode::ROLE_CONFLICT, "both ends have the same role", 0,
                    uint64_t(peer_.role), greeting_at::ROLE);
    if (peer_.role == Role::FILE)
        throw Error(ErrorCode::FIELD_INVALID, "greeting: a file does not speak TCP", 0,
                    uint64_t(peer_.role), greeting_at::ROLE);
}

void Admission::dialler_greeted() {
    if (peer_.link_id != own_.link_id || peer_.lane_index != own_.lane_index ||
        peer_.lane_count != own_.lane_count)
        throw Error(ErrorCode::FIELD_INVALID, "greeting: the peer does not echo the lane", 0, 0,
                    greeting_at::LINK_ID);
    if (peer_.flags & GREETING_FLAG_PROOF) return expect(State::ANSWER, 2 * DIGEST_BYTES);
    expect(State::REFUSAL, HEADER_BYTES);
}

void Admission::acceptor_greeted() {
    greeted_ = true;
    own_.link_id = peer_.link_id;
    own_.lane_index = peer_.lane_index;
    own_.lane_count = peer_.lane_count;
    key_ = key_of_(peer_);
    if (peer_.flags & GREETING_FLAG_PROOF) {
        own_.flags = peer_.flags;
        return expect(State::NONCE, DIGEST_BYTES);
    }
    put_greeting();
    expect(State::DONE, 0);
}

// An answer without a proof may be followed by nothing but the reason.
void Admission::refused_by_peer() {
    if (state_ == State::REFUSAL) {
        refusal_ = decode_header(in_, FrameLimits{});
        if (refusal_.type != FrameType::ABORT)
            refuse("the peer gives no proof, and goes on: it may be no kvwire of this version");
        return expect(State::REASON, refusal_.payload_bytes);
    }
    check_control_payload(refusal_, in_);
    Error why = decode_abort({in_, refusal_.payload_bytes});
    why.remote = true;
    throw why;
}

void Admission::last_words(const Error& why) {
    if (dials_ || !greeted_) return;
    if (!answered_) {
        own_.flags = 0;
        put_greeting();
    }
    const Bytes payload = encode(why);
    FrameHeader header;
    header.type = FrameType::ABORT;
    header.payload_bytes = uint32_t(payload.size());
    header.payload_crc = crc32c(0, payload.data(), payload.size());
    const size_t at = out_.size();
    out_.resize(at + HEADER_BYTES);
    encode_header(header, out_.data() + at);
    out_.insert(out_.end(), payload.begin(), payload.end());
}

}  // namespace kvwire
