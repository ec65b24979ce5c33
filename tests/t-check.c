/* t-check.c - gen_plan_check takes every plan that mkgen makes, in little time, and refuses
   plans and programs of a token that could deadlock or overwrite what is still read.  What it
   takes runs here under many schedules, on all CTAs of a plan.  gen_hop_describe names the sender
   that the kernel's own loops give. */
#include "config.h"

#include <limits.h>
#include <time.h>

#include "gen/check.h"
#include "gen/gen.h"
#include "runtime/abi.h"
#include "tests/check.h"

/* Four times the mean of gcc -O2 on a core of an AMD EPYC; sanitizers and -O0 take longer. */
#if defined __OPTIMIZE__ && !defined __SANITIZE_ADDRESS__ && !defined __SANITIZE_THREAD__
enum { MOST_MEAN_US = 120 };
#else
enum { MOST_MEAN_US = 4000 };
#endif

enum { MOST_STAGES = 24 };

static struct mk_err err;

/* Processor time, so that other processes do not count. */
static double now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double) t.tv_sec * 1e6 + (double) t.tv_nsec / 1e3;
}

/* Not every choice fits every GPU. */
static int try(const char *model, const char *gpu, int context, const char *const *set,
               struct gen_plan *p)
{
    struct gen_model m;
    struct gen_gpu g;

    CHECKF(gen_model_read(model, &m, &err) == 0, "%s", err.text);
    CHECKF((strncmp(gpu, "host:", 5) ? gen_gpu_read(gpu, &g, &err)
                                     : gen_gpu_host(atoi(gpu + 5), &g)) == 0,
           "%s", err.text);
    return gen_plan_make(&m, &g, context < m.max_context ? context : m.max_context, NULL, set, p,
                         &err);
}

static void make(const char *model, const char *gpu, const char *const *set, struct gen_plan *p)
{
    CHECKF(try(model, gpu, 0, set, p) == 0, "%s", err.text);
}

#define SET(...) ((const char *const[]){__VA_ARGS__, NULL})

/* ---- What is right ------------------------------------------------------------- */

static int plans, kinds[8]; /* by what groups have, or'ed: heads 1, units 2, both 4 */
static double sum, most;

static void time_check(const struct gen_plan *p)
{
    int kind = 0;
    double us = 1e9;

    for (int i = 0; i < 3; i++) {
        const double from = now_us();
        CHECKF(gen_plan_check(p, &err) == 0, "%s", err.text);
        us = fmin(us, now_us() - from);
    }
    for (int i = 0; i < p->n_classes; i++)
        kind |= p->cls[i].heads ? p->cls[i].units ? 4 : 1 : 2;
    kinds[kind]++;
    sum += us;
    most = fmax(most, us);
    plans++;
}

static void test_carried(void)
{
    static const char *const sets[][5] = {
        {NULL},
        {"cluster=l2", NULL},
        {"cluster=l2", "group=1", "tokens_per_launch=1", NULL},
        {"cluster=l2", "group=3", "balance=1000", "warps=4", NULL},
        {"cluster=l2", "group=16", "balance=0", "unroll_layers=loop", NULL},
        {"ctas=1", "chunk_bytes=8192", NULL},
        {"ctas=12", "chunk_bytes=2048", "stages=2", NULL},
    };
    struct gen_plan p;
    int misfits = 0, teams = 0;

    for (int i = 0; gen_model_carried(i); i++)
        for (int j = 0; gen_gpu_profile(j); j++)
            for (size_t s = 0; s < sizeof sets / sizeof *sets; s++)
                if (try(gen_model_carried(i), gen_gpu_profile(j), s ? 0 : 32768, sets[s], &p) ==
                    0) {
                    time_check(&p);
                    teams += p.team > 1;
                } else {
                    CHECKF(strstr(err.text, " bytes of shared memory"), "%s", err.text);
                    misfits++;
                }
    printf("%d plans: %.0f us each, %.0f us at most; %d more do not fit\n", plans, sum / plans,
           most, misfits);
    CHECKF(sum / plans < MOST_MEAN_US, "%.0f us", sum / plans);
    CHECK(misfits * 10 < plans);
    CHECK(kinds[1 + 2] && kinds[4] && kinds[2 + 4]);
    CHECKF(teams > 3, "%d plans with teams", teams);
}

/* Those of tests/mkstorm.c, too small for others. */
static void test_toys(void)
{
    static const char *const toys[] = {"tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-qwen3-e128",
                                       "tiny-smol",  "toy-llama",  "toy-qwen2",  "toy-smol"};
    static const char *const sets[][3] = {
        {NULL}, {"cluster=l2", "group=1"}, {"cluster=l2", "group=4"}};
    const char *tests = getenv("srcdir");
    char folder[4096];
    struct gen_plan p;

    for (size_t i = 0; i < sizeof toys / sizeof *toys; i++)
        for (int arch = 0; arch < 2; arch++)
            for (size_t s = 0; s < sizeof sets / sizeof *sets; s++) {
                snprintf(folder, sizeof folder, "%s/toy/%s", tests ? tests : "tests", toys[i]);
                make(folder, arch ? "host:90" : "host:75",
                     (const char *const[]){sets[s][0], sets[s][0] ? sets[s][1] : NULL, NULL}, &p);
                CHECKF(gen_plan_check(&p, &err) == 0, "%s", err.text);
            }
}

/* ---- Schedules ------------------------------------------------------------------ */

/* A plan's CTAs with two warps each, one of which is as slow as can be: nothing else goes on. */
enum { WARPS = 2, MOST_CTAS = 18, HOPS = GEN_USED_HOPS, MOST_USES = 128 };

static struct sim {
    struct gen_plan p;
    struct gen_graph graph;
    struct gen_stage stages[MOST_STAGES];
    int n, ctas, far, kind[MOST_CTAS],
        rows[HOPS]; /* rows: ranks that have words, of GEN_SOME_RANKS */
    struct {
        const struct gen_stage *stage;
        int tag;
    } use[MOST_USES];
    int uses;
    int word[HOPS][2][MOST_CTAS][WARPS]; /* tags */
    struct warp {
        int use, step, read[HOPS]; /* read: tag of the last wait */
    } warp[MOST_CTAS][WARPS];
    char failed[200];
} sim;

