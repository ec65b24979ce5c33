/* t-check.c - gen_plan_check takes every plan that mkgen makes, in little time, and refuses
   plans and programs of a token that could deadlock or overwrite what is still read; and
   gen_hop_describe names the sender that the kernel's own loops give. */
#include "config.h"

#include <limits.h>
#include <time.h>

#include "gen/check.h"
#include "gen/gen.h"
#include "runtime/abi.h"
#include "tests/check.h"

enum { MOST_US = 20000 };

static struct mk_err err;
static struct gen_step steps[GEN_MOST_STEPS]; /* a copy to spoil */
static int n_steps;

static double now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double) t.tv_sec * 1e6 + (double) t.tv_nsec / 1e3;
}

static void make(const char *model, const char *gpu, const char *const *set, struct gen_plan *p)
{
    struct gen_model m;
    struct gen_gpu g;

    CHECKF(gen_model_read(model, &m, &err) == 0, "%s", err.text);
    CHECKF(gen_gpu_read(gpu, &g, &err) == 0, "%s", err.text);
    CHECKF(gen_plan_make(&m, &g, 0, NULL, set, p, &err) == 0, "%s", err.text);
}

/* ---- What is right ------------------------------------------------------------- */

static void test_carried(void)
{
    static const char *const sets[][3] = {
        {NULL}, {"ctas=1", "tokens_per_launch=1", NULL}, {"ctas=7", "head_group=1", NULL}};
    struct gen_plan p;
    double most = 0, sum = 0;
    int plans = 0;

    for (int i = 0; gen_model_carried(i); i++)
        for (int j = 0; gen_gpu_profile(j); j++)
            for (size_t s = 0; s < sizeof sets / sizeof *sets; s++) {
                make(gen_model_carried(i), gen_gpu_profile(j), sets[s], &p);
                double us = 1e9;
                for (int k = 0; k < 3; k++) { /* another process may have the core */
                    const double from = now_us();
                    CHECKF(gen_plan_check(&p, &err) == 0, "%s", err.text);
                    us = fmin(us, now_us() - from);
                }
                if (s == 0 && (j == 0 || p.ctas >= 148))
                    printf("%-14s %-8s %3d CTAs, splits 1..%-2d %6.0f us\n", p.model.name,
                           p.gpu.name, p.ctas, p.max_splits, us);
                most = fmax(most, us);
                sum += us;
                plans++;
            }
    printf("%d plans: %.0f us each, %.0f us at most\n", plans, sum / plans, most);
    CHECKF(most < MOST_US, "%.0f us", most);
}

/* From every count of splits to every other. */
static void test_splits(void)
{
    struct gen_plan p;

    make("qwen3-0.6b", "h200", NULL, &p);
    for (int few = 1; few <= p.max_splits; few++)
        for (int many = few; many <= p.max_splits; many++)
            CHECKF(gen_steps_check(&p, gen_steps, few, many, &err) == 0, "%d, %d: %s", few, many,
                   err.text);
    make("smollm2-135m", "rtx5090", NULL, &p);
    for (int few = 1; few <= p.max_splits; few++)
        CHECKF(gen_steps_check(&p, gen_steps, few, p.max_splits, &err) == 0, "%d: %s", few,
               err.text);
    CHECK(p.max_splits > 20);
}

/* ---- What is wrong -------------------------------------------------------------- */

static void refused(const struct gen_plan *p, const char *message)
{
    CHECK(gen_plan_check(p, &err) == MK_EINVAL);
    CHECK_STR(err.text, message);
    CHECK(gen_plan_check(p, NULL) == MK_EINVAL);
}

#define TOO_SOON(hop, w, next, sends, r, last, reads)                                              \
    "plan: hop " hop ": CTA " w " may send " next " words (" sends ") while CTA " r                \
    " still reads " last " (" reads "): nothing that CTA " w " waits for in between comes from "   \
    "CTA " r ", directly or through others (attention splits: 1)"

/* Sizes of what depends on the number of CTAs, as gen/plan.c would have them. */
static void with_ctas(struct gen_plan *p, int ctas)
{
    p->ctas = ctas;
    p->max_splits = ctas / (p->model.K * p->groups);
    p->hop_words[GEN_HOP_PART] = p->max_splits * p->model.H * p->model.E / 8 * 3;
    p->hop_words[GEN_HOP_SCALE] = p->max_splits * p->model.H;
    p->hop_words[GEN_HOP_BEST] = ctas;
    p->hop_words[GEN_HOP_COUNT] = 2 * ctas * 16;
    p->exchange_words = 0;
    for (int i = 0; i < GEN_HOPS; i++) {
        p->hop_offset[i] = p->exchange_words;
        p->exchange_words += p->hop_words[i];
    }
}

