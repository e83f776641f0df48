// The chunk codecs of FORMAT.md section 9. Nothing here allocates or throws; source, target and
// scratch must not overlap, and a size of 0 may come with a null pointer.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvwire {

enum class Codec : uint8_t { RAW = 0, LZ4 = 1, TIERED = 2, QUANTISED = 3 };

// Bit n is set when codec n can be used here: what a greeting says. Found out once.
uint32_t codecs_available();

// Name as in FORMAT.md, or nullptr for a number that is not in the table.
const char* codec_name(Codec codec);

// Of what follows TIERED and QUANTISED know nothing: their chunks are coded in parts (tiered.hpp,
// quantised.hpp).

// The `out_max` with which encode() returns 0 only for bytes that do not shrink.
size_t coded_bytes_max(Codec codec, size_t raw_bytes);

// Codes `raw` into `out` and returns the length, 1 to raw_bytes - 1; or 0, with anything in the
// first `out_max` bytes of `out`, when the chunk must go raw: it does not shrink, `out_max` is too
// small, or the codec is not available. `scratch` holds `raw_bytes`.
size_t encode(Codec codec, const uint8_t* raw, size_t raw_bytes, uint32_t item_bytes, uint8_t* out,
              size_t out_max, uint8_t* scratch);

// Decodes to exactly `raw_bytes`. False, with anything in `raw`, when `coded` is no valid coding of
// that length or the codec is not available. `scratch` holds `raw_bytes`.
[[nodiscard]] bool decode(Codec codec, const uint8_t* coded, size_t coded_bytes,
                          uint32_t item_bytes, uint8_t* raw, size_t raw_bytes, uint8_t* scratch);

}  // namespace kvwire
