/* nvrtc.c - CUDA source -> cubin.  The functions of NVRTC that we use are declared here. */
#define _GNU_SOURCE
#include "config.h"
#include "runtime/nvrtc.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "runtime/file.h"

/* nvrtcResult is an int, nvrtcProgram a pointer. */
#define NVRTC(F)                                                                            \
    F(nvrtcVersion, int, (int *major, int *minor))                                          \
    F(nvrtcGetErrorString, const char *, (int result))                                      \
    F(nvrtcGetNumSupportedArchs, int, (int *n))                                             \
    F(nvrtcGetSupportedArchs, int, (int *archs))                                            \
    F(nvrtcCreateProgram, int, (void **prog, const char *src, const char *name, int n,      \
                                const char *const *headers, const char *const *names))      \
    F(nvrtcDestroyProgram, int, (void **prog))                                              \
    F(nvrtcCompileProgram, int, (void *prog, int n, const char *const *options))            \
    F(nvrtcGetProgramLogSize, int, (void *prog, size_t *size))                              \
    F(nvrtcGetProgramLog, int, (void *prog, char *log))                                     \
    F(nvrtcGetCUBINSize, int, (void *prog, size_t *size))                                   \
    F(nvrtcGetCUBIN, int, (void *prog, char *cubin))

#define NVRTC_OUT_OF_MEMORY   1     /* nvrtcResult */
#define NVRTC_BUILTIN_FAILURE 7
#define MAX_OPTIONS           64
#define MAX_ARCHS             64

static struct {
    void *lib;
    char version[16];
    int n_archs, archs[MAX_ARCHS];
#define FIELD(name, type, args) type (*name) args;
    NVRTC(FIELD)
#undef FIELD
} rtc;
static pthread_mutex_t rtc_lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- Finding the library -------------------------------------------------- */

/* Names of the library, the one that a toolkit's -dev package makes first. */
static const char *const lib_names[] = { "libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12" };
/* Where it lies in a toolkit, and where pip --target puts NVIDIA's packages. */
static const char *const lib_folders[] = {
    "", "/lib64", "/lib", "/nvidia/cu13/lib", "/nvidia/cuda_nvrtc/lib"
};
#define COUNT(a) (sizeof (a) / sizeof *(a))

static void *open_in(const char *dir)
{
    char path[4096];
    void *lib;

    for (size_t f = 0; f < COUNT(lib_folders); f++)
        for (size_t i = 0; i < COUNT(lib_names); i++) {
            int n = snprintf(path, sizeof path, "%s%s/%s", dir, lib_folders[f], lib_names[i]);
            if (n < (int) sizeof path && access(path, R_OK) == 0) {
                lib = dlopen(path, RTLD_NOW | RTLD_LOCAL);
                if (lib)
                    return lib;
            }
        }
    return NULL;
}

/* A folder that we come across and that nobody named: only one that the user or root made. */
static void *open_private(const char *dir)
{
    struct stat st;

    if (stat(dir, &st) || !S_ISDIR(st.st_mode) || (st.st_mode & S_IWOTH)
        || (st.st_uid != geteuid() && st.st_uid != 0))
        return NULL;
    return open_in(dir);
}

/* quickstart puts NVRTC into .nvrtc at the top of the tree: look beside the file that
   holds this code (libmk.so or a program) and in the four folders above. */
static void *open_beside(void)
{
    char path[4096 + 8];
    char *end;

    if (rt_file_of_code(path, 4096))
        return NULL;
    for (int up = 0; up < 5 && (end = strrchr(path, '/')) != NULL; up++) {
        void *lib;
        strcpy(end, "/.nvrtc");
        lib = open_private(path);
        if (lib)
            return lib;
        *end = 0;
    }
    return NULL;
}

static void *open_in_data(void)
{
    const char *data = getenv("XDG_DATA_HOME"), *home = getenv("HOME");
    char path[4096];
    void *lib = NULL;
    int n;

    if (data && data[0] == '/') {
        n = snprintf(path, sizeof path, "%s/mkgen/nvrtc", data);
        lib = n < (int) sizeof path ? open_private(path) : NULL;
    }
    if (!lib && home && home[0] == '/') {
        n = snprintf(path, sizeof path, "%s/.local/share/mkgen/nvrtc", home);
        lib = n < (int) sizeof path ? open_private(path) : NULL;
    }
    return lib;
}

/* The user's own choice and nothing else: so NVRTC can also be hidden. */
static void *open_named(const char *path, struct mk_err *err)
{
    struct stat st;
    void *lib;

    if (stat(path, &st) == 0 && S_ISDIR(st.st_mode)) {
        lib = open_in(path);
        if (!lib)
            gen_fail(err, MK_ETOOL, "MK_NVRTC: there is no libnvrtc.so in the folder %s", path);
        return lib;
    }
    lib = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!lib)
        gen_fail(err, MK_ETOOL, "MK_NVRTC: cannot open NVRTC: %s", dlerror());
    return lib;
}

