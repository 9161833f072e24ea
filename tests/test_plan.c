/* What a model will take, before it is loaded: the plan is a dry run of the code that allocates. With the argument
 * `cuda` the device must open, and what it then holds must be the plan to the byte. */
#include "testing.h"

#include <unistd.h>

#include "arch/arch.h"
#include "base/cpu.h"
#include "engine/engine.h"

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

static void experts_in_host_memory_leave_the_device(void **state) {
    (void)state;
    if (no_cuda())
        return;
    opened m = open_model(models[1]);
    be_kv_spec s = spec_of(&m, 64, 4);
    arch_memory all = plan(&m, &s, 0), last = plan(&m, &s, 1), none = plan(&m, &s, m.c.n_layer);
    assert_true(all.weights > last.weights && last.weights > none.weights);
    assert_true(last.host > 0 && none.host == (uint64_t)m.c.n_layer * last.host);
    assert_int_equal(all.weights - none.weights, (uint64_t)m.c.n_layer * (all.weights - last.weights));
    mf_close(m.f);
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

/* ---- the CPU ---- */

typedef struct loaded {
    be_device *dev;
    arch_model *model;
    be_kv *kv;
} loaded;

static loaded load(const opened *m, const be_params *params, const be_kv_spec *s, arch_memory *planned) {
    loaded l;
    be_params dry = *params;
    be_device *d;
    dry.dry = true;
    OK(be_find("cpu")->open(&dry, &d, &err));
    OK(arch_plan(m->a, m->f, &m->c, d, s, planned, &err));
    assert_int_equal(d->ops->used(d), 0);
    d->ops->close(d);
    OK(be_find("cpu")->open(params, &l.dev, &err));
    OK(arch_load(m->a, m->f, &m->c, l.dev, s->max_tok, s->max_out, NULL, NULL, &l.model, &err));
    OK(l.dev->ops->kv_open(l.dev, s, &l.kv, &err));
    return l;
}

static void unload(loaded *l) {
    l->dev->ops->kv_close(l->dev, l->kv);
    arch_unload(l->model);
    l->dev->ops->close(l->dev);
}

static void cpu_holds_what_was_planned(void **state) {
    (void)state;
    static const be_params params[] = {{.n_threads = 1},
                                       {.n_threads = 3, .act_bits = 8},
                                       {.n_threads = 2, .dense_type = Q_Q4_K},
                                       {.n_threads = 1, .no_repack = true, .dense_type = Q_Q6_K},
                                       {.n_threads = 2, .no_repack = true}};
    for (size_t i = 0; i < ORCD_COUNT(models); i++)
        for (size_t k = 0; k < ORCD_COUNT(params); k++) {
            arch_memory p;
            opened m = open_model(models[i]);
            be_kv_spec s = spec_of(&m, 96, 5);
            loaded l = load(&m, &params[k], &s, &p);
            assert_int_equal(l.dev->ops->used(l.dev), p.weights + p.acts + p.kv);
            unload(&l);
            mf_close(m.f);
        }
}

/* Bytes of this process in memory that belong to no file. */
static double anonymous(void) {
    FILE *f = fopen("/proc/self/status", "r");
    char line[128];
    unsigned long long kib = 0;
    while (f && fgets(line, sizeof line, f))
        sscanf(line, "RssAnon: %llu kB", &kib);
    if (f)
        fclose(f);
    return (double)kib * 1024;
}

/* Every KV page written, a step of the most rows and outputs run: the process has grown by the plan. */
static void process_grows_by_the_plan(void **state) {
    (void)state;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    printf("SKIP: a sanitizer keeps memory of its own\n");
#else
    enum { ROWS = 2048, PAGES = 64 };
    static int32_t token[ROWS], pos[ROWS], slot[ROWS], out[2] = {0, ROWS - 1};
    arch_memory p;
    opened m = open_model(models[0]);
    be_kv_spec s = spec_of(&m, ROWS, PAGES);
    s.n_ctx = PAGES * BE_PAGE;
    double before = anonymous();
    loaded l = load(&m, &(be_params){.n_threads = 2}, &s, &p);
    uint64_t most = l.kv->page_bytes[0] > l.kv->page_bytes[1] ? l.kv->page_bytes[0] : l.kv->page_bytes[1];
    uint8_t *page = calloc(1, most);
    for (int pool = 0; pool < BE_N_POOLS; pool++)
        for (int i = 0; i < PAGES; i++) {
            OK(l.dev->ops->kv_write_page(l.kv, pool, i, page, &err));
            l.dev->ops->kv_map(l.kv, pool, 0, i, i);
        }
    free(page);
    for (int i = 0; i < ROWS; i++)
        token[i] = pos[i] = i;
    be_step *step;
    OK(l.dev->ops->step_begin(l.dev, l.kv, &(be_batch){ROWS, token, pos, slot, 2, out, false}, &step, &err));
    arch_forward(l.model, step);
    OK(l.dev->ops->step_end(step, &err));
    double grown = anonymous() - before, planned = (double)(p.weights + p.acts + p.kv);
    print_message("planned %.2f MiB, grown by %.2f MiB\n", planned / 0x1p20, grown / 0x1p20);
    /* beside the plan: stacks, page tables of the slots, the rounding of huge pages */
    assert_true(grown > 0.97 * planned && grown < planned + (4 << 20));
    unload(&l);
    mf_close(m.f);
#endif
}

/* ---- the engine's plan ---- */

static eng_plan plan_engine(eng_params *p, orcd_status want) {
    eng_plan out;
    orcd_error err = {0};
    p->model = models[0];
    p->device = "cpu";
    p->kv_type = BE_KV_F16;
    orcd_status st = eng_plan_only(p, &out, &err);
    if (st != want)
        fail_msg("%s", err.message);
    return out;
}

static void engine_takes_what_it_planned(void **state) {
    (void)state;
    eng *e;
    eng_params p = {.n_ctx = 1000, .max_batch = 3, .memory_bytes = 80 << 20};
    eng_plan plan = plan_engine(&p, ORCD_OK);
    OK(eng_open(&p, &e, &err));
    const eng_info *i = eng_get_info(e);
    assert_int_equal(i->weight_bytes, plan.m.weights);
    assert_int_equal(i->kv_bytes, plan.m.kv);
    assert_int_equal(i->act_bytes, plan.m.acts);
    assert_int_equal(eng_device(e)->ops->used(eng_device(e)), plan.m.weights + plan.m.kv + plan.m.acts);
    assert_int_equal(i->free_bytes, (80 << 20) - plan.m.weights - plan.m.kv - plan.m.acts);
    eng_close(e);
}

static void largest_context_is_the_largest(void **state) {
    (void)state;
    eng_params p = {.max_batch = 2, .memory_bytes = 60 << 20, .cache_bytes = ENG_NO_CACHE};
    eng_plan open = plan_engine(&p, ORCD_OK);
    assert_true(open.most_one > 4096 && open.most_one < open.n_ctx_train && open.most_all < open.most_one);
    assert_true(open.n_ctx <= open.most_one && open.n_ctx > open.most_one - 1024);
    p.n_ctx = open.most_one;
    eng_plan most = plan_engine(&p, ORCD_OK);
    assert_int_equal(most.n_ctx, open.most_one);
    p.n_ctx = open.most_one + open.most_one / 100;
    eng_plan more = plan_engine(&p, ORCD_ERR_NOMEM);
    assert_true(more.m.weights + more.m.acts + more.m.kv > more.available);
    p.n_ctx = open.most_all;
    eng_plan both = plan_engine(&p, ORCD_OK);
    assert_int_equal(both.n_page[BE_POOL_FULL], 2 * ((open.most_all + BE_PAGE - 1) / BE_PAGE));
}

static eng_plan plan_on_gpu(int cpu_experts, int chunk, uint64_t memory, orcd_status want) {
    eng_plan out;
    orcd_error err = {0};
    eng_params p = {.model = models[1],
                    .device = "cuda",
                    .backend = {.dry = true, .cpu_experts = cpu_experts},
                    .n_ctx = 1024,
                    .chunk = chunk,
                    .cache_bytes = ENG_NO_CACHE,
                    .memory_bytes = memory};
    orcd_status st = eng_plan_only(&p, &out, &err);
    if (st != want)
        fail_msg("%d layers in host memory, %llu bytes: %s", cpu_experts, (unsigned long long)memory, err.message);
    return out;
}

static uint64_t sum_of(const eng_plan *p) { return p->m.weights + p->m.acts + p->m.kv; }

static void no_more_experts_leave_the_gpu_than_must(void **state) {
    (void)state;
    enum { AUTO = -1, LAYERS = 4, CHUNK = 512 };
    if (no_cuda())
        return;
    eng_plan none = plan_on_gpu(0, CHUNK, 1ull << 40, ORCD_OK), one = plan_on_gpu(1, CHUNK, 1ull << 40, ORCD_OK);
    eng_plan all = plan_on_gpu(99, CHUNK, 1ull << 40, ORCD_OK);
    uint64_t layer = sum_of(&none) - sum_of(&one);
    assert_int_equal(none.n_host_layers, 0);
    assert_int_equal(all.n_host_layers, LAYERS);
    assert_int_equal(plan_on_gpu(AUTO, CHUNK, sum_of(&none), ORCD_OK).n_host_layers, 0);
    assert_int_equal(plan_on_gpu(AUTO, CHUNK, sum_of(&none) - 1, ORCD_OK).n_host_layers, 1);
    assert_int_equal(plan_on_gpu(AUTO, CHUNK, sum_of(&none) - 2 * layer, ORCD_OK).n_host_layers, 2);
    assert_int_equal(plan_on_gpu(AUTO, CHUNK, sum_of(&all), ORCD_OK).n_host_layers, LAYERS);
    plan_on_gpu(AUTO, CHUNK, sum_of(&all) - 1, ORCD_ERR_NOMEM);
    plan_on_gpu(0, CHUNK, sum_of(&none) - 1, ORCD_ERR_NOMEM);
}

/* A 64th of the memory, from 1,024 rows to 4,096. */
static void steps_of_prompts_are_as_large_as_memory_allows(void **state) {
    (void)state;
    if (no_cuda())
        return;
    static const int chunk[] = {1024, 2048, 4096};
    assert_int_equal(plan_on_gpu(0, 0, 1ull << 40, ORCD_OK).chunk, 4096);
    for (size_t i = 0; i < ORCD_COUNT(chunk); i++) {
        uint64_t acts = plan_on_gpu(0, chunk[i], 1ull << 40, ORCD_OK).m.acts;
        assert_int_equal(plan_on_gpu(0, 0, 64 * acts, ORCD_OK).chunk, chunk[i]);
        assert_int_equal(plan_on_gpu(0, 0, 64 * acts - 1, ORCD_OK).chunk, chunk[i] > 1024 ? chunk[i] / 2 : 1024);
    }
}

static void too_large_is_refused_before_loading(void **state) {
    (void)state;
    eng *e;
    orcd_error err = {0};
    eng_params p = {
        .model = models[0], .device = "cpu", .n_ctx = 131072, .memory_bytes = 100 << 20, .kv_type = BE_KV_F16};
    double before = anonymous();
    assert_int_equal(eng_open(&p, &e, &err), ORCD_ERR_NOMEM);
    assert_null(e);
    assert_true(anonymous() - before < 8 << 20);
    const char *weights =
        cpu_tier_best() >= CPU_AVX512 ? "weights 0.012" /* with the head's screen */ : "weights 0.011";
    for (const char *const *word = (const char *const[]){"GiB", weights, "131072", "0.098", NULL}; *word; word++)
        if (!strstr(err.message, *word))
            fail_msg("no \"%s\" in: %s", *word, err.message);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(process_grows_by_the_plan), /* first: nothing freed lies about */
        cmocka_unit_test(a_plan_needs_no_gpu),
        cmocka_unit_test(experts_in_host_memory_leave_the_device),
        cmocka_unit_test(what_is_allocated_is_the_plan),
        cmocka_unit_test(cpu_holds_what_was_planned),
        cmocka_unit_test(engine_takes_what_it_planned),
        cmocka_unit_test(largest_context_is_the_largest),
        cmocka_unit_test(no_more_experts_leave_the_gpu_than_must),
        cmocka_unit_test(steps_of_prompts_are_as_large_as_memory_allows),
        cmocka_unit_test(too_large_is_refused_before_loading)};
    on_gpu = argc > 1 && strcmp(argv[1], "cuda") == 0;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
