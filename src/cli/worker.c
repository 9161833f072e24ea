/* orcd worker: one model on one device behind the worker contract, started and watched by a pool manager. */
#include <ctype.h>
#include <curl/curl.h>
#include <jansson.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/file.h"
#include "cli/serve_options.h"
#include "serve/http.h"

enum { TRIES = 3, TRY_S = 5 };

typedef struct options {
    const char *worker_id, *model, *gpu_device, *bind, *callback_url, *token_file;
    int64_t port, max_in, max_out, kv_mb;
    double timeout, drain;
    bool log_json;
    engine_options engine;
} options;

static const cli_option option[] = {
    {"worker-id", 0, CLI_STR, offsetof(options, worker_id), 0, 0, "UUID", "name of this worker (required)"},
    {"model", 'm', CLI_STR, offsetof(options, model), 0, 0, "PATH", "GGUF file or Hugging Face folder (required)"},
    {"gpu-device", 0, CLI_STR, offsetof(options, gpu_device), 0, 0, "N|cpu", "the device (required)"},
    {"port", 'p', CLI_INT, offsetof(options, port), 1024, 65535, "N", "port to listen on (required)"},
    {"bind", 0, CLI_STR, offsetof(options, bind), 0, 0, "ADDR", "address (default 127.0.0.1; others need a token)"},
    {"callback-url", 0, CLI_STR, offsetof(options, callback_url), 0, 0, "URL", "told once when the worker is ready"},
    {"max-tokens-in", 0, CLI_INT, offsetof(options, max_in), 1, 1e9, "N", "longest prompt (default: the context)"},
    {"max-tokens-out", 0, CLI_INT, offsetof(options, max_out), 1, 1e9, "N", "longest output (default 2048)"},
    {"inference-timeout-sec", 0, CLI_NUM, offsetof(options, timeout), 0.001, 1e6, "S", "per job (default 300)"},
    {"kv-cache-size-mb", 0, CLI_INT, offsetof(options, kv_mb), 1, 1 << 24, "N", "KV memory (default: by context)"},
    {"token-file", 0, CLI_STR, offsetof(options, token_file), 0, 0, "FILE", "accepted bearer tokens, one a line"},
    {"max-batch", 'b', CLI_INT, offsetof(options, engine.batch), 1, 256, "N", "jobs at once (default 16)"},
    {"drain-sec", 0, CLI_NUM, offsetof(options, drain), 0, 3600, "S", "time for running jobs at the end (default 5)"},
    {"log-json", 0, CLI_FLAG, offsetof(options, log_json), 0, 0, "", "log as JSON"},
    ENGINE_OPTIONS(options, engine),
    {0},
};

/* ---- arguments, all checked before the model is touched ---- */

static bool is_uuid(const char *s) {
    for (int i = 0; i < 36; i++)
        if (i == 8 || i == 13 || i == 18 || i == 23 ? s[i] != '-' : !isxdigit((unsigned char)s[i]))
            return false;
    return s[36] == '\0';
}

/* "cpu", or a number as the engine's "cuda:N". */
static bool device_name(const char *given, char *out, size_t cap) {
    char *end;
    long n = strtol(given, &end, 10);
    if (strcmp(given, "cpu") == 0)
        snprintf(out, cap, "cpu");
    else
        snprintf(out, cap, "cuda:%ld", n);
    return strcmp(given, "cpu") == 0 || (isdigit((unsigned char)*given) && !*end && n < 1024);
}

static orcd_status device_exists(const char *name, orcd_error *err) {
    char kind[16];
    be_params p = {0};
    be_device *d = NULL;
    snprintf(kind, sizeof kind, "%.*s", (int)strcspn(name, ":"), name);
    const be_ops *ops = be_find(kind);
    if (!ops)
        return orcd_fail(err, ORCD_ERR_UNSUPPORTED, "this build of orcd has no %s devices", kind);
    p.device = strchr(name, ':') ? atoi(strchr(name, ':') + 1) : 0;
    ORCD_TRY(ops->open(&p, &d, err));
    ops->close(d);
    return ORCD_OK;
}

static orcd_status model_is_readable(const char *path, orcd_error *err) {
    if (file_is_dir(path) || (file_exists(path) && access(path, R_OK) == 0))
        return ORCD_OK;
    return orcd_fail(err, ORCD_ERR_IO, "%s is no readable file or folder", path);
}

