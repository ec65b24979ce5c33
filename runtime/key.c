/* key.c - plan -> cache key. */
#include "config.h"
#include <stdlib.h>
#include <string.h>
#include "runtime/cxx.h"
#include "runtime/key.h"
#include "runtime/nvrtc.h"

int rt_key_make(const struct gen_plan *plan, int arch, struct rt_key *key, struct mk_err *err)
{
    memset(key, 0, sizeof(*key));
    key->arch = arch;
    key->host = plan->gpu.host;
    key->templates = gen_templates_digest();
    key->version = PACKAGE_VERSION;
    key->name = strdup(plan->model.name);
    key->params = gen_plan_params(plan);
    key->options = key->host ? rt_cxx_options() : rt_nvrtc_options(arch);
    if (key->name && key->params && key->options)
        return 0;
    rt_key_free(key);
    return gen_fail(err, MK_ENOMEM, "not enough memory for the key of a kernel");
}

void rt_key_free(struct rt_key *key)
{
    if (!key)
        return;
    free((char *) key->name);
    free((char *) key->params);
    free((char *) key->options);
    memset(key, 0, sizeof(*key));
}
