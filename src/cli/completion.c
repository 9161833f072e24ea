/* cli/completion.c: `orcd completion SHELL`: what the shells complete, made from the commands' own tables. */
#include "cli/cli.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>

#include "arch/synth.h"

static const cli_option option[] = {{0}};

/* ---- what may stand in a place ---- */

typedef enum value_kind { VALUE_NONE /* a flag */, VALUE_ANY, VALUE_FILE, VALUE_DIR, VALUE_WORDS } value_kind;

/* "auto|cpu|cuda[:N]|ref" to "auto cpu cuda ref", "F32, F16" to "F32 F16"; "N" stands for a number. */
static void add_words(buf *out, const char *list) {
    for (size_t n, all; *list; list += all) {
        all = strcspn(list, "|, ");
        n = strcspn(list, "[|, ");
        if (n && !(n == 1 && *list == 'N'))
            buf_printf(out, "%s%.*s", out->len ? " " : "", (int)n, list);
        all += list[all] != '\0';
    }
}

static value_kind value_of(const cli_option *o, buf *words) {
    buf_clear(words);
    buf_str(words, "");
    if (o->kind == CLI_FLAG)
        return VALUE_NONE;
    if (strchr(o->arg, '|'))
        add_words(words, o->arg);
    else if (strcmp(o->arg, "TYPE") == 0)
        add_words(words, arch_types_list());
    else
        return strncmp(o->arg, "FILE", 4) == 0 || strcmp(o->arg, "PATH") == 0 ? VALUE_FILE
               : strcmp(o->arg, "DIR") == 0                                   ? VALUE_DIR
                                                                              : VALUE_ANY;
    return VALUE_WORDS;
}

static bool has_word(const char *args, const char *word) {
    size_t n = strlen(word);
    for (const char *p = args; (p = strstr(p, word)); p += n)
        if ((p == args || !isalnum((unsigned char)p[-1])) && !isalnum((unsigned char)p[n]))
            return true;
    return false;
}

/* Does one of these words stand among the operands? */
static bool takes(const cli_command *c, const char *const *word, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (has_word(c->args, word[i]))
            return true;
    return false;
}

static bool takes_model(const cli_command *c) {
    static const char *const word[] = {"MODEL", "SRC", "NAME", "A"};
    return takes(c, word, ORCD_COUNT(word));
}

static bool takes_file(const cli_command *c) {
    static const char *const word[] = {"MODEL", "SRC", "A", "DST", "FILE"};
    return takes(c, word, ORCD_COUNT(word));
}

/* The words among the operands: those that the usage line spells in lower case, and the values of its nouns. */
static void operand_words(const cli_command *c, buf *words) {
    buf_clear(words);
    buf_str(words, "");
    for (const char *p = c->args; *p;) {
        size_t n = strcspn(p, " []");
        if (n && islower((unsigned char)*p)) {
            char one[64];
            snprintf(one, sizeof one, "%.*s", (int)n, p);
            add_words(words, one);
        }
        p += n + (p[n] != '\0');
    }
    if (has_word(c->args, "PRESET"))
        add_words(words, arch_presets());
    if (has_word(c->args, "TYPE"))
        add_words(words, arch_types_list());
    for (const cli_command *const *k = cli_commands; *k && has_word(c->args, "COMMAND"); k++)
        add_words(words, (*k)->name);
}

/* ---- bash ---- */

static void bash_command(const cli_command *c, buf *words) {
    for (const cli_option *o = c->option; o->name; o++) {
        value_kind kind = value_of(o, words);
        if (kind == VALUE_NONE || kind == VALUE_FILE)
            continue; /* the shell's own default */
        printf("    %s:--%s", c->name, o->name);
        if (o->letter)
            printf(" | %s:-%c", c->name, o->letter);
        if (kind == VALUE_WORDS)
            printf(") COMPREPLY=($(compgen -W '%s' -- \"$cur\")); return ;;\n", words->data);
        else if (kind == VALUE_DIR)
            printf(") COMPREPLY=($(compgen -d -- \"$cur\")); return ;;\n");
        else
            printf(") return ;;\n");
    }
}

