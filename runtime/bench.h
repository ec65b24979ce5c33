/* bench.h - the engine's second door, for mkbench, mktune and the big checks: it times the kernels
   that mk_append and mk_generate launch; verdict.h checks the very run that was timed.
   Needs a GPU, or an emulated one.  One rt_bench is used by one thread.

   The token at position I of every run is pseudo-random, rt_sample_hash(seed, I, 0) % V,
   until decode chooses its own; so that a position can be reached without a prompt.
   Run at position P means: rows 0 .. P-1 are in the KV cache, and the token at position P
   is the next to be computed. */
#ifndef RT_BENCH_H
#define RT_BENCH_H
#include "gen/gen.h"
#include "runtime/mk.h"
#include "runtime/weights.h"

struct rt_bench;

struct rt_bench_options {
    int random_weights;         /* 1: made weights (rt_weights_random); 0: those of the folder */
    uint64_t seed;              /* of the made weights and of the pseudo-random tokens */
    const char *device;         /* of rt_device_open; NULL: the first GPU */
    const char *cubin_path;     /* as in mk_options */
    const char *plan_file;      /* as in mk_options */
    const char *const *set;     /* as in mk_options */
    mk_progress_fn *progress;   /* or NULL */
    mk_warn_fn *warn;           /* or NULL */
    void *user;
};

/* The weights of model M, read from WHERE: made ones, or those of the folder.
   Returns as rt_weights_open and rt_weights_random. */
int rt_bench_weights(const char *where, const struct gen_model *m,
                     const struct rt_bench_options *options, struct rt_weights **out,
                     struct mk_err *err);

/* Open the model WHERE (as gen_model_read; a folder with weights unless they are made) on
   the device, load the weights and get the kernel, for CONTEXT tokens.
   Returns 0, MK_EINVAL (CONTEXT over the model's maximum), or as mk_open and mk_context_make. */
int rt_bench_open(const char *where, int context, const struct rt_bench_options *options,
                  struct rt_bench **out, struct mk_err *err);
void rt_bench_close(struct rt_bench *b);

/* Seconds from nothing to a first token. */
struct rt_bench_start {
    double driver;              /* initialised, the device opened */
    double weights;             /* read or made before that, packed after the kernel is there */
    double kernel;              /* found or compiled, and loaded: see kernel_from */
    double buffers;             /* plan, cache of keys and values, tables */
    double token;               /* the first one, at position 0 */
};

struct rt_bench_facts {
    struct gen_model model;
    char gpu[128];              /* "NVIDIA H200" */
    int arch;                   /* 90 */
    int sms;
    int driver;                 /* 13000 for CUDA 13.0 */
    int sheet_gbps;             /* of the data sheet; 0: unknown */
    int context;                /* tokens that fit */
    const struct gen_plan_source *plan_source; /* owned by the rt_bench */
    int kernel_from;            /* 1: compiled, 2: cache, 3: pack */
    int64_t weight_bytes;       /* resident weights */
    struct rt_bench_start start;
};
void rt_bench_facts(const struct rt_bench *b, struct rt_bench_facts *out);

/* Read bandwidth of this GPU, 1e9 bytes per second: the best of several ways of reading at
   least 4 GiB (less when that much is not free: METHOD says so); METHOD names the winner.
   Needs NVRTC, also where the kernels come from a pack: the readers are compiled here.
   Returns 0, MK_ENOMEM, MK_EDEVICE, MK_ETOOL (no NVRTC), MK_ECOMPILE, MK_EUNSUPPORTED. */
int rt_bench_bandwidth(struct rt_bench *b, double *gbps, char method[128], struct mk_err *err);

/* Bytes that must be read to decode the token at position POS: the weights that a token
   reads, and the KV rows 0 .. POS. */
int64_t rt_bench_decode_bytes(const struct rt_bench *b, int pos);
/* The same for a prefill of N tokens from an empty context: the weights once per chunk, and
   the KV rows that earlier chunks wrote, once per chunk. */
int64_t rt_bench_prefill_bytes(const struct rt_bench *b, int n);

/* Make rows 0 .. N-1 of the KV cache those of the pseudo-random tokens, by a real prefill;
   rows that are there already are kept.  Returns 0, MK_EINVAL (n > context), MK_EDEVICE. */
int rt_bench_fill_kv(struct rt_bench *b, int n, struct mk_err *err);

struct rt_bench_run {
    int runs;                   /* ms[] is filled so far */
    float *ms;                  /* [runs] milliseconds of each run; owned by the caller */
    int clock_mhz;              /* SM clock, read while the last runs went on; 0: unknown */
};

/* Decode N tokens from position POS (filled before), greedily and past end tokens, in as few
   launches as mk_generate would use: RUN->runs timed runs, after one that is not
   timed, each from the same state.  RUN->ms gets milliseconds per TOKEN.
   Wall-clock time from the first launch until the host has the last token.
   Returns 0, MK_EINVAL (pos + n > context, n < 1), MK_EDEVICE.  Rows from POS on
   no longer count as filled. */
int rt_bench_decode(struct rt_bench *b, int pos, int n, struct rt_bench_run *run,
                    struct mk_err *err);

/* Prefill N pseudo-random tokens from an empty context, until the token that follows them
   is on the host: RUN->runs timed runs after one that is not timed; RUN->ms gets
   milliseconds per RUN.  Returns as rt_bench_decode.  Rows 0 .. N-1 count as filled. */
int rt_bench_prefill(struct rt_bench *b, int n, struct rt_bench_run *run, struct mk_err *err);

/* Mean cycles per token that a stage of decode takes (MK_LAPS of abi.h), waiting counted in, and how
   many of them it waits for its weights: in groups that have KV heads [0], and in the others [1] (0 when
   there are none). */
struct rt_bench_stage {
    const char *name;
    int per_layer;              /* 1: of all layers together */
    double cycles[2], waited[2];
};

/* Run N tokens from position POS once and measure the stages; needs plan choice timing=on, and
   POS filled as for rt_bench_decode.  OUT has room for MK_LAP_COUNT; *PREDICTED is for the token in
   the middle.
   Returns 0, MK_ENOMEM, MK_EDEVICE. */
int rt_bench_stages(struct rt_bench *b, int pos, int n, struct rt_bench_stage *out,
                    struct gen_prediction *predicted, struct mk_err *err);
#endif
