/* Weight types against golden vectors (tools/quant_golden.py), the OCP definition, and their own packing. */
#include "testing.h"

#include <ctype.h>
#include <float.h>

#include "base/half.h"
#include "base/status.h"
#include "quant/quant.h"

static void types_are_found_by_number_and_name(void **state) {
    (void)state;
    assert_int_equal(q_count(), 12);
    for (size_t i = 0; i < q_count(); i++) {
        const q_traits *t = q_at(i);
        assert_ptr_equal(q_find((uint32_t)t->type), t);
        assert_ptr_equal(q_find_name(t->name), t);
        assert_true(i == 0 || q_at(i - 1)->type < t->type);
    }
    assert_ptr_equal(q_find_name("mxfp4"), q_find(39));
    assert_null(q_at(q_count()));
    assert_null(q_find(4));
    assert_null(q_find(UINT32_MAX));
    assert_null(q_find_name("Q4"));
}

static bool same_float(float a, float b) { return f32_bits(a) == f32_bits(b) || (isnan(a) && isnan(b)); }

static void unpack_equals_golden_vectors_bit_for_bit(void **state) {
    (void)state;
    for (size_t i = 0; i < q_count(); i++) {
        const q_traits *t = q_at(i);
        char path[64];
        int len = snprintf(path, sizeof path, "tests/data/quant/%s.f32", t->name);
        for (int c = 0; c < len; c++)
            path[c] = (char)tolower(path[c]);
        size_t size;
        uint8_t *file = t_read(path, &size);
        size_t n_block = size / (t->block_bytes + 4 * t->block_len), n = n_block * t->block_len;
        assert_true(n_block >= 8);
        assert_int_equal(n_block * (t->block_bytes + 4 * t->block_len), size);
        /* one byte past the start of the blocks: no alignment is assumed */
        uint8_t *blocks = malloc(n_block * t->block_bytes + 1);
        float *got = malloc(n * sizeof *got), want;
        memcpy(blocks + 1, file + 4 * n, n_block * t->block_bytes);
        t->unpack(blocks + 1, got, n);
        for (size_t j = 0; j < n; j++) {
            memcpy(&want, file + 4 * j, 4);
            if (!same_float(got[j], want) && got[j] != want) /* `gguf` has no -0 in MXFP4 */
                fail_msg("%s: element %zu is %a, not %a", t->name, j, got[j], want);
        }
        free(got);
        free(blocks);
        free(file);
    }
}

static void mxfp4_all_codes_under_all_scales(void **state) {
    (void)state;
    size_t size;
    uint8_t *table = t_read("tests/data/quant/mxfp4_table.f32", &size);
    assert_int_equal(size, 256 * 16 * 4);
    for (int e = 0; e < 256; e++) {
        uint8_t block[17] = {(uint8_t)e};
        for (int j = 0; j < 16; j++) /* element j has code j, element j + 16 code 15 - j */
            block[1 + j] = (uint8_t)(j | (15 - j) << 4);
        float got[32], want[16];
        q_find(Q_MXFP4)->unpack(block, got, 32);
        memcpy(want, table + 64 * e, 64);
        for (int j = 0; j < 32; j++) {
            int code = j < 16 ? j : 31 - j;
            if (!same_float(got[j], want[code]))
                fail_msg("scale %d code %d at element %d is %a, not %a", e, code, j, got[j], want[code]);
        }
    }
    free(table);
}