static uint64_t seed;

static int random_below(int n)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (int) ((seed >> 33) % (unsigned) n);
}

static int max(int a, int b)
{
    return a > b ? a : b;
}

static int has_words(int hop, int cta)
{
    return hop != GEN_NO_HOP &&
           (sim.graph.hops[hop].sure != GEN_SOME_RANKS || cta % sim.p.group < sim.rows[hop]);
}

static int reaches(const struct gen_hop *h, int from, int to)
{
    const int g = sim.p.group;

    return h->reach == GEN_TO_TEAM
               ? from / g % sim.p.model.K == to / g
               : h->reach == GEN_TO_ALL ||
                     (h->reach == GEN_TO_GROUP ? from / g == to / g : from % g == to % g);
}

/* Does every word of HOP that CTA waits for have TAG?  A later one is lost. */
static int arrived(int hop, int cta, int tag)
{
    const struct gen_hop *h = &sim.graph.hops[hop];

    for (int i = 0; i < sim.ctas; i++)
        for (int w = 0; w < (h->sure == GEN_EACH_WARP ? WARPS : 1); w++) {
            const int *word = &sim.word[hop][tag % h->buffers][i][w];
            if (!(sim.kind[i] & h->from) || !has_words(hop, i) || !reaches(h, i, cta))
                continue;
            if (*word > tag && !*sim.failed)
                snprintf(sim.failed, sizeof sim.failed, "hop %s: CTA %d reads tag %d, not %d",
                         h->name, cta, *word, tag);
            if (*word != tag)
                return 0;
        }
    return 1;
}

/* All warps of CTA are in use USE, at step STEP or beyond. */
static int met(int cta, int use, int step)
{
    for (int w = 0; w < WARPS; w++) {
        const struct warp *p = &sim.warp[cta][w];
        if (p->use < use || (p->use == use && p->step < step))
            return 0;
    }
    return 1;
}

/* A warp waits for a hop: of partial sums only one does. */
static int waits(int hop, int cta, int w)
{
    return sim.graph.hops[hop].reach != GEN_TO_RANK || (cta + hop) % WARPS == w;
}

static int await(int hop, int cta, int w, int tag)
{
    if (hop == GEN_NO_HOP || !waits(hop, cta, w))
        return 1;
    sim.warp[cta][w].read[hop] = tag;
    return arrived(hop, cta, tag);
}

/* What a warp has read is still there: with THEN of the hop that its stage waits for last, else of
   the others. */
static void check_read(int cta, int w, const struct gen_stage *g, int then)
{
    const int keep = g->send == GEN_NO_HOP || has_words(g->send, cta) ? g->keep : 0;

    for (int hop = 0; hop < HOPS; hop++)
        if ((then ? hop == g->then : hop == g->wait || keep >> hop & 1) &&
            sim.warp[cta][w].read[hop])
            arrived(hop, cta, sim.warp[cta][w].read[hop]);
}

enum { MEET, WAIT, READ, MEET_TO_SEND, SEND, THEN, END, STEPS };

/* One step of a warp; 0: it waits. */
static int step(int cta, int w)
{
    struct warp *p = &sim.warp[cta][w];
    const struct gen_stage *g = sim.use[p->use].stage;
    const int tag = sim.use[p->use].tag, runs = sim.kind[cta] & g->who;
    const int sends = runs && has_words(g->send, cta);
    const int sure = g->send == GEN_NO_HOP ? GEN_EACH_RANK : sim.graph.hops[g->send].sure;
    const int early = sure != GEN_EACH_RANK; /* it sends when it has read */

    if ((p->step == MEET && runs && g->meet && !met(cta, p->use, MEET)) ||
        (p->step == MEET_TO_SEND && sends && sure == GEN_SOME_RANKS &&
         !met(cta, p->use, p->step)) ||
        (p->step == WAIT && runs && !await(g->wait, cta, w, tag)) ||
        (p->step == THEN && runs && !await(g->then, cta, w, tag)))
        return 0;
    if (p->step == (early ? READ : END) && runs)
        check_read(cta, w, g, 0);
    if (p->step == SEND && sends && (sure == GEN_EACH_WARP || (cta + g->send + 1) % WARPS == w))
        sim.word[g->send][tag % sim.graph.hops[g->send].buffers][cta]
                [sure == GEN_EACH_WARP ? w : 0] = tag;
    if (p->step == END && runs)
        check_read(cta, w, g, 1);
    if (++p->step == STEPS)
        p->use++, p->step = 0;
    return 1;
}

static int done(int warp)
{
    return sim.warp[warp / WARPS][warp % WARPS].use == sim.uses;
}

/* One schedule; what went wrong, or NULL. */
static const char *run_schedule(void)
{
    const int all = sim.ctas * WARPS;

    memset(sim.word, 0, sizeof sim.word);
    memset(sim.warp, 0, sizeof sim.warp);
    *sim.failed = 0;
    for (int slow = random_below(all), idle = 0; !*sim.failed && idle <= all;) {
        const int first = random_below(all);
        int went = 0;
        for (int i = 0; i < all && !went; i++) {
            const int warp = (first + i) % all;
            went = warp != slow && !done(warp) && step(warp / WARPS, warp % WARPS);
        }
        if (!went) /* the slow one a step; then perhaps another */
            went = !done(slow) && step(slow / WARPS, slow % WARPS);
        if (!went || random_below(8) == 0)
            slow = went && random_below(4) ? slow : random_below(all);
        idle = went ? 0 : idle + 1;
        int left = 0;
        for (int i = 0; i < all; i++)
            left += !done(i);
        if (!left)
            return NULL;
    }
    return *sim.failed ? sim.failed : "deadlock";
}

