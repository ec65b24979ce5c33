// Kernels that use each primitive, appended to an emitted kernel; for a GPU and for the host's
// machine.  Whoever appends it defines TEST_FAMILY, TEST_ARCH and TEST_CLUSTER (the plan's) and
// SHARED_MEMORY(Type, name), which declares a pointer or array at the start of a function; for
// the host TEST_HOST too.
//
// OUT is zero before a launch.  Its first 16 words are the watchdog's (args.fault: a launch that
// hangs ends with them); what a kernel says, below, counts from word 16.  IN is random, but
// where a kernel says what it must be.  CTAs must be there at once (a cooperative launch).

struct test_args {
    u32 *out;
    const u32 *in;
};

#ifdef TEST_HOST
#define TEST(name)                                                                               \
    static void name(const test_args args);                                                      \
    extern "C" {                                                                                 \
    void mkhost_##name(void **args) { name(*(const test_args *)args[0]); }                       \
    extern const u32 mkhost_##name##_bytes = sizeof(test_args);                                  \
    }                                                                                            \
    static void name(const test_args args)
#else
#define TEST(name) extern "C" __global__ void name(const __grid_constant__ test_args args)
#endif

struct Test_shared {
    alignas(128) unsigned char bytes[16384];
    u64 barrier[8];
    Gate full[3], free[3];
    u32 words[1024];
};

constexpr int TEST_ROUNDS = 40;
constexpr int TEST_EXCHANGE = 1024; // word of the results where CTAs exchange data

// ---- Warps

// 1 CTA, 64 threads.  Six words of each thread t: lane 5's t * 3; the next lane's t, in a ring; the
// sum of t over the warp; lane ^ 31's t as a float; (t << 40 | 7) of lane 31 - lane, lower half
// first.
TEST(test_shuffle)
{
    const u32 t = threadIdx.x, lane = t % 32;
    u32 *out = args.out + 16 + t * 6, sum = t;
    out[0] = __shfl_sync(~0u, t * 3, 5);
    out[1] = __shfl_sync(~0u, t, lane + 1 & 31);
    for (int i = 16; i; i /= 2)
        sum += __shfl_xor_sync(~0u, sum, i);
    out[2] = sum;
    out[3] = __float_as_uint(__shfl_xor_sync(~0u, (float)t, 31));
    const u64 wide = __shfl_sync(~0u, (u64)t << 40 | 7, 31 - lane);
    out[4] = (u32)wide;
    out[5] = (u32)(wide >> 32);
}

// 1 CTA, 64 threads.  Two words of each thread t of warp w: in which of IN[0] to IN[31] bit w is set, and
// bit w + 1.
TEST(test_ballot)
{
    const u32 t = threadIdx.x;
    for (u32 i = 0; i < 2; i++)
        args.out[16 + t * 2 + i] = __ballot_sync(~0u, args.in[t % 32] & 1u << (t / 32 + i));
}

// 1 CTA, 64 threads.  A word of each: 0.
TEST(test_sync_warp)
{
    SHARED_MEMORY(Test_shared, m);
    const u32 t = threadIdx.x, other = t ^ 13;
    u32 wrong = 0;
    for (u32 r = 0; r < TEST_ROUNDS; r++) {
        m->words[t] = r * 100 + t;
        __syncwarp();
        wrong += m->words[other] != r * 100 + other;
        __syncwarp();
    }
    args.out[16 + t] = wrong;
}

// 1 CTA, 32 threads.  Half h of row r (of 32) is r * 8 + h, and lane i gives row i.  Eight words of
// each lane: ldmatrix, ldmatrix_transposed.
TEST(test_ldmatrix)
{
    SHARED_MEMORY(Test_shared, m);
    const u32 lane = threadIdx.x, at = lane * 5 % 32 * 16; // rows in any order
    u32 plain[4], transposed[4];
    for (u32 i = 0; i < 8; i++)
        ((u16 *)(m->bytes + at))[i] = lane * 8 + i;
    __syncwarp();
    ldmatrix(plain, shared_address(m->bytes + at));
    ldmatrix_transposed(transposed, shared_address(m->bytes + at));
    for (int i = 0; i < 4; i++) {
        args.out[16 + lane * 8 + i] = plain[i];
        args.out[16 + lane * 8 + 4 + i] = transposed[i];
    }
}

