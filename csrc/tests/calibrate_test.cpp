#include "codec/calibrate.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <stdexcept>

#include "tests/test.hpp"

namespace kvwire {
namespace {

constexpr uint8_t FP32 = 1, FP16 = 2, BF16 = 3, E4M3 = 4, E5M2 = 5, INT8 = 6;

uint16_t bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return uint16_t(bits >> 16);
}

// `tokens` of normal values, each channel with a scale of its own.
std::vector<uint8_t> channels(size_t tokens, size_t count) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    std::vector<float> scales(count);
    for (float& scale : scales) scale = std::exp2(3 * normal(random));
    std::vector<uint8_t> raw(tokens * count * 2);
    for (size_t i = 0; i < tokens * count; ++i) {
        const uint16_t value = bf16(normal(random) * scales[i % count]);
        std::memcpy(raw.data() + 2 * i, &value, 2);
    }
    return raw;
}

}  // namespace

TEST(calibrate_gives_bases_to_what_needs_them) {
    const auto raw = channels(200, 96);
    Calibrator calibrator(BF16, {1, 1, 3, 32}, {{0, 0}, {4, 0}, {12, 0}});
    calibrator.add(0, raw.data(), raw.size() / 2);
    CHECK_EQ(calibrator.elements(), raw.size() / 2);
    const Calibration made = calibrator.finish();
    CHECK_EQ(made.table->pattern().row_axes, 12);
    CHECK_EQ(made.table->pattern().column_axes, 0);
    CHECK_EQ(made.table->period(), 96u);
    CHECK(made.exponent_bits < 2.8);
    CHECK(made.table->offset_stop() <= 32);
}

TEST(calibrate_takes_samples_in_any_pieces) {
    const auto raw = channels(64, 96);
    const auto finish = [&](size_t piece, size_t shift) {
        std::vector<uint8_t> moved(shift);
        moved.insert(moved.end(), raw.begin(), raw.end());
        Calibrator calibrator(BF16, {1, 1, 1, 96}, {{8, 0}});
        for (size_t at = 0; at < raw.size() / 2; at += piece) {
            const size_t count = std::min(piece, raw.size() / 2 - at);
            calibrator.add(at + 96'000'000'000, moved.data() + shift + 2 * at, count);
        }
        return calibrator.finish();
    };
    const Calibration whole = finish(raw.size() / 2, 0);
    CHECK(finish(96, 0).table->bytes() == whole.table->bytes());
    CHECK(finish(96, 1).table->bytes() == whole.table->bytes());
    // Pieces that cut lines make other stretches: another table, but as good a one.
    CHECK(std::abs(finish(61, 1).exponent_bits - whole.exponent_bits) < 0.01);
}

TEST(calibrate_makes_a_table_of_anything) {
    for (const uint8_t dtype : {FP32, FP16, BF16, E4M3, E5M2}) {
        const size_t item_bytes = element_format(dtype)->item_bytes;
        for (const int fill : {0x00, 0x01, 0x7F, 0x80, 0xFF}) {
            for (const size_t elements : {0, 1, 2, 63, 5000}) {
                const std::vector<uint8_t> raw(elements * item_bytes, uint8_t(fill));
                Calibrator calibrator(dtype, {2, 3, 5, 7}, {{0, 0}, {15, 0}, {6, 8}, {1, 1}});
                calibrator.add(11, raw.data(), elements);
                const Calibration made = calibrator.finish();
                CHECK(made.table != nullptr);
                CHECK_EQ(made.table->dtype(), dtype);
                // All are alike: the narrowest digit tells them from nothing.
                CHECK_EQ(made.exponent_bits, elements ? 1.0 : 0.0);
            }
        }
    }
}

TEST(calibrate_passes_over_candidates_that_no_table_may_have) {
    const std::vector<uint8_t> raw(4096);
    Calibrator calibrator(FP32, {1, 70'000, 2, 1}, {{2, 0}, {16, 0}, {0, 255}, {2, 2}});
    calibrator.add(0, raw.data(), 1024);
    CHECK_EQ(calibrator.finish().table->pattern().row_axes, 0);
    CHECK_EQ(calibrator.finish().table->pattern().column_axes, 0);
}

TEST(calibrate_refuses_what_has_no_code) {
    const auto throws = [](uint8_t dtype, std::array<uint32_t, 4> extents) {
        try {
            Calibrator calibrator(dtype, extents, {});
        } catch (const std::invalid_argument&) {
            return true;
        }
        return false;
    };
    CHECK(throws(INT8, {1, 1, 1, 1}));
    CHECK(throws(0, {1, 1, 1, 1}));
    CHECK(throws(BF16, {1, 0, 1, 1}));
    CHECK(throws(BF16, {1, 1 << 16, 1 << 15, 1}));
    CHECK(!throws(BF16, {1, 1, 1, 1}));
}

TEST(calibrate_counts_what_a_table_costs) {
    const auto raw = channels(200, 96);
    const auto rows = [&](uint64_t elements_to_code) {
        Calibrator calibrator(BF16, {1, 1, 1, 96}, {{0, 0}, {8, 0}}, elements_to_code);
        calibrator.add(0, raw.data(), raw.size() / 2);
        return calibrator.finish().table->pattern().row_axes;
    };
    CHECK_EQ(rows(0), 8);
    CHECK_EQ(rows(1 << 20), 8);
    CHECK_EQ(rows(96), 0);
}

TEST(sample_runs_meet_all_rows_and_columns) {
    constexpr uint64_t HEADS = 4, ROWS = 64, COLUMNS = 128, ALL = HEADS * ROWS * COLUMNS;
    for (const uint64_t wanted : {ALL / 2, ALL / 3, ALL / 5, ALL / 8}) {
        std::vector<uint64_t> rows(HEADS * ROWS), columns(HEADS * COLUMNS);
        uint64_t seen = 0, stop = 0;
        for (const SampleRun& run : sample_runs(ALL, wanted)) {
            CHECK(run.start >= stop);
            stop = run.start + run.elements;
            for (uint64_t i = run.start; i < stop; ++i, ++seen) {
                ++rows[i / COLUMNS];
                ++columns[i / COLUMNS / ROWS * COLUMNS + i % COLUMNS];
            }
        }
        CHECK(stop <= ALL);
        CHECK(seen >= wanted && seen <= 2 * wanted);
        const auto fair = [&](const std::vector<uint64_t>& lines) {
            const uint64_t share = seen / lines.size();
            return *std::min_element(lines.begin(), lines.end()) * 2 >= share;
        };
        CHECK(fair(columns));
        if (wanted >= ALL / 2) CHECK(fair(rows));
    }
    CHECK_EQ(sample_runs(0, 5).size(), 0u);
    CHECK_EQ(sample_runs(100, 100).size(), 1u);
    CHECK_EQ(sample_runs(100, 51).size(), 1u);
}

}  // namespace kvwire
