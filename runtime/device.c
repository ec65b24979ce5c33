/* device.c - a GPU, or an emulated one, behind the driver API. */
#define _GNU_SOURCE
#include "runtime/driver.h"

#include <ctype.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MIN_DRIVER 12000    /* CUDA 12.0, driver 525: older ones load nothing that NVRTC 12 makes */
#define MIN_ARCH   75       /* the oldest architecture that the templates know */
#define HOST_ARCH  90       /* what "host" emulates when no architecture is named */

struct rt_device {
    const struct driver *cu;
    int host;               /* architecture that libmkhost emulates here; 0: a GPU */
    int dev;                /* CUdevice */
    void *ctx;              /* CUcontext, the primary one */
    void *stream;           /* CUstream */
    int driver;
    size_t total;
    char name[128];
    char bus[32];           /* PCI bus id, for NVML */
    struct gen_gpu facts;
};

/* ---- Errors --------------------------------------------------------------- */

/* "cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY (out of memory)". */
static int fail_cu(const struct rt_device *d, struct mk_err *err, int code, int result,
                   const char *call)
{
    const char *name = NULL, *text = NULL;

    if (d->cu->cuGetErrorName(result, &name) || !name)
        return gen_fail(err, code, "%s: unknown CUDA error %d", call, result);
    if (d->cu->cuGetErrorString(result, &text) || !text)
        text = "no description";
    return gen_fail(err, code, "%s: %s (%s)", call, name, text);
}

static int check(const struct rt_device *d, struct mk_err *err, int result, const char *call)
{
    if (result == 0)
        return 0;
    return fail_cu(d, err, result == CU_OUT_OF_MEMORY ? MK_ENOMEM : MK_EDEVICE, result, call);
}

/* Make D's context current in the calling thread. */
static int enter(const struct rt_device *d, struct mk_err *err)
{
    return check(d, err, d->cu->cuCtxSetCurrent(d->ctx), "cuCtxSetCurrent");
}

/* ---- Opening -------------------------------------------------------------- */

static int attr(const struct rt_device *d, int which)
{
    int value = 0;

    return d->cu->cuDeviceGetAttribute(&value, which, d->dev) ? 0 : value;
}

static int arch_of(const struct rt_device *d)
{
    return attr(d, ATTR_COMPUTE_CAPABILITY_MAJOR) * 10 + attr(d, ATTR_COMPUTE_CAPABILITY_MINOR);
}

/* The one of libmkhost's N devices that is of the architecture wanted. */
static int find_arch(struct rt_device *d, int n, struct mk_err *err)
{
    for (int i = 0; i < n; i++)
        if (d->cu->cuDeviceGet(&d->dev, i) == 0 && arch_of(d) == d->host)
            return 0;
    return gen_fail(err, MK_ENOGPU, "libmkhost.so does not emulate sm_%d", d->host);
}

/* Initialise the driver and find device INDEX in it. */
static int find_device(struct rt_device *d, int index, struct mk_err *err)
{
    int n = 0;
    int r = d->cu->cuInit(0);

    if (r)
        return fail_cu(d, err, MK_ENOGPU, r, "no usable GPU: cuInit");
    r = d->cu->cuDriverGetVersion(&d->driver);
    if (r)
        return fail_cu(d, err, MK_ENOGPU, r, "cuDriverGetVersion");
    if (d->driver < MIN_DRIVER)
        return gen_fail(err, MK_ENOGPU, "the NVIDIA driver is too old: it is for CUDA %d.%d; "
                        "CUDA %d.%d (driver 525) or newer is needed", d->driver / 1000,
                        d->driver % 1000 / 10, MIN_DRIVER / 1000, MIN_DRIVER % 1000 / 10);
    r = d->cu->cuDeviceGetCount(&n);
    if (r)
        return fail_cu(d, err, MK_ENOGPU, r, "cuDeviceGetCount");
    if (n < 1)
        return gen_fail(err, MK_ENOGPU, "no GPU: the driver sees none");
    if (d->host)
        return find_arch(d, n, err);
    if (index < 0 || index >= n)
        return gen_fail(err, MK_ENOGPU, "there is no GPU number %d: the driver sees %d, "
                        "numbered from 0", index, n);
    r = d->cu->cuDeviceGet(&d->dev, index);
    if (r)
        return fail_cu(d, err, MK_ENOGPU, r, "cuDeviceGet");
    return 0;
}

