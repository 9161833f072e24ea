/* Conversations to prompts, against tests/data/harmony/golden.jsonl (made by OpenAI's library) and by hand where ours
 * differs on purpose. With the tiny tokenizer the decoded text is compared, with gpt-oss's the ids as well. */
#include <sodium.h>
#include <time.h>

#include "text/chat/parts.h"
#include "tokens.h"

static chat_str str_of(const json_t *v) { return (chat_str){json_string_value(v), json_string_length(v)}; }

static chat_str str_at(const json_t *o, const char *key) { return str_of(json_object_get(o, key)); }

#define MAX_PARTS 16

/* A chat whose strings live in the JSON that it came from. */
typedef struct from_json {
    chat c;
    chat_message message[MAX_PARTS];
    chat_call call[MAX_PARTS][MAX_PARTS];
    chat_tool tool[MAX_PARTS];
} from_json;

static void read_chat(const json_t *v, from_json *out) {
    static const char *const role[] = {"instructions", "user", "assistant", "tool"};
    size_t i, k;
    json_t *m, *call;
    *out = (from_json){0};
    json_array_foreach(json_object_get(v, "messages"), i, m) {
        chat_message *to = &out->message[i];
        assert_true(i < MAX_PARTS);
        *to = (chat_message){.text = str_at(m, "text"),
                             .reasoning = str_at(m, "reasoning"),
                             .call_id = str_at(m, "call_id"),
                             .call = out->call[i]};
        while (!chat_str_is(str_at(m, "role"), role[to->role]))
            to->role++;
        json_array_foreach(json_object_get(m, "calls"), k, call) {
            assert_true(k < MAX_PARTS);
            out->call[i][k] = (chat_call){
                .id = str_at(call, "id"), .name = str_at(call, "name"), .arguments = str_at(call, "arguments")};
        }
        to->n_call = json_array_size(json_object_get(m, "calls"));
    }
    out->c = (chat){.message = out->message,
                    .n_message = json_array_size(json_object_get(v, "messages")),
                    .tool = out->tool,
                    .n_tool = json_array_size(json_object_get(v, "tools")),
                    .date = str_at(v, "date"),
                    .browser = json_is_true(json_object_get(v, "browser")),
                    .python = json_is_true(json_object_get(v, "python"))};
    json_array_foreach(json_object_get(v, "tools"), i, m) {
        assert_true(i < MAX_PARTS);
        out->tool[i] = (chat_tool){.name = str_at(m, "name"),
                                   .description = str_at(m, "description"),
                                   .parameters = json_object_get(m, "parameters")};
    }
    if (json_object_get(v, "effort"))
        assert_true(chat_effort_of(json_string_value(json_object_get(v, "effort")), &out->c.effort));
}

typedef struct fixture {
    tok *tiny, *real;
    harmony *h, *h_real;
} fixture;

static int open_all(void **state) {
    static fixture f;
    orcd_error err;
    f.tiny = t_tiny();
    f.real = t_gpt_oss();
    assert_int_equal(harmony_open(f.tiny, &f.h, &err), ORCD_OK);
    if (f.real)
        assert_int_equal(harmony_open(f.real, &f.h_real, &err), ORCD_OK);
    *state = &f;
    return 0;
}

static int close_all(void **state) {
    fixture *f = *state;
    harmony_close(f->h);
    harmony_close(f->h_real);
    tok_close(f->tiny);
    tok_close(f->real);
    return 0;
}

/* The rendering as text; free it. Checks that only the renderer's control tokens are in it and that boundaries end
 * messages. */
static char *render(const fixture *f, const chat *c, unsigned ref) {
    harmony_prompt p = {0};
    orcd_error err = {0};
    buf text = {0};
    if (harmony_render(f->h, c, ref, &p, &err) != ORCD_OK)
        fail_msg("%s", err.message);
    tok_decode(f->tiny, p.id.data, p.id.n, true, &text);
    size_t n_end = 0, n_start = 0;
    for (size_t i = 0; i < p.id.n; i++) {
        n_start += p.id.data[i] == f->h->start;
        if (p.id.data[i] != f->h->end && p.id.data[i] != f->h->call)
            continue;
        assert_true(n_end < p.n_boundary);
        assert_int_equal(p.boundary[n_end++], i + 1);
    }
    assert_int_equal(n_end, p.n_boundary);
    assert_int_equal(n_start, n_end + 1);
    harmony_prompt_free(&p);
    return text.data;
}

