/* t-predict.c - properties of predictions, over every carried model on every profile: the stages
   add up to the token, no token is faster than its bytes can be read, later positions, larger
   models and worse plans take longer.  And the tokens that the constants were fitted to. */
#include "config.h"

#include "gen/gen.h"
#include "tests/check.h"

static struct mk_err err;

static void get(const char *model, const char *gpu, struct gen_model *m, struct gen_gpu *g)
{
    CHECKF(gen_model_read(model, m, &err) == 0, "%s", err.text);
    CHECKF(gen_gpu_read(gpu, g, &err) == 0, "%s", err.text);
}

static int make(const struct gen_model *m, const struct gen_gpu *g, int context, const char *set,
                struct gen_plan *out)
{
    const char *const list[] = {set, NULL};

    return gen_plan_make(m, g, context, NULL, set ? list : NULL, out, &err);
}

static double token_us(const struct gen_model *m, const struct gen_gpu *g, int context, int pos,
                       const char *set)
{
    static struct gen_plan p;
    struct gen_prediction at;

    CHECKF(make(m, g, context, set, &p) == 0, "%s", err.text);
    gen_predict(&p, pos, &at);
    return at.token_us;
}

/* ---- One prediction ------------------------------------------------------------- */

static double sum_of(const struct gen_prediction *at, int kind)
{
    double sum = 0;

    for (int i = 0; i < MK_LAP_COUNT; i++)
        sum += at->cycles[kind][i];
    return sum;
}

static int all_stages_fit(const struct gen_prediction *at, int kind)
{
    for (int i = 0; i < MK_LAP_COUNT; i++)
        if (!(at->cycles[kind][i] >= 0 && at->waited[kind][i] >= 0 &&
              at->waited[kind][i] <= at->cycles[kind][i] && at->cycles[kind][i] < 1e12))
            return 0;
    return 1;
}

static void check_one(const struct gen_plan *p, int pos, const struct gen_prediction *at)
{
    CHECK(at->ctas[GEN_WITH_HEADS] > 0);
    CHECK(at->ctas[GEN_WITH_HEADS] + at->ctas[GEN_OTHERS] == p->ctas);
    for (int kind = 0; kind < GEN_KINDS; kind++) {
        const double sum = sum_of(at, kind);
        CHECKF(all_stages_fit(at, kind), "%s on %s at %d", p->model.name, p->gpu.name, pos);
        CHECKF(at->ctas[kind] ? fabs(sum / at->token - 1) < 1e-9 : sum == 0,
               "%s on %s at %d: stages of kind %d add up to %.3f, the token to %.3f", p->model.name,
               p->gpu.name, pos, kind, sum, at->token);
    }
    CHECK(at->token > 0 && fabs(at->token / at->clock_mhz / at->token_us - 1) < 1e-9);
    CHECK(at->floor_us >= (double) p->token_bytes / at->read_gbps / 1e3);
    CHECKF(at->token_us >= at->floor_us * (1 - 1e-9),
           "%s on %s at %d: %.1f us; its bytes take %.1f", p->model.name, p->gpu.name, pos,
           at->token_us, at->floor_us);
}

/* Positions from the first to the last, tighter where tiles and groups of them begin. */
static int next_pos(const struct gen_plan *p, int pos)
{
    const int step = pos < 2                             ? 1
                     : pos < p->kv_tile * (p->group + 1) ? p->kv_tile / 2 + 3
                                                         : p->context / 3;

    return pos + step < p->context || pos == p->context - 1 ? pos + step : p->context - 1;
}

/* Where the stream is held back while a hop is awaited, a rank that attends instead of waiting fills its ring faster,
   and fuller rings make hops faster: up to 1.7 % here. */
static double monotone(const struct gen_plan *p)
{
    return p->inflight_hop < p->inflight ? 0.98 : 0.9999;
}

