/* cache.c - kernels by what they were made from: packs, the cache folder, the compiler. */
#define _GNU_SOURCE
#include "runtime/cache.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

#include "gen/gen.h"
#include "runtime/cxx.h"
#include "runtime/file.h"
#include "runtime/nvrtc.h"

#define KEY_FORMAT   1                  /* of the file "key"; a new one makes old entries misses */
#define STALE_S      3600               /* private folders older than this were left by the dead */
#define LOCK_WAIT_S  900                /* then compile without the lock: its holder must hang */
#define TICK_NS      100000000          /* between two calls of progress */
#define STACK_BYTES  ((size_t) 64 << 20) /* of the compiling thread; only what is used is taken */

/* A folder of entries, opened. */
struct place {
    int fd;                 /* -1: there is none */
    int own;                /* the cache: its files must belong to us alone */
    mode_t dir_mode, file_mode;     /* of the entries made in it */
    char path[3800];
};

/* One request. */
struct work {
    const struct rt_key *key;
    char *text;             /* what the file "key" must hold; the options are its last line */
    char name[128];         /* of the entry's folder */
    size_t prefix;          /* length of NAME up to the hash */
    struct timespec start;
    mk_progress_fn *progress;
    mk_warn_fn *warn;
    void *user;
};

/* What an entry holds besides its key. */
struct made {
    char *src;
    size_t src_size;
    unsigned char *cubin;
    size_t size;
    char tool[16], version[96];     /* "nvrtc" and "13.0"; "compiler" and what it says of itself */
};

static void made_free(struct made *m)
{
    free(m->src);
    free(m->cubin);
    memset(m, 0, sizeof *m);
}

