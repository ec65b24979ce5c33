/* params.c - what a plan looks like in text: params.m4 for the templates, and the dump and the
   summary for people. */
#include "config.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "gen/gen.h"
#include "runtime/abi.h"

/* QKV, PART, X, MLP, X inside a group; O and DOWN between groups. */
enum { LAYER_HOPS = 7 };

static const char *const phase_names[GEN_PHASES] = {"QKV", "O", "MLP", "DOWN", "HEAD"};
static const char *const hop_names[GEN_HOPS] = {"QKV", "PART", "MLP",  "X",    "TEAM",
                                                "O",   "DOWN", "BEST", "COUNT"};

static void put_int(FILE *f, const char *name, long long value)
{
    fprintf(f, "m4_define({|%s|}, {|%lld|})m4_dnl\n", name, value);
}

static void put_float(FILE *f, const char *name, double value)
{
    char text[40];

    snprintf(text, sizeof text, "%.9g", (double) (float) value);
    for (char *c = text;; c++) {
        if (*c == '.' || *c == 'e')
            break;
        if (!*c) {
            c[0] = '.', c[1] = '0', c[2] = 0;
            break;
        }
    }
    fprintf(f, "m4_define({|%s|}, {|%sf|})m4_dnl\n", name, text);
}

static void put_model(FILE *f, const struct gen_plan *p)
{
    const struct gen_model *m = &p->model;

    fprintf(f, "m4_define({|MODEL_NAME|}, {|{|%s|}|})m4_dnl\n", m->name); /* text, never a macro */
    put_int(f, "MODEL_D", m->D);
    put_int(f, "MODEL_H", m->H);
    put_int(f, "MODEL_K", m->K);
    put_int(f, "MODEL_E", m->E);
    put_int(f, "MODEL_F", m->F);
    put_int(f, "MODEL_V", m->V);
    put_int(f, "MODEL_L", m->L);
    put_float(f, "MODEL_EPS", m->eps);
    put_int(f, "MODEL_TIED", m->tied);
    put_int(f, "MODEL_QK_NORM", m->qk_norm);
    put_int(f, "MODEL_QKV_BIAS", m->qkv_bias);
    put_int(f, "GPU_ARCH", p->gpu.arch);
    put_int(f, "PLAN_HOST", p->gpu.host);
}

