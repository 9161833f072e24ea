/* The prefix cache on disk: an engine that starts again on the same folder resumes what the last one left, bit for
 * bit; nothing in the folder is believed. On small real models with and without windows. */
#include "testing.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sodium.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/file.h"
#include "engine/internal.h"

#define MINI "tests/golden/gptoss-mini"
#define MINI2 "tests/golden/gptoss-mini-topk2"
#define GPT2 "tests/golden/gpt2-mini"
enum { N_PROMPT = 330, N_NEW = 12 }; /* the window of 16 before the end reaches over a page boundary */

static char dir[64];
static int n_notes, n_failures;

static void on_note(void *ctx, const char *sentence) {
    (void)ctx;
    print_message("    note: %s\n", sentence);
    n_notes += strstr(sentence, "is ignored") != NULL;
    n_failures += strstr(sentence, "nothing more is kept") != NULL;
}

static eng *open_at(const char *model, const char *cache_dir, uint64_t bytes, be_kv_type type) {
    eng *e = NULL;
    orcd_error err;
    const eng_params p = {.model = model,
                          .device = "cpu",
                          .backend.n_threads = 1,
                          .n_ctx = 512,
                          .max_batch = 8,
                          .chunk = 64,
                          .kv_type = type,
                          .cache_dir = cache_dir,
                          .cache_disk_bytes = bytes,
                          .note = on_note};
    if (eng_open(&p, &e, &err) != ORCD_OK)
        fail_msg("%s", err.message);
    return e;
}

typedef struct job {
    int32_t out[N_NEW];
    float logprob[N_NEW];
    int32_t n, n_cached;
    atomic_bool done;
} job;

static eng_verdict on_token(void *ctx, const eng_token *t) {
    job *j = ctx;
    j->logprob[j->n] = t->logprob;
    j->out[j->n++] = t->id;
    return (eng_verdict){ENG_GO, NULL, 0};
}

static void on_done(void *ctx, const eng_result *r) {
    job *j = ctx;
    j->n_cached = r->n_cached;
    atomic_store(&j->done, true);
}

/* Prompt number `seed`, below `salt`. */
static job ask(eng *e, uint64_t seed, uint64_t salt, int n_prompt) {
    int32_t prompt[N_PROMPT];
    job j = {0};
    orcd_error err;
    eng_ticket t;
    for (int i = 0; i < N_PROMPT; i++)
        prompt[i] = (int32_t)t_below(&seed, 250);
    eng_request r = {.prompt = prompt,
                     .n_prompt = (size_t)n_prompt,
                     .max_new = N_NEW,
                     .sampling = SAMP_DEFAULTS,
                     .ignore_eos = true,
                     .cache_salt = salt,
                     .on_token = on_token,
                     .on_done = on_done,
                     .ctx = &j};
    r.sampling.temperature = 0;
    if (eng_submit(e, &r, &t, &err) != ORCD_OK)
        fail_msg("%s", err.message);
    while (!atomic_load(&j.done))
        usleep(500);
    return j;
}

static void assert_same(const job *a, const job *b) {
    assert_int_equal(a->n, N_NEW);
    assert_memory_equal(a->out, b->out, sizeof a->out);
    assert_memory_equal(a->logprob, b->logprob, sizeof a->logprob);
}

/* A life of the process: open, ask for one prompt, close. */
static job life(const char *model, uint64_t bytes, uint64_t seed, uint64_t salt) {
    eng *e = open_at(model, dir, bytes, BE_KV_F16);
    job j = ask(e, seed, salt, N_PROMPT);
    eng_close(e);
    return j;
}

static job without_cache(const char *model, uint64_t seed) {
    eng *e = open_at(model, NULL, 0, BE_KV_F16);
    job j = ask(e, seed, 0, N_PROMPT);
    assert_int_equal(j.n_cached, 0);
    eng_close(e);
    return j;
}

