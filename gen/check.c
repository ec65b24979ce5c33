/* check.c - a proof, before anything runs, that no CTA waits for ever or overwrites what another
   still reads.  A token is a list of stages, the same for every CTA that has them.
   - No deadlock: what is awaited was sent in the same stage or in one before, so that all can go on
     in the order of the list.
   - No word is overwritten too soon: whoever sends into a buffer again must know that all who
     read it last time have done so.  A CTA knows what it did, and, of every CTA whose words it
     waits for, what that one knew when it sent them.
   CTAs differ by what their group has, heads or units or both: two groups of each kind and two
   ranks of each stand for all, since a plan has all the words that these send, and more.  Each
   keeps a vector clock: the last moment of every other one that it knows to be over.
   Hops inside a cluster are the same: a landing place is a buffer, the phases of its mbarrier are
   the tags, and all that comes to a CTA must also be awaited by it. */
#include "config.h"

#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "gen/check.h"
#include "gen/gen.h"
#include "runtime/abi.h"

/* ---- The program of a token (decode.cu.m4, head.cu.m4) ------------------------- */

/* Short for the tables below. */
enum { QKV = GEN_HOP_QKV, PART = GEN_HOP_PART, MLP = GEN_HOP_MLP, O = GEN_HOP_O };
enum { TEAM = GEN_HOP_TEAM, DOWN = GEN_HOP_DOWN, BEST = GEN_HOP_BEST, COUNT = GEN_HOP_COUNT };
enum { X_O = GEN_HOP_X_O, X_DOWN = GEN_HOP_X_DOWN, NONE = GEN_NO_HOP, LAYER = GEN_LAYER_TAG };
/* x[0] or x[1], and the squares beside it. */
enum { AFTER_O = 1 << X_O, AFTER_DOWN = 1 << X_DOWN };

/* Those who attend, far on. */
enum { ATTEND = GEN_HEADS | GEN_HELPS };

/* X is awaited in rows, at once behind add_norm.  Ranks that send QKV, PART or MLP meet before;
   others neither meet nor read x. */
static const struct gen_stage stages[] = {
    {"rows(QKV)", GEN_ALWAYS, GEN_HEADS, 0, NONE, QKV, NONE, AFTER_DOWN, LAYER, 1, GEN_NEAR},
    {"rows(QKV)", GEN_ALWAYS, ATTEND, 0, NONE, QKV, NONE, AFTER_DOWN, LAYER, 1, GEN_FAR},
    {"attn", GEN_ALWAYS, GEN_HEADS, 0, QKV, PART, NONE, 0, LAYER, 1, GEN_NEAR},
    {"attn", GEN_ALWAYS, ATTEND, 0, QKV, PART, NONE, 0, LAYER, 1, GEN_FAR},
    {"attn_merge", GEN_ALWAYS, GEN_HELPS, 0, PART, TEAM, NONE, 0, LAYER, 1, GEN_FAR},
    {"attn_merge", GEN_ALWAYS, GEN_HEADS, 0, PART, NONE, TEAM, 0, LAYER, 1, GEN_FAR},
    {"columns(O)", GEN_ALWAYS, GEN_HEADS, 1, PART, O, NONE, 0, LAYER, 1, GEN_NEAR},
    {"columns(O)", GEN_ALWAYS, GEN_HEADS, 1, NONE, O, NONE, 1 << PART, LAYER, 1, GEN_FAR},
    {"add_norm(O)", GEN_ALWAYS, GEN_ANY, 0, O, X_O, X_O, AFTER_DOWN, LAYER, 1, GEN_NEAR_FAR},
    {"rows(MLP)", GEN_ALWAYS, GEN_UNITS, 0, NONE, MLP, NONE, AFTER_O, LAYER, 1, GEN_NEAR_FAR},
    {"columns(DOWN)", GEN_ALWAYS, GEN_UNITS, 0, MLP, DOWN, NONE, 0, LAYER, 1, GEN_NEAR_FAR},
    {"add_norm(DOWN)", GEN_ALWAYS, GEN_ANY, 0, DOWN, X_DOWN, X_DOWN, AFTER_O, LAYER, 1,
     GEN_NEAR_FAR},
    {"rows(HEAD)", GEN_ALWAYS, GEN_ANY, 0, NONE, NONE, NONE, AFTER_DOWN, 0, 1, GEN_NEAR_FAR},
    {"grid_best", GEN_GREEDY | GEN_TOP_K | GEN_TOP_P, GEN_ANY, 1, NONE, BEST, BEST, 0, 0, 1,
     GEN_NEAR_FAR},
    {"count_digit", GEN_TOP_K, GEN_ANY, 1, NONE, COUNT, COUNT, 0, 1, 8, GEN_NEAR_FAR},
    {"count_digit", GEN_TOP_P, GEN_ANY, 1, NONE, COUNT, COUNT, 0, 9, 8, GEN_NEAR_FAR},
    {"grid_best", GEN_SAMPLE, GEN_ANY, 1, NONE, BEST, BEST, 0, 17, 1, GEN_NEAR_FAR},
    {NULL, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}};

