/* One lane of a zmm register is one row of the panel. Tiles are written once for T activation rows and instantiated
 * by inlining with a constant T; each keeps its sums in registers over the whole length of the rows. */
#include <immintrin.h>

#include "backend/cpu/generic.h"

#define TILE static inline __attribute__((always_inline)) void
#define UNROLL _Pragma("GCC unroll 16")

static inline __m512i bytes4(const void *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}

/* Where few rows leave much to compute a byte, the hardware fetches too little in advance. Reading past the end of a
 * panel is what the next one needs. (Not `static inline`: gcc 12 takes such a function for one without effect.) */
#define PREFETCH(p, ahead, locality, T)                                                                                \
    do {                                                                                                               \
        if ((T) <= 4)                                                                                                  \
            __builtin_prefetch((p) + (ahead), 0, locality);                                                            \
    } while (0)

static inline __m512 bytes16(const void *p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p))); }

/* With many rows a panel is computed long enough to bring the one behind it: `at` is the place of the same block
 * there, or NULL. */
#define FETCH_NEXT(at, bytes)                                                                                          \
    do {                                                                                                               \
        if (at)                                                                                                        \
            UNROLL for (int i_ = 0; i_ < (bytes); i_ += 64) __builtin_prefetch((at) + i_, 0, 2);                       \
    } while (0)

static inline __m512 half16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }

/* Call with T rows at a time, at most `most` (a constant up to 8): as few tiles as there can be, of sizes that differ
 * by one at most, because small ones wait for their own sums. */
#define TILE_CASE(T, most, call)                                                                                       \
    case T:                                                                                                            \
        if ((T) <= (most))                                                                                             \
            call(T);                                                                                                   \
        break
#define FOR_TILES(n, most, call)                                                                                       \
    for (int at_ = 0, left_, rows_; (left_ = (n)-at_) > 0; at_ += rows_) {                                             \
        int tiles_ = (left_ + (most)-1) / (most);                                                                      \
        rows_ = (left_ + tiles_ - 1) / tiles_;                                                                         \
        switch (rows_) {                                                                                               \
            TILE_CASE(1, most, call);                                                                                  \
            TILE_CASE(2, most, call);                                                                                  \
            TILE_CASE(3, most, call);                                                                                  \
            TILE_CASE(4, most, call);                                                                                  \
            TILE_CASE(5, most, call);                                                                                  \
            TILE_CASE(6, most, call);                                                                                  \
            TILE_CASE(7, most, call);                                                                                  \
            TILE_CASE(8, most, call);                                                                                  \
        }                                                                                                              \
    }

/* ---- float formats: even and odd columns in two chains ---- */

TILE f32_tile(const uint8_t *panel, int64_t n_col, const void *const *x, const int T, float *y) {
    __m512 a[8], b[8];
    UNROLL for (int t = 0; t < T; t++) a[t] = b[t] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 2 <= n_col; k += 2, panel += 128) {
        __m512 w0 = _mm512_loadu_ps(panel), w1 = _mm512_loadu_ps(panel + 64);
        UNROLL for (int t = 0; t < T; t++) {
            a[t] = _mm512_fmadd_ps(w0, _mm512_set1_ps(((const float *)x[t])[k]), a[t]);
            b[t] = _mm512_fmadd_ps(w1, _mm512_set1_ps(((const float *)x[t])[k + 1]), b[t]);
        }
    }
    if (k < n_col)
        UNROLL for (int t = 0; t < T; t++) a[t] =
            _mm512_fmadd_ps(_mm512_loadu_ps(panel), _mm512_set1_ps(((const float *)x[t])[k]), a[t]);
    UNROLL for (int t = 0; t < T; t++) _mm512_storeu_ps(y + t * 16, _mm512_add_ps(a[t], b[t]));
}

static void dot_f32(const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y, uint8_t *scratch) {
    (void)scratch;
#define CALL(T) f32_tile(panel, n_col, x + at_, T, y + at_ * 16)
    FOR_TILES(n, 8, CALL)
#undef CALL
}

