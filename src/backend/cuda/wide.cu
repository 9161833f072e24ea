/* backend/cuda/wide.cu: the copy of rows that wide.cuh's products read, and its dense products. */
#include "backend/cuda/wide.cuh"

/* A warp copies a row, a lane 32 columns at a time. from: the row of x for each row of the copy, -1 for none. */
static __global__ __launch_bounds__(256) void wide_pack_kernel(cuda_count rows, const int32_t *perm, int k,
                                                               const uint16_t *x, int64_t ldx, uint8_t *out,
                                                               int64_t ldo) {
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= count_rows(rows))
        return;
    const int from = perm ? perm[row] : row * k;
    if (from < 0)
        return;
    const uint4 *src = (const uint4 *)(x + from / k * ldx);
    for (int b = lane; b < (int)(ldx / 32); b += 32) {
        const uint4 v[4] = {src[b * 4], src[b * 4 + 1], src[b * 4 + 2], src[b * 4 + 3]};
        uint8_t *dst = out + ((int64_t)(b / 2) * ldo + row) * 128;
        const int p0 = b % 2 * 4;
        *(uint4 *)(dst + (((p0 + 0) ^ (row & 7)) << 4)) = make_uint4(v[0].x, v[1].x, v[2].x, v[3].x);
        *(uint4 *)(dst + (((p0 + 1) ^ (row & 7)) << 4)) = make_uint4(v[0].y, v[1].y, v[2].y, v[3].y);
        *(uint4 *)(dst + (((p0 + 2) ^ (row & 7)) << 4)) = make_uint4(v[0].z, v[1].z, v[2].z, v[3].z);
        *(uint4 *)(dst + (((p0 + 3) ^ (row & 7)) << 4)) = make_uint4(v[0].w, v[1].w, v[2].w, v[3].w);
    }
}

void wide_pack(cuda_run *r, cuda_count rows, const int32_t *perm, int k, const uint16_t *x, int64_t ldx, uint8_t *out,
               int64_t ldo) {
    cuda_launch(r, wide_pack_kernel, dim3((unsigned)(rows.cap + 7) / 8), dim3(256), 0, rows, perm, k, x, ldx, out, ldo);
}

void wide_dense(cuda_run *r, const cuda_matrix *m, const wide_args &a) { wide_launch<LIN_DENSE>(r, m, a); }
