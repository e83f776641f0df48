#pragma once
// Planner: pages -> pieces -> iovecs. A Placement says where every byte of a segment lies in this
// side's memory, in a size that does not grow with the number of pages (block ids are shared).

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "plan/geometry.hpp"

namespace kvwire {

// A regular pattern: nested levels (outer to inner), and inside the innermost iteration one run of
// bytes per leg, leg after leg. A leg whose base is null stands for bytes that have no place here
// (a conv column the receiver does not keep): they are skipped.
struct Piece {
    static constexpr int LEVELS_MAX = 5;
    static constexpr size_t LEGS_MAX = 64;
    struct Leg {
        uint8_t* base = nullptr;
        int64_t stride[LEVELS_MAX] = {};
        int64_t block_stride = 0;  // times block_ids[table index]
        uint64_t table_start = 0;
        uint64_t run_bytes = 0;
        uint32_t leaf = 0;         // which leaf of the tensor: the planner's
    };

    int level_count = 0;
    uint64_t count[LEVELS_MAX] = {};
    uint64_t table_step[LEVELS_MAX] = {};  // how far one step of the level moves in the block table
    BlockTable block_ids;                   // null: no table
    std::vector<Leg> legs;
    uint64_t bytes = 0;

    uint64_t inner_bytes() const;     // bytes of one innermost iteration: sum of the legs' runs
    uint64_t iteration_count() const;
};

// One item of a segment announcement: a token range of one tensor of one layer.
struct Item {
    uint16_t group = 0;
    uint16_t tensor = 0;
    uint32_t layer = 0;
    uint64_t token_start = 0;  // both 0 for tensors without a token axis
    uint64_t token_stop = 0;
};

constexpr uint64_t SEGMENT_BYTES_MAX = (uint64_t{1} << 63) - 1;

// Throws Error(SEGMENT_INVALID) for a token range that does not suit the tensor, or too many bytes.
uint64_t item_raw_bytes(const TensorDesc& tensor, const Item& item);

class Placement {
public:
    // Appends the bytes of `item`. Throws Error(SPEC_MISMATCH) when a leaf, dtype or extent does
    // not fit the memory, TOKENS_MISMATCH when the token range or a block id table does not cover
    // it, SEGMENT_INVALID when the item does not fit its own group, RESOURCES_EXHAUSTED when the
    // two layouts have so little in common that the plan would need more than PIECES_MAX pieces.
    static constexpr size_t PIECES_MAX = size_t{1} << 16;
    void append(const GroupDesc& group, const Item& item, const MemoryMap& memory);

    // Appends bytes that have no place here (replicas of what is claimed already).
    void append_skip(uint64_t bytes);

    uint64_t bytes() const { return bytes_; }

    // Mean run length over the whole placement; how a chunk is moved is decided by it.
    uint64_t mean_run_bytes() const;
    bool has_skips() const { return has_skips_; }
    // Shorter runs are copied through a buffer: an iovec each would cost more than the copy.
    bool suits_iovecs() const { return !has_skips_ && mean_run_bytes() >= 512; }

    // Fills at most `iov_max` entries for the bytes from `offset`, never past `offset + bytes`;
    // adjacent runs are merged. Returns the count; `*covered` is how many bytes they cover.
    // Skipped runs come out with iov_base == nullptr.
    size_t iovecs(uint64_t offset, uint64_t bytes, iovec* iov, size_t iov_max,
                  uint64_t* covered) const;

    void gather(uint64_t offset, uint64_t bytes, uint8_t* out) const;      // skipped bytes become 0
    // Also returns the CRC32C of what `out` then holds, taken while it is in the cache.
    uint32_t gather_crc32c(uint64_t offset, uint64_t bytes, uint8_t* out) const;
    void scatter(uint64_t offset, uint64_t bytes, const uint8_t* in) const;
    // Of `crc` and the bytes in place.
    uint32_t crc32c(uint64_t offset, uint64_t bytes, uint32_t crc = 0) const;

    size_t piece_count() const { return pieces_.size(); }
    // In wire order; what a device copies by.
    const std::vector<Piece>& pieces() const { return pieces_; }

private:
    friend void zero_missing_columns(const GroupDesc&, const Item&, const MemoryMap&);

    void take(Piece&& piece);
    template <class Sink>
    void walk(uint64_t offset, uint64_t bytes, Sink& sink) const;

    std::vector<Piece> pieces_;
    std::vector<uint64_t> piece_start_;  // offset of each piece in the segment
    uint64_t bytes_ = 0;
    uint64_t run_count_ = 0;
    bool has_skips_ = false;
};

// Zeroes the conv columns of `memory` that a peer with fewer columns does not carry.
void zero_missing_columns(const GroupDesc& group, const Item& item, const MemoryMap& memory);

// Whether there are any.
bool lacks_columns(const GroupDesc& group, const Item& item, const MemoryMap& memory);

// Describes how the leaves of `tensor` (in `layer`) disagree with `memory`, "" when they fit:
// "group full_attention, layer 3, leaf k: dtype bf16 at the sender, fp16 here".
std::string leaf_mismatch(const GroupDesc& group, const TensorDesc& tensor, uint32_t layer,
                          const MemoryMap& memory);

}  // namespace kvwire
