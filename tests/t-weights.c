/* t-weights.c - safetensors that are good in every way and bad in every way; made weights. */
#include "runtime/weights.h"
#include "tests/check.h"
#include <dirent.h>
#include <stdint.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static char dir[64];                    /* the scratch folder */
static const struct gen_model small = {
    .name = "small", .family = "llama", .D = 8, .H = 1, .K = 1, .E = 64, .F = 8, .V = 4, .L = 1,
    .max_context = 16, .eps = 1e-5, .rope_theta = 1e4, .tied = 1, .dtype = GEN_BF16,
};
static const char *const dtype_names[] = {"BF16", "F16", "F32"};
static const char *const in_layer[RT_TENSORS] = {
    [RT_ATTN_NORM] = "input_layernorm.weight",
    [RT_Q] = "self_attn.q_proj.weight", [RT_K] = "self_attn.k_proj.weight",
    [RT_V] = "self_attn.v_proj.weight", [RT_Q_BIAS] = "self_attn.q_proj.bias",
    [RT_K_BIAS] = "self_attn.k_proj.bias", [RT_V_BIAS] = "self_attn.v_proj.bias",
    [RT_Q_NORM] = "self_attn.q_norm.weight", [RT_K_NORM] = "self_attn.k_norm.weight",
    [RT_O] = "self_attn.o_proj.weight", [RT_MLP_NORM] = "post_attention_layernorm.weight",
    [RT_GATE] = "mlp.gate_proj.weight", [RT_UP] = "mlp.up_proj.weight",
    [RT_DOWN] = "mlp.down_proj.weight",
};

/* A file in memory: header text and data. */
struct image {
    char *header;
    size_t header_len, header_cap;
    unsigned char *data;
    size_t size, cap;
};

static void *grown(void *p, size_t need, size_t *cap)
{
    if (need > *cap) {
        *cap = 2 * need + 256;
        p = realloc(p, *cap);
    }
    return p;
}

static void name_of(char *out, size_t size, int tensor, int layer)
{
    if (in_layer[tensor])
        snprintf(out, size, "model.layers.%d.%s", layer, in_layer[tensor]);
    else
        snprintf(out, size, "%s", tensor == RT_EMBED ? "model.embed_tokens.weight"
                                  : tensor == RT_HEAD ? "lm_head.weight" : "model.norm.weight");
}

static void add_value(struct image *f, int dtype, float x)
{
    uint16_t half = dtype == GEN_BF16 ? rt_to_bf16(x) : rt_to_fp16(x);
    size_t n = dtype == GEN_FP32 ? 4 : 2;

    f->data = grown(f->data, f->size + n, &f->cap);
    memcpy(f->data + f->size, dtype == GEN_FP32 ? (void *) &x : (void *) &half, n);
    f->size += n;
}

/* Add a tensor with the values of rt_weights_value(9, ...). */
static void add_tensor(struct image *f, const struct gen_model *m, int tensor, int layer, int dtype)
{
    int rows, cols;
    char name[128], shape[64];
    size_t begin = f->size;

    rt_weights_shape(m, tensor, &rows, &cols);
    name_of(name, sizeof name, tensor, layer);
    if (strstr(name, "norm") || strstr(name, "bias"))
        snprintf(shape, sizeof shape, "[%d]", cols);
    else
        snprintf(shape, sizeof shape, "[%d,%d]", rows, cols);
    for (int i = 0; i < rows * cols; i++)
        add_value(f, dtype, rt_weights_value(9, tensor, layer, (uint64_t)i));
    f->header = grown(f->header, f->header_len + 512, &f->header_cap);
    f->header_len += (size_t)snprintf(f->header + f->header_len, 512,
        "%s\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}",
        f->header_len ? "," : "{", name, dtype_names[dtype], shape, begin, f->size);
}

