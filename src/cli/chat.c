/* cli/chat.c: `orcd chat`: a conversation on the terminal. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/file.h"
#include "cli/line.h"
#include "cli/talk.h"
#include "text/chat/chat.h"

typedef struct options {
    talk_settings settings;
    engine_options engine;
    const char *url, *name, *key_file, *system, *tools, *history;
    bool hide_reasoning;
} options;

static const cli_option option[] = {
    {"url", 0, CLI_STR, offsetof(options, url), 0, 0, "URL", "talk to an OpenAI-compatible server, not a model here"},
    {"name", 0, CLI_STR, offsetof(options, name), 0, 0, "ID", "model of the server (default: the first it lists)"},
    {"api-key-file", 0, CLI_STR, offsetof(options, key_file), 0, 0, "FILE", "the server's key: the first line"},
    {"system", 0, CLI_STR, offsetof(options, system), 0, 0, "TEXT", "instructions for the model"},
    {"effort", 'e', CLI_CHOICE, offsetof(options, settings.effort), 0, 0, "low|medium|high", "of the reasoning"},
    {"tools", 0, CLI_STR, offsetof(options, tools), 0, 0, "FILE",
     "OpenAI's tools array: calls are shown and you are asked for their results"},
    {"hide-reasoning", 0, CLI_FLAG, offsetof(options, hide_reasoning), 0, 0, "", "fold the reasoning away"},
    {"max-tokens", 'n', CLI_INT, offsetof(options, settings.max_tokens), 0, 1 << 20, "N",
     "tokens of one answer (default 0: to the context's end)"},
    {"max-reasoning-tokens", 0, CLI_INT, offsetof(options, settings.max_reasoning), 0, 1 << 20, "N",
     "reasoning before the model must answer (default 0: no limit)"},
    {"history", 0, CLI_STR, offsetof(options, history), 0, 0, "FILE", "of typed lines (default ~/.orcd_history)"},
    SAMPLING_OPTIONS(options, settings.sampling),
    ENGINE_OPTIONS(options, engine),
    {0},
};

/* ---- showing an answer ---- */

typedef struct view {
    bool tty, reasoning; /* standard output is a terminal; reasoning is shown */
    int part;            /* talk_kind of what was printed last, -1 = nothing */
    bool waiting;        /* "thinking ..." stands on the line */
    size_t n_folded;     /* pieces of reasoning that were not shown */
} view;

static const char *dim(const view *v) { return v->tty ? term_dim() : ""; }
static const char *bold(const view *v) { return v->tty ? term_bold() : ""; }
static const char *off(const view *v) { return v->tty ? term_off() : ""; }

/* Control characters would command the terminal. */
static void print_text(const view *v, const char *text, size_t len) {
    for (size_t i = 0; i < len; i++) {
        unsigned char c = (unsigned char)text[i];
        if (!v->tty || (c >= 0x20 && c != 0x7f) || c == '\n' || c == '\t')
            putchar(c);
    }
}

static void end_part(view *v) {
    if (v->waiting)
        fputs("\r\033[K", stdout);
    if (v->part == TALK_REASONING && !v->waiting)
        printf("%s\n\n", off(v));
    if (v->part == TALK_ARGUMENTS)
        printf("%s\n", off(v));
    v->waiting = false;
    v->part = -1;
}

static void on_text(void *ctx, talk_kind kind, const char *text, size_t len) {
    view *v = ctx;
    bool fold = kind == TALK_REASONING && !v->reasoning;
    int part = kind == TALK_CALL ? TALK_ARGUMENTS : (int)kind;
    if (fold && !v->tty)
        return;
    if (part != v->part || kind == TALK_CALL) {
        if (v->part == TALK_CONTENT)
            putchar('\n');
        end_part(v);
        if (kind == TALK_REASONING && !fold)
            fputs(dim(v), stdout);
    }
    v->part = part;
    if (fold) {
        v->waiting = true;
        printf("\r%sthinking … %zu%s", dim(v), ++v->n_folded, off(v));
    } else if (kind == TALK_CALL)
        printf("%s→ %.*s%s%s ", bold(v), (int)len, text, off(v), dim(v));
    else
        print_text(v, text, len);
    fflush(stdout);
}

static void end_answer(view *v, const talk_answer *a) {
    bool newline = v->part == TALK_CONTENT && a->content.data[a->content.len - 1] != '\n';
    end_part(v);
    if (newline)
        putchar('\n');
    fflush(stdout);
}

/* ---- the conversation ---- */

typedef struct totals {
    int64_t n_turn, n_in, n_cached, n_out, n_reasoning, n_ctx, n_used;
    double prefill_s, decode_s;
} totals;

