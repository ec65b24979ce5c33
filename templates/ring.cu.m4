t_section({|Ring: a stage is filled, has landed, is released|})

// A stage is used again and again: use u of a stage carries chunk u * STAGES + stage.
t_if(PLAN_FAMILY == 75, {|struct alignas(8) Gate {
    u32 count; // uses landed, or warps that released
    u32 unused;
};

static __device__ __forceinline__ void gate_init(Gate *full, Gate *free) { full->count = free->count = 0; }
static __device__ __forceinline__ void gate_init_done() {}

static __device__ __forceinline__ bool gate_landed(Gate *full, u32 use)
{
    bool landed = (int)(load_volatile(&full->count) - use) > 0;
    __threadfence_block();
    return landed;
}

// All warps have released use - 1.
static __device__ __forceinline__ bool gate_free(Gate *free, u32 use)
{
    bool is_free = (int)(load_volatile(&free->count) - use * WARPS) >= 0;
    __threadfence_block();
    return is_free;
}

static __device__ __forceinline__ void gate_release(Gate *free)
{
    __threadfence_block();
    atomicAdd(&free->count, 1);
}

// The producer warp brings BYTES (a multiple of 512) and opens the gate.
static __device__ __forceinline__ void gate_fill(Gate *full, void *dst, const unsigned char *src, int bytes)
{
    const int lane = threadIdx.x % 32;
    __syncwarp(); // lane 0 saw that the stage is free: now all lanes did
    for (int i = lane * 16; i < bytes; i += 512)
        *(uint4 *)((unsigned char *)dst + i) = *(const uint4 *)(src + i);
    __syncwarp();
    if (lane == 0) {
        __threadfence_block();
        atomicAdd(&full->count, 1);
    }
    __syncwarp();
}|}, {|typedef u64 Gate; // an mbarrier

static __device__ __forceinline__ void gate_init(Gate *full, Gate *free)
{
    mbarrier_init(full, t_if(PLAN_FAMILY >= 90, 1, 32));
    mbarrier_init(free, WARPS);
}

static __device__ __forceinline__ void gate_init_done()
{
    t_if(PLAN_FAMILY >= 90, {|fence_async_proxy();|}, {|__threadfence_block();|})
}

m4_define({|t_wait|}, {|t_if(PLAN_FAMILY >= 90, {|mbarrier_try_wait|}, {|mbarrier_test_wait|})|})m4_dnl
static __device__ __forceinline__ bool gate_landed(Gate *full, u32 use) { return t_wait{||}(full, use & 1); }

// All warps have released use - 1.
static __device__ __forceinline__ bool gate_free(Gate *free, u32 use)
{
    return use == 0 || t_wait{||}(free, (use - 1) & 1);
}

static __device__ __forceinline__ void gate_release(Gate *free) { mbarrier_arrive(free); }

t_if(PLAN_FAMILY >= 90, {|// The producer starts a bulk copy of BYTES (a multiple of 512) that opens the gate.
static __device__ __forceinline__ void gate_fill(Gate *full, void *dst, const unsigned char *src, int bytes)
{
    mbarrier_arrive_expect(full, bytes);
    copy_bulk(dst, src, bytes, full);
}|}, {|// The producer warp starts copies of BYTES (a multiple of 512) that open the gate.
static __device__ __forceinline__ void gate_fill(Gate *full, void *dst, const unsigned char *src, int bytes)
{
    const int lane = threadIdx.x % 32;
    const u32 to = shared_address(dst);
    __syncwarp(); // lane 0 saw that the stage is free: now all lanes did
    for (int i = lane * 16; i < bytes; i += 512)
        copy16(to + i, src + i, 16);
    mbarrier_arrive_copied(full);
    __syncwarp();
}|})|})

