/* added.c - see added.h. */
#include "runtime/added.h"

#include <stdlib.h>
#include <string.h>

#include "runtime/utf8.h"

enum { MAX_LEN = RT_MAX_SPELLED };  /* bytes: bounds the work per byte of text */

/* ---- Reading -------------------------------------------------------------------- */

static int read_flag(const struct gen_json *v, const char *key, int *out)
{
    const struct gen_json *b = gen_json_get(v, key);

    *out = 0;
    return b ? gen_json_bool(b, out) : 0;
}

static char *copy_of(const char *s, size_t len)
{
    char *c = malloc(len + 1);

    if (c) {
        memcpy(c, s, len);
        c[len] = 0;
    }
    return c;
}

/* Fill K from the list's element V. */
static int read_token(const struct gen_json *v, const char *name, int i, int nfc, int limit,
                      struct rt_added_token *k, struct mk_err *err)
{
    const char *text = gen_json_string(gen_json_get(v, "content"));
    int64_t id;

    if (!text || gen_json_int(gen_json_get(v, "id"), 0, INT32_MAX, &id))
        return gen_fail(err, MK_EFORMAT,
                        "%s: added_tokens[%d] must have an \"id\" and a \"content\"", name, i);
    if (id >= limit)
        return gen_fail(err, MK_EFORMAT, "%s: added_tokens[%d]: id %lld is not below the model's "
                        "vocab_size %d", name, i, (long long)id, limit);
    k->len = strlen(text);
    if (k->len == 0 || k->len > MAX_LEN)
        return gen_fail(err, MK_EFORMAT, "%s: added_tokens[%d]: a content of %zu bytes; 1 to %d "
                        "are taken", name, i, k->len, MAX_LEN);
    if (read_flag(v, "special", &k->special) || read_flag(v, "normalized", &k->normalized) ||
        read_flag(v, "single_word", &k->single_word) || read_flag(v, "lstrip", &k->lstrip) ||
        read_flag(v, "rstrip", &k->rstrip))
        return gen_fail(err, MK_EFORMAT,
                        "%s: added_tokens[%d]: a flag that is not true or false", name, i);
    k->id = (int32_t)id;
    k->text = k->pattern = copy_of(text, k->len);
    k->pattern_len = k->len;
    if (!k->text || (nfc && k->normalized &&
                     rt_utf8_nfc(k->text, k->len, &k->pattern, &k->pattern_len)))
        return gen_fail(err, MK_ENOMEM, "%s: not enough memory", name);
    return 0;
}

/* Enter K into the vocabulary: under the id that it has there, or a free one. */
static int enter(struct rt_vocab *v, const struct rt_added_token *k, const char *name, int i,
                 struct mk_err *err)
{
    int32_t known = rt_vocab_find_spelled(v, k->text, k->len);

    if (known >= 0 ? known != k->id : v->token[k->id].bytes != NULL)
        return gen_fail(err, MK_EFORMAT, "%s: added_tokens[%d]: id %d contradicts model.vocab or "
                        "another added token", name, i, k->id);
    if (known < 0)
        v->token[k->id] = (struct rt_token){k->text, (uint32_t)k->len, 0};
    v->token[k->id].special = k->special;
    return 0;
}

static int compare(const struct rt_added_token *a, const struct rt_added_token *b)
{
    size_t n = a->pattern_len < b->pattern_len ? a->pattern_len : b->pattern_len;
    int c = memcmp(a->pattern, b->pattern, n);

    if (c)
        return c;
    return (a->pattern_len > b->pattern_len) - (a->pattern_len < b->pattern_len);
}

static int compare_texts(const void *a, const void *b)
{
    return strcmp((*(const struct rt_added_token *const *)a)->text,
                  (*(const struct rt_added_token *const *)b)->text);
}

/* By pattern; of equal ones special tokens first, then as they stand in the file. */
static int compare_patterns(const void *a, const void *b)
{
    const struct rt_added_token *x = *(const struct rt_added_token *const *)a;
    const struct rt_added_token *y = *(const struct rt_added_token *const *)b;
    int c = compare(x, y);

    if (c)
        return c;
    if (x->special != y->special)
        return y->special - x->special;
    return (x > y) - (x < y);
}

static int make_set(const struct rt_added *a, int normalized, struct rt_added_set *set)
{
    int n = 0, kept = 0;

    set->token = malloc(((size_t)a->n + 1) * sizeof *set->token);
    if (!set->token)
        return MK_ENOMEM;
    for (int i = 0; i < a->n; i++)
        if (a->token[i].normalized == normalized)
            set->token[n++] = &a->token[i];
    qsort(set->token, (size_t)n, sizeof *set->token, compare_patterns);
    for (int i = 0; i < n; i++)
        if (i == 0 || compare(set->token[kept - 1], set->token[i]))
            set->token[kept++] = set->token[i];
    set->n = kept;
    for (int b = 0, i = 0; b <= 256; b++) {
        while (i < kept && (unsigned char)set->token[i]->pattern[0] < b)
            i++;
        set->first[b] = i;
    }
    return 0;
}

