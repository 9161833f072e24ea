/* quant/mxfp4/cuda_mxfp4.cuh: MXFP4 for tensor cores. A chunk of 16 rows x 64 columns is 544 bytes:
 *
 *     [lane 0..31][4 words]   [g 0..7][block 0 row g, block 0 row g+8, block 1 row g, block 1 row g+8]  E8M0
 *
 * Word i of a lane: row g + 8 (i & 1), column block i / 2, the lane's eight columns 8t..8t+7; columns 0, 2, 4, 6 in the
 * low half, 1, 3, 5, 7 in the high half, where the pair p has its sign s and magnitude e e m at
 *
 *     bit   15 14 13 12 11 10  9  8  7  6  5  4  3  2  1  0
 *           s0 s2 s3 s1 e0 e0 m0 e1 e1 m1 e2 e2 m2 e3 e3 m3
 *
 * A code becomes the f16 (s << 15 | eem << 9), its value times 2^-14, subnormals included.
 *
 * Scales become the upper bytes of f16 powers, the matrix's largest 2^15: a code times its power is an exact f16, and a
 * segment of columns one chain of products. Blocks whose scale is more than 2^24 below the largest count as zero: all
 * their values are below 2^-22 of the largest weight. A matrix with many of those (far) keeps E8M0 scales instead,
 * blocks are summed alone and scaled in f32: 0 (2^-127) counts as zero, 255 gives infinities and NaN. The sums are
 * multiplied by a power of two of the whole matrix. */
#ifndef ORCD_QUANT_CUDA_MXFP4_CUH
#define ORCD_QUANT_CUDA_MXFP4_CUH

#include "quant/fragment.cuh"

struct mxfp4_codes {
    static constexpr int CHUNK = 544;
    static constexpr int AHEAD = 3; /* chunks that a warp asks for before it waits for its input */

    struct raw {
        uint4 q;
        uint32_t s;
    };

    static __device__ __forceinline__ raw load(const uint8_t *chunk, int lane) {
        return {ld_stream(chunk + lane * 16), ld_stream_u32(chunk + 512 + (lane >> 2) * 4)};
    }
    static __device__ __forceinline__ raw load_shared(const uint8_t *chunk, int lane) {
        return {*(const uint4 *)(chunk + lane * 16), *(const uint32_t *)(chunk + 512 + (lane >> 2) * 4)};
    }

    /* 8 codes to a0, a2 of step 0 and a0, a2 of step 1. */
    static __device__ __forceinline__ void word(uint32_t w, uint32_t &p0, uint32_t &p1, uint32_t &p2, uint32_t &p3) {
        const uint32_t m = 0x8E008E00u;
        p0 = w & m;
        p1 = (w << 3) & m;
        p2 = ((w & 0x40384038u) * 66u) & m; /* sign << 1 and magnitude << 6 at once: collisions stay below the mask */
        p3 = ((w & 0x20072007u) * 516u) & m;
    }
    /* Operands of block i as they are in the codes. */
    static __device__ __forceinline__ void codes(const raw &r, int i, uint32_t (&a)[2][4]) {
        word(i ? r.q.z : r.q.x, a[0][0], a[0][2], a[1][0], a[1][2]);
        word(i ? r.q.w : r.q.y, a[0][1], a[0][3], a[1][1], a[1][3]);
    }
};

struct form_mxfp4 : mxfp4_codes {
    static constexpr bool SCALED = false; /* blocks enter the sums as they are */
    static constexpr int SPAN = 24;       /* binary orders of scales that f16 has room for */
    static constexpr int STEPS = 4;       /* products of 16 columns in a unit */

