/* machine.h - a GPU made of fibers.  Every CUDA thread is a lane with a stack of its own; one OS
   thread runs them all, and a seed decides who goes on whenever a lane calls a primitive.  What
   the memory model lets happen late happens late: copies, and stores that nothing ordered.
     machine.c  launch, scheduler          memory.c  stores, loads, fences, each CTA's view
     warp.c     collectives, barriers      copy.c    mbarriers, copy engine, cp.async
     proxy.c    what the copy engine and wgmma see of what threads wrote
     cluster.c  CTAs that reach each other's shared memory       wgmma.c   products of warpgroups
     report.c   what a stuck or misused machine says
     fiber.c    stacks and switches        driver.c  the CUDA driver API on top
   Numbers like 9.7.13.15 are sections of the PTX ISA manual, version 9.2 (that of CUDA 13.2). */
#ifndef HOST_MACHINE_H
#define HOST_MACHINE_H
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

/* What kernels and the driver's users call is seen outside (EXPORT), all else is not. */
#pragma GCC visibility push(hidden)
#define EXPORT __attribute__((visibility("default")))

enum { LANES = 32, WARPS = 32, BARRIERS = 16, MOST_SEEN = 16, MOST_ASKED = 12, MOST_CLUSTER = 16 };
enum { CACHE_LINE = 64 };

/* What a host kernel knows of the lane at work (templates/host/language.cu.m4). */
struct mkhost_place {
    unsigned x, y, z;
};
struct mkhost_lane {
    struct mkhost_place thread, block, threads, blocks;
    char *shared;
};
extern EXPORT struct mkhost_lane *mkhost_now;

enum lane_state {
    READY,
    MEETING, /* waits for the other lanes of its warp */
    WAITING, /* at a barrier, or for copies */
    PARKED,  /* reads the same words again and again: goes on when one of them changes */
    GONE
};

struct fiber {
    void *context; /* Boost's fcontext_t, while it does not run */
    char *stack;
    size_t stack_bytes;
    unsigned colour; /* its first frame lies so far below the top: if all began at a page's end, none would stay in a cache */
    void *fake_stack, *tsan; /* of the sanitizers */
};

struct lane_copy { /* one cp.async, or the arrival of those before it */
    uint64_t *bar; /* NULL: a copy */
    char *dst;
    const void *src;
    uint32_t bytes, group;
};

/* What every switch needs is in the first two cache lines. */
struct lane {
    struct mkhost_lane place; /* first: mkhost_now points here */
    struct warp *warp;
    const char *doing;  /* the primitive it is in */
    const void *frame;  /* of that call: where reports begin */
    const void *about;  /* the address it asks for, or NULL */
    void *meeting;      /* its arguments of a collective */
    uint32_t bit;       /* of its warp's lanes */
    /* what it polls since it last got on: the addresses, a bit for each, and polls of no news */
    int n_asked, polls, patience;
    uint64_t watched;
    struct fiber fiber;
    const void *asked[MOST_ASKED];
    uint32_t flag; /* what it is about to write over */
    /* fences, for ThreadSanitizer: what was read before one, what was written before one */
    const void *seen[MOST_SEEN];
    int n_seen, fenced;
    void *courier;
    /* the mbarrier whose phase this lane knows to have ended, and that phase's number + 1 */
    const void *passed;
    uint32_t passed_phase;
    uint32_t shown_writes; /* machine.writes at its last fence.proxy.async.global */
    /* cp.async */
    struct lane_copy *copies;
    int n_copies, room_copies, busy; /* busy: place in machine.busy + 1 */
    uint32_t group;
    /* has arrived at the barrier of its cluster, in this phase, and not waited yet */
    int in_cluster;
    uint64_t cluster_phase;
    char apart[CACHE_LINE]; /* an odd number of lines: neighbours do not meet in a cache */
} __attribute__((aligned(CACHE_LINE)));

struct warp {
    struct cta *cta;
    struct lane lanes[LANES];
    int index, n_lanes;
    int number;                 /* in machine.warps */
    int live;                   /* lanes that have not gone */
    uint32_t in[GONE + 1];      /* lanes in each state, a bit for each */
    int met, step;              /* at the collective; +1 or -1: who goes next */
    const char *meeting;        /* its name */
    uint64_t watched;           /* of its parked lanes */
    unsigned weight;            /* of the scheduler's choice */
    uint64_t syncs, generation; /* __syncwarps passed; cta->generation at its last barrier */
    uint32_t shown_syncs;       /* at the last fence.proxy.async.global of its lanes */
    char sync_clock[2];         /* what ThreadSanitizer is told */
    struct wgmmas *wgmmas;      /* NULL before its first wgmma.fence */
};

