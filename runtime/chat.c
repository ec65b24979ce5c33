/* chat.c - chat templates, as data.

   A turn is written as text with {NAME} in it: {SYSTEM} and {USER} stand for what was
   written by people, any other name is a special token.  Text between two special tokens is
   encoded as one piece, without recognising special tokens in it, so nothing that a person
   writes can end a turn or begin another. */
#include <stdlib.h>
#include <string.h>

#include "gen/err.h"
#include "runtime/tokenfile.h"
#include "runtime/tokenizer.h"
#include "runtime/utf8.h"

struct dialect {
    const char *family;         /* gen_model.family, NULL: any */
    const char *needs[3];       /* special tokens by which it is recognised */
    const char *mark;           /* a text that the model's own template must have, when it is
                                   known; NULL: none */
    const char *system;         /* the default system text; NULL: no system turn */
    int bos;                    /* the first turn starts with what the post-processor adds */
    int trim;                   /* white space around what was written is dropped */
    const char *system_turn;
    const char *user_turn;
    const char *between;        /* what follows the token that ends an answer */
};

#define CHATML {"<|im_start|>", "<|im_end|>"}
#define CHATML_SYSTEM "{<|im_start|>}system\n{SYSTEM}{<|im_end|>}\n"
#define CHATML_USER "{<|im_start|>}user\n{USER}{<|im_end|>}\n{<|im_start|>}assistant\n"
#define LLAMA3 {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
#define LLAMA3_SYSTEM "{<|start_header_id|>}system{<|end_header_id|>}\n\n{SYSTEM}{<|eot_id|>}"
#define LLAMA3_DATES "{<|start_header_id|>}system{<|end_header_id|>}\n\n" \
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{SYSTEM}{<|eot_id|>}"
#define LLAMA3_USER "{<|start_header_id|>}user{<|end_header_id|>}\n\n{USER}{<|eot_id|>}" \
    "{<|start_header_id|>}assistant{<|end_header_id|>}\n\n"

#define QWEN25 "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
#define QWEN2 "You are a helpful assistant."
#define SMOLLM2 "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
#define DATES "Cutting Knowledge Date"

/* The first row that fits counts.  Sources: chat_template in the tokenizer_config.json of
   Qwen2.5, Qwen2, Qwen3, SmolLM2, Llama-3.1 and -3.2 (their date, where a program gives
   none), Llama-3. */
static const struct dialect dialects[] = {
    {"qwen2", CHATML, QWEN25, QWEN25, 0, 0, CHATML_SYSTEM, CHATML_USER, "\n"},
    {"qwen2", CHATML, QWEN2, QWEN2, 0, 0, CHATML_SYSTEM, CHATML_USER, "\n"},
    {"llama", CHATML, SMOLLM2, SMOLLM2, 0, 0, CHATML_SYSTEM, CHATML_USER, "\n"},
    {NULL, CHATML, NULL, NULL, 0, 0, CHATML_SYSTEM, CHATML_USER, "\n"},
    {NULL, LLAMA3, DATES, "", 1, 1, LLAMA3_DATES, LLAMA3_USER, ""},
    {NULL, LLAMA3, NULL, NULL, 1, 1, LLAMA3_SYSTEM, LLAMA3_USER, ""},
};

/* A place for tokens, as the caller of rt_chat_tokens gave it. */
struct list {
    int32_t *tokens;
    size_t cap, n;
};

static int has_special(const struct rt_tokenizer *t, const char *text)
{
    const struct rt_added_token *k = rt_added_find(&t->added, text);

    return k && k->special;
}

static int fits(const struct rt_tokenizer *t, const char *family, const struct dialect *d)
{
    if (d->family && (!family || strcmp(d->family, family)))
        return 0;
    for (int i = 0; i < 3 && d->needs[i]; i++)
        if (!has_special(t, d->needs[i]))
            return 0;
    return !d->mark || !t->chat_template || strstr(t->chat_template, d->mark);
}

static const struct dialect *dialect_of(const struct rt_tokenizer *t, const char *family)
{
    for (size_t i = 0; i < sizeof dialects / sizeof *dialects; i++)
        if (fits(t, family, &dialects[i]))
            return &dialects[i];
    return NULL;
}

int rt_chat_known(const struct rt_tokenizer *t, const char *family)
{
    return dialect_of(t, family) != NULL;
}

/* ---- One turn -------------------------------------------------------------------- */

/* Encode LEN bytes behind what LIST has.  A special token in the outcome can only come from a
   tokenizer that was made so; it is refused. */
static int add_text(const struct rt_tokenizer *t, const char *text, size_t len, int flags,
                    struct list *list, struct mk_err *err)
{
    size_t left = list->n < list->cap ? list->cap - list->n : 0, n = 0;
    int rc = rt_tokenizer_encode(t, text, len, flags, left ? list->tokens + list->n : NULL, left,
                                 &n, err);

