/* cli/doctor.c: `orcd doctor`: what this machine offers and what the commands would take of it, in ten lines. */
#include "cli/cache.h"
#include "cli/cli.h"

#include <jansson.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "backend/backend.h"
#include "base/bandwidth.h"
#include "base/cpu.h"
#include "base/file.h"

typedef struct options {
    const char *cache;
    bool json;
} options;

static const cli_option option[] = {
    {"cache", 0, CLI_STR, offsetof(options, cache), 0, 0, "DIR", "where models lie (default ~/.cache/orcd)"},
    {"json", 0, CLI_FLAG, offsetof(options, json), 0, 0, "", "print one JSON object"},
    {0},
};

/* A line for a person, and the same for a machine. */
typedef struct finding {
    buf text;
    json_t *data;
} finding;

static void set_int(finding *f, const char *key, uint64_t v) {
    json_object_set_new(f->data, key, json_integer((json_int_t)(v > INT64_MAX ? INT64_MAX : v)));
}
static void set_str(finding *f, const char *key, const char *v) { json_object_set_new(f->data, key, json_string(v)); }

static void add_bytes(finding *f, const char *key, uint64_t n, const char *after) {
    char text[32];
    set_int(f, key, n);
    buf_printf(&f->text, "%s%s", human_bytes(n, text), after);
}

/* The first line of a file of /proc or /sys that begins with `key` ("": any), without it and the blanks around; false
 * when there is none. */
static bool read_line(const char *path, const char *key, char *out, size_t cap) {
    char line[512];
    bool found = false;
    FILE *f = fopen(path, "re");
    while (f && !found && fgets(line, sizeof line, f))
        if (strncmp(line, key, strlen(key)) == 0) {
            const char *from = line + strlen(key);
            from += strspn(from, " \t:");
            snprintf(out, cap, "%.*s", (int)strcspn(from, "\n"), from);
            found = true;
        }
    if (f)
        fclose(f);
    return found;
}

static int allowed_cores(void) {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

static void look_at_program(finding *f) {
    struct utsname u;
    json_t *names = json_array();
    buf_printf(&f->text, "%s for ", ORCD_VERSION);
    for (size_t i = 0; i < be_count(); i++) {
        json_array_append_new(names, json_string(be_at(i)->name));
        buf_printf(&f->text, "%s%s", i ? ", " : "", be_at(i)->name);
    }
    set_str(f, "version", ORCD_VERSION);
    json_object_set_new(f->data, "backends", names);
    if (uname(&u) == 0) {
        set_str(f, "kernel", u.release);
        buf_printf(&f->text, "; %s %s, %s", u.sysname, u.release, u.machine);
    }
}

static void look_at_processor(finding *f) {
    char model[128] = "unknown processor";
    const char *asked = getenv("ORCD_CPU"), *tier = cpu_tier_name(cpu_tier_best());
    read_line("/proc/cpuinfo", "model name", model, sizeof model);
    int cores = allowed_cores();
    set_str(f, "model", model);
    set_int(f, "cores", (uint64_t)cores);
    set_int(f, "cores_online", (uint64_t)sysconf(_SC_NPROCESSORS_ONLN));
    set_str(f, "runs", tier);
    buf_printf(&f->text, "%s; %d of %ld cores allowed; runs %s%s", model, cores, sysconf(_SC_NPROCESSORS_ONLN), tier,
               asked ? " (ORCD_CPU may have lowered it)" : ", tried by running it");
}

/* The least limit of the groups that this process is in, 0 when none is set. */
static uint64_t group_limit(void) {
    static const char *const kind[][3] = {{"0:", "/sys/fs/cgroup", "memory.max"},
                                          {"", "/sys/fs/cgroup/memory", "memory.limit_in_bytes"}};
    const uint64_t none = (uint64_t)1 << 60;
    uint64_t least = none;
    char line[512], path[1024], text[64];
    FILE *f = fopen("/proc/self/cgroup", "re");
    while (f && fgets(line, sizeof line, f)) {
        char *group = strrchr(line, ':');
        bool v1 = strstr(line, ":memory:") != NULL;
        if (!group || (!v1 && strncmp(line, "0::", 3) != 0))
            continue;
        group[strcspn(group, "\n")] = '\0';
        /* inside a container the path may be the host's: the root is looked at in any case */
        for (char *end = group + strlen(group); end; end = *group ? strrchr(group, '/') : NULL) {
            *end = '\0';
            snprintf(path, sizeof path, "%s%s/%s", kind[v1][1], *group ? group + 1 : "", kind[v1][2]);
            uint64_t v = read_line(path, "", text, sizeof text) ? strtoull(text, NULL, 10) : 0;
            least = v && v < least ? v : least;
        }
    }
    if (f)
        fclose(f);
    return least == none ? 0 : least;
}

static void look_at_memory(finding *f) {
    uint64_t total = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE), free_now = 0;
    uint64_t limit = group_limit();
    char text[64];
    double rate = 0;
    int threads = allowed_cores();
    if (read_line("/proc/meminfo", "MemAvailable", text, sizeof text))
        free_now = strtoull(text, NULL, 10) << 10;
    add_bytes(f, "total_bytes", total, ", ");
    add_bytes(f, "available_bytes", free_now, " available; ");
    if (limit)
        add_bytes(f, "group_limit_bytes", limit, " at most for this control group; ");
    if (mem_bandwidth(threads, &rate, NULL) == ORCD_OK) {
        json_object_set_new(f->data, "read_bytes_per_s", json_real(rate));
        buf_printf(&f->text, "%d thread%s read %.1f GB/s", threads, threads == 1 ? "" : "s", rate / 1e9);
    } else {
        buf_str(&f->text, "the speed could not be measured");
    }
}

