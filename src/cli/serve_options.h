/* cli/serve_options.h: what `orcd serve` and `orcd worker` share: keys, certificates, the first lines, exit codes. */
#ifndef ORCD_CLI_SERVE_OPTIONS_H
#define ORCD_CLI_SERVE_OPTIONS_H

#include "cli/engine_options.h"
#include "serve/server.h"

typedef struct key_list {
    char *text;       /* the file, cut into keys */
    const char **key; /* NULL-terminated, NULL when there is none */
} key_list;

/* Keys one a line; blank lines and lines that begin with # are skipped. `path` NULL gives an empty list. */
orcd_status keys_read(const char *path, key_list *out, orcd_error *err) ORCD_MUST_USE;
void keys_free(key_list *k);

/* Both or neither; the texts are the caller's to free. */
orcd_status tls_read(const char *cert_path, const char *key_path, char **cert, char **key,
                     orcd_error *err) ORCD_MUST_USE;

/* Serve until the end, close everything, exit code. A second signal does not return. */
int serve_until_end(server *s, eng *e);

/* What the engine notes, as an event; ctx: const event_log *. */
void note_event(void *ctx, const char *sentence);

#endif
