/* Reading the header of a sampled message. Well-formed it is
 *   role [to=R] <|channel|> name [to=R] [<|constrain|> type]
 * but models also glue words together, repeat them, leave control tokens out, or put them elsewhere; each rule below
 * answers a form that was observed. Anything unknown is ignored, so that every text means something. */
#include "text/chat/header.h"

#include <stdlib.h>
#include <strings.h>

void header_clear(header *h) {
    buf_clear(&h->text);
    h->n_part = h->n_text_ids = 0;
}

void header_free(header *h) {
    buf_free(&h->text);
    *h = (header){0};
}

void header_begin(header *h, header_part part) {
    if (h->n_part == HEADER_MAX_PARTS) {
        memmove(h->part + 1, h->part + 2, (HEADER_MAX_PARTS - 2) * sizeof *h->part);
        memmove(h->at + 1, h->at + 2, (HEADER_MAX_PARTS - 2) * sizeof *h->at);
        h->n_part--;
    }
    h->part[h->n_part] = part;
    h->at[h->n_part++] = h->text.len;
    h->n_text_ids = 0;
}

void header_add(header *h, const char *bytes, size_t n) {
    buf_add(&h->text, bytes, n);
    h->n_text_ids++;
}

/* ---- words ---- */

typedef struct span {
    const char *at, *end;
} span;

static bool is_blank(char c) { return c == ' ' || c == '\n' || c == '\r' || c == '\t'; }

static void skip_blank(span *s) {
    while (s->at < s->end && is_blank(*s->at))
        s->at++;
}

static bool starts(const span *s, const char *word) {
    size_t n = strlen(word);
    return (size_t)(s->end - s->at) >= n && strncasecmp(s->at, word, n) == 0;
}

static bool take(span *s, const char *word) {
    if (!starts(s, word))
        return false;
    s->at += strlen(word);
    return true;
}

static bool word_ends(const span *s) { return s->at == s->end || is_blank(*s->at); }

static bool take_word(span *s, const char *word) {
    span after = *s;
    if (!take(&after, word) || !word_ends(&after))
        return false;
    *s = after;
    return true;
}

static span take_name(span *s) {
    span name = {s->at, s->at};
    while (s->at < s->end && harmony_is_name_byte(*s->at))
        name.end = ++s->at;
    return name;
}

static header_channel take_channel(span *s) {
    if (take(s, "analysis"))
        return CHANNEL_ANALYSIS;
    if (take(s, "commentary"))
        return CHANNEL_COMMENTARY;
    return take(s, "final") ? CHANNEL_FINAL : CHANNEL_NONE;
}

static bool take_type(span *s) {
    span after = *s;
    if (!take(&after, "json") && !take(&after, "code") && !take(&after, "response"))
        return false;
    if (!word_ends(&after) && *after.at != '{' && *after.at != '[')
        return false;
    *s = after;
    return true;
}

/* ---- recipients ---- */

static const char *declared_name(const header_tools *tools, const char *name, size_t n) {
    for (size_t i = 0; i < tools->n; i++)
        if (strlen(tools->name[i]) == n && memcmp(tools->name[i], name, n) == 0)
            return tools->name[i];
    return NULL;
}

/* Length of `name` without one glued word at its end. */
static size_t unglue(const char *name, size_t n) {
    static const char *const glued[] = {"json", "code", "commentary", "analysis", "final"};
    for (size_t i = 0; i < ORCD_COUNT(glued); i++) {
        size_t g = strlen(glued[i]);
        if (n > g && strncasecmp(name + n - g, glued[i], g) == 0)
            return n - g;
    }
    return n;
}

static const char *declared_in_any_case(const header_tools *tools, const char *name, size_t n) {
    const char *found = NULL;
    for (size_t i = 0; i < tools->n; i++)
        if (strlen(tools->name[i]) == n && strncasecmp(tools->name[i], name, n) == 0) {
            if (found)
                return NULL;
            found = tools->name[i];
        }
    return found;
}

/* Make `raw` the recipient of *out: the declared tool that it means, else its own name; nobody for to=assistant. */
static void set_recipient(span raw, const header_tools *tools, header_meaning *out) {
    while (take(&raw, "functions.") || take(&raw, "function."))
        ;
    size_t n = (size_t)(raw.end - raw.at);
    span whole = raw;
    out->tool[0] = '\0';
    out->declared = false;
    if (n == 0 || take_word(&whole, "assistant") || take_word(&whole, "user") || take_word(&whole, "all"))
        return;
    const char *found = declared_name(tools, raw.at, n);
    for (size_t shorter = n, next; !found && (next = unglue(raw.at, shorter)) < shorter; shorter = next)
        found = declared_name(tools, raw.at, next);
    if (!found)
        found = declared_in_any_case(tools, raw.at, n);
    out->declared = found || harmony_is_builtin((chat_str){raw.at, n}, tools->browser, tools->python);
    if (found) {
        raw.at = found;
        n = strlen(found);
    }
    n = n < sizeof out->tool ? n : sizeof out->tool - 1;
    memcpy(out->tool, raw.at, n);
    out->tool[n] = '\0';
}

/* ---- segments ---- */

typedef struct reading {
    const header_tools *tools;
    header_meaning *out;
    bool to_assistant, tool_role;
} reading;

