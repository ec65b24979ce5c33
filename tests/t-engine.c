/* t-engine.c - the emitted kernels against the oracle (cpu.h), with plans that reach every path:
   on the emulated GPU at toy size, for every family of architectures, and on the GPU where there
   is one.  What is the same arithmetic must be the same bits: packed weights, repeated runs,
   layers as list and loop, hops in clusters and through L2, rings, architectures of the emulated
   GPU; numbers of CTAs in prefill.
     t-engine                                    all of it
     t-engine MODEL SETTINGS [DEVICE [SHAPE]]    one world
     t-engine --compare                          the GPU's logits against those of the emulated GPU
     t-engine --gpu=I/N                          the I-th of N parts of what runs on the GPU
   Exit 77 with neither device. */
#include "config.h"

#include <stdint.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "runtime/abi.h"
#include "runtime/cpu.h"
#include "runtime/engine.h"
#include "runtime/key.h"
#include "runtime/pack.h"
#include "runtime/sample.h"
#include "tests/check.h"

enum { MOST_STEPS = 96, MOST_SETTINGS = 16 };

/* How much of a world is run.  The KV cache's last tile is not full, and no tile of prefill is. */
struct scale {
    int context, steps; /* positions; of them decoded one by one from the start */
    int tail;           /* the last positions of a full context */
    int sampled;        /* tokens of each sampler */
    int lengths[16];    /* of prefill, around the tiles' edges, below context; 0: no more */
};
static const struct scale
    gpu_scale = {509, 96, 40, 40, {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 95, 129}},
    host_scale = {90, 18, 3, 6, {1, 8, 17}};

struct setup {
    const char *device, *model, *settings;
    const char *shape; /* of the model, other than in its config: "H=8 K=1"; or NULL */
};

struct world {
    char name[64];
    const struct scale *scale;
    struct gen_model model;
    struct rt_weights *weights;
    struct rt_engine *engine;
    struct rt_session *session;
    struct rt_cpu *cpu;
    int32_t *tokens;   /* [context] */
    float *want, *got; /* logits [context][V] */
};

static const struct scale *scale_of(const struct setup *setup)
{
    return strcmp(setup->device, "gpu") ? &host_scale : &gpu_scale;
}

/* "a=1 b=2" as a list for --set. */
static const char *const *split_settings(const char *settings)
{
    static char text[MOST_SETTINGS][64];
    static const char *list[MOST_SETTINGS + 1];
    int n = 0, used;

    while (n < MOST_SETTINGS && sscanf(settings, "%63s%n", text[n], &used) == 1) {
        list[n] = text[n];
        settings += used;
        n++;
    }
    list[n] = NULL;
    return list;
}

/* Change M as SHAPE says. */
static int reshape(struct gen_model *m, const char *shape, struct mk_err *err)
{
    const struct {
        const char *name;
        int *at;
    } sizes[] = {{"D", &m->D}, {"H", &m->H}, {"K", &m->K},
                 {"E", &m->E}, {"F", &m->F}, {"C", &m->max_context}};
    char name[8];
    int value, used, known;

    for (; shape && sscanf(shape, " %7[A-Z]=%d%n", name, &value, &used) == 2; shape += used) {
        known = 0;
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
            if (!strcmp(sizes[i].name, name))
                *sizes[i].at = value, known = 1;
        if (!known)
            return gen_fail(err, MK_EINVAL, "no size %s", name);
    }
    return !shape || !*shape ? 0 : gen_fail(err, MK_EINVAL, "shape: %s", shape);
}

static void world_close(struct world *w)
{
    rt_session_free(w->session);
    rt_engine_close(w->engine);
    rt_cpu_free(w->cpu);
    rt_weights_close(w->weights);
    free(w->tokens);
    free(w->want);
    free(w->got);
}

static int read_weights(struct world *w, const char *path, int made, struct mk_err *err)
{
    char file[4200];

    for (int shards = 0; shards < 2 && !made; shards++) {
        snprintf(file, sizeof file, "%s/model.safetensors%s", path, shards ? ".index.json" : "");
        if (access(file, R_OK) == 0)
            return rt_weights_open(path, &w->model, &w->weights, err);
    }
    return rt_weights_random(&w->model, 7, &w->weights, err);
}

/* The oracle and what it is asked. */
static int make_oracle(struct world *w, struct mk_err *err)
{
    const size_t logits = (size_t) w->scale->context * (size_t) w->model.V;

    w->tokens = calloc((size_t) w->scale->context, sizeof *w->tokens);
    w->want = calloc(logits, sizeof *w->want);
    w->got = calloc(logits, sizeof *w->got);
    if (!w->tokens || !w->want || !w->got)
        return gen_fail(err, MK_ENOMEM, "no memory");
    for (int i = 0; i < w->scale->context; i++)
        w->tokens[i] = (int32_t) (rt_sample_hash(3, (uint32_t) i, 0) % (uint64_t) w->model.V);
    int rc = rt_cpu_make(&w->model, w->weights, rt_session_plan(w->session)->dtype, 1,
                         w->scale->context, 0, &w->cpu, err);
    return rc ? rc
              : rt_cpu_run(w->cpu, w->tokens, w->scale->context, 0, w->want, 1, NULL, err);
}

static int world_open(struct world *w, const struct setup *setup, const struct scale *scale)
{
    const char *srcdir = getenv("srcdir");
    struct rt_engine_options options = {.set = split_settings(setup->settings),
                                        .device = setup->device};
    struct mk_err err = {0};
    char path[4096];
    int rc;

    memset(w, 0, sizeof *w);
    w->scale = scale;
    snprintf(w->name, sizeof w->name, "%s %s", setup->device, setup->model);
    snprintf(path, sizeof path, "%s/%s", srcdir ? srcdir : ".", setup->model);
    rc = gen_model_read(path, &w->model, &err);
    if (rc == 0)
        rc = reshape(&w->model, setup->shape, &err);
    if (rc == 0)
        rc = read_weights(w, path, setup->shape != NULL, &err);
    if (rc == 0)
        rc = rt_engine_open(&w->model, w->weights, &options, &w->engine, &err);
    if (rc == 0)
        rc = rt_session_make(w->engine, w->scale->context, &w->session, &err);
    if (rc == 0)
        rc = make_oracle(w, &err);
    CHECKF(rc == 0, "%s %s: %s", w->name, setup->settings, err.text);
    return rc;
}

/* The KV rows of every layer from position FROM on become NaN. */
static void poison(struct world *w, int from)
{
    const size_t n = (size_t) (w->scale->context - from) * (size_t) w->model.E;
    uint16_t *nan_rows = malloc(n * sizeof *nan_rows);
    struct mk_err err;
    int rc = 0;

    for (size_t i = 0; i < n; i++)
        nan_rows[i] = 0x7fff; /* NaN in bf16 and in fp16 */
    for (int layer = 0; layer < w->model.L; layer++)
        for (int head = 0; head < w->model.K; head++)
            for (int which = 0; which < 2; which++)
                rc |= rt_session_kv_put(w->session, layer, head, which, from,
                                        w->scale->context - from, nan_rows, &err);
    CHECK(rc == 0);
    free(nan_rows);
}

