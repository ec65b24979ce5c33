/* vocab.c - see vocab.h.

   Byte-level BPE spells its tokens in an alphabet of 256 letters, one per byte: the
   printable bytes of Latin-1 stand for themselves and the others for U+0100 and on.  Tokens
   are kept as the bytes that they stand for.  A token with a letter of no byte (perhaps an
   added one) is kept as it is spelled, and no text leads to it. */
#include "runtime/vocab.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "runtime/utf8.h"

/* A place in the text. */
struct in {
    const char *base, *p, *end;
    const char *name;
    struct mk_err *err;
};

static int bad(const struct in *in, const char *what)
{
    return gen_fail(in->err, MK_EFORMAT, "%s: byte %zu: %s", in->name,
                    (size_t)(in->p - in->base), what);
}

static void skip_space(struct in *in)
{
    while (in->p < in->end &&
           (*in->p == ' ' || *in->p == '\n' || *in->p == '\t' || *in->p == '\r'))
        in->p++;
}

/* Step over white space and the character C; 0 if something else stands there. */
static int take(struct in *in, char c)
{
    skip_space(in);
    if (in->p >= in->end || *in->p != c)
        return 0;
    in->p++;
    return 1;
}

/* ---- Finding the members -------------------------------------------------- */

/* At an opening quote: step behind the closing one.  -1: there is none. */
static int skip_string(struct in *in)
{
    for (in->p++; in->p < in->end; in->p++) {
        if (*in->p == '"') {
            in->p++;
            return 0;
        }
        if (*in->p == '\\')
            in->p++;
    }
    in->p = in->end;
    return -1;
}

/* Step over any value; -1 at the end of the text. */
static int skip_value(struct in *in)
{
    size_t depth = 0;

    skip_space(in);
    while (in->p < in->end) {
        char c = *in->p;

        if (c == '"') {
            if (skip_string(in))
                return -1;
        } else if (c == '{' || c == '[') {
            depth++;
            in->p++;
        } else if (c == '}' || c == ']' || c == ',') {
            if (depth == 0)
                return 0;
            if (c != ',')
                depth--;
            in->p++;
        } else {
            in->p++;
        }
        if (depth == 0 && (c == '}' || c == ']' || c == '"'))
            return 0;
    }
    return -1;
}

/* Step to the value of the next member of an object; -1: there is none.  KEY is its key as
   it is written, without the quotes. */
static int next_member(struct in *in, const char **key, size_t *len)
{
    skip_space(in);
    if (in->p < in->end && *in->p == ',')
        in->p++;
    skip_space(in);
    if (in->p >= in->end || *in->p != '"')
        return -1;
    *key = in->p + 1;
    if (skip_string(in))
        return -1;
    *len = (size_t)(in->p - 1 - *key);
    if (!take(in, ':'))
        return -1;
    skip_space(in);
    return 0;
}

static int is_key(const char *key, size_t len, const char *want)
{
    return len == strlen(want) && !memcmp(key, want, len);
}

static void locate_in_model(struct in *in, struct rt_range *vocab, struct rt_range *merges)
{
    const char *key;
    size_t len;

    if (!take(in, '{'))
        return;
    while (next_member(in, &key, &len) == 0) {
        const char *from = in->p;
        struct rt_range *r = is_key(key, len, "vocab") && from < in->end && *from == '{' ? vocab :
                             is_key(key, len, "merges") && from < in->end && *from == '[' ? merges :
                                                                                           NULL;

        if (skip_value(in))
            return;
        if (r && r->end == 0) {
            r->at = (size_t)(from - in->base);
            r->end = (size_t)(in->p - in->base);
        }
    }
}

void rt_vocab_locate(const char *text, size_t len, struct rt_range *vocab,
                     struct rt_range *merges)
{
    struct in in = {text, text, text + len, NULL, NULL};
    const char *key;
    size_t key_len;

    *vocab = *merges = (struct rt_range){0, 0};
    if (!take(&in, '{'))
        return;
    while (next_member(&in, &key, &key_len) == 0) {
        if (is_key(key, key_len, "model")) {
            locate_in_model(&in, vocab, merges);
            return;
        }
        if (skip_value(&in))
            return;
    }
}

/* ---- Strings and numbers --------------------------------------------------- */

