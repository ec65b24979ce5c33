/* json.h - strict reading of JSON from strangers; the one user of cJSON.
   A document is refused when it is empty, over the size limit, not UTF-8, nested
   deeper than 64, has a duplicate key in an object, or has anything after its end. */
#ifndef GEN_JSON_H
#define GEN_JSON_H
#include <stddef.h>
#include <stdint.h>
#include "gen/err.h"

struct gen_json;        /* a value inside a document */

/* Parse LEN bytes of TEXT.  NAME stands in the error text (a file's path).
   Returns 0, MK_EFORMAT (with line and column), MK_ENOMEM.  Free with gen_json_free. */
int gen_json_parse(const char *text, size_t len, const char *name,
                   struct gen_json **out, struct mk_err *err);
/* Read and parse the file PATH of at most MAX_BYTES.  Also MK_ENOENT, MK_EIO. */
int gen_json_read(const char *path, size_t max_bytes, struct gen_json **out, struct mk_err *err);
void gen_json_free(struct gen_json *root);

/* Navigation: NULL when absent or of another type.  Keys are case-sensitive. */
const struct gen_json *gen_json_get(const struct gen_json *object, const char *key);
const struct gen_json *gen_json_first(const struct gen_json *array_or_object);
const struct gen_json *gen_json_next(const struct gen_json *item);
const char *gen_json_key(const struct gen_json *item);       /* of an object's member, else NULL */
int gen_json_count(const struct gen_json *array_or_object);

int gen_json_is_object(const struct gen_json *v);
int gen_json_is_array(const struct gen_json *v);
int gen_json_is_null(const struct gen_json *v);
int gen_json_is_number(const struct gen_json *v);
const char *gen_json_string(const struct gen_json *v);      /* NULL if not a string */
int gen_json_bool(const struct gen_json *v, int *out);      /* 0, or -1 if not a boolean */
int gen_json_int(const struct gen_json *v, int64_t lo, int64_t hi, int64_t *out); /* 0, or -1: not an integer in lo..hi */
int gen_json_double(const struct gen_json *v, double *out); /* 0, or -1: not a finite number */
#endif
