#include "text/vocab.h"

#include <stdlib.h>
#include <string.h>

#include "text/utf8.h"

static uint32_t hash_bytes(const char *s, size_t n) {
    uint64_t h = 0x9e3779b97f4a7c15u ^ n;
    for (uint64_t w; n >= 8; s += 8, n -= 8) {
        memcpy(&w, s, 8);
        h = (h ^ w) * 0xff51afd7ed558ccdu;
        h ^= h >> 32;
    }
    uint64_t w = 0;
    for (size_t i = 0; i < n; i++)
        w = w << 8 | (uint8_t)s[i];
    h = (h ^ w) * 0xff51afd7ed558ccdu;
    h = (h ^ h >> 32) * 0xc4ceb9fe1a85ec53u;
    return (uint32_t)(h >> 32);
}

static uint32_t hash_pair(int32_t left, int32_t right) {
    uint64_t h = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9e3779b97f4a7c15u;
    return (uint32_t)(h >> 32 ^ h >> 20);
}

/* GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the other 68 for U+0100 and on, in order. */
static bool stands_for_itself(uint32_t byte) {
    return (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || (byte >= 0xae && byte <= 0xff);
}

static int byte_of(uint32_t c) {
    if (c < 256)
        return stands_for_itself(c) ? (int)c : -1;
    for (uint32_t byte = 0, at = 256; byte < 256; byte++)
        if (!stands_for_itself(byte) && at++ == c)
            return (int)byte;
    return -1;
}

void tok_spell_byte(int byte, char out[3]) {
    uint32_t c = (uint32_t)byte;
    if (!stands_for_itself(c)) {
        c = 256;
        for (uint32_t lower = 0; lower < (uint32_t)byte; lower++)
            c += !stands_for_itself(lower);
    }
    out[0] = (char)(c < 0x80 ? c : 0xc0 | c >> 6);
    out[1] = (char)(c < 0x80 ? 0 : 0x80 | (c & 0x3f));
    out[2] = '\0';
}

/* Append the bytes that `spelled` stands for. */
static bool unspell(const char *spelled, size_t len, buf *out) {
    for (size_t i = 0; i < len;) {
        uint32_t c;
        i += utf8_next((const uint8_t *)spelled + i, len - i, &c);
        int byte = byte_of(c);
        if (byte < 0)
            return false;
        buf_char(out, (char)byte);
    }
    return true;
}

static orcd_status no_memory(const char *where, orcd_error *err) {
    return orcd_fail(err, ORCD_ERR_NOMEM, "%s: not enough memory for the vocabulary", where);
}

orcd_status tok_new(int64_t n_vocab, const char *where, tok **out, orcd_error *err) {
    *out = NULL;
    if (n_vocab < 1 || n_vocab > TOK_MAX_IDS)
        return orcd_fail(err, ORCD_ERR_FORMAT, "%s: a vocabulary of %lld tokens; 1 to %d are possible", where,
                         (long long)n_vocab, TOK_MAX_IDS);
    tok *t = calloc(1, sizeof *t);
    if (t)
        t->entry = calloc((size_t)n_vocab, sizeof *t->entry);
    if (!t || !t->entry) {
        tok_close(t);
        return no_memory(where, err);
    }
    t->n_vocab = (int32_t)n_vocab;
    t->bos = t->eos = -1;
    *out = t;
    return ORCD_OK;
}

void tok_close(tok *t) {
    if (!t)
        return;
    buf_free(&t->pool);
    free(t->entry);
    free(t->text.slot);
    free(t->special.slot);
    free(t->merge);
    free(t->special_len);
    free(t);
}

static orcd_status check_id(const tok *t, int64_t id, size_t len, const char *where, orcd_error *err) {
    if (id < 0 || id >= t->n_vocab)
        return orcd_fail(err, ORCD_ERR_FORMAT, "%s: token id %lld is outside 0..%d", where, (long long)id,
                         t->n_vocab - 1);
    if (len == 0)
        return orcd_fail(err, ORCD_ERR_FORMAT, "%s: token %lld is empty", where, (long long)id);
    return ORCD_OK;
}

orcd_status tok_put_text(tok *t, int64_t id, const char *spelled, size_t len, const char *where, orcd_error *err) {
    ORCD_TRY(check_id(t, id, len, where, err));
    if (t->entry[id].flags)
        return orcd_fail(err, ORCD_ERR_FORMAT, "%s: token id %lld is given twice", where, (long long)id);
    tok_entry e = {.at = t->pool.len, .flags = TOK_TEXT};
    if (!unspell(spelled, len, &t->pool))
        return orcd_fail(err, ORCD_ERR_FORMAT, "%s: token %lld has a character outside the byte-level alphabet", where,
                         (long long)id);
    e.len = t->pool.len - e.at;
    t->entry[id] = e;
    return t->pool.failed ? no_memory(where, err) : ORCD_OK;
}

orcd_status tok_put_special(tok *t, int64_t id, const char *text, size_t len, const char *where, orcd_error *err) {
    ORCD_TRY(check_id(t, id, len, where, err));
    if (t->entry[id].flags & TOK_SPECIAL)
        return orcd_fail(err, ORCD_ERR_FORMAT, "%s: special token id %lld is given twice", where, (long long)id);
    t->entry[id] = (tok_entry){.at = t->pool.len, .len = len, .flags = TOK_SPECIAL};
    buf_add(&t->pool, text, len);
    return t->pool.failed ? no_memory(where, err) : ORCD_OK;
}

/* ---- maps ---- */

static int32_t find(const tok *t, const tok_map *m, const char *bytes, size_t len, uint32_t hash, uint32_t *at) {
    for (*at = hash & m->mask; m->slot[*at].id >= 0; *at = (*at + 1) & m->mask) {
        const tok_slot *s = &m->slot[*at];
        if (s->hash != hash)
            continue;
        const tok_entry *e = &t->entry[s->id];
        if (e->len == len && memcmp(t->pool.data + e->at, bytes, len) == 0)
            return s->id;
    }
    return -1;
}

int32_t tok_lookup(const tok *t, const tok_map *m, const char *bytes, size_t len) {
    uint32_t at;
    return find(t, m, bytes, len, hash_bytes(bytes, len), &at);
}

/* Slots for n entries at a load of at most one half; 0 when they are too many. */
static uint32_t slots_for(uint64_t n) {
    uint32_t cap = 16;
    if (n > UINT32_MAX / 4)
        return 0;
    while (cap < 2 * n)
        cap *= 2;
    return cap;
}

/* All entries with `flag`. On a repetition *repeated is its id. */
static bool map_fill(const tok *t, uint8_t flag, tok_map *m, int32_t *repeated) {
    uint64_t n = 0;
    for (int32_t id = 0; id < t->n_vocab; id++)
        n += (t->entry[id].flags & flag) != 0;
    uint32_t cap = slots_for(n);
    m->slot = malloc(cap * sizeof *m->slot);
    if (!m->slot)
        return false;
    memset(m->slot, 0xff, cap * sizeof *m->slot);
    m->mask = cap - 1;
    for (int32_t id = 0; id < t->n_vocab; id++) {
        const tok_entry *e = &t->entry[id];
        if (!(e->flags & flag))
            continue;
        uint32_t at, hash = hash_bytes(t->pool.data + e->at, e->len);
        if (find(t, m, t->pool.data + e->at, e->len, hash, &at) >= 0)
            *repeated = id;
        else
            m->slot[at] = (tok_slot){hash, id};
    }
    return true;
}

static int longest_first(const void *a, const void *b) {
    size_t x = *(const size_t *)a, y = *(const size_t *)b;
    return (x < y) - (x > y);
}

/* Distinct lengths and first bytes of the specials, for the scan in tok_encode. */
static bool index_specials(tok *t) {
    size_t n = 0, n_distinct = 0;
    t->special_len = malloc((size_t)t->n_vocab * sizeof *t->special_len);
    if (!t->special_len)
        return false;
    for (int32_t id = 0; id < t->n_vocab; id++) {
        const tok_entry *e = &t->entry[id];
        if (!(e->flags & TOK_SPECIAL))
            continue;
        t->special_lead[(uint8_t)t->pool.data[e->at]] = true;
        t->special_len[n++] = e->len;
    }
    qsort(t->special_len, n, sizeof *t->special_len, longest_first);
    for (size_t i = 0; i < n; i++)
        if (i == 0 || t->special_len[i] != t->special_len[i - 1])
            t->special_len[n_distinct++] = t->special_len[i];
    t->n_special_len = n_distinct;
    return true;
}

orcd_status tok_map_all(tok *t, uint64_t n_merge, const char *where, orcd_error *err) {
    int32_t repeated = -1;
    uint32_t cap = slots_for(n_merge);
    if (!cap)
        return orcd_fail(err, ORCD_ERR_FORMAT, "%s: too many merges", where);
    t->merge = malloc(cap * sizeof *t->merge);
    if (!t->merge || !map_fill(t, TOK_TEXT, &t->text, &repeated) || !map_fill(t, TOK_SPECIAL, &t->special, &repeated) ||
        !index_specials(t))
        return no_memory(where, err);
    if (repeated >= 0)
        return orcd_fail(err, ORCD_ERR_FORMAT, "%s: token %d repeats the text of an earlier one", where, repeated);
    memset(t->merge, 0xff, cap * sizeof *t->merge);
    t->merge_mask = cap - 1;
    for (int byte = 0; byte < 256; byte++) {
        char c = (char)byte;
        t->byte_id[byte] = tok_lookup(t, &t->text, &c, 1);
        if (t->byte_id[byte] < 0)
            return orcd_fail(err, ORCD_ERR_FORMAT, "%s: no token for byte 0x%02x, so not every text can be encoded",
                             where, byte);
    }
    return ORCD_OK;
}

static tok_merge *merge_slot(const tok *t, int32_t left, int32_t right) {
    uint32_t at = hash_pair(left, right) & t->merge_mask;
    while (t->merge[at].result >= 0 && (t->merge[at].left != left || t->merge[at].right != right))
        at = (at + 1) & t->merge_mask;
    return &t->merge[at];
}

const tok_merge *tok_find_merge(const tok *t, int32_t left, int32_t right) {
    const tok_merge *m = merge_slot(t, left, right);
    return m->result < 0 ? NULL : m;
}

orcd_status tok_put_merge(tok *t, uint32_t rank, const char *left, size_t n_left, const char *right, size_t n_right,
                          const char *where, orcd_error *err) {
    buf raw = {0};
    tok_merge m = {.left = -1, .right = -1, .result = -1, .rank = rank};
    bool spelled = unspell(left, n_left, &raw);
    size_t cut = raw.len;
    spelled = spelled && unspell(right, n_right, &raw);
    if (raw.failed) {
        buf_free(&raw);
        return no_memory(where, err);
    }
    if (spelled && cut > 0 && raw.len > cut) {
        m.left = tok_lookup(t, &t->text, raw.data, cut);
        m.right = tok_lookup(t, &t->text, raw.data + cut, raw.len - cut);
        m.result = tok_lookup(t, &t->text, raw.data, raw.len);
    }
    buf_free(&raw);
    if (m.left < 0 || m.right < 0 || m.result < 0)
        return orcd_fail(err, ORCD_ERR_FORMAT, "%s: merge %u: its halves and their union are not all in the vocabulary",
                         where, rank);
    *merge_slot(t, m.left, m.right) = m;
    return ORCD_OK;
}

orcd_status tok_seal(tok *t, const char *where, orcd_error *err) {
    ids own = {0};
    orcd_status status = ORCD_OK;
    for (int32_t id = 0; id < t->n_vocab && status == ORCD_OK; id++) {
        tok_entry *e = &t->entry[id];
        if (!(e->flags & TOK_TEXT))
            continue;
        if (e->len > t->max_text_len)
            t->max_text_len = e->len;
        if (!t->whole_words) {
            own.n = 0;
            status = tok_bpe(t, (const uint8_t *)t->pool.data + e->at, e->len, &own);
        }
        if (t->whole_words || (own.n == 1 && own.data[0] == id))
            e->flags |= TOK_WHOLE;
    }
    ids_free(&own);
    return status == ORCD_OK ? ORCD_OK : no_memory(where, err);
}
