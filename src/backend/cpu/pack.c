/* From canonical rows to panels. Every format keeps words of 4 bytes of 16 rows side by side, so packing is the
 * transposition of words, with nibbles and bits put together on the way. It runs at the speed of memory, which makes
 * it quick to load and bearable to pack a panel each time it is used (no_repack). */
#include <emmintrin.h>
#include <string.h>

#include "backend/cpu/internal.h"
#include "backend/cpu/pack.h"

cpu_fmt cpu_fmt_of(q_type t) {
    switch (t) {
    case Q_F16:
        return CPU_F16;
    case Q_BF16:
        return CPU_BF16;
    case Q_Q8_0:
    case Q_Q4_0: /* both are an f16 scale and integers of at most 8 bits per 32 */
    case Q_Q5_0:
        return CPU_I8;
    case Q_MXFP4:
        return CPU_MX4;
    case Q_Q4_1:
        return CPU_Q41;
    case Q_Q5_1:
        return CPU_Q51;
    case Q_Q4_K:
        return CPU_Q4K;
    case Q_Q5_K:
        return CPU_Q5K;
    case Q_Q6_K:
        return CPU_Q6K;
    default:
        return CPU_F32;
    }
}

static uint16_t load16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }

/* w[i][q] = word i of rows 4q .. 4q + 3 */
typedef struct words {
    __m128i w[4][4];
} words;

static inline void transpose(const __m128i *row /* [16] */, words *out) {
    UNROLL for (int q = 0; q < 4; q++, row += 4) {
        __m128i a = _mm_unpacklo_epi32(row[0], row[1]), b = _mm_unpacklo_epi32(row[2], row[3]);
        __m128i c = _mm_unpackhi_epi32(row[0], row[1]), d = _mm_unpackhi_epi32(row[2], row[3]);
        out->w[0][q] = _mm_unpacklo_epi64(a, b);
        out->w[1][q] = _mm_unpackhi_epi64(a, b);
        out->w[2][q] = _mm_unpacklo_epi64(c, d);
        out->w[3][q] = _mm_unpackhi_epi64(c, d);
    }
}

/* 16 bytes of every row */
static inline void load_words(const blocks *b, size_t offset, words *out) {
    __m128i row[CPU_PANEL];
    UNROLL for (int r = 0; r < CPU_PANEL; r++) row[r] =
        _mm_loadu_si128((const __m128i *)(const void *)(b->at[r] + offset));
    transpose(row, out);
}

static inline void store64(uint8_t *p, int q, __m128i v) { _mm_storeu_si128((__m128i *)(void *)(p + q * 16), v); }

/* Two groups of 4 columns as the low and high nibbles of a vector, from the low or the high nibbles of their bytes. */
static inline void put_pair(uint8_t *p, const words *w, int i, bool high) {
    const __m128i low4 = _mm_set1_epi8(15);
    UNROLL for (int q = 0; q < 4; q++) {
        __m128i a = w->w[i][q], b = w->w[i + 1][q];
        __m128i lo = _mm_and_si128(high ? _mm_srli_epi16(a, 4) : a, low4);
        __m128i hi = high ? _mm_andnot_si128(low4, b) : _mm_slli_epi16(_mm_and_si128(b, low4), 4);
        store64(p, q, _mm_or_si128(lo, hi));
    }
}

/* ---- floats ---- */

/* A row's word holds columns k (and, in two bytes, k + 1); F16 then wants the rows of one column together. */
static void put_words(cpu_fmt f, const words *w, int n, uint8_t *panel) {
    for (int i = 0; i < n; i++, panel += 64)
        for (int q = 0; q < 4; q += f == CPU_F16 ? 2 : 1) {
            __m128i a = w->w[i][q];
            if (f != CPU_F16) {
                store64(panel, q, a);
                continue;
            }
            __m128i b = w->w[i][q + 1];
            __m128i even =
                _mm_packs_epi32(_mm_srai_epi32(_mm_slli_epi32(a, 16), 16), _mm_srai_epi32(_mm_slli_epi32(b, 16), 16));
            store64(panel, q / 2, even);
            store64(panel + 32, q / 2, _mm_packs_epi32(_mm_srai_epi32(a, 16), _mm_srai_epi32(b, 16)));
        }
}

