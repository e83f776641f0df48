#pragma once
// MANIFEST (FORMAT.md section 7.1): what a transfer carries, and from which rank to which.

#include <cstdint>
#include <string>
#include <vector>

#include "plan/geometry.hpp"
#include "wire/control.hpp"
#include "wire/format.hpp"

namespace kvwire {

class FieldReader;

struct Manifest {
    Id ticket_id;
    Id spec_fingerprint;
    uint64_t token_start = 0;
    uint64_t token_stop = 0;
    uint16_t source_rank = 0, source_rank_count = 1;
    uint16_t destination_rank = 0, destination_rank_count = 1;
    uint32_t codecs = 1;
    std::string model;
    std::vector<GroupDesc> groups;
    uint16_t metadata_count = 0;
    Bytes metadata;  // entries as encoded
};

Bytes encode(const Manifest& manifest);
Manifest decode_manifest(ByteSpan payload);

// Walks `count` metadata entries and throws on the first that breaks a rule.
void check_metadata(FieldReader& in, uint16_t count);

}  // namespace kvwire
