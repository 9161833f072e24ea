/* Sampled ids to events. A transcript has R(reasoning) C(content) T(tool) A(arguments) . for the end of a message, F
 * for a forced continuation, and ends with !end, !call or !cut; neighbouring deltas are joined. */
#include <time.h>

#include "text/chat/harmony.h"
#include "tokens.h"

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

/* ---- transcripts ---- */

typedef struct transcript {
    buf text;
    char open; /* kind of the delta that may go on */
    ids forced;
    int n_stop;
} transcript;

static void note(void *ctx, const harmony_event *e) {
    static const char kind[] = {
        [HARMONY_REASONING] = 'R',   [HARMONY_CONTENT] = 'C', [HARMONY_CALL] = 'T', [HARMONY_ARGUMENTS] = 'A',
        [HARMONY_MESSAGE_END] = '.', [HARMONY_FORCE] = 'F',   [HARMONY_STOP] = '!'};
    static const char *const stop[] = {"end", "call", "cut", "memory"};
    transcript *t = ctx;
    char k = kind[e->kind];
    assert_int_equal(t->n_stop, 0);
    assert_int_equal(e->text[e->len], 0);
    if (t->open && (t->open != k || k == 'T'))
        buf_char(&t->text, ')');
    if (e->len) {
        tok_stream s = {0}; /* deltas are whole characters */
        buf again = {0};
        tok_stream_push(&s, e->text, e->len, &again);
        assert_int_equal(s.n_held, 0);
        assert_int_equal(again.len, e->len);
        assert_memory_equal(again.data, e->text, e->len);
        buf_free(&again);
        if (t->open != k || k == 'T')
            buf_printf(&t->text, "%c(", k);
        buf_add(&t->text, e->text, e->len);
        t->open = k;
        return;
    }
    assert_true(k == '.' || k == 'F' || k == '!');
    buf_char(&t->text, k);
    t->open = 0;
    if (k == 'F')
        ids_add(&t->forced, e->id, e->n_id);
    if (k == '!') {
        buf_str(&t->text, stop[e->stop]);
        t->n_stop++;
    }
}

typedef struct tools {
    const char *name[4];
    bool browser, python, force;
} tools;

static const tools none = {0}, one = {.name = {"get_it"}}, two = {.name = {"get_it", "put.it"}};

static harmony_parser *open_parser(const harmony *h, const tools *t, transcript *to) {
    chat_tool list[4] = {0};
    harmony_parse_options o = {.tool = list, .browser = t->browser, .python = t->python, .force_final = t->force};
    harmony_parser *p = NULL;
    while (o.n_tool < 4 && t->name[o.n_tool]) {
        list[o.n_tool].name = chat_str_of(t->name[o.n_tool]);
        o.n_tool++;
    }
    assert_int_equal(harmony_parser_open(h, &o, note, to, &p), ORCD_OK);
    return p;
}

/* Ids of text: as the tokenizer gives them, or with every byte of text its own token. */
static ids encode(const tok *t, const char *text, bool bytes) {
    ids all = {0}, out = {0};
    assert_int_equal(tok_encode(t, text, strlen(text), true, &all), ORCD_OK);
    for (size_t i = 0; i < all.n; i++) {
        size_t n;
        const char *s = tok_bytes(t, all.data[i], &n);
        if (!bytes || tok_is_special(t, all.data[i])) {
            ids_push(&out, all.data[i]);
            continue;
        }
        for (size_t k = 0; k < n; k++)
            assert_int_equal(tok_encode(t, s + k, 1, false, &out), ORCD_OK);
    }
    ids_free(&all);
    return out;
}

static void feed_all(harmony_parser *p, const ids *v, transcript *t) {
    bool on = true;
    for (size_t i = 0; i < v->n; i++) {
        size_t had = t->forced.n;
        if (!on)
            assert_int_equal(t->n_stop, 1);
        on = harmony_feed(p, v->data[i]);
        for (size_t k = had; k < t->forced.n; k++)
            assert_true(harmony_feed(p, t->forced.data[k]));
    }
    harmony_finish(p);
    assert_int_equal(t->n_stop, 1);
}

static void check_with(const harmony *h, const tok *tk, bool bytes, const tools *t, const char *sampled,
                       const char *want) {
    transcript got = {0};
    harmony_parser *p = open_parser(h, t, &got);
    ids v = encode(tk, sampled, bytes);
    feed_all(p, &v, &got);
    if (strcmp(got.text.data, want) != 0)
        fail_msg("%s\n  gives      %s\n  instead of %s", sampled, got.text.data, want);
    harmony_parser_close(p);
    buf_free(&got.text);
    ids_free(&got.forced);
    ids_free(&v);
}

static void check(void **state, const tools *t, const char *sampled, const char *want) {
    const fixture *f = *state;
    check_with(f->h, f->tiny, false, t, sampled, want);
    if (f->h_real)
        check_with(f->h_real, f->real, false, t, sampled, want);
}

