#include "arch/model.h"

#include <stdio.h>
#include <string.h>

#define ARCH(name) extern const arch arch_##name;
#include "arch/list.def"
#undef ARCH

static const arch *const list[] = {
#define ARCH(name) &arch_##name,
#include "arch/list.def"
#undef ARCH
};

static bool answers_to(const arch *a, const char *name) {
    if (strcmp(a->name, name) == 0)
        return true;
    for (const char *const *alias = a->aliases; *alias; alias++)
        if (strcmp(*alias, name) == 0)
            return true;
    return false;
}

orcd_status arch_identify(const mf_file *f, const arch **out, orcd_error *err) {
    const char *found = mf_arch_name(f);
    *out = NULL;
    for (size_t i = 0; i < ORCD_COUNT(list); i++)
        if (answers_to(list[i], found)) {
            *out = list[i];
            return ORCD_OK;
        }
    char supported[128] = "";
    for (size_t i = 0; i < ORCD_COUNT(list); i++) {
        size_t n = strlen(supported);
        snprintf(supported + n, sizeof supported - n, "%s%s", i ? ", " : "", list[i]->name);
    }
    return orcd_fail(err, ORCD_ERR_UNSUPPORTED, "%s: architecture \"%.64s\" is not supported; supported are %s",
                     mf_path(f), found, supported);
}

const char *arch_name(const arch *a) { return a->name; }

orcd_status arch_config_read(const arch *a, const mf_file *f, arch_config *out, orcd_error *err) {
    *out = (arch_config){0};
    orcd_error why = {0};
    orcd_status st = a->config(f, out, &why);
    return st == ORCD_OK ? ORCD_OK : orcd_fail(err, st, "%s: %.400s", mf_path(f), why.message);
}

orcd_status arch_get_int(const mf_file *f, const char *gguf_key, const char *hf_key, int64_t lo, int64_t hi,
                         const int64_t *fallback, int *out, orcd_error *err) {
    uint64_t v;
    const char *key = mf_kind_of(f) == MF_GGUF ? gguf_key : hf_key;
    if (!mf_u64(f, gguf_key, hf_key, &v)) {
        if (!fallback)
            return orcd_fail(err, ORCD_ERR_FORMAT, "the configuration has no integer \"%s\"", key);
        v = (uint64_t)*fallback;
    }
    if (v > INT32_MAX || (int64_t)v < lo || (int64_t)v > hi)
        return orcd_fail(err, ORCD_ERR_FORMAT, "\"%s\" is %llu; expected %lld to %lld", key, (unsigned long long)v,
                         (long long)lo, (long long)hi);
    *out = (int)v;
    return ORCD_OK;
}

orcd_status arch_get_num(const mf_file *f, const char *gguf_key, const char *hf_key, double lo, double hi,
                         const double *fallback, double *out, orcd_error *err) {
    double v;
    const char *key = mf_kind_of(f) == MF_GGUF ? gguf_key : hf_key;
    if (!mf_f64(f, gguf_key, hf_key, &v)) {
        if (!fallback)
            return orcd_fail(err, ORCD_ERR_FORMAT, "the configuration has no number \"%s\"", key);
        v = *fallback;
    }
    if (!(v >= lo && v <= hi))
        return orcd_fail(err, ORCD_ERR_FORMAT, "\"%s\" is %g; expected %g to %g", key, v, lo, hi);
    *out = v;
    return ORCD_OK;
}

orcd_status arch_get_vocab(const mf_file *f, const char *gguf_name, const char *hf_name, int *out, orcd_error *err) {
    const char *name = mf_kind_of(f) == MF_GGUF ? gguf_name : hf_name;
    mf_tensor t;
    bool found;
    ORCD_TRY(mf_find(f, name, &t, &found, err));
    if (!found && mf_kind_of(f) == MF_HF) { /* GPT-2 folders name it with and without a prefix */
        char prefixed[96];
        snprintf(prefixed, sizeof prefixed, "transformer.%s", hf_name);
        ORCD_TRY(mf_find(f, prefixed, &t, &found, err));
    }
    if (!found)
        return orcd_fail(err, ORCD_ERR_FORMAT, "the token embedding \"%s\" is missing", name);
    if (t.n_row < 1 || t.n_row > 1 << 20)
        return orcd_fail(err, ORCD_ERR_FORMAT, "a vocabulary of %llu tokens; expected 1 to %d",
                         (unsigned long long)t.n_row, 1 << 20);
    *out = (int)t.n_row;
    return ORCD_OK;
}

void arch_kv_spec(const arch_config *c, be_kv_spec *spec) {
    spec->n_layer = c->n_layer;
    spec->n_kv_head = c->n_kv_head;
    spec->head_dim = c->head_dim;
    spec->window = c->window;
}

const arch_config *arch_config_of(const arch_model *m) { return &m->cfg; }

be_act *arch_forward(arch_model *m, be_step *s) { return m->arch->forward(m, s); }

void arch_set_tap(arch_model *m, be_tap_fn fn, void *ctx) {
    m->tap = fn;
    m->tap_ctx = ctx;
}

static const char *full_key(const arch *a, const char *key, char out[128]) {
    snprintf(out, 128, "%s.%s", a->name, key);
    return out;
}

void arch_put_int(const arch *a, gguf_writer *w, const char *key, int v) {
    char full[128];
    gguf_put_u32(w, full_key(a, key, full), (uint32_t)v);
}

void arch_put_num(const arch *a, gguf_writer *w, const char *key, double v) {
    char full[128];
    gguf_put_f32(w, full_key(a, key, full), (float)v);
}

void arch_put_str(const arch *a, gguf_writer *w, const char *key, const char *v) {
    char full[128];
    gguf_put_str(w, full_key(a, key, full), v, strlen(v));
}
