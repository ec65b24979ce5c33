/* t-device.c - runtime/device.c against the fake driver: what works, and every error with
   its exact text. */
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/stat.h>
#include <unistd.h>

#include "runtime/engine.h"
#include "tests/check.h"

static struct mk_err err;

static void pretend(const char *settings)
{
    setenv("FAKE_CUDA", settings, 1);
}

/* The fake driver lies beside this program, or in a .libs folder. */
static int find_fake(char *path, size_t size)
{
    static const char *const folders[] = { "", ".libs/", "../", "../.libs/" };
    char exe[2048];
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);

    if (n <= 0)
        return 0;
    exe[n] = 0;
    *(strrchr(exe, '/') + 1) = 0;
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
        snprintf(path, size, "%s%slibfakecuda.so", exe, folders[i]);
        if (!access(path, R_OK))
            return 1;
    }
    return 0;
}

static void check_open_fails(const char *settings, int index, int code, const char *text)
{
    struct rt_device *d = (struct rt_device *) &err;

    pretend(settings);
    memset(&err, 0, sizeof err);
    CHECK(rt_device_open("gpu", index, &d, &err) == code && err.code == code);
    CHECK(!d);
    CHECK_STR(err.text, text);
}

static void test_no_driver(void)
{
    struct rt_device *d;

    setenv("MK_CUDA_DRIVER", "libno-such-driver.so", 1);
    CHECK(rt_device_open("gpu", 0, &d, &err) == MK_ENOGPU);
    CHECK_STR(err.text, "no NVIDIA driver (libno-such-driver.so: cannot open shared object file: "
              "No such file or directory)");
    CHECK(rt_device_open("gpu", 0, &d, NULL) == MK_ENOGPU);
    setenv("MK_CUDA_DRIVER", "libc.so.6", 1);
    CHECK(rt_device_open("gpu", 0, &d, &err) == MK_ENOGPU);
    CHECK_STR(err.text, "libc.so.6 has no cuInit: the NVIDIA driver is too old, "
              "or this is another library");
}

static void test_open_errors(void)
{
    check_open_fails("cuInit=100", 0, MK_ENOGPU,
                     "no usable GPU: cuInit: CUDA_ERROR_NO_DEVICE (said the fake)");
    check_open_fails("cuInit=999", 0, MK_ENOGPU, "no usable GPU: cuInit: unknown CUDA error 999");
    check_open_fails("driver=11040", 0, MK_ENOGPU, "the NVIDIA driver is too old: it is for CUDA "
                     "11.4; CUDA 12.0 (driver 525) or newer is needed");
    check_open_fails("devices=0", 0, MK_ENOGPU, "no GPU: the driver sees none");
    check_open_fails("devices=2", 2, MK_ENOGPU, "there is no GPU number 2: the driver sees 2, "
                     "numbered from 0");
    check_open_fails("", -1, MK_ENOGPU, "there is no GPU number -1: the driver sees 1, "
                     "numbered from 0");
    check_open_fails("arch=61", 0, MK_ENOGPU, "Fake GPU (0) X0 has compute capability 6.1; "
                     "7.5 or newer is needed");
    check_open_fails("coop=0", 0, MK_ENOGPU, "Fake GPU (0) X0 cannot launch cooperative grids");
    check_open_fails("cuDevicePrimaryCtxRetain=2", 0, MK_ENOMEM,
                     "cuDevicePrimaryCtxRetain: CUDA_ERROR_OUT_OF_MEMORY (said the fake)");
    check_open_fails("cuCtxSetCurrent=719", 0, MK_EDEVICE,
                     "cuCtxSetCurrent: CUDA_ERROR_LAUNCH_FAILED (said the fake)");
    check_open_fails("cuStreamCreate=2", 0, MK_ENOMEM,
                     "cuStreamCreate: CUDA_ERROR_OUT_OF_MEMORY (said the fake)");
}

