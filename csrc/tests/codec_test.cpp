#include "codec/codec.hpp"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "codec/planes.hpp"
#include "tests/fenced.hpp"
#include "tests/test.hpp"

namespace kvwire {
namespace {

using test::Fenced;

constexpr uint32_t kWidths[] = {1, 2, 3, 4, 5, 8, 16, 100};

uint32_t next(uint32_t& state) { return (state = state * 1664525 + 1013904223) >> 8; }

// Every second byte varies little, as the exponents of a cache do.
std::vector<uint8_t> pattern(size_t size, uint32_t seed) {
    std::vector<uint8_t> bytes(size);
    for (size_t i = 0; i < size; ++i) {
        bytes[i] = static_cast<uint8_t>(i % 2 ? 0x3E + next(seed) % 3 : next(seed));
    }
    return bytes;
}

std::vector<uint8_t> planes_of(const std::vector<uint8_t>& raw, size_t width) {
    const size_t items = raw.size() / width;
    std::vector<uint8_t> planes;
    for (size_t plane = 0; plane < width; ++plane) {
        for (size_t item = 0; item < items; ++item) planes.push_back(raw[item * width + plane]);
    }
    planes.insert(planes.end(), raw.begin() + items * width, raw.end());
    return planes;
}

bool equal(const Fenced& fenced, const std::vector<uint8_t>& bytes) {
    return std::equal(bytes.begin(), bytes.end(), fenced.data()) && fenced.untouched_before();
}

struct Decoded {
    bool ok;
    std::vector<uint8_t> raw;
};

Decoded decode_fenced(const std::vector<uint8_t>& coded, uint32_t width, size_t raw_bytes) {
    const Fenced source(coded.size()), raw(raw_bytes), scratch(raw_bytes);
    std::copy(coded.begin(), coded.end(), source.data());
    const bool ok = decode(Codec::LZ4, source.data(), coded.size(), width, raw.data(), raw_bytes,
                           scratch.data());
    CHECK(raw.untouched_before());
    CHECK(scratch.untouched_before());
    return {ok, {raw.data(), raw.data() + raw_bytes}};
}

std::vector<uint8_t> encode_fenced(const std::vector<uint8_t>& bytes, uint32_t width,
                                   size_t out_max) {
    const Fenced raw(bytes.size()), out(out_max), scratch(bytes.size());
    std::copy(bytes.begin(), bytes.end(), raw.data());
    const size_t coded = encode(Codec::LZ4, raw.data(), bytes.size(), width, out.data(), out_max,
                                scratch.data());
    CHECK(out.untouched_before());
    CHECK(scratch.untouched_before());
    CHECK(coded <= out_max);
    CHECK(coded == 0 || coded < bytes.size());
    return {out.data(), out.data() + std::min(coded, out_max)};
}

bool lz4_here() { return codecs_available() >> static_cast<int>(Codec::LZ4) & 1; }

TEST(planes_follow_the_format_and_come_back) {
    for (size_t size = 0; size < 20000; size += size < 200 ? 1 : 1237) {
        const std::vector<uint8_t> bytes = pattern(size, 1);
        const Fenced raw(size), planes(size), joined(size);
        std::copy(bytes.begin(), bytes.end(), raw.data());
        for (uint32_t width : kWidths) {
            split_planes(raw.data(), size, width, planes.data());
            CHECK(equal(planes, planes_of(bytes, width)));
            join_planes(planes.data(), size, width, joined.data());
            CHECK(equal(joined, bytes));
        }
    }
}

TEST(codec_raw_is_always_there_and_never_shrinks) {
    CHECK(codecs_available() & 1);
    const std::vector<uint8_t> bytes(100, 7);
    std::vector<uint8_t> raw(100), scratch(100);
    CHECK_EQ(encode(Codec::RAW, bytes.data(), 100, 2, raw.data(), 100, scratch.data()), 0u);
    CHECK(decode(Codec::RAW, bytes.data(), 100, 2, raw.data(), 100, scratch.data()));
    CHECK(raw == bytes);
    CHECK(!decode(Codec::RAW, bytes.data(), 99, 2, raw.data(), 100, scratch.data()));
    CHECK(decode(Codec::RAW, nullptr, 0, 2, nullptr, 0, nullptr));
}

TEST(codec_numbers_that_are_not_in_the_table_are_refused) {
    const auto unknown = static_cast<Codec>(255);
    uint8_t a[8] = {}, b[8] = {}, c[8] = {};
    CHECK(codec_name(unknown) == nullptr);
    CHECK_EQ(coded_bytes_max(unknown, 8), 0u);
    CHECK_EQ(encode(unknown, a, 8, 2, b, 8, c), 0u);
    CHECK(!decode(unknown, a, 8, 2, b, 8, c));
}

TEST(codec_lz4_round_trip_within_its_buffers) {
    if (!lz4_here()) return;
    size_t shrunk = 0;
    for (size_t size = 0; size < 200000; size = size * 5 / 4 + 1) {
        const std::vector<uint8_t> bytes = pattern(size, 3);
        for (uint32_t width : kWidths) {
            const auto coded = encode_fenced(bytes, width, coded_bytes_max(Codec::LZ4, size));
            if (coded.empty()) continue;
            ++shrunk;
            const Decoded decoded = decode_fenced(coded, width, size);
            CHECK(decoded.ok);
            CHECK(decoded.raw == bytes);
        }
    }
    CHECK(shrunk > 100);
}

TEST(codec_lz4_gives_up_when_the_target_is_too_small) {
    if (!lz4_here()) return;
    const std::vector<uint8_t> bytes = pattern(4000, 5);
    const size_t needed = encode_fenced(bytes, 2, 4000).size();
    CHECK(needed > 0);
    for (size_t out_max = 0; out_max < needed; out_max += 37) {
        CHECK(encode_fenced(bytes, 2, out_max).empty());
    }
    std::vector<uint8_t> noise(4000);
    uint32_t state = 9;
    for (uint8_t& byte : noise) byte = static_cast<uint8_t>(next(state));
    CHECK(encode_fenced(noise, 2, 8000).empty());
    CHECK(encode_fenced(bytes, 0, 4000).empty());
}

TEST(codec_lz4_refuses_other_lengths) {
    if (!lz4_here()) return;
    const std::vector<uint8_t> coded = encode_fenced(pattern(4000, 5), 2, 4000);
    for (size_t raw_bytes : {0, 1, 3999, 4001, 8000}) CHECK(!decode_fenced(coded, 2, raw_bytes).ok);
    CHECK(!decode_fenced(coded, 0, 4000).ok);
    for (size_t size = 0; size < coded.size(); ++size) {
        CHECK(!decode_fenced({coded.begin(), coded.begin() + size}, 2, 4000).ok);
    }
}

// A damaged block may still decode; what matters here is where it writes.
TEST(codec_lz4_stays_within_its_buffers_whatever_it_reads) {
    if (!lz4_here()) return;
    const std::vector<uint8_t> coded = encode_fenced(pattern(600, 5), 2, 600);
    for (size_t bit = 0; bit < coded.size() * 8; ++bit) {
        std::vector<uint8_t> damaged = coded;
        damaged[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
        decode_fenced(damaged, 2, 600);
    }
    uint32_t state = 11;
    for (int round = 0; round < 3000; ++round) {
        std::vector<uint8_t> noise(next(state) % 80);
        for (uint8_t& byte : noise) byte = static_cast<uint8_t>(next(state));
        decode_fenced(noise, kWidths[next(state) % 8], next(state) % 300);
    }
}

}  // namespace
}  // namespace kvwire
