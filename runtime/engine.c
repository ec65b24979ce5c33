/* engine.c - sessions: plan, kernel, buffers, launches.  Packing the weights is in pack.c. */
#include "config.h"

#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "runtime/abi.h"
#include "runtime/cache.h"
#include "runtime/engine.h"
#include "runtime/key.h"
#include "runtime/pack.h"

struct rt_engine {
    const struct gen_model *model;
    const struct rt_weights *weights;
    struct rt_engine_options options;
    struct rt_device *device;
    struct gen_gpu gpu;
    struct rt_packed packed; /* .stream 0: not loaded yet */
    double load_s;
    int told_refused;        /* that the carried plan does not fit */
};

/* What host and device share, page-locked. */
struct mapped {
    uint64_t *ring;  /* [tokens_per_launch] */
    uint32_t *fault; /* [MK_FAULT_WORDS] */
    volatile uint32_t *cancel;
};

struct rt_session {
    struct rt_engine *engine;
    struct gen_plan plan;
    struct gen_plan_source plan_source;
    rt_module module;
    rt_func decode, prefill;
    rt_event launched; /* recorded behind every decode launch: sessions share a stream */
    int kernel_from;
    double kernel_s;
    rt_ptr kv, rope, exchange, logits, tokens, scratch, barrier, laps;
    void *host; /* the mapped memory */
    rt_ptr host_device;
    struct mapped mapped;
    uint32_t launch;
    uint32_t epoch;
    int dead; /* the GPU failed: nothing works any more */
};

static double now_s(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double) t.tv_sec + 1e-9 * (double) t.tv_nsec;
}

/* ---- Engine -------------------------------------------------------------- */

int rt_engine_open(const struct gen_model *m, const struct rt_weights *w,
                   const struct rt_engine_options *options, struct rt_engine **out,
                   struct mk_err *err)
{
    struct rt_engine *e = calloc(1, sizeof *e);
    int rc;

    *out = NULL;
    if (!e)
        return gen_fail(err, MK_ENOMEM, "no memory for an engine");
    e->model = m;
    e->weights = w;
    if (options)
        e->options = *options;
    rc = rt_device_open(e->options.device, 0, &e->device, err);
    if (rc) {
        rt_engine_close(e);
        return rc;
    }
    rt_device_facts(e->device, &e->gpu);
    *out = e;
    return 0;
}

void rt_engine_close(struct rt_engine *e)
{
    if (!e)
        return;
    if (e->device) {
        rt_packed_free(e->device, &e->packed);
        rt_device_close(e->device);
    }
    free(e);
}

struct rt_device *rt_engine_device(const struct rt_engine *e)
{
    return e->device;
}

double rt_engine_load_s(const struct rt_engine *e)
{
    return e->load_s;
}

/* ---- Making a session ---------------------------------------------------- */

static int get_kernel(struct rt_session *s, struct mk_err *err)
{
    struct rt_engine *e = s->engine;
    const double start = now_s();
    struct rt_kernel *kernel = NULL;
    struct rt_key key;
    int rc;

    rc = rt_key_make(&s->plan, s->plan.gpu.arch, &key, err);
    if (rc)
        return rc;
    rc = rt_kernel_get(&key, e->options.cubin_path, e->options.progress, e->options.warn,
                       e->options.user, &kernel, err);
    rt_key_free(&key);
    if (rc)
        return rc;
    s->kernel_from = kernel->from;
    rc = rt_module_load(e->device, kernel->cubin, kernel->size, &s->module, err);
    if (rc == 0)
        rc = rt_module_func(e->device, s->module, "mk_decode", s->plan.smem_bytes, &s->decode, err);
    if (rc == 0)
        rc = rt_module_func(e->device, s->module, "mk_prefill", s->plan.prefill_smem_bytes,
                            &s->prefill, err);
    rt_kernel_free(kernel);
    s->kernel_s = now_s() - start;
    return rc;
}

