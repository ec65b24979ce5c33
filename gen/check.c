/* check.c - a proof, before anything runs, that no CTA waits for ever or overwrites what another
   still reads.  A token is a list of steps, the same for every CTA: send my words of a hop, or
   wait for those that I need.  From the plan follows who sends each word and who waits for it.
   - No deadlock: what is awaited was sent by a step before.  Sending never waits, so that the
     CTA that is furthest behind can always go on.
   - No word is overwritten too soon: whoever sends into a buffer again must know that all who
     read it last time have done so.  A CTA knows what it did, and, of every CTA whose words it
     waits for, what that one knew when it sent them (check_reuse). */
#include "config.h"

#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gen/check.h"
#include "gen/gen.h"
#include "runtime/abi.h"

/* ---- The program of a token (decode.cu.m4, head.cu.m4) ------------------------- */

/* A hop from everyone to everyone. */
#define GRID(stage, when, hop, tag)                                                                \
    {stage, when, GEN_SEND, hop, tag},                                                             \
    {                                                                                              \
        stage, when, GEN_WAIT, hop, tag                                                            \
    }
#define DIGITS_2(when, tag)                                                                        \
    GRID("count_digit", when, GEN_HOP_COUNT, tag), GRID("count_digit", when, GEN_HOP_COUNT, tag + 1)
#define DIGITS_8(when, tag)                                                                        \
    DIGITS_2(when, tag), DIGITS_2(when, tag + 2), DIGITS_2(when, tag + 4), DIGITS_2(when, tag + 6)

const struct gen_step gen_steps[] = {
    {"qkv", GEN_ALWAYS, GEN_SEND, GEN_HOP_QKV, GEN_LAYER_TAG},
    {"attn", GEN_ALWAYS, GEN_WAIT, GEN_HOP_QKV, GEN_LAYER_TAG},
    {"attn", GEN_WHOLE, GEN_SEND, GEN_HOP_ATTN, GEN_LAYER_TAG},
    {"attn", GEN_SPLIT, GEN_SEND, GEN_HOP_PART, GEN_LAYER_TAG},
    {"attn", GEN_SPLIT, GEN_SEND, GEN_HOP_SCALE, GEN_LAYER_TAG},
    {"attn_merge", GEN_SPLIT, GEN_WAIT, GEN_HOP_PART, GEN_LAYER_TAG},
    {"attn_merge", GEN_SPLIT, GEN_WAIT, GEN_HOP_SCALE, GEN_LAYER_TAG},
    {"attn_merge", GEN_SPLIT, GEN_SEND, GEN_HOP_ATTN, GEN_LAYER_TAG},
    {"attn_out", GEN_ALWAYS, GEN_WAIT, GEN_HOP_ATTN, GEN_LAYER_TAG},
    {"attn_out", GEN_ALWAYS, GEN_SEND, GEN_HOP_O, GEN_LAYER_TAG},
    {"add_norm", GEN_ALWAYS, GEN_WAIT, GEN_HOP_O, GEN_LAYER_TAG},
    {"mlp", GEN_ALWAYS, GEN_SEND, GEN_HOP_MLP, GEN_LAYER_TAG},
    {"mlp_down", GEN_ALWAYS, GEN_WAIT, GEN_HOP_MLP, GEN_LAYER_TAG},
    {"mlp_down", GEN_ALWAYS, GEN_SEND, GEN_HOP_DOWN, GEN_LAYER_TAG},
    {"add_norm", GEN_ALWAYS, GEN_WAIT, GEN_HOP_DOWN, GEN_LAYER_TAG},
    GRID("grid_best", GEN_GREEDY | GEN_TOP_K | GEN_TOP_P, GEN_HOP_BEST, 0),
    DIGITS_8(GEN_TOP_K, 1),
    DIGITS_8(GEN_TOP_P, 9),
    GRID("grid_best", GEN_SAMPLE, GEN_HOP_BEST, 17),
    {NULL, 0, 0, 0, 0}};

