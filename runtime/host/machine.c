/* machine.c - launches, and the scheduler that a seed drives. */
#include "runtime/host/machine.h"

#include <stdlib.h>
#include <string.h>

struct machine machine;
EXPORT struct mkhost_lane *mkhost_now;

enum {
    ROUNDS = 16,           /* polls of the longest wait, twice; some ask for one word more than once */
    STALL_POLLS = 4200,    /* more polls of all when nothing goes on: the kernel's watchdog looks at every
                              4096th */
    STALLS = 4,            /* then it is a deadlock */
    LIVELOCK = 30000000,   /* steps in which no word changes */
    STALL_NS = 1000000000, /* that the clock gains when nothing goes on */
    STEP_NS = 20
};

/* ---- Chance --------------------------------------------------------------- */

/* Seed 0 is calm: turns are long and go round, nothing is late.  Each other seed has a temper. */
static void draw_temper(void)
{
    static const int quanta[] = {1, 4, 16, 64, 256};
    static const unsigned rates[] = {1024, 512, 128, 24, 4, 1}, redraws[] = {0, 40, 400, 4000};

    machine.rng = machine.seed * 0xD1342543DE82EF95ull + 1;
    machine.quantum_most = machine.seed ? quanta[machine_random(5)] : 400;
    machine.late_rate = machine.seed ? rates[machine_random(6)] : 1024;
    machine.lazy = machine.seed && machine_random(3) == 0;
    machine.slow_copies = machine.seed && machine_random(4) == 0;
    machine.redraw = machine.seed ? redraws[machine_random(4)] : 0;
    machine.sleeper = machine.seed && machine_random(3) == 0 ? (int) machine_random(machine.resident) : -1;
    machine.sleeps_at = 1 + machine_random(1ull << (8 + machine_random(12)));
}

/* From some moment on a CTA is as late as it can be: it goes on only when no other can. */
static int sleeps(const struct warp *w)
{
    return w->cta->slot == machine.sleeper && machine.steps >= machine.sleeps_at;
}

/* Some warps run often, some seldom, some only when no other can. */
static void draw_weights(void)
{
    static const unsigned weights[] = {0, 1, 1, 4, 4, 16, 64};

    machine.able = machine.total = 0;
    for (int i = 0; i < machine.n_warps; i++) {
        struct warp *w = machine.warps[i];
        w->weight = sleeps(w) ? 0 : machine.redraw ? weights[machine_random(7)] : 1;
        machine.able += w->in[READY] != 0;
        machine.chances[i] = w->in[READY] ? w->weight : 0;
        machine.total += machine.chances[i];
    }
}

/* ---- Memory --------------------------------------------------------------- */

enum { PAGE = 4096, GUARD = 8192, GUARD_BYTE = 0xa5 };

/* AddressSanitizer has guards of its own, right behind the last byte, and tells at once. */
static size_t guard_bytes(void)
{
    return __asan_region_is_poisoned ? 0 : GUARD;
}

static void guarded_clear(char *memory, size_t bytes)
{
    memset(memory, 0xff, bytes);
    memset(memory + bytes, GUARD_BYTE, guard_bytes());
}

char *guarded_alloc(size_t bytes, unsigned at)
{
    void *page;
    char *memory;

    if (posix_memalign(&page, PAGE, at + bytes + guard_bytes()))
        return NULL;
    memory = (char *) page + at;
    guarded_clear(memory, bytes);
    return memory;
}

void guarded_free(char *memory)
{
    free(memory ? memory - (uintptr_t) memory % PAGE : NULL);
}

size_t check_guard(const void *memory, size_t bytes)
{
    const unsigned char *guard = (const unsigned char *) memory + bytes;

    for (size_t i = 0; i < guard_bytes(); i++)
        if (guard[i] != GUARD_BYTE)
            return 1 + i;
    return 0;
}

/* ---- CTAs ----------------------------------------------------------------- */

static void run_lane(void);

static void start_lane(struct warp *w, int i)
{
    struct lane *l = &w->lanes[i];
    const unsigned thread = (unsigned) (w->index * LANES + i);

    l->place = (struct mkhost_lane) {.thread = {thread, 0, 0},
                                     .block = {(unsigned) w->cta->index, 0, 0},
                                     .threads = {machine.block, 1, 1},
                                     .blocks = {machine.grid, 1, 1},
                                     .shared = w->cta->shared};
    l->warp = w;
    l->bit = 1u << i;
    l->doing = "not started";
    l->frame = l->about = NULL;
    l->patience = 0;
    progress(l);
    l->n_seen = l->fenced = 0;
    l->n_copies = l->busy = l->in_cluster = 0;
    l->passed = NULL;
    l->group = l->shown_writes = 0;
    fiber_start(&l->fiber, run_lane);
}

