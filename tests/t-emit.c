/* t-emit.c - running m4: absent, killed, garbage in every form; what a template or params.m4 does
   wrong is told with name and line; the same input gives the same bytes.  Small shell scripts
   stand in for m4. */
#define _GNU_SOURCE /* asprintf */
#include "config.h"

#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include "gen/gen.h"
#include "gen/templates.h"
#include "tests/check.h"

static char dir[] = "/tmp/t-emit-XXXXXX", script[64];
static struct mk_err err;

/* The words without which an output is not the kernel. */
#define KERNEL "mk_decode() mk_prefill() mk_pack()"

/* ---- Stand-ins ------------------------------------------------------------- */

static void write_script(const char *body, int mode)
{
    FILE *f = fopen(script, "w");

    CHECK(f && fprintf(f, "#!/bin/sh\n%s\n", body) > 0 && fclose(f) == 0 &&
          chmod(script, (mode_t) mode) == 0);
}

/* With m4 = SCRIPT the answer is CODE and MESSAGE, in which "@" stands for the script. */
static void fails(const char *params, int code, const char *message)
{
    char want[400], *src = script;
    const char *at = strchr(message, '@');

    if (at)
        snprintf(want, sizeof want, "%.*s%s%s", (int) (at - message), message, script, at + 1);
    else
        snprintf(want, sizeof want, "%s", message);
    CHECKF(gen_emit(params, &src, &err) == code, "%s: code %d", message, err.code);
    CHECK(src == NULL);
    CHECK_STR(err.text, want);
    CHECK(gen_emit(params, &src, NULL) == code);
}

static void script_fails(const char *body, int code, const char *message)
{
    write_script(body, 0700);
    fails("", code, message);
}

static void test_no_m4(void)
{
    setenv("MK_M4", "/nonexistent/m4", 1);
    fails("", MK_ETOOL,
          "/nonexistent/m4: No such file or directory; GNU m4 is needed to generate a kernel "
          "(apt-get install m4)");
    setenv("MK_M4", script, 1);
    write_script("true", 0600);
    if (geteuid()) /* root may run anything that anybody may */
        fails("", MK_ETOOL,
              "@: Permission denied; GNU m4 is needed to generate a kernel (apt-get install m4)");
    setenv("MK_M4", dir, 1);
    snprintf(script, sizeof script, "%s", dir);
    fails("", MK_ETOOL,
          "@: Permission denied; GNU m4 is needed to generate a kernel (apt-get install m4)");
    snprintf(script, sizeof script, "%s/m4", dir);
}

static void test_no_path(void)
{
    char *path = strdup(getenv("PATH") ? getenv("PATH") : "");

    unsetenv("MK_M4");
    setenv("PATH", dir, 1);
    unlink(script);
    fails("", MK_ETOOL,
          "m4: No such file or directory; GNU m4 is needed to generate a kernel "
          "(apt-get install m4)");
    setenv("MK_M4", "", 1);
    fails("", MK_ETOOL,
          "m4: No such file or directory; GNU m4 is needed to generate a kernel "
          "(apt-get install m4)");
    setenv("PATH", path ? path : "", 1);
    free(path);
}

static void test_ends(void)
{
    setenv("MK_M4", script, 1);
    script_fails("kill -9 $$", MK_ECOMPILE, "@ was killed by signal 9");
    script_fails("echo '" KERNEL "'; kill -TERM $$", MK_ECOMPILE, "@ was killed by signal 15");
    script_fails("exit 3", MK_ECOMPILE, "@: exit status 3");
    script_fails("cat; exit 1", MK_ECOMPILE, "@: exit status 1");
    script_fails("exit 127", MK_ETOOL, "@ cannot be run");
    script_fails("exec /nonexistent/m4", MK_ETOOL, "@ cannot be run");
}

static void test_complaints(void)
{
    script_fails("echo no such thing >&2", MK_ECOMPILE, "m4: no such thing");
    script_fails("echo first >&2; echo second >&2; exit 2", MK_ECOMPILE, "m4: first");
    script_fails("echo '" KERNEL "'; echo m4:stdin:1: bad >&2", MK_ECOMPILE,
                 "templates/lib/base.m4:1: bad");
    script_fails("echo m4:stdin:: bad >&2", MK_ECOMPILE, "m4: m4:stdin:: bad");
    script_fails("echo m4:stdin:9999999: bad >&2", MK_ECOMPILE, "m4: m4:stdin:9999999: bad");
    script_fails("printf 'm4:stdin:1: a\\tb\\033[31m\\n' >&2", MK_ECOMPILE,
                 "templates/lib/base.m4:1: a\tb?[31m");
}

