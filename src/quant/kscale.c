#include "quant/kscale.h"

#include <emmintrin.h>

#include "quant/block.h"

void q_kscale_unpack(const uint8_t bytes[12], uint8_t sc[8], uint8_t m[8]) {
    for (int s = 0; s < 4; s++) {
        sc[s] = bytes[s] & 63;
        m[s] = bytes[s + 4] & 63;
        sc[s + 4] = (bytes[s + 8] & 15) | (bytes[s] >> 6) << 4;
        m[s + 4] = (bytes[s + 8] >> 4) | (bytes[s + 4] >> 6) << 4;
    }
}

void q_kscale_pack(const uint8_t sc[8], const uint8_t m[8], uint8_t bytes[12]) {
    for (int s = 0; s < 4; s++) {
        bytes[s] = (uint8_t)(sc[s] | (sc[s + 4] >> 4) << 6);
        bytes[s + 4] = (uint8_t)(m[s] | (m[s + 4] >> 4) << 6);
        bytes[s + 8] = (uint8_t)((sc[s + 4] & 15) | (m[s + 4] & 15) << 4);
    }
}

/* Choosing scales tries codes some fifty times for every value, so two values go together. */

/* The codes nearest to (x + min) / scale, inv being 1 / scale: q_nearest of two values, 0..q_max. */
static inline __m128d codes(__m128d x, __m128d inv, __m128d min, __m128d q_max) {
    const __m128d magic = _mm_set1_pd(0x1.8p52); /* adding it rounds to an integer */
    __m128d q = _mm_mul_pd(_mm_add_pd(x, min), inv);
    q = _mm_min_pd(_mm_max_pd(q, _mm_setzero_pd()), q_max);
    return _mm_sub_pd(_mm_add_pd(q, magic), magic);
}

static inline __m128d inverse(double scale) { return _mm_set1_pd(scale != 0 ? 1 / scale : 0); }

static inline double both(__m128d v) { return v[0] + v[1]; }

/* Sum of squared errors of 32 values as scale * q - min, with the nearest q. */
static double error_of(const double *x, double scale, double min, int q_max) {
    __m128d inv = inverse(scale), s = _mm_set1_pd(scale), m = _mm_set1_pd(min), top = _mm_set1_pd(q_max), sum[2] = {0};
    for (int j = 0; j < 32; j += 2) {
        __m128d v = _mm_loadu_pd(x + j);
        __m128d miss = _mm_sub_pd(_mm_sub_pd(_mm_mul_pd(s, codes(v, inv, m, top)), m), v);
        sum[j / 2 % 2] = _mm_add_pd(sum[j / 2 % 2], _mm_mul_pd(miss, miss));
    }
    return both(_mm_add_pd(sum[0], sum[1]));
}

/* Least squares of x = scale * q - min over the codes that (scale, min) gives, and the squared error that these codes
 * then leave; false when it is degenerate. */
static bool refit(const double *x, int q_max, double *scale, double *min, double *error) {
    __m128d inv = inverse(*scale), m = _mm_set1_pd(*min), top = _mm_set1_pd(q_max);
    __m128d vq = {0}, vqq = {0}, vx = {0}, vxx = {0}, vxq = {0};
    for (int j = 0; j < 32; j += 2) {
        __m128d v = _mm_loadu_pd(x + j), q = codes(v, inv, m, top);
        vq = _mm_add_pd(vq, q);
        vqq = _mm_add_pd(vqq, _mm_mul_pd(q, q));
        vx = _mm_add_pd(vx, v);
        vxx = _mm_add_pd(vxx, _mm_mul_pd(v, v));
        vxq = _mm_add_pd(vxq, _mm_mul_pd(v, q));
    }
    double n = 32, sq = both(vq), sqq = both(vqq), sx = both(vx), sxq = both(vxq), det = n * sqq - sq * sq;
    if (det <= 0)
        return false;
    *scale = (n * sxq - sq * sx) / det;
    *min = (sq * *scale - sx) / n;
    if (*min < 0) { /* the format subtracts: all values positive means no minimum */
        *min = 0;
        *scale = sxq / sqq;
    }
    *error = both(vxx) + 2 * (*min * sx - *scale * (sxq + *min * sq)) + *scale * *scale * sqq + n * *min * *min;
    return *scale > 0;
}

/* The best scale and minimum of a sub-block: scales around the full range, each refitted to its own codes. */
static void fit_sub(const double *x, int q_max, double *scale, double *min) {
    double lo = 0, hi = x[0];
    for (int j = 0; j < 32; j++) {
        lo = fmin(lo, x[j]);
        hi = fmax(hi, x[j]);
    }
    *min = -lo;
    *scale = hi > lo ? (hi - lo) / q_max : 0;
    double best = error_of(x, *scale, *min, q_max);
    for (int step = -4; step <= 4 && hi > lo; step++) {
        double s = (hi - lo) / (q_max + step * 0.2), m = -lo, error;
        if (refit(x, q_max, &s, &m, &error) && error < best) {
            best = error;
            *scale = s;
            *min = m;
        }
    }
}

/* The 6-bit scale and minimum near (scale, min) that are best once rounded. */
static void round_sub(const double *x, int q_max, double d, double dmin, double scale, double min, uint8_t *sc,
                      uint8_t *m) {
    int s0 = q_nearest(scale, d, 0, 63), m0 = q_nearest(min, dmin, 0, 63);
    double best = INFINITY;
    for (int s = s0 - 1; s <= s0 + 1; s++) {
        for (int k = m0 - 1; k <= m0 + 1; k++) {
            if (s < 0 || s > 63 || k < 0 || k > 63)
                continue;
            double error = error_of(x, d * s, dmin * k, q_max);
            if (error < best) {
                best = error;
                *sc = (uint8_t)s;
                *m = (uint8_t)k;
            }
        }
    }
}

void q_kscale_fit(const float *value, int q_max, q_kscale *out, uint8_t q[256]) {
    double x[256], scale[8], min[8], max_scale = 0, max_min = 0;
    for (int j = 0; j < 256; j++)
        x[j] = value[j];
    for (int s = 0; s < 8; s++) {
        fit_sub(x + 32 * s, q_max, &scale[s], &min[s]);
        max_scale = fmax(max_scale, scale[s]);
        max_min = fmax(max_min, min[s]);
    }
    out->d = q_scale_f16(max_scale / 63);
    out->dmin = q_scale_f16(max_min / 63);
    double d = f32_from_f16(out->d), dmin = f32_from_f16(out->dmin);
    for (int s = 0; s < 8; s++) {
        out->sc[s] = out->m[s] = 0;
        round_sub(x + 32 * s, q_max, d, dmin, scale[s], min[s], &out->sc[s], &out->m[s]);
        for (int j = 32 * s; j < 32 * s + 32; j++)
            q[j] = (uint8_t)q_nearest(x[j] + dmin * out->m[s], d * out->sc[s], 0, q_max);
    }
}
