/* t-oracle.c - the CPU forward pass against Hugging Face's fp32 logits, and against itself.
   Goldens: tests/hf/make-oracle.py. */
#include "runtime/cpu.h"
#include "tests/check.h"
#include <stdint.h>
#include <unistd.h>

/* Largest allowed difference to Hugging Face, as a fraction of the golden's largest logit.
   Both sum in fp32, in another order; the largest seen is 1.5e-6. */
#define TOLERANCE 5e-6
#define SEED 20240229

struct golden {
    const char *name;
    char dir[1024];                     /* the model's folder */
    int n, n_rows, V, resident;
    int32_t tokens[64], rows[16];
    float *logits;                      /* [n_rows][V] */
    struct gen_model model;
    struct rt_weights *weights;
};

static const char *srcdir(void)
{
    const char *dir = getenv("srcdir");

    if (!dir)
        dir = access("hf", F_OK) ? "tests" : ".";
    return dir;
}

static void must(int rc, const struct mk_err *err)
{
    CHECKF(rc == 0, "%s", err->text);
    if (rc)
        exit(check_done());
}

static void golden_read(struct golden *g, const char *name)
{
    struct mk_err err = {0};
    char path[1024];
    int32_t head[4];
    FILE *f;
    int made = !strncmp(name, "toy-", 4);

    *g = (struct golden){.name = name};
    snprintf(path, sizeof path, "%s/hf/%s.golden", srcdir(), name);
    f = fopen(path, "rb");
    if (!f || fread(head, sizeof head, 1, f) != 1 || head[0] > 64 || head[1] > 16) {
        fprintf(stderr, "%s: cannot be read\n", path);
        exit(1);
    }
    g->n = head[0], g->n_rows = head[1], g->V = head[2], g->resident = head[3];
    g->logits = malloc(sizeof(float) * (size_t)(g->n_rows * g->V));
    CHECK(fread(g->tokens, 4, (size_t)g->n, f) == (size_t)g->n);
    CHECK(fread(g->rows, 4, (size_t)g->n_rows, f) == (size_t)g->n_rows);
    CHECK(fread(g->logits, 4, (size_t)(g->n_rows * g->V), f) == (size_t)(g->n_rows * g->V));
    fclose(f);
    snprintf(g->dir, sizeof g->dir, "%s/%s/%s", srcdir(), made ? "toy" : "hf", name);
    must(gen_model_read(g->dir, &g->model, &err), &err);
    CHECK(g->model.V == g->V);
    must(made ? rt_weights_random(&g->model, SEED, &g->weights, &err)
              : rt_weights_open(g->dir, &g->model, &g->weights, &err), &err);
}

static void golden_free(struct golden *g)
{
    rt_weights_close(g->weights);
    free(g->logits);
}

/* All logits [n][V] of the golden's tokens, in pieces of STEP; the caller frees. */
static float *run(const struct golden *g, const struct gen_model *m, int resident, int threads,
                  int step)
{
    float *logits = malloc(sizeof(float) * (size_t)(g->n * g->V));
    struct mk_err err = {0};
    struct rt_cpu *c;

    must(rt_cpu_make(m, g->weights, resident, 0, g->n, threads, &c, &err), &err);
    for (int t = 0; t < g->n; t += step)
        must(rt_cpu_run(c, g->tokens + t, g->n - t < step ? g->n - t : step, t,
                        logits + (size_t)t * (size_t)g->V, 1, NULL, &err), &err);
    rt_cpu_free(c);
    return logits;
}

/* Largest difference to the golden's rows, over the golden's largest logit. */
static double error_of(const struct golden *g, const float *logits)
{
    double worst = 0, scale = 0;

    for (int r = 0; r < g->n_rows; r++)
        for (int i = 0; i < g->V; i++) {
            double want = g->logits[r * g->V + i];
            double diff = fabs(logits[(size_t)g->rows[r] * (size_t)g->V + (size_t)i] - want);

            scale = fmax(scale, fabs(want));
            worst = diff > worst || isnan(diff) ? diff : worst;
        }
    return worst / scale;
}

static double error_with(const struct golden *g, const struct gen_model *m)
{
    float *logits = run(g, m, g->resident, 2, g->n);
    double e = error_of(g, logits);

    free(logits);
    return e;
}

