/* cli/bench.h: what the files of `orcd bench` share. */
#ifndef ORCD_CLI_BENCH_H
#define ORCD_CLI_BENCH_H

#include "backend/speed.h"
#include "cli/cli.h"

typedef enum bench_form { BENCH_TABLE, BENCH_CSV, BENCH_JSON } bench_form;

typedef struct bench_row {
    bool decode;                /* else prefill */
    int tokens, depth, streams; /* of one stream; positions before the first; sequences together */
    double median, min, max;    /* tokens a second of all streams; max: the fastest repetition */
    double ceiling;             /* what memory and products of the device allow; 0 = not known */
    bool by_memory;             /* the memory is the lower of the two */
} bench_row;

#define BENCH_MAX_ROWS 1024
typedef struct bench_report {
    const char *model;
    char device[128];
    double read_rate, mac_rate; /* of the device, measured: bytes and multiply-adds a second; 0 = not */
    q_type mac_type;            /* weights of that product */
    double load_s;
    uint64_t file_bytes, device_bytes; /* of weights; of everything on the device, 0 = not known */
    int n_row;
    bench_row row[BENCH_MAX_ROWS];
} bench_report;

/* The table comes line by line: head, each row, tail; CSV and JSON at the end, by tail. */
void bench_print_head(bench_form form, const bench_report *r);
void bench_print_row(bench_form form, const bench_row *row);
void bench_print_tail(bench_form form, const bench_report *r);
/* Prefill by length and decode by depth (by streams where there is one depth). */
orcd_status bench_plot(const bench_report *r, const char *path, orcd_error *err) ORCD_MUST_USE;

/* `orcd bench --kernels`: a product of each weight type, with weights of so many MiB as stored. */
orcd_status bench_kernels(be_device *d, int64_t mib, bench_form form, orcd_error *err) ORCD_MUST_USE;

#endif
