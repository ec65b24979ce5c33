// Kernels of toy-smol for sm_89, 24 CTAs.  Written by mkgen 0.1.0; do not edit.
// Cost per token: 3038208 bytes of weights read, 19 hops, 98492 bytes of shared memory.
// Below: shapes, launch arguments, primitives, shared memory, hops, the stages of decode in
// the order in which they run, decode, the pack kernel, and prefill.
//
// A block is 8 rows of a weight matrix; its tiles of 8 rows x 8 columns (128 bytes) follow each
// other along the columns.  A unit is 4 tiles, what one ldmatrix.x4 reads.  Block b belongs
// to CTA b % CTAS.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef u16 half; // the bits of a weight: bf16

// ---- Shapes, from config.json --------------------------------------------------------

constexpr int D = 192; // hidden_size
constexpr int H = 3; // num_attention_heads
constexpr int K = 3; // num_key_value_heads
constexpr int E = 64; // head_dim
constexpr int F = 512; // intermediate_size
constexpr int V = 1000; // vocab_size
constexpr int L = 3; // num_hidden_layers
constexpr float EPS = 9.99999975e-06f; // rms_norm_eps
constexpr int CONTEXT = 512; // positions of the KV cache

// ---- Choices of the plan -------------------------------------------------------------

constexpr int CTAS = 24;
constexpr int WARPS = 7; // that multiply; one more is the producer
constexpr int THREADS = 224; // of the consumer warps
constexpr int STAGES = 11; // of the weight ring
constexpr int STAGE_BYTES = 8192;
constexpr int INFLIGHT = 6; // chunks on their way at most
constexpr int INFLIGHT_HOP = 2; // the same while a hop is awaited
constexpr int ROUND = 8; // blocks between two barriers
constexpr int HEAD_GROUP = 1; // query heads of an attention task
constexpr int GROUPS = 1; // tasks of a KV head and split
constexpr float SOFTMAX_SCALE = 0.180336878f; // log2(e) / sqrt(E): of exp2
constexpr float MLP_SCALE = 1.0f; // of the MLP product, against fp16 overflow
constexpr int KV_AHEAD = 2; // rows of the cache that a lane reads ahead
constexpr int SPLIT_MIN = 128; // positions that are worth another split
constexpr int MAX_SPLITS = 8;
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
typedef Phase<576, 6, 72, 1, 1, 6> Qkv; // q, k and v rows
typedef Phase<192, 6, 24, 1, 1, 6> O; // attention output -> residual
typedef Phase<1024, 6, 128, 2, 1, 6> Mlp; // gate and up, their blocks in turn
typedef Phase<192, 16, 24, 1, 1, 16> Down; // MLP product -> residual
typedef Phase<1000, 6, 125, 1, 1, 6> Head; // logits

// Where a phase begins in a CTA's stream, from the start of its layer.
constexpr int QKV_OFFSET = 0;
constexpr int O_OFFSET = 9216;
constexpr int MLP_OFFSET = 12288;
constexpr int DOWN_OFFSET = 30720;
constexpr u64 LAYER_BYTES = 38912; // of one CTA
constexpr u64 HEAD_OFFSET = 116736; // after the last layer
constexpr u64 CTA_BYTES = 135168; // from one CTA's stream to the next

// Norms and biases, in floats from the layer's start.
constexpr int VEC_ATTN_NORM = 0;
constexpr int VEC_MLP_NORM = 192;
constexpr int VEC_Q_NORM = 384;
constexpr int VEC_K_NORM = 384;
constexpr int VEC_BIAS = 384;
constexpr int VEC_LAYER = 384;
constexpr int VEC_NORM = 1152; // the final norm, from the start

constexpr u64 KV_LAYER = 196608; // elements of a layer's cache
constexpr u64 KV_HEAD = 65536; // of a KV head's: keys, then values
constexpr u64 KV_VALUE = 32768; // from a head's keys to its values

// Hop buffers: first word.
constexpr int HOP_QKV = 0; // q, k, v
constexpr int HOP_PART = 216; // attention of one split, not yet divided
constexpr int HOP_SCALE = 792; // its maximum and sum
constexpr int HOP_ATTN = 816; // attention, done
constexpr int HOP_O = 888;
constexpr int HOP_MLP = 960;
constexpr int HOP_DOWN = 1152;
constexpr int HOP_BEST = 1224; // a candidate of each CTA
constexpr int HOP_COUNT = 1248; // sampler: 2 x [CTAS][16]

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
    half *kv; // KV cache [L][K][2][context][E]
    Word *exchange; // hop buffers
    float *logits; // [V] of every token
    u64 *ring; // host-mapped: launch << 32 | token, one a token
    u32 *fault; // host-mapped: what a stuck kernel waits for
    const u32 *cancel; // host-mapped: not 0 stops after this token
    const int *tokens; // prefill: [n] ids; decode: forced ids or 0
    unsigned char *scratch; // prefill activations
    u32 *barrier; // prefill: grid barrier counter
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
static_assert(OFFSET(mk_args, seed) == 104, "layout");
static_assert(OFFSET(mk_args, logits_stride) == 112, "layout");
static_assert(OFFSET(mk_args, launch) == 120, "layout");
static_assert(OFFSET(mk_args, epoch) == 124, "layout");
static_assert(OFFSET(mk_args, pos) == 128, "layout");
static_assert(OFFSET(mk_args, n) == 132, "layout");
static_assert(OFFSET(mk_args, token) == 136, "layout");
static_assert(OFFSET(mk_args, top_k) == 140, "layout");
static_assert(OFFSET(mk_args, temperature) == 144, "layout");
static_assert(OFFSET(mk_args, top_p) == 148, "layout");
static_assert(OFFSET(mk_args, n_stop) == 152, "layout");
static_assert(OFFSET(mk_args, unused) == 156, "layout");
static_assert(sizeof(mk_args) == 224, "layout");

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
enum { AT_RING = 1, AT_QKV, AT_PART, AT_ATTN, AT_O, AT_MLP, AT_DOWN, AT_BEST, AT_COUNT, AT_GRID };

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

// Single-copy atomic: all of a word or none of it is seen.
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

// *late(p) = v is a plain store that another CTA will read: late, and in any order, until fence_gpu or
// add_release after it.
template <class T>
static __device__ __forceinline__ T *late(T *p) { return p; }

// All earlier writes of this CTA (after a barrier) before all later ones, for every CTA.
static __device__ __forceinline__ void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

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

static __device__ __forceinline__ void prefetch_l2(const void *p)
{
    asm volatile("prefetch.global.L2 [%0];" :: "l"(p));
}

// Barrier of the first THREADS threads; the producer warp takes no part.
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

// Did the phase of PARITY end?
static __device__ __forceinline__ bool mbarrier_test_wait(u64 *b, u32 parity)
{
    u32 passed;
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}" : "=r"(passed) : "r"(shared_address(b)), "r"(parity) : "memory");
    return passed;
}

// The earlier copies of this thread arrive at B when they are here.
static __device__ __forceinline__ void mbarrier_arrive_copied(u64 *b)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" :: "r"(shared_address(b)) : "memory");
}

// ---- Ring: a stage is filled, has landed, is released --------------------------------

// A stage is used again and again: use u of a stage carries chunk u * STAGES + stage.
typedef u64 Gate; // an mbarrier

static __device__ __forceinline__ void gate_init(Gate *full, Gate *free)
{
    mbarrier_init(full, 32);
    mbarrier_init(free, WARPS);
}

static __device__ __forceinline__ void gate_init_done()
{
    __threadfence_block();
}

static __device__ __forceinline__ bool gate_await_landed(Gate *full, u32 use)
{
    return mbarrier_test_wait(full, use & 1);
}

static __device__ __forceinline__ bool gate_landed(Gate *full, u32 use) { return mbarrier_test_wait(full, use & 1); }

// All warps have released use - 1.
static __device__ __forceinline__ bool gate_free(Gate *free, u32 use)
{
    return use == 0 || mbarrier_test_wait(free, (use - 1) & 1);
}

static __device__ __forceinline__ void gate_release(Gate *free) { mbarrier_arrive(free); }

// The producer warp starts copies of BYTES (a multiple of 512) that open the gate.
static __device__ __forceinline__ void gate_fill(Gate *full, void *dst, const unsigned char *src, int bytes)
{
    const int lane = threadIdx.x % 32;
    const u32 to = shared_address(dst);
    __syncwarp(); // lane 0 saw that the stage is free: now all lanes did
    for (int i = lane * 16; i < bytes; i += 512)
        copy16(to + i, src + i, 16);
    mbarrier_arrive_copied(full);
    __syncwarp();
}

