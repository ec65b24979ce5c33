/* model.c - see model.h.  Every key of a config.json is either used here or in a list of
   keys that are known to change nothing; any other key is an error that names it. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE             /* asprintf */
#endif
#include "gen/model.h"
#include <dirent.h>
#include <errno.h>
#include <libgen.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Limits that keep every size and product of sizes far inside 64 bits. */
enum {
    MAX_D = 65536, MAX_H = 1024, MAX_F = 262144, MAX_V = 4194304, MAX_L = 512,
    MAX_CONTEXT = 16777216, MAX_CONFIG_BYTES = 1 << 20, MAX_CARRIED = 256
};
_Static_assert(1LL * MAX_L * MAX_D * (3LL * MAX_F + 4LL * 128 * MAX_H) +
               2LL * MAX_V * MAX_D < 1LL << 60, "parameters fit in int64_t, in bytes too");

static const char *const families[] = {"qwen3", "qwen2", "llama"};
static const char *const classes[] = {"Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM"};
enum { N_FAMILIES = sizeof(families) / sizeof(families[0]) };

/* Keys that do not change what inference computes: training, bookkeeping, Hugging Face's
   own switches, and defaults of its sampling. */
static const char *const harmless[] = {
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
    "attention_dropout", "attn_implementation", "bos_token_id", "chunk_size_feed_forward",
    "decoder_start_token_id", "do_sample", "finetuning_task", "id2label", "initializer_range",
    "is_llama_config", "label2id", "max_length", "max_window_layers", "neftune_noise_alpha",
    "output_attentions", "output_hidden_states", "pad_token_id", "prefix", "pretraining_tp",
    "problem_type", "return_dict", "sep_token_id", "task_specific_params", "temperature",
    "tokenizer_class", "top_k", "top_p", "torchscript", "transformers.js_config",
    "transformers_version", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
    NULL
};

/* Keys that read_all takes values from. */
static const char *const used[] = {
    "architectures", "dtype", "eos_token_id", "head_dim", "hidden_act", "hidden_size",
    "intermediate_size", "layer_types", "max_position_embeddings", "model_type",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "partial_rotary_factor",
    "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window",
    "tie_word_embeddings", "torch_dtype", "vocab_size", NULL
};

/* Keys that change the arithmetic unless they are false. */
static const char *const must_be_false[] = {
    "add_cross_attention", "attention_bias", "is_encoder_decoder", "mlp_bias",
    "rope_interleaved", "use_mrope", "use_sliding_window", NULL
};

static const char *const rope_keys[] = {
    "partial_rotary_factor", "rope_theta", "rope_type", "type", NULL
};
static const char *const llama3_keys[] = {
    "factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings", NULL
};

static int listed(const char *const *list, const char *key)
{
    while (*list && strcmp(*list, key))
        list++;
    return *list != NULL;
}

/* An object of the config under reading.  IN is "" or "rope_scaling.", for error texts. */
struct reader {
    const struct gen_json *object;
    const char *name;
    const char *in;
    struct mk_err *err;
};

/* V as it may stand in an error text. */
static const char *shown(const struct gen_json *v, char *buf, size_t size)
{
    double d;
    int b;

    if (!v)
        return "nothing";
    if (gen_json_string(v))
        snprintf(buf, size, "\"%.60s\"", gen_json_string(v));
    else if (gen_json_double(v, &d) == 0)
        snprintf(buf, size, "%.15g", d);
    else if (gen_json_bool(v, &b) == 0)
        snprintf(buf, size, "%s", b ? "true" : "false");
    else
        snprintf(buf, size, "%s", gen_json_is_array(v) ? "a list" : gen_json_is_object(v)
                 ? "an object" : gen_json_is_null(v) ? "null" : "a number out of range");
    return buf;
}

static const struct gen_json *get(const struct reader *r, const char *key)
{
    return gen_json_get(r->object, key);
}