/* Also with every byte a token: for texts where the number of ids has no meaning. */
static void check_cut(void **state, const tools *t, const char *sampled, const char *want) {
    const fixture *f = *state;
    check(state, t, sampled, want);
    check_with(f->h, f->tiny, true, t, sampled, want);
    if (f->h_real)
        check_with(f->h_real, f->real, true, t, sampled, want);
}

#define ANALYSIS "<|channel|>analysis<|message|>"
#define FINAL "<|channel|>final<|message|>"
#define NEXT "<|end|><|start|>assistant"
#define CALL(name) "<|channel|>commentary to=functions." name " <|constrain|>json<|message|>"

/* ---- well-formed ---- */

static void plain_answers(void **state) {
    check_cut(state, &none, FINAL "Hello.<|return|>", "C(Hello.).!end");
    check_cut(state, &none, ANALYSIS "Hm." NEXT FINAL "Hello.<|return|>", "R(Hm.).C(Hello.).!end");
    check_cut(state, &none, FINAL "<|return|>", ".!end");
    check_cut(state, &none, FINAL "{\"a\": 1}<|endoftext|>", "C({\"a\": 1}).!end");
    check_cut(state, &none, "<|channel|>final <|constrain|>json<|message|>{}<|return|>", "C({}).!end");
}

static void calls_in_both_orders(void **state) {
    check_cut(state, &one, CALL("get_it") "{\"a\":1}<|call|>", "T(get_it)A({\"a\":1}).!call");
    check_cut(state, &one, " to=functions.get_it<|channel|>commentary <|constrain|>json<|message|>{}<|call|>",
              "T(get_it)A({}).!call");
    check_cut(state, &one, ANALYSIS "Hm." NEXT CALL("get_it") "{}<|call|>", "R(Hm.).T(get_it)A({}).!call");
    check_cut(state, &two, "<|channel|>commentary to=functions.put.it code<|message|>{}<|call|>",
              "T(put.it)A({}).!call");
}

static void preambles_are_content(void **state) {
    check_cut(state, &one, "<|channel|>commentary<|message|>I look." NEXT CALL("get_it") "{}<|call|>",
              "C(I look.).T(get_it)A({}).!call");
    check_cut(state, &one, "<|channel|>commentary<|message|>I look." NEXT FINAL "Done.<|return|>",
              "C(I look.).C(\n\nDone.).!end");
    check_cut(state, &none, ANALYSIS "a" NEXT ANALYSIS "b" NEXT FINAL "c<|return|>", "R(a).R(\n\nb).C(c).!end");
}

static void built_in_tools(void **state) {
    const tools both = {.browser = true, .python = true};
    check_cut(state, &both, "<|channel|>analysis to=python code<|message|>print({1: 2})<|call|>",
              "T(python)A(print({1: 2})).!call");
    check_cut(state, &both, "<|channel|>analysis to=browser.search code<|message|>{\"query\":\"x\"}<|call|>",
              "T(browser.search)A({\"query\":\"x\"}).!call");
}

static void spelled_control_tokens_are_content(void **state) {
    const fixture *f = *state;
    const char text[] = "<|end|><|start|>assistant<|channel|>";
    transcript got = {0};
    harmony_parser *p = open_parser(f->h, &none, &got);
    ids v = encode(f->tiny, FINAL, false);
    assert_int_equal(tok_encode(f->tiny, text, strlen(text), false, &v), ORCD_OK);
    feed_all(p, &v, &got);
    assert_string_equal(got.text.data, "C(<|end|><|start|>assistant<|channel|>).!cut");
    harmony_parser_close(p);
    buf_free(&got.text);
    ids_free(&v);
}

/* ---- M1 to M15 ---- */

static void m1_message_token_missing(void **state) {
    check_cut(state, &none, "<|channel|>final {\"a\":1}<|return|>", "C({\"a\":1}).!end");
    check(state, &none, "I must refuse<|return|>", "C(I must refuse).!end");
    check(state, &none, "I must refuse<|end|><|start|>assistant" FINAL "Yes<|return|>", "R(I must refuse).C(Yes).!end");
    check(state, &none, "<|channel|>final Yes<|return|>", "C(Yes).!end");
    check_cut(state, &none, "<|channel|>final\nLine one\nLine two<|return|>", "C(Line one\nLine two).!end");
    check_cut(state, &one, "<|channel|>commentary to=functions.get_it {\"a\":1}<|call|>",
              "T(get_it)A({\"a\":1}).!call");
    check_cut(state, &one, "<|channel|>commentary to=functions.get_it <|constrain|>json{\"a\":1}<|call|>",
              "T(get_it)A({\"a\":1}).!call");
    check(state, &one, "<|channel|>commentary to=functions.get_it<|call|>", "T(get_it)A({}).!call");
    check(state, &none, "<|channel|>analysis I think" NEXT FINAL "x<|return|>", "R(I think).C(x).!end");
}

