#include "cli/line.h"

#include <errno.h>
#include <fcntl.h>
#include <histedit.h>
#include <langinfo.h>
#include <locale.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/cli.h"

struct line_reader {
    EditLine *edit; /* NULL: standard input is no terminal */
    History *history;
    char *path;
    const char *prompt;
    bool interrupted;
    char *line; /* of getline */
    size_t cap;
};

enum { HISTORY_LINES = 2000 };
static const char fence[] = "\"\"\"";

static char *prompt_of(EditLine *e) {
    line_reader *l;
    el_get(e, EL_CLIENTDATA, &l);
    return (char *)(uintptr_t)l->prompt;
}

static unsigned char on_ctrl_c(EditLine *e, int key) {
    line_reader *l;
    (void)key;
    el_get(e, EL_CLIENTDATA, &l);
    l->interrupted = true;
    fputs("^C\n", stdout);
    return CC_EOF;
}

static bool open_editor(line_reader *l) {
    HistEvent ev;
    setlocale(LC_CTYPE, "");
    if (strcmp(nl_langinfo(CODESET), "UTF-8") != 0)
        setlocale(LC_CTYPE, "C.UTF-8");
    l->edit = el_init("orcd", stdin, stdout, stderr);
    l->history = history_init();
    if (!l->edit || !l->history)
        return false;
    el_set(l->edit, EL_CLIENTDATA, l);
    el_set(l->edit, EL_PROMPT, prompt_of);
    el_set(l->edit, EL_EDITOR, "emacs");
    el_set(l->edit, EL_HIST, history, l->history);
    el_set(l->edit, EL_ADDFN, "orcd-interrupt", "give up this line", on_ctrl_c);
    el_set(l->edit, EL_BIND, "^C", "orcd-interrupt", NULL);
    el_set(l->edit, EL_BIND, "^R", "em-inc-search-prev", NULL);
    el_set(l->edit, EL_SETTY, "-d", "intr=", NULL); /* while editing, Ctrl-C is a key and no signal */
    history(l->history, &ev, H_SETSIZE, HISTORY_LINES);
    history(l->history, &ev, H_SETUNIQUE, 1);
    if (l->path)
        history(l->history, &ev, H_LOAD, l->path);
    return true;
}

orcd_status line_open(const char *path, line_reader **out, orcd_error *err) {
    line_reader *l = *out = calloc(1, sizeof *l);
    bool ok = l != NULL;
    if (ok && path)
        ok = (l->path = strdup(path)) != NULL;
    if (ok && term_is_tty(STDIN_FILENO))
        ok = open_editor(l);
    if (ok)
        return ORCD_OK;
    line_close(l);
    *out = NULL;
    return orcd_fail(err, ORCD_ERR_NOMEM, "the terminal's line editor could not be started");
}

void line_close(line_reader *l) {
    if (!l)
        return;
    if (l->history)
        history_end(l->history);
    if (l->edit)
        el_end(l->edit);
    free(l->path);
    free(l->line);
    free(l);
}

/* At once, so that a crash forgets nothing; only the owner may read it. */
static void remember(line_reader *l, const buf *b) {
    HistEvent ev;
    if (!l->history || !b->len)
        return;
    history(l->history, &ev, H_ENTER, b->data);
    int fd = l->path ? open(l->path, O_CREAT | O_WRONLY, 0600) : -1;
    if (fd >= 0) {
        close(fd);
        history(l->history, &ev, H_SAVE, l->path);
    }
}

/* One line without its end; NULL at the end of input. */
static const char *next(line_reader *l, const char *prompt, size_t *len) {
    const char *s = NULL;
    if (l->edit) {
        int n = 0;
        l->prompt = prompt;
        s = el_gets(l->edit, &n);
        l->interrupted = l->interrupted || (!s && n < 0 && errno == EINTR); /* a signal from elsewhere */
        *len = s && n > 0 ? (size_t)n : 0;
    } else {
        ssize_t n = getline(&l->line, &l->cap, stdin);
        s = n > 0 ? l->line : NULL;
        *len = n > 0 ? (size_t)n : 0;
    }
    if (*len == 0)
        return NULL;
    if (s[*len - 1] == '\n')
        --*len;
    return s;
}

static bool ends_with_fence(const char *s, size_t len) { return len >= 3 && memcmp(s + len - 3, fence, 3) == 0; }

line_end line_read(line_reader *l, const char *prompt, buf *out) {
    bool fenced = false;
    size_t len;
    const char *s;
    buf_clear(out);
    l->interrupted = false;
    for (bool first = true; (s = next(l, first ? prompt : "… ", &len)); first = false) {
        if (first && len >= 3 && memcmp(s, fence, 3) == 0) {
            fenced = true;
            s += 3;
            len -= 3;
            if (len == 0)
                continue;
        }
        bool last = fenced ? ends_with_fence(s, len) : len == 0 || s[len - 1] != '\\';
        buf_add(out, s, fenced && last ? len - 3 : last ? len : fenced ? len : len - 1);
        if (last) {
            remember(l, out);
            return LINE_TEXT;
        }
        buf_char(out, '\n');
    }
    if (l->interrupted)
        return LINE_INTERRUPTED;
    return out->len ? LINE_TEXT : LINE_EOF;
}
