/* t-plan.c - properties of plans, over random shapes and over every carried model on every
   profile: every KV head and MLP unit has one group, every part of every matrix one place in one
   stream, where it is multiplied once; nothing in a stream, in shared memory, in the hop buffers
   or in prefill's scratch overlaps; what the templates count in 32 bits fits.  The templates' own
   formulas stand here a second time, on purpose.  T_PLAN_SEED chooses other shapes. */
#include "config.h"

#include <limits.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "gen/gen.h"
#include "runtime/abi.h"
#include "tests/check.h"

enum { SHAPES = 3000, MOST_SET = 8 };

static struct mk_err err;
static char what[400]; /* the plan at work, for failures */
static uint64_t state;

static uint32_t next_random(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t) (state >> 33);
}

static int random_in(int lo, int hi)
{
    return lo + (int) (next_random() % (uint32_t) (hi - lo + 1));
}

static int ceil_div(int a, int b)
{
    return (a + b - 1) / b;
}

static int smaller(int a, int b)
{
    return a < b ? a : b;
}

/* The first failure of a plan speaks for the others. */
#define PLAN_CHECK(cond, ...)                                                                      \
    do {                                                                                           \
        check_count++;                                                                             \
        if (!(cond)) {                                                                             \
            check_failed++;                                                                        \
            fprintf(stderr, "t-plan.c:%d: %s: %s", __LINE__, what, #cond);                         \
            fprintf(stderr, ": " __VA_ARGS__);                                                     \
            fputc('\n', stderr);                                                                   \
            return;                                                                                \
        }                                                                                          \
    } while (0)

/* ---- Groups ------------------------------------------------------------------ */

/* Query heads of a KV head; blocks of a head with its key and value; its columns of O, in units. */
static int ratio_of(const struct gen_plan *p)
{
    return p->model.H / p->model.K;
}

static int grouped(const struct gen_plan *p)
{
    return (ratio_of(p) + 2) * p->model.E / 8;
}

static int head_units(const struct gen_plan *p)
{
    return ratio_of(p) * p->model.E / 32;
}

/* place.cu.m4: share, share_of. */
struct share {
    int head0, heads, unit0, units;
    const struct gen_class *c;
};

static struct share share_of(const struct gen_plan *p, int group)
{
    int i = 0;

    while (i + 1 < p->n_classes && group >= p->cls[i + 1].first)
        i++;
    const struct gen_class *c = &p->cls[i];
    const int nth = group - c->first;
    return (struct share){c->head0 + nth * c->heads, c->heads, c->unit0 + nth * c->units, c->units,
                          c};
}

/* place.cu.m4: group_of_head, group_of_unit. */
static int group_of_head(const struct gen_plan *p, int head)
{
    const int few = p->model.K / p->groups, many = few + 1, with_many = p->model.K % p->groups;

    return head < with_many * many ? head / many
                                   : with_many + (head - with_many * many) / (few ? few : 1);
}

static int group_of_unit(const struct gen_plan *p, int unit)
{
    int i = 0;

    while (i + 1 < p->n_classes && unit >= p->cls[i + 1].unit0)
        i++;
    return p->cls[i].first + (unit - p->cls[i].unit0) / (p->cls[i].units ? p->cls[i].units : 1);
}

/* Heads and units are dealt to groups without a gap, and the templates find the group of each. */
static void check_groups(const struct gen_plan *p)
{
    const int units = ceil_div(p->model.F, 32);
    int head = 0, unit = 0, most_heads = 0, most_units = 0;

    PLAN_CHECK(p->group >= 1 && p->groups * p->group == p->ctas && p->ctas <= p->gpu.sms);
    PLAN_CHECK(p->n_classes >= 1 && p->n_classes <= GEN_CLASSES);
    for (int g = 0; g < p->groups; g++) {
        const struct share s = share_of(p, g);
        PLAN_CHECK(s.c == gen_plan_class(p, g) && s.head0 == head && s.unit0 == unit, "group %d",
                   g);
        PLAN_CHECK(s.heads || s.units, "group %d has nothing to do", g);
        for (; head < s.head0 + s.heads; head++)
            PLAN_CHECK(group_of_head(p, head) == g, "head %d", head);
        for (; unit < s.unit0 + s.units; unit++)
            PLAN_CHECK(group_of_unit(p, unit) == g, "unit %d", unit);
        most_heads = s.heads > most_heads ? s.heads : most_heads;
        most_units = s.units > most_units ? s.units : most_units;
    }
    PLAN_CHECK(head == p->model.K && unit == units);
    PLAN_CHECK(p->most_heads == most_heads && p->most_units == most_units);
    /* norm.cu.m4, await_sums: it asks them in place of groups that send nothing. */
    PLAN_CHECK(share_of(p, 0).heads > 0 && share_of(p, p->groups - 1).units > 0);
    if (p->cluster)
        PLAN_CHECK(p->gpu.arch >= 90 && (p->group & (p->group - 1)) == 0 && p->group > 1);
}

/* place.cu.m4: rank_pairs, set_of. */
static int rank_pairs(const struct gen_plan *p, int rank)
{
    return (p->pairs - rank + p->group - 1) / p->group;
}

struct set {
    int first, pairs;
};

static struct set set_of(const struct gen_plan *p, int rank, int nth)
{
    const int n = rank_pairs(p, rank), few = n / p->sets, many = few + 1, with_many = n % p->sets;
    int first;

    if (nth < with_many * many)
        return (struct set){nth / many * many, many};
    first = with_many * many + (nth - with_many * many) / few * few;
    return (struct set){first, few};
}

/* Each rank has pairs, and each set a warp for each pair. */
static void check_sets(const struct gen_plan *p)
{
    PLAN_CHECK(p->pairs * 16 >= p->model.D && p->pairs * 16 < p->model.D + 16);
    for (int rank = 0; rank < p->group; rank++) {
        struct set set = {0, 0};
        const int n = rank_pairs(p, rank);
        PLAN_CHECK(n >= 1 && n <= p->rank_pairs, "rank %d", rank);
        for (int i = 0; i < p->sets; i++) {
            set = set_of(p, rank, set.first + set.pairs);
            PLAN_CHECK(set.pairs >= 1 && set.pairs <= p->set_pairs && set.pairs <= p->warps,
                       "rank %d, set %d: %d pairs", rank, i, set.pairs);
        }
        PLAN_CHECK(set.first + set.pairs == n, "rank %d: %d pairs", rank, n);
    }
}

/* ---- Streams ----------------------------------------------------------------- */

/* What a walk through the streams has met: how often each part of a matrix was read, and what
   every CTA has read of a layer. */
struct walk {
    const struct gen_plan *p;
    unsigned char *seen[GEN_PHASES]; /* [blocks]; O, DOWN: [pairs][units] */
    int64_t *cta_bytes;              /* real bytes of a layer */
    int64_t chunks;                  /* of a token of the CTA at work */
    int bad;
};

/* A CTA reads UNITS units of part PART of phase ID at byte AT of all streams, and the pack kernel
   has put it at PACKED. */
static void meet(struct walk *w, int cta, int id, int part, int units, int64_t at, int64_t packed)
{
    w->bad += at != packed || w->seen[id][part]++;
    if (id != GEN_HEAD)
        w->cta_bytes[cta] += (int64_t) units * 512;
}

/* place.cu.m4: row_place; LAYER's start is in BEGIN. */
static int64_t row_place(const struct gen_plan *p, int group, int local, int step, int64_t begin,
                         int block_bytes)
{
    const int dealt = local / step;

    return (group * p->group + dealt % p->group) * p->cta_bytes + begin +
           (int64_t) (dealt / p->group * step + local % step) * block_bytes;
}

/* place.cu.m4: Qkv::block and Qkv::rows. */
static int qkv_block(const struct gen_plan *p, int head0, int local)
{
    const int blocks = p->model.E / 8, head = head0 + local / grouped(p), in = local % grouped(p);

    return in < ratio_of(p) * blocks
               ? head * ratio_of(p) * blocks + in
               : (p->model.H + (in / blocks - ratio_of(p)) * p->model.K + head) * blocks +
                     in % blocks;
}

static int64_t qkv_place(const struct gen_plan *p, int layer, int block)
{
    const int blocks = p->model.E / 8, q = p->model.H * blocks, kv = block - q;
    const int head = block < q ? block / (ratio_of(p) * blocks) : kv / blocks % p->model.K;
    const int in = block < q ? block % (ratio_of(p) * blocks)
                             : (ratio_of(p) + kv / (p->model.K * blocks)) * blocks + kv % blocks;
    const int group = group_of_head(p, head);
    const struct share s = share_of(p, group);

    return row_place(p, group, (head - s.head0) * grouped(p) + in, 1,
                     p->layers_offset + layer * s.c->layer_bytes, p->phase[GEN_QKV].units * 512);
}

static int64_t mlp_place(const struct gen_plan *p, int layer, int block)
{
    const int group = group_of_unit(p, block / 8);
    const struct share s = share_of(p, group);

    return row_place(p, group, block - s.unit0 * 8, 2,
                     p->layers_offset + layer * s.c->layer_bytes + s.c->mlp,
                     p->phase[GEN_MLP].units * 512);
}

/* place.cu.m4: column_place, O::columns and Down::columns, place. */
static int64_t column_place(const struct gen_plan *p, int id, int layer, int block, int unit)
{
    const int rank = block / 2 % p->group, nth = block / 2 / p->group;
    const struct set set = set_of(p, rank, nth);
    const int group = id == GEN_O ? group_of_head(p, unit / head_units(p)) : group_of_unit(p, unit);
    const struct share s = share_of(p, group);
    const int units = id == GEN_O ? s.heads * head_units(p) : s.units;
    const int local = unit - (id == GEN_O ? s.head0 * head_units(p) : s.unit0);

    return (group * p->group + rank) * p->cta_bytes + p->layers_offset + layer * s.c->layer_bytes +
           (id == GEN_O ? s.c->o : s.c->down) + (nth - set.first) * 1024 + block % 2 * 512 +
           (int64_t) set.first * 1024 * units + (int64_t) set.pairs * 1024 * local;
}

/* A CTA's blocks of Q, K, V or of gate and up, from byte AT of the streams on; returns its end. */
static int64_t walk_rows(struct walk *w, int id, int layer, int cta, int64_t at)
{
    const struct gen_plan *p = w->p;
    const struct gen_phase *f = &p->phase[id];
    const struct share s = share_of(p, cta / p->group);
    const int rank = cta % p->group;
    const int all =
        id == GEN_QKV ? s.heads * grouped(p) : smaller(s.units * 8, f->blocks - s.unit0 * 8);
    int n = 0;

    for (int dealt = rank; dealt * f->step < all; dealt += p->group)
        for (int i = 0; i < f->step; i++, n++) {
            const int local = dealt * f->step + i;
            const int b = id == GEN_QKV ? qkv_block(p, s.head0, local) : s.unit0 * 8 + local;
            const int64_t packed = id == GEN_QKV ? qkv_place(p, layer, b) : mlp_place(p, layer, b);
            meet(w, cta, id, b, f->units, at, packed);
            at += f->units * 512;
            w->chunks += f->spans;
        }
    w->bad += n > f->cta_blocks;
    return at;
}

/* A CTA's pairs of O or DOWN. */
static int64_t walk_columns(struct walk *w, int id, int layer, int cta, int64_t at)
{
    const struct gen_plan *p = w->p;
    const struct gen_phase *f = &p->phase[id];
    const struct share s = share_of(p, cta / p->group);
    const int rank = cta % p->group;
    const int first = id == GEN_O ? s.head0 * head_units(p) : s.unit0;
    const int units = id == GEN_O ? s.heads * head_units(p) : s.units;
    struct set set = {0, 0};

    for (int i = 0; i < p->sets; i++) {
        set = set_of(p, rank, set.first + set.pairs);
        w->chunks += ceil_div(units, f->span_units);
        for (int unit = first; unit < first + units; unit++)
            for (int j = 0; j < set.pairs; j++, at += 1024) {
                const int pair = (set.first + j) * p->group + rank;
                meet(w, cta, id, pair * f->units + unit, smaller(2, f->blocks - pair * 2), at,
                     column_place(p, id, layer, pair * 2, unit));
            }
    }
    w->bad += set.first + set.pairs > f->cta_blocks / 2;
    return at;
}

static void walk_layer(struct walk *w, int layer, int cta)
{
    const struct gen_plan *p = w->p;
    const struct gen_class *c = share_of(p, cta / p->group).c;
    const int64_t begin = cta * p->cta_bytes + p->layers_offset + layer * c->layer_bytes;

    w->bad += walk_rows(w, GEN_QKV, layer, cta, begin) > begin + c->o;
    w->bad += walk_columns(w, GEN_O, layer, cta, begin + c->o) > begin + c->mlp;
    w->bad += walk_rows(w, GEN_MLP, layer, cta, begin + c->mlp) > begin + c->down;
    w->bad += walk_columns(w, GEN_DOWN, layer, cta, begin + c->down) > begin + c->layer_bytes;
    w->bad += begin + c->layer_bytes > (cta + 1) * p->cta_bytes;
}

static void walk_head(struct walk *w, int cta)
{
    const struct gen_phase *f = &w->p->phase[GEN_HEAD];
    int64_t at = cta * w->p->cta_bytes;

    for (int b = cta; b < f->blocks; b += w->p->ctas, at += f->units * 512) {
        meet(w, cta, GEN_HEAD, b, f->units, at,
             b % w->p->ctas * w->p->cta_bytes + (int64_t) (b / w->p->ctas) * f->units * 512);
        w->chunks += f->spans;
    }
    w->bad += at > cta * w->p->cta_bytes + w->p->layers_offset;
}

/* Bytes that were met of phase ID, each part once. */
static int64_t met(struct walk *w, int id)
{
    const struct gen_phase *f = &w->p->phase[id];
    const int columns = f->spans == 0, parts = columns ? w->p->pairs * f->units : f->blocks;
    int64_t units = 0;

    for (int i = 0; i < parts; i++) {
        w->bad += w->seen[id][i] != 1;
        units += columns ? smaller(2, f->blocks - i / f->units * 2) : f->units;
    }
    return units * 512;
}

/* LAYER of every stream, and the head: decode reads everything once, where pack has put it. */
static void check_walk(const struct gen_plan *p, int layer)
{
    struct walk w = {.p = p, .cta_bytes = calloc((size_t) p->ctas, sizeof *w.cta_bytes)};
    const int64_t head = (int64_t) p->phase[GEN_HEAD].blocks * p->phase[GEN_HEAD].units * 512;
    int64_t fewest = INT64_MAX, bytes = 0, sum = 0;

    for (int i = 0; i < GEN_PHASES; i++)
        w.seen[i] = calloc((size_t) (p->pairs * p->phase[i].units + p->phase[i].blocks), 1);
    for (int cta = 0; cta < p->ctas; cta++) {
        w.chunks = 0;
        walk_layer(&w, layer, cta);
        w.chunks *= p->model.L;
        walk_head(&w, cta);
        if (share_of(p, cta / p->group).heads && w.chunks < fewest)
            fewest = w.chunks;
        sum += w.cta_bytes[cta];
    }
    for (int i = 0; i < GEN_PHASES; i++) {
        bytes += met(&w, i) * (i == GEN_HEAD ? 1 : p->model.L);
        free(w.seen[i]);
    }
    free(w.cta_bytes);
    PLAN_CHECK(!w.bad, "layer %d: %d", layer, w.bad);
    PLAN_CHECK(bytes == p->token_bytes, "%lld, not %lld", (long long) bytes,
               (long long) p->token_bytes);
    PLAN_CHECK(sum * p->model.L + head == p->token_bytes);
    PLAN_CHECK(p->stages <= fewest, "%d stages, %lld chunks", p->stages, (long long) fewest);
}

/* COLUMNS: it is split by columns. */
static void check_phase(const struct gen_plan *p, int id, int rows, int cols, int step, int columns)
{
    const struct gen_phase *f = &p->phase[id];
    int units = 0;

    PLAN_CHECK(f->rows == rows && f->cols == cols && f->step == step, "phase %d", id);
    PLAN_CHECK(f->units * 32 >= cols && f->units * 32 < cols + 32, "phase %d", id);
    PLAN_CHECK(f->blocks * 8 >= rows && f->blocks * 8 < rows + 8 && f->blocks % step == 0,
               "phase %d", id);
    PLAN_CHECK((f->spans == 0) == columns, "phase %d", id);
    for (int span = 0; span < f->spans; span++) {
        const int n = smaller(f->span_units, f->units - span * f->span_units);
        PLAN_CHECK(n > 0, "phase %d, span %d is empty", id, span);
        PLAN_CHECK(n * 512 <= p->chunk_bytes && n * 512 <= p->stage_bytes, "phase %d: %d units", id,
                   n);
        units += n;
    }
    PLAN_CHECK(columns || units == f->units, "phase %d", id);
    if (columns)
        PLAN_CHECK(
            f->span_units >= 1 && p->set_pairs * 1024 * f->span_units <= p->stage_bytes &&
                (f->span_units == 1 || p->set_pairs * 1024 * f->span_units <= p->chunk_bytes),
            "phase %d", id);
    PLAN_CHECK((int64_t) f->cta_blocks * f->units * 512 <= INT_MAX || columns, "phase %d", id);
}

static void check_streams(const struct gen_plan *p)
{
    const struct gen_model *m = &p->model;

    check_phase(p, GEN_QKV, (m->H + 2 * m->K) * m->E, m->D, 1, 0);
    check_phase(p, GEN_O, m->D, m->H * m->E, 1, 1);
    check_phase(p, GEN_MLP, 2 * m->F, m->D, 2, 0);
    check_phase(p, GEN_DOWN, m->D, m->F, 1, 1);
    check_phase(p, GEN_HEAD, m->V, m->D, 1, 0);
    check_walk(p, random_in(0, m->L - 1));
    PLAN_CHECK(p->stream_bytes == p->cta_bytes * p->ctas);
    PLAN_CHECK(p->cta_bytes % 512 == 0 && p->layers_offset % 512 == 0);
    PLAN_CHECK(p->embed_bytes == (m->tied ? 0 : (int64_t) m->V * m->D * 2));
}

/* ---- Things laid out one behind the other ---------------------------------- */

struct span {
    const char *name;
    int64_t from, size;
};

/* The spans lie inside 0 .. TOTAL, begin at multiples of ALIGN, and have no byte in common. */
static void check_spans(const struct span *s, int n, int64_t total, int64_t align)
{
    for (int i = 0; i < n; i++) {
        PLAN_CHECK(s[i].from >= 0 && s[i].size >= 0 && s[i].from + s[i].size <= total &&
                       s[i].from % align == 0,
                   "%s at %lld, %lld of %lld", s[i].name, (long long) s[i].from,
                   (long long) s[i].size, (long long) total);
        for (int j = 0; j < i; j++)
            PLAN_CHECK(!s[i].size || !s[j].size || s[i].from >= s[j].from + s[j].size ||
                           s[j].from >= s[i].from + s[i].size,
                       "%s and %s", s[j].name, s[i].name);
    }
}

static void check_hops(const struct gen_plan *p)
{
    const struct gen_model *m = &p->model;
    const int heads = p->most_heads * ratio_of(p), through_l2 = !p->cluster;
    /* As far as the templates index each. */
    const int64_t used[GEN_HOPS] = {
        [GEN_HOP_QKV] = p->groups * p->most_heads * grouped(p) * 3 * through_l2,
        [GEN_HOP_PART] = p->groups * p->group * heads * (m->E / 8 * 3 + 1) * through_l2,
        [GEN_HOP_MLP] = p->groups * p->most_units * 12 * through_l2,
        [GEN_HOP_X] = 2 * p->groups * (p->pairs * 6 + p->group * p->warps) * through_l2,
        [GEN_HOP_TEAM] = m->K * (p->team - 1) * ratio_of(p) * m->E / 2,
        [GEN_HOP_O] = 2 * p->pairs * p->groups * 6,
        [GEN_HOP_DOWN] = 2 * p->pairs * p->groups * 6,
        [GEN_HOP_BEST] = p->ctas,
        [GEN_HOP_COUNT] = 2 * p->ctas * 16,
    };
    struct span s[GEN_HOPS];

    for (int i = 0; i < GEN_HOPS; i++) {
        s[i] = (struct span){"hop", p->hop_offset[i], used[i]};
        PLAN_CHECK(p->hop_words[i] == used[i], "hop %d has %d words, %lld are used", i,
                   p->hop_words[i], (long long) used[i]);
    }
    check_spans(s, GEN_HOPS, p->exchange_words, 8);
}

static void check_vectors(const struct gen_plan *p)
{
    const struct gen_model *m = &p->model;
    const int norm = m->qk_norm ? m->E : 0, bias = m->qkv_bias ? (m->H + 2 * m->K) * m->E : 0;
    const struct span layer[] = {
        {"attn_norm", p->vec_attn_norm, m->D}, {"mlp_norm", p->vec_mlp_norm, m->D},
        {"q_norm", p->vec_q_norm, norm},       {"k_norm", p->vec_k_norm, norm},
        {"bias", p->vec_bias, bias},
    };
    const struct span all[] = {
        {"layers", 0, (int64_t) m->L * p->vec_layer},
        {"norm", p->vec_norm, m->D},
    };

    check_spans(layer, 5, p->vec_layer, 4); /* float4 loads */
    check_spans(all, 2, p->vec_floats, 4);
    PLAN_CHECK(p->vec_floats <= INT_MAX);
}

/* place.cu.m4, kv_at: the last element of a head's cache, and a tile is a chunk. */
static void check_kv(const struct gen_plan *p)
{
    const struct gen_model *m = &p->model;
    const int pos = p->context - 1, e = m->E - 1;
    const int64_t last = (int64_t) (pos / p->kv_tile) * p->kv_tile * m->E * 2 + p->kv_tile * m->E +
                         pos % p->kv_tile / 8 * (m->E * 8) + e / 8 * 64 + pos % 8 * 8 + e % 8;

    PLAN_CHECK(p->kv_tile % 16 == 0 && p->kv_tile >= 16 && p->kv_tile <= 64);
    PLAN_CHECK(p->kv_tile * m->E * 4 <= p->stage_bytes);
    PLAN_CHECK(p->kv_tile == 16 || p->kv_tile * m->E * 4 <= p->chunk_bytes);
    PLAN_CHECK(p->kv_head > last && p->kv_head - last <= p->kv_tile * m->E * 2 &&
               p->kv_head % (p->kv_tile * m->E * 2) == 0);
    PLAN_CHECK(p->kv_layer == p->kv_head * m->K && p->kv_bytes == p->kv_layer * m->L * 2);
}

/* prefill.cu.m4: resid, x, y and raw q, k, v of T tokens. */
static void check_scratch(const struct gen_plan *p)
{
    const struct gen_model *m = &p->model;
    const int64_t t = p->prefill_tokens, x = t * p->pf_x_cols * 2;
    const struct span s[] = {
        {"resid", p->pf_resid, t * m->D * 4},
        {"x", p->pf_x, x},
        {"y", p->pf_x + x, x},
        {"qkv", p->pf_qkv, t * (m->H + 2 * m->K) * m->E * 4},
    };

    check_spans(s, 4, p->pf_bytes, 16);
    PLAN_CHECK(t % 16 == 0 && t * p->pf_x_cols * 2 <= INT_MAX);
    PLAN_CHECK(p->pf_x_cols >= p->phase[GEN_QKV].units * 32 &&
               p->pf_x_cols >= p->phase[GEN_O].units * 32 &&
               p->pf_x_cols >= p->phase[GEN_DOWN].units * 32 && p->pf_x_cols >= m->H * m->E);
}

/* ---- Shared memory --------------------------------------------------------- */

/* Put SIZE bytes behind *AT, aligned. */
static void place(int64_t *at, int64_t size, int64_t align)
{
    *at = (*at + align - 1) / align * align + size;
}

/* sizeof(Shared), shared.cu.m4. */
static int64_t shared_size(const struct gen_plan *p)
{
    const int e = p->model.E, ratio = ratio_of(p), heads = p->most_heads * ratio;
    int64_t at = 0;

    place(&at, (int64_t) p->stages * p->stage_bytes, 128);
    place(&at, (p->cluster ? 2 : 1) * p->phase[GEN_QKV].units * 64, 16); /* x */
    place(&at, p->most_units * 64, 16);                  /* act */
    place(&at, p->most_heads * (ratio + 2) * e * 4, 16); /* qkv */
    if (p->cluster)
        place(&at, p->group * heads * (e + 4) * 4, 16);    /* part */
    place(&at, 2 * p->group * p->warps * 16, 16);          /* squares */
    place(&at, 16, 16);                                    /* unguess, factor */
    place(&at, heads * e * 2, 16);                         /* q */
    place(&at, p->most_heads * 2 * e * 2, 16);             /* now */
    place(&at, p->warps * ratio * e * 4, 16);              /* out */
    place(&at, 2 * p->warps * ratio * 4, 4);               /* top, mass */
    place(&at, ratio * 4, 4);                              /* score */
    place(&at, heads * e * 2, 16);                         /* y */
    place(&at, p->rank_pairs * 64, 16);                    /* resid */
    place(&at, 2 * p->round_blocks * 8 * p->warps * 4, 4); /* part_sums */
    place(&at, p->warps * 4, 4);                           /* sum */
    place(&at, p->warps * 16, 16);                         /* best */
    place(&at, 16 * 5 * 4, 4);                             /* hist */
    place(&at, 2 * p->stages * 8, 8);                      /* full, free */
    place(&at, p->cluster ? 5 * 8 : 0, 8);                 /* arrived */
    place(&at, sizeof(struct mk_args), 8);
    place(&at, 6 * 4 + p->warps * 4, 4); /* hold .. chunk */
    place(&at, p->timing ? 16 + MK_LAP_COUNT * 16 : 0, 8); /* lap, waited, laps */
    place(&at, 2 * 4, 4);                /* fed, index */
    place(&at, 0, 128);
    return at;
}

static void check_shared(const struct gen_plan *p)
{
    const int64_t size = shared_size(p);

    PLAN_CHECK(size <= p->smem_bytes && p->smem_bytes <= p->gpu.smem_block, "%lld",
               (long long) size);
    PLAN_CHECK(p->smem_bytes - size < 1536, "%lld of %d", (long long) size, p->smem_bytes);
    PLAN_CHECK(p->stages >= 2 && p->inflight >= 1 && p->inflight <= p->stages);
    PLAN_CHECK(p->inflight_hop >= 1 && p->inflight_hop <= p->inflight);
    PLAN_CHECK(p->inflight_heads >= 1 && p->inflight_heads <= p->stages);
}

/* A tile of prefill.cu.m4 with STAGES wanted. */
static void check_tile(const struct gen_plan *p, int tokens, int blocks, int cols, int wm, int wn,
                       int stages)
{
    const int threads = 8 * 32, wk = 8 / (wm * wn), work = p->prefill_smem_bytes - 1024;
    const int stage = tokens * cols * 2 + blocks * cols * 16;

    PLAN_CHECK(smaller(work / stage, stages) >= 2, "tile %d x %d x %d", tokens, blocks * 8, cols);
    PLAN_CHECK(tokens * cols / 8 % threads == 0 && blocks * cols % threads == 0 &&
               threads % cols == 0);
    PLAN_CHECK(tokens % (16 * wm) == 0 && blocks % wn == 0 && blocks / wn % 2 == 0 &&
               cols / 32 % wk == 0);
    PLAN_CHECK(wk == 1 || wk * tokens * blocks * 32 <= work, "partial sums");
}

static void check_prefill(const struct gen_plan *p)
{
    const int work = p->prefill_smem_bytes - 1024, flash = p->flash_n * p->model.E * 2 * 2;
    int64_t size = work;

    check_tile(p, p->gemm_m, p->gemm_n / 8, p->gemm_k, 2, 4, p->gemm_stages);
    PLAN_CHECK(p->gemm_stages * (p->gemm_m + p->gemm_n) * p->gemm_k * 2 <= work,
               "all stages of the wide tile");
    check_tile(p, 64, 8, 64, 2, 2, 8);
    check_tile(p, 16, 2, 256, 1, 1, 8);
    PLAN_CHECK(p->flash_m == 8 * 16 && work / flash >= 2 &&
               p->flash_n % (8 * 32 / (p->model.E / 8)) == 0);
    place(&size, sizeof(struct mk_args), 8);
    place(&size, 0, 128);
    PLAN_CHECK(work % 128 == 0 && size <= p->prefill_smem_bytes &&
               p->prefill_smem_bytes <= p->gpu.smem_block);
}

/* ---- Numbers of 32 bits ---------------------------------------------------- */

/* The values of params.m4 that the templates keep in 64 bits. */
static int is_wide(const char *name)
{
    static const char *const wide[] = {"PLAN_LAYERS_OFFSET", "PLAN_CTA_BYTES", "PLAN_KV_",
                                       "PLAN_PF_", "PLAN_TOKEN_BYTES"};

    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++)
        if (!strncmp(name, wide[i], strlen(wide[i])) && strcmp(name, "PLAN_PF_X_COLS"))
            return 1;
    return 0;
}

