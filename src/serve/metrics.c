#include "serve/metrics.h"

static const double bound_ms[METRIC_BUCKETS] = {1,   2,    5,    10,   20,    50,    100,   200,
                                                500, 1000, 2000, 5000, 10000, 30000, 60000, 300000};

static uint64_t get(const atomic_uint_fast64_t *v) { return atomic_load_explicit(v, memory_order_relaxed); }

static void add(atomic_uint_fast64_t *v, uint64_t n) { atomic_fetch_add_explicit(v, n, memory_order_relaxed); }

void metrics_add_ms(histogram *h, double ms) {
    int i = 0;
    while (i < METRIC_BUCKETS && ms > bound_ms[i])
        i++;
    add(&h->bucket[i], 1);
    add(&h->sum_us, ms > 0 ? (uint64_t)(ms * 1000) : 0);
}

static void head(buf *out, const char *name, const char *help, const char *type) {
    buf_printf(out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

void metrics_gauge(buf *out, const char *name, const char *help, double value) {
    head(out, name, help, "gauge");
    buf_printf(out, "%s %.15g\n", name, value);
}

void metrics_counter(buf *out, const char *name, const char *help, double value) {
    head(out, name, help, "counter");
    buf_printf(out, "%s %.15g\n", name, value);
}

void metrics_histogram(buf *out, const char *name, const char *help, const histogram *h) {
    uint64_t n = 0;
    head(out, name, help, "histogram");
    for (int i = 0; i < METRIC_BUCKETS; i++) {
        n += get(&h->bucket[i]);
        buf_printf(out, "%s_bucket{le=\"%g\"} %llu\n", name, bound_ms[i], (unsigned long long)n);
    }
    n += get(&h->bucket[METRIC_BUCKETS]);
    buf_printf(out, "%s_bucket{le=\"+Inf\"} %llu\n%s_sum %.3f\n%s_count %llu\n", name, (unsigned long long)n, name,
               (double)get(&h->sum_us) / 1000, name, (unsigned long long)n);
}

void metrics_print(const metrics *m, buf *out) {
    static const char *const name[N_OUTCOMES] = {"completed", "cancelled", "timeout", "error", "rejected"};
    head(out, "worker_requests_total", "Generations asked for, by how they ended.", "counter");
    for (int i = 0; i < N_OUTCOMES; i++)
        buf_printf(out, "worker_requests_total{outcome=\"%s\"} %llu\n", name[i],
                   (unsigned long long)get(&m->request[i]));
    head(out, "worker_http_responses_total", "HTTP answers by status.", "counter");
    for (int i = 100; i < 600; i++)
        if (get(&m->http_status[i]))
            buf_printf(out, "worker_http_responses_total{code=\"%d\"} %llu\n", i,
                       (unsigned long long)get(&m->http_status[i]));
    metrics_histogram(out, "worker_inference_duration_ms", "From submission to the last token.", &m->duration);
    metrics_histogram(out, "worker_time_to_first_token_ms", "From submission to the first token.", &m->first_token);
    metrics_histogram(out, "worker_inter_token_ms", "Between two tokens of a generation.", &m->inter_token);
    metrics_histogram(out, "worker_queue_ms", "Waiting for a place in the batch.", &m->queue);
}
