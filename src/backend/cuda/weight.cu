/* backend/cuda/weight.cu: weights from the mapped file into the layouts that the kernels stream.
 *
 * Rows travel in chunks: worker threads copy canonical rows into one of two pinned buffers while the other is on its
 * way to the device; a kernel there packs what arrived into its place. Types without a packed form of their own are
 * unpacked to float on the way. */
#include "backend/cuda/cuda.h"
#include "quant/f16/cuda_f16.cuh"
#include "quant/mxfp4/cuda_mxfp4.cuh"
#include "quant/q8_0/cuda_q8_0.cuh"

#include <new>
#include <string.h>
#include <math.h>
#include <unistd.h>

#define LOAD_CHUNK ((size_t)32 << 20)
#define DENSE_LIMIT 1024 /* LINEAR of at most so many rows: may be a router, keep its floats too */

/* ---- plan ---- */

static cuda_form form_of(q_type t) {
    switch (t) {
    case Q_MXFP4:
        return CUDA_FORM_MXFP4;
    case Q_Q8_0:
    case Q_Q4_0:
    case Q_Q5_0:
        return CUDA_FORM_Q8_0;
    case Q_F16:
    case Q_BF16:
        return CUDA_FORM_F16;
    default:
        return CUDA_FORM_F16X2;
    }
}

static int chunk_bytes(cuda_form f) {
    switch (f) {
    case CUDA_FORM_MXFP4:
    case CUDA_FORM_MXFP4_FAR:
        return mxfp4_codes::CHUNK;
    case CUDA_FORM_Q8_0:
        return form_q8_0::CHUNK;
    case CUDA_FORM_F16:
        return form_f16<1>::CHUNK;
    default:
        return form_f16<2>::CHUNK;
    }
}

/* True when the parts can share one packed matrix. */
static bool parts_alike(const be_load *l) {
    for (int i = 1; i < l->n_part; i++) {
        const cuda_form f = form_of(l->part[i].type);
        if (f != form_of(l->part[0].type) || (f == CUDA_FORM_F16 && l->part[i].type != l->part[0].type))
            return false;
    }
    return true;
}

/* The matrices of a load, without memory. */
static int plan_matrices(const be_load *l, cuda_matrix m[3]) {
    const bool glu = l->use == BE_USE_GATE_UP, alike = parts_alike(l);
    const int n = l->use == BE_USE_LINEAR && !alike ? l->n_part : 1;
    for (int i = 0, row0 = 0; i < n; i++) {
        const mf_tensor *t = &l->part[i];
        cuda_matrix *x = &m[i];
        *x = cuda_matrix{};
        x->form = glu && !alike ? CUDA_FORM_F16X2 : form_of(t->type);
        x->n_col = (int64_t)t->n_col;
        x->n_mat = (int64_t)t->n_mat;
        bool heads = l->n_part == 3;
        for (int k = i; k < (n == 1 && !glu ? l->n_part : i + 1); k++) {
            x->n_row += (int64_t)l->part[k].n_row;
            heads = heads && l->part[k].n_row % 64 == 0;
        }
        x->map = glu ? CUDA_ROWS_GLU : heads ? CUDA_ROWS_PAIR64 : CUDA_ROWS_PLAIN;
        x->row0 = row0;
        row0 += (int)x->n_row;
        x->factor = 1;
        x->n_tile = (int)((x->n_row + (glu ? 7 : 15)) / (glu ? 8 : 16));
        x->n_unit = (int)((x->n_col + 63) / 64);
        x->chunk_bytes = chunk_bytes(x->form);
    }
    return n;
}

static uint64_t matrix_bytes(const cuda_matrix *m) {
    return (uint64_t)m->n_mat * (uint64_t)m->n_tile * (uint64_t)m->n_unit * (uint64_t)m->chunk_bytes;
}

static bool any_bias(const be_load *l) { return l->has_bias[0] || l->has_bias[1] || l->has_bias[2]; }

static uint64_t stacked_rows(const be_load *l) {
    uint64_t n = 0;
    for (int i = 0; i < l->n_part; i++)
        n += l->part[i].n_row;
    return n;
}