/* Teacher-forced logits of positions pos .. pos+n-1 from the device. */
static int device_logits(struct world *w, int pos, int n, float *logits)
{
    struct rt_decode job = {
        .token = w->tokens[pos], .pos = pos, .n = n, .forced = w->tokens + pos, .logits = logits};
    struct mk_err err = {0};
    int done, rc = rt_session_decode(w->session, &job, &done, &err);

    CHECKF(rc == 0 && done == n, "%s: decode %d at %d: %d done, %s", w->name, n, pos, done,
           err.text);
    return rc;
}

struct difference {
    double max; /* largest |got - want| over the logits' root mean square */
    double kl;  /* mean over positions */
    int wrong;  /* argmax differs although the margin is above the error */
};

static struct difference compare(const float *got, const float *want, int n, int V)
{
    struct difference d = {0};
    double squares = 0, scale;

    for (size_t i = 0; i < (size_t) n * (size_t) V; i++)
        squares += (double) want[i] * want[i];
    scale = sqrt(squares / n / V);
    for (int t = 0; t < n; t++, got += V, want += V) {
        double top_g = -INFINITY, top_w = -INFINITY, sum_g = 0, sum_w = 0, kl = 0, worst = 0;
        int arg_g = 0, arg_w = 0;
        for (int i = 0; i < V; i++) {
            if (!(got[i] <= top_g))
                top_g = got[i], arg_g = i;
            if (want[i] > top_w)
                top_w = want[i], arg_w = i;
            worst = fmax(worst, fabs((double) got[i] - want[i]));
            if (isnan(got[i]))
                worst = INFINITY;
        }
        for (int i = 0; i < V; i++)
            sum_g += exp(got[i] - top_g), sum_w += exp(want[i] - top_w);
        for (int i = 0; i < V; i++)
            kl += exp(want[i] - top_w) / sum_w *
                  ((want[i] - top_w - log(sum_w)) - (got[i] - top_g - log(sum_g)));
        d.max = fmax(d.max, worst / scale);
        d.kl += kl / n;
        d.wrong += arg_g != arg_w && want[arg_w] - want[arg_g] > 2 * worst;
    }
    return d;
}

/* The rows of positions 0 .. n-1 in the KV cache are the oracle's, but for roundings. */
static void check_rows(struct world *w, int n, const char *who)
{
    const struct gen_model *m = &w->model;
    const int fp16 = rt_session_plan(w->session)->dtype == GEN_FP16;
    uint16_t *rows = calloc((size_t) n * (size_t) m->E, sizeof *rows);
    struct mk_err err = {0};
    double worst = 0;

    for (int i = 0; i < m->L * m->K * 2; i++) {
        const int layer = i / 2 / m->K, head = i / 2 % m->K;
        double squares = 0, most = 0;
        CHECK(rt_session_kv_get(w->session, layer, head, i % 2, 0, n, rows, &err) == 0);
        for (int k = 0; k < n * m->E; k++) {
            const float got = fp16 ? rt_from_fp16(rows[k]) : rt_from_bf16(rows[k]);
            const float want = rt_cpu_kv(w->cpu, layer, head, k / m->E, i % 2)[k % m->E];
            const double apart = fabs((double) got - want);
            squares += (double) want * want;
            most = apart > most || isnan(apart) ? apart : most;
        }
        most /= sqrt(squares / n / m->E);
        worst = most > worst || isnan(most) ? most : worst;
    }
    printf("%s: %s: %d rows: error %.4f\n", w->name, who, n, worst);
    CHECKF(worst < 0.1, "%s: %s: of %d rows one is %g of their rms away", w->name, who, n, worst);
    free(rows);
}

/* LOGITS of positions pos .. pos+n-1 against the oracle's. */
static struct difference check_logits(const struct world *w, const float *logits, int pos, int n,
                                      const char *who)
{
    const struct difference d =
        compare(logits, w->want + (size_t) pos * (size_t) w->model.V, n, w->model.V);

    CHECKF(d.max < 0.08 && d.kl < 1e-3 && !d.wrong,
           "%s: %s: %d positions from %d on: error %g, KL %g, %d wrong", w->name, who, n, pos,
           d.max, d.kl, d.wrong);
    return d;
}

/* Decode steps from position 0 on poisoned memory against the oracle, twice the same bits. */
static void test_decode(struct world *w)
{
    const int steps = w->scale->steps;
    const size_t n = (size_t) steps * (size_t) w->model.V;
    float *again = calloc(n, sizeof *again);
    struct difference d;

    poison(w, 0);
    if (device_logits(w, 0, steps, w->got) == 0) {
        d = check_logits(w, w->got, 0, steps, "decode");
        printf("%s: decode: error %.4f of the logits' rms, KL %.2e\n", w->name, d.max, d.kl);
        check_rows(w, steps, "decode");
        device_logits(w, 0, steps, again);
        CHECKF(!memcmp(w->got, again, n * sizeof *again), "%s: a second run has other bits",
               w->name);
    }
    free(again);
}

/* Prefill of n tokens in one piece or two, and one step. */
static int prefill_and_step(struct world *w, int n, int pieces, float *logits)
{
    const int first = pieces == 1 ? 0 : n / 3;
    struct mk_err err = {0};
    int done, rc = 0;

    poison(w, 0);
    if (pieces == 2)
        rc = rt_session_prefill(w->session, w->tokens, first, 0, &done, &err);
    if (rc == 0)
        rc = rt_session_prefill(w->session, w->tokens + first, n - first, first, &done, &err);
    CHECKF(rc == 0, "%s: prefill of %d: %s", w->name, n, err.text);
    return rc ? rc : device_logits(w, n, 1, logits);
}

/* Lengths around the tiles' edges, in one piece and continued: rows and the step that follows. */
static void test_prefill(struct world *w)
{
    float *logits = calloc((size_t) w->model.V, sizeof *logits);
    double worst = 0;
    int n = 0;

    for (const int *length = w->scale->lengths; *length; length++) {
        n = *length;
        for (int pieces = 1; pieces <= 2; pieces++) {
            if (prefill_and_step(w, n, pieces, logits))
                goto done;
            worst = fmax(worst, check_logits(w, logits, n, 1, "prefill").max);
        }
    }
    check_rows(w, n, "prefill");
    printf("%s: prefill: error %.4f\n", w->name, worst);
done:
    free(logits);
}

/* Decode N positions from POS on, of a cache whose rows end there. */
static double test_steps(struct world *w, int pos, int n)
{
    poison(w, pos);
    if (device_logits(w, pos, n, w->got))
        return INFINITY;
    return check_logits(w, w->got, pos, n, "steps").max;
}

/* Does POS begin a KV tile that is worth a look: one of the first, or the first one in each round
   of the group's ranks? */
static int is_edge(const struct gen_plan *p, int pos)
{
    const int tile = pos / p->kv_tile;

    return pos % p->kv_tile == 0 && (tile <= 2 || tile % (p->group > 1 ? p->group : 2) == 0);
}

/* A full context, reached by prefill: its last position, its last positions in steps, and those
   around edges of KV tiles, from behind. */
static void test_context(struct world *w)
{
    const struct gen_plan *p = rt_session_plan(w->session);
    const int last = w->scale->context - 1;
    struct mk_err err = {0};
    double worst;
    int done, rc, edges = 0;

    if (!last)
        return;
    poison(w, 0);
    rc = rt_session_prefill(w->session, w->tokens, last, 0, &done, &err);
    CHECKF(rc == 0 && done == last, "%s: full: %s", w->name, err.text);
    if (rc)
        return;
    check_rows(w, last, "full");
    worst = test_steps(w, last, 1);
    worst = fmax(worst, test_steps(w, last + 1 - w->scale->tail, w->scale->tail));
    for (int pos = last - 1; pos > 0; pos--)
        if (is_edge(p, pos)) {
            worst = fmax(worst, test_steps(w, pos - 1, 3));
            edges++;
        }
    printf("%s: %d positions, %d edges of tiles of %d for %d ranks: error %.4f\n", w->name,
           w->scale->context, edges, p->kv_tile, p->group, worst);
}

