/* mkstorm.c - emitted kernels under a storm: on the emulated GPU, with schedules drawn from seeds.
   Each seed runs the same episode (prefill, decode, samplers, a stop) and must give the bits that the
   calm schedule gave, which are compared with the oracle.  A seed replays exactly.
   With --faults, kernels that have a known fault must be caught. */
#define _GNU_SOURCE
#include "config.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "runtime/cpu.h"
#include "runtime/cxx.h"
#include "runtime/engine.h"
#include "runtime/sample.h"
#include "tests/check.h"
#include "tests/faults.h"

enum { CONTEXT = 96, MOST_PROMPT = 79, STEPS = 4, SAMPLED = 2, MOST_V = 256, MOST_SETTINGS = 8 };
enum { POISON = 0x7fff }; /* of rows: NaN in bf16 and in fp16 */

/* ---- Worlds: a toy model, an architecture, settings, tokens of the prompt ----- */

struct world {
    const char *model, *arch, *settings;
    int prompt; /* decode begins with its last token */
};

/* chunk_bytes=512 makes KV tiles of 16 positions.  Prompts of 15 and 63 end just before a tile does: another rank
   has the next one. */
static const struct world worlds[] = {
    /* Clusters: a head in each of two groups; two in one; a group without units and one without heads. */
    {"tiny-qwen3", "sm_90", "ctas=4 group=2 warps=4 chunk_bytes=512 tokens_per_launch=3", 18},
    /* The same through L2, and by cp.async. */
    {"tiny-qwen3", "sm_80", "ctas=4 group=2 warps=4 chunk_bytes=512 tokens_per_launch=3", 15},
    {"tiny-qwen3", "sm_75", "ctas=4 group=4 warps=4 chunk_bytes=512 tokens_per_launch=3", 18},
    /* Three groups of one; two without heads, one without units; D is no multiple of 16. */
    {"tiny-qwen2", "sm_90", "cluster=l2 ctas=3 group=1 warps=5 unroll_layers=loop chunk_bytes=512 stages=2", 63},
    {"tiny-qwen2", "sm_75", "ctas=4 group=2 warps=4 unroll_layers=loop chunk_bytes=1024 stages=3", 1},
    {"tiny-qwen2", "sm_80", "ctas=4 group=4 warps=7 round_blocks=2", 18},
    {"tiny-llama", "sm_90", "ctas=4 group=4 warps=7 chunk_bytes=512 dtype=fp16", 15},
    {"tiny-llama", "sm_80", "ctas=4 group=1 warps=4 inflight=1 epoch0=2147483500", 18},
    {"tiny-smol", "sm_100", "ctas=4 group=2 warps=4 prefill_tokens=16 timing=on", 18},
    {"tiny-smol", "sm_120", "ctas=1 warps=4 stages=4 inflight=3", 18},
    {"tiny-qwen3-e128", "sm_90", "ctas=4 group=2 warps=4 balance=1000 unroll_layers=loop", 33},
    {"tiny-qwen3-e128", "sm_89", "ctas=3 group=3 warps=6 dtype=fp16 tokens_per_launch=1", 63},
    {"tiny-qwen3-e128", "sm_86", "ctas=3 group=1 warps=4", 63},
    {"tiny-qwen3", "sm_90", "ctas=2 group=2 warps=4 chunk_bytes=512 stages=2 dtype=fp16", 63},
    /* Two clusters of 8; six groups, more than the five lanes that share a word of sums. */
    {"tiny-smol", "sm_90", "ctas=16 group=8 warps=4 unroll_layers=loop", 1},
    {"tiny-wide", "sm_80", "ctas=6 group=1 warps=4 unroll_layers=loop", 15},
    /* Teams: of three groups, and launches that are near and then far; of two. */
    {"tiny-qwen2", "sm_90", "ctas=6 group=2 warps=4 chunk_bytes=512 team_from=80 tokens_per_launch=3", 79},
    {"tiny-llama", "sm_90", "ctas=4 group=2 warps=4 chunk_bytes=512 team_from=48 unroll_layers=loop", 63},
    /* Two heads, two helpers and a group of no team; everything inline. */
    {"tiny-qwen3", "sm_90", "ctas=10 group=2 warps=4 chunk_bytes=512 team_from=48 tokens_per_launch=3 unroll_layers=inline", 47},
    /* As small as can be, for ThreadSanitizer. */
    {"tiny-llama", "sm_75", "ctas=1 warps=4 stages=4", 2},
    /* Helpers whose next weights are in registers before the sums are there. */
    {"tiny-qwen2", "sm_90", "ctas=6 group=2 warps=4 chunk_bytes=1536 stages=8 inflight=1 team_from=80 early=sums", 79},
};
enum { WORLDS = sizeof worlds / sizeof *worlds };

