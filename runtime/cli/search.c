/* search.c - see search.h. */
#include "config.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>
#include "runtime/cli/search.h"

enum { MAX_TRY = 256 };       /* characters of a --try */
/* A hanging kernel ends itself; what takes this much longer than the default plan hangs elsewhere. */
enum { PATIENCE = 10, PATIENCE_S = 30 };
/* A gain below this is not taken, however quiet the runs are. */
static const double LEAST_GAIN = 0.005;

/* What matters most comes first. */
static const struct search_knob all_knobs[] = {
    { "chunk_bytes", "16384,20480,32768,40960" },
    { "chunk_bytes/inflight/inflight_hop", "20480/4/1,40960/2/1" },
    { "inflight/inflight_hop", "2/1,3/1,3/2,4/1,4/2,5/3,6/2" },
    { "inflight_heads", "2,3,4,6,8" },
    { "balance", "0,15,30,50,100,200" },
    { "warps", "5,6,7,8" },
    { "ctas", NULL },
    { "early", "x,sums" },
    { "round_blocks", "4,6,8,10,12,14,16" },
    { "team_from", "0,4096,6144,8192,16384" },
    { "unroll_layers", "list,loop" },
    { "stages", "3,4,5,6,8,10,12,16" },
    { "group", "1,2,4,8,16" },
    { "cluster", "cluster,l2" },
};
enum { N_KNOBS = sizeof(all_knobs) / sizeof(all_knobs[0]) };

const struct search_knob *search_knob(int i)
{
    return i < N_KNOBS ? &all_knobs[i] : NULL;
}

/* Values that were good with another KEY: when it is changed, the plan finds these anew. */
static const struct { const char *key, *derived; } derivations[] = {
    { "chunk_bytes", "stages inflight inflight_heads inflight_hop team_from early" },
    { "group", "ctas team_from early" },
    { "cluster", "ctas team_from early" },
    { "warps", "early" },
    { "ctas", "team_from early" },
};
enum { N_DERIVATIONS = sizeof(derivations) / sizeof(derivations[0]) };

/* A plan to try: the choices of STEP over others. */
struct candidate {
    char step[SEARCH_TEXT], choices[SEARCH_TEXT];
    struct gen_plan plan;
};

/* ---- Choices: "KEY=VALUE KEY=VALUE" ---- */

int search_has_key(const char *list, const char *word)
{
    const size_t n = strcspn(word, " /=");

    for (const char *at = list; *at; at += strcspn(at, " /"), at += strspn(at, " /"))
        if (strcspn(at, " /=") == n && !memcmp(at, word, n))
            return 1;
    return 0;
}

/* Does STEP leave nothing of the choice WORD? */
static int is_undone(const char *word, const char *step)
{
    int undone = search_has_key(step, word);

    for (int i = 0; i < N_DERIVATIONS; i++)
        undone |= search_has_key(step, derivations[i].key) &&
                  search_has_key(derivations[i].derived, word);
    return undone;
}

/* The choices BASE, with those of STEP over them, in OUT, which has room for both. */
static void take_step(const char *base, const char *step, char *out)
{
    for (const char *at = base; *at; at += strcspn(at, " "), at += strspn(at, " "))
        if (!is_undone(at, step))
            out += sprintf(out, "%.*s ", (int) strcspn(at, " "), at);
    strcpy(out, step);
}

/* ---- Plans ---- */

/* A list for set options: those of the user, then CHOICES. */
struct set {
    const char *item[SEARCH_SET + SEARCH_TEXT / 2 + 1];
    char text[SEARCH_TEXT];
};

static void make_set(const struct search *s, const char *choices, struct set *out)
{
    int n = 0;

    for (; n < s->o->set.n; n++)
        out->item[n] = s->o->set.item[n];
    snprintf(out->text, sizeof(out->text), "%s", choices);
    for (char *word = strtok(out->text, " "); word; word = strtok(NULL, " "))
        out->item[n++] = word;
    out->item[n] = NULL;
}

static int make_plan(const struct search *s, const char *choices, struct gen_plan *out,
                     struct mk_err *err)
{
    struct set set;

