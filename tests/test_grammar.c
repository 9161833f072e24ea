/* Texts that follow a JSON schema: what is accepted, what schemas are refused, and that masks allow the tokens that the
 * automaton can read, no others. */
#include "testing.h"

#include <time.h>

#include "format/model_file.h"
#include "text/grammar/grammar.h"

#define FABLE "models/fable.gguf"

static mf_file *file;
static tok *tokens;
static grammar_vocab *vocab;

static int set_up(void **state) {
    (void)state;
    orcd_error err;
    return mf_open(FABLE, &file, &err) || tok_open_for(file, NULL, &tokens, &err) ||
           grammar_vocab_open(tokens, tok_n_vocab(tokens), &vocab);
}

static int tear_down(void **state) {
    (void)state;
    grammar_vocab_close(vocab);
    tok_close(tokens);
    mf_close(file);
    return 0;
}

static json_t *parse(const char *text) {
    json_error_t at;
    json_t *v = json_loads(text, JSON_DECODE_ANY | JSON_ALLOW_NUL, &at);
    if (!v)
        fail_msg("%s: %s", text, at.text);
    return v;
}

static grammar *compile(const char *schema) {
    grammar *g = NULL;
    orcd_error err;
    json_t *s = parse(schema);
    if (grammar_compile(s, &g, &err) != ORCD_OK)
        fail_msg("%s: %s", schema, err.message);
    json_decref(s);
    return g;
}

static grammar_run *begin(grammar *g) {
    grammar_run *r = NULL;
    assert_int_equal(grammar_run_open(g, vocab, &r), ORCD_OK);
    return r;
}

/* Fed at once and byte by byte. */
static bool accepts(grammar *g, const char *text) {
    grammar_run *whole = begin(g), *bytes = begin(g);
    bool fed = grammar_run_feed(whole, text, strlen(text)), all = true;
    for (const char *c = text; *c; c++)
        all = grammar_run_feed(bytes, c, 1);
    bool complete = grammar_run_complete(whole);
    assert_int_equal(fed, all);
    assert_int_equal(complete, grammar_run_complete(bytes));
    grammar_run_close(whole);
    grammar_run_close(bytes);
    return fed && complete;
}

#define NAMES "\"properties\":{\"a\":{\"type\":\"integer\"},\"ab\":{\"type\":\"string\"},\"b\":{\"type\":\"null\"}}"