static void m1_streams_once_it_is_certain(void **state) {
    const fixture *f = *state;
    const char *const sure[] = {"<|channel|>final Now {", "<|channel|>final a b c d e f g h i j k l m n o p q r s t u"};
    for (size_t i = 0; i < ORCD_COUNT(sure); i++) {
        transcript got = {0};
        harmony_parser *p = open_parser(f->h, &none, &got);
        ids v = encode(f->tiny, sure[i], false);
        for (size_t k = 0; k < v.n; k++)
            assert_true(harmony_feed(p, v.data[k]));
        assert_true(got.text.len > 4);
        assert_true(harmony_in_answer(p));
        harmony_parser_close(p);
        buf_free(&got.text);
        ids_free(&v);
    }
}

static void m2_recipient_anywhere(void **state) {
    check_cut(state, &one, " to=functions.get_it<|channel|>commentary<|message|>{}<|call|>", "T(get_it)A({}).!call");
    check_cut(state, &one,
              " to=functions.get_it<|channel|>commentary to=functions.get_it <|constrain|>json<|message|>{}<|call|>",
              "T(get_it)A({}).!call");
    check_cut(state, &one, "<|channel|>analysis to=functions.get_it code<|message|>{}<|call|>", "T(get_it)A({}).!call");
    check_cut(state, &one, "<|channel|>final to=functions.get_it<|message|>{}<|call|>", "T(get_it)A({}).!call");
    check_cut(state, &one, "<|channel|>final to=functions.other<|message|>hey<|return|>", "C(hey).!end");
}

static void m3_m4_glued_names(void **state) {
    check_cut(state, &one, " to=functions.get_it<|constrain|>json<|message|>{}<|call|>", "T(get_it)A({}).!call");
    check_cut(state, &one, "<|channel|>commentary functions.get_it<|constrain|>json<|message|>{}<|call|>",
              "T(get_it)A({}).!call");
    check_cut(state, &one, "<|channel|>commentary to=functions.get_itjson<|message|>{}<|call|>",
              "T(get_it)A({}).!call");
    check_cut(state, &one, "<|channel|>commentary to=functions.get_itcommentaryjson<|message|>{}<|call|>",
              "T(get_it)A({}).!call");
    check_cut(state, &one, "<|channel|>commentaryjson to=functions.functions.get_it<|message|>{}<|call|>",
              "T(get_it)A({}).!call");
    check_cut(state, &one, "<|channel|>commentary to=get_it<|message|>{}<|call|>", "T(get_it)A({}).!call");
    check_cut(state, &one, "<|channel|>commentary to=functions.GET_IT<|message|>{}<|call|>", "T(get_it)A({}).!call");
    check_cut(state, &one, "<|channel|>commentary to=functions.get_it<|channel|>commentary<|message|>{}<|call|>",
              "T(get_it)A({}).!call");
}

static void m5_content_types(void **state) {
    static const char *const type[] = {"code", "JSON", "response", "", "some prose"};
    for (size_t i = 0; i < ORCD_COUNT(type); i++) {
        char text[200];
        snprintf(text, sizeof text, "<|channel|>commentary to=functions.get_it <|constrain|>%s<|message|>{}<|call|>",
                 type[i]);
        check_cut(state, &one, text, "T(get_it)A({}).!call");
    }
    check_cut(state, &one, "<|constrain|>commentary to=functions.get_it<|message|>{}<|call|>", "T(get_it)A({}).!call");
    check_cut(state, &none, "<|constrain|>analysis<|message|>Hm.<|end|>", "R(Hm.).!cut");
}

static void m6_channel_junk(void **state) {
    check_cut(state, &none, "<|channel|>commentary to=assistant<|channel|>analysis<|message|>Hm.<|end|>",
              "R(Hm.).!cut");
    check_cut(state, &none, "<|channel|>commentary?commentary?<|message|>x<|return|>", "C(x).!end");
    check_cut(state, &none, "<|channel|>?\?<|message|>x" NEXT FINAL "y<|return|>", "R(x).C(y).!end");
    check_cut(state, &none, FINAL "x" NEXT "<|channel|>?\?<|message|>y<|return|>", "C(x).C(\n\ny).!end");
    check(state, &none, "<|channel|>We need to answer<|message|>x" NEXT FINAL "y<|return|>", "R(x).C(y).!end");
}

static void more_header_parts_than_are_kept(void **state) {
    const char many[] = "<|channel|>a<|constrain|>b<|channel|>c<|constrain|>d<|channel|>e<|constrain|>f<|channel|>g"
                        "<|constrain|>h<|channel|>i<|constrain|>j";
    char text[400];
    snprintf(text, sizeof text, "%s<|channel|>analysis<|message|>x" NEXT FINAL "y<|return|>", many);
    check_cut(state, &none, text, "R(x).C(y).!end");
    snprintf(text, sizeof text, "%s<|channel|>commentary to=functions.get_it<|constrain|>json<|message|>{}<|call|>",
             many);
    check_cut(state, &one, text, "T(get_it)A({}).!call");
}

