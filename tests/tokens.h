/* tests/tokens.h: tokenizers for tests: a tiny one made here, GPT-2's of tests/data, gpt-oss's of ../shared. */
#ifndef ORCD_TESTS_TOKENS_H
#define ORCD_TESTS_TOKENS_H

#include <jansson.h>
#include <unistd.h>

#include "testing.h"
#include "text/split.h"
#include "text/tokenizer.h"

/* The character that stands for a byte in GPT-2's alphabet, as UTF-8. */
static inline void t_spell(int byte, char out[3]) {
    int c = byte, at = 256;
    for (int b = 0; b <= byte; b++) {
        bool itself = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
        c = itself ? b : at++;
    }
    size_t n = 0;
    if (c >= 0x80)
        out[n++] = (char)(0xc0 | c >> 6);
    out[n++] = (char)(c >= 0x80 ? 0x80 | (c & 0x3f) : c);
    out[n] = 0;
}

static const char *const t_tiny_merges[] = {"t h",  "th e", "\xc4\xa0 the", "i n",
                                            "in g", "a n",  "an d",         "\xc4\xa0 and"};

/* tokenizer.json as data: 256 byte tokens, 8 merges, one word, then harmony's control tokens. */
static inline json_t *t_tiny_json(void) {
    static const char *const special[] = {"<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>",
                                          "<|channel|>",     "<|start|>",     "<|end|>",    "<|message|>",
                                          "<|call|>",        "<|reserved|>"};
    json_t *vocab = json_object(), *merges = json_array(), *added = json_array();
    json_int_t id = 0;
    for (int byte = 0; byte < 256; byte++) {
        char spelled[3];
        t_spell(byte, spelled);
        json_object_set_new(vocab, spelled, json_integer(id++));
    }
    for (size_t i = 0; i < ORCD_COUNT(t_tiny_merges); i++) {
        const char *m = t_tiny_merges[i], *space = strchr(m, ' ');
        char whole[16];
        snprintf(whole, sizeof whole, "%.*s%s", (int)(space - m), m, space + 1);
        json_object_set_new(vocab, whole, json_integer(id++));
        json_array_append_new(merges, json_string(m));
    }
    json_object_set_new(vocab, "assistant", json_integer(id++)); /* a whole word without merges */
    for (size_t i = 0; i < ORCD_COUNT(special); i++)
        json_array_append_new(added, json_pack("{s:I,s:s,s:b}", "id", id++, "content", special[i], "special", 1));
    return json_pack("{s:n,s:o,s:{s:s,s:[{s:s,s:{s:s},s:s,s:b},{s:s,s:b,s:b}]},s:{s:s,s:b,s:o,s:o}}", "normalizer",
                     "added_tokens", added, "pre_tokenizer", "type", "Sequence", "pretokenizers", "type", "Split",
                     "pattern", "Regex", TOK_PATTERN_O200K, "behavior", "Isolated", "invert", 0, "type", "ByteLevel",
                     "add_prefix_space", 0, "use_regex", 0, "model", "type", "BPE", "ignore_merges", 1, "vocab", vocab,
                     "merges", merges);
}

/* A path for a temporary file of this process; remove() it. */
static inline void t_temp(char path[64], const char *name) {
    snprintf(path, 64, "/tmp/orcd-test-%d-%s", (int)getpid(), name);
}

static inline orcd_status t_open_text(const char *text, size_t len, tok **out, orcd_error *err) {
    char path[64];
    t_temp(path, "tokenizer.json");
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    fwrite(text, 1, len, f);
    fclose(f);
    orcd_status status = tok_open_json(path, out, err);
    remove(path);
    return status;
}

/* Takes the reference. */
static inline orcd_status t_open_root(json_t *root, tok **out, orcd_error *err) {
    assert_non_null(root);
    char *text = json_dumps(root, 0);
    assert_non_null(text);
    orcd_status status = t_open_text(text, strlen(text), out, err);
    free(text);
    json_decref(root);
    return status;
}

static inline tok *t_tiny(void) {
    orcd_error err = {0};
    tok *t = NULL;
    if (t_open_root(t_tiny_json(), &t, &err) != ORCD_OK)
        fail_msg("%s", err.message);
    return t;
}

static inline tok *t_gpt2(void) {
    orcd_error err = {0};
    gguf *g = NULL;
    tok *t = NULL;
    if (gguf_open("tests/data/gpt2/ggml-vocab-gpt-2.gguf", &g, &err) != ORCD_OK ||
        tok_open_gguf(g, &t, &err) != ORCD_OK)
        fail_msg("%s", err.message);
    gguf_close(g);
    return t;
}

/* A file of the folder `shared` beside the repository; false when there is none. */
static inline bool t_shared(const char *name, char path[256]) {
    static const char *const root[] = {"../shared", "../../shared"};
    for (size_t i = 0; i < ORCD_COUNT(root); i++) {
        snprintf(path, 256, "%s/%s", root[i], name);
        if (access(path, R_OK) == 0)
            return true;
    }
    return false;
}

/* The tokenizer of gpt-oss, or NULL after saying SKIP. */
static inline tok *t_gpt_oss(void) {
    const char *build = getenv("ORCD_BUILD");
    char packed[256], path[300], part[320], command[1024];
    orcd_error err = {0};
    tok *t = NULL;
    if (!t_shared("data/gpt-oss/tokenizer.json.gz", packed)) {
        puts("SKIP: no ../shared/data/gpt-oss/tokenizer.json.gz: not tested with the vocabulary of gpt-oss");
        return NULL;
    }
    snprintf(path, sizeof path, "%s/gpt-oss-tokenizer.json", build ? build : "/tmp");
    snprintf(part, sizeof part, "%s.%d", path, (int)getpid());
    if (access(path, R_OK) != 0) {
        snprintf(command, sizeof command, "gzip -dc %s >%s", packed, part);
        assert_int_equal(system(command), 0);
        assert_int_equal(rename(part, path), 0);
    }
    if (tok_open_json(path, &t, &err) != ORCD_OK)
        fail_msg("%s", err.message);
    return t;
}

#endif
