/* tokenizer.c - text to token ids and back.

   As Hugging Face does it: added tokens are cut out of the text as it came; what is between
   is normalised, added tokens that want normalised text are cut out of that, and the rest
   goes through pre-tokenizer and merges. */
#include "runtime/tokenizer.h"

#include <stdlib.h>

#include "runtime/tokenfile.h"
#include "runtime/utf8.h"

enum { MAX_TEXT = 1 << 30 };        /* bytes; places in a text are held in 32 bits */

struct encoder {
    const struct rt_tokenizer *t;
    int special;                    /* special tokens in the text count */
    int32_t *tokens;
    size_t cap, n;
    struct rt_bpe bpe;
    struct rt_split_work *work;
    struct mk_err *err;
};

static void emit(struct encoder *e, int32_t id)
{
    if (e->n < e->cap)
        e->tokens[e->n] = id;
    e->n++;
}

/* A piece from the pre-tokenizer. */
static int encode_piece(void *user, const char *piece, size_t len)
{
    struct encoder *e = user;
    int32_t whole = e->t->ignore_merges ? rt_vocab_find(&e->t->vocab, piece, len) : -1;
    size_t n;

    if (whole >= 0) {
        emit(e, whole);
        return 0;
    }
    if (rt_bpe_run(&e->bpe, &e->t->vocab, e->t->unk, piece, len, &n))
        return gen_fail(e->err, MK_ENOMEM, "not enough memory to encode %zu bytes", len);
    for (size_t i = 0; i < n; i++)
        emit(e, e->bpe.id[i]);
    return 0;
}

static int encode_plain(struct encoder *e, const char *text, size_t len)
{
    return rt_split_run(e->t->split, e->work, text, len, encode_piece, e, e->err);
}

/* May the token K stand at FROM .. TO of the text? */
static int counts(const struct encoder *e, const struct rt_added_token *k, const char *text,
                  size_t len, size_t from, size_t to)
{
    uint32_t c;

    if (k->special && !e->special)
        return 0;
    if (!k->single_word)
        return 1;
    if (from > 0) {
        rt_utf8_get_before(text + from, &c);
        if (rt_utf8_is_word(c))
            return 0;
    }
    if (to < len) {
        rt_utf8_get(text + to, &c);
        if (rt_utf8_is_word(c))
            return 0;
    }
    return 1;
}

/* Where the white space that ends at AT begins, but not before LO. */
static size_t spaces_before(const char *text, size_t lo, size_t at)
{
    uint32_t c;
    int n;

    while (at > lo) {
        n = rt_utf8_get_before(text + at, &c);
        if (!rt_utf8_is_space(c))
            break;
        at -= (size_t)n;
    }
    return at;
}

static size_t spaces_behind(const char *text, size_t len, size_t at)
{
    uint32_t c;
    int n;

    while (at < len) {
        n = rt_utf8_get(text + at, &c);
        if (!rt_utf8_is_space(c))
            break;
        at += (size_t)n;
    }
    return at;
}

/* Cut the tokens of SET out of TEXT, and give what is between to REST.  A token takes the
   spaces beside it when its flags say so; the search goes on right behind the token itself.
   SPACES_TO is the end of the white space that was last looked at, so that it is not walked
   again for each token inside. */
static int cut_added(struct encoder *e, const struct rt_added_set *set, const char *text,
                     size_t len, int (*rest)(struct encoder *, const char *, size_t))
{
    const struct rt_added_token *k;
    size_t done = 0, at = 0, from, spaces_from = 1, spaces_to = 0;
    int rc;

    while ((k = rt_added_next(set, text, len, at, &from)) != NULL) {
        size_t to = from + k->pattern_len;

        at = to;
        if (!counts(e, k, text, len, from, to))
            continue;
        if (k->lstrip)
            from = from < done ? done : spaces_before(text, done, from);
        if (k->rstrip) {
            if (to < spaces_from || to > spaces_to) {
                spaces_from = to;
                spaces_to = spaces_behind(text, len, to);
            }
            to = spaces_to;
        }
        if (done < from) {
            rc = rest(e, text + done, from - done);
            if (rc)
                return rc;
        }
        emit(e, k->id);
        done = to;
    }
    return done < len ? rest(e, text + done, len - done) : 0;
}

/* Text between tokens that are found before normalisation. */
static int encode_raw(struct encoder *e, const char *text, size_t len)
{
    char *nfc = (char *)text;
    size_t nfc_len = len;
    int rc;

    if (e->t->nfc && rt_utf8_nfc(text, len, &nfc, &nfc_len))
        return gen_fail(e->err, MK_ENOMEM, "not enough memory to normalise %zu bytes", len);
    rc = cut_added(e, &e->t->added.normalized, nfc, nfc_len, encode_plain);
    if (nfc != text)
        free(nfc);
    return rc;
}

static int encode(struct encoder *e, const char *text, size_t len, int flags)
{
    const struct rt_ends *ends = &e->t->ends;
    int rc;

    for (int i = 0; flags & RT_ADD_BOS && i < ends->n_before; i++)
        emit(e, ends->before[i]);
    rc = cut_added(e, &e->t->added.raw, text, len, encode_raw);
    for (int i = 0; flags & RT_ADD_BOS && i < ends->n_after; i++)
        emit(e, ends->after[i]);
    return rc;
}

int rt_tokenizer_encode(const struct rt_tokenizer *t, const char *text, size_t len, int flags,
                        int32_t *tokens, size_t cap, size_t *n, struct mk_err *err)
{
    struct encoder e = {.t = t, .special = flags & MK_SPECIAL, .tokens = tokens, .cap = cap,
                        .err = err};
    size_t valid;
    int rc;

    if (len > MAX_TEXT)
        return gen_fail(err, MK_EINVAL, "a text of %zu bytes; at most %d are taken", len,
                        (int)MAX_TEXT);
    valid = rt_utf8_valid(text, len);
    if (valid < len)
        return gen_fail(err, MK_EFORMAT, "the text is not UTF-8 at byte %zu", valid);
    rc = rt_split_work_make(&e.work, err);
    if (rc == 0)
        rc = encode(&e, text, len, flags);
    if (rc == 0)
        *n = e.n;
    rt_split_work_free(e.work);
    rt_bpe_free(&e.bpe);
    return rc;
}

int rt_tokenizer_bytes(const struct rt_tokenizer *t, int32_t token, const char **bytes, size_t *len,
                       int *special, struct mk_err *err)
{
    const struct rt_token *k;

    if (token < 0 || token >= t->vocab.limit)
        return gen_fail(err, MK_EINVAL, "token %d is not in 0 to %d", token, t->vocab.limit - 1);
    k = &t->vocab.token[token];         /* an id without a token stands for nothing */
    *bytes = k->bytes ? k->bytes : "";
    *len = k->len;
    *special = k->special;
    return 0;
}