const struct gen_graph gen_graph = {
    .hops = {[QKV] = {"QKV", ATTEND, GEN_TO_GROUP, GEN_SOME_RANKS, 1, ATTEND},
             [PART] = {"PART", ATTEND, GEN_TO_GROUP, GEN_SOME_RANKS, 1, ATTEND},
             [MLP] = {"MLP", GEN_UNITS, GEN_TO_GROUP, GEN_SOME_RANKS, 1, GEN_UNITS},
             [X_O] = {"X[0]", GEN_ANY, GEN_TO_GROUP, GEN_EACH_WARP, 1, GEN_ANY},
             [TEAM] = {"TEAM", GEN_HELPS, GEN_TO_TEAM, GEN_SOME_RANKS, 1, GEN_HEADS},
             [O] = {"O", GEN_HEADS, GEN_TO_RANK, GEN_EACH_RANK, 2, GEN_ANY},
             [DOWN] = {"DOWN", GEN_UNITS, GEN_TO_RANK, GEN_EACH_RANK, 2, GEN_ANY},
             [BEST] = {"BEST", GEN_ANY, GEN_TO_ALL, GEN_EACH_RANK, 1, GEN_ANY},
             [COUNT] = {"COUNT", GEN_ANY, GEN_TO_ALL, GEN_EACH_RANK, 2, GEN_ANY},
             [X_DOWN] = {"X[1]", GEN_ANY, GEN_TO_GROUP, GEN_EACH_WARP, 1, GEN_ANY}},
    .stages = stages,
};

/* Every sampler; the first one's tokens know the least of each other. */
static const int samplers[] = {GEN_GREEDY, GEN_SAMPLE, GEN_SAMPLE | GEN_TOP_K,
                               GEN_SAMPLE | GEN_TOP_P, GEN_SAMPLE | GEN_TOP_K | GEN_TOP_P};

/* ---- Who knows what ------------------------------------------------------------ */

/* Up to 10 groups, see choose_actors, and 2 ranks of each. */
enum { MOST_ACTORS = 20, MOST_PLACES = 10, MOST_BUFFERS = 2, MOST_USES = 192 };

/* A stage at work; they count from 1. */
struct use {
    const struct gen_stage *stage;
    int tag, layer, token; /* layer: in the sampler the tag behind L */
};

/* A moment of each actor, or a use.  Use I is half over (what it waits for first has been read, its
   words are sent) at moment 2 I + 1, and over at 2 I + 2. */
struct clock {
    int16_t at[MOST_ACTORS];
};

/* Where the words of a hop meet those who wait for them: a group, a rank, or everywhere. */
struct place {
    int use, senders;  /* the last one that sent; bits */
    struct clock told; /* what they knew */
};

/* A buffer of a hop: the use that sent last, and who reads. */
struct buffer {
    int sent;
    struct clock wait;  /* the last use that waited */
    struct clock until; /* the moment at which it has been read */
    struct clock kept;  /* not 0: a use that reads it again, whose words tell that it has done so */
};

struct state {
    const struct gen_plan *p;
    const struct gen_graph *graph;
    struct mk_err *err;
    int actors, ranks, kind[MOST_ACTORS], group[MOST_ACTORS];
    int of_kind[GEN_KINDS_OF_GROUPS], members[GEN_TO_ALL + 1][MOST_PLACES]; /* bits */
    int uses;
    struct use use[MOST_USES];
    struct clock know[MOST_ACTORS];
    struct clock learned[MOST_ACTORS]; /* and what a warp has learned in the stage at work */
    struct clock heard[MOST_ACTORS];   /* use of the last words of a hop of GEN_SOME_RANKS */
    struct place place[GEN_USED_HOPS][MOST_PLACES];
    struct buffer buffer[GEN_USED_HOPS][MOST_BUFFERS];
};

static int first(int bits)
{
    return __builtin_ctz((unsigned) bits);
}

/* Where words of ACTOR that reach REACH meet those who wait for them. */
static int place_of(const struct state *s, int reach, int actor)
{
    int of = actor; /* of its team's group with the head */

    while (reach == GEN_TO_TEAM && s->kind[actor] & GEN_HELPS && of > 0 &&
           s->group[of] != s->group[actor] % s->p->model.K)
        of--;
    return reach == GEN_TO_RANK ? actor % s->ranks : reach == GEN_TO_ALL ? 0 : of / s->ranks;
}

static int is_chosen(const struct state *s, int group)
{
    for (int a = 0; a < s->actors; a++)
        if (s->group[a] == group)
            return 1;
    return 0;
}

/* Two groups of each kind that the plan has, if there are two, the first helper of each of those with heads, and two
   ranks of each. */
