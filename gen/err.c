/* err.c - see err.h. */
#include "gen/err.h"
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <utf8proc.h>

/* Texts quote files from strangers: bytes that are not UTF-8 and control characters become
   '?', so that err->text is UTF-8 and cannot play with a terminal.  Ends without a newline. */
static void clean(char *text)
{
    utf8proc_uint8_t *s = (utf8proc_uint8_t *)text;
    size_t len = strlen(text);
    utf8proc_int32_t code;
    utf8proc_ssize_t n;

    while (len && (text[len - 1] == '\n' || text[len - 1] == '\r'))
        text[--len] = '\0';
    for (size_t i = 0; i < len; i += (size_t)n) {
        n = utf8proc_iterate(s + i, (utf8proc_ssize_t)(len - i), &code);
        if (n > 0 && (code >= 0xa0 || (code >= 0x20 && code < 0x7f) ||
                      code == '\n' || code == '\t'))
            continue;
        n = n > 0 ? n : 1;
        memset(s + i, '?', (size_t)n);
    }
}

static void set(struct mk_err *err, int code, const char *text)
{
    err->code = code;
    snprintf(err->text, sizeof(err->text), "%s", text);
    clean(err->text);
}

int gen_fail(struct mk_err *err, int code, const char *fmt, ...)
{
    char text[sizeof(err->text)];       /* the arguments may point into err->text */
    va_list ap;

    if (!err)
        return code;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    set(err, code, text);
    return code;
}

int gen_fail_in(struct mk_err *err, int code, const char *fmt, ...)
{
    char text[sizeof(err->text)];
    va_list ap;
    size_t n;

    if (!err)
        return code;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    n = strlen(text);
    snprintf(text + n, sizeof(text) - n, ": %.*s", (int)(sizeof(text) - n), err->text);
    set(err, err->code, text);
    return err->code;
}
