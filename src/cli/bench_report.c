#include "cli/bench.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "cli/chart.h"

/* ---- table and CSV ---- */

static double share_of(const bench_row *r) { return r->ceiling > 0 ? r->median / r->ceiling : 0; }

static const char *kind_of(const bench_row *r) { return r->decode ? "decode" : "prefill"; }

void bench_print_head(bench_form form, const bench_report *r) {
    char size[32];
    if (form != BENCH_TABLE)
        return;
    printf("%s\n%s; loaded %s in %.2f s (%.1f GB/s)\n", r->model, r->device, human_bytes(r->file_bytes, size),
           r->load_s, 1e-9 * (double)r->file_bytes / r->load_s);
    if (r->read_rate > 0)
        printf("measured here: memory %.1f GB/s, products with %s %.0f G multiply-adds/s\n", r->read_rate * 1e-9,
               q_find(r->mac_type)->name, r->mac_rate * 1e-9);
    printf("\n| %-7s | %6s | %6s | %7s | %12s | %10s | %10s | %-16s |\n", "", "tokens", "depth", "streams",
           "median tok/s", "min", "max", "share of ceiling");
    printf("|---------|-------:|-------:|--------:|-------------:|-----------:|-----------:|------------------|\n");
}

void bench_print_row(bench_form form, const bench_row *r) {
    char share[32] = "";
    if (form != BENCH_TABLE)
        return;
    if (r->ceiling > 0)
        snprintf(share, sizeof share, "%3.0f %% (%s)", 100 * share_of(r), r->by_memory ? "memory" : "products");
    printf("| %-7s | %6d | %6d | %7d | %12.2f | %10.2f | %10.2f | %-16s |\n", kind_of(r), r->tokens, r->depth,
           r->streams, r->median, r->min, r->max, share);
    fflush(stdout);
}

static void print_csv(const bench_report *r) {
    printf("kind,tokens,depth,streams,median_tok_s,min_tok_s,max_tok_s,ceiling_tok_s,share,bound\n");
    for (int i = 0; i < r->n_row; i++) {
        const bench_row *w = &r->row[i];
        printf("%s,%d,%d,%d,%.3f,%.3f,%.3f,%.3f,%.4f,%s\n", kind_of(w), w->tokens, w->depth, w->streams, w->median,
               w->min, w->max, w->ceiling, share_of(w),
               w->ceiling <= 0 ? ""
               : w->by_memory  ? "memory"
                               : "products");
    }
}

/* ---- JSON ---- */

static json_t *json_row(const bench_row *r) {
    json_t *j = json_pack("{s:s, s:i, s:i, s:i, s:f, s:f, s:f, s:f}", "kind", kind_of(r), "tokens", r->tokens, "depth",
                          r->depth, "streams", r->streams, "tok_s", r->median, "min_tok_s", r->min, "max_tok_s", r->max,
                          "best_tok_s", r->max);
    if (r->ceiling > 0)
        json_object_update_new(j, json_pack("{s:f, s:f, s:s}", "ceiling_tok_s", r->ceiling, "share", share_of(r),
                                            "bound", r->by_memory ? "memory" : "products"));
    return j;
}

static void print_json(const bench_report *r) {
    double prefill = 0, decode = 0;
    json_t *rows = json_array();
    for (int i = 0; i < r->n_row; i++) {
        json_array_append_new(rows, json_row(&r->row[i]));
        if (!r->row[i].decode)
            prefill = fmax(prefill, r->row[i].median);
        else if (decode == 0)
            decode = r->row[i].median;
    }
    json_t *j = json_pack("{s:s, s:s, s:o, s:f, s:f, s:f, s:f, s:I, s:I}", "model", r->model, "device", r->device,
                          "results", rows, "prefill_tok_s", prefill, "decode_tok_s", decode, "load_s", r->load_s,
                          "load_gb_s", 1e-9 * (double)r->file_bytes / r->load_s, "device_bytes",
                          (json_int_t)r->device_bytes, "peak_rss_bytes", (json_int_t)peak_rss_bytes());
    if (r->read_rate > 0)
        json_object_set_new(j, "ceilings",
                            json_pack("{s:f, s:f, s:s}", "read_gb_s", r->read_rate * 1e-9, "gmac_s", r->mac_rate * 1e-9,
                                      "product", q_find(r->mac_type)->name));
    json_dumpf(j, stdout, JSON_COMPACT);
    printf("\n");
    json_decref(j);
}