static void texts__that_follow_their_schema_and_no_others(void **state) {
    (void)state;
    static const struct {
        const char *schema, *yes[8], *no[10];
    } t[] = {
        {"true", {"{}", "[1, -2.5e3]", "\"\"", "null", "true", "0"}, {"", "{", "01", "1.", "nul", "+1", "[1,]", "{,}"}},
        {"{\"type\":\"object\"}",
         {"{}", "{\"a\":1}", "{ \"a\": [ ] , \"b\":{\"c\":\"\\u00e9\"} }", "{\n  \"x\": false\n}"},
         {"[]", "{\"a\"}", "{\"a\":}", "{a:1}", "{\"a\":1 \"b\":2}", " {}", "{} ", "{  }", "{\n\n}"}},
        {"{\"type\":\"string\"}",
         {"\"\"", "\"\xc3\xa9\xf0\x9f\x98\x80\"", "\"\\n\\u12aB\\\\\\\"\"", "\"\\ud7ff\""},
         {"\"\\x\"", "\"\n\"", "\"\\u12\"", "\"\\ud800\"", "\"\xff\"", "\"\xe9\"", "\"\xc0\x80\"", "'a'"}},
        {"{\"type\":\"string\",\"minLength\":2,\"maxLength\":3}",
         {"\"ab\"", "\"abc\"", "\"\xc3\xa9\xc3\xa9\xc3\xa9\"", "\"\\n\\u0041x\""},
         {"\"a\"", "\"abcd\"", "\"\xc3\xa9\"", "\"\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\"", "\"\\n\\n\\n\\n\""}},
        {"{\"type\":\"integer\"}",
         {"0", "-0", "17", "-123456789012345678"},
         {"1.0", "1e3", "007", "-", "1234567890123456789"}},
        {"{\"type\":\"number\"}", {"0.5", "-1e-7", "12E+10", "3"}, {".5", "1.e3", "1e", "1e999", "0x1", "Infinity"}},
        {"{\"type\":\"integer\",\"minimum\":-5,\"maximum\":120}",
         {"-5", "0", "-0", "7", "99", "120"},
         {"-6", "121", "-10", "200", "1000", "7.0"}},
        {"{\"type\":\"integer\",\"exclusiveMinimum\":99.5,\"exclusiveMaximum\":1000}",
         {"100", "999", "500"},
         {"99", "1000", "5", "-100", "0", "1001"}},
        {"{\"minimum\":0.1,\"exclusiveMaximum\":1}",
         {"0.1", "0.100001", "0.999999", "0.5"},
         {"0.0999", "1", "0", "1.0", "-0.5", "5e-1", "0.1000001"}},
        {"{\"type\":\"number\",\"maximum\":-2.5}",
         {"-2.5", "-2.500001", "-3", "-999999999999"},
         {"-2.4", "0", "2.5", "-0"}},
        {"{\"type\":\"integer\",\"minimum\":123456789012345670}",
         {"123456789012345670", "999999999999999999"},
         {"123456789012345669", "12", "-123456789012345671"}},
        {"{\"type\":[\"boolean\",\"null\"]}", {"true", "false", "null"}, {"0", "\"true\"", "tru"}},
        {"{\"enum\":[1,10,\"a\",\"ab\",null,[1,{\"k\":2}],1]}",
         {"1", "10", "\"a\"", "\"ab\"", "null", "[1,{\"k\":2}]"},
         {"100", "\"abc\"", "[1, {\"k\":2}]", "\"\"", "0"}},
        {"{\"enum\":[1,\"a\"],\"type\":\"string\"}", {"\"a\""}, {"1"}},
        {"{\"const\":\"x/\\u00e9\"}", {"\"x/\xc3\xa9\""}, {"\"x\\/\xc3\xa9\"", "\"x\""}},
        {"{\"type\":\"array\",\"items\":{\"type\":\"integer\"},\"minItems\":1,\"maxItems\":3}",
         {"[1]", "[1, 2,\n3]"},
         {"[]", "[1,2,3,4]", "[\"a\"]", "[1,]", "[,1]"}},
        {"{" NAMES ",\"required\":[\"a\"]}",
         {"{\"a\":1}", "{\"a\":1,\"ab\":\"\"}", "{\"a\":1,\"b\":null}", "{\"a\":1,\"ab\":\"\",\"b\":null}"},
         {"{}", "{\"ab\":\"\"}", "{\"b\":null,\"a\":1}", "{\"a\":1,\"c\":1}", "{\"a\":1,\"a\":1}", "{\"\\u0061\":1}",
          "{\"a\":\"1\"}", "{\"a\":1,}"}},
        {"{" NAMES ",\"additionalProperties\":{\"type\":\"boolean\"}}",
         {"{}", "{\"c\":true}", "{\"a\":1,\"abc\":true,\"x\\u0062\":false}", "{\"b\":null,\"\":true}"},
         {"{\"c\":1}", "{\"c\":true,\"a\":1}", "{\"a\":true}", "{\"\\u0061\":true}", "{\"a\\u0062\":true}",
          "{\"ab\":true}"}},
        {"{\"required\":[\"z\"],\"properties\":{\"a\":{\"type\":\"null\"}}}",
         {"{\"a\":null,\"z\":[]}", "{\"z\":0}"},
         {"{}", "{\"a\":null}", "{\"z\":0,\"a\":null}"}},
        {"{\"anyOf\":[{\"type\":\"string\",\"maxLength\":1},{\"enum\":[\"red\",\"rose\"]},{\"type\":\"integer\"}]}",
         {"\"r\"", "\"red\"", "\"rose\"", "5"},
         {"\"ro\"", "\"reds\"", "5.5"}},
        {"{\"anyOf\":[{" NAMES ",\"required\":[\"a\",\"b\"]},{" NAMES ",\"required\":[\"a\",\"ab\"]}]}",
         {"{\"a\":1,\"b\":null}", "{\"a\":1,\"ab\":\"\"}", "{\"a\":1,\"ab\":\"\",\"b\":null}"},
         {"{\"a\":1}", "{\"ab\":\"\",\"b\":null}"}},
        {"{\"$ref\":\"#/$defs/l~1i~0s\",\"$defs\":{\"l/"
         "i~s\":{\"type\":\"object\",\"properties\":{\"v\":{\"type\":\"integer\"},"
         "\"next\":{\"anyOf\":[{\"$ref\":\"#/$defs/l~1i~0s\"},{\"type\":\"null\"}]}},\"required\":[\"v\",\"next\"],"
         "\"additionalProperties\":false}}}",
         {"{\"v\":1,\"next\":null}", "{\"v\":1,\"next\":{\"v\":2,\"next\":{\"v\":3,\"next\":null}}}"},
         {"{\"v\":1}", "{\"v\":1,\"next\":{}}"}},
        {"{\"type\":\"array\",\"items\":{\"$ref\":\"#\"}}", {"[]", "[[],[[]]]"}, {"[1]", "[[]"}},
        {"{\"properties\":{\"\":{\"type\":\"null\"},\"q\\\"\\n\":{\"type\":\"null\"}}}",
         {"{\"\":null,\"q\\\"\\n\":null}"},
         {"{\"q\":null}"}},
        {"{\"allOf\":[{\"type\":\"null\"}],\"title\":\"T\",\"description\":\"D\",\"default\":null}", {"null"}, {"1"}},
    };
    for (size_t i = 0; i < ORCD_COUNT(t); i++) {
        grammar *g = compile(t[i].schema);
        for (int k = 0; k < 8 && t[i].yes[k]; k++)
            if (!accepts(g, t[i].yes[k]))
                fail_msg("%s refuses %s", t[i].schema, t[i].yes[k]);
        for (int k = 0; k < 10 && t[i].no[k]; k++)
            if (accepts(g, t[i].no[k]))
                fail_msg("%s accepts %s", t[i].schema, t[i].no[k]);
        grammar_close(g);
    }
}