// ---- Shared memory of decode ---------------------------------------------------------

struct Shared {
    alignas(128) unsigned char ring[STAGES][STAGE_BYTES];
    // x, the vector that the next phase multiplies: half, see store_x.  Attention: its work space.
    alignas(16) unsigned char scratch[2368];
    alignas(16) float resid[D]; // residual stream, the same in every CTA
    float part[2][ROUND * 8][WARPS]; // dot products of one round, a column per warp
    float sum[WARPS]; // block_sum
    Word best[WARPS];
    u32 hist[16][5]; // sampler: count and mass of a digit, see add_mass
    Gate full[STAGES], free[STAGES];
    mk_args args;
    u32 hold; // a hop is awaited: keep fewer chunks in flight
    u32 done; // the consumers have left
    u32 canceled; // the host's word, in CTA 0
    u32 filled, landed; // producer: chunks before these are on their way, have arrived
    int index; // of the token in this launch
};
static_assert(sizeof(Shared) <= 98492, "the plan's shared memory is too small");

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
        if (++polls % 4096 == 0)
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

// ---- Hops: vectors between CTAs, through L2 ------------------------------------------

// A vector travels in blocks of 8 values, 3 words a block: values 0-2, 3-5 and 6-7.
static __device__ __forceinline__ int word_first(int word) { return word / 3 * 8 + word % 3 * 3; }
static __device__ __forceinline__ int word_count(int word) { return word % 3 == 2 ? 2 : 3; }
static __device__ __forceinline__ float word_value(const Word &w, int i) { return __uint_as_float(w.v[i]); }

// Wait for words 0 .. WORDS-1 of a hop, where word i lies at AT(i), and call USE(i, word):
// each consumer thread for its own share.
template <int WORDS, class At, class Use>
static __device__ __forceinline__ void await_words(u32 tag, u32 stage, At at, Use use)
{
    constexpr int SHARE = (WORDS + THREADS - 1) / THREADS; // of a thread
    constexpr int BATCH = SHARE < 8 ? SHARE : 8; // loads on their way
    if (threadIdx.x == 0)
        store_flag(&S->hold, 1);
    #pragma unroll 1
    for (int first = threadIdx.x; first < WORDS; first += BATCH * THREADS) {
        Word w[BATCH];
        Watch watch;
        for (bool all = false; !all;) { // again and again all of them: one trip when they are there
            #pragma unroll
            for (int i = 0; i < BATCH; i++)
                w[i] = load_word(at(first + i * THREADS < WORDS ? first + i * THREADS : first));
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
            if (first + i * THREADS < WORDS)
                use(first + i * THREADS, w[i]);
    }
    if (threadIdx.x == 0)
        store_flag(&S->hold, 0);
}

// Send N blocks: lane L of a warp has value L % 8 of block L / 8 (at most 4 blocks), and
// block B of them goes to place PLACE(B) of the hop.
template <class Place>
static __device__ __forceinline__ void send_blocks(Word *hop, u32 tag, int n, float value, Place place)
{
    const int lane = threadIdx.x % 32;
    const int block = lane / 3 & 3, word = lane % 3; // of the word that this lane stores
    const int from = block * 8 + word * 3;
    const float v0 = __shfl_sync(~0u, value, from);
    const float v1 = __shfl_sync(~0u, value, from + 1);
    const float v2 = __shfl_sync(~0u, value, from + 2 & 31);
    if (lane < 12 && block < n)
        store_word(hop + place(block) * 3 + word, __float_as_uint(v0), __float_as_uint(v1),
                   __float_as_uint(v2), tag);
}

// The sum of VALUE over all consumer threads, in every one of them.
static __device__ __forceinline__ float block_sum(float value)
{
    #pragma unroll
    for (int i = 16; i; i /= 2)
        value += __shfl_xor_sync(~0u, value, i);
    if (threadIdx.x % 32 == 0)
        S->sum[threadIdx.x / 32] = value;
    consumer_barrier();
    float total = 0.0f;
    #pragma unroll
    for (int i = 0; i < WARPS; i++)
        total += S->sum[i];
    return total;
}

// ---- Matrix x vector, from the ring --------------------------------------------------

// x lies in S->scratch as half pairs, so that lane t < 4 reads its part of a unit's 32 columns,
// columns 2t, 2t+1 of each of the 4 tiles, with one 16-byte load.
static __device__ __forceinline__ void store_x(int pair, u32 value)
{
    ((u32 *)S->scratch)[pair / 16 * 16 + pair % 4 * 4 + pair % 16 / 4] = value;
}

// Zeros behind column COLS, up to the end of its unit.
static __device__ __forceinline__ void pad_x(int cols)
{
    const int pair = cols / 2 + threadIdx.x;
    if (pair < (cols + 31) / 32 * 16)
        store_x(pair, 0);
}

static __device__ __forceinline__ void wait_landed(u32 chunk)
{
    Watch watch;
    while (!gate_await_landed(&S->full[chunk % STAGES], chunk / STAGES))
        watch.poll(S->args.fault, AT_RING, chunk, load_flag(&S->landed));
}

// Multiply the next N blocks of the ring by x.  The left operand of the mma is 16 rows: two
// blocks, or one of them twice; every column of the right one is x, and the first result is
// used.  Each warp takes every WARPS-th unit and writes its sums to PART[row][warp].  Returns
// the next chunk.
template <class P, int N>
static __device__ __forceinline__ u32 multiply_blocks(u32 chunk, float (*part)[WARPS])
{
    static_assert(N == 1 || P::SPANS == 1, "the ring may not hold so many chunks");
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int my_half = N == 2 ? lane / 8 % 2 : 0; // whose rows this lane gives to ldmatrix
    float sum[4][4] = {}; // chains of independent sums
    #pragma unroll
    for (int span = 0; span < P::SPANS; span++, chunk += N) {
        const int units = min(P::SPAN_UNITS, P::UNITS - span * P::SPAN_UNITS);
        const unsigned char *x_at = S->scratch + (span * P::SPAN_UNITS + warp) * 64 + lane % 4 * 16;
        const u32 w_at = shared_address(S->ring[(chunk + my_half) % STAGES])
                       + warp * 512 + lane / 16 * 128 + lane % 8 * 16;
        #pragma unroll
        for (int b = 0; b < N; b++)
            wait_landed(chunk + b);
        #pragma unroll
        for (int i = 0; i < (units + WARPS - 1) / WARPS; i++) {
            if ((i + 1) * WARPS <= units || i * WARPS + warp < units) {
                const uint4 x = *(const uint4 *)(x_at + i * WARPS * 64);
                u32 w[2][4]; // columns 0-15 and 16-31
                ldmatrix(w[0], w_at + i * WARPS * 512);
                ldmatrix(w[1], w_at + i * WARPS * 512 + 256);
                mma(sum[i % 2 * 2], w[0][0], w[0][1], w[0][2], w[0][3], x.x, x.y);
                mma(sum[i % 2 * 2 + 1], w[1][0], w[1][1], w[1][2], w[1][3], x.z, x.w);
            }
        }
        __syncwarp();
        if (lane < N)
            gate_release(&S->free[(chunk + lane) % STAGES]);
    }
    if (lane % 4 == 0) {
        #pragma unroll
        for (int b = 0; b < N; b++)
            part[b * 8 + lane / 4][warp] = (sum[0][b * 2] + sum[1][b * 2])
                                         + (sum[2][b * 2] + sum[3][b * 2]);
    }
    return chunk;
}

// Blocks of phase P that CTA blockIdx.x has.
template <class P>
static __device__ __forceinline__ int my_blocks()
{
    constexpr int DEALT = P::BLOCKS / P::STEP;
    return (DEALT / CTAS + ((int)blockIdx.x < DEALT % CTAS)) * P::STEP;
}

// Which block of the phase my block LOCAL is.
template <class P>
static __device__ __forceinline__ int my_block(int local)
{
    return (local / P::STEP * CTAS + blockIdx.x) * P::STEP + local % P::STEP;
}

// Chunks of this CTA: of phase P, of a layer, of a token.
template <class P>
static __device__ __forceinline__ u32 phase_chunks() { return my_blocks<P>() * P::SPANS; }

static __device__ __forceinline__ u32 layer_chunks()
{
    return phase_chunks<Qkv>() + phase_chunks<O>() + phase_chunks<Mlp>() + phase_chunks<Down>();
}

static __device__ __forceinline__ u32 token_chunks() { return L * layer_chunks() + phase_chunks<Head>(); }

// The first chunk of LAYER of the token at work; LAYER = L: of the head.
static __device__ __forceinline__ u32 layer_chunk(int layer)
{
    return S->index * token_chunks() + layer * layer_chunks();
}

// Tags: TOKEN_TAGS of a token, the layers' and then the sampler's.
constexpr u32 TOKEN_TAGS = 35;
static __device__ __forceinline__ u32 layer_tag(int layer)
{
    return S->args.epoch + S->index * TOKEN_TAGS + layer;
}

static __device__ __forceinline__ float row_total(const float (*part)[WARPS], int row)
{
    float total = 0.0f;
    #pragma unroll
    for (int i = 0; i < WARPS; i++)
        total += part[row][i];
    return total;
}

// Multiply all my blocks of phase P by x, in rounds; after each, FINISH(first block, blocks,
// part) is called by all consumer threads.
template <class P, class Finish>
static __device__ __forceinline__ void multiply(u32 chunk, Finish finish)
{
    consumer_barrier(); // x is there
    const int blocks = my_blocks<P>();
    #pragma unroll 1
    for (int first = 0, side = 0; first < blocks; first += ROUND, side ^= 1) {
        const int n = min(ROUND, blocks - first);
        constexpr int AT_ONCE = P::SPANS == 1 ? 2 : 1;
        int i = 0;
        #pragma unroll 1
        for (; i + AT_ONCE <= n; i += AT_ONCE)
            chunk = multiply_blocks<P, AT_ONCE>(chunk, S->part[side] + i * 8);
        if (i < n)
            chunk = multiply_blocks<P, 1>(chunk, S->part[side] + i * 8);
        consumer_barrier();
        finish(first, n, S->part[side]);
    }
}

// x = the N values of HOP.
template <int N>
static __device__ __forceinline__ void await_x(const Word *hop, u32 tag, u32 stage)
{
    half *x = (half *)S->scratch;
    const auto at = [&](int word) { return hop + word; };
    await_words<N / 8 * 3>(tag, stage, at, [&](int word, const Word &got) {
        #pragma unroll
        for (int i = 0; i < 3; i++) {
            if (i < word_count(word)) {
                const int e = word_first(word) + i, pair = e / 2;
                const int place = pair / 16 * 16 + pair % 4 * 4 + pair % 16 / 4; // as store_x
                x[place * 2 + e % 2] = to_half(word_value(got, i));
            }
        }
    });
    pad_x(N);
}

// Multiply phase P by x and send its rows, times SCALE, to HOP.
template <class P>
static __device__ __forceinline__ void multiply_send(u32 chunk, int hop, u32 tag, float scale = 1.0f)
{
    multiply<P>(chunk, [&](int first, int n, const float (*part)[WARPS]) {
        const int row = threadIdx.x, warp = threadIdx.x / 32;
        if (warp * 4 < n) {
            const float value = row < n * 8 ? row_total(part, row) * scale : 0.0f;
            send_blocks(S->args.exchange + hop, tag, n - warp * 4, value,
                        [&](int b) { return my_block<P>(first + warp * 4 + b); });
        }
    });
}

// ---- Embedding and norms -------------------------------------------------------------

// This thread's share of a vector of D floats, read ahead of its use.
struct Vector {
    static constexpr int PAIRS = (D / 2 + THREADS - 1) / THREADS;
    float2 pair[PAIRS];

    __device__ __forceinline__ void load(const float *from)
    {
        #pragma unroll
        for (int i = 0; i < PAIRS; i++)
            pair[i] = ((const float2 *)from)[min(i * THREADS + (int)threadIdx.x, D / 2 - 1)];
    }
};

// x = resid / rms * weight.  SUM: this thread's part of the sum of squares.
static __device__ __forceinline__ void norm(float sum, const Vector &weight)
{
    const float scale = rsqrtf(block_sum(sum) * (1.0f / D) + EPS);
    #pragma unroll
    for (int i = 0; i < Vector::PAIRS; i++) {
        const int pair = i * THREADS + threadIdx.x;
        if (pair < D / 2) {
            const float2 r = ((const float2 *)S->resid)[pair];
            store_x(pair, pack(r.x * scale * weight.pair[i].x, r.y * scale * weight.pair[i].y));
        }
    }
    pad_x(D);
}

// resid = the embedding of args.token; x = its norm by the weights at args.vec[WEIGHT].
static __device__ __noinline__ void embed(int weight)
{
    const int token = S->args.token;
    float sum = 0.0f;
    #pragma unroll 1
    for (int tile = threadIdx.x; tile < D / 8; tile += THREADS) {
        // 8 columns of row token % 8 of the head's block token / 8
        const int block = token / 8;
        const uint4 q = *(const uint4 *)(S->args.stream + block % CTAS * CTA_BYTES + HEAD_OFFSET
                                         + (u64)(block / CTAS) * Head::BLOCK_BYTES
                                         + tile * 128 + token % 8 * 16);
        const u32 v[4] = {q.x, q.y, q.z, q.w};
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const float a = low(v[i]), b = high(v[i]);
            S->resid[tile * 8 + i * 2] = a;
            S->resid[tile * 8 + i * 2 + 1] = b;
            sum += a * a + b * b;
        }
    }
    Vector w;
    w.load(S->args.vec + weight);
    norm(sum, w);
}