static void choose_actors(struct state *s)
{
    int found[GEN_KINDS_OF_GROUPS] = {0};

    s->ranks = s->p->group < 2 ? 1 : 2;
    for (const struct gen_class *c = s->p->cls; c < s->p->cls + s->p->n_classes; c++) {
        const int has = (c->heads ? GEN_HEADS : 0) | (c->units ? GEN_UNITS : 0);
        for (int g = c->first; g < c->first + c->groups; g++) {
            const int K = s->p->model.K, helps = !c->heads && g < K * s->p->team;
            const int kind = has | (helps ? GEN_HELPS : 0);
            if (found[kind] >= 2 && !(helps && g < 2 * K && is_chosen(s, g % K)))
                continue;
            for (int rank = 0; rank < s->ranks; rank++) {
                s->kind[s->actors] = kind;
                s->group[s->actors++] = g;
            }
            found[kind]++;
        }
    }
    for (int a = 0; a < s->actors; a++) {
        for (int who = GEN_HEADS; who < GEN_KINDS_OF_GROUPS; who++)
            s->of_kind[who] |= !!(s->kind[a] & who) << a;
        for (int reach = 0; reach <= GEN_TO_ALL; reach++)
            s->members[reach][place_of(s, reach, a)] |= 1 << a;
    }
}

static void learn(struct clock *to, const struct clock *from)
{
    for (int i = 0; i < MOST_ACTORS; i++)
        to->at[i] = to->at[i] > from->at[i] ? to->at[i] : from->at[i];
}

/* ---- Sentences ----------------------------------------------------------------- */

struct text {
    char of[64];
};

static struct text cta_text(const struct state *s, int actor)
{
    const int group = s->group[actor], rank = actor % s->ranks;
    struct text t;

    snprintf(t.of, sizeof t.of, "CTA %d (rank %d of group %d)", group * s->p->group + rank, rank,
             group);
    return t;
}

/* What U is beside OLD. */
static struct text whose(const struct use *old, const struct use *u)
{
    struct text t = {"layer l's"};

    if (u->token > old->token)
        snprintf(t.of, sizeof t.of, "the next token's");
    else if (u->stage->tag != GEN_LAYER_TAG)
        snprintf(t.of, sizeof t.of, "tag L+%d's", u->layer);
    else if (u->layer > old->layer)
        snprintf(t.of, sizeof t.of, "layer l+%d's", u->layer - old->layer);
    return t;
}

/* WRITER sends in use NOW what READER has not read, as far as WRITER knows. */
static int fail_reuse(const struct state *s, int hop, int writer, int reader, int now,
                      const struct buffer *b)
{
    const char *name = s->graph->hops[hop].name;
    const struct text w = cta_text(s, writer), r = cta_text(s, reader);
    const int known = s->know[writer].at[reader] >= b->until.at[reader];
    const struct use *new = &s->use[now];
    const struct use *old = &s->use[known ? b->kept.at[reader] : (b->until.at[reader] - 1) / 2];

    if (b->wait.at[reader] < b->sent)
        return gen_fail(s->err, MK_EINVAL,
                        "plan: hop %s: %s does not wait for what %s sends before %s sends again",
                        name, r.of, s->use[b->sent].stage->name, new->stage->name);
    return gen_fail(s->err, MK_EINVAL,
                    "plan: hop %s: %s may send %s words (%s) while %s still reads %s (%s): nothing "
                    "that it waits for in between comes from there, directly or through others",
                    name, w.of, whose(old, new).of, new->stage->name, r.of, whose(old, old).of,
                    old->stage->name);
}

/* Actor A waits in use NOW for words of MISSING (0: of nobody). */
static int fail_wait(const struct state *s, int hop, int a, int now, int missing)
{
    const struct use *u = &s->use[now], *late = s->use + s->uses;

    while (missing && late > u &&
           (late->stage->send != hop || late->tag != u->tag ||
            !(late->stage->who & s->kind[first(missing)])))
        late--;
    return gen_fail(s->err, MK_EINVAL, "plan: hop %s: %s waits in %s for words that %s%s: deadlock",
                    s->graph->hops[hop].name, cta_text(s, a).of, u->stage->name,
                    missing && late > u ? "are sent only behind it, in " : "nobody sends",
                    missing && late > u ? late->stage->name : "");
}

/* ---- Stages -------------------------------------------------------------------- */

/* WRITER sends in use NOW into B: all who read there have done so, as far as it knows. */
static int check_reuse(const struct state *s, int hop, int writer, int now, const struct buffer *b)
{
    const struct gen_hop *h = &s->graph->hops[hop];
    const struct clock *know = &s->know[writer], *heard = &s->heard[writer];
    const int readers = s->members[h->reach][place_of(s, h->reach, writer)] & s->of_kind[h->to];

    for (int left = readers; left; left &= left - 1) {
        const int r = first(left), kept = b->kept.at[r];
        if (b->wait.at[r] < b->sent || know->at[r] < b->until.at[r] ||
            (heard->at[r] < kept && know->at[r] < 2 * kept + 1))
            return fail_reuse(s, hop, writer, r, now, b);
    }
    return 0;
}

/* All CTAs that have use NOW send.  Of a hop of GEN_EACH_WARP each warp's words are awaited, so
   that they also tell what the warps have done in this stage. */
