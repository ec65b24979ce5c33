/* mktune.c - search the plan's choices for those with which this GPU decodes fastest.  Every
   candidate is compiled, timed and checked behind runtime/tune.h; here are arguments, the search,
   and the plan file. */
#include "config.h"
#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>
#include "runtime/cli/cli.h"
#include "runtime/device.h"
#include "runtime/tune.h"

static const char help[] =
    "Usage: mktune MODEL [OPTION]...\n"
    "Search the plan's choices for those with which this GPU decodes MODEL fastest, check the\n"
    "output of every candidate, and write a plan file.\n"
    "MODEL is a folder with config.json and weights.\n"
    "\n"
    "  -r, --random-weights  make weights; MODEL is then a carried model (mkgen\n"
    "                        --list-models), a folder with config.json, or that file\n"
    "  -d, --device DEVICE   gpu (default), 0 (the same), or host, host:sm_XX: an emulated one\n"
    "  -b, --budget SECONDS  when to end the search (default 600); the default plan is\n"
    "                        measured in any case\n"
    "  -p, --positions LIST  positions at which decode is timed (default: 1,1024)\n"
    "  -o, --out FILE        the plan file (default: MODEL-GPU.plan); \"-\" is standard\n"
    "                        output, without the table\n"
    "  -t, --try CHOICES     try \"KEY=VALUE KEY=VALUE...\" over the default plan before the\n"
    "                        search, which begins with the best; may be repeated\n"
    "  -k, --knob KEY[=A,B]  search this choice, with these values; may be repeated, and then\n"
    "                        no other choice is searched; KEY/KEY=A/B,C/D: two at once\n"
    "  -s, --set KEY=VALUE   a choice that all candidates have; may be repeated\n"
    "  -n, --tokens N        tokens of one run (default 64)\n"
    "      --runs N          timed runs of a candidate at a position (default 7)\n"
    "  -c, --context N       tokens that the KV cache holds (default: what is needed, at\n"
    "                        least 4096 or the model's maximum)\n"
    "      --drop PERCENT    give up a candidate whose first runs are this much slower than\n"
    "                        the best plan (default 5)\n"
    "      --jobs N          kernels compiled at once (default: one per core)\n"
    "      --seed N          of made weights and of prompts (default 1)\n"
    "      --list-knobs      what is searched, and exit\n"
    "      --help, --version\n"
    "\n"
    "Example: mktune qwen3-0.6b --random-weights --budget 900 --out h200.plan\n";

enum { MAX_CONTEXT = 1 << 24, MAX_KNOBS = 16, MAX_VALUES = RT_TUNE_PLANS, MAX_TRIED = 4096 };
enum { MAX_SET = 32, MAX_TEXT = 1024, MAX_TRY = 256 };
/* A hanging kernel ends itself; what takes this much longer than the default plan hangs elsewhere. */
enum { PATIENCE = 10, PATIENCE_S = 30 };
/* A gain below this is not taken, however quiet the runs are. */
static const double LEAST_GAIN = 0.005;

/* What is searched: what matters most comes first.  A/B: both at once.  NULL: more and fewer groups
   than there are. */
struct knob { const char *keys, *values; };
static const struct knob all_knobs[] = {
    { "chunk_bytes", "16384,20480,32768,40960" },
    { "chunk_bytes/inflight/inflight_hop", "20480/4/1,40960/2/1" },
    { "inflight/inflight_hop", "2/1,3/1,3/2,4/1,4/2,5/3,6/2" },
    { "inflight_heads", "2,3,4,6,8" },
    { "balance", "0,15,30,50,100,200" },
    { "warps", "5,6,7,8" },
    { "ctas", NULL },
    { "round_blocks", "4,6,8,10,12,16" },
    { "team_from", "0,4096,6144,8192,16384" },
    { "unroll_layers", "list,loop" },
    { "stages", "3,4,5,6,8,10,12,16" },
    { "group", "1,2,4,8,16" },
    { "cluster", "cluster,l2" },
};
enum { N_KNOBS = sizeof(all_knobs) / sizeof(all_knobs[0]) };