/* "NVIDIA H200" -> "nvidia-h200"; every run of other characters is one '-'. */
static void profile_name(const char *name, char *out, size_t size)
{
    size_t n = 0;

    for (; *name && n + 1 < size; name++) {
        unsigned char c = (unsigned char) *name;
        if (c < 128 && (isalnum(c) || c == '.' || c == '_'))
            out[n++] = (char) tolower(c);
        else if (n && out[n - 1] != '-')
            out[n++] = '-';
    }
    while (n && out[n - 1] == '-')
        n--;
    out[n] = 0;
}

/* The properties of a GPU. */
static void ask_facts(const struct rt_device *d, struct gen_gpu *g)
{
    profile_name(d->name, g->name, sizeof g->name);
    g->arch = arch_of(d);
    g->sms = attr(d, ATTR_MULTIPROCESSOR_COUNT);
    g->smem_block = attr(d, ATTR_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
    g->smem_sm = attr(d, ATTR_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR);
    g->l2_bytes = attr(d, ATTR_L2_CACHE_SIZE);
    g->clock_mhz = attr(d, ATTR_CLOCK_RATE) / 1000;
    g->mem_gbps = (int) (2.0 * attr(d, ATTR_MEMORY_CLOCK_RATE) * 1e3
                         * (attr(d, ATTR_GLOBAL_MEMORY_BUS_WIDTH) / 8) / 1e9);
    g->mem_bytes = (int64_t) d->total;
    g->clusters[0] = g->sms;
}

/* How many clusters fit at once when each block has an SM for itself.  Only a kernel can be asked:
   an empty one, which the driver compiles.  A driver that cannot compile leaves the counts 0. */
static void ask_clusters(struct rt_device *d)
{
    static const char probe[] = ".version 7.8\n.target sm_90\n.address_size 64\n"
                                ".visible .entry mk_probe()\n{\n    ret;\n}\n";
    struct gen_gpu *g = &d->facts;
    rt_module m;
    rt_func f;

    if (d->host || g->arch < 90 || d->cu->cuModuleLoadData(&m, probe))
        return;
    if (d->cu->cuModuleGetFunction(&f, m, "mk_probe") == 0
        && d->cu->cuFuncSetAttribute(f, FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES, g->smem_block) == 0) {
        d->cu->cuFuncSetAttribute(f, FUNC_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1);
        for (int i = 1; i < 5; i++) {
            const struct launch_attribute attribute = {
                .id = LAUNCH_CLUSTER_DIMENSION, .value.cluster = { 1u << i, 1, 1 }
            };
            const struct launch config = {
                .grid = { 1u << i, 1, 1 }, .block = { 256, 1, 1 },
                .smem = (unsigned) g->smem_block, .attributes = &attribute, .n_attributes = 1
            };
            if (d->cu->cuOccupancyMaxActiveClusters(&g->clusters[i], f, &config))
                g->clusters[i] = 0;
        }
    }
    d->cu->cuModuleUnload(m);
}

/* Find out name and properties; refuse a GPU that the kernels cannot run on. */
static int read_facts(struct rt_device *d, struct mk_err *err)
{
    struct gen_gpu *g = &d->facts;

    if (d->cu->cuDeviceGetName(d->name, sizeof d->name, d->dev) || !d->name[0])
        strcpy(d->name, "unknown GPU");
    d->name[sizeof d->name - 1] = 0;
    if (d->host || d->cu->cuDeviceGetPCIBusId(d->bus, sizeof d->bus, d->dev))
        d->bus[0] = 0;
    if (d->cu->cuDeviceTotalMem_v2(&d->total, d->dev))
        d->total = 0;
    if (d->host)
        return gen_gpu_host(d->host, g);
    ask_facts(d, g);
    if (g->arch < MIN_ARCH)
        return gen_fail(err, MK_ENOGPU, "%s has compute capability %d.%d; %d.%d or newer is needed",
                        d->name, g->arch / 10, g->arch % 10, MIN_ARCH / 10, MIN_ARCH % 10);
    if (!attr(d, ATTR_COOPERATIVE_LAUNCH))
        return gen_fail(err, MK_ENOGPU, "%s cannot launch cooperative grids", d->name);
    return 0;
}

int rt_device_which(const char *which, int *arch, struct mk_err *err)
{
    int rc;

    *arch = 0;
    if (!which || !strcmp(which, "gpu"))
        return 0;
    if (strncmp(which, "host", 4) || (which[4] && which[4] != ':'))
        return gen_fail(err, MK_EINVAL, "\"%.40s\" is not a device: they are gpu, host and "
                        "host:sm_XX", which);
    if (!which[4]) {
        *arch = HOST_ARCH;
        return 0;
    }
    rc = gen_gpu_arch(which + 5, arch, err);
    return rc ? gen_fail_in(err, rc, "device %.40s", which) : 0;
}

int rt_device_open(const char *which, int index, struct rt_device **out, struct mk_err *err)
{
    struct rt_device *d;
    int rc, arch;

    *out = NULL;
    rc = rt_device_which(which, &arch, err);
    if (rc)
        return rc;
    d = calloc(1, sizeof *d);
    if (!d)
        return gen_fail(err, MK_ENOMEM, "no memory to open a GPU");
    d->host = arch;
    rc = rt_driver_open(d->host, &d->cu, err);
    if (rc == 0)
        rc = find_device(d, index, err);
    if (rc == 0)
        rc = read_facts(d, err);
    if (rc == 0) {
        rc = check(d, err, d->cu->cuDevicePrimaryCtxRetain(&d->ctx, d->dev),
                   "cuDevicePrimaryCtxRetain");
        if (rc)
            d->ctx = NULL;
    }
    if (rc == 0)
        rc = enter(d, err);
    if (rc == 0) {
        rc = check(d, err, d->cu->cuStreamCreate(&d->stream, STREAM_NON_BLOCKING),
                   "cuStreamCreate");
        if (rc)
            d->stream = NULL;
    }
    if (rc) {
        rt_device_close(d);
        return rc;
    }
    ask_clusters(d);
    *out = d;
    return 0;
}

void rt_device_close(struct rt_device *d)
{
    if (!d)
        return;
    if (d->ctx) {
        d->cu->cuCtxSetCurrent(d->ctx);
        if (d->stream)
            d->cu->cuStreamDestroy_v2(d->stream);
        d->cu->cuCtxSetCurrent(NULL);
        d->cu->cuDevicePrimaryCtxRelease_v2(d->dev);
    }
    free(d);
}

/* ---- Facts ---------------------------------------------------------------- */

void rt_device_facts(const struct rt_device *d, struct gen_gpu *out)
{
    *out = d->facts;
}

const char *rt_device_name(const struct rt_device *d)
{
    return d->name;
}

int rt_device_driver(const struct rt_device *d)
{
    return d->driver;
}

void rt_device_memory(const struct rt_device *d, size_t *free_bytes, size_t *total_bytes)
{
    if (enter(d, NULL) || d->cu->cuMemGetInfo_v2(free_bytes, total_bytes)) {
        *free_bytes = 0;
        *total_bytes = d->total;
    }
}

/* ---- The emulated device --------------------------------------------------- */

int rt_device_is_host(const struct rt_device *d)
{
    return d->host != 0;
}

void rt_device_seed(struct rt_device *d, uint64_t seed)
{
    if (d->host)
        d->cu->mkhost_seed(seed);
}

const char *rt_device_report(const struct rt_device *d)
{
    const char *text = d->host ? d->cu->mkhost_report() : NULL;

    return text ? text : "";
}

void rt_device_label(struct rt_device *d, rt_ptr base, uint64_t bytes, const char *name,
                     rt_label_fn *text, void *user)
{
    if (d->host)
        d->cu->mkhost_label(base, bytes, name, text, user);
}

/* ---- The clock ------------------------------------------------------------- */

/* NVML, the driver's management library: the only place that knows the clock of now. */
static struct {
    int tried, ok;
    int (*nvmlInit_v2)(void);
    int (*nvmlDeviceGetHandleByPciBusId_v2)(const char *bus, void **device);
    int (*nvmlDeviceGetClockInfo)(void *device, int type, unsigned *mhz);
} nvml;
static pthread_mutex_t nvml_lock = PTHREAD_MUTEX_INITIALIZER;
#define NVML_CLOCK_SM 1

static int open_nvml(void)
{
    void *lib;

    pthread_mutex_lock(&nvml_lock);
    if (!nvml.tried) {
        nvml.tried = 1;
        lib = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
        if (lib) {
            *(void **) &nvml.nvmlInit_v2 = dlsym(lib, "nvmlInit_v2");
            *(void **) &nvml.nvmlDeviceGetHandleByPciBusId_v2 =
                dlsym(lib, "nvmlDeviceGetHandleByPciBusId_v2");
            *(void **) &nvml.nvmlDeviceGetClockInfo = dlsym(lib, "nvmlDeviceGetClockInfo");
            nvml.ok = nvml.nvmlInit_v2 && nvml.nvmlDeviceGetHandleByPciBusId_v2
                      && nvml.nvmlDeviceGetClockInfo && nvml.nvmlInit_v2() == 0;
        }
    }
    pthread_mutex_unlock(&nvml_lock);
    return nvml.ok;
}

int rt_device_clock(const struct rt_device *d)
{
    void *device = NULL;
    unsigned mhz = 0;

    if (!d->bus[0] || !open_nvml() || nvml.nvmlDeviceGetHandleByPciBusId_v2(d->bus, &device)
        || nvml.nvmlDeviceGetClockInfo(device, NVML_CLOCK_SM, &mhz))
        return 0;
    return (int) mhz;
}

/* ---- Memory --------------------------------------------------------------- */

/* Put "...: N bytes (x GiB) wanted, y of z GiB free on GPU" behind an out-of-memory error. */
static int fail_memory(struct rt_device *d, int result, const char *call, size_t bytes,
                       struct mk_err *err)
{
    const double gib = 1024.0 * 1024 * 1024;
    size_t left, total;

    if (result != CU_OUT_OF_MEMORY)
        return check(d, err, result, call);
    rt_device_memory(d, &left, &total);
    return gen_fail(err, MK_ENOMEM, "%s: CUDA_ERROR_OUT_OF_MEMORY: %zu bytes (%.2f GiB) wanted, "
                    "%.2f of %.2f GiB are free on %s", call, bytes, (double) bytes / gib,
                    (double) left / gib, (double) total / gib, d->name);
}

int rt_device_alloc(struct rt_device *d, size_t bytes, rt_ptr *out, struct mk_err *err)
{
    int rc = enter(d, err);

    *out = 0;
    if (rc)
        return rc;
    rc = d->cu->cuMemAlloc_v2(out, bytes ? bytes : 1);
    if (rc) {
        *out = 0;
        return fail_memory(d, rc, "cuMemAlloc", bytes, err);
    }
    return 0;
}

void rt_device_free(struct rt_device *d, rt_ptr p)
{
    if (p && enter(d, NULL) == 0)
        d->cu->cuMemFree_v2(p);
}

int rt_device_alloc_host(struct rt_device *d, size_t bytes, void **host, rt_ptr *dev,
                         struct mk_err *err)
{
    void *p = NULL;
    int rc = enter(d, err);

    *host = NULL;
    *dev = 0;
    if (rc)
        return rc;
    rc = d->cu->cuMemHostAlloc(&p, bytes ? bytes : 1, HOSTALLOC_PORTABLE | HOSTALLOC_DEVICEMAP);
    if (rc == CU_OUT_OF_MEMORY)
        return gen_fail(err, MK_ENOMEM, "cuMemHostAlloc: CUDA_ERROR_OUT_OF_MEMORY: %zu bytes of "
                        "page-locked host memory wanted", bytes);
    if (rc)
        return check(d, err, rc, "cuMemHostAlloc");
    rc = check(d, err, d->cu->cuMemHostGetDevicePointer_v2(dev, p, 0), "cuMemHostGetDevicePointer");
    if (rc) {
        d->cu->cuMemFreeHost(p);
        *dev = 0;
        return rc;
    }
    *host = p;
    return 0;
}

void rt_device_free_host(struct rt_device *d, void *host)
{
    if (host && enter(d, NULL) == 0)
        d->cu->cuMemFreeHost(host);
}

int rt_device_put(struct rt_device *d, rt_ptr dst, const void *src, size_t bytes,
                  struct mk_err *err)
{
    int rc = enter(d, err);

    if (rc || !bytes)
        return rc;
    return check(d, err, d->cu->cuMemcpyHtoDAsync_v2(dst, src, bytes, d->stream),
                 "cuMemcpyHtoDAsync");
}

int rt_device_get(struct rt_device *d, void *dst, rt_ptr src, size_t bytes, struct mk_err *err)
{
    int rc = enter(d, err);

    if (rc || !bytes)
        return rc;
    return check(d, err, d->cu->cuMemcpyDtoHAsync_v2(dst, src, bytes, d->stream),
                 "cuMemcpyDtoHAsync");
}

int rt_device_set(struct rt_device *d, rt_ptr dst, unsigned char value, size_t bytes,
                  struct mk_err *err)
{
    int rc = enter(d, err);

    if (rc || !bytes)
        return rc;
    return check(d, err, d->cu->cuMemsetD8Async(dst, value, bytes, d->stream), "cuMemsetD8Async");
}

int rt_device_sync(struct rt_device *d, struct mk_err *err)
{
    int rc = enter(d, err);

    return rc ? rc : check(d, err, d->cu->cuStreamSynchronize(d->stream), "cuStreamSynchronize");
}

/* ---- Modules and launches --------------------------------------------------- */

/* A little-endian number of N bytes, as ELF files have them. */
static uint64_t number(const unsigned char *p, int n)
{
    uint64_t x = 0;

    while (n--)
        x = x << 8 | p[n];
    return x;
}

/* Are the N headers of STEP bytes at byte AT of a file of SIZE bytes, and the bytes that they
   speak of (their offset at byte WHERE of the header, their length at WHERE + LENGTH), inside
   the file?  A header whose 32 bits at byte KIND equal NONE speaks of no bytes. */
static int table_fits(const unsigned char *p, size_t size, uint64_t at, uint64_t n, size_t step,
                      int where, int length, int kind, uint64_t none)
{
    if (at > size || n > (size - at) / step)
        return 0;
    for (p += at; n--; p += step) {
        uint64_t offset = number(p + where, 8), bytes = number(p + where + length, 8);
        if (number(p + kind, 4) != none && (offset > size || bytes > size - offset))
            return 0;
    }
    return 1;
}

/* cuModuleLoadData is not told the size of what it reads, so look ourselves that all of the
   ELF file is there.  Offsets are those of elf(5); sections without bytes in the file are of
   type 8, SHT_NOBITS. */
static int is_whole_elf(const void *file, size_t size)
{
    const unsigned char *p = file;

    if (size < 64 || memcmp(p, "\177ELF\2\1", 6) || number(p + 58, 2) != 64
        || !table_fits(p, size, number(p + 40, 8), number(p + 60, 2), 64, 24, 8, 4, 8))
        return 0;
    return number(p + 56, 2) == 0
           || (number(p + 54, 2) == 56
               && table_fits(p, size, number(p + 32, 8), number(p + 56, 2), 56, 8, 24, 0, 0));
}

/* The architecture (90) of a cubin; 0: not a whole one.  190 is EM_CUDA. */
static int cubin_arch(const void *cubin, size_t size)
{
    const unsigned char *p = cubin;
    uint64_t flags;

    if (!is_whole_elf(cubin, size) || number(p + 18, 2) != 190)
        return 0;
    /* CUDA 13 moved the architecture up by a byte and counted the ABI version to 8. */
    flags = number(p + 48, 4);
    return p[8] >= 8 ? flags >> 8 & 255 : flags & 255;
}

/* A shared object of this machine's processor: ET_DYN is 3. */
static int load_host_module(struct rt_device *d, const void *object, size_t size, rt_module *out,
                            struct mk_err *err)
{
    const unsigned char *p = object;
    int rc;

    if (!is_whole_elf(object, size) || number(p + 16, 2) != 3 || number(p + 18, 2) == 190)
        return gen_fail(err, MK_EFORMAT, "the %zu bytes given are not a whole kernel for %s", size,
                        d->name);
    rc = d->cu->cuModuleLoadData(out, object);
    if (rc == 0)
        return 0;
    *out = NULL;
    if (rc != CU_INVALID_IMAGE)
        return check(d, err, rc, "cuModuleLoadData");
    fail_cu(d, err, MK_EUNSUPPORTED, rc, "cuModuleLoadData");
    return gen_fail_in(err, MK_EUNSUPPORTED, "%s refuses the kernel", d->name);
}

/* Does a cubin for architecture MADE run on a GPU of architecture HAVE? */
static int runs_on(int made, int have)
{
    return made / 10 == have / 10 && made <= have;
}

int rt_module_load(struct rt_device *d, const void *cubin, size_t size, rt_module *out,
                   struct mk_err *err)
{
    int arch = d->host ? 0 : cubin_arch(cubin, size);
    int have = d->facts.arch;
    int rc = enter(d, err);

    *out = NULL;
    if (rc)
        return rc;
    if (d->host)
        return load_host_module(d, cubin, size, out, err);
    if (!arch)
        return gen_fail(err, MK_EFORMAT, "the %zu bytes given are not a whole cubin", size);
    if (!runs_on(arch, have))
        return gen_fail(err, MK_EUNSUPPORTED, "the cubin is for sm_%d and does not run on %s, "
                        "which is sm_%d", arch, d->name, have);
    rc = d->cu->cuModuleLoadData(out, cubin);
    if (rc == 0)
        return 0;
    *out = NULL;
    if (rc == CU_INVALID_IMAGE || rc == CU_NO_BINARY_FOR_GPU || rc == CU_INVALID_PTX
        || rc == CU_UNSUPPORTED_PTX_VERSION) {
        fail_cu(d, err, MK_EUNSUPPORTED, rc, "cuModuleLoadData");
        return gen_fail_in(err, MK_EUNSUPPORTED, "the driver (for CUDA %d.%d) refuses the cubin "
                           "for sm_%d; it may be older than the compiler that made it",
                           d->driver / 1000, d->driver % 1000 / 10, arch);
    }
    return check(d, err, rc, "cuModuleLoadData");
}

void rt_module_free(struct rt_device *d, rt_module m)
{
    if (m && enter(d, NULL) == 0)
        d->cu->cuModuleUnload(m);
}

int rt_module_func(struct rt_device *d, rt_module m, const char *name, int smem, rt_func *out,
                   struct mk_err *err)
{
    int rc = enter(d, err);

    *out = NULL;
    if (rc)
        return rc;
    if (smem < 0 || smem > d->facts.smem_block)
        return gen_fail(err, MK_EDEVICE, "%s wants %d bytes of shared memory; a block has %d on %s",
                        name, smem, d->facts.smem_block, d->name);
    rc = check(d, err, d->cu->cuModuleGetFunction(out, m, name), "cuModuleGetFunction");
    if (rc == 0)
        rc = check(d, err, d->cu->cuFuncSetAttribute(*out, FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                                     smem), "cuFuncSetAttribute");
    if (rc) {
        *out = NULL;
        return gen_fail_in(err, rc, "kernel %s", name);
    }
    return 0;
}

/* A cooperative grid that does not fit at once would wait for itself for ever. */
static int check_fits(struct rt_device *d, rt_func f, int grid, int block, int smem,
                      struct mk_err *err)
{
    int per_sm = 0;
    int r = d->cu->cuOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, f, block, (size_t) smem);
    int rc = check(d, err, r, "cuOccupancyMaxActiveBlocksPerMultiprocessor");

    if (rc == 0 && grid > (int64_t) per_sm * d->facts.sms)
        rc = gen_fail(err, MK_EDEVICE, "the cooperative grid has %d blocks of %d threads and %d "
                      "bytes of shared memory; %lld such blocks fit on %s at once",
                      grid, block, smem, (long long) per_sm * d->facts.sms, d->name);
    return rc;
}

