/* What a model will take on a GPU, before there is one: the plan is a dry run of the code that allocates. With the
 * argument `cuda` the device must open, and what it then holds must be the plan to the byte. */
#include "testing.h"

#include "arch/arch.h"

static const char *const models[] = {"models/fable.gguf", "tests/golden/gptoss-mini", "tests/golden/gpt2-mini"};

typedef struct opened {
    mf_file *f;
    const arch *a;
    arch_config c;
} opened;

#define OK(call)                                                                                                       \
    do {                                                                                                               \
        orcd_error err = {.message = ""};                                                                              \
        if ((call) != ORCD_OK)                                                                                         \
            fail_msg("%s: %s", #call, err.message);                                                                    \
    } while (0)

static opened open_model(const char *path) {
    opened m = {NULL, NULL, {0}};
    OK(mf_open(path, &m.f, &err));
    OK(arch_identify(m.f, &m.a, &err));
    OK(arch_config_read(m.a, m.f, &m.c, &err));
    return m;
}

static be_kv_spec spec_of(const opened *m, int max_tok, int n_page) {
    be_kv_spec s = {.type = BE_KV_F16,
                    .n_slot = 2,
                    .n_ctx = 2 * BE_PAGE,
                    .n_page = {n_page, n_page},
                    .max_tok = max_tok,
                    .max_out = 2};
    arch_kv_spec(&m->c, &s);
    return s;
}

static arch_memory plan(const opened *m, const be_kv_spec *s, int n_host_layers) {
    be_device *dev = NULL;
    arch_memory out;
    arch_config c = m->c;
    c.n_host_layers = n_host_layers;
    OK(be_find("cuda")->open(&(be_params){.dry = true, .device = 7}, &dev, &err)); /* no such device, and no matter */
    OK(arch_plan(m->a, m->f, &c, dev, s, &out, &err));
    dev->ops->close(dev);
    return out;
}

static bool no_cuda(void) {
    if (!be_find("cuda"))
        printf("SKIP: the cuda backend is not in this build\n");
    return !be_find("cuda");
}

static void a_plan_needs_no_gpu(void **state) {
    (void)state;
    if (no_cuda())
        return;
    for (size_t i = 0; i < ORCD_COUNT(models); i++) {
        opened m = open_model(models[i]);
        be_kv_spec s = spec_of(&m, 64, 4), more = spec_of(&m, 128, 6);
        arch_size size;
        OK(arch_measure(m.a, m.f, &m.c, &size, &err));
        arch_memory p = plan(&m, &s, 0), q = plan(&m, &more, 0);
        assert_true(p.weights > size.weight_bytes / 2 && p.weights < 12 * size.weight_bytes);
        assert_true(p.weights == q.weights && p.acts < q.acts);
        assert_int_equal(q.kv * 2, p.kv * 3);
        assert_int_equal(p.host, 0);
        mf_close(m.f);
    }
}

static bool on_gpu;

static void what_is_allocated_is_the_plan(void **state) {
    (void)state;
    if (!on_gpu) {
        printf("SKIP: no GPU asked for\n");
        return;
    }
    for (size_t i = 0; i < ORCD_COUNT(models); i++) {
        opened m = open_model(models[i]);
        be_kv_spec s = spec_of(&m, 64, 4);
        arch_memory p = plan(&m, &s, 0);
        be_device *dev = NULL;
        arch_model *model = NULL;
        be_kv *kv = NULL;
        OK(be_find("cuda")->open(&(be_params){0}, &dev, &err));
        uint64_t before = dev->ops->used(dev);
        OK(arch_load(m.a, m.f, &m.c, dev, s.max_tok, s.max_out, NULL, NULL, &model, &err));
        OK(dev->ops->kv_open(dev, &s, &kv, &err));
        assert_int_equal(dev->ops->used(dev), p.weights + p.acts + p.kv);
        OK(dev->ops->resident(dev, &err));
        dev->ops->kv_close(dev, kv);
        arch_unload(model);
        assert_true(dev->ops->used(dev) - before <= p.acts);
        dev->ops->close(dev);
        mf_close(m.f);
    }
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(a_plan_needs_no_gpu),
                                       cmocka_unit_test(what_is_allocated_is_the_plan)};
    on_gpu = argc > 1 && strcmp(argv[1], "cuda") == 0;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