struct barrier {
    unsigned threads, arrived;
    uint64_t phase;
    char clock[2];
};

struct pending { /* a store that other CTAs do not see yet */
    char *address;
    uint32_t bytes;
    int strong;
    const struct lane *lane;
    uint64_t syncs, generation;
    char other[16]; /* what they see; while another CTA's view is on: what this one sees */
};

struct mbarrier {
    uint64_t *word; /* where it lies in shared memory */
    uint32_t expected, pending, phase;
    int64_t bytes;
    uint64_t generation; /* of the CTA's barriers, when the last phase ended */
    const struct lane *maker;
    uint32_t arrived[WARPS], before[WARPS]; /* lanes that have, in this phase and in the last */
    int fenced; /* the copy engine may come to it */
    int shown;  /* and other CTAs of the cluster may, after their barrier */
    int pushed; /* one of them has pushed to it */
    uint32_t from[MOST_CLUSTER], from_before[MOST_CLUSTER]; /* bytes that each rank has pushed, as above */
    char clock[2];
};

struct cta {
    int index, live; /* live: lanes */
    int slot;        /* in machine.ctas */
    char *shared;
    unsigned shared_bytes;
    int n_warps;
    struct warp *warps;
    struct barrier barriers[BARRIERS];
    uint64_t generation; /* barriers passed, of all ids */
    struct pending *pending, *stale; /* stale: what others wrote and this one does not see yet */
    int n_pending, n_strong, n_stale; /* n_strong: of the pending ones */
    struct mbarrier *mbarriers;
    int n_mbarriers;
    int copies; /* of the engine, on their way into its shared memory */
    char *proxied; /* shared memory as the async proxy is sure to see it; NULL: not at all */
    uint32_t shown_writes, shown_generation; /* as its lanes' and warps' */
    struct barrier cluster; /* in the CTA of rank 0: that of the cluster */
};

struct writer { /* of a strong store or a flag, the last one known */
    const void *at;
    uint32_t launch;
    int cta, warp, lane;
    uint64_t step;
};

struct bulk { /* a copy of the engine, or a push from another CTA */
    struct cta *cta;
    char *dst;
    const char *src; /* NULL: a push of VALUE */
    uint32_t bytes, writes; /* writes: machine.writes when it began */
    struct mbarrier *bar;
    uint32_t value[4];
};

struct machine {
    struct lane host; /* who launched */
    struct lane *now;
    struct cta *view; /* whose pending stores are in memory */
    /* the launch at work */
    void (*entry)(void **args);
    void **args;
    const char *name;
    unsigned grid, block, smem;
    unsigned resident; /* CTAs at once */
    unsigned cluster;  /* CTAs of a cluster; of the next launch, before it */
    uint32_t launches;
    unsigned next, gone; /* CTAs started; ended */
    struct cta **ctas, *ended; /* ended: to be started again */
    struct warp **warps;
    int n_warps, running;
    /* the schedule */
    uint64_t seed, rng;
    unsigned *chances;   /* of each warp: its weight, or 0 when no lane is ready */
    unsigned total, able; /* of all of these; warps with a lane that is ready */
    uint64_t redraw_at;
    int quantum, quantum_most;
    unsigned late_rate; /* of 1024: how often what is late happens */
    unsigned redraw;    /* steps between new weights; 0: all the same */
    int sleeper;        /* slot of a CTA that sleeps from step SLEEPS_AT on, or -1 */
    uint64_t sleeps_at;
    int lazy;           /* weak stores are seen when a fence says so, or nothing else can go on */
    int slow_copies;    /* copies land when nothing else can go on */
    unsigned calm;      /* of the calm schedule: the warp at work */
    int64_t slice;
    uint64_t steps, changes, changed_at, clock_ns;
    int n_late; /* pending and stale stores, copies */
    struct bulk *bulks;
    int n_bulks, room_bulks;
    struct lane **busy; /* lanes with cp.asyncs on their way */
    int n_busy, room_busy;
    int n_products; /* of all warps, not yet made */
    uint32_t writes; /* stores to global memory that are known */
    int engine;      /* this launch has mbarriers, and maybe bulk copies */
    /* the end of it */
    int stalls;
    uint64_t stalled_at; /* changes then */
    int failed;
    char *report;
    jmp_buf escape; /* of misuse() in the host's own turn, to the end of machine_run */
};
extern struct machine machine;

