t_section({|Attention over the KV cache, split over CTAs|})

// Work space of one task, in S->scratch.
struct Attention {
    alignas(16) float q[HEAD_GROUP][E]; // normed, rotated, times log2(e) / sqrt(E)
    alignas(16) half key[E], value[E]; // of this position
    alignas(16) float out[WARPS][HEAD_GROUP][E]; // of each warp's positions
    float max[WARPS][HEAD_GROUP], sum[WARPS][HEAD_GROUP];
};
static_assert(sizeof(Attention) <= PLAN_SCRATCH_BYTES, "the plan's scratch is too small");

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
t_if(MODEL_QK_NORM, {|    Head_values q_norm, k_norm;
    q_norm.load(vec + VEC_Q_NORM);
    k_norm.load(vec + VEC_K_NORM);
|})m4_dnl

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
t_if(MODEL_QK_NORM, {|            x.norm(q_norm);
|})m4_dnl
            x.rotate(rope);
            for (int j = 0; j < Head_values::PAIRS; j++) {
                A.q[i][lane + j * 32] = x.a[j] * SOFTMAX_SCALE;
                A.q[i][lane + j * 32 + E / 2] = x.b[j] * SOFTMAX_SCALE;
            }
        } else if (last) {
            half *to = i == HEAD_GROUP ? A.key : A.value;
            if (i == HEAD_GROUP) {
t_if(MODEL_QK_NORM, {|                x.norm(k_norm);
|})m4_dnl
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