static q_type rows_type_of(q_type t) { return t == Q_F16 || t == Q_BF16 || t == Q_Q8_0 ? t : Q_F32; }
static bool wants_dense(const be_load *l) {
    return l->use == BE_USE_VECTOR || (l->use == BE_USE_LINEAR && stacked_rows(l) <= DENSE_LIMIT);
}

/* ---- packing on the device ---- */

struct pack_job { /* canonical rows [first, first + n) of one part of one matrix, as they lie in the staging buffer */
    uint8_t *chunks; /* of this matrix (mat) */
    const uint8_t *src;
    int64_t n_col, row_bytes;
    int first, n;  /* rows in the part */
    int part_row0; /* first row of the part in the matrix */
    int n_row;     /* of the matrix; GLU: of one part */
    int n_unit, chunk_bytes;
    cuda_rowmap map;
    int part; /* GLU: 0 gate, 1 up */
    float scale;
};

/* Row of the stacked matrix in tile row r (0..15), -1 when it is not of this part. */
static __device__ int tile_row(const pack_job &j, int tile, int r) {
    if (j.map == CUDA_ROWS_GLU)
        return (r >> 3) == j.part ? tile * 8 + (r & 7) : -1;
    if (j.map == CUDA_ROWS_PAIR64)
        return (tile >> 2) * 64 + (tile & 3) * 8 + (r & 7) + (r >> 3) * 32;
    return tile * 16 + r;
}

struct job_rows {
    const pack_job *j;
    int tile;
    __device__ const uint8_t *operator()(int r) const {
        int row = tile_row(*j, tile, r) - j->part_row0;
        return row >= j->first && row < j->first + j->n ? j->src + (row - j->first) * j->row_bytes : NULL;
    }
};

/* Rows of a tile may come in different jobs, or parts: a lane that has a row ors it in, so chunks start as zeros. */
template <int KIND> __global__ void pack_kernel(pack_job j, int tile0, int *big) {
    __shared__ uint4 tmp[form_f16<2>::CHUNK / 16];
    const int tile = tile0 + blockIdx.x, unit = blockIdx.y, lane = threadIdx.x;
    uint8_t *local = (uint8_t *)tmp;
    const job_rows rows = {&j, tile};
    if constexpr (KIND == Q_MXFP4)
        pack_mxfp4(local, lane, rows, (int64_t)unit * 64, j.n_col);
    else if constexpr (KIND == Q_Q8_0 || KIND == Q_Q4_0 || KIND == Q_Q5_0)
        pack_q8_0<KIND>(local, lane, rows, (int64_t)unit * 64, j.n_col);
    else if constexpr (KIND == Q_F32)
        pack_f16<2, KIND>(local, lane, rows, (int64_t)unit * 64, j.n_col, j.scale, big);
    else
        pack_f16<1, KIND>(local, lane, rows, (int64_t)unit * 64, j.n_col, j.scale, big);
    __syncwarp();
    uint4 *dst = (uint4 *)(j.chunks + ((int64_t)tile * j.n_unit + unit) * j.chunk_bytes);
    for (int i = lane; i < j.chunk_bytes / 16; i += 32) {
        uint4 a = dst[i], b = tmp[i];
        dst[i] = make_uint4(a.x | b.x, a.y | b.y, a.z | b.z, a.w | b.w);
    }
}

static cudaError_t pack(cuda_dev *d, const pack_job *j, int kind, cudaStream_t s) {
    const int per = j->map == CUDA_ROWS_GLU ? 8 : 16;
    int first = j->part_row0 + j->first, last = first + j->n - 1;
    int tile0 = first / per, tile1 = last / per;
    if (j->map == CUDA_ROWS_PAIR64) {
        tile0 = first / 64 * 4;
        tile1 = last / 64 * 4 + 3;
    }
    dim3 grid((unsigned)(tile1 - tile0 + 1), (unsigned)j->n_unit);
    switch (kind) {
    case Q_MXFP4:
        pack_kernel<Q_MXFP4><<<grid, 32, 0, s>>>(*j, tile0, d->flag);
        break;
    case Q_Q8_0:
        pack_kernel<Q_Q8_0><<<grid, 32, 0, s>>>(*j, tile0, d->flag);
        break;
    case Q_Q4_0:
        pack_kernel<Q_Q4_0><<<grid, 32, 0, s>>>(*j, tile0, d->flag);
        break;
    case Q_Q5_0:
        pack_kernel<Q_Q5_0><<<grid, 32, 0, s>>>(*j, tile0, d->flag);
        break;
    case Q_BF16:
        pack_kernel<Q_BF16><<<grid, 32, 0, s>>>(*j, tile0, d->flag);
        break;
    case Q_F16:
        pack_kernel<Q_F16><<<grid, 32, 0, s>>>(*j, tile0, d->flag);
        break;
    default:
        pack_kernel<Q_F32><<<grid, 32, 0, s>>>(*j, tile0, d->flag);
    }
    return cudaGetLastError();
}

