/* backend/cpu/integer_avx512.h: products with integer weights, for activations of PLANES bytes: kernels_avx512.c
 * includes it with PLANES 2 (16 bits) and 1 (8 bits), and NAME(x) to tell them apart. */

/* a[0] and a[1] += unsigned weights times the high and low bytes of 4 columns; with 8 bits there are high bytes only */
static inline __attribute__((always_inline)) void NAME(dp_planes)(__m512i *a, __m512i w, const void *row, int64_t n64,
                                                                  int64_t col) {
    a[0] = _mm512_dpbusd_epi32(a[0], w, bytes4((const uint8_t *)row + col));
    if (PLANES == 2)
        a[1] = _mm512_dpbusd_epi32(a[1], w, bytes4((const uint8_t *)row + n64 * 64 + col));
}

static inline void NAME(begin_planes)(__m512i *a, int32_t offset) {
    a[PLANES - 1] = _mm512_set1_epi32(offset);
    if (PLANES == 2)
        a[0] = _mm512_setzero_si512();
}

static inline __m512 NAME(join_planes)(const __m512i *a) {
    return _mm512_cvtepi32_ps(PLANES == 2 ? _mm512_add_epi32(_mm512_slli_epi32(a[0], 8), a[1]) : a[0]);
}

/* ---- 8-bit weights ---- */

TILE NAME(i8_tile)(const uint8_t *panel, const uint8_t *next, int64_t n64, const void *const *x, const int T,
                   float *y) {
    __m512 f[MOST];
    UNROLL for (int t = 0; t < T; t++) f[t] = _mm512_setzero_ps();
    for (int64_t b = 0; b < n64; b++, panel += 1088) {
        __m512 part[MOST];
        FETCH_NEXT(next ? next + b * 1088 : NULL, 1088);
        if (T <= 2) /* one line is enough: behind it the hardware goes on by itself, where it stops at a page's end */
            __builtin_prefetch(panel + 4096, 0, 2);
        UNROLL for (int h = 0; h < 2; h++) {
            __m512i a[MOST][2];
            UNROLL for (int t = 0; t < T; t++) NAME(begin_planes)(a[t], cpu_q_c32(x[t], n64)[b * 2 + h]);
            UNROLL for (int g = 0; g < 8; g++) {
                __m512i w = _mm512_loadu_si512(panel + 64 + h * 512 + g * 64);
                UNROLL for (int t = 0; t < T; t++) NAME(dp_planes)(a[t], w, x[t], n64, b * 64 + h * 32 + g * 4);
            }
            __m512 ws = half16(panel + h * 32);
            UNROLL for (int t = 0; t < T; t++) part[t] =
                h ? _mm512_fmadd_ps(NAME(join_planes)(a[t]), ws, part[t]) : _mm512_mul_ps(NAME(join_planes)(a[t]), ws);
        }
        UNROLL for (int t = 0; t < T; t++) f[t] =
            _mm512_fmadd_ps(part[t], _mm512_set1_ps(cpu_q_scale(x[t], n64)[b]), f[t]);
    }
    UNROLL for (int t = 0; t < T; t++) _mm512_storeu_ps(y + t * 16, f[t]);
}

static void NAME(dot_i8)(const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y, uint8_t *scratch) {
    (void)scratch;
    int64_t n64 = cpu_n64(n_col);
    const uint8_t *next = n > 2 ? panel + n64 * 1088 : NULL;
#define CALL(T) NAME(i8_tile)(panel, at_ ? NULL : next, n64, x + at_, T, y + at_ * 16)
    FOR_TILES(n, MOST, CALL)
#undef CALL
}

/* ---- MXFP4 ---- */

/* f + a block's sum times both scales, of which the weights' is 2 to a power: scalef leaves the multipliers alone. */
static inline __m512 NAME(add_block)(const __m512i *a, float scale, __m512 power, __m512 f) {
    return _mm512_fmadd_ps(NAME(join_planes)(a), _mm512_scalef_ps(_mm512_set1_ps(scale), power), f);
}

/* Straight from the panel. keep: where the weights' bytes are put for the tiles that follow, while `next`, the same
 * place in the next panel, is fetched; or NULL. Few rows: low and high nibbles have sums of their own, so that no
 * product waits for the one before. */
