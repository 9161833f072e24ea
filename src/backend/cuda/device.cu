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

orcd_status cuda_use(cuda_dev *d, orcd_error *err) {
    if (!d->dry)
        CUDA_TRY(d, "choosing the device", cudaSetDevice(d->ordinal));
    return ORCD_OK;
}

void cuda_quiet(cuda_dev *d) {
    if (d->dry)
        return;
    cudaSetDevice(d->ordinal);
    cudaStreamSynchronize(d->stream);
}

/* ---- memory ---- */

static bool room_for_block(cuda_dev *d) {
    if (d->n_block < d->cap_block)
        return true;
    const int cap = d->cap_block ? 2 * d->cap_block : 1024;
    void *grown = realloc(d->block, (size_t)cap * sizeof *d->block);
    if (grown) {
        d->block = (cuda_block *)grown;
        d->cap_block = cap;
    }
    return grown != NULL;
}

orcd_status cuda_alloc(cuda_dev *d, void *out, size_t bytes, const char *what, orcd_error *err) {
    void *p = (void *)(d->made_up += 256);
    size_t avail = 0, total = 0;
    *(void **)out = NULL;
    if (!room_for_block(d))
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    bytes = bytes ? (bytes + 255) / 256 * 256 : 256;
    cudaError_t e = d->dry ? cudaSuccess : cudaMalloc(&p, bytes);
    if (e == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        cudaMemGetInfo(&avail, &total);
        return orcd_fail(err, ORCD_ERR_NOMEM, "cuda:%d: %s needs %.1f MiB; %.1f MiB of %.1f MiB are free", d->ordinal,
                         what, (double)bytes / 1048576, (double)avail / 1048576, (double)total / 1048576);
    }
    if (e != cudaSuccess)
        return cuda_fail(d, e, what, err);
    d->block[d->n_block++] = {(uint8_t *)p, bytes};
    d->used += bytes;
    *(void **)out = p;
    return ORCD_OK;
}

void cuda_free(cuda_dev *d, void *p) {
    int i = d->n_block - 1;
    while (i >= 0 && d->block[i].at != p)
        i--;
    if (!p || i < 0)
        return;
    d->used -= d->block[i].bytes;
    d->block[i] = d->block[--d->n_block];
    if (!d->dry)
        cudaFree(p);
}

/* On the device's own stream, and waited for: cudaMemset, and cudaMemcpy from pageable memory, come back before the
 * device has done them, and this stream waits for no other. */
orcd_status cuda_fill(cuda_dev *d, void *p, int value, size_t bytes, const char *what, orcd_error *err) {
    if (d->dry || !bytes)
        return ORCD_OK;
    CUDA_TRY(d, what, cudaMemsetAsync(p, value, bytes, d->stream));
    CUDA_TRY(d, what, cudaStreamSynchronize(d->stream));
    return ORCD_OK;
}

orcd_status cuda_upload(cuda_dev *d, void *to, const void *from, size_t bytes, const char *what, orcd_error *err) {
    CUDA_TRY(d, what, cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, d->stream));
    CUDA_TRY(d, what, cudaStreamSynchronize(d->stream));
    return ORCD_OK;
}

extern "C" int cuda_n_fused(const be_device *base) { return ((const cuda_dev *)base)->n_fused; }

static uint64_t dev_used(be_device *base) { return ((cuda_dev *)base)->used; }

static orcd_status dev_resident(be_device *base, orcd_error *err) {
    cuda_dev *d = (cuda_dev *)base;
    ORCD_TRY(cuda_use(d, err));
    for (int i = 0; i < d->n_block && !d->dry; i++) {
        cudaPointerAttributes at;
        CUDA_TRY(d, "looking where memory lies", cudaPointerGetAttributes(&at, d->block[i].at));
        if (at.type != cudaMemoryTypeDevice || at.device != d->ordinal)
            return orcd_fail(err, ORCD_ERR_DEVICE, "cuda:%d: %zu bytes of the model are not in the device's memory",
                             d->ordinal, d->block[i].bytes);
    }
    return ORCD_OK;
}

