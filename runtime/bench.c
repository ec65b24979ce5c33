/* bench.c - see bench.h: timing of the kernels, and the check of what was timed. */
#include "config.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "runtime/bandwidth.h"
#include "runtime/abi.h"
#include "runtime/bench.h"
#include "runtime/cpu.h"
#include "runtime/engine.h"
#include "runtime/sample.h"

enum {
    EDGE = 4,                   /* tokens that are checked at each end of a run */
    MOST_CHECKED = 2 * EDGE,
    ORACLE_CONTEXT = 4096       /* the oracle's first KV cache; made anew when more is needed */
};

enum { RAN_NOTHING, RAN_DECODE, RAN_PREFILL };

/* The timed run that can be checked.  Step I is the token at position POS + I. */
struct ran {
    int kind;
    int pos, n;
    int32_t *input;             /* [n] */
    int32_t *chosen;            /* [n]; prefill: only that of the last step */
    int differs;                /* a later run chose otherwise: 1 + the step */
    int differs_run;
};

struct rt_bench {
    struct gen_model model;
    struct rt_bench_options options;
    struct rt_weights *weights;
    struct rt_engine *engine;
    struct rt_session *session;
    const struct gen_plan *plan;
    struct rt_bench_start start;
    int32_t *tokens;            /* [context] pseudo-random */
    int filled;                 /* rows 0 .. filled-1 are those of TOKENS */
    int quiet;                  /* do not tell of progress: a run is timed */
    struct ran ran;
    struct rt_cpu *oracle;      /* NULL: no check yet */
    int oracle_context;
};

static double now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
}

/* ---- What is opened ------------------------------------------------------------ */

static void tell_progress(void *user, const char *what, double fraction)
{
    const struct rt_bench *b = user;

    if (!b->quiet && b->options.progress)
        b->options.progress(b->options.user, what, fraction);
}

static void tell_warning(void *user, const char *text)
{
    const struct rt_bench *b = user;

    if (b->options.warn)
        b->options.warn(b->options.user, text);
}

/* The weights beside the config.json that gen_model_read found for WHERE. */
static int open_checkpoint(const char *where, const struct gen_model *m, struct rt_weights **out,
                           struct mk_err *err)
{
    char *folder, *slash;
    int rc = gen_model_config(where, &folder, err);

    if (rc)
        return rc;
    slash = strrchr(folder, '/');
    if (slash)
        slash[1] = 0;
    rc = rt_weights_open(slash ? folder : ".", m, out, err);
    free(folder);
    return rc;
}

int rt_bench_weights(const char *where, const struct gen_model *m,
                     const struct rt_bench_options *options, struct rt_weights **out,
                     struct mk_err *err)
{
    int rc;

    *out = NULL;
    if (options->random_weights)
        return rt_weights_random(m, options->seed, out, err);
    rc = open_checkpoint(where, m, out, err);
    return rc != MK_ENOENT ? rc
           : gen_fail_in(err, rc, "no checkpoint (--random-weights makes one)");
}

static int make_tokens(struct rt_bench *b, struct mk_err *err)
{
    const size_t n = (size_t)b->plan->context;

    b->tokens = malloc(n * sizeof *b->tokens);
    b->ran.input = malloc(n * sizeof *b->tokens);
    b->ran.chosen = malloc(n * sizeof *b->tokens);
    if (!b->tokens || !b->ran.input || !b->ran.chosen)
        return gen_fail(err, MK_ENOMEM, "no memory for %zu tokens", n);
    for (size_t i = 0; i < n; i++)
        b->tokens[i] = (int32_t)(rt_sample_hash(b->options.seed, (uint32_t)i, 0)
                                 % (uint64_t)b->model.V);
    return 0;
}

void rt_bench_close(struct rt_bench *b)
{
    if (!b)
        return;
    rt_cpu_free(b->oracle);
    rt_session_free(b->session);
    rt_engine_close(b->engine);
    rt_weights_close(b->weights);
    free(b->tokens);
    free(b->ran.input);
    free(b->ran.chosen);
    free(b);
}

/* ---- Facts ------------------------------------------------------------------ */

/* The bandwidth of the data sheet: of the profile of this very part ("nvidia-h200" is h200), else
   from the memory clock and the width of the bus. */
static int sheet_gbps(const struct gen_gpu *gpu)
{
    const char *name;
    struct gen_gpu profile;

    for (int i = 0; (name = gen_gpu_profile(i)); i++) {
        const char *dash = strrchr(gpu->name, '-');
        if (strcmp(dash ? dash + 1 : gpu->name, name) == 0 && !gen_gpu_read(name, &profile, NULL) &&
            profile.arch == gpu->arch && profile.sms == gpu->sms)
            return profile.mem_gbps;
    }
    return gpu->mem_gbps;
}

