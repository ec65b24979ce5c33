// Kernels of toy-qwen3 for sm_90, 120 CTAs.  Written by mkgen 0.1.0; do not edit.
// Cost per token: 4050944 bytes of weights read, 22 hops, 217168 bytes of shared memory.
// Below: shapes, launch arguments, primitives, shared memory, hops, the stages of decode in
// the order in which they run, decode, the pack kernel, and prefill.
//
// CTAs form groups of GROUP, and one of a group is known by its rank.  A group has some of the KV
// heads and a slice of the MLP product, from q, k, v to the rows of O and DOWN that these make: partial
// sums, which the CTAs of equal rank in all groups add up.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef u16 half; // the bits of a weight: bf16

// ---- Shapes, from config.json --------------------------------------------------------

constexpr int D = 256; // hidden_size
constexpr int H = 4; // num_attention_heads
constexpr int K = 2; // num_key_value_heads
constexpr int E = 64; // head_dim
constexpr int F = 512; // intermediate_size
constexpr int V = 1000; // vocab_size
constexpr int L = 3; // num_hidden_layers
constexpr float EPS = 9.99999997e-07f; // rms_norm_eps
constexpr int CONTEXT = 512; // positions of the KV cache
constexpr int RATIO = H / K; // query heads of a KV head

// ---- Choices of the plan -------------------------------------------------------------

constexpr int CTAS = 120;
constexpr int PREFILL_CTAS = 132;
constexpr int GROUP = 8; // CTAs of a group
constexpr int GROUPS = CTAS / GROUP;
constexpr int WARPS = 8; // that multiply; two more keep the ring full
constexpr int THREADS = 256; // of the consumer warps
constexpr int STAGES = 12; // of the ring
constexpr int STAGE_BYTES = 16384;
constexpr int INFLIGHT = 4; // chunks on their way at most
constexpr int INFLIGHT_HEADS = 12; // the same of q, k, v and O
constexpr int INFLIGHT_HOP = 2; // the same while a hop through L2 is awaited
constexpr int ROUND = 10; // blocks between two barriers
constexpr int KV_TILE = 64; // positions of a tile of the KV cache
constexpr float SOFTMAX_SCALE = 0.180336878f; // log2(e) / sqrt(E): of exp2
constexpr float MLP_SCALE = 1.0f; // of the MLP product, against fp16 overflow
constexpr u64 WATCHDOG_NS = 2000000000; // without progress, then trap

// A group's share, and where its phases begin in a layer of its CTAs' streams, in bytes; q, k, v
// are at 0.
struct Share {
    int head0, heads; // KV heads
    int unit0, units; // of the MLP product, 32 each
    int o, mlp, down, layer; // layer: all of it
};
constexpr int MOST_HEADS = 1; // of any group
constexpr int MOST_UNITS = 2;
constexpr u64 LAYERS_OFFSET = 8192; // in a stream, behind the head
constexpr u64 CTA_BYTES = 112640; // from one CTA's stream to the next

// Norms and biases, in floats from the layer's start.
constexpr int VEC_ATTN_NORM = 0;
constexpr int VEC_MLP_NORM = 256;
constexpr int VEC_Q_NORM = 512;
constexpr int VEC_K_NORM = 576;
constexpr int VEC_BIAS = 640;
constexpr int VEC_LAYER = 640;
constexpr int VEC_NORM = 1920; // the final norm, from the start

constexpr u64 KV_LAYER = 131072; // elements of a layer's cache
constexpr u64 KV_HEAD = 65536; // of a KV head's

// Hop buffers: first word.
constexpr int HOP_O = 0; // partial sums, for the same rank in all groups
constexpr int HOP_DOWN = 2880;
constexpr int HOP_BEST = 5760; // a candidate of each CTA
constexpr int HOP_COUNT = 5880; // sampler: 2 x [CTAS][16]

static __device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// ---- Launch arguments: the same as in abi.h ------------------------------------------

#define OFFSET(type, field) __INTADDR__(&((type *)0)->field)

// 16 bytes that are written and read as one: three values and the tag that says which
// hop they belong to.
struct alignas(16) Word {
    u32 v[3];
    u32 tag;
};

struct mk_args {
    const unsigned char *stream; // packed weights, a stream per CTA
    const half *embed; // untied embedding [V][D]
    const float *vec; // norms and biases
    const float *rope; // cos and sin [context][E/2][2]
    half *kv; // KV cache, see kv_at
    Word *exchange; // hop buffers
    float *logits; // [V] of every token
    u64 *ring; // host-mapped: launch << 32 | token, one a token
    u32 *fault; // host-mapped: what a stuck kernel waits for
    const u32 *cancel; // host-mapped: not 0 stops after this token
    const int *tokens; // prefill: [n] ids; decode: forced ids or 0
    unsigned char *scratch; // prefill activations
    u32 *barrier; // prefill: grid barrier counter
    u64 *laps; // plans with timing: cycles [CTAS][LAPS][2], added up
    u64 seed; // of the sampler
    u64 logits_stride; // floats between the logits of two tokens; 0: overwrite
    u32 launch; // number of this launch
    u32 epoch; // decode: first tag of this launch
    int pos; // tokens in the KV cache
    int n; // tokens to run
    int token; // decode: first input token
    int top_k; // 0: all
    float temperature; // 0: greedy
    float top_p; // 1: all
    int n_stop; // ids in stop
    int unused; // padding
    int stop[16]; // ids that end the launch
};
static_assert(OFFSET(mk_args, stream) == 0, "layout");
static_assert(OFFSET(mk_args, embed) == 8, "layout");
static_assert(OFFSET(mk_args, vec) == 16, "layout");
static_assert(OFFSET(mk_args, rope) == 24, "layout");
static_assert(OFFSET(mk_args, kv) == 32, "layout");
static_assert(OFFSET(mk_args, exchange) == 40, "layout");
static_assert(OFFSET(mk_args, logits) == 48, "layout");
static_assert(OFFSET(mk_args, ring) == 56, "layout");
static_assert(OFFSET(mk_args, fault) == 64, "layout");
static_assert(OFFSET(mk_args, cancel) == 72, "layout");
static_assert(OFFSET(mk_args, tokens) == 80, "layout");
static_assert(OFFSET(mk_args, scratch) == 88, "layout");
static_assert(OFFSET(mk_args, barrier) == 96, "layout");
static_assert(OFFSET(mk_args, laps) == 104, "layout");
static_assert(OFFSET(mk_args, seed) == 112, "layout");
static_assert(OFFSET(mk_args, logits_stride) == 120, "layout");
static_assert(OFFSET(mk_args, launch) == 128, "layout");
static_assert(OFFSET(mk_args, epoch) == 132, "layout");
static_assert(OFFSET(mk_args, pos) == 136, "layout");
static_assert(OFFSET(mk_args, n) == 140, "layout");
static_assert(OFFSET(mk_args, token) == 144, "layout");
static_assert(OFFSET(mk_args, top_k) == 148, "layout");
static_assert(OFFSET(mk_args, temperature) == 152, "layout");
static_assert(OFFSET(mk_args, top_p) == 156, "layout");
static_assert(OFFSET(mk_args, n_stop) == 160, "layout");
static_assert(OFFSET(mk_args, unused) == 164, "layout");
static_assert(sizeof(mk_args) == 232, "layout");

struct mk_pack_args {
    unsigned char *stream; // all streams
    const void *src; // [rows][cols], row-major; 0: made from key
    half *plain; // not 0: store row-major here instead
    u64 key; // made weights: hash key of the tensor
    int dtype; // of src: 0 bf16, 1 fp16, 2 fp32
    int rows; // rows of src
    int cols; // columns of src
    int phase; // which matrix of the layer
    int layer; // 0 for the head
    int block0; // block of the phase that the first row belongs to
    int block_step; // blocks of the phase from one block of src to the next
    int row0; // first row of src inside its tensor, a multiple of 8
};
static_assert(OFFSET(mk_pack_args, stream) == 0, "layout");
static_assert(OFFSET(mk_pack_args, src) == 8, "layout");
static_assert(OFFSET(mk_pack_args, plain) == 16, "layout");
static_assert(OFFSET(mk_pack_args, key) == 24, "layout");
static_assert(OFFSET(mk_pack_args, dtype) == 32, "layout");
static_assert(OFFSET(mk_pack_args, rows) == 36, "layout");
static_assert(OFFSET(mk_pack_args, cols) == 40, "layout");
static_assert(OFFSET(mk_pack_args, phase) == 44, "layout");
static_assert(OFFSET(mk_pack_args, layer) == 48, "layout");
static_assert(OFFSET(mk_pack_args, block0) == 52, "layout");
static_assert(OFFSET(mk_pack_args, block_step) == 56, "layout");
static_assert(OFFSET(mk_pack_args, row0) == 60, "layout");
static_assert(sizeof(mk_pack_args) == 64, "layout");

// args.fault
enum { FAULT_CODE, FAULT_STAGE, FAULT_CTA, FAULT_EXPECTED, FAULT_SEEN, FAULT_CLAIM };

// Stages, for the watchdog's report.
enum { AT_RING = 1, AT_QKV, AT_PART, AT_O, AT_MLP, AT_DOWN, AT_X, AT_BEST, AT_COUNT, AT_GRID, AT_TEAM };
// ---- Primitives: everything that touches hardware ------------------------------------

static __device__ __forceinline__ u32 shared_address(const void *p)
{
    return (u32)__cvta_generic_to_shared(p);
}

static __device__ __forceinline__ float low(u32 x) { return __uint_as_float(x << 16); }
static __device__ __forceinline__ float high(u32 x) { return __uint_as_float(x & 0xffff0000); }

// Two floats as one register of bf16: LO in the lower half.
static __device__ __forceinline__ u32 pack(float lo, float hi)
{
    u32 x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(hi), "f"(lo));
    return x;
}

static __device__ __forceinline__ half to_half(float x) { return (half)pack(x, 0.0f); }

static __device__ __forceinline__ float exp2_approx(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Single-copy atomic: all of a word or none of it is seen.  As long as all of it is used: ptxas loads only the parts
// that are, one by one, and the tag may then be newer than they.
static __device__ __forceinline__ Word load_word(const Word *p)
{
    Word w;
    asm volatile("{\n.reg .b128 q;\n.reg .b64 lo, hi;\n"
                 "ld.relaxed.gpu.global.b128 q, [%4];\n"
                 "mov.b128 {lo, hi}, q;\nmov.b64 {%0, %1}, lo;\nmov.b64 {%2, %3}, hi;\n}"
                 : "=r"(w.v[0]), "=r"(w.v[1]), "=r"(w.v[2]), "=r"(w.tag) : "l"(p) : "memory");
    return w;
}

static __device__ __forceinline__ void store_word(Word *p, u32 v0, u32 v1, u32 v2, u32 tag)
{
    asm volatile("{\n.reg .b128 q;\n.reg .b64 lo, hi;\n"
                 "mov.b64 lo, {%1, %2};\nmov.b64 hi, {%3, %4};\nmov.b128 q, {lo, hi};\n"
                 "st.relaxed.gpu.global.b128 [%0], q;\n}"
                 :: "l"(p), "r"(v0), "r"(v1), "r"(v2), "r"(tag) : "memory");
}

// *late(p) = v is a plain store that another CTA will read, or the copy engine: late, and in any order, until
// add_release or fence_async_global after it.
template <class T>
static __device__ __forceinline__ T *late(T *p) { return p; }

static __device__ __forceinline__ u32 load_acquire(const u32 *p)
{
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

static __device__ __forceinline__ void add_release(u32 *p, u32 v)
{
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" :: "l"(p), "r"(v) : "memory");
}

// Words shared with the host.
static __device__ __forceinline__ void store_system(u32 *p, u32 v)
{
    asm volatile("st.release.sys.global.u32 [%0], %1;" :: "l"(p), "r"(v) : "memory");
}

// The ring's words carry their own launch: nothing else is published with them.
static __device__ __forceinline__ void store_relaxed_system(u64 *p, u64 v)
{
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" :: "l"(p), "l"(v) : "memory");
}

// True for the first that asks.
static __device__ __forceinline__ bool claim_system(u32 *p)
{
    return atomicCAS_system(p, 0, 1) == 0;
}

static __device__ __forceinline__ u32 load_system(const u32 *p)
{
    u32 v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

// Flags in shared memory that warps tell each other: each by itself, ordering nothing.
static __device__ __forceinline__ u32 load_flag(const u32 *p)
{
    u32 v;
    asm volatile("ld.relaxed.cta.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared_address(p)) : "memory");
    return v;
}

static __device__ __forceinline__ void store_flag(u32 *p, u32 v)
{
    asm volatile("st.relaxed.cta.shared.u32 [%0], %1;" :: "r"(shared_address(p)), "r"(v) : "memory");
}

// The same, for what was written before it or by those whom the writer has seen.
static __device__ __forceinline__ u32 read_flag(const u32 *p)
{
    u32 v;
    asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared_address(p)) : "memory");
    return v;
}

static __device__ __forceinline__ void publish_flag(u32 *p, u32 v)
{
    asm volatile("st.release.cta.shared.u32 [%0], %1;" :: "r"(shared_address(p)), "r"(v) : "memory");
}

static __device__ __forceinline__ void prefetch_l2(const void *p)
{
    asm volatile("prefetch.global.L2 [%0];" :: "l"(p));
}

// Barrier of the first THREADS threads; the others take no part.
static __device__ __forceinline__ void consumer_barrier()
{
    asm volatile("bar.sync 1, %0;" :: "n"(THREADS) : "memory");
}

static __device__ __forceinline__ u64 timer_ns()
{
    u64 t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

static __device__ __forceinline__ void trap() { asm volatile("trap;"); }

// Four 8x8 tiles of half; lane i gives the address of row i % 8 of tile i / 8.
static __device__ __forceinline__ void ldmatrix(u32 (&r)[4], u32 address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

static __device__ __forceinline__ void ldmatrix_transposed(u32 (&r)[4], u32 address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// c[16][8] += a[16][16] b[16][8].
static __device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 16 bytes from global to shared memory, later; BYTES 0 puts zeros there.
static __device__ __forceinline__ void copy16(u32 dst, const void *src, int bytes)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(dst), "l"(src), "r"(bytes) : "memory");
}

// Copies since the last commit are a group; wait until at most N groups are on their way.
static __device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> static __device__ __forceinline__ void copy_wait()
{
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}

// An mbarrier, in shared memory: a phase ends when COUNT have arrived and all expected bytes are here.
static __device__ __forceinline__ void mbarrier_init(u64 *b, u32 count)
{
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(shared_address(b)), "r"(count) : "memory");
}

static __device__ __forceinline__ void mbarrier_arrive(u64 *b)
{
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}"
                 :: "r"(shared_address(b)) : "memory");
}

// Did the phase of PARITY end?  Sleeps a little until it does.
static __device__ __forceinline__ bool mbarrier_try_wait(u64 *b, u32 parity)
{
    u32 passed;
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}" : "=r"(passed) : "r"(shared_address(b)), "r"(parity) : "memory");
    return passed;
}

// Arrive, and expect BYTES in this phase.
static __device__ __forceinline__ void mbarrier_arrive_expect(u64 *b, u32 bytes)
{
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;\n}"
                 :: "r"(shared_address(b)), "r"(bytes) : "memory");
}

// BYTES from global to shared memory, later; they arrive at B.
static __device__ __forceinline__ void copy_bulk(void *dst, const void *src, u32 bytes, u64 *b)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(shared_address(dst)), "l"(src), "r"(bytes), "r"(shared_address(b)) : "memory");
}

// What this thread wrote to global memory, before the copy engine comes to it.
static __device__ __forceinline__ void fence_async_global()
{
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// What this thread wrote to shared memory, before the copy engine comes to it.
static __device__ __forceinline__ void fence_async_proxy()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- Primitives of clusters: CTAs that reach each other's shared memory --------------

// Barrier of all threads of the cluster, in two halves: writes before an arrival are seen after
// the wait.
static __device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
static __device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Where what lies at SHARED in this CTA lies in CTA RANK of the cluster.
static __device__ __forceinline__ u32 cluster_address(u32 shared, u32 rank)
{
    u32 address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
    return address;
}

// Store 16 bytes at DST, later; then 16 bytes are counted at MBARRIER, in the same CTA as DST.
static __device__ __forceinline__ void push_word(u32 dst, u32 v0, u32 v1, u32 v2, u32 v3, u32 mbarrier)
{
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
                 :: "r"(dst), "r"(v0), "r"(v1), "r"(v2), "r"(v3), "r"(mbarrier) : "memory");
}

// Before a cluster barrier: the mbarriers that this thread made are ready for other CTAs.
static __device__ __forceinline__ void fence_mbarrier_init()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// mbarrier_try_wait for what other CTAs have pushed.
static __device__ __forceinline__ bool mbarrier_try_wait_cluster(u64 *b, u32 parity)
{
    u32 passed;
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}" : "=r"(passed) : "r"(shared_address(b)), "r"(parity) : "memory");
    return passed;
}

// ---- Places: who has which weights, and where ----------------------------------------

// A block is 8 rows of a matrix, a pair is 2 blocks.  A unit is 8 rows x 32 columns: 4 tiles of 8 x 8,
// 128 bytes each, what one ldmatrix.x4 reads.  Tile j has columns 2 j and 2 j + 1 of each 8 of
// the 32, so that lane t of 4 multiplies columns 8 t .. 8 t + 7, which lie side by side in x.
//
// A stream has what one CTA reads of a token, in that order (but see Teams).  Q, K, V, the MLP's gate and up (their
// blocks in turn) and the head are split by rows: whole blocks, dealt to the ranks of the group (the
// head: to all CTAs) in turn.  O and DOWN are split by columns, as the group's heads and MLP
// units are; pairs of rows are dealt to the ranks in turn.  A rank's pairs are a set for each warp once
// around; of a set all pairs of one unit come first, then those of the next.
static __device__ __forceinline__ int my_group() { return blockIdx.x / GROUP; }
static __device__ __forceinline__ int my_rank() { return blockIdx.x % GROUP; }

