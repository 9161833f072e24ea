#include <immintrin.h>
#include <stdint.h>

#define LANES 16
typedef __m512 vecf;
typedef int32_t veci __attribute__((vector_size(LANES * 4)));
typedef unsigned vecn;

static inline vecf larger(vecf a, vecf b) { return _mm512_max_ps(a, b); }
static inline float largest(vecf v) { return _mm512_reduce_max_ps(v); }
static inline veci not_negative(veci v) { return (veci)_mm512_max_epi32((__m512i)v, _mm512_setzero_si512()); }
static inline vecn unordered(vecf a, vecf b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
static inline int any(vecn v) { return v != 0; }
static inline unsigned reaches(vecf v, float bound) { return _mm512_cmp_ps_mask(v, _mm512_set1_ps(bound), _CMP_GE_OQ); }

#include "engine/softmax_generic.h"

const softmax_ops softmax_avx512 = SOFTMAX_TABLE;
