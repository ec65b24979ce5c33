/* mktune.c - search the plan's choices for those with which this GPU decodes fastest.  The
   search is behind search.h; here are arguments, the table, and the plan file. */
#include "config.h"
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "runtime/cli/search.h"
#include "runtime/device.h"

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

enum { MAX_CONTEXT = 1 << 24 };

struct options {
    const char *out;
    int n_pos, budget;          /* n_pos -1: not given */
    struct search_options search;
    int argc;
    char **argv;
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
    const struct search_knob *k;

    for (int i = 0; (k = search_knob(i)); i++)
        printf("%-33s %s\n", k->keys,
               k->values ? k->values : "1, 2 and 3 groups fewer, 1 and 2 more");
}

static int check_options(struct options *o, int argc, char **argv)
{
    if (optind == argc)
        return cli_usage("the model is missing");
    if (optind + 1 < argc)
        return cli_usage("'%s' is too much: one model", argv[optind + 1]);
    if (o->n_pos == 0)
        return cli_usage("--positions none leaves nothing to measure");
    if (o->search.knobs.n > SEARCH_KNOBS)
        return cli_usage("--knob: more than %d", SEARCH_KNOBS);
    if (o->search.tries.n > SEARCH_VALUES)
        return cli_usage("--try: more than %d", SEARCH_VALUES);
    if (o->search.set.n > SEARCH_SET)
        return cli_usage("--set: more than %d", SEARCH_SET);
    o->search.tune.where = argv[optind];
    return 0;
}

static int parse_device(struct options *o, const char *text)
{
    struct mk_err err;
    int arch;

    o->search.tune.bench.device = strcmp(text, "0") ? text : "gpu";
    return rt_device_which(o->search.tune.bench.device, &arch, &err)
               ? cli_usage("--device: '%s' is not gpu, 0, host or host:sm_XX", text) : 0;
}

/* Returns 0, an exit status, or -1: the whole job was done here. */
static int parse(int argc, char **argv, struct options *o)
{
    struct rt_tune_options *t = &o->search.tune;
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
        case 't': rc = cli_list_add(&o->search.tries, optarg); break;
        case 'k': rc = cli_list_add(&o->search.knobs, optarg); break;
        case 's': rc = cli_list_add(&o->search.set, optarg); break;
        case 'n': rc = cli_int("--tokens", optarg, 1, 1024, &t->tokens); break;
        case 'c': rc = cli_int("--context", optarg, 1, MAX_CONTEXT, &t->context); break;
        case OPT_RUNS: rc = cli_int("--runs", optarg, 1, 1000, &t->runs); break;
        case OPT_DROP: rc = cli_int("--drop", optarg, 0, 1000000, &t->drop_percent); break;
        case OPT_JOBS: rc = cli_int("--jobs", optarg, 1, 1024, &o->search.jobs); break;
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
    struct rt_tune_options *t = &o->search.tune;
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

static void print_row(const struct search *s, const char *name, const struct rt_tune_result *r,
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

static void put_provenance(FILE *f, const struct options *o, const struct search *s)
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
    put_words(f, o->argc, o->argv);
}

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

/* Does KEY stand in the file?  What the user set or the search moved, and all of the table, but for
   what the plan finds by itself and another part of the product may have otherwise: it holds other
   numbers of clusters, or none. */
static int is_put(const struct search *s, const char *key)
{
    static const char of_a_part[] = "ctas team_from cluster early";
    int put = search_has_key(s->moved, key);

    for (int i = 0; i < s->o->set.n; i++)
        put |= search_has_key(s->o->set.item[i], key);
    for (int i = 0; search_knob(i); i++)
        put |= search_has_key(search_knob(i)->keys, key) && !search_has_key(of_a_part, key);
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

static int write_plan(const struct options *o, const struct search *s, struct cli_file *out)
{
    put_provenance(out->stream, o, s);
    put_choices(out->stream, s);
    return cli_file_done(out);
}

/* ---- All of it ---- */

/* The search; OUT is open when --out says where. */
static int tune(const struct options *o, struct search *s, struct cli_file *out)
{
    struct mk_err err;
    char name[160];
    int rc;

    rc = search_prepare(s);
    if (rc)
        return rc;
    if (s->table)
        print_head(s);
    if (search_run(s, &err))
        return cli_error(&err);
    cli_progress_clear();
    if (!out->stream) {
        char file[64];

        gen_plan_file_name(&s->device.gpu, file, sizeof(file));
        snprintf(name, sizeof(name), "%s-%s", s->model.name, file);
        if (cli_file_open(out, name))
            return CLI_FAILED;
    }
    if (write_plan(o, s, out))
        return CLI_FAILED;
    cli_note("%s after %.0f s; wrote %s", s->better ? "found a better plan" : "the default plan is best",
             rt_tune_now() - s->start, o->out ? o->out : name);
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
    s->o = &o->search;
    s->start = rt_tune_now();
    s->end = s->start + o->budget;
    s->table = o->out && !strcmp(o->out, "-") ? NULL : stdout;
    s->row = print_row;
    o->search.tune.tick = tick;
    o->search.tune.user = s;
    if (gen_model_read(o->search.tune.where, &s->model, &err))
        status = cli_error(&err);
    else if ((status = plan_positions(o, &s->model)) != 0)
        ;
    /* A place that cannot be written is known before minutes of measuring. */
    else if (o->out && cli_file_open(&out, o->out))
        status = CLI_FAILED;
    else if (rt_tune_open(&o->search.tune, &s->model, &s->t, &err) ||
             rt_tune_ask(s->t, &s->device, &err))
        status = cli_error(&err);
    else
        status = tune(o, s, &out);
    cli_file_drop(&out);
    rt_tune_close(s->t);
    free(s);
    return status;
}

int main(int argc, char **argv)
{
    struct options o = {
        .n_pos = -1, .budget = 600,
        .search = { .jobs = (int) sysconf(_SC_NPROCESSORS_ONLN),
                    .tune = { .tokens = 64, .runs = 7, .drop_percent = 5,
                              .bench = { .seed = 1, .warn = cli_warn } } },
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
    free(o.search.set.item);
    free(o.search.tries.item);
    free(o.search.knobs.item);
    free(argv_copy);
    return cli_end(rc < 0 ? CLI_OK : rc);
}
