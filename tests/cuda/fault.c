/* A library to preload into orcd: on SIGUSR1 a kernel traps in the process's own CUDA context, as a broken kernel
 * would; on SIGUSR2 all memory of the device is taken, on the next one it is given back. The product knows nothing of
 * it. Needs no headers of CUDA: the few functions of the driver are declared here. */
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

static const char ptx[] = ".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry fault() { trap; }\n";

static struct {
    int (*init)(unsigned flags);
    int (*retain)(void **context, int device);
    int (*use)(void *context);
    int (*load)(void **module, const void *image);
    int (*get)(void **function, void *module, const char *name);
    int (*launch)(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                  unsigned shared, void *stream, void **param, void **extra);
    int (*take)(uint64_t *at, size_t bytes);
    int (*give)(uint64_t at);
} cu;

static int find(void *lib, void *to, const char *name) {
    *(void **)to = dlsym(lib, name);
    if (!*(void **)to)
        fprintf(stderr, "fault: the driver has no %s\n", name);
    return *(void **)to != NULL;
}

static int open_driver(void) {
    void *lib = dlopen("libcuda.so.1", RTLD_NOW), *context;
    return lib && find(lib, &cu.init, "cuInit") && find(lib, &cu.retain, "cuDevicePrimaryCtxRetain") &&
           find(lib, &cu.use, "cuCtxSetCurrent") && find(lib, &cu.load, "cuModuleLoadData") &&
           find(lib, &cu.get, "cuModuleGetFunction") && find(lib, &cu.launch, "cuLaunchKernel") &&
           find(lib, &cu.take, "cuMemAlloc_v2") && find(lib, &cu.give, "cuMemFree_v2") && cu.init(0) == 0 &&
           cu.retain(&context, 0) == 0 && cu.use(context) == 0;
}

static void trap(void) {
    void *module, *function;
    int e = cu.load(&module, ptx);
    e = e ? e : cu.get(&function, module, "fault");
    e = e ? e : cu.launch(function, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL);
    fprintf(stderr, "fault: trapped, launch gave %d\n", e);
}

/* In pieces that become smaller, until nothing of 64 KiB is left. */
static void take_all(void) {
    static uint64_t held[4096];
    static int n;
    size_t sum = 0;
    if (n) {
        while (n > 0)
            cu.give(held[--n]);
        fprintf(stderr, "fault: memory given back\n");
        return;
    }
    for (size_t piece = (size_t)64 << 30; piece >= 1 << 16 && n < 4096;) {
        if (cu.take(&held[n], piece) == 0) {
            n++;
            sum += piece;
        } else {
            piece /= 2;
        }
    }
    fprintf(stderr, "fault: %zu MiB taken\n", sum >> 20);
}

static void *wait_for_orders(void *set) {
    for (int signal; sigwait(set, &signal) == 0;) {
        if (!cu.give && !open_driver())
            return NULL;
        if (signal == SIGUSR1)
            trap();
        else
            take_all();
    }
    return NULL;
}

__attribute__((constructor)) static void begin(void) {
    static sigset_t set;
    pthread_t thread;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigaddset(&set, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &set, NULL); /* every thread inherits it */
    if (pthread_create(&thread, NULL, wait_for_orders, &set) == 0)
        pthread_detach(thread);
}
