/* t-nvrtc.c - runtime/nvrtc.c with the NVRTC at hand: every architecture, options, errors. */
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "runtime/nvrtc.h"
#include "tests/check.h"

static const int archs[] = { 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121 };
static const char source[] =
    "extern \"C\" __global__ void mk_tiny(float *p, int n)\n"
    "{\n"
    "    p[threadIdx.x] = n + p[blockIdx.x];\n"
    "}\n";
static struct mk_err err;

static void test_options(void)
{
    char *o = rt_nvrtc_options(90);

    CHECK_STR(o, "--gpu-architecture=sm_90a --std=c++17 --diag-suppress=177 --ptxas-options=-v");
    free(o);
    setenv("MK_NVRTC_FLAGS", " \t-DA=1   --fmad=false\n", 1);
    o = rt_nvrtc_options(120);
    CHECK_STR(o, "--gpu-architecture=sm_120 --std=c++17 --diag-suppress=177 --ptxas-options=-v -DA=1 --fmad=false");
    free(o);
    unsetenv("MK_NVRTC_FLAGS");
}

/* In a child, where no library has been opened yet: MK_NVRTC set to PATH fails with TEXT. */
static void check_hidden(const char *path, const char *text)
{
    int status = 0;
    pid_t pid = fork();

    if (pid == 0) {
        const char *version = "";
        setenv("MK_NVRTC", path, 1);
        int bad = rt_nvrtc_open(&version, &err) != MK_ETOOL || version || strcmp(err.text, text)
                  || rt_nvrtc_knows(90);
        if (bad)
            fprintf(stderr, "got \"%s\"\n", err.text);
        _exit(bad);
    }
    waitpid(pid, &status, 0);
    CHECKF(WIFEXITED(status) && WEXITSTATUS(status) == 0, "MK_NVRTC=%s", path);
}

static void test_hidden(void)
{
    char dir[] = "/tmp/t-nvrtc-XXXXXX", text[256];

    check_hidden("/nonexistent/libnvrtc.so", "MK_NVRTC: cannot open NVRTC: "
                 "/nonexistent/libnvrtc.so: cannot open shared object file: "
                 "No such file or directory");
    check_hidden("libc.so.6", "the NVRTC at hand has no nvrtcVersion: it is too old, "
                 "or another library");
    CHECK(mkdtemp(dir) != NULL);
    snprintf(text, sizeof text, "MK_NVRTC: there is no libnvrtc.so in the folder %s", dir);
    check_hidden(dir, text);
    rmdir(dir);
}

static void test_archs(void)
{
    for (size_t i = 0; i < sizeof archs / sizeof *archs; i++) {
        char *options = rt_nvrtc_options(archs[i]), *log = NULL;
        unsigned char *cubin = NULL;
        size_t size = 0;
        int rc = rt_nvrtc_compile(source, "tiny.cu", archs[i], options, &cubin, &size, &log, &err);

        if (!rt_nvrtc_knows(archs[i])) {
            printf("sm_%d: this NVRTC does not know it\n", archs[i]);
            CHECK(rc == MK_EUNSUPPORTED && !cubin);
        } else {
            CHECKF(rc == 0, "sm_%d: %s", archs[i], err.text);
            CHECK(cubin && size > 64 && !memcmp(cubin, "\177ELF", 4));
            CHECKF(log && strstr(log, "mk_tiny") && strstr(log, "0 bytes spill stores"),
                   "sm_%d: the log does not speak of spills: %s", archs[i], log ? log : "(null)");
        }
        free(options);
        free(cubin);
        free(log);
    }
}

static void test_same_twice(void)
{
    unsigned char *a, *b;
    size_t n = 0, m = 0;
    char *options = rt_nvrtc_options(90);

    CHECK(rt_nvrtc_compile(source, "tiny.cu", 90, options, &a, &n, NULL, &err) == 0);
    CHECK(rt_nvrtc_compile(source, "tiny.cu", 90, options, &b, &m, NULL, &err) == 0);
    CHECK(n && n == m && !memcmp(a, b, n));
    free(options);
    free(a);
    free(b);
}

static void test_errors(const char *version)
{
    unsigned char *cubin = (unsigned char *) &err;
    size_t size = 1;
    char *options = rt_nvrtc_options(90), *log = NULL;
    char text[256];

    CHECK(rt_nvrtc_compile("__device__ int f() { return missing; }\n", "bad.cu", 90, options,
                           &cubin, &size, &log, &err) == MK_ECOMPILE);
    CHECK(!cubin && !size && log);
    snprintf(text, sizeof text, "bad.cu: NVRTC %s: NVRTC_ERROR_COMPILATION\nbad.cu(1): error: "
             "identifier \"missing\" is undefined", version);
    CHECKF(!strncmp(err.text, text, strlen(text)), "got \"%s\"", err.text);
    CHECK(err.text[strlen(err.text) - 1] != '\n');
    free(log);

    CHECK(rt_nvrtc_compile(source, "tiny.cu", 42, options, &cubin, &size, NULL, &err)
          == MK_EUNSUPPORTED);
    snprintf(text, sizeof text, "NVRTC %s does not know sm_42", version);
    CHECK_STR(err.text, text);
    CHECK(rt_nvrtc_compile(source, "tiny.cu", 90, "--no-such-option", &cubin, &size, NULL, &err)
          == MK_ECOMPILE);
    CHECKF(strstr(err.text, "no-such-option"), "got \"%s\"", err.text);
    CHECK(!rt_nvrtc_knows(42) && !rt_nvrtc_knows(0));
    free(options);
}

int main(void)
{
    const char *version = NULL;

    test_options();
    test_hidden();
    if (rt_nvrtc_open(&version, &err))
        SKIP("%s", err.text);
    CHECK(version && strchr(version, '.'));
    test_archs();
    test_same_twice();
    test_errors(version);
    return check_done();
}
