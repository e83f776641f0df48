// The system's liblz4, by its stable block functions.
#pragma once

namespace kvwire {

struct Lz4 {
    int (*compress)(const char* source, char* target, int source_bytes, int target_bytes_max);
    int (*decompress)(const char* source, char* target, int source_bytes, int target_bytes_max);
};

// Loaded on the first call; nullptr when liblz4.so.1 is not installed, lacks a function, or is
// hidden by the environment variable KVWIRE_LZ4=0.
const Lz4* lz4_library();

}  // namespace kvwire