/* Values that were good with another KEY: when it is changed, the plan finds these anew. */
static const struct { const char *key, *derived; } derivations[] = {
    { "chunk_bytes", "stages inflight inflight_heads inflight_hop team_from" },
    { "group", "ctas team_from" },
};
enum { N_DERIVATIONS = sizeof(derivations) / sizeof(derivations[0]) };

struct options {
    const char *out;
    int n_pos, budget, jobs;    /* n_pos -1: not given */
    struct cli_list set, tries, knobs;
    struct rt_tune_options tune;
    int argc;
    char **argv;
};

struct search {
    const struct options *o;
    struct gen_model model;
    struct rt_tune *t;
    struct rt_tune_device device;
    FILE *table;                /* NULL: the plan itself goes to standard output */
    double start, end;          /* of the search */
    double patience;            /* seconds that a candidate may take */
    struct knob knob[MAX_KNOBS];
    int n_knobs;
    char knob_text[MAX_KNOBS][256];     /* behind those of --knob */
    char moved[MAX_TEXT];       /* "KEY=VALUE KEY=VALUE": the best so far, over what the user set */
    struct gen_plan plan;       /* the best so far */
    struct rt_tune_result base, best;
    uint64_t tried[MAX_TRIED];  /* digests of plans */
    int n_tried;
    int measured, slow, wrong, failed, better;
};

/* A plan to try: the choices of STEP over others. */
struct candidate {
    char step[MAX_TEXT], choices[MAX_TEXT];
    struct gen_plan plan;
};

/* ---- Arguments ---- */

enum { OPT_RUNS = 256, OPT_DROP, OPT_JOBS, OPT_SEED, OPT_KNOBS, OPT_HELP, OPT_VERSION };

static const struct option longs[] = {
    { "random-weights", no_argument, NULL, 'r' },   { "device", required_argument, NULL, 'd' },
    { "budget", required_argument, NULL, 'b' },     { "positions", required_argument, NULL, 'p' },
    { "out", required_argument, NULL, 'o' },        { "knob", required_argument, NULL, 'k' },
    { "set", required_argument, NULL, 's' },        { "tokens", required_argument, NULL, 'n' },
    { "runs", required_argument, NULL, OPT_RUNS },  { "context", required_argument, NULL, 'c' },
    { "drop", required_argument, NULL, OPT_DROP },  { "try", required_argument, NULL, 't' },
    { "jobs", required_argument, NULL, OPT_JOBS },  { "seed", required_argument, NULL, OPT_SEED },
    { "list-knobs", no_argument, NULL, OPT_KNOBS }, { "help", no_argument, NULL, OPT_HELP },
    { "version", no_argument, NULL, OPT_VERSION },  { NULL, 0, NULL, 0 }
};

static void list_knobs(void)
{
    for (int i = 0; i < N_KNOBS; i++)
        printf("%-33s %s\n", all_knobs[i].keys,
               all_knobs[i].values ? all_knobs[i].values : "1, 2 and 3 groups fewer, 1 and 2 more");
}

static int check_options(struct options *o, int argc, char **argv)
{
    if (optind == argc)
        return cli_usage("the model is missing");
    if (optind + 1 < argc)
        return cli_usage("'%s' is too much: one model", argv[optind + 1]);
    if (o->n_pos == 0)
        return cli_usage("--positions none leaves nothing to measure");
    if (o->knobs.n > MAX_KNOBS)
        return cli_usage("--knob: more than %d", MAX_KNOBS);
    if (o->tries.n > MAX_VALUES)
        return cli_usage("--try: more than %d", MAX_VALUES);
    if (o->set.n > MAX_SET)
        return cli_usage("--set: more than %d", MAX_SET);
    o->tune.where = argv[optind];
    return 0;
}

static int parse_device(struct options *o, const char *text)
{
    struct mk_err err;
    int arch;

    o->tune.bench.device = strcmp(text, "0") ? text : "gpu";
    return rt_device_which(o->tune.bench.device, &arch, &err)
               ? cli_usage("--device: '%s' is not gpu, 0, host or host:sm_XX", text) : 0;
}

