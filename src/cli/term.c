#include "cli/cli.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

bool term_is_tty(int fd) {
    const char *term = getenv("TERM");
    return isatty(fd) && !(term && strcmp(term, "dumb") == 0);
}

static bool colours(void) { return term_is_tty(STDERR_FILENO) && !getenv("NO_COLOR"); }

const char *term_dim(void) { return colours() ? "\033[2m" : ""; }
const char *term_bold(void) { return colours() ? "\033[1m" : ""; }
const char *term_off(void) { return colours() ? "\033[0m" : ""; }

double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

uint64_t peak_rss_bytes(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (uint64_t)u.ru_maxrss * 1024;
}

void reset_peak_rss(void) {
    FILE *f = fopen("/proc/self/clear_refs", "w"); /* 5: the peak, from now on */
    if (f) {
        fputs("5", f);
        fclose(f);
    }
}

const char *human_bytes(uint64_t n, char out[32]) {
    static const char *const unit[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    double v = (double)n;
    size_t u = 0;
    for (; v >= 1000 && u + 1 < ORCD_COUNT(unit); u++)
        v /= 1024;
    snprintf(out, 32, u && v < 100 ? "%.2f %s" : "%.0f %s", v, unit[u]);
    return out;
}

const char *human_count(uint64_t n, char out[32]) {
    char digits[24];
    int len = snprintf(digits, sizeof digits, "%llu", (unsigned long long)n), at = 0;
    for (int i = 0; i < len; i++) {
        if (i && (len - i) % 3 == 0)
            out[at++] = ',';
        out[at++] = digits[i];
    }
    out[at] = '\0';
    return out;
}

void bar_begin(bar *b, const char *label, const char *unit) { *b = (bar){.label = label, .unit = unit, .t0 = now_s()}; }

void bar_update(void *p, uint64_t done, uint64_t total) {
    enum { WIDTH = 28, CELL = 3 };
    bar *b = p;
    double t = now_s(), elapsed = t - b->t0;
    /* nothing for what is over in a moment */
    if (!term_is_tty(STDERR_FILENO) || elapsed < 0.3 || t - b->t_drawn < 0.05 || total == 0)
        return;
    b->t_drawn = t;
    b->drawn = true;
    int full = (int)((double)WIDTH * (double)done / (double)total);
    char cells[WIDTH * CELL + 1] = "", rate[64], amount[32], left[32] = "";
    double speed = done > b->first ? (double)(done - b->first) / elapsed : 0;
    double rest = done < total ? (double)(total - done) / speed : 0;
    for (int i = 0; i < WIDTH; i++)
        memcpy(cells + CELL * i, i < full ? "━" : "╌", CELL + 1);
    if (strcmp(b->unit, "B") == 0)
        snprintf(rate, sizeof rate, "%s/s", human_bytes((uint64_t)speed, amount));
    else
        snprintf(rate, sizeof rate, "%.0f %s/s", speed, b->unit);
    if (elapsed > 2 && speed > 0 && rest < 360000)
        snprintf(left, sizeof left, rest < 100 ? "  %.0f s left" : "  %.0f min left", rest < 100 ? rest : rest / 60);
    fprintf(stderr, "\r%s%-8s %s %3d %%  %s%s%s\033[K", term_dim(), b->label, cells,
            (int)(100 * (double)done / (double)total), rate, left, term_off());
}

void bar_end(bar *b) {
    if (b->drawn)
        fprintf(stderr, "\r\033[K");
    b->drawn = false;
}
