#include <immintrin.h>
#include <stdint.h>

#define LANES 8
typedef __m256 vecf;
typedef int32_t veci __attribute__((vector_size(LANES * 4)));
typedef veci vecn;

static inline vecf larger(vecf a, vecf b) { return _mm256_max_ps(a, b); }

static inline float largest(vecf v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

static inline veci not_negative(veci v) { return (veci)_mm256_max_epi32((__m256i)v, _mm256_setzero_si256()); }
static inline vecn unordered(vecf a, vecf b) { return (vecn)_mm256_cmp_ps(a, b, _CMP_UNORD_Q); }
static inline int any(vecn v) { return _mm256_movemask_ps((__m256)v) != 0; }

static inline unsigned reaches(vecf v, float bound) {
    return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(bound), _CMP_GE_OQ));
}

#include "engine/softmax_generic.h"

const softmax_ops softmax_avx2 = SOFTMAX_TABLE;
