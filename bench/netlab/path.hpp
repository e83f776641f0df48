#pragma once
// One direction of the link: a bottleneck with its queue, then a line with loss and delay.

#include <cmath>
#include <deque>
#include <limits>
#include <random>
#include <set>
#include <sstream>
#include <string>

#include "frames.hpp"

namespace netlab {

struct Settings {
    double rate_bps = 0;  // of the wire, Ethernet's overhead included; 0: unlimited
    int64_t delay_ns = 0;
    int64_t jitter_ns = 0;  // up to this much is added to the delay; order is kept
    double loss = 0;        // probability, per MTU segment
    double queue_bytes = 0;
    bool blackhole = false;
    std::set<uint16_t> blackholed_ports;
};

struct Count {
    uint64_t segments = 0, wire_bytes = 0, payload_bytes = 0;
    uint64_t lost = 0, queue_dropped = 0, blackholed = 0;
    uint64_t retransmitted = 0;  // segments whose payload had passed this point before
    uint64_t delivered = 0, delivered_payload_bytes = 0;

    std::string json() const {
        std::ostringstream out;
        out << "\"segments\":" << segments << ",\"wire_bytes\":" << wire_bytes
            << ",\"payload_bytes\":" << payload_bytes << ",\"lost\":" << lost
            << ",\"queue_dropped\":" << queue_dropped << ",\"blackholed\":" << blackholed
            << ",\"retransmitted\":" << retransmitted << ",\"delivered\":" << delivered
            << ",\"delivered_payload_bytes\":" << delivered_payload_bytes;
        return out.str();
    }
};

// One TCP connection, seen from each side (0: left, 1: right).
struct Flow {
    uint16_t ports[2] = {0, 0};
    bool cut = false;
    Count count[2];
    uint32_t sent_up_to[2] = {0, 0};
    bool seen[2] = {false, false};
    uint8_t opening[2][kIpAt + sizeof(iphdr) + sizeof(tcphdr)] = {};  // of the last segment

    bool matches(const std::set<uint16_t>& wanted) const {
        return wanted.count(ports[0]) || wanted.count(ports[1]);
    }
};

class Path {
public:
    Path(int side, uint64_t seed) : side_(side), random_(seed) { draw_loss(); }

    void configure(const Settings& settings) {
        const bool redraw = settings.loss != settings_.loss;
        settings_ = settings;
        if (redraw) draw_loss();
    }

    // Send a frame on its way: what survives is due later.
    void take(FramePtr frame, const Headers& headers, Flow* flow, int64_t now_ns) {
        count(headers, flow);
        if (settings_.blackhole ||
            (flow != nullptr && flow->matches(settings_.blackholed_ports))) {
            each(flow, [&](Count& count) { count.blackholed += headers.segments; });
            return;
        }
        // A frame read late was on the wire meanwhile; so short a burst does no harm.
        free_ns_ = std::max(free_ns_, static_cast<double>(now_ns - kLateNsMax));
        size_t first = 0;
        double began_ns = free_ns_, departed_ns = free_ns_;
        for (size_t i = 0; i < headers.segments; ++i) {
            if (!admit(headers.wire_bytes(i), flow, now_ns)) {
                forward(frame, headers, flow, first, i, departed_ns, now_ns);
                first = i + 1;
                began_ns = free_ns_;
                continue;
            }
            departed_ns = free_ns_;
            if (departed_ns - began_ns > kRunNsMax) {
                forward(frame, headers, flow, first, i + 1, departed_ns, now_ns);
                first = i + 1;
                began_ns = free_ns_;
            }
        }
        forward(frame, headers, flow, first, headers.segments, departed_ns, now_ns);
    }

    // Return the next frame due by now, or none.
    FramePtr due(int64_t now_ns) {
        while (!line_.empty() && line_.front()->due_ns <= now_ns) {
            FramePtr frame = std::move(line_.front());
            line_.pop_front();
            if (frame->cut) continue;
            each(frame->flow, [&](Count& count) {
                count.delivered += frame->segments;
                count.delivered_payload_bytes += frame->payload_bytes;
            });
            return frame;
        }
        return nullptr;
    }

    int64_t next_due_ns() const {
        return line_.empty() ? std::numeric_limits<int64_t>::max() : line_.front()->due_ns;
    }

