/* split.h - the pre-tokenizer: cuts text into the pieces that are merged on their own. */
#ifndef RT_SPLIT_H
#define RT_SPLIT_H
#include "gen/json.h"

struct rt_split;        /* what to do; shared by threads */
struct rt_split_work;   /* memory to do it with; of one thread */

/* Make the pre-tokenizer that the member PRE of the file NAME describes: Split, Digits and
   ByteLevel, and Sequences of them with one ByteLevel at the end.  A pattern is taken only
   where Oniguruma, which Hugging Face uses, and PCRE2 mean the same by it.
   Returns 0, MK_EFORMAT, MK_EUNSUPPORTED (names what is not handled), MK_ENOMEM. */
int rt_split_make(const struct gen_json *pre, const char *name, struct rt_split **out,
                  struct mk_err *err);
void rt_split_free(struct rt_split *s);

int rt_split_work_make(struct rt_split_work **out, struct mk_err *err);
void rt_split_work_free(struct rt_split_work *w);

/* Called with each piece in turn; another result than 0 ends the run and is its result. */
typedef int rt_piece_fn(void *user, const char *piece, size_t len);

/* Cut TEXT (valid UTF-8).  Returns 0, what FN returned, MK_EFORMAT (a pattern that takes too
   many steps), MK_ENOMEM. */
int rt_split_run(const struct rt_split *s, struct rt_split_work *w, const char *text, size_t len,
                 rt_piece_fn *fn, void *user, struct mk_err *err);
#endif
