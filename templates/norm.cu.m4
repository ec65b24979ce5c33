t_section({|Embedding and norms|})

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
t_if(MODEL_TIED, {|        // 8 columns of row token % 8 of the head's block token / 8
        const int block = token / 8;
        const uint4 q = *(const uint4 *)(S->args.stream + block % CTAS * CTA_BYTES + HEAD_OFFSET
                                         + (u64)(block / CTAS) * Head::BLOCK_BYTES
                                         + tile * 128 + token % 8 * 16);|}, {|        const uint4 q = ((const uint4 *)(S->args.embed + (u64)token * D))[tile];|})
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

