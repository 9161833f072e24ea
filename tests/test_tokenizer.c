#include <time.h>

#include "tokens.h"

static ids encode(const tok *t, const void *text, size_t len, bool specials) {
    ids out = {0};
    assert_int_equal(tok_encode(t, text, len, specials, &out), ORCD_OK);
    return out;
}

static void check_ids(const tok *t, const char *text, size_t len, const int32_t *want, size_t n) {
    ids got = encode(t, text, len, false);
    for (size_t i = 0; i < n && i < got.n; i++)
        if (got.data[i] != want[i])
            fail_msg("\"%.60s\": id %zu is %d, not %d", text, i, got.data[i], want[i]);
    if (got.n != n)
        fail_msg("\"%.60s\": %zu ids, not %zu", text, got.n, n);
    ids_free(&got);
}

static void check_round_trip(const tok *t, const void *text, size_t len) {
    ids got = encode(t, text, len, false);
    buf back = {0};
    tok_decode(t, got.data, got.n, false, &back);
    assert_int_equal(back.len, len);
    if (len)
        assert_memory_equal(back.data, text, len);
    buf_free(&back);
    ids_free(&got);
}

/* ---- golden ids ---- */

static void gpt2_has_the_ids_of_llama_cpp(void **state) {
    static const char marker[] = "\n__ggml_vocab_test__\n";
    (void)state;
    tok *t = t_gpt2();
    size_t n, n_out, n_case = 0;
    char *in = (char *)t_read("tests/data/gpt2/ggml-vocab-gpt-2.gguf.inp", &n);
    char *out = (char *)t_read("tests/data/gpt2/ggml-vocab-gpt-2.gguf.out", &n_out), *line = out;
    in[n] = out[n_out] = 0;
    for (char *text = in, *end; (end = strstr(text, marker)); text = end + strlen(marker), n_case++) {
        int32_t want[512];
        size_t n_want = 0;
        char *stop = strchr(line, '\n');
        assert_non_null(stop);
        while (line < stop && n_want < ORCD_COUNT(want)) {
            want[n_want] = (int32_t)strtol(line, &line, 10);
            n_want += line <= stop;
            line += strspn(line, " ");
        }
        line = stop + 1;
        check_ids(t, text, (size_t)(end - text), want, n_want);
    }
    assert_int_equal(n_case, 46);
    assert_int_equal(tok_eos(t), 50256);
    assert_int_equal(tok_split_of(t), TOK_SPLIT_GPT2);
    free(in);
    free(out);
    tok_close(t);
}

static void gpt_oss_has_the_ids_of_hugging_face(void **state) {
    (void)state;
    char path[256], *line = NULL;
    size_t cap = 0, n_case = 0;
    tok *t = t_gpt_oss();
    if (!t)
        skip();
    assert_true(t_shared("data/gpt-oss/tokenizer_vectors.jsonl", path));
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    for (; getline(&line, &cap, f) > 0; n_case++) {
        json_t *v = json_loads(line, JSON_ALLOW_NUL, NULL), *text = json_object_get(v, "text");
        json_t *list = json_object_get(v, "ids"), *decoded = json_object_get(v, "decoded");
        assert_non_null(text);
        ids got = encode(t, json_string_value(text), json_string_length(text), true);
        buf back = {0};
        assert_int_equal(got.n, json_array_size(list));
        for (size_t i = 0; i < got.n; i++)
            if (got.data[i] != json_integer_value(json_array_get(list, i)))
                fail_msg("vector %zu: id %zu differs", n_case + 1, i);
        tok_decode(t, got.data, got.n, true, &back);
        assert_int_equal(back.len, json_string_length(decoded));
        if (back.len)
            assert_memory_equal(back.data, json_string_value(decoded), back.len);
        check_round_trip(t, json_string_value(text), json_string_length(text));
        buf_free(&back);
        ids_free(&got);
        json_decref(v);
    }
    assert_int_equal(n_case, 400);
    free(line);
    fclose(f);
    tok_close(t);
}

/* ---- the splitters, against what the two patterns mean (Oniguruma gave these) ---- */

