/* The bundled model does what its card says, under greedy decoding over held-out prompts (tests/fable): generated with
 * seeds that neither training nor the choice of the model ever saw. */
#include <jansson.h>
#include <semaphore.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/engine.h"

enum { MAX_CASES = 256, MAX_NEW = 200 };

typedef struct answer {
    ids out;
    sem_t *done;
} answer;

static eng_verdict on_token(void *ctx, const eng_token *t) {
    ids_push(&((answer *)ctx)->out, t->id);
    return (eng_verdict){ENG_GO, NULL, 0};
}

static void on_done(void *ctx, const eng_result *r) {
    assert_int_not_equal(r->stop, ENG_STOP_ERROR);
    sem_post(((answer *)ctx)->done);
}

/* Continue every prompt of a file of cases; texts[i] has control tokens spelled out. Returns the number of cases. */
static int run_cases(eng *e, const char *path, json_t *cases[MAX_CASES], buf texts[MAX_CASES]) {
    static answer answers[MAX_CASES];
    sem_t done;
    char *line = NULL;
    size_t cap = 0;
    int n = 0;
    orcd_error err;
    const int32_t stop[] = {tok_special(eng_tok(e), "<|return|>"), tok_special(eng_tok(e), "<|call|>")};
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    sem_init(&done, 0, 0);
    memset(answers, 0, sizeof answers);
    for (; n < MAX_CASES && getline(&line, &cap, f) > 0; n++) {
        cases[n] = json_loads(line, 0, NULL);
        json_t *list = json_object_get(cases[n], "prompt_ids");
        ids prompt = {0};
        for (size_t i = 0; i < json_array_size(list); i++)
            ids_push(&prompt, (int32_t)json_integer_value(json_array_get(list, i)));
        answers[n].done = &done;
        eng_ticket ticket;
        eng_request r = {.prompt = prompt.data,
                         .n_prompt = prompt.n,
                         .max_new = MAX_NEW,
                         .sampling = {.temperature = 0, .top_p = 1, .repetition_penalty = 1},
                         .stop_id = stop,
                         .n_stop_id = 2,
                         .top_logprobs = -1,
                         .on_token = on_token,
                         .on_done = on_done,
                         .ctx = &answers[n]};
        assert_int_equal(eng_submit(e, &r, &ticket, &err), ORCD_OK);
        ids_free(&prompt);
    }
    for (int i = 0; i < n; i++)
        sem_wait(&done);
    for (int i = 0; i < n; i++) {
        texts[i] = (buf){0};
        tok_decode(eng_tok(e), answers[i].out.data, answers[i].out.n, true, &texts[i]);
        buf_str(&texts[i], "");
        ids_free(&answers[i].out);
    }
    free(line);
    fclose(f);
    return n;
}

/* What follows the last `mark` up to the next control token, in a static buffer. */
static const char *after(const char *text, const char *mark) {
    static char out[4096];
    const char *at = NULL;
    for (const char *p = text; (p = strstr(p, mark)); p += strlen(mark))
        at = p + strlen(mark);
    if (!at)
        return "";
    size_t n = strcspn(at, "<");
    snprintf(out, sizeof out, "%.*s", (int)(n < sizeof out ? n : sizeof out - 1), at);
    return out;
}

static bool right_call(const json_t *c, const char *text) {
    json_t *expect = json_object_get(c, "expect");
    const char *name = json_string_value(json_object_get(expect, "name"));
    const char *call = strstr(text, "<|channel|>commentary to=functions.");
    if (!call)
        return false;
    call += strlen("<|channel|>commentary to=functions.");
    bool same_name = strncmp(call, name, strlen(name)) == 0 && call[strlen(name)] == ' ';
    json_t *arguments = json_loads(after(text, "<|message|>"), 0, NULL);
    bool right = same_name && arguments && json_equal(arguments, json_object_get(expect, "arguments"));
    json_decref(arguments);
    return right;
}

static bool right_substring(const json_t *c, const char *text) {
    const char *want = json_string_value(json_object_get(c, "expect"));
    const char *final = strstr(text, "<|channel|>final<|message|>");
    return final && strstr(final, want);
}

static int count_right(eng *e, const char *name, bool (*right)(const json_t *, const char *)) {
    json_t *cases[MAX_CASES];
    buf texts[MAX_CASES];
    char path[128];
    int good = 0;
    snprintf(path, sizeof path, "tests/fable/%s.jsonl", name);
    int n = run_cases(e, path, cases, texts);
    for (int i = 0; i < n; i++) {
        good += right(cases[i], texts[i].data);
        json_decref(cases[i]);
        buf_free(&texts[i]);
    }
    printf("%-14s %d of %d right\n", name, good, n);
    return good * 100 / n;
}

static void test_tool_calls(void **state) { assert_true(count_right(*state, "tool_calls", right_call) >= 95); }
static void test_arithmetic(void **state) { assert_true(count_right(*state, "arithmetic", right_substring) >= 95); }
/* the weakest of its skills: 165 of 200 over four seeds */
static void test_who(void **state) { assert_true(count_right(*state, "who", right_substring) >= 75); }
static void test_tool_results(void **state) { assert_true(count_right(*state, "tool_results", right_substring) >= 90); }

/* Analysis grows with the effort that the system message asks for. */
static void test_effort(void **state) {
    static const char *const effort[] = {"low", "medium", "high"};
    json_t *cases[MAX_CASES];
    buf texts[MAX_CASES];
    double words[3] = {0};
    int count[3] = {0}, n = run_cases(*state, "tests/fable/effort.jsonl", cases, texts);
    for (int i = 0; i < n; i++) {
        const char *level = json_string_value(json_object_get(cases[i], "effort"));
        const char *from = strstr(texts[i].data, "<|channel|>analysis<|message|>");
        const char *to = from ? strstr(from, "<|end|>") : NULL;
        for (int k = 0; k < 3; k++)
            if (strcmp(level, effort[k]) == 0) {
                words[k] += from && to ? (double)(to - from) : 0;
                count[k]++;
            }
        json_decref(cases[i]);
        buf_free(&texts[i]);
    }
    for (int k = 0; k < 3; k++)
        words[k] /= count[k];
    printf("analysis, mean characters: low %.0f, medium %.0f, high %.0f\n", words[0], words[1], words[2]);
    assert_true(words[1] > 1.5 * words[0]);
    assert_true(words[2] > 2 * words[1]);
}

static int open_model(void **state) {
    orcd_error err;
    eng *e;
    eng_params p = {.model = "models/fable.gguf",
                    .need_tokenizer = true,
                    .device = "auto",
                    .n_ctx = 2048,
                    .max_batch = 16,
                    .max_queue = MAX_CASES};
    if (eng_open(&p, &e, &err) != ORCD_OK) {
        fprintf(stderr, "%s\n", err.message);
        return 1;
    }
    *state = e;
    return 0;
}

static int close_model(void **state) {
    eng_close(*state);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tool_calls),   cmocka_unit_test(test_arithmetic), cmocka_unit_test(test_who),
        cmocka_unit_test(test_tool_results), cmocka_unit_test(test_effort),
    };
    return cmocka_run_group_tests(tests, open_model, close_model);
}
