/* lab/attention/attention.cu: attention of rows of one position each: `many` against `one`, bit for bit, and the time
 * of each in a recorded graph, behind a small kernel as in a step. From the repository's root:
 *
 *     nvcc -std=c++17 -O3 -Isrc -gencode=arch=compute_90a,code=sm_90a lab/attention/attention.cu -o /tmp/attention
 */
#include "backend/cuda/attention.cu"
#include "backend/cuda/attention_long.cu"
#include "backend/cuda/attention_many.cu"

#include <algorithm>
#include <stdio.h>
#include <string.h>
#include <vector>

#define CHECK(x)                                                                                                       \
    do {                                                                                                               \
        cudaError_t e_ = (x);                                                                                          \
        if (e_ != cudaSuccess) {                                                                                       \
            printf("%s: %s\n", #x, cudaGetErrorString(e_));                                                            \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

enum { N_HEAD = 64, N_KV = 8, DIM = 64, MAX_ROWS = 256, WIDTH = (N_HEAD + 2 * N_KV) * DIM };

static uint32_t state = 1;
static uint32_t draw() {
    state ^= state << 13, state ^= state >> 17, state ^= state << 5;
    return state;
}

static __global__ void fill_f16(uint16_t *p, int64_t n, uint32_t seed) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
        uint32_t h = (uint32_t)i * 2654435761u ^ seed;
        h = (h ^ h >> 15) * 2246822519u, h ^= h >> 13;
        p[i] = f16_bits(((int)(h & 2047) - 1024) / 512.f);
    }
}
static __global__ void fill_f32(float *p, int64_t n, uint32_t seed) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
        uint32_t h = (uint32_t)i * 2654435761u ^ seed;
        h = (h ^ h >> 15) * 2246822519u, h ^= h >> 13;
        p[i] = ((int)(h & 2047) - 1024) / 512.f;
    }
}
/* Integers are what random halves look like; scales become plain. */
static __global__ void fill_scales(uint8_t *p, int64_t n_head, int head_bytes) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n_head * 128;
         i += (int64_t)gridDim.x * blockDim.x)
        ((uint16_t *)(p + i / 128 * head_bytes + 8192))[i % 128] = f16_bits(0.01f + (float)(i * 7 % 13) * 0.001f);
}
static __global__ void before_kernel(float *x) { /* as rope_write: launches late */
    pdl_wait();
    pdl_launch();
    if (threadIdx.x == 0)
        x[blockIdx.x] += 0;
}

struct lab {
    cuda_dev dev;
    cuda_kv kv;
    std::vector<int> pos;
    int n_layer, reach;
    float *qkv;
    uint16_t *y[2];
    int64_t slots; /* of partial results */
};

static attn_args args_of(lab &b, int layer, bool window, int who) {
    attn_args a = {};
    a.a = b.dev.arr;
    a.qkv = b.qkv, a.width = WIDTH, a.n_head = N_HEAD, a.n_kv = N_KV, a.head_dim = DIM, a.group = N_HEAD / N_KV;
    a.window = window ? 128 : 0;
    a.scale_log2 = 0.125f * 1.44269504088896f;
    a.layer = b.kv.pages[0] + (int64_t)layer * N_KV * b.kv.head_bytes;
    a.page_bytes = (int64_t)b.kv.base.page_bytes[0], a.head_bytes = b.kv.head_bytes;
    a.table = b.kv.table[0], a.n_entry = b.kv.n_entry;
    a.y = b.y[who], a.ldy = N_HEAD * DIM;
    a.partial = b.dev.scratch.partial, a.arrived = b.dev.scratch.arrived;
    a.reach = window ? std::min(2, b.reach) : b.reach;
    return a;
}

/* who: 0 one, 1 many, -1 neither */
static void run(lab &b, cuda_run *r, int layer, bool window, int who) {
    cuda_launch(r, before_kernel, dim3(132), dim3(256), 0, b.qkv);
    if (who < 0)
        return;
    const attn_args a = args_of(b, layer, window, who);
    if (who == 1 && !attn_run_many(r, a, (int)b.pos.size()))
        printf("many does not fit\n");
    if (who == 0 && b.kv.base.spec.type == BE_KV_Q8)
        launch_dim<kv_int8>(r, a, (int)b.pos.size(), 0);
    else if (who == 0)
        launch_dim<__half>(r, a, (int)b.pos.size(), 0);
}

