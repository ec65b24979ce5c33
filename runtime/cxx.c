/* cxx.c - see cxx.h.  The compiler is run without a shell, in a private folder. */
#define _GNU_SOURCE
#include "config.h"
#include "runtime/cxx.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <xxhash.h>

#define MAX_WORDS 64
#define OBJECT    "kernel.so"

static const char blanks[] = " \t\r\n\v\f";
static const struct rt_plant *plant;

/* ---- Options -------------------------------------------------------------- */

static int in_path(const char *program)
{
    const char *path = getenv("PATH");
    char file[4096];

    while (path && *path) {
        size_t n = strcspn(path, ":");
        int len = snprintf(file, sizeof file, "%.*s/%s", (int) n, path, program);
        if (n && len < (int) sizeof file && access(file, X_OK) == 0)
            return 1;
        path += n + (path[n] == ':');
    }
    return 0;
}

static const char *compiler(void)
{
    static const char *const known[] = { "c++", "g++", "clang++" };
    const char *named = getenv("MK_HOST_CXX");

    if (named && named[strspn(named, blanks)])
        return named;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (in_path(known[i]))
            return known[i];
    return known[0];
}

/* The sanitizer that this process runs under. */
static const char *sanitizer(void)
{
    if (dlsym(RTLD_DEFAULT, "__tsan_init"))
        return "-fsanitize=thread";
    if (dlsym(RTLD_DEFAULT, "__asan_init"))
        return "-fsanitize=address,undefined -fno-sanitize-recover=undefined";
    if (dlsym(RTLD_DEFAULT, "__ubsan_handle_add_overflow"))
        return "-fsanitize=undefined -fno-sanitize-recover=undefined";
    return "";
}

/* Signed overflow stays undefined, so that the sanitizer sees it.  Symbols that are not there are
   the machine's, in libmkhost. */
#define FLAGS "-std=c++17 -O1 -g -fPIC -shared -fno-strict-aliasing -fno-omit-frame-pointer " \
              "-ffp-contract=off -w"

/* What the fault does to a kernel's text, as a number. */
static uint64_t fault_hash(void)
{
    uint64_t hash = 0;

    for (int i = 0; plant && i < RT_PLANT_EDITS && plant->edit[i].old; i++) {
        hash = XXH3_64bits_withSeed(plant->edit[i].old, strlen(plant->edit[i].old), hash);
        hash = XXH3_64bits_withSeed(plant->edit[i].new, strlen(plant->edit[i].new), hash);
    }
    return hash;
}

char *rt_cxx_options(void)
{
    const char *more = getenv("MK_HOST_CXXFLAGS");
    char *text, *out, *rest = NULL, fault[128] = "";
    size_t n = 0;

    if (plant)
        snprintf(fault, sizeof fault, "-DMK_FAULT=%.64s-%016llx", plant->name, (unsigned long long) fault_hash());
    if (asprintf(&text, "%s " FLAGS " %s %s %s", compiler(), sanitizer(), fault, more ? more : "") < 0)
        return NULL;
    out = malloc(strlen(text) + 2);
    for (char *w = out ? strtok_r(text, blanks, &rest) : NULL; w; w = strtok_r(NULL, blanks, &rest))
        n += (size_t) sprintf(out + n, "%s%s", n ? " " : "", w);
    free(text);
    return out;
}

/* ---- Running the compiler ------------------------------------------------- */

/* A command line and the text that its words lie in. */
struct command {
    char *text;
    char *word[MAX_WORDS + 8];
    int n;
};

static int start_command(struct command *c, const char *options, struct mk_err *err)
{
    char *rest = NULL;

    memset(c, 0, sizeof *c);
    c->text = strdup(options);
    if (!c->text)
        return gen_fail(err, MK_ENOMEM, "no memory for the C++ compiler's options");
    for (char *w = strtok_r(c->text, blanks, &rest); w; w = strtok_r(NULL, blanks, &rest)) {
        if (c->n == MAX_WORDS)
            return gen_fail(err, MK_ECOMPILE, "more than %d options of the C++ compiler",
                            MAX_WORDS);
        c->word[c->n++] = w;
    }
    return c->n ? 0 : gen_fail(err, MK_EINVAL, "no C++ compiler in its options");
}

