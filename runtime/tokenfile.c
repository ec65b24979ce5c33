/* tokenfile.c - tokenizer.json -> struct rt_tokenizer.

   The two big members are read by vocab.c; the rest of the document, with empty ones in
   their place, goes through gen/json.h. */
#include "runtime/tokenfile.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "runtime/tokenizer.h"

enum {
    MAX_FILE = 64 << 20,        /* bytes; the largest tokenizer.json in use has 33 MB */
    MAX_CONFIG = 4 << 20,
    MAX_VOCAB = 1 << 24
};

/* ---- The document ------------------------------------------------------------------ */

static int read_fd(int fd, const char *path, char **out, size_t *len, struct mk_err *err)
{
    struct stat st;
    size_t n = 0;
    char *text;

    if (fstat(fd, &st) || !S_ISREG(st.st_mode))
        return gen_fail(err, MK_EIO, "%s: not a file", path);
    if (st.st_size > MAX_FILE)
        return gen_fail(err, MK_EFORMAT, "%s: larger than %d MB", path, MAX_FILE >> 20);
    text = malloc((size_t)st.st_size + 1);
    if (!text)
        return gen_fail(err, MK_ENOMEM, "%s: not enough memory for %lld bytes", path,
                        (long long)st.st_size);
    while (n < (size_t)st.st_size) {
        ssize_t k = read(fd, text + n, (size_t)st.st_size - n);

        if (k < 0 && errno == EINTR)
            continue;
        if (k < 0) {
            free(text);
            return gen_fail(err, MK_EIO, "%s: %s", path, strerror(errno));
        }
        if (k == 0)
            break;
        n += (size_t)k;
    }
    text[n] = 0;
    *out = text;
    *len = n;
    return 0;
}

static int read_file(const char *path, char **out, size_t *len, struct mk_err *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK), rc;

    if (fd < 0)
        return gen_fail(err, errno == ENOENT || errno == ENOTDIR ? MK_ENOENT : MK_EIO, "%s: %s",
                        path, strerror(errno));
    rc = read_fd(fd, path, out, len, err);
    close(fd);
    return rc;
}

/* Parse TEXT with the contents of the ranges A and B left out.  Where that fails, the whole
   text is parsed, for the right line and column in the error. */
static int parse_rest(const char *text, size_t len, struct rt_range a, struct rt_range b,
                      const char *path, struct gen_json **root, struct mk_err *err)
{
    struct mk_err *aside = malloc(sizeof *aside);
    char *rest = malloc(len + 1);
    size_t at = 0, n = 0;
    int rc = MK_ENOMEM;

    *root = NULL;
    if (b.at < a.at) {
        struct rt_range t = a;

        a = b;
        b = t;
    }
    for (int i = 0; i < 2 && rest; i++) {
        struct rt_range r = i ? b : a;

        if (r.end == 0)
            continue;
        memcpy(rest + n, text + at, r.at + 1 - at);     /* with the opening bracket */
        n += r.at + 1 - at;
        at = r.end - 1;
    }
    if (rest && aside) {
        memcpy(rest + n, text + at, len - at);
        rc = gen_json_parse(rest, n + len - at, path, root, aside);
        if (rc == MK_EFORMAT)
            rc = gen_json_parse(text, len, path, root, err);
    }
    if (rc == MK_ENOMEM)
        gen_fail(err, rc, "%s: not enough memory", path);
    free(rest);
    free(aside);
    return rc;
}

/* ---- Small members ------------------------------------------------------------------ */

static const struct gen_json *get(const struct gen_json *v, const char *key)
{
    const struct gen_json *k = gen_json_get(v, key);

    return k && gen_json_is_null(k) ? NULL : k;
}

static const char *get_string(const struct gen_json *v, const char *key)
{
    const char *s = gen_json_string(gen_json_get(v, key));

    return s ? s : "";
}

/* The member KEY of model as a flag; absent or null: 0. */
static int get_flag(const struct gen_json *model, const char *key, const char *path, int *out,
                    struct mk_err *err)
{
    const struct gen_json *b = get(model, key);

    *out = 0;
    if (b && gen_json_bool(b, out))
        return gen_fail(err, MK_EFORMAT, "%s: model.%s must be true or false", path, key);
    return 0;
}

static int unsupported(struct mk_err *err, const char *path, const char *member, const char *type)
{
    return gen_fail(err, MK_EUNSUPPORTED, "%s: %s of type \"%.40s\" is not handled", path, member,
                    type);
}

/* null, NFC, or a Sequence of NFCs. */
static int read_normalizer(const struct gen_json *v, const char *path, int *nfc,
                           struct mk_err *err)
{
    const struct gen_json *i;
    const char *type = get_string(v, "type");

    if (!v)
        return 0;
    if (!strcmp(type, "NFC")) {
        *nfc = 1;
        return 0;
    }
    if (strcmp(type, "Sequence"))
        return unsupported(err, path, "normalizer", type);
    for (i = gen_json_first(gen_json_get(v, "normalizers")); i; i = gen_json_next(i)) {
        if (strcmp(get_string(i, "type"), "NFC"))
            return unsupported(err, path, "normalizer", get_string(i, "type"));
        *nfc = 1;
    }
    return 0;
}