static int read_hex4(const struct in *in, const char *p, uint32_t *out)
{
    uint32_t x = 0;

    if (in->end - p < 4)
        return -1;
    for (int i = 0; i < 4; i++) {
        char c = p[i];
        int d = c >= '0' && c <= '9' ? c - '0' :
                c >= 'a' && c <= 'f' ? c - 'a' + 10 :
                c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;

        if (d < 0)
            return -1;
        x = x << 4 | (uint32_t)d;
    }
    *out = x;
    return 0;
}

/* Behind "\u": write the character, of one escape or of a pair of them; -1: malformed. */
static int read_escape_u(struct in *in, char *out, size_t *n)
{
    uint32_t c, low;

    if (read_hex4(in, in->p, &c))
        return -1;
    in->p += 4;
    if (c >= 0xD800 && c <= 0xDFFF) {
        if (c >= 0xDC00 || in->end - in->p < 2 || in->p[0] != '\\' || in->p[1] != 'u' ||
            read_hex4(in, in->p + 2, &low) || low < 0xDC00 || low > 0xDFFF)
            return -1;
        in->p += 6;
        c = 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00);
    }
    *n += (size_t)rt_utf8_put(c, out + *n);
    return 0;
}

static int read_escape(struct in *in, char *out, size_t *n)
{
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    const char *k;
    char c;

    if (in->p >= in->end)
        return -1;
    c = *in->p++;
    if (c == 'u')
        return read_escape_u(in, out, n);
    k = c ? strchr(from, c) : NULL;
    if (!k)
        return -1;
    out[(*n)++] = to[k - from];
    return 0;
}

/* Read the string at IN into OUT, which has room for what is left of the text. */
static int read_string(struct in *in, char *out, size_t *len)
{
    size_t n = 0;

    if (!take(in, '"'))
        return bad(in, "a string is missing");
    while (in->p < in->end && *in->p != '"') {
        if ((unsigned char)*in->p < 0x20)
            return bad(in, "a control character inside a string");
        if (*in->p != '\\') {
            out[n++] = *in->p++;
            continue;
        }
        in->p++;
        if (read_escape(in, out, &n))
            return bad(in, "malformed escape in a string");
    }
    if (in->p >= in->end)
        return bad(in, "a string that does not end");
    in->p++;
    *len = n;
    return 0;
}

static int read_id(struct in *in, int limit, int32_t *out)
{
    const char *from;
    uint64_t x = 0;

    skip_space(in);
    from = in->p;
    while (in->p < in->end && *in->p >= '0' && *in->p <= '9' && in->p - from < 12)
        x = x * 10 + (uint64_t)(*in->p++ - '0');
    if (in->p == from || (in->p - from > 1 && *from == '0') || in->p - from >= 12 ||
        (in->p < in->end && (*in->p == '.' || *in->p == 'e' || *in->p == 'E'))) {
        in->p = from;
        return bad(in, "model.vocab: an id that is not a whole number");
    }
    if (x >= (uint64_t)limit) {
        in->p = from;
        return gen_fail(in->err, MK_EFORMAT,
                        "%s: byte %zu: model.vocab: id %llu is not below the model's vocab_size %d",
                        in->name, (size_t)(from - in->base), (unsigned long long)x, limit);
    }
    *out = (int32_t)x;
    return 0;
}

/* ---- The byte alphabet ------------------------------------------------------ */

/* The byte that the letter C stands for, or -1. */
static int byte_of(uint32_t c)
{
    if ((c >= 0x21 && c <= 0x7E) || (c >= 0xA1 && c <= 0xFF && c != 0xAD))
        return (int)c;
    if (c < 0x100 || c > 0x143)
        return -1;
    c -= 0x100;
    if (c <= 0x20)
        return (int)c;
    return c <= 0x42 ? (int)(0x7F + c - 0x21) : 0xAD;
}

/* Turn the LEN spelled bytes at S into the bytes that they stand for, in place.  0: they are
   not spelled in the alphabet, and S is unchanged. */
static int unspell(char *s, size_t *len)
{
    size_t i, n = 0;
    uint32_t c;

    if (rt_utf8_valid(s, *len) != *len)
        return 0;
    for (i = 0; i < *len;) {
        i += (size_t)rt_utf8_get(s + i, &c);
        if (byte_of(c) < 0)
            return 0;
    }
    for (i = 0; i < *len;) {
        i += (size_t)rt_utf8_get(s + i, &c);
        s[n++] = (char)byte_of(c);
    }
    *len = n;
    return 1;
}

