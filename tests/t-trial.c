/* t-trial.c - what mktune stands on, with a toy model on the emulated GPU: the check of one kernel's
   output against another's, and plans tried in processes that are ended, or die. */
#include "config.h"

#include <signal.h>
#include <unistd.h>

#include "check.h"
#include "runtime/tune.h"
#include "runtime/verdict.h"

enum { POS = 3, N = 4 };

static struct mk_err err;
static struct gen_model model;
static char where[4096];
static const struct rt_bench_options options = {
    .random_weights = 1, .seed = 1, .device = "host:sm_90", .plan_file = "none",
};

/* ---- The check ------------------------------------------------------------------ */

static void run(struct rt_bench *b, int n)
{
    float ms[2];
    struct rt_bench_run timed = {.runs = 2, .ms = ms};

    CHECKF(rt_bench_fill_kv(b, POS, &err) == 0 && rt_bench_decode(b, POS, n, &timed, &err) == 0, "%s",
           err.text);
}

static void check_verdict(struct rt_bench *b, const struct rt_bench_output *want, int correct,
                          const char *text)
{
    struct rt_bench_verdict v;

    run(b, N);
    CHECKF(rt_bench_check_output(b, want, &v, &err) == 0, "%s", err.text);
    CHECKF(v.correct == correct && v.checked == N && strstr(v.text, text), "%d: %s", v.correct, v.text);
}

/* What is no number in either kernel is wrong, also when the steps behind it are right. */
static void check_infinite(struct rt_bench *b, const struct rt_bench_output *want)
{
    static const float bad[] = {-INFINITY, INFINITY, NAN};
    float *row = want->logits, kept = row[3];

    for (int i = 0; i < 3; i++) {
        row[3] = bad[i];
        check_verdict(b, want, 0, "a logit at position 3 is ");
    }
    row[3] = kept;
}

/* Another order of sums passes; a wrong logit, a NaN and a token far from the best do not; one that
   is as good does. */
static void test_check(void)
{
    static int32_t chosen[N];
    const char *const other[] = {"ctas=1", NULL};
    struct rt_bench_options o = options;
    struct rt_bench_output want = {.n = N, .chosen = chosen};
    struct rt_bench_verdict v;
    struct rt_bench *b;
    float *row, kept;
    int32_t token;

    want.logits = calloc((size_t) N * (size_t) model.V, sizeof *want.logits);
    CHECKF(rt_bench_open(where, 64, &options, &b, &err) == 0, "%s", err.text);
    CHECK(rt_bench_output(b, &want, &err) == MK_EINVAL);
    run(b, N - 1);
    CHECK(rt_bench_output(b, &want, &err) == MK_EINVAL);
    CHECK(rt_bench_check_output(b, &want, &v, &err) == MK_EINVAL);
    run(b, N);
    CHECKF(rt_bench_output(b, &want, &err) == 0 && want.pos == POS, "%s", err.text);
    check_verdict(b, &want, 1, "logits within 0 of");
    check_infinite(b, &want);
    rt_bench_close(b);

    o.set = other;
    CHECKF(rt_bench_open(where, 64, &o, &b, &err) == 0, "%s", err.text);
    check_verdict(b, &want, 1, "logits within ");
    row = want.logits + 2 * model.V;
    kept = row[7];
    row[7] += 1;
    check_verdict(b, &want, 0, "a logit at position 5 is ");
    row[7] = NAN;
    check_verdict(b, &want, 0, "a logit at position 5 is ");
    row[7] = kept;
    token = chosen[N - 1];
    row = want.logits + (N - 1) * model.V;
    chosen[N - 1] = token ? 0 : 1;
    check_verdict(b, &want, 1, "logits within ");  /* it chose better than was wanted */
    chosen[N - 1] = token;
    want.pos++;
    CHECK(rt_bench_check_output(b, &want, &v, &err) == MK_EINVAL);
    want.pos--;
    check_verdict(b, &want, 1, "logits within ");
    rt_bench_close(b);
    free(want.logits);
}

/* ---- Processes ------------------------------------------------------------------- */

static int kill_next;           /* a tick ends the process at work, our only child */

