/* predict.c - see predict.h.

   The model.  A CTA goes through the stages of a token one after the other.  A stage takes as long
   as its work, or until the bytes that it multiplies have come, whichever is longer:

       max(work, (bytes - those in the ring) / rate)

   The producer brings bytes all the time, until the ring is full; what came during one stage is
   there for the next.  The rate is what the chunks in flight bring, and no more than the CTA's
   share of the memory.  A hop ends a latency after the last of those that send has come to it: the
   CTAs of a group wait for each other five times in a layer, and all groups twice.  Through L2 the
   latency is longer the more is in flight, which is nothing where rings are full; and while such a
   hop is awaited, fewer chunks are let in flight.  Where CTAs wait for bytes, what is multiplied at
   once has come to some when to others it is still on its way: a hop waits for the last of them.

   CTAs of one rank in groups of one class do the same: one *lane* stands for all of them. */
#include "config.h"

#include <string.h>

#include "gen/predict.h"

/* ---- The constants, all of them ------------------------------------------- */

/* How to measure them again, on a GPU that is idle otherwise:

       mkbench qwen3-0.6b -r --stages --prefill none --pos 1,1024,4096,32000 --context 33000
       mkbench llama-3.2-1b -r --stages --prefill none --pos 128
       mkbench qwen3-8b -r --stages --prefill none --pos 128
       mkbench qwen2.5-7b -r --stages --prefill none --pos 128,1024,4000       (few heads; team)
       mkbench qwen2.5-0.5b -r --stages --prefill none --pos 1024 --set group=16
       mkbench MODEL -r --stages --prefill none --pos 128,1024 --set cluster=l2

   prints each stage beside what is predicted, and the difference in percent.  Where a stage waits
   for the ring (in brackets) the table of rates decides, elsewhere the table of work. */

/* Of a GPU. */
struct rates {
    const char *gpu;       /* profile */
    double read_gbps;      /* mkbench's "read bandwidth", 1e9 bytes a second */
    double clock_mhz;      /* cycles of a token's stages / its time */
    double slowest;        /* part of its share of read_gbps that the slowest CTA gets */
    double cta_bytes;      /* a cycle: what the ring of one CTA takes in at most */
    double kv_bytes;       /* the same of tiles of the cache */
    double smem_bytes;     /* a cycle: what one CTA multiplies from its ring */
    double latency_ns;     /* from the start of a copy until it has landed */
    double hop_cluster_ns; /* over distributed shared memory */
    double hop_l2_ns;      /* through L2, nothing else in flight */
    double hop_queue;      /* part of what is in flight that a hop through L2 stands behind */
};

/* h200, 2026-11-30:
   read_gbps       4590 to 4610 in the run of tests/t-predict.c's figures, 4680 to 4710 on others.
   clock_mhz       inferred: the stages with timing=on over their time, 1740 (0.6B) to 1860
                   (SmolLM2-135M).  The column MHz says 1980, and no limit of power or heat is
                   reached; but under load each GPC has its own clock: of cluster=l2, which ncu can
                   look at, 1790 to 1900 in one launch.
   slowest         fitted: the head of models that wait for memory, with NEXT, which waits for the
                   last CTA.
   cta_bytes       fitted: q, k, v of Qwen2.5-7B, which 32 CTAs read at 38 to 42.
   kv_bytes        fitted: position 32600 of 0.6B, whose KV tiles 64 CTAs read at 30 or more.
   smem_bytes      what shared memory gives; NOTEBOOK.md: 490 cycles for 64 KiB.
   latency_ns      fitted: inflight=2, inflight_hop=1 of 0.6B and 3, 1 of Llama-3.2-1B, an earlier kernel.  Of a chunk
                   of 16 KiB under load, with its own transfer and until it is told of.
   hop_cluster_ns  a stopwatch kernel: 290 to 320 at any load, groups of 8 and 16.
   hop_l2_ns       the same, idle, groups of 16 CTAs; 1000 when all send to all.
   hop_queue       fitted: DOWN_SUMS of 0.6B and 0.5B, 700 and 1000 cycles longer than of
                   SmolLM2-135M. */
static const struct rates rates[] = {
    {"h200", 4600, 1790, 0.95, 40, 32, 128, 1100, 300, 750, 0.3},
};
enum { N_RATES = sizeof rates / sizeof *rates };

