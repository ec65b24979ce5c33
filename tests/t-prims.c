/* t-prims.c - the primitives of the emitted kernel, one by one: the kernels of prims.cu, behind an
   emitted one, give what expect.h says on the emulated device, under the calm schedule and under
   seeds, for each family; and on the GPU, if there is one.  Misuse of them (misuse.cu) ends with a
   report that names it, the same for the same seed. */
#define _GNU_SOURCE
#include "config.h"

#include <dlfcn.h>
#include <unistd.h>

#include "gen/gen.h"
#include "runtime/cxx.h"
#include "runtime/device.h"
#include "runtime/nvrtc.h"
#include "tests/check.h"
#include "tests/expect.h"

enum { SEEDS = 15, CLUSTER = 4, SHARED = 22 << 10, CONTEXT = 64 };

static struct mk_err err;

/* ---- Source ------------------------------------------------------------------ */

static char *read_test(const char *name)
{
    const char *srcdir = getenv("srcdir");
    char path[4096], *text = NULL;
    size_t size = 0;
    FILE *f;

    snprintf(path, sizeof path, "%s/%s", srcdir ? srcdir : access("prims.cu", R_OK) ? "tests" : ".", name);
    f = fopen(path, "r");
    CHECKF(f && getdelim(&text, &size, 0, f) > 0, "%s cannot be read", path);
    if (f)
        fclose(f);
    return text;
}

/* The kernel for G with the tests behind it; the caller frees. */
static char *make_source(const struct gen_gpu *g, struct prims_context *c, int misuse)
{
    static const char *const shared[] = {"extern __shared__ Type name[]",
                                         "Type *name = (Type *)mkhost_now->shared"};
    char *params, *all = NULL, *kernel = NULL, *src = NULL, *prims = read_test("prims.cu"), *bad = NULL, path[4096];
    const char *srcdir = getenv("srcdir"), *set[3] = {NULL};
    char group[16];
    static struct gen_plan plan;
    struct gen_model m;
    int rc;

    snprintf(group, sizeof group, "group=%d", CLUSTER);
    if (g->arch >= 90)
        set[0] = group, set[1] = "cluster=cluster";
    snprintf(path, sizeof path, "%s/toy/toy-qwen3", srcdir ? srcdir : access("toy", R_OK) ? "tests" : ".");
    rc = gen_model_read(path, &m, &err);
    rc = rc ? rc : gen_plan_make(&m, g, CONTEXT, NULL, set, &plan, &err);
    CHECKF(rc == 0, "%s", err.text);
    if (rc)
        return NULL;
    *c = (struct prims_context) {plan.family, plan.dtype == GEN_FP16, plan.family >= 90 ? CLUSTER : 1,
                                 plan.warps * 32};
    params = gen_plan_params(&plan);
    rc = asprintf(&all, "%sm4_define({|PLAN_ALL_PRIMS|}, {|1|})m4_dnl\n", params) > 0 ? 0 : -1;
    rc = rc ? rc : gen_emit(all, &kernel, &err);
    CHECKF(rc == 0, "%s", err.text);
    if (misuse)
        bad = read_test("misuse.cu");
    if (rc == 0 && prims)
        rc = asprintf(&src, "%s\n#define TEST_FAMILY %d\n#define TEST_ARCH %d\n#define TEST_CLUSTER %d\n"
                      "#define SHARED_MEMORY(Type, name) %s\n%s%s%s", kernel, plan.family, g->arch, c->cluster,
                      shared[g->host], g->host ? "#define TEST_HOST\n" : "", prims, bad ? bad : "");
    free(params);
    free(all);
    free(kernel);
    free(prims);
    free(bad);
    return src;
}

/* ---- A device with the kernels ----------------------------------------------- */

struct place {
    char name[32];
    struct rt_device *d;
    rt_module module;
    rt_ptr in, out;
    struct prims_context c;
    int arch;
};

static int place_open(struct place *p, const char *which, const unsigned char *image, size_t size)
{
    int rc = rt_device_open(which, 0, &p->d, &err);

    rc = rc ? rc : rt_module_load(p->d, image, size, &p->module, &err);
    rc = rc ? rc : rt_device_alloc(p->d, PRIMS_IN * 4, &p->in, &err);
    rc = rc ? rc : rt_device_alloc(p->d, PRIMS_OUT * 4, &p->out, &err);
    CHECKF(rc == 0, "%s: %s", which, err.text);
    if (rc == 0)
        rt_device_label(p->d, p->out, PRIMS_OUT * 4, "out", NULL, NULL);
    return rc;
}

