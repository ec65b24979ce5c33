/* bpe.c - see bpe.h.  The pair of lowest rank is merged first, the leftmost of equals; a heap
   finds it.  A heap entry is stale when its place has another rank by now. */
#include "runtime/bpe.h"

#include <stdlib.h>
#include <string.h>

#define NOWHERE UINT32_MAX

static int make_room(struct rt_bpe *b, size_t n)
{
    size_t cap = n + n / 2 + 64;

    if (n <= b->cap)
        return 0;
    rt_bpe_free(b);
    b->id = malloc(cap * sizeof *b->id);
    b->prev = malloc(cap * sizeof *b->prev);
    b->next = malloc(cap * sizeof *b->next);
    b->rank = malloc(cap * sizeof *b->rank);
    b->heap = malloc(3 * cap * sizeof *b->heap);
    if (!b->id || !b->prev || !b->next || !b->rank || !b->heap) {
        rt_bpe_free(b);
        return MK_ENOMEM;
    }
    b->cap = cap;
    return 0;
}

void rt_bpe_free(struct rt_bpe *b)
{
    free(b->id);
    free(b->prev);
    free(b->next);
    free(b->rank);
    free(b->heap);
    memset(b, 0, sizeof *b);
}

static void heap_push(struct rt_bpe *b, uint64_t key)
{
    size_t i = b->n_heap++;

    for (; i && b->heap[(i - 1) / 2] > key; i = (i - 1) / 2)
        b->heap[i] = b->heap[(i - 1) / 2];
    b->heap[i] = key;
}

static uint64_t heap_pop(struct rt_bpe *b)
{
    uint64_t top = b->heap[0], last = b->heap[--b->n_heap];
    size_t i = 0, k;

    while ((k = 2 * i + 1) < b->n_heap) {
        if (k + 1 < b->n_heap && b->heap[k + 1] < b->heap[k])
            k++;
        if (b->heap[k] >= last)
            break;
        b->heap[i] = b->heap[k];
        i = k;
    }
    b->heap[i] = last;
    return top;
}

/* The pair at AT is new: look up its rank.  At most one push per symbol at the start and two
   per merge: 3 * cap entries are enough. */
static void look_up(struct rt_bpe *b, const struct rt_vocab *v, uint32_t at)
{
    uint32_t next = b->next[at];

    b->rank[at] = next == NOWHERE ? RT_NO_RANK : rt_vocab_rank(v, b->id[at], b->id[next]);
    if (b->rank[at] != RT_NO_RANK)
        heap_push(b, (uint64_t)b->rank[at] << 32 | at);
}

static size_t first_symbols(struct rt_bpe *b, const struct rt_vocab *v, struct rt_unk unk,
                            const char *bytes, size_t len)
{
    int after_unk = 0;
    size_t n = 0;

    for (size_t i = 0; i < len; i++) {
        int32_t id = v->byte_id[(unsigned char)bytes[i]];

        if (id < 0 && (unk.id < 0 || (unk.fuse && after_unk)))
            continue;
        after_unk = id < 0;
        b->id[n++] = id < 0 ? unk.id : id;
    }
    return n;
}

static void merge_all(struct rt_bpe *b, const struct rt_vocab *v)
{
    while (b->n_heap) {
        uint64_t top = heap_pop(b);
        uint32_t at = (uint32_t)top, rank = (uint32_t)(top >> 32), gone;

        if (b->rank[at] != rank)
            continue;
        gone = b->next[at];
        b->id[at] = v->merged[rank];
        b->next[at] = b->next[gone];
        if (b->next[gone] != NOWHERE)
            b->prev[b->next[gone]] = at;
        b->rank[gone] = RT_NO_RANK;
        look_up(b, v, at);
        if (b->prev[at] != NOWHERE)
            look_up(b, v, b->prev[at]);
    }
}

int rt_bpe_run(struct rt_bpe *b, const struct rt_vocab *v, struct rt_unk unk, const char *bytes,
               size_t len, size_t *n)
{
    size_t symbols, left = 0;

    *n = 0;
    if (make_room(b, len))
        return MK_ENOMEM;
    symbols = first_symbols(b, v, unk, bytes, len);
    if (symbols == 0)
        return 0;
    b->n_heap = 0;
    for (size_t i = 0; i < symbols; i++) {
        b->prev[i] = i ? (uint32_t)i - 1 : NOWHERE;
        b->next[i] = i + 1 < symbols ? (uint32_t)i + 1 : NOWHERE;
    }
    for (size_t i = 0; i < symbols; i++)
        look_up(b, v, (uint32_t)i);
    merge_all(b, v);
    for (uint32_t i = 0; i != NOWHERE; i = b->next[i])
        b->id[left++] = b->id[i];
    *n = left;
    return 0;
}
