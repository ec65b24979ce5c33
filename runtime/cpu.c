/* cpu.c - the portable forward pass.

   Shapes:  x [T][D] residual;  q [T][H*E];  k, v [T][K*E];  KV cache [L][K][context][E].
   Up to BLOCK tokens go through every weight row together, so that a prompt reads the
   weights once per block.  Work is split between threads by whole rows or heads only, and one
   token's sums are made in the same order whatever the block: results depend neither on
   the number of threads nor on how a prompt was cut. */
#include "runtime/cpu.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "runtime/pool.h"

#define BLOCK 16                        /* tokens that go through the layers together */
/* Bytes to ask memory for ahead of their use.  One core of a Xeon of 2023 decodes a 135M bf16 model
   at 38 tokens a second without, and at 45, 51, 58, 62 and 60 with 512, 1K, 2K, 4K and 8K. */
#define AHEAD 4096

/* ---- Kernels ------------------------------------------------------------------- */

/* Eight floats, in GCC's portable vectors: two SSE or NEON registers, or one of AVX.  The
   bodies below are compiled twice on x86-64 and the processor chooses at rt_cpu_make. */
typedef float f8 __attribute__((vector_size(32)));
typedef uint32_t u8x __attribute__((vector_size(32)));
typedef uint16_t h8 __attribute__((vector_size(16)));

#define BODY static inline __attribute__((always_inline))
#pragma GCC diagnostic ignored "-Wpsabi"    /* the vectors never cross a real call */

BODY f8 load_f32(const unsigned char *p)
{
    f8 x;

    memcpy(&x, p, sizeof x);
    return x;
}

/* Elements i .. i+7 of a row that holds DTYPE. */
BODY f8 load(const unsigned char *row, size_t i, int dtype)
{
    h8 half;
    u8x u, exponent, special;

    if (dtype == GEN_FP32)
        return load_f32(row + 4 * i);
    memcpy(&half, row + 2 * i, sizeof half);
    u = __builtin_convertvector(half, u8x);
    if (dtype == GEN_BF16)
        return (f8)(u << 16);
    /* fp16, as rt_from_fp16, without branches */
    exponent = u & 0x7c00;
    special = (u8x)(exponent == 0x7c00) & 0x38000000;
    special = ((u & 0x7fff) << 13) + 0x38000000 + special;
    u8x tiny = (u8x)((f8)(((u & 0x7fff) << 13) + 0x38800000) - 0x1p-14f);
    u8x is_tiny = (u8x)(exponent == 0);
    return (f8)((special & ~is_tiny) | (tiny & is_tiny) | (u & 0x8000) << 16);
}

/* The bytes that will be needed after element I; may lie behind the matrix, which is harmless. */
BODY void fetch(const unsigned char *row, size_t i, int dtype)
{
    __builtin_prefetch((const void *)((uintptr_t)row + i * (dtype == GEN_FP32 ? 4 : 2) + AHEAD));
}

BODY float sum(const f8 *v)
{
    f8 a = *v;

    return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
}

/* The last 1 .. 15 elements of a row, zeros behind them. */
struct tail {
    unsigned char bytes[16 * sizeof(float)];
};

BODY struct tail tail_of(const unsigned char *row, size_t from, size_t cols, int size)
{
    struct tail t = {{0}};

    memcpy(t.bytes, row + from * (size_t)size, (cols - from) * (size_t)size);
    return t;
}

/* The product of one row with one vector. */
BODY float dot1(const unsigned char *row, int dtype, const float *x, size_t cols)
{
    const unsigned char *px = (const unsigned char *)x;
    f8 a = {0}, b = {0};
    size_t i;

    for (i = 0; i + 16 <= cols; i += 16) {
        fetch(row, i, dtype);
        a += load(row, i, dtype) * load_f32(px + 4 * i);
        b += load(row, i + 8, dtype) * load_f32(px + 4 * i + 32);
    }
    if (i < cols) {
        struct tail w = tail_of(row, i, cols, dtype == GEN_FP32 ? 4 : 2);
        struct tail v = tail_of(px, i, cols, 4);

        a += load(w.bytes, 0, dtype) * load_f32(v.bytes);
        b += load(w.bytes, 8, dtype) * load_f32(v.bytes + 32);
    }
    a += b;
    return sum(&a);
}

