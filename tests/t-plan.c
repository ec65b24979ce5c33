/* t-plan.c - properties of plans, over random shapes and over every carried model on every
   profile: every row of every matrix has one place in one stream and is multiplied once; nothing
   in a stream, in shared memory, in the hop buffers or in prefill's scratch overlaps; what the
   templates count in 32 bits fits.  The templates' own formulas stand here a second time, on
   purpose.  T_PLAN_SEED chooses other shapes. */
#include "config.h"

#include <limits.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "gen/gen.h"
#include "runtime/abi.h"
#include "tests/check.h"

enum { SHAPES = 3000, MOST_SET = 8 };

static struct mk_err err;
static char what[400]; /* the plan at work, for failures */
static uint64_t state;

static uint32_t next_random(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t) (state >> 33);
}

static int random_in(int lo, int hi)
{
    return lo + (int) (next_random() % (uint32_t) (hi - lo + 1));
}

static int ceil_div(int a, int b)
{
    return (a + b - 1) / b;
}

static int smaller(int a, int b)
{
    return a < b ? a : b;
}

/* The first failure of a plan speaks for the others. */
#define PLAN_CHECK(cond, ...)                                                                      \
    do {                                                                                           \
        check_count++;                                                                             \
        if (!(cond)) {                                                                             \
            check_failed++;                                                                        \
            fprintf(stderr, "t-plan.c:%d: %s: %s", __LINE__, what, #cond);                         \
            fprintf(stderr, ": " __VA_ARGS__);                                                     \
            fputc('\n', stderr);                                                                   \
            return;                                                                                \
        }                                                                                          \
    } while (0)

/* ---- Streams ----------------------------------------------------------------- */

/* gemv.cu.m4: my_blocks, my_block; pack.cu.m4: block_at. */
static int my_blocks(const struct gen_plan *p, const struct gen_phase *f, int cta)
{
    int dealt = f->blocks / f->step;

    return (dealt / p->ctas + (cta < dealt % p->ctas)) * f->step;
}

static int my_block(const struct gen_plan *p, const struct gen_phase *f, int cta, int local)
{
    return (local / f->step * p->ctas + cta) * f->step + local % f->step;
}

static int64_t block_at(const struct gen_plan *p, const struct gen_phase *f, int64_t phase,
                        int block)
{
    int dealt = block / f->step;

    return phase + dealt % p->ctas * p->cta_bytes +
           (int64_t) (dealt / p->ctas * f->step + block % f->step) * f->units * 512;
}

/* One phase, which begins at byte START of every stream and must end before END: pack and decode
   agree on the place of each block, and each block is decoded once. */
static void check_dealing(const struct gen_plan *p, int id, int64_t start, int64_t end)
{
    const struct gen_phase *f = &p->phase[id];
    const int64_t bytes = (int64_t) f->units * 512;
    unsigned char *seen = calloc((size_t) f->blocks + 1, 1);
    int total = 0;

    PLAN_CHECK(seen != NULL);
    for (int cta = 0; cta < p->ctas; cta++) {
        const int n = my_blocks(p, f, cta);
        int64_t at = cta * p->cta_bytes + start;
        if (n > f->cta_blocks)
            total = INT_MIN / 2;
        for (int local = 0; local < n; local++, at += bytes) {
            const int b = my_block(p, f, cta, local);
            if (b < 0 || b >= f->blocks || seen[b] || block_at(p, f, start, b) != at ||
                at + bytes > cta * p->cta_bytes + end)
                total = INT_MIN / 2;
            else
                seen[b] = 1, total++;
        }
    }
    free(seen);
    PLAN_CHECK(total == f->blocks, "phase %d: %d blocks", id, f->blocks);
}

static void check_phase(const struct gen_plan *p, int id, int rows, int cols, int step)
{
    const struct gen_phase *f = &p->phase[id];
    int units = 0;

    PLAN_CHECK(f->rows == rows && f->cols == cols && f->step == step, "phase %d", id);
    PLAN_CHECK(f->units * 32 >= cols && f->units * 32 < cols + 32, "phase %d", id);
    PLAN_CHECK(f->blocks * 8 >= rows && f->blocks * 8 < rows + 8 && f->blocks % step == 0,
               "phase %d", id);
    for (int span = 0; span < f->spans; span++) {
        const int n = smaller(f->span_units, f->units - span * f->span_units);
        PLAN_CHECK(n > 0, "phase %d, span %d is empty", id, span);
        PLAN_CHECK(n * 512 <= p->chunk_bytes && n * 512 <= p->stage_bytes, "phase %d: %d units", id,
                   n);
        units += n;
    }
    PLAN_CHECK(units == f->units, "phase %d", id);
    PLAN_CHECK(f->units * 64 <= p->scratch_bytes, "phase %d: x does not fit", id);
    PLAN_CHECK((int64_t) f->cta_blocks * f->units * 512 <= INT_MAX, "phase %d", id);
}

static void check_streams(const struct gen_plan *p)
{
    const struct gen_model *m = &p->model;
    const int64_t head_bytes =
        (int64_t) p->phase[GEN_HEAD].cta_blocks * p->phase[GEN_HEAD].units * 512;

    check_phase(p, GEN_QKV, (m->H + 2 * m->K) * m->E, m->D, 1);
    check_phase(p, GEN_O, m->D, m->H * m->E, 1);
    check_phase(p, GEN_MLP, 2 * m->F, m->D, 2);
    check_phase(p, GEN_DOWN, m->D, m->F, 1);
    check_phase(p, GEN_HEAD, m->V, m->D, 1);
    PLAN_CHECK(p->phase[GEN_QKV].offset == 0);
    for (int i = 0; i < GEN_HEAD; i++) {
        const int64_t end = i + 1 < GEN_HEAD ? p->phase[i + 1].offset : p->layer_bytes;
        check_dealing(p, i, p->phase[i].offset, end);
        if (m->L > 1)
            check_dealing(p, i, (m->L - 1) * p->layer_bytes + p->phase[i].offset,
                          (m->L - 1) * p->layer_bytes + end);
    }
    check_dealing(p, GEN_HEAD, p->head_offset, p->cta_bytes);
    PLAN_CHECK(p->head_offset == p->layer_bytes * m->L &&
               p->cta_bytes == p->head_offset + head_bytes);
    PLAN_CHECK(p->stream_bytes == p->cta_bytes * p->ctas);
    PLAN_CHECK(p->cta_bytes % 512 == 0 && p->layer_bytes % 512 == 0);
    PLAN_CHECK(p->embed_bytes == (m->tied ? 0 : (int64_t) m->V * m->D * 2));
}

/* ---- Things laid out one behind the other ---------------------------------- */

struct span {
    const char *name;
    int64_t from, size;
};

/* The spans lie inside 0 .. TOTAL, begin at multiples of ALIGN, and have no byte in common. */
static void check_spans(const struct span *s, int n, int64_t total, int64_t align)
{
    for (int i = 0; i < n; i++) {
        PLAN_CHECK(s[i].from >= 0 && s[i].size >= 0 && s[i].from + s[i].size <= total &&
                       s[i].from % align == 0,
                   "%s at %lld, %lld of %lld", s[i].name, (long long) s[i].from,
                   (long long) s[i].size, (long long) total);
        for (int j = 0; j < i; j++)
            PLAN_CHECK(!s[i].size || !s[j].size || s[i].from >= s[j].from + s[j].size ||
                           s[j].from >= s[i].from + s[i].size,
                       "%s and %s", s[j].name, s[i].name);
    }
}

static void check_hops(const struct gen_plan *p)
{
    const struct gen_model *m = &p->model;
    const int head = m->E / 8 * 3;
    /* As far as the templates index each. */
    const int64_t used[GEN_HOPS] = {
        [GEN_HOP_QKV] = (m->H + 2 * m->K) * head,
        [GEN_HOP_PART] = ((int64_t) (p->max_splits - 1) * m->H + m->H) * head,
        [GEN_HOP_SCALE] = (int64_t) (p->max_splits - 1) * m->H + m->H,
        [GEN_HOP_ATTN] = m->H * head,
        [GEN_HOP_O] = p->phase[GEN_O].blocks * 3,
        [GEN_HOP_MLP] = p->phase[GEN_MLP].blocks / 2 * 3,
        [GEN_HOP_DOWN] = p->phase[GEN_DOWN].blocks * 3,
        [GEN_HOP_BEST] = p->ctas,
        [GEN_HOP_COUNT] = 2 * p->ctas * 16,
    };
    struct span s[GEN_HOPS];

    for (int i = 0; i < GEN_HOPS; i++) {
        s[i] = (struct span){"hop", p->hop_offset[i], used[i]};
        PLAN_CHECK(p->hop_words[i] == used[i], "hop %d has %d words, %lld are used", i,
                   p->hop_words[i], (long long) used[i]);
    }
    check_spans(s, GEN_HOPS, p->exchange_words, 8);
}

static void check_vectors(const struct gen_plan *p)
{
    const struct gen_model *m = &p->model;
    const int norm = m->qk_norm ? m->E : 0, bias = m->qkv_bias ? (m->H + 2 * m->K) * m->E : 0;
    const struct span layer[] = {
        {"attn_norm", p->vec_attn_norm, m->D}, {"mlp_norm", p->vec_mlp_norm, m->D},
        {"q_norm", p->vec_q_norm, norm},       {"k_norm", p->vec_k_norm, norm},
        {"bias", p->vec_bias, bias},
    };
    const struct span all[] = {
        {"layers", 0, (int64_t) m->L * p->vec_layer},
        {"norm", p->vec_norm, m->D},
    };

    check_spans(layer, 5, p->vec_layer, 4); /* float4 loads */
    check_spans(all, 2, p->vec_floats, 4);
    PLAN_CHECK(p->vec_floats <= INT_MAX);
}

static void check_kv(const struct gen_plan *p)
{
    const struct gen_model *m = &p->model;
    const int64_t last = (m->L - 1) * p->kv_layer + (m->K - 1) * p->kv_head + p->kv_head / 2 +
                         (int64_t) (p->context - 1) * m->E + m->E - 1;

    PLAN_CHECK(p->kv_head / 2 >= (int64_t) p->context * m->E && p->kv_head % 16 == 0);
    PLAN_CHECK(p->kv_layer >= p->kv_head * m->K && p->kv_bytes == (last + 1) * 2);
}

/* prefill.cu.m4: resid, x, y and raw q, k, v of T tokens. */
static void check_scratch(const struct gen_plan *p)
{
    const struct gen_model *m = &p->model;
    const int64_t t = p->prefill_tokens, x = t * p->pf_x_cols * 2;
    const struct span s[] = {
        {"resid", p->pf_resid, t * m->D * 4},
        {"x", p->pf_x, x},
        {"y", p->pf_x + x, x},
        {"qkv", p->pf_qkv, t * (m->H + 2 * m->K) * m->E * 4},
    };

    check_spans(s, 4, p->pf_bytes, 16);
    PLAN_CHECK(t % 16 == 0 && t * p->pf_x_cols * 2 <= INT_MAX);
    PLAN_CHECK(p->pf_x_cols >= p->phase[GEN_QKV].units * 32 &&
               p->pf_x_cols >= p->phase[GEN_O].units * 32 &&
               p->pf_x_cols >= p->phase[GEN_DOWN].units * 32 && p->pf_x_cols >= m->H * m->E);
}

/* ---- Shared memory --------------------------------------------------------- */

/* Put SIZE bytes behind *AT, aligned. */
static void place(int64_t *at, int64_t size, int64_t align)
{
    *at = (*at + align - 1) / align * align + size;
}

/* sizeof(Attention), attn.cu.m4. */
static int64_t attention_size(const struct gen_plan *p)
{
    const int g = p->head_group, e = p->model.E;
    int64_t at = 0;

    place(&at, g * e * 4, 16);            /* q */
    place(&at, e * 2, 16);                /* key */
    place(&at, e * 2, 2);                 /* value */
    place(&at, p->warps * g * e * 4, 16); /* out */
    place(&at, p->warps * g * 4, 4);      /* max */
    place(&at, p->warps * g * 4, 4);      /* sum */
    place(&at, 0, 16);
    return at;
}

/* sizeof(Shared), shared.cu.m4. */
static int64_t shared_size(const struct gen_plan *p)
{
    int64_t at = 0;

    place(&at, (int64_t) p->stages * p->stage_bytes, 128);
    place(&at, p->scratch_bytes, 16);
    place(&at, p->model.D * 4, 16);                        /* resid */
    place(&at, 2 * p->round_blocks * 8 * p->warps * 4, 4); /* part */
    place(&at, p->warps * 4, 4);                           /* sum */
    place(&at, p->warps * 16, 16);                         /* best */
    place(&at, 16 * 5 * 4, 4);                             /* hist */
    place(&at, 2 * p->stages * 8, 8);                      /* full, free */
    place(&at, sizeof(struct mk_args), 8);
    place(&at, 5 * 4, 4); /* hold .. index */
    place(&at, 0, 128);
    return at;
}

static void check_shared(const struct gen_plan *p)
{
    const int64_t size = shared_size(p);

    PLAN_CHECK(attention_size(p) <= p->scratch_bytes && p->scratch_bytes % 16 == 0);
    PLAN_CHECK((p->head_group + 2) * p->model.E <= p->warps * p->head_group * p->model.E,
               "raw q, k, v");
    PLAN_CHECK(size <= p->smem_bytes && p->smem_bytes <= p->gpu.smem_block, "%lld",
               (long long) size);
    PLAN_CHECK(p->smem_bytes - size < 1536, "%lld of %d", (long long) size, p->smem_bytes);
    PLAN_CHECK(p->stages >= 2 && p->inflight >= 1 && p->inflight <= p->stages);
    PLAN_CHECK(p->inflight_hop >= 1 && p->inflight_hop <= p->inflight);
}

/* A tile of prefill.cu.m4 with STAGES wanted. */
static void check_tile(const struct gen_plan *p, int tokens, int blocks, int cols, int wm, int wn,
                       int stages)
{
    const int threads = 8 * 32, wk = 8 / (wm * wn), work = p->prefill_smem_bytes - 1024;
    const int stage = tokens * cols * 2 + blocks * cols * 16;

    PLAN_CHECK(smaller(work / stage, stages) >= 2, "tile %d x %d x %d", tokens, blocks * 8, cols);
    PLAN_CHECK(tokens * cols / 8 % threads == 0 && blocks * cols % threads == 0 &&
               threads % cols == 0);
    PLAN_CHECK(tokens % (16 * wm) == 0 && blocks % wn == 0 && blocks / wn % 2 == 0 &&
               cols / 32 % wk == 0);
    PLAN_CHECK(wk == 1 || wk * tokens * blocks * 32 <= work, "partial sums");
}

static void check_prefill(const struct gen_plan *p)
{
    const int work = p->prefill_smem_bytes - 1024, flash = p->flash_n * p->model.E * 2 * 2;
    int64_t size = work;

    check_tile(p, p->gemm_m, p->gemm_n / 8, p->gemm_k, 2, 4, p->gemm_stages);
    PLAN_CHECK(p->gemm_stages * (p->gemm_m + p->gemm_n) * p->gemm_k * 2 <= work,
               "all stages of the wide tile");
    check_tile(p, 64, 8, 64, 2, 2, 8);
    check_tile(p, 16, 2, 256, 1, 1, 8);
    PLAN_CHECK(p->flash_m == 8 * 16 && work / flash >= 2 &&
               p->flash_n % (8 * 32 / (p->model.E / 8)) == 0);
    place(&size, sizeof(struct mk_args), 8);
    place(&size, 0, 128);
    PLAN_CHECK(work % 128 == 0 && size <= p->prefill_smem_bytes &&
               p->prefill_smem_bytes <= p->gpu.smem_block);
}

/* ---- Attention ------------------------------------------------------------- */

/* attn.cu.m4: the tasks at N positions cover each (query head, position) once. */
static void check_splits(const struct gen_plan *p, int n)
{
    const int splits = smaller(p->max_splits, ceil_div(n, p->split_min));
    int at = 0;

    PLAN_CHECK(splits >= 1 && splits <= p->max_splits);
    for (int split = 0; split < splits; split++) {
        const int from = (int) ((long long) n * split / splits),
                  to = (int) ((long long) n * (split + 1) / splits);
        PLAN_CHECK(from == at && to > from, "%d positions, split %d: %d .. %d", n, split, from, to);
        at = to;
    }
    PLAN_CHECK(at == n);
}

static void check_tasks(const struct gen_plan *p)
{
    const struct gen_model *m = &p->model;
    const int ratio = m->H / m->K, splits = p->max_splits;
    int *seen = calloc((size_t) m->H * (size_t) splits, sizeof *seen), bad = 0;

    PLAN_CHECK(seen != NULL);
    for (int cta = 0; cta < p->ctas; cta++) {
        for (int task = cta; task < m->K * p->groups * splits; task += p->ctas) {
            const int head = task % m->K, group = task / m->K % p->groups,
                      split = task / (m->K * p->groups);
            const int q0 = head * ratio + group * p->head_group;
            const int queries = smaller(p->head_group, (head + 1) * ratio - q0);
            bad += queries <= 0;
            for (int q = q0; q < q0 + queries; q++)
                seen[split * m->H + q]++;
        }
    }
    for (int i = 0; i < m->H * splits; i++)
        bad += seen[i] != 1;
    free(seen);
    PLAN_CHECK(!bad, "%d", bad);
    PLAN_CHECK(splits == 1 || m->K * p->groups * splits <= p->ctas, "a CTA has two tasks");
}

/* ALL: every number of positions; else some. */
static void check_attention(const struct gen_plan *p, int all)
{
    const int before = check_failed;

    check_tasks(p);
    for (int n = 1; n <= p->context && check_failed == before;
         n += all ? 1 : random_in(1, 1 + p->context / 50))
        check_splits(p, n);
    check_splits(p, p->context);
}

/* ---- Numbers of 32 bits ---------------------------------------------------- */

/* The values of params.m4 that the templates keep in 64 bits. */
static int is_wide(const char *name)
{
    static const char *const wide[] = {"PLAN_LAYER_BYTES", "PLAN_HEAD_OFFSET", "PLAN_CTA_BYTES",
                                       "PLAN_KV_",         "PLAN_PF_",         "PLAN_AT_",
                                       "PLAN_TOKEN_BYTES"};

    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++)
        if (!strncmp(name, wide[i], strlen(wide[i])) && strcmp(name, "PLAN_PF_X_COLS"))
            return 1;
    return 0;
}

