/* bench.c - see bench.h: a model is opened, and its kernels are timed. */
#include "config.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "runtime/abi.h"
#include "runtime/bandwidth.h"
#include "runtime/bench.h"
#include "runtime/cpu.h"
#include "runtime/engine.h"
#include "runtime/sample.h"
#include "runtime/timed.h"

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
    out->plan_source = rt_session_plan_source(b->session);
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

int rt_bench_repeat(struct rt_bench *b, int pos, int n, const int32_t *input, int32_t *chosen,
                    float *logits, struct mk_err *err)
{
    struct taker t = {.b = b, .to = chosen, .n = n};

    return decode(&t, input[0], pos, input, logits, err);
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
    b->ran.kind = RT_RAN_NOTHING;
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

    if (kind == RT_RAN_DECODE) {
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
static void note_run(struct rt_ran *ran, int run, const int32_t *chosen, int count)
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
    const int count = kind == RT_RAN_DECODE ? n : 1;   /* tokens that it chooses */
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
    struct rt_ran *ran = &b->ran;
    int rc;

    run->clock_mhz = 0;
    if (pos < 0 || n < 1 || n > b->plan->context - pos)
        return gen_fail(err, MK_EINVAL, "%d tokens at position %d do not fit a context of %d", n,
                        pos, b->plan->context);
    if (pos > b->filled)
        return gen_fail(err, MK_EINVAL, "decode at position %d: only %d rows are filled", pos,
                        b->filled);
    b->filled = pos;
    ran->kind = RT_RAN_NOTHING;
    ran->differs = 0;
    rc = run_all(b, RT_RAN_DECODE, pos, n, run, err);
    if (rc)
        return rc;
    ran->kind = RT_RAN_DECODE;
    ran->pos = pos;
    ran->n = n;
    ran->input[0] = b->tokens[pos];
    memcpy(ran->input + 1, ran->chosen, (size_t)(n - 1) * sizeof *ran->input);
    return 0;
}

int rt_bench_prefill(struct rt_bench *b, int n, struct rt_bench_run *run, struct mk_err *err)
{
    struct rt_ran *ran = &b->ran;
    int rc;

    run->clock_mhz = 0;
    if (n < 1 || n > b->plan->context)
        return gen_fail(err, MK_EINVAL, "%d tokens do not fit a context of %d", n,
                        b->plan->context);
    b->filled = 0;
    ran->kind = RT_RAN_NOTHING;
    ran->differs = 0;
    rc = run_all(b, RT_RAN_PREFILL, 0, n, run, err);
    if (rc)
        return rc;
    b->filled = n;
    ran->kind = RT_RAN_PREFILL;
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
    gen_predict(b->plan, pos < b->plan->team_from ? pos : pos + n / 2, predicted); /* a launch is near or far */
    if (rc == 0)
        rc = rt_session_laps(b->session, laps, err);
    if (rc == 0)
        rc = run_once(b, RT_RAN_DECODE, pos, n, chosen, NULL, &ms, err);
    if (rc == 0)
        rc = rt_session_laps(b->session, laps, err);
    if (rc == 0)
        sum_laps(b->plan, laps, n, out);
    free(laps);
    free(chosen);
    return rc;
}
