/* fake-cuda.c - a driver library without a GPU, for the tests: libfakecuda.so is chosen with
   $MK_CUDA_DRIVER.  Device memory is host memory, and a launch does nothing.  What
   it pretends is read from $FAKE_CUDA at every call, "key=value" with commas between:

     driver=13000   devices=1   arch=90   sms=4   memory=1073741824   coop=1
     fit=1          blocks that one SM holds
     clusters=0     clusters of any size that fit at once
     busy=0         1: the stream is not done
     NAME=CODE      the function NAME returns CODE, for example cuInit=999

   fake_cuda_live counts what was made and not freed, fake_launch is the last launch with
   attributes.  It is libmkhost too: fake_host is what it was told last. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#pragma GCC visibility push(default)    /* the build hides symbols */

#define OUT_OF_MEMORY 2
#define NO_DEVICE 100
#define INVALID_DEVICE 101
#define NOT_FOUND 500
#define NOT_READY 600

int fake_cuda_live;
char fake_host[256], fake_launch[256];
static size_t used;

static long long setting(const char *key, long long absent)
{
    const char *p = getenv("FAKE_CUDA");
    size_t n = strlen(key);

    while (p && *p) {
        if (!strncmp(p, key, n) && p[n] == '=')
            return atoll(p + n + 1);
        p = strchr(p, ',');
        p = p ? p + 1 : NULL;
    }
    return absent;
}

/* Return the code that $FAKE_CUDA plants in this function, if it does. */
#define PLANTED(name)                                                       \
    do {                                                                    \
        int code_ = (int) setting(#name, 0);                                \
        if (code_)                                                          \
            return code_;                                                   \
    } while (0)

int cuGetErrorName(int result, const char **text)
{
    switch (result) {
    case OUT_OF_MEMORY: *text = "CUDA_ERROR_OUT_OF_MEMORY"; break;
    case NO_DEVICE: *text = "CUDA_ERROR_NO_DEVICE"; break;
    case INVALID_DEVICE: *text = "CUDA_ERROR_INVALID_DEVICE"; break;
    case 200: *text = "CUDA_ERROR_INVALID_IMAGE"; break;
    case NOT_FOUND: *text = "CUDA_ERROR_NOT_FOUND"; break;
    case 701: *text = "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"; break;
    case 719: *text = "CUDA_ERROR_LAUNCH_FAILED"; break;
    default: *text = NULL; return 1;
    }
    return 0;
}

int cuGetErrorString(int result, const char **text)
{
    (void) result;
    *text = "said the fake";
    return 0;
}

int cuInit(unsigned flags)
{
    PLANTED(cuInit);
    return flags ? 1 : 0;
}

int cuDriverGetVersion(int *version)
{
    *version = (int) setting("driver", 13000);
    return 0;
}

int cuDeviceGetCount(int *n)
{
    *n = (int) setting("devices", 1);
    return 0;
}

int cuDeviceGet(int *dev, int index)
{
    *dev = index;
    return index < setting("devices", 1) ? 0 : INVALID_DEVICE;
}

int cuDeviceGetName(char *name, int len, int dev)
{
    snprintf(name, (size_t) len, "Fake GPU (%d) X%d", dev, dev);
    return 0;
}

int cuDeviceGetPCIBusId(char *id, int len, int dev)
{
    snprintf(id, (size_t) len, "ffff:%02x:00.0", dev);
    return 0;
}

int cuDeviceGetAttribute(int *value, int attr, int dev)
{
    int arch = (int) setting("arch", 90);

    (void) dev;
    switch (attr) {
    case 13: *value = 1980000; break;
    case 16: *value = (int) setting("sms", 4); break;
    case 36: *value = 3201000; break;
    case 37: *value = 6144; break;
    case 38: *value = 62914560; break;
    case 75: *value = arch / 10; break;
    case 76: *value = arch % 10; break;
    case 81: *value = 233472; break;
    case 95: *value = (int) setting("coop", 1); break;
    case 97: *value = 232448; break;
    default: return 1;
    }
    return 0;
}

int cuDeviceTotalMem_v2(size_t *bytes, int dev)
{
    (void) dev;
    *bytes = (size_t) setting("memory", 1 << 30);
    return 0;
}

int cuDevicePrimaryCtxRetain(void **ctx, int dev)
{
    (void) dev;
    PLANTED(cuDevicePrimaryCtxRetain);
    *ctx = &fake_cuda_live;
    fake_cuda_live++;
    return 0;
}

int cuDevicePrimaryCtxRelease_v2(int dev)
{
    (void) dev;
    fake_cuda_live--;
    return 0;
}

int cuCtxSetCurrent(void *ctx)
{
    PLANTED(cuCtxSetCurrent);
    return !ctx || ctx == &fake_cuda_live ? 0 : 1;
}

int cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes)
{
    cuDeviceTotalMem_v2(total_bytes, 0);
    *free_bytes = *total_bytes - used;
    return 0;
}