static __device__ __forceinline__ Share share(int nth, int head0, int heads, int unit0, int units, int o,
                                              int mlp, int down, int layer)
{
    return {head0 + nth * heads, heads, unit0 + nth * units, units, o, mlp, down, layer};
}

static __device__ __forceinline__ Share share_of(int group)
{
    if (group < 2)
        return share(group - 0, 0, 1, 0, 1, 16384, 24576, 32768, 34816);
    if (group < 14)
        return share(group - 2, 2, 0, 2, 1, 0, 0, 8192, 10240);
    return share(group - 14, 2, 0, 14, 2, 0, 0, 8192, 12288);
}

// Which group has KV head HEAD, or MLP unit UNIT.
static __device__ __forceinline__ int group_of_head(int head)
{
    constexpr int FEW = K / GROUPS, MANY = FEW + 1, WITH_MANY = K % GROUPS; // heads; groups
    return head < WITH_MANY * MANY ? head / MANY : WITH_MANY + (head - WITH_MANY * MANY) / (FEW ? FEW : 1);
}

static __device__ __forceinline__ int group_of_unit(int unit)
{
    if (unit < 2)
        return 0 + (unit - 0) / 1;
    if (unit < 14)
        return 2 + (unit - 2) / 1;
    return 14 + (unit - 14) / 2;
}

// A rank's pairs of D rows.
constexpr int PAIRS = 16;
constexpr int SETS = 1; // of a rank
constexpr int SET_PAIRS = 2; // of a set at most: one for each warp
static __device__ __forceinline__ int rank_pairs(int rank) { return (PAIRS - rank + GROUP - 1) / GROUP; }

// The set of a rank's NTH pair.
struct Set {
    int first, pairs; // of the rank
};
static __device__ __forceinline__ Set set_of(int rank, int nth)
{
    const int n = rank_pairs(rank);
    if (SETS == 1)
        return {0, n};
    const int few = n / SETS, many = few + 1, with_many = n % SETS;
    return nth < with_many * many ? Set{nth / many * many, many}
                                  : Set{with_many * many + (nth - with_many * many) / few * few, few};
}

// Tile TILE of a row, counted along its units, has columns of 4 pairs: pair I is this one and the next.
static __device__ __forceinline__ int pair_column(int tile, int i) { return tile / 4 * 32 + i * 8 + tile % 4 * 2; }

// A phase is one matrix-vector product: four of a layer, and the head.
template <int ROWS_, int UNITS_, int BLOCKS_, int STEP_, int SPANS_, int SPAN_UNITS_>
struct Phase {
    static constexpr int ROWS = ROWS_;
    static constexpr int UNITS = UNITS_; // of a block, in all groups
    static constexpr int BLOCKS = BLOCKS_; // of all CTAs
    static constexpr int STEP = STEP_; // blocks that stay together
    static constexpr int SPANS = SPANS_; // by rows: chunks of a block; by columns: 0
    static constexpr int SPAN_UNITS = SPAN_UNITS_; // of a chunk at most
    static constexpr int BLOCK_BYTES = UNITS_ * 512; // of all columns
};

// A block's place without its columns, and a unit's without its rows: the address of both is
// block.at + unit.at + block.first * unit.units + block.stride * unit.nth.
struct Block_place {
    u64 at;
    int first, stride;
};
struct Unit_place {
    u64 at;
    int units, nth;
};
static __device__ __forceinline__ u64 place(const Block_place &block, const Unit_place &unit)
{
    return block.at + unit.at + (u64)(block.first * unit.units) + (u64)(block.stride * unit.nth);
}

// Of one layer of a matrix that is split by rows: block LOCAL of GROUP's share, which begins at
// BEGIN of a layer.
static __device__ __forceinline__ Block_place row_place(int group, int local, int step, int begin, int layer_bytes,
                                                        int layer, int block_bytes)
{
    const int dealt = local / step;
    return {(u64)(group * GROUP + dealt % GROUP) * CTA_BYTES + LAYERS_OFFSET + (u64)layer * layer_bytes + begin
            + (u64)(dealt / GROUP * step + local % step) * block_bytes, 0, 512};
}

// The same of a matrix that is split by columns; the group is the unit's.
static __device__ __forceinline__ Block_place column_place(int block)
{
    const int rank = block / 2 % GROUP, nth = block / 2 / GROUP;
    const Set set = set_of(rank, nth);
    return {(u64)rank * CTA_BYTES + LAYERS_OFFSET + (nth - set.first) * 1024 + block % 2 * 512,
            set.first * 1024, set.pairs * 1024};
}

// q, k and v rows, of all heads in turn.
struct Qkv : Phase<512, 8, 64, 1, 1, 8> {
    static constexpr int HEAD = E / 8, GROUPED = (RATIO + 2) * HEAD; // blocks of a head; with its key and value
    // Blocks of this CTA, in its order, of HEADS heads.
    static __device__ __forceinline__ int mine(int heads) { return (heads * GROUPED - my_rank() + GROUP - 1) / GROUP; }
    // Where block LOCAL of a group whose first head is HEAD0 stands among all blocks.
    static __device__ __forceinline__ int block(int head0, int local)
    {
        const int head = head0 + local / GROUPED, in = local % GROUPED;
        return in < RATIO * HEAD ? head * (RATIO * HEAD) + in
                                 : (H + (in / HEAD - RATIO) * K + head) * HEAD + in % HEAD;
    }
    static __device__ __forceinline__ Block_place rows(int layer, int block)
    {
        const int q = H * HEAD, kv = block - q; // key and value blocks
        const int head = block < q ? block / (RATIO * HEAD) : kv / HEAD % K;
        const int in = block < q ? block % (RATIO * HEAD) : (RATIO + kv / (K * HEAD)) * HEAD + kv % HEAD;
        const int group = group_of_head(head);
        const Share mine = share_of(group);
        return row_place(group, (head - mine.head0) * GROUPED + in, 1, 0, mine.layer, layer, BLOCK_BYTES);
    }
    static __device__ __forceinline__ Unit_place columns(int, int unit) { return {(u64)unit * 512, 0, 0}; }
};

// Gate and up, their blocks in turn.
struct Mlp : Phase<1024, 8, 128, 2, 1, 8> {
    static __device__ __forceinline__ int mine() // a unit has 4 blocks of gate and as many of up
    {
        return (share_of(my_group()).units * 4 - my_rank() + GROUP - 1) / GROUP * 2;
    }
    static __device__ __forceinline__ Block_place rows(int layer, int block)
    {
        const int group = group_of_unit(block / 8);
        const Share mine = share_of(group);
        return row_place(group, block - mine.unit0 * 8, 2, mine.mlp, mine.layer, layer, BLOCK_BYTES);
    }
    static __device__ __forceinline__ Unit_place columns(int, int unit) { return {(u64)unit * 512, 0, 0}; }
};

// Attention output -> residual.
struct O : Phase<256, 8, 32, 1, 0, 4> {
    static constexpr int HEAD_UNITS = RATIO * E / 32; // of a KV head's queries
    static __device__ __forceinline__ Block_place rows(int, int block) { return column_place(block); }
    static __device__ __forceinline__ Unit_place columns(int layer, int unit)
    {
        const int group = group_of_head(unit / HEAD_UNITS);
        const Share mine = share_of(group);
        return {(u64)(group * GROUP) * CTA_BYTES + (u64)layer * mine.layer + mine.o, mine.heads * HEAD_UNITS,
                unit - mine.head0 * HEAD_UNITS};
    }
};

// MLP product -> residual.
struct Down : Phase<256, 16, 32, 1, 0, 2> {
    static __device__ __forceinline__ Block_place rows(int, int block) { return column_place(block); }
    static __device__ __forceinline__ Unit_place columns(int layer, int unit)
    {
        const int group = group_of_unit(unit);
        const Share mine = share_of(group);
        return {(u64)(group * GROUP) * CTA_BYTES + (u64)layer * mine.layer + mine.down, mine.units,
                unit - mine.unit0};
    }
};

// Logits; at the start of the streams.
struct Head : Phase<1000, 8, 125, 1, 1, 8> {
    static __device__ __forceinline__ int mine() { return (BLOCKS - (int)blockIdx.x + CTAS - 1) / CTAS; }
    static __device__ __forceinline__ Block_place rows(int, int block)
    {
        return {(u64)(block % CTAS) * CTA_BYTES + (u64)(block / CTAS) * BLOCK_BYTES, 0, 512};
    }
    static __device__ __forceinline__ Unit_place columns(int, int unit) { return {(u64)unit * 512, 0, 0}; }
};

// The KV cache of a head: tiles of KV_TILE positions, keys and then values of each; these lie in blocks
// of 8 positions, 8 x 8 elements (128 bytes) side by side along the head.
constexpr int KV_TILE_ELEMS = KV_TILE * E * 2;
static __device__ __forceinline__ u64 kv_at(int pos, int e)
{
    return (u64)(pos / KV_TILE) * KV_TILE_ELEMS + pos % KV_TILE / 8 * (E * 8) + e / 8 * 64 + pos % 8 * 8 + e % 8;
}
constexpr int KV_VALUE = KV_TILE * E; // elements from a key to its value

// ---- Ring: a stage is filled, has landed, is released --------------------------------

// A stage is used again and again: use u of a stage carries chunk u * STAGES + stage.
typedef u64 Gate; // an mbarrier

static __device__ __forceinline__ void gate_init(Gate *full, Gate *free)
{
    mbarrier_init(full, 1);
    mbarrier_init(free, WARPS);
}

static __device__ __forceinline__ void gate_init_done()
{
    fence_async_proxy();
}

static __device__ __forceinline__ bool gate_landed(Gate *full, u32 use) { return mbarrier_try_wait(full, use & 1); }

// All warps have released use - 1.
static __device__ __forceinline__ bool gate_free(Gate *free, u32 use)
{
    return use == 0 || mbarrier_try_wait(free, (use - 1) & 1);
}

static __device__ __forceinline__ void gate_release(Gate *free) { mbarrier_arrive(free); }

// The producer starts a bulk copy of BYTES (a multiple of 512) that opens the gate.
static __device__ __forceinline__ void gate_fill(Gate *full, void *dst, const unsigned char *src, int bytes)
{
    mbarrier_arrive_expect(full, bytes);
    copy_bulk(dst, src, bytes, full);
}

// ---- Shared memory of decode ---------------------------------------------------------

constexpr int X_COLS = (D + 31) / 32 * 32;

// Where hops inside the group land, each a layer's; x lands twice, behind O and behind DOWN.
enum { QKV_HERE, PART_HERE, MLP_HERE, X_HERE, LANDINGS = X_HERE + 2 };

struct Shared {
    alignas(128) unsigned char ring[STAGES][STAGE_BYTES];
    // From the group's other CTAs.  x: residual * norm weight, still to be divided by the rms; behind O, and
    // behind DOWN, which others send before all here have done with the first only in a cluster.
    alignas(16) half x[2][X_COLS];
    alignas(16) half act[MOST_UNITS * 32]; // MLP product: the columns of DOWN
    alignas(16) float qkv[MOST_HEADS][RATIO + 2][E];
    alignas(16) float part[GROUP][MOST_HEADS * RATIO][E + 4]; // attention of a rank's positions; its maximum, sum
    alignas(16) float squares[2][GROUP * WARPS][4]; // of the residual, a part of each warp: [0] of the 4
    alignas(16) float unguess[2], factor[2]; // 1 / the factor with which x was sent; what its products lack
    // Attention: normed, rotated queries; this position's key and value; what each warp has found.
    alignas(16) half q[MOST_HEADS * RATIO][E];
    alignas(16) half now[MOST_HEADS][2][E];
    alignas(16) float out[WARPS][RATIO][E];
    float top[WARPS][RATIO], mass[WARPS][RATIO];
    float score[RATIO]; // this position's, of each query
    alignas(16) half y[MOST_HEADS * RATIO * E]; // attention output: the columns of O
    alignas(16) float resid[2 * 16]; // residual stream, the rows of this rank
    float part_sums[2][WARPS][ROUND * 8]; // dot products of one round
    float sum[WARPS]; // block_sum
    Word best[WARPS];
    u32 hist[16][5]; // sampler: count and mass of a digit, see add_mass
    Gate full[STAGES], free[STAGES];
    u64 arrived[LANDINGS]; // mbarriers
    mk_args args;
    u32 hold; // a hop through L2 is awaited: keep fewer chunks in flight
    u32 done; // the consumers have left
    u32 canceled; // the host's word, in CTA 0
    u32 filled, landed; // chunks before these are on their way, have arrived
    u32 end; // the last chunk of the launch is before this, when the producer has brought it
    u32 chunk[WARPS]; // the next one that a warp takes
    int fed, index; // token in this launch: of the producer, of the consumers
};
static_assert(sizeof(Shared) <= 217168, "the plan's shared memory is too small");

extern __shared__ Shared S[];

// ---- Watchdog ------------------------------------------------------------------------

// Tell the host what CTA blockIdx.x waits for, and stop the GPU's work.
[[noreturn]] static __device__ __noinline__ void stuck(u32 *fault, u32 stage, u32 expected, u32 seen)
{
    while (!claim_system(fault + FAULT_CLAIM)) // another was first: let it finish
        ;
    store_system(fault + FAULT_STAGE, stage);
    store_system(fault + FAULT_CTA, blockIdx.x);
    store_system(fault + FAULT_EXPECTED, expected);
    store_system(fault + FAULT_SEEN, seen);
    store_system(fault + FAULT_CODE, 1);
    trap();
    __builtin_unreachable();
}

// Counts failed polls of one wait, and looks at the clock now and then.
struct Watch {
    u32 polls = 0;
    u64 since = 0;

    __device__ __forceinline__ void poll(u32 *fault, u32 stage, u32 expected, u32 seen)
    {
        if (__builtin_expect(++polls % 4096 == 0, false))
            look(fault, stage, expected, seen);
    }
    __device__ __forceinline__ void look(u32 *fault, u32 stage, u32 expected, u32 seen)
    {
        const u64 now = timer_ns();
        if (!since)
            since = now;
        else if (now - since > WATCHDOG_NS)
            stuck(fault, stage, expected, seen);
    }
};

// ---- Hops through L2 -----------------------------------------------------------------

// A vector travels in blocks of 8 values, 3 words a block: values 0-2, 3-5 and 6-7.
static __device__ __forceinline__ int word_first(int word) { return word / 3 * 8 + word % 3 * 3; }
static __device__ __forceinline__ int word_count(int word) { return word % 3 == 2 ? 2 : 3; }
static __device__ __forceinline__ float word_value(const Word &w, int i) { return __uint_as_float(w.v[i]); }

// While a hop is awaited the ring stands back.
static __device__ __forceinline__ void hold(u32 on)
{
    if (threadIdx.x == 0)
        store_flag(&S->hold, on);
}

// Wait for words 0 .. WORDS-1 (at most MOST) of a hop, where word i lies at AT(i), and call
// USE(i, word): each consumer thread for its own share.
template <int MOST, class At, class Use>
static __device__ __forceinline__ void await_words(int words, u32 tag, u32 stage, At at, Use use)
{
    constexpr int SHARE = (MOST + THREADS - 1) / THREADS; // of a thread
    constexpr int BATCH = SHARE < 8 ? SHARE : 8; // loads on their way
    hold(1);
    #pragma unroll 1
    for (int first = threadIdx.x; first < words; first += BATCH * THREADS) {
        Word w[BATCH];
        Watch watch;
        for (bool all = false; !all;) { // again and again all of them: one trip when they are there
            #pragma unroll
            for (int i = 0; i < BATCH; i++)
                w[i] = load_word(at(first + i * THREADS < words ? first + i * THREADS : first));
            u32 wrong = 0, seen = tag;
            #pragma unroll
            for (int i = 0; i < BATCH; i++) {
                seen = w[i].tag != tag ? w[i].tag : seen;
                wrong |= w[i].tag ^ tag;
            }
            all = wrong == 0;
            if (!all)
                watch.poll(S->args.fault, stage, tag, seen);
        }
        #pragma unroll
        for (int i = 0; i < BATCH; i++)
            if (first + i * THREADS < words)
                use(first + i * THREADS, w[i]);
    }
    hold(0);
}

// Tags: TOKEN_TAGS of a token, the layers' and then the sampler's.
constexpr u32 TOKEN_TAGS = 35;
static __device__ __forceinline__ u32 layer_tag(int layer)
{
    return S->args.epoch + S->index * TOKEN_TAGS + layer;
}

// Buffer of a hop of partial sums.
static __device__ __forceinline__ Word *sums_buffer(int hop, u32 tag)
{
    return S->args.exchange + hop + tag % 2 * (PAIRS * GROUPS * 6);
}

// ---- Hops inside a group -------------------------------------------------------------

// Store 16 bytes at TO in CTA RANK of the group, where they count for LANDING.
static __device__ __forceinline__ void give(const void *to, int landing, int rank, u32 v0, u32 v1, u32 v2, u32 v3)
{
    push_word(cluster_address(shared_address(to), rank), v0, v1, v2, v3,
              cluster_address(shared_address(&S->arrived[landing]), rank));
}

// Wait until BYTES have come to LANDING in LAYER.
static __device__ __forceinline__ void await_landing(int landing, u32 bytes, int layer, u32 stage)
{
    const u32 use = S->index * L + layer;
    Watch watch;
    if (threadIdx.x == 0)
        mbarrier_arrive_expect(&S->arrived[landing], bytes);
    while (!mbarrier_try_wait_cluster(&S->arrived[landing], use & 1))
        watch.poll(S->args.fault, stage, use, 0);
}

