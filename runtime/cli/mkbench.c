/* mkbench.c - how fast, at which position, and was it right.  The measuring is behind
   runtime/bench.h; here are arguments, statistics and tables. */
#include "config.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "runtime/abi.h"
#include "runtime/bench.h"
#include "runtime/cli/cli.h"
#include "runtime/verdict.h"

static const char help[] =
    "Usage: mkbench MODEL [OPTION]...\n"
    "Measure decode and prefill on the GPU, check what was measured, print a table.\n"
    "MODEL is a folder with config.json and weights.\n"
    "\n"
    "  -r, --random-weights  make weights; MODEL is then a carried model (mkgen\n"
    "                        --list-models), a folder with config.json, or that file\n"
    "  -p, --pos LIST        positions at which decode starts, or none\n"
    "                        (default: 1,200,1024,3900)\n"
    "  -f, --prefill LIST    lengths of prefill, or none (default: 16,128,512,2048)\n"
    "  -n, --tokens N        tokens of one decode run (default 64)\n"
    "      --runs N          timed runs (default 10)\n"
    "  -c, --context N       tokens that the KV cache holds (default: what is needed, at\n"
    "                        least 4096 or the model's maximum)\n"
    "      --stages          print what the stages of decode take, and what was predicted\n"
    "                        (a kernel with clocks)\n"
    "      --seed N          of made weights and of prompts (default 1)\n"
    "  -j, --json FILE       the results as JSON; \"-\" is standard output, without the table\n"
    "      --plan FILE       plan choices of the kernel, or none, see mkgen\n"
    "  -s, --set KEY=VALUE   one plan choice, see mkgen; may be repeated\n"
    "      --help, --version\n"
    "\n"
    "Every row is checked against the C reference on the same weights and KV cache; a row\n"
    "whose output was wrong shows no time, and the exit status is 1.\n"
    "\n"
    "Example: mkbench qwen3-0.6b --random-weights --pos 1,3900 --prefill 2048\n";

enum { MAX_ROWS = 64, MAX_RUNS = 1000, MAX_CONTEXT = 1 << 24 };

static const int default_pos[] = { 1, 200, 1024, 3900 };
static const int default_prefill[] = { 16, 128, 512, 2048 };

struct options {
    const char *where, *json;
    int pos[MAX_ROWS], prefill[MAX_ROWS];
    int n_pos, n_prefill;       /* -1: not given */
    int tokens, runs, context;
    int stages;                 /* print their cycles, too */
    struct cli_list set;
    struct rt_bench_options bench;
};

struct row {
    int decode;                 /* 1: decode from position AT; 0: prefill of AT tokens */
    int at;
    double median, min, max;    /* ms: a token of decode, a whole prefill */
    double tok_s, gbps, of_measured, of_sheet;  /* the last two in percent; of_sheet 0: unknown */
    int64_t bytes;              /* read for a token of decode (in the middle), for a prefill */
    int clock_mhz;
    struct rt_bench_verdict verdict;
};

struct report {
    struct rt_bench_facts facts;
    double read_gbps;
    char method[128];
    char date[32];
    struct row row[2 * MAX_ROWS];
    int n;
};

/* ---- Arguments ---- */

enum { OPT_RUNS = 256, OPT_STAGES, OPT_SEED, OPT_PLAN, OPT_HELP, OPT_VERSION };

static const struct option longs[] = {
    { "random-weights", no_argument, NULL, 'r' }, { "pos", required_argument, NULL, 'p' },
    { "prefill", required_argument, NULL, 'f' },  { "tokens", required_argument, NULL, 'n' },
    { "runs", required_argument, NULL, OPT_RUNS }, { "context", required_argument, NULL, 'c' },
    { "stages", no_argument, NULL, OPT_STAGES },
    { "seed", required_argument, NULL, OPT_SEED }, { "json", required_argument, NULL, 'j' },
    { "plan", required_argument, NULL, OPT_PLAN }, { "set", required_argument, NULL, 's' },
    { "help", no_argument, NULL, OPT_HELP },      { "version", no_argument, NULL, OPT_VERSION },
    { NULL, 0, NULL, 0 }
};

static int check_options(struct options *o, int argc, char **argv)
{
    if (optind == argc)
        return cli_usage("the model is missing");
    if (optind + 1 < argc)
        return cli_usage("'%s' is too much: one model", argv[optind + 1]);
    if (o->n_pos == 0 && o->n_prefill == 0)
        return cli_usage("--pos none and --prefill none leave nothing to measure");
    o->where = argv[optind];
    o->bench.set = o->set.item;
    return 0;
}

