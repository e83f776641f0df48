// Parts and code tables as Python gives them: what the tests of both coders share.
#pragma once

#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "codec/tiered.hpp"

namespace kvwire {

// raw_bytes, table bytes or none, position, table_index.
using PartTuple = std::tuple<uint32_t, std::optional<std::string>, uint32_t, uint32_t>;
using Tables = std::map<uint32_t, std::string>;  // their bytes, by index

inline const uint8_t* bytes_of(std::string_view data) {
    return reinterpret_cast<const uint8_t*>(data.data());
}

inline const char* name_or_null(const std::optional<std::string>& name) {
    return name ? name->c_str() : nullptr;
}

// Throws USAGE where they do not cover `raw_bytes` or break what TieredEncoder relies on.
std::vector<CodedPart> parts_from(const std::vector<PartTuple>& tuples, size_t raw_bytes);

TieredDecoder::TableOf table_of(const Tables& tables);

}  // namespace kvwire
