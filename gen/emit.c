/* emit.c - params.m4 + the embedded templates -> m4 -> kernel.cu.

   m4 is run without a shell, reads one anonymous file on standard input and writes two, so
   that nothing is left behind whatever happens. */
#define _GNU_SOURCE
#include "config.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <limits.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include <xxhash.h>

#include "gen/gen.h"
#include "gen/templates.h"

/* The macros come first, then params.m4, then the rest. */
static int is_library(const struct gen_template *t)
{
    return strncmp(t->name, "templates/lib/", 14) == 0;
}

static char digest[17];

static void make_digest(void)
{
    unsigned long long hash = 0;

    for (const struct gen_template *t = gen_templates; t->name; t++) {
        hash = XXH3_64bits_withSeed(t->name, strlen(t->name) + 1, hash);
        hash = XXH3_64bits_withSeed(t->text, strlen(t->text) + 1, hash);
    }
    snprintf(digest, sizeof digest, "%016llx", hash);
}

const char *gen_templates_digest(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, make_digest);
    return digest;
}

/* ---- What m4 reads ------------------------------------------------------- */

/* Call VISIT for every part of m4's input, in order. */
static int each_part(const char *params, int (*visit)(void *, const char *, const char *),
                     void *arg)
{
    int rc = 0;

    for (const struct gen_template *t = gen_templates; rc == 0 && t->name; t++)
        if (is_library(t))
            rc = visit(arg, t->name, t->text);
    if (rc == 0)
        rc = visit(arg, "params.m4", params);
    for (const struct gen_template *t = gen_templates; rc == 0 && t->name; t++)
        if (!is_library(t))
            rc = visit(arg, t->name, t->text);
    return rc;
}

static int write_part(void *arg, const char *name, const char *text)
{
    const int fd = *(int *) arg;
    size_t left = strlen(text);

    (void) name;
    while (left) {
        ssize_t n = write(fd, text, left);
        if (n < 0 && errno != EINTR)
            return -1;
        if (n > 0)
            text += n, left -= (size_t) n;
    }
    return 0;
}

/* From a line of the whole input to a line of the part that it lies in. */
struct place {
    int line; /* in: of the input; out: of the part */
    const char *name;
};

static int find_part(void *arg, const char *name, const char *text)
{
    struct place *p = arg;
    int lines = 0;

    for (; *text; text++)
        lines += *text == '\n';
    p->name = name;
    if (p->line <= lines)
        return 1;
    p->line -= lines;
    return 0;
}

/* Give m4's complaint "m4:stdin:123: TEXT" its template's name and line. */
static int m4_complaint(const char *params, char *log, struct mk_err *err)
{
    struct place place = {0, NULL};
    char *at, *text;
    long line;

    log[strcspn(log, "\n")] = 0;
    at = strstr(log, "m4:stdin:");
    if (at) {
        line = strtol(at + 9, &text, 10);
        place.line = line > 0 && line < INT_MAX ? (int) line : INT_MAX;
        if (each_part(params, find_part, &place))
            return gen_fail(err, MK_ECOMPILE, "%s:%d: %s", place.name, place.line,
                            text + strspn(text, ": "));
    }
    return gen_fail(err, MK_ECOMPILE, "m4: %s", log);
}

/* ---- Running m4 ---------------------------------------------------------- */

static const char *m4_program(void)
{
    const char *m4 = getenv("MK_M4");

    return m4 && *m4 ? m4 : "m4";
}

/* Run m4 on the three files; returns 0 when it ended by itself, its status in *STATUS. */
static int run_m4(const int fd[3], int *status, struct mk_err *err)
{
    char *const argv[] = {"m4", "-P", "-E", "-", NULL}, *const envp[] = {"LC_ALL=C", NULL};
    posix_spawn_file_actions_t actions;
    const char *m4 = m4_program();
    pid_t pid;
    int rc;

    if (posix_spawn_file_actions_init(&actions))
        return gen_fail(err, MK_ENOMEM, "m4: no memory");
    for (int i = 0; i < 3; i++)
        posix_spawn_file_actions_adddup2(&actions, fd[i], i);
    rc = posix_spawnp(&pid, m4, &actions, NULL, argv, envp);
    posix_spawn_file_actions_destroy(&actions);
    if (rc)
        return gen_fail(err, MK_ETOOL,
                        "%s: %s; GNU m4 is needed to generate a kernel (apt-get install m4)", m4,
                        strerror(rc));
    while ((rc = waitpid(pid, status, 0)) < 0 && errno == EINTR)
        ;
    if (rc < 0 && errno != ECHILD)
        return gen_fail(err, MK_ETOOL, "%s: waitpid: %s", m4, strerror(errno));
    if (rc < 0) /* m4 has ended, but this program lets others or no one take its status */
        *status = 0;
    if (!WIFEXITED(*status))
        return gen_fail(err, MK_ECOMPILE, "%s was killed by signal %d", m4, WTERMSIG(*status));
    return 0;
}