/* Every sampler. */
static const int samplers[] = {GEN_GREEDY, GEN_SAMPLE, GEN_SAMPLE | GEN_TOP_K,
                               GEN_SAMPLE | GEN_TOP_P, GEN_SAMPLE | GEN_TOP_K | GEN_TOP_P};

/* ---- Who sends, who waits ------------------------------------------------------ */

/* A CTA sends the words of a hop in units, and waits for groups of units. */
enum deal { BLOCKS, TASKS, TURNS }; /* a phase's blocks; attention's tasks; CTA c: c, c + ctas .. */

struct shape {
    const char *name;
    int deal, phase; /* phase: with BLOCKS */
    int unit_words;
    int units;         /* that are awaited */
    int group, groups; /* of unit u: u / group % groups */
};

static int head_words(const struct gen_plan *p)
{
    return p->model.E / 8 * 3;
}

static struct shape hop_shape(const struct gen_plan *p, int hop, int splits)
{
    const struct gen_model *m = &p->model;
    const int head = m->E / 8, merged = splits > 1;
    const struct shape shapes[GEN_HOPS] = {
        [GEN_HOP_QKV] = {"QKV", BLOCKS, GEN_QKV, 3, (m->H + 2 * m->K) * head, head,
                         m->H + 2 * m->K},
        [GEN_HOP_PART] = {"PART", TASKS, 0, head * 3, merged ? splits * m->H : 0, 1, m->H},
        [GEN_HOP_SCALE] = {"SCALE", TASKS, 0, 1, merged ? splits * m->H : 0, 1, m->H},
        [GEN_HOP_ATTN] = {"ATTN", merged ? TURNS : TASKS, 0, merged ? 1 : head * 3,
                          merged ? m->H * head * 3 : m->H, 1, 1},
        [GEN_HOP_O] = {"O", BLOCKS, GEN_O, 3, m->D / 8, 1, 1},
        [GEN_HOP_MLP] = {"MLP", BLOCKS, GEN_MLP, 3, m->F / 8, 1, 1},
        [GEN_HOP_DOWN] = {"DOWN", BLOCKS, GEN_DOWN, 3, m->D / 8, 1, 1},
        [GEN_HOP_BEST] = {"BEST", TURNS, 0, 1, p->ctas, 1, 1},
        [GEN_HOP_COUNT] = {"COUNT", TURNS, 0, 16, p->ctas, 1, 1},
    };

    return shapes[hop];
}

/* Tasks are (KV head, group of its query heads, split). */
struct task {
    int head, split, q0, queries;
};

static struct task task_of(const struct gen_plan *p, int task)
{
    const struct gen_model *m = &p->model;
    const int ratio = m->H / m->K, head = task % m->K, group = task / m->K % p->groups;
    const int q0 = head * ratio + group * p->head_group, left = (head + 1) * ratio - q0;

    return (struct task){head, task / (m->K * p->groups), q0,
                         left < p->head_group ? left : p->head_group};
}

enum { NOBODY = 0xffff, MOST_CTAS = 1024, TOKENS = 3, SAMPLER = 2 };
typedef uint64_t set; /* CTAs: as many of these as "wide" says */

struct hop {
    struct shape shape;
    uint16_t *sender; /* [units] */
    set *senders;     /* [groups] */
    uint16_t *awaits; /* [ctas][most]: groups, then NOBODY */
    int most;
    set *all_senders, *readers;
};

/* A step of the tokens at work. */
struct use {
    const struct gen_step *step;
    int tag, layer, token, many; /* layer: 0, 1 or SAMPLER; many: splits */
};

struct check {
    const struct gen_plan *p;
    struct mk_err *err;
    int wide;
    int splits[2];
    struct hop hop[2][GEN_HOPS]; /* with few and with many splits */
    set *know;                   /* [ctas]: who has read, as far as a CTA knows */
    set *sent[GEN_HOPS];         /* [ctas]: KNOW when the words of a hop were sent */
    set *together;               /* [groups] */
    struct use use[TOKENS * 2 * GEN_MOST_STEPS];
    int uses;
};

static void add(set *s, int cta)
{
    s[cta / 64] |= (set) 1 << cta % 64;
}