/* Work of a stage, in cycles, on any GPU: it is the same code.  For hops it is what comes on top of
   the latency: looking for words, adding them up, leaving and entering stages.

   From stages with timing=on on the H200 (2026-11-30), less a lap's own cycles: the six models of
   README.md's table, means over 64 tokens; what is said of groups through L2, of 4 and of 16 from those and
   seven more.  Where they differ by more than the shape says, a value between; latencies of hops are taken off. */
struct work {
    double fixed, each;
    double apart; /* of a hop: the part of what CTAs are apart that it waits for; fitted */
    double l2;    /* where groups are not clusters, on top of FIXED; fitted to six models, cluster=l2 */
};
static const struct work work[MK_LAP_COUNT] = {
    [MK_LAP_EMBED] = {1750, 0.45}, /* each: of D */
    [MK_LAP_QKV] = {960, 150}, /* of a round of blocks; each: trip to the ring when x is there */
    [MK_LAP_QKV_HOP] = {30, 0, 0, -350},
    [MK_LAP_ROWS] = {270, 430},  /* of a row that a warp rotates; each: its norm */
    [MK_LAP_ATTN] = {1000, 275}, /* of a head; each: turn of tiles and 8 queries, of 64 of E, and TURN more */
    [MK_LAP_PART] = {590, 46},   /* of a head; each: warp that has attended */
    [MK_LAP_PART_HOP] = {500, 0},
    [MK_LAP_MERGE] = {330, 0.11}, /* each: value from a rank that has tiles */
    [MK_LAP_O] = {560, 950, 0, 900}, /* of the first trip to the ring; each: of those behind it, sets of pairs multiplied */
    [MK_LAP_O_SUMS] = {520, 0, 1, 1200},
    [MK_LAP_O_X] = {850, 400, 0, 600}, /* each: trip to the ring before x is there; x itself: see get_x */
    [MK_LAP_MLP] = {1200, 150}, /* as QKV */
    [MK_LAP_MLP_HOP] = {560, 0, 0.6, -500},
    [MK_LAP_DOWN] = {560, 950, 0, 900}, /* as O */
    [MK_LAP_DOWN_SUMS] = {520, 0, 0.6, 2800},
    [MK_LAP_DOWN_X] = {350, 400, 0.4, 1000}, /* as O_X */
    [MK_LAP_HEAD] = {960, 150}, /* as QKV */
    [MK_LAP_NEXT] = {4400, 0, 1, 4000},
};

/* A matrix split by rows of which a CTA has none. */
enum { EMPTY_CALL = 170 };
/* What does not depend on E in a turn of attention, over what 64 of E take. */
static const double TURN = 1.8;
/* A trip for a part of long blocks, for which x is read again, over one for whole blocks. */
enum { LONG_TRIP = 3 };
/* Of x: from a rank of a cluster, beyond those of one of 8 (fitted: Qwen2.5-0.5B and SmolLM2-360M, group=16); an
   element through L2 (O_X, DOWN_X of six models, cluster=l2). */
enum { X_RANK = 120, FEW_RANKS = 8 };
static const double X_ELEMENT = 0.5;
/* Of the sums of a CTA: a word (hop O of plan_hops), beyond those that it reads while it waits.  Fitted: groups of 2
   and 4 of Qwen3-0.6B, SmolLM2-1.7B and 360M, groups of 4 of Llama-3.2-3B and Qwen2.5-7B. */
enum { PAIR_WORDS = 6, FEW_SUMS = 1000 };
static const double SUM_WORD = 0.5;
/* early=sums with more than so many warps leaves too few registers: an x more (SmolLM2-360M). */
enum { MOST_EARLY_WARPS = 6, CROWDED = 900 };
/* A value that PART sends to another rank of a cluster, beyond those that go along with the rest (Qwen2.5, 6 or 7
   queries a KV head, groups of 8 and 16). */
static const double SENT = 0.25;
enum { SENT_ALONG = 2500 };
/* What MERGE reads of a rank through L2 (Qwen3-0.6B, cluster=l2, groups of 4, 8 and 16). */
enum { MERGE_L2 = 500 };
/* What a lap itself takes, with timing=on. */
enum { LAP = 170 };