static void free_scratch(cuda_dev *d) {
    cuda_scratch *s = &d->scratch;
    cuda_free(d, s->hidden);
    cuda_free(d, s->down);
    cuda_free(d, s->perm);
    cuda_free(d, s->tile);
    cuda_free(d, s->count);
    cuda_free(d, s->partial);
    cuda_free(d, s->arrived);
    cuda_free(d, s->route_part);
    cuda_free(d, s->route_arrived);
    cuda_free(d, s->rope);
    cuda_free(d, s->best);
    *s = cuda_scratch{};
}

static void free_host(void *p) { /* a dry device never asks the driver for anything */
    if (p)
        cudaFreeHost(p);
}

static void dev_close(be_device *base) {
    cuda_dev *d = (cuda_dev *)base;
    if (!d)
        return;
    cuda_quiet(d);
    cuda_graphs_drop(d, NULL);
    free_scratch(d);
    cuda_decode_free(d);
    cuda_host_free(d);
    cuda_loaded(d);
    for (int i = 0; i < CUDA_N_STAGING; i++) {
        free_host(d->staging[i].host);
        if (d->staging[i].done)
            cudaEventDestroy(d->staging[i].done);
    }
    for (int i = 0; i < CUDA_N_FREQ; i++)
        cuda_free(d, d->freq[i].dev);
    cuda_free(d, d->flag);
    free_host(d->arr.likely);
    cuda_free(d, d->arr.batch);
    for (auto &ids : d->ids) {
        if (ids.ready)
            cudaEventDestroy(ids.ready);
    }
    if (d->copy)
        cudaStreamDestroy(d->copy);
    if (d->stream)
        cudaStreamDestroy(d->stream);
    free(d->step.cmd);
    free(d->block);
    if (!d->dry)
        cudaGetLastError();
    delete d;
}

extern "C" const be_ops be_ops_cuda;

static orcd_status open_dry(const be_params *p, be_device **out, orcd_error *err) {
    cuda_dev *d = new (std::nothrow) cuda_dev{};
    if (!d)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    d->base.ops = &be_ops_cuda;
    d->base.params = *p;
    d->ordinal = p->device;
    d->dry = true;
    snprintf(d->name, sizeof d->name, "cuda, to plan with");
    *out = &d->base;
    return cuda_alloc(d, &d->flag, 256, "a flag", err);
}

static orcd_status dev_open(const be_params *p, be_device **out, orcd_error *err) {
    orcd_status st = ORCD_ERR_DEVICE;
    int n = 0;
    cudaDeviceProp prop;
    *out = NULL;
    if (p->dry)
        return open_dry(p, out, err);
    int driver = 0;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess || n == 0) {
        cudaGetLastError();
        cudaDriverGetVersion(&driver);
        return orcd_fail(err, ORCD_ERR_UNSUPPORTED, "no CUDA device: %s; use --device cpu",
                         driver == 0        ? "this machine has no NVIDIA driver"
                         : e == cudaSuccess ? "the driver lists none"
                                            : cudaGetErrorString(e));
    }
    if (p->device < 0 || p->device >= n)
        return orcd_fail(err, ORCD_ERR_ARG, "cuda:%d does not exist; the driver lists %d device%s, from cuda:0",
                         p->device, n, n == 1 ? "" : "s");
    cuda_dev *d = new (std::nothrow) cuda_dev{};
    if (!d)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    d->base.ops = &be_ops_cuda;
    d->base.params = *p;
    d->ordinal = p->device;
    d->params = *p;
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
        (e = cudaEventCreateWithFlags(&d->ids[1].ready, cudaEventDisableTiming)) != cudaSuccess) {
        st = cuda_fail(d, e, "making streams", err);
        goto done;
    }
    ORCD_TRY_GOTO(st, done, cuda_alloc(d, &d->flag, 256, "a flag", err));
    st = ORCD_ERR_DEVICE;
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

/* Room that is not offered, for what no plan knows: code that is loaded when it is first used, frames of threads,
 * recorded graphs. */
#define CUDA_RESERVE ((size_t)384 << 20)

static void dev_memory(be_device *base, uint64_t *total, uint64_t *available) {
    size_t avail = 0, all = 0;
    *total = *available = 0;
    if (((cuda_dev *)base)->dry)
        return;
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
    cuda_allow,
    cuda_sampled,
    dev_used,
    dev_resident,
};
