// What the fuzz targets share. A target reads choices out of the fuzzer's bytes with `Random`; a
// broken CHECK stops the fuzzer, and so does any exception but the Error that the target expects.
#pragma once

#include <cstdlib>
#include <cstring>

#include "checksum/crc32c.hpp"
#include "tests/plan_world.hpp"
#include "wire/frames.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace kvwire::fuzz {

using namespace test;
using Bytes = std::vector<uint8_t>;

template <class Body>
int run(Body&& body) {
    body();
    if (failures > 0) std::abort();
    return 0;
}

// A `Play` that reads all its choices out of the input, from beginning to end.
template <class Play>
int play(const uint8_t* data, size_t size) {
    return run([&] {
        Random choices(ByteSpan{data, size});
        Play(choices).run();
    });
}

// The code with which `body` refuses its input; OK: it does not.
template <class Body>
ErrorCode refusal(Body&& body) {
    try {
        body();
        return ErrorCode::OK;
    } catch (const Error& error) {
        CHECK(error.code != ErrorCode::INTERNAL);
        return error.code;
    }
}

// The known types, then the first of those that may be skipped.
inline FrameType type_of(uint64_t number) {
    return FrameType(number < 16 ? number : SKIPPABLE_TYPE_MIN + number - 16);
}

inline uint64_t odd_number(Random& choices) {
    static const uint64_t numbers[] = {0, 1, 2, 3, 16, 100, 4095, 4096, 8192, 65535, 1 << 20,
                                       0xFFFFFFFF, uint64_t(1) << 40, ~uint64_t(0)};
    const uint64_t which = pick(choices, 0, 15);
    if (which < 14) return numbers[which];
    return which == 14 ? pick(choices, 0, 255) : pick(choices, 0, UINT64_MAX - 1);
}

// Overwrites a few fields, rarely moves the end.
inline void change(Bytes& bytes, Random& choices) {
    const uint64_t changes = pick(choices, 0, 7);
    for (uint64_t i = 0; i < changes && i < 3 && !bytes.empty(); ++i) {
        const size_t at = pick(choices, 0, bytes.size() - 1);
        const size_t width = size_t(1) << pick(choices, 0, 3);
        const uint64_t number = odd_number(choices);
        std::memcpy(&bytes[at], &number, std::min(width, bytes.size() - at));
    }
    if (changes == 7) bytes.resize(pick(choices, 0, bytes.size() + 40));
}

// Makes a stream's checksums right, frame after frame, as far as frames can be told apart.
inline void seal(uint8_t* stream, size_t size) {
    for (size_t at = 0; at + HEADER_BYTES <= size;) {
        uint8_t* const header = stream + at;
        std::memcpy(header, FRAME_MAGIC, sizeof FRAME_MAGIC);
        const uint64_t payload_bytes = load_le<uint32_t>(header + header_at::PAYLOAD_BYTES);
        const bool whole = payload_bytes <= size - at - HEADER_BYTES;
        const uint32_t crc = whole ? crc32c(0, header + HEADER_BYTES, payload_bytes) : 0;
        store_le<uint32_t>(header + header_at::PAYLOAD_CRC, crc);
        if (FrameType(header[header_at::TYPE]) == FrameType::CHUNK && !header[header_at::CODEC])
            store_le<uint32_t>(header + header_at::RAW_CRC, crc);
        store_le<uint32_t>(header + header_at::HEADER_CRC,
                           crc32c(0, header, header_at::HEADER_CRC));
        if (!whole) return;
        at += HEADER_BYTES + payload_bytes;
    }
}

inline size_t copy_in(const iovec* iov, size_t iov_count, const uint8_t* bytes, size_t count) {
    size_t done = 0;
    for (size_t i = 0; i < iov_count && done < count; ++i) {
        const size_t part = std::min(iov[i].iov_len, count - done);
        std::memcpy(iov[i].iov_base, bytes + done, part);
        done += part;
    }
    return done;
}

}  // namespace kvwire::fuzz