// N blocks of values to all ranks: lane L of a warp has value L % 8 of block L / 8 (at most 4), and
// block B of them goes to the 8 halves from TO + 8 PLACE(B) on.
template <class Place>
static __device__ __forceinline__ void give_halves(half *to, int landing, int n, float value, Place place)
{
    const int lane = threadIdx.x % 32, block = lane % 4;
    const u32 pair = pack(value, __shfl_sync(~0u, value, lane + 1 & 31)); // of even lanes
    u32 v[4];
    #pragma unroll
    for (int i = 0; i < 4; i++)
        v[i] = __shfl_sync(~0u, pair, block * 8 + i * 2);
    if (block < n) {
        #pragma unroll
        for (int rank = lane / 4; rank < GROUP; rank += 8)
            give(to + place(block) * 8, landing, rank, v[0], v[1], v[2], v[3]);
    }
}

// The same as floats.
template <class Place>
static __device__ __forceinline__ void give_floats(float *to, int landing, int n, float value, Place place)
{
    const int lane = threadIdx.x % 32, word = lane % 8; // half of a block
    u32 v[4];
    #pragma unroll
    for (int i = 0; i < 4; i++)
        v[i] = __float_as_uint(__shfl_sync(~0u, value, word * 4 + i));
    if (word / 2 < n) {
        #pragma unroll
        for (int rank = lane / 8; rank < GROUP; rank += 4)
            give(to + place(word / 2) * 8 + word % 2 * 4, landing, rank, v[0], v[1], v[2], v[3]);
    }
}

// The sum of VALUE over the lanes of a warp, in every one of them.
static __device__ __forceinline__ float warp_sum(float value)
{
    #pragma unroll
    for (int i = 16; i; i /= 2)
        value += __shfl_xor_sync(~0u, value, i);
    return value;
}

// ---- Teams: groups that share a head's positions -------------------------------------

// This plan has none: a head's positions are dealt to the ranks of the group that has it.
static __device__ __forceinline__ int head_group() { return my_group(); }
static __device__ __forceinline__ int dealt_to() { return GROUP; }
static __device__ __forceinline__ int rounds_of(int tiles) { return tiles / GROUP; }
static __device__ __forceinline__ int my_place() { return my_rank(); }

static __device__ __forceinline__ int my_heads() { return share_of(head_group()).heads; }

// The tiles that this CTA has of each of its heads, up to the one of position POS.
static __device__ __forceinline__ int my_tiles(int pos)
{
    return rounds_of(pos / KV_TILE - my_place() + dealt_to());
}

// Has this CTA the tile of position POS itself?
static __device__ __forceinline__ bool has_tile(int pos)
{
    return pos / KV_TILE - rounds_of(pos / KV_TILE) * dealt_to() == my_place();
}

// ---- Matrix x vector, from the ring --------------------------------------------------

// Wait for the chunks before chunk END.
static __device__ __forceinline__ void wait_landed(u32 end)
{
    Watch watch;
    for (u32 landed; (int)((landed = read_flag(&S->landed)) - end) < 0;)
        watch.poll(S->args.fault, AT_RING, end, landed);
}

// This warp has read N chunks.
static __device__ __forceinline__ void release_chunks(u32 chunk, int n)
{
    __syncwarp();
    if ((int)threadIdx.x % 32 < n)
        gate_release(&S->free[(chunk + threadIdx.x % 32) % STAGES]);
}

// Each warp takes every chunk, whether it reads it or not, and goes on from where it was.
static __device__ __forceinline__ u32 my_chunk() { return S->chunk[threadIdx.x / 32]; }
static __device__ __forceinline__ void take_chunks(u32 next)
{
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        S->chunk[threadIdx.x / 32] = next;
    __syncwarp();
}

// Lane t < 4 has the 8 columns of a unit of x from 8 t on: two of each tile.
static __device__ __forceinline__ uint4 load_x(const half *x, int unit)
{
    return *(const uint4 *)(x + unit * 32 + threadIdx.x % 4 * 8);
}

// 16 rows x 32 columns of weights, as the left operand of two mma.
struct Unit {
    u32 w[2][4];

    // The lane reads from address AT on.
    __device__ __forceinline__ void load(u32 at)
    {
        ldmatrix(w[0], at);
        ldmatrix(w[1], at + 256);
    }
    // SUM += the rows times x; every column of the right operand is x, and the first result is used.
    __device__ __forceinline__ void multiply(float (&sum)[2][4], const uint4 &x) const
    {
        mma(sum[0], w[0][0], w[0][1], w[0][2], w[0][3], x.x, x.y);
        mma(sum[1], w[1][0], w[1][1], w[1][2], w[1][3], x.z, x.w);
    }
};

// ---- Matrices that are split by rows: all warps share a block's columns --------------

typedef Head Rows; // q, k, v, the MLP and the head all have D columns
static_assert(Rows::UNITS == Qkv::UNITS && Rows::UNITS == Mlp::UNITS && Rows::SPANS == Qkv::SPANS && Rows::SPANS == Mlp::SPANS, "columns");

// This warp's units, every WARPS-th, of a span of columns that has UNITS.
template <int UNITS>
struct Span {
    static constexpr int MINE = (UNITS + WARPS - 1) / WARPS;
    static __device__ __forceinline__ bool has(int i) { return (i + 1) * WARPS <= UNITS || i * WARPS + (int)threadIdx.x / 32 < UNITS; }
};

// Of x.
template <int UNITS>
struct Span_x : Span<UNITS> {
    uint4 unit[Span<UNITS>::MINE];

    __device__ __forceinline__ void load(const half *x)
    {
        #pragma unroll
        for (int i = 0; i < Span<UNITS>::MINE; i++)
            unit[i] = load_x(x, min(i * WARPS + (int)threadIdx.x / 32, UNITS - 1));
    }
};

// Of two blocks of weights, a chunk each; lanes with lane / 8 odd read the second one.
template <int UNITS>
struct Span_weights : Span<UNITS> {
    Unit unit[Span<UNITS>::MINE];

    // From this lane's CHUNK.
    __device__ __forceinline__ void load(u32 chunk)
    {
        const int lane = threadIdx.x % 32;
        const u32 from = shared_address(S->ring[chunk % STAGES])
                         + threadIdx.x / 32 * 512 + lane / 16 * 128 + lane % 8 * 16;
        #pragma unroll
        for (int i = 0; i < Span<UNITS>::MINE; i++) // a warp that has no unit i reads its last one again
            unit[i].load(from + (this->has(i) ? i : max(i - 1, 0)) * WARPS * 512);
    }
    // SUM += these by X, unit I.
    __device__ __forceinline__ void multiply(float (&sum)[2][4], const Span_x<UNITS> &x, int i) const
    {
        if (this->has(i))
            unit[i].multiply(sum, x.unit[i]);
    }
};

// This warp's sums of two blocks, to PART[warp][row].
static __device__ __forceinline__ void leave_sums(const float (&sum)[2][4], float *part)
{
    const int lane = threadIdx.x % 32;
    if (lane % 4 == 0) {
        #pragma unroll
        for (int b = 0; b < 2; b++)
            part[threadIdx.x / 32 * (ROUND * 8) + b * 8 + lane / 4] = sum[0][b * 2] + sum[1][b * 2];
    }
}

// Pairs of blocks that are multiplied at once.
constexpr int PAIRS_AT_ONCE = 2;
// Pairs whose weights are in registers while x is awaited: as much of the ring can be filled meanwhile.
constexpr int PAIRS_EARLY = 3;
// They are read already before the sums that make x are awaited.
constexpr bool EARLY_SUMS = 0;
// From so many blocks on they are read early; without clusters registers are too few.
constexpr int EARLY_FROM = Rows::SPANS > 1 ? 2 : 1;

// Which block of a pair this lane reads.
static __device__ __forceinline__ int my_side() { return threadIdx.x / 8 % 2; }

// Multiply the next N blocks, 2 PAIRS at most, whose columns are one chunk each, by x; the last one stands for those
// that are not there.  When they have been read, READY(x) sees to it that x is there.
template <int PAIRS, class Ready>
static __device__ __forceinline__ u32 multiply_blocks(u32 chunk, int n, Span_x<Rows::UNITS> &x, float *part, Ready ready)
{
    float sum[PAIRS][2][4] = {};
    Span_weights<Rows::UNITS> weights[PAIRS];
    wait_landed(chunk + n);
    #pragma unroll
    for (int p = 0; p < PAIRS; p++)
        weights[p].load(chunk + min(p * 2 + my_side(), n - 1));
    release_chunks(chunk, n);
    ready(x);
    #pragma unroll
    for (int i = 0; i < Span<Rows::UNITS>::MINE; i++)
        #pragma unroll
        for (int p = 0; p < PAIRS; p++)
            weights[p].multiply(sum[p], x, i);
    #pragma unroll
    for (int p = 0; p < PAIRS; p++)
        if (p * 2 < n)
            leave_sums(sum[p], part + p * 16);
    return chunk + n;
}

// SUM += N blocks (1 or 2) side by side, TOGETHER spans of UNITS each of them, by X.  When they have been read, READY()
// sees to it that X is there.
template <int UNITS, int N, int TOGETHER, class Ready>
static __device__ __forceinline__ u32 multiply_spans(float (&sum)[2][4], u32 chunk, const half *x, Ready ready)
{
    float part[TOGETHER][2][4] = {};
    Span_weights<UNITS> weights[TOGETHER];
    Span_x<UNITS> mine[TOGETHER];
    wait_landed(chunk + N * TOGETHER);
    #pragma unroll
    for (int t = 0; t < TOGETHER; t++)
        weights[t].load(chunk + t * N + (N == 2 ? my_side() : 0));
    release_chunks(chunk, N * TOGETHER);
    ready();
    #pragma unroll
    for (int t = 0; t < TOGETHER; t++)
        mine[t].load(x + t * UNITS * 32);
    #pragma unroll
    for (int i = 0; i < Span<UNITS>::MINE; i++)
        #pragma unroll
        for (int t = 0; t < TOGETHER; t++)
            weights[t].multiply(part[t], mine[t], i);
    #pragma unroll
    for (int i = 0; i < 8; i++)
        #pragma unroll
        for (int t = 0; t < TOGETHER; t++)
            sum[i / 4][i % 4] += part[t][i / 4][i % 4];
    return chunk + N * TOGETHER;
}

// Multiply the next N blocks (1 or 2), whose columns are several chunks, side by side, by x.
template <int N, class Ready>
static __device__ __forceinline__ u32 multiply_long_blocks(u32 chunk, const half *x, float *part, Ready ready)
{
    constexpr int SPAN = Rows::SPAN_UNITS, LAST = Rows::UNITS - (Rows::SPANS - 1) * SPAN; // units
    constexpr int TOGETHER = 1;
    float sum[2][4] = {};
    #pragma unroll 1
    for (int span = 0; span < Rows::SPANS - (TOGETHER == 1); span += TOGETHER)
        chunk = multiply_spans<SPAN, N, TOGETHER>(sum, chunk, x + span * SPAN * 32, ready);
    if (TOGETHER == 1)
        chunk = multiply_spans<LAST, N, 1>(sum, chunk, x + (Rows::SPANS - 1) * SPAN * 32, [] {});
    leave_sums(sum, part);
    return chunk;
}

// Multiply N blocks by x, from chunk CHUNK on; sums go to PART[warp][row].  AWAIT brings x, unless IS_READY says that it
// is there: it always does of fewer than EARLY_FROM blocks.  Returns the next chunk.
template <class Await>
static __device__ __forceinline__ u32 multiply_round(u32 chunk, const half *x, int n, float *part, bool is_ready, Await await)
{
    if (Rows::SPANS > 1) {
        const auto ready = [&] {
            if (EARLY_FROM == 2 && !is_ready)
                await();
            is_ready = true;
        };
        #pragma unroll 1
        for (int i = 0; i + 2 <= n; i += 2)
            chunk = multiply_long_blocks<2>(chunk, x, part + i * 8, ready);
        return n % 2 ? multiply_long_blocks<1>(chunk, x, part + (n - 1) * 8, [] {}) : chunk;
    }
    Span_x<Rows::UNITS> mine;
    const auto nothing = [](Span_x<Rows::UNITS> &) {};
    int i = 0;
    if (EARLY_FROM == 1 && !is_ready) {
        i = min(n, PAIRS_EARLY * 2);
        chunk = multiply_blocks<PAIRS_EARLY>(chunk, i, mine, part, [&](Span_x<Rows::UNITS> &to) {
            await();
            to.load(x);
        });
    } else
        mine.load(x);
    #pragma unroll 1
    for (; PAIRS_AT_ONCE > 1 && i + 2 < n; i += 4)
        chunk = multiply_blocks<PAIRS_AT_ONCE>(chunk, min(n - i, 4), mine, part + i * 8, nothing);
    #pragma unroll 1
    for (; i < n; i += 2)
        chunk = multiply_blocks<1>(chunk, min(n - i, 2), mine, part + i * 8, nothing);
    return chunk;
}

static __device__ __forceinline__ float row_total(const float *part, int row)
{
    float total = 0.0f;
    #pragma unroll
    for (int i = 0; i < WARPS; i++)
        total += part[i * (ROUND * 8) + row];
    return total;
}

// ---- Embedding and norms -------------------------------------------------------------

// x[0], behind O, and x[1], behind DOWN, have been sent before the rms of their residual was known: as
// residual * weight / the rms of the other one, at its time.  To be divided by x's own:
static __device__ __forceinline__ float inverse_rms(int which)
{
    float sum = 0.0f;
    #pragma unroll
    for (int i = 0; i < (GROUP * WARPS + 31) / 32; i++) {
        const int at = i * 32 + threadIdx.x % 32;
        sum += at < GROUP * WARPS ? S->squares[which][at][0] : 0.0f;
    }
    return rsqrtf(warp_sum(sum) * (1.0f / D) + EPS);
}

// What products of x[WHICH] are still to be multiplied by: one warp finds it while the others multiply.
static __device__ __forceinline__ void find_factor(int which)
{
    if (threadIdx.x / 32 == WARPS - 1) {
        const float factor = inverse_rms(which) * S->unguess[which];
        if (threadIdx.x % 32 == 0)
            S->factor[which] = factor;
    }
}

// The sum of VALUE over all consumer threads, in every one of them.
static __device__ __forceinline__ float block_sum(float value)
{
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0)
        S->sum[threadIdx.x / 32] = value;
    consumer_barrier();
    float total = 0.0f;
    #pragma unroll
    for (int i = 0; i < WARPS; i++)
        total += S->sum[i];
    return total;
}

// Two elements of the embedding of TOKEN, from column COL on.
static __device__ __forceinline__ float2 embedding(int token, int col)
{
    // in the head's stream: row token % 8 of its block token / 8
    const unsigned char *row = S->args.stream + place(Head::rows(0, token / 8), Head::columns(0, col / 32))
                             + token % 8 * 16;
    const u32 pair = *(const u32 *)(row + col % 8 / 2 * 128 + col % 32 / 8 * 4);
    return make_float2(low(pair), high(pair));
}

// resid = the embedding of args.token; x[1] = its norm by the weights at args.vec[WEIGHT].
static __device__ __noinline__ void embed(int weight)
{
    const int token = S->args.token;
    constexpr int SHARE = (D / 2 + THREADS - 1) / THREADS; // of a thread: two elements each
    float2 e[SHARE], w[SHARE];
    float sum = 0.0f;
    #pragma unroll
    for (int i = 0; i < SHARE; i++) {
        const int col = min((i * THREADS + (int)threadIdx.x) * 2, D - 2);
        e[i] = embedding(token, col);
        w[i] = *(const float2 *)(S->args.vec + weight + col);
    }
    #pragma unroll
    for (int i = 0; i < SHARE; i++) {
        const int col = (i * THREADS + threadIdx.x) * 2, pair = col / 16;
        if (col < D)
            sum += e[i].x * e[i].x + e[i].y * e[i].y;
        if (col < D && pair % GROUP == my_rank())
            *(float2 *)(S->resid + pair / GROUP * 16 + col % 16) = e[i];
    }
    sum = block_sum(sum);
    const float scale = rsqrtf(sum * (1.0f / D) + EPS);
    #pragma unroll
    for (int i = 0; i < SHARE; i++) {
        const int col = (i * THREADS + threadIdx.x) * 2;
        if (col < D)
            *(u32 *)(S->x[1] + col) = pack(e[i].x * scale * w[i].x, e[i].y * scale * w[i].y);
    }
    for (int i = threadIdx.x; i < GROUP * WARPS; i += THREADS)
        S->squares[1][i][0] = i ? 0.0f : sum;
    if (threadIdx.x == 0)
        S->unguess[1] = 1.0f / scale;
    consumer_barrier();
}

// Does GROUP send partial sums, behind O (WHICH 0) or behind DOWN?
static __device__ __forceinline__ bool sends_sums(int which, int group)
{
    return which ? share_of(group).units > 0 : group < (K < GROUPS ? K : GROUPS);
}

