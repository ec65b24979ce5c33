/* timed.h - an open benchmark and its last timed run: what bench.c leaves to verdict.c. */
#ifndef RT_TIMED_H
#define RT_TIMED_H
#include "runtime/bench.h"

enum { RT_RAN_NOTHING, RT_RAN_DECODE, RT_RAN_PREFILL };

/* The timed run that can be checked.  Step I is the token at position POS + I. */
struct rt_ran {
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
    struct rt_ran ran;
    struct rt_cpu *oracle;      /* NULL: no check yet */
    int oracle_context;
};

/* Run N steps from position POS on again, each on its token of INPUT [n], whatever the one before
   it chooses.  What they choose goes to CHOSEN [n], their logits to LOGITS [n][V].
   Returns as rt_session_decode (engine.h). */
int rt_bench_repeat(struct rt_bench *b, int pos, int n, const int32_t *input, int32_t *chosen,
                    float *logits, struct mk_err *err);
#endif