/* Every device that opens; else the sentence that says why there is none. */
static void look_at_gpus(finding *f, int *n_gpu) {
    enum { MOST = 64 };
    char name[256], device[16], driver[128];
    json_t *list = json_array();
    orcd_error err = {0};
    orcd_status st = ORCD_OK;
    *n_gpu = 0;
    if (!be_find("cuda"))
        buf_str(&f->text, "none: this build has no CUDA backend");
    for (int i = 0; i < MOST && be_find("cuda") && st != ORCD_ERR_ARG; i++) {
        be_device *d;
        uint64_t total, free_now;
        snprintf(device, sizeof device, "cuda:%d", i);
        st = be_open(device, &(be_params){.cpu_experts = -1}, &d, &err);
        if (st != ORCD_OK) {
            if (i == 0)
                buf_printf(&f->text, "none: %s", err.message);
            break;
        }
        d->ops->describe(d, name, sizeof name);
        d->ops->memory(d, &total, &free_now);
        d->ops->close(d);
        buf_printf(&f->text, "%s%s, ", i ? "; " : "", name);
        json_t *one = json_pack("{s:s, s:I, s:I}", "name", name, "total_bytes", (json_int_t)total, "available_bytes",
                                (json_int_t)free_now);
        json_array_append_new(list, one);
        buf_printf(&f->text, "%s of ", human_bytes(free_now, driver));
        buf_printf(&f->text, "%s free", human_bytes(total, driver));
        ++*n_gpu;
    }
    if (read_line("/proc/driver/nvidia/version", "NVRM version", driver, sizeof driver)) {
        set_str(f, "driver", driver);
        buf_printf(&f->text, "; driver %s", driver);
    }
    json_object_set_new(f->data, "devices", list);
}

/* What has no limit is left out of the line where that is usual (`quiet`). */
static void add_limit(finding *f, const char *key, int which, const char *what, bool bytes, bool quiet) {
    struct rlimit r;
    char text[32];
    if (getrlimit((__rlimit_resource_t)which, &r) != 0)
        return;
    bool none = r.rlim_cur == RLIM_INFINITY;
    json_object_set_new(f->data, key, none ? json_null() : json_integer((json_int_t)r.rlim_cur));
    if (!none || !quiet)
        buf_printf(&f->text, "%s%s ",
                   none    ? "unlimited"
                   : bytes ? human_bytes(r.rlim_cur, text)
                           : human_count(r.rlim_cur, text),
                   what);
}

static void look_at_limits(finding *f) {
    char huge[64] = "unknown", count[64] = "0";
    char *open, *close;
    add_limit(f, "locked_bytes", RLIMIT_MEMLOCK, " of locked memory,", true, false);
    add_limit(f, "address_space_bytes", RLIMIT_AS, " of address space,", true, true);
    add_limit(f, "open_files", RLIMIT_NOFILE, " open files;", false, false);
    read_line("/sys/kernel/mm/transparent_hugepage/enabled", "", huge, sizeof huge);
    read_line("/proc/meminfo", "HugePages_Total", count, sizeof count);
    if ((open = strchr(huge, '[')) && (close = strchr(open, ']'))) {
        *close = '\0';
        memmove(huge, open + 1, strlen(open + 1) + 1);
    }
    set_str(f, "transparent_huge_pages", huge);
    set_int(f, "huge_pages", strtoull(count, NULL, 10));
    buf_printf(&f->text, "transparent huge pages: %s, %s reserved", huge, count);
}