// This lane's part of row lane % 16 of PAIR: the sum of what all groups have sent.  Six words have the
// rows, and five lanes share the groups of a word.
static __device__ __forceinline__ float await_sums(const Word *hop, int which, int pair, u32 tag)
{
    constexpr int LANES = 5, SHARE = (GROUPS + LANES - 1) / LANES;
    const int lane = threadIdx.x % 32, word = lane % 6, turn = lane / 6 % LANES;
    const Word *from = hop + pair * GROUPS * 6 + word;
    Word w[SHARE];
    Watch watch;
    for (bool all = false; !all;) {
        u32 wrong = 0, seen = tag;
        #pragma unroll
        for (int i = 0; i < SHARE; i++) { // of a group that sends: clamped, and not added twice
            const int group = turn + i * LANES;
            w[i] = load_word(from + (group < GROUPS && sends_sums(which, group) ? group : which ? GROUPS - 1 : 0) * 6);
        }
        #pragma unroll
        for (int i = 0; i < SHARE; i++) {
            seen = w[i].tag != tag ? w[i].tag : seen;
            wrong |= w[i].tag ^ tag;
        }
        all = wrong == 0;
        if (!all)
            watch.poll(S->args.fault, which ? AT_DOWN : AT_O, tag, seen);
    }
    __syncwarp();
    float total[3] = {};
    #pragma unroll
    for (int i = 0; i < SHARE; i++)
        if (turn + i * LANES < GROUPS && sends_sums(which, turn + i * LANES))
            for (int v = 0; v < 3; v++)
                total[v] += word_value(w[i], v);
    const int row = lane % 16, has = row / 8 * 3 + row % 8 / 3; // the word of this lane's row
    float sum[3] = {};
    #pragma unroll
    for (int turn_of = 0; turn_of < LANES; turn_of++)
        #pragma unroll
        for (int v = 0; v < 3; v++)
            sum[v] += __shfl_sync(~0u, total[v], has + turn_of * 6);
    return row % 8 % 3 == 0 ? sum[0] : row % 8 % 3 == 1 ? sum[1] : sum[2];
}

// resid += the sums of hop O (WHICH 0) or DOWN (1); x[WHICH] = resid * the weights at
// args.vec[WEIGHT], by way of all ranks.
static __device__ __forceinline__ void add_norm(int layer, int which, int weight)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rank = my_rank();
    const u32 tag = layer_tag(layer);
    const Word *hop = sums_buffer(which ? HOP_DOWN : HOP_O, tag);
    const float guess = inverse_rms(which ^ 1);
    float squares = 0.0f;
    if (threadIdx.x == 0)
        S->unguess[which] = 1.0f / guess;
    hold(1);
    #pragma unroll 1
    for (int nth = warp; nth < rank_pairs(rank); nth += WARPS) {
        const int pair = nth * GROUP + rank, row = pair * 16 + lane % 16;
        const float w = row < D ? S->args.vec[weight + row] : 0.0f;
        const float r = S->resid[nth * 16 + lane % 16] + await_sums(hop, which, pair, tag);
        __syncwarp();
        if (lane < 16) {
            S->resid[nth * 16 + lane] = r;
            squares += r * r;
        }
        const auto at = [&](int block) { return pair * 2 + block; };
        give_halves(S->x[which], X_HERE + which, 2, r * w * guess, at);
    }
    hold(0);
    #pragma unroll
    for (int i = 8; i; i /= 2)
        squares += __shfl_xor_sync(~0u, squares, i); // lanes 0 .. 15 have some
    if (lane < GROUP)
        give(S->squares[which][rank * WARPS + warp], X_HERE + which, lane, __float_as_uint(squares), 0, 0, 0);
}

// x[WHICH] of all ranks, of LAYER.
static __device__ __forceinline__ void await_x(int which, int layer)
{
    await_landing(X_HERE + which, PAIRS * 32 + GROUP * WARPS * 16, layer, AT_X);
}

// ---- q, k, v = x W (+ bias) ----------------------------------------------------------

// Where block B of this CTA stands in its group.
static __device__ __forceinline__ int qkv_place(int b) { return b * GROUP + my_rank(); }

// Rows of blocks FIRST .. FIRST + N - 1 of this CTA go to all ranks of the group, EXTRA added.
static __device__ __forceinline__ void finish_qkv(int layer, float extra, int first, int n, const float *part, float factor)
{
    const int row = threadIdx.x, warp = threadIdx.x / 32;
    const auto at = [&](int b) { return qkv_place(first + warp * 4 + b); };
    if (warp * 4 < n) {
        const float value = row < n * 8 ? row_total(part, row) * factor + extra : 0.0f;
        give_floats(&S->qkv[0][0][0], QKV_HERE, n - warp * 4, value, at);
    }
}

// ---- Attention over the KV cache, whose tiles are dealt to the ranks, or to those of a team ------

// One head's E values, 2 x E/64 a lane: pair i of a lane is dimensions lane + 32 i and that
// plus E/2, which rotate together.
struct Head_values {
    static constexpr int PAIRS = E / 64;
    float a[PAIRS], b[PAIRS];

    __device__ __forceinline__ void load(const float *from)
    {
        #pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            a[i] = from[threadIdx.x % 32 + i * 32];
            b[i] = from[threadIdx.x % 32 + i * 32 + E / 2];
        }
    }
    // To rms 1, times WEIGHT.
    __device__ __forceinline__ void norm(const Head_values &weight)
    {
        float sum = 0.0f;
        #pragma unroll
        for (int i = 0; i < PAIRS; i++)
            sum += a[i] * a[i] + b[i] * b[i];
        #pragma unroll
        for (int i = 16; i; i /= 2)
            sum += __shfl_xor_sync(~0u, sum, i);
        const float scale = rsqrtf(sum * (1.0f / E) + EPS);
        #pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            a[i] *= scale * weight.a[i];
            b[i] *= scale * weight.b[i];
        }
    }
    // As halves.
    __device__ __forceinline__ void store(half *to, float scale) const
    {
        #pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const int e = threadIdx.x % 32 + i * 32;
            to[e] = to_half(a[i] * scale);
            to[e + E / 2] = to_half(b[i] * scale);
        }
    }
    // By the angles whose cosines and sines are ROPE[E/2][2].
    __device__ __forceinline__ void rotate(const float2 (&rope)[PAIRS])
    {
        #pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const float x = a[i], y = b[i];
            a[i] = x * rope[i].x - y * rope[i].y;
            b[i] = y * rope[i].x + x * rope[i].y;
        }
    }
};

// What rows are normed and rotated with, read before they come.
struct Attention_constants {
    float2 rope[Head_values::PAIRS];
    Head_values q_norm, k_norm;

    __device__ __forceinline__ void load(int pos, const float *vec)
    {
        #pragma unroll
        for (int i = 0; i < Head_values::PAIRS; i++)
            rope[i] = ((const float2 *)S->args.rope)[(u64)pos * (E / 2) + threadIdx.x % 32 + i * 32];
        q_norm.load(vec + VEC_Q_NORM);
        k_norm.load(vec + VEC_K_NORM);
    }
};

// From S->qkv: queries to S->q, normed, rotated, times log2(e) / sqrt(E).  The rank whose tile has
// position POS takes its key and value to S->now.
static __device__ __forceinline__ void attn_rows(int pos, const Attention_constants &c)
{
    const int warp = threadIdx.x / 32;
    const bool writes = has_tile(pos);
    #pragma unroll 1
    for (int i = warp; i < my_heads() * (RATIO + 2); i += WARPS) {
        const int head = i / (RATIO + 2), j = i % (RATIO + 2), which = j - RATIO; // key or value
        if (which >= 0 && !writes)
            continue;
        Head_values x;
        x.load(S->qkv[head][j]);
        if (which < 1) { // not a value
            Head_values weight;
            #pragma unroll
            for (int i = 0; i < Head_values::PAIRS; i++) {
                weight.a[i] = which < 0 ? c.q_norm.a[i] : c.k_norm.a[i];
                weight.b[i] = which < 0 ? c.q_norm.b[i] : c.k_norm.b[i];
            }
            x.norm(weight);
            x.rotate(c.rope);
        }
        x.store(which < 0 ? S->q[head * RATIO + j] : S->now[head][which], which < 0 ? SOFTMAX_SCALE : 1.0f);
    }
}

// This position's keys and values, of all heads of the group, to the cache.
static __device__ __forceinline__ void attn_keep(half *cache, int pos)
{
    const Share mine = share_of(head_group());
    for (int i = threadIdx.x; i < mine.heads * 2 * (E / 8); i += THREADS) {
        const int head = i / (2 * (E / 8)), which = i / (E / 8) % 2, e = i % (E / 8) * 8;
        *late((uint4 *)(cache + (mine.head0 + head) * KV_HEAD + which * KV_VALUE + kv_at(pos, e))) =
            *(const uint4 *)(S->now[head][which] + e);
    }
    fence_async_global(); // the copy engine will read it
}

// One warp's sums for up to 8 query heads: columns of the mma, whose rows are positions, then
// dimensions.  A lane has heads lane % 4 * 2 and + 1.
struct Attention {
    u32 q[E / 32][4];
    float out[E / 16][4], top[2], mass[2]; // dimensions lane / 4, + 8 of each 16; mass: of the lane's positions

    // QUERIES: of the first head; HEADS of them.
    __device__ __forceinline__ void start(const half *queries, int heads)
    {
        const int lane = threadIdx.x % 32;
        const u32 from = shared_address(queries + min(lane % 8, heads - 1) * E) + lane / 8 * 16;
        #pragma unroll
        for (int i = 0; i < E / 32; i++)
            ldmatrix(q[i], from + i * 64);
        #pragma unroll
        for (int i = 0; i < E / 16; i++)
            out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;
        top[0] = top[1] = -1e30f;
        mass[0] = mass[1] = 0.0f;
    }

    // P: positions lane / 4 and + 8 of two heads; as the right operand: two positions of a head.
    static __device__ __forceinline__ u32 turn(u32 p)
    {
        const int lane = threadIdx.x % 32, from = lane % 4 * 8 + lane / 8;
        const u32 a = __shfl_sync(~0u, p, from), b = __shfl_sync(~0u, p, from + 4);
        return lane / 4 % 2 ? a >> 16 | (b & 0xffff0000) : (a & 0xffff) | b << 16;
    }

    // Attend to 16 positions whose keys and values lie at KEYS and VALUES; those from COUNT on are not there: what
    // lies in their place may not even be numbers.
    __device__ __forceinline__ void attend(u32 keys, u32 values, int count)
    {
        const int lane = threadIdx.x % 32, even = lane % 4 * 2;
        const u32 key_at = keys + lane / 8 % 2 * (E * 16) + lane / 16 * 128 + lane % 8 * 16;
        const u32 value_at = values + lane / 16 * (E * 16) + lane / 8 % 2 * 128 + lane % 8 * 16;
        const u32 there[2] = {(even < count ? 0xffff : 0) | (even + 1 < count ? 0xffff0000 : 0),
                              (even + 8 < count ? 0xffff : 0) | (even + 9 < count ? 0xffff0000 : 0)};
        float s[2][4] = {};
        #pragma unroll
        for (int i = 0; i < E / 16; i++) {
            u32 key[4];
            ldmatrix(key, key_at + i * 256);
            mma(s[i % 2], key[0], key[1], key[2], key[3], q[i / 2][i % 2 * 2], q[i / 2][i % 2 * 2 + 1]);
        }
        float p[2][2], keep[2]; // [head][position]
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            const float a = lane / 4 < count ? s[0][h] + s[1][h] : -1e30f;
            const float b = lane / 4 + 8 < count ? s[0][h + 2] + s[1][h + 2] : -1e30f;
            float best = fmaxf(top[h], fmaxf(a, b));
            #pragma unroll
            for (int i = 4; i < 32; i *= 2)
                best = fmaxf(best, __shfl_xor_sync(~0u, best, i));
            keep[h] = exp2_approx(top[h] - best);
            p[h][0] = exp2_approx(a - best);
            p[h][1] = exp2_approx(b - best);
            mass[h] = mass[h] * keep[h] + (p[h][0] + p[h][1]);
            top[h] = best;
        }
        const u32 p0 = turn(pack(p[0][0], p[1][0])), p1 = turn(pack(p[0][1], p[1][1]));
        #pragma unroll
        for (int i = 0; i < E / 16; i++) {
            u32 value[4];
            ldmatrix_transposed(value, value_at + i * 256);
            #pragma unroll
            for (int c = 0; c < 4; c++)
                out[i][c] *= keep[c % 2];
            mma(out[i], value[0] & there[0], value[1] & there[0], value[2] & there[1], value[3] & there[1], p0, p1);
        }
    }

    // Leave them for HEADS heads from FIRST on.
    __device__ __forceinline__ void leave(int first, int heads)
    {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            const int head = lane % 4 * 2 + h;
            #pragma unroll
            for (int i = 4; i < 32; i *= 2)
                mass[h] += __shfl_xor_sync(~0u, mass[h], i);
            if (head < heads) {
                #pragma unroll
                for (int i = 0; i < E / 16; i++) {
                    S->out[warp][first + head][i * 16 + lane / 4] = out[i][h];
                    S->out[warp][first + head][i * 16 + lane / 4 + 8] = out[i][h + 2];
                }
                if (lane < 4) {
                    S->top[warp][first + head] = top[h];
                    S->mass[warp][first + head] = mass[h];
                }
            }
        }
    }
};

// Tiles that the warps of a CTA attend to at once, 16 positions each.
constexpr int PARTS = KV_TILE / 16; // of a tile
constexpr int TURN = WARPS / PARTS > 0 && WARPS / PARTS <= STAGES ? WARPS / PARTS : 1;

// The first warps, which have cached positions before POS.
static __device__ __forceinline__ int attending_warps(int pos)
{
    const int before = my_tiles(pos) - 1; // tiles, all of whose positions are cached; of the last one:
    const int cached = max(0, pos - (my_place() + before * dealt_to()) * KV_TILE);
    return before < 0 ? 0 : min(TURN * PARTS, before * PARTS + min(PARTS, (cached + 15) / 16));
}

// What each query of HEAD makes of this position itself; the last warps have the fewest others.
static __device__ __forceinline__ void attn_now(int head)
{
    #pragma unroll 1
    for (int query = WARPS - 1 - threadIdx.x / 32; query < RATIO; query += WARPS) {
        const half *q = S->q[head * RATIO + query], *key = S->now[head][0];
        float sum = 0.0f;
        #pragma unroll
        for (int i = 0; i < E / 64; i++) {
            const u32 a = *(const u32 *)(q + i * 64 + threadIdx.x % 32 * 2);
            const u32 b = *(const u32 *)(key + i * 64 + threadIdx.x % 32 * 2);
            sum += low(a) * low(b) + high(a) * high(b);
        }
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0)
            S->score[query] = sum;
    }
}

// Each warp attends to its share of this CTA's tiles of head HEAD of the group, from chunk CHUNK on, 16 positions
// at a time, and leaves its sums.  Returns the next chunk.
static __device__ __forceinline__ u32 attn_head(u32 chunk, int head, int pos)
{
    constexpr int QUERIES = (RATIO + 7) / 8; // 8 query heads
    const int warp = threadIdx.x / 32, tiles = my_tiles(pos), part = warp % PARTS, mine = warp / PARTS;
    const bool attends = warp < attending_warps(pos);
    Attention a[QUERIES];
    if (attends)
        #pragma unroll
        for (int i = 0; i < QUERIES; i++)
            a[i].start(S->q[head * RATIO + i * 8], min(RATIO - i * 8, 8));
    #pragma unroll 1
    for (int tile = 0; tile < tiles; tile += TURN) {
        const int n = min(TURN, tiles - tile); // this warp takes tile MINE of these
        const int first = (my_place() + (tile + mine) * dealt_to()) * KV_TILE + part * 16; // position
        const unsigned char *keys = S->ring[(chunk + mine) % STAGES] + part * (E * 32);
        wait_landed(chunk + n);
        if (mine < n && first < pos)
            #pragma unroll
            for (int i = 0; i < QUERIES; i++)
                a[i].attend(shared_address(keys), shared_address(keys + KV_VALUE * 2), pos - first);
        release_chunks(chunk, n);
        chunk += n;
    }
    if (attends)
        #pragma unroll
        for (int i = 0; i < QUERIES; i++)
            a[i].leave(i * 8, min(RATIO - i * 8, 8));
    return chunk;
}

// Merge what the first warps, WARPS of them, have left for the queries of HEAD, and what HAS_NOW says is here of this
// position; send it to all ranks.
static __device__ __forceinline__ void attn_send(int head, u32 tag, int warps, bool has_now)
{
    constexpr int VALUES = 4, WORDS = E / 4;
    constexpr int MANY = THREADS / (RATIO * WORDS), SHARES = MANY < 1 ? 1 : MANY > GROUP ? GROUP : MANY; // of the ranks
    #pragma unroll 1
    for (int i = threadIdx.x; i < RATIO * WORDS * SHARES; i += THREADS) {
        const int query = i / WORDS % RATIO, word = i % WORDS;
        const int e = word * 4;
        float best = has_now ? S->score[query] : -1e30f, sum = 0.0f, out[VALUES] = {}, top[WARPS];
        alignas(16) float values[WARPS][VALUES];
        #pragma unroll
        for (int w = 0; w < WARPS; w++) { // all that may be there is read at once
            top[w] = w < warps ? S->top[w][query] : -1e30f;
            best = fmaxf(best, top[w]);
            *(uint4 *)values[w] = *(const uint4 *)(S->out[w][query] + e);
        }
        if (has_now) {
            sum = exp2_approx(S->score[query] - best);
            #pragma unroll
            for (int v = 0; v < VALUES; v++)
                out[v] = low(S->now[head][1][min(e + v, E - 1)]) * sum;
        }
        #pragma unroll
        for (int w = 0; w < WARPS; w++)
            if (w < warps) {
                const float scale = exp2_approx(top[w] - best);
                sum += S->mass[w][query] * scale;
                #pragma unroll
                for (int v = 0; v < VALUES; v++)
                    out[v] += values[w][v] * scale;
            }
        float *to = S->part[my_rank()][head * RATIO + query];
        for (int rank = i / (RATIO * WORDS); rank < GROUP; rank += SHARES)
            give(to + e, PART_HERE, rank, __float_as_uint(out[0]), __float_as_uint(out[1]), __float_as_uint(out[2]),
                 __float_as_uint(out[3]));
        if (i < RATIO * WORDS && word < GROUP)
            give(to + E, PART_HERE, word, __float_as_uint(best), __float_as_uint(sum), 0, 0);
    }
}