void rt_bench_facts(const struct rt_bench *b, struct rt_bench_facts *out)
{
    const struct rt_device *device = rt_engine_device(b->engine);
    struct gen_gpu gpu;

    memset(out, 0, sizeof *out);
    rt_device_facts(device, &gpu);
    out->model = b->model;
    snprintf(out->gpu, sizeof out->gpu, "%s", rt_device_name(device));
    out->arch = gpu.arch;
    out->sms = gpu.sms;
    out->driver = rt_device_driver(device);
    out->sheet_gbps = sheet_gbps(&gpu);
    out->context = b->plan->context;
    out->plan_file = rt_session_plan_file(b->session);
    out->kernel_from = rt_session_kernel_from(b->session);
    out->weight_bytes = gen_model_params(&b->model) * 2;
    out->start = b->start;
}

int rt_bench_bandwidth(struct rt_bench *b, double *gbps, char method[128], struct mk_err *err)
{
    return rt_bandwidth(rt_engine_device(b->engine), gbps, method, err);
}

/* Bytes of the KV rows of N positions, all layers. */
static int64_t kv_rows_bytes(const struct rt_bench *b, int n)
{
    const struct gen_model *m = &b->model;

    return (int64_t)n * m->L * m->K * m->E * 2 * 2;
}

int64_t rt_bench_decode_bytes(const struct rt_bench *b, int pos)
{
    return gen_model_params_read(&b->model) * 2 + kv_rows_bytes(b, pos + 1);
}

/* What mk_prefill reads of the weights: no head, and of the last layer only what makes
   keys and values. */
static int64_t chunk_weight_bytes(const struct gen_model *m)
{
    const int64_t D = m->D, head = (int64_t)m->V * D;
    const int64_t unread = D * m->H * m->E * 2 + 3 * D * m->F;

    return 2 * (gen_model_params_read(m) - head - unread);
}

int64_t rt_bench_prefill_bytes(const struct rt_bench *b, int n)
{
    int64_t bytes = rt_bench_decode_bytes(b, n - 1);

    for (int done = 0; done < n - 1; done += b->plan->prefill_tokens)
        bytes += chunk_weight_bytes(&b->model) + kv_rows_bytes(b, done);
    return bytes;
}

/* ---- Runs ------------------------------------------------------------------- */

/* Takes the tokens of one run as they come. */
struct taker {
    struct rt_bench *b;
    int32_t *to;                /* [n] */
    int n, got;
    double end_ms;              /* when the last came */
    int *clock_mhz;             /* not NULL: read the clock in the middle */
};

static int take_token(void *user, int32_t token)
{
    struct taker *t = user;

    if (t->got < t->n)
        t->to[t->got] = token;
    if (t->clock_mhz && t->got == t->n / 2)
        *t->clock_mhz = rt_device_clock(rt_engine_device(t->b->engine));
    if (++t->got == t->n)
        t->end_ms = now_ms();
    return 0;
}

/* Decode T->n tokens from position POS, greedily.  FORCED and LOGITS as in struct rt_decode. */
static int decode(struct taker *t, int32_t token, int pos, const int32_t *forced, float *logits,
                  struct mk_err *err)
{
    const struct rt_decode job = {
        .token = token, .pos = pos, .n = t->n, .top_p = 1.0f, .forced = forced, .logits = logits,
        .token_fn = take_token, .user = t,
    };
    int done, rc = rt_session_decode(t->b->session, &job, &done, err);

    if (rc == 0 && (done != t->n || t->got != t->n))
        rc = gen_fail(err, MK_EDEVICE, "the kernel of %s gave %d tokens instead of %d at position "
                      "%d", t->b->model.name, t->got, t->n, pos);
    return rc;
}

/* ---- Opening: how long it takes ------------------------------------------------ */

/* All of it but the first token. */
static int open_all(struct rt_bench *b, const char *where, int context, struct mk_err *err)
{
    const struct rt_engine_options options = {
        b->options.cubin_path, b->options.plan_file, b->options.set, tell_progress, tell_warning, b,
        b->options.device ? b->options.device : "gpu",
    };
    const double begin = now_ms();
    double opened, made;
    int rc = rt_bench_weights(where, &b->model, &b->options, &b->weights, err);

    b->start.weights = 1e-3 * (now_ms() - begin);
    opened = now_ms();
    if (rc == 0)
        rc = rt_engine_open(&b->model, b->weights, &options, &b->engine, err);
    made = now_ms();
    b->start.driver = 1e-3 * (made - opened);
    if (rc == 0)
        rc = rt_session_make(b->engine, context, &b->session, err);
    if (rc)
        return rc;
    b->plan = rt_session_plan(b->session);
    b->start.kernel = rt_session_kernel_s(b->session);
    b->start.buffers = 1e-3 * (now_ms() - made) - b->start.kernel - rt_engine_load_s(b->engine);
    b->start.weights += rt_engine_load_s(b->engine);
    return make_tokens(b, err);
}

