#pragma once
// A look at a link: what the endpoint knows, taken with the lock, and what the kernel knows, asked
// for without it.

#include <cstdint>
#include <vector>

#include "transport/socket.hpp"
#include "transport/tcp_info.hpp"
#include "wire/codec_choice.hpp"

namespace kvwire {

struct LaneReading {
    uint32_t index = 0;
    uint64_t serial = 0;        // in the process: a lane made again has another
    uint64_t queued_bytes = 0;  // loaded, and not taken by the kernel
    Fd socket;                  // a duplicate: the lane may close meanwhile
    TcpInfo tcp;
};

struct LinkReading {
    uint64_t born_ns = 0;
    uint64_t now_ns = 0;
    uint64_t verified_bytes = 0;  // raw, in place at the receiver and proved
    uint64_t backlog_bytes = 0;   // raw, pushed and not verified; a sender's
    std::vector<LaneReading> lanes;
    // Of codec "auto"; rates as CodecChoice has them.
    double bandwidth_bytes_per_s = 0, send_bytes_per_s = 0, receive_bytes_per_s = 0;
    std::vector<ChoiceReport> choices;
};

}  // namespace kvwire