static void check_numbers(const struct gen_plan *p)
{
    char *text = gen_plan_params(p), name[64];
    int numbers = 0;

    PLAN_CHECK(text != NULL);
    for (char *line = text; line && *line; line = strchr(line, '\n'), line += line != NULL) {
        long long value;
        int end = 0;
        if (sscanf(line, "m4_define({|%63[A-Z0-9_]|}, {|%lld|}%n", name, &value, &end) != 2 || !end)
            continue;
        numbers++;
        if (value < 0 || (value > INT_MAX && !is_wide(name)))
            CHECKF(0, "%s: %s is %lld", what, name, value);
    }
    free(text);
    PLAN_CHECK(numbers > 60 + 5 * p->model.L, "%d", numbers);
}

static void check_counts(const struct gen_plan *p)
{
    int64_t chunks = 0;

    for (int i = 0; i < p->n_classes; i++)
        PLAN_CHECK(p->cls[i].layer_bytes <= 1 << 30);
    PLAN_CHECK(p->layers_offset <= INT_MAX);
    for (int i = 0; i < GEN_HEAD; i++)
        chunks += p->phase[i].spans ? (int64_t) p->phase[i].cta_blocks * p->phase[i].spans
                                    : (int64_t) p->sets;
    chunks += (int64_t) p->most_heads * (p->context / p->kv_tile / p->group);
    chunks =
        chunks * p->model.L + (int64_t) p->phase[GEN_HEAD].cta_blocks * p->phase[GEN_HEAD].spans;
    PLAN_CHECK(chunks / 2 * p->tokens_per_launch <= 1 << 30);
    PLAN_CHECK((int64_t) p->context * p->model.E <= 1 << 30);
    PLAN_CHECK((int64_t) p->exchange_words * 4 <= INT_MAX);
}

