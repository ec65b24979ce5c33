/* tune.c - see tune.h: processes that compile, time and check plans. */
#include "config.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "runtime/cache.h"
#include "runtime/device.h"
#include "runtime/key.h"
#include "runtime/tune.h"
#include "runtime/verdict.h"

enum { TICK_MS = 100, MAX_RUNS = 1000 };

/* What all processes see.  Behind it the tokens and logits of the reference, of each position. */
struct shared {
    struct rt_tune_device device;
    struct rt_tune_result result;
    int rc;                     /* of what the process was for */
    struct mk_err err;
};

struct rt_tune {
    struct rt_tune_options options;
    struct shared *shared;
    size_t shared_bytes;
    struct rt_bench_output reference[RT_TUNE_POSITIONS];
    /* What the next process is to do. */
    const struct gen_plan *const *plans;
    const char *const *set;
    enum rt_tune_check check;
    const struct rt_tune_result *best;
};

double rt_tune_now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- Opening ---------------------------------------------------------------- */

static size_t round_up(size_t bytes)
{
    return (bytes + 63) / 64 * 64;
}

int rt_tune_open(const struct rt_tune_options *options, const struct gen_model *m,
                 struct rt_tune **out, struct mk_err *err)
{
    const size_t n = (size_t)options->tokens;
    const size_t chosen = round_up(n * sizeof(int32_t)), logits = round_up(n * (size_t)m->V * sizeof(float));
    struct rt_tune *t;
    char *at;