/* Fresh shared memory: the last launch's pages, if there are as many.  ThreadSanitizer wants others, or what the
   last CTA did there is a race. */
static int make_shared(struct cta *c)
{
    if (c->shared && c->shared_bytes == machine.smem && !__tsan_acquire) {
        guarded_clear(c->shared, machine.smem);
        return 0;
    }
    guarded_free(c->shared);
    c->shared = guarded_alloc(machine.smem, (unsigned) c->slot % 4 * 1024); /* they shall not all meet in a cache */
    c->shared_bytes = machine.smem;
    return c->shared ? 0 : -1;
}

static int start_cta(struct cta *c)
{
    c->index = (int) machine.next++;
    if (make_shared(c))
        return -1;
    memset(c->barriers, 0, sizeof c->barriers);
    memset(&c->cluster, 0, sizeof c->cluster);
    c->generation = 0;
    c->shown_writes = c->shown_generation = 0;
    c->live = (int) machine.block;
    for (int i = 0; i < c->n_warps; i++) {
        struct warp *w = &c->warps[i];
        w->live = w->n_lanes;
        memset(w->in, 0, sizeof w->in);
        w->in[READY] = ~0u >> (LANES - w->n_lanes);
        count_warp(w);
        w->met = 0;
        w->step = 1;
        w->watched = w->syncs = w->generation = 0;
        w->shown_syncs = 0;
        for (int lane = 0; lane < w->n_lanes; lane++)
            start_lane(w, lane);
    }
    return 0;
}

static void free_cta(struct cta *c)
{
    for (int i = 0; c && i < c->n_warps; i++)
        for (int lane = 0; lane < c->warps[i].n_lanes; lane++) {
            struct lane *l = &c->warps[i].lanes[lane];
            fiber_free(&l->fiber);
            free(l->copies);
            if (l->courier)
                __tsan_destroy_fiber(l->courier);
        }
    if (c) {
        mbarrier_free(c);
        guarded_free(c->shared);
        free(c->pending);
        free(c->stale);
        free(c->warps);
    }
    free(c);
}

static struct cta *make_cta(void)
{
    struct cta *c = calloc(1, sizeof *c);

    if (!c)
        return NULL;
    c->n_warps = (int) (machine.block + LANES - 1) / LANES;
    c->warps = aligned_alloc(CACHE_LINE, (size_t) c->n_warps * sizeof *c->warps);
    if (c->warps)
        memset(c->warps, 0, (size_t) c->n_warps * sizeof *c->warps);
    for (int i = 0; c->warps && i < c->n_warps; i++) {
        struct warp *w = &c->warps[i];
        w->cta = c;
        w->index = i;
        w->n_lanes = machine.block - (unsigned) i * LANES < LANES ? (int) machine.block - i * LANES : LANES;
        for (int lane = 0; lane < w->n_lanes; lane++)
            if (fiber_make(&w->lanes[lane].fiber))
                goto failed;
    }
    if (c->warps)
        return c;
failed:
    free_cta(c);
    return NULL;
}

/* ---- A launch ------------------------------------------------------------- */

/* Stacks are kept from launch to launch of the same shape. */
static void free_ctas(void)
{
    for (unsigned i = 0; machine.ctas && i < machine.resident; i++)
        free_cta(machine.ctas[i]);
    free(machine.ctas);
    free(machine.warps);
    free(machine.chances);
    machine.ctas = NULL;
    machine.warps = NULL;
    machine.chances = NULL;
}

static int make_ctas(unsigned block, unsigned resident)
{
    if (machine.ctas && machine.block == block && machine.resident == resident)
        return 0;
    free_ctas();
    machine.block = block;
    machine.resident = resident;
    machine.ctas = calloc(resident, sizeof *machine.ctas);
    for (unsigned i = 0; machine.ctas && i < resident; i++)
        if ((machine.ctas[i] = make_cta()))
            machine.ctas[i]->slot = (int) i;
        else
            return -1;
    machine.n_warps = machine.ctas ? (int) resident * machine.ctas[0]->n_warps : 0;
    machine.warps = calloc((size_t) machine.n_warps + 1, sizeof *machine.warps);
    machine.chances = calloc((size_t) machine.n_warps + 1, sizeof *machine.chances);
    if (!machine.ctas || !machine.warps || !machine.chances)
        return -1;
    for (int i = 0; i < machine.n_warps; i++) {
        machine.warps[i] = &machine.ctas[i / machine.ctas[0]->n_warps]->warps[i % machine.ctas[0]->n_warps];
        machine.warps[i]->number = i;
    }
    return 0;
}

