/* driver.c - the CUDA driver API over the machine.  A launch only begins; it goes on whenever the
   caller asks how far it is, and to its end when the caller waits.  Device number I emulates the I-th
   architecture that the generator knows. */
#define _GNU_SOURCE
#include "runtime/host/machine.h"

#include <dlfcn.h>
#include <elf.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "gen/gpu.h"

enum { /* CUresult */
    DONE = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_IMAGE = 200,
    NOT_FOUND = 500,
    NOT_READY = 600,
    LAUNCH_FAILED = 719
};
enum { SLICE = 1500, SLICES = 14 }; /* decisions of the scheduler between two looks of the host */
enum { VERSION = 13000, SMS = 16, AT_ONCE = 4 }; /* AT_ONCE: CTAs of a grid that is not cooperative */
static const size_t MEMORY = (size_t) 16 << 30;

typedef uint64_t device_pointer;

struct module {
    void *library;
    int fd;                     /* of its image; debuggers and addr2line read it by PATH */
    char path[64];
    struct function *functions; /* a list */
};

struct function {
    struct function *next;
    void (*entry)(void **);
    unsigned bytes;   /* of its one argument, a struct */
    unsigned cluster; /* CTAs of a cluster */
    char name[64];
};

static struct event {
    struct event *next;
    uint64_t after; /* launches that were started before it was recorded */
    uint64_t ns;    /* when the last of them ended; 0: it has not */
} *events;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t seed, started, ended;
static uint64_t sown; /* launches started before the seed was given */
static int contexts; /* retained, of all devices */
static int broken; /* a launch failed: nothing works any more, as on a GPU */
static void *arguments[1];
static char argument_bytes[4096];
static char first_line[512];

/* ---- Buffers ---------------------------------------------------------------- */

static struct buffer {
    struct buffer *next;
    char *memory;
    size_t bytes;
} *buffers;

static void check_guards(void)
{
    for (const struct buffer *b = buffers; b; b = b->next) {
        const size_t behind = check_guard(b->memory, b->bytes);
        if (behind) {
            fail_launch("a store %zu bytes behind the end of a buffer of %zu", behind - 1, b->bytes);
            return;
        }
    }
}

/* ---- Launches ------------------------------------------------------------- */

/* Events happen when the work before them has ended. */
static void stamp_events(void)
{
    for (struct event *e = events; e; e = e->next)
        if (!e->ns && e->after <= ended)
            e->ns = machine.clock_ns + 1;
}

/* Let the launch at work go on for STEPS decisions (0: to its end). */
static int go_on(int64_t steps)
{
    if (!broken && started != ended && machine_run(steps)) {
        check_guards();
        ended = started;
        broken = machine.failed;
        stamp_events();
    }
    return broken ? LAUNCH_FAILED : started == ended ? DONE : NOT_READY;
}

/* Under a seed the host looks at any moment, and may write to the kernel soon after it was told something. */
static int64_t slice(void)
{
    return machine.seed ? (int64_t) 1 << machine_random(SLICES) : SLICE;
}

static int finish(void)
{
    int rc;

    pthread_mutex_lock(&lock);
    rc = go_on(0);
    pthread_mutex_unlock(&lock);
    return rc;
}

/* Clusters are all there at once: as many CTAs as the grid has. */
static int launch(struct function *f, unsigned grid, unsigned block, unsigned smem, unsigned resident,
                  unsigned cluster, void **params)
{
    int rc;

    if (!grid || !block || block > 1024 || cluster < 1 || cluster > MOST_CLUSTER || grid % cluster)
        return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    rc = go_on(0);
    if (rc) {
        pthread_mutex_unlock(&lock);
        return rc;
    }
    memcpy(argument_bytes, params[0], f->bytes);
    arguments[0] = argument_bytes;
    machine.seed = seed ? seed + (started - sown) * 0x9E3779B97F4A7C15ull : 0;
    machine.cluster = cluster;
    if (machine_launch(f->name, f->entry, arguments, grid, block, smem, cluster > 1 ? grid : resident))
        rc = OUT_OF_MEMORY;
    else
        started++;
    pthread_mutex_unlock(&lock);
    return rc;
}

int cuLaunchCooperativeKernel(struct function *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                              unsigned bz, unsigned smem, void *stream, void **params)
{
    (void) gy, (void) gz, (void) by, (void) bz, (void) stream;
    return launch(f, gx, bx, smem, gx, f->cluster, params);
}

