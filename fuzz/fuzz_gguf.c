/* Any bytes are an error or a GGUF file that keeps every relation; seeds are in fuzz/corpus/gguf. */
#include "../tests/relations.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    gguf *g = NULL;
    orcd_error err = {0};
    if (gguf_parse(data, size, &g, &err) == ORCD_OK)
        gguf_relations(data, size, g);
    else
        MUST(!g && err.code && err.message[0] && err.pos <= size);
    gguf_close(g);
    return 0;
}