/* Our environment, but with messages in English.  The strings are the environment's own. */
static char **english(void)
{
    static char locale[] = "LC_ALL=C";
    size_t n = 0, k = 0;
    char **list;

    while (environ[n])
        n++;
    list = malloc((n + 2) * sizeof *list);
    if (!list)
        return NULL;
    for (size_t i = 0; i < n; i++)
        if (strncmp(environ[i], "LC_ALL=", 7))
            list[k++] = environ[i];
    list[k++] = locale;
    list[k] = NULL;
    return list;
}

/* Start C in FOLDER with both outputs in LOG.  The signals that our thread blocks would be
   blocked there too. */
static int start(pid_t *pid, char *const *word, const char *folder, int log)
{
    /* A path that is relative is so to our folder. */
    char *path = strchr(word[0], '/') ? realpath(word[0], NULL) : NULL, **env = english();
    posix_spawn_file_actions_t files;
    posix_spawnattr_t attr;
    sigset_t none;
    int e;

    sigemptyset(&none);
    posix_spawn_file_actions_init(&files);
    posix_spawnattr_init(&attr);
    posix_spawnattr_setsigmask(&attr, &none);
    posix_spawnattr_setflags(&attr, POSIX_SPAWN_SETSIGMASK);
    e = posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
    e = e ? e : posix_spawn_file_actions_adddup2(&files, log, 1);
    e = e ? e : posix_spawn_file_actions_adddup2(&files, log, 2);
    e = e ? e : posix_spawn_file_actions_addchdir_np(&files, folder);
    e = e ? e : env ? posix_spawnp(pid, path ? path : word[0], &files, &attr, word, env) : ENOMEM;
    posix_spawnattr_destroy(&attr);
    posix_spawn_file_actions_destroy(&files);
    free(env);
    free(path);
    return e;
}

/* Run C; *STATUS is its exit status.  Returns 0 when it ended by itself. */
static int run(const struct command *c, const char *folder, int log, int *status,
               struct mk_err *err)
{
    int state = 0, rc;
    pid_t pid;

    rc = start(&pid, c->word, folder, log);
    if (rc)
        return gen_fail(err, rc == ENOMEM ? MK_ENOMEM : MK_ETOOL, "%s: %s; a kernel for the "
                        "emulated device needs a C++ compiler (apt-get install g++, or name one "
                        "in MK_HOST_CXX)", c->word[0], strerror(rc));
    while ((rc = waitpid(pid, &state, 0)) < 0 && errno == EINTR)
        ;
    if (rc < 0 && errno != ECHILD)
        return gen_fail(err, MK_ETOOL, "%s: waitpid: %s", c->word[0], strerror(errno));
    if (rc < 0)     /* it has ended, but this program lets others or no one take its status */
        state = 0;
    if (!WIFEXITED(state))
        return gen_fail(err, MK_ECOMPILE, "%s was killed by signal %d", c->word[0],
                        WTERMSIG(state));
    *status = WEXITSTATUS(state);
    if (*status == 127)
        return gen_fail(err, MK_ETOOL, "%s cannot be run", c->word[0]);
    return 0;
}

/* All of FD, with a zero behind it; NULL: no memory or a read error. */
static char *slurp(int fd, size_t *size)
{
    struct stat st;
    char *data = fstat(fd, &st) ? NULL : malloc((size_t) st.st_size + 1);
    size_t n = 0;
    ssize_t got = 1;

    while (data && n < (size_t) st.st_size && got > 0) {
        got = pread(fd, data + n, (size_t) st.st_size - n, (off_t) n);
        n += got > 0 ? (size_t) got : 0;
    }
    if (!data || n < (size_t) st.st_size) {
        free(data);
        return NULL;
    }
    data[n] = 0;
    *size = n;
    return data;
}

