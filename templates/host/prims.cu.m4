t_if(PLAN_HOST, {|t_section({|Primitives: everything that touches hardware, on the host's machine|})

extern "C" {
void mkhost_load(const void *p, void *v, u32 bytes, int scope_acquire);
void mkhost_store(void *p, const void *v, u32 bytes, u32 atom, int release);
u32 mkhost_add_release(u32 *p, u32 v);
bool mkhost_claim(u32 *p);
void mkhost_delay(void *p, u32 bytes);
u64 mkhost_timer();
[[noreturn]] void mkhost_trap();
void mkhost_ldmatrix(u32 *r, const void *row, bool transposed);
void mkhost_mma(float *c, const u32 *a, const u32 *b, int k, bool bf16);
void mkhost_copy16(u32 dst, const void *src, u32 bytes);
void mkhost_copy_commit();
void mkhost_copy_wait(u32 groups);
void mkhost_copy_arrive(u64 *b);
void mkhost_copy_bulk(void *dst, const void *src, u32 bytes, u64 *b);
void mkhost_mbarrier_init(u64 *b, u32 count);
void mkhost_mbarrier_arrive(u64 *b, u32 expect);
bool mkhost_mbarrier_wait(u64 *b, u32 parity);
void mkhost_fence_async_proxy();
void mkhost_fence_async_global();
u16 mkhost_to_fp16(float x);
float mkhost_from_fp16(u16 x);
u16 mkhost_to_bf16(float x);
}

static inline u32 shared_address(const void *p) { return (u32)((const char *)p - mkhost_now->shared); }

t_if(PLAN_FP16, {|static inline float to_float(half x) { return mkhost_from_fp16(x); }
static inline half to_half(float x)
{
    x = x != x ? x : fminf(fmaxf(x, -65504.0f), 65504.0f);
    return mkhost_to_fp16(x);
}
static inline float low(u32 x) { return to_float((half)(x & 0xffff)); }
static inline float high(u32 x) { return to_float((half)(x >> 16)); }|}, {|static inline float low(u32 x) { return __uint_as_float(x << 16); }
static inline float high(u32 x) { return __uint_as_float(x & 0xffff0000); }
static inline half to_half(float x) { return mkhost_to_bf16(x); }|})
static inline u32 pack(float lo, float hi) { return to_half(lo) | (u32)to_half(hi) << 16; }

static inline float exp2_approx(float x) { return exp2f(x); }
static inline float log2_approx(float x) { return log2f(x); }

static inline Word load_word(const Word *p)
{
    Word w;
    mkhost_load(p, &w, sizeof w, false);
    return w;
}
static inline void store_word(Word *p, u32 v0, u32 v1, u32 v2, u32 tag)
{
    const Word w = {{v0, v1, v2}, tag};
    mkhost_store(p, &w, sizeof w, sizeof w, false);
}
// The store that follows is seen by this CTA at once, by others when the machine likes.
template <class T> static inline T *late(T *p)
{
    mkhost_delay(p, sizeof *p);
    return p;
}
m4_ifdef({|PLAN_ALL_PRIMS|}, {|static inline void fence_gpu() { mkhost_fence(MKHOST_GPU); }
|})m4_dnl
static inline u32 load_acquire(const u32 *p)
{
    u32 v;
    mkhost_load(p, &v, sizeof v, true);
    return v;
}
static inline void add_release(u32 *p, u32 v) { mkhost_add_release(p, v); }
static inline void store_system(u32 *p, u32 v) { mkhost_store(p, &v, sizeof v, sizeof v, true); }
static inline void store_relaxed_system(u64 *p, u64 v) { mkhost_store(p, &v, sizeof v, sizeof v, false); }
static inline bool claim_system(u32 *p) { return mkhost_claim(p); }
static inline u32 load_system(const u32 *p)
{
    u32 v;
    mkhost_load(p, &v, sizeof v, false);
    return v;
}
static inline u32 load_flag(const u32 *p)
{
    mkhost_poll(p);
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}
static inline void store_flag(u32 *p, u32 v)
{
    mkhost_publish(p);
    __atomic_store_n(p, v, __ATOMIC_RELAXED);
    mkhost_changed(p);
}
static inline u32 read_flag(const u32 *p)
{
    mkhost_poll(p);
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
static inline void publish_flag(u32 *p, u32 v)
{
    mkhost_publish(p);
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
    mkhost_changed(p);
}
static inline void prefetch_l2(const void *) {}
static inline void consumer_barrier() { mkhost_barrier(1, THREADS); }
static inline u64 timer_ns() { return mkhost_timer(); }
t_if(PLAN_TIMING, {|static inline u64 clock_cycles() { return mkhost_timer(); }|})
static inline void trap() { mkhost_trap(); }

// The lane reads its row itself, so that sanitizers see it.
static inline void ldmatrix(u32 (&r)[4], u32 address)
{
    const uint4 row = *(const uint4 *)(mkhost_now->shared + address);
    mkhost_ldmatrix(r, &row, false);
}
static inline void ldmatrix_transposed(u32 (&r)[4], u32 address)
{
    const uint4 row = *(const uint4 *)(mkhost_now->shared + address);
    mkhost_ldmatrix(r, &row, true);
}
// c[16][8] += a[16][16] b[16][8].
static inline void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1)
{
t_if(PLAN_FAMILY == 75, {|    const u32 a[2][2] = {{a0, a1}, {a2, a3}}, b[2] = {b0, b1};
    mkhost_mma(c, a[0], &b[0], 8, t_if(PLAN_FP16, false, true));
    mkhost_mma(c, a[1], &b[1], 8, t_if(PLAN_FP16, false, true));
|}, {|    const u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    mkhost_mma(c, a, b, 16, t_if(PLAN_FP16, false, true));
|})m4_dnl
}

t_if(PLAN_FAMILY == 75, {|static inline void copy16(u32 dst, const void *src, int bytes)
{
    *(uint4 *)(mkhost_now->shared + dst) = bytes ? *(const uint4 *)src : make_uint4(0, 0, 0, 0);
}
static inline void copy_commit() { __syncwarp(); }
template <int N> static inline void copy_wait() {}

static inline u32 load_volatile(const u32 *p) { return load_flag(p); }|}, {|static inline void copy16(u32 dst, const void *src, int bytes) { mkhost_copy16(dst, src, bytes); }
static inline void copy_commit() { mkhost_copy_commit(); }
template <int N> static inline void copy_wait() { mkhost_copy_wait(N); }

static inline void mbarrier_init(u64 *b, u32 count) { mkhost_mbarrier_init(b, count); }
static inline void mbarrier_arrive(u64 *b) { mkhost_mbarrier_arrive(b, 0); }
static inline bool mbarrier_test_wait(u64 *b, u32 parity) { return mkhost_mbarrier_wait(b, parity); }|})
t_if(PLAN_FAMILY == 80, {|static inline void mbarrier_arrive_copied(u64 *b) { mkhost_copy_arrive(b); }|})
t_if(PLAN_FAMILY >= 90, {|static inline bool mbarrier_try_wait(u64 *b, u32 parity) { return mkhost_mbarrier_wait(b, parity); }
static inline void mbarrier_arrive_expect(u64 *b, u32 bytes) { mkhost_mbarrier_arrive(b, bytes); }
static inline void copy_bulk(void *dst, const void *src, u32 bytes, u64 *b) { mkhost_copy_bulk(dst, src, bytes, b); }
static inline void fence_async_proxy() { mkhost_fence_async_proxy(); }
static inline void fence_async_global() { mkhost_fence_async_global(); }|})

|})m4_dnl
