/* mk.c - the public API: models, contexts, and the choice between engine.c and cpu.c. */
#include "config.h"

#include <errno.h>
#include <limits.h>
#include <signal.h>
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
    volatile sig_atomic_t canceled;
    struct mk_stats stats;
    double call_start;                  /* of the last mk_append, for first_token_s; 0: none since */
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

    if (o) {
        if (o->size != sizeof *o)
            return gen_fail(err, MK_EINVAL, "mk_open: options.size is %zu, not %zu", o->size, sizeof *o);
        m->options = *o;
    }
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

static int open_engine(struct mk_model *m, struct mk_err *err)
{
    const char *device = m->options.device ? m->options.device : "auto";
    const struct rt_engine_options options = {
        m->options.cubin_path, m->options.plan_file, m->options.set,
        m->options.progress, m->options.warn, m->options.user,
    };
    int rc;

    if (!strcmp(device, "cpu"))
        return 0;
    if (strcmp(device, "gpu") && strcmp(device, "auto"))
        return gen_fail(err, MK_EINVAL, "device is \"%.40s\"; it must be auto, gpu or cpu", device);
    rc = rt_engine_open(&m->model, m->weights, &options, &m->engine, err);
    if (rc == MK_ENOGPU && !strcmp(device, "auto"))
        rc = 0;
    return rc;
}

int mk_open(const char *dir, const struct mk_options *options, struct mk_model **out, struct mk_err *err)
{
    struct mk_model *m = NULL;
    struct stat st;
    int rc;

    if (!out)
        return gen_fail(err, MK_EINVAL, "mk_open: out is NULL");
    *out = NULL;
    if (!dir || !*dir)
        return gen_fail(err, MK_EINVAL, "mk_open: no model folder");
    if (stat(dir, &st) || !S_ISDIR(st.st_mode))
        return gen_fail(err, MK_ENOENT, "%s: %s", dir, errno == ENOENT ? "no such folder" : "not a folder");
    m = calloc(1, sizeof *m);
    if (!m)
        return gen_fail(err, MK_ENOMEM, "mk_open: no memory");
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
    free(m);
}

static int resident_type(const struct mk_model *m)
{
    return m->model.dtype == GEN_FP16 ? GEN_FP16 : GEN_BF16;
}

int mk_model_info(const struct mk_model *m, struct mk_info *info, struct mk_err *err)
{
    if (!m || !info || info->size != sizeof *info)
        return gen_fail(err, MK_EINVAL, "mk_model_info: size is not set");
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
    return gen_fail(err, MK_EINVAL, "%s has no tokenizer.json", m ? m->model.name : "the model");
}

int mk_tokenize(const struct mk_model *m, const char *text, size_t len, int flags,
                int32_t *tokens, size_t cap, size_t *n, struct mk_err *err)
{
    if (need_tokenizer(m, err))
        return MK_EINVAL;
    if ((flags & ~MK_SPECIAL) || (!text && len) || (!tokens && cap) || !n)
        return gen_fail(err, MK_EINVAL, "mk_tokenize: bad arguments");
    return rt_tokenizer_encode(m->tokenizer, text, len, flags & MK_SPECIAL ? MK_SPECIAL | RT_ADD_BOS : 0,
                               tokens, cap, n, err);
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

int mk_token_bytes(const struct mk_model *m, int32_t token, const char **bytes, size_t *len, struct mk_err *err)
{
    int special;

    if (need_tokenizer(m, err))
        return MK_EINVAL;
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

int mk_context_make(struct mk_model *m, int length, struct mk_context **out, struct mk_err *err)
{
    struct mk_context *c = NULL;
    int rc;

    if (!out || !m)
        return gen_fail(err, MK_EINVAL, "mk_context_make: no model");
    *out = NULL;
    if (length < 0 || length > m->model.max_context)
        return gen_fail(err, MK_EINVAL, "context is %d; %s takes 1..%d tokens", length, m->model.name,
                        m->model.max_context);
    c = calloc(1, sizeof *c);
    if (!c)
        return gen_fail(err, MK_ENOMEM, "no memory for a context");
    c->model = m;
    c->length = length ? length : m->model.max_context < DEFAULT_CONTEXT ? m->model.max_context : DEFAULT_CONTEXT;
    c->tokens = calloc((size_t)c->length, sizeof *c->tokens);
    if (!c->tokens)
        rc = gen_fail(err, MK_ENOMEM, "no memory for a context of %d tokens", c->length);
    else if (m->engine)
        rc = rt_session_make(m->engine, c->length, &c->session, err);
    else
        rc = rt_cpu_make(&m->model, m->weights, resident_type(m), 1, c->length, m->options.threads, &c->cpu, err);
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
    return c->length;
}

int mk_context_used(const struct mk_context *c)
{
    return c->used;
}

const int32_t *mk_context_tokens(const struct mk_context *c)
{
    return c->tokens;
}

void mk_cancel(struct mk_context *c)
{
    c->canceled = 1;
    if (c->session)
        rt_session_cancel(c->session);
}

/* 1 and an error if a cancel came; it is used up by this. */
static int take_cancel(struct mk_context *c, struct mk_err *err)
{
    const int was = c->canceled;

    c->canceled = 0;
    if (c->session)
        rt_session_cancelled(c->session);
    return was ? gen_fail(err, MK_ECANCELED, "canceled") : 0;
}

/* The same for a call that ended with RC: a cancel that came too late counts no more. */
static int end_call(struct mk_context *c, int rc, struct mk_err *err)
{
    if (rc == MK_ECANCELED)
        return take_cancel(c, err) ? MK_ECANCELED : rc;
    return rc;
}

int mk_truncate(struct mk_context *c, int n, struct mk_err *err)
{
    if (n < 0 || n > c->used)
        return gen_fail(err, MK_EINVAL, "mk_truncate: %d is not in 0..%d", n, c->used);
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
                        (const volatile int *)&c->canceled, err);
        if (rc == 0)
            c->computed += block;
        if (rc == 0 && c->model->options.progress)
            c->model->options.progress(c->model->options.user, "prefill", (double)(c->computed - from) / n);
    }
    return rc;
}

