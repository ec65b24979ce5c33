/* memory.c - global memory as the memory model allows it to be seen (section 8).  A store is in its
   CTA's view at once, and in all others' when it is committed: whenever the schedule likes, and in any
   order, unless a fence came between.  Pending stores are in memory only while a lane of their CTA
   runs.  And a relaxed load may still give what was there before, until its CTA acquires. */
#include "runtime/host/machine.h"

#include <stdlib.h>
#include <string.h>

enum { MOST_PENDING = 512, MOST_STALE = 24, CLOCKS = 1 << 15, WRITERS = 1 << 14 };

/* ---- Views ---------------------------------------------------------------- */

#define SWAP(n)                             \
    {                                       \
        char mine[n];                       \
        memcpy(mine, s->address, n);        \
        memcpy(s->address, s->other, n);    \
        memcpy(s->other, mine, n);          \
        return;                             \
    }
static inline void swap(struct pending *s)
{
    switch (s->bytes) {
    case 2: SWAP(2)
    case 4: SWAP(4)
    case 8: SWAP(8)
    case 16: SWAP(16)
    default: misuse("a store of %u bytes", s->bytes);
    }
}

void show_view(struct cta *cta)
{
    if (machine.view)
        for (int i = machine.view->n_pending - 1; i >= 0; i--)
            swap(&machine.view->pending[i]);
    machine.view = cta;
    for (int i = 0; cta && i < cta->n_pending; i++)
        swap(&cta->pending[i]);
}

/* The bytes of TO, which were read at FROM, that S has elsewhere. */
static void overlay(const struct pending *s, char *to, const char *from, uint32_t bytes)
{
    const char *low = s->address > from ? s->address : from;
    const char *high = s->address + s->bytes < from + bytes ? s->address + s->bytes : from + bytes;

    if (low < high)
        memcpy(to + (low - from), s->other + (low - s->address), (size_t) (high - low));
}

void read_as(const struct cta *cta, void *to, const void *from, uint32_t bytes)
{
    const struct cta *view = machine.view;

    memcpy(to, from, bytes);
    if (view == cta)
        return;
    for (int i = view ? view->n_pending - 1 : -1; i >= 0; i--)
        overlay(&view->pending[i], to, from, bytes);
    for (int i = 0; i < cta->n_pending; i++)
        overlay(&cta->pending[i], to, from, bytes);
}

static int overlap(const struct pending *a, const struct pending *b)
{
    return a->address < b->address + b->bytes && b->address < a->address + a->bytes;
}

/* The value that CTA still sees at P; NULL: the one in memory. */
static const char *find_stale(const struct cta *cta, const void *p, uint32_t bytes)
{
    for (int i = 0; i < cta->n_stale; i++)
        if (cta->stale[i].address == p && cta->stale[i].bytes == bytes)
            return cta->stale[i].other;
    return NULL;
}

static int has_pending(const struct cta *cta, const struct pending *s)
{
    for (int i = 0; i < cta->n_pending; i++)
        if (overlap(&cta->pending[i], s))
            return 1;
    return 0;
}

static void drop_stale(struct cta *cta, int i)
{
    const char *address = cta->stale[i].address;

    cta->stale[i] = cta->stale[--cta->n_stale];
    machine.n_late--;
    changed(address);
}

/* Some CTAs go on to see BEFORE where store S of WRITER now is seen by all others. */
static void leave_stale(const struct cta *writer, const struct pending *s, const char *before)
{
    for (unsigned i = 0; s->strong && i < machine.resident; i++) {
        struct cta *cta = machine.ctas[i];
        if (cta == writer || cta->n_stale == MOST_STALE || find_stale(cta, s->address, s->bytes) ||
            has_pending(cta, s) || machine_random(4)) /* who has stored to it sees nothing older */
            continue;
        if (!cta->stale && !(cta->stale = calloc(MOST_STALE, sizeof *cta->stale)))
            misuse("no memory");
        cta->stale[cta->n_stale] = *s;
        memcpy(cta->stale[cta->n_stale++].other, before, s->bytes);
        machine.n_late++;
    }
}

static void acquire_all(struct cta *cta)
{
    while (cta->n_stale)
        drop_stale(cta, cta->n_stale - 1);
}

/* Store I of CTA, or an earlier one to the same place, is seen by all: but by those who have a pending one of
   their own there, which comes after it. */
static void commit(struct cta *cta, int i)
{
    struct cta *view = machine.view;
    struct pending *list = cta->pending;
    const char *address;

    for (int j = 0; j < i; j++)
        if (overlap(&list[j], &list[i]))
            i = j;
    if (view && view != cta && has_pending(view, &list[i]))
        show_view(NULL);
    address = list[i].address;
    leave_stale(cta, &list[i], cta == machine.view ? list[i].other : address);
    if (cta != machine.view)
        memcpy(list[i].address, list[i].other, list[i].bytes);
    if (view != machine.view)
        show_view(view);
    cta->n_strong -= list[i].strong;
    memmove(&list[i], &list[i + 1], (size_t) (--cta->n_pending - i) * sizeof *list);
    machine.n_late--;
    changed(address);
}

