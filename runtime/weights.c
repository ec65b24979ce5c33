/* weights.c - safetensors files and made weights.

   A safetensors file is
     1. 8 bytes   little-endian length of the header
     2. header    JSON: { NAME: { "dtype", "shape", "data_offsets": [begin, end] }, ... },
                  and perhaps "__metadata__": { string: string }
     3. data      the tensors, offsets counted from here, without overlap or gap
   Everything is checked before a pointer into the mapping is kept.  What cannot be checked:
   a file that someone truncates while it is mapped kills the reader with SIGBUS; checkpoints
   must not be rewritten in place while a program uses them. */
#include "runtime/weights.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "safetensors data are little-endian and used in place: big-endian hosts are not supported"
#endif

#define MAX_HEADER (16 << 20)       /* 800 tensors of 100 bytes need 80 KB */
#define MAX_SHARDS 1024

struct file {
    char *path;                     /* for messages: DIR/NAME */
    const char *name;               /* its end */
    const unsigned char *map;
    size_t size;
};

struct slot {
    const unsigned char *data;      /* NULL: not seen yet */
    int dtype;
    int file;                       /* the file that has it, or that the index names */
    int indexed;                    /* 1: the index names it */
};

struct rt_weights {
    struct gen_model m;
    int made;
    uint64_t seed;
    struct file *files;
    int n_files;
    int has_index;
    struct slot *slots;             /* [RT_TENSORS][L] */
};

/* The name of a tensor is PREFIX (with the layer in it) and this. */
static const struct {
    const char *name;
    int in_layer;
} names[RT_TENSORS] = {
    [RT_EMBED] = {"model.embed_tokens.weight", 0},
    [RT_HEAD] = {"lm_head.weight", 0},
    [RT_NORM] = {"model.norm.weight", 0},
    [RT_ATTN_NORM] = {"input_layernorm.weight", 1},
    [RT_Q] = {"self_attn.q_proj.weight", 1},
    [RT_K] = {"self_attn.k_proj.weight", 1},
    [RT_V] = {"self_attn.v_proj.weight", 1},
    [RT_Q_BIAS] = {"self_attn.q_proj.bias", 1},
    [RT_K_BIAS] = {"self_attn.k_proj.bias", 1},
    [RT_V_BIAS] = {"self_attn.v_proj.bias", 1},
    [RT_Q_NORM] = {"self_attn.q_norm.weight", 1},
    [RT_K_NORM] = {"self_attn.k_norm.weight", 1},
    [RT_O] = {"self_attn.o_proj.weight", 1},
    [RT_MLP_NORM] = {"post_attention_layernorm.weight", 1},
    [RT_GATE] = {"mlp.gate_proj.weight", 1},
    [RT_UP] = {"mlp.up_proj.weight", 1},
    [RT_DOWN] = {"mlp.down_proj.weight", 1},
};

static const struct {
    const char *name;
    int size;
} dtypes[] = {
    [GEN_BF16] = {"BF16", 2},
    [GEN_FP16] = {"F16", 2},
    [GEN_FP32] = {"F32", 4},
};

/* ---- Numbers --------------------------------------------------------------- */

static float float_of(uint32_t bits)
{
    float x;

    memcpy(&x, &bits, sizeof x);
    return x;
}

static uint32_t bits_of(float x)
{
    uint32_t bits;

    memcpy(&bits, &x, sizeof bits);
    return bits;
}