// Attend to my tiles of each head, and send what they give.
static __device__ __forceinline__ void attn_tiles(int layer, u64 layer_cache, int vec)
{
    const int pos = S->args.pos + S->index, heads = my_heads();
    u32 chunk = my_chunk();
    Attention_constants constants;
    constants.load(pos, S->args.vec + vec);
    await_landing(QKV_HERE, heads * (RATIO + 2) * E * 4, layer, AT_QKV);
    if (!my_tiles(pos))
        return;
    attn_rows(pos, constants);
    const bool has_now = has_tile(pos);
    #pragma unroll 1
    for (int head = 0; head < heads; head++) {
        consumer_barrier(); // queries and this position's row are there; what the warps left has been sent
        if (has_now)
            attn_now(head);
        chunk = attn_head(chunk, head, pos);
        consumer_barrier();
        attn_send(head, layer_tag(layer), attending_warps(pos), has_now);
    }
    if (has_now)
        attn_keep(S->args.kv + layer_cache, pos);
    take_chunks(chunk);
}

// y = the sums of all ranks that have positions, merged and divided; far on, of all in the team, whose helpers send
// theirs instead.
static __device__ __forceinline__ void attn_merge(int layer)
{
    const int near = min(GROUP, (S->args.pos + S->index) / KV_TILE + 1); // ranks that have tiles
    const int heads = my_heads(), ranks = near;
    await_landing(PART_HERE, ranks * heads * RATIO * (E + 4) * 4, layer, AT_PART);
    #pragma unroll 1
    for (int i = threadIdx.x; i < heads * RATIO * (E / 2); i += THREADS) {
        const int query = i / (E / 2), e = i % (E / 2) * 2;
        float best = -1e30f, sum = 0.0f, out[2] = {}, top[GROUP];
        float2 values[GROUP];
        #pragma unroll
        for (int rank = 0; rank < GROUP; rank++) { // all that may be there is read at once
            top[rank] = rank < ranks ? S->part[rank][query][E] : -1e30f;
            best = fmaxf(best, top[rank]);
            values[rank] = *(const float2 *)(S->part[rank][query] + e);
        }
        #pragma unroll
        for (int rank = 0; rank < GROUP; rank++)
            if (rank < ranks) {
                const float scale = exp2_approx(top[rank] - best);
                sum += S->part[rank][query][E + 1] * scale;
                out[0] += values[rank].x * scale;
                out[1] += values[rank].y * scale;
            }
        out[0] = __fdividef(out[0], sum);
        out[1] = __fdividef(out[1], sum);
        *(u32 *)(S->y + query * E + e) = pack(out[0], out[1]);
    }
    consumer_barrier();
}

// LAYER_CACHE and VEC: where the layer's cache and vectors begin.
static __device__ __noinline__ void attn(int layer, u64 layer_cache, int vec)
{
    if (my_heads())
        attn_tiles(layer, layer_cache, vec);
}

// ---- MLP: silu(x W_gate) * (x W_up) --------------------------------------------------

// Products of blocks FIRST .. FIRST + N - 1 of this CTA, gate and up in turn, go to all ranks of the group.
static __device__ __forceinline__ void finish_mlp(int layer, int first, int n, const float *part, float factor)
{
    const int row = threadIdx.x, warp = threadIdx.x / 32;
    if (warp * 8 < n) {
        float value = 0.0f;
        if (row < n * 4) {
            const float gate = row_total(part, row / 8 * 16 + row % 8) * factor;
            const float up = row_total(part, row / 8 * 16 + 8 + row % 8) * factor;
            value = __fdividef(gate, 1.0f + __expf(-gate)) * up * MLP_SCALE;
        }
        const auto at = [&](int b) { return (first / 2 + warp * 4 + b) * GROUP + my_rank(); };
        give_halves(S->act, MLP_HERE, n / 2 - warp * 4, value, at);
    }
}

// The group's products, in S->act.
static __device__ __forceinline__ void await_product(int layer, int units)
{
    await_landing(MLP_HERE, units * 64, layer, AT_MLP);

}

// ---- Head and sampler ----------------------------------------------------------------

// A candidate for the next token.
struct Best {
    float value;
    int id;
    u32 canceled; // of CTA 0: by the host
};

static __device__ __forceinline__ Best better(const Best &a, const Best &b)
{
    const bool b_wins = b.value > a.value || (b.value == a.value && b.id < a.id);
    return {b_wins ? b.value : a.value, b_wins ? b.id : a.id, a.canceled | b.canceled};
}

// The best of all warps, from what block_best left.
static __device__ __forceinline__ Best best_found()
{
    Best best = {-infinity(), V, 0};
    #pragma unroll
    for (int i = 0; i < WARPS; i++)
        best = better(best, {word_value(S->best[i], 0), (int)S->best[i].v[1], S->best[i].v[2]});
    return best;
}

// The best of all consumer threads of this CTA: every one of them finds it with best_found.
static __device__ __forceinline__ void block_best(Best best)
{
    #pragma unroll
    for (int i = 16; i; i /= 2)
        best = better(best, {__shfl_xor_sync(~0u, best.value, i), __shfl_xor_sync(~0u, best.id, i),
                             __shfl_xor_sync(~0u, best.canceled, i)});
    consumer_barrier(); // S->best is free
    if (threadIdx.x % 32 == 0)
        S->best[threadIdx.x / 32] = {{__float_as_uint(best.value), (u32)best.id, best.canceled}, 0};
    consumer_barrier();
}

// The best of all CTAs: every thread of every CTA finds it with best_found.  (Some compilers would
// pass a struct that is returned through local memory.)
static __device__ __noinline__ void grid_best(Best best, u32 tag)
{
    block_best(best);
    if (threadIdx.x == 0) {
        best = best_found();
        store_word(S->args.exchange + HOP_BEST + blockIdx.x, __float_as_uint(best.value), best.id,
                   best.canceled, tag);
    }
    best = {-infinity(), V, 0};
    await_words<CTAS>(CTAS, tag, AT_BEST, [&](int word) { return S->args.exchange + HOP_BEST + word; },
                      [&](int, const Word &got) {
                          best = better(best, {word_value(got, 0), (int)got.v[1], got.v[2]});
                      });
    block_best(best);
}

static __device__ __forceinline__ float *token_logits()
{
    return S->args.logits + S->index * S->args.logits_stride;
}

// The id of this CTA's row ROW of the head.
static __device__ __forceinline__ int logit_id(int row) { return (row / 8 * CTAS + (int)blockIdx.x) * 8 + row % 8; }

// Logits of blocks FIRST .. FIRST + N - 1 of this CTA; MINE: this thread's best.  Rows past V are padding.
static __device__ __forceinline__ void finish_head(int first, int n, const float *part, float factor, Best &mine)
{
    const int id = logit_id(first * 8 + threadIdx.x);
    if (threadIdx.x < n * 8 && id < V) {
        const float value = row_total(part, threadIdx.x) * factor;
        token_logits()[id] = value;
        mine = better(mine, {value, id, 0});
    }
}

// ---- Stages of matrices that are split by rows ---------------------------------------

enum { QKV_ROWS, MLP_ROWS, HEAD_ROWS };

// Multiply all my blocks of WHAT by x, in rounds, and send what they give.  WEIGHT, BIAS: where x's norm's and the bias
// begin in args.vec.  Returns this thread's best logit.
static __device__ __noinline__ Best rows(int what, int layer, int weight, int bias)
{
    const int which = what != MLP_ROWS; // x
    const int blocks = what == QKV_ROWS ? Qkv::mine(my_heads()) : what == MLP_ROWS ? Mlp::mine() : Head::mine();
    Best best = {-infinity(), V, 0};
    bool is_ready = which && !layer; // the embedding's
    const auto await = [&] {
        if (EARLY_SUMS)
            add_norm(layer - which, which, weight);
        await_x(which, layer - which);
        find_factor(which);
    };
    if (is_ready)
        find_factor(which);
    else if (!EARLY_SUMS)
        add_norm(layer - which, which, weight);
    if (!is_ready && blocks < EARLY_FROM) { // also who has none: who sends what comes next has waited for x of all ranks
        await();
        is_ready = true;
    }
    u32 chunk = my_chunk();
    #pragma unroll 1
    for (int first = 0, side = 0; first < blocks; first += ROUND, side ^= 1) {
        const int n = min(ROUND, blocks - first);
        float *part = S->part_sums[side][0];
        float extra = 0.0f; // read long before it is added
        chunk = multiply_round(chunk, S->x[which], n, part, is_ready, await);
        is_ready = true;
        consumer_barrier();
        const float factor = S->factor[which];
        if (what == QKV_ROWS)
            finish_qkv(layer, extra, first, n, part, factor);
        else if (what == MLP_ROWS)
            finish_mlp(layer, first, n, part, factor);
        else
            finish_head(first, n, part, factor, best);
    }
    take_chunks(chunk);
    return best;
}

// ---- Matrices that are split by columns: each warp has its own rows ------------------

// To the same rank in all groups: this group's part of a pair of D rows, of which lane l has rows l / 4 and
// l / 4 + 8.
static __device__ __forceinline__ void send_pair(Word *hop, int pair, u32 tag, const float (&sum)[2])
{
    const int word = threadIdx.x % 32 % 6; // three rows
    const float mine = threadIdx.x % 2 ? sum[1] : sum[0];
    float v[3];
    #pragma unroll
    for (int i = 0; i < 3; i++)
        v[i] = __shfl_sync(~0u, mine, (word % 3 * 3 + i & 7) * 4 + word / 3);
    if (threadIdx.x % 32 < 6)
        store_word(hop + (pair * GROUPS + my_group()) * 6 + word, __float_as_uint(v[0]), __float_as_uint(v[1]),
                   __float_as_uint(v[2]), tag);
}

// What O (WHICH 0) or DOWN multiplies: attention's output in S->y, or the MLP product in S->act.
static __device__ __forceinline__ void await_columns(int which, int layer, int units)
{
    if (which)
        await_product(layer, units);
    else
        attn_merge(layer);
}

// Multiply my rows of O (WHICH 0) or DOWN (1) by what this group has of their columns, and send the sums.  The first
// weights are read before x is awaited.
static __device__ __noinline__ void columns(int which, int layer)
{
    constexpr bool EARLY = 8 > 1; // elsewhere registers are too few
    constexpr int SPAN = O::SPAN_UNITS > Down::SPAN_UNITS ? O::SPAN_UNITS : Down::SPAN_UNITS;
    constexpr int CHUNKS = 2; // at once
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rank = my_rank();
    const int span = which ? Down::SPAN_UNITS : O::SPAN_UNITS;
    const Share mine = share_of(my_group());
    const int units = which ? mine.units : mine.heads * O::HEAD_UNITS;
    const half *x = which ? S->act : S->y;
    const u32 tag = layer_tag(layer);
    bool is_ready = false;
    u32 chunk = my_chunk();
    Set set = {0, 0};
    if (!units)
        return;
    if (!EARLY)
        await_columns(which, layer, units);
    #pragma unroll 1
    for (int i = 0; i < SETS; i++) {
        set = set_of(rank, set.first + set.pairs);
        const u32 at = warp * 1024 + lane / 8 % 2 * 512 + lane / 16 * 128 + lane % 8 * 16;
        float sum[2][2][4] = {}; // chains of independent sums
        #pragma unroll 1
        for (int from = 0; from < units; from += CHUNKS * span) {
            const int chunks = min(CHUNKS, (units - from + span - 1) / span);
            Unit unit[CHUNKS][SPAN];
            wait_landed(chunk + chunks);
            #pragma unroll
            for (int c = 0; c < CHUNKS; c++)
                #pragma unroll
                for (int u = 0; u < SPAN; u++) // what is not there is not multiplied
                    unit[c][u].load(shared_address(S->ring[(chunk + min(c, chunks - 1)) % STAGES])
                                    + (warp < set.pairs && u < span ? at + u * set.pairs * 1024 : 0));
            release_chunks(chunk, chunks);
            if (EARLY && !is_ready)
                await_columns(which, layer, units);
            is_ready = true;
            #pragma unroll
            for (int c = 0; c < CHUNKS; c++)
                #pragma unroll
                for (int u = 0; u < SPAN; u++)
                    if (u < span && from + c * span + u < units)
                        unit[c][u].multiply(sum[u % 2], load_x(x, from + c * span + u));
            chunk += chunks;
        }
        if (warp < set.pairs) {
            const float scale = which ? 1.0f / MLP_SCALE : 1.0f;
            float rows[2];
            #pragma unroll
            for (int b = 0; b < 2; b++)
                rows[b] = ((sum[0][0][b * 2] + sum[0][1][b * 2]) + (sum[1][0][b * 2] + sum[1][1][b * 2])) * scale;
            send_pair(sums_buffer(which ? HOP_DOWN : HOP_O, tag), (set.first + warp) * GROUP + rank, tag, rows);
        }
    }
    take_chunks(chunk);
}

// USE(id) for every logit of this CTA: each thread for its share.
template <class Use>
static __device__ __forceinline__ void my_logits(Use use)
{
    for (int row = threadIdx.x; row < Head::mine() * 8; row += THREADS)
        if (logit_id(row) < V)
            use(logit_id(row));
}