// 1 CTA, 32 threads.  IN: 16 times [32 lanes] a[4], b[2], c[4].  OUT: 16 times [32] c[4].
TEST(test_mma)
{
    const u32 lane = threadIdx.x;
    for (int n = 0; n < 16; n++) {
        const u32 *in = args.in + (n * 32 + lane) * 10;
        float c[4];
        for (int i = 0; i < 4; i++)
            c[i] = __uint_as_float(in[6 + i]);
        mma(c, in[0], in[1], in[2], in[3], in[4], in[5]);
        for (int i = 0; i < 4; i++)
            args.out[16 + (n * 32 + lane) * 4 + i] = __float_as_uint(c[i]);
    }
}

// 1 CTA, 64 threads.  Three words of each pair i of 1024: pack of floats IN[2 i] and IN[2 i + 1];
// low and high of IN[2 i], as floats.
TEST(test_convert)
{
    for (u32 i = threadIdx.x; i < 1024; i += 64) {
        const u32 a = args.in[i * 2], b = args.in[i * 2 + 1];
        args.out[16 + i * 3] = pack(__uint_as_float(a), __uint_as_float(b));
        args.out[16 + i * 3 + 1] = __float_as_uint(low(a));
        args.out[16 + i * 3 + 2] = __float_as_uint(high(a));
    }
}

// 1 CTA, 32 threads.  A word of each: 0.
TEST(test_timer)
{
    const u64 start = timer_ns();
    u64 last = start;
    u32 wrong = 0;
    for (int i = 0; i < 1000; i++) {
        const u64 now = timer_ns();
        wrong += now < last;
        last = now;
    }
    while (timer_ns() == start)
        ;
    args.out[16 + threadIdx.x] = wrong;
}

// ---- Warps of a CTA

// 1 CTA, THREADS + 32 threads.  A word of each: 0 of the first THREADS, then TEST_ROUNDS.
TEST(test_barrier)
{
    SHARED_MEMORY(Test_shared, m);
    const u32 t = threadIdx.x;
    u32 result = 0;
    if (t == 0)
        m->words[THREADS] = 0;
    __syncthreads();
    if (t < THREADS) {
        for (u32 r = 0; r < TEST_ROUNDS; r++) {
            const u32 other = (t + r * 37) % THREADS;
            m->words[t] = r * 1000 + t;
            consumer_barrier();
            result += m->words[other] != r * 1000 + other;
            consumer_barrier();
        }
        if (t == 0)
            store_flag(&m->words[THREADS], TEST_ROUNDS);
    } else {
        Watch watch;
        while ((result = load_flag(&m->words[THREADS])) != TEST_ROUNDS)
            watch.poll(args.out, 1, TEST_ROUNDS, result);
    }
    args.out[16 + t] = result;
    __syncthreads();
}

// 1 CTA, 64 threads.  Two words: TEST_ROUNDS, 0.
TEST(test_flags)
{
    SHARED_MEMORY(Test_shared, m);
    const u32 t = threadIdx.x;
    if (t == 0)
        m->words[0] = m->words[1] = 0;
    __syncthreads();
    if (t % 32 == 0) { // two lanes count in turn
        u32 *mine = &m->words[t / 32], *other = &m->words[1 - t / 32], seen = 0, back = 0;
        for (u32 r = 1; r <= TEST_ROUNDS; r++) {
            Watch watch;
            if (t == 0)
                store_flag(mine, r);
            for (u32 before = seen; (seen = load_flag(other)) < r; before = seen) {
                back += seen < before;
                watch.poll(args.out, 2, r, seen);
            }
            if (t == 32)
                store_flag(mine, r);
        }
        args.out[16 + t / 32] = t ? back : seen;
    }
}

