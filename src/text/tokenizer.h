/* text/tokenizer.h: byte-level BPE with the GPT-2 and o200k splitters. May include base and format.
 * Equal to Hugging Face tokenizers on every input (tests/tokenizer); total over all byte strings:
 * decode(encode(b)) == b. Linear time. A loaded tokenizer is immutable and thread-safe. */
#ifndef ORCD_TEXT_TOKENIZER_H
#define ORCD_TEXT_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/status.h"
#include "format/model_file.h"

typedef struct tok tok;

typedef enum tok_kind { TOK_HF_JSON, TOK_GGUF_BPE } tok_kind;
typedef enum tok_split { TOK_SPLIT_GPT2, TOK_SPLIT_O200K } tok_split;

orcd_status tok_open_json(const char *path, tok **out, orcd_error *err) ORCD_MUST_USE;
orcd_status tok_open_gguf(const gguf *g, tok **out, orcd_error *err) ORCD_MUST_USE;
/* The model's own tokenizer: `explicit_path` (--tokenizer) when given; else the GGUF's arrays; else tokenizer.json
 * in the model's folder, then one folder up. A miss names every path searched. */
orcd_status tok_open_for(const mf_file *f, const char *explicit_path, tok **out, orcd_error *err) ORCD_MUST_USE;
/* The tokenizer.json in the model's folder or one folder up: its path, to be freed; NULL when there is none. */
char *tok_json_path(const mf_file *f);
/* Write a tokenizer.json as the tokenizer.ggml.* keys of a GGUF file, as llama.cpp's converter does: ids without a
 * text, up to n_vocab, become unused [PADn]; a chat template beside the file goes along. */
orcd_status tok_export(const char *json_path, int32_t n_vocab, gguf_writer *w, orcd_error *err) ORCD_MUST_USE;
/* The same keys for a model that has no tokenizer: the bytes, " w256", " w257" and so on, and the specials of its
 * kind at the end (of gpt-oss at OpenAI's ids when the vocabulary reaches them); no merges. n_vocab >= 272. */
orcd_status tok_export_synthetic(tok_split split, int32_t n_vocab, gguf_writer *w, orcd_error *err) ORCD_MUST_USE;
void tok_close(tok *t);

tok_kind tok_kind_of(const tok *t);
tok_split tok_split_of(const tok *t);
int32_t tok_n_vocab(const tok *t); /* one more than the largest id */
int32_t tok_bos(const tok *t);     /* -1 when the model has none; never added by itself */
int32_t tok_eos(const tok *t);     /* -1 when none */
/* The tokens that end a text: eos, and of <|endoftext|>, <|return|> and <|call|> those that there are. Returns how
 * many. */
int tok_ends(const tok *t, int32_t id[4]);
bool tok_is_special(const tok *t, int32_t id); /* control or reserved */
/* Id of a special token by its text ("<|start|>"), -1 when absent. */
int32_t tok_special(const tok *t, const char *text);

/* Append the ids of `text`. Special tokens are recognised only when `specials`. Any bytes are accepted. */
orcd_status tok_encode(const tok *t, const char *text, size_t len, bool specials, ids *out) ORCD_MUST_USE;

/* The bytes of one token, valid while the tokenizer lives: raw bytes for text tokens, the literal text for specials.
 * Ids outside the vocabulary or without text give zero bytes. */
const char *tok_bytes(const tok *t, int32_t id, size_t *len);
void tok_decode(const tok *t, const int32_t *id, size_t n, bool specials, buf *out);

/* Streaming detokeniser: holds back an incomplete UTF-8 sequence (at most 3 bytes). Zero-initialise. */
typedef struct tok_stream {
    uint8_t held[4];
    uint8_t n_held;
} tok_stream;

/* Append what has become whole characters; every maximal invalid subpart becomes U+FFFD (Unicode 15, 3.9, W3C
 * practice). */
void tok_stream_push(tok_stream *s, const char *bytes, size_t len, buf *out);
/* The end: a rest becomes one U+FFFD. */
void tok_stream_end(tok_stream *s, buf *out);

#endif
