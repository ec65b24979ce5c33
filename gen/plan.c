/* plan.c - the arithmetic behind gen_plan.  Nothing here looks at a device or a file. */
#include "config.h"

#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "gen/gen.h"
#include "gen/keys.h"

/* Measured on an H200: 64 KiB in flight per SM saturate its memory, and every further byte
   is a queue that hops stand in; and long blocks come fastest in chunks of 32 to 40 KiB. */
enum { CHUNK = 16384, LONG_BLOCK = 40960 };
enum { INFLIGHT_BYTES = 65536, INFLIGHT_HOP_BYTES = 32768 };
/* A launch must not hold the GPU longer than this. */
enum { LAUNCH_US = 100000 };
/* The templates count bytes of a layer and of prefill's activations, elements of a head's keys, the
   exchange's words and the chunks of a launch in int; loops step a little past the end.  The
   sampler adds up 11-bit limbs of a CTA's logits in 32 bits. */
enum {
    MOST_BYTES = 1 << 30,
    MOST_HEAD_ELEMS = 1 << 30,
    MOST_CHUNKS = 1 << 30,
    MOST_WORDS = 1 << 27,
    MOST_LOGITS = 1 << 21
};
/* CTAs of a group by default: 8 is the largest cluster that every GPU with clusters takes. */
enum { GROUP = 8 };
/* Fewer ring stages than this, and smaller chunks or fewer warps are better. */
enum { FEW_STAGES = 3 };

/* ---- Groups and their shares ---------------------------------------------- */

static int ceil_div(int a, int b)
{
    return (a + b - 1) / b;
}

static int64_t align_up(int64_t x, int64_t to)
{
    return (x + to - 1) / to * to;
}

static int min_int(int a, int b)
{
    return a < b ? a : b;
}

static int64_t min_int64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int max_int(int a, int b)
{
    return a > b ? a : b;
}

const struct gen_class *gen_plan_class(const struct gen_plan *p, int group)
{
    const struct gen_class *c = p->cls;

    while (group >= c->first + c->groups)
        c++;
    return c;
}

/* Pairs of blocks of D rows. */
static int model_pairs(const struct gen_model *m)
{
    return ceil_div(m->D, 16);
}

static int model_units(const struct gen_model *m)
{
    return ceil_div(m->F, 32);
}

/* Query, key and value blocks that come with a KV head. */
static int head_blocks(const struct gen_model *m)
{
    return (m->H / m->K + 2) * m->E / 8;
}

/* Columns of O, in units, that come with a KV head. */
static int head_units(const struct gen_model *m)
{
    return m->H / m->K * m->E / 32;
}

/* Where the phases of a layer are in the stream of a group's busiest rank. */
static void place_phases(const struct gen_plan *p, struct gen_class *c)
{
    const struct gen_model *m = &p->model;
    const int64_t block = ceil_div(m->D, 32) * 512, pairs = (int64_t) p->rank_pairs * 1024;

    c->o = ceil_div(c->heads * head_blocks(m), p->group) * block;
    c->mlp = c->o + pairs * c->heads * head_units(m);
    c->down = c->mlp + ceil_div(4 * c->units, p->group) * 2 * block;
    c->layer_bytes = c->down + pairs * c->units;
}

/* What a group's busiest rank reads of a layer, with UNITS units; of attention's weights, whose
   time is not the MLP's, a share. */
static int64_t group_cost(const struct gen_plan *p, int heads, int units)
{
    struct gen_class c = {.heads = heads, .units = units};

    place_phases(p, &c);
    return c.layer_bytes - c.mlp + c.mlp * p->balance / 100;
}

static int group_heads(const struct gen_plan *p, int group)
{
    return p->model.K / p->groups + (group < p->model.K % p->groups);
}

/* Give the units of the MLP one by one to the group that is then the least busy, the last one of
   several: the last group, which has no more heads than any other, so has some. */
static void share_units(const struct gen_plan *p, int units[GEN_MOST_CTAS])
{
    int64_t next[GEN_MOST_CTAS]; /* cost with one unit more */

    for (int g = 0; g < p->groups; g++) {
        units[g] = 0;
        next[g] = group_cost(p, group_heads(p, g), 1);
    }
    for (int n = model_units(&p->model); n > 0; n--) {
        int least = 0;
        for (int g = 1; g < p->groups; g++)
            if (next[g] <= next[least])
                least = g;
        units[least]++;
        next[least] = group_cost(p, group_heads(p, least), units[least] + 1);
    }
}

