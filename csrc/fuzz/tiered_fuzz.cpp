// The tiered code: what is coded comes back and every variant writes the same; whatever is decoded,
// the variants agree, and nothing outside the buffers is touched.

#include "fuzz/fuzz.hpp"
#include "tests/tiered_world.hpp"

namespace kvwire {
namespace {

using namespace fuzz;

constexpr size_t ELEMENTS_MAX = STRIP_ELEMENTS + 500;
constexpr uint32_t LINK_TABLE = 7;

void decode_by_all(const Bytes& payload, size_t raw_bytes, const std::map<uint32_t, Table>& tables,
                   const Bytes* expected) {
    const Decoded first = decode_fenced("portable", payload, raw_bytes, tables);
    if (expected) CHECK(first == (Decoded{ErrorCode::OK, *expected}));
    for (const char* variant : supported_variants())
        CHECK(decode_fenced(variant, payload, raw_bytes, tables) == first);
}

// One to three parts: as they are coded, and damaged.
void round_trip(Random& choices) {
    std::vector<CodedPart> parts;
    std::map<uint32_t, Table> tables;
    Bytes raw;
    for (uint64_t left = pick(choices, 1, 3); left > 0; --left) {
        const uint8_t dtype = uint8_t(pick(choices, 1, 5));
        const Table table = any_table(dtype, choices);
        const uint64_t many = pick(choices, 0, 9);
        const size_t count = pick(choices, 1, many == 0 ? ELEMENTS_MAX : 100);
        const size_t before = raw.size(), bytes = count * table->format().item_bytes;
        raw.resize(before + bytes);
        fill_elements(&raw[before], count, dtype, choices);
        const uint64_t how = pick(choices, 0, 3);
        CodedPart part{uint32_t(bytes), nullptr, 0, TABLE_INSIDE};
        if (how > 0) {
            part.table = table;
            part.position = uint32_t(pick(choices, 0, table->period() - 1));
        }
        if (how == 2 && !tables.count(LINK_TABLE)) {
            part.table_index = LINK_TABLE;
            tables[LINK_TABLE] = table;
        }
        parts.push_back(part);
    }
    const size_t room = tiered_bytes_max(parts);
    Bytes payload = encode_fenced("portable", parts, raw, room);
    CHECK(!payload.empty());
    for (const char* variant : supported_variants())
        CHECK(encode_fenced(variant, parts, raw, room) == payload);
    decode_by_all(payload, raw.size(), tables, &raw);
    const size_t less = pick(choices, 0, payload.size() - 1);
    const std::vector<const char*> variants = supported_variants();
    const char* const any = variants[pick(choices, 0, variants.size() - 1)];
    CHECK(encode_fenced(any, parts, raw, less).empty());
    change(payload, choices);
    decode_by_all(payload, raw.size(), tables, nullptr);
}

}  // namespace
}  // namespace kvwire

// The first byte says what to do; then, of a payload, its raw length.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace kvwire;
    if (size < 3) return 0;
    return fuzz::run([&] {
        if (data[0] & 1) {
            decode_by_all(Bytes(data + 3, data + size), load_le<uint16_t>(data + 1), {}, nullptr);
        } else {
            Random choices(ByteSpan{data + 1, size - 1});
            round_trip(choices);
        }
    });
}