/* The same sums for four vectors, STRIDE apart: the row is converted once. */
BODY void dot4(const unsigned char *row, int dtype, const float *x, size_t stride, size_t cols,
               float *out, size_t out_stride)
{
    const unsigned char *p0 = (const unsigned char *)x, *p1 = (const unsigned char *)(x + stride);
    const unsigned char *p2 = (const unsigned char *)(x + 2 * stride);
    const unsigned char *p3 = (const unsigned char *)(x + 3 * stride);
    f8 a0 = {0}, a1 = {0}, a2 = {0}, a3 = {0}, b0 = {0}, b1 = {0}, b2 = {0}, b3 = {0};

    for (size_t i = 0; i + 16 <= cols; i += 16) {
        f8 w = load(row, i, dtype);

        fetch(row, i, dtype);
        a0 += w * load_f32(p0 + 4 * i);
        a1 += w * load_f32(p1 + 4 * i);
        a2 += w * load_f32(p2 + 4 * i);
        a3 += w * load_f32(p3 + 4 * i);
        w = load(row, i + 8, dtype);
        b0 += w * load_f32(p0 + 4 * i + 32);
        b1 += w * load_f32(p1 + 4 * i + 32);
        b2 += w * load_f32(p2 + 4 * i + 32);
        b3 += w * load_f32(p3 + 4 * i + 32);
    }
    a0 += b0;
    a1 += b1;
    a2 += b2;
    a3 += b3;
    out[0] = sum(&a0);
    out[out_stride] = sum(&a1);
    out[2 * out_stride] = sum(&a2);
    out[3 * out_stride] = sum(&a3);
}

/* Rows r0 .. r1-1 of a matrix times N vectors: out[t][r]. */
struct rows {
    const unsigned char *w;
    int dtype, n;
    size_t cols;
    const float *x;                     /* [n][cols] */
    float *out;                         /* [n][out_stride] */
    size_t out_stride;
};

BODY void rows_of(const struct rows *j, int dtype, size_t r0, size_t r1)
{
    size_t row_bytes = j->cols * (dtype == GEN_FP32 ? 4 : 2);
    int whole = j->cols % 16 == 0 ? j->n & ~3 : 0;      /* dot4 has no tail */

    for (size_t r = r0; r < r1; r++) {
        const unsigned char *row = j->w + r * row_bytes;

        for (int t = 0; t < whole; t += 4)
            dot4(row, dtype, j->x + (size_t)t * j->cols, j->cols, j->cols,
                 j->out + (size_t)t * j->out_stride + r, j->out_stride);
        for (int t = whole; t < j->n; t++)
            j->out[(size_t)t * j->out_stride + r] =
                dot1(row, dtype, j->x + (size_t)t * j->cols, j->cols);
    }
}

BODY void rows_body(const struct rows *j, size_t r0, size_t r1)
{
    if (j->dtype == GEN_BF16)
        rows_of(j, GEN_BF16, r0, r1);
    else if (j->dtype == GEN_FP16)
        rows_of(j, GEN_FP16, r0, r1);
    else
        rows_of(j, GEN_FP32, r0, r1);
}

/* One query over N rows of one KV head: OUT[E] = softmax(q . k * scale) v.  SCORES: room for N. */
struct head {
    const float *q, *k, *v;
    float *scores, *out;
    int n, E;
    float scale;
};

BODY void head_body(const struct head *h)
{
    const unsigned char *v = (const unsigned char *)h->v;
    size_t E = (size_t)h->E;
    float max = -INFINITY;
    double total = 0;

    for (int i = 0; i < h->n; i++) {
        h->scores[i] = dot1((const unsigned char *)(h->k + (size_t)i * E), GEN_FP32, h->q, E) *
                       h->scale;
        max = h->scores[i] > max ? h->scores[i] : max;
    }
    for (int i = 0; i < h->n; i++) {
        h->scores[i] = expf(h->scores[i] - max);
        total += h->scores[i];
    }
    for (size_t e = 0; e < E; e += 32) {
        f8 a0 = {0}, a1 = {0}, a2 = {0}, a3 = {0};
        const unsigned char *p = v + 4 * e;

        for (int i = 0; i < h->n; i++, p += 4 * E) {
            float s = h->scores[i];

            a0 += load_f32(p) * s;
            a1 += load_f32(p + 32) * s;
            a2 += load_f32(p + 64) * s;
            a3 += load_f32(p + 96) * s;
        }
        memcpy(h->out + e, &a0, 32);
        memcpy(h->out + e + 8, &a1, 32);
        memcpy(h->out + e + 16, &a2, 32);
        memcpy(h->out + e + 24, &a3, 32);
    }
    for (size_t e = 0; e < E; e++)
        h->out[e] *= (float)(1.0 / total);
}