static void put_choices(FILE *f, const struct gen_plan *p)
{
    fprintf(f, "m4_define({|PLAN_GENERATOR|}, {|%s|})m4_dnl\n", GEN_VERSION);
    put_int(f, "PLAN_FAMILY", p->family);
    put_int(f, "PLAN_FP16", p->dtype == GEN_FP16);
    put_int(f, "PLAN_CONTEXT", p->context);
    put_int(f, "PLAN_CTAS", p->ctas);
    put_int(f, "PLAN_PREFILL_CTAS", p->prefill_ctas);
    put_int(f, "PLAN_GROUP", p->group);
    put_int(f, "PLAN_CLUSTER", p->cluster ? p->group : 1); /* CTAs that share their memory */
    put_int(f, "PLAN_WARPS", p->warps);
    put_int(f, "PLAN_THREADS", p->warps * 32);
    put_int(f, "PLAN_BLOCK_THREADS", p->block_threads);
    put_int(f, "PLAN_STAGES", p->stages);
    put_int(f, "PLAN_STAGE_BYTES", p->stage_bytes);
    put_int(f, "PLAN_INFLIGHT", p->inflight);
    put_int(f, "PLAN_INFLIGHT_HEADS", p->inflight_heads);
    put_int(f, "PLAN_INFLIGHT_HOP", p->inflight_hop);
    put_int(f, "PLAN_TEAM", p->team);
    put_int(f, "PLAN_TEAM_FROM", p->team_from);
    put_int(f, "PLAN_ROUND_BLOCKS", p->round_blocks);
    put_int(f, "PLAN_KV_TILE", p->kv_tile);
    put_int(f, "PLAN_EARLY", p->early);
    put_int(f, "PLAN_UNROLL", p->unroll_layers);
    put_int(f, "PLAN_FAULT", p->fault);
    put_int(f, "PLAN_TIMING", p->timing);
    put_float(f, "PLAN_SOFTMAX_SCALE", M_LOG2E / sqrt(p->model.E));
    put_float(f, "PLAN_MLP_SCALE", p->dtype == GEN_FP16 ? 0.0625 : 1.0);
    put_int(f, "PLAN_TOKEN_BYTES", p->token_bytes);
    put_int(f, "PLAN_HOPS", LAYER_HOPS * p->model.L + 1);
    put_int(f, "PLAN_TOKEN_TAGS", MK_TOKEN_TAGS(p->model.L));
    put_int(f, "PLAN_SMEM_BYTES", p->smem_bytes);
    put_int(f, "PLAN_PREFILL_TOKENS", p->prefill_tokens);
    put_int(f, "PLAN_PREFILL_SMEM_BYTES", p->prefill_smem_bytes);
    put_int(f, "PLAN_MOST_STAGES", p->most_stages);
    put_int(f, "PLAN_GEMM_M", p->gemm_m);
    put_int(f, "PLAN_GEMM_N", p->gemm_n);
    put_int(f, "PLAN_GEMM_K", p->gemm_k);
    put_int(f, "PLAN_GEMM_STAGES", p->gemm_stages);
    put_int(f, "PLAN_FLASH_M", p->flash_m);
    put_int(f, "PLAN_FLASH_N", p->flash_n);
    put_int(f, "PLAN_PF_RESID", p->pf_resid);
    put_int(f, "PLAN_PF_X", p->pf_x);
    put_int(f, "PLAN_PF_QKV", p->pf_qkv);
    put_int(f, "PLAN_PF_X_COLS", p->pf_x_cols);
}

static void put_groups(FILE *f, const struct gen_plan *p)
{
    char name[64];

    put_int(f, "PLAN_PAIRS", p->pairs);
    put_int(f, "PLAN_RANK_PAIRS", p->rank_pairs);
    put_int(f, "PLAN_BATCH_PAIRS", p->batch.pairs);
    put_int(f, "PLAN_BATCH_EARLY", p->batch.early);
    put_int(f, "PLAN_BATCH_SPANS", p->batch.spans);
    put_int(f, "PLAN_BATCH_COLUMNS", p->batch.columns);
    put_int(f, "PLAN_SETS", p->sets);
    put_int(f, "PLAN_SET_PAIRS", p->set_pairs);
    put_int(f, "PLAN_MOST_HEADS", p->most_heads);
    put_int(f, "PLAN_MOST_UNITS", p->most_units);
    put_int(f, "PLAN_CLASSES", p->n_classes);
    for (int i = 0; i < p->n_classes; i++) {
        const struct gen_class *c = &p->cls[i];
        snprintf(name, sizeof name, "PLAN_CLASS_FIRST_%d", i);
        put_int(f, name, c->first);
        snprintf(name, sizeof name, "PLAN_CLASS_UNIT_%d", i);
        put_int(f, name, c->unit0);
        snprintf(name, sizeof name, "PLAN_CLASS_UNITS_%d", i);
        put_int(f, name, c->units ? c->units : 1); /* a divisor */
        fprintf(f, "m4_define({|PLAN_CLASS_SHARE_%d|}, {|%d, %d, %d, %d, ", i, c->head0, c->heads,
                c->unit0, c->units);
        fprintf(f, "%lld, %lld, %lld, %lld|})m4_dnl\n", (long long) c->o, (long long) c->mlp,
                (long long) c->down, (long long) c->layer_bytes);
    }
}

