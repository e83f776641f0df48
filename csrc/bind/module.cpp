#include <pybind11/pybind11.h>

namespace kvwire {

void register_errors(pybind11::module_& module);
void register_checksum(pybind11::module_& module);
void register_codec(pybind11::module_& module);
void register_tiered(pybind11::module_& module);
void register_calibration(pybind11::module_& module);
void register_code_book(pybind11::module_& module);
void register_quantised(pybind11::module_& module);
void register_plan(pybind11::module_& module);
void register_wire(pybind11::module_& module);
void register_probes(pybind11::module_& module);
void register_security(pybind11::module_& module);
void register_staging(pybind11::module_& module);
void register_transport(pybind11::module_& module);

}  // namespace kvwire

PYBIND11_MODULE(_native, module) {
    module.doc() = "The C++ core of kvwire.";
    kvwire::register_errors(module);
    kvwire::register_checksum(module);
    kvwire::register_codec(module);
    kvwire::register_tiered(module);
    kvwire::register_calibration(module);
    kvwire::register_quantised(module);
    kvwire::register_plan(module);
    kvwire::register_code_book(module);
    kvwire::register_wire(module);
    kvwire::register_probes(module);
    kvwire::register_security(module);
    kvwire::register_staging(module);
    kvwire::register_transport(module);
}