TILE NAME(mx4_tile)(const uint8_t *panel, const uint8_t *next, int64_t n64, const void *const *x, const int T, float *y,
                    uint8_t *keep) {
    const uint8_t *head = panel, *p = panel + cpu_mx4_head(n64);
    const __m512i table = _mm512_load_si512(mx4_table);
    const int chains = T * PLANES < 6 ? 2 : 1;
    __m512 f[MOST];
    UNROLL for (int t = 0; t < T; t++) f[t] = _mm512_setzero_ps();
    for (int64_t b = 0; b < n64; b++, head += 32, p += 512) {
        __m512i h = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)head)), a[2][MOST][2];
        FETCH_NEXT(keep ? next + b * 544 : NULL, 544);
        UNROLL for (int t = 0; t < T; t++) {
            NAME(begin_planes)(a[0][t], cpu_q_c64(x[t], n64)[b]);
            if (chains == 2)
                NAME(begin_planes)(a[1][t], 0);
        }
        UNROLL for (int j = 0; j < 8; j++) {
            __m512i v = _mm512_loadu_si512(p + j * 64), s = mx4_shift(h, j / 4);
            if (!keep)
                __builtin_prefetch(p + j * 64 + 6144, 0, 2);
            __m512i lo = _mm512_permutexvar_epi8(mx4_index(v, s), table);
            __m512i hi = _mm512_permutexvar_epi8(mx4_index(_mm512_srli_epi16(v, 4), s), table);
            if (keep) {
                _mm512_store_si512(keep + 64 + j * 128, lo);
                _mm512_store_si512(keep + 128 + j * 128, hi);
            }
            UNROLL for (int t = 0; t < T; t++) NAME(dp_planes)(a[0][t], lo, x[t], n64, b * 64 + j * 8);
            UNROLL for (int t = 0; t < T; t++) NAME(dp_planes)(a[chains - 1][t], hi, x[t], n64, b * 64 + j * 8 + 4);
        }
        __m512 power = mx4_power(h);
        if (keep) {
            _mm512_store_ps(keep, power);
            keep += 1088;
        }
        UNROLL for (int t = 0; t < T; t++) {
            UNROLL for (int i = 0; chains == 2 && i < PLANES; i++) a[0][t][i] =
                _mm512_add_epi32(a[0][t][i], a[1][t][i]);
            f[t] = NAME(add_block)(a[0][t], cpu_q_scale(x[t], n64)[b], power, f[t]);
        }
    }
    UNROLL for (int t = 0; t < T; t++) _mm512_storeu_ps(y + t * 16, f[t]);
}

/* From the bytes that the tile before kept. */
TILE NAME(u8_tile)(const uint8_t *w64, int64_t n64, const void *const *x, const int T, float *y) {
    __m512 f[MOST];
    UNROLL for (int t = 0; t < T; t++) f[t] = _mm512_setzero_ps();
    for (int64_t b = 0; b < n64; b++, w64 += 1088) {
        __m512i a[MOST][2];
        UNROLL for (int t = 0; t < T; t++) NAME(begin_planes)(a[t], cpu_q_c64(x[t], n64)[b]);
        UNROLL for (int g = 0; g < 16; g++) {
            __m512i w = _mm512_load_si512(w64 + 64 + g * 64);
            UNROLL for (int t = 0; t < T; t++) NAME(dp_planes)(a[t], w, x[t], n64, b * 64 + g * 4);
        }
        __m512 power = _mm512_load_ps(w64);
        UNROLL for (int t = 0; t < T; t++) f[t] = NAME(add_block)(a[t], cpu_q_scale(x[t], n64)[b], power, f[t]);
    }
    UNROLL for (int t = 0; t < T; t++) _mm512_storeu_ps(y + t * 16, f[t]);
}

