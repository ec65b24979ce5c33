/* mkgen.c - model x GPU -> CUDA source, cubin, pack. */
#include "config.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "gen/gen.h"
#include "runtime/cli/cli.h"
#include "runtime/device.h"
#include "runtime/key.h"
#include "runtime/product.h"

static const char help[] =
    "Usage: mkgen --model MODEL [--arch ARCH]... [OPTION]...\n"
    "Write the CUDA source of one persistent kernel for a language model on a GPU.\n"
    "\n"
    "What to generate:\n"
    "  -m, --model MODEL    name of a carried model, a folder with config.json, or the file\n"
    "  -a, --arch ARCH      sm_75 ... sm_121, native (the GPU in this machine, the default),\n"
    "                       all, or host (the emulated GPU); may be repeated\n"
    "      --emulate ARCH   what --arch host emulates (default sm_90); its source is C++\n"
    "  -g, --gpu GPU        name of a GPU profile or a file as --print-gpu writes it;\n"
    "                       without it, the default profile of the architecture\n"
    "  -c, --context N      tokens that the KV cache holds\n"
    "                       (default: the model's maximum or 4096, whichever is smaller)\n"
    "  -p, --plan FILE      plan choices, one \"key = value\" per line; or none (default: the\n"
    "                       file carried for this model and GPU, if there is no --set)\n"
    "  -s, --set KEY=VALUE  one plan choice; wins over the file; may be repeated\n"
    "\n"
    "What to write (without any of these: NAME-sm_XX.cu, or NAME-host-sm_XX.cu, in the\n"
    "current folder):\n"
    "  -o, --output FILE    the source; \"-\" is standard output\n"
    "      --cubin FILE     the compiled kernel (host: a shared object)\n"
    "      --pack DIR       compiled kernels as entries of the pack folder DIR, one for every\n"
    "                       number of clusters that parts of this GPU hold, one without\n"
    "      --compile        the compiled kernel as an entry of the cache, where the engine\n"
    "                       finds it; prints its folder, size and time\n"
    "      --dump-plan      the plan, on standard output\n"
    "      --print-gpu      the GPU's properties, on standard output; needs no model\n"
    "\n"
    "      --list-models    carried models\n"
    "      --list-gpus      GPU profiles\n"
    "      --list-keys      plan choices\n"
    "  -q, --quiet          no summary\n"
    "      --help, --version\n"
    "\n"
    "Example: mkgen --model qwen3-0.6b --arch sm_90 --cubin qwen3.cubin\n";

enum { NATIVE = -1, HOST = -2, MAX_ARCHS = 32, DEFAULT_EMULATE = 90 };

struct options {
    const char *model, *gpu, *plan, *output, *cubin, *pack;
    struct cli_list set;
    int archs[MAX_ARCHS];       /* 75 ..., NATIVE or HOST */
    int n_archs;
    int all;                    /* --arch all: what the NVRTC does not know is skipped */
    int emulate;                /* of --arch host; 0: not given */
    int context;
    int compile, dump_plan, print_gpu, quiet;
};

/* ---- Lists ---- */

static int list_models(void)
{
    struct gen_model m;
    struct mk_err err;
    int status = CLI_OK;
    const char *name;

    for (int i = 0; (name = gen_model_carried(i)); i++) {
        if (gen_model_read(name, &m, &err)) {
            status = cli_error(&err);
            continue;
        }
        printf("%-16s %-6s %6.2f G parameters, %d layers, hidden %d, heads %d/%d x %d, ffn %d\n",
               name, m.family, 1e-9 * (double) gen_model_params(&m), m.L, m.D, m.H, m.K, m.E, m.F);
    }
    return status;
}

static int list_gpus(void)
{
    const char *name;

    for (int i = 0; (name = gen_gpu_profile(i)); i++) {
        struct gen_gpu g, def;
        struct mk_err err;
        int is_default;

        if (gen_gpu_read(name, &g, &err))
            return cli_error(&err);
        is_default = gen_gpu_default(g.arch, &def, NULL) == 0 && !strcmp(def.name, g.name);
        printf("%-12s sm_%-3d %4d SMs, %5d GB/s%s\n", name, g.arch, g.sms, g.mem_gbps,
               is_default ? ", default of its architecture" : "");
    }
    return CLI_OK;
}

static int list_keys(void)
{
    const char *line;

    for (int i = 0; (line = gen_plan_key(i)); i++)
        puts(line);
    return CLI_OK;
}

/* ---- Arguments ---- */