// resid += what hop O or DOWN brings; x = its norm by the weights at args.vec[WEIGHT].
static __device__ __noinline__ void add_norm(int layer, int from, u32 stage, int weight)
{
    const Word *hop = S->args.exchange + from;
    Vector w;
    float sum = 0.0f;
    w.load(S->args.vec + weight);
    const auto at = [&](int word) { return hop + word; };
    await_words<D / 8 * 3>(layer_tag(layer), stage, at, [&](int word, const Word &got) {
        #pragma unroll
        for (int i = 0; i < 3; i++) {
            if (i < word_count(word)) {
                float *r = S->resid + word_first(word) + i;
                *r += word_value(got, i);
                sum += *r * *r;
            }
        }
    });
    norm(sum, w);
}

// ---- q, k, v = x W (+ bias) ----------------------------------------------------------

// Sends the rows [H][E], [K][E], [K][E] to hop QKV.
static __device__ __noinline__ void qkv(int layer)
{
    const u32 tag = layer_tag(layer);
    multiply<Qkv>(layer_chunk(layer), [&](int first, int n, const float (*part)[WARPS]) {
        const int row = threadIdx.x, warp = threadIdx.x / 32;
        if (warp * 4 < n) {
            float value = 0.0f;
            if (row < n * 8) {
                value = row_total(part, row);
            }
            send_blocks(S->args.exchange + HOP_QKV, tag, n - warp * 4, value,
                        [&](int b) { return my_block<Qkv>(first + warp * 4 + b); });
        }
    });
}

// ---- Attention over the KV cache, split over CTAs ------------------------------------

// Work space of one task, in S->scratch.
struct Attention {
    alignas(16) float q[HEAD_GROUP][E]; // normed, rotated, times log2(e) / sqrt(E)
    alignas(16) half key[E], value[E]; // of this position
    alignas(16) float out[WARPS][HEAD_GROUP][E]; // of each warp's positions
    float max[WARPS][HEAD_GROUP], sum[WARPS][HEAD_GROUP];
};
static_assert(sizeof(Attention) <= 2368, "the plan's scratch is too small");

// Splits of a context of N positions.
static __device__ __forceinline__ int split_count(int n)
{
    return min(MAX_SPLITS, (n + SPLIT_MIN - 1) / SPLIT_MIN);
}

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