/* Position 0 is filled again for what is measured. */
static int first_token(struct rt_bench *b, struct mk_err *err)
{
    const double begin = now_ms();
    int32_t chosen;
    struct taker t = {.b = b, .to = &chosen, .n = 1};
    const int rc = decode(&t, b->tokens[0], 0, NULL, NULL, err);

    b->start.token = 1e-3 * (now_ms() - begin);
    return rc;
}

int rt_bench_open(const char *where, int context, const struct rt_bench_options *options,
                  struct rt_bench **out, struct mk_err *err)
{
    struct rt_bench *b = calloc(1, sizeof *b);
    int rc;

    *out = NULL;
    if (!b)
        return gen_fail(err, MK_ENOMEM, "no memory for a benchmark");
    b->options = *options;
    if (!b->options.cubin_path)
        b->options.cubin_path = getenv("MK_CUBIN_PATH");
    rc = gen_model_read(where, &b->model, err);
    if (rc == 0 && (context < 1 || context > b->model.max_context))
        rc = gen_fail(err, MK_EINVAL, "a context of %d tokens; %s can have 1 to %d", context,
                      b->model.name, b->model.max_context);
    if (rc == 0)
        rc = open_all(b, where, context, err);
    if (rc == 0)
        rc = first_token(b, err);
    if (rc)
        rt_bench_close(b);
    else
        *out = b;
    return rc;
}

static int prefill(struct rt_bench *b, int from, int n, struct mk_err *err)
{
    int done;

    return n > 0 ? rt_session_prefill(b->session, b->tokens + from, n, from, &done, err) : 0;
}

int rt_bench_fill_kv(struct rt_bench *b, int n, struct mk_err *err)
{
    int rc;

    if (n < 0 || n > b->plan->context)
        return gen_fail(err, MK_EINVAL, "%d tokens do not fit a context of %d", n,
                        b->plan->context);
    if (n <= b->filled)
        return 0;
    b->ran.kind = RAN_NOTHING;
    rc = prefill(b, b->filled, n - b->filled, err);
    if (rc == 0)
        b->filled = n;
    return rc;
}

/* One run of KIND: decode of N tokens from POS, or prefill of N tokens and the token that
   follows.  What it chose goes to TO, its wall-clock time to *MS. */
static int run_once(struct rt_bench *b, int kind, int pos, int n, int32_t *to, int *clock_mhz,
                    double *ms, struct mk_err *err)
{
    const double start = now_ms();
    struct taker t = {.b = b, .to = to, .n = n, .clock_mhz = clock_mhz};
    int rc;

    if (kind == RAN_DECODE) {
        rc = decode(&t, b->tokens[pos], pos, NULL, NULL, err);
    } else {
        t.n = 1;
        rc = prefill(b, 0, n - 1, err);
        if (rc == 0)
            rc = decode(&t, b->tokens[n - 1], n - 1, NULL, NULL, err);
    }
    *ms = t.end_ms - start;
    return rc;
}

/* Remember the first run's tokens, and where another run chose otherwise. */
static void note_run(struct ran *ran, int run, const int32_t *chosen, int count)
{
    if (run == 0)
        memcpy(ran->chosen, chosen, (size_t)count * sizeof *chosen);
    for (int i = 0; i < count && !ran->differs; i++)
        if (chosen[i] != ran->chosen[i]) {
            ran->differs = 1 + i;
            ran->differs_run = run;
        }
}

/* A run that is not timed, RUN->runs that are, and one more for the clock: to ask for it takes
   about as long as a token. */
static int run_all(struct rt_bench *b, int kind, int pos, int n, struct rt_bench_run *run,
                   struct mk_err *err)
{
    const int count = kind == RAN_DECODE ? n : 1;   /* tokens that it chooses */
    int32_t *chosen = malloc((size_t)count * sizeof *chosen);
    double ms;
    int rc = 0;

    if (!chosen)
        return gen_fail(err, MK_ENOMEM, "no memory for %d tokens", count);
    b->quiet = 1;
    for (int i = 0; rc == 0 && i < run->runs + 2; i++) {
        const int last = i == run->runs + 1;
        rc = run_once(b, kind, pos, n, chosen, last ? &run->clock_mhz : NULL, &ms, err);
        if (rc == 0)
            note_run(&b->ran, i, chosen, count);
        if (rc == 0 && i > 0 && !last)
            run->ms[i - 1] = (float)(ms / count);
    }
    b->quiet = 0;
    free(chosen);
    return rc;
}