static void check_pieces(tok_split kind, const char *text, const char *const *want) {
    const uint8_t *s = (const uint8_t *)text;
    for (size_t left = strlen(text), n; left; s += n, left -= n, want++) {
        n = tok_split_next(kind, s, left);
        if (!*want || strlen(*want) != n || memcmp(*want, s, n) != 0)
            fail_msg("\"%s\": piece \"%.*s\" instead of \"%s\"", text, (int)n, s, *want ? *want : "the end");
    }
    assert_null(*want);
}
#define PIECES(kind, text, ...) check_pieces(kind, text, (const char *const[]){__VA_ARGS__, NULL})

static void o200k_pieces_at_the_edges(void **state) {
    (void)state;
    tok_split k = TOK_SPLIT_O200K;
    PIECES(k, "camelCase HTTPServer", "camel", "Case", " HTTPServer");
    PIECES(k, "ab\xe4\xb8\xad", "ab\xe4\xb8\xad");
    PIECES(k,
           "A\xe4\xb8\xad"
           "BC",
           "A\xe4\xb8\xad", "BC"); /* capitals are given back */
    PIECES(k,
           "\xcc\x81"
           "ABC",
           "\xcc\x81", "ABC"); /* a mark is both prefix and letter */
    PIECES(k,
           "!\xcc\x81"
           "ABC",
           "!\xcc\x81", "ABC");
    PIECES(k,
           "a'\xc5\xbf"
           "b",
           "a'\xc5\xbf", "b"); /* long s folds to s */
    PIECES(k, "DON'T we'Ll o'clock", "DON'T", " we'Ll", " o", "'clock");
    PIECES(k, "12345\xc2\xbd", "123", "45\xc2\xbd");
    PIECES(k, "  x", " ", " x");
    PIECES(k, " \n \n x", " \n \n", " x");
    PIECES(k, "\t\t", "\t\t");
    PIECES(k, "x \xe3\x80\x80", "x", " \xe3\x80\x80");
    PIECES(k, " ...//\n/\r\nx", " ...//\n/\r\n", "x");
    PIECES(k, "\xff\xfe \xff\x61", "\xff\xfe", " \xff", "a"); /* bytes that are no UTF-8: symbols */
}

static void gpt2_pieces_at_the_edges(void **state) {
    (void)state;
    tok_split k = TOK_SPLIT_GPT2;
    PIECES(k, "don't DON'T", "don", "'t", " DON", "'", "T");
    PIECES(k, "camelCase 12345", "camelCase", " 12345");
    PIECES(k, " \n x", " \n", " x");
    PIECES(k, "\n\nx", "\n", "\n", "x");
    PIECES(k, "a\xcc\x81", "a", "\xcc\x81");
    PIECES(k, " !\xff ", " !\xff", " ");
}

/* A piece depends on what follows its start only, so that encoding may begin anew at any piece. */
static void split_depends_on_the_rest_only(void **state) {
    static const char pool[] = "aA1 '\n\r/s\xcc\x81\xe4\xb8\xad\xc5\xbf\xff.\t";
    (void)state;
    uint64_t seed = 7;
    for (int round = 0; round < 20000; round++) {
        uint8_t s[40];
        size_t n = 1 + t_below(&seed, sizeof s), at = 0;
        for (size_t i = 0; i < n; i++)
            s[i] = (uint8_t)pool[t_below(&seed, sizeof pool - 1)];
        tok_split kind = round & 1 ? TOK_SPLIT_O200K : TOK_SPLIT_GPT2;
        while (at < n) {
            size_t len = tok_split_next(kind, s + at, n - at);
            assert_in_range(len, 1, n - at);
            uint8_t *alone = malloc(n - at); /* so that the sanitizer sees a read before the start */
            memcpy(alone, s + at, n - at);
            assert_int_equal(tok_split_next(kind, alone, n - at), len);
            free(alone);
            at += len;
        }
    }
}

/* ---- any bytes ---- */