/* The same of clusters, which need SMs that are near each other. */
static int check_clusters_fit(struct rt_device *d, rt_func f, const struct launch *config,
                              int cluster, struct mk_err *err)
{
    const int grid = (int) config->grid[0];
    int n = 0, rc;

    if (d->host)
        return 0;
    rc = check(d, err, d->cu->cuOccupancyMaxActiveClusters(&n, f, config),
               "cuOccupancyMaxActiveClusters");
    if (rc == 0 && grid > (int64_t) n * cluster)
        rc = gen_fail(err, MK_EDEVICE, "the cooperative grid has %d clusters of %d blocks of %u "
                      "threads and %u bytes of shared memory; %d such clusters fit on %s at once",
                      grid / cluster, cluster, config->block[0], config->smem, n, d->name);
    return rc;
}

static int check_sizes(int grid, int block, int smem, int cluster, struct mk_err *err)
{
    if (cluster < 0 || (cluster && grid % cluster))
        return gen_fail(err, MK_EINVAL, "cannot launch %d blocks in clusters of %d", grid, cluster);
    if (grid >= 1 && block >= 1 && smem >= 0)
        return 0;
    return gen_fail(err, MK_EINVAL, "cannot launch %d blocks of %d threads with %d bytes of "
                    "shared memory", grid, block, smem);
}

