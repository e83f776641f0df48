#pragma once
// Staged chunks as Python gives them.

#include <pybind11/pybind11.h>

#include <memory>
#include <tuple>
#include <vector>

#include "wire/landing_zone.hpp"
#include "wire/staged.hpp"

namespace kvwire {

// Chunk bytes; of each chunk address, payload bytes, raw CRC32C, codec.
using StagedTuple =
    std::tuple<uint32_t, std::vector<std::tuple<uintptr_t, uint32_t, uint32_t, uint8_t>>>;

std::shared_ptr<const StagedSegment> staged_from(const StagedTuple& tuple);

void register_staging(pybind11::module_& module);

}  // namespace kvwire