static int refuse_twice(const struct rt_added *a, const char *name, struct mk_err *err)
{
    const struct rt_added_token **all = malloc(((size_t)a->n + 1) * sizeof *all);
    int rc = 0;

    if (!all)
        return gen_fail(err, MK_ENOMEM, "%s: not enough memory", name);
    for (int i = 0; i < a->n; i++)
        all[i] = &a->token[i];
    qsort(all, (size_t)a->n, sizeof *all, compare_texts);
    for (int i = 1; i < a->n && rc == 0; i++)
        if (!strcmp(all[i - 1]->text, all[i]->text))
            rc = gen_fail(err, MK_EFORMAT, "%s: added_tokens[%d] and [%d] are the same token",
                          name, (int)(all[i - 1] - a->token), (int)(all[i] - a->token));
    free(all);
    return rc;
}

int rt_added_read(const struct gen_json *list, const char *name, int nfc, struct rt_vocab *v,
                  struct rt_added *a, struct mk_err *err)
{
    const struct gen_json *k = list ? gen_json_first(list) : NULL;
    int rc, i = 0;

    memset(a, 0, sizeof *a);
    if (list && !gen_json_is_array(list))
        return gen_fail(err, MK_EFORMAT, "%s: added_tokens must be a list", name);
    a->n = list ? gen_json_count(list) : 0;
    a->token = calloc((size_t)a->n + 1, sizeof *a->token);
    if (!a->token)
        return gen_fail(err, MK_ENOMEM, "%s: not enough memory", name);
    for (; k; k = gen_json_next(k), i++) {
        rc = read_token(k, name, i, nfc, v->limit, &a->token[i], err);
        if (rc)
            return rc;
    }
    rc = refuse_twice(a, name, err);
    for (i = 0; i < a->n && rc == 0; i++)
        rc = enter(v, &a->token[i], name, i, err);
    if (rc == 0 && (make_set(a, 0, &a->raw) || make_set(a, 1, &a->normalized)))
        rc = gen_fail(err, MK_ENOMEM, "%s: not enough memory", name);
    return rc;
}

void rt_added_free(struct rt_added *a)
{
    for (int i = 0; a->token && i < a->n; i++) {
        if (a->token[i].pattern != a->token[i].text)
            free(a->token[i].pattern);
        free(a->token[i].text);
    }
    free(a->token);
    free(a->raw.token);
    free(a->normalized.token);
    memset(a, 0, sizeof *a);
}

const struct rt_added_token *rt_added_find(const struct rt_added *a, const char *text)
{
    for (int i = 0; i < a->n; i++)
        if (!strcmp(a->token[i].text, text))
            return &a->token[i];
    return NULL;
}

/* ---- Finding --------------------------------------------------------------------- */

/* The first of token[lo] .. token[hi - 1], which agree in D bytes, with byte D >= C. */
static int lower_bound(const struct rt_added_set *set, int lo, int hi, size_t d, int c)
{
    while (lo < hi) {
        int mid = lo + (hi - lo) / 2;
        const struct rt_added_token *k = set->token[mid];

        if (k->pattern_len > d && (unsigned char)k->pattern[d] >= c)
            hi = mid;
        else
            lo = mid + 1;
    }
    return lo;
}

/* The longest token that TEXT begins with, or NULL. */
static const struct rt_added_token *match(const struct rt_added_set *set, const char *text,
                                          size_t len)
{
    const struct rt_added_token *best = NULL;
    int c = (unsigned char)text[0], lo = set->first[c], hi = set->first[c + 1];

    for (size_t d = 1; lo < hi; d++) {
        if (set->token[lo]->pattern_len == d)
            best = set->token[lo];
        if (d == len)
            break;
        c = (unsigned char)text[d];
        lo = lower_bound(set, lo, hi, d, c);
        hi = lower_bound(set, lo, hi, d, c + 1);
    }
    return best;
}

const struct rt_added_token *rt_added_next(const struct rt_added_set *set, const char *text,
                                           size_t len, size_t at, size_t *from)
{
    if (set->n == 0)
        return NULL;
    for (size_t i = at; i < len; i++) {
        const struct rt_added_token *k = match(set, text + i, len - i);

        if (k) {
            *from = i;
            return k;
        }
    }
    return NULL;
}
