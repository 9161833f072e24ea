/* backend/cuda/device.cu: opening a device, its memory, its errors, and the backend's table. */
#include "backend/cuda/cuda.h"

#include <new>
#include <stdio.h>
#include <string.h>

orcd_status cuda_fail(cuda_dev *d, cudaError_t e, const char *what, orcd_error *err) {
    if (e == cudaErrorMemoryAllocation) {
        size_t avail = 0, total = 0;
        cudaMemGetInfo(&avail, &total);
        cudaGetLastError();
        return orcd_fail(err, ORCD_ERR_NOMEM, "cuda:%d: out of memory while %s; %.1f MiB of %.1f MiB are free",
                         d->ordinal, what, (double)avail / 1048576, (double)total / 1048576);
    }
    if (cudaGetLastError() != cudaSuccess && cudaGetLastError() != cudaSuccess)
        d->sticky = e; /* it does not go away: the context is lost */
    return orcd_fail(err, ORCD_ERR_DEVICE, "cuda:%d: %s while %s", d->ordinal, cudaGetErrorString(e), what);
}

orcd_status cuda_alloc(cuda_dev *d, void *out, size_t bytes, const char *what, orcd_error *err) {
    void *p = NULL;
    size_t avail = 0, total = 0;
    *(void **)out = NULL;
    bytes = bytes ? (bytes + 255) / 256 * 256 : 256;
    cudaError_t e = cudaMalloc(&p, bytes);
    if (e == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        cudaMemGetInfo(&avail, &total);
        return orcd_fail(err, ORCD_ERR_NOMEM, "cuda:%d: %s needs %.1f MiB; %.1f MiB of %.1f MiB are free", d->ordinal,
                         what, (double)bytes / 1048576, (double)avail / 1048576, (double)total / 1048576);
    }
    if (e != cudaSuccess)
        return cuda_fail(d, e, what, err);
    *(void **)out = p;
    return ORCD_OK;
}

static void free_scratch(cuda_scratch *s) {
    cudaFree(s->hidden);
    cudaFree(s->down);
    cudaFree(s->perm);
    cudaFree(s->tile);
    cudaFree(s->count);
    cudaFree(s->partial);
    cudaFree(s->arrived);
    cudaFree(s->rope);
    cudaFree(s->best);
    *s = cuda_scratch{};
}

static void dev_close(be_device *base) {
    cuda_dev *d = (cuda_dev *)base;
    if (!d)
        return;
    cudaSetDevice(d->ordinal);
    cudaDeviceSynchronize();
    cuda_graphs_drop(d, NULL);
    free_scratch(&d->scratch);
    cuda_decode_free(d);
    for (int i = 0; i < 2; i++) {
        cudaFreeHost(d->load_host[i]);
        cudaFree(d->load_dev[i]);
        if (d->load_done[i])
            cudaEventDestroy(d->load_done[i]);
    }
    for (int i = 0; i < CUDA_N_STAGING; i++) {
        cudaFreeHost(d->staging[i].host);
        if (d->staging[i].done)
            cudaEventDestroy(d->staging[i].done);
    }
    for (int i = 0; i < CUDA_N_FREQ; i++)
        cudaFree(d->freq[i].dev);
    cudaFree(d->flag);
    cudaFree(d->upload);
    cudaFree(d->arr.batch);
    for (auto &ids : d->ids) {
        cudaFreeHost(ids.host);
        if (ids.ready)
            cudaEventDestroy(ids.ready);
    }
    if (d->copy)
        cudaStreamDestroy(d->copy);
    if (d->stream)
        cudaStreamDestroy(d->stream);
    if (d->workers)
        pool_close(d->workers);
    free(d->step.cmd);
    free(d->step.sample);
    cudaGetLastError();
    delete d;
}

extern "C" const be_ops be_ops_cuda;

