/* tests/relations.h: what must hold for every file that a reader accepted; abort() otherwise. For tests and fuzzing. */
#ifndef ORCD_TESTS_RELATIONS_H
#define ORCD_TESTS_RELATIONS_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "format/gguf.h"
#include "format/safetensors.h"

#define MUST(condition)                                                                                                \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition);                             \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

static inline int inside(const uint8_t *data, size_t size, const void *p, uint64_t n) {
    const uint8_t *q = p;
    return q >= data && q <= data + size && n <= (uint64_t)(data + size - q);
}

static inline void kv_relations(const uint8_t *data, size_t size, const gguf_kv *kv) {
    MUST(kv->key.len > 0 && inside(data, size, kv->key.data, kv->key.len));
    MUST(kv->type < GGUF_N_TYPES && kv->elem < GGUF_N_TYPES && kv->elem != GGUF_ARRAY);
    MUST(kv->pos == (uint64_t)(kv->data - data));
    MUST(inside(data, size, kv->data, gguf_kv_bytes(kv)));
    const uint8_t *cursor = kv->data;
    for (uint64_t i = 0; kv->elem == GGUF_STRING && i < kv->n; i++) {
        gguf_str s = gguf_next_str(&cursor);
        MUST(inside(data, size, s.data, s.len));
    }
}

static inline void tensor_relations(const uint8_t *data, size_t size, const gguf *g, uint64_t i) {
    const gguf_tensor *t = gguf_tensor_at(g, i);
    const q_traits *q = q_find(t->type);
    MUST(q && t->bytes > 0 && inside(data, size, t->data, t->bytes));
    MUST((uint64_t)(t->data - data) % gguf_alignment(g) == 0);
    __uint128_t values = 1;
    for (int d = 0; d < GGUF_MAX_DIMS; d++)
        values *= t->ne[d];
    MUST(t->ne[0] % q->block_len == 0 && values / q->block_len * q->block_bytes == t->bytes);
    for (uint64_t k = 0; k < i && k < 64; k++) {
        const gguf_tensor *o = gguf_tensor_at(g, k);
        MUST(o->data + o->bytes <= t->data || t->data + t->bytes <= o->data);
    }
}

/* Reading the same bytes again gives the same tables, and every name leads to its own record. */
static inline void gguf_relations(const uint8_t *data, size_t size, const gguf *g) {
    char name[65537];
    gguf *again = NULL;
    MUST(gguf_parse(data, size, &again, NULL) == ORCD_OK);
    MUST(gguf_n_kv(g) == gguf_n_kv(again) && gguf_n_tensors(g) == gguf_n_tensors(again));
    for (uint64_t i = 0; i < gguf_n_kv(g); i++) {
        const gguf_kv *kv = gguf_kv_at(g, i);
        kv_relations(data, size, kv);
        MUST(memcmp(kv, gguf_kv_at(again, i), sizeof *kv) == 0);
        memcpy(name, kv->key.data, kv->key.len);
        name[kv->key.len] = '\0';
        MUST(gguf_find(g, name) == kv);
    }
    for (uint64_t i = 0; i < gguf_n_tensors(g); i++) {
        const gguf_tensor *t = gguf_tensor_at(g, i);
        tensor_relations(data, size, g, i);
        MUST(memcmp(t, gguf_tensor_at(again, i), sizeof *t) == 0);
        memcpy(name, t->name.data, t->name.len);
        name[t->name.len] = '\0';
        MUST(gguf_find_tensor(g, name) == t);
    }
    gguf_close(again);
}

static inline void st_relations(const uint8_t *data, size_t size, const st_model *m) {
    st_model *again = NULL;
    uint64_t total = 8, header;
    MUST(st_parse(data, size, &again, NULL) == ORCD_OK);
    MUST(st_n_tensors(m) == st_n_tensors(again));
    for (uint64_t i = 0; i < st_n_tensors(m); i++) {
        const st_tensor *t = st_tensor_at(m, i), *o = st_tensor_at(again, i);
        MUST(inside(data, size, t->data, t->bytes) && st_find(m, t->name) == t);
        MUST(strcmp(t->name, o->name) == 0 && t->type == o->type && t->data == o->data && t->bytes == o->bytes);
        MUST(t->n_dims <= ST_MAX_DIMS && t->n_dims == o->n_dims);
        total += t->bytes;
    }
    memcpy(&header, data, sizeof header);
    MUST(total + header == size); /* the tensors cover the data exactly */
    st_close(again);
}

#endif