/* A GPU that was not measured has the first one's cycles, and as large a part of its data sheet's
   clock and bandwidth. */
static struct rates rates_of(const struct gen_gpu *g, int *measured)
{
    const struct rates *first = &rates[0];
    const char *dash = strrchr(g->name, '-'); /* a device's name: nvidia-h200 */
    struct rates r = *first;
    struct gen_gpu known;

    *measured = 1;
    for (int i = 0; i < N_RATES; i++)
        if (!g->host && !strcmp(dash ? dash + 1 : g->name, rates[i].gpu))
            return rates[i];
    *measured = 0;
    if (gen_gpu_read(first->gpu, &known, NULL))
        return r;
    if (g->clock_mhz && known.clock_mhz)
        r.clock_mhz = first->clock_mhz * g->clock_mhz / known.clock_mhz;
    if (g->mem_gbps)
        r.read_gbps = first->read_gbps * g->mem_gbps / known.mem_gbps;
    return r;
}

/* ---- Lanes ----------------------------------------------------------------- */

enum { MOST_RANKS = 16, LANES = GEN_CLASSES * MOST_RANKS };

/* How blocks of rows are taken from the ring: BLOCKS at once, of each BYTES in a trip, each several times; EARLY:
   before x is there. */
struct trips {
    int each, blocks, early;
    double bytes;
};

/* The halves of a layer: in the first one groups without heads have nothing to do. */
enum { ATTENTION, MLP };

struct lane {
    const struct gen_class *cls;
    int rank, kind;
    double now;   /* cycles since the token began */
    double ahead; /* bytes in the ring */
    double apart; /* cycles by which the last one of its like comes later; at most a trip's of rows */
    double cycles[MK_LAP_COUNT], waited[MK_LAP_COUNT];
};

struct sim {
    const struct gen_plan *p;
    struct rates r;
    int pos, far, half;        /* far: helpers help */
    double lap;                /* cycles that a stage takes to be timed */
    double chunk, ring;        /* bytes that a chunk and the ring hold */
    struct trips trips;        /* of matrices that are split by rows */
    double rate[2][GEN_KINDS]; /* in each half: bytes a cycle that a CTA's producer brings */
    double heads_rate; /* the same of q, k, v and O, which have a number of chunks in flight of their own */
    double kv_rate; /* the same of the cache, of which as much is in flight as the ring holds */
    struct lane lane[LANES];
    int n;
};

static double max_of(double a, double b)
{
    return a > b ? a : b;
}

static double min_of(double a, double b)
{
    return a < b ? a : b;
}

static int ceil_div(int a, int b)
{
    return (a + b - 1) / b;
}

/* Of N, dealt in turn by STEP over OF, what the one of number NTH gets. */
static int dealt(int n, int step, int of, int nth)
{
    return ceil_div(n / step - nth, of) * step;
}

/* What N chunks in flight bring in a cycle. */
static double flying_rate(const struct sim *s, int n)
{
    return n * s->chunk / (s->r.latency_ns * s->r.clock_mhz / 1000);
}

/* LANE spends WORK cycles on STAGE, or longer: until BYTES, at RATE, have come; then others come, at the rate BEHIND. */
static void spend_at(const struct sim *s, struct lane *lane, int stage, double work_cycles,
                     double bytes, double rate, double behind)
{
    const double missing = max_of(0, bytes - lane->ahead), coming = missing > 0 ? missing / rate : 0;
    const double busy = work_cycles + s->lap, late = max_of(0, coming - busy), all = busy + late;

    if (late > 0 && s->p->cluster) /* fitted to plans with clusters only */
        lane->apart = max_of(lane->apart, min_of(late, s->trips.blocks * s->trips.bytes / rate));
    lane->ahead = min_of(s->ring, lane->ahead + missing - bytes + behind * (all - coming));
    lane->now += all;
    lane->cycles[stage] += all;
    lane->waited[stage] += late;
}

static void spend(const struct sim *s, struct lane *lane, int stage, double work_cycles,
                  double bytes)
{
    const double rate = s->rate[s->half][lane->kind];

    spend_at(s, lane, stage, work_cycles, bytes,
             stage == MK_LAP_QKV || stage == MK_LAP_O ? s->heads_rate : rate, rate);
}

/* ---- Hops ------------------------------------------------------------------ */

