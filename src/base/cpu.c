#include "base/cpu.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static const struct {
    const char *env, *name;
} tiers[] = {
    [CPU_PORTABLE] = {"portable", "portable C"}, [CPU_AVX2] = {"avx2", "AVX2"}, [CPU_AVXVNNI] = {"avxvnni", "AVX-VNNI"},
    [CPU_AVX512] = {"avx512", "AVX-512 VNNI"},   [CPU_AMX] = {"amx", "AMX"},
};

const char *cpu_tier_name(cpu_tier t) { return tiers[t].name; }

#if defined(__x86_64__)
#include <cpuid.h>

static sigjmp_buf trap;

static void on_illegal(int sig) {
    (void)sig;
    siglongjmp(trap, 1);
}

/* The assembler takes these whatever the compiler was told to emit. */
static void try_avx2(void) {
    __asm__ volatile("vpaddd %%ymm0, %%ymm0, %%ymm0\n\tvfmadd231ps %%ymm0, %%ymm0, %%ymm0\n\tvzeroupper" ::: "xmm0");
}

static void try_avxvnni(void) { __asm__ volatile("%{vex%} vpdpbusd %%ymm0, %%ymm0, %%ymm0\n\tvzeroupper" ::: "xmm0"); }

static void try_avx512(void) {
    __asm__ volatile("vpdpbusd %%zmm0, %%zmm0, %%zmm0\n\tvpermb %%zmm0, %%zmm0, %%zmm0\n\t"
                     "vdpbf16ps %%zmm0, %%zmm0, %%zmm0\n\tvzeroupper" ::
                         : "xmm0");
}

static void try_amx(void) {
    uint8_t config[64] __attribute__((aligned(64))) = {1}; /* palette 1, three tiles of 1 row x 4 bytes */
    for (int i = 0; i < 3; i++) {
        config[16 + 2 * i] = 4;
        config[48 + i] = 1;
    }
    __asm__ volatile("ldtilecfg %0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttdpbusd %%tmm2, %%tmm1, %%tmm0\n\t"
                     "tilerelease" ::"m"(config)
                     : "memory");
}

/* Does fn run to its end? Called under pthread_once, so one thread at a time uses the trap. */
static bool runs(void (*fn)(void)) {
    struct sigaction sa, old;
    memset(&sa, 0, sizeof sa);
    sa.sa_handler = on_illegal;
    sigemptyset(&sa.sa_mask);
    if (sigaction(SIGILL, &sa, &old) != 0)
        return false;
    bool ok = sigsetjmp(trap, 1) == 0;
    if (ok)
        fn();
    sigaction(SIGILL, &old, NULL);
    return ok;
}

static bool flag(unsigned leaf, unsigned sub, int reg, unsigned mask) {
    unsigned r[4];
    return __get_cpuid_count(leaf, sub, &r[0], &r[1], &r[2], &r[3]) && (r[reg] & mask) == mask;
}

enum { EAX, EBX, ECX, EDX };

static bool amx_allowed(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

static cpu_tier detect(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !flag(1, 0, ECX, 1u << 29 /* F16C */) ||
        !runs(try_avx2))
        return CPU_PORTABLE;
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
                  flag(7, 1, EAX, 1u << 5 /* AVX512_BF16 */) && runs(try_avx512);
    if (!avx512)
        return flag(7, 1, EAX, 1u << 4 /* AVX-VNNI */) && runs(try_avxvnni) ? CPU_AVXVNNI : CPU_AVX2;
    bool amx = flag(7, 0, EDX, 1u << 24 | 1u << 25 | 1u << 22) && amx_allowed() && runs(try_amx);
    return amx ? CPU_AMX : CPU_AVX512;
}
#else
static cpu_tier detect(void) { return CPU_PORTABLE; }
#endif

static pthread_once_t once = PTHREAD_ONCE_INIT;
static cpu_tier best;

static void decide(void) {
    best = detect();
    const char *want = getenv("ORCD_CPU");
    for (int t = CPU_PORTABLE; want && t < (int)best; t++)
        if (strcmp(want, tiers[t].env) == 0)
            best = (cpu_tier)t;
#if defined(__x86_64__)
    /* An AVX-512 machine need not have the 256-bit form of VNNI. */
    if (best == CPU_AVXVNNI && !flag(7, 1, EAX, 1u << 4))
        best = CPU_AVX2;
#endif
}

cpu_tier cpu_tier_best(void) {
    pthread_once(&once, decide);
    return best;
}
