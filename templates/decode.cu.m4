t_section({|Decode: the producer and the teller|})

// Two warps keep the ring full of this CTA's stream, across phases, layers and tokens: the producer brings
// chunks, and one lane, the teller, tells the consumers which have landed.  On sm_90 and later one lane of the
// producer does it all; before, its lanes share the copies, and go by what lane 0 sees.
t_if(PLAN_FAMILY >= 90, {|static __device__ __forceinline__ bool is_producer() { return threadIdx.x == THREADS; }
static __device__ __forceinline__ u32 of_lane0(u32 value) { return value; }
static __device__ __forceinline__ void sync_producer() {}|}, {|static __device__ __forceinline__ bool is_producer() { return threadIdx.x >= THREADS && threadIdx.x < THREADS + 32; }
static __device__ __forceinline__ u32 of_lane0(u32 value) { return __shfl_sync(~0u, value, 0); }
static __device__ __forceinline__ void sync_producer() { __syncwarp(); }|})
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
t_if(PLAN_INFLIGHT_HOP < PLAN_STAGES, {|    if (chunk - load_flag(&S->landed) >= (load_flag(&S->hold) ? INFLIGHT_HOP : most))
        return false;
|})m4_dnl
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

t_if(PLAN_FAULT == 1, {|// The planted fault: the last CTA never answers, until the watchdog of another ends it all.
static __device__ __noinline__ void planted_hang()
{
    while (blockIdx.x == CTAS - 1 && timer_ns())
        ;
}

|})m4_dnl
t_section({|Decode: one token|})

// All layers for the token whose embedding is in resid and whose norm is in x[1]; the head then waits for the last
// one's sums.  Numbers: the layer, then offsets into args.vec and args.kv.
static __device__ __forceinline__ void layers()
{
t_if(PLAN_UNROLL != 1, {|t_for({|LAYER|}, 0, MODEL_L - 1, {|
    t_note({|layer t_2d(LAYER)|})
    rows(QKV_ROWS, LAYER, PLAN_VEC_AT(LAYER, ATTN_NORM), PLAN_VEC_AT(LAYER, BIAS));
    attn(LAYER, PLAN_KV_AT(LAYER), PLAN_VEC_AT(LAYER, START));
    columns(0, LAYER);
t_if(PLAN_FAULT == 1 && LAYER == 0, {|    planted_hang();
|})m4_dnl
    rows(MLP_ROWS, LAYER, PLAN_VEC_AT(LAYER, MLP_NORM), 0);
    columns(1, LAYER);
|})|}, {|    #pragma unroll 1
    for (int layer = 0; layer < L; layer++) {
        rows(QKV_ROWS, layer, layer * VEC_LAYER + VEC_ATTN_NORM, layer * VEC_LAYER + VEC_BIAS);
        attn(layer, layer * KV_LAYER, layer * VEC_LAYER);
        columns(0, layer);
t_if(PLAN_FAULT == 1, {|        planted_hang();
|})m4_dnl
        rows(MLP_ROWS, layer, layer * VEC_LAYER + VEC_MLP_NORM, 0);
        columns(1, layer);
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
    consumer_barrier();t_lap(NEXT)
    return !load_flag(&S->done);
}

static __device__ __forceinline__ void start(const mk_args &args)
{
    if (threadIdx.x == 0) {
        S->args = args;
        S->hold = S->done = S->canceled = S->filled = S->landed = S->fed = S->index = 0;
        S->end = ~0u;
t_if(PLAN_TIMING, {|        for (int i = 0; i < LAPS; i++)
            S->laps[i][0] = S->laps[i][1] = 0;
        S->waited = 0;
        S->lap = clock_cycles();
|})m4_dnl
        for (int i = 0; i < WARPS; i++)
            S->chunk[i] = 0;
        for (int i = 0; i < STAGES; i++)
            gate_init(&S->full[i], &S->free[i]);
        gate_init_done();
t_if(PLAN_CLUSTER > 1, {|        for (int i = 0; i < LANDINGS; i++)
            mbarrier_init(&S->arrived[i], 1);
        fence_mbarrier_init();
|})m4_dnl
    }
t_if(MODEL_D % 32, {|    __syncthreads(); // the fence is behind
    for (int i = D + threadIdx.x; i < X_COLS; i += blockDim.x) // behind the last column
        t_x(0)[i] = t_x(1)[i] = 0;
|})m4_dnl
t_if(MODEL_D % 16, {|    for (int i = threadIdx.x; i < PLAN_RANK_PAIRS * 16; i += blockDim.x) // behind the last row
        S->resid[i] = 0.0f;
|})m4_dnl
    __syncthreads();
t_if(PLAN_CLUSTER > 1, {|    cluster_arrive(); // before others push to what they find here
    cluster_wait();
|})m4_dnl
}

// Run up to args.n tokens from args.token at position args.pos on, feeding each token back; or
// those of args.tokens, when it is given.  No value lives across the call of a stage: each has all
// registers to itself, and nothing is spilled.
extern "C" __global__ void __launch_bounds__(PLAN_BLOCK_THREADS, 1)
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
            embed(VEC_ATTN_NORM);t_lap(EMBED)
            layers();
        } while (next_token());
t_if(PLAN_TIMING, {|        if (threadIdx.x == 0)
            for (int i = 0; i < LAPS * 2; i++)
                S->args.laps[blockIdx.x * LAPS * 2 + i] += S->laps[i / 2][i % 2];
|})m4_dnl
    }
}