static struct {
    long seeds, first;
    int world, every, jobs, faults, verbose;
    const char *fault;
} opt = {.seeds = -1, .first = 1, .world = -1, .every = 1};

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

/* ---- Races that ThreadSanitizer reports ------------------------------------- */

static volatile int races;

void __tsan_on_report(void *report);
void __tsan_on_report(void *report)
{
    (void) report;
    races++;
}

/* The machine itself is not looked at: it runs in the name of whichever lane is at work. */
const char *__tsan_default_suppressions(void);
const char *__tsan_default_suppressions(void)
{
    return "called_from_lib:libmkhost.so\n";
}

/* Lanes are many, and the first report is enough. */
const char *__tsan_default_options(void);
const char *__tsan_default_options(void)
{
    return "exitcode=0:history_size=2:report_thread_leaks=0:die_after_fork=0";
}

extern void __sanitizer_set_report_fd(void *fd) __attribute__((weak));

static void report_to(int fd)
{
    if (__sanitizer_set_report_fd && fd >= 0)
        __sanitizer_set_report_fd((void *) (intptr_t) fd);
}

/* Reports of races that were planted are only counted.  Each process has to say so for itself. */
static void hide_reports(void)
{
    static int null = -1;

    if (null < 0)
        null = open("/dev/null", O_WRONLY | O_CLOEXEC);
    if (!opt.verbose)
        report_to(null);
}

static void show_reports(void)
{
    report_to(2);
}

/* ---- Epochs ----------------------------------------------------------------- */

/* The engine fills the exchange with 0xff when a session begins, and when epochs start over.  The linker
   brings its call here (Makefile.am). */
static int fills;

int __real_rt_device_set(struct rt_device *d, rt_ptr dst, unsigned char value, size_t bytes, struct mk_err *err);
int __wrap_rt_device_set(struct rt_device *d, rt_ptr dst, unsigned char value, size_t bytes, struct mk_err *err);
int __wrap_rt_device_set(struct rt_device *d, rt_ptr dst, unsigned char value, size_t bytes, struct mk_err *err)
{
    fills += value == 0xff;
    return __real_rt_device_set(d, dst, value, bytes, err);
}

/* ---- One episode ------------------------------------------------------------ */

struct result { /* every bit that the kernels gave */
    float logits[STEPS][MOST_V], sampled_logits[2][SAMPLED][MOST_V];
    int32_t tokens[STEPS], sampled[2][SAMPLED], ended[STEPS], stopped[STEPS];
    int n_stopped;
    uint16_t kv[4][2][2][MOST_PROMPT + STEPS][128]; /* layer, head, key or value */
};

struct taken {
    int32_t *token;
    int n, stop_after, ends_after; /* the second: because of an end token */
};

static int take(void *user, int32_t token)
{
    struct taken *t = user;

    t->token[t->n++] = token;
    return t->n == t->stop_after;
}

struct stage {
    const struct world *world;
    struct gen_model model;
    struct rt_weights *weights;
    struct rt_engine *engine;
    struct rt_session *session;
    int32_t prompt[MOST_PROMPT];
    double token_ms; /* of the last greedy run, on one core */
    int fills;       /* of exchanges, before this episode */
};

/* Of this process. */
static double cpu_seconds(void)
{
    struct timespec t;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double) t.tv_sec + (double) t.tv_nsec * 1e-9;
}