/* The keys of model that we know; all that change the outcome are looked at. */
static int check_model(const struct gen_json *model, const char *path, struct mk_err *err)
{
    static const char *const known[] = {"type", "dropout", "unk_token",
        "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
        "ignore_merges", "vocab", "merges"};
    const struct gen_json *k;
    int fallback, rc;

    if (get(model, "type") && strcmp(get_string(model, "type"), "BPE"))
        return unsupported(err, path, "model", get_string(model, "type"));
    for (k = gen_json_first(model); k; k = gen_json_next(k)) {
        size_t i = 0;

        while (i < sizeof known / sizeof *known && strcmp(known[i], gen_json_key(k)))
            i++;
        if (i == sizeof known / sizeof *known && !gen_json_is_null(k))
            return gen_fail(err, MK_EUNSUPPORTED, "%s: model.%.40s is not handled", path,
                            gen_json_key(k));
    }
    if (get(model, "dropout"))
        return gen_fail(err, MK_EUNSUPPORTED, "%s: model.dropout is not handled", path);
    if (*get_string(model, "continuing_subword_prefix") || *get_string(model, "end_of_word_suffix"))
        return gen_fail(err, MK_EUNSUPPORTED, "%s: model.continuing_subword_prefix and "
                        "model.end_of_word_suffix are not handled", path);
    rc = get_flag(model, "byte_fallback", path, &fallback, err);
    if (rc == 0 && fallback)
        rc = gen_fail(err, MK_EUNSUPPORTED, "%s: model.byte_fallback is not handled", path);
    return rc;
}

static int read_unk(const struct gen_json *model, const char *path, struct rt_tokenizer *t,
                    struct mk_err *err)
{
    const struct gen_json *v = get(model, "unk_token");
    const char *text = gen_json_string(v);
    int rc = get_flag(model, "fuse_unk", path, &t->unk.fuse, err);

    t->unk.id = -1;
    if (rc || !v)
        return rc;
    t->unk.id = text ? rt_vocab_find_spelled(&t->vocab, text, strlen(text)) : -1;
    if (t->unk.id < 0)
        return gen_fail(err, MK_EFORMAT, "%s: model.unk_token is not in model.vocab", path);
    return 0;
}

/* ---- The post-processor ---------------------------------------------------------------- */

struct post {
    const char *path;
    const struct rt_vocab *vocab;
    struct rt_ends *ends;
    struct mk_err *err;
};

/* Append the ids of the template's special token ID. */
static int add_ids(const struct post *p, const struct gen_json *v, const char *id, int32_t *list,
                   int *n)
{
    const struct gen_json *ids = gen_json_get(gen_json_get(gen_json_get(v, "special_tokens"), id),
                                              "ids");
    const struct gen_json *i = gen_json_first(ids);
    int64_t x;

    if (!i)
        return gen_fail(p->err, MK_EFORMAT, "%s: post_processor names a special token whose ids "
                        "are not there", p->path);
    for (; i; i = gen_json_next(i)) {
        if (gen_json_int(i, 0, p->vocab->limit - 1, &x))
            return gen_fail(p->err, MK_EFORMAT, "%s: post_processor has an id that is not a "
                            "whole number below the model's vocab_size %d", p->path,
                            p->vocab->limit);
        if (*n == RT_MAX_ENDS)
            return gen_fail(p->err, MK_EUNSUPPORTED, "%s: post_processor adds more than %d tokens",
                            p->path, RT_MAX_ENDS);
        list[(*n)++] = (int32_t)x;
    }
    return 0;
}

/* single: [{"SpecialToken": {"id": ...}}, {"Sequence": {"id": "A"}}, ...] */
static int read_template(const struct post *p, const struct gen_json *v)
{
    const struct gen_json *i = gen_json_first(gen_json_get(v, "single"));
    int text_seen = 0, rc = 0;

    for (; i && rc == 0; i = gen_json_next(i)) {
        const struct gen_json *special = gen_json_get(i, "SpecialToken");
        const char *id = get_string(special ? special : gen_json_get(i, "Sequence"), "id");

        if (special)
            rc = text_seen ? add_ids(p, v, id, p->ends->after, &p->ends->n_after)
                           : add_ids(p, v, id, p->ends->before, &p->ends->n_before);
        else if (strcmp(id, "A") || text_seen++)
            rc = gen_fail(p->err, MK_EUNSUPPORTED, "%s: post_processor.single must have the "
                          "sequence A once and special tokens", p->path);
    }
    if (rc == 0 && !text_seen)
        rc = gen_fail(p->err, MK_EFORMAT, "%s: post_processor.single has no sequence A", p->path);
    return rc;
}