/* Three tokens with the sampler that has least, or with all. */
static void unroll(int sampler)
{
    const int L = sim.p.model.L;

    sim.uses = 0;
    for (int token = 0; token < 3; token++)
        for (int layer = 0; layer <= L; layer++)
            for (const struct gen_stage *g = sim.stages; g->name; g++)
                for (int i = 0; i < g->times; i++)
                    if (g->when & sampler && g->where & (sim.far ? GEN_FAR : GEN_NEAR) &&
                        (g->tag == GEN_LAYER_TAG) == (layer < L) && sim.uses < MOST_USES) {
                        sim.use[sim.uses].stage = g;
                        sim.use[sim.uses++].tag = 1 + token * MK_TOKEN_TAGS(L) + layer +
                                                  (g->tag == GEN_LAYER_TAG ? 0 : g->tag) + i;
                    }
}

/* One or two groups of each of some kinds; some group has heads, and some has units.  Far or near, where others can
   help those with heads. */
static void random_plan(void)
{
    static const int kinds_of[][3] = {{3}, {1, 2}, {3, 2}, {1, 3}, {1, 3, 2}};
    const int *kind = kinds_of[random_below(5)];
    struct gen_plan *p = &sim.p;

    memset(p, 0, sizeof *p);
    p->model.L = 1 + random_below(4);
    p->group = 1 + random_below(3);
    for (int i = 0; i < 3 && kind[i]; i++) {
        const int first = p->groups, groups = 1 + random_below(2);
        p->cls[p->n_classes++] = (struct gen_class){
            .first = first, .groups = groups, .heads = kind[i] & 1, .units = kind[i] / 2};
        p->groups += groups;
        for (int cta = first * p->group; cta < p->groups * p->group; cta++)
            sim.kind[cta] = kind[i];
    }
    sim.ctas = p->groups * p->group;
    for (int g = 0; g < p->groups; g++)
        p->model.K += sim.kind[g * p->group] & GEN_HEADS;
    p->team = random_below(3) ? max(1, p->groups / p->model.K) : 1;
    sim.far = p->team > 1 && random_below(2);
    for (int cta = p->model.K * p->group; cta < p->model.K * p->team * p->group; cta++)
        sim.kind[cta] |= GEN_HELPS;
    for (int hop = 0; hop < HOPS; hop++)
        sim.rows[hop] = 1 + random_below(p->group);
}

/* The program as it is, or with up to two things that may be wrong. */
static void random_graph(int wrong)
{
    sim.graph = gen_graph;
    for (sim.n = 0; gen_graph.stages[sim.n].name; sim.n++)
        sim.stages[sim.n] = gen_graph.stages[sim.n];
    sim.stages[sim.n] = gen_graph.stages[sim.n];
    sim.graph.stages = sim.stages;
    while (wrong-- > 0) {
        struct gen_stage *g = &sim.stages[random_below(sim.n)], keep = *g;
        struct gen_hop *h = &sim.graph.hops[random_below(HOPS)];
        switch (random_below(11)) {
        case 0:
            *g = g[1].name ? g[1] : *g, g[1] = g[1].name ? keep : g[1];
            break;
        case 1:
            g->wait = GEN_NO_HOP;
            break;
        case 2:
            g->then = GEN_NO_HOP;
            break;
        case 3:
            g->send = GEN_NO_HOP;
            break;
        case 4:
            g->meet ^= 1;
            break;
        case 5:
            g->keep = 0;
            break;
        case 6:
            g->who = 1 + random_below(7);
            break;
        case 7:
            h->buffers ^= 3;
            break;
        case 8:
            h->sure = GEN_EACH_RANK;
            break;
        case 9:
            h->from = 1 + random_below(7);
            break;
        case 10:
            h->to = 1 + random_below(7);
            break;
        }
    }
}

static void test_schedules(void)
{
    int taken = 0, refused = 0, seen = 0;

    seed = 1;
    for (int i = 0; i < 300; i++) {
        const char *failed = NULL;
        random_plan();
        random_graph(i % 4 == 0 ? 0 : 1 + i % 2);
        const int ok = gen_graph_check(&sim.p, &sim.graph, &err) == 0;
        unroll(i % 8 ? GEN_GREEDY : GEN_SAMPLE | GEN_TOP_K);
        CHECKF(ok || i % 4, "%s", err.text);
        for (int k = 0; k < 12 && !failed; k++)
            failed = run_schedule();
        CHECKF(!ok || !failed, "program %d was taken: %s", i, failed);
        taken += ok;
        refused += !ok;
        seen += !ok && failed;
    }
    printf("%d programs taken; %d refused, %d of which fail in 12 schedules\n", taken, refused,
           seen);
}

/* ---- Plans that are wrong ------------------------------------------------------- */

/* Two ranks a group; groups with heads and units, with heads or units, with units and some of them
   with heads. */
static struct gen_plan both, either, some;

static void make_plans(void)
{
    const char *model = "qwen3-0.6b", *gpu = "h200", *l2 = "cluster=l2", *group = "group=2";

    make(model, gpu, SET(l2, group, "ctas=16", "stages=8"), &both);
    make(model, gpu, SET(l2, group, "ctas=32", "stages=8", "balance=1000"), &either);
    make(model, gpu, SET(l2, group, "ctas=32", "stages=8", "balance=0"), &some);
    CHECK(both.n_classes == 1 && both.cls[0].heads && both.cls[0].units);
    CHECK(either.n_classes == 2 && !either.cls[0].units && !either.cls[1].heads);
    CHECK(some.n_classes == 2 && some.cls[0].units && !some.cls[1].heads);
}

#define CTA(cta, rank, group) "CTA " #cta " (rank " #rank " of group " #group ")"
#define TOO_SOON(hop, w, next, sends, r, last, reads)                                              \
    "plan: hop " hop ": " w " may send " next " words (" sends ") while " r " still reads " last   \
    " (" reads "): nothing that it waits for in between comes from there, directly or through "    \
    "others"
