/* cli.c - what the three programs share. */
#include "config.h"
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include "runtime/cli/cli.h"

static const char *program = "mk";
static int progress_shown;
static char *volatile temp_path;    /* to be removed when a signal ends us */

/* ---- Messages ---- */

static void print_line(const char *fmt, va_list args)
{
    cli_progress_clear();
    fflush(stdout);
    fprintf(stderr, "%s: ", program);
    vfprintf(stderr, fmt, args);
    fputc('\n', stderr);
}

int cli_fail(const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    print_line(fmt, args);
    va_end(args);
    return CLI_FAILED;
}

int cli_bad_option(void)
{
    fprintf(stderr, "Try '%s --help' for more information.\n", program);
    return CLI_USAGE;
}

int cli_usage(const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    print_line(fmt, args);
    va_end(args);
    return cli_bad_option();
}

int cli_error(const struct mk_err *err)
{
    return cli_fail("%s", err->text);
}

void cli_note(const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    print_line(fmt, args);
    va_end(args);
}

void cli_warn(void *user, const char *text)
{
    (void) user;
    cli_note("warning: %s", text);
}

int cli_version(void)
{
    printf("%s %s\n", program, PACKAGE_VERSION);
    return CLI_OK;
}

/* ---- Start, end, signals ---- */

/* Remove the half-written file and die of the same signal, so that a shell sees it. */
static void on_signal(int sig)
{
    char *temp = temp_path;

    if (temp)
        unlink(temp);
    signal(sig, SIG_DFL);
    raise(sig);
}

void cli_start(const char *name, int argc, char **argv)
{
    static const int fatal[] = { SIGINT, SIGTERM, SIGHUP };

    program = name;
    if (argc > 0)
        argv[0] = (char *) name;    /* getopt_long's messages start with it */
    for (size_t i = 0; i < sizeof(fatal) / sizeof(fatal[0]); i++) {
        struct sigaction old;

        /* What our parent ignores (nohup, a shell's background job) stays ignored. */
        if (sigaction(fatal[i], NULL, &old) == 0 && old.sa_handler != SIG_IGN)
            signal(fatal[i], on_signal);
    }
}

int cli_end(int status)
{
    cli_progress_clear();
    if ((fflush(stdout) || ferror(stdout)) && status == CLI_OK)
        return cli_fail("standard output: %s", strerror(errno));
    return status;
}

/* ---- Numbers ---- */

int cli_int(const char *option, const char *text, int lo, int hi, int *out)
{
    char *end;
    long v;

    errno = 0;
    v = strtol(text, &end, 10);
    if (end == text || *end || isspace((unsigned char) *text) || errno || v < lo || v > hi)
        return cli_usage("%s: '%s' is not an integer from %d to %d", option, text, lo, hi);
    *out = (int) v;
    return 0;
}

int cli_u64(const char *option, const char *text, uint64_t *out)
{
    char *end;

    errno = 0;
    *out = strtoull(text, &end, 10);
    if (!isdigit((unsigned char) *text) || *end || errno)
        return cli_usage("%s: '%s' is not an integer from 0 to 2^64 - 1", option, text);
    return 0;
}

int cli_float(const char *option, const char *text, double lo, double hi, float *out)
{
    char *end;
    double v;

    v = strtod(text, &end);
    if (end == text || *end || isspace((unsigned char) *text) || !(v >= lo && v <= hi))
        return cli_usage("%s: '%s' is not a number from %g to %g", option, text, lo, hi);
    *out = (float) v;
    return 0;
}

int cli_int_list(const char *option, const char *text, int lo, int hi, int *out, int cap, int *n)
{
    const char *p = text;

    *n = 0;
    if (!strcmp(text, "none"))
        return 0;
    for (;;) {
        char *end;
        long v;

        errno = 0;
        v = strtol(p, &end, 10);
        if (!isdigit((unsigned char) *p) || errno || v < lo || v > hi || (*end && *end != ','))
            return cli_usage("%s: '%s' is not a list of integers from %d to %d, like 1,200,1024",
                             option, text, lo, hi);
        if (*n == cap)
            return cli_usage("%s: more than %d numbers", option, cap);
        out[(*n)++] = (int) v;
        if (!*end)
            return 0;
        p = end + 1;
    }
}

int cli_list_add(struct cli_list *list, const char *item)
{
    const char **grown = realloc(list->item, (size_t) (list->n + 2) * sizeof(*grown));

    if (!grown)
        return cli_fail("not enough memory");
    list->item = grown;
    list->item[list->n++] = item;
    list->item[list->n] = NULL;
    return 0;
}

/* ---- Progress ---- */

double cli_now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double) t.tv_sec + 1e-9 * (double) t.tv_nsec;
}

void cli_progress_clear(void)
{
    if (progress_shown)
        fputs("\r\033[K", stderr);
    progress_shown = 0;
}