static void m7_text_after_end(void **state) {
    check_cut(state, &none, ANALYSIS "a<|end|>assistantfinal<|message|>b<|return|>", "R(a).C(b).!end");
    check_cut(state, &none, ANALYSIS "a<|end|>assistant<|channel|>final<|message|>b<|return|>", "R(a).C(b).!end");
    check_cut(state, &one, ANALYSIS "a<|end|>commentary to=functions.get_it <|constrain|>json<|message|>{}<|call|>",
              "R(a).T(get_it)A({}).!call");
    check_cut(state, &none, ANALYSIS "a<|end|> \n<|start|>assistant" FINAL "b<|return|>", "R(a).C(b).!end");
    check_cut(state, &none, ANALYSIS "a<|end|>So the answer is b<|return|>", "R(a).C(So the answer is b).!end");
    check_cut(state, &none, ANALYSIS "a<|end|>Finally, b<|return|>", "R(a).C(Finally, b).!end");
    check_cut(state, &none, ANALYSIS "a<|end|>fin<|return|>", "R(a).C(fin).!end");
    check_cut(state, &none, ANALYSIS "a<|end|><|message|>b<|return|>", "R(a).C(b).!end");
}

static void m8_role_says_channel_or_tool(void **state) {
    check_cut(state, &none, ANALYSIS "a<|end|><|start|>final<|message|>b<|return|>", "R(a).C(b).!end");
    check_cut(state, &none, FINAL "b<|end|><|start|>analysis<|message|>a<|end|>", "C(b).R(a).!cut");
    check_cut(state, &one, ANALYSIS "a<|end|><|start|>functions.get_it<|channel|>commentary<|message|>{}<|call|>",
              "R(a).T(get_it)A({}).!call");
    check_cut(state, &none, ANALYSIS "a<|end|><|start|>assistantxyz" FINAL "b<|return|>", "R(a).C(b).!end");
    check_cut(state, &one, "<|channel|>get_it<|message|>{}<|call|>", "T(get_it)A({}).!call");
}

static void m9_other_speakers_are_cut_off(void **state) {
    check_cut(state, &none, FINAL "a<|end|><|start|>user<|message|>b<|end|>", "C(a).!end");
    check_cut(state, &none, FINAL "a<|end|><|start|>system<|message|>b", "C(a).!end");
    check_cut(state, &none, FINAL "a<|end|><|start|>developer<|message|>b", "C(a).!end");
    check_cut(state, &one, FINAL "a<|end|><|start|>functions.get_it to=assistant<|channel|>commentary<|message|>42",
              "C(a).!end");
}

static void m10_body_cut_by_start_or_channel(void **state) {
    check_cut(state, &none, ANALYSIS "a<|start|>assistant" FINAL "b<|return|>", "R(a).C(b).!end");
    check_cut(state, &none, ANALYSIS "a" FINAL "b<|return|>", "R(a).C(b).!end");
    check(state, &none, ANALYSIS "a.\nassistant" FINAL "b<|return|>", "R(a.\n).C(b).!end");
    check_cut(state, &none, ANALYSIS "the assistant" NEXT FINAL "I, assistant<|return|>",
              "R(the assistant).C(I, assistant).!end");
    check_cut(state, &one, CALL("get_it") "{\"a\":1}<|start|>assistant", "T(get_it)A({\"a\":1}).!call");
}

static void m11_calls_closed_otherwise(void **state) {
    check_cut(state, &one, CALL("get_it") "{}<|end|>", "T(get_it)A({}).!call");
    check_cut(state, &one, CALL("get_it") "{}<|return|>", "T(get_it)A({}).!call");
    check_cut(state, &one, "<|channel|>commentary <|constrain|>json<|message|>{\"a\":1}<|call|>",
              "T(get_it)A({\"a\":1}).!call");
    check_cut(state, &one, "<|channel|>commentary<|message|>{\"a\":1}<|end|>", "C({\"a\":1}).!cut");
    check_cut(state, &two, "<|channel|>commentary<|message|>{\"a\":1}<|call|>", "C({\"a\":1}).!end");
    check_cut(state, &one, "<|channel|>commentary<|message|> Look.<|call|>", "C( Look.).!end");
}

static void m12_unknown_tools(void **state) {
    check_cut(state, &one, CALL("other") "{}<|call|>", "T(other)A({}).!call");
    check_cut(state, &none, CALL("other") "{\"a\":1}<|call|>", ".C({\"a\":1})!end");
    check_cut(state, &none, FINAL "Hi" NEXT CALL("other") "{}<|call|>", "C(Hi)..!end");
}