/* Returns 0, an exit status, or -1: the whole job was done here. */
static int parse(int argc, char **argv, struct options *o)
{
    struct rt_tune_options *t = &o->tune;
    int c, rc = 0;

    while (!rc && (c = getopt_long(argc, argv, "rd:b:p:o:t:k:s:n:c:", longs, NULL)) != -1) {
        switch (c) {
        case 'r': t->bench.random_weights = 1; break;
        case 'd': rc = parse_device(o, optarg); break;
        case 'b': rc = cli_int("--budget", optarg, 1, 1000000, &o->budget); break;
        case 'p': rc = cli_int_list("--positions", optarg, 0, MAX_CONTEXT, t->pos,
                                    RT_TUNE_POSITIONS, &o->n_pos);
            break;
        case 'o': o->out = optarg; break;
        case 't': rc = cli_list_add(&o->tries, optarg); break;
        case 'k': rc = cli_list_add(&o->knobs, optarg); break;
        case 's': rc = cli_list_add(&o->set, optarg); break;
        case 'n': rc = cli_int("--tokens", optarg, 1, 1024, &t->tokens); break;
        case 'c': rc = cli_int("--context", optarg, 1, MAX_CONTEXT, &t->context); break;
        case OPT_RUNS: rc = cli_int("--runs", optarg, 1, 1000, &t->runs); break;
        case OPT_DROP: rc = cli_int("--drop", optarg, 0, 1000000, &t->drop_percent); break;
        case OPT_JOBS: rc = cli_int("--jobs", optarg, 1, 1024, &o->jobs); break;
        case OPT_SEED: rc = cli_u64("--seed", optarg, &t->bench.seed); break;
        case OPT_KNOBS: list_knobs(); return -1;
        case OPT_HELP: fputs(help, stdout); return -1;
        case OPT_VERSION: cli_version(); return -1;
        default: return cli_bad_option();
        }
    }
    return rc ? rc : check_options(o, argc, argv);
}

static int larger(int a, int b)
{
    return a > b ? a : b;
}

/* Fill in what was not given. */
static int plan_positions(struct options *o, const struct gen_model *m)
{
    static const int defaults[] = { 1, 1024 };
    struct rt_tune_options *t = &o->tune;
    const int limit = t->context ? t->context : m->max_context;
    int need = 0;

    if (limit > m->max_context)
        return cli_fail("--context %d: the maximum of %s is %d", limit, m->name, m->max_context);
    if (o->n_pos < 0)
        for (int i = o->n_pos = 0; i < 2; i++)
            if (defaults[i] + t->tokens <= limit)
                t->pos[o->n_pos++] = defaults[i];
    for (int i = 0; i < o->n_pos; i++)
        need = larger(need, t->pos[i] + t->tokens);
    if (need == 0)
        return cli_fail("%d tokens do not fit a context of %d", t->tokens, limit);
    if (need > limit)
        return cli_fail("%d tokens of context are needed for these positions, %s %d", need,
                        t->context ? "--context says" : "the model's maximum is", limit);
    if (!t->context)
        t->context = larger(need, m->max_context < 4096 ? m->max_context : 4096);
    t->n_pos = o->n_pos;
    return 0;
}

/* ---- Choices: "KEY=VALUE KEY=VALUE" ---- */

/* Is the key that WORD begins with one of LIST, which is choices, or "KEY KEY", or "KEY/KEY"? */
static int has_key(const char *list, const char *word)
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
    int undone = has_key(step, word);

    for (int i = 0; i < N_DERIVATIONS; i++)
        undone |= has_key(step, derivations[i].key) && has_key(derivations[i].derived, word);
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

/* The value of KEY in a plan, as --dump-plan prints it, in OUT. */
static void choice(const struct gen_plan *p, const char *key, char *out, size_t size)
{
    char *dump = gen_plan_dump(p), *line = dump, *end;
    const size_t n = strlen(key);

    *out = 0;
    for (; line && *line; line = end + (*end == '\n')) {
        end = line + strcspn(line, "\n");
        if (!strncmp(line, key, n) && !strncmp(line + n, " = ", 3) && !*out)
            snprintf(out, size, "%.*s", (int) (end - line - (int) n - 3), line + n + 3);
    }
    free(dump);
}

