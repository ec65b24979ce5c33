t_need({|MODEL_NAME|}, {|MODEL_D|}, {|PLAN_CTAS|}, {|GPU_ARCH|}, {|PLAN_FAMILY|})m4_dnl
t_note({|Kernels of MODEL_NAME for sm_{||}GPU_ARCH, PLAN_CTAS CTAs.  Written by mkgen PLAN_GENERATOR; do not edit.|})
t_note({|Cost per token: PLAN_TOKEN_BYTES bytes of weights read, PLAN_HOPS hops, PLAN_SMEM_BYTES bytes of shared memory.|})
// Below: shapes, launch arguments, primitives, shared memory, hops, the stages of decode in
// the order in which they run, decode, the pack kernel, and prefill.
//
// CTAs form groups of GROUP, and one of a group is known by its rank.  A group has some of the KV
// heads and a slice of the MLP product, from q, k, v to the rows of O and DOWN that these make: partial
// sums, which the CTAs of equal rank in all groups add up.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
t_if(PLAN_FP16, {|typedef u16 half; // the bits of a weight: fp16|}, {|typedef u16 half; // the bits of a weight: bf16|})

t_section({|Shapes, from config.json|})

constexpr int D = MODEL_D; // hidden_size
constexpr int H = MODEL_H; // num_attention_heads
constexpr int K = MODEL_K; // num_key_value_heads
constexpr int E = MODEL_E; // head_dim
constexpr int F = MODEL_F; // intermediate_size
constexpr int V = MODEL_V; // vocab_size
constexpr int L = MODEL_L; // num_hidden_layers
constexpr float EPS = MODEL_EPS; // rms_norm_eps
constexpr int CONTEXT = PLAN_CONTEXT; // positions of the KV cache
constexpr int RATIO = H / K; // query heads of a KV head

t_section({|Choices of the plan|})

constexpr int CTAS = PLAN_CTAS;
constexpr int PREFILL_CTAS = PLAN_PREFILL_CTAS;
constexpr int GROUP = PLAN_GROUP; // CTAs of a group
constexpr int GROUPS = CTAS / GROUP;
constexpr int WARPS = PLAN_WARPS; // that multiply; two more keep the ring full
constexpr int THREADS = PLAN_THREADS; // of the consumer warps
constexpr int STAGES = PLAN_STAGES; // of the ring
constexpr int STAGE_BYTES = PLAN_STAGE_BYTES;
constexpr int INFLIGHT = PLAN_INFLIGHT; // chunks on their way at most
constexpr int INFLIGHT_HEADS = PLAN_INFLIGHT_HEADS; // the same of q, k, v and O
constexpr int INFLIGHT_HOP = PLAN_INFLIGHT_HOP; // the same while a hop through L2 is awaited
constexpr int ROUND = PLAN_ROUND_BLOCKS; // blocks between two barriers
constexpr int KV_TILE = PLAN_KV_TILE; // positions of a tile of the KV cache
constexpr float SOFTMAX_SCALE = PLAN_SOFTMAX_SCALE; // log2(e) / sqrt(E): of exp2
constexpr float MLP_SCALE = PLAN_MLP_SCALE; // of the MLP product, against fp16 overflow
constexpr u64 WATCHDOG_NS = 2000000000; // without progress, then trap

// A group's share, and where its phases begin in a layer of its CTAs' streams, in bytes; q, k, v
// are at 0.
struct Share {
    int head0, heads; // KV heads
    int unit0, units; // of the MLP product, 32 each
    int o, mlp, down, layer; // layer: all of it
};
constexpr int MOST_HEADS = PLAN_MOST_HEADS; // of any group
constexpr int MOST_UNITS = PLAN_MOST_UNITS;
constexpr u64 LAYERS_OFFSET = PLAN_LAYERS_OFFSET; // in a stream, behind the head
constexpr u64 CTA_BYTES = PLAN_CTA_BYTES; // from one CTA's stream to the next

// Norms and biases, in floats from the layer's start.
constexpr int VEC_ATTN_NORM = PLAN_VEC_ATTN_NORM;
constexpr int VEC_MLP_NORM = PLAN_VEC_MLP_NORM;
constexpr int VEC_Q_NORM = PLAN_VEC_Q_NORM;
constexpr int VEC_K_NORM = PLAN_VEC_K_NORM;
constexpr int VEC_BIAS = PLAN_VEC_BIAS;
constexpr int VEC_LAYER = PLAN_VEC_LAYER;
constexpr int VEC_NORM = PLAN_VEC_NORM; // the final norm, from the start

constexpr u64 KV_LAYER = PLAN_KV_LAYER; // elements of a layer's cache
constexpr u64 KV_HEAD = PLAN_KV_HEAD; // of a KV head's

// Hop buffers: first word.
t_if(PLAN_CLUSTER == 1, {|constexpr int HOP_QKV = PLAN_HOP_QKV; // inside a group: q, k, v
constexpr int HOP_PART = PLAN_HOP_PART; // attention of one CTA's positions, its maximum and sum
constexpr int HOP_MLP = PLAN_HOP_MLP;
constexpr int HOP_X = PLAN_HOP_X; // x, behind O and behind DOWN
|})m4_dnl
t_if(PLAN_TEAM > 1, {|constexpr int HOP_TEAM = PLAN_HOP_TEAM; // attention of a helper's positions
|})m4_dnl
constexpr int HOP_O = PLAN_HOP_O; // partial sums, for the same rank in all groups
constexpr int HOP_DOWN = PLAN_HOP_DOWN;
constexpr int HOP_BEST = PLAN_HOP_BEST; // a candidate of each CTA
constexpr int HOP_COUNT = PLAN_HOP_COUNT; // sampler: 2 x [CTAS][16]

static __device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

t_section({|Launch arguments: the same as in abi.h|})

#define OFFSET(type, field) t_if(PLAN_HOST, {|__builtin_offsetof(type, field)|}, {|__INTADDR__(&((type *)0)->field)|})

// 16 bytes that are written and read as one: three values and the tag that says which
// hop they belong to.
struct alignas(16) Word {
    u32 v[3];
    u32 tag;
};

struct mk_args {
ABI_ARGS{||}m4_dnl
    int stop[ABI_STOPS]; // ids that end the launch
};
ABI_ARGS_CHECKS

struct mk_pack_args {
ABI_PACK_ARGS{||}m4_dnl
};
ABI_PACK_ARGS_CHECKS

// args.fault
enum { FAULT_CODE, FAULT_STAGE, FAULT_CTA, FAULT_EXPECTED, FAULT_SEEN, FAULT_CLAIM };

// Stages, for the watchdog's report.
enum { AT_RING = 1, AT_QKV, AT_PART, AT_O, AT_MLP, AT_DOWN, AT_X, AT_BEST, AT_COUNT, AT_GRID, AT_TEAM };
t_if(PLAN_TIMING, {|
// Stages, for args.laps.
enum { ABI_LAPS{||}LAPS };
|})m4_dnl