static int check_usage(const cli_command *c, const options *o, char *device, size_t cap) {
    if (!o->worker_id || !o->model || !o->gpu_device || !o->port)
        return cli_usage(c, "--worker-id, --model, --gpu-device and --port are needed");
    if (!is_uuid(o->worker_id))
        return cli_usage(c, "--worker-id takes a UUID, not \"%s\"", o->worker_id);
    if (!device_name(o->gpu_device, device, cap))
        return cli_usage(c, "--gpu-device takes a number or cpu, not \"%s\"", o->gpu_device);
    if (o->callback_url && strncmp(o->callback_url, "http://", 7) != 0 && strncmp(o->callback_url, "https://", 8) != 0)
        return cli_usage(c, "--callback-url takes an http or https URL, not \"%s\"", o->callback_url);
    return EXIT_OK;
}

/* ---- the one outgoing call: ready ---- */

typedef struct callback {
    const event_log *log;
    const char *url;
    char *body;
    pthread_t thread;
    bool started;
    atomic_bool stop;
} callback;

static int stop_transfer(void *ctx, curl_off_t a, curl_off_t b, curl_off_t c, curl_off_t d) {
    (void)a, (void)b, (void)c, (void)d;
    return atomic_load(&((callback *)ctx)->stop);
}

static size_t discard(char *data, size_t size, size_t n, void *ctx) {
    (void)data, (void)ctx;
    return size * n;
}

static bool post_once(callback *cb, char *why, size_t cap) {
    long status = 0;
    CURL *curl = curl_easy_init();
    struct curl_slist *headers = curl_slist_append(NULL, "Content-Type: application/json");
    if (!curl)
        return false;
    curl_easy_setopt(curl, CURLOPT_URL, cb->url);
    curl_easy_setopt(curl, CURLOPT_POSTFIELDS, cb->body);
    curl_easy_setopt(curl, CURLOPT_HTTPHEADER, headers);
    curl_easy_setopt(curl, CURLOPT_PROTOCOLS_STR, "http,https");
    curl_easy_setopt(curl, CURLOPT_TIMEOUT, (long)TRY_S);
    curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, discard);
    curl_easy_setopt(curl, CURLOPT_XFERINFOFUNCTION, stop_transfer);
    curl_easy_setopt(curl, CURLOPT_XFERINFODATA, cb);
    curl_easy_setopt(curl, CURLOPT_NOPROGRESS, 0L);
    CURLcode r = curl_easy_perform(curl);
    curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &status);
    if (r != CURLE_OK)
        snprintf(why, cap, "%s", curl_easy_strerror(r));
    else
        snprintf(why, cap, "HTTP status %ld", status);
    curl_slist_free_all(headers);
    curl_easy_cleanup(curl);
    return r == CURLE_OK && status >= 200 && status < 300;
}

static void *post_callback(void *ctx) {
    callback *cb = ctx;
    char why[200] = "";
    for (int i = 0; i < TRIES && !atomic_load(&cb->stop); i++) {
        if (post_once(cb, why, sizeof why)) {
            log_event(cb->log, "callback", "s:i", "try", i + 1);
            return NULL;
        }
        for (int k = 0; k < 5 << i && !atomic_load(&cb->stop); k++)
            nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
    }
    log_event(cb->log, "error", "s:s, s:s, s:i", "code", "CALLBACK_FAILED", "message", why, "tries", TRIES);
    return NULL;
}

static void callback_start(callback *cb, const options *o, const eng_info *i) {
    char uri[200];
    const char *open = strchr(o->bind, ':') ? "[" : "", *close = *open ? "]" : "";
    snprintf(uri, sizeof uri, "http://%s%s%s:%d", open, o->bind, close, (int)o->port);
    json_t *body = json_pack("{s:s, s:s, s:I, s:s}", "worker_id", o->worker_id, "model_ref", o->model, "vram_bytes",
                             (json_int_t)(i->weight_bytes + i->kv_bytes + i->act_bytes), "uri", uri);
    cb->url = o->callback_url;
    cb->body = json_dumps(body, JSON_COMPACT);
    json_decref(body);
    if (cb->body)
        cb->started = pthread_create(&cb->thread, NULL, post_callback, cb) == 0;
}

static void callback_end(callback *cb) {
    atomic_store(&cb->stop, true);
    if (cb->started)
        pthread_join(cb->thread, NULL);
    free(cb->body);
}

/* ---- start ---- */

typedef struct load_log {
    const event_log *log;
    int told; /* tenths of the whole */
} load_log;