int machine_launch(const char *name, void (*entry)(void **), void **args, unsigned grid, unsigned block,
                   unsigned smem, unsigned resident)
{
    if (resident > grid)
        resident = grid;
    machine.grid = grid;
    machine.smem = smem;
    machine.next = machine.gone = 0;
    if (make_ctas(block, resident)) {
        free_ctas();
        return -1;
    }
    for (unsigned i = 0; i < resident; i++)
        if (start_cta(machine.ctas[i]))
            return -1;
    proxy_forget();
    machine.launches++;
    machine.name = name;
    machine.entry = entry;
    machine.args = args;
    machine.n_late = machine.n_bulks = machine.n_busy = 0;
    machine.stalls = machine.failed = 0;
    machine.steps = machine.calm = 0; /* a seed's schedule does not depend on what ran before */
    machine.ended = NULL;
    machine.changed_at = machine.steps;
    machine.redraw_at = 0;
    machine.quantum = 1;
    free(machine.report);
    machine.report = NULL;
    draw_temper();
    draw_weights();
    machine.running = 1;
    release(&machine.running); /* what came before the launch is before every lane */
    return 0;
}

/* Other lanes of a launch that failed are left where they are. */
static void clean_up(void)
{
    for (unsigned i = 0; i < machine.resident; i++) {
        machine.ctas[i]->n_pending = machine.ctas[i]->n_strong = machine.ctas[i]->n_stale = 0;
        mbarrier_free(machine.ctas[i]);
    }
    machine.running = 0;
    acquire(&machine.gone);
}

int machine_run(int64_t steps)
{
    if (!machine.running)
        return 1;
    machine.slice = steps ? steps : INT64_MAX;
    machine.now = &machine.host;
    machine.host.fiber = (struct fiber) {0}; /* it may be another thread's */
    if (setjmp(machine.escape) == 0)
        do {
            if (machine.ended && start_cta(machine.ended))
                fail_launch("no memory for a CTA");
            machine.ended = NULL;
            reschedule();
        } while (machine.ended);
    show_view(NULL);
    mkhost_now = NULL;
    if (!machine.failed && machine.gone < machine.grid)
        return 0;
    clean_up();
    return 1;
}

/* The life of a lane. */
static void run_lane(void)
{
    struct lane *l = machine.now;
    struct cta *c = l->warp->cta;

    acquire(&machine.running);
    machine.entry(machine.args);
    release(&machine.gone);
    l->doing = "its end";
    l->frame = l->about = NULL;
    if (l->warp->met)
        misuse("a lane ends while others of its warp wait for it at %s", l->warp->meeting);
    if (l->n_copies)
        misuse("a thread ends with cp.asyncs on their way");
    wgmma_leave(l);
    set_state(l, GONE);
    l->warp->live--;
    c->live--;
    cluster_leave(l);
    if (c->live == 0) {
        if (c->copies)
            misuse("a CTA ends with %d copies on their way into its shared memory", c->copies);
        if (check_guard(c->shared, machine.smem))
            misuse("a store %zu bytes behind the end of the %u of shared memory",
                   check_guard(c->shared, machine.smem) - 1, machine.smem);
        settle_all(c);
        mbarrier_free(c);
        machine.gone++;
        if (machine.next < machine.grid)
            machine.ended = c; /* the host starts the next on its stacks, one of which is this */
    }
    reschedule();
}

/* ---- The scheduler -------------------------------------------------------- */

/* A ready lane of W: the next in the warp's order. */
static struct lane *lane_of(struct warp *w)
{
    return next_lane(w, machine.now->warp == w ? (unsigned) __builtin_ctz(machine.now->bit)
                                               : (unsigned) machine_random((uint64_t) w->n_lanes));
}

/* A warp that can go on, by weight; those without any only when there is no other.  NULL: none. */
static struct warp *choose_warp(void)
{
    unsigned at;
    int i = 0;

    if (!machine.able)
        return NULL;
    at = (unsigned) machine_random(machine.total ? machine.total : machine.able);
    if (machine.total)
        for (; at >= machine.chances[i]; i++)
            at -= machine.chances[i];
    else
        for (; !machine.warps[i]->in[READY] || at; i++)
            at -= machine.warps[i]->in[READY] != 0;
    return machine.warps[i];
}

/* The same without chance: round and round. */
static struct warp *next_warp(void)
{
    for (int i = 0; i < machine.n_warps; i++) {
        machine.calm = (machine.calm + 1) % (unsigned) machine.n_warps;
        if (machine.warps[machine.calm]->in[READY])
            return machine.warps[machine.calm];
    }
    return NULL;
}

/* Nothing is ready and nothing is late.  The clock goes on and everybody polls once more, long enough
   for the kernel's own watchdog; then it is a deadlock. */