static void look_at_cache(finding *f, const options *o) {
    char dir[HUB_PATH], at[HUB_PATH];
    struct statvfs v;
    hub_models all = {0};
    uint64_t bytes = 0;
    orcd_error err = {0};
    if (cli_cache_dir(o->cache, dir, sizeof dir, &err) != ORCD_OK || hub_list(dir, &all, &err) != ORCD_OK) {
        buf_str(&f->text, err.message);
        return;
    }
    for (size_t i = 0; i < all.n; i++)
        bytes += all.model[i].bytes;
    set_str(f, "path", dir);
    set_int(f, "models", all.n);
    buf_printf(&f->text, "%s: %zu model%s, ", dir, all.n, all.n == 1 ? "" : "s");
    add_bytes(f, "bytes", bytes, "; ");
    hub_models_free(&all);
    snprintf(at, sizeof at, "%s", dir);
    for (char *slash; !file_exists(at) && (slash = strrchr(at, '/'));) /* the folder may not be made yet */
        *(slash == at ? slash + 1 : slash) = '\0';
    if (statvfs(at, &v) == 0)
        add_bytes(f, "free_bytes", (uint64_t)v.f_bavail * v.f_frsize, " free on its disk");
}

static void look_at_model(finding *f) {
    char path[4096];
    orcd_error err = {0};
    bool here = cli_model_path(NULL, path, sizeof path, &err) == ORCD_OK;
    set_str(f, "bundled", here ? path : "");
    buf_str(&f->text, here ? path : err.message);
}

/* The commands by what computes for them. */
static void look_at_commands(finding *accelerated, finding *plain, int n_gpu) {
    int threads = allowed_cores();
    char cpu[64];
    snprintf(cpu, sizeof cpu, "the processor with %d thread%s", threads, threads == 1 ? "" : "s");
    set_str(accelerated, "device", n_gpu ? "cuda:0" : "cpu");
    set_int(accelerated, "threads", (uint64_t)threads);
    buf_printf(&accelerated->text, "%s%s", n_gpu ? "cuda:0 where the model fits, else " : "", cpu);
    set_str(plain, "device", "cpu");
    set_int(plain, "threads", (uint64_t)threads);
    buf_printf(&plain->text, "%s; --device names another where there is one", cpu);
}

static int run(const cli_command *c, int argc, char **argv) {
    enum { PROGRAM, PROCESSOR, MEMORY, GPU, LIMITS, CACHE, MODEL, RUN, COMPARE, N_FINDING };
    static const char *const title[] = {
        "orcd", "processor", "memory", "gpu", "limits", "cache", "bundled", "run and serve", "convert and compare"};
    static const char *const key[] = {"orcd",  "processor", "memory", "gpu",    "limits",
                                      "cache", "model",     "run",    "compare"};
    options o = {0};
    finding f[N_FINDING];
    int n_rest, n_gpu;
    if (!cli_parse(c, argc, argv, &o, NULL, &n_rest, 0))
        return EXIT_USAGE;
    for (int i = 0; i < N_FINDING; i++)
        f[i] = (finding){.data = json_object()};
    look_at_program(&f[PROGRAM]);
    look_at_processor(&f[PROCESSOR]);
    look_at_memory(&f[MEMORY]);
    look_at_gpus(&f[GPU], &n_gpu);
    look_at_limits(&f[LIMITS]);
    look_at_cache(&f[CACHE], &o);
    look_at_model(&f[MODEL]);
    look_at_commands(&f[RUN], &f[COMPARE], n_gpu);
    json_t *all = json_object();
    for (int i = 0; i < N_FINDING; i++) {
        if (!o.json)
            printf("%-20s %s\n", title[i], f[i].text.data ? f[i].text.data : "out of memory");
        json_object_set_new(all, key[i], f[i].data);
        buf_free(&f[i].text);
    }
    if (o.json) {
        json_dumpf(all, stdout, JSON_INDENT(1));
        printf("\n");
    }
    json_decref(all);
    return EXIT_OK;
}

const cli_command cmd_doctor = {"doctor", "", "what this machine offers and what the commands would use", option, run};