/* Who: lanes with KV heads, those that help them, both, lanes with units of the MLP, all. */
enum who { HEADS, HELPERS, ATTEND, UNITS, ALL };
/* Whom a lane waits for, among those that send: its group, its rank in all groups, everybody. */
enum whom { GROUP, RANK, GRID };

/* A class that begins with helpers counts as a whole. */
static int is_one(const struct sim *s, const struct lane *lane, enum who who)
{
    const int heads = lane->cls->heads > 0;
    const int helps = s->far && !heads && lane->cls->first < s->p->model.K * s->p->team;

    return who == HEADS     ? heads
           : who == HELPERS ? helps
           : who == ATTEND  ? heads || helps
                            : who == ALL || lane->cls->units > 0;
}

static int hears(const struct lane *to, const struct lane *from, enum whom whom)
{
    return whom == GRID || (whom == GROUP ? to->cls == from->cls : to->rank == from->rank);
}

/* What all CTAs together read in a cycle. */
static double gpu_bytes(const struct rates *r)
{
    return r->read_gbps * r->slowest * 1000 / r->clock_mhz;
}

/* The rate at which LANE's ring fills while a hop through L2 is awaited. */
static double held_rate(const struct sim *s, const struct lane *lane)
{
    return min_of(s->rate[s->half][lane->kind], flying_rate(s, s->p->inflight_hop));
}

/* What a hop through L2 waits behind the stream, when all have sent at the time WHEN: rings that
   are full have nothing in flight; the others begin with INFLIGHT chunks and end with
   INFLIGHT_HOP. */
static double queue_cycles(const struct sim *s, double when)
{
    const double most = (s->p->inflight + s->p->inflight_hop) / 2.0 * s->chunk;
    double bytes = 0; /* of all CTAs */

    for (int i = 0; i < s->n; i++) {
        const struct lane *lane = &s->lane[i];
        const double came = held_rate(s, lane) * max_of(0, when - lane->now);
        bytes += lane->cls->groups * min_of(most, max_of(0, s->ring - lane->ahead - came));
    }
    return s->r.hop_queue * bytes / gpu_bytes(&s->r);
}

static double latest(const struct sim *s, enum who send)
{
    double last = 0;

    for (int i = 0; i < s->n; i++)
        if (is_one(s, &s->lane[i], send))
            last = max_of(last, s->lane[i].now);
    return last;
}

/* Does LANE read the weights of what follows hop STAGE while it waits?  With early=sums it is done before. */
static int reads_early(const struct sim *s, const struct lane *lane, int stage)
{
    const int blocks = stage == MK_LAP_O_X ? lane->cls->units : is_one(s, lane, ATTEND);

    return (stage == MK_LAP_O_X || stage == MK_LAP_DOWN_X) && blocks && s->trips.early && !s->p->early;
}

/* What x takes on top of what other vectors do. */
static double get_x(const struct sim *s)
{
    const struct gen_plan *p = s->p;
    const double crowded = p->early && p->warps > MOST_EARLY_WARPS ? CROWDED : 0;

    return p->cluster ? X_RANK * max_of(0, p->group - FEW_RANKS) + crowded : X_ELEMENT * p->model.D;
}

/* What sums of many groups take on top. */
static double get_sums(const struct sim *s)
{
    return SUM_WORD * max_of(0, s->p->groups * s->p->rank_pairs * PAIR_WORDS - FEW_SUMS);
}

static double fixed(const struct sim *s, int stage)
{
    const double alike = work[stage].fixed + (s->p->cluster ? 0 : work[stage].l2);

    return stage == MK_LAP_O_X || stage == MK_LAP_DOWN_X         ? alike + get_x(s)
           : stage == MK_LAP_O_SUMS || stage == MK_LAP_DOWN_SUMS ? alike + get_sums(s)
                                                                 : alike;
}