struct taken {
    int32_t token[MOST_STEPS];
    int n, stop_after;
    struct rt_session *cancel; /* to be cancelled with the stop; or NULL */
};

static int take(void *user, int32_t token)
{
    struct taken *t = user;

    t->token[t->n++] = token;
    if (t->cancel && t->n == t->stop_after)
        rt_session_cancel(t->cancel);
    return t->n == t->stop_after;
}

/* The device chooses what rt_sample chooses from the same logits: the emulated one always, for its
   logarithm is the same; a GPU's may differ where two ids are as good as equal. */
static void test_sampling(struct world *w)
{
    static const struct mk_sampling kinds[] = {
        {.temperature = 0, .top_p = 1},
        {.temperature = 1, .top_p = 1, .seed = 1},
        {.temperature = 0.7f, .top_k = 20, .top_p = 1, .seed = 2},
        {.temperature = 1, .top_k = 1, .top_p = 1, .seed = 3},
        {.temperature = 0.9f, .top_p = 0.8f, .seed = 4},
        {.temperature = 1.3f, .top_k = 40, .top_p = 0.5f, .seed = 5},
        {.temperature = 1, .top_p = 1e-6f, .seed = 6},
    };
    const int n = w->scale->sampled, exact = rt_device_is_host(rt_engine_device(w->engine));

    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        const struct mk_sampling *s = &kinds[k];
        struct taken taken = {.n = 0};
        struct mk_err err = {0};
        struct rt_decode job = {
            .token = w->tokens[0],
            .n = n,
            .temperature = s->temperature,
            .top_k = s->top_k,
            .top_p = s->top_p,
            .seed = s->seed,
            .token_fn = take,
            .user = &taken,
            .logits = w->got,
        };
        int done, same = 0, rc = rt_session_decode(w->session, &job, &done, &err);
        CHECKF(rc == 0 && done == n, "%s: sampling %zu: %d done, %s", w->name, k, done, err.text);
        for (int i = 0; i < done; i++)
            same += rt_sample(w->got + (size_t) i * (size_t) w->model.V, w->model.V, s, i + 1) ==
                    taken.token[i];
        CHECKF(same >= done - (s->temperature > 0 && !exact),
               "%s: sampling %zu: %d of %d tokens as rt_sample", w->name, k, same, done);
        if (rc)
            return;
    }
}

/* Stop ids, a callback that stops, cancel, and the run that follows each. */
static void test_stopping(struct world *w)
{
    const int n = w->scale->sampled, few = n / 3;
    struct taken all = {.n = 0}, some = {.n = 0}, rest = {.n = 0};
    struct rt_decode job = {
        .token = w->tokens[0], .n = n, .top_p = 1, .token_fn = take, .user = &all};
    struct mk_err err = {0};
    int32_t stop;
    int done, first;

    CHECK(rt_session_decode(w->session, &job, &done, &err) == 0 && done == n);
    stop = all.token[n / 2];
    for (first = 0; all.token[first] != stop; first++)
        ;
    job.user = &some, job.stop = &stop, job.n_stop = 1;
    CHECK(rt_session_decode(w->session, &job, &done, &err) == 0);
    CHECKF(done == first + 1, "%s: stopped after %d, not %d", w->name, done, first + 1);
    job.n_stop = 0, some.n = 0, some.stop_after = few;
    CHECK(rt_session_decode(w->session, &job, &done, &err) == 0 && done == few);
    some.n = 0, some.cancel = w->session; /* a cancel and a stop at once: the cancel is not lost */
    CHECK(rt_session_decode(w->session, &job, &done, &err) == 0 && done == few);
    CHECK(rt_session_cancelled(w->session) == 1);
    some.n = 0, some.cancel = NULL;
    rt_session_cancel(w->session);
    CHECK(rt_session_decode(w->session, &job, &done, &err) == MK_ECANCELED && done == 0);
    CHECK(rt_session_cancelled(w->session) == 1 && rt_session_cancelled(w->session) == 0);
    job.user = &rest;
    CHECK(rt_session_decode(w->session, &job, &done, &err) == 0 && done == n);
    CHECK(!memcmp(all.token, rest.token, (size_t) n * sizeof(int32_t)));
}

/* ---- The same arithmetic, the same bits ------------------------------------ */

/* What the streams must hold of one matrix: rows in the order of its blocks, filled up with zeros
   to whole pairs and units. */
struct matrix {
    uint16_t *at;         /* [rows][cols] */
    unsigned char *taken; /* [rows / 8][cols / 32]: units found */
    int rows, cols;
};

static void matrix_free(struct matrix *m)
{
    free(m->at);
    free(m->taken);
}

/* Rows of TENSOR become blocks BLOCK0, BLOCK0 + STEP, ... */
static void matrix_put(struct matrix *m, const struct world *w, int tensor, int layer, int block0,
                       int step)
{
    const int fp16 = rt_session_plan(w->session)->dtype == GEN_FP16;
    float *row = calloc((size_t) m->cols, sizeof *row);
    int rows, cols;

    rt_weights_shape(&w->model, tensor, &rows, &cols);
    for (int r = 0; r < rows; r++) {
        uint16_t *to = m->at + (size_t) ((block0 + r / 8 * step) * 8 + r % 8) * (size_t) m->cols;
        rt_weights_get(w->weights, tensor, layer, (int64_t) r * cols, cols, row);
        for (int c = 0; c < cols; c++)
            to[c] = fp16 ? rt_to_fp16(row[c]) : rt_to_bf16(row[c]);
    }
    free(row);
}

static struct matrix matrix_make(const struct world *w, int phase, int layer)
{
    const struct gen_plan *p = rt_session_plan(w->session);
    const struct gen_model *m = &w->model;
    const int rows[GEN_PHASES] = {p->phase[GEN_QKV].blocks * 8, p->pairs * 16,
                                  p->phase[GEN_DOWN].units * 64, p->pairs * 16,
                                  p->phase[GEN_HEAD].blocks * 8};
    struct matrix x = {.rows = rows[phase], .cols = p->phase[phase].units * 32};

    x.at = calloc((size_t) x.rows * (size_t) x.cols, sizeof *x.at);
    x.taken = calloc((size_t) x.rows / 8 * (size_t) x.cols / 32, 1);
    if (phase == GEN_QKV) {
        matrix_put(&x, w, RT_Q, layer, 0, 1);
        matrix_put(&x, w, RT_K, layer, m->H * m->E / 8, 1);
        matrix_put(&x, w, RT_V, layer, (m->H + m->K) * m->E / 8, 1);
    } else if (phase == GEN_MLP) {
        matrix_put(&x, w, RT_GATE, layer, 0, 2);
        matrix_put(&x, w, RT_UP, layer, 1, 2);
    } else {
        matrix_put(&x, w, phase == GEN_O ? RT_O : phase == GEN_DOWN ? RT_DOWN : m->tied ? RT_EMBED
                                                                                        : RT_HEAD,
                   layer, 0, 1);
    }
    return x;
}

