/* The ground floor: 16-bit floats over all their values, checked sizes, buffers. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/buf.h"
#include "base/checked.h"
#include "base/half.h"

static void every_half_survives_a_round_trip(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        float f = f32_from_f16((uint16_t)h), b = f32_from_bf16((uint16_t)h);
        if (isnan(f))
            assert_true(isnan(f32_from_f16(f16_from_f32(f))));
        else
            assert_int_equal(f16_from_f32(f), h);
        if (isnan(b))
            assert_true(isnan(f32_from_bf16(bf16_from_f32(b))));
        else
            assert_int_equal(bf16_from_f32(b), h);
    }
}

/* The compiler's own half type is an independent opinion on rounding, subnormals and overflow. */
static void half_rounds_as_the_compiler_does(void **state) {
    (void)state;
    for (uint64_t u = 0; u < (uint64_t)1 << 32; u += 65521) {
        float f = f32_from_bits((uint32_t)u);
        _Float16 want = (_Float16)f;
        uint16_t bits;
        memcpy(&bits, &want, sizeof bits);
        if (isnan(f))
            assert_true(isnan(f32_from_f16(f16_from_f32(f))));
        else
            assert_int_equal(f16_from_f32(f), bits);
    }
}

static void bf16_ties_go_to_even(void **state) {
    (void)state;
    assert_int_equal(bf16_from_f32(f32_from_bits(0x3f808000u)), 0x3f80);
    assert_int_equal(bf16_from_f32(f32_from_bits(0x3f818000u)), 0x3f82);
    assert_int_equal(bf16_from_f32(f32_from_bits(0x3f808001u)), 0x3f81);
}

static void e8m0_is_a_power_of_two_or_nan(void **state) {
    (void)state;
    for (int e = 0; e < 255; e++)
        assert_true(f32_from_e8m0((uint8_t)e) == ldexpf(1, e - 127));
    assert_true(isnan(f32_from_e8m0(255)));
}

static void sizes_that_wrap_are_refused(void **state) {
    (void)state;
    uint64_t v;
    assert_true(ck_add(UINT64_MAX - 1, 1, &v));
    assert_false(ck_add(UINT64_MAX, 1, &v));
    assert_true(ck_mul(1ull << 32, (1ull << 32) - 1, &v));
    assert_false(ck_mul(1ull << 32, 1ull << 32, &v));
    assert_true(ck_align(33, 32, &v));
    assert_int_equal(v, 64);
    assert_false(ck_align(UINT64_MAX - 3, 32, &v));
    assert_false(ck_align(1, 0, &v));
    assert_false(ck_align(1, 24, &v));
}

static void buffers_grow_and_stay_terminated(void **state) {
    (void)state;
    buf b = {0};
    for (int i = 0; i < 1000; i++)
        buf_printf(&b, "%d,", i);
    assert_false(b.failed);
    assert_int_equal(strlen(b.data), b.len);
    assert_memory_equal(b.data, "0,1,2,", 6);
    buf_clear(&b);
    buf_add(&b, "a\0b", 3);
    assert_int_equal(b.len, 3);
    assert_int_equal(b.data[3], 0);
    buf_free(&b);
    assert_null(b.data);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_half_survives_a_round_trip),
        cmocka_unit_test(half_rounds_as_the_compiler_does),
        cmocka_unit_test(bf16_ties_go_to_even),
        cmocka_unit_test(e8m0_is_a_power_of_two_or_nan),
        cmocka_unit_test(sizes_that_wrap_are_refused),
        cmocka_unit_test(buffers_grow_and_stay_terminated),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
