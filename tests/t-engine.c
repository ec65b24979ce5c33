/* t-engine.c - the emitted kernels against the oracle (cpu.h), with plans that reach every path:
   on the emulated GPU at toy size, for every family of architectures, and on the GPU where there
   is one.  What is the same arithmetic must be the same bits: packed weights, repeated runs,
   layers as list and loop, numbers of CTAs, rings, architectures of the emulated GPU.
     t-engine                            all of it
     t-engine MODEL SETTINGS [DEVICE]    one world
     t-engine --compare                  the GPU's logits against those of the emulated GPU
   Exit 77 with neither device. */
#include "config.h"

#include <stdint.h>
#include <unistd.h>

#include "runtime/abi.h"
#include "runtime/cpu.h"
#include "runtime/engine.h"
#include "runtime/key.h"
#include "runtime/pack.h"
#include "runtime/sample.h"
#include "tests/check.h"

enum { MOST_STEPS = 96, MOST_SETTINGS = 16 };

/* How much of a world is run. */
struct scale {
    int context, steps; /* positions; of them decoded one by one from the start */
    int tail;           /* the last positions of a full context */
    int sampled;        /* tokens of each sampler */
    int lengths[16];    /* of prefill, around the tiles' edges, below steps; 0: no more */
};
static const struct scale
    gpu_scale = {512, 96, 40, 40, {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 95}},
    host_scale = {64, 18, 3, 6, {1, 8, 17}};