static void place_close(struct place *p)
{
    rt_device_label(p->d, p->out, 0, NULL, NULL, NULL);
    rt_device_free(p->d, p->in);
    rt_device_free(p->d, p->out);
    rt_module_free(p->d, p->module);
    rt_device_close(p->d);
}

/* Launch NAME to its end, in clusters of CLUSTER CTAs if that is not 0; OUT: all of args.out. */
static int launch(struct place *p, const char *name, int ctas, int threads, int cluster, const uint32_t *in,
                  uint32_t *out)
{
    struct {
        rt_ptr out, in;
    } args = {p->out, p->in};
    void *params[] = {&args};
    rt_func f;
    int rc = rt_module_func(p->d, p->module, name, SHARED, &f, &err);

    rc = rc ? rc : rt_device_put(p->d, p->in, in, PRIMS_IN * 4, &err);
    rc = rc ? rc : rt_device_set(p->d, p->out, 0, PRIMS_OUT * 4, &err);
    if (rc == 0)
        rc = rt_launch(p->d, f, ctas, threads, SHARED, ctas > 1, cluster, params, &err);
    rc = rc ? rc : rt_device_sync(p->d, &err);
    return rc ? rc : rt_device_get(p->d, out, p->out, PRIMS_OUT * 4, &err);
}

/* One kernel; 0 when it gave what it must. */
static int run_test(struct place *p, const struct prims_test *t, int seed)
{
    static uint32_t in[PRIMS_IN], out[PRIMS_OUT];
    const int ctas = t->cluster ? p->c.cluster * 2 : t->ctas, threads = t->threads ? t->threads : p->c.threads + 32;
    char why[256] = "";
    int rc, right;

    prims_input(t, &p->c, in);
    rt_device_seed(p->d, (uint64_t) seed);
    rc = launch(p, t->name, ctas, threads, t->cluster ? p->c.cluster : 0, in, out);
    CHECKF(rc == 0, "%s %s, seed %d: %s\n%s", p->name, t->name, seed, err.text, rt_device_report(p->d));
    if (rc)
        return rc;
    right = t->check(&p->c, in, out + PRIMS_FIRST, why, sizeof why);
    CHECKF(right, "%s %s, seed %d: %s", p->name, t->name, seed, why);
    return !right;
}

/* All kernels; the first that is wrong ends it, for a device may be broken then, and the result is 1. */
static int run_tests(struct place *p, int seeds)
{
    int n = 0;

    for (const struct prims_test *t = prims_tests; t->name; t++) {
        if (p->c.family < t->family || (t->wgmma && p->arch != 90))
            continue;
        n++;
        for (int seed = 0; seed <= seeds; seed++)
            if (run_test(p, t, seed))
                return 1;
    }
    printf("%s: %d kernels, %d schedules\n", p->name, n, seeds + 1);
    return 0;
}

/* ---- Misuse ------------------------------------------------------------------- */

struct misuse {
    const char *name;
    int ctas, threads;
    const char *says[4]; /* in its report */
};