typedef struct session {
    options *o;
    talk_source *source;
    line_reader *line;
    json_t *messages;
    char *last_reasoning;
    view view;
    totals total;
    bool leave;
} session;

static volatile sig_atomic_t stop_answer;

static void on_interrupt(int sig) {
    (void)sig;
    stop_answer = 1;
}

static double rate(int64_t n, double s) { return s > 0 && n > 0 ? (double)n / s : 0; }

static void note(const char *text) {
    fflush(stdout);
    fprintf(stderr, "%s%s%s\n", term_dim(), text, term_off());
}

static void print_turn(const talk_answer *a) {
    char in[32], cached[32], out[32], thought[32], prefill[32], used[32], ctx[32];
    fflush(stdout);
    fprintf(stderr, "%s%s in (%s cached) · %s out (%s thinking) · %s / %.1f tok/s", term_dim(),
            human_count((uint64_t)a->n_in, in), human_count((uint64_t)a->n_cached, cached),
            human_count((uint64_t)a->n_out, out), human_count((uint64_t)a->n_reasoning, thought),
            human_count((uint64_t)rate(a->n_in - a->n_cached, a->prefill_s), prefill), rate(a->n_out - 1, a->decode_s));
    if (a->n_ctx)
        fprintf(stderr, " · context %s of %s", human_count((uint64_t)(a->n_in + a->n_out), used),
                human_count((uint64_t)a->n_ctx, ctx));
    fprintf(stderr, "%s%s%s\n", a->stopped ? " · stopped" : "", a->cut ? " · cut: too long" : "", term_off());
}

static void add_up(totals *t, const talk_answer *a) {
    t->n_turn++;
    t->n_in += a->n_in;
    t->n_cached += a->n_cached;
    t->n_out += a->n_out;
    t->n_reasoning += a->n_reasoning;
    t->prefill_s += a->prefill_s;
    t->decode_s += a->decode_s;
    t->n_ctx = a->n_ctx;
    t->n_used = a->n_in + a->n_out;
}

/* Ask for the results of the calls of the last answer; false when there are none or the person gives up. */
static bool read_results(session *s, const json_t *calls) {
    size_t i;
    json_t *call;
    bool go_on = json_array_size(calls) > 0;
    json_array_foreach(calls, i, call) {
        char prompt[128];
        buf text = {0};
        const char *name = json_string_value(json_object_get(json_object_get(call, "function"), "name"));
        snprintf(prompt, sizeof prompt, "%.80s returns> ", name);
        go_on = go_on && line_read(s->line, prompt, &text) == LINE_TEXT;
        json_array_append_new(s->messages,
                              json_pack("{s:s, s:O, s:s}", "role", "tool", "tool_call_id", json_object_get(call, "id"),
                                        "content", go_on && text.data ? text.data : "(no result)"));
        buf_free(&text);
    }
    return go_on;
}

/* One answer to what the conversation holds; true when it has calls whose results are now there. */
static bool answer_once(session *s) {
    talk_answer a = {0};
    orcd_error err = {0};
    const talk_request r = {.messages = s->messages,
                            .settings = &s->o->settings,
                            .stop = &stop_answer,
                            .on_text = on_text,
                            .ctx = &s->view};
    bool more = false;
    s->view.part = -1;
    s->view.n_folded = 0;
    stop_answer = 0;
    orcd_status st = s->source->answer(s->source, &r, &a, &err);
    end_answer(&s->view, &a);
    if (st != ORCD_OK) {
        cli_fail(&err);
        json_array_remove(s->messages, json_array_size(s->messages) - 1); /* so that it can be asked again */
    } else {
        free(s->last_reasoning);
        s->last_reasoning = a.reasoning.len ? strndup(a.reasoning.data, a.reasoning.len) : NULL;
        if (a.stopped)
            json_decref(a.calls), a.calls = NULL; /* its arguments are not complete */
        print_turn(&a);
        add_up(&s->total, &a);
        json_array_append_new(s->messages, talk_answer_message(&a));
        more = read_results(s, a.calls);
    }
    talk_answer_free(&a);
    return more;
}

static void say(session *s, const char *text) {
    json_array_append_new(s->messages, json_pack("{s:s, s:s}", "role", "user", "content", text));
    while (answer_once(s))
        ;
}

/* ---- commands ---- */

static json_t *system_message(const session *s) {
    json_t *m = json_array_get(s->messages, 0);
    const char *role = json_string_value(json_object_get(m, "role"));
    return role && strcmp(role, "system") == 0 ? m : NULL;
}

static void set_system(session *s, const char *text) {
    if (system_message(s))
        json_array_remove(s->messages, 0);
    if (*text)
        json_array_insert_new(s->messages, 0, json_pack("{s:s, s:s}", "role", "system", "content", text));
}

