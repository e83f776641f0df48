#include "plan/placement.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include "base/error.hpp"
#include "checksum/crc32c.hpp"
#include "plan/match.hpp"
#include "plan/nest.hpp"

namespace kvwire {
namespace {

constexpr uint8_t ZEROS[4096] = {};
constexpr uint64_t GATHER_PART_BYTES = 128 << 10;  // stays in a core's own cache

// The runs of one leg along the innermost level.
struct Row {
    uint8_t* base = nullptr;
    int64_t stride = 0;
    const int64_t* ids = nullptr;  // null where the block stays the same
    uint64_t id_step = 0;
    int64_t block_stride = 0;

    uint8_t* at(uint64_t i) const {
        uint8_t* address = base + static_cast<int64_t>(i) * stride;
        return ids ? address + ids[i * id_step] * block_stride : address;
    }
};

using Rows = std::array<Row, Piece::LEGS_MAX>;

// A position in a piece's iterations.
struct Odometer {
    const Piece& piece;
    uint64_t index[Piece::LEVELS_MAX] = {};

    Odometer(const Piece& piece_, uint64_t iteration) : piece(piece_) {
        for (int level = piece.level_count - 1; level >= 0; --level) {
            index[level] = iteration % piece.count[level];
            iteration /= piece.count[level];
        }
    }

    uint64_t row_left() const {
        const int last = piece.level_count - 1;
        return last < 0 ? 1 : piece.count[last] - index[last];
    }

    void advance(uint64_t iterations) {  // at most row_left()
        int level = piece.level_count - 1;
        if (level < 0) return;
        index[level] += iterations;
        for (; level > 0 && index[level] == piece.count[level]; --level) {
            index[level] = 0;
            ++index[level - 1];
        }
    }

    void rows(Rows& rows) const {
        const int last = piece.level_count - 1;
        uint64_t entry = 0;
        for (int level = 0; level <= last; ++level) entry += index[level] * piece.table_step[level];
        for (size_t l = 0; l < piece.legs.size(); ++l) {
            const Piece::Leg& leg = piece.legs[l];
            Row& row = rows[l] = Row{};
            if (!leg.base) continue;
            row.base = leg.base;
            for (int level = 0; level <= last; ++level)
                row.base += static_cast<int64_t>(index[level]) * leg.stride[level];
            if (last >= 0) row.stride = leg.stride[last];
            if (leg.block_stride == 0) continue;
            const int64_t* ids = piece.block_ids->data() + leg.table_start + entry;
            if (piece.table_step[last] > 0) {
                row.ids = ids;
                row.id_step = piece.table_step[last];
                row.block_stride = leg.block_stride;
            } else {
                row.base += *ids * leg.block_stride;
            }
        }
    }
};

// Hands over the bytes [within, within + bytes) of one iteration.
template <class Sink>
bool clipped(const Piece& piece, const Rows& rows, uint64_t within, uint64_t bytes, Sink& sink) {
    for (size_t l = 0; l < piece.legs.size() && bytes > 0; ++l) {
        const uint64_t run_bytes = piece.legs[l].run_bytes;
        if (within >= run_bytes) {
            within -= run_bytes;
            continue;
        }
        const uint64_t part = std::min(bytes, run_bytes - within);
        uint8_t* address = rows[l].base ? rows[l].at(0) + within : nullptr;
        if (!sink.run(address, part)) return false;
        bytes -= part;
        within = 0;
    }
    return true;
}

template <class Sink>
bool walk_piece(const Piece& piece, uint64_t offset, uint64_t bytes, Sink& sink) {
    const uint64_t inner = piece.inner_bytes();
    Odometer odometer(piece, offset / inner);
    Rows rows;
    uint64_t within = offset % inner;
    while (bytes > 0) {
        odometer.rows(rows);
        if (within > 0 || bytes < inner) {
            const uint64_t part = std::min(bytes, inner - within);
            if (!clipped(piece, rows, within, part, sink)) return false;
            bytes -= part;
            within = 0;
            odometer.advance(1);
        } else {
            const uint64_t count = std::min(bytes / inner, odometer.row_left());
            if (!sink.row(piece, rows, count)) return false;
            bytes -= count * inner;
            odometer.advance(count);
        }
    }
    return true;
}

// For sinks that take one run after another.
template <class Self>
struct RunSink {
    bool row(const Piece& piece, const Rows& rows, uint64_t count) {
        Self& self = static_cast<Self&>(*this);
        const size_t legs = piece.legs.size();
        for (uint64_t i = 0; i < count; ++i)
            for (size_t l = 0; l < legs; ++l)
                if (!self.run(rows[l].base ? rows[l].at(i) : nullptr, piece.legs[l].run_bytes))
                    return false;
        return true;
    }
};

struct IovecSink : RunSink<IovecSink> {
    iovec* iov;
    size_t max, count = 0;
    uint64_t covered = 0;

