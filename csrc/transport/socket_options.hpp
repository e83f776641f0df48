#pragma once
// What a user may choose for the connections of a link, and how it is told to the kernel.

#include <cstdint>
#include <string>

namespace kvwire {

struct SocketOptions {
    std::string congestion_control;  // empty: see prefer_bbr()
    int dscp = -1;                   // 0 to 63; -1: unmarked
};

// Throws USAGE, saying what this kernel has, when it cannot do what `options` ask for.
void check(const SocketOptions& options);
// Of a socket in any state. What the kernel refuses here it has accepted in check().
void apply(int fd, const SocketOptions& options);

// Where loss-based control is the system's default (cubic, reno), uses BBR when the kernel has it:
// on 1 Gbit/s and 40 ms with one segment in a thousand lost, two lanes fill 0.95 of the link with
// BBR and 0.02 with cubic. Another default (dctcp, ...) was chosen for the network, and stays.
void prefer_bbr(int fd);

// 0: unlimited. Counts what TCP carries, retransmissions included.
void set_pacing_rate(int fd, uint64_t bytes_per_s);
// The socket counts as writable only while less than this waits unsent in the kernel.
void set_unsent_max(int fd, uint32_t bytes);

}  // namespace kvwire
