/* cli/chart.h: line charts as SVG text, light background, no fonts or scripts from elsewhere. */
#ifndef ORCD_CLI_CHART_H
#define ORCD_CLI_CHART_H

#include <stdbool.h>

#include "base/buf.h"

typedef struct chart {
    const char *title, *x_label, *y_label;
    double x0, x1, y0, y1; /* ranges; chart_begin rounds y0 and y1 outwards */
    bool log_x, log_y;     /* ranges above 0 */
    int n_series;          /* drawn so far: the next one's colour and line of the legend */
    int place;             /* on a page of several: 0 is the topmost */
} chart;

/* Around several charts, one below the other; ends with chart_end as each of them does. */
void chart_page(buf *out, int n);
void chart_begin(chart *c, buf *out);
/* Points in ascending x; values outside the range are drawn at its edge. A label goes to the legend; NULL has none. */
void chart_line(chart *c, buf *out, const double *x, const double *y, int n, bool dots, const char *label);
/* A dashed line across, with its name. */
void chart_level(const chart *c, buf *out, double y, const char *label);
void chart_end(buf *out);

/* Write a whole text file. */
orcd_status cli_write_text(const char *path, const buf *text, orcd_error *err) ORCD_MUST_USE;

#endif
