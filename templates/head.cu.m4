t_section({|Head and sampler|})

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

t_section({|Stages of matrices that are split by rows|})

enum { QKV_ROWS, MLP_ROWS, HEAD_ROWS };

// Multiply all my blocks of WHAT by x, in rounds, and send what they give.  WEIGHT, BIAS: where x's norm's and the bias
// begin in args.vec.  Returns this thread's best logit.
t_stage Best rows(int what, int layer, int weight, int bias)
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
t_if(MODEL_QKV_BIAS, {|        if (what == QKV_ROWS)
            extra = qkv_bias(bias, first, n);
|})m4_dnl
        chunk = multiply_round(chunk, t_x(which), n, part, is_ready, await);
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
t_if(PLAN_TIMING, {|    lap(what == QKV_ROWS ? LAP_QKV : what == MLP_ROWS ? LAP_MLP : LAP_HEAD);
|})m4_dnl
    return best;
}

t_section({|Matrices that are split by columns: each warp has its own rows|})

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
        attn_merge{||}t_if(PLAN_TEAM > 1, {|<false>|})(layer);
}

// Multiply my rows of O (WHICH 0) or DOWN (1) by what this group has of their columns, and send the sums.  The first
// weights are read before x is awaited.
t_stage void columns(int which, int layer)
{
    constexpr bool EARLY = PLAN_CLUSTER > 1; // elsewhere registers are too few
    constexpr int SPAN = O::SPAN_UNITS > Down::SPAN_UNITS ? O::SPAN_UNITS : Down::SPAN_UNITS;
    constexpr int CHUNKS = PLAN_BATCH_COLUMNS; // at once
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rank = my_rank();
    const int span = which ? Down::SPAN_UNITS : O::SPAN_UNITS;
    const Share mine = share_of(my_group());
    const int units = which ? mine.units : mine.heads * O::HEAD_UNITS;
    const half *x = which ? S->act : S->y;
    const u32 tag = layer_tag(layer);
    bool is_ready = t_if(PLAN_TEAM > 1, {|!which && is_far()|}, false);
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
t_if(PLAN_TIMING, {|    lap(which ? LAP_DOWN : LAP_O);
|})m4_dnl
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