// Bring this task's rows of hop QKV to the work space, ready for use; the last split also
// adds this position's key and value to the cache.
static __device__ __forceinline__ void attn_load(Attention &A, u32 tag, int head, int q0, int queries,
                                                 half *cache, int pos, bool last, const float *vec)
{
    constexpr int HEAD_WORDS = E / 8 * 3;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float *raw = &A.out[0][0][0]; // [HEAD_GROUP + 2][E]: not in use yet
    float2 rope[Head_values::PAIRS];
    #pragma unroll
    for (int i = 0; i < Head_values::PAIRS; i++)
        rope[i] = ((const float2 *)S->args.rope)[(u64)pos * (E / 2) + lane + i * 32];

    await_words<(HEAD_GROUP + 2) * HEAD_WORDS>(tag, AT_QKV, [&](int word) {
        const int i = word / HEAD_WORDS;
        const int row = i < HEAD_GROUP ? q0 + min(i, queries - 1)
                      : i == HEAD_GROUP ? H + head : H + K + head;
        return S->args.exchange + HOP_QKV + row * HEAD_WORDS + word % HEAD_WORDS;
    }, [&](int word, const Word &got) {
        float *to = raw + word / HEAD_WORDS * E + word_first(word % HEAD_WORDS);
        for (int i = 0; i < word_count(word); i++)
            to[i] = word_value(got, i);
    });
    consumer_barrier();

    #pragma unroll 1
    for (int i = warp; i < HEAD_GROUP + 2; i += WARPS) {
        Head_values x;
        x.load(raw + i * E);
        if (i < HEAD_GROUP) {
            x.rotate(rope);
            for (int j = 0; j < Head_values::PAIRS; j++) {
                A.q[i][lane + j * 32] = x.a[j] * SOFTMAX_SCALE;
                A.q[i][lane + j * 32 + E / 2] = x.b[j] * SOFTMAX_SCALE;
            }
        } else if (last) {
            half *to = i == HEAD_GROUP ? A.key : A.value;
            if (i == HEAD_GROUP) {
                x.rotate(rope);
            }
            half *row = cache + (i == HEAD_GROUP ? 0 : KV_VALUE) + (u64)pos * E;
            for (int j = 0; j < Head_values::PAIRS; j++) {
                const int e = lane + j * 32;
                to[e] = to_half(x.a[j]);
                to[e + E / 2] = to_half(x.b[j]);
                if (q0 % (H / K) == 0) { // one of the GROUPS tasks that share the head
                    *late(&row[e]) = to[e];
                    *late(&row[e + E / 2]) = to[e + E / 2];
                }
            }
        }
    }
    consumer_barrier();
}

// The keys and values that a lane reads at once: 8 dimensions of AHEAD positions.  A group of
// LANES lanes takes a position.
struct Rows {
    static constexpr int LANES = E / 8, AT_ONCE = 32 / LANES; // positions that a warp reads side by side
    static constexpr int AHEAD = KV_AHEAD;
    static constexpr int WARP = AT_ONCE * AHEAD; // positions of a warp
    uint4 key[AHEAD], value[AHEAD];

    static __device__ __forceinline__ int first(int from)
    {
        return from + (int)(threadIdx.x / 32) * WARP;
    }
    static __device__ __forceinline__ int row(int base, int r)
    {
        return base + r * AT_ONCE + (int)(threadIdx.x % 32) / LANES;
    }

    // From the cache, which has no row POS yet; positions from TO on give those before.
    __device__ __forceinline__ void load(const half *cache, int base, int to, int pos)
    {
        const int dim = (int)(threadIdx.x % LANES) * 8;
        #pragma unroll
        for (int r = 0; r < AHEAD; r++) {
            const half *at = cache + (u64)max(min(min(row(base, r), to - 1), pos - 1), 0) * E + dim;
            key[r] = *(const uint4 *)at;
            value[r] = *(const uint4 *)(at + KV_VALUE);
        }
    }
};

// Each warp attends to its share of positions FROM .. TO-1, the first of which are in NEXT, and
// leaves its sums in the work space.
static __device__ __forceinline__ void attn_positions(Attention &A, Rows next, const half *cache,
                                                      int pos, int from, int to)
{
    constexpr int LANES = Rows::LANES, AHEAD = Rows::AHEAD;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int sub = lane / LANES, dim = lane % LANES * 8;
    float q[HEAD_GROUP][8], out[HEAD_GROUP][8] = {}, top[HEAD_GROUP], sum[HEAD_GROUP] = {};
    #pragma unroll
    for (int g = 0; g < HEAD_GROUP; g++) {
        top[g] = -1e30f;
        #pragma unroll
        for (int i = 0; i < 8; i++)
            q[g][i] = A.q[g][dim + i];
    }

    #pragma unroll 1
    for (int base = Rows::first(from); base < to; base += WARPS * Rows::WARP) {
        Rows rows = next;
        next.load(cache, base + WARPS * Rows::WARP, to, pos);
        #pragma unroll
        for (int r = 0; r < AHEAD; r++) {
            if (min(Rows::row(base, r), to - 1) == pos) {
                rows.key[r] = *(const uint4 *)(A.key + dim);
                rows.value[r] = *(const uint4 *)(A.value + dim);
            }
        }
        #pragma unroll
        for (int g = 0; g < HEAD_GROUP; g++) {
            float score[AHEAD], best = top[g];
            #pragma unroll
            for (int r = 0; r < AHEAD; r++) {
                const uint4 key = rows.key[r];
                float s = q[g][0] * low(key.x) + q[g][1] * high(key.x)
                        + q[g][2] * low(key.y) + q[g][3] * high(key.y)
                        + q[g][4] * low(key.z) + q[g][5] * high(key.z)
                        + q[g][6] * low(key.w) + q[g][7] * high(key.w);
                #pragma unroll
                for (int i = LANES / 2; i; i /= 2)
                    s += __shfl_xor_sync(~0u, s, i);
                score[r] = Rows::row(base, r) < to ? s : -1e30f;
                best = fmaxf(best, score[r]);
            }
            const float keep = exp2f(top[g] - best);
            top[g] = best;
            sum[g] *= keep;
            #pragma unroll
            for (int i = 0; i < 8; i++)
                out[g][i] *= keep;
            #pragma unroll
            for (int r = 0; r < AHEAD; r++) {
                const float p = score[r] > -1e30f ? exp2f(score[r] - best) : 0.0f;
                const u32 v[4] = {rows.value[r].x, rows.value[r].y, rows.value[r].z, rows.value[r].w};
                sum[g] += p;
                #pragma unroll
                for (int i = 0; i < 4; i++) {
                    out[g][i * 2] += p * low(v[i]);
                    out[g][i * 2 + 1] += p * high(v[i]);
                }
            }
        }
    }

    #pragma unroll
    for (int g = 0; g < HEAD_GROUP; g++) {
        #pragma unroll
        for (int i = LANES; i < 32; i *= 2) { // over the lane groups
            const float other = __shfl_xor_sync(~0u, top[g], i), best = fmaxf(top[g], other);
            const float mine = exp2f(top[g] - best), theirs = exp2f(other - best);
            sum[g] = sum[g] * mine + __shfl_xor_sync(~0u, sum[g], i) * theirs;
            #pragma unroll
            for (int d = 0; d < 8; d++)
                out[g][d] = out[g][d] * mine + __shfl_xor_sync(~0u, out[g][d], i) * theirs;
            top[g] = best;
        }
        if (sub == 0) {
            *(float4 *)&A.out[warp][g][dim] = make_float4(out[g][0], out[g][1], out[g][2], out[g][3]);
            *(float4 *)&A.out[warp][g][dim + 4] = make_float4(out[g][4], out[g][5], out[g][6], out[g][7]);
        }
        if (lane == 0) {
            A.max[warp][g] = top[g];
            A.sum[warp][g] = sum[g];
        }
    }
}

// Merge the warps' sums and send them: to hop ATTN when there is one split, else to hop PART.
static __device__ __forceinline__ void attn_send(const Attention &A, u32 tag, int q0, int queries,
                                                 int split, int splits)
{
    constexpr int HEAD_WORDS = E / 8 * 3;
    #pragma unroll 1
    for (int i = threadIdx.x; i < queries * HEAD_WORDS; i += THREADS) {
        const int g = i / HEAD_WORDS, word = i % HEAD_WORDS, e = word_first(word);
        const int e2 = min(e + 2, E - 1); // the last word of a block has no third value
        float best = A.max[0][g], sum = 0.0f, out[3] = {};
        #pragma unroll
        for (int w = 1; w < WARPS; w++)
            best = fmaxf(best, A.max[w][g]);
        #pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float scale = exp2f(A.max[w][g] - best);
            sum += A.sum[w][g] * scale;
            out[0] += A.out[w][g][e] * scale;
            out[1] += A.out[w][g][e + 1] * scale;
            out[2] += A.out[w][g][e2] * scale;
        }
        const float scale = splits == 1 ? 1.0f / sum : 1.0f;
        Word *to = S->args.exchange
                 + (splits == 1 ? HOP_ATTN + (q0 + g) * HEAD_WORDS
                                : HOP_PART + (split * H + q0 + g) * HEAD_WORDS);
        store_word(to + word, __float_as_uint(out[0] * scale), __float_as_uint(out[1] * scale),
                   __float_as_uint(out[2] * scale), tag);
        if (splits > 1 && word == 0)
            store_word(S->args.exchange + HOP_SCALE + split * H + q0 + g, __float_as_uint(best),
                       __float_as_uint(sum), 0, tag);
    }
}

