#include "serve/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/buf.h"

static void now_iso(char out[40]) {
    struct timespec t;
    struct tm utc;
    char seconds[24];
    clock_gettime(CLOCK_REALTIME, &t);
    gmtime_r(&t.tv_sec, &utc);
    strftime(seconds, sizeof seconds, "%Y-%m-%dT%H:%M:%S", &utc);
    snprintf(out, 40, "%s.%03dZ", seconds, (int)(t.tv_nsec / 1000000));
}

/* "2026-01-31T10:00:00.000Z execute_end job_id=... tokens_out=12" */
static void plain_line(buf *line, const char *time, const char *event, json_t *o) {
    const char *key;
    json_t *v;
    buf_printf(line, "%s %s", time, event);
    json_object_foreach(o, key, v) {
        char *text = json_dumps(v, JSON_COMPACT | JSON_ENCODE_ANY | JSON_REAL_PRECISION(6));
        buf_printf(line, " %s=%s", key, text ? text : "?");
        free(text);
    }
}

static void json_line(buf *line, const event_log *l, const char *time, const char *event, json_t *o) {
    json_t *all = json_pack("{s:s, s:s}", "time", time, "event", event);
    if (l->worker_id)
        json_object_set_new(all, "worker_id", json_string(l->worker_id));
    json_object_update(all, o);
    char *text = json_dumps(all, JSON_COMPACT | JSON_REAL_PRECISION(6));
    buf_str(line, text ? text : "{}");
    free(text);
    json_decref(all);
}

void log_event(const event_log *l, const char *event, const char *fields, ...) {
    char time[40], format[128];
    buf line = {0};
    va_list args;
    snprintf(format, sizeof format, "{%s}", fields);
    va_start(args, fields);
    json_t *o = json_vpack_ex(NULL, 0, format, args);
    va_end(args);
    now_iso(time);
    if (l->json)
        json_line(&line, l, time, event, o);
    else
        plain_line(&line, time, event, o);
    buf_char(&line, '\n');
    if (!line.failed)
        fwrite(line.data, 1, line.len, stderr);
    buf_free(&line);
    json_decref(o);
}

uint64_t log_hash(const char *text, size_t len) {
    uint64_t h = 0xcbf29ce484222325u; /* FNV-1a */
    for (size_t i = 0; i < len; i++)
        h = (h ^ (unsigned char)text[i]) * 0x100000001b3u;
    return h;
}