static int send_all(struct state *s, int now)
{
    const struct use *u = &s->use[now];
    const int hop = u->stage->send;
    const struct gen_hop *h = &s->graph->hops[hop];
    struct buffer *b = &s->buffer[hop][u->tag % h->buffers];

    for (int left = s->of_kind[u->stage->who]; left; left &= left - 1) {
        const int a = first(left), each_warp = h->sure == GEN_EACH_WARP;
        struct place *at = &s->place[hop][place_of(s, h->reach, a)];
        const struct use *last = &s->use[at->use];
        if (at->use < now && last->tag >= u->tag)
            return gen_fail(s->err, MK_EINVAL,
                            "plan: hop %s: %s sends with tag %d behind %s with tag %d", h->name,
                            u->stage->name, u->tag, last->stage->name, last->tag);
        if (!(s->kind[a] & h->from))
            return gen_fail(s->err, MK_EINVAL, "plan: hop %s: nobody waits for what %s sends in %s",
                            h->name, cta_text(s, a).of, u->stage->name);
        if (b->sent && check_reuse(s, hop, a, now, b))
            return MK_EINVAL;
        if (at->use < now)
            *at = (struct place){.use = now};
        at->senders |= 1 << a;
        if (each_warp)
            s->learned[a].at[a] = (int16_t) (2 * now + 1);
        learn(&at->told, each_warp ? &s->learned[a] : &s->know[a]);
    }
    b->sent = now;
    return 0;
}

/* Actor A waits in use NOW for hop HOP, reads it until moment UNTIL, and learns TO. */
static int wait_for(struct state *s, int a, int now, int hop, int until, struct clock *to)
{
    const struct gen_hop *h = &s->graph->hops[hop];
    const int where = place_of(s, h->reach, a), tag = s->use[now].tag;
    const struct place *at = &s->place[hop][where];
    const int from = s->members[h->reach][where] & s->of_kind[h->from];
    const int missing = from & ~(s->use[at->use].tag == tag ? at->senders : 0);
    struct buffer *b = &s->buffer[hop][tag % h->buffers];

    if (missing || !from)
        return fail_wait(s, hop, a, now, missing);
    if (!(s->kind[a] & h->to)) /* and check_reuse would not ask what it has read */
        return gen_fail(s->err, MK_EINVAL, "plan: hop %s is not for %s, which waits for it in %s",
                        h->name, cta_text(s, a).of, s->use[now].stage->name);
    if (h->sure != GEN_SOME_RANKS)
        learn(to, &at->told);
    else
        for (int left = from; left; left &= left - 1)
            s->heard[a].at[first(left)] = (int16_t) at->use;
    b->wait.at[a] = (int16_t) now;
    b->until.at[a] = (int16_t) until;
    b->kept.at[a] = 0;
    return 0;
}

/* Actor A goes on reading X.  Ranks that send nothing in a stage read nothing in it. */
static void keep(struct state *s, int a, int now)
{
    const struct gen_stage *stage = s->use[now].stage;
    const int some = stage->send != NONE && s->graph->hops[stage->send].sure == GEN_SOME_RANKS;

    for (int left = stage->keep; left; left &= left - 1) {
        struct buffer *b = s->buffer[first(left)];
        b += b[1].wait.at[a] > b->wait.at[a];
        if (b->wait.at[a] && some)
            b->kept.at[a] = (int16_t) now;
        else if (b->wait.at[a])
            b->until.at[a] = (int16_t) (2 * now + 1);
    }
}

/* All CTAs that have use NOW run it. */
static int run_use(struct state *s, int now)
{
    const struct gen_stage *stage = s->use[now].stage;
    const int all = s->of_kind[stage->who];

    for (int left = all; left; left &= left - 1) {
        const int a = first(left);
        if (stage->meet)
            s->know[a].at[a] = (int16_t) (2 * now);
        s->learned[a] = s->know[a];
        keep(s, a, now);
        if (stage->wait != NONE && wait_for(s, a, now, stage->wait, 2 * now + 1, &s->learned[a]))
            return MK_EINVAL;
    }
    if (stage->send != NONE && send_all(s, now))
        return MK_EINVAL;
    for (int left = stage->then == NONE ? 0 : all; left; left &= left - 1)
        if (wait_for(s, first(left), now, stage->then, 2 * now + 2, &s->know[first(left)]))
            return MK_EINVAL;
    return 0;
}

/* ---- Tokens -------------------------------------------------------------------- */

/* Stage G of LAYER in TOKEN is a use, or several, if it runs there.  A token's tags are its own. */
static int add_uses(struct state *s, const struct gen_stage *g, int token, int layer, int layers)
{
    const int in_layer = g->tag == GEN_LAYER_TAG, tag = in_layer ? 0 : g->tag;
    const int tags = MK_TOKEN_TAGS(layers);

    if (in_layer != (layer < layers))
        return 0;
    if (tag < 0 || layer + tag + g->times > tags)
        return gen_fail(s->err, MK_EINVAL, "plan: %s uses tag L%+d of a token, which has L+%d",
                        g->name, tag + g->times - 1, tags - layers);
    if (s->uses + g->times >= MOST_USES)
        return gen_fail(s->err, MK_EINVAL, "plan: a token has too many stages to check");
    for (int i = 0; i < g->times; i++)
        s->use[++s->uses] =
            (struct use){g, token * tags + layer + tag + i, in_layer ? layer : tag + i, token};
    return 0;
}