/* Every tensor of M; the dtype is DTYPE, or goes round when it is -1. */
static void add_all(struct image *f, const struct gen_model *m, int dtype)
{
    int rows, cols, n = 0;

    for (int t = 0; t < RT_TENSORS; t++) {
        rt_weights_shape(m, t, &rows, &cols);
        if (!rows || (t == RT_HEAD && m->tied))
            continue;
        for (int l = 0; l < (in_layer[t] ? m->L : 1); l++, n++)
            add_tensor(f, m, t, l, dtype < 0 ? n % 3 : dtype);
    }
}

static void image_end(struct image *f)
{
    f->header = grown(f->header, f->header_len + 2, &f->header_cap);
    strcpy(f->header + f->header_len, "}");
    f->header_len++;
}

static void image_free(struct image *f)
{
    free(f->header);
    free(f->data);
    *f = (struct image){0};
}

static const char *path_of(const char *name)
{
    static char path[1024];

    snprintf(path, sizeof path, "%s/%s", dir, name);
    return path;
}

static void write_bytes(const char *name, const void *a, size_t na, const void *b, size_t nb,
                        const void *c, size_t nc)
{
    FILE *f = fopen(path_of(name), "wb");

    CHECK(f && fwrite(a, 1, na, f) == na && fwrite(b, 1, nb, f) == nb && fwrite(c, 1, nc, f) == nc);
    CHECK(f && fclose(f) == 0);
}

static void write_file(const char *name, const char *header, size_t header_len,
                       const unsigned char *data, size_t size)
{
    unsigned char len[8];

    for (int i = 0; i < 8; i++)
        len[i] = (unsigned char)((uint64_t)header_len >> (8 * i));
    write_bytes(name, len, 8, header, header_len, data, size);
}

static void write_image(const char *name, struct image *f)
{
    write_file(name, f->header, f->header_len, f->data, f->size);
}

static void write_text(const char *name, const char *text)
{
    write_bytes(name, text, strlen(text), "", 0, "", 0);
}

static void empty_folder(void)
{
    DIR *d = opendir(dir);
    struct dirent *e;

    while (d && (e = readdir(d)))
        if (e->d_name[0] != '.' && unlink(path_of(e->d_name)))
            rmdir(path_of(e->d_name));
    if (d)
        closedir(d);
}

/* Opening the folder must fail with CODE and WANT, in which @ stands for the folder. */
static void refuse(const struct gen_model *m, int code, const char *want)
{
    struct rt_weights *w = (void *) &w;
    struct mk_err err = {0};
    char text[2048] = "";
    int rc = rt_weights_open(dir, m, &w, &err);

    for (const char *p = want; *p; p++)
        snprintf(text + strlen(text), sizeof text - strlen(text), "%s", *p == '@' ? dir
                 : (char[]){*p, 0});
    CHECKF(rc == code, "code %d, want %d for \"%s\"", rc, code, want);
    CHECK_STR(err.text, text);
    CHECK(!w);
    CHECK(rt_weights_open(dir, m, &w, NULL) == code);
}

static struct rt_weights *opened(const struct gen_model *m)
{
    struct rt_weights *w;
    struct mk_err err = {0};
    int rc = rt_weights_open(dir, m, &w, &err);

    CHECKF(rc == 0, "%s", err.text);
    return w;
}

/* ---- Good files ---- */

static void check_values(const struct gen_model *m, const struct rt_weights *w)
{
    int rows, cols, dtype, wrong = 0;
    uint64_t seed;
    float *got;

    CHECK(rt_weights_made(w, &seed) == 0);
    for (int t = 0; t < RT_TENSORS; t++) {
        rt_weights_shape(m, t, &rows, &cols);
        if (!rows)
            continue;
        got = malloc(sizeof *got * (size_t)(rows * cols));
        for (int l = 0; l < (in_layer[t] ? m->L : 1); l++) {
            int as = t == RT_HEAD && m->tied ? RT_EMBED : t;

            CHECK(rt_weights_data(w, t, l, &dtype) != NULL);
            rt_weights_get(w, t, l, 0, rows * cols, got);
            for (int i = 0; i < rows * cols; i++)
                wrong += got[i] != rt_round(rt_weights_value(9, as, l, (uint64_t)i), dtype);
            rt_weights_get(w, t, l, 3, 2, got);
            wrong += got[1] != rt_round(rt_weights_value(9, as, l, 4), dtype);
        }
        free(got);
    }
    CHECK(wrong == 0);
}

