/* t-cxx.c - runtime/cxx.c: options, a small source compiled and called, every error with its
   text, planted faults.  What needs a C++ compiler is left out where there is none. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "runtime/cxx.h"
#include "tests/check.h"

static char scratch[64] = "/tmp/t-cxx-XXXXXX";
static char temp[128];          /* TMPDIR */
static struct mk_err err;

static const char good[] = "extern \"C\" int triple(int x)\n{\n    return 3 * x;\n}\n";

/* Names in TMPDIR. */
static int leftovers(void)
{
    DIR *d = opendir(temp);
    struct dirent *e;
    int n = 0;

    while (d && (e = readdir(d)) != NULL)
        n += e->d_name[0] != '.';
    if (d)
        closedir(d);
    return d ? n : -1;
}

static void put_file(const char *name, mode_t mode, const char *text, size_t size)
{
    char path[256];
    FILE *f;

    snprintf(path, sizeof path, "%s/%s", scratch, name);
    f = fopen(path, "w");
    CHECK(f && fwrite(text, 1, size, f) == size && fclose(f) == 0 && chmod(path, mode) == 0);
}

/* The compiler is now a shell script of the lines TEXT. */
static void use_script(const char *text)
{
    char line[1024], path[256];

    snprintf(line, sizeof line, "#!/bin/sh\n%s\n", text);
    put_file("script", 0755, line, strlen(line));
    snprintf(path, sizeof path, "%s/script", scratch);
    setenv("MK_HOST_CXX", path, 1);
}

static int compile(const char *src, const char *name, unsigned char **bytes, size_t *size)
{
    char *options = rt_cxx_options();
    int rc = rt_cxx_compile(src, name, options, bytes, size, &err);

    CHECK((rc == 0) == (*bytes != NULL) && (rc == 0) == (*size > 0));
    CHECKF(leftovers() == 0, "%d files are left", leftovers());
    free(options);
    return rc;
}

static void check_fails(const char *src, int code, const char *text)
{
    unsigned char *bytes = (unsigned char *) &err;
    size_t size = 1;

    CHECK(compile(src, "/entry/kernel.cu", &bytes, &size) == code);
    CHECK_STR(err.text, text);
}

static int has_compiler(void)
{
    char version[96], *options = rt_cxx_options();
    int rc = rt_cxx_version(options, version, sizeof version, &err);

    free(options);
    return rc == 0;
}

static void test_options(void)
{
    char *options;

    setenv("MK_HOST_CXX", "  ccache \t g++-99 ", 1);
    setenv("MK_HOST_CXXFLAGS", "-O3\n -DX ", 1);
    options = rt_cxx_options();
    CHECKF(options && !strncmp(options, "ccache g++-99 -std=c++17 -O1 -g ", 32), "%s", options);
    CHECKF(options && !strcmp(options + strlen(options) - 8, " -O3 -DX"), "%s", options);
    CHECK(options && !strpbrk(options, "\n\t") && !strstr(options, "  "));
#ifdef __SANITIZE_ADDRESS__
    CHECK(options && strstr(options, " -fsanitize=address,undefined "));
#elif !defined(__SANITIZE_THREAD__)
    CHECK(options && (!strstr(options, "-fsanitize=")
                      || dlsym(RTLD_DEFAULT, "__ubsan_handle_add_overflow")));
#endif
    free(options);
    unsetenv("MK_HOST_CXX");
    unsetenv("MK_HOST_CXXFLAGS");
}

