#include "backend/cpu/generic.h"

const cpu_kernels cpu_kernels_portable = {GEN_TABLE};

const cpu_kernels *cpu_kernels_for(cpu_tier tier, bool few_bits) {
#if defined(__x86_64__)
    if (tier >= CPU_AMX)
        return few_bits ? &cpu_kernels_amx_8 : &cpu_kernels_amx;
    if (tier >= CPU_AVX512)
        return few_bits ? &cpu_kernels_avx512_8 : &cpu_kernels_avx512;
    if (tier >= CPU_AVXVNNI)
        return &cpu_kernels_avxvnni;
    if (tier >= CPU_AVX2)
        return &cpu_kernels_avx2;
#endif
    (void)tier;
    (void)few_bits;
    return &cpu_kernels_portable;
}
