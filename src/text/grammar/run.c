/* Which bytes may come next. Where a text can be read in several ways (anyOf) all of them are followed. */
#include <stdlib.h>
#include <string.h>

#include "text/grammar/run.h"
#include "text/utf8.h"

enum { MAX_GAP = 64, MAX_EXPONENT = 2 }; /* indentation; digits */

enum { START, OPEN, NEXT, KEY, COLON, COMMA, TEXT, ESCAPE, HEX, HEX_END = HEX + 4 }; /* TEXT: of a string or free key */
enum { MINUS = 1, ZERO, WHOLE, POINT, FRACTION, E, SIGN, EXPONENT };                 /* of numbers, after START */

/* ---- ways ---- */

static int keep(grammar_run *r, const frame *f) {
    if (r->n_frame == MAX_FRAMES)
        return GRAMMAR_NONE;
    r->frame[r->n_frame] = *f;
    return r->n_frame++;
}

static void add_way(grammar_run *r, int top) {
    for (int k = 0; k < r->to->n; k++)
        if (r->way[r->to->first + k] == top)
            return;
    if (top >= 0 && r->to->n < MAX_WAYS)
        r->way[r->to->first + r->to->n++] = top;
}

static void put(grammar_run *r, frame f) { add_way(r, keep(r, &f)); }

static void go(grammar_run *r, frame f, int state) {
    f.state = (uint8_t)state;
    f.gap = 0;
    put(r, f);
}

/* A space, or a line break and an indentation: a model must not go on with white space for ever. */
static bool gap(grammar_run *r, frame f, uint8_t c) {
    bool is = c == ' ' || c == '\n';
    if (is && f.gap < MAX_GAP && (c == ' ' || f.gap == 0)) {
        f.gap = c == ' ' && f.gap == 0 ? MAX_GAP : f.gap + 1;
        put(r, f);
    }
    return is;
}

static void step(grammar_run *r, frame f, uint8_t c);

static bool can_begin(const grammar_run *r, int32_t value, int32_t depth) {
    return depth + r->g->node[value].levels <= GRAMMAR_LEVELS;
}

/* `below` goes on after a value, whose first byte is c, or still to come (c < 0). */
static void begin(grammar_run *r, frame below, int32_t value, int c) {
    int n_frame = r->n_frame, n_way = r->to->n;
    below.state = COMMA;
    below.gap = 0;
    frame f = {.up = keep(r, &below), .node = value, .depth = below.depth + 1};
    if (f.up < 0 || !can_begin(r, value, f.depth))
        return;
    if (c < 0)
        put(r, f);
    else
        step(r, f, (uint8_t)c);
    if (r->to->n == n_way)
        r->n_frame = n_frame;
}

/* f was done before this byte. */
static void after(grammar_run *r, const frame *f, uint8_t c) {
    if (f->up > 0)
        step(r, r->frame[f->up], c);
}

/* ---- texts ---- */

static int byte_at(const grammar *g, const text *t, int32_t at) {
    return at < t->len ? (uint8_t)g->bytes.data[t->at + at] : -1;
}

/* Leave those of lo .. hi - 1 whose next byte is c. */
static bool narrow(const grammar *g, frame *f, uint8_t c) {
    int32_t end[2];
    for (int k = 0; k < 2; k++) { /* the first whose byte is at least c, and at least c + 1 */
        int32_t lo = k ? end[0] : f->lo, hi = f->hi;
        while (lo < hi) {
            int32_t mid = lo + (hi - lo) / 2;
            if (byte_at(g, &g->text[mid], f->at) < c + k)
                lo = mid + 1;
            else
                hi = mid;
        }
        end[k] = lo;
    }
    f->lo = end[0];
    f->hi = end[1];
    f->at++;
    return f->lo < f->hi;
}

static bool is_whole(const grammar *g, const frame *f) { return f->lo < f->hi && g->text[f->lo].len == f->at; }

static void step_literal(grammar_run *r, frame f, uint8_t c) {
    const node *n = &r->g->node[f.node];
    if (f.state == START) {
        f.lo = n->first;
        f.hi = n->first + n->n;
    } else if (is_whole(r->g, &f)) { /* and the beginning of another */
        after(r, &f, c);
    }
    if (!narrow(r->g, &f, c))
        return;
    if (is_whole(r->g, &f) && f.hi - f.lo == 1)
        add_way(r, f.up);
    else
        go(r, f, TEXT);
}

/* ---- numbers ---- */

static int64_t ten_to(int n) {
    int64_t v = 1;
    while (n-- > 0)
        v *= 10;
    return v;
}

/* A number from `least` to `most`, in units of the last digit and without its sign, is in the range. */
static bool in_range(const node *n, const frame *f, int64_t least, int64_t most) {
    int64_t low = f->lead ? -n->high : n->low, high = f->lead ? -n->low : n->high;
    return !n->bounded || (least <= high && most >= low);
}

