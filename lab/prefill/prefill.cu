/* lab/prefill/prefill.cu: products of many rows, wgmma (wide.cuh) against mma.sync (linear.cuh): bits first, then time.
 *   nvcc -std=c++17 -O3 -Isrc -gencode=arch=compute_90a,code=sm_90a lab/prefill/prefill.cu \
 *        src/backend/cuda/{wide,pour,broad}.cu -o build/prefill && build/prefill [dense] [tokens of 32 experts, +tokens
 * of 128 experts, u before it: uneven routes ...] */
#include "backend/cuda/broad.cuh"
#include "backend/cuda/flow.cuh"
#include "backend/cuda/pour.cuh"
#include "backend/cuda/stream.cuh"

#include <algorithm>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <vector>

#define CK(x)                                                                                                          \
    do {                                                                                                               \
        const cudaError_t e_ = (x);                                                                                    \
        if (e_ != cudaSuccess) {                                                                                       \
            printf("%s:%d %s\n", __FILE__, __LINE__, cudaGetErrorString(e_));                                          \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static uint64_t rng = 88172645463325252ull;
static uint32_t rnd(void) {
    rng ^= rng << 13, rng ^= rng >> 7, rng ^= rng << 17;
    return (uint32_t)(rng >> 16);
}
static float gauss(void) {
    float s = 0;
    for (int i = 0; i < 4; i++)
        s += (float)(rnd() & 0xFFFF) / 65536.f - 0.5f;
    return s * 1.7f;
}
template <class T> static T *to_dev(const std::vector<T> &v) {
    T *p;
    CK(cudaMalloc(&p, v.size() * sizeof(T)));
    CK(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}

static __global__ void fill_kernel(uint8_t *p, int64_t n_chunk, int chunk, cuda_form form, uint32_t seed) {
    for (int64_t c = blockIdx.x; c < n_chunk; c += gridDim.x)
        for (int i = threadIdx.x; i < chunk; i += blockDim.x) {
            uint64_t h = (uint64_t)(c * chunk + i) * 0x9E3779B97F4A7C15ull + seed;
            h = (h ^ h >> 29) * 0xBF58476D1CE4E5B9ull;
            h ^= h >> 32;
            uint8_t v = (uint8_t)h;
            if (form == CUDA_FORM_MXFP4 && i >= 512)
                v = (uint8_t)(25 + v % 6 << 2);
            if (form == CUDA_FORM_Q8_0 && i % 544 >= 512)
                v = i & 1 ? 0x18 + v % 4 : v; /* about 0.002 to 0.008 */
            if (form >= CUDA_FORM_F16)
                v = i & 1 ? (v & 0x80) | (0x1C + v % 12) : v;
            p[c * chunk + i] = v;
        }
}

static cuda_matrix make(cuda_form form, cuda_rowmap map, int n_mat, int n_row, int n_col) {
    cuda_matrix m = {};
    m.form = form;
    m.map = map;
    m.factor = form == CUDA_FORM_MXFP4 ? 1 / 64.f : 1.f;
    m.n_col = n_col, m.n_row = n_row, m.n_mat = n_mat;
    m.n_tile = map == CUDA_ROWS_GLU ? (n_row + 7) / 8 : (n_row + 15) / 16;
    m.n_unit = (n_col + 63) / 64;
    m.chunk_bytes = form == CUDA_FORM_MXFP4 ? 544 : form == CUDA_FORM_Q8_0 ? 1088 : form == CUDA_FORM_F16 ? 2048 : 4096;
    const int64_t n = (int64_t)n_mat * m.n_tile * m.n_unit;
    CK(cudaMalloc(&m.data, n * m.chunk_bytes));
    fill_kernel<<<1024, 256>>>(m.data, n, m.chunk_bytes, form, 7u + (uint32_t)form);
    CK(cudaDeviceSynchronize());
    return m;
}

static float *floats(int64_t n, float scale) {
    std::vector<float> v((size_t)n);
    for (float &x : v)
        x = gauss() * scale;
    return to_dev(v);
}

struct timer {
    cudaEvent_t a, b;
    timer() { cudaEventCreate(&a), cudaEventCreate(&b); }
    template <class F> float ms(F f, int reps) { /* median */
        std::vector<float> t;
        for (int i = 0; i < reps + 1; i++) {
            float v;
            cudaEventRecord(a);
            f();
            cudaEventRecord(b);
            CK(cudaEventSynchronize(b));
            cudaEventElapsedTime(&v, a, b);
            if (i)
                t.push_back(v);
        }
        std::sort(t.begin(), t.end());
        return t[t.size() / 2];
    }
};

static int64_t differ(const void *a, const void *b, int64_t n, int size) {
    int64_t bad = 0;
    for (int64_t i = 0; i < n; i++)
        bad += memcmp((const char *)a + i * size, (const char *)b + i * size, (size_t)size) != 0;
    return bad;
}

static const int EMBD = 2880, FF = 2880;

/* Rows of an entry of the list. */
static const int pours[] = {16, 24, 32}, broads[] = {48, 64};

static void experts(cuda_run *r, const cuda_matrix &gu, const cuda_matrix &dn, const float *bgu, const float *bdn,
                    int T, int E, int K, bool even) {
    std::vector<std::vector<int>> of((size_t)E);
    std::vector<double> upto((size_t)E);
    double all = 0;
    for (double &u : upto)
        u = all += even ? 1 : exp(0.5 * gauss());
    for (int i = 0; i < T; i++) {
        int id[8];
        for (int j = 0; j < K; j++) {
        again:
            const double at = all * (double)(rnd() & 0xFFFFFF) / 16777216.0;
            id[j] = (int)(std::upper_bound(upto.begin(), upto.end(), at) - upto.begin());
            for (int q = 0; q < j; q++)
                if (id[q] == id[j])
                    goto again;
            of[(size_t)id[j]].push_back(i * K + j);
        }
    }
    const int mean = (T * K + E - 1) / E, width = mean <= 5 ? 8 : mean <= 11 ? 16 : mean <= 48 ? STREAM_MAX_COLS : 64;
    std::vector<int32_t> perm;
    std::vector<int4> wide, many, list[9]; /* [rows of an entry / 8] */
    for (int e = 0; e < E; e++) {
        const int c = (int)of[(size_t)e].size(), first = (int)perm.size(), nt = (c + WIDE_COLS - 1) / WIDE_COLS;
        const int per = nt ? ((c + nt - 1) / nt + 7) / 8 * 8 : 0;
        for (int i = 0; i < nt; i++)
            wide.push_back(make_int4(e, first + i * per, std::min(per, c - i * per), 0));
        for (int q = 1; q < 9; q++) {
            const int n = (c + q * 8 - 1) / (q * 8), each = n ? ((c + n - 1) / n + 7) / 8 * 8 : 0;
            for (int i = 0; i < n; i++)
                list[q].push_back(make_int4(e, first + i * each, std::min(each, c - i * each), 0));
        }
        for (int i = 0; i < c; i += width)
            many.push_back(make_int4(e, first + i, std::min(width, c - i), 0));
        for (int p : of[(size_t)e])
            perm.push_back(p);
        while (perm.size() % 8)
            perm.push_back(-1);
    }
    const int64_t rows = (int64_t)perm.size(), ldx = rows;
    const int units = (EMBD + 63) / 64, hunits = (FF + 63) / 64;
    std::vector<uint16_t> x((size_t)T * EMBD);
    for (uint16_t &v : x) {
        const __half h = __float2half_rn(gauss());
        memcpy(&v, &h, 2);
    }
    uint16_t *dx = to_dev(x), *h_many, *h_wide;
    int32_t *dperm = to_dev(perm), counts[2] = {(int)wide.size(), (int)many.size()}, *dcount;
    int4 *dwide = to_dev(wide), *dmany = to_dev(many);
    uint8_t *px;
    float *y[2];
    CK(cudaMalloc(&dcount, 8));
    CK(cudaMemcpy(dcount, counts, 8, cudaMemcpyHostToDevice));
    CK(cudaMalloc(&px, (size_t)units * ldx * 128));
    CK(cudaMalloc(&h_wide, (size_t)hunits * ldx * 128));
    CK(cudaMalloc(&h_many, (size_t)rows * FF * 2));
    CK(cudaMemset(h_wide, 0xFF, (size_t)hunits * ldx * 128));
    CK(cudaMemset(px, 0xFF, (size_t)units * ldx * 128));
    for (int i = 0; i < 2; i++) {
        CK(cudaMalloc(&y[i], (size_t)T * K * EMBD * 4));
        CK(cudaMemset(y[i], 0xFF, (size_t)T * K * EMBD * 4));
    }
    lin_args a = {};
    a.perm = dperm;
    a.k = K;
    a.bias = bgu;
    a.bias_mat = 2 * FF;
    a.alpha = 1.702f;
    a.limit = 7.f;
    wide_args w = {};
    w.l = a;
    w.l.tile = dwide;
    w.l.n_tiles = dcount;
    w.x = px;
    w.ldx = ldx;
    w.hidden = (uint8_t *)h_wide;
    wide_args wd = w;
    wd.x = (const uint8_t *)h_wide;
    wd.l.bias = bdn;
    wd.l.bias_mat = EMBD;
    wd.l.y = y[0];
    wd.l.ldy = EMBD;
    lin_args m = a;
    m.tile = dmany;
    m.n_tiles = dcount + 1;
    m.x = dx;
    m.ldx = EMBD;
    m.yh = h_many;
    m.ldh = FF;
    lin_args md = m;
    md.x = h_many;
    md.ldx = FF;
    md.bias = bdn;
    md.bias_mat = EMBD;
    md.y = y[1];
    md.ldy = EMBD;
    auto run_pack = [&] { wide_pack(r, {NULL, (int)rows}, dperm, K, dx, EMBD, px, ldx); };
    auto run_wide = [&] { wide_launch<LIN_GATE_UP>(r, &gu, w); };
    auto run_wide_down = [&] { wide_launch<LIN_DOWN>(r, &dn, wd); };
    auto run_many = [&] {
        if (width > STREAM_MAX_COLS || !stream_run<LIN_GATE_UP>(r, &gu, m, width, (int)many.size()))
            lin_launch<LIN_GATE_UP>(r, &gu, m, width, (int)many.size());
    };
    auto run_many_down = [&] {
        if (width > STREAM_MAX_COLS || !stream_run<LIN_DOWN>(r, &dn, md, width, (int)many.size()))
            lin_launch<LIN_DOWN>(r, &dn, md, width, (int)many.size());
    };
    run_pack();
    run_wide();
    run_wide_down();
    CK(r->error);
    CK(cudaDeviceSynchronize());
    run_many();
    run_many_down();
    CK(r->error);
    CK(cudaDeviceSynchronize());
    std::vector<uint16_t> hw((size_t)std::max(hunits * ldx * 64, rows * FF)), hm((size_t)rows * FF);
    std::vector<float> y0((size_t)T * K * EMBD), y1 = y0;
    CK(cudaMemcpy(hw.data(), h_wide, (size_t)hunits * ldx * 128, cudaMemcpyDeviceToHost));
    CK(cudaMemcpy(hm.data(), h_many, hm.size() * 2, cudaMemcpyDeviceToHost));
    CK(cudaMemcpy(y0.data(), y[0], y0.size() * 4, cudaMemcpyDeviceToHost));
    CK(cudaMemcpy(y1.data(), y[1], y1.size() * 4, cudaMemcpyDeviceToHost));
    int64_t bad = 0;
    double big = 0, dif = 0;
    for (int64_t i = 0; i < rows; i++)
        for (int f = 0; perm[(size_t)i] >= 0 && f < FF; f++) {
            const int col = f % 64, piece = (col >> 5) * 4 + (col >> 1 & 3);
            const int at = ((piece ^ (int)(i & 7)) << 3) + (col >> 3 & 3) * 2 + (col & 1);
            const uint16_t u = hw[(size_t)(((int64_t)(f / 64) * ldx + i) * 64 + at)], v = hm[(size_t)(i * FF + f)];
            __half p, q;
            memcpy(&p, &u, 2);
            memcpy(&q, &v, 2);
            bad += u != v;
            big = fmax(big, fabs(__half2float(q)));
            const double d = fabs((double)__half2float(p) - __half2float(q));
            dif = d <= dif ? dif : d;
        }
    printf("T %5d%s: hidden %lld of %lld differ (by %.3g of %.3g), down %lld of %lld differ\n", T,
           even ? "" : " uneven", (long long)bad, (long long)T * K * FF, dif, big,
           (long long)differ(y0.data(), y1.data(), (int64_t)y0.size(), 4), (long long)y0.size());
    timer t;
    const int reps = T > 2048 ? 5 : 11;
    const float pk = t.ms(run_pack, reps), wg = t.ms(run_wide, reps), wdn = t.ms(run_wide_down, reps);
    const float mg = t.ms(run_many, reps), mdn = t.ms(run_many_down, reps);
    CK(r->error);
    const double fl = 2.0 * T * K * EMBD * FF;
    printf("  pack %.1f us; gate_up wide %.1f us %.0f TFLOP/s, many %.1f us %.0f; down wide %.1f us %.0f, many %.1f us "
           "%.0f "
           "(%zu tiles)\n",
           pk * 1e3, wg * 1e3, 2 * fl / wg / 1e9, mg * 1e3, 2 * fl / mg / 1e9, wdn * 1e3, fl / wdn / 1e9, mdn * 1e3,
           fl / mdn / 1e9, wide.size());
    uint16_t *h_pour;
    int32_t *n_list;
    CK(cudaMalloc(&h_pour, (size_t)rows * FF * 2));
    CK(cudaMalloc(&n_list, 4));
    for (int v = 0; v < 5 && T <= 2048; v++) {
        const bool broad = v >= 3;
        const int cols = broad ? broads[v - 3] : pours[v];
        const std::vector<int4> &of_cols = list[cols / 8];
        int4 *dlist = to_dev(of_cols);
        const int32_t n = (int32_t)of_cols.size();
        if (mean > 2 * cols)
            continue;
        CK(cudaMemcpy(n_list, &n, 4, cudaMemcpyHostToDevice));
        CK(cudaMemset(h_pour, 0xFF, (size_t)rows * FF * 2));
        CK(cudaMemset(y[0], 0xFF, (size_t)T * K * EMBD * 4));
        lin_args g = m, d = md;
        broad_args both = {w, wd, cols};
        g.tile = d.tile = both.up.l.tile = both.down.l.tile = dlist;
        g.n_tiles = d.n_tiles = both.up.l.n_tiles = both.down.l.n_tiles = n_list;
        g.yh = h_pour;
        d.x = h_pour;
        d.y = y[0];
        auto clear = [&] { cudaMemset2DAsync(&dlist->w, 16, 0, 4, (size_t)n, r->stream); };
        auto run_gate_up = [&] {
            if (broad) {
                clear();
                broad_run(r, &gu, &dn, both);
            } else
                pour_run<LIN_GATE_UP>(r, &gu, g);
        };
        auto run_down = [&] {
            if (!broad)
                pour_run<LIN_DOWN>(r, &dn, d);
        };
        run_gate_up();
        run_down();
        CK(r->error);
        CK(cudaDeviceSynchronize());
        CK(cudaMemcpy(y0.data(), y[0], y0.size() * 4, cudaMemcpyDeviceToHost));
        const int64_t wrong = differ(y0.data(), y1.data(), (int64_t)y0.size(), 4);
        const float tg = t.ms(run_gate_up, reps), td = broad ? t.ms(clear, reps) : t.ms(run_down, reps);
        CK(r->error);
        printf("  %s, %d rows (%d tiles): %s %.1f us, %s %.1f us; %lld differ\n", broad ? "broad" : "pour", cols, n,
               broad ? "both" : "gate_up", tg * 1e3, broad ? "of which memset" : "down", td * 1e3, (long long)wrong);
        cudaFree(dlist);
    }
    cudaFree(h_pour), cudaFree(n_list);
    cudaFree(dx), cudaFree(h_many), cudaFree(h_wide), cudaFree(dperm), cudaFree(dcount), cudaFree(dwide);
    cudaFree(dmany), cudaFree(px), cudaFree(y[0]), cudaFree(y[1]);
}

/* m: N_COPY matrices alike, taken in turn, so that the weights come from memory. */
#define N_COPY 8
static void dense(cuda_run *r, const char *name, const cuda_matrix &m, const float *bias, int epilogue, int T) {
    cuda_matrix of[N_COPY];
    int turn = 0;
    for (int i = 0; i < N_COPY; i++) {
        of[i] = m;
        of[i].data += (int64_t)i * m.n_tile * m.n_unit * m.chunk_bytes;
    }
    auto next = [&] { return &of[turn = (turn + 1) % N_COPY]; };
    const int64_t ld = (int64_t)m.n_unit * 64, ldx = (T + 7) / 8 * 8;
    std::vector<uint16_t> x((size_t)(T * ld));
    for (uint16_t &v : x) {
        const __half h = __float2half_rn(gauss());
        memcpy(&v, &h, 2);
    }
    uint16_t *dx = to_dev(x);
    uint8_t *px;
    float *y[2];
    CK(cudaMalloc(&px, (size_t)(ld * ldx * 2)));
    for (int i = 0; i < 2; i++) {
        CK(cudaMalloc(&y[i], (size_t)(T * m.n_row * 4)));
        CK(cudaMemset(y[i], epilogue == BE_EPI_ADD ? 0 : 0xFF, (size_t)(T * m.n_row * 4)));
    }
    lin_args a = {};
    a.rows = {NULL, T};
    a.bias = bias;
    a.x = dx;
    a.ldx = ld;
    a.y = y[1];
    a.ldy = m.n_row;
    a.epilogue = epilogue;
    wide_args w = {};
    w.l = a;
    w.l.y = y[0];
    w.x = px;
    w.ldx = ldx;
    w.cols = wide_cols(T, m.n_tile, r->dev->n_sm);
    auto run_pack = [&] { wide_pack(r, {NULL, T}, NULL, 1, dx, ld, px, ldx); };
    auto run_wide = [&] { wide_dense(r, next(), w); };
    const int few = T <= STREAM_MAX_COLS ? (T + 7) / 8 * 8 : T <= 48 ? (T <= 32 ? 16 : 24) : 0, width = lin_width(T);
    auto run_many = [&] {
        if (!few || !stream_run<LIN_DENSE>(r, next(), a, few, (T + few - 1) / few))
            lin_launch<LIN_DENSE>(r, next(), a, width, (T + width - 1) / width);
    };
    run_pack();
    wide_dense(r, &m, w);
    if (!few || !stream_run<LIN_DENSE>(r, &m, a, few, (T + few - 1) / few))
        lin_launch<LIN_DENSE>(r, &m, a, width, (T + width - 1) / width);
    CK(r->error);
    CK(cudaDeviceSynchronize());
    std::vector<float> y0((size_t)(T * m.n_row)), y1 = y0;
    CK(cudaMemcpy(y0.data(), y[0], y0.size() * 4, cudaMemcpyDeviceToHost));
    CK(cudaMemcpy(y1.data(), y[1], y1.size() * 4, cudaMemcpyDeviceToHost));
    timer t;
    const float pk = t.ms(run_pack, 7), wg = t.ms(run_wide, 7), mg = t.ms(run_many, 7);
    CK(r->error);
    const double fl = 2.0 * T * (double)m.n_row * (double)m.n_col;
    printf("%s T %5d: %lld of %lld differ; pack %.1f us, wide %.1f us %.0f TFLOP/s, many %.1f us %.0f\n", name, T,
           (long long)differ(y0.data(), y1.data(), (int64_t)y0.size(), 4), (long long)y0.size(), pk * 1e3, wg * 1e3,
           fl / wg / 1e9, mg * 1e3, fl / mg / 1e9);
    const bool flows = m.form == CUDA_FORM_Q8_0 && (m.n_unit == 45 || m.n_unit == 64) && T <= 512;
    for (int share = 1; share <= 4 && flows; share *= 2) {
        printf("  flow, %d groups share; us:", share);
        for (int cols = 8; cols <= (share == 1 ? 48 : FLOW_COLS); cols += 8) {
            CK(cudaMemset(y[0], epilogue == BE_EPI_ADD ? 0 : 0xFF, (size_t)(T * m.n_row * 4)));
            const flow_way way = {share, cols, (m.n_tile * share + 15) / 16 * ((T + cols - 1) / cols)};
            flow_run(r, &m, way, w);
            CK(r->error);
            CK(cudaDeviceSynchronize());
            CK(cudaMemcpy(y0.data(), y[0], y0.size() * 4, cudaMemcpyDeviceToHost));
            const float us = t.ms([&] { flow_run(r, next(), way, w); }, 7) * 1e3f;
            printf(" %d rows %.1f (%lld differ)", cols, us,
                   (long long)differ(y0.data(), y1.data(), (int64_t)y0.size(), 4));
        }
        printf("\n");
    }
    cudaFree(dx), cudaFree(px), cudaFree(y[0]), cudaFree(y[1]);
}

int main(int argc, char **argv) {
    cuda_dev dev = {};
    cudaDeviceProp prop;
    CK(cudaGetDeviceProperties(&prop, 0));
    dev.n_sm = prop.multiProcessorCount;
    cuda_run r = {};
    r.dev = &dev;
    r.shape.rows = 2048;
    struct job {
        int E, T;
        bool even;
    };
    std::vector<job> jobs;
    std::vector<int> T;
    bool with_dense = false;
    for (int i = 1; i < argc; i++) {
        const char *s = argv[i];
        if (!strcmp(s, "dense")) {
            with_dense = true;
            continue;
        }
        const bool even = *s != 'u';
        s += !even;
        jobs.push_back({*s == '+' ? 128 : 32, atoi(s), even});
    }
    if (jobs.empty()) {
        with_dense = true;
        for (int n : {32, 64, 96, 128, 192, 256, 384, 512, 2048, 8192})
            jobs.push_back({32, n, true});
        for (int n : {64, 256, 2048})
            jobs.push_back({128, n, true});
    }
    const float *bias = floats(128 * 5760, 0.1f);
    for (int E = 32; E <= 128; E += 96) {
        const cuda_matrix gu = make(CUDA_FORM_MXFP4, CUDA_ROWS_GLU, E, FF, EMBD);
        const cuda_matrix dn = make(CUDA_FORM_MXFP4, CUDA_ROWS_PLAIN, E, EMBD, FF);
        for (const job &j : jobs) {
            if (j.E == E)
                experts(&r, gu, dn, bias, bias + 77, j.T, E, 4, j.even);
            if (E == 32 && j.E == E)
                T.push_back(j.T);
        }
        cudaFree(gu.data), cudaFree(dn.data);
    }
    const cuda_form form[] = {CUDA_FORM_Q8_0, CUDA_FORM_F16};
    const char *name[] = {"Q8_0 ", "F16  "};
    for (int f = 0; with_dense && f < 2; f++) {
        char text[32];
        const cuda_matrix q = make(form[f], CUDA_ROWS_PAIR64, N_COPY, 5120, 2880),
                          o = make(form[f], CUDA_ROWS_PLAIN, N_COPY, 2880, 4096);
        for (int n : T) {
            snprintf(text, sizeof text, "%s qkv", name[f]);
            dense(&r, text, q, bias, BE_EPI_NONE, n);
            snprintf(text, sizeof text, "%s out", name[f]);
            dense(&r, text, o, bias, BE_EPI_ADD, n);
        }
        cudaFree(q.data), cudaFree(o.data);
    }
    return 0;
}
