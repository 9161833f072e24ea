#include <immintrin.h>
#include <stdint.h>

/* |w| as unsigned bytes times sign(x, w): exact also for w = -128, and pairs stay below 2^15. */
static inline void avx2_dot32(const int8_t *w, const int8_t *q, int32_t *acc) {
    __m256i lo = _mm256_loadu_si256((const __m256i *)acc), hi = _mm256_loadu_si256((const __m256i *)(acc + 8));
    const __m256i one = _mm256_set1_epi16(1);
    for (int g = 0; g < 8; g++) {
        __m256i x = _mm256_set1_epi32(*(const int32_t *)(q + g * 4));
        __m256i w0 = _mm256_loadu_si256((const __m256i *)(w + g * 64));
        __m256i w1 = _mm256_loadu_si256((const __m256i *)(w + g * 64 + 32));
        __m256i p0 = _mm256_maddubs_epi16(_mm256_abs_epi8(w0), _mm256_sign_epi8(x, w0));
        __m256i p1 = _mm256_maddubs_epi16(_mm256_abs_epi8(w1), _mm256_sign_epi8(x, w1));
        lo = _mm256_add_epi32(lo, _mm256_madd_epi16(p0, one));
        hi = _mm256_add_epi32(hi, _mm256_madd_epi16(p1, one));
    }
    _mm256_storeu_si256((__m256i *)acc, lo);
    _mm256_storeu_si256((__m256i *)(acc + 8), hi);
}
#define GEN_DOT32 avx2_dot32

#include "backend/cpu/generic.h"

const cpu_kernels cpu_kernels_avx2 = {GEN_TABLE};
