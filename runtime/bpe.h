/* bpe.h - byte pair merging of one piece of text. */
#ifndef RT_BPE_H
#define RT_BPE_H
#include "runtime/vocab.h"

/* Working memory, kept from piece to piece.  Zero-initialise. */
struct rt_bpe {
    int32_t *id;            /* [cap] the symbols; the result */
    uint32_t *prev, *next;  /* [cap] list of the symbols that are left */
    uint32_t *rank;         /* [cap] of merging a symbol and its next, or RT_NO_RANK */
    uint64_t *heap;         /* [3 * cap] rank << 32 | place: lowest rank first, then leftmost */
    size_t cap, n_heap;
};

/* What a byte without a token becomes: nothing, or the token UNK (>= 0), one for a whole
   run of them when FUSE is not 0. */
struct rt_unk { int32_t id; int fuse; };

/* Merge BYTES; the *N tokens are at b->id.  Time is n log n.  Returns 0 or MK_ENOMEM. */
int rt_bpe_run(struct rt_bpe *b, const struct rt_vocab *v, struct rt_unk unk, const char *bytes,
               size_t len, size_t *n);
void rt_bpe_free(struct rt_bpe *b);
#endif