/* Exponents too far apart for bytes: the blocks of 32 are scaled one by one. */
static void NAME(wide_mx4)(const uint8_t *panel, int64_t n64, const void *const *x, int n, float *y) {
    const __m512i table = _mm512_load_si512(mx4_table), low4 = _mm512_set1_epi32(15);
    for (int t = 0; t < n; t++) {
        const uint8_t *head = panel, *p = panel + cpu_mx4_head(n64);
        __m512 f = _mm512_setzero_ps();
        for (int64_t b = 0; b < n64; b++, head += 32, p += 512) {
            __m512i h = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)head));
            __m512 ws = _mm512_scalef_ps(_mm512_set1_ps(cpu_q_scale(x[t], n64)[b]), mx4_power(h)), part[2];
            for (int half = 0; half < 2; half++) {
                __m512i a[2], s = _mm512_and_si512(_mm512_srli_epi32(h, half ? 4 : 0), low4);
                NAME(begin_planes)(a, cpu_q_c32(x[t], n64)[b * 2 + half]);
                for (int j = 0; j < 4; j++) {
                    __m512i v = _mm512_loadu_si512(p + half * 256 + j * 64), none = _mm512_setzero_si512();
                    int64_t col = b * 64 + half * 32 + j * 8;
                    NAME(dp_planes)(a, _mm512_permutexvar_epi8(mx4_index(v, none), table), x[t], n64, col);
                    v = _mm512_srli_epi16(v, 4);
                    NAME(dp_planes)(a, _mm512_permutexvar_epi8(mx4_index(v, none), table), x[t], n64, col + 4);
                }
                part[half] = _mm512_scalef_ps(NAME(join_planes)(a), _mm512_cvtepi32_ps(s));
            }
            f = _mm512_fmadd_ps(_mm512_add_ps(part[0], part[1]), ws, f);
        }
        _mm512_storeu_ps(y + t * 16, f);
    }
}

static void NAME(dot_mx4)(const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y,
                          uint8_t *scratch) {
    int64_t n64 = cpu_n64(n_col);
    if (panel[n64 * 32]) {
        NAME(wide_mx4)(panel, n64, x, n, y);
        return;
    }
    const uint8_t *next = panel + cpu_panel_bytes(CPU_MX4, n_col);
#define CALL(T)                                                                                                        \
    do {                                                                                                               \
        if (at_)                                                                                                       \
            NAME(u8_tile)(scratch, n64, x + at_, T, y + at_ * 16);                                                     \
        else if (n > (T))                                                                                              \
            NAME(mx4_tile)(panel, next, n64, x, T, y, scratch);                                                        \
        else                                                                                                           \
            NAME(mx4_tile)(panel, NULL, n64, x, T, y, NULL);                                                           \
    } while (0)
    FOR_TILES(n, MOST, CALL)
#undef CALL
}

#if PLANES == 1 /* with 16 bits the sums of two panels are too many for the registers */
/* Two panels' bytes, the second's `apart` behind: each column of a row is fetched for both. */
TILE NAME(u8_pair)(const uint8_t *w64, size_t apart, int64_t n64, const void *const *x, const int T, float *y,
                   float *y2) {
    __m512 f[2][MOST];
    UNROLL for (int t = 0; t < T; t++) f[0][t] = f[1][t] = _mm512_setzero_ps();
    for (int64_t b = 0; b < n64; b++, w64 += 1088) {
        __m512i a[2][MOST];
        UNROLL for (int t = 0; t < T; t++) a[0][t] = a[1][t] = _mm512_set1_epi32(cpu_q_c64(x[t], n64)[b]);
        UNROLL for (int g = 0; g < 16; g++) {
            __m512i w0 = _mm512_load_si512(w64 + 64 + g * 64), w1 = _mm512_load_si512(w64 + apart + 64 + g * 64);
            UNROLL for (int t = 0; t < T; t++) {
                __m512i q = bytes4((const uint8_t *)x[t] + b * 64 + g * 4);
                a[0][t] = _mm512_dpbusd_epi32(a[0][t], w0, q);
                a[1][t] = _mm512_dpbusd_epi32(a[1][t], w1, q);
            }
        }
        UNROLL for (int i = 0; i < 2; i++) {
            __m512 power = _mm512_load_ps(w64 + (i ? apart : 0));
            UNROLL for (int t = 0; t < T; t++) f[i][t] =
                NAME(add_block)(&a[i][t], cpu_q_scale(x[t], n64)[b], power, f[i][t]);
        }
    }
    UNROLL for (int t = 0; t < T; t++) {
        _mm512_storeu_ps(y + t * 16, f[0][t]);
        _mm512_storeu_ps(y2 + t * 16, f[1][t]);
    }
}

