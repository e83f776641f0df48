#pragma once
// Where payloads for a device land: rooms of page-locked memory, and a queue of what lies in them.
// The application decodes each into the device's pages and says what came of it. Any thread.

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "base/error.hpp"
#include "codec/code_table.hpp"
#include "plan/placement.hpp"
#include "wire/frames.hpp"

namespace kvwire {

class LandingZone {
public:
    // `memory`: the caller's, of `room_count` rooms side by side. A payload takes as many of them,
    // neighbours, as hold it. Where they are out, memory that is not page-locked stands in: how
    // much there can be out is the receive windows' to say.
    LandingZone(uint8_t* memory, size_t room_count, size_t room_bytes);

    using Room = std::shared_ptr<uint8_t>;  // goes back when the last owner lets go of it
    static Room take(const std::shared_ptr<LandingZone>& zone, size_t bytes);

    struct Landed {
        Id ticket_id;
        FrameHeader header;     // of the CHUNK; its payload's checksum was right
        uint32_t chunk_bytes = 0;
        std::shared_ptr<const Placement> placement;  // of the whole segment, shared by its chunks
        Room payload;
        std::map<uint32_t, std::shared_ptr<const CodeTable>> tables;  // that its parts name
    };
    void push(Landed landed);
    // Waits for something; false: nothing came in time, or the zone is closed and empty.
    bool pop(Landed* landed, double timeout_s);
    void close();

    size_t rooms_free() const;

private:
    mutable std::mutex mutex_;
    std::condition_variable changed_;
    uint8_t* const memory_;
    const size_t room_bytes_;
    std::vector<bool> is_free_;  // of each room
    std::deque<Landed> landed_;
    bool closed_ = false;
};

}  // namespace kvwire