int rt_bench_decode(struct rt_bench *b, int pos, int n, struct rt_bench_run *run,
                    struct mk_err *err)
{
    struct ran *ran = &b->ran;
    int rc;

    run->clock_mhz = 0;
    if (pos < 0 || n < 1 || n > b->plan->context - pos)
        return gen_fail(err, MK_EINVAL, "%d tokens at position %d do not fit a context of %d", n,
                        pos, b->plan->context);
    if (pos > b->filled)
        return gen_fail(err, MK_EINVAL, "decode at position %d: only %d rows are filled", pos,
                        b->filled);
    b->filled = pos;
    ran->kind = RAN_NOTHING;
    ran->differs = 0;
    rc = run_all(b, RAN_DECODE, pos, n, run, err);
    if (rc)
        return rc;
    ran->kind = RAN_DECODE;
    ran->pos = pos;
    ran->n = n;
    ran->input[0] = b->tokens[pos];
    memcpy(ran->input + 1, ran->chosen, (size_t)(n - 1) * sizeof *ran->input);
    return 0;
}

int rt_bench_prefill(struct rt_bench *b, int n, struct rt_bench_run *run, struct mk_err *err)
{
    struct ran *ran = &b->ran;
    int rc;

    run->clock_mhz = 0;
    if (n < 1 || n > b->plan->context)
        return gen_fail(err, MK_EINVAL, "%d tokens do not fit a context of %d", n,
                        b->plan->context);
    b->filled = 0;
    ran->kind = RAN_NOTHING;
    ran->differs = 0;
    rc = run_all(b, RAN_PREFILL, 0, n, run, err);
    if (rc)
        return rc;
    b->filled = n;
    ran->kind = RAN_PREFILL;
    ran->pos = 0;
    ran->n = n;
    memcpy(ran->input, b->tokens, (size_t)n * sizeof *ran->input);
    ran->chosen[n - 1] = ran->chosen[0];
    return 0;
}

/* Add up LAPS over the CTAs whose group has heads or has none, per CTA and token. */
static void sum_laps(const struct gen_plan *p, const uint64_t *laps, int n, struct rt_bench_stage *out)
{
    int ctas[2] = {0, 0};

    for (int cta = 0; cta < p->ctas; cta++)
        ctas[!gen_plan_class(p, cta / p->group)->heads]++;
    for (int cta = 0; cta < p->ctas; cta++) {
        const int kind = !gen_plan_class(p, cta / p->group)->heads;
        for (int i = 0; i < MK_LAP_COUNT; i++, laps += 2) {
            out[i].cycles[kind] += (double)laps[0] / n / ctas[kind];
            out[i].waited[kind] += (double)laps[1] / n / ctas[kind];
        }
    }
}

int rt_bench_stages(struct rt_bench *b, int pos, int n, struct rt_bench_stage *out,
                    struct gen_prediction *predicted, struct mk_err *err)
{
    uint64_t *laps = malloc((size_t)b->plan->ctas * MK_LAP_COUNT * 2 * sizeof *laps);
    int32_t *chosen = malloc((size_t)n * sizeof *chosen);
    double ms;
    int rc = laps && chosen ? 0 : gen_fail(err, MK_ENOMEM, "no memory for the stages' times");

    for (int i = 0; i < MK_LAP_COUNT; i++)
        out[i] = (struct rt_bench_stage){
            .name = gen_stage_name(i), .per_layer = gen_stage_is_layer(i)
        };
    gen_predict(b->plan, pos + n / 2, predicted);
    if (rc == 0)
        rc = rt_session_laps(b->session, laps, err);
    if (rc == 0)
        rc = run_once(b, RAN_DECODE, pos, n, chosen, NULL, &ms, err);
    if (rc == 0)
        rc = rt_session_laps(b->session, laps, err);
    if (rc == 0)
        sum_laps(b->plan, laps, n, out);
    free(laps);
    free(chosen);
    return rc;
}

/* ---- Checks: what is compared ------------------------------------------------ */

/* What a check has seen.  Steps as in struct ran. */
struct tally {
    int steps;                  /* compared */
    float error;                /* largest |logit - oracle|; INFINITY for NaN */
    int error_step;
    float scale;                /* smallest over the steps of the oracle's largest |logit| */
    float gap;                  /* furthest that a chosen token is below the oracle's maximum */
    int gap_step, gap_choice;
    float row_error;            /* largest RMS error of a KV row over the RMS of its head's rows */
    int row_pos, row_layer, row_head, row_which;
    int rerun_step;             /* 1 + the step that chose otherwise when run again; 0: none */
};

