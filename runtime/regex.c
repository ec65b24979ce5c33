/* regex.c - see regex.h.

   The patterns are written for Oniguruma (Ruby's syntax).  rewrite() lets through what means
   the same in PCRE2, spells \s as the property that Oniguruma tests (PCRE2's own \s also
   takes U+180E), and refuses the rest by name.

   Work is bounded by PCRE2's match limit.  A match starts with a small one, which is enough
   for every sane pattern; when it runs out the match is tried again with 16 times as much,
   and that is taken from the budget of the text.  So a text of n bytes costs at most
   n * FIRST_LIMIT + budget steps, whatever the pattern. */
#include "runtime/regex.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

enum {
    MAX_PATTERN = 16384,            /* bytes; the longest in use has about 400 */
    FIRST_LIMIT = 512,
    LIMIT_STEP = 16,
    HEAP_KIB = 65536                /* of the interpreter, where there is no JIT */
};

struct rt_regex {
    pcre2_code *code;
    char where[256];
};

struct rt_regex_work {
    pcre2_match_data *data;
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
    uint64_t budget;
};

/* ---- From Oniguruma's spelling to PCRE2's ----------------------------------- */

struct rewrite {
    const char *p;          /* what is left of the pattern */
    char *out;
    size_t n;
    int in_class;
};

static void put(struct rewrite *w, const char *s, size_t len)
{
    memcpy(w->out + w->n, s, len);
    w->n += len;
}

/* Take LEN bytes of the pattern as they are. */
static const char *keep(struct rewrite *w, size_t len)
{
    put(w, w->p, len);
    w->p += len;
    return NULL;
}

static int is_letter(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

static int is_digit(char c)
{
    return c >= '0' && c <= '9';
}

/* \p{L}, \P{Lu}, \p{^N}: general categories only; scripts differ between the two. */
static const char *rewrite_property(struct rewrite *w)
{
    const char *p = w->p + 2;
    size_t n = 0;

    if (*p++ != '{')
        return "\\p without braces";
    if (*p == '^')
        p++;
    while (is_letter(p[n]))
        n++;
    if (n < 1 || n > 2 || p[n] != '}')
        return "a property that is no general category";
    return keep(w, (size_t)(p + n + 1 - w->p));
}

/* \x{1F600}, or \x7F and below: what is above is a lone byte to Oniguruma. */
static const char *rewrite_hex(struct rewrite *w)
{
    const char *p = w->p + 2;
    size_t n;

    if (*p == '{') {
        n = strspn(p + 1, "0123456789abcdefABCDEF");
        if (n < 1 || n > 6 || p[n + 1] != '}')
            return "a malformed \\x{...}";
        return keep(w, n + 4);
    }
    if (*p < '0' || *p > '7' || !strchr("0123456789abcdefABCDEF", p[1]) || !p[1])
        return "\\x without braces above 7F";
    return keep(w, 4);
}

static const char *rewrite_escape(struct rewrite *w)
{
    char c = w->p[1];

    switch (c) {
    case 's':
    case 'S':
        put(w, c == 's' ? "\\p{White_Space}" : "\\P{White_Space}", 15);
        w->p += 2;
        return NULL;
    case 'p':
    case 'P':
        return rewrite_property(w);
    case 'x':
        return rewrite_hex(w);
    case 'd': case 'D': case 'r': case 'n': case 't': case 'f':
        return keep(w, 2);
    default:
        if (c > ' ' && c < 0x7F && !is_letter(c) && !is_digit(c))
            return keep(w, 2);
        return "an escape other than \\s \\d \\p \\x \\r \\n \\t \\f and their like";
    }
}

static const char *rewrite_group(struct rewrite *w)
{
    static const char *const known[] = {"(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!", "(?>"};

    if (w->p[1] == '*')
        return "a verb (*...)";
    if (w->p[1] != '?')
        return keep(w, 1);
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strncmp(w->p, known[i], strlen(known[i])))
            return keep(w, strlen(known[i]));
    return "a group other than (?: (?i: (?= (?! (?<= (?<! (?>";
}

/* {2}, {2,}, {2,4}.  What follows must not make it lazy or possessive: Ruby reads that as a
   second repetition. */
static const char *rewrite_interval(struct rewrite *w)
{
    const char *p = w->p + 1;

    if (!is_digit(*p))
        return "a { that is no {n}, {n,} or {n,m}";
    p += strspn(p, "0123456789");
    if (*p == ',')
        p += 1 + strspn(p + 1, "0123456789");
    if (*p != '}')
        return "a { that is no {n}, {n,} or {n,m}";
    if (p[1] == '+' || p[1] == '?')
        return "a lazy or possessive {n,m}";
    return keep(w, (size_t)(p + 1 - w->p));
}

static const char *rewrite_in_class(struct rewrite *w)
{
    if (*w->p == '[')
        return "a [ inside [...]";
    if (w->p[0] == '&' && w->p[1] == '&')
        return "&& inside [...]";
    if (*w->p == ']')
        w->in_class = 0;
    return keep(w, 1);
}

static const char *rewrite_one(struct rewrite *w)
{
    size_t n;

    if (*w->p == '\\')
        return rewrite_escape(w);
    if (w->in_class)
        return rewrite_in_class(w);
    switch (*w->p) {
    case '[':
        w->in_class = 1;
        n = w->p[1] == '^' ? 2 : 1;
        return w->p[n] == ']' ? "an empty [...]" : keep(w, n);
    case '(':
        return rewrite_group(w);
    case '{':
        return rewrite_interval(w);
    case '^':
    case '$':
        return "an anchor ^ or $";
    default:
        return keep(w, 1);
    }
}