/* One that failed would make the others fail, or run away. */
static void check_plan(const struct gen_plan *p, int thorough)
{
    const int before = check_failed;

    check_groups(p);
    check_sets(p);
    if (check_failed > before)
        return;
    check_streams(p);
    check_hops(p);
    check_vectors(p);
    check_kv(p);
    check_scratch(p);
    check_shared(p);
    check_prefill(p);
    check_counts(p);
    if (thorough)
        check_numbers(p);
}

/* ---- Which plans ----------------------------------------------------------- */

static int make(const struct gen_model *m, const struct gen_gpu *g, int context, const char *file,
                const char *const *set, struct gen_plan *p)
{
    int n = snprintf(what, sizeof what,
                     "%s D %d H %d K %d E %d F %d V %d L %d on %s (%d SMs, %d bytes), context %d",
                     m->name, m->D, m->H, m->K, m->E, m->F, m->V, m->L, g->name, g->sms,
                     g->smem_block, context);

    for (int i = 0; set && set[i] && n < (int) sizeof what; i++)
        n += snprintf(what + n, sizeof what - (size_t) n, ", %s", set[i]);
    err.code = 0, err.text[0] = 0;
    return gen_plan_make(m, g, context, file, set, p, &err);
}

/* What the tests cannot do without. */
static void get(const char *model, const char *gpu, struct gen_model *m, struct gen_gpu *g)
{
    if (gen_model_read(model, m, &err) || gen_gpu_read(gpu, g, &err)) {
        fprintf(stderr, "%s\n", err.text);
        exit(1);
    }
}