static void random_bytes_round_trip(void **state) {
    static const char pool[] =
        "the and ing 0123 '\n\t<|start|>\xe2\x82\xac\xf0\x9f\x99\x82\xcc\x81\xff\xc0\x80\xed\xa0\x80";
    (void)state;
    uint64_t seed = 1;
    tok *t[] = {t_tiny(), t_gpt2()};
    for (int round = 0; round < 100000; round++) {
        uint8_t s[64];
        size_t n = t_below(&seed, sizeof s);
        for (size_t i = 0; i < n; i++)
            s[i] = round % 2 ? (uint8_t)t_random(&seed) : (uint8_t)pool[t_below(&seed, sizeof pool)];
        check_round_trip(t[round / 2 % 2], s, n);
    }
    tok_close(t[0]);
    tok_close(t[1]);
}

/* Random letters that merge in many ways, pieces from one byte to far beyond those that fit the stack. */
static void merges_equal_the_obvious_algorithm(void **state) {
    (void)state;
    uint64_t seed = 3;
    tok *t = t_tiny();
    for (int round = 0; round < 2000; round++) {
        char s[300];
        size_t n = 1 + t_below(&seed, round % 10 ? 20 : sizeof s), n_list = n;
        int32_t list[sizeof s];
        for (size_t i = 0; i < n; i++) {
            s[i] = "thingande"[t_below(&seed, 9)];
            char spelled[2] = {s[i], 0};
            ids one = encode(t, spelled, 1, false);
            list[i] = one.data[0];
            ids_free(&one);
        }
        for (size_t rank = 0; rank < ORCD_COUNT(t_tiny_merges); rank++) { /* no merge makes an earlier one possible */
            char left[8], right[8];
            sscanf(t_tiny_merges[rank], "%7s %7s", left, right);
            for (size_t i = 0; i + 1 < n_list; i++) {
                size_t a, b;
                const char *x = tok_bytes(t, list[i], &a), *y = tok_bytes(t, list[i + 1], &b);
                if (a != strlen(left) || b != strlen(right) || memcmp(x, left, a) != 0 || memcmp(y, right, b) != 0)
                    continue;
                list[i] = (int32_t)(256 + rank);
                memmove(list + i + 1, list + i + 2, (--n_list - i - 1) * sizeof *list);
            }
        }
        check_ids(t, s, n, list, n_list);
    }
    tok_close(t);
}

static double seconds_to_encode(const tok *t, const char *unit, size_t len) {
    char *text = malloc(len);
    uint64_t seed = 5;
    struct timespec a, b;
    for (size_t i = 0, n = strlen(unit); i < len; i++)
        text[i] = n ? unit[i % n] : (char)('a' + t_below(&seed, 26));
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &a);
    ids got = encode(t, text, len, false);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &b);
    ids_free(&got);
    free(text);
    return (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec);
}

static void hostile_text_takes_linear_time(void **state) {
    static const char *const unit[] = {"a",
                                       "^",
                                       "_",
                                       " ",
                                       "\n",
                                       "\xf0\x9f\x91\xa9\xe2\x80\x8d",
                                       "\xcc\x80",
                                       "",
                                       "\xe4\xb8\xad"
                                       "A",
                                       " \n",
                                       "\xff",
                                       "A\xcc\x80",
                                       "!A"};
    (void)state;
    tok *t[] = {t_gpt2(), t_tiny(), t_gpt_oss()};
    for (size_t k = 0; k < ORCD_COUNT(t); k++)
        for (size_t i = 0; t[k] && i < ORCD_COUNT(unit); i++) {
            double all = seconds_to_encode(t[k], unit[i], 1000000);
            if (all > 1)
                fail_msg("1 MB of \"%s\" took %.2f s of processor time", unit[i], all);
        }
    for (size_t k = 0; k < ORCD_COUNT(t); k++)
        tok_close(t[k]);
}

static void text_beyond_the_limit_is_refused(void **state) {
    (void)state;
    tok *t = t_tiny();
    ids out = {0};
    assert_int_equal(tok_encode(t, "x", (size_t)1 << 31, false, &out), ORCD_ERR_LIMIT);
    assert_int_equal(out.n, 0);
    tok_close(t);
}

/* ---- special tokens ---- */