struct setup {
    const char *device, *model, *settings;
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
    float *want, *got; /* [steps][V] */
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

static int read_weights(struct world *w, const char *path, struct mk_err *err)
{
    char file[4200];

    for (int shards = 0; shards < 2; shards++) {
        snprintf(file, sizeof file, "%s/model.safetensors%s", path, shards ? ".index.json" : "");
        if (access(file, R_OK) == 0)
            return rt_weights_open(path, &w->model, &w->weights, err);
    }
    return rt_weights_random(&w->model, 7, &w->weights, err);
}

/* The oracle and what it is asked. */
static int make_oracle(struct world *w, struct mk_err *err)
{
    const size_t logits = (size_t) w->scale->steps * (size_t) w->model.V;

    w->tokens = calloc((size_t) w->scale->context, sizeof *w->tokens);
    w->want = calloc(logits, sizeof *w->want);
    w->got = calloc(logits, sizeof *w->got);
    if (!w->tokens || !w->want || !w->got)
        return gen_fail(err, MK_ENOMEM, "no memory");
    for (int i = 0; i < w->scale->context; i++)
        w->tokens[i] = (int32_t) (rt_sample_hash(3, (uint32_t) i, 0) % (uint64_t) w->model.V);
    return rt_cpu_make(&w->model, w->weights, rt_session_plan(w->session)->dtype, 1,
                       w->scale->context, 0, &w->cpu, err);
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
        rc = read_weights(w, path, &err);
    if (rc == 0)
        rc = rt_engine_open(&w->model, w->weights, &options, &w->engine, &err);
    if (rc == 0)
        rc = rt_session_make(w->engine, w->scale->context, &w->session, &err);
    if (rc == 0)
        rc = make_oracle(w, &err);
    CHECKF(rc == 0, "%s %s: %s", w->name, setup->settings, err.text);
    return rc;
}

/* Every KV row of every layer becomes NaN. */
static void poison(struct world *w)
{
    const size_t n = (size_t) w->scale->context * (size_t) w->model.E;
    uint16_t *nan_rows = malloc(n * sizeof *nan_rows);
    struct mk_err err;
    int rc = 0;

    for (size_t i = 0; i < n; i++)
        nan_rows[i] = 0x7fff; /* NaN in bf16 and in fp16 */
    for (int layer = 0; layer < w->model.L; layer++)
        for (int head = 0; head < w->model.K; head++)
            for (int which = 0; which < 2; which++)
                rc |= rt_session_kv_put(w->session, layer, head, which, 0, w->scale->context,
                                        nan_rows, &err);
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

/* Decode steps from position 0 on poisoned memory against the oracle, twice the same bits. */
static void test_decode(struct world *w)
{
    const int steps = w->scale->steps;
    const size_t n = (size_t) steps * (size_t) w->model.V;
    float *again = calloc(n, sizeof *again);
    struct difference d;
    struct mk_err err;

    poison(w);
    CHECK(rt_cpu_run(w->cpu, w->tokens, steps, 0, w->want, 1, NULL, &err) == 0);
    if (device_logits(w, 0, steps, w->got) == 0) {
        d = compare(w->got, w->want, steps, w->model.V);
        printf("%s: decode: error %.4f of the logits' rms, KL %.2e\n", w->name, d.max, d.kl);
        CHECKF(d.max < 0.08 && d.kl < 1e-3 && !d.wrong, "%s: decode: error %g, KL %g, %d wrong",
               w->name, d.max, d.kl, d.wrong);
        device_logits(w, 0, steps, again);
        CHECKF(!memcmp(w->got, again, n * sizeof *again), "%s: a second run has other bits",
               w->name);
    }
    free(again);
}

/* Prefill of n tokens and one step against the oracle, for lengths around the tiles' edges, in
   one piece and continued. */
static void test_prefill(struct world *w)
{
    float *logits = calloc((size_t) w->model.V, sizeof *logits);
    struct mk_err err = {0};
    double worst = 0;
    int done, rc;

    for (const int *length = w->scale->lengths; *length; length++) {
        const int n = *length, first = n / 3;
        for (int pieces = 1; pieces <= 2; pieces++) {
            struct difference d;
            poison(w);
            rc = pieces == 1 ? 0 : rt_session_prefill(w->session, w->tokens, first, 0, &done, &err);
            if (rc == 0)
                rc = rt_session_prefill(w->session, w->tokens + (pieces == 1 ? 0 : first),
                                        pieces == 1 ? n : n - first, pieces == 1 ? 0 : first, &done,
                                        &err);
            CHECKF(rc == 0, "%s: prefill of %d: %s", w->name, n, err.text);
            if (rc || device_logits(w, n, 1, logits))
                goto done;
            d = compare(logits, w->want + (size_t) n * (size_t) w->model.V, 1, w->model.V);
            worst = fmax(worst, d.max);
            CHECKF(d.max < 0.08 && d.kl < 1e-3 && !d.wrong,
                   "%s: prefill of %d in %d pieces: error %g, KL %g", w->name, n, pieces, d.max,
                   d.kl);
        }
    }
    printf("%s: prefill: error %.4f\n", w->name, worst);
done:
    free(logits);
}

/* The last position of a full context, reached by prefill. */
static void test_full(struct world *w)
{
    const int last = w->scale->context - 1, tail = w->scale->tail, V = w->model.V;
    float *logits = calloc((size_t) V, sizeof *logits), *want = calloc((size_t) V, sizeof *want);
    struct mk_err err = {0};
    struct difference d;
    int done, rc;

    poison(w);
    CHECK(rt_cpu_run(w->cpu, w->tokens, last + 1, 0, want, 0, NULL, &err) == 0);
    rc = rt_session_prefill(w->session, w->tokens, last, 0, &done, &err);
    CHECKF(rc == 0 && done == last, "%s: full: %s", w->name, err.text);
    if (rc == 0 && device_logits(w, last, 1, logits) == 0) {
        d = compare(logits, want, 1, V);
        CHECKF(d.max < 0.08 && d.kl < 1e-3 && !d.wrong, "%s: last position: error %g, KL %g",
               w->name, d.max, d.kl);
        /* and the rows in between, in decode steps over a split context */
        device_logits(w, last + 1 - tail, tail, w->got);
        d = compare(w->got + (size_t) (tail - 1) * (size_t) V, want, 1, V);
        CHECKF(d.max < 0.08 && d.kl < 1e-3, "%s: last position after steps: error %g, KL %g",
               w->name, d.max, d.kl);
    }
    free(logits);
    free(want);
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

/* Where block BLOCK of a phase begins in the streams; LAYER = L: the head. */
static int64_t block_offset(const struct gen_plan *p, int layer, int phase, int block)
{
    const struct gen_phase *f = &p->phase[phase];
    const int dealt = block / f->step;

    return (int64_t) (dealt % p->ctas) * p->cta_bytes + f->offset +
           (layer < p->model.L ? layer * p->layer_bytes : p->head_offset) +
           (int64_t) (dealt / p->ctas * f->step + block % f->step) * f->units * 512;
}

/* Elements of blocks BLOCK0, BLOCK0 + STEP, ... of a phase that are not those of TENSOR. */
static int count_wrong(const struct world *w, const uint16_t *stream, int tensor, int layer,
                       int phase, int block0, int step)
{
    const struct gen_plan *p = rt_session_plan(w->session);
    const int padded = p->phase[phase].units * 32;
    float *row = calloc((size_t) padded, sizeof *row);
    int rows, cols, wrong = 0;

    rt_weights_shape(&w->model, tensor, &rows, &cols);
    for (int r = 0; r < (rows + 7) / 8 * 8; r++) {
        const int64_t at = block_offset(p, layer, phase, block0 + r / 8 * step) / 2 + r % 8 * 8;
        memset(row, 0, (size_t) padded * sizeof *row);
        if (r < rows)
            rt_weights_get(w->weights, tensor, layer < w->model.L ? layer : 0, (int64_t) r * cols,
                           cols, row);
        for (int c = 0; c < padded; c++) {
            const uint16_t want = p->dtype == GEN_FP16 ? rt_to_fp16(row[c]) : rt_to_bf16(row[c]);
            wrong += stream[at + c / 8 * 64 + c % 8] != want;
        }
    }
    free(row);
    return wrong;
}

static void check_streams(const struct world *w, const uint16_t *stream)
{
    const struct gen_model *m = &w->model;
    const int head = m->E / 8;
    const struct {
        int tensor, phase, block0, step;
    } places[] = {
        {RT_Q, GEN_QKV, 0, 1},
        {RT_K, GEN_QKV, m->H * head, 1},
        {RT_V, GEN_QKV, (m->H + m->K) * head, 1},
        {RT_O, GEN_O, 0, 1},
        {RT_GATE, GEN_MLP, 0, 2},
        {RT_UP, GEN_MLP, 1, 2},
        {RT_DOWN, GEN_DOWN, 0, 1},
    };
    int wrong;

    for (int layer = 0; layer < m->L; layer++)
        for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
            wrong = count_wrong(w, stream, places[i].tensor, layer, places[i].phase,
                                places[i].block0, places[i].step);
            CHECKF(!wrong, "%s: tensor %d of layer %d: %d elements are packed wrongly", w->name,
                   places[i].tensor, layer, wrong);
        }
    wrong = count_wrong(w, stream, m->tied ? RT_EMBED : RT_HEAD, m->L, GEN_HEAD, 0, 1);
    CHECKF(!wrong, "%s: the head: %d elements are packed wrongly", w->name, wrong);
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
    uint16_t *stream = malloc((size_t) p->stream_bytes), *embed = malloc((size_t) p->embed_bytes);
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
    uint16_t *kv;
    size_t n_logits, n_kv;
};

static void bits_free(struct bits *b)
{
    free(b->logits);
    free(b->kv);
}

/* Prefill and decode from clean memory. */
static void take_bits(struct world *w, struct bits *b)
{
    const struct gen_model *m = &w->model;
    const size_t head = (size_t) SAME_ROWS * (size_t) m->E;
    struct mk_err err = {0};
    int done, rc;

    b->n_logits = (size_t) SAME_STEPS * (size_t) m->V;
    b->n_kv = head * (size_t) (2 * m->K * m->L);
    b->logits = calloc(b->n_logits, sizeof *b->logits);
    b->kv = calloc(b->n_kv, sizeof *b->kv);
    poison(w);
    rc = rt_session_prefill(w->session, w->tokens, SAME_PROMPT, 0, &done, &err);
    CHECKF(rc == 0, "%s: %s", w->name, err.text);
    device_logits(w, SAME_PROMPT, SAME_STEPS, b->logits);
    for (int i = 0; rc == 0 && i < m->L * m->K * 2; i++)
        rc = rt_session_kv_get(w->session, i / 2 / m->K, i / 2 % m->K, i % 2, 0, SAME_ROWS,
                               b->kv + head * (size_t) i, &err);
    CHECKF(rc == 0, "%s: %s", w->name, err.text);
}

/* All of N setups of one model must give the same logits and KV rows.  What changes the order of
   sums, and so the bits: warps, chunks that break a block elsewhere, splits of attention, and
   sm_75, whose mma takes 8 columns at once. */
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
            CHECKF(!memcmp(got.kv, want.kv, want.n_kv * sizeof *want.kv), "%s %s: other KV rows",
                   w.name, setups[i].settings);
            CHECKF(!memcmp(got.logits, want.logits, want.n_logits * sizeof *want.logits),
                   "%s %s: other logits", w.name, setups[i].settings);
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

static const char *const compared[][2] = {
    {"toy/tiny-qwen3", "ctas=4 warps=4 split_min=6"},
    {"toy/tiny-llama", "ctas=3 warps=5 split_min=9 unroll_layers=loop dtype=fp16"},
    {"toy/tiny-qwen2", "ctas=3 warps=7 chunk_bytes=1024 stages=3 inflight=2"},
    {"toy/tiny-smol", "ctas=2 warps=4 split_min=5 unroll_layers=loop"},
    {"toy/tiny-qwen3-e128", "ctas=4 warps=6 split_min=8"},
    {"toy/toy-qwen3", "ctas=4 split_min=12"},
};
enum { COMPARED = sizeof compared / sizeof *compared, COMPARED_ALWAYS = 2 };

/* Do the plans add up in the same order? */
static int same_plan(const struct gen_plan *a, const struct gen_plan *b)
{
    return a->gpu.arch == b->gpu.arch && a->ctas == b->ctas && a->warps == b->warps &&
           a->dtype == b->dtype && a->head_group == b->head_group && a->kv_ahead == b->kv_ahead &&
           a->max_splits == b->max_splits && a->gemm_k == b->gemm_k && a->flash_n == b->flash_n &&
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
        poison(w);
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
        const struct setup setups[2] = {{"gpu", compared[i][0], compared[i][1]},
                                        {emulated, compared[i][0], compared[i][1]}};
        struct world gpu, host;
        int rc = world_open(&gpu, &setups[0], &compare_scale);
        if (world_open(&host, &setups[1], &compare_scale) == 0 && rc == 0) {
            CHECKF(same_plan(rt_session_plan(gpu.session), rt_session_plan(host.session)),
                   "%s %s: the plans differ", gpu.name, compared[i][1]);
            compare_worlds(&gpu, &host, 0, compared[i][1]);
            compare_worlds(&gpu, &host, 17, compared[i][1]);
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

static void test_world(const struct setup *setup)
{
    struct world w;

    printf("%s %s %s\n", setup->device, setup->model, setup->settings);
    fflush(stdout);
    if (world_open(&w, setup, scale_of(setup)) == 0) {
        test_pack(&w);
        test_decode(&w);
        test_prefill(&w);
        test_full(&w);
        test_sampling(&w);
        test_stopping(&w);
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

static void test_host(void)
{
    static const struct setup worlds[] = { /* every family as list and loop, bf16 and fp16 */
        {"host:sm_75", "toy/tiny-qwen3", "ctas=4 warps=4 split_min=6 tokens_per_launch=3"},
        {"host:sm_75", "toy/tiny-smol", "ctas=3 warps=5 unroll_layers=loop split_min=9 stages=2"},
        {"host:sm_80", "toy/tiny-qwen2", "ctas=3 warps=4 inflight=1 prefill_tokens=16"},
        {"host:sm_80", "toy/tiny-llama",
         "ctas=4 warps=6 unroll_layers=loop dtype=fp16 split_min=3 epoch0=2147483500"},
        {"host:sm_90", "toy/tiny-qwen3", "ctas=4 warps=4 split_min=6 tokens_per_launch=3"},
        {"host:sm_90", "toy/tiny-qwen2",
         "ctas=2 warps=7 unroll_layers=loop dtype=fp16 head_group=1 chunk_bytes=512 stages=2"},
        {"host:sm_100", "toy/tiny-smol", "ctas=4 warps=4 split_min=2 round_blocks=2"},
        {"host:sm_100", "toy/tiny-qwen3-e128",
         "ctas=4 warps=4 unroll_layers=loop dtype=fp16 split_min=5"},
        {"host:sm_120", "toy/tiny-llama", "ctas=1 warps=4 head_group=1"},
        {"host:sm_120", "toy/tiny-qwen3",
         "ctas=3 warps=5 unroll_layers=loop dtype=fp16 split_min=7 tokens_per_launch=7"},
    };
    static const struct setup read[] = {
        {"host:sm_80", "hf/tiny-qwen3-fp32", "ctas=2 warps=4"},
        {"host:sm_75", "hf/tiny-qwen2-fp16", "ctas=3 warps=4"},
        {"host:sm_90", "hf/tiny-llama-sharded", "ctas=3 warps=4"},
    };
    static const struct setup same[] = {
        {"host:sm_90", "toy/tiny-qwen3", "warps=4 split_min=64 ctas=4"},
        {"host:sm_80", "toy/tiny-qwen3",
         "warps=4 split_min=64 ctas=3 unroll_layers=loop stages=3 inflight=1 round_blocks=2 "
         "gemm_m=64 gemm_stages=2"},
        {"host:sm_120", "toy/tiny-qwen3",
         "warps=4 split_min=64 ctas=1 head_group=1 tokens_per_launch=2 prefill_tokens=16 "
         "gemm_n=64 gemm_k=32"},
    };
    static const struct setup hang = {"host:sm_90", "toy/tiny-llama", "ctas=2 warps=4 fault=hang"};

    for (int i = 0; i < COUNT(worlds); i++)
        test_world(&worlds[i]);
    for (int i = 0; i < COUNT(read); i++)
        test_read(&read[i]);
    test_same(same, COUNT(same));
    test_hang(&hang);
}

static void test_gpu(void)
{
    static const struct setup worlds[] = {
        {"gpu", "toy/toy-qwen3", ""},
        {"gpu", "toy/toy-qwen3", "unroll_layers=loop tokens_per_launch=7 split_min=5"},
        {"gpu", "toy/toy-qwen3-e128", "split_min=16"},
        {"gpu", "toy/toy-qwen2", ""},
        {"gpu", "toy/toy-llama", "chunk_bytes=1024 stages=3 inflight=2"},
        {"gpu", "toy/toy-smol", "ctas=3 split_min=9"},
        {"gpu", "toy/toy-qwen3", "dtype=fp16 ctas=5 round_blocks=2 warps=5 prefill_tokens=32"},
        {"gpu", "toy/toy-llama", "ctas=1 head_group=1"},
    };
    static const struct setup same[] = {
        {"gpu", "toy/toy-qwen3", "warps=4 split_min=512 ctas=8"},
        {"gpu", "toy/toy-qwen3", "warps=4 split_min=512 ctas=8 unroll_layers=loop"},
        {"gpu", "toy/toy-qwen3", "warps=4 split_min=512 ctas=3 stages=3 inflight=1 round_blocks=2"},
    };
    static const struct setup hang = {"gpu", "toy/toy-qwen3", "fault=hang"};

    for (int i = 0; i < COUNT(worlds); i++)
        test_world(&worlds[i]);
    test_same(same, COUNT(same));
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
    char path[256];

    if (argc > 2) {
        const struct setup setup = {argc > 3 ? argv[3] : gpu ? "gpu" : "host", path, argv[2]};
        snprintf(path, sizeof path, "toy/%s", argv[1]);
        test_world(&setup);
        return check_done();
    }
    if (argc == 2 && !strcmp(argv[1], "--compare")) {
        test_compare(COMPARED);
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
        test_gpu(); /* the last: it ends with a hang, and no context outlives that */
    else
        printf("the GPU's half is skipped: %s\n", no_gpu.text);
    return check_done();
}