static int read_post(const struct post *p, const struct gen_json *v)
{
    const char *type = get_string(v, "type");
    const struct gen_json *i;
    int rc = 0, n = 0;

    if (!v || !strcmp(type, "ByteLevel"))       /* trims offsets only, which we do not have */
        return 0;
    if (!strcmp(type, "TemplateProcessing"))
        return read_template(p, v);
    if (strcmp(type, "Sequence"))
        return unsupported(p->err, p->path, "post_processor", type);
    for (i = gen_json_first(gen_json_get(v, "processors")); i && rc == 0; i = gen_json_next(i)) {
        type = get_string(i, "type");
        n += !strcmp(type, "TemplateProcessing");
        if (!strcmp(type, "Sequence") || n > 1)
            return unsupported(p->err, p->path, "post_processor.processors", type);
        rc = read_post(p, i);
    }
    return rc;
}

/* ---- Putting it together ---------------------------------------------------------------- */

static int read_members(const struct gen_json *root, const char *path, struct rt_tokenizer *t,
                        struct mk_err *err)
{
    struct post post = {path, &t->vocab, &t->ends, err};
    const struct gen_json *model = gen_json_get(root, "model"), *decoder = get(root, "decoder");
    int rc = read_normalizer(get(root, "normalizer"), path, &t->nfc, err);

    if (rc == 0)
        rc = rt_split_make(get(root, "pre_tokenizer"), path, &t->split, err);
    if (rc == 0 && strcmp(get_string(decoder, "type"), "ByteLevel"))
        rc = unsupported(err, path, "decoder", decoder ? get_string(decoder, "type") : "null");
    if (rc == 0)
        rc = get_flag(model, "ignore_merges", path, &t->ignore_merges, err);
    if (rc == 0)
        rc = read_unk(model, path, t, err);
    if (rc == 0)
        rc = rt_added_read(get(root, "added_tokens"), path, t->nfc, &t->vocab, &t->added, err);
    if (rc == 0)
        rc = read_post(&post, get(root, "post_processor"));
    return rc;
}

static int read_tokenizer(const char *path, int limit, struct rt_tokenizer *t, struct mk_err *err)
{
    struct rt_range vocab, merges;
    struct gen_json *root = NULL;
    const struct gen_json *model;
    char *text = NULL;
    size_t len = 0;
    int rc = read_file(path, &text, &len, err);

    if (rc)
        return rc;
    rt_vocab_locate(text, len, &vocab, &merges);
    rc = parse_rest(text, len, vocab, merges, path, &root, err);
    if (rc)
        goto done;
    model = gen_json_get(root, "model");
    if (!gen_json_is_object(model))
        rc = gen_fail(err, MK_EFORMAT, "%s: \"model\" is missing or not an object", path);
    if (rc == 0)
        rc = check_model(model, path, err);
    if (rc == 0 && vocab.end == 0)
        rc = gen_fail(err, MK_EFORMAT, "%s: model.vocab is missing or not an object", path);
    if (rc == 0 && merges.end == 0)
        rc = gen_fail(err, MK_EFORMAT, "%s: model.merges is missing or not a list", path);
    if (rc == 0)
        rc = rt_vocab_read(text, vocab, merges, path, limit, &t->vocab, err);
    if (rc == 0)
        rc = read_members(root, path, t, err);
done:
    gen_json_free(root);
    free(text);
    return rc;
}

/* Of tokenizer_config.json only the chat template matters: chat.c looks for default
   system texts in it.  It may be a string, a list of named ones, or not there. */
static int read_config(const char *path, struct rt_tokenizer *t, struct mk_err *err)
{
    struct gen_json *root;
    const char *text;
    int rc = gen_json_read(path, MAX_CONFIG, &root, err);

    if (rc == MK_ENOENT)
        return 0;
    if (rc)
        return rc;
    text = gen_json_string(gen_json_get(root, "chat_template"));
    if (text) {
        t->chat_template = strdup(text);
        if (!t->chat_template)
            rc = gen_fail(err, MK_ENOMEM, "%s: not enough memory", path);
    }
    gen_json_free(root);
    return rc;
}

int rt_tokenizer_open(const char *dir, int vocab, struct rt_tokenizer **out, struct mk_err *err)
{
    char path[4096];
    struct rt_tokenizer *t;
    int rc;

    *out = NULL;
    if (vocab < 1 || vocab > MAX_VOCAB)
        return gen_fail(err, MK_EINVAL, "rt_tokenizer_open: vocab %d is not in 1 to %d", vocab,
                        MAX_VOCAB);
    if (strlen(dir) > sizeof path - 32)
        return gen_fail(err, MK_EINVAL, "rt_tokenizer_open: the folder's name is too long");
    t = calloc(1, sizeof *t);
    if (!t)
        return gen_fail(err, MK_ENOMEM, "not enough memory for a tokenizer");
    snprintf(path, sizeof path, "%s/tokenizer.json", dir);
    rc = read_tokenizer(path, vocab, t, err);
    if (rc == 0) {
        snprintf(path, sizeof path, "%s/tokenizer_config.json", dir);
        rc = read_config(path, t, err);
    }
    if (rc)
        rt_tokenizer_free(t);
    else
        *out = t;
    return rc;
}

void rt_tokenizer_free(struct rt_tokenizer *t)
{
    if (!t)
        return;
    rt_vocab_free(&t->vocab);
    rt_added_free(&t->added);
    rt_split_free(t->split);
    free(t->chat_template);
    free(t);
}