/* Pretending FAKE, N clusters of each size fit. */
static void check_clusters(const char *fake, int n)
{
    struct rt_device *d;
    struct gen_gpu g;

    pretend(fake);
    CHECK(rt_device_open("gpu", 0, &d, &err) == 0);
    rt_device_facts(d, &g);
    for (int i = 1; i < 5; i++)
        CHECKF(g.clusters[i] == n, "%s: %d of %d", fake, g.clusters[i], 1 << i);
    rt_device_close(d);
}

static void test_facts(void)
{
    struct rt_device *d;
    struct gen_gpu g;

    pretend("devices=3,arch=121,sms=48");
    CHECK(rt_device_open("gpu", 2, &d, &err) == 0);
    rt_device_facts(d, &g);
    CHECK_STR(rt_device_name(d), "Fake GPU (2) X2");
    CHECK_STR(g.name, "fake-gpu-2-x2");
    CHECK(rt_device_driver(d) == 13000);
    CHECK(g.arch == 121 && g.sms == 48 && g.smem_block == 232448 && g.smem_sm == 233472);
    CHECK(g.l2_bytes == 62914560 && g.clock_mhz == 1980 && g.mem_gbps == 4916);
    CHECK(g.mem_bytes == 1 << 30);
    CHECK(g.clusters[0] == 48);
    for (int i = 1; i < 5; i++)
        CHECK(g.clusters[i] == 0);
    CHECK(rt_device_clock(d) == 0);
    rt_device_close(d);
    check_clusters("clusters=3", 3);
    check_clusters("clusters=3,arch=89", 0);
    check_clusters("clusters=3,cuModuleLoadData=222", 0); /* no kernel to ask with */
    check_clusters("clusters=3,cuFuncSetAttribute=1", 0);
    check_clusters("clusters=3,cuOccupancyMaxActiveClusters=1", 0);
    rt_device_close(NULL);
}

static void test_memory(void)
{
    static const char text[] = "forty-two";
    struct rt_device *d;
    size_t left, total;
    char back[sizeof text];
    void *host;
    rt_ptr p, q;

    pretend("memory=1000000");
    CHECK(rt_device_open("gpu", 0, &d, &err) == 0);
    CHECK(rt_device_alloc(d, 600000, &p, &err) == 0 && p);
    rt_device_memory(d, &left, &total);
    CHECK(left == 400000 && total == 1000000);
    CHECK(rt_device_alloc(d, 600000, &q, &err) == MK_ENOMEM && !q);
    CHECK_STR(err.text, "cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY: 600000 bytes (0.00 GiB) wanted, "
              "0.00 of 0.00 GiB are free on Fake GPU (0) X0");
    CHECK(rt_device_set(d, p, 7, sizeof text, &err) == 0);
    CHECK(rt_device_get(d, back, p, sizeof text, &err) == 0);
    CHECK(back[0] == 7 && back[sizeof text - 1] == 7);
    CHECK(rt_device_put(d, p, text, sizeof text, &err) == 0);
    CHECK(rt_device_get(d, back, p, sizeof text, &err) == 0);
    CHECK_STR(back, text);
    CHECK(rt_device_put(d, 0, NULL, 0, &err) == 0);
    rt_device_free(d, p);
    rt_device_free(d, 0);

    CHECK(rt_device_alloc_host(d, 100, &host, &p, &err) == 0);
    CHECK(host && p);
    rt_device_free_host(d, host);
    rt_device_free_host(d, NULL);
    pretend("cuMemHostAlloc=2");
    CHECK(rt_device_alloc_host(d, 100, &host, &p, &err) == MK_ENOMEM && !host && !p);
    CHECK_STR(err.text, "cuMemHostAlloc: CUDA_ERROR_OUT_OF_MEMORY: 100 bytes of page-locked "
              "host memory wanted");
    pretend("cuMemHostGetDevicePointer=719");
    CHECK(rt_device_alloc_host(d, 100, &host, &p, &err) == MK_EDEVICE && !host && !p);
    pretend("cuMemcpyHtoDAsync=719");
    CHECK(rt_device_put(d, 64, text, 1, &err) == MK_EDEVICE);
    CHECK_STR(err.text, "cuMemcpyHtoDAsync: CUDA_ERROR_LAUNCH_FAILED (said the fake)");
    pretend("");
    rt_device_close(d);
}

