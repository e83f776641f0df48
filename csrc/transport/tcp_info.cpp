#include "transport/tcp_info.hpp"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstddef>

namespace kvwire {
namespace {

// Linux's `struct tcp_info`, which only ever grows at its end: the kernel fills what both sides
// know. Written out because the headers that a build finds may be older than the running kernel.
struct KernelTcpInfo {
    uint8_t state, ca_state, retransmits, probes, backoff, options, wscale, flags;
    uint32_t rto, ato, snd_mss, rcv_mss;
    uint32_t unacked, sacked, lost, retrans, fackets;
    uint32_t last_data_sent, last_ack_sent, last_data_recv, last_ack_recv;
    uint32_t pmtu, rcv_ssthresh, rtt, rttvar, snd_ssthresh, snd_cwnd, advmss, reordering;
    uint32_t rcv_rtt, rcv_space, total_retrans;
    uint64_t pacing_rate, max_pacing_rate, bytes_acked, bytes_received;
    uint32_t segs_out, segs_in, notsent_bytes, min_rtt, data_segs_in, data_segs_out;
    uint64_t delivery_rate, busy_time, rwnd_limited, sndbuf_limited;
    uint32_t delivered, delivered_ce;
    uint64_t bytes_sent, bytes_retrans;
};
static_assert(offsetof(KernelTcpInfo, pacing_rate) == 104 &&
                  offsetof(KernelTcpInfo, delivery_rate) == 160 &&
                  offsetof(KernelTcpInfo, bytes_retrans) == 208,
              "the kernel's layout");

constexpr uint32_t NO_RTT_YET = ~uint32_t(0);

}  // namespace

std::optional<TcpInfo> tcp_info(int fd) {
    KernelTcpInfo kernel{};
    socklen_t bytes = sizeof kernel;
    if (::getsockopt(fd, IPPROTO_TCP, TCP_INFO, &kernel, &bytes) != 0) return std::nullopt;
    TcpInfo info;
    info.congestion_state = CongestionState(
        std::min<uint8_t>(kernel.ca_state, uint8_t(CongestionState::LOSS)));
    info.app_limited = kernel.flags & 1;
    info.rtt_us = kernel.rtt;
    info.rtt_variance_us = kernel.rttvar;
    info.rtt_min_us = kernel.min_rtt == NO_RTT_YET ? 0 : kernel.min_rtt;
    info.mss_bytes = kernel.snd_mss;
    info.cwnd_segments = kernel.snd_cwnd;
    const uint32_t gone = kernel.sacked + kernel.lost;  // as the kernel's tcp_packets_in_flight()
    info.in_flight_segments = kernel.unacked + kernel.retrans - std::min(gone, kernel.unacked);
    info.lost_segments = kernel.lost;
    info.timeouts = kernel.retransmits;
    info.retransmitted_segments = kernel.total_retrans;
    info.sent_bytes = kernel.bytes_sent;
    info.retransmitted_bytes = kernel.bytes_retrans;
    info.acked_bytes = kernel.bytes_acked;
    info.received_bytes = kernel.bytes_received;
    info.unsent_bytes = kernel.notsent_bytes;
    info.delivery_bytes_per_s = kernel.delivery_rate;
    info.pacing_bytes_per_s = kernel.pacing_rate;
    info.busy_us = kernel.busy_time;
    info.window_limited_us = kernel.rwnd_limited;
    info.buffer_limited_us = kernel.sndbuf_limited;
    return info;
}

}  // namespace kvwire