// An order-preserving map from floats to integers.
static __device__ __forceinline__ u32 sort_key(float x)
{
    if (x != x)
        return 0; // not a number: below all
    const u32 bits = __float_as_uint(x + 0.0f); // -0 is 0
    return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

// Probability, times 2^40, before it is divided by the sum.
static __device__ __forceinline__ u64 mass(float logit, float top, float temperature)
{
    const float p = expf((logit - top) / temperature) * 1099511627776.0f;
    return p >= 1.0f ? (u64)p : 0; // none for what is not a number
}

// A bin of S->hist: a count, then a mass in limbs of 11 bits, which 32-bit atomics can add up.
static __device__ __forceinline__ void add_mass(u32 *bin, u64 m)
{
    #pragma unroll
    for (int i = 0; i < 3; i++)
        atomicAdd(bin + 1 + i, (u32)(m >> 11 * i) & 2047);
    atomicAdd(bin + 4, (u32)(m >> 33));
}

static __device__ __forceinline__ u64 bin_mass(const u32 *bin)
{
    return bin[1] + ((u64)bin[2] << 11) + ((u64)bin[3] << 22) + ((u64)bin[4] << 33);
}

// One digit (4 bits, from bit SHIFT) of the search below: every CTA counts its logits
// whose key starts with PREFIX by their next digit, and adds up all CTAs' counts.  In S->hist
// every thread then finds the sums.
static __device__ __noinline__ void count_digit(const float *logits, float top, u32 prefix, int shift,
                                                u32 tag)
{
    const float temperature = S->args.temperature;
    Word *hop = S->args.exchange + HOP_COUNT + tag % 2 * (CTAS * 16);
    consumer_barrier(); // S->hist is free
    if (threadIdx.x < 80)
        S->hist[threadIdx.x / 5][threadIdx.x % 5] = 0;
    consumer_barrier();
    my_logits([&](int id) {
        const u32 key = sort_key(logits[id]);
        if (shift == 28 || key >> (shift + 4) == prefix >> (shift + 4)) {
            u32 *bin = S->hist[key >> shift & 15];
            atomicAdd(bin, 1);
            add_mass(bin, mass(logits[id], top, temperature));
        }
    });
    consumer_barrier();
    if (threadIdx.x < 16) {
        const u32 *bin = S->hist[threadIdx.x];
        const u64 m = bin_mass(bin);
        store_word(hop + blockIdx.x * 16 + threadIdx.x, bin[0], (u32)m, (u32)(m >> 32), tag);
    }
    consumer_barrier();
    if (threadIdx.x < 80)
        S->hist[threadIdx.x / 5][threadIdx.x % 5] = 0;
    consumer_barrier();
    const auto at = [&](int word) { return hop + word; };
    await_words<CTAS * 16>(CTAS * 16, tag, AT_COUNT, at, [&](int word, const Word &got) {
        u32 *bin = S->hist[word % 16];
        atomicAdd(bin, got.v[0]);
        add_mass(bin, (u64)got.v[2] << 32 | got.v[1]);
    });
    consumer_barrier();
}

struct Threshold {
    u32 key;
    u64 total; // mass of the logits at or above it
};

// The largest key such that the logits at or above it number at least WANT (BY_MASS 0), or
// have at least that mass (BY_MASS 1); found a digit at a time with 8 hops.  With
// WANT_SHARE >= 0, WANT is that share of all mass.
static __device__ __noinline__ Threshold threshold(const float *logits, float top, bool by_mass, u64 want,
                                                   float want_share, u32 tag)
{
    u64 above = 0, above_mass = 0; // of the keys beyond PREFIX's digits
    Threshold found = {0, 0};
    #pragma unroll 1
    for (int shift = 28; shift >= 0; shift -= 4, tag++) {
        count_digit(logits, top, found.key, shift, tag);
        if (shift == 28 && want_share >= 0.0f) {
            u64 total = 0;
            for (int i = 0; i < 16; i++)
                total += bin_mass(S->hist[i]);
            want = (u64)((double)want_share * (double)total);
        }
        int digit = 15;
        for (;; digit--) {
            const u32 *bin = S->hist[digit];
            const u64 m = bin_mass(bin);
            const u64 reached = by_mass ? above_mass + m : above + bin[0];
            if (reached >= want && reached > 0 || digit == 0) {
                found.total = above_mass + m;
                break;
            }
            above += bin[0];
            above_mass += m;
        }
        found.key |= (u32)digit << shift;
    }
    return found;
}

static __device__ __forceinline__ u64 sample_hash(u64 seed, u32 position, u32 id)
{
    u64 z = seed + 0x9E3779B97F4A7C15ull * ((u64)position << 32 | id) + 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}

// Choose from the logits: cut to top_k and top_p, then the largest logit / temperature plus
// Gumbel noise, which is a draw from the softmax; best_found tells.  BEST: this thread's largest logit.
static __device__ __noinline__ void sample(Best best)
{
    const float *logits = token_logits();
    const int position = S->args.pos + S->index + 1;
    const u32 tag = layer_tag(L);
    const float temperature = S->args.temperature, top_p = S->args.top_p;
    const int top_k = S->args.top_k;
    const u32 canceled = best.canceled;
    Threshold least = {0, 0};
    consumer_barrier(); // the logits are written
    if (top_k > 0 && top_k < V || top_p < 1.0f) {
        grid_best(best, tag);
        const float top = best_found().value;
        if (top_k > 0 && top_k < V)
            least = threshold(logits, top, false, top_k, -1.0f, tag + 1);
        if (top_p < 1.0f) {
            const u64 want = (u64)((double)top_p * (double)least.total);
            const Threshold by_mass = threshold(logits, top, true, want, least.total ? -1.0f : top_p,
                                                tag + 9);
            least.key = max(least.key, by_mass.key);
        }
    }
    best = {-infinity(), V, canceled};
    my_logits([&](int id) {
        if (sort_key(logits[id]) >= least.key) {
            const float u = (float)(sample_hash(S->args.seed, position, id) >> 41) * 0x1p-23f + 0x1p-24f;
            best = better(best, {logits[id] / temperature - logf(-logf(u)), id, canceled});
        }
    });
    grid_best(best, tag + 17);
}

// ---- Decode: the producer and the teller ---------------------------------------------

// Two warps keep the ring full of this CTA's stream, across phases, layers and tokens: the producer brings
// chunks, and one lane, the teller, tells the consumers which have landed.  On sm_90 and later one lane of the
// producer does it all; before, its lanes share the copies, and go by what lane 0 sees.
static __device__ __forceinline__ bool is_producer() { return threadIdx.x == THREADS; }
static __device__ __forceinline__ u32 of_lane0(u32 value) { return value; }
static __device__ __forceinline__ void sync_producer() {}
static __device__ __forceinline__ bool is_teller() { return threadIdx.x == THREADS + 32; }

// The teller counts the chunks that have landed, until there are no more.
static __device__ __forceinline__ void tell_landed()
{
    u32 landed = 0;
    while (landed != load_flag(&S->end))
        if (gate_landed(&S->full[landed % STAGES], landed / STAGES)) {
            landed++;
            publish_flag(&S->landed, landed);
        }
}

// May the producer fill the stage of CHUNK: is it free, and are fewer than MOST chunks on their way?
static __device__ __forceinline__ bool may_fill(u32 chunk, u32 most)
{
    if (chunk - load_flag(&S->landed) >= (load_flag(&S->hold) ? INFLIGHT_HOP : most))
        return false;
    return gate_free(&S->free[chunk % STAGES], chunk / STAGES);
}

// What one chunk is copied from.
struct Piece {
    const unsigned char *src;
    int bytes;
};

// Bring N chunks: PIECE(i); MOST on their way.  When the consumers have left, there are no more tokens to feed.
template <class Make>
static __device__ __forceinline__ void feed(int n, u32 most, Make piece)
{
    u32 chunk = S->filled;
    bool is_done = S->fed >= S->args.n;
    sync_producer();
    #pragma unroll 1
    for (int i = 0; i < n && !is_done; i++) {
        if (threadIdx.x % 32 == 0) // no watchdog: what holds the consumers up, they report themselves
            while (!is_done && !may_fill(chunk, most))
                is_done = load_flag(&S->done);
        is_done = of_lane0(is_done);
        if (!is_done) {
            const Piece from = piece(i);
            gate_fill(&S->full[chunk % STAGES], S->ring[chunk % STAGES], from.src, from.bytes);
            chunk++;
        }
    }
    if (threadIdx.x % 32 == 0) {
        S->filled = chunk;
        S->fed = is_done ? S->args.n : S->fed;
    }
    sync_producer();
}

// The stream of this CTA's rank in GROUP.
static __device__ __forceinline__ const unsigned char *stream_of(int group)
{
    return S->args.stream + (u64)(group * GROUP + my_rank()) * CTA_BYTES;
}

// LAYER of it.
static __device__ __forceinline__ const unsigned char *layer_of(int group, int layer)
{
    return stream_of(group) + LAYERS_OFFSET + (u64)layer * share_of(group).layer;
}

// Bring BLOCKS blocks, whose rows are all columns of x; of several chunks each, two blocks side by side.
static __device__ __noinline__ void feed_rows(const unsigned char *src, int blocks, u32 most)
{
    constexpr int SPANS = Head::SPANS, SPAN = Head::SPAN_UNITS * 512, LAST = Head::BLOCK_BYTES - (SPANS - 1) * SPAN;
    feed(blocks * SPANS, most, [&](int i) -> Piece {
        const int first = i / (SPANS * 2) * 2, in = i - first * SPANS, sides = first + 1 < blocks ? 2 : 1;
        const int span = in / sides, block = first + in % sides;
        return SPANS == 1 ? Piece{src + (u64)i * SPAN, SPAN}
                          : Piece{src + (u64)block * Head::BLOCK_BYTES + span * SPAN, span < SPANS - 1 ? SPAN : LAST};
    });
}

// Bring UNITS units of my pairs of rows, SPAN at a time.
static __device__ __noinline__ void feed_columns(const unsigned char *src, int units, int span, u32 most)
{
    Set set = {0, 0};
    #pragma unroll 1
    for (int i = 0; units && i < SETS; i++) {
        set = set_of(my_rank(), set.first + set.pairs);
        const int bytes = span * set.pairs * 1024, n = (units + span - 1) / span;
        const int last = (units - (n - 1) * span) * set.pairs * 1024;
        feed(n, most, [&](int chunk) -> Piece { return {src + (u64)chunk * bytes, chunk < n - 1 ? bytes : last}; });
        src += units * set.pairs * 1024;
    }
}

// My tiles of the cache of each of the group's heads, as many at once as there are stages: all else waits for them.  The
// rows before this token are there: a whole token's chunks, more than the ring has, went through it since the last one
// was written.
static __device__ __noinline__ void feed_kv(int layer)
{
    const Share mine = share_of(head_group());
    const int tiles = my_tiles(S->args.pos + S->fed);
    #pragma unroll 1
    for (int head = 0; head < mine.heads; head++) {
        const half *cache = S->args.kv + layer * KV_LAYER + (mine.head0 + head) * KV_HEAD + (u64)my_place() * KV_TILE_ELEMS;
        feed(tiles, STAGES, [&](int tile) -> Piece {
            return {(const unsigned char *)(cache + (u64)tile * (dealt_to() * KV_TILE_ELEMS)), KV_TILE_ELEMS * 2};
        });
    }
}

static __device__ __noinline__ void feed_layer(int layer)
{
    const Share mine = share_of(my_group());
    const unsigned char *src = layer_of(my_group(), layer);
    feed_rows(layer_of(head_group(), layer), Qkv::mine(my_heads()), INFLIGHT_HEADS);
    feed_kv(layer);
    feed_columns(src + mine.o, mine.heads * O::HEAD_UNITS, O::SPAN_UNITS, INFLIGHT_HEADS);
    feed_rows(src + mine.mlp, Mlp::mine(), INFLIGHT);
    feed_columns(src + mine.down, mine.units, Down::SPAN_UNITS, INFLIGHT);
}

// The host's word, off the critical path: next_token passes it on.
static __device__ __noinline__ void look_for_cancel()
{
    if (blockIdx.x == 0 && threadIdx.x % 32 == 0)
        store_flag(&S->canceled, load_system(S->args.cancel));
}

static __device__ __forceinline__ void produce()
{
    do {
        #pragma unroll 1
        for (int layer = 0; layer < L; layer++)
            feed_layer(layer);
        look_for_cancel();
        feed_rows(stream_of(my_group()), Head::mine(), INFLIGHT);
        sync_producer();
        if (threadIdx.x % 32 == 0)
            S->fed++;
        sync_producer();
    } while (S->fed < S->args.n);
    if (threadIdx.x % 32 == 0)
        store_flag(&S->end, S->filled);
    while (of_lane0(load_flag(&S->landed)) != S->filled) // nothing may arrive after the CTA has gone
        ;
}

// ---- Decode: one token ---------------------------------------------------------------

// All layers for the token whose embedding is in resid and whose norm is in x[1]; the head then waits for the last
// one's sums.  Numbers: the layer, then offsets into args.vec and args.kv.
static __device__ __forceinline__ void layers()
{

    // layer 00
    rows(QKV_ROWS, 0, 0, 640);
    attn(0, 0, 0);
    columns(0, 0);
    rows(MLP_ROWS, 0, 256, 0);
    columns(1, 0);

    // layer 01
    rows(QKV_ROWS, 1, 640, 1280);
    attn(1, 131072, 640);
    columns(0, 1);
    rows(MLP_ROWS, 1, 896, 0);
    columns(1, 1);

    // layer 02
    rows(QKV_ROWS, 2, 1280, 1920);
    attn(2, 262144, 1280);
    columns(0, 2);
    rows(MLP_ROWS, 2, 1536, 0);
    columns(1, 2);
}

// ---- Decode: the kernel --------------------------------------------------------------

// Does ID end the launch?
static __device__ __forceinline__ bool is_stop(int id)
{
    for (int i = 0; i < S->args.n_stop; i++)
        if (S->args.stop[i] == id)
            return true;
    return false;
}

// The token at work gives the next one: true when there is one more to run.
static __device__ __noinline__ bool next_token()
{
    Best best = rows(HEAD_ROWS, L, VEC_NORM, 0);
    best.canceled = blockIdx.x == 0 && threadIdx.x == 0 ? load_flag(&S->canceled) : 0;
    if (S->args.temperature > 0.0f)
        sample(best);
    else
        grid_best(best, layer_tag(L));
    best = best_found();
    best.id = best.id < V ? best.id : 0; // logits that are not numbers choose nothing
    if (threadIdx.x == 0) {
        const int i = S->index + 1;
        if (blockIdx.x == 0)
            store_relaxed_system(S->args.ring + i - 1, (u64)S->args.launch << 32 | (u32)best.id);
        if (i < S->args.n)
            S->args.token = S->args.tokens ? S->args.tokens[i] : best.id;
        if (best.canceled || i == S->args.n || is_stop(best.id))
            store_flag(&S->done, 1);
        S->index = i;
    }
    consumer_barrier();
    return !load_flag(&S->done);
}

static __device__ __forceinline__ void start(const mk_args &args)
{
    if (threadIdx.x == 0) {
        S->args = args;
        S->hold = S->done = S->canceled = S->filled = S->landed = S->fed = S->index = 0;
        S->end = ~0u;
        for (int i = 0; i < WARPS; i++)
            S->chunk[i] = 0;
        for (int i = 0; i < STAGES; i++)
            gate_init(&S->full[i], &S->free[i]);
        gate_init_done();
        for (int i = 0; i < LANDINGS; i++)
            mbarrier_init(&S->arrived[i], 1);
        fence_mbarrier_init();
    }
    __syncthreads();
    cluster_arrive(); // before others push to what they find here
    cluster_wait();
}

// Run up to args.n tokens from args.token at position args.pos on, feeding each token back; or
// those of args.tokens, when it is given.  No value lives across the call of a stage: each has all
// registers to itself, and nothing is spilled.
extern "C" __global__ void __launch_bounds__(320, 1)
mk_decode(const __grid_constant__ mk_args args)
{
    start(args);
    if (threadIdx.x >= THREADS) {
        if (is_teller())
            tell_landed();
        else if (is_producer())
            produce();
    } else {
        do {
            embed(VEC_ATTN_NORM);
            layers();
        } while (next_token());
    }
}

// ---- Pack: a matrix into the streams -------------------------------------------------

static __device__ __forceinline__ float fp16_value(u16 x)
{
    const u32 magnitude = (u32)(x & 0x7fff) << 13, sign = (u32)(x & 0x8000) << 16;
    const float value = __uint_as_float(magnitude) * 0x1p112f; // exact, subnormals too
    return __uint_as_float(sign | (magnitude < 0x7c00u << 13 ? __float_as_uint(value) : magnitude | 0x7f800000));
}

// A made weight: near normal, 0.02 wide, from a hash of its index.
static __device__ __forceinline__ float made_value(u64 key, u64 index)
{
    u64 z = key + 0x9E3779B97F4A7C15ull * index;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    const int sum = (int)((z & 0xffff) + (z >> 16 & 0xffff) + (z >> 32 & 0xffff) + (z >> 48));
    return __fmul_rn(__fmul_rn((float)(sum - 131070), 1.0f / 37837.0f), 0.02f);
}

// Element INDEX of the matrix, before it is rounded.
static __device__ __forceinline__ float source_value(const mk_pack_args &args, u64 index)
{
    if (!args.src)
        return made_value(args.key, index);
    if (args.dtype == 0)
        return __uint_as_float((u32)((const u16 *)args.src)[index] << 16);
    if (args.dtype == 1)
        return fp16_value(((const u16 *)args.src)[index]);
    return ((const float *)args.src)[index];
}

// What tile TILE has of row ROW; zeros outside the matrix.
static __device__ __forceinline__ uint4 source_piece(const mk_pack_args &args, int row, int tile)
{
    u32 pair[4];
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        const int col = pair_column(tile, i);
        const u64 at = (u64)row * args.cols + col;
        const float a = row < args.rows && col < args.cols ? source_value(args, at) : 0.0f;
        const float b = row < args.rows && col + 1 < args.cols ? source_value(args, at + 1) : 0.0f;
        pair[i] = pack(a, b);
    }
    return make_uint4(pair[0], pair[1], pair[2], pair[3]);
}

// Threads take pieces of 16 bytes in the order in which a unit has them: tile, then row.
template <class P>
static __device__ __forceinline__ void pack_phase(const mk_pack_args &args)
{
    constexpr int PIECES = P::UNITS * 32; // of a block
    const int blocks = (args.rows + 7) / 8;
    #pragma unroll 1
    for (u64 i = blockIdx.x * blockDim.x + threadIdx.x; i < (u64)blocks * PIECES; i += gridDim.x * blockDim.x) {
        const int block = (int)(i / PIECES), piece = (int)(i % PIECES);
        unsigned char *to = args.stream + place(P::rows(args.layer, args.block0 + block * args.block_step),
                                                P::columns(args.layer, piece / 32));
        ((uint4 *)to)[piece % 32] = source_piece(args, block * 8 + piece % 8, piece / 8);
    }
}

// Row-major, from row row0 on.
static __device__ __forceinline__ void pack_plain(const mk_pack_args &args)
{
    half *to = args.plain + (u64)args.row0 * args.cols;
    #pragma unroll 1
    for (u64 i = blockIdx.x * blockDim.x + threadIdx.x; i < (u64)args.rows * args.cols; i += gridDim.x * blockDim.x)
        to[i] = to_half(source_value(args, i));
}

// Any grid and block.
extern "C" __global__ void mk_pack(const __grid_constant__ mk_pack_args args)
{
    if (args.plain)
        pack_plain(args);
    else if (args.phase == 0)
        pack_phase<Qkv>(args);
    else if (args.phase == 1)
        pack_phase<O>(args);
    else if (args.phase == 2)
        pack_phase<Mlp>(args);
    else if (args.phase == 3)
        pack_phase<Down>(args);
    else
        pack_phase<Head>(args);
}

// ---- Prefill: shared memory, scratch, grid barrier -----------------------------------

constexpr int PREFILL_WARPS = 8;
constexpr int PREFILL_THREADS = PREFILL_WARPS * 32;
constexpr int PREFILL_TOKENS = 512; // of a launch at most
constexpr int FEW_TOKENS = 64; // up to here the weight read is the floor: read ahead
constexpr int MOST_STAGES = 8; // of a pipeline of copies
constexpr int WORK_BYTES = 132096 - 1024;

struct Prefill_shared {
    alignas(128) unsigned char work[WORK_BYTES]; // stages of copies, or partial sums
    mk_args args;
};
static_assert(sizeof(Prefill_shared) <= 132096, "the plan's shared memory is too small");

extern __shared__ Prefill_shared G[];

// Scratch, in bytes from its start.  Activations lie in blocks of 8 tokens, like weights in
// blocks of 8 rows: units along the columns, and the same columns in each of their 4 tiles.
constexpr u64 PF_RESID = 0; // float [T][D]: the residual stream
constexpr u64 PF_X = 524288; // norms, in blocks; then q, half [T][H][E]
constexpr u64 PF_Y = PF_X + (u64)PREFILL_TOKENS * 512 * 2; // attention; then MLP products
constexpr u64 PF_QKV = 1572864; // float [T][H + 2 K][E]: before norm and rotation
static_assert(D % 8 == 0 && F % 8 == 0 && H % K == 0 && PREFILL_TOKENS % 8 == 0, "shapes");
static_assert(Qkv::UNITS * 32 <= 512 && O::UNITS * 32 <= 512 && H * E <= 512
              && Down::UNITS * 32 <= 512, "the plan's activations are too narrow");

static __device__ __forceinline__ float *prefill_resid() { return (float *)(G->args.scratch + PF_RESID); }
static __device__ __forceinline__ float *prefill_raw() { return (float *)(G->args.scratch + PF_QKV); }
static __device__ __forceinline__ unsigned char *prefill_x() { return G->args.scratch + PF_X; }
static __device__ __forceinline__ unsigned char *prefill_y() { return G->args.scratch + PF_Y; }

