/* base/rng.h: Philox4x32-10, a counter-based generator (Salmon et al., SC'11): the n-th draw of a seed is a pure
 * function of (seed, stream, n), so a sequence's draws do not depend on its neighbours in a batch. */
#ifndef ORCD_BASE_RNG_H
#define ORCD_BASE_RNG_H

#include <stdint.h>

void rng_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);
/* The n-th number of (seed, stream), uniform in [0, 1) with 53 bits. */
double rng_uniform(uint64_t seed, uint64_t stream, uint64_t n);

#endif