/* The next 512 bytes of a stream must be unit UNIT of block BLOCK: 4 tiles, and tile j of each row
   has columns 2 j and 2 j + 1 of each 8 of the 32.  What was looked at becomes zeros. */
static int take_unit(struct matrix *m, int block, int unit, uint16_t **stream)
{
    const uint16_t *from = m->at + (size_t) block * 8 * (size_t) m->cols + unit * 32;
    int wrong = m->taken[block * (m->cols / 32) + unit]++;

    for (int i = 0; i < 256; i++) {
        const int tile = i / 64, row = i / 8 % 8, at = i % 8;
        wrong += (*stream)[i] != from[row * m->cols + at / 2 * 8 + tile * 2 + at % 2];
        (*stream)[i] = 0;
    }
    *stream += 256;
    return wrong;
}

static int take_block(struct matrix *m, int block, uint16_t **stream)
{
    int wrong = 0;

    for (int unit = 0; unit < m->cols / 32; unit++)
        wrong += take_unit(m, block, unit, stream);
    return wrong;
}

/* Pairs of rows of rank RANK, their columns UNIT0 .. UNIT0+UNITS-1 in units: set by set. */
static int take_columns(const struct gen_plan *p, struct matrix *m, int rank, int unit0, int units,
                        uint16_t *stream)
{
    const int n = (p->pairs - rank + p->group - 1) / p->group;
    int wrong = 0, pairs;

    for (int set = 0, first = 0; set < p->sets; set++, first += pairs) {
        pairs = n / p->sets + (set < n % p->sets);
        for (int unit = unit0; unit < unit0 + units; unit++)
            for (int i = first * 2; i < (first + pairs) * 2; i++)
                wrong += take_unit(m, (i / 2 * p->group + rank) * 2 + i % 2, unit, &stream);
    }
    return wrong;
}

/* Blocks of a KV head's queries, its key and its value, of all heads from HEAD0 on: number I. */
static int qkv_block(const struct gen_model *m, int head0, int i)
{
    const int ratio = m->H / m->K, e = m->E / 8, head = head0 + i / ((ratio + 2) * e);
    const int row = i / e % (ratio + 2); /* a query, the key, or the value */
    const int of_all = row < ratio ? head * ratio + row : m->H + (row - ratio) * m->K + head;

    return of_all * e + i % e;
}

/* One layer of the stream of CTA. */
static int take_layer(const struct world *w, struct matrix m[GEN_PHASES], int cta,
                      unsigned char *layer)
{
    const struct gen_plan *p = rt_session_plan(w->session);
    const struct gen_class *c = gen_plan_class(p, cta / p->group);
    const int nth = cta / p->group - c->first, rank = cta % p->group;
    const int ratio = w->model.H / w->model.K;
    const int head0 = c->head0 + nth * c->heads, unit0 = c->unit0 + nth * c->units;
    const int o_units = ratio * w->model.E / 32; /* of a KV head */
    uint16_t *at = (uint16_t *) layer;
    int wrong = 0;

    for (int i = rank; i < c->heads * (ratio + 2) * w->model.E / 8; i += p->group)
        wrong += take_block(&m[GEN_QKV], qkv_block(&w->model, head0, i), &at);
    wrong += take_columns(p, &m[GEN_O], rank, head0 * o_units, c->heads * o_units,
                          (uint16_t *) (layer + c->o));
    at = (uint16_t *) (layer + c->mlp);
    for (int i = unit0 * 4 + rank; i < (unit0 + c->units) * 4; i += p->group) {
        wrong += take_block(&m[GEN_MLP], i * 2, &at);
        wrong += take_block(&m[GEN_MLP], i * 2 + 1, &at);
    }
    return wrong + take_columns(p, &m[GEN_DOWN], rank, unit0, c->units,
                                (uint16_t *) (layer + c->down));
}

/* All that was to be found has been found once. */
static int count_missing(const struct matrix *m)
{
    int missing = 0;

    for (int i = 0; i < m->rows / 8 * (m->cols / 32); i++)
        missing += m->taken[i] != 1;
    return missing;
}

/* The streams, read as decode reads them, have each matrix once and else nothing but zeros. */
static void check_streams(const struct world *w, unsigned char *stream)
{
    const struct gen_plan *p = rt_session_plan(w->session);
    struct matrix head = matrix_make(w, GEN_HEAD, 0), m[GEN_PHASES];
    int64_t other = 0;
    int wrong, missing;

    for (int layer = 0; layer < w->model.L; layer++) {
        wrong = missing = 0;
        for (int phase = 0; phase < GEN_HEAD; phase++)
            m[phase] = matrix_make(w, phase, layer);
        for (int cta = 0; cta < p->ctas; cta++) {
            const int64_t bytes = gen_plan_class(p, cta / p->group)->layer_bytes;
            wrong += take_layer(w, m, cta,
                                stream + cta * p->cta_bytes + p->layers_offset + layer * bytes);
        }
        for (int phase = 0; phase < GEN_HEAD; phase++) {
            missing += count_missing(&m[phase]);
            matrix_free(&m[phase]);
        }
        CHECKF(!wrong && !missing, "%s: layer %d: %d elements are packed wrongly, %d units not",
               w->name, layer, wrong, missing);
    }
    wrong = 0;
    for (int block = 0; block < p->phase[GEN_HEAD].blocks; block++) {
        uint16_t *at = (uint16_t *) (stream + block % p->ctas * p->cta_bytes) +
                       (size_t) (block / p->ctas) * (size_t) head.cols * 8;
        wrong += take_block(&head, block, &at);
    }
    CHECKF(!wrong, "%s: the head: %d elements are packed wrongly", w->name, wrong);
    for (int64_t i = 0; i < p->stream_bytes; i++)
        other += stream[i] != 0;
    CHECKF(!other, "%s: %lld bytes of the streams belong to nothing", w->name, (long long) other);
    matrix_free(&head);
}

/* An untied embedding lies row-major. */
static void check_embedding(const struct world *w, const uint16_t *embed)
{
    const int64_t n = (int64_t) w->model.V * w->model.D;
    const int fp16 = rt_session_plan(w->session)->dtype == GEN_FP16;
    float *want = calloc((size_t) n, sizeof *want);
    int wrong = 0;

    rt_weights_get(w->weights, RT_EMBED, 0, 0, n, want);
    for (int64_t i = 0; i < n; i++)
        wrong += embed[i] != (fp16 ? rt_to_fp16(want[i]) : rt_to_bf16(want[i]));
    CHECKF(!wrong, "%s: %d elements of the embedding are packed wrongly", w->name, wrong);
    free(want);
}

/* The kernel's module, as the session has it. */
static int load_module(struct world *w, rt_module *module, struct mk_err *err)
{
    struct rt_kernel *kernel = NULL;
    struct rt_key key;
    int rc = rt_key_make(rt_session_plan(w->session), rt_session_plan(w->session)->gpu.arch, &key,
                         err);

    if (rc == 0)
        rc = rt_kernel_get(&key, NULL, NULL, NULL, NULL, &kernel, err);
    rt_key_free(&key);
    if (rc == 0)
        rc = rt_module_load(rt_engine_device(w->engine), kernel->cubin, kernel->size, module, err);
    rt_kernel_free(kernel);
    return rc;
}