// 1 CTA, 64 threads.  Three words: 512, 0, 0.
TEST(test_atomic_add)
{
    SHARED_MEMORY(Test_shared, m);
    const u32 t = threadIdx.x;
    u32 last = 0;
    for (u32 i = t; i < 515; i += 64)
        m->words[i] = 0;
    __syncthreads();
    for (u32 i = 0; i < 8; i++) {
        const u32 before = atomicAdd(&m->words[0], 1);
        m->words[3 + before] = 1; // each number once
        if (i && before <= last)
            atomicAdd(&m->words[1], 1);
        last = before;
    }
    __syncthreads();
    if (t == 0) {
        u32 missing = 0;
        for (u32 i = 0; i < 512; i++)
            missing += m->words[3 + i] == 0;
        args.out[16] = m->words[0];
        args.out[17] = m->words[1];
        args.out[18] = missing;
    }
}

#if TEST_FAMILY >= 80
static __device__ __forceinline__ void test_await(u64 *barrier, u32 parity, u32 *fault, u32 stage)
{
    Watch watch;
    while (!mbarrier_test_wait(barrier, parity))
        watch.poll(fault, stage, parity, 0);
}

// 1 CTA, 64 threads.  Four words: 0, 1 (no phase has ended: the one before counts as odd), 1, 0
// (the last phase, and the one after it); then a word of each lane: 0.
TEST(test_mbarrier)
{
    SHARED_MEMORY(Test_shared, m);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 *full = &m->barrier[0], *free = &m->barrier[1];
    u32 wrong = 0;
    if (threadIdx.x == 0) {
        mbarrier_init(full, 32);
        mbarrier_init(free, 32);
        args.out[16] = mbarrier_test_wait(full, 0);
        args.out[17] = mbarrier_test_wait(full, 1);
    }
    __syncthreads();
    for (u32 r = 0; r < TEST_ROUNDS; r++) {
        if (warp == 0) {
            if (r > 0)
                test_await(free, (r - 1) & 1, args.out, 3);
            m->words[lane] = r * 100 + lane;
            mbarrier_arrive(full);
        } else {
            test_await(full, r & 1, args.out, 4);
            wrong += m->words[31 - lane] != r * 100 + 31 - lane;
            mbarrier_arrive(free);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        args.out[18] = mbarrier_test_wait(full, (TEST_ROUNDS - 1) & 1);
        args.out[19] = mbarrier_test_wait(full, TEST_ROUNDS & 1);
    }
    if (warp == 1)
        args.out[20 + lane] = wrong;
}
#endif

#if TEST_FAMILY >= 90
// 1 CTA, 32 threads.  Words: 0; IN[0..15]; 1; 0; IN[16..47].
TEST(test_transactions)
{
    SHARED_MEMORY(Test_shared, m);
    u64 *b = &m->barrier[0];
    u32 *out = args.out + 16;
    const u32 *bytes = (const u32 *)m->bytes;
    if (threadIdx.x == 0) {
        mbarrier_init(b, 1);
        fence_async_proxy();
        copy_bulk(m->bytes, args.in, 64, b); // may be here before it is expected
        out[0] = mbarrier_test_wait(b, 0);
        mbarrier_arrive_expect(b, 64);
        test_await(b, 0, args.out, 5);
        for (int i = 0; i < 16; i++)
            out[1 + i] = bytes[i];
        mbarrier_arrive_expect(b, 0); // a phase of no bytes
        out[17] = mbarrier_test_wait(b, 1);
        mbarrier_arrive_expect(b, 128); // one phase of two copies
        out[18] = mbarrier_test_wait(b, 0);
        copy_bulk(m->bytes + 1024 + 32, args.in + 24, 96, b);
        copy_bulk(m->bytes + 1024, args.in + 16, 32, b);
        test_await(b, 0, args.out, 6);
        for (int i = 0; i < 32; i++)
            out[19 + i] = bytes[256 + i];
    }
}

// 1 CTA, 64 threads.  A word of each round r: the sum of the 4 * (1 + r * 37 % 256) words
// IN[16 r ..].
TEST(test_bulk)
{
    SHARED_MEMORY(Test_shared, m);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 *full = &m->barrier[0], *free = &m->barrier[2]; // two stages
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            mbarrier_init(&full[i], 1);
            mbarrier_init(&free[i], 32);
        }
        fence_async_proxy();
    }
    __syncthreads();
    for (u32 r = 0; r < TEST_ROUNDS; r++) {
        const u32 stage = r % 2, use = r / 2, words = 4 * (1 + r * 37 % 256);
        unsigned char *bytes = m->bytes + stage * 4096;
        if (warp == 0 && lane == 0) {
            if (use > 0)
                test_await(&free[stage], (use - 1) & 1, args.out, 7);
            mbarrier_arrive_expect(&full[stage], words * 4);
            copy_bulk(bytes, args.in + r * 16, words * 4, &full[stage]);
        } else if (warp == 1) {
            u32 sum = 0;
            Watch watch;
            while (!mbarrier_try_wait(&full[stage], use & 1))
                watch.poll(args.out, 8, r, 0);
            for (u32 i = lane; i < words; i += 32)
                sum += ((const u32 *)bytes)[i];
            mbarrier_arrive(&free[stage]);
            for (int i = 16; i; i /= 2)
                sum += __shfl_xor_sync(~0u, sum, i);
            if (lane == 0)
                args.out[16 + r] = sum;
        }
    }
}
#endif

