/* serve/openai.h: what OpenAI's dialects share: the first steps of a request, usage, endings, errors inside streams.
 * Only serve/ includes this. */
#ifndef ORCD_SERVE_OPENAI_H
#define ORCD_SERVE_OPENAI_H

#include "serve/job.h"
#include "serve/request.h"

/* Parse the body into j->body. False after refusing. */
bool openai_body(job *j);
void openai_refuse(job *j, const req_error *e);

/* {prompt_tokens, completion_tokens, total_tokens, ..._details} */
json_t *openai_usage(const job *j);
/* {id, object, created, model, choices: [item]}; item NULL gives an empty array. Steals it. */
json_t *openai_envelope(const job *j, const char *object, json_t *item);
/* "stop", "length", "tool_calls" */
const char *openai_finish(const choice *c);

/* An error inside the stream, for a choice that ended without an answer. True when it did. */
bool openai_stream_failure(choice *c);
/* Without streaming: the first choice that failed is the answer. True when one did. */
bool openai_failure(job *j);
/* The usage chunk when asked for, and [DONE]. */
void openai_stream_end(job *j, const char *object, bool include_usage);

/* A token's bytes as JSON: text (with replacement characters, or as \x.. when `escape` and no whole characters). */
json_t *openai_token_text(const job *j, int32_t id, bool escape);

#endif