/* Weights as mk_pack leaves them: those of the host, rounded, each in its place. */
static void test_pack(struct world *w)
{
    const struct gen_plan *p = rt_session_plan(w->session);
    struct rt_device *d = rt_engine_device(w->engine);
    unsigned char *stream = malloc((size_t) p->stream_bytes);
    uint16_t *embed = malloc((size_t) p->embed_bytes);
    struct rt_pack_job job = {.device = d, .plan = p, .weights = w->weights};
    struct rt_packed packed = {0};
    struct mk_err err = {0};
    int rc = load_module(w, &job.module, &err);

    if (rc == 0)
        rc = rt_pack(&job, &packed, &err);
    if (rc == 0)
        rc = rt_device_get(d, stream, packed.stream, (size_t) p->stream_bytes, &err);
    if (rc == 0)
        rc = rt_device_get(d, embed, packed.embed, (size_t) p->embed_bytes, &err);
    if (rc == 0)
        rc = rt_device_sync(d, &err);
    CHECKF(rc == 0, "%s: packing: %s", w->name, err.text);
    if (rc == 0)
        check_streams(w, stream);
    if (rc == 0 && p->embed_bytes)
        check_embedding(w, embed);
    rt_packed_free(d, &packed);
    rt_module_free(d, job.module);
    free(stream);
    free(embed);
}

enum { SAME_PROMPT = 19, SAME_STEPS = 6, SAME_ROWS = SAME_PROMPT + SAME_STEPS };

struct bits { /* what a world gave */
    float *logits;
    uint16_t *prompt, *kv; /* rows that prefill wrote; all */
    size_t n_logits, n_prompt, n_kv;
    int ctas, group;
};

static void bits_free(struct bits *b)
{
    free(b->logits);
    free(b->prompt);
    free(b->kv);
}

/* The first N rows of each layer and head. */
static uint16_t *take_rows(struct world *w, int n, size_t *n_rows)
{
    const struct gen_model *m = &w->model;
    const size_t head = (size_t) n * (size_t) m->E;
    uint16_t *rows = calloc(head * (size_t) (2 * m->K * m->L), sizeof *rows);
    struct mk_err err = {0};
    int rc = 0;

    *n_rows = head * (size_t) (2 * m->K * m->L);
    for (int i = 0; rc == 0 && i < m->L * m->K * 2; i++)
        rc = rt_session_kv_get(w->session, i / 2 / m->K, i / 2 % m->K, i % 2, 0, n,
                               rows + head * (size_t) i, &err);
    CHECKF(rc == 0, "%s: %s", w->name, err.text);
    return rows;
}

/* Prefill and decode from clean memory. */
static void take_bits(struct world *w, struct bits *b)
{
    const struct gen_plan *p = rt_session_plan(w->session);
    struct mk_err err = {0};
    int done, rc;

    b->ctas = p->ctas;
    b->group = p->group;
    b->n_logits = (size_t) SAME_STEPS * (size_t) w->model.V;
    b->logits = calloc(b->n_logits, sizeof *b->logits);
    CHECKF(SAME_ROWS <= p->kv_tile, "%s: attention is spread: tiles of %d", w->name, p->kv_tile);
    poison(w, 0);
    rc = rt_session_prefill(w->session, w->tokens, SAME_PROMPT, 0, &done, &err);
    CHECKF(rc == 0, "%s: %s", w->name, err.text);
    b->prompt = take_rows(w, SAME_PROMPT, &b->n_prompt);
    device_logits(w, SAME_PROMPT, SAME_STEPS, b->logits);
    b->kv = take_rows(w, SAME_ROWS, &b->n_kv);
}

/* All of N setups of one model must give the same rows in prefill, and those that have the same
   groups the same logits and rows in decode.  What changes the order of sums, and so the bits:
   warps, chunks that break a block elsewhere, and sm_75, whose mma takes 8 columns at once; in
   decode also groups, and clusters where attention is spread over ranks: one rank has all of it. */
static void test_same(const struct setup *setups, int n)
{
    struct bits want = {0}, got;
    struct world w;

    for (int i = 0, rc = 0; i < n && rc == 0; i++) {
        printf("%s %s %s\n", i ? "  as" : "same bits:", setups[i].device, setups[i].settings);
        fflush(stdout);
        rc = world_open(&w, &setups[i], scale_of(&setups[i]));
        if (rc == 0)
            take_bits(&w, i ? &got : &want);
        if (rc == 0 && i) {
            CHECKF(!memcmp(got.prompt, want.prompt, want.n_prompt * sizeof *want.prompt),
                   "%s %s: other KV rows", w.name, setups[i].settings);
            if (got.ctas == want.ctas && got.group == want.group) {
                CHECKF(!memcmp(got.kv, want.kv, want.n_kv * sizeof *want.kv),
                       "%s %s: other KV rows in decode", w.name, setups[i].settings);
                CHECKF(!memcmp(got.logits, want.logits, want.n_logits * sizeof *want.logits),
                       "%s %s: other logits", w.name, setups[i].settings);
            }
            bits_free(&got);
        }
        world_close(&w);
    }
    bits_free(&want);
}

/* ---- The GPU and the emulated GPU ------------------------------------------- */

/* Tensor cores add in an order of their own, and exp2 and rsqrt are not exact there: that, and
   the roundings that it turns over. */
#define MOST_APART 0.02

static const struct scale compare_scale = {64, 24, 0, 0, {0}};

/* Model, settings, and whether the groups are clusters where they can be. */
static const struct {
    const char *model, *settings;
    int cluster;
} compared[] = {
    {"toy/tiny-qwen3", "ctas=4 group=2 warps=4 chunk_bytes=4096", 1},
    {"toy/tiny-llama", "ctas=3 group=3 warps=5 unroll_layers=loop dtype=fp16 chunk_bytes=4096", 0},
    {"toy/tiny-qwen2", "ctas=2 group=2 warps=7 chunk_bytes=1024 stages=3 inflight=2", 1},
    {"toy/tiny-smol", "ctas=4 group=4 warps=4 chunk_bytes=4096 unroll_layers=loop", 1},
    {"toy/tiny-qwen3-e128", "ctas=4 group=2 warps=6 chunk_bytes=8192 dtype=fp16", 0},
    {"toy/toy-qwen3", "ctas=4 group=4 balance=1000", 1},
};
enum { COMPARED = sizeof compared / sizeof *compared, COMPARED_ALWAYS = 2 };

/* Do the plans add up in the same order? */
static int same_plan(const struct gen_plan *a, const struct gen_plan *b)
{
    return a->gpu.arch == b->gpu.arch && a->ctas == b->ctas && a->group == b->group &&
           a->cluster == b->cluster && a->team == b->team && a->warps == b->warps && a->dtype == b->dtype &&
           a->kv_tile == b->kv_tile && a->sets == b->sets && a->gemm_k == b->gemm_k &&
           a->flash_n == b->flash_n && !memcmp(a->cls, b->cls, sizeof a->cls) &&
           !memcmp(a->phase, b->phase, sizeof a->phase);
}

static void compare_worlds(struct world *gpu, struct world *host, int from, const char *settings)
{
    const int n = compare_scale.steps - from;
    struct difference d;
    struct mk_err err = {0};
    int done, rc = 0;

    for (int i = 0; i < 2 && rc == 0; i++) {
        struct world *w = i ? host : gpu;
        poison(w, 0);
        rc = rt_session_prefill(w->session, w->tokens, from, 0, &done, &err);
        CHECKF(rc == 0, "%s: prefill: %s", w->name, err.text);
        if (rc == 0)
            rc = device_logits(w, from, n, w->got);
    }
    if (rc)
        return;
    d = compare(gpu->got, host->got, n, gpu->model.V);
    printf("%s %s: %d prefilled, %d decoded: GPU and emulation %.4f of the logits' rms apart, "
           "KL %.2e\n", gpu->name, settings, from, n, d.max, d.kl);
    CHECKF(d.max < MOST_APART && !d.wrong, "%s %s: GPU and emulation are %g apart", gpu->name,
           settings, d.max);
}

