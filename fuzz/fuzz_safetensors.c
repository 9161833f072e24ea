/* Any bytes are an error or a safetensors file that keeps every relation; seeds are in fuzz/corpus/safetensors. */
#include "../tests/relations.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    st_model *m = NULL;
    orcd_error err = {0};
    if (st_parse(data, size, &m, &err) == ORCD_OK)
        st_relations(data, size, m);
    else
        MUST(!m && err.code && err.message[0] && err.pos <= size);
    st_close(m);
    return 0;
}
