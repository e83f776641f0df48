#include "transport/lane_plan.hpp"

#include <algorithm>
#include <fstream>

namespace kvwire {
namespace {

constexpr uint64_t MEASURE_NS = 200'000'000, MEASURE_ROUND_TRIPS = 4;
constexpr uint64_t USUAL_SEND_BUFFER_BYTES = 4 << 20;
constexpr double HEADROOM = 2;  // for what is lost and sent again, and to see the link carry more

}  // namespace

LanePlan::LanePlan(uint64_t bandwidth_max_bytes_per_s, uint64_t send_buffer_bytes)
    : bandwidth_max_(bandwidth_max_bytes_per_s ? bandwidth_max_bytes_per_s : UINT64_MAX),
      send_buffer_(std::max<uint64_t>(send_buffer_bytes, 1)) {}

uint16_t LanePlan::lanes(uint64_t now_ns, uint64_t moved_bytes, uint32_t rtt_us) {
    const uint64_t elapsed_ns = now_ns - since_ns_;
    if (elapsed_ns >= std::max(MEASURE_NS, MEASURE_ROUND_TRIPS * rtt_us * 1000)) {
        if (since_ns_)
            bandwidth_ = std::max(
                bandwidth_, uint64_t(double(moved_bytes - moved_before_) * 1e9 / elapsed_ns));
        since_ns_ = now_ns;
        moved_before_ = moved_bytes;
    }
    const double in_flight = double(std::min(bandwidth_, bandwidth_max_)) * rtt_us / 1e6;
    const double wanted = HEADROOM * in_flight / double(send_buffer_) + 1;  // rounded up
    lanes_ = std::max(lanes_, uint16_t(std::min<double>(wanted, LANES_MAX)));
    return lanes_;
}

uint64_t send_buffer_bytes_max() {
    uint64_t least = 0, initial = 0, most = 0;
    std::ifstream file("/proc/sys/net/ipv4/tcp_wmem");
    return file >> least >> initial >> most ? most : USUAL_SEND_BUFFER_BYTES;
}

}  // namespace kvwire
