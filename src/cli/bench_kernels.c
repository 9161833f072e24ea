/* `orcd bench --kernels`: how fast a device multiplies with each weight type: one row of activations, where the weights
 * must be read at every step, and 64, where reading them counts for little. */
#include "cli/bench.h"

#include <jansson.h>
#include <stdio.h>

enum { N_COL = 3072, ROWS = 64 };

static void print_line(bench_form form, const q_traits *q, const be_product *p, double read_rate, json_t *all) {
    double bits = 8.0 * (double)p->bytes / (double)(p->n_row * p->n_col);
    double gb_s = 1e-9 * (double)p->bytes / p->seconds[0];
    double gmac_s = 1e-9 * (double)p->n_row * (double)p->n_col * ROWS / p->seconds[1];
    if (form == BENCH_JSON)
        json_array_append_new(all, json_pack("{s:s, s:f, s:f, s:f, s:f}", "type", q->name, "bits", bits, "gb_s", gb_s,
                                             "share", gb_s * 1e9 / read_rate, "gmac_s", gmac_s));
    else if (form == BENCH_CSV)
        printf("%s,%.3f,%.3f,%.4f,%.3f\n", q->name, bits, gb_s, gb_s * 1e9 / read_rate, gmac_s);
    else
        printf("| %-6s | %6.2f | %10.1f | %9.0f %% | %15.1f |\n", q->name, bits, gb_s, 100 * gb_s * 1e9 / read_rate,
               gmac_s);
    fflush(stdout);
}

orcd_status bench_kernels(be_device *d, int64_t mib, bench_form form, orcd_error *err) {
    char device[128];
    double rate;
    json_t *all = json_array();
    orcd_status st;
    d->ops->describe(d, device, sizeof device);
    ORCD_TRY_GOTO(st, done, be_read_speed(d, &rate, err));
    if (form == BENCH_TABLE)
        printf("%s; memory %.1f GB/s\nproducts with weights of %d columns, %lld MiB as stored; bits a weight on the "
               "device\n\n"
               "| type   |   bits | 1 row GB/s | of memory   | 64 rows GMAC/s  |\n"
               "|--------|-------:|-----------:|------------:|----------------:|\n",
               device, rate * 1e-9, N_COL, (long long)mib);
    else if (form == BENCH_CSV)
        printf("type,bits,gb_s,share,gmac_s\n");
    for (size_t i = 0; i < q_count(); i++) {
        int64_t n_row = (mib << 20) / (int64_t)q_row_bytes(q_at(i), N_COL);
        be_product p = {.type = q_at(i)->type, .n_col = N_COL, .n_row = n_row, .n = 2, .rows = {1, ROWS}};
        ORCD_TRY_GOTO(st, done, be_time_product(d, &p, err));
        print_line(form, q_at(i), &p, rate, all);
    }
    if (form == BENCH_JSON) {
        json_t *j = json_pack("{s:s, s:f, s:i, s:O}", "device", device, "read_gb_s", rate * 1e-9, "n_col", N_COL,
                              "kernels", all);
        json_dumpf(j, stdout, JSON_COMPACT);
        printf("\n");
        json_decref(j);
    }
done:
    json_decref(all);
    return st;
}