    make_set(s, choices, &set);
    return gen_plan_make(&s->model, &s->device.gpu, s->o->tune.context, NULL, set.item, out, err);
}

/* Is this the first time that there is such a plan? */
static int is_new(struct search *s, const struct gen_plan *p)
{
    char *params = gen_plan_params(p);
    const uint64_t digest = params ? XXH3_64bits(params, strlen(params)) : 0;

    free(params);
    for (int i = 0; i < s->n_tried; i++)
        if (s->tried[i] == digest)
            return 0;
    if (s->n_tried < SEARCH_TRIED)
        s->tried[s->n_tried++] = digest;
    return 1;
}

/* ---- The search ---- */

/* Time of a token over that of OTHER, the geometric mean over the positions. */
static double ratio(const struct search *s, const struct rt_tune_result *r,
                    const struct rt_tune_result *other)
{
    double sum = 0;

    for (int i = 0; i < s->o->tune.n_pos; i++)
        sum += log(r->ms[i] / other->ms[i]);
    return exp(sum / s->o->tune.n_pos);
}

/* The rule: the gain must be larger than the noise of both together, and than half a percent. */
static int beats(const struct search *s, const struct rt_tune_result *r,
                 const struct rt_tune_result *other)
{
    const double noise = r->noise + other->noise;

    return r->end == RT_TUNE_RIGHT &&
           ratio(s, r, other) < 1 - (noise > LEAST_GAIN ? noise : LEAST_GAIN);
}

/* Run candidate C against the best.
   Returns 1: it is better, also when measured again; 0; or a negative code. */
static int try_candidate(struct search *s, const struct candidate *c, struct rt_tune_result *r,
                         struct mk_err *err)
{
    static const char *const ends[] = { "", "slower", "WRONG: ", "failed: ", "" };
    const double now = rt_tune_now(), limit = now + s->patience;
    char remark[1100];
    struct set set;
    int rc;

    make_set(s, c->choices, &set);
    rc = rt_tune_run(s->t, set.item, RT_TUNE_AS_OTHERS, &s->best, limit < s->end ? limit : s->end, r,
                     err);
    if (rc)
        return rc;
    if (r->end == RT_TUNE_LATE && limit >= s->end)
        return 0;               /* not its fault */
    s->measured++;
    s->slow += r->end == RT_TUNE_SLOW;
    s->wrong += r->end == RT_TUNE_WRONG;
    s->failed += r->end == RT_TUNE_FAILED || r->end == RT_TUNE_LATE;
    if (beats(s, r, &s->best)) {
        struct rt_tune_result again;

        rc = rt_tune_run(s->t, set.item, RT_TUNE_AS_OTHERS, &s->best, now + 2 * s->patience, &again,
                         err);
        if (rc)
            return rc;
        rc = beats(s, &again, &s->best);
        if (rc && ratio(s, &again, r) > 1)
            *r = again;         /* the slower of the two */
        s->row(s, c->step, r, ratio(s, r, &s->base) - 1, rc ? "better" : "better, but not twice");
        return rc;
    }
    if (r->end == RT_TUNE_RIGHT)
        snprintf(remark, sizeof(remark), "%s", ratio(s, r, &s->best) < 1 ? "within the noise" : "");
    else
        snprintf(remark, sizeof(remark), "%s%s", ends[r->end], r->end == RT_TUNE_SLOW ? "" : r->text);
    s->row(s, c->step, r, r->end == RT_TUNE_RIGHT ? ratio(s, r, &s->base) - 1 : 0, remark);
    return 0;
}

/* The first of VALUES for KEYS, as choices: of A/B and 1/2,3/4 it is "A=1 B=2". */
static void pair_up(const char *keys, const char *values, char *out)
{
    const char *blank = "";

    for (; *keys; blank = " ") {
        const int key = (int) strcspn(keys, "/"), value = (int) strcspn(values, "/,");

        out += sprintf(out, "%s%.*s=%.*s", blank, key, keys, value, values);
        keys += key + (keys[key] == '/');
        values += value + (values[value] == '/');
    }
}