static void renders(const fixture *f, const char *json, unsigned ref, const char *want) {
    json_t *v = json_loads(json, 0, NULL);
    from_json j;
    assert_non_null(v);
    read_chat(v, &j);
    char *got = render(f, &j.c, ref);
    const char *body = strstr(got, "message.<|end|>");
    if (!body)
        body = strstr(got, "'functions'.<|end|>");
    assert_non_null(body);
    assert_string_equal(strstr(body, "<|end|>") + 7, want);
    free(got);
    json_decref(v);
}

static orcd_status refusal(const fixture *f, const char *json, orcd_error *err) {
    json_t *v = json_loads(json, 0, NULL);
    from_json j;
    harmony_prompt p = {0};
    assert_non_null(v);
    read_chat(v, &j);
    orcd_status status = harmony_render(f->h, &j.c, 0, &p, err);
    harmony_prompt_free(&p);
    json_decref(v);
    return status;
}

static void equals_the_reference(void **state) {
    const fixture *f = *state;
    FILE *lines = fopen("tests/data/harmony/golden.jsonl", "r");
    char *line = NULL;
    size_t cap = 0, n = 0;
    assert_non_null(lines);
    for (; getline(&line, &cap, lines) > 0; n++) {
        json_t *v = json_loads(line, 0, NULL), *want = json_object_get(v, "ids");
        from_json j;
        assert_non_null(v);
        read_chat(v, &j);
        char *got = render(f, &j.c, HARMONY_REF);
        const char *text = json_string_value(json_object_get(v, "text"));
        size_t same = 0;
        while (got[same] && got[same] == text[same])
            same++;
        if (got[same] || text[same])
            fail_msg("conversation %zu: \"%.60s\" instead of \"%.60s\"", n + 1, got + same - (same < 20 ? same : 20),
                     text + same - (same < 20 ? same : 20));
        free(got);
        if (f->h_real) {
            harmony_prompt p = {0};
            assert_int_equal(harmony_render(f->h_real, &j.c, HARMONY_REF, &p, NULL), ORCD_OK);
            for (size_t i = 0; i < p.id.n && i < json_array_size(want); i++)
                if (p.id.data[i] != json_integer_value(json_array_get(want, i)))
                    fail_msg("conversation %zu: id %zu is %d", n + 1, i, p.id.data[i]);
            assert_int_equal(p.id.n, json_array_size(want));
            harmony_prompt_free(&p);
        }
        json_decref(v);
    }
    assert_int_equal(n, 76);
    free(line);
    fclose(lines);
}

static void built_in_texts_are_the_published_ones(void **state) {
    static const struct {
        bool browser, python;
        size_t len;
        const char *hash;
    } want[] = {{true, false, 1559, "b8733e7a73d3d9b1"},
                {false, true, 624, "327504a3443ff9a6"},
                {true, true, 2176, "2dd2e964247a5297"}};
    for (size_t i = 0; i < ORCD_COUNT(want); i++) {
        char *text = render(*state, &(chat){.browser = want[i].browser, .python = want[i].python}, 0), hex[17];
        char *from = strstr(text, "# Tools"), *to = strstr(text, "\n\n# Valid channels");
        unsigned char sum[32];
        assert_true(from && to);
        assert_int_equal(to - from, want[i].len);
        crypto_hash_sha256(sum, (const unsigned char *)from, (unsigned long long)(to - from));
        sodium_bin2hex(hex, sizeof hex, sum, 8);
        assert_string_equal(hex, want[i].hash);
        free(text);
    }
}

#define USER "{'role':'user','text':'Lyon?'}"
#define CALL(text, reasoning)                                                                                          \
    "{'role':'assistant','text':'" text "','reasoning':'" reasoning "','calls':[{'id':'c1','name':'forecast',"         \
    "'arguments':'{\\'city\\':\\'Lyon\\'}'}]}"
#define RESULT "{'role':'tool','call_id':'c1','text':'{\\'t\\':[4,6,5]}'}"

