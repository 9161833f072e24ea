/* Page tables and the prefix cache against a KV memory that remembers, for every position, a hash of all tokens up to
 * it: whatever is resumed must hold exactly what computing it would have written. prefix.c is included so that its
 * hash can be made useless. */
#include "testing.h"

#include "engine/prefix.c"

enum { N_SLOT = 4, N_CTX = 640, MAX_TOK = 96 };

typedef struct fake_kv {
    be_kv kv;
    uint64_t *cell[BE_N_POOLS]; /* [n_page][BE_PAGE] */
    int32_t map[BE_N_POOLS][N_SLOT][N_CTX / BE_PAGE];
} fake_kv;

static orcd_status fake_open(be_device *d, const be_kv_spec *spec, be_kv **out, orcd_error *err) {
    (void)d, (void)err;
    fake_kv *f = calloc(1, sizeof *f);
    f->kv.spec = *spec;
    for (int pool = 0; pool < BE_N_POOLS; pool++) {
        f->cell[pool] = calloc((size_t)spec->n_page[pool] * BE_PAGE + 1, sizeof(uint64_t));
        f->kv.page_bytes[pool] = 1000;
    }
    memset(f->map, 0xff, sizeof f->map);
    *out = &f->kv;
    return ORCD_OK;
}

static void fake_close(be_device *d, be_kv *kv) {
    (void)d;
    fake_kv *f = (fake_kv *)kv;
    free(f->cell[0]);
    free(f->cell[1]);
    free(f);
}

static void fake_map(be_kv *kv, int pool, int slot, int index, int32_t page) {
    ((fake_kv *)kv)->map[pool][slot][index] = page;
}

static void fake_copy(be_kv *kv, int pool, int32_t dst, int32_t src) {
    fake_kv *f = (fake_kv *)kv;
    assert_int_not_equal(dst, src);
    memcpy(f->cell[pool] + (size_t)dst * BE_PAGE, f->cell[pool] + (size_t)src * BE_PAGE, BE_PAGE * sizeof(uint64_t));
}

static const be_ops fake_ops = {
    .name = "fake", .kv_open = fake_open, .kv_close = fake_close, .kv_map = fake_map, .kv_copy_page = fake_copy};
static be_device fake_device = {.ops = &fake_ops};

typedef struct run {
    int32_t id[N_CTX];
    uint64_t want[N_CTX]; /* hash of id[0..i] and the salt */
    int32_t n, fed, resumed;
    uint64_t salt;
    prefix_cursor cur;
    bool live;
} run;

typedef struct world {
    kv_store kv;
    prefix *cache;
    run run[N_SLOT];
    int window;
    uint64_t rng;
} world;

static uint64_t *cell(world *w, int pool, int slot, int pos) {
    fake_kv *f = (fake_kv *)w->kv.kv;
    int32_t page = f->map[pool][slot][pos / BE_PAGE];
    if (page < 0)
        fail_msg("pool %d slot %d position %d is not mapped", pool, slot, pos);
    return &f->cell[pool][(size_t)page * BE_PAGE + (size_t)pos % BE_PAGE];
}

static void check_visible(world *w, int slot) {
    run *r = &w->run[slot];
    for (int p = 0; p < r->fed; p++) {
        assert_true(*cell(w, BE_POOL_FULL, slot, p) == r->want[p]);
        if (w->window && p > r->fed - w->window)
            assert_true(*cell(w, BE_POOL_WINDOW, slot, p) == r->want[p]);
    }
}

static void set_tokens(world *w, run *r, int32_t n, uint64_t salt) {
    uint64_t h = salt * 77 + 1;
    r->n = n;
    r->salt = salt;
    (void)w;
    for (int i = 0; i < n; i++) {
        h = (h ^ (uint64_t)(r->id[i] + 1)) * 0x100000001b3u;
        r->want[i] = h;
    }
}

static void begin(world *w, int slot) {
    run *r = &w->run[slot];
    r->cur = (prefix_cursor){0};
    r->fed = r->resumed = 0;
    r->live = true;
    prefix_hit h = prefix_find(w->cache, r->id, r->n, r->salt);
    if (h.n_pos > 0) {
        assert_true(h.n_pos < r->n);
        prefix_pin(w->cache, &h, r->id, r->salt, slot, &r->cur);
        if (t_below(&w->rng, 8) == 0) {
            prefix_unpin(w->cache, &h, slot, &r->cur);
        } else {
            assert_true(prefix_fork(w->cache, &h, slot));
            r->fed = r->resumed = h.n_pos;
        }
    }
    check_visible(w, slot);
}