struct check {
    struct rt_bench *b;
    const struct ran *ran;
    struct tally tally;
    uint16_t *words;            /* KV rows of one head, from the device: [n][E] */
    float *oracle;              /* [MOST_CHECKED][V] logits */
    float *device;              /* the same */
};

/* The largest difference that is allowed, as a fraction of the largest |logit|, and of the RMS of
   the KV rows.  What the kernels do and the oracle does not is to round activations - norms, q,
   the softmax's numerators, attention and MLP products - to the resident type.  A simulation of
   just that (float, random weights of sigma 0.02, bf16, 10 to 200 positions) had these worst cases:

       D      L    logits   KV rows
       256    3    0.006    0.008     toy-qwen3
       576    30   0.008    0.010     smollm2-135m
       896    24   0.011    0.014     qwen2.5-0.5b
       1024   28   0.008    0.012     qwen3-0.6b
       1536   28   0.024    0.021     qwen2.5-1.5b
       2048   16   0.018    0.023     llama-3.2-1b
       2560   36   0.023    0.025     qwen3-4b
       3072   28   0.025    0.027     llama-3.2-3b
       3584   28   0.035    0.043     qwen2.5-7b
       4096   32   0.044    0.041     llama-3.1-8b
       4096   36   0.035    0.034     qwen3-8b

   Wide random models amplify more: their sums have sigma 0.02 sqrt(D).  The line below is two to
   three times these figures; rows one position off show as 0.14 in toy-qwen3, a wrong element of
   a row as 0.1.  fp16 has three bits more: the simulation gave an eighth (toy-qwen3: a sixth); a
   fifth leaves room for float sums in another order. */
static float allowed(const struct rt_bench *b)
{
    const float bf16 = 0.012f + 2e-5f * (float)b->model.D;

    return b->plan->dtype == GEN_FP16 ? bf16 / 5 : bf16;
}

static float to_float(const struct rt_bench *b, uint16_t word)
{
    return b->plan->dtype == GEN_FP16 ? rt_from_fp16(word) : rt_from_bf16(word);
}

/* Compare the device's KV rows of N positions from POS on, in c->words, with the oracle's. */
static void compare_rows(struct check *c, int layer, int head, int which, int pos, int n)
{
    const int E = c->b->model.E;
    double squares = 0;
    float rms;

    for (int t = 0; t < n; t++) {
        const float *row = rt_cpu_kv(c->b->oracle, layer, head, pos + t, which);
        for (int e = 0; e < E; e++)
            squares += (double)row[e] * (double)row[e];
    }
    rms = sqrtf((float)(squares / n / E));
    for (int t = 0; t < n; t++) {
        const float *row = rt_cpu_kv(c->b->oracle, layer, head, pos + t, which);
        const uint16_t *words = c->words + (size_t)t * (size_t)E;
        float error = 0;
        for (int e = 0; e < E; e++) {
            const float off = to_float(c->b, words[e]) - row[e];
            error += off * off;
        }
        error = error == 0 ? 0 : sqrtf(error / (float)E) / rms;
        if (!(error <= c->tally.row_error)) {
            c->tally.row_error = isnan(error) ? INFINITY : error;
            c->tally.row_pos = pos + t;
            c->tally.row_layer = layer;
            c->tally.row_head = head;
            c->tally.row_which = which;
        }
    }
}

static void take_rows(struct check *c, int layer, int head, int which, int pos, int n)
{
    float *row = rt_cpu_kv(c->b->oracle, layer, head, pos, which);
    const size_t count = (size_t)n * (size_t)c->b->model.E;

    for (size_t i = 0; i < count; i++)
        row[i] = to_float(c->b, c->words[i]);
}

/* For every layer and head: give the device's KV rows of N positions from POS on to USE. */
static int each_rows(struct check *c, int pos, int n,
                     void (*use)(struct check *, int layer, int head, int which, int pos, int n),
                     struct mk_err *err)
{
    const struct gen_model *m = &c->b->model;

    for (int i = 0; n > 0 && i < m->L * m->K * 2; i++) {
        const int layer = i / (m->K * 2), head = i / 2 % m->K, which = i % 2;
        const int rc = rt_session_kv_get(c->b->session, layer, head, which, pos, n, c->words, err);
        if (rc)
            return rc;
        use(c, layer, head, which, pos, n);
    }
    return 0;
}

/* The oracle's logits of N steps from step FIRST on, to LOGITS; and its KV rows against those that
   the timed run left.  The rows before FIRST are in the oracle. */