static void bash_files(const cli_command *c, bool *first) {
    buf words = {0};
    for (const cli_option *o = c->option; o->name; o++)
        if (value_of(o, &words) == VALUE_FILE) {
            printf("%s%s:--%s", *first ? "    " : " | ", c->name, o->name);
            *first = false;
        }
    buf_free(&words);
}

static void bash(void) {
    buf words = {0};
    bool first = true;
    printf("# bash completion of orcd " ORCD_VERSION ", made by: orcd completion bash\n"
           "_orcd() {\n"
           "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} cmd=${COMP_WORDS[1]}\n"
           "    local IFS=$' \\t\\n' options= words= models= files=\n"
           "    if [ \"$cur\" = = ]; then cur=; elif [ \"$prev\" = = ]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi\n"
           "    COMPREPLY=()\n"
           "    if ((COMP_CWORD == 1)); then\n"
           "        COMPREPLY=($(compgen -W '");
    for (const cli_command *const *c = cli_commands; *c; c++)
        printf("%s ", (*c)->name);
    printf("--help --version' -- \"$cur\"))\n"
           "        return\n"
           "    fi\n"
           "    case $cmd:$prev in\n");
    for (const cli_command *const *c = cli_commands; *c; c++)
        bash_command(*c, &words);
    for (const cli_command *const *c = cli_commands; *c; c++)
        bash_files(*c, &first);
    printf(")\n"
           "        compopt -o filenames\n"
           "        IFS=$'\\n'\n"
           "        COMPREPLY=($(compgen -f -- \"$cur\"))\n"
           "        return ;;\n"
           "    esac\n"
           "    case $cmd in\n");
    for (const cli_command *const *c = cli_commands; *c; c++) {
        printf("    %s) options='", (*c)->name);
        for (const cli_option *o = (*c)->option; o->name; o++)
            printf("--%s ", o->name);
        operand_words(*c, &words);
        printf("--help' words='%s' models=%d files=%d ;;\n", words.data, takes_model(*c), takes_file(*c));
    }
    printf("    esac\n"
           "    if [[ $cur == -* ]]; then\n"
           "        COMPREPLY=($(compgen -W \"$options\" -- \"$cur\"))\n"
           "        return\n"
           "    fi\n"
           "    [ \"$models\" = 1 ] && words+=\" $(\"${COMP_WORDS[0]}\" models --names 2>/dev/null)\"\n"
           "    COMPREPLY=($(compgen -W \"$words\" -- \"$cur\"))\n"
           "    [ \"$files\" = 1 ] || return\n"
           "    IFS=$'\\n'\n"
           "    compopt -o filenames\n"
           "    COMPREPLY+=($(compgen -f -- \"$cur\"))\n"
           "}\n"
           "complete -F _orcd orcd\n");
    buf_free(&words);
}

/* ---- zsh ---- */

/* Inside '...' and a specification of _arguments or _describe. */
static void zsh_text(const char *s) {
    for (; *s; s++) {
        if (*s == '\'')
            printf("'\\''");
        else
            printf("%s%c", strchr(":[]\\", *s) ? "\\" : "", *s);
    }
}

static void zsh_option(const cli_option *o, buf *words) {
    value_kind kind = value_of(o, words);
    const char *repeat = o->kind == CLI_STRS ? "*" : "", *equals = kind == VALUE_NONE ? "" : "=";
    if (o->letter)
        printf("            '(-%c --%s)'{-%c%s,--%s%s}'[", o->letter, o->name, o->letter, kind == VALUE_NONE ? "" : "+",
               o->name, equals);
    else
        printf("            '%s--%s%s[", repeat, o->name, equals);
    zsh_text(o->help);
    printf("]");
    if (kind != VALUE_NONE) {
        printf(":");
        zsh_text(kind == VALUE_WORDS ? o->name : o->arg);
        printf(":");
    }
    if (kind == VALUE_WORDS)
        printf("(%s)", words->data);
    else if (kind == VALUE_FILE || kind == VALUE_DIR)
        printf("_files%s", kind == VALUE_DIR ? " -/" : "");
    printf("' \\\n");
}