int settle_some(struct cta *cta, int weak_too)
{
    const int n = cta->n_pending + cta->n_stale;
    const int from = n ? (int) machine_random((uint64_t) n) : 0;

    if (!weak_too && !cta->n_strong && !cta->n_stale)
        return 0;
    for (int i = 0; i < n; i++) {
        const int at = (from + i) % n;
        if (at >= cta->n_pending) {
            drop_stale(cta, at - cta->n_pending);
            return 1;
        }
        if (weak_too || cta->pending[at].strong) {
            commit(cta, at);
            return 1;
        }
    }
    return 0;
}

void settle_all(struct cta *cta)
{
    while (cta->n_pending)
        commit(cta, 0);
    acquire_all(cta);
}

/* Its own, and those that a barrier put before it. */
void commit_before(struct lane *l)
{
    struct cta *cta = l->warp->cta;

    for (int i = 0; i < cta->n_pending;) {
        const struct pending *s = &cta->pending[i];
        if (s->lane == l || s->generation < l->warp->generation ||
            (s->lane->warp == l->warp && s->syncs < l->warp->syncs)) {
            commit(cta, i);
            i = 0;
        } else {
            i++;
        }
    }
}

/* The BYTES at P are about to be written by L; others keep seeing what is there. */
static void hold_back(struct lane *l, void *p, uint32_t bytes, int strong)
{
    struct cta *cta = l->warp->cta;
    struct pending *s;

    if (!cta->pending && !(cta->pending = calloc(MOST_PENDING, sizeof *cta->pending)))
        misuse("no memory");
    if (cta->n_pending == MOST_PENDING)
        commit(cta, 0);
    s = &cta->pending[cta->n_pending++];
    *s = (struct pending) {.address = p, .bytes = bytes, .strong = strong, .lane = l, .syncs = l->warp->syncs,
                           .generation = l->warp->cta->generation};
    memcpy(s->other, p, bytes);
    cta->n_strong += strong;
    machine.n_late++;
}

/* ---- What reports tell ---------------------------------------------------- */

static struct writer *writer_of(const void *p)
{
    static struct writer writers[WRITERS];

    return &writers[((uintptr_t) p / 4 * 0x9E3779B97F4A7C15ull >> 40) % WRITERS];
}

static void remember_writer(const struct lane *l, const void *p)
{
    *writer_of(p) = (struct writer) {.at = p, .launch = machine.launches, .cta = l->warp->cta->index,
                                     .warp = l->warp->index, .lane = (int) (l - l->warp->lanes), .step = machine.steps};
}

const struct writer *find_writer(const void *p)
{
    const struct writer *w = writer_of(p);

    return w->at == p && w->launch == machine.launches ? w : NULL;
}

/* ---- What ThreadSanitizer is told ----------------------------------------- */

/* The clock that stands for the word at P. */
static void *clock_of(const void *p)
{
    static uint64_t clocks[CLOCKS];

    return &clocks[((uintptr_t) p / 4 * 0x9E3779B97F4A7C15ull >> 40) % CLOCKS];
}

/* A relaxed load acquires when a fence follows (8.8). */
static void remember_seen(struct lane *l, const void *p)
{
    if (!__tsan_acquire)
        return;
    for (int i = 0; i < l->n_seen; i++)
        if (l->seen[i] == p)
            return;
    if (l->n_seen == MOST_SEEN) {
        memmove(l->seen, l->seen + 1, (MOST_SEEN - 1) * sizeof *l->seen);
        l->n_seen--;
    }
    l->seen[l->n_seen++] = p;
}

/* A relaxed store releases what came before the last fence, and no more: a fiber of its own, the courier,
   carries the clock of that moment. */
static void release_fenced(struct lane *l, void *p)
{
    if (!__tsan_release || !l->fenced)
        return;
    if (!l->courier)
        l->courier = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(l->courier, 1);
    __tsan_acquire(&l->fenced);
    __tsan_release(clock_of(p));
    __tsan_switch_to_fiber(l->fiber.tsan, 1);
}

static void check_address(const void *p, uint32_t bytes)
{
    if ((uintptr_t) p & (bytes - 1)) /* a power of two, and every poll comes here: no division */
        misuse("an access of %u bytes to %p, which is no multiple of that", bytes, p);
    if (__asan_region_is_poisoned && __asan_region_is_poisoned((void *) p, bytes))
        misuse("an access of %u bytes to %p, which is outside every buffer", bytes, p);
}

/* ---- The primitives ------------------------------------------------------- */

