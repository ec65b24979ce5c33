/* vocab.h - the two big members of tokenizer.json, model.vocab and model.merges, and the
   tables made from them.  They are read here and not through gen/json.h because a tree of
   450,000 values takes several times the 0.2 s in which a tokenizer has to open. */
#ifndef RT_VOCAB_H
#define RT_VOCAB_H
#include <stddef.h>
#include <stdint.h>
#include "gen/err.h"

struct rt_token {
    const char *bytes;      /* what the token stands for; NULL: no such token */
    uint32_t len;
    int special;            /* of added tokens only */
};

struct rt_slot { uint32_t tag, id; };           /* id + 1; 0: free */
struct rt_pair { uint64_t ids; uint32_t rank; }; /* left << 32 | right; rank + 1; 0: free */

struct rt_vocab {
    int limit;              /* ids are below */
    struct rt_token *token; /* [limit] */
    char *arena;            /* holds the bytes of the tokens */
    uint64_t seed;          /* of the hashes: not to be foreseen by who writes the file */
    struct rt_slot *slot;   /* [slot_mask + 1], open addressing */
    size_t slot_mask;
    struct rt_pair *pair;   /* [pair_mask + 1], open addressing */
    size_t pair_mask;
    int32_t *merged;        /* [n_merges], by rank: the token that a pair becomes */
    size_t n_merges;
    int32_t byte_id[256];   /* the token of one byte, or -1 */
};

struct rt_range { size_t at, end; };    /* of a value in the text; end 0: not there */

/* Find model.vocab (an object) and model.merges (an array) in the document TEXT.  Strict in
   nothing else: what does not look like JSON only ends the search. */
void rt_vocab_locate(const char *text, size_t len, struct rt_range *vocab,
                     struct rt_range *merges);

/* Read both into *V.  NAME stands in errors; LIMIT as above.
   Returns 0, MK_EFORMAT (with the byte's offset in TEXT), MK_EUNSUPPORTED, MK_ENOMEM; free
   *V with rt_vocab_free in every case. */
int rt_vocab_read(const char *text, struct rt_range vocab, struct rt_range merges,
                  const char *name, int limit, struct rt_vocab *v, struct mk_err *err);
void rt_vocab_free(struct rt_vocab *v);

/* The token whose bytes are BYTES, or -1. */
int32_t rt_vocab_find(const struct rt_vocab *v, const char *bytes, size_t len);

/* The token that is spelled TEXT (valid UTF-8) in the file's own alphabet, or -1, also when
   it is longer than RT_MAX_SPELLED bytes. */
enum { RT_MAX_SPELLED = 512 };
int32_t rt_vocab_find_spelled(const struct rt_vocab *v, const char *text, size_t len);

/* The rank of merging LEFT and RIGHT, or RT_NO_RANK. */
#define RT_NO_RANK UINT32_MAX
uint32_t rt_vocab_rank(const struct rt_vocab *v, int32_t left, int32_t right);
#endif