static void random_model(struct gen_model *m)
{
    static const int divisors[] = {1, 2, 3, 5, 8, 13, 32};

    memset(m, 0, sizeof *m);
    strcpy(m->name, "random");
    m->E = random_in(0, 1) ? 64 : 128;
    m->K = divisors[random_in(0, 6)];
    m->H = m->K * random_in(1, 12);
    m->D = random_in(0, 3) ? random_in(1, 64) * 64 : random_in(1, 500) * 8;
    m->F = random_in(0, 3) ? random_in(1, 96) * 128 : random_in(1, 2000) * 8;
    m->V = random_in(1, random_in(0, 1) ? 3000 : 160000);
    m->L = random_in(1, 6);
    m->max_context = 1 << random_in(0, 20);
    m->eps = 1e-6;
    m->rope_theta = 1e4;
    m->qk_norm = random_in(0, 1);
    m->qkv_bias = random_in(0, 1);
    m->tied = random_in(0, 1);
    m->dtype = random_in(GEN_BF16, GEN_FP32);
}

static void random_gpu(struct gen_gpu *g)
{
    int n = 0;

    while (gen_gpu_profile(n))
        n++;
    CHECK(gen_gpu_read(gen_gpu_profile(random_in(0, n - 1)), g, &err) == 0);
    if (random_in(0, 2) == 0)
        g->sms = random_in(1, 200);
    if (random_in(0, 2) == 0)
        g->smem_block = random_in(16, 227) * 1024;
    for (int i = 1; i < 5; i++)
        g->clusters[i] = g->arch >= 90 && random_in(0, 1) ? random_in(0, g->sms >> i) : 0;
}