static void test_stream(void)
{
    struct rt_device *d;
    rt_event a, b;
    float ms = 0;

    pretend("");
    CHECK(rt_device_open("gpu", 0, &d, &err) == 0);
    CHECK(rt_device_sync(d, &err) == 0);
    pretend("cuStreamSynchronize=719");
    CHECK(rt_device_sync(d, &err) == MK_EDEVICE);
    CHECK_STR(err.text, "cuStreamSynchronize: CUDA_ERROR_LAUNCH_FAILED (said the fake)");
    pretend("");
    CHECK(rt_event_make(d, &a, &err) == 0 && rt_event_make(d, &b, &err) == 0);
    CHECK(rt_event_record(d, a, &err) == 0 && rt_event_record(d, b, &err) == 0);
    CHECK(rt_event_done(d, a, &err) == 1);
    pretend("busy=1");
    CHECK(rt_event_done(d, a, &err) == 0);
    pretend("cuEventQuery=719");
    CHECK(rt_event_done(d, a, &err) == MK_EDEVICE);
    CHECK_STR(err.text, "cuEventQuery: CUDA_ERROR_LAUNCH_FAILED (said the fake)");
    pretend("");
    CHECK(rt_event_ms(d, a, b, &ms, &err) == 0 && ms == 1.5f);
    pretend("cuEventSynchronize=719");
    CHECK(rt_event_ms(d, a, b, &ms, &err) == MK_EDEVICE);
    rt_event_free(d, a);
    rt_event_free(d, b);
    rt_event_free(d, NULL);
    rt_device_close(d);
}

/* The head of a cubin: one section of SECTION bytes that lie behind the tables. */
static size_t make_cubin(unsigned char *p, int abi, uint32_t flags, uint64_t section)
{
    uint16_t machine = 190, shentsize = 64, shnum = 1;
    uint64_t shoff = 64, offset = 128;

    memset(p, 0, 256);
    memcpy(p, "\177ELF\2\1\1", 7);
    p[8] = (unsigned char) abi;
    memcpy(p + 18, &machine, 2);
    memcpy(p + 40, &shoff, 8);
    memcpy(p + 48, &flags, 4);
    memcpy(p + 58, &shentsize, 2);
    memcpy(p + 60, &shnum, 2);
    p[64 + 4] = 1;
    memcpy(p + 64 + 24, &offset, 8);
    memcpy(p + 64 + 32, &section, 8);
    return 256;
}

static void test_module(void)
{
    unsigned char cubin[256];
    struct rt_device *d;
    rt_module m;
    rt_func f;
    size_t n = make_cubin(cubin, 7, 0x5a055a, 128);

    pretend("arch=90");
    CHECK(rt_device_open("gpu", 0, &d, &err) == 0);
    CHECK(rt_module_load(d, cubin, n, &m, &err) == 0 && m);
    CHECK(rt_module_func(d, m, "mk_forward", 200000, &f, &err) == 0 && f);
    CHECK(rt_module_func(d, m, "other", 0, &f, &err) == MK_EDEVICE && !f);
    CHECK_STR(err.text, "kernel other: cuModuleGetFunction: CUDA_ERROR_NOT_FOUND (said the fake)");
    CHECK(rt_module_func(d, m, "mk_forward", 232449, &f, &err) == MK_EDEVICE && !f);
    CHECK_STR(err.text, "mk_forward wants 232449 bytes of shared memory; a block has 232448 on "
              "Fake GPU (0) X0");
    rt_module_free(d, m);
    rt_module_free(d, NULL);

    n = make_cubin(cubin, 8, 0x6005a04, 128);
    CHECK(rt_module_load(d, cubin, n, &m, &err) == 0);
    rt_module_free(d, m);
    n = make_cubin(cubin, 8, 0x6005004, 128);
    CHECK(rt_module_load(d, cubin, n, &m, &err) == MK_EUNSUPPORTED && !m);
    CHECK_STR(err.text, "the cubin is for sm_80 and does not run on Fake GPU (0) X0, "
              "which is sm_90");
    n = make_cubin(cubin, 8, 0x6005a04, 129);
    CHECK(rt_module_load(d, cubin, n, &m, &err) == MK_EFORMAT && !m);
    CHECK_STR(err.text, "the 256 bytes given are not a whole cubin");
    n = make_cubin(cubin, 8, 0x6005a04, 128);
    for (size_t i = 0; i < n; i++)
        CHECK(rt_module_load(d, cubin, i, &m, &err) == MK_EFORMAT);
    pretend("arch=90,cuModuleLoadData=200");
    CHECK(rt_module_load(d, cubin, n, &m, &err) == MK_EUNSUPPORTED && !m);
    CHECK_STR(err.text, "the driver (for CUDA 13.0) refuses the cubin for sm_90; it may be older "
              "than the compiler that made it: cuModuleLoadData: CUDA_ERROR_INVALID_IMAGE "
              "(said the fake)");
    pretend("");
    rt_device_close(d);
}

