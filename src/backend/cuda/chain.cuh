/* backend/cuda/chain.cuh: a segment of weights without block scales as one chain of wgmma products of 64 rows. */
#ifndef ORCD_BACKEND_CUDA_CHAIN_CUH
#define ORCD_BACKEND_CUDA_CHAIN_CUH

#include "backend/cuda/wide.cuh"

/* Whether pour.cuh and broad.cuh have kernels for experts' matrices. */
static inline bool chain_can(const cuda_run *r, const cuda_matrix *m) {
    return cuda_has_wide(r->dev) && m->form == CUDA_FORM_MXFP4 && m->n_unit == 45;
}

/* How many blocks share a list of n_cols x n_piece: where nearly all can, each stays with one entry's rows. */
static __device__ __forceinline__ int even_blocks(int n_cols, int n_block) {
    const int even = n_cols > 0 && n_cols <= n_block ? n_block / n_cols * n_cols : 0;
    return even * 20 >= n_block * 19 ? even : n_block;
}

/* A warp's weights of a segment of SEG units: the first as operands, the others as they lie in memory. */
template <class F, int SEG> struct chain_weights {
    uint32_t first[F::STEPS][4];
    typename F::raw raw[SEG];
    __device__ __forceinline__ void load(const uint8_t *w, int lane) {
#pragma unroll
        for (int u = 0; u < SEG; u++)
            raw[u] = F::load_shared(w + u * F::CHUNK, lane);
        F::steps(raw[0], first);
    }
};

#ifdef HAVE_WGMMA
/* A value that all lanes have, and known to be so by the compiler, which then keeps what follows from it uniform, the
 * way through branches on it too: a product's descriptor need not be moved from lanes' registers. */
static __device__ __forceinline__ int chain_uniform(int v) { return __reduce_max_sync(~0u, v); }

template <class F, int N>
static __device__ __forceinline__ void chain_unit(float (&acc)[N / 2], const uint32_t (&a)[F::STEPS][4], uint64_t desc,
                                                  bool first) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < F::STEPS; k++)
        wgmma<N>(acc, a[k], desc + k * 2, k || !first);
    wgmma_commit();
}

/* acc = the products of the segment with N rows, whose units are N * 128 bytes apart. When it returns they are under
 * way, and w may be loaded again. */
template <class F, int SEG, int N>
static __device__ __forceinline__ void chain_begin(const chain_weights<F, SEG> &w, uint64_t desc, float (&acc)[N / 2]) {
    chain_unit<F, N>(acc, w.first, desc, true);
#pragma unroll
    for (int u = 1; u < SEG; u++) {
        uint32_t a[F::STEPS][4];
        F::steps(w.raw[u], a);
        chain_unit<F, N>(acc, a, desc + u * (N * 8), false);
    }
    wgmma_wait<SEG - 1>();
}

template <int R> static __device__ __forceinline__ void chain_end(float (&acc)[R], float (&total)[R]) {
    wgmma_wait<0>(acc);
#pragma unroll
    for (int i = 0; i < R; i++)
        total[i] += acc[i];
}
#endif

#endif
