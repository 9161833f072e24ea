/* Any tokenizer.json either fails to load or gives a tokenizer for which decode(encode(b)) == b. The input is a JSON
 * document, a zero byte, then text. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "text/tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const uint8_t *zero = size ? memchr(data, 0, size) : NULL;
    size_t n_json = zero ? (size_t)(zero - data) : size, n_text = zero ? size - n_json - 1 : 0;
    const char *text = zero ? (const char *)zero + 1 : "";
    char path[64];
    snprintf(path, sizeof path, "/tmp/orcd-fuzz-%d.json", (int)getpid());
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, n_json, f) != n_json || fclose(f) != 0)
        abort();
    tok *t = NULL;
    orcd_error err;
    if (tok_open_json(path, &t, &err) == ORCD_OK) {
        for (int specials = 0; specials < 2; specials++) {
            ids out = {0};
            buf back = {0};
            if (tok_encode(t, text, n_text, specials, &out) != ORCD_OK)
                abort();
            tok_decode(t, out.data, out.n, true, &back);
            if (back.len != n_text || (n_text && memcmp(back.data, text, n_text) != 0))
                abort();
            buf_free(&back);
            ids_free(&out);
        }
    }
    tok_close(t);
    remove(path);
    return 0;
}