/* An emulated device knows more: put that behind ERR. */
static int add_report(const struct rt_session *s, int rc, struct mk_err *err)
{
    const char *report = rt_device_report(s->engine->device);

    return err && *report ? gen_fail(err, rc, "%s\n%s", err->text, report) : rc;
}

static int load_weights(struct rt_session *s, struct mk_err *err)
{
    struct rt_engine *e = s->engine;
    const double start = now_s();
    const struct rt_pack_job job = {e->device,  s->module,           &s->plan,
                                    e->weights, e->options.progress, e->options.user};
    int rc;

    if (e->packed.stream)
        return 0;
    rc = rt_pack(&job, &e->packed, err);
    e->load_s = now_s() - start;
    return rc == MK_EDEVICE ? add_report(s, rc, err) : rc;
}

/* Bytes of device memory that this session takes for itself. */
static int64_t session_bytes(const struct gen_plan *p)
{
    return p->kv_bytes + (int64_t) p->context * p->model.E * 4 + (int64_t) p->exchange_words * 16 +
           (int64_t) p->tokens_per_launch * p->model.V * 4 + p->pf_bytes + (1 << 20);
}

/* Refuse early, with what would fit. */
static int check_memory(struct rt_session *s, struct mk_err *err)
{
    const struct gen_plan *p = &s->plan;
    const int64_t weights = s->engine->packed.stream ? 0 : rt_packed_bytes(p);
    const int64_t need = weights + session_bytes(p);
    const int64_t fixed = need - p->kv_bytes - (int64_t) p->context * p->model.E * 4;
    const int64_t row = p->kv_bytes / p->context + p->model.E * 4;
    size_t free_bytes, total;
    int64_t fit;

    rt_device_memory(s->engine->device, &free_bytes, &total);
    if ((int64_t) free_bytes >= need)
        return 0;
    fit = ((int64_t) free_bytes - fixed) / row;
    if (fit < 1)
        return gen_fail(err, MK_ENOMEM,
                        "%s needs %.2f GB of device memory without a KV cache; %s has %.2f GB free",
                        p->model.name, (double) fixed / 1e9, rt_device_name(s->engine->device),
                        (double) free_bytes / 1e9);
    return gen_fail(err, MK_ENOMEM,
                    "%s with a context of %d needs %.2f GB of device memory; %s has %.2f GB free, "
                    "enough for a context of %lld",
                    p->model.name, p->context, (double) need / 1e9,
                    rt_device_name(s->engine->device), (double) free_bytes / 1e9, (long long) fit);
}

/* cos and sin of every position, as Hugging Face computes them: the angle in float. */
static int make_rope(struct rt_session *s, struct mk_err *err)
{
    const struct gen_plan *p = &s->plan;
    const int half = p->model.E / 2;
    const size_t bytes = (size_t) p->context * (size_t) half * 2 * sizeof(float);
    float *table = malloc(bytes);
    int rc;

    if (!table)
        return gen_fail(err, MK_ENOMEM, "no memory for the table of rotary angles");
    for (int i = 0; i < half; i++) {
        const float freq = gen_model_inv_freq(&p->model, i);
        for (int pos = 0; pos < p->context; pos++) {
            const float angle = (float) pos * freq;
            table[((size_t) pos * (size_t) half + (size_t) i) * 2] = cosf(angle);
            table[((size_t) pos * (size_t) half + (size_t) i) * 2 + 1] = sinf(angle);
        }
    }
    rc = rt_device_put(s->engine->device, s->rope, table, bytes, err);
    if (rc == 0)
        rc = rt_device_sync(s->engine->device, err);
    free(table);
    return rc;
}

static int make_mapped(struct rt_session *s, struct mk_err *err)
{
    const size_t ring = (size_t) s->plan.tokens_per_launch * 8;
    int rc = rt_device_alloc_host(s->engine->device, ring + 128, &s->host, &s->host_device, err);

    if (rc)
        return rc;
    memset(s->host, 0, ring + 128);
    s->mapped.ring = s->host;
    s->mapped.fault = (uint32_t *) ((char *) s->host + ring);
    s->mapped.cancel = (volatile uint32_t *) ((char *) s->host + ring + 64);
    return 0;
}

