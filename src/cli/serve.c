/* orcd serve: one model behind HTTP. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/serve_options.h"
#include "serve/http.h"

typedef struct options {
    const char *host, *api_key_file, *tls_cert, *tls_key, *name;
    int64_t port, max_reasoning;
    double drain;
    bool log_json;
    engine_options engine;
} options;

static const cli_option option[] = {
    {"host", 0, CLI_STR, offsetof(options, host), 0, 0, "ADDR", "address to listen on (default 127.0.0.1)"},
    {"port", 'p', CLI_INT, offsetof(options, port), 0, 65535, "N", "port (default 8080; 0 = any free one)"},
    {"api-key-file", 0, CLI_STR, offsetof(options, api_key_file), 0, 0, "FILE", "accepted keys, one a line"},
    {"max-batch", 'b', CLI_INT, offsetof(options, engine.batch), 1, 256, "N", "requests at once (default 16)"},
    {"name", 0, CLI_STR, offsetof(options, name), 0, 0, "ID", "model id that clients see (default: the file's name)"},
    {"max-reasoning-tokens", 0, CLI_INT, offsetof(options, max_reasoning), 0, 1 << 20, "N",
     "reasoning per answer before the model must answer (default 0: no limit)"},
    {"tls-cert", 0, CLI_STR, offsetof(options, tls_cert), 0, 0, "FILE", "certificate chain (PEM)"},
    {"tls-key", 0, CLI_STR, offsetof(options, tls_key), 0, 0, "FILE", "its private key (PEM)"},
    {"drain-sec", 0, CLI_NUM, offsetof(options, drain), 0, 3600, "S",
     "time for running requests at the end (default 5)"},
    {"log-json", 0, CLI_FLAG, offsetof(options, log_json), 0, 0, "", "log as JSON"},
    ENGINE_OPTIONS(options, engine),
    {0},
};

static void print_ready(const options *o, const eng_info *i, const server *s, const char *id) {
    char memory[192], ctx[32];
    const char *scheme = o->tls_cert ? "https" : "http";
    int port = server_port(s);
    printf("model    %s: %s, %s\n", id, i->arch, i->quant);
    printf("device   %s\n", i->device);
    printf("memory   %s\n", memory_line(i, memory, sizeof memory));
    printf("context  %s tokens, %d requests at once%s\n", human_count((uint64_t)i->n_ctx, ctx), i->max_batch,
           i->has_harmony ? "" : "; no chat format: completions only");
    printf("ready    %s://%s:%d/v1 after %.1f s (weights at %.1f GB/s); key: %s\n", scheme, o->host, port, i->load_s,
           i->load_gb_s, o->api_key_file ? "needed" : "none (loopback only)");
    printf("try      python3 -c \"from openai import OpenAI; c = OpenAI(base_url='%s://%s:%d/v1', api_key='%s'); "
           "print(c.%s)\"\n",
           scheme, o->host, port, o->api_key_file ? "KEY" : "none",
           i->has_harmony ? "chat.completions.create(model='orcd', messages=[{'role': 'user', 'content': 'Hello'}])"
                          : "completions.create(model='orcd', prompt='Hello')");
    fflush(stdout);
}

static int run(const cli_command *c, int argc, char **argv) {
    options o = {.host = "127.0.0.1", .port = 8080, .drain = 5, .engine = ENGINE_DEFAULTS};
    const char *model;
    int n_rest;
    o.engine.batch = 16;
    if (!cli_parse(c, argc, argv, &o, &model, &n_rest, 1))
        return EXIT_USAGE;

    orcd_error err = {0};
    orcd_status st;
    eng *e = NULL;
    server *s = NULL;
    key_list keys = {0};
    char *cert = NULL, *key = NULL;
    event_log log = {.json = o.log_json};
    o.engine.note = note_event;
    o.engine.note_ctx = &log;
    server_block_signals();
    ORCD_TRY_GOTO(st, done, keys_read(o.api_key_file, &keys, &err));
    ORCD_TRY_GOTO(st, done, tls_read(o.tls_cert, o.tls_key, &cert, &key, &err));
    ORCD_TRY_GOTO(st, done, http_can_listen(o.host, (int)o.port, keys.key, &err));
    ORCD_TRY_GOTO(st, done, open_engine(&o.engine, n_rest ? model : NULL, true, &e, &err));
    const char *id = o.name ? o.name : eng_get_info(e)->model_name;
    const server_params p = {.engine = e,
                             .model_id = id,
                             .host = o.host,
                             .port = (int)o.port,
                             .key = keys.key,
                             .tls_cert = cert,
                             .tls_key = key,
                             .log = log,
                             .max_reasoning = o.max_reasoning,
                             .drain_s = o.drain};
    ORCD_TRY_GOTO(st, done, server_open(&p, &s, &err));
    print_ready(&o, eng_get_info(e), s, id);
done:;
    int code = st == ORCD_OK ? serve_until_end(s, e) : cli_fail(&err);
    if (st != ORCD_OK)
        eng_close(e);
    keys_free(&keys);
    free(cert);
    free(key);
    return code;
}

const cli_command cmd_serve = {"serve", "[MODEL]", "serve a model over HTTP to OpenAI's clients", option, run};
