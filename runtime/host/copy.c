/* copy.c - what lands later: mbarriers, the copy engine's bulk copies, cp.async. */
#include "runtime/host/machine.h"

#include <stdlib.h>
#include <string.h>

enum { MOST_MBARRIERS = 256 };
static const uint32_t MAGIC = 0x6d626172; /* upper half of an mbarrier's word; the lower is its number */

/* ---- mbarriers (9.7.13.15) ------------------------------------------------ */

void mbarrier_free(struct cta *cta)
{
    wgmma_free(cta);
    free(cta->mbarriers);
    cta->mbarriers = NULL;
    cta->n_mbarriers = 0;
    cta->copies = 0;
}

struct mbarrier *find_mbarrier(struct cta *cta, uint64_t *word)
{
    const uint64_t v = *word;

    if (v >> 32 != MAGIC || (uint32_t) v >= (uint32_t) cta->n_mbarriers ||
        cta->mbarriers[(uint32_t) v].word != word)
        misuse("no mbarrier was made at %p", (void *) word);
    if (__tsan_read_range)
        __tsan_read_range(word, sizeof *word);
    return &cta->mbarriers[(uint32_t) v];
}

static void end_phase(const struct cta *cta, struct mbarrier *b)
{
    if (b->pending || b->bytes)
        return;
    b->phase++;
    b->generation = cta->generation;
    b->pending = b->expected;
    memcpy(b->before, b->arrived, sizeof b->before);
    memset(b->arrived, 0, sizeof b->arrived);
    memcpy(b->from_before, b->from, sizeof b->from_before);
    memset(b->from, 0, sizeof b->from);
    changed(b->word);
}

static void arrive(const struct lane *l, struct mbarrier *b)
{
    if (!b->pending)
        misuse("one arrival too many at the mbarrier %p", (void *) b->word);
    b->pending--;
    b->arrived[l->warp->index] |= 1u << (l - l->warp->lanes);
    end_phase(l->warp->cta, b);
}

/* mbarrier.init (9.7.13.15.9). */
void mkhost_mbarrier_init(uint64_t *word, uint32_t count)
{
    struct lane *l = ENTER("mbarrier.init", word);
    struct cta *cta = l->warp->cta;

    if (!cta->mbarriers && !(cta->mbarriers = calloc(MOST_MBARRIERS, sizeof *cta->mbarriers)))
        misuse("no memory");
    machine.engine = 1;
    if (cta->n_mbarriers == MOST_MBARRIERS || (uintptr_t) word % 8 || !count)
        misuse("mbarrier.init of %p for %u arrivals, the %dth", (void *) word, count, cta->n_mbarriers);
    if (__tsan_write_range)
        __tsan_write_range(word, sizeof *word);
    *word = (uint64_t) MAGIC << 32 | (uint32_t) cta->n_mbarriers;
    cta->mbarriers[cta->n_mbarriers++] =
        (struct mbarrier) {.word = word, .expected = count, .pending = count, .maker = l};
}

/* mbarrier.arrive, with EXPECT bytes mbarrier.arrive.expect_tx (9.7.13.15.13). */
void mkhost_mbarrier_arrive(uint64_t *word, uint32_t expect)
{
    struct lane *l = ENTER("mbarrier.arrive", word);
    struct mbarrier *b = find_mbarrier(l->warp->cta, word);
    uint32_t phase;

    progress(l);
    if (expect >= 1 << 20)
        misuse("mbarrier.arrive.expect_tx of %u bytes", expect);
    release(&b->clock[b->phase & 1]);
    b->bytes += expect;
    phase = b->phase;
    arrive(l, b);
    if (b->phase != phase) { /* this lane ended it */
        l->passed = b;
        l->passed_phase = b->phase;
    }
}

/* What L has seen, or what was so before its last barrier, is no news. */
static int is_known(const struct lane *l, const struct mbarrier *b)
{
    return !b->phase || b->generation < l->warp->generation ||
           (l->passed == b && l->passed_phase == b->phase);
}

/* test_wait and try_wait (9.7.13.15.16): did the phase of PARITY end?  Both may say so late. */
static _Bool has_ended(struct lane *l, uint64_t *word, uint32_t parity, int of_cluster)
{
    struct mbarrier *b = find_mbarrier(l->warp->cta, word);

    polled(l, word); /* also when it ended: who asks for it may wait for something else */
    b = find_mbarrier(l->warp->cta, word);
    if ((b->phase & 1) == (parity & 1))
        return 0;
    if (b->pushed && !of_cluster)
        misuse("a wait with .acquire.cta, the default, for what another CTA has pushed");
    if (machine.seed && !is_known(l, b) && machine_random(16) == 0) {
        l->polls = 0; /* nothing will change: it must ask again */
        return 0;
    }
    l->passed = b;
    l->passed_phase = b->phase;
    acquire(&b->clock[(b->phase - 1) & 1]);
    return 1;
}

