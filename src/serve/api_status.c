/* What the server says about itself: /health and /metrics from cached state only, /v1/models. */
#include <time.h>

#include "serve/job.h"

#define STUCK_S 2 /* an engine thread that was not seen for this long is unhealthy */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static uint64_t vram(const server *s) { return s->info->weight_bytes + s->info->kv_bytes + s->info->act_bytes; }

void api_health(http_exchange *x, void *ctx) {
    server *s = ctx;
    eng_stats e;
    eng_get_stats(s->engine, &e);
    bool healthy = !e.failed && e.resident && e.heartbeat_age_s < STUCK_S;
    const char *state = e.failed                     ? "failed"
                        : atomic_load(&s->draining)  ? "draining"
                        : e.n_running || e.n_waiting ? "busy"
                                                     : "ready";
    json_t *o =
        json_pack("{s:s, s:s, s:s?, s:s, s:s, s:b, s:s, s:I, s:s?, s:i, s:i, s:f, s:s, s:i, s:i, s:i}", "status",
                  healthy ? "healthy" : "unhealthy", "state", state, "worker_id", s->p.worker_id, "model",
                  s->p.model_id, "architecture", s->info->arch, "resident", e.resident, "quant_kind", s->info->quant,
                  "vram_bytes_used", (json_int_t)vram(s), "tokenizer_kind",
                  !s->tok                              ? NULL
                  : tok_kind_of(s->tok) == TOK_HF_JSON ? "hf-json"
                                                       : "gguf-bpe",
                  "vocab_size", s->info->n_vocab, "context_length", s->info->n_ctx, "uptime_seconds", now() - s->t0,
                  "device", s->info->device, "running", e.n_running, "waiting", e.n_waiting, "max_batch", e.max_batch);
    http_reply_json(x, healthy ? 200 : 503, o, NULL);
}

static void print_work(const eng_work work[ENG_N_WORK], buf *out) {
    static const char *const kind[ENG_N_WORK] = {
        [ENG_DECODE] = "decode", [ENG_PREFILL] = "prefill", [ENG_MIXED] = "mixed"};
    buf_str(out, "# HELP worker_engine_work_total Steps by what they carried: steps, rows of decoding and of prompts, "
                 "seconds.\n# TYPE worker_engine_work_total counter\n");
    for (int i = 0; i < ENG_N_WORK; i++) {
        const double v[] = {(double)work[i].n_steps, (double)work[i].n_decode, (double)work[i].n_prefill, work[i].s};
        static const char *const of[] = {"steps", "decode_rows", "prompt_rows", "seconds"};
        for (size_t k = 0; k < ORCD_COUNT(of); k++)
            buf_printf(out, "worker_engine_work_total{kind=\"%s\",of=\"%s\"} %.15g\n", kind[i], of[k], v[k]);
    }
}

static void print_engine(const server *s, const eng_stats *e, buf *out) {
    static const char *const pool[BE_N_POOLS] = {[BE_POOL_FULL] = "full", [BE_POOL_WINDOW] = "window"};
    const arch_config *cfg = eng_config(s->engine);
    metrics_gauge(out, "worker_vram_bytes", "Device memory of weights, KV and activations.", (double)vram(s));
    metrics_gauge(out, "worker_uptime_seconds", "Since the server began to listen.", now() - s->t0);
    metrics_gauge(out, "worker_healthy", "1 while the engine thread is seen at least every 2 s.",
                  !e->failed && e->heartbeat_age_s < STUCK_S);
    metrics_gauge(out, "worker_active_experts", "Experts that compute per token and layer, 0 = a dense model.",
                  cfg->n_expert_used);
    metrics_gauge(out, "worker_queue_depth", "Generations that wait for a place in the batch.", e->n_waiting);
    metrics_gauge(out, "worker_batch_size", "Generations in the batch.", e->n_running);
    metrics_gauge(out, "worker_batch_capacity", "Places in the batch.", e->max_batch);
    metrics_counter(out, "worker_tokens_in_total", "Prompt tokens taken, cached ones included.",
                    (double)e->n_tokens_in);
    metrics_counter(out, "worker_tokens_cached_total", "Prompt tokens that the prefix cache had.",
                    (double)e->n_tokens_cached);
    metrics_counter(out, "worker_tokens_generated_total", "Tokens generated.", (double)e->n_tokens_out);
    metrics_counter(out, "worker_preemptions_total",
                    "Generations that gave up their KV pages to older ones for a while.", (double)e->n_preempted);
    metrics_counter(out, "worker_prefix_cache_lookups_total", "Prompts looked up in the prefix cache.",
                    (double)e->cache_lookups);
    metrics_counter(out, "worker_prefix_cache_hits_total", "Prompts of which it had a part.", (double)e->cache_hits);
    metrics_counter(out, "worker_engine_steps_total", "Steps of the engine.", (double)e->n_steps);
    metrics_counter(out, "worker_engine_step_seconds_total", "Time in steps.", e->step_s);
    metrics_counter(out, "worker_engine_forward_seconds_total", "Of it, in the model.", e->forward_s);
    metrics_counter(out, "worker_engine_callback_seconds_total", "Of it, making and queueing answers.", e->callback_s);
    print_work(e->work, out);
    buf_str(out, "# HELP worker_kv_pages Pages of the KV memory.\n# TYPE worker_kv_pages gauge\n");
    for (int i = 0; i < BE_N_POOLS; i++)
        buf_printf(out,
                   "worker_kv_pages{pool=\"%s\",state=\"used\"} %d\nworker_kv_pages{pool=\"%s\",state=\"cached\"} %d\n"
                   "worker_kv_pages{pool=\"%s\",state=\"total\"} %d\n",
                   pool[i], e->pages_used[i], pool[i], e->pages_cached[i], pool[i], e->pages_total[i]);
}

void api_metrics(http_exchange *x, void *ctx) {
    server *s = ctx;
    eng_stats e;
    buf out = {0};
    eng_get_stats(s->engine, &e);
    print_engine(s, &e, &out);
    metrics_print(&s->metrics, &out);
    if (out.failed)
        http_reply_error(x, 503, NULL, "out_of_memory", NULL, "out of memory");
    else
        http_reply(x, 200, "text/plain; version=0.0.4; charset=utf-8", out.data, out.len, NULL);
    buf_free(&out);
}

void api_models(http_exchange *x, void *ctx) {
    server *s = ctx;
    json_t *model = json_pack("{s:s, s:s, s:I, s:s, s:i, s:i}", "id", s->p.model_id, "object", "model", "created",
                              (json_int_t)s->created, "owned_by", "orcd", "max_model_len", s->info->n_ctx,
                              "context_length", s->info->n_ctx);
    http_reply_json(x, 200, json_pack("{s:s, s:[o]}", "object", "list", "data", model), NULL);
}
