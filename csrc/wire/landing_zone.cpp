#include "wire/landing_zone.hpp"

#include <algorithm>
#include <chrono>

namespace kvwire {

LandingZone::LandingZone(uint8_t* memory, size_t room_count, size_t room_bytes)
    : memory_(memory), room_bytes_(room_bytes), is_free_(room_count, true) {}

LandingZone::Room LandingZone::take(const std::shared_ptr<LandingZone>& zone, size_t bytes) {
    std::lock_guard<std::mutex> lock(zone->mutex_);
    auto& is_free = zone->is_free_;
    const size_t count = (bytes + zone->room_bytes_ - 1) / zone->room_bytes_;
    const auto found = std::search_n(is_free.begin(), is_free.end(), count, true);
    if (found == is_free.end()) return Room(new uint8_t[bytes], std::default_delete<uint8_t[]>());
    std::fill_n(found, count, false);
    const size_t first = size_t(found - is_free.begin());
    return Room(zone->memory_ + first * zone->room_bytes_, [zone, first, count](uint8_t*) {
        std::lock_guard<std::mutex> held(zone->mutex_);
        std::fill_n(zone->is_free_.begin() + ptrdiff_t(first), count, true);
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
    return size_t(std::count(is_free_.begin(), is_free_.end(), true));
}

}  // namespace kvwire
