/* check.h - the program of one token as gen_plan_check sees it; here only so that its test can
   hand in a wrong one. */
#ifndef GEN_CHECK_H
#define GEN_CHECK_H
#include "gen/plan.h"

enum gen_step_op { GEN_SEND, GEN_WAIT };

/* The tokens that have a step: those of one attention split or of more; and by sampler. */
enum gen_step_when {
    GEN_WHOLE = 1,
    GEN_SPLIT = 2,
    GEN_GREEDY = 4,
    GEN_SAMPLE = 8,
    GEN_TOP_K = 16,
    GEN_TOP_P = 32,
    GEN_ALWAYS = 63
};

enum { GEN_LAYER_TAG = -1, GEN_MOST_STEPS = 96 };

struct gen_step {
    const char *stage; /* the kernel's function; NULL behind the last step */
    int when;          /* enum gen_step_when, or'ed */
    int op, hop;
    int tag;           /* GEN_LAYER_TAG: a step of every layer; else behind the layers' tags */
};

extern const struct gen_step gen_steps[]; /* what the templates do */

/* gen_plan_check's proof about hops, for the program STEPS (at most GEN_MOST_STEPS).  Attention
   has FEW or MANY splits, which may change from token to token.
   Returns 0, MK_EINVAL or MK_ENOMEM. */
int gen_steps_check(const struct gen_plan *p, const struct gen_step *steps, int few, int many,
                    struct mk_err *err);
#endif