/* What the digits so far can still become. */
static bool fits_range(const node *n, const frame *f) {
    bool any = f->state <= MINUS && in_range(n, f, 0, GRAMMAR_BEYOND - 1);
    for (int more = 0; !any && f->state > MINUS && more <= (f->state == WHOLE ? n->whole - f->n : 0); more++) {
        int64_t unit = ten_to(n->fraction - f->at + more);
        any = in_range(n, f, f->value * unit, f->value * unit + unit - 1);
    }
    return any;
}

static bool is_number(const node *n, const frame *f) {
    bool whole = f->state == ZERO || f->state == WHOLE || f->state == FRACTION || f->state == EXPONENT;
    int64_t v = whole && n->bounded ? f->value * ten_to(n->fraction - f->at) : 0;
    return whole && in_range(n, f, v, v);
}

static void go_number(grammar_run *r, frame f, int state) {
    f.state = (uint8_t)state;
    f.gap = 0;
    if (!r->g->node[f.node].bounded || fits_range(&r->g->node[f.node], &f))
        put(r, f);
}

/* One digit more of a part that has at most so many. */
static void digit(grammar_run *r, frame f, int state, int value, int most) {
    f.n = f.state == state ? f.n + 1 : 1;
    if (r->g->node[f.node].bounded) {
        f.value = f.value * 10 + value;
        f.at += state == FRACTION;
    }
    if (f.n <= most)
        go_number(r, f, state);
}

static void step_number(grammar_run *r, frame f, uint8_t c) {
    const node *n = &r->g->node[f.node];
    bool is_digit = c >= '0' && c <= '9';
    int s = f.state;
    if (s == START && c == '-') {
        f.lead = 1;
        go_number(r, f, MINUS);
    } else if ((s == START || s == MINUS) && c == '0')
        go_number(r, f, ZERO);
    else if (is_digit && (s == START || s == MINUS || s == WHOLE))
        digit(r, f, WHOLE, c - '0', n->whole);
    else if (is_digit && (s == POINT || s == FRACTION))
        digit(r, f, FRACTION, c - '0', n->fraction);
    else if (is_digit && (s == E || s == SIGN || s == EXPONENT))
        digit(r, f, EXPONENT, c - '0', MAX_EXPONENT);
    else if (n->fraction && c == '.' && (s == ZERO || s == WHOLE))
        go_number(r, f, POINT);
    else if (n->fraction && !n->bounded && (c == 'e' || c == 'E') && (s == ZERO || s == WHOLE || s == FRACTION))
        go_number(r, f, E);
    else if (s == E && (c == '+' || c == '-'))
        go_number(r, f, SIGN);
    else if (is_number(n, &f))
        after(r, &f, c);
}

/* ---- strings, and keys that are not in the schema ---- */

/* Such a key must not become one that is: it is not spelled with escapes as long as it could. */
static bool may_be_member(const frame *f) { return f->lo < f->hi; }

static void count_character(const node *n, frame *f) {
    if (n->kind == NODE_STRING && f->n < (n->max < INT32_MAX ? n->max : n->min))
        f->n++;
}

static bool has_room(const node *n, const frame *f) { return n->kind != NODE_STRING || f->n < n->max; }

static void end_text(grammar_run *r, frame f) {
    const node *n = &r->g->node[f.node];
    if (n->kind == NODE_STRING) {
        if (f.n >= n->min)
            add_way(r, f.up);
        return;
    }
    if (may_be_member(&f) && narrow(r->g, &f, '"'))
        return;
    f.lo = GRAMMAR_NONE;
    go(r, f, COLON);
}

static void step_escape(grammar_run *r, frame f, uint8_t c) {
    int value = c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
    if (f.state == ESCAPE) {
        if (c == 'u')
            go(r, f, HEX);
        else if (c && strchr("\"\\/bfnrt", c))
            go(r, f, TEXT);
        return;
    }
    if (value < 0 || (f.state == HEX + 1 && f.lead == 13 && value > 7)) /* no half of a pair */
        return;
    f.lead = f.state == HEX ? (uint8_t)value : 0;
    go(r, f, f.state + 1 == HEX_END ? TEXT : f.state + 1);
}

static void step_text(grammar_run *r, frame f, uint8_t c) {
    const node *n = &r->g->node[f.node];
    if (f.i > 0) {
        if (!utf8_continues(f.lead, f.i, c))
            return;
        f.i = f.i + 1u < utf8_length(f.lead) ? f.i + 1 : 0;
        f.lead = f.i ? f.lead : 0;
    } else if (c == '"') {
        end_text(r, f);
        return;
    } else if (c < 0x20 || !utf8_length(c) || !has_room(n, &f) || (c == '\\' && may_be_member(&f))) {
        return;
    } else {
        count_character(n, &f);
        f.i = utf8_length(c) > 1;
        f.lead = f.i ? c : 0;
    }
    if (may_be_member(&f) && !narrow(r->g, &f, c))
        f.lo = f.hi = f.at = 0;
    go(r, f, c == '\\' && !f.i ? ESCAPE : TEXT);
}