static int check_tokens(struct state s, int sampler, int far, int tokens, int layers)
{
    const int where = far ? GEN_FAR : GEN_NEAR;

    s.use[0].tag = -1;
    for (int token = 0; token < tokens; token++)
        for (int layer = 0; layer <= layers; layer++)
            for (const struct gen_stage *g = s.graph->stages; g->name; g++)
                if (g->when & sampler && g->where & where && add_uses(&s, g, token, layer, layers))
                    return MK_EINVAL;
    for (int now = 1; now <= s.uses; now++)
        if (run_use(&s, now))
            return MK_EINVAL;
    return 0;
}

/* As many tokens and layers as matter: a buffer is sent into again two layers, or one token, later
   at most; and tags go on behind a token's last layer by the same number whatever L, and buffers
   with them, when L stays odd or even.  All samplers have the same layers. */
int gen_graph_check(const struct gen_plan *p, const struct gen_graph *graph, struct mk_err *err)
{
    const int L = p->model.L;
    struct state s = {.p = p, .graph = graph, .err = err};
    int rc = 0;

    choose_actors(&s);
    for (int far = 0; far <= (p->team > 1) && rc == 0; far++) {
        rc = check_tokens(s, samplers[0], far, L < 3 ? 3 : 2, L < 5 ? L : 4 - L % 2);
        for (size_t i = 1; i < sizeof samplers / sizeof *samplers && rc == 0; i++)
            rc = check_tokens(s, samplers[i], far, 2, 2 - L % 2);
    }
    return rc;
}

/* ---- Who has what -------------------------------------------------------------- */

#define NEED(ok, ...)                                                                              \
    do {                                                                                           \
        if (!(ok))                                                                                 \
            return gen_fail(err, MK_EINVAL, "plan: " __VA_ARGS__);                                 \
    } while (0)

static int ceil_div(int64_t a, int64_t b)
{
    return (int) ((a + b - 1) / b);
}

/* Query, key and value blocks that come with a KV head; and columns of O, in units. */
static int head_blocks(const struct gen_model *m)
{
    return (m->H / m->K + 2) * m->E / 8;
}

static int head_units(const struct gen_model *m)
{
    return m->H / m->K * m->E / 32;
}

/* Class C follows GROUP groups, which have HEAD KV heads and UNIT units of the MLP. */
static int check_class(const struct gen_plan *p, const struct gen_class *c, int group, int head,
                       int unit, struct mk_err *err)
{
    const int few = p->model.K / p->groups, many = p->model.K % p->groups; /* group_of_head */
    const int last = group + c->groups - 1;

    NEED(c->first == group && c->groups > 0 && last < p->groups,
         "groups %d..%d of %d follow group %d", c->first, last, p->groups, group - 1);
    NEED(c->head0 >= head, "KV head %d belongs to group %d and to one before", c->head0, group);
    NEED(c->head0 <= head, "KV head %d belongs to no group", head);
    NEED(c->unit0 >= unit, "MLP unit %d belongs to group %d and to one before", c->unit0, group);
    NEED(c->unit0 <= unit, "MLP unit %d belongs to no group", unit);
    NEED(
        c->heads > 0 || c->units > 0,
        "group %d has neither a KV head nor an MLP unit: it would send nothing in hops O and DOWN, "
        "and no other group would know what it has read",
        group);
    NEED(c->heads == few + (group < many) && (group < many) == (last < many),
         "groups %d..%d have %d KV heads; the first %d of %d groups have %d, the others %d", group,
         last, c->heads, many, p->groups, few + 1, few);
    NEED(c->heads <= p->most_heads && c->units >= 0 && c->units <= p->most_units,
         "group %d has %d KV heads and %d MLP units; there is room for %d and %d", group, c->heads,
         c->units, p->most_heads, p->most_units);
    return 0;
}

static int check_classes(const struct gen_plan *p, struct mk_err *err)
{
    const struct gen_class *c = p->cls;
    const int units = ceil_div(p->model.F, 32);
    int group = 0, head = 0, unit = 0;

    NEED(p->group > 0 && p->groups > 0 && (int64_t) p->group * p->groups == p->ctas,
         "%d groups of %d CTAs are not %d CTAs", p->groups, p->group, p->ctas);
    for (; c < p->cls + p->n_classes; c++) {
        if (check_class(p, c, group, head, unit, err))
            return MK_EINVAL;
        group += c->groups;
        head += c->groups * c->heads;
        unit += c->groups * c->units;
    }
    NEED(group == p->groups, "group %d is in no class", group);
    NEED(unit == units, "%d MLP units belong to groups, and the model has %d", unit, units);
    /* norm.cu.m4, await_sums: lanes without a group to wait for wait for the last one. */
    NEED(c[-1].units > 0,
         "hop DOWN: CTAs wait for group %d, which has no MLP unit and sends nothing: deadlock",
         group - 1);
    return 0;
}