// Where columns COL, which is even, and COL + 1 of token TOKEN lie in activations of UNITS units.
template <int UNITS>
static __device__ __forceinline__ u32 activation_at(u32 token, u32 col)
{
    const u32 tile = token / 8 * (UNITS * 4) + col / 32 * 4 + col % 8 / 2; // see pair_column
    return tile * 128 + token % 8 * 16 + col % 32 / 8 * 4;
}

// All writes of all CTAs before it are seen by all after it.  COUNT: arrivals that it waits for.
static __device__ __noinline__ void grid_barrier(u32 count)
{
    __syncthreads();
    if (threadIdx.x == 0) {
        Watch watch;
        u32 seen;
        add_release(G->args.barrier, 1);
        while ((int)((seen = load_acquire(G->args.barrier)) - count) < 0)
            watch.poll(G->args.fault, AT_GRID, count, seen);
    }
    __syncthreads();
}

// ---- Prefill: embedding and norms, a warp per token ----------------------------------

// What tile TILE of an activation has of a vector of D floats; zeros behind it.
static __device__ __forceinline__ void load_tile(float2 (&pair)[4], const float *from, int tile)
{
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        const int col = pair_column(tile, i);
        pair[i] = make_float2(0.0f, 0.0f);
        if (D % 32 == 0 || col < D)
            pair[i] = *(const float2 *)(from + col);
    }
}

// x = resid / rms * weight.
static __device__ __forceinline__ void prefill_norm_row(int token, const float *weight)
{
    const int lane = threadIdx.x % 32;
    const float *row = prefill_resid() + (u64)token * D;
    float sum = 0.0f;
    #pragma unroll 4
    for (int tile = lane; tile < Qkv::UNITS * 4; tile += 32) {
        float2 r[4];
        load_tile(r, row, tile);
        #pragma unroll
        for (int i = 0; i < 4; i++)
            sum += r[i].x * r[i].x + r[i].y * r[i].y;
    }
    #pragma unroll
    for (int i = 16; i; i /= 2)
        sum += __shfl_xor_sync(~0u, sum, i);
    const float scale = rsqrtf(sum * (1.0f / D) + EPS);
    #pragma unroll 4
    for (int tile = lane; tile < Qkv::UNITS * 4; tile += 32) {
        float2 r[4], w[4];
        u32 x[4];
        load_tile(r, row, tile);
        load_tile(w, weight, tile);
        #pragma unroll
        for (int i = 0; i < 4; i++)
            x[i] = pack(r[i].x * scale * w[i].x, r[i].y * scale * w[i].y);
        *late((uint4 *)(prefill_x() + activation_at<Qkv::UNITS>(token, pair_column(tile, 0))))
            = make_uint4(x[0], x[1], x[2], x[3]);
    }
}

// VEC: where the norm begins in args.vec.
static __device__ __noinline__ void prefill_norm(int vec)
{
    const int warp = threadIdx.x / 32;
    #pragma unroll 1
    for (int token = warp * PREFILL_CTAS + blockIdx.x; token < G->args.n; token += PREFILL_WARPS * PREFILL_CTAS)
        prefill_norm_row(token, G->args.vec + vec);
}

// resid = the embeddings; x = their norms.
static __device__ __noinline__ void prefill_embed()
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    #pragma unroll 1
    for (int token = warp * PREFILL_CTAS + blockIdx.x; token < G->args.n; token += PREFILL_WARPS * PREFILL_CTAS) {
        const int id = G->args.tokens[token];
        float *row = prefill_resid() + (u64)token * D;
        #pragma unroll 4
        for (int tile = lane; tile < Head::UNITS * 4; tile += 32) { // the lane that reads them in the norm
            // row id % 8 of the head's block id / 8
            const uint4 q = *(const uint4 *)(G->args.stream + place(Head::rows(0, id / 8), Head::columns(0, tile / 4))
                                             + tile % 4 * 128 + id % 8 * 16);
            const u32 v[4] = {q.x, q.y, q.z, q.w};
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                const int col = pair_column(tile, i);
                if (D % 32 == 0 || col < D) {
                    *late((float2 *)(row + col)) = make_float2(low(v[i]), high(v[i]));
                }
            }
        }
        prefill_norm_row(token, G->args.vec + VEC_ATTN_NORM);
    }
}

// ---- Prefill: activations x weights --------------------------------------------------

// A CTA makes TOKENS x 8 BLOCKS outputs at once.  WM x WN warps share them out; WK such groups
// each take every WK-th unit of the columns, and their sums are added up in the end.
template <int TOKENS_, int BLOCKS_, int COLS_, int WM_, int WN_, int STAGES_>
struct Tile {
    static constexpr int TOKENS = TOKENS_, BLOCKS = BLOCKS_, COLS = COLS_; // columns of a stage
    static constexpr int WM = WM_, WN = WN_, WK = PREFILL_WARPS / (WM_ * WN_);
    static constexpr int UNITS = COLS / 32, M16 = TOKENS / 16 / WM, N8 = BLOCKS / WN; // of a stage; of a warp
    static constexpr int X_BYTES = TOKENS * COLS * 2, STAGE_BYTES = X_BYTES + BLOCKS * COLS * 16;
    static constexpr int FIT = WORK_BYTES / STAGE_BYTES, STAGES = FIT < STAGES_ ? FIT : STAGES_;
    // Copies of 16 bytes: of a thread, and how many blocks all threads take at a time.
    static constexpr int X_COPIES = TOKENS * COLS / 8 / PREFILL_THREADS;
    static constexpr int W_COPIES = BLOCKS * COLS / PREFILL_THREADS;
    static constexpr int PASS = PREFILL_THREADS / COLS;
    static_assert(X_COPIES * PREFILL_THREADS * 8 == TOKENS * COLS && W_COPIES * PREFILL_THREADS == BLOCKS * COLS
                  && PASS * COLS == PREFILL_THREADS, "copies");
    static_assert(M16 * WM * 16 == TOKENS && N8 * WN == BLOCKS && UNITS % WK == 0 && STAGES >= 2, "tile");
    static_assert(WK == 1 || WK * TOKENS * BLOCKS * 32 <= WORK_BYTES, "partial sums");
};
typedef Tile<128, 128 / 8, 64, 2, 4, 4> Wide;
typedef Tile<64, 8, 64, 2, 2, MOST_STAGES> Middle;

// For at most 16 tokens: tiles so narrow that every CTA has one, as far as stages fit.
template <class P>
struct Narrow_blocks {
    static constexpr int FIT = (WORK_BYTES / 4 / 512 - 16) / 8, MOST = (FIT < 2 ? 2 : FIT > 8 ? 8 : FIT) / P::STEP;
    static constexpr int MINE = (P::BLOCKS / P::STEP + PREFILL_CTAS - 1) / PREFILL_CTAS, ROUNDS = (MINE + MOST - 1) / MOST;
    static constexpr int BLOCKS = (MINE + ROUNDS - 1) / ROUNDS * P::STEP;
};
template <class P> using Narrow = Tile<16, Narrow_blocks<P>::BLOCKS, 256, 1, 1, MOST_STAGES>;

template <class T>
static __device__ __forceinline__ int tile_count(int blocks)
{
    return ((G->args.n + T::TOKENS - 1) / T::TOKENS) * ((blocks + T::BLOCKS - 1) / T::BLOCKS);
}

// What a thread copies of one tile: the same 16 bytes of every PASS-th block, stage after stage.
template <class P, class T>
struct Tile_source {
    const unsigned char *x, *stream;
    Block_place w[T::W_COPIES];
    Unit_place columns; // of the next stage
    int layer, piece, tokens, blocks; // 16 bytes of a block; how far the first is from the end
    u32 to; // of the first stage

    __device__ __forceinline__ Tile_source(const unsigned char *from, int of_layer, int token0, int block0)
    {
        const int first = threadIdx.x / T::COLS;
        layer = of_layer;
        piece = threadIdx.x % T::COLS;
        x = from + (token0 / 8 + first) * P::BLOCK_BYTES + piece * 16;
        stream = G->args.stream + piece % 32 * 16;
        tokens = G->args.n - (token0 + first * 8 + piece % 8);
        blocks = P::BLOCKS - (block0 + first);
        #pragma unroll
        for (int i = 0; i < T::W_COPIES; i++)
            w[i] = P::rows(layer, blocks > i * T::PASS ? block0 + first + i * T::PASS : 0);
        columns = P::columns(layer, piece / 32);
        to = shared_address(G->work) + threadIdx.x * 16;
    }
    // The next chunk; zeros for tokens, blocks and columns that do not exist.
    __device__ __forceinline__ void copy(int stage, int chunk)
    {
        const u32 at = to + stage * T::STAGE_BYTES;
        const int unit = chunk * T::UNITS + piece / 32;
        const bool inside = P::UNITS % T::UNITS == 0 || unit < P::UNITS;
        #pragma unroll
        for (int i = 0; i < T::X_COPIES; i++)
            copy16(at + i * (PREFILL_THREADS * 16), x + i * (T::PASS * P::BLOCK_BYTES) + chunk * (T::COLS * 16),
                   inside && tokens > i * (T::PASS * 8) ? 16 : 0);
        #pragma unroll
        for (int i = 0; i < T::W_COPIES; i++)
            copy16(at + T::X_BYTES + i * (PREFILL_THREADS * 16), stream + place(w[i], columns),
                   inside && blocks > i * T::PASS ? 16 : 0);
        columns.nth += T::UNITS;
        if (columns.nth >= columns.units) // in another group, or split by rows
            columns = P::columns(layer, unit + T::UNITS);
    }
};

// sum += this warp's part of a stage.  LANE_X, LANE_W: what the lane gives ldmatrix.
template <class T>
static __device__ __forceinline__ void multiply_stage(float (&sum)[T::M16][T::N8][4], u32 lane_x, u32 lane_w)
{
    #pragma unroll
    for (int unit = 0; unit < T::UNITS; unit += T::WK) {
        u32 w[T::N8][4];
        #pragma unroll
        for (int j = 0; j < T::N8; j++)
            ldmatrix(w[j], lane_w + j * (T::COLS * 16) + unit * 512);
        #pragma unroll
        for (int step = 0; step < 2; step++) {
            #pragma unroll
            for (int i = 0; i < T::M16; i++) {
                u32 x[4];
                ldmatrix(x, lane_x + i * (T::COLS * 32) + unit * 512 + step * 256);
                #pragma unroll
                for (int j = 0; j < T::N8; j++)
                    mma(sum[i][j], x[0], x[1], x[2], x[3], w[j][step * 2], w[j][step * 2 + 1]);
            }
        }
    }
}

// All columns of one tile: a lane has sum[i][j][0..1] of token lane / 4 of its 16, rows
// lane % 4 * 2 and + 1 of its 8; [2..3] of token + 8.
template <class P, class T>
static __device__ __forceinline__ void multiply_tile(float (&sum)[T::M16][T::N8][4], Tile_source<P, T> &source)
{
    constexpr int CHUNKS = (P::UNITS + T::UNITS - 1) / T::UNITS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int wm = warp % T::WM, wn = warp / T::WM % T::WN, wk = warp / (T::WM * T::WN);
    const u32 lane_x = shared_address(G->work) + (wm * T::M16 * 2 + lane / 8 % 2) * (T::COLS * 16)
                     + wk * 512 + lane / 16 * 128 + lane % 8 * 16;
    const u32 lane_w = shared_address(G->work) + T::X_BYTES + wn * T::N8 * (T::COLS * 16) + wk * 512 + lane * 16;

    #pragma unroll
    for (int i = 0; i < T::M16; i++)
        #pragma unroll
        for (int j = 0; j < T::N8; j++)
            #pragma unroll
            for (int c = 0; c < 4; c++)
                sum[i][j][c] = 0.0f;
    __syncthreads(); // the stages are free
    #pragma unroll
    for (int i = 0; i < T::STAGES - 1; i++) {
        if (i < CHUNKS)
            source.copy(i, i);
        copy_commit();
    }
    int stage = 0, next = T::STAGES - 1; // to multiply; to fill
    #pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        copy_wait<T::STAGES - 2>();
        __syncthreads(); // all threads' copies are here, and stage NEXT is free
        if (chunk + T::STAGES - 1 < CHUNKS)
            source.copy(next, chunk + T::STAGES - 1);
        copy_commit();
        multiply_stage<T>(sum, lane_x + stage * T::STAGE_BYTES, lane_w + stage * T::STAGE_BYTES);
        stage = stage + 1 < T::STAGES ? stage + 1 : 0;
        next = next + 1 < T::STAGES ? next + 1 : 0;
    }
}

// Tiles of x W, dealt to CTAs in turn, for blocks FIRST .. LAST-1 of phase P of LAYER.  WRITE(token, block,
// sums, READ(token, block)) takes the sums of P::STEP blocks as multiply_tile leaves them; TOKEN is
// the lane's.
template <class P, class T, class Read, class Write>
static __device__ __forceinline__ void multiply_tiles(const unsigned char *x, int layer, int first, int last,
                                                      Read read, Write write)
{
    constexpr int PARTS = T::M16 * T::N8, STEP = P::STEP; // of a warp
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp % (T::WM * T::WN);
    const int wm = warp % T::WM, wn = warp / T::WM % T::WN, wk = warp / (T::WM * T::WN);
    const int token_tiles = (G->args.n + T::TOKENS - 1) / T::TOKENS, tiles = tile_count<T>(last - first);
    #pragma unroll 1
    for (int tile = blockIdx.x; tile < tiles; tile += PREFILL_CTAS) {
        const int token0 = tile % token_tiles * T::TOKENS, block0 = first + tile / token_tiles * T::BLOCKS;
        const int token = token0 + wm * (T::M16 * 16) + lane / 4, block = block0 + wn * T::N8;
        Tile_source<P, T> source(x, layer, token0, block0);
        float sum[T::M16][T::N8][4];
        multiply_tile<P, T>(sum, source);
        if (T::WK == 1) {
            #pragma unroll
            for (int i = 0; i < T::M16; i++) {
                float4 before[T::N8]; // all reads before the first write
                #pragma unroll
                for (int j = 0; j < T::N8; j += STEP)
                    before[j] = read(token + i * 16, block + j);
                #pragma unroll
                for (int j = 0; j < T::N8; j += STEP)
                    write(token + i * 16, block + j, &sum[i][j], before[j]);
            }
        } else {
            float4 *part = (float4 *)G->work + lane; // [WK][WM * WN][PARTS][32]
            __syncthreads(); // the stages are free
            #pragma unroll
            for (int i = 0; i < PARTS; i++) {
                const float (&c)[4] = sum[i / T::N8][i % T::N8];
                part[(warp * PARTS + i) * 32] = make_float4(c[0], c[1], c[2], c[3]);
            }
            __syncthreads();
            #pragma unroll 1
            for (int i = wk * STEP; i < PARTS; i += T::WK * STEP) {
                const int part_token = token + i / T::N8 * 16, part_block = block + i % T::N8;
                const float4 before = read(part_token, part_block);
                float total[STEP][4] = {};
                #pragma unroll
                for (int j = 0; j < STEP; j++) {
                    #pragma unroll
                    for (int k = 0; k < T::WK; k++) {
                        const float4 add = part[((k * T::WM * T::WN + group) * PARTS + i + j) * 32];
                        total[j][0] += add.x;
                        total[j][1] += add.y;
                        total[j][2] += add.z;
                        total[j][3] += add.w;
                    }
                }
                write(part_token, part_block, total, before);
            }
        }
    }
}

// With few tokens: bring bytes FROM .. TO-1 of LAYER, in the stream of decode's CTA of this number, as near as L2.
static __device__ __forceinline__ void read_ahead(int layer, const Share &mine, int from, int to)
{
    const unsigned char *at = G->args.stream + blockIdx.x * CTA_BYTES + LAYERS_OFFSET + (u64)layer * mine.layer;
    if (G->args.n <= FEW_TOKENS && blockIdx.x < CTAS)
        for (int i = from + threadIdx.x * 64; i < to; i += PREFILL_THREADS * 64)
            prefetch_l2(at + i);
}

// x W, by the tile that suits the number of tokens.  A round of middle tiles takes 7/20 of the time of a
// round of wide ones.
template <class P, class Read, class Write>
static __device__ __forceinline__ void multiply_rows(const unsigned char *x, int layer, int first, int last,
                                                     Read read, Write write)
{
    const int wide = (tile_count<Wide>(last - first) + PREFILL_CTAS - 1) / PREFILL_CTAS;
    const int middle = (tile_count<Middle>(last - first) + PREFILL_CTAS - 1) / PREFILL_CTAS;
    if (G->args.n <= Narrow<P>::TOKENS)
        multiply_tiles<P, Narrow<P>>(x, layer, first, last, read, write);
    else if (middle * 7 < wide * 20)
        multiply_tiles<P, Middle>(x, layer, first, last, read, write);
    else
        multiply_tiles<P, Wide>(x, layer, first, last, read, write);
}

// resid += y W * SCALE.
template <class P>
static __device__ __forceinline__ void multiply_add(int layer, float scale)
{
    const auto pair = [&](int token, int block) {
        return (float2 *)(prefill_resid() + (u64)token * D + block * 8) + threadIdx.x % 4;
    };
    multiply_rows<P>(prefill_y(), layer, 0, P::BLOCKS, [&](int token, int block) {
        float2 a = make_float2(0.0f, 0.0f), b = a;
        if (block < P::BLOCKS && token < G->args.n)
            a = *pair(token, block);
        if (block < P::BLOCKS && token + 8 < G->args.n)
            b = *pair(token + 8, block);
        return make_float4(a.x, a.y, b.x, b.y);
    }, [&](int token, int block, const float (*sum)[4], float4 before) {
        if (block < P::BLOCKS && token < G->args.n)
            *late(pair(token, block)) = make_float2(before.x + sum[0][0] * scale, before.y + sum[0][1] * scale);
        if (block < P::BLOCKS && token + 8 < G->args.n)
            *late(pair(token + 8, block)) = make_float2(before.z + sum[0][2] * scale, before.w + sum[0][3] * scale);
    });
}

