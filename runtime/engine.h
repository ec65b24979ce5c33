/* engine.h - a model on a GPU: weights in device memory, sessions that prefill and decode.
   The only module that launches kernels. */
#ifndef RT_ENGINE_H
#define RT_ENGINE_H
#include "gen/gen.h"
#include "runtime/device.h"
#include "runtime/weights.h"

struct rt_engine;  /* a model and its packed weights on one device */
struct rt_session; /* a kernel for one context length, and one KV cache */

struct rt_engine_options {
    const char *cubin_path; /* as in mk_options, as the next two */
    const char *plan_file;
    const char *const *set;
    mk_progress_fn *progress; /* or NULL */
    mk_warn_fn *warn;         /* or NULL */
    void *user;
    const char *device; /* of rt_device_open: NULL, "gpu", "host", "host:sm_75" */
};

/* Open the device (of GPUs the first) for model M with weights W; all three pointers must outlive
   the engine.  No device memory is taken yet.  Returns 0, MK_ENOGPU, MK_EDEVICE, MK_ENOMEM. */
int rt_engine_open(const struct gen_model *m, const struct rt_weights *w,
                   const struct rt_engine_options *options, struct rt_engine **out,
                   struct mk_err *err);
void rt_engine_close(struct rt_engine *e);
struct rt_device *rt_engine_device(const struct rt_engine *e);

/* Seconds that loading and packing the weights took; 0 before the first session. */
double rt_engine_load_s(const struct rt_engine *e);

/* Make a session for CONTEXT tokens (0: the plan's default): plan, kernel, weights at the first
   time, KV cache.  Where nothing can compile and no pack has the kernel for as many clusters as the
   device holds, the pack's kernel for the most clusters that fit is taken, else one without; that is
   a warning, and the engine stays with that many.  Returns 0 or as mk_context_make. */
int rt_session_make(struct rt_engine *e, int context, struct rt_session **out, struct mk_err *err);
void rt_session_free(struct rt_session *s);

const struct gen_plan *rt_session_plan(const struct rt_session *s);
const struct gen_plan_source *rt_session_plan_source(const struct rt_session *s); /* gen.h */
int rt_session_kernel_from(const struct rt_session *s); /* RT_FROM_... of cache.h */
double rt_session_kernel_s(const struct rt_session *s);

/* Stop the running or the next call soon; any thread, or a signal handler. */
void rt_session_cancel(struct rt_session *s);
/* Was it cancelled since the last call of this?  Clears the mark. */
int rt_session_cancelled(struct rt_session *s);

/* Compute TOKENS[n] at positions pos .. pos+n-1 into the KV cache; the rows before pos are there.
   *DONE: tokens computed, also on failure.  Returns 0, MK_ECANCELED (between chunks), MK_EDEVICE. */
int rt_session_prefill(struct rt_session *s, const int32_t *tokens, int n, int pos, int *done,
                       struct mk_err *err);

struct rt_decode {
    int32_t token; /* first input token, at position POS */
    int pos;
    int n;             /* tokens to run at most; pos + n <= context */
    float temperature; /* 0: greedy */
    int top_k;
    float top_p;
    uint64_t seed;
    const int32_t *stop; /* [n_stop] ids that end the run; n_stop <= MK_STOPS */
    int n_stop;
    const int32_t *forced; /* [n] input tokens, or NULL: the token chosen is the next input */
    float *logits;         /* [n][V] float, host; NULL: not wanted */
    int (*token_fn)(void *user, int32_t token); /* told of each token; not 0: stop after it */
    void *user;
};

/* Decode in launches of up to tokens_per_launch.  *DONE: tokens that token_fn was told of, also on
   failure.  Returns 0, MK_ECANCELED, MK_EDEVICE (err->text says what a stuck kernel waits for). */
int rt_session_decode(struct rt_session *s, const struct rt_decode *job, int *done,
                      struct mk_err *err);

/* Copy KV rows: positions pos .. pos+n-1 of LAYER and HEAD, keys (which 0) or values (1), [n][E]
   16-bit words of the resident type, host.  For checks. */
int rt_session_kv_get(struct rt_session *s, int layer, int head, int which, int pos, int n,
                      uint16_t *rows, struct mk_err *err);
int rt_session_kv_put(struct rt_session *s, int layer, int head, int which, int pos, int n,
                      const uint16_t *rows, struct mk_err *err);
/* With plan choice timing=on: cycles [CTAs of the plan][MK_LAP_COUNT][2] of the stages of decode (abi.h), and
   of these for the ring, added up since the last call.  Returns 0 or MK_EDEVICE. */
int rt_session_laps(struct rt_session *s, uint64_t *laps, struct mk_err *err);

#endif