static int add_arch(struct options *o, int arch)
{
    for (int i = 0; i < o->n_archs; i++)
        if (o->archs[i] == arch)
            return 0;
    if (o->n_archs == MAX_ARCHS)
        return cli_usage("--arch: more than %d architectures", MAX_ARCHS);
    o->archs[o->n_archs++] = arch;
    return 0;
}

static int parse_arch(struct options *o, const char *text)
{
    struct mk_err err;
    int arch, rc = 0;

    if (!strcmp(text, "native"))
        return add_arch(o, NATIVE);
    if (!strcmp(text, "host"))
        return add_arch(o, HOST);
    if (!strcmp(text, "all")) {
        o->all = 1;
        for (const int *a = gen_gpu_archs(); *a && !rc; a++)
            rc = add_arch(o, *a);
        return rc;
    }
    if (gen_gpu_arch(text, &arch, &err))
        return cli_usage("--arch: %s", err.text);
    return add_arch(o, arch);
}

static int parse_emulate(struct options *o, const char *text)
{
    struct mk_err err;

    return gen_gpu_arch(text, &o->emulate, &err) ? cli_usage("--emulate: %s", err.text) : 0;
}

/* Combinations that make no sense. */
static int check_options(struct options *o)
{
    int several = o->n_archs > 1, host = 0;

    for (int i = 0; i < o->n_archs; i++)
        host |= o->archs[i] == HOST;
    if (o->emulate && !host)
        return cli_usage("--emulate is for --arch host");
    if (host && o->gpu)
        return cli_usage("--gpu names a GPU, --arch host an emulated one");

    if (!o->model && !o->print_gpu)
        return cli_usage("--model is missing; --list-models names those that are carried");
    if (several && o->output)
        return cli_usage("--output takes one architecture, not %d", o->n_archs);
    if (several && o->cubin)
        return cli_usage("--cubin takes one architecture, not %d; --pack takes several",
                         o->n_archs);
    if (several && o->gpu)
        return cli_usage("--gpu names one GPU, --arch %d architectures", o->n_archs);
    if (o->print_gpu && (o->output || o->cubin || o->pack || o->compile || o->dump_plan))
        return cli_usage("--print-gpu writes nothing else");
    if (o->output && !strcmp(o->output, "-") && (o->dump_plan || o->compile))
        return cli_usage("--output - and --%s both want standard output",
                         o->dump_plan ? "dump-plan" : "compile");
    if (o->cubin && !strcmp(o->cubin, "-"))
        return cli_usage("--cubin: a file is needed, not standard output");
    return 0;
}

enum { OPT_CUBIN = 256, OPT_EMULATE, OPT_PACK, OPT_COMPILE, OPT_DUMP, OPT_PRINT, OPT_MODELS,
       OPT_GPUS, OPT_KEYS, OPT_HELP, OPT_VERSION };

static const struct option longs[] = {
    { "model", required_argument, NULL, 'm' },     { "arch", required_argument, NULL, 'a' },
    { "emulate", required_argument, NULL, OPT_EMULATE },
    { "gpu", required_argument, NULL, 'g' },       { "context", required_argument, NULL, 'c' },
    { "plan", required_argument, NULL, 'p' },      { "set", required_argument, NULL, 's' },
    { "output", required_argument, NULL, 'o' },    { "cubin", required_argument, NULL, OPT_CUBIN },
    { "pack", required_argument, NULL, OPT_PACK }, { "compile", no_argument, NULL, OPT_COMPILE },
    { "dump-plan", no_argument, NULL, OPT_DUMP },  { "print-gpu", no_argument, NULL, OPT_PRINT },
    { "list-models", no_argument, NULL, OPT_MODELS }, { "list-gpus", no_argument, NULL, OPT_GPUS },
    { "list-keys", no_argument, NULL, OPT_KEYS },  { "quiet", no_argument, NULL, 'q' },
    { "help", no_argument, NULL, OPT_HELP },       { "version", no_argument, NULL, OPT_VERSION },
    { NULL, 0, NULL, 0 }
};