static bool take_recipient(reading *r, span *s) {
    bool is_to = take(s, "to=");
    if (!is_to && !starts(s, "functions.") && !starts(s, "function."))
        return false;
    span name = take_name(s), whole = name;
    if (name.at == name.end)
        return true;
    r->to_assistant = r->to_assistant || take_word(&whole, "assistant");
    set_recipient(name, r->tools, r->out);
    return true;
}

/* A declared tool's name standing alone, where a channel or a role is expected. */
static bool take_declared(reading *r, span *s) {
    span after = *s, name = take_name(&after);
    header_meaning trial = {0};
    if (name.at == name.end || !word_ends(&after))
        return false;
    set_recipient(name, r->tools, &trial);
    if (!trial.declared)
        return false;
    set_recipient(name, r->tools, r->out);
    *s = after;
    return true;
}

/* What is glued to a channel's name: a type or junk, but not the body. */
static void skip_glued(span *s) {
    while (s->at < s->end && !is_blank(*s->at) && *s->at != '{' && *s->at != '[' && !starts(s, "to="))
        s->at++;
}

static void read_role(reading *r, span *s) {
    static const char *const other[] = {"user", "system", "developer", "tool"};
    bool assistant = false;
    skip_blank(s);
    while (take(s, "assistant"))
        assistant = true;
    for (size_t i = 0; !assistant && i < ORCD_COUNT(other); i++)
        if (take_word(s, other[i])) {
            r->out->invented = true;
            return;
        }
    if (!assistant && !starts(s, "to=") && (take_declared(r, s) || take_recipient(r, s))) {
        r->tool_role = true;
        return;
    }
    span after = *s;
    bool glued = s->at < s->end && !is_blank(*s->at);
    skip_blank(&after);
    header_channel c = take_channel(&after);
    if (c != CHANNEL_NONE && (glued || word_ends(&after))) { /* the role is a channel, or a channel is glued to it */
        r->out->channel = c;
        *s = after;
    }
}

/* One segment; what it has no use for stays in *s. */
static void read_segment(reading *r, header_part part, span *s) {
    bool has_channel = false;
    const char *junk = NULL; /* glued to the channel's name: body, unless a recipient follows */
    if (part == HEADER_ROLE)
        read_role(r, s);
    for (;;) {
        span before = *s;
        skip_blank(s);
        if (take_recipient(r, s)) {
            junk = NULL;
            continue;
        }
        header_channel c = has_channel || part == HEADER_ROLE ? CHANNEL_NONE : take_channel(s);
        if (c != CHANNEL_NONE) {
            if (part == HEADER_CHANNEL || r->out->channel <= CHANNEL_UNKNOWN)
                r->out->channel = c;
            has_channel = true;
            if (!take_type(s) && s->at < s->end && !is_blank(*s->at)) {
                junk = s->at;
                skip_glued(s);
            }
            continue;
        }
        if (part == HEADER_CHANNEL && !has_channel && take_declared(r, s))
            continue;
        if ((part != HEADER_ROLE || r->out->tool[0]) && take_type(s))
            continue;
        *s = before;
        break;
    }
    if (junk)
        s->at = junk;
    skip_blank(s);
    if (part == HEADER_CHANNEL && !has_channel && s->at < s->end && r->out->channel == CHANNEL_NONE)
        r->out->channel = CHANNEL_UNKNOWN;
}

void header_resolve(const header *h, const header_tools *tools, header_meaning *out) {
    reading r = {.tools = tools, .out = out};
    const char *text = h->text.data ? h->text.data : "";
    *out = (header_meaning){.rest = ""};
    for (size_t i = 0; i < h->n_part; i++) {
        size_t end = i + 1 < h->n_part ? h->at[i + 1] : h->text.len;
        span s = {text + h->at[i], text + end};
        read_segment(&r, h->part[i], &s);
        out->typed = out->typed || h->part[i] == HEADER_TYPE;
        if (s.at < s.end) {
            out->rest = s.at;
            out->n_rest = (size_t)(s.end - s.at);
        }
    }
    if (r.tool_role && r.to_assistant) /* a tool's result, made up */
        out->invented = true;
    if (out->channel == CHANNEL_FINAL && !out->declared)
        out->tool[0] = '\0';
}

header_stray header_judge(const char *text, size_t n) {
    static const char *const channel[] = {"analysis", "commentary", "final"};
    span s = {text, text + n};
    skip_blank(&s);
    while (take(&s, "assistant"))
        ;
    skip_blank(&s);
    size_t left = (size_t)(s.end - s.at);
    if (left == 0)
        return STRAY_BLANK;
    if (left < 9 && strncasecmp("assistant", s.at, left) == 0)
        return STRAY_MAYBE;
    for (size_t i = 0; i < ORCD_COUNT(channel); i++) {
        span after = s;
        if (left < strlen(channel[i]) && strncasecmp(channel[i], s.at, left) == 0)
            return STRAY_MAYBE;
        if (!take(&after, channel[i]))
            continue;
        if (after.at == after.end)
            return STRAY_NAME;
        return is_blank(*after.at) || starts(&after, "to=") || take_type(&after) ? STRAY_HEADER : STRAY_BODY;
    }
    return STRAY_BODY;
}
