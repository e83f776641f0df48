#include "codec/quantised.hpp"

#include <cmath>
#include <cstring>
#include <vector>

#include "base/bytes.hpp"
#include "codec/quantised_kernels.hpp"
#include "codec/small_floats.hpp"
#include "tests/test.hpp"

namespace kvwire {
namespace {

using Bytes = std::vector<uint8_t>;

Bytes noise(size_t elements, uint32_t seed) {
    Bytes raw(4 * elements);
    for (size_t i = 0; i < elements; ++i) {
        seed = seed * 1664525 + 1013904223;
        store_le<uint32_t>(&raw[4 * i], bits_of(float(int32_t(seed)) * 0x1p-28f));
    }
    return raw;
}

Bytes encode(const std::vector<QuantisedPart>& parts, const Bytes& raw, const char* variant) {
    Bytes out(quantised_bytes_max(parts));
    out.resize(QuantisedEncoder(variant).encode(parts, raw.data(), out.data(), out.size()));
    return out;
}

ErrorCode decode(const Bytes& payload, Bytes* raw, const char* variant = nullptr) {
    QuantisedDecoder decoder(variant);
    const Bytes copy(payload);  // of its own size, for the sanitizers
    const ErrorCode code = decoder.begin(copy.data(), copy.size(), raw->size(),
                                         [](uint32_t) { return nullptr; });
    if (code != ErrorCode::OK) return code;
    for (size_t at = 0; const size_t bytes = decoder.next_bytes(); at += bytes) {
        Bytes strip(bytes);
        if (!decoder.strip(strip.data())) return ErrorCode::CODED_INVALID;
        std::memcpy(raw->data() + at, strip.data(), bytes);
    }
    return ErrorCode::OK;
}

std::vector<QuantisedPart> chunk() {
    using quantised::FP32;
    return {{Rung::INT6, FP32, {{3, 2, 40, 33}, 0b1010, 0}, {}},
            {Rung::EXACT, quantised::BYTES, {{1, 1, 1, 4 * 50}, 0, 0}, {}},
            {Rung::INT8_GRID, FP32, {{1, 4, 70, 30}, 0b0110, 0b0101}, {}},
            {Rung::E4M3, FP32, {{1, 1, 9, 500}, 0b0010, 0}, {}},
            {Rung::BF16, FP32, {{1, 1, 1, 4097}, 0, 0}, {}}};
}

size_t raw_bytes_of(const std::vector<QuantisedPart>& parts) {
    size_t bytes = 0;
    for (const QuantisedPart& part : parts) bytes += size_t(part.raw_bytes());
    return bytes;
}

TEST(quantised_variants_agree_on_a_chunk_of_all_rungs) {
    const std::vector<QuantisedPart> parts = chunk();
    const Bytes raw = noise(raw_bytes_of(parts) / 4, 1);
    const Bytes payload = encode(parts, raw, "portable");
    CHECK(!payload.empty() && payload.size() < raw.size() / 2);
    Bytes first(raw.size());
    CHECK_EQ(decode(payload, &first, "portable"), ErrorCode::OK);
    for (const TieredVariantInfo& variant : quantised_variants()) {
        if (!variant.supported) continue;
        CHECK(encode(parts, raw, variant.name) == payload);
        Bytes decoded(raw.size());
        CHECK_EQ(decode(payload, &decoded, variant.name), ErrorCode::OK);
        CHECK(decoded == first);
    }
    const size_t exact = size_t(parts[0].raw_bytes());
    CHECK(std::equal(&raw[exact], &raw[exact + 200], &first[exact]));
    double error = 0, power = 0;
    for (size_t i = 0; i < raw.size(); i += 4) {
        const float x = float_of(load_le<uint32_t>(&raw[i]));
        const float y = float_of(load_le<uint32_t>(&first[i]));
        error += double(y - x) * (y - x);
        power += double(x) * x;
    }
    CHECK(error > 0 && std::sqrt(error / power) < 0.02);
}

TEST(quantised_payloads_may_end_anywhere) {
    const std::vector<QuantisedPart> parts = chunk();
    const Bytes raw = noise(raw_bytes_of(parts) / 4, 2);
    const Bytes payload = encode(parts, raw, nullptr);
    Bytes decoded(raw.size());
    for (size_t size = 0; size < payload.size(); size += size < 400 ? 1 : 97)
        CHECK_EQ(decode(Bytes(payload.begin(), payload.begin() + long(size)), &decoded),
                 ErrorCode::CODED_INVALID);
}

// Neither side may write or read outside what it was given, whatever is flipped.
TEST(quantised_flips_are_harmless) {
    const std::vector<QuantisedPart> parts = chunk();
    const Bytes raw = noise(raw_bytes_of(parts) / 4, 3);
    const Bytes payload = encode(parts, raw, nullptr);
    Bytes decoded(raw.size()), other(raw.size());
    uint32_t seed = 7;
    for (int turn = 0; turn < 400; ++turn) {
        Bytes changed = payload;
        seed = seed * 1664525 + 1013904223;
        const size_t at = turn < 200 ? size_t(turn) : (seed >> 8) % payload.size();
        changed[at] ^= uint8_t(1 << (seed >> 4) % 8);
        const ErrorCode code = decode(changed, &decoded);
        CHECK_EQ(decode(changed, &other, "portable"), code);
        CHECK(code != ErrorCode::OK || decoded == other);
    }
}

TEST(lattice_numbers_rows_columns_and_places) {
    const Lattice lattice{{2, 3, 4, 5}, 0b1001, 0b0100};
    CHECK_EQ(lattice.count(), 120u);
    CHECK_EQ(lattice.rows(), 10u);
    CHECK_EQ(lattice.columns(), 4u);
    CHECK_EQ(lattice.places(), 12u);
    size_t seen = 7;
    lattice.lines(7, 90, [&](const Lattice::Line& line) {
        CHECK_EQ(line.at + 7, seen);
        CHECK_EQ(line.row, seen / 60 * 5 + seen % 5);
        CHECK_EQ(line.column, seen / 5 % 4);
        CHECK_EQ(line.place, seen / 5 % 12);
        seen += line.count;
    });
    CHECK_EQ(seen, 97u);
    CHECK_EQ((Lattice{{1u << 31, 1, 1, 1}, 0, 0}.count()), Lattice::COUNT_MAX + 1);
    CHECK_EQ((Lattice{{~0u, ~0u, 3, ~0u}, 0, 0}.count()), Lattice::COUNT_MAX + 1);
    CHECK_EQ((Lattice{{~0u, ~0u, 0, ~0u}, 0, 0}.count()), 0u);
}

// Every code comes back, and what lies between two goes to the nearer, or the even one.
template <class Format>
void check_every_code(uint32_t codes, uint32_t top) {
    for (uint32_t code = 0; code <= top; ++code) {
        const float value = Format::widen(code);
        CHECK_EQ(Format::narrow(value), code);
        CHECK_EQ(Format::narrow(-value), code | codes / 2);
        if (code == top) continue;
        const float middle = value / 2 + Format::widen(code + 1) / 2;
        CHECK_EQ(Format::narrow(middle), code + code % 2);
        CHECK_EQ(Format::narrow(std::nextafter(middle, 0.0f)), code);
        CHECK_EQ(Format::narrow(std::nextafter(middle, INFINITY)), code + 1);
    }
}

TEST(small_floats_are_rounded_to_nearest_even) {
    check_every_code<E4m3>(256, 0x7E);
    check_every_code<Fp16>(65536, 0x7BFF);
    check_every_code<Bf16>(65536, 0x7F7F);
    CHECK_EQ(E4m3::narrow(1e9f), 0x7Eu);
    CHECK_EQ(Fp16::narrow(-65520.0f), 0xFBFFu);
    CHECK_EQ(Bf16::narrow(3.4e38f), 0x7F7Fu);
    CHECK_EQ(bf16_up(1.0f), 1.0f);
    CHECK_EQ(bf16_up(1.001f), 1.0078125f);
    CHECK_EQ(bf16_down(1.001f), 1.0f);
    CHECK_EQ(bf16_down(-1.001f), -1.0078125f);
}

}  // namespace
}  // namespace kvwire
