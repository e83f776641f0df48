// Giving source memory back: not before the kernel has let go of it.

#include <algorithm>

#include "wire/send_link.hpp"

namespace kvwire {

bool SendLink::is_lent(const SendTransfer::Segment& segment) const {
    const auto lent_by_lane = [&](const auto& lane) { return lane.second.writer.lends(&segment); };
    const auto lent_by_lost = [&](const auto& loans) { return loans->holds(&segment); };
    return std::any_of(lanes_.begin(), lanes_.end(), lent_by_lane) ||
           std::any_of(retired_.begin(), retired_.end(), lent_by_lost);
}

bool SendLink::is_lent(const SendTransfer& transfer) const {
    return std::any_of(transfer.segments.begin(), transfer.segments.end(),
                       [this](const auto& segment) { return is_lent(*segment); });
}

void SendLink::retire(uint32_t lane) {
    const auto lost = lanes_.find(lane);
    if (lost == lanes_.end()) return;
    LaneWriter& writer = lost->second.writer;
    writer.retire();
    if (!writer.loans()->empty()) retired_.push_back(writer.loans());
    lanes_.erase(lost);
}

void SendLink::give_back(SendTransfer& transfer, SendTransfer::Segment& segment) {
    if (is_lent(segment))
        recalls_.push_back({++recall_serial_, transfers_.at(transfer.id), &segment});
    else
        release(transfer, segment);
}

void SendLink::release(SendTransfer& transfer, const SendTransfer::Segment& segment) {
    if (--transfer.pushes[segment.push].open_segments == 0)
        complete_push(transfer, segment.push, Error{});
}

void SendLink::loans_changed() {
    retired_.erase(std::remove_if(retired_.begin(), retired_.end(),
                                  [](const auto& loans) { return loans->empty(); }),
                   retired_.end());
    const auto recalled = std::stable_partition(
        recalls_.begin(), recalls_.end(), [this](const Recall& each) {
            return is_lent(*each.segment);
        });
    const auto ended = std::stable_partition(
        endings_.begin(), endings_.end(), [this](const Ending& each) {
            return is_lent(*each.transfer);
        });
    const std::vector<Recall> recalls(recalled, recalls_.end());
    const std::vector<Ending> endings(ended, endings_.end());
    recalls_.erase(recalled, recalls_.end());
    endings_.erase(ended, endings_.end());
    for (const Recall& each : recalls) release(*each.transfer, *each.segment);
    for (const Ending& each : endings) end_unopened(*each.transfer, each.error);
}

std::vector<uint32_t> SendLink::lenders(uint64_t recalls) const {
    std::vector<uint32_t> lanes;
    for (const auto& [index, lane] : lanes_) {
        const LaneWriter& writer = lane.writer;
        const auto recalled = [&](const Recall& each) {
            return each.serial <= recalls && writer.lends(each.segment);
        };
        const auto ending = [&](const Ending& each) {
            const auto& segments = each.transfer->segments;
            return each.serial <= recalls &&
                   std::any_of(segments.begin(), segments.end(), [&](const auto& segment) {
                       return writer.lends(segment.get());
                   });
        };
        if (std::any_of(recalls_.begin(), recalls_.end(), recalled) ||
            std::any_of(endings_.begin(), endings_.end(), ending))
            lanes.push_back(index);
    }
    return lanes;
}

}  // namespace kvwire
