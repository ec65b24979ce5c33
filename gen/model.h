/* model.h - config.json -> struct gen_model.  The config is the truth. */
#ifndef GEN_MODEL_H
#define GEN_MODEL_H
#include "gen/json.h"

enum gen_dtype { GEN_BF16, GEN_FP16, GEN_FP32 };
enum gen_rope { GEN_ROPE_PLAIN, GEN_ROPE_LLAMA3 };

struct gen_model {
    char name[64];          /* folder name, [A-Za-z0-9._-] only; others become '-' */
    char family[16];        /* model_type: qwen3, qwen2, llama */
    int D;                  /* hidden_size */
    int H;                  /* num_attention_heads */
    int K;                  /* num_key_value_heads (absent: H) */
    int E;                  /* head_dim (absent: D / H); 64 or 128 */
    int F;                  /* intermediate_size */
    int V;                  /* vocab_size */
    int L;                  /* num_hidden_layers */
    int max_context;        /* max_position_embeddings */
    double eps;             /* rms_norm_eps */
    int rope;               /* enum gen_rope */
    double rope_theta;      /* rope_theta */
    double rope_factor;     /* rope_scaling.factor, llama3 only, as the next three */
    double rope_low;        /* low_freq_factor */
    double rope_high;       /* high_freq_factor */
    int rope_original;      /* original_max_position_embeddings */
    int qk_norm;            /* 1: RMSNorm of each q and k head (qwen3) */
    int qkv_bias;           /* 1: q, k and v projections have a bias (qwen2) */
    int tied;               /* tie_word_embeddings: the head is the embedding */
    int dtype;              /* enum gen_dtype of torch_dtype / dtype; absent: GEN_BF16 */
    int n_end;              /* eos_token_id: a number or a list */
    int end[8];
};

/* Read WHERE: a config.json file, a folder that has one, or the name of a model that
   we carry (looked for in $MK_MODELS_DIR, the source tree's models/, the installed
   models folder).  generation_config.json beside it adds end tokens.
   Returns 0, MK_ENOENT (lists the known names), MK_EIO, MK_EFORMAT (a key that is
   malformed, out of range, or contradicts another; the text names file and key),
   MK_EUNSUPPORTED (model_type, activation, rope type, a key that changes the
   arithmetic and that we do not know). */
int gen_model_read(const char *where, struct gen_model *out, struct mk_err *err);

/* The config.json that WHERE means there, malloc'd; its weights lie beside it.
   Returns 0, MK_ENOENT, MK_EIO, MK_ENOMEM, and *path is NULL then. */
int gen_model_config(const char *where, char **path, struct mk_err *err);

/* The same from JSON text in memory; NAME stands in errors and gives model.name. */
int gen_model_parse(const char *text, size_t len, const char *name,
                    struct gen_model *out, struct mk_err *err);

/* The folder of a carried model, or NULL; and an iterator over carried names, sorted:
   gen_model_carried(i) is NULL past the end.  Static storage, not thread safe. */
const char *gen_model_folder(const char *name);
const char *gen_model_carried(int i);
/* Folder number I in which carried models are looked for, into BUF of SIZE bytes: 0, 1 when there is
   none of this number, -1 past the end. */
int gen_model_place(int i, char *buf, size_t size);

/* inv_freq of rotary dimension pair I (0 <= i < E/2), scaled as the config says,
   rounded to float as Hugging Face does. */
float gen_model_inv_freq(const struct gen_model *m, int i);

/* Parameters of the model, and how many of them one decoded token must read
   (all but the embedding when it is not tied). */
int64_t gen_model_params(const struct gen_model *m);
int64_t gen_model_params_read(const struct gen_model *m);
#endif
