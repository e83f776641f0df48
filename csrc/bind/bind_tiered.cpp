#include <pybind11/pybind11.h>
#include <time.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "bind/bind_tiered.hpp"
#include "codec/tiered.hpp"

namespace py = pybind11;

namespace kvwire {
namespace {

using Table = std::shared_ptr<const CodeTable>;

Table table_from(const std::string& bytes) {
    size_t taken = 0;
    Table table = CodeTable::parse(bytes_of(bytes), bytes.size(), &taken);
    if (!table || taken != bytes.size())
        throw Error(ErrorCode::CODED_INVALID, "these bytes are no code table");
    return table;
}

}  // namespace

std::vector<CodedPart> parts_from(const std::vector<PartTuple>& tuples, size_t raw_bytes) {
    std::vector<CodedPart> parts;
    std::map<std::string, Table> tables;  // parts often share one
    size_t total = 0;
    for (const auto& [part_bytes, table_bytes, position, table_index] : tuples) {
        CodedPart part{part_bytes, nullptr, position, table_index};
        if (table_bytes) {
            Table& table = tables[*table_bytes];
            if (!table) table = table_from(*table_bytes);
            part.table = table;
        }
        const uint32_t item_bytes = part.table ? part.table->format().item_bytes : 1;
        if (part_bytes == 0 || part_bytes % item_bytes != 0 ||
            position >= (part.table ? part.table->period() : 1))
            throw Error(ErrorCode::USAGE, "a part is empty, cuts an element or is out of place");
        total += part_bytes;
        parts.push_back(part);
    }
    if (total != raw_bytes)
        throw Error(ErrorCode::USAGE, "the parts do not cover the bytes", raw_bytes, total);
    return parts;
}

TieredDecoder::TableOf table_of(const Tables& table_bytes) {
    std::map<uint32_t, Table> tables;
    for (const auto& [index, bytes] : table_bytes) tables[index] = table_from(bytes);
    return [tables = std::move(tables)](uint32_t index) {
        const auto found = tables.find(index);
        return found == tables.end() ? nullptr : found->second;
    };
}

namespace {

size_t encode_all(TieredEncoder& encoder, const std::vector<CodedPart>& parts, const uint8_t* raw,
                  uint8_t* out, size_t out_max) {
    encoder.begin(parts, out, out_max);
    while (const size_t bytes = encoder.next_bytes()) {
        encoder.strip(raw);
        raw += bytes;
    }
    return encoder.finish();
}

ErrorCode decode_all(TieredDecoder& decoder, const uint8_t* payload, size_t payload_bytes,
                     uint8_t* raw, size_t raw_bytes, TieredDecoder::TableOf table_of) {
    const ErrorCode code = decoder.begin(payload, payload_bytes, raw_bytes, std::move(table_of));
    if (code != ErrorCode::OK) return code;
    while (const size_t bytes = decoder.next_bytes()) {
        if (!decoder.strip(raw)) return ErrorCode::CODED_INVALID;
        raw += bytes;
    }
    return ErrorCode::OK;
}

std::optional<py::bytes> encode_bytes(const py::bytes& raw, const std::vector<PartTuple>& tuples,
                                      const std::optional<std::string>& variant,
                                      std::optional<size_t> out_max) {
    const std::string_view source = raw;
    const std::vector<CodedPart> parts = parts_from(tuples, source.size());
    TieredEncoder encoder(name_or_null(variant));
    const size_t room = out_max.value_or(tiered_bytes_max(parts));
    const std::unique_ptr<uint8_t[]> out(new uint8_t[room]);  // of that size, for the sanitizers
    const size_t coded = encode_all(encoder, parts, bytes_of(source), out.get(), room);
    if (coded == 0 && !parts.empty()) return std::nullopt;
    return py::bytes(reinterpret_cast<const char*>(out.get()), coded);
}

py::bytes decode_bytes(const py::bytes& payload, size_t raw_bytes, const Tables& table_bytes,
                       const std::optional<std::string>& variant) {
    const std::string_view source = payload;
    TieredDecoder decoder(name_or_null(variant));
    std::string raw(raw_bytes, '\xA5');
    const ErrorCode code =
        decode_all(decoder, bytes_of(source), source.size(),
                   reinterpret_cast<uint8_t*>(raw.data()), raw_bytes, table_of(table_bytes));
    if (code == ErrorCode::TABLE_UNKNOWN)
        throw Error(code, "a code table is not known here", 0, decoder.table_missing());
    if (code != ErrorCode::OK) throw Error(code, "the payload cannot be decoded");
    return py::bytes(raw);
}

std::vector<std::string> supported_names() {
    std::vector<std::string> names;
    for (const TieredVariantInfo& variant : tiered_variants()) {
        if (variant.supported) names.emplace_back(variant.name);
    }
    return names;
}

// ---- timing

// One thread's loops over chunks that all have one table, as a link would know it.
class Bench {
public:
    Bench(const uint8_t* raw, size_t raw_bytes, size_t chunk_bytes, const Table& table,
          const char* variant)
        : raw_(raw), raw_bytes_(raw_bytes), table_(table), encoder_(variant), decoder_(variant),
          decoded_(raw_bytes) {
        const uint64_t item_bytes = table ? table->format().item_bytes : 1;
        if (chunk_bytes == 0 || chunk_bytes % item_bytes != 0 || raw_bytes % item_bytes != 0)
            throw Error(ErrorCode::USAGE, "a chunk cuts an element");
        for (uint64_t at = 0; at < raw_bytes; at += chunk_bytes) {
            const uint64_t position = table ? at / item_bytes % table->period() : 0;
            const uint64_t bytes = std::min<uint64_t>(chunk_bytes, raw_bytes - at);
            chunks_.push_back({CodedPart{uint32_t(bytes), table, uint32_t(position), 1}});
            coded_max_ += tiered_bytes_max(chunks_.back());
        }
        coded_.resize(coded_max_);
        coded_bytes_.resize(chunks_.size());
    }