/* The first N of the worlds compared, on the GPU and on its emulation. */
static void test_compare(int n)
{
    struct rt_device *d;
    struct gen_gpu facts;
    struct mk_err err;
    char emulated[16];

    if (rt_device_open("gpu", 0, &d, &err))
        SKIP("%s", err.text);
    rt_device_facts(d, &facts);
    rt_device_close(d);
    snprintf(emulated, sizeof emulated, "host:sm_%d", facts.arch);
    for (int i = 0; i < n; i++) {
        char settings[256];
        const struct setup setups[2] = {{"gpu", compared[i].model, settings, NULL},
                                        {emulated, compared[i].model, settings, NULL}};
        struct world gpu, host;
        int rc;
        snprintf(settings, sizeof settings, "%s cluster=%s", compared[i].settings,
                 compared[i].cluster && facts.clusters[1] ? "cluster" : "l2");
        rc = world_open(&gpu, &setups[0], &compare_scale);
        if (world_open(&host, &setups[1], &compare_scale) == 0 && rc == 0) {
            CHECKF(same_plan(rt_session_plan(gpu.session), rt_session_plan(host.session)),
                   "%s %s: the plans differ", gpu.name, settings);
            compare_worlds(&gpu, &host, 0, settings);
            compare_worlds(&gpu, &host, 17, settings);
        }
        world_close(&gpu);
        world_close(&host);
    }
}

/* ---- All of it --------------------------------------------------------------- */

/* A CTA that never answers: an error that says so, within seconds; by the kernel's watchdog or
   by the emulated GPU, which sees that nothing can go on. */
static void test_hang(const struct setup *setup)
{
    const int gpu = scale_of(setup) == &gpu_scale;
    struct world w;
    struct mk_err err = {0};
    struct rt_decode job = {.n = 4};
    int done;

    if (world_open(&w, setup, scale_of(setup)) == 0) {
        job.token = w.tokens[0];
        CHECK(rt_session_decode(w.session, &job, &done, &err) == MK_EDEVICE);
        CHECKF((strstr(err.text, "made no progress: CTA") ||
                (!gpu && strstr(err.text, "deadlock (mk_decode"))) && strstr(err.text, "hop"),
               "hang: %s", err.text);
        CHECKF(gpu || strstr(rt_device_report(rt_engine_device(w.engine)), "planted_hang"),
               "hang: who hangs is not in the report: %s", err.text);
        printf("hang: %.*s\n", (int) strcspn(err.text, "\n"), err.text);
        CHECK(rt_session_decode(w.session, &job, &done, &err) == MK_EDEVICE);
        CHECK_STR(err.text, "the GPU failed in an earlier call; close the model");
    }
    world_close(&w);
}

/* What the worlds have had so far: the lists below must not lose it. */
#define KINDS(X) \
    X(CLUSTERS) X(THROUGH_L2) X(L2_IN_SPITE_OF_CLUSTERS) X(ONE_GROUP) X(SEVERAL_GROUPS) \
    X(GROUPS_OF_ONE) X(GROUPS_OF_THREE) X(NO_HEADS) X(ONE_HEAD) X(SEVERAL_HEADS) X(NO_UNITS) \
    X(HEADS_AND_UNITS) X(UNEVEN_HEADS) X(UNEVEN_UNITS) X(UNEVEN_RANKS) X(SETS) X(UNEVEN_SETS) \
    X(HALF_PAIR) X(HALF_UNIT) X(SPANS) X(SHORT_TILES) X(LONG_TILES) X(MORE_TILES_THAN_RANKS) \
    X(BF16) X(FP16) X(E64) X(E128)
#define KIND(name) name,
#define KIND_TEXT(name) #name,
enum { KINDS(KIND) KINDS_END };
static int *had, *had_ratio; /* of both processes */

static void note_groups(const struct gen_plan *p)
{
    for (int i = 0; i < p->n_classes; i++) {
        const struct gen_class *c = &p->cls[i];
        had[NO_HEADS] |= c->heads == 0;
        had[ONE_HEAD] |= c->heads == 1;
        had[SEVERAL_HEADS] |= c->heads > 1;
        had[NO_UNITS] |= c->units == 0;
        had[HEADS_AND_UNITS] |= c->heads && c->units;
        had[UNEVEN_HEADS] |= c->heads && c->heads != p->cls[0].heads;
        had[UNEVEN_UNITS] |= c->units && c->heads == p->cls[0].heads && c->units != p->cls[0].units;
    }
}

static void note(const struct world *w)
{
    const struct gen_plan *p = rt_session_plan(w->session);
    const struct gen_model *m = &p->model;

    if (!had)
        return;
    note_groups(p);
    had[CLUSTERS] |= p->cluster;
    had[THROUGH_L2] |= !p->cluster;
    had[L2_IN_SPITE_OF_CLUSTERS] |= !p->cluster && p->group > 1 && p->gpu.arch >= 90;
    had[ONE_GROUP] |= p->groups == 1;
    had[SEVERAL_GROUPS] |= p->groups > 1;
    had[GROUPS_OF_ONE] |= p->group == 1;
    had[GROUPS_OF_THREE] |= p->group == 3;
    had[UNEVEN_RANKS] |= p->pairs % p->group != 0;
    had[SETS] |= p->sets > 1;
    had[UNEVEN_SETS] |= p->rank_pairs % p->sets != 0;
    had[HALF_PAIR] |= m->D % 16 != 0;
    had[HALF_UNIT] |= m->D % 32 != 0 && m->F % 32 != 0;
    had[SPANS] |= p->phase[GEN_QKV].spans > 1;
    had[SHORT_TILES] |= p->kv_tile == 16;
    had[LONG_TILES] |= p->kv_tile > 16;
    had[MORE_TILES_THAN_RANKS] |= w->scale->context > p->kv_tile * p->group;
    had[BF16] |= p->dtype == GEN_BF16;
    had[FP16] |= p->dtype == GEN_FP16;
    had[E64] |= m->E == 64;
    had[E128] |= m->E == 128;
    had_ratio[m->H / m->K < 9 ? m->H / m->K : 9] = 1;
}

static void check_had(void)
{
    static const char *const names[] = {KINDS(KIND_TEXT)};

    for (int i = 0; i < KINDS_END; i++)
        CHECKF(had[i], "no world has had %s", names[i]);
    for (int ratio = 1; ratio <= 9; ratio++)
        CHECKF(had_ratio[ratio], "no world has had %d query heads of a KV head", ratio);
}

static void test_world(const struct setup *setup)
{
    struct world w;

    printf("%s %s %s\n", setup->device, setup->model, setup->settings);
    fflush(stdout);
    if (world_open(&w, setup, scale_of(setup)) == 0) {
        note(&w);
        test_pack(&w);
        test_decode(&w);
        test_prefill(&w);
        test_context(&w);
        test_sampling(&w);
        test_stopping(&w);
    }
    world_close(&w);
}

/* Cycles of decode's stages, of a kernel that counts them: in each CTA, no more of them for the
   ring than in all, and from zero again when they have been asked for. */