_Bool mkhost_mbarrier_wait(uint64_t *word, uint32_t parity)
{
    return has_ended(ENTER("mbarrier.test_wait", word), word, parity, 0);
}

/* With .acquire.cluster. */
_Bool mkhost_mbarrier_wait_cluster(uint64_t *word, uint32_t parity)
{
    return has_ended(ENTER("mbarrier.try_wait.cluster", word), word, parity, 1);
}

/* ---- The copy engine: bulk copies (9.7.9.25.4) ---------------------------- */

static int overlap(const char *a, uint32_t a_bytes, const char *b, uint32_t b_bytes)
{
    return a < b + b_bytes && b < a + a_bytes;
}

static void check_bulk(const struct cta *cta, const char *dst, const char *src, uint32_t bytes)
{
    if ((uintptr_t) dst % 16 || (uintptr_t) src % 16 || bytes % 16 || !bytes)
        misuse("cp.async.bulk of %u bytes from %p to %p: not multiples of 16", bytes, (const void *) src,
               (const void *) dst);
    if (dst < cta->shared || dst + bytes > cta->shared + machine.smem)
        misuse("cp.async.bulk of %u bytes to %p: outside shared memory", bytes, (const void *) dst);
    if (__asan_region_is_poisoned && __asan_region_is_poisoned((void *) src, bytes))
        misuse("cp.async.bulk of %u bytes from %p: outside every buffer", bytes, (const void *) src);
}

/* From now on the destination may be anything, and to write it is the engine's. */
void start_bulk(struct bulk c)
{
    for (int i = 0; i < machine.n_bulks; i++)
        if (overlap(machine.bulks[i].dst, machine.bulks[i].bytes, c.dst, c.bytes))
            misuse("%s to %p, where another copy is on its way", machine.now->doing, (const void *) c.dst);
    if (__tsan_write_range)
        __tsan_write_range(c.dst, c.bytes);
    release(&c.bar->clock[c.bar->phase & 1]);
    memset(c.dst, 0xff, c.bytes);
    if (machine.n_bulks == machine.room_bulks) {
        const int room = machine.room_bulks * 2 + 16;
        struct bulk *more = realloc(machine.bulks, (size_t) room * sizeof *more);
        if (!more)
            misuse("no memory");
        machine.bulks = more;
        machine.room_bulks = room;
    }
    machine.bulks[machine.n_bulks++] = c;
    machine.n_late++;
    c.cta->copies++;
}

/* cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes (9.7.9.25.4.1). */
void mkhost_copy_bulk(void *dst, const void *src, uint32_t bytes, uint64_t *word)
{
    struct lane *l = ENTER("cp.async.bulk", dst);
    struct cta *cta = l->warp->cta;
    struct mbarrier *b = find_mbarrier(cta, word);

    progress(l);
    check_bulk(cta, dst, src, bytes);
    if (!b->fenced)
        misuse("cp.async.bulk with an mbarrier that no fence.proxy.async followed");
    proxy_check_shared(cta, dst, bytes);
    proxy_check_global(l, src, bytes);
    start_bulk((struct bulk) {.cta = cta, .dst = dst, .src = src, .bytes = bytes, .bar = b, .writes = machine.writes});
    memset(cta->proxied + ((char *) dst - cta->shared), 0xff, bytes);
}

/* A part of copy I lands. */
static void land_bulk(int i)
{
    struct bulk *c = &machine.bulks[i];
    const uint32_t most = machine.seed ? 16 * (1 + (uint32_t) machine_random(c->bytes / 16)) : c->bytes;
    const uint32_t bytes = machine.seed && machine_random(2) ? most : c->bytes;

    if (!c->src) {
        memcpy(c->dst, c->value, bytes);
    } else {
        proxy_check_landing(c->src, bytes, c->writes);
        read_as(c->cta, c->dst, c->src, bytes);
        memcpy(c->cta->proxied + (c->dst - c->cta->shared), c->dst, bytes);
        c->src += bytes;
    }
    c->dst += bytes;
    c->bytes -= bytes;
    c->bar->bytes -= bytes;
    end_phase(c->cta, c->bar);
    if (c->bytes)
        return;
    c->cta->copies--;
    machine.bulks[i] = machine.bulks[--machine.n_bulks];
    machine.n_late--;
}

/* ---- cp.async (9.7.9.25.3) ------------------------------------------------ */

