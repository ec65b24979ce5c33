/* driver.h - the functions and numbers of the CUDA driver API that we use, as of CUDA 12 and 13's cuda.h,
   from a library that is opened at run time: NVIDIA's, or libmkhost, which has the same functions
   and a few of its own.  For device.c. */
#ifndef RT_DRIVER_H
#define RT_DRIVER_H
#include "runtime/device.h"

/* Every driver function that we call, under the name that the library exports.
   CUresult is an int, CUdevice an int, the other handles are pointers. */
#define DRIVER(F)                                                                           \
    F(cuInit, (unsigned flags))                                                             \
    F(cuDriverGetVersion, (int *version))                                                   \
    F(cuGetErrorName, (int result, const char **text))                                      \
    F(cuGetErrorString, (int result, const char **text))                                    \
    F(cuDeviceGetCount, (int *n))                                                           \
    F(cuDeviceGet, (int *dev, int index))                                                   \
    F(cuDeviceGetName, (char *name, int len, int dev))                                      \
    F(cuDeviceGetPCIBusId, (char *id, int len, int dev))                                    \
    F(cuDeviceGetAttribute, (int *value, int attr, int dev))                                \
    F(cuDeviceTotalMem_v2, (size_t *bytes, int dev))                                        \
    F(cuDevicePrimaryCtxRetain, (void **ctx, int dev))                                      \
    F(cuDevicePrimaryCtxRelease_v2, (int dev))                                              \
    F(cuCtxSetCurrent, (void *ctx))                                                         \
    F(cuMemGetInfo_v2, (size_t *free_bytes, size_t *total_bytes))                           \
    F(cuMemAlloc_v2, (rt_ptr *p, size_t bytes))                                             \
    F(cuMemFree_v2, (rt_ptr p))                                                             \
    F(cuMemHostAlloc, (void **p, size_t bytes, unsigned flags))                             \
    F(cuMemHostGetDevicePointer_v2, (rt_ptr *dev, void *p, unsigned flags))                 \
    F(cuMemFreeHost, (void *p))                                                             \
    F(cuMemcpyHtoDAsync_v2, (rt_ptr dst, const void *src, size_t bytes, void *stream))      \
    F(cuMemcpyDtoHAsync_v2, (void *dst, rt_ptr src, size_t bytes, void *stream))            \
    F(cuMemsetD8Async, (rt_ptr dst, unsigned char value, size_t bytes, void *stream))       \
    F(cuStreamCreate, (void **stream, unsigned flags))                                      \
    F(cuStreamDestroy_v2, (void *stream))                                                   \
    F(cuStreamSynchronize, (void *stream))                                                  \
    F(cuModuleLoadData, (rt_module *m, const void *image))                                  \
    F(cuModuleUnload, (rt_module m))                                                        \
    F(cuModuleGetFunction, (rt_func *f, rt_module m, const char *name))                     \
    F(cuFuncSetAttribute, (rt_func f, int attr, int value))                                 \
    F(cuOccupancyMaxActiveBlocksPerMultiprocessor, (int *n, rt_func f, int block, size_t smem)) \
    F(cuLaunchKernel, (rt_func f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,       \
                       unsigned by, unsigned bz, unsigned smem, void *stream,               \
                       void **params, void **extra))                                        \
    F(cuLaunchCooperativeKernel, (rt_func f, unsigned gx, unsigned gy, unsigned gz,         \
                                  unsigned bx, unsigned by, unsigned bz, unsigned smem,     \
                                  void *stream, void **params))                             \
    F(cuLaunchKernelEx, (const struct launch *config, rt_func f, void **params,             \
                         void **extra))                                                     \
    F(cuEventCreate, (rt_event *e, unsigned flags))                                         \
    F(cuEventDestroy_v2, (rt_event e))                                                      \
    F(cuEventRecord, (rt_event e, void *stream))                                            \
    F(cuEventQuery, (rt_event e))                                                           \
    F(cuEventSynchronize, (rt_event e))                                                     \
    F(cuEventElapsedTime, (float *ms, rt_event a, rt_event b))

/* What only NVIDIA's library has: an emulated GPU takes any number of clusters. */
#define GPU(F)                                                                              \
    F(cuOccupancyMaxActiveClusters, (int *n, rt_func f, const struct launch *config))

/* What only libmkhost has. */
#define HOST(F)                                                                             \
    F(mkhost_seed, void, (uint64_t seed))                                                   \
    F(mkhost_report, const char *, (void))                                                  \
    F(mkhost_label, void, (uint64_t base, uint64_t bytes, const char *name,                 \
                           rt_label_fn *text, void *user))

enum {                                      /* CUresult */
    CU_OUT_OF_MEMORY = 2,
    CU_INVALID_IMAGE = 200,
    CU_NO_BINARY_FOR_GPU = 209,
    CU_INVALID_PTX = 218,
    CU_UNSUPPORTED_PTX_VERSION = 222,
    CU_NOT_READY = 600
};

enum {                                      /* CUdevice_attribute */
    ATTR_CLOCK_RATE = 13,                   /* kHz */
    ATTR_MULTIPROCESSOR_COUNT = 16,
    ATTR_MEMORY_CLOCK_RATE = 36,            /* kHz, two transfers each */
    ATTR_GLOBAL_MEMORY_BUS_WIDTH = 37,      /* bits */
    ATTR_L2_CACHE_SIZE = 38,
    ATTR_COMPUTE_CAPABILITY_MAJOR = 75,
    ATTR_COMPUTE_CAPABILITY_MINOR = 76,
    ATTR_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR = 81,
    ATTR_COOPERATIVE_LAUNCH = 95,
    ATTR_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97
};

enum {
    FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8, /* CUfunction_attribute */
    FUNC_NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14,
    MOST_PORTABLE_CLUSTER = 8,              /* CTAs; more need that attribute */
    STREAM_NON_BLOCKING = 1,                /* CUstream_flags */
    HOSTALLOC_PORTABLE = 1,                 /* CU_MEMHOSTALLOC_* */
    HOSTALLOC_DEVICEMAP = 2,
    LAUNCH_COOPERATIVE = 2,                 /* CUlaunchAttributeID */
    LAUNCH_CLUSTER_DIMENSION = 4
};

struct launch_attribute {                   /* CUlaunchAttribute */
    unsigned id;
    union {
        int cooperative;
        unsigned cluster[3];
        char bytes[64];
    } value __attribute__((aligned(8)));
};

struct launch {                             /* CUlaunchConfig */
    unsigned grid[3], block[3], smem;
    void *stream;
    const struct launch_attribute *attributes;
    unsigned n_attributes;
};

struct driver {
#define FIELD(name, args) int (*name) args;
#define HOST_FIELD(name, type, args) type (*name) args;
    DRIVER(FIELD)
    GPU(FIELD)
    HOST(HOST_FIELD)
#undef FIELD
#undef HOST_FIELD
};

/* The functions of libmkhost.so (HOST not 0) or of the GPU's driver, which is opened once per process and never
   closed: it does not survive that.  $MK_CUDA_DRIVER and $MK_HOST_DRIVER name other libraries.  The result is static.
   Returns 0; MK_ENOGPU when there is none, or none that is new enough: the next call tries again. */
int rt_driver_open(int host, const struct driver **cu, struct mk_err *err);
#endif
