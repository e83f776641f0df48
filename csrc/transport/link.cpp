#include "transport/link.hpp"

#include <algorithm>

#include "transport/endpoint.hpp"

namespace kvwire {
namespace {

// So little is written by the thread that asks for it, which saves waking another.
constexpr uint64_t DIRECT_BYTES_MAX = 64 << 10;

}  // namespace

Link::Link(Endpoint& endpoint, const Id& id_) : id(id_), endpoint_(endpoint) {}

Link::~Link() = default;

FrameHandler& Link::machine() {
    return receive ? static_cast<FrameHandler&>(*receive) : static_cast<FrameHandler&>(*send);
}

LaneWriter& Link::lane_opened(uint32_t lane, std::shared_ptr<Lane> socket, const Greeting& peer) {
    if (lanes_.count(lane))
        throw Error(ErrorCode::FIELD_INVALID, "greeting: the link has this lane already", 0, lane,
                    greeting_at::LANE_INDEX);
    if (dialling_ > 0) --dialling_;
    had_lanes_ = true;
    lanes_[lane] = std::move(socket);
    deal_bandwidth();
    endpoint_.link_up(*this);
    return receive ? receive->lane_opened(lane)
                   : send->lane_opened(lane, peer.payload_bytes_max, peer.codecs);
}

void Link::lane_closed(uint32_t lane, const Lane* socket, const Error& why) {
    const auto found = lanes_.find(lane);
    if (found == lanes_.end() || found->second.get() != socket) return;
    const auto alive = shared_from_this();
    lanes_.erase(found);
    deal_bandwidth();
    receive ? receive->lane_lost(lane) : send->lane_lost(lane);
    if (this->alive()) return pump();
    lost(Error(ErrorCode::LINK_LOST, "the last lane to the peer was lost: " + why.message,
               why.expected, why.actual, why.offset));
}

// Each lane's share of the link's limit is the kernel's to keep: it spaces every segment, those
// sent again too, and needs no thread of ours. What a lane does not use of its share is not used.
void Link::deal_bandwidth() {
    const uint64_t most = endpoint_.options().bandwidth_max_bytes_per_s;
    if (most == 0 || lanes_.empty()) return;
    const uint64_t share = std::max<uint64_t>(most / lanes_.size(), 1);
    for (const auto& [index, lane] : lanes_) lane->pace(share);
}

void Link::lost(const Error& why) {
    receive ? receive->fail_all(why) : send->fail_all(why);
    endpoint_.link_lost(*this, why);
}

void Link::dial(const std::vector<std::vector<uint8_t>>& addresses, uint16_t lane_count) {
    const auto alive = shared_from_this();
    dialling_ = lane_count;
    for (uint16_t lane = 0; lane < lane_count; ++lane) {
        Greeting greeting = endpoint_.greeting();
        greeting.link_id = id;
        greeting.lane_index = lane;
        greeting.lane_count = lane_count;
        try {
            const auto socket = std::make_shared<kvwire::Lane>(
                endpoint_,
                endpoint_.wrap(connect_tcp(addresses[lane % addresses.size()],
                                           endpoint_.options().socket), true),
                true);
            ++endpoint_.counters().connections;
            socket->start(alive, greeting);
        } catch (const Error& error) {
            dial_failed(lane, nullptr, error);
        }
    }
}

void Link::dial_failed(uint32_t lane, const Lane* socket, const Error& why) {
    const auto alive = shared_from_this();
    if (dialling_ > 0) --dialling_;
    // Once may be an accident on the path.
    refused_ += why.code == ErrorCode::ADMISSION_REFUSED && lanes_.empty();
    if (!refusal_ && (refused_ > 1 || why.code == ErrorCode::LINK_UNKNOWN)) give_up(why);
    if (socket && socket == establishing_) {
        establishing_ = nullptr;
        while (!refusal_ && !key_ && !establishing_ && !waiting_.empty()) greet_next();
    }
    if (this->alive()) {
        receive ? receive->lane_lost(lane) : send->lane_lost(lane);
        return pump();
    }
    Error reason(ErrorCode::CONNECT_FAILED, "no lane could be made: " + why.message);
    if (why.code == ErrorCode::ADMISSION_REFUSED || why.code == ErrorCode::LINK_UNKNOWN) {
        reason.code = why.code;
        reason.remote = why.remote;
    }
    lost(reason);
}

void Link::pump(const Lane* self) {
    if (receive) receive->flush();
    // One lane for each batch: a small push wakes nobody in vain.
    uint64_t bytes = 0;
    size_t batches = send ? send->backlog(lanes_.size(), &bytes) : 0;
    if (self && batches > 0) --batches;
    for (const auto& [index, lane] : lanes_) {
        if (lane.get() == self || !lane->is_idle()) continue;
        if (!lane->has_output()) {
            if (batches == 0) continue;
            --batches;
        }
        const bool here = bytes <= DIRECT_BYTES_MAX &&
                          endpoint_.loops().after_call([lane = lane] { lane->write_now(); });
        if (!here) lane->arm();
    }
    schedule_expiry();
}

bool Link::load(uint32_t lane) {
    return send ? send->load(lane) : receive->has_output(lane);
}

void Link::schedule_expiry() {
    if (!receive || expiry_) return;
    const uint64_t due_ns = receive->expire(Loops::now_ns());
    if (due_ns == 0) return;
    expiry_ = endpoint_.loops().timer(due_ns, [weak = weak_from_this()] {
        if (const auto link = weak.lock()) {
            link->expiry_.reset();
            link->receive->expire(Loops::now_ns());
            link->pump();
        }
    });
}

void Link::close(const Error& why) {
    const auto alive = shared_from_this();
    if (send) {
        send->fail_all(why);
        send->send_close();
    } else {
        receive->fail_all(why);
        receive->flush();
        receive->send_close();
    }
    const auto lanes = lanes_;
    for (const auto& [index, lane] : lanes) lane->flush_and_close(why);
    if (expiry_) endpoint_.loops().cancel(*expiry_);
}

}  // namespace kvwire
