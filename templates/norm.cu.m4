t_section({|Embedding and norms|})

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
t_if(MODEL_TIED, {|    // in the head's stream: row token % 8 of its block token / 8
    const unsigned char *row = S->args.stream + place(Head::rows(0, token / 8), Head::columns(0, col / 32))
                             + token % 8 * 16;
    const u32 pair = *(const u32 *)(row + col % 8 / 2 * 128 + col % 32 / 8 * 4);|}, {|    const u32 pair = *(const u32 *)(S->args.embed + (u64)token * D + col);|})
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
            *(u32 *)(t_x(1) + col) = pack(e[i].x * scale * w[i].x, e[i].y * scale * w[i].y);
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

t_if(PLAN_CLUSTER > 1, {||}, {|// Hop X of this group, behind O or behind DOWN: D rows, then the sums of squares.
constexpr int X_WORDS = PAIRS * 6 + GROUP * WARPS;
static __device__ __forceinline__ Word *x_hop(int which)
{
    return S->args.exchange + HOP_X + (which * GROUPS + my_group()) * X_WORDS;
}

|})m4_dnl
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
t_if(PLAN_CLUSTER > 1, {|        give_halves(S->x[which], X_HERE + which, 2, r * w * guess, at);|}, {|        give_blocks(x_hop(which), tag, 2, r * w * guess, at);|})
    }
    hold(0);t_if(PLAN_TIMING, {| lap(which ? LAP_DOWN_SUMS : LAP_O_SUMS);|})
    #pragma unroll
    for (int i = 8; i; i /= 2)
        squares += __shfl_xor_sync(~0u, squares, i); // lanes 0 .. 15 have some
t_if(PLAN_CLUSTER > 1, {|    if (lane < GROUP)
        give(S->squares[which][rank * WARPS + warp], X_HERE + which, lane, __float_as_uint(squares), 0, 0, 0);|}, {|    if (lane == 0)
        store_word(x_hop(which) + PAIRS * 6 + rank * WARPS + warp, __float_as_uint(squares), 0, 0, tag);|})
}

// x[WHICH] of all ranks, of LAYER.
static __device__ __forceinline__ void await_x(int which, int layer)
{
t_if(PLAN_CLUSTER > 1, {|    await_landing(X_HERE + which, PAIRS * 32 + GROUP * WARPS * 16, layer, AT_X);|}, {|    const Word *hop = x_hop(which), *parts = hop + PAIRS * 6;
    const u32 tag = layer_tag(layer);
    consumer_barrier(); // x and its squares are free
    await_words<GROUP * WARPS>(GROUP * WARPS, tag, AT_X, [&](int word) { return parts + word; },
                               [&](int word, const Word &got) { S->squares[which][word][0] = word_total(got); });
    await_blocks<PAIRS * 2>(t_x(which), hop, D / 8, tag, AT_X);
    consumer_barrier();|})
t_if(PLAN_TIMING, {|    lap(which ? LAP_DOWN_X : LAP_O_X);
|})m4_dnl
}

