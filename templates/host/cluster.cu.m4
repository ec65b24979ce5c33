t_if(PLAN_CLUSTER > 1 && PLAN_FAMILY >= 90 && PLAN_HOST, {|t_section({|Primitives of clusters, on the host's machine|})

extern "C" {
u32 mkhost_cluster_rank();
void mkhost_cluster_arrive();
void mkhost_cluster_wait();
u32 mkhost_cluster_address(u32 shared, u32 rank);
void mkhost_push(u32 dst, const u32 *v, u32 mbarrier);
void mkhost_fence_mbarrier_init();
bool mkhost_mbarrier_wait_cluster(u64 *b, u32 parity);
void mkhost_wgmma_fence(float *d, u32 sums);
void mkhost_wgmma(float *d, u32 sums, bool bf16, u64 a, u64 b);
void mkhost_wgmma_commit();
void mkhost_wgmma_wait(u32 groups);
}

static inline void cluster_arrive() { mkhost_cluster_arrive(); }
static inline void cluster_wait() { mkhost_cluster_wait(); }
static inline u32 cluster_address(u32 shared, u32 rank) { return mkhost_cluster_address(shared, rank); }
static inline void push_word(u32 dst, u32 v0, u32 v1, u32 v2, u32 v3, u32 mbarrier)
{
    const u32 v[4] = {v0, v1, v2, v3};
    mkhost_push(dst, v, mbarrier);
}
static inline void fence_mbarrier_init() { mkhost_fence_mbarrier_init(); }
static inline bool mbarrier_try_wait_cluster(u64 *b, u32 parity) { return mkhost_mbarrier_wait_cluster(b, parity); }

m4_ifdef({|PLAN_ALL_PRIMS|}, {|static inline u32 cluster_rank() { return mkhost_cluster_rank(); }
t_if(GPU_ARCH == 90, {|static inline u64 matrix_descriptor(u32 address, u32 leading, u32 stride)
{
    return (u64)(stride >> 4) << 32 | (u64)(leading >> 4) << 16 | (address & 0x3ffff) >> 4;
}
template <int SUMS> static inline void wgmma_fence(float (&d)[SUMS]) { mkhost_wgmma_fence(d, SUMS); }
static inline void wgmma_commit() { mkhost_wgmma_commit(); }
template <int N, int SUMS> static inline void wgmma_wait(float (&)[SUMS]) { mkhost_wgmma_wait(N); }
template <int SUMS> static inline void wgmma(float (&d)[SUMS], u64 a, u64 b)
{
    mkhost_wgmma(d, SUMS, t_if(PLAN_FP16, false, true), a, b);
}

|})|})|})m4_dnl
