#pragma once
// Measured speeds: how fast a core codes, decodes, sends and receives. A receiver reports its own
// in SPEEDS frames (FORMAT.md section 7.12).

#include <cstdint>
#include <map>
#include <utility>

#include "base/bytes.hpp"
#include "codec/codec.hpp"
#include "plan/geometry.hpp"
#include "wire/control.hpp"

namespace kvwire {

// Bytes over time, of which old ones are slowly forgotten.
class Speed {
public:
    void add(uint64_t bytes, uint64_t ns) {
        bytes_ = KEPT * bytes_ + double(bytes);
        ns_ = KEPT * ns_ + double(ns);
        ++samples_;
    }
    bool is_known() const { return ns_ > 0 && samples_ >= SAMPLES_MIN; }
    double bytes_per_s() const { return is_known() ? bytes_ * 1e9 / ns_ : 0; }

private:
    static constexpr double KEPT = 31.0 / 32;
    static constexpr uint64_t SAMPLES_MIN = 3;
    double bytes_ = 0, ns_ = 0;
    uint64_t samples_ = 0;
};

// Of one core of a receiver; 0 or absent: not known.
struct Speeds {
    uint64_t receive_bytes_per_s = 0;  // out of its sockets, as they were on the wire
    uint16_t threads = 1;              // cores that do it
    std::map<std::pair<Codec, DType>, uint64_t> decode_bytes_per_s;  // raw, verified and placed

    uint64_t decode(Codec codec, DType dtype) const {
        const auto found = decode_bytes_per_s.find({codec, dtype});
        return found == decode_bytes_per_s.end() ? 0 : found->second;
    }
};

Bytes encode(const Speeds& speeds);
// False, with anything in `speeds`: it breaks the format. Then it says nothing.
[[nodiscard]] bool decode(ByteSpan payload, Speeds* speeds);

// A receiver's own, and when it should say them.
class SpeedMeter {
public:
    explicit SpeedMeter(uint16_t threads) : threads_(threads) {}

    void received(uint64_t wire_bytes, uint64_t ns) { receive_.add(wire_bytes, ns); }
    void decoded(Codec codec, DType dtype, uint64_t raw_bytes, uint64_t ns) {
        decode_[{codec, dtype}].add(raw_bytes, ns);
    }
    // They are new, or have changed; and it is not just now that they were said.
    bool take_report(uint64_t now_ns, Speeds* speeds);

private:
    Speeds speeds() const;
    const uint16_t threads_;
    Speed receive_;
    std::map<std::pair<Codec, DType>, Speed> decode_;
    Speeds said_;
    uint64_t looked_ns_ = 0;
};

}  // namespace kvwire
