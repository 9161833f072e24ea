/* backend/cpu/attention_avx512.h: attention of up to 8 query rows at a time to a page, their scores and values in two
 * registers each. Included by kernels_avx512.c. */

enum { ROWS = 8 };

/* gen_exp, but exactly 0 for -infinity */
static inline __m512 exp16(__m512 x) {
    __mmask16 visible = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-INFINITY), _CMP_NEQ_OQ);
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    f = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), f);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, f), f, f), _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(visible, p, n);
}

/* gen_softmax in registers */
static inline float softmax(cpu_attn_tile *t, int i, float *s) {
    const uint64_t bits = (~0ull >> (63 - t->last[i])) & (~0ull << t->first[i]);
    const __m512 none = _mm512_set1_ps(-INFINITY), scale = _mm512_set1_ps(t->scale);
    __m512 v[4], sum = _mm512_setzero_ps();
    UNROLL for (int j = 0; j < 4; j++) v[j] =
        _mm512_mask_mul_ps(none, (__mmask16)(bits >> (j * 16)), _mm512_loadu_ps(s + j * 16), scale);
    float best = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(v[0], v[1]), _mm512_max_ps(v[2], v[3])));
    float top = best > t->max[i] ? best : t->max[i];
    UNROLL for (int j = 0; j < 4; j++) {
        v[j] = exp16(_mm512_sub_ps(v[j], _mm512_set1_ps(top)));
        _mm512_storeu_ps(s + j * 16, v[j]);
        sum = _mm512_add_ps(sum, v[j]);
    }
    float keep = _mm512_cvtss_f32(exp16(_mm512_set1_ps(t->max[i] - top)));
    t->max[i] = top;
    t->sum[i] = t->sum[i] * keep + _mm512_reduce_add_ps(sum);
    return keep;
}

static inline __m512 load16(const void *p, int64_t i, const bool f16) {
    return f16 ? half16((const uint16_t *)p + i) : _mm512_loadu_ps((const float *)p + i);
}

/* The positions that any of n rows sees. */
static inline bool visible(const cpu_attn_tile *t, int at, int n, int *first, int *last) {
    *first = CPU_PAGE;
    *last = -1;
    for (int r = at; r < at + n; r++) {
        if (t->last[r] < t->first[r])
            continue;
        *first = t->first[r] < *first ? t->first[r] : *first;
        *last = t->last[r] > *last ? t->last[r] : *last;
    }
    return *first <= *last;
}

/* Scores to weights; keep: what the sums so far are multiplied with. */
static inline void weigh(cpu_attn_tile *t, int at, int n, float (*s)[CPU_PAGE], float *keep) {
    for (int r = 0; r < n; r++) {
        if (t->last[at + r] < t->first[at + r]) {
            keep[r] = 1;
            memset(s[r], 0, sizeof s[r]);
        } else {
            keep[r] = softmax(t, at + r, s[r]);
        }
    }
}

TILE attn_tile(cpu_attn_tile *t, const void *k, const void *v, const int at, const int R, const bool f16) {
    int hd = t->head_dim, first, last;
    float s[ROWS][CPU_PAGE], keep[ROWS];
    if (!visible(t, at, R, &first, &last))
        return;
    for (int p = 0; p < CPU_PAGE; p += 32) {
        __m512 a[8], b[8];
        UNROLL for (int r = 0; r < R; r++) a[r] = b[r] = _mm512_setzero_ps();
        for (int d = 0; d < hd; d++) {
            __m512 k0 = load16(k, d * CPU_PAGE + p, f16), k1 = load16(k, d * CPU_PAGE + p + 16, f16);
            UNROLL for (int r = 0; r < R; r++) {
                __m512 q = _mm512_set1_ps(t->q[at + r][d]);
                a[r] = _mm512_fmadd_ps(q, k0, a[r]);
                b[r] = _mm512_fmadd_ps(q, k1, b[r]);
            }
        }
        UNROLL for (int r = 0; r < R; r++) {
            _mm512_storeu_ps(&s[r][p], a[r]);
            _mm512_storeu_ps(&s[r][p + 16], b[r]);
        }
    }
    weigh(t, at, R, s, keep);
    for (int d = 0; d < hd; d += 32) {
        __m512 a[8], b[8];
        UNROLL for (int r = 0; r < R; r++) {
            a[r] = _mm512_mul_ps(_mm512_loadu_ps(t->acc[at + r] + d), _mm512_set1_ps(keep[r]));
            b[r] = _mm512_mul_ps(_mm512_loadu_ps(t->acc[at + r] + d + 16), _mm512_set1_ps(keep[r]));
        }
        for (int p = first; p <= last; p++) {
            __m512 v0 = load16(v, p * hd + d, f16), v1 = load16(v, p * hd + d + 16, f16);
            UNROLL for (int r = 0; r < R; r++) {
                __m512 w = _mm512_set1_ps(s[r][p]);
                a[r] = _mm512_fmadd_ps(w, v0, a[r]);
                b[r] = _mm512_fmadd_ps(w, v1, b[r]);
            }
        }
        UNROLL for (int r = 0; r < R; r++) {
            _mm512_storeu_ps(t->acc[at + r] + d, a[r]);
            _mm512_storeu_ps(t->acc[at + r] + d + 16, b[r]);
        }
    }
}

/* ---- for 8-bit activations: products of bf16, two at a time, less noise than theirs ---- */

