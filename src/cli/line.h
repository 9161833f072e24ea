/* cli/line.h: lines from a person (libedit: editing, history) or from a pipe, joined where one message is several. */
#ifndef ORCD_CLI_LINE_H
#define ORCD_CLI_LINE_H

#include "base/buf.h"

typedef struct line_reader line_reader;

typedef enum line_end { LINE_TEXT, LINE_INTERRUPTED /* Ctrl-C */, LINE_EOF } line_end;

/* history NULL: none is read or written. */
orcd_status line_open(const char *history, line_reader **out, orcd_error *err) ORCD_MUST_USE;
void line_close(line_reader *l); /* accepts NULL */

/* One message into *out (cleared first): a line, lines that end with a backslash, or all between two """. */
line_end line_read(line_reader *l, const char *prompt, buf *out);

#endif
