#include "backend/ref/ref.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/checked.h"

static orcd_status ref_open(const be_params *p, be_device **out, orcd_error *err) {
    *out = calloc(1, sizeof **out);
    if (!*out)
        return orcd_fail(err, ORCD_ERR_NOMEM, "no memory for the reference device");
    (*out)->ops = &be_ops_ref;
    (*out)->params = *p;
    return ORCD_OK;
}

static void ref_close(be_device *d) { free(d); }

static void ref_describe(be_device *d, char *text, size_t cap) {
    (void)d;
    snprintf(text, cap, "ref: 1 thread, sums in double");
}

static void ref_memory(be_device *d, uint64_t *total, uint64_t *available) {
    (void)d;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    *total = (uint64_t)sysconf(_SC_PHYS_PAGES) * page;
    *available = (uint64_t)sysconf(_SC_AVPHYS_PAGES) * page;
}

/* ---- activations ---- */

static orcd_status ref_act_new(be_device *d, be_form form, int64_t cap_row, int64_t width, be_act **out,
                               orcd_error *err) {
    (void)d;
    *out = NULL;
    uint64_t stride, n;
    if (cap_row < 0 || width < 1 || !ck_mul((uint64_t)width, form == BE_ACT_ROUTE ? 2 : 1, &stride) ||
        !ck_mul(stride, (uint64_t)cap_row, &n) || n > SIZE_MAX / sizeof(float))
        return orcd_fail(err, ORCD_ERR_ARG, "an activation cannot have %lld rows of %lld", (long long)cap_row,
                         (long long)width);
    ref_act *a = calloc(1, sizeof *a);
    if (!a || !(a->data = calloc(n ? n : 1, sizeof(float)))) {
        free(a);
        return orcd_fail(err, ORCD_ERR_NOMEM, "no memory for an activation of %llu floats", (unsigned long long)n);
    }
    a->base = (be_act){.form = form, .width = width, .cap_row = cap_row};
    a->stride = (int64_t)stride;
    *out = &a->base;
    return ORCD_OK;
}

static void ref_act_free(be_device *d, be_act *a) {
    (void)d;
    if (!a)
        return;
    free(((ref_act *)a)->data);
    free(a);
}

static bool rows_exist(const be_act *a, int64_t row, int64_t n) {
    return row >= 0 && n >= 0 && row <= a->cap_row && n <= a->cap_row - row;
}

static orcd_status ref_act_read(be_device *d, const be_act *a, int64_t row, int64_t n, float *dst, orcd_error *err) {
    (void)d;
    if (!rows_exist(a, row, n))
        return orcd_fail(err, ORCD_ERR_ARG, "rows %lld..%lld are outside an activation of %lld rows", (long long)row,
                         (long long)(row + n), (long long)a->cap_row);
    memcpy(dst, ref_at(a, row), (size_t)(n * ((const ref_act *)a)->stride) * sizeof *dst);
    return ORCD_OK;
}

static orcd_status ref_act_write(be_device *d, be_act *a, int64_t row, int64_t n, const float *src, orcd_error *err) {
    (void)d;
    if (!rows_exist(a, row, n))
        return orcd_fail(err, ORCD_ERR_ARG, "rows %lld..%lld are outside an activation of %lld rows", (long long)row,
                         (long long)(row + n), (long long)a->cap_row);
    memcpy(ref_at(a, row), src, (size_t)(n * ((ref_act *)a)->stride) * sizeof *src);
    a->n_row = row + n;
    return ORCD_OK;
}

static const float *ref_act_host(be_device *d, const be_act *a) {
    (void)d;
    return a->form == BE_ACT_F32 ? ((const ref_act *)a)->data : NULL;
}

const be_ops be_ops_ref = {
    .name = "ref",
    .open = ref_open,
    .close = ref_close,
    .describe = ref_describe,
    .memory = ref_memory,
    .load_bytes = ref_load_bytes,
    .load = ref_load,
    .unload = ref_unload,
    .act_new = ref_act_new,
    .act_free = ref_act_free,
    .act_read = ref_act_read,
    .act_write = ref_act_write,
    .act_host = ref_act_host,
    .kv_page_bytes = ref_kv_page_bytes,
    .kv_open = ref_kv_open,
    .kv_close = ref_kv_close,
    .kv_map = ref_kv_map,
    .kv_copy_page = ref_kv_copy_page,
    .kv_read_page = ref_kv_read_page,
    .kv_write_page = ref_kv_write_page,
    .step_begin = ref_step_begin,
    .step_end = ref_step_end,
    .embed = ref_embed,
    .norm = ref_norm,
    .linear = ref_linear,
    .rope = ref_rope,
    .kv_write = ref_kv_write,
    .attention = ref_attention,
    .route = ref_route,
    .experts = ref_experts,
    .gather_out = ref_gather_out,
    .tap = ref_tap,
};