static void test_laps(const struct setup *setup)
{
    struct world w;

    printf("%s %s %s\n", setup->device, setup->model, setup->settings);
    if (world_open(&w, setup, scale_of(setup)) == 0) {
        const int ctas = rt_session_plan(w.session)->ctas;
        uint64_t *laps = calloc((size_t) ctas * MK_LAP_COUNT * 2, sizeof *laps);
        struct mk_err err = {0};
        for (int run = 0; run < 2; run++) {
            if (run == 0)
                device_logits(&w, 0, 3, w.got);
            CHECK(rt_session_laps(w.session, laps, &err) == 0);
            for (int cta = 0; cta < ctas; cta++) {
                const uint64_t *mine = laps + (size_t) cta * MK_LAP_COUNT * 2;
                uint64_t sum = 0;
                for (int i = 0; i < MK_LAP_COUNT; i++) {
                    CHECKF(mine[i * 2] >= mine[i * 2 + 1], "%s: CTA %d, stage %d", w.name, cta, i);
                    sum += mine[i * 2];
                }
                CHECKF(run ? sum == 0 : mine[MK_LAP_HEAD * 2] && mine[MK_LAP_NEXT * 2],
                       "%s: CTA %d: %llu cycles", w.name, cta, (unsigned long long) sum);
            }
        }
        check_logits(&w, w.got, 0, 3, "with clocks");
        free(laps);
    }
    world_close(&w);
}

/* The parts in which shapes matter. */
static void test_shape(const struct setup *setup)
{
    struct world w;

    printf("%s %s %s, %s\n", setup->device, setup->model, setup->settings, setup->shape);
    fflush(stdout);
    if (world_open(&w, setup, scale_of(setup)) == 0) {
        note(&w);
        test_pack(&w);
        test_decode(&w);
        test_context(&w);
    }
    world_close(&w);
}

/* Weights that are read: packed from each type that files have. */
static void test_read(const struct setup *setup)
{
    struct world w;

    printf("%s %s %s\n", setup->device, setup->model, setup->settings);
    if (world_open(&w, setup, scale_of(setup)) == 0) {
        test_pack(&w);
        test_decode(&w);
    }
    world_close(&w);
}

#define COUNT(list) (int) (sizeof (list) / sizeof *(list))

/* Every family as list and loop, bf16 and fp16; hops inside groups through L2 and in clusters; one
   group and several, of 1 to 4 CTAs, without heads (0), with several (2), without MLP units (M);
   ranks with more pairs of rows than others, and with two sets of them. */
static void test_host_worlds(void)
{
    static const struct setup worlds[] = {
        {"host:sm_75", "toy/tiny-qwen3", "ctas=4 group=2 warps=4 tokens_per_launch=3", NULL},
        {"host:sm_75", "toy/tiny-smol", /* 0 M */
         "ctas=3 group=1 warps=5 unroll_layers=loop stages=2", NULL},
        {"host:sm_80", "toy/tiny-qwen2",
         "ctas=3 group=3 warps=4 inflight=1 prefill_tokens=16 chunk_bytes=4096", NULL},
        {"host:sm_80", "toy/tiny-llama", /* 0 M */
         "ctas=4 group=2 warps=6 unroll_layers=loop dtype=fp16 balance=1000 epoch0=2147483500",
         NULL},
        {"host:sm_90", "toy/tiny-qwen3",
         "ctas=4 group=2 cluster=cluster warps=4 chunk_bytes=4096 tokens_per_launch=3", NULL},
        {"host:sm_90", "toy/tiny-qwen2",
         "ctas=2 group=2 cluster=cluster warps=7 unroll_layers=loop dtype=fp16 chunk_bytes=512 "
         "stages=2", NULL},
        {"host:sm_100", "toy/tiny-smol", /* 2 */
         "ctas=4 group=4 cluster=cluster warps=4 chunk_bytes=4096 round_blocks=2", NULL},
        {"host:sm_100", "toy/tiny-qwen3-e128", /* 0 M */
         "ctas=4 group=2 cluster=cluster warps=4 unroll_layers=loop dtype=fp16 chunk_bytes=8192",
         NULL},
        {"host:sm_120", "toy/tiny-llama", "ctas=1 group=1 warps=4", NULL},
        {"host:sm_120", "toy/tiny-qwen3", /* 0 M */
         "ctas=3 group=1 warps=5 unroll_layers=loop dtype=fp16 tokens_per_launch=7", NULL},
    };

    for (int i = 0; i < COUNT(worlds); i++)
        test_world(&worlds[i]);
}

/* Query heads of a KV head: those that models have, and more than 8; D and F that are no multiples
   of 16 or 32; heads and units that cannot be dealt evenly. */
static void test_host_shapes(void)
{
    static const struct setup shapes[] = {
        {"host:sm_75", "toy/tiny-qwen3", "ctas=4 group=1 warps=4 balance=20", "H=15 K=3 D=72 F=40"},
        {"host:sm_80", "toy/tiny-llama", "ctas=4 group=2 warps=5 chunk_bytes=1024 dtype=fp16",
         "H=18 K=3 D=88 F=200"},
        {"host:sm_90", "toy/tiny-qwen2", "ctas=4 group=4 cluster=cluster warps=4 chunk_bytes=4096",
         "H=7 D=200"},
        {"host:sm_90", "toy/tiny-qwen3", "ctas=4 group=2 cluster=l2 chunk_bytes=4096", "H=8 K=1"},
        {"host:sm_100", "toy/tiny-smol",
         "ctas=4 group=4 cluster=cluster chunk_bytes=4096 dtype=fp16", "H=18 K=2 E=64 D=120"},
        {"host:sm_120", "toy/tiny-llama", "ctas=4 group=2 cluster=cluster chunk_bytes=8192",
         "H=17 E=128 F=8"},
    };

    for (int i = 0; i < COUNT(shapes); i++)
        test_shape(&shapes[i]);
}

/* Contexts of one position, of a tile and one, and of more tiles for a rank than the ring has
   stages; and of two tiles for each CTA of a team, and more. */
static void test_host_contexts(void)
{
    static const struct {
        struct setup setup;
        struct scale scale;
    } contexts[] = {
        {{"host:sm_90", "toy/tiny-qwen2", "ctas=4 group=4 chunk_bytes=512 warps=4", NULL},
         {1, 1, 1, 1, {0}}},
        {{"host:sm_75", "toy/tiny-llama", "ctas=4 group=2 chunk_bytes=512 warps=4", NULL},
         {17, 17, 2, 1, {0}}},
        {{"host:sm_90", "toy/tiny-qwen3", "ctas=4 group=2 chunk_bytes=512 stages=3", "C=251"},
         {251, 1, 3, 1, {0}}},
        {{"host:sm_90", "toy/tiny-qwen2", "ctas=6 group=2 chunk_bytes=512 warps=4 team_from=80", "C=251"},
         {251, 1, 3, 1, {0}}},
    };

    for (int i = 0; i < COUNT(contexts); i++) {
        const struct setup *setup = &contexts[i].setup;
        struct world w;
        printf("%s %s %s\n", setup->device, setup->model, setup->settings);
        fflush(stdout);
        if (world_open(&w, setup, &contexts[i].scale) == 0) {
            test_decode(&w);
            test_context(&w);
        }
        world_close(&w);
    }
}

