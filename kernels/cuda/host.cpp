// The same device functions on a CPU, block after block, for the property tests.
#include "tiered.cuh"

using namespace kvwire;

namespace {

enum Verb { UNPACK, PACK, NARROW };

template <class Word>
void copy_all(int verb, int64_t tiles, const Leg* legs, const int64_t* tile_starts,
              int64_t leg_count, const int64_t* block_ids, uint8_t* segment, int64_t* bad_entry,
              int rows, int words) {
    HostCta cta;
    Tile room;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        if constexpr (sizeof(Word) == 2 || sizeof(Word) == 8)
            if (verb == NARROW) {
                copy_tile<Word, true, ToE4m3>(cta, tile, legs, tile_starts, leg_count, block_ids,
                                              segment, bad_entry, rows, words, room);
                continue;
            }
        if (verb == PACK)
            copy_tile<Word, true>(cta, tile, legs, tile_starts, leg_count, block_ids, segment,
                                  bad_entry, rows, words, room);
        else
            copy_tile<Word, false>(cta, tile, legs, tile_starts, leg_count, block_ids, segment,
                                   bad_entry, rows, words, room);
    }
}

}  // namespace

extern "C" {

void kvwire_host_copy(int verb, int word_bytes, int64_t tiles, const Leg* legs,
                      const int64_t* tile_starts, int64_t leg_count, const int64_t* block_ids,
                      uint8_t* segment, int64_t* bad_entry, int rows, int words) {
    const auto copy = word_bytes == 16  ? copy_all<Word16>
                      : word_bytes == 8 ? copy_all<uint64_t>
                      : word_bytes == 4 ? copy_all<uint32_t>
                      : word_bytes == 2 ? copy_all<uint16_t>
                                        : copy_all<uint8_t>;
    copy(verb, tiles, legs, tile_starts, leg_count, block_ids, segment, bad_entry, rows, words);
}

void kvwire_host_encode(int64_t chunk_count, uint8_t* bytes, const Leg* legs, int64_t leg_count,
                        const int64_t* block_ids, int64_t* bad_entry, const ChunkRow* chunks,
                        const PartRow* parts, const uint8_t* blob, const CrcTables* crc_tables,
                        uint8_t* out, uint8_t* tails, int64_t* coded_bytes, uint32_t* crcs) {
    HostCta cta;
    StripMemory memory;
    const Segment segment = {bytes, legs, leg_count, block_ids, bad_entry};
    for (int64_t i = 0; i < chunk_count; ++i)
        encode_chunk(cta, segment, chunks[i], parts, blob, crc_tables, out, tails,
                     coded_bytes + i, crcs + i, memory);
}

void kvwire_host_decode(int64_t count, uint8_t* bytes, const Leg* legs, int64_t leg_count,
                        const int64_t* block_ids, int64_t* bad_entry, const uint8_t* coded,
                        const StripRow* strips, const int64_t* numbers, int64_t dtype,
                        int64_t tier_bits, const uint8_t* blob, const CrcTables* crc_tables,
                        const int64_t* chunk_stops, uint32_t* crcs, int32_t* chunk_invalid) {
    HostCta cta;
    ReadMemory memory;
    const Segment segment = {bytes, legs, leg_count, block_ids, bad_entry};
    for (int64_t i = 0; i < count; ++i)
        decode_strip(cta, coded, strips[numbers[i]], dtype, tier_bits, blob, segment, crc_tables,
                     chunk_stops, crcs, chunk_invalid, memory);
}

void kvwire_host_crc(int64_t chunk_count, uint8_t* bytes, const Leg* legs, int64_t leg_count,
                     const int64_t* block_ids, int64_t* bad_entry, const int64_t* chunks,
                     const CrcTables* crc_tables, uint32_t* crcs) {
    HostCta cta;
    StripMemory memory;
    const Segment segment = {bytes, legs, leg_count, block_ids, bad_entry};
    for (int64_t i = 0; i < chunk_count; ++i)
        for (int64_t at = 0; at < chunks[2 * i + 1]; at += STRIP_BYTES_MAX) {
            const int64_t left = chunks[2 * i + 1] - at;
            const int count = int(left < STRIP_BYTES_MAX ? left : STRIP_BYTES_MAX);
            crc_range(cta, segment, *crc_tables, chunks[2 * i] + at, count, left - count,
                      crcs + i, memory);
        }
}

}  // extern "C"