static void test_compile(void)
{
    unsigned char *bytes;
    char path[256];
    size_t size;
    void *lib;

    CHECKF(compile(good, "/the/entry/kernel.cu", &bytes, &size) == 0, "%s", err.text);
    if (!bytes)
        return;
    /* The debugger looks for the source in the entry, and not where it was compiled. */
    CHECK(memmem(bytes, size, "/the/entry", 10) && memmem(bytes, size, "kernel.cu", 9));
    CHECK(!memmem(bytes, size, temp, strlen(temp)));
    put_file("object.so", 0700, (char *) bytes, size);
    free(bytes);
    snprintf(path, sizeof path, "%s/object.so", scratch);
    lib = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    CHECKF(lib, "%s", dlerror());
    if (lib) {
        int (*triple)(int);
        *(void **) &triple = dlsym(lib, "triple");
        CHECK(triple && triple(14) == 42);
        dlclose(lib);
    }
    CHECK(compile("int somewhere_else(); int f() { return somewhere_else(); }\n", "kernel.cu",
                  &bytes, &size) == 0);
    free(bytes);
}

static void test_refusal(void)
{
    unsigned char *bytes;
    size_t size;

    CHECK(compile("int x = 1;\n#error no good\n", "/entry/kernel.cu", &bytes, &size)
          == MK_ECOMPILE);
    CHECKF(!strncmp(err.text, "kernel.cu: ", 11) && strstr(err.text, ": exit status 1\n")
           && strstr(err.text, "kernel.cu:2:2: error: ") && strstr(err.text, "no good"), "%s",
           err.text);
    CHECK(rt_cxx_compile("x", "k.cu", "c++ -shared -fPIC", &bytes, &size, NULL) == MK_ECOMPILE);
}

static void test_bad_compilers(void)
{
    char want[512], version[96], *path = strdup(getenv("PATH") ? getenv("PATH") : ""), *options;

    setenv("MK_HOST_CXX", "/no/such/c++ -O", 1);
    check_fails(good, MK_ETOOL, "/no/such/c++: No such file or directory; a kernel for the "
                "emulated device needs a C++ compiler (apt-get install g++, or name one in MK_HOST_CXX)");
    unsetenv("MK_HOST_CXX");
    setenv("PATH", temp, 1);
    check_fails(good, MK_ETOOL, "c++: No such file or directory; a kernel for the emulated device "
                "needs a C++ compiler (apt-get install g++, or name one in MK_HOST_CXX)");
    options = rt_cxx_options();
    CHECK(rt_cxx_version(options, version, sizeof version, &err) == MK_ETOOL && !version[0]);
    free(options);
    setenv("PATH", path, 1);
    free(path);
    use_script("kill -9 $$");
    snprintf(want, sizeof want, "%s/script was killed by signal 9", scratch);
    check_fails(good, MK_ECOMPILE, want);
    use_script("exit 0");
    snprintf(want, sizeof want, "kernel.cu: %s/script made no shared object", scratch);
    check_fails(good, MK_ECOMPILE, want);
    use_script(">kernel.so");
    check_fails(good, MK_ECOMPILE, "kernel.cu: the shared object is empty");
    use_script("echo first; echo 'an error: here'; echo last >&2; exit 2");
    snprintf(want, sizeof want, "kernel.cu: %s/script: exit status 2\nan error: here\nlast",
             scratch);
    check_fails(good, MK_ECOMPILE, want);
    use_script("exit 127");
    snprintf(want, sizeof want, "%s/script cannot be run", scratch);
    check_fails(good, MK_ETOOL, want);
    unsetenv("MK_HOST_CXX");
    setenv("TMPDIR", "/no/such/folder", 1);
    CHECK(rt_cxx_compile(good, "k.cu", "c++", &(unsigned char *) { NULL }, &(size_t) { 0 }, &err)
          == MK_EIO);
    CHECK_STR(err.text, "cannot make a folder in /no/such/folder: No such file or directory");
    setenv("TMPDIR", temp, 1);
}

/* What the compiler gets: its own folder, our name of it though it is relative, no blocked
   signals, English, and nothing to read. */