/* Far on, every CTA of a team has a tile of the one head. */
static int check_team(const struct gen_plan *p, struct mk_err *err)
{
    NEED(p->team > 0 && p->team * p->model.K <= (p->team > 1 ? p->groups : INT_MAX),
         "%d KV heads and teams of %d groups; there are %d groups", p->model.K, p->team, p->groups);
    NEED(p->team == 1 || (p->cluster && p->most_heads == 1),
         "teams of %d groups, which are no clusters or have several heads", p->team);
    NEED(p->team == 1 || p->team_from / p->kv_tile + 1 >= p->team * p->group,
         "team_from is %d; not all of %d CTAs have a tile of %d positions there", p->team_from,
         p->team * p->group, p->kv_tile);
    return 0;
}

/* Pairs of rows that the ranks of a group have, in sets of one for each warp. */
static int check_pairs(const struct gen_plan *p, struct mk_err *err)
{
    NEED(p->pairs == ceil_div(p->model.D, 16), "%d pairs of blocks are not the model's %d rows",
         p->pairs, p->model.D);
    NEED(p->pairs >= p->group,
         "rank %d of a group has none of the %d pairs of rows: it would send nothing in hops O and "
         "DOWN, and no other group would know what it has read",
         p->pairs, p->pairs);
    NEED((int64_t) p->group * p->rank_pairs >= p->pairs && p->sets > 0 &&
             p->sets <= p->pairs / p->group && (int64_t) p->sets * p->set_pairs >= p->rank_pairs &&
             p->set_pairs <= p->warps,
         "%d ranks of %d sets of %d pairs of rows, %d a rank, for %d warps, are not %d pairs",
         p->group, p->sets, p->set_pairs, p->rank_pairs, p->warps, p->pairs);
    return 0;
}

/* ---- Streams and ring ---------------------------------------------------------- */

static const char *const phase_names[GEN_PHASES] = {"QKV", "O", "MLP", "DOWN", "HEAD"};

/* Producer and consumers count the chunks of a phase alike.  Those of a block must be its units,
   and fit into a stage. */
static int check_phase(const struct gen_plan *p, int id, struct mk_err *err)
{
    const struct gen_phase *f = &p->phase[id];
    const char *name = phase_names[id];
    const int by_columns = id == GEN_O || id == GEN_DOWN, chunks = by_columns ? 1 : f->spans;
    const int64_t bytes = (int64_t) f->span_units * (by_columns ? p->set_pairs * 1024 : 512);

    NEED(f->step > 0 && f->blocks >= 0 && f->blocks % f->step == 0,
         "phase %s: %d blocks cannot be dealt by %d", name, f->blocks, f->step);
    NEED(f->span_units > 0 && chunks > 0 && (!by_columns || f->spans == 0) &&
             (by_columns || chunks == ceil_div(f->units, f->span_units)),
         "phase %s: %d chunks of %d units are not a block of %d units", name, f->spans,
         f->span_units, f->units);
    NEED(bytes <= p->stage_bytes, "phase %s: a chunk has %lld bytes and a stage of the ring %d",
         name, (long long) bytes, p->stage_bytes);
    return 0;
}

/* A class's phases lie one behind the other in the stream of its busiest rank, and all layers
   behind the head. */
static int check_stream(const struct gen_plan *p, const struct gen_class *c, struct mk_err *err)
{
    const struct gen_model *m = &p->model;
    const int64_t block = (int64_t) p->phase[GEN_QKV].units * 512;
    const int64_t unit = (int64_t) p->rank_pairs * 1024; /* of all its pairs */
    const struct {
        const char *phase;
        int64_t bytes, from, to;
    } parts[] = {
        {"HEAD", ceil_div(p->phase[GEN_HEAD].blocks, p->ctas) * block, 0, p->layers_offset},
        {"QKV", ceil_div(c->heads * head_blocks(m), p->group) * block, 0, c->o},
        {"O", unit * c->heads * head_units(m), c->o, c->mlp},
        {"MLP", ceil_div(4 * c->units, p->group) * 2 * block, c->mlp, c->down},
        {"DOWN", unit * c->units, c->down, c->layer_bytes},
        {"all layers", m->L * c->layer_bytes, p->layers_offset, p->cta_bytes},
    };

    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        NEED(parts[i].bytes <= parts[i].to - parts[i].from,
             "%s of group %d: %lld bytes from %lld on, and what follows begins at %lld",
             parts[i].phase, c->first, (long long) parts[i].bytes, (long long) parts[i].from,
             (long long) parts[i].to);
    return 0;
}

/* Chunks of a token's weights that CTA reads when it attends to HEADS heads, the last one of class C: the fewest of
   the class. */
static int64_t fewest_chunks(const struct gen_plan *p, const struct gen_class *c, int heads,
                             int cta)
{
    const struct gen_model *m = &p->model;
    const struct gen_phase *f = p->phase;
    const int64_t rows = heads * head_blocks(m) / p->group * f[GEN_QKV].spans +
                         4 * c->units / p->group * 2 * f[GEN_MLP].spans;
    const int64_t columns = ceil_div(c->heads * head_units(m), f[GEN_O].span_units) +
                            ceil_div(c->units, f[GEN_DOWN].span_units);

    return m->L * (rows + p->sets * columns) +
           (int64_t) ceil_div(f[GEN_HEAD].blocks - cta, p->ctas) * f[GEN_HEAD].spans;
}

