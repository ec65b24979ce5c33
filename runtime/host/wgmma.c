/* wgmma.c - products of a warpgroup, four warps from a multiple of four on.  A warp's share of a wgmma,
   16 rows, is made at some moment between its issue and its wait, whenever the schedule likes but in order.
   The registers of the sums are NaN from the first issue to the wait. */
#include "runtime/host/machine.h"

#include <stdlib.h>
#include <string.h>

#include "runtime/host/matrix.h"

enum { GROUP = 4, MOST_SUMS = 16, MOST_PRODUCTS = 64, MOST_REGISTERS = 128 };

struct sums { /* a warp's registers that products are added to */
    float *d[LANES];
    unsigned n;   /* of a lane */
    int at_work;  /* products */
    float *value; /* [LANES][n]: at the last fence or wait, and then with what was added */
};

struct product { /* a warp's share of a wgmma */
    struct sums *sums;
    uint64_t a, b;
    int bf16, done;
    const char *fault; /* what came out when it was made */
    uint32_t group, number;
};

struct wgmmas {
    struct sums sums[MOST_SUMS];
    struct product products[MOST_PRODUCTS]; /* in the order of their issue */
    int n, undone, oldest; /* oldest: of sums, the next to be forgotten */
    uint32_t group, issued;
    struct product last[MOST_PRODUCTS]; /* by number */
};

struct wgmma_args {
    float *d;
    unsigned n;
    uint64_t a, b;
};

/* ---- Sums -------------------------------------------------------------------- */

static const struct wgmma_args *args_of(const struct warp *w, int lane)
{
    return w->lanes[lane].meeting;
}

static struct sums *find_sums(const struct warp *w)
{
    const struct wgmma_args *args = args_of(w, 0);

    for (int i = 0; i < MOST_SUMS; i++)
        if (w->wgmmas->sums[i].d[0] == args->d)
            return &w->wgmmas->sums[i];
    return NULL;
}

static struct sums *new_sums(struct warp *w)
{
    for (int i = 0; i < MOST_SUMS; i++) {
        struct sums *s = &w->wgmmas->sums[w->wgmmas->oldest++ % MOST_SUMS];
        if (!s->at_work)
            return s;
    }
    misuse("more than %d arrays of sums are at work", MOST_SUMS);
}

/* Remember what the registers hold. */
static void keep(const struct warp *w, struct sums *s)
{
    const unsigned n = args_of(w, 0)->n;

    if (n > s->n || !s->value) {
        free(s->value);
        s->value = malloc(LANES * n * sizeof *s->value);
        if (!s->value)
            misuse("no memory");
    }
    s->n = n;
    for (int i = 0; i < LANES; i++) {
        s->d[i] = args_of(w, i)->d;
        memcpy(s->value + (unsigned) i * n, s->d[i], n * sizeof *s->value);
    }
}

static int same_as_kept(const struct sums *s)
{
    for (int i = 0; i < LANES; i++)
        if (memcmp(s->d[i], s->value + (unsigned) i * s->n, s->n * sizeof *s->value))
            return 0;
    return 1;
}

static void check_untouched(const struct sums *s)
{
    for (int i = 0; i < LANES; i++)
        for (unsigned j = 0; j < s->n; j++) {
            uint32_t bits;
            memcpy(&bits, &s->d[i][j], sizeof bits);
            if (bits != UINT32_MAX)
                misuse("lane %d has written to sums between a wgmma and its wait", i);
        }
}

/* wgmma.fence.sync.aligned (9.7.15.7.1), of the sums D that a wgmma will add to. */
void mkhost_wgmma_fence(float *d, uint32_t n)
{
    struct lane *l = ENTER("wgmma.fence", NULL);
    struct wgmma_args mine = {.d = d, .n = n};
    struct warp *w = l->warp;
    struct sums *s;

    progress(l);
    if (!meet(l, "wgmma.fence", &mine))
        return;
    if (!w->wgmmas && !(w->wgmmas = calloc(1, sizeof *w->wgmmas)))
        misuse("no memory");
    s = find_sums(w);
    if (!s)
        s = new_sums(w);
    if (!s->at_work)
        keep(w, s);
    part(w);
}

/* ---- Issue ------------------------------------------------------------------- */

static struct warp *mate(const struct warp *w, int i)
{
    return &w->cta->warps[w->index / GROUP * GROUP + i];
}