/* JSON written with ' for ". */
static void renders_q(const fixture *f, const char *quoted, unsigned ref, const char *want) {
    char *json = strdup(quoted);
    assert_non_null(json);
    for (char *p = json; *p; p++)
        if (*p == '\'')
            *p = '"';
    renders(f, json, ref, want);
    free(json);
}

#define C_USER "<|start|>user<|message|>Lyon?<|end|>"
#define C_THINK "<|start|>assistant<|channel|>analysis<|message|>Call forecast.<|end|>"
#define C_CALL                                                                                                         \
    "<|start|>assistant<|channel|>commentary to=functions.forecast "                                                   \
    "<|constrain|>json<|message|>{\"city\":\"Lyon\"}<|call|>"
#define C_REF_CALL                                                                                                     \
    "<|start|>assistant to=functions.forecast<|channel|>commentary "                                                   \
    "<|constrain|>json<|message|>{\"city\":\"Lyon\"}<|call|>"
#define C_RESULT "<|start|>functions.forecast to=assistant<|channel|>commentary<|message|>{\"t\":[4,6,5]}<|end|>"
#define C_GO "<|start|>assistant"

static void call_order_is_the_model_s_or_the_reference_s(void **state) {
    const char *json = "{'messages':[" USER "," CALL("", "Call forecast.") "," RESULT "]}";
    renders_q(*state, json, 0, C_USER C_THINK C_CALL C_RESULT C_GO);
    renders_q(*state, json, HARMONY_REF_ORDER, C_USER C_THINK C_REF_CALL C_RESULT C_GO);
}

static void a_preamble_stands_between_reasoning_and_call(void **state) {
    renders_q(*state, "{'messages':[" USER "," CALL("I look.", "Call forecast.") "]}", 0,
              C_USER C_THINK "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>" C_CALL C_GO);
}

static void each_parallel_call_stands_before_its_own_result(void **state) {
    renders_q(*state,
              "{'messages':[{'role':'assistant','calls':[{'id':'a','name':'f','arguments':'1'},{'id':'b','name':'g',"
              "'arguments':'2'}]},{'role':'tool','call_id':'b','text':'B'},{'role':'tool','call_id':'a','text':'A'}]}",
              0,
              "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>1<|call|>"
              "<|start|>functions.f to=assistant<|channel|>commentary<|message|>A<|end|>"
              "<|start|>assistant<|channel|>commentary to=functions.g <|constrain|>json<|message|>2<|call|>"
              "<|start|>functions.g to=assistant<|channel|>commentary<|message|>B<|end|>" C_GO);
}

static void a_late_result_is_named_after_its_call(void **state) {
    renders_q(*state, "{'messages':[" CALL("", "") "," USER "," RESULT "]}", 0, C_CALL C_USER C_RESULT C_GO);
}

/* Ids such as call_0 come again in every turn of some clients. */
static void a_repeated_call_id_means_the_nearest_call(void **state) {
    renders_q(*state,
              "{'messages':[" CALL("", "") "," RESULT ",{'role':'assistant','calls':[{'id':'c1','name':'g','arguments':"
                                           "'2'}]},{'role':'tool','call_id':'c1','text':'B'}]}",
              0,
              C_CALL C_RESULT
              "<|start|>assistant<|channel|>commentary to=functions.g <|constrain|>json<|message|>2<|call|>"
              "<|start|>functions.g to=assistant<|channel|>commentary<|message|>B<|end|>" C_GO);
}

#define ANSWER(text, reasoning) "{'role':'assistant','text':'" text "','reasoning':'" reasoning "'}"
#define C_ANALYSIS(text) "<|start|>assistant<|channel|>analysis<|message|>" text "<|end|>"
#define C_FINAL(text) "<|start|>assistant<|channel|>final<|message|>" text "<|end|>"

static void old_reasoning_is_dropped(void **state) {
    const char *three =
        "{'messages':[" ANSWER("A", "a") "," USER "," ANSWER("B", "b") "," USER "," ANSWER("C", "c") "]}";
    renders_q(*state, three, 0, C_FINAL("A") C_USER C_FINAL("B") C_USER C_FINAL("C") C_GO);
    renders_q(*state, three, HARMONY_REF_HISTORY,
              C_FINAL("A") C_USER C_ANALYSIS("b") C_FINAL("B") C_USER C_ANALYSIS("c") C_FINAL("C") C_GO);
}