/* The candidate values of knob K, as choices; returns how many. */
static int list_values(const struct search *s, const struct search_knob *k,
                       char (*step)[SEARCH_TEXT])
{
    static const int more[] = { -1, -2, -3, 1, 2 };
    const char *at = k->values;
    int n = 0;

    if (!at) {
        for (size_t i = 0; i < sizeof(more) / sizeof(more[0]); i++)
            if (s->plan.groups + more[i] > 0)
                sprintf(step[n++], "%s=%d", k->keys, (s->plan.groups + more[i]) * s->plan.group);
        return n;
    }
    while (*at && n < SEARCH_VALUES) {
        pair_up(k->keys, at, step[n++]);
        at += strcspn(at, ",");
        at += *at == ',';
    }
    return n;
}

/* Make C the plan with STEP over the choices BASE.  Is there one, and was it not tried? */
static int make_candidate(struct search *s, const char *base, const char *step, struct candidate *c)
{
    struct mk_err ignored;

    if (strlen(base) + strlen(step) + 2 > SEARCH_TEXT)
        return 0;
    strcpy(c->step, step);
    take_step(base, step, c->choices);
    return make_plan(s, c->choices, &c->plan, &ignored) == 0 && is_new(s, &c->plan);
}

/* Plans that differ from the best in knob K and were not tried, to C, where there is room for
   ROOM <= SEARCH_VALUES.  Returns how many. */
static int list_candidates(struct search *s, const struct search_knob *k, struct candidate *c,
                           int room)
{
    char step[SEARCH_VALUES][SEARCH_TEXT];
    const int values = list_values(s, k, step);
    int n = 0;

    for (int i = 0; i < values && n < room; i++)
        n += make_candidate(s, s->moved, step[i], &c[n]);
    return n;
}

static void compile(struct search *s, const struct candidate *c, int n)
{
    const struct gen_plan *list[SEARCH_VALUES];

    for (int i = 0; i < n; i++)
        list[i] = &c[i].plan;
    rt_tune_compile(s->t, list, n, s->o->jobs, s->end);
}

/* Compile the N candidates of knob K, and where jobs are left those of the next knobs,
   which are not tried yet and will be wanted unless this one improves something. */
static void compile_ahead(struct search *s, int k, struct candidate *c, int n)
{
    const int tried = s->n_tried, room = s->o->jobs < SEARCH_VALUES ? s->o->jobs : SEARCH_VALUES;

    for (int next = k + 1; n && next < s->n_knobs && n < room; next++)
        n += list_candidates(s, &s->knob[next], c + n, room - n);
    s->n_tried = tried;
    compile(s, c, n);
}

/* Try N candidates, whose kernels are there, while there is time; *IMPROVED: one was better. */
static int try_all(struct search *s, const struct candidate *c, int n, int *improved,
                   struct mk_err *err)
{
    int rc = 0;

    for (int i = 0; rc >= 0 && i < n && rt_tune_now() < s->end; i++) {
        struct rt_tune_result r;

        rc = try_candidate(s, &c[i], &r, err);
        if (rc == 1) {
            strcpy(s->moved, c[i].choices);
            s->plan = c[i].plan;
            s->best = r;
            s->better++;
            *improved = 1;
        }
    }
    return rc < 0 ? rc : 0;
}

/* The user's candidates, each over the default plan. */
static int run_tries(struct search *s, struct candidate *c, struct mk_err *err)
{
    int n = 0, improved;

    for (int i = 0; i < s->o->tries.n; i++)
        n += make_candidate(s, s->first, s->o->tries.item[i], &c[n]);
    compile(s, c, n);
    return try_all(s, c, n, &improved, err);
}

/* Every value of knob K, also when those before it were worse. */
static int run_knob(struct search *s, int k, struct candidate *c, int *improved,
                    struct mk_err *err)
{
    const int n = list_candidates(s, &s->knob[k], c, SEARCH_VALUES);

    compile_ahead(s, k, c, n);
    return try_all(s, c, n, improved, err);
}