#define SCALE_WARPS 8 /* of a block, each with every so many chunks */

static __device__ __forceinline__ int64_t first_chunk() { return blockIdx.x * SCALE_WARPS + threadIdx.x / 32; }

/* seen[0]: the largest scale of n chunks. */
static __global__ void scale_top_kernel(const uint8_t *chunks, int64_t n, int *seen) {
    int top = 0;
    for (int64_t i = first_chunk(); i < n; i += gridDim.x * SCALE_WARPS)
        top = max(top, mxfp4_scale(chunks + i * mxfp4_codes::CHUNK, threadIdx.x % 32));
    atomicMax(seen, top);
}

/* seen[1]: blocks that are not all zeros; seen[2]: those of them that are too small beside seen[0] for f16. */
static __global__ void scale_count_kernel(const uint8_t *chunks, int64_t n, int *seen) {
    const int top = seen[0];
    int all = 0, small = 0;
    for (int64_t i = first_chunk(); i < n; i += gridDim.x * SCALE_WARPS) {
        const int s = mxfp4_scale(chunks + i * mxfp4_codes::CHUNK, threadIdx.x % 32);
        all += s > 0;
        small += s > 0 && top - s > form_mxfp4::SPAN;
    }
    atomicAdd(seen + 1, all);
    atomicAdd(seen + 2, small);
}

static __global__ void scale_power_kernel(uint8_t *chunks, int64_t n, int top) {
    const int lane = threadIdx.x % 32;
    for (int64_t i = first_chunk(); i < n; i += gridDim.x * SCALE_WARPS) {
        uint8_t *chunk = chunks + i * mxfp4_codes::CHUNK;
        const int s = mxfp4_scale(chunk, lane);
        chunk[512 + lane] = form_mxfp4::power(s, top);
    }
}

/* Scales of a packed MXFP4 matrix become powers in f16. Where more than one block in FAR_SHARE is too small for that,
 * as it is not where training left a few rows to decay, the matrix is one whose scales are too far apart. */
#define FAR_SHARE 64
static orcd_status settle_scales(cuda_dev *d, cuda_matrix *m, orcd_error *err) {
    const int64_t n = (int64_t)(matrix_bytes(m) / (uint64_t)m->chunk_bytes);
    int seen[3] = {0, 0, 0};
    if (d->dry)
        return ORCD_OK;
    CUDA_TRY(d, "clearing a flag", cudaMemsetAsync(d->flag, 0, sizeof seen, d->copy));
    scale_top_kernel<<<1024, SCALE_WARPS * 32, 0, d->copy>>>(m->data, n, d->flag);
    scale_count_kernel<<<1024, SCALE_WARPS * 32, 0, d->copy>>>(m->data, n, d->flag);
    CUDA_TRY(d, "looking at scales", cudaMemcpyAsync(seen, d->flag, sizeof seen, cudaMemcpyDeviceToHost, d->copy));
    CUDA_TRY(d, "looking at scales", cudaStreamSynchronize(d->copy));
    if (seen[0] == 255 || seen[2] > seen[1] / FAR_SHARE) {
        m->form = CUDA_FORM_MXFP4_FAR;
        m->factor = form_mxfp4_far::FACTOR;
        return ORCD_OK;
    }
    m->factor = ldexpf(1, seen[0] - 128);
    scale_power_kernel<<<1024, SCALE_WARPS * 32, 0, d->copy>>>(m->data, n, seen[0]);
    CUDA_TRY(d, "rewriting scales", cudaGetLastError());
    return ORCD_OK;
}

