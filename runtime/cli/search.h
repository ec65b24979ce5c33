/* search.h - mktune's search: which plans are candidates, in which order they are tried, and when
   one is better.  Each is compiled, timed and checked behind runtime/tune.h. */
#ifndef SEARCH_H
#define SEARCH_H
#include <stdio.h>
#include "runtime/cli/cli.h"
#include "runtime/tune.h"

enum { SEARCH_KNOBS = 16, SEARCH_VALUES = RT_TUNE_PLANS, SEARCH_SET = 32 };
enum { SEARCH_TEXT = 1024, SEARCH_TRIED = 4096 };

/* What is searched.  A/B: both at once.  NULL: more and fewer groups than there are. */
struct search_knob { const char *keys, *values; };

/* Knob I of those that are searched when the user names none; NULL behind the last one. */
const struct search_knob *search_knob(int i);

struct search_options {
    struct cli_list set;        /* "KEY=VALUE" that all candidates have; SEARCH_SET at most */
    struct cli_list tries;      /* choices to try first; SEARCH_VALUES at most */
    struct cli_list knobs;      /* "KEY" or "KEY=A,B"; none: all; SEARCH_KNOBS at most */
    int jobs;                   /* kernels compiled at once */
    struct rt_tune_options tune;
};

/* Zero-initialise, and fill in what is given. */
struct search {
    /* given */
    const struct search_options *o;
    struct gen_model model;
    struct rt_tune *t;
    struct rt_tune_device device;
    double start, end;          /* of the search; seconds of rt_tune_now */
    FILE *table;                /* of ROW.  NULL: the plan itself goes to standard output */
    /* Told of each plan that was run.  CHANGE: of the time of a token, from the default plan's. */
    void (*row)(const struct search *s, const char *name, const struct rt_tune_result *r,
                double change, const char *remark);

    /* found */
    char first[GEN_CHOICES];    /* "KEY=VALUE KEY=VALUE": the performance model's, of the default plan */
    char moved[SEARCH_TEXT];    /* the same of the best so far, over what the user set */
    struct gen_plan plan;       /* the best so far */
    struct rt_tune_result base, best;   /* of the default plan and of this one */
    int measured, slow, wrong, failed, better;

    /* the search's own */
    double patience;            /* seconds that a candidate may take */
    struct search_knob knob[SEARCH_KNOBS];
    int n_knobs;
    char knob_text[SEARCH_KNOBS][256];  /* behind those of --knob */
    uint64_t tried[SEARCH_TRIED];       /* digests of plans */
    int n_tried;
};

/* Make the default plan, and see what is to be searched: what is wrong with the user's choices,
   knobs and candidates is known before anything is measured.  Returns 0, or an exit status after
   printing. */
int search_prepare(struct search *s);

/* Measure the default plan, then candidates until END, which comes earlier by what is to be done
   then: if one is better, it and the default plan are measured again, and a gain that does not hold
   is none.  Returns 0 with what is found, MK_EDEVICE (the default or the best plan is wrong, or
   cannot be measured), or as rt_tune_run. */
int search_run(struct search *s, struct mk_err *err);

/* Is the key that WORD begins with one of LIST, which is choices, or "KEY KEY", or "KEY/KEY"? */
int search_has_key(const char *list, const char *word);
#endif