typedef void rows_fn(const struct rows *j, size_t r0, size_t r1);
typedef void head_fn(const struct head *h);

static void rows_plain(const struct rows *j, size_t r0, size_t r1)
{
    rows_body(j, r0, r1);
}

static void head_plain(const struct head *h)
{
    head_body(h);
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2,fma")))
static void rows_avx2(const struct rows *j, size_t r0, size_t r1)
{
    rows_body(j, r0, r1);
}

__attribute__((target("avx2,fma")))
static void head_avx2(const struct head *h)
{
    head_body(h);
}

static int have_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#else
#define rows_avx2 rows_plain
#define head_avx2 head_plain
static int have_avx2(void)
{
    return 0;
}
#endif

/* ---- The model in memory ---------------------------------------------------------- */

struct matrix {
    const unsigned char *w;             /* [rows][cols] of the resident type */
    void *copy;                         /* NULL: w is the mapped file */
    size_t rows, cols;
};

struct rt_cpu {
    struct gen_model m;
    const struct rt_weights *weights;
    int resident, round_kv, context;
    struct rt_pool pool;
    rows_fn *rows;
    head_fn *head;
    struct matrix *mats;                /* [RT_TENSORS][L]; vectors have none */
    float *vecs[RT_TENSORS];            /* [L][cols] norms and biases, rounded */
    float *kv[2];                       /* [L][K][context][E] keys, values */
    float *x, *norm, *q, *k, *v, *att, *gate, *up, *delta;      /* [BLOCK][...] */
    float *cos, *sin;                   /* [BLOCK][E/2] */
    float *scores;                      /* [threads][context] */
    float *inv_freq;                    /* [E/2] */
};

static int is_vector(int t)
{
    return t == RT_NORM || t == RT_ATTN_NORM || t == RT_MLP_NORM || t == RT_Q_NORM ||
           t == RT_K_NORM || t == RT_Q_BIAS || t == RT_K_BIAS || t == RT_V_BIAS;
}

static struct matrix *mat(const struct rt_cpu *c, int tensor, int layer)
{
    return &c->mats[(size_t)tensor * (size_t)c->m.L + (size_t)layer];
}

static int layers_of(const struct gen_model *m, int tensor)
{
    return tensor == RT_EMBED || tensor == RT_HEAD || tensor == RT_NORM ? 1 : m->L;
}

/* A zeroed array of A * B * C elements of SIZE; NULL also when that overflows. */
static void *array(int a, int b, int c, size_t size)
{
    size_t n;

    if (__builtin_mul_overflow((size_t)a, (size_t)b, &n) ||
        __builtin_mul_overflow(n, (size_t)c, &n))
        return NULL;
    return calloc(n ? n : 1, size);
}

struct fill {
    const struct rt_cpu *c;
    int tensor, layer;
    struct matrix *mat;
};

/* Rows begin .. end-1 of a matrix, read or made, rounded to the resident type. */
static void fill_rows(void *arg, int worker, size_t begin, size_t end)
{
    const struct fill *f = arg;
    size_t first = begin * f->mat->cols, last = end * f->mat->cols;
    int resident = f->c->resident;
    float tmp[256];

    (void)worker;
    while (first < last) {
        size_t n = last - first < 256 ? last - first : 256;
        uint16_t *half = (uint16_t *)f->mat->copy + first;

        rt_weights_get(f->c->weights, f->tensor, f->layer, (int64_t)first, (int64_t)n, tmp);
        if (resident == GEN_FP32)
            memcpy((float *)f->mat->copy + first, tmp, n * sizeof *tmp);
        else if (resident == GEN_BF16)
            for (size_t i = 0; i < n; i++)
                half[i] = rt_to_bf16(tmp[i]);
        else
            for (size_t i = 0; i < n; i++)
                half[i] = rt_to_fp16(tmp[i]);
        first += n;
    }
}

static int load_matrix(struct rt_cpu *c, int tensor, int layer, int rows, int cols,
                       struct mk_err *err)
{
    struct matrix *a = mat(c, tensor, layer);
    struct fill f = {c, tensor, layer, a};
    size_t size = c->resident == GEN_FP32 ? 4 : 2;
    int dtype = 0;

    a->rows = (size_t)rows;
    a->cols = (size_t)cols;
    a->w = rt_weights_data(c->weights, tensor, layer, &dtype);
    if (a->w && dtype == c->resident)
        return 0;
    a->copy = array(rows, cols, 1, size);
    if (!a->copy)
        return gen_fail(err, MK_ENOMEM, "%s: no memory for a weight of %d x %d; all weights take "
                        "%.1f MB", c->m.name, rows, cols,
                        (double)gen_model_params(&c->m) * (double)size / 1e6);
    a->w = a->copy;
    rt_pool_run(&c->pool, fill_rows, &f, a->rows, 16, (double)rows * cols);
    return 0;
}

static int load_vectors(struct rt_cpu *c, int tensor, int cols, struct mk_err *err)
{
    int layers = layers_of(&c->m, tensor);
    float *v = c->vecs[tensor] = array(layers, cols, 1, sizeof *v);

    if (!v)
        return gen_fail(err, MK_ENOMEM, "%s: no memory for %d x %d floats", c->m.name, layers,
                        cols);
    for (int l = 0; l < layers; l++, v += cols) {
        rt_weights_get(c->weights, tensor, l, 0, cols, v);
        for (int i = 0; i < cols; i++)
            v[i] = rt_round(v[i], c->resident);
    }
    return 0;
}

static int load_all(struct rt_cpu *c, struct mk_err *err)
{
    int rows, cols, rc = 0;

    for (int t = 0; t < RT_TENSORS && !rc; t++) {
        rt_weights_shape(&c->m, t, &rows, &cols);
        if (!rows)
            continue;
        if (is_vector(t)) {
            rc = load_vectors(c, t, cols, err);
            continue;
        }
        if (t == RT_HEAD && c->m.tied) {
            *mat(c, t, 0) = *mat(c, RT_EMBED, 0);
            mat(c, t, 0)->copy = NULL;
            continue;
        }
        for (int l = 0; l < layers_of(&c->m, t) && !rc; l++)
            rc = load_matrix(c, t, l, rows, cols, err);
    }
    return rc;
}

static int make_buffers(struct rt_cpu *c, struct mk_err *err)
{
    const struct gen_model *m = &c->m;
    const struct {
        float **at;
        int a, b;
    } list[] = {
        {&c->x, BLOCK, m->D}, {&c->norm, BLOCK, m->D}, {&c->delta, BLOCK, m->D},
        {&c->gate, BLOCK, m->F}, {&c->up, BLOCK, m->F},
        {&c->cos, BLOCK, m->E}, {&c->sin, BLOCK, m->E}, {&c->inv_freq, m->E, 1},
        {&c->scores, c->pool.n, c->context},
    };

    for (size_t i = 0; i < sizeof list / sizeof list[0]; i++)
        if (!(*list[i].at = array(list[i].a, list[i].b, 1, sizeof(float))))
            return gen_fail(err, MK_ENOMEM, "%s: no memory for work buffers", m->name);
    c->q = array(BLOCK, m->H, m->E, sizeof(float));
    c->att = array(BLOCK, m->H, m->E, sizeof(float));
    c->k = array(BLOCK, m->K, m->E, sizeof(float));
    c->v = array(BLOCK, m->K, m->E, sizeof(float));
    if (!c->q || !c->att || !c->k || !c->v)
        return gen_fail(err, MK_ENOMEM, "%s: no memory for work buffers", m->name);
    for (int i = 0; i < 2; i++)
        if (!(c->kv[i] = array(m->L * m->K, c->context, m->E, sizeof(float))))
            return gen_fail(err, MK_ENOMEM, "%s: no memory for a context of %d tokens, which takes "
                            "%.1f MB", m->name, c->context,
                            8e-6 * m->L * m->K * m->E * c->context);
    for (int i = 0; i < m->E / 2; i++)
        c->inv_freq[i] = gen_model_inv_freq(m, i);
    return 0;
}

int rt_cpu_make(const struct gen_model *m, const struct rt_weights *w, int resident, int round_kv,
                int context, int threads, struct rt_cpu **out, struct mk_err *err)
{
    struct rt_cpu *c;
    int rc;

    *out = NULL;
    if (m->E % 32)
        return gen_fail(err, MK_EUNSUPPORTED, "%s: head_dim %d is no multiple of 32", m->name,
                        m->E);
    if (context < 1)
        return gen_fail(err, MK_EINVAL, "%s: a context of %d tokens", m->name, context);
    c = calloc(1, sizeof *c);
    if (!c)
        return gen_fail(err, MK_ENOMEM, "%s: no memory for the CPU path", m->name);
    c->m = *m;
    c->weights = w;
    c->resident = resident;
    c->round_kv = round_kv;
    c->context = context;
    c->rows = have_avx2() ? rows_avx2 : rows_plain;
    c->head = have_avx2() ? head_avx2 : head_plain;
    rt_pool_make(&c->pool, threads);
    c->mats = array(RT_TENSORS, m->L, 1, sizeof *c->mats);
    rc = c->mats ? make_buffers(c, err)
                 : gen_fail(err, MK_ENOMEM, "%s: no memory for the list of weights", m->name);
    if (!rc)
        rc = load_all(c, err);
    if (rc)
        rt_cpu_free(c);
    else
        *out = c;
    return rc;
}

void rt_cpu_free(struct rt_cpu *c)
{
    if (!c)
        return;
    rt_pool_free(&c->pool);
    for (int i = 0; c->mats && i < RT_TENSORS * c->m.L; i++)
        free(c->mats[i].copy);
    free(c->mats);
    for (int t = 0; t < RT_TENSORS; t++)
        free(c->vecs[t]);
    float *buffers[] = {c->x, c->norm, c->delta, c->gate, c->up, c->cos, c->sin, c->inv_freq,
                        c->scores, c->q, c->att, c->k, c->v, c->kv[0], c->kv[1]};
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++)
        free(buffers[i]);
    free(c);
}

