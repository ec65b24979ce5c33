t_if(PLAN_HOST, {||}, {|t_section({|Primitives: everything that touches hardware|})

static __device__ __forceinline__ u32 shared_address(const void *p)
{
    return (u32)__cvta_generic_to_shared(p);
}

t_if(PLAN_FP16, {|static __device__ __forceinline__ float to_float(half x)
{
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x));
    return f;
}

static __device__ __forceinline__ half to_half(float x)
{
    half h;
    x = x != x ? x : fminf(fmaxf(x, -65504.0f), 65504.0f);
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}

// Two floats as one register of fp16: LO in the lower half.
static __device__ __forceinline__ u32 pack(float lo, float hi)
{
    return to_half(lo) | (u32)to_half(hi) << 16;
}

static __device__ __forceinline__ float low(u32 x) { return to_float((half)(x & 0xffff)); }
static __device__ __forceinline__ float high(u32 x) { return to_float((half)(x >> 16)); }|}, {|static __device__ __forceinline__ float low(u32 x) { return __uint_as_float(x << 16); }
static __device__ __forceinline__ float high(u32 x) { return __uint_as_float(x & 0xffff0000); }

// Two floats as one register of bf16: LO in the lower half.
static __device__ __forceinline__ u32 pack(float lo, float hi)
{
    u32 x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(hi), "f"(lo));
    return x;
}

static __device__ __forceinline__ half to_half(float x) { return (half)pack(x, 0.0f); }|})

static __device__ __forceinline__ float exp2_approx(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

t_if(PLAN_TEAM > 1, {|static __device__ __forceinline__ float log2_approx(float x)
{
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

|})m4_dnl
// Single-copy atomic: all of a word or none of it is seen.  As long as all of it is used: ptxas loads only the parts
// that are, one by one, and the tag may then be newer than they.
static __device__ __forceinline__ Word load_word(const Word *p)
{
    Word w;
    asm volatile("{\n.reg .b128 q;\n.reg .b64 lo, hi;\n"
                 "ld.relaxed.gpu.global.b128 q, [%4];\n"
                 "mov.b128 {lo, hi}, q;\nmov.b64 {%0, %1}, lo;\nmov.b64 {%2, %3}, hi;\n}"
                 : "=r"(w.v[0]), "=r"(w.v[1]), "=r"(w.v[2]), "=r"(w.tag) : "l"(p) : "memory");
    return w;
}

static __device__ __forceinline__ void store_word(Word *p, u32 v0, u32 v1, u32 v2, u32 tag)
{
    asm volatile("{\n.reg .b128 q;\n.reg .b64 lo, hi;\n"
                 "mov.b64 lo, {%1, %2};\nmov.b64 hi, {%3, %4};\nmov.b128 q, {lo, hi};\n"
                 "st.relaxed.gpu.global.b128 [%0], q;\n}"
                 :: "l"(p), "r"(v0), "r"(v1), "r"(v2), "r"(tag) : "memory");
}

// *late(p) = v is a plain store that another CTA will read, or the copy engine: late, and in any order, until
// add_release or fence_async_global after it.
template <class T>
static __device__ __forceinline__ T *late(T *p) { return p; }

m4_ifdef({|PLAN_ALL_PRIMS|}, {|// All earlier writes of this CTA (after a barrier) before all later ones, for every CTA.
static __device__ __forceinline__ void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

|})m4_dnl
static __device__ __forceinline__ u32 load_acquire(const u32 *p)
{
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

static __device__ __forceinline__ void add_release(u32 *p, u32 v)
{
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" :: "l"(p), "r"(v) : "memory");
}

// Words shared with the host.
static __device__ __forceinline__ void store_system(u32 *p, u32 v)
{
    asm volatile("st.release.sys.global.u32 [%0], %1;" :: "l"(p), "r"(v) : "memory");
}

// The ring's words carry their own launch: nothing else is published with them.
static __device__ __forceinline__ void store_relaxed_system(u64 *p, u64 v)
{
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" :: "l"(p), "l"(v) : "memory");
}

// True for the first that asks.
static __device__ __forceinline__ bool claim_system(u32 *p)
{
    return atomicCAS_system(p, 0, 1) == 0;
}

static __device__ __forceinline__ u32 load_system(const u32 *p)
{
    u32 v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

// Flags in shared memory that warps tell each other: each by itself, ordering nothing.
static __device__ __forceinline__ u32 load_flag(const u32 *p)
{
    u32 v;
    asm volatile("ld.relaxed.cta.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared_address(p)) : "memory");
    return v;
}

static __device__ __forceinline__ void store_flag(u32 *p, u32 v)
{
    asm volatile("st.relaxed.cta.shared.u32 [%0], %1;" :: "r"(shared_address(p)), "r"(v) : "memory");
}

// The same, for what was written before it or by those whom the writer has seen.
static __device__ __forceinline__ u32 read_flag(const u32 *p)
{
    u32 v;
    asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared_address(p)) : "memory");
    return v;
}

static __device__ __forceinline__ void publish_flag(u32 *p, u32 v)
{
    asm volatile("st.release.cta.shared.u32 [%0], %1;" :: "r"(shared_address(p)), "r"(v) : "memory");
}

static __device__ __forceinline__ void prefetch_l2(const void *p)
{
    asm volatile("prefetch.global.L2 [%0];" :: "l"(p));
}

// Barrier of the first THREADS threads; the others take no part.
static __device__ __forceinline__ void consumer_barrier()
{
    asm volatile("bar.sync 1, %0;" :: "n"(THREADS) : "memory");
}

static __device__ __forceinline__ u64 timer_ns()
{
    u64 t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

t_if(PLAN_TIMING, {|static __device__ __forceinline__ u64 clock_cycles()
{
    u64 t;
    asm volatile("mov.u64 %0, %clock64;" : "=l"(t) :: "memory");
    return t;
}

|})m4_dnl
static __device__ __forceinline__ void trap() { asm volatile("trap;"); }

// Four 8x8 tiles of half; lane i gives the address of row i % 8 of tile i / 8.
static __device__ __forceinline__ void ldmatrix(u32 (&r)[4], u32 address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

static __device__ __forceinline__ void ldmatrix_transposed(u32 (&r)[4], u32 address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

t_if(PLAN_FAMILY == 75, {|// c[16][8] += a[16][16] b[16][8]: two steps of 8.
static __device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1)
{
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a2), "r"(a3), "r"(b1));
}|}, {|// c[16][8] += a[16][16] b[16][8].
static __device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.t_if(PLAN_FP16, {|f16.f16|}, {|bf16.bf16|}).f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}|})

t_if(PLAN_FAMILY == 75, {|// 16 bytes from global to shared memory; BYTES less than 16 leaves zeros behind them.
static __device__ __forceinline__ void copy16(u32 dst, const void *src, int bytes)
{
    uint4 v = make_uint4(0, 0, 0, 0);
    if (bytes)
        asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(src) : "memory");
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "r"(dst), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// The loads of the next copies stay behind it, or they would take more registers than there are.
static __device__ __forceinline__ void copy_commit() { __syncwarp(); }
template <int N> static __device__ __forceinline__ void copy_wait() {}|}, {|// 16 bytes from global to shared memory, later; BYTES 0 puts zeros there.
static __device__ __forceinline__ void copy16(u32 dst, const void *src, int bytes)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(dst), "l"(src), "r"(bytes) : "memory");
}

// Copies since the last commit are a group; wait until at most N groups are on their way.
static __device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> static __device__ __forceinline__ void copy_wait()
{
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}|})

