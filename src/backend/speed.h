/* backend/speed.h: what a device can do at best, measured now through its own operations: the ceilings that plans and
 * benchmarks speak of. May include backend and base. */
#ifndef ORCD_BACKEND_SPEED_H
#define ORCD_BACKEND_SPEED_H

#include "backend/backend.h"

/* Bytes a second at which the device reads memory that no cache holds, in about half a second. A device with memory of
 * its own copies there: what it reads and writes is counted. */
orcd_status be_read_speed(be_device *d, double *bytes_per_s, orcd_error *err) ORCD_MUST_USE;

#define BE_MAX_PRODUCTS 4
typedef struct be_product {
    q_type type;
    int64_t n_col, n_row; /* of the weights */
    int n, rows[BE_MAX_PRODUCTS];
    double seconds[BE_MAX_PRODUCTS]; /* out: the best of a few steps with rows[i] rows of activations */
    uint64_t bytes;                  /* out: of the weights on the device */
} be_product;

/* The time of one product with weights of a type. */
orcd_status be_time_product(be_device *d, be_product *p, orcd_error *err) ORCD_MUST_USE;

#endif
