/* warp.c - what lanes do together: collectives of a warp, barriers of a CTA. */
#include "runtime/host/machine.h"

#include <string.h>

#include "runtime/host/matrix.h"

/* ---- Collectives ---------------------------------------------------------- */

int meet(struct lane *l, const char *name, void *args)
{
    struct warp *w = l->warp;

    if (w->n_lanes != LANES || w->live != LANES)
        misuse("%s needs all lanes of the warp; %d are there", name, w->live);
    if (!w->met)
        w->meeting = name;
    else if (w->meeting != name)
        misuse("a lane comes to %s while others of its warp wait at %s", name, w->meeting);
    l->meeting = args;
    if (++w->met == LANES)
        return 1;
    set_state(l, MEETING);
    if (--machine.quantum > 0 && w->in[READY])
        switch_to(next_lane(w, (unsigned) __builtin_ctz(l->bit)));
    else
        reschedule();
    return 0;
}

void part(struct warp *w)
{
    w->met = 0;
    w->in[READY] |= w->in[MEETING]; /* with the lane at work, so the warp was ready before */
    w->in[MEETING] = 0;
}

struct vote {
    _Bool vote;
    uint32_t all;
};

struct shuffle {
    void *value;
    unsigned bytes, from;
};

/* shfl.sync (9.7.9.6) of 32 or, as two of them, of 64 bits; it orders no memory. */
void mkhost_shuffle(void *value, unsigned bytes, unsigned from)
{
    struct lane *l = ENTER("shfl.sync", NULL);
    struct shuffle mine = {value, bytes, from & (LANES - 1)}, *all[LANES];
    uint64_t values[LANES];

    if (!meet(l, "shfl.sync", &mine))
        return;
    for (int i = 0; i < LANES; i++) {
        all[i] = l->warp->lanes[i].meeting;
        values[i] = bytes == 8 ? *(uint64_t *) all[i]->value
                  : bytes == 4 ? *(uint32_t *) all[i]->value
                               : *(uint8_t *) all[i]->value;
    }
    for (int i = 0; i < LANES; i++) {
        if (bytes == 8)
            *(uint64_t *) all[i]->value = values[all[i]->from];
        else if (bytes == 4)
            *(uint32_t *) all[i]->value = (uint32_t) values[all[i]->from];
        else
            *(uint8_t *) all[i]->value = (uint8_t) values[all[i]->from];
    }
    part(l->warp);
}

/* vote.sync.ballot.b32 (9.7.13.8). */
uint32_t mkhost_ballot(_Bool vote)
{
    struct lane *l = ENTER("vote.sync.ballot", NULL);
    struct vote mine = {.vote = vote};
    uint32_t all = 0;

    if (!meet(l, "vote.sync.ballot", &mine))
        return mine.all;
    for (int i = 0; i < LANES; i++)
        all |= (uint32_t) ((const struct vote *) l->warp->lanes[i].meeting)->vote << i;
    for (int i = 0; i < LANES; i++)
        ((struct vote *) l->warp->lanes[i].meeting)->all = all;
    part(l->warp);
    return all;
}

/* bar.warp.sync (9.7.13.2). */
void mkhost_sync_warp(void)
{
    struct lane *l = ENTER("__syncwarp", NULL);
    struct warp *w = l->warp;
    char *clock = &w->sync_clock[w->syncs & 1];

    release(clock);
    if (meet(l, "__syncwarp", NULL)) {
        w->syncs++;
        part(w);
    }
    acquire(clock);
}

struct matrix_args {
    float *c;
    uint32_t *r;
    const uint32_t *a, *b;
    const void *row;
    int k;
};

/* ldmatrix.sync.aligned.m8n8.x4 (9.7.14.5.15); the lane has read its row. */
void mkhost_ldmatrix(uint32_t *r, const void *row, _Bool transposed)
{
    struct lane *l = ENTER("ldmatrix", NULL);
    struct matrix_args mine = {.r = r, .row = row};
    uint16_t rows[LANES][8];
    uint32_t out[LANES][4];

    progress(l);
    if (!meet(l, transposed ? "ldmatrix.trans" : "ldmatrix", &mine))
        return;
    for (int i = 0; i < LANES; i++)
        memcpy(rows[i], ((struct matrix_args *) l->warp->lanes[i].meeting)->row, sizeof rows[i]);
    host_ldmatrix(out, rows, transposed);
    for (int i = 0; i < LANES; i++)
        memcpy(((struct matrix_args *) l->warp->lanes[i].meeting)->r, out[i], sizeof out[i]);
    part(l->warp);
}

