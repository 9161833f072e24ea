/* backend/cuda/rows.cu: operations that treat rows one by one: embed, norm, RoPE, KV write, gather. */
#include "backend/cuda/kv.cuh"
#include "backend/cuda/math.cuh"
#include "backend/cuda/pack.cuh"

/* ---- embed ---- */

static __device__ float row_value(const uint8_t *row, int type, int64_t i) {
    switch (type) {
    case Q_F16:
        return __half2float(((const __half *)row)[i]);
    case Q_BF16:
        return __uint_as_float((uint32_t)((const uint16_t *)row)[i] << 16);
    case Q_Q8_0: {
        const uint8_t *b = row + i / 32 * 34;
        __half d;
        memcpy(&d, b, 2);
        return __half2float(d) * (float)(int8_t)b[2 + i % 32];
    }
    default:
        return ((const float *)row)[i];
    }
}

struct embed_table {
    const uint8_t *rows;
    int64_t row_bytes, n_row;
    int type;
};

static __global__ void embed_kernel(embed_table tok, embed_table pos, cuda_arrays a, float *y, int width) {
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.x;
    if (row >= a.batch->n_tok)
        return;
    int64_t id = a.token[row], p = a.pos[row];
    if (id < 0)
        id = a.id[-1 - id]; /* what the last step sampled */
    id = id < 0 ? 0 : id >= tok.n_row ? tok.n_row - 1 : id;
    p = p < 0 ? 0 : p >= pos.n_row ? pos.n_row - 1 : p;
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < width; i += gridDim.y * blockDim.x) {
        float v = row_value(tok.rows + id * tok.row_bytes, tok.type, i);
        if (pos.rows)
            v += row_value(pos.rows + p * pos.row_bytes, pos.type, i);
        y[(int64_t)row * width + i] = v;
    }
}

static embed_table table_of(const cuda_weight *w) {
    if (!w)
        return {NULL, 0, 1, 0};
    return {w->rows, w->row_bytes, w->base.n_row, (int)w->rows_type};
}

/* Blocks of 256 threads that share a row: where there are few, each value has a thread. */
static unsigned row_parts(int rows, int64_t width) { return rows < 32 ? (unsigned)(width + 255) / 256 : 1; }

void cuda_run_embed(cuda_run *r, const cuda_cmd *c) {
    const dim3 grid((unsigned)r->shape.rows, row_parts(r->shape.rows, c->y->base.width));
    cuda_launch(r, embed_kernel, grid, dim3(256), 0, table_of(c->w), table_of(c->w2), r->dev->arr, c->y->f32,
                (int)c->y->base.width);
}

/* ---- norm ---- */

template <bool RMS>
static __global__ __launch_bounds__(ROW_THREADS) void norm_kernel(cuda_count rows, const float *x, const float *gain,
                                                                  const float *bias, float eps, int n, float *y,
                                                                  uint16_t *yh, int64_t ld, pack_to pack) {
    __shared__ float part[16], part2[16];
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.x;
    if (row >= count_rows(rows))
        return;
    x += (int64_t)row * n;
    float mean = 0, s = 0;
    if (!RMS) {
        for (int k = 4 * threadIdx.x; k < n; k += 4 * ROW_THREADS)
            for (int i = k; i < k + 4 && i < n; i++)
                s += x[i];
        mean = row_sum(s, part2) / n;
        s = 0;
    }
    for (int k = 4 * threadIdx.x; k < n; k += 4 * ROW_THREADS)
        for (int i = k; i < k + 4 && i < n; i++)
            s = fmaf(x[i] - mean, x[i] - mean, s);
    const float rs = rms_scale(row_sum(s, part), n, eps);
    for (int k = threadIdx.x; k < n; k += ROW_THREADS) {
        float v = __fmul_rn(__fmul_rn(x[k] - mean, rs), gain[k]);
        if (bias)
            v += bias[k];
        if (y)
            y[(int64_t)row * n + k] = v;
        if (yh)
            yh[row * ld + k] = f16_bits(v);
        if (pack.at)
            *(uint16_t *)pack.of(row, k) = f16_bits(v);
    }
}

