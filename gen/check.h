/* check.h - the program of one token as gen_plan_check sees it; here only so that its test can
   hand in a wrong one. */
#ifndef GEN_CHECK_H
#define GEN_CHECK_H
#include "gen/plan.h"

/* Hops as the kernel has them: X twice a layer, each time with a buffer of its own. */
enum { GEN_HOP_X_O = GEN_HOP_X, GEN_HOP_X_DOWN = GEN_HOPS, GEN_USED_HOPS, GEN_NO_HOP = -1 };

/* Groups by what they have; all have heads or units, and helpers no heads. */
enum { GEN_HEADS = 1, GEN_UNITS = 2, GEN_ANY = 3, GEN_HELPS = 4, GEN_KINDS_OF_GROUPS = 8 };

/* Whom a CTA's words are for: its group; the same rank in all groups; its team's group with the head; all CTAs. */
enum gen_reach { GEN_TO_GROUP, GEN_TO_RANK, GEN_TO_TEAM, GEN_TO_ALL };
/* Who of those that send is sure to have words: some ranks, whose warps meet before; each rank;
   each warp of each rank. */
enum gen_sure { GEN_SOME_RANKS, GEN_EACH_RANK, GEN_EACH_WARP };

struct gen_hop {
    const char *name;
    int from; /* groups that send */
    int reach, sure;
    int buffers; /* tag T is sent into buffer T % buffers */
    int to;      /* groups that read, of those whom the words reach */
};

/* Tokens that have a stage, by sampler. */
enum { GEN_GREEDY = 1, GEN_SAMPLE = 2, GEN_TOP_K = 4, GEN_TOP_P = 8, GEN_ALWAYS = 15 };
enum { GEN_LAYER_TAG = -1 };
/* Launches that have a stage: those in which helpers help, or others. */
enum { GEN_NEAR = 1, GEN_FAR = 2, GEN_NEAR_FAR = 3 };

/* What a CTA does in a stage, in this order: its warps meet, if MEET; it waits for hop WAIT, sends
   SEND, waits for THEN.  It reads these, and of earlier hops those in KEEP; what warps learn from
   WAIT, only they know, but all wait for all of THEN. */
struct gen_stage {
    const char *name; /* the kernel's function; NULL behind the last one */
    int when;         /* GEN_GREEDY .. GEN_TOP_P, or'ed */
    int who;          /* GEN_HEADS or GEN_UNITS, or'ed */
    int meet;         /* 1: all warps have left the stages before when the first one sends */
    int wait, send, then, keep; /* keep: 1 << hop, or'ed */
    int tag;                    /* GEN_LAYER_TAG: of every layer; else behind the layers' tags */
    int times;                  /* so often, each time with the next tag */
    int where;                  /* GEN_NEAR .. */
};

struct gen_graph {
    struct gen_hop hops[GEN_USED_HOPS];
    const struct gen_stage *stages;
};

extern const struct gen_graph gen_graph; /* what the templates do */

/* gen_plan_check's proof about hops, for the program GRAPH.  Returns 0 or MK_EINVAL. */
int gen_graph_check(const struct gen_plan *p, const struct gen_graph *graph, struct mk_err *err);
#endif