static void check_good(const struct gen_model *m, int dtype, const char *padding)
{
    struct image f = {0};
    struct rt_weights *w;

    empty_folder();
    add_all(&f, m, dtype);
    image_end(&f);
    f.header = grown(f.header, f.header_len + strlen(padding) + 1, &f.header_cap);
    strcpy(f.header + f.header_len, padding);
    f.header_len += strlen(padding);
    write_image("model.safetensors", &f);
    w = opened(m);
    if (w)
        check_values(m, w);
    rt_weights_close(w);
    image_free(&f);
}

static void check_all_good(void)
{
    struct gen_model full = small;

    for (int dtype = -1; dtype < 3; dtype++)
        for (int pad = 0; pad < 3; pad++)       /* data at odd addresses, too */
            check_good(&small, dtype, &"  "[pad]);
    full.L = 3;
    full.tied = 0;
    full.qk_norm = full.qkv_bias = 1;
    full.H = 2;
    for (int dtype = -1; dtype < 3; dtype++)
        check_good(&full, dtype, "");
}

/* 80 layers, 880 tensors: the time to open must not grow with their square. */
static void check_many(void)
{
    struct gen_model m = small;
    struct timespec a, b;

    m.L = 80;
    clock_gettime(CLOCK_MONOTONIC, &a);
    check_good(&m, GEN_BF16, "");
    clock_gettime(CLOCK_MONOTONIC, &b);
    CHECKF(b.tv_sec - a.tv_sec < 5, "880 tensors took %ld s", (long)(b.tv_sec - a.tv_sec));
}

static void check_extras(void)
{
    struct gen_model m = small;
    struct image f = {0};
    struct rt_weights *w;

    /* a head beside a tied embedding, with the same bytes */
    empty_folder();
    add_all(&f, &m, GEN_FP16);
    add_tensor(&f, &m, RT_HEAD, 0, GEN_FP16);
    image_end(&f);
    memcpy(f.data + f.size - 64, f.data, 64);
    write_image("model.safetensors", &f);
    w = opened(&m);
    rt_weights_close(w);
    f.data[f.size - 1] ^= 1;
    write_image("model.safetensors", &f);
    refuse(&m, MK_EFORMAT, "@/model.safetensors: lm_head.weight: differs from "
           "model.embed_tokens.weight, and config.json has tie_word_embeddings");
    image_free(&f);

    /* metadata, and the frequencies that old checkpoints carry */
    add_all(&f, &m, GEN_BF16);
    f.header_len += (size_t)sprintf(f.header + f.header_len,
        ",\"__metadata__\":{\"format\":\"pt\"},\"model.layers.0.self_attn.rotary_emb.inv_freq\":"
        "{\"dtype\":\"F32\",\"shape\":[32],\"data_offsets\":[%zu,%zu]}", f.size, f.size + 128);
    for (int i = 0; i < 32; i++)
        add_value(&f, GEN_FP32, 1);
    image_end(&f);
    write_image("model.safetensors", &f);
    w = opened(&m);
    if (w)
        check_values(&m, w);
    rt_weights_close(w);
    image_free(&f);
}

/* ---- Bad headers ---- */