/* 256 columns at a time through a buffer that is zero where rows or columns are missing. */
static void pack_floats(cpu_fmt f, const q_traits *src, const uint8_t *rows, size_t row_bytes, int n_row, int64_t n_col,
                        uint8_t *panel) {
    enum { AT_ONCE = 256 };
    size_t elem = f == CPU_F32 ? sizeof(float) : sizeof(uint16_t);
    union {
        float f[CPU_PANEL][AT_ONCE];
        uint8_t b[CPU_PANEL * AT_ONCE * sizeof(float)];
    } v;
    const uint8_t *end = panel + cpu_panel_bytes(f, n_col);
    memset(&v, 0, sizeof v);
    for (int64_t k = 0; k < n_col; k += AT_ONCE) {
        size_t n = n_col - k < AT_ONCE ? (size_t)(n_col - k) : AT_ONCE;
        const uint8_t *from = rows + q_row_bytes(src, (size_t)k);
        blocks b = first_blocks(v.b, AT_ONCE * elem, CPU_PANEL, 16);
        for (int r = 0; r < n_row; r++, from += row_bytes) {
            uint8_t *row = v.b + (size_t)r * AT_ONCE * elem;
            memset(row, 0, AT_ONCE * elem);
            if (f == CPU_F32)
                src->unpack(from, v.f[r], n);
            else
                memcpy(row, from, n * elem);
        }
        for (size_t i = 0; i < n * elem; i += 16, next_block(&b)) {
            words w;
            int left = (int)((end - panel) / 64);
            load_words(&b, 0, &w);
            put_words(f, &w, left < 4 ? left : 4, panel);
            panel += left < 4 ? left * 64 : 256;
        }
    }
}

/* ---- integers ---- */

/* 32 bits of every row, bit i of column i, as 4 bytes a row: bit g of a byte belongs to group g. */
static void spread_bits(const blocks *b, size_t offset, uint8_t *out /* [16][4] */) {
    for (int r = 0; r < CPU_PANEL; r++) {
        uint32_t bits;
        memcpy(&bits, b->at[r] + offset, 4);
        for (int k = 0; k < 4; k++) { /* bits k, k + 4, .., k + 28 become a byte */
            uint32_t v = bits >> k & 0x11111111u;
            v = (v | v >> 3) & 0x03030303u;
            v = (v | v >> 6) & 0x000f000fu;
            out[r * 4 + k] = (uint8_t)(v | v >> 12);
        }
    }
}

/* Q8_0 */
static inline void put_bytes(uint8_t *p, const blocks *b) {
    const __m128i sign = _mm_set1_epi8((char)0x80);
    for (size_t half = 0; half < 2; half++, p += 256) {
        words w;
        load_words(b, 2 + half * 16, &w);
        UNROLL for (int i = 0; i < 16; i++) store64(p, i, _mm_xor_si128(w.w[i / 4][i % 4], sign));
    }
}

/* Q4_0 and, with a fifth bit, Q5_0: nibbles of columns i and i + 16 in a byte */
static inline void put_small(uint8_t *p, const blocks *b, bool fifth) {
    const __m128i low4 = _mm_set1_epi8(15), one = _mm_set1_epi8(1), offset = _mm_set1_epi8(fifth ? 112 : 120);
    uint8_t bits[64] = {0};
    words w;
    load_words(b, fifth ? 6 : 2, &w);
    if (fifth)
        spread_bits(b, 2, bits);
    for (int g = 0; g < 8; g++, p += 64)
        UNROLL for (int q = 0; q < 4; q++) {
            __m128i v = w.w[g % 4][q], high = _mm_loadu_si128((const __m128i *)(const void *)(bits + q * 16));
            v = _mm_and_si128(g < 4 ? v : _mm_srli_epi16(v, 4), low4);
            v = _mm_or_si128(v, _mm_slli_epi16(_mm_and_si128(_mm_srli_epi16(high, g), one), 4));
            store64(p, q, _mm_add_epi8(v, offset));
        }
}