// ---- Prefill: q, k, v ----------------------------------------------------------------

// q, k and v before norm and rotation, from block FIRST on.  BIAS: where it begins in args.vec.
static __device__ __noinline__ void prefill_qkv(int layer, int first, int bias)
{
    const Share mine = share_of(my_group());
    multiply_rows<Qkv>(prefill_x(), layer, first, Qkv::BLOCKS, [&](int, int block) {
        float2 add = make_float2(0.0f, 0.0f);
        return make_float4(add.x, add.y, add.x, add.y);
    }, [&](int token, int block, const float (*sum)[4], float4 add) {
        float2 *to = (float2 *)(prefill_raw() + (u64)token * ((H + 2 * K) * E) + block * 8) + threadIdx.x % 4;
        if (block < Qkv::BLOCKS && token < G->args.n)
            *late(to) = make_float2(sum[0][0] + add.x, sum[0][1] + add.y);
        if (block < Qkv::BLOCKS && token + 8 < G->args.n)
            *late(to + 8 * ((H + 2 * K) * E / 2)) = make_float2(sum[0][2] + add.z, sum[0][3] + add.w);
    });
    read_ahead(layer, mine, mine.o, mine.mlp);
}

// Norm and rotation: heads FIRST .. H-1 of q to x, times log2(e) / sqrt(E); k and v to the cache.
// A warp takes BATCH heads of a token.
static __device__ __noinline__ void prefill_rotate(int layer_vec, u64 layer_cache, int first)
{
    constexpr int BATCH = 4;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float *vec = G->args.vec + layer_vec;
    half *cache = G->args.kv + layer_cache;
    const int batches = (H + 2 * K - first + BATCH - 1) / BATCH, tasks = G->args.n * batches;
    Head_values q_norm, k_norm;
    q_norm.load(vec + VEC_Q_NORM);
    k_norm.load(vec + VEC_K_NORM);
    #pragma unroll 1
    for (int task = warp * PREFILL_CTAS + blockIdx.x; task < tasks; task += PREFILL_WARPS * PREFILL_CTAS) {
        const int token = task / batches, head0 = first + task % batches * BATCH, pos = G->args.pos + token;
        const float *raw = prefill_raw() + (u64)token * ((H + 2 * K) * E);
        Head_values x[BATCH];
        float2 rope[Head_values::PAIRS];
        #pragma unroll
        for (int i = 0; i < BATCH; i++)
            x[i].load(raw + min(head0 + i, H + 2 * K - 1) * E);
        #pragma unroll
        for (int i = 0; i < Head_values::PAIRS; i++)
            rope[i] = ((const float2 *)G->args.rope)[(u64)pos * (E / 2) + lane + i * 32];
        #pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int head = head0 + i;
            if (head >= H + 2 * K)
                break;
            half *to;
            float scale = 1.0f;
            int apart = 8 * 8; // elements from one tile of the row to the next
            if (head < H) {
                x[i].norm(q_norm);
                x[i].rotate(rope);
                to = (half *)prefill_x() + ((u64)token * H + head) * E;
                apart = 8;
                scale = SOFTMAX_SCALE;
            } else if (head < H + K) {
                x[i].norm(k_norm);
                x[i].rotate(rope);
                to = cache + (head - H) * KV_HEAD + kv_at(pos, 0);
            } else {
                to = cache + (head - H - K) * KV_HEAD + kv_at(pos, 0) + KV_VALUE;
            }
            to += lane / 8 * apart + lane % 8;
            #pragma unroll
            for (int j = 0; j < Head_values::PAIRS; j++) {
                *late(to + j * 4 * apart) = to_half(x[i].a[j] * scale);
                *late(to + (j * 4 + E / 16) * apart) = to_half(x[i].b[j] * scale);
            }
        }
    }
}

// ---- Prefill: causal attention over the KV cache -------------------------------------

// A task is a KV head and FLASH_ROWS queries: row r of the head is token r / RATIO, query head
// r % RATIO of its group.  A warp has 16 rows.  Keys and values come in stages of FLASH_POSITIONS.
constexpr int FLASH_ROWS = 128;
constexpr int FLASH_POSITIONS = 64;
constexpr int FLASH_BYTES = FLASH_POSITIONS * E * 2; // keys of a stage; the values follow
constexpr int FLASH_FIT = WORK_BYTES / (FLASH_BYTES * 2), FLASH_STAGES = FLASH_FIT < 4 ? FLASH_FIT : 4;
static_assert(FLASH_ROWS == PREFILL_WARPS * 16 && FLASH_STAGES >= 2, "attention tile");

// Positions FIRST .. FIRST + FLASH_POSITIONS - 1 of a head to a stage, zeros from END on.  Keys and
// values lie there as in a tile of the cache.
static __device__ __forceinline__ void flash_copy(u32 stage, const half *cache, int first, int end)
{
    constexpr int PASS = PREFILL_THREADS / E * 8; // positions at a time
    const int from = first + threadIdx.x / E * 8; // of this thread's block
    const half *piece = cache + threadIdx.x % E * 8;
    const u32 to = stage + threadIdx.x * 16;
    static_assert(FLASH_POSITIONS % PASS == 0, "copies");
    #pragma unroll
    for (int i = 0; i < FLASH_POSITIONS / PASS; i++) {
        const half *key = piece + kv_at(from + i * PASS, 0);
        const int bytes = from + i * PASS + (int)threadIdx.x % 8 < end ? 16 : 0;
        copy16(to + i * (PREFILL_THREADS * 16), key, bytes);
        copy16(to + FLASH_BYTES + i * (PREFILL_THREADS * 16), key + KV_VALUE, bytes);
    }
}

// One warp's 16 queries, and what they have seen.  A lane has rows lane / 4 and + 8.
struct Flash {
    u32 q[E / 16][4];
    float out[E / 8][4];
    float top[2], sum[2]; // sum: of the lane's positions

    // Queries of rows FIRST .. FIRST + 15 of ROWS.
    __device__ __forceinline__ void start(const half *queries, int first, int rows, int head)
    {
        const int lane = threadIdx.x % 32;
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = min(first + lane / 4 + i * 8, rows - 1);
            const u32 *from = (const u32 *)(queries + ((u64)(row / RATIO) * H + head * RATIO + row % RATIO) * E)
                            + lane % 4;
            #pragma unroll
            for (int k = 0; k < E / 16; k++) {
                q[k][i] = from[k * 8];
                q[k][i + 2] = from[k * 8 + 4];
            }
            top[i] = -1e30f;
            sum[i] = 0.0f;
        }
        #pragma unroll
        for (int e = 0; e < E / 8; e++)
            #pragma unroll
            for (int c = 0; c < 4; c++)
                out[e][c] = 0.0f;
    }

    // Attend to the positions of STAGE.  MASK: leave out those beyond LAST, counted from the
    // stage's first position.
    __device__ __forceinline__ void attend(u32 stage, bool mask, const int (&last)[2])
    {
        const int lane = threadIdx.x % 32;
        const u32 values = stage + FLASH_BYTES + lane / 8 % 2 * (E * 16) + lane / 16 * 128 + lane % 8 * 16;
        float s[FLASH_POSITIONS / 8][4];
        #pragma unroll
        for (int j = 0; j < FLASH_POSITIONS / 8; j++) {
            #pragma unroll
            for (int c = 0; c < 4; c++)
                s[j][c] = 0.0f;
            #pragma unroll
            for (int k = 0; k < E / 32; k++) {
                u32 key[4];
                ldmatrix(key, stage + j * (E * 16) + k * 512 + lane * 16);
                mma(s[j], q[k * 2][0], q[k * 2][1], q[k * 2][2], q[k * 2][3], key[0], key[1]);
                mma(s[j], q[k * 2 + 1][0], q[k * 2 + 1][1], q[k * 2 + 1][2], q[k * 2 + 1][3], key[2], key[3]);
            }
        }
        if (mask) {
            #pragma unroll
            for (int j = 0; j < FLASH_POSITIONS / 8; j++)
                #pragma unroll
                for (int c = 0; c < 4; c++)
                    if (j * 8 + lane % 4 * 2 + c % 2 > last[c / 2])
                        s[j][c] = -1e30f;
        }
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            float best = top[i];
            #pragma unroll
            for (int j = 0; j < FLASH_POSITIONS / 8; j++)
                best = fmaxf(best, fmaxf(s[j][i * 2], s[j][i * 2 + 1]));
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
            const float keep = exp2f(top[i] - best);
            top[i] = best;
            sum[i] *= keep;
            #pragma unroll
            for (int e = 0; e < E / 8; e++) {
                out[e][i * 2] *= keep;
                out[e][i * 2 + 1] *= keep;
            }
            #pragma unroll
            for (int j = 0; j < FLASH_POSITIONS / 8; j++) {
                s[j][i * 2] = exp2f(s[j][i * 2] - best);
                s[j][i * 2 + 1] = exp2f(s[j][i * 2 + 1] - best);
                sum[i] += s[j][i * 2] + s[j][i * 2 + 1];
            }
        }
        #pragma unroll
        for (int k = 0; k < FLASH_POSITIONS / 16; k++) {
            const u32 p0 = pack(s[k * 2][0], s[k * 2][1]), p1 = pack(s[k * 2][2], s[k * 2][3]);
            const u32 p2 = pack(s[k * 2 + 1][0], s[k * 2 + 1][1]), p3 = pack(s[k * 2 + 1][2], s[k * 2 + 1][3]);
            #pragma unroll
            for (int e = 0; e < E / 16; e++) {
                u32 value[4];
                ldmatrix_transposed(value, values + k * (E * 32) + e * 256);
                mma(out[e * 2], p0, p1, p2, p3, value[0], value[1]);
                mma(out[e * 2 + 1], p0, p1, p2, p3, value[2], value[3]);
            }
        }
    }

    // Divide, and write the rows that exist: a lane has what one tile of each unit has of a row.
    __device__ __forceinline__ void finish(unsigned char *y, int first, int rows, int head)
    {
        const int lane = threadIdx.x % 32;
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = first + lane / 4 + i * 8;
            sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
            sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
            const float scale = 1.0f / sum[i];
            if (row < rows) {
                const int col = (head * RATIO + row % RATIO) * E + lane % 4 * 2;
                unsigned char *to = y + activation_at<O::UNITS>(row / RATIO, col);
                #pragma unroll
                for (int unit = 0; unit < E / 32; unit++) {
                    u32 pair[4];
                    #pragma unroll
                    for (int j = 0; j < 4; j++)
                        pair[j] = pack(out[unit * 4 + j][i * 2] * scale, out[unit * 4 + j][i * 2 + 1] * scale);
                    *late((uint4 *)(to + unit * 512)) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
                }
            }
        }
    }
};

// y = attention of the queries in x.  The longest tasks go first; every other round is dealt
// backwards, so that all CTAs get about the same.
static __device__ __noinline__ void prefill_attn(u64 layer_cache)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int pos = G->args.pos, end = pos + G->args.n, rows = G->args.n * RATIO;
    const int tiles = (rows + FLASH_ROWS - 1) / FLASH_ROWS;
    const u32 work = shared_address(G->work);
    #pragma unroll 1
    for (int round = 0; round * PREFILL_CTAS < tiles * K; round++) {
        const int task = round * PREFILL_CTAS + (round % 2 ? PREFILL_CTAS - 1 - (int)blockIdx.x : (int)blockIdx.x);
        if (task >= tiles * K)
            continue;
        const int head = task % K, tile0 = (tiles - 1 - task / K) * FLASH_ROWS, first = tile0 + warp * 16;
        const half *cache = G->args.kv + layer_cache + head * KV_HEAD;
        // The last positions that the tile, the warp's first and last row, and the lane's rows see.
        const int tile_last = pos + min(tile0 + FLASH_ROWS - 1, rows - 1) / RATIO;
        const int warp_first = pos + first / RATIO, warp_last = pos + (first + 15) / RATIO;
        const int stages = tile_last / FLASH_POSITIONS + 1;
        Flash flash;
        flash.start((const half *)prefill_x(), first, rows, head);
        __syncthreads(); // the stages are free
        #pragma unroll
        for (int i = 0; i < FLASH_STAGES - 1; i++) {
            if (i < stages)
                flash_copy(work + i * (FLASH_BYTES * 2), cache, i * FLASH_POSITIONS, end);
            copy_commit();
        }
        int now = 0, next = FLASH_STAGES - 1; // to attend to; to fill
        #pragma unroll 1
        for (int i = 0; i < stages; i++) {
            const int from = i * FLASH_POSITIONS, ahead = from + (FLASH_STAGES - 1) * FLASH_POSITIONS;
            copy_wait<FLASH_STAGES - 2>();
            __syncthreads(); // all threads' copies are here, and stage NEXT is free
            if (ahead <= tile_last)
                flash_copy(work + next * (FLASH_BYTES * 2), cache, ahead, end);
            copy_commit();
            if (first < rows && from <= warp_last) {
                const int row = first + lane / 4;
                const int last[2] = {pos + row / RATIO - from, pos + (row + 8) / RATIO - from};
                flash.attend(work + now * (FLASH_BYTES * 2), from + FLASH_POSITIONS - 1 > warp_first, last);
            }
            now = now + 1 < FLASH_STAGES ? now + 1 : 0;
            next = next + 1 < FLASH_STAGES ? next + 1 : 0;
        }
        flash.finish(prefill_y(), first, rows, head);
    }
}

// ---- Prefill: projections and MLP ----------------------------------------------------

static __device__ __noinline__ void prefill_o(int layer)
{
    const Share mine = share_of(my_group());
    multiply_add<O>(layer, 1.0f);
    read_ahead(layer, mine, mine.mlp, mine.down);
}

static __device__ __forceinline__ float silu_product(float gate, float up)
{
    return __fdividef(gate, 1.0f + __expf(-gate)) * up * MLP_SCALE;
}

// y = silu(x W_gate) * (x W_up).  Gate and up blocks come in turn; y is padded with zeros up to
// whole units.
static __device__ __noinline__ void prefill_mlp(int layer)
{
    const Share mine = share_of(my_group());
    multiply_rows<Mlp>(prefill_x(), layer, 0, Down::UNITS * 8, [](int, int) {
        return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }, [&](int token, int block, const float (*sum)[4], float4) {
        u32 product[2];
        #pragma unroll
        for (int i = 0; i < 2; i++)
            product[i] = pack(silu_product(sum[0][i * 2], sum[1][i * 2]),
                              silu_product(sum[0][i * 2 + 1], sum[1][i * 2 + 1]));
        unsigned char *to = prefill_y() + activation_at<Down::UNITS>(token, block * 4 + threadIdx.x % 4 * 2);
        if (block < Down::UNITS * 8 && token < G->args.n)
            *late((u32 *)to) = product[0];
        if (block < Down::UNITS * 8 && token + 8 < G->args.n)
            *late((u32 *)(to + Down::UNITS * 512)) = product[1]; // in the next block of tokens
    });
    read_ahead(layer, mine, mine.down, mine.layer);
}

static __device__ __noinline__ void prefill_down(int layer)
{
    const Share mine = share_of(my_group());
    multiply_add<Down>(layer, 1.0f / MLP_SCALE);
    read_ahead(layer + 1, mine, 0, mine.o); // q, k, v
}

// ---- Prefill: the kernel -------------------------------------------------------------

// Run args.tokens[0 .. args.n-1] at positions args.pos on, for their keys and values.  The last
// layer needs neither queries nor what follows them.
static __device__ __forceinline__ void prefill()
{
    const Share mine = share_of(my_group());
    u32 count = 0;

    read_ahead(0, mine, 0, mine.o);
    prefill_embed();
    grid_barrier(count += PREFILL_CTAS);

    // layer 00
    prefill_qkv(0, 0, 640);
    grid_barrier(count += PREFILL_CTAS);
    prefill_rotate(0, 0, 0);
    grid_barrier(count += PREFILL_CTAS);
    prefill_attn(0);
    grid_barrier(count += PREFILL_CTAS);
    prefill_o(0);
    grid_barrier(count += PREFILL_CTAS);
    prefill_norm(256);
    grid_barrier(count += PREFILL_CTAS);
    prefill_mlp(0);
    grid_barrier(count += PREFILL_CTAS);
    prefill_down(0);
    grid_barrier(count += PREFILL_CTAS);
    prefill_norm(640);
    grid_barrier(count += PREFILL_CTAS);

    // layer 01
    prefill_qkv(1, 0, 1280);
    grid_barrier(count += PREFILL_CTAS);
    prefill_rotate(640, 131072, 0);
    grid_barrier(count += PREFILL_CTAS);
    prefill_attn(131072);
    grid_barrier(count += PREFILL_CTAS);
    prefill_o(1);
    grid_barrier(count += PREFILL_CTAS);
    prefill_norm(896);
    grid_barrier(count += PREFILL_CTAS);
    prefill_mlp(1);
    grid_barrier(count += PREFILL_CTAS);
    prefill_down(1);
    grid_barrier(count += PREFILL_CTAS);
    prefill_norm(1280);
    grid_barrier(count += PREFILL_CTAS);

    // layer 02
    prefill_qkv(2, H * E / 8, 1920);
    grid_barrier(count += PREFILL_CTAS);
    prefill_rotate(1280, 262144, H);
}

extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 1) mk_prefill(const __grid_constant__ mk_args args)
{
    if (threadIdx.x == 0)
        G->args = args;
    __syncthreads();
    prefill();
}
