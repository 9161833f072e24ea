/* The streaming detokeniser of tokenizer.h: bytes in, whole characters out. */
#include "text/tokenizer.h"
#include "text/utf8.h"

#define REPLACEMENT "\xef\xbf\xbd"

void tok_stream_push(tok_stream *s, const char *bytes, size_t len, buf *out) {
    for (size_t i = 0; i < len;) {
        uint8_t c = (uint8_t)bytes[i];
        if (s->n_held) {
            if (!utf8_continues(s->held[0], s->n_held, c)) { /* the held bytes are a maximal subpart; c is seen anew */
                tok_stream_end(s, out);
                continue;
            }
            s->held[s->n_held++] = c;
            if (s->n_held == utf8_length(s->held[0])) {
                buf_add(out, s->held, s->n_held);
                s->n_held = 0;
            }
            i++;
            continue;
        }
        size_t ascii = i;
        while (ascii < len && (uint8_t)bytes[ascii] < 0x80)
            ascii++;
        if (ascii > i) {
            buf_add(out, bytes + i, ascii - i);
            i = ascii;
            continue;
        }
        if (utf8_length(c))
            s->held[s->n_held++] = c;
        else
            buf_str(out, REPLACEMENT);
        i++;
    }
}

void tok_stream_end(tok_stream *s, buf *out) {
    if (s->n_held)
        buf_str(out, REPLACEMENT);
    s->n_held = 0;
}
