#include "plan/nest.hpp"

#include <algorithm>

#include "base/error.hpp"

namespace kvwire {
namespace {

using Pieces = std::vector<Piece>;

// One step along an axis: how far each leaf moves in memory, and in the block table.
struct Step {
    std::vector<int64_t> stride;  // by leaf
    uint64_t table = 0;           // leaves without a table ignore it
};

void shift(Piece& piece, const Step& step, int64_t times) {
    for (Piece::Leg& leg : piece.legs) {
        if (!leg.base) continue;
        leg.base += step.stride[leg.leaf] * times;
        if (leg.block_stride != 0) leg.table_start += step.table * static_cast<uint64_t>(times);
    }
}

void check_piece_count(uint64_t count) {
    if (count > Placement::PIECES_MAX)
        throw Error(ErrorCode::RESOURCES_EXHAUSTED,
                    "the layouts of the two sides are too different to plan: use block sizes of "
                    "which one divides the other, or the same order of axes",
                    Placement::PIECES_MAX, count);
}

void append(Pieces& pieces, Pieces&& more) {
    check_piece_count(pieces.size() + more.size());
    for (Piece& piece : more) pieces.push_back(std::move(piece));
}

bool has_table(const Piece& piece) {
    return std::any_of(piece.legs.begin(), piece.legs.end(),
                       [](const Piece::Leg& leg) { return leg.block_stride != 0; });
}

// Nothing of the piece has a place: one run of skipped bytes.
void skip_all(Piece& piece) {
    const uint64_t bytes = piece.inner_bytes() * piece.iteration_count();
    piece = Piece{};
    piece.legs.resize(1);
    piece.legs[0].run_bytes = bytes;
}

class Planner {
public:
    Planner(const TensorDesc& tensor, const Item& item,
            const std::vector<const LeafMemory*>& leaves)
        : tensor_(tensor), item_(item), leaves_(leaves) {
        find_twins();
        find_cuts();
    }

    Pieces plan() {
        const bool blocked = tensor_.has_tokens() && tensor_.block_tokens > 0 &&
                             tensor_.axes[0].axis != Axis::TOKEN;
        Pieces pieces = blocked ? wire_blocks()
                                : wire_range(item_.token_start, item_.token_stop);
        for (Piece& piece : pieces) settle(piece);
        return pieces;
    }

private:
    // Leaves that are parts of one array move alike along every axis outside the fused one; only
    // their legs may merge.
    bool alike(const LeafMemory& a, const LeafMemory& b) const {
        for (const AxisDesc& axis : tensor_.axes) {
            if (axis.axis == Axis::TOKEN || axis.slices.size() > 1) continue;
            const LeafMemory::AxisStride& left = *a.find(axis.axis);
            const LeafMemory::AxisStride& right = *b.find(axis.axis);
            if (left.stride != right.stride || left.start != right.start ||
                left.full != right.full)
                return false;
        }
        return a.token_stride == b.token_stride && a.block_tokens == b.block_tokens &&
               a.block_stride == b.block_stride && a.ring_tokens == b.ring_tokens &&
               a.token_origin == b.token_origin && a.block_ids == b.block_ids;
    }

    void find_twins() {
        for (size_t leaf = 0; leaf < leaves_.size(); ++leaf) {
            twin_.push_back(leaf);
            for (size_t first = 0; first < leaf && twin_[leaf] == leaf; ++first)
                if (alike(*leaves_[first], *leaves_[leaf])) twin_[leaf] = first;
        }
    }

    // A table that others share may have entries that are being written: it is not looked into.
    static bool differ(const BlockTable& a, const BlockTable& b) { return a != b && *a != *b; }

    // Finds where memory is cut along the tokens: every cut_tokens_, counted from cut_origin_.
    // Leaves that are cut differently are planned token by token, without tables.
    void find_cuts() {
        const LeafMemory* cut = nullptr;
        for (const LeafMemory* leaf : leaves_) {
            if (!leaf->has_tokens || (leaf->ring_tokens == 0 && leaf->block_tokens == 0)) continue;
            if (!cut) cut = leaf;
            mixed_ |= leaf->ring_tokens != cut->ring_tokens ||
                      (cut->ring_tokens == 0 && (leaf->block_tokens != cut->block_tokens ||
                                                 leaf->token_origin != cut->token_origin ||
                                                 differ(leaf->block_ids, cut->block_ids)));
        }
        if (!cut) return;
        cut_tokens_ = cut->ring_tokens > 0 ? cut->ring_tokens : cut->block_tokens;
        cut_origin_ = cut->ring_tokens > 0 ? 0 : cut->token_origin;
        if (cut->ring_tokens == 0 && !mixed_) table_ = cut->block_ids;
    }

