/* t-engine.c - the emitted kernels on the GPU against the oracle (cpu.h), for every family at toy size
   and with plans that reach every path.  Exit 77 without a GPU. */
#include "config.h"

#include <stdint.h>
#include <unistd.h>

#include "runtime/abi.h"
#include "runtime/cpu.h"
#include "runtime/engine.h"
#include "runtime/sample.h"
#include "tests/check.h"

enum { CONTEXT = 512, STEPS = 96 };

struct world {
    const char *name;
    struct gen_model model;
    struct rt_weights *weights;
    struct rt_engine *engine;
    struct rt_session *session;
    struct rt_cpu *cpu;
    int32_t tokens[CONTEXT];
    float *want, *got; /* [STEPS][V] */
};

static char set_text[8][64];
static const char *set_list[9];

/* "a=1 b=2" as a list for --set. */
static const char *const *split_settings(const char *settings)
{
    int n = 0, used;

    while (n < 8 && sscanf(settings, "%63s%n", set_text[n], &used) == 1) {
        set_list[n] = set_text[n];
        settings += used;
        n++;
    }
    set_list[n] = NULL;
    return set_list;
}

static void world_close(struct world *w)
{
    rt_session_free(w->session);
    rt_engine_close(w->engine);
    rt_cpu_free(w->cpu);
    rt_weights_close(w->weights);
    free(w->want);
    free(w->got);
}

static int world_open(struct world *w, const char *name, const char *settings)
{
    const char *srcdir = getenv("srcdir");
    struct rt_engine_options options = {.set = split_settings(settings)};
    struct mk_err err = {0};
    char path[4096];
    int rc;

    memset(w, 0, sizeof *w);
    w->name = name;
    snprintf(path, sizeof path, "%s/toy/%s", srcdir ? srcdir : ".", name);
    rc = gen_model_read(path, &w->model, &err);
    if (rc == 0)
        rc = rt_weights_random(&w->model, 7, &w->weights, &err);
    if (rc == 0)
        rc = rt_engine_open(&w->model, w->weights, &options, &w->engine, &err);
    if (rc == 0)
        rc = rt_session_make(w->engine, CONTEXT, &w->session, &err);
    if (rc == 0)
        rc = rt_cpu_make(&w->model, w->weights, rt_session_plan(w->session)->dtype, 1, CONTEXT, 0,
                         &w->cpu, &err);
    CHECKF(rc == 0, "%s %s: %s", name, settings, err.text);
    for (int i = 0; i < CONTEXT; i++)
        w->tokens[i] = (int32_t) (rt_sample_hash(3, (uint32_t) i, 0) % (uint64_t) w->model.V);
    w->want = calloc((size_t) STEPS * (size_t) w->model.V, sizeof *w->want);
    w->got = calloc((size_t) STEPS * (size_t) w->model.V, sizeof *w->got);
    return rc;
}

/* Every KV row of every layer becomes NaN. */
static void poison(struct world *w)
{
    static uint16_t nan_rows[CONTEXT * 128];
    struct mk_err err;
    int rc = 0;

    for (size_t i = 0; i < sizeof nan_rows / sizeof *nan_rows; i++)
        nan_rows[i] = 0x7fff; /* NaN in bf16 and in fp16 */
    for (int layer = 0; layer < w->model.L; layer++)
        for (int head = 0; head < w->model.K; head++)
            for (int which = 0; which < 2; which++)
                rc |= rt_session_kv_put(w->session, layer, head, which, 0, CONTEXT, nan_rows, &err);
    CHECK(rc == 0);
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
    const size_t n = (size_t) STEPS * (size_t) w->model.V;
    float *again = calloc(n, sizeof *again);
    struct difference d;
    struct mk_err err;

    poison(w);
    CHECK(rt_cpu_run(w->cpu, w->tokens, STEPS, 0, w->want, 1, NULL, &err) == 0);
    if (device_logits(w, 0, STEPS, w->got) == 0) {
        d = compare(w->got, w->want, STEPS, w->model.V);
        printf("%s: decode: error %.4f of the logits' rms, KL %.2e\n", w->name, d.max, d.kl);
        CHECKF(d.max < 0.08 && d.kl < 1e-3 && !d.wrong, "%s: decode: error %g, KL %g, %d wrong",
               w->name, d.max, d.kl, d.wrong);
        device_logits(w, 0, STEPS, again);
        CHECKF(!memcmp(w->got, again, n * sizeof *again), "%s: a second run has other bits",
               w->name);
    }
    free(again);
}

/* Prefill of n tokens and one step against the oracle, for lengths around the tiles' edges, in
   one piece and continued. */
static void test_prefill(struct world *w)
{
    static const int lengths[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 95};
    float *logits = calloc((size_t) w->model.V, sizeof *logits);
    struct mk_err err = {0};
    double worst = 0;
    int done, rc;

    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        const int n = lengths[i], first = n / 3;
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
    float *logits = calloc((size_t) w->model.V, sizeof *logits),
          *want = calloc((size_t) w->model.V, sizeof *want);
    struct mk_err err = {0};
    struct difference d;
    int done, rc;

    poison(w);
    CHECK(rt_cpu_run(w->cpu, w->tokens, CONTEXT, 0, want, 0, NULL, &err) == 0);
    rc = rt_session_prefill(w->session, w->tokens, CONTEXT - 1, 0, &done, &err);
    CHECKF(rc == 0 && done == CONTEXT - 1, "%s: full: %s", w->name, err.text);
    if (rc == 0 && device_logits(w, CONTEXT - 1, 1, logits) == 0) {
        d = compare(logits, want, 1, w->model.V);
        CHECKF(d.max < 0.08 && d.kl < 1e-3 && !d.wrong, "%s: last position: error %g, KL %g",
               w->name, d.max, d.kl);
        /* and the rows in between, in decode steps over a split context */
        device_logits(w, CONTEXT - 40, 40, w->got);
        d = compare(w->got + 39 * (size_t) w->model.V, want, 1, w->model.V);
        CHECKF(d.max < 0.08 && d.kl < 1e-3, "%s: last position after steps: error %g, KL %g",
               w->name, d.max, d.kl);
    }
    free(logits);
    free(want);
}