#define WAITS(hop, cta, stage, what)                                                               \
    "plan: hop " hop ": " cta " waits in " stage " for words that " what ": deadlock"
#define UNREAD(hop, cta, stage)                                                                    \
    "plan: hop " hop ": " cta " does not wait for what " stage " sends before " stage " sends again"
#define SILENT                                                                                     \
    "it would send nothing in hops O and DOWN, and no other group would know what it has read"

static void refused(const struct gen_plan *p, const char *message)
{
    CHECK(gen_plan_check(p, &err) == MK_EINVAL);
    CHECK_STR(err.text, message);
    CHECK(gen_plan_check(p, NULL) == MK_EINVAL);
}

#define SPOILED(good, what, message)                                                               \
    do {                                                                                           \
        struct gen_plan p = good;                                                                  \
        what;                                                                                      \
        refused(&p, message);                                                                      \
    } while (0)

static void test_groups(void)
{
    SPOILED(both, p.groups++, "plan: 9 groups of 2 CTAs are not 16 CTAs");
    SPOILED(both, p.ctas--, "plan: 8 groups of 2 CTAs are not 15 CTAs");
    SPOILED(both, p.n_classes = 0, "plan: group 0 is in no class");
    SPOILED(either, p.n_classes = 1, "plan: group 8 is in no class");
    SPOILED(either, p.cls[1].first++, "plan: groups 9..15 of 16 follow group 7");
    SPOILED(either, p.cls[1].groups++, "plan: groups 8..16 of 16 follow group 7");
    SPOILED(either, p.cls[0].head0++, "plan: KV head 0 belongs to no group");
    SPOILED(either, p.cls[1].head0--, "plan: KV head 7 belongs to group 8 and to one before");
    SPOILED(either, p.cls[1].unit0++, "plan: MLP unit 0 belongs to no group");
    SPOILED(some, p.cls[1].unit0--, "plan: MLP unit 47 belongs to group 8 and to one before");
    SPOILED(both, p.cls[0].units--, "plan: 88 MLP units belong to groups, and the model has 96");
    SPOILED(both, (p.cls[0].heads++, p.most_heads++),
            "plan: groups 0..7 have 2 KV heads; the first 0 of 8 groups have 2, the others 1");
    SPOILED(both, p.most_heads--,
            "plan: group 0 has 1 KV heads and 12 MLP units; there is room for 0 and 12");
    SPOILED(both, p.most_units--,
            "plan: group 0 has 1 KV heads and 12 MLP units; there is room for 1 and 11");
    SPOILED(either, p.cls[1].units = 0,
            "plan: group 8 has neither a KV head nor an MLP unit: " SILENT);
    SPOILED(either, p.cls[0].heads = 0,
            "plan: group 0 has neither a KV head nor an MLP unit: " SILENT);
    SPOILED(
        both,
        (p.model.F /= 2, p.cls[1] = (p.n_classes = 2, p.cls[0].groups = 4, p.cls[0]),
         p.cls[1].first = p.cls[1].head0 = 4, p.cls[1].unit0 = 48, p.cls[1].units = 0),
        "plan: hop DOWN: CTAs wait for group 7, which has no MLP unit and sends nothing: deadlock");
    SPOILED(both, (p.model.D = 16, p.pairs = 1),
            "plan: rank 1 of a group has none of the 1 pairs of rows: " SILENT);
    SPOILED(both, p.pairs--, "plan: 63 pairs of blocks are not the model's 1024 rows");
    SPOILED(both, p.rank_pairs--,
            "plan: 2 ranks of 4 sets of 8 pairs of rows, 31 a rank, for 8 warps, are not 64 pairs");
    SPOILED(both, p.sets--,
            "plan: 2 ranks of 3 sets of 8 pairs of rows, 32 a rank, for 8 warps, are not 64 pairs");
    SPOILED(both, p.warps = 7,
            "plan: 2 ranks of 4 sets of 8 pairs of rows, 32 a rank, for 7 warps, are not 64 pairs");
}

static void test_streams(void)
{
    SPOILED(both, p.cls[0].o--,
            "plan: QKV of group 0: 524288 bytes from 0 on, and what follows begins at 524287");
    SPOILED(both, p.cls[0].mlp -= 1024,
            "plan: O of group 0: 262144 bytes from 524288 on, and what follows begins at 785408");
    SPOILED(
        both, p.cls[0].down--,
        "plan: MLP of group 0: 786432 bytes from 786432 on, and what follows begins at 1572863");
    SPOILED(
        both, p.cls[0].layer_bytes--,
        "plan: DOWN of group 0: 393216 bytes from 1572864 on, and what follows begins at 1966079");
    SPOILED(both, p.layers_offset -= 512,
            "plan: HEAD of group 0: 19447808 bytes from 0 on, and what follows begins at 19447296");
    SPOILED(
        both, p.cta_bytes--,
        "plan: all layers of group 0: 55050240 bytes from 19447808 on, and what follows begins at "
        "74498047");
    SPOILED(both, p.phase[GEN_MLP].blocks++, "plan: phase MLP: 769 blocks cannot be dealt by 2");
    SPOILED(both, p.phase[GEN_QKV].step = 0, "plan: phase QKV: 512 blocks cannot be dealt by 0");
    SPOILED(both, p.phase[GEN_QKV].spans++,
            "plan: phase QKV: 2 chunks of 32 units are not a block of 32 units");
    SPOILED(both, p.phase[GEN_HEAD].span_units--,
            "plan: phase HEAD: 1 chunks of 31 units are not a block of 32 units");
    SPOILED(both, p.phase[GEN_O].spans = 1,
            "plan: phase O: 1 chunks of 2 units are not a block of 64 units");
    SPOILED(both, p.phase[GEN_DOWN].span_units++,
            "plan: phase DOWN: a chunk has 24576 bytes and a stage of the ring 16384");
    SPOILED(both, p.stage_bytes -= 512,
            "plan: phase QKV: a chunk has 16384 bytes and a stage of the ring 15872");
    SPOILED(both, p.stages = 3,
            "plan: consumers wait for 4 chunks at once; with stages 3 that is a deadlock");
    SPOILED(both, p.batch.columns = p.stages + 1,
            "plan: consumers wait for 9 chunks at once; with stages 8 that is a deadlock");
    SPOILED(both, p.batch.early = (p.stages + 2) / 2,
            "plan: consumers wait for 10 chunks at once; with stages 8 that is a deadlock");
    SPOILED(both, p.kv_tile = 24,
            "plan: a tile of the KV cache has 24 positions, 12288 bytes, and a stage of the ring "
            "16384 bytes");
    SPOILED(both, p.kv_tile *= 2,
            "plan: a tile of the KV cache has 64 positions, 32768 bytes, and a stage of the ring "
            "16384 bytes");
    SPOILED(both, p.kv_head--,
            "plan: the KV cache has room for 2097150 bytes of a head, and its tiles have 2097152");
    SPOILED(
        both, p.inflight_hop = 0,
        "plan: inflight is 4 and inflight_hop 0; they must be 1 or more, and inflight the larger");
    SPOILED(
        both, p.inflight = p.inflight_hop - 1,
        "plan: inflight is 1 and inflight_hop 2; they must be 1 or more, and inflight the larger");
    SPOILED(both, p.inflight_heads = 0, "plan: inflight_heads is 0; it must be 1 or more");
    SPOILED(both, p.epoch0 = 0,
            "plan: epoch0 is 0 and a launch takes 3840 tags; tags must be 1..2147483647");
    SPOILED(both, p.tokens_per_launch = INT_MAX / 60 + 1,
            "plan: epoch0 is 1 and a launch takes 2147483700 tags; tags must be 1..2147483647");
}

