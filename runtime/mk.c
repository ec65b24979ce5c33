/* mk.c - the public API: models, contexts, and the choice between engine.c and cpu.c. */
#include "config.h"

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "runtime/abi.h"
#include "runtime/cpu.h"
#include "runtime/engine.h"
#include "runtime/sample.h"
#include "runtime/tokenizer.h"

enum { DEFAULT_CONTEXT = 4096, CALLER_STOPS = MK_STOPS - 8 };

struct mk_model {
    struct gen_model model;
    struct mk_options options;
    struct rt_weights *weights;
    struct rt_tokenizer *tokenizer;     /* NULL: the folder has none */
    struct rt_engine *engine;           /* NULL: the CPU */
    pthread_mutex_t making;             /* held while a context is made: the first loads weights */
    char *strings[3];                   /* copies behind options */
    char **set;                         /* likewise */
};

struct mk_context {
    struct mk_model *model;
    struct rt_session *session;         /* one of these two */
    struct rt_cpu *cpu;
    int length;
    int used;                           /* tokens */
    int computed;                       /* tokens at the beginning whose KV rows are there */
    int32_t *tokens;                    /* [length] */
    volatile int canceled;              /* set by mk_cancel, from any thread or a signal handler */
    struct rt_utf8 utf8;                /* half a character, when generated tokens end in one */
    struct mk_stats stats;
    double call_start;                  /* of the last mk_append, for first_token_s; 0: none */
};

const char *mk_version(void)
{
    return PACKAGE_VERSION;
}