static void specials_only_on_request(void **state) {
    (void)state;
    tok *t = t_tiny();
    const char text[] = "the<|start|><|start|<|end|>\xff<|reserved|>";
    int32_t start = tok_special(t, "<|start|>"), end = tok_special(t, "<|end|>");
    ids plain = encode(t, text, strlen(text), false), all = encode(t, text, strlen(text), true);
    buf back = {0};
    for (size_t i = 0; i < plain.n; i++)
        assert_false(tok_is_special(t, plain.data[i]));
    assert_int_equal(all.data[1], start);
    assert_int_equal(all.data[10], end);
    tok_decode(t, all.data, all.n, true, &back);
    assert_string_equal(back.data, text);
    buf_clear(&back);
    tok_decode(t, all.data, all.n, false, &back);
    assert_string_equal(back.data, "the<|start|\xff");
    assert_int_equal(tok_special(t, "<|nothing|>"), -1);
    assert_int_equal(tok_special(t, "the"), -1);
    assert_true(tok_is_special(t, -1) && tok_is_special(t, tok_n_vocab(t)) && tok_is_special(t, end));
    buf_free(&back);
    ids_free(&plain);
    ids_free(&all);
    tok_close(t);
}

static void longest_special_wins(void **state) {
    (void)state;
    json_t *root = t_tiny_json();
    orcd_error err = {0};
    tok *t = NULL;
    json_array_append_new(json_object_get(root, "added_tokens"),
                          json_pack("{s:i,s:s}", "id", 300, "content", "<|start|>>"));
    assert_int_equal(t_open_root(root, &t, &err), ORCD_OK);
    ids got = encode(t, "<|start|>><|start|>", 19, true);
    assert_int_equal(got.n, 2);
    assert_int_equal(got.data[0], 300);
    assert_int_equal(got.data[1], tok_special(t, "<|start|>"));
    size_t len;
    assert_int_equal(tok_n_vocab(t), 301);
    tok_bytes(t, 290, &len); /* a hole */
    assert_int_equal(len, 0);
    assert_true(tok_is_special(t, 290));
    ids_free(&got);
    tok_close(t);
}

/* ---- detokeniser ---- */

static void check_stream(const char *bytes, size_t len, const char *want) {
    for (size_t a = 0; a <= len; a++)
        for (size_t b = a; b <= len; b++) {
            tok_stream s = {0};
            buf out = {0};
            tok_stream_push(&s, bytes, a, &out);
            tok_stream_push(&s, bytes + a, b - a, &out);
            tok_stream_push(&s, bytes + b, len - b, &out);
            tok_stream_end(&s, &out);
            assert_string_equal(out.data ? out.data : "", want);
            buf_free(&out);
        }
}
#define FFFD "\xef\xbf\xbd"
#define STREAM(bytes, want) check_stream(bytes, sizeof(bytes) - 1, want)

static void every_chunking_gives_the_same_text(void **state) {
    (void)state;
    STREAM("", "");
    STREAM("plain", "plain");
    STREAM("\xe2\x82\xac\xf0\x9f\x99\x82\xc3\xa9", "\xe2\x82\xac\xf0\x9f\x99\x82\xc3\xa9");
    STREAM("a\xf0\x9f\x99", "a" FFFD);
    STREAM("\xf0\x9f\x99"
           "A",
           FFFD "A");
    STREAM("\xe2\x82\xe2\x82\xac", FFFD "\xe2\x82\xac");
    STREAM("\x80\xff\xc0\xaf", FFFD FFFD FFFD FFFD);
    STREAM("\xe0\x80\x80", FFFD FFFD FFFD);          /* overlong */
    STREAM("\xed\xa0\x80", FFFD FFFD FFFD);          /* surrogate */
    STREAM("\xf4\x90\x80\x80", FFFD FFFD FFFD FFFD); /* beyond U+10FFFF */
    STREAM("a\xf1\x80\x80\xe1\x80\xc2"
           "b",
           "a" FFFD FFFD FFFD "b"); /* Unicode 15, table 3-8 */
}