/* ---- moving rows up ---- */

struct fetch { /* rows of one matrix, made by all workers */
    const mf_tensor *t;
    uint64_t mat, row0, n;
    uint8_t *dst;
    bool to_float;
    uint8_t *canonical; /* to_float: room for the canonical rows */
};

static void fetch_rows(void *arg, int thread, int n_threads) {
    const fetch *f = (const fetch *)arg;
    uint64_t a = f->n * (uint64_t)thread / (uint64_t)n_threads, b = f->n * (uint64_t)(thread + 1) / (uint64_t)n_threads;
    if (a == b)
        return;
    size_t bytes = mf_row_bytes(f->t);
    if (!f->to_float) {
        mf_rows(f->t, f->mat, f->row0 + a, b - a, f->dst + a * bytes);
        return;
    }
    const q_traits *q = q_find(f->t->type);
    for (uint64_t r = a; r < b; r++) {
        mf_rows(f->t, f->mat, f->row0 + r, 1, f->canonical + r * bytes);
        q->unpack(f->canonical + r * bytes, (float *)(f->dst + r * f->t->n_col * 4), f->t->n_col);
    }
}

typedef cudaError_t (*place_fn)(cuda_dev *d, void *ctx, const uint8_t *src, uint64_t mat, uint64_t row0, uint64_t n,
                                cudaStream_t s);

/* Bring every row of a tensor to the device, in chunks, and let `place` put each chunk where it belongs. */
static orcd_status stream_rows(cuda_dev *d, const mf_tensor *t, bool to_float, place_fn place, void *ctx,
                               orcd_error *err) {
    if (d->dry)
        return ORCD_OK;
    const size_t canonical = mf_row_bytes(t), bytes = to_float ? (size_t)t->n_col * 4 : canonical;
    const uint64_t per = LOAD_CHUNK / (to_float ? bytes + canonical : bytes);
    if (per == 0)
        return orcd_fail(err, ORCD_ERR_LIMIT, "\"%s\" has rows of %zu bytes; at most %zu fit the upload buffer",
                         t->name, bytes, LOAD_CHUNK / 2);
    int slot = 0;
    for (uint64_t mat = 0; mat < t->n_mat; mat++)
        for (uint64_t row = 0; row < t->n_row; row += per, slot ^= 1) {
            fetch f = {t, mat, row, t->n_row - row < per ? t->n_row - row : per, d->load_host[slot], to_float, NULL};
            f.canonical = f.dst + f.n * bytes;
            CUDA_TRY(d, "waiting for an upload", cudaEventSynchronize(d->load_done[slot]));
            pool_run(d->workers, fetch_rows, &f);
            CUDA_TRY(d, "uploading weights",
                     cudaMemcpyAsync(d->load_dev[slot], f.dst, f.n * bytes, cudaMemcpyHostToDevice, d->copy));
            CUDA_TRY(d, "packing weights", place(d, ctx, d->load_dev[slot], mat, row, f.n, d->copy));
            CUDA_TRY(d, "packing weights", cudaEventRecord(d->load_done[slot], d->copy));
        }
    mf_release(t);
    return ORCD_OK;
}

struct place_packed {
    cuda_matrix *m;
    const mf_tensor *t;
    int part_row0, part, kind;
    float scale;
};

static cudaError_t put_packed(cuda_dev *d, void *ctx, const uint8_t *src, uint64_t mat, uint64_t row0, uint64_t n,
                              cudaStream_t s) {
    const place_packed *p = (const place_packed *)ctx;
    const cuda_matrix *m = p->m;
    pack_job j;
    j.chunks = m->data + mat * (uint64_t)m->n_tile * (uint64_t)m->n_unit * (uint64_t)m->chunk_bytes;
    j.src = src;
    j.n_col = m->n_col;
    j.row_bytes = p->kind == Q_F32 ? m->n_col * 4 : (int64_t)mf_row_bytes(p->t);
    j.first = (int)row0;
    j.n = (int)n;
    j.part_row0 = p->part_row0;
    j.n_row = (int)m->n_row;
    j.n_unit = m->n_unit;
    j.chunk_bytes = m->chunk_bytes;
    j.map = m->map;
    j.part = p->part;
    j.scale = p->scale;
    return pack(d, &j, p->kind, s);
}