static void check_group(const struct warp *w)
{
    if (w->index / GROUP * GROUP + GROUP > w->cta->n_warps || mate(w, GROUP - 1)->n_lanes != LANES)
        misuse("wgmma needs four whole warps from a multiple of four on");
}

/* All threads give the same matrices. */
static void check_aligned(const struct warp *w, const struct product *p)
{
    for (int i = 0; i < LANES; i++) {
        const struct wgmma_args *args = args_of(w, i);
        if (args->a != p->a || args->b != p->b || args->n != p->sums->n || args->d != p->sums->d[i])
            misuse("the lanes of a warp give a wgmma different operands");
    }
    for (int i = 0; i < GROUP; i++) {
        const struct wgmmas *other = mate(w, i)->wgmmas;
        const struct product *same = other ? &other->last[p->number % MOST_PRODUCTS] : NULL;
        if (same && other->issued > p->number && same->number == p->number &&
            (same->a != p->a || same->b != p->b))
            misuse("warps %d and %d of a warpgroup give a wgmma different operands", w->index,
                   w->index / GROUP * GROUP + i);
    }
}

static void poison(struct sums *s)
{
    if (!same_as_kept(s))
        misuse("the sums of a wgmma were written to after their wgmma.fence");
    for (int i = 0; i < LANES; i++)
        memset(s->d[i], 0xff, s->n * sizeof *s->value);
}

static void wake_mates(const struct warp *w)
{
    for (int i = 0; i < GROUP; i++)
        for (int lane = 0; lane < LANES; lane++) {
            struct lane *l = &mate(w, i)->lanes[lane];
            if (is_in(l, WAITING) && l->about == l->warp)
                set_state(l, READY);
        }
}

static void issue(struct warp *w, int bf16)
{
    const struct wgmma_args *args = args_of(w, 0);
    struct wgmmas *g = w->wgmmas;
    struct sums *s = g ? find_sums(w) : NULL;
    struct product p = {.sums = s, .a = args->a, .b = args->b, .bf16 = bf16};

    check_group(w);
    if (!s)
        misuse("a wgmma without a wgmma.fence of its sums before it");
    p.group = g->group;
    p.number = g->issued;
    if (g->n == MOST_PRODUCTS)
        misuse("more than %d wgmmas are at work", MOST_PRODUCTS);
    if (s->at_work && s->n != args->n)
        misuse("wgmmas of different shapes add to the same sums");
    if (s->at_work++)
        check_untouched(s);
    else
        poison(s);
    check_aligned(w, &p);
    g->products[g->n++] = g->last[g->issued++ % MOST_PRODUCTS] = p;
    g->undone++;
    machine.n_products++;
    machine.n_late++;
    wake_mates(w);
}

/* wgmma.mma_async.sync.aligned.m64nNk16.f32 (9.7.15.5.2), N = 2 n, both matrices in shared memory. */
void mkhost_wgmma(float *d, uint32_t n, _Bool bf16, uint64_t a, uint64_t b)
{
    struct lane *l = ENTER("wgmma.mma_async", NULL);
    struct wgmma_args mine = {d, n, a, b};

    progress(l);
    if (n > MOST_REGISTERS)
        misuse("a wgmma of %u columns", 2 * n);
    if (!meet(l, "wgmma.mma_async", &mine))
        return;
    issue(l->warp, bf16);
    part(l->warp);
}

/* wgmma.commit_group.sync.aligned (9.7.15.7.2). */
void mkhost_wgmma_commit(void)
{
    struct lane *l = ENTER("wgmma.commit_group", NULL);

    if (!meet(l, "wgmma.commit_group", NULL))
        return;
    if (l->warp->wgmmas)
        l->warp->wgmmas->group++;
    part(l->warp);
}

/* ---- The products ------------------------------------------------------------- */

/* VALUE += a b, this warp's rows. */
static const char *add_product(const struct warp *w, const struct product *p, float *value, const char *shared)
{
    static const char *const texts[] = {
        [HOST_WGMMA_DONE] = NULL,
        [HOST_WGMMA_N] = "a wgmma of a number of columns that there is not",
        [HOST_WGMMA_DESCRIPTOR] = "a wgmma with a descriptor that has reserved bits or a base offset",
        [HOST_WGMMA_BOUNDS] = "a wgmma of a matrix that is not in shared memory"};
    static float others[MOST_REGISTERS];
    float *d[GROUP * LANES];

    for (int t = 0; t < GROUP * LANES; t++)
        d[t] = t / LANES == w->index % GROUP ? value + (unsigned) (t % LANES) * p->sums->n : others;
    memset(others, 0, sizeof others);
    return texts[host_wgmma((int) p->sums->n * 2, p->bf16, 0, 0, d, p->a, p->b,
                            (const unsigned char *) shared, machine.smem)];
}