static void tick(void *user)
{
    char path[64];
    long child;
    FILE *f;

    (void) user;
    if (!kill_next)
        return;
    kill_next = 0;
    snprintf(path, sizeof path, "/proc/self/task/%ld/children", (long) getpid());
    f = fopen(path, "r");
    if (f && fscanf(f, "%ld", &child) == 1)
        CHECK(kill((pid_t) child, SIGKILL) == 0);
    else
        kill_next = -1;         /* a kernel that does not tell */
    if (f)
        fclose(f);
}

static void check_end(struct rt_tune *t, const char *const *set, double seconds, enum rt_tune_end end,
                      const char *text)
{
    struct rt_tune_result r;

    CHECKF(rt_tune_run(t, set, RT_TUNE_AS_OTHERS, NULL, rt_tune_now() + seconds, &r, &err) == 0, "%s",
           err.text);
    CHECKF(r.end == end && strstr(r.text, text), "%d: %s", r.end, r.text);
}

static void test_processes(void)
{
    const char *const bad[] = {"stages=1000", NULL}, *const hang[] = {"fault=hang", NULL};
    struct rt_tune_options o = {.where = where, .context = 64, .pos = {POS}, .n_pos = 1, .tokens = N,
                                .runs = 2, .drop_percent = 5, .bench = options, .tick = tick};
    struct rt_tune_device device;
    struct rt_tune_result r;
    struct rt_tune *t;

    o.n_pos = 0;
    CHECK(rt_tune_open(&o, &model, &t, &err) == MK_EINVAL && !t);
    o.n_pos = 1;
    CHECK(rt_tune_open(&o, &model, &t, &err) == 0);
    CHECKF(rt_tune_ask(t, &device, &err) == 0, "%s", err.text);
    CHECK(device.gpu.arch == 90 && device.gpu.host && !strcmp(device.gpu.name, "host-sm_90"));
    CHECKF(rt_tune_run(t, NULL, RT_TUNE_AS_REFERENCE, NULL, INFINITY, &r, &err) == 0, "%s", err.text);
    CHECKF(r.end == RT_TUNE_RIGHT && r.ms[0] > 0 && r.noise >= 0 && r.seconds > 0, "%s", r.text);
    check_end(t, NULL, 600, RT_TUNE_RIGHT, "");
    check_end(t, bad, 600, RT_TUNE_FAILED, "stages is \"1000\"");
    check_end(t, hang, 600, RT_TUNE_FAILED, "made no progress");
    check_end(t, NULL, 0.01, RT_TUNE_LATE, "ended after 0 s");
    r.ms[0] = 1e-6;
    CHECK(rt_tune_run(t, NULL, RT_TUNE_AS_OTHERS, &r, INFINITY, &r, &err) == 0 && r.end == RT_TUNE_SLOW);
    check_end(t, NULL, 600, RT_TUNE_RIGHT, "");
    rt_tune_close(t);

    /* One that would take long, and dies. */
    o.runs = 100;
    CHECK(rt_tune_open(&o, &model, &t, &err) == 0);
    kill_next = 1;
    CHECK(rt_tune_run(t, NULL, RT_TUNE_AS_OTHERS, NULL, INFINITY, &r, &err) == 0);
    CHECKF(kill_next < 0 || (r.end == RT_TUNE_FAILED &&
                             !strcmp(r.text, "its process was ended by signal 9")), "%s", r.text);
    rt_tune_close(t);
    rt_tune_close(NULL);
    o.bench.device = "host:sm_1";
    CHECK(rt_tune_open(&o, &model, &t, &err) == 0 && rt_tune_ask(t, &device, &err) == MK_EUNSUPPORTED);
    rt_tune_close(t);
}

int main(void)
{
    const char *srcdir = getenv("srcdir");
    struct rt_bench *b;
    int rc;

    snprintf(where, sizeof where, "%s/toy/tiny-llama", srcdir ? srcdir : ".");
    CHECKF(gen_model_read(where, &model, &err) == 0, "%s", err.text);
    rc = rt_bench_open(where, 64, &options, &b, &err);
    if (rc == MK_ENOGPU || rc == MK_ETOOL)
        SKIP("%s", err.text);
    rt_bench_close(b);
    test_processes();
    test_check();
    return check_done();
}