/* The first FROM in the good header becomes TO. */
static const struct {
    const char *from, *to, *want;
} bad[] = {
    {"{\"model.embed", "[\"model.embed", "line 1, column 29: not JSON"},
    {"}}", "}", "the JSON ends too early"},
    {"}}", "}}x", "something follows the end of the JSON"},
    {"embed_tokens", "embed\\u0000tokens",
     "line 1, column 14: the character \\u0000 inside a string"},
    {"embed_tokens", "embed\xfftokens", "line 1, column 14: not UTF-8"},
    {"model.norm.weight", "model.embed_tokens.weight",
     "key \"model.embed_tokens.weight\" stands twice in one object"},
    {"\"dtype\":\"BF16\"", "\"dtype\":\"F64\"",
     "model.embed_tokens.weight: dtype F64 is not BF16, F16 or F32"},
    {"\"dtype\":\"BF16\"", "\"dtype\":\"F8_E4M3\"",
     "model.embed_tokens.weight: dtype F8_E4M3 is not BF16, F16 or F32"},
    {"\"dtype\":\"BF16\"", "\"dtype\":2", "model.embed_tokens.weight: no string \"dtype\""},
    {"\"dtype\":\"BF16\"", "\"type\":\"BF16\"", "model.embed_tokens.weight: no string \"dtype\""},
    {"\"dtype\":\"BF16\"", "\"dtype\":\"F32\"",
     "model.embed_tokens.weight: has 64 bytes of data and needs 128"},
    {"[4,8]", "[8,4]", "model.embed_tokens.weight: shape [8, 4] should be [4, 8]"},
    {"[4,8]", "[32]", "model.embed_tokens.weight: shape [32] should be [4, 8]"},
    {"[4,8]", "[4,8,1]", "model.embed_tokens.weight: shape [4, 8, 1] should be [4, 8]"},
    {"[4,8]", "[]", "model.embed_tokens.weight: shape [] should be [4, 8]"},
    {"[4,8]", "[4,8,1,1,1]", "model.embed_tokens.weight: \"shape\" has more than 4 numbers"},
    {"[4,8]", "[4,-8]", "model.embed_tokens.weight: \"shape\" is not a list of sizes"},
    {"[4,8]", "[4,8.5]", "model.embed_tokens.weight: \"shape\" is not a list of sizes"},
    {"[4,8]", "[4,1e300]", "model.embed_tokens.weight: \"shape\" is not a list of sizes"},
    {"[4,8]", "[4,18446744073709551624]",
     "model.embed_tokens.weight: \"shape\" is not a list of sizes"},
    {"[4,8]", "32", "model.embed_tokens.weight: no list \"shape\""},
    {"[8]", "[8,1]", "model.norm.weight: shape [8, 1] should be [8]"},
    {"[0,64]", "[64,0]", "model.embed_tokens.weight: \"data_offsets\" is not [begin, end]"},
    {"[0,64]", "[0]", "model.embed_tokens.weight: \"data_offsets\" is not [begin, end]"},
    {"[0,64]", "[0,64,64]", "model.embed_tokens.weight: \"data_offsets\" has more than 2 numbers"},
    {"[0,64]", "[\"0\",64]", "model.embed_tokens.weight: \"data_offsets\" is not a list of sizes"},
    {"[0,64]", "[0,4593]",
     "model.embed_tokens.weight: its data end at byte 4593 of the 4592 that the file has"},
    {"[0,64]", "[9007199254740900,9007199254740964]", "model.embed_tokens.weight: its data end at "
     "byte 9007199254740964 of the 4592 that the file has"},
    {"[0,64]", "[-64,0]", "model.embed_tokens.weight: \"data_offsets\" is not a list of sizes"},
    {"[0,64]", "[0,63]", "model.embed_tokens.weight: has 63 bytes of data and needs 64"},
    {"[0,64]", "[2,66]", "2 bytes before model.embed_tokens.weight belong to no tensor"},
    {"[0,64]", "[16,80]", "16 bytes before model.embed_tokens.weight belong to no tensor"},
    {"[64,80]", "[62,78]", "the data of model.embed_tokens.weight and model.norm.weight overlap"},
    {"[64,80]", "[80,96]", "16 bytes before model.norm.weight belong to no tensor"},
    {"model.norm.weight", "model.norm.scale", "model.norm.scale: the model of config.json has no "
     "such tensor, and it would be ignored"},
    {"layers.0.input", "layers.00.input", "model.layers.00.input_layernorm.weight: the model of "
     "config.json has no such tensor, and it would be ignored"},
    {"layers.0.input", "layers.1.input", "model.layers.1.input_layernorm.weight: the model of "
     "config.json has no such tensor, and it would be ignored"},
    {"layers.0.input", "layers.99999999999999999999.input",
     "model.layers.99999999999999999999.input_layernorm.weight: the model of config.json has no "
     "such tensor, and it would be ignored"},
    {"layers.0.input", "layers.-0.input", "model.layers.-0.input_layernorm.weight: the model of "
     "config.json has no such tensor, and it would be ignored"},
    {"q_proj.weight", "q_proj.bias", "model.layers.0.self_attn.q_proj.bias: the model of "
     "config.json has no such tensor, and it would be ignored"},
    {"{\"dtype\":\"BF16\",\"shape\":[4,8],\"data_offsets\":[0,64]}", "null",
     "model.embed_tokens.weight: not an object"},
    {"{\"model", "{\"__metadata__\":[],\"model", "__metadata__ is not an object"},
};