static cudaError_t put_plain(cuda_dev *d, void *ctx, const uint8_t *src, uint64_t mat, uint64_t row0, uint64_t n,
                             cudaStream_t s) {
    (void)d, (void)mat;
    cuda_weight *w = (cuda_weight *)ctx;
    return cudaMemcpyAsync(w->rows + row0 * (uint64_t)w->row_bytes, src, n * (uint64_t)w->row_bytes,
                           cudaMemcpyDeviceToDevice, s);
}

static orcd_status ensure_staging(cuda_dev *d, orcd_error *err) {
    if (d->dry || d->load_dev[1])
        return ORCD_OK;
    if (!d->workers) {
        long cores = sysconf(_SC_NPROCESSORS_ONLN);
        ORCD_TRY(pool_open(cores > 8 ? 8 : cores < 1 ? 1 : (int)cores, &d->workers, err));
    }
    for (int i = 0; i < 2; i++) {
        CUDA_TRY(d, "making events", cudaEventCreateWithFlags(&d->load_done[i], cudaEventDisableTiming));
        CUDA_TRY(d, "pinning upload buffers", cudaMallocHost((void **)&d->load_host[i], LOAD_CHUNK));
        ORCD_TRY(cuda_alloc(d, &d->load_dev[i], LOAD_CHUNK, "the upload buffer", err));
    }
    return ORCD_OK;
}

/* Give back what only loading needs; the next load makes it again. */
void cuda_loaded(cuda_dev *d) {
    for (int i = 0; i < 2; i++) {
        if (d->load_host[i])
            cudaFreeHost(d->load_host[i]);
        if (d->load_done[i])
            cudaEventDestroy(d->load_done[i]);
        cuda_free(d, d->load_dev[i]);
        d->load_host[i] = d->load_dev[i] = NULL;
        d->load_done[i] = NULL;
    }
    if (d->workers)
        pool_close(d->workers);
    d->workers = NULL;
}

/* The power of two that brings a tensor's largest finite weight to [2^14, 2^15). */
static orcd_status power_of(const mf_tensor *t, float *power, orcd_error *err) {
    const size_t bytes = mf_row_bytes(t), n = (size_t)t->n_col;
    const q_traits *q = q_find(t->type);
    float top = 0;
    float *v = (float *)malloc(n * 4 + bytes);
    if (!v)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for a row of \"%s\"", t->name);
    uint8_t *row = (uint8_t *)(v + n);
    for (uint64_t mat = 0; mat < t->n_mat; mat++)
        for (uint64_t r = 0; r < t->n_row; r++) {
            mf_rows(t, mat, r, 1, row);
            q->unpack(row, v, n);
            for (size_t i = 0; i < n; i++)
                if (fabsf(v[i]) > top && isfinite(v[i]))
                    top = fabsf(v[i]);
        }
    free(v);
    *power = top > 0 ? ldexpf(1, 14 - ilogbf(top)) : 1;
    return ORCD_OK;
}

/* ---- one weight ---- */

static orcd_status load_dense(cuda_dev *d, const be_load *l, float **out, orcd_error *err) {
    const size_t n = (size_t)(stacked_rows(l) * l->part[0].n_col);
    ORCD_TRY(cuda_alloc(d, out, n * sizeof **out, l->part[0].name, err));
    if (d->dry)
        return ORCD_OK;
    float *v = (float *)malloc(n * sizeof *v);
    if (!v)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for \"%s\"", l->part[0].name);
    for (size_t i = 0, at = 0; i < (size_t)l->n_part; at += (size_t)(l->part[i].n_row * l->part[i].n_col), i++)
        mf_floats(&l->part[i], v + at);
    orcd_status st = cuda_upload(d, *out, v, n * sizeof *v, "uploading floats", err);
    free(v);
    return st;
}

