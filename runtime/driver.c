/* driver.c - see driver.h. */
#define _GNU_SOURCE
#include "runtime/driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "runtime/file.h"

/* ---- One library ---------------------------------------------------------- */

struct entry {
    const char *name;
    size_t offset;      /* in struct driver */
};

#define ENTRY(name, ...) { #name, offsetof(struct driver, name) },
static const struct entry driver_table[] = { DRIVER(ENTRY) { NULL, 0 } };
static const struct entry gpu_table[] = { GPU(ENTRY) { NULL, 0 } };
static const struct entry host_table[] = { HOST(ENTRY) { NULL, 0 } };
#undef ENTRY

/* Those of E; returns the first that LIB lacks, or NULL. */
static const char *load_table(struct driver *cu, void *lib, const struct entry *e)
{
    for (; e->name; e++) {
        void *f = dlsym(lib, e->name);
        if (!f)
            return e->name;
        memcpy((char *) cu + e->offset, &f, sizeof f);
    }
    return NULL;
}

/* All, OWN being those that only this library has; one that lacks any is closed. */
static const char *load_functions(struct driver *cu, void *lib, const struct entry *own)
{
    const char *lacks = load_table(cu, lib, driver_table);

    if (!lacks)
        lacks = load_table(cu, lib, own);
    if (lacks)
        dlclose(lib);
    return lacks;
}

static int open_gpu_driver(struct driver *gpu, struct mk_err *err)
{
    const char *path = getenv("MK_CUDA_DRIVER"), *lacks;
    void *lib;

    if (!path || !*path)
        path = "libcuda.so.1";
    lib = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!lib)
        return gen_fail(err, MK_ENOGPU, "no NVIDIA driver (%s)", dlerror());
    lacks = load_functions(gpu, lib, gpu_table);
    if (!lacks)
        return 0;
    return gen_fail(err, MK_ENOGPU, "%s has no %s: the NVIDIA driver is too old, "
                    "or this is another library", path, lacks);
}

/* Where libmkhost.so is: in PATH.  The places are those of a built tree, of an installed one that
   may have been moved, and of one that was not. */
static int find_host_driver(char *path, size_t size, struct mk_err *err)
{
    static const char *const folders[] = {
        "", ".libs/", "../.libs/", "../lib/mkgen/", "mkgen/",
#ifdef HOST_DIR
        HOST_DIR "/",
#endif
    };
    const char *named = getenv("MK_HOST_DRIVER");
    char own[4096], *end;
    int n;

    if (named && *named) {
        snprintf(path, size, "%s", named);
        return 0;
    }
    end = rt_file_of_code(own, sizeof own) ? NULL : strrchr(own, '/');
    if (end)
        end[1] = 0;
    else
        strcpy(own, "./");
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
        n = snprintf(path, size, "%s%slibmkhost.so", folders[i][0] == '/' ? "" : own, folders[i]);
        if (n < (int) size && access(path, R_OK) == 0)
            return 0;
    }
    return gen_fail(err, MK_ENOGPU, "the emulated device needs libmkhost.so, which is neither "
                    "$MK_HOST_DRIVER nor in %.2000s or beside it: it is built where Boost.Context "
                    "is installed (apt-get install libboost-context-dev, then configure and make)",
                    own);
}

/* Global, for emulated kernels find the machine's functions in it. */
static int open_host_driver(struct driver *host, struct mk_err *err)
{
    const char *lacks;
    char path[4200];
    void *lib;
    int rc = find_host_driver(path, sizeof path, err);

    if (rc)
        return rc;
    lib = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    if (!lib)
        return gen_fail(err, MK_ENOGPU, "the emulated device cannot be opened (%s)", dlerror());
    lacks = load_functions(host, lib, host_table);
    if (!lacks)
        return 0;
    return gen_fail(err, MK_ENOGPU, "%s has no %s: it is not the libmkhost.so of this version",
                    path, lacks);
}

/* ---- Once per process ----------------------------------------------------- */

int rt_driver_open(int host, const struct driver **cu, struct mk_err *err)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static struct driver drivers[2];
    static int is_open[2];
    struct driver *driver = &drivers[host != 0];
    int rc = 0;

    pthread_mutex_lock(&lock);
    if (!is_open[host != 0]) {
        rc = host ? open_host_driver(driver, err) : open_gpu_driver(driver, err);
        is_open[host != 0] = rc == 0;
    }
    pthread_mutex_unlock(&lock);
    *cu = driver;
    return rc;
}
