/* cli/pull.c: `orcd pull`: a model from the Hugging Face hub into the cache. */
#include "cli/cache.h"
#include "cli/cli.h"

#include <ctype.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"

typedef struct options {
    const char *hub, *cache, *token_file;
    int64_t connections, retries, timeout;
    bool quiet, json;
} options;

static const cli_option option[] = {
    {"cache", 0, CLI_STR, offsetof(options, cache), 0, 0, "DIR", "where models lie (default ~/.cache/orcd)"},
    {"token-file", 0, CLI_STR, offsetof(options, token_file), 0, 0, "FILE", "a token of the hub, for private models"},
    {"hub", 0, CLI_STR, offsetof(options, hub), 0, 0, "URL", "another hub (default " HUB_URL ")"},
    {"connections", 0, CLI_INT, offsetof(options, connections), 1, 64, "N", "ranges fetched together (default 8)"},
    {"retries", 0, CLI_INT, offsetof(options, retries), 0, 100, "N", "tries after a failed request (default 5)"},
    {"timeout", 0, CLI_INT, offsetof(options, timeout), 1, 3600, "S", "seconds of silence that are one (default 30)"},
    {"json", 0, CLI_FLAG, offsetof(options, json), 0, 0, "", "print one JSON object"},
    {"quiet", 'q', CLI_FLAG, offsetof(options, quiet), 0, 0, "", "print nothing but the model's path"},
    {0},
};

typedef struct screen {
    bar b;
    bool begun, quiet;
} screen;

static volatile sig_atomic_t interrupted;

static void on_interrupt(int sig) { interrupted = sig; }

static bool stopped(void *ctx) {
    (void)ctx;
    return interrupted != 0;
}

static void progress(void *ctx, uint64_t done, uint64_t total) {
    screen *s = ctx;
    if (!s->begun)
        s->b.first = done;
    s->begun = true;
    bar_update(&s->b, done, total);
}

static void note(void *ctx, const char *sentence) {
    screen *s = ctx;
    bar_end(&s->b);
    if (!s->quiet)
        fprintf(stderr, "orcd: %s\n", sentence);
}

/* The first word of the file. */
static orcd_status read_token(const char *path, char **token, orcd_error *err) {
    enum { LONGEST = 4096 };
    size_t len;
    ORCD_TRY(file_slurp(path, LONGEST, token, &len, err));
    size_t n = 0;
    while (n < len && isgraph((unsigned char)(*token)[n]))
        n++;
    (*token)[n] = '\0';
    if (n)
        return ORCD_OK;
    free(*token);
    *token = NULL;
    return orcd_fail(err, ORCD_ERR_FORMAT, "%s does not begin with a token", path);
}

static void print_result(const options *o, const hub_pulled *r, double seconds) {
    char all[32], some[32], rate[32];
    if (o->json) {
        json_t *j = json_pack("{s:s, s:s, s:i, s:I, s:i, s:I, s:f}", "name", r->name, "path", r->path, "files",
                              r->n_file, "bytes", (json_int_t)r->bytes, "fetched_files", r->n_fetched, "fetched_bytes",
                              (json_int_t)r->bytes_fetched, "seconds", seconds);
        json_dumpf(j, stdout, JSON_INDENT(1));
        printf("\n");
        json_decref(j);
        return;
    }
    const char *plural = r->n_file == 1 ? "" : "s";
    human_bytes(r->bytes, all);
    if (!o->quiet && r->n_fetched)
        fprintf(stderr, "%s: %d file%s, %s, every hash as the hub has it; %s fetched in %.1f s (%s/s)\n", r->name,
                r->n_file, plural, all, human_bytes(r->bytes_fetched, some), seconds,
                human_bytes((uint64_t)((double)r->bytes_fetched / (seconds + 1e-9)), rate));
    else if (!o->quiet)
        fprintf(stderr, "%s: %d file%s, %s: all here already\n", r->name, r->n_file, plural, all);
    printf("%s\n", r->path);
}

static int run(const cli_command *c, int argc, char **argv) {
    options o = {.hub = HUB_URL, .connections = 8, .retries = 5, .timeout = 30};
    const char *rest[1];
    int n_rest;
    if (!cli_parse(c, argc, argv, &o, rest, &n_rest, 1))
        return EXIT_USAGE;
    if (n_rest < 1)
        return cli_usage(c, "a model is needed: OWNER/REPO, OWNER/REPO:FILE, gpt-oss-20b, gpt-oss-120b or gpt2");
    char cache[HUB_PATH], hub[1024], *token = NULL;
    orcd_error err = {0};
    orcd_status st;
    hub_pulled r;
    screen s = {.quiet = o.quiet};
    struct sigaction sa = {.sa_handler = on_interrupt};
    snprintf(hub, sizeof hub, "%s", o.hub);
    for (size_t n = strlen(hub); n && hub[n - 1] == '/'; n--)
        hub[n - 1] = '\0';
    ORCD_TRY_GOTO(st, done, cli_cache_dir(o.cache, cache, sizeof cache, &err));
    if (o.token_file)
        ORCD_TRY_GOTO(st, done, read_token(o.token_file, &token, &err));
    hub_params p = {.url = hub,
                    .cache = cache,
                    .token = token,
                    .n_conn = (int)o.connections,
                    .retries = (int)o.retries,
                    .stall_s = (int)o.timeout,
                    .progress = progress,
                    .note = note,
                    .stopped = stopped,
                    .ctx = &s};
    sigaction(SIGINT, &sa, NULL);
    sigaction(SIGTERM, &sa, NULL);
    double t0 = now_s();
    bar_begin(&s.b, "fetching", "B");
    st = hub_pull(&p, rest[0], &r, &err);
    bar_end(&s.b);
    if (st == ORCD_OK)
        print_result(&o, &r, now_s() - t0);
done:
    free(token);
    return st == ORCD_OK ? EXIT_OK : cli_fail(&err);
}

const cli_command cmd_pull = {"pull", "OWNER/REPO[:FILE]", "fetch a model from the Hugging Face hub", option, run};