static int poison(struct stage *s, struct mk_err *err)
{
    static uint16_t rows[CONTEXT * 128];
    int rc = 0;

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        rows[i] = POISON;
    for (int layer = 0; layer < s->model.L; layer++)
        for (int head = 0; head < s->model.K; head++)
            for (int which = 0; which < 2; which++)
                if (rc == 0)
                    rc = rt_session_kv_put(s->session, layer, head, which, 0, CONTEXT, rows, err);
    return rc;
}

static int read_kv(struct stage *s, struct result *r, struct mk_err *err)
{
    const int n = s->world->prompt + STEPS, E = s->model.E;
    uint16_t rows[(MOST_PROMPT + STEPS) * 128];
    int rc = 0;

    for (int layer = 0; layer < s->model.L && layer < 4; layer++)
        for (int head = 0; head < s->model.K && head < 2; head++)
            for (int which = 0; rc == 0 && which < 2; which++) {
                rc = rt_session_kv_get(s->session, layer, head, which, 0, n, rows, err);
                for (int i = 0; i < n; i++)
                    memcpy(r->kv[layer][head][which][i], rows + i * E, (size_t) E * 2);
            }
    return rc;
}

/* N tokens after TOKEN at POS, or as many as T says; any other number is a failure. */
static int decode(struct stage *s, struct rt_decode job, struct taken *t, struct mk_err *err)
{
    const int want = t->stop_after ? t->stop_after : t->ends_after ? t->ends_after : job.n;
    int done, rc;

    job.token_fn = take;
    job.user = t;
    rc = rt_session_decode(s->session, &job, &done, err);
    if (rc == 0 && done != want)
        rc = gen_fail(err, MK_EDEVICE, "%d tokens in place of %d", done, want);
    return rc;
}

static void compact(const struct stage *s, const float *from, float (*to)[MOST_V], int n)
{
    for (int i = 0; i < n; i++)
        memcpy(to[i], from + (size_t) i * (size_t) s->model.V, (size_t) s->model.V * sizeof(float));
}

static const struct mk_sampling kinds[2] = {
    {.temperature = 1, .top_p = 1, .seed = 5},
    {.temperature = 1.3f, .top_k = 20, .top_p = 0.7f, .seed = 6},
};

/* Launches that end before their last token: the device comes to an end token, and then the host
   says stop. */
static int play_ends(struct stage *s, struct result *r, struct mk_err *err)
{
    struct taken ended = {.token = r->ended, .ends_after = 1},
                 stopped = {.token = r->stopped, .stop_after = 2};
    const int P = s->world->prompt;
    struct rt_decode job = {.token = s->prompt[P - 1], .pos = P - 1, .n = STEPS, .top_p = 1,
                            .stop = r->tokens, .n_stop = 1};
    int rc = decode(s, job, &ended, err);

    job = (struct rt_decode) {.token = r->tokens[0], .pos = P, .n = STEPS, .top_p = 1};
    if (rc == 0)
        rc = decode(s, job, &stopped, err);
    r->n_stopped = stopped.n;
    return rc;
}

/* The prompt, and STEPS greedy tokens with their logits. */
static int play_greedy(struct stage *s, struct result *r, struct mk_err *err)
{
    static float logits[STEPS * MOST_V];
    const int P = s->world->prompt;
    struct taken t = {.token = r->tokens};
    const struct rt_decode job = {.token = s->prompt[P - 1], .pos = P - 1, .n = STEPS, .top_p = 1, .logits = logits};
    int done, rc = poison(s, err);
    double start;

    memset(r, 0, sizeof *r);
    s->fills = fills;
    if (rc == 0 && P > 1)
        rc = rt_session_prefill(s->session, s->prompt, P - 1, 0, &done, err);
    start = cpu_seconds();
    if (rc == 0)
        rc = decode(s, job, &t, err);
    s->token_ms = (cpu_seconds() - start) * 1e3 / STEPS;
    compact(s, logits, r->logits, STEPS);
    if (rc == 0 && fills != s->fills)
        rc = gen_fail(err, MK_EDEVICE, "epochs started over %d times in the first run", fills - s->fills);
    return rc ? rc : read_kv(s, r, err);
}