/* Blocks of memory carry their size in front. */
static int take(void **p, size_t bytes, size_t limit)
{
    size_t *block;

    if (bytes > limit)
        return OUT_OF_MEMORY;
    block = malloc(16 + bytes);
    if (!block)
        return OUT_OF_MEMORY;
    *block = bytes;
    *p = (char *) block + 16;
    fake_cuda_live++;
    return 0;
}

int cuMemAlloc_v2(uint64_t *p, size_t bytes)
{
    size_t left, total;
    void *block;
    int rc;

    cuMemGetInfo_v2(&left, &total);
    rc = take(&block, bytes, left);
    if (rc)
        return rc;
    used += bytes;
    *p = (uint64_t) (uintptr_t) block;
    return 0;
}

int cuMemFree_v2(uint64_t p)
{
    char *block = (char *) (uintptr_t) p - 16;

    used -= *(size_t *) (void *) block;
    fake_cuda_live--;
    free(block);
    return 0;
}

int cuMemHostAlloc(void **p, size_t bytes, unsigned flags)
{
    PLANTED(cuMemHostAlloc);
    return flags == 3 ? take(p, bytes, (size_t) 1 << 30) : 1;
}

int cuMemHostGetDevicePointer_v2(uint64_t *dev, void *p, unsigned flags)
{
    PLANTED(cuMemHostGetDevicePointer);
    *dev = (uint64_t) (uintptr_t) p;
    return flags ? 1 : 0;
}

int cuMemFreeHost(void *p)
{
    fake_cuda_live--;
    free((char *) p - 16);
    return 0;
}

int cuMemcpyHtoDAsync_v2(uint64_t dst, const void *src, size_t bytes, void *stream)
{
    PLANTED(cuMemcpyHtoDAsync);
    memcpy((void *) (uintptr_t) dst, src, bytes);
    return stream ? 0 : 1;
}

int cuMemcpyDtoHAsync_v2(void *dst, uint64_t src, size_t bytes, void *stream)
{
    PLANTED(cuMemcpyDtoHAsync);
    memcpy(dst, (const void *) (uintptr_t) src, bytes);
    return stream ? 0 : 1;
}

int cuMemsetD8Async(uint64_t dst, unsigned char value, size_t bytes, void *stream)
{
    PLANTED(cuMemsetD8Async);
    memset((void *) (uintptr_t) dst, value, bytes);
    return stream ? 0 : 1;
}

int cuStreamCreate(void **stream, unsigned flags)
{
    PLANTED(cuStreamCreate);
    *stream = &used;
    fake_cuda_live++;
    return flags == 1 ? 0 : 1;
}

int cuStreamDestroy_v2(void *stream)
{
    fake_cuda_live--;
    return stream == &used ? 0 : 1;
}

int cuStreamSynchronize(void *stream)
{
    PLANTED(cuStreamSynchronize);
    return stream == &used ? 0 : 1;
}

int cuModuleLoadData(void **module, const void *image)
{
    PLANTED(cuModuleLoadData);
    *module = (void *) (uintptr_t) image;
    fake_cuda_live++;
    return 0;
}