/* As many as registers hold, and no more than leaves a ring of few stages something to do. */
static void plan_batch(struct gen_plan *p)
{
    const struct gen_phase *head = &p->phase[GEN_HEAD];
    const int many = p->stages >= 8, few_units = ceil_div(head->units, p->warps) < 4;
    const int even = head->spans % 2 == 0 && head->units % head->span_units == 0;
    const int columns = many ? 4 : 2, span = max_int(p->phase[GEN_O].span_units, p->phase[GEN_DOWN].span_units);

    p->batch.pairs = many ? 2 : 1;
    p->batch.early = many && few_units ? 3 : p->batch.pairs;
    p->batch.spans = p->cluster && p->group > 1 && many && even ? 2 : 1;
    p->batch.columns = columns * span <= 8 ? columns : span <= 4 ? 2 : 1;
}

/* Can weights be in registers while sums are awaited?  Those of longer blocks are too many. */
static int has_early(const struct gen_plan *p)
{
    return p->cluster && p->phase[GEN_HEAD].spans == 1;
}

/* Groups that can share a head's positions. */
static int most_team(const struct gen_plan *p)
{
    return p->cluster && p->model.K * 2 <= p->groups ? p->groups / p->model.K : 1;
}

static void plan_groups(struct gen_plan *p)
{
    int units[GEN_MOST_CTAS], head = 0, unit = 0;
    struct gen_class *c = NULL;

    p->groups = p->ctas / p->group;
    p->pairs = model_pairs(&p->model);
    p->rank_pairs = ceil_div(p->pairs, p->group);
    p->team = most_team(p);
    p->n_classes = p->most_heads = p->most_units = 0;
    share_units(p, units);
    for (int g = 0; g < p->groups; g++) {
        const int heads = group_heads(p, g);
        if (!c || c->heads != heads || c->units != units[g]) {
            c = &p->cls[p->n_classes++];
            *c = (struct gen_class){g, 0, head, heads, unit, units[g], 0, 0, 0, 0};
            place_phases(p, c);
            p->most_heads = max_int(p->most_heads, heads);
            p->most_units = max_int(p->most_units, units[g]);
        }
        c->groups++;
        head += heads;
        unit += units[g];
    }
}

/* ---- Phases and the stream ---------------------------------------------- */

/* A matrix of D columns whose rows are dealt over CTAs, those of the head over all of them. */
static void plan_rows(struct gen_plan *p, int id, int rows, int step, int cta_blocks)
{
    struct gen_phase *f = &p->phase[id];

    f->rows = rows;
    f->cols = p->model.D;
    f->units = ceil_div(f->cols, 32);
    f->blocks = ceil_div(rows, 8);
    f->step = step;
    f->spans = ceil_div(f->units, p->chunk_bytes / 512);
    f->span_units = ceil_div(f->units, f->spans);
    f->spans = ceil_div(f->units, f->span_units);
    f->cta_blocks = cta_blocks;
    p->stage_bytes = max_int(p->stage_bytes, f->span_units * 512);
}

/* A matrix of D rows; a group has up to MOST of its columns, in units. */
static void plan_columns(struct gen_plan *p, int id, int cols, int most)
{
    struct gen_phase *f = &p->phase[id];

    f->rows = p->model.D;
    f->cols = cols;
    f->units = ceil_div(cols, 32);
    f->blocks = ceil_div(f->rows, 8);
    f->step = 1;
    f->spans = 0;
    f->span_units = max_int(1, min_int(most, p->chunk_bytes / (p->set_pairs * 1024)));
    f->cta_blocks = p->rank_pairs * 2;
    p->stage_bytes = max_int(p->stage_bytes, p->set_pairs * 1024 * f->span_units);
}

static void plan_phases(struct gen_plan *p)
{
    const struct gen_model *m = &p->model;

    p->sets = ceil_div(p->rank_pairs, p->warps);
    p->set_pairs = ceil_div(p->rank_pairs, p->sets);
    p->kv_tile = max_int(16, min_int(64, p->chunk_bytes / (4 * m->E) / 16 * 16));
    p->stage_bytes = p->kv_tile * m->E * 4;
    plan_rows(p, GEN_QKV, (m->H + 2 * m->K) * m->E, 1,
              ceil_div(p->most_heads * head_blocks(m), p->group));
    plan_columns(p, GEN_O, m->H * m->E, p->most_heads * head_units(m));
    plan_rows(p, GEN_MLP, 2 * m->F, 2, ceil_div(p->most_units * 4, p->group) * 2);
    plan_columns(p, GEN_DOWN, m->F, p->most_units);
    plan_rows(p, GEN_HEAD, m->V, 1, ceil_div(ceil_div(m->V, 8), p->ctas));
}

