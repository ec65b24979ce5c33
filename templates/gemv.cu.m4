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

static __device__ __forceinline__ void wait_landed(int stage, u32 use)
{
    Watch watch;
    while (!gate_landed(&S->full[stage], use))
        watch.poll(S->args.fault, AT_RING, use, stage);
}

// Multiply the next block of the ring by x.  Each warp takes every WARPS-th unit; lanes 0-3
// write the sums of their 2 rows to PART[row][warp].  Returns the next chunk.
template <class P>
static __device__ __forceinline__ u32 multiply_block(u32 chunk, float (*part)[WARPS])
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float even[4] = {}, odd[4] = {};
    #pragma unroll
    for (int span = 0; span < P::SPANS; span++, chunk++) {
        const int units = min(P::SPAN_UNITS, P::UNITS - span * P::SPAN_UNITS);
        const int stage = chunk % STAGES;
        wait_landed(stage, chunk / STAGES);
        #pragma unroll
        for (int i = 0; i < (P::SPAN_UNITS + WARPS - 1) / WARPS; i++) {
            const int unit = i * WARPS + warp;
            if (unit < units) {
                u32 w[4];
                ldmatrix(w, shared_address(S->ring[stage]) + unit * 512 + lane * 16);
                uint4 x = make_uint4(0, 0, 0, 0);
                if (lane < 4)
                    x = *(const uint4 *)(S->scratch + (span * P::SPAN_UNITS + unit) * 64 + lane * 16);
                mma(even, x.x, 0, x.y, 0, w[0], w[1]);
                mma(odd, x.z, 0, x.w, 0, w[2], w[3]);
            }
        }
        __syncwarp();
        if (lane == 0)
            gate_release(&S->free[stage]);
    }
    if (lane < 4) {
        part[lane * 2][warp] = even[0] + odd[0];
        part[lane * 2 + 1][warp] = even[1] + odd[1];
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
constexpr u32 TOKEN_TAGS = L + 32;
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
        #pragma unroll 1
        for (int i = 0; i < n; i++)
            chunk = multiply_block<P>(chunk, S->part[side] + i * 8);
        consumer_barrier();
        finish(first, n, S->part[side]);
    }
}

// x = the N values of HOP.
template <int N>
static __device__ __forceinline__ void await_x(const Word *hop, u32 tag, u32 stage)
{
    half *x = (half *)S->scratch;
    await_words<N / 8 * 3>(tag, stage, [&](int word) { return hop + word; }, [&](int word, const Word &got) {
        #pragma unroll
        for (int i = 0; i < 3; i++) {
            if (i < word_count(word)) {
                const int e = word_first(word) + i, pair = e / 2;
                x[(pair / 16 * 16 + pair % 4 * 4 + pair % 16 / 4) * 2 + e % 2] = to_half(word_value(got, i));
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

