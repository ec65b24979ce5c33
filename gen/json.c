/* json.c - see json.h.  cJSON builds the tree; what it is lax about is checked here first:
   it takes any byte <= 32 for white space, raw control characters and bytes that are not
   UTF-8 in strings, \u0000 (which would cut a C string short), numbers such as 01 and 1.,
   duplicate keys, 1000 levels; and it looks keys up without regard to case. */
#include "gen/json.h"
#include <cjson/cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utf8proc.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

enum {
    MAX_DEPTH = 64,             /* json.h */
    MAX_NUMBER = 63             /* cJSON 1.7 copies a number into 64 bytes */
};

struct scan {
    const unsigned char *text;
    size_t len, at;             /* AT is the byte under inspection */
    int depth;                  /* brackets open at AT */
    const char *name;
    struct mk_err *err;
};

/* Fail at byte AT of the text; the column counts characters, both from 1. */
static int fail_at(const struct scan *s, size_t at, const char *what)
{
    size_t line = 1, column = 1;

    for (size_t i = 0; i < at; i++) {
        if (s->text[i] == '\n') {
            line++;
            column = 1;
        } else if ((s->text[i] & 0xc0) != 0x80) {
            column++;
        }
    }
    return gen_fail(s->err, MK_EFORMAT, "%s: line %zu, column %zu: %s", s->name, line, column,
                    what);
}

/* At a byte >= 0x80; leaves AT behind the character. */
static int scan_utf8(struct scan *s)
{
    utf8proc_int32_t code;
    utf8proc_ssize_t n = utf8proc_iterate(s->text + s->at, (utf8proc_ssize_t)(s->len - s->at),
                                          &code);

    if (n < 1)
        return fail_at(s, s->at, "not UTF-8");
    s->at += (size_t)n;
    return 0;
}

/* At the opening quote; leaves AT behind the closing one. */
static int scan_string(struct scan *s)
{
    size_t start = s->at++;

    while (s->at < s->len && s->text[s->at] != '"') {
        unsigned char c = s->text[s->at];

        if (c >= 0x80) {
            if (scan_utf8(s))
                return MK_EFORMAT;
        } else if (c < 0x20) {
            return fail_at(s, s->at, "a control character inside a string");
        } else if (c != '\\') {
            s->at++;
        } else if (s->len - s->at >= 6 && !memcmp(s->text + s->at, "\\u0000", 6)) {
            return fail_at(s, s->at, "the character \\u0000 inside a string");
        } else {
            s->at++;                    /* what is escaped is never the end of the string */
            s->at += s->at < s->len && s->text[s->at] < 0x80 && s->text[s->at] >= 0x20;
        }
    }
    if (s->at >= s->len)
        return fail_at(s, start, "a string that does not end");
    s->at++;
    return 0;
}

static void skip_digits(struct scan *s)
{
    while (s->at < s->len && s->text[s->at] >= '0' && s->text[s->at] <= '9')
        s->at++;
}

static int next_is(const struct scan *s, const char *any)
{
    return s->at < s->len && s->text[s->at] && strchr(any, s->text[s->at]);
}

/* At '-' or a digit; -?(0|[1-9][0-9]*)(.[0-9]+)?([eE][+-]?[0-9]+)? */
static int scan_number(struct scan *s)
{
    size_t start = s->at;
    int bad;

    if (next_is(s, "-"))
        s->at++;
    bad = !next_is(s, "0123456789");
    if (next_is(s, "0"))
        s->at++;
    else
        skip_digits(s);
    if (next_is(s, ".")) {
        s->at++;
        bad |= !next_is(s, "0123456789");
        skip_digits(s);
    }
    if (next_is(s, "eE")) {
        s->at++;
        if (next_is(s, "+-"))
            s->at++;
        bad |= !next_is(s, "0123456789");
        skip_digits(s);
    }
    if (bad || next_is(s, "0123456789.+-eE"))
        return fail_at(s, start, "not a number of JSON");
    if (s->at - start > MAX_NUMBER)
        return fail_at(s, start, "a number of more than 63 characters");
    return 0;
}

