#pragma once
// What the kernel knows about a TCP connection, in words.

#include <cstdint>
#include <optional>

namespace kvwire {

enum class CongestionState : uint8_t { OPEN, DISORDER, CWR, RECOVERY, LOSS };

// Counters run from the connection's start. A field that the running kernel does not have is 0.
struct TcpInfo {
    CongestionState congestion_state = CongestionState::OPEN;
    bool app_limited = false;       // the last delivery rate was bounded by lack of data to send
    uint32_t rtt_us = 0;            // smoothed
    uint32_t rtt_variance_us = 0;
    uint32_t rtt_min_us = 0;        // of the last seconds (net.ipv4.tcp_min_rtt_wlen)
    uint32_t mss_bytes = 0;
    uint32_t cwnd_segments = 0;
    uint32_t in_flight_segments = 0;  // sent, neither acknowledged nor given up
    uint32_t lost_segments = 0;       // of those, presumed lost now
    uint32_t timeouts = 0;            // in a row, of the oldest segment; 0 when all is well
    uint64_t retransmitted_segments = 0;
    uint64_t sent_bytes = 0;          // retransmissions included
    uint64_t retransmitted_bytes = 0;
    uint64_t acked_bytes = 0;
    uint64_t received_bytes = 0;
    uint64_t unsent_bytes = 0;        // in the kernel's queue, not sent once
    uint64_t delivery_bytes_per_s = 0;
    uint64_t pacing_bytes_per_s = 0;  // UINT64_MAX: not paced
    uint64_t busy_us = 0;             // with data outstanding
    uint64_t window_limited_us = 0;   // of that, held back by the receiver's window
    uint64_t buffer_limited_us = 0;   // ... and by the send buffer
};

// Nothing when the descriptor is no TCP socket.
std::optional<TcpInfo> tcp_info(int fd);

}  // namespace kvwire
