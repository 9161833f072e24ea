#include "quant/kscale.h"

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

/* Sum of squared errors of 32 values as scale * q - min, with the nearest q. */
static double error_of(const float *x, double scale, double min, int q_max) {
    double error = 0;
    for (int j = 0; j < 32; j++) {
        double miss = scale * q_nearest(x[j] + min, scale, 0, q_max) - min - x[j];
        error += miss * miss;
    }
    return error;
}

/* Least squares of x = scale * q - min over the codes that (scale, min) gives; false when it is degenerate. */
static bool refit(const float *x, int q_max, double *scale, double *min) {
    double n = 32, sq = 0, sqq = 0, sx = 0, sxq = 0;
    for (int j = 0; j < 32; j++) {
        double q = q_nearest(x[j] + *min, *scale, 0, q_max);
        sq += q;
        sqq += q * q;
        sx += x[j];
        sxq += x[j] * q;
    }
    double det = n * sqq - sq * sq;
    if (det <= 0)
        return false;
    *scale = (n * sxq - sq * sx) / det;
    *min = (sq * *scale - sx) / n;
    if (*min < 0) { /* the format subtracts: all values positive means no minimum */
        *min = 0;
        *scale = sxq / sqq;
    }
    return *scale > 0;
}

/* The best scale and minimum of a sub-block: scales around the full range, each refitted to its own codes. */
static void fit_sub(const float *x, int q_max, double *scale, double *min) {
    double lo = 0, hi = x[0];
    for (int j = 0; j < 32; j++) {
        lo = fmin(lo, x[j]);
        hi = fmax(hi, x[j]);
    }
    *min = -lo;
    *scale = hi > lo ? (hi - lo) / q_max : 0;
    double best = error_of(x, *scale, *min, q_max);
    for (int step = -8; step <= 8 && hi > lo; step++) {
        double s = (hi - lo) / (q_max + step * 0.1), m = -lo;
        if (!refit(x, q_max, &s, &m))
            continue;
        double error = error_of(x, s, m, q_max);
        if (error < best) {
            best = error;
            *scale = s;
            *min = m;
        }
    }
}

/* The 6-bit scale and minimum near (scale, min) that are best once rounded. */
static void round_sub(const float *x, int q_max, double d, double dmin, double scale, double min, uint8_t *sc,
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

void q_kscale_fit(const float *x, int q_max, q_kscale *out, uint8_t q[256]) {
    double scale[8], min[8], max_scale = 0, max_min = 0;
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