    struct frag {
        uint32_t a[2][4];
    };
    static __device__ __forceinline__ frag get(const raw &r, int i) {
        frag f;
        codes(r, i, f.a);
        const uint32_t s[2] = {__byte_perm(r.s, 0, i ? 0x2424 : 0x0404), __byte_perm(r.s, 0, i ? 0x3434 : 0x1414)};
#pragma unroll
        for (int k = 0; k < 8; k++)
            f.a[k / 4][k % 4] = f16x2_mul(f.a[k / 4][k % 4], s[k % 2]);
        return f;
    }
    /* Operands of a unit. */
    static __device__ __forceinline__ void steps(const raw &r, uint32_t (&a)[STEPS][4]) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const frag f = get(r, i);
#pragma unroll
            for (int k = 0; k < 8; k++)
                a[i * 2 + k / 4][k % 4] = f.a[k / 4][k % 4];
        }
    }
    static __device__ __forceinline__ void apply(float acc[4], const frag &f, uint4 b) {
        mma_f16(acc, f.a[0][0], f.a[0][1], f.a[0][2], f.a[0][3], b.x, b.y);
        mma_f16(acc, f.a[1][0], f.a[1][1], f.a[1][2], f.a[1][3], b.z, b.w);
    }
    template <int NT> static __device__ __forceinline__ void mma(const raw &w, const uint4 (*b)[2], float (*acc)[4]) {
        mma_unit<form_mxfp4, NT>(w, b, acc);
    }
    /* The byte of an E8M0 scale where the largest is `top`. */
    static __device__ __forceinline__ uint8_t power(int scale, int top) {
        return scale == 0 || top - scale > SPAN ? (uint8_t)0 : (uint8_t)((30 - (top - scale)) << 2);
    }
};

struct form_mxfp4_far : mxfp4_codes {
    static constexpr bool SCALED = true; /* blocks have scales */
    static constexpr float FACTOR = 16384.f;

    static __device__ __forceinline__ frag_block block(const raw &r, int i) {
        frag_block f;
        codes(r, i, f.a);
        const uint32_t s = i ? r.s >> 16 : r.s;
        f.s[0] = __uint_as_float(s << 23 & 0x7F800000u);
        f.s[1] = __uint_as_float(s << 15 & 0x7F800000u);
        return f;
    }

    using frag = frag_block;
    static __device__ __forceinline__ frag get(const raw &r, int i) { return block(r, i); }
    static __device__ __forceinline__ void apply(float acc[4], const frag &f, uint4 b) { mma_block_scaled(acc, f, b); }
    /* acc += 16 x 64 weights times NT x 8 tokens; b[n][i]: the lane's eight activations of block i */
    template <int NT> static __device__ __forceinline__ void mma(const raw &w, const uint4 (*b)[2], float (*acc)[4]) {
        mma_unit<form_mxfp4_far, NT>(w, b, acc);
    }
};

/* Lane (g, t)'s scale of a chunk: byte t of word g; 0 where the block's codes are all zero, unless it is no number. */
static __device__ __forceinline__ int mxfp4_scale(const uint8_t *chunk, int lane) {
    const uint4 q = *(const uint4 *)(chunk + lane * 16);
    const uint32_t w[4] = {q.x, q.y, q.z, q.w};
    bool any = false;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t rows = __ballot_sync(~0u, (w[i] & 0x0FFF0FFFu) != 0);
        any = lane % 4 == i ? rows >> (lane & ~3) & 15 : any;
    }
    return any || chunk[512 + lane] == 255 ? chunk[512 + lane] : 0;
}

/* One lane of one chunk. row(r): the canonical row of tile row r, NULL packs zeros. */
template <class Rows>
static __device__ void pack_mxfp4(uint8_t *chunk, int lane, const Rows &row, int64_t col0, int64_t n_col) {
    const int g = lane >> 2, t = lane & 3;
    const int sign_bit[4] = {15, 12, 14, 13};
    uint32_t w[4];
    for (int i = 0; i < 4; i++) {
        const uint8_t *src = row(g + 8 * (i & 1));
        const int64_t col = col0 + (i >> 1) * 32;
        w[i] = 0;
        for (int k = 0; src && col < n_col && k < 8; k++) {
            const int e = 8 * t + k, p = k >> 1;
            const uint8_t byte = src[col / 32 * 17 + 1 + e % 16];
            const uint32_t c = e < 16 ? byte & 15u : byte >> 4;
            w[i] |= ((c & 7u) << (9 - 3 * p) | (c >> 3) << sign_bit[p]) << (k & 1) * 16;
        }
    }
    *(uint4 *)(chunk + lane * 16) = make_uint4(w[0], w[1], w[2], w[3]);
    const uint8_t *src = row(g + 8 * (t & 1)); /* lane (g, t) places byte t of scale word g */
    const int64_t col = col0 + (t >> 1) * 32;
    chunk[512 + lane] = src && col < n_col ? src[col / 32 * 17] : (uint8_t)0;
}

#endif