/* The checks that cJSON does not make; the grammar itself is left to cJSON. */
static int scan(struct scan *s)
{
    int rc = 0;

    if (s->len >= 3 && !memcmp(s->text, "\xef\xbb\xbf", 3))
        s->at = 3;                      /* a byte order mark, as some editors write */
    while (rc == 0 && s->at < s->len) {
        unsigned char c = s->text[s->at];

        if (c == '"') {
            rc = scan_string(s);
        } else if (c == '-' || (c >= '0' && c <= '9')) {
            rc = scan_number(s);
        } else if (c >= 0x80) {
            rc = scan_utf8(s);          /* for cJSON to refuse if it is a character */
        } else if (c < 0x20 && c != '\t' && c != '\n' && c != '\r') {
            rc = fail_at(s, s->at, "a control character");
        } else {
            if (c == '{' || c == '[')
                s->depth++;
            else if (c == '}' || c == ']')
                s->depth--;
            if (s->depth > MAX_DEPTH)
                rc = fail_at(s, s->at, "nested deeper than 64 levels");
            s->at++;
        }
    }
    return rc;
}

/* A set of keys, open addressing; the hash is seeded so that nobody can prepare collisions. */
struct key_set {
    const char **slot;
    size_t mask;
    uint64_t seed;
};

/* 1 if KEY was there, else 0 and it is now. */
static int key_set_add(struct key_set *set, const char *key)
{
    size_t i = XXH3_64bits_withSeed(key, strlen(key), set->seed) & set->mask;

    for (; set->slot[i]; i = (i + 1) & set->mask) {
        if (!strcmp(set->slot[i], key))
            return 1;
    }
    set->slot[i] = key;
    return 0;
}

static int duplicate_key(const cJSON *object, int n, const char *name, struct mk_err *err)
{
    struct key_set set = {NULL, 16, 0};
    const cJSON *item;
    int rc = 0;

    while (set.mask < 2 * (size_t)n)
        set.mask *= 2;
    set.slot = calloc(set.mask, sizeof(*set.slot));
    if (!set.slot)
        return gen_fail(err, MK_ENOMEM, "%s: no memory for %d keys", name, n);
    set.mask--;
    set.seed = (uint64_t)(uintptr_t)set.slot ^ (uint64_t)(uintptr_t)&set;
    for (item = object->child; item && rc == 0; item = item->next) {
        if (key_set_add(&set, item->string))
            rc = gen_fail(err, MK_EFORMAT, "%s: key \"%.200s\" stands twice in one object", name,
                          item->string);
    }
    free(set.slot);
    return rc;
}

/* Look through V and what it holds (at most MAX_DEPTH levels) for duplicate keys. */
static int check_keys(const cJSON *v, const char *name, struct mk_err *err)
{
    const cJSON *item;
    int rc = 0, n = 0;

    for (item = v->child; item && rc == 0; item = item->next) {
        n++;
        if (item->child)
            rc = check_keys(item, name, err);
    }
    if (rc == 0 && n > 1 && cJSON_IsObject(v))
        rc = duplicate_key(v, n, name, err);
    return rc;
}

static const char *skip_space(const char *from, const char *end)
{
    while (from < end && (*from == ' ' || *from == '\t' || *from == '\r' || *from == '\n'))
        from++;
    return from;
}

int gen_json_parse(const char *text, size_t len, const char *name,
                   struct gen_json **out, struct mk_err *err)
{
    struct scan s = {(const unsigned char *)text, len, 0, 0, name, err};
    const char *end = text, *all = text + len;
    cJSON *root;
    int rc;

    *out = NULL;
    if (skip_space(text, all) == all)
        return gen_fail(err, MK_EFORMAT, "%s: empty, expected JSON", name);
    rc = scan(&s);
    if (rc)
        return rc;
    errno = 0;
    root = cJSON_ParseWithLengthOpts(text, len, &end, 0);
    if (!root && errno == ENOMEM)
        return gen_fail(err, MK_ENOMEM, "%s: no memory for %zu bytes of JSON", name, len);
    if (!root && s.depth > 0 && skip_space(end + 1, all) >= all)
        return fail_at(&s, len, "the JSON ends too early");
    if (!root)
        return fail_at(&s, (size_t)(end - text), "not JSON");
    end = skip_space(end, all);
    if (end < all)
        rc = fail_at(&s, (size_t)(end - text), "something follows the end of the JSON");
    if (rc == 0)
        rc = check_keys(root, name, err);
    if (rc)
        cJSON_Delete(root);
    else
        *out = (struct gen_json *)root;
    return rc;
}

