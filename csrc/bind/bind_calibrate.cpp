#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

#include "codec/calibrate.hpp"

namespace py = pybind11;

namespace kvwire {
namespace {

std::pair<py::bytes, double> calibrate(
    uint8_t dtype, const std::vector<uint32_t>& extents,
    const std::vector<std::pair<uint8_t, uint8_t>>& candidates,
    const std::vector<std::pair<uint64_t, py::buffer>>& samples, uint64_t elements_to_code) {
    if (extents.size() > BasePattern::AXES)
        throw std::invalid_argument("calibration: a pattern has at most 4 axes");
    const size_t shift = BasePattern::AXES - extents.size();
    std::array<uint32_t, BasePattern::AXES> padded;
    padded.fill(1);
    std::copy(extents.begin(), extents.end(), padded.begin() + shift);
    std::vector<BaseAxes> axes;
    for (const auto& [rows, columns] : candidates)
        axes.push_back({uint8_t(rows << shift), uint8_t(columns << shift)});
    Calibrator calibrator(dtype, padded, std::move(axes), elements_to_code);
    const size_t item_bytes = element_format(dtype)->item_bytes;
    for (const auto& [position, sample] : samples) {
        const py::buffer_info held = sample.request();
        const size_t bytes = size_t(held.size) * size_t(held.itemsize);
        if (!PyBuffer_IsContiguous(held.view(), 'C') || bytes % item_bytes)
            throw std::invalid_argument("calibration: a sample must be contiguous elements");
        calibrator.add(position, static_cast<const uint8_t*>(held.ptr), bytes / item_bytes);
    }
    const Calibration made = calibrator.finish();
    const auto& bytes = made.table->bytes();
    return {py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size()),
            made.exponent_bits};
}

std::vector<std::pair<uint64_t, uint64_t>> runs(uint64_t elements, uint64_t wanted) {
    std::vector<std::pair<uint64_t, uint64_t>> found;
    for (const SampleRun& run : sample_runs(elements, wanted))
        found.push_back({run.start, run.elements});
    return found;
}

}  // namespace

void register_calibration(py::module_& module) {
    module.def("calibrate", &calibrate, py::arg("dtype"), py::arg("extents"),
               py::arg("candidates"), py::arg("samples"), py::arg("elements_to_code") = 0,
               "Code table and bits of an exponent coded with it.\n\n"
               "extents: of the pattern's axes, up to 4. candidates: (row_axes, column_axes),\n"
               "bit j for extents[j]. samples: (position, elements). Source: FORMAT.md, Codecs.");
    module.def("sample_runs", &runs, py::arg("elements"), py::arg("wanted"),
               "(start, elements) of what to look at where all elements are too many.");
}

}  // namespace kvwire