static void check_numbers(const struct gen_plan *p)
{
    char *text = gen_plan_params(p), name[64];
    int numbers = 0;

    PLAN_CHECK(text != NULL);
    for (char *line = text; line && *line; line = strchr(line, '\n'), line += line != NULL) {
        long long value;
        int end = 0;
        if (sscanf(line, "m4_define({|%63[A-Z0-9_]|}, {|%lld|}%n", name, &value, &end) != 2 || !end)
            continue;
        numbers++;
        if (value < 0 || (value > INT_MAX && !is_wide(name)))
            CHECKF(0, "%s: %s is %lld", what, name, value);
    }
    free(text);
    PLAN_CHECK(numbers > 60 + 10 * p->model.L, "%d", numbers);
}

static void check_counts(const struct gen_plan *p)
{
    int64_t chunks = 0;

    PLAN_CHECK(p->layer_bytes <= 1 << 30); /* read_ahead steps past the end in int */
    for (int i = 0; i < GEN_HEAD; i++)
        chunks += (int64_t) my_blocks(p, &p->phase[i], 0) * p->phase[i].spans;
    chunks = chunks * p->model.L +
             (int64_t) my_blocks(p, &p->phase[GEN_HEAD], 0) * p->phase[GEN_HEAD].spans;
    PLAN_CHECK(chunks * p->tokens_per_launch <= 1 << 30);
    PLAN_CHECK((int64_t) p->context * p->model.E <= 1 << 30);
    PLAN_CHECK((int64_t) p->exchange_words * 4 <= INT_MAX);
}