/* What follows: samplers, and launches that end early. */
static int play_rest(struct stage *s, struct result *r, struct mk_err *err)
{
    static float logits[SAMPLED * MOST_V];
    const int wraps = strstr(s->world->settings, "epoch0=") != NULL, P = s->world->prompt;
    int rc = 0;

    for (int k = 0; rc == 0 && k < 2; k++) {
        struct taken t = {.token = r->sampled[k]};
        const struct rt_decode job = {.token = r->tokens[k], .pos = P + k, .n = SAMPLED, .logits = logits,
                                      .temperature = kinds[k].temperature, .top_k = kinds[k].top_k,
                                      .top_p = kinds[k].top_p, .seed = kinds[k].seed};
        rc = decode(s, job, &t, err);
        compact(s, logits, r->sampled_logits[k], SAMPLED);
    }
    rc = rc ? rc : play_ends(s, r, err);
    if (rc == 0 && fills - s->fills != wraps)
        rc = gen_fail(err, MK_EDEVICE, "epochs started over %d times", fills - s->fills);
    return rc;
}

/* ---- Opening and closing ---------------------------------------------------- */

static void stage_close(struct stage *s)
{
    rt_session_free(s->session);
    rt_engine_close(s->engine);
    rt_weights_close(s->weights);
}

/* A session in which nothing has run: every seed begins with one, and so with the world's first epoch. */
static int stage_renew(struct stage *s, struct mk_err *err)
{
    rt_session_free(s->session);
    s->session = NULL;
    rt_device_seed(rt_engine_device(s->engine), 0);
    return rt_session_make(s->engine, CONTEXT, &s->session, err);
}

static int stage_open(const struct world *w, struct stage *s, struct mk_err *err)
{
    const char *srcdir = getenv("srcdir") ? getenv("srcdir") : access("../tests/toy", R_OK) ? "tests" : "../tests";
    char path[4096], device[32];
    struct rt_engine_options options = {.set = split_settings(w->settings), .device = device};
    int rc;

    memset(s, 0, sizeof *s);
    s->world = w;
    snprintf(path, sizeof path, "%s/toy/%s", srcdir, w->model);
    snprintf(device, sizeof device, "host:%s", w->arch);
    rc = gen_model_read(path, &s->model, err);
    if (rc == 0)
        rc = rt_weights_random(&s->model, 7, &s->weights, err);
    if (rc == 0)
        rc = rt_engine_open(&s->model, s->weights, &options, &s->engine, err);
    if (rc == 0)
        rc = stage_renew(s, err);
    for (int i = 0; rc == 0 && i < MOST_PROMPT; i++)
        s->prompt[i] = (int32_t) (rt_sample_hash(3, (uint32_t) i, 0) % (uint64_t) s->model.V);
    return rc;
}

/* ---- What is right ---------------------------------------------------------- */

/* The choices against what rt_sample chooses from the same logits; and rows behind the last are as
   they were. */
static int compare_choices(struct stage *s, const struct result *r, char *why, size_t size)
{
    static const struct mk_sampling greedy = {.top_p = 1};
    const int P = s->world->prompt;

    for (int i = 0; i < STEPS; i++)
        if (rt_sample(r->logits[i], s->model.V, &greedy, P + i) != r->tokens[i])
            snprintf(why, size, "token %d is not the best", i);
    for (int k = 0; k < 2; k++)
        for (int i = 0; i < SAMPLED; i++)
            if (rt_sample(r->sampled_logits[k][i], s->model.V, &kinds[k], P + k + i + 1) !=
                r->sampled[k][i])
                snprintf(why, size, "sampler %d chooses another token %d", k, i);
    for (int layer = 0; layer < s->model.L && layer < 4; layer++)
        for (int head = 0; head < s->model.K && head < 2; head++)
            for (int i = 0; i < 2 * s->model.E; i++)
                if (r->kv[layer][head][i / s->model.E][P + STEPS - 1][i % s->model.E] != POISON)
                    snprintf(why, size, "a row behind the last was written: layer %d, head %d", layer, head);
    return *why != 0;
}