// 1 CTA, 64 threads.  Six words of each thread t: IN[g * 256 + t * 4] for g = 0 .. 3; word 3 of
// what thread t + 1 (of 64) copied last, IN[768 + (t + 1) % 64 * 4 + 3]; 0.
TEST(test_copies)
{
    SHARED_MEMORY(Test_shared, m);
    const u32 t = threadIdx.x;
    const u32 *mine = (const u32 *)m->bytes + t * 4;
    u32 *out = args.out + 16 + t * 6;
    for (u32 g = 0; g < 4; g++) {
        copy16(shared_address(m->bytes + g * 1024 + t * 16), args.in + g * 256 + t * 4, 16);
        copy_commit();
    }
    copy_wait<3>();
    out[0] = mine[0];
    copy_wait<2>();
    out[1] = mine[256];
    copy_commit(); // an empty group
    copy_wait<2>();
    out[2] = mine[512];
    copy_wait<0>();
    out[3] = mine[768];
    __syncthreads();
    out[4] = ((const u32 *)m->bytes)[768 + (t + 1) % 64 * 4 + 3];
    copy16(shared_address(m->bytes + t * 16), args.in, 0);
    copy_commit();
    copy_wait<0>();
    out[5] = mine[0] | mine[1] | mine[2] | mine[3];
}

// 1 CTA, THREADS + 32 threads.  IN has 128 words for each round.  A word of each thread: 0.
TEST(test_ring)
{
    SHARED_MEMORY(Test_shared, m);
    const u32 lane = threadIdx.x % 32;
    const unsigned char *in = (const unsigned char *)args.in;
    u32 wrong = 0;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 3; i++)
            gate_init(&m->full[i], &m->free[i]);
        gate_init_done();
    }
    __syncthreads();
    for (u32 r = 0; r < TEST_ROUNDS; r++) {
        const u32 stage = r % 3, use = r / 3;
        unsigned char *bytes = m->bytes + stage * 512;
        Watch watch;
        if (threadIdx.x >= THREADS) {
            while (!__shfl_sync(~0u, gate_free(&m->free[stage], use), 0))
                watch.poll(args.out, 9, use, 0);
            if (TEST_FAMILY < 90 || lane == 0) // one lane starts a bulk copy
                gate_fill(&m->full[stage], bytes, in + r * 512, 512);
        } else {
            while (!gate_landed(&m->full[stage], use))
                watch.poll(args.out, 10, use, 0);
            __syncwarp();
            for (u32 i = lane; i < 128; i += 32)
                wrong += ((const u32 *)bytes)[i] != args.in[r * 128 + i];
            wrong += !gate_landed(&m->full[stage], use);
            __syncwarp();
            if (lane == 0)
                gate_release(&m->free[stage]);
        }
    }
    args.out[16 + threadIdx.x] = wrong;
    __syncthreads();
}

// ---- CTAs