/* Returns 0, an exit status, or -1: the whole job was done here, and well. */
static int parse(int argc, char **argv, struct options *o)
{
    int c, rc = 0;

    while (!rc && (c = getopt_long(argc, argv, "m:a:g:c:p:s:o:q", longs, NULL)) != -1) {
        switch (c) {
        case 'm': o->model = optarg; break;
        case 'a': rc = parse_arch(o, optarg); break;
        case 'g': o->gpu = optarg; break;
        case 'c': rc = cli_int("--context", optarg, 1, 1 << 24, &o->context); break;
        case 'p': o->plan = optarg; break;
        case 's': rc = cli_list_add(&o->set, optarg); break;
        case 'o': o->output = optarg; break;
        case 'q': o->quiet = 1; break;
        case OPT_EMULATE: rc = parse_emulate(o, optarg); break;
        case OPT_CUBIN: o->cubin = optarg; break;
        case OPT_PACK: o->pack = optarg; break;
        case OPT_COMPILE: o->compile = 1; break;
        case OPT_DUMP: o->dump_plan = 1; break;
        case OPT_PRINT: o->print_gpu = 1; break;
        case OPT_MODELS: return list_models() ? CLI_FAILED : -1;
        case OPT_GPUS: return list_gpus() ? CLI_FAILED : -1;
        case OPT_KEYS: return list_keys() ? CLI_FAILED : -1;
        case OPT_HELP: fputs(help, stdout); return -1;
        case OPT_VERSION: cli_version(); return -1;
        default: return cli_bad_option();
        }
    }
    if (!rc && optind < argc)
        rc = cli_usage("'%s' is not an option; the model is given with --model", argv[optind]);
    return rc ? rc : check_options(o);
}

/* ---- One architecture ---- */

static int native_gpu(struct gen_gpu *g, struct mk_err *err)
{
    struct rt_device *d;
    int rc = rt_device_open("gpu", 0, &d, err);

    if (rc)
        return gen_fail_in(err, rc, "--arch native (say --arch sm_XX to generate for a GPU "
                           "that is not here)");
    rt_device_facts(d, g);
    rt_device_close(d);
    return 0;
}

/* The properties that --gpu and ARCH ask for; arch 0: none was given. */
static int find_gpu(const struct options *o, int arch, struct gen_gpu *g, struct mk_err *err)
{
    int rc;

    if (arch == HOST)
        return gen_gpu_host(o->emulate ? o->emulate : DEFAULT_EMULATE, g);
    if (!o->gpu)
        return arch > 0 ? gen_gpu_default(arch, g, err) : native_gpu(g, err);
    rc = gen_gpu_read(o->gpu, g, err);
    if (rc == 0 && arch > 0 && g->arch != arch)
        rc = gen_fail(err, MK_EINVAL, "--gpu %s is sm_%d, --arch says sm_%d", o->gpu, g->arch,
                      arch);
    if (rc == 0 && arch == NATIVE)
        rc = gen_fail(err, MK_EINVAL, "--gpu %s and --arch native name two GPUs", o->gpu);
    return rc;
}

static int print_text(char *text, FILE *to)
{
    if (!text)
        return cli_fail("not enough memory");
    fputs(text, to);
    free(text);
    return 0;
}

static const char *host_prefix(int host)
{
    return host ? "host-" : "";
}

/* Of several architectures the message names its own. */
static int arch_failed(const struct options *o, int host, int arch, const struct mk_err *err)
{
    return o->n_archs > 1 ? cli_fail("%ssm_%d: %s", host_prefix(host), arch, err->text)
                          : cli_error(err);
}

/* Write the source, to --output, NAME-sm_XX.cu or NAME-host-sm_XX.cu. */
static int write_source(const struct options *o, const struct rt_key *key)
{
    char name[128], size[16];
    const char *path = o->output;
    struct mk_err err;
    char *src;
    int rc;

    if (!path) {
        snprintf(name, sizeof(name), "%s-%ssm_%d.cu", key->name, host_prefix(key->host),
                 key->arch);
        path = name;
    }
    if (gen_emit(key->params, &src, &err))
        return arch_failed(o, key->host, key->arch, &err);
    rc = cli_file_put(path, src, strlen(src));
    if (rc == 0 && !o->quiet && strcmp(path, "-"))
        cli_note("wrote %s, %s", path, cli_size((int64_t) strlen(src), size));
    free(src);
    return rc;
}

static int kernel_failed(const struct options *o, const struct rt_key *key, int rc,
                         const struct mk_err *err)
{
    if (rc == MK_EUNSUPPORTED && o->all) {
        cli_note("sm_%d skipped: %s", key->arch, err->text);
        return -1;
    }
    return arch_failed(o, key->host, key->arch, err);
}

/* Write what must be compiled.  Returns 0, CLI_FAILED, or -1: skipped. */
static int write_kernel(const struct options *o, const struct rt_key *key)
{
    static const char *const how[] = { "", "compiled", "found in the cache" };
    struct rt_kernel *k = NULL;
    struct mk_err err;
    double start = cli_now();
    char size[16];
    int rc;

    if (o->cubin || o->compile) {
        rc = rt_kernel_get(key, NULL, cli_progress, cli_warn, NULL, &k, &err);
        cli_progress_clear();
        if (rc)
            return kernel_failed(o, key, rc, &err);
        if (o->compile)
            printf("%s: %zu bytes, %s in %.2f s\n", *k->path ? k->path : "(not stored)", k->size,
                   how[k->from & 3], cli_now() - start);
        rc = o->cubin ? cli_file_put(o->cubin, k->cubin, k->size) : 0;
        if (rc == 0 && o->cubin && !o->quiet)
            cli_note("wrote %s, %s", o->cubin, cli_size((int64_t) k->size, size));
        rt_kernel_free(k);
        if (rc)
            return rc;
    }
    return 0;
}