int32_t grammar_free_text(const grammar_run *r, const frame *f) {
    const node *n = &r->g->node[f->node];
    if (f->state != TEXT || f->i || (n->kind != NODE_STRING && n->kind != NODE_OBJECT) || may_be_member(f))
        return 0;
    return n->kind == NODE_STRING && n->max < INT32_MAX ? n->max - f->n : INT32_MAX;
}

/* ---- objects and arrays ---- */

/* The last member that may come next: none after it as long as it is required. */
static int32_t last_member(const grammar *g, const frame *f) {
    const node *n = &g->node[f->node];
    return f->n < n->n ? g->member[n->first + f->n].last : GRAMMAR_NONE;
}

static bool is_next(const grammar_run *r, const frame *f, int32_t k) {
    return k >= f->n && k <= last_member(r->g, f) &&
           can_begin(r, r->g->member[r->g->node[f->node].first + k].node, f->depth + 1);
}

static bool has_required(const grammar *g, const frame *f) {
    int32_t last = last_member(g, f);
    return last >= 0 && g->member[g->node[f->node].first + last].required;
}

static bool may_have_others(const grammar_run *r, const frame *f) {
    int32_t item = r->g->node[f->node].item;
    return item >= 0 && !has_required(r->g, f) && can_begin(r, item, f->depth + 1);
}

static bool may_go_on(const grammar_run *r, const frame *f) {
    bool may = may_have_others(r, f);
    for (int32_t k = f->n; !may && k <= last_member(r->g, f); k++)
        may = is_next(r, f, k);
    return may;
}

static void begin_key(grammar_run *r, frame f) {
    const node *n = &r->g->node[f.node];
    f.lo = n->key;
    f.hi = n->key + n->n;
    f.at = 0;
    if (n->n > 0)
        go(r, f, KEY);
    if (may_have_others(r, &f))
        go(r, f, TEXT);
}

static void step_key(grammar_run *r, frame f, uint8_t c) {
    bool any = false;
    if (!narrow(r->g, &f, c))
        return;
    for (int32_t k = f.lo; !any && k < f.hi; k++)
        any = is_next(r, &f, r->g->text[k].member);
    bool whole = is_whole(r->g, &f);
    if (whole)
        f.lo = r->g->text[f.lo].member;
    if (any)
        go(r, f, whole ? COLON : KEY);
}

static void begin_member(grammar_run *r, frame f) {
    const node *n = &r->g->node[f.node];
    int32_t k = f.lo;
    f.n = k >= 0 ? k + 1 : n->n;
    f.lo = f.hi = f.at = 0;
    begin(r, f, k >= 0 ? r->g->member[n->first + k].node : n->item, -1);
}

static void step_object(grammar_run *r, frame f, uint8_t c) {
    if (f.state == START && c == '{')
        go(r, f, OPEN);
    else if (f.state == KEY)
        step_key(r, f, c);
    else if (f.state == TEXT)
        step_text(r, f, c);
    else if (f.state >= ESCAPE)
        step_escape(r, f, c);
    else if (f.state == COLON && c == ':')
        begin_member(r, f);
    else if (f.state == START || f.state == COLON || gap(r, f, c))
        return;
    else if ((f.state == OPEN || f.state == NEXT) && c == '"')
        begin_key(r, f);
    else if (f.state == COMMA && c == ',' && may_go_on(r, &f))
        go(r, f, NEXT);
    else if ((f.state == OPEN || f.state == COMMA) && c == '}' && !has_required(r->g, &f))
        add_way(r, f.up);
}

static void step_array(grammar_run *r, frame f, uint8_t c) {
    const node *n = &r->g->node[f.node];
    if (f.state == START && c == '[')
        go(r, f, OPEN);
    else if (f.state == START || gap(r, f, c))
        return;
    else if (c == ']' && f.n >= n->min)
        add_way(r, f.up);
    else if (f.n < n->max && (f.state == OPEN || c == ',')) {
        bool first = f.state == OPEN;
        f.n++;
        begin(r, f, n->item, first ? c : -1);
    }
}

/* Whether a value of a kind can begin with this byte. */
static bool begins(node_kind kind, uint8_t c) {
    return kind == NODE_OBJECT   ? c == '{'
           : kind == NODE_ARRAY  ? c == '['
           : kind == NODE_STRING ? c == '"'
           : kind == NODE_NUMBER ? c == '-' || (c >= '0' && c <= '9')
                                 : true;
}

