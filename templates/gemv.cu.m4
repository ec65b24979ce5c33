t_section({|Matrix x vector, from the ring|})

// Wait for the chunks before chunk END.
static __device__ __forceinline__ void wait_landed(u32 end)
{
    Watch watch;
t_if(PLAN_TIMING, {|    const u64 begin = clock_cycles();
|})m4_dnl
    for (u32 landed; (int)((landed = read_flag(&S->landed)) - end) < 0;)
        watch.poll(S->args.fault, AT_RING, end, landed);
t_if(PLAN_TIMING, {|    if (threadIdx.x == 0)
        S->waited += clock_cycles() - begin;
|})m4_dnl
}

// This warp has read N chunks.
static __device__ __forceinline__ void release_chunks(u32 chunk, int n)
{
    __syncwarp();
    if ((int)threadIdx.x % 32 < n)
        gate_release(&S->free[(chunk + threadIdx.x % 32) % STAGES]);
}

// Each warp takes every chunk, whether it reads it or not, and goes on from where it was.
static __device__ __forceinline__ u32 my_chunk() { return S->chunk[threadIdx.x / 32]; }
static __device__ __forceinline__ void take_chunks(u32 next)
{
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        S->chunk[threadIdx.x / 32] = next;
    __syncwarp();
}

// Lane t < 4 has the 8 columns of a unit of x from 8 t on: two of each tile.
static __device__ __forceinline__ uint4 load_x(const half *x, int unit)
{
    return *(const uint4 *)(x + unit * 32 + threadIdx.x % 4 * 8);
}

// 16 rows x 32 columns of weights, as the left operand of two mma.
struct Unit {
    u32 w[2][4];

    // The lane reads from address AT on.
    __device__ __forceinline__ void load(u32 at)
    {
        ldmatrix(w[0], at);
        ldmatrix(w[1], at + 256);
    }
    // SUM += the rows times x; every column of the right operand is x, and the first result is used.
    __device__ __forceinline__ void multiply(float (&sum)[2][4], const uint4 &x) const
    {
        mma(sum[0], w[0][0], w[0][1], w[0][2], w[0][3], x.x, x.y);
        mma(sum[1], w[1][0], w[1][1], w[1][2], w[1][3], x.z, x.w);
    }
};