static void check_plan(const struct gen_plan *p, int thorough)
{
    check_streams(p);
    check_hops(p);
    check_vectors(p);
    check_kv(p);
    check_scratch(p);
    check_shared(p);
    check_prefill(p);
    check_counts(p);
    check_attention(p, thorough);
    if (thorough)
        check_numbers(p);
}

/* ---- Which plans ----------------------------------------------------------- */

static int make(const struct gen_model *m, const struct gen_gpu *g, int context, const char *file,
                const char *const *set, struct gen_plan *p)
{
    int n = snprintf(what, sizeof what,
                     "%s D %d H %d K %d E %d F %d V %d L %d on %s (%d SMs, %d bytes), context %d",
                     m->name, m->D, m->H, m->K, m->E, m->F, m->V, m->L, g->name, g->sms,
                     g->smem_block, context);

    for (int i = 0; set && set[i] && n < (int) sizeof what; i++)
        n += snprintf(what + n, sizeof what - (size_t) n, ", %s", set[i]);
    err.code = 0, err.text[0] = 0;
    return gen_plan_make(m, g, context, file, set, p, &err);
}

/* What the tests cannot do without. */
static void get(const char *model, const char *gpu, struct gen_model *m, struct gen_gpu *g)
{
    if (gen_model_read(model, m, &err) || gen_gpu_read(gpu, g, &err)) {
        fprintf(stderr, "%s\n", err.text);
        exit(1);
    }
}

