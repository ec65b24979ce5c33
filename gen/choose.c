/* choose.c - the plan of one who chooses nothing: the carried one, or the one that is predicted to be fastest. */
#include "config.h"

#include <stdio.h>
#include <string.h>

#include "gen/gen.h"

/* ---- What is predicted to be fastest ---------------------------------------- */

/* Choices whose effect predictions tell well (NOTEBOOK.md has them beside measurements); those on which others
   depend come first.  Groups that are clusters stay as the rules make them: parts of a product hold other numbers of
   clusters of each size, and packs, like an engine without a compiler, count down those of one size. */
static const struct {
    const char *key;
    int values[5];
    int l2_only;
} knobs[] = {
    {"group", {2, 4, 8, 16}, 1},
    {"chunk_bytes", {8192, 16384, 24576, 32768, 40960}, 0},
    {"balance", {15, 30, 60, 100, 200}, 0},
};
enum { KNOBS = sizeof knobs / sizeof *knobs, VALUES = 5 };

/* A choice must be predicted to be so much faster than what it replaces: less says nothing. */
static const double LEAST_GAIN = 0.03;
/* Where: in a conversation that has gone on for a while, in the midst of a tile of positions. */
enum { POSITION = 1056 };

struct choices {
    char item[KNOBS][24]; /* KEY=VALUE */
    int n;
};

/* The time of a token of the plan with these choices, in microseconds; 0: there is no such plan. */
static double token_us(const struct gen_model *m, const struct gen_gpu *g, int context,
                       const struct choices *c)
{
    const char *set[KNOBS + 1];
    struct gen_prediction at;
    struct gen_plan p;

    for (int i = 0; i < c->n; i++)
        set[i] = c->item[i];
    set[c->n] = NULL;
    if (gen_plan_make(m, g, context, NULL, set, &p, NULL))
        return 0;
    gen_predict(&p, POSITION < p.context ? POSITION : p.context - 1, &at);
    return at.token_us;
}

/* Add the best value of knob K to C, whose tokens take *US, if it is worth it. */
static void take_best(const struct gen_model *m, const struct gen_gpu *g, int context, int k,
                      struct choices *c, double *us)
{
    const double enough = *us * (1 - LEAST_GAIN);
    struct choices with = *c;

    with.n++;
    for (int i = 0; i < VALUES && knobs[k].values[i]; i++) {
        double other;

        snprintf(with.item[c->n], sizeof *with.item, "%s=%d", knobs[k].key, knobs[k].values[i]);
        other = token_us(m, g, context, &with);
        if (other && other <= enough && other < *us) {
            memcpy(c->item[c->n], with.item[c->n], sizeof *c->item);
            *us = other;
        }
    }
    if (*us <= enough)
        c->n++;
}

/* What a CPU takes nobody has predicted: none for an emulated GPU. */
static struct choices predicted(const struct gen_plan *rules)
{
    const struct gen_model *m = &rules->model;
    const struct gen_gpu *g = &rules->gpu;
    struct choices c = {.n = 0};
    double us = g->host ? 0 : token_us(m, g, rules->context, &c);

    for (int k = 0; us && k < KNOBS; k++)
        if (!rules->cluster || !knobs[k].l2_only)
            take_best(m, g, rules->context, k, &c, &us);
    return c;
}

/* ---- The choice --------------------------------------------------------------- */

/* Does SET choose anything that makes a kernel faster or slower?  Clocks do not: they measure it. */
static int chooses(const char *const *set)
{
    for (; set && *set; set++)
        if (strncmp(*set, "timing=", 7))
            return 1;
    return 0;
}

/* The plan that is predicted to be fastest, with the clocks of SET; its choices to TEXT. */
static int make_predicted(const struct gen_model *m, const struct gen_gpu *g, int context,
                          const char *const *set, struct gen_plan *out, char text[GEN_CHOICES],
                          struct mk_err *err)
{
    const char *list[KNOBS + 2];
    struct choices c;
    size_t at = 0;
    int rc = gen_plan_make(m, g, context, NULL, set, out, err), n = 0;

    if (rc)
        return rc;
    c = predicted(out);
    if (!c.n)
        return 0;
    for (; n < c.n; n++) {
        list[n] = c.item[n];
        at += (size_t)snprintf(text + at, GEN_CHOICES - at, "%s%s", n ? " " : "", c.item[n]);
    }
    if (out->timing)
        list[n++] = "timing=on";
    list[n] = NULL;
    return gen_plan_make(m, g, context, NULL, list, out, err);
}

int gen_plan_choose(const struct gen_model *m, const struct gen_gpu *g, int context,
                    const char *plan_file, const char *const *set, struct gen_plan *out,
                    struct gen_plan_source *source, struct mk_err *err)
{
    const int no_file = plan_file && !strcmp(plan_file, "none");

    memset(source, 0, sizeof *source);
    if (no_file)
        plan_file = NULL;
    if (plan_file)
        snprintf(source->file, sizeof source->file, "%s", plan_file);
    if (plan_file || chooses(set))
        return gen_plan_make(m, g, context, plan_file, set, out, err);
    if (!no_file && gen_plan_carried(m, g, source->file, sizeof source->file)) {
        if (gen_plan_make(m, g, context, source->file, set, out, &source->refused) == 0)
            return 0;
        source->file[0] = 0;
    }
    return make_predicted(m, g, context, set, out, source->predicted, err);
}
