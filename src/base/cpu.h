/* base/cpu.h: what this processor really executes. */
#ifndef ORCD_BASE_CPU_H
#define ORCD_BASE_CPU_H

/* In ascending order: a machine of one tier runs every lower one. */
typedef enum cpu_tier {
    CPU_PORTABLE,
    CPU_AVX2,    /* AVX2, FMA, F16C */
    CPU_AVXVNNI, /* and AVX-VNNI (256-bit vpdpbusd) */
    CPU_AVX512,  /* AVX-512 F, BW, VL, DQ, VNNI, VBMI, BF16 */
    CPU_AMX,     /* and AMX tiles with int8 and bf16 */
} cpu_tier;

/* The highest tier whose instructions ran when they were tried: flags alone are not believed, since machines exist
 * that advertise AMX and fault on its first instruction. ORCD_CPU = portable|avx2|avxvnni|avx512|amx lowers it.
 * Decided once; thread-safe. */
cpu_tier cpu_tier_best(void);
const char *cpu_tier_name(cpu_tier t); /* "AVX-512 VNNI" */

#endif
