#pragma once
// What both ends of a link have in common: lanes that come, stall and go, and a peer that is
// believed for a while.

#include <utility>

#include "wire/lane_reader.hpp"
#include "wire/lane_writer.hpp"
#include "wire/liveness.hpp"

namespace kvwire {

class LinkMachine : public FrameHandler {
public:
    explicit LinkMachine(LivenessOptions options) : liveness_(options) {}

    // With its last lane lost a link waits for another, until its lease ends.
    virtual void lane_lost(uint32_t lane) = 0;
    virtual void fail_all(const Error& error) = 0;
    virtual void send_close() = 0;
    virtual size_t open_transfers() const = 0;
    virtual uint64_t verified_bytes() const = 0;  // raw, of all transfers so far
    virtual bool is_idle() const = 0;  // nothing is open, or waits to be opened

    // The time of all that happens until the next call.
    void set_now(uint64_t now_ns) { now_ns_ = now_ns; }
    // Bytes came in on a lane, at that time; to be said before they are read.
    void heard(uint32_t lane, uint64_t now_ns);

    // Takes the work of stalled lanes elsewhere and writes PINGs. The lanes in `dead` are the
    // caller's to close; with `expired` all is over, for the reason that lease_over() gives.
    Upkeep upkeep(uint64_t now_ns);
    Liveness& liveness() { return liveness_; }
    bool was_heard() const { return was_heard_; }
    // Whether a PONG came in since the last call.
    bool take_pong() { return std::exchange(pong_came_, false); }
    // It said CLOSE: it will not come back, and need not be waited for.
    bool peer_left() const { return peer_left_; }

protected:
    // True: the frame was about the lane or the link, and is dealt with.
    bool on_link_frame(uint32_t lane, const FrameHeader& header, ByteSpan payload);
    virtual LaneWriter& writer(uint32_t lane) = 0;
    // Says again on other lanes what this one may never deliver.
    virtual void lane_stalled(uint32_t lane) = 0;
    virtual void on_speeds(ByteSpan) {}
    // Something is on its way that the peer will answer.
    virtual bool awaits_peer() const = 0;

    Liveness liveness_;
    uint64_t now_ns_ = 0;

private:
    bool peer_left_ = false;
    bool was_heard_ = false;
    bool pong_came_ = false;
};

}  // namespace kvwire