/* Compute all tokens but the last. */
static int prefill(struct mk_context *c, struct mk_err *err)
{
    const int n = c->used - 1 - c->computed;
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
    c->stats.prefill_tokens += n;
    c->stats.prefill_s += now_s() - start;
    return rc;
}

int mk_append(struct mk_context *c, const int32_t *tokens, int n, struct mk_err *err)
{
    int rc;

    if (n < 0 || (n && !tokens))
        return gen_fail(err, MK_EINVAL, "mk_append: %d tokens", n);
    if (n > c->length - c->used)
        return gen_fail(err, MK_ECONTEXT, "%d tokens are %d too many: the context holds %d and has %d",
                        n, n - (c->length - c->used), c->length, c->used);
    for (int i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= c->model->model.V)
            return gen_fail(err, MK_EINVAL, "token %d is %d; %s has ids 0..%d", i, (int)tokens[i],
                            c->model->model.name, c->model->model.V - 1);
    c->call_start = now_s();
    c->stats.prefill_tokens = 0;
    c->stats.prefill_s = 0;
    if (n)
        memcpy(c->tokens + c->used, tokens, (size_t)n * sizeof *tokens);
    c->used += n;
    rc = take_cancel(c, err);
    return rc ? rc : end_call(c, prefill(c, err), err);
}

int mk_logits(struct mk_context *c, float *logits, struct mk_err *err)
{
    int rc, done;

    if (!c->used)
        return gen_fail(err, MK_EINVAL, "mk_logits: the context is empty");
    rc = take_cancel(c, err);
    if (rc == 0)
        rc = prefill(c, err);
    if (rc == 0 && c->session) {
        const struct rt_decode job = {.token = c->tokens[c->used - 1], .pos = c->used - 1, .n = 1, .logits = logits};
        rc = rt_session_decode(c->session, &job, &done, err);
    } else if (rc == 0) {
        rc = rt_cpu_run(c->cpu, c->tokens + c->used - 1, 1, c->used - 1, logits, 0,
                        (const volatile int *)&c->canceled, err);
    }
    if (rc == 0)
        c->computed = c->used;
    return end_call(c, rc, err);
}

/* ---- Generating ---------------------------------------------------------- */