static void load_progress(void *ctx, uint64_t done, uint64_t total) {
    load_log *l = ctx;
    int tenth = total ? (int)(10.0 * (double)done / (double)total) : 10;
    if (tenth <= l->told)
        return;
    l->told = tenth;
    log_event(l->log, "model_load_progress", "s:i", "percent", 10 * tenth);
}

static orcd_status load(const options *o, const char *device, const event_log *log, eng **out, orcd_error *err) {
    load_log progress = {.log = log};
    log_event(log, "model_load_start", "s:s, s:s", "path", o->model, "device", device);
    eng_params p = engine_params(&o->engine, o->model);
    p.need_tokenizer = true;
    p.device = device;
    p.kv_bytes = (uint64_t)o->kv_mb << 20;
    p.progress = load_progress;
    p.progress_ctx = &progress;
    ORCD_TRY(eng_open(&p, out, err));
    const eng_info *i = eng_get_info(*out);
    log_event(log, "model_load_complete", "s:s, s:s, s:I, s:I, s:f, s:f", "architecture", i->arch, "quant_kind",
              i->quant, "weight_bytes", (json_int_t)i->weight_bytes, "kv_bytes", (json_int_t)i->kv_bytes, "seconds",
              i->load_s, "gb_per_second", i->load_gb_s);
    return ORCD_OK;
}

static int fail(const options *o, const event_log *log, const orcd_error *err, bool loading) {
    log_event(log, "error", "s:s, s:s, s:s, s:s", "code",
              err->code == ORCD_ERR_NOMEM    ? "INSUFFICIENT_VRAM"
              : err->code == ORCD_ERR_DEVICE ? "CUDA_ERROR"
              : loading                      ? "MODEL_LOAD_FAILED"
                                             : "INVALID_REQUEST",
              "message", err->message, "device", o->gpu_device, "path", o->model);
    return EXIT_FAILED;
}

static int run(const cli_command *c, int argc, char **argv) {
    options o = {.bind = "127.0.0.1", .timeout = 300, .drain = 5, .engine = ENGINE_DEFAULTS};
    const char *rest;
    char device[32];
    int n_rest, code;
    o.engine.batch = 16;
    if (!cli_parse(c, argc, argv, &o, &rest, &n_rest, 0))
        return EXIT_USAGE;
    if ((code = check_usage(c, &o, device, sizeof device)) != EXIT_OK)
        return code;

    orcd_error err = {0};
    orcd_status st;
    eng *e = NULL;
    server *s = NULL;
    key_list keys = {0};
    callback cb = {0};
    bool loading = false;
    event_log log = {.json = o.log_json, .worker_id = o.worker_id};
    cb.log = &log;
    o.engine.note = note_event;
    o.engine.note_ctx = &log;
    server_block_signals();
    log_event(&log, "startup", "s:s, s:i", "version", ORCD_VERSION, "pid", (int)getpid());
    ORCD_TRY_GOTO(st, done, keys_read(o.token_file, &keys, &err));
    ORCD_TRY_GOTO(st, done, model_is_readable(o.model, &err));
    ORCD_TRY_GOTO(st, done, device_exists(device, &err));
    ORCD_TRY_GOTO(st, done, http_can_listen(o.bind, (int)o.port, keys.key, &err));
    loading = true;
    ORCD_TRY_GOTO(st, done, load(&o, device, &log, &e, &err));
    loading = false;
    const server_params p = {.engine = e,
                             .model_id = eng_get_info(e)->model_name,
                             .host = o.bind,
                             .port = (int)o.port,
                             .key = keys.key,
                             .log = log,
                             .drain_s = o.drain,
                             .worker_id = o.worker_id,
                             .max_in = o.max_in,
                             .max_out = o.max_out,
                             .inference_timeout_s = o.timeout};
    ORCD_TRY_GOTO(st, done, server_open(&p, &s, &err));
    log_event(&log, "ready", "s:s, s:i, s:f", "bind", o.bind, "port", (int)o.port, "load_seconds",
              eng_get_info(e)->load_s);
    if (o.callback_url)
        callback_start(&cb, &o, eng_get_info(e));
    code = serve_until_end(s, e);
done:
    callback_end(&cb);
    if (st != ORCD_OK) {
        code = fail(&o, &log, &err, loading);
        eng_close(e);
    }
    keys_free(&keys);
    return code;
}

const cli_command cmd_worker = {"worker", "--worker-id UUID --model PATH --gpu-device N|cpu --port N",
                                "serve a model to a pool manager (the worker contract)", option, run};
