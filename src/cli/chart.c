#include "cli/chart.h"

#include <math.h>
#include <stdio.h>

enum { WIDTH = 860, HEIGHT = 420, LEFT = 76, RIGHT = 24, TOP = 44, BOTTOM = 52, N_COLOURS = 6 };

static const char *const colour[N_COLOURS] = {"#2563a8", "#c2571a", "#2e7d4f", "#7b4ba8", "#a8324a", "#5b6470"};

static double share(double v, double lo, double hi, bool logarithmic) {
    double s = logarithmic ? (log(fmax(v, lo)) - log(lo)) / (log(hi) - log(lo)) : (v - lo) / (hi - lo);
    return s >= 0 ? fmin(s, 1) : 0; /* NaN becomes 0 */
}

static double at_x(const chart *c, double x) {
    return LEFT + share(x, c->x0, c->x1, c->log_x) * (WIDTH - LEFT - RIGHT);
}

static double at_y(const chart *c, double y) {
    return HEIGHT - BOTTOM - share(y, c->y0, c->y1, c->log_y) * (HEIGHT - TOP - BOTTOM);
}

static void text(buf *out, double x, double y, const char *anchor, const char *attributes, const char *s) {
    buf_printf(out, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\" %s>", x, y, anchor, attributes);
    for (; *s; s++)
        if (*s == '<' || *s == '>' || *s == '&')
            buf_str(out, *s == '<' ? "&lt;" : *s == '>' ? "&gt;" : "&amp;");
        else if ((unsigned char)*s >= ' ')
            buf_char(out, *s);
    buf_str(out, "</text>\n");
}

/* 1, 2 or 5 times a power of ten, so that there are at most ten ticks. */
static double tick_step(double range) {
    double step = pow(10, floor(log10(range / 4)));
    return range / step > 20 ? 5 * step : range / step > 10 ? 2 * step : step;
}

static void tick(const chart *c, buf *out, bool is_x, double v) {
    char label[32];
    snprintf(label, sizeof label, "%g", v);
    if (is_x) {
        buf_printf(out, "<path d=\"M%.1f %dv4\" stroke=\"#888\"/>\n", at_x(c, v), HEIGHT - BOTTOM);
        text(out, at_x(c, v), HEIGHT - BOTTOM + 18, "middle", "fill=\"#444\"", label);
    } else {
        buf_printf(out, "<path d=\"M%d %.1fH%d\" stroke=\"#e4e4e4\"/>\n", LEFT, at_y(c, v), WIDTH - RIGHT);
        text(out, LEFT - 8, at_y(c, v) + 4, "end", "fill=\"#444\"", label);
    }
}

static void axis(const chart *c, buf *out, bool is_x) {
    double lo = is_x ? c->x0 : c->y0, hi = is_x ? c->x1 : c->y1;
    if (is_x ? c->log_x : c->log_y) {
        for (double v = pow(10, ceil(log10(lo) - 1e-9)); v <= hi * 1.0001; v *= 10)
            tick(c, out, is_x, v);
        return;
    }
    double step = tick_step(hi - lo);
    for (double k = ceil(lo / step - 1e-9); k * step <= hi + step * 1e-9; k++)
        tick(c, out, is_x, k * step + 0.0); /* + 0.0: no negative zero */
}

void chart_page(buf *out, int n) {
    buf_printf(out, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\">\n", WIDTH, n * HEIGHT);
}

void chart_begin(chart *c, buf *out) {
    if (!(c->x1 > c->x0))
        c->x1 = c->log_x ? c->x0 * 2 : c->x0 + 1;
    if (c->log_y) {
        c->y0 = pow(10, floor(log10(c->y0)));
        c->y1 = pow(10, ceil(log10(fmax(c->y1, c->y0 * 1.01))));
    } else {
        double step = tick_step(c->y1 > c->y0 ? c->y1 - c->y0 : 1);
        c->y1 = c->y0 + ceil(fmax(c->y1 - c->y0, step) / step) * step;
    }
    buf_printf(out,
               "<svg xmlns=\"http://www.w3.org/2000/svg\" y=\"%d\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" "
               "font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"%d\" height=\"%d\" fill=\"#fff\"/>\n",
               c->place * HEIGHT, WIDTH, HEIGHT, WIDTH, HEIGHT, WIDTH, HEIGHT);
    text(out, LEFT, 22, "start", "font-size=\"15\" fill=\"#111\"", c->title);
    axis(c, out, true);
    axis(c, out, false);
    buf_printf(out, "<path d=\"M%d %dV%dH%d\" fill=\"none\" stroke=\"#888\"/>\n", LEFT, TOP, HEIGHT - BOTTOM,
               WIDTH - RIGHT);
    text(out, (LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 10, "middle", "fill=\"#444\"", c->x_label);
    text(out, LEFT, 38, "start", "fill=\"#444\"", c->y_label);
}

void chart_line(chart *c, buf *out, const double *x, const double *y, int n, bool dots, const char *label) {
    const char *paint = colour[c->n_series % N_COLOURS];
    buf_printf(out, "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"1.2\" stroke-linejoin=\"round\" points=\"",
               paint);
    for (int i = 0; i < n; i++)
        buf_printf(out, "%s%.1f,%.1f", i ? " " : "", at_x(c, x[i]), at_y(c, y[i]));
    buf_str(out, "\"/>\n");
    for (int i = 0; dots && i < n; i++)
        buf_printf(out, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n", at_x(c, x[i]), at_y(c, y[i]), paint);
    if (label) {
        double line = TOP + 14 + 16.0 * c->n_series;
        buf_printf(out, "<path d=\"M%d %.1fh18\" stroke=\"%s\" stroke-width=\"3\"/>\n", WIDTH - RIGHT - 24, line - 4,
                   paint);
        text(out, WIDTH - RIGHT - 30, line, "end", "fill=\"#222\"", label);
    }
    c->n_series++;
}

void chart_level(const chart *c, buf *out, double y, const char *label) {
    buf_printf(out, "<path d=\"M%d %.1fH%d\" stroke=\"#a8324a\" stroke-dasharray=\"5 4\"/>\n", LEFT, at_y(c, y),
               WIDTH - RIGHT);
    text(out, LEFT + 6, at_y(c, y) - 4, "start", "fill=\"#a8324a\"", label);
}

void chart_end(buf *out) { buf_str(out, "</svg>\n"); }

orcd_status cli_write_text(const char *path, const buf *content, orcd_error *err) {
    if (content->failed)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for %s", path);
    FILE *f = fopen(path, "wb");
    if (!f)
        return orcd_fail(err, ORCD_ERR_IO, "%s: cannot be written; name another file", path);
    bool whole = fwrite(content->data, 1, content->len, f) == content->len;
    if (fclose(f) != 0 || !whole)
        return orcd_fail(err, ORCD_ERR_IO, "%s: writing failed; is the disk full?", path);
    return ORCD_OK;
}