// LAYER_CACHE and VEC: where the layer's cache and vectors begin.  Tasks are (KV head, group of
// its query heads, split); CTA c takes tasks c, c + CTAS, ...
static __device__ __noinline__ void attn(int layer, u64 layer_cache, int vec)
{
    Attention &A = *(Attention *)S->scratch;
    const u32 tag = layer_tag(layer);
    const int pos = S->args.pos + S->index;
    const int splits = split_count(pos + 1);
    #pragma unroll 1
    for (int task = blockIdx.x; task < K * GROUPS * splits; task += CTAS) {
        const int head = task % K, group = task / K % GROUPS, split = task / (K * GROUPS);
        const int q0 = head * (H / K) + group * HEAD_GROUP;
        const int queries = min(HEAD_GROUP, (head + 1) * (H / K) - q0);
        const int from = (int)((long long)(pos + 1) * split / splits);
        const int to = (int)((long long)(pos + 1) * (split + 1) / splits);
        half *cache = S->args.kv + layer_cache + head * KV_HEAD;
        Rows rows; // on their way while q is awaited, and the rest to L2
        rows.load(cache, Rows::first(from), to, pos);
        for (int line = from * E / 64 + (int)threadIdx.x; line < min(to, pos) * E / 64; line += THREADS) {
            prefetch_l2(cache + line * 64);
            prefetch_l2(cache + KV_VALUE + line * 64);
        }
        consumer_barrier(); // the work space is free
        attn_load(A, tag, head, q0, queries, cache, pos, split == splits - 1, S->args.vec + vec);
        attn_positions(A, rows, cache, pos, from, to);
        consumer_barrier();
        attn_send(A, tag, q0, queries, split, splits);
    }
}

// Merge the splits: hops PART and SCALE -> hop ATTN.  A warp makes a word, a lane reads every
// 32nd split.
static __device__ __noinline__ void attn_merge(int layer)
{
    const u32 tag = layer_tag(layer);
    constexpr int HEAD_WORDS = E / 8 * 3;
    const int splits = split_count(S->args.pos + S->index + 1), lane = threadIdx.x % 32;
    if (splits == 1)
        return;
    if (threadIdx.x == 0)
        store_flag(&S->hold, 1);
    #pragma unroll 1
    for (int word = blockIdx.x + CTAS * (threadIdx.x / 32); word < H * HEAD_WORDS; word += CTAS * WARPS) {
        float best = -1e30f, sum = 0.0f, out[3] = {};
        #pragma unroll 1
        for (int split = lane; split < splits; split += 32) {
            const Word *part_at = S->args.exchange + HOP_PART + split * H * HEAD_WORDS + word;
            const Word *scale_at = S->args.exchange + HOP_SCALE + split * H + word / HEAD_WORDS;
            Word part = load_word(part_at), scale = load_word(scale_at);
            Watch watch;
            while (part.tag != tag || scale.tag != tag) {
                watch.poll(S->args.fault, AT_PART, tag, part.tag);
                part = load_word(part_at);
                scale = load_word(scale_at);
            }
            const float top = fmaxf(best, word_value(scale, 0));
            const float mine = exp2f(best - top), theirs = exp2f(word_value(scale, 0) - top);
            best = top;
            sum = sum * mine + word_value(scale, 1) * theirs;
            #pragma unroll
            for (int i = 0; i < 3; i++)
                out[i] = out[i] * mine + word_value(part, i) * theirs;
        }
        #pragma unroll
        for (int i = 16; i; i /= 2) {
            const float top = fmaxf(best, __shfl_xor_sync(~0u, best, i));
            const float mine = exp2f(best - top), theirs = exp2f(__shfl_xor_sync(~0u, best, i) - top);
            sum = sum * mine + __shfl_xor_sync(~0u, sum, i) * theirs;
            #pragma unroll
            for (int j = 0; j < 3; j++)
                out[j] = out[j] * mine + __shfl_xor_sync(~0u, out[j], i) * theirs;
            best = top;
        }
        if (lane == 0)
            store_word(S->args.exchange + HOP_ATTN + word, __float_as_uint(out[0] / sum),
                       __float_as_uint(out[1] / sum), __float_as_uint(out[2] / sum), tag);
    }
    if (threadIdx.x == 0)
        store_flag(&S->hold, 0);
}

// x = the attention output; then its projection goes to hop O.
static __device__ __noinline__ void attn_out(int layer)
{
    const u32 tag = layer_tag(layer);
    consumer_barrier(); // x is free
    await_x<H * E>(S->args.exchange + HOP_ATTN, tag, AT_ATTN);
    multiply_send<O>(layer_chunk(layer) + phase_chunks<Qkv>(), HOP_O, tag);
}

// ---- MLP -----------------------------------------------------------------------------

// silu(x W_gate) * (x W_up) goes to hop MLP.  Gate and up blocks come in turn.
static __device__ __noinline__ void mlp(int layer)
{
    const u32 tag = layer_tag(layer);
    const u32 chunk = layer_chunk(layer) + phase_chunks<Qkv>() + phase_chunks<O>();
    multiply<Mlp>(chunk, [&](int first, int n, const float (*part)[WARPS]) {
        const int row = threadIdx.x, warp = threadIdx.x / 32;
        if (warp * 8 < n) {
            float value = 0.0f;
            if (row < n * 4) {
                const float gate = row_total(part, row / 8 * 16 + row % 8);
                const float up = row_total(part, row / 8 * 16 + 8 + row % 8);
                value = gate / (1.0f + __expf(-gate)) * up * MLP_SCALE;
            }
            send_blocks(S->args.exchange + HOP_MLP, tag, n / 2 - warp * 4, value,
                        [&](int b) { return my_block<Mlp>(first + warp * 8 + b * 2) / 2; });
        }
    });
}

// x = the product; then its projection goes to hop DOWN.
static __device__ __noinline__ void mlp_down(int layer)
{
    const u32 tag = layer_tag(layer);
    consumer_barrier(); // x is free
    await_x<F>(S->args.exchange + HOP_MLP, tag, AT_MLP);
    multiply_send<Down>(layer_chunk(layer + 1) - phase_chunks<Down>(), HOP_DOWN, tag,
                        1.0f / MLP_SCALE);
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
        fence_gpu(); // this CTA's cache rows before the word that lets others read them
        store_word(S->args.exchange + HOP_BEST + blockIdx.x, __float_as_uint(best.value), best.id,
                   best.canceled, tag);
    }
    best = {-infinity(), V, 0};
    await_words<CTAS>(tag, AT_BEST, [&](int word) { return S->args.exchange + HOP_BEST + word; },
                      [&](int, const Word &got) {
                          best = better(best, {word_value(got, 0), (int)got.v[1], got.v[2]});
                      });
    block_best(best);
    fence_gpu();
}

static __device__ __forceinline__ float *token_logits()
{
    return S->args.logits + S->index * S->args.logits_stride;
}

// logits = x W; returns this thread's best.  Rows past V are padding.
static __device__ __noinline__ Best head()
{
    float *logits = token_logits();
    Best mine = {-infinity(), V, 0};
    multiply<Head>(layer_chunk(L), [&](int first, int n, const float (*part)[WARPS]) {
        const int id = my_block<Head>(first + threadIdx.x / 8) * 8 + threadIdx.x % 8;
        if (threadIdx.x < n * 8 && id < V) {
            const float value = row_total(part, threadIdx.x);
            logits[id] = value;
            mine = better(mine, {value, id, 0});
        }
    });
    return mine;
}