/* The user's candidates, then rounds over all knobs, until one brings nothing or the time is over. */
static int run_all(struct search *s, struct mk_err *err)
{
    struct candidate *c = calloc(SEARCH_VALUES, sizeof(*c));
    int rc, improved = 1;

    if (!c)
        return gen_fail(err, MK_ENOMEM, "not enough memory");
    rc = run_tries(s, c, err);
    while (rc == 0 && improved && rt_tune_now() < s->end) {
        improved = 0;
        for (int k = 0; rc == 0 && k < s->n_knobs && rt_tune_now() < s->end; k++)
            rc = run_knob(s, k, c, &improved, err);
    }
    free(c);
    return rc;
}

/* ---- Before the search ---- */

/* A knob, unless the user has set what it would change. */
static void add_knob(struct search *s, const char *keys, const char *values)
{
    for (int i = 0; i < s->o->set.n; i++)
        if (search_has_key(keys, s->o->set.item[i]))
            return;
    s->knob[s->n_knobs++] = (struct search_knob) { keys, values };
}

static int is_plan_key(const char *word)
{
    const size_t n = strcspn(word, "/");
    const char *line;

    for (int i = 0; (line = gen_plan_key(i)); i++)
        if (strcspn(line, " ") == n && !memcmp(line, word, n))
            return 1;
    return 0;
}

static int count(const char *text, char wanted)
{
    int n = 0;

    for (; *text; text++)
        n += *text == wanted;
    return n;
}

static int check_knob(const char *keys, const char *values)
{
    for (const char *at = keys; at; at = strchr(at, '/'), at += at != NULL)
        if (!is_plan_key(at))
            return cli_usage("--knob: '%.*s' is no plan choice (mkgen --list-keys)",
                             (int) strcspn(at, "/"), at);
    if (!values)
        return cli_usage("--knob: %s needs values, like %s=A,B", keys, keys);
    if (count(values, ',') >= SEARCH_VALUES)
        return cli_usage("--knob: %s has more than %d values", keys, SEARCH_VALUES);
    if (count(values, '/') != count(keys, '/') * (count(values, ',') + 1))
        return cli_usage("--knob: %s=%s: a value is not for as many choices", keys, values);
    return 0;
}

/* --knob KEYS or KEYS=A,B. */
static int add_asked_knob(struct search *s, const char *item)
{
    char *keys = s->knob_text[s->n_knobs], *values;
    int i = 0, rc;

    if (snprintf(keys, sizeof(s->knob_text[0]), "%s", item) >= (int) sizeof(s->knob_text[0]))
        return cli_usage("--knob: '%.40s...' is too long", item);
    values = strchr(keys, '=');
    if (values)
        *values++ = 0;
    while (i < N_KNOBS && strcmp(all_knobs[i].keys, keys))
        i++;
    if (!values && i < N_KNOBS) {
        add_knob(s, keys, all_knobs[i].values);
        return 0;
    }
    rc = check_knob(keys, values);
    if (!rc)
        add_knob(s, keys, values);
    return rc;
}

/* Do groups help others at a position that is timed? */
static int has_teams(const struct search *s)
{
    const struct gen_plan *p = &s->plan;
    const int team = p->cluster ? p->groups / p->model.K : 1, first = (team * p->group - 1) * p->kv_tile;
    int has = 0;

    for (int i = 0; i < s->o->tune.n_pos; i++)
        has |= team > 1 && s->o->tune.pos[i] >= first;
    return has;
}

static int choose_knobs(struct search *s)
{
    int rc = 0;

    for (int i = 0; !rc && i < s->o->knobs.n; i++)
        rc = add_asked_knob(s, s->o->knobs.item[i]);
    for (int i = 0; !s->o->knobs.n && i < N_KNOBS; i++)
        if (strcmp(all_knobs[i].keys, "team_from") || has_teams(s))
            add_knob(s, all_knobs[i].keys, all_knobs[i].values);
    return rc;
}