static void do_system(session *s, const char *arg) {
    const json_t *m = system_message(s);
    if (*arg)
        set_system(s, strcmp(arg, "none") == 0 ? "" : arg);
    else
        note(m ? json_string_value(json_object_get(m, "content")) : "no instructions; /system TEXT sets them");
}

static void do_effort(session *s, const char *arg) {
    static const char *const word[] = {"low", "medium", "high"};
    for (size_t i = 0; i < ORCD_COUNT(word); i++)
        if (strcmp(arg, word[i]) == 0)
            s->o->settings.effort = word[i];
    fprintf(stderr, "%seffort is %s (low, medium or high)%s\n", term_dim(), s->o->settings.effort, term_off());
}

static void do_reasoning(session *s, const char *arg) {
    s->view.reasoning = *arg ? strcmp(arg, "on") == 0 : !s->view.reasoning;
    if (s->view.reasoning && s->last_reasoning) {
        fputs(dim(&s->view), stdout);
        print_text(&s->view, s->last_reasoning, strlen(s->last_reasoning));
        printf("%s\n", off(&s->view));
    }
    note(s->view.reasoning ? "reasoning is shown" : "reasoning is folded away; /reasoning shows it");
}

static void do_reset(session *s, const char *arg) {
    (void)arg;
    json_t *system = json_incref(system_message(s));
    json_array_clear(s->messages);
    if (system)
        json_array_append_new(s->messages, system);
    note("a new conversation");
}

static void do_save(session *s, const char *arg) {
    orcd_error err = {0};
    if (!*arg)
        note("/save FILE writes the conversation");
    else if (talk_save(arg, s->messages, &err) != ORCD_OK)
        cli_fail(&err);
    else
        note("saved");
}

static void do_load(session *s, const char *arg) {
    orcd_error err = {0};
    json_t *messages = NULL;
    char text[64];
    if (!*arg)
        note("/load FILE reads a conversation that /save wrote");
    else if (talk_load(arg, &messages, &err) != ORCD_OK)
        cli_fail(&err);
    else {
        json_decref(s->messages);
        s->messages = messages;
        snprintf(text, sizeof text, "%zu messages", json_array_size(messages));
        note(text);
    }
}

static void do_stats(session *s, const char *arg) {
    char in[32], cached[32], out[32], thought[32], used[32], ctx[32], rss[32];
    const totals *t = &s->total;
    (void)arg;
    fprintf(stderr, "%s%s\n%lld answers · %s in (%s cached) · %s out (%s thinking) · %.0f / %.1f tok/s\n", term_dim(),
            s->source->about, (long long)t->n_turn, human_count((uint64_t)t->n_in, in),
            human_count((uint64_t)t->n_cached, cached), human_count((uint64_t)t->n_out, out),
            human_count((uint64_t)t->n_reasoning, thought), rate(t->n_in - t->n_cached, t->prefill_s),
            rate(t->n_out - t->n_turn, t->decode_s));
    if (t->n_ctx)
        fprintf(stderr, "context %s of %s · ", human_count((uint64_t)t->n_used, used),
                human_count((uint64_t)t->n_ctx, ctx));
    fprintf(stderr, "%zu messages · peak memory %s%s\n", json_array_size(s->messages),
            human_bytes(peak_rss_bytes(), rss), term_off());
}

static void do_exit(session *s, const char *arg) {
    (void)arg;
    s->leave = true;
}

static void do_help(session *s, const char *arg);

static const struct {
    const char *name, *arg, *help;
    void (*run)(session *s, const char *arg);
} command[] = {
    {"/help", "", "these lines", do_help},
    {"/system", "TEXT", "instructions for the model (none = without)", do_system},
    {"/effort", "low|medium|high", "how much it thinks", do_effort},
    {"/reasoning", "[on|off]", "show or fold away what it thinks", do_reasoning},
    {"/reset", "", "begin a new conversation", do_reset},
    {"/save", "FILE", "write the conversation", do_save},
    {"/load", "FILE", "go on with a saved conversation", do_load},
    {"/stats", "", "the model, tokens, speeds, context", do_stats},
    {"/exit", "", "leave (or Ctrl-D)", do_exit},
};

static void do_help(session *s, const char *arg) {
    (void)s, (void)arg;
    for (size_t i = 0; i < ORCD_COUNT(command); i++)
        fprintf(stderr, "%s%-11s %-16s %s%s\n", term_dim(), command[i].name, command[i].arg, command[i].help,
                term_off());
    note("A backslash at the end of a line goes on; \"\"\" begins and ends many lines. Ctrl-C stops an answer.");
}

