/* The ground floor: 16-bit floats over all their values, checked sizes, buffers. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/buf.h"
#include "base/checked.h"
#include "base/file.h"
#include "base/half.h"
#include "base/sums.h"

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

/* ---- mapped files that become shorter ---- */

static file_map open_and_cut(off_t keep) {
    char path[] = "/tmp/orcd-test-XXXXXX", page[4096];
    file_map f;
    orcd_error err;
    int fd = mkstemp(path);
    memset(page, 7, sizeof page);
    for (int i = 0; i < 8; i++)
        assert_int_equal(write(fd, page, sizeof page), sizeof page);
    assert_int_equal(file_open(path, &f, &err), ORCD_OK);
    assert_false(file_changed(&f));
    assert_int_equal(ftruncate(fd, keep), 0);
    assert_true(file_changed(&f));
    close(fd);
    unlink(path);
    return f;
}

/* How a process ends that reads what is gone. */
static int end_of_reader(bool exits, bool zeros) {
    int status;
    file_map f = open_and_cut(4096);
    pid_t pid = fork();
    if (pid == 0) {
        close(STDERR_FILENO);
        if (exits)
            file_shrunk_exits(70);
        if (zeros)
            file_shrunk_reads_zeros(true);
        volatile const uint8_t *data = f.data;
        bool ok = data[0] == 7 && !file_shrunk() && data[20000] == 0 && data[20001] == 0 && file_shrunk();
        _exit(ok && data[4095] == 7 ? 0 : 1);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    file_close(&f);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void a_file_that_shrank_is_noticed_as_asked(void **state) {
    (void)state;
    assert_int_equal(end_of_reader(true, false), 70);
    assert_int_equal(end_of_reader(true, true), 0);
    assert_int_equal(end_of_reader(false, true), 0);
}

#define HEX "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

static void sums_of_files_and_parts(void **state) {
    (void)state;
    char path[] = "/tmp/orcd-sums-XXXXXX";
    int fd = mkstemp(path);
    static const char text[] =
        HEX "  a b\n" HEX " *star\n# " HEX "  a b\n# a remark\n" HEX " one blank\nshort  x\n" HEX "  \n" HEX "  last";
    assert_int_equal(write(fd, text, sizeof text - 1), sizeof text - 1);
    close(fd);
    sums s, again;
    assert_int_equal(sums_read(path, &s, NULL), ORCD_OK);
    assert_int_equal(s.n, 4);
    assert_string_equal(sums_find(&s, false, "star")->hex, HEX);
    assert_true(sums_find(&s, true, "a b")->part);
    assert_null(sums_find(&s, true, "star"));
    for (int i = 0; i < 40; i++) {
        char name[8];
        snprintf(name, sizeof name, "n%d", i);
        assert_int_equal(sums_put(&s, i % 2, name, HEX, NULL), ORCD_OK);
    }
    assert_int_equal(sums_put(&s, false, "star", NULL, NULL), ORCD_OK);
    assert_int_equal(sums_put(&s, false, "absent", NULL, NULL), ORCD_OK);
    assert_int_equal(sums_write(path, &s, NULL), ORCD_OK);
    assert_int_equal(sums_read(path, &again, NULL), ORCD_OK);
    assert_int_equal(again.n, 43);
    for (size_t i = 0; i < again.n; i++)
        assert_memory_equal(&again.entry[i], &s.entry[i], sizeof *s.entry);
    sums_free(&s);
    sums_free(&again);
    unlink(path);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sums_of_files_and_parts),
        cmocka_unit_test(every_half_survives_a_round_trip),
        cmocka_unit_test(a_file_that_shrank_is_noticed_as_asked),
        cmocka_unit_test(half_rounds_as_the_compiler_does),
        cmocka_unit_test(bf16_ties_go_to_even),
        cmocka_unit_test(e8m0_is_a_power_of_two_or_nan),
        cmocka_unit_test(sizes_that_wrap_are_refused),
        cmocka_unit_test(buffers_grow_and_stay_terminated),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