TILE f16_tile(const uint8_t *panel, int64_t n_col, const void *const *x, const int T, float *y) {
    __m512 a[8], b[8];
    UNROLL for (int t = 0; t < T; t++) a[t] = b[t] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 2 <= n_col; k += 2, panel += 64) {
        __m512 w0 = half16(panel), w1 = half16(panel + 32);
        UNROLL for (int t = 0; t < T; t++) {
            a[t] = _mm512_fmadd_ps(w0, _mm512_set1_ps(((const float *)x[t])[k]), a[t]);
            b[t] = _mm512_fmadd_ps(w1, _mm512_set1_ps(((const float *)x[t])[k + 1]), b[t]);
        }
    }
    if (k < n_col)
        UNROLL for (int t = 0; t < T; t++) a[t] =
            _mm512_fmadd_ps(half16(panel), _mm512_set1_ps(((const float *)x[t])[k]), a[t]);
    UNROLL for (int t = 0; t < T; t++) _mm512_storeu_ps(y + t * 16, _mm512_add_ps(a[t], b[t]));
}

static void dot_f16(const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y, uint8_t *scratch) {
    (void)scratch;
#define CALL(T) f16_tile(panel, n_col, x + at_, T, y + at_ * 16)
    FOR_TILES(n, 8, CALL)
#undef CALL
}

TILE bf16_tile(const uint8_t *panel, int64_t n_col, const void *const *x, const int T, float *y) {
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);
    __m512 a[8], b[8];
    UNROLL for (int t = 0; t < T; t++) a[t] = b[t] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 2 <= n_col; k += 2, panel += 64) {
        __m512i w = _mm512_loadu_si512(panel);
        __m512 w0 = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
        __m512 w1 = _mm512_castsi512_ps(_mm512_and_si512(w, high));
        UNROLL for (int t = 0; t < T; t++) {
            a[t] = _mm512_fmadd_ps(w0, _mm512_set1_ps(((const float *)x[t])[k]), a[t]);
            b[t] = _mm512_fmadd_ps(w1, _mm512_set1_ps(((const float *)x[t])[k + 1]), b[t]);
        }
    }
    if (k < n_col) {
        __m512 w0 = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(panel), 16));
        UNROLL for (int t = 0; t < T; t++) a[t] = _mm512_fmadd_ps(w0, _mm512_set1_ps(((const float *)x[t])[k]), a[t]);
    }
    UNROLL for (int t = 0; t < T; t++) _mm512_storeu_ps(y + t * 16, _mm512_add_ps(a[t], b[t]));
}

static void dot_bf16(const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y, uint8_t *scratch) {
    (void)scratch;
#define CALL(T) bf16_tile(panel, n_col, x + at_, T, y + at_ * 16)
    FOR_TILES(n, 8, CALL)
#undef CALL
}

/* ---- MXFP4: one table look-up turns nibble and shift into (w << s) + 128 ---- */

static const uint8_t mx4_table[64] __attribute__((aligned(64))) = {
#define ROW(s)                                                                                                         \
    128, 128 + (1 << s), 128 + (2 << s), 128 + (3 << s), 128 + (4 << s), 128 + (6 << s), 128 + (8 << s),               \
        128 + (12 << s), 128, 128 - (1 << s), 128 - (2 << s), 128 - (3 << s), 128 - (4 << s), 128 - (6 << s),          \
        128 - (8 << s), 128 - (12 << s)
    ROW(0), ROW(1), ROW(2), ROW(3)
#undef ROW
};

/* The shifts of both blocks of 32 in bits 4 and 5 of every byte of a row's lane; other bits are rubbish. */
static inline __m512i mx4_shift(__m512i head, int half) {
    const __m512i low_byte = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    __m512i s = _mm512_shuffle_epi8(head, low_byte);
    return half ? s : _mm512_slli_epi16(s, 4);
}

/* The scale of a row's block is 2 to this power. */
static inline __m512 mx4_power(__m512i head) {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_srli_epi32(head, 8), _mm512_set1_epi32(128)));
}