static int open_log(struct mk_err *err)
{
    int fd = memfd_create("mkgen", MFD_CLOEXEC);

    return fd < 0 ? gen_fail(err, MK_EIO, "memfd_create: %s", strerror(errno)) : fd;
}

int rt_cxx_version(const char *options, char *version, size_t size, struct mk_err *err)
{
    struct command c;
    int log = -1, status = 0;
    char *text = NULL;
    size_t n;
    int rc = start_command(&c, options, err);

    version[0] = 0;
    if (rc == 0 && (log = open_log(err)) < 0)
        rc = log;
    if (rc == 0) {
        c.word[c.n++] = "--version";
        rc = run(&c, "/", log, &status, err);
    }
    if (rc == 0 && !(text = slurp(log, &n)))
        rc = gen_fail(err, MK_ENOMEM, "no memory for the C++ compiler's version");
    if (rc == 0)
        snprintf(version, size, "%.*s", (int) strcspn(text, "\r\n"), text);
    if (rc == 0 && !version[0])
        snprintf(version, size, "unknown");
    free(text);
    free(c.text);
    if (log >= 0)
        close(log);
    return rc;
}

/* ---- Compiling ------------------------------------------------------------ */

/* Make a private folder; its path as the compiler sees it, without links. */
static int make_folder(char *path, size_t size, struct mk_err *err)
{
    const char *tmp = getenv("TMPDIR");
    char made[4096], *real;
    int n = snprintf(made, sizeof made, "%s/mkgen-XXXXXX", tmp && *tmp ? tmp : "/tmp");

    if (n >= (int) sizeof made || !mkdtemp(made))
        return gen_fail(err, MK_EIO, "cannot make a folder in %.1000s: %s",
                        tmp && *tmp ? tmp : "/tmp", strerror(errno));
    real = realpath(made, NULL);
    n = snprintf(path, size, "%s", real ? real : made);
    free(real);
    if (n < (int) size)
        return 0;
    rmdir(made);
    return gen_fail(err, MK_EIO, "the path of the folder for temporary files is too long");
}

