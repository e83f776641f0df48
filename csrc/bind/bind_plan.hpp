#pragma once
// What other bindings need to take specs, items and memory from Python.

#include <pybind11/pybind11.h>

#include <vector>

#include "plan/placement.hpp"

// A MemoryMap crosses as itself (held by shared_ptr), never as a dict.
PYBIND11_MAKE_OPAQUE(kvwire::MemoryMap)

namespace kvwire {

// From what kvwire.plan.to_native(spec) and Item make: plain tuples, all the way down.
std::vector<GroupDesc> groups_from_python(const pybind11::handle& groups);
std::vector<Item> items_from_python(const pybind11::handle& items);

void register_plan(pybind11::module_& module);

}  // namespace kvwire
