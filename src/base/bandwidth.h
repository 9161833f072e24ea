/* base/bandwidth.h: how fast this machine reads memory. */
#ifndef ORCD_BASE_BANDWIDTH_H
#define ORCD_BASE_BANDWIDTH_H

#include "base/status.h"

/* Bytes per second at which n_threads together read memory that no cache holds: the best of the
 * passes that half a second allows over a block of 512 MiB (above 8 threads 1 GiB; a quarter of what is available at
 * most). */
orcd_status mem_bandwidth(int n_threads, double *bytes_per_s, orcd_error *err) ORCD_MUST_USE;

#endif