static void random_model(struct gen_model *m)
{
    static const int divisors[] = {1, 2, 3, 5, 8, 13, 32};

    memset(m, 0, sizeof *m);
    strcpy(m->name, "random");
    m->E = random_in(0, 1) ? 64 : 128;
    m->K = divisors[random_in(0, 6)];
    m->H = m->K * random_in(1, 12);
    m->D = random_in(0, 3) ? random_in(1, 64) * 64 : random_in(1, 500) * 8;
    m->F = random_in(0, 3) ? random_in(1, 96) * 128 : random_in(1, 2000) * 8;
    m->V = random_in(1, random_in(0, 1) ? 3000 : 160000);
    m->L = random_in(1, 6);
    m->max_context = 1 << random_in(0, 20);
    m->eps = 1e-6;
    m->rope_theta = 1e4;
    m->qk_norm = random_in(0, 1);
    m->qkv_bias = random_in(0, 1);
    m->tied = random_in(0, 1);
    m->dtype = random_in(GEN_BF16, GEN_FP32);
}

static void random_gpu(struct gen_gpu *g)
{
    int n = 0;

    while (gen_gpu_profile(n))
        n++;
    CHECK(gen_gpu_read(gen_gpu_profile(random_in(0, n - 1)), g, &err) == 0);
    if (random_in(0, 2) == 0)
        g->sms = random_in(1, 200);
    if (random_in(0, 2) == 0)
        g->smem_block = random_in(16, 227) * 1024;
}