/* Returns 0, an exit status, or -1: the whole job was done here. */
static int parse(int argc, char **argv, struct options *o)
{
    int c, rc = 0;

    while (!rc && (c = getopt_long(argc, argv, "rp:f:n:c:j:s:", longs, NULL)) != -1) {
        switch (c) {
        case 'r': o->bench.random_weights = 1; break;
        case 'p': rc = cli_int_list("--pos", optarg, 0, MAX_CONTEXT, o->pos, MAX_ROWS, &o->n_pos);
            break;
        case 'f': rc = cli_int_list("--prefill", optarg, 1, MAX_CONTEXT, o->prefill, MAX_ROWS,
                                    &o->n_prefill);
            break;
        case 'n': rc = cli_int("--tokens", optarg, 1, MAX_CONTEXT, &o->tokens); break;
        case 'c': rc = cli_int("--context", optarg, 1, MAX_CONTEXT, &o->context); break;
        case 'j': o->json = optarg; break;
        case 's': rc = cli_list_add(&o->set, optarg); break;
        case OPT_RUNS: rc = cli_int("--runs", optarg, 1, MAX_RUNS, &o->runs); break;
        case OPT_STAGES:
            o->stages = 1;
            rc = cli_list_add(&o->set, "timing=on");
            break;
        case OPT_SEED: rc = cli_u64("--seed", optarg, &o->bench.seed); break;
        case OPT_PLAN: o->bench.plan_file = optarg; break;
        case OPT_HELP: fputs(help, stdout); return -1;
        case OPT_VERSION: cli_version(); return -1;
        default: return cli_bad_option();
        }
    }
    return rc ? rc : check_options(o, argc, argv);
}

/* The defaults that fit into LIMIT tokens. */
static int take_defaults(const int *from, int n, int more, int limit, int *out)
{
    int taken = 0;

    for (int i = 0; i < n; i++)
        if (from[i] + more <= limit)
            out[taken++] = from[i];
    return taken;
}

static int larger(int a, int b)
{
    return a > b ? a : b;
}

/* Fill in what was not given.  A prefill needs one place more, for the token that follows. */
static int plan_rows(struct options *o, const struct gen_model *m)
{
    int limit = o->context ? o->context : m->max_context, need = 0;

    if (limit > m->max_context)
        return cli_fail("--context %d: the maximum of %s is %d", limit, m->name, m->max_context);
    if (o->n_pos < 0)
        o->n_pos = take_defaults(default_pos, 4, o->tokens, limit, o->pos);
    if (o->n_prefill < 0)
        o->n_prefill = take_defaults(default_prefill, 4, 1, limit, o->prefill);
    for (int i = 0; i < o->n_pos; i++)
        need = larger(need, o->pos[i] + o->tokens);
    for (int i = 0; i < o->n_prefill; i++)
        need = larger(need, o->prefill[i] + 1);
    if (need == 0)
        return cli_fail("--context %d leaves nothing to measure", limit);
    if (need > limit)
        return cli_fail("%d tokens of context are needed for these positions and lengths, %s %d",
                        need, o->context ? "--context says" : "the model's maximum is", limit);
    if (!o->context)
        o->context = larger(need, m->max_context < 4096 ? m->max_context : 4096);
    return 0;
}

/* ---- Measuring ---- */

static int by_size(const void *a, const void *b)
{
    float x = *(const float *) a, y = *(const float *) b;

    return (x > y) - (x < y);
}

static void fill_times(struct row *r, float *ms, int runs, int tokens, const struct report *rep)
{
    qsort(ms, (size_t) runs, sizeof(*ms), by_size);
    r->min = ms[0];
    r->max = ms[runs - 1];
    r->median = 0.5 * (ms[(runs - 1) / 2] + ms[runs / 2]);
    if (r->median <= 0)
        return;
    r->tok_s = 1e3 * tokens / r->median;
    r->gbps = 1e-6 * (double) r->bytes / r->median;
    if (rep->read_gbps > 0)
        r->of_measured = 100 * r->gbps / rep->read_gbps;
    if (rep->facts.sheet_gbps > 0)
        r->of_sheet = 100 * r->gbps / rep->facts.sheet_gbps;
}

/* Time one row, then check that very run. */
static int measure(struct rt_bench *b, const struct options *o, const struct report *rep,
                   struct row *r, float *ms, struct mk_err *err)
{
    struct rt_bench_run run = { .runs = o->runs, .ms = ms };
    int rc;

