#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "bind/bind_plan.hpp"
#include "bind/convert.hpp"
#include "codec/code_book.hpp"
#include "wire/chunk_coder.hpp"
#include "wire/segment_coding.hpp"

namespace py = pybind11;

namespace kvwire {
namespace {

// (model, group kind, tensor, layer, dtype, extents)
using KeyTuple = std::tuple<std::string, uint8_t, std::string, uint32_t, uint8_t,
                            std::array<uint32_t, BasePattern::AXES>>;

KeyTuple key_to_python(const CodeKey& key) {
    return {key.model, key.group_kind, key.tensor, key.layer, key.dtype, key.extents};
}

CodeKey key_from(const KeyTuple& key) {
    return {std::get<0>(key), std::get<1>(key), std::get<2>(key),
            std::get<3>(key), std::get<4>(key), std::get<5>(key)};
}

bool put(CodeBook& book, const KeyTuple& key, const std::string& bytes) {
    size_t taken = 0;
    auto table = CodeTable::parse(span_of(bytes).data, bytes.size(), &taken);
    return table && taken == bytes.size() && book.put(key_from(key), std::move(table));
}

py::list tables(const CodeBook& book) {
    py::list found;
    for (const auto& [key, table] : book.tables())
        found.append(py::make_tuple(key_to_python(key), to_python(table->bytes())));
    return found;
}

// The chunks of one segment, as a sender codes them.
class SegmentCoder {
public:
    SegmentCoder(std::shared_ptr<CodeBook> book, const std::string& model,
                 const py::handle& groups, const py::handle& items,
                 std::shared_ptr<const Placement> placement, uint32_t chunk_bytes,
                 uint64_t skipped_tokens)
        : placement_(std::move(placement)),
          coding_(std::move(book), chunk_bytes, skipped_tokens) {
        const std::vector<GroupDesc> descs = groups_from_python(groups);
        for (const Item& item : items_from_python(items))
            coding_.append(model, descs.at(item.group), item);
    }

    // (payload, checksum of the raw bytes); None: they do not shrink.
    py::object encode(uint64_t offset, uint32_t bytes) {
        FrameHeader header;
        header.raw_offset = offset;
        header.raw_bytes = bytes;
        bool coded;
        {
            const py::gil_scoped_release release;
            coded = encoder_.encode(Codec::TIERED, *placement_, 1, &coding_, nullptr, &header,
                                     &body_);
        }
        if (!coded) return py::none();
        return py::make_tuple(py::bytes(reinterpret_cast<const char*>(body_.data()),
                                        header.payload_bytes),
                              header.raw_crc);
    }

    // The parts of a chunk, each (raw_bytes, table bytes or None, position), and whether all tables
    // were at hand. Those that were not are made of `raw`, all of the segment, unless it is empty:
    // the memory is not read.
    py::tuple parts(uint64_t offset, uint32_t bytes, const py::bytes& raw) {
        const std::string_view held = raw;
        const auto samples = [&](const SegmentCoding::Wanted& wanted,
                                 const SegmentCoding::Add& add) {
            for (const SampleRun& run : sample_runs(wanted.elements, wanted.wanted)) {
                const uint64_t at = wanted.offset + run.start * wanted.width;
                if (at + run.elements * wanted.width > held.size()) return;
                add(run.start, reinterpret_cast<const uint8_t*>(held.data()) + at, run.elements);
            }
        };
        std::vector<CodedPart> parts;
        std::vector<CodeEntry*> entries;
        bool at_hand;
        {
            const py::gil_scoped_release release;
            at_hand = coding_.parts(samples, offset, bytes, nullptr, &parts, &entries);
        }
        py::list found;
        for (const CodedPart& part : parts) {
            const py::object table =
                part.table ? py::object(to_python(Bytes(part.table->bytes()))) : py::none();
            found.append(py::make_tuple(part.raw_bytes, table, part.position));
        }
        return py::make_tuple(found, at_hand);
    }

    std::optional<double> calibrate() {
        const py::gil_scoped_release release;
        const std::optional<Calibration> made = coding_.calibrate(*placement_);
        return made ? std::optional(made->exponent_bits) : std::nullopt;
    }

private:
    const std::shared_ptr<const Placement> placement_;
    SegmentCoding coding_;
    ChunkEncoder encoder_;
    Bytes body_;
};

py::tuple pattern_of(const py::handle& group, uint32_t tensor) {
    py::list groups;
    groups.append(group);
    const GroupDesc desc = groups_from_python(groups).at(0);
    const StreamPattern pattern = stream_pattern(desc.kind, desc.tensors.at(tensor));
    py::list choices;
    for (const auto& bases : pattern.choices)
        choices.append(py::make_tuple(bases.row_axes, bases.column_axes));
    return py::make_tuple(pattern.extents, pattern.token_axis, choices);
}

}  // namespace

void register_code_book(py::module_& module) {
    py::class_<CodeBook, std::shared_ptr<CodeBook>>(module, "CodeBook", "Code tables by key.")
        .def(py::init<>())
        .def("put", &put, py::arg("key"), py::arg("table"),
             "False when the bytes are no table, or none that suits the key.")
        .def("tables", &tables, "(key, bytes of the table) of all that there are.");
    py::class_<SegmentCoder>(module, "SegmentCoder")
        .def(py::init<std::shared_ptr<CodeBook>, const std::string&, const py::handle&,
                      const py::handle&, std::shared_ptr<const Placement>, uint32_t,
                      uint64_t>(),
             py::arg("book"), py::arg("model"), py::arg("groups"), py::arg("items"),
             py::arg("placement"), py::arg("chunk_bytes"),
             py::arg("skipped_tokens") = SegmentCoding::SINK_TOKENS)
        .def("encode", &SegmentCoder::encode, py::arg("offset"), py::arg("bytes"),
             "(TIERED payload, raw_crc) of a chunk; None when it does not shrink.")
        .def("parts", &SegmentCoder::parts, py::arg("offset"), py::arg("bytes"),
             py::arg("raw") = py::bytes(),
             "((raw_bytes, table or None, position) of the parts of a chunk, whether all tables\n"
             "were at hand); those that were not are made of ``raw``, all of the segment.")
        .def("calibrate", &SegmentCoder::calibrate,
             "Makes the table of the only item anew. Bits of an exponent coded with it, None: no\n"
             "table can be made of these elements.");
    module.def("stream_pattern", &pattern_of, py::arg("group"), py::arg("tensor"),
               "Extents, token axis (-1: none) and choices (row_axes, column_axes) of a tensor.");
}

}  // namespace kvwire
