t_section({|Matrix x vector, from the ring|})

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
constexpr u32 TOKEN_TAGS = PLAN_TOKEN_TAGS;
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