/* A candidate of the user's that is no plan is known before minutes of measuring. */
static int check_tries(const struct search *s)
{
    static const char option[] = "--set: ";     /* what a plan takes choices for */
    char choices[SEARCH_TEXT];
    struct gen_plan plan;
    struct mk_err err;

    for (int i = 0; i < s->o->tries.n; i++) {
        const char *item = s->o->tries.item[i], *why = err.text;

        if (strlen(item) >= MAX_TRY)
            return cli_usage("--try: '%.40s...' is too long", item);
        for (int j = 0; j < s->o->set.n; j++)
            if (search_has_key(item, s->o->set.item[j]))
                return cli_usage("--try '%s': --set %s holds for all candidates", item, s->o->set.item[j]);
        take_step(s->first, item, choices);
        if (make_plan(s, choices, &plan, &err)) {
            why += strncmp(why, option, strlen(option)) ? 0 : strlen(option);
            return cli_usage("--try '%s': %s", item, why);
        }
    }
    return 0;
}

/* The default plan: what it makes is checked, and is what the others are compared with. */
static int measure_default(struct search *s, struct mk_err *err)
{
    const struct gen_plan *plan = &s->plan;
    struct set set;
    int rc;

    is_new(s, plan);            /* not again */
    make_set(s, s->first, &set);
    rt_tune_compile(s->t, &plan, 1, 1, HUGE_VAL);
    rc = rt_tune_run(s->t, set.item, RT_TUNE_AS_REFERENCE, NULL, HUGE_VAL, &s->base, err);
    if (rc == 0 && s->base.end != RT_TUNE_RIGHT)
        rc = gen_fail(err, MK_EDEVICE, "the default plan %s: %s",
                      s->base.end == RT_TUNE_WRONG ? "is wrong" : "cannot be measured", s->base.text);
    s->best = s->base;
    s->patience = PATIENCE * s->base.seconds + PATIENCE_S;
    return rc;
}

/* ---- All of it ---- */

/* Back to the default plan. */
static int take_default(struct search *s, struct mk_err *err)
{
    strcpy(s->moved, s->first);
    s->best = s->base;
    s->better = 0;
    return make_plan(s, s->first, &s->plan, err);
}

/* Default and best plan once more, the best against the C reference too: these are the figures
   of the file.  A gain that does not hold now is none. */
static int measure_again(struct search *s, struct mk_err *err)
{
    const double deadline = rt_tune_now() + 4 * s->patience;
    struct rt_tune_result best, base;
    struct set set;
    int rc;

    make_set(s, s->moved, &set);
    rc = rt_tune_run(s->t, set.item, RT_TUNE_AS_BOTH, NULL, deadline, &best, err);
    make_set(s, s->first, &set);
    if (rc == 0)
        rc = rt_tune_run(s->t, set.item, RT_TUNE_AS_OTHERS, NULL, deadline, &base, err);
    if (rc)
        return rc;
    if (base.end != RT_TUNE_RIGHT)
        return gen_fail(err, MK_EDEVICE, "the default plan, measured again: %s", base.text);
    s->base = base;
    s->row(s, "default, again", &base, 0, "");
    s->row(s, "best, again", &best, best.end == RT_TUNE_RIGHT ? ratio(s, &best, &base) - 1 : 0,
           best.text);
    if (best.end != RT_TUNE_RIGHT)
        return gen_fail(err, MK_EDEVICE, "the best plan, measured again: %s", best.text);
    if (!beats(s, &best, &base))
        return take_default(s, err);
    s->best = best;
    return 0;
}

/* The default plan: what is used where there is no file. */
static int choose_default(struct search *s, struct mk_err *err)
{
    struct gen_plan_source source;
    struct set set;
    int rc;

    make_set(s, "", &set);
    rc = gen_plan_choose(&s->model, &s->device.gpu, s->o->tune.context, "none", set.item, &s->plan, &source, err);
    strcpy(s->first, source.predicted);
    strcpy(s->moved, s->first);
    return rc;
}

int search_prepare(struct search *s)
{
    struct mk_err err;
    int rc;

    if (choose_default(s, &err))
        return cli_error(&err);
    rc = choose_knobs(s);
    return rc ? rc : check_tries(s);
}

int search_run(struct search *s, struct mk_err *err)
{
    int rc = measure_default(s, err);

    if (rc)
        return rc;
    s->row(s, "default", &s->base, 0, "");
    s->end -= 2 * s->base.seconds;  /* for the end */
    rc = run_all(s, err);
    return rc || !s->better ? rc : measure_again(s, err);
}
