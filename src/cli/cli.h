/* cli/cli.h: what the subcommands share: the option table, the terminal, exit codes. The only floor that prints or
 * exits. May include everything below. */
#ifndef ORCD_CLI_CLI_H
#define ORCD_CLI_CLI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/status.h"

#define ORCD_VERSION "0.1.0"
#define ORCD_DATE "2026-11-21" /* of the manual pages */

enum { EXIT_OK = 0, EXIT_FAILED = 1, EXIT_USAGE = 2, EXIT_MODEL = 70, EXIT_DEVICE = 74 };

/* ---- options: one table per command feeds the parser, --help, shell completion and the manual ---- */

#define CLI_AUTO (-1)

typedef enum cli_kind {
    CLI_FLAG,   /* bool */
    CLI_INT,    /* int64_t in [lo, hi]; also CLI_AUTO where arg says "N|auto" */
    CLI_U64,    /* cli_u64 */
    CLI_NUM,    /* double in [lo, hi] */
    CLI_STR,    /* const char * */
    CLI_STRS,   /* cli_strs: may be given several times */
    CLI_CHOICE, /* const char *, one of `arg` split at '|' */
} cli_kind;

#define CLI_MAX_STRS 16
typedef struct cli_strs {
    const char *s[CLI_MAX_STRS];
    int n;
} cli_strs;

typedef struct cli_u64 {
    uint64_t value;
    bool given;
} cli_u64;

typedef struct cli_option {
    const char *name; /* "temp": typed as --temp; NULL ends a table */
    char letter;      /* typed as -t; 0 for none */
    cli_kind kind;
    size_t field; /* offset in the command's options struct */
    double lo, hi;
    const char *arg; /* "N", "FILE", "cpu|cuda|auto" */
    const char *help;
} cli_option;

typedef struct cli_command {
    const char *name, *args, *summary;
    const cli_option *option;
    int (*run)(const struct cli_command *c, int argc, char **argv); /* argv[0] is the command's name */
} cli_command;

extern const cli_command *const cli_commands[]; /* ends with NULL */

/* Fill `into` from argv; operands go to rest[0..*n_rest). False: the error is printed, exit with EXIT_USAGE;
 * --help is printed and ends the program. */
bool cli_parse(const cli_command *c, int argc, char **argv, void *into, const char **rest, int *n_rest, int max_rest);

/* Print "orcd: MESSAGE" on stderr; returns the exit code, so that `return cli_fail(&err)` is one line. */
int cli_fail(const orcd_error *err);
int cli_usage(const cli_command *c, const char *fmt, ...) ORCD_PRINTF(2, 3);

/* MODEL: a path, else the name of a pulled model; when NULL, the bundled one: beside the program, one folder up, or in
 * ../share/orcd. */
orcd_status cli_model_path(const char *given, char *path, size_t cap, orcd_error *err) ORCD_MUST_USE;

/* The whole of a file, or of standard input for "-", NUL-terminated; free() it. */
orcd_status cli_read_text(const char *path, char **text, size_t *len, orcd_error *err) ORCD_MUST_USE;

/* A file of little-endian int32 token ids, at least one; the caller frees *out with ids_free. */
orcd_status cli_read_ids(const char *path, ids *out, orcd_error *err) ORCD_MUST_USE;

/* A text as token ids of a model's tokenizer (`tokenizer`: its tokenizer.json, or NULL), specials as plain text; the
 * caller frees *out. *n_ctx: positions that the model has. */
orcd_status cli_encode(const char *model, const char *tokenizer, const char *text, size_t len, ids *out, int *n_ctx,
                       orcd_error *err) ORCD_MUST_USE;

/* ---- terminal ---- */

bool term_is_tty(int fd);
/* ANSI sequences, empty when stderr is no terminal or NO_COLOR is set. */
const char *term_dim(void);
const char *term_bold(void);
const char *term_off(void);

/* A progress bar on stderr, drawn only on a terminal, at most 20 times a second, erased by bar_end. */
typedef struct bar {
    const char *label, *unit; /* unit "B": bytes, else counts of it; with rate and time left */
    double t0, t_drawn;
    uint64_t first; /* done before it began, by an earlier run: no part of the rate */
    bool drawn;
} bar;
void bar_begin(bar *b, const char *label, const char *unit);
void bar_update(void *b, uint64_t done, uint64_t total);
void bar_end(bar *b);

/* "1.23 GiB", "131,072": into a caller's buffer, returned. */
const char *human_bytes(uint64_t n, char out[32]);
const char *human_count(uint64_t n, char out[32]);
uint64_t peak_rss_bytes(void);
void reset_peak_rss(void); /* forget what was before; where the system does not let us, nothing happens */
double now_s(void);        /* monotonic */

#endif