static void NAME(pair_mx4)(const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y,
                           uint8_t *scratch) {
    int64_t n64 = cpu_n64(n_col);
    size_t bytes = cpu_panel_bytes(CPU_MX4, n_col), apart = cpu_dot_scratch(n_col);
    float *y2 = y + n * 16;
    if (n <= MOST + 2 || panel[n64 * 32] || panel[bytes + n64 * 32]) {
        NAME(dot_mx4)(panel, n_col, x, n, y, scratch);
        NAME(dot_mx4)(panel + bytes, n_col, x, n, y2, scratch);
        return;
    }
    NAME(mx4_tile)(panel, panel + 2 * bytes, n64, x, MOST, y, scratch);
    NAME(mx4_tile)(panel + bytes, panel + 3 * bytes, n64, x, MOST, y2, scratch + apart);
#define CALL(T) NAME(u8_pair)(scratch, apart, n64, x + MOST + at_, T, y + (MOST + at_) * 16, y2 + (MOST + at_) * 16)
    FOR_TILES(n - MOST, PAIR_MOST, CALL)
#undef CALL
}
#endif

/* ---- K-quants ---- */

/* A scale and a minimum per 32 columns, codes of 4 or 5 bits. */
TILE NAME(min_tile)(const cpu_fmt fmt, const uint8_t *panel, int64_t n64, const void *const *x, const int T, float *y) {
    const __m512i low4 = _mm512_set1_epi8(15), fifth = _mm512_set1_epi8(16);
    __m512 f[MOST];
    UNROLL for (int t = 0; t < T; t++) f[t] = _mm512_setzero_ps();
    for (int64_t b = 0; b < n64 * 2; b++) {
        cpu_min_block at = cpu_min_at(fmt, panel, b);
        __m512 ws = half16(at.d), ms = half16(at.d + 32);
        if (fmt >= CPU_Q4K) {
            ws = _mm512_mul_ps(ws, bytes16(at.scale));
            ms = _mm512_mul_ps(ms, bytes16(at.scale + 128));
        }
        __m512i a[MOST][2], high = cpu_min_fifth(fmt) ? _mm512_loadu_si512(at.high) : low4;
        UNROLL for (int t = 0; t < T; t++) NAME(begin_planes)(a[t], 0);
        UNROLL for (int j = 0; j < 4; j++) {
            __m512i v = _mm512_loadu_si512(at.nibbles + j * 64);
            PREFETCH(at.nibbles + j * 64, 4096, 3, T);
            __m512i lo = _mm512_and_si512(v, low4), hi = _mm512_and_si512(_mm512_srli_epi16(v, 4), low4);
            if (cpu_min_fifth(fmt)) { /* bits 2j and 2j + 1 */
                __m512i h = j < 2 ? _mm512_slli_epi16(high, 4 - 2 * j) : _mm512_srli_epi16(high, 2 * j - 4);
                lo = _mm512_or_si512(lo, _mm512_and_si512(h, fifth));
                hi = _mm512_or_si512(hi, _mm512_and_si512(_mm512_srli_epi16(h, 1), fifth));
            }
            UNROLL for (int t = 0; t < T; t++) {
                NAME(dp_planes)(a[t], lo, x[t], n64, b * 32 + j * 8);
                NAME(dp_planes)(a[t], hi, x[t], n64, b * 32 + j * 8 + 4);
            }
        }
        UNROLL for (int t = 0; t < T; t++) {
            float s = cpu_q_scale(x[t], n64)[b / 2];
            float sum = (float)cpu_q_c32(x[t], n64)[b] * (s * (1.0f / 128));
            f[t] = _mm512_fmadd_ps(NAME(join_planes)(a[t]), _mm512_mul_ps(ws, _mm512_set1_ps(s)), f[t]);
            f[t] = _mm512_fmadd_ps(ms, _mm512_set1_ps(sum), f[t]);
        }
    }
    UNROLL for (int t = 0; t < T; t++) _mm512_storeu_ps(y + t * 16, f[t]);
}

TILE NAME(min_rows)(const cpu_fmt fmt, const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y) {
    int64_t n64 = cpu_n64(n_col);
#define CALL(T) NAME(min_tile)(fmt, panel, n64, x + at_, T, y + at_ * 16)
    FOR_TILES(n, MOST, CALL)
#undef CALL
}
GEN_MIN(NAME(dot_q41), CPU_Q41, NAME(min_rows))
GEN_MIN(NAME(dot_q51), CPU_Q51, NAME(min_rows))
GEN_MIN(NAME(dot_q4k), CPU_Q4K, NAME(min_rows))
GEN_MIN(NAME(dot_q5k), CPU_Q5K, NAME(min_rows))

