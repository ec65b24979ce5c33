/* t-cache.c - runtime/cache.c with a generator and a compiler that count their calls: cold
   starts, torn, damaged and foreign entries, read-only and full disks, kills, packs.

   This program defines gen_emit, rt_nvrtc_* and the system calls through which the
   cache writes; the linker takes these instead of the library's. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "gen/gen.h"
#include "runtime/cache.h"
#include "runtime/cxx.h"
#include "runtime/nvrtc.h"
#include "tests/check.h"

#define NOBODY 65534

/* ---- What stands behind the cache here ------------------------------------ */

/* Shared by all processes of the test. */
static struct shared {
    int emits, compiles;
    int compile_ms;         /* how long a compilation takes */
    int no_nvrtc;           /* rt_nvrtc_open fails */
    int bad_source;         /* rt_nvrtc_compile refuses */
} *shared;

int gen_emit(const char *params, char **src, struct mk_err *err)
{
    (void) err;
    __atomic_fetch_add(&shared->emits, 1, __ATOMIC_SEQ_CST);
    return asprintf(src, "// kernel for\n%s", params) < 0 ? MK_ENOMEM : 0;
}

int rt_nvrtc_open(const char **version, struct mk_err *err)
{
    if (version)
        *version = "13.0";
    return shared->no_nvrtc ? gen_fail(err, MK_ETOOL, "no NVRTC here") : 0;
}

int rt_nvrtc_compile(const char *src, const char *name, int arch, const char *options,
                     unsigned char **cubin, size_t *size, char **log, struct mk_err *err)
{
    char *text;

    (void) log;
    __atomic_fetch_add(&shared->compiles, 1, __ATOMIC_SEQ_CST);
    usleep((useconds_t) shared->compile_ms * 1000);
    if (shared->bad_source)
        return gen_fail(err, MK_ECOMPILE, "%s: NVRTC 13.0: NVRTC_ERROR_COMPILATION\n"
                        "%s(1): error: this is bad", name, name);
    *size = (size_t) asprintf(&text, "cubin sm_%d %s\n%s", arch, options, src);
    *cubin = (unsigned char *) text;
    return 0;
}

/* The n-th of the calls below that change a file system fails with no_space; 0: none.
   Fsync does nothing here but count: the test's disk is not what is tested. */
static int fail_at, calls, no_exchange;

static int fails(void)
{
    if (++calls != fail_at)
        return 0;
    errno = ENOSPC;
    return 1;
}

ssize_t write(int fd, const void *data, size_t size)
{
    if (fails())
        return -1;
    return syscall(SYS_write, fd, data, size > 100 ? size / 2 : size);
}

int fsync(int fd)
{
    (void) fd;
    return fails() ? -1 : 0;
}

int mkdirat(int dir, const char *name, mode_t mode)
{
    return fails() ? -1 : (int) syscall(SYS_mkdirat, dir, name, mode);
}

int fchmod(int fd, mode_t mode)
{
    return fails() ? -1 : (int) syscall(SYS_fchmod, fd, mode);
}

int renameat(int from_dir, const char *from, int to_dir, const char *to)
{
    return fails() ? -1 : (int) syscall(SYS_renameat2, from_dir, from, to_dir, to, 0);
}

int renameat2(int from_dir, const char *from, int to_dir, const char *to, unsigned flags)
{
    if (no_exchange) {
        errno = EINVAL;
        return -1;
    }
    return fails() ? -1 : (int) syscall(SYS_renameat2, from_dir, from, to_dir, to, flags);
}

/* ---- Helpers -------------------------------------------------------------- */

static char base[64];           /* the scratch folder */
static char cache[128];         /* MK_CACHE_DIR */
static struct mk_err err;
static char warning[8192];
static int warnings;

static const char *const files[] = {
    "params.m4", "key", "kernel.cu", "kernel.cubin", "provenance"
};
#define N_FILES (int) (sizeof files / sizeof *files)

static const struct rt_key plain = {
    .name = "toy-1b", .arch = 90, .params = "m4_define({|MODEL_D|}, 64)\n",
    .templates = "0123456789abcdef", .version = "0.1.0", .options = "--gpu-architecture=sm_90a -O"
};

static void on_warning(void *user, const char *text)
{
    (void) user;
    warnings++;
    snprintf(warning, sizeof warning, "%s", text);
}

static void remove_all(const char *path)
{
    DIR *d = opendir(path);
    struct dirent *e;
    char sub[4096];

    if (d) {
        while ((e = readdir(d)) != NULL)
            if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) {
                snprintf(sub, sizeof sub, "%s/%s", path, e->d_name);
                struct stat st;
                if (lstat(sub, &st) == 0 && S_ISDIR(st.st_mode))
                    remove_all(sub);
                else
                    unlink(sub);
            }
        closedir(d);
    }
    rmdir(path);
}

