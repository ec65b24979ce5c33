// Kernels that do what must not be done, behind those of prims.cu; for the host's machine only, for
// sm_90 and clusters of two.  Each names what its report must say.

#define CLUSTER_TEST(name)                                                                       \
    extern "C" { extern const u32 mkhost_##name##_cluster = 2; }                                 \
    TEST(name)

// Until something is at P that nobody puts there.
static __device__ __forceinline__ void await_nothing(u32 *p)
{
    while (load_flag(p) != 1)
        ;
}

// ---- Warps and CTAs

// Two CTAs wait for each other's word.
TEST(misuse_deadlock)
{
    Word *words = (Word *)(args.out + 16);
    while (load_word(&words[blockIdx.x]).tag != 1)
        ;
    store_word(&words[1 - blockIdx.x], 0, 0, 0, 1);
}

// Warp 2 does not come to the barrier.
TEST(misuse_barrier)
{
    SHARED_MEMORY(Test_shared, m);
    if (threadIdx.x / 32 == 2)
        await_nothing(&m->words[0]);
    __syncthreads();
}

// Warp 1 waits for another number than warp 0 leaves.
TEST(misuse_flag)
{
    SHARED_MEMORY(Test_shared, m);
    u32 *flag = (u32 *)m->words;
    if (threadIdx.x == 3)
        store_flag(flag, 2);
    if (threadIdx.x >= 32)
        await_nothing(flag);
}

// Of two arrivals one is missing.
TEST(misuse_arrival)
{
    SHARED_MEMORY(Test_shared, m);
    if (threadIdx.x == 0) {
        mbarrier_init(&m->barrier[0], 2);
        mbarrier_arrive(&m->barrier[0]);
    }
    __syncthreads();
    while (!mbarrier_test_wait(&m->barrier[0], 0))
        ;
}

// In the second phase warp 1 does not arrive, nor does lane 5 of warp 0.
TEST(misuse_arrivals)
{
    SHARED_MEMORY(Test_shared, m);
    if (threadIdx.x == 0)
        mbarrier_init(&m->barrier[0], 64);
    __syncthreads();
    mbarrier_arrive(&m->barrier[0]);
    test_await(&m->barrier[0], 0, args.out, 1);
    if (threadIdx.x < 32 && threadIdx.x != 5)
        mbarrier_arrive(&m->barrier[0]);
    while (!mbarrier_test_wait(&m->barrier[0], 1))
        ;
}

// Lane 7 leaves its warp.
TEST(misuse_shuffle)
{
    if (threadIdx.x == 7)
        return;
    args.out[16 + threadIdx.x] = __shfl_xor_sync(~0u, threadIdx.x, 1);
}

// One byte behind shared memory, of which the test gives 22 KiB, and one behind a buffer of 128 KiB.
TEST(misuse_shared_end)
{
    if (threadIdx.x == 5)
        mkhost_now->shared[22 << 10] = 0;
}

TEST(misuse_buffer_end)
{
    if (threadIdx.x == 5)
        ((unsigned char *)args.out)[128 << 10] = 0;
}

// ---- Copies

// The copy engine has not been told of the mbarrier.
TEST(misuse_proxy)
{
    SHARED_MEMORY(Test_shared, m);
    if (threadIdx.x == 0) {
        mbarrier_init(&m->barrier[0], 1);
        mbarrier_arrive_expect(&m->barrier[0], 512);
        copy_bulk(m->bytes, args.in, 512, &m->barrier[0]);
        test_await(&m->barrier[0], 0, args.out, 1);
    }
}

// Nobody waits for the copy.
TEST(misuse_leave)
{
    SHARED_MEMORY(Test_shared, m);
    if (threadIdx.x == 0) {
        mbarrier_init(&m->barrier[0], 1);
        fence_async_proxy();
        mbarrier_arrive_expect(&m->barrier[0], 512);
        copy_bulk(m->bytes, args.in, 512, &m->barrier[0]);
    }
}

// Warp 0 writes a row to global memory, and warp 1 copies it to shared memory, reads it there and writes to that
// place itself; again and again.  GLOBAL and SHARED: with the fences that this needs; OWN: the one for global
// memory is that of warp 1.  Words of the result: 0.
template <bool GLOBAL, bool SHARED, bool OWN = false>
static __device__ __forceinline__ void copy_rows(const test_args &args)
{
    SHARED_MEMORY(Test_shared, m);
    const u32 lane = threadIdx.x % 32;
    u64 *ready = &m->barrier[0], *landed = &m->barrier[1], *free = &m->barrier[2];
    u32 *row = args.out + 16 + TEST_EXCHANGE + blockIdx.x * 32, *copy = (u32 *)m->bytes, wrong = 0;
    if (threadIdx.x == 0) {
        mbarrier_init(ready, 32);
        mbarrier_init(landed, 1);
        mbarrier_init(free, 32);
        fence_async_proxy();
    }
    __syncthreads();
    for (u32 r = 0; r < TEST_ROUNDS; r++) {
        if (threadIdx.x < 32) {
            if (r > 0)
                test_await(free, (r - 1) & 1, args.out, 1);
            *late(row + lane) = r * 100 + lane;
            if (GLOBAL && !OWN)
                fence_async_global();
            mbarrier_arrive(ready);
        } else {
            if (lane == 0) {
                test_await(ready, r & 1, args.out, 2);
                if (GLOBAL && OWN)
                    fence_async_global();
                mbarrier_arrive_expect(landed, 128);
                copy_bulk(copy, row, 128, landed);
            }
            test_await(landed, r & 1, args.out, 3);
            wrong += copy[lane] != r * 100 + lane;
            copy[lane] = ~r;
            if (SHARED)
                fence_async_proxy();
            __syncwarp(); // lane 0 copies next
            mbarrier_arrive(free);
        }
    }
    args.out[16 + blockIdx.x * 64 + threadIdx.x] = wrong;
}

TEST(sound_rows) { copy_rows<true, true>(args); }
TEST(sound_own_rows) { copy_rows<true, true, true>(args); }
TEST(misuse_rows) { copy_rows<false, true>(args); }
TEST(misuse_refill) { copy_rows<true, false>(args); }

// The fence of another kind of memory.
TEST(misuse_other_fence)
{
    SHARED_MEMORY(Test_shared, m);
    if (threadIdx.x == 0) {
        mbarrier_init(&m->barrier[0], 1);
        for (u32 i = 0; i < 4; i++)
            *late(args.out + 1024 + i) = i;
        fence_async_proxy();
        mbarrier_arrive_expect(&m->barrier[0], 16);
        copy_bulk(m->bytes, args.out + 1024, 16, &m->barrier[0]);
        test_await(&m->barrier[0], 0, args.out, 1);
    }
}

// A row is written to while it is being copied.
TEST(misuse_row_changed)
{
    SHARED_MEMORY(Test_shared, m);
    if (threadIdx.x == 0) {
        mbarrier_init(&m->barrier[0], 1);
        fence_async_proxy();
        mbarrier_arrive_expect(&m->barrier[0], 512);
        copy_bulk(m->bytes, args.out + 1024, 512, &m->barrier[0]);
        *late(args.out + 1024 + 127) = 1;
        test_await(&m->barrier[0], 0, args.out, 1);
    }
}

// ---- Words

// 2 CTAs.  Words of the result: how often 16 bytes were half of one store and half of another, when they were
// stored as v4, and as one .b128.
TEST(torn_words)
{
    uint4 *plain = (uint4 *)(args.out + 1024);
    Word *word = (Word *)(args.out + 1028);
    u32 torn[2] = {};
    if (threadIdx.x)
        return;
    for (u32 r = 1; r <= TEST_ROUNDS * 10; r++) {
        if (blockIdx.x == 0) {
            *late(plain) = uint4{r, r, r, r};
            store_word(word, r, r, r, r);
        } else {
            const uint4 v = *plain;
            const Word w = load_word(word);
            torn[0] += v.x != v.y || v.x != v.z || v.x != v.w;
            torn[1] += w.v[0] != w.v[1] || w.v[0] != w.v[2] || w.v[0] != w.tag;
        }
        timer_ns();
    }
    if (blockIdx.x == 1) {
        args.out[16] = torn[0];
        args.out[17] = torn[1];
    }
}

// ---- Clusters

// CTA 1 pushes to CTA 0, which does not wait for it.
CLUSTER_TEST(misuse_push)
{
    SHARED_MEMORY(Test_shared, m);
    if (threadIdx.x == 0) {
        mbarrier_init(&m->barrier[0], 1);
        fence_mbarrier_init();
    }
    cluster_arrive();
    cluster_wait();
    if (cluster_rank() == 1 && threadIdx.x == 0)
        push_word(cluster_address(shared_address(m->bytes), 0), 1, 2, 3, 4,
                  cluster_address(shared_address(&m->barrier[0]), 0));
}

// No fence between mbarrier and push.
CLUSTER_TEST(misuse_init)
{
    SHARED_MEMORY(Test_shared, m);
    if (threadIdx.x == 0)
        mbarrier_init(&m->barrier[0], 1);
    cluster_arrive();
    cluster_wait();
    if (cluster_rank() == 1 && threadIdx.x == 0)
        push_word(cluster_address(shared_address(m->bytes), 0), 1, 2, 3, 4,
                  cluster_address(shared_address(&m->barrier[0]), 0));
    cluster_arrive();
    cluster_wait();
}

// CTA 0 waits for 16 bytes more than CTA 1 pushes.
CLUSTER_TEST(misuse_pushes)
{
    SHARED_MEMORY(Test_shared, m);
    if (threadIdx.x == 0) {
        mbarrier_init(&m->barrier[0], 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect(&m->barrier[0], 32);
    }
    cluster_arrive();
    cluster_wait();
    if (cluster_rank() == 1 && threadIdx.x == 0)
        push_word(cluster_address(shared_address(m->bytes), 0), 1, 2, 3, 4,
                  cluster_address(shared_address(&m->barrier[0]), 0));
    while (cluster_rank() == 0 && !mbarrier_try_wait_cluster(&m->barrier[0], 0))
        ;
}

// A wait for what another CTA has pushed, as for what this one has.
CLUSTER_TEST(misuse_scope)
{
    SHARED_MEMORY(Test_shared, m);
    if (threadIdx.x == 0) {
        mbarrier_init(&m->barrier[0], 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect(&m->barrier[0], 16);
    }
    cluster_arrive();
    cluster_wait();
    if (cluster_rank() == 1 && threadIdx.x == 0)
        push_word(cluster_address(shared_address(m->bytes), 0), 1, 2, 3, 4,
                  cluster_address(shared_address(&m->barrier[0]), 0));
    while (cluster_rank() == 0 && !mbarrier_try_wait(&m->barrier[0], 0))
        ;
}

// Warp 1 of CTA 1 does not come to the cluster's barrier.
CLUSTER_TEST(misuse_cluster)
{
    SHARED_MEMORY(Test_shared, m);
    if (cluster_rank() == 1 && threadIdx.x / 32 == 1)
        await_nothing(&m->words[0]);
    cluster_arrive();
    cluster_wait();
}

// ---- Warpgroups

constexpr u32 MISUSE_B = 2048; // where B begins; A and B are zeros

static __device__ __forceinline__ u64 misuse_matrix(const void *p)
{
    return matrix_descriptor(shared_address(p), 128, 256);
}

static __device__ __forceinline__ void clear_matrices(Test_shared *m)
{
    for (u32 i = threadIdx.x; i < (MISUSE_B + 256) / 4; i += 128)
        ((u32 *)m->bytes)[i] = 0;
}

// A product without wgmma_fence.
TEST(misuse_sums)
{
    SHARED_MEMORY(Test_shared, m);
    float sum[4] = {};
    clear_matrices(m);
    fence_async_proxy();
    __syncthreads();
    wgmma(sum, misuse_matrix(m->bytes), misuse_matrix(m->bytes + MISUSE_B));
    wgmma_commit();
    wgmma_wait<0>(sum);
}

// Operands that the async proxy does not see.
TEST(misuse_operands)
{
    SHARED_MEMORY(Test_shared, m);
    float sum[4] = {};
    clear_matrices(m);
    fence_async_proxy();
    __syncthreads();
    if (threadIdx.x == 0)
        *(u16 *)m->bytes = *(u16 *)(m->bytes + MISUSE_B) = 0x3c00;
    __syncthreads();
    wgmma_fence(sum);
    wgmma(sum, misuse_matrix(m->bytes), misuse_matrix(m->bytes + MISUSE_B));
    wgmma_commit();
    wgmma_wait<0>(sum);
}

// Sums that are written to before the wait.
TEST(misuse_write)
{
    SHARED_MEMORY(Test_shared, m);
    float sum[4] = {};
    clear_matrices(m);
    fence_async_proxy();
    __syncthreads();
    wgmma_fence(sum);
    wgmma(sum, misuse_matrix(m->bytes), misuse_matrix(m->bytes + MISUSE_B));
    wgmma_commit();
    sum[1] = 1.0f;
    wgmma_wait<0>(sum);
}

// Warp 3 does not multiply.
TEST(misuse_warpgroup)
{
    SHARED_MEMORY(Test_shared, m);
    float sum[4] = {};
    if (threadIdx.x == 0)
        store_flag(&m->words[0], 0);
    clear_matrices(m);
    fence_async_proxy();
    __syncthreads();
    if (threadIdx.x / 32 == 3)
        await_nothing(&m->words[0]);
    wgmma_fence(sum);
    wgmma(sum, misuse_matrix(m->bytes), misuse_matrix(m->bytes + MISUSE_B));
    wgmma_commit();
    wgmma_wait<0>(sum);
}

// No misuse: a word of each thread before the wait, and one after it.
TEST(early_sums)
{
    SHARED_MEMORY(Test_shared, m);
    float sum[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    clear_matrices(m);
    fence_async_proxy();
    __syncthreads();
    wgmma_fence(sum);
    wgmma(sum, misuse_matrix(m->bytes), misuse_matrix(m->bytes + MISUSE_B));
    wgmma(sum, misuse_matrix(m->bytes), misuse_matrix(m->bytes + MISUSE_B));
    wgmma_commit();
    args.out[16 + threadIdx.x * 2] = __float_as_uint(sum[3]);
    wgmma_wait<0>(sum);
    args.out[16 + threadIdx.x * 2 + 1] = __float_as_uint(sum[3]);
}