static void test_garbage(void)
{
    script_fails("true", MK_ECOMPILE, "@: its output is not the kernel");
    script_fails("echo hello", MK_ECOMPILE, "@: its output is not the kernel");
    script_fails("cat", MK_ECOMPILE, "kernel.cu:1: the macro m4_divert was not expanded");
    script_fails("echo; echo '  ok'; echo '" KERNEL "'; printf 'a\\tb\\n'", MK_ECOMPILE,
                 "kernel.cu:3: a byte 9 is not printable ASCII");
    script_fails("echo '" KERNEL "'; printf 'caf\\303\\251\\n'", MK_ECOMPILE,
                 "kernel.cu:2: a byte 195 is not printable ASCII");
    script_fails("echo '" KERNEL "'; printf 'a\\r\\n'", MK_ECOMPILE,
                 "kernel.cu:2: a byte 13 is not printable ASCII");
    script_fails("echo '" KERNEL "'; printf 'a\\n\\0b\\n'", MK_ECOMPILE,
                 "@: its output has a zero byte");
    script_fails("printf '\\0" KERNEL "'", MK_ECOMPILE, "@: its output has a zero byte");
    script_fails("echo '" KERNEL "'; echo 'x = PLAN_CTAS;'", MK_ECOMPILE,
                 "kernel.cu:2: the macro PLAN_CTAS was not expanded");
    script_fails("echo '" KERNEL "'; echo t_note", MK_ECOMPILE,
                 "kernel.cu:2: the macro t_note was not expanded");
    script_fails("echo '" KERNEL "'; echo m4_dnl", MK_ECOMPILE,
                 "kernel.cu:2: the macro m4_dnl was not expanded");
    script_fails("head -c 300000 /dev/urandom", MK_ECOMPILE, "@: its output has a zero byte");
    script_fails("head -c 300000 /dev/urandom | tr -d '\\000'", MK_ECOMPILE,
                 "@: its output is not the kernel");
}

/* Blanks at line ends and runs of empty lines go; nothing else does. */
static void test_tidy(void)
{
    char *src = NULL;

    write_script("printf '\\n\\n" KERNEL "  \\n\\n  \\n\\n    x = 1;\\n\\n\\n'", 0700);
    CHECKF(gen_emit("", &src, &err) == 0, "%s", err.text);
    CHECK_STR(src, KERNEL "\n\n    x = 1;\n");
    free(src);
    write_script("printf '" KERNEL " SUBPLAN_X at_x\\n'", 0700);
    CHECKF(gen_emit("", &src, &err) == 0, "%s", err.text);
    CHECK_STR(src, KERNEL " SUBPLAN_X at_x\n");
    free(src);
}

/* ---- The real one ---------------------------------------------------------- */

static char *toy_params(void)
{
    static struct gen_plan p;
    const char *srcdir = getenv("srcdir");
    struct gen_model m;
    struct gen_gpu g;
    char path[512];

    snprintf(path, sizeof path, "%s/toy/toy-qwen3", srcdir ? srcdir : "tests");
    if (gen_model_read(path, &m, &err) || gen_gpu_read("h200", &g, &err) ||
        gen_plan_make(&m, &g, 0, NULL, NULL, &p, &err)) {
        fprintf(stderr, "%s\n", err.text);
        exit(1);
    }
    return gen_plan_params(&p);
}

/* PARAMS with the line that holds WORD replaced by LINE, which may be empty. */
static char *change(const char *params, const char *word, const char *line)
{
    const char *at = strstr(params, word), *end = at ? strchr(at, '\n') : NULL;
    char *out = NULL;

    CHECKF(at && end, "params.m4 has no %s", word);
    if (!at || !end)
        exit(1);
    while (at > params && at[-1] != '\n')
        at--;
    if (asprintf(&out, "%.*s%s%s", (int) (at - params), params, line, end + (*line == 0)) < 0)
        exit(1);
    return out;
}

static void change_fails(const char *params, const char *word, const char *line,
                         const char *message)
{
    char *text = change(params, word, line);

    fails(text, MK_ECOMPILE, message);
    free(text);
}

static int lines_before(const char *text, const char *word)
{
    const char *end = strstr(text, word);
    int n = 1;

    for (const char *c = text; end && c < end; c++)
        n += *c == '\n';
    return n;
}

