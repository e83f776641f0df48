// A segment's layout on the wire and in memory, and the definition that plans are held to: one
// address per element, worked out by itself.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "checksum/crc32c.hpp"
#include "plan/placement.hpp"
#include "tests/test.hpp"

namespace kvwire::test {

using Random = std::mt19937_64;

inline uint64_t pick(Random& random, uint64_t low, uint64_t high) {  // both included
    return low + random() % (high - low + 1);
}

inline GroupDesc group_of(TensorDesc tensor, GroupKind kind = GroupKind::FULL_ATTENTION) {
    GroupDesc group;
    group.kind = kind;
    group.layers = {0};
    group.tensors = {std::move(tensor)};
    return group;
}

inline AxisDesc whole(Axis axis, uint32_t extent) { return {axis, {{"", extent, 0, extent}}}; }

struct World {
    GroupDesc group;
    Item item;
    MemoryMap memory;
    std::vector<std::vector<uint8_t>> arrays;

    const TensorDesc& tensor() const { return group.tensors[0]; }

    // One array of `shape_axes` in this order; paged memory has the blocks outermost.
    void hold(const std::string& leaf, std::vector<Axis> order, LeafMemory held, Random& random) {
        held.dtype = tensor().dtype;
        int64_t stride = item_bytes(held.dtype);
        uint64_t tokens = held.block_tokens ? held.block_tokens : held.token_count;
        if (held.ring_tokens) tokens = held.ring_tokens;
        int64_t low = 0;
        for (auto axis = order.rbegin(); axis != order.rend(); ++axis) {
            const uint64_t pad = pick(random, 0, 2);
            const bool backwards = pick(random, 0, 5) == 0;
            const auto place = [&](int64_t& at, uint64_t extent) {
                at = backwards ? -stride : stride;
                if (backwards) low += stride * static_cast<int64_t>(extent ? extent - 1 : 0);
                stride *= static_cast<int64_t>(extent + (pick(random, 0, 2) ? 0 : pad));
            };
            if (*axis == Axis::TOKEN) {
                place(held.token_stride, tokens);
            } else {
                for (LeafMemory::AxisStride& each : held.axes)
                    if (each.axis == *axis) place(each.stride, each.stop - each.start);
            }
        }
        int64_t blocks = 1;
        if (held.block_tokens) {
            held.block_stride = stride;
            for (int64_t id : *held.block_ids) blocks = std::max(blocks, id + 1);
        }
        arrays.emplace_back(static_cast<size_t>(stride * blocks) + 64);
        for (uint8_t& byte : arrays.back()) byte = static_cast<uint8_t>(random());
        held.base = arrays.back().data() + 32 + low;
        memory[{group.kind, item.layer, leaf}] = held;
    }
};

inline uint8_t* token_address(const LeafMemory& leaf, uint64_t token) {
    if (leaf.ring_tokens) return leaf.base + (token % leaf.ring_tokens) * leaf.token_stride;
    const uint64_t t = token - leaf.token_origin;
    if (!leaf.block_tokens) return leaf.base + static_cast<int64_t>(t) * leaf.token_stride;
    return leaf.base + (*leaf.block_ids)[t / leaf.block_tokens] * leaf.block_stride +
           static_cast<int64_t>(t % leaf.block_tokens) * leaf.token_stride;
}

// The definition: the address of every element in wire order, nullptr where skipped.
inline std::vector<uint8_t*> definition(const World& world) {
    const TensorDesc& tensor = world.tensor();
    const size_t depth_max = tensor.axes.size();
    std::vector<uint8_t*> out;
    std::vector<std::pair<Axis, int64_t>> at;
    std::function<void(size_t, size_t, uint64_t, uint64_t)> visit =
        [&](size_t depth, size_t leaf, uint64_t start, uint64_t stop) {
            if (depth == depth_max) {
                const LeafMemory& held =
                    world.memory.at({world.group.kind, world.item.layer, tensor.leaf_name(leaf)});
                uint8_t* address = held.base;
                for (const auto& [axis, index] : at) {
                    if (axis == Axis::TOKEN) {
                        address += token_address(held, index) - held.base;
                        continue;
                    }
                    const LeafMemory::AxisStride& stride = *held.find(axis);
                    int64_t in_memory = index - stride.start;
                    for (const AxisDesc& desc : tensor.axes)
                        if (desc.axis == axis && axis == Axis::COLUMN)
                            in_memory += int64_t{stride.full} - desc.slices[0].full;
                    if (in_memory < 0) return out.push_back(nullptr);
                    address += in_memory * stride.stride;
                }
                return out.push_back(address);
            }
            const AxisDesc& axis = tensor.axes[depth];
            const auto each = [&](uint64_t from, uint64_t to, size_t which) {
                for (uint64_t i = from; i < to; ++i) {
                    at.push_back({axis.axis, static_cast<int64_t>(i)});
                    visit(depth + 1, which, start, stop);
                    at.pop_back();
                }
            };
            if (axis.axis == Axis::TOKEN) return each(start, stop, leaf);
            for (size_t s = 0; s < axis.slices.size(); ++s)
                each(axis.slices[s].start, axis.slices[s].stop, axis.slices.size() > 1 ? s : leaf);
        };
    const bool blocked = tensor.block_tokens && tensor.axes[0].axis != Axis::TOKEN;
    uint64_t start = world.item.token_start;
    if (!tensor.has_tokens()) visit(0, 0, 0, 0);
    while (tensor.has_tokens() && start < world.item.token_stop) {
        uint64_t stop = world.item.token_stop;
        if (blocked) stop = std::min(stop, (start / tensor.block_tokens + 1) * tensor.block_tokens);
        visit(0, 0, start, stop);
        start = stop;
    }
    return out;
}

inline void check_world(World& world, Random& random) {
    Placement placement;
    placement.append(world.group, world.item, world.memory);
    const std::vector<uint8_t*> expected = definition(world);
    const uint64_t size = item_bytes(world.tensor().dtype);
    CHECK_EQ(placement.bytes(), expected.size() * size);
    CHECK_EQ(placement.bytes(), item_raw_bytes(world.tensor(), world.item));
    if (placement.bytes() != expected.size() * size) return;

    const uint64_t bytes = placement.bytes();
    std::vector<uint8_t> gathered(bytes, 0xEE), wanted(bytes, 0);
    for (size_t i = 0; i < expected.size(); ++i)
        if (expected[i]) std::memcpy(&wanted[i * size], expected[i], size);
    const uint64_t cut = pick(random, 0, bytes);
    placement.gather(0, cut, gathered.data());
    placement.gather(cut, bytes - cut, gathered.data() + cut);
    CHECK(gathered == wanted);
    CHECK_EQ(placement.crc32c(cut, bytes - cut), crc32c(0, wanted.data() + cut, bytes - cut));

    for (uint64_t offset = 0; offset < bytes;) {
        iovec iov[3];
        uint64_t covered = 0;
        const uint64_t most = pick(random, 1, bytes - offset);
        const size_t count = placement.iovecs(offset, most, iov, pick(random, 1, 3), &covered);
        CHECK(count > 0 && covered > 0 && covered <= most);
        if (covered == 0) return;
        uint64_t at = offset;
        for (size_t i = 0; i < count; ++i)
            for (size_t b = 0; b < iov[i].iov_len; ++b, ++at) {
                uint8_t* const element = expected[at / size];
                uint8_t* const have = static_cast<uint8_t*>(iov[i].iov_base);
                CHECK(have ? element && have + b == element + at % size : !element);
            }
        CHECK_EQ(at, offset + covered);
        offset += covered;
    }

    const std::vector<std::vector<uint8_t>> before = world.arrays;
    std::vector<uint8_t> fresh(bytes);
    for (uint8_t& byte : fresh) byte = static_cast<uint8_t>(random());
    placement.scatter(0, cut, fresh.data());
    placement.scatter(cut, bytes - cut, fresh.data() + cut);
    std::vector<std::vector<uint8_t>> after = world.arrays;
    for (size_t i = 0; i < expected.size(); ++i) {
        if (!expected[i]) continue;
        for (size_t a = 0; a < after.size(); ++a) {
            const ptrdiff_t at = expected[i] - world.arrays[a].data();
            if (at < 0 || at >= static_cast<ptrdiff_t>(after[a].size())) continue;
            CHECK(std::memcmp(expected[i], &fresh[i * size], size) == 0);
            std::memcpy(&after[a][at], &before[a][at], size);
        }
    }
    CHECK(after == before);
}

}  // namespace kvwire::test