/* Attribute 4 is the cluster's size, 2 says cooperative. */
static void check_cluster_launch(struct rt_device *d, rt_func f, void **params,
                                 const char *fake_launch)
{
    pretend("clusters=3");
    CHECK(rt_launch(d, f, 24, 288, 1024, 1, 8, params, &err) == 0);
    CHECK_STR(fake_launch, "24 x 288, 1024 bytes, 4 = 8, 2 = 1");
    CHECK(rt_launch(d, f, 48, 288, 1024, 1, 16, params, &err) == 0);
    CHECK_STR(fake_launch, "48 x 288, 1024 bytes, 4 = 16, 2 = 1");
    CHECK(rt_launch(d, f, 64, 288, 1024, 0, 2, params, &err) == 0);
    CHECK_STR(fake_launch, "64 x 288, 1024 bytes, 4 = 2");
    CHECK(rt_launch(d, f, 32, 288, 1024, 1, 8, params, &err) == MK_EDEVICE);
    CHECK_STR(err.text, "the cooperative grid has 4 clusters of 8 blocks of 288 threads and 1024 "
              "bytes of shared memory; 3 such clusters fit on Fake GPU (0) X0 at once");
    CHECK(rt_launch(d, f, 20, 288, 1024, 1, 8, params, &err) == MK_EINVAL);
    CHECK_STR(err.text, "cannot launch 20 blocks in clusters of 8");
    pretend("clusters=3,cuLaunchKernelEx=719");
    CHECK(rt_launch(d, f, 24, 288, 1024, 1, 8, params, &err) == MK_EDEVICE);
    CHECK_STR(err.text, "24 blocks of 288 threads and 1024 bytes of shared memory: "
              "cuLaunchKernelEx: CUDA_ERROR_LAUNCH_FAILED (said the fake)");
    /* A cluster of 16 is asked for with an attribute of the kernel. */
    pretend("clusters=3,cuFuncSetAttribute=1");
    CHECK(rt_launch(d, f, 24, 288, 1024, 1, 8, params, &err) == 0);
    CHECK(rt_launch(d, f, 48, 288, 1024, 1, 16, params, &err) == MK_EDEVICE);
    pretend("clusters=3,cuOccupancyMaxActiveClusters=719");
    CHECK(rt_launch(d, f, 24, 288, 1024, 1, 8, params, &err) == MK_EDEVICE);
    CHECK_STR(err.text, "cuOccupancyMaxActiveClusters: CUDA_ERROR_LAUNCH_FAILED (said the fake)");
}