/* Those who TAKE wait for those who SEND, over distributed shared memory or through L2. */
static void hop(struct sim *s, int stage, enum whom whom, enum who send, enum who take)
{
    const int on_chip = whom == GROUP && s->p->cluster;
    const double ns = on_chip ? s->r.hop_cluster_ns : s->r.hop_l2_ns;
    const double queue = on_chip ? 0 : queue_cycles(s, latest(s, send));
    const double latency = fixed(s, stage) + ns * s->r.clock_mhz / 1000 + queue;
    double last[LANES], apart[LANES];

    for (int i = 0; i < s->n; i++) {
        last[i] = s->lane[i].now;
        apart[i] = 0;
        for (int j = 0; j < s->n; j++)
            if (is_one(s, &s->lane[j], send) && hears(&s->lane[i], &s->lane[j], whom)) {
                last[i] = max_of(last[i], s->lane[j].now);
                apart[i] = max_of(apart[i], s->lane[j].apart);
            }
    }
    for (int i = 0; i < s->n; i++) {
        struct lane *lane = &s->lane[i];
        const double early = reads_early(s, lane, stage) ? work[stage].each : 0;
        const double rate = on_chip ? s->rate[s->half][lane->kind] : held_rate(s, lane);
        if (!is_one(s, lane, take))
            continue;
        spend_at(s, lane, stage, last[i] - lane->now + latency + early + work[stage].apart * apart[i], 0, rate, rate);
        if (stage == MK_LAP_O_X || stage == MK_LAP_DOWN_X || stage == MK_LAP_NEXT)
            lane->apart = 0;
    }
}

/* ---- Stages ---------------------------------------------------------------- */

/* How multiply_round of gemv.cu.m4 takes blocks from the ring. */
static struct trips trips_of(const struct gen_plan *p)
{
    const struct gen_phase *f = &p->phase[GEN_HEAD];
    struct trips t = {.each = 1, .blocks = 2 * p->batch.pairs, .early = 2 * p->batch.early};

    t.bytes = f->units * 512.0;
    if (f->spans > 1) {
        const int parts = ceil_div(f->spans, p->batch.spans);
        t.each = parts * LONG_TRIP;
        t.blocks = t.early = 2;
        t.bytes /= parts;
    }
    if (!p->cluster)
        t.early = 0;
    return t;
}

/* BLOCKS of a matrix that is split by rows. */
static void rows(const struct sim *s, struct lane *lane, int stage, int blocks)
{
    const struct trips *t = &s->trips;
    const double block_bytes = s->p->phase[GEN_HEAD].units * 512.0;
    const int rounds = ceil_div(blocks, s->p->round_blocks), late = blocks > t->early ? blocks - t->early : 0;
    const double trips = t->each * ceil_div(late, t->blocks);
    const double busy = work[stage].fixed * rounds + work[stage].each * trips + late * block_bytes / s->r.smem_bytes;

    spend(s, lane, stage, blocks ? busy : EMPTY_CALL, blocks * block_bytes);
}

/* UNITS of a matrix that is split by columns. */
static void columns(const struct sim *s, struct lane *lane, int stage, int units)
{
    const int span = s->p->phase[stage == MK_LAP_O ? GEN_O : GEN_DOWN].span_units;
    const double bytes = dealt(s->p->pairs, 1, s->p->group, lane->rank) * 1024.0 * units;
    const double trips = s->p->sets * ceil_div(units, span * s->p->batch.columns);

    if (units)
        spend(s, lane, stage, max_of(fixed(s, stage) + work[stage].each * (trips - 1), bytes / s->r.smem_bytes),
              bytes);
}

/* KV heads to which LANE attends: its own, or as a helper another's. */
static int heads_of(const struct sim *s, const struct lane *lane)
{
    return is_one(s, lane, HELPERS) ? 1 : lane->cls->heads;
}

static void qkv(const struct sim *s, struct lane *lane)
{
    const struct gen_model *m = &s->p->model;
    const int blocks = heads_of(s, lane) * (m->H / m->K + 2) * m->E / 8;

    rows(s, lane, MK_LAP_QKV, dealt(blocks, 1, s->p->group, lane->rank));
}

/* Of the first POSITIONS, LANE's tiles of a head, as they are dealt in team.cu.m4. */
static int tiles_of(const struct sim *s, const struct lane *lane, int positions)
{
    const int member = s->far ? lane->cls->first / s->p->model.K : 0, group = s->p->group;

    return ceil_div(ceil_div(positions, s->p->kv_tile) - member * group - lane->rank,
                    group * (s->far ? s->p->team : 1));
}

