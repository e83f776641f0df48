#include "transport/link_reading.hpp"

#include <fcntl.h>

#include "transport/endpoint.hpp"

namespace kvwire {

LaneReading Lane::reading() const {
    LaneReading reading;
    reading.index = own_.lane_index;
    reading.serial = serial_;
    reading.queued_bytes = writer_ ? writer_->queued_bytes() : 0;
    reading.socket = Fd(::fcntl(stream_->fd().get(), F_DUPFD_CLOEXEC, 0));
    return reading;
}

uint32_t Lane::rtt_min_us() const {
    return tcp_info(stream_->fd().get()).value_or(TcpInfo{}).rtt_min_us;
}

LinkReading Link::reading() const {
    LinkReading reading;
    reading.born_ns = born_ns_;
    reading.verified_bytes = machine().verified_bytes();
    reading.backlog_bytes = send ? send->backlog_bytes() : 0;
    for (const auto& [index, lane] : lanes_) reading.lanes.push_back(lane->reading());
    if (!send) return reading;
    const CodecChoice& choice = send->choice();
    reading.bandwidth_bytes_per_s = choice.bandwidth_bytes_per_s();
    reading.send_bytes_per_s = choice.send_bytes_per_s();
    reading.receive_bytes_per_s = double(choice.peer().receive_bytes_per_s);
    reading.choices = choice.report();
    return reading;
}

LinkReading Endpoint::read_link(const Id& link_id) {
    LinkReading reading;
    bool found = false;
    loops_->call([&] {
        if (const auto link = find_link(link_id)) {
            found = true;
            reading = link->reading();
        }
    });
    if (!found) throw Error(ErrorCode::USAGE, "there is no link " + hex(link_id) + " any more");
    for (LaneReading& lane : reading.lanes)
        lane.tcp = tcp_info(lane.socket.get()).value_or(TcpInfo{});
    reading.now_ns = Loops::now_ns();
    return reading;
}

}  // namespace kvwire