/* ---- Buffers ------------------------------------------------------------- */

/* What an emulated device's reports say about an offset; USER is the plan. */

static void exchange_text(void *user, uint64_t offset, char *out, size_t size)
{
    gen_hop_describe(user, (int) (offset / 16), out, size);
}

/* Tiles of positions, keys and then values of each; blocks of 8 positions x 8 elements in both. */
static void kv_text(void *user, uint64_t offset, char *out, size_t size)
{
    const struct gen_plan *p = user;
    const int64_t keys = (int64_t) p->kv_tile * p->model.E, strip = 8 * p->model.E;
    const int64_t layer = (int64_t) offset / 2, head = layer % p->kv_layer, at = head % p->kv_head;
    const int64_t pos = at / (2 * keys) * p->kv_tile + at % keys / strip * 8 + at % 64 / 8;

    snprintf(out, size, "layer %lld, KV head %lld, %s of position %lld, element %lld",
             (long long) (layer / p->kv_layer), (long long) (head / p->kv_head),
             at % (2 * keys) < keys ? "key" : "value", (long long) pos,
             (long long) (at % strip / 64 * 8 + at % 8));
}

static void logits_text(void *user, uint64_t offset, char *out, size_t size)
{
    const struct gen_plan *p = user;
    const long long at = (long long) offset / 4;

    snprintf(out, size, "token %lld of the launch, id %lld", at / p->model.V, at % p->model.V);
}

static void stream_text(void *user, uint64_t offset, char *out, size_t size)
{
    const struct gen_plan *p = user;
    const int cta = (int) ((int64_t) offset / p->cta_bytes);
    const long long at = (long long) offset % p->cta_bytes, layers = at - p->layers_offset;
    const int64_t layer_bytes = gen_plan_class(p, cta / p->group)->layer_bytes;

    if (layers < 0)
        snprintf(out, size, "CTA %d, head, byte %lld", cta, at);
    else
        snprintf(out, size, "CTA %d, layer %lld, byte %lld", cta, layers / layer_bytes,
                 layers % layer_bytes);
}

static void scratch_text(void *user, uint64_t offset, char *out, size_t size)
{
    const struct gen_plan *p = user;
    const int64_t at = (int64_t) offset;
    const char *part = at < p->pf_x ? "residual" : at < p->pf_qkv ? "activations" : "QKV";
    const int64_t start = at < p->pf_x ? p->pf_resid : at < p->pf_qkv ? p->pf_x : p->pf_qkv;

    snprintf(out, size, "%s, byte %lld", part, (long long) (at - start));
}

/* Device memory of a session. */
enum { BUFFERS = 8 };
struct buffer {
    rt_ptr *at;
    size_t bytes;
    const char *name;
    rt_label_fn *text;
};

static size_t laps_bytes(const struct gen_plan *p)
{
    return (size_t) p->ctas * MK_LAP_COUNT * 2 * sizeof(uint64_t);
}

static void list_buffers(struct rt_session *s, struct buffer list[BUFFERS])
{
    const struct gen_plan *p = &s->plan;
    const size_t tokens =
        (size_t) (p->prefill_tokens > p->tokens_per_launch ? p->prefill_tokens
                                                           : p->tokens_per_launch);
    const size_t logits = (size_t) p->tokens_per_launch * (size_t) p->model.V * 4;
    const struct buffer all[BUFFERS] = {
        {&s->kv, (size_t) p->kv_bytes, "KV cache", kv_text},
        {&s->rope, (size_t) p->context * (size_t) p->model.E * 4, "rotary angles", NULL},
        {&s->exchange, (size_t) p->exchange_words * 16, "exchange", exchange_text},
        {&s->logits, logits, "logits", logits_text},
        {&s->tokens, tokens * 4, "tokens", NULL},
        {&s->scratch, (size_t) p->pf_bytes, "prefill scratch", scratch_text},
        {&s->barrier, 128, "grid barrier", NULL},
        {&s->laps, laps_bytes(p), "laps", NULL},
    };

    memcpy(list, all, sizeof all);
}