float *rt_cpu_kv(struct rt_cpu *c, int layer, int head, int pos, int which)
{
    size_t row = ((size_t)layer * (size_t)c->m.K + (size_t)head) * (size_t)c->context;

    return c->kv[which] + (row + (size_t)pos) * (size_t)c->m.E;
}

/* ---- Stages, in the order of a layer ------------------------------------------------- */

/* out = x / sqrt(mean(x^2) + eps) * weight */
static void rms_norm(const float *x, const float *weight, int n, double eps, float *out)
{
    double squares = 0;
    float scale;

    for (int i = 0; i < n; i++)
        squares += (double)x[i] * (double)x[i];
    scale = 1.0f / sqrtf((float)(squares / n) + (float)eps);
    for (int i = 0; i < n; i++)
        out[i] = weight[i] * (x[i] * scale);
}

/* Up to three matrices with the same input: their rows are one list of items. */
struct product {
    struct rt_cpu *c;
    int n;                              /* tokens */
    const float *x;                     /* [n][cols] */
    int n_mats;
    struct {
        const struct matrix *mat;
        float *out;                     /* [n][rows] */
    } part[3];
};

static void product_rows(void *arg, int worker, size_t begin, size_t end)
{
    const struct product *p = arg;
    size_t base = 0;

    (void)worker;
    for (int i = 0; i < p->n_mats; i++) {
        const struct matrix *a = p->part[i].mat;
        struct rows j = {a->w, p->c->resident, p->n, a->cols, p->x, p->part[i].out, a->rows};
        size_t lo = begin > base ? begin - base : 0, hi = end > base ? end - base : 0;

        hi = hi < a->rows ? hi : a->rows;
        if (lo < hi)
            p->c->rows(&j, lo, hi);
        base += a->rows;
    }
}

