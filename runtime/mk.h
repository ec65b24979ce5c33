/* mk.h - run a dense language model on one GPU, or on the CPU.

   A model is a folder in the Hugging Face layout: config.json, one
   model.safetensors (or shards with model.safetensors.index.json), and
   tokenizer.json.  The kernel for that model on this GPU is generated and
   compiled at first run, and found in the cache ever after.

       struct mk_model *m;
       struct mk_context *c;
       struct mk_err err;

       if (mk_open("models/demo", NULL, &m, &err) ||
           mk_context_make(m, 0, &c, &err))
           fprintf(stderr, "%s\n", err.text);

   Conventions.  Every call that can fail returns 0 (MK_OK) or a negative MK_E
   code; with a code it fills *err (if err is not NULL) with a sentence that
   names the file, the key or the call, and leaves its outputs NULL or as they
   were.  Free and close functions accept NULL.  Nothing here prints or exits.
   One model may be shared by threads; one context is used by one thread at a
   time, except for mk_cancel. */

#ifndef MK_H
#define MK_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__) && !defined(MK_API)
#define MK_API __attribute__((visibility("default")))
#elif !defined(MK_API)
#define MK_API
#endif

/* Result codes.  After any of them but MK_EDEVICE the object is as it was
   before the call and may be used on; after MK_EDEVICE it can only be freed. */
enum mk_code {
    MK_OK = 0,
    MK_EINVAL = -1,       /* an argument is out of range */
    MK_ENOMEM = -2,       /* not enough host or device memory; the text says how much */
    MK_EIO = -3,          /* a file cannot be read or written */
    MK_ENOENT = -4,       /* a file, a cache entry or a tensor is not there */
    MK_EFORMAT = -5,      /* an input file is malformed */
    MK_EUNSUPPORTED = -6, /* well-formed, but a model, GPU or key that we do not handle */
    MK_ECOMPILE = -7,     /* m4 or a compiler refused; the text holds the log's start */
    MK_EDEVICE = -8,      /* the GPU failed or hung; the model must be closed */
    MK_ENOGPU = -9,       /* no driver, no usable GPU, or no libmkhost */
    MK_ECONTEXT = -10,    /* the context is full */
    MK_ECANCELED = -11,   /* mk_cancel was called */
    MK_ETOOL = -12        /* m4, NVRTC or a C++ compiler is needed and is not installed */
};

struct mk_err {
    int code;             /* one of enum mk_code */
    char text[4096];      /* UTF-8, no newline at the end */
};

/* Version of the library, "MAJOR.MINOR.PATCH"; static storage. */
MK_API const char *mk_version(void);

/* ---- Opening a model ---------------------------------------------------- */

/* Told about work over a second: WHAT is "compile", "load" or "prefill",
   FRACTION runs from 0 to 1.  Called from the thread that made the call. */
typedef void mk_progress_fn(void *user, const char *what, double fraction);

/* Told about a problem that does not stop the call: TEXT is one sentence. */
typedef void mk_warn_fn(void *user, const char *text);

struct mk_options {
    size_t size;              /* sizeof(struct mk_options): keeps the ABI open */
    const char *device;       /* "auto" (a GPU if there is one), "gpu" or "cpu"; NULL: auto;
                                 "host", "host:sm_75": the GPU's kernel on an emulated GPU of
                                 sm_90 or another architecture, for tests and debugging */
    const char *cubin_path;   /* folders of packs, ':' between; NULL: $MK_CUBIN_PATH */
    const char *plan_file;    /* tuned plan, "key = value" lines; NULL: the one carried for this
                                 model and GPU, if there is one and set is NULL; "none": none.
                                 Without file and set the performance model chooses (mkgen.1) */
    const char *const *set;   /* plan overrides "key=value", NULL at the end; NULL: none */
    int threads;              /* for the CPU path; 0: one per core */
    mk_progress_fn *progress; /* or NULL */
    mk_warn_fn *warn;         /* or NULL */
    void *user;               /* passed to progress and warn */
};