static int64_t most_layer_bytes(const struct gen_plan *p)
{
    int64_t most = 0;

    for (int i = 0; i < p->n_classes; i++)
        if (p->cls[i].layer_bytes > most)
            most = p->cls[i].layer_bytes;
    return most;
}

static void plan_streams(struct gen_plan *p)
{
    const struct gen_model *m = &p->model;
    const struct gen_phase *head = &p->phase[GEN_HEAD];

    p->layers_offset = (int64_t) head->cta_blocks * head->units * 512;
    p->cta_bytes = p->layers_offset + m->L * most_layer_bytes(p);
    p->stream_bytes = p->cta_bytes * p->ctas;
    p->embed_bytes = m->tied ? 0 : (int64_t) m->V * m->D * 2;
    p->token_bytes = 0;
    for (int i = 0; i < GEN_PHASES; i++)
        p->token_bytes +=
            (int64_t) p->phase[i].blocks * p->phase[i].units * 512 * (i == GEN_HEAD ? 1 : m->L);
    p->floor_us = p->gpu.mem_gbps ? p->token_bytes / (p->gpu.mem_gbps * 1e3) : 0;
}

/* Blocks of N, dealt in turn by STEP over CTAS, that the one of number NTH gets. */
static int dealt(int n, int step, int ctas, int nth)
{
    return (n / step + ctas - 1 - nth) / ctas * step;
}

/* KV heads to which a group attends at some time: its own, or as a helper another's. */
static int heads_attended(const struct gen_plan *p, int group)
{
    const int own = group_heads(p, group);

    return own ? own : group < p->model.K * p->team;
}

/* Chunks of a layer's weights that rank RANK of GROUP reads, when it attends. */
static int64_t layer_chunks(const struct gen_plan *p, int group, int rank)
{
    const struct gen_model *m = &p->model;
    const struct gen_class *c = gen_plan_class(p, group);
    const struct gen_phase *f = p->phase;
    const int qkv = heads_attended(p, group) * head_blocks(m);
    const int unit0 = c->unit0 + (group - c->first) * c->units;
    const int mlp = min_int(c->units * 8, f[GEN_MLP].blocks - unit0 * 8);

    return (int64_t) dealt(qkv, 1, p->group, rank) * f[GEN_QKV].spans +
           (int64_t) p->sets * ceil_div(c->heads * head_units(m), f[GEN_O].span_units) +
           (int64_t) dealt(max_int(0, mlp), 2, p->group, rank) * f[GEN_MLP].spans +
           (int64_t) p->sets * ceil_div(c->units, f[GEN_DOWN].span_units);
}

/* Weight chunks of a token: most of any CTA, or the fewest of those that read the KV cache. */
static int64_t token_chunks(const struct gen_plan *p, int most)
{
    const struct gen_phase *head = &p->phase[GEN_HEAD];
    int64_t best = -1;

    for (int cta = 0; cta < p->ctas; cta++) {
        const int group = cta / p->group;
        const int64_t n = p->model.L * layer_chunks(p, group, cta % p->group) +
                          (int64_t) dealt(head->blocks, 1, p->ctas, cta) * head->spans;
        if ((most || heads_attended(p, group)) && (best < 0 || (most ? n > best : n < best)))
            best = n;
    }
    return best;
}

static void plan_vectors(struct gen_plan *p)
{
    const struct gen_model *m = &p->model;
    int at = 0;

    p->vec_attn_norm = at, at += m->D;
    p->vec_mlp_norm = at, at += m->D;
    p->vec_q_norm = at, at += m->qk_norm ? m->E : 0;
    p->vec_k_norm = at, at += m->qk_norm ? m->E : 0;
    p->vec_bias = at, at += m->qkv_bias ? (m->H + 2 * m->K) * m->E : 0;
    p->vec_layer = at;
    p->vec_norm = (int64_t) at * m->L;
    p->vec_floats = p->vec_norm + m->D;
    p->kv_head = 2 * align_up(p->context, p->kv_tile) * m->E;
    p->kv_layer = p->kv_head * m->K;
    p->kv_bytes = p->kv_layer * m->L * 2;
}