// 4 CTAs, 64 threads.  A word of each thread: 0.  Nothing but the words orders anything.
TEST(test_words)
{
    const u32 t = threadIdx.x, n = gridDim.x;
    Word *exchange = (Word *)(args.out + 16 + TEST_EXCHANGE); // [2][n][64]
    u32 wrong = 0;
    prefetch_l2(args.in);
    for (u32 r = 0; r < TEST_ROUNDS; r++) {
        Word *now = exchange + r % 2 * n * 64 + t;
        store_word(now + blockIdx.x * 64, r, t, blockIdx.x ^ r, r + 1);
        for (u32 i = 0; i < n; i++) {
            Watch watch;
            Word w;
            while ((w = load_word(now + i * 64)).tag != r + 1)
                watch.poll(args.out, 11, r + 1, w.tag);
            wrong += w.v[0] != r || w.v[1] != t || w.v[2] != (i ^ r);
        }
    }
    args.out[16 + blockIdx.x * 64 + t] = wrong;
}

// 4 CTAs, 64 threads.  A word of each thread: 0.  Even CTAs tell odd ones, by release and acquire.
TEST(test_release)
{
    const u32 t = threadIdx.x, pair = blockIdx.x / 2;
    u32 *ready = args.out + 16 + 512 + pair * 2, *taken = ready + 1;
    u32 *data = args.out + 16 + TEST_EXCHANGE + pair * 128;
    u32 wrong = 0;
    for (u32 r = 0; r < TEST_ROUNDS; r++) {
        u32 *await = blockIdx.x % 2 ? ready : taken, seen;
        const u32 count = blockIdx.x % 2 ? r + 1 : r;
        if (t == 0) {
            Watch watch;
            while ((seen = load_acquire(await)) != count)
                watch.poll(args.out, 12, count, seen);
        }
        __syncthreads();
        if (blockIdx.x % 2) {
            wrong += data[63 - t] != r * 1000 + 63 - t;
            wrong += data[127 - t] != r * 1000 + 127 - t;
        } else {
            *late(data + t) = r * 1000 + t;
            *late(data + 64 + t) = r * 1000 + 64 + t;
        }
        __syncthreads();
        if (t == 0)
            add_release(blockIdx.x % 2 ? taken : ready, 1);
    }
    args.out[16 + blockIdx.x * 64 + t] = wrong;
}

// 4 CTAs, 64 threads.  A word of each thread: 0.  The same by fences and a word.
TEST(test_fence)
{
    const u32 t = threadIdx.x, pair = blockIdx.x / 2;
    Word *ready = (Word *)(args.out + 16 + 512) + pair * 2, *taken = ready + 1;
    u32 *data = args.out + 16 + TEST_EXCHANGE + pair * 128;
    u32 wrong = 0;
    for (u32 r = 0; r < TEST_ROUNDS; r++) {
        const Word *await = blockIdx.x % 2 ? ready : taken;
        const u32 tag = blockIdx.x % 2 ? r + 1 : r;
        if (t == 0) {
            Watch watch;
            u32 seen;
            while ((seen = load_word(await).tag) != tag)
                watch.poll(args.out, 13, tag, seen);
            fence_gpu();
        }
        __syncthreads();
        if (blockIdx.x % 2) {
            wrong += data[63 - t] != r * 1000 + 63 - t;
            wrong += data[127 - t] != r * 1000 + 127 - t;
        } else {
            *late(data + t) = r * 1000 + t;
            *late(data + 64 + t) = r * 1000 + 64 + t;
        }
        __syncthreads();
        if (t == 0) {
            fence_gpu();
            store_word(blockIdx.x % 2 ? taken : ready, 0, 0, 0, r + 1);
        }
    }
    args.out[16 + blockIdx.x * 64 + t] = wrong;
}

// All CTAs' writes before it are seen by all after it, as in prefill.
static __device__ __forceinline__ void test_grid_barrier(u32 *out, u32 count)
{
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 *arrived = out + 16 + 512, seen;
        Watch watch;
        add_release(arrived, 1);
        while ((int)((seen = load_acquire(arrived)) - count) < 0)
            watch.poll(out, 14, count, seen);
    }
    __syncthreads();
}