/* The first few of the keys that chance chooses, each with a value in its range. */
static void random_set(char text[MOST_SET][48], const char **set)
{
    static const struct {
        const char *key;
        int lo, hi, step;
    } keys[] = {
        {"ctas", 1, 132, 1},
        {"group", 1, 16, 1},
        {"cluster", 0, 1, 1},
        {"balance", 0, 1000, 1},
        {"warps", 4, 8, 1},
        {"chunk_bytes", 512, 20000, 1},
        {"stages", 2, 12, 1},
        {"round_blocks", 2, 16, 2},
        {"tokens_per_launch", 1, 1024, 1},
        {"prefill_ctas", 1, 132, 1},
        {"prefill_tokens", 16, 8192, 16},
        {"gemm_m", 64, 128, 64},
        {"gemm_n", 64, 128, 64},
        {"gemm_k", 32, 64, 32},
        {"gemm_stages", 2, 8, 1},
        {"flash_n", 32, 64, 32},
    };
    int n = 0;

    for (size_t i = 0; i < sizeof keys / sizeof *keys && n < MOST_SET; i++) {
        if (random_in(0, 9))
            continue;
        if (!strcmp(keys[i].key, "cluster"))
            snprintf(text[n], 48, "cluster=%s", random_in(0, 1) ? "cluster" : "l2");
        else
            snprintf(text[n], 48, "%s=%d", keys[i].key,
                     keys[i].lo +
                         random_in(0, (keys[i].hi - keys[i].lo) / keys[i].step) * keys[i].step);
        set[n] = text[n];
        n++;
    }
    set[n] = NULL;
}

static void test_random(void)
{
    static struct gen_plan p;
    const char *set[MOST_SET + 1];
    char text[MOST_SET][48];
    struct gen_model m;
    struct gen_gpu g;
    int made = 0;
    const int before = check_failed;

    for (int i = 0; i < SHAPES && check_failed == before; i++) {
        random_model(&m);
        random_gpu(&g);
        random_set(text, set);
        if (make(&m, &g, random_in(0, 1) ? 0 : random_in(1, m.max_context), NULL, set, &p) == 0) {
            check_plan(&p, i % 16 == 0);
            made++;
        } else {
            CHECKF(!strncmp(err.text, "plan: ", 6), "%s: \"%s\"", what, err.text);
        }
    }
    printf("%d of %d random shapes have a plan\n", made, SHAPES);
    CHECK(made > SHAPES / 2 || check_failed > before);
}

/* Every carried model on every profile, by default and with choices that bring out the edges. */
static void test_carried(void)
{
    static const char *const sets[][4] = {
        {NULL},
        {"round_blocks=2", "cluster=l2", "balance=0", NULL},
        {"ctas=7", "warps=4", NULL},
        {"ctas=12", "group=3", NULL},
        {"group=16", "cluster=l2", "warps=4", NULL},
        {"group=1", "warps=4", NULL},
        {"chunk_bytes=512", "tokens_per_launch=1", NULL},
        {"chunk_bytes=1000", "stages=2", NULL},
        {"ctas=3", "group=1", "tokens_per_launch=1", NULL},
        {"dtype=fp16", "gemm_m=64", "prefill_tokens=8192", NULL},
    };
    static struct gen_plan p;
    struct gen_model m;
    struct gen_gpu g;

    for (int i = 0; gen_model_carried(i); i++) {
        for (int j = 0; gen_gpu_profile(j); j++) {
            get(gen_model_carried(i), gen_gpu_profile(j), &m, &g);
            for (size_t s = 0; s < sizeof sets / sizeof *sets; s++) {
                /* A choice may take what a small GPU's default has put aside. */
                const int fits = make(&m, &g, s % 2 ? 1 : 0, NULL, sets[s], &p) == 0;
                CHECKF(fits || (s && g.smem_block < 90000 &&
                                !strncmp(err.text, "plan: decode needs ", 19)),
                       "%s: %s", what, err.text);
                if (fits)
                    check_plan(&p, 0);
            }
            CHECKF(make(&m, &g, m.max_context, NULL, NULL, &p) == 0, "%s: %s", what, err.text);
            if (!err.code)
                check_plan(&p, j == 0);
        }
    }
}

/* ---- Plan files and --set -------------------------------------------------- */

static char dir[] = "/tmp/t-plan-XXXXXX", plan_file[64];

static void write_file(const char *text, size_t size)
{
    FILE *f = fopen(plan_file, "w");

    CHECK(f && fwrite(text, 1, size, f) == size && fclose(f) == 0);
}

/* A made plan, dumped and read back as a plan file, is the same plan. */
static void check_round_trip(const struct gen_plan *p)
{
    static struct gen_plan q;
    char *dump = gen_plan_dump(p), *params = gen_plan_params(p), *dump2, *params2;
    const char *key;

    CHECK(dump && params);
    for (int i = 0; (key = gen_plan_key(i)); i++) {
        char line[64];
        snprintf(line, sizeof line, "\n%.*s = ", (int) strcspn(key, " "), key);
        CHECKF(strstr(dump, line), "the dump lacks %s", line + 1);
    }
    write_file(dump, strlen(dump));
    CHECKF(make(&p->model, &p->gpu, p->context, plan_file, NULL, &q) == 0, "%s: %s", what,
           err.text);
    dump2 = gen_plan_dump(&q);
    params2 = gen_plan_params(&q);
    CHECK_STR(dump2, dump);
    CHECK(params2 && !strcmp(params2, params));
    CHECK(q.tokens_per_launch == p->tokens_per_launch);
    free(dump), free(dump2), free(params), free(params2);
}