static void step(grammar_run *r, frame f, uint8_t c) {
    const node *n = &r->g->node[f.node];
    r->n_step++;
    if (f.state == START && f.up > 0 && gap(r, f, c))
        return;
    switch (n->kind) {
    case NODE_CHOICE:
        for (int32_t k = n->first; k < n->first + n->n; k++) {
            f.node = r->g->link[k];
            f.gap = 0;
            if (begins(r->g->node[f.node].kind, c) && can_begin(r, f.node, f.depth))
                step(r, f, c);
        }
        break;
    case NODE_OBJECT:
        step_object(r, f, c);
        break;
    case NODE_ARRAY:
        step_array(r, f, c);
        break;
    case NODE_STRING:
        if (f.state == START && c == '"')
            go(r, f, TEXT);
        else if (f.state == TEXT)
            step_text(r, f, c);
        else if (f.state != START)
            step_escape(r, f, c);
        break;
    case NODE_NUMBER:
        step_number(r, f, c);
        break;
    case NODE_LITERAL:
        step_literal(r, f, c);
        break;
    }
}

/* ---- a text ---- */

bool grammar_advance(grammar_run *r, level *from, uint8_t c) {
    level *to = from + 1;
    *to = (level){.first = from->first + from->n};
    r->to = to;
    r->n_frame = from->n_frame;
    for (int k = 0; k < from->n; k++)
        if (r->way[from->first + k] > 0)
            step(r, r->frame[r->way[from->first + k]], c);
    to->n_frame = r->n_frame;
    return to->n > 0;
}

/* What the ways of `now` stand on becomes all there is, in order; the ways of level 0 are those. */
static void settle(grammar_run *r, const level *now) {
    int n = 1, way[MAX_WAYS];
    memset(r->place, 0, sizeof r->place);
    for (int k = 0; k < now->n; k++)
        for (int i = r->way[now->first + k]; i > 0 && !r->place[i]; i = r->frame[i].up)
            r->place[i] = 1;
    for (int i = 1; i < now->n_frame; i++)
        if (r->place[i]) {
            r->kept[n] = r->frame[i];
            r->kept[n].up = r->place[r->frame[i].up];
            r->place[i] = n++;
        }
    for (int k = 0; k < now->n; k++)
        way[k] = r->place[r->way[now->first + k]];
    level next = {.n = now->n, .n_frame = n};
    r->is_masked = r->is_masked && memcmp(&next, &r->level[0], sizeof next) == 0 &&
                   memcmp(way, r->way, (size_t)next.n * sizeof *way) == 0 &&
                   memcmp(r->kept + 1, r->frame + 1, (size_t)(n - 1) * sizeof *r->kept) == 0;
    memcpy(r->frame + 1, r->kept + 1, (size_t)(n - 1) * sizeof *r->kept);
    memcpy(r->way, way, (size_t)next.n * sizeof *way);
    r->level[0] = next;
}

bool grammar_run_feed(grammar_run *r, const char *bytes, size_t len) {
    while (len > 0 && r->level[0].n > 0) {
        level *now = r->level;
        for (; len > 0 && now < r->level + TOKEN_BYTES && now->n > 0; len--)
            grammar_advance(r, now++, (uint8_t)*bytes++);
        settle(r, now);
    }
    return r->level[0].n > 0;
}

bool grammar_run_complete(const grammar_run *r) {
    for (int k = 0; k < r->level[0].n; k++) {
        const frame *f = &r->frame[r->way[k]];
        const node *n = &r->g->node[f->node];
        if (r->way[k] == 0 || (f->up == 0 && ((n->kind == NODE_NUMBER && is_number(n, f)) ||
                                              (n->kind == NODE_LITERAL && is_whole(r->g, f)))))
            return true;
    }
    return false;
}

orcd_status grammar_run_open(grammar *g, const grammar_vocab *v, grammar_run **out) {
    grammar_run *r = *out = calloc(1, sizeof *r);
    if (!r)
        return ORCD_ERR_NOMEM;
    r->v = v;
    grammar_run_restart(r, g);
    r->mask = grammar_new_mask(v);
    if (r->mask)
        return ORCD_OK;
    grammar_run_close(r);
    *out = NULL;
    return ORCD_ERR_NOMEM;
}

void grammar_run_restart(grammar_run *r, grammar *g) {
    grammar_share(g);
    grammar_close(r->g);
    r->g = g;
    r->frame[1] = (frame){.node = 0};
    r->way[0] = 1;
    r->level[0] = (level){.n = 1, .n_frame = 2};
    r->is_masked = false;
}

void grammar_run_close(grammar_run *r) {
    if (!r)
        return;
    grammar_close(r->g);
    free(r->mask);
    free(r);
}
