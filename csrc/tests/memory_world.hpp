// A small hybrid cache and the memory that holds it: guarded, paged or not, gone when freed.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "tests/plan_world.hpp"
#include "wire/manifest.hpp"

namespace kvwire::test {

inline Id id_of(uint8_t byte) {
    Id id;
    id.bytes.fill(byte);
    return id;
}

const Id TICKET = id_of('t'), OFFER = id_of('o'), TRANSFER = id_of('x');

inline std::vector<Item> all_items(const Manifest& manifest) {
    std::vector<Item> items;
    for (size_t g = 0; g < manifest.groups.size(); ++g)
        for (uint32_t layer : manifest.groups[g].layers)
            for (size_t t = 0; t < manifest.groups[g].tensors.size(); ++t) {
                Item item{uint16_t(g), uint16_t(t), layer, 0, 0};
                if (manifest.groups[g].tensors[t].has_tokens()) {
                    item.token_start = manifest.token_start;
                    item.token_stop = manifest.token_stop;
                }
                items.push_back(item);
            }
    return items;
}

inline Placement placed(const Manifest& manifest, const std::vector<Item>& items,
                        const MemoryMap& memory) {
    Placement placement;
    for (const Item& item : items) placement.append(manifest.groups[item.group], item, memory);
    return placement;
}

// The bytes of items in wire order: equal contents, equal elements, whatever the two layouts.
inline Bytes content(const Manifest& manifest, const std::vector<Item>& items,
                     const MemoryMap& memory) {
    const Placement placement = placed(manifest, items, memory);
    Bytes bytes(placement.bytes());
    placement.gather(0, bytes.size(), bytes.data());
    return bytes;
}

// Arrays for all that a manifest names, paged or not, every byte of them random.
class Memory {
public:
    Memory(const Manifest& manifest, Random& random, bool paged = false) : manifest_(manifest) {
        for (const GroupDesc& group : manifest.groups)
            for (uint32_t layer : group.layers)
                for (const TensorDesc& tensor : group.tensors)
                    for (size_t leaf = 0; leaf < tensor.leaf_count(); ++leaf)
                        add(group, layer, tensor, leaf, random, paged);
        before_ = arrays_;
    }

    const std::shared_ptr<MemoryMap> map = std::make_shared<MemoryMap>();

    // Whether only bytes that the manifest's items cover have changed since the beginning.
    bool only_own_bytes_changed() const {
        std::vector<Bytes> allowed = before_;
        const Placement placement = placed(manifest_, all_items(manifest_), *map);
        for (uint64_t offset = 0; offset < placement.bytes();) {
            iovec iov[64];
            uint64_t covered = 0;
            const size_t count =
                placement.iovecs(offset, placement.bytes() - offset, iov, 64, &covered);
            for (size_t i = 0; i < count; ++i) allow(allowed, iov[i]);
            offset += covered;
        }
        return allowed == arrays_;
    }

    void free() { arrays_.clear(); }  // whoever still reads or writes is found by the sanitizer

private:
    static constexpr size_t GUARD_BYTES = 64;

    void add(const GroupDesc& group, uint32_t layer, const TensorDesc& tensor, size_t leaf,
             Random& random, bool paged) {
        LeafMemory held;
        held.dtype = tensor.dtype;
        int64_t stride = item_bytes(tensor.dtype);
        for (auto axis = tensor.axes.rbegin(); axis != tensor.axes.rend(); ++axis) {
            if (axis->axis == Axis::TOKEN) continue;
            const Slice& slice = axis->slices[axis->slices.size() > 1 ? leaf : 0];
            held.axes.push_back({axis->axis, slice.full, slice.start, slice.stop, stride});
            stride *= slice.extent();
        }
        size_t bytes = size_t(stride);
        if (tensor.has_tokens()) bytes = add_tokens(held, group, bytes, random, paged);
        arrays_.emplace_back(bytes + 2 * GUARD_BYTES);
        random.fill(arrays_.back());
        crowd(arrays_.back(), item_bytes(tensor.dtype));
        held.base = arrays_.back().data() + GUARD_BYTES;
        (*map)[{group.kind, layer, tensor.leaf_name(leaf)}] = held;
    }

