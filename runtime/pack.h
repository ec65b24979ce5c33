/* pack.h - weights into device memory, in the order in which the kernels read them. */
#ifndef RT_PACK_H
#define RT_PACK_H
#include "gen/gen.h"
#include "runtime/device.h"
#include "runtime/weights.h"

struct rt_packed {
    rt_ptr stream;      /* plan.stream_bytes */
    rt_ptr embed;       /* untied embedding, row-major; 0 when tied */
    rt_ptr vec;         /* plan.vec_floats floats */
};

struct rt_pack_job {
    struct rt_device *device;
    rt_module module;   /* has mk_pack */
    const struct gen_plan *plan;
    const struct rt_weights *weights;
    mk_progress_fn *progress;   /* called as "load"; or NULL */
    void *user;
};

/* Device bytes that rt_pack takes for good. */
int64_t rt_packed_bytes(const struct gen_plan *p);

/* Allocate and fill *OUT.  Returns 0, MK_ENOMEM, MK_EDEVICE; *OUT is all 0 after a failure. */
int rt_pack(const struct rt_pack_job *job, struct rt_packed *out, struct mk_err *err);
void rt_packed_free(struct rt_device *d, struct rt_packed *p);
#endif