void cuda_run_norm(cuda_run *r, const cuda_cmd *c) {
    const cuda_count rows = cuda_rows_of(r, c);
    cuda_launch(r, c->norm_kind == BE_NORM_RMS ? norm_kernel<true> : norm_kernel<false>, dim3((unsigned)rows.cap),
                dim3(ROW_THREADS), 0, rows, c->x->f32, c->w->dense, c->w2 ? c->w2->dense : (float *)NULL, c->eps,
                (int)c->x->base.width, c->y->f32, c->y->f16, c->y->ld,
                pack_rows(r, c->y, rows.cap, r->dev->scratch.down, r->dev->scratch.down_bytes));
}

/* ---- f16 copy of rows that only have floats ---- */

static __global__ void to_f16_kernel(cuda_count rows, const float *x, int n, uint16_t *y, int64_t ld) {
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.x;
    if (row < count_rows(rows))
        for (int k = threadIdx.x; k < n; k += blockDim.x)
            y[row * ld + k] = f16_bits(x[(int64_t)row * n + k]);
}

void cuda_run_to_f16(cuda_run *r, const cuda_cmd *c) {
    const cuda_count rows = cuda_rows_of(r, c);
    cuda_launch(r, to_f16_kernel, dim3((unsigned)rows.cap), dim3(256), 0, rows, c->x->f32, (int)c->x->base.width,
                c->x->f16, c->x->ld);
}

/* ---- gather ---- */

static __global__ void gather_kernel(cuda_arrays a, const float *x, int n, float *y) {
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.x;
    if (row >= a.batch->n_out)
        return;
    const float *src = x + (int64_t)a.out_row[row] * n;
    for (int k = blockIdx.y * blockDim.x + threadIdx.x; k < n; k += gridDim.y * blockDim.x)
        y[(int64_t)row * n + k] = src[k];
}

void cuda_run_gather(cuda_run *r, const cuda_cmd *c) {
    const dim3 grid((unsigned)r->shape.outs, row_parts(r->shape.outs, c->x->base.width));
    cuda_launch(r, gather_kernel, grid, dim3(256), 0, r->dev->arr, c->x->f32, (int)c->x->base.width, c->y->f32);
}

/* ---- RoPE ---- */

/* cos and sin of every row's position, once per step and set of frequencies; angles in double, reduced to one turn. */
static __global__ void rope_table_kernel(cuda_arrays a, const float *freq, int half, float scale, float2 *out) {
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.x, i = threadIdx.x;
    if (row >= a.batch->n_tok || i >= half)
        return;
    const double turn = 6.283185307179586476925;
    double angle = (double)a.pos[row] * (double)freq[i];
    angle -= turn * rint(angle / turn);
    float s, c;
    sincosf((float)angle, &s, &c);
    out[row * 64 + i] = make_float2(c * scale, s * scale);
}

void cuda_run_rope_table(cuda_run *r, const cuda_cmd *c) {
    if (r->freq == c->freq && r->rope_scale == c->attn.rope_scale)
        return;
    r->freq = c->freq;
    r->rope_scale = c->attn.rope_scale;
    cuda_launch(r, rope_table_kernel, dim3((unsigned)r->shape.rows), dim3(64), 0, r->dev->arr,
                (const float *)r->dev->freq[c->freq].dev, c->attn.head_dim / 2, c->attn.rope_scale,
                r->dev->scratch.rope);
}

static __global__ void rope_kernel(cuda_arrays a, const float2 *cs, float *qkv, int width, int n_rot, int half) {
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.x;
    if (row >= a.batch->n_tok)
        return;
    float *x = qkv + (int64_t)row * width;
    for (int k = threadIdx.x; k < n_rot * half; k += blockDim.x) {
        float *p = x + k / half * 2 * half + k % half;
        float lo = p[0], hi = p[half];
        rotate(lo, hi, cs[row * 64 + k % half]);
        p[0] = lo;
        p[half] = hi;
    }
}

void cuda_run_rope(cuda_run *r, const cuda_cmd *c) {
    const be_attn *t = &c->attn;
    if (c->freq < 0)
        return;
    cuda_run_rope_table(r, c);
    cuda_launch(r, rope_kernel, dim3((unsigned)r->shape.rows), dim3(256), 0, r->dev->arr,
                (const float2 *)r->dev->scratch.rope, c->x->f32, (int)c->x->base.width, t->n_head + t->n_kv_head,
                t->head_dim / 2);
}

/* ---- KV write ---- */

/* Where a layer's keys and values go: a row's page, or page -1. */
struct kv_layer {
    uint8_t *at; /* of page 0 */
    int64_t page_bytes;
    const int32_t *table;
    int n_entry, head_bytes, dim;
};

