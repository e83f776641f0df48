#pragma once
// Ids and bytes between Python and C++.

#include <pybind11/pybind11.h>

#include <cstring>
#include <string>

#include "base/error.hpp"
#include "wire/control.hpp"
#include "wire/format.hpp"

namespace kvwire {

inline Id id_from(const std::string& bytes) {
    Id id;
    if (bytes.size() != id.bytes.size())
        throw Error(ErrorCode::USAGE, "an id has 16 bytes", 16, bytes.size());
    std::memcpy(id.bytes.data(), bytes.data(), bytes.size());
    return id;
}

inline pybind11::bytes to_python(const Id& id) {
    return pybind11::bytes(reinterpret_cast<const char*>(id.bytes.data()), id.bytes.size());
}

inline pybind11::bytes to_python(const Bytes& bytes) {
    return pybind11::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

inline ByteSpan span_of(const std::string& bytes) {
    return {reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()};
}

}  // namespace kvwire
