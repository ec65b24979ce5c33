/* added.h - added tokens: found in the text as wholes, before anything else is done to it. */
#ifndef RT_ADDED_H
#define RT_ADDED_H
#include "gen/json.h"
#include "runtime/vocab.h"

struct rt_added_token {
    char *text;             /* as it stands in the file */
    char *pattern;          /* what to look for: TEXT, or its NFC form; perhaps == text */
    size_t len, pattern_len;
    int32_t id;
    int special, normalized, single_word, lstrip, rstrip;
};

/* Tokens that are looked for at the same time, sorted by their patterns. */
struct rt_added_set {
    const struct rt_added_token **token;
    int n;
    int first[257];         /* token[first[b]] .. token[first[b + 1] - 1] begin with byte b */
};

struct rt_added {
    struct rt_added_token *token;
    int n;
    struct rt_added_set raw;        /* found in the text as it came */
    struct rt_added_set normalized; /* found in the normalized text between those */
};

/* Read the list LIST (NULL: none) of the file NAME, and enter the tokens into V.  NFC: the
   file's normalizer is NFC.  Returns 0, MK_EFORMAT, MK_EUNSUPPORTED, MK_ENOMEM; free *A with
   rt_added_free in every case. */
int rt_added_read(const struct gen_json *list, const char *name, int nfc, struct rt_vocab *v,
                  struct rt_added *a, struct mk_err *err);
void rt_added_free(struct rt_added *a);

/* The added token spelled TEXT, or NULL. */
const struct rt_added_token *rt_added_find(const struct rt_added *a, const char *text);

/* The next token of SET in TEXT from byte AT on: the leftmost, the longest of those.  Flags
   are not looked at.  NULL: none.  *FROM is where it starts. */
const struct rt_added_token *rt_added_next(const struct rt_added_set *set, const char *text,
                                           size_t len, size_t at, size_t *from);
#endif
