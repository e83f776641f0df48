#include <sched.h>
#include <sys/epoll.h>

#include <algorithm>

#include "transport/endpoint.hpp"
#include "transport/link.hpp"

namespace kvwire {
namespace {

// One lane may not keep its thread from the others for longer than this many bytes.
constexpr size_t TURN_BYTES = 8 << 20;
// A peer that does not read its answers is not read from either.
constexpr size_t ANSWERS_BYTES_MAX = 256 << 10;

constexpr int RECEIVE_MARK_BYTES = 64 << 10;
constexpr size_t LOOK_BYTES = 2 << 20;

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

Lane::Lane(Endpoint& endpoint, Fd fd, bool dialled)
    : endpoint_(endpoint), loops_(endpoint.shared_loops()), loop_(loops_->next()),
      fd_(std::move(fd)), dialled_(dialled) {}

void Lane::start(std::shared_ptr<Link> link, const Greeting& greeting) {
    link_ = std::move(link);
    own_ = greeting;
    greeting_out_.resize(GREETING_BYTES);
    encode_greeting(own_, greeting_out_.data());
    watch();
}

void Lane::start() {
    state_ = State::GREETING;
    watch();
}

void Lane::watch() {
    interest_ = state_ == State::CONNECTING ? uint32_t(EPOLLOUT) : uint32_t(EPOLLIN);
    start_patience();
    loop_.watch(fd_, interest_, shared_from_this());
}

void Lane::start_patience() {
    if (greeting_timer_) loops_->cancel(*greeting_timer_);
    const uint64_t patience_ns = state_ == State::CONNECTING
                                     ? endpoint_.options().connect_timeout_ns
                                     : limits::greeting_timeout_ms * 1'000'000;
    greeting_timer_ = loops_->timer(
        Loops::now_ns() + patience_ns, [weak = weak_from_this()] {
            if (const auto lane = weak.lock()) {
                lane->greeting_timer_.reset();
                lane->close(Error(ErrorCode::GREETING_TIMEOUT, "no greeting came in time"), true);
            }
        });
}

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
    if (state_ == State::CONNECTING) {
        const int error = connect_result(fd_);
        if (error != 0)
            return close(Error(ErrorCode::CONNECT_FAILED, "connect: " + error_text(error)), false);
        state_ = State::GREETING;
        start_patience();
    }
    if (epoll_events & EPOLLOUT) blocked_ = false;
    if (epoll_events & (EPOLLIN | EPOLLHUP | EPOLLERR)) guarded(lock, &Lane::read);
    if (state_ == State::OPEN) link_->pump(this);
    if (state_ != State::CLOSED) guarded(lock, &Lane::write);
}

void Lane::write_now() {
    Lock lock(*loops_);
    guarded(lock, &Lane::write);
}

bool Lane::read_greeting() {
    const iovec iov{greeting_in_ + greeting_received_, GREETING_BYTES - greeting_received_};
    const IoResult got = receive(fd_, &iov, 1);
    if (got.status == IoStatus::WOULD_BLOCK) return false;
    if (got.status == IoStatus::FAILED)
        throw Error(ErrorCode::PEER_CLOSED, "receive: " + error_text(got.error));
    if (got.status == IoStatus::CLOSED)
        throw Error(greeting_received_ ? ErrorCode::TRUNCATED : ErrorCode::PEER_CLOSED,
                    "the peer closed before its greeting was complete", GREETING_BYTES,
                    greeting_received_);
    greeting_received_ += got.bytes;
    endpoint_.counters().bytes_received += got.bytes;
    // Strangers are told so at their first wrong byte, not after 64.
    const size_t check = std::min(greeting_received_, sizeof GREETING_MAGIC);
    if (std::memcmp(greeting_in_, GREETING_MAGIC, check) != 0)
        throw Error(ErrorCode::BAD_MAGIC, "greeting: these are not kvwire's first bytes");
    if (greeting_received_ < GREETING_BYTES) return false;
    greeted(decode_greeting(greeting_in_));
    return true;
}

void Lane::greeted(const Greeting& peer) {
    if (endpoint_.closing()) throw Error(ErrorCode::CLOSED, "this side is closing");
    if (peer.role == endpoint_.role())
        throw Error(ErrorCode::ROLE_CONFLICT, "both ends have the same role", 0,
                    uint64_t(peer.role), greeting_at::ROLE);
    if (peer.role == Role::FILE)
        throw Error(ErrorCode::FIELD_INVALID, "greeting: a file does not speak TCP", 0,
                    uint64_t(peer.role), greeting_at::ROLE);
    if (dialled_) {
        if (peer.link_id != own_.link_id || peer.lane_index != own_.lane_index ||
            peer.lane_count != own_.lane_count)
            throw Error(ErrorCode::FIELD_INVALID, "greeting: the peer does not echo the lane", 0, 0,
                        greeting_at::LINK_ID);
    } else {
        link_ = endpoint_.adopt(peer.link_id);
        own_ = endpoint_.greeting();
        own_.link_id = peer.link_id;
        own_.lane_index = peer.lane_index;
        own_.lane_count = peer.lane_count;
        greeting_out_.resize(GREETING_BYTES);
        encode_greeting(own_, greeting_out_.data());
    }
    open(peer);
}

void Lane::open(const Greeting& peer) {
    writer_ = &link_->lane_opened(peer.lane_index, shared_from_this(), peer);
    state_ = State::OPEN;
    follows_ = is_same_host(fd_) && 2 * own_.lane_count > Affinity::cores();
    reader_ = std::make_unique<LaneReader>(
        link_->machine(), peer.lane_index,
        FrameLimits{own_.payload_bytes_max, own_.control_bytes_max});
    loops_->cancel(*greeting_timer_);
    greeting_timer_.reset();
}

void Lane::read(Lock& lock) {
    if (state_ == State::GREETING && !read_greeting()) return;
    if (link_->receive) link_->receive->set_now(Loops::now_ns());
    read_frames(lock);
    if (state_ == State::OPEN) mark();
}

void Lane::read_frames(Lock& lock) {
    for (size_t turn = 0; turn < TURN_BYTES;) {
        if (writer_->queued_control_bytes() > ANSWERS_BYTES_MAX) return;
        const iovec* iov;
        const size_t count = reader_->next_iovecs(&iov);
        const IoResult got = receive_section(lock, iov, count);
        if (state_ != State::OPEN) return;
        ++endpoint_.counters().receive_calls;
        if (got.status == IoStatus::WOULD_BLOCK) return;
        if (got.status == IoStatus::FAILED)
            throw Error(ErrorCode::PEER_CLOSED, "receive: " + error_text(got.error));
        if (got.status == IoStatus::CLOSED) {
            reader_->end_of_stream();
            return close(Error(ErrorCode::PEER_CLOSED, "the peer closed the connection"), false);
        }
        endpoint_.counters().bytes_received += got.bytes;
        loop_.moved(got.bytes);
        const bool drained = got.bytes < total(iov, count);
        reader_->advance(got.bytes);
        if (drained) return;
        turn += got.bytes;
    }
}

IoResult Lane::receive_section(Lock& lock, const iovec* iov, size_t count) {
    reader_->begin_section();
    const Section section(lock, reading_);
    const IoResult got = receive(fd_, iov, count);
    if (got.status == IoStatus::OK) reader_->digest(got.bytes);
    reader_->end_section();
    if (follows_) follow(got.bytes);
    return got;
}

void Lane::follow(size_t bytes) {
    unlooked_bytes_ += bytes;
    if (unlooked_bytes_ < LOOK_BYTES) return;
    unlooked_bytes_ = 0;
    loop_.follow(incoming_core(fd_));
}

// Inside a chunk there is nothing to do for less than a good part of what is left of it: without
// this the thread is woken for every segment that comes in.
void Lane::mark() {
    const uint64_t rest = reader_->chunk_rest();
    const int wanted = rest >= uint64_t(RECEIVE_MARK_BYTES) ? RECEIVE_MARK_BYTES : 1;
    if (wanted == mark_) return;
    mark_ = wanted;
    set_receive_mark(fd_, wanted);
}

void Lane::write(Lock& lock) {
    if (state_ == State::CLOSED || being_written_) return;  // who writes already looks again
    struct Guard {
        explicit Guard(bool& flag) : flag(flag) { flag = true; }
        ~Guard() { flag = false; }
        bool& flag;
    } const guard(being_written_);
    write_greeting();
    bool more = state_ == State::OPEN;
    for (size_t turn = 0; more && state_ == State::OPEN && !blocked_ && turn < TURN_BYTES;)
        more = write_batch(lock, &turn);
    if (state_ != State::CLOSED) update_interest(more);
}

void Lane::write_greeting() {
    while (!blocked_ && greeting_sent_ < greeting_out_.size()) {
        const iovec iov{greeting_out_.data() + greeting_sent_,
                        greeting_out_.size() - greeting_sent_};
        const IoResult put = send(fd_, &iov, 1);
        if (put.status == IoStatus::FAILED)
            throw Error(ErrorCode::PEER_CLOSED, "send: " + error_text(put.error));
        blocked_ = put.status == IoStatus::WOULD_BLOCK;
        greeting_sent_ += put.bytes;
    }
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
    if (sent_.status == IoStatus::FAILED)
        throw Error(ErrorCode::PEER_CLOSED, "send: " + error_text(sent_.error));
    blocked_ = sent_.status == IoStatus::WOULD_BLOCK;
    endpoint_.counters().bytes_sent += sent_.bytes;
    loop_.moved(sent_.bytes);
    *bytes += sent_.bytes;
    settle();
    return true;
}

void Lane::prepare_section(Lock& lock) {
    writer_->in_section = true;
    const Section section(lock, writing_);
    writer_->prepare();
    writer_->in_section = false;
}

void Lane::send_section(Lock& lock, const iovec* iov, size_t count) {
    writer_->in_section = true;
    const Section section(lock, writing_);
    sent_ = send(fd_, iov, count);
    writer_->in_section = false;
}

// Takes what a section has sent out of the writer; whoever has the lock first does it.
void Lane::settle() {
    if (sent_.bytes && writer_) writer_->advance(sent_.bytes);
    sent_.bytes = 0;
}

void Lane::arm() {
    if (interest_ & EPOLLOUT) return;
    interest_ |= EPOLLOUT;
    loop_.modify(fd_, interest_);
}

void Lane::update_interest(bool more) {
    const bool choked = writer_ && writer_->queued_control_bytes() > ANSWERS_BYTES_MAX;
    const bool wants_to_write = more || blocked_ || greeting_sent_ < greeting_out_.size();
    const uint32_t interest =
        (choked ? 0u : uint32_t(EPOLLIN)) | (wants_to_write ? uint32_t(EPOLLOUT) : 0u);
    if (interest == interest_) return;
    interest_ = interest;
    loop_.modify(fd_, interest);
}

void Lane::wait_for_sections() {
    while (reading_.load(std::memory_order_acquire) || writing_.load(std::memory_order_acquire))
        ::sched_yield();
    settle();
}

// The last words, as far as the socket takes them at once.
void Lane::flush_and_close(const Error& why) {
    wait_for_sections();
    if (state_ == State::OPEN) {
        const iovec* iov;
        while (const size_t count = writer_->next_iovecs(&iov)) {
            const IoResult put = send(fd_, iov, count);
            if (put.status != IoStatus::OK) break;
            writer_->advance(put.bytes);
        }
    }
    close(why, false);
}

void Lane::close(const Error& why, bool tell_peer) {
    if (state_ == State::CLOSED) return;
    const auto alive = shared_from_this();
    wait_for_sections();
    if (tell_peer && writer_) {
        writer_->control(FrameType::ABORT, Id{}, 0, encode(why));
        const iovec* iov;
        const size_t count = writer_->next_iovecs(&iov);
        send(fd_, iov, count);
    }
    const bool was_open = state_ == State::OPEN;
    state_ = State::CLOSED;
    writer_ = nullptr;
    if (greeting_timer_) loops_->cancel(*greeting_timer_);
    loop_.unwatch(fd_);
    fd_.reset();
    --endpoint_.counters().connections;
    const auto link = std::move(link_);
    if (was_open) {
        ++endpoint_.counters().lanes_lost;
        link->lane_closed(own_.lane_index, this, why);
    } else if (dialled_) {
        link->dial_failed(own_.lane_index, why);
    } else if (link && !link->alive()) {
        endpoint_.link_lost(*link, why);
    }
}

}  // namespace kvwire
