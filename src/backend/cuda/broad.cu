/* backend/cuda/broad.cu: broad.cuh's kernel for gpt-oss's widths. */
#include "backend/cuda/broad.cuh"

void broad_run(cuda_run *r, const cuda_matrix *up, const cuda_matrix *down, broad_args a) {
    lin_matrix(&a.up.l, up);
    lin_matrix(&a.down.l, down);
    broad_launch<broad_plan<form_mxfp4, 3, 15, 3>>(r, a);
}
