/* pack.c - tensors go through two page-locked buffers to the device, where mk_pack, a kernel made
   from the same plan as decode, puts them into the streams; reading overlaps copying. */
#include "config.h"

#include <stdlib.h>
#include <string.h>

#include "runtime/abi.h"
#include "runtime/pack.h"

enum { BUFFER_BYTES = 32 << 20, PACK_THREADS = 256 };

/* Where a matrix goes: blocks BLOCK0, BLOCK0 + STEP, ... of PHASE. */
struct place {
    int tensor, phase, block0, step;
};

struct packer {
    const struct rt_pack_job *job;
    struct rt_packed *out;
    rt_func pack;
    void *host[2];
    rt_ptr device[2];
    rt_event used[2]; /* buffer i may be filled again */
    int turn;
    int64_t done, total; /* elements of matrices, and of the norms as a lump, for progress */
};

int64_t rt_packed_bytes(const struct gen_plan *p)
{
    return p->stream_bytes + p->embed_bytes + p->vec_floats * 4 + 2 * (int64_t) BUFFER_BYTES;
}

void rt_packed_free(struct rt_device *d, struct rt_packed *p)
{
    rt_device_free(d, p->stream);
    rt_device_free(d, p->embed);
    rt_device_free(d, p->vec);
    memset(p, 0, sizeof *p);
}

static size_t element_bytes(int dtype)
{
    return dtype == GEN_FP32 ? 4 : 2;
}

static void tell(struct packer *k, int64_t elements)
{
    k->done += elements;
    if (k->job->progress)
        k->job->progress(k->job->user, "load", (double) k->done / (double) k->total);
}

static int launch_pack(struct packer *k, struct mk_pack_args *a, struct mk_err *err)
{
    void *params[] = {a};

    return rt_launch(k->job->device, k->pack, k->job->plan->gpu.sms * 4, PACK_THREADS, 0, 0, 0,
                     params, err);
}

/* Rows ROW0 .. ROW0+ROWS-1 through the buffer whose turn it is. */
static int pack_rows(struct packer *k, struct mk_pack_args *a, const char *data, size_t row_bytes,
                     struct mk_err *err)
{
    struct rt_device *d = k->job->device;
    const size_t bytes = row_bytes * (size_t) a->rows;
    const int i = k->turn;
    float ms;
    int rc;

    k->turn ^= 1;
    rc = rt_event_ms(d, k->used[i], k->used[i], &ms, err); /* waits */
    if (rc)
        return rc;
    memcpy(k->host[i], data, bytes);
    a->src = k->device[i];
    rc = rt_device_put(d, k->device[i], k->host[i], bytes, err);
    if (rc == 0)
        rc = launch_pack(k, a, err);
    if (rc == 0)
        rc = rt_event_record(d, k->used[i], err);
    tell(k, (int64_t) a->rows * a->cols);
    return rc;
}

static uint64_t made_key(uint64_t seed, int tensor, int layer)
{
    return seed + 0x9E3779B97F4A7C15u * (uint64_t) (tensor * 4096 + layer + 1);
}

/* One matrix of LAYER; PLAIN not 0: row-major to there instead of into the streams. */
static int pack_matrix(struct packer *k, const struct place *to, int layer, rt_ptr plain,
                       struct mk_err *err)
{
    struct mk_pack_args a;
    int rows, cols, dtype = 0, rc = 0, step;
    uint64_t seed;
    const char *data;
    size_t row_bytes;

    rt_weights_shape(&k->job->plan->model, to->tensor, &rows, &cols);
    memset(&a, 0, sizeof a);
    a.stream = k->out->stream;
    a.cols = cols;
    a.phase = to->phase;
    a.layer = layer;
    a.block_step = to->step;
    if (rt_weights_made(k->job->weights, &seed)) {
        a.key = made_key(seed, to->tensor, layer);
        a.rows = rows;
        a.block0 = to->block0;
        a.plain = plain;
        return launch_pack(k, &a, err);
    }
    data = rt_weights_data(k->job->weights, to->tensor, layer, &dtype);
    a.dtype = dtype;
    row_bytes = (size_t) cols * element_bytes(dtype);
    step = (int) (BUFFER_BYTES / row_bytes / 8 * 8);
    if (step < 8)
        return gen_fail(err, MK_EUNSUPPORTED, "%s: rows of %zu bytes are too long to pack",
                        k->job->plan->model.name, row_bytes);
    for (int row = 0; rc == 0 && row < rows; row += step) {
        a.rows = rows - row < step ? rows - row : step;
        a.row0 = row;
        a.block0 = to->block0 + row / 8 * to->step;
        a.plain = plain;
        rc = pack_rows(k, &a, data + (size_t) row * row_bytes, row_bytes, err);
    }
    return rc;
}

static int pack_layer(struct packer *k, int layer, struct mk_err *err)
{
    const struct gen_model *m = &k->job->plan->model;
    const int head = m->E / 8;
    const struct place places[] = {
        {RT_Q, GEN_QKV, 0, 1},
        {RT_K, GEN_QKV, m->H * head, 1},
        {RT_V, GEN_QKV, (m->H + m->K) * head, 1},
        {RT_O, GEN_O, 0, 1},
        {RT_GATE, GEN_MLP, 0, 2},
        {RT_UP, GEN_MLP, 1, 2},
        {RT_DOWN, GEN_DOWN, 0, 1},
    };
    int rc = 0;

    for (size_t i = 0; rc == 0 && i < sizeof places / sizeof *places; i++)
        rc = pack_matrix(k, &places[i], layer, 0, err);
    return rc;
}