static void feed(world *w, int slot, int rows) {
    run *r = &w->run[slot];
    rows = rows < r->n - r->fed ? rows : r->n - r->fed;
    assert_true(kv_extend(&w->kv, slot, r->fed + rows));
    for (int i = 0; i < rows; i++, r->fed++) {
        *cell(w, BE_POOL_FULL, slot, r->fed) = r->want[r->fed];
        if (w->window)
            *cell(w, BE_POOL_WINDOW, slot, r->fed) = r->want[r->fed];
        if (i == rows / 2 && t_below(&w->rng, 3) == 0) /* a boundary inside the slice: saved after it */
            prefix_save(w->cache, slot, r->id, r->fed + 1, r->salt, &r->cur);
    }
    check_visible(w, slot);
    if (t_below(&w->rng, 3) == 0)
        prefix_save(w->cache, slot, r->id, r->fed, r->salt, &r->cur);
    kv_slide(&w->kv, slot, r->fed);
}

static void end(world *w, int slot) {
    run *r = &w->run[slot];
    if (t_below(&w->rng, 4))
        prefix_save(w->cache, slot, r->id, r->fed, r->salt, &r->cur);
    prefix_leave(w->cache, &r->cur);
    kv_release(&w->kv, slot);
    prefix_trim(w->cache);
    r->live = false;
}

/* Every page is free, idle or mapped by some slot, and the counters say so. */
static void check_pages(world *w) {
    fake_kv *f = (fake_kv *)w->kv.kv;
    for (int pool = 0; pool < BE_N_POOLS; pool++) {
        kv_pool *p = &w->kv.pool[pool];
        int used = 0, idle = 0;
        for (int i = 0; i < p->n_page; i++) {
            int mapped = 0;
            for (int s = 0; s < N_SLOT; s++)
                for (int k = 0; k < N_CTX / BE_PAGE; k++)
                    mapped += f->map[pool][s][k] == i;
            assert_int_equal(p->ref[i] - p->held[i], mapped);
            used += p->ref[i] > 0;
            idle += p->held[i] > 0 && mapped == 0;
        }
        assert_int_equal(used, atomic_load(&p->used));
        assert_int_equal(idle, atomic_load(&p->idle));
        assert_int_equal(p->n_free, p->n_page - used);
    }
}

static void open_world(world *w, int window, int spare_full, int n_entry, uint64_t max_idle) {
    orcd_error err;
    int windows[2] = {0, window};
    be_kv_spec spec = {.n_layer = window ? 2 : 1, .window = windows, .n_slot = N_SLOT, .n_ctx = N_CTX};
    memset(w, 0, sizeof *w);
    w->window = window;
    w->rng = 5;
    kv_pages_needed(&spec, N_SLOT * MAX_TOK, N_SLOT, spec.n_page);
    spec.n_page[BE_POOL_FULL] += spare_full;
    spec.n_page[BE_POOL_WINDOW] += window ? n_entry / 2 * prefix_entry_pages(window) : 0;
    assert_int_equal(kv_store_open(&fake_device, &spec, &w->kv, &err), ORCD_OK);
    assert_int_equal(prefix_open(&w->kv, max_idle, n_entry, &w->cache, &err), ORCD_OK);
}

static void close_world(world *w) {
    while (reclaim(w->cache))
        continue;
    check_pages(w);
    assert_int_equal(atomic_load(&w->kv.pool[0].used), 0);
    assert_int_equal(atomic_load(&w->kv.pool[1].used), 0);
    prefix_close(w->cache);
    kv_store_close(&w->kv);
}

/* Sequences that share prefixes of all lengths, in all slots, resuming, forking, evicting. */
static int64_t play(world *w, int rounds) {
    static int32_t book[12][N_CTX]; /* texts; later ones branch off earlier ones */
    int64_t resumed = 0;
    for (int b = 0; b < 12; b++) {
        int from = b ? (int)t_below(&w->rng, (uint64_t)b) : 0, keep = b ? (int)t_below(&w->rng, N_CTX) : 0;
        for (int i = 0; i < N_CTX; i++)
            book[b][i] = i < keep ? book[from][i] : (int32_t)t_below(&w->rng, 3);
    }
    for (int k = 0; k < rounds; k++) {
        int slot = (int)t_below(&w->rng, N_SLOT);
        run *r = &w->run[slot];
        if (!r->live) {
            memcpy(r->id, book[t_below(&w->rng, 12)], sizeof r->id);
            set_tokens(w, r, 1 + (int32_t)t_below(&w->rng, N_CTX), t_below(&w->rng, 5) == 0);
            begin(w, slot);
            resumed += r->resumed;
        } else if (r->fed < r->n && t_below(&w->rng, 12)) {
            feed(w, slot, 1 + (int)t_below(&w->rng, MAX_TOK));
        } else {
            end(w, slot);
        }
        if (k % 16 == 0)
            check_pages(w);
    }
    for (int s = 0; s < N_SLOT; s++)
        if (w->run[s].live)
            end(w, s);
    return resumed;
}

