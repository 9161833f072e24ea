/* tests/testing.h: what test programs share: cmocka with its includes, repeatable random numbers, data files. */
#ifndef ORCD_TESTS_TESTING_H
#define ORCD_TESTS_TESTING_H

#include <math.h>
#include <setjmp.h>
#include <stdbool.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* splitmix64: a whole-program-independent stream per seed. */
static inline uint64_t t_random(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static inline uint64_t t_below(uint64_t *state, uint64_t n) { return t_random(state) % n; }

/* Standard normal: the sum of four uniforms, scaled (tails end at 3.5). */
static inline float t_normal(uint64_t *state) {
    double sum = 0;
    for (int i = 0; i < 4; i++)
        sum += (double)(t_random(state) >> 11) * 0x1p-53;
    return (float)((sum - 2) * 1.7320508075688772);
}

static inline void t_fill_normal(uint64_t *state, float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        x[i] = t_normal(state);
}

/* ||a - b|| / ||b||, in double; NaN anywhere in `a` or a difference where b is zero gives NaN or infinity. */
static inline double t_rel_error(const float *a, const float *b, size_t n) {
    double miss = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        miss += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += (double)b[i] * b[i];
    }
    return miss == 0 ? 0 : sqrt(miss / norm);
}

/* A file below the repository root, where tests run; free() it. Fails the test when it cannot be read. */
static inline uint8_t *t_read(const char *path, size_t *n) {
    FILE *f = fopen(path, "rb");
    if (!f)
        fail_msg("%s: cannot be opened; run tests from the repository root", path);
    fseek(f, 0, SEEK_END);
    long size = ftell(f);
    rewind(f);
    assert_true(size >= 0);
    uint8_t *data = malloc((size_t)size + 1);
    assert_non_null(data);
    *n = fread(data, 1, (size_t)size, f);
    assert_int_equal(*n, size);
    fclose(f);
    return data;
}

#endif