static kv_layer layer_of(const cuda_kv *kv, const be_attn *t) {
    const int pool = kv->window[t->layer] ? BE_POOL_WINDOW : BE_POOL_FULL;
    return {cuda_kv_layer(kv, pool, t->layer),
            (int64_t)kv->base.page_bytes[pool],
            kv->table[pool],
            kv->n_entry,
            kv->head_bytes,
            kv->dim};
}

#define KV_WARPS 8 /* of a block, each with one head of the row */
#define KV_PART 4  /* a lane's dimensions: lane + 32 i */

static __device__ __forceinline__ int kv_head() { return (int)(blockIdx.y * KV_WARPS + threadIdx.x / 32); }

/* head: of the KV heads' keys, then of their values; nothing when the position has no page. */
template <class T>
static __device__ __forceinline__ void kv_write_head(const cuda_arrays &a, const kv_layer &l, int row, int head,
                                                     int n_kv, const float (&v)[KV_PART]) {
    const int pos = a.pos[row];
    const int32_t page = l.table[(int64_t)a.slot[row] * l.n_entry + pos / BE_PAGE];
    if (page >= 0)
        kv_put((T *)(l.at + page * l.page_bytes + (int64_t)(head % n_kv) * l.head_bytes), l.dim, head >= n_kv,
               pos % BE_PAGE, v);
}

/* A warp a head of K and V; dims past head_dim are zero. */
template <class T>
static __global__ __launch_bounds__(KV_WARPS * 32) void kv_write_kernel(cuda_arrays a, const float *qkv, int width,
                                                                        int n_head, int n_kv, int head_dim,
                                                                        kv_layer l) {
    pdl_wait();
    pdl_launch(); /* late: attention may then read positions, page tables and old pages before its wait */
    const int row = blockIdx.x, head = kv_head(), lane = threadIdx.x % 32;
    if (row >= a.batch->n_tok || head >= 2 * n_kv)
        return;
    const float *x = qkv + (int64_t)row * width + (int64_t)(n_head + head) * head_dim;
    float v[KV_PART];
#pragma unroll
    for (int i = 0; i < KV_PART; i++)
        v[i] = lane + 32 * i < head_dim ? x[lane + 32 * i] : 0.f;
    kv_write_head<T>(a, l, row, head, n_kv, v);
}

/* The same for KV_RUN rows: where they are consecutive positions of one page, as those of a prompt, their values lie
 * side by side. */
#define KV_RUN 8
template <class T>
static __global__ __launch_bounds__(KV_WARPS * 32) void kv_write_many_kernel(cuda_arrays a, const float *qkv, int width,
                                                                             int n_head, int n_kv, int head_dim,
                                                                             kv_layer l) {
    pdl_wait();
    pdl_launch(); /* late, as above */
    const int row0 = blockIdx.x * KV_RUN, head = kv_head(), lane = threadIdx.x % 32;
    const int n = min(KV_RUN, a.batch->n_tok - row0);
    if (n <= 0 || head >= 2 * n_kv)
        return;
    const float *x = qkv + (int64_t)row0 * width + (int64_t)(n_head + head) * head_dim;
    float v[KV_RUN][KV_PART];
#pragma unroll
    for (int k = 0; k < KV_RUN; k++)
#pragma unroll
        for (int i = 0; i < KV_PART; i++)
            v[k][i] = k < n && lane + 32 * i < head_dim ? x[(int64_t)k * width + lane + 32 * i] : 0.f;
    const int mine = row0 + min(lane, n - 1), first = a.pos[row0], slot = a.slot[row0];
    const bool next = a.pos[mine] == first + mine - row0 && a.slot[mine] == slot;
    if (sizeof(T) == 2 && head >= n_kv && __all_sync(~0u, next) && n == KV_RUN && first % KV_RUN == 0) {
        const int32_t page = l.table[(int64_t)slot * l.n_entry + first / BE_PAGE];
        __half *to = (__half *)(l.at + page * l.page_bytes + (int64_t)(head % n_kv) * l.head_bytes);
#pragma unroll
        for (int i = 0; i < KV_PART; i++)
            if (page >= 0 && lane + 32 * i < l.dim)
                *(uint4 *)(to + (l.dim + lane + 32 * i) * BE_PAGE + first % BE_PAGE) = make_uint4(
                    f16x2(v[0][i], v[1][i]), f16x2(v[2][i], v[3][i]), f16x2(v[4][i], v[5][i]), f16x2(v[6][i], v[7][i]));
        return;
    }
#pragma unroll
    for (int k = 0; k < KV_RUN; k++)
        if (k < n)
            kv_write_head<T>(a, l, row0 + k, head, n_kv, v[k]);
}