    void copy() { std::memcpy(decoded_.data(), raw_, raw_bytes_); }

    void encode() {
        const uint8_t* raw = raw_;
        uint8_t* out = coded_.data();
        for (size_t i = 0; i < chunks_.size(); ++i) {
            coded_bytes_[i] = encode_all(encoder_, chunks_[i], raw, out,
                                         coded_max_ - size_t(out - coded_.data()));
            raw += chunks_[i][0].raw_bytes;
            out += coded_bytes_[i];
        }
        coded_total_ = size_t(out - coded_.data());
    }

    void decode() {
        const uint8_t* coded = coded_.data();
        uint8_t* raw = decoded_.data();
        for (size_t i = 0; i < chunks_.size(); ++i) {
            const size_t raw_bytes = chunks_[i][0].raw_bytes;
            const ErrorCode code = decode_all(decoder_, coded, coded_bytes_[i], raw, raw_bytes,
                                              [this](uint32_t) { return table_; });
            if (code != ErrorCode::OK)
                throw Error(ErrorCode::INTERNAL, "what was encoded cannot be decoded");
            coded += coded_bytes_[i];
            raw += raw_bytes;
        }
    }

    size_t coded_total() const { return coded_total_; }
    void spoil() { std::memset(decoded_.data(), 0xA5, raw_bytes_); }
    bool exact() const { return std::memcmp(raw_, decoded_.data(), raw_bytes_) == 0; }

private:
    const uint8_t* raw_;
    size_t raw_bytes_;
    Table table_;
    TieredEncoder encoder_;
    TieredDecoder decoder_;
    std::vector<std::vector<CodedPart>> chunks_;
    std::vector<uint8_t> coded_, decoded_;
    std::vector<size_t> coded_bytes_;
    size_t coded_max_ = 0, coded_total_ = 0;
};

double thread_seconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

template <class Work>
double seconds_of(size_t passes, Work&& work) {
    const double start = thread_seconds();
    for (size_t pass = 0; pass < passes; ++pass) work();
    return (thread_seconds() - start) / double(passes);
}

py::dict bench(const py::buffer& source, const std::optional<std::string>& table_bytes,
               size_t chunk_bytes, size_t passes, size_t rounds,
               const std::optional<std::string>& variant) {
    const py::buffer_info info = source.request();
    if (passes == 0 || info.size == 0) throw Error(ErrorCode::USAGE, "nothing to time");
    const Table table = table_bytes ? table_from(*table_bytes) : nullptr;
    Bench loops(static_cast<const uint8_t*>(info.ptr), size_t(info.size * info.itemsize),
                chunk_bytes, table, name_or_null(variant));
    std::vector<double> copy, encode, decode;
    bool exact = true;
    {
        const py::gil_scoped_release released;
        for (size_t round = 0; round < rounds; ++round) {
            copy.push_back(seconds_of(passes, [&] { loops.copy(); }));
            encode.push_back(seconds_of(passes, [&] { loops.encode(); }));
            loops.spoil();
            decode.push_back(seconds_of(passes, [&] { loops.decode(); }));
            exact = exact && loops.exact();
        }
    }
    py::dict found;
    found["memcpy_s"] = copy;
    found["encode_s"] = encode;
    found["decode_s"] = decode;
    found["coded_bytes"] = loops.coded_total();
    found["exact"] = exact;
    return found;
}

}  // namespace

void register_tiered(py::module_& module) {
    tiered_active();  // a wrong KVWIRE_TIERED fails the import instead of the first transfer
    module.def("tiered_encode", &encode_bytes, py::arg("raw"), py::arg("parts"),
               py::arg("variant") = py::none(), py::arg("out_max") = py::none(),
               "Payload of ``parts``, each (raw_bytes, table bytes or None, position, "
               "table_index), or None when it does not fit. Source: FORMAT.md, 9.1.");
    module.def("tiered_decode", &decode_bytes, py::arg("payload"), py::arg("raw_bytes"),
               py::arg("tables") = Tables(), py::arg("variant") = py::none(),
               "The raw bytes; ``tables``: bytes of the link's tables by index. Raises "
               "CODED_INVALID or TABLE_UNKNOWN.");
    module.def("tiered_variants", &supported_names,
               "Names of the variants that this CPU supports, fastest first.");
    module.def("tiered_active", &tiered_active,
               "Name of the variant in use; the environment variable KVWIRE_TIERED forces one.");
    module.def("tiered_bench", &bench, py::arg("raw"), py::arg("table"), py::arg("chunk_bytes"),
               py::arg("passes") = 1, py::arg("rounds") = 5, py::arg("variant") = py::none(),
               "Times memcpy, encoding and decoding of a C-contiguous buffer by one thread, in "
               "turn, ``rounds`` times; the seconds that the thread ran for one pass over it, "
               "which other work on the machine does not lengthen. The payloads lie one after "
               "another, without tables inside; each chunk begins where the one before it ended "
               "in the table's pattern. ``passes`` over few bytes stay in cache.");
}

}  // namespace kvwire