/* The quick way for what nearly all tokens look like: from IN up to the character STOP
   (stepped over), letters of the alphabet and no escapes, turned into their bytes at OUT.
   0: not so; IN is where it was. */
static int read_quick(struct in *in, char stop, char *out, size_t *len)
{
    const unsigned char *p = (const unsigned char *)in->p;
    const unsigned char *end = (const unsigned char *)in->end;
    size_t n = 0;

    for (; p < end && *p != (unsigned char)stop; p++) {
        int byte = *p;

        if (*p <= ' ' || *p > 0x7E || *p == '"' || *p == '\\') {
            if (*p < 0xC2 || *p > 0xC5 || end - p < 2 || (p[1] & 0xC0) != 0x80)
                return 0;
            byte = byte_of((*p & 0x1Fu) << 6 | (p[1] & 0x3Fu));
            if (byte < 0)
                return 0;
            p++;
        }
        out[n++] = (char)byte;
    }
    if (p >= end)
        return 0;
    in->p = (const char *)p + 1;
    *len = n;
    return 1;
}

/* Read a token's string into OUT; *SPELLED: as it is written, outside the alphabet. */
static int read_token(struct in *in, char *out, size_t *len, int *spelled)
{
    *spelled = 0;
    skip_space(in);
    if (in->p < in->end && *in->p == '"') {
        in->p++;
        if (read_quick(in, '"', out, len))
            return 0;
        in->p--;
    }
    if (read_string(in, out, len))
        return MK_EFORMAT;
    *spelled = !unspell(out, len);
    if (*spelled && rt_utf8_valid(out, *len) != *len)
        return bad(in, "a string that is not UTF-8");
    return 0;
}

/* ---- The tables --------------------------------------------------------------- */

/* SPELLED: the bytes are a spelling outside the alphabet, a name space of its own. */
static uint64_t hash(const struct rt_vocab *v, const char *s, size_t len, int spelled)
{
    return XXH3_64bits_withSeed(s, len, v->seed + (uint64_t)spelled);
}

/* The slot of the token S, or the free one where it belongs.  The hash's upper half is
   kept in the slot, so that other tokens are hardly ever looked at. */
static struct rt_slot *slot_of(const struct rt_vocab *v, const char *s, size_t len, int spelled)
{
    uint64_t h = hash(v, s, len, spelled);
    uint32_t tag = ((uint32_t)(h >> 32) & ~1u) | (uint32_t)spelled;
    size_t i = (size_t)h & v->slot_mask;

    for (;; i = (i + 1) & v->slot_mask) {
        struct rt_slot *k = &v->slot[i];

        if (k->id == 0) {
            k->tag = tag;           /* the caller fills it */
            return k;
        }
        if (k->tag == tag && v->token[k->id - 1].len == len &&
            !memcmp(v->token[k->id - 1].bytes, s, len))
            return k;
    }
}

static int32_t find(const struct rt_vocab *v, const char *s, size_t len, int spelled)
{
    uint64_t h = hash(v, s, len, spelled);
    uint32_t tag = ((uint32_t)(h >> 32) & ~1u) | (uint32_t)spelled;
    size_t i = (size_t)h & v->slot_mask;

    for (; v->slot[i].id; i = (i + 1) & v->slot_mask) {
        const struct rt_token *k = &v->token[v->slot[i].id - 1];

        if (v->slot[i].tag == tag && k->len == len && !memcmp(k->bytes, s, len))
            return (int32_t)v->slot[i].id - 1;
    }
    return -1;
}

int32_t rt_vocab_find(const struct rt_vocab *v, const char *bytes, size_t len)
{
    return find(v, bytes, len, 0);
}

int32_t rt_vocab_find_spelled(const struct rt_vocab *v, const char *text, size_t len)
{
    char copy[RT_MAX_SPELLED];
    int spelled;

    if (len > sizeof copy)
        return -1;
    memcpy(copy, text, len);
    spelled = !unspell(copy, &len);
    return find(v, copy, len, spelled);
}

/* Where the search for the pair IDS starts. */
static size_t pair_place(const struct rt_vocab *v, uint64_t ids)
{
    return (size_t)XXH3_64bits_withSeed(&ids, sizeof ids, v->seed) & v->pair_mask;
}

