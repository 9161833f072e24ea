/* cli/run.c: `orcd run`: continue a text (or token ids) on the terminal. */
#include "cli/cli.h"

#include <jansson.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/file.h"
#include "cli/engine_options.h"
#include "engine/engine.h"
#include "text/stop.h"

typedef struct options {
    engine_options engine;
    sampling_options sampling;
    const char *prompt, *file, *ids;
    int64_t n;
    bool json, specials, ignore_eos;
    cli_strs stop;
} options;

static const cli_option option[] = {
    {"prompt", 'p', CLI_STR, offsetof(options, prompt), 0, 0, "TEXT", "text to continue"},
    {"file", 'f', CLI_STR, offsetof(options, file), 0, 0, "FILE", "read the text from a file (- is standard input)"},
    {"ids", 0, CLI_STR, offsetof(options, ids), 0, 0, "FILE.i32", "continue little-endian int32 token ids"},
    {"n", 'n', CLI_INT, offsetof(options, n), 0, 1 << 20, "N",
     "tokens to write (default 256; 0 = to the context's end)"},
    {"stop", 0, CLI_STRS, offsetof(options, stop), 0, 0, "TEXT", "end before this text; may be repeated"},
    {"ignore-eos", 0, CLI_FLAG, offsetof(options, ignore_eos), 0, 0, "", "go on past the end-of-text token"},
    {"specials", 0, CLI_FLAG, offsetof(options, specials), 0, 0, "", "read and print control tokens such as <|start|>"},
    {"json", 0, CLI_FLAG, offsetof(options, json), 0, 0, "", "print one JSON object instead of text"},
    SAMPLING_OPTIONS(options, sampling),
    ENGINE_OPTIONS(options, engine),
    {0},
};

typedef struct job {
    const options *o;
    const tok *tok;
    tok_stream utf8;
    stop_set *stops;
    buf fresh, text; /* text just made whole; everything printed */
    ids out;
    int stop_matched;
    bar bar;
    bool prefilled;
    eng_result result;
    sem_t done;
} job;

static volatile sig_atomic_t interrupted;

static void on_interrupt(int sig) {
    (void)sig;
    if (interrupted)
        _exit(130); /* the second one does not wait */
    interrupted = 1;
}

static void emit(job *j, buf *b) {
    if (!b->len)
        return;
    buf_add(&j->text, b->data, b->len);
    if (!j->o->json) {
        fwrite(b->data, 1, b->len, stdout);
        fflush(stdout);
    }
    buf_clear(b);
}

static void on_prefill(void *ctx, int32_t done, int32_t total) {
    job *j = ctx;
    bar_update(&j->bar, (uint64_t)done, (uint64_t)total);
}

static eng_verdict on_token(void *ctx, const eng_token *t) {
    job *j = ctx;
    const eng_verdict go = {ENG_GO, NULL, 0}, end = {ENG_END, NULL, 0};
    if (!j->prefilled)
        bar_end(&j->bar);
    j->prefilled = true;
    ids_push(&j->out, t->id);
    if (!j->tok || (tok_is_special(j->tok, t->id) && !j->o->specials))
        return go;
    size_t len;
    const char *bytes = tok_bytes(j->tok, t->id, &len);
    buf whole = {0};
    tok_stream_push(&j->utf8, bytes, len, &whole);
    if (whole.len)
        j->stop_matched = stop_push(j->stops, whole.data, whole.len, &j->fresh);
    buf_free(&whole);
    emit(j, &j->fresh);
    return j->stop_matched >= 0 ? end : go;
}

static void on_done(void *ctx, const eng_result *r) {
    job *j = ctx;
    j->result = *r;
    sem_post(&j->done);
}

static void finish_text(job *j) {
    buf rest = {0};
    bar_end(&j->bar);
    tok_stream_end(&j->utf8, &rest);
    if (rest.len && j->stop_matched < 0)
        stop_push(j->stops, rest.data, rest.len, &j->fresh);
    stop_flush(j->stops, &j->fresh);
    emit(j, &j->fresh);
    buf_free(&rest);
}

static orcd_status read_prompt(const options *o, const char *operand, const tok *t, ids *prompt, orcd_error *err) {
    if (o->ids)
        return cli_read_ids(o->ids, prompt, err);
    char *from_file = NULL;
    size_t len;
    const char *text = o->prompt ? o->prompt : operand ? operand : "Once upon a time";
    if (o->file)
        ORCD_TRY(cli_read_text(o->file, &from_file, &len, err));
    else
        len = strlen(text);
    orcd_status st = tok_encode(t, from_file ? from_file : text, len, o->specials, prompt);
    free(from_file);
    if (st != ORCD_OK)
        return orcd_fail(err, st, "the text could not be encoded: %s", orcd_status_name(st));
    if (prompt->n == 0 && tok_bos(t) >= 0)
        ids_push(prompt, tok_bos(t));
    if (prompt->n == 0)
        return orcd_fail(err, ORCD_ERR_ARG,
                         "the text is empty and the model has no begin-of-text token; give some text");
    return ORCD_OK;
}

static const char *stop_name(const job *j) {
    static const char *const name[] = {[ENG_STOP_EOS] = "eos",           [ENG_STOP_LENGTH] = "length",
                                       [ENG_STOP_CALLER] = "stop",       [ENG_STOP_CANCELLED] = "cancelled",
                                       [ENG_STOP_DEADLINE] = "deadline", [ENG_STOP_ERROR] = "error"};
    return name[j->result.stop];
}

static double rate(double n, double s) { return s > 0 ? n / s : 0; }