t_section({|Matrices that are split by rows: all warps share a block's columns|})

typedef Head Rows; // q, k, v, the MLP and the head all have D columns
static_assert(Rows::UNITS == Qkv::UNITS && Rows::UNITS == Mlp::UNITS && Rows::SPANS == Qkv::SPANS && Rows::SPANS == Mlp::SPANS, "columns");

// This warp's units, every WARPS-th, of a span of columns that has UNITS.
template <int UNITS>
struct Span {
    static constexpr int MINE = (UNITS + WARPS - 1) / WARPS;
    static __device__ __forceinline__ bool has(int i) { return (i + 1) * WARPS <= UNITS || i * WARPS + (int)threadIdx.x / 32 < UNITS; }
};

// Of x.
template <int UNITS>
struct Span_x : Span<UNITS> {
    uint4 unit[Span<UNITS>::MINE];

    __device__ __forceinline__ void load(const half *x)
    {
        #pragma unroll
        for (int i = 0; i < Span<UNITS>::MINE; i++)
            unit[i] = load_x(x, min(i * WARPS + (int)threadIdx.x / 32, UNITS - 1));
    }
};

// Of two blocks of weights, in chunks CHUNK and CHUNK + 1; with HALF of one, taken twice.
template <int UNITS>
struct Span_weights : Span<UNITS> {
    Unit unit[Span<UNITS>::MINE];

    template <bool HALF>
    __device__ __forceinline__ void load(u32 chunk)
    {
        const int lane = threadIdx.x % 32;
        const u32 from = shared_address(S->ring[(chunk + (HALF ? 0 : lane / 8 % 2)) % STAGES])
                         + threadIdx.x / 32 * 512 + lane / 16 * 128 + lane % 8 * 16;
        #pragma unroll
        for (int i = 0; i < Span<UNITS>::MINE; i++) // a warp that has no unit i reads its last one again
            unit[i].load(from + (this->has(i) ? i : max(i - 1, 0)) * WARPS * 512);
    }
    // SUM += these by X, unit I.
    __device__ __forceinline__ void multiply(float (&sum)[2][4], const Span_x<UNITS> &x, int i) const
    {
        if (this->has(i))
            unit[i].multiply(sum, x.unit[i]);
    }
};

// This warp's sums of a pair, to PART[warp][row].
template <int BLOCKS>
static __device__ __forceinline__ void leave_sums(const float (&sum)[2][4], float *part)
{
    const int lane = threadIdx.x % 32;
    if (lane % 4 == 0) {
        #pragma unroll
        for (int b = 0; b < BLOCKS; b++)
            part[threadIdx.x / 32 * (ROUND * 8) + b * 8 + lane / 4] = sum[0][b * 2] + sum[1][b * 2];
    }
}

// Multiply the next N blocks, whose columns are one chunk each, by x.  When they have been read, READY(x) sees to it
// that x is there.
template <int N, class Ready>
static __device__ __forceinline__ u32 multiply_blocks(u32 chunk, Span_x<Rows::UNITS> &x, float *part, Ready ready)
{
    constexpr int PAIRS_AT_ONCE = (N + 1) / 2;
    float sum[PAIRS_AT_ONCE][2][4] = {};
    Span_weights<Rows::UNITS> weights[PAIRS_AT_ONCE];
    wait_landed(chunk + N);
    #pragma unroll
    for (int p = 0; p < PAIRS_AT_ONCE; p++)
        weights[p].template load<N == 1>(chunk + p * 2);
    release_chunks(chunk, N);
    ready(x);
    #pragma unroll
    for (int i = 0; i < Span<Rows::UNITS>::MINE; i++)
        #pragma unroll
        for (int p = 0; p < PAIRS_AT_ONCE; p++)
            weights[p].multiply(sum[p], x, i);
    #pragma unroll
    for (int p = 0; p < PAIRS_AT_ONCE; p++)
        leave_sums<N == 1 ? 1 : 2>(sum[p], part + p * 16);
    return chunk + N;
}

// SUM += N blocks (1 or 2) side by side, TOGETHER spans of UNITS each of them, by X.
template <int UNITS, int N, int TOGETHER>
static __device__ __forceinline__ u32 multiply_spans(float (&sum)[2][4], u32 chunk, const half *x)
{
    float part[TOGETHER][2][4] = {};
    Span_weights<UNITS> weights[TOGETHER];
    Span_x<UNITS> mine[TOGETHER];
    wait_landed(chunk + N * TOGETHER);
    #pragma unroll
    for (int t = 0; t < TOGETHER; t++) {
        weights[t].template load<N == 1>(chunk + t * N);
        mine[t].load(x + t * UNITS * 32);
    }
    release_chunks(chunk, N * TOGETHER);
    #pragma unroll
    for (int i = 0; i < Span<UNITS>::MINE; i++)
        #pragma unroll
        for (int t = 0; t < TOGETHER; t++)
            weights[t].multiply(part[t], mine[t], i);
    #pragma unroll
    for (int i = 0; i < 8; i++)
        #pragma unroll
        for (int t = 0; t < TOGETHER; t++)
            sum[i / 4][i % 4] += part[t][i / 4][i % 4];
    return chunk + N * TOGETHER;
}

// Multiply the next N blocks (1 or 2), whose columns are several chunks, side by side, by x.
template <int N>
static __device__ __forceinline__ u32 multiply_long_blocks(u32 chunk, const half *x, float *part)
{
    constexpr int SPAN = Rows::SPAN_UNITS, LAST = Rows::UNITS - (Rows::SPANS - 1) * SPAN; // units
    constexpr int TOGETHER = t_if(PLAN_CLUSTER > 1, {|STAGES >= 8 && Rows::SPANS % 2 == 0 && LAST == SPAN ? 2 : 1|}, 1);
    float sum[2][4] = {};
    #pragma unroll 1
    for (int span = 0; span < Rows::SPANS - (TOGETHER == 1); span += TOGETHER)
        chunk = multiply_spans<SPAN, N, TOGETHER>(sum, chunk, x + span * SPAN * 32);
    if (TOGETHER == 1)
        chunk = multiply_spans<LAST, N, 1>(sum, chunk, x + (Rows::SPANS - 1) * SPAN * 32);
    leave_sums<N>(sum, part);
    return chunk;
}

// Multiply N blocks by x, from chunk CHUNK on; sums go to PART[warp][row].  The first weights are read before AWAIT
// brings x, unless IS_READY says that it is there.  Returns the next chunk.
template <class Await>
static __device__ __forceinline__ u32 multiply_round(u32 chunk, const half *x, int n, float *part, bool is_ready, Await await)
{
    constexpr bool EARLY = t_if(PLAN_CLUSTER > 1, {|STAGES >= 8 && Rows::SPANS == 1|}, false);
    if (!is_ready && (!EARLY || n < 4)) {
        await();
        is_ready = true;
    }
    if (Rows::SPANS > 1) {
        #pragma unroll 1
        for (int i = 0; i + 2 <= n; i += 2)
            chunk = multiply_long_blocks<2>(chunk, x, part + i * 8);
        return n % 2 ? multiply_long_blocks<1>(chunk, x, part + (n - 1) * 8) : chunk;
    }
    Span_x<Rows::UNITS> mine;
    const auto nothing = [](Span_x<Rows::UNITS> &) {};
    int i = 0;
    if (is_ready)
        mine.load(x);
    #pragma unroll 1
    for (; STAGES >= 8 && i + 4 <= n; i += 4)
        chunk = multiply_blocks<4>(chunk, mine, part + i * 8, [&](Span_x<Rows::UNITS> &to) {
            if (!EARLY || is_ready)
                return;
            await();
            to.load(x);
            is_ready = true;
        });
    #pragma unroll 1
    for (; i + 2 <= n; i += 2)
        chunk = multiply_blocks<2>(chunk, mine, part + i * 8, nothing);
    if (i < n)
        chunk = multiply_blocks<1>(chunk, mine, part + i * 8, nothing);
    return chunk;
}

static __device__ __forceinline__ float row_total(const float *part, int row)
{
    float total = 0.0f;
    #pragma unroll
    for (int i = 0; i < WARPS; i++)
        total += part[i * (ROUND * 8) + row];
    return total;
}