static void warn(const struct work *w, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void warn(const struct work *w, const char *fmt, ...)
{
    char text[8192];
    va_list args;

    if (!w->warn)
        return;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    w->warn(w->user, text);
}

/* ---- The key -------------------------------------------------------------- */

/* Only names that are good as a part of a file's name, and one line per value. */
static int key_is_good(const struct rt_key *key)
{
    static const char good[] = "abcdefghijklmnopqrstuvwxyz" "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
                               "0123456789._-";
    size_t n = strspn(key->name, good);

    return n > 0 && n < 64 && !key->name[n] && key->name[0] != '.' && key->arch > 0
           && key->arch < 1000 && !strpbrk(key->templates, "\r\n")
           && !strpbrk(key->version, "\r\n") && !strpbrk(key->options, "\r\n");
}

/* Fill text and name of W; the hash covers both files that are compared on a hit. */
static int work_start(struct work *w, const struct rt_key *key, struct mk_err *err)
{
    size_t params = strlen(key->params);
    char *both;
    int n;

    memset(w, 0, sizeof *w);
    w->key = key;
    clock_gettime(CLOCK_MONOTONIC, &w->start);
    if (!key_is_good(key))
        return gen_fail(err, MK_EINVAL, "a kernel's key has a malformed name, architecture, "
                        "digest, version or options");
    n = asprintf(&w->text, "format = %d\nname = %s\narch = %ssm_%d\ntemplates = %s\nversion = %s\n"
                 "options = %s\n", KEY_FORMAT, key->name, key->host ? "host-" : "", key->arch,
                 key->templates, key->version, key->options);
    if (n < 0)
        w->text = NULL;
    both = n < 0 ? NULL : malloc((size_t) n + 1 + params);
    if (!both)
        return gen_fail(err, MK_ENOMEM, "no memory for a kernel's key");
    memcpy(both, w->text, (size_t) n + 1);
    memcpy(both + n + 1, key->params, params);
    w->prefix = (size_t) snprintf(w->name, sizeof w->name, "%s-%ssm_%d-", key->name,
                                  key->host ? "host-" : "", key->arch);
    snprintf(w->name + w->prefix, sizeof w->name - w->prefix, "%016llx",
             (unsigned long long) XXH3_64bits(both, (size_t) n + 1 + params));
    free(both);
    return 0;
}

/* ---- Places --------------------------------------------------------------- */

static int cache_path(char *path, size_t size, struct mk_err *err)
{
    const char *dir = getenv("MK_CACHE_DIR"), *xdg = getenv("XDG_CACHE_HOME");
    const char *home = getenv("HOME");
    int n;

    if (dir && *dir)
        n = snprintf(path, size, "%s", dir);
    else if (xdg && xdg[0] == '/')
        n = snprintf(path, size, "%s/mk", xdg);
    else if (home && home[0] == '/')
        n = snprintf(path, size, "%s/.cache/mk", home);
    else
        return gen_fail(err, MK_EIO, "none of MK_CACHE_DIR, XDG_CACHE_HOME and HOME names a "
                        "folder");
    if (n >= (int) size)
        return gen_fail(err, MK_EIO, "the cache folder's path is too long");
    return 0;
}

/* Open, and make if need be, the cache folder.  Returns 0 or MK_EIO. */
static int open_cache(struct place *p, struct mk_err *err)
{
    struct stat st;
    int made;

    p->fd = -1;
    p->own = 1;
    p->dir_mode = 0700;
    p->file_mode = 0600;
    if (cache_path(p->path, sizeof p->path, err))
        return MK_EIO;
    made = rt_file_make_folders(p->path, 0700);
    p->fd = open(p->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (p->fd < 0)
        return gen_fail(err, MK_EIO, "the cache folder %s: %s", p->path,
                        strerror(made ? made : errno));
    if (fstat(p->fd, &st))
        gen_fail(err, MK_EIO, "the cache folder %s: %s", p->path, strerror(errno));
    else if (st.st_uid != geteuid())
        gen_fail(err, MK_EIO, "the cache folder %s belongs to user %lu and we are user %lu",
                 p->path, (unsigned long) st.st_uid, (unsigned long) geteuid());
    else if (!rt_file_is_ours(&st))
        gen_fail(err, MK_EIO, "the cache folder %s can be written by others (mode %03o); "
                 "chmod go-w closes it", p->path, (unsigned) st.st_mode & 0777);
    else
        return 0;
    close(p->fd);
    p->fd = -1;
    return MK_EIO;
}

/* Open the pack folder of LEN bytes at PATH.  Returns 0 or errno. */
static int open_pack(struct place *p, const char *path, size_t len)
{
    p->fd = -1;
    p->own = 0;
    p->dir_mode = 0755;
    p->file_mode = 0644;
    if (len == 0 || len >= sizeof p->path)
        return ENOENT;
    memcpy(p->path, path, len);
    p->path[len] = 0;
    p->fd = open(p->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return p->fd < 0 ? errno : 0;
}

static void close_place(struct place *p)
{
    if (p->fd >= 0)
        close(p->fd);
    p->fd = -1;
}

/* ---- Entries -------------------------------------------------------------- */

/* The text of the file "provenance"; the last line guards the others.  NULL: no memory. */
static char *provenance(const struct made *m)
{
    char *body = NULL, *text = NULL;
    int n = asprintf(&body, "%s = %s\nsource_bytes = %zu\nsource_xxh3 = %016llx\n"
                     "cubin_bytes = %zu\ncubin_xxh3 = %016llx\n", m->tool, m->version,
                     m->src_size, (unsigned long long) XXH3_64bits(m->src, m->src_size),
                     m->size, (unsigned long long) XXH3_64bits(m->cubin, m->size));

    if (n < 0)
        return NULL;
    if (asprintf(&text, "%sxxh3 = %016llx\n", body,
                 (unsigned long long) XXH3_64bits(body, (size_t) n)) < 0)
        text = NULL;
    free(body);
    return text;
}

/* Does the file NAME hold the N bytes of WANT (and, unless it may have a TAIL, no more)?
   Returns 0, MK_ENOENT or MK_ENOMEM. */
static int compare_file(int dir, const char *name, int own, const char *want, size_t n, int tail)
{
    size_t size;
    char *data;
    int rc = rt_file_read(dir, name, own, &data, &size);

    if (rc == 0 && (tail ? size < n : size != n))
        rc = MK_ENOENT;
    if (rc == 0 && memcmp(data, want, n))
        rc = MK_ENOENT;
    free(data);
    return rc;
}

/* Read what the entry in folder DIR holds; MK_EFORMAT: it is not what its provenance says. */
static int read_made(int dir, int own, struct made *m)
{
    char *said = NULL, *want = NULL, *cubin = NULL;
    size_t said_size;
    int rc = rt_file_read(dir, "kernel.cu", own, &m->src, &m->src_size);

    if (rc == 0)
        rc = rt_file_read(dir, "kernel.cubin", own, &cubin, &m->size);
    m->cubin = (unsigned char *) cubin;
    if (rc == 0)
        rc = rt_file_read(dir, "provenance", own, &said, &said_size);
    if (rc == 0 && sscanf(said, "%15[a-z] = %95[^\n]", m->tool, m->version) != 2)
        rc = MK_EFORMAT;
    if (rc == 0) {
        want = provenance(m);
        rc = !want ? MK_ENOMEM
             : said_size != strlen(want) || memcmp(said, want, said_size) ? MK_EFORMAT : 0;
    }
    free(said);
    free(want);
    return rc == MK_ENOENT ? MK_EFORMAT : rc;
}

/* Load the entry NAME of P into M if its inputs equal ours byte for byte.  ANY_OPTIONS: but
   for the compiler's options.  Returns 0, MK_ENOENT (a miss, also for a damaged or
   foreign entry), MK_ENOMEM. */
static int load(const struct work *w, const struct place *p, const char *name, int any_options,
                struct made *m)
{
    int dir = openat(p->fd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | (p->own ? O_NOFOLLOW : 0));
    size_t n = strlen(w->text);
    struct stat st;
    int rc = MK_ENOENT;

    memset(m, 0, sizeof *m);
    if (dir < 0)
        return MK_ENOENT;
    if (any_options)
        n = (size_t) (strstr(w->text, "\noptions = ") + 1 - w->text);
    if (fstat(dir, &st) == 0 && (!p->own || rt_file_is_ours(&st)))
        rc = compare_file(dir, "key", p->own, w->text, n, any_options);
    if (rc == 0)
        rc = compare_file(dir, "params.m4", p->own, w->key->params, strlen(w->key->params), 0);
    if (rc == 0)
        rc = read_made(dir, p->own, m);
    if (rc == MK_EFORMAT) {
        warn(w, "%s/%s is damaged and is %s", p->path, name,
             p->own ? "made anew" : "passed over");
        rc = MK_ENOENT;
    }
    close(dir);
    if (rc)
        made_free(m);
    return rc;
}

/* Look for the kernel in the pack P: under our own name, else under the name that it has
   with other compiler options. */
static int load_pack(const struct work *w, const struct place *p, char *name, size_t size,
                     struct made *m)
{
    struct dirent **list = NULL;
    int rc = load(w, p, w->name, 0, m);
    int n;

    snprintf(name, size, "%s", w->name);
    if (rc != MK_ENOENT)
        return rc;
    n = scandir(p->path, &list, NULL, alphasort);
    for (int i = 0; i < n; i++) {
        const char *at = list[i]->d_name;
        if (rc == MK_ENOENT && !strncmp(at, w->name, w->prefix) && strcmp(at, w->name)
            && strlen(at) < size) {
            rc = load(w, p, at, 1, m);
            snprintf(name, size, "%s", at);
        }
        free(list[i]);
    }
    free(list);
    return rc;
}

/* Remove the private folders that killed processes left in P. */
static void remove_stale(const struct place *p)
{
    int fd = openat(p->fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = fd < 0 ? NULL : fdopendir(fd);
    time_t now = time(NULL);
    struct dirent *e;
    struct stat st;

    if (!d) {
        if (fd >= 0)
            close(fd);
        return;
    }
    while ((e = readdir(d)) != NULL)
        if (!strncmp(e->d_name, ".tmp-", 5)
            && fstatat(p->fd, e->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0
            && st.st_uid == geteuid() && now - st.st_mtime > STALE_S)
            rt_file_remove(p->fd, e->d_name);
    closedir(d);
}

/* A name for something private in a place: no other process or thread makes the same. */
static void private_name(char *name, size_t size)
{
    static unsigned counter;
    struct timespec t;

    clock_gettime(CLOCK_REALTIME, &t);
    snprintf(name, size, ".tmp-%ld-%lx%08lx-%u", (long) getpid(), (unsigned long) t.tv_sec,
             (unsigned long) t.tv_nsec, __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED));
}

/* Let the finished folder TMP become NAME.  What stood there is exchanged for it in one step,
   so that a reader finds the old or the new; a file system that cannot exchange has a
   moment with neither, which is a miss.  Returns 0 or errno. */
static int publish(int dir, const char *tmp, const char *name)
{
    char old[128];
    int e;

    if (renameat2(dir, tmp, dir, name, RENAME_EXCHANGE) == 0) {
        rt_file_remove(dir, tmp);
        return 0;
    }
    if (renameat(dir, tmp, dir, name) == 0)
        return 0;
    if (errno != EEXIST && errno != ENOTEMPTY && errno != ENOTDIR)
        return errno;
    snprintf(old, sizeof old, "%.100s-old", tmp);
    if (renameat(dir, name, dir, old))
        return errno;
    if (renameat(dir, tmp, dir, name)) {
        e = errno;
        renameat(dir, old, dir, name);
        return e;
    }
    rt_file_remove(dir, old);
    return 0;
}

/* Write the files of an entry into the folder DIR.  Returns 0 or errno. */
static int write_entry(int dir, const struct work *w, const struct place *p, const struct made *m)
{
    char *said = provenance(m);
    int e = said ? 0 : ENOMEM;

    if (!e)
        e = rt_file_write(dir, "params.m4", p->file_mode, w->key->params, strlen(w->key->params));
    if (!e)
        e = rt_file_write(dir, "key", p->file_mode, w->text, strlen(w->text));
    if (!e)
        e = rt_file_write(dir, "kernel.cu", p->file_mode, m->src, m->src_size);
    if (!e)
        e = rt_file_write(dir, "kernel.cubin", p->file_mode, m->cubin, m->size);
    if (!e)
        e = rt_file_write(dir, "provenance", p->file_mode, said, strlen(said));
    if (!e && (fchmod(dir, p->dir_mode) || fsync(dir)))
        e = errno;
    free(said);
    return e;
}

/* Put M into P as our entry.  Returns 0 or MK_EIO; then P is as it was. */
static int store(const struct work *w, const struct place *p, const struct made *m,
                 struct mk_err *err)
{
    char tmp[96];
    int dir, e;

    remove_stale(p);
    private_name(tmp, sizeof tmp);
    if (mkdirat(p->fd, tmp, 0700))
        return gen_fail(err, MK_EIO, "cannot write to %s: %s", p->path, strerror(errno));
    dir = openat(p->fd, tmp, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    e = dir < 0 ? errno : write_entry(dir, w, p, m);
    if (dir >= 0)
        close(dir);
    if (!e)
        e = publish(p->fd, tmp, w->name);
    if (e) {
        rt_file_remove(p->fd, tmp);
        return gen_fail(err, MK_EIO, "cannot write %s/%s: %s", p->path, w->name, strerror(e));
    }
    fsync(p->fd);
    return 0;
}

/* ---- Making --------------------------------------------------------------- */

/* Tell that we work: a guess that grows with time and never arrives.  One second per 20 kB
   of source and two more is near what NVRTC and g++ take. */
static void tick(const struct work *w, size_t src_size)
{
    struct timespec now;
    double s;

    if (!w->progress)
        return;
    clock_gettime(CLOCK_MONOTONIC, &now);
    s = (double) (now.tv_sec - w->start.tv_sec) + (double) (now.tv_nsec - w->start.tv_nsec) * 1e-9;
    w->progress(w->user, "compile", fmin(0.99, 1 - exp(-s / (2 + (double) src_size / 20000))));
}

struct job {
    pthread_mutex_t lock;
    pthread_cond_t end;
    int done, rc;
    const struct work *w;
    const struct place *p;
    struct made *m;
    struct mk_err err;
};

/* Compile for the emulated device, so that a debugger finds the source in the entry. */
static int compile_host(const struct job *j, struct mk_err *err)
{
    char *folder = j->p->fd >= 0 ? realpath(j->p->path, NULL) : NULL, *path = NULL;
    int rc;

    if (folder && asprintf(&path, "%s/%s/kernel.cu", folder, j->w->name) < 0)
        path = NULL;
    rc = rt_cxx_compile(j->m->src, path ? path : "kernel.cu", j->w->key->options, &j->m->cubin,
                        &j->m->size, err);
    free(path);
    free(folder);
    return rc;
}

static void *compile(void *arg)
{
    struct job *j = arg;
    const struct rt_key *key = j->w->key;
    int rc = key->host ? compile_host(j, &j->err)
                       : rt_nvrtc_compile(j->m->src, "kernel.cu", key->arch, key->options,
                                          &j->m->cubin, &j->m->size, NULL, &j->err);

    pthread_mutex_lock(&j->lock);
    j->rc = rc;
    j->done = 1;
    pthread_cond_signal(&j->end);
    pthread_mutex_unlock(&j->lock);
    return NULL;
}

/* Start the compiler in a thread of its own with every signal blocked: handlers run in the
   caller's threads.  Returns 0 or an error number. */
static int start_thread(struct job *j, pthread_t *thread)
{
    pthread_attr_t attr;
    sigset_t all, before;
    int e = pthread_attr_init(&attr);

    if (e)
        return e;
    pthread_attr_setstacksize(&attr, STACK_BYTES);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    e = pthread_create(thread, &attr, compile, j);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
    return e;
}

/* Compile m->src, and tell the caller's progress function meanwhile. */
static int compile_with_progress(const struct work *w, const struct place *p, struct made *m,
                                 struct mk_err *err)
{
    struct job j = { .lock = PTHREAD_MUTEX_INITIALIZER, .w = w, .p = p, .m = m };
    pthread_condattr_t attr;
    struct timespec t;
    pthread_t thread;

    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&j.end, &attr);
    pthread_condattr_destroy(&attr);
    if (start_thread(&j, &thread)) {
        compile(&j);
    } else {
        pthread_mutex_lock(&j.lock);
        clock_gettime(CLOCK_MONOTONIC, &t);
        while (!j.done) {
            t.tv_nsec += TICK_NS;
            t.tv_sec += t.tv_nsec / 1000000000;
            t.tv_nsec %= 1000000000;
            while (!j.done && pthread_cond_timedwait(&j.end, &j.lock, &t) == 0)
                ;
            pthread_mutex_unlock(&j.lock);
            tick(w, m->src_size);
            pthread_mutex_lock(&j.lock);
        }
        pthread_mutex_unlock(&j.lock);
        pthread_join(thread, NULL);
    }
    pthread_cond_destroy(&j.end);
    if (j.rc && err)
        *err = j.err;
    if (j.rc == 0 && w->progress)
        w->progress(w->user, "compile", 1);
    return j.rc;
}

/* Keep the source that the compiler refused, and say where in front of ERR. */
static void keep_source(const struct work *w, const struct place *p, const struct made *m,
                        struct mk_err *err)
{
    char tmp[96], name[64];

    if (p->fd < 0)
        return;
    private_name(tmp, sizeof tmp);
    snprintf(name, sizeof name, "failed-%s.cu", w->name + w->prefix);
    if (rt_file_write(p->fd, tmp, p->file_mode, m->src, m->src_size)
        || renameat(p->fd, tmp, p->fd, name))
        unlinkat(p->fd, tmp, 0);
    else
        gen_fail_in(err, MK_ECOMPILE, "the source is kept as %s/%s", p->path, name);
}

/* Is there a compiler?  Notes which. */
static int find_tool(const struct work *w, struct made *m, struct mk_err *err)
{
    const char *version;
    int rc;

    if (w->key->host) {
        strcpy(m->tool, "compiler");
        return rt_cxx_version(w->key->options, m->version, sizeof m->version, err);
    }
    rc = rt_nvrtc_open(&version, err);
    if (rc)
        return rc;
    strcpy(m->tool, "nvrtc");
    snprintf(m->version, sizeof m->version, "%s", version);
    return 0;
}

static int make(const struct work *w, const struct place *p, struct made *m, struct mk_err *err)
{
    int rc = find_tool(w, m, err);

    if (rc == 0)
        rc = gen_emit(w->key->params, &m->src, err);
    if (rc == 0 && w->key->host)
        rc = rt_cxx_fault(&m->src, err);
    if (rc)
        return rc;
    m->src_size = strlen(m->src);
    rc = compile_with_progress(w, p, m, err);
    if (rc == MK_ECOMPILE)
        keep_source(w, p, m, err);
    return rc;
}

/* ---- The lock ------------------------------------------------------------- */

/* Wait until we alone may make the entry.  The lock file stays: removing it would let two in.
   Returns the lock, to be closed; -1: cannot be had (a read-only folder, a file system
   without locks, a holder that hangs). */
static int lock(const struct work *w, const struct place *p)
{
    struct timespec pause = { 0, 0 };
    double waited = 0;
    char name[160];
    int fd;

    snprintf(name, sizeof name, ".%s.lock", w->name);
    fd = openat(p->fd, name, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
    while (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB)) {
        if ((errno != EWOULDBLOCK && errno != EINTR) || waited > LOCK_WAIT_S) {
            close(fd);
            return -1;
        }
        if (pause.tv_nsec < TICK_NS)
            pause.tv_nsec += TICK_NS / 100;
        nanosleep(&pause, NULL);
        waited += (double) pause.tv_nsec * 1e-9;
        tick(w, 100000);
    }
    return fd;
}

/* ---- Getting -------------------------------------------------------------- */

/* From a pack of PACKS.  PATH: the entry's. */
static int get_from_packs(const struct work *w, const char *packs, struct made *m, char *path,
                          size_t size)
{
    int rc = MK_ENOENT;

    while (packs && *packs && rc == MK_ENOENT) {
        size_t n = strcspn(packs, ":");
        char name[256];
        struct place p;

        if (open_pack(&p, packs, n) == 0) {
            rc = load_pack(w, &p, name, sizeof name, m);
            snprintf(path, size, "%s/%s", p.path, name);
            close_place(&p);
        }
        packs += n + (packs[n] == ':');
    }
    return rc;
}

/* Make the kernel and put it into the cache P (or nowhere: p->fd -1). */
static int make_and_store(const struct work *w, const struct place *p, struct made *m, int *stored,
                          struct mk_err *err)
{
    struct mk_err why;
    int rc = make(w, p, m, err);

    *stored = 0;
    if (rc || p->fd < 0)
        return rc;
    if (store(w, p, m, &why))
        warn(w, "the kernel is not cached: %s", why.text);
    else
        *stored = 1;
    return 0;
}

/* Look into the cache P; if the entry is not there, get its lock and look again: another
   process may have made it while we waited.  *FD: the lock, or -1.  Only the second look
   warns of damage. */
static int look_twice(const struct work *w, const struct place *p, struct made *m, int *fd)
{
    struct work quiet = *w;
    int rc;

    quiet.warn = NULL;
    rc = load(&quiet, p, w->name, 0, m);
    if (rc != MK_ENOENT)
        return rc;
    *fd = lock(w, p);
    return load(w, p, w->name, 0, m);
}

/* From the cache, else from the compiler.  PATH: the entry's, "" when there is none. */
static int get_or_make(const struct work *w, struct made *m, int *from, char *path, size_t size,
                       struct mk_err *err)
{
    struct place p;
    struct mk_err why;
    int rc = MK_ENOENT, stored = 1, fd = -1;

    *from = RT_FROM_CACHE;
    if (open_cache(&p, &why))
        warn(w, "the kernel is not cached: %s", why.text);
    else
        rc = look_twice(w, &p, m, &fd);
    if (rc == MK_ENOENT) {
        *from = RT_FROM_COMPILER;
        rc = make_and_store(w, &p, m, &stored, err);
    } else if (rc) {
        gen_fail(err, rc, "no memory for the kernel in %s/%s", p.path, w->name);
    }
    if (fd >= 0)
        close(fd);
    if (stored)
        snprintf(path, size, "%s/%s", p.path, w->name);
    close_place(&p);
    return rc;
}

int rt_kernel_get(const struct rt_key *key, const char *packs, mk_progress_fn *progress,
                  mk_warn_fn *warn_fn, void *user, struct rt_kernel **out, struct mk_err *err)
{
    struct rt_kernel *k = NULL;
    struct made m = { 0 };
    struct work w;
    int rc;

    *out = NULL;
    rc = work_start(&w, key, err);
    if (rc)
        goto done;
    w.progress = progress;
    w.warn = warn_fn;
    w.user = user;
    k = calloc(1, sizeof *k);
    if (!k) {
        rc = gen_fail(err, MK_ENOMEM, "no memory for a kernel");
        goto done;
    }
    k->from = RT_FROM_PACK;
    rc = get_from_packs(&w, packs, &m, k->path, sizeof k->path);
    if (rc == MK_ENOENT) {
        k->path[0] = 0;
        rc = get_or_make(&w, &m, &k->from, k->path, sizeof k->path, err);
        if (rc == MK_ETOOL && packs && *packs)
            gen_fail_in(err, rc, "no pack in %.1000s has this kernel (%s; another model, GPU, "
                        "context or plan is another kernel), and it cannot be made", packs, w.name);
    } else if (rc) {
        gen_fail(err, rc, "no memory for the kernel in %s", k->path);
    }
done:
    if (rc) {
        free(k);
    } else {
        k->cubin = m.cubin;
        k->size = m.size;
        m.cubin = NULL;
        *out = k;
    }
    made_free(&m);
    free(w.text);
    return rc;
}

void rt_kernel_free(struct rt_kernel *k)
{
    if (k)
        free(k->cubin);
    free(k);
}

int rt_pack_write(const struct rt_key *key, const char *dir, mk_progress_fn *progress, void *user,
                  struct mk_err *err)
{
    struct place p = { .fd = -1 };
    struct made m = { 0 }, there;
    char path[sizeof ((struct rt_kernel *) 0)->path];
    struct work w;
    int from, e, is_new;
    int rc = work_start(&w, key, err);

    if (rc)
        goto done;
    w.progress = progress;
    w.user = user;
    if (strlen(dir) >= sizeof p.path) {
        rc = gen_fail(err, MK_EIO, "the pack folder's path is too long");
        goto done;
    }
    rc = get_or_make(&w, &m, &from, path, sizeof path, err);
    if (rc)
        goto done;
    is_new = access(dir, F_OK) != 0;
    e = rt_file_make_folders(dir, 0755);
    if (!e)
        e = open_pack(&p, dir, strlen(dir));
    if (!e && is_new && fchmod(p.fd, p.dir_mode))       /* whatever the umask */
        e = errno;
    if (e) {
        rc = gen_fail(err, MK_EIO, "the pack folder %s: %s", dir, strerror(e));
        goto done;
    }
    if (load(&w, &p, w.name, 0, &there))
        rc = store(&w, &p, &m, err);
    else
        made_free(&there);
done:
    close_place(&p);
    made_free(&m);
    free(w.text);
    return rc;
}
