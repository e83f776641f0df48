#include "transport/link.hpp"

#include "transport/endpoint.hpp"

namespace kvwire {

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
    lanes_[lane] = std::move(socket);
    endpoint_.link_up(*this);
    return receive ? receive->lane_opened(lane)
                   : send->lane_opened(lane, peer.payload_bytes_max, peer.codecs);
}

void Link::lane_closed(uint32_t lane, const Lane* socket, const Error& why) {
    const auto found = lanes_.find(lane);
    if (found == lanes_.end() || found->second.get() != socket) return;
    const auto alive = shared_from_this();
    lanes_.erase(found);
    receive ? receive->lane_lost(lane) : send->lane_lost(lane);
    if (this->alive()) return pump();
    lost(Error(ErrorCode::LINK_LOST, "the last lane to the peer was lost: " + why.message,
               why.expected, why.actual, why.offset));
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
                endpoint_, connect_tcp(addresses[lane % addresses.size()]), true);
            ++endpoint_.counters().connections;
            socket->start(alive, greeting);
        } catch (const Error& error) {
            dial_failed(lane, error);
        }
    }
}

void Link::dial_failed(uint32_t lane, const Error& why) {
    const auto alive = shared_from_this();
    if (dialling_ > 0) --dialling_;
    if (this->alive()) {
        receive ? receive->lane_lost(lane) : send->lane_lost(lane);
        return pump();
    }
    lost(Error(ErrorCode::CONNECT_FAILED, "no lane could be made: " + why.message));
}

void Link::pump() {
    pump_again_ = true;
    if (pumping_) return;
    const auto alive = shared_from_this();
    pumping_ = true;
    while (pump_again_) {  // a lane lost while writing leaves work to the others
        pump_again_ = false;
        if (receive) receive->flush();
        const auto lanes = lanes_;
        for (const auto& [index, lane] : lanes) lane->write();
    }
    pumping_ = false;
    schedule_expiry();
}

bool Link::refill(uint32_t lane) {
    return send ? send->refill(lane) : receive->has_output(lane);
}

void Link::schedule_expiry() {
    if (!receive || expiry_) return;
    const uint64_t due_ns = receive->expire(Loop::now_ns());
    if (due_ns == 0) return;
    expiry_ = endpoint_.loop().timer(due_ns, [weak = weak_from_this()] {
        if (const auto link = weak.lock()) {
            link->expiry_.reset();
            link->receive->expire(Loop::now_ns());
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
        receive->send_close();
    }
    pump();
    const auto lanes = lanes_;
    for (const auto& [index, lane] : lanes) lane->close(why, false);
    if (expiry_) endpoint_.loop().cancel(*expiry_);
}

}  // namespace kvwire