int cuModuleUnload(void *module)
{
    (void) module;
    fake_cuda_live--;
    return 0;
}

int cuModuleGetFunction(void **f, void *module, const char *name)
{
    *f = module;
    return strncmp(name, "mk_", 3) ? NOT_FOUND : 0;
}

int cuFuncSetAttribute(void *f, int attr, int value)
{
    PLANTED(cuFuncSetAttribute);
    return f && (attr == 8 || attr == 14) && value >= 0 ? 0 : 1;
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, void *f, int block, size_t smem)
{
    (void) smem;
    *n = (int) setting("fit", 1);
    return f && block > 0 ? 0 : 1;
}

int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned smem, void *stream, void **params, void **extra)
{
    (void) smem;
    PLANTED(cuLaunchKernel);
    return f && gx && gy == 1 && gz == 1 && bx && by == 1 && bz == 1 && stream == &used
           && params && !extra ? 0 : 1;
}

int cuLaunchCooperativeKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                              unsigned by, unsigned bz, unsigned smem, void *stream,
                              void **params)
{
    PLANTED(cuLaunchCooperativeKernel);
    return cuLaunchKernel(f, gx, gy, gz, bx, by, bz, smem, stream, params, NULL);
}

struct launch {
    unsigned grid[3], block[3], smem;
    void *stream;
    const struct {
        unsigned id, pad;
        unsigned value[16];
    } *attributes;
    unsigned n_attributes;
};

int cuLaunchKernelEx(const struct launch *c, void *f, void **params, void **extra)
{
    int n;

    PLANTED(cuLaunchKernelEx);
    n = snprintf(fake_launch, sizeof fake_launch, "%u x %u, %u bytes", c->grid[0], c->block[0],
                 c->smem);
    for (unsigned i = 0; i < c->n_attributes && n < (int) sizeof fake_launch; i++)
        n += snprintf(fake_launch + n, sizeof fake_launch - (size_t) n, ", %u = %u",
                      c->attributes[i].id, c->attributes[i].value[0]);
    return f && c->stream == &used && params && !extra ? 0 : 1;
}

int cuOccupancyMaxActiveClusters(int *n, void *f, const struct launch *c)
{
    PLANTED(cuOccupancyMaxActiveClusters);
    *n = (int) setting("clusters", 0);
    return f && c->n_attributes && c->attributes[0].id == 4 ? 0 : 1;
}

int cuEventCreate(void **e, unsigned flags)
{
    PLANTED(cuEventCreate);
    *e = malloc(1);
    fake_cuda_live++;
    return flags ? 1 : 0;
}

int cuEventDestroy_v2(void *e)
{
    free(e);
    fake_cuda_live--;
    return 0;
}

int cuEventRecord(void *e, void *stream)
{
    PLANTED(cuEventRecord);
    return e && stream == &used ? 0 : 1;
}

int cuEventQuery(void *e)
{
    PLANTED(cuEventQuery);
    return !e ? 1 : setting("busy", 0) ? NOT_READY : 0;
}

int cuEventSynchronize(void *e)
{
    PLANTED(cuEventSynchronize);
    return e ? 0 : 1;
}

int cuEventElapsedTime(float *ms, void *a, void *b)
{
    *ms = 1.5f;
    return a && b ? 0 : 1;
}

void mkhost_seed(uint64_t seed)
{
    snprintf(fake_host, sizeof fake_host, "seed %llu", (unsigned long long) seed);
}

const char *mkhost_report(void)
{
    return setting("report", 0) ? "two\nlines" : "";
}

void mkhost_label(uint64_t base, uint64_t bytes, const char *name,
                  void (*text)(void *user, uint64_t offset, char *out, size_t size), void *user)
{
    char what[64] = "";

    if (text)
        text(user, 5, what, sizeof what);
    snprintf(fake_host, sizeof fake_host, "label %llu %llu %s: %s", (unsigned long long) base,
             (unsigned long long) bytes, name, what);
}
