/* The engine one step ahead of a device that samples: the CPU or reference backend behind a queue of two steps. */
#include "engine_jobs.h"
#include "host_draw.h"

static be_ops faulty;
static const be_ops *sound;
static orcd_status fault, fault_allow;

static struct {
    samp *samp;
    const be_act *logits;
    be_sample row[64]; /* with their own copies of what they point to */
    be_edit edit[64][512];
    int32_t token[256], last[64], unseen[64], id[2][64];
    be_likely likely[2][64];
    int n_out, n_id[2], n_open, most_open, nan_at;
    bool waits; /* for dev_allow */
} dev;

static orcd_status dev_begin(be_device *d, be_kv *kv, const be_batch *b, be_step **out, orcd_error *err) {
    be_batch known = *b;
    assert_false(dev.waits);
    for (int i = 0; i < b->n_tok; i++)
        dev.token[i] = b->token[i] < 0 ? dev.last[-1 - b->token[i]] : b->token[i];
    for (int k = 0; k < b->n_out; k++)
        dev.unseen[k] = b->token[b->out_row[k]] < 0 ? dev.token[b->out_row[k]] : -1;
    known.token = dev.token;
    dev.logits = NULL;
    dev.n_out = b->n_out;
    return sound->step_begin(d, kv, &known, out, err);
}

static void dev_sample(be_step *s, const be_act *logits, const be_sample *row) {
    (void)s;
    dev.logits = logits;
    for (int k = 0; k < dev.n_out; k++) {
        assert_true(row[k].n_edit <= 512);
        dev.row[k] = row[k];
        dev.row[k].edit = dev.edit[k];
        if (row[k].n_edit)
            memcpy(dev.edit[k], row[k].edit, (size_t)row[k].n_edit * sizeof *row[k].edit);
        dev.waits |= row[k].masked;
    }
}

static void draw(be_device *d) {
    assert_true(dev.n_open < 2);
    for (int k = 0; k < dev.n_out; k++) {
        const be_sample *r = &dev.row[k];
        const float *logits = sound->act_host(d, dev.logits) + k * 512;
        dev.last[k] = host_draw(dev.samp, r, logits, dev.unseen[k]);
        if (r->likely)
            samp_likely(logits, 512, dev.last[k], r->n_top, &dev.likely[dev.n_open][k]);
        dev.id[dev.n_open][k] = dev.nan_at && (int)r->draw == dev.nan_at ? -1 : dev.last[k];
    }
    dev.n_id[dev.n_open++] = dev.n_out;
    dev.most_open = dev.n_open > dev.most_open ? dev.n_open : dev.most_open;
}

static orcd_status dev_end(be_step *s, orcd_error *err) {
    be_device *d = s->dev;
    orcd_status st = sound->step_end(s, err);
    if (st != ORCD_OK || fault != ORCD_OK) {
        dev.waits = false;
        return st != ORCD_OK ? st : orcd_fail(err, fault, "injected");
    }
    if (dev.logits && !dev.waits)
        draw(d);
    return ORCD_OK;
}

static orcd_status dev_allow(be_device *d, const be_sample *row, orcd_error *err) {
    assert_true(dev.waits);
    dev.waits = false;
    for (int k = 0; k < dev.n_out; k++)
        dev.row[k].mask = row[k].masked ? row[k].mask : NULL;
    if (fault_allow != ORCD_OK)
        return orcd_fail(err, fault_allow, "injected");
    draw(d);
    return ORCD_OK;
}

static orcd_status dev_sampled(be_device *d, int32_t *id, be_likely *likely, orcd_error *err) {
    (void)d, (void)err;
    assert_true(dev.n_open > 0);
    memcpy(id, dev.id[0], (size_t)dev.n_id[0] * sizeof *id);
    if (likely)
        memcpy(likely, dev.likely[0], (size_t)dev.n_id[0] * sizeof *likely);
    memcpy(dev.id[0], dev.id[1], sizeof dev.id[0]);
    memcpy(dev.likely[0], dev.likely[1], sizeof dev.likely[0]);
    dev.n_id[0] = dev.n_id[1];
    dev.n_open--;
    return ORCD_OK;
}

