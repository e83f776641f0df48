#include "transport/link.hpp"

#include <algorithm>

#include "transport/endpoint.hpp"

namespace kvwire {
namespace {

// So little is written by the thread that asks for it, which saves waking another.
constexpr uint64_t DIRECT_BYTES_MAX = 64 << 10;

// So long a lane may keep memory that is wanted back; then it is reset.
constexpr uint64_t RECALL_NS = 500'000'000;

}  // namespace

Link::Link(Endpoint& endpoint, const Id& id_) : id(id_), endpoint_(endpoint) {}

Link::~Link() = default;

LinkMachine& Link::machine() const {
    return receive ? static_cast<LinkMachine&>(*receive) : static_cast<LinkMachine&>(*send);
}

// Each lane's share of the link's limit is the kernel's to keep: it spaces every segment, those
// sent again too, and needs no thread of ours. What a lane does not use of its share is not used.
void Link::deal_bandwidth() {
    const uint64_t most = endpoint_.options().bandwidth_max_bytes_per_s;
    if (most == 0 || lanes_.empty()) return;
    const uint64_t share = std::max<uint64_t>(most / lanes_.size(), 1);
    for (const auto& [index, lane] : lanes_) lane->pace(share);
}

void Link::pump(const Lane* self) {
    if (receive) receive->flush();
    // One lane for each batch: a small push wakes nobody in vain.
    uint64_t bytes = 0;
    size_t batches = send ? send->backlog(lanes_.size(), &bytes) : 0;
    if (self && batches > 0) --batches;
    const Liveness& liveness = machine().liveness();
    for (const auto& [index, lane] : lanes_) {
        if (lane.get() == self || !lane->is_idle()) continue;
        if (!lane->has_output()) {
            if (batches == 0 || !liveness.serves(index)) continue;
            --batches;
        }
        const bool here = bytes <= DIRECT_BYTES_MAX &&
                          endpoint_.loops().after_call([lane = lane] { lane->write_now(); });
        if (!here) lane->arm();
    }
    if (had_lanes_ && !brisk_ && !machine().is_idle())
        schedule_upkeep(Loops::now_ns() + BRISK_NS, true);
    schedule_recall();
}

bool Link::load(uint32_t lane) {
    return send ? send->load(lane) : receive->has_output(lane);
}

void Link::schedule_recall() {
    if (!send || recall_ || ended_ || !send->wants_back()) return;
    recall_ = endpoint_.loops().timer(
        Loops::now_ns() + RECALL_NS, [weak = weak_from_this(), until = send->recalls()] {
            const auto link = weak.lock();
            if (!link) return;
            link->recall_.reset();
            const auto lanes = link->lanes_;
            for (const auto& [index, lane] : lanes) lane->read_notices();
            for (const uint32_t index : link->send->lenders(until))
                if (const auto found = lanes.find(index); found != lanes.end())
                    found->second->close(
                        Error(ErrorCode::PEER_CLOSED,
                              "reset here: it kept memory that was wanted back"), false);
            link->schedule_recall();
        });
}

void Link::close(const Error& why) {
    const auto alive = shared_from_this();
    ended_ = true;
    machine().fail_all(why);
    if (receive) receive->flush();
    machine().send_close();
    const auto lanes = lanes_;
    for (const auto& [index, lane] : lanes) lane->flush_and_close(why);
    stop_timers();
}

}  // namespace kvwire
