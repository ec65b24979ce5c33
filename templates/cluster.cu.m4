t_need({|PLAN_CLUSTER|}, {|PLAN_FAMILY|}, {|PLAN_HOST|}, {|PLAN_FP16|}, {|GPU_ARCH|})m4_dnl
t_if(PLAN_CLUSTER > 1 && PLAN_FAMILY >= 90 && !PLAN_HOST, {|t_section({|Primitives of clusters: CTAs that reach each other's shared memory|})

// Barrier of all threads of the cluster, in two halves: writes before an arrival are seen after
// the wait.
static __device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
static __device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Where what lies at SHARED in this CTA lies in CTA RANK of the cluster.
static __device__ __forceinline__ u32 cluster_address(u32 shared, u32 rank)
{
    u32 address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
    return address;
}

// Store 16 bytes at DST, later; then 16 bytes are counted at MBARRIER, in the same CTA as DST.
static __device__ __forceinline__ void push_word(u32 dst, u32 v0, u32 v1, u32 v2, u32 v3, u32 mbarrier)
{
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
                 :: "r"(dst), "r"(v0), "r"(v1), "r"(v2), "r"(v3), "r"(mbarrier) : "memory");
}

// Before a cluster barrier: the mbarriers that this thread made are ready for other CTAs.
static __device__ __forceinline__ void fence_mbarrier_init()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// mbarrier_try_wait for what other CTAs have pushed.
static __device__ __forceinline__ bool mbarrier_try_wait_cluster(u64 *b, u32 parity)
{
    u32 passed;
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}" : "=r"(passed) : "r"(shared_address(b)), "r"(parity) : "memory");
    return passed;
}

m4_ifdef({|PLAN_ALL_PRIMS|}, {|t_section({|Primitives that no kernel uses yet: the rank|})

static __device__ __forceinline__ u32 cluster_rank()
{
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

t_if(GPU_ARCH == 90, {|t_section({|Primitives of a warpgroup: 128 threads from a multiple of 128 on|})

// A matrix of 8x8 tiles (128 bytes, a row in 16) in shared memory, along k: LEADING and STRIDE are
// bytes from a tile to the next along k, and to the next along m or n; multiples of 16.
static __device__ __forceinline__ u64 matrix_descriptor(u32 address, u32 leading, u32 stride)
{
    return (u64)(stride >> 4) << 32 | (u64)(leading >> 4) << 16 | (address & 0x3ffff) >> 4;
}

// Before a wgmma that adds to D, when a thread has touched D or it is the first.
template <int SUMS> static __device__ __forceinline__ void wgmma_fence(float (&d)[SUMS])
{
    #pragma unroll
    for (int i = 0; i < SUMS; i++)
        asm volatile("" : "+f"(d[i]) :: "memory"); // no write of them moves behind the fence
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Products since the last commit are a group; wait until at most N groups are at work.  D: sums
// of the others.
static __device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N, int SUMS> static __device__ __forceinline__ void wgmma_wait(float (&d)[SUMS])
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");
    #pragma unroll
    for (int i = 0; i < SUMS; i++)
        asm volatile("" : "+f"(d[i]) :: "memory"); // no read of them moves before the wait
}

// d[64][N] += a[64][16] b[16][N], later; N is twice the sums of a thread: those of rows
// warp % 4 * 16 + lane / 4 and + 8, of columns lane % 4 * 2 and + 1 of each 8.
m4_dnl t_wgmma(N): the function for N columns, a multiple of 8.
m4_define({|t_wgmma|}, {|m4_pushdef({|SUMS|}, m4_eval($1 / 2))static __device__ __forceinline__ void wgmma(float (&d)[SUMS], u64 a, u64 b)
{
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n$1k16.f32.t_if(PLAN_FP16, {|f16.f16|}, {|bf16.bf16|}) {"
                 t_for({|I|}, 0, SUMS - 1, {|m4_dnl
m4_ifelse(m4_eval(I % 16), 0, {|"|})%I{||}m4_ifelse(m4_eval(I + 1), SUMS, {|}, "|}, m4_eval(I % 16), 15, {|,"
                 |}, {|, |})|})
                 "%SUMS, %m4_eval(SUMS + 1), p, 1, 1, 0, 0;\n}"
                 : t_for({|I|}, 0, SUMS - 1, {|"+f"(d[I])m4_ifelse(m4_eval(I + 1), SUMS, {||}, m4_eval(I % 8), 7, {|,
                   |}, {|, |})|})
                 : "l"(a), "l"(b) : "memory");
}m4_popdef({|SUMS|})|})m4_dnl
t_wgmma(8)

t_wgmma(16)

t_wgmma(64)

t_wgmma(128)

|})|})|})m4_dnl
