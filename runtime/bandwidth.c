/* bandwidth.c - see bandwidth.h. */
#include "config.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/bandwidth.h"
#include "runtime/nvrtc.h"

enum {
    LAUNCHES = 5,               /* timed, after one that is not */
    LOAD_THREADS = 512,
    LOAD_TILE = 8 * LOAD_THREADS * 16,  /* bytes that a CTA of bw_loads reads at once */
    BULK_THREADS = 256 + 32,    /* who add up, and the producer's warp */
    GATE_BYTES = 256            /* of shared memory: two barriers for each stage */
};

/* All sizes are multiples of this: of the tile, and of every chunk. */
static const size_t granule = (size_t)1 << 20;

static const char source[] =
    "typedef unsigned u32;\n"
    "typedef unsigned long long u64;\n"
    "\n"
    "// Add what the threads of this CTA have to *total.\n"
    "static __device__ void add_up(u32 mine, u32 *total)\n"
    "{\n"
    "    for (int i = 16; i; i /= 2)\n"
    "        mine += __shfl_xor_sync(~0u, mine, i);\n"
    "    if (threadIdx.x % 32 == 0)\n"
    "        atomicAdd(total, mine);\n"
    "}\n"
    "\n"
    "static __device__ u32 sum(uint4 v)\n"
    "{\n"
    "    return v.x + v.y + v.z + v.w;\n"
    "}\n"
    "\n"
    "// Numbers without a pattern: memory that is all zeros may be read faster, and cooler.\n"
    "static __device__ u32 noise(u64 i)\n"
    "{\n"
    "    i = (i ^ i >> 30) * 0xBF58476D1CE4E5B9;\n"
    "    i = (i ^ i >> 27) * 0x94D049BB133111EB;\n"
    "    return (u32)(i >> 32);\n"
    "}\n"
    "\n"
    "extern \"C\" __global__ void bw_fill(uint4 *p, u64 words, u32 *total)\n"
    "{\n"
    "    u32 mine = 0;\n"
    "    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < words;\n"
    "         i += (u64)gridDim.x * blockDim.x) {\n"
    "        const uint4 v = make_uint4(noise(i * 4 + 1), noise(i * 4 + 2), noise(i * 4 + 3),\n"
    "                                   noise(i * 4 + 4));\n"
    "        p[i] = v;\n"
    "        mine += sum(v);\n"
    "    }\n"
    "    add_up(mine, total);\n"
    "}\n"
    "\n"
    "static __device__ uint4 load(const uint4 *p)\n"
    "{\n"
    "    uint4 v;\n"
    "#if __CUDA_ARCH__ >= 800\n"
    "    asm volatile(\"ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];\"\n"
    "#else\n"
    "    asm volatile(\"ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];\"\n"
    "#endif\n"
    "                 : \"=r\"(v.x), \"=r\"(v.y), \"=r\"(v.z), \"=r\"(v.w) : \"l\"(p));\n"
    "    return v;\n"
    "}\n"
    "\n"
    "// Tiles of 8 x 512 words of 16 bytes: 8 loads of a thread at a time.\n"
    "extern \"C\" __global__ void __launch_bounds__(512)\n"
    "bw_loads(const uint4 *p, u64 tiles, u32 *total)\n"
    "{\n"
    "    u32 mine = 0;\n"
    "    for (u64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {\n"
    "        uint4 v[8];\n"
    "        #pragma unroll\n"
    "        for (int i = 0; i < 8; i++)\n"
    "            v[i] = load(p + (tile * 8 + i) * 512 + threadIdx.x);\n"
    "        #pragma unroll\n"
    "        for (int i = 0; i < 8; i++)\n"
    "            mine += sum(v[i]);\n"
    "    }\n"
    "    add_up(mine, total);\n"
    "}\n"
    "\n"
    "#if __CUDA_ARCH__ >= 900\n"
    "static __device__ u32 shared(const void *p)\n"
    "{\n"
    "    return (u32)__cvta_generic_to_shared(p);\n"
    "}\n"
    "\n"
    "static __device__ void gate_init(u64 *gate, u32 count)\n"
    "{\n"
    "    asm volatile(\"mbarrier.init.shared::cta.b64 [%0], %1;\"\n"
    "                 :: \"r\"(shared(gate)), \"r\"(count) : \"memory\");\n"
    "}\n"
    "\n"
    "// Wait for the end of phase ROUND of the gate.\n"
    "static __device__ void gate_wait(u64 *gate, u32 round)\n"
    "{\n"
    "    u32 done = 0;\n"
    "    while (!done)\n"
    "        asm volatile(\"{ .reg .pred p;\\n\"\n"
    "                     \"mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\\n\"\n"
    "                     \"selp.u32 %0, 1, 0, p; }\"\n"
    "                     : \"=r\"(done) : \"r\"(shared(gate)), \"r\"(round & 1) : \"memory\");\n"
    "}\n"
    "\n"
    "static __device__ void gate_arrive(u64 *gate)\n"
    "{\n"
    "    asm volatile(\"mbarrier.arrive.shared::cta.b64 _, [%0];\"\n"
    "                 :: \"r\"(shared(gate)) : \"memory\");\n"
    "}\n"
    "\n"
    "static __device__ void copy(void *to, const unsigned char *from, u32 bytes, u64 *gate)\n"
    "{\n"
    "    asm volatile(\"mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\"\n"
    "                 :: \"r\"(shared(gate)), \"r\"(bytes) : \"memory\");\n"
    "    asm volatile(\"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes \"\n"
    "                 \"[%0], [%1], %2, [%3];\" :: \"r\"(shared(to)), \"l\"(from), \"r\"(bytes),\n"
    "                 \"r\"(shared(gate)) : \"memory\");\n"
    "}\n"
    "\n"
    "// A CTA reads its share of the chunks, from first to last; one thread of the last warp\n"
    "// keeps STAGES of them in flight, the other 8 warps add up.\n"
    "extern \"C\" __global__ void __launch_bounds__(288)\n"
    "bw_bulk(const unsigned char *p, u64 chunks, u32 bytes, u32 stages, u32 *total)\n"
    "{\n"
    "    extern __shared__ __align__(128) unsigned char ring[];\n"
    "    u64 *full = (u64 *)(ring + stages * bytes), *free = full + stages;\n"
    "    const u64 first = chunks * blockIdx.x / gridDim.x;\n"
    "    const u32 mine = (u32)(chunks * (blockIdx.x + 1) / gridDim.x - first);\n"
    "    u32 added = 0;\n"
    "    if (threadIdx.x == 0) {\n"
    "        for (u32 i = 0; i < stages; i++) {\n"
    "            gate_init(full + i, 1);\n"
    "            gate_init(free + i, 8);\n"
    "        }\n"
    "        asm volatile(\"fence.mbarrier_init.release.cluster;\" ::: \"memory\");\n"
    "    }\n"
    "    __syncthreads();\n"
    "    if (threadIdx.x == 256) {\n"
    "        for (u32 i = 0; i < mine; i++) {\n"
    "            if (i >= stages)\n"
    "                gate_wait(free + i % stages, i / stages - 1);\n"
    "            copy(ring + i % stages * bytes, p + (first + i) * bytes, bytes,\n"
    "                 full + i % stages);\n"
    "        }\n"
    "    } else if (threadIdx.x < 256) {\n"
    "        for (u32 i = 0; i < mine; i++) {\n"
    "            const uint4 *stage = (const uint4 *)(ring + i % stages * bytes);\n"
    "            gate_wait(full + i % stages, i / stages);\n"
    "            for (u32 j = threadIdx.x; j < bytes / 16; j += 256)\n"
    "                added += sum(stage[j]);\n"
    "            __syncwarp();\n"
    "            if (threadIdx.x % 32 == 0)\n"
    "                gate_arrive(free + i % stages);\n"
    "        }\n"
    "        add_up(added, total);\n"
    "    }\n"
    "}\n"
    "#endif\n";

