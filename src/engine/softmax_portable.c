#include <stdint.h>

#define LANES 4
typedef float vecf __attribute__((vector_size(LANES * 4)));
typedef int32_t veci __attribute__((vector_size(LANES * 4)));
typedef veci vecn;

static inline vecf larger(vecf a, vecf b) {
    veci m = a > b;
    return (vecf)(((veci)a & m) | ((veci)b & ~m));
}

static inline float largest(vecf v) {
    float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
}

static inline veci not_negative(veci v) { return v & (v > 0); }
static inline vecn unordered(vecf a, vecf b) { return (a != a) | (b != b); }
static inline int any(vecn v) { return (v[0] | v[1] | v[2] | v[3]) != 0; }

static inline unsigned reaches(vecf v, float bound) {
    veci m = v >= bound;
    return (m[0] & 1u) | (m[1] & 2u) | (m[2] & 4u) | (m[3] & 8u);
}

#include "engine/softmax_generic.h"

const softmax_ops softmax_portable = SOFTMAX_TABLE;

const softmax_ops *softmax_for(cpu_tier tier) {
#if defined(__x86_64__)
    if (tier >= CPU_AVX512)
        return &softmax_avx512;
    if (tier >= CPU_AVX2)
        return &softmax_avx2;
#endif
    (void)tier;
    return &softmax_portable;
}
