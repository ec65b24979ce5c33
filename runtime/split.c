/* split.c - see split.h.  Each step hands its pieces to the next one at once. */
#include "runtime/split.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "runtime/regex.h"
#include "runtime/utf8.h"

enum { MAX_STEPS = 16 };

enum kind {
    STEP_SPLIT,         /* cut at the matches of a pattern */
    STEP_DIGITS,        /* cut around each digit, or around runs of them */
    STEP_PREFIX         /* ByteLevel's add_prefix_space: a piece must begin with a space */
};

struct step {
    enum kind kind;
    struct rt_regex *regex;     /* STEP_SPLIT */
    int drop_matches;           /* STEP_SPLIT: do not hand them on */
    int drop_gaps;              /* STEP_SPLIT: nor what is between */
    int each;                   /* STEP_DIGITS: one by one */
};

struct rt_split {
    struct step step[MAX_STEPS];
    int n;
};

struct rt_split_work {
    struct rt_regex_work *regex;
    char *prefixed;             /* [cap] a piece with its space */
    size_t cap;
};

/* ByteLevel's own pattern, the one of GPT-2 */
static const char byte_level[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

/* ---- Reading the description -------------------------------------------------- */

struct reader {
    struct rt_split *s;
    const char *name;
    struct mk_err *err;
    int ended;                  /* a ByteLevel was there */
    int depth;
};

static struct step *add_step(struct reader *r, enum kind kind)
{
    struct step *s = NULL;

    if (r->s->n < MAX_STEPS) {
        s = &r->s->step[r->s->n++];
        s->kind = kind;
    } else {
        gen_fail(r->err, MK_EUNSUPPORTED, "%s: pre_tokenizer has more than %d steps", r->name,
                 MAX_STEPS);
    }
    return s;
}

static int need_bool(struct reader *r, const struct gen_json *v, const char *key, int absent,
                     int *out)
{
    const struct gen_json *b = gen_json_get(v, key);

    *out = absent;
    if (b ? gen_json_bool(b, out) : absent < 0)
        return gen_fail(r->err, MK_EFORMAT, "%s: pre_tokenizer: \"%s\" must be true or false",
                        r->name, key);
    return 0;
}

static int make_regex(struct reader *r, struct step *s, const char *pattern, int literal)
{
    char where[256];

    snprintf(where, sizeof where, "%.220s: pre_tokenizer", r->name);
    return rt_regex_make(pattern, literal, where, &s->regex, r->err);
}

static int read_behavior(struct reader *r, const struct gen_json *v, struct step *s)
{
    const char *behavior = gen_json_string(gen_json_get(v, "behavior"));
    int invert, rc = need_bool(r, v, "invert", 0, &invert);

    if (rc)
        return rc;
    if (!behavior)
        return gen_fail(r->err, MK_EFORMAT, "%s: pre_tokenizer: \"behavior\" must be a string",
                        r->name);
    if (!strcmp(behavior, "Removed")) {
        s->drop_matches = !invert;
        s->drop_gaps = invert;
    } else if (strcmp(behavior, "Isolated")) {
        return gen_fail(r->err, MK_EUNSUPPORTED, "%s: pre_tokenizer: the behavior \"%.40s\" is "
                        "not handled, only Isolated and Removed", r->name, behavior);
    }
    return 0;
}

static int read_split(struct reader *r, const struct gen_json *v)
{
    const struct gen_json *pattern = gen_json_get(v, "pattern");
    const char *regex = gen_json_string(gen_json_get(pattern, "Regex"));
    const char *plain = gen_json_string(gen_json_get(pattern, "String"));
    struct step *s = add_step(r, STEP_SPLIT);
    int rc;

    if (!s)
        return MK_EUNSUPPORTED;
    if (!regex == !plain)
        return gen_fail(r->err, MK_EFORMAT, "%s: pre_tokenizer: \"pattern\" must be "
                        "{\"Regex\": ...} or {\"String\": ...}", r->name);
    rc = read_behavior(r, v, s);
    return rc ? rc : make_regex(r, s, regex ? regex : plain, !regex);
}

static int read_digits(struct reader *r, const struct gen_json *v)
{
    struct step *s = add_step(r, STEP_DIGITS);

    return s ? need_bool(r, v, "individual_digits", -1, &s->each) : MK_EUNSUPPORTED;
}

static int read_byte_level(struct reader *r, const struct gen_json *v)
{
    int prefix, use_regex, rc = need_bool(r, v, "add_prefix_space", -1, &prefix);
    struct step *s;

    if (rc == 0)
        rc = need_bool(r, v, "use_regex", 1, &use_regex);
    if (rc)
        return rc;
    r->ended = 1;
    if (prefix && !add_step(r, STEP_PREFIX))
        return MK_EUNSUPPORTED;
    if (!use_regex)
        return 0;
    s = add_step(r, STEP_SPLIT);
    return s ? make_regex(r, s, byte_level, 0) : MK_EUNSUPPORTED;
}

static int read_step(struct reader *r, const struct gen_json *v);

static int read_sequence(struct reader *r, const struct gen_json *v)
{
    const struct gen_json *list = gen_json_get(v, "pretokenizers"), *i;
    int rc = 0;

    if (!gen_json_is_array(list))
        return gen_fail(r->err, MK_EFORMAT, "%s: pre_tokenizer: \"pretokenizers\" must be a list",
                        r->name);
    if (++r->depth > 4)
        return gen_fail(r->err, MK_EUNSUPPORTED, "%s: pre_tokenizer: Sequences too deep",
                        r->name);
    for (i = gen_json_first(list); i && rc == 0; i = gen_json_next(i))
        rc = read_step(r, i);
    r->depth--;
    return rc;
}

static int read_step(struct reader *r, const struct gen_json *v)
{
    const char *type = gen_json_string(gen_json_get(v, "type"));

    if (!type)
        return gen_fail(r->err, MK_EFORMAT, "%s: pre_tokenizer: \"type\" must be a string",
                        r->name);
    if (!strcmp(type, "Sequence"))
        return read_sequence(r, v);
    if (r->ended)
        return gen_fail(r->err, MK_EUNSUPPORTED,
                        "%s: pre_tokenizer: a step after ByteLevel is not handled", r->name);
    if (!strcmp(type, "Split"))
        return read_split(r, v);
    if (!strcmp(type, "Digits"))
        return read_digits(r, v);
    if (!strcmp(type, "ByteLevel"))
        return read_byte_level(r, v);
    return gen_fail(r->err, MK_EUNSUPPORTED, "%s: pre_tokenizer: the type \"%.40s\" is not "
                    "handled, only Split, Digits, ByteLevel and Sequence", r->name, type);
}

int rt_split_make(const struct gen_json *pre, const char *name, struct rt_split **out,
                  struct mk_err *err)
{
    struct reader r = {.name = name, .err = err};
    int rc = 0;

    *out = NULL;
    r.s = calloc(1, sizeof *r.s);
    if (!r.s)
        return gen_fail(err, MK_ENOMEM, "%s: not enough memory", name);
    if (pre && !gen_json_is_null(pre))
        rc = read_step(&r, pre);
    if (rc == 0 && !r.ended)
        rc = gen_fail(err, MK_EUNSUPPORTED, "%s: pre_tokenizer has no ByteLevel: only byte-level "
                      "BPE is handled", name);
    if (rc)
        rt_split_free(r.s);
    else
        *out = r.s;
    return rc;
}

void rt_split_free(struct rt_split *s)
{
    if (!s)
        return;
    for (int i = 0; i < s->n; i++)
        rt_regex_free(s->step[i].regex);
    free(s);
}

/* ---- Cutting ------------------------------------------------------------------- */

int rt_split_work_make(struct rt_split_work **out, struct mk_err *err)
{
    struct rt_split_work *w = calloc(1, sizeof *w);

    *out = NULL;
    if (w)
        w->regex = rt_regex_work_make();
    if (!w || !w->regex) {
        rt_split_work_free(w);
        return gen_fail(err, MK_ENOMEM, "not enough memory to encode text");
    }
    *out = w;
    return 0;
}

void rt_split_work_free(struct rt_split_work *w)
{
    if (!w)
        return;
    rt_regex_work_free(w->regex);
    free(w->prefixed);
    free(w);
}

struct run {
    const struct rt_split *s;
    struct rt_split_work *w;
    rt_piece_fn *fn;
    void *user;
    struct mk_err *err;
};

static int run_step(const struct run *r, int i, const char *text, size_t len);

/* As Oniguruma's find_iter: an empty match right behind the last one does not count; any
   other empty one cuts the text where it is. */
static int cut_at_matches(const struct run *r, int i, const char *text, size_t len)
{
    const struct step *s = &r->s->step[i];
    size_t at = 0, done = 0, from, to;
    int rc, matched = 0;

    while (at <= len) {
        uint32_t c;

        rc = rt_regex_find(s->regex, r->w->regex, text, len, at, &from, &to, r->err);
        if (rc < 0)
            return rc;
        if (rc == 0)
            break;
        if (from == to && matched && from == done) {
            if (from == len)
                break;
            at = from + (size_t)rt_utf8_get(text + from, &c);
            continue;
        }
        rc = s->drop_gaps ? 0 : run_step(r, i + 1, text + done, from - done);
        if (rc == 0 && !s->drop_matches)
            rc = run_step(r, i + 1, text + from, to - from);
        if (rc)
            return rc;
        matched = 1;
        at = done = to;
    }
    return s->drop_gaps ? 0 : run_step(r, i + 1, text + done, len - done);
}

static int is_numeric(uint32_t c)
{
    utf8proc_category_t k = utf8proc_category((utf8proc_int32_t)c);

    return k == UTF8PROC_CATEGORY_ND || k == UTF8PROC_CATEGORY_NL || k == UTF8PROC_CATEGORY_NO;
}

static int cut_at_digits(const struct run *r, int i, const char *text, size_t len)
{
    size_t at = 0, from = 0;
    int was = 0, rc;

    while (at < len) {
        uint32_t c;
        int n = rt_utf8_get(text + at, &c), is = is_numeric(c);

        if (is != was || (is && r->s->step[i].each)) {
            rc = run_step(r, i + 1, text + from, at - from);
            if (rc)
                return rc;
            from = at;
        }
        was = is;
        at += (size_t)n;
    }
    return run_step(r, i + 1, text + from, len - from);
}

/* Only one such step exists, and what comes after it reads the copy: no need for two. */
static int put_prefix(const struct run *r, int i, const char *text, size_t len)
{
    struct rt_split_work *w = r->w;

    if (text[0] == ' ')
        return run_step(r, i + 1, text, len);
    if (w->cap < len + 1) {
        free(w->prefixed);
        w->cap = 0;
        w->prefixed = malloc(len + 1 + len / 2);
        if (!w->prefixed)
            return gen_fail(r->err, MK_ENOMEM, "not enough memory to encode text");
        w->cap = len + 1 + len / 2;
    }
    w->prefixed[0] = ' ';
    memcpy(w->prefixed + 1, text, len);
    return run_step(r, i + 1, w->prefixed, len + 1);
}

static int run_step(const struct run *r, int i, const char *text, size_t len)
{
    if (len == 0)
        return 0;
    if (i == r->s->n)
        return r->fn(r->user, text, len);
    switch (r->s->step[i].kind) {
    case STEP_SPLIT:
        return cut_at_matches(r, i, text, len);
    case STEP_DIGITS:
        return cut_at_digits(r, i, text, len);
    default:
        return put_prefix(r, i, text, len);
    }
}

int rt_split_run(const struct rt_split *s, struct rt_split_work *w, const char *text, size_t len,
                 rt_piece_fn *fn, void *user, struct mk_err *err)
{
    struct run r = {s, w, fn, user, err};

    rt_regex_budget(w->regex, len);
    return run_step(&r, 0, text, len);
}
