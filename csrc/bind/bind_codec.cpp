#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

#include "codec/codec.hpp"
#include "codec/planes.hpp"

namespace py = pybind11;

namespace kvwire {
namespace {

const uint8_t* bytes_of(std::string_view data) {
    return reinterpret_cast<const uint8_t*>(data.data());
}

uint8_t* bytes_of(std::string& data) { return reinterpret_cast<uint8_t*>(data.data()); }

std::optional<py::bytes> encode_bytes(uint8_t codec, const py::bytes& raw, uint32_t item_bytes,
                                      std::optional<size_t> out_max) {
    const std::string_view source = raw;
    const auto kind = static_cast<Codec>(codec);
    std::string out(out_max.value_or(coded_bytes_max(kind, source.size())), '\0');
    std::string scratch(source.size(), '\0');
    const size_t coded = encode(kind, bytes_of(source), source.size(), item_bytes, bytes_of(out),
                                out.size(), bytes_of(scratch));
    if (coded == 0) return std::nullopt;
    return py::bytes(out.data(), coded);
}

std::optional<py::bytes> decode_bytes(uint8_t codec, const py::bytes& coded, uint32_t item_bytes,
                                      size_t raw_bytes) {
    const std::string_view source = coded;
    std::string raw(raw_bytes, '\0'), scratch(raw_bytes, '\0');
    if (!decode(static_cast<Codec>(codec), bytes_of(source), source.size(), item_bytes,
                bytes_of(raw), raw_bytes, bytes_of(scratch))) {
        return std::nullopt;
    }
    return py::bytes(raw);
}

template <void (*reorder)(const uint8_t*, size_t, uint32_t, uint8_t*)>
py::bytes reorder_bytes(const py::bytes& data, uint32_t item_bytes) {
    if (item_bytes == 0) throw std::invalid_argument("item_bytes must be at least 1");
    const std::string_view source = data;
    std::string target(source.size(), '\0');
    reorder(bytes_of(source), source.size(), item_bytes, bytes_of(target));
    return py::bytes(target);
}

}  // namespace

void register_codec(py::module_& module) {
    module.def("codecs_available", &codecs_available,
               "Bit n set: codec n works here, as in a greeting. Source: FORMAT.md, Codecs.");
    module.def(
        "codec_name", [](uint8_t codec) { return codec_name(static_cast<Codec>(codec)); },
        py::arg("codec"), "Name of a codec number, None for one not in FORMAT.md.");
    module.def("codec_encode", &encode_bytes, py::arg("codec"), py::arg("raw"),
               py::arg("item_bytes"), py::arg("out_max") = py::none(),
               "The coded bytes, or None when the chunk must go raw.");
    module.def("codec_decode", &decode_bytes, py::arg("codec"), py::arg("coded"),
               py::arg("item_bytes"), py::arg("raw_bytes"),
               "``raw_bytes`` decoded bytes, or None when ``coded`` is no coding of that many.");
    module.def("split_planes", &reorder_bytes<split_planes>, py::arg("raw"), py::arg("item_bytes"),
               "The byte planes of ``raw`` and the bytes left over. Source: FORMAT.md, Codecs.");
    module.def("join_planes", &reorder_bytes<join_planes>, py::arg("planes"),
               py::arg("item_bytes"), "Undoes ``split_planes``.");
}

}  // namespace kvwire