// USE(id) for every logit of this CTA: each thread for its share.
template <class Use>
static __device__ __forceinline__ void my_logits(Use use)
{
    const int rows = my_blocks<Head>() * 8;
    for (int row = threadIdx.x; row < rows; row += THREADS) {
        const int id = my_block<Head>(row / 8) * 8 + row % 8;
        if (id < V)
            use(id);
    }
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
    await_words<CTAS * 16>(tag, AT_COUNT, at, [&](int word, const Word &got) {
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

// ---- Decode: the producer warp -------------------------------------------------------

// The producer warp keeps the ring full of this CTA's stream, across phases, layers and tokens.
// What it has brought so far is in S->filled and S->landed, which no one else writes.

// Count the chunks that have landed, of those before chunk FILLED.
static __device__ __forceinline__ u32 count_landed(u32 filled)
{
    u32 landed = S->landed;
    while (landed < filled && gate_landed(&S->full[landed % STAGES], landed / STAGES))
        landed++;
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        store_flag(&S->landed, landed); // the watchdog's report reads it
    __syncwarp();
    return __shfl_sync(~0u, landed, 0);
}

// Bring the next BYTES as chunk CHUNK, when its stage is free and few enough chunks are on their
// way.  Returns false when the consumers have left.
static __device__ __forceinline__ bool fill(u32 chunk, const unsigned char *src, int bytes)
{
    const int stage = chunk % STAGES;
    for (;;) { // no watchdog: what holds the consumers up, they report themselves
        const u32 landed = count_landed(chunk);
        const u32 most = load_flag(&S->hold) ? INFLIGHT_HOP : INFLIGHT;
        const bool go = chunk - landed < most && gate_free(&S->free[stage], chunk / STAGES);
        if (__shfl_sync(~0u, load_flag(&S->done), 0))
            return false;
        if (__shfl_sync(~0u, go, 0))
            break;
    }
    gate_fill(&S->full[stage], S->ring[stage], src, bytes);
    return true;
}

// Bring all my blocks of phase P, which lie at byte OFFSET of this CTA's stream.
template <class P>
static __device__ __noinline__ void feed(u64 offset)
{
    const unsigned char *src = S->args.stream + blockIdx.x * CTA_BYTES + offset;
    const int blocks = my_blocks<P>();
    u32 chunk = S->filled;
    bool here = true; // the consumers are
    #pragma unroll 1
    for (int block = 0; block < blocks && here; block++) {
        #pragma unroll 1
        for (int span = 0; span < P::SPANS && here; span++) {
            here = fill(chunk, src + block * P::BLOCK_BYTES + span * P::SPAN_UNITS * 512,
                        min(P::SPAN_UNITS, P::UNITS - span * P::SPAN_UNITS) * 512);
            chunk += here;
        }
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        S->filled = chunk;
    __syncwarp();
}

// The host's word, off the critical path: next_token passes it on.
static __device__ __noinline__ void look_for_cancel()
{
    if (blockIdx.x == 0 && threadIdx.x % 32 == 0)
        store_flag(&S->canceled, load_system(S->args.cancel));
    __syncwarp();
}

// Nothing may arrive after the CTA has gone.
static __device__ __noinline__ void drain()
{
    while (count_landed(S->filled) < S->filled)
        ;
}

static __device__ __forceinline__ void produce()
{
    do {
        // layer 00
        feed<Qkv>(0);
        feed<O>(9216);
        feed<Mlp>(12288);
        feed<Down>(30720);
        // layer 01
        feed<Qkv>(38912);
        feed<O>(48128);
        feed<Mlp>(51200);
        feed<Down>(69632);
        // layer 02
        feed<Qkv>(77824);
        feed<O>(87040);
        feed<Mlp>(90112);
        feed<Down>(108544);
        look_for_cancel();
        feed<Head>(HEAD_OFFSET);
    } while (S->filled < S->args.n * token_chunks() && __shfl_sync(~0u, !load_flag(&S->done), 0));
    drain();
}

// ---- Decode: one token ---------------------------------------------------------------

// All layers for the token whose embedding is in resid and whose norm is in x; x is then
// what the head multiplies.  Numbers: the layer, then offsets into args.vec and args.kv.
static __device__ __forceinline__ void layers()
{

    // layer 00
    qkv(0);
    attn(0, 0, 0);
    attn_merge(0);
    attn_out(0);
    add_norm(0, HOP_O, AT_O, 192);
    mlp(0);
    mlp_down(0);
    add_norm(0, HOP_DOWN, AT_DOWN, 384);

    // layer 01
    qkv(1);
    attn(1, 196608, 384);
    attn_merge(1);
    attn_out(1);
    add_norm(1, HOP_O, AT_O, 576);
    mlp(1);
    mlp_down(1);
    add_norm(1, HOP_DOWN, AT_DOWN, 768);

    // layer 02
    qkv(2);
    attn(2, 393216, 768);
    attn_merge(2);
    attn_out(2);
    add_norm(2, HOP_O, AT_O, 960);
    mlp(2);
    mlp_down(2);
    add_norm(2, HOP_DOWN, AT_DOWN, 1152);
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
    Best best = head();
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
        S->hold = S->done = S->canceled = S->filled = S->landed = S->index = 0;
        for (int i = 0; i < STAGES; i++)
            gate_init(&S->full[i], &S->free[i]);
        gate_init_done();
    }
    __syncthreads();
}

// Run up to args.n tokens from args.token at position args.pos on, feeding each token back; or
// those of args.tokens, when it is given.  No value lives across a call here: the stages have all
// registers to themselves, and nothing is spilled.
extern "C" __global__ void __launch_bounds__(THREADS + 32, 1)
mk_decode(const __grid_constant__ mk_args args)
{
    start(args);
    if (threadIdx.x >= THREADS) {
        produce();
    } else {
        do {
            embed(VEC_ATTN_NORM);
            layers();
        } while (next_token());
    }
}

// ---- Pack: a matrix into the streams -------------------------------------------------

// Where block BLOCK of a phase lies.  PHASE: where the phase begins in the first stream.
template <class P, class Byte>
static __device__ __forceinline__ Byte *block_at(Byte *phase, int block)
{
    const int dealt = block / P::STEP;
    return phase + dealt % CTAS * CTA_BYTES
         + (u64)(dealt / CTAS * P::STEP + block % P::STEP) * P::BLOCK_BYTES;
}

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

// 8 columns of row ROW from column COL on; zeros outside the matrix.
static __device__ __forceinline__ uint4 source_piece(const mk_pack_args &args, int row, int col)
{
    float v[8];
    #pragma unroll
    for (int i = 0; i < 8; i++) {
        v[i] = 0.0f;
        if (row < args.rows && col + i < args.cols)
            v[i] = source_value(args, (u64)row * args.cols + col + i);
    }
    return make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
}

// Threads take pieces of 16 bytes in the order in which a block has them: tile, then row.
template <class P>
static __device__ __forceinline__ void pack_phase(const mk_pack_args &args, u64 offset)
{
    constexpr int PIECES = P::UNITS * 32; // of a block
    const int blocks = (args.rows + 7) / 8;
    #pragma unroll 1
    for (u64 i = blockIdx.x * blockDim.x + threadIdx.x; i < (u64)blocks * PIECES; i += gridDim.x * blockDim.x) {
        const int block = (int)(i / PIECES), piece = (int)(i % PIECES);
        unsigned char *to = block_at<P>(args.stream + offset, args.block0 + block * args.block_step);
        ((uint4 *)to)[piece] = source_piece(args, block * 8 + piece % 8, piece / 8 * 8);
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
    const u64 layer = args.layer * LAYER_BYTES;
    if (args.plain)
        pack_plain(args);
    else if (args.phase == 0)
        pack_phase<Qkv>(args, layer + QKV_OFFSET);
    else if (args.phase == 1)
        pack_phase<O>(args, layer + O_OFFSET);
    else if (args.phase == 2)
        pack_phase<Mlp>(args, layer + MLP_OFFSET);
    else if (args.phase == 3)
        pack_phase<Down>(args, layer + DOWN_OFFSET);
    else
        pack_phase<Head>(args, HEAD_OFFSET);
}

// ---- Prefill: shared memory, scratch, grid barrier -----------------------------------

constexpr int PREFILL_WARPS = 8;
constexpr int PREFILL_THREADS = PREFILL_WARPS * 32;
constexpr int PREFILL_TOKENS = 512; // of a launch at most
constexpr int FEW_TOKENS = 64; // up to here the weight read is the floor: read ahead
constexpr int MOST_STAGES = 8; // of a pipeline of copies
constexpr int WORK_BYTES = 99328 - 1024;

struct Prefill_shared {
    alignas(128) unsigned char work[WORK_BYTES]; // stages of copies, or partial sums
    mk_args args;
};
static_assert(sizeof(Prefill_shared) <= 99328, "the plan's shared memory is too small");

extern __shared__ Prefill_shared G[];

// Scratch, in bytes from its start.  Activations lie in blocks of 8 tokens, like weights in
// blocks of 8 rows: tiles of 8 tokens x 8 columns (128 bytes), along the columns.
constexpr u64 PF_RESID = 0; // float [T][D]: the residual stream
constexpr u64 PF_X = 393216; // norms, in blocks; then q, half [T][H][E]
constexpr u64 PF_Y = PF_X + (u64)PREFILL_TOKENS * 512 * 2; // attention; then MLP products
constexpr u64 PF_QKV = 1441792; // float [T][H + 2 K][E]: before norm and rotation
static_assert(D % 8 == 0 && F % 8 == 0 && H % K == 0 && PREFILL_TOKENS % 8 == 0, "shapes");
static_assert(Qkv::UNITS * 32 <= 512 && O::UNITS * 32 <= 512 && H * E <= 512
              && Down::UNITS * 32 <= 512, "the plan's activations are too narrow");

static __device__ __forceinline__ float *prefill_resid() { return (float *)(G->args.scratch + PF_RESID); }
static __device__ __forceinline__ float *prefill_raw() { return (float *)(G->args.scratch + PF_QKV); }
static __device__ __forceinline__ unsigned char *prefill_x() { return G->args.scratch + PF_X; }
static __device__ __forceinline__ unsigned char *prefill_y() { return G->args.scratch + PF_Y; }

// Where column COL of token TOKEN lies in activations of UNITS units.
template <int UNITS>
static __device__ __forceinline__ u32 activation_at(u32 token, u32 col)
{
    return (token / 8 * (UNITS * 4) + col / 8) * 128 + token % 8 * 16 + col % 8 * 2;
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

// x = resid / rms * weight.
static __device__ __forceinline__ void prefill_norm_row(int token, const float *weight)
{
    const int lane = threadIdx.x % 32;
    const float4 *row = (const float4 *)(prefill_resid() + (u64)token * D);
    float sum = 0.0f;
    #pragma unroll 4
    for (int tile = lane; tile < D / 8; tile += 32) {
        const float4 a = row[tile * 2], b = row[tile * 2 + 1];
        sum += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w + b.x * b.x + b.y * b.y + b.z * b.z + b.w * b.w;
    }
    #pragma unroll
    for (int i = 16; i; i /= 2)
        sum += __shfl_xor_sync(~0u, sum, i);
    const float scale = rsqrtf(sum * (1.0f / D) + EPS);
    #pragma unroll 4
    for (int tile = lane; tile < Qkv::UNITS * 4; tile += 32) {
        uint4 x = make_uint4(0, 0, 0, 0); // behind column D
        if (tile < D / 8) {
            const float4 a = row[tile * 2], b = row[tile * 2 + 1];
            const float4 u = ((const float4 *)weight)[tile * 2], v = ((const float4 *)weight)[tile * 2 + 1];
            x.x = pack(a.x * scale * u.x, a.y * scale * u.y);
            x.y = pack(a.z * scale * u.z, a.w * scale * u.w);
            x.z = pack(b.x * scale * v.x, b.y * scale * v.y);
            x.w = pack(b.z * scale * v.z, b.w * scale * v.w);
        }
        *late((uint4 *)(prefill_x() + activation_at<Qkv::UNITS>(token, tile * 8))) = x;
    }
}

// VEC: where the norm begins in args.vec.
static __device__ __noinline__ void prefill_norm(int vec)
{
    const int warp = threadIdx.x / 32;
    #pragma unroll 1
    for (int token = warp * CTAS + blockIdx.x; token < G->args.n; token += PREFILL_WARPS * CTAS)
        prefill_norm_row(token, G->args.vec + vec);
}

// resid = the embeddings; x = their norms.
static __device__ __noinline__ void prefill_embed()
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    #pragma unroll 1
    for (int token = warp * CTAS + blockIdx.x; token < G->args.n; token += PREFILL_WARPS * CTAS) {
        const int id = G->args.tokens[token];
        float4 *row = (float4 *)(prefill_resid() + (u64)token * D);
        #pragma unroll 4
        for (int tile = lane; tile < D / 8; tile += 32) { // the lane that reads them in the norm
            // 8 columns of row id % 8 of the head's block id / 8
            const uint4 q = *(const uint4 *)(block_at<Head>(G->args.stream + HEAD_OFFSET, id / 8)
                                             + tile * 128 + id % 8 * 16);
            *late(row + tile * 2) = make_float4(low(q.x), high(q.x), low(q.y), high(q.y));
            *late(row + tile * 2 + 1) = make_float4(low(q.z), high(q.z), low(q.w), high(q.w));
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
typedef Tile<128, 128 / 8, 64, 2, 4, 3> Wide;
typedef Tile<64, 8, 64, 2, 2, MOST_STAGES> Middle;

// For at most 16 tokens: tiles so narrow that every CTA has one, as far as stages fit.
template <class P>
struct Narrow_blocks {
    static constexpr int FIT = (WORK_BYTES / 4 / 512 - 16) / 8, MOST = (FIT < 2 ? 2 : FIT > 8 ? 8 : FIT) / P::STEP;
    static constexpr int MINE = (P::BLOCKS / P::STEP + CTAS - 1) / CTAS, ROUNDS = (MINE + MOST - 1) / MOST;
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
    const unsigned char *x, *w[T::W_COPIES];
    int piece, tokens, blocks; // 16 bytes of a block; how far the first is from the end
    u32 to; // of the first stage

    __device__ __forceinline__ Tile_source(const unsigned char *from, const unsigned char *weights,
                                           int token0, int block0)
    {
        const int first = threadIdx.x / T::COLS;
        piece = threadIdx.x % T::COLS;
        x = from + (token0 / 8 + first) * P::BLOCK_BYTES + piece * 16;
        tokens = G->args.n - (token0 + first * 8 + piece % 8);
        blocks = P::BLOCKS - (block0 + first);
        #pragma unroll
        for (int i = 0; i < T::W_COPIES; i++)
            w[i] = block_at<P>(weights, blocks > i * T::PASS ? block0 + first + i * T::PASS : 0) + piece * 16;
        to = shared_address(G->work) + threadIdx.x * 16;
    }
    // Zeros for tokens, blocks and columns that do not exist.
    __device__ __forceinline__ void copy(int stage, int chunk)
    {
        const u32 at = to + stage * T::STAGE_BYTES;
        const int from = chunk * (T::COLS * 16);
        const bool inside = P::UNITS % T::UNITS == 0 || chunk * T::UNITS + piece / 32 < P::UNITS;
        #pragma unroll
        for (int i = 0; i < T::X_COPIES; i++)
            copy16(at + i * (PREFILL_THREADS * 16), x + i * (T::PASS * P::BLOCK_BYTES) + from,
                   inside && tokens > i * (T::PASS * 8) ? 16 : 0);
        #pragma unroll
        for (int i = 0; i < T::W_COPIES; i++)
            copy16(at + T::X_BYTES + i * (PREFILL_THREADS * 16), w[i] + from,
                   inside && blocks > i * T::PASS ? 16 : 0);
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

// Tiles of x W, dealt to CTAs in turn, for blocks FIRST .. LAST-1 of phase P.  WRITE(token, block,
// sums, READ(token, block)) takes the sums of P::STEP blocks as multiply_tile leaves them; TOKEN is
// the lane's.
template <class P, class T, class Read, class Write>
static __device__ __forceinline__ void multiply_tiles(const unsigned char *x, const unsigned char *weights,
                                                      int first, int last, Read read, Write write)
{
    constexpr int PARTS = T::M16 * T::N8, STEP = P::STEP; // of a warp
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp % (T::WM * T::WN);
    const int wm = warp % T::WM, wn = warp / T::WM % T::WN, wk = warp / (T::WM * T::WN);
    const int token_tiles = (G->args.n + T::TOKENS - 1) / T::TOKENS, tiles = tile_count<T>(last - first);
    #pragma unroll 1
    for (int tile = blockIdx.x; tile < tiles; tile += CTAS) {
        const int token0 = tile % token_tiles * T::TOKENS, block0 = first + tile / token_tiles * T::BLOCKS;
        const int token = token0 + wm * (T::M16 * 16) + lane / 4, block = block0 + wn * T::N8;
        Tile_source<P, T> source(x, weights, token0, block0);
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

// With few tokens: bring the next phase, BYTES of this CTA's stream from place AT on, as near as L2.
static __device__ __forceinline__ void read_ahead(u64 at, int bytes)
{
    const unsigned char *from = G->args.stream + blockIdx.x * CTA_BYTES + at;
    if (G->args.n <= FEW_TOKENS)
        for (int i = threadIdx.x * 64; i < bytes; i += PREFILL_THREADS * 64)
            prefetch_l2(from + i);
}

// x W, by the tile that suits the number of tokens; the phase begins at place AT of a stream.  A
// round of middle tiles takes 7/20 of the time of a round of wide ones.
template <class P, class Read, class Write>
static __device__ __forceinline__ void multiply_rows(const unsigned char *x, u64 at, int first, int last,
                                                     Read read, Write write)
{
    const unsigned char *weights = G->args.stream + at;
    const int wide = (tile_count<Wide>(last - first) + CTAS - 1) / CTAS;
    const int middle = (tile_count<Middle>(last - first) + CTAS - 1) / CTAS;
    if (G->args.n <= Narrow<P>::TOKENS)
        multiply_tiles<P, Narrow<P>>(x, weights, first, last, read, write);
    else if (middle * 7 < wide * 20)
        multiply_tiles<P, Middle>(x, weights, first, last, read, write);
    else
        multiply_tiles<P, Wide>(x, weights, first, last, read, write);
}

// resid += y W * SCALE.
template <class P>
static __device__ __forceinline__ void multiply_add(u64 at, float scale)
{
    const auto pair = [&](int token, int block) {
        return (float2 *)(prefill_resid() + (u64)token * D + block * 8) + threadIdx.x % 4;
    };
    multiply_rows<P>(prefill_y(), at, 0, P::BLOCKS, [&](int token, int block) {
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
static __device__ __noinline__ void prefill_qkv(u64 at, int first, int bias)
{
    multiply_rows<Qkv>(prefill_x(), at, first, Qkv::BLOCKS, [&](int, int block) {
        float2 add = make_float2(0.0f, 0.0f);
        return make_float4(add.x, add.y, add.x, add.y);
    }, [&](int token, int block, const float (*sum)[4], float4 add) {
        float2 *to = (float2 *)(prefill_raw() + (u64)token * ((H + 2 * K) * E) + block * 8) + threadIdx.x % 4;
        if (block < Qkv::BLOCKS && token < G->args.n)
            *late(to) = make_float2(sum[0][0] + add.x, sum[0][1] + add.y);
        if (block < Qkv::BLOCKS && token + 8 < G->args.n)
            *late(to + 8 * ((H + 2 * K) * E / 2)) = make_float2(sum[0][2] + add.z, sum[0][3] + add.w);
    });
    read_ahead(at - QKV_OFFSET + O_OFFSET, MLP_OFFSET - O_OFFSET);
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
    #pragma unroll 1
    for (int task = warp * CTAS + blockIdx.x; task < tasks; task += PREFILL_WARPS * CTAS) {
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
            if (head < H) {
                x[i].rotate(rope);
                to = (half *)prefill_x() + ((u64)token * H + head) * E;
                scale = SOFTMAX_SCALE;
            } else if (head < H + K) {
                x[i].rotate(rope);
                to = cache + (head - H) * KV_HEAD + (u64)pos * E;
            } else {
                to = cache + (head - H - K) * KV_HEAD + KV_VALUE + (u64)pos * E;
            }
            #pragma unroll
            for (int j = 0; j < Head_values::PAIRS; j++) {
                *late(to + lane + j * 32) = to_half(x[i].a[j] * scale);
                *late(to + lane + j * 32 + E / 2) = to_half(x[i].b[j] * scale);
            }
        }
    }
}

// ---- Prefill: causal attention over the KV cache -------------------------------------

// A task is a KV head and FLASH_ROWS queries: row r of the head is token r / RATIO, query head
// r % RATIO of its group.  A warp has 16 rows.  Keys and values come in stages of FLASH_POSITIONS.
constexpr int RATIO = H / K; // query heads of a KV head
constexpr int FLASH_ROWS = 128;
constexpr int FLASH_POSITIONS = 64;
constexpr int FLASH_BYTES = FLASH_POSITIONS * E * 2; // keys of a stage; the values follow
constexpr int FLASH_FIT = WORK_BYTES / (FLASH_BYTES * 2), FLASH_STAGES = FLASH_FIT < 4 ? FLASH_FIT : 4;
static_assert(FLASH_ROWS == PREFILL_WARPS * 16 && FLASH_STAGES >= 2, "attention tile");

// Positions FIRST .. FIRST + FLASH_POSITIONS - 1 of a head to a stage, zeros from END on.  The
// 16-byte pieces of a row change places, so that ldmatrix meets no bank twice.
static __device__ __forceinline__ void flash_copy(u32 stage, const half *cache, int first, int end)
{
    constexpr int PIECES = E / 8, PASS = PREFILL_THREADS / PIECES; // rows at a time
    const int piece = threadIdx.x % PIECES, row = threadIdx.x / PIECES;
    const u32 to = stage + row * (E * 2) + (piece ^ row % 8) * 16;
    const half *from = cache + (u64)(first + row) * E + piece * 8;
    #pragma unroll
    for (int i = 0; i < FLASH_POSITIONS / PASS; i++) {
        const int bytes = first + row + i * PASS < end ? 16 : 0;
        copy16(to + i * (PASS * E * 2), from + i * (PASS * E), bytes);
        copy16(to + FLASH_BYTES + i * (PASS * E * 2), from + KV_VALUE + i * (PASS * E), bytes);
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
        float s[FLASH_POSITIONS / 8][4];
        #pragma unroll
        for (int j = 0; j < FLASH_POSITIONS / 8; j++) {
            #pragma unroll
            for (int c = 0; c < 4; c++)
                s[j][c] = 0.0f;
            #pragma unroll
            for (int k = 0; k < E / 32; k++) {
                u32 key[4];
                ldmatrix(key, stage + (j * 8 + lane % 8) * (E * 2) + (k * 4 + lane / 8 ^ lane % 8) * 16);
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
                ldmatrix_transposed(value, stage + FLASH_BYTES + (k * 16 + lane % 16) * (E * 2)
                                           + (e * 2 + lane / 16 ^ lane % 8) * 16);
                mma(out[e * 2], p0, p1, p2, p3, value[0], value[1]);
                mma(out[e * 2 + 1], p0, p1, p2, p3, value[2], value[3]);
            }
        }
    }

    // Divide, and write the rows that exist.
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
                for (int e = 0; e < E / 8; e++)
                    *late((u32 *)(to + e * 128)) = pack(out[e][i * 2] * scale, out[e][i * 2 + 1] * scale);
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
    for (int round = 0; round * CTAS < tiles * K; round++) {
        const int task = round * CTAS + (round % 2 ? CTAS - 1 - (int)blockIdx.x : (int)blockIdx.x);
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

static __device__ __noinline__ void prefill_o(u64 at)
{
    multiply_add<O>(at, 1.0f);
    read_ahead(at - O_OFFSET + MLP_OFFSET, DOWN_OFFSET - MLP_OFFSET);
}

static __device__ __forceinline__ float silu_product(float gate, float up)
{
    return __fdividef(gate, 1.0f + __expf(-gate)) * up * MLP_SCALE;
}

// y = silu(x W_gate) * (x W_up).  Gate and up blocks come in turn; y is padded with zeros up to
// whole units.
static __device__ __noinline__ void prefill_mlp(u64 at)
{
    multiply_rows<Mlp>(prefill_x(), at, 0, Down::UNITS * 8, [](int, int) {
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
    read_ahead(at - MLP_OFFSET + DOWN_OFFSET, (int)LAYER_BYTES - DOWN_OFFSET);
}

static __device__ __noinline__ void prefill_down(u64 at)
{
    multiply_add<Down>(at, 1.0f / MLP_SCALE);
    read_ahead(at - DOWN_OFFSET + LAYER_BYTES, O_OFFSET); // q, k, v of the next layer
}

// ---- Prefill: the kernel -------------------------------------------------------------

// Run args.tokens[0 .. args.n-1] at positions args.pos on, for their keys and values.  The last
// layer needs neither queries nor what follows them.
static __device__ __forceinline__ void prefill()
{
    u32 count = 0;

    read_ahead(QKV_OFFSET, O_OFFSET - QKV_OFFSET);
    prefill_embed();
    grid_barrier(count += CTAS);

    // layer 00
    prefill_qkv(0, 0, 384);
    grid_barrier(count += CTAS);
    prefill_rotate(0, 0, 0);
    grid_barrier(count += CTAS);
    prefill_attn(0);
    grid_barrier(count += CTAS);
    prefill_o(9216);
    grid_barrier(count += CTAS);
    prefill_norm(192);
    grid_barrier(count += CTAS);
    prefill_mlp(12288);
    grid_barrier(count += CTAS);
    prefill_down(30720);
    grid_barrier(count += CTAS);
    prefill_norm(384);
    grid_barrier(count += CTAS);

    // layer 01
    prefill_qkv(38912, 0, 768);
    grid_barrier(count += CTAS);
    prefill_rotate(384, 196608, 0);
    grid_barrier(count += CTAS);
    prefill_attn(196608);
    grid_barrier(count += CTAS);
    prefill_o(48128);
    grid_barrier(count += CTAS);
    prefill_norm(576);
    grid_barrier(count += CTAS);
    prefill_mlp(51200);
    grid_barrier(count += CTAS);
    prefill_down(69632);
    grid_barrier(count += CTAS);
    prefill_norm(768);
    grid_barrier(count += CTAS);

    // layer 02
    prefill_qkv(77824, H * E / 8, 1152);
    grid_barrier(count += CTAS);
    prefill_rotate(768, 393216, H);
}

extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 1) mk_prefill(const __grid_constant__ mk_args args)
{
    if (threadIdx.x == 0)
        G->args = args;
    __syncthreads();
    prefill();
}
