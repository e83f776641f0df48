#include <algorithm>
#include <memory>

#include "checksum/crc32c.hpp"
#include "tests/link_world.hpp"
#include "wire/chunk_coder.hpp"
#include "wire/chunk_rounder.hpp"
#include "wire/link_tables.hpp"
#include "wire/share.hpp"

using namespace kvwire;
using namespace kvwire::test;

namespace {

ByteSpan span(const Bytes& bytes) { return {bytes.data(), bytes.size()}; }

// Names, answers and tables, until nothing is left to be said.
void exchange(SendTables& sender, ReceiveTables& receiver) {
    for (auto names = sender.names_to_say(); !names.empty(); names = sender.names_to_say()) {
        const Bytes answers = encode(receiver.on_names(span(encode(names))));
        for (const Bytes& table : sender.on_answers(span(answers))) {
            const TableAnswer answer = receiver.on_table(span(table));
            CHECK_EQ(answer.state, TableState::KNOWN);
            sender.on_answers(span(encode(std::vector<TableAnswer>{answer})));
        }
    }
}

}  // namespace

TEST(rounded_chunks_have_the_same_bytes_on_every_attempt) {
    size_t of_link = 0;
    for (uint64_t seed = 0; seed < 60; ++seed) {
        Random random(seed);
        const uint64_t start = pick(random, 0, 20), stop = start + pick(random, 130, 900);
        const Manifest manifest = hybrid(start, stop, 0, 1, seed % 2 ? 16 : 0);
        const std::vector<Item> items = all_items(manifest);
        Memory source(manifest, random, seed % 2), target(manifest, random, seed / 2 % 2);
        const Placement from = placed(manifest, items, *source.map);
        const Placement to = placed(manifest, items, *target.map);
        const uint32_t chunk_bytes = uint32_t(4096 * pick(random, 1, 4));
        const auto book = std::make_shared<CodeBook>();
        const auto exact = seed % 5 ? std::make_shared<SegmentCoding>(book, chunk_bytes) : nullptr;
        SegmentRounding rounding(roundings_of(manifest, random), exact, book, chunk_bytes, stop);
        for (const Item& item : items) {
            if (exact) exact->append(manifest.model, manifest.groups[item.group], item);
            rounding.append(manifest.model, manifest.groups[item.group], item);
        }
        CHECK(rounding.rounds_anything());
        SendTables sent;
        ReceiveTables known(std::make_shared<TableStore>(), std::make_shared<Pool>());
        ChunkRounder rounder;
        ChunkDecoder decoder;
        for (uint64_t offset = 0; offset < from.bytes(); offset += chunk_bytes) {
            FrameHeader header;
            header.raw_offset = offset;
            header.raw_bytes = uint32_t(std::min<uint64_t>(chunk_bytes, from.bytes() - offset));
            Bytes body;
            std::vector<uint32_t> crcs;
            for (header.attempt = 0; header.attempt < 3; ++header.attempt) {
                rounder.encode(from, rounding, &sent, &header, &body);
                crcs.push_back(header.raw_crc);
                CHECK(header.payload_bytes <= header.raw_bytes);
                CHECK_EQ(crc32c(0, body.data(), header.payload_bytes), header.payload_crc);
                if (Codec(header.codec) != Codec::QUANTISED) continue;
                const Landing landing = decoder.decode(header, body.data(), to, &known);
                CHECK_EQ(landing.verdict, ErrorCode::OK);
                CHECK_EQ(landing.crc, header.raw_crc);
                const Landing bare = decoder.decode(header, body.data(), to, nullptr);
                if (header.attempt == 0 && bare.verdict == ErrorCode::TABLE_UNKNOWN) ++of_link;
                else CHECK_EQ(bare.verdict, ErrorCode::OK);
            }
            CHECK_EQ(header.codec, uint8_t(Codec::RAW));
            CHECK(crcs[0] == crcs[1] && crcs[1] == crcs[2]);
            exchange(sent, known);
        }
        CHECK(target.only_own_bytes_changed());
    }
    CHECK(of_link > 50);
}