static void reasoning_of_the_running_tool_turn_is_kept(void **state) {
    renders_q(*state, "{'messages':[" ANSWER("A", "a") "," USER "," CALL("", "Call forecast.") "," RESULT "]}", 0,
              C_FINAL("A") C_USER C_THINK C_CALL C_RESULT C_GO);
    renders_q(*state, "{'messages':[" CALL("", "Call forecast.") "," RESULT "," ANSWER("A", "a") "," USER "]}", 0,
              C_CALL C_RESULT C_FINAL("A") C_USER C_GO);
}

static void a_built_in_call_goes_to_the_analysis_channel(void **state) {
    fixture *f = *state;
    chat_call call = {.id = chat_str_of("x"), .name = chat_str_of("python"), .arguments = chat_str_of("1+1")};
    chat_message m[] = {{.role = CHAT_ASSISTANT, .call = &call, .n_call = 1},
                        {.role = CHAT_TOOL, .call_id = chat_str_of("x"), .text = chat_str_of("2")}};
    char *text = render(f, &(chat){.message = m, .n_message = 2, .python = true}, 0);
    assert_non_null(strstr(text, "<|start|>assistant<|channel|>analysis to=python code<|message|>1+1<|call|>"
                                 "<|start|>python to=assistant<|channel|>analysis<|message|>2<|end|>"));
    free(text);
    text = render(f, &(chat){.message = m, .n_message = 2}, 0);
    assert_non_null(strstr(text, "commentary to=functions.python <|constrain|>json"));
    free(text);
}

/* ---- replay ---- */

static void add_ids(const fixture *f, ids *to, const char *text) {
    assert_int_equal(tok_encode(f->tiny, text, strlen(text), true, to), ORCD_OK);
}

static void sampled_ids_are_replayed(void **state) {
    fixture *f = *state;
    ids sampled = {0};
    add_ids(f, &sampled,
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
            "code<|message|>{ }<|call|>");
    chat_call call = {.id = chat_str_of("x"),
                      .name = chat_str_of("f"),
                      .arguments = chat_str_of("{}"),
                      .replay = sampled.data,
                      .n_replay = sampled.n};
    chat_message m[] = {{.role = CHAT_ASSISTANT, .reasoning = chat_str_of("changed"), .call = &call, .n_call = 1},
                        {.role = CHAT_TOOL, .call_id = chat_str_of("x"), .text = chat_str_of("2")},
                        {.role = CHAT_ASSISTANT, .text = chat_str_of("done")}};
    char *text = render(f, &(chat){.message = m, .n_message = 2}, 0);
    assert_non_null(strstr(text,
                           "<|end|><|start|>assistant<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
                           "<|channel|>commentary to=functions.f code<|message|>{ }<|call|><|start|>functions.f to="));
    free(text);
    text = render(f, &(chat){.message = m, .n_message = 3}, 0);
    assert_null(strstr(text, "Hm."));
    assert_non_null(
        strstr(text, "<|end|><|start|>assistant<|channel|>commentary to=functions.f code<|message|>{ }<|call|>"));
    free(text);
    ids_free(&sampled);
}

/* ---- developer message ---- */

static void no_instructions_no_developer_message(void **state) {
    renders_q(*state, "{'messages':[{'role':'instructions','text':''}," USER "]}", 0, C_USER C_GO);
}

static void response_formats_come_last(void **state) {
    json_t *schema = json_loads("{\"type\":\"array\",\"items\":{\"type\":\"number\"}}", 0, NULL);
    chat_format format = {chat_str_of("pair"), chat_str_of("Two numbers"), schema};
    chat_message m[] = {{.role = CHAT_INSTRUCTIONS, .text = chat_str_of("Be brief.")},
                        {.role = CHAT_USER, .text = chat_str_of("Go")}};
    char *text = render(*state, &(chat){.message = m + 1, .n_message = 1, .format = &format}, 0);
    assert_non_null(strstr(text,
                           "<|start|>developer<|message|># Response Formats\n\n## pair\n\n// Two numbers\n{\"type\":"
                           "\"array\",\"items\":{\"type\":\"number\"}}<|end|><|start|>user<|message|>Go<|end|>"));
    free(text);
    format.description.len = 0;
    text = render(*state, &(chat){.message = m, .n_message = 2, .format = &format}, 0);
    assert_non_null(strstr(text, "# Instructions\n\nBe brief.\n\n# Response Formats\n\n## pair\n\n{\"type\""));
    free(text);
    json_decref(schema);
}