static int has(const struct reader *r, const char *key)
{
    return get(r, key) && !gen_json_is_null(get(r, key));
}

static int fail_key(const struct reader *r, int code, const char *key, const char *expected)
{
    char buf[128];

    if (!get(r, key))
        return gen_fail(r->err, code, "%s: key \"%s%s\" is missing; expected %s", r->name, r->in,
                        key, expected);
    return gen_fail(r->err, code, "%s: key \"%s%s\": expected %s, found %s", r->name, r->in, key,
                    expected, shown(get(r, key), buf, sizeof(buf)));
}

static int read_int(const struct reader *r, const char *key, int lo, int hi, int step, int *out)
{
    char expected[80];
    int64_t v;

    snprintf(expected, sizeof(expected), step > 1 ? "a multiple of %3$d from %1$d to %2$d"
                                                  : "an integer from %1$d to %2$d", lo, hi, step);
    if (gen_json_int(get(r, key), lo, hi, &v) || v % step)
        return fail_key(r, MK_EFORMAT, key, expected);
    *out = (int)v;
    return 0;
}

static int read_double(const struct reader *r, const char *key, double lo, double hi,
                       double *out)
{
    char expected[80];

    snprintf(expected, sizeof(expected), "a number from %g to %g", lo, hi);
    if (gen_json_double(get(r, key), out) || *out < lo || *out > hi)
        return fail_key(r, MK_EFORMAT, key, expected);
    return 0;
}

/* Every key must be known; the ones with one allowed value must have it. */
static int check_keys(const struct reader *r)
{
    const struct gen_json *v;
    int b, rc = 0;

    for (v = gen_json_first(r->object); v && rc == 0; v = gen_json_next(v)) {
        const char *key = gen_json_key(v);

        if (listed(used, key) || listed(harmless, key))
            continue;
        if (listed(must_be_false, key)) {
            if (gen_json_is_null(v) || (gen_json_bool(v, &b) == 0 && !b))
                continue;
            rc = fail_key(r, MK_EUNSUPPORTED, key, "false (nothing else is supported)");
        } else if (!strcmp(key, "quantization_config")) {
            if (!gen_json_is_null(v))
                rc = gen_fail(r->err, MK_EUNSUPPORTED, "%s: key \"quantization_config\": "
                              "quantized checkpoints are not supported; use the bf16, fp16 or "
                              "fp32 one", r->name);
        } else {
            rc = gen_fail(r->err, MK_EUNSUPPORTED, "%s: key \"%.200s\" is not known and may "
                          "change the arithmetic", r->name, key);
        }
    }
    return rc;
}

/* model_type, and architectures if it is there. */
static int read_family(const struct reader *r, struct gen_model *m)
{
    const char *type = gen_json_string(get(r, "model_type"));
    const struct gen_json *v;
    char buf[128];
    int i = 0;

    if (!type)
        return fail_key(r, MK_EFORMAT, "model_type", "\"qwen3\", \"qwen2\" or \"llama\"");
    while (i < N_FAMILIES && strcmp(families[i], type))
        i++;
    if (i == N_FAMILIES)
        return fail_key(r, MK_EUNSUPPORTED, "model_type", "\"qwen3\", \"qwen2\" or \"llama\" "
                        "(no other family is supported)");
    snprintf(m->family, sizeof(m->family), "%s", families[i]);
    m->qk_norm = !strcmp(type, "qwen3");
    m->qkv_bias = !strcmp(type, "qwen2");
    if (!has(r, "architectures"))
        return 0;
    v = gen_json_first(get(r, "architectures"));
    if (!gen_json_string(v) || strcmp(gen_json_string(v), classes[i]))
        return gen_fail(r->err, MK_EUNSUPPORTED, "%s: key \"architectures\": expected \"%s\" "
                        "first for model_type \"%s\", found %s", r->name, classes[i], type,
                        shown(v, buf, sizeof(buf)));
    return 0;
}

