/* cli/tokenize.c: `orcd tokenize`: text to token ids and back. */
#include "cli/cli.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "text/tokenizer.h"

typedef struct options {
    const char *file, *decode, *tokenizer;
    bool jsonl, specials;
} options;

static const cli_option option[] = {
    {"file", 'f', CLI_STR, offsetof(options, file), 0, 0, "FILE", "read the text from a file (- is standard input)"},
    {"decode", 'd', CLI_STR, offsetof(options, decode), 0, 0, "\"1 2 3\"", "print the text of these ids"},
    {"jsonl", 0, CLI_FLAG, offsetof(options, jsonl), 0, 0, "",
     "standard input has {\"text\"} lines; write {\"ids\", \"decoded\"} lines"},
    {"specials", 0, CLI_FLAG, offsetof(options, specials), 0, 0, "",
     "recognise control tokens in the text (--jsonl always does)"},
    {"tokenizer", 0, CLI_STR, offsetof(options, tokenizer), 0, 0, "FILE", "tokenizer.json, when not beside the model"},
    {0},
};

static orcd_status print_ids(const options *o, const tok *t, const char *text, size_t len, orcd_error *err) {
    ids out = {0};
    orcd_status st = tok_encode(t, text, len, o->specials, &out);
    if (st != ORCD_OK)
        orcd_fail(err, st, "the text could not be encoded: %s", orcd_status_name(st));
    for (size_t i = 0; st == ORCD_OK && i < out.n; i++)
        printf("%d%c", out.data[i], i + 1 < out.n ? ' ' : '\n');
    ids_free(&out);
    return st;
}

static orcd_status print_text(const tok *t, const char *list, orcd_error *err) {
    const char *p = list;
    ids in = {0};
    buf text = {0};
    orcd_status st = ORCD_OK;
    while (*(p += strspn(p, " ,[]\t\n"))) {
        char *end;
        long v = strtol(p, &end, 10);
        if (end == p || v < 0 || v >= tok_n_vocab(t)) {
            st = orcd_fail(err, ORCD_ERR_ARG, "\"%.20s\" is no token id; ids are 0 to %d", p, tok_n_vocab(t) - 1);
            goto done;
        }
        ids_push(&in, (int32_t)v);
        p = end;
    }
    tok_decode(t, in.data, in.n, true, &text);
    fwrite(text.data ? text.data : "", 1, text.len, stdout);
    printf("\n");
done:
    ids_free(&in);
    buf_free(&text);
    return st;
}

/* One line of --jsonl: what Hugging Face tokenizers answers, control tokens recognised. Bytes that are not UTF-8 cannot
 * occur in JSON, so `decoded` is exact. */
static orcd_status jsonl_line(const tok *t, const char *line, size_t number, orcd_error *err) {
    json_error_t why;
    json_t *in = json_loads(line, JSON_ALLOW_NUL, &why), *text = json_object_get(in, "text");
    ids out = {0};
    buf decoded = {0};
    orcd_status st = ORCD_ERR_FORMAT;
    if (!json_is_string(text)) {
        orcd_fail(err, st, "line %zu is not a JSON object with a string \"text\"", number);
        goto done;
    }
    st = tok_encode(t, json_string_value(text), json_string_length(text), true, &out);
    if (st != ORCD_OK) {
        orcd_fail(err, st, "line %zu could not be encoded: %s", number, orcd_status_name(st));
        goto done;
    }
    tok_decode(t, out.data, out.n, true, &decoded);
    json_t *list = json_array();
    for (size_t i = 0; i < out.n; i++)
        json_array_append_new(list, json_integer(out.data[i]));
    json_t *reply = json_pack("{s:o, s:s%}", "ids", list, "decoded", decoded.data ? decoded.data : "", decoded.len);
    json_dumpf(reply, stdout, JSON_COMPACT);
    printf("\n");
    json_decref(reply);
done:
    json_decref(in);
    ids_free(&out);
    buf_free(&decoded);
    return st;
}

static orcd_status jsonl(const tok *t, orcd_error *err) {
    char *line = NULL;
    size_t cap = 0, number = 0;
    orcd_status st = ORCD_OK;
    for (ssize_t n; st == ORCD_OK && (n = getline(&line, &cap, stdin)) > 0;) {
        number++;
        if (strspn(line, " \t\r\n") < (size_t)n)
            st = jsonl_line(t, line, number, err);
    }
    free(line);
    return st;
}

static int run(const cli_command *c, int argc, char **argv) {
    options o = {0};
    const char *rest[2];
    int n_rest;
    if (!cli_parse(c, argc, argv, &o, rest, &n_rest, 2))
        return EXIT_USAGE;
    bool has_source = o.jsonl || o.file || o.decode;
    const char *model = n_rest == 2 || (n_rest == 1 && (has_source || file_exists(rest[0]))) ? rest[0] : NULL;
    const char *text = n_rest == 2 ? rest[1] : n_rest == 1 && !model ? rest[0] : NULL;
    if (!!o.jsonl + !!o.file + !!o.decode + !!text != 1)
        return cli_usage(c, "give one of TEXT, --file, --jsonl and --decode");

    char path[4096], *slurped = NULL;
    size_t len;
    orcd_error err = {0};
    orcd_status st;
    mf_file *f = NULL;
    tok *t = NULL;
    ORCD_TRY_GOTO(st, done, cli_model_path(model, path, sizeof path, &err));
    size_t end = strlen(path);
    if (end > 5 && strcmp(path + end - 5, ".json") == 0) /* a tokenizer alone will do */
        ORCD_TRY_GOTO(st, done, tok_open_json(path, &t, &err));
    else {
        ORCD_TRY_GOTO(st, done, mf_open(path, &f, &err));
        ORCD_TRY_GOTO(st, done, tok_open_for(f, o.tokenizer, &t, &err));
    }
    if (o.jsonl)
        st = jsonl(t, &err);
    else if (o.decode)
        st = print_text(t, o.decode, &err);
    else if (text)
        st = print_ids(&o, t, text, strlen(text), &err);
    else {
        ORCD_TRY_GOTO(st, done, cli_read_text(o.file, &slurped, &len, &err));
        st = print_ids(&o, t, slurped, len, &err);
    }
done:
    free(slurped);
    tok_close(t);
    mf_close(f);
    return st == ORCD_OK ? EXIT_OK : cli_fail(&err);
}

const cli_command cmd_tokenize = {"tokenize", "[MODEL] TEXT | --file F | --jsonl | --decode IDS",
                                  "turn text into token ids and back", option, run};