/* (nibble & 15) | shift << 4, whose two highest bits vpermb ignores */
static inline __m512i mx4_index(__m512i nibble, __m512i shift) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), nibble, shift, 0xca);
}

void cpu_mx4_unpack(const uint8_t *panel, int64_t n64, uint8_t *out) {
    const uint8_t *head = panel, *p = panel + cpu_mx4_head(n64);
    const __m512i table = _mm512_load_si512(mx4_table);
    for (int64_t b = 0; b < n64; b++, head += 32, p += 512, out += 1088) {
        __m512i h = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)head));
        _mm512_storeu_ps(out, _mm512_scalef_ps(_mm512_set1_ps(1), mx4_power(h)));
        UNROLL for (int j = 0; j < 8; j++) {
            __m512i v = _mm512_loadu_si512(p + j * 64), s = mx4_shift(h, j / 4);
            _mm512_storeu_si512(out + 64 + j * 128, _mm512_permutexvar_epi8(mx4_index(v, s), table));
            _mm512_storeu_si512(out + 128 + j * 128,
                                _mm512_permutexvar_epi8(mx4_index(_mm512_srli_epi16(v, 4), s), table));
        }
    }
}

/* ---- the screen of the head ---- */

/* Bit g of each byte as bit 4. */
static inline __attribute__((always_inline)) __m512i fifth_bit(__m512i bits, int g) {
    __m512i at4 = g < 4 ? _mm512_slli_epi16(bits, 4 - g) : _mm512_srli_epi16(bits, g - 4);
    return _mm512_and_si512(at4, _mm512_set1_epi8(16));
}