/* A list for set options: those of the user, then CHOICES. */
struct set {
    const char *item[MAX_SET + MAX_TEXT / 2 + 1];
    char text[MAX_TEXT];
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
    if (s->n_tried < MAX_TRIED)
        s->tried[s->n_tried++] = digest;
    return 1;
}

/* ---- Output ---- */

static void tick(void *user)
{
    const struct search *s = user;
    const double part = s->end > s->start ? (rt_tune_now() - s->start) / (s->end - s->start) : 0;

    cli_progress(NULL, "tune", part < 0.99 ? part : 0.99);
}

static void print_head(const struct search *s)
{
    const struct rt_tune_options *t = &s->o->tune;

    fprintf(s->table, "%s, %s weights, context %d, on %s (sm_%d, %d SMs)\n"
            "decode: ms a token over %d tokens, median of %d runs, at these positions\n\n%-26s",
            s->model.name, t->bench.random_weights ? "random" : "checkpoint", t->context,
            s->device.name, s->device.gpu.arch, s->device.gpu.sms, t->tokens, t->runs, "");
    for (int i = 0; i < t->n_pos; i++)
        fprintf(s->table, " %9d", t->pos[i]);
    fprintf(s->table, "   change\n");
    fflush(s->table);
}

static void print_row(struct search *s, const char *name, const struct rt_tune_result *r,
                      double change, const char *remark)
{
    cli_progress_clear();
    if (!s->table)
        return;
    if (strlen(name) > 26)      /* a line of its own */
        fprintf(s->table, "%s\n", name), name = "";
    fprintf(s->table, "%-26s", name);
    for (int i = 0; i < s->o->tune.n_pos; i++)
        if (r->ms[i] > 0 && (r->end == RT_TUNE_RIGHT || r->end == RT_TUNE_SLOW))
            fprintf(s->table, " %9.4f", r->ms[i]);
        else
            fprintf(s->table, " %9s", "-");
    if (r->end == RT_TUNE_RIGHT)
        fprintf(s->table, " %+7.1f %%  %s\n", 100 * change, remark);
    else
        fprintf(s->table, " %9s  %s\n", "", remark);
    fflush(s->table);
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
        print_row(s, c->step, r, ratio(s, r, &s->base) - 1, rc ? "better" : "better, but not twice");
        return rc;
    }
    if (r->end == RT_TUNE_RIGHT)
        snprintf(remark, sizeof(remark), "%s", ratio(s, r, &s->best) < 1 ? "within the noise" : "");
    else
        snprintf(remark, sizeof(remark), "%s%s", ends[r->end], r->end == RT_TUNE_SLOW ? "" : r->text);
    print_row(s, c->step, r, r->end == RT_TUNE_RIGHT ? ratio(s, r, &s->base) - 1 : 0, remark);
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
static int list_values(const struct search *s, const struct knob *k, char (*step)[MAX_TEXT])
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
    while (*at && n < MAX_VALUES) {
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

    if (strlen(base) + strlen(step) + 2 > MAX_TEXT)
        return 0;
    strcpy(c->step, step);
    take_step(base, step, c->choices);
    return make_plan(s, c->choices, &c->plan, &ignored) == 0 && is_new(s, &c->plan);
}

/* Plans that differ from the best in knob K and were not tried, to C, where there is room for
   ROOM <= MAX_VALUES.  Returns how many. */
static int list_candidates(struct search *s, const struct knob *k, struct candidate *c, int room)
{
    char step[MAX_VALUES][MAX_TEXT];
    const int values = list_values(s, k, step);
    int n = 0;

    for (int i = 0; i < values && n < room; i++)
        n += make_candidate(s, s->moved, step[i], &c[n]);
    return n;
}

static void compile(struct search *s, const struct candidate *c, int n)
{
    const struct gen_plan *list[MAX_VALUES];

    for (int i = 0; i < n; i++)
        list[i] = &c[i].plan;
    rt_tune_compile(s->t, list, n, s->o->jobs, s->end);
}

