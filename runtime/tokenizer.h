/* tokenizer.h - tokenizer.json of the byte-level BPE kind, equal to Hugging Face tokenizers. */
#ifndef RT_TOKENIZER_H
#define RT_TOKENIZER_H
#include <stddef.h>
#include <stdint.h>
#include "runtime/mk.h"

struct rt_tokenizer;

/* Open DIR/tokenizer.json (and DIR/tokenizer_config.json if there).
   Supported: model BPE with vocab and merges (both spellings of merges: "a b" strings and
   ["a","b"] pairs; ignore_merges); normalizer null, NFC or a Sequence of these;
   pre-tokenizers Split with a regex, ByteLevel (add_prefix_space, use_regex), Digits, and
   a Sequence of these; post_processor ByteLevel or TemplateProcessing (adds e.g.
   <|begin_of_text|>, only with special tokens); decoder ByteLevel; added_tokens with
   their flags.
   VOCAB: ids must be < vocab (config.json vocab_size).  Returns 0, MK_ENOENT, MK_EIO,
   MK_EFORMAT, MK_EUNSUPPORTED (names the kind that we do not handle), MK_ENOMEM.
   150,000 entries open in under 0.2 s. */
int rt_tokenizer_open(const char *dir, int vocab, struct rt_tokenizer **out, struct mk_err *err);
void rt_tokenizer_free(struct rt_tokenizer *t);

/* As mk_tokenize.  FLAGS: MK_SPECIAL recognises added tokens inside the text (Hugging
   Face always does); without it their text is encoded as ordinary text.
   RT_ADD_BOS adds what the post-processor adds. */
enum { RT_ADD_BOS = 256 };
int rt_tokenizer_encode(const struct rt_tokenizer *t, const char *text, size_t len, int flags,
                        int32_t *tokens, size_t cap, size_t *n, struct mk_err *err);

/* Bytes of a token; *special is 1 for a special token.  Returns 0 or MK_EINVAL. */
int rt_tokenizer_bytes(const struct rt_tokenizer *t, int32_t token, const char **bytes, size_t *len,
                       int *special, struct mk_err *err);

/* Collects token bytes and gives out only whole UTF-8 characters.  An invalid byte
   sequence becomes U+FFFD as soon as it cannot become valid.  Zero-initialise. */
struct rt_utf8 { char buf[4]; int n; };
/* Append LEN BYTES; writes complete text to OUT (cap >= 3 * (len + 4) bytes), returns its length. */
size_t rt_utf8_push(struct rt_utf8 *u, const char *bytes, size_t len, char *out);
/* At the end of a stream: what is left becomes one U+FFFD; returns its length (0 or 3). */
size_t rt_utf8_flush(struct rt_utf8 *u, char *out);

/* Chat: FAMILY is gen_model.family; the dialect is recognised by the added tokens that the tokenizer
   has (ChatML: <|im_start|> and <|im_end|>; Llama 3: <|start_header_id|>, <|eot_id|>).
   rt_chat_known: 1 if there is a template.  rt_chat_text: the text of one turn, to be
   encoded with MK_SPECIAL; everything that the user or system wrote must NOT be able to make special
   tokens, so pieces are encoded separately.  Same outputs as mk_chat_tokens. */
int rt_chat_known(const struct rt_tokenizer *t, const char *family);
int rt_chat_tokens(const struct rt_tokenizer *t, const char *family, const char *system, const char *user, int first,
                   int32_t *tokens, size_t cap, size_t *n, struct mk_err *err);
#endif