static void *find_library(struct mk_err *err)
{
    const char *named = getenv("MK_NVRTC"), *home = getenv("CUDA_HOME");
    void *lib = NULL;

    if (named && *named)
        return open_named(named, err);
    for (size_t i = 0; !lib && i < COUNT(lib_names); i++)
        lib = dlopen(lib_names[i], RTLD_NOW | RTLD_LOCAL);
    if (!lib && home && *home)
        lib = open_in(home);
    if (!lib)
        lib = open_in("/usr/local/cuda");
#ifdef NVRTC_DIR
    if (!lib)
        lib = open_in(NVRTC_DIR);
#endif
    if (!lib)
        lib = open_beside();
    if (!lib)
        lib = open_in_data();
    if (!lib)
        gen_fail(err, MK_ETOOL, "NVRTC is needed to compile a kernel and was not found: looked at "
                 "$MK_NVRTC, the loader's path, $CUDA_HOME, /usr/local/cuda, configure's "
                 "--with-nvrtc, .nvrtc beside the program and ~/.local/share/mkgen/nvrtc.  Get it "
                 "with ./quickstart, with a CUDA Toolkit, or with `pip install --target "
                 "~/.local/share/mkgen/nvrtc nvidia-cuda-nvrtc`");
    return lib;
}

/* ---- Opening -------------------------------------------------------------- */

static int load_functions(void *lib, struct mk_err *err)
{
    static const struct { const char *name; size_t offset; } table[] = {
#define ENTRY(name, type, args) { #name, offsetof(__typeof__(rtc), name) },
        NVRTC(ENTRY)
#undef ENTRY
    };

    for (size_t i = 0; i < COUNT(table); i++) {
        void *f = dlsym(lib, table[i].name);
        if (!f)
            return gen_fail(err, MK_ETOOL, "the NVRTC at hand has no %s: it is too old, "
                            "or another library", table[i].name);
        memcpy((char *) &rtc + table[i].offset, &f, sizeof f);
    }
    return 0;
}

/* NVRTC opens libnvrtc-builtins by its bare name, which the loader only finds when it is
   loaded already: load the one that lies beside it.  Absent: NVRTC will say so itself. */
static void load_builtins(int major, int minor)
{
    char path[4096];
    Dl_info info;
    const char *end;

    if (!dladdr((void *) rtc.nvrtcVersion, &info) || !info.dli_fname)
        return;
    end = strrchr(info.dli_fname, '/');
    if (end && snprintf(path, sizeof path, "%.*s/libnvrtc-builtins.so.%d.%d",
                        (int) (end - info.dli_fname), info.dli_fname, major, minor)
               < (int) sizeof path)
        dlopen(path, RTLD_NOW | RTLD_LOCAL);
}

static int open_library(struct mk_err *err)
{
    int major = 0, minor = 0, n = 0;
    void *lib = find_library(err);
    int rc;

    if (!lib)
        return MK_ETOOL;
    rc = load_functions(lib, err);
    if (rc) {
        dlclose(lib);
        return rc;
    }
    if (rtc.nvrtcVersion(&major, &minor) || rtc.nvrtcGetNumSupportedArchs(&n)
        || n < 1 || n > MAX_ARCHS || rtc.nvrtcGetSupportedArchs(rtc.archs)) {
        dlclose(lib);
        return gen_fail(err, MK_ETOOL, "NVRTC does not tell its version and architectures");
    }
    snprintf(rtc.version, sizeof rtc.version, "%d.%d", major, minor);
    rtc.n_archs = n;
    load_builtins(major, minor);
    rtc.lib = lib;
    return 0;
}

int rt_nvrtc_open(const char **version, struct mk_err *err)
{
    int rc;

    if (version)
        *version = NULL;
    pthread_mutex_lock(&rtc_lock);
    rc = rtc.lib ? 0 : open_library(err);
    pthread_mutex_unlock(&rtc_lock);
    if (rc == 0 && version)
        *version = rtc.version;
    return rc;
}

int rt_nvrtc_knows(int arch)
{
    if (rt_nvrtc_open(NULL, NULL))
        return 0;
    for (int i = 0; i < rtc.n_archs; i++)
        if (rtc.archs[i] == arch)
            return 1;
    return 0;
}

/* ---- Options -------------------------------------------------------------- */

static const char blanks[] = " \t\r\n\v\f";

/* sm_90a, not sm_90: wgmma and setmaxnreg are refused without the a.  ptxas tells about
   spills in the log. */