/* Norm and rotate; attend to the tiles of each head, as many at once as warps can share; merge the
   warps' sums and send them.  A rank without tiles does nothing.  The tile of this position comes
   through the ring, but there is nothing to attend to if no cached position lies in it. */
static void attention(const struct sim *s, struct lane *lane)
{
    const struct gen_plan *p = s->p;
    const int heads = heads_of(s, lane), ratio = p->model.H / p->model.K;
    const int tiles = tiles_of(s, lane, s->pos + 1);
    const int cached = (int) max_of(0, tiles_of(s, lane, s->pos));
    const int parts = p->kv_tile / 16, at_once = p->warps / parts ? p->warps / parts : 1;
    const int turns = ceil_div(cached, at_once),
              row_turns = ceil_div(heads * (ratio + 2), p->warps);
    const double queries = ceil_div(ratio, 8), bytes = (double) tiles * p->kv_tile * p->model.E * 4;
    const double values = p->model.E / 64.0;
    const int warps = (int) min_of(p->warps, cached * parts);
    const struct work *row = &work[MK_LAP_ROWS], *attn = &work[MK_LAP_ATTN],
                      *part = &work[MK_LAP_PART];
    const double sent = p->cluster ? SENT * max_of(0, ratio * p->model.E * p->group - SENT_ALONG) : 0;

    if (!heads || tiles <= 0)
        return;
    spend(s, lane, MK_LAP_ROWS, row_turns * (row->fixed + row->each * p->model.qk_norm), 0);
    for (int i = 0; i < heads; i++) {
        spend_at(s, lane, MK_LAP_ATTN, attn->fixed + attn->each * turns * queries * (TURN + values), bytes,
                 s->kv_rate, min_of(s->rate[ATTENTION][lane->kind], s->rate[MLP][lane->kind]));
        spend(s, lane, MK_LAP_PART, part->fixed + part->each * warps + sent, 0);
    }
}

/* Merge what the ranks have sent. */
static void merge(const struct sim *s, struct lane *lane)
{
    const struct gen_model *m = &s->p->model;
    const struct work *w = &work[MK_LAP_MERGE];
    const int ranks = (int) min_of(s->p->group, s->pos / s->p->kv_tile + 1);
    const double rank = s->p->cluster ? w->each * (m->H / m->K) * m->E : MERGE_L2;

    if (is_one(s, lane, ATTEND))
        spend(s, lane, MK_LAP_MERGE, w->fixed + rank * ranks, 0);
}

static void o(const struct sim *s, struct lane *lane)
{
    const struct gen_model *m = &s->p->model;

    columns(s, lane, MK_LAP_O, lane->cls->heads * (m->H / m->K) * m->E / 32);
}

static void gate_and_up(const struct sim *s, struct lane *lane)
{
    rows(s, lane, MK_LAP_MLP, dealt(lane->cls->units * 8, 2, s->p->group, lane->rank));
}

static void down(const struct sim *s, struct lane *lane)
{
    columns(s, lane, MK_LAP_DOWN, lane->cls->units);
}

/* The blocks of the lane's first group: of its groups that one has the most. */
static void head(const struct sim *s, struct lane *lane)
{
    const int cta = lane->cls->first * s->p->group + lane->rank;

    rows(s, lane, MK_LAP_HEAD, dealt(s->p->phase[GEN_HEAD].blocks, 1, s->p->ctas, cta));
}

static void embed(const struct sim *s, struct lane *lane)
{
    spend(s, lane, MK_LAP_EMBED, work[MK_LAP_EMBED].fixed + work[MK_LAP_EMBED].each * s->p->model.D, 0);
}

static void each_lane(struct sim *s, void (*stage)(const struct sim *, struct lane *))
{
    for (int i = 0; i < s->n; i++)
        stage(s, &s->lane[i]);
}

/* As layers() of decode.cu.m4. */
static void layer(struct sim *s)
{
    s->half = ATTENTION;
    each_lane(s, qkv);
    hop(s, MK_LAP_QKV_HOP, GROUP, ATTEND, ATTEND);
    each_lane(s, attention);
    hop(s, MK_LAP_PART_HOP, GROUP, ATTEND, ATTEND);
    each_lane(s, merge);
    if (s->far)
        hop(s, MK_LAP_MERGE, GRID, HELPERS, HEADS);
    each_lane(s, o);
    hop(s, MK_LAP_O_SUMS, RANK, HEADS, ALL);
    s->half = MLP;
    hop(s, MK_LAP_O_X, GROUP, ALL, ALL);
    each_lane(s, gate_and_up);
    hop(s, MK_LAP_MLP_HOP, GROUP, UNITS, UNITS);
    each_lane(s, down);
    hop(s, MK_LAP_DOWN_SUMS, RANK, UNITS, ALL);
    hop(s, MK_LAP_DOWN_X, GROUP, ALL, ALL);
}