/* Of the resident type: how far off a rounded number is at most, as a part of it. */
static double unit_roundoff(const struct stage *s)
{
    return rt_session_plan(s->session)->dtype == GEN_FP16 ? 0x1p-11 : 0x1p-8;
}

/* The N logits of a step against the oracle's.  Kernels round x, q, k, v, products to the resident type, and these
   errors add up as squares do: in all worlds a step's rms is up to 1.4 unit roundoffs of the logits' rms, the largest up
   to 4.2.  A residual that is rounded to bf16 gives 5 and 15 in a world of fp16. */
static void compare_step(const struct stage *s, const float *got, const float *want, int step, char *why, size_t size)
{
    const double u = unit_roundoff(s);
    double errors = 0, squares = 0, worst = 0;

    for (int i = 0; i < s->model.V; i++) {
        const double error = fabs((double) want[i] - (double) got[i]);
        errors += error * error;
        squares += (double) want[i] * (double) want[i];
        worst = error > worst || isnan(error) ? error : worst;
    }
    errors = sqrt(errors / squares) / u;
    worst = worst / sqrt(squares / s->model.V) / u;
    if (opt.verbose)
        printf("  step %d: against the oracle rms %.2f, largest %.1f roundoffs\n", step, errors, worst);
    if (!(errors < 2.5 && worst < 8))
        snprintf(why, size, "logits differ from the oracle's by rms %.2f, largest %.1f roundoffs", errors, worst);
}

/* The calm run against the oracle: logits of every step. */
static int compare_oracle(struct stage *s, const struct result *r, char *why, size_t size)
{
    const int V = s->model.V, P = s->world->prompt;
    float *want = calloc((size_t) (P + STEPS) * (size_t) V, sizeof *want);
    int32_t tokens[MOST_PROMPT + STEPS];
    struct rt_cpu *cpu = NULL;
    struct mk_err err = {0};
    int rc = want ? 0 : MK_ENOMEM;

    memcpy(tokens, s->prompt, (size_t) P * sizeof *tokens);
    memcpy(tokens + P, r->tokens, sizeof r->tokens);
    if (rc == 0)
        rc = rt_cpu_make(&s->model, s->weights, rt_session_plan(s->session)->dtype, 1, CONTEXT, 1, &cpu, &err);
    if (rc == 0)
        rc = rt_cpu_run(cpu, tokens, P + STEPS - 1, 0, want, 1, NULL, &err);
    snprintf(why, size, "%s", rc ? err.text : "");
    for (int t = 0; rc == 0 && !*why && t < STEPS; t++)
        compare_step(s, r->logits[t], want + (size_t) (P - 1 + t) * (size_t) V, t, why, size);
    rt_cpu_free(cpu);
    free(want);
    return *why != 0;
}

static int compare_greedy(const struct result *got, const struct result *want, char *why, size_t size)
{
    *why = 0;
    if (memcmp(got->kv, want->kv, sizeof got->kv))
        snprintf(why, size, "other KV rows");
    else if (memcmp(got->logits, want->logits, sizeof got->logits))
        snprintf(why, size, "other logits");
    else if (memcmp(got->tokens, want->tokens, sizeof got->tokens))
        snprintf(why, size, "other tokens");
    return *why != 0;
}

static int compare_rest(const struct result *got, const struct result *want, char *why, size_t size)
{
    *why = 0;
    if (memcmp(got->sampled_logits, want->sampled_logits, sizeof got->sampled_logits))
        snprintf(why, size, "other logits while sampling");
    else if (memcmp(got, want, sizeof *got))
        snprintf(why, size, "other sampled or last tokens");
    return *why != 0;
}

/* ---- Runs -------------------------------------------------------------------- */

static double seconds(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double) t.tv_sec + (double) t.tv_nsec * 1e-9;
}

static void print_replay(const struct world *w, long seed)
{
    printf("  replay: %s --world %d --first %ld --seeds 1\n", program_invocation_name, (int) (w - worlds), seed);
}