/* Rotation and write, where pages are as wide as heads: a warp a head of Q, K and V. */
template <class T>
static __global__ __launch_bounds__(KV_WARPS * 32) void rope_write_kernel(cuda_arrays a, const float2 *cs, float *qkv,
                                                                          int width, int n_head, int n_kv, kv_layer l) {
    pdl_wait();
    pdl_launch(); /* late: attention may then read positions, page tables and old pages before its wait */
    const int row = blockIdx.x, head = kv_head(), lane = threadIdx.x % 32, dim = l.dim, half = dim / 2;
    if (row >= a.batch->n_tok || head >= n_head + 2 * n_kv)
        return;
    float *x = qkv + (int64_t)row * width + head * dim, v[KV_PART];
#pragma unroll
    for (int i = 0; i < KV_PART; i++) {
        const int d = lane + 32 * i;
        v[i] = d < dim ? x[d] : 0.f;
        if (head >= n_head + n_kv || d >= dim)
            continue;
        const float other = x[d < half ? d + half : d - half];
        float lo = d < half ? v[i] : other, hi = d < half ? other : v[i];
        rotate(lo, hi, cs[row * 64 + d % half]);
        v[i] = d < half ? lo : hi;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < KV_PART; i++)
        if (head < n_head + n_kv && lane + 32 * i < dim)
            x[lane + 32 * i] = v[i];
    if (head >= n_head)
        kv_write_head<T>(a, l, row, head - n_head, n_kv, v);
}

static dim3 kv_grid(int rows, int heads) { return dim3((unsigned)rows, (unsigned)((heads + KV_WARPS - 1) / KV_WARPS)); }

template <class T> static void rope_write_typed(cuda_run *r, const cuda_cmd *c) {
    const be_attn *t = &c->attn;
    cuda_launch(r, rope_write_kernel<T>, kv_grid(r->shape.rows, t->n_head + 2 * t->n_kv_head), dim3(KV_WARPS * 32), 0,
                r->dev->arr, (const float2 *)r->dev->scratch.rope, c->x->f32, (int)c->x->base.width, t->n_head,
                t->n_kv_head, layer_of(r->kv, t));
}

bool cuda_can_rope_write(const cuda_run *r, const cuda_cmd *rope, const cuda_cmd *write) {
    return rope->freq >= 0 && write->op == CUDA_OP_KV_WRITE && write->x == rope->x &&
           write->attn.layer == rope->attn.layer && r->kv && r->kv->dim == rope->attn.head_dim;
}

void cuda_run_rope_write(cuda_run *r, const cuda_cmd *rope, const cuda_cmd *write) {
    cuda_run_rope_table(r, rope);
    if (r->kv->base.spec.type == BE_KV_F32)
        rope_write_typed<float>(r, write);
    else if (r->kv->base.spec.type == BE_KV_Q8)
        rope_write_typed<kv_int8>(r, write);
    else
        rope_write_typed<__half>(r, write);
}

template <class T> static void write_typed(cuda_run *r, const cuda_cmd *c) {
    const be_attn *t = &c->attn;
    const int rows = r->shape.rows;
    const bool many = rows >= 16 * KV_RUN;
    cuda_launch(r, many ? kv_write_many_kernel<T> : kv_write_kernel<T>,
                kv_grid(many ? (rows + KV_RUN - 1) / KV_RUN : rows, 2 * t->n_kv_head), dim3(KV_WARPS * 32), 0,
                r->dev->arr, (const float *)c->x->f32, (int)c->x->base.width, t->n_head, t->n_kv_head, t->head_dim,
                layer_of(r->kv, t));
}

void cuda_run_kv_write(cuda_run *r, const cuda_cmd *c) {
    if (r->kv->base.spec.type == BE_KV_F32)
        write_typed<float>(r, c);
    else if (r->kv->base.spec.type == BE_KV_Q8)
        write_typed<kv_int8>(r, c);
    else
        write_typed<__half>(r, c);
}
