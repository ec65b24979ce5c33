/* keys.h - the choices of a plan that have a key, for --set and plan files.  For plan.c; gen_plan_key lists them. */
#ifndef GEN_KEYS_H
#define GEN_KEYS_H
#include <stddef.h>

#include "gen/plan.h"

enum { GEN_MOST_CTAS = 1024, GEN_MOST_GROUP = 16 };

/* Where a choice is. */
#define AT(field) offsetof(struct gen_plan, field)

/* Read the file PLAN_FILE (NULL: none), then SET_LIST ("key=value" ..., NULL-terminated, or NULL), into P.
   SET: gets a bit for each choice that was made.
   Returns 0, MK_ENOENT, MK_EIO (the file), MK_EFORMAT (a line of it), MK_EINVAL (of SET_LIST), MK_ENOMEM; the text
   names file, line and key. */
int gen_keys_read(struct gen_plan *p, const char *plan_file, const char *const *set_list,
                  unsigned long *set, struct mk_err *err);

/* 1 if the choice AT(field) was made. */
int gen_keys_has(unsigned long set, size_t at);
#endif