TILE NAME(q6k_tile)(const uint8_t *panel, int64_t n64, const void *const *x, const int T, float *y) {
    const __m512i low4 = _mm512_set1_epi8(15), bits = _mm512_set1_epi8(0x30);
    __m512 f[MOST];
    UNROLL for (int t = 0; t < T; t++) f[t] = _mm512_setzero_ps();
    for (int64_t b = 0; b < n64 * 4; b++) { /* blocks of 16 */
        const uint8_t *head = panel + b / 16 * 3392, *p = head + 320 + b % 16 * 128;
        __m512i high = _mm512_loadu_si512(head + 2368 + b % 16 * 64);
        __m512 ws = _mm512_mul_ps(half16(head), _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
                                                    _mm_loadu_si128((const __m128i *)(head + 64 + b % 16 * 16)))));
        __m512i a[MOST][2];
        UNROLL for (int t = 0; t < T; t++) NAME(begin_planes)(a[t], cpu_q_c16(x[t], n64)[b]);
        UNROLL for (int j = 0; j < 2; j++) {
            __m512i v = _mm512_loadu_si512(p + j * 64);
            PREFETCH(p + j * 64, 4096, 3, T);
            __m512i s0 = j ? high : _mm512_slli_epi16(high, 4),
                    s1 = j ? _mm512_srli_epi16(high, 2) : _mm512_slli_epi16(high, 2);
            __m512i lo = _mm512_or_si512(_mm512_and_si512(v, low4), _mm512_and_si512(s0, bits));
            __m512i hi = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(v, 4), low4), _mm512_and_si512(s1, bits));
            UNROLL for (int t = 0; t < T; t++) {
                NAME(dp_planes)(a[t], lo, x[t], n64, b * 16 + j * 8);
                NAME(dp_planes)(a[t], hi, x[t], n64, b * 16 + j * 8 + 4);
            }
        }
        UNROLL for (int t = 0; t < T; t++) f[t] = _mm512_fmadd_ps(
            NAME(join_planes)(a[t]), _mm512_mul_ps(ws, _mm512_set1_ps(cpu_q_scale(x[t], n64)[b / 4])), f[t]);
    }
    UNROLL for (int t = 0; t < T; t++) _mm512_storeu_ps(y + t * 16, f[t]);
}

static void NAME(dot_q6k)(const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y,
                          uint8_t *scratch) {
    (void)scratch;
    int64_t n64 = cpu_n64(n_col);
#define CALL(T) NAME(q6k_tile)(panel, n64, x + at_, T, y + at_ * 16)
    FOR_TILES(n, MOST, CALL)
#undef CALL
}

/* ---- the screen of the head ---- */

TILE NAME(screen_tile)(const uint8_t *panel, int64_t n64, const void *const *x, const float *const *norm, const int T,
                       float *bound) {
    const uint8_t *head = panel, *p = panel + cpu_screen_head(n64);
    const __m512i low4 = _mm512_set1_epi8(15);
    __m512 f[4], u[4];
    UNROLL for (int t = 0; t < T; t++) f[t] = u[t] = _mm512_setzero_ps();
    for (int64_t b = 0; b < n64; b++, head += CPU_SCREEN_HEAD) {
        __m512i a[4][2], a2[4][2];
        UNROLL for (int t = 0; t < T; t++) {
            NAME(begin_planes)(a[t], cpu_q_c64(x[t], n64)[b] / 8); /* the codes are 16 too large */
            NAME(begin_planes)(a2[t], 0);
        }
        UNROLL for (int h = 0; h < 2; h++, p += 320) {
            __m512i high = _mm512_loadu_si512(p + 256);
            PREFETCH(p + 256, 6144, 2, T);
            UNROLL for (int j = 0; j < 4; j++) {
                __m512i v = _mm512_loadu_si512(p + j * 64);
                PREFETCH(p + j * 64, 6144, 2, T);
                __m512i lo = _mm512_or_si512(_mm512_and_si512(v, low4), fifth_bit(high, 2 * j));
                __m512i hi =
                    _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(v, 4), low4), fifth_bit(high, 2 * j + 1));
                UNROLL for (int t = 0; t < T; t++) {
                    NAME(dp_planes)(a[t], lo, x[t], n64, b * 64 + h * 32 + j * 8);
                    NAME(dp_planes)(a2[t], hi, x[t], n64, b * 64 + h * 32 + j * 8 + 4);
                }
            }
        }
        __m512 ws = half16(head), slack = _mm512_mul_ps(bytes16(head + 32), _mm512_abs_ps(ws));
        UNROLL for (int t = 0; t < T; t++) {
            UNROLL for (int i = 0; i < PLANES; i++) a[t][i] = _mm512_add_epi32(a[t][i], a2[t][i]);
            __m512 step = _mm512_mul_ps(ws, _mm512_set1_ps(cpu_q_scale(x[t], n64)[b]));
            f[t] = _mm512_fmadd_ps(NAME(join_planes)(a[t]), step, f[t]);
            u[t] = _mm512_fmadd_ps(slack, _mm512_set1_ps(norm[t][b]), u[t]);
        }
    }
    const __m512 one = _mm512_set1_ps(1.0f / CPU_SLACK_ONE), any = _mm512_set1_ps(INFINITY);
    UNROLL for (int t = 0; t < T; t++) {
        __m512 v = _mm512_fmadd_ps(u[t], one, f[t]);
        bound[t] = _mm512_reduce_max_ps(_mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), any));
    }
}