    if (r->decode) {
        rc = rt_bench_fill_kv(b, r->at, err);
        rc = rc ? rc : rt_bench_decode(b, r->at, o->tokens, &run, err);
        rc = rc ? rc : rt_bench_check_decode(b, &r->verdict, err);
        r->bytes = rt_bench_decode_bytes(b, r->at + o->tokens / 2);
    } else {
        rc = rt_bench_prefill(b, r->at, &run, err);
        rc = rc ? rc : rt_bench_check_prefill(b, &r->verdict, err);
        r->bytes = rt_bench_prefill_bytes(b, r->at);
    }
    if (rc)
        return rc;
    r->clock_mhz = run.clock_mhz;
    if (r->verdict.correct)
        fill_times(r, ms, o->runs, r->decode ? 1 : r->at, rep);
    return 0;
}

/* ---- The stages ---- */

/* What is further than this from its prediction is marked, unless it is a small part of a token. */
static const double most_off = 15, small_part = 1;

/* A stage in one kind of CTAs, which takes TOKEN cycles in all: measured, of these for the ring,
   predicted, and how much longer it took.  All in cycles of a token; shown divided by TIMES. */
static void print_stage(double measured, double waited, double predicted, double token, int times)
{
    const double late = measured - predicted;
    const int is_off = 100 * (late < 0 ? -late : late) > most_off * predicted &&
                       100 * (late < 0 ? -late : late) > small_part * token;

    printf(" %10.0f (%8.0f) %9.0f", measured / times, waited / times, predicted / times);
    if (predicted > 0)
        printf(" %+5.0f %%", 100 * late / predicted);
    else
        printf(" %7s", "-");
    printf("%c", is_off ? '!' : ' ');
}

static void print_stage_table(const struct rt_bench_stage *stage, const struct gen_prediction *p,
                              int layers)
{
    struct rt_bench_stage all = { .name = "all" };

    for (int i = 0; i < MK_LAP_COUNT; i++)
        for (int kind = 0; kind < GEN_KINDS; kind++) {
            all.cycles[kind] += stage[i].cycles[kind];
            all.waited[kind] += stage[i].waited[kind];
        }
    for (int i = 0; i <= MK_LAP_COUNT; i++) {
        const struct rt_bench_stage *s = i < MK_LAP_COUNT ? &stage[i] : &all;

        printf("    %-10s", s->name);
        for (int kind = 0; kind < GEN_KINDS; kind++)
            if (p->ctas[kind])
                print_stage(s->cycles[kind], s->waited[kind],
                            s == &all ? p->token : p->cycles[kind][i], all.cycles[kind],
                            s->per_layer ? layers : 1);
        printf("  %s\n", s->per_layer ? "layer" : "token");
    }
}

static void print_stage_head(const struct row *r, const struct gen_prediction *p)
{
    printf("    predicted %.1f us a token, with %sconstants, %s", p->token_us,
           p->measured ? "the " : "another GPU's ", p->from);
    if (r->median > 0)
        printf("; measured %+.0f %%", 100 * (1e3 * r->median / p->token_us - 1));
    printf("\n    %-10s", "");
    for (int kind = 0; kind < GEN_KINDS; kind++)
        if (p->ctas[kind])
            printf(" %-40s", kind == GEN_WITH_HEADS ? "groups with heads" : "other groups");
    printf("\n    %-10s", "cycles");
    for (int kind = 0; kind < GEN_KINDS; kind++)
        if (p->ctas[kind])
            printf(" %10s (%8s) %9s %8s", "measured", "for ring", "predicted", "late ");
    printf("  of a\n");
}

/* One more run from the row's position, whose stages are measured. */
static int print_stages(struct rt_bench *b, const struct options *o, const struct row *r,
                        struct mk_err *err)
{
    struct rt_bench_stage stage[MK_LAP_COUNT];
    struct gen_prediction predicted;
    struct rt_bench_facts facts;
    int rc;

    rt_bench_facts(b, &facts);
    rc = rt_bench_fill_kv(b, r->at, err);
    rc = rc ? rc : rt_bench_stages(b, r->at, o->tokens, stage, &predicted, err);
    if (rc)
        return rc;
    print_stage_head(r, &predicted);
    print_stage_table(stage, &predicted, facts.model.L);
    return 0;
}

/* ---- The table ---- */

