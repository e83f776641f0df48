#include <algorithm>
#include <sys/epoll.h>

#include "transport/endpoint.hpp"
#include "transport/link.hpp"

namespace kvwire {
namespace {

// One lane may not keep the thread from the others for longer than this many bytes.
constexpr size_t TURN_BYTES = 8 << 20;
// A peer that does not read its answers is not read from either.
constexpr size_t ANSWERS_BYTES_MAX = 256 << 10;

constexpr int RECEIVE_MARK_BYTES = 64 << 10;

size_t total(const iovec* iov, size_t count) {
    size_t bytes = 0;
    for (size_t i = 0; i < count; ++i) bytes += iov[i].iov_len;
    return bytes;
}

}  // namespace

Lane::Lane(Endpoint& endpoint, Fd fd, bool dialled)
    : endpoint_(endpoint), fd_(std::move(fd)), dialled_(dialled) {}

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
    endpoint_.loop().watch(fd_, interest_, shared_from_this());
    start_patience();
}

void Lane::start_patience() {
    if (greeting_timer_) endpoint_.loop().cancel(*greeting_timer_);
    const uint64_t patience_ns = state_ == State::CONNECTING
                                     ? endpoint_.options().connect_timeout_ns
                                     : limits::greeting_timeout_ms * 1'000'000;
    greeting_timer_ = endpoint_.loop().timer(
        Loop::now_ns() + patience_ns, [weak = weak_from_this()] {
            if (const auto lane = weak.lock()) {
                lane->greeting_timer_.reset();
                lane->close(Error(ErrorCode::GREETING_TIMEOUT, "no greeting came in time"), true);
            }
        });
}

// Runs a step; what it throws closes the lane.
void Lane::guarded(void (Lane::*step)()) {
    try {
        (this->*step)();
    } catch (const Error& error) {
        close(error, true);
    } catch (const std::exception& error) {
        close(Error(ErrorCode::INTERNAL, error.what()), true);
    }
}

void Lane::on_events(uint32_t epoll_events) {
    const auto alive = shared_from_this();
    if (state_ == State::CONNECTING) {
        const int error = connect_result(fd_);
        if (error != 0)
            return close(Error(ErrorCode::CONNECT_FAILED, "connect: " + error_text(error)), false);
        state_ = State::GREETING;
        start_patience();
    }
    if (epoll_events & EPOLLOUT) blocked_ = false;
    if (epoll_events & (EPOLLIN | EPOLLHUP | EPOLLERR)) guarded(&Lane::read);
    if (state_ != State::CLOSED) guarded(&Lane::pump);
}

void Lane::pump() {
    const auto link = link_;
    state_ == State::OPEN ? link->pump() : write();
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
    reader_ = std::make_unique<LaneReader>(
        link_->machine(), peer.lane_index,
        FrameLimits{own_.payload_bytes_max, own_.control_bytes_max});
    endpoint_.loop().cancel(*greeting_timer_);
    greeting_timer_.reset();
}

void Lane::read() {
    if (state_ == State::GREETING && !read_greeting()) return;
    if (link_->receive) link_->receive->set_now(Loop::now_ns());
    read_frames();
    if (state_ == State::OPEN) mark();
}

void Lane::read_frames() {
    for (size_t turn = 0; turn < TURN_BYTES;) {
        if (writer_->queued_control_bytes() > ANSWERS_BYTES_MAX) return;
        const iovec* iov;
        const size_t count = reader_->next_iovecs(&iov);
        const IoResult got = receive(fd_, iov, count);
        ++endpoint_.counters().receive_calls;
        if (got.status == IoStatus::WOULD_BLOCK) return;
        if (got.status == IoStatus::FAILED)
            throw Error(ErrorCode::PEER_CLOSED, "receive: " + error_text(got.error));
        if (got.status == IoStatus::CLOSED) {
            reader_->end_of_stream();
            return close(Error(ErrorCode::PEER_CLOSED, "the peer closed the connection"), false);
        }
        endpoint_.counters().bytes_received += got.bytes;
        const bool drained = got.bytes < total(iov, count);
        reader_->advance(got.bytes);
        if (drained) return;
        turn += got.bytes;
    }
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

void Lane::write() {
    while (!blocked_ && greeting_sent_ < greeting_out_.size() && state_ != State::CLOSED) {
        const iovec iov{greeting_out_.data() + greeting_sent_,
                        greeting_out_.size() - greeting_sent_};
        const IoResult put = send(fd_, &iov, 1);
        if (put.status == IoStatus::FAILED)
            return close(Error(ErrorCode::PEER_CLOSED, "send: " + error_text(put.error)), false);
        blocked_ = put.status == IoStatus::WOULD_BLOCK;
        greeting_sent_ += put.bytes;
    }
    const uint32_t lane = own_.lane_index;
    for (size_t turn = 0; state_ == State::OPEN && !blocked_ && turn < TURN_BYTES;) {
        if (!link_->refill(lane)) break;
        const iovec* iov;
        const size_t count = writer_->next_iovecs(&iov);
        const IoResult put = send(fd_, iov, count);
        ++endpoint_.counters().send_calls;
        if (put.status == IoStatus::FAILED)
            return close(Error(ErrorCode::PEER_CLOSED, "send: " + error_text(put.error)), false);
        blocked_ = put.status == IoStatus::WOULD_BLOCK;
        if (put.bytes) writer_->advance(put.bytes);
        endpoint_.counters().bytes_sent += put.bytes;
        turn += put.bytes;
    }
    if (state_ != State::CLOSED) update_interest();
}

bool Lane::wants_to_write() const {
    return blocked_ || greeting_sent_ < greeting_out_.size() || (writer_ && !writer_->empty());
}

void Lane::update_interest() {
    const bool choked = writer_ && writer_->queued_control_bytes() > ANSWERS_BYTES_MAX;
    const uint32_t interest =
        (choked ? 0u : uint32_t(EPOLLIN)) | (wants_to_write() ? uint32_t(EPOLLOUT) : 0u);
    if (interest == interest_) return;
    interest_ = interest;
    endpoint_.loop().modify(fd_, interest);
}

void Lane::close(const Error& why, bool tell_peer) {
    if (state_ == State::CLOSED) return;
    const auto alive = shared_from_this();
    if (tell_peer && writer_) {
        writer_->control(FrameType::ABORT, Id{}, 0, encode(why));
        const iovec* iov;
        const size_t count = writer_->next_iovecs(&iov);
        send(fd_, iov, count);
    }
    const bool was_open = state_ == State::OPEN;
    state_ = State::CLOSED;
    writer_ = nullptr;
    if (greeting_timer_) endpoint_.loop().cancel(*greeting_timer_);
    endpoint_.loop().unwatch(fd_);
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