static void m13_arguments_are_cleaned(void **state) {
    static const char *const pair[][2] = {
        {"", "A({})"},
        {"  \n", "A({})"},
        {" {\"a\": [1, {}]} ", "A({\"a\": [1, {}]})"},
        {"{\"a\":1}}", "A({\"a\":1})"},
        {"{\"a\":\"}\\\"\"} trailing", "A({\"a\":\"}\\\"\"})"},
        {"```json\n{\"a\":1}\n```", "A({\"a\":1})"},
        {"[{\"a\":1}]", "A({\"a\":1})"},
        {"[1,2]", "A([1,2])"},
        {"json{\"a\":1}", "A({\"a\":1})"},
        {"plain", "A(plain)"},
        {"{\"a\":1", "A({\"a\":1)"},
        {"use {x}", "A(use {x})"},
    };
    for (size_t i = 0; i < ORCD_COUNT(pair); i++) {
        char text[200], want[200];
        snprintf(text, sizeof text, CALL("get_it") "%s<|call|>", pair[i][0]);
        snprintf(want, sizeof want, "T(get_it)%s.!call", pair[i][1]);
        check_cut(state, &one, text, want);
    }
}

static void m14_reasoning_alone_is_made_to_answer_once(void **state) {
    const tools force = {.force = true};
    check_cut(state, &force, ANALYSIS "Hm.<|return|>Yes.<|return|>", "R(Hm.)F.C(Yes.).!end");
    check_cut(state, &force, ANALYSIS "Hm.<|end|><|return|>Yes.<|return|>", "R(Hm.).FC(Yes.).!end");
    check_cut(state, &force, ANALYSIS "Hm." NEXT "<|return|>Yes.<|return|>", "R(Hm.).FC(Yes.).!end");
    check_cut(state, &force, "<|return|>Yes.<|return|>", "FC(Yes.).!end");
    check_cut(state, &force, ANALYSIS "Hm.<|return|><|return|>", "R(Hm.)F..!end");
    check_cut(state, &force, FINAL "Yes.<|return|>", "C(Yes.).!end");
    check_cut(state, &none, ANALYSIS "Hm.<|return|>", "R(Hm.).!end");
}

static void m15_empty_messages_end(void **state) {
    const fixture *f = *state;
    transcript got = {0};
    harmony_parser *p = open_parser(f->h, &none, &got);
    ids v = encode(f->tiny, "<|start|>assistant" ANALYSIS "<|end|>", false);
    int rounds = 0;
    for (bool on = true; on && rounds < 100; rounds++)
        for (size_t i = 0; i < v.n && on; i++)
            on = harmony_feed(p, v.data[i]);
    assert_in_range(rounds, 8, 10);
    assert_int_equal(got.n_stop, 1);
    harmony_parser_close(p);
    buf_free(&got.text);
    ids_free(&v);
}

/* ---- the rest of the list ---- */

static void cut_in_each_state(void **state) {
    check_cut(state, &none, "", "!cut");
    check_cut(state, &none, "<|channel|>", "!cut");
    check_cut(state, &none, "<|channel|>comm", "!cut");
    check_cut(state, &none, "<|channel|>final", "!cut");
    check_cut(state, &none, FINAL, ".!cut");
    check_cut(state, &none, FINAL "Hal", "C(Hal).!cut");
    check_cut(state, &none, ANALYSIS "a<|end|>", "R(a).!cut");
    check_cut(state, &none, ANALYSIS "a<|end|>fin", "R(a).C(fin).!cut");
    check_cut(state, &one, CALL("get_it"), "T(get_it).!cut");
    check_cut(state, &one, CALL("get_it") "{\"a\":", "T(get_it)A({\"a\":).!cut");
    check_cut(state, &one, CALL("get_it") "```js", "T(get_it)A(```js).!cut");
    check(state, &none, "No header at all", "C(No header at all).!cut");
}

static void characters_are_whole(void **state) {
    const fixture *f = *state;
    check_cut(state, &none, FINAL "\xe2\x82\xac\xf0\x9f\x92\x96\xc3\xa9<|return|>",
              "C(\xe2\x82\xac\xf0\x9f\x92\x96\xc3\xa9).!end");
    check_cut(state, &none, FINAL "a\xf0\x9f\x92<|return|>", "C(a\xef\xbf\xbd).!end");
    check_cut(state, &none, ANALYSIS "a\xf0\x9f" NEXT FINAL "\x92\x96<|return|>",
              "R(a\xef\xbf\xbd).C(\xef\xbf\xbd\xef\xbf\xbd).!end");
    if (f->h_real) {
        const int32_t id[] = {9552, 9552, 31446, 244};
        transcript got = {0};
        harmony_parser *p = open_parser(f->h_real, &none, &got);
        ids v = encode(f->real, FINAL, false);
        ids_add(&v, id, 2);
        assert_int_equal(tok_encode(f->real, "worked", 6, false, &v), ORCD_OK);
        ids_add(&v, id + 2, 2);
        feed_all(p, &v, &got);
        assert_string_equal(got.text.data, "C( \xef\xbf\xbd \xef\xbf\xbdworked\xf0\x9f\x92\x96).!cut");
        harmony_parser_close(p);
        buf_free(&got.text);
        ids_free(&v);
    }
}