/* Write the kernels of all parts of the product that G is into the pack.  Returns as write_kernel. */
static int write_pack(const struct options *o, const struct rt_key *key, const struct gen_model *m,
                      const struct gen_gpu *g)
{
    const struct rt_product product = { m, g, o->context, o->plan, o->set.item };
    double start = cli_now();
    struct mk_err err;
    int n, rc = rt_product_pack(&product, o->pack, cli_progress, NULL, &n, &err);

    cli_progress_clear();
    if (rc)
        return kernel_failed(o, key, rc, &err);
    if (!o->quiet)
        cli_note("wrote %ssm_%d into the pack %s in %.2f s, %d variant%s", host_prefix(key->host),
                 key->arch, o->pack, cli_now() - start, n, n == 1 ? "" : "s");
    return 0;
}

/* Where the choices come from, and why a carried plan file is not used. */
static void tell_source(const struct options *o, const struct gen_model *m, const struct gen_gpu *g,
                        const struct gen_plan_source *source)
{
    const char *by = *source->file       ? source->file
                     : *source->predicted ? "the performance model's "
                                          : "the generator's own";

    if (source->refused.code)
        cli_note("warning: the plan carried for %s on %s is not used: %s", m->name, g->name,
                 source->refused.text);
    if (o->dump_plan)
        printf("# choices: %s%s%s%s\n", by, source->predicted,
               *source->file && !o->plan ? ", carried for this model and GPU" : "",
               o->set.n ? ", and --set" : "");
    else if ((*source->file || *source->predicted) && !o->quiet)
        fprintf(stderr, "plan: %s%s\n", by, source->predicted);
}

/* Everything for one GPU.  Returns 0, CLI_FAILED, or -1: skipped. */
static int generate(const struct options *o, const struct gen_model *m, const struct gen_gpu *g)
{
    int compiles = o->cubin || o->pack || o->compile;
    struct gen_plan *plan = malloc(sizeof(*plan));
    struct gen_plan_source *source = malloc(sizeof(*source));
    struct rt_key key = { 0 };
    struct mk_err err;
    int rc = 0;

    if (!plan || !source) {
        free(plan);
        free(source);
        return cli_fail("not enough memory");
    }
    if (gen_plan_choose(m, g, o->context, o->plan, o->set.item, plan, source, &err) ||
        rt_key_make(plan, g->arch, &key, &err)) {
        free(plan);
        free(source);
        return arch_failed(o, g->host, g->arch, &err);
    }
    if (!o->quiet)
        rc = print_text(gen_plan_summary(plan), stderr);
    tell_source(o, m, g, source);
    free(source);
    if (rc == 0 && o->dump_plan)
        rc = print_text(gen_plan_dump(plan), stdout);
    if (rc == 0 && (o->output || (!compiles && !o->dump_plan)))
        rc = write_source(o, &key);
    if (rc == 0 && compiles)
        rc = write_kernel(o, &key);
    if (rc == 0 && o->pack)
        rc = write_pack(o, &key, m, g);
    rt_key_free(&key);
    free(plan);
    return rc;
}

static int run(const struct options *o)
{
    int n = o->n_archs ? o->n_archs : 1, done = 0, status = CLI_OK;
    struct gen_model m;
    struct mk_err err;

    if (o->model && !o->print_gpu && gen_model_read(o->model, &m, &err))
        return cli_error(&err);
    for (int i = 0; i < n; i++) {
        struct gen_gpu g;
        int rc;

        if (find_gpu(o, o->n_archs ? o->archs[i] : 0, &g, &err))
            rc = cli_error(&err);
        else if (o->print_gpu)
            rc = print_text(gen_gpu_print(&g), stdout);
        else
            rc = generate(o, &m, &g);
        if (rc == CLI_FAILED)
            status = rc;
        done += rc == 0;
    }
    if (status == CLI_OK && done == 0)
        return cli_fail("no architecture was left");
    return status;
}

int main(int argc, char **argv)
{
    struct options o = { 0 };
    int rc;

    cli_start("mkgen", argc, argv);
    rc = parse(argc, argv, &o);
    if (rc == 0)
        rc = run(&o);
    free(o.set.item);
    return cli_end(rc < 0 ? CLI_OK : rc);
}