static eng *sampling_device(eng *e) {
    orcd_error err;
    memset(&dev, 0, sizeof dev);
    assert_int_equal(samp_open(512, &dev.samp, &err), ORCD_OK);
    fault = fault_allow = ORCD_OK;
    sound = e->dev->ops;
    faulty = *sound;
    faulty.step_begin = dev_begin;
    faulty.step_end = dev_end;
    faulty.sample = dev_sample;
    faulty.allow = dev_allow;
    faulty.sampled = dev_sampled;
    e->dev->ops = &faulty;
    return e;
}

static eng *open_sampling_device(int max_batch) { return sampling_device(open_mini(max_batch, 0)); }

static void close_sampling_device(eng *e) {
    assert_idle(e);
    e->dev->ops = sound;
    eng_close(e);
    samp_close(dev.samp);
}

/* Verdicts, penalties, bias and log-probabilities sprinkled in. */
static job *eventful_job(int i, int32_t prompt[400]) {
    static const int32_t forced[] = {7, 300, 7};
    static const uint32_t bias_id[] = {9, 300, 4, 9};
    static const float bias[] = {3, 1, -100, 0.5f};
    job *j = mixed_job(i, prompt);
    samp_params *p = &j->r.sampling;
    if (i % 5 == 1) {
        j->force_at = 3;
        j->force = forced;
        j->n_force = 1 + i % 3;
    }
    if (i % 7 == 2)
        j->end_at = 5;
    if (i % 4 == 2) {
        j->replace_at = 2 + i % 5;
        j->force = forced;
        j->n_force = 1 + i % 2;
    }
    if (i % 5 == 3)
        j->r.top_logprobs = i % 4 * 6;
    if (i % 5 == 4)
        j->r.bias_id = bias_id, j->r.bias = bias, j->r.n_bias = 4;
    if (i % 3 == 1)
        p->repetition_penalty = i % 2 ? 1.3f : 0.8f;
    if (i % 8 >= 5)
        p->presence_penalty = i % 8 == 6 ? -2 : 0.5f, p->frequency_penalty = i % 8 == 6 ? -2 : 0.25f;
    if (i % 4 == 3)
        j->r.mask = mask_by_last;
    return j;
}

static void ahead__equals_one_step_at_a_time(void **state) {
    (void)state;
    enum { N = 48 };
    static int32_t prompt[N][400];
    job *j[N], *want[N];
    eng *plain = open_mini(4, ENG_NO_CACHE), *e = open_sampling_device(8);
    for (int i = 0; i < N; i++)
        want[i] = submit(plain, eventful_job(i, prompt[i]));
    for (int i = 0; i < N; i++)
        j[i] = submit(e, eventful_job(i, prompt[i]));
    for (int i = 0; i < N; i++) {
        wait_for(want[i]);
        assert_same(wait_for(j[i]), want[i]);
        assert_int_equal(j[i]->result.stop, want[i]->result.stop);
        free_job(j[i]);
        free_job(want[i]);
    }
    assert_int_equal(dev.most_open, 2);
    close_sampling_device(e);
    eng_close(plain);
}

static void ahead__cancels_and_follow_ups(void **state) {
    (void)state;
    static int32_t text[512];
    eng *e = open_sampling_device(4), *plain = open_mini(1, ENG_NO_CACHE);
    fill_ids(text, 512, 21);
    for (int round = 0; round < 12; round++) {
        int n = 20 + 23 * round;
        job *gone = new_job(text, n, 400), *kept = new_job(text, n, 12);
        submit(e, gone);
        submit(e, kept);
        usleep(1000 * (useconds_t)round);
        eng_cancel(e, gone->ticket);
        wait_for(gone);
        wait_for(kept);
        job *want = wait_for(submit(plain, new_job(text, n, 12)));
        assert_same(kept, want);
        assert_true(round == 0 || kept->result.n_cached > 0);
        memcpy(text + n, kept->out, 12 * sizeof *text);
        free_job(gone);
        free_job(kept);
        free_job(want);
    }
    close_sampling_device(e);
    eng_close(plain);
}