/* Whatever the bounds, in hundredths for numbers: those between them can be written and no others. */
static void numbers__are_those_of_their_range(void **state) {
    (void)state;
    uint64_t rng = 4;
    for (int round = 0; round < 24; round++) {
        int a = (int)t_below(&rng, 400) - 150, b = a + (int)t_below(&rng, 150), per = round % 2 ? 100 : 1;
        char schema[160], text[32];
        snprintf(schema, sizeof schema, "{\"type\":\"%s\",\"%s\":%.2f,\"%s\":%.2f}", per > 1 ? "number" : "integer",
                 round % 3 ? "minimum" : "exclusiveMinimum", (double)a / per - (round % 3 ? 0 : 0.01),
                 round % 3 ? "maximum" : "exclusiveMaximum", (double)b / per + (round % 3 ? 0 : 0.01));
        grammar *g = compile(schema);
        for (int v = -200; v < 500; v += 1 + (int)t_below(&rng, 3)) {
            snprintf(text, sizeof text, per > 1 ? "%.2f" : "%.0f", (double)v / per);
            if (accepts(g, text) != (v >= a && v <= b))
                fail_msg("%s and %s", schema, text);
        }
        for (int walk = 0; walk < 20; walk++) { /* nothing is begun that cannot be ended */
            grammar_run *r = begin(g);
            for (int n = 0; n < 40; n++) {
                const uint32_t *mask = grammar_run_mask(r);
                char may[16];
                int n_may = 0;
                for (const char *c = "-.0123456789"; *c; c++) {
                    ids id = {0};
                    assert_int_equal(tok_encode(tokens, c, 1, false, &id), ORCD_OK);
                    if (id.n == 1 && mask[id.data[0] / 32] >> id.data[0] % 32 & 1)
                        may[n_may++] = *c;
                    ids_free(&id);
                }
                if (!n_may)
                    break;
                assert_true(grammar_run_feed(r, &may[t_below(&rng, (uint64_t)n_may)], 1));
            }
            assert_true(grammar_run_complete(r));
            grammar_run_close(r);
        }
        grammar_close(g);
    }
}

