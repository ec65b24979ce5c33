/* carried.c - plan files that lie beside carried models: models/NAME/GPU.plan. */
#include "config.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "gen/gen.h"

/* What a kernel depends on, but for the name. */
static int same_shape(const struct gen_model *a, const struct gen_model *b)
{
    return a->D == b->D && a->H == b->H && a->K == b->K && a->E == b->E && a->F == b->F &&
           a->V == b->V && a->L == b->L && a->tied == b->tied && a->qk_norm == b->qk_norm &&
           a->qkv_bias == b->qkv_bias;
}

void gen_plan_file_name(const struct gen_gpu *g, char *out, size_t size)
{
    static const char maker[] = "nvidia-";
    const size_t skip = strncmp(g->name, maker, sizeof maker - 1) ? 0 : sizeof maker - 1;

    snprintf(out, size, "%s.plan", g->name + skip);
}

/* Is FOLDER/NAME a model of M's shape with a plan FILE, whose path then is in OUT? */
static int fits(const char *folder, const char *name, const char *file, const struct gen_model *m,
                char *out, size_t size)
{
    char config[GEN_PATH];
    struct gen_model carried;
    struct stat st;

    return snprintf(out, size, "%s/%s/%s", folder, name, file) < (int)size && stat(out, &st) == 0 &&
           snprintf(config, sizeof config, "%s/%s/config.json", folder, name) < (int)sizeof config &&
           stat(config, &st) == 0 && gen_model_read(config, &carried, NULL) == 0 &&
           same_shape(&carried, m);
}

int gen_plan_carried(const struct gen_model *m, const struct gen_gpu *g, char *out, size_t size)
{
    char folder[4096], file[64];
    int rc, found = 0;

    gen_plan_file_name(g, file, sizeof file);
    for (int p = 0; !found && (rc = gen_model_place(p, folder, sizeof folder)) >= 0; p++) {
        struct dirent **list = NULL;
        const int n = rc ? 0 : scandir(folder, &list, NULL, alphasort);

        for (int i = 0; i < n; i++) {
            if (!found && list[i]->d_name[0] != '.')
                found = fits(folder, list[i]->d_name, file, m, out, size);
            free(list[i]);
        }
        free(list);
    }
    if (!found)
        *out = 0;
    return found;
}
