/* backend/cuda/wide.cu: the copy of rows that wide.cuh's products read, and its dense products. */
#include "backend/cuda/wide.cuh"

#define PACK_PARTS 3 /* of a row: a warp has all its loads on their way at once */

/* A warp copies a part of a row, eight lanes a unit: each brings together a piece's four pairs of columns, eight apart.
 */
static __global__ __launch_bounds__(256) void wide_pack_kernel(cuda_count rows, const int32_t *perm, int k,
                                                               const uint16_t *x, int64_t ldx, uint8_t *out,
                                                               int64_t ldo) {
    pdl_wait();
    pdl_launch(); /* after the wait: the kernel after this one may read the experts' list before its own wait */
    const int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, piece = lane % 8;
    if (row >= count_rows(rows))
        return;
    const int from = perm ? perm[row] : row * k;
    if (from < 0)
        return;
    const uint32_t *src = (const uint32_t *)(x + from / k * ldx) + piece / 4 * 16 + piece % 4;
    uint8_t *dst = out + (int64_t)row * 128 + ((piece ^ (row & 7)) << 4);
#pragma unroll 4
    for (int u = blockIdx.y * 4 + lane / 8; u < (int)(ldx / 64); u += 4 * PACK_PARTS) {
        const uint32_t *s = src + u * 32;
        *(uint4 *)(dst + u * ldo * 128) = make_uint4(s[0], s[4], s[8], s[12]);
    }
}

void wide_pack(cuda_run *r, cuda_count rows, const int32_t *perm, int k, const uint16_t *x, int64_t ldx, uint8_t *out,
               int64_t ldo) {
    cuda_launch(r, wide_pack_kernel, dim3((unsigned)(rows.cap + 7) / 8, PACK_PARTS), dim3(256), 0, rows, perm, k, x,
                ldx, out, ldo);
}

void wide_dense(cuda_run *r, const cuda_matrix *m, const wide_args &a) { wide_launch<LIN_DENSE>(r, m, a); }
