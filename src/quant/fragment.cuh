/* quant/fragment.cuh: the few instructions that all kernels are made of. */
#ifndef ORCD_QUANT_FRAGMENT_CUH
#define ORCD_QUANT_FRAGMENT_CUH

#include <cuda_fp16.h>
#include <stdint.h>

/* d += A (16 x 16) B (16 x 8), f16 with f32 sums. Lane (g = lane / 4, t = lane % 4) holds a0 = A[g][2t, 2t+1],
 * a1 = A[g+8][2t, 2t+1], a2 = A[g][2t+8, 2t+9], a3 = A[g+8][2t+8, 2t+9]; b0 = B[2t, 2t+1][g], b1 = B[2t+8, 2t+9][g];
 * d = D[g][2t, 2t+1], D[g+8][2t, 2t+1]. */
static __device__ __forceinline__ void mma_f16(float d[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                               uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* Packed weights are operand A: tiles of 16 rows, units of 64 columns, columns padded with zeros. Inside each block of
 * 32 columns lane (g, t) owns columns 8t..8t+7 of rows g and g + 8, whatever the type:
 *
 *     step j (0, 1)   a0 = row g  8t+4j,+1   a1 = row g+8, same   a2 = row g 8t+4j+2,+3   a3 = row g+8, same
 *                     b0 = x[8t+4j,+1]       b1 = x[8t+4j+2,+3]
 *
 * so a lane's share of the activations is one 16-byte load of row-major f16 a block. A block with scales is summed
 * alone and enters the sum times them. */
struct frag_block {
    uint32_t a[2][4];
    float s[2]; /* rows g, g + 8 */
};

static __device__ __forceinline__ void mma_block_scaled(float acc[4], const frag_block &f, uint4 b) {
    float c[4] = {0, 0, 0, 0};
    mma_f16(c, f.a[0][0], f.a[0][1], f.a[0][2], f.a[0][3], b.x, b.y);
    mma_f16(c, f.a[1][0], f.a[1][1], f.a[1][2], f.a[1][3], b.z, b.w);
    acc[0] = fmaf(f.s[0], c[0], acc[0]);
    acc[1] = fmaf(f.s[0], c[1], acc[1]);
    acc[2] = fmaf(f.s[1], c[2], acc[2]);
    acc[3] = fmaf(f.s[1], c[3], acc[3]);
}

/* acc += 16 x 64 weights w of form F times NT x 8 tokens; b[n][i]: the lane's eight activations of block i. */
template <class F, int NT>
static __device__ __forceinline__ void mma_unit(const typename F::raw &w, const uint4 (*b)[2], float (*acc)[4]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const typename F::frag f = F::get(w, i);
#pragma unroll
        for (int n = 0; n < NT; n++)
            F::apply(acc[n], f, b[n][i]);
    }
}

/* Weights: read once, past L1. Never for data that an earlier kernel of the step wrote. */
static __device__ __forceinline__ uint4 ld_stream(const void *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

static __device__ __forceinline__ uint32_t ld_stream_u32(const void *p) {
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

static __device__ __forceinline__ uint32_t f16x2_sub(uint32_t a, uint32_t b) {
    asm("sub.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
}

static __device__ __forceinline__ uint32_t f16x2_mul(uint32_t a, uint32_t b) {
    asm("mul.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
}

static __device__ __forceinline__ float2 f16x2_to_float2(uint32_t h) {
    __half2 x;
    memcpy(&x, &h, 4);
    return __half22float2(x);
}

/* Rounded to nearest even; what is too large becomes infinite, so that a row that broke is seen. a in the low half. */
static __device__ __forceinline__ uint32_t f16x2(float a, float b) {
    const __half2 h = __floats2half2_rn(a, b);
    uint32_t u;
    memcpy(&u, &h, 4);
    return u;
}
static __device__ __forceinline__ uint16_t f16_bits(float a) { return (uint16_t)f16x2(a, 0); }

/* Programmatic dependent launch: everything the kernels before this one wrote is visible after the wait. Every block
 * of every kernel waits before it ends, so that "the kernel before is done" means all before it are. */
static __device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/* The next kernel may start to occupy free multiprocessors. */
static __device__ __forceinline__ void pdl_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

static __device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int d = 16; d; d >>= 1)
        v += __shfl_xor_sync(~0u, v, d);
    return v;
}

#endif