static int first_of(set s, int word)
{
    return word * 64 + __builtin_ctzll(s);
}

/* Unit UNIT of hop H is sent by CTA. */
static int deal_unit(struct check *k, struct hop *h, int64_t unit, int cta)
{
    const struct shape *s = &h->shape;

    if (unit < 0 || unit >= s->units)
        return gen_fail(k->err, MK_EINVAL,
                        "plan: hop %s: CTA %d sends word %lld, and only 0..%d are awaited", s->name,
                        cta, (long long) unit * s->unit_words, s->units * s->unit_words - 1);
    if (h->sender[unit] != NOBODY)
        return gen_fail(k->err, MK_EINVAL, "plan: hop %s: word %d is sent by CTA %d and by CTA %d",
                        s->name, (int) unit * s->unit_words, h->sender[unit], cta);
    h->sender[unit] = (uint16_t) cta;
    add(h->senders + (int) unit / s->group % s->groups * k->wide, cta);
    add(h->all_senders, cta);
    return 0;
}

/* gemv.cu.m4: my_blocks. */
static int my_blocks(const struct gen_plan *p, const struct gen_phase *f, int cta)
{
    const int dealt = f->blocks / f->step;

    return (dealt / p->ctas + (cta < dealt % p->ctas)) * f->step;
}

/* gemv.cu.m4: my_block; mlp.cu.m4 sends a block for two, gate and up. */
static int deal_blocks(struct check *k, struct hop *h, int cta)
{
    const struct gen_phase *f = &k->p->phase[h->shape.phase];
    const int n = my_blocks(k->p, f, cta), merged = h->shape.phase == GEN_MLP ? 2 : 1;
    int rc = 0;

    for (int local = 0; local < n && rc == 0; local += merged)
        rc = deal_unit(
            k, h,
            (((int64_t) (local / f->step) * k->p->ctas + cta) * f->step + local % f->step) / merged,
            cta);
    return rc;
}

/* attn.cu.m4: attn. */
static int deal_tasks(struct check *k, struct hop *h, int splits, int cta)
{
    const int tasks = k->p->model.K * k->p->groups * splits;
    int rc = 0;

    for (int i = cta; i < tasks && h->shape.units; i += k->p->ctas) {
        const struct task t = task_of(k->p, i);
        for (int q = t.q0; q < t.q0 + t.queries && rc == 0; q++)
            rc = deal_unit(k, h, (int64_t) t.split * k->p->model.H + q, cta);
    }
    return rc;
}

/* The I-th group of hop HOP that CTA waits for, or NOBODY. */
static int awaited(const struct gen_plan *p, int hop, int splits, int cta, int i)
{
    const struct gen_model *m = &p->model;

    if (hop == GEN_HOP_QKV) { /* the task's query heads, the key head, the value head */
        const int heads = p->head_group + 2, at = i % heads;
        const int task = cta + i / heads * p->ctas;
        const struct task t = task_of(p, task);
        if (task >= m->K * p->groups * splits)
            return NOBODY;
        return at < p->head_group ? t.q0 + (at < t.queries ? at : t.queries - 1)
                                  : m->H + (at > p->head_group) * m->K + t.head;
    }
    if (hop == GEN_HOP_PART || hop == GEN_HOP_SCALE) {
        const int word = cta + i * p->ctas;
        return splits > 1 && word < m->H * head_words(p) ? word / head_words(p) : NOBODY;
    }
    return i ? NOBODY : 0;
}

static int most_awaited(const struct gen_plan *p, int hop, int splits)
{
    int i = 0;

    while (awaited(p, hop, splits, 0, i) != NOBODY)
        i++;
    return i;
}

