#pragma once
// Which lanes of a link make progress, how far away the peer is, and for how long it is still
// believed (FORMAT.md section 10). Time is handed in; nothing here reads a clock.

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "wire/format.hpp"

namespace kvwire {

struct LivenessOptions {
    uint64_t lease_ns = limits::lease_ms * 1'000'000;  // 0: a link ends with its last lane
    uint64_t stall_ns = limits::stall_ms * 1'000'000;
};

// What the owner of a link has to do now.
struct Upkeep {
    std::vector<uint32_t> ping;     // ask for an answer on these lanes
    std::vector<uint32_t> stalled;  // take their work elsewhere
    std::vector<uint32_t> resumed;  // they get work again
    std::vector<uint32_t> dead;     // close them
    bool expired = false;           // the lease has ended
    uint64_t due_ns = 0;            // when to look again; 0: no need
};

class Liveness {
public:
    explicit Liveness(LivenessOptions options) : options_(options) {}

    void lane_opened(uint32_t lane, uint64_t now_ns);
    void lane_lost(uint32_t lane, uint64_t now_ns);

    // Bytes came in on a lane.
    void heard(uint32_t lane, uint64_t now_ns);
    // So many of its bytes has the peer's machine acknowledged; `unacked`: others not yet.
    void sent(uint32_t lane, uint64_t acked_bytes, bool unacked, uint64_t now_ns);
    void peer_pings();  // it wrote PING or PONG: its silence means something
    // The number that a PING on this lane carries.
    uint64_t ping(uint32_t lane, uint64_t now_ns);
    void pong(uint32_t lane, uint64_t number);

    // `busy`: something is on its way that the peer will answer.
    Upkeep look(uint64_t now_ns, bool busy);

    // False while another lane does its work.
    bool serves(uint32_t lane) const;
    uint64_t rtt_ns(uint32_t lane) const;  // smoothed, queues included; 0: not measured yet
    uint64_t silent_ns(uint64_t now_ns) const;
    Error lease_over(uint64_t now_ns) const;

private:
    struct Lane {
        uint64_t progress_ns = 0;
        uint64_t acked_bytes = 0;
        bool unacked = false;
        uint64_t waiting_since_ns = 0;  // for the kernel's or the peer's answer; 0: for nothing
        uint64_t ping_number = 0;       // 0: none is out
        uint64_t pinged_ns = 0;
        uint64_t rtt_ns = 0;
        bool aside = false;
    };

    void progressed(Lane& lane, uint64_t now_ns);
    void wait(Lane& lane, uint64_t now_ns);
    void settle(Lane& lane);
    bool lease_has_ended(uint64_t now_ns) const;
    uint64_t stall_after_ns(const Lane& lane) const;
    uint64_t quiet_ns(const Lane& lane, uint64_t now_ns) const;
    uint64_t idle_ns() const;
    uint64_t dead_after_ns(const Lane& lane) const;
    bool ping_is_due(const Lane& lane, uint64_t now_ns, bool busy) const;
    void judge(Upkeep& upkeep, uint64_t now_ns);
    uint64_t next_look_ns(uint64_t now_ns, bool busy) const;

    const LivenessOptions options_;
    std::map<uint32_t, Lane> lanes_;
    bool peer_pings_ = false;
    uint64_t progress_ns_ = 0;        // on any lane
    uint64_t no_lane_since_ns_ = 0;
    uint64_t given_up_ns_ = 0;        // when a lane was closed although no other was better
    uint64_t next_number_ = 1;
};

}  // namespace kvwire