struct taken {
    int32_t token[STEPS];
    int n, stop_after;
};

static int take(void *user, int32_t token)
{
    struct taken *t = user;

    t->token[t->n++] = token;
    return t->n == t->stop_after;
}

/* The device chooses what rt_sample chooses from the same logits. */
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
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        const struct mk_sampling *s = &kinds[k];
        struct taken taken = {.n = 0};
        struct mk_err err = {0};
        struct rt_decode job = {
            .token = w->tokens[0],
            .n = 40,
            .temperature = s->temperature,
            .top_k = s->top_k,
            .top_p = s->top_p,
            .seed = s->seed,
            .token_fn = take,
            .user = &taken,
            .logits = w->got,
        };
        int done, same = 0, rc = rt_session_decode(w->session, &job, &done, &err);
        CHECKF(rc == 0 && done == 40, "%s: sampling %zu: %d done, %s", w->name, k, done, err.text);
        for (int i = 0; i < done; i++)
            same += rt_sample(w->got + (size_t) i * (size_t) w->model.V, w->model.V, s, i + 1) ==
                    taken.token[i];
        CHECKF(same >= done - (s->temperature > 0),
               "%s: sampling %zu: %d of %d tokens as rt_sample", w->name, k, same, done);
        if (rc)
            return;
    }
}

/* Stop ids, a callback that stops, cancel, and the run that follows each. */
static void test_stopping(struct world *w)
{
    struct taken all = {.n = 0}, some = {.n = 0}, rest = {.n = 0};
    struct rt_decode job = {
        .token = w->tokens[0], .n = 40, .top_p = 1, .token_fn = take, .user = &all};
    struct mk_err err = {0};
    int32_t stop;
    int done, first;

    CHECK(rt_session_decode(w->session, &job, &done, &err) == 0 && done == 40);
    stop = all.token[20];
    for (first = 0; all.token[first] != stop; first++)
        ;
    job.user = &some, job.stop = &stop, job.n_stop = 1;
    CHECK(rt_session_decode(w->session, &job, &done, &err) == 0);
    CHECKF(done == first + 1, "%s: stopped after %d, not %d", w->name, done, first + 1);
    job.n_stop = 0, some.n = 0, some.stop_after = 5;
    CHECK(rt_session_decode(w->session, &job, &done, &err) == 0 && done == 5);
    rt_session_cancel(w->session);
    CHECK(rt_session_decode(w->session, &job, &done, &err) == MK_ECANCELED && done == 0);
    CHECK(rt_session_cancelled(w->session) == 1 && rt_session_cancelled(w->session) == 0);
    job.user = &rest;
    CHECK(rt_session_decode(w->session, &job, &done, &err) == 0 && done == 40);
    CHECK(!memcmp(all.token, rest.token, 40 * sizeof(int32_t)));
}

/* A CTA that never answers: an error that says so, within seconds. */
static void test_hang(void)
{
    struct world w;
    struct mk_err err = {0};
    struct rt_decode job = {.n = 4};
    int done;

    if (world_open(&w, "toy-qwen3", "fault=hang") == 0) {
        job.token = w.tokens[0];
        CHECK(rt_session_decode(w.session, &job, &done, &err) == MK_EDEVICE);
        CHECKF(strstr(err.text, "made no progress: CTA") && strstr(err.text, "hop"), "hang: %s",
               err.text);
        printf("hang: %s\n", err.text);
        CHECK(rt_session_decode(w.session, &job, &done, &err) == MK_EDEVICE);
        CHECK_STR(err.text, "the GPU failed in an earlier call; close the model");
    }
    world_close(&w);
}

static void test_world(const char *name, const char *settings)
{
    struct world w;

    printf("%s %s\n", name, settings);
    fflush(stdout);
    if (world_open(&w, name, settings) == 0) {
        test_decode(&w);
        test_prefill(&w);
        test_full(&w);
        test_sampling(&w);
        test_stopping(&w);
    }
    world_close(&w);
}

int main(int argc, char **argv)
{
    static const char *const worlds[][2] = {
        {"toy-qwen3", ""},
        {"toy-qwen3", "unroll_layers=loop tokens_per_launch=7 split_min=5"},
        {"toy-qwen3-e128", "split_min=16"},
        {"toy-qwen2", ""},
        {"toy-llama", "chunk_bytes=1024 stages=3 inflight=2"},
        {"toy-smol", "ctas=3 split_min=9"},
        {"toy-qwen3", "dtype=fp16 ctas=5 round_blocks=2 warps=5 prefill_tokens=32"},
        {"toy-llama", "ctas=1 head_group=1"},
    };
    struct rt_device *d;
    struct mk_err err;

    if (rt_device_open("gpu", 0, &d, &err))
        SKIP("%s", err.text);
    rt_device_close(d);
    if (argc > 2) {
        test_world(argv[1], argv[2]);
        return check_done();
    }
    for (size_t i = 0; i < sizeof worlds / sizeof *worlds; i++)
        test_world(worlds[i][0], worlds[i][1]);
    test_hang();
    return check_done();
}