/* Give what the kernel sees names for an emulated device's reports, or take them away. */
static void label(struct rt_session *s, int on)
{
    struct rt_device *d = s->engine->device;
    const struct rt_packed *w = &s->engine->packed;
    const struct gen_plan *p = &s->plan;
    const size_t ring = (size_t) p->tokens_per_launch * 8;
    const struct {
        rt_ptr at;
        int64_t bytes;
        const char *name;
        rt_label_fn *text;
    } others[] = {
        {w->stream, p->stream_bytes, "weight streams", stream_text},
        {w->embed, p->embed_bytes, "embedding", NULL},
        {w->vec, p->vec_floats * 4, "norms and biases", NULL},
        {s->host_device, (int64_t) ring, "token ring", NULL},
        {s->host_device + ring, 64, "fault words", NULL},
        {s->host_device + ring + 64, 64, "cancel word", NULL},
    };
    struct buffer buffers[BUFFERS];

    if (!s->host)
        return;
    list_buffers(s, buffers);
    for (size_t i = 0; i < BUFFERS; i++)
        rt_device_label(d, *buffers[i].at, on ? buffers[i].bytes : 0, buffers[i].name,
                        buffers[i].text, &s->plan);
    /* Sessions share the weights: the names of the last one stay, or none. */
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        rt_device_label(d, others[i].at, 0, others[i].name, NULL, NULL);
        if (on)
            rt_device_label(d, others[i].at, (uint64_t) others[i].bytes, others[i].name,
                            others[i].text, &s->plan);
    }
}

/* Fill the exchange with what no launch sends: a tag that take_epochs never gives, and values
   that are not numbers. */
static int poison_exchange(struct rt_session *s, struct mk_err *err)
{
    return rt_device_set(s->engine->device, s->exchange, 0xff, (size_t) s->plan.exchange_words * 16,
                         err);
}

static int make_buffers(struct rt_session *s, struct mk_err *err)
{
    struct rt_device *d = s->engine->device;
    struct buffer buffers[BUFFERS];
    int rc = 0;

    list_buffers(s, buffers);
    for (size_t i = 0; rc == 0 && i < BUFFERS; i++)
        rc = rt_device_alloc(d, buffers[i].bytes, buffers[i].at, err);
    if (rc == 0)
        rc = poison_exchange(s, err);
    if (rc == 0)
        rc = rt_device_set(d, s->laps, 0, laps_bytes(&s->plan), err);
    if (rc == 0)
        rc = rt_event_make(d, &s->launched, err);
    if (rc == 0)
        rc = make_mapped(s, err);
    if (rc == 0)
        label(s, 1);
    return rc ? rc : make_rope(s, err);
}

/* ---- Sessions ------------------------------------------------------------ */

static int choose_plan(struct rt_session *s, int context, struct mk_err *err)
{
    struct rt_engine *e = s->engine;
    struct gen_plan_source *source = &s->plan_source;
    char text[4096];
    const int rc = gen_plan_choose(e->model, &e->gpu, context, e->options.plan_file, e->options.set, &s->plan,
                                   source, err);

    if (source->refused.code && e->options.warn && !e->told_refused) {
        snprintf(text, sizeof text, "the plan carried for %s on %s is not used: %.3000s",
                 e->model->name, e->gpu.name, source->refused.text);
        e->options.warn(e->options.user, text);
        e->told_refused = 1;
    }
    return rc;
}

static int choose_kernel(struct rt_session *s, int context, struct mk_err *err)
{
    int rc = choose_plan(s, context, err);

    if (rc == 0)
        rc = check_memory(s, err);
    return rc ? rc : get_kernel(s, err);
}