/* A new, absent cache folder; all counts 0. */
static void fresh(void)
{
    static int n;

    remove_all(cache);
    snprintf(cache, sizeof cache, "%s/cache-%d-%d", base, (int) getpid(), n++);
    setenv("MK_CACHE_DIR", cache, 1);
    memset(shared, 0, sizeof *shared);
    warnings = fail_at = calls = no_exchange = 0;
    warning[0] = 0;
}

/* Is K what the compiler makes of KEY? */
static int is_right(const struct rt_kernel *k, const struct rt_key *key)
{
    char *want;
    int n = asprintf(&want, "cubin sm_%d %s\n// kernel for\n%s", key->arch, key->options,
                     key->params);
    int same = k && k->size == (size_t) n && !memcmp(k->cubin, want, k->size);

    free(want);
    return same;
}

/* Get KEY, check the result, and return where it came from. */
static int get_key(const struct rt_key *key, const char *packs, char *path)
{
    struct rt_kernel *k;
    int rc = rt_kernel_get(key, packs, NULL, on_warning, NULL, &k, &err);
    int from = rc ? rc : k->from;

    CHECKF(rc == 0, "%s", err.text);
    CHECK(rc || is_right(k, key));
    if (path)
        snprintf(path, 4096, "%s", rc ? "" : k->path);
    rt_kernel_free(k);
    return from;
}

static int get(void)
{
    return get_key(&plain, NULL, NULL);
}

/* Names in folder DIR that start with START, but for lock files. */
static int count_in(const char *dir, const char *start)
{
    DIR *d = opendir(dir);
    struct dirent *e;
    int n = 0;

    while (d && (e = readdir(d)) != NULL)
        n += !strncmp(e->d_name, start, strlen(start)) && strcmp(e->d_name, ".")
             && strcmp(e->d_name, "..") && !strstr(e->d_name, ".lock");
    if (d)
        closedir(d);
    return n;
}

static void put_file(const char *path, const void *data, size_t n)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);

    CHECK(fd >= 0 && (n == 0 || syscall(SYS_write, fd, data, n) == (long) n));
    close(fd);
}

static size_t get_file(const char *path, char *data, size_t cap)
{
    int fd = open(path, O_RDONLY);
    ssize_t n = fd < 0 ? 0 : read(fd, data, cap);

    if (fd >= 0)
        close(fd);
    return n < 0 ? 0 : (size_t) n;
}

/* Run FN in a child, as nobody when we are root: root is not stopped by permissions. */
static void as_nobody(void (*fn)(void))
{
    int status = 0;
    pid_t pid;

    fflush(NULL);
    pid = fork();
    if (pid == 0) {
        if (geteuid() == 0 && (setgid(NOBODY) || setuid(NOBODY))) {
            printf("cannot become user %d: a case is left out\n", NOBODY);
            fflush(stdout);
            _exit(0);
        }
        check_failed = 0;
        fn();
        fflush(NULL);
        _exit(check_failed != 0);
    }
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECKF(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a child failed");
}

/* ---- Hits and misses ------------------------------------------------------ */

static void test_hit(void)
{
    struct rt_key other = plain;
    char path[4096], again[4096], text[4096];
    struct stat st;

    fresh();
    CHECK(get_key(&plain, NULL, path) == RT_FROM_COMPILER);
    CHECK(shared->emits == 1 && shared->compiles == 1 && warnings == 0);
    CHECK(stat(cache, &st) == 0 && (st.st_mode & 0777) == 0700);
    CHECK(stat(path, &st) == 0 && (st.st_mode & 0777) == 0700);
    CHECK(!strncmp(path, cache, strlen(cache)) && strstr(path, "/toy-1b-sm_90-"));
    shared->no_nvrtc = 1;
    CHECK(get_key(&plain, NULL, again) == RT_FROM_CACHE);
    CHECK_STR(again, path);
    CHECK(shared->emits == 1 && shared->compiles == 1);
    CHECK(count_in(cache, "") == 1);            /* no private folders are left */
    for (int i = 0; i < N_FILES; i++) {
        snprintf(text, sizeof text, "%.3000s/%s", path, files[i]);
        CHECK(stat(text, &st) == 0 && (st.st_mode & 0777) == 0600);
    }
    shared->no_nvrtc = 0;
    for (int i = 0; i < 5; i++) {
        other = plain;
        if (i == 0) other.arch = 80;
        if (i == 1) other.params = "m4_define({|MODEL_D|}, 65)\n";
        if (i == 2) other.templates = "fedcba9876543210";
        if (i == 3) other.version = "0.1.1";
        if (i == 4) other.options = "-G";
        CHECK(get_key(&other, NULL, again) == RT_FROM_COMPILER);
        CHECK(strcmp(again, path));
        CHECK(get_key(&other, NULL, NULL) == RT_FROM_CACHE);
    }
}

static void test_bad_keys(void)
{
    static const char *const names[] = { "", ".x", "../x", "a/b", "a b", "a\n", "a'", "$(x)" };
    struct rt_kernel *k = (struct rt_kernel *) &err;
    struct rt_key key;

    fresh();
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        key = plain;
        key.name = names[i];
        CHECK(rt_kernel_get(&key, NULL, NULL, NULL, NULL, &k, &err) == MK_EINVAL && !k);
    }
    CHECK_STR(err.text, "a kernel's key has a malformed name, architecture, digest, "
              "version or options");
    key = plain;
    key.options = "-O\nname = x";
    CHECK(rt_kernel_get(&key, NULL, NULL, NULL, NULL, &k, NULL) == MK_EINVAL);
    CHECK(rt_pack_write(&key, cache, NULL, NULL, &err) == MK_EINVAL);
    CHECK(access(cache, F_OK) != 0 && shared->emits == 0);
}

