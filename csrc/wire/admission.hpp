#pragma once
// Sans-I/O admission of a lane (FORMAT.md section 5): the greetings of both sides and, where the
// dialler's says so, the proofs that both hold the same key. What comes after is frames.

#include <sys/uio.h>

#include <functional>
#include <optional>

#include "base/sha256.hpp"
#include "wire/control.hpp"
#include "wire/frames.hpp"

namespace kvwire {

// What one side brings to the admission of one lane.
struct AdmissionTerms {
    Greeting own;      // of an acceptor: role and limits; it echoes the rest
    Digest nonce{};    // random, never used twice
    Digest channel{};  // binds the proofs to a TLS connection; zero in cleartext
};

class Admission {
public:
    // The key that a lane must prove. Throws what it is refused with: LINK_UNKNOWN, or
    // ADMISSION_REFUSED when its greeting announces no proof although one is wanted.
    using KeyOf = std::function<Bytes(const Greeting& dialler)>;

    static Admission dial(const AdmissionTerms& terms, Bytes key);
    static Admission accept(const AdmissionTerms& terms, KeyOf key_of);

    // Where the next bytes of the peer go; never reaches into the frames. Valid until advance().
    iovec next() { return {in_ + received_, expected_ - received_}; }
    // `bytes` have arrived there. Throws Error when the lane must be closed.
    void advance(size_t bytes);
    // What is to be written now, in order.
    Bytes take_output();

    bool done() const { return state_ == State::DONE; }
    bool began() const { return received_ > 0 || state_ != State::GREETING; }
    const Greeting& own() const { return own_; }
    const Greeting& peer() const { return peer_; }
    // What further lanes of this link prove; none where this one proved nothing.
    const std::optional<Digest>& link_key() const { return link_key_; }

    // An acceptor tells a peer that has greeted it why it closes the lane.
    void last_words(const Error& why);

private:
    enum class State { GREETING, NONCE, PROOF, ANSWER, REFUSAL, REASON, DONE };

    Admission(const AdmissionTerms& terms, bool dials);
    void expect(State state, size_t bytes);
    void step();
    void dialler_greeted();
    void acceptor_greeted();
    void refused_by_peer();
    void check_role() const;
    void put_greeting();
    void put(const Digest& digest);
    Digest received_digest(size_t offset) const;
    Digest keyed(const char* label) const;
    void check_proof(const char* label, const Digest& given);
    const uint8_t* greeting_of(bool dialler) const { return dialler == dials_ ? own_bytes_
                                                                              : peer_bytes_; }

    const bool dials_;
    State state_ = State::GREETING;
    Greeting own_, peer_;
    const Digest nonce_, channel_;
    Digest peer_nonce_{};
    Bytes key_;
    FrameHeader refusal_;
    KeyOf key_of_;
    std::optional<Digest> link_key_;
    bool greeted_ = false, answered_ = false;
    uint8_t own_bytes_[GREETING_BYTES], peer_bytes_[GREETING_BYTES];
    uint8_t in_[ABORT_FIXED_BYTES + limits::message_bytes_max];
    size_t received_ = 0, expected_ = GREETING_BYTES;
    Bytes out_;
};

}  // namespace kvwire