static void NAME(screen)(const uint8_t *panel, int64_t n_col, const void *const *x, const float *const *norm, int n,
                         float *bound) {
    int64_t n64 = cpu_n64(n_col);
    switch (n) {
    case 1:
        NAME(screen_tile)(panel, n64, x, norm, 1, bound);
        return;
    case 2:
        NAME(screen_tile)(panel, n64, x, norm, 2, bound);
        return;
    case 3:
        NAME(screen_tile)(panel, n64, x, norm, 3, bound);
        return;
    default:
        NAME(screen_tile)(panel, n64, x, norm, 4, bound);
    }
}

static void NAME(quantise)(const float *x, int64_t n, uint8_t *row) {
    int64_t n64 = cpu_n64(n);
    int32_t *c64 = (int32_t *)(row + n64 * 132), *c32 = (int32_t *)(row + n64 * 136),
            *c16 = (int32_t *)(row + n64 * 144);
    const int largest = PLANES == 2 ? 127 * 256 : 127;
    const __m512i low_byte = _mm512_set1_epi32(255), edge = _mm512_set1_epi32(128), one = _mm512_set1_epi32(1);
    for (int64_t b = 0; b < n64; b++) {
        int64_t left = n - b * 64;
        __m512 v[4], m = _mm512_setzero_ps();
        __mmask16 broken = 0;
        UNROLL for (int i = 0; i < 4; i++) {
            int64_t k = left - i * 16;
            v[i] = _mm512_maskz_loadu_ps(k >= 16 ? 0xffff
                                         : k > 0 ? (__mmask16)((1u << k) - 1)
                                                 : 0,
                                         x + b * 64 + i * 16);
            m = _mm512_max_ps(m, _mm512_abs_ps(v[i]));
            broken |= _mm512_fpclass_ps_mask(v[i], 0x99); /* infinities and NaNs */
        }
        float top = _mm512_reduce_max_ps(m), scale = top / (float)largest, inv = (float)largest / top;
        if (broken || top < 1e-30f) { /* NaN in, NaN out; or nothing worth keeping */
            scale = broken ? NAN : 0;
            inv = 0;
            UNROLL for (int i = 0; i < 4; i++) v[i] = _mm512_setzero_ps();
        }
        int32_t sum[4];
        UNROLL for (int i = 0; i < 4; i++) {
            __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], _mm512_set1_ps(inv)));
            __m512i high = q;
            if (PLANES == 2) {
                q = _mm512_mask_add_epi32(q, _mm512_cmpeq_epi32_mask(_mm512_and_si512(q, low_byte), edge), q, one);
                high = _mm512_srai_epi32(_mm512_add_epi32(q, edge), 8);
                _mm_storeu_si128((__m128i *)(row + (n64 + b) * 64 + i * 16), _mm512_cvtepi32_epi8(q));
            }
            _mm_storeu_si128((__m128i *)(row + b * 64 + i * 16), _mm512_cvtepi32_epi8(high));
            sum[i] = _mm512_reduce_add_epi32(q);
            c16[b * 4 + i] = -32 * sum[i];
        }
        ((float *)(row + n64 * 128))[b] = scale;
        c32[b * 2] = -128 * (sum[0] + sum[1]);
        c32[b * 2 + 1] = -128 * (sum[2] + sum[3]);
        c64[b] = c32[b * 2] + c32[b * 2 + 1];
    }
}