/* A page as pairs: of neighbouring dimensions of a key, and of neighbouring positions of a value. */
typedef struct bf16_page {
    uint32_t k[GEN_MAX_HEAD / 2][CPU_PAGE], v[CPU_PAGE / 2][GEN_MAX_HEAD];
} bf16_page;

static inline void store_pairs(uint32_t *p, __m512 even, __m512 odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
}

/* Positions that nobody sees may hold anything. */
TILE to_pairs(bf16_page *page, const void *k, const void *v, int hd, int first, int last, const bool f16) {
    for (int d = 0; d < hd; d += 2)
        for (int p = first & ~31; p <= (last | 31); p += 16)
            store_pairs(&page->k[d / 2][p], load16(k, d * CPU_PAGE + p, f16), load16(k, (d + 1) * CPU_PAGE + p, f16));
    for (int p = first & ~1; p <= last; p += 2)
        for (int d = 0; d < hd; d += 16)
            store_pairs(&page->v[p / 2][d], p < first ? _mm512_setzero_ps() : load16(v, p * hd + d, f16),
                        p == last ? _mm512_setzero_ps() : load16(v, (p + 1) * hd + d, f16));
}

/* n (a multiple of 32) floats as bf16 */
static inline void to_bf16(uint32_t *out, const float *x, int n) {
    for (int i = 0; i < n; i += 32)
        _mm512_storeu_si512(out + i / 2,
                            (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16), _mm512_loadu_ps(x + i)));
}

static inline __m512 dot_pairs(__m512 sum, const uint32_t *one, __m512i many) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32((int)*one), (__m512bh)many);
}

TILE pairs_tile(cpu_attn_tile *t, const bf16_page *page, const int at, const int R) {
    int hd = t->head_dim, first, last;
    float s[ROWS][CPU_PAGE] = {{0}}, keep[ROWS];
    uint32_t q[ROWS][GEN_MAX_HEAD / 2], w[ROWS][CPU_PAGE / 2];
    if (!visible(t, at, R, &first, &last))
        return;
    for (int r = 0; r < R; r++)
        to_bf16(q[r], t->q[at + r], hd);
    for (int p = first & ~31; p <= last; p += 32) {
        __m512 a[ROWS], b[ROWS];
        UNROLL for (int r = 0; r < R; r++) a[r] = b[r] = _mm512_setzero_ps();
        for (int d = 0; d < hd / 2; d++) {
            __m512i k0 = _mm512_loadu_si512(&page->k[d][p]), k1 = _mm512_loadu_si512(&page->k[d][p + 16]);
            UNROLL for (int r = 0; r < R; r++) {
                a[r] = dot_pairs(a[r], &q[r][d], k0);
                b[r] = dot_pairs(b[r], &q[r][d], k1);
            }
        }
        UNROLL for (int r = 0; r < R; r++) {
            _mm512_storeu_ps(&s[r][p], a[r]);
            _mm512_storeu_ps(&s[r][p + 16], b[r]);
        }
    }
    weigh(t, at, R, s, keep);
    for (int r = 0; r < R; r++)
        to_bf16(w[r], s[r], CPU_PAGE);
    for (int d = 0; d < hd; d += 32) {
        __m512 a[ROWS], b[ROWS];
        UNROLL for (int r = 0; r < R; r++) {
            a[r] = _mm512_mul_ps(_mm512_loadu_ps(t->acc[at + r] + d), _mm512_set1_ps(keep[r]));
            b[r] = _mm512_mul_ps(_mm512_loadu_ps(t->acc[at + r] + d + 16), _mm512_set1_ps(keep[r]));
        }
        for (int p = first / 2; p <= last / 2; p++) {
            __m512i v0 = _mm512_loadu_si512(&page->v[p][d]), v1 = _mm512_loadu_si512(&page->v[p][d + 16]);
            UNROLL for (int r = 0; r < R; r++) {
                a[r] = dot_pairs(a[r], &w[r][p], v0);
                b[r] = dot_pairs(b[r], &w[r][p], v1);
            }
        }
        UNROLL for (int r = 0; r < R; r++) {
            _mm512_storeu_ps(t->acc[at + r] + d, a[r]);
            _mm512_storeu_ps(t->acc[at + r] + d + 16, b[r]);
        }
    }
}

TILE attn_pairs(cpu_attn_tile *t, const void *k, const void *v, const bool f16) {
    bf16_page page;
    int first, last;
    if (!visible(t, 0, t->n, &first, &last))
        return;
    to_pairs(&page, k, v, t->head_dim, first, last, f16);
#define CALL(R) pairs_tile(t, &page, at_, R)
    FOR_TILES(t->n, 8, CALL)
#undef CALL
}

TILE attn_floats(cpu_attn_tile *t, const void *k, const void *v, const bool f16){
#define CALL(R) attn_tile(t, k, v, at_, R, f16)
    FOR_TILES(t->n, 8, CALL)
#undef CALL
}

/* Heads that do not fill registers go the plain way. */
#define ATTENTION(name, rows, f16, plain)                                                                              \
    static void name(cpu_attn_tile *t, const void *k, const void *v) {                                                 \
        if (t->head_dim % 32)                                                                                          \
            plain(t, k, v);                                                                                            \
        else                                                                                                           \
            rows(t, k, v, f16);                                                                                        \
    }
ATTENTION(attn_f16_16, attn_floats, true, gen_attn_f16) ATTENTION(attn_f32_16, attn_floats, false, gen_attn_f32)
    ATTENTION(attn_f16_8, attn_pairs, true, gen_attn_f16) ATTENTION(attn_f32_8, attn_pairs, false, gen_attn_f32)