/* [n_mat][all rows]; parts without a bias have zeros. */
static orcd_status load_bias(cuda_dev *d, const be_load *l, float **out, orcd_error *err) {
    const size_t rows = (size_t)stacked_rows(l), mats = (size_t)l->part[0].n_mat;
    size_t at = 0;
    ORCD_TRY(cuda_alloc(d, out, mats * rows * sizeof **out, "a bias", err));
    if (d->dry)
        return ORCD_OK;
    float *v = (float *)calloc(mats * rows * 2, sizeof *v), *one = v + mats * rows;
    if (!v)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for the bias of \"%s\"", l->part[0].name);
    for (int i = 0; i < l->n_part; i++) {
        const size_t n = (size_t)l->part[i].n_row;
        if (l->has_bias[i]) {
            mf_floats(&l->bias[i], one);
            for (size_t m = 0; m < mats; m++)
                memcpy(v + m * rows + at, one + m * n, n * sizeof *v);
        }
        at += n;
    }
    orcd_status st = cuda_upload(d, *out, v, mats * rows * sizeof *v, "uploading floats", err);
    free(v);
    return st;
}

static orcd_status load_rows(cuda_dev *d, const be_load *l, cuda_weight *w, orcd_error *err) {
    w->rows_type = rows_type_of(l->part[0].type);
    w->row_bytes = (int64_t)q_row_bytes(q_find(w->rows_type), l->part[0].n_col);
    ORCD_TRY(cuda_alloc(d, &w->rows, (size_t)w->row_bytes * (size_t)l->part[0].n_row, l->part[0].name, err));
    return stream_rows(d, &l->part[0], w->rows_type != l->part[0].type, put_plain, w, err);
}

/* Pack the parts [first, first + n) into one matrix; *big: a weight left the range of the power. */
static orcd_status load_matrix(cuda_dev *d, const be_load *l, int first, int n, cuda_matrix *m, float power, int *big,
                               orcd_error *err) {
    if (d->dry)
        return ORCD_OK;
    CUDA_TRY(d, "clearing a weight", cudaMemsetAsync(m->data, 0, (size_t)matrix_bytes(m), d->copy));
    CUDA_TRY(d, "clearing a flag", cudaMemsetAsync(d->flag, 0, 4, d->copy));
    for (int i = first, row0 = 0; i < first + n; i++) {
        const mf_tensor *t = &l->part[i];
        const bool floats = m->form == CUDA_FORM_F16X2;
        place_packed p = {m, t, m->map == CUDA_ROWS_GLU ? 0 : row0, i, floats ? (int)Q_F32 : (int)t->type, power};
        ORCD_TRY(stream_rows(d, t, floats && t->type != Q_F32, put_packed, &p, err));
        row0 += (int)t->n_row;
    }
    CUDA_TRY(d, "packing weights", cudaMemcpyAsync(big, d->flag, 4, cudaMemcpyDeviceToHost, d->copy));
    CUDA_TRY(d, "packing weights", cudaStreamSynchronize(d->copy));
    return ORCD_OK;
}

static orcd_status load_matrices(cuda_dev *d, const be_load *l, cuda_weight *w, orcd_error *err) {
    const int n = plan_matrices(l, w->matrix);
    for (int i = 0; i < n; i++) {
        cuda_matrix *m = &w->matrix[i];
        const int parts = n == 1 ? l->n_part : 1;
        int big = 0;
        float power = m->form == CUDA_FORM_F16X2 || l->part[i].type == Q_BF16 ? 256 : 1;
        ORCD_TRY(cuda_alloc(d, &m->data, (size_t)matrix_bytes(m), l->part[i].name, err));
        w->n_matrix = i + 1;
        ORCD_TRY(load_matrix(d, l, i, parts, m, power, &big, err));
        if (big && l->part[i].type != Q_F16) { /* rare: look at the weights and choose the power that fits */
            for (int k = i; k < i + parts; k++) {
                float one = 1;
                ORCD_TRY(power_of(&l->part[k], &one, err));
                power = fminf(power, one);
            }
            ORCD_TRY(load_matrix(d, l, i, parts, m, power, &big, err));
        }
        m->factor = 1.f / power;
        if (m->form == CUDA_FORM_MXFP4)
            ORCD_TRY(settle_scales(d, m, err));
    }
    return ORCD_OK;
}