static void schemas__that_cannot_be_obeyed_are_refused(void **state) {
    (void)state;
    static const struct {
        const char *schema, *says;
        orcd_status status;
    } t[] = {
        {"{\"type\":\"string\",\"pattern\":\"(a*)*\"}", "\"pattern\"", ORCD_ERR_UNSUPPORTED},
        {"{\"properties\":{\"a\":{\"multipleOf\":1}}}", "\"multipleOf\"", ORCD_ERR_UNSUPPORTED},
        {"{\"type\":\"integer\",\"minimum\":3.2,\"maximum\":3.9}", "no value", ORCD_ERR_UNSUPPORTED},
        {"{\"type\":\"integer\",\"exclusiveMinimum\":3,\"exclusiveMaximum\":4}", "no value", ORCD_ERR_UNSUPPORTED},
        {"{\"minimum\":1e300}", "no value", ORCD_ERR_UNSUPPORTED},
        {"{\"minimum\":\"1\"}", "minimum", ORCD_ERR_FORMAT},
        {"{\"anyOf\":[{\"type\":\"null\"}],\"type\":\"null\"}", "\"type\"", ORCD_ERR_UNSUPPORTED},
        {"{\"$ref\":\"#/$defs/a\",\"minLength\":1,\"$defs\":{\"a\":true}}", "\"minLength\"", ORCD_ERR_UNSUPPORTED},
        {"{\"oneOf\":[true]}", "\"oneOf\"", ORCD_ERR_UNSUPPORTED},
        {"{\"allOf\":[true,true]}", "\"allOf\"", ORCD_ERR_UNSUPPORTED},
        {"{\"$ref\":\"#/nowhere\"}", "leads nowhere", ORCD_ERR_UNSUPPORTED},
        {"{\"$ref\":\"http://example.com/\"}", "leads nowhere", ORCD_ERR_UNSUPPORTED},
        {"{\"$ref\":\"#\"}", "no value", ORCD_ERR_UNSUPPORTED},
        {"{\"anyOf\":[{\"$ref\":\"#\"}]}", "no value", ORCD_ERR_UNSUPPORTED},
        {"{\"anyOf\":[]}", "no value", ORCD_ERR_UNSUPPORTED},
        {"{\"enum\":[]}", "no value", ORCD_ERR_UNSUPPORTED},
        {"{\"const\":1,\"type\":\"string\"}", "no value", ORCD_ERR_UNSUPPORTED},
        {"false", "no value", ORCD_ERR_UNSUPPORTED},
        {"{\"type\":\"array\",\"items\":{\"$ref\":\"#\"},\"minItems\":1}", "no value", ORCD_ERR_UNSUPPORTED},
        {"{\"properties\":{\"a\":{\"$ref\":\"#\"}},\"required\":[\"a\"]}", "no value", ORCD_ERR_UNSUPPORTED},
        {"{\"required\":[\"a\"],\"properties\":{},\"additionalProperties\":false}", "no value", ORCD_ERR_UNSUPPORTED},
        {"{\"type\":\"string\",\"minLength\":3,\"maxLength\":2}", "no value", ORCD_ERR_UNSUPPORTED},
        {"{\"type\":\"string\",\"minLength\":1000000000}", "minLength", ORCD_ERR_LIMIT},
        {"{\"type\":\"array\",\"minItems\":-1}", "minItems", ORCD_ERR_FORMAT},
        {"{\"type\":\"text\"}", "type", ORCD_ERR_FORMAT},
        {"{\"type\":[\"null\",5]}", "type", ORCD_ERR_FORMAT},
        {"{\"properties\":[]}", "properties", ORCD_ERR_FORMAT},
        {"{\"required\":\"a\"}", "required", ORCD_ERR_FORMAT},
        {"{\"required\":[1]}", "required", ORCD_ERR_FORMAT},
        {"{\"enum\":5}", "enum", ORCD_ERR_FORMAT},
        {"{\"anyOf\":{}}", "anyOf", ORCD_ERR_FORMAT},
        {"{\"items\":5}", "part", ORCD_ERR_FORMAT},
        {"[]", "part", ORCD_ERR_FORMAT},
    };
    for (size_t i = 0; i < ORCD_COUNT(t); i++) {
        grammar *g = (grammar *)1;
        orcd_error err = {0};
        json_t *s = parse(t[i].schema);
        if (grammar_compile(s, &g, &err) != t[i].status || g || !strstr(err.message, t[i].says))
            fail_msg("%s: %s", t[i].schema, err.message);
        json_decref(s);
    }
}