/* Calls fn for every file of the folder whose name ends so; how many there are, and their bytes. */
static int each(const char *ending, void (*fn)(const char *path), uint64_t *bytes) {
    int n = 0;
    DIR *d = opendir(dir);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d));) {
        size_t len = strlen(e->d_name), k = strlen(ending);
        char path[400];
        struct stat s;
        if (e->d_name[0] == '.' || len < k || strcmp(e->d_name + len - k, ending) != 0)
            continue;
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        n++;
        assert_int_equal(stat(path, &s), 0);
        if (bytes)
            *bytes += (uint64_t)s.st_size;
        if (fn)
            fn(path);
    }
    closedir(d);
    return n;
}

static void erase(const char *path) { assert_int_equal(unlink(path), 0); }

static int begin(void **state) {
    (void)state;
    n_notes = n_failures = 0;
    snprintf(dir, sizeof dir, "/tmp/orcd-test-disk-XXXXXX");
    return mkdtemp(dir) ? 0 : -1;
}

static int end(void **state) {
    (void)state;
    each("", erase, NULL);
    return rmdir(dir);
}

/* ---- what comes back ---- */

static void check_restart(const char *model, int least) {
    job plain = without_cache(model, 1), first = life(model, 0, 1, 0);
    assert_int_equal(first.n_cached, 0);
    assert_same(&first, &plain);
    for (int i = 0; i < 3; i++) { /* what was restored is not lost by the next restart */
        job again = life(model, 0, 1, 0);
        assert_in_range(again.n_cached, least, N_PROMPT - 1);
        assert_same(&again, &plain);
    }
    assert_int_equal(n_notes, 0);
    assert_int_equal(each(".part", NULL, NULL), 0);
}

static void restart__resumes_with_the_same_bits(void **state) {
    (void)state;
    check_restart(MINI, N_PROMPT - 1);
}

static void restart__resumes_without_windows(void **state) {
    (void)state;
    check_restart(GPT2, N_PROMPT - 1);
}

static void idle__writes_without_a_close(void **state) {
    (void)state;
    eng *e = open_at(MINI, dir, 0, BE_KV_F16);
    job j = ask(e, 1, 0, N_PROMPT);
    for (int i = 0; i < 400 && each(".point", NULL, NULL) < 2; i++)
        usleep(50000);
    assert_int_equal(each(".point", NULL, NULL), 2); /* the prompt's end, the answer's end */
    assert_int_equal(each(".page", NULL, NULL), N_PROMPT / BE_PAGE);
    eng *other = open_at(MINI, dir, 0, BE_KV_F16); /* as after a kill */
    job again = ask(other, 1, 0, N_PROMPT);
    assert_int_equal(again.n_cached, N_PROMPT - 1);
    assert_same(&again, &j);
    eng_close(other);
    eng_close(e);
}

static void short_prompts__are_not_written(void **state) {
    (void)state;
    eng *e = open_at(MINI, dir, 0, BE_KV_F16);
    ask(e, 1, 0, DISK_MIN_POS - N_NEW - 1);
    eng_close(e);
    assert_int_equal(each("", NULL, NULL), 0);
}

static void salts__stay_apart(void **state) {
    (void)state;
    life(MINI, 0, 1, 7);
    job stranger = life(MINI, 0, 1, 8), owner = life(MINI, 0, 1, 7);
    assert_int_equal(stranger.n_cached, 0);
    assert_int_equal(owner.n_cached, N_PROMPT - 1);
    assert_same(&owner, &stranger);
}

static void fingerprint__keeps_models_and_types_apart(void **state) {
    (void)state;
    life(MINI, 0, 1, 0);
    job plain = without_cache(MINI2, 1), other = life(MINI2, 0, 1, 0);
    assert_int_equal(other.n_cached, 0);
    assert_same(&other, &plain);
    eng *e = open_at(MINI, dir, 0, BE_KV_F32);
    assert_int_equal(ask(e, 1, 0, N_PROMPT).n_cached, 0);
    eng_close(e);
    assert_int_equal(n_notes, 0); /* the files of others are left alone */
    assert_int_equal(life(MINI, 0, 1, 0).n_cached, N_PROMPT - 1);
}