/* The first few of the keys that chance chooses, each with a value in its range. */
static void random_set(char text[MOST_SET][48], const char **set)
{
    static const struct {
        const char *key;
        int lo, hi, step;
    } keys[] = {
        {"ctas", 1, 132, 1},
        {"warps", 4, 7, 1},
        {"chunk_bytes", 512, 20000, 1},
        {"stages", 2, 12, 1},
        {"round_blocks", 2, 8, 2},
        {"split_min", 1, 300, 1},
        {"head_group", 1, 4, 1},
        {"tokens_per_launch", 1, 1024, 1},
        {"prefill_tokens", 16, 8192, 16},
        {"gemm_m", 64, 128, 64},
        {"gemm_n", 64, 128, 64},
        {"gemm_k", 32, 64, 32},
        {"gemm_stages", 2, 8, 1},
        {"flash_n", 32, 64, 32},
    };
    int n = 0;

    for (size_t i = 0; i < sizeof keys / sizeof *keys && n < MOST_SET; i++) {
        if (random_in(0, 9))
            continue;
        snprintf(text[n], 48, "%s=%d", keys[i].key,
                 keys[i].lo +
                     random_in(0, (keys[i].hi - keys[i].lo) / keys[i].step) * keys[i].step);
        set[n] = text[n];
        n++;
    }
    set[n] = NULL;
}

static void test_random(void)
{
    static struct gen_plan p;
    const char *set[MOST_SET + 1];
    char text[MOST_SET][48];
    struct gen_model m;
    struct gen_gpu g;
    int made = 0;
    const int before = check_failed;

    for (int i = 0; i < SHAPES && check_failed == before; i++) {
        random_model(&m);
        random_gpu(&g);
        random_set(text, set);
        if (make(&m, &g, random_in(0, 1) ? 0 : random_in(1, m.max_context), NULL, set, &p) == 0) {
            check_plan(&p, i % 16 == 0 && p.context < 20000);
            made++;
        } else {
            CHECKF(!strncmp(err.text, "plan: ", 6), "%s: \"%s\"", what, err.text);
        }
    }
    printf("%d of %d random shapes have a plan\n", made, SHAPES);
    CHECK(made > SHAPES / 2 || check_failed > before);
}

