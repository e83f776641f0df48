#include "plan/match.hpp"

#include "base/error.hpp"

namespace kvwire {
namespace {

std::string place_name(const GroupDesc& group, uint32_t layer, const std::string& leaf) {
    const char* kind = group_kind_name(group.kind);
    const std::string where = layer == REQUEST_LAYER ? "request" : "layer " + std::to_string(layer);
    return std::string("group ") + (kind ? kind : "?") + ", " + where + ", leaf " + leaf + ": ";
}

std::string slice_text(const Slice& slice) {
    return "[" + std::to_string(slice.start) + ", " + std::to_string(slice.stop) + ") of " +
           std::to_string(slice.full);
}

// The manifest parser refuses these too; here they would become addresses outside the memory.
std::string malformed(const TensorDesc& tensor) {
    uint64_t seen = 0;
    size_t fused = 0;
    if (item_bytes(tensor.dtype) == 0) return "unknown dtype";
    for (const AxisDesc& axis : tensor.axes) {
        const char* name = axis_name(axis.axis);
        if (!name) return "unknown axis";
        const uint64_t bit = uint64_t{1} << static_cast<unsigned>(axis.axis);
        if (seen & bit) return std::string("axis ") + name + " appears twice";
        seen |= bit;
        if ((axis.axis == Axis::TOKEN) != axis.slices.empty())
            return std::string("axis ") + name + ": slices are for every axis but token";
        fused += axis.slices.size() > 1;
        for (const Slice& slice : axis.slices)
            if (slice.start > slice.stop || slice.stop > slice.full)
                return std::string("axis ") + name + ": slice " + slice_text(slice);
        if (axis.axis == Axis::COLUMN &&
            (axis.slices.size() != 1 || axis.slices[0].extent() != axis.slices[0].full))
            return "axis column: not one whole slice";
    }
    return fused > 1 ? "two axes have several slices" : "";
}

std::string axis_mismatch(const AxisDesc& axis, const Slice& wire, const LeafMemory& memory) {
    const std::string name = std::string(axis_name(axis.axis)) + " axis ";
    const LeafMemory::AxisStride* held = memory.find(axis.axis);
    if (!held) return name + "at the sender, none here";
    if (axis.axis == Axis::COLUMN) return "";  // of any number: aligned at the newest
    if (wire.full != held->full)
        return name + "of " + std::to_string(wire.full) + " at the sender, of " +
               std::to_string(held->full) + " here";
    if (wire.start < held->start || wire.stop > held->stop)
        return name + slice_text(wire) + " at the sender, " +
               slice_text({"", held->full, held->start, held->stop}) + " here";
    return "";
}

std::string memory_mismatch(const TensorDesc& tensor, size_t leaf, const LeafMemory& memory) {
    if (tensor.dtype != memory.dtype) {
        const char* here = dtype_name(memory.dtype);
        return std::string("dtype ") + dtype_name(tensor.dtype) + " at the sender, " +
               (here ? here : "unknown") + " here";
    }
    if (tensor.has_tokens() != memory.has_tokens)
        return memory.has_tokens ? "no token axis at the sender, one here"
                                 : "a token axis at the sender, none here";
    for (const LeafMemory::AxisStride& held : memory.axes) {
        bool found = false;
        for (const AxisDesc& axis : tensor.axes) found |= axis.axis == held.axis;
        if (!found) return std::string(axis_name(held.axis)) + " axis here, none at the sender";
    }
    for (const AxisDesc& axis : tensor.axes) {
        if (axis.axis == Axis::TOKEN) continue;
        const Slice& wire = axis.slices.size() > 1 ? axis.slices[leaf] : axis.slices[0];
        const std::string text = axis_mismatch(axis, wire, memory);
        if (!text.empty()) return text;
    }
    return "";
}

std::string range_text(uint64_t start, uint64_t stop) {
    return "[" + std::to_string(start) + ", " + std::to_string(stop) + ")";
}

void check_tokens(const std::string& place, const Item& item, const LeafMemory& memory) {
    if (item.token_start == item.token_stop) return;
    const uint64_t count = item.token_stop - item.token_start;
    if (item.token_start < memory.token_first() || item.token_stop > memory.token_end())
        throw Error(ErrorCode::TOKENS_MISMATCH,
                    place + "tokens " + range_text(item.token_start, item.token_stop) +
                        " announced, " + range_text(memory.token_first(), memory.token_end()) +
                        " held here",
                    memory.token_end(), item.token_stop, item.token_start);
    if (memory.ring_tokens > 0 && count > memory.ring_tokens)
        throw Error(ErrorCode::TOKENS_MISMATCH,
                    place + std::to_string(count) + " tokens announced, the ring here holds " +
                        std::to_string(memory.ring_tokens),
                    memory.ring_tokens, count);
    if (memory.ring_tokens > 0 || memory.block_tokens == 0) return;
    const uint64_t needed = (item.token_stop - 1 - memory.token_origin) / memory.block_tokens + 1;
    const uint64_t blocks = memory.block_ids ? memory.block_ids->size() : 0;
    if (needed > blocks)
        throw Error(ErrorCode::TOKENS_MISMATCH,
                    place + std::to_string(needed) + " blocks of " +
                        std::to_string(memory.block_tokens) + " tokens needed, " +
                        std::to_string(blocks) + " block ids here",
                    blocks, needed);
}

}  // namespace

std::string leaf_mismatch(const GroupDesc& group, const TensorDesc& tensor, uint32_t layer,
                          const MemoryMap& memory) {
    const std::string text = malformed(tensor);
    if (!text.empty()) return place_name(group, layer, tensor.name) + text;
    for (size_t leaf = 0; leaf < tensor.leaf_count(); ++leaf) {
        const std::string name = tensor.leaf_name(leaf);
        const auto found = memory.find({group.kind, layer, name});
        const std::string why = found == memory.end()
                                    ? "sent by the sender, not held here"
                                    : memory_mismatch(tensor, leaf, found->second);
        if (!why.empty()) return place_name(group, layer, name) + why;
    }
    return "";
}

uint64_t item_raw_bytes(const TensorDesc& tensor, const Item& item) {
    const bool has_tokens = tensor.has_tokens();
    if (item.token_start > item.token_stop || (!has_tokens && item.token_stop > 0))
        throw Error(ErrorCode::SEGMENT_INVALID,
                    "tensor " + tensor.name + ": token range " +
                        range_text(item.token_start, item.token_stop) +
                        (has_tokens ? "" : " of a tensor without tokens"),
                    0, item.token_stop);
    uint64_t bytes = tensor.row_bytes();
    if (has_tokens && __builtin_mul_overflow(bytes, item.token_stop - item.token_start, &bytes))
        bytes = UINT64_MAX;
    if (bytes > SEGMENT_BYTES_MAX)
        throw Error(ErrorCode::SEGMENT_INVALID,
                    "tensor " + tensor.name + ": 2^63 bytes or more in one item",
                    SEGMENT_BYTES_MAX, bytes);
    return bytes;
}

std::vector<const LeafMemory*> match_leaves(const GroupDesc& group, const Item& item,
                                            const MemoryMap& memory) {
    if (item.tensor >= group.tensors.size())
        throw Error(ErrorCode::SEGMENT_INVALID, "the item names a tensor that its group lacks",
                    group.tensors.size(), item.tensor);
    const TensorDesc& tensor = group.tensors[item.tensor];
    const std::string why = leaf_mismatch(group, tensor, item.layer, memory);
    if (!why.empty()) throw Error(ErrorCode::SPEC_MISMATCH, why);
    item_raw_bytes(tensor, item);
    std::vector<const LeafMemory*> leaves;
    for (size_t leaf = 0; leaf < tensor.leaf_count(); ++leaf) {
        const std::string name = tensor.leaf_name(leaf);
        leaves.push_back(&memory.find({group.kind, item.layer, name})->second);
        if (tensor.has_tokens())
            check_tokens(place_name(group, item.layer, name), item, *leaves.back());
    }
    return leaves;
}

}  // namespace kvwire