static void plan_hops(struct gen_plan *p)
{
    const struct gen_model *m = &p->model;
    const int64_t groups = p->groups, q_heads = p->most_heads * (m->H / m->K), inner = !p->cluster;
    const int64_t sums = groups * p->pairs * 6;
    const int64_t words[GEN_HOPS] = {
        [GEN_HOP_QKV] = inner * groups * p->most_heads * head_blocks(m) * 3,
        /* behind a head its maximum and sum */
        [GEN_HOP_PART] = inner * groups * p->group * q_heads * (m->E / 8 * 3 + 1),
        [GEN_HOP_MLP] = inner * groups * p->most_units * 4 * 3,
        /* after O, after DOWN: rows, and a sum of squares of each warp */
        [GEN_HOP_X] = inner * 2 * groups * (p->pairs * 6 + p->group * p->warps),
        [GEN_HOP_TEAM] =
            m->K * (p->team - 1) * (m->H / m->K) * (m->E / 2), /* of a helper two values each */
        [GEN_HOP_O] = sums,
        [GEN_HOP_DOWN] = sums,
        [GEN_HOP_BEST] = p->ctas,
        [GEN_HOP_COUNT] = p->ctas * 16,
    };
    int64_t at = 0;

    for (int i = 0; i < GEN_HOPS; i++) {
        /* A sampler's round follows the last at once; sums are read until those of the next layer
           are there. */
        p->hop_buffers[i] = i == GEN_HOP_COUNT || i == GEN_HOP_O || i == GEN_HOP_DOWN ? 2 : 1;
        p->hop_offset[i] = (int) at;
        p->hop_words[i] = (int) words[i] * p->hop_buffers[i];
        at += align_up(words[i] * p->hop_buffers[i], 8); /* a hop begins on its own 128 bytes */
        if (at > MOST_WORDS)
            at = MOST_WORDS + 1; /* check_counts refuses it */
    }
    p->exchange_words = (int) at;
}

/* ---- Shared memory ------------------------------------------------------- */

/* All but the ring (templates/shared.cu.m4). */
static int fixed_smem(const struct gen_plan *p)
{
    const struct gen_model *m = &p->model;
    const int ratio = m->H / m->K, q_heads = p->most_heads * ratio, e = m->E;
    const int x = (p->cluster ? 2 : 1) * ceil_div(m->D, 32) * 64, y = q_heads * e * 2, act = p->most_units * 64;
    const int q = y + p->most_heads * 2 * e * 2, qkv = p->most_heads * (ratio + 2) * e * 4;
    const int part = p->cluster ? p->group * q_heads * (e + 4) * 4 : 0;
    const int out = (p->warps * (e + 2) + 1) * ratio * 4;
    const int resid = p->rank_pairs * 16 * 4, sums = 2 * p->round_blocks * 8 * p->warps * 4;
    const int squares = 2 * p->group * p->warps * 16;
    const int best = p->warps * (4 + 16) + 320 + 5 * 8; /* sum, best, hist; mbarriers of hops */

    return x + y + act + q + qkv + part + out + resid + sums + squares + best +
           1024; /* args, flags, alignment */
}

/* Stages of the wide tile; two of attention's, which takes up to four; two of the tiles for few
   tokens, which have 16 KiB each (templates/prefill.cu.m4). */
static int prefill_smem(const struct gen_plan *p)
{
    int gemm = p->gemm_stages * (p->gemm_m + p->gemm_n) * p->gemm_k * 2;
    int flash = 2 * p->flash_n * p->model.E * 4;

    return max_int(max_int(gemm, flash), 2 * 16384) + 1024;
}

/* Ring stages that fit beside the rest, 0 if not even one. */
static int stages_that_fit(const struct gen_plan *p)
{
    int room = p->gpu.smem_block - fixed_smem(p);

    return room < 0 ? 0 : room / (p->stage_bytes + 16);
}

/* ---- Choices ------------------------------------------------------------- */

/* Make the first choice of prefill smaller that the caller has not made and that can be.
   Returns 0 when there is none. */
static int shrink_prefill(struct gen_plan *p, unsigned long set)
{
    const struct {
        size_t offset;
        int least, step;
    } choices[] = {
        {AT(gemm_stages), 2, 1}, {AT(flash_n), 32, 32}, {AT(gemm_k), 32, 32},
        {AT(gemm_m), 64, 64},    {AT(gemm_n), 64, 64},
    };

    for (size_t i = 0; i < sizeof choices / sizeof *choices; i++) {
        int *choice = (int *) ((char *) p + choices[i].offset);
        if (!gen_keys_has(set, choices[i].offset) && *choice > choices[i].least) {
            *choice -= choices[i].step;
            return 1;
        }
    }
    return 0;
}

