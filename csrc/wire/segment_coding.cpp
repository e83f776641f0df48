#include "wire/segment_coding.hpp"

#include <algorithm>

#include "base/bytes.hpp"
#include "wire/link_tables.hpp"

namespace kvwire {
namespace {

constexpr size_t PART_BYTES = 16, PART_CODED_BYTES_AT = 4;
constexpr uint64_t SAMPLE_ELEMENTS_MIN = 2048;      // fewer make no table
constexpr uint64_t HISTOGRAM_ELEMENTS = 4096;
constexpr uint64_t STATE_ELEMENTS_MAX = 4 << 20;  // of a state that is sampled as a whole
constexpr uint64_t TABLE_SHARE = 200;               // a table inside is cut to what its part needs
constexpr uint64_t TABLE_SHARE_MIN = 4;             // ... and must be so much smaller than the part

std::array<uint32_t, BasePattern::AXES> bases_extents(const StreamPattern& pattern) {
    return pattern.token_axis < 0 ? pattern.extents
                                  : without_axis(pattern.extents, pattern.token_axis);
}

void append_opaque(uint64_t bytes, std::vector<CodedPart>* parts,
                   std::vector<CodeEntry*>* entries) {
    if (bytes == 0) return;
    if (parts->empty() || parts->back().table) {
        parts->emplace_back();
        parts->back().table_index = TABLE_NONE;
        entries->push_back(nullptr);
    }
    parts->back().raw_bytes += uint32_t(bytes);
}

}  // namespace

size_t SegmentCoding::tensor_of(const GroupDesc& group, const Item& item) {
    const auto found = std::find_if(tensors_.begin(), tensors_.end(), [&](const Tensor& t) {
        return t.group == item.group && t.tensor == item.tensor;
    });
    if (found != tensors_.end()) return size_t(found - tensors_.begin());
    const TensorDesc& desc = group.tensors[item.tensor];
    tensors_.push_back({item.group, item.tensor, desc.dtype, desc.row_bytes(),
                        stream_pattern(group.kind, desc)});
    return tensors_.size() - 1;
}

void SegmentCoding::append(const std::string& model, const GroupDesc& group, const Item& item) {
    const TensorDesc& desc = group.tensors[item.tensor];
    const size_t number = tensor_of(group, item);
    const Tensor& tensor = tensors_[number];
    std::shared_ptr<CodeEntry> entry;
    if (element_format(uint8_t(desc.dtype)))
        entry = book_->entry({model, uint8_t(group.kind), desc.name, item.layer,
                              uint8_t(desc.dtype), bases_extents(tensor.pattern)});
    for (const Stretch& stretch : stretches(desc, item)) {
        Run run{bytes_, stretch.bytes, number, stretch.tokens, 0, false, nullptr};
        run.lasts = group.kind != GroupKind::RECURRENT &&
                    (stretch.tokens == 0 || stretch.tokens == desc.block_tokens);
        if (tensor.pattern.period(stretch.tokens) <= CodeTable::PERIOD_MAX) run.entry = entry;
        const bool by_token = desc.has_tokens() && (stretch.tokens == 0 || desc.block_tokens);
        const uint64_t tokens = by_token ? stretch.bytes / tensor.row_bytes : 0;
        if (item.token_start < skipped_tokens_ && tokens > 2 * skipped_tokens_)
            run.skipped_bytes = skipped_tokens_ * tensor.row_bytes;
        bytes_ += stretch.bytes;
        runs_.push_back(std::move(run));
    }
}

bool SegmentCoding::parts(const Samples& samples, uint64_t offset, uint64_t bytes,
                          SendTables* tables, std::vector<CodedPart>* parts,
                          std::vector<CodeEntry*>* entries) const {
    parts->clear();
    entries->clear();
    const uint64_t stop = offset + bytes;
    auto run = std::upper_bound(runs_.begin(), runs_.end(), offset,
                                [](uint64_t at, const Run& r) { return at < r.offset; }) - 1;
    bool at_hand = true;
    for (; run != runs_.end() && run->offset < stop; ++run) {
        append_part(samples, *run, std::max(offset, run->offset),
                    std::min(stop, run->offset + run->bytes), tables, parts, entries, &at_hand);
    }
    return at_hand;
}

// Elements that the chunk's ends cut are opaque.
void SegmentCoding::append_part(const Samples& samples, const Run& run, uint64_t from,
                                uint64_t to, SendTables* tables,
                                std::vector<CodedPart>* parts,
                                std::vector<CodeEntry*>* entries, bool* at_hand) const {
    if (!run.entry) return append_opaque(to - from, parts, entries);
    const Tensor& tensor = tensors_[run.tensor];
    const uint64_t width = item_bytes(tensor.dtype);
    const uint64_t first = (from - run.offset + width - 1) / width;
    const uint64_t last = (to - run.offset) / width;
    if (first >= last) return append_opaque(to - from, parts, entries);
    const int token_axis = tensor.pattern.token_axis;
    std::shared_ptr<const CodeTable> table = run.entry->table({token_axis, run.tokens}, [&] {
        *at_hand = false;
        return calibrated(samples, best_sample(run)).table;
    });
    if (!table) return append_opaque(to - from, parts, entries);
    CodedPart part;
    part.raw_bytes = uint32_t((last - first) * width);
    part.position = uint32_t(first % table->period());
    if (tables && run.lasts) part.table_index = tables->index_of(table);
    if (part.table_index == TABLE_INSIDE) {
        const uint64_t left = table->period() - part.position;
        if (table->bytes().size() * TABLE_SHARE > part.raw_bytes && last - first <= left)
            if (auto cut = outer_range(*table, uint32_t(last - first), &part.position))
                table = std::move(cut);
        if (table->bytes().size() * TABLE_SHARE_MIN > part.raw_bytes)
            return append_opaque(to - from, parts, entries);
    }
    part.table = std::move(table);
    append_opaque(run.offset + first * width - from, parts, entries);
    parts->push_back(std::move(part));
    entries->push_back(run.entry.get());
    append_opaque(to - (run.offset + last * width), parts, entries);
}

// Of the run that the chunk begins in.
uint32_t SegmentCoding::predict(const Samples& samples, uint64_t offset, uint32_t bytes) const {
    const auto run = std::upper_bound(runs_.begin(), runs_.end(), offset,
                                      [](uint64_t at, const Run& r) { return at < r.offset; }) - 1;
    if (!run->entry) return 0;
    const auto dtype = uint8_t(tensors_[run->tensor].dtype);
    const ElementFormat& format = *element_format(dtype);
    const uint64_t first = (offset - run->offset + format.item_bytes - 1) / format.item_bytes;
    const uint64_t last =
        (std::min(offset + bytes, run->offset + run->bytes) - run->offset) / format.item_bytes;
    if (last < first + SAMPLE_ELEMENTS_MIN) return 0;
    Calibrator histogram(dtype, {1, 1, 1, 1}, {});
    samples({run->offset + first * format.item_bytes, last - first, format.item_bytes,
             HISTOGRAM_ELEMENTS},
            [&](uint64_t, const uint8_t* raw, size_t count) { histogram.add(0, raw, count); });
    if (histogram.elements() == 0) return 0;
    const double bits = format.verbatim_bits + histogram.finish().exponent_bits;
    return uint32_t(std::min(1.0, bits / (8 * format.item_bytes)) * bytes);
}

// The longest run that the same table is for: not a partial block.
const SegmentCoding::Run& SegmentCoding::best_sample(const Run& run) const {
    const Run* best = &run;
    for (const Run& other : runs_)
        if (other.entry == run.entry && other.bytes > best->bytes) best = &other;
    return *best;
}

std::optional<Calibration> SegmentCoding::calibrate(const Placement& placement) const {
    if (runs_.empty() || !runs_[0].entry) return std::nullopt;
    Calibration made = calibrated(samples_of(placement), best_sample(runs_[0]));
    if (!made.table) return std::nullopt;
    const int token_axis = tensors_[runs_[0].tensor].pattern.token_axis;
    runs_[0].entry->put(token_axis < 0 ? made.table : without_axis(*made.table, token_axis));
    return made;
}

Calibration SegmentCoding::calibrated(const Samples& samples, const Run& run) const {
    const Tensor& tensor = tensors_[run.tensor];
    const uint64_t width = item_bytes(tensor.dtype);
    const uint64_t elements = (run.bytes - run.skipped_bytes) / width;
    if (elements < SAMPLE_ELEMENTS_MIN) return {};
    StreamPattern pattern = tensor.pattern;
    if (pattern.token_axis >= 0) pattern.extents[size_t(pattern.token_axis)] = run.tokens;
    std::vector<BaseAxes> candidates;
    uint64_t bases = 1;
    for (const StreamPattern::Bases& choice : pattern.choices) {
        candidates.push_back({choice.row_axes, choice.column_axes});
        const BasePattern as_coded{pattern.extents, choice.row_axes, choice.column_axes};
        bases = std::max(bases, as_coded.row_count() + as_coded.column_count());
    }
    const uint64_t period = pattern.period(run.tokens);
    // A state's places all differ, and each chunk takes along what it needs of the table.
    const bool is_state = pattern.token_axis < 0 && elements == period;
    const uint64_t coded = is_state ? period : chunk_bytes_ / width;
    Calibrator calibrator(uint8_t(tensor.dtype), pattern.extents, std::move(candidates), coded);
    const uint64_t wanted = is_state && elements <= STATE_ELEMENTS_MAX ? elements
                                                                      : sample_elements(bases);
    const uint64_t skipped = run.skipped_bytes / width;
    samples({run.offset + run.skipped_bytes, elements, width, wanted},
            [&](uint64_t first, const uint8_t* raw, size_t count) {
                calibrator.add((skipped + first) % period, raw, count);
            });
    if (calibrator.elements() < SAMPLE_ELEMENTS_MIN) return {};
    return calibrator.finish();
}

SegmentCoding::Samples SegmentCoding::samples_of(const Placement& placement) {
    return [&placement](const Wanted& wanted, const Add& add) {
        std::vector<uint8_t> raw;
        for (const SampleRun& run : sample_runs(wanted.elements, wanted.wanted)) {
            raw.resize(run.elements * wanted.width);
            placement.gather(wanted.offset + run.start * wanted.width, raw.size(), raw.data());
            add(run.start, raw.data(), run.elements);
        }
    };
}

void note_parts(const uint8_t* payload, const std::vector<CodedPart>& parts,
                CodeEntry* const* entries) {
    for (const CodedPart& part : parts) {
        const size_t coded_bytes = load_le<uint32_t>(payload + PART_CODED_BYTES_AT);
        payload += coded_bytes;
        CodeEntry* const entry = *entries++;
        if (!entry) continue;
        const uint64_t elements = part.raw_bytes / part.table->format().item_bytes;
        const size_t table_bytes =
            part.table_index == TABLE_INSIDE ? part.table->bytes().size() : 0;
        entry->coded(8.0 * double(coded_bytes - PART_BYTES - table_bytes) / double(elements),
                     elements);
    }
}

}  // namespace kvwire