static void check_plan(const struct gen_plan *p)
{
    struct gen_prediction at;
    double before = 0, head = 0;

    for (int pos = 0; pos < p->context; pos = next_pos(p, pos)) {
        gen_predict(p, pos, &at);
        check_one(p, pos, &at);
        CHECKF(at.token_us >= before * monotone(p), "%s on %s: %.3f us at %d, %.3f before",
               p->model.name, p->gpu.name, at.token_us, pos, before);
        before = fmax(before, at.token_us);
        head = at.cycles[GEN_WITH_HEADS][MK_LAP_HEAD];
    }
    CHECK(head > 0);
}

static void test_all(void)
{
    static const char *const sets[] = {NULL,        "cluster=l2",    "inflight=1",
                                       "balance=0", "group=4",       "chunk_bytes=8192",
                                       "warps=5",   "inflight_hop=4"};
    enum { SETS = sizeof sets / sizeof *sets };
    static struct gen_plan p;
    struct gen_model m;
    struct gen_gpu g;
    int made = 0;

    for (int i = 0; gen_model_carried(i); i++)
        for (int j = 0; gen_gpu_profile(j); j++) {
            get(gen_model_carried(i), gen_gpu_profile(j), &m, &g);
            for (size_t k = 0; k < SETS; k++)
                if (make(&m, &g, 0, sets[k], &p) == 0) { /* not every choice fits every GPU */
                    made++;
                    check_plan(&p);
                }
        }
    CHECKF(made > 1000, "%d plans", made);
}

/* ---- Comparisons ------------------------------------------------------------------ */

static void test_larger(void)
{
    struct gen_model m, larger;
    struct gen_gpu g;
    double small;

    get("qwen3-0.6b", "h200", &m, &g);
    small = token_us(&m, &g, 4096, 1, NULL);
    larger = m, larger.L *= 2;
    CHECK(token_us(&larger, &g, 4096, 1, NULL) > small * 1.5);
    larger = m, larger.D *= 2;
    CHECK(token_us(&larger, &g, 4096, 1, NULL) > small * 1.1);
    larger = m, larger.F *= 2;
    CHECK(token_us(&larger, &g, 4096, 1, NULL) > small);
    larger = m, larger.V *= 2;
    CHECK(token_us(&larger, &g, 4096, 1, NULL) > small * 1.1);
    larger = m, larger.H *= 2, larger.K *= 2, larger.F *= 2, larger.V *= 2, larger.D *= 2;
    larger.L *= 2;
    CHECK(token_us(&larger, &g, 4096, 1, NULL) > small * 4);
    CHECK(token_us(&m, &g, 4096, 4000, NULL) > small * 1.1);
}

static void test_worse(void)
{
    struct gen_model m;
    struct gen_gpu g;
    double best;

    get("qwen3-0.6b", "h200", &m, &g);
    CHECK(token_us(&m, &g, 4096, 128, "cluster=l2") > token_us(&m, &g, 4096, 128, NULL));
    get("llama-3.2-1b", "h200", &m, &g);
    best = token_us(&m, &g, 4096, 128, NULL);
    CHECK(token_us(&m, &g, 4096, 128, "ctas=64") > best * 1.05);
    CHECK(token_us(&m, &g, 4096, 128, "stages=2") >= best);
    CHECK(token_us(&m, &g, 4096, 128, "inflight=1") > best);
    g.clusters[3]--; /* a part of the product that holds one fewer */
    CHECK(token_us(&m, &g, 4096, 128, NULL) > best * 0.97); /* memory is the limit, not CTAs */
}

static double attn_at(const struct gen_plan *p, int pos, int kind)
{
    struct gen_prediction at;

    gen_predict(p, pos, &at);
    return at.cycles[kind][MK_LAP_ATTN];
}

/* Tiles are dealt to the ranks in turn: up to as many tiles as ranks, each is one more rank that
   attends, and as long as the one before. */
static void test_tiles(void)
{
    static struct gen_plan p;
    struct gen_model m;
    struct gen_gpu g;
    double first, one;

    get("qwen3-0.6b", "h200", &m, &g);
    CHECKF(make(&m, &g, 0, NULL, &p) == 0, "%s", err.text);
    first = attn_at(&p, p.kv_tile - 1, GEN_WITH_HEADS);
    one = attn_at(&p, p.kv_tile * 2 - 1, GEN_WITH_HEADS) - first;
    CHECK(one > 0 && fabs(first / one - 1) < 1e-9);
    for (int i = 3; i <= p.group; i++) {
        const double all = attn_at(&p, p.kv_tile * i - 1, GEN_WITH_HEADS);
        CHECKF(fabs(all / (one * i) - 1) < 1e-9, "%d tiles", i);
    }
    CHECK(attn_at(&p, p.kv_tile * p.group - 1, GEN_OTHERS) == 0);
}