static void test_ctas(void)
{
    struct gen_plan p;

    make("smollm2-135m", "h200", NULL, &p);
    with_ctas(&p, 119); /* more than send in hops O and DOWN; but all send in QKV */
    CHECKF(gen_plan_check(&p, &err) == 0, "%s", err.text);
    with_ctas(&p, 121);
    refused(&p, TOO_SOON("MLP", "0", "layer l+1's", "mlp", "120", "layer l's", "mlp_down"));
    with_ctas(&p, 400);
    refused(&p, TOO_SOON("ATTN", "0", "layer l+1's", "attn", "192", "layer l's", "attn_out"));
    with_ctas(&p, 1025);
    refused(&p, "plan: 1025 CTAs; the check takes 1..1024");
}

#define SPOILED(what, message)                                                                     \
    do {                                                                                           \
        struct gen_plan p = good;                                                                  \
        what;                                                                                      \
        refused(&p, message);                                                                      \
    } while (0)

static void test_plans(void)
{
    struct gen_plan good;

    make("qwen3-0.6b", "h200", NULL, &good);
    SPOILED(p.hop_buffers[GEN_HOP_COUNT] = 1,
            TOO_SOON("COUNT", "0", "tag L+2's", "count_digit", "1", "tag L+1's", "count_digit"));
    SPOILED(p.hop_buffers[GEN_HOP_COUNT] = 0, "plan: hop COUNT has no buffer");
    SPOILED(p.hop_buffers[GEN_HOP_COUNT] = 3,
            "plan: hop COUNT: its 128 CTAs send and await 6144 words, and it has 4096");
    SPOILED(p.hop_offset[GEN_HOP_ATTN] -= 8, "plan: hops SCALE and ATTN overlap at word 14072");
    SPOILED(p.hop_offset[GEN_HOP_QKV] = -8,
            "plan: hop QKV: words -8..1527 are not inside the exchange's 20992");
    SPOILED(p.exchange_words -= 8,
            "plan: hop COUNT: words 16896..20991 are not inside the exchange's 20984");
    SPOILED(p.hop_words[GEN_HOP_O]--,
            "plan: hop O: its 128 CTAs send and await 384 words, and it has 383");
    SPOILED(
        p.stages = 1,
        "plan: phase QKV: consumers wait for 2 chunks at once; with stages 1 that is a deadlock");
    SPOILED(p.stage_bytes -= 512,
            "plan: phase QKV: a chunk has 16384 bytes and a stage of the ring 15872");
    SPOILED(
        p.inflight_hop = 0,
        "plan: inflight is 3 and inflight_hop 0; they must be 1 or more, and inflight the larger");
    SPOILED(p.phase[GEN_MLP].step = 1, "plan: hop MLP: word 0 is sent by CTA 0 and by CTA 1");
    SPOILED(p.phase[GEN_MLP].blocks++, "plan: phase MLP: 769 blocks cannot be dealt by 2");
    SPOILED(p.phase[GEN_O].blocks--,
            "plan: hop O: word 381 is awaited and no CTA sends it: deadlock");
    SPOILED(p.phase[GEN_O].blocks++,
            "plan: phase O: CTA 0's 2 blocks do not end before the next phase begins");
    SPOILED(p.phase[GEN_DOWN].spans++,
            "plan: phase DOWN: 4 chunks of 32 units are not a block of 96 units");
    SPOILED(p.phase[GEN_DOWN].span_units--,
            "plan: phase DOWN: 3 chunks of 31 units are not a block of 96 units");
    SPOILED(p.phase[GEN_QKV].step = 0, "plan: phase QKV: 512 blocks cannot be dealt by 0");
    SPOILED(p.max_splits++,
            "plan: hop PART: 17 splits of 8 tasks are more than one task for each of 128 CTAs");
    SPOILED(p.groups++, "plan: 2 groups of 2 query heads are not the 2 of a KV head");
    SPOILED(p.epoch0 = 0,
            "plan: epoch0 is 0 and a launch takes 3840 tags; tags must be 1..2147483647");
    SPOILED(p.tokens_per_launch = INT_MAX / 60 + 1,
            "plan: epoch0 is 1 and a launch takes 2147483700 tags; tags must be 1..2147483647");
    make("qwen3-0.6b", "h200", (const char *const[]){"ctas=127", NULL}, &good);
    SPOILED(p.phase[GEN_O].blocks++,
            "plan: hop O: CTA 1 sends word 384, and only 0..383 are awaited");
}

/* ---- Programs that are wrong ---------------------------------------------------- */

static void restore(void)
{
    for (n_steps = 0; gen_steps[n_steps].stage; n_steps++)
        steps[n_steps] = gen_steps[n_steps];
    steps[n_steps] = gen_steps[n_steps];
    CHECK(n_steps < GEN_MOST_STEPS);
}