static int put_source(int dir, const char *file, const char *src, struct mk_err *err)
{
    int fd = openat(dir, file, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    size_t left = strlen(src);
    int e = fd < 0 ? errno : 0;

    while (left && !e) {
        ssize_t n = write(fd, src, left);
        if (n < 0) {
            e = errno == EINTR ? 0 : errno;
        } else {
            src += n;
            left -= (size_t) n;
        }
    }
    if (fd >= 0 && close(fd) && !e)
        e = errno;
    return e ? gen_fail(err, MK_EIO, "cannot write %s for the C++ compiler: %s", file, strerror(e))
             : 0;
}

static int get_object(int dir, const char *file, const char *cxx, unsigned char **bytes,
                      size_t *size, struct mk_err *err)
{
    int fd = openat(dir, OBJECT, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);

    if (fd < 0)
        return gen_fail(err, MK_ECOMPILE, "%s: %s made no shared object", file, cxx);
    *bytes = (unsigned char *) slurp(fd, size);
    close(fd);
    if (*bytes && *size)
        return 0;
    return gen_fail(err, *bytes ? MK_ECOMPILE : MK_ENOMEM, "%s: %s", file,
                    *bytes ? "the shared object is empty" : "no memory for the shared object");
}

/* The text of a refusal: what the compiler said from its first error on. */
static int fail_compile(const char *file, const char *cxx, int status, int log, struct mk_err *err)
{
    size_t size = 0;
    char *text = slurp(log, &size);
    const char *from = text ? strstr(text, "error") : NULL;
    int len, rc;

    while (from && from > text && from[-1] != '\n')
        from--;
    if (!from)
        from = text ? text : "";
    len = (int) strnlen(from, 3500);
    while (len && strchr(blanks, from[len - 1]))
        len--;
    rc = gen_fail(err, MK_ECOMPILE, "%s: %s: exit status %d%s%.*s", file, cxx, status,
                  len ? "\n" : "", len, from);
    free(text);
    return rc;
}

/* Compile FILE in FOLDER, which is DIR.  INTO: the folder that debuggers shall look at, or NULL. */
static int compile_in(const char *folder, int dir, const char *file, const char *into,
                      const char *options, unsigned char **bytes, size_t *size, struct mk_err *err)
{
    char *map = NULL;
    int log = -1, status = 0;
    struct command c;
    int rc = start_command(&c, options, err);

    if (rc == 0 && (log = open_log(err)) < 0)
        rc = log;
    if (rc == 0 && into && asprintf(&map, "-fdebug-prefix-map=%s=%s", folder, into) < 0) {
        map = NULL;
        rc = gen_fail(err, MK_ENOMEM, "no memory to compile %s", file);
    }
    if (rc == 0) {
        if (map)
            c.word[c.n++] = map;
        c.word[c.n++] = "-o";
        c.word[c.n++] = OBJECT;
        c.word[c.n++] = "-x";
        c.word[c.n++] = "c++";
        c.word[c.n++] = (char *) file;
        rc = run(&c, folder, log, &status, err);
    }
    if (rc == 0)
        rc = status ? fail_compile(file, c.word[0], status, log, err)
                    : get_object(dir, file, c.word[0], bytes, size, err);
    if (log >= 0)
        close(log);
    free(map);
    free(c.text);
    return rc;
}

int rt_cxx_compile(const char *src, const char *name, const char *options, unsigned char **bytes,
                   size_t *size, struct mk_err *err)
{
    const char *slash = strrchr(name, '/'), *file = slash ? slash + 1 : name;
    char *into = slash && slash > name ? strndup(name, (size_t) (slash - name)) : NULL;
    char folder[4096];
    int dir, rc;

    *bytes = NULL;
    *size = 0;
    rc = make_folder(folder, sizeof folder, err);
    if (rc) {
        free(into);
        return rc;
    }
    dir = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    rc = dir < 0 ? gen_fail(err, MK_EIO, "%s: %s", folder, strerror(errno))
                 : put_source(dir, file, src, err);
    if (rc == 0)
        rc = compile_in(folder, dir, file, into, options, bytes, size, err);
    if (dir >= 0) {
        unlinkat(dir, file, 0);
        unlinkat(dir, OBJECT, 0);
        close(dir);
    }
    rmdir(folder);
    free(into);
    if (rc) {
        free(*bytes);
        *bytes = NULL;
        *size = 0;
    }
    return rc;
}

/* ---- Faults --------------------------------------------------------------- */

void rt_cxx_plant(const struct rt_plant *p)
{
    plant = p;
}

static int count(const char *text, const char *part)
{
    int n = 0;

    for (const char *at = text; (at = strstr(at, part)) != NULL; at += strlen(part))
        n++;
    return n;
}

/* TEXT, which has OLD N times, with NEW instead. */
static char *replace(const char *text, const char *old, const char *new, int n)
{
    char *out = malloc(strlen(text) + (size_t) n * strlen(new) + 1), *to = out;
    const char *at;

    if (!out)
        return NULL;
    for (; (at = strstr(text, old)) != NULL; text = at + strlen(old))
        to += sprintf(to, "%.*s%s", (int) (at - text), text, new);
    strcpy(to, text);
    return out;
}

int rt_cxx_fault(char **src, struct mk_err *err)
{
    for (int i = 0; plant && i < RT_PLANT_EDITS && plant->edit[i].old; i++) {
        const char *old = plant->edit[i].old;
        const int want = plant->edit[i].count, n = *old ? count(*src, old) : 0;
        char *text;
        if (n != want || !n)
            return gen_fail(err, MK_ECOMPILE, "fault %s: its text is not in the kernel %d times "
                            "but %d: %.200s", plant->name, want, n, old);
        text = replace(*src, old, plant->edit[i].new, n);
        if (!text)
            return gen_fail(err, MK_ENOMEM, "fault %s: no memory", plant->name);
        free(*src);
        *src = text;
    }
    return 0;
}