static void print_head(const struct report *rep, const struct options *o)
{
    static const char *const from[] = {"?", "compiled", "cache", "pack"};
    const struct rt_bench_facts *f = &rep->facts;
    char size[16];

    printf("%s, %s weights, %s, context %d\n", f->model.name,
           o->bench.random_weights ? "random" : "checkpoint", cli_size(f->weight_bytes, size),
           f->context);
    printf("%s, sm_%d, %d SMs, driver for CUDA %d.%d\n", f->gpu, f->arch, f->sms,
           f->driver / 1000, f->driver % 1000 / 10);
    if (*f->plan_source->file)
        printf("plan %s\n", f->plan_source->file);
    if (*f->plan_source->predicted)
        printf("plan: the performance model's %s\n", f->plan_source->predicted);
    printf("start: driver %.2f s, weights %.2f s; kernel %.3f s (%s), buffers %.3f s, first token %.3f s\n",
           f->start.driver, f->start.weights, f->start.kernel, from[f->kernel_from & 3], f->start.buffers,
           f->start.token);
    printf("read bandwidth %.0f GB/s (%s)", rep->read_gbps, rep->method);
    if (f->sheet_gbps > 0)
        printf(", %.1f %% of the data sheet's %d", 100 * rep->read_gbps / f->sheet_gbps,
               f->sheet_gbps);
    printf("\ndecode: ms per token over %d tokens; prefill: ms until the next token; "
           "%d runs each\n\n", o->tokens, o->runs);
    printf("%-8s %6s %9s %9s %9s %9s %7s %6s %6s %6s  %s\n", "phase", "pos/n", "median", "min",
           "max", "tok/s", "GB/s", "%read", "%sheet", "MHz", "output");
}

static void print_row(const struct row *r)
{
    printf("%-8s %6d ", r->decode ? "decode" : "prefill", r->at);
    if (!r->verdict.correct) {
        printf("WRONG: %s\n", r->verdict.text);
        return;
    }
    printf("%9.3f %9.3f %9.3f %9.1f %7.0f %6.1f ", r->median, r->min, r->max, r->tok_s, r->gbps,
           r->of_measured);
    if (r->of_sheet > 0)
        printf("%6.1f ", r->of_sheet);
    else
        printf("%6s ", "-");
    if (r->clock_mhz > 0)
        printf("%6d", r->clock_mhz);
    else
        printf("%6s", "-");
    printf("  correct (%d tokens, error %.2g of %.2g)\n", r->verdict.checked,
           r->verdict.max_error, r->verdict.tolerance);
}

/* ---- JSON ---- */

static void json_text(FILE *f, const char *key, const char *value)
{
    fprintf(f, "\"%s\": \"", key);
    for (; *value; value++) {
        unsigned char c = (unsigned char) *value;

        if (c == '"' || c == '\\')
            fprintf(f, "\\%c", c);
        else if (c < 0x20)
            fprintf(f, "\\u%04x", c);
        else
            fputc(c, f);
    }
    fputc('"', f);
}

static void json_row(FILE *f, const struct report *rep, const struct row *r, const char *end)
{
    fputs("    {", f);
    json_text(f, "model", rep->facts.model.name);
    fprintf(f, ", \"phase\": \"%s\", \"%s\": %d, \"correct\": %s", r->decode ? "decode" : "prefill",
            r->decode ? "pos" : "tokens", r->at, r->verdict.correct ? "true" : "false");
    if (r->verdict.correct)
        fprintf(f, ", \"ms_median\": %.6g, \"ms_min\": %.6g, \"ms_max\": %.6g, \"tok_s\": %.6g, "
                "\"bytes\": %lld, \"gbps\": %.6g, \"pct_of_measured\": %.4g", r->median, r->min,
                r->max, r->tok_s, (long long) r->bytes, r->gbps, r->of_measured);
    if (r->of_sheet > 0)
        fprintf(f, ", \"pct_of_sheet\": %.4g", r->of_sheet);
    if (r->clock_mhz > 0)
        fprintf(f, ", \"sm_clock_mhz\": %d", r->clock_mhz);
    fputs(", ", f);
    json_text(f, "verdict", r->verdict.text);
    fprintf(f, "}%s\n", end);
}