/* Who sends what of hop HOP, and who waits for what; each word must have one sender. */
static int deal_hop(struct check *k, int hop, int many)
{
    struct hop *h = &k->hop[many][hop];
    const struct shape *s = &h->shape;
    int rc = 0;

    memset(h->sender, 0xff, (size_t) s->units * sizeof *h->sender);
    for (int cta = 0; cta < k->p->ctas && rc == 0; cta++) {
        if (s->deal == BLOCKS)
            rc = deal_blocks(k, h, cta);
        else if (s->deal == TASKS)
            rc = deal_tasks(k, h, k->splits[many], cta);
        else
            for (int i = cta; i < s->units && rc == 0; i += k->p->ctas)
                rc = deal_unit(k, h, i, cta);
        for (int i = 0; i < h->most; i++)
            h->awaits[cta * h->most + i] = (uint16_t) awaited(k->p, hop, k->splits[many], cta, i);
        if (h->most && h->awaits[cta * h->most] != NOBODY)
            add(h->readers, cta);
    }
    for (int i = 0; i < s->units && rc == 0; i++)
        if (h->sender[i] == NOBODY)
            rc = gen_fail(k->err, MK_EINVAL,
                          "plan: hop %s: word %d is awaited and no CTA sends it: deadlock", s->name,
                          i * s->unit_words);
    return rc;
}

/* Give all arrays their place behind BASE; returns the bytes that they take. */
static size_t lay_out(struct check *k, char *base)
{
    const size_t ctas = (size_t) k->p->ctas, row = (size_t) k->wide * sizeof(set);
    size_t at = 0, groups = 0;

#define PLACE(pointer, bytes)                                                                      \
    ((pointer) = base ? (void *) (base + at) : NULL, at += ((bytes) + 7) & ~(size_t) 7)
    for (int i = 0; i < 2 * GEN_HOPS; i++) {
        struct hop *h = &k->hop[i / GEN_HOPS][i % GEN_HOPS];
        h->shape = hop_shape(k->p, i % GEN_HOPS, k->splits[i / GEN_HOPS]);
        h->most = most_awaited(k->p, i % GEN_HOPS, k->splits[i / GEN_HOPS]);
        groups = (size_t) h->shape.groups > groups ? (size_t) h->shape.groups : groups;
        PLACE(h->sender, (size_t) h->shape.units * sizeof *h->sender);
        PLACE(h->awaits, ctas * (size_t) h->most * sizeof *h->awaits);
        PLACE(h->senders, (size_t) h->shape.groups * row);
        PLACE(h->all_senders, row);
        PLACE(h->readers, row);
    }
    PLACE(k->know, ctas * row);
    PLACE(k->together, groups * row);
    for (int i = 0; i < GEN_HOPS; i++)
        PLACE(k->sent[i], ctas * row);
#undef PLACE
    return at;
}

/* ---- Order --------------------------------------------------------------------- */

/* Two layers (the last, and one before) and the sampler, of tokens with the few, the many, or
   both counts of splits. */
static void unroll(struct check *k, const struct gen_step *steps, const int *many, int sampler)
{
    const int L = k->p->model.L;

    k->uses = 0;
    for (int token = 0; token < TOKENS; token++) {
        const int now = sampler | (k->splits[many[token]] > 1 ? GEN_SPLIT : GEN_WHOLE);
        for (int layer = 0; layer <= SAMPLER; layer++)
            for (const struct gen_step *s = steps; s->stage; s++) {
                const int tag = s->tag == GEN_LAYER_TAG ? layer : L + s->tag;
                if (s->when & now && (s->tag == GEN_LAYER_TAG) == (layer < SAMPLER))
                    k->use[k->uses++] =
                        (struct use){s, token * MK_TOKEN_TAGS(L) + tag, layer, token, many[token]};
            }
    }
}

/* "layer l's" and so on, for sentences. */
static const char *whose(const struct check *k, const struct use *u, char *text, size_t size)
{
    if (u->token > 0)
        snprintf(text, size, "%s token's", u->token == 1 ? "the next" : "a later");
    else if (u->layer < SAMPLER)
        snprintf(text, size, "layer l%s's", u->layer ? "+1" : "");
    else
        snprintf(text, size, "tag L+%d's", u->tag - k->p->model.L);
    return text;
}

