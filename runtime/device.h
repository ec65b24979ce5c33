/* device.h - a GPU through the CUDA driver, or one that libmkhost emulates on the CPU.  Both
   libraries are opened at run time; no CUDA header is needed to build. */
#ifndef RT_DEVICE_H
#define RT_DEVICE_H
#include <stddef.h>
#include <stdint.h>
#include "gen/gpu.h"

typedef uint64_t rt_ptr;            /* CUdeviceptr: an address in device memory */
typedef struct rt_cumod *rt_module; /* CUmodule */
typedef struct rt_cufn *rt_func;    /* CUfunction */
typedef struct rt_cuev *rt_event;   /* CUevent */

struct rt_device;                   /* one opened GPU: primary context and one stream */

/* Open a device.  WHICH:
   "gpu", NULL   GPU number INDEX of the driver $MK_CUDA_DRIVER, or libcuda.so.1
   "host"        the emulated device (INDEX is not looked at) of sm_90, or, as "host:sm_75", of
                 another architecture; of libmkhost.so, which is $MK_HOST_DRIVER, or in the
                 folder of libmk.so or the program, or near it
   Returns 0, MK_ENOGPU (no driver, one older than CUDA 12.0, no GPU, or one older than
   sm_75; no libmkhost.so; the text says which), MK_EDEVICE, MK_ENOMEM, and as
   rt_device_which. */
int rt_device_open(const char *which, int index, struct rt_device **out, struct mk_err *err);
void rt_device_close(struct rt_device *d);

/* Is WHICH a device for rt_device_open?  *ARCH: the architecture to be emulated, 0: a GPU.
   Returns 0, MK_EINVAL, MK_EUNSUPPORTED (an architecture that we do not know). */
int rt_device_which(const char *which, int *arch, struct mk_err *err);

/* Facts as the plan wants them; name is the profile-like name ("NVIDIA H200" -> "nvidia-h200").
   Clusters are 0 where there are none, and where the driver cannot compile the kernel that it
   counts them for. */
void rt_device_facts(const struct rt_device *d, struct gen_gpu *out);
const char *rt_device_name(const struct rt_device *d);      /* "NVIDIA H200" */
int rt_device_driver(const struct rt_device *d);            /* 13000 for CUDA 13.0 */
void rt_device_memory(const struct rt_device *d, size_t *free_bytes, size_t *total_bytes);
int rt_device_clock(const struct rt_device *d);     /* SM clock now, MHz, from NVML; else 0 */

/* The emulated device.  On a GPU these do nothing, and the report is "". */
int rt_device_is_host(const struct rt_device *d);
/* The schedule of the next launches; 0, the default: round robin, and stores seen at once. */
void rt_device_seed(struct rt_device *d, uint64_t seed);
/* What the last failure was, in many lines; "" when there was none.  Good until the next call. */
const char *rt_device_report(const struct rt_device *d);
/* In reports BYTES bytes at BASE are called NAME (it must stay), and TEXT, if not NULL, says what
   lies at an offset of them: up to SIZE bytes of text in OUT.  BYTES 0: forget what begins
   at BASE. */
typedef void rt_label_fn(void *user, uint64_t offset, char *out, size_t size);
void rt_device_label(struct rt_device *d, rt_ptr base, uint64_t bytes, const char *name,
                     rt_label_fn *text, void *user);

/* Everything below: 0 or MK_EDEVICE / MK_ENOMEM, err->text names the driver call and its
   error name.  Calls may come from any thread (each sets the context current). */
int rt_device_alloc(struct rt_device *d, size_t bytes, rt_ptr *out, struct mk_err *err);
void rt_device_free(struct rt_device *d, rt_ptr p);         /* 0 is fine */
/* Page-locked host memory that the device sees at *dev; host and device share it. */
int rt_device_alloc_host(struct rt_device *d, size_t bytes, void **host, rt_ptr *dev,
                         struct mk_err *err);
void rt_device_free_host(struct rt_device *d, void *host);
/* Asynchronous on the device's stream.  Host memory may be pageable: then put returns when
   SRC has been read, and get when DST has been written. */
int rt_device_put(struct rt_device *d, rt_ptr dst, const void *src, size_t bytes,
                  struct mk_err *err);
int rt_device_get(struct rt_device *d, void *dst, rt_ptr src, size_t bytes, struct mk_err *err);
int rt_device_set(struct rt_device *d, rt_ptr dst, unsigned char value, size_t bytes,
                  struct mk_err *err);
int rt_device_sync(struct rt_device *d, struct mk_err *err);

/* Load a cubin (an emulated device: a shared object); MK_EUNSUPPORTED when it is for another
   architecture or newer than the driver, MK_EFORMAT when it is not a whole one. */
int rt_module_load(struct rt_device *d, const void *cubin, size_t size, rt_module *out,
                   struct mk_err *err);
void rt_module_free(struct rt_device *d, rt_module m);
/* A kernel by name, allowed SMEM bytes of dynamic shared memory. */
int rt_module_func(struct rt_device *d, rt_module m, const char *name, int smem, rt_func *out,
                   struct mk_err *err);
/* Launch; COOPERATIVE: the whole grid must be resident (checked before: MK_EDEVICE with both
   numbers).  CLUSTER: 0 or 1, or the blocks of a cluster, which reach each other's shared memory;
   GRID is a multiple of it.  PARAMS: one pointer per kernel parameter.  Also MK_EINVAL: sizes
   below 1. */
int rt_launch(struct rt_device *d, rt_func f, int grid, int block, int smem, int cooperative,
              int cluster, void **params, struct mk_err *err);

int rt_event_make(struct rt_device *d, rt_event *out, struct mk_err *err);
void rt_event_free(struct rt_device *d, rt_event e);
int rt_event_record(struct rt_device *d, rt_event e, struct mk_err *err);
/* 1: what was recorded before E is done; 0: still running; negative: failed. */
int rt_event_done(struct rt_device *d, rt_event e, struct mk_err *err);
/* Blocks until B happened; milliseconds from A to B. */
int rt_event_ms(struct rt_device *d, rt_event a, rt_event b, float *ms, struct mk_err *err);
#endif