static void counts_and_replay(void **state) {
    const fixture *f = *state;
    transcript got = {0}, again = {0};
    harmony_parser *p = open_parser(f->h, &one, &got);
    ids v = encode(f->tiny, ANALYSIS "the and the" NEXT CALL("get_it") "{}<|end|>", false), out = {0};
    ids think = encode(f->tiny, "the and the", false);
    feed_all(p, &v, &got);
    assert_int_equal(harmony_n_reasoning(p), think.n);
    ids_free(&think);
    assert_int_equal(harmony_n_calls(p), 1);
    assert_int_equal(harmony_replay(p, &out), ORCD_OK);
    assert_int_equal(out.n, v.n);
    assert_memory_equal(out.data, v.data, (v.n - 1) * sizeof *v.data);
    assert_int_equal(out.data[v.n - 1], tok_special(f->tiny, "<|call|>"));
    harmony_parser_close(p);
    p = open_parser(f->h, &one, &again);
    feed_all(p, &out, &again);
    assert_string_equal(again.text.data, got.text.data);
    harmony_parser_close(p);
    buf_free(&got.text);
    buf_free(&again.text);
    ids_free(&v);
    ids_free(&out);
}

/* Text that is fed must come out, whatever else happens: a mark in it is searched for. */
static void random_ids_never_crash(void **state) {
    static const char *const word[] = {"<|start|>", "<|channel|>", "<|message|>",  "<|end|>",    "<|constrain|>",
                                       "assistant", "final",       "analysis",     "commentary", " to=functions.get_it",
                                       "json",      "{\"a\":1}",   "<|reserved|>", " ",          "\n",
                                       "user",      "\xf0\x9f"};
    const fixture *f = *state;
    uint64_t seed = 11;
    size_t n_fed = 0;
    for (int round = 0; n_fed < 1000000; round++) {
        const tools *t[] = {&none, &one, &two, &(tools){.name = {"get_it"}, .python = true, .force = true}};
        const harmony *h = f->h_real && round % 2 ? f->h_real : f->h;
        const tok *tk = h == f->h ? f->tiny : f->real;
        transcript got = {0};
        harmony_parser *p = open_parser(h, t[t_below(&seed, 4)], &got);
        for (size_t i = 0, n = t_below(&seed, 400); i < n; i++) {
            int32_t id = (int32_t)t_below(&seed, (uint64_t)tok_n_vocab(tk) + 20) - 5;
            ids v = {0};
            if (round % 4 < 3 && t_below(&seed, 3))
                v = encode(tk, word[t_below(&seed, ORCD_COUNT(word))], false);
            else
                ids_push(&v, id);
            for (size_t k = 0; k < v.n; k++, n_fed++)
                if (!harmony_feed(p, v.data[k]))
                    assert_int_equal(got.n_stop, 1);
            ids_free(&v);
        }
        harmony_finish(p);
        assert_int_equal(got.n_stop, 1);
        harmony_finish(p);
        harmony_parser_close(p);
        buf_free(&got.text);
        ids_free(&got.forced);
    }
}

/* Edits of sound streams: marks in bodies are never lost. */
static void no_body_is_lost_when_one_token_is(void **state) {
    const fixture *f = *state;
    const char sound[] = ANALYSIS "ONE" NEXT "<|channel|>commentary<|message|>TWO" NEXT FINAL "THREE<|return|>";
    ids all = encode(f->tiny, sound, false);
    for (size_t gone = 0; gone + 1 < all.n; gone++) {
        transcript got = {0};
        harmony_parser *p = open_parser(f->h, &two, &got);
        ids v = {0};
        size_t n_letters = 0;
        ids_add(&v, all.data, gone);
        ids_add(&v, all.data + gone + 1, all.n - gone - 1);
        feed_all(p, &v, &got);
        for (size_t i = 0; i < v.n; i++) { /* capitals occur in bodies only */
            size_t n;
            const char *s = tok_bytes(f->tiny, v.data[i], &n);
            n_letters += n == 1 && *s >= 'A' && *s <= 'Z';
        }
        for (const char *s = got.text.data; *s; s++)
            n_letters -= *s >= 'A' && *s <= 'Z' && s[1] != '(';
        if (n_letters)
            fail_msg("without id %zu: %s", gone, got.text.data);
        harmony_parser_close(p);
        buf_free(&got.text);
        ids_free(&v);
    }
    ids_free(&all);
}