static void multiply(struct product *p)
{
    size_t rows = 0, threads = (size_t)p->c->pool.n, grain;

    for (int i = 0; i < p->n_mats; i++)
        rows += p->part[i].mat->rows;
    grain = rows / (threads * 8);       /* eight turns each: a delayed thread holds up little */
    rt_pool_run(&p->c->pool, product_rows, p, rows, grain < 8 ? 8 : grain,
             (double)rows * (double)p->part[0].mat->cols * p->n);
}

static void multiply_one(struct rt_cpu *c, int n, const float *x, int tensor, int layer, float *out)
{
    struct product p = {c, n, x, 1, {{mat(c, tensor, layer), out}}};

    multiply(&p);
}

static void embed(struct rt_cpu *c, const int32_t *tokens, int n)
{
    const struct matrix *a = mat(c, RT_EMBED, 0);
    size_t D = a->cols;

    for (int t = 0; t < n; t++) {
        float *x = c->x + (size_t)t * D;
        const unsigned char *row = a->w + (size_t)tokens[t] * D * (c->resident == GEN_FP32 ? 4 : 2);
        uint16_t half;

        if (c->resident == GEN_FP32) {
            memcpy(x, row, D * sizeof *x);
            continue;
        }
        for (size_t i = 0; i < D; i++) {
            memcpy(&half, row + 2 * i, sizeof half);
            x[i] = c->resident == GEN_BF16 ? rt_from_bf16(half) : rt_from_fp16(half);
        }
    }
}