static void stalled(void)
{
    if (machine.changes != machine.stalled_at)
        machine.stalls = 0; /* it was only slow */
    machine.stalled_at = machine.changes;
    if (++machine.stalls > STALLS) {
        fail_launch("deadlock");
        return;
    }
    machine.clock_ns += STALL_NS;
    for (int i = 0; i < machine.n_warps; i++)
        for (int lane = 0; lane < machine.warps[i]->n_lanes; lane++) {
            struct lane *l = &machine.warps[i]->lanes[lane];
            if (is_in(l, PARKED))
                set_state(l, READY);
            l->polls = 0;
            l->patience = STALL_POLLS;
        }
}

static int settle_any(int weak_too)
{
    unsigned at = (unsigned) machine_random(machine.resident);

    for (unsigned i = 0; i < machine.resident; i++) {
        struct cta *c = machine.ctas[at];
        if (c->n_pending + c->n_stale && settle_some(c, weak_too))
            return 1;
        at = at + 1 < machine.resident ? at + 1 : 0;
    }
    return 0;
}

/* Is it time for new weights?  In steps that are multiples of machine.redraw, but for those in which the host goes
   on, and once when the sleeper falls asleep. */
static int redraw_now(void)
{
    int now = machine.steps == machine.sleeps_at;

    if (machine.redraw && machine.steps >= machine.redraw_at) {
        const uint64_t behind = machine.steps % machine.redraw;
        now |= behind == 0;
        machine.redraw_at = machine.steps - behind + machine.redraw;
    }
    return now;
}

/* One thing that is late happens: a store is seen, a copy lands.  IDLE: no lane can go on without. */
static void happen(int idle)
{
    const int landing = machine.n_bulks + machine.n_busy + machine.n_products;

    if ((!landing || machine_random((uint64_t) machine.n_late) >= (uint64_t) landing) && settle_any(!machine.lazy))
        return;
    if (landing && (idle || !machine.slow_copies))
        land_some();
    else if (idle)
        settle_any(1);
}

void reschedule(void)
{
    struct lane *self = machine.now;
    struct warp *w;

    for (;;) {
        struct lane *next;
        machine.steps++;
        machine.clock_ns += STEP_NS;
        if (machine.failed || machine.gone == machine.grid || machine.ended || machine.slice-- <= 0) {
            if (self == &machine.host)
                return;
            switch_to(&machine.host);
            return;
        }
        if (machine.steps - machine.changed_at > LIVELOCK && !machine.failed) {
            machine.stalls = 1;
            machine.stalled_at = machine.changes;
            fail_launch("no word changes any more");
            continue;
        }
        if (redraw_now())
            draw_weights();
        if (!machine.seed)
            while (machine.n_late)
                happen(1);
        else if (machine.n_late && machine_random(1024) < machine.late_rate)
            happen(0);
        machine.quantum = machine.seed ? 1 + (int) machine_random((uint64_t) machine.quantum_most)
                                       : machine.quantum_most;
        w = machine.seed ? choose_warp() : next_warp();
        if (!w && machine.n_late) {
            happen(1);
            continue;
        }
        if (!w) {
            stalled();
            continue;
        }
        if (machine.seed && machine_random(8) == 0)
            w->step = -w->step;
        next = lane_of(w);
        if (next != self)
            switch_to(next);
        return;
    }
}

/* ---- Polling -------------------------------------------------------------- */

/* Only the part of an address that is the same in every run. */
static uint64_t hash_bit(const void *p)
{
    return 1ull << ((uintptr_t) p % 4096 / 16 * 0x9E3779B97F4A7C15ull >> 58);
}

/* Parked is who has read all it asks for once more, from wherever it was in its round, and nothing was
   new. */
void polled(struct lane *l, const void *p)
{
    const uint64_t bit = hash_bit(p);
    int i = 0;

    while (i < l->n_asked && l->asked[i] != p)
        i++;
    if (i == l->n_asked) {
        if (i == MOST_ASKED) /* forgets them all: a long round, which never parks */
            l->n_asked = 0;
        l->asked[l->n_asked++] = p;
        l->watched |= bit;
        l->warp->watched |= bit;
        l->polls = 0;
        return;
    }
    if (++l->polls <= ROUNDS + l->patience)
        return;
    set_state(l, PARKED);
    reschedule();
}

/* Whoever read the word before may poll on: parked lanes wake, and others are not parked now, or
   what they missed would never wake them.  So do the other lanes of their warps: what one of them sees, the others
   may be told. */
void changed(const void *p)
{
    const uint64_t bit = hash_bit(p);

    machine.changes++;
    machine.changed_at = machine.steps;
    for (int i = 0; i < machine.n_warps; i++) {
        struct warp *w = machine.warps[i];
        if (!(w->watched & bit))
            continue;
        w->watched = 0;
        for (int lane = 0; lane < w->n_lanes; lane++) {
            struct lane *l = &w->lanes[lane];
            if (is_in(l, PARKED))
                set_state(l, READY);
            l->polls = l->patience = 0;
            w->watched |= l->watched;
        }
    }
}