static void long_headers_take_linear_time(void **state) {
    const fixture *f = *state;
    transcript got = {0};
    harmony_parser *p = open_parser(f->h, &two, &got);
    ids v = encode(f->tiny, "<|channel|>{ no channel to=", false);
    clock_t from = clock();
    for (int i = 0; i < 30000; i++)
        for (size_t k = i > 0; k < v.n; k++)
            harmony_feed(p, v.data[k]);
    harmony_finish(p);
    assert_true((double)(clock() - from) / CLOCKS_PER_SEC < 2);
    harmony_parser_close(p);
    buf_free(&got.text);
    ids_free(&v);
}

/* ---- masks ---- */

static bool allowed(const uint32_t *set, int32_t id) { return set[id / 32] >> id % 32 & 1; }

static harmony_mask *open_mask(const fixture *f, const char *name, bool final, bool preamble) {
    chat_str list = chat_str_of(name);
    harmony_mask_options o = {.name = &list,
                              .n_name = name != NULL,
                              .final = final,
                              .preamble = preamble,
                              .n_vocab = tok_n_vocab(f->tiny) + 70};
    harmony_mask *m = NULL;
    assert_int_equal(harmony_mask_open(f->h, &o, &m, NULL), ORCD_OK);
    return m;
}

/* Whether every id of `sampled` is allowed where it comes. */
static bool follows(const fixture *f, harmony_mask *m, const char *sampled) {
    transcript got = {0};
    harmony_parser *p = open_parser(f->h, &two, &got);
    ids v = encode(f->tiny, sampled, false);
    bool all = true;
    for (size_t i = 0; i < v.n && all; i++) {
        all = allowed(harmony_mask_next(m, p), v.data[i]);
        harmony_mask_feed(m, p, v.data[i]);
        harmony_feed(p, v.data[i]);
    }
    harmony_parser_close(p);
    buf_free(&got.text);
    ids_free(&v);
    return all;
}

static void required_masks_answers_until_a_call(void **state) {
    const fixture *f = *state;
    harmony_mask *m = open_mask(f, "get_it", false, true);
    assert_true(follows(f, m, ANALYSIS "Hm." NEXT CALL("get_it") "{}<|call|>"));
    assert_true(follows(f, m, "<|channel|>commentary<|message|>I look." NEXT CALL("get_it") "{}<|call|>"));
    assert_false(follows(f, m, FINAL));
    assert_false(follows(f, m, ANALYSIS "Hm.<|return|>"));
    assert_false(follows(f, m, ANALYSIS "Hm.<|endoftext|>"));
    assert_false(follows(f, m, ANALYSIS "Hm." NEXT FINAL));
    assert_false(follows(f, m, "<|channel|>commentary<|message|>I look.<|call|>"));
    assert_false(follows(f, m, CALL("put.it")));
    assert_false(follows(f, m, "text"));
    harmony_mask_close(m);
}

typedef struct sampled_case {
    const char *sampled;
    bool allowed;
} sampled_case;

/* Each under a mask of its own. */
static void check_each(const fixture *f, const harmony_mask_options *o, const sampled_case *t, size_t n) {
    for (size_t i = 0; i < n; i++) {
        harmony_mask *m = NULL;
        assert_int_equal(harmony_mask_open(f->h, o, &m, NULL), ORCD_OK);
        if (follows(f, m, t[i].sampled) != t[i].allowed)
            fail_msg("%s", t[i].sampled);
        harmony_mask_close(m);
    }
}

static void an_answer_follows_its_grammar_from_its_first_token_on(void **state) {
    static const sampled_case t[] = {{FINAL "7<|return|>", true},
                                     {FINAL "71<|return|>", true},
                                     {ANALYSIS "9" NEXT FINAL "71<|return|>", true},
                                     {FINAL "<|return|>", false},
                                     {FINAL "9", false},
                                     {FINAL "71 ", false},
                                     {FINAL "7<|end|>", false},
                                     {"<|channel|>commentary<|message|>7", false}};
    const fixture *f = *state;
    json_t *schema = json_pack("{s:[i,i]}", "enum", 7, 71);
    harmony_mask_options o = {.final = true, .n_vocab = tok_n_vocab(f->tiny)};
    grammar_vocab *vocab = NULL;
    assert_int_equal(grammar_compile(schema, &o.answer, NULL), ORCD_OK);
    assert_int_equal(grammar_vocab_open(f->tiny, o.n_vocab, &vocab), ORCD_OK);
    o.vocab = vocab;
    check_each(f, &o, t, ORCD_COUNT(t));
    grammar_vocab_close(vocab);
    grammar_close(o.answer);
    json_decref(schema);
}