/* Every step waits for the words of a step before it; every use of a hop has a tag of its own. */
static int check_order(struct check *k)
{
    const struct use *last[GEN_HOPS] = {NULL};
    unsigned unread = 0;

    for (const struct use *u = k->use; u < k->use + k->uses; u++) {
        const int hop = u->step->hop;
        const char *name = k->hop[0][hop].shape.name, *stage = u->step->stage;
        const struct use *sent = last[hop];
        if (u->step->op == GEN_WAIT && (!sent || sent->tag != u->tag))
            return gen_fail(
                k->err, MK_EINVAL,
                "plan: hop %s: CTAs wait in %s for words that nobody has sent: deadlock", name,
                stage);
        if (u->step->op == GEN_WAIT) {
            unread &= ~(1u << hop);
            continue;
        }
        if (unread >> hop & 1)
            return gen_fail(k->err, MK_EINVAL,
                            "plan: hop %s: no CTA waits for what %s sends before %s sends again",
                            name, sent->step->stage, stage);
        if (sent && u->tag <= sent->tag)
            return gen_fail(k->err, MK_EINVAL,
                            "plan: hop %s: %s sends with tag %d behind one with tag %d", name,
                            stage, u->tag, sent->tag);
        last[hop] = u;
        unread |= 1u << hop;
    }
    return 0;
}

/* A token's tags are its own: the layers', then the sampler's, MK_TOKEN_TAGS in all. */
static int check_tags(struct check *k, const struct gen_step *steps)
{
    const int L = k->p->model.L;

    for (const struct gen_step *s = steps; s->stage; s++)
        if (s->tag != GEN_LAYER_TAG && (s->tag < 0 || L + s->tag >= MK_TOKEN_TAGS(L)))
            return gen_fail(k->err, MK_EINVAL,
                            "plan: hop %s: %s uses tag %d of a token, which has %d",
                            k->hop[0][s->hop].shape.name, s->stage, L + s->tag, MK_TOKEN_TAGS(L));
    return 0;
}

/* Everyone who waits for hop H learns what those knew who sent its words. */
static void learn(struct check *k, const struct hop *h, const set *sent)
{
    const int wide = k->wide;

    memset(k->together, 0, (size_t) (h->shape.groups * wide) * sizeof(set));
    for (int g = 0; g < h->shape.groups; g++)
        for (int i = 0; i < wide; i++)
            for (set s = h->senders[g * wide + i]; s; s &= s - 1)
                for (int j = 0; j < wide; j++)
                    k->together[g * wide + j] |= sent[first_of(s, i) * wide + j];
    for (int cta = 0; cta < k->p->ctas; cta++) {
        const uint16_t *g = h->awaits + cta * h->most;
        for (int i = 0; i < h->most && g[i] != NOBODY; i++)
            for (int j = 0; j < wide; j++)
                k->know[cta * wide + j] |= k->together[g[i] * wide + j];
    }
}

/* Does one of WRITERS (NULL: any CTA) not know of one of READERS?  Which, of whom? */
static int unaware(const struct check *k, const set *writers, const set *readers, int *w, int *r)
{
    for (*w = 0; *w < k->p->ctas; ++*w) {
        const set *known = k->know + *w * k->wide;
        if (writers && !(writers[*w / 64] >> *w % 64 & 1))
            continue;
        for (int i = 0; i < k->wide; i++)
            if (readers[i] & ~known[i])
                return *r = first_of(readers[i] & ~known[i], i), 1;
    }
    return 0;
}

/* The step that sends into the buffer that step READ reads, or NULL. */
static const struct use *next_in_buffer(const struct check *k, const struct use *read)
{
    const int buffers = k->p->hop_buffers[read->step->hop];

    for (const struct use *u = read + 1; u < k->use + k->uses; u++)
        if (u->step->op == GEN_SEND && u->step->hop == read->step->hop &&
            u->tag % buffers == read->tag % buffers)
            return u;
    return NULL;
}