int cuLaunchKernel(struct function *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned smem, void *stream, void **params, void **extra)
{
    (void) gy, (void) gz, (void) by, (void) bz, (void) stream, (void) extra;
    return launch(f, gx, bx, smem, AT_ONCE, f->cluster, params);
}

struct config { /* CUlaunchConfig */
    unsigned grid[3], block[3], smem;
    void *stream;
    const struct {
        unsigned id;
        union {
            unsigned dims[3];
            char bytes[64];
        } value __attribute__((aligned(8)));
    } *attributes;
    unsigned n_attributes;
};

/* The attribute and the kernel itself may both say how large its clusters are. */
int cuLaunchKernelEx(const struct config *c, struct function *f, void **params, void **extra)
{
    enum { COOPERATIVE = 2, CLUSTER_DIMENSION = 4 };
    unsigned cluster = f->cluster, resident = AT_ONCE;

    (void) extra;
    for (unsigned i = 0; i < c->n_attributes; i++) {
        const unsigned x = c->attributes[i].value.dims[0];
        if (c->attributes[i].id == COOPERATIVE && x)
            resident = c->grid[0];
        if (c->attributes[i].id == CLUSTER_DIMENSION && f->cluster > 1 && x != f->cluster)
            return INVALID_VALUE;
        if (c->attributes[i].id == CLUSTER_DIMENSION)
            cluster = x;
    }
    return launch(f, c->grid[0], c->block[0], c->smem, resident, cluster, params);
}

int cuStreamSynchronize(void *stream)
{
    (void) stream;
    return finish();
}

/* ---- Events: recorded behind the launches before them ---------------------- */

int cuEventCreate(struct event **e, unsigned flags)
{
    (void) flags;
    *e = calloc(1, sizeof **e);
    if (!*e)
        return OUT_OF_MEMORY;
    pthread_mutex_lock(&lock);
    (*e)->next = events;
    (*e)->ns = 1;
    events = *e;
    pthread_mutex_unlock(&lock);
    return DONE;
}

int cuEventDestroy_v2(struct event *e)
{
    pthread_mutex_lock(&lock);
    for (struct event **at = &events; *at; at = &(*at)->next)
        if (*at == e) {
            *at = e->next;
            break;
        }
    pthread_mutex_unlock(&lock);
    free(e);
    return DONE;
}

int cuEventRecord(struct event *e, void *stream)
{
    int rc;

    (void) stream;
    pthread_mutex_lock(&lock);
    e->after = started;
    e->ns = 0;
    if (started == ended)
        stamp_events();
    rc = broken ? LAUNCH_FAILED : DONE;
    pthread_mutex_unlock(&lock);
    return rc;
}

int cuEventQuery(struct event *e)
{
    int rc;

    pthread_mutex_lock(&lock);
    rc = e->after <= ended && !broken ? DONE : go_on(slice());
    pthread_mutex_unlock(&lock);
    return rc;
}

int cuEventSynchronize(struct event *e)
{
    (void) e;
    return finish();
}

/* In the machine's own time. */
int cuEventElapsedTime(float *ms, struct event *a, struct event *b)
{
    int rc;

    pthread_mutex_lock(&lock);
    rc = a->ns && b->ns ? DONE : NOT_READY;
    if (rc == DONE)
        *ms = (float) (b->ns - a->ns) * 1e-6f;
    pthread_mutex_unlock(&lock);
    return rc;
}

/* ---- Modules: shared objects ----------------------------------------------- */

static size_t image_bytes(const void *image)
{
    const Elf64_Ehdr *h = image;

    return h->e_shoff + (size_t) h->e_shentsize * h->e_shnum;
}

/* Write the image into memory that has a path: /proc/PID/fd/N, for other programs too. */
static int make_file(struct module *m, const void *image)
{
    size_t left = image_bytes(image);
    const char *at = image;

    m->fd = memfd_create("mkhost", MFD_CLOEXEC);
    while (m->fd >= 0 && left) {
        ssize_t n = write(m->fd, at, left);
        if (n <= 0)
            break;
        at += n;
        left -= (size_t) n;
    }
    snprintf(m->path, sizeof m->path, "/proc/%d/fd/%d", (int) getpid(), m->fd);
    return left ? -1 : 0;
}

