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

#include "base/bytes.hpp"
#include "checksum/crc32c.hpp"
#include "plan/placement.hpp"
#include "tests/test.hpp"

namespace kvwire::test {

// Choices from a seed, or from a fuzzer's bytes as long as they last.
class Random {
public:
    using result_type = uint64_t;
    explicit Random(uint64_t seed) : engine_(seed) {}
    explicit Random(ByteSpan choices) : is_fuzzed_(true), choices_(choices) {}

    static constexpr uint64_t min() { return 0; }
    static constexpr uint64_t max() { return UINT64_MAX; }
    uint64_t operator()() {  // a byte in every place: who shuffles may look at any of them
        return has_choices() ? take() * 0x0101010101010101 : engine_();
    }

    bool has_choices() const { return choices_.size > 0; }
    uint64_t pick(uint64_t low, uint64_t high) {
        if (!has_choices()) return low + engine_() % (high - low + 1);
        uint64_t value = 0;
        for (uint64_t span = high - low; span > 0 && has_choices(); span >>= 8)
            value = value << 8 | take();
        return low + value % (high - low + 1);
    }

    // Contents are no choices; the fuzzer wants them fast.
    void fill(std::vector<uint8_t>& bytes) {
        if (!is_fuzzed_) {
            for (uint8_t& byte : bytes) byte = uint8_t(engine_());
            return;
        }
        static const std::vector<uint8_t> ready = made(5003);  // no multiple of a chunk
        for (size_t at = 0; at < bytes.size(); at += ready.size())
            std::memcpy(&bytes[at], ready.data(), std::min(ready.size(), bytes.size() - at));
    }

private:
    uint64_t take() {
        --choices_.size;
        return *choices_.data++;
    }

    static std::vector<uint8_t> made(size_t count) {
        std::vector<uint8_t> bytes(count);
        Random(count).fill(bytes);
        return bytes;
    }

    std::mt19937_64 engine_;
    bool is_fuzzed_ = false;
    ByteSpan choices_;
};

inline uint64_t pick(Random& random, uint64_t low, uint64_t high) {  // both included
    return random.pick(low, high);
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
        random.fill(arrays.back());
        held.base = arrays.back().data() + 32 + low;
        memory[{group.kind, item.layer, leaf}] = held;
    }
};

// Slices of `full` on the wire, and a memory slice around each.
inline Slice random_slice(Random& random, const std::string& name) {
    const uint32_t full = pick(random, 1, 6), start = pick(random, 0, full - 1);
    return {name, full, start, static_cast<uint32_t>(pick(random, start + 1, full))};
}

inline LeafMemory::AxisStride around(Random& random, Axis axis, const Slice& wire) {
    LeafMemory::AxisStride held;
    held.axis = axis;
    held.full = wire.full;
    held.start = pick(random, 0, wire.start);
    held.stop = pick(random, wire.stop, wire.full);
    if (axis == Axis::COLUMN) {
        held.full = held.stop = pick(random, 1, 5);
        held.start = 0;
    }
    return held;
}

inline void random_tokens(Random& random, World& world, LeafMemory& held) {
    static const uint32_t sizes[] = {1, 2, 3, 4, 6, 8};
    held.has_tokens = true;
    world.item.token_start = pick(random, 0, 20);
    world.item.token_stop = world.item.token_start + pick(random, 0, 30);
    const uint64_t count = world.item.token_stop - world.item.token_start;
    switch (pick(random, 0, 2)) {
        case 0:
            held.token_origin = pick(random, 0, world.item.token_start);
            held.token_count = world.item.token_stop - held.token_origin + pick(random, 0, 2);
            break;
        case 1: {
            held.block_tokens = sizes[pick(random, 0, 5)];
            held.token_start = world.item.token_start;
            held.token_origin = world.item.token_start / held.block_tokens * held.block_tokens;
            if (pick(random, 0, 3) == 0)  // blocks that do not begin at multiples of their size
                held.token_origin = pick(random, held.token_origin, world.item.token_start);
            held.token_count = world.item.token_stop - held.token_origin;
            std::vector<int64_t> ids;
            for (uint64_t b = 0; b * held.block_tokens < held.token_count; ++b)
                ids.push_back(static_cast<int64_t>(b));
            if (pick(random, 0, 2)) std::shuffle(ids.begin(), ids.end(), random);
            held.block_ids = make_block_table(ids);
            break;
        }
        default:
            held.ring_tokens = std::max<uint32_t>(1, count + pick(random, 0, 4));
            held.token_origin = world.item.token_start;
            held.token_count = count;
    }
}

// Every leaf in an array of its own.
inline World random_world(Random& random) {
    static const DType dtypes[] = {DType::BYTES, DType::BF16, DType::FP32, DType::INT64};
    static const uint32_t sizes[] = {0, 1, 2, 4, 6, 8};
    World world;
    std::vector<Axis> kinds = {Axis::HEAD, Axis::DIM, Axis::COLUMN, Axis::PLANE};
    std::shuffle(kinds.begin(), kinds.end(), random);
    kinds.resize(pick(random, 1, 3));
    const bool has_tokens = pick(random, 0, 3) > 0;
    if (has_tokens) kinds.push_back(Axis::TOKEN);
    std::shuffle(kinds.begin(), kinds.end(), random);
    TensorDesc tensor;
    tensor.name = "t";
    tensor.dtype = dtypes[pick(random, 0, 3)];
    tensor.block_tokens = has_tokens ? sizes[pick(random, 0, 5)] : 0;
    bool fused = pick(random, 0, 1);
    for (Axis axis : kinds) {
        AxisDesc desc{axis, {}};
        if (axis == Axis::COLUMN) {
            desc = whole(axis, pick(random, 1, 5));
        } else if (axis != Axis::TOKEN) {
            for (uint64_t s = fused ? pick(random, 2, 3) : 1; s > 0; --s)
                desc.slices.push_back(random_slice(random, fused ? std::string(1, 'a' + s) : ""));
            fused = false;
        }
        tensor.axes.push_back(desc);
    }
    world.group = group_of(tensor);
    LeafMemory tokens;
    if (has_tokens) random_tokens(random, world, tokens);
    std::vector<Axis> order = kinds;
    if (pick(random, 0, 1)) std::shuffle(order.begin(), order.end(), random);
    for (size_t leaf = 0; leaf < tensor.leaf_count(); ++leaf) {
        LeafMemory held = tokens;
        if (has_tokens && pick(random, 0, 9) == 0) {  // one leaf cut differently from the others
            const Item item = world.item;
            held = LeafMemory{};
            held.has_tokens = true;
            held.token_origin = item.token_start;
            held.token_count = item.token_stop - item.token_start;
            if (pick(random, 0, 1)) held.ring_tokens = held.token_count + 1;
        }
        for (const AxisDesc& axis : tensor.axes)
            if (axis.axis != Axis::TOKEN)
                held.axes.push_back(around(
                    random, axis.axis, axis.slices[axis.slices.size() > 1 ? leaf : 0]));
        world.hold(tensor.leaf_name(leaf), order, held, random);
    }
    return world;
}

inline uint8_t* token_address(const LeafMemory& leaf, uint64_t token) {
    if (leaf.ring_tokens) return leaf.base + int64_t(token % leaf.ring_tokens) * leaf.token_stride;
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
    random.fill(fresh);
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