static char *replaced(const char *text, const char *from, const char *to)
{
    const char *at = strstr(text, from);
    char *out = malloc(strlen(text) + strlen(to) + 1);

    CHECKF(at != NULL, "no %s in the good header", from);
    at = at ? at : text;
    sprintf(out, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    return out;
}

static void check_bad_headers(void)
{
    struct image f = {0};
    char want[512];

    empty_folder();
    add_all(&f, &small, GEN_BF16);
    image_end(&f);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        char *header = replaced(f.header, bad[i].from, bad[i].to);
        int whole = strncmp(bad[i].want, "the JSON ends", 13) &&
                    strncmp(bad[i].want, "something follows", 17);

        write_file("model.safetensors", header, strlen(header), f.data, f.size);
        if (whole)
            snprintf(want, sizeof want, "@/model.safetensors: %s", bad[i].want);
        else                                    /* found at the end of the header */
            snprintf(want, sizeof want, "@/model.safetensors: line 1, column %zu: %s",
                     strlen(header) + (bad[i].want[0] == 't'), bad[i].want);
        refuse(&small, MK_EFORMAT, want);
        free(header);
    }
    image_free(&f);
}

static void check_missing_tensors(void)
{
    struct gen_model m = small;
    struct image f = {0};

    empty_folder();
    add_all(&f, &m, GEN_BF16);
    image_end(&f);
    write_image("model.safetensors", &f);
    m.tied = 0;
    refuse(&m, MK_EFORMAT, "@: tensor lm_head.weight is missing");
    m = small;
    m.L = 2;
    refuse(&m, MK_EFORMAT, "@: tensor model.layers.1.input_layernorm.weight is missing");
    m = small;
    m.qk_norm = 1;
    refuse(&m, MK_EFORMAT, "@: tensor model.layers.0.self_attn.q_norm.weight is missing");
    m = small;
    m.qkv_bias = 1;
    refuse(&m, MK_EFORMAT, "@: tensor model.layers.0.self_attn.q_proj.bias is missing");
    image_free(&f);
}

/* ---- Bad files ---- */