/* Bytes of weight + 128 of the types that fit CPU_I8 without loss. */
static void pack_i8(q_type type, blocks b, int64_t n_col, uint8_t *panel) {
    const uint8_t *next = next_panel(&b);
    size_t bytes = b.step[0] * CPU_PANEL;
    for (int64_t i = 0; i < cpu_n64(n_col) * 2; i++, next_block(&b)) {
        uint8_t *head = panel + i / 2 * 1088 + i % 2 * 32, *p = panel + i / 2 * 1088 + 64 + i % 2 * 512;
        FETCH(next + (size_t)i * bytes, bytes);
        if (i * 32 >= n_col)
            b = first_blocks(NULL, 0, 0, 0);
        for (int r = 0; r < CPU_PANEL; r++)
            memcpy(head + r * 2, b.at[r], 2);
        if (type == Q_Q8_0)
            put_bytes(p, &b);
        else
            put_small(p, &b, type == Q_Q5_0);
    }
}

#define PACK_MX4 static void pack_mx4
#define VEC_BYTES 16
#include "backend/cpu/pack_mx4.h"

static inline void mx4_words(const blocks *b, vec (*w)[PARTS]) {
    words all;
    load_words(b, 1, &all);
    UNROLL for (int i = 0; i < 16; i++) w[i / 4][i % 4] = (vec)all.w[i / 4][i % 4];
}

static inline void mx4_narrow(vec v, uint8_t *out) {
    __m128i low = (__m128i)(v << 16 >> 16); /* so that packing keeps the bits */
    _mm_storel_epi64((__m128i *)(void *)out, _mm_packs_epi32(low, low));
}

/* 16 columns of a block of 32, from the low or the high nibbles of their bytes. */
static inline void put_nibbles(uint8_t *p, const blocks *b, size_t offset, bool high) {
    words w;
    load_words(b, offset, &w);
    put_pair(p, &w, 0, high);
    put_pair(p + 64, &w, 2, high);
}

/* The fifth bits of 32 columns, of which bit `shift` of 32 bytes is a column's: bit g is group g's. */
static void put_fifth(uint8_t *p, const blocks *b, size_t offset, int shift) {
    const __m128i one = _mm_set1_epi8(1);
    __m128i sum[4] = {0};
    for (int half = 0; half < 2; half++) {
        words w;
        load_words(b, offset + (size_t)half * 16, &w);
        UNROLL for (int i = 0; i < 16; i++) {
            __m128i bit = _mm_and_si128(_mm_srli_epi16(w.w[i / 4][i % 4], shift), one);
            sum[i % 4] = _mm_or_si128(sum[i % 4], _mm_slli_epi16(bit, half * 4 + i / 4));
        }
    }
    UNROLL for (int q = 0; q < 4; q++) store64(p, q, sum[q]);
}

/* d, dmin, 12 bytes of 6-bit scales and minima, Q5_K: 32 bytes of fifth bits, 128 bytes of nibbles */
static void pack_k(cpu_fmt f, blocks s, int64_t n_col, uint8_t *panel) {
    bool fifth = cpu_min_fifth(f);
    for (int64_t i = 0; i < n_col; i += 256, panel += cpu_min_stride(f), next_block(&s)) {
        for (int r = 0; r < CPU_PANEL; r++) {
            const uint8_t *q = s.at[r] + 4;
            memcpy(panel + r * 2, s.at[r], 2);
            memcpy(panel + 32 + r * 2, s.at[r] + 2, 2);
            for (int b = 0; b < 8; b++) {
                int sc = b < 4 ? q[b] & 63 : (q[b + 4] & 15) | q[b - 4] >> 6 << 4;
                int mn = b < 4 ? q[b + 4] & 63 : q[b + 4] >> 4 | q[b] >> 6 << 4;
                panel[64 + b * 16 + r] = (uint8_t)sc;
                panel[192 + b * 16 + r] = (uint8_t)mn;
            }
        }
        for (int b = 0; b < 8; b++) { /* two blocks share bytes: low and high nibbles */
            size_t from = (size_t)(fifth ? 48 : 16) + (size_t)(b / 2 * 32);
            put_nibbles(panel + 320 + b * 256, &s, from, b % 2);
            put_nibbles(panel + 320 + b * 256 + 128, &s, from + 16, b % 2);
            if (fifth)
                put_fifth(panel + 2368 + b * 64, &s, 16, b);
        }
    }
}