int cuModuleLoadData(struct module **out, const void *image)
{
    struct module *m = calloc(1, sizeof *m);
    int made;

    *out = NULL;
    if (!m)
        return OUT_OF_MEMORY;
    made = make_file(m, image) == 0;
    if (made)
        m->library = dlopen(m->path, RTLD_NOW | RTLD_LOCAL);
    if (!m->library) {
        const char *said = made ? dlerror() : NULL;
        pthread_mutex_lock(&lock);
        snprintf(first_line, sizeof first_line, "%s", said ? said : "no memory for a file");
        pthread_mutex_unlock(&lock);
        if (m->fd >= 0)
            close(m->fd);
        free(m);
        return INVALID_IMAGE;
    }
    *out = m;
    return DONE;
}

int cuModuleUnload(struct module *m)
{
    finish();
    dlclose(m->library);
    close(m->fd);
    for (struct function *f = m->functions, *next; f; f = next) {
        next = f->next;
        free(f);
    }
    free(m);
    return DONE;
}

/* What the kernel's file says about NAME; templates/host/entry.cu.m4. */
static const void *symbol_of(const struct module *m, const char *name, const char *suffix)
{
    char symbol[96];

    snprintf(symbol, sizeof symbol, "mkhost_%.64s%s", name, suffix);
    return dlsym(m->library, symbol);
}

int cuModuleGetFunction(struct function **out, struct module *m, const char *name)
{
    const void *entry = symbol_of(m, name, "");
    const unsigned *bytes = symbol_of(m, name, "_bytes"), *cluster = symbol_of(m, name, "_cluster");
    struct function *f;

    *out = NULL;
    if (!entry || !bytes || *bytes > sizeof argument_bytes)
        return NOT_FOUND;
    f = calloc(1, sizeof *f);
    if (!f)
        return OUT_OF_MEMORY;
    memcpy(&f->entry, &entry, sizeof entry);
    f->bytes = *bytes;
    f->cluster = cluster ? *cluster : 1;
    snprintf(f->name, sizeof f->name, "%s", name);
    pthread_mutex_lock(&lock);
    f->next = m->functions;
    *out = m->functions = f;
    pthread_mutex_unlock(&lock);
    return DONE;
}

int cuFuncSetAttribute(struct function *f, int attribute, int value)
{
    (void) f, (void) attribute, (void) value;
    return DONE;
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, struct function *f, int block, size_t smem)
{
    (void) f, (void) block, (void) smem;
    *n = 8;
    return DONE;
}

/* ---- Memory: the host's ------------------------------------------------------- */

int cuMemAlloc_v2(device_pointer *p, size_t bytes)
{
    struct buffer *b = calloc(1, sizeof *b);
    char *memory = b ? guarded_alloc(bytes, bytes / 256 % 16 * 256) : NULL;

    *p = (device_pointer) (uintptr_t) memory;
    if (!memory) {
        free(b);
        return OUT_OF_MEMORY;
    }
    pthread_mutex_lock(&lock);
    *b = (struct buffer) {buffers, memory, bytes};
    buffers = b;
    pthread_mutex_unlock(&lock);
    return DONE;
}

int cuMemFree_v2(device_pointer p)
{
    struct buffer **at = &buffers, *b;

    pthread_mutex_lock(&lock);
    go_on(0);
    while ((b = *at) && (device_pointer) (uintptr_t) b->memory != p)
        at = &b->next;
    if (b)
        *at = b->next;
    pthread_mutex_unlock(&lock);
    if (!b)
        return INVALID_VALUE;
    guarded_free(b->memory);
    free(b);
    return DONE;
}

int cuMemHostAlloc(void **p, size_t bytes, unsigned flags)
{
    device_pointer d;
    int rc = cuMemAlloc_v2(&d, bytes);

    (void) flags;
    *p = (void *) (uintptr_t) d;
    return rc;
}

int cuMemHostGetDevicePointer_v2(device_pointer *d, void *p, unsigned flags)
{
    (void) flags;
    *d = (device_pointer) (uintptr_t) p;
    return DONE;
}

int cuMemFreeHost(void *p)
{
    return cuMemFree_v2((device_pointer) (uintptr_t) p);
}

/* No launch begins meanwhile. */
static int copy(void *dst, const void *src, size_t bytes)
{
    int rc;

    pthread_mutex_lock(&lock);
    rc = go_on(0);
    if (rc == DONE)
        memcpy(dst, src, bytes);
    pthread_mutex_unlock(&lock);
    return rc;
}

int cuMemcpyHtoDAsync_v2(device_pointer dst, const void *src, size_t bytes, void *stream)
{
    (void) stream;
    return copy((void *) (uintptr_t) dst, src, bytes);
}

int cuMemcpyDtoHAsync_v2(void *dst, device_pointer src, size_t bytes, void *stream)
{
    (void) stream;
    return copy(dst, (const void *) (uintptr_t) src, bytes);
}