/* head_dim is D / H when it is absent, but not for qwen3, where Hugging Face then takes 128. */
static int read_head_dim(const struct reader *r, struct gen_model *m)
{
    if (has(r, "head_dim") || m->qk_norm) {
        int rc = read_int(r, "head_dim", 1, 65536, 1, &m->E);

        if (rc)
            return rc;
    } else {
        if (m->D % m->H)
            return gen_fail(r->err, MK_EFORMAT, "%s: key \"head_dim\" is missing, and "
                            "hidden_size %d is no multiple of num_attention_heads %d", r->name,
                            m->D, m->H);
        m->E = m->D / m->H;
    }
    if (m->E != 64 && m->E != 128)
        return gen_fail(r->err, MK_EUNSUPPORTED, "%s: head_dim %d%s is not supported; only 64 "
                        "and 128 are", r->name, m->E,
                        has(r, "head_dim") ? "" : " (hidden_size / num_attention_heads)");
    return 0;
}

static int read_sizes(const struct reader *r, struct gen_model *m)
{
    int rc;

    if ((rc = read_int(r, "hidden_size", 8, MAX_D, 8, &m->D)) ||
        (rc = read_int(r, "num_attention_heads", 1, MAX_H, 1, &m->H)) ||
        (rc = read_head_dim(r, m)) ||
        (rc = read_int(r, "intermediate_size", 8, MAX_F, 8, &m->F)) ||
        (rc = read_int(r, "vocab_size", 1, MAX_V, 1, &m->V)) ||
        (rc = read_int(r, "num_hidden_layers", 1, MAX_L, 1, &m->L)) ||
        (rc = read_int(r, "max_position_embeddings", 1, MAX_CONTEXT, 1, &m->max_context)) ||
        (rc = read_double(r, "rms_norm_eps", 1e-12, 0.1, &m->eps)))
        return rc;
    m->K = m->H;
    if (has(r, "num_key_value_heads"))
        rc = read_int(r, "num_key_value_heads", 1, MAX_H, 1, &m->K);
    if (rc == 0 && m->H % m->K)
        rc = gen_fail(r->err, MK_EFORMAT, "%s: num_attention_heads %d is no multiple of "
                      "num_key_value_heads %d", r->name, m->H, m->K);
    return rc;
}

/* Every layer must attend to everything before it. */
static int check_attention(const struct reader *r, const struct gen_model *m)
{
    const struct gen_json *v = get(r, "layer_types");
    int64_t window;

    if (has(r, "sliding_window") && !strcmp(m->family, "llama"))
        return fail_key(r, MK_EUNSUPPORTED, "sliding_window", "null (nothing else is supported)");
    if (has(r, "sliding_window") && gen_json_int(get(r, "sliding_window"), 0, INT32_MAX, &window))
        return fail_key(r, MK_EFORMAT, "sliding_window", "null or an integer");
    if (!has(r, "layer_types"))
        return 0;
    if (!gen_json_is_array(v) || gen_json_count(v) != m->L)
        return gen_fail(r->err, MK_EFORMAT, "%s: key \"layer_types\": expected a list of "
                        "num_hidden_layers = %d names", r->name, m->L);
    for (v = gen_json_first(v); v; v = gen_json_next(v)) {
        if (!gen_json_string(v) || strcmp(gen_json_string(v), "full_attention"))
            return gen_fail(r->err, MK_EUNSUPPORTED, "%s: key \"layer_types\": only "
                            "\"full_attention\" is supported", r->name);
    }
    return 0;
}

static int read_partial(const struct reader *r)
{
    double d;

    if (!has(r, "partial_rotary_factor"))
        return 0;
    if (gen_json_double(get(r, "partial_rotary_factor"), &d) || d != 1)
        return fail_key(r, MK_EUNSUPPORTED, "partial_rotary_factor",
                        "1 (nothing else is supported)");
    return 0;
}