static const struct misuse misuses[] = {
    {"misuse_deadlock", 2, 32,
     {"deadlock (misuse_deadlock, seed ", "CTA 0 warp 0, 32 lanes from 0: asks for a strong load, out + 64; not written in this launch",
      "CTA 1 warp 0, 32 lanes from 0: asks for a strong load, out + 80"}},
    {"misuse_barrier", 1, 96,
     {"deadlock (", "CTA 0 warp 1, 32 lanes from 0: waits at __syncthreads: 64 of 96 threads are there",
      "CTA 0 warp 2, 32 lanes from 0: asks for a flag, shared memory + "}},
    {"misuse_flag", 1, 64,
     {"deadlock (", "CTA 0 warp 1, 32 lanes from 0: asks for a flag, shared memory + ",
      "; last written by CTA 0 warp 0 lane 3 in step "}},
    {"misuse_arrival", 1, 32,
     {"deadlock (", "CTA 0 warp 0, 32 lanes from 0: asks for mbarrier.test_wait, shared memory + ",
      "an mbarrier in phase 0: 1 of 2 arrivals and 0 bytes are missing; arrived: warp 0 lane 0\n"}},
    {"misuse_arrivals", 1, 64,
     {"deadlock (", "an mbarrier in phase 1: 33 of 64 arrivals and 0 bytes are missing; arrived: warp 0 lanes 0..4 "
      "6..31; not yet, but in the phase before: warp 0 lane 5, warp 1 lanes 0..31\n"}},
    {"misuse_shuffle", 1, 32, {"shfl.sync", "(misuse_shuffle, seed ", "CTA 0 warp 0, 1 lane from "}},
    {"misuse_shared_end", 1, 32, {"a store 0 bytes behind the end of the 22528 of shared memory (misuse_shared_end, "}},
    {"misuse_buffer_end", 1, 32, {"a store 0 bytes behind the end of a buffer of 131072 (misuse_buffer_end, "}},
    {"misuse_proxy", 1, 32,
     {"cp.async.bulk with an mbarrier that no fence.proxy.async followed",
      "CTA 0 warp 0, 1 lane from 0: asks for cp.async.bulk, shared memory + 0"}},
    {"misuse_leave", 1, 32, {"a CTA ends with 1 copies on their way into its shared memory", "CTA 0 warp 0, 1 lane"}},
    {"misuse_rows", 1, 64,
     {"cp.async.bulk of 128 bytes from ", ": byte 0 was written by CTA 0 warp 0 lane 0, with no "
      "fence.proxy.async.global after it (misuse_rows, ", "CTA 0 warp 1, 1 lane from 0: asks for cp.async.bulk"}},
    {"misuse_other_fence", 1, 64, {"byte 0 was written by CTA 0 warp 0 lane 0, with no fence.proxy.async.global"}},
    {"misuse_refill", 1, 64,
     {"cp.async.bulk to shared memory + 0: byte 0 was written to with no fence.proxy.async after it",
      "CTA 0 warp 1, 1 lane from 0: asks for cp.async.bulk"}},
    {"misuse_row_changed", 1, 32, {"was written by CTA 0 warp 0 lane 0 while a cp.async.bulk copied it"}},
    {"misuse_push", 2, 64, {"CTA", " end", "on their way into its shared memory"}},
    {"misuse_init", 2, 64,
     {"st.async with an mbarrier that no fence.mbarrier_init followed", "CTA 1 warp 0, 1 lane from 0: asks for st.async"}},
    {"misuse_pushes", 2, 64,
     {"deadlock (", "CTA 0 warp 1, 32 lanes from 0: asks for mbarrier.try_wait.cluster, shared memory + ",
      "0 of 1 arrivals and 16 bytes are missing; arrived: warp 0 lane 0; pushed: 16 bytes by CTA 1\n"}},
    {"misuse_scope", 2, 64,
     {"a wait with .acquire.cta, the default, for what another CTA has pushed", "CTA 0 warp "}},
    {"misuse_cluster", 2, 64,
     {"deadlock (", "CTA 0 warp 1, 32 lanes from 0: waits at barrier.cluster.wait: 96 of 128 threads have arrived; not CTA 1 warp 1\n",
      "CTA 1 warp 1, 32 lanes from 0: asks for a flag, shared memory + "}},
    {"misuse_sums", 1, 128, {"a wgmma without a wgmma.fence of its sums before it", "CTA 0 warp "}},
    {"misuse_operands", 1, 128,
     {"a wgmma of shared memory that was written after the last fence.proxy.async", "asks for wgmma.wait_group"}},
    {"misuse_write", 1, 128, {"has written to sums between a wgmma and its wait", "asks for wgmma.wait_group"}},
    {"misuse_warpgroup", 1, 128,
     {"deadlock (", "waits at wgmma.wait_group for its warpgroup; a wgmma was not issued by warps 3\n",
      "CTA 0 warp 3, 32 lanes from 0: asks for a flag, shared memory + "}},
};

