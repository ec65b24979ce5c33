t_section({|Hops through L2|})

// A vector travels in blocks of 8 values, 3 words a block: values 0-2, 3-5 and 6-7.
static __device__ __forceinline__ int word_first(int word) { return word / 3 * 8 + word % 3 * 3; }
static __device__ __forceinline__ int word_count(int word) { return word % 3 == 2 ? 2 : 3; }
static __device__ __forceinline__ float word_value(const Word &w, int i) { return __uint_as_float(w.v[i]); }
t_if(PLAN_CLUSTER > 1, {||}, {|// Of a word with one value and zeros: uses all of it.
static __device__ __forceinline__ float word_total(const Word &w) { return word_value(w, 0) + word_value(w, 1) + word_value(w, 2); }
|})m4_dnl

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
constexpr u32 TOKEN_TAGS = PLAN_TOKEN_TAGS;
static __device__ __forceinline__ u32 layer_tag(int layer)
{
    return S->args.epoch + S->index * TOKEN_TAGS + layer;
}

// Buffer of a hop of partial sums.
static __device__ __forceinline__ Word *sums_buffer(int hop, u32 tag)
{
    return S->args.exchange + hop + tag % 2 * (PAIRS * GROUPS * 6);
}

t_section({|Hops inside a group|})

t_if(PLAN_CLUSTER > 1, {|// Store 16 bytes at TO in CTA RANK of the group, where they count for LANDING.
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
}|}, {|// N blocks of values to all ranks: lane L of a warp has value L % 8 of block L / 8 (at most 4), and
// block B of them goes to place PLACE(B) of HOP.
template <class Place>
static __device__ __forceinline__ void give_blocks(Word *hop, u32 tag, int n, float value, Place place)
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

static __device__ __forceinline__ void store_value(float *to, float value) { *to = value; }
static __device__ __forceinline__ void store_value(half *to, float value) { *to = to_half(value); }

constexpr int GROUP_QKV = MOST_HEADS * Qkv::GROUPED; // blocks of a group at most
static __device__ __forceinline__ Word *qkv_hop() { return S->args.exchange + HOP_QKV + my_group() * (GROUP_QKV * 3); }
static __device__ __forceinline__ Word *mlp_hop() { return S->args.exchange + HOP_MLP + my_group() * (MOST_UNITS * 12); }

// TO = the BLOCKS (at most MOST) of HOP.
template <int MOST, class To>
static __device__ __forceinline__ void await_blocks(To *to, const Word *hop, int blocks, u32 tag, u32 stage)
{
    const auto at = [&](int word) { return hop + word; };
    await_words<MOST * 3>(blocks * 3, tag, stage, at, [&](int word, const Word &got) {
        #pragma unroll
        for (int i = 0; i < 3; i++)
            if (i < word_count(word))
                store_value(to + word_first(word) + i, word_value(got, i));
    });
}|})

// The sum of VALUE over the lanes of a warp, in every one of them.
static __device__ __forceinline__ float warp_sum(float value)
{
    #pragma unroll
    for (int i = 16; i; i /= 2)
        value += __shfl_xor_sync(~0u, value, i);
    return value;
}

