/* text/chat/parts.h: what the files of harmony share. For text/chat only. */
#ifndef ORCD_TEXT_CHAT_PARTS_H
#define ORCD_TEXT_CHAT_PARTS_H

#include "text/chat/harmony.h"
#include "text/compact.h"

struct harmony {
    const tok *tok;
    int32_t start, channel, constrain, message, end, call, ret;
    int32_t eot;       /* <|endoftext|>, -1 when absent */
    int32_t assistant; /* the word as one token, -1 when it is more */
};

static inline bool harmony_is_stop(const harmony *h, int32_t id) {
    return id == h->ret || id == h->call || (id == h->eot && id >= 0);
}

/* What may stand in a header: names of tools and channels. */
static inline bool harmony_is_name_byte(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '.' ||
           c == '-';
}
static inline bool harmony_is_name(chat_str s) {
    if (s.len < 1 || s.len > 64)
        return false;
    for (size_t i = 0; i < s.len; i++)
        if (!harmony_is_name_byte(s.data[i]))
            return false;
    return true;
}

/* Whether `name` is one of the built-in tools that are switched on. They are addressed without "functions.". */
bool harmony_is_builtin(chat_str name, bool browser, bool python);
extern const char harmony_browser_text[], harmony_python_text[]; /* sections of the system message */

/* Append a JSON schema as TypeScript, the way the model was trained to read it. `plain`: exactly as OpenAI's library,
 * see HARMONY_REF_SCHEMA. Fails with ORCD_ERR_LIMIT. */
orcd_status harmony_schema(const json_t *schema, bool plain, buf *out, orcd_error *err) ORCD_MUST_USE;
/* True when a schema admits the empty object only. */
bool harmony_schema_is_empty(const json_t *schema);

#endif
