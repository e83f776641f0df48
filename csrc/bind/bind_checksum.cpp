#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bind/buffer_view.hpp"
#include "checksum/crc32c.hpp"

namespace py = pybind11;

namespace kvwire {
namespace {

// Below this, giving the GIL away costs more than the sum.
constexpr size_t kReleaseGilBytesMin = 64 * 1024;

uint32_t sum(Crc32cFunction function, const py::object& data, uint32_t crc) {
    const BufferView view(data);
    if (view.size() < kReleaseGilBytesMin) return function(crc, view.data(), view.size());
    // SAFETY: `view` holds the buffer's export until after the sum.
    const py::gil_scoped_release released;
    return function(crc, view.data(), view.size());
}

uint32_t sum_with(const std::string& name, const py::object& data, uint32_t crc) {
    for (const Crc32cVariant& variant : crc32c_variants()) {
        if (variant.supported && name == variant.name) return sum(variant.function, data, crc);
    }
    throw std::invalid_argument("no CRC32C variant named '" + name + "' is supported here");
}

std::vector<std::string> supported_names() {
    std::vector<std::string> names;
    for (const Crc32cVariant& variant : crc32c_variants()) {
        if (variant.supported) names.emplace_back(variant.name);
    }
    return names;
}

}  // namespace

void register_checksum(py::module_& module) {
    // A wrong KVWIRE_CRC32C fails the import instead of the first transfer.
    crc32c_active();
    module.def(
        "crc32c", [](const py::object& data, uint32_t crc) { return sum(crc32c, data, crc); },
        py::arg("data"), py::arg("crc") = 0,
        "CRC32C of a C-contiguous buffer, extending ``crc``. Source: FORMAT.md, Checksums.");
    module.def("crc32c_combine", &crc32c_combine, py::arg("crc_a"), py::arg("crc_b"),
               py::arg("b_bytes"), "CRC32C of A + B from both CRCs and the length of B.");
    module.def("crc32c_with", &sum_with, py::arg("variant"), py::arg("data"), py::arg("crc") = 0,
               "As ``crc32c``, by the named variant. Raises ValueError for an unsupported one.");
    module.def("crc32c_variants", &supported_names,
               "Names of the variants that this CPU supports, fastest first.");
    module.def("crc32c_active", &crc32c_active,
               "Name of the variant in use; the environment variable KVWIRE_CRC32C forces one.");
}

}  // namespace kvwire
