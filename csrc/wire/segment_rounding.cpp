#include "wire/segment_rounding.hpp"

#include <algorithm>

namespace kvwire {
namespace {

constexpr uint64_t GROUP = 64;
constexpr uint64_t SAMPLE_CHUNKS_MIN = 16;  // so that each of so many heads is met
constexpr uint8_t BYTES_DTYPE = uint8_t(DType::BYTES);

Lattice lattice(std::array<uint64_t, Lattice::AXES> extents, uint8_t row_axes,
                uint8_t column_axes = 0) {
    Lattice made;
    for (size_t axis = 0; axis < Lattice::AXES; ++axis)
        made.extents[axis] = uint32_t(extents[axis]);
    made.row_axes = row_axes;
    made.column_axes = column_axes;
    return made;
}

constexpr uint8_t axes(bool a, bool b, bool c, bool d) {
    return uint8_t(a | b << 1 | c << 2 | d << 3);
}

}  // namespace

void SegmentRounding::append(const std::string& model, const GroupDesc& group, const Item& item) {
    const TensorDesc& desc = group.tensors[item.tensor];
    const auto found = std::find_if(roundings_.begin(), roundings_.end(), [&](const Rounding& r) {
        return r.group == item.group && r.tensor == item.tensor;
    });
    Run run;
    if (found != roundings_.end()) {
        run.rung = found->rung;
        run.by_channel = found->by_channel;
        rounds_anything_ = true;
    }
    run.dtype = uint8_t(desc.dtype);
    run.width = item_bytes(desc.dtype);
    run.has_tokens = desc.has_tokens();
    run.first_token = item.token_start;
    const auto narrow = exact_ ? rounded_dtype(run.rung) : std::nullopt;
    if (narrow) {
        GroupDesc as_rounded = group;
        as_rounded.tensors[item.tensor].dtype = DType(*narrow);
        rounded_.append(model, as_rounded, item);
        run.rounded_width = item_bytes(DType(*narrow));
    }
    const StreamPattern pattern = stream_pattern(group.kind, desc);
    run.extents = pattern.extents;
    for (int axis = 0; axis < StreamPattern::AXES; ++axis) {
        if (axis == pattern.token_axis) continue;
        (axis < pattern.token_axis ? run.outer : run.inner) *= pattern.extents[size_t(axis)];
    }
    for (const Stretch& stretch : stretches(desc, item)) {
        run.offset = bytes_;
        run.bytes = stretch.bytes;
        run.rounded_offset = rounded_bytes_;
        const uint64_t all_tokens = run.has_tokens ? stretch.bytes / desc.row_bytes() : 1;
        run.tokens = pattern.token_axis >= 0 ? stretch.tokens : all_tokens;
        runs_.push_back(run);
        bytes_ += stretch.bytes;
        rounded_bytes_ += stretch.bytes / run.width * run.rounded_width;
        run.first_token += all_tokens;
    }
}

void SegmentRounding::parts(const Placement& placement, uint64_t offset, uint64_t bytes,
                            SendTables* tables, std::vector<QuantisedPart>* parts,
                            std::vector<CodeEntry*>* entries) const {
    parts->clear();
    entries->clear();
    const uint64_t stop = offset + bytes;
    auto run = std::upper_bound(runs_.begin(), runs_.end(), offset,
                                [](uint64_t at, const Run& r) { return at < r.offset; }) - 1;
    for (; run != runs_.end() && run->offset < stop; ++run)
        cut({&placement, tables, parts, entries}, *run, std::max(offset, run->offset),
            std::min(stop, run->offset + run->bytes));
}

// Bytes of the segment; elements that the chunk's ends cut stay exact.
void SegmentRounding::cut(const Cut& out, const Run& run, uint64_t from, uint64_t to) const {
    const uint64_t first = (from - run.offset + run.width - 1) / run.width;
    const uint64_t last = (to - run.offset) / run.width;
    if (run.rung == Rung::EXACT || first >= last) return exact_bytes(out, from, to);
    exact_bytes(out, from, run.offset + first * run.width);
    if (run.has_tokens) cut_tokens(out, run, first, last);
    else cut_state(out, run, first, last);
    exact_bytes(out, run.offset + last * run.width, to);
}

// Elements of the run, as in all that follows.
void SegmentRounding::cut_state(const Cut& out, const Run& run, uint64_t first,
                                uint64_t last) const {
    QuantisedPart part;
    part.rung = run.rung;
    part.dtype = run.dtype;
    if (run.rung == Rung::BF16) {
        part.lattice = lattice({1, 1, 1, last - first}, 0);
        return append_rounded(out, run, first, std::move(part));
    }
    const uint64_t columns = run.extents[3], rows = run.extents[2], matrix = rows * columns;
    while (first < last) {
        // The rest of a row, of a matrix, or whole matrices.
        uint64_t stop = std::min(last, (first / columns + 1) * columns);
        if (first % columns || stop - first < columns) {
            exact(out, run, first, stop);
        } else {
            uint64_t matrices = 1, of_rows = rows;
            if (first % matrix || last - first < matrix)
                of_rows = std::min(rows - first % matrix / columns, (last - first) / columns);
            else
                matrices = (last - first) / matrix;
            stop = first + matrices * of_rows * columns;
            part.lattice = run.rung == Rung::E4M3
                               ? lattice({1, matrices, of_rows, columns}, axes(0, 1, 0, 0))
                               : lattice({1, matrices, of_rows, columns}, axes(0, 1, 1, 0),
                                         axes(0, 1, 0, 1));
            append_rounded(out, run, first, part);
        }
        first = stop;
    }
}

void SegmentRounding::cut_tokens(const Cut& out, const Run& run, uint64_t first,
                                 uint64_t last) const {
    const uint64_t slice = run.tokens * run.inner, unit = run.outer * slice;
    while (first < last) {
        const uint64_t token = run.first_token + first / unit * run.tokens;
        if (run.outer > 1 && first % unit == 0 && last - first >= unit) {
            const bool edge = is_edge(token, run.tokens);
            uint64_t units = 1;
            while ((units + 1) * unit <= last - first &&
                   is_edge(token + units * run.tokens, run.tokens) == edge)
                ++units;
            if (edge) exact(out, run, first, first + units * unit);
            else rounded(out, run, first, units, run.outer, run.tokens);
            first += units * unit;
        } else {
            const uint64_t stop = std::min(last, (first / slice + 1) * slice);
            cut_rows(out, run, first, stop, token + first % slice / run.inner);
            first = stop;
        }
    }
}

// Within one slice [token, inner]; `token` is the one in which `first` lies.
void SegmentRounding::cut_rows(const Cut& out, const Run& run, uint64_t first, uint64_t last,
                               uint64_t token) const {
    if (const uint64_t cut = first % run.inner) {
        const uint64_t stop = std::min(last, first - cut + run.inner);
        exact(out, run, first, stop);
        first = stop;
        ++token;
    }
    while (last - first >= run.inner) {
        const bool edge = is_edge(token, 1);
        uint64_t tokens = 1;
        while ((tokens + 1) * run.inner <= last - first && is_edge(token + tokens, 1) == edge)
            ++tokens;
        if (edge) exact(out, run, first, first + tokens * run.inner);
        else rounded(out, run, first, 1, 1, tokens);
        first += tokens * run.inner;
        token += tokens;
    }
    exact(out, run, first, last);
}

void SegmentRounding::exact(const Cut& out, const Run& run, uint64_t first, uint64_t last) const {
    exact_bytes(out, run.offset + first * run.width, run.offset + last * run.width);
}

void SegmentRounding::exact_bytes(const Cut& out, uint64_t from, uint64_t to) const {
    if (from == to) return;
    QuantisedPart part;
    part.dtype = BYTES_DTYPE;
    part.lattice = lattice({1, 1, 1, to - from}, 0);
    if (exact_ && out.placement)
        nest(out, *exact_, SegmentCoding::samples_of(*out.placement), from, to - from, &part);
    out.parts->push_back(std::move(part));
}

void SegmentRounding::append_rounded(const Cut& out, const Run& run, uint64_t first,
                                     QuantisedPart part) const {
    if (run.rounded_width && out.placement) {
        const auto samples = [&](const SegmentCoding::Wanted& wanted,
                                 const SegmentCoding::Add& add) {
            sample(*out.placement, wanted, add);
        };
        nest(out, rounded_, samples, run.rounded_offset + first * run.rounded_width,
             part.lattice.count() * run.rounded_width, &part);
    }
    out.parts->push_back(std::move(part));
}

void SegmentRounding::nest(const Cut& out, const SegmentCoding& coding,
                           const SegmentCoding::Samples& samples, uint64_t offset, uint64_t bytes,
                           QuantisedPart* part) {
    std::vector<CodeEntry*> entries;
    coding.parts(samples, offset, bytes, out.tables, &part->nested, &entries);
    out.entries->insert(out.entries->end(), entries.begin(), entries.end());
}

// Rounded as their chunks round them, since their scales depend on those.
void SegmentRounding::sample(const Placement& placement, const SegmentCoding::Wanted& wanted,
                             const SegmentCoding::Add& add) const {
    const Run& run = *(std::upper_bound(runs_.begin(), runs_.end(), wanted.offset,
                                        [](uint64_t at, const Run& r) {
                                            return at < r.rounded_offset;
                                        }) - 1);
    const uint64_t start = (wanted.offset - run.rounded_offset) / wanted.width;
    const uint64_t from = run.offset + start * run.width;
    const uint64_t to = from + wanted.elements * run.width;
    const uint64_t first = from / chunk_bytes_, stop = (to + chunk_bytes_ - 1) / chunk_bytes_;
    const uint64_t chunks =
        std::max(SAMPLE_CHUNKS_MIN, wanted.wanted * run.width / chunk_bytes_ + 1);
    const uint64_t step = std::max<uint64_t>(1, (stop - first) / chunks);
    QuantisedEncoder encoder;
    std::vector<QuantisedPart> parts;
    std::vector<uint8_t> raw;
    for (uint64_t chunk = first; chunk < stop; chunk += step) {
        uint64_t at = std::max(chunk * chunk_bytes_, from);
        const uint64_t chunk_stop = std::min((chunk + 1) * chunk_bytes_, to);
        parts.clear();
        cut({nullptr, nullptr, &parts, nullptr}, run, at, chunk_stop);
        for (const QuantisedPart& part : parts) {
            raw.resize(part.raw_bytes());
            placement.gather(at, raw.size(), raw.data());
            if (const uint8_t* narrow = encoder.narrowed(part, raw.data()))
                add((at - from) / run.width, narrow, size_t(part.lattice.count()));
            at += raw.size();
        }
    }
}

// Elements [unit, outer, token, inner].
void SegmentRounding::rounded(const Cut& out, const Run& run, uint64_t first, uint64_t units,
                              uint64_t outer, uint64_t tokens) const {
    QuantisedPart part;
    part.rung = run.rung;
    part.dtype = run.dtype;
    const uint64_t inner = run.inner, last_axis = run.extents[3];
    const bool has_heads = outer == 1 && inner > last_axis && inner % last_axis == 0;
    if (run.rung == Rung::BF16) {
        part.lattice = lattice({1, 1, 1, units * outer * tokens * inner}, 0);
    } else if (run.rung == Rung::E4M3) {
        part.lattice = has_heads ? lattice({1, tokens, inner / last_axis, last_axis},
                                           axes(0, 0, 1, 0))
                                 : lattice({units, outer, tokens, inner}, axes(0, 1, 0, 0));
    } else if (run.by_channel) {
        part.lattice = lattice({units, outer, tokens, inner}, axes(0, 1, 0, 1));
    } else if (inner == 1) {  // tokens are innermost
        part.lattice = lattice({units, outer, tokens, 1}, axes(1, 0, 1, 0));
    } else {
        const uint64_t line = has_heads && last_axis >= GROUP ? last_axis : inner;
        part.lattice = lattice({1, 1, units * outer * tokens * inner / line, line},
                               axes(0, 0, 1, 0));
    }
    append_rounded(out, run, first, std::move(part));
}

bool SegmentRounding::is_edge(uint64_t first_token, uint64_t tokens) const {
    return first_token < FIRST_TOKENS || first_token + tokens + LAST_TOKENS > token_stop_;
}

}  // namespace kvwire