    bool is_ring(const LeafMemory& leaf) const { return leaf.ring_tokens > 0; }
    bool is_paged(const LeafMemory& leaf) const {
        return leaf.ring_tokens == 0 && leaf.block_tokens > 0;
    }

    // `tokens` tokens onward inside of one cut.
    Step token_step(uint64_t tokens) const {
        Step step;
        for (const LeafMemory* leaf : leaves_)
            step.stride.push_back(leaf->token_stride * static_cast<int64_t>(tokens));
        return step;
    }

    // `cuts` whole cuts onward.
    Step cut_step(uint64_t cuts) const {
        Step step = token_step(cuts * cut_tokens_);
        step.table = cuts;
        for (size_t leaf = 0; leaf < leaves_.size(); ++leaf)
            if (is_ring(*leaves_[leaf]) || is_paged(*leaves_[leaf])) step.stride[leaf] = 0;
        return step;
    }

    // From the memory's first token to `token`.
    void shift_to(Piece& piece, uint64_t token) const {
        for (Piece::Leg& leg : piece.legs) {
            if (!leg.base) continue;
            const LeafMemory& leaf = *leaves_[leg.leaf];
            uint64_t from = token - leaf.token_origin;
            if (is_ring(leaf)) {
                from = token % leaf.ring_tokens;
            } else if (is_paged(leaf)) {
                const uint64_t block = from / leaf.block_tokens;
                from %= leaf.block_tokens;
                if (mixed_)
                    leg.base += (*leaf.block_ids)[block] * leaf.block_stride;
                else
                    leg.table_start += block;
            }
            leg.base += static_cast<int64_t>(from) * leaf.token_stride;
        }
    }

    // The axes from `depth` on, for the leaves [first, last) and the tokens [start, stop).
    Pieces nest(size_t depth, size_t first, size_t last, uint64_t start, uint64_t stop) {
        if (depth == tensor_.axes.size()) return {element(first)};
        const AxisDesc& axis = tensor_.axes[depth];
        if (axis.axis == Axis::TOKEN)
            return along_tokens(nest(depth + 1, first, last, start, stop), start, stop);
        if (axis.slices.size() == 1)
            return along(axis.axis, axis.slices[0], nest(depth + 1, first, last, start, stop));
        Pieces pieces;
        for (size_t leaf = 0; leaf < axis.slices.size(); ++leaf)
            append(pieces, along(axis.axis, axis.slices[leaf],
                                 nest(depth + 1, leaf, leaf + 1, start, stop)));
        return pieces;
    }

    Piece element(size_t leaf) const {
        Piece piece;
        Piece::Leg leg;
        leg.base = leaves_[leaf]->base;
        leg.leaf = static_cast<uint32_t>(leaf);
        leg.run_bytes = item_bytes(tensor_.dtype);
        if (is_paged(*leaves_[leaf]) && !mixed_) leg.block_stride = leaves_[leaf]->block_stride;
        piece.legs.push_back(leg);
        return piece;
    }

    // All but columns are one stretch. Columns older than the memory's oldest are skipped; leaves
    // may keep different numbers of them.
    Pieces along(Axis axis, const Slice& slice, Pieces inner) {
        Step step;
        std::vector<int64_t> from;  // by leaf: first index in memory; negative where skipped
        std::vector<uint64_t> cuts = {0, slice.extent()};
        for (const LeafMemory* leaf : leaves_) {
            const LeafMemory::AxisStride& held = *leaf->find(axis);
            int64_t first = int64_t{slice.start} - held.start;
            if (axis == Axis::COLUMN) first += int64_t{held.full} - slice.full;
            step.stride.push_back(held.stride);
            from.push_back(first);
            if (first < 0) cuts.push_back(std::min<uint64_t>(-first, slice.extent()));
        }
        std::sort(cuts.begin(), cuts.end());
        Pieces pieces;
        for (size_t cut = 0; cut + 1 < cuts.size(); ++cut)
            if (cuts[cut] < cuts[cut + 1])
                append(pieces, stretch(inner, cuts[cut], cuts[cut + 1], from, step));
        return pieces;
    }