/* Codes of 64 values for one scale, the squares of what they miss summed. */
static inline float screen_codes(const __m512 *v, float scale, __m512i *code) {
    const __m512 least = _mm512_set1_ps(-16), most = _mm512_set1_ps(15), inv = _mm512_set1_ps(scale ? 1 / scale : 0);
    __m512 sum = _mm512_setzero_ps();
    UNROLL for (int i = 0; i < 4; i++) {
        __m512 q = _mm512_roundscale_ps(_mm512_mul_ps(v[i], inv), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        q = _mm512_min_ps(_mm512_max_ps(q, least), most);
        __m512 miss = _mm512_fnmadd_ps(q, _mm512_set1_ps(scale), v[i]);
        sum = _mm512_fmadd_ps(miss, miss, sum);
        code[i] = _mm512_add_epi32(_mm512_cvtps_epi32(q), _mm512_set1_epi32(16));
    }
    return _mm512_reduce_add_ps(sum);
}

/* 64 codes of row r into their places among those of 16 rows. */
static void put_codes(const __m512i *code, int r, uint8_t *p) {
    uint32_t u[16];
    for (int i = 0; i < 4; i++)
        _mm_storeu_si128((__m128i *)(u + 4 * i), _mm512_cvtepi32_epi8(code[i]));
    for (int h = 0; h < 2; h++, p += 320) {
        uint32_t fifth = 0;
        for (int j = 0; j < 4; j++) {
            uint32_t lo = u[h * 8 + 2 * j], hi = u[h * 8 + 2 * j + 1];
            uint32_t nibbles = (lo & 0x0f0f0f0f) | (hi & 0x0f0f0f0f) << 4;
            memcpy(p + j * 64 + r * 4, &nibbles, 4);
            fifth |= (lo >> 4 & 0x01010101) << (2 * j) | (hi >> 4 & 0x01010101) << (2 * j + 1);
        }
        memcpy(p + 256 + r * 4, &fifth, 4);
    }
}

/* Five scales are tried for each block, from the one that keeps its largest value as -16. Where no finite slack
 * suffices the scale is infinite, and so, or NaN, is every bound. */
static void screen_row(const float *w, int64_t n64, int r, int rounding, uint8_t *panel) {
    uint8_t *head = panel, *p = panel + cpu_screen_head(n64);
    for (int64_t b = 0; b < n64; b++, w += 64, head += CPU_SCREEN_HEAD, p += 640) {
        __m512 v[4];
        UNROLL for (int i = 0; i < 4; i++) v[i] = _mm512_loadu_ps(w + i * 16);
        __m512 high = _mm512_max_ps(_mm512_max_ps(v[0], v[1]), _mm512_max_ps(v[2], v[3]));
        __m512 low = _mm512_min_ps(_mm512_min_ps(v[0], v[1]), _mm512_min_ps(v[2], v[3]));
        float most = _mm512_reduce_max_ps(high), least = _mm512_reduce_min_ps(low), top = most > -least ? most : least;
        float best = INFINITY, slack = INFINITY;
        uint16_t scale = 0x7c00;
        __m512i code[4], best_code[4];
        UNROLL for (int i = 0; i < 4; i++) best_code[i] = _mm512_set1_epi32(16);
        for (int t = 0; t < 5; t++) {
            uint16_t half = f16_from_f32(top * (t * 0.05f - 1) / 16);
            float s = f32_from_f16(half), miss = screen_codes(v, s, code);
            if (!(miss < best) || (s == 0 && top != 0)) /* so small that squares vanish */
                continue;
            best = miss;
            scale = half;
            slack = miss > 0 ? ceilf(sqrtf(miss) * 1.001f / fabsf(s) * CPU_SLACK_ONE) : 0;
            memcpy(best_code, code, sizeof code);
        }
        slack += (float)rounding;
        scale = slack <= 255 ? scale : 0x7c00;
        memcpy(head + r * 2, &scale, 2);
        head[32 + r] = slack <= 255 ? (uint8_t)slack : 255;
        put_codes(best_code, r, p);
    }
}

#define PLANES 2
#define MOST 5 /* rows of a tile */
#define NAME(x) x##_16
#include "backend/cpu/integer_avx512.h"
#undef PLANES
#undef MOST
#undef NAME

#define PLANES 1
#define MOST 6
#define PAIR_MOST 5
#define NAME(x) x##_8
#include "backend/cpu/integer_avx512.h"
#undef PLANES
#undef MOST
#undef NAME

#include "backend/cpu/attention_avx512.h"

#define TABLE(bits, i8, mx4, pair)                                                                                     \
    {                                                                                                                  \
        .dot = {[CPU_F32] = dot_f32,                                                                                   \
                [CPU_F16] = dot_f16,                                                                                   \
                [CPU_BF16] = dot_bf16,                                                                                 \
                [CPU_I8] = i8,                                                                                         \
                [CPU_MX4] = mx4,                                                                                       \
                [CPU_Q41] = dot_q41_##bits,                                                                            \
                [CPU_Q51] = dot_q51_##bits,                                                                            \
                [CPU_Q4K] = dot_q4k_##bits,                                                                            \
                [CPU_Q5K] = dot_q5k_##bits,                                                                            \
                [CPU_Q6K] = dot_q6k_##bits},                                                                           \
        .pair_mx4 = pair, .screen = screen_##bits, .screen_row = screen_row, .quantise = quantise_##bits,              \
        .rms_norm = gen_rms_norm, .layer_norm = gen_layer_norm, .glu = gen_glu, .gelu_tanh = gen_gelu_tanh,            \
        .put = gen_put, .combine = gen_combine, .rotate = gen_rotate, .attn_f16 = attn_f16_##bits,                     \
        .attn_f32 = attn_f32_##bits,                                                                                   \
    }

const cpu_kernels cpu_kernels_avx512 = TABLE(16, dot_i8_16, dot_mx4_16, NULL);
const cpu_kernels cpu_kernels_avx512_8 = TABLE(8, dot_i8_8, dot_mx4_8, pair_mx4_8);
const cpu_kernels cpu_kernels_amx = TABLE(16, cpu_amx_i8_16, cpu_amx_mx4_16, NULL);
const cpu_kernels cpu_kernels_amx_8 = TABLE(8, cpu_amx_i8_8, cpu_amx_mx4_8, NULL);
