#include "base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* O_NONBLOCK: opening a FIFO must fail below, not wait for a writer. */
static orcd_status open_regular(const char *path, int *fd, uint64_t *size, orcd_error *err) {
    struct stat st;
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (*fd < 0)
        return orcd_fail(err, ORCD_ERR_IO, "cannot open %s: %s", path, strerror(errno));
    if (fstat(*fd, &st) != 0) {
        orcd_fail(err, ORCD_ERR_IO, "cannot examine %s: %s", path, strerror(errno));
    } else if (!S_ISREG(st.st_mode)) {
        orcd_fail(err, ORCD_ERR_IO, "%s is not a regular file", path);
    } else {
        *size = (uint64_t)st.st_size;
        return ORCD_OK;
    }
    close(*fd);
    *fd = -1;
    return ORCD_ERR_IO;
}

orcd_status file_open(const char *path, file_map *out, orcd_error *err) {
    uint64_t size;
    int fd;
    *out = (file_map){0};
    ORCD_TRY(open_regular(path, &fd, &size, err));
    void *p = NULL;
    if (size && (p = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0)) == MAP_FAILED) {
        orcd_fail(err, ORCD_ERR_IO, "cannot map %s into memory: %s", path, strerror(errno));
        close(fd);
        return ORCD_ERR_IO;
    }
    *out = (file_map){.data = p, .size = size, .fd = fd};
    return ORCD_OK;
}

void file_close(file_map *f) {
    if (f->data)
        munmap((void *)f->data, f->size);
    if (f->data || f->fd > 0)
        close(f->fd);
    *f = (file_map){0};
}

bool file_changed(const file_map *f) {
    struct stat st;
    return f->data && (fstat(f->fd, &st) != 0 || (uint64_t)st.st_size < f->size);
}

/* ---- files that shrink while they are mapped: a signal knows no context but globals ---- */

static atomic_int shrunk_exit; /* code to leave with; 0 = none was given */
static atomic_bool shrunk_zeros, shrunk;
static atomic_long page_bytes;

static void on_bus_error(int sig, siginfo_t *info, void *context) {
    static const char sentence[] = "orcd: a file became shorter while it was being read: restore it and start again\n";
    int code = atomic_load(&shrunk_exit);
    uintptr_t bytes = (uintptr_t)atomic_load(&page_bytes), at = (uintptr_t)info->si_addr & ~(bytes - 1);
    (void)context;
    if (info->si_code == BUS_ADRERR && atomic_load(&shrunk_zeros) &&
        syscall(SYS_mmap, at, bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != -1) {
        atomic_store(&shrunk, true);
        return;
    }
    if (info->si_code == BUS_ADRERR && code != 0) {
        ssize_t n = write(STDERR_FILENO, sentence, sizeof sentence - 1);
        (void)n;
        _exit(code);
    }
    signal(sig, SIG_DFL); /* it comes again, and ends the process */
}

static void catch_bus_errors(void) {
    struct sigaction sa;
    memset(&sa, 0, sizeof sa);
    sa.sa_sigaction = on_bus_error;
    sa.sa_flags = SA_SIGINFO;
    sigemptyset(&sa.sa_mask);
    atomic_store(&page_bytes, sysconf(_SC_PAGESIZE));
    sigaction(SIGBUS, &sa, NULL);
}

void file_shrunk_exits(int code) {
    atomic_store(&shrunk_exit, code);
    catch_bus_errors();
}

void file_shrunk_reads_zeros(bool yes) {
    atomic_store(&shrunk_zeros, yes);
    catch_bus_errors();
}

bool file_shrunk(void) { return atomic_load_explicit(&shrunk, memory_order_relaxed); }

orcd_status file_slurp(const char *path, size_t limit, char **text, size_t *len, orcd_error *err) {
    uint64_t size;
    int fd;
    *text = NULL;
    *len = 0;
    ORCD_TRY(open_regular(path, &fd, &size, err));
    orcd_status s = ORCD_OK;
    char *p = NULL;
    size_t n = 0;
    if (size > limit) {
        s = orcd_fail(err, ORCD_ERR_LIMIT, "%s has %llu bytes, more than the %zu allowed here", path,
                      (unsigned long long)size, limit);
        goto done;
    }
    if (!(p = malloc(size + 1))) {
        s = orcd_fail(err, ORCD_ERR_NOMEM, "no memory for the %llu bytes of %s", (unsigned long long)size, path);
        goto done;
    }
    while (n < size) {
        ssize_t got = read(fd, p + n, size - n);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0) {
            s = orcd_fail(err, ORCD_ERR_IO, "cannot read %s: %s", path,
                          got < 0 ? strerror(errno) : "it became shorter");
            goto done;
        }
        n += (size_t)got;
    }
    p[n] = '\0';
    *text = p;
    *len = n;
    p = NULL;
done:
    free(p);
    close(fd);
    return s;
}

bool file_exists(const char *path) { return access(path, F_OK) == 0; }

bool file_is_dir(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}