/* ---- Constants ---------------------------------------------------------------------- */

static void check_gpu(const char *name, const struct gen_gpu *gpu, int measured, double gbps)
{
    static struct gen_plan p;
    struct gen_prediction at;
    struct gen_gpu g = *gpu;
    struct gen_model m;
    char *dump;

    CHECK(gen_model_read("qwen3-0.6b", &m, &err) == 0);
    snprintf(g.name, sizeof g.name, "%s", name);
    CHECKF(make(&m, &g, 0, NULL, &p) == 0, "%s", err.text);
    gen_predict(&p, 1, &at);
    CHECKF(at.measured == measured && fabs(at.read_gbps - gbps) < 1, "%s: %d, %.1f GB/s", name,
           at.measured, at.read_gbps);
    CHECK_STR(at.from, "h200");
    dump = gen_plan_dump(&p);
    CHECK(dump && strstr(dump, "\n[predicted]\n"));
    CHECKF(dump && (strstr(dump, ": not measured; ") == NULL) == measured, "%s", name);
    free(dump);
}

static void test_gpus(void)
{
    struct gen_gpu g;

    CHECK(gen_gpu_read("h200", &g, &err) == 0);
    check_gpu("h200", &g, 1, 4600);
    check_gpu("nvidia-h200", &g, 1, 4600); /* as a device says */
    check_gpu("nvidia-h200-nvl", &g, 0, 4600);
    g.mem_gbps = g.clock_mhz = 0; /* not known */
    check_gpu("nvidia-h201", &g, 0, 4600);
    CHECK(gen_gpu_read("l4", &g, &err) == 0);
    check_gpu("l4", &g, 0, 300 * 4600 / 4800.0);
    CHECK(gen_gpu_host(90, &g) == 0);
    check_gpu(g.name, &g, 0, 4600);
}

/* Tokens of mkbench --random-weights on the H200 (README.md, NOTEBOOK.md), timing off, at the
   position in the middle of a run of 128 tokens; carried plans first.  The constants were fitted to
   these and their stages: what is shown is that one set of them does for all, and still does.  A change of the
   kernel that makes these wrong asks for new constants in gen/predict.c, and for new figures here. */