/* rope_theta of the config or of rope_parameters; both may be there if they agree. */
static int read_theta(const struct reader *r, struct gen_model *m)
{
    double before = m->rope_theta;
    int rc;

    if (!has(r, "rope_theta"))
        return 0;
    rc = read_double(r, "rope_theta", 1.0001, 1e12, &m->rope_theta);
    if (rc == 0 && before && before != m->rope_theta)
        rc = gen_fail(r->err, MK_EFORMAT, "%s: key \"%srope_theta\" %g contradicts rope_theta %g",
                      r->name, r->in, m->rope_theta, before);
    return rc;
}

static int read_llama3(const struct reader *r, struct gen_model *m)
{
    int rc;

    if ((rc = read_double(r, "factor", 1, 1e6, &m->rope_factor)) ||
        (rc = read_double(r, "low_freq_factor", 1e-3, 1e6, &m->rope_low)) ||
        (rc = read_double(r, "high_freq_factor", 1e-3, 1e6, &m->rope_high)) ||
        (rc = read_int(r, "original_max_position_embeddings", 1, MAX_CONTEXT, 1,
                       &m->rope_original)))
        return rc;
    if (m->rope_high <= m->rope_low)
        return gen_fail(r->err, MK_EFORMAT, "%s: key \"%shigh_freq_factor\" %g must be greater "
                        "than low_freq_factor %g", r->name, r->in, m->rope_high, m->rope_low);
    m->rope = GEN_ROPE_LLAMA3;
    return 0;
}

/* rope_type, or type in older configs; neither: "default". */
static int read_rope_type(const struct reader *r, const char **type)
{
    const char *new_name = gen_json_string(get(r, "rope_type"));
    const char *old_name = gen_json_string(get(r, "type"));

    *type = new_name ? new_name : old_name ? old_name : "default";
    if ((has(r, "rope_type") && !new_name) || (has(r, "type") && !old_name))
        return fail_key(r, MK_EFORMAT, has(r, "rope_type") && !new_name ? "rope_type" : "type",
                        "a string");
    if (new_name && old_name && strcmp(new_name, old_name))
        return gen_fail(r->err, MK_EFORMAT, "%s: key \"%stype\" \"%.60s\" contradicts rope_type "
                        "\"%.60s\"", r->name, r->in, old_name, new_name);
    if (strcmp(*type, "default") && strcmp(*type, "llama3"))
        return fail_key(r, MK_EUNSUPPORTED, new_name ? "rope_type" : "type",
                        "\"default\" or \"llama3\" (no other kind of RoPE is supported)");
    return 0;
}

/* The object KEY (IN is "KEY."): rope_scaling, or rope_parameters as transformers 5 calls it. */
static int read_rope_object(const struct reader *outer, const char *key, const char *in,
                            struct gen_model *m)
{
    struct reader r = {get(outer, key), outer->name, in, outer->err};
    const struct gen_json *v;
    const char *type;
    int rc, llama3;

    if (!has(outer, key))
        return 0;
    if (!gen_json_is_object(r.object))
        return fail_key(outer, MK_EFORMAT, key, "null or an object");
    if ((rc = read_rope_type(&r, &type)) || (rc = read_theta(&r, m)) || (rc = read_partial(&r)))
        return rc;
    llama3 = !strcmp(type, "llama3");
    for (v = gen_json_first(r.object); v; v = gen_json_next(v)) {
        const char *k = gen_json_key(v);

        if (!listed(rope_keys, k) && !(llama3 && listed(llama3_keys, k)))
            return gen_fail(r.err, MK_EUNSUPPORTED, "%s: key \"%s%.200s\" is not known for RoPE "
                            "type \"%s\" and may change the arithmetic", r.name, in, k, type);
    }
    return llama3 ? read_llama3(&r, m) : 0;
}