static void norm_rows(struct rt_cpu *c, const float *x, int n, int tensor, int layer)
{
    int D = c->m.D;
    const float *weight = c->vecs[tensor] + (size_t)layer * (size_t)D;

    for (int t = 0; t < n; t++)
        rms_norm(x + (size_t)t * (size_t)D, weight, D, c->m.eps, c->norm + (size_t)t * (size_t)D);
}

static void add_bias(struct rt_cpu *c, float *y, int cols, int tensor, int layer)
{
    const float *bias = c->vecs[tensor] + (size_t)layer * (size_t)cols;

    for (int i = 0; i < cols; i++)
        y[i] += bias[i];
}

/* Angles of positions pos .. pos+n-1: a product in float, as in Hugging Face. */
static void angles(struct rt_cpu *c, int n, int pos)
{
    int half = c->m.E / 2;

    for (int t = 0; t < n; t++)
        for (int i = 0; i < half; i++) {
            float angle = (float)(pos + t) * c->inv_freq[i];

            c->cos[t * half + i] = cosf(angle);
            c->sin[t * half + i] = sinf(angle);
        }
}

/* Norm (if the model has one) and rotary embedding of one head: pairs are E/2 apart. */
static void turn_head(struct rt_cpu *c, float *head, int t, int norm, int layer)
{
    int E = c->m.E, half = E / 2;
    const float *cos = c->cos + t * half, *sin = c->sin + t * half;

    if (c->m.qk_norm)
        rms_norm(head, c->vecs[norm] + (size_t)layer * (size_t)E, E, c->m.eps, head);
    for (int i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];

        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i] + a * sin[i];
    }
}

static void store_kv(struct rt_cpu *c, int layer, int head, int pos, int which, const float *from)
{
    float *to = rt_cpu_kv(c, layer, head, pos, which);

    for (int i = 0; i < c->m.E; i++)
        to[i] = c->round_kv ? rt_round(from[i], c->resident) : from[i];
}

/* Bias, norm and RoPE of q and k; k and v go into the cache. */
static void finish_qkv(struct rt_cpu *c, int n, int pos, int layer)
{
    int E = c->m.E, H = c->m.H, K = c->m.K;

    for (int t = 0; t < n; t++) {
        float *q = c->q + (size_t)t * (size_t)(H * E);
        float *k = c->k + (size_t)t * (size_t)(K * E), *v = c->v + (size_t)t * (size_t)(K * E);

        if (c->m.qkv_bias) {
            add_bias(c, q, H * E, RT_Q_BIAS, layer);
            add_bias(c, k, K * E, RT_K_BIAS, layer);
            add_bias(c, v, K * E, RT_V_BIAS, layer);
        }
        for (int h = 0; h < H; h++)
            turn_head(c, q + h * E, t, RT_Q_NORM, layer);
        for (int h = 0; h < K; h++) {
            turn_head(c, k + h * E, t, RT_K_NORM, layer);
            store_kv(c, layer, h, pos + t, 0, k + h * E);
            store_kv(c, layer, h, pos + t, 1, v + h * E);
        }
    }
}

struct attention {
    struct rt_cpu *c;
    int pos, layer;
};

