t_section({|Shared memory of decode|})

struct Shared {
    alignas(128) unsigned char ring[STAGES][STAGE_BYTES];
    // x, the vector that the next phase multiplies: half, see store_x.  Attention: its work space.
    alignas(16) unsigned char scratch[PLAN_SCRATCH_BYTES];
    alignas(16) float resid[D]; // residual stream, the same in every CTA
    float part[2][ROUND * 8][WARPS]; // dot products of one round, a column per warp
    float sum[WARPS]; // block_sum
    Word best[WARPS];
    u32 hist[16][5]; // sampler: count and mass of a digit, see add_mass
    Gate full[STAGES], free[STAGES];
    mk_args args;
    u32 hold; // a hop is awaited: keep fewer chunks in flight
    u32 done; // the consumers have left
    u32 canceled; // the host's word, in CTA 0
    u32 filled, landed; // producer: chunks before these are on their way, have arrived
    int index; // of the token in this launch
};
static_assert(sizeof(Shared) <= PLAN_SMEM_BYTES, "the plan's shared memory is too small");

t_shared({|Shared|}, {|S|})

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
        if (++polls % 4096 == 0)
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