/* Also with room for one row at a time, and beside others that give way or make way. */
static void ahead__prompts_are_scored_as_on_the_host(void **state) {
    (void)state;
    static int32_t prompt[4][400], text[N_OPEN][400];
    job *want[4], *j[4], *open[N_OPEN];
    eng *plain = open_mini(1, ENG_NO_CACHE), *e = open_sampling_device(6);
    for (int i = 0; i < 4; i++) {
        want[i] = wait_for(submit(plain, scored(i, prompt[i])));
        j[i] = submit(e, scored(i, prompt[i]));
    }
    for (int i = 0; i < 4; i++) {
        assert_same_scores(wait_for(j[i]), want[i]);
        free_job(j[i]);
    }
    close_sampling_device(e);
    eng_close(plain);
    e = sampling_device(open_engine(scarce(0)));
    for (int i = 0; i < N_OPEN; i++)
        open[i] = submit(e, open_ended(i, text[i]));
    for (int i = 0; i < 4; i++)
        j[i] = submit(e, scored(i, prompt[i]));
    for (int i = 0; i < N_OPEN; i++)
        free_job(wait_for(open[i]));
    for (int i = 0; i < 4; i++) {
        assert_same_scores(wait_for(j[i]), want[i]);
        free_job(j[i]);
        free_job(want[i]);
    }
    close_sampling_device(e);
}

static void ahead__a_bad_logit_or_step_ends_its_request(void **state) {
    (void)state;
    int32_t prompt[5] = {5, 6, 7, 8, 9};
    eng *e = open_sampling_device(2);
    dev.nan_at = 4;
    job *j = wait_for(submit(e, new_job(prompt, 5, 50)));
    assert_int_equal(j->result.stop, ENG_STOP_ERROR);
    assert_int_equal(j->n_out, 4);
    free_job(j);
    dev.nan_at = 0;
    fault = ORCD_ERR_NOMEM;
    j = wait_for(submit(e, new_job(prompt, 5, 50)));
    assert_int_equal(j->result.error.code, ORCD_ERR_NOMEM);
    free_job(j);
    fault = ORCD_OK;
    fault_allow = ORCD_ERR_NOMEM;
    j = new_job(prompt, 5, 50);
    j->r.mask = mask_by_last;
    wait_for(submit(e, j));
    assert_int_equal(j->result.error.code, ORCD_ERR_NOMEM);
    free_job(j);
    fault_allow = ORCD_OK;
    j = wait_for(submit(e, new_job(prompt, 5, 50)));
    assert_int_equal(j->n_out, 50);
    free_job(j);
    close_sampling_device(e);
}

static void ahead__those_who_give_way_go_on_as_if_alone(void **state) {
    (void)state;
    job *const *want = open_ended_alone();
    for (int with_cache = 0; with_cache < 2; with_cache++) {
        eng *e = sampling_device(open_engine(scarce(with_cache ? 0 : ENG_NO_CACHE)));
        check_growth(e, want);
        assert_int_equal(dev.most_open, 2);
        close_sampling_device(e);
    }
    for (int i = 0; i < N_OPEN; i++)
        free_job(want[i]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ahead__equals_one_step_at_a_time),
        cmocka_unit_test(ahead__cancels_and_follow_ups),
        cmocka_unit_test(ahead__those_who_give_way_go_on_as_if_alone),
        cmocka_unit_test(ahead__prompts_are_scored_as_on_the_host),
        cmocka_unit_test(ahead__a_bad_logit_or_step_ends_its_request),
    };
    device = be_find("cpu") ? "cpu" : "ref";
    return cmocka_run_group_tests(tests, NULL, NULL);
}