static orcd_status dev_open(const be_params *p, be_device **out, orcd_error *err) {
    orcd_status st = ORCD_ERR_DEVICE;
    int n = 0;
    cudaDeviceProp prop;
    *out = NULL;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess || n == 0) {
        cudaGetLastError();
        return orcd_fail(err, ORCD_ERR_DEVICE, "no CUDA device: %s; use --device cpu",
                         e == cudaSuccess ? "the driver lists none" : cudaGetErrorString(e));
    }
    if (p->device < 0 || p->device >= n)
        return orcd_fail(err, ORCD_ERR_ARG, "cuda:%d does not exist; the driver lists %d device%s, from cuda:0",
                         p->device, n, n == 1 ? "" : "s");
    cuda_dev *d = new (std::nothrow) cuda_dev{};
    if (!d)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    d->base.ops = &be_ops_cuda;
    d->ordinal = p->device;
    if ((e = cudaSetDevice(p->device)) != cudaSuccess ||
        (e = cudaGetDeviceProperties(&prop, p->device)) != cudaSuccess) {
        st = cuda_fail(d, e, "opening the device", err);
        goto done;
    }
    if (prop.major < 8) {
        st = orcd_fail(err, ORCD_ERR_UNSUPPORTED, "cuda:%d (%s) has compute capability %d.%d; 8.0 or newer is needed",
                       p->device, prop.name, prop.major, prop.minor);
        goto done;
    }
    d->n_sm = prop.multiProcessorCount;
    d->major = prop.major;
    d->minor = prop.minor;
    snprintf(d->name, sizeof d->name, "cuda:%d: %.64s, %d multiprocessors, sm_%d%d", p->device, prop.name, d->n_sm,
             prop.major, prop.minor);
    if ((e = cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking)) != cudaSuccess ||
        (e = cudaStreamCreateWithFlags(&d->copy, cudaStreamNonBlocking)) != cudaSuccess ||
        (e = cudaEventCreateWithFlags(&d->ids[0].ready, cudaEventDisableTiming)) != cudaSuccess ||
        (e = cudaEventCreateWithFlags(&d->ids[1].ready, cudaEventDisableTiming)) != cudaSuccess ||
        (e = cudaMalloc(&d->flag, 256)) != cudaSuccess) {
        st = cuda_fail(d, e, "making streams", err);
        goto done;
    }
    for (int i = 0; i < CUDA_N_STAGING; i++)
        if ((e = cudaEventCreateWithFlags(&d->staging[i].done, cudaEventDisableTiming)) != cudaSuccess) {
            st = cuda_fail(d, e, "making events", err);
            goto done;
        }
    *out = &d->base;
    d = NULL;
    st = ORCD_OK;
done:
    dev_close((be_device *)d);
    return st;
}

static void dev_describe(be_device *base, char *text, size_t cap) {
    snprintf(text, cap, "%s", ((cuda_dev *)base)->name);
}

/* Room that is not offered: scratch of the operations, recorded graphs, the driver's own. */
#define CUDA_RESERVE ((size_t)768 << 20)

static void dev_memory(be_device *base, uint64_t *total, uint64_t *available) {
    size_t avail = 0, all = 0;
    cudaSetDevice(((cuda_dev *)base)->ordinal);
    if (cudaMemGetInfo(&avail, &all) != cudaSuccess)
        cudaGetLastError();
    *total = all;
    *available = avail > CUDA_RESERVE ? avail - CUDA_RESERVE : 0;
}

extern "C" const be_ops be_ops_cuda = {
    "cuda",
    dev_open,
    dev_close,
    dev_describe,
    dev_memory,
    cuda_load_bytes,
    cuda_load,
    cuda_unload,
    cuda_act_new,
    cuda_act_free,
    cuda_act_read,
    cuda_act_write,
    cuda_act_host,
    cuda_kv_page_bytes,
    cuda_kv_open,
    cuda_kv_close,
    cuda_kv_map,
    cuda_kv_copy_page,
    cuda_kv_read_page,
    cuda_kv_write_page,
    cuda_step_begin,
    cuda_step_end,
    cuda_embed,
    cuda_norm,
    cuda_linear,
    cuda_rope,
    cuda_kv_write,
    cuda_attention,
    cuda_route,
    cuda_experts,
    cuda_gather_out,
    cuda_tap,
    NULL, /* norm_linear */
    NULL, /* attn_in */
    cuda_moe,
    cuda_sample,
    cuda_sampled,
};
