/* backend/cuda/kv.cuh: how keys and values lie in a page, for all who write and read them. One layer and KV head of a
 * page: K [64 keys][dim], V transposed [dim][64 keys], and for 8 bits the scales of K [64] and V [64], f16.
 *
 * 8 bits are integers of -127 .. 127, stored + 128, under one scale for the head of a position: the least that holds
 * its largest value. So what a position stores depends on nothing but itself. */
#ifndef ORCD_BACKEND_CUDA_KV_CUH
#define ORCD_BACKEND_CUDA_KV_CUH

#include "backend/cuda/cuda.h"
#include "quant/fragment.cuh"

typedef uint8_t kv_int8;

template <class T> static __host__ __device__ constexpr int kv_head_bytes(int dim) {
    return 2 * BE_PAGE * dim * (int)sizeof(T) + (sizeof(T) == 1 ? 2 * BE_PAGE * 2 : 0);
}
/* K's scales; V's follow. */
static __device__ __forceinline__ __half *kv_scales(kv_int8 *head, int dim) {
    return (__half *)(head + 2 * BE_PAGE * dim);
}

static __device__ __forceinline__ float max_or_nan(float a, float b) {
    float m;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
    return m;
}

/* A warp stores the key or the value of one position and KV head: v[i] is dimension lane + 32 i. */
template <int N>
static __device__ __forceinline__ void kv_put(float *head, int dim, bool value, int at, const float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int d = threadIdx.x % 32 + 32 * i;
        if (d < dim)
            head[value ? (dim + d) * BE_PAGE + at : at * dim + d] = v[i];
    }
}
template <int N>
static __device__ __forceinline__ void kv_put(__half *head, int dim, bool value, int at, const float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int d = threadIdx.x % 32 + 32 * i;
        if (d < dim)
            head[value ? (dim + d) * BE_PAGE + at : at * dim + d] = __ushort_as_half(f16_bits(v[i]));
    }
}
template <int N>
static __device__ __forceinline__ void kv_put(kv_int8 *head, int dim, bool value, int at, const float (&v)[N]) {
    float most = 0;
#pragma unroll
    for (int i = 0; i < N; i++)
        most = max_or_nan(most, fabsf(v[i]));
#pragma unroll
    for (int d = 16; d; d >>= 1)
        most = max_or_nan(most, __shfl_xor_sync(~0u, most, d));
    const __half scale = __float2half_ru(most / 127.f);
    const float s = __half2float(scale);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int d = threadIdx.x % 32 + 32 * i, q = s > 0 ? __float2int_rn(v[i] / s) : 0;
        if (d < dim)
            head[value ? (dim + d) * BE_PAGE + at : at * dim + d] = (kv_int8)(q + 128);
    }
    if (threadIdx.x % 32 == 0)
        kv_scales(head, dim)[value * BE_PAGE + at] = scale;
}

/* Four stored integers as two pairs of f16. */
static __device__ __forceinline__ uint2 kv_unpack(uint32_t q) {
    /* 0x64.. is 1024 + the byte */
    return make_uint2(f16x2_sub(__byte_perm(q, 0x64646464u, 0x4140), 0x64806480u),
                      f16x2_sub(__byte_perm(q, 0x64646464u, 0x4342), 0x64806480u));
}
static __device__ __forceinline__ uint4 kv_unpack(uint2 q) {
    const uint2 a = kv_unpack(q.x), b = kv_unpack(q.y);
    return make_uint4(a.x, a.y, b.x, b.y);
}

/* Eight values, of consecutive keys, times the scales of these keys. */
static __device__ __forceinline__ uint4 kv_scaled(uint4 v, uint4 scale) {
    uint32_t *x = (uint32_t *)&v, *s = (uint32_t *)&scale;
#pragma unroll
    for (int i = 0; i < 4; i++)
        asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(x[i]) : "r"(s[i]));
    return v;
}
/* Scale i of eight. */
static __device__ __forceinline__ float kv_scale(uint4 scale, int i) {
    const uint32_t *s = (const uint32_t *)&scale;
    const float2 two = f16x2_to_float2(s[i / 2]);
    return i % 2 ? two.y : two.x;
}

#endif