static void test_round_trip(void)
{
    static const char *const all[] = {
        "ctas=20",           "group=5",           "cluster=l2",
        "balance=77",        "warps=5",           "chunk_bytes=2048",
        "stages=5",          "inflight=4",        "inflight_heads=3",
        "inflight_hop=2",    "round_blocks=4",    "tokens_per_launch=3",
        "prefill_ctas=19",   "prefill_tokens=48", "gemm_m=64",
        "gemm_n=64",         "gemm_k=32",         "gemm_stages=3",
        "flash_m=128",       "flash_n=32",        "unroll_layers=loop",
        "team_from=0",       "dtype=fp16",        "fault=hang",
        "epoch0=2147000000", "timing=on",         "early=x",
        NULL};
    static struct gen_plan p;
    struct gen_model m;
    struct gen_gpu g;
    int keys = 0;

    while (gen_plan_key(keys))
        keys++;
    CHECKF(keys == sizeof all / sizeof *all - 1, "%d keys; test them all", keys);
    get("qwen3-0.6b", "rtx4090", &m, &g);
    CHECKF(make(&m, &g, 100, NULL, all, &p) == 0, "%s", err.text);
    CHECK(p.ctas == 20 && p.warps == 5 && p.chunk_bytes == 2048 && p.stages == 5 &&
          p.inflight == 4);
    CHECK(p.inflight_heads == 3 && p.inflight_hop == 2 && p.round_blocks == 4 && p.group == 5 && p.balance == 77);
    CHECK(p.cluster == 0 && p.timing == 1);
    CHECK(p.tokens_per_launch == 3 && p.prefill_ctas == 19 && p.prefill_tokens == 48 && p.gemm_m == 64 && p.gemm_n == 64);
    CHECK(p.gemm_k == 32 && p.gemm_stages == 3 && p.flash_m == 128 && p.flash_n == 32);
    CHECK(p.unroll_layers == 1 && p.dtype == GEN_FP16 && p.fault == 1 && p.context == 100);
    CHECK(p.epoch0 == 2147000000);
    check_round_trip(&p);
    CHECKF(make(&m, &g, 0, NULL, NULL, &p) == 0, "%s", err.text);
    check_round_trip(&p);
    get("qwen3-0.6b", "h200", &m, &g);
    CHECKF(make(&m, &g, 0, NULL, NULL, &p) == 0, "%s", err.text);
    CHECK(p.cluster == 1);
    check_round_trip(&p);
}

/* Plan file TEXT for qwen3-0.6b on h200 is refused with CODE and MESSAGE, where "@" stands for
   the file; NULL: it is taken. */
static void check_file(const char *text, size_t size, int code, const char *message)
{
    static struct gen_plan p;
    struct gen_model m;
    struct gen_gpu g;
    char want[600];

    get("qwen3-0.6b", "h200", &m, &g);
    if (text)
        write_file(text, size);
    CHECKF(make(&m, &g, 0, plan_file, NULL, &p) == code, "%s: code %d", message ? message : text,
           err.code);
    snprintf(want, sizeof want, "%s%s", message && *message == '@' ? plan_file : "",
             message ? message + (*message == '@') : "");
    if (message)
        CHECK_STR(err.text, want);
    /* The error may be of no interest. */
    CHECK(gen_plan_make(&m, &g, 0, plan_file, NULL, &p, NULL) == code);
}

static void check_text(const char *text, int code, const char *message)
{
    check_file(text, strlen(text), code, message);
}

static void test_files(void)
{
    char wide[700];

    check_text("", 0, NULL);
    check_text("# nothing\n\n  \t\r\n", 0, NULL);
    check_text("warps = 5", 0, NULL);
    check_text("warps=5 # few\r\n\tstages =\t4\n", 0, NULL);
    check_text("[choices]\nwarps = 5\n[phases]\nwarps 99 % = \n[choices]\nstages = 4\n", 0, NULL);
    check_text("[choices]\nwarps = 9\n", MK_EFORMAT,
               "@:2: warps is \"9\"; it must be an integer in 4..8");
    check_text("[hops]\nx\n[choices]\ny\n", MK_EFORMAT, "@:4: \"y\" is not key=value");
    check_text("\nwarps 5\n", MK_EFORMAT, "@:2: \"warps 5\" is not key=value");
    check_text("warp = 5\n", MK_EFORMAT, "@:1: unknown plan key \"warp\" (mkgen --list-keys)");
    check_text("= 5\n", MK_EFORMAT, "@:1: unknown plan key \"\" (mkgen --list-keys)");
    check_text("warps =\n", MK_EFORMAT, "@:1: warps is \"\"; it must be an integer in 4..8");
    check_text("warps = 5.0\n", MK_EFORMAT, "@:1: warps is \"5.0\"; it must be an integer in 4..8");
    check_text("warps = 99999999999999999999\n", MK_EFORMAT,
               "@:1: warps is \"99999999999999999999\"; it must be an integer in 4..8");
    check_text("dtype = fp32\n", MK_EFORMAT, "@:1: dtype is \"fp32\"; it must be one of bf16|fp16");
    check_text("dtype = bf16|fp16\n", MK_EFORMAT,
               "@:1: dtype is \"bf16|fp16\"; it must be one of bf16|fp16");
    check_file("warps = 5\0\n", 11, MK_EFORMAT, "@:1: line too long");
    memset(wide, 'x', sizeof wide - 1);
    wide[sizeof wide - 1] = 0;
    check_text(wide, MK_EFORMAT, "@:1: line too long");
    check_text("gemm_m = 100\n", MK_EINVAL,
               "plan: gemm_m and gemm_n must be 64 or 128, gemm_k and flash_n 32 or 64");
    unlink(plan_file);
    check_file(NULL, 0, MK_ENOENT, "@: No such file or directory");
    CHECK(mkfifo(plan_file, 0600) == 0);
    check_file(NULL, 0, MK_EIO, "@: not a regular file");
    unlink(plan_file);
    CHECK(mkdir(plan_file, 0700) == 0);
    check_file(NULL, 0, MK_EIO, "@: not a regular file");
    rmdir(plan_file);
}

#define SET(...)                                                                                   \
    (const char *const[])                                                                          \
    {                                                                                              \
        __VA_ARGS__, NULL                                                                          \
    }

/* SET for MODEL on GPU is refused with MESSAGE. */
static void refused(const char *model, const char *gpu, int context, const char *const *set,
                    const char *message)
{
    static struct gen_plan p;
    struct gen_model m;
    struct gen_gpu g;

    get(model, gpu, &m, &g);
    CHECK(make(&m, &g, context, NULL, set, &p) == MK_EINVAL);
    CHECK_STR(err.text, message);
}

/* Warps and chunks by the shape of a block. */
static void test_blocks(void)
{
    static const struct {
        const char *model;
        int warps, chunk;
    } want[] = {
        {"smollm2-135m", 6, 16384}, {"qwen2.5-0.5b", 7, 16384}, {"qwen3-0.6b", 8, 16384},
        {"llama-3.2-1b", 8, 16384}, {"llama-3.2-3b", 8, 24576}, {"qwen3-4b", 8, 40960},
        {"qwen2.5-7b", 8, 28672},   {"qwen3-8b", 8, 32768},
    };
    static struct gen_plan p;
    struct gen_model m;
    struct gen_gpu g;

    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        get(want[i].model, "h200", &m, &g);
        CHECKF(make(&m, &g, 0, NULL, NULL, &p) == 0, "%s", err.text);
        CHECKF(p.warps == want[i].warps && p.chunk_bytes == want[i].chunk,
               "%s: %d warps, chunks of %d", m.name, p.warps, p.chunk_bytes);
    }
}

/* Who helps whom, and from where on. */
static void test_team(void)
{
    static struct gen_plan p;
    struct gen_model m;
    struct gen_gpu g;

    get("qwen2.5-0.5b", "h200", &m, &g);
    CHECKF(make(&m, &g, 32768, NULL, NULL, &p) == 0, "%s", err.text);
    CHECK(p.team == 7 && p.team_from == 2 * 7 * 8 * p.kv_tile &&
          p.hop_words[GEN_HOP_TEAM] == 2 * 6 * 7 * 32);
    CHECK(make(&m, &g, 4096, NULL, NULL, &p) == 0 && p.team == 1 && !p.hop_words[GEN_HOP_TEAM]);
    CHECK(make(&m, &g, 32768, NULL, SET("team_from=0"), &p) == 0 && p.team == 1);
    CHECK(make(&m, &g, 32768, NULL, SET("team_from=32767"), &p) == 0 && p.team == 7);
    CHECK(make(&m, &g, 32768, NULL, SET("team_from=32768"), &p) == 0 && p.team == 1);
    CHECK(make(&m, &g, 32768, NULL, SET("cluster=l2"), &p) == 0 && p.team == 1 && p.team_from == 0);
    CHECK(make(&m, &g, 4096, NULL, SET("team_from=3520"), &p) == 0 && p.team == 7);
    refused(
        "qwen2.5-0.5b", "h200", 4096, SET("team_from=3519"),
        "plan: team_from is 3519; 56 CTAs that share tiles of 64 positions have one each from 3520 on");
    refused(
        "qwen2.5-0.5b", "h200", 4096, SET("team_from=3520", "cluster=l2"),
        "plan: team_from is 3520; only groups that are clusters help, and only when there are twice as many as KV "
        "heads: here 16 and 2");
    refused(
        "qwen3-0.6b", "h200", 4096, SET("team_from=1"),
        "plan: team_from is 1; only groups that are clusters help, and only when there are twice as many as KV "
        "heads: here 15 and 8");
}

