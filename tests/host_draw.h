/* What a device's sampling must give, by the engine's sampler, which is told of tokens and not of edits. */
#ifndef ORCD_TESTS_HOST_DRAW_H
#define ORCD_TESTS_HOST_DRAW_H

#include "testing.h"

#include "engine/sampler.h"

/* unseen: a token that `edit` does not count, or -1. */
static inline int32_t host_draw(samp *s, const be_sample *r, const float *logits, int32_t unseen) {
    static int32_t seen[8192];
    static uint32_t bias_id[8192];
    static float bias[8192];
    samp_params p = SAMP_DEFAULTS;
    p.temperature = r->temperature, p.top_p = r->top_p, p.min_p = r->min_p, p.top_k = r->top_k, p.seed = r->seed;
    samp_input in = {.logits = logits,
                     .params = &p,
                     .draw = r->draw,
                     .seen = seen,
                     .bias_id = bias_id,
                     .bias = bias,
                     .mask = r->mask};
    if (r->given)
        return r->id;
    assert_true(r->n_edit <= 8192);
    for (int i = 0; i < r->n_edit; i++) {
        bias_id[in.n_bias] = (uint32_t)r->edit[i].id;
        bias[in.n_bias++] = r->edit[i].bias;
        if (r->edit[i].in_prompt)
            seen[in.n_prompt++] = r->edit[i].id;
    }
    in.n_seen = in.n_prompt;
    for (int i = 0; i < r->n_edit; i++)
        for (int k = 0; k < r->edit[i].n_new; k++) {
            assert_true(in.n_seen < 8191);
            seen[in.n_seen++] = r->edit[i].id;
        }
    if (unseen >= 0)
        seen[in.n_seen++] = unseen;
    if (r->penalties)
        p.repetition_penalty = r->repetition, p.presence_penalty = r->presence, p.frequency_penalty = r->frequency;
    int32_t id;
    orcd_error err;
    assert_int_equal(samp_draw(s, &in, &id, &err), ORCD_OK);
    return id;
}

#endif