static void test_launch(const char *fake_launch)
{
    unsigned char cubin[256];
    struct rt_device *d;
    void *params[1] = { cubin };
    rt_module m;
    rt_func f;
    size_t n = make_cubin(cubin, 7, 0x5a055a, 128);

    pretend("fit=2,sms=4");
    CHECK(rt_device_open("gpu", 0, &d, &err) == 0);
    CHECK(rt_module_load(d, cubin, n, &m, &err) == 0);
    CHECK(rt_module_func(d, m, "mk_forward", 1024, &f, &err) == 0);
    CHECK(rt_launch(d, f, 8, 256, 1024, 1, 0, params, &err) == 0);
    CHECK(rt_launch(d, f, 9, 256, 1024, 0, 1, params, &err) == 0);
    CHECK(rt_launch(d, f, 9, 256, 1024, 1, 1, params, &err) == MK_EDEVICE);
    CHECK_STR(err.text, "the cooperative grid has 9 blocks of 256 threads and 1024 bytes of "
              "shared memory; 8 such blocks fit on Fake GPU (0) X0 at once");
    CHECK(rt_launch(d, f, 0, 256, 1024, 1, 0, params, &err) == MK_EINVAL);
    CHECK_STR(err.text, "cannot launch 0 blocks of 256 threads with 1024 bytes of shared memory");
    pretend("cuLaunchKernel=701");
    CHECK(rt_launch(d, f, 8, 256, 1024, 0, 0, params, &err) == MK_EDEVICE);
    CHECK_STR(err.text, "8 blocks of 256 threads and 1024 bytes of shared memory: cuLaunchKernel: "
              "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES (said the fake)");
    pretend("cuLaunchCooperativeKernel=719,fit=2");
    CHECK(rt_launch(d, f, 8, 256, 1024, 1, 0, params, &err) == MK_EDEVICE);
    CHECK_STR(err.text, "8 blocks of 256 threads and 1024 bytes of shared memory: "
              "cuLaunchCooperativeKernel: CUDA_ERROR_LAUNCH_FAILED (said the fake)");
    check_cluster_launch(d, f, params, fake_launch);
    pretend("");
    rt_module_free(d, m);
    rt_device_close(d);
}

/* ---- The emulated device ----------------------------------------------------- */

static void check_host_fails(const char *which, int code, const char *text)
{
    struct rt_device *d = (struct rt_device *) &err;

    CHECK(rt_device_open(which, 0, &d, &err) == code && !d);
    CHECK_STR(err.text, text);
}

static void test_host_errors(const char *fake)
{
    setenv("MK_HOST_DRIVER", "libno-such-machine.so", 1);
    check_host_fails("host", MK_ENOGPU, "the emulated device cannot be opened "
                     "(libno-such-machine.so: cannot open shared object file: "
                     "No such file or directory)");
    setenv("MK_HOST_DRIVER", "libc.so.6", 1);
    check_host_fails("host", MK_ENOGPU, "libc.so.6 has no cuInit: it is not the libmkhost.so of "
                     "this version");
    setenv("MK_HOST_DRIVER", fake, 1);
    pretend("arch=90");
    check_host_fails("host:sm_80", MK_ENOGPU, "libmkhost.so does not emulate sm_80");
    check_host_fails("hosts", MK_EINVAL, "\"hosts\" is not a device: they are gpu, host and "
                     "host:sm_XX");
    check_host_fails("host:", MK_EUNSUPPORTED, "device host:: architecture \"\" is not supported; "
                     "known are sm_ and one of 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121");
    check_host_fails("host:sm_91", MK_EUNSUPPORTED, "device host:sm_91: architecture \"sm_91\" is "
                     "not supported; known are sm_ and one of 75, 80, 86, 87, 89, 90, 100, 103, "
                     "110, 120, 121");
    CHECK(rt_device_open("cpu", 0, &(struct rt_device *) { NULL }, NULL) == MK_EINVAL);
}

static void label_text(void *user, uint64_t offset, char *out, size_t size)
{
    snprintf(out, size, "%s at %d", (const char *) user, (int) offset);
}