static void print_json(const job *j, const eng_info *info) {
    const eng_result *r = &j->result;
    json_t *id = json_array();
    for (size_t i = 0; i < j->out.n; i++)
        json_array_append_new(id, json_integer(j->out.data[i]));
    json_t *o = json_pack(
        "{s:s, s:s%, s:o, s:i, s:i, s:i, s:s, s:I, s:f, s:f, s:f, s:f, s:I}", "model", info->model_name, "text",
        j->text.data ? j->text.data : "", j->text.len, "ids", id, "prompt_tokens", (int)r->n_prompt, "cached_tokens",
        (int)r->n_cached, "tokens", (int)r->n_new, "stop", stop_name(j), "seed", (json_int_t)r->seed, "prefill_tok_s",
        rate(r->n_prompt - r->n_cached, r->prefill_s), "decode_tok_s", rate(r->n_new - 1, r->decode_s), "load_s",
        info->load_s, "load_gb_s", info->load_gb_s, "peak_bytes", (json_int_t)peak_rss_bytes());
    json_dumpf(o, stdout, JSON_REAL_PRECISION(6));
    printf("\n");
    json_decref(o);
}

static void print_summary(const job *j) {
    char in[32], out[32], peak[32];
    const eng_result *r = &j->result;
    printf("%s", j->text.len && j->text.data[j->text.len - 1] == '\n' ? "" : "\n");
    fflush(stdout);
    fprintf(stderr, "%s%s tokens in · %s out · prefill %.1f tok/s · decode %.1f tok/s · peak %s · seed %llu%s\n",
            term_dim(), human_count((uint64_t)r->n_prompt, in), human_count((uint64_t)r->n_new, out),
            rate(r->n_prompt - r->n_cached, r->prefill_s), rate(r->n_new - 1, r->decode_s),
            human_bytes(peak_rss_bytes(), peak), (unsigned long long)r->seed, term_off());
}

/* A GPU's memory is planned: what the model took of it. */
static void print_memory(const eng_info *i) {
    char line[192];
    if (strncmp(i->device, "cuda", 4) == 0)
        fprintf(stderr, "%s%s%s\n", term_dim(), memory_line(i, line, sizeof line), term_off());
}

static orcd_status generate(const options *o, eng *e, job *j, const ids *prompt, orcd_error *err) {
    eng_ticket ticket;
    eng_request r = {.prompt = prompt->data,
                     .n_prompt = prompt->n,
                     .max_new = (int32_t)o->n,
                     .sampling = sampling_of(&o->sampling),
                     .has_seed = o->sampling.seed.given,
                     .ignore_eos = o->ignore_eos,
                     .top_logprobs = -1,
                     .on_token = on_token,
                     .on_prefill = on_prefill,
                     .on_done = on_done,
                     .ctx = j};
    bar_begin(&j->bar, "prefill", "tok");
    signal(SIGINT, on_interrupt);
    ORCD_TRY(eng_submit(e, &r, &ticket, err));
    struct timespec until;
    do {
        if (interrupted)
            eng_cancel(e, ticket);
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += 50 * 1000 * 1000;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
    } while (sem_timedwait(&j->done, &until) != 0);
    finish_text(j);
    if (j->result.stop == ENG_STOP_ERROR) {
        *err = j->result.error;
        return err->code;
    }
    return ORCD_OK;
}

/* One operand is the model when it is a path, else the text; two are both. */
static void split_operands(const char **rest, int n_rest, const char **model, const char **text) {
    *model = n_rest == 2 ? rest[0] : NULL;
    *text = n_rest == 2 ? rest[1] : NULL;
    if (n_rest != 1)
        return;
    const char *dot = strrchr(rest[0], '.');
    bool looks_like_path = file_exists(rest[0]) || (dot && strcmp(dot, ".gguf") == 0);
    *(looks_like_path ? model : text) = rest[0];
}

static int run(const cli_command *c, int argc, char **argv) {
    options o = {.n = 256, .engine = ENGINE_DEFAULTS, .sampling = SAMPLING_DEFAULTS};
    const char *rest[2], *model, *text;
    int n_rest;
    if (!cli_parse(c, argc, argv, &o, rest, &n_rest, 2))
        return EXIT_USAGE;
    split_operands(rest, n_rest, &model, &text);
    if (!!o.prompt + !!o.file + !!o.ids + !!text > 1)
        return cli_usage(c, "give the text once: as -p, --file, --ids or an operand");

    orcd_error err = {0};
    orcd_status st;
    eng *e = NULL;
    ids prompt = {0};
    job j = {.o = &o, .stop_matched = -1};
    sem_init(&j.done, 0, 0);
    ORCD_TRY_GOTO(st, done, stop_open(o.stop.s, (size_t)o.stop.n, &j.stops));
    ORCD_TRY_GOTO(st, done, open_engine(&o.engine, model, !o.ids, &e, &err));
    print_memory(eng_get_info(e));
    j.tok = eng_tok(e);
    ORCD_TRY_GOTO(st, done, read_prompt(&o, text, j.tok, &prompt, &err));
    if (!o.json && !o.ids && !o.file && term_is_tty(STDOUT_FILENO))
        printf("%s%s%s", term_bold(), o.prompt ? o.prompt : text ? text : "Once upon a time", term_off());
    ORCD_TRY_GOTO(st, done, generate(&o, e, &j, &prompt, &err));
    if (o.json)
        print_json(&j, eng_get_info(e));
    else
        print_summary(&j);
done:
    eng_close(e);
    stop_close(j.stops);
    ids_free(&prompt);
    ids_free(&j.out);
    buf_free(&j.fresh);
    buf_free(&j.text);
    return st == ORCD_OK ? EXIT_OK : cli_fail(&err);
}

const cli_command cmd_run = {"run", "[MODEL] [-p TEXT | TEXT]", "continue a text", option, run};
