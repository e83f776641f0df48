// What staging in kvwire.kernels needs of the core: chunks that a device has coded, and the zone
// where those for a device land.

#include "bind/bind_staging.hpp"

#include <pybind11/stl.h>

#include <memory>

#include "bind/convert.hpp"

namespace py = pybind11;

namespace kvwire {
namespace {

using Landed = LandingZone::Landed;

std::shared_ptr<LandingZone> make_zone(uintptr_t address, size_t room_count, size_t room_bytes) {
    return std::make_shared<LandingZone>(reinterpret_cast<uint8_t*>(address), room_count,
                                         room_bytes);
}

std::unique_ptr<Landed> pop(LandingZone& zone, double timeout_s) {
    auto landed = std::make_unique<Landed>();
    const py::gil_scoped_release release;
    return zone.pop(landed.get(), timeout_s) ? std::move(landed) : nullptr;
}

py::dict tables_of(const Landed& landed) {
    py::dict found;
    for (const auto& [index, table] : landed.tables)
        found[py::int_(index)] = to_python(Bytes(table->bytes()));
    return found;
}

}  // namespace

std::shared_ptr<const StagedSegment> staged_from(const StagedTuple& tuple) {
    auto segment = std::make_shared<StagedSegment>();
    segment->chunk_bytes = std::get<0>(tuple);
    for (const auto& [address, payload_bytes, raw_crc, codec] : std::get<1>(tuple))
        segment->chunks.push_back({reinterpret_cast<const uint8_t*>(address), payload_bytes,
                                   raw_crc, Codec(codec)});
    return segment;
}

void register_staging(py::module_& module) {
    py::class_<Landed>(module, "Landed", "A payload that lies in a LandingZone.")
        .def_property_readonly("ticket_id", [](const Landed& l) { return to_python(l.ticket_id); })
        .def_property_readonly("transfer_id",
                               [](const Landed& l) { return to_python(l.header.transfer_id); })
        .def_property_readonly("segment_index",
                               [](const Landed& l) { return l.header.segment_index; })
        .def_property_readonly("raw_offset", [](const Landed& l) { return l.header.raw_offset; })
        .def_property_readonly("raw_bytes", [](const Landed& l) { return l.header.raw_bytes; })
        .def_property_readonly("codec", [](const Landed& l) { return l.header.codec; })
        .def_property_readonly("payload_bytes",
                               [](const Landed& l) { return l.header.payload_bytes; })
        .def_property_readonly(
            "address", [](const Landed& l) { return reinterpret_cast<uintptr_t>(l.payload.get()); })
        .def_property_readonly("placement",
                               [](const Landed& l) {
                                   return std::const_pointer_cast<Placement>(l.placement);
                               })
        .def_property_readonly("tables", &tables_of)
        .def("release", [](Landed& l) { l.payload.reset(); });
    py::class_<LandingZone, std::shared_ptr<LandingZone>>(
        module, "LandingZone", "Rooms for payloads on their way to a device. Borrows the memory.")
        .def(py::init(&make_zone), py::arg("address"), py::arg("room_count"), py::arg("room_bytes"))
        .def("pop", &pop, py::arg("timeout_s"))
        .def("close", &LandingZone::close, py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("rooms_free", &LandingZone::rooms_free);
}

}  // namespace kvwire
