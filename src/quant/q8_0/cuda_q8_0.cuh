/* quant/q8_0/cuda_q8_0.cuh: Q8_0 for tensor cores. A chunk of 16 rows x 64 columns is two column blocks of 544 bytes:
 *
 *     [lane 0..31][row g: columns 8t..8t+7, row g+8: the same] as value + 128   [g 0..7][row g, row g+8] f16 scales
 *
 * Q4_0 and Q5_0 are this form with smaller integers. */
#ifndef ORCD_QUANT_CUDA_Q8_0_CUH
#define ORCD_QUANT_CUDA_Q8_0_CUH

#include "quant/fragment.cuh"

struct form_q8_0 {
    static constexpr int CHUNK = 1088;
    static constexpr int AHEAD = 3;      /* chunks that a warp asks for before it waits for its input */
    static constexpr bool SCALED = true; /* blocks have scales */

    struct raw {
        uint4 q[2];
        uint32_t s[2];
    };

    static __device__ __forceinline__ raw load(const uint8_t *chunk, int lane) {
        return {{ld_stream(chunk + lane * 16), ld_stream(chunk + 544 + lane * 16)},
                {ld_stream_u32(chunk + 512 + (lane >> 2) * 4), ld_stream_u32(chunk + 1056 + (lane >> 2) * 4)}};
    }
    static __device__ __forceinline__ raw load_shared(const uint8_t *chunk, int lane) {
        return {
            {*(const uint4 *)(chunk + lane * 16), *(const uint4 *)(chunk + 544 + lane * 16)},
            {*(const uint32_t *)(chunk + 512 + (lane >> 2) * 4), *(const uint32_t *)(chunk + 1056 + (lane >> 2) * 4)}};
    }

    /* Two bytes of w as f16: 0x6400 | u is 1024 + u, so 1152 less is the value, exactly. */
    static __device__ __forceinline__ uint32_t pair(uint32_t w, uint32_t select) {
        return f16x2_sub(__byte_perm(w, 0x64646464u, select), 0x64806480u);
    }

    static __device__ __forceinline__ frag_block block(const raw &r, int i) {
        const uint4 q = r.q[i];
        const float2 s = f16x2_to_float2(r.s[i]);
        frag_block f;
        f.a[0][0] = pair(q.x, 0x4140), f.a[0][2] = pair(q.x, 0x4342);
        f.a[1][0] = pair(q.y, 0x4140), f.a[1][2] = pair(q.y, 0x4342);
        f.a[0][1] = pair(q.z, 0x4140), f.a[0][3] = pair(q.z, 0x4342);
        f.a[1][1] = pair(q.w, 0x4140), f.a[1][3] = pair(q.w, 0x4342);
        f.s[0] = s.x, f.s[1] = s.y;
        return f;
    }

    using frag = frag_block;
    static __device__ __forceinline__ frag get(const raw &r, int i) { return block(r, i); }
    static __device__ __forceinline__ void apply(float acc[4], const frag &f, uint4 b) { mma_block_scaled(acc, f, b); }
    /* acc += 16 x 64 weights times NT x 8 tokens; b[n][i]: the lane's eight activations of block i */
    template <int NT> static __device__ __forceinline__ void mma(const raw &w, const uint4 (*b)[2], float (*acc)[4]) {
        mma_unit<form_q8_0, NT>(w, b, acc);
    }
};

/* Value + 128 of column k (0..31) of a canonical Q8_0 (8), Q4_0 (2) or Q5_0 (6) block; all begin with the f16 scale. */
template <int TYPE> static __device__ inline uint8_t q8_code(const uint8_t *block, int k) {
    if (TYPE == 8)
        return block[2 + k] ^ 0x80u;
    const uint8_t *qs = block + (TYPE == 2 ? 2 : 6);
    const int q = k < 16 ? qs[k] & 15 : qs[k - 16] >> 4;
    if (TYPE == 2)
        return (uint8_t)(q + 120);
    return (uint8_t)((q | (block[2 + k / 8] >> k % 8 & 1) << 4) + 112);
}

/* One lane of one chunk. row(r): the canonical row of tile row r, NULL packs zeros. */
template <int TYPE, class Rows>
static __device__ void pack_q8_0(uint8_t *chunk, int lane, const Rows &row, int64_t col0, int64_t n_col) {
    constexpr int BYTES = TYPE == 8 ? 34 : TYPE == 2 ? 18 : 22;
    const int g = lane >> 2, t = lane & 3;
    for (int i = 0; i < 2; i++) {
        uint8_t *sub = chunk + i * 544;
        for (int half = 0; half < 2; half++) {
            const uint8_t *src = row(g + half * 8);
            const bool there = src && col0 + i * 32 < n_col;
            const uint8_t *block = there ? src + (col0 / 32 + i) * BYTES : src;
            for (int k = 0; k < 8; k++)
                sub[lane * 16 + half * 8 + k] = there ? q8_code<TYPE>(block, 8 * t + k) : (uint8_t)0;
            for (int k = 0; t == half && k < 2; k++)
                sub[512 + g * 4 + half * 2 + k] = there ? block[k] : (uint8_t)0;
        }
    }
}

#endif
