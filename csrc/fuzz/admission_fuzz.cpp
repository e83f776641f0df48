// Both sides of an admission, and somebody on the path who changes, cuts or invents what they say:
// whoever does not hold the key is never admitted, and neither is a word that was changed.

#include "fuzz/fuzz.hpp"
#include "wire/admission.hpp"

namespace kvwire {
namespace {

using namespace fuzz;

AdmissionTerms terms(Role role) {
    AdmissionTerms terms;
    terms.own.role = role;
    terms.own.link_id.bytes.fill('l');
    terms.nonce.fill(uint8_t(role));
    return terms;
}

// Seals a greeting that was changed: otherwise its checksum would give it away.
void seal_greeting(Bytes& words) {
    if (words.size() >= GREETING_BYTES)
        store_le<uint32_t>(&words[greeting_at::GREETING_CRC],
                           crc32c(0, words.data(), greeting_at::GREETING_CRC));
}

class Path {
public:
    explicit Path(Random& choices) : choices_(choices), same_key_(pick(choices, 0, 3) > 0) {}

    void run() {
        for (int turn = 0; turn < 3; ++turn) {
            carry(dialler_, acceptor_, &acceptor_refused_);
            carry(acceptor_, dialler_, &dialler_refused_);
        }
        if (!same_key_ || changed_) return;
        CHECK(dialler_.done() && acceptor_.done());
        CHECK(*dialler_.link_key() == *acceptor_.link_key());
    }

private:
    void carry(Admission& from, Admission& to, bool* refused) {
        Bytes words = from.take_output();
        const Bytes said = words;
        if (pick(choices_, 0, 7) == 7) {
            change(words, choices_);
            words.resize(std::min(words.size(), said.size()));
            if (pick(choices_, 0, 1)) seal_greeting(words);
        }
        changed_ = changed_ || words != said;
        for (size_t at = 0; at < words.size() && !to.done() && !*refused;) {
            const iovec room = to.next();
            const size_t most = std::min(room.iov_len, words.size() - at);
            CHECK(most > 0);
            const size_t bytes = pick(choices_, 0, 3) ? most : pick(choices_, 1, most);
            std::memcpy(room.iov_base, &words[at], bytes);
            at += bytes;
            const ErrorCode code = refusal([&] { to.advance(bytes); });
            if (to.done()) CHECK(same_key_ && !changed_);
            if (code == ErrorCode::OK) continue;
            *refused = true;
            to.last_words(Error(code, "refused"));
        }
    }

    Random& choices_;
    const bool same_key_;
    Admission dialler_ = Admission::dial(terms(Role::SENDER), Bytes(32, 'k'));
    Admission acceptor_ = Admission::accept(terms(Role::RECEIVER), [this](const Greeting& peer) {
        if (!(peer.flags & GREETING_FLAG_PROOF))
            throw Error(ErrorCode::ADMISSION_REFUSED, "a proof is wanted");
        return Bytes(32, same_key_ ? 'k' : 'K');
    });
    bool changed_ = false, dialler_refused_ = false, acceptor_refused_ = false;
};

}  // namespace
}  // namespace kvwire

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    return kvwire::fuzz::play<kvwire::Path>(data, size);
}