    for (size_t i = 0; rc == 0 && !(flags & RT_ADD_BOS) && i < n && i < left; i++)
        if (t->vocab.token[list->tokens[list->n + i]].special)
            rc = gen_fail(err, MK_EFORMAT, "the tokenizer makes special token %d out of ordinary "
                          "text", list->tokens[list->n + i]);
    if (rc == 0)
        list->n += n;
    return rc;
}

/* Drop white space around the *LEN bytes at S. */
static const char *trim(const char *s, size_t *len)
{
    uint32_t c;
    int n;

    while (*len && (n = rt_utf8_get(s, &c), rt_utf8_is_space(c))) {
        s += n;
        *len -= (size_t)n;
    }
    while (*len && (n = rt_utf8_get_before(s + *len, &c), rt_utf8_is_space(c)))
        *len -= (size_t)n;
    return s;
}

/* The buffer of the text between two special tokens. */
struct piece {
    char *text;
    size_t len;
};

/* Handle {NAME}: one of the two texts joins the piece, a token ends it. */
static int add_name(const struct rt_tokenizer *t, const struct dialect *d, const char *name,
                    size_t name_len, const char *written, struct piece *p, struct list *list,
                    struct mk_err *err)
{
    char token[64] = "";
    size_t len = strlen(written);
    int rc = 0;

    memcpy(token, name, name_len);          /* our own names: short */
    if (!strcmp(token, "SYSTEM") || !strcmp(token, "USER")) {
        if (d->trim)
            written = trim(written, &len);
        memcpy(p->text + p->len, written, len);
        p->len += len;
        return 0;
    }
    if (p->len)
        rc = add_text(t, p->text, p->len, 0, list, err);
    p->len = 0;
    if (rc)
        return rc;
    if (list->n < list->cap)
        list->tokens[list->n] = rt_added_find(&t->added, token)->id;
    list->n++;
    return 0;
}

/* Append TURN with WRITTEN in its place.  What P holds goes before it; what follows the last
   special token is left in P, for the next turn to join. */
static int add_turn(const struct rt_tokenizer *t, const struct dialect *d, const char *turn,
                    const char *written, struct piece *p, struct list *list, struct mk_err *err)
{
    int rc = 0;

    while (*turn && rc == 0) {
        const char *end;

        if (*turn != '{') {
            p->text[p->len++] = *turn++;
            continue;
        }
        end = strchr(turn, '}');
        rc = add_name(t, d, turn + 1, (size_t)(end - turn - 1), written, p, list, err);
        turn = end + 1;
    }
    return rc;
}

static int add_all(const struct rt_tokenizer *t, const struct dialect *d, const char *system,
                   const char *user, int first, struct piece *p, struct list *list,
                   struct mk_err *err)
{
    int rc = 0;

    if (first && d->bos)
        rc = add_text(t, "", 0, RT_ADD_BOS, list, err);
    if (rc == 0 && first && system)
        rc = add_turn(t, d, d->system_turn, system, p, list, err);
    if (rc == 0 && !first)
        rc = add_turn(t, d, d->between, "", p, list, err);
    if (rc == 0)
        rc = add_turn(t, d, d->user_turn, user, p, list, err);
    if (rc == 0 && p->len)
        rc = add_text(t, p->text, p->len, 0, list, err);
    return rc;
}

/* SYSTEM: NULL is the default, "" is no system turn. */
int rt_chat_tokens(const struct rt_tokenizer *t, const char *family, const char *system,
                   const char *user, int first, int32_t *tokens, size_t cap, size_t *n,
                   struct mk_err *err)
{
    const struct dialect *d = dialect_of(t, family);
    struct list list = {tokens, cap, 0};
    struct piece p = {NULL, 0};
    int rc;

    if (!d)
        return gen_fail(err, MK_EUNSUPPORTED, "the tokenizer has no chat template that we know");
    if (!system)
        system = d->system;
    else if (!*system)
        system = NULL;
    if (rt_utf8_valid(user, strlen(user)) < strlen(user))
        return gen_fail(err, MK_EFORMAT, "the message is not UTF-8 at byte %zu",
                        rt_utf8_valid(user, strlen(user)));
    if (system && rt_utf8_valid(system, strlen(system)) < strlen(system))
        return gen_fail(err, MK_EFORMAT, "the system text is not UTF-8 at byte %zu",
                        rt_utf8_valid(system, strlen(system)));
    p.text = malloc(strlen(user) + (system ? strlen(system) : 0) + 512);
    if (!p.text)
        return gen_fail(err, MK_ENOMEM, "not enough memory to encode the message");
    rc = add_all(t, d, system, user, first, &p, &list, err);
    if (rc == 0)
        *n = list.n;
    free(p.text);
    return rc;
}