static void get_vector(const struct packer *k, int tensor, int layer, float *to)
{
    const int resident = k->job->plan->dtype;
    int rows, cols;

    rt_weights_shape(&k->job->plan->model, tensor, &rows, &cols);
    if (!rows)
        return;
    rt_weights_get(k->job->weights, tensor, layer, 0, cols, to);
    for (int i = 0; i < cols; i++)
        to[i] = rt_round(to[i], resident);
}

/* Norms and biases, small enough to go at once. */
static int pack_vectors(struct packer *k, struct mk_err *err)
{
    const struct gen_plan *p = k->job->plan;
    const struct gen_model *m = &p->model;
    const size_t bytes = (size_t) p->vec_floats * sizeof(float);
    float *vec = calloc(1, bytes);
    int rc;

    if (!vec)
        return gen_fail(err, MK_ENOMEM, "no memory for the norms of %s", m->name);
    for (int i = 0; i < m->L; i++) {
        float *v = vec + (size_t) i * (size_t) p->vec_layer;
        get_vector(k, RT_ATTN_NORM, i, v + p->vec_attn_norm);
        get_vector(k, RT_MLP_NORM, i, v + p->vec_mlp_norm);
        get_vector(k, RT_Q_NORM, i, v + p->vec_q_norm);
        get_vector(k, RT_K_NORM, i, v + p->vec_k_norm);
        get_vector(k, RT_Q_BIAS, i, v + p->vec_bias);
        get_vector(k, RT_K_BIAS, i, v + p->vec_bias + m->H * m->E);
        get_vector(k, RT_V_BIAS, i, v + p->vec_bias + (m->H + m->K) * m->E);
    }
    get_vector(k, RT_NORM, 0, vec + p->vec_norm);
    rc = rt_device_put(k->job->device, k->out->vec, vec, bytes, err);
    if (rc == 0)
        rc = rt_device_sync(k->job->device, err);
    free(vec);
    return rc;
}

static int pack_all(struct packer *k, struct mk_err *err)
{
    const struct gen_model *m = &k->job->plan->model;
    const struct place head = {m->tied ? RT_EMBED : RT_HEAD, GEN_HEAD, 0, 1},
                       embed = {RT_EMBED, GEN_HEAD, 0, 1};
    int rc = pack_vectors(k, err);

    for (int i = 0; rc == 0 && i < m->L; i++)
        rc = pack_layer(k, i, err);
    if (rc == 0)
        rc = pack_matrix(k, &head, 0, 0, err);
    if (rc == 0 && !m->tied)
        rc = pack_matrix(k, &embed, 0, k->out->embed, err);
    if (rc == 0)
        rc = rt_device_sync(k->job->device, err);
    if (rc == 0)
        tell(k, k->total - k->done);
    return rc;
}

static int packer_open(struct packer *k, struct mk_err *err)
{
    const struct gen_plan *p = k->job->plan;
    struct rt_device *d = k->job->device;
    rt_ptr mapped; /* not needed: the copies are explicit */
    int rc = rt_module_func(d, k->job->module, "mk_pack", 0, &k->pack, err);

    for (int i = 0; rc == 0 && i < 2; i++) {
        rc = rt_device_alloc_host(d, BUFFER_BYTES, &k->host[i], &mapped, err);
        if (rc == 0)
            rc = rt_device_alloc(d, BUFFER_BYTES, &k->device[i], err);
        if (rc == 0)
            rc = rt_event_make(d, &k->used[i], err);
        if (rc == 0)
            rc = rt_event_record(d, k->used[i], err);
    }
    if (rc == 0)
        rc = rt_device_alloc(d, (size_t) p->stream_bytes, &k->out->stream, err);
    if (rc == 0) /* rows and columns that fill up pairs and units */
        rc = rt_device_set(d, k->out->stream, 0, (size_t) p->stream_bytes, err);
    if (rc == 0)
        rc = rt_device_alloc(d, (size_t) p->vec_floats * 4, &k->out->vec, err);
    if (rc == 0 && p->embed_bytes)
        rc = rt_device_alloc(d, (size_t) p->embed_bytes, &k->out->embed, err);
    return rc;
}

static void packer_close(struct packer *k)
{
    struct rt_device *d = k->job->device;

    for (int i = 0; i < 2; i++) {
        rt_device_free_host(d, k->host[i]);
        rt_device_free(d, k->device[i]);
        rt_event_free(d, k->used[i]);
    }
}

int rt_pack(const struct rt_pack_job *job, struct rt_packed *out, struct mk_err *err)
{
    struct packer k = {.job = job, .out = out};
    int rc;

    memset(out, 0, sizeof *out);
    k.total = gen_model_params(&job->plan->model);
    rc = packer_open(&k, err);
    if (rc == 0)
        rc = pack_all(&k, err);
    packer_close(&k);
    if (rc)
        rt_packed_free(job->device, out);
    return rc;
}