static void obey(session *s, char *line) {
    char *arg = line + strcspn(line, " \t\n");
    if (*arg)
        *arg++ = '\0';
    arg += strspn(arg, " \t\n");
    for (size_t i = 0; i < ORCD_COUNT(command); i++)
        if (strcmp(line, command[i].name) == 0) {
            command[i].run(s, arg);
            return;
        }
    if (strcmp(line, "/quit") == 0 || strcmp(line, "/bye") == 0)
        s->leave = true;
    else
        fprintf(stderr, "%s%s is no command; /help lists them%s\n", term_dim(), line, term_off());
}

static void converse(session *s) {
    buf text = {0};
    while (!s->leave) {
        line_end end = line_read(s->line, "> ", &text);
        if (end == LINE_EOF)
            break;
        if (end == LINE_INTERRUPTED)
            note("Ctrl-D or /exit leaves");
        else if (text.len && text.data[0] == '/')
            obey(s, text.data);
        else if (text.len && text.data[strspn(text.data, " \t\n")])
            say(s, text.data);
    }
    if (!s->leave && s->view.tty)
        putchar('\n');
    buf_free(&text);
}

/* ---- start ---- */

static orcd_status read_key(const char *path, char out[512], orcd_error *err) {
    char *text;
    size_t len;
    ORCD_TRY(file_slurp(path, 1 << 16, &text, &len, err));
    snprintf(out, 512, "%.*s", (int)strcspn(text, "\r\n"), text);
    free(text);
    return out[0] ? ORCD_OK : orcd_fail(err, ORCD_ERR_ARG, "%s holds no key in its first line", path);
}

static orcd_status read_tools(const char *path, json_t **out, orcd_error *err) {
    json_error_t e;
    size_t i;
    json_t *v;
    *out = json_load_file(path, JSON_REJECT_DUPLICATES, &e);
    if (!*out)
        return orcd_fail(err, ORCD_ERR_FORMAT, "%s: %s", path, e.text);
    bool fine = json_is_array(*out);
    json_array_foreach(*out, i, v) fine =
        fine && json_is_string(json_object_get(json_object_get(v, "function"), "name"));
    return fine ? ORCD_OK
                : orcd_fail(err, ORCD_ERR_FORMAT,
                            "%s must be an array of {\"type\": \"function\", \"function\": {\"name\", ...}}", path);
}

static orcd_status open_source(const options *o, const char *model, talk_source **out, orcd_error *err) {
    char key[512] = "";
    if (!o->url)
        return talk_open_local(&o->engine, model, out, err);
    if (o->key_file)
        ORCD_TRY(read_key(o->key_file, key, err));
    return talk_open_url(o->url, o->name, key[0] ? key : NULL, out, err);
}

static const char *history_path(const options *o, char path[4096]) {
    const char *home = getenv("HOME");
    if (o->history)
        return o->history;
    snprintf(path, 4096, "%s/.orcd_history", home ? home : "");
    return home ? path : NULL;
}

static void catch_interrupts(void) {
    struct sigaction a = {.sa_handler = on_interrupt};
    sigaction(SIGINT, &a, NULL);
}

static int run(const cli_command *c, int argc, char **argv) {
    options o = {.settings = {.sampling = SAMPLING_DEFAULTS, .effort = "medium"}, .engine = ENGINE_DEFAULTS};
    const char *model;
    char path[4096];
    int n_rest;
    if (!cli_parse(c, argc, argv, &o, &model, &n_rest, 1))
        return EXIT_USAGE;
    if (o.url && n_rest)
        return cli_usage(c, "give a MODEL or --url, not both; --name names a server's model");

    orcd_error err = {0};
    orcd_status st = ORCD_OK;
    session s = {.o = &o, .messages = json_array(), .view = {.tty = term_is_tty(STDOUT_FILENO)}};
    s.view.reasoning = s.view.tty && !o.hide_reasoning;
    if (o.tools)
        ORCD_TRY_GOTO(st, done, read_tools(o.tools, &o.settings.tools, &err));
    ORCD_TRY_GOTO(st, done, open_source(&o, n_rest ? model : NULL, &s.source, &err));
    ORCD_TRY_GOTO(st, done, line_open(history_path(&o, path), &s.line, &err));
    set_system(&s, o.system ? o.system : "");
    catch_interrupts();
    if (s.view.tty)
        fprintf(stderr, "%s%s · /help lists commands%s\n", term_dim(), s.source->about, term_off());
    converse(&s);
done:
    line_close(s.line);
    if (s.source)
        s.source->close(s.source);
    json_decref(s.messages);
    json_decref(o.settings.tools);
    free(s.last_reasoning);
    return st == ORCD_OK ? EXIT_OK : cli_fail(&err);
}

const cli_command cmd_chat = {"chat", "[MODEL | --url URL]", "talk with a model on the terminal", option, run};