static int write_json(const struct report *rep, const struct options *o, struct cli_file *out)
{
    const struct rt_bench_facts *facts = &rep->facts;
    FILE *f = out->stream;

    fputs("{\n  ", f);
    json_text(f, "gpu", facts->gpu);
    fprintf(f, ",\n  \"driver\": \"%d.%d\",\n  ", facts->driver / 1000, facts->driver % 1000 / 10);
    json_text(f, "date", rep->date);
    fprintf(f, ",\n  \"mkgen\": \"%s\",\n  \"read_gbps\": %.6g,\n  ", PACKAGE_VERSION,
            rep->read_gbps);
    json_text(f, "read_method", rep->method);
    fprintf(f, ",\n  \"start_s\": {\"driver\": %.4g, \"weights\": %.4g, \"kernel\": %.4g, \"buffers\": %.4g, "
            "\"first_token\": %.4g}", facts->start.driver, facts->start.weights, facts->start.kernel,
            facts->start.buffers, facts->start.token);
    fprintf(f, ",\n  \"sheet_gbps\": %d,\n  \"weights\": \"%s\",\n  \"weight_bytes\": %lld,\n"
            "  \"context\": %d,\n  \"decode_tokens\": %d,\n  \"runs\": %d,\n  \"rows\": [\n",
            facts->sheet_gbps, o->bench.random_weights ? "random" : "checkpoint",
            (long long) facts->weight_bytes, facts->context, o->tokens, o->runs);
    for (int i = 0; i < rep->n; i++)
        json_row(f, rep, &rep->row[i], i + 1 < rep->n ? "," : "");
    fputs("  ]\n}\n", f);
    return cli_file_done(out);
}

/* ---- All of it ---- */

static int run_rows(struct rt_bench *b, const struct options *o, struct report *rep, int table)
{
    float *ms = calloc((size_t) o->runs, sizeof(*ms));
    int total = o->n_pos + o->n_prefill, status = CLI_OK;
    struct mk_err err;

    if (!ms)
        return cli_fail("not enough memory");
    for (int i = 0; i < total; i++) {
        struct row *r = &rep->row[i];

        r->decode = i < o->n_pos;
        r->at = r->decode ? o->pos[i] : o->prefill[i - o->n_pos];
        cli_progress(NULL, "measure", (double) i / total);
        if (measure(b, o, rep, r, ms, &err)) {
            status = cli_error(&err);
            break;
        }
        rep->n++;
        cli_progress_clear();
        if (table)
            print_row(r);
        if (table && r->decode && o->stages && print_stages(b, o, r, &err)) {
            status = cli_error(&err);
            break;
        }
        fflush(stdout);
        if (!r->verdict.correct)
            status = CLI_FAILED;
    }
    cli_progress_clear();
    free(ms);
    return status;
}

/* JSON: where it goes; done or dropped here. */
static int measure_all(struct rt_bench *b, const struct options *o, struct cli_file *json)
{
    struct report *rep = calloc(1, sizeof(*rep));
    int table = !o->json || strcmp(o->json, "-"), status, total = o->n_pos + o->n_prefill;
    time_t now = time(NULL);
    struct mk_err err;
    struct tm utc;

    if (!rep) {
        cli_file_drop(json);
        return cli_fail("not enough memory");
    }
    strftime(rep->date, sizeof(rep->date), "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
    rt_bench_facts(b, &rep->facts);
    if (rt_bench_bandwidth(b, &rep->read_gbps, rep->method, &err)) {
        free(rep);
        cli_file_drop(json);
        return cli_error(&err);
    }
    if (table)
        print_head(rep, o);
    status = run_rows(b, o, rep, table);
    /* Wrong rows are a result and are written down; a run that broke off is not. */
    if (rep->n < total)
        cli_file_drop(json);
    else if (o->json && write_json(rep, o, json))
        status = CLI_FAILED;
    free(rep);
    return status;
}

static int run(struct options *o)
{
    struct cli_file json = { 0 };
    struct rt_bench *b;
    struct gen_model m;
    struct mk_err err;
    int status, rc;

    if (gen_model_read(o->where, &m, &err))
        return cli_error(&err);
    status = plan_rows(o, &m);
    if (status)
        return status;
    /* A place that cannot be written is known before minutes of measuring. */
    if (o->json && cli_file_open(&json, o->json))
        return CLI_FAILED;
    rc = rt_bench_open(o->where, o->context, &o->bench, &b, &err);
    if (rc) {
        cli_file_drop(&json);
        return cli_error(&err);
    }
    cli_progress_clear();
    status = measure_all(b, o, &json);
    rt_bench_close(b);
    return status;
}

int main(int argc, char **argv)
{
    struct options o = {
        .n_pos = -1, .n_prefill = -1, .tokens = 64, .runs = 10,
        .bench = { .seed = 1, .progress = cli_progress, .warn = cli_warn },
    };
    int rc;

    cli_start("mkbench", argc, argv);
    rc = parse(argc, argv, &o);
    if (rc == 0)
        rc = run(&o);
    free(o.set.item);
    return cli_end(rc < 0 ? CLI_OK : rc);
}