static double fractions[1000];
static int n_fractions;

static void on_progress(void *user, const char *what, double fraction)
{
    CHECK(user == fractions && !strcmp(what, "compile"));
    if (n_fractions < 1000)
        fractions[n_fractions++] = fraction;
}

static void test_progress(void)
{
    struct rt_kernel *k;

    fresh();
    shared->compile_ms = 450;
    n_fractions = 0;
    CHECK(rt_kernel_get(&plain, NULL, on_progress, NULL, fractions, &k, &err) == 0);
    rt_kernel_free(k);
    CHECKF(n_fractions >= 4 && n_fractions <= 8, "%d calls", n_fractions);
    for (int i = 1; i < n_fractions; i++)
        CHECK(fractions[i] >= fractions[i - 1]);
    for (int i = 0; i + 1 < n_fractions; i++)
        CHECK(fractions[i] > 0 && fractions[i] <= 0.99);
    CHECK(n_fractions && fractions[n_fractions - 1] == 1);
    n_fractions = 0;
    CHECK(rt_kernel_get(&plain, NULL, on_progress, NULL, fractions, &k, &err) == 0);
    rt_kernel_free(k);
    CHECK(n_fractions == 0);
}

static void test_compile_errors(void)
{
    struct rt_kernel *k = (struct rt_kernel *) &err;
    char want[1024], path[512], text[256];
    const char *hash;

    fresh();
    shared->bad_source = 1;
    CHECK(rt_kernel_get(&plain, NULL, NULL, on_warning, NULL, &k, &err) == MK_ECOMPILE && !k);
    hash = strstr(err.text, "failed-");
    CHECK(hash != NULL);
    snprintf(path, sizeof path, "%s/failed-%.16s.cu", cache, hash ? hash + 7 : "");
    snprintf(want, sizeof want, "the source is kept as %s: kernel.cu: NVRTC 13.0: "
             "NVRTC_ERROR_COMPILATION\nkernel.cu(1): error: this is bad", path);
    CHECK_STR(err.text, want);
    text[get_file(path, text, sizeof text - 1)] = 0;
    snprintf(want, sizeof want, "// kernel for\n%s", plain.params);
    CHECK_STR(text, want);
    CHECK(count_in(cache, "") == 1 && warnings == 0);
    CHECK(rt_kernel_get(&plain, NULL, NULL, on_warning, NULL, &k, NULL) == MK_ECOMPILE && !k);
    shared->bad_source = 0;
    CHECK(get() == RT_FROM_COMPILER);

    fresh();
    shared->no_nvrtc = 1;
    CHECK(rt_kernel_get(&plain, NULL, NULL, on_warning, NULL, &k, &err) == MK_ETOOL && !k);
    CHECK_STR(err.text, "no NVRTC here");
    CHECK(shared->emits == 0 && count_in(cache, "") == 0);
}

/* ---- Damage --------------------------------------------------------------- */

/* After DAMAGE was done to the entry: compiled once more, and then found again. */
static void check_remade(const char *what, int i, long at)
{
    int first = get(), second = get();

    CHECKF(first == RT_FROM_COMPILER && second == RT_FROM_CACHE,
           "%s of %s at %ld: from %d, then %d", what, files[i], at, first, second);
}

static void test_damage(int exchange)
{
    char path[4096], file[4200], data[4096];
    size_t n;

    fresh();
    no_exchange = !exchange;
    CHECK(get_key(&plain, NULL, path) == RT_FROM_COMPILER);
    for (int i = 0; i < N_FILES; i++) {
        snprintf(file, sizeof file, "%s/%s", path, files[i]);
        n = get_file(file, data, sizeof data - 1);
        CHECK(n > 0);
        for (size_t at = 0; at < n; at += 1 + n / 40) {
            put_file(file, data, at);
            check_remade("truncation", i, (long) at);
            data[at] ^= 1;
            put_file(file, data, n);
            check_remade("change", i, (long) at);
            data[at] ^= 1;
        }
        put_file(file, data, n - 1);
        check_remade("truncation", i, (long) n - 1);
        data[n] = '\n';
        put_file(file, data, n + 1);
        check_remade("extension", i, (long) n);
        unlink(file);
        check_remade("removal", i, 0);
        unlink(file);
        CHECK(mkfifo(file, 0600) == 0);
        check_remade("a pipe in place", i, 0);
        unlink(file);
        CHECK(symlink("/etc/passwd", file) == 0);
        check_remade("a link in place", i, 0);
    }
    CHECK(count_in(cache, "") == 1);
    put_file(file, "nvrtc = ", 8);
    warnings = 0;
    CHECK(get() == RT_FROM_COMPILER && warnings >= 1);
    snprintf(data, sizeof data, "%.3000s is damaged and is made anew", path);
    CHECK_STR(warning, data);
}