/* OUT has room for 8 bytes per byte of PATTERN.  Returns what is refused, or NULL. */
static const char *rewrite(const char *pattern, char *out, size_t *len)
{
    struct rewrite w = {.p = pattern, .out = out};
    const char *refused = NULL;

    while (*w.p && !refused)
        refused = rewrite_one(&w);
    *len = w.n;
    return refused;
}

/* ---- Compiling ----------------------------------------------------------------- */

static int compile(struct rt_regex *r, const char *pattern, size_t len, int literal,
                   struct mk_err *err)
{
    pcre2_compile_context *context = pcre2_compile_context_create(NULL);
    PCRE2_UCHAR text[128];
    PCRE2_SIZE at = 0;
    int code = 0;

    if (!context)
        return gen_fail(err, MK_ENOMEM, "%s: not enough memory", r->where);
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    pcre2_set_parens_nest_limit(context, 32);
    r->code = pcre2_compile((PCRE2_SPTR)pattern, len,
                            literal ? PCRE2_UTF | PCRE2_LITERAL : PCRE2_UTF | PCRE2_UCP,
                            &code, &at, context);
    pcre2_compile_context_free(context);
    if (!r->code) {
        pcre2_get_error_message(code, text, sizeof text);
        return gen_fail(err, MK_EFORMAT, "%s: malformed pattern: %s", r->where,
                        (const char *)text);
    }
    pcre2_jit_compile(r->code, PCRE2_JIT_COMPLETE);     /* without it: slower, the same */
    return 0;
}

int rt_regex_make(const char *pattern, int literal, const char *where, struct rt_regex **out,
                  struct mk_err *err)
{
    size_t len = strlen(pattern);
    const char *refused = NULL;
    struct rt_regex *r;
    char *text;
    int rc;

    *out = NULL;
    if (len == 0 || len > MAX_PATTERN)
        return gen_fail(err, MK_EFORMAT, "%s: a pattern of %zu bytes; 1 to %d are taken", where,
                        len, MAX_PATTERN);
    r = calloc(1, sizeof *r);
    text = malloc(len * 8 + 1);
    if (!r || !text) {
        free(r);
        free(text);
        return gen_fail(err, MK_ENOMEM, "%s: not enough memory", where);
    }
    snprintf(r->where, sizeof r->where, "%s", where);
    if (literal)
        memcpy(text, pattern, len);
    else
        refused = rewrite(pattern, text, &len);
    if (refused)
        rc = gen_fail(err, MK_EUNSUPPORTED, "%s: the pattern has %s, which is not handled",
                      where, refused);
    else
        rc = compile(r, text, len, literal, err);
    free(text);
    if (rc)
        rt_regex_free(r);
    else
        *out = r;
    return rc;
}

void rt_regex_free(struct rt_regex *r)
{
    if (!r)
        return;
    pcre2_code_free(r->code);
    free(r);
}

/* ---- Matching -------------------------------------------------------------------- */

struct rt_regex_work *rt_regex_work_make(void)
{
    struct rt_regex_work *w = calloc(1, sizeof *w);

    if (!w)
        return NULL;
    w->data = pcre2_match_data_create(1, NULL);
    w->context = pcre2_match_context_create(NULL);
    if (!w->data || !w->context) {
        rt_regex_work_free(w);
        return NULL;
    }
    w->stack = pcre2_jit_stack_create(32 * 1024, 4 * 1024 * 1024, NULL);
    if (w->stack)                   /* without: the 32 KiB of the machine's stack */
        pcre2_jit_stack_assign(w->context, NULL, w->stack);
    pcre2_set_heap_limit(w->context, HEAP_KIB);
    return w;
}

void rt_regex_work_free(struct rt_regex_work *w)
{
    if (!w)
        return;
    pcre2_match_data_free(w->data);
    pcre2_match_context_free(w->context);
    pcre2_jit_stack_free(w->stack);
    free(w);
}

void rt_regex_budget(struct rt_regex_work *w, size_t len)
{
    w->budget = 20000000 + 64 * (uint64_t)len;
}

int rt_regex_find(const struct rt_regex *r, struct rt_regex_work *w, const char *text, size_t len,
                  size_t at, size_t *from, size_t *to, struct mk_err *err)
{
    uint32_t limit = FIRST_LIMIT, options = PCRE2_NO_UTF_CHECK;
    int rc;

    for (;;) {
        pcre2_set_match_limit(w->context, limit);
        rc = pcre2_match(r->code, (PCRE2_SPTR)text, len, at, options, w->data, w->context);
        if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {
            options |= PCRE2_NO_JIT;
            continue;
        }
        if (rc != PCRE2_ERROR_MATCHLIMIT || w->budget < (uint64_t)limit * LIMIT_STEP)
            break;
        limit *= LIMIT_STEP;
        w->budget -= limit;
    }
    if (rc == PCRE2_ERROR_NOMATCH)
        return 0;
    if (rc < 0)
        return rc == PCRE2_ERROR_NOMEMORY
                   ? gen_fail(err, MK_ENOMEM, "%s: not enough memory to match", r->where)
                   : gen_fail(err, MK_EFORMAT, "%s: the pattern takes too many steps on this text",
                              r->where);
    *from = pcre2_get_ovector_pointer(w->data)[0];
    *to = pcre2_get_ovector_pointer(w->data)[1];
    return 1;
}