static int read_rope(const struct reader *r, struct gen_model *m)
{
    int rc;

    m->rope = GEN_ROPE_PLAIN;
    if (has(r, "rope_scaling") && has(r, "rope_parameters"))
        return gen_fail(r->err, MK_EFORMAT, "%s: both rope_scaling and rope_parameters are there",
                        r->name);
    if ((rc = read_partial(r)) || (rc = read_theta(r, m)) ||
        (rc = read_rope_object(r, "rope_scaling", "rope_scaling.", m)) ||
        (rc = read_rope_object(r, "rope_parameters", "rope_parameters.", m)))
        return rc;
    /* Hugging Face takes 10000 when it is absent: right for the first llamas, and a known
       mistake for the others, which all name it. */
    if (!m->rope_theta && !strcmp(m->family, "llama"))
        m->rope_theta = 10000;
    if (!m->rope_theta)
        return fail_key(r, MK_EFORMAT, "rope_theta", "a number from 1.0001 to 1e+12");
    return 0;
}

static int read_dtype(const struct reader *r, const char *key, int *dtype)
{
    static const char *const names[] = {"bfloat16", "float16", "float32"};
    const char *s = gen_json_string(get(r, key));
    int i = 0;

    if (!has(r, key))
        return 0;
    while (i < 3 && (!s || strcmp(s, names[i])))
        i++;
    if (i == 3)
        return fail_key(r, MK_EUNSUPPORTED, key, "\"bfloat16\", \"float16\" or \"float32\"");
    if (*dtype >= 0 && *dtype != i)
        return gen_fail(r->err, MK_EFORMAT, "%s: torch_dtype \"%s\" contradicts dtype \"%s\"",
                        r->name, names[i], names[*dtype]);
    *dtype = i;
    return 0;
}

static int add_end(const struct reader *r, const struct gen_json *v, struct gen_model *m)
{
    char expected[80];
    int64_t id;

    snprintf(expected, sizeof(expected), "token ids from 0 to vocab_size - 1 = %d", m->V - 1);
    if (gen_json_int(v, 0, m->V - 1, &id))
        return fail_key(r, MK_EFORMAT, "eos_token_id", expected);
    for (int i = 0; i < m->n_end; i++) {
        if (m->end[i] == id)
            return 0;
    }
    if (m->n_end == (int)(sizeof(m->end) / sizeof(m->end[0])))
        return gen_fail(r->err, MK_EUNSUPPORTED, "%s: key \"eos_token_id\": more than %d end "
                        "tokens", r->name, m->n_end);
    m->end[m->n_end++] = (int)id;
    return 0;
}

/* eos_token_id: absent, null, a number or a list. */
static int read_end(const struct reader *r, struct gen_model *m)
{
    const struct gen_json *v = get(r, "eos_token_id");
    int rc = 0;

    if (!has(r, "eos_token_id"))
        return 0;
    if (!gen_json_is_array(v))
        return add_end(r, v, m);
    for (v = gen_json_first(v); v && rc == 0; v = gen_json_next(v))
        rc = add_end(r, v, m);
    return rc;
}

static int read_rest(const struct reader *r, struct gen_model *m)
{
    const char *act = gen_json_string(get(r, "hidden_act"));
    int rc;

    if (!act || strcmp(act, "silu"))
        return fail_key(r, MK_EUNSUPPORTED, "hidden_act", "\"silu\" (no other is supported)");
    m->tied = 0;
    if (has(r, "tie_word_embeddings") && gen_json_bool(get(r, "tie_word_embeddings"), &m->tied))
        return fail_key(r, MK_EFORMAT, "tie_word_embeddings", "true or false");
    m->dtype = -1;
    if ((rc = read_dtype(r, "dtype", &m->dtype)) || (rc = read_dtype(r, "torch_dtype", &m->dtype)))
        return rc;
    if (m->dtype < 0)
        m->dtype = GEN_BF16;
    return read_end(r, m);
}

