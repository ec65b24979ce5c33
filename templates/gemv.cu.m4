t_need({|PLAN_BATCH_PAIRS|}, {|PLAN_BATCH_EARLY|}, {|PLAN_BATCH_SPANS|}, {|PLAN_BATCH_COLUMNS|})m4_dnl
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

// Of two blocks of weights, a chunk each; lanes with lane / 8 odd read the second one.
template <int UNITS>
struct Span_weights : Span<UNITS> {
    Unit unit[Span<UNITS>::MINE];

    // From this lane's CHUNK.
    __device__ __forceinline__ void load(u32 chunk)
    {
        const int lane = threadIdx.x % 32;
        const u32 from = shared_address(S->ring[chunk % STAGES])
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

// This warp's sums of two blocks, to PART[warp][row].
static __device__ __forceinline__ void leave_sums(const float (&sum)[2][4], float *part)
{
    const int lane = threadIdx.x % 32;
    if (lane % 4 == 0) {
        #pragma unroll
        for (int b = 0; b < 2; b++)
            part[threadIdx.x / 32 * (ROUND * 8) + b * 8 + lane / 4] = sum[0][b * 2] + sum[1][b * 2];
    }
}

// Pairs of blocks that are multiplied at once.
constexpr int PAIRS_AT_ONCE = PLAN_BATCH_PAIRS;
// Pairs whose weights are in registers while x is awaited: as much of the ring can be filled meanwhile.
constexpr int PAIRS_EARLY = PLAN_BATCH_EARLY;
// They are read already before the sums that make x are awaited.
constexpr bool EARLY_SUMS = PLAN_EARLY;
// From so many blocks on they are read early; without clusters registers are too few.
constexpr int EARLY_FROM = t_if(PLAN_CLUSTER > 1, {|Rows::SPANS > 1 ? 2 : 1|}, {|1 << 30|});

// Which block of a pair this lane reads.
static __device__ __forceinline__ int my_side() { return threadIdx.x / 8 % 2; }

// Multiply the next N blocks, 2 PAIRS at most, whose columns are one chunk each, by x; the last one stands for those
// that are not there.  When they have been read, READY(x) sees to it that x is there.
template <int PAIRS, class Ready>
static __device__ __forceinline__ u32 multiply_blocks(u32 chunk, int n, Span_x<Rows::UNITS> &x, float *part, Ready ready)
{
    float sum[PAIRS][2][4] = {};
    Span_weights<Rows::UNITS> weights[PAIRS];
    wait_landed(chunk + n);
    #pragma unroll
    for (int p = 0; p < PAIRS; p++)
        weights[p].load(chunk + min(p * 2 + my_side(), n - 1));
    release_chunks(chunk, n);
    ready(x);
    #pragma unroll
    for (int i = 0; i < Span<Rows::UNITS>::MINE; i++)
        #pragma unroll
        for (int p = 0; p < PAIRS; p++)
            weights[p].multiply(sum[p], x, i);
    #pragma unroll
    for (int p = 0; p < PAIRS; p++)
        if (p * 2 < n)
            leave_sums(sum[p], part + p * 16);
    return chunk + n;
}

// SUM += N blocks (1 or 2) side by side, TOGETHER spans of UNITS each of them, by X.  When they have been read, READY()
// sees to it that X is there.
template <int UNITS, int N, int TOGETHER, class Ready>
static __device__ __forceinline__ u32 multiply_spans(float (&sum)[2][4], u32 chunk, const half *x, Ready ready)
{
    float part[TOGETHER][2][4] = {};
    Span_weights<UNITS> weights[TOGETHER];
    Span_x<UNITS> mine[TOGETHER];
    wait_landed(chunk + N * TOGETHER);
    #pragma unroll
    for (int t = 0; t < TOGETHER; t++)
        weights[t].load(chunk + t * N + (N == 2 ? my_side() : 0));
    release_chunks(chunk, N * TOGETHER);
    ready();
    #pragma unroll
    for (int t = 0; t < TOGETHER; t++)
        mine[t].load(x + t * UNITS * 32);
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
template <int N, class Ready>
static __device__ __forceinline__ u32 multiply_long_blocks(u32 chunk, const half *x, float *part, Ready ready)
{
    constexpr int SPAN = Rows::SPAN_UNITS, LAST = Rows::UNITS - (Rows::SPANS - 1) * SPAN; // units
    constexpr int TOGETHER = PLAN_BATCH_SPANS;
    float sum[2][4] = {};
    #pragma unroll 1
    for (int span = 0; span < Rows::SPANS - (TOGETHER == 1); span += TOGETHER)
        chunk = multiply_spans<SPAN, N, TOGETHER>(sum, chunk, x + span * SPAN * 32, ready);
    if (TOGETHER == 1)
        chunk = multiply_spans<LAST, N, 1>(sum, chunk, x + (Rows::SPANS - 1) * SPAN * 32, [] {});
    leave_sums(sum, part);
    return chunk;
}

// Multiply N blocks by x, from chunk CHUNK on; sums go to PART[warp][row].  AWAIT brings x, unless IS_READY says that it
// is there: it always does of fewer than EARLY_FROM blocks.  Returns the next chunk.
template <class Await>
static __device__ __forceinline__ u32 multiply_round(u32 chunk, const half *x, int n, float *part, bool is_ready, Await await)
{
    if (Rows::SPANS > 1) {
        const auto ready = [&] {
            if (EARLY_FROM == 2 && !is_ready)
                await();
            is_ready = true;
        };
        #pragma unroll 1
        for (int i = 0; i + 2 <= n; i += 2)
            chunk = multiply_long_blocks<2>(chunk, x, part + i * 8, ready);
        return n % 2 ? multiply_long_blocks<1>(chunk, x, part + (n - 1) * 8, [] {}) : chunk;
    }
    Span_x<Rows::UNITS> mine;
    const auto nothing = [](Span_x<Rows::UNITS> &) {};
    int i = 0;
    if (EARLY_FROM == 1 && !is_ready) {
        i = min(n, PAIRS_EARLY * 2);
        chunk = multiply_blocks<PAIRS_EARLY>(chunk, i, mine, part, [&](Span_x<Rows::UNITS> &to) {
            await();
            to.load(x);
        });
    } else
        mine.load(x);
    #pragma unroll 1
    for (; PAIRS_AT_ONCE > 1 && i + 2 < n; i += 4)
        chunk = multiply_blocks<PAIRS_AT_ONCE>(chunk, min(n - i, 4), mine, part + i * 8, nothing);
    #pragma unroll 1
    for (; i < n; i += 2)
        chunk = multiply_blocks<1>(chunk, min(n - i, 2), mine, part + i * 8, nothing);
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