/* Every carried model on every profile, by default and with choices that bring out the edges. */
static void test_carried(void)
{
    static const char *const sets[][4] = {
        {NULL},
        {"round_blocks=2", "head_group=1", "split_min=1", NULL},
        {"ctas=7", "warps=4", NULL},
        {"chunk_bytes=512", "tokens_per_launch=1", NULL},
        {"chunk_bytes=1000", "stages=2", NULL},
        {"ctas=3", "tokens_per_launch=1", NULL},
        {"dtype=fp16", "gemm_m=64", "prefill_tokens=8192", NULL},
    };
    static struct gen_plan p;
    struct gen_model m;
    struct gen_gpu g;

    for (int i = 0; gen_model_carried(i); i++) {
        for (int j = 0; gen_gpu_profile(j); j++) {
            get(gen_model_carried(i), gen_gpu_profile(j), &m, &g);
            for (size_t s = 0; s < sizeof sets / sizeof *sets; s++) {
                CHECKF(make(&m, &g, s % 2 ? 1 : 0, NULL, sets[s], &p) == 0, "%s: %s", what,
                       err.text);
                if (!err.code)
                    check_plan(&p, 0);
            }
            CHECKF(make(&m, &g, m.max_context, NULL, NULL, &p) == 0, "%s: %s", what, err.text);
            if (!err.code)
                check_plan(&p, j == 0);
        }
    }
}

/* ---- Plan files and --set -------------------------------------------------- */

static char dir[] = "/tmp/t-plan-XXXXXX", plan_file[64];

static void write_file(const char *text, size_t size)
{
    FILE *f = fopen(plan_file, "w");

    CHECK(f && fwrite(text, 1, size, f) == size && fclose(f) == 0);
}

/* A made plan, dumped and read back as a plan file, is the same plan. */
static void check_round_trip(const struct gen_plan *p)
{
    static struct gen_plan q;
    char *dump = gen_plan_dump(p), *params = gen_plan_params(p), *dump2, *params2;
    const char *key;

    CHECK(dump && params);
    for (int i = 0; (key = gen_plan_key(i)); i++) {
        char line[64];
        snprintf(line, sizeof line, "\n%.*s = ", (int) strcspn(key, " "), key);
        CHECKF(strstr(dump, line), "the dump lacks %s", line + 1);
    }
    write_file(dump, strlen(dump));
    CHECKF(make(&p->model, &p->gpu, p->context, plan_file, NULL, &q) == 0, "%s: %s", what,
           err.text);
    dump2 = gen_plan_dump(&q);
    params2 = gen_plan_params(&q);
    CHECK_STR(dump2, dump);
    CHECK(params2 && !strcmp(params2, params));
    CHECK(q.tokens_per_launch == p->tokens_per_launch);
    free(dump), free(dump2), free(params), free(params2);
}

static void test_round_trip(void)
{
    static const char *const all[] = {"ctas=20",
                                      "warps=5",
                                      "chunk_bytes=2048",
                                      "stages=5",
                                      "inflight=4",
                                      "inflight_hop=2",
                                      "round_blocks=4",
                                      "split_min=17",
                                      "head_group=1",
                                      "tokens_per_launch=3",
                                      "prefill_tokens=48",
                                      "gemm_m=64",
                                      "gemm_n=64",
                                      "gemm_k=32",
                                      "gemm_stages=3",
                                      "flash_m=128",
                                      "flash_n=32",
                                      "unroll_layers=loop",
                                      "dtype=fp16",
                                      "fault=hang",
                                      "epoch0=2147000000",
                                      NULL};
    static struct gen_plan p;
    struct gen_model m;
    struct gen_gpu g;
    int keys = 0;

    while (gen_plan_key(keys))
        keys++;
    CHECKF(keys == sizeof all / sizeof *all - 1, "%d keys; test them all", keys);
    get("qwen3-0.6b", "rtx4090", &m, &g);
    CHECKF(make(&m, &g, 100, NULL, all, &p) == 0, "%s", err.text);
    CHECK(p.ctas == 20 && p.warps == 5 && p.chunk_bytes == 2048 && p.stages == 5 &&
          p.inflight == 4);
    CHECK(p.inflight_hop == 2 && p.round_blocks == 4 && p.split_min == 17 && p.head_group == 1);
    CHECK(p.tokens_per_launch == 3 && p.prefill_tokens == 48 && p.gemm_m == 64 && p.gemm_n == 64);
    CHECK(p.gemm_k == 32 && p.gemm_stages == 3 && p.flash_m == 128 && p.flash_n == 32);
    CHECK(p.unroll_layers == 1 && p.dtype == GEN_FP16 && p.fault == 1 && p.context == 100);
    CHECK(p.epoch0 == 2147000000);
    check_round_trip(&p);
    CHECKF(make(&m, &g, 0, NULL, NULL, &p) == 0, "%s", err.text);
    check_round_trip(&p);
}