    IovecSink(iovec* iov_, size_t max_) : iov(iov_), max(max_) {}

    bool run(uint8_t* address, uint64_t bytes) {
        if (count > 0) {
            iovec& last = iov[count - 1];
            uint8_t* const last_base = static_cast<uint8_t*>(last.iov_base);
            if (address ? last_base && last_base + last.iov_len == address : !last_base) {
                last.iov_len += bytes;
                covered += bytes;
                return true;
            }
        }
        if (count == max) return false;
        iov[count++] = {address, bytes};
        covered += bytes;
        return true;
    }
};

struct CrcSink : RunSink<CrcSink> {
    static constexpr uint64_t AHEAD_BYTES = 512, LINE_BYTES = 64;
    uint32_t crc = 0;

    // Scattered pages defeat the hardware's prefetching at each page boundary: ask for the next run
    // while this one is summed.
    bool row(const Piece& piece, const Rows& rows, uint64_t count) {
        if (piece.legs.size() != 1 || !rows[0].base) return RunSink::row(piece, rows, count);
        const uint64_t run_bytes = piece.legs[0].run_bytes;
        const uint64_t ahead = std::min(run_bytes, AHEAD_BYTES);
        for (uint64_t i = 0; i < count; ++i) {
            if (i + 1 < count)
                for (uint64_t at = 0; at < ahead; at += LINE_BYTES)
                    __builtin_prefetch(rows[0].at(i + 1) + at);
            run(rows[0].at(i), run_bytes);
        }
        return true;
    }

    bool run(const uint8_t* address, uint64_t bytes) {
        if (address) {
            crc = kvwire::crc32c(crc, address, bytes);
            return true;
        }
        while (bytes > 0) {
            const uint64_t part = std::min<uint64_t>(bytes, sizeof ZEROS);
            crc = kvwire::crc32c(crc, ZEROS, part);
            bytes -= part;
        }
        return true;
    }
};

template <size_t SIZE>
void copy_fixed(uint8_t* to, int64_t to_stride, const uint8_t* from, int64_t from_stride,
                uint64_t count) {
    for (uint64_t i = 0; i < count; ++i, to += to_stride, from += from_stride)
        std::memcpy(to, from, SIZE);
}

void copy_strided(uint8_t* to, int64_t to_stride, const uint8_t* from, int64_t from_stride,
                  uint64_t run_bytes, uint64_t count) {
    switch (run_bytes) {
        case 1: return copy_fixed<1>(to, to_stride, from, from_stride, count);
        case 2: return copy_fixed<2>(to, to_stride, from, from_stride, count);
        case 4: return copy_fixed<4>(to, to_stride, from, from_stride, count);
        case 8: return copy_fixed<8>(to, to_stride, from, from_stride, count);
        case 16: return copy_fixed<16>(to, to_stride, from, from_stride, count);
        default:
            for (uint64_t i = 0; i < count; ++i, to += to_stride, from += from_stride)
                std::memcpy(to, from, run_bytes);
    }
}

// Copies between the places and a contiguous buffer, row by row: order does not matter here.
template <bool GATHER>
struct CopySink {
    uint8_t* buffer;  // only read from when scattering