static void add_lane_copy(struct lane *l, struct lane_copy copy)
{
    if (l->n_copies == l->room_copies) {
        const int room = l->room_copies * 2 + 16;
        struct lane_copy *more = realloc(l->copies, (size_t) room * sizeof *more);
        if (!more)
            misuse("no memory");
        l->copies = more;
        l->room_copies = room;
    }
    if (!l->busy) {
        if (machine.n_busy == machine.room_busy) {
            const int room = machine.room_busy * 2 + 64;
            struct lane **more = realloc(machine.busy, (size_t) room * sizeof *more);
            if (!more)
                misuse("no memory");
            machine.busy = more;
            machine.room_busy = room;
        }
        machine.busy[machine.n_busy++] = l;
        l->busy = machine.n_busy;
    }
    l->copies[l->n_copies++] = copy;
    machine.n_late++;
}

/* Copy I of lane L lands; an arrival only when it is the first. */
static void land_lane_copy(struct lane *l, int i)
{
    const struct lane_copy c = l->copies[i];
    static const char zeros[16];

    memmove(&l->copies[i], &l->copies[i + 1], (size_t) (--l->n_copies - i) * sizeof c);
    machine.n_late--;
    if (!l->n_copies) {
        struct lane *last = machine.busy[--machine.n_busy];
        machine.busy[l->busy - 1] = last;
        last->busy = l->busy;
        l->busy = 0;
    }
    if (c.bar) {
        struct mbarrier *b = &l->warp->cta->mbarriers[(uint32_t) *c.bar];
        if (b->pending)
            arrive(l, b);
        else /* not misuse(): it may be the host that goes on here */
            fail_launch("one arrival too many at an mbarrier of CTA %d", l->warp->cta->index);
        return;
    }
    read_as(l->warp->cta, c.dst, c.src, c.bytes);
    memcpy(c.dst + c.bytes, zeros, 16 - c.bytes);
}

/* cp.async.cg.shared.global (9.7.9.25.3.1) of 16 bytes: BYTES from SRC, then zeros. */
void mkhost_copy16(uint32_t dst, const void *src, uint32_t bytes)
{
    struct lane *l = ENTER("cp.async", NULL);
    char *to = l->place.shared + dst;

    progress(l);
    if (dst % 16 || (uintptr_t) src % 16 || bytes > 16 || dst + 16 > machine.smem)
        misuse("cp.async of %u bytes from %p to shared %u", bytes, src, dst);
    if (bytes && __asan_region_is_poisoned && __asan_region_is_poisoned((void *) src, bytes))
        misuse("cp.async of %u bytes from %p: outside every buffer", bytes, src);
    if (__tsan_write_range)
        __tsan_write_range(to, 16);
    if (bytes && __tsan_read_range)
        __tsan_read_range((void *) src, bytes);
    memset(to, 0xff, 16);
    add_lane_copy(l, (struct lane_copy) {NULL, to, src, bytes, l->group});
}

/* cp.async.commit_group (9.7.9.25.3.2). */
void mkhost_copy_commit(void)
{
    ENTER("cp.async.commit_group", NULL)->group++;
}

/* cp.async.wait_group (9.7.9.25.3.3): at most GROUPS groups of this thread are on their way then. */
void mkhost_copy_wait(uint32_t groups)
{
    struct lane *l = ENTER("cp.async.wait_group", NULL);

    for (int i = 0; i < l->n_copies;)
        if (l->copies[i].group + groups < l->group && !l->copies[i].bar)
            land_lane_copy(l, i);
        else
            i++;
}

/* cp.async.mbarrier.arrive.noinc (9.7.13.15.15). */
void mkhost_copy_arrive(uint64_t *word)
{
    struct lane *l = ENTER("cp.async.mbarrier.arrive", word);
    struct mbarrier *b = find_mbarrier(l->warp->cta, word);

    release(&b->clock[b->phase & 1]);
    add_lane_copy(l, (struct lane_copy) {.bar = word, .group = l->group});
}

/* ---- Chance --------------------------------------------------------------- */

void land_some(void)
{
    const int kinds = machine.n_bulks + machine.n_busy + machine.n_products;
    const int at = (int) machine_random((uint64_t) kinds);

    if (at < machine.n_bulks) {
        land_bulk(at);
        return;
    }
    if (at >= machine.n_bulks + machine.n_busy) {
        multiply_some();
        return;
    }
    for (int burst = (int) machine_random(32); burst >= 0 && machine.n_busy; burst--) {
        struct lane *l = machine.busy[machine_random((uint64_t) machine.n_busy)];
        const int i = (int) machine_random((uint64_t) l->n_copies);
        land_lane_copy(l, l->copies[i].bar && i ? 0 : i);
    }
}