/* The first step with OP on HOP in tokens of kind WHEN. */
static struct gen_step *find(int op, int hop, int when)
{
    for (struct gen_step *s = steps; s->stage; s++)
        if (s->op == op && s->hop == hop && s->when & when)
            return s;
    CHECKF(0, "no such step");
    return steps;
}

static void drop(struct gen_step *s)
{
    memmove(s, s + 1, (size_t) (steps + n_steps-- - s) * sizeof *s);
}

static void refused_steps(const struct gen_plan *p, const char *message)
{
    CHECK(gen_steps_check(p, steps, 1, p->max_splits, &err) == MK_EINVAL);
    CHECK_STR(err.text, message);
    restore();
}

static void test_steps(void)
{
    struct gen_plan p;
    struct gen_step *a, *b, keep;

    make("qwen3-0.6b", "h200", NULL, &p);
    restore();
    CHECK(gen_steps_check(&p, steps, 1, p.max_splits, &err) == 0);

    a = find(GEN_SEND, GEN_HOP_MLP, GEN_ALWAYS), b = find(GEN_WAIT, GEN_HOP_MLP, GEN_ALWAYS);
    keep = *a, *a = *b, *b = keep;
    refused_steps(&p,
                  "plan: hop MLP: CTAs wait in mlp_down for words that nobody has sent: deadlock");
    drop(find(GEN_SEND, GEN_HOP_ATTN, GEN_SPLIT));
    refused_steps(&p,
                  "plan: hop ATTN: CTAs wait in attn_out for words that nobody has sent: deadlock");
    drop(find(GEN_WAIT, GEN_HOP_DOWN, GEN_ALWAYS));
    refused_steps(
        &p, "plan: hop DOWN: no CTA waits for what mlp_down sends before mlp_down sends again");
    find(GEN_SEND, GEN_HOP_BEST, GEN_SAMPLE)->tag = 33;
    refused_steps(&p, "plan: hop BEST: grid_best uses tag 61 of a token, which has 60");
    for (struct gen_step *s = steps; s->stage; s++)
        s->tag -= s->when == GEN_TOP_P ? 8 : 0;
    refused_steps(&p, "plan: hop COUNT: count_digit sends with tag 29 behind one with tag 36");
    find(GEN_WAIT, GEN_HOP_COUNT, GEN_TOP_P)->tag++;
    refused_steps(
        &p, "plan: hop COUNT: CTAs wait in count_digit for words that nobody has sent: deadlock");
    /* Once more the same hop, with a tag of its own or with the same. */
    steps[n_steps++] = (struct gen_step){"again", GEN_SAMPLE, GEN_SEND, GEN_HOP_BEST, 18};
    steps[n_steps++] = (struct gen_step){"again", GEN_SAMPLE, GEN_WAIT, GEN_HOP_BEST, 18};
    steps[n_steps] = (struct gen_step){0};
    refused_steps(&p, TOO_SOON("BEST", "0", "tag L+18's", "again", "1", "tag L+17's", "grid_best"));
    steps[n_steps++] = (struct gen_step){"again", GEN_ALWAYS, GEN_SEND, GEN_HOP_O, GEN_LAYER_TAG};
    steps[n_steps++] = (struct gen_step){"again", GEN_ALWAYS, GEN_WAIT, GEN_HOP_O, GEN_LAYER_TAG};
    steps[n_steps] = (struct gen_step){0};
    refused_steps(&p, "plan: hop O: again sends with tag 0 behind one with tag 0");
    /* A layer of nothing but attention and O: CTAs without a block in O or a task say nothing. */
    for (int hop = GEN_HOP_MLP; hop <= GEN_HOP_DOWN; hop++) {
        drop(find(GEN_SEND, hop, GEN_ALWAYS));
        drop(find(GEN_WAIT, hop, GEN_ALWAYS));
    }
    make("smollm2-135m", "h200", NULL, &p);
    CHECK(gen_steps_check(&p, steps, 1, p.max_splits, &err) == 0);
    with_ctas(&p, 121);
    refused_steps(&p, TOO_SOON("ATTN", "0", "layer l+1's", "attn", "80", "layer l's", "attn_out"));
}

/* ---- Words in sentences ---------------------------------------------------------- */

static void describes(const struct gen_plan *p, int hop, int word, const char *want)
{
    char text[200];

    gen_hop_describe(p, hop < 0 ? word : p->hop_offset[hop] + word, text, sizeof text);
    CHECK_STR(text, want);
}