static void token(struct sim *s)
{
    s->half = MLP; /* the embedding and the head are everybody's, too */
    for (int i = 0; i < s->n; i++) {
        s->lane[i].now = 0;
        memset(s->lane[i].cycles, 0, sizeof s->lane[i].cycles);
        memset(s->lane[i].waited, 0, sizeof s->lane[i].waited);
    }
    each_lane(s, embed);
    for (int i = 0; i < s->p->model.L; i++)
        layer(s);
    each_lane(s, head);
    hop(s, MK_LAP_NEXT, GRID, ALL, ALL);
}

/* ---- A prediction ----------------------------------------------------------- */

/* What a CTA's producer brings in a cycle with INFLIGHT chunks in flight: no more than one CTA takes in, than
   these allow, and than its share of LEFT, the bytes a cycle that CTAS may read together. */
static double cta_rate(const struct sim *s, double left, int ctas, int inflight)
{
    return min_of(left / ctas, min_of(s->r.cta_bytes, flying_rate(s, inflight)));
}

/* In attention's half groups with heads come first, as the rings of the others are full soon.  Far on, helpers
   read the same weights from L2, and all share the memory for the cache. */
static void set_rates(struct sim *s, const int ctas[GEN_KINDS])
{
    const double gpu = gpu_bytes(&s->r);
    const int inflight = s->p->inflight, with = ctas[GEN_WITH_HEADS], others = ctas[GEN_OTHERS];
    const double all = cta_rate(s, gpu, s->p->ctas, inflight);

    s->heads_rate = cta_rate(s, gpu, with, s->p->inflight_heads);
    s->kv_rate = min_of(s->r.kv_bytes, cta_rate(s, gpu, s->far ? s->p->ctas : with, s->p->stages));
    for (int kind = 0; kind < GEN_KINDS; kind++)
        s->rate[MLP][kind] = s->rate[ATTENTION][kind] = all;
    if (s->far)
        return;
    s->rate[ATTENTION][GEN_WITH_HEADS] = cta_rate(s, gpu, with, inflight);
    if (others)
        s->rate[ATTENTION][GEN_OTHERS] = cta_rate(s, max_of(0, gpu - s->heads_rate * with), others, inflight);
}

static void set_lanes(struct sim *s)
{
    for (int i = 0; i < s->p->n_classes * s->p->group; i++) {
        const struct gen_class *c = &s->p->cls[i / s->p->group];
        s->lane[i] = (struct lane){.cls = c, .rank = i % s->p->group, .ahead = s->ring};
        s->lane[i].kind = c->heads ? GEN_WITH_HEADS : GEN_OTHERS;
        s->n++;
    }
}

/* The bytes that the token must read, in microseconds at the read bandwidth. */
static double floor_us(const struct gen_plan *p, int pos, double gbps)
{
    const struct gen_model *m = &p->model;
    const double row = 4.0 * m->L * m->K * m->E;

    return ((double) p->token_bytes + row * (pos + 1)) / (gbps * 1e3);
}

static void take_means(const struct sim *s, struct gen_prediction *out)
{
    for (int i = 0; i < s->n; i++) {
        const struct lane *l = &s->lane[i];
        const double part = (double) l->cls->groups / out->ctas[l->kind];
        for (int stage = 0; stage < MK_LAP_COUNT; stage++) {
            out->cycles[l->kind][stage] += l->cycles[stage] * part;
            out->waited[l->kind][stage] += l->waited[stage] * part;
        }
    }
}

