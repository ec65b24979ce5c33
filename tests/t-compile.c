/* t-compile.c - what the generator writes compiles through NVRTC, no function of it has a stack frame or
   spills, and a word of a hop is loaded at once: toy models on every architecture, real models on one.
   MK_COMPILE_ALL=1: every carried model on every architecture instead; PART=i/n takes one
   part of n of them.  Compilations run side by side, one a processor. */
#include "config.h"

#include <elf.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "gen/gen.h"
#include "runtime/nvrtc.h"
#include "tests/check.h"

enum { MOST_JOBS = 512 };

struct job {
    char model[256]; /* name or folder */
    int arch;
    const char *set[2];
};

static struct job jobs[MOST_JOBS];
static int n_jobs;
static struct mk_err err;

static double seconds(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double) t.tv_sec + (double) t.tv_nsec * 1e-9;
}

/* ---- One compilation ------------------------------------------------------- */

/* Every "N bytes stack frame, N bytes spill stores, N bytes spill loads" of LOG is all zeros. */
static void check_spills(const char *what, const char *log)
{
    char function[160] = "?";
    int functions = 0, frame, stores, loads;

    for (const char *line = log; line && *line; line = strchr(line, '\n'), line += line != NULL) {
        sscanf(line, "ptxas info : Function properties for %159s", function);
        if (sscanf(line,
                   "ptxas . %d bytes stack frame, %d bytes spill stores, %d bytes spill loads",
                   &frame, &stores, &loads) != 3)
            continue;
        functions++;
        CHECKF(!frame && !stores && !loads, "%s: %s has a stack frame of %d bytes and spills %d",
               what, function, frame, stores);
    }
    CHECKF(functions >= 3, "%s: the log tells of %d functions", what, functions);
}

/* The machine code of mk_decode in CUBIN, *SIZE bytes of it, or NULL. */
static const unsigned char *decode_code(const unsigned char *cubin, size_t *size)
{
    const Elf64_Ehdr *file = (const void *) cubin;
    const Elf64_Shdr *sections = (const void *) (cubin + file->e_shoff);

    for (int i = 0; i < file->e_shnum; i++)
        if (!strcmp((const char *) cubin + sections[file->e_shstrndx].sh_offset + sections[i].sh_name,
                    ".text.mk_decode")) {
            *size = sections[i].sh_size;
            return cubin + sections[i].sh_offset;
        }
    return NULL;
}

/* Every ld.relaxed.gpu of mk_decode reads 16 bytes: ptxas splits one of which a part is not used, and what was
   one atomic load is several.  An instruction is 16 bytes: 12 bits of opcode, among others; the width, from bit
   73 on, 3 bits; the order and scope, from bit 76 on, 9 bits. */
static void check_words(const char *what, int arch, const unsigned char *cubin)
{
    enum { WIDTH_16 = 6 };
    const unsigned load = arch < 80 ? 0x381 : 0x981, strong_gpu = arch < 80 ? 0x1f4 : 0x1ef;
    size_t size = 0;
    const unsigned char *code = decode_code(cubin, &size);
    int whole = 0, split = 0;

    CHECKF(code, "%s: the cubin has no mk_decode", what);
    for (size_t i = 0; i + 16 <= size; i += 16) {
        uint64_t low, high;
        memcpy(&low, code + i, 8);
        memcpy(&high, code + i + 8, 8);
        if ((low & 0xfff) == load && (high >> 12 & 0x1ff) == strong_gpu)
            *((high >> 9 & 7) == WIDTH_16 ? &whole : &split) += 1;
    }
    CHECKF(whole >= 3 && !split, "%s: %d words are loaded at once, %d loads are parts of one", what, whole, split);
}

/* SRC with a line that no other run has: NVRTC may have a cache of its own, and a hit in that
   brings no log. */
static char *make_new(char *src)
{
    char *text;

    if (asprintf(&text, "%s\nconstexpr double UNIQUE = %.9f + %d;\n", src, seconds(), (int) getpid()) < 0)
        return src;
    free(src);
    return text;
}

