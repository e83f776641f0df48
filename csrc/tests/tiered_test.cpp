#include "codec/tiered.hpp"

#include "base/bytes.hpp"
#include "tests/test.hpp"
#include "tests/tiered_world.hpp"

namespace kvwire {
namespace {

using namespace test;
using Bytes = std::vector<uint8_t>;

constexpr uint8_t DTYPES[] = {1, 2, 3, 4, 5};

struct Sample {
    std::vector<CodedPart> parts;
    Bytes raw;
};

// A part of `count` elements.
Sample sample_of(uint8_t dtype, size_t count, Random& random) {
    const Table table = any_table(dtype, random);
    Sample sample;
    sample.raw.resize(count * table->format().item_bytes);
    fill_elements(sample.raw.data(), count, dtype, random);
    const uint32_t position = uint32_t(pick(random, 0, table->period() - 1));
    sample.parts = {CodedPart{uint32_t(sample.raw.size()), table, position, TABLE_INSIDE}};
    return sample;
}

Bytes encoded(const Sample& sample) {
    return encode_fenced("portable", sample.parts, sample.raw, tiered_bytes_max(sample.parts));
}

void check_all_variants(const Sample& sample) {
    const Bytes payload = encoded(sample);
    CHECK(!payload.empty());
    for (const char* variant : supported_variants()) {
        CHECK(encode_fenced(variant, sample.parts, sample.raw, tiered_bytes_max(sample.parts)) ==
              payload);
        CHECK(decode_fenced(variant, payload, sample.raw.size()) ==
              (Decoded{ErrorCode::OK, sample.raw}));
    }
}

TEST(tiered_variants_agree_within_their_buffers_at_every_length) {
    Random random(1);
    for (const uint8_t dtype : DTYPES) {
        for (size_t count = 1; count <= 260; ++count)
            check_all_variants(sample_of(dtype, count, random));
        for (const size_t count : {4095, 4096, 4097, 4159, 4160, 8191, 8192, 12345})
            for (int round = 0; round < 4; ++round)
                check_all_variants(sample_of(dtype, count, random));
    }
}

// Longer than what is spread out ahead of time: heads x (keys | values), as states have.
TEST(tiered_variants_agree_where_bases_are_worked_out_strip_by_strip) {
    Random random(3);
    for (const uint8_t dtype : DTYPES) {
        for (const uint32_t values : {31, 64, 100, 128}) {
            const BasePattern pattern{{1, 8, 64, values * 2}, 0b0110, 0b1010};
            std::vector<uint8_t> bases(size_t(pattern.row_count() + pattern.column_count()));
            for (uint8_t& base : bases)
                base = uint8_t(pick(random, 0, (1u << element_format(dtype)->exponent_bits) - 1));
            Sample sample;
            const Table table = CodeTable::make(dtype, {2, 2}, {0, 1, 2, 3, 4, 5}, pattern, bases);
            CHECK(table != nullptr);
            const size_t count = 4096 + pick(random, 0, 4200);
            sample.raw.resize(count * table->format().item_bytes);
            fill_elements(sample.raw.data(), count, dtype, random);
            sample.parts = {CodedPart{uint32_t(sample.raw.size()), table,
                                      uint32_t(pick(random, 0, table->period() - 1)),
                                      TABLE_INSIDE}};
            check_all_variants(sample);
        }
    }
}

TEST(tiered_code_shrinks_what_crowds) {
    constexpr size_t count = 4096;
    Random random(2);
    const Table table = CodeTable::make(3, {2, 2}, {0, 1, 2, 3, 4, 5}, {}, {128 - 8});
    Sample sample = {{CodedPart{2 * count, table, 0, TABLE_INSIDE}}, Bytes(2 * count)};
    for (size_t i = 0; i < count; ++i) {
        const uint64_t exponent = 128 - 8 + uint64_t(__builtin_ctzll(random() | 1 << 5));
        store_le<uint16_t>(&sample.raw[2 * i], uint16_t(exponent << 7 | (random() & 0x807F)));
    }
    check_all_variants(sample);
    CHECK(encoded(sample).size() < sample.raw.size() * 69 / 100);
}

TEST(tiered_encoder_stays_within_its_room) {
    Random random(3);
    for (const uint8_t dtype : DTYPES) {
        const Sample sample = sample_of(dtype, 300, random);
        const Bytes payload = encoded(sample);
        for (const char* variant : supported_variants()) {
            for (size_t out_max = 0; out_max <= payload.size(); ++out_max) {
                const Bytes found = encode_fenced(variant, sample.parts, sample.raw, out_max);
                CHECK(found.empty() || (found == payload && out_max == payload.size()));
            }
        }
    }
}

TEST(tiered_decoders_agree_on_every_flipped_bit_and_every_length) {
    Random random(4);
    for (const uint8_t dtype : DTYPES) {
        const Sample sample = sample_of(dtype, 90, random);
        Bytes payload = encoded(sample);
        size_t refused = 0;
        const auto check = [&](const Bytes& bytes) {
            const Decoded first = decode_fenced("portable", bytes, sample.raw.size());
            for (const char* variant : supported_variants())
                CHECK(decode_fenced(variant, bytes, sample.raw.size()) == first);
            refused += first.code != ErrorCode::OK;
        };
        for (size_t bit = 0; bit < 8 * payload.size(); ++bit) {
            payload[bit / 8] ^= uint8_t(1 << bit % 8);
            check(payload);
            payload[bit / 8] ^= uint8_t(1 << bit % 8);
        }
        CHECK(refused > 0);
        for (size_t size = 0; size < payload.size(); ++size) {
            CHECK(decode_fenced("portable", Bytes(payload.begin(), payload.begin() + long(size)),
                                sample.raw.size())
                      .code == ErrorCode::CODED_INVALID);
        }
        for (const size_t raw_bytes : {size_t(0), sample.raw.size() - 1, sample.raw.size() + 1})
            CHECK(decode_fenced("portable", payload, raw_bytes).code == ErrorCode::CODED_INVALID);
    }
}

TEST(tiered_parts_of_many_kinds_in_one_payload) {
    Random random(5);
    std::map<uint32_t, Table> tables;
    Sample sample;
    for (uint32_t number = 1; number <= 40; ++number) {
        Sample one = sample_of(DTYPES[number % 5], pick(random, 1, 5000), random);
        CodedPart part = one.parts[0];
        if (number % 3 == 0) {
            part.table_index = number;
            tables[number] = part.table;
        } else if (number % 3 == 1) {
            part = CodedPart{part.raw_bytes, nullptr, 0, TABLE_INSIDE};
        }
        sample.parts.push_back(part);
        sample.raw.insert(sample.raw.end(), one.raw.begin(), one.raw.end());
    }
    const Bytes payload = encoded(sample);
    for (const char* variant : supported_variants()) {
        CHECK(encode_fenced(variant, sample.parts, sample.raw, tiered_bytes_max(sample.parts)) ==
              payload);
        CHECK(decode_fenced(variant, payload, sample.raw.size(), tables) ==
              (Decoded{ErrorCode::OK, sample.raw}));
    }
    TieredDecoder decoder;
    const auto none = [](uint32_t) { return nullptr; };
    CHECK_EQ(decoder.begin(payload.data(), payload.size(), sample.raw.size(), none),
             ErrorCode::TABLE_UNKNOWN);
    CHECK_EQ(decoder.table_missing(), 3u);
    CHECK_EQ(decoder.next_bytes(), 0u);
}

TEST(tiered_coders_are_ready_for_the_next_chunk) {
    Random random(6);
    TieredEncoder encoder;
    TieredDecoder decoder;
    for (int round = 0; round < 50; ++round) {
        const Sample sample = sample_of(DTYPES[round % 5], pick(random, 1, 9000), random);
        const Bytes payload = encoded(sample);
        const size_t room = round % 7 == 6 ? payload.size() / 2 : tiered_bytes_max(sample.parts);
        Bytes out(room), raw(sample.raw.size());
        encoder.begin(sample.parts, out.data(), room);
        for (size_t at = 0, bytes; (bytes = encoder.next_bytes()) > 0; at += bytes)
            encoder.strip(sample.raw.data() + at);
        const size_t coded = encoder.finish();
        CHECK_EQ(coded, round % 7 == 6 ? 0 : payload.size());
        if (coded == 0) continue;
        const size_t size = round % 5 == 4 ? coded - 1 : coded;  // sometimes refused
        const ErrorCode code = decoder.begin(out.data(), size, raw.size(), nullptr);
        CHECK_EQ(code, size == coded ? ErrorCode::OK : ErrorCode::CODED_INVALID);
        for (size_t at = 0, bytes; (bytes = decoder.next_bytes()) > 0; at += bytes)
            CHECK(decoder.strip(raw.data() + at));
        CHECK(size != coded || raw == sample.raw);
    }
}

}  // namespace
}  // namespace kvwire
