t_if(PLAN_HOST, {|t_section({|The words of CUDA, for a C++ compiler; libmkhost runs what they make|})

// What the machine tells the lane at work.  The pointer changes when another lane goes on.
struct mkhost_place { unsigned int x, y, z; };
struct mkhost_lane {
    mkhost_place thread, block, threads, blocks;
    char *shared; // of the lane's CTA
};
extern "C" {
extern mkhost_lane *mkhost_now;
void mkhost_barrier(unsigned int id, unsigned int threads);
void mkhost_sync_warp();
void mkhost_shuffle(void *value, unsigned int bytes, unsigned int from);
unsigned int mkhost_ballot(bool vote);
void mkhost_fence(int scope);
void mkhost_poll(const void *p);
void mkhost_publish(void *p);
void mkhost_changed(void *p);
float expf(float);
float exp2f(float);
float log2f(float);
float logf(float);
float sqrtf(float);
}
enum { MKHOST_CTA, MKHOST_GPU };

#define threadIdx (mkhost_now->thread)
#define blockIdx (mkhost_now->block)
#define blockDim (mkhost_now->threads)
#define gridDim (mkhost_now->blocks)
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(threads, blocks)
#define __grid_constant__

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned int x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w) { return {x, y, z, w}; }

template <class To, class From> static inline To mkhost_bits(From from)
{
    To to;
    static_assert(sizeof to == sizeof from, "bits");
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}
static inline float __uint_as_float(unsigned int x) { return mkhost_bits<float>(x); }
static inline float __int_as_float(int x) { return mkhost_bits<float>(x); }
static inline unsigned int __float_as_uint(float x) { return mkhost_bits<unsigned int>(x); }

template <class A, class B> static inline auto min(A a, B b) -> decltype(a + b) { return b < a ? b : a; }
template <class A, class B> static inline auto max(A a, B b) -> decltype(a + b) { return a < b ? b : a; }
static inline float fminf(float a, float b) { return __builtin_fminf(a, b); }
static inline float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __expf(float x) { return expf(x); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __fmul_rn(float a, float b) { return a * b; }

static inline void __syncthreads() { mkhost_barrier(0, blockDim.x); }
static inline void __syncwarp() { mkhost_sync_warp(); }
static inline void __threadfence_block() { mkhost_fence(MKHOST_CTA); }

template <class T> static inline T __shfl_sync(unsigned int, T value, unsigned int from)
{
    mkhost_shuffle(&value, sizeof value, from % 32);
    return value;
}
template <class T> static inline T __shfl_xor_sync(unsigned int mask, T value, unsigned int bits)
{
    return __shfl_sync(mask, value, threadIdx.x ^ bits);
}
static inline unsigned int __ballot_sync(unsigned int, int vote) { return mkhost_ballot(vote != 0); }
// Of a word in shared memory.
static inline unsigned int atomicAdd(unsigned int *p, unsigned int v)
{
    mkhost_publish(p);
    const unsigned int before = __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
    mkhost_changed(p);
    return before;
}

|})m4_dnl