/* Something that is not our entry stands under its name. */
static void test_foreign(void)
{
    struct rt_key other = plain;
    char path[4096], other_path[4096], file[4200];
    struct stat st;

    fresh();
    other.params = "something else\n";
    CHECK(get_key(&other, NULL, other_path) == RT_FROM_COMPILER);
    CHECK(get_key(&plain, NULL, path) == RT_FROM_COMPILER);
    remove_all(path);
    CHECK(rename(other_path, path) == 0);
    check_remade("another entry instead", 1, 0);

    remove_all(path);
    put_file(path, "x", 1);
    check_remade("a file instead", 1, 0);

    CHECK(get_key(&other, NULL, other_path) == RT_FROM_COMPILER);
    remove_all(path);
    CHECK(symlink(other_path, path) == 0);
    check_remade("a link instead", 1, 0);
    CHECK(lstat(path, &st) == 0 && S_ISDIR(st.st_mode));
    CHECK(get_key(&other, NULL, NULL) == RT_FROM_CACHE);

    snprintf(file, sizeof file, "%s/kernel.cubin", path);
    CHECK(chmod(file, 0666) == 0);
    check_remade("a file that others can write", 3, 0);
    if (geteuid() == 0) {
        CHECK(chown(file, NOBODY, NOBODY) == 0);
        check_remade("a file of another user", 3, 0);
    }
    CHECK(chmod(path, 0777) == 0);
    check_remade("a folder that others can write", 3, 0);
}

/* ---- Many at once, and killed --------------------------------------------- */

static void test_cold_processes(void)
{
    int from[3] = { 0, 0, 0 };
    pid_t pid[8];

    fresh();
    shared->compile_ms = 300;
    fflush(NULL);
    for (int i = 0; i < 8; i++) {
        pid[i] = fork();
        if (pid[i] == 0) {
            check_failed = 0;
            int f = get();
            _exit(check_failed ? 99 : f);
        }
    }
    for (int i = 0; i < 8; i++) {
        int status = 0;
        waitpid(pid[i], &status, 0);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) < 3);
        from[WEXITSTATUS(status) % 3]++;
    }
    CHECKF(from[RT_FROM_COMPILER] == 1 && from[RT_FROM_CACHE] == 7, "%d compiled, %d found",
           from[RT_FROM_COMPILER], from[RT_FROM_CACHE]);
    CHECK(shared->compiles == 1 && shared->emits == 1);
    CHECK(count_in(cache, "") == 1);
}

static void *get_in_thread(void *arg)
{
    struct rt_kernel *k;

    if (rt_kernel_get(&plain, NULL, NULL, NULL, NULL, &k, NULL) || !is_right(k, &plain))
        return arg;
    rt_kernel_free(k);
    return NULL;
}

static void test_cold_threads(void)
{
    pthread_t t[4];
    void *bad;

    fresh();
    shared->compile_ms = 200;
    for (int i = 0; i < 4; i++)
        CHECK(pthread_create(&t[i], NULL, get_in_thread, &err) == 0);
    for (int i = 0; i < 4; i++)
        CHECK(pthread_join(t[i], &bad) == 0 && !bad);
    CHECK(shared->compiles == 1);
}

/* The holder of the lock is killed while it compiles: the next one does not wait. */
static void test_killed_compiler(void)
{
    time_t start;
    pid_t pid;

    fresh();
    shared->compile_ms = 10000;
    fflush(NULL);
    pid = fork();
    if (pid == 0)
        _exit(get());
    for (int i = 0; i < 500 && !__atomic_load_n(&shared->compiles, __ATOMIC_SEQ_CST); i++)
        usleep(10000);
    CHECK(shared->compiles == 1);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    shared->compile_ms = 0;
    start = time(NULL);
    CHECK(get() == RT_FROM_COMPILER);
    CHECK(time(NULL) - start < 5 && get() == RT_FROM_CACHE);
    CHECK(count_in(cache, "") == 1);
}

/* Store again and again: spoil the entry, then ask for it. */
static void store_for_ever(const char *path)
{
    char file[4200];

    snprintf(file, sizeof file, "%s/kernel.cubin", path);
    alarm(60);              /* should the test itself be killed */
    for (;;) {
        int fd = open(file, O_WRONLY | O_TRUNC);
        if (fd >= 0)
            close(fd);
        check_failed = 0;
        get();
        if (check_failed)
            _exit(1);
    }
}