static void context__that_is_shorter_leaves_longer_prefixes_alone(void **state) {
    (void)state;
    orcd_error err;
    life(MINI, 0, 1, 0);
    const eng_params p = {
        .model = MINI, .device = "cpu", .backend.n_threads = 1, .n_ctx = 256, .cache_dir = dir, .note = on_note};
    eng *e;
    assert_int_equal(eng_open(&p, &e, &err), ORCD_OK);
    eng_close(e);
    assert_int_equal(n_notes, 0);
    assert_int_equal(life(MINI, 0, 1, 0).n_cached, N_PROMPT - 1);
}

/* ---- what is not believed ---- */

static long flip_at; /* byte to change; negative: from the end */

static void flip(const char *path) {
    int fd = open(path, O_RDWR);
    uint8_t b;
    struct stat s;
    assert_int_equal(fstat(fd, &s), 0);
    off_t at = flip_at < 0 ? s.st_size + flip_at : flip_at;
    assert_int_equal(pread(fd, &b, 1, at), 1);
    b ^= 0x10;
    assert_int_equal(pwrite(fd, &b, 1, at), 1);
    close(fd);
}

static void cut(const char *path) { assert_int_equal(truncate(path, flip_at), 0); }

static void damage(const char *ending, void (*how)(const char *), long at, const job *plain) {
    n_notes = 0;
    flip_at = at;
    assert_true(each(ending, how, NULL) > 0);
    job j = life(MINI, 0, 1, 0); /* computes, and writes good files again */
    assert_int_equal(j.n_cached, 0);
    assert_same(&j, plain);
    assert_true(n_notes > 0);
    assert_int_equal(life(MINI, 0, 1, 0).n_cached, N_PROMPT - 1);
}

static void damaged_files__are_ignored_and_said(void **state) {
    (void)state;
    /* magic, fingerprint, key, salt, kind, length, tokens, pages, hash */
    static const long where[] = {0, 9, 41, 73, 80, 84, 87, 88, 500, 5000, -40, -1};
    job plain = life(MINI, 0, 1, 0);
    for (size_t i = 0; i < ORCD_COUNT(where); i++) {
        damage(".point", flip, where[i], &plain);
        damage(".page", flip, where[i], &plain);
    }
    static const long length[] = {0, 1, 87, 88, 119, 120, 1500};
    for (size_t i = 0; i < ORCD_COUNT(length); i++) {
        damage(".point", cut, length[i], &plain);
        damage(".page", cut, length[i], &plain);
    }
}

/* Write n bytes over a file's and make its hash right again: what a stranger could do. */
static void forge(const char *path, size_t at, const void *bytes, size_t n_bytes) {
    size_t n;
    uint8_t *data = t_read(path, &n);
    memcpy(data + at, bytes, n_bytes);
    crypto_generichash(data + n - DISK_HASH, DISK_HASH, data, n - DISK_HASH, NULL, 0);
    FILE *f = fopen(path, "wb");
    assert_int_equal(fwrite(data, 1, n, f), n);
    fclose(f);
    free(data);
}

static int32_t lie;
static void forge_salt(const char *path) { forge(path, 72, &lie, 4); }
static void forge_length(const char *path) { forge(path, 84, &lie, 4); }
static void forge_token(const char *path) { forge(path, 88, &lie, 4); }

static void forged_files__with_a_right_hash_are_ignored(void **state) {
    (void)state;
    static const int32_t length[] = {0, -1, INT32_MIN, 1, 64, 299};
    job plain = life(MINI, 0, 1, 0);
    lie = -5;
    damage(".point", forge_salt, 0, &plain);
    damage(".page", forge_salt, 0, &plain);
    damage(".point", forge_token, 0, &plain);
    for (size_t i = 0; i < ORCD_COUNT(length); i++) {
        lie = length[i];
        damage(".point", forge_length, 0, &plain);
    }
}