/* Say that a kernel for fewer clusters was taken. */
static void warn_fewer(const struct rt_session *s, int had)
{
    const struct rt_engine *e = s->engine;
    char text[512];

    if (!e->options.warn)
        return;
    if (s->plan.cluster)
        snprintf(text, sizeof text, "no pack has the kernel of %s for %d clusters of %d CTAs; the one for "
                 "%d is used", e->model->name, had, s->plan.group, s->plan.groups);
    else
        snprintf(text, sizeof text, "no pack has the kernel of %s for %d clusters, or for fewer; the one "
                 "without is used", e->model->name, had);
    e->options.warn(e->options.user, text);
}

/* Nothing here can compile, and no pack has a kernel for as many clusters as this GPU holds: parts
   of one product differ in that.  Take the one for the most clusters that fit, or the one without.
   If there is none either, the first error, which is in ERR, stays. */
static int choose_smaller_kernel(struct rt_session *s, int context, struct mk_err *err)
{
    struct gen_gpu *gpu = &s->engine->gpu;
    const struct gen_gpu all = *gpu;
    const int had = s->plan.groups;
    int rc = MK_ETOOL, more = 1;
    struct mk_err why;

    while (more && (rc == MK_ETOOL || rc == MK_EINVAL)) {
        more = 0;
        for (int i = 1; i < 5; i++)
            more |= gpu->clusters[i] > 0 && --gpu->clusters[i] > 0;
        rc = choose_kernel(s, context, &why);
    }
    if (rc == 0) {
        warn_fewer(s, had);
        return 0;
    }
    *gpu = all;
    if (rc == MK_ETOOL || rc == MK_EINVAL)
        return MK_ETOOL;
    if (err)
        *err = why;
    return rc;
}

int rt_session_make(struct rt_engine *e, int context, struct rt_session **out, struct mk_err *err)
{
    struct rt_session *s = calloc(1, sizeof *s);
    int rc;

    *out = NULL;
    if (!s)
        return gen_fail(err, MK_ENOMEM, "no memory for a session");
    s->engine = e;
    rc = choose_kernel(s, context, err);
    if (rc == MK_ETOOL && s->plan.cluster && !e->packed.stream)
        rc = choose_smaller_kernel(s, context, err);
    s->epoch = s->plan.epoch0;
    if (rc == 0)
        rc = load_weights(s, err);
    if (rc == 0)
        rc = make_buffers(s, err);
    if (rc)
        rt_session_free(s);
    else
        *out = s;
    return rc;
}

void rt_session_free(struct rt_session *s)
{
    struct buffer buffers[BUFFERS];
    struct rt_device *d;

    if (!s)
        return;
    d = s->engine->device;
    label(s, 0);
    list_buffers(s, buffers);
    for (size_t i = 0; i < BUFFERS; i++)
        rt_device_free(d, *buffers[i].at);
    rt_device_free_host(d, s->host);
    rt_event_free(d, s->launched);
    rt_module_free(d, s->module);
    free(s);
}

const struct gen_plan *rt_session_plan(const struct rt_session *s)
{
    return &s->plan;
}

const struct gen_plan_source *rt_session_plan_source(const struct rt_session *s)
{
    return &s->plan_source;
}

int rt_session_kernel_from(const struct rt_session *s)
{
    return s->kernel_from;
}

double rt_session_kernel_s(const struct rt_session *s)
{
    return s->kernel_s;
}

/* The cancel word: any but 0 ends the launch; ENOUGH is not a caller's cancel. */
enum { ENOUGH = 2 };