void bench_print_tail(bench_form form, const bench_report *r) {
    char a[32], b[32];
    if (form == BENCH_CSV)
        print_csv(r);
    else if (form == BENCH_JSON)
        print_json(r);
    else if (r->device_bytes)
        printf("\ndevice memory %s, peak resident memory %s\n", human_bytes(r->device_bytes, a),
               human_bytes(peak_rss_bytes(), b));
    else
        printf("\npeak resident memory %s\n", human_bytes(peak_rss_bytes(), b));
}

/* ---- SVG ---- */

typedef enum abscissa { BY_TOKENS, BY_DEPTH, BY_STREAMS } abscissa;

static int value_of(const bench_row *r, abscissa a) {
    return a == BY_TOKENS ? r->tokens : a == BY_DEPTH ? r->depth : r->streams;
}

static bool same_line(const bench_row *a, const bench_row *b, abscissa x) {
    return (x == BY_TOKENS || a->tokens == b->tokens) && (x == BY_DEPTH || a->depth == b->depth) &&
           (x == BY_STREAMS || a->streams == b->streams);
}

static int by_x(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* One line for each set of rows that differ in the abscissa only. */
static void plot_kind(const bench_report *r, bool decode, abscissa x, chart *c, buf *out) {
    static const char *const label[] = {"prompt tokens", "positions before", "streams"};
    bool drawn[BENCH_MAX_ROWS] = {false};
    c->title = decode ? "decode, tokens a second" : "prefill, tokens a second";
    c->x_label = label[x];
    c->y_label = "median";
    c->x0 = INFINITY;
    for (int i = 0; i < r->n_row; i++)
        if (r->row[i].decode == decode) {
            c->x0 = fmin(c->x0, value_of(&r->row[i], x));
            c->x1 = fmax(c->x1, value_of(&r->row[i], x));
            c->y1 = fmax(c->y1, 1.15 * r->row[i].median); /* room for the legend */
        }
    chart_begin(c, out);
    for (int i = 0; i < r->n_row; i++) {
        double point[BENCH_MAX_ROWS][2], px[BENCH_MAX_ROWS], py[BENCH_MAX_ROWS];
        int n = 0;
        char name[96];
        if (drawn[i] || r->row[i].decode != decode)
            continue;
        for (int k = i; k < r->n_row; k++)
            if (r->row[k].decode == decode && !drawn[k] && same_line(&r->row[i], &r->row[k], x)) {
                drawn[k] = true;
                point[n][0] = value_of(&r->row[k], x);
                point[n++][1] = r->row[k].median;
            }
        qsort(point, (size_t)n, sizeof *point, by_x);
        for (int k = 0; k < n; k++) {
            px[k] = point[k][0];
            py[k] = point[k][1];
        }
        if (x == BY_STREAMS)
            snprintf(name, sizeof name, "depth %d", r->row[i].depth);
        else if (x == BY_DEPTH)
            snprintf(name, sizeof name, "%d stream%s", r->row[i].streams, r->row[i].streams > 1 ? "s" : "");
        else
            snprintf(name, sizeof name, "depth %d, %d stream%s", r->row[i].depth, r->row[i].streams,
                     r->row[i].streams > 1 ? "s" : "");
        chart_line(c, out, px, py, n, true, name);
    }
    chart_end(out);
}

orcd_status bench_plot(const bench_report *r, const char *path, orcd_error *err) {
    bool kind[2] = {false, false}, depths = false;
    const bench_row *first = NULL;
    buf out = {0};
    for (int i = 0; i < r->n_row; i++) {
        kind[r->row[i].decode] = true;
        if (r->row[i].decode && !first)
            first = &r->row[i];
        depths = depths || (r->row[i].decode && r->row[i].depth != first->depth);
    }
    chart_page(&out, kind[0] + kind[1]);
    if (kind[0])
        plot_kind(r, false, BY_TOKENS, &(chart){0}, &out);
    if (kind[1])
        plot_kind(r, true, depths ? BY_DEPTH : BY_STREAMS, &(chart){.place = kind[0]}, &out);
    chart_end(&out);
    orcd_status st = cli_write_text(path, &out, err);
    buf_free(&out);
    return st;
}