static void put_layout(FILE *f, const struct gen_plan *p)
{
    char name[64];

    for (int i = 0; i < GEN_PHASES; i++) {
        const struct gen_phase *ph = &p->phase[i];
        fprintf(f, "m4_define({|PLAN_%s|}, {|%d, %d, %d, %d, %d, %d|})m4_dnl\n", phase_names[i],
                ph->rows, ph->units, ph->blocks, ph->step, ph->spans, ph->span_units);
    }
    put_int(f, "PLAN_LAYERS_OFFSET", p->layers_offset);
    put_int(f, "PLAN_CTA_BYTES", p->cta_bytes);
    put_int(f, "PLAN_VEC_ATTN_NORM", p->vec_attn_norm);
    put_int(f, "PLAN_VEC_MLP_NORM", p->vec_mlp_norm);
    put_int(f, "PLAN_VEC_Q_NORM", p->vec_q_norm);
    put_int(f, "PLAN_VEC_K_NORM", p->vec_k_norm);
    put_int(f, "PLAN_VEC_BIAS", p->vec_bias);
    put_int(f, "PLAN_VEC_LAYER", p->vec_layer);
    put_int(f, "PLAN_VEC_NORM", p->vec_norm);
    put_int(f, "PLAN_KV_LAYER", p->kv_layer);
    put_int(f, "PLAN_KV_HEAD", p->kv_head);
    for (int i = 0; i < GEN_HOPS; i++) {
        snprintf(name, sizeof name, "PLAN_HOP_%s", hop_names[i]);
        put_int(f, name, p->hop_offset[i]);
    }
}

/* Offsets of every layer: m4's own arithmetic has 32 bits. */
static void put_layer(FILE *f, const struct gen_plan *p, int layer)
{
    const int64_t vec = (int64_t) layer * p->vec_layer;
    const int64_t next =
        layer + 1 < p->model.L ? vec + p->vec_layer + p->vec_attn_norm : p->vec_norm;
    char name[64];

    const struct {
        const char *name;
        int64_t at;
    } vectors[] = {
        {"START", vec},
        {"ATTN_NORM", vec + p->vec_attn_norm},
        {"MLP_NORM", vec + p->vec_mlp_norm},
        {"BIAS", vec + p->vec_bias},
        {"NEXT_NORM", next},
    };
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++) {
        snprintf(name, sizeof name, "PLAN_VEC_AT_%s_%d", vectors[i].name, layer);
        put_int(f, name, vectors[i].at);
    }
    snprintf(name, sizeof name, "PLAN_KV_AT_%d", layer);
    put_int(f, name, layer * p->kv_layer);
}