static void age_leftovers(void)
{
    struct timespec old[2] = { { time(NULL) - 7200, 0 }, { time(NULL) - 7200, 0 } };
    DIR *d = opendir(cache);
    struct dirent *e;

    while (d && (e = readdir(d)) != NULL)
        if (!strncmp(e->d_name, ".tmp-", 5))
            CHECK(utimensat(dirfd(d), e->d_name, old, 0) == 0);
    if (d)
        closedir(d);
}

static void test_killed_store(void)
{
    char path[4096], tmp[4200];
    unsigned seed = 12345;
    int left = 0;

    fresh();
    CHECK(get_key(&plain, NULL, path) == RT_FROM_COMPILER);
    fflush(NULL);
    for (int i = 0; i < 150; i++) {
        int status = 0;
        pid_t pid = fork();
        if (pid == 0)
            store_for_ever(path);
        usleep((useconds_t) (rand_r(&seed) % 8000));
        if (i % 50 == 0)
            get();          /* checks that what it gets is right, while the other stores */
        kill(pid, SIGKILL);
        waitpid(pid, &status, 0);
        CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        get();
        CHECK(get() == RT_FROM_CACHE);
    }
    left = count_in(cache, ".tmp-");
    printf("150 kills left %d private folders\n", left);
    age_leftovers();
    snprintf(tmp, sizeof tmp, "%s/.tmp-young", cache);
    CHECK(mkdir(tmp, 0700) == 0);
    snprintf(tmp, sizeof tmp, "%s/.tmp-old", cache);
    CHECK(mkdir(tmp, 0700) == 0);
    snprintf(tmp, sizeof tmp, "%s/.tmp-old/kernel.cu", cache);
    put_file(tmp, "x", 1);
    age_leftovers();
    snprintf(tmp, sizeof tmp, "%s/.tmp-young", cache);
    CHECK(utimensat(AT_FDCWD, tmp, NULL, 0) == 0);
    remove_all(path);
    CHECK(get() == RT_FROM_COMPILER);
    CHECK(count_in(cache, ".tmp-") == 1 && access(tmp, F_OK) == 0);
}

/* ---- Disks ---------------------------------------------------------------- */

/* Fail the n-th write for every n; SPOILED: an entry that must be replaced is there. */
static void test_full_disk(int spoiled, int exchange)
{
    char path[4096], file[4200];
    int n, failed = 0;

    for (n = 1; n < 1000; n++) {
        fresh();
        no_exchange = !exchange;
        if (spoiled) {
            CHECK(get_key(&plain, NULL, path) == RT_FROM_COMPILER);
            snprintf(file, sizeof file, "%s/kernel.cu", path);
            put_file(file, "x", 1);
        }
        calls = 0;
        fail_at = n;
        warnings = 0;
        CHECK(get_key(&plain, NULL, path) == RT_FROM_COMPILER);
        fail_at = 0;
        if (calls < n)
            break;
        if (!path[0]) {
            failed++;
            CHECKF(strstr(warning, "the kernel is not cached: cannot write ") &&
                   strstr(warning, ": No space left on device"), "%s", warning);
            CHECK(warnings == 1 + spoiled);
            CHECKF(count_in(cache, "") == spoiled, "after failure %d: %d names", n,
                   count_in(cache, ""));
            CHECK(get() == RT_FROM_COMPILER);
        }
        CHECK(get() == RT_FROM_CACHE);
        CHECK(count_in(cache, "") == 1);
    }
    CHECKF(n > 15 && n < 1000 && failed > 10, "%d points, %d failures", n, failed);
}

/* As nobody, in a cache folder that nobody owns. */
static void read_only_cache(void)
{
    struct rt_key other = plain;
    char want[512];

    other.params = "new\n";
    CHECK(get() == RT_FROM_COMPILER);
    CHECK(chmod(cache, 0500) == 0);
    warnings = 0;
    CHECK(get() == RT_FROM_CACHE && warnings == 0);
    CHECK(get_key(&other, NULL, NULL) == RT_FROM_COMPILER && warnings == 1);
    snprintf(want, sizeof want, "the kernel is not cached: cannot write to %s: Permission denied",
             cache);
    CHECK_STR(warning, want);
    CHECK(count_in(cache, "") == 1);
    CHECK(chmod(cache, 0700) == 0);
}

static void unwritable_home(void)
{
    char want[512];

    unsetenv("MK_CACHE_DIR");
    unsetenv("XDG_CACHE_HOME");
    setenv("HOME", base, 1);
    CHECK(get() == RT_FROM_COMPILER && warnings == 1);
    snprintf(want, sizeof want, "the kernel is not cached: the cache folder %s/.cache/mk: "
             "Permission denied", base);
    CHECK_STR(warning, want);
}

static void unwritable_pack(void)
{
    char dir[256], want[512];

    snprintf(dir, sizeof dir, "%s/no-pack", base);
    CHECK(rt_pack_write(&plain, dir, NULL, NULL, &err) == MK_EIO);
    snprintf(want, sizeof want, "the pack folder %s: Permission denied", dir);
    CHECK_STR(err.text, want);
}