void gen_predict(const struct gen_plan *p, int pos, struct gen_prediction *out)
{
    struct sim s = {.p = p,
                    .pos = pos,
                    .far = p->team > 1 && pos >= p->team_from,
                    .chunk = p->phase[GEN_HEAD].span_units * 512.0};

    memset(out, 0, sizeof *out);
    s.lap = p->timing ? LAP : 0;
    s.ring = p->stages * s.chunk;
    s.trips = trips_of(p);
    s.r = rates_of(&p->gpu, &out->measured);
    out->from = s.r.gpu;
    out->clock_mhz = s.r.clock_mhz;
    out->read_gbps = s.r.read_gbps;
    for (int i = 0; i < p->n_classes; i++)
        out->ctas[p->cls[i].heads ? GEN_WITH_HEADS : GEN_OTHERS] += p->cls[i].groups * p->group;
    set_rates(&s, out->ctas);
    set_lanes(&s);
    token(&s); /* leaves the rings as the next one finds them */
    token(&s);
    take_means(&s, out);
    out->token = s.lane[0].now;
    out->token_us = out->token / s.r.clock_mhz;
    out->floor_us = floor_us(p, pos, s.r.read_gbps);
}

/* ---- In text ------------------------------------------------------------------ */

const char *gen_stage_name(int lap)
{
#define NAME(stage) #stage,
    static const char *const names[] = {MK_LAPS(NAME)};

    return names[lap];
}

int gen_stage_is_layer(int lap)
{
    return lap >= MK_LAP_QKV && lap <= MK_LAP_DOWN_X;
}

/* Up to 3 positions that the KV cache holds. */
static int positions(const struct gen_plan *p, int pos[3])
{
    static const int want[3] = {1, 1024, 4096};
    int n = 0;

    for (int i = 0; i < 3; i++) {
        const int at = want[i] < p->context ? want[i] : p->context - 1;
        if (n == 0 || pos[n - 1] < at)
            pos[n++] = at;
    }
    return n;
}

static void dump_head(FILE *f, const struct gen_plan *p, const struct gen_prediction *first)
{
    fprintf(f, "\n[predicted]\n");
    if (first->measured)
        fprintf(f, "# with the constants of %s (gen/predict.c)\n", first->from);
    else
        fprintf(f, "# %s: not measured; with cycles of %s, its part of the data sheet's GB/s\n",
                p->gpu.name, first->from);
    fprintf(f, "# at %.0f MHz, reading %.0f GB/s; cycles of a layer (EMBED, HEAD, NEXT: a token)\n",
            first->clock_mhz, first->read_gbps);
    fprintf(f, "# in CTAs of groups with KV heads, and of others\n");
}

/* Cycles of STAGE at the positions: of both kinds of CTAs, as far as there are any. */
static void dump_stage(FILE *f, const struct gen_plan *p, int stage,
                       const struct gen_prediction *at, int n)
{
    const int times = gen_stage_is_layer(stage) ? p->model.L : 1;

    fprintf(f, "%-10s", gen_stage_name(stage));
    for (int i = 0; i < n; i++) {
        fprintf(f, " %9.0f", at[i].cycles[GEN_WITH_HEADS][stage] / times);
        if (at[i].ctas[GEN_OTHERS])
            fprintf(f, " %9.0f", at[i].cycles[GEN_OTHERS][stage] / times);
        else
            fprintf(f, " %9s", "-");
    }
    fprintf(f, "\n");
}

void gen_predict_dump(FILE *f, const struct gen_plan *p)
{
    struct gen_prediction at[3];
    int pos[3], n = positions(p, pos);

    for (int i = 0; i < n; i++)
        gen_predict(p, pos[i], &at[i]);
    dump_head(f, p, &at[0]);
    fprintf(f, "%-10s", "position");
    for (int i = 0; i < n; i++)
        fprintf(f, " %9d %9s", pos[i], "others");
    fprintf(f, "\n");
    for (int stage = 0; stage < MK_LAP_COUNT; stage++)
        dump_stage(f, p, stage, at, n);
    fprintf(f, "%-10s", "us, tok/s");
    for (int i = 0; i < n; i++)
        fprintf(f, " %9.1f %9.1f", at[i].token_us, 1e6 / at[i].token_us);
    fprintf(f, "\n%-10s", "floor, us");
    for (int i = 0; i < n; i++)
        fprintf(f, " %9.1f %8.1f%%", at[i].floor_us, 100 * at[i].floor_us / at[i].token_us);
    fprintf(f, "\n");
}