/* Before sums are awaited, weights are read into registers where there are registers. */
static void test_early(void)
{
    static struct gen_plan p;
    struct gen_model m;
    struct gen_gpu g;

    get("smollm2-135m", "h200", &m, &g);
    CHECK(make(&m, &g, 0, NULL, NULL, &p) == 0 && p.warps == 6 && p.early == 1);
    CHECK(make(&m, &g, 0, NULL, SET("warps=7"), &p) == 0 && p.early == 0);
    CHECK(make(&m, &g, 0, NULL, SET("warps=7", "early=sums"), &p) == 0 && p.early == 1);
    CHECK(make(&m, &g, 0, NULL, SET("cluster=l2"), &p) == 0 && p.early == 0);
    CHECK(make(&m, &g, 0, NULL, SET("chunk_bytes=4608"), &p) == 0 && p.early == 0);
    CHECK(make(&m, &g, 0, NULL, SET("group=2"), &p) == 0 && p.groups > 30 && p.early == 0);
    CHECK(make(&m, &g, 0, NULL, SET("early=sums"), &p) == 0);
    check_round_trip(&p);
    refused("smollm2-135m", "h200", 0, SET("cluster=l2", "early=sums"),
            "plan: early is sums; only groups that are clusters have registers for that");
    refused("smollm2-135m", "h200", 0, SET("chunk_bytes=9000", "early=sums"),
            "plan: early is sums; that needs chunks as long as a block, 9216 bytes, and chunk_bytes is 9000");
}

/* A carried plan is one for every part of its product, also for one without clusters. */
static void test_parts(void)
{
    static struct gen_plan p;
    struct gen_model m;
    struct gen_gpu g, part;
    char file[4096];
    int carried = 0;

    for (int i = 0; gen_model_carried(i); i++) {
        get(gen_model_carried(i), "h200", &m, &g);
        if (!gen_plan_carried(&m, &g, file, sizeof file))
            continue;
        carried++;
        for (int j = 0; gen_gpu_part(&g, j, &part) == 0; j++)
            CHECKF(gen_plan_make(&m, &part, 0, file, NULL, &p, &err) == 0, "%s, %d clusters: %s", file,
                   part.clusters[3], err.text);
    }
    CHECKF(carried >= 6, "%d carried plans", carried);
}

static void test_settings(void)
{
    refused("qwen3-0.6b", "h200", 0, SET("warps"), "--set: \"warps\" is not key=value");
    refused("qwen3-0.6b", "h200", 0, SET("warps=3"),
            "--set: warps is \"3\"; it must be an integer in 4..8");
    refused("qwen3-0.6b", "h200", 0, SET("x;y=3"),
            "--set: unknown plan key \"x;y\" (mkgen --list-keys)");
    refused("qwen3-0.6b", "h200", 0, SET("unroll_layers=lis"),
            "--set: unroll_layers is \"lis\"; it must be one of list|loop|inline");
    refused("qwen3-0.6b", "h200", 40961, NULL,
            "context is 40961; qwen3-0.6b takes 1..40960 tokens");
    refused("qwen3-0.6b", "h200", -1, NULL, "context is -1; qwen3-0.6b takes 1..40960 tokens");
    refused("qwen3-0.6b", "t4", 0, SET("dtype=bf16"), "plan: dtype is bf16; sm_75 has fp16 only");
    refused("qwen3-0.6b", "h200", 0, SET("round_blocks=3"),
            "plan: round_blocks is 3 and prefill_tokens 2048; they must be multiples of 2 and 16");
    refused("qwen3-0.6b", "h200", 0, SET("prefill_tokens=17"),
            "plan: round_blocks is 10 and prefill_tokens 17; they must be multiples of 2 and 16");
    refused("qwen3-0.6b", "h200", 0, SET("inflight=9", "stages=8"),
            "plan: inflight is 9, inflight_heads 9 and inflight_hop 2; they must not exceed stages 8, stages and "
            "inflight");
    refused("qwen3-0.6b", "h200", 0, SET("stages=14"),
            "plan: decode needs 263728 bytes of shared memory, 34128 of them beside the ring, and "
            "a block of h200 has 232448; 12 stages of 16384 bytes would fit");
    refused("qwen3-8b", "l4", 0, SET("gemm_stages=8", "gemm_k=64"),
            "plan: prefill needs 132096 bytes of shared memory and a block of l4 has 101376; "
            "make gemm_stages or flash_n smaller");
    refused("qwen3-8b", "h200", 0, SET("ctas=1", "chunk_bytes=512", "tokens_per_launch=100"),
            "plan: 100 tokens of 20789248 chunks each are too many for a launch; "
            "make tokens_per_launch smaller or chunk_bytes larger");
}

static void test_group_settings(void)
{
    refused("qwen3-0.6b", "h200", 0, SET("ctas=133"), "plan: ctas is 133 and prefill_ctas 0; h200 has 132 SMs");
    refused("qwen3-8b", "t4", 0, SET("ctas=41"), "plan: ctas is 41 and prefill_ctas 0; t4 has 40 SMs");
    refused("qwen3-0.6b", "h200", 0, SET("ctas=132", "group=8"),
            "plan: ctas is 132; it must be a multiple of group, 8");
    refused("qwen3-0.6b", "h200", 0, SET("ctas=4", "group=8"),
            "plan: ctas is 4; it must be a multiple of group, 8");
    refused("demo", "h200", 0, SET("group=17"),
            "--set: group is \"17\"; it must be an integer in 1..16");
    refused("qwen3-0.6b", "h200", 0, SET("cluster=1"),
            "--set: cluster is \"1\"; it must be one of l2|cluster");
    refused("qwen3-0.6b", "a100", 0, SET("cluster=cluster"),
            "plan: cluster is cluster; sm_80 has l2 only");
    refused("qwen3-0.6b", "h200", 0, SET("group=12", "cluster=cluster"),
            "plan: group is 12; a cluster has 2, 4, 8 or 16 CTAs (cluster=l2 takes any)");
    refused("qwen3-0.6b", "h200", 0, SET("ctas=128", "cluster=cluster"),
            "plan: ctas is 128; h200 holds 15 clusters of group 8 at once");
    refused("qwen3-0.6b", "h100", 0, SET("cluster=cluster"),
            "plan: ctas is 8; h100 holds 0 clusters of group 8 at once (cluster=l2 needs none)");
    refused("demo", "h200", 0, SET("ctas=27", "group=1"),
            "plan: ctas is 27 and group 1; 2 KV heads and 24 times 32 of intermediate_size are "
            "work for 26 groups at most");
    refused("qwen3-0.6b", "h200", 0, SET("balance=1001"),
            "--set: balance is \"1001\"; it must be an integer in 0..1000");
}

/* A model on the emulated GPU of ARCH. */
static void check_host(const char *model, int arch, const char *const *set, int ctas, int group,
                       int cluster)
{
    static struct gen_plan p;
    struct gen_model m;
    struct gen_gpu g;

    get(model, "h200", &m, &g);
    CHECK(gen_gpu_host(arch, &g) == 0);
    CHECKF(make(&m, &g, 0, NULL, set, &p) == 0, "%s: %s", what, err.text);
    if (err.code)
        return;
    CHECKF(p.ctas == ctas && p.group == group && p.cluster == cluster,
           "%s: %d CTAs, groups of %d, %s", what, p.ctas, p.group, p.cluster ? "clusters" : "l2");
    check_plan(&p, 1);
}

