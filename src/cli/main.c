/* cli/main.c: the program: finds the subcommand and runs it. */
#include "cli/cli.h"

#include <stdio.h>
#include <string.h>

#include "base/file.h"

#define COMMAND(name) extern const cli_command cmd_##name;
#include "cli/list.def"
#undef COMMAND

const cli_command *const cli_commands[] = {
#define COMMAND(name) &cmd_##name,
#include "cli/list.def"
#undef COMMAND
    NULL, /* ends the list */
};

static void print_help(FILE *to) {
    fprintf(to, "orcd runs gpt-oss and GPT-2 models on CPUs and NVIDIA GPUs.\n\nusage: orcd COMMAND [ARGUMENTS]\n\n");
    for (const cli_command *const *c = cli_commands; *c; c++)
        fprintf(to, "  %-10s %s\n", (*c)->name, (*c)->summary);
    fprintf(to, "\norcd COMMAND --help lists a command's options. Without MODEL the bundled model is used.\n");
}

int main(int argc, char **argv) {
    file_shrunk_exits(EXIT_MODEL);
    if (argc < 2) {
        print_help(stderr);
        return EXIT_USAGE;
    }
    const char *name = argv[1];
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0 || strcmp(name, "help") == 0) {
        print_help(stdout);
        return EXIT_OK;
    }
    if (strcmp(name, "--version") == 0 || strcmp(name, "version") == 0) {
        printf("orcd " ORCD_VERSION "\n");
        return EXIT_OK;
    }
    for (const cli_command *const *c = cli_commands; *c; c++)
        if (strcmp((*c)->name, name) == 0)
            return (*c)->run(*c, argc - 1, argv + 1);
    fprintf(stderr, "orcd: \"%s\" is no command; orcd --help lists them\n", name);
    return EXIT_USAGE;
}