static void foreign_files__are_left_alone(void **state) {
    (void)state;
    char path[128];
    static const char *const name[] = {"README", "x.page", "0123456789abcdef-0123.point",
                                       "0123456789abcdef-0123456789abcdef0123456789abcdef.point.txt"};
    for (size_t i = 0; i < ORCD_COUNT(name); i++) {
        snprintf(path, sizeof path, "%s/%s", dir, name[i]);
        close(open(path, O_WRONLY | O_CREAT, 0600));
    }
    life(MINI, 1, 1, 0); /* a bound of one byte */
    assert_int_equal(each("", NULL, NULL), ORCD_COUNT(name));
    life(MINI, 0, 1, 0);
    assert_int_equal(life(MINI, 0, 1, 0).n_cached, N_PROMPT - 1);
}

/* ---- the bound ---- */

static void bound__the_longest_unused_goes(void **state) {
    (void)state;
    uint64_t one = 0, all = 0;
    life(MINI, 0, 1, 0);
    each("", NULL, &one);
    uint64_t bound = one * 7 / 2; /* three prompts, with the sixteenth that is kept free */
    life(MINI, bound, 2, 0);
    life(MINI, bound, 3, 0);
    each("", NULL, &all);
    assert_true(all == 3 * one);
    eng *e = open_at(MINI, dir, bound, BE_KV_F16);
    assert_int_equal(ask(e, 1, 0, N_PROMPT).n_cached, N_PROMPT - 1); /* now 2 is the longest unused */
    eng_close(e);
    life(MINI, bound, 4, 0);
    all = 0;
    each("", NULL, &all);
    assert_true(all <= bound);
    e = open_at(MINI, dir, bound, BE_KV_F16);
    assert_int_equal(ask(e, 2, 0, N_PROMPT).n_cached, 0);
    for (uint64_t seed = 1; seed <= 4; seed++)
        if (seed != 2)
            assert_int_equal(ask(e, seed, 0, N_PROMPT).n_cached, N_PROMPT - 1);
    eng_close(e);
}

static void write__that_fails_is_said_once(void **state) {
    (void)state;
    struct rlimit was, small;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &was), 0);
    small = was;
    small.rlim_cur = 5000;
    signal(SIGXFSZ, SIG_IGN);
    job plain = without_cache(MINI, 1);
    eng *e = open_at(MINI, dir, 0, BE_KV_F16);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    job a = ask(e, 1, 0, N_PROMPT), b = ask(e, 2, 0, N_PROMPT);
    eng_close(e);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &was), 0);
    assert_same(&a, &plain);
    assert_int_equal(b.n, N_NEW);
    assert_int_equal(n_failures, 1);
    assert_int_equal(each("", NULL, NULL), 0);
}

static void folder__that_cannot_be_is_an_error(void **state) {
    (void)state;
    eng *e;
    orcd_error err;
    eng_params p = {.model = MINI, .device = "cpu", .n_ctx = 512, .cache_dir = "/dev/null/x"};
    assert_int_equal(eng_open(&p, &e, &err), ORCD_ERR_IO);
    assert_non_null(strstr(err.message, "/dev/null/x"));
    assert_null(e);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, begin, end)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(restart__resumes_with_the_same_bits),
        TEST(restart__resumes_without_windows),
        TEST(idle__writes_without_a_close),
        TEST(short_prompts__are_not_written),
        TEST(salts__stay_apart),
        TEST(fingerprint__keeps_models_and_types_apart),
        TEST(context__that_is_shorter_leaves_longer_prefixes_alone),
        TEST(damaged_files__are_ignored_and_said),
        TEST(forged_files__with_a_right_hash_are_ignored),
        TEST(foreign_files__are_left_alone),
        TEST(bound__the_longest_unused_goes),
        TEST(write__that_fails_is_said_once),
        TEST(folder__that_cannot_be_is_an_error),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