/* The ways of reading that are tried. */
static const struct method {
    int per_sm;                 /* loads: CTAs per SM; 0: bulk copies */
    int chunk, stages;          /* bulk copies */
} methods[] = {
    {1, 0, 0}, {2, 0, 0}, {4, 0, 0},
    {0, 16384, 4}, {0, 16384, 6}, {0, 16384, 8}, {0, 16384, 12}, {0, 32768, 4}, {0, 32768, 6},
};

struct reader {
    struct rt_device *device;
    struct gen_gpu gpu;
    rt_module module;
    rt_ptr data, total;
    size_t bytes;
    rt_event start, end;
    uint32_t want;              /* the sum of all data */
};

static int make_module(struct reader *r, struct mk_err *err)
{
    char *options = rt_nvrtc_options(r->gpu.arch);
    unsigned char *cubin = NULL;
    size_t size;
    int rc;

    if (!options)
        return gen_fail(err, MK_ENOMEM, "no memory to measure the read bandwidth");
    rc = rt_nvrtc_compile(source, "bandwidth.cu", r->gpu.arch, options, &cubin, &size, NULL, err);
    if (rc == 0)
        rc = rt_module_load(r->device, cubin, size, &r->module, err);
    free(cubin);
    free(options);
    return rc;
}

/* 8 GiB, or what 3/4 of the free memory holds. */
static int make_data(struct reader *r, struct mk_err *err)
{
    size_t free_bytes, all;
    int rc;

    rt_device_memory(r->device, &free_bytes, &all);
    r->bytes = (size_t)8 << 30;
    if (r->bytes > free_bytes / 4 * 3)
        r->bytes = free_bytes / 4 * 3 / granule * granule;
    if (r->bytes < 64 * granule)
        return gen_fail(err, MK_ENOMEM, "%s has %.2f GB of memory free, too little to measure how "
                        "fast it is read", rt_device_name(r->device), (double)free_bytes / 1e9);
    rc = rt_device_alloc(r->device, r->bytes, &r->data, err);
    if (rc == 0)
        rc = rt_device_alloc(r->device, 256, &r->total, err);
    if (rc == 0)
        rc = rt_event_make(r->device, &r->start, err);
    if (rc == 0)
        rc = rt_event_make(r->device, &r->end, err);
    return rc;
}

