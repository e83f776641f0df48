#pragma once
// Whose turn it is to send: of those with something to send the highest priority, of equals the
// oldest. Every OLDEST_EVERY-th turn goes to the oldest of all: low priority waits, but not for
// ever.

#include <cstdint>
#include <map>
#include <memory>
#include <utility>

namespace kvwire {

template <class T>  // has a `priority`, and a `serial` in the order of birth
class Turns {
public:
    static constexpr uint32_t OLDEST_EVERY = 16;

    bool empty() const { return by_age_.empty(); }
    const std::map<uint64_t, std::shared_ptr<T>>& by_age() const { return by_age_; }

    void add(const std::shared_ptr<T>& one) {
        by_age_.emplace(one->serial, one);
        by_rank_.emplace(rank(*one), one);
    }

    void remove(const T& one) {
        by_rank_.erase(rank(one));
        by_age_.erase(one.serial);
    }

    std::shared_ptr<T> next() {
        const bool oldest = ++turn_ % OLDEST_EVERY == 0;
        return oldest ? by_age_.begin()->second : by_rank_.begin()->second;
    }

private:
    using Rank = std::pair<int64_t, uint64_t>;
    static Rank rank(const T& one) { return {-int64_t(one.priority), one.serial}; }

    std::map<uint64_t, std::shared_ptr<T>> by_age_;
    std::map<Rank, std::shared_ptr<T>> by_rank_;
    uint32_t turn_ = 0;
};

}  // namespace kvwire