struct mk_model;
struct mk_context;

/* Open the model folder DIR.  Reads config.json, tokenizer.json (if there is
   one) and the weight headers; device memory is taken by the first context.
   options  NULL: all defaults.
   Returns 0, MK_EINVAL, MK_ENOENT, MK_EIO, MK_EFORMAT, MK_EUNSUPPORTED,
   MK_ENOMEM, MK_ENOGPU (device "gpu" without one, "host" without libmkhost). */
MK_API int mk_open(const char *dir, const struct mk_options *options,
                   struct mk_model **out, struct mk_err *err);

/* Free MODEL; its contexts must have been freed. */
MK_API void mk_close(struct mk_model *model);

struct mk_info {
    size_t size;              /* set to sizeof(struct mk_info) by the caller */
    const char *name;         /* name of the model folder; owned by the model */
    const char *device;       /* "cpu", or the device's name; owned by the model */
    int vocab;                /* V: config.json vocab_size; token ids are 0 .. V-1 */
    int max_context;          /* config.json max_position_embeddings */
    int has_tokenizer;        /* 0: only token ids can be used */
    int has_chat;             /* 0: the family has no chat template we know */
    int64_t weight_bytes;     /* resident weights */
};

/* Fill *INFO.  Returns 0 or MK_EINVAL (size not set). */
MK_API int mk_model_info(const struct mk_model *model, struct mk_info *info, struct mk_err *err);

/* ---- Text and tokens ---------------------------------------------------- */

enum mk_tokenize_flags {
    MK_SPECIAL = 1            /* "<|im_end|>" and its like in TEXT become their one token */
};

/* Turn LEN bytes of UTF-8 TEXT into token ids.
   tokens  [cap] int32, host; written up to cap; NULL with cap 0 asks for the count
   n       number of tokens that TEXT has, also when it is more than cap
   Returns 0, MK_EFORMAT (TEXT is not UTF-8: the text names the byte), MK_EINVAL
   (no tokenizer), MK_ENOMEM. */
MK_API int mk_tokenize(const struct mk_model *model, const char *text, size_t len, int flags,
                       int32_t *tokens, size_t cap, size_t *n, struct mk_err *err);

/* Tokens of one chat turn, ready for mk_append: SYSTEM (NULL: the family's
   default) is used when FIRST is not 0.  Same outputs as mk_tokenize. */
MK_API int mk_chat_tokens(const struct mk_model *model, const char *system, const char *user,
                          int first, int32_t *tokens, size_t cap, size_t *n, struct mk_err *err);

/* The bytes of one token: perhaps a part of a UTF-8 character, not zero
   terminated, owned by the model.  A special token gives its text.
   Returns 0, MK_EINVAL (id out of range, or no tokenizer). */
MK_API int mk_token_bytes(const struct mk_model *model, int32_t token,
                          const char **bytes, size_t *len, struct mk_err *err);

/* 1 if TOKEN ends an answer (config.json or generation_config.json eos_token_id), else 0. */
MK_API int mk_token_is_end(const struct mk_model *model, int32_t token);

/* ---- A context: a list of tokens and the KV cache of its beginning ------- */

/* Make an empty context for at most LENGTH tokens (0: 4096 or the model's
   maximum, whichever is smaller).  The first call loads the weights and gets
   the kernel, from a pack, from the cache or by compiling it.
   Returns 0, MK_EINVAL, MK_ENOMEM (says what is needed and what would fit),
   MK_EIO, MK_EFORMAT, MK_ECOMPILE, MK_ETOOL, MK_EDEVICE. */
MK_API int mk_context_make(struct mk_model *model, int length,
                           struct mk_context **out, struct mk_err *err);
MK_API void mk_context_free(struct mk_context *context);

