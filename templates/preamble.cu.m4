t_need({|MODEL_NAME|}, {|MODEL_D|}, {|PLAN_CTAS|}, {|GPU_ARCH|}, {|PLAN_FAMILY|})m4_dnl
t_note({|Kernels of MODEL_NAME for sm_{||}GPU_ARCH, PLAN_CTAS CTAs.  Written by mkgen PLAN_GENERATOR; do not edit.|})
t_note({|Cost per token: PLAN_TOKEN_BYTES bytes of weights read, PLAN_HOPS hops, PLAN_SMEM_BYTES bytes of shared memory.|})
// Below: shapes, launch arguments, primitives, shared memory, hops, the stages of decode in
// the order in which they run, decode, the pack kernel, and prefill.
//
// A block is 8 rows of a weight matrix; its tiles of 8 rows x 8 columns (128 bytes) follow each
// other along the columns.  A unit is 4 tiles, what one ldmatrix.x4 reads.  Block b belongs
// to CTA b % CTAS.

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

t_section({|Choices of the plan|})

constexpr int CTAS = PLAN_CTAS;
constexpr int WARPS = PLAN_WARPS; // that multiply; one more is the producer
constexpr int THREADS = PLAN_THREADS; // of the consumer warps
constexpr int STAGES = PLAN_STAGES; // of the weight ring
constexpr int STAGE_BYTES = PLAN_STAGE_BYTES;
constexpr int INFLIGHT = PLAN_INFLIGHT; // chunks on their way at most
constexpr int INFLIGHT_HOP = PLAN_INFLIGHT_HOP; // the same while a hop is awaited
constexpr int ROUND = PLAN_ROUND_BLOCKS; // blocks between two barriers
constexpr int HEAD_GROUP = PLAN_HEAD_GROUP; // query heads of an attention task
constexpr int GROUPS = PLAN_GROUPS; // tasks of a KV head and split
constexpr float SOFTMAX_SCALE = PLAN_SOFTMAX_SCALE; // log2(e) / sqrt(E): of exp2
constexpr float MLP_SCALE = PLAN_MLP_SCALE; // of the MLP product, against fp16 overflow
constexpr int KV_AHEAD = PLAN_KV_AHEAD; // rows of the cache that a lane reads ahead
constexpr int SPLIT_MIN = PLAN_SPLIT_MIN; // positions that are worth another split
constexpr int MAX_SPLITS = PLAN_MAX_SPLITS;
constexpr u64 WATCHDOG_NS = 2000000000; // without progress, then trap

// A phase is one matrix-vector product: four of a layer, and the head.
template <int ROWS_, int UNITS_, int BLOCKS_, int STEP_, int SPANS_, int SPAN_UNITS_>
struct Phase {
    static constexpr int ROWS = ROWS_;
    static constexpr int UNITS = UNITS_; // of a block: 32 columns each
    static constexpr int BLOCKS = BLOCKS_;
    static constexpr int STEP = STEP_; // blocks that stay together
    static constexpr int SPANS = SPANS_; // chunks of a block
    static constexpr int SPAN_UNITS = SPAN_UNITS_; // of a chunk; the last may have fewer
    static constexpr int BLOCK_BYTES = UNITS_ * 512;
};
typedef Phase<PLAN_QKV> Qkv; // q, k and v rows
typedef Phase<PLAN_O> O; // attention output -> residual
typedef Phase<PLAN_MLP> Mlp; // gate and up, their blocks in turn
typedef Phase<PLAN_DOWN> Down; // MLP product -> residual
typedef Phase<PLAN_HEAD> Head; // logits

// Where a phase begins in a CTA's stream, from the start of its layer.
constexpr int QKV_OFFSET = PLAN_QKV_OFFSET;
constexpr int O_OFFSET = PLAN_O_OFFSET;
constexpr int MLP_OFFSET = PLAN_MLP_OFFSET;
constexpr int DOWN_OFFSET = PLAN_DOWN_OFFSET;
constexpr u64 LAYER_BYTES = PLAN_LAYER_BYTES; // of one CTA
constexpr u64 HEAD_OFFSET = PLAN_HEAD_OFFSET; // after the last layer
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
constexpr u64 KV_HEAD = PLAN_KV_HEAD; // of a KV head's: keys, then values
constexpr u64 KV_VALUE = PLAN_KV_VALUE; // from a head's keys to its values

// Hop buffers: first word.
constexpr int HOP_QKV = PLAN_HOP_QKV; // q, k, v
constexpr int HOP_PART = PLAN_HOP_PART; // attention of one split, not yet divided
constexpr int HOP_SCALE = PLAN_HOP_SCALE; // its maximum and sum
constexpr int HOP_ATTN = PLAN_HOP_ATTN; // attention, done
constexpr int HOP_O = PLAN_HOP_O;
constexpr int HOP_MLP = PLAN_HOP_MLP;
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
enum { AT_RING = 1, AT_QKV, AT_PART, AT_ATTN, AT_O, AT_MLP, AT_DOWN, AT_BEST, AT_COUNT, AT_GRID };