static void a_character_in_two_tokens_is_one_delta(void **state) {
    (void)state;
    tok_stream s = {0};
    buf out = {0};
    tok_stream_push(&s, "\xf0\x9f\x92", 3, &out);
    assert_int_equal(out.len, 0);
    tok_stream_push(&s, "\x96", 1, &out);
    assert_string_equal(out.data, "\xf0\x9f\x92\x96");
    buf_free(&out);
}

/* ---- malformed tokenizer.json ---- */

static void refused(json_t *root, orcd_status want) {
    orcd_error err = {0};
    tok *t = (tok *)&err;
    assert_int_equal(t_open_root(root, &t, &err), want);
    assert_null(t);
    assert_non_null(strstr(err.message, "tokenizer.json")); /* names the file */
}

static json_t *changed(const char *path, json_t *value) {
    json_t *root = t_tiny_json(), *at = root;
    char copy[128], *save = NULL;
    snprintf(copy, sizeof copy, "%s", path);
    char *part = strtok_r(copy, "/", &save), *next;
    while ((next = strtok_r(NULL, "/", &save))) {
        at = json_is_array(at) ? json_array_get(at, (size_t)atoi(part)) : json_object_get(at, part);
        assert_non_null(at);
        part = next;
    }
    json_is_array(at) ? json_array_set_new(at, (size_t)atoi(part), value) : json_object_set_new(at, part, value);
    return root;
}

static void another_pattern_is_refused(void **state) {
    (void)state;
    const orcd_status no = ORCD_ERR_UNSUPPORTED;
    refused(changed("pre_tokenizer/pretokenizers/0/pattern/Regex", json_string("(a+)+b")), no);
    refused(changed("pre_tokenizer/pretokenizers/0/pattern/Regex", json_string(TOK_PATTERN_GPT2)), no);
    refused(changed("pre_tokenizer/pretokenizers/0/pattern/Regex", json_string(TOK_PATTERN_O200K " ")), no);
    refused(changed("pre_tokenizer/pretokenizers/0/behavior", json_string("Removed")), no);
    refused(changed("pre_tokenizer/pretokenizers/0/invert", json_true()), no);
    refused(changed("pre_tokenizer/pretokenizers/1/use_regex", json_true()), no);
    refused(changed("pre_tokenizer/pretokenizers/1/add_prefix_space", json_true()), no);
    refused(changed("pre_tokenizer", json_null()), no);
    refused(changed("pre_tokenizer",
                    json_pack("{s:s,s:b,s:b}", "type", "ByteLevel", "add_prefix_space", 1, "use_regex", 1)),
            no);
    refused(changed("pre_tokenizer",
                    json_pack("{s:s,s:b,s:b}", "type", "ByteLevel", "add_prefix_space", 0, "use_regex", 0)),
            no);
    refused(changed("pre_tokenizer", json_pack("{s:s}", "type", "Whitespace")), no);
    refused(changed("normalizer", json_pack("{s:s}", "type", "NFC")), no);
    refused(changed("model/type", json_string("Unigram")), no);
    refused(changed("model/dropout", json_real(0.1)), no);
    refused(changed("model/byte_fallback", json_true()), no);
    refused(changed("model/unk_token", json_string("<unk>")), no);
    refused(changed("added_tokens/0/lstrip", json_true()), no);
}