/* ---- hostile schemas ---- */

/* {"type":"array","items":{... n times ... true}} */
static json_t *nested(int n) {
    json_t *s = json_true();
    for (int i = 0; i < n; i++)
        s = json_pack("{s:s, s:i, s:o}", "type", "array", "minItems", 1, "items", s);
    return s;
}

static json_t *choices(int n, const char *kind) {
    json_t *list = json_array();
    for (int i = 0; i < n; i++) {
        char name[32];
        snprintf(name, sizeof name, "name %d", i);
        json_array_append_new(list,
                              kind ? json_pack("{s:s, s:{s:{s:s}}}", "type", "object", "properties", name, "type", kind)
                                   : json_string(name));
    }
    return json_pack("{s:o}", kind ? "anyOf" : "enum", list);
}

static void check_size(json_t *schema, orcd_status want) {
    grammar *g = NULL;
    orcd_error err;
    clock_t t0 = clock();
    assert_int_equal(grammar_compile(schema, &g, &err), want);
    if (g) {
        grammar_run *r = begin(g);
        grammar_run_mask(r);
        grammar_run_feed(r, "{\"name 99", 9);
        grammar_run_mask(r);
        grammar_run_close(r);
    }
    assert_true(clock() - t0 < CLOCKS_PER_SEC);
    grammar_close(g);
    json_decref(schema);
}

static void schemas__of_any_size_end_soon(void **state) {
    (void)state;
    check_size(nested(60), ORCD_OK);
    check_size(nested(70), ORCD_ERR_UNSUPPORTED);
    check_size(nested(1500), ORCD_ERR_UNSUPPORTED);
    check_size(nested(20000), ORCD_ERR_LIMIT);
    check_size(choices(10000, NULL), ORCD_OK);
    check_size(choices(30000, NULL), ORCD_ERR_LIMIT);
    check_size(choices(1000, "string"), ORCD_OK);
    check_size(choices(9000, "string"), ORCD_ERR_LIMIT);
    json_t *loop = json_object(), *all = json_array(); /* 300 choices, each among all of them */
    for (int i = 0; i < 300; i++) {
        char name[32];
        snprintf(name, sizeof name, "#/$defs/%d", i);
        json_array_append_new(all, json_pack("{s:s}", "$ref", name));
    }
    json_array_append_new(all, json_pack("{s:s}", "type", "null"));
    for (int i = 0; i < 300; i++) {
        char name[32];
        snprintf(name, sizeof name, "%d", i);
        json_object_set_new(loop, name, json_pack("{s:O}", "anyOf", all));
    }
    check_size(json_pack("{s:s, s:o}", "$ref", "#/$defs/7", "$defs", loop), ORCD_ERR_LIMIT);
    json_decref(all);
}

/* ---- masks ---- */

static const char *const shapes[] = {
    "{\"type\":\"object\"}",
    "{\"type\":\"object\",\"properties\":{\"name\":{\"type\":\"string\",\"maxLength\":12},\"age\":{\"type\":"
    "\"integer\",\"minimum\":13,\"maximum\":212},"
    "\"tags\":{\"type\":\"array\",\"items\":{\"enum\":[\"red\",\"green\",\"rose\",\"ro\"]},\"maxItems\":4},"
    "\"more\":{\"anyOf\":[{\"$ref\":\"#\"},{\"type\":\"null\"}]}},\"required\":[\"name\",\"tags\",\"more\"],"
    "\"additionalProperties\":false}",
    "{\"anyOf\":[{\"minimum\":-0.7,\"maximum\":31.25},{\"type\":\"array\",\"items\":{\"$ref\":\"#\"},\"minItems\":1,"
    "\"maxItems\":3},"
    "{\"enum\":[\"one\",\"once\",1,12,null]},{\"type\":\"string\",\"minLength\":3,\"maxLength\":30}]}",
    "{\"properties\":{\"on\":{\"type\":\"boolean\"}},\"additionalProperties\":{\"type\":\"string\",\"maxLength\":20}}",
};

