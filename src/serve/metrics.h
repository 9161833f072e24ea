/* serve/metrics.h: counters and histograms of the server, and their Prometheus text. Every function may be called from
 * any thread and takes no lock. May include base. */
#ifndef ORCD_SERVE_METRICS_H
#define ORCD_SERVE_METRICS_H

#include <stdatomic.h>
#include <stdint.h>

#include "base/buf.h"

#define METRIC_BUCKETS 16

typedef struct histogram { /* of milliseconds */
    atomic_uint_fast64_t bucket[METRIC_BUCKETS + 1];
    atomic_uint_fast64_t sum_us;
} histogram;

typedef enum outcome { /* of a generation that was asked for */
                       OUTCOME_COMPLETED,
                       OUTCOME_CANCELLED,
                       OUTCOME_TIMEOUT,
                       OUTCOME_ERROR,
                       OUTCOME_REJECTED, /* queue full, draining, invalid */
                       N_OUTCOMES
} outcome;

typedef struct metrics {
    atomic_uint_fast64_t request[N_OUTCOMES];
    atomic_uint_fast64_t http_status[600];
    histogram duration, first_token, inter_token, queue;
} metrics;

void metrics_add_ms(histogram *h, double ms);

void metrics_gauge(buf *out, const char *name, const char *help, double value);
void metrics_counter(buf *out, const char *name, const char *help, double value);
void metrics_histogram(buf *out, const char *name, const char *help, const histogram *h);
/* Requests by outcome, HTTP answers by status, the histograms. */
void metrics_print(const metrics *m, buf *out);

#endif