static void mxfp4_pack_rounds_ties_to_even_and_keeps_signs(void **state) {
    (void)state;
    /* 6 fixes the scale at 1: any neighbour is worse for the exactly representable rest */
    float x[32] = {6, -6, 4, 3, 2,    1.5f, 1,     .5f,   -.5f, -1,   -1.5f, -2, -3,    -4,     0,     -0.0f,
                   6, -6, 4, 3, .25f, .75f, 1.25f, 1.75f, 2.5f, 3.5f, 5,     -5, -3.5f, -0.25f, 0.26f, 1.74f};
    float want[32] = {6, -6, 4, 3, 2, 1.5f, 1, .5f, -.5f, -1, -1.5f, -2, -3, -4,    0,   -0.0f,
                      6, -6, 4, 3, 0, 1,    1, 2,   2,    4,  4,     -4, -4, -0.0f, .5f, 1.5f};
    float got[32];
    uint8_t block[17];
    q_find(Q_MXFP4)->pack(x, block, 32);
    q_find(Q_MXFP4)->unpack(block, got, 32);
    assert_int_equal(block[0], 127);
    assert_memory_equal(got, want, sizeof want);
}

static void mxfp4_pack_takes_the_better_neighbour_scale(void **state) {
    (void)state;
    float x[32], got[32];
    uint8_t block[17];
    for (int j = 0; j < 32; j++)
        x[j] = 7.9f; /* under scale 1 each is 6, under scale 2 each is 8 */
    q_find(Q_MXFP4)->pack(x, block, 32);
    q_find(Q_MXFP4)->unpack(block, got, 32);
    assert_int_equal(block[0], 128);
    assert_true(got[0] == 8 && got[31] == 8);
}

/* Values that the type holds exactly come back exactly: every code, extremes included. */
static void pack_of_representable_values_is_exact(void **state) {
    (void)state;
    uint64_t seed = 1;
    for (size_t i = 0; i < q_count(); i++) {
        const q_traits *t = q_at(i);
        if (t->block_len == 256) /* their scales are searched for, not recovered */
            continue;
        for (int round = 0; round < 64; round++) {
            float x[32], y[32];
            uint8_t bytes[128];
            int first = t->type == Q_Q4_0 ? -8 : t->type == Q_Q5_0 ? -16 : t->type == Q_Q8_0 ? -127 : 0;
            int last = t->type == Q_Q8_0 ? 127 : t->type == Q_Q5_1 ? 31 : first == 0 ? 15 : -first - 1;
            float d = ldexpf(1, (int)t_below(&seed, 12) - 6), m = d * ((float)t_below(&seed, 9) - 6);
            static const float e2m1[8] = {0, .5f, 1, 1.5f, 2, 3, 4, 6};
            for (int j = 0; j < 32; j++) {
                int q = j == 5 ? first : j == 21 ? last : first + (int)t_below(&seed, (uint64_t)(last - first + 1));
                x[j] = t->block_len == 1                        ? ldexpf((float)t_below(&seed, 128) - 64, -6)
                       : t->type == Q_MXFP4                     ? d * (j == 9 ? -6 : e2m1[t_below(&seed, 8)])
                       : t->type == Q_Q4_1 || t->type == Q_Q5_1 ? d * (float)q + m
                                                                : d * (float)q;
            }
            t->pack(x, bytes, 32);
            t->unpack(bytes, y, 32);
            for (int j = 0; j < 32; j++)
                if (x[j] != y[j])
                    fail_msg("%s: %a came back as %a", t->name, x[j], y[j]);
        }
    }
}

static void pack_error_on_normal_data_is_bounded(void **state) {
    (void)state;
    /* measured on this data, plus a tenth */
    static const struct {
        q_type type;
        double bound;
    } row[] = {{Q_F32, 0},      {Q_F16, 2.5e-4}, {Q_BF16, 2e-3},  {Q_Q8_0, 5.5e-3}, {Q_Q4_0, 0.095}, {Q_Q4_1, 0.08},
               {Q_Q5_0, 0.047}, {Q_Q5_1, 0.04},  {Q_Q4_K, 0.075}, {Q_Q5_K, 0.037},  {Q_Q6_K, 0.019}, {Q_MXFP4, 0.12}};
    enum { N = 64 * 256 };
    uint64_t seed = 2;
    float *x = malloc(N * sizeof *x), *y = malloc(N * sizeof *y);
    uint8_t *bytes = malloc(N * 4);
    t_fill_normal(&seed, x, N);
    assert_int_equal(ORCD_COUNT(row), q_count());
    for (size_t i = 0; i < ORCD_COUNT(row); i++) {
        const q_traits *t = q_find(row[i].type);
        t->pack(x, bytes, N);
        t->unpack(bytes, y, N);
        double error = t_rel_error(y, x, N);
        print_message("           %-6s error %.4f\n", t->name, error);
        if (!(error <= row[i].bound))
            fail_msg("%s: error %g is more than %g", t->name, error, row[i].bound);
    }
    free(bytes);
    free(y);
    free(x);
}