    size_t add_tokens(LeafMemory& held, const GroupDesc& group, size_t row_bytes, Random& random,
                      bool paged) {
        held.has_tokens = true;
        held.token_stride = int64_t(row_bytes);
        held.token_origin = held.token_start = manifest_.token_start;
        held.window_tokens = group.window_tokens;
        if (paged) {
            held.block_tokens = 16;
            held.token_origin -= held.token_origin % held.block_tokens;
        }
        held.token_count = manifest_.token_stop - held.token_origin;
        if (!paged) return row_bytes * held.token_count;
        held.block_stride = int64_t(row_bytes) * held.block_tokens + 32;
        std::vector<int64_t> ids(held.token_count / held.block_tokens * 2 + 2);
        for (size_t i = 0; i < ids.size(); ++i) ids[i] = int64_t(i);
        std::shuffle(ids.begin(), ids.end(), random);
        const size_t bytes = ids.size() * size_t(held.block_stride);
        ids.resize(ids.size() / 2);
        held.block_ids = make_block_table(ids);
        return bytes;
    }

    // Makes exponents alike, as those of caches are: there is something to be coded.
    static void crowd(Bytes& bytes, uint32_t item_bytes) {
        for (size_t at = GUARD_BYTES + item_bytes - 1; at < bytes.size(); at += item_bytes)
            if (item_bytes > 1) bytes[at] = uint8_t((bytes[at] & 0x81) | 0x3E);
    }

    void allow(std::vector<Bytes>& allowed, const iovec& run) const {
        const auto* at = static_cast<const uint8_t*>(run.iov_base);
        for (size_t i = 0; at && i < arrays_.size(); ++i) {
            const Bytes& array = arrays_[i];
            if (at >= array.data() && at < array.data() + array.size())
                std::copy(at, at + run.iov_len, allowed[i].begin() + (at - array.data()));
        }
    }

    const Manifest manifest_;
    std::vector<Bytes> arrays_, before_;
};

inline void copy_content(const Manifest& manifest, const MemoryMap& from, const MemoryMap& to) {
    const std::vector<Item> items = all_items(manifest);
    const Bytes bytes = content(manifest, items, from);
    placed(manifest, items, to).scatter(0, bytes.size(), bytes.data());
}

// A small hybrid cache, or one rank's part: heads and channels are cut, latents copied.
inline Manifest hybrid(uint64_t token_start, uint64_t token_stop, uint16_t rank = 0,
                       uint16_t ranks = 1, uint32_t block_tokens = 0) {
    const auto cut = [&](const std::string& name, uint32_t extent) {
        return Slice{name, extent, extent / ranks * rank, extent / ranks * (rank + 1)};
    };
    const auto kv = [&](const char* name) {
        return TensorDesc{name, DType::BF16, block_tokens, false,
                          {{Axis::TOKEN, {}}, {Axis::HEAD, {cut("", 4)}}, whole(Axis::DIM, 8)}};
    };
    const TensorDesc mla{"mla", DType::FP16, block_tokens, true,
                         {{Axis::TOKEN, {}},
                          {Axis::DIM, {{"latent", 8, 0, 8}, {"rope", 4, 0, 4}}}}};
    const TensorDesc state{"state", DType::FP32, 0, false,
                           {{Axis::HEAD, {cut("", 4)}}, whole(Axis::KEY, 16),
                            whole(Axis::VALUE, 16)}};
    const TensorDesc conv{"conv", DType::BF16, 0, false,
                          {whole(Axis::COLUMN, 3), {Axis::CHANNEL, {cut("q", 64), cut("k", 32)}}}};
    Manifest manifest;
    manifest.ticket_id = TICKET;
    manifest.model = "hybrid";
    manifest.token_start = token_start;
    manifest.token_stop = token_stop;
    manifest.source_rank = rank;
    manifest.source_rank_count = ranks;
    manifest.codecs = 7;
    manifest.groups = {{GroupKind::FULL_ATTENTION, 0, {0, 4}, {kv("k"), kv("v")}},
                       {GroupKind::LATENT, 0, {1}, {mla}},
                       {GroupKind::SLIDING_WINDOW, 40, {2}, {kv("k")}},
                       {GroupKind::RECURRENT, 0, {3, 4}, {state}},
                       {GroupKind::CONVOLUTION, 0, {3}, {conv}}};
    return manifest;
}

}  // namespace kvwire::test
