/* tokenizer.json as the tokenizer.ggml.* keys of a GGUF file. */
#include <jansson.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "text/vocab.h"

#define MAX_JSON ((size_t)256 << 20) /* bytes of tokenizer.json */
#define MAX_SIDE ((size_t)16 << 20)  /* bytes of a chat template */

enum { TYPE_NORMAL = 1, TYPE_CONTROL = 3, TYPE_USER = 4, TYPE_UNUSED = 5 }; /* llama.cpp's numbers */

/* The tokens by id. Their texts live in the parsed JSON. */
typedef struct table {
    int32_t n;
    gguf_str *text; /* [n] */
    int32_t *type;  /* [n] */
    gguf_str *merge;
    size_t n_merge;
} table;

static void put(table *v, const json_t *id, const char *text, size_t len, int32_t type) {
    json_int_t i = json_is_integer(id) ? json_integer_value(id) : -1;
    if (i < 0 || i >= v->n || !text)
        return; /* tok_open_json has judged the file; ids beyond the embedding are never seen */
    v->text[i] = (gguf_str){text, len};
    v->type[i] = type;
}

static void read_tokens(json_t *root, table *v) {
    json_t *vocab = json_object_get(json_object_get(root, "model"), "vocab"), *id, *t;
    const json_t *added = json_object_get(root, "added_tokens");
    const char *key;
    size_t len, i;
    json_object_keylen_foreach(vocab, key, len, id) put(v, id, key, len, TYPE_NORMAL);
    json_array_foreach(added, i, t) {
        const json_t *content = json_object_get(t, "content");
        put(v, json_object_get(t, "id"), json_string_value(content), json_string_length(content),
            json_is_true(json_object_get(t, "special")) ? TYPE_CONTROL : TYPE_USER);
    }
}

/* "[PAD123]" for every id without a text. */
static char *name_unused(table *v) {
    enum { ROOM = 20 };
    size_t n = 0;
    for (int32_t i = 0; i < v->n; i++)
        n += !v->text[i].data;
    char *names = malloc(n * ROOM + 1), *at = names;
    for (int32_t i = 0; i < v->n && names; i++) {
        if (v->text[i].data)
            continue;
        v->text[i] = (gguf_str){at, (size_t)snprintf(at, ROOM, "[PAD%d]", i)};
        v->type[i] = TYPE_UNUSED;
        at += ROOM;
    }
    return names;
}

/* "left right" of every merge, from either spelling. */
static char *join_merges(const json_t *merges, table *v) {
    size_t bytes = 1, i;
    json_t *m;
    json_array_foreach(merges, i, m) bytes +=
        1 + json_string_length(m) + json_string_length(json_array_get(m, 0)) + json_string_length(json_array_get(m, 1));
    char *all = malloc(bytes), *at = all;
    v->n_merge = json_array_size(merges);
    v->merge = calloc(v->n_merge + 1, sizeof *v->merge);
    if (!all || !v->merge) {
        free(all);
        return NULL;
    }
    json_array_foreach(merges, i, m) {
        const json_t *left = json_is_array(m) ? json_array_get(m, 0) : m, *right = json_array_get(m, 1);
        size_t n = json_string_length(left), more = json_string_length(right);
        v->merge[i] = (gguf_str){at, n + (right ? more + 1 : 0)};
        memcpy(at, json_string_value(left), n);
        at += n;
        if (!right)
            continue;
        *at++ = ' ';
        memcpy(at, json_string_value(right), more);
        at += more;
    }
    return all;
}

static void put_chat_template(const char *json_path, gguf_writer *w) {
    char *copy = strdup(json_path), *text = NULL;
    size_t len;
    buf path = {0};
    if (copy)
        buf_printf(&path, "%s/chat_template.jinja", dirname(copy));
    if (path.data && !path.failed && file_exists(path.data) &&
        file_slurp(path.data, MAX_SIDE, &text, &len, NULL) == ORCD_OK)
        gguf_put_str(w, "tokenizer.chat_template", text, len);
    free(text);
    buf_free(&path);
    free(copy);
}

static orcd_status write_keys(const tok *t, json_t *root, int32_t n_vocab, gguf_writer *w) {
    table v = {.n = n_vocab > t->n_vocab ? n_vocab : t->n_vocab};
    orcd_status status = ORCD_ERR_NOMEM;
    char *names = NULL, *joined = NULL;
    const char *pre = t->split == TOK_SPLIT_O200K ? "gpt-4o" : "gpt-2";
    v.text = calloc((size_t)v.n, sizeof *v.text);
    v.type = calloc((size_t)v.n, sizeof *v.type);
    if (!v.text || !v.type)
        goto done;
    read_tokens(root, &v);
    names = name_unused(&v);
    joined = join_merges(json_object_get(json_object_get(root, "model"), "merges"), &v);
    if (!names || !joined)
        goto done;
    gguf_put_str(w, "tokenizer.ggml.model", "gpt2", 4);
    gguf_put_str(w, "tokenizer.ggml.pre", pre, strlen(pre));
    gguf_put_str_array(w, "tokenizer.ggml.tokens", v.text, (uint64_t)v.n);
    gguf_put_i32_array(w, "tokenizer.ggml.token_type", v.type, (uint64_t)v.n);
    gguf_put_str_array(w, "tokenizer.ggml.merges", v.merge, v.n_merge);
    if (t->bos >= 0)
        gguf_put_u32(w, "tokenizer.ggml.bos_token_id", (uint32_t)t->bos);
    if (t->eos >= 0)
        gguf_put_u32(w, "tokenizer.ggml.eos_token_id", (uint32_t)t->eos);
    status = ORCD_OK;
done:
    free(names);
    free(joined);
    free(v.merge);
    free(v.text);
    free(v.type);
    return status;
}