/* A weak store follows (st, 9.7.9.11; 8.2.4: a vector is that many scalars, in no order). */
void mkhost_delay(void *p, uint32_t bytes)
{
    struct lane *l = ENTER("a store", p);
    const uint32_t scalar = bytes < 4 ? bytes : 4;

    check_address(p, bytes);
    progress(l);
    proxy_wrote(l, p, bytes);
    if (machine.seed)
        for (uint32_t at = 0; at < bytes; at += scalar)
            hold_back(l, (char *) p + at, scalar, 0);
}

/* st.relaxed or st.release (9.7.9.11); ATOM bytes at a time are seen at once (8.10.3; .b128 is one type,
   5.2.1). */
void mkhost_store(void *p, const void *v, uint32_t bytes, uint32_t atom, int is_release)
{
    struct lane *l = ENTER("a strong store", p);

    check_address(p, bytes);
    progress(l);
    if (is_release) {
        commit_before(l);
        release(clock_of(p));
    } else {
        release_fenced(l, p);
    }
    for (int i = 0; i < l->warp->cta->n_stale; i++)
        if (l->warp->cta->stale[i].address == p) /* it sees its own store, and none before */
            drop_stale(l->warp->cta, i--);
    proxy_wrote(l, p, bytes);
    remember_writer(l, p);
    for (uint32_t at = 0; machine.seed && at < bytes; at += atom)
        hold_back(l, (char *) p + at, atom, 1);
    memcpy(p, v, bytes);
    changed(p);
}

/* ld.relaxed or ld.acquire (9.7.9.8). */
void mkhost_load(const void *p, void *v, uint32_t bytes, int is_acquire)
{
    struct lane *l = ENTER("a strong load", p);
    const char *before;

    check_address(p, bytes);
    polled(l, p);
    if (is_acquire)
        acquire_all(l->warp->cta);
    before = find_stale(l->warp->cta, p, bytes);
    memcpy(v, before ? before : p, bytes);
    if (is_acquire)
        acquire(clock_of(p));
    else
        remember_seen(l, p);
}

/* Atomics are performed at once, where all CTAs meet; L's own earlier stores to P come before. */
static uint32_t enter_atomic(struct lane *l, const uint32_t *p)
{
    const struct pending s = {.address = (char *) (uintptr_t) p, .bytes = sizeof *p};

    check_address(p, sizeof *p);
    for (int i = 0; i < l->warp->cta->n_pending; i++)
        if (overlap(&l->warp->cta->pending[i], &s)) {
            commit(l->warp->cta, i);
            i = -1;
        }
    return *p;
}

/* red.release.add (9.7.13.6). */
uint32_t mkhost_add_release(uint32_t *p, uint32_t v)
{
    struct lane *l = ENTER("red.release.add", p);
    const uint32_t before = enter_atomic(l, p);

    progress(l);
    remember_writer(l, p);
    commit_before(l);
    release(clock_of(p));
    *p = before + v;
    changed(p);
    return before;
}

/* atom.cas of 0 and 1 (9.7.13.5). */
_Bool mkhost_claim(uint32_t *p)
{
    struct lane *l = ENTER("atom.cas", p);
    uint32_t before;

    check_address(p, sizeof *p);
    polled(l, p);
    before = enter_atomic(l, p);
    if (!before) {
        *p = 1;
        changed(p);
    }
    return !before;
}

/* fence.acq_rel (9.7.13.4). */
void mkhost_fence(int scope)
{
    struct lane *l = ENTER("a fence", NULL);

    for (int i = 0; i < l->n_seen; i++)
        acquire(clock_of(l->seen[i]));
    l->n_seen = 0;
    l->fenced = 1;
    release(&l->fenced);
    if (scope) {
        commit_before(l);
        acquire_all(l->warp->cta);
    }
}

/* Flags and counts in shared memory: the kernel reads and writes them itself, for the sanitizers.  Before
   ld.relaxed.cta.shared (9.7.9.8). */
void mkhost_poll(const void *p)
{
    struct lane *l = ENTER("a flag", p);

    polled(l, p);
    remember_seen(l, p);
}

/* Before st.relaxed.cta.shared (9.7.9.11) or atom.shared.add (9.7.13.5). */
void mkhost_publish(void *p)
{
    struct lane *l = ENTER("a flag", p);

    release_fenced(l, p);
    l->flag = *(const uint32_t *) p;
}

/* The same again and again is no progress. */
void mkhost_changed(void *p)
{
    if (*(const uint32_t *) p == machine.now->flag)
        return;
    remember_writer(machine.now, p);
    progress(machine.now);
    changed(p);
}

/* %globaltimer (10.28): it moves, by no fixed step.  Who polls it polls a made-up address: the schedule depends on
   where in its page that is, and must not on where the linker puts the machine. */
uint64_t mkhost_timer(void)
{
    static const uintptr_t at = 1376;
    struct lane *l = ENTER("the clock", &machine.clock_ns);

    polled(l, (const void *) at);
    return machine.clock_ns;
}

/* trap (9.7.19.4). */
void mkhost_trap(void)
{
    ENTER("trap", NULL);
    misuse("trap");
}