int cuMemsetD8Async(device_pointer dst, unsigned char value, size_t bytes, void *stream)
{
    int rc;

    (void) stream;
    pthread_mutex_lock(&lock);
    rc = go_on(0);
    if (rc == DONE)
        memset((void *) (uintptr_t) dst, value, bytes);
    pthread_mutex_unlock(&lock);
    return rc;
}

int cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes)
{
    *free_bytes = *total_bytes = MEMORY;
    return DONE;
}

/* ---- Devices ---------------------------------------------------------------- */

int cuInit(unsigned flags)
{
    (void) flags;
    return DONE;
}

int cuDriverGetVersion(int *version)
{
    *version = VERSION;
    return DONE;
}

int cuDeviceGetCount(int *n)
{
    for (*n = 0; gen_gpu_archs()[*n]; ++*n)
        ;
    return DONE;
}

int cuDeviceGet(int *device, int index)
{
    *device = index;
    return DONE;
}

int cuDeviceGetName(char *name, int size, int device)
{
    snprintf(name, (size_t) size, "host sm_%d", gen_gpu_archs()[device]);
    return DONE;
}

int cuDeviceGetPCIBusId(char *id, int size, int device)
{
    (void) device;
    if (size > 0)
        *id = 0;
    return DONE;
}

/* The rest of the facts are the plan's (gen_gpu_host). */
int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    enum { MULTIPROCESSORS = 16, MAJOR = 75, MINOR = 76, COOPERATIVE = 95 };
    const int arch = gen_gpu_archs()[device];

    *value = attribute == MAJOR ? arch / 10
           : attribute == MINOR ? arch % 10
           : attribute == MULTIPROCESSORS ? SMS
                                          : attribute == COOPERATIVE;
    return DONE;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device)
{
    (void) device;
    *bytes = MEMORY;
    return DONE;
}

int cuDevicePrimaryCtxRetain(void **context, int device)
{
    (void) device;
    pthread_mutex_lock(&lock);
    contexts++;
    pthread_mutex_unlock(&lock);
    *context = &machine;
    return DONE;
}

/* All devices are one machine.  Who closes the last makes it whole again; others' work goes on. */
int cuDevicePrimaryCtxRelease_v2(int device)
{
    (void) device;
    pthread_mutex_lock(&lock);
    if (contexts > 0 && --contexts == 0) {
        go_on(0);
        broken = 0;
        ended = started;
    }
    pthread_mutex_unlock(&lock);
    return DONE;
}

int cuCtxSetCurrent(void *context)
{
    (void) context;
    return DONE;
}

int cuStreamCreate(void **stream, unsigned flags)
{
    (void) flags;
    *stream = &machine;
    return DONE;
}

int cuStreamDestroy_v2(void *stream)
{
    cuStreamSynchronize(stream);
    return DONE;
}

/* ---- Errors and reports ------------------------------------------------------ */

int cuGetErrorName(int result, const char **text)
{
    *text = result == LAUNCH_FAILED   ? "CUDA_ERROR_LAUNCH_FAILED"
          : result == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
          : result == INVALID_IMAGE ? "CUDA_ERROR_INVALID_IMAGE"
          : result == NOT_FOUND     ? "CUDA_ERROR_NOT_FOUND"
          : result == NOT_READY     ? "CUDA_ERROR_NOT_READY"
          : result == INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE"
                                    : NULL;
    return *text ? DONE : INVALID_VALUE;
}

int cuGetErrorString(int result, const char **text)
{
    pthread_mutex_lock(&lock);
    if (result == LAUNCH_FAILED && machine.report)
        snprintf(first_line, sizeof first_line, "%.*s", (int) strcspn(machine.report, "\n"), machine.report);
    else if (result != INVALID_IMAGE)
        snprintf(first_line, sizeof first_line, "the emulated device refuses");
    pthread_mutex_unlock(&lock);
    *text = first_line;
    return DONE;
}

void mkhost_seed(uint64_t value)
{
    pthread_mutex_lock(&lock);
    go_on(0);
    seed = value;
    sown = started;
    pthread_mutex_unlock(&lock);
}

const char *mkhost_report(void)
{
    return machine.report ? machine.report : "";
}

void mkhost_label(uint64_t base, uint64_t bytes, const char *name,
                  void (*text)(void *, uint64_t, char *, size_t), void *user)
{
    pthread_mutex_lock(&lock);
    report_label(base, bytes, name, text, user);
    pthread_mutex_unlock(&lock);
}
