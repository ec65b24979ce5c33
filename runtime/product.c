/* product.c - see product.h. */
#include "config.h"

#include <stdlib.h>
#include <string.h>

#include "runtime/key.h"
#include "runtime/product.h"

enum { MOST_PARTS = 16 };

struct writing {
    const struct rt_product *product;
    struct rt_key key[MOST_PARTS];
    int n;
};

/* The kernel of part G, unless another part has the same.  Returns 0, or why there is none. */
static int add_part(struct writing *w, const struct gen_gpu *g, struct mk_err *err)
{
    const struct rt_product *p = w->product;
    struct gen_plan *plan = malloc(sizeof *plan);
    struct gen_plan_source *source = malloc(sizeof *source);
    struct rt_key *key = &w->key[w->n];
    int same = 0, rc;

    if (!plan || !source)
        rc = gen_fail(err, MK_ENOMEM, "no memory for a plan");
    else
        rc = gen_plan_choose(p->model, g, p->context, p->plan_file, p->set, plan, source, err);
    if (rc == 0)
        rc = rt_key_make(plan, g->arch, key, err);
    for (int i = 0; rc == 0 && i < w->n; i++)
        same |= !strcmp(w->key[i].params, key->params);
    if (same)
        rt_key_free(key);
    else if (rc == 0)
        w->n++;
    free(source);
    free(plan);
    return rc;
}

int rt_product_pack(const struct rt_product *p, const char *dir, mk_progress_fn *progress, void *user,
                    int *n, struct mk_err *err)
{
    struct writing w = {.product = p};
    struct gen_gpu part;
    int rc = add_part(&w, p->gpu, err);

    for (int i = 0; rc == 0 && w.n < MOST_PARTS && gen_gpu_part(p->gpu, i, &part) == 0; i++) {
        rc = add_part(&w, &part, err);
        if (rc != MK_ENOMEM)
            rc = 0;
    }
    for (int i = 0; rc == 0 && i < w.n; i++)
        rc = rt_pack_write(&w.key[i], dir, progress, user, err);
    *n = w.n;
    for (int i = 0; i < w.n; i++)
        rt_key_free(&w.key[i]);
    return rc;
}