/* What RC of a call, or ThreadSanitizer since there were BEFORE races, has against it; 1 when there is anything. */
static int explain(struct stage *s, int rc, const struct mk_err *err, int before, char *why, size_t size)
{
    const char *report = rt_device_report(rt_engine_device(s->engine));

    *why = 0;
    if (rc)
        snprintf(why, size, "%s", *report ? report : err->text);
    else if (races != before)
        snprintf(why, size, "%d data races", races - before);
    return *why != 0;
}

/* One seed against WANT; 1 and why when it failed.  What comes first is looked at first. */
static int run_seed(struct stage *s, long seed, const struct result *want, char *why, size_t size)
{
    static struct result got;
    struct mk_err err = {0};
    const int before = races;
    int rc = stage_renew(s, &err);

    rt_device_seed(rt_engine_device(s->engine), (uint64_t) seed);
    rc = rc ? rc : play_greedy(s, &got, &err);
    if (explain(s, rc, &err, before, why, size) || compare_greedy(&got, want, why, size))
        return 1;
    rc = play_rest(s, &got, &err);
    return explain(s, rc, &err, before, why, size) || compare_rest(&got, want, why, size);
}

/* The calm run, which tells what the bits are; 1 and why when it failed. */
static int calm_run(struct stage *s, struct result *want, char *why, size_t size)
{
    struct mk_err err = {0};
    const int before = races;
    int rc = play_greedy(s, want, &err);

    if (explain(s, rc, &err, before, why, size) || compare_oracle(s, want, why, size))
        return 1;
    rc = play_rest(s, want, &err);
    return explain(s, rc, &err, before, why, size) || compare_choices(s, want, why, size);
}

/* Seeds of one world; the number of failures (at most one: it says enough). */
static int run_world(const struct world *w, long first, long n)
{
    static struct result want;
    char why[65536];
    const double start = seconds();
    struct rusage usage;
    struct stage s;
    struct mk_err err = {0};
    int failed = stage_open(w, &s, &err);
    double token_ms;

    snprintf(why, sizeof why, "%s", failed ? err.text : "");
    if (failed || calm_run(&s, &want, why, sizeof why)) {
        printf("FAILED %s %s %s, calm: %s\n", w->model, w->arch, w->settings, why);
        print_replay(w, 1);
        failed = 1;
    }
    token_ms = s.token_ms;
    for (long seed = first; !failed && seed < first + n; seed++)
        if (run_seed(&s, seed, &want, why, sizeof why)) {
            printf("FAILED %s %s %s, seed %ld: %s\n", w->model, w->arch, w->settings, seed, why);
            print_replay(w, seed);
            failed = 1;
        }
    getrusage(RUSAGE_SELF, &usage);
    if (!failed)
        printf("ok     %-16s %-6s %-62s %6ld seeds %6.1f s, %4.1f ms a calm token, %3ld MiB\n", w->model, w->arch,
               w->settings, n, seconds() - start, token_ms, usage.ru_maxrss >> 10);
    stage_close(&s);
    return failed;
}

/* ---- Faults ------------------------------------------------------------------ */

/* A faulty kernel must fail its calm run, or one of the seeds that the fault allows: the seed, 0 for the calm
   run, or -1 when none did. */
static long run_fault(const struct fault *f, long most)
{
    static struct result want;
    char why[65536] = "nothing";
    struct stage s;
    struct mk_err err = {0};
    long seed = 0;
    const double start = seconds();
    int caught;

    if (f->race)
        hide_reports();
    rt_cxx_plant(&f->plant);
    if (stage_open(&worlds[f->world], &s, &err)) {
        printf("FAILED %-20s cannot be planted: %s\n", f->plant.name, err.text);
        rt_cxx_plant(NULL);
        stage_close(&s);
        return -1;
    }
    caught = calm_run(&s, &want, why, sizeof why);
    while (!caught && seed < most)
        caught = run_seed(&s, ++seed, &want, why, sizeof why);
    if (opt.verbose)
        printf("%s\n", why);
    why[strcspn(why, "\n")] = 0;
    printf("%s %-22s %-80s seed %3ld of %3ld %5.1f s: %.60s\n", caught ? "caught" : "FAILED", f->plant.name, f->text,
           seed, most, seconds() - start, caught ? why : "nothing");
    rt_cxx_plant(NULL);
    stage_close(&s);
    return caught ? seed : -1;
}