/* Compile the N candidates of knob K, and where jobs are left those of the next knobs,
   which are not tried yet and will be wanted unless this one improves something. */
static void compile_ahead(struct search *s, int k, struct candidate *c, int n)
{
    const int tried = s->n_tried, room = s->o->jobs < MAX_VALUES ? s->o->jobs : MAX_VALUES;

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
static int search_tries(struct search *s, struct candidate *c, struct mk_err *err)
{
    int n = 0, improved;

    for (int i = 0; i < s->o->tries.n; i++)
        n += make_candidate(s, "", s->o->tries.item[i], &c[n]);
    compile(s, c, n);
    return try_all(s, c, n, &improved, err);
}

/* Every value of knob K, also when those before it were worse. */
static int search_knob(struct search *s, int k, struct candidate *c, int *improved,
                       struct mk_err *err)
{
    const int n = list_candidates(s, &s->knob[k], c, MAX_VALUES);

    compile_ahead(s, k, c, n);
    return try_all(s, c, n, improved, err);
}

/* The user's candidates, then rounds over all knobs, until one brings nothing or the time is over. */
static int search_all(struct search *s, struct mk_err *err)
{
    struct candidate *c = calloc(MAX_VALUES, sizeof(*c));
    int rc, improved = 1;

    if (!c)
        return gen_fail(err, MK_ENOMEM, "not enough memory");
    rc = search_tries(s, c, err);
    while (rc == 0 && improved && rt_tune_now() < s->end) {
        improved = 0;
        for (int k = 0; rc == 0 && k < s->n_knobs && rt_tune_now() < s->end; k++)
            rc = search_knob(s, k, c, &improved, err);
    }
    free(c);
    return rc;
}

/* ---- Before the search ---- */

/* A knob, unless the user has set what it would change. */
static void add_knob(struct search *s, const char *keys, const char *values)
{
    for (int i = 0; i < s->o->set.n; i++)
        if (has_key(keys, s->o->set.item[i]))
            return;
    s->knob[s->n_knobs++] = (struct knob) { keys, values };
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
    if (count(values, ',') >= MAX_VALUES)
        return cli_usage("--knob: %s has more than %d values", keys, MAX_VALUES);
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
    int has = 0;

    for (int i = 0; i < s->o->tune.n_pos; i++)
        has |= s->plan.team > 1 && s->o->tune.pos[i] >= s->plan.team_from;
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
    struct gen_plan plan;
    struct mk_err err;

    for (int i = 0; i < s->o->tries.n; i++) {
        const char *item = s->o->tries.item[i], *why = err.text;

        if (strlen(item) >= MAX_TRY)
            return cli_usage("--try: '%.40s...' is too long", item);
        if (make_plan(s, item, &plan, &err)) {
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
    make_set(s, "", &set);
    rt_tune_compile(s->t, &plan, 1, 1, HUGE_VAL);
    rc = rt_tune_run(s->t, set.item, RT_TUNE_AS_REFERENCE, NULL, HUGE_VAL, &s->base, err);
    if (rc == 0 && s->base.end != RT_TUNE_RIGHT)
        rc = gen_fail(err, MK_EDEVICE, "the default plan %s: %s",
                      s->base.end == RT_TUNE_WRONG ? "is wrong" : "cannot be measured", s->base.text);
    s->best = s->base;
    s->patience = PATIENCE * s->base.seconds + PATIENCE_S;
    return rc;
}

/* ---- The plan file ---- */

/* Where in WORD an absolute path begins, or its end. */
static const char *find_absolute(const char *word)
{
    const size_t n = strcspn(word, "/");

    return n == 0 || word[n - 1] == '=' || (n == 2 && *word == '-') ? word + n : word + strlen(word);
}

/* The last name of PATH. */
static const char *skip_folders(const char *path)
{
    for (const char *slash; (slash = strchr(path, '/')) && slash[1];)
        path = slash + 1;
    return path;
}

/* FROM .. TO without what would end a line, and no more than *LEFT. */
static void put_text(FILE *f, const char *from, const char *to, int *left)
{
    for (; from < to && *left > 0; from++, --*left)
        fputc(isprint((unsigned char) *from) ? *from : '?', f);
}

/* A command, of a length that a plan file can have.  Where its files were is of no use elsewhere. */
static void put_words(FILE *f, int n, char **words)
{
    int left = 400;

    for (int i = 0; i < n; i++) {
        const char *path = find_absolute(words[i]), *quote = strchr(words[i], ' ') ? "\"" : "";

        fprintf(f, " %s", quote);
        put_text(f, words[i], path, &left);
        path = skip_folders(path);
        put_text(f, path, path + strlen(path), &left);
        fputs(quote, f);
    }
    fputc('\n', f);
}

static void put_provenance(FILE *f, const struct search *s)
{
    const struct rt_tune_options *t = &s->o->tune;
    const time_t now = time(NULL);
    struct tm utc;
    char date[32];

    strftime(date, sizeof(date), "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
    fprintf(f, "# Plan of %s on %s, found by mktune.\n# gpu: %s, sm_%d, %d SMs", s->model.name,
            s->device.gpu.name, s->device.name, s->device.gpu.arch, s->device.gpu.sms);
    if (s->device.gpu.clusters[3])
        fprintf(f, ", %d clusters of 8", s->device.gpu.clusters[3]);
    fprintf(f, "\n# driver: CUDA %d.%d\n# date: %s\n# mkgen: %s, templates %s\n",
            s->device.driver / 1000, s->device.driver % 1000 / 10, date, PACKAGE_VERSION,
            gen_templates_digest());
    for (int i = 0; i < t->n_pos; i++)
        fprintf(f, "# position %d: %.1f tok/s with the default plan, %.1f with this one (%+.1f %%)\n",
                t->pos[i], 1e3 / s->base.ms[i], 1e3 / s->best.ms[i],
                100 * (s->base.ms[i] / s->best.ms[i] - 1));
    fprintf(f, "# %d tokens, median of %d runs, %s weights, context %d; output checked\n", t->tokens,
            t->runs, t->bench.random_weights ? "random" : "checkpoint", t->context);
    fprintf(f, "# candidates: %d measured, %d better, %d slower at once, %d wrong, %d failed\n"
            "# command:", s->measured, s->better, s->slow, s->wrong, s->failed);
    put_words(f, s->o->argc, s->o->argv);
}

/* Does KEY stand in the file?  What the user set or the search moved, and all of the table; of the
   numbers of CTAs and of positions that the plan finds by itself neither: parts of one product hold
   different numbers of clusters. */
static int is_put(const struct search *s, const char *key)
{
    int put = has_key(s->moved, key);

    for (int i = 0; i < s->o->set.n; i++)
        put |= has_key(s->o->set.item[i], key);
    for (int i = 0; i < N_KNOBS; i++)
        put |= has_key(all_knobs[i].keys, key) && !has_key("ctas team_from", key);
    return put;
}

static void put_choices(FILE *f, const struct search *s)
{
    const char *line;

    fprintf(f, "\n[choices]\n");
    for (int i = 0; (line = gen_plan_key(i)); i++) {
        char key[64], value[64];

        snprintf(key, sizeof(key), "%.*s", (int) strcspn(line, " "), line);
        choice(&s->plan, key, value, sizeof(value));
        if (is_put(s, key))
            fprintf(f, "%s = %s\n", key, value);
    }
}

static int write_plan(const struct search *s, struct cli_file *out)
{
    put_provenance(out->stream, s);
    put_choices(out->stream, s);
    return cli_file_done(out);
}

/* ---- All of it ---- */

/* Back to the default plan. */
static int take_default(struct search *s, struct mk_err *err)
{
    *s->moved = 0;
    s->best = s->base;
    s->better = 0;
    return make_plan(s, "", &s->plan, err);
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
    make_set(s, "", &set);
    if (rc == 0)
        rc = rt_tune_run(s->t, set.item, RT_TUNE_AS_OTHERS, NULL, deadline, &base, err);
    if (rc)
        return rc;
    if (base.end != RT_TUNE_RIGHT)
        return gen_fail(err, MK_EDEVICE, "the default plan, measured again: %s", base.text);
    s->base = base;
    print_row(s, "default, again", &base, 0, "");
    print_row(s, "best, again", &best, best.end == RT_TUNE_RIGHT ? ratio(s, &best, &base) - 1 : 0,
              best.text);
    if (best.end != RT_TUNE_RIGHT)
        return gen_fail(err, MK_EDEVICE, "the best plan, measured again: %s", best.text);
    if (!beats(s, &best, &base))
        return take_default(s, err);
    s->best = best;
    return 0;
}

/* The search; OUT is open when --out says where. */
static int tune(struct search *s, struct cli_file *out)
{
    struct mk_err err;
    char name[160];
    int rc;

    rc = make_plan(s, "", &s->plan, &err);
    if (rc)
        return cli_error(&err);
    rc = choose_knobs(s);
    if (!rc)
        rc = check_tries(s);
    if (rc)
        return rc;
    if (s->table)
        print_head(s);
    rc = measure_default(s, &err);
    if (rc == 0) {
        print_row(s, "default", &s->base, 0, "");
        s->end -= 2 * s->base.seconds;  /* for the end */
        rc = search_all(s, &err);
    }
    if (rc == 0 && s->better)
        rc = measure_again(s, &err);
    if (rc)
        return cli_error(&err);
    cli_progress_clear();
    if (!out->stream) {
        char file[64];

        gen_plan_file_name(&s->device.gpu, file, sizeof(file));
        snprintf(name, sizeof(name), "%s-%s", s->model.name, file);
        if (cli_file_open(out, name))
            return CLI_FAILED;
    }
    if (write_plan(s, out))
        return CLI_FAILED;
    cli_note("%s after %.0f s; wrote %s", s->better ? "found a better plan" : "the default plan is best",
             rt_tune_now() - s->start, s->o->out ? s->o->out : name);
    return CLI_OK;
}

static int run(struct options *o)
{
    struct search *s = calloc(1, sizeof(*s));
    struct cli_file out = { 0 };
    struct mk_err err;
    int status;

    if (!s)
        return cli_fail("not enough memory");
    s->o = o;
    s->start = rt_tune_now();
    s->end = s->start + o->budget;
    s->table = o->out && !strcmp(o->out, "-") ? NULL : stdout;
    o->tune.tick = tick;
    o->tune.user = s;
    if (gen_model_read(o->tune.where, &s->model, &err))
        status = cli_error(&err);
    else if ((status = plan_positions(o, &s->model)) != 0)
        ;
    /* A place that cannot be written is known before minutes of measuring. */
    else if (o->out && cli_file_open(&out, o->out))
        status = CLI_FAILED;
    else if (rt_tune_open(&o->tune, &s->model, &s->t, &err) || rt_tune_ask(s->t, &s->device, &err))
        status = cli_error(&err);
    else
        status = tune(s, &out);
    cli_file_drop(&out);
    rt_tune_close(s->t);
    free(s);
    return status;
}

int main(int argc, char **argv)
{
    struct options o = {
        .n_pos = -1, .budget = 600, .jobs = (int) sysconf(_SC_NPROCESSORS_ONLN),
        .tune = { .tokens = 64, .runs = 7, .drop_percent = 5,
                  .bench = { .seed = 1, .warn = cli_warn } },
    };
    char **argv_copy = NULL;
    int rc;

    cli_start("mktune", argc, argv);
    argv_copy = calloc((size_t) argc + 1, sizeof(*argv_copy));     /* getopt_long moves them about */
    if (!argv_copy)
        return cli_fail("not enough memory");
    memcpy(argv_copy, argv, (size_t) argc * sizeof(*argv_copy));
    o.argc = argc;
    o.argv = argv_copy;
    rc = parse(argc, argv, &o);
    if (rc == 0)
        rc = run(&o);
    free(o.set.item);
    free(o.tries.item);
    free(o.knobs.item);
    free(argv_copy);
    return cli_end(rc < 0 ? CLI_OK : rc);
}
