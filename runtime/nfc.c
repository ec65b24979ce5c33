/* nfc.c - Unicode normal form C.  utf8proc has the tables and the composition; its own
   ordering of combining marks swaps neighbours, which is quadratic on hostile text, so
   the marks are ordered here by counting.

   The result is that of Hugging Face's tokenizers, whose tables are those of Unicode 9: a
   mark or a composition that is younger is an ordinary character there, and has to be one
   here, or a model would get tokens that it was not trained on. */
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "runtime/mk.h"
#include "runtime/utf8.h"

/* Below U+0300 nothing decomposes, composes or is reordered with its like. */
static int is_plain(const char *text, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if ((unsigned char)text[i] >= 0xCC)
            return 0;
    return 1;
}

/* What later versions (10 to 16) gave a combining class or a decomposition: whole blocks
   where all of it is new. */
static const struct { uint32_t from, to; } young[] = {
    {0x7FD, 0x7FD}, {0x897, 0x89F}, {0x8CA, 0x8D3}, {0x9FE, 0x9FE}, {0xC3C, 0xC3C},
    {0xD3B, 0xD3C}, {0xEBA, 0xEBA}, {0xECE, 0xECE}, {0x1715, 0x1715}, {0x1ABF, 0x1AFF},
    {0x1DF6, 0x1DFA}, {0xA82C, 0xA82C}, {0x105C0, 0x105FF}, {0x10D24, 0x10D27},
    {0x10D4E, 0x10D4E}, {0x10D69, 0x10D6D}, {0x10EAB, 0x10EAC}, {0x10EFA, 0x10EFF},
    {0x10F46, 0x10F50}, {0x10F82, 0x10F85}, {0x11070, 0x11070}, {0x1133B, 0x1133B},
    {0x11380, 0x113FF}, {0x1145E, 0x1145E}, {0x11839, 0x1183A}, {0x11900, 0x1195F},
    {0x119E0, 0x119E0}, {0x11A34, 0x11A34}, {0x11A47, 0x11A47}, {0x11A99, 0x11A99},
    {0x11D42, 0x11D42}, {0x11D44, 0x11D45}, {0x11D97, 0x11D97}, {0x11F41, 0x11F42},
    {0x16120, 0x1612F}, {0x16D40, 0x16D7F}, {0x16FF0, 0x16FF1}, {0x1E08F, 0x1E08F},
    {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF},
    {0x1E5EE, 0x1E5EF},
};

static int is_young(uint32_t c)
{
    size_t lo = 0, hi = sizeof young / sizeof *young;

    while (lo < hi) {
        size_t mid = (lo + hi) / 2;

        if (c > young[mid].to)
            lo = mid + 1;
        else if (c < young[mid].from)
            hi = mid;
        else
            return 1;
    }
    return 0;
}

/* The full canonical decomposition of TEXT, in the order of the text.  Free *OUT. */
static int decompose(const char *text, size_t len, utf8proc_int32_t **out, size_t *n)
{
    utf8proc_int32_t *c = NULL;
    size_t cap = 0, used = 0, i = 0;

    while (i < len) {
        utf8proc_ssize_t k = 0;
        uint32_t one;

        if (cap - used < 8) {
            utf8proc_int32_t *more = realloc(c, (cap = cap * 2 + len + 8) * sizeof *c);

            if (!more) {
                free(c);
                return MK_ENOMEM;
            }
            c = more;
        }
        i += (size_t)rt_utf8_get(text + i, &one);
        if (!is_young(one))
            k = utf8proc_decompose_char((utf8proc_int32_t)one, c + used, 8,
                                        UTF8PROC_DECOMPOSE | UTF8PROC_STABLE, NULL);
        if (k <= 0 || k > 8) {      /* or utf8proc does not take it: it stays as it is */
            c[used] = (utf8proc_int32_t)one;
            k = 1;
        }
        used += (size_t)k;
    }
    *out = c;
    *n = used;
    return 0;
}

static int class_of(utf8proc_int32_t c)
{
    return is_young((uint32_t)c) ? 0 : utf8proc_get_property(c)->combining_class & 0xFF;
}

/* Order the N marks at C by combining class, equal ones as they stand.  TMP holds N. */
static void order_marks(utf8proc_int32_t *c, size_t n, utf8proc_int32_t *tmp)
{
    size_t start[257] = {0};

    for (size_t i = 0; i < n; i++)
        start[class_of(c[i]) + 1]++;
    for (int k = 0; k < 256; k++)
        start[k + 1] += start[k];
    for (size_t i = 0; i < n; i++)
        tmp[start[class_of(c[i])]++] = c[i];
    memcpy(c, tmp, n * sizeof *c);
}

static int order_all(utf8proc_int32_t *c, size_t n)
{
    utf8proc_int32_t *tmp = malloc((n + 1) * sizeof *tmp);
    size_t i = 0;

    if (!tmp)
        return MK_ENOMEM;
    while (i < n) {
        size_t from = i;

        while (i < n && class_of(c[i]))
            i++;
        if (i - from > 1)
            order_marks(c + from, i - from, tmp);
        if (i == from)
            i++;
    }
    free(tmp);
    return 0;
}

/* Compose the N characters at C in place, but nothing with a young one; returns how many
   are left, or -1. */
static utf8proc_ssize_t compose(utf8proc_int32_t *c, size_t n)
{
    utf8proc_ssize_t used = 0;
    size_t i = 0;

    while (i < n) {
        size_t from = i;
        utf8proc_ssize_t k;

        while (i < n && !is_young((uint32_t)c[i]))
            i++;
        k = utf8proc_normalize_utf32(c + from, (utf8proc_ssize_t)(i - from),
                                     UTF8PROC_STABLE | UTF8PROC_COMPOSE);
        if (k < 0)
            return -1;
        memmove(c + used, c + from, (size_t)k * sizeof *c);
        used += k;
        if (i < n)
            c[used++] = c[i++];
    }
    return used;
}

int rt_utf8_nfc(const char *text, size_t len, char **out, size_t *out_len)
{
    utf8proc_int32_t *c = NULL;
    utf8proc_ssize_t k;
    size_t n = 0, used = 0;
    char *s;

    *out = (char *)text;
    *out_len = len;
    if (is_plain(text, len))
        return 0;
    if (decompose(text, len, &c, &n) || order_all(c, n)) {
        free(c);
        return MK_ENOMEM;
    }
    k = compose(c, n);
    s = k < 0 ? NULL : malloc((size_t)k * 4 + 1);
    if (s) {
        for (utf8proc_ssize_t i = 0; i < k; i++)
            used += (size_t)rt_utf8_put((uint32_t)c[i], s + used);
        *out = s;
        *out_len = used;
    }
    free(c);
    return s ? 0 : MK_ENOMEM;
}