    *out = NULL;
    if (options->n_pos < 1 || options->n_pos > RT_TUNE_POSITIONS || options->tokens < 1 ||
        options->runs < 1 || options->runs > MAX_RUNS)
        return gen_fail(err, MK_EINVAL, "tuning at %d positions with %d tokens and %d runs",
                        options->n_pos, options->tokens, options->runs);
    t = calloc(1, sizeof *t);
    if (!t)
        return gen_fail(err, MK_ENOMEM, "no memory for tuning");
    t->options = *options;
    t->shared_bytes = round_up(sizeof *t->shared) + (size_t)options->n_pos * (chosen + logits);
    t->shared = mmap(NULL, t->shared_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (t->shared == MAP_FAILED) {
        free(t);
        return gen_fail(err, MK_ENOMEM, "no memory for the logits of %d tokens", options->tokens);
    }
    at = (char *)t->shared + round_up(sizeof *t->shared);
    for (int i = 0; i < options->n_pos; i++, at += chosen + logits)
        t->reference[i] = (struct rt_bench_output){
            options->pos[i], options->tokens, (int32_t *)(void *)at, (float *)(void *)(at + chosen)};
    *out = t;
    return 0;
}

void rt_tune_close(struct rt_tune *t)
{
    if (!t)
        return;
    munmap(t->shared, t->shared_bytes);
    free(t);
}

/* ---- Processes -------------------------------------------------------------- */

/* Does number I of the work that T describes, in a process of its own. */
typedef void work_fn(struct rt_tune *t, int i);

struct child {
    pid_t pid;                  /* 0: none */
    int fd;                     /* its end of this pipe is closed when it ends */
    int status;                 /* of waitpid */
    int late;                   /* it was killed at the deadline */
};

/* Signals end it as if it had never been ours, and it does not outlive us. */
static void become_child(pid_t parent)
{
    static const int fatal[] = {SIGINT, SIGTERM, SIGHUP};

    for (size_t i = 0; i < sizeof fatal / sizeof *fatal; i++) {
        struct sigaction old;

        if (sigaction(fatal[i], NULL, &old) == 0 && old.sa_handler != SIG_IGN)
            signal(fatal[i], SIG_DFL);
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(1);
}

static int start(struct rt_tune *t, work_fn *work, int i, struct child *c, struct mk_err *err)
{
    const pid_t parent = getpid();
    int fd[2];

    memset(c, 0, sizeof *c);
    if (pipe2(fd, O_CLOEXEC))
        return gen_fail(err, MK_EIO, "no pipe: %s", strerror(errno));
    c->pid = fork();
    if (c->pid == 0) {
        close(fd[0]);
        become_child(parent);
        work(t, i);
        _exit(0);
    }
    close(fd[1]);
    c->fd = fd[0];
    if (c->pid > 0)
        return 0;
    c->pid = 0;
    close(fd[0]);
    return gen_fail(err, MK_EIO, "no process for a candidate: %s", strerror(errno));
}

static void reap(struct child *c)
{
    while (waitpid(c->pid, &c->status, 0) < 0 && errno == EINTR)
        ;
    close(c->fd);
    c->pid = 0;
}

/* Wait for at most a tick; returns how many of the N children ended. */
static int reap_some(struct rt_tune *t, struct child *c, int n, double deadline)
{
    struct pollfd fds[RT_TUNE_PLANS];
    int ended = 0;

    for (int i = 0; i < n; i++) {
        if (c[i].pid && rt_tune_now() > deadline) {
            c[i].late = 1;
            kill(c[i].pid, SIGKILL);
        }
        fds[i] = (struct pollfd){c[i].pid ? c[i].fd : -1, POLLIN, 0};
    }
    poll(fds, (nfds_t)n, TICK_MS);
    for (int i = 0; i < n; i++)
        if (c[i].pid && (c[i].late || fds[i].revents)) {
            reap(&c[i]);
            ended++;
        }
    if (t->options.tick)
        t->options.tick(t->options.user);
    return ended;
}

/* Do work 0 .. N-1, JOBS at a time.  Work that DEADLINE comes before is not begun, or killed. */
static int do_work(struct rt_tune *t, work_fn *work, int n, int jobs, double deadline, struct child *c,
                   struct mk_err *err)
{
    int begun = 0, running = 0, rc = 0;

    while (running || (rc == 0 && begun < n && (begun == 0 || rt_tune_now() <= deadline))) {
        while (rc == 0 && begun < n && running < jobs) {
            rc = start(t, work, begun, &c[begun], err);
            if (rc == 0)
                begun++, running++;
        }
        if (running)
            running -= reap_some(t, c, begun, deadline);
    }
    return rc;
}

/* ---- The device, and kernels ------------------------------------------------- */

static void ask(struct rt_tune *t, int i)
{
    struct shared *s = t->shared;
    struct rt_weights *w;
    struct gen_model m;
    struct rt_device *d;

    (void)i;
    s->rc = gen_model_read(t->options.where, &m, &s->err);
    if (s->rc == 0)
        s->rc = rt_bench_weights(t->options.where, &m, &t->options.bench, &w, &s->err);
    if (s->rc)
        return;
    s->rc = rt_device_open(t->options.bench.device ? t->options.bench.device : "gpu", 0, &d, &s->err);
    if (s->rc)
        return;
    rt_device_facts(d, &s->device.gpu);
    snprintf(s->device.name, sizeof s->device.name, "%s", rt_device_name(d));
    s->device.driver = rt_device_driver(d);
}

int rt_tune_ask(struct rt_tune *t, struct rt_tune_device *out, struct mk_err *err)
{
    struct child c = {0};
    int rc;

    t->shared->rc = MK_EDEVICE;
    gen_fail(&t->shared->err, MK_EDEVICE, "the process that asked the device died");
    rc = do_work(t, ask, 1, 1, HUGE_VAL, &c, err);
    if (rc)
        return rc;
    if (t->shared->rc) {
        if (err)
            *err = t->shared->err;
        return t->shared->rc;
    }
    *out = t->shared->device;
    return 0;
}

static void compile(struct rt_tune *t, int i)
{
    struct rt_kernel *kernel = NULL;
    struct rt_key key;

    if (rt_key_make(t->plans[i], t->plans[i]->gpu.arch, &key, NULL) == 0)
        rt_kernel_get(&key, t->options.bench.cubin_path, NULL, NULL, NULL, &kernel, NULL);
}

void rt_tune_compile(struct rt_tune *t, const struct gen_plan *const *plans, int n, int jobs,
                     double deadline)
{
    struct child c[RT_TUNE_PLANS];

    t->plans = plans;
    do_work(t, compile, n < RT_TUNE_PLANS ? n : RT_TUNE_PLANS, jobs < 1 ? 1 : jobs, deadline, c, NULL);
}

/* ---- A candidate ------------------------------------------------------------- */

static int by_size(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;

    return (x > y) - (x < y);
}

/* Median of N times, which are sorted; *NOISE: half the distance of their quartiles over it. */
static double median(float *ms, int n, double *noise)
{
    double m;

    qsort(ms, (size_t)n, sizeof *ms, by_size);
    m = 0.5 * ((double)ms[(n - 1) / 2] + (double)ms[n / 2]);
    *noise = 0.5 * (double)(ms[n - 1 - (n - 1) / 4] - ms[(n - 1) / 4]) / m;
    return m;
}

/* Check what was timed at position I, as T says. */
static int check(struct rt_tune *t, struct rt_bench *b, int i, struct rt_bench_verdict *v,
                 struct mk_err *err)
{
    int rc = 0;

    v->correct = 1;
    if (t->check != RT_TUNE_AS_OTHERS)
        rc = rt_bench_check_decode(b, v, err);
    if (rc || !v->correct)
        return rc;
    if (t->check == RT_TUNE_AS_REFERENCE)
        return rt_bench_output(b, &t->reference[i], err);
    return rt_bench_check_output(b, &t->reference[i], v, err);
}

/* Time and check position I.  Returns 0 with r->end set, or an error. */
static int try_position(struct rt_tune *t, struct rt_bench *b, int i, struct rt_tune_result *r,
                        struct mk_err *err)
{
    const struct rt_tune_options *o = &t->options;
    float ms[MAX_RUNS + 1];
    struct rt_bench_run brief = {.runs = 2, .ms = ms}, run = {.runs = o->runs, .ms = ms};
    struct rt_bench_verdict verdict;
    double noise;
    int rc = rt_bench_fill_kv(b, o->pos[i], err);

    if (rc == 0)
        rc = rt_bench_decode(b, o->pos[i], o->tokens, &brief, err);
    if (rc)
        return rc;
    r->ms[i] = (double)(ms[0] < ms[1] ? ms[0] : ms[1]);
    if (t->best && r->ms[i] > (1 + 0.01 * o->drop_percent) * t->best->ms[i]) {
        r->end = RT_TUNE_SLOW;
        snprintf(r->text, sizeof r->text, "a first run at position %d takes %.4g ms a token, the best "
                 "plan %.4g", o->pos[i], r->ms[i], t->best->ms[i]);
        return 0;
    }
    rc = rt_bench_decode(b, o->pos[i], o->tokens, &run, err);
    if (rc == 0)
        rc = check(t, b, i, &verdict, err);
    if (rc)
        return rc;
    r->ms[i] = median(ms, o->runs, &noise);
    r->noise = noise > r->noise ? noise : r->noise;
    r->end = verdict.correct ? RT_TUNE_RIGHT : RT_TUNE_WRONG;
    if (!verdict.correct)
        snprintf(r->text, sizeof r->text, "%s", verdict.text);
    return 0;
}

static void try_plan(struct rt_tune *t, int i)
{
    struct rt_bench_options options = t->options.bench;
    struct rt_tune_result r = {.end = RT_TUNE_RIGHT};
    struct mk_err err;
    struct rt_bench *b;
    int rc;

    (void)i;
    options.plan_file = "none";
    options.set = t->set;
    options.progress = NULL;
    if (t->check != RT_TUNE_AS_REFERENCE) /* what there is to warn of, it has said */
        options.warn = NULL;
    rc = rt_bench_open(t->options.where, t->options.context, &options, &b, &err);
    for (i = 0; rc == 0 && r.end == RT_TUNE_RIGHT && i < t->options.n_pos; i++)
        rc = try_position(t, b, i, &r, &err);
    if (rc) {
        r.end = RT_TUNE_FAILED;
        snprintf(r.text, sizeof r.text, "%.*s", (int)strcspn(err.text, "\n"), err.text);
    }
    t->shared->result = r;
}

int rt_tune_run(struct rt_tune *t, const char *const *set, enum rt_tune_check check,
                const struct rt_tune_result *best, double deadline, struct rt_tune_result *out,
                struct mk_err *err)
{
    const double start = rt_tune_now();
    struct rt_tune_result *r = &t->shared->result;
    struct child c = {0};
    int rc;

    t->set = set;
    t->check = check;
    t->best = best;
    memset(r, 0, sizeof *r);
    r->end = RT_TUNE_FAILED;
    rc = do_work(t, try_plan, 1, 1, deadline, &c, err);
    if (rc)
        return rc;
    *out = *r;
    if (c.late) {
        out->end = RT_TUNE_LATE;
        snprintf(out->text, sizeof out->text, "ended after %.0f s: it took too long",
                 rt_tune_now() - start);
    } else if (WIFSIGNALED(c.status)) {
        out->end = RT_TUNE_FAILED;
        snprintf(out->text, sizeof out->text, "its process was ended by signal %d",
                 WTERMSIG(c.status));
    }
    out->seconds = rt_tune_now() - start;
    return 0;
}
