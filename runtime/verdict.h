/* verdict.h - was it right?  The last run that bench.h timed, against the C reference or against
   what another kernel made of the same steps. */
#ifndef RT_VERDICT_H
#define RT_VERDICT_H
#include "runtime/bench.h"

struct rt_bench_verdict {
    int correct;                /* 1, or 0 and TEXT says what was wrong */
    int checked;                /* tokens compared */
    float max_error;            /* largest |logit - oracle| over them */
    float tolerance;            /* what was allowed */
    char text[256];             /* one sentence, for people */
};

/* Check the last rt_bench_decode: all its runs gave the same tokens; and the first and
   the last 4 of them (all, when n < 8), teacher-forced against the C oracle (cpu.h) on the
   same weights and on the KV rows copied from the device: each must be the oracle's
   choice, or the oracle's margin be within the tolerance.  The same positions, run again for
   their logits, must choose the same and have logits and KV rows within the tolerance.
   Returns 0 with *OUT filled (also when it is wrong); negative: it could not be checked. */
int rt_bench_check_decode(struct rt_bench *b, struct rt_bench_verdict *out, struct mk_err *err);

/* The same for the last rt_bench_prefill: KV rows of the first and last 4 prompt tokens
   and the logits that follow the last. */
int rt_bench_check_prefill(struct rt_bench *b, struct rt_bench_verdict *out, struct mk_err *err);

/* What one kernel made of N steps from position POS, for another kernel of the same model, weights
   and seed to be compared with.  The arrays are the caller's. */
struct rt_bench_output {
    int pos, n;
    int32_t *chosen;            /* [n] */
    float *logits;              /* [n][V] */
};

/* Fill OUT, whose N is that of the last rt_bench_decode, from this one; its steps are run again for
   their logits.  Returns 0, MK_EINVAL (another N), MK_ENOMEM, MK_EDEVICE. */
int rt_bench_output(struct rt_bench *b, struct rt_bench_output *out, struct mk_err *err);
/* Check the last rt_bench_decode against WANT of the same position and length: all its runs gave the
   same tokens, and these are WANT's, up to the first where WANT's own logits of both are within the
   tolerance of each other; and every step, run again on WANT's tokens, has WANT's logits within the
   tolerance.  That is the one of the checks above: another order of sums moves a logit less than
   the roundings do that the C reference leaves out.
   Returns 0 with *OUT filled, MK_EINVAL, MK_ENOMEM, MK_EDEVICE. */
int rt_bench_check_output(struct rt_bench *b, const struct rt_bench_output *want,
                          struct rt_bench_verdict *out, struct mk_err *err);
#endif