    void cut(const Flow* flow) {
        for (FramePtr& frame : line_) frame->cut |= frame->flow == flow;
    }

    std::string json() const { return count_.json(); }

private:
    static constexpr int64_t kLateNsMax = 1'000'000;
    static constexpr double kRunNsMax = 1e6;  // a slow link delivers no large super-frames

    template <class Change>
    void each(Flow* flow, Change change) {
        change(count_);
        if (flow != nullptr) change(flow->count[side_]);
    }

    void count(const Headers& headers, Flow* flow) {
        size_t wire_bytes = 0;
        for (size_t i = 0; i < headers.segments; ++i) wire_bytes += headers.wire_bytes(i);
        const size_t again = flow != nullptr ? repeated(headers, *flow) : 0;
        each(flow, [&](Count& count) {
            count.segments += headers.segments;
            count.wire_bytes += wire_bytes;
            count.payload_bytes += headers.tcp ? headers.payload_bytes : 0;
            count.retransmitted += again;
        });
    }

    size_t repeated(const Headers& headers, Flow& flow) {
        const uint32_t end = headers.seq + static_cast<uint32_t>(headers.payload_bytes);
        if (!flow.seen[side_]) {
            flow.seen[side_] = true;
            flow.sent_up_to[side_] = end;
            return 0;
        }
        const auto ahead = static_cast<int32_t>(end - flow.sent_up_to[side_]);
        if (ahead > 0) flow.sent_up_to[side_] = end;
        const int64_t old = static_cast<int64_t>(headers.payload_bytes) - std::max(ahead, 0);
        if (headers.payload_bytes == 0 || old <= 0) return 0;
        const auto size = static_cast<int64_t>(headers.segment_payload_bytes);
        return static_cast<size_t>((old + size - 1) / size);
    }

    // Pass one segment through the queue and the line; false: it does not arrive.
    bool admit(size_t wire_bytes, Flow* flow, int64_t now_ns) {
        if (settings_.rate_bps > 0) {
            const double ns_per_byte = 8e9 / settings_.rate_bps;
            const double backlog_bytes = (free_ns_ - static_cast<double>(now_ns)) / ns_per_byte;
            if (backlog_bytes + static_cast<double>(wire_bytes) > settings_.queue_bytes) {
                each(flow, [](Count& count) { ++count.queue_dropped; });
                return false;
            }
            free_ns_ += static_cast<double>(wire_bytes) * ns_per_byte;
        }
        if (until_loss_-- > 0) return true;
        draw_loss();
        each(flow, [](Count& count) { ++count.lost; });
        return false;
    }

    void forward(FramePtr& frame, const Headers& headers, Flow* flow, size_t first, size_t last,
                 double departed_ns, int64_t now_ns) {
        if (first == last) return;
        const bool whole = first == 0 && last == headers.segments;
        FramePtr part = whole ? std::move(frame) : split(*frame, headers, first, last);
        int64_t due_ns = std::max(static_cast<int64_t>(departed_ns), now_ns) + settings_.delay_ns;
        if (settings_.jitter_ns > 0)
            due_ns += std::uniform_int_distribution<int64_t>(0, settings_.jitter_ns)(random_);
        part->due_ns = last_due_ns_ = std::max(due_ns, last_due_ns_);
        part->flow = flow;
        part->segments = static_cast<uint32_t>(last - first);
        part->payload_bytes =
            headers.tcp ? static_cast<uint32_t>(headers.payload_of(first, last)) : 0;
        line_.push_back(std::move(part));
    }

    // Losses are independent, so the segments until the next one are geometrically distributed.
    void draw_loss() {
        until_loss_ = settings_.loss <= 0 ? std::numeric_limits<int64_t>::max()
                      : settings_.loss >= 1
                          ? 0
                          : std::geometric_distribution<int64_t>(settings_.loss)(random_);
    }

    const int side_;
    Settings settings_;
    std::mt19937_64 random_;
    int64_t until_loss_ = 0;
    double free_ns_ = 0;  // when the bottleneck has sent all that it holds
    int64_t last_due_ns_ = 0;
    std::deque<FramePtr> line_;
    Count count_;
};

}  // namespace netlab
