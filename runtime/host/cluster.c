/* cluster.c - CTAs that reach each other's shared memory.  CTAs of a cluster follow each other in the
   grid, and all clusters of a launch are there at once: CTA i is machine.ctas[i] then. */
#include "runtime/host/machine.h"

#include <string.h>

/* An address of the shared::cluster window (5.1.7) has 1 + the rank of its CTA in the upper byte,
   one of the CTA's own window has 0 there. */
enum { RANK_SHIFT = 24 };

static struct cta *cta_of(const struct cta *cta, unsigned rank)
{
    return machine.ctas[(unsigned) cta->index / machine.cluster * machine.cluster + rank];
}

struct barrier *cluster_barrier(const struct cta *cta)
{
    return &cta_of(cta, 0)->cluster;
}

/* %cluster_ctarank (10.16). */
uint32_t mkhost_cluster_rank(void)
{
    return (unsigned) ENTER("%cluster_ctarank", NULL)->warp->cta->index % machine.cluster;
}

/* ---- The barrier: barrier.cluster -------------------------------------------- */

static unsigned live_threads(const struct cta *cta)
{
    int n = 0;

    for (unsigned rank = 0; rank < machine.cluster; rank++)
        n += cta_of(cta, rank)->live;
    return (unsigned) n;
}

static void wake(struct cta *cta, const struct barrier *b)
{
    for (int i = 0; i < cta->n_warps; i++)
        for (int lane = 0; lane < cta->warps[i].n_lanes; lane++) {
            struct lane *l = &cta->warps[i].lanes[lane];
            if (is_in(l, WAITING) && l->about == b)
                set_state(l, READY);
        }
}

/* The phase ends when all threads that live have arrived. */
static void end_phase(struct cta *cta)
{
    struct barrier *b = cluster_barrier(cta);

    if (!b->arrived || b->arrived != live_threads(cta))
        return;
    b->arrived = 0;
    b->phase++;
    for (unsigned rank = 0; rank < machine.cluster; rank++)
        wake(cta_of(cta, rank), b);
}

void cluster_leave(struct lane *l)
{
    struct cta *cta = l->warp->cta;
    struct barrier *b;

    if (machine.cluster < 2)
        return;
    b = cluster_barrier(cta);
    if (l->in_cluster && l->cluster_phase == b->phase)
        b->arrived--;
    l->in_cluster = 0;
    end_phase(cta);
}

/* barrier.cluster.arrive.release (9.7.13.3): what came before is seen by the cluster after its wait. */
void mkhost_cluster_arrive(void)
{
    struct lane *l = ENTER("barrier.cluster.arrive", NULL);
    struct cta *cta = l->warp->cta;
    struct barrier *b = cluster_barrier(cta);

    progress(l);
    if (l->in_cluster)
        misuse("a thread arrives twice at the barrier of its cluster, without a wait between");
    commit_before(l);
    release(&b->clock[b->phase & 1]);
    l->in_cluster = 1;
    l->cluster_phase = b->phase;
    b->arrived++;
    end_phase(cta);
}

/* barrier.cluster.wait.acquire (9.7.13.3). */
void mkhost_cluster_wait(void)
{
    struct lane *l = ENTER("barrier.cluster.wait", NULL);
    struct barrier *b = cluster_barrier(l->warp->cta);

    progress(l);
    if (!l->in_cluster)
        misuse("a thread waits at the barrier of its cluster before it has arrived");
    if (l->cluster_phase == b->phase) {
        l->about = b;
        set_state(l, WAITING);
        reschedule();
        l->about = NULL;
    }
    l->in_cluster = 0;
    acquire(&b->clock[l->cluster_phase & 1]);
}

static int has_arrived(const struct warp *w, const struct barrier *b)
{
    int n = 0;

    for (int i = 0; i < w->n_lanes; i++)
        n += is_in(&w->lanes[i], GONE) || (w->lanes[i].in_cluster && w->lanes[i].cluster_phase == b->phase);
    return n == w->n_lanes;
}

void cluster_explain(FILE *f, const struct lane *l)
{
    const struct cta *cta = l->warp->cta;
    const struct barrier *b = cluster_barrier(cta);

    fprintf(f, ": %u of %u threads have arrived; not", b->arrived, live_threads(cta));
    for (unsigned rank = 0; rank < machine.cluster; rank++) {
        const struct cta *c = cta_of(cta, rank);
        for (int i = 0; i < c->n_warps; i++)
            if (!has_arrived(&c->warps[i], b))
                fprintf(f, " CTA %d warp %d", c->index, i);
    }
}

/* ---- Other CTAs' shared memory ----------------------------------------------- */

/* mapa.shared::cluster (9.7.9.23): where SHARED, of this CTA, lies in CTA RANK of the cluster. */
uint32_t mkhost_cluster_address(uint32_t shared, uint32_t rank)
{
    ENTER("mapa", NULL);
    if (shared >= machine.smem || rank >= machine.cluster)
        misuse("mapa of shared %u in CTA %u of a cluster of %u", shared, rank, machine.cluster);
    return (rank + 1) << RANK_SHIFT | shared;
}

/* The BYTES at ADDRESS, and their CTA. */
static char *resolve(const struct lane *l, uint32_t address, uint32_t bytes, struct cta **cta)
{
    const uint32_t rank = address >> RANK_SHIFT, at = address & ((1 << RANK_SHIFT) - 1);

    if (rank > machine.cluster || at % bytes || at + bytes > machine.smem)
        misuse("st.async with the address %#x: no %u bytes of shared memory of its cluster", address, bytes);
    *cta = rank ? cta_of(l->warp->cta, rank - 1) : l->warp->cta;
    if (!(*cta)->live)
        misuse("st.async to CTA %d, which has ended", (*cta)->index);
    return (*cta)->shared + at;
}

/* st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 (9.7.9.12): the value and the count
   of its bytes come later.  Until then there may be anything. */
void mkhost_push(uint32_t dst, const uint32_t *v, uint32_t mbarrier)
{
    struct lane *l = ENTER("st.async", NULL);
    struct bulk c = {.bytes = sizeof c.value};
    struct cta *counting;
    uint64_t *word = (uint64_t *) (void *) resolve(l, mbarrier, sizeof *word, &counting);

    progress(l);
    c.dst = resolve(l, dst, c.bytes, &c.cta);
    if (c.cta != counting)
        misuse("st.async to CTA %d with an mbarrier of CTA %d", c.cta->index, counting->index);
    c.bar = find_mbarrier(counting, word);
    if (!c.bar->shown && counting != l->warp->cta)
        misuse("st.async with an mbarrier that no fence.mbarrier_init followed");
    c.bar->pushed |= counting != l->warp->cta;
    c.bar->from[(unsigned) l->warp->cta->index % machine.cluster] += c.bytes;
    memcpy(c.value, v, sizeof c.value);
    start_bulk(c);
}

/* fence.mbarrier_init.release.cluster (9.7.13.4): other CTAs see the mbarriers that this thread made. */
void mkhost_fence_mbarrier_init(void)
{
    struct lane *l = ENTER("fence.mbarrier_init", NULL);
    struct cta *cta = l->warp->cta;

    for (int i = 0; i < cta->n_mbarriers; i++)
        if (cta->mbarriers[i].maker == l)
            cta->mbarriers[i].shown = 1;
}