orcd_status cuda_load(be_device *base, const be_load *l, be_weight **out, orcd_error *err) {
    cuda_dev *d = (cuda_dev *)base;
    orcd_status st = ORCD_OK;
    cudaError_t e = cudaSuccess;
    *out = NULL;
    if (l->n_part < 1 || l->n_part > 3 || (l->use == BE_USE_GATE_UP && l->n_part != 2))
        return orcd_fail(err, ORCD_ERR_ARG, "a weight of %d parts", l->n_part);
    ORCD_TRY(cuda_use(d, err));
    ORCD_TRY(ensure_staging(d, err));
    const uint64_t before = d->used;
    cuda_weight *w = new (std::nothrow) cuda_weight{};
    if (!w)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    w->base.use = l->use;
    w->base.type = l->part[0].type;
    w->base.n_col = (int64_t)l->part[0].n_col;
    w->base.n_row = (int64_t)stacked_rows(l);
    w->base.n_mat = (int64_t)l->part[0].n_mat;
    w->dev = d;
    if (l->host && (l->use == BE_USE_GATE_UP || l->use == BE_USE_DOWN)) {
        ORCD_TRY_GOTO(st, done, cuda_host_load(d, l, w, err));
        *out = &w->base;
        return ORCD_OK;
    }
    if (l->use == BE_USE_EMBED)
        ORCD_TRY_GOTO(st, done, load_rows(d, l, w, err));
    if (wants_dense(l))
        ORCD_TRY_GOTO(st, done, load_dense(d, l, &w->dense, err));
    if (w->dense && l->use == BE_USE_LINEAR) { /* maybe a router */
        const int64_t sums = (w->base.n_col + 15) / 16 * w->base.n_row;
        ORCD_TRY_GOTO(st, done, cuda_alloc(d, &w->gained, (size_t)sums * 64, "a router", err));
        d->want_route = sums > d->want_route ? sums : d->want_route;
        if (!cuda_routes_many(w->base.n_col, w->base.n_row))
            d->route_all_rows = true;
    }
    if (l->use != BE_USE_EMBED && l->use != BE_USE_VECTOR)
        ORCD_TRY_GOTO(st, done, load_matrices(d, l, w, err));
    if (any_bias(l))
        ORCD_TRY_GOTO(st, done, load_bias(d, l, &w->bias, err));
    if (l->use == BE_USE_LINEAR || l->use == BE_USE_GATE_UP)
        d->want_col = w->base.n_col > d->want_col ? w->base.n_col : d->want_col;
    if (l->use == BE_USE_GATE_UP) {
        const int64_t ff = (int64_t)l->part[0].n_row;
        d->want_ff = ff > d->want_ff ? ff : d->want_ff;
        d->want_expert = w->base.n_mat > d->want_expert ? w->base.n_mat : d->want_expert;
        d->want_embd = w->base.n_col > d->want_embd ? w->base.n_col : d->want_embd;
    }
    if (l->use == BE_USE_DOWN && w->base.n_row > d->want_embd)
        d->want_embd = w->base.n_row;
    w->base.bytes = d->used - before;
    if (!d->dry && (e = cudaStreamSynchronize(d->copy)) != cudaSuccess) {
        st = cuda_fail(d, e, "loading weights", err);
        goto done;
    }
    *out = &w->base;
    w = NULL;
done:
    cuda_unload(base, (be_weight *)w);
    return st;
}

void cuda_unload(be_device *base, be_weight *weight) {
    cuda_weight *w = (cuda_weight *)weight;
    if (!w)
        return;
    cuda_dev *d = (cuda_dev *)base;
    cuda_quiet(d);
    cuda_graphs_drop(d, NULL);
    for (int i = 0; i < w->n_matrix; i++)
        cuda_free(d, w->matrix[i].data);
    cuda_free(d, w->bias);
    cuda_free(d, w->dense);
    cuda_free(d, w->gained);
    cuda_free(d, w->rows);
    cuda_host_unload(d, w->host);
    delete w;
}

uint64_t cuda_load_bytes(be_device *base, const be_load *l) {
    cuda_dev dry = {};
    be_weight *w = NULL;
    dry.base.ops = base->ops;
    dry.dry = true;
    uint64_t bytes = cuda_load(&dry.base, l, &w, NULL) == ORCD_OK ? w->bytes : 0;
    cuda_unload(&dry.base, w);
    free(dry.block);
    return bytes;
}