/* Tokens that fit, and tokens that are there now (prompt and answers). */
MK_API int mk_context_length(const struct mk_context *context);
MK_API int mk_context_used(const struct mk_context *context);

/* Append N tokens and compute them, all but the last, with the prefill kernel;
   the last one waits for mk_logits or mk_generate.
   tokens  [n] int32, host; 0 <= id < V; n >= 0; used + n <= length
   Returns 0, MK_EINVAL, MK_ECONTEXT (nothing appended), MK_ECANCELED (appended;
   what is not computed yet will be by the next call), MK_EDEVICE.
   Blocks until the device is done. */
MK_API int mk_append(struct mk_context *context, const int32_t *tokens, int n, struct mk_err *err);

/* Compute every token that still waits and give the logits that follow the last.
   logits  [V] float32, host, written only on success
   Returns 0, MK_EINVAL (the context is empty), MK_ECANCELED, MK_EDEVICE. */
MK_API int mk_logits(struct mk_context *context, float *logits, struct mk_err *err);

struct mk_sampling {
    size_t size;              /* sizeof(struct mk_sampling) */
    float temperature;        /* 0: greedy; else > 0 */
    int top_k;                /* keep the k most likely; 0: all; <= V */
    float top_p;              /* keep the smallest set with this probability; 1: all; 0 < p <= 1 */
    uint64_t seed;            /* the same seed gives the same tokens, on every run */
    int max_tokens;           /* at most this many new tokens; 0: until the context is full */
    const int32_t *stop;      /* [n_stop] further ids that end the answer */
    int n_stop;               /* <= 8 */
    int ignore_end;           /* 1: run on past the model's own end tokens */
};

/* One new token.  TEXT holds the LEN bytes that became complete UTF-8 with it
   (LEN may be 0; never half a character; zero terminated; special tokens give
   none).  Return 0 to go on, anything else to stop after this token. */
typedef int mk_token_fn(void *user, int32_t token, const char *text, size_t len);

/* Generate from the last token on.  Every token that FN was told of has been
   appended to the context, the end token included.
   sampling  NULL: greedy until an end token
   fn        or NULL
   n         number of new tokens; set also on failure; NULL: not wanted
   Returns 0 (an end token, max_tokens, fn or the context's end stopped it),
   MK_EINVAL (empty context, sampling out of range), MK_ECANCELED, MK_EDEVICE. */
MK_API int mk_generate(struct mk_context *context, const struct mk_sampling *sampling,
                       mk_token_fn *fn, void *user, int *n, struct mk_err *err);

/* Make the running or the next mk_append, mk_logits or mk_generate of CONTEXT
   return MK_ECANCELED soon.  May be called from any thread or a signal handler. */
MK_API void mk_cancel(struct mk_context *context);

/* Forget every token from position N on; 0 <= n <= used.  Returns 0 or MK_EINVAL. */
MK_API int mk_truncate(struct mk_context *context, int n, struct mk_err *err);

/* The tokens of CONTEXT: [used] int32, owned by the context, good until it changes. */
MK_API const int32_t *mk_context_tokens(const struct mk_context *context);

struct mk_stats {
    size_t size;              /* set to sizeof(struct mk_stats) by the caller */
    double load_s;            /* reading and packing the weights */
    double kernel_s;          /* getting the kernel */
    int kernel_from;          /* 0: CPU path, 1: compiled, 2: cache, 3: pack */
    double first_token_s;     /* last mk_append + mk_generate: start to first token */
    int prefill_tokens;       /* of the last mk_append */
    double prefill_s;
    int decode_tokens;        /* of the last mk_generate, without its first */
    double decode_s;
};

/* Fill *STATS.  Returns 0 or MK_EINVAL (size not set). */
MK_API int mk_context_stats(const struct mk_context *context, struct mk_stats *stats, struct mk_err *err);

#ifdef __cplusplus
}
#endif
#endif
