#include <sched.h>
#include <sys/epoll.h>

#include <algorithm>
#include <utility>

#include "transport/endpoint.hpp"
#include "transport/link.hpp"
#include "transport/tcp_info.hpp"

namespace kvwire {
namespace {

// One lane may not keep its thread from the others for longer than this many bytes.
constexpr size_t TURN_BYTES = 8 << 20;
constexpr size_t ANSWERS_BYTES_MAX = 256 << 10;

constexpr size_t TIMED_BYTES_MIN = 32 << 10;  // less says more of the call than of the bytes
constexpr int RECEIVE_MARK_BYTES = 64 << 10;
constexpr size_t LOOK_BYTES = 2 << 20;

// How long the last words of a lane that closes may take when zero-copy sends are among them.
constexpr uint64_t FAREWELL_NS = 200'000'000;
constexpr uint64_t NOTICE_PAUSE_NS = 1'000'000;

size_t total(const iovec* iov, size_t count) {
    size_t bytes = 0;
    for (size_t i = 0; i < count; ++i) bytes += iov[i].iov_len;
    return bytes;
}

// Time without the lock. The flag falls before the lock is asked for again, so that whoever holds
// it can wait for the section to end.
class Section {
public:
    Section(Lock& lock, std::atomic<bool>& flag) : lock_(lock), flag_(flag) {
        flag_.store(true, std::memory_order_relaxed);
        lock_.unlock();
    }
    ~Section() {
        flag_.store(false, std::memory_order_release);
        lock_.lock();
    }

private:
    Lock& lock_;
    std::atomic<bool>& flag_;
};

}  // namespace

Lane::Lane(Endpoint& endpoint, std::unique_ptr<Stream> stream, bool dialled)
    : endpoint_(endpoint), loops_(endpoint.shared_loops()), loop_(loops_->next()),
      stream_(std::move(stream)), dialled_(dialled) {}

// Runs a step; what it throws closes the lane.
void Lane::guarded(Lock& lock, void (Lane::*step)(Lock& lock)) {
    try {
        (this->*step)(lock);
    } catch (const Error& error) {
        close(error, true);
    } catch (const std::exception& error) {
        close(Error(ErrorCode::INTERNAL, error.what()), true);
    }
}

void Lane::on_events(uint32_t epoll_events) {
    Lock lock(*loops_);
    if (state_ == State::CLOSED) return;
    if (epoll_events & EPOLLOUT) blocked_ = false;
    if (epoll_events & EPOLLERR && read_notices())
        epoll_events &= ~uint32_t(EPOLLERR);
    if (state_ < State::OPEN) guarded(lock, &Lane::enter);
    const bool readable = epoll_events & (EPOLLIN | EPOLLHUP | EPOLLERR) || stream_->has_unread();
    if (state_ == State::OPEN && readable) guarded(lock, &Lane::read);
    if (failed_ && state_ != State::CLOSED) close(*failed_, true);
    if (state_ == State::OPEN) link_->pump(this);
    if (state_ != State::CLOSED) guarded(lock, &Lane::write);
}

void Lane::write_now() {
    Lock lock(*loops_);
    guarded(lock, &Lane::write);
}

void Lane::open() {
    if (endpoint_.find_link(link_->id) != link_)
        throw Error(ErrorCode::LINK_UNKNOWN, "the link ended before this lane was admitted");
    entry_.admitted();
    is_same_host_ = kvwire::is_same_host(stream_->fd());
    writer_ = &link_->lane_opened(own_.lane_index, shared_from_this(), admission_->peer());
    state_ = State::OPEN;
    if (!dialled_) --link_->entering;
    follows_ = is_same_host_ && 2 * own_.lane_count > Affinity::cores();
    opened_ns_ = Loops::now_ns();
    set_patience(stream_->fd(), endpoint_.options().liveness().lease_ns / 1'000'000);
    if (link_->send && endpoint_.zero_copy() != ZeroCopy::OFF) start_zero_copy();
    reader_ = std::make_unique<LaneReader>(
        link_->machine(), own_.lane_index,
        FrameLimits{own_.payload_bytes_max, own_.control_bytes_max});
    admission_.reset();
    loops_->cancel(*greeting_timer_);
    greeting_timer_.reset();
}

void Lane::start_zero_copy() {
    std::string& note = endpoint_.counters().zero_copy_note;
    if (endpoint_.options().tls) {
        note = "TLS sends what it has made of the bytes, not the bytes";
    } else if (const int error = enable_zero_copy(stream_->fd())) {
        note = "SO_ZEROCOPY: " + error_text(error);
    } else {
        asks_zero_copy_ = true;
        loans_ = writer_->loans();
    }
}

void Lane::read(Lock& lock) {
    read_frames(lock);
    if (state_ != State::OPEN) return;
    mark();
    // No answer will carry its acknowledgement, and a late one looks like a long round trip.
    if (link_->machine().take_pong()) acknowledge_now(stream_->fd());
}

void Lane::read_frames(Lock& lock) {
    for (size_t turn = 0; turn < TURN_BYTES || stream_->has_unread();) {
        if (is_choked()) return;
        const iovec* iov;
        const size_t count = reader_->next_iovecs(&iov);
        const IoResult got = receive_section(lock, iov, count);
        if (state_ != State::OPEN) return;
        ++endpoint_.counters().receive_calls;
        if (got.status == IoStatus::WOULD_BLOCK) return;
        if (got.status == IoStatus::FAILED)
            throw stream_->failure(got, "receive");
        if (got.status == IoStatus::CLOSED) {
            reader_->end_of_stream();
            return close(Error(ErrorCode::PEER_CLOSED, "the peer closed the connection"), false);
        }
        endpoint_.counters().bytes_received += got.bytes;
        loop_.moved(got.bytes);
        const bool drained = got.bytes < total(iov, count);
        link_->machine().heard(own_.lane_index, Loops::now_ns());
        reader_->advance(got.bytes);
        if (drained) return;
        turn += got.bytes;
    }
}

IoStatus Lane::shake_section(Lock& lock) {
    const Section section(lock, reading_);
    return stream_->shake_hands();
}

IoResult Lane::receive_section(Lock& lock, const iovec* iov, size_t count) {
    reader_->begin_section();
    const Section section(lock, reading_);
    const bool timed = reader_->wants_times();
    const uint64_t began_ns = timed ? thread_cpu_ns() : 0;
    const IoResult got = stream_->receive(iov, count);
    const uint64_t received_ns = timed ? thread_cpu_ns() : 0;
    if (got.status == IoStatus::OK) reader_->digest(got.bytes);
    if (timed) reader_->note_times(received_ns - began_ns, thread_cpu_ns() - received_ns);
    reader_->end_section();
    if (follows_) follow(got.bytes);
    return got;
}

void Lane::follow(size_t bytes) {
    unlooked_bytes_ += bytes;
    if (unlooked_bytes_ < LOOK_BYTES) return;
    unlooked_bytes_ = 0;
    loop_.follow(incoming_core(stream_->fd()));
}

// Inside a chunk there is nothing to do for less than a good part of what is left of it: without
// this the thread is woken for every segment that comes in.
void Lane::mark() {
    const uint64_t rest = reader_->chunk_rest();
    const int wanted = rest >= uint64_t(RECEIVE_MARK_BYTES) ? RECEIVE_MARK_BYTES : 1;
    if (wanted == mark_) return;
    mark_ = wanted;
    stream_->set_receive_mark(wanted);
}

void Lane::write(Lock& lock) {
    if (state_ == State::CLOSED || being_written_) return;  // who writes already looks again
    struct Guard {
        explicit Guard(bool& flag) : flag(flag) { flag = true; }
        ~Guard() { flag = false; }
        bool& flag;
    } const guard(being_written_);
    write_early();
    bool more = state_ == State::OPEN;
    if (state_ > State::HANDSHAKE && !blocked_ && stream_->has_unsent()) {
        sent_ = stream_->send(nullptr, 0);
        check_sent();
    }
    for (size_t turn = 0; more && state_ == State::OPEN && !blocked_ && turn < TURN_BYTES;)
        more = write_batch(lock, &turn);
    if (state_ != State::CLOSED) update_interest(more);
}

// False: there is nothing to write, or another thread is at it.
bool Lane::write_batch(Lock& lock, size_t* bytes) {
    if (!link_->load(own_.lane_index)) return false;
    if (writer_->begin_preparing()) {
        prepare_section(lock);
        if (state_ != State::OPEN) return false;
        if (!link_->send->commit(own_.lane_index)) link_->pump(this);
    }
    const iovec* iov;
    const size_t count = writer_->next_iovecs(&iov);
    if (count == 0) return true;  // what was loaded has been withdrawn
    send_section(lock, iov, count);
    if (state_ != State::OPEN) return false;
    ++endpoint_.counters().send_calls;
    check_sent();
    endpoint_.counters().bytes_sent += sent_.bytes;
    if (send_ns_ && sent_.bytes >= TIMED_BYTES_MIN && link_->send)
        link_->send->choice().sent(sent_.bytes, send_ns_);
    send_ns_ = 0;
    loop_.moved(sent_.bytes);
    *bytes += sent_.bytes;
    settle();
    return true;
}

void Lane::prepare_section(Lock& lock) {
    const Section section(lock, writer_->in_section);
    writer_->prepare();
}

void Lane::send_section(Lock& lock, const iovec* iov, size_t count) {
    lent_ = false;
    refusal_ = 0;
    const bool zero_copy = asks_zero_copy_ && total(iov, count) >= ZERO_COPY_BYTES_MIN;
    if (zero_copy) writer_->lend();
    const Section section(lock, writer_->in_section);
    const bool timed = total(iov, count) >= TIMED_BYTES_MIN && sent_sampler_.next();
    const uint64_t began_ns = timed ? thread_cpu_ns() : 0;
    sent_ = zero_copy ? send_zero_copy(stream_->fd(), iov, count, &refusal_)
                      : stream_->send(iov, count);
    lent_ = zero_copy && sent_.bytes && !refusal_;
    send_ns_ = timed ? thread_cpu_ns() - began_ns : 0;
}

// A peer that is gone may have said why, and that may lie here unread: the event that the failure
// makes, or a socket that can be written, reads it and then closes.
void Lane::check_sent() {
    if (sent_.status == IoStatus::FAILED) failed_ = stream_->failure(sent_, "send");
    blocked_ = sent_.status != IoStatus::OK;
}

// Takes what a section has sent out of the writer; whoever has the lock first does it.
void Lane::settle() {
    if (!writer_) return;
    writer_->advance(sent_.bytes, lent_);
    sent_.bytes = 0;
    if (!loans_) return;
    endpoint_.counters().zero_copy_sends += std::exchange(lent_, false);
    if (const int refusal = std::exchange(refusal_, 0)) refuse_zero_copy(refusal);
    link_->send->loans_changed();  // what was in doubt is so no more
}

void Lane::refuse_zero_copy(int refusal) {
    ++endpoint_.counters().zero_copies_refused;
    endpoint_.counters().zero_copy_note = "MSG_ZEROCOPY: " + error_text(refusal);
    if (!is_passing(refusal)) asks_zero_copy_ = false;
}

// What the kernel has finished with. False: it says nothing.
bool Lane::read_notices() { return loans_ && read_notices(*link_->send); }

bool Lane::read_notices(SendLink& machine) {
    bool any = false;
    for (Notice notice; read_notice(stream_->fd(), &notice); any = true) {
        loans_->returned(notice.first, notice.last);
        if (!notice.copied) continue;
        ++endpoint_.counters().zero_copies_copied;
        if (endpoint_.zero_copy() != ZeroCopy::ALWAYS) asks_zero_copy_ = false;
    }
    if (any) machine.loans_changed();
    return any;
}

// Closes a lost lane's socket when the kernel reads nothing any more of what it was lent for it. At
// `reset_ns` what has not been sent yet is dropped.
void Lane::pay_debt(std::shared_ptr<Link> link, uint64_t reset_ns) {
    const uint64_t now = Loops::now_ns();
    if (now >= reset_ns) reset_connection(stream_->fd());
    read_notices(*link->send);
    if (loans_->empty()) {
        link->send->loans_changed();
        stream_->close();
        --endpoint_.counters().lanes_in_debt;
        return;
    }
    loops_->timer(now + NOTICE_PAUSE_NS, [self = shared_from_this(), link, reset_ns] {
        self->pay_debt(link, reset_ns);
    });
}

void Lane::report(Liveness& liveness) const {
    if (state_ != State::OPEN) return;
    const uint64_t now_ns = Loops::now_ns();
    if (const auto info = tcp_info(stream_->fd().get()))
        liveness.sent(own_.lane_index, info->acked_bytes,
                      info->in_flight_segments > 0 || info->unsent_bytes > 0, now_ns);
    // What waits here for a busy thread is no silence of the peer's.
    if (!is_choked() && unread_bytes(stream_->fd()) >= size_t(mark_))
        liveness.heard(own_.lane_index, now_ns);
}

// A peer that does not read its answers is not read from either.
bool Lane::is_choked() const { return writer_->queued_control_bytes() > ANSWERS_BYTES_MAX; }

void Lane::arm() {
    if (interest_ & EPOLLOUT) return;
    interest_ |= EPOLLOUT;
    loop_.modify(stream_->fd(), interest_);
}

void Lane::update_interest(bool more) {
    const bool choked = writer_ && is_choked();
    // What a stream holds back from a choked lane makes no event of its own.
    const bool wants_to_write = more || blocked_ || early_sent_ < early_.size() ||
                                stream_->has_unsent() || (!choked && stream_->has_unread());
    const uint32_t interest =
        (choked ? 0u : uint32_t(EPOLLIN)) | (wants_to_write ? uint32_t(EPOLLOUT) : 0u);
    if (interest == interest_) return;
    interest_ = interest;
    loop_.modify(stream_->fd(), interest);
}

void Lane::wait_for_sections() {
    while (reading_.load(std::memory_order_acquire) ||
           (writer_ && writer_->in_section.load(std::memory_order_acquire)))
        ::sched_yield();
    settle();
}

// The last words, as far as the socket takes them at once.
void Lane::flush_and_close(const Error& why) {
    wait_for_sections();
    if (state_ == State::OPEN) {
        const iovec* iov;
        while (const size_t count = writer_->next_iovecs(&iov)) {
            const IoResult put = stream_->send(iov, count);
            if (put.bytes) writer_->advance(put.bytes);
            if (put.status != IoStatus::OK) break;
        }
    }
    close(why, false, loans_ ? Loops::now_ns() + FAREWELL_NS : 0);
}

// As far as the socket takes it at once.
void Lane::say(const Error& why) {
    if (state_ == State::OPEN) {
        writer_->control(FrameType::ABORT, Id{}, 0, encode(why));
        const iovec* iov;
        const size_t count = writer_->next_iovecs(&iov);
        stream_->send(iov, count);
    } else if (admission_) {
        admission_->last_words(why);
        Bytes words = admission_->take_output();
        const iovec iov[] = {{early_.data() + early_sent_, early_.size() - early_sent_},
                             {words.data(), words.size()}};
        stream_->send(iov, 2);
    }
}

void Lane::close(const Error& why, bool tell_peer, uint64_t reset_ns) {
    if (state_ == State::CLOSED) return;
    const auto alive = shared_from_this();
    wait_for_sections();
    if (tell_peer) {
        say(why);
        reset_ns = Loops::now_ns() + FAREWELL_NS;
    }
    const bool was_open = state_ == State::OPEN;
    state_ = State::CLOSED;
    entry_ = {};
    writer_ = nullptr;
    if (greeting_timer_) loops_->cancel(*greeting_timer_);
    loop_.unwatch(stream_->fd());
    if (!loans_) stream_->close();
    --endpoint_.counters().connections;
    const auto link = std::move(link_);
    if (was_open) {
        ++endpoint_.counters().lanes_lost;
        link->lane_closed(own_.lane_index, this, why);
        if (!loans_) return;
        ++endpoint_.counters().lanes_in_debt;
        pay_debt(link, loans_->empty() ? ~uint64_t(0) : reset_ns);
    } else if (dialled_) {
        link->dial_failed(own_.lane_index, this, why);
    } else if (link && --link->entering == 0 && !link->had_lanes()) {
        endpoint_.link_lost(*link, why);
    }
}

}  // namespace kvwire
