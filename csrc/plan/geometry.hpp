#pragma once
// What a tensor looks like: on the wire (TensorDesc, carried by the manifest) and in the memory of
// one side (LeafMemory). FORMAT.md section 7 gives the numbers; layout.py holds the same model.

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

namespace kvwire {

enum class Axis : uint8_t {
    TOKEN = 1, HEAD = 2, DIM = 3, CHANNEL = 4, COLUMN = 5,
    KEY = 6, VALUE = 7, ROW = 8, PLANE = 9, ITEM = 10,
};

enum class DType : uint8_t {
    FP32 = 1, FP16 = 2, BF16 = 3, E4M3 = 4, E5M2 = 5, INT8 = 6, BYTES = 7, INT32 = 8, INT64 = 9,
};

enum class GroupKind : uint8_t {
    FULL_ATTENTION = 1, LATENT = 2, SLIDING_WINDOW = 3, RECURRENT = 4,
    CONVOLUTION = 5, AUXILIARY = 6, REQUEST = 7,
};

constexpr uint32_t REQUEST_LAYER = 0xFFFFFFFFu;

uint32_t item_bytes(DType dtype);  // 0 for a number that is no dtype
const char* axis_name(Axis axis);  // "token", "head", ...; nullptr when unknown
const char* dtype_name(DType dtype);
const char* group_kind_name(GroupKind kind);

// The part [start, stop) of `full` that is held; unnamed unless it is a sub-block of a fused axis.
struct Slice {
    std::string name;
    uint32_t full = 0, start = 0, stop = 0;
    uint32_t extent() const { return stop - start; }
};

struct AxisDesc {
    Axis axis{};
    std::vector<Slice> slices;  // none on the TOKEN axis; more than one on at most one axis
};

// Axes outer to inner, as the bytes lie on the wire. block_tokens > 0: the bytes of each run of
// block_tokens tokens (aligned to absolute positions) lie together, which matters only when another
// axis is outside the token axis (HND pages).
struct TensorDesc {
    std::string name;
    DType dtype{};
    uint32_t block_tokens = 0;
    bool replicated = false;
    std::vector<AxisDesc> axes;

    bool has_tokens() const;
    const AxisDesc* fused_axis() const;           // the axis with several slices, or nullptr
    size_t leaf_count() const;
    std::string leaf_name(size_t leaf) const;     // slice name, or the tensor's own
    uint64_t row_bytes() const;                   // bytes of one token; of all when !has_tokens()
};

struct GroupDesc {
    GroupKind kind{};
    uint32_t window_tokens = 0;
    std::vector<uint32_t> layers;
    std::vector<TensorDesc> tensors;
};

using BlockTable = std::shared_ptr<const std::vector<int64_t>>;

// One leaf as it lies in this side's memory.
// address(token, i...) = base + token part + sum over axes of (i - start) * stride, where the token
// part is, with t = token - token_origin:
//   ring_tokens > 0:   (token % ring_tokens) * token_stride          (absolute position)
//   block_tokens == 0: t * token_stride
//   otherwise:         block_ids[t / block_tokens] * block_stride
//                      + (t % block_tokens) * token_stride
struct LeafMemory {
    struct AxisStride {
        Axis axis{};
        uint32_t full = 0, start = 0, stop = 0;
        int64_t stride = 0;  // bytes
    };

    uint8_t* base = nullptr;
    DType dtype{};
    std::vector<AxisStride> axes;  // every axis but TOKEN
    bool has_tokens = false;
    uint64_t token_origin = 0;     // absolute position of the first token of base, or block_ids[0]
    uint64_t token_count = 0;      // how many this memory covers from there
    uint64_t token_start = 0;      // first one that may be touched: a block can begin before it
    int64_t token_stride = 0;
    uint32_t block_tokens = 0;
    int64_t block_stride = 0;
    BlockTable block_ids;
    uint32_t ring_tokens = 0;
    uint32_t window_tokens = 0;    // only so many of the newest are needed; 0: all

    uint64_t token_first() const { return token_start > token_origin ? token_start : token_origin; }
    uint64_t token_end() const { return token_origin + token_count; }
    const AxisStride* find(Axis axis) const;
};

// One table serves all leaves of a group. Throws Error(USAGE) naming a negative id and its index;
// only the owner of the array knows the upper bound. A caller that keeps the result as it is may
// still write entries that nothing has been planned with.
std::shared_ptr<std::vector<int64_t>> make_block_table(std::vector<int64_t> block_ids);

void check_block_ids(const std::vector<int64_t>& block_ids);

struct LeafKey {
    GroupKind kind{};
    uint32_t layer = 0;
    std::string leaf;
    bool operator<(const LeafKey& other) const {
        return std::tie(kind, layer, leaf) < std::tie(other.kind, other.layer, other.leaf);
    }
};

// All leaves that one side holds for one request. Borrows the memory; the binding keeps it alive.
using MemoryMap = std::map<LeafKey, LeafMemory>;

}  // namespace kvwire