/* A CTA has 32 chunks of QKV, 4 sets x 4 of O, 48 of the MLP, 4 x 6 of DOWN, and the last none of
   this head. */
static void test_stages(void)
{
    struct gen_plan p = both;

    p.model.L = 1;
    p.phase[GEN_HEAD].blocks = 8;
    p.stages = 120;
    CHECKF(gen_plan_check(&p, &err) == 0, "%s", err.text);
    p.stages = 121;
    refused(
        &p,
        "plan: the ring has 121 stages, and CTA 15 only 120 chunks of a token: a tile of the KV "
        "cache could be copied before its last row is written");
    p = either; /* those without heads have fewer, and need no more */
    p.model.L = 1;
    p.phase[GEN_HEAD].blocks = 8;
    p.stages = 48;
    CHECKF(gen_plan_check(&p, &err) == 0, "%s", err.text);
    p.stages = 49;
    refused(&p,
            "plan: the ring has 49 stages, and CTA 15 only 48 chunks of a token: a tile of the KV "
            "cache could be copied before its last row is written");
}

static void test_exchange(void)
{
    SPOILED(both, p.hop_buffers[GEN_HOP_O] = 1, "plan: hop O has 1 buffers, and the kernel uses 2");
    SPOILED(both, p.hop_buffers[GEN_HOP_QKV] = 2,
            "plan: hop QKV has 2 buffers, and the kernel uses 1");
    SPOILED(both, p.hop_words[GEN_HOP_QKV]--,
            "plan: hop QKV: its 16 CTAs send and await 1536 words, and it has 1535");
    SPOILED(both, p.hop_words[GEN_HOP_PART]--,
            "plan: hop PART: its 16 CTAs send and await 1568 words, and it has 1567");
    SPOILED(both, p.hop_words[GEN_HOP_MLP]--,
            "plan: hop MLP: its 16 CTAs send and await 1152 words, and it has 1151");
    SPOILED(both, p.hop_words[GEN_HOP_X]--,
            "plan: hop X: its 16 CTAs send and await 6400 words, and it has 6399");
    SPOILED(both, p.hop_words[GEN_HOP_DOWN]--,
            "plan: hop DOWN: its 16 CTAs send and await 6144 words, and it has 6143");
    SPOILED(both, p.hop_words[GEN_HOP_BEST]--,
            "plan: hop BEST: its 16 CTAs send and await 16 words, and it has 15");
    SPOILED(both, p.hop_words[GEN_HOP_COUNT]--,
            "plan: hop COUNT: its 16 CTAs send and await 512 words, and it has 511");
    SPOILED(both, p.hop_offset[GEN_HOP_X] -= 8, "plan: hops MLP and X overlap at word 4248");
    SPOILED(both, p.hop_offset[GEN_HOP_QKV] = -8,
            "plan: hop QKV: words -8..1527 are not inside the exchange's 23472");
    SPOILED(both, p.exchange_words -= 8,
            "plan: hop COUNT: words 22960..23471 are not inside the exchange's 23464");
}

/* ---- Programs that are wrong ---------------------------------------------------- */

static struct gen_graph graph;
static struct gen_stage stages[MOST_STAGES]; /* copies to spoil */

static void restore(void)
{
    int n = 0;

    graph = gen_graph;
    graph.stages = stages;
    do
        stages[n] = gen_graph.stages[n];
    while (gen_graph.stages[n++].name);
    CHECK(n < MOST_STAGES);
}

/* The stage that sends HOP. */
static struct gen_stage *sends(int hop)
{
    struct gen_stage *g = stages;

    while (g->name && g->send != hop)
        g++;
    CHECKF(g->name, "no such stage");
    return g;
}

static void swap(struct gen_stage *a, struct gen_stage *b)
{
    const struct gen_stage keep = *a;

    *a = *b, *b = keep;
}

static void drop(struct gen_stage *g)
{
    do
        *g = g[1];
    while (g++->name);
}

/* A stage behind the last. */
static void append(struct gen_stage g)
{
    struct gen_stage *end = stages;

    while (end->name)
        end++;
    end[1] = *end;
    *end = g;
}