void cli_progress(void *user, const char *what, double fraction)
{
    static char last[16];
    static double start, shown;
    double now = cli_now();

    (void) user;
    if (!isatty(STDERR_FILENO))
        return;
    if (strncmp(what, last, sizeof(last) - 1)) {
        snprintf(last, sizeof(last), "%s", what);
        start = now;
    }
    if (fraction >= 1) {
        cli_progress_clear();
        last[0] = 0;
    } else if (now - start > 1 && now - shown > 0.1) {
        fprintf(stderr, "\r\033[K%s %.0f %%", what, 100 * fraction);
        progress_shown = 1;
        shown = now;
    }
}

/* ---- Files ---- */

int cli_read(const char *path, char **text, size_t *size)
{
    int is_stdin = !strcmp(path, "-");
    FILE *f = is_stdin ? stdin : fopen(path, "rb");
    const char *name = is_stdin ? "standard input" : path;
    char *buf = NULL;
    size_t n = 0, cap = 0;

    *text = NULL;
    if (!f)
        return cli_fail("%s: %s", name, strerror(errno));
    do {
        if (cap - n < 2) {
            char *grown = realloc(buf, cap = cap ? 2 * cap : 65536);

            if (!grown)
                break;
            buf = grown;
        }
        n += fread(buf + n, 1, cap - n - 1, f);
    } while (!feof(f) && !ferror(f));
    if (!buf || !feof(f)) {
        cli_fail("%s: %s", name, strerror(errno ? errno : EIO));
        free(buf);
        if (!is_stdin)
            fclose(f);
        return CLI_FAILED;
    }
    if (!is_stdin)
        fclose(f);
    buf[n] = 0;
    *text = buf;
    *size = n;
    return 0;
}

static void file_release(struct cli_file *f)
{
    char *temp = f->temp;

    temp_path = NULL;
    free(temp);
    free(f->path);
    memset(f, 0, sizeof(*f));
}

/* Open a temporary file beside f->path, with the permissions of a new file. */
static FILE *open_temp(struct cli_file *f)
{
    size_t cap = strlen(f->path) + 24;
    FILE *stream = NULL;
    int fd = -1;

    f->temp = malloc(cap);
    if (!f->temp)
        return NULL;
    for (int i = 0; i < 100 && fd < 0; i++) {
        snprintf(f->temp, cap, "%s.tmp%ld-%d", f->path, (long) getpid(), i);
        fd = open(f->temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (fd < 0 && errno != EEXIST)
            return NULL;
    }
    if (fd < 0)
        return NULL;
    temp_path = f->temp;
    stream = fdopen(fd, "wb");
    if (!stream) {
        close(fd);
        unlink(f->temp);
    }
    return stream;
}

int cli_file_open(struct cli_file *f, const char *path)
{
    struct stat st;
    int is_stdout = !strcmp(path, "-");
    char *real = is_stdout ? NULL : realpath(path, NULL);   /* replace a link's target */

    memset(f, 0, sizeof(*f));
    f->path = real ? real : strdup(path);
    if (!f->path)
        return cli_fail("not enough memory");
    if (is_stdout)
        f->stream = stdout;
    else if (stat(f->path, &st) == 0 && !S_ISREG(st.st_mode))
        f->stream = fopen(f->path, "wb");
    else
        f->stream = open_temp(f);
    if (f->stream)
        return 0;
    cli_fail("%s: %s", path, strerror(errno));
    file_release(f);
    return CLI_FAILED;
}

int cli_file_write(struct cli_file *f, const void *data, size_t size)
{
    if (fwrite(data, 1, size, f->stream) == size)
        return 0;
    return cli_fail("%s: %s", f->stream == stdout ? "standard output" : f->path, strerror(errno));
}

int cli_file_done(struct cli_file *f)
{
    FILE *stream = f->stream;
    int bad, code;

    bad = fflush(stream) || (f->temp && fsync(fileno(stream)));
    code = errno;
    if (stream != stdout && fclose(stream) && !bad) {
        bad = 1;
        code = errno;
    }
    if (!bad && f->temp && rename(f->temp, f->path)) {
        bad = 1;
        code = errno;
    }
    if (bad) {
        cli_fail("%s: %s", stream == stdout ? "standard output" : f->path, strerror(code));
        if (f->temp)
            unlink(f->temp);
    }
    file_release(f);
    return bad ? CLI_FAILED : 0;
}

void cli_file_drop(struct cli_file *f)
{
    if (!f->stream)
        return;
    if (f->stream != stdout)
        fclose(f->stream);
    if (f->temp)
        unlink(f->temp);
    file_release(f);
}

int cli_file_put(const char *path, const void *data, size_t size)
{
    struct cli_file f;

    if (cli_file_open(&f, path))
        return CLI_FAILED;
    if (cli_file_write(&f, data, size)) {
        cli_file_drop(&f);
        return CLI_FAILED;
    }
    return cli_file_done(&f);
}

const char *cli_size(int64_t bytes, char buf[16])
{
    static const char *const unit[] = { "B", "KB", "MB", "GB", "TB" };
    double v = (double) bytes;
    int i = 0;

    for (; v >= 999.5 && i < 4; i++)
        v /= 1000;
    snprintf(buf, 16, i ? "%.3g %s" : "%.0f %s", v, unit[i]);
    return buf;
}