static void choose_prefill(struct gen_plan *p, unsigned long set)
{
    const int small = p->gpu.smem_block < 90000;

    if (!gen_keys_has(set, AT(prefill_ctas)))
        p->prefill_ctas = gen_keys_has(set, AT(ctas)) ? p->ctas : p->gpu.sms;
    if (!gen_keys_has(set, AT(prefill_tokens)))
        p->prefill_tokens = min_int(2048, (int) align_up(p->context, 16));
    if (!gen_keys_has(set, AT(gemm_m)))
        p->gemm_m = small ? 64 : 128;
    if (!gen_keys_has(set, AT(gemm_n)))
        p->gemm_n = 128;
    if (!gen_keys_has(set, AT(gemm_k)))
        p->gemm_k = small ? 32 : 64;
    if (!gen_keys_has(set, AT(gemm_stages))) /* sm_75 copies at once: a third stage gains nothing */
        p->gemm_stages = p->family == 75 ? 2 : 4;
    if (!gen_keys_has(set, AT(flash_m)))
        p->flash_m = 128;
    if (!gen_keys_has(set, AT(flash_n)))
        p->flash_n = 64;
    p->most_stages = p->family == 75 ? 2 : 8;
    while (prefill_smem(p) > p->gpu.smem_block && shrink_prefill(p, set))
        ;
}

/* Clusters of a group's size that fit at once; 0: no cluster has that size. */
static int clusters_that_fit(const struct gen_plan *p)
{
    for (int i = 1; i < 5; i++)
        if (p->group == 1 << i)
            return p->gpu.clusters[i];
    return 0;
}

/* A group more would have nothing to do. */
static int most_groups(const struct gen_plan *p)
{
    return p->model.K + model_units(&p->model);
}

/* A power of two; two groups at least where there are SMs for them. */
static int choose_group(const struct gen_plan *p, int ctas_set)
{
    const int pairs = model_pairs(&p->model);
    const int most = min_int(GROUP, min_int(pairs, max_int(1, p->gpu.sms / 2)));
    int group = 1;

    while (group * 2 <= most && (!ctas_set || p->ctas % (group * 2) == 0))
        group *= 2;
    if (ctas_set && p->ctas / group > most_groups(p))
        for (group = min_int(GEN_MOST_GROUP, min_int(pairs, p->ctas)); p->ctas % group; group--)
            ;
    return group;
}

/* GPUs of data centres, and emulated ones; others have clusters too, but little else of them. */
static int choose_cluster(const struct gen_plan *p, int ctas_set)
{
    const int arch = p->gpu.arch, fit = clusters_that_fit(p);
    const int has = p->gpu.host ? arch >= 90 : arch == 90 || arch == 100 || arch == 103;

    return has && fit && (!ctas_set || p->ctas <= fit * p->group);
}

static void choose_groups(struct gen_plan *p, unsigned long set)
{
    const int ctas_set = gen_keys_has(set, AT(ctas));

    if (!gen_keys_has(set, AT(group)))
        p->group = choose_group(p, ctas_set);
    if (!gen_keys_has(set, AT(cluster)))
        p->cluster = choose_cluster(p, ctas_set);
    if (!ctas_set) {
        const int groups = p->cluster ? clusters_that_fit(p) : p->gpu.sms / p->group;
        p->ctas = max_int(1, min_int(groups, most_groups(p))) * p->group;
    }
    if (!gen_keys_has(set, AT(balance)))
        p->balance = 0;
}

/* A KV tile of 16 positions and a unit of a set's pairs travel in one chunk: shorter ones do not
   make the stage shorter. */
static int least_chunk(const struct gen_plan *p)
{
    const int rank_pairs = ceil_div(model_pairs(&p->model), p->group);

    return max_int(64 * p->model.E, ceil_div(rank_pairs, ceil_div(rank_pairs, p->warps)) * 1024);
}

/* A block in equal parts, none shorter than a KV tile: stages would not be full. */
static int long_chunk(const struct gen_plan *p)
{
    const int units = ceil_div(p->model.D, 32), block = units * 512;
    const int parts = block < LONG_BLOCK ? block / CHUNK : ceil_div(block, LONG_BLOCK);

    return max_int(CHUNK, ceil_div(units, max_int(1, parts)) * 512);
}

/* As few as need no more turns than MOST, of a block's units and of a rank's pairs: they meet the sooner.  (Tiles of
   64 positions keep 4 or 8 busy: in a long context Qwen2.5-0.5B would be 2 % faster with 8 than with 7.) */
static int choose_warps(const struct gen_plan *p, int most)
{
    const int units = ceil_div(p->model.D, 32);
    int warps = most;

    while (warps > 4 && ceil_div(units, warps - 1) == ceil_div(units, most) &&
           ceil_div(p->rank_pairs, warps - 1) == ceil_div(p->rank_pairs, most))
        warps--;
    return warps;
}

static void choose_decode(struct gen_plan *p, unsigned long set)
{
    const int smem = p->gpu.smem_block;

    if (!gen_keys_has(set, AT(warps)))
        p->warps = choose_warps(p, 8);
    if (!gen_keys_has(set, AT(chunk_bytes)))
        p->chunk_bytes = max_int(least_chunk(p), smem >= 160000  ? long_chunk(p)
                                                 : smem >= 90000 ? CHUNK / 2
                                                                 : CHUNK / 4);
    if (!gen_keys_has(set, AT(round_blocks)))
        p->round_blocks = 10;
    if (!gen_keys_has(set, AT(dtype)))
        p->dtype = p->family == 75 || p->model.dtype == GEN_FP16 ? GEN_FP16 : GEN_BF16;
}

