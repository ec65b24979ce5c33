/* proxy.c - what the async proxy sees, which is the copy engine's bulk copies and wgmma (9.7.13.4, 9.7.15.4): what
   threads wrote only when a fence.proxy.async came between.
   Shared memory: stores are not seen here, so the fence of any thread shows all that its CTA has written;
   bytes that differ from what was shown are not fenced.
   Global memory: late() and strong stores are known one by one, with who made them. */
#include "runtime/host/machine.h"

#include <stdlib.h>
#include <string.h>

/* ---- Shared memory ----------------------------------------------------------- */

static void show_shared(struct cta *cta)
{
    if (!cta->proxied && !(cta->proxied = malloc(machine.smem + 1)))
        misuse("no memory");
    memcpy(cta->proxied, cta->shared, machine.smem);
}

/* fence.proxy.async.shared::cta (9.7.13.4): the engine sees the mbarriers that this thread made, and what was
   written. */
void mkhost_fence_async_proxy(void)
{
    struct lane *l = ENTER("fence.proxy.async.shared", NULL);
    struct cta *cta = l->warp->cta;

    for (int i = 0; i < cta->n_mbarriers; i++)
        if (cta->mbarriers[i].maker == l)
            cta->mbarriers[i].fenced = 1;
    show_shared(cta);
}

void proxy_check_shared(const struct cta *cta, const char *p, uint32_t bytes)
{
    for (uint32_t i = 0; i < bytes; i++)
        if (p[i] != cta->proxied[p - cta->shared + i])
            misuse("%s to shared memory + %zu: byte %u was written to with no fence.proxy.async after it",
                   machine.now->doing, (size_t) (p - cta->shared), i);
}

/* ---- Global memory ------------------------------------------------------------ */

enum { UNIT = 2, PAGE = 512, PAGES = 1 << 12 };

struct written { /* the last store to UNIT bytes */
    const struct lane *lane; /* NULL: none in this launch */
    uint32_t number;         /* of machine.writes */
    uint32_t syncs, generation;
};

static struct page {
    struct page *next;
    uintptr_t at;
    struct written unit[PAGE / UNIT];
} *pages[PAGES];

static struct page **bucket(uintptr_t page)
{
    return &pages[(uint64_t) page * 0x9E3779B97F4A7C15ull >> 52];
}

static struct page *find_page(uintptr_t page)
{
    struct page *p = *bucket(page);

    while (p && p->at != page)
        p = p->next;
    return p;
}

static struct page *make_page(uintptr_t page)
{
    struct page *p = calloc(1, sizeof *p);

    if (!p)
        misuse("no memory");
    p->at = page;
    p->next = *bucket(page);
    return *bucket(page) = p;
}

void proxy_forget(void)
{
    for (int i = 0; i < PAGES; i++)
        for (struct page *p; (p = pages[i]);) {
            pages[i] = p->next;
            free(p);
        }
    machine.writes = 0;
    machine.engine = 0;
}

void proxy_wrote(const struct lane *l, const void *p, uint32_t bytes)
{
    const struct written w = {.lane = l, .number = ++machine.writes, .syncs = (uint32_t) l->warp->syncs,
                              .generation = (uint32_t) l->warp->cta->generation};
    const uintptr_t at = (uintptr_t) p;
    struct page *page;

    if (!machine.engine)
        return;
    page = find_page(at / PAGE); /* of all: their address is a multiple of their size */
    if (!page)
        page = make_page(at / PAGE);
    for (uint32_t i = 0; i < (bytes + UNIT - 1) / UNIT; i++)
        page->unit[at % PAGE / UNIT + i] = w;
}

/* fence.proxy.async.global (9.7.13.4): what this thread wrote, or what came before it by a barrier or
   __syncwarp. */
void mkhost_fence_async_global(void)
{
    struct lane *l = ENTER("fence.proxy.async.global", NULL);
    struct cta *cta = l->warp->cta;

    l->shown_writes = machine.writes;
    cta->shown_writes = machine.writes;
    l->warp->shown_syncs = (uint32_t) l->warp->syncs;
    if (cta->shown_generation < l->warp->generation)
        cta->shown_generation = (uint32_t) l->warp->generation;
}

/* Was W fenced before L goes to the engine: by its own thread, by one that it came before, or by L itself;
   or, if another CTA's, by L's CTA? */
static int is_shown(const struct written *w, const struct lane *l)
{
    const struct warp *warp = w->lane->warp;

    return w->number <= w->lane->shown_writes || w->syncs < warp->shown_syncs ||
           w->generation < warp->cta->shown_generation || w->number <= l->shown_writes ||
           (warp->cta != l->warp->cta && w->number <= l->warp->cta->shown_writes);
}

void proxy_check_global(const struct lane *l, const char *p, uint32_t bytes)
{
    for (uint32_t i = 0; i < bytes; i += UNIT) {
        const uintptr_t at = (uintptr_t) p + i;
        const struct page *page = find_page(at / PAGE);
        const struct written *w = page ? &page->unit[at % PAGE / UNIT] : NULL;
        if (w && w->lane && !is_shown(w, l))
            misuse("cp.async.bulk of %u bytes from %p: byte %u was written by CTA %d warp %d lane %d, with no "
                   "fence.proxy.async.global after it", bytes, (const void *) p, i, w->lane->warp->cta->index,
                   w->lane->warp->index, (int) (w->lane - w->lane->warp->lanes));
    }
}

void proxy_check_landing(const char *p, uint32_t bytes, uint32_t since)
{
    for (uint32_t i = 0; i < bytes; i += UNIT) {
        const uintptr_t at = (uintptr_t) p + i;
        const struct page *page = find_page(at / PAGE);
        const struct written *w = page ? &page->unit[at % PAGE / UNIT] : NULL;
        if (w && w->lane && w->number > since) {
            fail_launch("byte %u of %u at %p was written by CTA %d warp %d lane %d while a cp.async.bulk copied it",
                        i, bytes, (const void *) p, w->lane->warp->cta->index, w->lane->warp->index,
                        (int) (w->lane - w->lane->warp->lanes));
            return;
        }
    }
}
