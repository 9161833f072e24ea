/* Tokenizers stored in GGUF: tokenizer.ggml.* with model "gpt2" (byte-level BPE). */
#include <string.h>

#include "text/vocab.h"

enum { TYPE_NORMAL = 1, TYPE_UNKNOWN, TYPE_CONTROL, TYPE_USER, TYPE_UNUSED, TYPE_BYTE };

static const char where[] = "tokenizer.ggml";

static bool is(gguf_str s, const char *text) { return s.len == strlen(text) && memcmp(s.data, text, s.len) == 0; }

static orcd_status read_split(const gguf *g, tok_split *split, orcd_error *err) {
    gguf_str model, pre = {.data = "absent", .len = 6}, arch;
    if (!gguf_string(g, "tokenizer.ggml.model", &model) || !is(model, "gpt2"))
        return orcd_fail(err, ORCD_ERR_UNSUPPORTED, "%s.model is not \"gpt2\"; only byte-level BPE is supported",
                         where);
    if (!gguf_string(g, "tokenizer.ggml.pre", &pre) && gguf_string(g, "general.architecture", &arch) &&
        is(arch, "gpt2"))
        pre = (gguf_str){"gpt-2", 5}; /* files older than the key */
    if (is(pre, "gpt-2") || is(pre, "gpt2"))
        *split = TOK_SPLIT_GPT2;
    else if (is(pre, "gpt-4o") || is(pre, "o200k") || is(pre, "o200k_base") || is(pre, "o200k_harmony"))
        *split = TOK_SPLIT_O200K;
    else
        return orcd_fail(err, ORCD_ERR_UNSUPPORTED, "%s.pre is \"%.*s\"; \"gpt-2\" and \"gpt-4o\" are supported", where,
                         (int)(pre.len < 64 ? pre.len : 64), pre.data);
    return ORCD_OK;
}

static orcd_status put_tokens(tok *t, const gguf_kv *tokens, const gguf_kv *types, orcd_error *err) {
    const uint8_t *cursor = tokens->data;
    for (uint64_t id = 0; id < tokens->n; id++) {
        gguf_str s = gguf_next_str(&cursor);
        int32_t type = TYPE_NORMAL;
        if (types)
            memcpy(&type, types->data + 4 * id, 4);
        if (type == TYPE_NORMAL)
            ORCD_TRY(tok_put_text(t, (int64_t)id, s.data, s.len, where, err));
        else if (type == TYPE_CONTROL || type == TYPE_USER || type == TYPE_UNKNOWN)
            ORCD_TRY(tok_put_special(t, (int64_t)id, s.data, s.len, where, err));
        else if (type != TYPE_UNUSED)
            return orcd_fail(err, ORCD_ERR_FORMAT, "%s.token_type: token %llu has type %d, which BPE does not know",
                             where, (unsigned long long)id, type);
    }
    return ORCD_OK;
}

static orcd_status put_merges(tok *t, const gguf_kv *merges, orcd_error *err) {
    const uint8_t *cursor = merges->data;
    for (uint64_t i = 0; i < merges->n; i++) {
        gguf_str s = gguf_next_str(&cursor);
        const char *space = s.len ? memchr(s.data, ' ', s.len) : NULL;
        size_t n = space ? (size_t)(space - s.data) : s.len;
        ORCD_TRY(tok_put_merge(t, (uint32_t)i, s.data, n, s.data + n + (space != NULL), s.len - n - (space != NULL),
                               where, err));
    }
    return ORCD_OK;
}

static int32_t read_id(const gguf *g, const char *key, const tok *t) {
    uint64_t id;
    return gguf_u64(g, key, &id) && id < (uint64_t)t->n_vocab ? (int32_t)id : -1;
}

orcd_status tok_open_gguf(const gguf *g, tok **out, orcd_error *err) {
    const gguf_kv *tokens, *types = NULL, *merges;
    tok_split split = TOK_SPLIT_GPT2;
    tok *t = NULL;
    orcd_status status;
    *out = NULL;
    ORCD_TRY(read_split(g, &split, err));
    if (!gguf_array(g, "tokenizer.ggml.tokens", GGUF_STRING, &tokens))
        return orcd_fail(err, ORCD_ERR_FORMAT, "%s.tokens is missing or not an array of strings", where);
    if (gguf_find(g, "tokenizer.ggml.token_type") &&
        (!gguf_array(g, "tokenizer.ggml.token_type", GGUF_I32, &types) || types->n != tokens->n))
        return orcd_fail(err, ORCD_ERR_FORMAT, "%s.token_type is not an array of %llu I32", where,
                         (unsigned long long)tokens->n);
    if (!gguf_array(g, "tokenizer.ggml.merges", GGUF_STRING, &merges) || merges->n > UINT32_MAX / 4)
        return orcd_fail(err, ORCD_ERR_FORMAT,
                         "%s.merges is missing or not an array of strings; convert the model "
                         "again",
                         where);
    ORCD_TRY(tok_new(tokens->n > TOK_MAX_IDS ? -1 : (int64_t)tokens->n, where, &t, err));
    t->kind = TOK_GGUF_BPE;
    t->split = split;
    t->whole_words = split == TOK_SPLIT_O200K;
    ORCD_TRY_GOTO(status, done, put_tokens(t, tokens, types, err));
    ORCD_TRY_GOTO(status, done, tok_map_all(t, merges->n, where, err));
    ORCD_TRY_GOTO(status, done, put_merges(t, merges, err));
    ORCD_TRY_GOTO(status, done, tok_seal(t, where, err));
    t->bos = read_id(g, "tokenizer.ggml.bos_token_id", t);
    t->eos = read_id(g, "tokenizer.ggml.eos_token_id", t);
    *out = t;
    t = NULL;
done:
    tok_close(t);
    return status;
}
