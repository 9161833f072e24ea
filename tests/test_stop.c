/* Stop strings: found across any cutting of the text, nothing lost, nothing leaked. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "text/stop.h"

/* Feed `text` in pieces of `step` bytes; the emitted text must be `want`, the match `matched`. */
static void expect(const char *const *stop, size_t n, const char *text, size_t step, const char *want, int matched) {
    stop_set *s;
    buf out = {0};
    int got = -1;
    assert_int_equal(stop_open(stop, n, &s), ORCD_OK);
    for (size_t at = 0, len = strlen(text); at < len && got < 0; at += step)
        got = stop_push(s, text + at, len - at < step ? len - at : step, &out);
    if (got < 0)
        stop_flush(s, &out);
    buf_str(&out, "");
    assert_int_equal(got, matched);
    assert_string_equal(out.data, want);
    buf_free(&out);
    stop_close(s);
}

static void every_cut(const char *const *stop, size_t n, const char *text, const char *want, int matched) {
    for (size_t step = 1; step <= strlen(text) + 1; step++)
        expect(stop, n, text, step, want, matched);
}

static void no_strings_pass_everything(void **state) {
    (void)state;
    every_cut(NULL, 0, "anything at all", "anything at all", -1);
}

static void found_across_pieces(void **state) {
    (void)state;
    every_cut((const char *[]){"END"}, 1, "one two END three", "one two ", 0);
}

static void false_start_is_given_back(void **state) {
    (void)state;
    every_cut((const char *[]){"END"}, 1, "the EN of EEN", "the EN of EEN", -1);
}

static void self_overlapping_prefix(void **state) {
    (void)state;
    every_cut((const char *[]){"aab"}, 1, "aaaab tail", "aa", 0);
    every_cut((const char *[]){"abab!"}, 1, "ababab!x", "ab", 0);
}

static void the_earliest_of_several_wins(void **state) {
    (void)state;
    expect((const char *[]){"later", "soon"}, 2, "now soon later", 64, "now ", 1);
    every_cut((const char *[]){"zzz", "b"}, 2, "aab", "aa", 1);
}

static void empty_string_is_ignored(void **state) {
    (void)state;
    every_cut((const char *[]){"", "x"}, 2, "abxc", "ab", 1);
}

static void stop_at_the_very_start(void **state) {
    (void)state;
    every_cut((const char *[]){"\n\n"}, 1, "\n\nrest", "", 0);
}

static void nothing_is_taken_after_a_match(void **state) {
    (void)state;
    stop_set *s;
    buf out = {0};
    assert_int_equal(stop_open((const char *[]){"."}, 1, &s), ORCD_OK);
    assert_int_equal(stop_push(s, "a.b", 3, &out), 0);
    assert_int_equal(stop_push(s, "c", 1, &out), 0);
    stop_flush(s, &out);
    assert_string_equal(out.data, "a");
    buf_free(&out);
    stop_close(s);
}

/* Against plain search, over random texts of a small alphabet and random cuts. */
static void random_texts_equal_plain_search(void **state) {
    (void)state;
    unsigned seed = 1;
    for (int round = 0; round < 20000; round++) {
        char text[33] = "", a[5] = "", b[5] = "", want[33];
        for (int i = 0, n = rand_r(&seed) % 32; i < n; i++)
            text[i] = (char)('a' + rand_r(&seed) % 2);
        for (int i = 0, n = 1 + rand_r(&seed) % 4; i < n; i++)
            a[i] = (char)('a' + rand_r(&seed) % 2);
        for (int i = 0, n = 1 + rand_r(&seed) % 4; i < n; i++)
            b[i] = (char)('a' + rand_r(&seed) % 3);
        const char *at_a = strstr(text, a), *at_b = strstr(text, b);
        const char *at = !at_a || (at_b && at_b < at_a) ? at_b : at_a;
        memcpy(want, text, sizeof want);
        if (at)
            want[at - text] = '\0';
        /* one byte at a time the first to end wins, so only texts with one candidate have one answer */
        if (at_a && at_b)
            continue;
        expect((const char *[]){a, b}, 2, text, 1 + (size_t)(rand_r(&seed) % 7), want, !at ? -1 : at == at_a ? 0 : 1);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_strings_pass_everything),      cmocka_unit_test(found_across_pieces),
        cmocka_unit_test(false_start_is_given_back),       cmocka_unit_test(self_overlapping_prefix),
        cmocka_unit_test(the_earliest_of_several_wins),    cmocka_unit_test(empty_string_is_ignored),
        cmocka_unit_test(stop_at_the_very_start),          cmocka_unit_test(nothing_is_taken_after_a_match),
        cmocka_unit_test(random_texts_equal_plain_search),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