/* Something of ours that nobody may go through but not write to. */
static void test_permissions(void)
{
    fresh();
    CHECK(mkdir(cache, 0700) == 0);
    if (geteuid() == 0)
        CHECK(chown(cache, NOBODY, NOBODY) == 0);
    as_nobody(read_only_cache);
    CHECK(chmod(base, 0511) == 0);
    fresh();
    as_nobody(unwritable_home);
    setenv("MK_CACHE_DIR", "", 1);
    as_nobody(unwritable_pack);
    CHECK(chmod(base, 0711) == 0);
}

static void test_home(void)
{
    char home[256], want[512], path[4096];
    char *old = strdup(getenv("HOME") ? getenv("HOME") : "");

    fresh();
    unsetenv("MK_CACHE_DIR");
    unsetenv("XDG_CACHE_HOME");
    unsetenv("HOME");
    CHECK(get() == RT_FROM_COMPILER && warnings == 1);
    CHECK_STR(warning, "the kernel is not cached: none of MK_CACHE_DIR, XDG_CACHE_HOME and HOME "
              "names a folder");
    snprintf(home, sizeof home, "%s/file", base);
    put_file(home, "x", 1);
    setenv("HOME", home, 1);
    CHECK(get() == RT_FROM_COMPILER && warnings == 2);
    snprintf(want, sizeof want, "the kernel is not cached: the cache folder %s/.cache/mk: "
             "Not a directory", home);
    CHECK_STR(warning, want);
    unlink(home);

    snprintf(home, sizeof home, "%s/home", base);
    setenv("HOME", home, 1);
    CHECK(get_key(&plain, NULL, path) == RT_FROM_COMPILER && warnings == 2);
    snprintf(want, sizeof want, "%s/.cache/mk/toy-1b-sm_90-", home);
    CHECK(!strncmp(path, want, strlen(want)));
    snprintf(want, sizeof want, "%s/xdg", home);
    setenv("XDG_CACHE_HOME", want, 1);
    CHECK(get_key(&plain, NULL, path) == RT_FROM_COMPILER);
    strcat(want, "/mk/toy-1b-sm_90-");
    CHECK(!strncmp(path, want, strlen(want)));
    unsetenv("XDG_CACHE_HOME");
    remove_all(home);
    setenv("HOME", old, 1);
    free(old);
}

static void test_owner(void)
{
    char want[512];

    fresh();
    CHECK(mkdir(cache, 0700) == 0 && chmod(cache, 0777) == 0);
    CHECK(get() == RT_FROM_COMPILER && warnings == 1);
    snprintf(want, sizeof want, "the kernel is not cached: the cache folder %s can be written by "
             "others (mode 777); chmod go-w closes it", cache);
    CHECK_STR(warning, want);
    CHECK(count_in(cache, "") == 0);
    if (geteuid() == 0) {
        CHECK(chmod(cache, 0700) == 0 && chown(cache, NOBODY, NOBODY) == 0);
        CHECK(get() == RT_FROM_COMPILER && warnings == 2);
        snprintf(want, sizeof want, "the kernel is not cached: the cache folder %s belongs to "
                 "user %d and we are user 0", cache, NOBODY);
        CHECK_STR(warning, want);
        CHECK(count_in(cache, "") == 0);
    } else {
        printf("not root: a cache folder of another user is left out\n");
    }
}

/* ---- Packs ---------------------------------------------------------------- */

