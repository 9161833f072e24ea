/* serve/log.h: one line per event on stderr, as JSON or for people. Never a prompt or an output: lengths, counts,
 * hashes. May include base. Thread-safe. */
#ifndef ORCD_SERVE_LOG_H
#define ORCD_SERVE_LOG_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct event_log {
    bool json;
    const char *worker_id; /* goes into every line; may be NULL */
} event_log;

/* Fields as of json_pack's object: log_event(l, "ready", "s:i", "port", port). */
void log_event(const event_log *l, const char *event, const char *fields, ...);

/* What stands for a text in a log: its length and this. */
uint64_t log_hash(const char *text, size_t len);

#endif