/* A row of the KV cache is written before the CTA has used up the first chunk behind its tiles.
   The next token's copy of the tile is a token's other chunks behind that one, at least, and waits
   for the chunk that is STAGES before it. */
static int check_cache(const struct gen_plan *p, struct mk_err *err)
{
    const struct gen_model *m = &p->model;
    const int64_t head = (int64_t) ceil_div(p->context, p->kv_tile) * p->kv_tile * m->E * 2;

    for (const struct gen_class *c = p->cls; c < p->cls + p->n_classes; c++) {
        const int cta = (c->first + c->groups) * p->group - 1;
        const int heads = c->heads ? c->heads : c->first < m->K * p->team;
        const int64_t chunks = fewest_chunks(p, c, heads, cta);
        NEED(!heads || p->stages <= chunks,
             "the ring has %d stages, and CTA %d only %lld chunks of a token: a tile of the KV "
             "cache could be copied before its last row is written",
             p->stages, cta, (long long) chunks);
    }
    NEED(p->kv_head >= head,
         "the KV cache has room for %lld bytes of a head, and its tiles have %lld",
         (long long) p->kv_head * 2, (long long) head * 2);
    return 0;
}

static int check_ring(const struct gen_plan *p, struct mk_err *err)
{
    const int tile = p->kv_tile * p->model.E * 4, long_blocks = p->phase[GEN_HEAD].spans > 1;
    const struct gen_batch *b = &p->batch;
    const int rows = 2 * (long_blocks ? b->spans : b->early > b->pairs ? b->early : b->pairs);
    const int most = rows > b->columns ? rows : b->columns;

    for (int i = 0; i < GEN_PHASES; i++)
        if (check_phase(p, i, err))
            return MK_EINVAL;
    for (int i = 0; i < p->n_classes; i++)
        if (check_stream(p, &p->cls[i], err))
            return MK_EINVAL;
    NEED(p->kv_tile > 0 && p->kv_tile % 16 == 0 && tile <= p->stage_bytes,
         "a tile of the KV cache has %d positions, %d bytes, and a stage of the ring %d bytes",
         p->kv_tile, tile, p->stage_bytes);
    NEED(p->stages >= most, "consumers wait for %d chunks at once; with stages %d that is a deadlock", most,
         p->stages);
    NEED(p->inflight_hop > 0 && p->inflight >= p->inflight_hop,
         "inflight is %d and inflight_hop %d; they must be 1 or more, and inflight the larger",
         p->inflight, p->inflight_hop);
    NEED(p->inflight_heads > 0, "inflight_heads is %d; it must be 1 or more", p->inflight_heads);
    return check_cache(p, err);
}

/* ---- Exchange ------------------------------------------------------------------ */

static const char *hop_name(int hop)
{
    return hop == GEN_HOP_X ? "X" : gen_graph.hops[hop].name;
}

/* Words of a buffer of hop HOP that are one group's or, of O and DOWN, a pair's of all groups. */
static int hop_part(const struct gen_plan *p, int hop)
{
    const struct gen_model *m = &p->model;
    const int words[GEN_HOPS] = {
        [QKV] = p->most_heads * head_blocks(m) * 3,
        /* of each rank; behind a query head its maximum and sum */
        [PART] = p->group * p->most_heads * (m->H / m->K) * (m->E / 8 * 3 + 1),
        [MLP] = p->most_units * 12,
        /* of a head: of each helper two values */
        [TEAM] = (p->team - 1) * (m->H / m->K) * (m->E / 2),
        /* behind the rows a sum of squares of each warp */
        [GEN_HOP_X] = p->pairs * 6 + p->group * p->warps,
        [O] = p->groups * 6,
        [DOWN] = p->groups * 6,
        [BEST] = p->group,
        [COUNT] = p->group * 16,
    };

    return words[hop];
}

static int64_t hop_needs(const struct gen_plan *p, int hop)
{
    const int64_t parts = hop == O || hop == DOWN ? p->pairs : hop == TEAM ? p->model.K : p->groups;

    if (p->cluster && gen_graph.hops[hop].reach == GEN_TO_GROUP)
        return 0; /* over shared memory */
    return hop_part(p, hop) * parts * p->hop_buffers[hop] * (hop == GEN_HOP_X ? 2 : 1);
}

static int check_exchange(const struct gen_plan *p, struct mk_err *err)
{
    for (int i = 0; i < GEN_HOPS; i++) {
        const int from = p->hop_offset[i], words = p->hop_words[i];
        NEED(p->hop_buffers[i] == gen_graph.hops[i].buffers,
             "hop %s has %d buffers, and the kernel uses %d", hop_name(i), p->hop_buffers[i],
             gen_graph.hops[i].buffers);
        NEED(words >= hop_needs(p, i),
             "hop %s: its %d CTAs send and await %lld words, and it has %d", hop_name(i), p->ctas,
             (long long) hop_needs(p, i), words);
        NEED(from >= 0 && from <= p->exchange_words - words,
             "hop %s: words %d..%d are not inside the exchange's %d", hop_name(i), from,
             from + words - 1, p->exchange_words);
        for (int j = 0; j < i; j++)
            NEED(from >= p->hop_offset[j] + p->hop_words[j] || p->hop_offset[j] >= from + words,
                 "hops %s and %s overlap at word %d", hop_name(j), hop_name(i),
                 from > p->hop_offset[j] ? from : p->hop_offset[j]);
    }
    return 0;
}