t_if(PLAN_FAMILY == 75, {|static __device__ __forceinline__ u32 load_volatile(const u32 *p)
{
    u32 v;
    asm volatile("ld.volatile.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared_address(p)) : "memory");
    return v;
}|}, {|// An mbarrier, in shared memory: a phase ends when COUNT have arrived and all expected bytes are here.
static __device__ __forceinline__ void mbarrier_init(u64 *b, u32 count)
{
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(shared_address(b)), "r"(count) : "memory");
}

static __device__ __forceinline__ void mbarrier_arrive(u64 *b)
{
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}"
                 :: "r"(shared_address(b)) : "memory");
}

t_if(PLAN_FAMILY == 80 || m4_ifdef({|PLAN_ALL_PRIMS|}, 1, 0), {|// Did the phase of PARITY end?
static __device__ __forceinline__ bool mbarrier_test_wait(u64 *b, u32 parity)
{
    u32 passed;
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}" : "=r"(passed) : "r"(shared_address(b)), "r"(parity) : "memory");
    return passed;
}|})|})

t_if(PLAN_FAMILY == 80, {|// The earlier copies of this thread arrive at B when they are here.
static __device__ __forceinline__ void mbarrier_arrive_copied(u64 *b)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" :: "r"(shared_address(b)) : "memory");
}|})

t_if(PLAN_FAMILY >= 90, {|// Did the phase of PARITY end?  Sleeps a little until it does.
static __device__ __forceinline__ bool mbarrier_try_wait(u64 *b, u32 parity)
{
    u32 passed;
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}" : "=r"(passed) : "r"(shared_address(b)), "r"(parity) : "memory");
    return passed;
}

// Arrive, and expect BYTES in this phase.
static __device__ __forceinline__ void mbarrier_arrive_expect(u64 *b, u32 bytes)
{
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;\n}"
                 :: "r"(shared_address(b)), "r"(bytes) : "memory");
}

// BYTES from global to shared memory, later; they arrive at B.
static __device__ __forceinline__ void copy_bulk(void *dst, const void *src, u32 bytes, u64 *b)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(shared_address(dst)), "l"(src), "r"(bytes), "r"(shared_address(b)) : "memory");
}

// What this thread wrote to global memory, before the copy engine comes to it.
static __device__ __forceinline__ void fence_async_global()
{
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// What this thread wrote to shared memory, before the copy engine comes to it.
static __device__ __forceinline__ void fence_async_proxy()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}|})

|})m4_dnl
