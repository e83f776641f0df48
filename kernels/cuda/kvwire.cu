// The kernels, one block of THREADS threads for each unit of work; compiled into a fatbin that
// kernels/driver.py loads. Arguments are addresses of device memory.
#include "tiered.cuh"

using namespace kvwire;

namespace {

struct CopyRoom {
    int scan[WARPS + 1];
    uint8_t* addresses[2048];
};

template <class Word, bool PACK>
__device__ void copy_block(const Leg* legs, const int64_t* tile_starts, int64_t leg_count,
                           const int64_t* block_ids, uint8_t* segment, int64_t* bad_entry,
                           int rows, int words) {
    __shared__ CopyRoom room;
    DeviceCta cta(room.scan);
    copy_tile<Word, PACK>(cta, blockIdx.x, legs, tile_starts, leg_count, block_ids, segment,
                          bad_entry, rows, words, room.addresses);
}

}  // namespace

#define KVWIRE_COPY(NAME, WORD, PACK)                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS)                                        \
    NAME(const Leg* legs, const int64_t* tile_starts, int64_t leg_count,                         \
         const int64_t* block_ids, uint8_t* segment, int64_t* bad_entry, int rows, int words) {  \
        copy_block<WORD, PACK>(legs, tile_starts, leg_count, block_ids, segment, bad_entry,      \
                               rows, words);                                                     \
    }

KVWIRE_COPY(kvwire_pack_1, uint8_t, true)
KVWIRE_COPY(kvwire_pack_2, uint16_t, true)
KVWIRE_COPY(kvwire_pack_4, uint32_t, true)
KVWIRE_COPY(kvwire_pack_8, uint64_t, true)
KVWIRE_COPY(kvwire_pack_16, Word16, true)
KVWIRE_COPY(kvwire_unpack_1, uint8_t, false)
KVWIRE_COPY(kvwire_unpack_2, uint16_t, false)
KVWIRE_COPY(kvwire_unpack_4, uint32_t, false)
KVWIRE_COPY(kvwire_unpack_8, uint64_t, false)
KVWIRE_COPY(kvwire_unpack_16, Word16, false)

// A block for each chunk. Two to a multiprocessor leave it registers enough not to spill.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
kvwire_encode(uint8_t* bytes, const Leg* legs, int64_t leg_count, const int64_t* block_ids,
              int64_t* bad_entry, const ChunkRow* chunks, const PartRow* parts,
              const uint8_t* blob, const CrcTables* crc_tables, uint8_t* out, uint8_t* tails,
              int64_t* coded_bytes, uint32_t* crcs) {
    __shared__ StripMemory memory;
    __shared__ int room[WARPS + 1];
    DeviceCta cta(room);
    const Segment segment = {bytes, legs, leg_count, block_ids, bad_entry};
    encode_chunk(cta, segment, chunks[blockIdx.x], parts, blob, crc_tables, out, tails,
                 coded_bytes + blockIdx.x, crcs + blockIdx.x, memory);
}

// A block for each strip of one format.
extern "C" __global__ void __launch_bounds__(THREADS)
kvwire_decode(uint8_t* bytes, const Leg* legs, int64_t leg_count, const int64_t* block_ids,
              int64_t* bad_entry, const uint8_t* coded, const StripRow* strips,
              const int64_t* numbers, int64_t dtype, int64_t tier_bits, const uint8_t* blob,
              const CrcTables* crc_tables, const int64_t* chunk_stops, uint32_t* crcs,
              int32_t* chunk_invalid) {
    __shared__ ReadMemory memory;
    __shared__ int room[WARPS + 1];
    DeviceCta cta(room);
    const Segment segment = {bytes, legs, leg_count, block_ids, bad_entry};
    decode_strip(cta, coded, strips[numbers[blockIdx.x]], dtype, tier_bits, blob, segment,
                 crc_tables, chunk_stops, crcs, chunk_invalid, memory);
}

// Block (x, y) takes STRIP_BYTES_MAX bytes of chunk x (offset, bytes), the y-th from its start.
extern "C" __global__ void __launch_bounds__(THREADS)
kvwire_crc(uint8_t* bytes, const Leg* legs, int64_t leg_count, const int64_t* block_ids,
           int64_t* bad_entry, const int64_t* chunks, const CrcTables* crc_tables,
           uint32_t* crcs) {
    __shared__ StripMemory memory;
    __shared__ int room[WARPS + 1];
    DeviceCta cta(room);
    const int64_t size = chunks[2 * blockIdx.x + 1];
    const int64_t at = int64_t(blockIdx.y) * STRIP_BYTES_MAX, left = size - at;
    if (left <= 0) return;
    const int count = int(left < STRIP_BYTES_MAX ? left : STRIP_BYTES_MAX);
    const Segment segment = {bytes, legs, leg_count, block_ids, bad_entry};
    crc_range(cta, segment, *crc_tables, chunks[2 * blockIdx.x] + at, count, left - count,
              crcs + blockIdx.x, memory);
}