/* Who sends again into the buffer that step READ reads must know that all have read it. */
static int check_reuse(struct check *k, const struct use *read)
{
    const struct use *again = next_in_buffer(k, read);
    const struct hop *h = &k->hop[read->many][read->step->hop];
    const size_t bytes = (size_t) (k->p->ctas * k->wide) * sizeof(set);
    unsigned fresh = 0; /* hops that were sent since */
    char old[32], new[32];
    int w, r;

    if (!again)
        return 0;
    memset(k->know, 0, bytes);
    for (int cta = 0; cta < k->p->ctas; cta++)
        k->know[cta * k->wide + cta / 64] = h->readers[cta / 64] & (set) 1 << cta % 64;
    for (const struct use *u = read + 1; u < again; u++) {
        const int hop = u->step->hop;
        if (u->step->op == GEN_SEND) {
            memcpy(k->sent[hop], k->know, bytes);
            fresh |= 1u << hop;
        } else if (fresh >> hop & 1) {
            learn(k, &k->hop[u->many][hop], k->sent[hop]);
            if (!unaware(k, NULL, h->readers, &w, &r))
                return 0;
        }
    }
    if (!unaware(k, k->hop[again->many][again->step->hop].all_senders, h->readers, &w, &r))
        return 0;
    return gen_fail(k->err, MK_EINVAL,
                    "plan: hop %s: CTA %d may send %s words (%s) while CTA %d still reads %s (%s): "
                    "nothing that CTA %d waits for in between comes from CTA %d, directly or "
                    "through others (attention splits: %d)",
                    h->shape.name, w, whose(k, again, new, sizeof new), again->step->stage, r,
                    whose(k, read, old, sizeof old), read->step->stage, w, r,
                    k->splits[read->many]);
}

/* Every change of the split count, with the first sampler: others have its steps and more, so
   that only their own buffers are left to look at. */
static int check_tokens(struct check *k, const struct gen_step *steps)
{
    int rc = check_tags(k, steps);

    for (size_t i = 0; i < sizeof samplers / sizeof *samplers; i++)
        for (int kind = 0; kind < (i ? 1 : 4) && rc == 0; kind++) {
            unroll(k, steps, (const int[TOKENS]){kind / 2, kind % 2, kind / 2}, samplers[i]);
            rc = check_order(k);
            for (const struct use *u = k->use; rc == 0 && u < k->use + k->uses && !u->token; u++)
                if (u->step->op == GEN_WAIT && (!i || u->layer == SAMPLER))
                    rc = check_reuse(k, u);
        }
    return rc;
}

int gen_steps_check(const struct gen_plan *p, const struct gen_step *steps, int few, int many,
                    struct mk_err *err)
{
    struct check k = {.p = p, .err = err, .wide = (p->ctas + 63) / 64, .splits = {few, many}};
    const size_t size = lay_out(&k, NULL);
    char *memory = calloc(size, 1);
    int rc = 0;

    if (!memory)
        return gen_fail(err, MK_ENOMEM, "plan: no memory to check it");
    lay_out(&k, memory);
    for (int i = 0; i < GEN_HOPS && rc == 0; i++) {
        rc = deal_hop(&k, i, 0);
        if (i >= GEN_HOP_O) /* no matter of splits */
            k.hop[1][i] = k.hop[0][i];
        else if (rc == 0)
            rc = deal_hop(&k, i, 1);
    }
    if (rc == 0)
        rc = check_tokens(&k, steps);
    free(memory);
    return rc;
}

/* ---- Sizes --------------------------------------------------------------------- */

static const char *const phase_names[GEN_PHASES] = {"QKV", "O", "MLP", "DOWN", "HEAD"};

