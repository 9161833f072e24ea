/* lab/attention/attention.cu: attention of rows of one position each, `many` against `one`, and of prompts, `long`
 * against `tile`: bit for bit, and the time of each in a recorded graph, behind a small kernel as in a step. From the
 * repository's root:
 *
 *     nvcc -std=c++17 -O3 -Isrc -gencode=arch=compute_90a,code=sm_90a lab/attention/attention.cu -o /tmp/attention
 *     /tmp/attention [prompts | rows]
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

enum { N_HEAD = 64, N_KV = 8, DIM = 64, WIDTH = (N_HEAD + 2 * N_KV) * DIM };

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
/* A head of a page: keys and values from `from` on are NaN. */
static __global__ void poison(uint8_t *head, int64_t head_bytes, bool int8, int from) {
    uint16_t *p = (uint16_t *)(head + blockIdx.x * head_bytes);
    for (int i = threadIdx.x; i < (int)head_bytes / 2; i += blockDim.x) {
        const bool key = i < 4096; /* f16; 8 bits: the scales are enough */
        const int at = int8 ? i % 64 : key ? i / 64 : i % 64;
        if (at >= from && (!int8 || i >= 4096))
            p[i] = 0x7e00;
    }
}
static __global__ void before_kernel(float *x) { /* as rope_write: launches late */
    pdl_wait();
    pdl_launch();
    if (threadIdx.x == 0)
        x[blockIdx.x] += 0;
}

struct run_of { /* rows of a sequence */
    int pos, n;
};
struct lab {
    cuda_dev dev;
    cuda_kv kv;
    int n_row, n_tile; /* n_tile > 0: prompts */
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

/* who: 0 one or tile, 1 many or long, -1 neither */
static void run(lab &b, cuda_run *r, int layer, bool window, int who) {
    cuda_launch(r, before_kernel, dim3(132), dim3(256), 0, b.qkv);
    if (who < 0)
        return;
    const attn_args a = args_of(b, layer, window, who);
    const int ones = b.n_tile ? 0 : b.n_row;
    if (who == 1 && !(b.n_tile ? attn_run_long(r, a, b.n_tile) : attn_run_many(r, a, ones)))
        printf("it does not fit\n");
    if (who == 0 && b.kv.base.spec.type == BE_KV_Q8)
        launch_dim<kv_int8>(r, a, ones, b.n_tile);
    else if (who == 0)
        launch_dim<__half>(r, a, ones, b.n_tile);
}

static double time_of(lab &b, int window, int who) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t e[2];
    CHECK(cudaStreamBeginCapture(b.dev.stream, cudaStreamCaptureModeThreadLocal));
    cuda_run r = {&b.dev, &b.kv, b.dev.stream, {b.n_row, 0, b.reach, 0, 0}, true, -1, 0, NULL, cudaSuccess};
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

static void one_case(const char *name, be_kv_type type, std::vector<run_of> runs, int n_layer, bool timed) {
    lab b = {};
    const int n_seq = (int)runs.size();
    int most = 0;
    b.n_layer = n_layer;
    for (const run_of &q : runs) {
        most = std::max(most, q.pos + q.n - 1);
        b.n_row += q.n;
    }
    const int n = b.n_row;
    for (b.reach = 1; b.reach * 512 <= most;)
        b.reach *= 2;
    CHECK(cudaStreamCreate(&b.dev.stream));
    CHECK(cudaDeviceGetAttribute(&b.dev.n_sm, cudaDevAttrMultiProcessorCount, 0));
    b.dev.major = 9;
    be_kv_spec &s = b.kv.base.spec;
    s.type = type, s.head_dim = DIM, s.n_kv_head = N_KV, s.n_slot = n_seq;
    b.kv.dim = DIM, b.kv.head_bytes = type == BE_KV_Q8 ? kv_head_bytes<kv_int8>(DIM) : kv_head_bytes<__half>(DIM);
    b.kv.base.page_bytes[0] = (uint64_t)n_layer * N_KV * b.kv.head_bytes;
    b.kv.n_entry = most / BE_PAGE + 1;
    int n_page = 0;
    double bytes[2] = {0, 0}, flops[2] = {0, 0};
    std::vector<int32_t> table((size_t)n_seq * b.kv.n_entry, -1), slot, one, pos;
    std::vector<cuda_tile> tile;
    for (int i = 0; i < n_seq; i++) {
        const int at = n_seq - 1 - i, last = runs[i].pos + runs[i].n - 1, first = (int)pos.size();
        for (int k = 0; k < runs[i].n; k++) {
            const double keys[2] = {runs[i].pos + k + 1., std::min(runs[i].pos + k + 1., 128.)};
            one.push_back((int)pos.size()), pos.push_back(runs[i].pos + k), slot.push_back(at);
            for (int w = 0; w < 2; w++) {
                bytes[w] += keys[w] * N_KV * b.kv.head_bytes / 64;
                flops[w] += keys[w] * N_HEAD * DIM * 4;
            }
        }
        for (int k = 0; n > n_seq && k < runs[i].n; k += CUDA_TILE_ROWS)
            tile.push_back({first + k, std::min(runs[i].n - k, CUDA_TILE_ROWS), runs[i].pos + k, at});
        for (int p = 0; p <= last / BE_PAGE; p++)
            table[(size_t)at * b.kv.n_entry + p] = n_page++;
    }
    std::sort(tile.begin(), tile.end(), [](const cuda_tile &x, const cuda_tile &y) { return x.pos > y.pos; });
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
    for (int i = 0; i < n_seq; i++) {
        const int last = runs[n_seq - 1 - i].pos + runs[n_seq - 1 - i].n - 1;
        poison<<<n_layer * N_KV, 256>>>(b.kv.pages[0] + table[(size_t)i * b.kv.n_entry + last / BE_PAGE] *
                                                            (int64_t)b.kv.base.page_bytes[0],
                                        b.kv.head_bytes, type == BE_KV_Q8, last % BE_PAGE + 1);
    }
    b.kv.table[0] = upload(table);
    std::vector<cuda_batch> head(1);
    head[0].n_tok = head[0].n_one = n, head[0].n_tile = b.n_tile = (int)tile.size();
    tile.push_back({0, 0, 0, 0});
    b.dev.arr.tile = upload(tile);
    b.dev.arr.batch = upload(head);
    b.dev.arr.pos = upload(pos), b.dev.arr.slot = upload(slot), b.dev.arr.one = upload(one);
    CHECK(cudaMalloc(&b.qkv, (size_t)n * WIDTH * 4));
    fill_f32<<<1024, 256>>>(b.qkv, (int64_t)n * WIDTH, 9);
    for (uint16_t *&y : b.y) {
        CHECK(cudaMalloc(&y, (size_t)n * N_HEAD * DIM * 2));
        CHECK(cudaMemset(y, 0xff, (size_t)n * N_HEAD * DIM * 2));
    }
    const size_t slots = std::max((size_t)CUDA_MAX_PARTIAL * 2, (size_t)n_seq * N_KV * b.reach);
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
            if (b.n_tile)
                printf(": tile %6.1f long %6.1f us %3.0f TFLOP/s", was - base, is - base,
                       flops[window] / (is - base) / 1e6);
            else
                printf(": one %6.1f many %6.1f us %5.2f TB/s (before %.1f)", was - base, is - base,
                       bytes[window] / (is - base) / 1e6, base);
        }
    }
    printf("\n");
    void *mine[] = {b.kv.pages[0],  b.kv.table[0], b.dev.arr.batch,       b.dev.arr.pos,
                    b.dev.arr.slot, b.dev.arr.one, b.dev.arr.tile,        b.qkv,
                    b.y[0],         b.y[1],        b.dev.scratch.partial, b.dev.scratch.arrived};
    for (void *p : mine)
        cudaFree(p);
    cudaStreamDestroy(b.dev.stream);
}

