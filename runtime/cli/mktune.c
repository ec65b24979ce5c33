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
    "  -k, --knob KEY[=A,B]  search this choice, with these values; may be repeated, and then\n"
    "                        no other choice is searched\n"
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
/* A hanging kernel ends itself; what takes this much longer than the default plan hangs elsewhere. */
enum { PATIENCE = 10, PATIENCE_S = 30 };
/* A gain below this is not taken, however quiet the runs are. */
static const double LEAST_GAIN = 0.005;

/* What is searched, in this order.  NULL: more and fewer groups than there are. */
struct knob { const char *key, *values; };
static const struct knob all_knobs[] = {
    { "balance", "0,25,35,50,65,80,100,150" },
    { "chunk_bytes", "4096,8192,12288,16384,24576,32768" },
    { "stages", "3,4,5,6,8,10,12,16" },
    { "inflight", "2,3,4,6,8,10,12,16" },
    { "inflight_heads", "3,4,6,8,10,12,16" },
    { "inflight_hop", "1,2,3,4,6,8,12" },
    { "round_blocks", "2,4,6,8,10,12,16" },
    { "warps", "4,5,6,7,8" },
    { "group", "1,2,4,8,16" },
    { "ctas", NULL },
    { "cluster", "cluster,l2" },
    { "unroll_layers", "list,loop" },
};
enum { N_KNOBS = sizeof(all_knobs) / sizeof(all_knobs[0]) };

struct options {
    const char *out;
    int n_pos, budget, jobs;    /* n_pos -1: not given */
    struct cli_list set, knobs;
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
    char moved[MAX_KNOBS][64];  /* "KEY=VALUE" of the best plan so far; "": the plan's own */
    struct gen_plan plan;       /* the best so far */
    struct rt_tune_result base, best;
    uint64_t tried[MAX_TRIED];  /* digests of plans */
    int n_tried;
    int measured, slow, wrong, failed, better;
};

/* ---- Arguments ---- */

enum { OPT_RUNS = 256, OPT_DROP, OPT_JOBS, OPT_SEED, OPT_KNOBS, OPT_HELP, OPT_VERSION };

static const struct option longs[] = {
    { "random-weights", no_argument, NULL, 'r' },   { "device", required_argument, NULL, 'd' },
    { "budget", required_argument, NULL, 'b' },     { "positions", required_argument, NULL, 'p' },
    { "out", required_argument, NULL, 'o' },        { "knob", required_argument, NULL, 'k' },
    { "set", required_argument, NULL, 's' },        { "tokens", required_argument, NULL, 'n' },
    { "runs", required_argument, NULL, OPT_RUNS },  { "context", required_argument, NULL, 'c' },
    { "drop", required_argument, NULL, OPT_DROP },
    { "jobs", required_argument, NULL, OPT_JOBS },  { "seed", required_argument, NULL, OPT_SEED },
    { "list-knobs", no_argument, NULL, OPT_KNOBS }, { "help", no_argument, NULL, OPT_HELP },
    { "version", no_argument, NULL, OPT_VERSION },  { NULL, 0, NULL, 0 }
};