    // The indices [start, stop) of an axis. No leaf begins to have a place in between.
    Pieces stretch(Pieces inner, uint64_t start, uint64_t stop, const std::vector<int64_t>& from,
                   const Step& step) {
        for (Piece& piece : inner) {
            bool skipped = true;
            for (Piece::Leg& leg : piece.legs) {
                const int64_t index = from[leg.leaf] + static_cast<int64_t>(start);
                if (index < 0) {
                    leg.base = nullptr;
                    leg.block_stride = 0;
                }
                if (leg.base) leg.base += index * step.stride[leg.leaf];
                skipped &= !leg.base;
            }
            if (skipped) skip_all(piece);
        }
        return repeat(std::move(inner), stop - start, step);
    }

    Pieces along_tokens(const Pieces& inner, uint64_t start, uint64_t stop) {
        Pieces pieces;
        uint64_t token = start;
        while (token < stop) {
            uint64_t count = stop - token, cuts = 0;
            if (mixed_) {
                count = 1;
            } else if (cut_tokens_ > 0) {
                const uint64_t ahead = cut_tokens_ - (token - cut_origin_) % cut_tokens_;
                if (ahead == cut_tokens_) cuts = count / cut_tokens_;
                count = std::min(count, ahead);
            }
            Pieces part = repeat(inner, count, token_step(1));
            if (cuts > 1) part = repeat(std::move(part), cuts, cut_step(1));
            for (Piece& piece : part) shift_to(piece, token);
            append(pieces, std::move(part));
            token += cuts > 1 ? cuts * cut_tokens_ : count;
        }
        return pieces;
    }

    Pieces wire_range(uint64_t start, uint64_t stop) {
        return nest(0, 0, leaves_.size(), start, stop);
    }

    // The wire's own blocks: whole ones in as few patterns as possible, ragged ones by themselves.
    Pieces wire_blocks() {
        const uint64_t size = tensor_.block_tokens;
        Pieces pieces;
        uint64_t token = item_.token_start;
        while (token < item_.token_stop) {
            const uint64_t left = item_.token_stop - token;
            const uint64_t ahead = size - token % size;
            if (ahead < size || left < size) {
                const uint64_t count = std::min(ahead, left);
                append(pieces, wire_range(token, token + count));
                token += count;
            } else {
                token += whole_blocks(pieces, token, left / size);
            }
        }
        return pieces;
    }

    // Appends one pattern of whole wire blocks, at most `count`; returns how many tokens it covers.
    uint64_t whole_blocks(Pieces& pieces, uint64_t token, uint64_t count) {
        const uint64_t size = tensor_.block_tokens;
        Pieces block = wire_range(token, token + size);
        if (mixed_) {
            append(pieces, std::move(block));
            return size;
        }
        uint64_t covered = 1;
        const uint64_t into = cut_tokens_ > 0 ? (token - cut_origin_) % cut_tokens_ : 0;
        if (cut_tokens_ == 0) {
            covered = count;
            block = repeat(std::move(block), count, token_step(size));
        } else if (size % cut_tokens_ == 0) {
            covered = count;
            block = repeat(std::move(block), count, cut_step(size / cut_tokens_));
        } else if (into + size <= cut_tokens_) {
            covered = std::min(count, (cut_tokens_ - into) / size);
            block = repeat(std::move(block), covered, token_step(size));
            const uint64_t per_cut = cut_tokens_ / size;
            if (into == 0 && cut_tokens_ % size == 0 && count / per_cut > 1) {
                covered = count / per_cut * per_cut;
                block = repeat(std::move(block), count / per_cut, cut_step(1));
            }
        }
        append(pieces, std::move(block));
        return covered * size;
    }

    Pieces repeat(Pieces pieces, uint64_t count, const Step& step) {
        if (count == 0) return {};
        if (count == 1) return pieces;
        if (pieces.size() > 1) fuse(pieces);
        if (pieces.size() == 1 && add_level(pieces[0], count, step)) return pieces;
        check_piece_count(std::min<uint64_t>(count, UINT32_MAX) * pieces.size());
        Pieces all;
        for (uint64_t i = 0; i < count; ++i) {
            Pieces copy = pieces;
            for (Piece& piece : copy) shift(piece, step, static_cast<int64_t>(i));
            append(all, std::move(copy));
        }
        return all;
    }

