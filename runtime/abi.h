/* abi.h - launch arguments of the emitted kernels.  One field list makes the C structs here
   and, through gen/params.c, the structs of the .cu file and the assertions on their layout.
   X(C type, CUDA type, name, remark) */
#ifndef RT_ABI_H
#define RT_ABI_H
#include <stdint.h>

#define MK_ARGS(X) \
    X(uint64_t, const unsigned char *, stream, "packed weights, a stream per CTA") \
    X(uint64_t, const half *, embed, "untied embedding [V][D]") \
    X(uint64_t, const float *, vec, "norms and biases") \
    X(uint64_t, const float *, rope, "cos and sin [context][E/2][2]") \
    X(uint64_t, half *, kv, "KV cache, see kv_at") \
    X(uint64_t, Word *, exchange, "hop buffers") \
    X(uint64_t, float *, logits, "[V] of every token") \
    X(uint64_t, u64 *, ring, "host-mapped: launch << 32 | token, one a token") \
    X(uint64_t, u32 *, fault, "host-mapped: what a stuck kernel waits for") \
    X(uint64_t, const u32 *, cancel, "host-mapped: not 0 stops after this token") \
    X(uint64_t, const int *, tokens, "prefill: [n] ids; decode: forced ids or 0") \
    X(uint64_t, unsigned char *, scratch, "prefill activations") \
    X(uint64_t, u32 *, barrier, "prefill: grid barrier counter") \
    X(uint64_t, u64 *, laps, "plans with timing: cycles [CTAS][LAPS][2], added up") \
    X(uint64_t, u64, seed, "of the sampler") \
    X(uint64_t, u64, logits_stride, "floats between the logits of two tokens; 0: overwrite") \
    X(uint32_t, u32, launch, "number of this launch") \
    X(uint32_t, u32, epoch, "decode: first tag of this launch") \
    X(int32_t, int, pos, "tokens in the KV cache") \
    X(int32_t, int, n, "tokens to run") \
    X(int32_t, int, token, "decode: first input token") \
    X(int32_t, int, top_k, "0: all") \
    X(float, float, temperature, "0: greedy") \
    X(float, float, top_p, "1: all") \
    X(int32_t, int, n_stop, "ids in stop") \
    X(int32_t, int, unused, "padding")

/* Tags that a token takes: one a layer, then the sampler's. */
#define MK_TOKEN_TAGS(n_layers) ((n_layers) + 32)

/* Stages of decode that a plan with timing measures. */
#define MK_LAPS(X) \
    X(EMBED) X(QKV) X(QKV_HOP) X(ROWS) X(ATTN) X(PART) X(PART_HOP) X(MERGE) X(O) X(O_SUMS) X(O_X) \
    X(MLP) X(MLP_HOP) X(DOWN) X(DOWN_SUMS) X(DOWN_X) X(HEAD) X(NEXT)
#define MK_LAP_INDEX(name) MK_LAP_##name,
enum { MK_LAPS(MK_LAP_INDEX) MK_LAP_COUNT };

#define MK_STOPS 16 /* 8 of the model, 8 of the caller */

#define MK_FIELD(c, cu, name, remark) c name;
struct mk_args {
    MK_ARGS(MK_FIELD)
    int32_t stop[MK_STOPS];
};

/* Arguments of mk_pack: one matrix [rows][cols] into the streams. */
#define MK_PACK_ARGS(X) \
    X(uint64_t, unsigned char *, stream, "all streams") \
    X(uint64_t, const void *, src, "[rows][cols], row-major; 0: made from key") \
    X(uint64_t, half *, plain, "not 0: store row-major here instead") \
    X(uint64_t, u64, key, "made weights: hash key of the tensor") \
    X(int32_t, int, dtype, "of src: 0 bf16, 1 fp16, 2 fp32") \
    X(int32_t, int, rows, "rows of src") \
    X(int32_t, int, cols, "columns of src") \
    X(int32_t, int, phase, "which matrix of the layer") \
    X(int32_t, int, layer, "0 for the head") \
    X(int32_t, int, block0, "block of the phase that the first row belongs to") \
    X(int32_t, int, block_step, "blocks of the phase from one block of src to the next") \
    X(int32_t, int, row0, "first row of src inside its tensor, a multiple of 8")

struct mk_pack_args {
    MK_PACK_ARGS(MK_FIELD)
};

/* fault[]: written by the kernel before it traps. */
enum { MK_FAULT_CODE, MK_FAULT_STAGE, MK_FAULT_CTA, MK_FAULT_EXPECTED, MK_FAULT_SEEN, MK_FAULT_CLAIM, MK_FAULT_WORDS };
#endif
