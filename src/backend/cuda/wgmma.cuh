/* backend/cuda/wgmma.cuh: the Hopper instructions that wide.cuh is made of. Empty where they do not exist. */
#ifndef ORCD_BACKEND_CUDA_WGMMA_CUH
#define ORCD_BACKEND_CUDA_WGMMA_CUH

#include <stdint.h>

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HAVE_WGMMA 1

/* ---- mbarriers, by their address in shared memory ---- */

static __device__ __forceinline__ void mbar_init(uint32_t bar, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
static __device__ __forceinline__ void mbar_arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
static __device__ __forceinline__ void mbar_expect(uint32_t bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void mbar_wait(uint32_t bar, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(bar), "r"(parity)
                     : "memory");
    } while (!done);
}
/* Bytes, addresses: multiples of 16. */
static __device__ __forceinline__ void bulk_copy(uint32_t dst, const void *src, uint32_t bytes, uint32_t bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
                 "l"(src), "r"(bytes), "r"(bar)
                 : "memory");
}

/* ---- wgmma: D (64 x N) += A (64 x 16, registers) B (N x 16 in shared memory, rows of 128 swizzled bytes) ----
 * Fragments are those of mma.m16n8k16: warp w of the four has rows 16 w .., N / 8 column groups one after the other. */

template <int N>
static __device__ __forceinline__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t desc, int keep);

#define WG_R8(i)                                                                                                       \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),        \
        "+f"(d[i + 7])
#define WG_R4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WG_S0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define WG_S1 WG_S0 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define WG_S2 WG_S1 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define WG_S3 WG_S2 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define WG_S4 WG_S3 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define WG_S5 WG_S4 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define WG_S6 WG_S5 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define WG_S7 WG_S6 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define WG_DEFINE(N, REGS, A0, A1, A2, A3, DESC, KEEP, ...)                                                            \
    template <>                                                                                                        \
    __device__ __forceinline__ void wgmma<N>(float(&d)[N / 2], const uint32_t(&a)[4], uint64_t desc, int keep) {       \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" KEEP ", 0;\n"                                                \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" REGS "},"                              \
                     "{%" A0 ",%" A1 ",%" A2 ",%" A3 "}, %" DESC ", p, 1, 1, 0;\n}"                                    \
                     : __VA_ARGS__                                                                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc), "r"(keep));                              \
    }
WG_DEFINE(8, "%0,%1,%2,%3", "4", "5", "6", "7", "8", "9", WG_R4(0))
WG_DEFINE(16, WG_S0, "8", "9", "10", "11", "12", "13", WG_R8(0))
WG_DEFINE(24, WG_S0 ",%8,%9,%10,%11", "12", "13", "14", "15", "16", "17", WG_R8(0), WG_R4(8))
WG_DEFINE(32, WG_S1, "16", "17", "18", "19", "20", "21", WG_R8(0), WG_R8(8))
WG_DEFINE(40, WG_S1 ",%16,%17,%18,%19", "20", "21", "22", "23", "24", "25", WG_R8(0), WG_R8(8), WG_R4(16))
WG_DEFINE(48, WG_S2, "24", "25", "26", "27", "28", "29", WG_R8(0), WG_R8(8), WG_R8(16))
WG_DEFINE(56, WG_S2 ",%24,%25,%26,%27", "28", "29", "30", "31", "32", "33", WG_R8(0), WG_R8(8), WG_R8(16), WG_R4(24))
WG_DEFINE(64, WG_S3, "32", "33", "34", "35", "36", "37", WG_R8(0), WG_R8(8), WG_R8(16), WG_R8(24))
WG_DEFINE(80, WG_S4, "40", "41", "42", "43", "44", "45", WG_R8(0), WG_R8(8), WG_R8(16), WG_R8(24), WG_R8(32))
WG_DEFINE(96, WG_S5, "48", "49", "50", "51", "52", "53", WG_R8(0), WG_R8(8), WG_R8(16), WG_R8(24), WG_R8(32), WG_R8(40))
WG_DEFINE(112, WG_S6, "56", "57", "58", "59", "60", "61", WG_R8(0), WG_R8(8), WG_R8(16), WG_R8(24), WG_R8(32),
          WG_R8(40), WG_R8(48))
WG_DEFINE(128, WG_S7, "64", "65", "66", "67", "68", "69", WG_R8(0), WG_R8(8), WG_R8(16), WG_R8(24), WG_R8(32),
          WG_R8(40), WG_R8(48), WG_R8(56))
/* wgmma<64> with A in shared memory, as B is. */
static __device__ __forceinline__ void wgmma64_shared(float (&d)[32], uint64_t a, uint64_t b, int keep) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" WG_S3 "}, %32, %33, p, 1, 1, 0, 0;\n}"
                 : WG_R8(0), WG_R8(8), WG_R8(16), WG_R8(24)
                 : "l"(a), "l"(b), "r"(keep));
}
#undef WG_DEFINE
#undef WG_R8
#undef WG_R4
#undef WG_S0
#undef WG_S1
#undef WG_S2
#undef WG_S3
#undef WG_S4
#undef WG_S5
#undef WG_S6
#undef WG_S7

/* Registers written before are seen by the products that follow. */
static __device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
static __device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/* All but the last LEFT groups are done: only then may registers that they read get other values. */
template <int LEFT> static __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
/* v: what one of those wrote; it must not be read before. */
template <int LEFT, int R> static __device__ __forceinline__ void wgmma_wait(float (&v)[R]) {
    wgmma_wait<LEFT>();
#pragma unroll
    for (int i = 0; i < R; i++)
        asm volatile("" : "+f"(v[i])::"memory");
}

/* Descriptor of rows of 128 bytes, groups of 8 rows (1,024 bytes, aligned) after each other, swizzled. */
static __device__ __forceinline__ uint64_t wgmma_desc(uint32_t shared) {
    return (uint64_t)(1u << 30 | 64u) << 32 | 1u << 16 | shared >> 4;
}

template <int N> static __device__ __forceinline__ void set_registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> static __device__ __forceinline__ void set_registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
#endif

#endif