static bool is_allowed(const uint32_t *mask, int32_t id) { return mask[id / 32] >> id % 32 & 1; }

/* The mask of what was written so far is what feeding each token says. */
static void check_mask(grammar *g, const char *text, size_t len, const uint32_t *mask) {
    for (int32_t id = 0; id < tok_n_vocab(tokens); id++) {
        size_t n;
        const char *bytes = tok_bytes(tokens, id, &n);
        bool want = !tok_is_special(tokens, id) && n > 0;
        if (want) {
            grammar_run *r = begin(g);
            assert_true(grammar_run_feed(r, text, len));
            want = grammar_run_feed(r, bytes, n);
            grammar_run_close(r);
        }
        if (is_allowed(mask, id) != want)
            fail_msg("after %.*s token %d (%.*s) is%s allowed", (int)len, text, id, (int)n, bytes, want ? " not" : "");
    }
}

/* One of the allowed tokens, rather one with a bracket or quote so that there is an end; -1 when there is none. */
static int32_t pick(const uint32_t *mask, uint64_t *rng) {
    int32_t best = -1;
    double most = -1;
    for (int32_t id = 0; id < tok_n_vocab(tokens); id++) {
        size_t n;
        const char *bytes = is_allowed(mask, id) ? tok_bytes(tokens, id, &n) : NULL;
        double weight = bytes ? (double)t_below(rng, 1000) : -1;
        for (size_t i = 0; bytes && i < n; i++)
            weight += strchr("\"]}", bytes[i]) ? 300 : bytes[i] == '{' || bytes[i] == '[' ? -200 : 0;
        if (bytes && weight + 1000 > most) {
            most = weight + 1000;
            best = id;
        }
    }
    return best;
}

static void masks__lead_to_json_that_follows_the_schema(void **state) {
    (void)state;
    uint64_t rng = 9;
    for (size_t i = 0; i < ORCD_COUNT(shapes); i++) {
        grammar *g = compile(shapes[i]);
        for (int round = 0; round < 12; round++) {
            grammar_run *r = begin(g);
            buf text = {0};
            int n = 0;
            while (n++ < 4000 && !(grammar_run_complete(r) && t_below(&rng, 2))) {
                size_t len;
                const uint32_t *mask = grammar_run_mask(r);
                if (round == 0 && n < 40 && n % 3 == 0)
                    check_mask(g, text.data ? text.data : "", text.len, mask);
                int32_t id = pick(mask, &rng);
                if (id < 0)
                    break;
                const char *bytes = tok_bytes(tokens, id, &len);
                assert_true(grammar_run_feed(r, bytes, len));
                buf_add(&text, bytes, len);
            }
            if (!grammar_run_complete(r))
                fail_msg("%s leads to %s and no further", shapes[i], text.data);
            assert_true(accepts(g, text.data));
            json_decref(parse(text.data));
            buf_free(&text);
            grammar_run_close(r);
        }
        grammar_close(g);
    }
}

static void masks__end_when_the_text_does(void **state) {
    (void)state;
    grammar *g = compile("{\"type\":\"object\"}");
    grammar_run *r = begin(g);
    assert_true(grammar_run_feed(r, "{}", 2));
    const uint32_t *mask = grammar_run_mask(r);
    for (int32_t id = 0; id < tok_n_vocab(tokens); id++)
        assert_false(is_allowed(mask, id));
    assert_true(grammar_run_complete(r));
    assert_false(grammar_run_feed(r, " ", 1));
    assert_false(grammar_run_complete(r));
    assert_false(grammar_run_feed(r, "{", 1));
    grammar_run_close(r);
    grammar_close(g);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(texts__that_follow_their_schema_and_no_others),
        cmocka_unit_test(numbers__are_those_of_their_range),
        cmocka_unit_test(schemas__that_cannot_be_obeyed_are_refused),
        cmocka_unit_test(schemas__of_any_size_end_soon),
        cmocka_unit_test(masks__lead_to_json_that_follows_the_schema),
        cmocka_unit_test(masks__end_when_the_text_does),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
