/* weights.h - the tensors of a checkpoint: found, checked against the model, mapped. */
#ifndef RT_WEIGHTS_H
#define RT_WEIGHTS_H
#include "gen/model.h"

/* Which tensor: the Hugging Face name is in the comment (N: layer). */
enum rt_tensor {
    RT_EMBED,       /* model.embed_tokens.weight                    [V][D] */
    RT_HEAD,        /* lm_head.weight                               [V][D]  (tied: the same data as RT_EMBED) */
    RT_NORM,        /* model.norm.weight                            [D] */
    RT_ATTN_NORM,   /* model.layers.N.input_layernorm.weight        [D] */
    RT_Q, RT_K, RT_V, /* model.layers.N.self_attn.{q,k,v}_proj.weight [H*E][D], [K*E][D], [K*E][D] */
    RT_Q_BIAS, RT_K_BIAS, RT_V_BIAS, /* .bias                       [H*E], [K*E], [K*E]   (qkv_bias) */
    RT_Q_NORM, RT_K_NORM, /* model.layers.N.self_attn.{q,k}_norm.weight [E]  (qk_norm) */
    RT_O,           /* model.layers.N.self_attn.o_proj.weight       [D][H*E] */
    RT_MLP_NORM,    /* model.layers.N.post_attention_layernorm.weight [D] */
    RT_GATE, RT_UP, /* model.layers.N.mlp.{gate,up}_proj.weight     [F][D] */
    RT_DOWN,        /* model.layers.N.mlp.down_proj.weight          [D][F] */
    RT_TENSORS
};

struct rt_weights;

/* Open the safetensors of the folder DIR: model.safetensors, or the shards that
   model.safetensors.index.json names.  Maps the files, checks every header (length,
   UTF-8, JSON, dtype, shape against MODEL, offsets inside the file, no overlap, no
   gap) and that the tensors are exactly those of MODEL: one that is missing and one
   that would be ignored are both MK_EFORMAT errors that name it.  Exceptions that
   change nothing: lm_head.weight beside a tied embedding when its bytes are equal,
   and *.rotary_emb.inv_freq.  The files stay mapped: who truncates one while it is open
   kills the program with SIGBUS.
   Returns 0, MK_ENOENT, MK_EIO, MK_EFORMAT, MK_ENOMEM. */
int rt_weights_open(const char *dir, const struct gen_model *m, struct rt_weights **out, struct mk_err *err);

/* Weights that are made, not read: element I of a tensor is a function of (SEED,
   tensor, layer, I) alone, computed alike on host and device (see rt_weights_value). */
int rt_weights_random(const struct gen_model *m, uint64_t seed, struct rt_weights **out, struct mk_err *err);
void rt_weights_close(struct rt_weights *w);

/* A tensor's shape: rows (1 for a vector) and columns; 0 rows: the model has none. */
void rt_weights_shape(const struct gen_model *m, int tensor, int *rows, int *cols);

/* The mapped data of a tensor, row-major, in its stored DTYPE (enum gen_dtype), or
   NULL for made weights.  LAYER is 0 for the tensors outside the layers. */
const void *rt_weights_data(const struct rt_weights *w, int tensor, int layer, int *dtype);

/* Copy N elements from element FIRST of a tensor to OUT as float, unrounded.  Works for
   read and made weights, from any thread. */
void rt_weights_get(const struct rt_weights *w, int tensor, int layer, int64_t first, int64_t n, float *out);

/* Round-to-nearest-even to RESIDENT and back. */
float rt_round(float x, int resident);
uint16_t rt_to_bf16(float x);
float rt_from_bf16(uint16_t x);
uint16_t rt_to_fp16(float x);      /* beyond the range: the largest finite value */
float rt_from_fp16(uint16_t x);

/* 0: read from files; 1: made by rt_weights_random, with SEED in *seed. */
int rt_weights_made(const struct rt_weights *w, uint64_t *seed);

/* The made value: key = seed + 0x9E3779B97F4A7C15 * (tensor * 4096 + layer + 1);
   z = splitmix64 finaliser of (key + 0x9E3779B97F4A7C15 * (uint64) index)  (see sample.h);
   s = the sum of the four 16-bit quarters of z, as an integer 0 .. 262140;
   n = (float) (s - 131070) * (1.0f / 37837.0f)   -- near normal, variance 1, exact in float but for one rounding;
   matrices: n * 0.02f; norms: 1.0f + n * 0.02f; biases: n * 0.02f.  No other operation:
   host and device give the same bits. */
float rt_weights_value(uint64_t seed, int tensor, int layer, uint64_t index);
#endif