static void test_host(const char *told)
{
    struct rt_device *d, *gpu;
    struct gen_gpu g;

    pretend("arch=75,devices=3,sms=99");
    CHECK(rt_device_open("host:sm_75", 7, &d, &err) == 0);
    CHECK(rt_device_open(NULL, 0, &gpu, &err) == 0);
    rt_device_facts(d, &g);
    CHECK(rt_device_is_host(d) && g.host && g.arch == 75 && g.sms == 16 && g.smem_block == 65536);
    CHECK_STR(g.name, "host-sm_75");
    CHECK(rt_device_clock(d) == 0);
    rt_device_facts(gpu, &g);
    CHECK(!rt_device_is_host(gpu) && !g.host && g.sms == 99);
    rt_device_seed(d, 1ull << 40);
    CHECK_STR(told, "seed 1099511627776");
    rt_device_seed(gpu, 3);
    CHECK_STR(told, "seed 1099511627776");
    rt_device_label(d, 4096, 100, "box", label_text, (void *) "thing");
    CHECK_STR(told, "label 4096 100 box: thing at 5");
    rt_device_label(d, 4096, 0, "box", NULL, NULL);
    CHECK_STR(told, "label 4096 0 box: ");
    rt_device_label(gpu, 1, 2, "other", NULL, NULL);
    CHECK_STR(told, "label 4096 0 box: ");
    CHECK_STR(rt_device_report(d), "");
    pretend("report=1");
    CHECK_STR(rt_device_report(d), "two\nlines");
    CHECK_STR(rt_device_report(gpu), "");
    rt_device_close(d);
    rt_device_close(gpu);
}

/* A kernel of an emulated device is a shared object. */
static void test_host_module(void)
{
    const uint16_t dyn = 3, machine = 62;
    unsigned char object[256];
    struct rt_device *d;
    rt_module m;
    rt_func f;
    size_t n = make_cubin(object, 0, 0, 128);

    pretend("arch=90");
    CHECK(rt_device_open("host", 0, &d, &err) == 0);
    CHECK(rt_module_load(d, object, n, &m, &err) == MK_EFORMAT && !m);
    memcpy(object + 16, &dyn, 2);
    CHECK(rt_module_load(d, object, n, &m, &err) == MK_EFORMAT && !m);
    CHECK_STR(err.text, "the 256 bytes given are not a whole kernel for Fake GPU (0) X0");
    memcpy(object + 18, &machine, 2);
    for (size_t i = 0; i < n; i++)
        CHECK(rt_module_load(d, object, i, &m, &err) == MK_EFORMAT && !m);
    CHECK(rt_module_load(d, object, n, &m, &err) == 0 && m);
    CHECK(rt_module_func(d, m, "mk_decode", 1000, &f, &err) == 0 && f);
    rt_module_free(d, m);
    pretend("arch=90,cuModuleLoadData=200");
    CHECK(rt_module_load(d, object, n, &m, &err) == MK_EUNSUPPORTED && !m);
    CHECK_STR(err.text, "Fake GPU (0) X0 refuses the kernel: cuModuleLoadData: "
              "CUDA_ERROR_INVALID_IMAGE (said the fake)");
    pretend("");
    rt_device_close(d);
}

/* A compiler that takes the fake driver for every kernel: an ELF file is all that is looked at. */
static void use_fake_compiler(const char *dir, const char *fake)
{
    char path[256];
    FILE *f;

    snprintf(path, sizeof path, "%s/cxx", dir);
    f = fopen(path, "w");
    CHECK(f && fprintf(f, "#!/bin/sh\ncase $* in *--version) echo fake;; *) cp '%s' kernel.so;; "
                       "esac\n", fake) > 0 && fclose(f) == 0 && chmod(path, 0700) == 0);
    setenv("MK_HOST_CXX", path, 1);
    setenv("MK_CACHE_DIR", dir, 1);
}