static void plan_sizes(struct gen_plan *p)
{
    plan_phases(p);
    plan_streams(p);
    plan_vectors(p);
    plan_hops(p);
}

/* As shrink_prefill. */
static int shrink_decode(struct gen_plan *p, unsigned long set)
{
    if (!gen_keys_has(set, AT(chunk_bytes)) && p->chunk_bytes / 2 >= max_int(4096, least_chunk(p)))
        p->chunk_bytes /= 2;
    else if (!gen_keys_has(set, AT(warps)) && p->warps > 4)
        p->warps = 4;
    else if (!gen_keys_has(set, AT(round_blocks)) && p->round_blocks > 2)
        p->round_blocks = max_int(2, p->round_blocks / 4 * 2);
    else if (stages_that_fit(p) < 2 && !gen_keys_has(set, AT(group)) && !p->cluster &&
             p->group % 2 == 0 && p->group > 2 && p->groups * 2 <= most_groups(p))
        p->group /= 2, plan_groups(p); /* each has a smaller part of the MLP product */
    else
        return 0;
    return 1;
}

static void choose_ring(struct gen_plan *p, unsigned long set)
{
    while (plan_sizes(p), stages_that_fit(p) < FEW_STAGES && shrink_decode(p, set))
        ;
    if (!gen_keys_has(
            set,
            AT(team_from))) /* twice a tile for each CTA: before, a hop more costs as much as it gains */
        p->team_from = p->team > 1 ? 2 * p->team * p->group * p->kv_tile : 0;
    if (p->team_from == 0 || p->team_from >= p->context)
        p->team = 1, plan_hops(p);
    if (!gen_keys_has(set, AT(stages))) {
        const int chunks = (int) min_int64(16, token_chunks(p, 0)); /* see check_ring */
        p->stages = max_int(2, min_int(chunks, stages_that_fit(p)));
    }
    plan_batch(p);
    if (!gen_keys_has(set, AT(inflight)))
        p->inflight =
            max_int(1, min_int(p->stages, (INFLIGHT_BYTES + p->stage_bytes / 2) / p->stage_bytes));
    if (!gen_keys_has(set, AT(inflight_heads))) { /* few groups have as many in flight as otherwise all */
        const int heads = min_int(p->groups, p->model.K), few = heads * 2 < p->groups;
        p->inflight_heads = few ? min_int(p->stages, p->inflight * p->groups / heads) : p->inflight;
    }
    if (!gen_keys_has(set, AT(inflight_hop)))
        p->inflight_hop = max_int(1, min_int(p->inflight, INFLIGHT_HOP_BYTES / p->stage_bytes));
    if (!gen_keys_has(set, AT(early))) /* so few warps have registers for both, and for the words of so many groups */
        p->early = p->warps <= 6 && p->groups <= 30 && has_early(p);
    if (!gen_keys_has(set, AT(tokens_per_launch))) { /* a token takes about twice its floor, and hops */
        const double kv_us = p->floor_us * (double) p->kv_bytes / (double) p->token_bytes;
        p->tokens_per_launch =
            max_int(1, min_int(64, (int) (LAUNCH_US / (2 * (p->floor_us + kv_us) + 500))));
    }
    p->block_threads = p->warps * 32 + 64;
    p->smem_bytes = fixed_smem(p) + p->stages * (p->stage_bytes + 16);
    p->prefill_smem_bytes = prefill_smem(p);
}

