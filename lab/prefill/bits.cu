/* lab/prefill/bits.cu: do chains of wgmma (A from registers) and of mma.sync give the same bits? Prints mismatches.
 *   nvcc -std=c++17 -O3 -Isrc -gencode=arch=compute_90a,code=sm_90a lab/prefill/bits.cu -o bits */
#include <cuda_fp16.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "quant/fragment.cuh"

#define K 192
#define N 64

static __device__ uint64_t desc_of(const void *p) {
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(p);
    return (uint64_t)((at & 0x3FFFF) >> 4) | (uint64_t)1 << 16 | (uint64_t)64 << 32 | (uint64_t)1 << 62;
}

static __device__ __forceinline__ void wgmma64(float (&d)[32], const uint32_t (&a)[4], uint64_t desc, int keep) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},"
                 "{%32,%33,%34,%35}, %36, p, 1, 1, 0;\n}\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                   "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
                   "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]),
                   "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),
                   "+f"(d[30]), "+f"(d[31])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc), "r"(keep));
}

/* A [64][K], B [N][K] row-major f16; out [2][64][N]. shift: columns of a k16 step are rotated by it, to see whether the
 * order inside a step matters. */
static __global__ __launch_bounds__(128) void bits_kernel(const uint16_t *A, const uint16_t *B, float *out, int shift) {
    __shared__ __align__(1024) uint8_t bs[K / 64][N * 128];
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane >> 2, t = lane & 3;
    auto col = [&](int k) { return (k & ~15) | ((k + shift) & 15); };
    for (int i = tid; i < N * K; i += 128) {
        const int n = i / K, k = i % K;
        *(uint16_t *)(bs[k / 64] + n * 128 + ((((k % 64) / 8) ^ (n & 7)) * 16) + k % 8 * 2) = B[n * K + col(k)];
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    float d[32], e[8][4];
    for (int i = 0; i < 32; i++)
        d[i] = 0;
    for (int i = 0; i < 32; i++)
        e[i / 4][i % 4] = 0;
    const int row = warp * 16 + g;
    for (int s = 0; s < K / 16; s++) {
        uint32_t a[4], am[4];
        for (int i = 0; i < 4; i++) {
            const int r = row + (i & 1) * 8, k = s * 16 + 2 * t + (i >> 1) * 8;
            a[i] = A[r * K + col(k)] | (uint32_t)A[r * K + col(k + 1)] << 16;
            am[i] = A[r * K + k] | (uint32_t)A[r * K + k + 1] << 16;
        }
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        wgmma64(d, a, desc_of(bs[s / 4]) + (s % 4) * 2, 1);
        asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
        for (int n = 0; n < 8; n++) {
            const uint16_t *b = B + (n * 8 + g) * K + s * 16 + 2 * t;
            mma_f16(e[n], am[0], am[1], am[2], am[3], *(const uint32_t *)b, *(const uint32_t *)(b + 8));
        }
    }
    for (int n = 0; n < 8; n++)
        for (int i = 0; i < 4; i++) {
            const int at = (row + (i >> 1) * 8) * N + n * 8 + 2 * t + (i & 1);
            out[at] = d[n * 4 + i];
            out[64 * N + at] = e[n][i];
        }
}

int main(void) {
    uint16_t *h = (uint16_t *)malloc((64 + N) * K * 2), *dev;
    float *o = (float *)malloc(2 * 64 * N * 4), *od;
    cudaMalloc(&dev, (64 + N) * K * 2);
    cudaMalloc(&od, 2 * 64 * N * 4);
    for (int spread = 0; spread <= 24; spread += 8)
        for (int shift = 0; shift < 16; shift += 5) {
            int bad = 0;
            double worst = 0, err[2] = {0, 0};
            for (int rep = 0; rep < 20; rep++) {
                for (int i = 0; i < (64 + N) * K; i++) {
                    const float v =
                        ldexpf((float)(rand() % 4096 - 2048) / 2048, spread ? rand() % spread - spread / 2 : 0);
                    const __half x = __float2half_rn(v);
                    memcpy(&h[i], &x, 2);
                }
                cudaMemcpy(dev, h, (64 + N) * K * 2, cudaMemcpyHostToDevice);
                cudaMemset(od, 255, 2 * 64 * N * 4);
                bits_kernel<<<1, 128>>>(dev, dev + 64 * K, od, shift);
                const cudaError_t e = cudaMemcpy(o, od, 2 * 64 * N * 4, cudaMemcpyDeviceToHost);
                if (e != cudaSuccess)
                    return printf("%s\n", cudaGetErrorString(e)), 1;
                for (int r = 0; r < 64; r++)
                    for (int n = 0; n < N; n++) {
                        double s = 0, big = 0;
                        for (int k = 0; k < K; k++) {
                            __half x, y;
                            memcpy(&x, &h[r * K + k], 2);
                            memcpy(&y, &h[(64 + n) * K + k], 2);
                            s += (double)__half2float(x) * __half2float(y);
                            big += fabs((double)__half2float(x) * __half2float(y));
                        }
                        const float a = o[r * N + n], b = o[64 * N + r * N + n];
                        bad += memcmp(&a, &b, 4) != 0;
                        worst = fmax(worst, fabs(a - b) / big);
                        err[0] = fmax(err[0], fabs(a - s) / big);
                        err[1] = fmax(err[1], fabs(b - s) / big);
                    }
            }
            printf("exponents over %2d, rotation %2d: %d of %d differ, by %.2g of sum|ab|; against exact: wgmma %.2g, "
                   "mma.sync %.2g\n",
                   spread, shift, bad, 20 * 64 * N, worst, err[0], err[1]);
        }
    return 0;
}