static void test_measured(void)
{
    static const struct {
        const char *model;
        int context, pos;
        const char *set[6]; /* up to NULL */
        double us;
    } rows[] = {
        {"qwen3-0.6b", 33000, 65, {"inflight=4", "inflight_heads=3", "inflight_hop=2"}, 376},
        {"qwen3-0.6b", 33000, 1088, {"inflight=4", "inflight_heads=3", "inflight_hop=2"}, 405},
        {"qwen3-0.6b", 33000, 4160, {"inflight=4", "inflight_heads=3", "inflight_hop=2"}, 482},
        {"qwen3-0.6b", 33000, 32832, {"inflight=4", "inflight_heads=3", "inflight_hop=2"}, 1312},
        {"llama-3.2-1b", 4096, 192, {NULL}, 641},
        {"qwen3-4b", 4096, 192, {NULL}, 2073},
        {"qwen3-8b", 4096, 192, {"balance=30", "inflight_heads=5"}, 3676},
        {"qwen3-8b", 4096, 2112, {"balance=30", "inflight_heads=5"}, 3735},
        {"qwen2.5-0.5b", 4096, 192, {"balance=50", "inflight_heads=11", "inflight_hop=1"}, 368},
        {"qwen2.5-0.5b", 32768, 192, {"balance=50", "inflight_heads=11", "inflight_hop=1"}, 375},
        {"qwen2.5-0.5b", 32768, 32704, {"balance=50", "inflight_heads=11", "inflight_hop=1"}, 478},
        {"smollm2-135m", 4096, 192,
         {"ctas=96", "balance=200", "inflight=12", "inflight_heads=12", "inflight_hop=12"}, 256},
        {"smollm2-135m", 4096, 192, {"ctas=96", "balance=200"}, 260},
        {"smollm2-135m", 4096, 192, {"ctas=96", "balance=200", "early=x"}, 274},
        {"qwen3-0.6b", 33000, 65, {"inflight=3", "inflight_hop=2"}, 381},
        {"qwen3-0.6b", 33000, 1088, {"inflight=3", "inflight_hop=2"}, 408},
        {"qwen2.5-0.5b", 4096, 192, {"balance=50"}, 377},
        {"qwen3-4b", 4096, 192, {"balance=15", "inflight_heads=4"}, 2037},
        /* others: runs of 64 tokens */
        {"qwen2.5-1.5b", 4096, 1056, {NULL}, 1075},
        {"qwen2.5-1.5b", 4096, 1056, {"group=16"}, 1016},
        {"qwen3-1.7b", 4096, 1056, {"balance=15"}, 946},
        {"qwen2.5-7b", 4096, 1056, {NULL}, 3707},
        {"qwen2.5-7b", 4096, 4032, {NULL}, 3745},
        {"qwen2.5-7b", 4096, 1056, {"group=16"}, 3805},
        {"qwen2.5-7b", 4096, 1056, {"group=4"}, 4402},
        {"llama-3.1-8b", 4096, 1056, {NULL}, 3655},
        {"llama-3.1-8b", 4096, 1056, {"group=16"}, 4058},
        {"llama-3.2-3b", 4096, 1056, {NULL}, 1632},
        {"smollm2-1.7b", 4096, 1056, {"balance=100"}, 980},
        {"smollm2-1.7b", 4096, 1056, {"group=2"}, 1360},
        {"smollm2-360m", 4096, 1056, {NULL}, 367},
        {"smollm2-360m", 4096, 1056, {"early=sums"}, 393},
        {"smollm2-360m", 4096, 1056, {"group=16"}, 410},
        {"qwen2.5-0.5b", 4096, 160, {"group=16"}, 424},
        {"qwen3-0.6b", 4096, 1056, {"cluster=l2"}, 633},
        {"qwen3-0.6b", 4096, 160, {"cluster=l2", "group=4"}, 661},
        {"qwen3-0.6b", 4096, 160, {"cluster=l2", "group=16"}, 603},
        {"llama-3.2-1b", 4096, 1056, {"cluster=l2"}, 736},
        {"qwen3-4b", 4096, 1056, {"cluster=l2"}, 2402},
        {"qwen3-4b", 4096, 1056, {"cluster=l2", "group=16"}, 2326},
        {"qwen3-0.6b", 4096, 4032, {"cluster=l2"}, 713},
        {"llama-3.2-3b", 4096, 4032, {"ctas=128"}, 1949},
        {"smollm2-1.7b", 4096, 4032, {"ctas=128"}, 1135},
    };
    static struct gen_plan p;
    struct gen_prediction at;
    struct gen_model m;
    struct gen_gpu g;

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const double us = rows[i].us;
        get(rows[i].model, "h200", &m, &g);
        CHECKF(gen_plan_make(&m, &g, rows[i].context, NULL, rows[i].set, &p, &err) == 0, "%s",
               err.text);
        gen_predict(&p, rows[i].pos, &at);
        printf("%-13s %-10s %2d/%-2d at %5d: %6.0f us predicted, %6.0f measured, %+.1f %%\n",
               rows[i].model, rows[i].set[0] ? "set" : "default", p.inflight, p.inflight_hop,
               rows[i].pos, at.token_us, us, 100 * (us / at.token_us - 1));
        CHECKF(fabs(us / at.token_us - 1) < 0.08, "%s at %d, %d/%d", rows[i].model, rows[i].pos,
               p.inflight, p.inflight_hop);
    }
}

int main(void)
{
    test_all();
    test_larger();
    test_worse();
    test_tiles();
    test_gpus();
    test_measured();
    return check_done();
}