// 4 CTAs, 64 threads.  A word of each thread: 0.
TEST(test_grid)
{
    const u32 t = threadIdx.x, n = gridDim.x;
    u32 *data = args.out + 16 + TEST_EXCHANGE;
    u32 wrong = 0;
    for (u32 r = 0; r < TEST_ROUNDS; r++) {
        *late(data + blockIdx.x * 64 + t) = r * 1000 + blockIdx.x;
        test_grid_barrier(args.out, (r * 2 + 1) * n);
        for (u32 i = 0; i < n; i++)
            wrong += data[i * 64 + (t + r) % 64] != r * 1000 + i;
        test_grid_barrier(args.out, (r * 2 + 2) * n);
    }
    args.out[16 + blockIdx.x * 64 + t] = wrong;
}

// 4 CTAs, 64 threads.  A word of each thread: 0.  A CTA copies what it has just written, which others may not
// see yet.
TEST(test_own_copies)
{
    SHARED_MEMORY(Test_shared, m);
    const u32 t = threadIdx.x;
    u32 *data = args.out + 16 + TEST_EXCHANGE + blockIdx.x * 64;
    u32 wrong = 0;
    for (u32 r = 0; r < TEST_ROUNDS; r++) {
        *late(data + t) = r * 1000 + t;
        __syncthreads();
        if (t < 16)
            copy16(shared_address(m->bytes + t * 16), data + t * 4, 16);
        copy_commit();
        copy_wait<0>();
        __syncthreads();
        wrong += ((const u32 *)m->bytes)[t] != r * 1000 + t;
        __syncthreads();
    }
    args.out[16 + blockIdx.x * 64 + t] = wrong;
}

// 4 CTAs, 64 threads.  A word of each thread: 0.  All store to the same words; none sees what was there before it
// has stored.
TEST(test_same_words)
{
    const u32 t = threadIdx.x, n = gridDim.x;
    Word *words = (Word *)(args.out + 16 + TEST_EXCHANGE);
    u32 wrong = 0;
    for (u32 r = 1; r <= TEST_ROUNDS; r++) {
        store_word(words + t, r * n + blockIdx.x, t, ~t, r);
        for (u32 i = 0; i < 4; i++) // its own, or a later one
            wrong += load_word(words + t).v[0] / n != r;
        test_grid_barrier(args.out, (r * 2 - 1) * n);
        const Word w = load_word(words + t);
        wrong += w.v[0] / n != r || w.v[1] != t || w.v[2] != ~t || w.tag != r;
        test_grid_barrier(args.out, r * 2 * n);
    }
    args.out[16 + blockIdx.x * 64 + t] = wrong;
}

// 4 CTAs, 64 threads.  Word 512: 1, claimed; word 513: 1, by one.
TEST(test_claim)
{
    if (claim_system(args.out + 16 + 512))
        add_release(args.out + 16 + 513, 1);
}

// 4 CTAs, 64 threads.  Words 0 to 3: 0, 1, 2, 3, which each CTA had from the last; words 4 and
// 5: 89abcdef, 1234567.
TEST(test_system)
{
    u32 *turn = args.out + 16 + 512, seen;
    if (threadIdx.x == 0) {
        Watch watch;
        while ((seen = load_system(turn)) != blockIdx.x)
            watch.poll(args.out, 15, blockIdx.x, seen);
        store_system(args.out + 16 + blockIdx.x, seen);
        if (blockIdx.x == 0)
            store_relaxed_system((u64 *)(args.out + 16 + 4), 0x123456789abcdef);
        store_system(turn, blockIdx.x + 1);
    }
}

// ---- Clusters