static void check_schema(const char *json, bool plain, const char *want) {
    json_t *v = json_loads(json, JSON_DECODE_ANY, NULL);
    buf out = {0};
    assert_non_null(v);
    assert_int_equal(harmony_schema(v, plain, &out, NULL), ORCD_OK);
    assert_string_equal(out.data, want);
    buf_free(&out);
    json_decref(v);
}

static void our_schemas_follow_references(void **state) {
    (void)state;
    const char *json =
        "{\"type\":\"object\",\"properties\":{\"a\":{\"$ref\":\"#/$defs/A\"},\"b\":{\"anyOf\":[{\"type\":"
        "\"string\"},{\"type\":\"null\"}],\"default\":null},\"c\":{\"type\":\"array\",\"items\":{\"$ref\":"
        "\"#/$defs/A\"}},\"d\":{\"$ref\":\"#/nowhere\"}},\"$defs\":{\"A\":{\"type\":\"integer\","
        "\"description\":\"An A\"}}}";
    check_schema(json, false,
                 "{\n// An A\na?: number,\nb?: string | null, // default: null\nc?: number[],\nd?: any,\n}");
    check_schema(json, true, "{\na?: any,\nb?: any, // default: null\nc?: any[],\nd?: any,\n}");
    check_schema("{\"$ref\":\"#\"}", false, "any");
}

static void empty_objects_take_no_argument(void **state) {
    fixture *f = *state;
    json_t *empty = json_loads("{\"type\":\"object\",\"properties\":{}}", 0, NULL);
    chat_tool tool = {.name = chat_str_of("ping"), .parameters = empty};
    char *text = render(f, &(chat){.tool = &tool, .n_tool = 1}, 0);
    assert_non_null(strstr(text, "namespace functions {\n\ntype ping = () => any;\n\n} // namespace functions"));
    free(text);
    json_decref(empty);
}

static void endless_schemas_are_refused(void **state) {
    (void)state;
    orcd_error err = {0};
    buf out = {0};
    json_t *cycle =
        json_loads("{\"type\":\"object\",\"properties\":{\"a\":{\"$ref\":\"#\"},\"b\":{\"$ref\":\"#\"}}}", 0, NULL);
    assert_int_equal(harmony_schema(cycle, false, &out, &err), ORCD_ERR_LIMIT);
    assert_true(out.len < 10000000);
    json_decref(cycle);
    buf_clear(&out);
    json_t *deep = json_object();
    for (int i = 0; i < 1000; i++)
        deep = json_pack("{s:s,s:o}", "type", "array", "items", deep);
    assert_int_equal(harmony_schema(deep, true, &out, &err), ORCD_ERR_LIMIT);
    json_decref(deep);
    buf_free(&out);
}

/* ---- refusals and injection ---- */

static void bad_names_and_unknown_calls_are_refused(void **state) {
    static const char *const bad[] = {
        "{\"messages\":[],\"tools\":[{\"name\":\"a b\"}]}",
        "{\"messages\":[],\"tools\":[{\"name\":\"\"}]}",
        "{\"messages\":[],\"tools\":[{\"name\":\"x<|message|>\"}]}",
        "{\"messages\":[],\"tools\":[{\"name\":\"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\"}]"
        "}",
        "{\"messages\":[],\"tools\":[{\"name\":\"f\",\"parameters\":[1]}]}",
        "{\"messages\":[{\"role\":\"assistant\",\"calls\":[{\"id\":\"1\",\"name\":\"f\\n\",\"arguments\":\"\"}]}]}",
        "{\"messages\":[{\"role\":\"tool\",\"call_id\":\"nope\",\"text\":\"\"}]}",
    };
    for (size_t i = 0; i < ORCD_COUNT(bad); i++) {
        orcd_error err = {0};
        assert_int_equal(refusal(*state, bad[i], &err), ORCD_ERR_FORMAT);
        assert_true(strlen(err.message) > 20);
    }
}