/* Before anything is derived from these. */
static int check_groups(const struct gen_plan *p, struct mk_err *err)
{
    const struct gen_model *m = &p->model;
    const int fit = clusters_that_fit(p);

    if (p->ctas > p->gpu.sms || p->prefill_ctas > p->gpu.sms)
        return gen_fail(err, MK_EINVAL, "plan: ctas is %d and prefill_ctas %d; %s has %d SMs", p->ctas,
                        p->prefill_ctas, p->gpu.name, p->gpu.sms);
    if (p->ctas % p->group)
        return gen_fail(err, MK_EINVAL, "plan: ctas is %d; it must be a multiple of group, %d",
                        p->ctas, p->group);
    if (p->group > model_pairs(m))
        return gen_fail(err, MK_EINVAL, "plan: group is %d; hidden_size %d allows %d", p->group,
                        m->D, model_pairs(m));
    if (p->cluster && p->gpu.arch < 90)
        return gen_fail(err, MK_EINVAL, "plan: cluster is cluster; sm_%d has l2 only", p->gpu.arch);
    if (p->cluster && (p->group < 2 || p->group & (p->group - 1)))
        return gen_fail(err, MK_EINVAL,
                        "plan: group is %d; a cluster has 2, 4, 8 or 16 CTAs (cluster=l2 takes "
                        "any)",
                        p->group);
    if (p->cluster && p->ctas > fit * p->group)
        return gen_fail(err, MK_EINVAL,
                        "plan: ctas is %d; %s holds %d clusters of group %d at once%s", p->ctas,
                        p->gpu.name, fit, p->group, fit ? "" : " (cluster=l2 needs none)");
    if (p->ctas / p->group > most_groups(p))
        return gen_fail(err, MK_EINVAL,
                        "plan: ctas is %d and group %d; %d KV heads and %d times 32 of "
                        "intermediate_size are work for %d groups at most",
                        p->ctas, p->group, m->K, model_units(m), most_groups(p));
    return 0;
}

/* A row of the KV cache is written before its tile is copied for the next token: the tile's chunk
   is a token behind the weights that the row was made with, and a ring is less than that ahead. */
static int check_ring(const struct gen_plan *p, struct mk_err *err)
{
    const int64_t chunks = token_chunks(p, 0);

    if (p->stages <= chunks)
        return 0;
    return gen_fail(err, MK_EINVAL,
                    "plan: stages is %d; a CTA has only %lld chunks of weights in a token",
                    p->stages, (long long) chunks);
}

static int check_choices(const struct gen_plan *p, struct mk_err *err)
{
    if (p->round_blocks % 2 || p->prefill_tokens % 16)
        return gen_fail(err, MK_EINVAL,
                        "plan: round_blocks is %d and prefill_tokens %d; they must be "
                        "multiples of 2 and 16",
                        p->round_blocks, p->prefill_tokens);
    if (p->gemm_m % 64 || p->gemm_n % 64 || p->gemm_k % 32 || p->flash_n % 32)
        return gen_fail(err, MK_EINVAL,
                        "plan: gemm_m and gemm_n must be 64 or 128, gemm_k and flash_n 32 or 64");
    if (p->family == 75 && p->dtype != GEN_FP16)
        return gen_fail(err, MK_EINVAL, "plan: dtype is bf16; sm_75 has fp16 only");
    if (p->inflight > p->stages || p->inflight_heads > p->stages || p->inflight_hop > p->inflight)
        return gen_fail(err, MK_EINVAL,
                        "plan: inflight is %d, inflight_heads %d and inflight_hop %d; they must not exceed "
                        "stages %d, stages and inflight",
                        p->inflight, p->inflight_heads, p->inflight_hop, p->stages);
    if (p->early && !p->cluster)
        return gen_fail(err, MK_EINVAL, "plan: early is sums; only groups that are clusters have registers for that");
    if (p->early && !has_early(p))
        return gen_fail(err, MK_EINVAL,
                        "plan: early is sums; that needs chunks as long as a block, %d bytes, and chunk_bytes is %d",
                        p->phase[GEN_HEAD].units * 512, p->chunk_bytes);
    if (p->team_from && most_team(p) == 1)
        return gen_fail(
            err, MK_EINVAL,
            "plan: team_from is %d; only groups that are clusters help, and only when there are twice as "
            "many as KV heads: here %d and %d",
            p->team_from, p->groups, p->model.K);
    if (p->team > 1 && p->team_from / p->kv_tile + 1 < p->team * p->group)
        return gen_fail(
            err, MK_EINVAL,
            "plan: team_from is %d; %d CTAs that share tiles of %d positions have one each from %d on",
            p->team_from, p->team * p->group, p->kv_tile, (p->team * p->group - 1) * p->kv_tile);
    if (p->fault && p->ctas < 2)
        return gen_fail(err, MK_EINVAL,
                        "plan: fault needs 2 ctas: one that hangs and one that reports it");
    return 0;
}