char *rt_nvrtc_options(int arch)
{
    const char *more = getenv("MK_NVRTC_FLAGS");
    size_t size = 128 + (more ? strlen(more) : 0);
    char *out = malloc(size);
    size_t n;

    if (!out)
        return NULL;
    n = (size_t) snprintf(out, size, "--gpu-architecture=sm_%d%s --std=c++17 --diag-suppress=177 --ptxas-options=-v",
                          arch, arch == 90 ? "a" : "");
    while (more && *(more += strspn(more, blanks))) {
        size_t len = strcspn(more, blanks);
        out[n++] = ' ';
        memcpy(out + n, more, len);
        n += len;
        out[n] = 0;
        more += len;
    }
    return out;
}

/* Cut TEXT at its blanks into LIST; returns the count, -1: too many. */
static int split(char *text, const char **list)
{
    char *rest = NULL;
    int n = 0;

    for (char *p = strtok_r(text, blanks, &rest); p; p = strtok_r(NULL, blanks, &rest)) {
        if (n == MAX_OPTIONS)
            return -1;
        list[n++] = p;
    }
    return n;
}

/* ---- Compiling ------------------------------------------------------------ */

static char *get_log(void *prog)
{
    size_t size = 0;
    char *log;

    if (rtc.nvrtcGetProgramLogSize(prog, &size) || size == 0)
        size = 1;
    log = calloc(1, size + 1);
    if (log && size > 1 && rtc.nvrtcGetProgramLog(prog, log))
        log[0] = 0;
    return log;
}

/* The text of a refusal: the log from its first error on, without its last newlines. */
static int fail_compile(struct mk_err *err, int result, const char *name, const char *log)
{
    const char *from = log ? strstr(log, "error") : NULL;
    int code = result == NVRTC_OUT_OF_MEMORY ? MK_ENOMEM
               : result == NVRTC_BUILTIN_FAILURE ? MK_ETOOL : MK_ECOMPILE;
    int len;

    while (from && from > log && from[-1] != '\n')
        from--;
    if (!from)
        from = log ? log : "";
    len = (int) strnlen(from, 3500);
    while (len && strchr(blanks, from[len - 1]))
        len--;
    return gen_fail(err, code, "%s: NVRTC %s: %s%s%.*s", name, rtc.version,
                    rtc.nvrtcGetErrorString(result), len ? "\n" : "", len, from);
}

static int get_cubin(void *prog, const char *name, unsigned char **cubin, size_t *size,
                     struct mk_err *err)
{
    int r = rtc.nvrtcGetCUBINSize(prog, size);

    if (r || *size == 0)
        return gen_fail(err, MK_ECOMPILE, "%s: NVRTC %s made no cubin", name, rtc.version);
    *cubin = malloc(*size);
    if (!*cubin)
        return gen_fail(err, MK_ENOMEM, "%s: no memory for a cubin of %zu bytes", name, *size);
    r = rtc.nvrtcGetCUBIN(prog, (char *) *cubin);
    return r ? fail_compile(err, r, name, NULL) : 0;
}

int rt_nvrtc_compile(const char *src, const char *name, int arch, const char *options,
                     unsigned char **cubin, size_t *size, char **log, struct mk_err *err)
{
    const char *list[MAX_OPTIONS];
    char *words = NULL, *text = NULL;
    void *prog = NULL;
    int n, r, rc;

    *cubin = NULL;
    *size = 0;
    if (log)
        *log = NULL;
    rc = rt_nvrtc_open(NULL, err);
    if (rc)
        return rc;
    if (!rt_nvrtc_knows(arch))
        return gen_fail(err, MK_EUNSUPPORTED, "NVRTC %s does not know sm_%d", rtc.version, arch);
    words = strdup(options);
    n = words ? split(words, list) : 0;
    if (!words || n < 0) {
        rc = words ? gen_fail(err, MK_ECOMPILE, "%s: more than %d NVRTC options", name, MAX_OPTIONS)
                   : gen_fail(err, MK_ENOMEM, "%s: no memory to compile", name);
        goto done;
    }
    r = rtc.nvrtcCreateProgram(&prog, src, name, 0, NULL, NULL);
    if (r) {
        rc = fail_compile(err, r, name, NULL);
        prog = NULL;
        goto done;
    }
    r = rtc.nvrtcCompileProgram(prog, n, list);
    text = get_log(prog);
    rc = r ? fail_compile(err, r, name, text) : get_cubin(prog, name, cubin, size, err);
done:
    if (prog)
        rtc.nvrtcDestroyProgram(&prog);
    if (rc) {
        free(*cubin);
        *cubin = NULL;
        *size = 0;
    }
    if (log)
        *log = text;
    else
        free(text);
    free(words);
    return rc;
}