/* A golden is only worth something if a wrong model fails it by far. */
static void check_sensitive(const struct golden *g)
{
    struct gen_model m = g->model;
    double e;

    m.rope_theta *= 10;
    e = error_with(g, &m);
    CHECKF(e > 20 * TOLERANCE, "%s: ten times rope_theta changes %g only", g->name, e);
    m = g->model;
    m.rope = GEN_ROPE_PLAIN;
    if (g->model.rope == GEN_ROPE_LLAMA3) {
        e = error_with(g, &m);
        CHECKF(e > 20 * TOLERANCE, "%s: RoPE without its scaling changes %g only", g->name, e);
    }
    m = g->model;
    m.qk_norm = 0;
    if (g->model.qk_norm) {
        e = error_with(g, &m);
        CHECKF(e > 20 * TOLERANCE, "%s: without QK-norm changes %g only", g->name, e);
    }
    m = g->model;
    m.qkv_bias = 0;
    if (g->model.qkv_bias) {
        e = error_with(g, &m);
        CHECKF(e > 20 * TOLERANCE, "%s: without bias changes %g only", g->name, e);
    }
}

/* The same bits, however the tokens are cut and on however many threads. */
static void check_same_bits(const struct golden *g, const float *want)
{
    static const int cases[][2] = {{2, 1}, {1, 7}, {3, 16}, {5, 17}, {0, 48}};

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        float *got = run(g, &g->model, g->resident, cases[i][0], cases[i][1]);

        CHECKF(!memcmp(got, want, sizeof *got * (size_t)(g->n * g->V)),
               "%s: other bits with %d threads and pieces of %d tokens", g->name, cases[i][0],
               cases[i][1]);
        free(got);
    }
}

/* Weights used in place and the same weights copied as fp32 give the same bits: the two
   conversions of the kernels are those of weights.c.  Only where the file has no more than
   the resident type. */
static void check_in_place(const struct golden *g, const float *want)
{
    float *got;
    int dtype;

    if (!rt_weights_data(g->weights, RT_EMBED, 0, &dtype) || g->resident == GEN_FP32)
        return;
    CHECK(dtype == g->resident);
    got = run(g, &g->model, GEN_FP32, 2, 16);
    CHECKF(!memcmp(got, want, sizeof *got * (size_t)(g->n * g->V)),
           "%s: other bits from an fp32 copy", g->name);
    free(got);
}

static void check_golden(const char *name)
{
    struct golden g;
    float *logits;
    double e;

    golden_read(&g, name);
    logits = run(&g, &g.model, g.resident, 1, g.n);
    e = error_of(&g, logits);
    printf("%-20s max error %.2g of the largest logit\n", name, e);
    CHECKF(e <= TOLERANCE, "%s: error %g of the largest logit, allowed %g", name, e, TOLERANCE);
    check_same_bits(&g, logits);
    check_in_place(&g, logits);
    check_sensitive(&g);
    free(logits);
    golden_free(&g);
}

static void poison(struct rt_cpu *c, const struct gen_model *m, int from, int context)
{
    for (int l = 0; l < m->L; l++)
        for (int h = 0; h < m->K; h++)
            for (int p = from; p < context; p++)
                for (int i = 0; i < m->E; i++)
                    rt_cpu_kv(c, l, h, p, 0)[i] = rt_cpu_kv(c, l, h, p, 1)[i] = NAN;
}

/* Rows behind the cursor are never read, and a prefix can be run again from any position. */
static void check_cursor(void)
{
    struct mk_err err = {0};
    struct golden g;
    struct rt_cpu *c;
    float *want, *got;
    size_t V, bytes;

    golden_read(&g, "toy-qwen3");
    V = (size_t)g.V, bytes = V * sizeof *got;
    want = run(&g, &g.model, g.resident, 1, g.n);
    got = malloc(bytes);
    must(rt_cpu_make(&g.model, g.weights, g.resident, 0, g.n, 2, &c, &err), &err);
    poison(c, &g.model, 0, g.n);
    must(rt_cpu_run(c, g.tokens, g.n, 0, got, 0, NULL, &err), &err);
    CHECK(!memcmp(got, want + (size_t)(g.n - 1) * V, bytes));
    poison(c, &g.model, 20, g.n);
    must(rt_cpu_run(c, g.tokens + 20, 5, 20, NULL, 0, NULL, &err), &err);
    must(rt_cpu_run(c, g.tokens + 25, 1, 25, got, 0, NULL, &err), &err);
    CHECK(!memcmp(got, want + 25 * V, bytes));
    must(rt_cpu_run(c, g.tokens, 1, 0, got, 0, NULL, &err), &err);
    CHECK(!memcmp(got, want, bytes));
    rt_cpu_free(c);
    free(want);
    free(got);
    golden_free(&g);
}