static void malformed_vocabularies_are_refused(void **state) {
    (void)state;
    const orcd_status bad = ORCD_ERR_FORMAT;
    refused(changed("model/vocab", json_array()), bad);
    refused(changed("model/vocab/the", json_integer(-1)), bad);
    refused(changed("model/vocab/the", json_integer(1 << 20)), bad);
    refused(changed("model/vocab/the", json_integer(INT64_MAX)), bad);
    refused(changed("model/vocab/the", json_real(5)), bad);
    refused(changed("model/vocab/the", json_integer(0)), bad);            /* an id twice */
    refused(changed("model/vocab/", json_integer(900)), bad);             /* an empty token */
    refused(changed("model/vocab/\xe4\xb8\xad", json_integer(900)), bad); /* outside the alphabet */
    refused(changed("model/merges", json_null()), bad);
    refused(changed("model/merges/0", json_string("q z")), bad); /* union missing */
    refused(changed("model/merges/0", json_string("zz h")), bad);
    refused(changed("model/merges/0", json_string("th")), bad);
    refused(changed("model/merges/0", json_string(" ")), bad);
    refused(changed("model/merges/0", json_string("")), bad);
    refused(changed("model/merges/0", json_integer(3)), bad);
    refused(changed("model/merges/0", json_pack("[s,s,s]", "t", "h", "e")), bad);
    refused(changed("model/merges/0", json_pack("[s,i]", "t", 1)), bad);
    refused(changed("added_tokens/0/content", json_string("")), bad);
    refused(changed("added_tokens/0/content", json_integer(1)), bad);
    refused(changed("added_tokens/0/content", json_string("<|end|>")), bad); /* a text twice */
    refused(changed("added_tokens/0/id", json_string("7")), bad);
    refused(changed("added_tokens/0/id", json_integer(1 << 20)), bad);
    json_t *root = t_tiny_json();
    json_object_del(json_object_get(json_object_get(root, "model"), "vocab"), "!");
    refused(root, bad); /* a byte without token */
}

static void old_and_harmless_forms_are_read(void **state) {
    (void)state;
    orcd_error err = {0};
    tok *t = NULL;
    json_t *root = changed("model/continuing_subword_prefix", json_string(""));
    json_object_set_new(root, "pre_tokenizer", json_pack("{s:s,s:b}", "type", "ByteLevel", "add_prefix_space", 0));
    json_object_del(json_object_get(root, "model"), "type");
    json_array_set_new(json_object_get(json_object_get(root, "model"), "merges"), 0, json_pack("[s,s]", "t", "h"));
    assert_int_equal(t_open_root(root, &t, &err), ORCD_OK);
    assert_int_equal(tok_split_of(t), TOK_SPLIT_GPT2);
    tok_close(t);
}

static void a_token_that_its_merges_do_not_make_is_not_a_whole_word(void **state) {
    (void)state;
    orcd_error err = {0};
    tok *t = NULL;
    json_t *root = changed("model/ignore_merges", json_false());
    json_object_set_new(json_object_get(json_object_get(root, "model"), "vocab"), "king", json_integer(900));
    assert_int_equal(t_open_root(json_deep_copy(root), &t, &err), ORCD_OK);
    ids got = encode(t, "king", 4, false);
    assert_int_equal(got.n, 2); /* k ing */
    ids_free(&got);
    tok_close(t);
    json_object_set_new(json_object_get(root, "model"), "ignore_merges", json_true());
    assert_int_equal(t_open_root(root, &t, &err), ORCD_OK);
    got = encode(t, "king", 4, false);
    assert_int_equal(got.n, 1);
    ids_free(&got);
    tok_close(t);
}

static void a_megabyte_token_is_read(void **state) {
    (void)state;
    orcd_error err = {0};
    tok *t = NULL;
    size_t n = 1000000;
    char *big = malloc(n + 1);
    memset(big, 'q', n);
    big[n] = 0;
    json_t *root = changed("model/ignore_merges", json_false());
    json_object_set_new(json_object_get(json_object_get(root, "model"), "vocab"), big, json_integer(900));
    assert_int_equal(t_open_root(root, &t, &err), ORCD_OK);
    check_round_trip(t, big, n);
    free(big);
    tok_close(t);
}

static void every_prefix_of_a_file_is_refused(void **state) {
    (void)state;
    json_t *root = t_tiny_json();
    char *text = json_dumps(root, JSON_COMPACT);
    json_decref(root);
    orcd_error err = {0};
    for (size_t n = 0; n < strlen(text); n += 7) {
        tok *t = NULL;
        assert_int_equal(t_open_text(text, n, &t, &err), ORCD_ERR_FORMAT);
        assert_null(t);
    }
    free(text);
}

/* ---- GGUF ---- */

typedef struct tiny_gguf { /* what to write instead of a sound file */
    const char *pre, *model, *odd_token, *odd_merge, *skip, *retyped;
    gguf_type type, elem;
    int32_t odd_type;
    size_t odd_len;
} tiny_gguf;