static int oracle_steps(struct check *c, int first, int n, float *logits, struct mk_err *err)
{
    const struct ran *ran = c->ran;
    const int pos = ran->pos + first;
    int rc = rt_cpu_run(c->b->oracle, ran->input + first, n, pos, logits, 1, NULL, err);

    return rc ? rc : each_rows(c, pos, n, compare_rows, err);
}

/* Compare the logits of one step. */
static void compare_logits(struct tally *t, int step, int chosen, const float *device,
                           const float *oracle, int V)
{
    float scale = 0, gap;
    int best = 0;

    for (int i = 0; i < V; i++) {
        const float error = fabsf(device[i] - oracle[i]);
        if (!(error <= t->error)) {
            t->error = isnan(error) ? INFINITY : error;
            t->error_step = step;
        }
        if (oracle[i] > oracle[best])
            best = i;
        if (fabsf(oracle[i]) > scale)
            scale = fabsf(oracle[i]);
    }
    gap = oracle[best] - oracle[chosen];
    if (gap > t->gap) {
        t->gap = gap;
        t->gap_step = step;
        t->gap_choice = best;
    }
    if (t->steps == 0 || scale < t->scale)
        t->scale = scale;
    t->steps++;
}

/* Run N steps from step FIRST on again on the device, for their logits, and compare. */
static int device_steps(struct check *c, int first, int n, const float *oracle, struct mk_err *err)
{
    const struct ran *ran = c->ran;
    const int V = c->b->model.V;
    int32_t chosen[MOST_CHECKED];
    struct taker t = {.b = c->b, .to = chosen, .n = n};
    int rc = decode(&t, ran->input[first], ran->pos + first, ran->input + first, c->device, err);

    if (rc)
        return rc;
    for (int i = 0; i < n; i++) {
        const size_t at = (size_t)i * (size_t)V;
        const int32_t then = ran->chosen[first + i];
        if (chosen[i] != then && !c->tally.rerun_step)
            c->tally.rerun_step = 1 + first + i;
        compare_logits(&c->tally, first + i, then, c->device + at, oracle + at, V);
    }
    return 0;
}

/* ---- Checks: in which order ---------------------------------------------------- */

/* An oracle with room for N positions. */
static int make_oracle(struct rt_bench *b, int n, struct mk_err *err)
{
    int context = b->plan->context < ORACLE_CONTEXT ? b->plan->context : ORACLE_CONTEXT;

    if (b->oracle && b->oracle_context >= n)
        return 0;
    rt_cpu_free(b->oracle);
    b->oracle = NULL;
    context = context > n ? context : n;
    b->oracle_context = context;
    return rt_cpu_make(&b->model, b->weights, b->plan->dtype, 1, context, 0, &b->oracle, err);
}

static int check_open(struct check *c, struct rt_bench *b, struct mk_err *err)
{
    const size_t end = (size_t)(b->ran.pos + b->ran.n), V = (size_t)b->model.V;

    memset(c, 0, sizeof *c);
    c->b = b;
    c->ran = &b->ran;
    c->words = malloc(end * (size_t)b->model.E * sizeof *c->words);
    c->oracle = malloc(MOST_CHECKED * V * sizeof *c->oracle);
    c->device = malloc(MOST_CHECKED * V * sizeof *c->device);
    if (!c->words || !c->oracle || !c->device)
        return gen_fail(err, MK_ENOMEM, "no memory to check %d tokens", b->ran.n);
    return make_oracle(b, (int)end, err);
}

static void check_close(struct check *c)
{
    free(c->words);
    free(c->oracle);
    free(c->device);
}

/* The steps of both ends: FIRST from the start, LAST from step n - LAST on. */
static void ends(const struct ran *ran, int *first, int *last)
{
    *first = ran->n < MOST_CHECKED ? ran->n : EDGE;
    *last = ran->n < MOST_CHECKED ? 0 : EDGE;
}

/* The oracle goes over both ends.  All before the device runs anything again: the rows that it
   is given and compared with are those of the timed run. */
static int oracle_ends(struct check *c, struct mk_err *err)
{
    const struct ran *ran = c->ran;
    int first, last, rc;

    ends(ran, &first, &last);
    rc = each_rows(c, 0, ran->pos, take_rows, err);
    if (rc == 0)
        rc = oracle_steps(c, 0, first, c->oracle, err);
    if (rc || !last)
        return rc;
    rc = each_rows(c, ran->pos, ran->n - last, take_rows, err);
    if (rc)
        return rc;
    return oracle_steps(c, ran->n - last, last,
                        c->oracle + (size_t)first * (size_t)c->b->model.V, err);
}

