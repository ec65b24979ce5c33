/* cpu.h - the portable forward pass: the oracle of the tests and --device cpu.
   fp32 arithmetic on weights rounded to the resident type; plain C and threads. */
#ifndef RT_CPU_H
#define RT_CPU_H
#include "gen/model.h"
#include "runtime/weights.h"

struct rt_cpu;

/* RESIDENT: GEN_BF16, GEN_FP16 or GEN_FP32: what the weights are rounded to before
   they are used (and held as).  W must outlive the result.  THREADS 0: one per core.
   CONTEXT: tokens that the KV cache holds (kept as float, rounded to RESIDENT when
   ROUND_KV is not 0).  Returns 0, MK_ENOMEM, or an error of the weights. */
int rt_cpu_make(const struct gen_model *m, const struct rt_weights *w, int resident, int round_kv,
                int context, int threads, struct rt_cpu **out, struct mk_err *err);
void rt_cpu_free(struct rt_cpu *c);

/* Run TOKENS[n] at positions pos .. pos+n-1 (the rows before pos are in the cache).
   logits  [V] float of the last token, or [n][V] when ALL is not 0; NULL: not wanted
   cancel  polled between layers when not NULL
   Returns 0, MK_EINVAL, MK_ECANCELED, MK_ENOMEM. */
int rt_cpu_run(struct rt_cpu *c, const int32_t *tokens, int n, int pos, float *logits, int all,
               const volatile int *cancel, struct mk_err *err);

/* The KV row of LAYER, KV head HEAD, position POS: [E] float; which: 0 key (after
   norm and RoPE), 1 value.  The pointer may be read and written. */
float *rt_cpu_kv(struct rt_cpu *c, int layer, int head, int pos, int which);
#endif