/* ROUND_KV: the rows of the cache are values of the resident type. */
static void check_round_kv(void)
{
    struct mk_err err = {0};
    struct golden g;
    struct rt_cpu *c, *d;
    int differ = 0, coarse = 0;

    golden_read(&g, "toy-qwen2");
    must(rt_cpu_make(&g.model, g.weights, g.resident, 1, g.n, 2, &c, &err), &err);
    must(rt_cpu_make(&g.model, g.weights, g.resident, 0, g.n, 2, &d, &err), &err);
    must(rt_cpu_run(c, g.tokens, g.n, 0, NULL, 0, NULL, &err), &err);
    must(rt_cpu_run(d, g.tokens, g.n, 0, NULL, 0, NULL, &err), &err);
    for (int p = 0; p < g.n; p++)
        for (int i = 0; i < 2 * g.model.E; i++) {
            float x = rt_cpu_kv(c, 0, 0, p, i & 1)[i / 2], y = rt_cpu_kv(d, 0, 0, p, i & 1)[i / 2];

            coarse += x == rt_round(x, g.resident) && x == rt_round(y, g.resident);
            differ += x != y;
        }
    CHECK(coarse == 2 * g.n * g.model.E);
    CHECK(differ > g.n);
    rt_cpu_free(c);
    rt_cpu_free(d);
    golden_free(&g);
}

static void check_errors(void)
{
    struct mk_err err = {0};
    struct golden g;
    struct rt_cpu *c;
    int32_t bad[] = {1, 1000, -1};
    int cancel = 1;

    golden_read(&g, "toy-qwen3");
    must(rt_cpu_make(&g.model, g.weights, GEN_BF16, 1, 32, 2, &c, &err), &err);
    CHECK(rt_cpu_run(c, g.tokens, 33, 0, NULL, 0, NULL, &err) == MK_EINVAL);
    CHECK_STR(err.text, "33 tokens at position 0 do not fit a context of 32");
    CHECK(rt_cpu_run(c, g.tokens, 1, 32, NULL, 0, NULL, &err) == MK_EINVAL);
    CHECK(rt_cpu_run(c, g.tokens, 1, -1, NULL, 0, NULL, &err) == MK_EINVAL);
    CHECK(rt_cpu_run(c, g.tokens, 0, 0, NULL, 0, NULL, &err) == MK_EINVAL);
    CHECK(rt_cpu_run(c, g.tokens, 2, INT32_MAX, NULL, 0, NULL, &err) == MK_EINVAL);
    CHECK(rt_cpu_run(c, bad, 2, 0, NULL, 0, NULL, &err) == MK_EINVAL);
    CHECK_STR(err.text, "token 1: id 1000 is not in 0 .. 999");
    CHECK(rt_cpu_run(c, bad + 2, 1, 0, NULL, 0, NULL, &err) == MK_EINVAL);
    CHECK_STR(err.text, "token 0: id -1 is not in 0 .. 999");
    CHECK(rt_cpu_run(c, g.tokens, 4, 0, NULL, 0, &cancel, &err) == MK_ECANCELED);
    cancel = 0;
    CHECK(rt_cpu_run(c, g.tokens, 4, 0, NULL, 0, &cancel, NULL) == 0);
    rt_cpu_free(c);
    CHECK(rt_cpu_make(&g.model, g.weights, GEN_BF16, 1, 0, 2, &c, &err) == MK_EINVAL && !c);
    rt_cpu_free(NULL);
    golden_free(&g);
}

int main(void)
{
    static const char *const names[] = {
        "toy-qwen3", "toy-qwen2", "toy-llama", "toy-smol", "toy-qwen3-e128",
        "tiny-llama-sharded", "tiny-qwen2-fp16", "tiny-qwen3-fp32",
    };

    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        check_golden(names[i]);
    check_cursor();
    check_round_kv();
    check_errors();
    return check_done();
}
