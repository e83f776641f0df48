#pragma once
// How many lanes a link should have when its user leaves that to kvwire. A connection carries at
// most its send buffer per round trip, and the kernel lets that grow to tcp_wmem's maximum, 4 MiB
// as a rule: 0.8 Gbit/s at 40 ms. So there are as many as hold twice bandwidth x RTT: from the
// start for what most links carry, and more when the link is measured to carry more. More than
// needed would only overrun the bottleneck's queue together.

#include <cstdint>

namespace kvwire {

class LanePlan {
public:
    static constexpr uint16_t LANES_MIN = 4, LANES_MAX = 32;
    static constexpr uint64_t ASSUMED_BYTES_PER_S = 250'000'000;

    // bandwidth_max: of the link, 0: unlimited. send_buffer: of one connection, at most.
    LanePlan(uint64_t bandwidth_max_bytes_per_s, uint64_t send_buffer_bytes);

    // `moved_bytes`: over the link, up to now. Never less than before.
    uint16_t lanes(uint64_t now_ns, uint64_t moved_bytes, uint32_t rtt_us);

private:
    const uint64_t bandwidth_max_, send_buffer_;
    uint64_t bandwidth_ = ASSUMED_BYTES_PER_S;  // the highest measured
    uint64_t since_ns_ = 0, moved_before_ = 0;
    uint16_t lanes_ = LANES_MIN;
};

uint64_t send_buffer_bytes_max();  // of the calling thread's network namespace

}  // namespace kvwire