static std::vector<run_of> spread(int n, int from, int to) {
    std::vector<run_of> v(n);
    for (run_of &q : v)
        q = {from + (int)(draw() % (uint32_t)(to - from + 1)), 1};
    return v;
}

static void prompts(be_kv_type type) {
    one_case("prompts, edges", type, {{0, 17}, {61, 24}, {1000, 33}, {127, 2}, {4000, 9}, {511, 2}}, 1, false);
    one_case("prompt of 1500", type, {{0, 1500}}, 1, false);
    one_case("300 rows at 700", type, {{700, 300}}, 1, false);
    one_case("prompt of 512", type, {{0, 512}}, 4, true);
    one_case("prompt of 2048", type, {{0, 2048}}, 4, true);
    one_case("2048 rows at 6144", type, {{6144, 2048}}, 4, true);
    one_case("prompts, mixed", type, {{0, 600}, {3000, 100}, {100, 37}, {9000, 300}, {0, 1000}}, 4, true);
}

static void single_rows(be_kv_type type) {
    one_case("3 rows, edges", type, {{0, 1}, {63, 1}, {64, 1}}, 1, false);
    one_case("20 rows of 1..1200", type, spread(20, 0, 1200), 1, false);
    one_case("5 rows of 20000..40000", type, spread(5, 20000, 40000), 1, false);
    one_case("130 rows of 1..3000", type, spread(130, 0, 3000), 1, false);
    one_case("256 rows of 8200..9200", type, spread(256, 8200, 9200), 1, false); /* not split */
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

int main(int argc, char **argv) {
    const char *only = argc > 1 ? argv[1] : "";
    for (int t = 0; t < 2; t++) {
        const be_kv_type type = t ? BE_KV_Q8 : BE_KV_F16;
        if (strcmp(only, "prompts") != 0)
            single_rows(type);
        if (strcmp(only, "rows") != 0)
            prompts(type);
    }
    return 0;
}
