// The lanes of a link as they come and go: dialled, dialled again, set aside; and its lease.

#include <algorithm>
#include <utility>

#include "base/random.hpp"
#include "transport/endpoint.hpp"
#include "transport/link.hpp"

namespace kvwire {
namespace {

constexpr uint64_t REDIAL_MIN_NS = 50'000'000;
constexpr uint64_t REDIAL_MAX_NS = 2'000'000'000;
constexpr uint32_t DOUBLINGS_MAX = 6;

uint64_t random_up_to(uint64_t most) {
    uint64_t number;
    random_bytes(&number, sizeof number);
    return number % (most + 1);
}

}  // namespace

LaneWriter& Link::lane_opened(uint32_t lane, std::shared_ptr<Lane> socket, const Greeting& peer) {
    if (ended_) throw Error(ErrorCode::LINK_UNKNOWN, "the link has ended");
    const uint64_t now_ns = Loops::now_ns();
    machine().set_now(now_ns);
    if (const auto found = lanes_.find(lane); found != lanes_.end()) {
        replacing_ = true;
        const auto old = found->second;
        old->close(Error(ErrorCode::PEER_CLOSED, "the peer has dialled this lane again"), false);
        replacing_ = false;
    }
    if (dialling_ > 0) --dialling_;
    lanes_[lane] = std::move(socket);
    deal_bandwidth();
    const bool first = !had_lanes_;
    had_lanes_ = true;
    if (first)
        for (const auto& [other, redial] : redials_) redial_later(other);
    if (send) send->choice().set_cores({endpoint_.cores(), lanes_[lane]->is_same_host()});
    endpoint_.link_up(*this);
    schedule_upkeep(now_ns, true);
    return receive ? receive->lane_opened(lane)
                   : send->lane_opened(lane, peer.payload_bytes_max, peer.codecs);
}

void Link::lane_closed(uint32_t lane, const Lane* socket, const Error& why) {
    const auto found = lanes_.find(lane);
    if (found == lanes_.end() || found->second.get() != socket) return;
    const auto alive = shared_from_this();
    const uint64_t now_ns = Loops::now_ns();
    lanes_.erase(found);
    deal_bandwidth();
    machine().set_now(now_ns);
    machine().lane_lost(lane);
    if (ended_ || replacing_) return;
    last_trouble_ = why;
    const bool futile = is_futile(*socket, now_ns);
    if (lanes_.empty() && machine().peer_left())
        return lost(Error(ErrorCode::PEER_CLOSED, "the peer has closed the link"));
    if (is_forsaken() || (lanes_.empty() && futile)) return lost(last_lane_lost());
    if (!machine().peer_left()) redial_later(lane);
    pump();
    schedule_upkeep(now_ns, true);
}

// Lanes that are lost as soon as they are made, for longer than the lease, are of no use.
bool Link::is_futile(const Lane& lane, uint64_t now_ns) {
    const uint64_t verified = machine().verified_bytes();
    if (trouble_since_ns_ == 0 || verified != verified_seen_ ||
        now_ns - lane.opened_ns() >= REDIAL_MAX_NS) {
        verified_seen_ = verified;
        trouble_since_ns_ = now_ns;
        for (auto& [index, redial] : redials_) redial.failures = 0;
    }
    return now_ns - trouble_since_ns_ > lease_ns();
}

uint64_t Link::lease_ns() const { return endpoint_.options().liveness().lease_ns; }

// Without a lease a link lives on as long as it has a lane, or may have one in a moment.
bool Link::is_forsaken() const { return lanes_.empty() && dialling_ == 0 && lease_ns() == 0; }

Error Link::last_lane_lost() const {
    const Error& why = last_trouble_;
    return Error(ErrorCode::LINK_LOST, "the last lane to the peer was lost: " + why.message,
                 why.expected, why.actual, why.offset);
}

void Link::lost(const Error& why) {
    if (ended_) return;
    const auto alive = shared_from_this();
    ended_ = true;
    stop_timers();
    machine().fail_all(why);
    const auto lanes = lanes_;
    for (const auto& [index, lane] : lanes) lane->close(why, false);
    for (const auto& weak : std::exchange(waiting_, {}))
        if (const auto waiting = weak.lock()) waiting->close(why, false);
    endpoint_.link_lost(*this, why);
}

void Link::stop_timers() {
    if (upkeep_) endpoint_.loops().cancel(*upkeep_);
    upkeep_.reset();
    if (recall_) endpoint_.loops().cancel(*recall_);
    recall_.reset();
    for (auto& [lane, redial] : redials_)
        if (redial.timer) endpoint_.loops().cancel(*redial.timer);
    redials_.clear();
}

// ---- dialling

void Link::dial(const std::vector<std::vector<uint8_t>>& addresses, uint16_t lane_count) {
    const auto alive = shared_from_this();
    addresses_ = addresses;
    if (lane_count == LANES_AUTO)
        plan_.emplace(endpoint_.options().bandwidth_max_bytes_per_s, send_buffer_bytes_max());
    lanes_wanted_ = dialling_ = plan_ ? LanePlan::LANES_MIN : lane_count;
    for (uint16_t lane = 0; lane < lanes_wanted_ && !ended_; ++lane) dial_lane(lane);
}

void Link::grow(uint64_t now_ns) {
    if (!plan_ || lanes_.empty() || ended_) return;
    const uint32_t rtt_us = lanes_.begin()->second->rtt_min_us();
    const uint16_t wanted = plan_->lanes(now_ns, machine().verified_bytes(), rtt_us);
    uint32_t lane = lanes_wanted_;
    lanes_wanted_ = wanted;
    for (; lane < wanted && !ended_; ++lane) {
        ++dialling_;
        dial_lane(lane);
    }
}

void Link::dial_lane(uint32_t lane) {
    Greeting greeting = endpoint_.greeting();
    greeting.link_id = id;
    greeting.lane_index = uint16_t(lane);
    greeting.lane_count = lanes_wanted_;
    try {
        const auto& address = addresses_[(lane + dials_failed_) % addresses_.size()];
        const auto socket = std::make_shared<kvwire::Lane>(
            endpoint_, endpoint_.wrap(connect_tcp(address, endpoint_.options().socket), true),
            true);
        ++endpoint_.counters().connections;
        socket->start(shared_from_this(), greeting);
    } catch (const Error& error) {
        dial_failed(lane, nullptr, error);
    }
}

uint64_t Link::connect_patience_ns() const {
    const uint64_t patience_ns = endpoint_.options().connect_timeout_ns;
    return had_lanes_ ? std::min(patience_ns, REDIAL_MAX_NS) : patience_ns;
}

void Link::dial_failed(uint32_t lane, const Lane* socket, const Error& why) {
    if (ended_) return;
    const auto alive = shared_from_this();
    if (dialling_ > 0) --dialling_;
    ++dials_failed_;
    last_trouble_ = why;
    // Once may be an accident on the path.
    refused_ += why.code == ErrorCode::ADMISSION_REFUSED && lanes_.empty();
    const bool unknown = why.code == ErrorCode::LINK_UNKNOWN && !may_establish_again();
    if (refused_ > 1 || unknown) return no_lane(why);
    if (socket && socket == establishing_) {
        establishing_ = nullptr;
        while (!key_ && !establishing_ && !waiting_.empty()) greet_next();
    }
    if (!had_lanes_ && dialling_ == 0) return no_lane(why);
    if (!had_lanes_) {
        redials_[lane];  // if another can be made
        return;
    }
    machine().set_now(Loops::now_ns());
    machine().lane_lost(lane);  // the peer may have thought it open
    if (is_forsaken()) return lost(last_lane_lost());
    redial_later(lane);
    pump();
}

// The peer does not know the link. If nothing was ever heard on it, it may not have heard of it
// either: our proof was lost on the way.
bool Link::may_establish_again() {
    if (machine().was_heard()) return false;
    if (lanes_.empty() && !establishing_) key_.reset();
    return true;
}

void Link::no_lane(const Error& why) {
    Error reason(ErrorCode::CONNECT_FAILED, "no lane could be made: " + why.message);
    if (why.code == ErrorCode::ADMISSION_REFUSED || why.code == ErrorCode::LINK_UNKNOWN) {
        reason.code = why.code;
        reason.remote = why.remote;
    }
    lost(reason);
}

// The pause doubles with every failure, and varies, so that many do not come at once.
void Link::redial_later(uint32_t lane) {
    if (addresses_.empty() || ended_) return;
    Redial& redial = redials_[lane];
    if (redial.timer) return;
    const uint64_t most_ns =
        std::min(REDIAL_MIN_NS << std::min(redial.failures, DOUBLINGS_MAX), REDIAL_MAX_NS);
    ++redial.failures;
    const uint64_t due_ns = Loops::now_ns() + most_ns / 2 + random_up_to(most_ns / 2);
    redial.timer = endpoint_.loops().timer(due_ns, [weak = weak_from_this(), lane] {
        const auto link = weak.lock();
        if (!link || link->ended_) return;
        link->redials_[lane].timer.reset();
        ++link->dialling_;
        ++link->endpoint_.counters().lanes_redialled;
        link->dial_lane(lane);
    });
}

// ---- upkeep

void Link::schedule_upkeep(uint64_t due_ns, bool brisk) {
    if (ended_) return;
    if (upkeep_) endpoint_.loops().cancel(*upkeep_);
    brisk_ = brisk;
    upkeep_ = endpoint_.loops().timer(due_ns, [weak = weak_from_this()] {
        if (const auto link = weak.lock()) link->keep_up();
    });
}

void Link::keep_up() {
    upkeep_.reset();
    const uint64_t now_ns = Loops::now_ns();
    const auto lanes = lanes_;
    for (const auto& [index, lane] : lanes) lane->report(machine().liveness());
    const Upkeep upkeep = machine().upkeep(now_ns);
    if (upkeep.expired && (lease_ns() > 0 || is_forsaken())) return lost(lease_over(now_ns));
    uint64_t due_ns = upkeep.expired ? now_ns + BRISK_NS : upkeep.due_ns;
    if (receive)
        if (const uint64_t patience_ns = receive->expire(now_ns))
            due_ns = std::min(due_ns, patience_ns);
    schedule_upkeep(due_ns, due_ns <= now_ns + BRISK_NS);
    for (const uint32_t lane : upkeep.dead)
        lanes.at(lane)->close(Error(ErrorCode::PEER_CLOSED, "no progress on the lane for too long"),
                              false);
    grow(now_ns);
    if (!ended_) pump();
}

Error Link::lease_over(uint64_t now_ns) {
    Error error = machine().liveness().lease_over(now_ns);
    if (dials_failed_) error.message += "; " + std::to_string(dials_failed_) + " dials failed";
    if (last_trouble_) error.message += "; the last trouble: " + last_trouble_.message;
    return error;
}

}  // namespace kvwire
