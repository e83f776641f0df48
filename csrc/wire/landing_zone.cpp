#include "wire/landing_zone.hpp"

#include <chrono>

namespace kvwire {

LandingZone::LandingZone(std::vector<uint8_t*> rooms, size_t room_bytes)
    : free_(std::move(rooms)), room_bytes_(room_bytes) {}

LandingZone::Room LandingZone::take(const std::shared_ptr<LandingZone>& zone, size_t bytes) {
    std::lock_guard<std::mutex> lock(zone->mutex_);
    if (bytes > zone->room_bytes_ || zone->free_.empty())
        return Room(new uint8_t[bytes], std::default_delete<uint8_t[]>());
    uint8_t* const room = zone->free_.back();
    zone->free_.pop_back();
    return Room(room, [zone](uint8_t* returned) {
        std::lock_guard<std::mutex> held(zone->mutex_);
        zone->free_.push_back(returned);
    });
}

void LandingZone::push(Landed landed) {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (closed_) return;  // nobody is left to say what came of it: its ticket will end
        landed_.push_back(std::move(landed));
    }
    changed_.notify_one();
}

bool LandingZone::pop(Landed* landed, double timeout_s) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, std::chrono::duration<double>(timeout_s),
                      [this] { return closed_ || !landed_.empty(); });
    if (landed_.empty()) return false;
    *landed = std::move(landed_.front());
    landed_.pop_front();
    return true;
}

void LandingZone::close() {
    std::deque<Landed> dropped;  // rooms take the lock when they come back
    {
        std::lock_guard<std::mutex> lock(mutex_);
        closed_ = true;
        dropped.swap(landed_);
    }
    changed_.notify_all();
}

size_t LandingZone::rooms_free() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return free_.size();
}

}  // namespace kvwire