/* The outcome RESULT of CALL. */
static int check_launch(const struct rt_device *d, int result, const char *call, int grid,
                        int block, int smem, struct mk_err *err)
{
    int rc = check(d, err, result, call);

    if (rc == 0)
        return 0;
    return gen_fail_in(err, rc, "%d blocks of %d threads and %d bytes of shared memory",
                       grid, block, smem);
}

static int launch_clusters(struct rt_device *d, rt_func f, int grid, int block, int smem,
                           int cooperative, int cluster, void **params, struct mk_err *err)
{
    const struct launch_attribute attributes[] = {
        { .id = LAUNCH_CLUSTER_DIMENSION, .value.cluster = { (unsigned) cluster, 1, 1 } },
        { .id = LAUNCH_COOPERATIVE, .value.cooperative = 1 },
    };
    const struct launch config = {
        .grid = { (unsigned) grid, 1, 1 }, .block = { (unsigned) block, 1, 1 },
        .smem = (unsigned) smem, .stream = d->stream, .attributes = attributes,
        .n_attributes = cooperative ? 2 : 1
    };
    int rc = 0;

    if (cluster > MOST_PORTABLE_CLUSTER)
        rc = check(d, err, d->cu->cuFuncSetAttribute(f, FUNC_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1),
                   "cuFuncSetAttribute");
    if (rc == 0 && cooperative)
        rc = check_clusters_fit(d, f, &config, cluster, err);
    if (rc)
        return rc;
    rc = d->cu->cuLaunchKernelEx(&config, f, params, NULL);
    return check_launch(d, rc, "cuLaunchKernelEx", grid, block, smem, err);
}