static void random_play__every_resumed_position_is_right(void **state) {
    (void)state;
    const int windows[] = {0, 1, 16, 63, 64, 65, 128, 300};
    for (size_t i = 0; i < ORCD_COUNT(windows); i++) {
        world w;
        open_world(&w, windows[i], 24, 24, UINT64_MAX);
        assert_true(play(&w, 6000) > 10000);
        close_world(&w);
    }
}

static void random_play__no_page_to_spare(void **state) {
    (void)state;
    for (int window = 0; window <= 128; window += 128) {
        world w;
        open_world(&w, window, 0, 6, UINT64_MAX);
        play(&w, 6000);
        close_world(&w);
    }
}

static void random_play__every_hash_collides(void **state) {
    (void)state;
    world w;
    open_world(&w, 128, 24, 24, UINT64_MAX);
    w.cache->mask = 0;
    assert_true(play(&w, 6000) > 10000);
    close_world(&w);
}

static void trim__idle_memory_stays_within_its_limit(void **state) {
    (void)state;
    world w;
    open_world(&w, 128, 24, 24, 9000);
    w.rng = 9;
    play(&w, 3000);
    assert_true(idle_bytes(w.cache) <= 9000);
    close_world(&w);
}

static int32_t resume_after(world *w, int saved_at, int32_t n) {
    run *a = &w->run[0], *b = &w->run[1];
    for (int i = 0; i < N_CTX; i++)
        a->id[i] = b->id[i] = 7 + i;
    set_tokens(w, a, N_CTX, 0);
    a->live = true;
    a->fed = 0;
    a->cur = (prefix_cursor){0};
    assert_true(kv_extend(&w->kv, 0, saved_at));
    prefix_save(w->cache, 0, a->id, saved_at, 0, &a->cur);
    set_tokens(w, b, n, 0);
    int32_t n_pos = prefix_find(w->cache, b->id, n, 0).n_pos;
    prefix_leave(w->cache, &a->cur);
    kv_release(&w->kv, 0);
    a->live = false;
    while (reclaim(w->cache))
        continue;
    return n_pos;
}

static void find__the_last_token_is_always_left_to_compute(void **state) {
    (void)state;
    const int at[] = {1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 500, 512};
    for (int window = 0; window <= 128; window += 64) {
        world w;
        open_world(&w, window, 8, 8, UINT64_MAX);
        for (size_t i = 0; i < ORCD_COUNT(at); i++) {
            assert_int_equal(resume_after(&w, at[i], at[i]), at[i] - 1); /* the same prompt again */
            assert_int_equal(resume_after(&w, at[i], at[i] + 1), at[i]); /* one more token: a chat's next turn */
            assert_int_equal(resume_after(&w, at[i], at[i] + 100), at[i]);
        }
        close_world(&w);
    }
}

static void find__other_salts_see_nothing(void **state) {
    (void)state;
    world w;
    open_world(&w, 64, 8, 8, UINT64_MAX);
    int32_t id[100] = {0};
    prefix_cursor cur = {0};
    for (int n = 30; n <= 100; n += 70) {
        cur = (prefix_cursor){0};
        assert_true(kv_extend(&w.kv, 0, n));
        prefix_save(w.cache, 0, id, n, 1, &cur);
        assert_int_equal(prefix_find(w.cache, id, n, 1).n_pos, n - 1);
        assert_int_equal(prefix_find(w.cache, id, n, 2).n_pos, 0);
        prefix_leave(w.cache, &cur);
        kv_release(&w.kv, 0);
    }
    close_world(&w);
}

static void save__the_same_text_computed_twice_is_kept_once(void **state) {
    (void)state;
    world w;
    open_world(&w, 128, 8, 8, UINT64_MAX);
    int32_t id[300] = {0};
    for (int slot = 0; slot < 2; slot++)
        assert_true(kv_extend(&w.kv, slot, 256));
    assert_int_equal(atomic_load(&w.kv.pool[BE_POOL_FULL].used), 8);
    prefix_cursor cur[2] = {{0}};
    for (int slot = 0; slot < 2; slot++)
        prefix_save(w.cache, slot, id, 256, 0, &cur[slot]);
    assert_int_equal(atomic_load(&w.kv.pool[BE_POOL_FULL].used), 4);
    check_pages(&w);
    for (int slot = 0; slot < 2; slot++) {
        prefix_leave(w.cache, &cur[slot]);
        kv_release(&w.kv, slot);
    }
    close_world(&w);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_play__every_resumed_position_is_right),
        cmocka_unit_test(random_play__no_page_to_spare),
        cmocka_unit_test(random_play__every_hash_collides),
        cmocka_unit_test(trim__idle_memory_stays_within_its_limit),
        cmocka_unit_test(find__the_last_token_is_always_left_to_compute),
        cmocka_unit_test(find__other_salts_see_nothing),
        cmocka_unit_test(save__the_same_text_computed_twice_is_kept_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