static void zsh(void) {
    buf words = {0};
    printf("#compdef orcd\n# zsh completion of orcd " ORCD_VERSION ", made by: orcd completion zsh\n"
           "_orcd_operands() {\n"
           "    local -a words_here\n"
           "    words_here=(${(s: :)1})\n"
           "    [[ $2 = 1 ]] && words_here+=(${(f)\"$(orcd models --names 2>/dev/null)\"})\n"
           "    compadd -a words_here\n"
           "    [[ $3 = 1 ]] && _files\n"
           "}\n"
           "_orcd() {\n"
           "    local -a commands\n"
           "    commands=(\n");
    for (const cli_command *const *c = cli_commands; *c; c++) {
        printf("        '%s:", (*c)->name);
        zsh_text((*c)->summary);
        printf("'\n");
    }
    printf("    )\n"
           "    if (( CURRENT == 2 )); then\n"
           "        _describe command commands\n"
           "        return\n"
           "    fi\n"
           "    local command=$words[2]\n"
           "    shift words\n"
           "    (( CURRENT-- ))\n"
           "    case $command in\n");
    for (const cli_command *const *c = cli_commands; *c; c++) {
        printf("    %s)\n        _arguments -s \\\n", (*c)->name);
        for (const cli_option *o = (*c)->option; o->name; o++)
            zsh_option(o, &words);
        operand_words(*c, &words);
        printf("            '--help[list the options]' \\\n"
               "            '*: :_orcd_operands \"%s\" %d %d' ;;\n",
               words.data, takes_model(*c), takes_file(*c));
    }
    printf("    esac\n}\n"
           "if [ \"$funcstack[1]\" = _orcd ]; then _orcd \"$@\"; else compdef _orcd orcd; fi\n");
    buf_free(&words);
}

/* ---- fish ---- */

static void fish_text(const char *s) {
    putchar('\'');
    for (; *s; s++)
        printf("%s%c", *s == '\'' || *s == '\\' ? "\\" : "", *s);
    putchar('\'');
}

static void fish_command(const cli_command *c, buf *words) {
    printf("complete -c orcd -n __fish_use_subcommand -f -a %s -d ", c->name);
    fish_text(c->summary);
    printf("\n");
    for (const cli_option *o = c->option; o->name; o++) {
        value_kind kind = value_of(o, words);
        printf("complete -c orcd -n '__fish_seen_subcommand_from %s' -l %s", c->name, o->name);
        if (o->letter)
            printf(" -s %c", o->letter);
        if (kind == VALUE_WORDS)
            printf(" -x -a '%s'", words->data);
        else if (kind == VALUE_DIR)
            printf(" -x -a '(__fish_complete_directories)'");
        else if (kind != VALUE_NONE)
            printf(" %s", kind == VALUE_FILE ? "-r -F" : "-x");
        printf(" -d ");
        fish_text(o->help);
        printf("\n");
    }
    operand_words(c, words);
    if (!takes_file(c))
        printf("complete -c orcd -n '__fish_seen_subcommand_from %s' -f\n", c->name);
    if (words->data[0])
        printf("complete -c orcd -n '__fish_seen_subcommand_from %s' -a '%s'\n", c->name, words->data);
    if (takes_model(c))
        printf("complete -c orcd -n '__fish_seen_subcommand_from %s' -a '(orcd models --names 2>/dev/null)'\n",
               c->name);
}

static void fish(void) {
    buf words = {0};
    printf("# fish completion of orcd " ORCD_VERSION ", made by: orcd completion fish\n"
           "complete -c orcd -e\n");
    for (const cli_command *const *c = cli_commands; *c; c++)
        fish_command(*c, &words);
    buf_free(&words);
}

static int run(const cli_command *c, int argc, char **argv) {
    static const struct {
        const char *name;
        void (*print)(void);
    } shell[] = {{"bash", bash}, {"zsh", zsh}, {"fish", fish}};
    const char *rest[1];
    int n_rest;
    if (!cli_parse(c, argc, argv, NULL, rest, &n_rest, 1))
        return EXIT_USAGE;
    for (size_t i = 0; i < ORCD_COUNT(shell); i++)
        if (n_rest && strcmp(rest[0], shell[i].name) == 0) {
            shell[i].print();
            return EXIT_OK;
        }
    return cli_usage(c, "name a shell: bash, zsh or fish");
}

const cli_command cmd_completion = {"completion", "bash|zsh|fish", "print what a shell completes", option, run};
