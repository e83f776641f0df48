// The kernels; compiled into a fatbin that kernels/driver.py loads. Arguments are addresses of
// device memory. A block of THREADS threads goes from one unit of work to the next, so that a grid
// of any size does it all: a small one leaves the engine its multiprocessors. Nothing is allocated
// and nobody waited for, so a CUDA graph may capture them; arguments must then stay as they were.
#include "decode.cuh"
#include "encode.cuh"

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

// By chunks. With three blocks to a multiprocessor, some of a loop's state is spilled.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
kvwire_encode(int64_t chunk_count, uint8_t* bytes, const Leg* legs, int64_t leg_count,
              const int64_t* block_ids, int64_t* bad_entry, const ChunkRow* chunks,
              const PartRow* parts, const uint8_t* blob, const CrcTables* crc_tables,
              uint8_t* out, uint8_t* tails, int64_t* coded_bytes, uint32_t* crcs) {
    __shared__ EncodeMemory memory;
    DeviceCta cta(memory.scan);
    RunningCrc crc(crc_tables, memory.crc);
    const Segment segment = {bytes, legs, leg_count, block_ids, bad_entry};
    for (int64_t i = blockIdx.x; i < chunk_count; i += gridDim.x)
        encode_chunk(cta, segment, chunks[i], parts, blob, crc, out, tails, coded_bytes + i,
                     crcs + i, memory);
}

// By strips of one format; each block takes as many, one after another.
#define KVWIRE_DECODE(WIDTH)                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) kvwire_decode_##WIDTH(              \
        int64_t count, uint8_t* bytes, const Leg* legs, int64_t leg_count,                       \
        const int64_t* block_ids, int64_t* bad_entry, const uint8_t* coded,                      \
        const StripRow* strips, const int64_t* numbers, int64_t dtype, int64_t tier_bits,        \
        const uint8_t* blob, const CrcTables* crc_tables, const int64_t* chunk_stops,            \
        uint32_t* crcs, int32_t* chunk_invalid) {                                                \
        __shared__ DecodeMemory memory;                                                          \
        DeviceCta cta(memory.scan);                                                              \
        RunningCrc crc(crc_tables, memory.crc);                                                  \
        const Segment segment = {bytes, legs, leg_count, block_ids, bad_entry};                  \
        const int64_t each = (count + gridDim.x - 1) / gridDim.x, first = each * blockIdx.x;     \
        const int64_t left = count - first;                                                      \
        decode_strips<WIDTH>(cta, coded, strips, numbers + first,                                \
                             int(left < each ? left : each), dtype, tier_bits, blob, segment,    \
                             crc, chunk_stops, crcs, chunk_invalid, memory);                     \
    }

KVWIRE_DECODE(1)
KVWIRE_DECODE(2)
KVWIRE_DECODE(4)

// By chunks (offset, bytes); block (x, y) takes the y-th CRC_SPAN_BYTES from their starts.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
kvwire_crc(int64_t chunk_count, uint8_t* bytes, const Leg* legs, int64_t leg_count,
           const int64_t* block_ids, int64_t* bad_entry, const int64_t* chunks,
           const CrcTables* crc_tables, uint32_t* crcs) {
    __shared__ EncodeMemory memory;
    DeviceCta cta(memory.scan);
    RunningCrc crc(crc_tables, memory.crc);
    const Segment segment = {bytes, legs, leg_count, block_ids, bad_entry};
    for (int64_t i = blockIdx.x; i < chunk_count; i += gridDim.x) {
        const int64_t at = int64_t(blockIdx.y) * CRC_SPAN_BYTES, left = chunks[2 * i + 1] - at;
        if (left <= 0) continue;
        const int count = left < CRC_SPAN_BYTES ? int(left) : CRC_SPAN_BYTES;
        read_through(cta, segment, chunks[2 * i] + at, count, crc, nullptr, memory);
        crc.flush(cta, left - count, crcs + i);
    }
}