static orcd_status open_gguf(const tiny_gguf *odd, tok **out, orcd_error *err) {
    char path[64], spelled[256][3];
    gguf_str token[260], merge[2] = {{"t h", 3}, {"th e", 4}};
    int32_t type[260];
    gguf_writer *w;
    gguf *g = NULL;
    t_temp(path, "tiny.gguf");
    for (int i = 0; i < 256; i++) {
        t_spell(i, spelled[i]);
        token[i] = (gguf_str){spelled[i], strlen(spelled[i])};
        type[i] = 1;
    }
    token[256] = (gguf_str){"th", 2}, token[257] = (gguf_str){"the", 3};
    token[258] = (gguf_str){"<|end|>", 7}, token[259] = (gguf_str){"[PAD259]", 8};
    type[256] = type[257] = 1, type[258] = 4, type[259] = 5;
    if (odd->odd_token)
        token[257] = (gguf_str){odd->odd_token, odd->odd_len ? odd->odd_len : strlen(odd->odd_token)};
    if (odd->odd_type)
        type[257] = odd->odd_type;
    if (odd->odd_merge)
        merge[1] = (gguf_str){odd->odd_merge, strlen(odd->odd_merge)};
    assert_int_equal(gguf_create(path, 32, &w, err), ORCD_OK);
    const char *model = odd->model ? odd->model : "gpt2", *pre = odd->pre ? odd->pre : "gpt-4o";
    static const char *const key[] = {"tokenizer.ggml.model",  "tokenizer.ggml.pre",
                                      "tokenizer.ggml.tokens", "tokenizer.ggml.token_type",
                                      "tokenizer.ggml.merges", "tokenizer.ggml.eos_token_id"};
    for (int i = 0; i < 6; i++) {
        static const uint8_t zero[64];
        if (odd->skip && strcmp(odd->skip, key[i]) == 0)
            continue;
        if (odd->retyped && strcmp(odd->retyped, key[i]) == 0) {
            gguf_kv kv = {.key = {key[i], strlen(key[i])},
                          .type = odd->type,
                          .elem = odd->elem,
                          .data = zero,
                          .n = odd->type == GGUF_ARRAY ? 4 : 1};
            gguf_put_kv(w, &kv);
        } else if (i < 2)
            gguf_put_str(w, key[i], i ? pre : model, strlen(i ? pre : model));
        else if (i == 2)
            gguf_put_str_array(w, key[i], token, 260);
        else if (i == 3)
            gguf_put_i32_array(w, key[i], type, 260);
        else if (i == 4)
            gguf_put_str_array(w, key[i], merge, 2);
        else
            gguf_put_u32(w, key[i], 258);
    }
    assert_int_equal(gguf_finish(w, err), ORCD_OK);
    assert_int_equal(gguf_open(path, &g, err), ORCD_OK);
    orcd_status status = tok_open_gguf(g, out, err);
    gguf_close(g);
    remove(path);
    return status;
}

static void gguf_refused(tiny_gguf odd, orcd_status want) {
    orcd_error err = {0};
    tok *t = (tok *)&err;
    assert_int_equal(open_gguf(&odd, &t, &err), want);
    assert_null(t);
    assert_true(strlen(err.message) > 0);
}

static void gguf_tokenizer_is_read(void **state) {
    (void)state;
    orcd_error err = {0};
    tok *t = NULL;
    assert_int_equal(open_gguf(&(tiny_gguf){0}, &t, &err), ORCD_OK);
    ids got = encode(t, "the<|end|>[PAD259]", 18, true);
    assert_int_equal(got.data[0], 257);
    assert_int_equal(got.data[1], 258);
    assert_int_equal(got.n, 10); /* unused tokens are never matched */
    assert_int_equal(tok_eos(t), 258);
    assert_int_equal(tok_bos(t), -1);
    assert_true(tok_is_special(t, 259));
    ids_free(&got);
    tok_close(t);
    assert_int_equal(open_gguf(&(tiny_gguf){.skip = "tokenizer.ggml.token_type"}, &t, &err), ORCD_OK);
    assert_false(tok_is_special(t, 259));
    tok_close(t);
}

