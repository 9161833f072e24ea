/* Tokenizers stored as Hugging Face's tokenizer.json: BPE with byte-level alphabet and one of the two splits. */
#include <jansson.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "text/split.h"
#include "text/vocab.h"

#define MAX_JSON ((size_t)256 << 20) /* bytes of tokenizer.json */
#define MAX_SIDE ((size_t)16 << 20)  /* bytes of the configuration files beside it */

static bool is_false(const json_t *object, const char *key) { return json_is_false(json_object_get(object, key)); }

static bool text_is(const json_t *object, const char *key, const char *text) {
    const char *s = json_string_value(json_object_get(object, key));
    return s && strcmp(s, text) == 0;
}

/* Absent, null, or one of the empty forms that older files write. */
static bool unset(const json_t *object, const char *key) {
    const json_t *v = json_object_get(object, key);
    return !v || json_is_null(v) || json_is_false(v) || (json_is_string(v) && json_string_length(v) == 0) ||
           (json_is_number(v) && json_number_value(v) <= 0);
}

static orcd_status read_split(const json_t *root, const char *path, tok_split *split, orcd_error *err) {
    const json_t *pre = json_object_get(root, "pre_tokenizer"), *level = pre, *list;
    if (json_object_get(root, "normalizer") && !json_is_null(json_object_get(root, "normalizer")))
        return orcd_fail(err, ORCD_ERR_UNSUPPORTED, "%s: it has a normalizer; only null is supported", path);
    *split = TOK_SPLIT_GPT2;
    if (text_is(pre, "type", "Sequence")) {
        list = json_object_get(pre, "pretokenizers");
        const json_t *cut = json_array_get(list, 0);
        level = json_array_get(list, 1);
        *split = TOK_SPLIT_O200K;
        if (json_array_size(list) != 2 || !text_is(cut, "type", "Split") || !text_is(cut, "behavior", "Isolated") ||
            !is_false(cut, "invert") || !text_is(json_object_get(cut, "pattern"), "Regex", TOK_PATTERN_O200K))
            return orcd_fail(err, ORCD_ERR_UNSUPPORTED, "%s: its pre_tokenizer is neither GPT-2's nor o200k's", path);
    }
    bool regex = !is_false(level, "use_regex");
    if (!text_is(level, "type", "ByteLevel") || regex != (*split == TOK_SPLIT_GPT2))
        return orcd_fail(err, ORCD_ERR_UNSUPPORTED, "%s: its pre_tokenizer is neither GPT-2's nor o200k's", path);
    if (!is_false(level, "add_prefix_space"))
        return orcd_fail(err, ORCD_ERR_UNSUPPORTED, "%s: add_prefix_space is not false", path);
    return ORCD_OK;
}

static orcd_status check_model(const json_t *model, const char *path, orcd_error *err) {
    static const char *const must_be_unset[] = {"dropout", "unk_token", "continuing_subword_prefix",
                                                "end_of_word_suffix", "byte_fallback"};
    if (!json_is_object(model) || (json_object_get(model, "type") && !text_is(model, "type", "BPE")))
        return orcd_fail(err, ORCD_ERR_UNSUPPORTED, "%s: its model is not BPE", path);
    for (size_t i = 0; i < ORCD_COUNT(must_be_unset); i++)
        if (!unset(model, must_be_unset[i]))
            return orcd_fail(err, ORCD_ERR_UNSUPPORTED, "%s: model.%s is not supported", path, must_be_unset[i]);
    if (!json_is_object(json_object_get(model, "vocab")) || !json_is_array(json_object_get(model, "merges")))
        return orcd_fail(err, ORCD_ERR_FORMAT, "%s: model.vocab or model.merges is missing", path);
    return ORCD_OK;
}

static int64_t id_of(const json_t *v) { return json_is_integer(v) ? json_integer_value(v) : -1; }

static int64_t count_ids(json_t *vocab, const json_t *added) {
    int64_t n = 0;
    const char *key;
    json_t *v;
    size_t i;
    json_object_foreach(vocab, key, v) n = id_of(v) >= n ? id_of(v) : n;
    json_array_foreach(added, i, v) {
        int64_t id = id_of(json_object_get(v, "id"));
        n = id >= n ? id : n;
    }
    return n < TOK_MAX_IDS ? n + 1 : n;
}

static orcd_status put_tokens(tok *t, json_t *vocab, const json_t *added, const char *path, orcd_error *err) {
    static const char *const must_be_unset[] = {"single_word", "lstrip", "rstrip"};
    const char *key;
    json_t *v;
    size_t n, i;
    json_object_keylen_foreach(vocab, key, n, v) ORCD_TRY(tok_put_text(t, id_of(v), key, n, path, err));
    json_array_foreach(added, i, v) {
        const json_t *content = json_object_get(v, "content");
        for (size_t k = 0; k < ORCD_COUNT(must_be_unset); k++)
            if (!unset(v, must_be_unset[k]))
                return orcd_fail(err, ORCD_ERR_UNSUPPORTED, "%s: added token %zu has %s", path, i, must_be_unset[k]);
        ORCD_TRY(tok_put_special(t, id_of(json_object_get(v, "id")), json_string_value(content),
                                 json_string_length(content), path, err));
    }
    return ORCD_OK;
}

