#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "bind/bind_tiered.hpp"
#include "codec/quantised.hpp"

namespace py = pybind11;

namespace kvwire {
namespace {

// rung, dtype, extents, row_axes, column_axes, nested parts.
using QuantisedTuple = std::tuple<uint8_t, uint8_t, std::array<uint32_t, Lattice::AXES>, uint8_t,
                                  uint8_t, std::vector<PartTuple>>;

size_t nested_bytes(const QuantisedPart& part) {
    const size_t elements = size_t(part.lattice.count());
    return part.rung == Rung::BF16 ? 2 * elements : elements;
}

std::vector<QuantisedPart> quantised_from(const std::vector<QuantisedTuple>& tuples,
                                          size_t raw_bytes) {
    std::vector<QuantisedPart> parts;
    uint64_t total = 0;
    for (const auto& [rung, dtype, extents, row_axes, column_axes, nested] : tuples) {
        QuantisedPart part{Rung(rung), dtype, Lattice{extents, row_axes, column_axes}, {}};
        if (!part.valid()) throw Error(ErrorCode::USAGE, "a part breaks a rule of FORMAT.md 9.3");
        if (!nested.empty()) part.nested = parts_from(nested, nested_bytes(part));
        total += part.raw_bytes();
        parts.push_back(std::move(part));
    }
    if (total != raw_bytes)
        throw Error(ErrorCode::USAGE, "the parts do not cover the bytes", raw_bytes, total);
    return parts;
}

std::optional<py::bytes> encode_bytes(const py::bytes& raw,
                                      const std::vector<QuantisedTuple>& tuples,
                                      const std::optional<std::string>& variant,
                                      std::optional<size_t> out_max) {
    const std::string_view source = raw;
    const std::vector<QuantisedPart> parts = quantised_from(tuples, source.size());
    const size_t room = out_max.value_or(quantised_bytes_max(parts));
    const std::unique_ptr<uint8_t[]> out(new uint8_t[room]);  // of that size, for the sanitizers
    QuantisedEncoder encoder(name_or_null(variant));
    const size_t coded = encoder.encode(parts, bytes_of(source), out.get(), room);
    if (coded == 0 && !parts.empty()) return std::nullopt;
    return py::bytes(reinterpret_cast<const char*>(out.get()), coded);
}

py::bytes decode_bytes(const py::bytes& payload, size_t raw_bytes, const Tables& tables,
                       const std::optional<std::string>& variant) {
    const std::string_view source = payload;
    QuantisedDecoder decoder(name_or_null(variant));
    std::string raw(raw_bytes, '\xA5');
    const ErrorCode code =
        decoder.begin(bytes_of(source), source.size(), raw_bytes, table_of(tables));
    if (code == ErrorCode::TABLE_UNKNOWN)
        throw Error(code, "a code table is not known here", 0, decoder.table_missing());
    if (code != ErrorCode::OK) throw Error(code, "the payload cannot be decoded");
    size_t at = 0;
    while (const size_t bytes = decoder.next_bytes()) {
        if (!decoder.strip(reinterpret_cast<uint8_t*>(raw.data()) + at))
            throw Error(ErrorCode::CODED_INVALID, "a strip cannot be decoded");
        at += bytes;
    }
    return py::bytes(raw);
}

std::vector<std::string> supported_names() {
    std::vector<std::string> names;
    for (const TieredVariantInfo& variant : quantised_variants())
        if (variant.supported) names.emplace_back(variant.name);
    return names;
}

}  // namespace

void register_quantised(py::module_& module) {
    quantised_active();  // a wrong KVWIRE_QUANTISED fails the import, not the first transfer
    module.def("quantised_encode", &encode_bytes, py::arg("raw"), py::arg("parts"),
               py::arg("variant") = py::none(), py::arg("out_max") = py::none(),
               "Payload of ``parts``, each (rung, dtype, 4 extents, row_axes, column_axes, nested "
               "parts as for ``tiered_encode``), or None when it does not fit. Source: FORMAT.md, "
               "9.3.");
    module.def("quantised_decode", &decode_bytes, py::arg("payload"), py::arg("raw_bytes"),
               py::arg("tables") = Tables(), py::arg("variant") = py::none(),
               "The raw bytes; ``tables``: bytes of the link's tables by index. Raises "
               "CODED_INVALID or TABLE_UNKNOWN.");
    module.def("quantised_variants", &supported_names,
               "Names of the variants that this CPU supports, fastest first.");
    module.def("quantised_active", &quantised_active,
               "Name of the variant in use; the environment variable KVWIRE_QUANTISED forces one.");
}

}  // namespace kvwire