/* What the arithmetic above divides by and stores. */
static int check_numbers(const struct gen_plan *p, struct mk_err *err)
{
    const struct gen_model *m = &p->model;
    const int ratio = m->H / m->K;
    const int64_t tags = (int64_t) p->tokens_per_launch * MK_TOKEN_TAGS(m->L);

    if (p->ctas < 1 || p->ctas > MOST_CTAS)
        return gen_fail(err, MK_EINVAL, "plan: %d CTAs; the check takes 1..%d", p->ctas, MOST_CTAS);
    if (p->head_group < 1 || p->groups != (ratio + p->head_group - 1) / p->head_group)
        return gen_fail(err, MK_EINVAL,
                        "plan: %d groups of %d query heads are not the %d of a KV head", p->groups,
                        p->head_group, ratio);
    /* engine.c starts over before 2^31; a cleared exchange has tag 0. */
    if (p->epoch0 < 1 || p->epoch0 > INT_MAX || tags >= INT_MAX)
        return gen_fail(err, MK_EINVAL,
                        "plan: epoch0 is %u and a launch takes %lld tags; tags must be 1..%d",
                        p->epoch0, (long long) tags, INT_MAX);
    /* A CTA that sends the parts of one task may not have read what it needs for another. */
    if (p->max_splits < 1 || (p->max_splits > 1 && m->K * p->groups > p->ctas / p->max_splits))
        return gen_fail(err, MK_EINVAL,
                        "plan: hop PART: %d splits of %d tasks are more than one task for each of "
                        "%d CTAs",
                        p->max_splits, m->K * p->groups, p->ctas);
    return 0;
}

static int check_exchange(const struct gen_plan *p, struct mk_err *err)
{
    for (int i = 0; i < GEN_HOPS; i++) {
        struct shape s = hop_shape(p, i, p->max_splits), one = hop_shape(p, i, 1);
        const int from = p->hop_offset[i], words = p->hop_words[i];
        int64_t need = (int64_t) s.units * s.unit_words;
        if (p->hop_buffers[i] < 1)
            return gen_fail(err, MK_EINVAL, "plan: hop %s has no buffer", s.name);
        need = (need > one.units * one.unit_words ? need : one.units * one.unit_words) *
               p->hop_buffers[i];
        if (words < need)
            return gen_fail(err, MK_EINVAL,
                            "plan: hop %s: its %d CTAs send and await %lld words, and it has %d",
                            s.name, p->ctas, (long long) need, words);
        if (from < 0 || from > p->exchange_words - words)
            return gen_fail(err, MK_EINVAL,
                            "plan: hop %s: words %d..%d are not inside the exchange's %d", s.name,
                            from, from + words - 1, p->exchange_words);
        for (int j = 0; j < i; j++)
            if (from < p->hop_offset[j] + p->hop_words[j] && p->hop_offset[j] < from + words)
                return gen_fail(err, MK_EINVAL, "plan: hops %s and %s overlap at word %d",
                                hop_shape(p, j, 1).name, s.name,
                                from > p->hop_offset[j] ? from : p->hop_offset[j]);
    }
    return 0;
}

/* Producer and consumers count the chunks of a phase alike: blocks x spans.  Those must be the
   block's units, fit into a stage, and lie in the CTA's stream before the next phase's. */
static int check_phase(const struct gen_plan *p, int id, struct mk_err *err)
{
    const struct gen_phase *f = &p->phase[id];
    const char *name = phase_names[id];
    const int at_once = f->spans == 1 ? 2 : 1; /* gemv.cu.m4: multiply */
    const int64_t end = id == GEN_HEAD       ? p->cta_bytes - p->head_offset
                        : id + 1 == GEN_HEAD ? p->layer_bytes
                                             : p->phase[id + 1].offset;

    if (f->step < 1 || f->blocks < 0 || f->blocks % f->step)
        return gen_fail(err, MK_EINVAL, "plan: phase %s: %d blocks cannot be dealt by %d", name,
                        f->blocks, f->step);
    if (f->spans < 1 || f->span_units < 1 || (int64_t) f->spans * f->span_units < f->units ||
        (int64_t) (f->spans - 1) * f->span_units >= f->units)
        return gen_fail(err, MK_EINVAL,
                        "plan: phase %s: %d chunks of %d units are not a block of %d units", name,
                        f->spans, f->span_units, f->units);
    if ((int64_t) f->span_units * 512 > p->stage_bytes)
        return gen_fail(err, MK_EINVAL,
                        "plan: phase %s: a chunk has %d bytes and a stage of the ring %d", name,
                        f->span_units * 512, p->stage_bytes);
    if (p->stages < at_once)
        return gen_fail(err, MK_EINVAL,
                        "plan: phase %s: consumers wait for %d chunks at once; with stages %d that "
                        "is a deadlock",
                        name, at_once, p->stages);
    if (f->offset + (int64_t) my_blocks(p, f, 0) * f->units * 512 > end)
        return gen_fail(err, MK_EINVAL,
                        "plan: phase %s: CTA 0's %d blocks do not end before the next phase begins",
                        name, my_blocks(p, f, 0));
    return 0;
}