/* Either ["left", "right"] or "left right". */
static orcd_status put_merges(tok *t, const json_t *merges, const char *path, orcd_error *err) {
    size_t i;
    json_t *m;
    json_array_foreach(merges, i, m) {
        const char *left = json_string_value(m), *right = "";
        size_t n_left = json_string_length(m), n_right = 0;
        if (json_array_size(m) == 2) {
            left = json_string_value(json_array_get(m, 0));
            n_left = json_string_length(json_array_get(m, 0));
            right = json_string_value(json_array_get(m, 1));
            n_right = json_string_length(json_array_get(m, 1));
        } else if (left && strchr(left, ' ')) {
            n_left = (size_t)(strchr(left, ' ') - left);
            right = left + n_left + 1;
            n_right = strlen(right);
        }
        ORCD_TRY(tok_put_merge(t, (uint32_t)i, left ? left : "", left ? n_left : 0, right ? right : "",
                               right ? n_right : 0, path, err));
    }
    return ORCD_OK;
}

/* ---- bos and eos live in the files beside tokenizer.json; none of them is needed ---- */

static json_t *load_beside(const char *path, const char *name) {
    char *copy = strdup(path), *text = NULL;
    buf full = {0};
    size_t len = 0;
    json_t *root = NULL;
    if (copy)
        buf_printf(&full, "%s/%s", dirname(copy), name);
    if (full.data && !full.failed && file_slurp(full.data, MAX_SIDE, &text, &len, NULL) == ORCD_OK)
        root = json_loadb(text, len, 0, NULL);
    free(text);
    buf_free(&full);
    free(copy);
    return root;
}

/* An id, the first of a list of ids, or a special token's text, maybe inside {"content": ...}. */
static int32_t id_from(const tok *t, const json_t *v) {
    if (json_is_array(v))
        v = json_array_get(v, 0);
    if (json_is_object(v))
        v = json_object_get(v, "content");
    if (json_is_string(v))
        return tok_special(t, json_string_value(v));
    int64_t id = id_of(v);
    return id < t->n_vocab ? (int32_t)id : -1;
}

static void read_bos_eos(tok *t, const char *path) {
    static const char *const side[] = {"generation_config.json", "config.json", "tokenizer_config.json"};
    for (size_t i = 0; i < ORCD_COUNT(side); i++) {
        const char *suffix = i == 2 ? "" : "_id";
        char bos[16], eos[16];
        snprintf(bos, sizeof bos, "bos_token%s", suffix);
        snprintf(eos, sizeof eos, "eos_token%s", suffix);
        json_t *root = load_beside(path, side[i]);
        if (t->bos < 0)
            t->bos = id_from(t, json_object_get(root, bos));
        if (t->eos < 0)
            t->eos = id_from(t, json_object_get(root, eos));
        json_decref(root);
    }
}

static orcd_status build(json_t *root, const char *path, tok **out, orcd_error *err) {
    json_t *model = json_object_get(root, "model"), *vocab = json_object_get(model, "vocab");
    const json_t *merges = json_object_get(model, "merges"), *added = json_object_get(root, "added_tokens");
    tok_split split = TOK_SPLIT_GPT2;
    tok *t = NULL;
    orcd_status status;
    ORCD_TRY(check_model(model, path, err));
    ORCD_TRY(read_split(root, path, &split, err));
    ORCD_TRY(tok_new(count_ids(vocab, added), path, &t, err));
    t->kind = TOK_HF_JSON;
    t->split = split;
    t->whole_words = json_is_true(json_object_get(model, "ignore_merges"));
    ORCD_TRY_GOTO(status, done, put_tokens(t, vocab, added, path, err));
    ORCD_TRY_GOTO(status, done, tok_map_all(t, json_array_size(merges), path, err));
    ORCD_TRY_GOTO(status, done, put_merges(t, merges, path, err));
    ORCD_TRY_GOTO(status, done, tok_seal(t, path, err));
    read_bos_eos(t, path);
    *out = t;
    t = NULL;
done:
    tok_close(t);
    return status;
}

orcd_status tok_open_json(const char *path, tok **out, orcd_error *err) {
    char *text = NULL;
    size_t len = 0;
    json_error_t at;
    *out = NULL;
    ORCD_TRY(file_slurp(path, MAX_JSON, &text, &len, err));
    json_t *root = json_loadb(text, len, JSON_REJECT_DUPLICATES, &at);
    free(text);
    if (!root)
        return orcd_fail_at(err, ORCD_ERR_FORMAT, (uint64_t)at.position, "%s: %s (line %d)", path, at.text, at.line);
    orcd_status status = build(root, path, out, err);
    json_decref(root);
    return status;
}