/* ---- Work for all processors ---------------------------------------------------- */

/* Run JOB(i) for i < N in processes of their own, JOBS at once; the number that failed. */
static int run_jobs(int n, int (*job)(int))
{
    int failed = 0, running = 0, status;

    if (n == 1)
        return job(0) != 0; /* in this process, for a debugger */
    for (int i = 0; i < n || running; ) {
        if (i < n && running < opt.jobs) {
            fflush(stdout);
            const pid_t pid = fork();
            if (pid == 0) {
                const int rc = job(i);
                fflush(stdout);
                _exit(rc);
            }
            CHECK(pid > 0);
            running++;
            i++;
            continue;
        }
        CHECK(wait(&status) > 0);
        failed += !WIFEXITED(status) || WEXITSTATUS(status);
        if (!WIFEXITED(status))
            printf("FAILED a worker died, signal %d\n", WTERMSIG(status));
        running--;
    }
    return failed;
}

/* A job is a world and at most SHARE seeds: job I of the worlds chosen takes share I / n_worlds. */
enum { SHARE = 50 };

static long seeds_wanted(void)
{
    return opt.seeds < 0 ? 100 : opt.seeds;
}

static int n_worlds(void)
{
    return opt.world >= 0 ? 1 : (WORLDS + opt.every - 1) / opt.every;
}

static int world_job(int i)
{
    const struct world *w = &worlds[opt.world >= 0 ? opt.world : i % n_worlds() * opt.every];
    const long done = i / n_worlds() * SHARE, left = seeds_wanted() - done;

    return run_world(w, opt.first + done, left < SHARE ? left : SHARE);
}

/* Every seed of every world; prints what it was. */
static int run_storm(void)
{
    const int shares = (int) ((seeds_wanted() + SHARE - 1) / SHARE);
    const int failed = run_jobs(n_worlds() * (shares ? shares : 1), world_job);

    printf("storm: %ld seeds from %ld on in each of %d worlds, %ld in all: %d failed\n", seeds_wanted(), opt.first,
           n_worlds(), seeds_wanted() * n_worlds(), failed);
    return failed;
}

static const struct fault *chosen[FAULTS + 1], *chosen_sound[FAULTS]; /* the second: without races */
static int n_chosen;

static long fault_seeds(const struct fault *f)
{
    return opt.seeds < 0 ? f->seeds : opt.seeds;
}

static int fault_job(int i)
{
    return run_fault(chosen_sound[i], fault_seeds(chosen_sound[i])) < 0;
}

static void choose_faults(void)
{
    const int race_detector = dlsym(RTLD_DEFAULT, "__tsan_init") != NULL;

    for (size_t i = 0; i < FAULTS; i++)
        if (opt.fault ? !strcmp(opt.fault, faults[i].plant.name) : faults[i].race == race_detector)
            chosen[n_chosen++] = &faults[i];
    if (opt.fault && !n_chosen) {
        fprintf(stderr, "mkstorm: there is no fault \"%s\" (--list)\n", opt.fault);
        exit(2);
    }
}

/* Races by world: they count as caught when the sound kernel, under the same seeds and one at least, has
   none. */
static int race_worlds[WORLDS];

static int races_job(int job)
{
    const int world = race_worlds[job];
    long most = 1;
    int failed = 0;

    for (int i = 0; chosen[i]; i++)
        if (chosen[i]->race && chosen[i]->world == world) {
            const long seed = run_fault(chosen[i], fault_seeds(chosen[i]));
            failed |= seed < 0;
            most = seed > most ? seed : most;
        }
    show_reports();
    if (!run_world(&worlds[world], 1, most))
        return failed;
    printf("FAILED no race of world %d counts as caught\n", world);
    return 1;
}