static void a_strict_tool_is_called_with_what_its_grammar_says(void **state) {
    static const sampled_case t[] = {
        {CALL("get_it") "7<|call|>", true}, {ANALYSIS "9" NEXT CALL("get_it") "71<|call|>", true},
        {CALL("put.it") "9<|call|>", true}, /* not strict */
        {FINAL "9<|return|>", true},        {CALL("get_it") "<|call|>", false},
        {CALL("get_it") "9", false},        {CALL("get_it") "71 ", false},
        {CALL("get_it") "7<|end|>", false}};
    const fixture *f = *state;
    json_t *schema = json_pack("{s:[i,i]}", "enum", 7, 71);
    grammar_vocab *vocab = NULL;
    grammar *g[2] = {0};
    chat_str name[2] = {chat_str_of("put.it"), chat_str_of("get_it")};
    assert_int_equal(grammar_compile(schema, &g[1], NULL), ORCD_OK);
    assert_int_equal(grammar_vocab_open(f->tiny, tok_n_vocab(f->tiny), &vocab), ORCD_OK);
    harmony_mask_options o = {.name = name,
                              .n_name = 2,
                              .final = true,
                              .preamble = true,
                              .n_vocab = tok_n_vocab(f->tiny),
                              .arguments = g,
                              .vocab = vocab};
    check_each(f, &o, t, ORCD_COUNT(t));
    grammar_vocab_close(vocab);
    grammar_close(g[1]);
    json_decref(schema);
}

static void none_masks_recipients(void **state) {
    const fixture *f = *state;
    harmony_mask *m = open_mask(f, NULL, true, false);
    assert_true(follows(f, m, ANALYSIS "Hm." NEXT FINAL "Yes.<|return|>"));
    assert_false(follows(f, m, CALL("get_it")));
    assert_false(follows(f, m, "<|channel|>commentary<|message|>"));
    assert_false(follows(f, m, ANALYSIS "Hm.<|return|>"));
    harmony_mask_close(m);
    m = open_mask(f, NULL, true, true);
    assert_true(follows(f, m, "<|channel|>commentary<|message|>Well." NEXT FINAL "Yes.<|return|>"));
    assert_false(follows(f, m, "<|channel|>commentary to=functions.get_it <|constrain|>json"));
    harmony_mask_close(m);
}

static void named_forces_the_name(void **state) {
    const fixture *f = *state;
    transcript got = {0};
    harmony_parser *p = open_parser(f->h, &two, &got);
    harmony_mask *m = open_mask(f, "put.it", false, false);
    ids v = encode(f->tiny, CALL("put.it"), false);
    harmony_feed(p, v.data[0]);
    for (size_t i = 2; i < v.n; i++) { /* past the choice between analysis and commentary there is one way */
        harmony_feed(p, v.data[i - 1]);
        const uint32_t *set = harmony_mask_next(m, p);
        for (int32_t id = 0; id < tok_n_vocab(f->tiny) + 70; id++)
            assert_int_equal(allowed(set, id), id == v.data[i]);
    }
    harmony_parser_close(p);
    harmony_mask_close(m);
    buf_free(&got.text);
    ids_free(&v);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plain_answers),
        cmocka_unit_test(calls_in_both_orders),
        cmocka_unit_test(preambles_are_content),
        cmocka_unit_test(built_in_tools),
        cmocka_unit_test(spelled_control_tokens_are_content),
        cmocka_unit_test(m1_message_token_missing),
        cmocka_unit_test(m1_streams_once_it_is_certain),
        cmocka_unit_test(m2_recipient_anywhere),
        cmocka_unit_test(m3_m4_glued_names),
        cmocka_unit_test(m5_content_types),
        cmocka_unit_test(m6_channel_junk),
        cmocka_unit_test(more_header_parts_than_are_kept),
        cmocka_unit_test(m7_text_after_end),
        cmocka_unit_test(m8_role_says_channel_or_tool),
        cmocka_unit_test(m9_other_speakers_are_cut_off),
        cmocka_unit_test(m10_body_cut_by_start_or_channel),
        cmocka_unit_test(m11_calls_closed_otherwise),
        cmocka_unit_test(m12_unknown_tools),
        cmocka_unit_test(m13_arguments_are_cleaned),
        cmocka_unit_test(m14_reasoning_alone_is_made_to_answer_once),
        cmocka_unit_test(m15_empty_messages_end),
        cmocka_unit_test(cut_in_each_state),
        cmocka_unit_test(characters_are_whole),
        cmocka_unit_test(counts_and_replay),
        cmocka_unit_test(random_ids_never_crash),
        cmocka_unit_test(no_body_is_lost_when_one_token_is),
        cmocka_unit_test(long_headers_take_linear_time),
        cmocka_unit_test(required_masks_answers_until_a_call),
        cmocka_unit_test(an_answer_follows_its_grammar_from_its_first_token_on),
        cmocka_unit_test(a_strict_tool_is_called_with_what_its_grammar_says),
        cmocka_unit_test(none_masks_recipients),
        cmocka_unit_test(named_forces_the_name),
    };
    return cmocka_run_group_tests(tests, open_all, close_all);
}