/* What the templates count in 32 bits. */
static int check_counts(const struct gen_plan *p, struct mk_err *err)
{
    const struct gen_phase *head = &p->phase[GEN_HEAD];
    const int tiles = ceil_div(ceil_div(p->context, p->kv_tile), p->group);
    const int64_t chunks = token_chunks(p, 1) + (int64_t) p->model.L * p->most_heads * tiles;

    if (most_layer_bytes(p) > MOST_BYTES || p->layers_offset > INT_MAX)
        return gen_fail(err, MK_EUNSUPPORTED,
                        "plan: a layer has %lld bytes in the stream of each of %d CTAs "
                        "and the head %lld; at most %d and %d are supported",
                        (long long) most_layer_bytes(p), p->ctas, (long long) p->layers_offset,
                        MOST_BYTES, INT_MAX);
    if (p->exchange_words > MOST_WORDS)
        return gen_fail(err, MK_EUNSUPPORTED,
                        "plan: the hops of ctas %d in groups of %d have more than %d words",
                        p->ctas, p->group, MOST_WORDS);
    if (chunks * p->tokens_per_launch > MOST_CHUNKS)
        return gen_fail(err, MK_EINVAL,
                        "plan: %d tokens of %lld chunks each are too many for a launch; "
                        "make tokens_per_launch smaller or chunk_bytes larger",
                        p->tokens_per_launch, (long long) chunks);
    if (head->cta_blocks > MOST_LOGITS / 8)
        return gen_fail(err, MK_EUNSUPPORTED,
                        "plan: each of %d CTAs has %d logits; at most %d are "
                        "supported",
                        p->ctas, head->cta_blocks * 8, MOST_LOGITS);
    if (p->kv_head / 2 > MOST_HEAD_ELEMS)
        return gen_fail(err, MK_EUNSUPPORTED,
                        "plan: context is %d; with head_dim %d at most %d tokens "
                        "are supported",
                        p->context, p->model.E, MOST_HEAD_ELEMS / p->model.E);
    if ((int64_t) p->prefill_tokens * p->pf_x_cols * 2 > MOST_BYTES)
        return gen_fail(err, MK_EINVAL,
                        "plan: prefill_tokens is %d; with %d columns at most %d are supported",
                        p->prefill_tokens, p->pf_x_cols, MOST_BYTES / (p->pf_x_cols * 2) / 16 * 16);
    return 0;
}

static int check_plan(const struct gen_plan *p, struct mk_err *err)
{
    int rc = check_choices(p, err);

    if (rc == 0)
        rc = check_ring(p, err);
    if (rc == 0)
        rc = check_counts(p, err);
    if (rc)
        return rc;
    if (p->smem_bytes > p->gpu.smem_block)
        return gen_fail(err, MK_EINVAL,
                        "plan: decode needs %d bytes of shared memory, %d of them beside the ring, "
                        "and a block of %s has %d; %d stages of %d bytes would fit",
                        p->smem_bytes, fixed_smem(p), p->gpu.name, p->gpu.smem_block,
                        stages_that_fit(p), p->stage_bytes);
    if (p->prefill_smem_bytes > p->gpu.smem_block)
        return gen_fail(err, MK_EINVAL,
                        "plan: prefill needs %d bytes of shared memory and a block of %s has %d; "
                        "make gemm_stages or flash_n smaller",
                        p->prefill_smem_bytes, p->gpu.name, p->gpu.smem_block);
    return 0;
}

static void plan_prefill(struct gen_plan *p)
{
    const struct gen_model *m = &p->model;
    const int64_t t = p->prefill_tokens;
    const int qkv = (m->H + 2 * m->K) * m->E;

    p->pf_x_cols = 0;
    for (int i = 0; i < GEN_HEAD; i++)
        p->pf_x_cols = max_int(p->pf_x_cols, p->phase[i].units * 32);
    p->pf_resid = 0;
    p->pf_x = align_up(t * m->D * 4, 1024);
    p->pf_qkv = p->pf_x + align_up(2 * t * p->pf_x_cols * 2, 1024);
    p->pf_bytes = p->pf_qkv + align_up(t * qkv * 4, 1024);
}

int gen_plan_make(const struct gen_model *m, const struct gen_gpu *g, int context,
                  const char *plan_file, const char *const *set_list, struct gen_plan *out,
                  struct mk_err *err)
{
    unsigned long set = 0;
    int rc;

    memset(out, 0, sizeof *out);
    out->model = *m;
    out->gpu = *g;
    out->epoch0 = 1;
    if (context < 0 || context > m->max_context)
        return gen_fail(err, MK_EINVAL, "context is %d; %s takes 1..%d tokens", context, m->name,
                        m->max_context);
    out->context = context ? context : min_int(4096, m->max_context);
    out->family = g->arch >= 90 ? 90 : g->arch >= 80 ? 80 : 75;
    rc = gen_keys_read(out, plan_file, set_list, &set, err);
    if (rc)
        return rc;
    choose_groups(out, set);
    rc = check_groups(out, err);
    if (rc)
        return rc;
    plan_groups(out);
    choose_decode(out, set);
    choose_prefill(out, set);
    choose_ring(out, set);
    plan_prefill(out);
    rc = check_plan(out, err);
    return rc ? rc : gen_plan_check(out, err);
}
