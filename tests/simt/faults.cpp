// Kernels that go wrong, one way each, and some that do not: what tests/simt must tell apart.
#include <cuda_pipeline.h>

namespace {

extern "C" __global__ void leaves_a_barrier() {
    if (threadIdx.x != 5) __syncthreads();
}

extern "C" __global__ void leaves_a_warp(unsigned* out) {
    if (threadIdx.x == 40) return;
    out[threadIdx.x] = __ballot_sync(0xFFFFFFFF, 1);
}

extern "C" __global__ void meets_in_different_places(int* out) {
    if (threadIdx.x % 2)
        out[threadIdx.x] = __any_sync(0xFFFFFFFF, 1);
    else
        out[threadIdx.x] = __shfl_sync(0xFFFFFFFF, 1, 0);
}

extern "C" __global__ void different_barriers(int* out) {
    if (threadIdx.x < 32)
        out[threadIdx.x] = __syncthreads_or(1);
    else
        __syncthreads();
}

extern "C" __global__ void waits_for_each_other() {
    if (threadIdx.x % 32 < 16)
        __syncthreads();
    else
        __syncwarp();
}

extern "C" __global__ void reads_a_lane_left_out(int* out) {
    if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0xFFFF, int(threadIdx.x), 20);
}

extern "C" __global__ void forgets_a_barrier(unsigned* out) {
    __shared__ unsigned word[1024];
    word[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = word[(threadIdx.x + 1) % blockDim.x];
}

extern "C" __global__ void forgets_to_wait(unsigned* out, const unsigned* in) {
    __shared__ unsigned word[1024];
    __pipeline_memcpy_async(&word[threadIdx.x], &in[threadIdx.x], 4);
    __pipeline_commit();
    __syncthreads();
    out[threadIdx.x] = word[threadIdx.x ^ 1];
}

extern "C" __global__ void reads_before_it_writes(unsigned* out) {
    __shared__ unsigned word[1024];
    __syncthreads();
    out[threadIdx.x] = word[threadIdx.x];
}

extern "C" __global__ void writes_what_others_read(unsigned* out) {
    __shared__ unsigned word[1024];
    word[threadIdx.x] = threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = word[threadIdx.x ^ 32];
    word[threadIdx.x] = 0;
}

extern "C" __global__ void turns_words_by_warps(unsigned* out) {
    __shared__ unsigned word[1024];
    word[threadIdx.x] = threadIdx.x;
    __syncwarp();
    out[threadIdx.x] = word[threadIdx.x ^ 31];
}

// Sums of a block's numbers by each way there is.
extern "C" __global__ void sums(unsigned long long* out, const unsigned* in) {
    __shared__ unsigned word[1024], warps[32];
    __shared__ unsigned long long total;
    if (threadIdx.x == 0) total = 0;
    for (int half = 0; half < 2; ++half) {
        __pipeline_memcpy_async(&word[half * blockDim.x + threadIdx.x], &in[threadIdx.x], 4);
        __pipeline_commit();
    }
    __pipeline_wait_prior(1);
    __syncthreads();
    const unsigned mine = word[blockDim.x - 1 - threadIdx.x], lane = threadIdx.x % 32;
    atomicAdd(&total, mine);
    unsigned down = mine, across = mine, up = mine;
    for (int step = 1; step < 32; step *= 2) {
        down += __shfl_down_sync(0xFFFFFFFF, down, step);
        across += __shfl_xor_sync(0xFFFFFFFF, across, step);
        const unsigned lower = __shfl_up_sync(0xFFFFFFFF, up, step);
        if (int(lane) >= step) up += lower;
    }
    if (lane == 0) warps[threadIdx.x / 32] = down;
    const unsigned last = __shfl_sync(0xFFFFFFFF, up, 31);
    const bool same = across == last && last == __reduce_add_sync(0xFFFFFFFF, mine);
    const unsigned odd = __ballot_sync(0xFFFFFFFF, mine & 1);
    const unsigned like = __match_any_sync(0xFFFFFFFF, mine & 1);
    const bool alike = like == (mine & 1 ? odd : ~odd);
    unsigned half = lane < 16 ? __reduce_xor_sync(0x0000FFFF, mine)
                              : __reduce_xor_sync(0xFFFF0000, mine);
    half ^= __shfl_xor_sync(0xFFFFFFFF, half, 16);
    const bool crossed = half == __reduce_xor_sync(0xFFFFFFFF, mine);
    const int all = __syncthreads_and(same && alike && crossed);
    if (threadIdx.x == 0) {
        out[0] = total;
        for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) out[1] += warps[warp];
        out[2] = (unsigned long long)all;
    }
    const int odds = __syncthreads_count(mine & 1);
    if (threadIdx.x == 1) out[3] = (unsigned long long)odds;
}

extern "C" __global__ void bits(unsigned* out, unsigned a, unsigned b) {
    const unsigned found[] = {
        __byte_perm(a, b, 0x7531), __byte_perm(a, b, 0xC08F), __funnelshift_l(a, b, 8),
        __funnelshift_r(a, b, 40), __brev(a), unsigned(__clz(int(a >> 8))), unsigned(__ffs(0)),
        unsigned(__popc(b))};
    for (int i = 0; i < 8; ++i) out[i] = found[i];
}

}  // namespace

KERNEL(leaves_a_barrier);
KERNEL(leaves_a_warp);
KERNEL(meets_in_different_places);
KERNEL(different_barriers);
KERNEL(waits_for_each_other);
KERNEL(reads_a_lane_left_out);
KERNEL(forgets_a_barrier);
KERNEL(forgets_to_wait);
KERNEL(reads_before_it_writes);
KERNEL(writes_what_others_read);
KERNEL(turns_words_by_warps);
KERNEL(sums);
KERNEL(bits);