static void test_packs(void)
{
    struct rt_key other = plain;
    char pack[256], both[512], path[4096], want[4200];
    struct stat st;

    fresh();
    snprintf(pack, sizeof pack, "%s/packs/one", base);
    snprintf(both, sizeof both, "%s/none::%s", base, pack);
    umask(077);
    CHECK(rt_pack_write(&plain, pack, NULL, NULL, &err) == 0);
    umask(022);
    CHECK(rt_pack_write(&plain, pack, NULL, NULL, &err) == 0);
    CHECK(shared->compiles == 1 && count_in(pack, "") == 1);
    CHECK(stat(pack, &st) == 0 && (st.st_mode & 0777) == 0755);
    shared->no_nvrtc = 1;
    CHECK(get() == RT_FROM_CACHE);
    CHECK(get_key(&plain, both, path) == RT_FROM_PACK);     /* first, though the cache has it */
    CHECK(!strncmp(path, pack, strlen(pack)));
    CHECK(stat(path, &st) == 0 && (st.st_mode & 0777) == 0755);
    for (int i = 0; i < N_FILES; i++) {
        snprintf(want, sizeof want, "%s/%s", path, files[i]);
        CHECK(stat(want, &st) == 0 && (st.st_mode & 0777) == 0644);
    }

    fresh();                                                /* and without any cache */
    shared->no_nvrtc = 1;
    CHECK(chmod(pack, 0555) == 0);
    setenv("MK_CACHE_DIR", "/dev/null/x", 1);
    CHECK(get_key(&plain, pack, NULL) == RT_FROM_PACK && warnings == 0);
    setenv("MK_CACHE_DIR", cache, 1);
    other.options = "-G";
    struct rt_kernel *k = NULL;
    CHECK(rt_kernel_get(&other, pack, NULL, NULL, NULL, &k, &err) == 0);
    CHECK(k && k->from == RT_FROM_PACK && is_right(k, &plain));
    rt_kernel_free(k);
    other = plain;
    other.params = "new\n";
    CHECK(rt_kernel_get(&other, pack, NULL, NULL, NULL, &k, &err) == MK_ETOOL && !k);
    snprintf(want, sizeof want, "no pack in %s has this kernel (", pack);
    CHECKF(!strncmp(err.text, want, strlen(want)), "%s", err.text);
    CHECK(shared->compiles == 0 && count_in(pack, "") == 1);
    CHECK(chmod(pack, 0755) == 0);

    snprintf(want, sizeof want, "%s/kernel.cubin", path);
    CHECK(truncate(want, 5) == 0);
    shared->no_nvrtc = 0;
    warnings = 0;
    CHECK(get_key(&plain, pack, NULL) == RT_FROM_COMPILER && warnings == 1);
    snprintf(want, sizeof want, "%s is damaged and is passed over", path);
    CHECK_STR(warning, want);
    CHECK(rt_pack_write(&plain, pack, NULL, NULL, &err) == 0 && shared->compiles == 1);
    CHECK(get_key(&plain, pack, NULL) == RT_FROM_PACK);
    snprintf(want, sizeof want, "the pack folder %s/key: Not a directory", path);
    strcat(path, "/key");
    CHECK(rt_pack_write(&plain, path, NULL, NULL, &err) == MK_EIO);
    CHECK_STR(err.text, want);
}

/* ---- Kernels of the emulated device ---------------------------------------- */

static char script[256];        /* stands for the C++ compiler; writes its arguments to "args" */

static void write_script(int bad)
{
    char text[1024];
    int n = snprintf(text, sizeof text, "#!/bin/sh\n"
                     "case $* in *--version) echo 'fake c++ 1.0'; echo more; exit 0;; esac\n"
                     "echo \"$*\" >>%s/args\n"
                     "%secho object >kernel.so && cat kernel.cu >>kernel.so\n", base,
                     bad ? "echo 'kernel.cu:2: error: this is bad'; exit 3\n" : "");

    snprintf(script, sizeof script, "%s/cxx", base);
    put_file(script, text, (size_t) n);
    CHECK(chmod(script, 0755) == 0);
    setenv("MK_HOST_CXX", script, 1);
}

static struct rt_key host_key(void)
{
    struct rt_key key = plain;

    key.host = 1;
    key.options = rt_cxx_options();
    CHECK(key.options != NULL);
    return key;
}

/* Get KEY; WANT: what the source of its object is.  Returns where it came from. */
static int get_host(const struct rt_key *key, const char *packs, const char *want, char *path)
{
    struct rt_kernel *k;
    int rc = rt_kernel_get(key, packs, NULL, on_warning, NULL, &k, &err), from = rc;

    CHECKF(rc == 0, "%s", err.text);
    if (rc == 0) {
        from = k->from;
        CHECKF(k->size == 7 + strlen(want) && !memcmp(k->cubin, "object\n", 7)
               && !memcmp(k->cubin + 7, want, strlen(want)), "%.*s", (int) k->size, k->cubin);
        snprintf(path, 4096, "%s", k->path);
    }
    rt_kernel_free(k);
    return from;
}

static void check_line(const char *path, const char *file, const char *line)
{
    char name[4200], text[4096];

    snprintf(name, sizeof name, "%s/%s", path, file);
    text[get_file(name, text, sizeof text - 1)] = 0;
    CHECKF(strstr(text, line), "%s lacks \"%s\": %s", file, line, text);
}