static void check_bad_files(void)
{
    struct image f = {0};
    static const unsigned char huge[8] = {255, 255, 255, 255, 255, 255, 255, 255};
    static const unsigned char nine[8] = {9}, big[8] = {1, 0, 0, 1};
    const char *deep = "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[";

    empty_folder();
    refuse(&small, MK_ENOENT, "@: has neither model.safetensors nor model.safetensors.index.json");
    mkdir(path_of("model.safetensors"), 0700);
    refuse(&small, MK_EIO, "@/model.safetensors: not a regular file");
    empty_folder();
    CHECK(mkfifo(path_of("model.safetensors"), 0600) == 0);
    refuse(&small, MK_EIO, "@/model.safetensors: not a regular file");
    empty_folder();
    write_text("model.safetensors", "");
    refuse(&small, MK_EFORMAT, "@/model.safetensors: 0 bytes are too few for a safetensors file");
    write_text("model.safetensors", "1234567");
    refuse(&small, MK_EFORMAT, "@/model.safetensors: 7 bytes are too few for a safetensors file");
    write_bytes("model.safetensors", huge, 8, "{}", 2, "", 0);
    refuse(&small, MK_EFORMAT,
           "@/model.safetensors: a header of 18446744073709551615 bytes in a file of 10");
    write_bytes("model.safetensors", nine, 8, "{}", 2, "", 0);
    refuse(&small, MK_EFORMAT, "@/model.safetensors: a header of 9 bytes in a file of 10");
    write_bytes("model.safetensors", big, 8, "{}", 2, "", 0);
    CHECK(truncate(path_of("model.safetensors"), 17 << 20) == 0);
    refuse(&small, MK_EFORMAT,
           "@/model.safetensors: a header of 16777217 bytes; at most 16777216 are read");
    write_file("model.safetensors", "", 0, (const unsigned char *)"", 0);
    refuse(&small, MK_EFORMAT, "@/model.safetensors: empty, expected JSON");
    write_file("model.safetensors", "[]", 2, (const unsigned char *)"", 0);
    refuse(&small, MK_EFORMAT, "@/model.safetensors: the header is not a JSON object");
    write_file("model.safetensors", "{}", 2, (const unsigned char *)"", 0);
    refuse(&small, MK_EFORMAT, "@: tensor model.embed_tokens.weight is missing");
    write_file("model.safetensors", deep, strlen(deep), (const unsigned char *)"", 0);
    refuse(&small, MK_EFORMAT,
           "@/model.safetensors: line 1, column 65: nested deeper than 64 levels");
    add_all(&f, &small, GEN_BF16);
    image_end(&f);
    write_file("model.safetensors", f.header, f.header_len, f.data, f.size - 1);
    refuse(&small, MK_EFORMAT, "@/model.safetensors: model.layers.0.mlp.down_proj.weight: its "
           "data end at byte 4592 of the 4591 that the file has");
    add_value(&f, GEN_BF16, 0);
    write_image("model.safetensors", &f);
    refuse(&small, MK_EFORMAT, "@/model.safetensors: 2 bytes at the end belong to no tensor");
    image_free(&f);
}

/* ---- Shards ---- */

/* The embedding and the norm in a.safetensors, the rest in b.safetensors; EXTRA (or -1) in
   both; LEAVE_OUT in none. */
static void write_shards(int extra, int leave_out)
{
    struct image f[2] = {{0}, {0}};
    int rows, cols;

    for (int t = 0; t < RT_TENSORS; t++) {
        rt_weights_shape(&small, t, &rows, &cols);
        if (!rows || t == RT_HEAD || t == leave_out)
            continue;
        for (int i = 0; i < 2; i++)
            if (i == (t > RT_NORM) || t == extra)
                add_tensor(&f[i], &small, t, 0, GEN_BF16);
    }
    for (int i = 0; i < 2; i++) {
        image_end(&f[i]);
        write_image(i ? "b.safetensors" : "a.safetensors", &f[i]);
        image_free(&f[i]);
    }
}

/* The index of write_shards; the first FROM becomes TO. */
static void write_index(const char *from, const char *to)
{
    char text[4096] = "{\"metadata\":{\"total_size\":4592},\"weight_map\":{", name[128], *out;
    int rows, cols;

    for (int t = 0; t < RT_TENSORS; t++) {
        rt_weights_shape(&small, t, &rows, &cols);
        if (!rows || t == RT_HEAD)
            continue;
        name_of(name, sizeof name, t, 0);
        snprintf(text + strlen(text), sizeof text - strlen(text), "%s\"%s\":\"%s.safetensors\"",
                 t ? "," : "", name, t > RT_NORM ? "b" : "a");
    }
    strcat(text, "}}");
    out = replaced(text, from, to);
    write_text("model.safetensors.index.json", out);
    free(out);
}

static void refuse_index(const char *from, const char *to, int code, const char *want)
{
    write_index(from, to);
    refuse(&small, code, want);
}