/* Items are (token, head). */
static void attend_items(void *arg, int worker, size_t begin, size_t end)
{
    const struct attention *a = arg;
    struct rt_cpu *c = a->c;
    size_t H = (size_t)c->m.H, E = (size_t)c->m.E;

    for (size_t i = begin; i < end; i++) {
        int t = (int)(i / H), kv = (int)(i % H) / (c->m.H / c->m.K);
        struct head h = {
            .q = c->q + i * E,
            .k = rt_cpu_kv(c, a->layer, kv, 0, 0),
            .v = rt_cpu_kv(c, a->layer, kv, 0, 1),
            .scores = c->scores + (size_t)worker * (size_t)c->context,
            .out = c->att + i * E,
            .n = a->pos + t + 1,
            .E = c->m.E,
            .scale = 1.0f / sqrtf((float)E),
        };

        c->head(&h);
    }
}

static void silu_items(void *arg, int worker, size_t begin, size_t end)
{
    struct rt_cpu *c = arg;

    (void)worker;
    for (size_t i = begin; i < end; i++) {
        float g = c->gate[i];

        c->gate[i] = g / (1.0f + expf(-g)) * c->up[i];
    }
}

static void add_delta(struct rt_cpu *c, int n)
{
    for (int i = 0; i < n * c->m.D; i++)
        c->x[i] += c->delta[i];
}

static void run_layer(struct rt_cpu *c, int n, int pos, int layer)
{
    struct product qkv = {c, n, c->norm, 3, {{mat(c, RT_Q, layer), c->q},
                                             {mat(c, RT_K, layer), c->k},
                                             {mat(c, RT_V, layer), c->v}}};
    struct product mlp = {c, n, c->norm, 2, {{mat(c, RT_GATE, layer), c->gate},
                                             {mat(c, RT_UP, layer), c->up}}};
    struct attention att = {c, pos, layer};
    size_t heads = (size_t)n * (size_t)c->m.H, acts = (size_t)n * (size_t)c->m.F;

    norm_rows(c, c->x, n, RT_ATTN_NORM, layer);
    multiply(&qkv);
    finish_qkv(c, n, pos, layer);
    rt_pool_run(&c->pool, attend_items, &att, heads, 1, 2.0 * (double)heads * (pos + n) * c->m.E);
    multiply_one(c, n, c->att, RT_O, layer, c->delta);
    add_delta(c, n);
    norm_rows(c, c->x, n, RT_MLP_NORM, layer);
    multiply(&mlp);
    /* an exponential costs as much as some 20 multiplications */
    rt_pool_run(&c->pool, silu_items, c, acts, 512, 20.0 * (double)acts);
    multiply_one(c, n, c->gate, RT_DOWN, layer, c->delta);
    add_delta(c, n);
}

/* N <= BLOCK tokens through all layers, and the logits of the last N_LOGITS of them. */
static int run_block(struct rt_cpu *c, const int32_t *tokens, int n, int pos, float *logits,
                     int n_logits, const volatile int *cancel, struct mk_err *err)
{
    embed(c, tokens, n);
    angles(c, n, pos);
    for (int l = 0; l < c->m.L; l++) {
        if (cancel && *cancel)
            return gen_fail(err, MK_ECANCELED, "canceled");
        run_layer(c, n, pos, l);
    }
    if (n_logits) {
        norm_rows(c, c->x + (size_t)(n - n_logits) * (size_t)c->m.D, n_logits, RT_NORM, 0);
        multiply_one(c, n_logits, c->norm, RT_HEAD, 0, logits);
    }
    return 0;
}

int rt_cpu_run(struct rt_cpu *c, const int32_t *tokens, int n, int pos, float *logits, int all,
               const volatile int *cancel, struct mk_err *err)
{
    int rc = 0;

    if (n < 1 || pos < 0 || n > c->context - pos)
        return gen_fail(err, MK_EINVAL, "%d tokens at position %d do not fit a context of %d", n,
                        pos, c->context);
    for (int i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= c->m.V)
            return gen_fail(err, MK_EINVAL, "token %d: id %d is not in 0 .. %d", i, (int)tokens[i],
                            c->m.V - 1);
    for (int done = 0; done < n && !rc; done += BLOCK) {
        int t = n - done < BLOCK ? n - done : BLOCK;
        int n_logits = !logits ? 0 : all ? t : done + t == n;

        rc = run_block(c, tokens + done, t, pos + done,
                       all && logits ? logits + (size_t)done * (size_t)c->m.V : logits, n_logits,
                       cancel, err);
    }
    return rc;
}
