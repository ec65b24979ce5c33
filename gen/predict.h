/* predict.h - how long decode will take: a plan and a position -> cycles of every stage.  Pure
   arithmetic over the plan and the tables of constants in predict.c, each measured or fitted. */
#ifndef GEN_PREDICT_H
#define GEN_PREDICT_H
#include <stdio.h>

#include "gen/plan.h"
#include "runtime/abi.h"

/* Kinds of CTAs, as mkbench --stages has them: of groups with KV heads, of others. */
enum { GEN_WITH_HEADS, GEN_OTHERS, GEN_KINDS };

struct gen_prediction {
    /* Cycles of a token, all layers together, waiting counted in: means over the CTAs of a kind.
       The stages of a kind add up to TOKEN; a kind without CTAs has zeros. */
    double cycles[GEN_KINDS][MK_LAP_COUNT];
    double waited[GEN_KINDS][MK_LAP_COUNT]; /* of these, for weights and KV tiles */
    int ctas[GEN_KINDS];
    double token; /* cycles */
    double token_us;
    double floor_us; /* to read the weights and the KV rows at READ_GBPS */
    double clock_mhz, read_gbps;
    int measured;     /* 1: the constants are this GPU's; 0: FROM's, as far as they carry over */
    const char *from; /* profile that the constants were measured on */
};

/* Predict the token at position POS (0 .. context - 1) of greedy decode. */
void gen_predict(const struct gen_plan *p, int pos, struct gen_prediction *out);

/* The name of stage LAP; and 1 when it is a layer's, 0 when it comes once in a token. */
const char *gen_stage_name(int lap);
int gen_stage_is_layer(int lap);

/* Section [predicted] of --dump-plan. */
void gen_predict_dump(FILE *f, const struct gen_plan *p);
#endif