uint32_t rt_vocab_rank(const struct rt_vocab *v, int32_t left, int32_t right)
{
    uint64_t ids = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    size_t i;

    for (i = pair_place(v, ids); v->pair[i].rank; i = (i + 1) & v->pair_mask)
        if (v->pair[i].ids == ids)
            return v->pair[i].rank - 1;
    return RT_NO_RANK;
}

/* ---- model.vocab ---------------------------------------------------------------- */

static int make_vocab_tables(struct rt_vocab *v, size_t bytes)
{
    size_t most = bytes / 4 + 1;    /* entries: "":0, */
    size_t size = 16;

    if (most > (size_t)v->limit)
        most = (size_t)v->limit;
    while (size < 2 * most)
        size *= 2;
    v->slot_mask = size - 1;
    v->slot = calloc(size, sizeof *v->slot);
    v->token = calloc((size_t)v->limit, sizeof *v->token);
    v->arena = malloc(bytes + 1);
    return v->slot && v->token && v->arena ? 0 : MK_ENOMEM;
}

/* Read one `"token": id` whose bytes go to *ARENA. */
static int read_entry(struct in *in, struct rt_vocab *v, char **arena)
{
    struct rt_slot *slot;
    int32_t id = 0;
    size_t len;
    int spelled;

    if (read_token(in, *arena, &len, &spelled))
        return MK_EFORMAT;
    if (!take(in, ':'))
        return bad(in, "model.vocab: ':' is missing");
    if (read_id(in, v->limit, &id))
        return MK_EFORMAT;
    if (v->token[id].bytes)
        return bad(in, "model.vocab: an id stands twice");
    slot = slot_of(v, *arena, len, spelled);
    if (slot->id)
        return bad(in, "model.vocab: a token stands twice");
    slot->id = (uint32_t)id + 1;
    v->token[id] = (struct rt_token){*arena, (uint32_t)len, 0};
    *arena += len;
    return 0;
}

static int read_vocab(struct in *in, struct rt_vocab *v)
{
    char *arena = v->arena;

    in->p++;                        /* '{', as rt_vocab_locate found it */
    if (take(in, '}'))
        return bad(in, "model.vocab is empty");
    for (;;) {
        int rc = read_entry(in, v, &arena);

        if (rc)
            return rc;
        if (take(in, '}'))
            break;
        if (!take(in, ','))
            return bad(in, "model.vocab: ',' or '}' is missing");
    }
    for (int b = 0; b < 256; b++) {
        char c = (char)b;

        v->byte_id[b] = rt_vocab_find(v, &c, 1);
    }
    return 0;
}

/* ---- model.merges ----------------------------------------------------------------- */

/* Read `["left","right"]` to S: the first N_LEFT bytes, and N_RIGHT behind them. */
static int read_merge_pair(struct in *in, char *s, size_t *n_left, size_t *n_right)
{
    int spelled = 0, also = 0, rc = read_token(in, s, n_left, &spelled);

    if (rc == 0 && !take(in, ','))
        rc = bad(in, "model.merges: ',' is missing");
    if (rc == 0)
        rc = read_token(in, s + *n_left, n_right, &also);
    if (rc == 0 && !take(in, ']'))
        rc = bad(in, "model.merges: ']' is missing");
    if (rc == 0 && (spelled || also))
        rc = bad(in, "model.merges: a token that is not spelled in the byte alphabet");
    return rc;
}

/* The same for `"left right"`.  1: a comment of the old files. */
static int read_merge_string(struct in *in, char *s, size_t *n_left, size_t *n_right)
{
    const char *from = in->p;
    char *space;
    size_t n;

    if (take(in, '"') && read_quick(in, ' ', s, n_left) &&
        read_quick(in, '"', s + *n_left, n_right) && (*n_left < 8 || memcmp(s, "#version", 8)))
        return 0;
    in->p = from;
    if (read_string(in, s, &n))
        return MK_EFORMAT;
    if (n >= 8 && !memcmp(s, "#version", 8))
        return 1;
    space = memchr(s, ' ', n);
    if (!space || memchr(space + 1, ' ', n - (size_t)(space + 1 - s)))
        return bad(in, "model.merges: not two tokens with one space between");
    *n_left = (size_t)(space - s);
    *n_right = n - *n_left - 1;
    if (!unspell(s, n_left) || !unspell(space + 1, n_right))
        return bad(in, "model.merges: a token that is not spelled in the byte alphabet");
    memmove(s + *n_left, space + 1, *n_right);
    return 0;
}

