/* product.h - the kernels of one model for all parts of a GPU product. */
#ifndef RT_PRODUCT_H
#define RT_PRODUCT_H
#include "gen/gen.h"

struct rt_product {
    const struct gen_model *model;
    const struct gen_gpu *gpu;      /* one part of the product */
    int context;                    /* this and the next two as for gen_plan_choose */
    const char *plan_file;
    const char *const *set;
};

/* Write the kernel of P's own GPU into the pack folder DIR, then those of the other parts of its product
   (gen_gpu_part) that are other kernels; parts whose plan is refused, for what the caller chose, are
   passed over.  The engine takes the largest that fits (rt_session_make).
   *N: how many there are.  Returns 0 or as gen_plan_choose and rt_pack_write. */
int rt_product_pack(const struct rt_product *p, const char *dir, mk_progress_fn *progress, void *user,
                    int *n, struct mk_err *err);
#endif
