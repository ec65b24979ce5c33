/* err.h - fill a struct mk_err. */
#ifndef GEN_ERR_H
#define GEN_ERR_H
#include "runtime/mk.h"

/* Set ERR (may be NULL) to CODE and the formatted text; returns CODE, so that a
   function can end with `return gen_fail(err, MK_EFORMAT, ...)`. */
int gen_fail(struct mk_err *err, int code, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* Put "PREFIX: " before the text of ERR (may be NULL); returns err->code, or CODE if ERR is NULL. */
int gen_fail_in(struct mk_err *err, int code, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
#endif
