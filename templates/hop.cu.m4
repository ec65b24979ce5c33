t_section({|Hops: vectors between CTAs, through L2|})

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

