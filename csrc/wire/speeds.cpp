#include "wire/speeds.hpp"

#include <cmath>

#include "wire/format.hpp"

namespace kvwire {
namespace {

constexpr uint64_t REPORT_EVERY_NS = 200'000'000;
constexpr double CHANGED = 0.1;

bool differs(uint64_t before, uint64_t now) {
    return std::abs(double(now) - double(before)) > CHANGED * double(before);
}

}  // namespace

Bytes encode(const Speeds& speeds) {
    Bytes out(SPEEDS_FIXED_BYTES + SPEED_BYTES * speeds.decode_bytes_per_s.size());
    store_le<uint64_t>(out.data(), speeds.receive_bytes_per_s);
    store_le<uint16_t>(out.data() + 8, speeds.threads);
    store_le<uint16_t>(out.data() + 10, uint16_t(speeds.decode_bytes_per_s.size()));
    uint8_t* at = out.data() + SPEEDS_FIXED_BYTES;
    for (const auto& [of, bytes_per_s] : speeds.decode_bytes_per_s) {
        at[0] = uint8_t(of.first);
        at[1] = uint8_t(of.second);
        store_le<uint64_t>(at + 8, bytes_per_s);
        at += SPEED_BYTES;
    }
    return out;
}

bool decode(ByteSpan payload, Speeds* speeds) {
    if (payload.size < SPEEDS_FIXED_BYTES) return false;
    *speeds = {};
    speeds->receive_bytes_per_s = load_le<uint64_t>(payload.data);
    speeds->threads = load_le<uint16_t>(payload.data + 8);
    const uint16_t count = load_le<uint16_t>(payload.data + 10);
    if (speeds->threads == 0 || count > limits::speed_count_max ||
        payload.size != SPEEDS_FIXED_BYTES + count * SPEED_BYTES)
        return false;
    for (uint16_t i = 0; i < count; ++i) {
        const uint8_t* at = payload.data + SPEEDS_FIXED_BYTES + i * SPEED_BYTES;
        speeds->decode_bytes_per_s[{Codec(at[0]), DType(at[1])}] = load_le<uint64_t>(at + 8);
    }
    return true;
}

Speeds SpeedMeter::speeds() const {
    Speeds speeds;
    speeds.receive_bytes_per_s = uint64_t(receive_.bytes_per_s());
    speeds.threads = threads_;
    for (const auto& [of, speed] : decode_)
        speeds.decode_bytes_per_s[of] = uint64_t(speed.bytes_per_s());
    return speeds;
}

bool SpeedMeter::take_report(uint64_t now_ns, Speeds* speeds) {
    if (now_ns - looked_ns_ < REPORT_EVERY_NS || !receive_.is_known()) return false;
    looked_ns_ = now_ns;
    *speeds = this->speeds();
    bool due = differs(said_.receive_bytes_per_s, speeds->receive_bytes_per_s);
    for (const auto& [of, bytes_per_s] : speeds->decode_bytes_per_s)
        due = due || differs(said_.decode(of.first, of.second), bytes_per_s);
    if (!due) return false;
    said_ = *speeds;
    return true;
}

}  // namespace kvwire