static void all_zero_blocks_stay_zero(void **state) {
    (void)state;
    float x[256] = {0}, y[256];
    uint8_t bytes[1024];
    for (size_t i = 0; i < q_count(); i++) {
        q_at(i)->pack(x, bytes, 256);
        q_at(i)->unpack(bytes, y, 256);
        for (int j = 0; j < 256; j++)
            assert_true(y[j] == 0);
    }
}

/* Hostile values: pack returns, and a block type gives finite weights; 16- and 32-bit types keep NaN and infinity. */
static void pack_survives_nan_infinity_and_extremes(void **state) {
    (void)state;
    static const float odd[] = {NAN,          INFINITY,      -INFINITY, FLT_MAX, -FLT_MAX,
                                FLT_TRUE_MIN, -FLT_TRUE_MIN, 1e-30f,    1e30f,   65504};
    uint64_t seed = 3;
    for (size_t i = 0; i < q_count(); i++) {
        const q_traits *t = q_at(i);
        for (int round = 0; round < 200; round++) {
            float x[256], y[256];
            uint8_t bytes[1024];
            for (int j = 0; j < 256; j++) { /* whole blocks of one odd value, then mixtures */
                float strange = odd[round < 20 ? round / 2 : (int)t_below(&seed, ORCD_COUNT(odd))];
                x[j] = round < 20 ? (round % 2 && j ? 0 : strange) : t_below(&seed, 3) ? t_normal(&seed) : strange;
            }
            t->pack(x, bytes, 256);
            t->unpack(bytes, y, 256);
            for (int j = 0; j < 256; j++)
                if (t->block_len > 1 ? !isfinite(y[j]) : isnan(x[j]) != isnan(y[j]))
                    fail_msg("%s: %g came back as %g", t->name, x[j], y[j]);
        }
    }
}

static void dot_is_the_sum_of_products_in_index_order(void **state) {
    (void)state;
    enum { N = 512 };
    uint64_t seed = 4;
    for (size_t i = 0; i < q_count(); i++) {
        const q_traits *t = q_at(i);
        float w[N], x[N];
        uint8_t bytes[N * 4];
        t_fill_normal(&seed, w, N);
        t_fill_normal(&seed, x, N);
        t->pack(w, bytes, N);
        t->unpack(bytes, w, N);
        double sum = 0;
        for (int j = 0; j < N; j++)
            sum += (double)w[j] * x[j];
        assert_true(t->dot(bytes, x, N) == sum);
        assert_true(t->dot(bytes, x, 0) == 0);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(types_are_found_by_number_and_name),
        cmocka_unit_test(unpack_equals_golden_vectors_bit_for_bit),
        cmocka_unit_test(mxfp4_all_codes_under_all_scales),
        cmocka_unit_test(mxfp4_pack_rounds_ties_to_even_and_keeps_signs),
        cmocka_unit_test(mxfp4_pack_takes_the_better_neighbour_scale),
        cmocka_unit_test(pack_of_representable_values_is_exact),
        cmocka_unit_test(pack_error_on_normal_data_is_bounded),
        cmocka_unit_test(all_zero_blocks_stay_zero),
        cmocka_unit_test(pack_survives_nan_infinity_and_extremes),
        cmocka_unit_test(dot_is_the_sum_of_products_in_index_order),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
