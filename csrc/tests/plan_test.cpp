// Plans of random layouts against the definition: one address per element, worked out by itself.

#include <algorithm>
#include <cstring>
#include <functional>
#include <random>

#include "base/error.hpp"
#include "checksum/crc32c.hpp"
#include "plan/placement.hpp"
#include "tests/test.hpp"

namespace kvwire {
namespace {

using Random = std::mt19937_64;

uint64_t pick(Random& random, uint64_t low, uint64_t high) {  // both included
    return low + random() % (high - low + 1);
}

GroupDesc group_of(TensorDesc tensor, GroupKind kind = GroupKind::FULL_ATTENTION) {
    GroupDesc group;
    group.kind = kind;
    group.layers = {0};
    group.tensors = {std::move(tensor)};
    return group;
}

AxisDesc whole(Axis axis, uint32_t extent) { return {axis, {{"", extent, 0, extent}}}; }

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

uint8_t* token_address(const LeafMemory& leaf, uint64_t token) {
    if (leaf.ring_tokens) return leaf.base + (token % leaf.ring_tokens) * leaf.token_stride;
    const uint64_t t = token - leaf.token_origin;
    if (!leaf.block_tokens) return leaf.base + static_cast<int64_t>(t) * leaf.token_stride;
    return leaf.base + (*leaf.block_ids)[t / leaf.block_tokens] * leaf.block_stride +
           static_cast<int64_t>(t % leaf.block_tokens) * leaf.token_stride;
}

// The definition: the address of every element in wire order, nullptr where skipped.
std::vector<uint8_t*> definition(const World& world) {
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

void check_world(World& world, Random& random) {
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

// Slices of `full` on the wire, and a memory slice around each.
Slice random_slice(Random& random, const std::string& name) {
    const uint32_t full = pick(random, 1, 6), start = pick(random, 0, full - 1);
    return {name, full, start, static_cast<uint32_t>(pick(random, start + 1, full))};
}

LeafMemory::AxisStride around(Random& random, Axis axis, const Slice& wire) {
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

void random_tokens(Random& random, World& world, LeafMemory& held) {
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

// `fused` < 0: no axis is. Leaves lie in arrays of their own, or in one.
World random_world(Random& random) {
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

// [block, token, head, dim] or [block, head, token, dim] in one array, K and V side by side.
World paged_world(uint32_t blocks, bool fused, bool hnd, int64_t id_step) {
    World world;
    TensorDesc tensor;
    tensor.name = "kv";
    tensor.dtype = DType::BF16;
    tensor.block_tokens = 16;
    AxisDesc dim{Axis::DIM, {{"k", 8, 0, 8}, {"v", 8, 0, 8}}};
    tensor.axes = {{Axis::TOKEN, {}}, whole(Axis::HEAD, 2), dim};
    if (hnd) std::swap(tensor.axes[0], tensor.axes[1]);
    world.group = group_of(tensor);
    world.item.token_stop = 16 * uint64_t{blocks};
    std::vector<int64_t> ids;
    for (uint32_t b = 0; b < blocks; ++b) ids.push_back(b * id_step);
    const int64_t block_bytes = 16 * 2 * 16 * 2, content = fused ? 32 : 16;
    world.arrays.emplace_back(block_bytes * (blocks * id_step + 1));
    for (size_t leaf = 0; leaf < 2; ++leaf) {
        LeafMemory held;
        held.dtype = DType::BF16;
        held.base = world.arrays[0].data() + leaf * (fused ? 16 : block_bytes / 2);
        held.has_tokens = true;
        held.token_count = world.item.token_stop;
        held.token_stride = hnd ? content : 2 * content;
        held.block_tokens = 16;
        held.block_stride = block_bytes;
        held.axes = {{Axis::HEAD, 2, 0, 2, hnd ? 16 * content : content}, {Axis::DIM, 8, 0, 8, 2}};
        held.block_ids = leaf ? world.memory.begin()->second.block_ids : make_block_table(ids);
        world.memory[{world.group.kind, 0, leaf ? "v" : "k"}] = held;
    }
    return world;
}

ErrorCode code_of(const World& world) {
    try {
        Placement placement;
        placement.append(world.group, world.item, world.memory);
        return ErrorCode::OK;
    } catch (const Error& error) {
        return error.code;
    }
}

}  // namespace

TEST(plan_equals_the_definition) {
    for (uint64_t seed = 0; seed < 3000 && test::failures == 0; ++seed) {
        Random random(seed);
        World world = random_world(random);
        check_world(world, random);
        if (test::failures > 0) test::fail(__FILE__, __LINE__, "seed " + std::to_string(seed));
    }
}

TEST(plan_makes_whole_pages_of_equal_layouts) {
    for (const bool hnd : {false, true}) {
        World world = paged_world(100, true, hnd, 2);
        Placement placement;
        placement.append(world.group, world.item, world.memory);
        CHECK_EQ(placement.piece_count(), 1u);
        CHECK_EQ(placement.mean_run_bytes(), 1024u);

        World adjacent = paged_world(100, true, hnd, 1);
        Placement merged;
        merged.append(adjacent.group, adjacent.item, adjacent.memory);
        iovec iov[4];
        uint64_t covered = 0;
        CHECK_EQ(merged.iovecs(10, merged.bytes() - 10, iov, 4, &covered), 1u);
        CHECK_EQ(covered, merged.bytes() - 10);
    }
}

TEST(plan_size_does_not_grow_with_pages) {
    for (const bool hnd : {false, true})
        for (const uint32_t wire_block : {0u, 4u, 16u, 32u, 64u}) {
            size_t count[2];
            for (const uint32_t more : {0u, 1u}) {
                World world = paged_world(more ? 400 : 100, false, hnd, 3);
                world.group.tensors[0].block_tokens = wire_block;
                world.item.token_start = world.item.token_stop % 64 + 3;
                world.item.token_stop -= 5;
                Placement placement;
                placement.append(world.group, world.item, world.memory);
                count[more] = placement.piece_count();
            }
            CHECK_EQ(count[0], count[1]);
            CHECK(count[0] <= 20);
        }
}

// transformers keeps [channel, K columns], vLLM [K - 1 columns, channel].
TEST(plan_turns_convolution_states_in_one_piece) {
    World world;
    TensorDesc tensor;
    tensor.name = "conv";
    tensor.dtype = DType::BF16;
    tensor.axes = {whole(Axis::CHANNEL, 512), whole(Axis::COLUMN, 4)};
    world.group = group_of(tensor, GroupKind::CONVOLUTION);
    LeafMemory held;
    held.axes = {{Axis::CHANNEL, 512, 0, 512, 0}, {Axis::COLUMN, 3, 0, 3, 0}};
    Random random(1);
    world.hold("conv", {Axis::COLUMN, Axis::CHANNEL}, held, random);
    Placement placement;
    placement.append(world.group, world.item, world.memory);
    CHECK_EQ(placement.piece_count(), 1u);
    CHECK(placement.has_skips());
    check_world(world, random);
}

TEST(plan_refuses_by_name) {
    const World good = paged_world(4, true, false, 1);
    CHECK_EQ(code_of(good), ErrorCode::OK);

    World world = good;
    world.item.token_stop += 1;
    CHECK_EQ(code_of(world), ErrorCode::TOKENS_MISMATCH);
    world = good;
    for (auto& [key, leaf] : world.memory) leaf.token_start = 1;
    CHECK_EQ(code_of(world), ErrorCode::TOKENS_MISMATCH);
    world = good;
    for (auto& [key, leaf] : world.memory) leaf.block_ids = make_block_table({0, 1, 2});
    CHECK_EQ(code_of(world), ErrorCode::TOKENS_MISMATCH);
    world = good;
    world.item.token_start = 60;
    world.item.token_stop = 59;
    CHECK_EQ(code_of(world), ErrorCode::SEGMENT_INVALID);
    world = good;
    world.item.tensor = 1;
    CHECK_EQ(code_of(world), ErrorCode::SEGMENT_INVALID);
    world = good;
    world.group.tensors[0].dtype = DType::FP16;
    CHECK_EQ(code_of(world), ErrorCode::SPEC_MISMATCH);
    CHECK_EQ(leaf_mismatch(world.group, world.tensor(), 0, world.memory),
             std::string("group full_attention, layer 0, leaf k: dtype fp16 at the sender, "
                         "bf16 here"));
    world = good;
    world.item.layer = 7;
    CHECK_EQ(code_of(world), ErrorCode::SPEC_MISMATCH);
    world = good;
    world.group.tensors[0].axes[1].slices[0] = {"", 4, 0, 2};
    CHECK_EQ(code_of(world), ErrorCode::SPEC_MISMATCH);
    world = good;
    world.group.tensors[0].axes.push_back(world.tensor().axes[1]);  // head twice
    CHECK_EQ(code_of(world), ErrorCode::SPEC_MISMATCH);
    world = good;
    world.group.tensors[0].axes[2].slices[1].start = 9;
    CHECK_EQ(code_of(world), ErrorCode::SPEC_MISMATCH);
}

TEST(plan_bounds_its_own_size) {
    World world = paged_world(1 << 16, false, true, 0);
    world.group.tensors[0].block_tokens = 7;
    CHECK_EQ(code_of(world), ErrorCode::RESOURCES_EXHAUSTED);
}

TEST(plan_zeroes_the_columns_that_do_not_travel) {
    for (uint64_t seed = 0; seed < 50; ++seed) {
        Random random(seed);
        World world;
        TensorDesc tensor;
        tensor.name = "conv";
        tensor.dtype = DType::BF16;
        tensor.axes = {{Axis::CHANNEL, {{"q", 4, 1, 3}, {"v", 5, 0, 5}}}, whole(Axis::COLUMN, 3)};
        if (seed % 2) std::swap(tensor.axes[0], tensor.axes[1]);
        world.group = group_of(tensor, GroupKind::CONVOLUTION);
        const uint32_t columns = pick(random, 2, 5);
        for (size_t leaf = 0; leaf < 2; ++leaf) {
            LeafMemory held;
            const Slice& wire = tensor.fused_axis()->slices[leaf];
            held.axes = {{Axis::CHANNEL, wire.full, 0, wire.full, 0},
                         {Axis::COLUMN, columns, 0, columns, 0}};
            world.hold(tensor.leaf_name(leaf), {Axis::COLUMN, Axis::CHANNEL}, held, random);
        }
        std::vector<std::vector<uint8_t>> expected = world.arrays;
        for (size_t leaf = 0; leaf < 2; ++leaf) {
            const LeafMemory& held = world.memory.at({world.group.kind, 0, tensor.leaf_name(leaf)});
            const Slice& wire = tensor.fused_axis()->slices[leaf];
            for (int64_t channel = wire.start; channel < wire.stop; ++channel)
                for (int64_t column = 0; column + 3 < columns; ++column) {
                    uint8_t* const at = held.base + channel * held.axes[0].stride +
                                        column * held.axes[1].stride;
                    std::memset(&expected[leaf][at - world.arrays[leaf].data()], 0, 2);
                }
        }
        zero_missing_columns(world.group, world.item, world.memory);
        CHECK(world.arrays == expected);
    }
}

TEST(block_tables_refuse_negative_ids) {
    try {
        make_block_table({3, 0, -1});
        CHECK(false);
    } catch (const Error& error) {
        CHECK_EQ(error.code, ErrorCode::USAGE);
        CHECK(error.message.find("block_ids[2] is -1") != std::string::npos);
    }
}

}  // namespace kvwire
