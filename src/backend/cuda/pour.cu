/* backend/cuda/pour.cu: pour.cuh's kernels for gpt-oss's widths. */
#include "backend/cuda/pour.cuh"

template <lin_mode MODE> void pour_run(cuda_run *r, const cuda_matrix *m, lin_args a) {
    lin_matrix(&a, m);
    pour_launch<pour_plan<form_mxfp4, 3, 15, POUR_COLS, 4>, MODE>(r, a);
}
template void pour_run<LIN_GATE_UP>(cuda_run *, const cuda_matrix *, lin_args);
template void pour_run<LIN_DOWN>(cuda_run *, const cuda_matrix *, lin_args);