/* The groups that are chosen. */
static void test_group_choices(void)
{
    static struct gen_plan p;
    struct gen_model m;
    struct gen_gpu g;

    check_host("demo", 90, NULL, 16, 8, 1);
    check_host("demo", 100, NULL, 16, 8, 1);
    check_host("demo", 80, NULL, 16, 8, 0);
    check_host("demo", 75, NULL, 16, 8, 0);
    check_host("demo", 90, SET("group=4"), 16, 4, 1);
    check_host("demo", 90, SET("ctas=4"), 4, 4, 1);
    check_host("demo", 90, SET("ctas=3"), 3, 1, 0);
    check_host("demo", 90, SET("ctas=3", "group=3"), 3, 3, 0);
    check_host("demo", 90, SET("group=3"), 15, 3, 0);
    check_host("demo", 90, SET("ctas=2"), 2, 2, 1);
    check_host("demo", 90, SET("ctas=1"), 1, 1, 0);
    get("qwen3-0.6b", "h200", &m, &g);
    CHECK(make(&m, &g, 0, NULL, SET("ctas=128"), &p) == 0 && p.group == 8 && p.cluster == 0);
    CHECK(make(&m, &g, 0, NULL, SET("group=4"), &p) == 0 && p.ctas == 120 && p.cluster == 1);
    CHECK(make(&m, &g, 0, NULL, SET("group=16"), &p) == 0 && p.ctas == 112 && p.cluster == 1);
    CHECK(make(&m, &g, 0, NULL, SET("cluster=l2"), &p) == 0 && p.ctas == 128 && p.group == 8);
    CHECK(p.hop_words[GEN_HOP_QKV] && p.hop_words[GEN_HOP_X]);
    CHECK(make(&m, &g, 0, NULL, NULL, &p) == 0 && p.ctas == 120);
    CHECK(!p.hop_words[GEN_HOP_QKV] && !p.hop_words[GEN_HOP_X] && p.hop_words[GEN_HOP_O]);
    /* Fewer groups than there are, where there is no work for them. */
    m.D = 64, m.K = 1, m.H = 4, m.F = 64;
    CHECK(make(&m, &g, 0, NULL, NULL, &p) == 0 && p.groups == 3 && p.group == 4);
    CHECK(make(&m, &g, 0, NULL, SET("ctas=6"), &p) == 0 && p.groups == 3 && p.group == 2);
    CHECK(make(&m, &g, 0, NULL, SET("ctas=7"), &p) == MK_EINVAL);
    /* 3 blocks of q, 3 of k and v, and O in one chunk. */
    m.H = 1, m.E = 64, m.L = 1, m.V = 8;
    CHECKF(make(&m, &g, 0, NULL, NULL, &p) == 0 && p.stages == 7, "%d stages", p.stages);
    CHECK(make(&m, &g, 0, NULL, SET("stages=8"), &p) == MK_EINVAL);
    CHECK_STR(err.text, "plan: stages is 8; a CTA has only 7 chunks of weights in a token");
}

/* Most bytes of a layer's weights that a CTA reads, by the average. */
static double imbalance(const struct gen_plan *p)
{
    struct walk w = {.p = p, .cta_bytes = calloc((size_t) p->ctas, sizeof *w.cta_bytes)};
    double most = 0, sum = 0;

    for (int i = 0; i < GEN_PHASES; i++)
        w.seen[i] = calloc((size_t) (p->pairs * p->phase[i].units + p->phase[i].blocks), 1);
    for (int cta = 0; cta < p->ctas; cta++) {
        double bytes;
        walk_layer(&w, 0, cta);
        bytes = (double) w.cta_bytes[cta];
        most = bytes > most ? bytes : most;
        sum += bytes;
    }
    for (int i = 0; i < GEN_PHASES; i++)
        free(w.seen[i]);
    free(w.cta_bytes);
    return most * p->ctas / sum;
}

static void test_balance(void)
{
    /* smollm2-135m: a head's q, k, v and O alone are more than that. */
    static const struct {
        const char *model;
        double most;
    } models[] = {
        {"qwen3-0.6b", 1.15},   {"qwen3-8b", 1.15},     {"llama-3.2-1b", 1.15},
        {"llama-3.1-8b", 1.15}, {"qwen2.5-0.5b", 1.15}, {"smollm2-135m", 1.5},
    };
    static struct gen_plan p;
    struct gen_model m;
    struct gen_gpu g;
    int units;

    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        get(models[i].model, "h200", &m, &g);
        CHECKF(make(&m, &g, 0, NULL, SET("balance=100"), &p) == 0, "%s: %s", what, err.text);
        printf("%s: the busiest CTA reads %.3f of the average\n", m.name, imbalance(&p));
        CHECKF(imbalance(&p) <= models[i].most, "%s", what);
    }
    /* The more attention counts, the fewer units go to groups with heads. */
    get("qwen3-8b", "h200", &m, &g);
    CHECK(make(&m, &g, 0, NULL, SET("balance=0"), &p) == 0 && p.cls[0].heads == 1);
    units = p.cls[0].units;
    CHECK(make(&m, &g, 0, NULL, SET("balance=200"), &p) == 0 && p.cls[0].heads == 1);
    CHECKF(p.cls[0].units < units - 4, "%d units, and %d", p.cls[0].units, units);
}

/* Models at the edge of what the reader takes. */
static void test_giants(void)
{
    static struct gen_plan p;
    struct gen_model m;
    struct gen_gpu g;

    random_model(&m);
    m.D = 65536, m.H = m.K = 1024, m.E = 128, m.F = 262144, m.V = 4194304, m.L = 512,
    m.max_context = 1 << 24;
    CHECK(gen_gpu_read("h200", &g, &err) == 0);
    CHECK(make(&m, &g, 1 << 24, NULL, NULL, &p) == MK_EUNSUPPORTED || err.code == MK_EINVAL);
    CHECK(!strncmp(err.text, "plan: ", 6));
    m.H = m.K = 8, m.F = 8192, m.V = 1000, m.L = 1;
    CHECK(make(&m, &g, 0, NULL, NULL, &p) == MK_EINVAL);
    CHECK(!strncmp(err.text, "plan: decode needs ", 19));
    m.D = 64;
    CHECK(make(&m, &g, 1 << 24, NULL, NULL, &p) == MK_EUNSUPPORTED);
    CHECK_STR(err.text,
              "plan: context is 16777216; with head_dim 128 at most 8388608 tokens are supported");
    CHECKF(make(&m, &g, 1 << 23, NULL, NULL, &p) == 0, "%s", err.text);
    check_plan(&p, 0);
    m.V = 4194304;
    CHECK(make(&m, &g, 0, NULL, (const char *const[]){"ctas=1", NULL}, &p) == MK_EUNSUPPORTED);
    CHECK_STR(err.text, "plan: each of 1 CTAs has 4194304 logits; at most 2097152 are supported");
    m.D = 4096;
    g.sms = 1;
    CHECK(make(&m, &g, 0, NULL, NULL, &p) == MK_EUNSUPPORTED);
    CHECK_STR(err.text,
              "plan: a layer has 234881024 bytes in the stream of each of 1 CTAs and the head "
              "34359738368; at most 1073741824 and 2147483647 are supported");
    m.F = 131072, m.V = 100;
    CHECK(make(&m, &g, 0, NULL, NULL, &p) == MK_EUNSUPPORTED);
    CHECK_STR(err.text,
              "plan: a layer has 3254779904 bytes in the stream of each of 1 CTAs and the head "
              "851968; at most 1073741824 and 2147483647 are supported");
}

int main(void)
{
    const char *seed = getenv("T_PLAN_SEED");

    state = seed ? strtoull(seed, NULL, 0) : (uint64_t) time(NULL);
    printf("T_PLAN_SEED=%llu\n", (unsigned long long) state);
    CHECK(mkdtemp(dir) != NULL);
    snprintf(plan_file, sizeof plan_file, "%s/a.plan", dir);
    test_files();
    test_round_trip();
    test_blocks();
    test_team();
    test_early();
    test_parts();
    test_settings();
    test_group_settings();
    test_group_choices();
    test_balance();
    test_giants();
    test_random();
    test_carried();
    unlink(plan_file);
    rmdir(dir);
    return check_done();
}