/* All of FD as a string and its SIZE; NULL: no memory or a read error. */
static char *slurp(int fd, size_t *bytes)
{
    off_t size = lseek(fd, 0, SEEK_END), done = 0;
    char *text = size < 0 ? NULL : malloc((size_t) size + 1);

    while (text && done < size) {
        ssize_t n = pread(fd, text + done, (size_t) (size - done), done);
        if (n <= 0) {
            free(text);
            return NULL;
        }
        done += n;
    }
    if (text) {
        text[size] = 0;
        *bytes = (size_t) size;
    }
    return text;
}

/* ---- The output ---------------------------------------------------------- */

/* Drop trailing blanks, and all but one of the empty lines that m4's conditions leave. */
static void tidy(char *text)
{
    char *to = text;
    int newlines = 2; /* none at the start */

    for (const char *c = text; *c; c++) {
        if (*c == '\n') {
            while (to > text && to[-1] == ' ')
                to--;
            if (to > text && to[-1] != '\n')
                newlines = 0;
            if (newlines++ < 2)
                *to++ = '\n';
        } else {
            *to++ = *c;
        }
    }
    while (to > text + 1 && to[-1] == '\n' && to[-2] == '\n')
        to--;
    *to = 0;
}

/* Is the word C[0..LEN-1] a macro that should have been expanded? */
static int is_leftover(const char *c, size_t len)
{
    static const char *const prefixes[] = {"MODEL_", "GPU_", "PLAN_", "ABI_", "t_", "m4_"};

    for (size_t i = 0; i < sizeof prefixes / sizeof *prefixes; i++)
        if (len > strlen(prefixes[i]) && !strncmp(c, prefixes[i], strlen(prefixes[i])))
            return 1;
    return 0;
}

static int check_output(const char *text, struct mk_err *err)
{
    int line = 1;

    if (!strstr(text, "mk_decode(") || !strstr(text, "mk_prefill(") || !strstr(text, "mk_pack("))
        return gen_fail(err, MK_ECOMPILE, "%s: its output is not the kernel", m4_program());
    for (const char *c = text; *c;) {
        size_t len = 0;
        if (c[0] == '/' && c[1] == '/' && (c == text || c[-1] == '\n')) {
            c += strcspn(c, "\n"); /* a remark may have any name in it */
            continue;
        }
        while (isalnum((unsigned char) c[len]) || c[len] == '_')
            len++;
        if (is_leftover(c, len))
            return gen_fail(err, MK_ECOMPILE, "kernel.cu:%d: the macro %.*s was not expanded", line,
                            (int) len, c);
        if (*c == '\n')
            line++;
        else if (!len && (*c < ' ' || *c > '~'))
            return gen_fail(err, MK_ECOMPILE, "kernel.cu:%d: a byte %d is not printable ASCII",
                            line, (unsigned char) *c);
        c += len ? len : 1;
    }
    return 0;
}

int gen_emit(const char *params, char **src, struct mk_err *err)
{
    int fd[3] = {-1, -1, -1}, status = 0, rc = 0;
    char *text = NULL, *log = NULL;
    size_t size = 0, log_size = 0;

    *src = NULL;
    for (int i = 0; i < 3; i++)
        if ((fd[i] = memfd_create("mkgen", MFD_CLOEXEC)) < 0)
            rc = gen_fail(err, MK_EIO, "memfd_create: %s", strerror(errno));
    if (rc)
        goto done;
    if (each_part(params, write_part, &fd[0]) || lseek(fd[0], 0, SEEK_SET) < 0) {
        rc = gen_fail(err, MK_EIO, "m4's input: %s", strerror(errno));
        goto done;
    }
    rc = run_m4(fd, &status, err);
    if (rc)
        goto done;
    text = slurp(fd[1], &size);
    log = slurp(fd[2], &log_size);
    if (!text || !log) {
        rc = gen_fail(err, MK_ENOMEM, "m4's output: no memory");
        goto done;
    }
    if (WEXITSTATUS(status) == 127)
        rc = gen_fail(err, MK_ETOOL, "%s cannot be run", m4_program());
    else if (log_size)
        rc = m4_complaint(params, log, err);
    else if (WEXITSTATUS(status))
        rc = gen_fail(err, MK_ECOMPILE, "%s: exit status %d", m4_program(), WEXITSTATUS(status));
    else if (strlen(text) != size)
        rc = gen_fail(err, MK_ECOMPILE, "%s: its output has a zero byte", m4_program());
    if (rc)
        goto done;
    tidy(text);
    rc = check_output(text, err);
done:
    for (int i = 0; i < 3; i++)
        if (fd[i] >= 0)
            close(fd[i]);
    free(log);
    if (rc)
        free(text);
    else
        *src = text;
    return rc;
}