static void test_surroundings(void)
{
    char *here = getcwd(NULL, 0);
    unsigned char *bytes;
    sigset_t all, before;
    size_t size;

    use_script("grep -q '^SigBlk:[^0-9]*0*$' /proc/self/status || echo blocked\n"
               "[ \"$LC_ALL\" = C ] || echo \"in $LC_ALL\"\n"
               "read x && echo input\n"
               "grep -q triple kernel.cu || echo no source\n"
               "echo \"error: $*\" >&2; exit 1");
    setenv("LC_ALL", "xx_XX", 1);
    setenv("MK_HOST_CXX", "./script -q", 1);
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, &before);
    CHECK(chdir(scratch) == 0);
    CHECK(compile(good, "kernel.cu", &bytes, &size) == MK_ECOMPILE);
    CHECK(here && chdir(here) == 0);
    sigprocmask(SIG_SETMASK, &before, NULL);
    CHECKF(!strncmp(err.text, "kernel.cu: ./script: exit status 1\nerror: -q -std=c++17 ", 56)
           && strstr(err.text, " -o kernel.so -x c++ kernel.cu"), "%s", err.text);
    free(here);
    setenv("LC_ALL", "C", 1);
    use_script("shift $(($# - 1)); echo \"$1, 7.5\"; echo two");
    char version[16], *options = rt_cxx_options();
    CHECK(rt_cxx_version(options, version, sizeof version, &err) == 0);
    CHECK_STR(version, "--version, 7.5");
    free(options);
    unsetenv("MK_HOST_CXX");
}

static void check_plant(const struct rt_plant *plant, int code, const char *want)
{
    char *text = strdup("abc abc xyz\n");

    rt_cxx_plant(plant);
    CHECK(rt_cxx_fault(&text, &err) == code);
    CHECK_STR(code ? err.text : text, want);
    rt_cxx_plant(NULL);
    free(text);
}

static void test_faults(void)
{
    static const struct rt_plant one = {"one", {{"abc", "-", 2}, {"- -", "long text", 1}}};
    static const struct rt_plant less = {"less", {{"abc", "-", 1}}};
    static const struct rt_plant none = {"none", {{"abd", "-", 1}}};
    static const struct rt_plant empty = {"empty", {{"", "-", 0}}};
    static const struct rt_plant four = {"four", {{"a", "1", 2}, {"b", "2", 2}, {"c", "3", 2},
                                                  {"xyz", "", 1}}};
    char *options;

    check_plant(NULL, 0, "abc abc xyz\n");
    check_plant(&one, 0, "long text xyz\n");
    check_plant(&four, 0, "123 123 \n");
    check_plant(&less, MK_ECOMPILE,
                "fault less: its text is not in the kernel 1 times but 2: abc");
    check_plant(&none, MK_ECOMPILE,
                "fault none: its text is not in the kernel 1 times but 0: abd");
    check_plant(&empty, MK_ECOMPILE, "fault empty: its text is not in the kernel 0 times but 0: ");
    rt_cxx_plant(&one);
    options = rt_cxx_options();
    CHECK(options && strstr(options, " -DMK_FAULT=one-"));
    free(options);
    rt_cxx_plant(NULL);
    options = rt_cxx_options();
    CHECK(options && !strstr(options, "MK_FAULT"));
    free(options);
}

int main(void)
{
    char path[256];

    unsetenv("MK_HOST_CXX");
    unsetenv("MK_HOST_CXXFLAGS");
    if (!mkdtemp(scratch)) {
        perror(scratch);
        return 99;
    }
    snprintf(temp, sizeof temp, "%s/tmp", scratch);
    CHECK(mkdir(temp, 0700) == 0);
    setenv("TMPDIR", temp, 1);
    test_options();
    test_faults();
    test_bad_compilers();
    test_surroundings();
    if (has_compiler()) {
        test_compile();
        test_refusal();
    } else {
        printf("nothing is compiled: %s\n", err.text);
    }
    rmdir(temp);
    snprintf(path, sizeof path, "%s/script", scratch);
    unlink(path);
    snprintf(path, sizeof path, "%s/object.so", scratch);
    unlink(path);
    rmdir(scratch);
    return check_done();
}
