#include "wire/loans.hpp"

#include <algorithm>

namespace kvwire {

void Loans::keep(const void* owner, Bytes&& head, Bytes&& body, uint64_t until) {
    if (!is_returned(until)) kept_.push_back({owner, std::move(head), std::move(body), until});
}

void Loans::returned(uint32_t first, uint32_t last) {
    const uint64_t from = returned_ + uint32_t(first - uint32_t(returned_));
    early_[from] = from + uint32_t(last - first) + 1;
    for (auto next = early_.begin(); next != early_.end() && next->first == returned_;
         next = early_.erase(next))
        returned_ = next->second;
    while (!kept_.empty() && is_returned(kept_.front().until)) kept_.pop_front();
}

bool Loans::holds(const void* owner) const {
    return std::any_of(kept_.begin(), kept_.end(),
                       [owner](const Kept& kept) { return kept.owner == owner; });
}

}  // namespace kvwire
