/* fuzz-safetensors.c - any bytes as a checkpoint: refused with a sentence, or safe to read.

   The first byte of the input chooses: even, it is a file's header with the data behind it,
   for which the header length is written here (so that mutations reach the JSON); odd, the
   whole file; from 128 on, model.safetensors.index.json beside two good shards. */
#include "runtime/weights.h"
#include "tests/fuzz/fuzz.h"

#define PREFIX "\"model.layers.0."
#define T(shape, offsets) ":{\"dtype\":\"BF16\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

/* Good headers for the model below: two shards, and both in one file, B's data first. */
#define HEAD_A(embed, norm) "\"model.embed_tokens.weight\"" T("[2,8]", embed)   \
    ",\"model.norm.weight\"" T("[8]", norm)
#define HEAD_B PREFIX "input_layernorm.weight\"" T("[8]", "[0,16]")             \
    "," PREFIX "post_attention_layernorm.weight\"" T("[8]", "[16,32]")          \
    "," PREFIX "self_attn.q_proj.weight\"" T("[64,8]", "[32,1056]")             \
    "," PREFIX "self_attn.k_proj.weight\"" T("[64,8]", "[1056,2080]")           \
    "," PREFIX "self_attn.v_proj.weight\"" T("[64,8]", "[2080,3104]")           \
    "," PREFIX "self_attn.o_proj.weight\"" T("[8,64]", "[3104,4128]")           \
    "," PREFIX "mlp.gate_proj.weight\"" T("[8,8]", "[4128,4256]")               \
    "," PREFIX "mlp.up_proj.weight\"" T("[8,8]", "[4256,4384]")                 \
    "," PREFIX "mlp.down_proj.weight\"" T("[8,8]", "[4384,4512]")
#define SHARD_A "{" HEAD_A("[0,32]", "[32,48]") "}"
#define SHARD_B "{" HEAD_B "}"
#define WHOLE "{" HEAD_B "," HEAD_A("[4512,4544]", "[4544,4560]") "}"
#define IN(name, shard) name ":\"" shard "\""
#define INDEX "{\"metadata\":{\"total_size\":4560},\"weight_map\":{"                        \
    IN("\"model.embed_tokens.weight\"", "a.safetensors") ","                                \
    IN("\"model.norm.weight\"", "a.safetensors") ","                                        \
    IN(PREFIX "input_layernorm.weight\"", "b.safetensors") ","                              \
    IN(PREFIX "post_attention_layernorm.weight\"", "b.safetensors") ","                     \
    IN(PREFIX "self_attn.q_proj.weight\"", "b.safetensors") ","                             \
    IN(PREFIX "self_attn.k_proj.weight\"", "b.safetensors") ","                             \
    IN(PREFIX "self_attn.v_proj.weight\"", "b.safetensors") ","                             \
    IN(PREFIX "self_attn.o_proj.weight\"", "b.safetensors") ","                             \
    IN(PREFIX "mlp.gate_proj.weight\"", "b.safetensors") ","                                \
    IN(PREFIX "mlp.up_proj.weight\"", "b.safetensors") ","                                  \
    IN(PREFIX "mlp.down_proj.weight\"", "b.safetensors") "}}"

enum { DATA = 4560, DATA_A = 48 };

static const struct gen_model model = {
    .name = "fuzz", .family = "llama", .D = 8, .H = 1, .K = 1, .E = 64, .F = 8, .V = 2, .L = 1,
    .max_context = 16, .eps = 1e-5, .rope_theta = 1e4, .tied = 1,
};
static char dir[32];
static const unsigned char zeros[DATA];

static char *path_of(const char *name)
{
    static char path[128];

    snprintf(path, sizeof path, "%s/%s", dir, name);
    return path;
}

static void remove_all(void)
{
    static const char *const names[] = {"model.safetensors", "model.safetensors.index.json",
                                        "a.safetensors", "b.safetensors"};

    for (int i = 0; i < 4; i++)
        unlink(path_of(names[i]));
    rmdir(dir);
}

/* Write A, behind its length when WITH_LENGTH, and B. */
static void write_file(const char *name, int with_length, const void *a, size_t na, const void *b,
                       size_t nb)
{
    FILE *f = fopen(path_of(name), "wb");
    unsigned char len[8];

    for (int i = 0; i < 8; i++)
        len[i] = (unsigned char)((uint64_t)na >> (8 * i));
    if (!f || (with_length && fwrite(len, 1, 8, f) != 8) || fwrite(a, 1, na, f) != na ||
        fwrite(b, 1, nb, f) != nb || fclose(f))
        abort();
}

static void prepare(void)
{
    /* in memory where that is possible: every input writes a file */
    strcpy(dir, access("/dev/shm", W_OK) ? "/tmp/mk-fuzz-XXXXXX" : "/dev/shm/mk-fuzz-XXXXXX");
    if (!mkdtemp(dir))
        abort();
    atexit(remove_all);
    write_file("a.safetensors", 1, SHARD_A, sizeof SHARD_A - 1, zeros, DATA_A);
    write_file("b.safetensors", 1, SHARD_B, sizeof SHARD_B - 1, zeros, DATA - DATA_A);
}

/* What was accepted must be there to the last byte. */
static void read_all(const struct rt_weights *w)
{
    int rows, cols;
    float *x;

    for (int t = 0; t < RT_TENSORS; t++) {
        rt_weights_shape(&model, t, &rows, &cols);
        if (!rows)
            continue;
        x = malloc(sizeof *x * (size_t)(rows * cols));
        if (!x)
            abort();
        rt_weights_get(w, t, 0, 0, rows * cols, x);
        free(x);
    }
}

static const char *const words[] = {
    "\"dtype\"", "\"F32\"", "\"F16\"", "\"I64\"", "\"shape\"", "\"data_offsets\"", "[0,4560]",
    "\"__metadata__\":{},", "lm_head.weight", "rotary_emb.inv_freq", "layers.1.", "../", "bias",
    "a.safetensors", "\"weight_map\"", "9007199254740991", NULL
};
/* The first two are good, and must be accepted. */
static const struct fuzz_seed seeds[] = {
    {"\0" WHOLE, sizeof WHOLE}, {"\200" INDEX, sizeof INDEX},
    {"\1\2\0\0\0\0\0\0\0{}", 11}, {"\1\377\377\377\377\377\377\377\177{}", 11}, {NULL, 0}
};

static int is_good(const uint8_t *data, size_t size)
{
    for (int i = 0; i < 2; i++)
        if (size == seeds[i].size && !memcmp(data, seeds[i].data, size))
            return 1;
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int prepared;
    struct rt_weights *w;
    struct mk_err err = {0};
    int rc;

    if (!prepared++)
        prepare();
    if (!size)
        return 0;
    unlink(path_of("model.safetensors"));
    if (data[0] >= 128)
        write_file("model.safetensors.index.json", 0, data + 1, size - 1, "", 0);
    else if (data[0] % 2)
        write_file("model.safetensors", 0, data + 1, size - 1, "", 0);
    else
        write_file("model.safetensors", 1, data + 1, size - 1, zeros, DATA);
    rc = rt_weights_open(dir, &model, &w, &err);
    if (rc && is_good(data, size))
        abort();
    if (!rc)
        read_all(w);
    else if (w || rc != err.code || !err.text[0])
        abort();
    rt_weights_close(w);
    return 0;
}

FUZZ_MAIN(seeds, words, NULL)