orcd_status tok_export(const char *json_path, int32_t n_vocab, gguf_writer *w, orcd_error *err) {
    tok *t = NULL;
    char *text = NULL;
    size_t len = 0;
    ORCD_TRY(tok_open_json(json_path, &t, err)); /* judges the whole file */
    orcd_status status = file_slurp(json_path, MAX_JSON, &text, &len, err);
    json_t *root = status == ORCD_OK ? json_loadb(text, len, 0, NULL) : NULL;
    if (status == ORCD_OK)
        status = root ? write_keys(t, root, n_vocab, w) : ORCD_ERR_NOMEM;
    if (status == ORCD_ERR_NOMEM)
        orcd_fail(err, status, "out of memory for the tokens of %s", json_path);
    if (status == ORCD_OK)
        put_chat_template(json_path, w);
    json_decref(root);
    free(text);
    tok_close(t);
    return status;
}

/* ---- without a tokenizer ---- */

typedef struct placed {
    const char *text;
    int32_t at; /* from the first */
} placed;

static const placed harmony[] = {{"<|startoftext|>", 0}, {"<|endoftext|>", 1}, {"<|return|>", 4},
                                 {"<|constrain|>", 5},   {"<|channel|>", 7},   {"<|start|>", 8},
                                 {"<|end|>", 9},         {"<|message|>", 10},  {"<|call|>", 14}};
static const placed gpt2[] = {{"<|endoftext|>", 0}};

orcd_status tok_export_synthetic(tok_split split, int32_t n_vocab, gguf_writer *w, orcd_error *err) {
    enum { ROOM = 16, N_HARMONY = 15, OPENAI_FIRST = 199998 };
    bool oss = split == TOK_SPLIT_O200K;
    const placed *special = oss ? harmony : gpt2;
    size_t n_special = oss ? ORCD_COUNT(harmony) : ORCD_COUNT(gpt2), n = (size_t)n_vocab;
    int32_t first = n_vocab - (oss ? N_HARMONY : 1);
    orcd_status st = ORCD_OK;
    if (n_vocab < 256 + ROOM || n_vocab > TOK_MAX_IDS)
        return orcd_fail(err, ORCD_ERR_ARG, "a vocabulary of %d tokens is not possible; 272 to %d are", n_vocab,
                         TOK_MAX_IDS);
    if (oss && first >= OPENAI_FIRST)
        first = OPENAI_FIRST;
    gguf_str *text = calloc(n, sizeof *text);
    int32_t *type = calloc(n, sizeof *type);
    char *spelled = malloc(n * ROOM);
    if (!text || !type || !spelled) {
        st = orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for %d tokens", n_vocab);
        goto done;
    }
    for (int32_t i = 0; i < n_vocab; i++) {
        char *at = spelled + (size_t)i * ROOM;
        if (i < 256)
            tok_spell_byte(i, at);
        else
            snprintf(at, ROOM, "\xc4\xa0w%d", i); /* a space is spelled U+0120 */
        text[i] = (gguf_str){at, strlen(at)};
        type[i] = TYPE_NORMAL;
    }
    for (size_t i = 0; i < n_special; i++) {
        text[first + special[i].at] = (gguf_str){special[i].text, strlen(special[i].text)};
        type[first + special[i].at] = TYPE_CONTROL;
    }
    gguf_put_str(w, "tokenizer.ggml.model", "gpt2", 4);
    gguf_put_str(w, "tokenizer.ggml.pre", oss ? "gpt-4o" : "gpt-2", oss ? 6 : 5);
    gguf_put_str_array(w, "tokenizer.ggml.tokens", text, n);
    gguf_put_i32_array(w, "tokenizer.ggml.token_type", type, n);
    gguf_put_str_array(w, "tokenizer.ggml.merges", NULL, 0);
    gguf_put_u32(w, "tokenizer.ggml.bos_token_id", (uint32_t)first);
    gguf_put_u32(w, "tokenizer.ggml.eos_token_id", (uint32_t)(oss ? first + 4 : first));
done:
    free(spelled);
    free(type);
    free(text);
    return st;
}