struct launch {
    rt_func func;
    int grid, block, smem;
    void **params;
};

/* One launch: its milliseconds and its sum. */
static int run_once(const struct reader *r, const struct launch *l, float *ms, uint32_t *sum,
                    struct mk_err *err)
{
    struct rt_device *d = r->device;
    int rc = rt_device_set(d, r->total, 0, sizeof *sum, err);

    if (rc == 0)
        rc = rt_event_record(d, r->start, err);
    if (rc == 0)
        rc = rt_launch(d, l->func, l->grid, l->block, l->smem, 0, 0, l->params, err);
    if (rc == 0)
        rc = rt_event_record(d, r->end, err);
    if (rc == 0)
        rc = rt_event_ms(d, r->start, r->end, ms, err);
    if (rc == 0)
        rc = rt_device_get(d, sum, r->total, sizeof *sum, err);
    return rc ? rc : rt_device_sync(d, err);
}

static int fill(struct reader *r, struct mk_err *err)
{
    uint64_t words = r->bytes / 16;
    void *params[] = {&r->data, &words, &r->total};
    struct launch l = {NULL, r->gpu.sms * 4, LOAD_THREADS, 0, params};
    float ms;
    int rc = rt_module_func(r->device, r->module, "bw_fill", 0, &l.func, err);

    return rc ? rc : run_once(r, &l, &ms, &r->want, err);
}

static int by_size(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;

    return (x > y) - (x < y);
}

/* The median time of launch L, which must read all data. */
static int time_launch(const struct reader *r, const struct launch *l, float *median,
                       struct mk_err *err)
{
    float ms[LAUNCHES + 1];
    uint32_t sum;