#define WRONG(good, what, message)                                                                 \
    do {                                                                                           \
        restore();                                                                                 \
        what;                                                                                      \
        CHECK(gen_graph_check(&good, &graph, &err) == MK_EINVAL);                                  \
        CHECK_STR(err.text, message);                                                              \
    } while (0)
#define RIGHT(good, what)                                                                          \
    do {                                                                                           \
        restore();                                                                                 \
        what;                                                                                      \
        CHECKF(gen_graph_check(&good, &graph, &err) == 0, "%s", err.text);                         \
    } while (0)

static void test_deadlocks(void)
{
    RIGHT(both, (void) 0);
    RIGHT(either, (void) 0);
    RIGHT(some, (void) 0);
    WRONG(both, swap(sends(GEN_HOP_MLP), sends(GEN_HOP_DOWN)),
          WAITS("MLP", CTA(0, 0, 0), "columns(DOWN)", "are sent only behind it, in rows(MLP)"));
    WRONG(both, swap(sends(GEN_HOP_QKV), sends(GEN_HOP_O)),
          WAITS("PART", CTA(0, 0, 0), "columns(O)", "are sent only behind it, in attn"));
    WRONG(both, sends(GEN_HOP_PART)->send = GEN_NO_HOP,
          WAITS("PART", CTA(0, 0, 0), "columns(O)", "nobody sends"));
    WRONG(both, drop(sends(GEN_HOP_QKV)), WAITS("QKV", CTA(0, 0, 0), "attn", "nobody sends"));
    WRONG(either, sends(GEN_HOP_O)->who = GEN_UNITS,
          WAITS("PART", CTA(16, 0, 8), "columns(O)", "nobody sends"));
    WRONG(either, sends(GEN_HOP_DOWN)->who = GEN_ANY,
          WAITS("MLP", CTA(0, 0, 0), "columns(DOWN)", "nobody sends"));
    WRONG(either, graph.hops[GEN_HOP_O].from = GEN_ANY,
          WAITS("O", CTA(0, 0, 0), "add_norm(O)", "nobody sends"));
    WRONG(either, sends(GEN_HOP_X_O)->who = GEN_UNITS,
          TOO_SOON("X[1]", CTA(0, 0, 0), "layer l+1's", "add_norm(DOWN)", CTA(1, 1, 0), "layer l's",
                   "add_norm(DOWN)"));
    WRONG(both, sends(GEN_HOP_BEST)->send = GEN_NO_HOP,
          WAITS("BEST", CTA(0, 0, 0), "grid_best", "nobody sends"));
    /* Tags. */
    WRONG(both, sends(GEN_HOP_COUNT)->times = 9,
          "plan: hop COUNT: count_digit sends with tag 11 behind count_digit with tag 11");
    WRONG(both, stages[16].tag = 32, "plan: grid_best uses tag L+32 of a token, which has L+32");
    WRONG(both, stages[16].tag = -2, "plan: grid_best uses tag L-2 of a token, which has L+32");
    WRONG(both, append(*sends(GEN_HOP_O)),
          "plan: hop O: columns(O) sends with tag 0 behind columns(O) with tag 0");
    WRONG(both, stages[14].times = 99,
          "plan: count_digit uses tag L+99 of a token, which has L+32");
    /* What is sent must be awaited. */
    WRONG(both, sends(GEN_HOP_DOWN)->wait = GEN_NO_HOP, UNREAD("MLP", CTA(0, 0, 0), "rows(MLP)"));
    WRONG(both, sends(GEN_HOP_X_O)->then = GEN_NO_HOP, UNREAD("X[0]", CTA(0, 0, 0), "add_norm(O)"));
    WRONG(either, sends(GEN_HOP_X_DOWN)->wait = GEN_NO_HOP,
          TOO_SOON("O", CTA(0, 0, 0), "layer l+2's", "columns(O)", CTA(16, 0, 8), "layer l's",
                   "add_norm(O)"));
    WRONG(either, graph.hops[GEN_HOP_X_O].from = GEN_UNITS,
          "plan: hop X[0]: nobody waits for what " CTA(0, 0, 0) " sends in add_norm(O)");
}