static void test_host_same(void)
{
    static const struct setup same[] = {
        {"host:sm_90", "toy/tiny-qwen3", "warps=4 ctas=4 group=2 cluster=cluster", NULL},
        {"host:sm_80", "toy/tiny-qwen3",
         "warps=4 ctas=4 group=2 unroll_layers=loop stages=3 inflight=1 round_blocks=2 gemm_m=64 "
         "gemm_stages=2", NULL},
        {"host:sm_120", "toy/tiny-qwen3",
         "warps=4 ctas=4 group=2 cluster=l2 timing=on tokens_per_launch=2 prefill_tokens=16 "
         "gemm_n=64 gemm_k=32", NULL},
        {"host:sm_90", "toy/tiny-qwen3", "warps=4 ctas=3 group=3 cluster=l2", NULL},
        {"host:sm_100", "toy/tiny-qwen3", "warps=4 ctas=1 group=1", NULL},
    };

    test_same(same, COUNT(same));
    test_laps(&same[2]); /* the one with timing=on */
}

static void test_host_others(void)
{
    static const struct setup read[] = {
        {"host:sm_80", "hf/tiny-qwen3-fp32", "ctas=2 warps=4", NULL},
        {"host:sm_75", "hf/tiny-qwen2-fp16", "ctas=3 warps=4", NULL},
        {"host:sm_90", "hf/tiny-llama-sharded", "ctas=3 warps=4", NULL},
    };
    static const struct setup hang[] = {
        {"host:sm_90", "toy/tiny-llama", "ctas=2 warps=4 cluster=cluster fault=hang", NULL},
        {"host:sm_80", "toy/tiny-llama", "ctas=2 warps=4 fault=hang", NULL},
    };

    test_host_shapes();
    test_host_contexts();
    for (int i = 0; i < COUNT(read); i++)
        test_read(&read[i]);
    for (int i = 0; i < COUNT(hang); i++)
        test_hang(&hang[i]);
}

/* Half of it in a second process: a machine of fibers takes one processor. */
static void test_host(void)
{
    const size_t bytes = (KINDS_END + 16) * sizeof *had;
    pid_t pid;
    int status;

    had = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(had != MAP_FAILED);
    if (had == MAP_FAILED)
        return;
    had_ratio = had + KINDS_END;
    fflush(stdout);
    pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        test_host_others();
        status = check_done();
        fflush(stdout);
        _exit(status); /* a driver's handlers are the parent's */
    }
    test_host_worlds();
    test_host_same();
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECKF(WIFEXITED(status) && !WEXITSTATUS(status), "the other process: status %d", status);
    check_had();
    munmap(had, bytes);
    had = NULL;
}

/* Groups and clusters as the plan likes them, and others that every GPU takes.  Of N parts, which may run at once,
   number PART; the last one ends with a hang, and no context outlives that. */
static void test_gpu(int part, int n)
{
    static const struct setup worlds[] = {
        {"gpu", "toy/toy-qwen3", "", NULL},
        {"gpu", "toy/toy-qwen3", "unroll_layers=loop tokens_per_launch=7 chunk_bytes=4096", NULL},
        {"gpu", "toy/toy-qwen3-e128", "chunk_bytes=8192 balance=1000", NULL},
        {"gpu", "toy/toy-qwen2", "", NULL},
        {"gpu", "toy/toy-llama", "chunk_bytes=1024 stages=3 inflight=2", NULL},
        {"gpu", "toy/toy-qwen2", "ctas=8 group=2 chunk_bytes=4096 team_from=112 tokens_per_launch=5", NULL},
        {"gpu", "toy/toy-smol", "ctas=9 group=3 chunk_bytes=4096", NULL},
        {"gpu", "toy/toy-qwen2", "ctas=16 group=16 cluster=l2 chunk_bytes=4096", NULL},
        {"gpu", "toy/toy-qwen3", "cluster=l2 chunk_bytes=4096 balance=0", NULL},
        {"gpu", "toy/toy-qwen3",
         "dtype=fp16 ctas=5 group=1 round_blocks=2 warps=5 prefill_tokens=32", NULL},
        {"gpu", "toy/toy-llama", "ctas=1 group=1", NULL},
    };
    static const struct setup shapes[] = {
        {"gpu", "toy/toy-llama", "", "H=12 D=120 F=200"},
        {"gpu", "toy/toy-qwen3-e128", "ctas=8 group=4 chunk_bytes=8192", "H=16 K=2 D=200 F=104"},
        {"gpu", "toy/toy-smol", "ctas=4 group=4 chunk_bytes=4096", "H=15 K=3 E=64 D=328"},
        {"gpu", "toy/toy-qwen2", "ctas=4 group=2 cluster=l2 chunk_bytes=4096",
         "H=12 K=2 D=72 F=40"},
    };
    static const struct setup same[] = {
        {"gpu", "toy/toy-qwen3", "warps=4 ctas=8 group=4 chunk_bytes=8192", NULL},
        {"gpu", "toy/toy-qwen3",
         "warps=4 ctas=8 group=4 chunk_bytes=8192 cluster=l2 unroll_layers=loop", NULL},
        {"gpu", "toy/toy-qwen3",
         "warps=4 ctas=8 group=4 chunk_bytes=8192 stages=3 inflight=1 round_blocks=2", NULL},
        {"gpu", "toy/toy-qwen3", "warps=4 ctas=8 group=4 chunk_bytes=8192 timing=on", NULL},
        {"gpu", "toy/toy-qwen3", "warps=4 ctas=3 group=3 chunk_bytes=8192", NULL},
    };
    static const struct setup hang = {"gpu", "toy/toy-qwen3", "fault=hang", NULL};

    for (int i = part; i < COUNT(worlds); i += n)
        test_world(&worlds[i]);
    for (int i = part; i < COUNT(shapes); i += n)
        test_shape(&shapes[i]);
    if (part < n - 1)
        return;
    test_same(same, COUNT(same));
    test_laps(&same[3]); /* the one with timing=on */
    test_hang(&hang);
}

static int is_there(const char *device, struct mk_err *err)
{
    struct rt_device *d;

    if (rt_device_open(device, 0, &d, err))
        return 0;
    rt_device_close(d);
    return 1;
}

int main(int argc, char **argv)
{
    struct mk_err no_gpu, no_host;
    const int gpu = is_there("gpu", &no_gpu), host = is_there("host", &no_host);
    int part, parts;
    char path[256];

    if (argc > 2) {
        const struct setup setup = {argc > 3 ? argv[3] : gpu ? "gpu" : "host", path, argv[2],
                                    argc > 4 ? argv[4] : NULL};
        snprintf(path, sizeof path, "toy/%s", argv[1]);
        test_world(&setup);
        return check_done();
    }
    if (argc == 2 && !strcmp(argv[1], "--compare")) {
        test_compare(COMPARED);
        return check_done();
    }
    if (argc == 2 && sscanf(argv[1], "--gpu=%d/%d", &part, &parts) == 2 && part > 0 && part <= parts) {
        test_gpu(part - 1, parts);
        return check_done();
    }
    if (!gpu && !host)
        SKIP("%s; %s", no_gpu.text, no_host.text);
    if (host)
        test_host();
    else
        printf("the emulated GPU's half is skipped: %s\n", no_host.text);
    if (gpu && host)
        test_compare(COMPARED_ALWAYS);
    if (gpu)
        test_gpu(0, 1);
    else
        printf("the GPU's half is skipped: %s\n", no_gpu.text);
    return check_done();
}