static void test_host(void)
{
    static const char source[] = "// kernel for\nm4_define({|MODEL_D|}, 64)\n";
    struct rt_key key;
    char path[4096], again[4096], want[4200], pack[256], file[4200];

    fresh();
    write_script(0);
    shared->no_nvrtc = 1;
    key = host_key();
    CHECK(get_host(&key, NULL, source, path) == RT_FROM_COMPILER);
    CHECK(get_host(&key, NULL, source, again) == RT_FROM_CACHE && warnings == 0);
    CHECK_STR(again, path);
    CHECK(strstr(path, "/toy-1b-host-sm_90-") && shared->emits == 1 && shared->compiles == 0);
    check_line(path, "key", "\narch = host-sm_90\n");
    check_line(path, "key", "-std=c++17");
    check_line(path, "provenance", "compiler = fake c++ 1.0\n");
    snprintf(want, sizeof want, "=%.4000s -o kernel.so -x c++ kernel.cu\n", path);
    check_line(base, "args", want);         /* a debugger finds kernel.cu in the entry */
    snprintf(file, sizeof file, "%s/kernel.cubin", path);
    put_file(file, "x", 1);
    CHECK(get_host(&key, NULL, source, again) == RT_FROM_COMPILER && warnings == 1);
    CHECK(get_host(&key, NULL, source, again) == RT_FROM_CACHE);
    CHECK(count_in(cache, "") == 1);

    snprintf(pack, sizeof pack, "%s/host-pack", base);
    CHECK(rt_pack_write(&key, pack, NULL, NULL, &err) == 0 && shared->emits == 2);
    CHECK(get_host(&key, pack, source, again) == RT_FROM_PACK);
    CHECK(!strncmp(again, pack, strlen(pack)));
    shared->no_nvrtc = 0;
    CHECK(get() == RT_FROM_COMPILER && count_in(cache, "toy-1b-sm_90-") == 1);
    free((char *) key.options);
    unlink(strcat(strcpy(want, base), "/args"));
}

static void test_host_errors(void)
{
    struct rt_kernel *k = (struct rt_kernel *) &err;
    char want[1024];
    struct rt_key key;

    fresh();
    write_script(1);
    key = host_key();
    CHECK(rt_kernel_get(&key, NULL, NULL, on_warning, NULL, &k, &err) == MK_ECOMPILE && !k);
    snprintf(want, sizeof want, "kernel.cu: %s: exit status 3\nkernel.cu:2: error: this is bad",
             script);
    CHECKF(strstr(err.text, want), "%s", err.text);
    CHECK(strstr(err.text, "the source is kept as ") && count_in(cache, "failed-") == 1);
    CHECK(shared->emits == 1 && count_in(cache, "") == 1);
    free((char *) key.options);

    setenv("MK_HOST_CXX", "/no/such/compiler", 1);
    key = host_key();
    CHECK(rt_kernel_get(&key, NULL, NULL, on_warning, NULL, &k, &err) == MK_ETOOL && !k);
    CHECK_STR(err.text, "/no/such/compiler: No such file or directory; a kernel for the emulated "
              "device needs a C++ compiler (apt-get install g++, or name one in MK_HOST_CXX)");
    CHECK(shared->emits == 1);
    free((char *) key.options);
}

/* A faulty kernel is another entry, which holds the text that was compiled. */
static void test_host_fault(void)
{
    static const struct rt_plant wide = {"wide", {{"64", "65", 1}, {"kernel", "fault", 1}}};
    static const struct rt_plant gone = {"gone", {{"64", "65", 1}, {"64", "66", 1}}};
    static const char sound[] = "// kernel for\nm4_define({|MODEL_D|}, 64)\n";
    static const char faulty[] = "// fault for\nm4_define({|MODEL_D|}, 65)\n";
    struct rt_kernel *k = (struct rt_kernel *) &err;
    char path[4096], other[4096];
    struct rt_key key, bad;

    fresh();
    write_script(0);
    key = host_key();
    CHECK(get_host(&key, NULL, sound, path) == RT_FROM_COMPILER);
    rt_cxx_plant(&wide);
    bad = host_key();
    CHECK(get_host(&bad, NULL, faulty, other) == RT_FROM_COMPILER && strcmp(path, other));
    CHECK(get_host(&bad, NULL, faulty, other) == RT_FROM_CACHE);
    check_line(other, "kernel.cu", "MODEL_D|}, 65)");
    check_line(other, "key", " -DMK_FAULT=wide-");
    free((char *) bad.options);
    rt_cxx_plant(&gone);
    bad = host_key();
    CHECK(rt_kernel_get(&bad, NULL, NULL, NULL, NULL, &k, &err) == MK_ECOMPILE && !k);
    CHECK_STR(err.text, "fault gone: its text is not in the kernel 1 times but 0: 64");
    free((char *) bad.options);
    rt_cxx_plant(NULL);
    CHECK(get_host(&key, NULL, sound, other) == RT_FROM_CACHE && !strcmp(path, other));
    free((char *) key.options);
}

int main(void)
{
    const char *tmp = getenv("TMPDIR");

    snprintf(base, sizeof base, "%.40s/t-cache-XXXXXX", tmp && strlen(tmp) < 40 ? tmp : "/tmp");
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED || !mkdtemp(base) || chmod(base, 0711)) {
        perror(base);
        return 99;
    }
    umask(022);
    test_hit();
    test_bad_keys();
    test_progress();
    test_compile_errors();
    test_damage(1);
    test_damage(0);
    test_foreign();
    test_cold_processes();
    test_cold_threads();
    test_killed_compiler();
    test_killed_store();
    for (int i = 0; i < 4; i++)
        test_full_disk(i & 1, i >> 1);
    test_permissions();
    test_home();
    test_owner();
    test_packs();
    test_host();
    test_host_errors();
    test_host_fault();
    remove_all(base);
    return check_done();
}
