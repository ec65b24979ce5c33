/* regex.h - regular expressions of tokenizer files, over PCRE2, with bounded work. */
#ifndef RT_REGEX_H
#define RT_REGEX_H
#include <stddef.h>
#include <stdint.h>
#include "gen/err.h"

struct rt_regex;
struct rt_regex_work;   /* of one thread */

/* Compile PATTERN; LITERAL: it is plain text to look for.  WHERE stands in errors.
   Returns 0, MK_EFORMAT (malformed), MK_EUNSUPPORTED (says which construct), MK_ENOMEM. */
int rt_regex_make(const char *pattern, int literal, const char *where, struct rt_regex **out,
                  struct mk_err *err);
void rt_regex_free(struct rt_regex *r);

struct rt_regex_work *rt_regex_work_make(void);     /* NULL: no memory */
void rt_regex_work_free(struct rt_regex_work *w);

/* Before each text: how much work its matches may take together. */
void rt_regex_budget(struct rt_regex_work *w, size_t len);

/* Find the first match in TEXT (valid UTF-8) from byte AT on; lookbehind sees what is before.
   Returns 1 (*FROM and *TO set), 0 (none), MK_EFORMAT (more steps than the budget allows),
   MK_ENOMEM. */
int rt_regex_find(const struct rt_regex *r, struct rt_regex_work *w, const char *text, size_t len,
                  size_t at, size_t *from, size_t *to, struct mk_err *err);
#endif