/* The device's logits: of all steps that the oracle went over; of a prefill, the last. */
static int device_ends(struct check *c, struct mk_err *err)
{
    const struct ran *ran = c->ran;
    const size_t V = (size_t)c->b->model.V;
    int first, last, rc;

    ends(ran, &first, &last);
    if (ran->kind == RAN_PREFILL)
        return device_steps(c, ran->n - 1, 1, c->oracle + (size_t)(first + last - 1) * V, err);
    rc = device_steps(c, 0, first, c->oracle, err);
    if (rc == 0 && last)
        rc = device_steps(c, ran->n - last, last, c->oracle + (size_t)first * V, err);
    return rc;
}

/* ---- Checks: the verdict --------------------------------------------------------- */

__attribute__((format(printf, 2, 3)))
static void wrong(struct rt_bench_verdict *v, const char *fmt, ...)
{
    va_list args;

    v->correct = 0;
    va_start(args, fmt);
    vsnprintf(v->text, sizeof v->text, fmt, args);
    va_end(args);
}

/* Faults that show without an oracle. */
static int look_at_tokens(const struct rt_bench *b, struct rt_bench_verdict *v)
{
    const struct ran *ran = &b->ran;

    if (ran->differs) {
        const int at = ran->kind == RAN_DECODE ? ran->pos + ran->differs - 1 : ran->n - 1;
        wrong(v, "run %d chose another token at position %d than the first", ran->differs_run + 1,
              at);
    }
    for (int i = ran->kind == RAN_DECODE ? 0 : ran->n - 1; i < ran->n && v->correct; i++)
        if (ran->chosen[i] < 0 || ran->chosen[i] >= b->model.V)
            wrong(v, "the token chosen at position %d is %d, which is not in 0 .. %d", ran->pos + i,
                  (int)ran->chosen[i], b->model.V - 1);
    return v->correct;
}

static void judge(const struct check *c, struct rt_bench_verdict *v)
{
    const struct tally *t = &c->tally;
    const int pos = c->ran->pos;
    const float part = allowed(c->b);

    v->checked = t->steps;
    v->max_error = t->error;
    v->tolerance = part * t->scale;
    if (!(t->error <= v->tolerance && v->tolerance < INFINITY))
        wrong(v, "a logit at position %d is %.3g from the C reference's; %.3g is allowed",
              pos + t->error_step, (double)t->error, (double)v->tolerance);
    else if (!(t->gap <= v->tolerance))
        wrong(v, "the token chosen at position %d is %d, whose logit in the C reference is %.3g "
              "below that of %d; %.3g is allowed", pos + t->gap_step,
              (int)c->ran->chosen[t->gap_step], (double)t->gap, t->gap_choice,
              (double)v->tolerance);
    else if (!(t->row_error <= part))
        wrong(v, "the %s of position %d, layer %d, KV head %d are %.3g %% from the C reference's; "
              "%.3g %% is allowed", t->row_which ? "values" : "keys", t->row_pos, t->row_layer,
              t->row_head, 100 * (double)t->row_error, 100 * (double)part);
    else if (t->rerun_step)
        wrong(v, "at position %d the same kernel, run again for its logits, chose another token",
              pos + t->rerun_step - 1);
    else
        snprintf(v->text, sizeof v->text, "logits within %.3g of the C reference (%.3g allowed), "
                 "KV rows within %.2g %% (%.2g %% allowed)", (double)t->error,
                 (double)v->tolerance, 100 * (double)t->row_error, 100 * (double)part);
}

static int check_run(struct rt_bench *b, int kind, struct rt_bench_verdict *out, struct mk_err *err)
{
    struct check c;
    int rc, first, last;

    memset(out, 0, sizeof *out);
    if (b->ran.kind != kind)
        return gen_fail(err, MK_EINVAL, "there is no %s run to check",
                        kind == RAN_DECODE ? "decode" : "prefill");
    out->correct = 1;
    if (!look_at_tokens(b, out))
        return 0;
    rc = check_open(&c, b, err);
    if (rc == 0)
        rc = oracle_ends(&c, err);
    if (rc == 0)
        rc = device_ends(&c, err);
    if (rc == 0)
        judge(&c, out);
    check_close(&c);
    ends(&b->ran, &first, &last);
    if (rc)
        memset(out, 0, sizeof *out);
    else if (kind == RAN_PREFILL)
        out->checked = first + last;
    return rc;
}

int rt_bench_check_decode(struct rt_bench *b, struct rt_bench_verdict *out, struct mk_err *err)
{
    return check_run(b, RAN_DECODE, out, err);
}

int rt_bench_check_prefill(struct rt_bench *b, struct rt_bench_verdict *out, struct mk_err *err)
{
    return check_run(b, RAN_PREFILL, out, err);
}