static int run_faults(void)
{
    int sound = 0, n_races = 0, failed;

    choose_faults();
    setenv("MK_HOST_CXXFLAGS", "-O0", 0); /* most of a fault's time is the compiler's */
    for (int i = 0; chosen[i]; i++) {
        int at = 0;
        while (at < n_races && race_worlds[at] != chosen[i]->world)
            at++;
        if (!chosen[i]->race)
            chosen_sound[sound++] = chosen[i];
        else if (at == n_races)
            race_worlds[n_races++] = chosen[i]->world;
    }
    failed = run_jobs(sound, fault_job);
    return failed + run_jobs(n_races, races_job);
}

static void usage(FILE *f)
{
    fputs("usage: mkstorm [options]\n"
          "Run emitted kernels on the emulated GPU, with schedules drawn from seeds.\n"
          "  --seeds N      schedules of every world (100), or of every fault (what faults.h says)\n"
          "  --first S      the first seed (1)\n"
          "  --world I      one world (--list prints them)\n"
          "  --every N      every Nth world (1)\n"
          "  --faults       plant every fault in turn; each must be caught\n"
          "  --fault NAME   plant this one\n"
          "  --jobs N       processes at once (all processors)\n"
          "  --list         worlds and faults\n"
          "  --verbose      whole reports\n"
          "  --help\n",
          f);
}

static void list(void)
{
    for (int i = 0; i < WORLDS; i++)
        printf("world %2d  %-16s %-6s %s\n", i, worlds[i].model, worlds[i].arch, worlds[i].settings);
    for (size_t i = 0; i < FAULTS; i++)
        printf("fault %-20s %s%s\n", faults[i].plant.name, faults[i].text,
               faults[i].race ? " (a race)" : "");
}

/* The value of option NAME, or the end. */
static long number(const char *name, long least, long most)
{
    char *end;
    const long v = strtol(optarg, &end, 10);

    if (end == optarg || *end || v < least || v > most) {
        fprintf(stderr, "mkstorm: --%s is \"%s\"; it must be %ld..%ld\n", name, optarg, least, most);
        exit(2);
    }
    return v;
}

static void read_options(int argc, char **argv)
{
    static const struct option options[] = {
        {"seeds", 1, NULL, 's'}, {"first", 1, NULL, 'f'},   {"world", 1, NULL, 'w'},
        {"every", 1, NULL, 'e'}, {"faults", 0, NULL, 'F'},  {"fault", 1, NULL, 'n'},
        {"jobs", 1, NULL, 'j'},  {"verbose", 0, NULL, 'v'}, {"list", 0, NULL, 'l'},
        {"help", 0, NULL, 'h'},  {NULL, 0, NULL, 0},
    };
    int c;

    opt.jobs = (int) sysconf(_SC_NPROCESSORS_ONLN);
    while ((c = getopt_long(argc, argv, "", options, NULL)) != -1)
        switch (c) {
        case 's': opt.seeds = number("seeds", 0, 1000000000); break;
        case 'f': opt.first = number("first", 0, 1000000000); break;
        case 'w': opt.world = (int) number("world", 0, WORLDS - 1); break;
        case 'e': opt.every = (int) number("every", 1, WORLDS); break;
        case 'F': opt.faults = 1; break;
        case 'n': opt.fault = optarg; opt.faults = 1; break;
        case 'j': opt.jobs = (int) number("jobs", 1, 1000); break;
        case 'v': opt.verbose = 1; break;
        case 'l': list(); exit(0);
        case 'h': usage(stdout); exit(0);
        default: usage(stderr); exit(2);
        }
    if (optind < argc) {
        usage(stderr);
        exit(2);
    }
}

int main(int argc, char **argv)
{
    struct rt_device *d;
    struct mk_err err;
    int failed;

    read_options(argc, argv);
    if (rt_device_open("host", 0, &d, &err))
        SKIP("%s", err.text);
    rt_device_close(d);
    if (!opt.faults)
        return run_storm() != 0;
    failed = run_faults();
    printf("faults: %d planted, %d failed\n", n_chosen, failed);
    return failed != 0;
}