int gen_plan_check(const struct gen_plan *p, struct mk_err *err)
{
    const int64_t tags = (int64_t) p->tokens_per_launch * MK_TOKEN_TAGS(p->model.L);

    /* engine.c starts over before 2^31; a cleared exchange has tag 0. */
    NEED(p->epoch0 > 0 && p->epoch0 <= INT_MAX && tags < INT_MAX,
         "epoch0 is %u and a launch takes %lld tags; tags must be 1..%d", p->epoch0,
         (long long) tags, INT_MAX);
    if (check_classes(p, err) || check_pairs(p, err) || check_team(p, err) || check_ring(p, err) ||
        check_exchange(p, err))
        return MK_EINVAL;
    return gen_graph_check(p, &gen_graph, err);
}

/* ---- For reports --------------------------------------------------------------- */

struct word {
    int group, rank; /* of the CTA that sends it */
    int value;       /* what word of a vector in blocks of 8 values, three words each; or -1 */
    char what[48];
};

/* Word AT of PART of hop HOP; see hop_part. */
static struct word find_word(const struct gen_plan *p, int hop, int part, int at)
{
    const struct gen_class *c = gen_plan_class(p, part % p->groups);
    const int nth = part % p->groups - c->first, head = c->head0 + nth * c->heads;
    const int ratio = p->model.H / p->model.K, words = p->model.E / 8 * 3 + (hop == PART);
    const int line = at / words, j = line % (ratio + 2), squares = at - p->pairs * 6;
    struct word w = {part % p->groups, at / 3 % p->group, -1, "a candidate"};

#define WHAT(...) snprintf(w.what, sizeof w.what, __VA_ARGS__)
    if (hop == QKV) {
        w.value = at % words;
        WHAT("%c head %d, ", "qkv"[j < ratio ? 0 : j - ratio + 1],
             (head + line / (ratio + 2)) * (j < ratio ? ratio : 1) + (j < ratio ? j : 0));
    } else if (hop == PART) {
        w.rank = line / (p->most_heads * ratio);
        w.value = at % words < words - 1 ? at % words : -1;
        WHAT("head %d, %s", head * ratio + line % (p->most_heads * ratio),
             w.value < 0 ? "maximum and sum" : "");
    } else if (hop == MLP) {
        w.value = (c->unit0 + nth * c->units) * 12 + at;
        WHAT("%s", "");
    } else if (hop == GEN_HOP_X) {
        w.rank = squares < 0 ? at / 6 % p->group : squares / p->warps;
        w.value = squares < 0 ? at : -1;
        if (squares < 0)
            WHAT("x[%d], ", part / p->groups);
        else
            WHAT("x[%d], squares of warp %d", part / p->groups, squares % p->warps);
    } else if (hop == TEAM) {
        const int each = ratio * p->model.E / 2, pair = at % each;
        w.group = (at / each + 1) * p->model.K + part;
        w.rank = pair % p->group;
        WHAT("head %d, dimensions %d and %d", part * ratio + pair / (p->model.E / 2),
             pair % (p->model.E / 2) * 2, pair % (p->model.E / 2) * 2 + 1);
    } else if (hop == O || hop == DOWN) {
        w.group = at / 6;
        w.rank = part % p->pairs % p->group;
        w.value = part % p->pairs * 6 + at % 6;
        WHAT("buffer %d, ", part / p->pairs);
    } else if (hop == COUNT) {
        w.rank = at / 16;
        WHAT("buffer %d, digit %d", part / p->groups, at % 16);
    } else {
        w.rank = at;
    }
#undef WHAT
    return w;
}

void gen_hop_describe(const struct gen_plan *p, int word, char *out, size_t size)
{
    char values[40] = "";
    int hop = 0;

    while (hop < GEN_HOPS &&
           (word < p->hop_offset[hop] || word >= p->hop_offset[hop] + p->hop_words[hop]))
        hop++;
    if (hop == GEN_HOPS) {
        const int outside = word < 0 || word >= p->exchange_words;
        snprintf(out, size, "word %d, %s", word,
                 outside ? "outside the exchange" : "between two hops");
        return;
    }
    const int at = word - p->hop_offset[hop], n = hop_part(p, hop);
    const struct word w = find_word(p, hop, at / n, at % n);
    const int in = w.value % 3, first = w.value / 3 * 8 + in * 3;
    if (w.value >= 0)
        snprintf(values, sizeof values, "values %d..%d", first, first + (in < 2 ? 2 : 1));
    snprintf(out, size, "hop %s word %d (%s%s), sent by CTA %d (rank %d of group %d)",
             hop_name(hop), at, w.what, values, w.group * p->group + w.rank, w.rank, w.group);
}