struct generation {
    struct mk_context *c;
    mk_token_fn *fn;
    void *user;
    struct rt_utf8 utf8;
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
    n = rt_utf8_push(&g->utf8, bytes, len, g->text);
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

static int check_sampling(const struct mk_context *c, const struct mk_sampling *s, struct mk_err *err)
{
    if (s->size != sizeof *s)
        return gen_fail(err, MK_EINVAL, "mk_generate: sampling.size is %zu, not %zu", s->size, sizeof *s);
    if (!(s->temperature >= 0 && s->temperature <= 1e6f))
        return gen_fail(err, MK_EINVAL, "temperature is %g; it must be 0 or more", (double)s->temperature);
    if (s->top_k < 0 || s->top_k > c->model->model.V)
        return gen_fail(err, MK_EINVAL, "top_k is %d; it must be in 0..%d", s->top_k, c->model->model.V);
    if (!(s->top_p > 0 && s->top_p <= 1))
        return gen_fail(err, MK_EINVAL, "top_p is %g; it must be above 0 and at most 1", (double)s->top_p);
    if (s->max_tokens < 0)
        return gen_fail(err, MK_EINVAL, "max_tokens is %d", s->max_tokens);
    if (s->n_stop < 0 || s->n_stop > CALLER_STOPS || (s->n_stop && !s->stop))
        return gen_fail(err, MK_EINVAL, "%d stop ids; at most %d", s->n_stop, CALLER_STOPS);
    return 0;
}

/* The model's end tokens and the caller's. */
static int all_stops(const struct mk_context *c, const struct mk_sampling *s, int32_t stops[MK_STOPS])
{
    const struct gen_model *m = &c->model->model;
    int n = 0;

    for (int i = 0; !s->ignore_end && i < m->n_end; i++)
        stops[n++] = m->end[i];
    for (int i = 0; i < s->n_stop; i++)
        stops[n++] = s->stop[i];
    return n;
}

static int gpu_generate(struct generation *g, const struct mk_sampling *s, int n, struct mk_err *err)
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

static int cpu_generate(struct generation *g, const struct mk_sampling *s, int n, struct mk_err *err)
{
    struct mk_context *c = g->c;
    int32_t stops[MK_STOPS];
    const int n_stop = all_stops(c, s, stops);
    float *logits = malloc((size_t)c->model->model.V * sizeof *logits);
    int rc = logits ? 0 : gen_fail(err, MK_ENOMEM, "no memory for the logits"), stop = 0;

    for (int i = 0; rc == 0 && i < n && !stop; i++) {
        int32_t token;
        rc = rt_cpu_run(c->cpu, c->tokens + c->used - 1, 1, c->used - 1, logits, 0,
                        (const volatile int *)&c->canceled, err);
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

    if (!g->n)
        return;
    c->stats.first_token_s = g->first - (c->call_start > 0 ? c->call_start : g->start);
    c->stats.decode_tokens = g->n - 1;
    c->stats.decode_s = now_s() - g->first;
    c->call_start = 0;
}

int mk_generate(struct mk_context *c, const struct mk_sampling *sampling,
                mk_token_fn *fn, void *user, int *n, struct mk_err *err)
{
    static const struct mk_sampling greedy = {.size = sizeof greedy, .top_p = 1};
    const struct mk_sampling *s = sampling ? sampling : &greedy;
    struct generation g = {.c = c, .fn = fn, .user = user, .start = now_s()};
    const int room = c->length - c->used;
    int rc = check_sampling(c, s, err);

    if (n)
        *n = 0;
    if (rc)
        return rc;
    if (!c->used)
        return gen_fail(err, MK_EINVAL, "mk_generate: the context is empty");
    g.text_cap = 64;
    g.text = malloc(g.text_cap);
    if (!g.text)
        return gen_fail(err, MK_ENOMEM, "no memory for text");
    rc = take_cancel(c, err);
    if (rc == 0)
        rc = prefill(c, err);
    if (rc == 0 && room > 0)
        rc = (c->session ? gpu_generate : cpu_generate)(&g, s, s->max_tokens && s->max_tokens < room
                                                        ? s->max_tokens : room, err);
    if (rc == 0 && g.out_of_memory)
        rc = gen_fail(err, MK_ENOMEM, "no memory for text");
    note_times(&g);
    free(g.text);
    if (n)
        *n = g.n;
    return end_call(c, rc, err);
}

int mk_context_stats(const struct mk_context *c, struct mk_stats *stats, struct mk_err *err)
{
    if (!stats || stats->size != sizeof *stats)
        return gen_fail(err, MK_EINVAL, "mk_context_stats: size is not set");
    *stats = c->stats;
    stats->size = sizeof *stats;
    if (c->session) {
        stats->load_s = rt_engine_load_s(c->model->engine);
        stats->kernel_s = rt_session_kernel_s(c->session);
        stats->kernel_from = rt_session_kernel_from(c->session);
    }
    return 0;
}
