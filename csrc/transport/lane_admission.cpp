// A lane until its frames begin: connected, inside TLS where the endpoint asks for it, admitted.

#include <sys/epoll.h>

#include "base/random.hpp"
#include "transport/endpoint.hpp"
#include "transport/link.hpp"

namespace kvwire {

void Lane::start(std::shared_ptr<Link> link, const Greeting& greeting) {
    link_ = std::move(link);
    own_ = greeting;
    watch();
}

void Lane::start(Doorkeeper::Entry entry) {
    entry_ = std::move(entry);
    state_ = State::HANDSHAKE;
    watch();
}

void Lane::watch() {
    interest_ = state_ == State::CONNECTING ? uint32_t(EPOLLOUT) : uint32_t(EPOLLIN);
    start_patience();
    loop_.watch(stream_->fd(), interest_, shared_from_this());
}

void Lane::start_patience() {
    if (greeting_timer_) loops_->cancel(*greeting_timer_);
    const uint64_t patience_ns = state_ == State::CONNECTING
                                     ? link_->connect_patience_ns()
                                     : limits::greeting_timeout_ms * 1'000'000;
    greeting_timer_ = loops_->timer(
        Loops::now_ns() + patience_ns, [weak = weak_from_this()] {
            if (const auto lane = weak.lock()) {
                lane->greeting_timer_.reset();
                lane->close(Error(ErrorCode::GREETING_TIMEOUT, "no greeting came in time"), true);
            }
        });
}

void Lane::enter(Lock& lock) {
    if (state_ == State::CONNECTING) {
        if (const int error = connect_result(stream_->fd()))
            throw Error(ErrorCode::CONNECT_FAILED, "connect: " + error_text(error));
        state_ = State::HANDSHAKE;
        start_patience();
    }
    if (state_ == State::HANDSHAKE) shake_hands(lock);
    if (state_ == State::WAITING) wait_for_turn();
    if (state_ == State::ADMISSION) read_admission();
}

// Nothing may come yet but the end.
void Lane::wait_for_turn() {
    uint8_t byte;
    const iovec iov{&byte, 1};
    const IoResult got = stream_->receive(&iov, 1);
    if (got.status == IoStatus::FAILED) throw stream_->failure(got, "receive");
    if (got.status != IoStatus::WOULD_BLOCK)
        throw Error(ErrorCode::PEER_CLOSED, "the peer did not wait for this lane's greeting");
}

void Lane::shake_hands(Lock& lock) {
    const IoStatus status = shake_section(lock);
    if (state_ != State::HANDSHAKE || status != IoStatus::OK) return;
    if (!dialled_) {
        state_ = State::ADMISSION;
        admission_ = std::make_unique<Admission>(Admission::accept(
            terms(endpoint_.greeting()), [this](const Greeting& dialler) {
                const Bytes key = endpoint_.key_for(dialler, stream_->secrets(), &link_);
                ++link_->entering;
                return key;
            }));
    } else if (link_->may_greet(shared_from_this())) {
        greet();
    } else {
        state_ = State::WAITING;
    }
}

AdmissionTerms Lane::terms(const Greeting& own) const {
    AdmissionTerms terms{own, {}, {}};
    random_bytes(terms.nonce.data(), terms.nonce.size());
    if (const auto* secrets = stream_->secrets()) terms.channel = secrets->channel;
    return terms;
}

void Lane::greet() {
    Bytes key = endpoint_.key_of_mode(stream_->secrets());
    if (link_->key()) {
        if (state_ == State::WAITING) start_patience();
        own_.flags |= GREETING_FLAG_JOIN;
        key.assign(link_->key()->begin(), link_->key()->end());
    }
    state_ = State::ADMISSION;
    admission_ = std::make_unique<Admission>(Admission::dial(terms(own_), std::move(key)));
    early_ = admission_->take_output();
    arm();
}

void Lane::read_admission() {
    while (!admission_->done()) {
        const iovec iov = admission_->next();
        const IoResult got = stream_->receive(&iov, 1);
        if (got.status == IoStatus::WOULD_BLOCK) return;
        if (got.status != IoStatus::OK) throw not_admitted(got);
        endpoint_.counters().bytes_received += got.bytes;
        admission_->advance(got.bytes);
        const Bytes output = admission_->take_output();
        early_.insert(early_.end(), output.begin(), output.end());
        // An acceptor knows the key before it has seen the proof: further lanes may overtake it.
        if (admission_->link_key() && !(admission_->peer().flags & GREETING_FLAG_JOIN))
            link_->establish(*admission_->link_key());
    }
    if (endpoint_.closing()) throw Error(ErrorCode::CLOSED, "this side is closing");
    own_ = admission_->own();
    open();
}

Error Lane::not_admitted(const IoResult& got) const {
    if (got.status == IoStatus::CLOSED)
        return Error(admission_->began() ? ErrorCode::TRUNCATED : ErrorCode::PEER_CLOSED,
                     "the peer closed before the lane was admitted: do both sides have the same "
                     "security?");
    Error why = stream_->failure(got, "receive");
    if (why.code == ErrorCode::PEER_CLOSED)
        why.message += ", before the lane was admitted: do both sides have the same security?";
    return why;
}

void Lane::write_early() {
    while (!blocked_ && early_sent_ < early_.size()) {
        const iovec iov{early_.data() + early_sent_, early_.size() - early_sent_};
        const IoResult put = stream_->send(&iov, 1);
        if (put.status == IoStatus::FAILED) throw stream_->failure(put, "send");
        blocked_ = put.status == IoStatus::WOULD_BLOCK;
        early_sent_ += put.bytes;
    }
}

// ---- the lanes of a dialled link, one after another

bool Link::may_greet(const std::shared_ptr<Lane>& socket) {
    if (ended_) throw Error(ErrorCode::LINK_LOST, "the link has ended");
    if (key_) return true;
    if (establishing_) {
        waiting_.push_back(socket);
        return false;
    }
    establishing_ = socket.get();
    return true;
}

void Link::establish(const Digest& key) {
    key_ = key;
    establishing_ = nullptr;
    while (!waiting_.empty()) greet_next();
}

void Link::greet_next() {
    const auto next = waiting_.back().lock();
    waiting_.pop_back();
    if (!next || !next->waits()) return;
    if (!key_) establishing_ = next.get();
    next->greet();
}

}  // namespace kvwire