static double now_s(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- Models -------------------------------------------------------------- */

static int copy_string(struct mk_model *m, int i, const char **s)
{
    if (!*s)
        return 0;
    m->strings[i] = strdup(*s);
    *s = m->strings[i];
    return *s ? 0 : -1;
}

/* Own copies of what the caller's options point at. */
static int copy_options(struct mk_model *m, const struct mk_options *o, struct mk_err *err)
{
    size_t n = 0;

    m->options.size = sizeof m->options;
    if (o)
        m->options = *o;
    if (!m->options.cubin_path)
        m->options.cubin_path = getenv("MK_CUBIN_PATH");
    if (copy_string(m, 0, &m->options.device) || copy_string(m, 1, &m->options.cubin_path) ||
        copy_string(m, 2, &m->options.plan_file))
        return gen_fail(err, MK_ENOMEM, "mk_open: no memory");
    if (!m->options.set)
        return 0;
    while (m->options.set[n])
        n++;
    m->set = calloc(n + 1, sizeof *m->set);
    for (size_t i = 0; m->set && i < n; i++)
        if (!(m->set[i] = strdup(m->options.set[i])))
            return gen_fail(err, MK_ENOMEM, "mk_open: no memory");
    m->options.set = (const char *const *)m->set;
    return m->set ? 0 : gen_fail(err, MK_ENOMEM, "mk_open: no memory");
}

static const char *device_wanted(const struct mk_options *o)
{
    return o && o->size == sizeof *o && o->device ? o->device : "auto";
}

/* What can be refused before a file is read. */
static int check_open(const char *dir, const struct mk_options *o, struct mk_err *err)
{
    const char *device = device_wanted(o);
    struct stat st;
    int arch, rc;

    if (!dir || !*dir)
        return gen_fail(err, MK_EINVAL, "mk_open: no model folder");
    if (o && o->size != sizeof *o)
        return gen_fail(err, MK_EINVAL, "mk_open: options.size is %zu, not %zu", o->size,
                        sizeof *o);
    if (strcmp(device, "cpu") && strcmp(device, "auto")
        && (rc = rt_device_which(device, &arch, err)) != 0)
        return rc != MK_EINVAL ? rc
               : gen_fail(err, rc, "device is \"%.40s\"; it must be auto, gpu, cpu, host or "
                          "host:sm_XX", device);
    if (o && o->threads < 0)
        return gen_fail(err, MK_EINVAL, "mk_open: options.threads is %d", o->threads);
    if (stat(dir, &st))
        return gen_fail(err, errno == ENOENT ? MK_ENOENT : MK_EIO, "%s: %s", dir,
                        errno == ENOENT ? "no such folder" : strerror(errno));
    if (!S_ISDIR(st.st_mode))
        return gen_fail(err, MK_ENOENT, "%s: not a folder", dir);
    return 0;
}

static int open_engine(struct mk_model *m, struct mk_err *err)
{
    const char *device = device_wanted(&m->options);
    const int automatic = !strcmp(device, "auto");
    const struct rt_engine_options options = {
        m->options.cubin_path, m->options.plan_file, m->options.set, m->options.progress,
        m->options.warn, m->options.user, automatic ? "gpu" : device,
    };
    int rc;

    if (!strcmp(device, "cpu"))
        return 0;
    rc = rt_engine_open(&m->model, m->weights, &options, &m->engine, err);
    if (rc == MK_ENOGPU && automatic)
        rc = 0;
    return rc;
}

int mk_open(const char *dir, const struct mk_options *options, struct mk_model **out,
            struct mk_err *err)
{
    struct mk_model *m = NULL;
    int rc;

    if (!out)
        return gen_fail(err, MK_EINVAL, "mk_open: out is NULL");
    *out = NULL;
    rc = check_open(dir, options, err);
    if (rc)
        return rc;
    m = calloc(1, sizeof *m);
    if (!m)
        return gen_fail(err, MK_ENOMEM, "mk_open: no memory");
    pthread_mutex_init(&m->making, NULL);
    rc = copy_options(m, options, err);
    if (rc == 0)
        rc = gen_model_read(dir, &m->model, err);
    if (rc == 0)
        rc = rt_weights_open(dir, &m->model, &m->weights, err);
    if (rc == 0) {
        rc = rt_tokenizer_open(dir, m->model.V, &m->tokenizer, err);
        if (rc == MK_ENOENT)
            rc = 0;
    }
    if (rc == 0)
        rc = open_engine(m, err);
    if (rc)
        mk_close(m);
    else
        *out = m;
    return rc;
}

void mk_close(struct mk_model *m)
{
    if (!m)
        return;
    rt_engine_close(m->engine);
    rt_tokenizer_free(m->tokenizer);
    rt_weights_close(m->weights);
    for (size_t i = 0; i < sizeof m->strings / sizeof *m->strings; i++)
        free(m->strings[i]);
    for (char **s = m->set; s && *s; s++)
        free(*s);
    free(m->set);
    pthread_mutex_destroy(&m->making);
    free(m);
}

static int resident_type(const struct mk_model *m)
{
    return m->model.dtype == GEN_FP16 ? GEN_FP16 : GEN_BF16;
}

int mk_model_info(const struct mk_model *m, struct mk_info *info, struct mk_err *err)
{
    if (!m || !info)
        return gen_fail(err, MK_EINVAL, "mk_model_info: no %s", m ? "info" : "model");
    if (info->size != sizeof *info)
        return gen_fail(err, MK_EINVAL, "mk_model_info: info.size is %zu, not %zu", info->size,
                        sizeof *info);
    info->name = m->model.name;
    info->device = m->engine ? rt_device_name(rt_engine_device(m->engine)) : "cpu";
    info->vocab = m->model.V;
    info->max_context = m->model.max_context;
    info->has_tokenizer = m->tokenizer != NULL;
    info->has_chat = m->tokenizer && rt_chat_known(m->tokenizer, m->model.family);
    info->weight_bytes = gen_model_params(&m->model) * 2;
    return 0;
}

/* ---- Text ---------------------------------------------------------------- */

static int need_tokenizer(const struct mk_model *m, struct mk_err *err)
{
    if (m && m->tokenizer)
        return 0;
    if (!m)
        return gen_fail(err, MK_EINVAL, "no model");
    return gen_fail(err, MK_EINVAL, "%s has no tokenizer.json", m->model.name);
}

int mk_tokenize(const struct mk_model *m, const char *text, size_t len, int flags,
                int32_t *tokens, size_t cap, size_t *n, struct mk_err *err)
{
    if (need_tokenizer(m, err))
        return MK_EINVAL;
    if ((flags & ~MK_SPECIAL) || (!text && len) || (!tokens && cap) || !n)
        return gen_fail(err, MK_EINVAL, "mk_tokenize: bad arguments");
    return rt_tokenizer_encode(m->tokenizer, text, len,
                               flags & MK_SPECIAL ? MK_SPECIAL | RT_ADD_BOS : 0, tokens, cap, n,
                               err);
}

int mk_chat_tokens(const struct mk_model *m, const char *system, const char *user, int first,
                   int32_t *tokens, size_t cap, size_t *n, struct mk_err *err)
{
    if (need_tokenizer(m, err))
        return MK_EINVAL;
    if (!user || (!tokens && cap) || !n)
        return gen_fail(err, MK_EINVAL, "mk_chat_tokens: bad arguments");
    return rt_chat_tokens(m->tokenizer, m->model.family, system, user, first, tokens, cap, n, err);
}

int mk_token_bytes(const struct mk_model *m, int32_t token, const char **bytes, size_t *len,
                   struct mk_err *err)
{
    int special;

    if (need_tokenizer(m, err))
        return MK_EINVAL;
    if (!bytes || !len)
        return gen_fail(err, MK_EINVAL, "mk_token_bytes: bad arguments");
    return rt_tokenizer_bytes(m->tokenizer, token, bytes, len, &special, err);
}

int mk_token_is_end(const struct mk_model *m, int32_t token)
{
    for (int i = 0; m && i < m->model.n_end; i++)
        if (m->model.end[i] == token)
            return 1;
    return 0;
}

/* ---- Contexts ------------------------------------------------------------ */

/* The part that computes. */
static int make_backend(struct mk_context *c, struct mk_err *err)
{
    struct mk_model *m = c->model;
    const double start = now_s();
    int rc;

    pthread_mutex_lock(&m->making);
    if (m->engine)
        rc = rt_session_make(m->engine, c->length, &c->session, err);
    else
        rc = rt_cpu_make(&m->model, m->weights, resident_type(m), 1, c->length, m->options.threads,
                         &c->cpu, err);
    pthread_mutex_unlock(&m->making);
    c->stats.load_s = now_s() - start;
    return rc;
}

int mk_context_make(struct mk_model *m, int length, struct mk_context **out, struct mk_err *err)
{
    struct mk_context *c = NULL;
    int rc;

    if (!out)
        return gen_fail(err, MK_EINVAL, "mk_context_make: out is NULL");
    *out = NULL;
    if (!m)
        return gen_fail(err, MK_EINVAL, "mk_context_make: no model");
    if (length < 0 || length > m->model.max_context)
        return gen_fail(err, MK_EINVAL, "context is %d; %s takes 1..%d tokens", length,
                        m->model.name, m->model.max_context);
    c = calloc(1, sizeof *c);
    if (!c)
        return gen_fail(err, MK_ENOMEM, "no memory for a context");
    c->model = m;
    c->length = length;
    if (!length)
        c->length = m->model.max_context < DEFAULT_CONTEXT ? m->model.max_context : DEFAULT_CONTEXT;
    c->tokens = calloc((size_t)c->length, sizeof *c->tokens);
    if (!c->tokens)
        rc = gen_fail(err, MK_ENOMEM, "no memory for a context of %d tokens", c->length);
    else
        rc = make_backend(c, err);
    if (rc)
        mk_context_free(c);
    else
        *out = c;
    return rc;
}

void mk_context_free(struct mk_context *c)
{
    if (!c)
        return;
    rt_session_free(c->session);
    rt_cpu_free(c->cpu);
    free(c->tokens);
    free(c);
}

int mk_context_length(const struct mk_context *c)
{
    return c ? c->length : 0;
}

int mk_context_used(const struct mk_context *c)
{
    return c ? c->used : 0;
}

const int32_t *mk_context_tokens(const struct mk_context *c)
{
    return c ? c->tokens : NULL;
}

/* In this order, and take_cancel in the other: a cancel in the middle of that is seen. */
void mk_cancel(struct mk_context *c)
{
    if (!c)
        return;
    __atomic_store_n(&c->canceled, 1, __ATOMIC_SEQ_CST);
    if (c->session)
        rt_session_cancel(c->session);
}

/* 1 if a cancel came since the last time; it is used up by this. */
static int take_cancel(struct mk_context *c)
{
    if (c->session)
        rt_session_cancelled(c->session);
    return __atomic_exchange_n(&c->canceled, 0, __ATOMIC_SEQ_CST);
}

/* First step of a call on C: MK_ECANCELED if a cancel came before it. */
static int begin_call(struct mk_context *c, struct mk_err *err)
{
    return take_cancel(c) ? gen_fail(err, MK_ECANCELED, "canceled") : 0;
}

/* Last step of a call that gives RC: the cancel that ended it does not end the next one too. */
static int end_call(struct mk_context *c, int rc)
{
    if (rc == MK_ECANCELED)
        take_cancel(c);
    return rc;
}

int mk_truncate(struct mk_context *c, int n, struct mk_err *err)
{
    if (!c)
        return gen_fail(err, MK_EINVAL, "mk_truncate: no context");
    if (n < 0 || n > c->used)
        return gen_fail(err, MK_EINVAL, "mk_truncate: %d is not in 0..%d", n, c->used);
    if (n < c->used)
        c->utf8.n = 0;
    c->used = n;
    if (c->computed > n)
        c->computed = n;
    return 0;
}

/* ---- Computing ----------------------------------------------------------- */

/* Blocks of prefill on the CPU, so that a cancel is seen between them. */
enum { CPU_BLOCK = 64 };

static int cpu_prefill(struct mk_context *c, int n, struct mk_err *err)
{
    const int from = c->computed;
    int rc = 0;

    while (rc == 0 && c->computed < from + n) {
        const int block = from + n - c->computed < CPU_BLOCK ? from + n - c->computed : CPU_BLOCK;
        rc = rt_cpu_run(c->cpu, c->tokens + c->computed, block, c->computed, NULL, 0,
                        &c->canceled, err);
        if (rc == 0)
            c->computed += block;
        if (rc == 0 && c->model->options.progress)
            c->model->options.progress(c->model->options.user, "prefill",
                                       (double)(c->computed - from) / n);
    }
    return rc;
}

/* Compute all tokens but the last. */
static int prefill(struct mk_context *c, struct mk_err *err)
{
    const int from = c->computed, n = c->used - 1 - from;
    const double start = now_s();
    int rc, done = 0;

    if (n <= 0)
        return 0;
    if (c->session) {
        rc = rt_session_prefill(c->session, c->tokens + c->computed, n, c->computed, &done, err);
        c->computed += done;
    } else {
        rc = cpu_prefill(c, n, err);
    }
    c->stats.prefill_tokens += c->computed - from;
    c->stats.prefill_s += now_s() - start;
    return rc;
}

int mk_append(struct mk_context *c, const int32_t *tokens, int n, struct mk_err *err)
{
    int rc;

    if (!c)
        return gen_fail(err, MK_EINVAL, "mk_append: no context");
    if (n < 0 || (n && !tokens))
        return gen_fail(err, MK_EINVAL, "mk_append: %d tokens", n);
    if (n > c->length - c->used)
        return gen_fail(err, MK_ECONTEXT,
                        "%d tokens are %d too many: the context holds %d and has %d", n,
                        n - (c->length - c->used), c->length, c->used);
    for (int i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= c->model->model.V)
            return gen_fail(err, MK_EINVAL, "token %d is %d; %s has ids 0..%d", i, (int)tokens[i],
                            c->model->model.name, c->model->model.V - 1);
    c->call_start = now_s();
    c->stats.prefill_tokens = 0;
    c->stats.prefill_s = 0;
    if (n) {
        memcpy(c->tokens + c->used, tokens, (size_t)n * sizeof *tokens);
        c->utf8.n = 0;
    }
    c->used += n;
    rc = begin_call(c, err);
    return rc ? rc : end_call(c, prefill(c, err));
}

int mk_logits(struct mk_context *c, float *logits, struct mk_err *err)
{
    int rc, done;

    if (!c || !logits)
        return gen_fail(err, MK_EINVAL, "mk_logits: no %s", c ? "place for the logits" : "context");
    if (!c->used)
        return gen_fail(err, MK_EINVAL, "mk_logits: the context is empty");
    rc = begin_call(c, err);
    if (rc == 0)
        rc = prefill(c, err);
    if (rc == 0 && c->session) {
        const struct rt_decode job = {
            .token = c->tokens[c->used - 1], .pos = c->used - 1, .n = 1, .logits = logits};
        rc = rt_session_decode(c->session, &job, &done, err);
    } else if (rc == 0) {
        rc = rt_cpu_run(c->cpu, c->tokens + c->used - 1, 1, c->used - 1, logits, 0,
                        &c->canceled, err);
    }
    if (rc == 0)
        c->computed = c->used;
    return end_call(c, rc);
}

/* ---- Generating ---------------------------------------------------------- */

struct generation {
    struct mk_context *c;
    mk_token_fn *fn;
    void *user;
    char *text;             /* room for one token's text */
    size_t text_cap;
    int n;                  /* new tokens */
    int out_of_memory;
    double start, first;
};

/* What is left of TOKEN in whole UTF-8; its length. */
static size_t token_text(struct generation *g, int32_t token)
{
    const char *bytes;
    size_t len, n;
    int special;
    char *text;

    g->text[0] = 0;
    if (!g->c->model->tokenizer ||
        rt_tokenizer_bytes(g->c->model->tokenizer, token, &bytes, &len, &special, NULL) || special)
        return 0;
    if (3 * (len + 4) + 1 > g->text_cap) {
        text = realloc(g->text, 3 * (len + 4) + 1);
        if (!text) {
            g->out_of_memory = 1;
            return 0;
        }
        g->text = text;
        g->text_cap = 3 * (len + 4) + 1;
    }
    n = rt_utf8_push(&g->c->utf8, bytes, len, g->text);
    g->text[n] = 0;
    return n;
}

/* A new token: into the context, and on to the caller. */
static int take_token(void *user, int32_t token)
{
    struct generation *g = user;
    struct mk_context *c = g->c;
    size_t len;

    if (!g->n++)
        g->first = now_s();
    c->computed = c->used;      /* the token that was the input */
    c->tokens[c->used++] = token;
    len = token_text(g, token);
    if (g->out_of_memory)
        return 1;
    return g->fn ? g->fn(g->user, token, g->text, len) : 0;
}

/* Below this the most likely token wins anyway, and logits / temperature might overflow. */
static const float COLDEST = 1e-4f, HOTTEST = 1e6f;

static int check_sampling(const struct mk_context *c, const struct mk_sampling *s,
                          struct mk_err *err)
{
    const int V = c->model->model.V;

    if (s->size != sizeof *s)
        return gen_fail(err, MK_EINVAL, "mk_generate: sampling.size is %zu, not %zu", s->size,
                        sizeof *s);
    if (!(s->temperature >= 0 && s->temperature <= HOTTEST))
        return gen_fail(err, MK_EINVAL, "temperature is %g; it must be in 0..%.0f",
                        (double)s->temperature, (double)HOTTEST);
    if (s->top_k < 0 || s->top_k > V)
        return gen_fail(err, MK_EINVAL, "top_k is %d; it must be in 0..%d", s->top_k, V);
    if (!(s->top_p > 0 && s->top_p <= 1))
        return gen_fail(err, MK_EINVAL, "top_p is %g; it must be above 0 and at most 1",
                        (double)s->top_p);
    if (s->max_tokens < 0)
        return gen_fail(err, MK_EINVAL, "max_tokens is %d; it must be 0 or more", s->max_tokens);
    if (s->n_stop < 0 || s->n_stop > CALLER_STOPS)
        return gen_fail(err, MK_EINVAL, "n_stop is %d; it must be in 0..%d", s->n_stop,
                        CALLER_STOPS);
    if (s->n_stop && !s->stop)
        return gen_fail(err, MK_EINVAL, "n_stop is %d, and stop is NULL", s->n_stop);
    for (int i = 0; i < s->n_stop; i++)
        if (s->stop[i] < 0 || s->stop[i] >= V)
            return gen_fail(err, MK_EINVAL, "stop id %d is %d; %s has ids 0..%d", i,
                            (int)s->stop[i], c->model->model.name, V - 1);
    return 0;
}

/* The model's end tokens and the caller's. */
static int all_stops(const struct mk_context *c, const struct mk_sampling *s,
                     int32_t stops[MK_STOPS])
{
    const struct gen_model *m = &c->model->model;
    int n = 0;

    for (int i = 0; !s->ignore_end && i < m->n_end; i++)
        stops[n++] = m->end[i];
    for (int i = 0; i < s->n_stop; i++)
        stops[n++] = s->stop[i];
    return n;
}

static int gpu_generate(struct generation *g, const struct mk_sampling *s, int n,
                        struct mk_err *err)
{
    struct mk_context *c = g->c;
    int32_t stops[MK_STOPS];
    const struct rt_decode job = {
        .token = c->tokens[c->used - 1], .pos = c->used - 1, .n = n,
        .temperature = s->temperature, .top_k = s->top_k, .top_p = s->top_p, .seed = s->seed,
        .stop = stops, .n_stop = all_stops(c, s, stops), .token_fn = take_token, .user = g,
    };
    int done;

    return rt_session_decode(c->session, &job, &done, err);
}

static int cpu_generate(struct generation *g, const struct mk_sampling *s, int n,
                        struct mk_err *err)
{
    struct mk_context *c = g->c;
    int32_t stops[MK_STOPS];
    const int n_stop = all_stops(c, s, stops);
    float *logits = malloc((size_t)c->model->model.V * sizeof *logits);
    int rc = logits ? 0 : gen_fail(err, MK_ENOMEM, "no memory for the logits"), stop = 0;

    for (int i = 0; rc == 0 && i < n && !stop; i++) {
        int32_t token;
        rc = rt_cpu_run(c->cpu, c->tokens + c->used - 1, 1, c->used - 1, logits, 0,
                        &c->canceled, err);
        if (rc)
            break;
        token = rt_sample(logits, c->model->model.V, s, c->used);
        stop = take_token(g, token);
        for (int j = 0; j < n_stop; j++)
            stop |= stops[j] == token;
        if (!stop && c->canceled)
            rc = gen_fail(err, MK_ECANCELED, "canceled");
    }
    free(logits);
    return rc;
}

static void note_times(struct generation *g)
{
    struct mk_context *c = g->c;

    c->stats.first_token_s = !g->n ? 0 : g->first - (c->call_start > 0 ? c->call_start : g->start);
    c->stats.decode_tokens = g->n ? g->n - 1 : 0;
    c->stats.decode_s = g->n ? now_s() - g->first : 0;
    c->call_start = 0;
}

/* What is left to do when the arguments of mk_generate are right. */
static int generate(struct generation *g, const struct mk_sampling *s, struct mk_err *err)
{
    struct mk_context *c = g->c;
    const int room = c->length - c->used;
    const int n = s->max_tokens && s->max_tokens < room ? s->max_tokens : room;
    int rc = begin_call(c, err);

    g->text_cap = 64;
    g->text = malloc(g->text_cap);
    if (rc == 0 && !g->text)
        rc = gen_fail(err, MK_ENOMEM, "no memory for text");
    if (rc == 0)
        rc = prefill(c, err);
    if (rc == 0 && n > 0)
        rc = (c->session ? gpu_generate : cpu_generate)(g, s, n, err);
    if (rc == 0 && g->out_of_memory)
        rc = gen_fail(err, MK_ENOMEM, "no memory for text");
    note_times(g);
    free(g->text);
    return end_call(c, rc);
}

int mk_generate(struct mk_context *c, const struct mk_sampling *sampling,
                mk_token_fn *fn, void *user, int *n, struct mk_err *err)
{
    struct mk_sampling s = {.size = sizeof s, .top_p = 1};
    struct generation g = {.c = c, .fn = fn, .user = user, .start = now_s()};
    int rc;

    if (n)
        *n = 0;
    if (!c)
        return gen_fail(err, MK_EINVAL, "mk_generate: no context");
    rc = sampling ? check_sampling(c, sampling, err) : 0;
    if (rc)
        return rc;
    if (!c->used)
        return gen_fail(err, MK_EINVAL, "mk_generate: the context is empty");
    if (sampling)
        s = *sampling;
    if (s.temperature < COLDEST)
        s.temperature = 0;
    rc = generate(&g, &s, err);
    if (n)
        *n = g.n;
    return rc;
}

int mk_context_stats(const struct mk_context *c, struct mk_stats *stats, struct mk_err *err)
{
    if (!c || !stats)
        return gen_fail(err, MK_EINVAL, "mk_context_stats: no %s", c ? "stats" : "context");
    if (stats->size != sizeof *stats)
        return gen_fail(err, MK_EINVAL, "mk_context_stats: stats.size is %zu, not %zu", stats->size,
                        sizeof *stats);
    *stats = c->stats;
    stats->size = sizeof *stats;
    if (c->session) {
        stats->load_s = rt_engine_load_s(c->model->engine);
        stats->kernel_s = rt_session_kernel_s(c->session);
        stats->kernel_from = rt_session_kernel_from(c->session);
    }
    return 0;
}