/* Read up to CAP bytes of FD; *LEN tells how many. */
static int read_all(int fd, char *buf, size_t cap, size_t *len)
{
    ssize_t n = 1;

    *len = 0;
    while (*len < cap && n > 0) {
        n = read(fd, buf + *len, cap - *len);
        if (n < 0 && errno == EINTR)
            n = 1;
        else if (n > 0)
            *len += (size_t)n;
    }
    return n < 0 ? -1 : 0;
}

int gen_json_read(const char *path, size_t max_bytes, struct gen_json **out, struct mk_err *err)
{
    struct stat st;
    char *text = NULL;
    size_t len;
    int rc, fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);   /* do not wait for a FIFO */

    *out = NULL;
    if (fd < 0)
        return gen_fail(err, errno == ENOENT || errno == ENOTDIR ? MK_ENOENT : MK_EIO,
                        "%s: cannot open: %s", path, strerror(errno));
    if (fstat(fd, &st))
        rc = gen_fail(err, MK_EIO, "%s: cannot stat: %s", path, strerror(errno));
    else if (!S_ISREG(st.st_mode))
        rc = gen_fail(err, MK_EIO, "%s: not a regular file", path);
    else if ((uint64_t)st.st_size > max_bytes)
        rc = gen_fail(err, MK_EFORMAT, "%s: %lld bytes; at most %zu are read", path,
                      (long long)st.st_size, max_bytes);
    else if (!(text = malloc((size_t)st.st_size + 1)))
        rc = gen_fail(err, MK_ENOMEM, "%s: no memory for %lld bytes", path,
                      (long long)st.st_size);
    else if (read_all(fd, text, (size_t)st.st_size, &len))
        rc = gen_fail(err, MK_EIO, "%s: cannot read: %s", path, strerror(errno));
    else
        rc = gen_json_parse(text, len, path, out, err);
    close(fd);
    free(text);
    return rc;
}

void gen_json_free(struct gen_json *root)
{
    cJSON_Delete((cJSON *)root);
}

static const cJSON *in(const struct gen_json *v)
{
    return (const cJSON *)v;
}

static const struct gen_json *ex(const cJSON *v)
{
    return (const struct gen_json *)v;
}

const struct gen_json *gen_json_get(const struct gen_json *object, const char *key)
{
    return gen_json_is_object(object) ? ex(cJSON_GetObjectItemCaseSensitive(in(object), key))
                                      : NULL;
}

const struct gen_json *gen_json_first(const struct gen_json *array_or_object)
{
    return gen_json_is_object(array_or_object) || gen_json_is_array(array_or_object)
               ? ex(in(array_or_object)->child) : NULL;
}

const struct gen_json *gen_json_next(const struct gen_json *item)
{
    return item ? ex(in(item)->next) : NULL;
}

const char *gen_json_key(const struct gen_json *item)
{
    return item ? in(item)->string : NULL;
}

int gen_json_count(const struct gen_json *array_or_object)
{
    const struct gen_json *item;
    int n = 0;

    for (item = gen_json_first(array_or_object); item; item = gen_json_next(item))
        n++;
    return n;
}

int gen_json_is_object(const struct gen_json *v)
{
    return cJSON_IsObject(in(v));
}

int gen_json_is_array(const struct gen_json *v)
{
    return cJSON_IsArray(in(v));
}

int gen_json_is_null(const struct gen_json *v)
{
    return cJSON_IsNull(in(v));
}

int gen_json_is_number(const struct gen_json *v)
{
    return cJSON_IsNumber(in(v));
}

const char *gen_json_string(const struct gen_json *v)
{
    return cJSON_IsString(in(v)) ? in(v)->valuestring : NULL;
}

int gen_json_bool(const struct gen_json *v, int *out)
{
    if (!cJSON_IsBool(in(v)))
        return -1;
    *out = cJSON_IsTrue(in(v)) ? 1 : 0;
    return 0;
}

int gen_json_int(const struct gen_json *v, int64_t lo, int64_t hi, int64_t *out)
{
    double d;

    /* cJSON keeps doubles: from 2^53 on, one may stand for a neighbouring integer. */
    if (gen_json_double(v, &d) || d != floor(d) || fabs(d) >= 9007199254740992.0)
        return -1;
    if ((int64_t)d < lo || (int64_t)d > hi)
        return -1;
    *out = (int64_t)d;
    return 0;
}

int gen_json_double(const struct gen_json *v, double *out)
{
    if (!cJSON_IsNumber(in(v)) || !isfinite(in(v)->valuedouble))
        return -1;
    *out = in(v)->valuedouble;
    return 0;
}