/* Shared memory and what the proxy is sure to see of it must give the same. */
static void multiply(const struct warp *w, struct product *p)
{
    static float proxied[LANES * MOST_REGISTERS];
    const size_t bytes = LANES * p->sums->n * sizeof *proxied;

    if (!w->cta->proxied) {
        p->fault = "a wgmma without a fence.proxy.async before it";
    } else {
        memcpy(proxied, p->sums->value, bytes);
        p->fault = add_product(w, p, proxied, w->cta->proxied);
        if (!p->fault)
            p->fault = add_product(w, p, p->sums->value, w->cta->shared);
        if (!p->fault && memcmp(proxied, p->sums->value, bytes))
            p->fault = "a wgmma of shared memory that was written after the last fence.proxy.async";
    }
    p->done = 1;
    w->wgmmas->undone--;
    machine.n_products--;
    machine.n_late--;
}

void multiply_some(void)
{
    int at = (int) machine_random((uint64_t) machine.n_products);

    for (int i = 0; i < machine.n_warps; i++) {
        struct wgmmas *g = machine.warps[i]->wgmmas;
        if (g && at < g->undone) {
            multiply(machine.warps[i], &g->products[g->n - g->undone]);
            return;
        }
        at -= g ? g->undone : 0;
    }
}

/* ---- The wait ----------------------------------------------------------------- */

static int has_issued(const struct warp *w, uint32_t number)
{
    return w->wgmmas && w->wgmmas->issued > number;
}

/* The oldest product of W reaches the registers, if no later one adds to the same. */
static void finish(struct warp *w)
{
    struct wgmmas *g = w->wgmmas;
    struct product *p = &g->products[0];
    struct sums *s = p->sums;

    if (!p->done)
        multiply(w, p);
    if (p->fault)
        misuse("%s", p->fault);
    if (--s->at_work == 0) {
        check_untouched(s);
        for (int i = 0; i < LANES; i++)
            memcpy(s->d[i], s->value + (unsigned) i * s->n, s->n * sizeof *s->value);
    }
    memmove(g->products, g->products + 1, (size_t) --g->n * sizeof *g->products);
}

/* wgmma.wait_group.sync.aligned (9.7.15.7.3): at most GROUPS groups of this warp are at work then.  A
   product needs all four warps. */
void mkhost_wgmma_wait(uint32_t groups)
{
    struct lane *l = ENTER("wgmma.wait_group", NULL);
    struct wgmmas *g;

    progress(l);
    if (!meet(l, "wgmma.wait_group", NULL))
        return;
    g = l->warp->wgmmas;
    while (g && g->n && g->products[0].group + groups < g->group) {
        for (int i = 0; i < GROUP; i++)
            while (!has_issued(mate(l->warp, i), g->products[0].number)) {
                l->about = l->warp;
                set_state(l, WAITING);
                reschedule();
            }
        finish(l->warp);
    }
    l->about = NULL;
    part(l->warp);
}

void wgmma_explain(FILE *f, const struct lane *l)
{
    const struct warp *w = l->warp;

    fputs(" for its warpgroup; a wgmma was not issued by warps", f);
    for (int i = 0; i < GROUP; i++)
        if (!has_issued(mate(w, i), w->wgmmas->products[0].number))
            fprintf(f, " %d", w->index / GROUP * GROUP + i);
}

/* ---- The end ------------------------------------------------------------------- */

void wgmma_leave(struct lane *l)
{
    if (l->warp->wgmmas && l->warp->wgmmas->n)
        misuse("a thread ends with %d wgmmas at work", l->warp->wgmmas->n);
}

void wgmma_free(struct cta *cta)
{
    for (int i = 0; i < cta->n_warps; i++) {
        struct wgmmas *g = cta->warps[i].wgmmas;
        if (!g)
            continue;
        machine.n_products -= g->undone;
        machine.n_late -= g->undone;
        for (int s = 0; s < MOST_SUMS; s++)
            free(g->sums[s].value);
        free(g);
        cta->warps[i].wgmmas = NULL;
    }
    free(cta->proxied);
    cta->proxied = NULL;
}
