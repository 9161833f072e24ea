/* cli/manual.c: `orcd manual [COMMAND]`: the manual pages, made from the commands' own tables. */
#include "cli/cli.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>

typedef struct options {
    bool names;
} options;

static const cli_option option[] = {
    {"names", 0, CLI_FLAG, offsetof(options, names), 0, 0, "", "print the commands' names alone"},
    {0},
};

/* Text for roff: a minus that is typed stays one, and no line begins a request. */
static void text(const char *s) {
    if (*s == '.' || *s == '\'')
        printf("\\&");
    for (; *s; s++)
        printf("%s%c", *s == '-' || *s == '\\' ? "\\" : "", *s == '\\' ? 'e' : *s);
}

static void head(const char *page) {
    printf(".TH ");
    for (; *page; page++)
        printf(*page == '-' ? "\\-" : "%c", toupper((unsigned char)*page));
    printf(" 1 " ORCD_DATE " \"orcd " ORCD_VERSION "\" \"User Commands\"\n");
}

static void exit_status(void) {
    printf(".SH EXIT STATUS\n"
           ".TP\n.B %d\nsuccess\n"
           ".TP\n.B %d\nfailure; one sentence on standard error says what and where\n"
           ".TP\n.B %d\nthe command line was not understood\n"
           ".TP\n.B %d\nthe accelerator failed\n",
           EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_DEVICE);
}

static void see_also(const char *except) {
    const char *comma = "";
    printf(".SH SEE ALSO\n");
    if (*except)
        printf(".BR orcd (1)"), comma = ",\n";
    for (const cli_command *const *c = cli_commands; *c; c++) {
        if (strcmp((*c)->name, except) == 0)
            continue;
        printf("%s.BR orcd\\-%s (1)", comma, (*c)->name);
        comma = ",\n";
    }
    printf("\n");
}

static void main_page(void) {
    head("orcd");
    printf(".SH NAME\norcd \\- run gpt\\-oss and GPT\\-2 models on CPUs and NVIDIA GPUs\n"
           ".SH SYNOPSIS\n.B orcd\n.I COMMAND\n.RI [ ARGUMENTS ]\n"
           ".SH DESCRIPTION\n"
           "orcd reads GGUF files and Hugging Face folders as they are published. A\n.I MODEL\n"
           "is a path, or the name of a model that\n.B orcd pull\nfetched; without one the bundled model is used.\n"
           ".SH COMMANDS\n");
    for (const cli_command *const *c = cli_commands; *c; c++) {
        printf(".TP\n.BR orcd\\-%s (1)\n", (*c)->name);
        text((*c)->summary);
        printf("\n");
    }
    printf(".SH OPTIONS\n"
           ".TP\n.B \\-\\-help\nlist the commands; after a command, its options\n"
           ".TP\n.B \\-\\-version\nprint the version\n");
    exit_status();
    printf(".SH ENVIRONMENT\n"
           ".TP\n.B ORCD_CPU\nportable, avx2, avxvnni, avx512 or amx: use no better instructions than these\n"
           ".TP\n.BR XDG_CACHE_HOME \", \" HOME\nwhere pulled models lie\n"
           ".TP\n.B NO_COLOR\nwhen set, no colours on the terminal\n"
           ".SH FILES\n"
           ".TP\n.I ~/.cache/orcd\npulled models\n");
    see_also("");
}

static void command_page(const cli_command *c) {
    char page[64];
    snprintf(page, sizeof page, "orcd-%s", c->name);
    head(page);
    printf(".SH NAME\norcd\\-%s \\- ", c->name);
    text(c->summary);
    printf("\n.SH SYNOPSIS\n.B orcd %s\n", c->name);
    if (*c->args) {
        text(c->args);
        printf("\n");
    }
    printf(".RI [ OPTIONS ]\n.SH OPTIONS\n");
    for (const cli_option *o = c->option; o->name; o++) {
        printf(".TP\n\\fB");
        if (o->letter)
            printf("\\-%c\\fR, \\fB", o->letter);
        printf("\\-\\-");
        text(o->name);
        printf("\\fR");
        if (o->kind != CLI_FLAG) {
            printf(" \\fI");
            text(o->arg);
            printf("\\fR");
        }
        printf("\n");
        text(o->help);
        printf("\n");
    }
    printf(".TP\n\\fB\\-\\-help\\fR\nlist the options\n");
    exit_status();
    see_also(c->name);
}

static int run(const cli_command *self, int argc, char **argv) {
    options o = {0};
    const char *rest[1];
    int n_rest;
    if (!cli_parse(self, argc, argv, &o, rest, &n_rest, 1))
        return EXIT_USAGE;
    for (const cli_command *const *c = cli_commands; o.names && *c; c++)
        printf("%s\n", (*c)->name);
    if (o.names)
        return EXIT_OK;
    if (!n_rest) {
        main_page();
        return EXIT_OK;
    }
    for (const cli_command *const *c = cli_commands; *c; c++)
        if (strcmp((*c)->name, rest[0]) == 0) {
            command_page(*c);
            return EXIT_OK;
        }
    return cli_usage(self, "\"%s\" is no command", rest[0]);
}

const cli_command cmd_manual = {"manual", "[COMMAND]", "print the manual page of orcd or of a command", option, run};
