#include "wire/link_machine.hpp"

namespace kvwire {

void LinkMachine::heard(uint32_t lane, uint64_t now_ns) {
    now_ns_ = now_ns;
    was_heard_ = true;
    liveness_.heard(lane, now_ns);
}

bool LinkMachine::on_link_frame(uint32_t lane, const FrameHeader& header, ByteSpan payload) {
    switch (header.type) {
        case FrameType::PING:
            liveness_.peer_pings();
            writer(lane).control(FrameType::PONG, Id{}, 0,
                                 Bytes(payload.data, payload.data + payload.size));
            return true;
        case FrameType::PONG:
            liveness_.pong(lane, load_le<uint64_t>(payload.data));
            pong_came_ = true;
            return true;
        case FrameType::SPEEDS:
            on_speeds(payload);
            return true;
        case FrameType::CLOSE:
            peer_left_ = true;
            return true;
        default: return false;
    }
}

Upkeep LinkMachine::upkeep(uint64_t now_ns) {
    now_ns_ = now_ns;
    const Upkeep upkeep = liveness_.look(now_ns, awaits_peer());
    for (const uint32_t lane : upkeep.stalled) lane_stalled(lane);
    for (const uint32_t lane : upkeep.ping) {
        Bytes number(PING_BYTES);
        store_le<uint64_t>(number.data(), liveness_.ping(lane, now_ns));
        writer(lane).control(FrameType::PING, Id{}, 0, number);
    }
    return upkeep;
}

}  // namespace kvwire