static void exchange_cancel(struct rt_session *s, uint32_t from, uint32_t to)
{
    __atomic_compare_exchange_n(s->mapped.cancel, &from, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

void rt_session_cancel(struct rt_session *s)
{
    *s->mapped.cancel = 1;
}

int rt_session_cancelled(struct rt_session *s)
{
    const int was = *s->mapped.cancel != 0;

    *s->mapped.cancel = 0;
    return was;
}

/* ---- Launches ------------------------------------------------------------ */

/* The address at which the device sees WHERE in the mapped memory. */
static uint64_t on_device(const struct rt_session *s, const volatile void *where)
{
    return s->host_device +
           (uint64_t) ((const volatile char *) where - (const volatile char *) s->host);
}

static void common_args(const struct rt_session *s, struct mk_args *a)
{
    memset(a, 0, sizeof *a);
    a->stream = s->engine->packed.stream;
    a->embed = s->engine->packed.embed;
    a->vec = s->engine->packed.vec;
    a->rope = s->rope;
    a->kv = s->kv;
    a->exchange = s->exchange;
    a->logits = s->logits;
    a->ring = on_device(s, s->mapped.ring);
    a->fault = on_device(s, s->mapped.fault);
    a->cancel = on_device(s, s->mapped.cancel);
    a->scratch = s->scratch;
    a->barrier = s->barrier;
    a->laps = s->laps;
}

/* The device failed: if a watchdog wrote down why, say that instead. */
static int device_failed(struct rt_session *s, int rc, struct mk_err *err)
{
    static const char *const stages[] = {
        "?",
        "the weight ring",
        "hop QKV",
        "hop PART",
        "hop O",
        "hop MLP",
        "hop DOWN",
        "hop X",
        "hop BEST",
        "hop COUNT",
        "the grid barrier of prefill",
        "hop TEAM",
    };
    const volatile uint32_t *fault = s->mapped.fault;
    const uint32_t stage = fault[MK_FAULT_STAGE];

    s->dead = 1;
    if (!fault[MK_FAULT_CODE])
        return add_report(s, rc, err);
    gen_fail(err, MK_EDEVICE,
             "the kernel of %s made no progress: CTA %u waits at %s for %u and sees %u",
             s->plan.model.name, fault[MK_FAULT_CTA],
             stages[stage < sizeof stages / sizeof *stages ? stage : 0],
             fault[MK_FAULT_EXPECTED], fault[MK_FAULT_SEEN]);
    return add_report(s, MK_EDEVICE, err);
}

static int dead(struct mk_err *err)
{
    return gen_fail(err, MK_EDEVICE, "the GPU failed in an earlier call; close the model");
}

static int launch(struct rt_session *s, rt_func f, int grid, int block, int smem, int cluster,
                  struct mk_args *a, struct mk_err *err)
{
    void *params[] = {a};

    return rt_launch(s->engine->device, f, grid, block, smem, 1, cluster, params, err);
}

int rt_session_prefill(struct rt_session *s, const int32_t *tokens, int n, int pos, int *done,
                       struct mk_err *err)
{
    struct rt_device *d = s->engine->device;
    struct mk_args a;
    int rc = 0;

    *done = 0;
    if (s->dead)
        return dead(err);
    common_args(s, &a);
    a.tokens = s->tokens;
    while (*done < n) {
        const int chunk = n - *done < s->plan.prefill_tokens ? n - *done : s->plan.prefill_tokens;
        if (*s->mapped.cancel)
            return gen_fail(err, MK_ECANCELED, "canceled");
        a.pos = pos + *done;
        a.n = chunk;
        rc = rt_device_put(d, s->tokens, tokens + *done, (size_t) chunk * 4, err);
        if (rc == 0)
            rc = rt_device_set(d, s->barrier, 0, 4, err);
        if (rc == 0)
            rc = launch(s, s->prefill, s->plan.prefill_ctas, 256, s->plan.prefill_smem_bytes, 0, &a, err);
        if (rc == 0 && (rc = rt_device_sync(d, err)) != 0)
            return device_failed(s, rc, err);
        if (rc)
            return rc;
        *done += chunk;
        if (s->engine->options.progress)
            s->engine->options.progress(s->engine->options.user, "prefill", (double) *done / n);
    }
    return rc;
}

/* Tags of N tokens; the first tag of the launch in *EPOCH. */
static int take_epochs(struct rt_session *s, int n, uint32_t *epoch, struct mk_err *err)
{
    const uint32_t tags = (uint32_t) n * MK_TOKEN_TAGS((uint32_t) s->plan.model.L);
    int rc = 0;

    if (s->epoch + tags > 0x80000000u) { /* long before they wrap: start over from clean buffers */
        rc = poison_exchange(s, err);
        s->epoch = 1;
    }
    *epoch = s->epoch;
    s->epoch += tags;
    return rc;
}

/* Wait for token I of launch LAUNCH: 1 and the token, or 0 when the launch ended before it. */
static int await_token(struct rt_session *s, int i, int32_t *token, struct mk_err *err)
{
    const volatile uint64_t *slot = s->mapped.ring + i;
    int ended = 0;

    for (unsigned polls = 1;; polls++) {
        const uint64_t v = *slot;
        if (v >> 32 == s->launch) {
            *token = (int32_t) (uint32_t) v;
            return 1;
        }
        if (ended)
            return 0;
        if (polls % 1024 == 0) {
            ended = rt_event_done(s->engine->device, s->launched, err);
            if (ended < 0)
                return device_failed(s, ended, err);
            sched_yield();
        }
    }
}

static int is_stop(const struct rt_decode *job, int32_t token)
{
    for (int i = 0; i < job->n_stop; i++)
        if (job->stop[i] == token)
            return 1;
    return 0;
}

/* One launch of up to N tokens; *GOT tokens were told of; *STOP: the run is over, 1 by an end token,
   2 by token_fn, 3 by a cancel. */
static int decode_launch(struct rt_session *s, const struct rt_decode *job, struct mk_args *a,
                         int *got, int *stop, int32_t *last, struct mk_err *err)
{
    struct rt_device *d = s->engine->device;
    int rc, more = 0;

    *got = 0;
    a->launch = ++s->launch;
    rc = take_epochs(s, a->n, &a->epoch, err);
    if (rc == 0 && job->forced)
        rc = rt_device_put(d, s->tokens, job->forced, (size_t) a->n * 4, err);
    if (rc == 0)
        rc = launch(s, s->decode, s->plan.ctas, s->plan.block_threads, s->plan.smem_bytes,
                    s->plan.cluster ? s->plan.group : 0, a, err);
    if (rc == 0)
        rc = rt_event_record(d, s->launched, err);
    if (rc)
        return rc;
    for (int i = 0; i < a->n && !*stop && (more = await_token(s, i, last, err)) == 1; i++) {
        ++*got;
        if (is_stop(job, *last))
            *stop = 1;
        if (job->token_fn && job->token_fn(job->user, *last)) {
            exchange_cancel(s, 0, ENOUGH); /* it ends soon; what it makes on top is dropped */
            *stop = 2;
        }
    }
    if (more < 0)
        return more;
    if (!*stop && !more)
        *stop = 3; /* the cancel word */
    rc = rt_device_sync(d, err);
    exchange_cancel(s, ENOUGH, 0);
    return rc ? device_failed(s, rc, err) : 0;
}

int rt_session_decode(struct rt_session *s, const struct rt_decode *job, int *done,
                      struct mk_err *err)
{
    const int V = s->plan.model.V;
    struct rt_decode part = *job;
    struct mk_args a;
    int rc = 0, stop = 0, got;
    int32_t last = job->token;

    *done = 0;
    if (s->dead)
        return dead(err);
    common_args(s, &a);
    a.temperature = job->temperature;
    a.top_k = job->top_k;
    a.top_p = job->top_p;
    a.seed = job->seed;
    a.n_stop = job->n_stop;
    a.tokens = job->forced ? s->tokens : 0;
    a.logits_stride = job->logits ? (uint64_t) V : 0;
    if (job->n_stop)
        memcpy(a.stop, job->stop, (size_t) job->n_stop * sizeof *job->stop);
    while (rc == 0 && *done < job->n && !stop) {
        if (*s->mapped.cancel)
            return gen_fail(err, MK_ECANCELED, "canceled");
        a.token = job->forced ? job->forced[*done] : last;
        a.pos = job->pos + *done;
        a.n =
            job->n - *done < s->plan.tokens_per_launch ? job->n - *done : s->plan.tokens_per_launch;
        part.forced = job->forced ? job->forced + *done : NULL;
        rc = decode_launch(s, &part, &a, &got, &stop, &last, err);
        if (rc == 0 && job->logits && got)
            rc = rt_device_get(s->engine->device, job->logits + (size_t) *done * (size_t) V,
                               s->logits, (size_t) got * (size_t) V * 4, err);
        if (rc == 0 && job->logits)
            rc = rt_device_sync(s->engine->device, err);
        *done += got;
        if (rc == 0 && stop == 3)
            return gen_fail(err, MK_ECANCELED, "canceled");
    }
    return rc;
}

int rt_session_laps(struct rt_session *s, uint64_t *laps, struct mk_err *err)
{
    const size_t bytes = laps_bytes(&s->plan);
    int rc = rt_device_get(s->engine->device, laps, s->laps, bytes, err);

    if (rc == 0)
        rc = rt_device_set(s->engine->device, s->laps, 0, bytes, err);
    return rc ? rc : rt_device_sync(s->engine->device, err);
}

/* ---- For checks ----------------------------------------------------------- */

/* Rows of the cache, and the whole tiles that they lie in. */
struct kv_rows {
    rt_ptr at;
    size_t bytes;
    uint16_t *tiles;
    int tile, E, which, first, n; /* FIRST: from the first tile's first position */
};

static int kv_rows_get(const struct rt_session *s, int layer, int head, struct kv_rows *r, int pos,
                       struct mk_err *err)
{
    const struct gen_plan *p = &s->plan;
    const int64_t tile0 = pos / p->kv_tile, tiles = (pos + r->n - 1) / p->kv_tile + 1 - tile0;
    const int64_t elems = (int64_t) p->kv_tile * p->model.E * 2; /* of a tile */
    int rc;

    r->tile = p->kv_tile;
    r->E = p->model.E;
    r->first = pos % p->kv_tile;
    r->at = s->kv + 2 * (uint64_t) (layer * p->kv_layer + head * p->kv_head + tile0 * elems);
    r->bytes = (size_t) (tiles * elems) * 2;
    r->tiles = malloc(r->bytes);
    if (!r->tiles)
        return gen_fail(err, MK_ENOMEM, "no memory for rows of the KV cache");
    rc = rt_device_get(s->engine->device, r->tiles, r->at, r->bytes, err);
    return rc ? rc : rt_device_sync(s->engine->device, err);
}

/* 8 elements of row I, from element E on; as kv_at in templates/place.cu.m4. */
static uint16_t *kv_piece(const struct kv_rows *r, int i, int e)
{
    const size_t pos = (size_t) (r->first + i), half = (size_t) r->tile * (size_t) r->E;

    return r->tiles + (pos / (size_t) r->tile * 2 + (size_t) r->which) * half +
           pos % (size_t) r->tile / 8 * (size_t) (8 * r->E) + (size_t) (e / 8 * 64) + pos % 8 * 8;
}

int rt_session_kv_get(struct rt_session *s, int layer, int head, int which, int pos, int n,
                      uint16_t *rows, struct mk_err *err)
{
    struct kv_rows r = {.which = which, .n = n};
    int rc = kv_rows_get(s, layer, head, &r, pos, err);

    for (int i = 0; rc == 0 && i < n; i++)
        for (int e = 0; e < r.E; e += 8, rows += 8)
            memcpy(rows, kv_piece(&r, i, e), 16);
    free(r.tiles);
    return rc;
}

int rt_session_kv_put(struct rt_session *s, int layer, int head, int which, int pos, int n,
                      const uint16_t *rows, struct mk_err *err)
{
    struct kv_rows r = {.which = which, .n = n};
    int rc = kv_rows_get(s, layer, head, &r, pos, err);

    for (int i = 0; rc == 0 && i < n; i++)
        for (int e = 0; e < r.E; e += 8, rows += 8)
            memcpy(kv_piece(&r, i, e), rows, 16);
    if (rc == 0)
        rc = rt_device_put(s->engine->device, r.at, r.tiles, r.bytes, err);
    if (rc == 0)
        rc = rt_device_sync(s->engine->device, err);
    free(r.tiles);
    return rc;
}