static void test_reuse(void)
{
    /* With one buffer of O, groups with units tell in DOWN what they have read; others do not. */
    RIGHT(both, graph.hops[GEN_HOP_O].buffers = graph.hops[GEN_HOP_DOWN].buffers = 1);
    WRONG(either, graph.hops[GEN_HOP_O].buffers = 1,
          TOO_SOON("O", CTA(0, 0, 0), "layer l+1's", "columns(O)", CTA(2, 0, 1), "layer l's",
                   "add_norm(O)"));
    WRONG(either, graph.hops[GEN_HOP_DOWN].buffers = 1,
          TOO_SOON("DOWN", CTA(16, 0, 8), "layer l+1's", "columns(DOWN)", CTA(18, 0, 9),
                   "layer l's", "add_norm(DOWN)"));
    RIGHT(some, graph.hops[GEN_HOP_O].buffers = 1);
    WRONG(some, graph.hops[GEN_HOP_DOWN].buffers = 1,
          TOO_SOON("DOWN", CTA(0, 0, 0), "layer l+1's", "columns(DOWN)", CTA(16, 0, 8), "layer l's",
                   "add_norm(DOWN)"));
    WRONG(both, graph.hops[GEN_HOP_COUNT].buffers = 1,
          TOO_SOON("COUNT", CTA(0, 0, 0), "tag L+2's", "count_digit", CTA(1, 1, 0), "tag L+1's",
                   "count_digit"));
    WRONG(both,
          append((struct gen_stage){"again", GEN_SAMPLE, GEN_ANY, 1, GEN_NO_HOP, GEN_HOP_BEST,
                                    GEN_HOP_BEST, 0, 18, 1, GEN_NEAR_FAR}),
          TOO_SOON("BEST", CTA(0, 0, 0), "tag L+18's", "again", CTA(1, 1, 0), "tag L+17's",
                   "grid_best"));
    /* Without a word of each warp, or of each rank. */
    WRONG(both, graph.hops[GEN_HOP_X_O].sure = GEN_EACH_RANK,
          TOO_SOON("X[1]", CTA(0, 0, 0), "layer l's", "add_norm(DOWN)", CTA(0, 0, 0), "layer l's",
                   "add_norm(O)"));
    WRONG(both, graph.hops[GEN_HOP_X_DOWN].sure = GEN_EACH_RANK,
          TOO_SOON("X[0]", CTA(0, 0, 0), "layer l+1's", "add_norm(O)", CTA(1, 1, 0), "layer l's",
                   "add_norm(DOWN)"));
    WRONG(either, graph.hops[GEN_HOP_X_DOWN].sure = GEN_SOME_RANKS,
          TOO_SOON("X[0]", CTA(0, 0, 0), "layer l+1's", "add_norm(O)", CTA(1, 1, 0), "layer l's",
                   "add_norm(O)"));
    WRONG(either, graph.hops[GEN_HOP_O].sure = GEN_SOME_RANKS,
          TOO_SOON("O", CTA(0, 0, 0), "layer l+2's", "columns(O)", CTA(2, 0, 1), "layer l's",
                   "add_norm(O)"));
    WRONG(either, graph.hops[GEN_HOP_DOWN].sure = GEN_SOME_RANKS,
          TOO_SOON("O", CTA(0, 0, 0), "layer l+2's", "columns(O)", CTA(16, 0, 8), "layer l's",
                   "add_norm(O)"));
    WRONG(both, sends(GEN_HOP_COUNT)->meet = 0,
          TOO_SOON("COUNT", CTA(0, 0, 0), "tag L+3's", "count_digit", CTA(0, 0, 0), "tag L+1's",
                   "count_digit"));
    /* Without a second hop X, or with what reads on. */
    WRONG(both, drop(sends(GEN_HOP_X_DOWN)),
          TOO_SOON("X[0]", CTA(0, 0, 0), "layer l+1's", "add_norm(O)", CTA(1, 1, 0), "layer l's",
                   "add_norm(O)"));
    WRONG(either, sends(GEN_HOP_X_DOWN)->keep |= 1 << GEN_HOP_X_DOWN,
          TOO_SOON("X[1]", CTA(0, 0, 0), "layer l's", "add_norm(DOWN)", CTA(0, 0, 0), "layer l's",
                   "add_norm(DOWN)"));
}

/* Helpers: of a plan in which all groups have units, and of one in which those with heads have none. */
static void test_team(void)
{
    struct gen_plan all, apart;

    make("qwen2.5-0.5b", "h200", SET("group=2", "ctas=12"), &all);
    make("qwen2.5-0.5b", "h200", SET("group=2", "ctas=12", "balance=1000"), &apart);
    CHECK(all.team == 3 && all.cls[0].units && apart.team == 3 && !apart.cls[0].units);
    RIGHT(all, (void) 0);
    RIGHT(apart, (void) 0);
    WRONG(all, sends(GEN_HOP_TEAM)->send = GEN_NO_HOP,
          WAITS("TEAM", CTA(0, 0, 0), "attn_merge", "nobody sends"));
    WRONG(all, sends(GEN_HOP_TEAM)[1].then = GEN_NO_HOP,
          UNREAD("TEAM", CTA(0, 0, 0), "attn_merge"));
    WRONG(all, sends(GEN_HOP_TEAM)->who = GEN_HEADS,
          "plan: hop TEAM: nobody waits for what " CTA(0, 0, 0) " sends in attn_merge");
    WRONG(all, sends(GEN_HOP_QKV)[1].who = GEN_HEADS,
          WAITS("QKV", CTA(4, 0, 2), "attn", "nobody sends"));
    /* O tells that all warps have merged. */
    WRONG(apart, sends(GEN_HOP_O)[1].meet = 0,
          TOO_SOON("TEAM", CTA(4, 0, 2), "layer l+1's", "attn_merge", CTA(0, 0, 0), "layer l's",
                   "attn_merge"));
    WRONG(all, graph.hops[GEN_HOP_COUNT].to = 0,
          "plan: hop COUNT is not for " CTA(0, 0, 0) ", which waits for it in count_digit");
    SPOILED(all, p.team = 4, "plan: 2 KV heads and teams of 4 groups; there are 6 groups");
    SPOILED(all, p.cluster = 0,
            "plan: teams of 3 groups, which are no clusters or have several heads");
    SPOILED(all, p.team_from = 319,
            "plan: team_from is 319; not all of 6 CTAs have a tile of 64 positions there");
    SPOILED(all, p.hop_words[GEN_HOP_TEAM]--,
            "plan: hop TEAM: its 12 CTAs send and await 896 words, and it has 895");
}

/* ---- Words in sentences ---------------------------------------------------------- */

static void describes(const struct gen_plan *p, int hop, int word, const char *want)
{
    char text[200];

    gen_hop_describe(p, hop < 0 ? word : p->hop_offset[hop] + word, text, sizeof text);
    CHECK_STR(text, want);
}

static void sent_by(const struct gen_plan *p, int hop, int word, int cta)
{
    char text[200], want[80];

    gen_hop_describe(p, p->hop_offset[hop] + word, text, sizeof text);
    snprintf(want, sizeof want, ", sent by CTA %d (rank %d of group %d)", cta, cta % p->group,
             cta / p->group);
    CHECKF(strlen(text) > strlen(want) && !strcmp(text + strlen(text) - strlen(want), want),
           "%s, not CTA %d", text, cta);
}

