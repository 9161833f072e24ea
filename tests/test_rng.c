#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/rng.h"

/* Published with Random123 (Salmon et al., SC'11) as philox4x32-10. */
static void philox__known_answers(void **state) {
    (void)state;
    static const struct {
        uint32_t counter[4], key[2], want[4];
    } kat[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < sizeof kat / sizeof *kat; i++) {
        uint32_t out[4];
        rng_philox(kat[i].counter, kat[i].key, out);
        assert_memory_equal(out, kat[i].want, sizeof out);
    }
}

static void uniform__stays_below_one_and_is_balanced(void **state) {
    (void)state;
    double sum = 0, low = 1, high = 0;
    const int n = 100000;
    for (int i = 0; i < n; i++) {
        double u = rng_uniform(7, 3, (uint64_t)i);
        sum += u;
        low = u < low ? u : low;
        high = u > high ? u : high;
    }
    assert_true(low >= 0 && high < 1 && low < 1e-3 && high > 1 - 1e-3);
    assert_true(sum / n > 0.496 && sum / n < 0.504);
}

static void uniform__seed_stream_and_index_all_matter(void **state) {
    (void)state;
    double u = rng_uniform(1, 2, 3);
    assert_true(u == rng_uniform(1, 2, 3));
    assert_true(u != rng_uniform(1 + (1ull << 40), 2, 3));
    assert_true(u != rng_uniform(1, 2 + (1ull << 40), 3));
    assert_true(u != rng_uniform(1, 2, 3 + (1ull << 40)));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(philox__known_answers),
        cmocka_unit_test(uniform__stays_below_one_and_is_balanced),
        cmocka_unit_test(uniform__seed_stream_and_index_all_matter),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
