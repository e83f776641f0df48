#include "wire/liveness.hpp"

#include <algorithm>

namespace kvwire {
namespace {

constexpr uint64_t IDLE_PING_NS = 2'500'000'000;  // at most; else a quarter of the lease
constexpr uint64_t FIRST_RTT_NS = 250'000'000;    // until the first PONG tells
constexpr uint64_t ROUND_TRIPS = 4;               // without progress are a stall
constexpr uint64_t STALLS_TO_DEATH = 10;
constexpr uint64_t PINGS_TO_DEATH = 2;            // of the peer's own, that should have come

std::string seconds(uint64_t ns) {
    const uint64_t tenths = (ns + 50'000'000) / 100'000'000;
    return std::to_string(tenths / 10) + "." + std::to_string(tenths % 10) + " s";
}

}  // namespace

void Liveness::lane_opened(uint32_t lane, uint64_t now_ns) {
    Lane fresh;
    fresh.progress_ns = progress_ns_ = now_ns;
    lanes_[lane] = fresh;
}

void Liveness::lane_lost(uint32_t lane, uint64_t now_ns) {
    if (lanes_.erase(lane) && lanes_.empty()) no_lane_since_ns_ = now_ns;
}

void Liveness::progressed(Lane& lane, uint64_t now_ns) {
    lane.progress_ns = progress_ns_ = now_ns;
    if (lane.waiting_since_ns) lane.waiting_since_ns = now_ns;
}

void Liveness::wait(Lane& lane, uint64_t now_ns) {
    if (!lane.waiting_since_ns) lane.waiting_since_ns = now_ns;
}

void Liveness::settle(Lane& lane) {
    if (!lane.unacked && !(lane.ping_number && peer_pings_)) lane.waiting_since_ns = 0;
}

void Liveness::heard(uint32_t lane, uint64_t now_ns) {
    const auto found = lanes_.find(lane);
    if (found != lanes_.end()) progressed(found->second, now_ns);
}

void Liveness::sent(uint32_t lane_index, uint64_t acked_bytes, bool unacked, uint64_t now_ns) {
    const auto found = lanes_.find(lane_index);
    if (found == lanes_.end()) return;
    Lane& lane = found->second;
    if (acked_bytes > lane.acked_bytes) {
        lane.acked_bytes = acked_bytes;
        progressed(lane, now_ns);
    }
    lane.unacked = unacked;
    lane.unacked ? wait(lane, now_ns) : settle(lane);
}

void Liveness::peer_pings() {
    if (peer_pings_) return;
    peer_pings_ = true;
    for (auto& [index, lane] : lanes_)
        if (lane.ping_number) wait(lane, progress_ns_);
}

uint64_t Liveness::ping(uint32_t lane_index, uint64_t now_ns) {
    Lane& lane = lanes_.at(lane_index);
    lane.ping_number = next_number_++;
    lane.pinged_ns = now_ns;
    if (peer_pings_) wait(lane, now_ns);
    return lane.ping_number;
}

void Liveness::pong(uint32_t lane_index, uint64_t number) {
    peer_pings();
    const auto found = lanes_.find(lane_index);
    if (found == lanes_.end() || !number || found->second.ping_number != number) return;
    Lane& lane = found->second;
    const uint64_t sample = std::max<uint64_t>(lane.progress_ns - lane.pinged_ns, 1);
    lane.rtt_ns = lane.rtt_ns ? (7 * lane.rtt_ns + sample) / 8 : sample;
    lane.ping_number = 0;
    settle(lane);
}

bool Liveness::serves(uint32_t lane) const {
    const auto found = lanes_.find(lane);
    return found == lanes_.end() || !found->second.aside;
}

uint64_t Liveness::rtt_ns(uint32_t lane) const {
    const auto found = lanes_.find(lane);
    return found == lanes_.end() ? 0 : found->second.rtt_ns;
}

uint64_t Liveness::stall_after_ns(const Lane& lane) const {
    return std::max(options_.stall_ns, ROUND_TRIPS * (lane.rtt_ns ? lane.rtt_ns : FIRST_RTT_NS));
}

// For how long the lane has owed progress.
uint64_t Liveness::quiet_ns(const Lane& lane, uint64_t now_ns) const {
    return lane.waiting_since_ns ? now_ns - std::min(now_ns, lane.waiting_since_ns) : 0;
}

uint64_t Liveness::idle_ns() const {
    return options_.lease_ns ? std::min(options_.lease_ns / 4, IDLE_PING_NS) : IDLE_PING_NS;
}

// The other half of the lease is for dialling the lane again; one that has not stalled yet lives.
uint64_t Liveness::dead_after_ns(const Lane& lane) const {
    const uint64_t stall_ns = stall_after_ns(lane);
    const uint64_t patience_ns = std::max(STALLS_TO_DEATH * stall_ns, PINGS_TO_DEATH * idle_ns());
    const uint64_t most_ns = options_.lease_ns ? options_.lease_ns / 2 : UINT64_MAX;
    return std::max(stall_ns, std::min(patience_ns, most_ns));
}

bool Liveness::ping_is_due(const Lane& lane, uint64_t now_ns, bool busy) const {
    if (lane.ping_number && peer_pings_) return false;  // one at a time
    if (!lane.pinged_ns) return true;
    if (busy && peer_pings_)
        return now_ns >= lane.pinged_ns + std::max(options_.stall_ns / 2, lane.rtt_ns);
    return now_ns >= lane.pinged_ns + idle_ns();
}

uint64_t Liveness::silent_ns(uint64_t now_ns) const {
    const uint64_t since = peer_pings_ || !lanes_.empty() ? progress_ns_ : no_lane_since_ns_;
    return now_ns - std::min(now_ns, since);
}

bool Liveness::lease_has_ended(uint64_t now_ns) const {
    if (lanes_.empty()) return silent_ns(now_ns) >= options_.lease_ns;
    return options_.lease_ns && peer_pings_ && silent_ns(now_ns) >= options_.lease_ns;
}

Error Liveness::lease_over(uint64_t now_ns) const {
    const uint64_t silent = silent_ns(now_ns);
    const char* what = lanes_.empty() ? "no lane to the peer for " : "nothing from the peer for ";
    return Error(ErrorCode::LINK_LOST,
                 what + seconds(silent) + ", the lease is " + seconds(options_.lease_ns),
                 options_.lease_ns / 1'000'000, silent / 1'000'000);
}

// A lane is set aside only for a better one, which has moved in the latter half of its quiet. When
// all stand still, not quite since the same moment, the path or the peer may be at fault: then one
// lane at a time is closed, to be dialled again, and tells.
void Liveness::judge(Upkeep& upkeep, uint64_t now_ns) {
    const auto stands_still = [&](const Lane& lane) {
        return quiet_ns(lane, now_ns) >= stall_after_ns(lane);
    };
    const bool any_moves = std::any_of(lanes_.begin(), lanes_.end(), [&](const auto& entry) {
        return quiet_ns(entry.second, now_ns) < stall_after_ns(entry.second) / 2;
    });
    for (auto& [index, lane] : lanes_) {
        const bool still = stands_still(lane);
        if (lane.aside && !still) upkeep.resumed.push_back(index);
        if (!lane.aside && still && any_moves) upkeep.stalled.push_back(index);
        lane.aside = still && (lane.aside || any_moves);
        const uint64_t patience_ns = dead_after_ns(lane);
        if (quiet_ns(lane, now_ns) < patience_ns) continue;
        if (!any_moves && now_ns - given_up_ns_ < patience_ns) continue;
        if (!any_moves) given_up_ns_ = now_ns;
        upkeep.dead.push_back(index);
    }
}

uint64_t Liveness::next_look_ns(uint64_t now_ns, bool busy) const {
    if (lanes_.empty()) return now_ns - silent_ns(now_ns) + options_.lease_ns;
    uint64_t due_ns = UINT64_MAX;
    for (const auto& [index, lane] : lanes_) {
        busy = busy || lane.waiting_since_ns || !lane.pinged_ns;
        due_ns = std::min(due_ns, lane.pinged_ns + idle_ns());
    }
    return busy ? now_ns + options_.stall_ns / 4 : due_ns;
}

Upkeep Liveness::look(uint64_t now_ns, bool busy) {
    Upkeep upkeep;
    upkeep.expired = lease_has_ended(now_ns);
    if (upkeep.expired) return upkeep;
    judge(upkeep, now_ns);
    for (const auto& [index, lane] : lanes_)
        if (ping_is_due(lane, now_ns, busy)) upkeep.ping.push_back(index);
    upkeep.due_ns = next_look_ns(now_ns, busy);
    return upkeep;
}

}  // namespace kvwire
