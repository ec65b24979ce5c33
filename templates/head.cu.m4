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

