// The ceiling: the same memory and block lists by plain sendmsg/recvmsg over one or more
// connections, without framing, checksum or protocol. Called from the two benchmark processes.

#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int64_t PIECE_BYTES = 256 << 10;  // dealt to the connections in turn
constexpr size_t IOV_MAX_CALL = 1024;

struct Plan {
    std::vector<std::vector<iovec>> lanes;
};

// One connection to its end; returns 0 or an errno.
int move(int fd, std::vector<iovec> iov, bool sending) {
    for (size_t at = 0; at < iov.size();) {
        msghdr header{};
        header.msg_iov = &iov[at];
        for (int64_t bytes = 0; bytes < PIECE_BYTES && header.msg_iovlen < IOV_MAX_CALL &&
                                at + header.msg_iovlen < iov.size();)
            bytes += int64_t(iov[at + header.msg_iovlen++].iov_len);
        const ssize_t moved = sending ? ::sendmsg(fd, &header, MSG_NOSIGNAL)
                                      : ::recvmsg(fd, &header, 0);
        if (moved < 0 && errno == EINTR) continue;
        if (moved < 0) return errno;
        if (moved == 0) return ECONNRESET;
        size_t left = size_t(moved);
        for (; left > 0 && left >= iov[at].iov_len; ++at) left -= iov[at].iov_len;
        if (left == 0) continue;
        iov[at].iov_base = static_cast<uint8_t*>(iov[at].iov_base) + left;
        iov[at].iov_len -= left;
    }
    return 0;
}

}  // namespace

extern "C" {

Plan* bare_plan(uint8_t* base, const int64_t* offsets, const int64_t* lengths, size_t count,
                size_t lane_count) {
    auto* plan = new Plan{std::vector<std::vector<iovec>>(lane_count)};
    int64_t stream = 0;
    for (size_t i = 0; i < count; ++i)
        for (int64_t done = 0; done < lengths[i];) {
            const int64_t piece_left = PIECE_BYTES - stream % PIECE_BYTES;
            const int64_t part = std::min(lengths[i] - done, piece_left);
            plan->lanes[size_t(stream / PIECE_BYTES) % lane_count].push_back(
                {base + offsets[i] + done, size_t(part)});
            done += part;
            stream += part;
        }
    return plan;
}

void bare_plan_free(Plan* plan) { delete plan; }

// A thread per connection. Returns 0 or an errno.
int bare_move(const Plan* plan, const int* fds, int sending) {
    std::vector<int> results(plan->lanes.size());
    std::vector<std::thread> threads;
    const auto one = [&](size_t i) { results[i] = move(fds[i], plan->lanes[i], sending != 0); };
    for (size_t i = 1; i < results.size(); ++i) threads.emplace_back(one, i);
    one(0);
    for (std::thread& thread : threads) thread.join();
    return *std::max_element(results.begin(), results.end());
}

void bare_copy(uint8_t* to, const uint8_t* from, const int64_t* to_offsets,
               const int64_t* from_offsets, const int64_t* lengths, size_t count) {
    for (size_t i = 0; i < count; ++i)
        std::memcpy(to + to_offsets[i], from + from_offsets[i], size_t(lengths[i]));
}

}  // extern "C"