/* Plan file TEXT for qwen3-0.6b on h200 is refused with CODE and MESSAGE, where "@" stands for
   the file; NULL: it is taken. */
static void check_file(const char *text, size_t size, int code, const char *message)
{
    static struct gen_plan p;
    struct gen_model m;
    struct gen_gpu g;
    char want[600];

    get("qwen3-0.6b", "h200", &m, &g);
    if (text)
        write_file(text, size);
    CHECKF(make(&m, &g, 0, plan_file, NULL, &p) == code, "%s: code %d", message ? message : text,
           err.code);
    snprintf(want, sizeof want, "%s%s", message && *message == '@' ? plan_file : "",
             message ? message + (*message == '@') : "");
    if (message)
        CHECK_STR(err.text, want);
    /* The error may be of no interest. */
    CHECK(gen_plan_make(&m, &g, 0, plan_file, NULL, &p, NULL) == code);
}

static void check_text(const char *text, int code, const char *message)
{
    check_file(text, strlen(text), code, message);
}

static void test_files(void)
{
    char wide[700];

    check_text("", 0, NULL);
    check_text("# nothing\n\n  \t\r\n", 0, NULL);
    check_text("warps = 5", 0, NULL);
    check_text("warps=5 # few\r\n\tstages =\t4\n", 0, NULL);
    check_text("[choices]\nwarps = 5\n[phases]\nwarps 99 % = \n[choices]\nstages = 4\n", 0, NULL);
    check_text("[choices]\nwarps = 8\n", MK_EFORMAT,
               "@:2: warps is \"8\"; it must be an integer in 4..7");
    check_text("[hops]\nx\n[choices]\ny\n", MK_EFORMAT, "@:4: \"y\" is not key=value");
    check_text("\nwarps 5\n", MK_EFORMAT, "@:2: \"warps 5\" is not key=value");
    check_text("warp = 5\n", MK_EFORMAT, "@:1: unknown plan key \"warp\" (mkgen --list-keys)");
    check_text("= 5\n", MK_EFORMAT, "@:1: unknown plan key \"\" (mkgen --list-keys)");
    check_text("warps =\n", MK_EFORMAT, "@:1: warps is \"\"; it must be an integer in 4..7");
    check_text("warps = 5.0\n", MK_EFORMAT, "@:1: warps is \"5.0\"; it must be an integer in 4..7");
    check_text("warps = 99999999999999999999\n", MK_EFORMAT,
               "@:1: warps is \"99999999999999999999\"; it must be an integer in 4..7");
    check_text("dtype = fp32\n", MK_EFORMAT, "@:1: dtype is \"fp32\"; it must be one of bf16|fp16");
    check_text("dtype = bf16|fp16\n", MK_EFORMAT,
               "@:1: dtype is \"bf16|fp16\"; it must be one of bf16|fp16");
    check_file("warps = 5\0\n", 11, MK_EFORMAT, "@:1: line too long");
    memset(wide, 'x', sizeof wide - 1);
    wide[sizeof wide - 1] = 0;
    check_text(wide, MK_EFORMAT, "@:1: line too long");
    check_text("gemm_m = 100\n", MK_EINVAL,
               "plan: gemm_m and gemm_n must be 64 or 128, gemm_k and flash_n 32 or 64");
    unlink(plan_file);
    check_file(NULL, 0, MK_ENOENT, "@: No such file or directory");
    CHECK(mkfifo(plan_file, 0600) == 0);
    check_file(NULL, 0, MK_EIO, "@: not a regular file");
    unlink(plan_file);
    CHECK(mkdir(plan_file, 0700) == 0);
    check_file(NULL, 0, MK_EIO, "@: not a regular file");
    rmdir(plan_file);
}

#define SET(...)                                                                                   \
    (const char *const[])                                                                          \
    {                                                                                              \
        __VA_ARGS__, NULL                                                                          \
    }

/* SET for MODEL on GPU is refused with MESSAGE. */
static void refused(const char *model, const char *gpu, int context, const char *const *set,
                    const char *message)
{
    static struct gen_plan p;
    struct gen_model m;
    struct gen_gpu g;

    get(model, gpu, &m, &g);
    CHECK(make(&m, &g, context, NULL, set, &p) == MK_EINVAL);
    CHECK_STR(err.text, message);
}