    // Makes a few runs that follow each other the legs of one piece.
    void fuse(Pieces& pieces) const {
        uint64_t legs = 0;
        for (const Piece& piece : pieces) {
            if (piece.iteration_count() > Piece::LEGS_MAX) return;
            legs += piece.iteration_count() * piece.legs.size();
        }
        if (legs > Piece::LEGS_MAX) return;
        Piece fused;
        for (const Piece& piece : pieces)
            for (uint64_t iteration = 0; iteration < piece.iteration_count(); ++iteration)
                add_legs(fused, piece, iteration);
        pieces.assign(1, fused);
    }

    void add_legs(Piece& fused, const Piece& piece, uint64_t iteration) const {
        for (Piece::Leg leg : piece.legs) {
            uint64_t outer = iteration;
            for (int level = piece.level_count - 1; leg.base && level >= 0; --level) {
                const uint64_t index = outer % piece.count[level];
                outer /= piece.count[level];
                leg.base += static_cast<int64_t>(index) * leg.stride[level];
                leg.table_start += index * (leg.block_stride ? piece.table_step[level] : 0);
            }
            if (fused.legs.empty() || !merge(fused.legs.back(), leg)) fused.legs.push_back(leg);
        }
    }

    bool merge(Piece::Leg& leg, const Piece::Leg& next) const {
        const bool both_skipped = !leg.base && !next.base;
        const bool adjacent = leg.base && next.base && leg.base + leg.run_bytes == next.base &&
                              leg.table_start == next.table_start &&
                              twin_[leg.leaf] == twin_[next.leaf];
        if (both_skipped || adjacent) leg.run_bytes += next.run_bytes;
        return both_skipped || adjacent;
    }

    // Adds an outermost level, or widens what is there; false when there is no room for it.
    bool add_level(Piece& piece, uint64_t count, const Step& step) const {
        const uint64_t table = has_table(piece) ? step.table : 0;
        Piece::Leg& leg = piece.legs[0];
        if (piece.level_count == 0 && piece.legs.size() == 1 && table == 0 &&
            (!leg.base || step.stride[leg.leaf] == static_cast<int64_t>(leg.run_bytes))) {
            leg.run_bytes *= count;
            return true;
        }
        if (continues_outermost(piece, step, table)) {
            piece.count[0] *= count;
            return true;
        }
        if (piece.level_count == Piece::LEVELS_MAX) return false;
        for (int level = piece.level_count++; level > 0; --level) {
            piece.count[level] = piece.count[level - 1];
            piece.table_step[level] = piece.table_step[level - 1];
            for (Piece::Leg& each : piece.legs) each.stride[level] = each.stride[level - 1];
        }
        piece.count[0] = count;
        piece.table_step[0] = table;
        for (Piece::Leg& each : piece.legs)
            each.stride[0] = each.base ? step.stride[each.leaf] : 0;
        return true;
    }

    static bool continues_outermost(const Piece& piece, const Step& step, uint64_t table) {
        if (piece.level_count == 0 || table != piece.count[0] * piece.table_step[0]) return false;
        return std::all_of(piece.legs.begin(), piece.legs.end(), [&](const Piece::Leg& leg) {
            const int64_t end = static_cast<int64_t>(piece.count[0]) * leg.stride[0];
            return !leg.base || step.stride[leg.leaf] == end;
        });
    }

    // A piece that stays in one block needs no table.
    void settle(Piece& piece) const {
        piece.bytes = piece.inner_bytes() * piece.iteration_count();
        const bool walks = std::any_of(piece.table_step, piece.table_step + piece.level_count,
                                       [](uint64_t step) { return step != 0; });
        if (walks) {
            piece.block_ids = table_;
            return;
        }
        for (Piece::Leg& leg : piece.legs) {
            if (leg.block_stride == 0) continue;
            leg.base += (*table_)[leg.table_start] * leg.block_stride;
            leg.block_stride = 0;
            leg.table_start = 0;
        }
    }

    const TensorDesc& tensor_;
    const Item& item_;
    const std::vector<const LeafMemory*>& leaves_;
    std::vector<size_t> twin_;  // by leaf: the first leaf that moves alike
    uint64_t cut_tokens_ = 0, cut_origin_ = 0;
    bool mixed_ = false;
    BlockTable table_;
};

}  // namespace

std::vector<Piece> plan_pieces(const TensorDesc& tensor, const Item& item,
                               const std::vector<const LeafMemory*>& leaves) {
    if (item_raw_bytes(tensor, item) == 0) return {};
    return Planner(tensor, item, leaves).plan();
}

}  // namespace kvwire
