// Plans of random layouts against their definition, and how small plans of regular ones are.

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "plan/placement.hpp"
#include "tests/plan_world.hpp"
#include "tests/test.hpp"

namespace kvwire {
namespace {

using namespace test;

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
    for (uint64_t seed = 0; seed < 3000 && failures == 0; ++seed) {
        Random random(seed);
        World world = random_world(random);
        check_world(world, random);
        if (failures > 0) fail(__FILE__, __LINE__, "seed " + std::to_string(seed));
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

// V follows K in the first plane only, or holds other planes: one run of both would be wrong.
TEST(plan_merges_only_leaves_that_move_alike) {
    for (const bool other_planes : {false, true}) {
        World world;
        TensorDesc tensor;
        tensor.name = "kv";
        tensor.dtype = DType::BF16;
        tensor.axes = {{Axis::PLANE, {{"", 3, 1, 3}}}, whole(Axis::HEAD, 2),
                       {Axis::DIM, {{"k", 4, 0, 4}, {"v", 4, 0, 4}}}};
        world.group = group_of(tensor);
        world.arrays.emplace_back(1024);
        LeafMemory k, v;
        k.dtype = v.dtype = DType::BF16;
        k.base = world.arrays[0].data();
        v.base = k.base + 8;
        k.axes = {{Axis::PLANE, 3, 0, 3, 64}, {Axis::HEAD, 2, 0, 2, 32}, {Axis::DIM, 4, 0, 4, 2}};
        v.axes = k.axes;
        if (other_planes)
            v.axes[0].start = 1;
        else
            v.axes[0].stride = 128;
        world.memory[{world.group.kind, 0, "k"}] = k;
        world.memory[{world.group.kind, 0, "v"}] = v;
        Random random(1);
        check_world(world, random);
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