int gen_plan_check(const struct gen_plan *p, struct mk_err *err)
{
    int rc = check_numbers(p, err);

    for (int i = 0; i < GEN_PHASES && rc == 0; i++)
        rc = check_phase(p, i, err);
    if (rc == 0 && (p->inflight_hop < 1 || p->inflight < p->inflight_hop))
        rc = gen_fail(err, MK_EINVAL,
                      "plan: inflight is %d and inflight_hop %d; they must be 1 or more, and "
                      "inflight the larger",
                      p->inflight, p->inflight_hop);
    if (rc == 0)
        rc = check_exchange(p, err);
    return rc ? rc : gen_steps_check(p, gen_steps, 1, p->max_splits, err);
}

/* ---- For reports --------------------------------------------------------------- */

/* The CTA of the task that sends query head Q of SPLIT. */
static int task_cta(const struct gen_plan *p, int split, int q)
{
    const int ratio = p->model.H / p->model.K;
    const int group = q % ratio / p->head_group;

    return ((split * p->groups + group) * p->model.K + q / ratio) % p->ctas;
}

/* Word WORD of hop HOP; ROW .. LAST are what a block's word has. */
static void describe(const struct gen_plan *p, int hop, int word, char *out, size_t size)
{
    const struct gen_model *m = &p->model;
    const int row = word / 3 * 8 + word % 3 * 3, last = row + (word % 3 < 2 ? 2 : 1);
    const int head = row / m->E, split = head / m->H, q = head % m->H;
    const struct shape s = hop_shape(p, hop, 1);
    char text[48];

    if (hop == GEN_HOP_QKV)
        snprintf(text, sizeof text, ", %s head %d",
                 head < m->H          ? "q"
                 : head < m->H + m->K ? "k"
                                      : "v",
                 head < m->H ? head : (head - m->H) % m->K);
    switch (hop) {
    case GEN_HOP_PART:
        snprintf(out, size, "(split %d, head %d, values %d..%d), sent by CTA %d", split, q,
                 row % m->E, last % m->E, task_cta(p, split, q));
        break;
    case GEN_HOP_SCALE:
        snprintf(out, size, "(split %d, head %d, maximum and sum), sent by CTA %d", word / m->H,
                 word % m->H, task_cta(p, word / m->H, word % m->H));
        break;
    case GEN_HOP_ATTN:
        snprintf(out, size,
                 "(head %d, values %d..%d), sent by CTA %d, or CTA %d when attention is split", q,
                 row % m->E, last % m->E, task_cta(p, 0, q), word % p->ctas);
        break;
    case GEN_HOP_BEST:
        snprintf(out, size, "(a candidate), sent by CTA %d", word);
        break;
    case GEN_HOP_COUNT:
        snprintf(out, size, "(buffer %d, digit %d), sent by CTA %d", word / 16 / p->ctas, word % 16,
                 word / 16 % p->ctas);
        break;
    default:
        snprintf(out, size, "(rows %d..%d%s), sent by CTA %d", row, last,
                 hop == GEN_HOP_QKV ? text : "", word / s.unit_words % p->ctas);
    }
}

void gen_hop_describe(const struct gen_plan *p, int word, char *out, size_t size)
{
    for (int i = 0; i < GEN_HOPS; i++) {
        const int at = word - p->hop_offset[i];
        if (at >= 0 && at < p->hop_words[i]) {
            int n = snprintf(out, size, "hop %s word %d ", hop_shape(p, i, 1).name, at);
            if (n >= 0 && (size_t) n < size)
                describe(p, i, at, out + n, size - (size_t) n);
            return;
        }
    }
    snprintf(out, size, "word %d, %s", word,
             word < 0 || word >= p->exchange_words ? "outside the exchange" : "between two hops");
}