static void gguf_arrays_of_every_wrong_type_are_refused(void **state) {
    (void)state;
    static const char *const key[] = {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"};
    for (size_t k = 0; k < ORCD_COUNT(key); k++) {
        for (int type = 0; type < GGUF_N_TYPES; type++) {
            if (type == GGUF_ARRAY)
                continue;
            gguf_refused((tiny_gguf){.retyped = key[k], .type = (gguf_type)type, .elem = (gguf_type)type},
                         ORCD_ERR_FORMAT);
            bool odd = k != 2 || type != GGUF_STRING;
            if (odd)
                gguf_refused((tiny_gguf){.retyped = key[k], .type = GGUF_ARRAY, .elem = (gguf_type)type},
                             ORCD_ERR_FORMAT);
        }
        if (k != 1)
            gguf_refused((tiny_gguf){.skip = key[k]}, ORCD_ERR_FORMAT);
    }
}

static void gguf_vocabularies_out_of_order_are_refused(void **state) {
    (void)state;
    const orcd_status bad = ORCD_ERR_FORMAT;
    gguf_refused((tiny_gguf){.pre = "llama-bpe"}, ORCD_ERR_UNSUPPORTED);
    gguf_refused((tiny_gguf){.skip = "tokenizer.ggml.pre"}, ORCD_ERR_UNSUPPORTED);
    gguf_refused((tiny_gguf){.model = "llama"}, ORCD_ERR_UNSUPPORTED);
    gguf_refused((tiny_gguf){.odd_type = 6, .odd_token = "<0x-1>"}, bad);
    gguf_refused((tiny_gguf){.odd_type = 6, .odd_token = "<0xGG>"}, bad);
    gguf_refused((tiny_gguf){.odd_type = 99}, bad);
    gguf_refused((tiny_gguf){.odd_token = "th"}, bad); /* a text twice */
    gguf_refused((tiny_gguf){.odd_token = "", .odd_len = 0}, bad);
    gguf_refused((tiny_gguf){.odd_token = "a\0b", .odd_len = 3}, bad);
    gguf_refused((tiny_gguf){.odd_token = "\xff"}, bad);
    gguf_refused((tiny_gguf){.odd_token = "thx"}, bad); /* the union of a merge is missing */
    gguf_refused((tiny_gguf){.odd_merge = "the"}, bad);
    gguf_refused((tiny_gguf){.odd_merge = ""}, bad);
    gguf_refused((tiny_gguf){.odd_merge = " the"}, bad);
    gguf_refused((tiny_gguf){.odd_merge = "zz e"}, bad);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gpt2_has_the_ids_of_llama_cpp),
        cmocka_unit_test(gpt_oss_has_the_ids_of_hugging_face),
        cmocka_unit_test(o200k_pieces_at_the_edges),
        cmocka_unit_test(gpt2_pieces_at_the_edges),
        cmocka_unit_test(split_depends_on_the_rest_only),
        cmocka_unit_test(random_bytes_round_trip),
        cmocka_unit_test(merges_equal_the_obvious_algorithm),
        cmocka_unit_test(hostile_text_takes_linear_time),
        cmocka_unit_test(text_beyond_the_limit_is_refused),
        cmocka_unit_test(specials_only_on_request),
        cmocka_unit_test(longest_special_wins),
        cmocka_unit_test(every_chunking_gives_the_same_text),
        cmocka_unit_test(a_character_in_two_tokens_is_one_delta),
        cmocka_unit_test(another_pattern_is_refused),
        cmocka_unit_test(malformed_vocabularies_are_refused),
        cmocka_unit_test(old_and_harmless_forms_are_read),
        cmocka_unit_test(a_token_that_its_merges_do_not_make_is_not_a_whole_word),
        cmocka_unit_test(a_megabyte_token_is_read),
        cmocka_unit_test(every_prefix_of_a_file_is_refused),
        cmocka_unit_test(gguf_tokenizer_is_read),
        cmocka_unit_test(gguf_arrays_of_every_wrong_type_are_refused),
        cmocka_unit_test(gguf_vocabularies_out_of_order_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