static void test_settings(void)
{
    refused("qwen3-0.6b", "h200", 0, SET("warps"), "--set: \"warps\" is not key=value");
    refused("qwen3-0.6b", "h200", 0, SET("warps=3"),
            "--set: warps is \"3\"; it must be an integer in 4..7");
    refused("qwen3-0.6b", "h200", 0, SET("x;y=3"),
            "--set: unknown plan key \"x;y\" (mkgen --list-keys)");
    refused("qwen3-0.6b", "h200", 0, SET("unroll_layers=lis"),
            "--set: unroll_layers is \"lis\"; it must be one of list|loop");
    refused("qwen3-0.6b", "h200", 40961, NULL,
            "context is 40961; qwen3-0.6b takes 1..40960 tokens");
    refused("qwen3-0.6b", "h200", -1, NULL, "context is -1; qwen3-0.6b takes 1..40960 tokens");
    refused("qwen3-0.6b", "h200", 0, SET("ctas=129"),
            "plan: ctas is 129; h200 has 132 SMs and hidden_size 1024 allows 128");
    refused("qwen3-8b", "t4", 0, SET("ctas=41"),
            "plan: ctas is 41; t4 has 40 SMs and hidden_size 4096 allows 512");
    refused("qwen3-0.6b", "t4", 0, SET("dtype=bf16"), "plan: dtype is bf16; sm_75 has fp16 only");
    refused("qwen3-0.6b", "h200", 0, SET("round_blocks=3"),
            "plan: round_blocks is 3 and prefill_tokens 2048; they must be multiples of 2 and 16");
    refused("qwen3-0.6b", "h200", 0, SET("prefill_tokens=17"),
            "plan: round_blocks is 8 and prefill_tokens 17; they must be multiples of 2 and 16");
    refused("qwen3-0.6b", "h200", 0, SET("inflight=9", "stages=8"),
            "plan: inflight is 9 and inflight_hop 1; they must not exceed stages 8 and inflight");
    refused("qwen3-0.6b", "h200", 0, SET("stages=14"),
            "plan: decode needs 247580 bytes of shared memory, 17980 of them beside the ring, and "
            "a block of h200 has 232448; 13 stages of 16384 bytes would fit");
    refused("qwen3-8b", "l4", 0, SET("gemm_stages=8", "gemm_k=64"),
            "plan: prefill needs 132096 bytes of shared memory and a block of l4 has 101376; "
            "make gemm_stages or flash_n smaller");
    refused("qwen3-8b", "h200", 0, SET("ctas=1", "chunk_bytes=512", "tokens_per_launch=100"),
            "plan: 100 tokens of 29562880 chunks each are too many for a launch; "
            "make tokens_per_launch smaller or chunk_bytes larger");
}

/* Models at the edge of what the reader takes. */
static void test_giants(void)
{
    static struct gen_plan p;
    struct gen_model m;
    struct gen_gpu g;

    random_model(&m);
    m.D = 65536, m.H = m.K = 1024, m.E = 128, m.F = 262144, m.V = 4194304, m.L = 512,
    m.max_context = 1 << 24;
    CHECK(gen_gpu_read("h200", &g, &err) == 0);
    CHECK(make(&m, &g, 1 << 24, NULL, NULL, &p) == MK_EUNSUPPORTED || err.code == MK_EINVAL);
    CHECK(!strncmp(err.text, "plan: ", 6));
    m.D = 64, m.F = 262144, m.V = 1000;
    CHECK(make(&m, &g, 0, NULL, NULL, &p) == MK_EINVAL);
    CHECK(!strncmp(err.text, "plan: decode needs ", 19));
    m.F = 8192, m.H = m.K = 8, m.L = 1;
    CHECK(make(&m, &g, 1 << 24, NULL, NULL, &p) == MK_EUNSUPPORTED);
    CHECK_STR(err.text,
              "plan: context is 16777216; with head_dim 128 at most 8388608 tokens are supported");
    CHECKF(make(&m, &g, 1 << 23, NULL, NULL, &p) == 0, "%s", err.text);
    check_plan(&p, 0);
    m.V = 4194304;
    CHECK(make(&m, &g, 0, NULL, (const char *const[]){"ctas=1", NULL}, &p) == MK_EUNSUPPORTED);
    CHECK_STR(err.text, "plan: each of 1 CTAs has 4194304 logits; at most 2097152 are supported");
    m.D = 4096;
    g.sms = 1;
    CHECK(make(&m, &g, 0, NULL, NULL, &p) == MK_EUNSUPPORTED);
    CHECK_STR(err.text,
              "plan: a layer has 234881024 bytes in the stream of each of 1 CTAs and the head "
              "34359738368; at most 1073741824 and 2147483647 are supported");
    m.F = 131072, m.V = 100;
    CHECK(make(&m, &g, 0, NULL, NULL, &p) == MK_EUNSUPPORTED);
    CHECK_STR(err.text,
              "plan: a layer has 3254779904 bytes in the stream of each of 1 CTAs and the head "
              "851968; at most 1073741824 and 2147483647 are supported");
}

int main(void)
{
    const char *seed = getenv("T_PLAN_SEED");

    state = seed ? strtoull(seed, NULL, 0) : (uint64_t) time(NULL);
    printf("T_PLAN_SEED=%llu\n", (unsigned long long) state);
    CHECK(mkdtemp(dir) != NULL);
    snprintf(plan_file, sizeof plan_file, "%s/a.plan", dir);
    test_files();
    test_round_trip();
    test_settings();
    test_giants();
    test_random();
    test_carried();
    unlink(plan_file);
    rmdir(dir);
    return check_done();
}
