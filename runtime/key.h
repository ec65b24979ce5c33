/* key.h - the key of a plan's kernel, made in one place, so that what mkgen warms or packs
   is what the engine looks for. */
#ifndef RT_KEY_H
#define RT_KEY_H
#include "gen/gen.h"
#include "runtime/cache.h"

/* Fill *KEY for PLAN compiled for ARCH.  Needs neither a GPU nor a compiler nor m4.  Free with
   rt_key_free, also on failure.  The strings are KEY's own; PLAN may go.
   Returns 0 or MK_ENOMEM. */
int rt_key_make(const struct gen_plan *plan, int arch, struct rt_key *key, struct mk_err *err);
void rt_key_free(struct rt_key *key);
#endif
