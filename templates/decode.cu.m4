t_section({|Decode: the producer warp|})

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
t_if(PLAN_UNROLL == 0, {|t_for({|LAYER|}, 0, MODEL_L - 1, {|        t_note({|layer t_2d(LAYER)|})
        feed<Qkv>(PLAN_AT(LAYER, QKV));
        feed<O>(PLAN_AT(LAYER, O));
        feed<Mlp>(PLAN_AT(LAYER, MLP));
        feed<Down>(PLAN_AT(LAYER, DOWN));
|})|}, {|        #pragma unroll 1
        for (int layer = 0; layer < L; layer++) {
            feed<Qkv>(layer * LAYER_BYTES + QKV_OFFSET);
            feed<O>(layer * LAYER_BYTES + O_OFFSET);
            feed<Mlp>(layer * LAYER_BYTES + MLP_OFFSET);
            feed<Down>(layer * LAYER_BYTES + DOWN_OFFSET);
        }
|})m4_dnl
        look_for_cancel();
        feed<Head>(HEAD_OFFSET);
    } while (S->filled < S->args.n * token_chunks() && __shfl_sync(~0u, !load_flag(&S->done), 0));
    drain();
}

t_if(PLAN_FAULT == 1, {|// The planted fault: the last CTA never answers, until the watchdog of another ends it all.
static __device__ __noinline__ void planted_hang()
{
    while (blockIdx.x == CTAS - 1 && timer_ns())
        ;
}

|})m4_dnl
t_section({|Decode: one token|})

// All layers for the token whose embedding is in resid and whose norm is in x; x is then
// what the head multiplies.  Numbers: the layer, then offsets into args.vec and args.kv.
static __device__ __forceinline__ void layers()
{
t_if(PLAN_UNROLL == 0, {|t_for({|LAYER|}, 0, MODEL_L - 1, {|
    t_note({|layer t_2d(LAYER)|})
    qkv(LAYER{||}t_if(MODEL_QKV_BIAS, {|, PLAN_VEC_AT(LAYER, BIAS)|}));
    attn(LAYER, PLAN_KV_AT(LAYER), PLAN_VEC_AT(LAYER, START));
    attn_merge(LAYER);
    attn_out(LAYER);
t_if(PLAN_FAULT == 1 && LAYER == 0, {|    planted_hang();
|})m4_dnl
    add_norm(LAYER, HOP_O, AT_O, PLAN_VEC_AT(LAYER, MLP_NORM));
    mlp(LAYER);
    mlp_down(LAYER);
    add_norm(LAYER, HOP_DOWN, AT_DOWN, PLAN_VEC_AT(LAYER, NEXT_NORM));
|})|}, {|    #pragma unroll 1
    for (int layer = 0; layer < L; layer++) {
        qkv(layer{||}t_if(MODEL_QKV_BIAS, {|, layer * VEC_LAYER + VEC_BIAS|}));
        attn(layer, layer * KV_LAYER, layer * VEC_LAYER);
        attn_merge(layer);
        attn_out(layer);
t_if(PLAN_FAULT == 1, {|        planted_hang();
|})m4_dnl
        add_norm(layer, HOP_O, AT_O, layer * VEC_LAYER + VEC_MLP_NORM);
        mlp(layer);
        mlp_down(layer);
        add_norm(layer, HOP_DOWN, AT_DOWN,
                 layer + 1 < L ? (layer + 1) * VEC_LAYER + VEC_ATTN_NORM : VEC_NORM);
    }
|})m4_dnl
}

t_section({|Decode: the kernel|})

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

