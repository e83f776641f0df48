// The kernels; compiled into a fatbin that kernels/driver.py loads. Arguments are addresses of
// device memory. A block of THREADS threads goes from one unit of work to the next, so that a grid
// of any size does it all: a small one leaves the engine its multiprocessors. Nothing is allocated
// and nobody waited for, so a CUDA graph may capture them; arguments must then stay as they were.
#include "tiered.cuh"

using namespace kvwire;

namespace {

template <class Word, bool PACK, class Change>
__device__ void copy_block(int64_t tile_count, const Leg* legs, const int64_t* tile_starts,
                           int64_t leg_count, const int64_t* block_ids, uint8_t* segment,
                           int64_t* bad_entry, int rows, int words) {
    __shared__ Tile room;
    DeviceCta cta(nullptr);
#pragma unroll 1
    for (int64_t tile = blockIdx.x; tile < tile_count; tile += gridDim.x)
        copy_tile<Word, PACK, Change>(cta, tile, legs, tile_starts, leg_count, block_ids, segment,
                                     bad_entry, rows, words, room);
}

}  // namespace

#define KVWIRE_COPY(NAME, WORD, PACK, CHANGE)                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                     \
    NAME(int64_t tile_count, const Leg* legs, const int64_t* tile_starts, int64_t leg_count,     \
         const int64_t* block_ids, uint8_t* segment, int64_t* bad_entry, int rows, int words) {  \
        copy_block<WORD, PACK, CHANGE>(tile_count, legs, tile_starts, leg_count, block_ids,      \
                                       segment, bad_entry, rows, words);                         \
    }

KVWIRE_COPY(kvwire_pack_1, uint8_t, true, AsItIs)
KVWIRE_COPY(kvwire_pack_2, uint16_t, true, AsItIs)
KVWIRE_COPY(kvwire_pack_4, uint32_t, true, AsItIs)
KVWIRE_COPY(kvwire_pack_8, uint64_t, true, AsItIs)
KVWIRE_COPY(kvwire_pack_16, Word16, true, AsItIs)
KVWIRE_COPY(kvwire_unpack_1, uint8_t, false, AsItIs)
KVWIRE_COPY(kvwire_unpack_2, uint16_t, false, AsItIs)
KVWIRE_COPY(kvwire_unpack_4, uint32_t, false, AsItIs)
KVWIRE_COPY(kvwire_unpack_8, uint64_t, false, AsItIs)
KVWIRE_COPY(kvwire_unpack_16, Word16, false, AsItIs)
KVWIRE_COPY(kvwire_narrow_2, uint16_t, true, ToE4m3)
KVWIRE_COPY(kvwire_narrow_8, uint64_t, true, ToE4m3)

// By chunks. Two blocks to a multiprocessor leave it registers enough not to spill.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
kvwire_encode(int64_t chunk_count, uint8_t* bytes, const Leg* legs, int64_t leg_count,
              const int64_t* block_ids, int64_t* bad_entry, const ChunkRow* chunks,
              const PartRow* parts, const uint8_t* blob, const CrcTables* crc_tables,
              uint8_t* out, uint8_t* tails, int64_t* coded_bytes, uint32_t* crcs) {
    __shared__ StripMemory memory;
    __shared__ int room[WARPS + 1];
    DeviceCta cta(room);
    const Segment segment = {bytes, legs, leg_count, block_ids, bad_entry};
    for (int64_t i = blockIdx.x; i < chunk_count; i += gridDim.x) {
        encode_chunk(cta, segment, chunks[i], parts, blob, crc_tables, out, tails,
                     coded_bytes + i, crcs + i, memory);
        cta.sync();
    }
}

// By strips of one format.
extern "C" __global__ void __launch_bounds__(THREADS)
kvwire_decode(int64_t count, uint8_t* bytes, const Leg* legs, int64_t leg_count,
              const int64_t* block_ids, int64_t* bad_entry, const uint8_t* coded,
              const StripRow* strips, const int64_t* numbers, int64_t dtype, int64_t tier_bits,
              const uint8_t* blob, const CrcTables* crc_tables, const int64_t* chunk_stops,
              uint32_t* crcs, int32_t* chunk_invalid) {
    __shared__ ReadMemory memory;
    __shared__ int room[WARPS + 1];
    DeviceCta cta(room);
    const Segment segment = {bytes, legs, leg_count, block_ids, bad_entry};
    for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
        decode_strip(cta, coded, strips[numbers[i]], dtype, tier_bits, blob, segment, crc_tables,
                     chunk_stops, crcs, chunk_invalid, memory);
        cta.sync();
    }
}

// By chunks (offset, bytes); block (x, y) takes the y-th STRIP_BYTES_MAX from their starts.
extern "C" __global__ void __launch_bounds__(THREADS)
kvwire_crc(int64_t chunk_count, uint8_t* bytes, const Leg* legs, int64_t leg_count,
           const int64_t* block_ids, int64_t* bad_entry, const int64_t* chunks,
           const CrcTables* crc_tables, uint32_t* crcs) {
    __shared__ StripMemory memory;
    __shared__ int room[WARPS + 1];
    DeviceCta cta(room);
    const Segment segment = {bytes, legs, leg_count, block_ids, bad_entry};
    for (int64_t i = blockIdx.x; i < chunk_count; i += gridDim.x) {
        const int64_t size = chunks[2 * i + 1];
        const int64_t at = int64_t(blockIdx.y) * STRIP_BYTES_MAX, left = size - at;
        if (left <= 0) continue;
        const int count = int(left < STRIP_BYTES_MAX ? left : STRIP_BYTES_MAX);
        crc_range(cta, segment, *crc_tables, chunks[2 * i] + at, count, left - count, crcs + i,
                  memory);
        cta.sync();
    }
}