#if TEST_FAMILY >= 90 && TEST_CLUSTER > 1
// 2 clusters of TEST_CLUSTER CTAs, 64 threads.  A word of each thread: 0; from word 2048 on a word
// of each CTA: its rank.
TEST(test_cluster)
{
    SHARED_MEMORY(Test_shared, m);
    const u32 t = threadIdx.x, rank = cluster_rank(), bytes = TEST_CLUSTER * 16;
    uint4 *box = (uint4 *)m->bytes; // [2][TEST_CLUSTER]
    u32 wrong = 0;
    if (t == 0) {
        for (int i = 0; i < 2; i++)
            mbarrier_init(&m->barrier[i], 1);
        fence_mbarrier_init();
        for (int i = 0; i < 2; i++)
            mbarrier_arrive_expect(&m->barrier[i], bytes);
        args.out[16 + 2048 + blockIdx.x] = rank;
    }
    cluster_arrive();
    cluster_wait();
    for (u32 r = 0; r < TEST_ROUNDS; r++) { // a CTA that has round r + 1 of me may send r + 2
        const u32 buffer = r % 2;
        Watch watch;
        if (t < TEST_CLUSTER)
            push_word(cluster_address(shared_address(box + buffer * TEST_CLUSTER + rank), t),
                      r, rank, t, blockIdx.x,
                      cluster_address(shared_address(&m->barrier[buffer]), t));
        while (!mbarrier_try_wait_cluster(&m->barrier[buffer], r / 2 & 1))
            watch.poll(args.out, 16, r, 0);
        for (u32 i = 0; i < TEST_CLUSTER; i++) {
            const uint4 got = box[buffer * TEST_CLUSTER + i];
            wrong += got.x != r || got.y != i || got.z != rank || got.w != blockIdx.x - rank + i;
        }
        __syncthreads();
        if (t == 0 && r + 2 < TEST_ROUNDS)
            mbarrier_arrive_expect(&m->barrier[buffer], bytes);
        __syncthreads();
    }
    args.out[16 + blockIdx.x * 64 + t] = wrong;
    cluster_arrive();
    cluster_wait();
}
#endif

#if TEST_ARCH == 90 && TEST_CLUSTER > 1
constexpr u32 TEST_B = 4096; // where B begins

// Two products of A and B in flight: SUM begins as row - column, PLAIN as 0.
template <int SUMS>
static __device__ __forceinline__ void test_products(const Test_shared *m, u32 *out)
{
    const u32 t = threadIdx.x;
    const u64 a = matrix_descriptor(shared_address(m->bytes), 128, 256);
    const u64 b = matrix_descriptor(shared_address(m->bytes + TEST_B), 128, 256);
    float sum[SUMS], plain[SUMS];
    #pragma unroll
    for (int i = 0; i < SUMS; i++) {
        const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8;
        const int col = i / 4 * 8 + t % 4 * 2 + i % 2;
        sum[i] = (float)(row - col);
        plain[i] = 0.0f;
    }
    wgmma_fence(sum);
    wgmma_fence(plain);
    wgmma(sum, a, b);
    wgmma_commit();
    wgmma(plain, a, b);
    wgmma_commit();
    wgmma_wait<1>(sum);
    #pragma unroll
    for (int i = 0; i < SUMS; i++)
        out[i * 128 + t] = __float_as_uint(sum[i]);
    wgmma_wait<0>(plain);
    #pragma unroll
    for (int i = 0; i < SUMS; i++)
        out[(SUMS + i) * 128 + t] = __float_as_uint(plain[i]);
}

// 1 CTA, 128 threads.  IN: halves a[64][16], then b[128][16], column by column.  OUT, for N = 8,
// 16, 64 and 128 columns, a word of each thread for each of N / 2 sums [sum][thread]: row - column
// + a b, then N / 2 of a b.
TEST(test_wgmma)
{
    SHARED_MEMORY(Test_shared, m);
    const u16 *in = (const u16 *)args.in;
    u32 *out = args.out + 16;
    for (u32 i = threadIdx.x; i < (64 + 128) * 16; i += 128) {
        const u32 row = i / 16, k = i % 16, in_b = row >= 64 ? TEST_B - 64 / 8 * 256 : 0;
        *(u16 *)(m->bytes + in_b + row / 8 * 256 + k / 8 * 128 + row % 8 * 16 + k % 8 * 2) = in[i];
    }
    fence_async_proxy();
    __syncthreads();
    test_products<4>(m, out);
    test_products<8>(m, out + 8 * 128);
    test_products<32>(m, out + 24 * 128);
    test_products<64>(m, out + 88 * 128);
}
#endif