static void compile(const struct job *j)
{
    const char *const set[] = {j->set[0], j->set[1], NULL};
    char what[320], *params = NULL, *src = NULL, *log = NULL, *options = rt_nvrtc_options(j->arch);
    static struct gen_plan plan;
    unsigned char *cubin = NULL;
    const double start = seconds();
    struct gen_model m;
    struct gen_gpu g;
    size_t size = 0;
    int rc;

    snprintf(what, sizeof what, "%s on sm_%d%s%s", j->model, j->arch, j->set[0] ? " with " : "",
             j->set[0] ? j->set[0] : "");
    rc = gen_model_read(j->model, &m, &err);
    rc = rc ? rc : gen_gpu_default(j->arch, &g, &err);
    rc = rc ? rc : gen_plan_make(&m, &g, 0, NULL, set, &plan, &err);
    CHECKF(rc == 0, "%s: %s", what, err.text);
    if (rc == 0 && (params = gen_plan_params(&plan)))
        rc = gen_emit(params, &src, &err);
    CHECKF(rc == 0 && src, "%s: %s", what, err.text);
    if (rc == 0 && src) {
        src = make_new(src);
        rc = rt_nvrtc_compile(src, "kernel.cu", j->arch, options, &cubin, &size, &log, &err);
        CHECKF(rc == 0, "%s: %s", what, err.text);
        if (rc == 0) {
            check_spills(what, log);
            check_words(what, j->arch, cubin);
        }
        printf("%s: %zu bytes of source, %zu of cubin, %.1f s\n", what, strlen(src), size,
               seconds() - start);
    }
    free(params);
    free(src);
    free(log);
    free(options);
    free(cubin);
}

/* ---- All of them ----------------------------------------------------------- */

/* Worker W of WORKERS takes every WORKERS-th job and ends with 0 if all went well. */
static void run_worker(int w, int workers)
{
    for (int i = w; i < n_jobs; i += workers)
        compile(&jobs[i]);
    fflush(stdout);
    _exit(check_failed != 0);
}

static void run_jobs(void)
{
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    int workers = cpus < 1 ? 1 : cpus > 16 ? 16 : (int) cpus, status;

    fflush(stdout);
    for (int w = 0; w < workers; w++) {
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0)
            run_worker(w, workers);
    }
    for (int w = 0; w < workers; w++) {
        CHECK(wait(&status) > 0);
        CHECKF(WIFEXITED(status) && !WEXITSTATUS(status), "a worker failed, status %d", status);
    }
}

/* SET: "key=value" or NULL. */
static void add_job(const char *model, int arch, const char *set)
{
    if (n_jobs == MOST_JOBS)
        return;
    snprintf(jobs[n_jobs].model, sizeof jobs[n_jobs].model, "%s", model);
    jobs[n_jobs].arch = arch;
    jobs[n_jobs++].set[0] = set;
}

static void add_toy(const char *name, int arch, const char *set)
{
    const char *srcdir = getenv("srcdir");
    char path[256];

    snprintf(path, sizeof path, "%s/toy/%s", srcdir ? srcdir : "tests", name);
    add_job(path, arch, set);
}

static void add_few(void)
{
    static const char *const toys[] = {"toy-qwen3", "toy-qwen2", "toy-llama", "toy-smol",
                                       "toy-qwen3-e128"};
    const int *archs = gen_gpu_archs();

    add_job("qwen3-0.6b", 90, NULL);
    add_job("llama-3.2-1b", 90, NULL);
    add_job("smollm2-135m", 90, NULL); /* early=sums: weights are held over both waits */
    add_job("qwen2.5-0.5b", 90, "team_from=3520"); /* attention merges what a team has found */
    add_job("qwen3-8b", 86, NULL); /* four query heads of 128 at once take the most registers */
    for (int i = 0; archs[i]; i++)
        if (rt_nvrtc_knows(archs[i]))
            add_toy(toys[i % 5], archs[i], NULL);
    add_toy("toy-qwen3", 90, "unroll_layers=loop");
    add_toy("toy-qwen3-e128", 90, "dtype=fp16");
    add_toy("toy-qwen2", 90, "cluster=l2");
    add_toy("toy-smol", 90, "timing=on");
}

/* The whole matrix, or part I of N: "i/n", from 1. */
static void add_all(const char *part)
{
    int i = 1, n = 1, at = 0;

    if (part && *part)
        CHECKF(sscanf(part, "%d/%d", &i, &n) == 2 && i >= 1 && i <= n, "PART is \"%s\"", part);
    for (int m = 0; gen_model_carried(m); m++)
        for (const int *a = gen_gpu_archs(); *a; a++)
            if (rt_nvrtc_knows(*a) && at++ % n == i - 1)
                add_job(gen_model_carried(m), *a, NULL);
}

int main(void)
{
    const char *version = NULL, *all = getenv("MK_COMPILE_ALL");
    const double start = seconds();

    if (rt_nvrtc_open(&version, &err))
        SKIP("%s", err.text);
    for (const int *a = gen_gpu_archs(); *a; a++)
        if (!rt_nvrtc_knows(*a))
            printf("sm_%d skipped: NVRTC %s does not know it\n", *a, version);
    if (all && *all)
        add_all(getenv("PART"));
    else
        add_few();
    CHECK(n_jobs > 0);
    run_jobs();
    printf("%d compilations in %.0f s\n", n_jobs, seconds() - start);
    return check_done();
}