/* ---- machine.c ---- */

/* BYTES, all 0xff: NaN in every format, which is what nobody wrote.  Behind them are guards, which check_guard
   looks at: 0, or 1 + how far behind the end a byte was written.  They begin at AT of a page of 4096: an
   address modulo that is the same in every run, and so the schedule is.  NULL: no memory. */
char *guarded_alloc(size_t bytes, unsigned at);
void guarded_free(char *memory);
size_t check_guard(const void *memory, size_t bytes);

/* Start ENTRY in GRID blocks of BLOCK threads, RESIDENT of them at once; ARGS must live until it ends.
   Returns 0, or -1 without memory.  Nothing runs before machine_run. */
int machine_launch(const char *name, void (*entry)(void **), void **args, unsigned grid, unsigned block,
                   unsigned smem, unsigned resident);
/* Run for about STEPS decisions of the scheduler (0: to the end).  Returns 1 when the launch has ended
   (machine.failed tells how), 0 when there is more. */
int machine_run(int64_t steps);
/* Let another lane go on, or this one if it can. */
void reschedule(void);
/* The word at P is not what it was: those who poll it go on. */
void changed(const void *p);
/* The lane at work asks again and again for P. */
void polled(struct lane *l, const void *p);

/* Chance, drawn from the seed: a number below BELOW. */
static inline uint64_t machine_random(uint64_t below)
{
    uint64_t z = machine.rng += 0x9E3779B97F4A7C15ull;

    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    return (uint64_t) ((unsigned __int128) z * below >> 64);
}

static inline int is_in(const struct lane *l, enum lane_state state)
{
    return (l->warp->in[state] & l->bit) != 0;
}

/* W has got its first lane that is ready, or lost its last one. */
static inline void count_warp(const struct warp *w)
{
    const unsigned chance = w->in[READY] ? w->weight : 0;

    machine.able += w->in[READY] ? 1u : -1u;
    machine.total += chance - machine.chances[w->number];
    machine.chances[w->number] = chance;
}

static inline void set_state(struct lane *l, enum lane_state state)
{
    struct warp *w = l->warp;
    const uint32_t before = w->in[READY];

    for (int i = READY; i <= GONE; i++)
        w->in[i] &= ~l->bit;
    w->in[state] |= l->bit;
    if (!before != !w->in[READY])
        count_warp(w);
}

/* The next lane of W behind lane FROM that is ready, in the order that the warp has now; FROM itself is the last.
   There is one. */
static inline struct lane *next_lane(struct warp *w, unsigned from)
{
    const uint32_t ready = w->in[READY], above = ready & ~0u << from << 1, below = ready & ((1u << from) - 1);

    if (w->step > 0)
        return &w->lanes[__builtin_ctz(above ? above : ready)];
    return &w->lanes[31 - __builtin_clz(below ? below : ready)];
}

/* Every primitive begins with this: the lane at work, which may lose its turn here. */
static inline struct lane *enter(const char *name, const void *frame, const void *about)
{
    struct lane *l = machine.now;

    l->doing = name;
    l->frame = frame;
    l->about = about;
    if (--machine.quantum <= 0)
        reschedule();
    return l;
}
#define ENTER(name, about) enter(name, __builtin_frame_address(0), about)

/* The lane at work got on: what it asked for until now does not matter any more. */
static inline void progress(struct lane *l)
{
    l->n_asked = l->polls = 0;
    l->watched = 0;
}

/* ---- memory.c ---- */
/* CTA's pending stores are in memory, and no other's. */
void show_view(struct cta *cta);
/* One store, of CTA or that CTA does not see yet, is seen: 1, or 0 when there is none (but for weak ones);
   all of them are. */
int settle_some(struct cta *cta, int weak_too);
void settle_all(struct cta *cta);

/* The BYTES at FROM as CTA sees them, whoever is at work. */
void read_as(const struct cta *cta, void *to, const void *from, uint32_t bytes);

/* Who wrote to P in this launch; NULL: nobody, or it is forgotten. */
const struct writer *find_writer(const void *p);

/* Stores that the fence of lane L orders are seen by all. */
void commit_before(struct lane *l);

/* ---- warp.c ---- */
/* Lane L comes to a collective of its warp with ARGS.  True in the lane that comes last, which does the
   work for all and then calls part(). */
int meet(struct lane *l, const char *name, void *args);
void part(struct warp *w);