/* The sender of every hop's words, from the loops and formulas of the templates. */
static void test_senders(const char *gpu, const char *const *set)
{
    struct gen_plan p;

    make("smollm2-135m", gpu, set, &p);
    const int E = p.model.E, ratio = p.model.H / p.model.K, part = E / 8 * 3 + 1;
    const int qkv = p.most_heads * (ratio + 2) * E / 8, x = p.pairs * 6 + p.group * p.warps;
    for (int cta = 0; cta < p.ctas; cta++) {
        const int group = cta / p.group, rank = cta % p.group;
        const struct gen_class *c = gen_plan_class(&p, group);
        for (int b = rank; b < c->heads * (ratio + 2) * E / 8; b += p.group)
            sent_by(&p, GEN_HOP_QKV, (group * qkv + b) * 3 + b % 3, cta);
        for (int b = rank; b < c->units * 4; b += p.group)
            sent_by(&p, GEN_HOP_MLP, group * p.most_units * 12 + b * 3 + b % 3, cta);
        for (int i = 0; i < c->heads * ratio * part; i += 5)
            sent_by(&p, GEN_HOP_PART, cta * p.most_heads * ratio * part + i, cta);
        for (int pair = rank; pair < p.pairs; pair += p.group)
            for (int which = 0; which < 2; which++) {
                sent_by(&p, GEN_HOP_X, (which * p.groups + group) * x + pair * 6 + pair % 6, cta);
                sent_by(&p, which ? GEN_HOP_DOWN : GEN_HOP_O,
                        ((pair % 2 * p.pairs + pair) * p.groups + group) * 6 + pair % 6, cta);
            }
        for (int warp = 0; warp < p.warps; warp++)
            sent_by(&p, GEN_HOP_X, (p.groups + group) * x + p.pairs * 6 + rank * p.warps + warp,
                    cta);
        sent_by(&p, GEN_HOP_BEST, cta, cta);
        sent_by(&p, GEN_HOP_COUNT, (p.ctas + cta) * 16 + cta % 16, cta);
    }
}

static void test_describe(void)
{
    struct gen_plan p = some;
    char text[8] = "1234567";

    describes(&p, GEN_HOP_QKV, 0,
              "hop QKV word 0 (q head 0, values 0..2), sent by CTA 0 (rank 0 of group 0)");
    describes(&p, GEN_HOP_QKV, 192 * 3 + 48 + 4,
              "hop QKV word 628 (q head 7, values 11..13), sent by CTA 7 (rank 1 of group 3)");
    describes(&p, GEN_HOP_QKV, 192 * 7 + 48 * 2,
              "hop QKV word 1440 (k head 7, values 0..2), sent by CTA 14 (rank 0 of group 7)");
    describes(&p, GEN_HOP_QKV, 192 * 7 + 48 * 4 - 1,
              "hop QKV word 1535 (v head 7, values 126..127), sent by CTA 15 (rank 1 of group 7)");
    describes(&p, GEN_HOP_PART, 98 * 5 + 49 + 47,
              "hop PART word 586 (head 5, values 126..127), sent by CTA 5 (rank 1 of group 2)");
    describes(&p, GEN_HOP_PART, 98 * 5 + 49 + 48,
              "hop PART word 587 (head 5, maximum and sum), sent by CTA 5 (rank 1 of group 2)");
    describes(&p, GEN_HOP_MLP, 72 * 9 + 4,
              "hop MLP word 652 (values 1739..1741), sent by CTA 19 (rank 1 of group 9)");
    describes(&p, GEN_HOP_X, 400 * (16 + 3) + 8,
              "hop X word 7608 (x[1], values 22..23), sent by CTA 7 (rank 1 of group 3)");
    describes(&p, GEN_HOP_X, 400 * 3 + 384 + 9,
              "hop X word 1593 (x[0], squares of warp 1), sent by CTA 7 (rank 1 of group 3)");
    describes(&p, GEN_HOP_O, (64 + 5) * 96 + 6 * 7 + 5,
              "hop O word 6671 (buffer 1, values 94..95), sent by CTA 15 (rank 1 of group 7)");
    describes(&p, GEN_HOP_DOWN, 0,
              "hop DOWN word 0 (buffer 0, values 0..2), sent by CTA 0 (rank 0 of group 0)");
    describes(&p, GEN_HOP_BEST, 7,
              "hop BEST word 7 (a candidate), sent by CTA 7 (rank 1 of group 3)");
    describes(&p, GEN_HOP_COUNT, (32 + 3) * 16 + 15,
              "hop COUNT word 575 (buffer 1, digit 15), sent by CTA 3 (rank 1 of group 1)");
    describes(&p, -1, -1, "word -1, outside the exchange");
    describes(&p, -1, p.exchange_words, "word 45792, outside the exchange");
    gen_hop_describe(&p, 0, text, sizeof text);
    CHECK_STR(text, "hop QKV");
    gen_hop_describe(&p, 0, text, 1);
    CHECK_STR(text, "");
    make("qwen3-0.6b", "h200", SET("cluster=cluster", "group=2", "ctas=18"), &p);
    CHECK(!p.hop_words[GEN_HOP_QKV] && !p.hop_words[GEN_HOP_X]);
    describes(&p, -1, p.hop_offset[GEN_HOP_COUNT] - 1, "word 13847, between two hops");
    describes(&p, -1, 0, "hop O word 0 (buffer 0, values 0..2), sent by CTA 0 (rank 0 of group 0)");
    make("qwen2.5-0.5b", "h200", SET("group=2", "ctas=12"), &p);
    describes(
        &p, GEN_HOP_TEAM, 3 * 224 + 32 * 6 + 31,
        "hop TEAM word 895 (head 13, dimensions 62 and 63), sent by CTA 11 (rank 1 of group 5)");
    describes(&p, GEN_HOP_TEAM, 224,
              "hop TEAM word 224 (head 0, dimensions 0 and 1), sent by CTA 8 (rank 0 of group 4)");
}

int main(void)
{
    test_carried();
    test_toys();
    test_schedules();
    make_plans();
    test_groups();
    test_streams();
    test_stages();
    test_exchange();
    test_deadlocks();
    test_reuse();
    test_team();
    test_describe();
    test_senders("h200", SET("cluster=l2"));
    test_senders("t4", SET("group=3"));
    test_senders("h200", SET("cluster=l2", "group=1"));
    return check_done();
}