static double time_of(lab &b, int window, int who) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t e[2];
    CHECK(cudaStreamBeginCapture(b.dev.stream, cudaStreamCaptureModeThreadLocal));
    cuda_run r = {&b.dev, &b.kv, b.dev.stream, {(int)b.pos.size(), 0, b.reach, 0, 0}, true, -1, 0, NULL, cudaSuccess};
    for (int i = 0; i < 2 * b.n_layer; i++)
        run(b, &r, i % b.n_layer, window, who);
    CHECK(r.error);
    CHECK(cudaStreamEndCapture(b.dev.stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    CHECK(cudaEventCreate(&e[0]));
    CHECK(cudaEventCreate(&e[1]));
    std::vector<float> ms(7);
    for (float &t : ms) {
        CHECK(cudaEventRecord(e[0], b.dev.stream));
        CHECK(cudaGraphLaunch(exec, b.dev.stream));
        CHECK(cudaEventRecord(e[1], b.dev.stream));
        CHECK(cudaEventSynchronize(e[1]));
        CHECK(cudaEventElapsedTime(&t, e[0], e[1]));
    }
    std::sort(ms.begin(), ms.end());
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    return ms[3] * 1e3 / (2 * b.n_layer);
}

template <class T> static T *upload(const std::vector<T> &v) {
    T *p;
    CHECK(cudaMalloc(&p, v.size() * sizeof(T)));
    CHECK(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}

static void one_case(const char *name, be_kv_type type, std::vector<int> pos, int n_layer, bool timed) {
    lab b = {};
    const int n = (int)pos.size();
    int most = 0;
    b.pos = pos, b.n_layer = n_layer;
    for (int p : pos)
        most = std::max(most, p);
    for (b.reach = 1; b.reach * 512 <= most;)
        b.reach *= 2;
    CHECK(cudaStreamCreate(&b.dev.stream));
    CHECK(cudaDeviceGetAttribute(&b.dev.n_sm, cudaDevAttrMultiProcessorCount, 0));
    b.dev.major = 9;
    be_kv_spec &s = b.kv.base.spec;
    s.type = type, s.head_dim = DIM, s.n_kv_head = N_KV, s.n_slot = n;
    b.kv.dim = DIM, b.kv.head_bytes = type == BE_KV_Q8 ? kv_head_bytes<kv_int8>(DIM) : kv_head_bytes<__half>(DIM);
    b.kv.base.page_bytes[0] = (uint64_t)n_layer * N_KV * b.kv.head_bytes;
    b.kv.n_entry = most / BE_PAGE + 1;
    int n_page = 0;
    double bytes[2] = {0, 0};
    std::vector<int32_t> table((size_t)n * b.kv.n_entry, -1), slot(n), one(n);
    for (int i = 0; i < n; i++) {
        slot[i] = n - 1 - i, one[i] = i;
        for (int p = 0; p <= pos[i] / BE_PAGE; p++)
            table[(size_t)slot[i] * b.kv.n_entry + p] = n_page++;
        bytes[0] += (pos[i] + 1.) * N_KV * b.kv.head_bytes / 64;
        bytes[1] += std::min(pos[i] + 1., 128.) * N_KV * b.kv.head_bytes / 64;
    }
    std::vector<int32_t> place(n_page); /* pages lie anywhere */
    for (int i = 0; i < n_page; i++) {
        const int k = (int)(draw() % (uint32_t)(i + 1));
        place[i] = place[k], place[k] = i;
    }
    for (int32_t &p : table)
        p = p < 0 ? p : place[p];
    const int64_t all = (int64_t)n_page * (int64_t)b.kv.base.page_bytes[0];
    CHECK(cudaMalloc(&b.kv.pages[0], all));
    fill_f16<<<1024, 256>>>((uint16_t *)b.kv.pages[0], all / 2, 5);
    if (type == BE_KV_Q8)
        fill_scales<<<1024, 256>>>(b.kv.pages[0], (int64_t)n_page * n_layer * N_KV, b.kv.head_bytes);
    b.kv.table[0] = upload(table);
    std::vector<cuda_batch> head(1);
    head[0].n_tok = head[0].n_one = n;
    b.dev.arr.batch = upload(head);
    b.dev.arr.pos = upload(pos), b.dev.arr.slot = upload(slot), b.dev.arr.one = upload(one);
    CHECK(cudaMalloc(&b.qkv, (size_t)n * WIDTH * 4));
    fill_f32<<<1024, 256>>>(b.qkv, (int64_t)n * WIDTH, 9);
    for (uint16_t *&y : b.y) {
        CHECK(cudaMalloc(&y, (size_t)n * N_HEAD * DIM * 2));
        CHECK(cudaMemset(y, 0xff, (size_t)n * N_HEAD * DIM * 2));
    }
    const size_t slots = std::max((size_t)CUDA_MAX_PARTIAL * 2, (size_t)n * N_KV * b.reach);
    CHECK(cudaMalloc(&b.dev.scratch.partial, slots * 16 * 66 * 4));
    CHECK(cudaMalloc(&b.dev.scratch.arrived, CUDA_MAX_PARTIAL * 4));
    CHECK(cudaMemset(b.dev.scratch.arrived, 0, CUDA_MAX_PARTIAL * 4));
    CHECK(cudaDeviceSynchronize());
    printf("%-28s %s", name, type == BE_KV_Q8 ? "q8 " : "f16");
    std::vector<uint16_t> y[2];
    for (int window = 0; window < 2; window++) {
        cuda_run r = {&b.dev, &b.kv, b.dev.stream, {n, 0, b.reach, 0, 0}, true, -1, 0, NULL, cudaSuccess};
        for (int who = 0; who < 2; who++) {
            run(b, &r, 0, window, who);
            CHECK(r.error);
            CHECK(cudaStreamSynchronize(b.dev.stream));
            y[who].resize((size_t)n * N_HEAD * DIM);
            CHECK(cudaMemcpy(y[who].data(), b.y[who], y[who].size() * 2, cudaMemcpyDeviceToHost));
        }
        size_t wrong = 0;
        for (size_t i = 0; i < y[0].size(); i++)
            wrong += y[0][i] != y[1][i] || (y[0][i] & 0x7c00) == 0x7c00;
        printf("  %s %s", window ? "window" : "full", wrong ? "WRONG" : "same");
        if (wrong)
            printf(" %zu", wrong);
        if (timed) {
            const double base = time_of(b, window, -1), was = time_of(b, window, 0), is = time_of(b, window, 1);
            printf(": one %6.1f many %6.1f us %5.2f TB/s (before %.1f)", was - base, is - base,
                   bytes[window] / (is - base) / 1e6, base);
        }
    }
    printf("\n");
    void *mine[] = {b.kv.pages[0],        b.kv.table[0], b.dev.arr.batch, b.dev.arr.pos, b.dev.arr.slot,
                    b.dev.arr.one,        b.qkv,         b.y[0],          b.y[1],        b.dev.scratch.partial,
                    b.dev.scratch.arrived};
    for (void *p : mine)
        cudaFree(p);
    cudaStreamDestroy(b.dev.stream);
}

static std::vector<int> spread(int n, int from, int to) {
    std::vector<int> v(n);
    for (int &p : v)
        p = from + (int)(draw() % (uint32_t)(to - from + 1));
    return v;
}

int main(int argc, char **) {
    for (int t = 0; t < 2; t++) {
        const be_kv_type type = t ? BE_KV_Q8 : BE_KV_F16;
        if (argc > 1)
            goto timed;
        one_case("3 rows, edges", type, {0, 63, 64}, 1, false);
        one_case("20 rows of 1..1200", type, spread(20, 0, 1200), 1, false);
        one_case("5 rows of 20000..40000", type, spread(5, 20000, 40000), 1, false);
        one_case("130 rows of 1..3000", type, spread(130, 0, 3000), 1, false);
        one_case("256 rows of 8200..9200", type, spread(256, 8200, 9200), 1, false); /* not split */
    timed:
        one_case("8 rows of 550", type, spread(8, 520, 580), 12, true);
        one_case("16 rows of 550", type, spread(16, 520, 580), 12, true);
        one_case("32 rows of 550", type, spread(32, 520, 580), 12, true);
        one_case("64 rows of 550", type, spread(64, 520, 580), 12, true);
        one_case("128 rows of 550", type, spread(128, 520, 580), 12, true);
        one_case("256 rows of 550", type, spread(256, 520, 580), 8, true);
        one_case("256 rows of 1000..2000", type, spread(256, 1000, 2000), 4, true);
        one_case("64 rows of 4096", type, spread(64, 4096, 4160), 4, true);
        one_case("64 rows of 8100", type, spread(64, 8050, 8150), 3, true);
        one_case("64 rows of 100..8000", type, spread(64, 100, 8000), 3, true);
    }
    return 0;
}