/* mma.sync.aligned (9.7.14.5.14). */
void mkhost_mma(float *c, const uint32_t *a, const uint32_t *b, int k, _Bool bf16)
{
    struct lane *l = ENTER("mma", NULL);
    struct matrix_args mine = {.c = c, .a = a, .b = b, .k = k};
    const size_t a_bytes = k == 8 ? 8 : 16, b_bytes = k == 8 ? 4 : 8;
    float all_c[LANES][4];
    uint32_t all_a[LANES][4] = {0}, all_b[LANES][2] = {0};

    progress(l);
    if (!meet(l, "mma", &mine))
        return;
    for (int i = 0; i < LANES; i++) {
        const struct matrix_args *lane = l->warp->lanes[i].meeting;
        memcpy(all_c[i], lane->c, sizeof all_c[i]);
        memcpy(all_a[i], lane->a, a_bytes);
        memcpy(all_b[i], lane->b, b_bytes);
    }
    host_mma(k, bf16, all_c, (const uint32_t (*)[4]) all_a, (const uint32_t (*)[2]) all_b);
    for (int i = 0; i < LANES; i++)
        memcpy(((struct matrix_args *) l->warp->lanes[i].meeting)->c, all_c[i], sizeof all_c[i]);
    part(l->warp);
}

/* ---- Barriers ------------------------------------------------------------- */

static void open_barrier(struct cta *cta, struct barrier *b)
{
    b->arrived = 0;
    b->phase++;
    cta->generation++;
    for (int i = 0; i < cta->n_warps; i++)
        for (uint32_t left = cta->warps[i].in[WAITING]; left; left &= left - 1) {
            struct lane *l = &cta->warps[i].lanes[__builtin_ctz(left)];
            if (l->about == b) {
                set_state(l, READY);
                l->warp->generation = cta->generation;
            }
        }
}

static const char *const barrier_names[BARRIERS] = {
    "__syncthreads", "bar.sync 1", "bar.sync 2", "bar.sync 3", "bar.sync 4", "bar.sync 5",
    "bar.sync 6", "bar.sync 7", "bar.sync 8", "bar.sync 9", "bar.sync 10", "bar.sync 11",
    "bar.sync 12", "bar.sync 13", "bar.sync 14", "bar.sync 15",
};

/* bar.sync ID, THREADS (9.7.13.1). */
void mkhost_barrier(unsigned id, unsigned threads)
{
    struct cta *cta = machine.now->warp->cta;
    struct barrier *b = &cta->barriers[id % BARRIERS];
    struct lane *l = ENTER(barrier_names[id % BARRIERS], b);
    char *clock = &b->clock[b->phase & 1];

    progress(l);
    if (id >= BARRIERS || threads % LANES || (b->arrived && b->threads != threads))
        misuse("barrier %u for %u threads; others are there for %u", id, threads, b->threads);
    if (l->warp->met)
        misuse("a lane comes to a barrier while others of its warp wait at %s", l->warp->meeting);
    release(clock);
    b->threads = threads;
    if (++b->arrived == threads) {
        open_barrier(cta, b);
        l->warp->generation = cta->generation;
    } else {
        set_state(l, WAITING);
        reschedule();
    }
    acquire(clock);
}

/* ---- Conversions ---------------------------------------------------------- */

/* cvt.rn.f16.f32 (9.7.9.21). */
uint16_t mkhost_to_fp16(float x)
{
    return host_from_float(0, x);
}

/* cvt.f32.f16 (9.7.9.21). */
float mkhost_from_fp16(uint16_t x)
{
    return host_to_float(0, x);
}

/* cvt.rn.bf16x2.f32 (9.7.9.21), one half of it. */
uint16_t mkhost_to_bf16(float x)
{
    return host_from_float(1, x);
}