/* ---- Checks: against another kernel ------------------------------------------------ */

/* Run the N steps of the last decode again, on the tokens that CHOSEN says; what is chosen then goes to
   AGAIN. */
static int run_again(struct rt_bench *b, const int32_t *chosen, int32_t *again, float *logits,
                     struct mk_err *err)
{
    const struct ran *ran = &b->ran;
    int32_t *input = malloc((size_t)ran->n * sizeof *input);
    struct taker t = {.b = b, .to = again, .n = ran->n};
    int rc;

    if (!input)
        return gen_fail(err, MK_ENOMEM, "no memory for %d tokens", ran->n);
    input[0] = ran->input[0];
    memcpy(input + 1, chosen, (size_t)(ran->n - 1) * sizeof *input);
    rc = decode(&t, input[0], ran->pos, input, logits, err);
    free(input);
    return rc;
}

int rt_bench_output(struct rt_bench *b, struct rt_bench_output *out, struct mk_err *err)
{
    const struct ran *ran = &b->ran;
    int32_t *again;
    int rc;

    if (ran->kind != RAN_DECODE || out->n != ran->n)
        return gen_fail(err, MK_EINVAL, "there is no decode of %d tokens", out->n);
    again = malloc((size_t)ran->n * sizeof *again);
    if (!again)
        return gen_fail(err, MK_ENOMEM, "no memory for %d tokens", ran->n);
    out->pos = ran->pos;
    memcpy(out->chosen, ran->chosen, (size_t)ran->n * sizeof *out->chosen);
    rc = run_again(b, out->chosen, again, out->logits, err);
    free(again);
    return rc;
}

/* Where the timed run first chose otherwise than WANT, and how far below WANT's choice that is. */
static void compare_choices(struct tally *t, const struct ran *ran, const struct rt_bench_output *want,
                            int V)
{
    int i = 0;
    float gap;

    while (i < ran->n && ran->chosen[i] == want->chosen[i])
        i++;
    if (i == ran->n)
        return;
    gap = want->logits[(size_t)i * (size_t)V + (size_t)want->chosen[i]] -
          want->logits[(size_t)i * (size_t)V + (size_t)ran->chosen[i]];
    if (!(gap <= t->gap)) {
        t->gap = isnan(gap) ? INFINITY : gap;
        t->gap_step = i;
        t->gap_choice = want->chosen[i];
    }
}

static void judge_output(const struct rt_bench *b, const struct tally *t, struct rt_bench_verdict *v)
{
    const int pos = b->ran.pos;

    v->checked = t->steps;
    v->max_error = t->error;
    v->tolerance = allowed(b) * t->scale;
    if (!(t->error <= v->tolerance && v->tolerance < INFINITY))
        wrong(v, "a logit at position %d is %.3g from the other kernel's; %.3g is allowed",
              pos + t->error_step, (double)t->error, (double)v->tolerance);
    else if (!(t->gap <= v->tolerance))
        wrong(v, "the token chosen at position %d has a logit in the other kernel %.3g below that of "
              "%d; %.3g is allowed", pos + t->gap_step, (double)t->gap, t->gap_choice,
              (double)v->tolerance);
    else
        snprintf(v->text, sizeof v->text, "logits within %.3g of the other kernel's (%.3g allowed)",
                 (double)t->error, (double)v->tolerance);
}

int rt_bench_check_output(struct rt_bench *b, const struct rt_bench_output *want,
                          struct rt_bench_verdict *out, struct mk_err *err)
{
    const struct ran *ran = &b->ran;
    const size_t n = (size_t)ran->n, V = (size_t)b->model.V;
    struct tally tally = {0};
    int32_t *again = NULL;
    float *logits = NULL;
    int rc;

    memset(out, 0, sizeof *out);
    if (ran->kind != RAN_DECODE || want->n != ran->n || want->pos != ran->pos)
        return gen_fail(err, MK_EINVAL, "there is no decode of %d tokens at position %d", want->n,
                        want->pos);
    out->correct = 1;
    if (!look_at_tokens(b, out))
        return 0;
    again = malloc(n * sizeof *again);
    logits = malloc(n * V * sizeof *logits);
    rc = again && logits ? run_again(b, want->chosen, again, logits, err)
                         : gen_fail(err, MK_ENOMEM, "no memory for the logits of %zu tokens", n);
    for (size_t i = 0; rc == 0 && i < n; i++)
        compare_logits(&tally, (int)i, again[i], logits + i * V, want->logits + i * V, (int)V);
    if (rc == 0) {
        compare_choices(&tally, ran, want, (int)V);
        judge_output(b, &tally, out);
    }
    free(again);
    free(logits);
    return rc;
}
