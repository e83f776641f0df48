#include "wire/ticket.hpp"

#include <algorithm>

#include "wire/frames.hpp"

namespace kvwire {
namespace {

std::string describe(const LeafKey& key) {
    const std::string layer =
        key.layer == REQUEST_LAYER ? "request" : "layer " + std::to_string(key.layer);
    return std::string("group ") + group_kind_name(key.kind) + ", " + layer + ", leaf " + key.leaf;
}

std::string describe(TokenRange range) {
    return "[" + std::to_string(range.start) + ", " + std::to_string(range.stop) + ")";
}

bool slices_overlap(const std::map<Axis, std::pair<uint32_t, uint32_t>>& a,
                    const std::map<Axis, std::pair<uint32_t, uint32_t>>& b) {
    for (const auto& [axis, range] : a) {
        const auto found = b.find(axis);
        if (found == b.end()) continue;
        if (range.second <= found->second.first || found->second.second <= range.first)
            return false;
    }
    return true;
}

uint64_t memory_row_bytes(const LeafMemory& leaf) {
    uint64_t bytes = item_bytes(leaf.dtype);
    for (const auto& axis : leaf.axes) bytes *= axis.stop - axis.start;
    return bytes;
}

}  // namespace

void RangeSet::insert(uint64_t start, uint64_t stop) {
    if (start >= stop) return;
    auto it = stop_by_start_.upper_bound(start);
    if (it != stop_by_start_.begin() && std::prev(it)->second >= start) --it;
    while (it != stop_by_start_.end() && it->first <= stop) {
        start = std::min(start, it->first);
        stop = std::max(stop, it->second);
        it = stop_by_start_.erase(it);
    }
    stop_by_start_[start] = stop;
}

bool RangeSet::intersects(uint64_t start, uint64_t stop) const {
    if (start >= stop) return false;
    auto it = stop_by_start_.lower_bound(stop);  // first range that starts at or after stop
    return it != stop_by_start_.begin() && std::prev(it)->second > start;
}

bool RangeSet::contains(uint64_t start, uint64_t stop) const {
    if (start >= stop) return true;
    auto it = stop_by_start_.upper_bound(start);
    return it != stop_by_start_.begin() && std::prev(it)->second >= stop;
}

uint64_t RangeSet::total() const {
    uint64_t sum = 0;
    for (const auto& [start, stop] : stop_by_start_) sum += stop - start;
    return sum;
}

uint64_t Ticket::Leaf::done_bytes() const {
    uint64_t bytes = 0;
    for (const Claim& claim : claims) bytes += claim.token_bytes * claim.done.total();
    return bytes;
}

Ticket::Ticket(Options options, std::shared_ptr<const MemoryMap> memory, TicketObserver& observer)
    : options_(std::move(options)), memory_(std::move(memory)), observer_(observer) {
    for (const auto& [key, held] : *memory_) {
        Leaf& leaf = leaves_[key];
        leaf.needed = {0, 1};
        if (held.has_tokens) {
            leaf.needed = {held.token_first(), held.token_end()};
            if (held.window_tokens && leaf.needed.stop > held.window_tokens)
                leaf.needed.start =
                    std::max(leaf.needed.start, leaf.needed.stop - held.window_tokens);
        }
        if (leaf.needed.stop > leaf.needed.start)
            leaf.needed_bytes = (leaf.needed.stop - leaf.needed.start) * memory_row_bytes(held);
        leaf.ready = leaf.needed_bytes == 0;
        leaves_open_by_layer_[key.layer] += !leaf.ready;
    }
}

std::set<uint32_t> Ticket::layers_without_needs() const {
    std::set<uint32_t> layers;
    for (const auto& [layer, open] : leaves_open_by_layer_)
        if (open == 0) layers.insert(layer);
    return layers;
}

void Ticket::join(const Id& transfer, const Manifest& manifest,
                  std::function<void(const Error&)> abort) {
    if (ended_)
        throw Error(ErrorCode::TICKET_EXPIRED, "ticket " + hex(options_.id) + " has ended");
    if (!manifest.model.empty() && !options_.model.empty() && manifest.model != options_.model)
        throw Error(ErrorCode::SPEC_MISMATCH, "model: '" + manifest.model + "' at the sender, '" +
                                                  options_.model + "' here");
    if (manifest.token_start != options_.token_start || manifest.token_stop != options_.token_stop)
        throw Error(ErrorCode::TOKENS_MISMATCH,
                    "tokens: " + describe({manifest.token_start, manifest.token_stop}) +
                        " at the sender, " +
                        describe({options_.token_start, options_.token_stop}) + " here",
                    options_.token_stop - options_.token_start,
                    manifest.token_stop - manifest.token_start);
    if (manifest.source_rank_count != options_.source_rank_count ||
        !options_.source_ranks.count(manifest.source_rank) ||
        manifest.destination_rank != options_.destination_rank ||
        manifest.destination_rank_count != options_.destination_rank_count)
        throw Error(ErrorCode::RANK_UNEXPECTED,
                    "source rank " + std::to_string(manifest.source_rank) + " of " +
                        std::to_string(manifest.source_rank_count) + " to destination rank " +
                        std::to_string(manifest.destination_rank) + " of " +
                        std::to_string(manifest.destination_rank_count) + ": not expected here",
                    options_.source_rank_count, manifest.source_rank);
    if (!transfer_by_rank_.emplace(manifest.source_rank, transfer).second)
        throw Error(ErrorCode::RANK_UNEXPECTED,
                    "source rank " + std::to_string(manifest.source_rank) +
                        " has a transfer already",
                    0, manifest.source_rank);
    aborts_[transfer] = std::move(abort);
    for (const GroupDesc& group : manifest.groups)
        for (const TensorDesc& tensor : group.tensors)
            for (uint32_t layer : group.layers) {
                const std::string mismatch = leaf_mismatch(group, tensor, layer, *memory_);
                if (!mismatch.empty()) throw Error(ErrorCode::SPEC_MISMATCH, mismatch);
            }
    observer_.on_metadata(manifest.source_rank, manifest.metadata, manifest.metadata_count, {}, 0);
}

TokenRange Ticket::range_of(const TensorDesc& tensor, const Item& item) const {
    return tensor.has_tokens() ? TokenRange{item.token_start, item.token_stop} : TokenRange{0, 1};
}

Ticket::Claim Ticket::shape_of(const TensorDesc& tensor, size_t leaf,
                               const LeafMemory& memory) const {
    Claim claim;
    claim.replicated = tensor.replicated;
    claim.token_bytes = item_bytes(tensor.dtype);
    for (const AxisDesc& axis : tensor.axes) {
        if (axis.axis == Axis::TOKEN) continue;
        if (axis.axis == Axis::COLUMN) {  // however many travel, all of the memory's are settled
            for (const auto& own : memory.axes)
                if (own.axis == Axis::COLUMN) claim.token_bytes *= own.stop - own.start;
            continue;
        }
        const Slice& slice = axis.slices[axis.slices.size() > 1 ? leaf : 0];
        claim.slices[axis.axis] = {slice.start, slice.stop};
        claim.token_bytes *= slice.extent();
    }
    return claim;
}

Ticket::Found Ticket::claim_leaf(const LeafKey& key, Claim shape, TokenRange tokens) {
    Leaf& leaf = leaves_[key];
    Claim* same = nullptr;
    for (Claim& claim : leaf.claims) {
        if (claim.slices == shape.slices) {
            same = &claim;
        } else if (slices_overlap(claim.slices, shape.slices) &&
                   claim.claimed.intersects(tokens.start, tokens.stop)) {
            throw Error(ErrorCode::OVERLAP, describe(key) + ", tokens " + describe(tokens) +
                                                ": another slice claims part of these bytes");
        }
    }
    if (!same) {
        leaf.claims.push_back(std::move(shape));
        same = &leaf.claims.back();
    } else if (same->claimed.intersects(tokens.start, tokens.stop)) {
        if (!same->replicated || !shape.replicated)
            throw Error(ErrorCode::OVERLAP, describe(key) + ", tokens " + describe(tokens) +
                                                ": claimed twice and not marked replicated");
        if (!same->claimed.contains(tokens.start, tokens.stop))
            throw Error(ErrorCode::OVERLAP, describe(key) + ", tokens " + describe(tokens) +
                                                ": a replica covers only part of an earlier claim");
        return Found::REPLICA;
    }
    same->replicated = same->replicated && shape.replicated;
    same->claimed.insert(tokens.start, tokens.stop);
    return Found::NEW;
}

uint32_t Ticket::claim(const Manifest& manifest, const Item& item, Placement& placement) {
    const GroupDesc& group = manifest.groups[item.group];
    const TensorDesc& tensor = group.tensors[item.tensor];
    const TokenRange tokens = range_of(tensor, item);
    uint32_t claimed = 0;
    for (size_t i = 0; i < tensor.leaf_count(); ++i) {
        const LeafKey key{group.kind, item.layer, tensor.leaf_name(i)};
        const auto memory = memory_->find(key);
        if (memory == memory_->end())
            throw Error(ErrorCode::SPEC_MISMATCH, describe(key) + ": not held here");
        const Found found = claim_leaf(key, shape_of(tensor, i, memory->second), tokens);
        claimed |= uint32_t(found == Found::NEW) << i;
    }
    // A fused tensor may bring something new beside its replicas; then all of it is placed. Its
    // layer cannot be ready before that new part is verified: nothing ready is written again.
    if (claimed == 0) {
        placement.append_skip(item_raw_bytes(tensor, item));
        return 0;
    }
    placement.append(group, item, *memory_);
    if (!options_.zone)
        zero_missing_columns(group, item, *memory_);
    else if (lacks_columns(group, item, *memory_))
        throw Error(ErrorCode::SPEC_MISMATCH,
                    "layer " + std::to_string(item.layer) + ": the sender has fewer convolution "
                    "columns than the destination, which is in a device's memory: give it a "
                    "destination of as many columns, or one in host memory");
    return claimed;
}

void Ticket::leaf_progress(const LeafKey& key, Leaf& leaf) {
    if (leaf.ready || leaf.needed_bytes == 0 || leaf.done_bytes() < leaf.needed_bytes) return;
    leaf.ready = true;
    if (--leaves_open_by_layer_[key.layer] == 0) observer_.on_layer_ready(key.layer);
}

void Ticket::verified(const Manifest& manifest, const Item& item, uint32_t claimed) {
    const GroupDesc& group = manifest.groups[item.group];
    const TensorDesc& tensor = group.tensors[item.tensor];
    const TokenRange tokens = range_of(tensor, item);
    for (size_t i = 0; i < tensor.leaf_count(); ++i) {
        if (!(claimed >> i & 1)) continue;
        const LeafKey key{group.kind, item.layer, tensor.leaf_name(i)};
        const auto slices = shape_of(tensor, i, memory_->at(key)).slices;
        Leaf& leaf = leaves_[key];
        for (Claim& claim : leaf.claims)
            if (claim.slices == slices)
                claim.done.insert(std::max(tokens.start, leaf.needed.start),
                                  std::min(tokens.stop, leaf.needed.stop));
        leaf_progress(key, leaf);
    }
}

void Ticket::transfer_done(const Id& transfer, const Manifest& manifest) {
    aborts_.erase(transfer);
    ranks_done_.insert(manifest.source_rank);
    if (ranks_done_.size() < options_.source_ranks.size()) return;
    for (const auto& [key, leaf] : leaves_)
        if (!leaf.ready && leaf.needed_bytes)
            throw Error(ErrorCode::INCOMPLETE,
                        describe(key) + ": all ranks are done, but only " +
                            std::to_string(leaf.done_bytes()) + " of " +
                            std::to_string(leaf.needed_bytes) + " bytes came",
                        leaf.needed_bytes, leaf.done_bytes());
    end(Error{});
}

void Ticket::fail(const Error& error) {
    if (ended_) return;
    // The book says ended before anybody is told, so that nothing comes back in.
    ended_ = true;
    const auto aborts = std::move(aborts_);
    aborts_.clear();
    for (const auto& [transfer, abort] : aborts) abort(error);
    observer_.on_end(error);
}

void Ticket::end(const Error& error) {
    if (ended_) return;
    ended_ = true;
    aborts_.clear();
    observer_.on_end(error);
}

}  // namespace kvwire
