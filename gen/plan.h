/* plan.h - model x GPU -> every size, tile and offset of the kernel.  Pure arithmetic.

   Words used here.  A *block* is 8 rows of a weight matrix, all columns, padded to a
   multiple of 32 columns; a *unit* is 8 rows x 32 columns (512 bytes), what one ldmatrix.x4
   reads; a *pair* is 2 blocks.  A *phase* is one matrix-vector product of a layer.  CTAs form
   *groups*; one of a group is known by its *rank*.  A group has some of the KV heads and units
   of the MLP product (32 of its elements each).  A CTA's weights lie in its *stream* in the order
   in which decode reads them, and travel in *chunks*, each at most a ring stage long; a *tile* of
   the KV cache is one chunk too.  Where few groups have heads, a *team* shares the positions of one
   in long contexts: its group, and *helpers* without any.  A *hop* is an exchange of a vector between CTAs: through L2, in
   16-byte words of three floats and a tag (a block of 8 values takes 3 words), or, inside a group
   that is a cluster, over shared memory. */
#ifndef GEN_PLAN_H
#define GEN_PLAN_H
#include "gen/gpu.h"
#include "gen/model.h"

enum gen_phase_id { GEN_QKV, GEN_O, GEN_MLP, GEN_DOWN, GEN_HEAD, GEN_PHASES };
enum gen_hop_id {
    GEN_HOP_QKV,
    GEN_HOP_PART,
    GEN_HOP_MLP,
    GEN_HOP_X,
    GEN_HOP_TEAM,
    GEN_HOP_O,
    GEN_HOP_DOWN,
    GEN_HOP_BEST,
    GEN_HOP_COUNT,
    GEN_HOPS
};

/* QKV, MLP and HEAD are split by rows: a CTA multiplies blocks.  O and DOWN are split by columns,
   as heads and MLP units are: it multiplies a part of the columns of its pairs. */
struct gen_phase {
    int rows;               /* rows of the matrix; MLP: gate and up blocks alternate, so 2 F */
    int cols;               /* columns before padding */
    int units;              /* units of a block: ceil(cols / 32) */
    int blocks;             /* ceil(rows / 8) */
    int step;               /* blocks that must stay together: 2 for MLP, else 1 */
    int spans;              /* chunks of a block; split by columns: 0 */
    int span_units;         /* units of a chunk, of each block in it; the last may have fewer */
    int cta_blocks;         /* most blocks that a CTA has */
};

/* What consumers take from the ring at once. */
struct gen_batch {
    int pairs;              /* pairs of blocks, where a block is one chunk */
    int early;              /* the same while x is awaited, in groups that are clusters */
    int spans;              /* chunks of each of two blocks, where a block is several */
    int columns;            /* chunks of O and DOWN */
};

/* Groups that have the same numbers of heads and units. */
struct gen_class {
    int first, groups;      /* groups first .. first + groups - 1 */
    int head0, heads;       /* KV heads: first one of the first group; of each group */
    int unit0, units;       /* MLP units: the same */
    int64_t o, mlp, down;   /* where phases begin in a layer of a stream, bytes; QKV is at 0 */
    int64_t layer_bytes;    /* of a layer in a stream */
};
enum { GEN_CLASSES = 4 };   /* at most: one head more or not, one unit more or not */

struct gen_plan {
    struct gen_model model;
    struct gen_gpu gpu;
    int context;            /* tokens that the KV cache holds */

    /* Choices, each with a key for --set and plan files (see gen_plan_key). */
    int dtype;              /* resident type: GEN_BF16 or GEN_FP16 */
    int ctas, prefill_ctas; /* one per SM */
    int group;              /* CTAs of a group */
    int cluster;            /* hops inside a group: 0 through L2, 1 over shared memory */
    int balance;            /* percent of attention's bytes that count when units are shared out */
    int warps;              /* consumer warps of a CTA; two more keep the ring full */
    int chunk_bytes;        /* a chunk is at most this long */
    int stages;             /* ring stages */
    int inflight;           /* chunks in flight at most */
    int inflight_heads;     /* the same of q, k, v and O */
    int inflight_hop;       /* the same while a hop is awaited */
    int team_from; /* first position of launches in which groups without KV heads help; 0: never */
    int early;              /* what is awaited with the next weights in registers; 0: x, 1: already the sums that make it */
    int unroll_layers;      /* 0: list of calls, 1: loop, 2: all inline */
    int tokens_per_launch;  /* K */
    int round_blocks;       /* blocks of a phase between two barriers */
    int prefill_tokens;     /* tokens of one prefill launch at most */
    int gemm_m, gemm_n, gemm_k, gemm_stages;    /* prefill: tile of tokens x rows x columns */
    int flash_m, flash_n;   /* prefill attention: queries x positions */
    int fault;              /* 0; test builds: 1 hang */
    int timing;             /* 1: decode adds up the cycles of its stages (args.laps) */
    unsigned epoch0;        /* first tag */

    /* Derived. */
    int family;             /* primitives: 75, 80 or 90 */
    int groups;             /* ctas / group */
    int team; /* groups that share a head's positions from TEAM_FROM on: 1 + helpers */
    int kv_tile;            /* positions of a tile of the KV cache */
    int pairs;              /* pairs of D rows: ceil(D / 16), dealt to the ranks in turn */
    int rank_pairs;         /* most pairs of a rank */
    int sets;               /* sets of a rank's pairs: a pair for each warp */
    int set_pairs;          /* most pairs of a set */
    struct gen_class cls[GEN_CLASSES];  /* in order of groups */
    int n_classes;
    int most_heads, most_units;         /* of any group */
    int most_stages;        /* prefill: of a pipeline of copies; sm_75 copies at once */
    struct gen_phase phase[GEN_PHASES];
    int stage_bytes;        /* of a ring stage */
    struct gen_batch batch;
    int64_t layers_offset;  /* of the first layer in a CTA's stream; the head is at 0 */
    int64_t cta_bytes;      /* of a CTA's stream */
    int64_t stream_bytes;   /* of all streams */
    int64_t embed_bytes;    /* untied embedding, row-major; 0 when tied */

    /* fp32 vectors: offsets in floats, the first five from the layer's start. */
    int vec_attn_norm, vec_mlp_norm, vec_q_norm, vec_k_norm, vec_bias, vec_layer;
    int64_t vec_norm, vec_floats;

    /* KV cache: [L][K][tiles][key, value][kv_tile / 8][E / 8][8 positions][8 elements] resident
       type; strides in elements. */
    int64_t kv_layer, kv_head, kv_bytes;

    /* Exchange: first word and words of each hop; tag T is sent into buffer T % buffers. */
    int hop_offset[GEN_HOPS], hop_words[GEN_HOPS], hop_buffers[GEN_HOPS], exchange_words;

    /* Shared memory of the decode kernel. */
    int block_threads; /* of a decode CTA */
    int smem_bytes;
    int prefill_smem_bytes;

    /* Prefill scratch in device memory, bytes from its start. */
    int64_t pf_resid, pf_x, pf_qkv, pf_bytes;
    int pf_x_cols;          /* columns of the widest activation */

    int64_t token_bytes;    /* weight bytes that one decoded token reads */
    double floor_us;        /* token_bytes / memory bandwidth of the data sheet */
};

/* The class of GROUP. */
const struct gen_class *gen_plan_class(const struct gen_plan *p, int group);
#endif