/* ---- copy.c ---- */
void land_some(void);
void mbarrier_free(struct cta *cta);
/* The mbarrier of CTA at WORD; the launch ends when there is none. */
struct mbarrier *find_mbarrier(struct cta *cta, uint64_t *word);
/* Copy C is on its way. */
void start_bulk(struct bulk c);

/* ---- proxy.c ---- */
/* Lane L has written BYTES to global memory. */
void proxy_wrote(const struct lane *l, const void *p, uint32_t bytes);
/* A launch begins. */
void proxy_forget(void);
/* The engine comes to shared memory, or for lane L to global memory, of which all that was written is fenced. */
void proxy_check_shared(const struct cta *cta, const char *p, uint32_t bytes);
void proxy_check_global(const struct lane *l, const char *p, uint32_t bytes);
/* A copy lands: nobody has written to P since. */
void proxy_check_landing(const char *p, uint32_t bytes, uint32_t since);

/* ---- cluster.c ---- */
/* Lane L, which does not live any more, is not waited for. */
void cluster_leave(struct lane *l);
/* The barrier of CTA's cluster. */
struct barrier *cluster_barrier(const struct cta *cta);
/* What L, which waits there, waits for. */
void cluster_explain(FILE *f, const struct lane *l);

/* ---- wgmma.c ---- */
/* One of the products that are at work is made. */
void multiply_some(void);
/* Lane L ends. */
void wgmma_leave(struct lane *l);
/* CTA has ended. */
void wgmma_free(struct cta *cta);
void wgmma_explain(FILE *f, const struct lane *l);

/* ---- report.c ---- */
/* End the launch with this text.  Does not return into a lane. */
void misuse(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
void fail_launch(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* All lanes that wait, for what and where; malloc'd. */
char *report_waiting(void);
void report_label(uint64_t base, uint64_t bytes, const char *name,
                  void (*text)(void *, uint64_t, char *, size_t), void *user);

/* ---- fiber.c ---- */
int fiber_make(struct fiber *f);
void fiber_free(struct fiber *f);
void fiber_start(struct fiber *f, void (*run)(void));
/* LEAVE: the run of FROM is over, and this is the last switch away. */
void fiber_switch_watched(struct fiber *from, struct fiber *to, int leave);

#pragma GCC visibility pop

/* Boost.Context's C functions. */
struct transfer {
    void *context, *data;
};
extern struct transfer jump_fcontext(void *to, void *data);

/* What the sanitizers of this process are told, if there are any. */
extern void __tsan_acquire(void *) __attribute__((weak));
extern void __tsan_release(void *) __attribute__((weak));
extern void *__tsan_create_fiber(unsigned) __attribute__((weak));
extern void *__tsan_get_current_fiber(void) __attribute__((weak));
extern void __tsan_switch_to_fiber(void *, unsigned) __attribute__((weak));
extern void __tsan_destroy_fiber(void *) __attribute__((weak));
extern void __tsan_read_range(void *, size_t) __attribute__((weak));
extern void __tsan_write_range(void *, size_t) __attribute__((weak));
extern void *__asan_region_is_poisoned(void *, size_t) __attribute__((weak));
extern void __sanitizer_start_switch_fiber(void **, const void *, size_t) __attribute__((weak));
extern void __sanitizer_finish_switch_fiber(void *, const void **, size_t *) __attribute__((weak));
extern void __asan_unpoison_memory_region(void const volatile *, size_t) __attribute__((weak));

/* Here, for a call more is a frame more on a stack that is in no cache. */
static inline void fiber_switch(struct fiber *from, struct fiber *to, int leave)
{
    struct transfer t;

    if (__tsan_switch_to_fiber || __sanitizer_start_switch_fiber) {
        fiber_switch_watched(from, to, leave);
        return;
    }
    t = jump_fcontext(to->context, from);
    ((struct fiber *) t.data)->context = t.context; /* who stopped keeps its place */
}

static inline void switch_to(struct lane *to)
{
    struct lane *from = machine.now;

    machine.now = to;
    if (to->warp) {
        mkhost_now = &to->place;
        if (machine.view != to->warp->cta)
            show_view(to->warp->cta);
    }
    fiber_switch(&from->fiber, &to->fiber, from->warp && is_in(from, GONE));
}

static inline void acquire(void *clock)
{
    if (__tsan_acquire)
        __tsan_acquire(clock);
}
static inline void release(void *clock)
{
    if (__tsan_release)
        __tsan_release(clock);
}
#endif