/* What misuse M says under SEED, "" when it went well; malloc'd. */
static char *report_of(struct place *p, const struct misuse *m, int seed, const unsigned char *image, size_t size)
{
    static uint32_t in[PRIMS_IN], out[PRIMS_OUT];
    char *report = NULL;
    int rc;

    if (place_open(p, "host:sm_90", image, size))
        return strdup("");
    rt_device_seed(p->d, (uint64_t) seed);
    rc = launch(p, m->name, m->ctas, m->threads, 0, in, out);
    CHECKF(rc == 0 || rc == MK_EDEVICE, "%s, seed %d: %s", m->name, seed, err.text);
    report = strdup(rc ? rt_device_report(p->d) : "");
    CHECKF(!rc || strstr(err.text, "CUDA_ERROR_LAUNCH_FAILED"), "%s", err.text);
    place_close(p);
    return report;
}

/* The same but for addresses of global memory, which the system chooses. */
static int same_report(const char *a, const char *b)
{
    while (*a && *a == *b) {
        const int is_address = !strncmp(a, "0x", 2);
        a += is_address ? 2 + strspn(a + 2, "0123456789abcdef") : 1;
        b += is_address ? 2 + strspn(b + 2, "0123456789abcdef") : 1;
    }
    return *a == *b;
}

/* What lands in time may be no misuse: the first seeds do not all find it. */
static void test_misuse(struct place *p, const struct misuse *m, const unsigned char *image, size_t size)
{
    char *report = NULL, *again;
    int seed, found = 0;

    for (seed = 1; seed <= SEEDS && !found; seed++) {
        free(report);
        report = report_of(p, m, seed, image, size);
        found = 1;
        for (int i = 0; i < 4 && m->says[i]; i++)
            found &= strstr(report, m->says[i]) != NULL;
        if (*report && !found)
            break;
    }
    CHECKF(found, "%s, seed %d: it says\n%s", m->name, seed, report);
    if (found) {
        again = report_of(p, m, seed - 1, image, size);
        CHECKF(same_report(report, again), "%s, seed %d: it says\n%sand then\n%s", m->name, seed - 1, report, again);
        free(again);
    }
    free(report);
}

static void test_early_sums(struct place *p)
{
    static uint32_t in[PRIMS_IN], out[PRIMS_OUT];

    for (int seed = 0; seed <= SEEDS; seed++) {
        rt_device_seed(p->d, (uint64_t) seed);
        CHECKF(launch(p, "early_sums", 1, 128, 0, in, out) == 0, "seed %d: %s\n%s", seed, err.text,
               rt_device_report(p->d));
        for (int t = 0; t < 128; t++) {
            CHECK(out[PRIMS_FIRST + t * 2] == UINT32_MAX);
            CHECK(out[PRIMS_FIRST + t * 2 + 1] == prims_bits(1.0f));
        }
    }
}

/* Rows that the copy engine brings; all words of all threads are 0. */
static void test_rows(struct place *p, const char *name)
{
    static uint32_t in[PRIMS_IN], out[PRIMS_OUT];

    for (int seed = 0; seed <= SEEDS * 4; seed++) {
        rt_device_seed(p->d, (uint64_t) seed);
        CHECKF(launch(p, name, 3, 64, 0, in, out) == 0, "seed %d: %s\n%s", seed, err.text, rt_device_report(p->d));
        for (int t = 0; t < 3 * 64; t++)
            CHECK(out[PRIMS_FIRST + t] == 0);
    }
}

static void test_torn(struct place *p)
{
    static uint32_t in[PRIMS_IN], out[PRIMS_OUT];
    uint32_t weak = 0, strong = 0;

    for (int seed = 0; seed <= SEEDS; seed++) {
        rt_device_seed(p->d, (uint64_t) seed);
        CHECKF(launch(p, "torn_words", 2, 32, 0, in, out) == 0, "seed %d: %s", seed, rt_device_report(p->d));
        CHECK(seed || out[PRIMS_FIRST] == 0);
        weak += out[PRIMS_FIRST];
        strong += out[PRIMS_FIRST + 1];
    }
    CHECKF(weak > 0 && strong == 0, "%u of the weak ones were torn, %u of the strong ones", weak, strong);
}