static void test_places(const char *params)
{
    const int first = lines_before(params, "MODEL_D|");
    char want[200];

    fails("", MK_ECOMPILE,
          "templates/host/language.cu.m4:1: bad expression in eval: PLAN_HOST");
    change_fails(params, "{|MODEL_D|}", "",
                 "templates/preamble.cu.m4:1: MODEL_D is not in params.m4");
    change_fails(params, "{|PLAN_FLASH_N|}", "",
                 "templates/prefill.cu.m4:1: PLAN_FLASH_N is not in params.m4");
    snprintf(want, sizeof want, "params.m4:%d: divide by zero in eval: 1 / 0", first);
    change_fails(params, "{|MODEL_D|}", "m4_define({|MODEL_D|}, {|256|})m4_eval(1 / 0)m4_dnl",
                 want);
    snprintf(want, sizeof want, "params.m4:%d: ERROR: end of file in string", first);
    change_fails(params, "{|MODEL_D|}", "m4_define({|MODEL_D|}, {|256", want);
}

/* What expands to nothing known is found in the output; so are m4's shell and file builtins. */
static void test_leftover(const char *params)
{
    static const char *const words[] = {"PLAN_LENGTH", "m4_esyscmd(id)", "m4_syscmd(id)",
                                        "m4_include(/etc/passwd)", "m4_sinclude(/etc/passwd)"};
    char line[120], want[120], *src = NULL;

    CHECKF(gen_emit(params, &src, &err) == 0, "%s", err.text);
    for (size_t i = 0; src && i < sizeof words / sizeof *words; i++) {
        snprintf(line, sizeof line, "m4_define({|PLAN_CONTEXT|}, {|%s|})m4_dnl", words[i]);
        snprintf(want, sizeof want, "kernel.cu:%d: the macro %.*s was not expanded",
                 lines_before(src, "constexpr int CONTEXT ="), (int) strcspn(words[i], "("),
                 words[i]);
        change_fails(params, "{|PLAN_CONTEXT|}", line, want);
    }
    free(src);
}

static void test_same_twice(const char *params)
{
    char *a = NULL, *b = NULL, here[4096];

    CHECKF(gen_emit(params, &a, &err) == 0, "%s", err.text);
    /* Elsewhere, in another language, with m4's own variables set. */
    CHECK(getcwd(here, sizeof here) && chdir(dir) == 0);
    setenv("LC_ALL", "tr_TR.UTF-8", 1);
    setenv("POSIXLY_CORRECT", "1", 1);
    setenv("M4PATH", dir, 1);
    CHECKF(gen_emit(params, &b, &err) == 0, "%s", err.text);
    CHECK(a && b && strlen(a) > 50000 && !strcmp(a, b));
    unsetenv("LC_ALL"), unsetenv("POSIXLY_CORRECT"), unsetenv("M4PATH");
    CHECK(chdir(here) == 0);
    free(a), free(b);
}

/* A program that does not want to hear of its children. */
static void test_no_children(const char *params)
{
    char *src = NULL;

    signal(SIGCHLD, SIG_IGN);
    CHECKF(gen_emit(params, &src, &err) == 0, "%s", err.text);
    free(src);
    change_fails(params, "{|MODEL_D|}", "",
                 "templates/preamble.cu.m4:1: MODEL_D is not in params.m4");
    signal(SIGCHLD, SIG_DFL);
}

static void test_digest(void)
{
    const char *digest = gen_templates_digest();
    int n = 0;

    CHECK(strlen(digest) == 16 && strspn(digest, "0123456789abcdef") == 16);
    CHECK(gen_templates_digest() == digest);
    while (gen_templates[n].name)
        n++;
    CHECK(n > 10 && !strcmp(gen_templates[0].name, "templates/lib/base.m4"));
}

int main(void)
{
    char *params;

    CHECK(mkdtemp(dir) != NULL);
    snprintf(script, sizeof script, "%s/m4", dir);
    test_no_m4();
    test_no_path();
    test_ends();
    test_complaints();
    test_garbage();
    test_tidy();
    unsetenv("MK_M4");
    params = toy_params();
    CHECK(params != NULL);
    test_places(params);
    test_leftover(params);
    test_same_twice(params);
    test_no_children(params);
    test_digest();
    free(params);
    unlink(script);
    rmdir(dir);
    return check_done();
}