/* "u32 *" needs no blank before the name, "u32" one. */
#define PRINT_FIELD(c, cu, name, remark)                                                           \
    fprintf(f, "    %s%s%s; // %s\n", #cu, #cu[sizeof #cu - 2] == '*' ? "" : " ", #name, remark);
#define PRINT_CHECK(c, cu, name, remark)                                                           \
    fprintf(f, "static_assert(OFFSET(%s, " #name ") == %zu, \"layout\");\n", type,                 \
            offsetof(struct CHECKED, name));

static void put_abi(FILE *f)
{
    const char *type = "mk_args";

    fprintf(f, "m4_define({|ABI_STOPS|}, {|%d|})m4_dnl\nm4_define({|ABI_ARGS|}, {|m4_dnl\n",
            MK_STOPS);
    MK_ARGS(PRINT_FIELD)
    fprintf(f, "m4_dnl\n|})m4_dnl\nm4_define({|ABI_ARGS_CHECKS|}, {|m4_dnl\n");
#define CHECKED mk_args
    MK_ARGS(PRINT_CHECK)
#undef CHECKED
    fprintf(f, "static_assert(sizeof(mk_args) == %zu, \"layout\");\nm4_dnl\n|})m4_dnl\n",
            sizeof(struct mk_args));
#define PRINT_LAP(name) fprintf(f, "LAP_" #name ", ");
    fprintf(f, "m4_define({|ABI_LAPS|}, {|");
    MK_LAPS(PRINT_LAP)
    fprintf(f, "|})m4_dnl\n");
    fprintf(f, "m4_define({|ABI_PACK_ARGS|}, {|m4_dnl\n");
    MK_PACK_ARGS(PRINT_FIELD)
    fprintf(f, "m4_dnl\n|})m4_dnl\nm4_define({|ABI_PACK_ARGS_CHECKS|}, {|m4_dnl\n");
    type = "mk_pack_args";
#define CHECKED mk_pack_args
    MK_PACK_ARGS(PRINT_CHECK)
#undef CHECKED
    fprintf(f, "static_assert(sizeof(mk_pack_args) == %zu, \"layout\");\nm4_dnl\n|})m4_dnl\n",
            sizeof(struct mk_pack_args));
}

char *gen_plan_params(const struct gen_plan *p)
{
    char *text = NULL;
    size_t size;
    FILE *f = open_memstream(&text, &size);

    if (!f)
        return NULL;
    put_model(f, p);
    put_choices(f, p);
    put_groups(f, p);
    put_layout(f, p);
    put_abi(f);
    for (int i = 0; i < p->model.L; i++)
        put_layer(f, p, i);
    if (fclose(f)) {
        free(text);
        return NULL;
    }
    return text;
}

char *gen_plan_summary(const struct gen_plan *p)
{
    const struct gen_model *m = &p->model;
    char *text = NULL;
    size_t size;
    FILE *f = open_memstream(&text, &size);

    if (!f)
        return NULL;
    fprintf(f, "%s: %d layers, hidden %d, %d heads over %d KV heads of %d, FFN %d, vocabulary %d\n",
            m->name, m->L, m->D, m->H, m->K, m->E, m->F, m->V);
    fprintf(f,
            "%s (sm_%d): %d CTAs in %d groups of %d (%s)\n"
            "a CTA: %d warps, ring of %d x %d bytes, %d bytes of shared memory\n",
            p->gpu.name, p->gpu.arch, p->ctas, p->groups, p->group,
            p->cluster ? "clusters" : "through L2", p->warps, p->stages, p->stage_bytes,
            p->smem_bytes);
    fprintf(f,
            "a token: %.3f GB of weights, %d hops a layer, floor %.0f us = %.0f tok/s at %d GB/s\n",
            p->token_bytes / 1e9, LAYER_HOPS, p->floor_us,
            p->floor_us > 0 ? 1e6 / p->floor_us : 0.0, p->gpu.mem_gbps);
    fprintf(f, "context %d: %.3f GB of KV cache\n", p->context, p->kv_bytes / 1e9);
    if (fclose(f)) {
        free(text);
        return NULL;
    }
    return text;
}

static void dump_choices(FILE *f, const struct gen_plan *p)
{
    static const char *const unroll[] = {"list", "loop", "inline"};

    fprintf(f, "[choices]\n");
    fprintf(f, "ctas = %d\ngroup = %d\ncluster = %s\nbalance = %d\nwarps = %d\n", p->ctas, p->group,
            p->cluster ? "cluster" : "l2", p->balance, p->warps);
    fprintf(f, "chunk_bytes = %d\nstages = %d\n", p->chunk_bytes, p->stages);
    fprintf(f, "inflight = %d\ninflight_heads = %d\ninflight_hop = %d\nteam_from = %d\n",
            p->inflight, p->inflight_heads, p->inflight_hop, p->team_from);
    fprintf(f, "early = %s\nround_blocks = %d\ntokens_per_launch = %d\n", p->early ? "sums" : "x",
            p->round_blocks, p->tokens_per_launch);
    fprintf(f, "prefill_ctas = %d\nprefill_tokens = %d\n", p->prefill_ctas, p->prefill_tokens);
    fprintf(f, "gemm_m = %d\ngemm_n = %d\ngemm_k = %d\ngemm_stages = %d\n", p->gemm_m, p->gemm_n,
            p->gemm_k, p->gemm_stages);
    fprintf(f, "flash_m = %d\nflash_n = %d\nunroll_layers = %s\ndtype = %s\nfault = %s\n",
            p->flash_m, p->flash_n, unroll[p->unroll_layers],
            p->dtype == GEN_FP16 ? "fp16" : "bf16", p->fault ? "hang" : "none");
    fprintf(f, "epoch0 = %u\ntiming = %s\n", p->epoch0, p->timing ? "on" : "off");
}

/* What the groups have, and bytes of a layer in the stream of the busiest rank. */
static void dump_groups(FILE *f, const struct gen_plan *p)
{
    fprintf(f, "\n[groups]\n%6s %6s %6s %6s %6s %6s %10s %10s %10s %10s %10s\n", "first", "groups",
            "head", "heads", "unit", "units", "QKV", "O", "MLP", "DOWN", "layer");
    for (int i = 0; i < p->n_classes; i++) {
        const struct gen_class *c = &p->cls[i];
        fprintf(f, "%6d %6d %6d %6d %6d %6d %10lld %10lld %10lld %10lld %10lld\n", c->first,
                c->groups, c->head0, c->heads, c->unit0, c->units, (long long) c->o,
                (long long) (c->mlp - c->o), (long long) (c->down - c->mlp),
                (long long) (c->layer_bytes - c->down), (long long) c->layer_bytes);
    }
    fprintf(f, "pairs = %d (%d of a rank, %d sets of %d)\nKV tile = %d\n", p->pairs, p->rank_pairs,
            p->sets, p->set_pairs, p->kv_tile);
    if (p->team > 1)
        fprintf(f, "teams = %d of %d groups, from %d on; then a hop more\n", p->model.K, p->team,
                p->team_from);
}

static void dump_tables(FILE *f, const struct gen_plan *p)
{
    fprintf(f, "\n[phases]\n%-6s %8s %8s %6s %7s %5s %6s %11s\n", "", "rows", "columns", "units",
            "blocks", "spans", "units", "blocks/CTA");
    for (int i = 0; i < GEN_PHASES; i++) {
        const struct gen_phase *ph = &p->phase[i];
        fprintf(f, "%-6s %8d %8d %6d %7d %5d %6d %11d\n", phase_names[i], ph->rows, ph->cols,
                ph->units, ph->blocks, ph->spans, ph->span_units, ph->cta_blocks);
    }
    fprintf(f, "\n[hops]\n%-6s %8s %8s\n", "", "word", "words");
    for (int i = 0; i < GEN_HOPS; i++)
        fprintf(f, "%-6s %8d %8d\n", hop_names[i], p->hop_offset[i], p->hop_words[i]);
    fprintf(f, "\n[memory]\nstreams = %lld (%d x %lld, layers at %lld)\n",
            (long long) p->stream_bytes, p->ctas, (long long) p->cta_bytes,
            (long long) p->layers_offset);
    fprintf(f, "embedding = %lld\nKV cache = %lld\n", (long long) p->embed_bytes,
            (long long) p->kv_bytes);
    fprintf(f, "prefill scratch = %lld\nshared, decode = %d (ring %d x %d)\nshared, prefill = %d\n",
            (long long) p->pf_bytes, p->smem_bytes, p->stages, p->stage_bytes,
            p->prefill_smem_bytes);
}

char *gen_plan_dump(const struct gen_plan *p)
{
    char *text = NULL, *summary = gen_plan_summary(p);
    size_t size;
    FILE *f = summary ? open_memstream(&text, &size) : NULL;

    if (!f) {
        free(summary);
        return NULL;
    }
    for (const char *c = summary; *c; c++) {
        if (c == summary || c[-1] == '\n')
            fputs("# ", f);
        fputc(*c, f);
    }
    free(summary);
    fputc('\n', f);
    dump_choices(f, p);
    dump_groups(f, p);
    dump_tables(f, p);
    gen_predict_dump(f, p);
    if (fclose(f)) {
        free(text);
        return NULL;
    }
    return text;
}
