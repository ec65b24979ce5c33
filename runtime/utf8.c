/* utf8.c - checking and walking UTF-8, and handing it out in whole characters. */
#include "runtime/utf8.h"

#include <string.h>
#include <utf8proc.h>

#include "runtime/tokenizer.h"

/* Length of the character that the byte C starts; 0 if none starts with it. */
static int lead_len(unsigned char c)
{
    if (c < 0x80)
        return 1;
    if (c >= 0xC2 && c <= 0xDF)
        return 2;
    if (c >= 0xE0 && c <= 0xEF)
        return 3;
    return c >= 0xF0 && c <= 0xF4 ? 4 : 0;
}

/* Can C stand at place AT (1 to 3) of a character that starts with LEAD?  The second byte
   has narrower ranges: no overlong forms, no surrogates, nothing past U+10FFFF. */
static int may_follow(unsigned char lead, int at, unsigned char c)
{
    unsigned char lo = 0x80, hi = 0xBF;

    if (at == 1) {
        if (lead == 0xE0)
            lo = 0xA0;
        else if (lead == 0xED)
            hi = 0x9F;
        else if (lead == 0xF0)
            lo = 0x90;
        else if (lead == 0xF4)
            hi = 0x8F;
    }
    return c >= lo && c <= hi;
}

size_t rt_utf8_valid(const char *text, size_t len)
{
    const unsigned char *s = (const unsigned char *)text;
    size_t i = 0;

    while (i < len) {
        int n, k;

        if (len - i >= 8) {
            uint64_t eight;

            memcpy(&eight, s + i, 8);
            if (!(eight & 0x8080808080808080u)) {
                i += 8;
                continue;
            }
        }
        n = lead_len(s[i]);
        if (n == 0 || (size_t)n > len - i)
            return i;
        for (k = 1; k < n; k++)
            if (!may_follow(s[i], k, s[i + k]))
                return i;
        i += n;
    }
    return len;
}

int rt_utf8_get(const char *text, uint32_t *c)
{
    const unsigned char *s = (const unsigned char *)text;

    if (s[0] < 0x80) {
        *c = s[0];
        return 1;
    }
    if (s[0] < 0xE0) {
        *c = (s[0] & 0x1Fu) << 6 | (s[1] & 0x3Fu);
        return 2;
    }
    if (s[0] < 0xF0) {
        *c = (s[0] & 0x0Fu) << 12 | (s[1] & 0x3Fu) << 6 | (s[2] & 0x3Fu);
        return 3;
    }
    *c = (s[0] & 0x07u) << 18 | (s[1] & 0x3Fu) << 12 | (s[2] & 0x3Fu) << 6 | (s[3] & 0x3Fu);
    return 4;
}

int rt_utf8_get_before(const char *s, uint32_t *c)
{
    const char *p = s - 1;

    while (((unsigned char)*p & 0xC0) == 0x80)
        p--;
    return rt_utf8_get(p, c);
}

int rt_utf8_put(uint32_t c, char *out)
{
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    if (c < 0x800) {
        out[0] = (char)(0xC0 | c >> 6);
        out[1] = (char)(0x80 | (c & 0x3F));
        return 2;
    }
    if (c < 0x10000) {
        out[0] = (char)(0xE0 | c >> 12);
        out[1] = (char)(0x80 | (c >> 6 & 0x3F));
        out[2] = (char)(0x80 | (c & 0x3F));
        return 3;
    }
    out[0] = (char)(0xF0 | c >> 18);
    out[1] = (char)(0x80 | (c >> 12 & 0x3F));
    out[2] = (char)(0x80 | (c >> 6 & 0x3F));
    out[3] = (char)(0x80 | (c & 0x3F));
    return 4;
}

int rt_utf8_is_space(uint32_t c)
{
    if (c < 0x80)
        return c == ' ' || (c >= '\t' && c <= '\r');
    return c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
           c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

int rt_utf8_is_word(uint32_t c)
{
    switch (utf8proc_category((utf8proc_int32_t)c)) {
    case UTF8PROC_CATEGORY_LU: case UTF8PROC_CATEGORY_LL: case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM: case UTF8PROC_CATEGORY_LO: case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_MN: case UTF8PROC_CATEGORY_MC: case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND: case UTF8PROC_CATEGORY_PC:
        return 1;
    default:        /* the joiners, and the letters in circles and squares (Other_Alphabetic) */
        return c == 0x200C || c == 0x200D || (c >= 0x24B6 && c <= 0x24E9) ||
               (c >= 0x1F130 && c <= 0x1F149) || (c >= 0x1F150 && c <= 0x1F169) ||
               (c >= 0x1F170 && c <= 0x1F189);
    }
}

static size_t put_bad(char *out)
{
    memcpy(out, "\xEF\xBF\xBD", 3);
    return 3;
}

size_t rt_utf8_push(struct rt_utf8 *u, const char *bytes, size_t len, char *out)
{
    size_t i = 0, n = 0;

    while (i < len) {
        unsigned char c = (unsigned char)bytes[i];

        if (u->n == 0) {
            i++;
            if (c < 0x80)
                out[n++] = (char)c;
            else if (lead_len(c) == 0)
                n += put_bad(out + n);
            else
                u->buf[u->n++] = (char)c;
        } else if (may_follow((unsigned char)u->buf[0], u->n, c)) {
            i++;
            u->buf[u->n++] = (char)c;
            if (u->n == lead_len((unsigned char)u->buf[0])) {
                memcpy(out + n, u->buf, (size_t)u->n);
                n += (size_t)u->n;
                u->n = 0;
            }
        } else {            /* what was collected is dead; C is looked at again */
            n += put_bad(out + n);
            u->n = 0;
        }
    }
    return n;
}

size_t rt_utf8_flush(struct rt_utf8 *u, char *out)
{
    if (u->n == 0)
        return 0;
    u->n = 0;
    return put_bad(out);
}
