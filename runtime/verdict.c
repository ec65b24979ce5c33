/* verdict.c - see verdict.h. */
#include "config.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/cpu.h"
#include "runtime/engine.h"
#include "runtime/timed.h"
#include "runtime/verdict.h"

enum {
    EDGE = 4,                   /* tokens that are checked at each end of a run */
    MOST_CHECKED = 2 * EDGE,
    ORACLE_CONTEXT = 4096       /* the oracle's first KV cache; made anew when more is needed */
};

/* ---- What is compared ---------------------------------------------------------- */

/* What a check has seen.  Steps as in struct rt_ran. */
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
    const struct rt_ran *ran;
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
    const struct rt_ran *ran = c->ran;
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
    const struct rt_ran *ran = c->ran;
    const int V = c->b->model.V;
    int32_t chosen[MOST_CHECKED];
    const int rc = rt_bench_repeat(c->b, ran->pos + first, n, ran->input + first, chosen, c->device,
                                   err);

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

/* ---- In which order ------------------------------------------------------------ */

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
static void ends(const struct rt_ran *ran, int *first, int *last)
{
    *first = ran->n < MOST_CHECKED ? ran->n : EDGE;
    *last = ran->n < MOST_CHECKED ? 0 : EDGE;
}

/* The oracle goes over both ends.  All before the device runs anything again: the rows that it
   is given and compared with are those of the timed run. */
static int oracle_ends(struct check *c, struct mk_err *err)
{
    const struct rt_ran *ran = c->ran;
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
    const struct rt_ran *ran = c->ran;
    const size_t V = (size_t)c->b->model.V;
    int first, last, rc;

    ends(ran, &first, &last);
    if (ran->kind == RT_RAN_PREFILL)
        return device_steps(c, ran->n - 1, 1, c->oracle + (size_t)(first + last - 1) * V, err);
    rc = device_steps(c, 0, first, c->oracle, err);
    if (rc == 0 && last)
        rc = device_steps(c, ran->n - last, last, c->oracle + (size_t)first * V, err);
    return rc;
}

/* ---- The verdict --------------------------------------------------------------- */

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
    const struct rt_ran *ran = &b->ran;

    if (ran->differs) {
        const int at = ran->kind == RT_RAN_DECODE ? ran->pos + ran->differs - 1 : ran->n - 1;
        wrong(v, "run %d chose another token at position %d than the first", ran->differs_run + 1,
              at);
    }
    for (int i = ran->kind == RT_RAN_DECODE ? 0 : ran->n - 1; i < ran->n && v->correct; i++)
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
                        kind == RT_RAN_DECODE ? "decode" : "prefill");
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
    else if (kind == RT_RAN_PREFILL)
        out->checked = first + last;
    return rc;
}

int rt_bench_check_decode(struct rt_bench *b, struct rt_bench_verdict *out, struct mk_err *err)
{
    return check_run(b, RT_RAN_DECODE, out, err);
}

int rt_bench_check_prefill(struct rt_bench *b, struct rt_bench_verdict *out, struct mk_err *err)
{
    return check_run(b, RT_RAN_PREFILL, out, err);
}

/* ---- Against another kernel ---------------------------------------------------- */

/* Run the N steps of the last decode again, on the tokens that CHOSEN says; what is chosen then goes to
   AGAIN. */
static int run_again(struct rt_bench *b, const int32_t *chosen, int32_t *again, float *logits,
                     struct mk_err *err)
{
    const struct rt_ran *ran = &b->ran;
    int32_t *input = malloc((size_t)ran->n * sizeof *input);
    int rc;

    if (!input)
        return gen_fail(err, MK_ENOMEM, "no memory for %d tokens", ran->n);
    input[0] = ran->input[0];
    memcpy(input + 1, chosen, (size_t)(ran->n - 1) * sizeof *input);
    rc = rt_bench_repeat(b, ran->pos, ran->n, input, again, logits, err);
    free(input);
    return rc;
}

int rt_bench_output(struct rt_bench *b, struct rt_bench_output *out, struct mk_err *err)
{
    const struct rt_ran *ran = &b->ran;
    int32_t *again;
    int rc;

    if (ran->kind != RT_RAN_DECODE || out->n != ran->n)
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
static void compare_choices(struct tally *t, const struct rt_ran *ran,
                            const struct rt_bench_output *want, int V)
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
    const struct rt_ran *ran = &b->ran;
    const size_t n = (size_t)ran->n, V = (size_t)b->model.V;
    struct tally tally = {0};
    int32_t *again = NULL;
    float *logits = NULL;
    int rc;

    memset(out, 0, sizeof *out);
    if (ran->kind != RT_RAN_DECODE || want->n != ran->n || want->pos != ran->pos)
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