static void test_launch(struct place *p)
{
    void *params[1] = {NULL};
    rt_func f;

    CHECKF(rt_module_func(p->d, p->module, "misuse_push", SHARED, &f, &err) == 0, "%s", err.text);
    CHECK(rt_launch(p->d, f, 0, 32, 0, 0, 2, params, &err) == MK_EINVAL);
    CHECK(rt_launch(p->d, f, 2, 32, 0, 0, -2, params, &err) == MK_EINVAL);
    CHECK(rt_launch(p->d, f, 3, 32, 0, 0, 2, params, &err) == MK_EINVAL);
    CHECK_STR(err.text, "cannot launch 3 blocks in clusters of 2");
    CHECK(rt_launch(p->d, f, 4, 32, 0, 0, 4, params, &err) == MK_EDEVICE); /* it says 2 itself */
    CHECKF(strstr(err.text, "cuLaunchKernelEx: CUDA_ERROR_INVALID_VALUE"), "%s", err.text);
    CHECK(rt_launch(p->d, f, 3, 32, 0, 1, 0, params, &err) == MK_EDEVICE);
}

/* ---- Devices ------------------------------------------------------------------- */

/* 0 when there is no such device or no compiler. */
static int test_host(int arch)
{
    struct place p = {.arch = arch};
    char which[24], *options = rt_cxx_options(), *src;
    unsigned char *image = NULL;
    struct gen_gpu g;
    size_t size;
    int rc;

    snprintf(which, sizeof which, "host:sm_%d", arch);
    snprintf(p.name, sizeof p.name, "host-sm_%d", arch);
    CHECK(gen_gpu_host(arch, &g) == 0);
    rc = rt_device_open(which, 0, &p.d, &err);
    if (rc == 0)
        rt_device_close(p.d);
    src = rc ? NULL : make_source(&g, &p.c, arch == 90);
    if (src)
        rc = rt_cxx_compile(src, "kernel.cu", options, &image, &size, &err);
    if (rc == MK_ENOGPU || rc == MK_ETOOL) {
        printf("%s is skipped: %s\n", p.name, err.text);
    } else {
        CHECKF(image, "%s: %s", p.name, err.text);
        if (image && place_open(&p, which, image, size) == 0) {
            if (run_tests(&p, SEEDS) == 0 && arch == 90) {
                test_early_sums(&p);
                test_rows(&p, "sound_rows");
                test_rows(&p, "sound_own_rows");
                test_torn(&p);
                test_launch(&p);
            }
            place_close(&p);
        }
        for (size_t i = 0; image && arch == 90 && i < sizeof misuses / sizeof *misuses; i++)
            if (!strstr(misuses[i].name, "_end") || !dlsym(RTLD_DEFAULT, "__asan_init")) /* which ends us there */
                test_misuse(&p, &misuses[i], image, size);
    }
    free(options);
    free(src);
    free(image);
    return rc == 0;
}

static int test_gpu(void)
{
    struct place p = {.name = "gpu"};
    char *options = NULL, *src = NULL;
    unsigned char *cubin = NULL;
    struct gen_gpu g;
    size_t size;
    int rc = rt_device_open("gpu", 0, &p.d, &err);

    if (rc == 0) {
        rt_device_facts(p.d, &g);
        rt_device_close(p.d);
        p.arch = g.arch;
        snprintf(p.name, sizeof p.name, "%s", g.name);
        options = rt_nvrtc_options(g.arch);
        src = make_source(&g, &p.c, 0);
        rc = src ? rt_nvrtc_compile(src, "kernel.cu", g.arch, options, &cubin, &size, NULL, &err) : -1;
    }
    if (rc == MK_ENOGPU || rc == MK_ETOOL) {
        printf("the GPU is skipped: %s\n", err.text);
    } else {
        CHECKF(rc == 0, "%s: %s", p.name, err.text);
        if (rc == 0 && place_open(&p, "gpu", cubin, size) == 0) {
            run_tests(&p, 0);
            place_close(&p);
        }
    }
    free(options);
    free(src);
    free(cubin);
    return rc == 0;
}

int main(void)
{
    static const int archs[] = {75, 80, 90, 120};
    int devices = test_gpu();

    for (size_t i = 0; i < sizeof archs / sizeof *archs; i++)
        devices += test_host(archs[i]);
    if (!devices && !check_failed)
        SKIP("there is neither a GPU nor an emulated device");
    return check_done();
}
