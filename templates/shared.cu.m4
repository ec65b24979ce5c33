t_need({|PLAN_RANK_PAIRS|}, {|PLAN_MOST_HEADS|}, {|PLAN_SMEM_BYTES|})m4_dnl
t_section({|Shared memory of decode|})

constexpr int X_COLS = (D + 31) / 32 * 32;
t_if(PLAN_CLUSTER > 1, {|
// Where hops inside the group land, each a layer's; x lands twice, behind O and behind DOWN.
enum { QKV_HERE, PART_HERE, MLP_HERE, X_HERE, LANDINGS = X_HERE + 2 };
|})m4_dnl

struct Shared {
    alignas(128) unsigned char ring[STAGES][STAGE_BYTES];
    // From the group's other CTAs.  x: residual * norm weight, still to be divided by the rms; behind O, and
    // behind DOWN, which others send before all here have done with the first only in a cluster.
    alignas(16) half x[t_if(PLAN_CLUSTER > 1, 2, 1)][X_COLS];
    alignas(16) half act[MOST_UNITS * 32]; // MLP product: the columns of DOWN
    alignas(16) float qkv[MOST_HEADS][RATIO + 2][E];
t_if(PLAN_CLUSTER > 1, {|    alignas(16) float part[GROUP][MOST_HEADS * RATIO][E + 4]; // attention of a rank's positions; its maximum, sum
|})m4_dnl
    alignas(16) float squares[2][GROUP * WARPS][4]; // of the residual, a part of each warp: [0] of the 4
    alignas(16) float unguess[2], factor[2]; // 1 / the factor with which x was sent; what its products lack
    // Attention: normed, rotated queries; this position's key and value; what each warp has found.
    alignas(16) half q[MOST_HEADS * RATIO][E];
    alignas(16) half now[MOST_HEADS][2][E];
    alignas(16) float out[WARPS][RATIO][E];
    float top[WARPS][RATIO], mass[WARPS][RATIO];
    float score[RATIO]; // this position's, of each query
    alignas(16) half y[MOST_HEADS * RATIO * E]; // attention output: the columns of O
    alignas(16) float resid[PLAN_RANK_PAIRS * 16]; // residual stream, the rows of this rank
    float part_sums[2][WARPS][ROUND * 8]; // dot products of one round
    float sum[WARPS]; // block_sum
    Word best[WARPS];
    u32 hist[16][5]; // sampler: count and mass of a digit, see add_mass
    Gate full[STAGES], free[STAGES];
t_if(PLAN_CLUSTER > 1, {|    u64 arrived[LANDINGS]; // mbarriers
|})m4_dnl
    mk_args args;
    u32 hold; // a hop through L2 is awaited: keep fewer chunks in flight
    u32 done; // the consumers have left
    u32 canceled; // the host's word, in CTA 0
    u32 filled, landed; // chunks before these are on their way, have arrived
    u32 end; // the last chunk of the launch is before this, when the producer has brought it
    u32 chunk[WARPS]; // the next one that a warp takes
t_if(PLAN_TIMING, {|    u64 lap, waited; // when the last one ended; for the ring since then
    u64 laps[LAPS][2]; // cycles of each stage; of these for the ring
|})m4_dnl
    int fed, index; // token in this launch: of the producer, of the consumers
};
static_assert(sizeof(Shared) <= PLAN_SMEM_BYTES, "the plan's shared memory is too small");

t_shared({|Shared|}, {|S|})

t_if(PLAN_TIMING, {|// The first consumer's cycles since the last lap are STAGE's.
static __device__ __forceinline__ void lap(int stage)
{
    if (threadIdx.x == 0) {
        const u64 now = clock_cycles();
        S->laps[stage][0] += now - S->lap;
        S->laps[stage][1] += S->waited;
        S->lap = now;
        S->waited = 0;
    }
}

|})m4_dnl
t_section({|Watchdog|})

// Tell the host what CTA blockIdx.x waits for, and stop the GPU's work.
[[noreturn]] static __device__ __noinline__ void stuck(u32 *fault, u32 stage, u32 expected, u32 seen)
{
    while (!claim_system(fault + FAULT_CLAIM)) // another was first: let it finish
        ;
    store_system(fault + FAULT_STAGE, stage);
    store_system(fault + FAULT_CTA, blockIdx.x);
    store_system(fault + FAULT_EXPECTED, expected);
    store_system(fault + FAULT_SEEN, seen);
    store_system(fault + FAULT_CODE, 1);
    trap();
    __builtin_unreachable();
}

// Counts failed polls of one wait, and looks at the clock now and then.
struct Watch {
    u32 polls = 0;
    u64 since = 0;

    __device__ __forceinline__ void poll(u32 *fault, u32 stage, u32 expected, u32 seen)
    {
        if (__builtin_expect(++polls % 4096 == 0, false))
            look(fault, stage, expected, seen);
    }
    __device__ __forceinline__ void look(u32 *fault, u32 stage, u32 expected, u32 seen)
    {
        const u64 now = timer_ns();
        if (!since)
            since = now;
        else if (now - since > WATCHDOG_NS)
            stuck(fault, stage, expected, seen);
    }
};

