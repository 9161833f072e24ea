#include "cli/cli.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void print_option(const cli_option *o) {
    char left[64];
    snprintf(left, sizeof left, "%s%c%s --%s%s%s", o->letter ? "-" : " ", o->letter ? o->letter : ' ',
             o->letter ? "," : " ", o->name, o->kind == CLI_FLAG ? "" : " ", o->kind == CLI_FLAG ? "" : o->arg);
    printf("  %-34s %s\n", left, o->help);
}

static void print_help(const cli_command *c) {
    printf("orcd %s %s\n%s\n\n", c->name, c->args, c->summary);
    for (const cli_option *o = c->option; o->name; o++)
        print_option(o);
}

int cli_fail(const orcd_error *err) {
    fflush(stdout);
    if (err->pos != ORCD_POS_NONE && err->code == ORCD_ERR_FORMAT)
        fprintf(stderr, "orcd: %s (at byte %llu)\n", err->message, (unsigned long long)err->pos);
    else
        fprintf(stderr, "orcd: %s\n", err->message);
    return err->code == ORCD_ERR_DEVICE ? EXIT_DEVICE : EXIT_FAILED;
}

int cli_usage(const cli_command *c, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    fprintf(stderr, "orcd %s: ", c->name);
    vfprintf(stderr, fmt, args);
    fprintf(stderr, "; orcd %s --help lists the options\n", c->name);
    va_end(args);
    return EXIT_USAGE;
}

static bool is_choice(const char *choices, const char *value) {
    size_t n = strlen(value);
    for (const char *p = choices; p; p = strchr(p, '|') ? strchr(p, '|') + 1 : NULL)
        if (strncmp(p, value, n) == 0 && (p[n] == '|' || p[n] == '\0'))
            return true;
    return false;
}

static bool store_number(const cli_command *c, const cli_option *o, const char *value, char *at) {
    char *end = NULL;
    errno = 0;
    if (o->kind == CLI_U64) {
        *(cli_u64 *)(void *)at = (cli_u64){strtoull(value, &end, 10), true};
        if (end != value && !*end && !errno && *value != '-')
            return true;
        return cli_usage(c, "--%s takes a whole number from 0 to 2^64 - 1, not \"%s\"", o->name, value), false;
    }
    if (o->kind == CLI_INT && is_choice(strchr(o->arg, '|'), "auto") && strcmp(value, "auto") == 0) {
        *(int64_t *)(void *)at = CLI_AUTO;
        return true;
    }
    if (o->kind == CLI_INT) {
        long long v = strtoll(value, &end, 10);
        *(int64_t *)(void *)at = v;
        if (end != value && !*end && !errno && (double)v >= o->lo && (double)v <= o->hi)
            return true;
        return cli_usage(c, "--%s takes a whole number from %.0f to %.0f, not \"%s\"", o->name, o->lo, o->hi, value),
               false;
    }
    double v = strtod(value, &end);
    *(double *)(void *)at = v;
    if (end != value && !*end && !errno && v >= o->lo && v <= o->hi)
        return true;
    return cli_usage(c, "--%s takes a number from %g to %g, not \"%s\"", o->name, o->lo, o->hi, value), false;
}

/* Store one value; false after printing what is wrong with it. */
static bool store(const cli_command *c, const cli_option *o, const char *value, void *into) {
    char *at = (char *)into + o->field;
    switch (o->kind) {
    case CLI_FLAG:
        *(bool *)(void *)at = true;
        return true;
    case CLI_CHOICE:
        if (!is_choice(o->arg, value))
            return cli_usage(c, "--%s takes one of %s, not \"%s\"", o->name, o->arg, value), false;
        /* fall through */
    case CLI_STR:
        *(const char **)(void *)at = value;
        return true;
    case CLI_STRS: {
        cli_strs *list = (cli_strs *)(void *)at;
        if (list->n == CLI_MAX_STRS)
            return cli_usage(c, "--%s may be given at most %d times", o->name, CLI_MAX_STRS), false;
        list->s[list->n++] = value;
        return true;
    }
    case CLI_INT:
    case CLI_U64:
    case CLI_NUM:
        return store_number(c, o, value, at);
    }
    return false;
}

static const cli_option *find_option(const cli_command *c, const char *word, size_t n) {
    for (const cli_option *o = c->option; o->name; o++)
        if ((word[1] == '-' && strlen(o->name) == n - 2 && strncmp(o->name, word + 2, n - 2) == 0) ||
            (n == 2 && word[1] != '-' && o->letter == word[1]))
            return o;
    return NULL;
}

bool cli_parse(const cli_command *c, int argc, char **argv, void *into, const char **rest, int *n_rest, int max_rest) {
    bool only_rest = false;
    *n_rest = 0;
    for (int i = 1; i < argc; i++) {
        const char *word = argv[i], *equals = strchr(word, '=');
        if (only_rest || word[0] != '-' || word[1] == '\0') {
            if (*n_rest == max_rest)
                return cli_usage(c, "unexpected argument \"%s\"", word), false;
            rest[(*n_rest)++] = word;
            continue;
        }
        if (strcmp(word, "--") == 0) {
            only_rest = true;
            continue;
        }
        if (strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0) {
            print_help(c);
            exit(EXIT_OK);
        }
        const cli_option *o = find_option(c, word, equals ? (size_t)(equals - word) : strlen(word));
        if (!o)
            return cli_usage(c, "unknown option %s", word), false;
        const char *value = equals ? equals + 1 : NULL;
        if (o->kind == CLI_FLAG && value)
            return cli_usage(c, "--%s takes no value", o->name), false;
        if (o->kind != CLI_FLAG && !value) {
            if (i + 1 == argc)
                return cli_usage(c, "--%s needs a value (%s)", o->name, o->arg), false;
            value = argv[++i];
        }
        if (!store(c, o, value, into))
            return false;
    }
    return true;
}