static void check_shards(void)
{
    struct rt_weights *w;

    empty_folder();
    write_shards(-1, -1);
    write_index("", "");
    w = opened(&small);
    if (w)
        check_values(&small, w);
    rt_weights_close(w);

    refuse_index("\"a.safetensors\"", "\"c.safetensors\"", MK_ENOENT,
                 "@/c.safetensors: No such file or directory");
    refuse_index("\"a.safetensors\"", "\"b.safetensors\"", MK_EFORMAT,
                 "@/a.safetensors: model.embed_tokens.weight: model.safetensors.index.json has it "
                 "in b.safetensors");
    refuse_index("\"model.embed_tokens.weight\":\"a.safetensors\",", "", MK_EFORMAT,
                 "@/a.safetensors: model.embed_tokens.weight: not in model.safetensors.index.json");
    refuse_index("embed_tokens", "wte", MK_EFORMAT, "@/model.safetensors.index.json: "
                 "model.wte.weight: the model of config.json has no such tensor, and it would be "
                 "ignored");
    static const char *const names[] = {"\"../a.safetensors\"", "\"/etc/passwd\"", "\"..\"",
                                        "\"x/a.safetensors\"", "\"a\\\\b\"", "\".hidden\"", "\"\"",
                                        "7", "null", "[\"a.safetensors\"]"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        refuse_index("\"a.safetensors\"", names[i], MK_EFORMAT,
                     "@/model.safetensors.index.json: model.embed_tokens.weight: the shard is not "
                     "the name of a file in the same folder");
    refuse_index("weight_map", "weights", MK_EFORMAT,
                 "@/model.safetensors.index.json: no object \"weight_map\"");
    refuse_index("model.norm.weight", "model.embed_tokens.weight", MK_EFORMAT,
                 "@/model.safetensors.index.json: key \"model.embed_tokens.weight\" stands twice "
                 "in one object");
    write_text("model.safetensors.index.json", "{\"weight_map\":{}}");
    refuse(&small, MK_EFORMAT, "@/model.safetensors.index.json: \"weight_map\" is empty");
    write_text("model.safetensors.index.json", "{\"weight_map\":[]}");
    refuse(&small, MK_EFORMAT, "@/model.safetensors.index.json: no object \"weight_map\"");
    write_text("model.safetensors.index.json", "");
    refuse(&small, MK_EFORMAT, "@/model.safetensors.index.json: empty, expected JSON");

    write_index("", "");
    write_shards(RT_EMBED, -1);
    refuse(&small, MK_EFORMAT,
           "@/b.safetensors: model.embed_tokens.weight: is also in a.safetensors");
    write_shards(RT_GATE, -1);
    refuse(&small, MK_EFORMAT, "@/a.safetensors: model.layers.0.mlp.gate_proj.weight: "
           "model.safetensors.index.json has it in b.safetensors");
    write_shards(-1, RT_GATE);
    refuse(&small, MK_EFORMAT, "@/b.safetensors: model.layers.0.mlp.gate_proj.weight: the index "
           "says that it is here, and it is not");
    write_shards(-1, -1);
    unlink(path_of("b.safetensors"));
    refuse(&small, MK_ENOENT, "@/b.safetensors: No such file or directory");
}

/* ---- Numbers ---- */

/* Every number of a 16-bit type comes back, and between two neighbours the nearest wins. */
static void check_rounding(int type, int largest)
{
    uint16_t (*to)(float) = type == GEN_BF16 ? rt_to_bf16 : rt_to_fp16;
    float (*from)(uint16_t) = type == GEN_BF16 ? rt_from_bf16 : rt_from_fp16;
    int wrong = 0;

    for (int h = 0; h <= largest; h++) {
        float x = from((uint16_t)h), mid = 0.5f * (x + from((uint16_t)(h + 1)));

        wrong += to(x) != h || to(-x) != (h | 0x8000) || from((uint16_t)(h | 0x8000)) != -x;
        wrong += rt_round(x, type) != x;
        if (h == largest || !isfinite(mid) || mid == x)
            continue;                   /* the sum overflows, or float has no middle */
        wrong += to(mid) != ((h + 1) & ~1);
        wrong += to(nextafterf(mid, 0)) != h || to(nextafterf(mid, INFINITY)) != h + 1;
    }
    CHECKF(wrong == 0, "type %d: %d wrong roundings", type, wrong);
}

static void check_numbers(void)
{
    check_rounding(GEN_BF16, 0x7f7f);
    check_rounding(GEN_FP16, 0x7bff);
    CHECK(rt_from_fp16(0x3c00) == 1 && rt_from_fp16(0x0001) == 0x1p-24f);
    CHECK(rt_from_fp16(0x7bff) == 65504 && rt_from_fp16(0xc000) == -2);
    CHECK(isinf(rt_from_fp16(0x7c00)) && isnan(rt_from_fp16(0x7e00)));
    CHECK(rt_to_fp16(1e6f) == 0x7bff && rt_to_fp16(-INFINITY) == 0xfbff);
    CHECK(rt_to_fp16(65519.996f) == 0x7bff && rt_to_fp16(65520) == 0x7bff);
    CHECK(isnan(rt_from_fp16(rt_to_fp16(NAN))) && isnan(rt_from_bf16(rt_to_bf16(NAN))));
    CHECK(rt_from_bf16(0x3f80) == 1 && isinf(rt_from_bf16(rt_to_bf16(INFINITY))));
    CHECK(rt_round(1.00390625f, GEN_BF16) == 1 && rt_round(0.1f, GEN_FP32) == 0.1f);
}

static void check_made(void)
{
    struct gen_model m = small;
    struct rt_weights *w;
    struct mk_err err = {0};
    double sum = 0, squares = 0;
    uint64_t seed = 0;
    float a[32], b[32];
    int dtype;

    /* computed with Python's integers and numpy's float32 */
    CHECK(rt_weights_value(7, RT_EMBED, 0, 0) == -0x1.713da6p-7f);
    CHECK(rt_weights_value(7, RT_Q, 27, 123456789) == -0x1.20f144p-8f);
    CHECK(rt_weights_value(7, RT_ATTN_NORM, 1, 5) == 0x1.f4fe02p-1f);
    CHECK(rt_weights_value(7, RT_NORM, 0, 575) == 0x1.f461c6p-1f);
    CHECK(rt_weights_value(UINT64_MAX, RT_Q_BIAS, 3, 2) == 0x1.bc3d32p-8f);
    for (int i = 0; i < 100000; i++) {
        double x = rt_weights_value(1, RT_DOWN, 0, (uint64_t)i) / 0.02;

        sum += x;
        squares += x * x;
    }
    CHECK(fabs(sum / 1e5) < 0.01 && fabs(squares / 1e5 - 1) < 0.02);

    CHECK(rt_weights_random(&m, 11, &w, &err) == 0);
    CHECK(rt_weights_made(w, &seed) == 1 && seed == 11);
    CHECK(rt_weights_data(w, RT_EMBED, 0, &dtype) == NULL);
    rt_weights_get(w, RT_EMBED, 0, 0, 32, a);
    rt_weights_get(w, RT_HEAD, 0, 0, 32, b);
    CHECK(!memcmp(a, b, sizeof a) && a[3] == rt_weights_value(11, RT_EMBED, 0, 3));
    rt_weights_get(w, RT_UP, 0, 17, 1, b);
    CHECK(b[0] == rt_weights_value(11, RT_UP, 0, 17));
    rt_weights_close(w);
    rt_weights_close(NULL);
}

int main(void)
{
    const char *tmp = getenv("TMPDIR");

    snprintf(dir, sizeof dir, "%s/mk-weights-XXXXXX", tmp && strlen(tmp) < 40 ? tmp : "/tmp");
    if (!mkdtemp(dir)) {
        perror(dir);
        return 1;
    }
    check_all_good();
    check_many();
    check_extras();
    check_bad_headers();
    check_missing_tensors();
    check_bad_files();
    check_shards();
    check_numbers();
    check_made();
    empty_folder();
    rmdir(dir);
    return check_done();
}