uint16_t rt_to_bf16(float x)
{
    uint32_t u = bits_of(x);

    if ((u & 0x7fffffff) > 0x7f800000)          /* NaN stays one, quiet */
        return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

float rt_from_bf16(uint16_t x)
{
    return float_of((uint32_t)x << 16);
}

uint16_t rt_to_fp16(float x)
{
    uint32_t u = bits_of(x);
    uint32_t sign = u >> 16 & 0x8000, a = u & 0x7fffffff;

    if (a > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (a >= 0x477ff000)                        /* 65520 and up would round to infinity */
        return (uint16_t)(sign | 0x7bff);
    if (a < 0x38800000)                         /* below 2^-14: adding 0.5 rounds to 2^-24 */
        return (uint16_t)(sign | (bits_of(float_of(a) + 0.5f) - 0x3f000000));
    a += 0xfff + (a >> 13 & 1);
    return (uint16_t)(sign | (a - 0x38000000) >> 13);
}

float rt_from_fp16(uint16_t x)
{
    uint32_t sign = (uint32_t)(x & 0x8000) << 16;
    uint32_t a = (uint32_t)(x & 0x7fff) << 13, e = a & 0x0f800000;

    if (e == 0)                                 /* 2^-14 + a, less 2^-14, is exact */
        return float_of(sign | bits_of(float_of(a + 0x38800000) - 0x1p-14f));
    a += 0x38000000;
    if (e == 0x0f800000)                        /* infinity, NaN */
        a += 0x38000000;
    return float_of(sign | a);
}

float rt_round(float x, int resident)
{
    switch (resident) {
    case GEN_BF16: return rt_from_bf16(rt_to_bf16(x));
    case GEN_FP16: return rt_from_fp16(rt_to_fp16(x));
    default: return x;
    }
}

static uint64_t made_key(uint64_t seed, int tensor, int layer)
{
    return seed + 0x9E3779B97F4A7C15u * ((uint64_t)tensor * 4096 + (uint64_t)layer + 1);
}

/* near normal with variance 1 */
static float made_normal(uint64_t key, uint64_t index)
{
    uint64_t z = key + 0x9E3779B97F4A7C15u * index;
    int s;

    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    s = (int)((z & 0xffff) + (z >> 16 & 0xffff) + (z >> 32 & 0xffff) + (z >> 48));
    return (float)(s - 131070) * (1.0f / 37837.0f);
}

static int is_norm(int tensor)
{
    return tensor == RT_NORM || tensor == RT_ATTN_NORM || tensor == RT_MLP_NORM ||
           tensor == RT_Q_NORM || tensor == RT_K_NORM;
}

static float made_value(float normal, int norm)
{
    /* volatile: rounded before 1 is added, as on the device; a fused multiply-add would not */
    volatile float scaled;

    if (!norm)
        return normal * 0.02f;
    scaled = normal * 0.02f;
    return 1.0f + scaled;
}

float rt_weights_value(uint64_t seed, int tensor, int layer, uint64_t index)
{
    return made_value(made_normal(made_key(seed, tensor, layer), index), is_norm(tensor));
}

/* ---- Which tensor ---------------------------------------------------------- */

void rt_weights_shape(const struct gen_model *m, int tensor, int *rows, int *cols)
{
    int r = 1, c = m->D;

    switch (tensor) {
    case RT_EMBED: case RT_HEAD: r = m->V; break;
    case RT_Q: r = m->H * m->E; break;
    case RT_K: case RT_V: r = m->K * m->E; break;
    case RT_Q_BIAS: c = m->H * m->E; r = m->qkv_bias; break;
    case RT_K_BIAS: case RT_V_BIAS: c = m->K * m->E; r = m->qkv_bias; break;
    case RT_Q_NORM: case RT_K_NORM: c = m->E; r = m->qk_norm; break;
    case RT_O: r = m->D; c = m->H * m->E; break;
    case RT_GATE: case RT_UP: r = m->F; break;
    case RT_DOWN: r = m->D; c = m->F; break;
    default: break;
    }
    *rows = r;
    *cols = r ? c : 0;
}

static int is_vector(int tensor)
{
    return is_norm(tensor) || tensor == RT_Q_BIAS || tensor == RT_K_BIAS || tensor == RT_V_BIAS;
}

static struct slot *slot_of(const struct rt_weights *w, int tensor, int layer)
{
    return &w->slots[(size_t)tensor * (size_t)w->m.L + (size_t)layer];
}

/* The layer number that *NAME starts with, up to and with the dot; -1 if there is none
   below L.  Only the plain spelling is taken: "01" is another name than "1". */
static int layer_of(const char **name, int L)
{
    const char *p = *name;
    int n = 0;

    if (*p == '0' && p[1] != '.')
        return -1;
    for (; *p >= '0' && *p <= '9'; p++) {
        n = n * 10 + (*p - '0');
        if (n >= L)
            return -1;
    }
    if (p == *name || *p != '.')
        return -1;
    *name = p + 1;
    return n;
}

/* Find the slot of tensor NAME; NULL: the model has no such tensor. */
static struct slot *slot_named(const struct rt_weights *w, const char *name, int *tensor)
{
    static const char prefix[] = "model.layers.";
    int in_layer = !strncmp(name, prefix, sizeof prefix - 1), layer = 0, rows, cols;

    if (in_layer) {
        name += sizeof prefix - 1;
        layer = layer_of(&name, w->m.L);
        if (layer < 0)
            return NULL;
    }
    for (int t = 0; t < RT_TENSORS; t++) {
        if (names[t].in_layer != in_layer || strcmp(names[t].name, name))
            continue;
        rt_weights_shape(&w->m, t, &rows, &cols);
        if (!rows)
            return NULL;
        *tensor = t;
        return slot_of(w, t, layer);
    }
    return NULL;
}

/* Tensors of old checkpoints that the config already says. */
static int is_ignored(const char *name)
{
    static const char end[] = ".rotary_emb.inv_freq";
    size_t len = strlen(name);

    return len >= sizeof end && !strcmp(name + len - (sizeof end - 1), end);
}

/* ---- Files ------------------------------------------------------------------ */

/* Add DIR/NAME to the files of W, without opening it; its number, or MK_ENOMEM. */
static int file_add(struct rt_weights *w, const char *dir, const char *name, struct mk_err *err)
{
    struct file *f = realloc(w->files, ((size_t)w->n_files + 1) * sizeof *f);
    size_t len = strlen(dir) + strlen(name) + 2;

    if (!f)
        return gen_fail(err, MK_ENOMEM, "%s: no memory for the list of files", dir);
    w->files = f;
    f += w->n_files;
    *f = (struct file){0};
    f->path = malloc(len);
    if (!f->path)
        return gen_fail(err, MK_ENOMEM, "%s: no memory for the list of files", dir);
    snprintf(f->path, len, "%s/%s", dir, name);
    f->name = f->path + strlen(dir) + 1;
    return w->n_files++;
}

static int file_map(struct file *f, struct mk_err *err)
{
    /* O_NONBLOCK: a FIFO of that name must not hang the open */
    int fd = open(f->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK), rc = 0;
    struct stat st;
    void *map;

    if (fd < 0)
        return gen_fail(err, errno == ENOENT ? MK_ENOENT : MK_EIO, "%s: %s", f->path,
                        strerror(errno));
    if (fstat(fd, &st))
        rc = gen_fail(err, MK_EIO, "%s: %s", f->path, strerror(errno));
    else if (!S_ISREG(st.st_mode))
        rc = gen_fail(err, MK_EIO, "%s: not a regular file", f->path);
    else if (st.st_size < 8)
        rc = gen_fail(err, MK_EFORMAT, "%s: %lld bytes are too few for a safetensors file",
                      f->path, (long long)st.st_size);
    else if ((uint64_t)st.st_size > SIZE_MAX / 2)
        rc = gen_fail(err, MK_ENOMEM, "%s: %lld bytes are too many to map", f->path,
                      (long long)st.st_size);
    if (!rc) {
        map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (map == MAP_FAILED) {
            rc = gen_fail(err, MK_ENOMEM, "%s: cannot map %lld bytes: %s", f->path,
                          (long long)st.st_size, strerror(errno));
        } else {
            f->map = map;
            f->size = (size_t)st.st_size;
        }
    }
    close(fd);
    return rc;
}

/* ---- The header ---------------------------------------------------------------- */

struct range {
    uint64_t begin, end;
    const char *name;
};

static int range_order(const void *a, const void *b)
{
    const struct range *x = a, *y = b;

    if (x->begin != y->begin)
        return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end;
}

/* Read KEY of tensor NAME as an array of at most MAX integers >= 0; their number or an error. */
static int read_ints(const struct file *f, const char *name, const struct gen_json *info,
                     const char *key, int max, int64_t *out, struct mk_err *err)
{
    const struct gen_json *list = gen_json_get(info, key);
    int n = 0;

    if (!list || !gen_json_is_array(list))
        return gen_fail(err, MK_EFORMAT, "%s: %s: no list \"%s\"", f->path, name, key);
    for (const struct gen_json *v = gen_json_first(list); v; v = gen_json_next(v)) {
        if (n == max)
            return gen_fail(err, MK_EFORMAT, "%s: %s: \"%s\" has more than %d numbers", f->path,
                            name, key, max);
        /* doubles hold integers up to 2^53 exactly, and no file is larger */
        if (gen_json_int(v, 0, INT64_C(1) << 53, &out[n]))
            return gen_fail(err, MK_EFORMAT, "%s: %s: \"%s\" is not a list of sizes", f->path,
                            name, key);
        n++;
    }
    return n;
}

/* The data_offsets of a tensor, inside the DATA_SIZE bytes that the file has for data. */
static int read_range(const struct file *f, const char *name, const struct gen_json *info,
                      uint64_t data_size, struct range *out, struct mk_err *err)
{
    int64_t at[2];
    int n = read_ints(f, name, info, "data_offsets", 2, at, err);

    if (n < 0)
        return n;
    if (n != 2 || at[0] > at[1])
        return gen_fail(err, MK_EFORMAT, "%s: %s: \"data_offsets\" is not [begin, end]", f->path,
                        name);
    if ((uint64_t)at[1] > data_size)
        return gen_fail(err, MK_EFORMAT,
                        "%s: %s: its data end at byte %" PRId64 " of the %" PRIu64
                        " that the file has", f->path, name, at[1], data_size);
    *out = (struct range){(uint64_t)at[0], (uint64_t)at[1], name};
    return 0;
}

static int read_dtype(const struct file *f, const char *name, const struct gen_json *info,
                      int *dtype, struct mk_err *err)
{
    const char *text = gen_json_string(gen_json_get(info, "dtype"));

    if (!text)
        return gen_fail(err, MK_EFORMAT, "%s: %s: no string \"dtype\"", f->path, name);
    for (int i = 0; i < (int)(sizeof dtypes / sizeof dtypes[0]); i++)
        if (!strcmp(dtypes[i].name, text)) {
            *dtype = i;
            return 0;
        }
    return gen_fail(err, MK_EFORMAT, "%s: %s: dtype %.16s is not BF16, F16 or F32", f->path, name,
                    text);
}

/* The shape of TENSOR must be that of the model. */
static int check_shape(const struct rt_weights *w, const struct file *f, const char *name,
                       const struct gen_json *info, int tensor, struct mk_err *err)
{
    int64_t have[4], want[2];
    int rows, cols, n_want = is_vector(tensor) ? 1 : 2, at = 0;
    int n = read_ints(f, name, info, "shape", 4, have, err);
    char got[128] = "", should[64];

    if (n < 0)
        return n;
    rt_weights_shape(&w->m, tensor, &rows, &cols);
    want[0] = n_want == 1 ? cols : rows;
    want[1] = cols;
    if (n == n_want && have[0] == want[0] && (n == 1 || have[1] == want[1]))
        return 0;
    for (int i = 0; i < n; i++)
        at += snprintf(got + at, sizeof got - (size_t)at, "%s%" PRId64, i ? ", " : "", have[i]);
    snprintf(should, sizeof should, n_want == 1 ? "%" PRId64 : "%" PRId64 ", %" PRId64, want[0],
             want[1]);
    return gen_fail(err, MK_EFORMAT, "%s: %s: shape [%s] should be [%s]", f->path, name, got,
                    should);
}

/* One member of the header: check it, and keep where its data are. */
static int read_tensor(struct rt_weights *w, int file, const struct gen_json *info,
                       const unsigned char *data, uint64_t data_size, struct range *range,
                       struct mk_err *err)
{
    const struct file *f = &w->files[file];
    const char *name = gen_json_key(info);
    struct slot *s;
    int tensor, dtype = 0, rows, cols, rc;
    uint64_t bytes;

    if (!gen_json_is_object(info))
        return gen_fail(err, MK_EFORMAT, "%s: %s: not an object", f->path, name);
    rc = read_range(f, name, info, data_size, range, err);
    if (rc || is_ignored(name))
        return rc;
    s = slot_named(w, name, &tensor);
    if (!s)
        return gen_fail(err, MK_EFORMAT, "%s: %s: the model of config.json has no such tensor, "
                        "and it would be ignored", f->path, name);
    rc = read_dtype(f, name, info, &dtype, err);
    if (!rc)
        rc = check_shape(w, f, name, info, tensor, err);
    if (rc)
        return rc;
    rt_weights_shape(&w->m, tensor, &rows, &cols);
    bytes = (uint64_t)rows * (uint64_t)cols * (uint64_t)dtypes[dtype].size;
    if (range->end - range->begin != bytes)
        return gen_fail(err, MK_EFORMAT, "%s: %s: has %" PRIu64 " bytes of data and needs %" PRIu64,
                        f->path, name, range->end - range->begin, bytes);
    if (s->data)
        return gen_fail(err, MK_EFORMAT, "%s: %s: is also in %s", f->path, name,
                        w->files[s->file].name);
    if (w->has_index && !s->indexed)
        return gen_fail(err, MK_EFORMAT, "%s: %s: not in model.safetensors.index.json", f->path,
                        name);
    if (s->indexed && s->file != file)
        return gen_fail(err, MK_EFORMAT, "%s: %s: model.safetensors.index.json has it in %s",
                        f->path, name, w->files[s->file].name);
    s->file = file;
    s->dtype = dtype;
    s->data = data + range->begin;
    return 0;
}

/* The N ranges must cover the DATA_SIZE bytes exactly once. */
static int check_cover(const struct file *f, struct range *r, int n, uint64_t data_size,
                       struct mk_err *err)
{
    uint64_t at = 0;

    qsort(r, (size_t)n, sizeof *r, range_order);
    for (int i = 0; i < n; i++) {
        if (r[i].begin < at)
            return gen_fail(err, MK_EFORMAT, "%s: the data of %s and %s overlap", f->path,
                            r[i - 1].name, r[i].name);
        if (r[i].begin > at)
            return gen_fail(err, MK_EFORMAT, "%s: %" PRIu64 " bytes before %s belong to no tensor",
                            f->path, r[i].begin - at, r[i].name);
        at = r[i].end;
    }
    if (at != data_size)
        return gen_fail(err, MK_EFORMAT, "%s: %" PRIu64 " bytes at the end belong to no tensor",
                        f->path, data_size - at);
    return 0;
}

static int read_header(struct rt_weights *w, int file, const struct gen_json *root,
                       const unsigned char *data, uint64_t data_size, struct mk_err *err)
{
    const struct file *f = &w->files[file];
    struct range *ranges;
    int n = 0, rc = 0;

    if (!gen_json_is_object(root))
        return gen_fail(err, MK_EFORMAT, "%s: the header is not a JSON object", f->path);
    ranges = calloc((size_t)gen_json_count(root) + 1, sizeof *ranges);
    if (!ranges)
        return gen_fail(err, MK_ENOMEM, "%s: no memory for its header", f->path);
    for (const struct gen_json *v = gen_json_first(root); v && !rc; v = gen_json_next(v)) {
        if (!strcmp(gen_json_key(v), "__metadata__")) {
            if (!gen_json_is_object(v))
                rc = gen_fail(err, MK_EFORMAT, "%s: __metadata__ is not an object", f->path);
            continue;
        }
        rc = read_tensor(w, file, v, data, data_size, &ranges[n], err);
        n++;
    }
    if (!rc)
        rc = check_cover(f, ranges, n, data_size, err);
    free(ranges);
    return rc;
}

static int file_read(struct rt_weights *w, int file, struct mk_err *err)
{
    struct file *f = &w->files[file];
    struct gen_json *root = NULL;
    uint64_t len = 0;
    int rc = file_map(f, err);

    if (rc)
        return rc;
    for (int i = 7; i >= 0; i--)
        len = len << 8 | f->map[i];
    if (len > f->size - 8)
        return gen_fail(err, MK_EFORMAT, "%s: a header of %" PRIu64 " bytes in a file of %zu",
                        f->path, len, f->size);
    if (len > MAX_HEADER)
        return gen_fail(err, MK_EFORMAT, "%s: a header of %" PRIu64 " bytes; at most %d are read",
                        f->path, len, MAX_HEADER);
    rc = gen_json_parse((const char *)f->map + 8, (size_t)len, f->path, &root, err);
    if (!rc)
        rc = read_header(w, file, root, f->map + 8 + len, f->size - 8 - len, err);
    gen_json_free(root);
    return rc;
}

/* ---- The index ------------------------------------------------------------------- */

/* The number of the shard NAME, added if it is new. */
static int shard_number(struct rt_weights *w, const char *dir, const char *name,
                        struct mk_err *err)
{
    for (int i = w->n_files - 1; i >= 0; i--)
        if (!strcmp(w->files[i].name, name))
            return i;
    if (w->n_files == MAX_SHARDS)
        return gen_fail(err, MK_EFORMAT, "%s/model.safetensors.index.json: more than %d shards",
                        dir, MAX_SHARDS);
    return file_add(w, dir, name, err);
}

/* A shard is a file of the same folder: no path, no hidden file. */
static int is_shard_name(const char *name)
{
    return name && *name && *name != '.' && !strpbrk(name, "/\\") && strlen(name) < 256;
}

static int read_index(struct rt_weights *w, const char *dir, const char *path,
                      const struct gen_json *root, struct mk_err *err)
{
    const struct gen_json *map = gen_json_get(root, "weight_map");

    if (!map || !gen_json_is_object(map))
        return gen_fail(err, MK_EFORMAT, "%s: no object \"weight_map\"", path);
    for (const struct gen_json *v = gen_json_first(map); v; v = gen_json_next(v)) {
        const char *name = gen_json_key(v), *shard = gen_json_string(v);
        struct slot *s;
        int tensor, file;

        if (!is_shard_name(shard))
            return gen_fail(err, MK_EFORMAT, "%s: %s: the shard is not the name of a file in the "
                            "same folder", path, name);
        s = slot_named(w, name, &tensor);
        if (!s && !is_ignored(name))
            return gen_fail(err, MK_EFORMAT, "%s: %s: the model of config.json has no such tensor, "
                            "and it would be ignored", path, name);
        file = shard_number(w, dir, shard, err);
        if (file < 0)
            return file;
        if (s) {
            s->indexed = 1;
            s->file = file;
        }
    }
    if (!w->n_files)
        return gen_fail(err, MK_EFORMAT, "%s: \"weight_map\" is empty", path);
    w->has_index = 1;
    return 0;
}

/* Name the files of DIR: model.safetensors, or else the shards of the index. */
static int find_files(struct rt_weights *w, const char *dir, struct mk_err *err)
{
    static const char index_name[] = "model.safetensors.index.json";
    size_t size = strlen(dir) + sizeof index_name + 1;
    char *path = malloc(size);
    struct gen_json *root = NULL;
    int rc;

    if (!path)
        return gen_fail(err, MK_ENOMEM, "%s: no memory for a path", dir);
    snprintf(path, size, "%s/model.safetensors", dir);
    if (!access(path, F_OK)) {
        rc = file_add(w, dir, "model.safetensors", err);
        rc = rc < 0 ? rc : 0;
        goto done;
    }
    snprintf(path, size, "%s/%s", dir, index_name);
    if (access(path, F_OK)) {
        rc = gen_fail(err, MK_ENOENT, "%s: has neither model.safetensors nor %s", dir, index_name);
        goto done;
    }
    rc = gen_json_read(path, MAX_HEADER, &root, err);
    if (!rc)
        rc = read_index(w, dir, path, root, err);
done:
    gen_json_free(root);
    free(path);
    return rc;
}

/* ---- The whole checkpoint ------------------------------------------------------------ */

static void tensor_name(char *out, size_t size, int tensor, int layer)
{
    if (names[tensor].in_layer)
        snprintf(out, size, "model.layers.%d.%s", layer, names[tensor].name);
    else
        snprintf(out, size, "%s", names[tensor].name);
}

static int check_missing(const struct rt_weights *w, const char *dir, struct mk_err *err)
{
    char name[128];
    int rows, cols;

    for (int t = 0; t < RT_TENSORS; t++) {
        rt_weights_shape(&w->m, t, &rows, &cols);
        for (int l = 0; l < (names[t].in_layer ? w->m.L : 1); l++) {
            const struct slot *s = slot_of(w, t, l);

            if (!rows || s->data || (t == RT_HEAD && w->m.tied && !s->indexed))
                continue;
            tensor_name(name, sizeof name, t, l);
            if (s->indexed)
                return gen_fail(err, MK_EFORMAT, "%s: %s: the index says that it is here, and it "
                                "is not", w->files[s->file].path, name);
            return gen_fail(err, MK_EFORMAT, "%s: tensor %s is missing", dir, name);
        }
    }
    return 0;
}

/* A head beside a tied embedding is only tolerated when it says the same. */
static int check_tied(const struct rt_weights *w, struct mk_err *err)
{
    const struct slot *embed = slot_of(w, RT_EMBED, 0);
    struct slot *head = slot_of(w, RT_HEAD, 0);
    size_t bytes = (size_t)w->m.V * (size_t)w->m.D * (size_t)dtypes[embed->dtype].size;

    if (!w->m.tied)
        return 0;
    if (head->data && (head->dtype != embed->dtype || memcmp(head->data, embed->data, bytes)))
        return gen_fail(err, MK_EFORMAT, "%s: lm_head.weight: differs from "
                        "model.embed_tokens.weight, and config.json has tie_word_embeddings",
                        w->files[head->file].path);
    *head = *embed;
    return 0;
}

static int weights_make(const struct gen_model *m, struct rt_weights **out, struct mk_err *err)
{
    struct rt_weights *w = calloc(1, sizeof *w);

    *out = NULL;
    if (w)
        w->slots = calloc((size_t)RT_TENSORS * (size_t)m->L, sizeof *w->slots);
    if (!w || !w->slots) {
        free(w);
        return gen_fail(err, MK_ENOMEM, "%s: no memory for the list of tensors", m->name);
    }
    w->m = *m;
    *out = w;
    return 0;
}

int rt_weights_open(const char *dir, const struct gen_model *m, struct rt_weights **out,
                    struct mk_err *err)
{
    struct rt_weights *w;
    int rc = weights_make(m, &w, err);

    *out = NULL;
    if (!rc)
        rc = find_files(w, dir, err);
    for (int i = 0; !rc && i < w->n_files; i++)
        rc = file_read(w, i, err);
    if (!rc)
        rc = check_missing(w, dir, err);
    if (!rc)
        rc = check_tied(w, err);
    if (rc)
        rt_weights_close(w);
    else
        *out = w;
    return rc;
}

int rt_weights_random(const struct gen_model *m, uint64_t seed, struct rt_weights **out,
                      struct mk_err *err)
{
    int rc = weights_make(m, out, err);

    if (!rc) {
        (*out)->made = 1;
        (*out)->seed = seed;
    }
    return rc;
}

void rt_weights_close(struct rt_weights *w)
{
    if (!w)
        return;
    for (int i = 0; i < w->n_files; i++) {
        if (w->files[i].map)
            munmap((void *)w->files[i].map, w->files[i].size);
        free(w->files[i].path);
    }
    free(w->files);
    free(w->slots);
    free(w);
}

int rt_weights_made(const struct rt_weights *w, uint64_t *seed)
{
    if (w->made)
        *seed = w->seed;
    return w->made;
}

const void *rt_weights_data(const struct rt_weights *w, int tensor, int layer, int *dtype)
{
    const struct slot *s = slot_of(w, tensor, layer);

    if (w->made)
        return NULL;
    *dtype = s->dtype;
    return s->data;
}

static void get_made(const struct rt_weights *w, int tensor, int layer, int64_t first, int64_t n,
                     float *out)
{
    uint64_t key;
    int norm = is_norm(tensor);

    if (tensor == RT_HEAD && w->m.tied)
        tensor = RT_EMBED;
    key = made_key(w->seed, tensor, layer);
    for (int64_t i = 0; i < n; i++)
        out[i] = made_value(made_normal(key, (uint64_t)(first + i)), norm);
}

void rt_weights_get(const struct rt_weights *w, int tensor, int layer, int64_t first, int64_t n,
                    float *out)
{
    const struct slot *s = slot_of(w, tensor, layer);
    const unsigned char *p;
    uint16_t half;

    if (w->made) {
        get_made(w, tensor, layer, first, n, out);
        return;
    }
    p = s->data + first * dtypes[s->dtype].size;
    if (s->dtype == GEN_FP32) {
        memcpy(out, p, (size_t)n * sizeof *out);
        return;
    }
    /* byte by byte: a header of odd length leaves the data at odd addresses */
    for (int64_t i = 0; i < n; i++) {
        memcpy(&half, p + 2 * i, sizeof half);
        out[i] = s->dtype == GEN_BF16 ? rt_from_bf16(half) : rt_from_fp16(half);
    }
}