/* A session names its buffers, and a failure carries the machine's report. */
static void test_host_session(const char *fake, const char *told)
{
    const struct rt_engine_options options = {.device = "host"};
    const char *srcdir = getenv("srcdir");
    char path[4096], dir[] = "/tmp/t-device-XXXXXX";
    struct rt_weights *w = NULL;
    struct rt_engine *e = NULL;
    struct rt_session *s = NULL;
    struct gen_model m;
    int done, rc;

    CHECK(mkdtemp(dir) != NULL);
    use_fake_compiler(dir, fake);
    pretend("arch=90");
    snprintf(path, sizeof path, "%s/toy/toy-qwen3", srcdir ? srcdir : ".");
    CHECK(gen_model_read(path, &m, &err) == 0 && rt_weights_random(&m, 1, &w, &err) == 0 &&
          rt_engine_open(&m, w, &options, &e, &err) == 0);
    rc = rt_session_make(e, 512, &s, &err);
    CHECKF(rc == 0 || rc == MK_ETOOL, "%s", err.text);
    if (rc == 0) {
        CHECK(rt_session_plan(s)->gpu.host && rt_session_plan(s)->ctas == 16);
        CHECKF(strstr(told, " 64 cancel word: "), "%s", told);
        pretend("cuStreamSynchronize=719,report=1");
        CHECK(rt_session_prefill(s, (int32_t[]){1, 2, 3}, 3, 0, &done, &err) == MK_EDEVICE);
        CHECK_STR(err.text, "cuStreamSynchronize: CUDA_ERROR_LAUNCH_FAILED (said the fake)\n"
                  "two\nlines");
        CHECK(rt_session_prefill(s, (int32_t[]){1, 2, 3}, 3, 0, &done, NULL) == MK_EDEVICE);
        pretend("");
        rt_session_free(s);
        CHECKF(strstr(told, " 0 cancel word: "), "%s", told);
    }
    rt_engine_close(e);
    rt_weights_close(w);
    snprintf(path, sizeof path, "rm -r %s", dir);
    CHECK(system(path) == 0);
}

static void *use_device(void *arg)
{
    rt_ptr p;

    if (rt_device_alloc(arg, 64, &p, NULL) || rt_device_set(arg, p, 1, 64, NULL)
        || rt_device_sync(arg, NULL))
        return arg;
    rt_device_free(arg, p);
    return NULL;
}

static void test_other_thread(void)
{
    struct rt_device *d;
    pthread_t t;
    void *bad = NULL;

    CHECK(rt_device_open("gpu", 0, &d, &err) == 0);
    CHECK(pthread_create(&t, NULL, use_device, d) == 0);
    CHECK(pthread_join(t, &bad) == 0 && !bad);
    rt_device_close(d);
}

static void check_session_fails(struct rt_engine *e, const char *settings, const char *text)
{
    struct rt_session *s;

    pretend(settings);
    CHECK(rt_session_make(e, 512, &s, &err) == MK_ENOMEM && !s);
    CHECK_STR(err.text, text);
}

/* A model that does not fit: what is needed, and what would fit. */
static void test_too_little_memory(void)
{
    const char *srcdir = getenv("srcdir");
    struct rt_weights *w = NULL;
    struct rt_engine *e = NULL;
    struct gen_model m;
    char path[4096];

    pretend("");
    snprintf(path, sizeof path, "%s/toy/toy-qwen3", srcdir ? srcdir : ".");
    CHECK(gen_model_read(path, &m, &err) == 0 && rt_weights_random(&m, 1, &w, &err) == 0 &&
          rt_engine_open(&m, w, NULL, &e, &err) == 0);
    check_session_fails(e, "memory=60000000",
                        "toy-qwen3 needs 0.08 GB of device memory without a KV cache; "
                        "Fake GPU (0) X0 has 0.06 GB free");
    check_session_fails(e, "memory=75600000",
                        "toy-qwen3 with a context of 512 needs 0.08 GB of device memory; "
                        "Fake GPU (0) X0 has 0.08 GB free, enough for a context of 257");
    rt_engine_close(e);
    rt_weights_close(w);
}

int main(void)
{
    char path[4096];
    void *lib;
    int *live;

    if (!find_fake(path, sizeof path))
        SKIP("libfakecuda.so was not built");
    pretend("");
    test_no_driver();
    setenv("MK_CUDA_DRIVER", path, 1);
    test_open_errors();
    test_facts();
    test_memory();
    test_too_little_memory();
    test_stream();
    test_module();
    lib = dlopen(path, RTLD_NOW);
    test_launch(lib ? dlsym(lib, "fake_launch") : NULL);
    test_other_thread();
    live = lib ? dlsym(lib, "fake_cuda_live") : NULL;
    test_host_errors(path);
    test_host(lib ? dlsym(lib, "fake_host") : NULL);
    test_host_module();
    test_host_session(path, lib ? dlsym(lib, "fake_host") : NULL);
    CHECKF(live && *live == 0, "%d driver objects were not freed", live ? *live : -1);
    return check_done();
}