/* d, m, Q5_1: 32 fifth bits, 16 bytes of nibbles: columns i and i + 16 in a byte. The panel subtracts a minimum. */
static void pack_min(cpu_fmt f, blocks b, int64_t n_col, uint8_t *panel) {
    for (int64_t i = 0; i < cpu_n64(n_col) * 2; i++, panel += cpu_min_stride(f), next_block(&b)) {
        if (i * 32 >= n_col)
            b = first_blocks(NULL, 0, 0, 0);
        for (int r = 0; r < CPU_PANEL; r++) {
            uint16_t min = load16(b.at[r] + 2) ^ 0x8000;
            memcpy(panel + r * 2, b.at[r], 2);
            memcpy(panel + 32 + r * 2, &min, 2);
        }
        put_nibbles(panel + 64, &b, f == CPU_Q51 ? 8 : 4, false);
        put_nibbles(panel + 64 + 128, &b, f == CPU_Q51 ? 8 : 4, true);
        if (f == CPU_Q51)
            spread_bits(&b, 4, panel + 320);
    }
}

/* Two bits of 16 columns: bits 2f and 2f + 1 of a byte are group f's. */
static inline void put_high_bits(uint8_t *p, const words *w, int shift) {
    const __m128i two = _mm_set1_epi8(3);
    UNROLL for (int q = 0; q < 4; q++) {
        __m128i v = _mm_setzero_si128();
        UNROLL for (int f = 0; f < 4; f++) v =
            _mm_or_si128(v, _mm_slli_epi16(_mm_and_si128(_mm_srli_epi16(w->w[f][q], shift), two), 2 * f));
        store64(p, q, v);
    }
}

/* 128 bytes of low nibbles, 64 of high bits, 16 scales, d */
static void pack_q6k(blocks s, int64_t n_col, uint8_t *panel) {
    for (int64_t i = 0; i < n_col; i += 256, panel += 3392, next_block(&s)) {
        memset(panel + 32, 0, 32);
        for (int r = 0; r < CPU_PANEL; r++) {
            memcpy(panel + r * 2, s.at[r] + 208, 2);
            for (int b = 0; b < 16; b++)
                panel[64 + b * 16 + r] = s.at[r][192 + b];
        }
        for (int b = 0; b < 8; b++) /* block b of 32 columns: quarter b % 4 of half b / 4 */
            for (int half = 0; half < 2; half++) {
                words w;
                put_nibbles(panel + 320 + b * 256 + half * 128, &s, (size_t)(b / 4 * 64 + b % 2 * 32 + half * 16),
                            b % 4 >= 2);
                load_words(&s, (size_t)(128 + b / 4 * 32 + half * 16), &w);
                put_high_bits(panel + 320 + 2048 + b * 128 + half * 64, &w, b % 4 * 2);
            }
    }
}

void cpu_pack(cpu_fmt f, const q_traits *src, const uint8_t *rows, size_t row_bytes, int n_row, int64_t n_col,
              uint8_t *panel) {
    blocks b = first_blocks(rows, row_bytes, n_row, src->block_bytes);
    switch (f) {
    case CPU_I8:
        pack_i8(src->type, b, n_col, panel);
        break;
    case CPU_MX4:
        (cpu_tier_best() < CPU_AVX512 ? pack_mx4 : cpu_pack_mx4_avx512)(b, n_col, panel);
        break;
    case CPU_Q41:
    case CPU_Q51:
        pack_min(f, b, n_col, panel);
        break;
    case CPU_Q4K:
    case CPU_Q5K:
        pack_k(f, b, n_col, panel);
        break;
    case CPU_Q6K:
        pack_q6k(b, n_col, panel);
        break;
    default:
        pack_floats(f, src, rows, row_bytes, n_row, n_col, panel);
        break;
    }
}