    for (int i = 0; i <= LAUNCHES; i++) {
        const int rc = run_once(r, l, &ms[i], &sum, err);
        if (rc)
            return rc;
        if (sum != r->want)
            return gen_fail(err, MK_EDEVICE, "%s: memory read back wrong: the sum of %.2f GB is "
                            "%08x, not %08x", rt_device_name(r->device), (double)r->bytes / 1e9,
                            sum, r->want);
    }
    qsort(ms + 1, LAUNCHES, sizeof *ms, by_size);
    *median = ms[1 + LAUNCHES / 2];
    return 0;
}

static int time_loads(const struct reader *r, int per_sm, float *ms, struct mk_err *err)
{
    uint64_t tiles = r->bytes / LOAD_TILE;
    rt_ptr data = r->data, total = r->total;
    void *params[] = {&data, &tiles, &total};
    struct launch l = {NULL, r->gpu.sms * per_sm, LOAD_THREADS, 0, params};
    int rc = rt_module_func(r->device, r->module, "bw_loads", 0, &l.func, err);

    return rc ? rc : time_launch(r, &l, ms, err);
}

static int time_bulk(const struct reader *r, const struct method *m, float *ms, struct mk_err *err)
{
    uint64_t chunks = r->bytes / (size_t)m->chunk;
    uint32_t chunk = (uint32_t)m->chunk, stages = (uint32_t)m->stages;
    rt_ptr data = r->data, total = r->total;
    void *params[] = {&data, &chunks, &chunk, &stages, &total};
    struct launch l = {NULL, r->gpu.sms, BULK_THREADS, m->chunk * m->stages + GATE_BYTES, params};
    int rc = rt_module_func(r->device, r->module, "bw_bulk", l.smem, &l.func, err);

    return rc ? rc : time_launch(r, &l, ms, err);
}

static int possible(const struct reader *r, const struct method *m)
{
    const int smem = m->chunk * m->stages + GATE_BYTES;

    return m->per_sm || (r->gpu.arch >= 90 && smem <= r->gpu.smem_block);
}

static void describe(const struct reader *r, const struct method *m, char text[128])
{
    int n;

    if (m->per_sm)
        n = snprintf(text, 128, "16-byte loads, 8 at a time by each of %d x %d threads an SM",
                     m->per_sm, LOAD_THREADS);
    else
        n = snprintf(text, 128, "bulk copies of %d KiB, %d in flight an SM", m->chunk / 1024,
                     m->stages);
    if (r->bytes < (size_t)4 << 30)
        snprintf(text + n, 128 - (size_t)n, ", of only %.2f GiB", (double)r->bytes / (1 << 30));
}

static int time_all(struct reader *r, double *gbps, char method[128], struct mk_err *err)
{
    int rc = fill(r, err);

    for (size_t i = 0; rc == 0 && i < sizeof methods / sizeof *methods; i++) {
        const struct method *m = &methods[i];
        float ms;

        if (!possible(r, m))
            continue;
        rc = m->per_sm ? time_loads(r, m->per_sm, &ms, err) : time_bulk(r, m, &ms, err);
        if (rc == 0 && ms > 0 && 1e-6 * (double)r->bytes / ms > *gbps) {
            *gbps = 1e-6 * (double)r->bytes / ms;
            describe(r, m, method);
        }
    }
    return rc;
}

int rt_bandwidth(struct rt_device *d, double *gbps, char method[128], struct mk_err *err)
{
    struct reader r = {.device = d};
    int rc;

    *gbps = 0;
    method[0] = 0;
    rt_device_facts(d, &r.gpu);
    rc = make_module(&r, err);
    if (rc == 0)
        rc = make_data(&r, err);
    if (rc == 0)
        rc = time_all(&r, gbps, method, err);
    rt_event_free(d, r.start);
    rt_event_free(d, r.end);
    rt_device_free(d, r.data);
    rt_device_free(d, r.total);
    rt_module_free(d, r.module);
    return rc;
}