static void sent_by(const struct gen_plan *p, int word, int cta)
{
    char text[200], want[32];

    gen_hop_describe(p, word, text, sizeof text);
    snprintf(want, sizeof want, ", sent by CTA %d", cta);
    CHECKF(strlen(text) > strlen(want) && !strcmp(text + strlen(text) - strlen(want), want),
           "%s, not CTA %d", text, cta);
}

/* The sender of a phase's words and of attention's, from the loops of gemv.cu.m4 and attn.cu.m4. */
static void test_senders(const char *gpu, const char *const *set)
{
    static const int hops[][2] = {{GEN_HOP_QKV, GEN_QKV},
                                  {GEN_HOP_O, GEN_O},
                                  {GEN_HOP_MLP, GEN_MLP},
                                  {GEN_HOP_DOWN, GEN_DOWN}};
    struct gen_plan p;

    make("smollm2-135m", gpu, set, &p);
    const int words = p.model.E / 8 * 3, ratio = p.model.H / p.model.K;
    for (int cta = 0; cta < p.ctas; cta++) {
        for (int i = 0; i < 4; i++) {
            const int step = p.phase[hops[i][1]].step, blocks = p.phase[hops[i][1]].blocks / step;
            for (int b = cta; b < blocks; b += p.ctas)
                sent_by(&p, p.hop_offset[hops[i][0]] + b * 3 + b % 3, cta);
        }
        for (int t = cta; t < p.model.K * p.groups * p.max_splits; t += p.ctas) {
            const int split = t / (p.model.K * p.groups);
            const int q = t % p.model.K * ratio + t / p.model.K % p.groups * p.head_group;
            const int head = split * p.model.H + q;
            sent_by(&p, p.hop_offset[GEN_HOP_PART] + head * words + words - 1, cta);
            sent_by(&p, p.hop_offset[GEN_HOP_SCALE] + head, cta);
        }
        sent_by(&p, p.hop_offset[GEN_HOP_BEST] + cta, cta);
        sent_by(&p, p.hop_offset[GEN_HOP_COUNT] + (p.ctas + cta) * 16, cta);
    }
}

static void test_describe(void)
{
    struct gen_plan p;
    char text[8] = "1234567";

    make("qwen3-0.6b", "h200", NULL, &p);
    describes(&p, GEN_HOP_O, 17, "hop O word 17 (rows 46..47), sent by CTA 5");
    describes(&p, GEN_HOP_MLP, 3 * 128 + 1, "hop MLP word 385 (rows 1027..1029), sent by CTA 0");
    describes(&p, GEN_HOP_QKV, 0, "hop QKV word 0 (rows 0..2, q head 0), sent by CTA 0");
    describes(&p, GEN_HOP_QKV, (16 + 3) * 48 + 2,
              "hop QKV word 914 (rows 2438..2439, k head 3), sent by CTA 48");
    describes(&p, GEN_HOP_QKV, (16 + 8 + 7) * 48 + 47,
              "hop QKV word 1535 (rows 4094..4095, v head 7), sent by CTA 127");
    describes(&p, GEN_HOP_PART, (5 * 16 + 3) * 48 + 4,
              "hop PART word 3988 (split 5, head 3, values 11..13), sent by CTA 41");
    describes(&p, GEN_HOP_SCALE, 5 * 16 + 3,
              "hop SCALE word 83 (split 5, head 3, maximum and sum), sent by CTA 41");
    describes(&p, GEN_HOP_ATTN, 3 * 48 + 4,
              "hop ATTN word 148 (head 3, values 11..13), sent by CTA 1, or CTA 20 when "
              "attention is split");
    describes(&p, GEN_HOP_BEST, 7, "hop BEST word 7 (a candidate), sent by CTA 7");
    describes(&p, GEN_HOP_COUNT, (128 + 3) * 16 + 15,
              "hop COUNT word 2111 (buffer 1, digit 15), sent by CTA 3");
    describes(&p, -1, -1, "word -1, outside the exchange");
    describes(&p, -1, p.exchange_words, "word 20992, outside the exchange");
    gen_hop_describe(&p, 0, text, sizeof text);
    CHECK_STR(text, "hop QKV");
    gen_hop_describe(&p, 0, text, 1);
    CHECK_STR(text, "");
    make("qwen3-0.6b", "l4", NULL, &p);
    describes(&p, -1, p.hop_offset[GEN_HOP_SCALE] - 1,
              "hop PART word 5375 (split 6, head 15, values 126..127), sent by CTA 55");
    describes(&p, -1, p.hop_offset[GEN_HOP_COUNT] - 1, "word 9775, between two hops");
}

int main(void)
{
    test_carried();
    test_splits();
    test_ctas();
    test_plans();
    test_steps();
    test_describe();
    test_senders("h200", NULL);
    test_senders("t4", (const char *const[]){"head_group=1", NULL});
    return check_done();
}