/* render() itself counts control tokens: here every field of a client spells each of them. */
static void spelled_control_tokens_stay_text(void **state) {
    fixture *f = *state;
    for (int32_t id = 0; id < tok_n_vocab(f->tiny); id++) {
        size_t n;
        const char *bytes = tok_bytes(f->tiny, id, &n);
        if (!tok_is_special(f->tiny, id))
            continue;
        chat_str s = {bytes, n};
        json_t *schema = json_pack("{s:s,s:s#,s:{s#:{s:s,s:[s#],s:s#}}}", "type", "object", "description", bytes, n,
                                   "properties", bytes, n, "type", "string", "enum", bytes, n, "default", bytes, n);
        assert_non_null(schema);
        chat_tool tool = {.name = chat_str_of("f"), .description = s, .parameters = schema};
        chat_format format = {s, s, schema};
        chat_call call = {.id = s, .name = chat_str_of("f"), .arguments = s};
        chat_message m[] = {{.role = CHAT_INSTRUCTIONS, .text = s},
                            {.role = CHAT_USER, .text = s},
                            {.role = CHAT_ASSISTANT, .text = s, .reasoning = s, .call = &call, .n_call = 1},
                            {.role = CHAT_TOOL, .text = s, .call_id = s}};
        char *text = render(
            f, &(chat){.message = m, .n_message = 4, .tool = &tool, .n_tool = 1, .format = &format, .date = s}, 0);
        free(text);
        json_decref(schema);
    }
}

static void many_calls_take_linear_time(void **state) {
    fixture *f = *state;
    size_t n = 20000;
    chat_call *call = calloc(n, sizeof *call);
    chat_message *m = calloc(n + 1, sizeof *m);
    char(*id)[16] = calloc(n, sizeof *id);
    harmony_prompt p = {0};
    m[0] = (chat_message){.role = CHAT_ASSISTANT, .call = call, .n_call = n};
    for (size_t i = 0; i < n; i++) {
        snprintf(id[i], sizeof id[i], "call_%zu", i);
        call[i] = (chat_call){.id = chat_str_of(id[i]), .name = chat_str_of("f")};
        m[n - i] = (chat_message){.role = CHAT_TOOL, .call_id = chat_str_of(id[i])};
    }
    clock_t from = clock();
    assert_int_equal(harmony_render(f->h, &(chat){.message = m, .n_message = n + 1}, 0, &p, NULL), ORCD_OK);
    assert_true((double)(clock() - from) / CLOCKS_PER_SEC < 5);
    assert_int_equal(p.n_boundary, 2 * n + 1);
    harmony_prompt_free(&p);
    free(call);
    free(m);
    free(id);
}

static void a_tokenizer_without_control_tokens_is_refused(void **state) {
    (void)state;
    tok *t = t_gpt2();
    harmony *h = NULL;
    orcd_error err = {0};
    assert_int_equal(harmony_open(t, &h, &err), ORCD_ERR_UNSUPPORTED);
    assert_null(h);
    assert_non_null(strstr(err.message, "<|start|>"));
    tok_close(t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(equals_the_reference),
        cmocka_unit_test(built_in_texts_are_the_published_ones),
        cmocka_unit_test(call_order_is_the_model_s_or_the_reference_s),
        cmocka_unit_test(a_preamble_stands_between_reasoning_and_call),
        cmocka_unit_test(each_parallel_call_stands_before_its_own_result),
        cmocka_unit_test(a_late_result_is_named_after_its_call),
        cmocka_unit_test(a_repeated_call_id_means_the_nearest_call),
        cmocka_unit_test(old_reasoning_is_dropped),
        cmocka_unit_test(reasoning_of_the_running_tool_turn_is_kept),
        cmocka_unit_test(a_built_in_call_goes_to_the_analysis_channel),
        cmocka_unit_test(sampled_ids_are_replayed),
        cmocka_unit_test(no_instructions_no_developer_message),
        cmocka_unit_test(response_formats_come_last),
        cmocka_unit_test(our_schemas_follow_references),
        cmocka_unit_test(empty_objects_take_no_argument),
        cmocka_unit_test(endless_schemas_are_refused),
        cmocka_unit_test(bad_names_and_unknown_calls_are_refused),
        cmocka_unit_test(spelled_control_tokens_stay_text),
        cmocka_unit_test(many_calls_take_linear_time),
        cmocka_unit_test(a_tokenizer_without_control_tokens_is_refused),
    };
    return cmocka_run_group_tests(tests, open_all, close_all);
}
