#include <immintrin.h>

#include "backend/cpu/pack.h"

#define PACK_MX4 void cpu_pack_mx4_avx512
#define VEC_BYTES 64
#include "backend/cpu/pack_mx4.h"

/* 4 x 4 words are transposed in each quarter of the vectors: quarter q of row[k] is row 4q + k. */
static inline void mx4_words(const blocks *b, vec (*w)[PARTS]) {
    __m512i row[4];
    UNROLL for (int k = 0; k < 4; k++) {
        row[k] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(b->at[k] + 1)));
        row[k] = _mm512_inserti32x4(row[k], _mm_loadu_si128((const __m128i *)(b->at[4 + k] + 1)), 1);
        row[k] = _mm512_inserti32x4(row[k], _mm_loadu_si128((const __m128i *)(b->at[8 + k] + 1)), 2);
        row[k] = _mm512_inserti32x4(row[k], _mm_loadu_si128((const __m128i *)(b->at[12 + k] + 1)), 3);
    }
    __m512i a = _mm512_unpacklo_epi32(row[0], row[1]), c = _mm512_unpacklo_epi32(row[2], row[3]);
    __m512i d = _mm512_unpackhi_epi32(row[0], row[1]), e = _mm512_unpackhi_epi32(row[2], row[3]);
    w[0][0] = (vec)_mm512_unpacklo_epi64(a, c);
    w[1][0] = (vec)_mm512_unpackhi_epi64(a, c);
    w[2][0] = (vec)_mm512_unpacklo_epi64(d, e);
    w[3][0] = (vec)_mm512_unpackhi_epi64(d, e);
}

static inline void mx4_narrow(vec v, uint8_t *out) {
    _mm256_storeu_si256((__m256i *)out, _mm512_cvtepi32_epi16((__m512i)v));
}