int rt_launch(struct rt_device *d, rt_func f, int grid, int block, int smem, int cooperative,
              int cluster, void **params, struct mk_err *err)
{
    const char *call = cooperative ? "cuLaunchCooperativeKernel" : "cuLaunchKernel";
    unsigned g = (unsigned) grid, b = (unsigned) block, s = (unsigned) smem;
    int rc = check_sizes(grid, block, smem, cluster, err);

    if (rc == 0)
        rc = enter(d, err);
    if (rc == 0 && cluster > 1)
        return launch_clusters(d, f, grid, block, smem, cooperative, cluster, params, err);
    if (rc == 0 && cooperative)
        rc = check_fits(d, f, grid, block, smem, err);
    if (rc)
        return rc;
    if (cooperative)
        rc = d->cu->cuLaunchCooperativeKernel(f, g, 1, 1, b, 1, 1, s, d->stream, params);
    else
        rc = d->cu->cuLaunchKernel(f, g, 1, 1, b, 1, 1, s, d->stream, params, NULL);
    return check_launch(d, rc, call, grid, block, smem, err);
}

/* ---- Events --------------------------------------------------------------- */

int rt_event_make(struct rt_device *d, rt_event *out, struct mk_err *err)
{
    int rc = enter(d, err);

    *out = NULL;
    if (rc)
        return rc;
    rc = check(d, err, d->cu->cuEventCreate(out, 0), "cuEventCreate");
    if (rc)
        *out = NULL;
    return rc;
}

void rt_event_free(struct rt_device *d, rt_event e)
{
    if (e && enter(d, NULL) == 0)
        d->cu->cuEventDestroy_v2(e);
}

int rt_event_record(struct rt_device *d, rt_event e, struct mk_err *err)
{
    int rc = enter(d, err);

    return rc ? rc : check(d, err, d->cu->cuEventRecord(e, d->stream), "cuEventRecord");
}

int rt_event_done(struct rt_device *d, rt_event e, struct mk_err *err)
{
    int rc = enter(d, err);

    if (rc)
        return rc;
    rc = d->cu->cuEventQuery(e);
    if (rc == CU_NOT_READY)
        return 0;
    return rc ? check(d, err, rc, "cuEventQuery") : 1;
}

int rt_event_ms(struct rt_device *d, rt_event a, rt_event b, float *ms, struct mk_err *err)
{
    int rc = enter(d, err);

    if (rc == 0)
        rc = check(d, err, d->cu->cuEventSynchronize(b), "cuEventSynchronize");
    if (rc == 0)
        rc = check(d, err, d->cu->cuEventElapsedTime(ms, a, b), "cuEventElapsedTime");
    return rc;
}