static void list_knobs(void)
{
    for (int i = 0; i < N_KNOBS; i++)
        printf("%-14s %s\n", all_knobs[i].key,
               all_knobs[i].values ? all_knobs[i].values : "1, 2 and 4 groups fewer, 1 and 2 more");
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

    while (!rc && (c = getopt_long(argc, argv, "rd:b:p:o:k:s:n:c:", longs, NULL)) != -1) {
        switch (c) {
        case 'r': t->bench.random_weights = 1; break;
        case 'd': rc = parse_device(o, optarg); break;
        case 'b': rc = cli_int("--budget", optarg, 1, 1000000, &o->budget); break;
        case 'p': rc = cli_int_list("--positions", optarg, 0, MAX_CONTEXT, t->pos,
                                    RT_TUNE_POSITIONS, &o->n_pos);
            break;
        case 'o': o->out = optarg; break;
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

/* ---- Plans ---- */

/* The value of KEY in a plan, as --dump-plan prints it, in OUT; "": there is no such key. */
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

/* The list for set options: those of the user, then those moved, with KNOB's as TEXT. */
static void fill_set(const struct search *s, int knob, const char *text, const char **set)
{
    int n = 0;

    for (int i = 0; i < s->o->set.n; i++)
        set[n++] = s->o->set.item[i];
    for (int i = 0; i < s->n_knobs; i++) {
        const char *item = i == knob ? text : s->moved[i];

        if (*item)
            set[n++] = item;
    }
    set[n] = NULL;
}

static const char **make_set(const struct search *s, int knob, const char *text)
{
    const char **set = calloc((size_t) (s->o->set.n + MAX_KNOBS + 1), sizeof(*set));

    if (set)
        fill_set(s, knob, text, set);
    return set;
}

static int make_plan(const struct search *s, const char *const *set, struct gen_plan *out,
                     struct mk_err *err)
{
    return gen_plan_make(&s->model, &s->device.gpu, s->o->tune.context, NULL, set, out, err);
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

/* Run the candidate SET against the best; what it is called in the table is NAME.
   Returns 1: it is better, also when measured again; 0; or a negative code. */
static int try_candidate(struct search *s, const char *const *set, const char *name,
                         struct rt_tune_result *r, struct mk_err *err)
{
    static const char *const ends[] = { "", "slower", "WRONG: ", "failed: ", "" };
    const double now = rt_tune_now(), limit = now + s->patience;
    char remark[1100];
    int rc;

    rc = rt_tune_run(s->t, set, RT_TUNE_AS_OTHERS, &s->best, limit < s->end ? limit : s->end, r, err);
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

        rc = rt_tune_run(s->t, set, RT_TUNE_AS_OTHERS, &s->best, now + 2 * s->patience, &again, err);
        if (rc)
            return rc;
        rc = beats(s, &again, &s->best);
        if (rc && ratio(s, &again, r) > 1)
            *r = again;         /* the slower of the two */
        print_row(s, name, r, ratio(s, r, &s->base) - 1, rc ? "better" : "better, but not twice");
        return rc;
    }
    if (r->end == RT_TUNE_RIGHT)
        snprintf(remark, sizeof(remark), "%s", ratio(s, r, &s->best) < 1 ? "within the noise" : "");
    else
        snprintf(remark, sizeof(remark), "%s%s", ends[r->end], r->end == RT_TUNE_SLOW ? "" : r->text);
    print_row(s, name, r, r->end == RT_TUNE_RIGHT ? ratio(s, r, &s->base) - 1 : 0, remark);
    return 0;
}

/* The candidate values of knob K as "KEY=VALUE"; returns how many. */
static int list_values(const struct search *s, int k, char (*text)[64])
{
    static const int more[] = { -1, -2, -4, 1, 2 };
    const char *at = s->knob[k].values, *key = s->knob[k].key;
    int n = 0;

    if (!at) {
        for (size_t i = 0; i < sizeof(more) / sizeof(more[0]); i++)
            if (s->plan.groups + more[i] > 0)
                snprintf(text[n++], 64, "%s=%d", key, (s->plan.groups + more[i]) * s->plan.group);
        return n;
    }
    while (*at && n < MAX_VALUES) {
        const int len = (int) strcspn(at, ",");

        snprintf(text[n++], 64, "%s=%.*s", key, len, at);
        at += len + (at[len] == ',');
    }
    return n;
}

/* Plans that differ from the best in knob K and were not tried: their choices to TEXT, themselves to
   PLANS, of which there is room for ROOM <= MAX_VALUES.  Returns how many. */
static int list_candidates(struct search *s, int k, char (*text)[64], struct gen_plan *plans, int room)
{
    const int values = list_values(s, k, text);
    int n = 0;

    for (int i = 0; i < values && n < room; i++) {
        const char **set = make_set(s, k, text[i]);
        struct mk_err ignored;

        if (set && make_plan(s, set, &plans[n], &ignored) == 0 && is_new(s, &plans[n]))
            memmove(text[n++], text[i], sizeof(*text));
        free(set);
    }
    return n;
}

static void compile(struct search *s, const struct gen_plan *plans, int n, double deadline)
{
    const struct gen_plan *list[MAX_VALUES];

    for (int i = 0; i < n; i++)
        list[i] = &plans[i];
    rt_tune_compile(s->t, list, n, s->o->jobs, deadline);
}

/* Compile the N candidates of knob K, in PLANS, and where jobs are left those of the next knobs,
   which are not tried yet and will be wanted unless this one improves something. */
static void compile_ahead(struct search *s, int k, struct gen_plan *plans, int n)
{
    const int tried = s->n_tried, room = s->o->jobs < MAX_VALUES ? s->o->jobs : MAX_VALUES;
    char text[MAX_VALUES][64];

    for (int next = k + 1; n && next < s->n_knobs && n < room; next++)
        n += list_candidates(s, next, text, plans + n, room - n);
    s->n_tried = tried;
    compile(s, plans, n, s->end);
}

/* Try every value of knob K; *IMPROVED: one was better. */
static int search_knob(struct search *s, int k, int *improved, struct mk_err *err)
{
    struct gen_plan *plans = calloc(MAX_VALUES, sizeof(*plans));
    char text[MAX_VALUES][64];
    int n, rc = 0;

    if (!plans)
        return gen_fail(err, MK_ENOMEM, "not enough memory");
    n = list_candidates(s, k, text, plans, MAX_VALUES);
    compile_ahead(s, k, plans, n);
    for (int i = 0; rc >= 0 && i < n && rt_tune_now() < s->end; i++) {
        const char **set = make_set(s, k, text[i]);
        struct rt_tune_result r;

        rc = set ? try_candidate(s, set, text[i], &r, err)
                 : gen_fail(err, MK_ENOMEM, "not enough memory");
        free(set);
        if (rc == 1) {
            snprintf(s->moved[k], sizeof(s->moved[k]), "%s", text[i]);
            s->plan = plans[i];
            s->best = r;
            s->better++;
            *improved = 1;
        }
    }
    free(plans);
    return rc < 0 ? rc : 0;
}

/* Rounds over all knobs, until one brings nothing or the time is over. */
static int search_all(struct search *s, struct mk_err *err)
{
    int rc = 0, improved = 1;

    while (rc == 0 && improved && rt_tune_now() < s->end) {
        improved = 0;
        for (int k = 0; rc == 0 && k < s->n_knobs && rt_tune_now() < s->end; k++)
            rc = search_knob(s, k, &improved, err);
    }
    return rc;
}

/* ---- Before the search ---- */

static int add_knob(struct search *s, const char *key, const char *values)
{
    const size_t n = strlen(key);

    for (int i = 0; i < s->o->set.n; i++)       /* fixed by the user */
        if (!strncmp(s->o->set.item[i], key, n) && s->o->set.item[i][n] == '=')
            return 0;
    s->knob[s->n_knobs++] = (struct knob) { key, values };
    return 0;
}

/* --knob KEY or KEY=A,B. */
static int add_asked_knob(struct search *s, const char *item)
{
    char *key = s->knob_text[s->n_knobs], *values, found[64];
    int i = 0, n = 1;

    if (snprintf(key, sizeof(s->knob_text[0]), "%s", item) >= (int) sizeof(s->knob_text[0]))
        return cli_usage("--knob: '%.40s...' is too long", item);
    values = strchr(key, '=');
    if (values)
        *values++ = 0;
    while (i < N_KNOBS && strcmp(all_knobs[i].key, key))
        i++;
    choice(&s->plan, key, found, sizeof(found));
    if (!*found)
        return cli_usage("--knob: '%s' is no plan choice (mkgen --list-keys)", key);
    for (const char *c = values; c && *c; c++)
        n += *c == ',';
    if (n > MAX_VALUES)
        return cli_usage("--knob: %s has more than %d values", key, MAX_VALUES);
    if (!values && i == N_KNOBS)
        return cli_usage("--knob: %s needs values, like %s=A,B", key, key);
    return add_knob(s, key, values ? values : all_knobs[i].values);
}

static int choose_knobs(struct search *s)
{
    int rc = 0;

    for (int i = 0; !rc && i < s->o->knobs.n; i++)
        rc = add_asked_knob(s, s->o->knobs.item[i]);
    for (int i = 0; !s->o->knobs.n && i < N_KNOBS; i++)
        add_knob(s, all_knobs[i].key, all_knobs[i].values);
    return rc;
}

/* The default plan: what it makes is checked, and is what the others are compared with. */
static int measure_default(struct search *s, struct mk_err *err)
{
    const char **set = make_set(s, -1, NULL);
    int rc = set ? make_plan(s, set, &s->plan, err) : gen_fail(err, MK_ENOMEM, "not enough memory");

    if (rc == 0 && is_new(s, &s->plan)) {
        compile(s, &s->plan, 1, HUGE_VAL);
        rc = rt_tune_run(s->t, set, RT_TUNE_AS_REFERENCE, NULL, HUGE_VAL, &s->base, err);
    }
    free(set);
    if (rc == 0 && s->base.end != RT_TUNE_RIGHT)
        rc = gen_fail(err, MK_EDEVICE, "the default plan %s: %s",
                      s->base.end == RT_TUNE_WRONG ? "is wrong" : "cannot be measured", s->base.text);
    s->best = s->base;
    s->patience = PATIENCE * s->base.seconds + PATIENCE_S;
    return rc;
}

/* ---- The plan file ---- */

/* TEXT without what would end a line, and of a length that a plan file can have. */
static void put_words(FILE *f, int n, char **words)
{
    int left = 400;

    for (int i = 0; i < n; i++) {
        fputc(' ', f);
        for (const char *c = words[i]; *c && left > 0; c++, left--)
            fputc(isprint((unsigned char) *c) ? *c : '?', f);
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

/* Was KEY moved by the search? */
static int is_moved(const struct search *s, const char *key)
{
    for (int i = 0; i < s->n_knobs; i++)
        if (!strcmp(s->knob[i].key, key))
            return *s->moved[i] != 0;
    return 0;
}

/* Every knob of the table as it is in the plan, and what the user set or added.  Not the number of
   CTAs that the plan finds by itself: parts of one product hold different numbers of clusters. */
static void put_choices(FILE *f, const struct search *s)
{
    char value[64];

    fprintf(f, "\n[choices]\n");
    for (int i = 0; i < N_KNOBS; i++) {
        choice(&s->plan, all_knobs[i].key, value, sizeof(value));
        if (strcmp(all_knobs[i].key, "ctas") || is_moved(s, "ctas"))
            fprintf(f, "%s = %s\n", all_knobs[i].key, value);
    }
    for (int i = 0; i < s->n_knobs; i++) {
        int known = 0;

        for (int j = 0; j < N_KNOBS; j++)
            known |= !strcmp(all_knobs[j].key, s->knob[i].key);
        choice(&s->plan, s->knob[i].key, value, sizeof(value));
        if (!known && *s->moved[i])
            fprintf(f, "%s = %s\n", s->knob[i].key, value);
    }
    for (int i = 0; i < s->o->set.n; i++)
        fprintf(f, "%s\n", s->o->set.item[i]);
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
    const char **set;
    int rc;

    memset(s->moved, 0, sizeof(s->moved));
    s->best = s->base;
    s->better = 0;
    set = make_set(s, -1, NULL);
    rc = set ? make_plan(s, set, &s->plan, err) : gen_fail(err, MK_ENOMEM, "not enough memory");
    free(set);
    return rc;
}

/* Default and best plan once more, the best against the C reference too: these are the figures
   of the file.  A gain that does not hold now is none. */
static int measure_again(struct search *s, struct mk_err *err)
{
    const char **set = make_set(s, -1, NULL);
    const double deadline = rt_tune_now() + 4 * s->patience;
    struct rt_tune_result best, base;
    int rc = set ? 0 : gen_fail(err, MK_ENOMEM, "not enough memory");

    if (rc == 0)
        rc = rt_tune_run(s->t, set, RT_TUNE_AS_BOTH, NULL, deadline, &best, err);
    if (rc == 0) {
        set[s->o->set.n] = NULL;        /* what is moved stands behind what the user set */
        rc = rt_tune_run(s->t, set, RT_TUNE_AS_OTHERS, NULL, deadline, &base, err);
    }
    free(set);
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

    if (s->table)
        print_head(s);
    rc = measure_default(s, &err);
    if (rc == 0)
        rc = choose_knobs(s);
    if (rc > 0)
        return rc;
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
    free(o.knobs.item);
    free(argv_copy);
    return cli_end(rc < 0 ? CLI_OK : rc);
}