/* Read one merge, whose texts go through S.  *IDS is the pair; 1: a comment. */
static int read_merge(struct in *in, const struct rt_vocab *v, char *s, uint64_t *ids,
                      int32_t *merged)
{
    size_t n_left = 0, n_right = 0;
    int32_t left, right;
    int rc = take(in, '[') ? read_merge_pair(in, s, &n_left, &n_right)
                           : read_merge_string(in, s, &n_left, &n_right);

    if (rc)
        return rc;
    if (n_left == 0 || n_right == 0)
        return bad(in, "model.merges: an empty token");
    left = rt_vocab_find(v, s, n_left);
    right = rt_vocab_find(v, s + n_left, n_right);
    *merged = rt_vocab_find(v, s, n_left + n_right);
    if (left < 0 || right < 0 || *merged < 0)
        return bad(in, "model.merges: a token that is not in model.vocab");
    *ids = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    return 0;
}

/* Read the array; the pairs go to IDS, the tokens that they become to v->merged. */
static int read_merges(struct in *in, struct rt_vocab *v, char *scratch, uint64_t *ids)
{
    in->p++;                        /* '[' */
    if (take(in, ']'))
        return 0;
    for (;;) {
        int rc = read_merge(in, v, scratch, &ids[v->n_merges], &v->merged[v->n_merges]);

        if (rc < 0)
            return rc;
        v->n_merges += rc == 0;
        if (take(in, ']'))
            return 0;
        if (!take(in, ','))
            return bad(in, "model.merges: ',' or ']' is missing");
    }
}

/* A pair that stands twice has its last rank, as in Hugging Face's reader. */
static int make_pairs(struct rt_vocab *v, const uint64_t *ids)
{
    size_t size = 16;

    while (size < 2 * v->n_merges)
        size *= 2;
    v->pair_mask = size - 1;
    v->pair = calloc(size, sizeof *v->pair);
    if (!v->pair)
        return MK_ENOMEM;
    for (size_t rank = 0; rank < v->n_merges; rank++) {
        size_t i = pair_place(v, ids[rank]);

        while (v->pair[i].rank && v->pair[i].ids != ids[rank])
            i = (i + 1) & v->pair_mask;
        v->pair[i] = (struct rt_pair){ids[rank], (uint32_t)rank + 1};
    }
    return 0;
}

static int read_all_merges(struct in *in, struct rt_vocab *v)
{
    size_t bytes = (size_t)(in->end - in->p);
    size_t most = bytes / 6 + 1;    /* entries: "a b", */
    char *scratch = malloc(bytes + 1);
    uint64_t *ids = malloc(most * sizeof *ids);
    int rc = MK_ENOMEM;

    v->merged = malloc(most * sizeof *v->merged);
    if (scratch && ids && v->merged)
        rc = read_merges(in, v, scratch, ids);
    if (rc == 0)
        rc = make_pairs(v, ids);
    free(scratch);
    free(ids);
    return rc;
}

int rt_vocab_read(const char *text, struct rt_range vocab, struct rt_range merges,
                  const char *name, int limit, struct rt_vocab *v, struct mk_err *err)
{
    struct in in = {text, text + vocab.at, text + vocab.end, name, err};
    int rc;

    memset(v, 0, sizeof *v);
    v->limit = limit;
    if (getrandom(&v->seed, sizeof v->seed, GRND_NONBLOCK) != (ssize_t)sizeof v->seed)
        v->seed = (uint64_t)(uintptr_t)v;       /* early at boot: better than a constant */
    rc = make_vocab_tables(v, vocab.end - vocab.at);
    if (rc == 0)
        rc = read_vocab(&in, v);
    if (rc == 0) {
        in.p = text + merges.at;
        in.end = text + merges.end;
        rc = read_all_merges(&in, v);
    }
    if (rc == MK_ENOMEM)
        gen_fail(err, rc, "%s: not enough memory for %zu bytes of model.vocab and model.merges",
                 name, vocab.end - vocab.at + merges.end - merges.at);
    return rc;
}

void rt_vocab_free(struct rt_vocab *v)
{
    free(v->arena);
    free(v->token);
    free(v->slot);
    free(v->pair);
    free(v->merged);
    memset(v, 0, sizeof *v);
}