    bool run(uint8_t* address, uint64_t bytes) {
        if (!GATHER && address) std::memcpy(address, buffer, bytes);
        if (GATHER && address) std::memcpy(buffer, address, bytes);
        if (GATHER && !address) std::memset(buffer, 0, bytes);
        buffer += bytes;
        return true;
    }

    bool row(const Piece& piece, const Rows& rows, uint64_t count) {
        const uint64_t inner = piece.inner_bytes();
        uint8_t* leg_buffer = buffer;
        for (size_t l = 0; l < piece.legs.size(); ++l) {
            leg_row(rows[l], leg_buffer, inner, piece.legs[l].run_bytes, count);
            leg_buffer += piece.legs[l].run_bytes;
        }
        buffer += inner * count;
        return true;
    }

private:
    static void leg_row(const Row& row, uint8_t* buffer, uint64_t inner, uint64_t run_bytes,
                        uint64_t count) {
        const int64_t step = static_cast<int64_t>(inner);
        if (row.base && !row.ids) {
            if (GATHER)
                copy_strided(buffer, step, row.base, row.stride, run_bytes, count);
            else
                copy_strided(row.base, row.stride, buffer, step, run_bytes, count);
            return;
        }
        CopySink one{buffer};
        for (uint64_t i = 0; i < count; ++i) {
            one.buffer = buffer + i * inner;
            one.run(row.base ? row.at(i) : nullptr, run_bytes);
        }
    }
};

}  // namespace

uint64_t Piece::inner_bytes() const {
    uint64_t sum = 0;
    for (const Leg& leg : legs) sum += leg.run_bytes;
    return sum;
}

uint64_t Piece::iteration_count() const {
    uint64_t product = 1;
    for (int level = 0; level < level_count; ++level) product *= count[level];
    return product;
}

void Placement::append(const GroupDesc& group, const Item& item, const MemoryMap& memory) {
    const std::vector<const LeafMemory*> leaves = match_leaves(group, item, memory);
    std::vector<Piece> more = plan_pieces(group.tensors[item.tensor], item, leaves);
    if (bytes_ + item_raw_bytes(group.tensors[item.tensor], item) > SEGMENT_BYTES_MAX)
        throw Error(ErrorCode::SEGMENT_INVALID, "2^63 bytes or more in one segment",
                    SEGMENT_BYTES_MAX);
    if (pieces_.size() + more.size() > PIECES_MAX)
        throw Error(ErrorCode::RESOURCES_EXHAUSTED, "too many pieces in one segment", PIECES_MAX,
                    pieces_.size() + more.size());
    for (Piece& piece : more) take(std::move(piece));
}

void Placement::take(Piece&& piece) {
    run_count_ += piece.iteration_count() * piece.legs.size();
    for (const Piece::Leg& leg : piece.legs) has_skips_ |= !leg.base;
    piece_start_.push_back(bytes_);
    bytes_ += piece.bytes;
    pieces_.push_back(std::move(piece));
}

void Placement::append_skip(uint64_t bytes) {
    if (bytes == 0) return;
    Piece piece;
    piece.legs.emplace_back();
    piece.legs.back().run_bytes = bytes;
    piece.bytes = bytes;
    take(std::move(piece));
}

uint64_t Placement::mean_run_bytes() const { return run_count_ > 0 ? bytes_ / run_count_ : 0; }

template <class Sink>
void Placement::walk(uint64_t offset, uint64_t bytes, Sink& sink) const {
    if (offset > bytes_ || bytes > bytes_ - offset)
        throw Error(ErrorCode::INTERNAL, "placement asked for bytes past its end", bytes_,
                    offset + bytes, offset);
    if (bytes == 0) return;
    const auto after = std::upper_bound(piece_start_.begin(), piece_start_.end(), offset);
    for (size_t p = after - piece_start_.begin() - 1; bytes > 0; ++p) {
        const uint64_t from = offset - piece_start_[p];
        const uint64_t part = std::min(bytes, pieces_[p].bytes - from);
        if (!walk_piece(pieces_[p], from, part, sink)) return;
        offset += part;
        bytes -= part;
    }
}

size_t Placement::iovecs(uint64_t offset, uint64_t bytes, iovec* iov, size_t iov_max,
                         uint64_t* covered) const {
    IovecSink sink(iov, iov_max);
    walk(offset, bytes, sink);
    *covered = sink.covered;
    return sink.count;
}

void Placement::gather(uint64_t offset, uint64_t bytes, uint8_t* out) const {
    CopySink<true> sink{out};
    walk(offset, bytes, sink);
}

uint32_t Placement::gather_crc32c(uint64_t offset, uint64_t bytes, uint8_t* out) const {
    uint32_t crc = 0;
    while (bytes > 0) {
        const uint64_t part = std::min<uint64_t>(bytes, GATHER_PART_BYTES);
        gather(offset, part, out);
        crc = kvwire::crc32c(crc, out, part);
        offset += part;
        out += part;
        bytes -= part;
    }
    return crc;
}

void Placement::scatter(uint64_t offset, uint64_t bytes, const uint8_t* in) const {
    CopySink<false> sink{const_cast<uint8_t*>(in)};
    walk(offset, bytes, sink);
}

uint32_t Placement::crc32c(uint64_t offset, uint64_t bytes, uint32_t crc) const {
    CrcSink sink;
    sink.crc = crc;
    if (mean_run_bytes() >= 256) {
        walk(offset, bytes, sink);
        return sink.crc;
    }
    uint8_t buffer[16384];  // checksumming tiny runs one by one costs more than copying them
    while (bytes > 0) {
        const uint64_t part = std::min<uint64_t>(bytes, sizeof buffer);
        gather(offset, part, buffer);
        sink.run(buffer, part);
        offset += part;
        bytes -= part;
    }
    return sink.crc;
}

bool lacks_columns(const GroupDesc& group, const Item& item, const MemoryMap& memory) {
    const TensorDesc& tensor = group.tensors[item.tensor];
    for (const LeafMemory* leaf : match_leaves(group, item, memory))
        for (const AxisDesc& axis : tensor.axes)
            if (axis.axis == Axis::COLUMN &&
                leaf->find(Axis::COLUMN)->full > axis.slices[0].full)
                return true;
    return false;
}

void zero_missing_columns(const GroupDesc& group, const Item& item, const MemoryMap& memory) {
    const std::vector<const LeafMemory*> leaves = match_leaves(group, item, memory);
    const TensorDesc& tensor = group.tensors[item.tensor];
    for (size_t leaf = 0; leaf < leaves.size(); ++leaf) {
        TensorDesc missing = tensor;  // this leaf alone, in the columns that the wire lacks
        missing.name = tensor.leaf_name(leaf);
        bool any = false;
        for (AxisDesc& axis : missing.axes) {
            if (axis.slices.size() > 1) axis.slices = {axis.slices[leaf]};
            if (axis.axis != Axis::COLUMN) continue;
            Slice& columns = axis.slices[0];
            const uint32_t held = leaves[leaf]->find(Axis::COLUMN)->full;
            any = held > columns.full;
            if (any) columns = {"", held, 0, held - columns.full};
        }
        if (!any) continue;
        Placement zeros;
        for (Piece& piece : plan_pieces(missing, item, {leaves[leaf]}))
            zeros.take(std::move(piece));
        for (uint64_t offset = 0; offset < zeros.bytes(); offset += sizeof ZEROS)
            zeros.scatter(offset, std::min<uint64_t>(zeros.bytes() - offset, sizeof ZEROS), ZEROS);
    }
}

}  // namespace kvwire