/* model.name from PATH: its last component without ".json", or the folder of config.json. */
static void set_name(struct gen_model *m, const char *path)
{
    size_t end = strlen(path), start, n = 0;

    while (end && path[end - 1] == '/')
        end--;
    if (end >= 11 && !strncmp(path + end - 11, "config.json", 11) &&
        (end == 11 || path[end - 12] == '/'))
        end -= 11;
    else if (end > 5 && !strncmp(path + end - 5, ".json", 5))
        end -= 5;
    while (end && path[end - 1] == '/')
        end--;
    for (start = end; start && path[start - 1] != '/'; start--)
        ;
    for (; start < end && n < sizeof(m->name) - 1; start++) {
        char c = path[start];
        int safe = (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') ||
                   c == '.' || c == '_';

        if (n || (safe && c != '.'))    /* no hidden file, no option */
            m->name[n++] = safe ? c : '-';
    }
    m->name[n] = '\0';
    if (n == 0)
        snprintf(m->name, sizeof(m->name), "model");
}

static int read_config(const struct gen_json *root, const char *name, struct gen_model *m,
                       struct mk_err *err)
{
    struct reader r = {root, name, "", err};
    int rc;

    if (!gen_json_is_object(root))
        return gen_fail(err, MK_EFORMAT, "%s: expected an object { ... }", name);
    if ((rc = read_family(&r, m)) || (rc = check_keys(&r)) || (rc = read_sizes(&r, m)) ||
        (rc = check_attention(&r, m)) || (rc = read_rope(&r, m)))
        return rc;
    return read_rest(&r, m);
}

int gen_model_parse(const char *text, size_t len, const char *name,
                    struct gen_model *out, struct mk_err *err)
{
    struct gen_model m = {0};
    struct gen_json *root;
    int rc;

    if (len > MAX_CONFIG_BYTES)
        return gen_fail(err, MK_EFORMAT, "%s: %zu bytes; at most %d are read", name, len,
                        MAX_CONFIG_BYTES);
    rc = gen_json_parse(text, len, name, &root, err);
    if (rc)
        return rc;
    rc = read_config(root, name, &m, err);
    gen_json_free(root);
    if (rc == 0) {
        set_name(&m, name);
        *out = m;
    }
    return rc;
}

/* generation_config.json in the folder of PATH adds end tokens, if it is there. */
static int read_generation(const char *path, struct gen_model *m, struct mk_err *err)
{
    const char *slash = strrchr(path, '/');
    struct gen_json *root = NULL;
    char *other = NULL;
    int rc;

    if (asprintf(&other, "%.*sgeneration_config.json", slash ? (int)(slash + 1 - path) : 0,
                 path) < 0)
        return gen_fail(err, MK_ENOMEM, "%s: no memory", path);
    rc = access(other, F_OK) ? 0 : gen_json_read(other, MAX_CONFIG_BYTES, &root, err);
    if (root) {
        struct reader r = {root, other, "", err};

        rc = gen_json_is_object(root) ? read_end(&r, m)
             : gen_fail(err, MK_EFORMAT, "%s: expected an object { ... }", other);
    }
    gen_json_free(root);
    free(other);
    return rc;
}

/* As set_name, but a config.json in "." or ".." is named after that folder.  Not so in general:
   a folder that is a link keeps the name that the user gave it. */
static void set_name_of_file(struct gen_model *m, const char *path)
{
    char *folder = strdup(path), *base = strdup(path), *real = NULL;

    if (folder && base && !strcmp(basename(base), "config.json")) {
        const char *last = strrchr(dirname(folder), '/');

        last = last ? last + 1 : folder;
        if (!strcmp(last, ".") || !strcmp(last, ".."))
            real = realpath(folder, NULL);
    }
    set_name(m, real ? real : path);
    free(real);
    free(base);
    free(folder);
}

static int read_file(const char *path, struct gen_model *out, struct mk_err *err)
{
    struct gen_model m = {0};
    struct gen_json *root;
    int rc = gen_json_read(path, MAX_CONFIG_BYTES, &root, err);

    if (rc)
        return rc;
    rc = read_config(root, path, &m, err);
    gen_json_free(root);
    if (rc == 0)
        rc = read_generation(path, &m, err);
    if (rc)
        return rc;
    set_name_of_file(&m, path);
    *out = m;
    return 0;
}

/* ---- Carried models ------------------------------------------------------ */

int gen_model_place(int i, char *buf, size_t size)
{
    static const char *const near_program[] = {"../../models", "../models", "models",
                                               "../share/mkgen/models"};
    const char *env = getenv("MK_MODELS_DIR");
    ssize_t n;

    if (i >= 7)
        return -1;
    if (i == 0)
        return env && *env ? snprintf(buf, size, "%s", env) >= (int)size : 1;
    if (i == 1) {
#ifdef MODELS_DIR
        return snprintf(buf, size, "%s", MODELS_DIR) >= (int)size;
#else
        return 1;
#endif
    }
    if (i == 6)     /* last: a stranger's folder may have that name */
        return snprintf(buf, size, "models") >= (int)size;
    n = readlink("/proc/self/exe", buf, size);
    while (n > 0 && n < (ssize_t)size && buf[n - 1] != '/')
        n--;
    if (n <= 0 || n >= (ssize_t)size)
        return 1;
    size -= (size_t)n;
    return snprintf(buf + n, size, "%s", near_program[i - 2]) >= (int)size;
}

/* 1 if PLACE/NAME/config.json is a file; BUF then holds PLACE/NAME. */
static int carried_in(const char *folder, const char *name, char *buf, size_t size)
{
    char file[4400];
    struct stat st;

    if (snprintf(buf, size, "%s/%s", folder, name) >= (int)size)
        return 0;
    snprintf(file, sizeof(file), "%s/config.json", buf);
    return stat(file, &st) == 0 && S_ISREG(st.st_mode);
}

static int plain_name(const char *name)
{
    size_t n = strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-");

    return n && n < 64 && !name[n] && name[0] != '.' && name[0] != '-';
}

const char *gen_model_folder(const char *name)
{
    static char found[4352];
    char folder[4096];
    int rc;

    if (!name || !plain_name(name))
        return NULL;
    for (int i = 0; (rc = gen_model_place(i, folder, sizeof(folder))) >= 0; i++) {
        if (rc == 0 && carried_in(folder, name, found, sizeof(found)))
            return found;
    }
    return NULL;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(a, b);
}

/* Add the models in FOLDER to NAMES, of which there are N; returns how many there are then. */
static int list_folder(const char *folder, char (*names)[64], int n)
{
    DIR *dir = opendir(folder);
    struct dirent *entry;
    char path[4352];

    while (dir && n < MAX_CARRIED && (entry = readdir(dir))) {
        int i = 0;

        if (!plain_name(entry->d_name) ||
            !carried_in(folder, entry->d_name, path, sizeof(path)))
            continue;
        while (i < n && strcmp(names[i], entry->d_name))
            i++;
        if (i == n)
            snprintf(names[n++], sizeof(names[0]), "%.63s", entry->d_name);
    }
    if (dir)
        closedir(dir);
    return n;
}

const char *gen_model_carried(int i)
{
    static char names[MAX_CARRIED][64];
    static int n = -1;
    char folder[4096];
    int rc;

    if (i == 0 || n < 0) {              /* a new round looks again */
        n = 0;
        for (int p = 0; (rc = gen_model_place(p, folder, sizeof(folder))) >= 0; p++) {
            if (rc == 0)
                n = list_folder(folder, names, n);
        }
        qsort(names, (size_t)n, sizeof(names[0]), by_name);
    }
    return i >= 0 && i < n ? names[i] : NULL;
}

static int fail_unknown(const char *where, struct mk_err *err)
{
    char list[3000] = "";
    const char *name;
    size_t n = 0;

    for (int i = 0; n + 70 < sizeof(list) && (name = gen_model_carried(i)); i++)
        n += (size_t)snprintf(list + n, sizeof(list) - n, "%s%s", i ? ", " : "", name);
    return gen_fail(err, MK_ENOENT, "%.500s: no such file or folder, and no model of that name; "
                    "known are: %s", where, n ? list : "none (no models folder was found)");
}

/* Does FOLDER have a config.json, of whatever kind? */
static int has_config(const char *folder)
{
    char file[4400];
    struct stat st;

    return snprintf(file, sizeof(file), "%s/config.json", folder) >= (int)sizeof(file) ||
           lstat(file, &st) == 0;
}

int gen_model_config(const char *where, char **path, struct mk_err *err)
{
    const char *folder = where, *carried;
    struct stat st;

    *path = NULL;
    if (stat(where, &st)) {
        if (errno != ENOENT && errno != ENOTDIR)
            return gen_fail(err, MK_EIO, "%.500s: cannot stat: %s", where, strerror(errno));
        folder = gen_model_folder(where);
        if (!folder)
            return fail_unknown(where, err);
    } else if (!S_ISDIR(st.st_mode)) {
        *path = strdup(where);
        return *path ? 0 : gen_fail(err, MK_ENOMEM, "%s: no memory", where);
    } else if (!has_config(where) && (carried = gen_model_folder(where))) {
        folder = carried;       /* a folder that happens to have a carried model's name */
    }
    if (asprintf(path, "%s/config.json", folder) < 0) {
        *path = NULL;
        return gen_fail(err, MK_ENOMEM, "%s: no memory", where);
    }
    return 0;
}

int gen_model_read(const char *where, struct gen_model *out, struct mk_err *err)
{
    char *path;
    int rc = gen_model_config(where, &path, err);

    if (rc == 0)
        rc = read_file(path, out, err);
    free(path);
    return rc;
}

/* ---- Numbers that follow from the config --------------------------------- */

/* In float and in this order because Hugging Face does so; the pow alone is done in double,
   and rounded, so that it does not depend on the C library. */
float gen_model_inv_freq(const struct gen_model *m, int i)
{
    float exponent = (float)(2 * i) / (float)m->E;
    float inv = 1.0f / (float)pow((double)(float)m->rope_theta, (double)exponent);
    float wavelen, smooth;
    volatile float far, near;           /* volatile: never fused into one rounding */

    if (m->rope != GEN_ROPE_LLAMA3)
        return inv;
    wavelen = (float)(2 * M_PI) / inv;
    if (wavelen > (float)(m->rope_original / m->rope_low))
        return inv / (float)m->rope_factor;
    if (wavelen < (float)(m->rope_original / m->rope_high))
        return inv;
    smooth = ((float)m->rope_original / wavelen - (float)m->rope_low) /
             (float)(m->rope_high - m->rope_low);
    far = (1.0f - smooth) * inv / (float)m->rope_factor;
    near = smooth * inv;
    return far + near;
}

/* Parameters of one layer: projections, norms, biases. */
static int64_t layer_params(const struct gen_model *m)
{
    int64_t q = (int64_t)m->H * m->E, kv = (int64_t)m->K * m->E;

    return m->D * (2 * q + 2 * kv) + (int64_t)3 * m->D * m->F + 2 * m->D +
           (m->qk_norm ? 2 * m->E : 0) + (m->qkv_bias ? q + 2 * kv : 0);
}

int64_t gen_model_params(const struct gen_model *m)
{
    int64_t head = (int64_t)m->V * m->D;

    return m->L * layer_params(m) + m->D + (m->tied ? head : 2 * head);
}

int64_t gen_model_params_read(const struct gen_model *m)
{
    return m->L * layer_params(m) + m->D + (int64_t)m->V * m->D;
}
