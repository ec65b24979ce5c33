/* plan.c - the arithmetic behind gen_plan.  Nothing here looks at a device or a file's
   contents other than "key = value" lines. */
#include "config.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "gen/gen.h"

/* Measured on an H200: 48 KiB in flight per SM saturate its memory, and every further byte
   is a queue that hops stand in. */
enum { INFLIGHT_BYTES = 49152, INFLIGHT_HOP_BYTES = 16384 };
/* A launch must not hold the GPU longer than this. */
enum { LAUNCH_US = 100000 };
/* The templates count bytes of a layer and of prefill's activations, elements of a head's keys,
   and the chunks of a launch in int; loops step a little past the end.  The sampler adds up
   11-bit limbs of a CTA's logits in 32 bits. */
enum {
    MOST_BYTES = 1 << 30,
    MOST_HEAD_ELEMS = 1 << 30,
    MOST_CHUNKS = 1 << 30,
    MOST_LOGITS = 1 << 21
};

struct key {
    const char *name;
    size_t offset;     /* of an int in struct gen_plan */
    int lo, hi;        /* range; with NAMES: 0 .. number of names - 1 */
    const char *names; /* "list|loop" or NULL */
    const char *text;
};

#define AT(field) offsetof(struct gen_plan, field)
static const struct key keys[] = {
    {"ctas", AT(ctas), 1, 1024, NULL,
     "CTAs of decode and prefill; at most the SMs, and hidden_size / 8"},
    {"warps", AT(warps), 4, 7, NULL, "consumer warps of a decode CTA; one more is the producer"},
    {"chunk_bytes", AT(chunk_bytes), 512, 65536, NULL, "longest chunk of the weight ring"},
    {"stages", AT(stages), 2, 64, NULL, "stages of the weight ring"},
    {"inflight", AT(inflight), 1, 64, NULL, "chunks in flight at most"},
    {"inflight_hop", AT(inflight_hop), 1, 64, NULL, "chunks in flight while a hop is awaited"},
    {"round_blocks", AT(round_blocks), 2, 8, NULL, "blocks of 8 rows between two barriers; even"},
    {"split_min", AT(split_min), 1, 65536, NULL,
     "positions that are worth one more attention split"},
    {"head_group", AT(head_group), 1, 4, NULL, "query heads of one attention task"},
    {"tokens_per_launch", AT(tokens_per_launch), 1, 1024, NULL,
     "tokens of one decode launch at most"},
    {"prefill_tokens", AT(prefill_tokens), 16, 8192, NULL,
     "tokens of one prefill launch at most; a multiple of 16"},
    {"gemm_m", AT(gemm_m), 64, 128, NULL, "prefill tile: tokens"},
    {"gemm_n", AT(gemm_n), 64, 128, NULL, "prefill tile: rows"},
    {"gemm_k", AT(gemm_k), 32, 64, NULL, "prefill tile: columns"},
    {"gemm_stages", AT(gemm_stages), 2, 8, NULL, "prefill tile: copy stages"},
    {"flash_m", AT(flash_m), 128, 128, NULL, "prefill attention tile: queries"},
    {"flash_n", AT(flash_n), 32, 64, NULL, "prefill attention tile: positions"},
    {"unroll_layers", AT(unroll_layers), 0, 1, "list|loop",
     "layers as a list of calls, or as a loop"},
    {"dtype", AT(dtype), 0, 1, "bf16|fp16", "resident type of weights and KV cache"},
    {"fault", AT(fault), 0, 1, "none|hang", "for tests: a CTA that never answers"},
    {"epoch0", AT(epoch0), 1, INT_MAX, NULL, "for tests: first tag of the exchange"},
    {NULL, 0, 0, 0, NULL, NULL}};

const char *gen_plan_key(int i)
{
    static char line[256];
    char range[32];

    if (i < 0 || (size_t) i >= sizeof keys / sizeof *keys - 1)
        return NULL;
    if (keys[i].names)
        snprintf(range, sizeof range, "%s", keys[i].names);
    else
        snprintf(range, sizeof range, "%d..%d", keys[i].lo, keys[i].hi);
    snprintf(line, sizeof line, "%-18s %-12s %s", keys[i].name, range, keys[i].text);
    return line;
}

static int *key_slot(struct gen_plan *p, const struct key *k)
{
    return (int *) ((char *) p + k->offset);
}

/* The number of WORD among NAMES ("list|loop"), or -1. */
static int name_index(const char *names, const char *word)
{
    size_t len = strlen(word);

    for (int i = 0; names; i++) {
        size_t n = strcspn(names, "|");
        if (n == len && !memcmp(names, word, n))
            return i;
        names = names[n] ? names + n + 1 : NULL;
    }
    return -1;
}

/* Set key NAME of P to the text VALUE; WHERE stands in errors; *SET gets the key's bit. */
static int set_key(struct gen_plan *p, const char *where, const char *name, const char *value,
                   unsigned long *set, struct mk_err *err)
{
    const struct key *k;
    char *end;
    long v;

    for (k = keys; k->name && strcmp(k->name, name); k++)
        ;
    if (!k->name)
        return gen_fail(err, MK_EINVAL, "%s: unknown plan key \"%.40s\" (mkgen --list-keys)", where,
                        name);
    if (k->names) {
        v = name_index(k->names, value);
        if (v < 0)
            return gen_fail(err, MK_EINVAL, "%s: %s is \"%.40s\"; it must be one of %s", where,
                            name, value, k->names);
    } else {
        errno = 0;
        v = strtol(value, &end, 10);
        if (errno || end == value || *end || v < k->lo || v > k->hi)
            return gen_fail(err, MK_EINVAL, "%s: %s is \"%.40s\"; it must be an integer in %d..%d",
                            where, name, value, k->lo, k->hi);
    }
    *key_slot(p, k) = (int) v;
    *set |= 1ul << (k - keys);
    return 0;
}

/* Was FIELD set by the caller?  Used only while defaults are filled in. */
static int is_set(unsigned long set, size_t offset)
{
    for (const struct key *k = keys; k->name; k++)
        if (k->offset == offset)
            return set >> (k - keys) & 1;
    return 0;
}

static char *trim(char *s)
{
    char *end;

    s += strspn(s, " \t\r\n");
    for (end = s + strlen(s); end > s && strchr(" \t\r\n", end[-1]); end--)
        ;
    *end = 0;
    return s;
}

/* Split "key = value" in place and set it. */
static int set_line(struct gen_plan *p, const char *where, char *line, unsigned long *set,
                    struct mk_err *err)
{
    char *eq = strchr(line, '=');

    if (!eq)
        return gen_fail(err, MK_EINVAL, "%s: \"%.60s\" is not key=value", where, line);
    *eq = 0;
    return set_key(p, where, trim(line), trim(eq + 1), set, err);
}

/* A regular file: opening anything else may wait for ever. */
static int open_plan_file(const char *path, FILE **out, struct mk_err *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK), rc = 0;
    struct stat st;

    *out = NULL;
    if (fd < 0)
        return gen_fail(err, errno == ENOENT ? MK_ENOENT : MK_EIO, "%s: %s", path, strerror(errno));
    if (fstat(fd, &st) || !S_ISREG(st.st_mode))
        rc = gen_fail(err, MK_EIO, "%s: not a regular file", path);
    else if (!(*out = fdopen(fd, "r")))
        rc = gen_fail(err, MK_ENOMEM, "%s: no memory", path);
    if (rc)
        close(fd);
    return rc;
}

/* What --dump-plan prints is a plan file too: only its section "[choices]" counts. */
static int read_plan_file(struct gen_plan *p, const char *path, unsigned long *set,
                          struct mk_err *err)
{
    char line[512], where[4200], *text;
    int rc, choices = 1;
    FILE *f;

    rc = open_plan_file(path, &f, err);
    if (rc)
        return rc;
    for (int n = 1; rc == 0 && fgets(line, sizeof line, f); n++) {
        snprintf(where, sizeof where, "%s:%d", path, n);
        if (!strchr(line, '\n') && !feof(f)) {
            rc = gen_fail(err, MK_EFORMAT, "%s: line too long", where);
            break;
        }
        line[strcspn(line, "#")] = 0;
        text = trim(line);
        if (*text == '[')
            choices = !strcmp(text, "[choices]");
        else if (*text && choices && (rc = set_line(p, where, text, set, err)) == MK_EINVAL)
            rc = err ? (err->code = MK_EFORMAT) : MK_EFORMAT;
    }
    if (rc == 0 && ferror(f))
        rc = gen_fail(err, MK_EIO, "%s: read error", path);
    fclose(f);
    return rc;
}

static int read_settings(struct gen_plan *p, const char *plan_file, const char *const *set_list,
                         unsigned long *set, struct mk_err *err)
{
    char line[512];
    int rc = 0;

    if (plan_file)
        rc = read_plan_file(p, plan_file, set, err);
    for (; rc == 0 && set_list && *set_list; set_list++) {
        if (strlen(*set_list) >= sizeof line)
            return gen_fail(err, MK_EINVAL, "--set: \"%.60s...\" is too long", *set_list);
        strcpy(line, *set_list);
        rc = set_line(p, "--set", line, set, err);
    }
    return rc;
}

/* ---- Phases and the stream ---------------------------------------------- */

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

static int max_int(int a, int b)
{
    return a > b ? a : b;
}

static void plan_phase(struct gen_plan *p, int id, int rows, int cols, int step)
{
    struct gen_phase *f = &p->phase[id];

    f->rows = rows;
    f->cols = cols;
    f->units = ceil_div(cols, 32);
    f->blocks = ceil_div(rows, 8);
    f->step = step;
    f->spans = ceil_div(f->units, p->chunk_bytes / 512);
    f->span_units = ceil_div(f->units, f->spans);
    f->spans = ceil_div(f->units, f->span_units);
    f->cta_blocks = ceil_div(f->blocks / step, p->ctas) * step;
    p->stage_bytes = max_int(p->stage_bytes, f->span_units * 512);
    p->x_elems = max_int(p->x_elems, f->units * 32);
}

static void plan_streams(struct gen_plan *p)
{
    const struct gen_model *m = &p->model;
    int64_t at = 0;

    p->stage_bytes = p->x_elems = 0;
    plan_phase(p, GEN_QKV, (m->H + 2 * m->K) * m->E, m->D, 1);
    plan_phase(p, GEN_O, m->D, m->H * m->E, 1);
    plan_phase(p, GEN_MLP, 2 * m->F, m->D, 2);
    plan_phase(p, GEN_DOWN, m->D, m->F, 1);
    plan_phase(p, GEN_HEAD, m->V, m->D, 1);
    for (int i = 0; i < GEN_PHASES; i++) {
        struct gen_phase *f = &p->phase[i];
        if (i == GEN_HEAD) {
            p->layer_bytes = at;
            at = p->head_offset = p->layer_bytes * m->L;
        }
        f->offset = i == GEN_HEAD ? 0 : at;
        at += (int64_t) f->cta_blocks * f->units * 512;
    }
    p->cta_bytes = at;
    p->stream_bytes = p->cta_bytes * p->ctas;
    p->embed_bytes = m->tied ? 0 : (int64_t) m->V * m->D * 2;
    p->token_bytes = 0;
    for (int i = 0; i < GEN_PHASES; i++)
        p->token_bytes +=
            (int64_t) p->phase[i].blocks * p->phase[i].units * 512 * (i == GEN_HEAD ? 1 : m->L);
    p->floor_us = p->gpu.mem_gbps ? p->token_bytes / (p->gpu.mem_gbps * 1e3) : 0;
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
    p->kv_head = 2 * (int64_t) p->context * m->E;
    p->kv_layer = p->kv_head * m->K;
    p->kv_bytes = p->kv_layer * m->L * 2;
}

static void plan_hops(struct gen_plan *p)
{
    const struct gen_model *m = &p->model;
    const int head = m->E / 8 * 3;
    const int words[GEN_HOPS] = {
        [GEN_HOP_QKV] = (m->H + 2 * m->K) * head,
        [GEN_HOP_PART] = p->max_splits * m->H * head,
        [GEN_HOP_SCALE] = p->max_splits * m->H,
        [GEN_HOP_ATTN] = m->H * head,
        [GEN_HOP_O] = m->D / 8 * 3,
        [GEN_HOP_MLP] = m->F / 8 * 3,
        [GEN_HOP_DOWN] = m->D / 8 * 3,
        [GEN_HOP_BEST] = p->ctas,
        [GEN_HOP_COUNT] = p->ctas * 16,
    };

    p->exchange_words = 0;
    for (int i = 0; i < GEN_HOPS; i++) {
        p->hop_buffers[i] = i == GEN_HOP_COUNT ? 2 : 1; /* it follows itself at once */
        p->hop_offset[i] = p->exchange_words;
        p->hop_words[i] = words[i] * p->hop_buffers[i];
        p->exchange_words +=
            (int) align_up(p->hop_words[i], 8); /* a hop begins on its own 128 bytes */
    }
}

/* ---- Shared memory ------------------------------------------------------- */

/* Attention's work space: q, key and value, out, max and sum (templates/attn.cu.m4). */
static int attention_bytes(const struct gen_plan *p)
{
    const int g = p->head_group, e = p->model.E;

    return (int) align_up(g * e * 4 + 2 * e * 2 + p->warps * g * e * 4 + 2 * p->warps * g * 4, 16);
}

/* All but the ring (templates/shared.cu.m4). */
static int fixed_smem(struct gen_plan *p)
{
    p->scratch_bytes = max_int(p->x_elems * 2, attention_bytes(p));
    return p->scratch_bytes + p->model.D * 4 + 2 * p->round_blocks * 8 * p->warps * 4 +
           p->warps * (4 + 16) + 320 + 1024; /* sum, best, hist; args, flags, alignment */
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
static int stages_that_fit(struct gen_plan *p)
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
        if (!is_set(set, choices[i].offset) && *choice > choices[i].least) {
            *choice -= choices[i].step;
            return 1;
        }
    }
    return 0;
}

static void choose_prefill(struct gen_plan *p, unsigned long set)
{
    const int small = p->gpu.smem_block < 90000;

    if (!is_set(set, AT(prefill_tokens)))
        p->prefill_tokens = min_int(2048, (int) align_up(p->context, 16));
    if (!is_set(set, AT(gemm_m)))
        p->gemm_m = small ? 64 : 128;
    if (!is_set(set, AT(gemm_n)))
        p->gemm_n = 128;
    if (!is_set(set, AT(gemm_k)))
        p->gemm_k = small ? 32 : 64;
    if (!is_set(set, AT(gemm_stages))) /* sm_75 copies at once: a third stage gains nothing */
        p->gemm_stages = p->family == 75 ? 2 : 4;
    if (!is_set(set, AT(flash_m)))
        p->flash_m = 128;
    if (!is_set(set, AT(flash_n)))
        p->flash_n = 64;
    p->most_stages = p->family == 75 ? 2 : 8;
    while (prefill_smem(p) > p->gpu.smem_block && shrink_prefill(p, set))
        ;
}

static void choose_decode(struct gen_plan *p, unsigned long set)
{
    const struct gen_model *m = &p->model;
    const int ratio = m->H / m->K, smem = p->gpu.smem_block;
    const int most_heads = p->family < 90 ? 2 : 4; /* more spill, before sm_90 */

    if (!is_set(set, AT(ctas)))
        p->ctas = min_int(p->gpu.sms, m->D / 8);
    if (!is_set(set, AT(warps)))
        p->warps =
            7; /* 8 with the producer: a ninth would leave 168 registers a thread, and spill */
    if (!is_set(set, AT(chunk_bytes)))
        p->chunk_bytes = smem >= 160000 ? 16384 : smem >= 90000 ? 8192 : 4096;
    if (!is_set(set, AT(round_blocks)))
        p->round_blocks = 8;
    if (!is_set(set, AT(head_group)))
        p->head_group = ceil_div(ratio, ceil_div(ratio, most_heads));
    if (!is_set(set, AT(split_min)))
        p->split_min = 128;
    if (!is_set(set, AT(dtype)))
        p->dtype = p->family == 75 || m->dtype == GEN_FP16 ? GEN_FP16 : GEN_BF16;
    p->groups = ceil_div(ratio, p->head_group);
    p->kv_ahead = p->family < 90 || p->head_group > 2 ? 2 : 4; /* as registers allow */
    p->max_splits = max_int(1, p->ctas / (m->K * p->groups));
}

/* The chunks of a block are unrolled; where they are many, sm_80 to sm_89 run out of registers. */
static void choose_longer_chunks(struct gen_plan *p)
{
    if (p->family != 80 || p->phase[GEN_DOWN].spans <= 20)
        return;
    p->chunk_bytes *= 2;
    plan_streams(p);
    if (stages_that_fit(p) < 3) {
        p->chunk_bytes /= 2;
        plan_streams(p);
    }
}

static void choose_ring(struct gen_plan *p, unsigned long set)
{
    if (!is_set(set, AT(chunk_bytes)))
        choose_longer_chunks(p);
    while (stages_that_fit(p) < 2 && p->chunk_bytes > 1024 && !is_set(set, AT(chunk_bytes))) {
        p->chunk_bytes /= 2;
        plan_streams(p);
    }
    if (!is_set(set, AT(stages)))
        p->stages = max_int(2, min_int(16, stages_that_fit(p)));
    if (!is_set(set, AT(inflight)))
        p->inflight = max_int(1, min_int(p->stages, INFLIGHT_BYTES / p->stage_bytes));
    if (!is_set(set, AT(inflight_hop)))
        p->inflight_hop = max_int(1, min_int(p->inflight, INFLIGHT_HOP_BYTES / p->stage_bytes));
    if (!is_set(set, AT(tokens_per_launch))) { /* a token takes about twice its floor, and hops */
        const double kv_us = p->floor_us * (double) p->kv_bytes / (double) p->token_bytes;
        p->tokens_per_launch =
            max_int(1, min_int(64, (int) (LAUNCH_US / (2 * (p->floor_us + kv_us) + 500))));
    }
    p->smem_bytes = fixed_smem(p) + p->stages * (p->stage_bytes + 16);
    p->prefill_smem_bytes = prefill_smem(p);
}

static int check_choices(const struct gen_plan *p, struct mk_err *err)
{
    const struct gen_model *m = &p->model;

    if (p->ctas > p->gpu.sms || p->ctas > m->D / 8)
        return gen_fail(err, MK_EINVAL,
                        "plan: ctas is %d; %s has %d SMs and hidden_size %d allows %d", p->ctas,
                        p->gpu.name, p->gpu.sms, m->D, m->D / 8);
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
    if (p->inflight > p->stages || p->inflight_hop > p->inflight)
        return gen_fail(err, MK_EINVAL,
                        "plan: inflight is %d and inflight_hop %d; they must not exceed "
                        "stages %d and inflight",
                        p->inflight, p->inflight_hop, p->stages);
    if (p->fault && p->ctas < 2)
        return gen_fail(err, MK_EINVAL,
                        "plan: fault needs 2 ctas: one that hangs and one that reports it");
    return 0;
}

/* What the templates count in 32 bits. */
static int check_counts(const struct gen_plan *p, struct mk_err *err)
{
    const struct gen_phase *head = &p->phase[GEN_HEAD];
    int64_t chunks = 0;

    if (p->layer_bytes > MOST_BYTES || p->cta_bytes - p->head_offset > INT_MAX)
        return gen_fail(err, MK_EUNSUPPORTED,
                        "plan: a layer has %lld bytes in the stream of each of %d CTAs "
                        "and the head %lld; at most %d and %d are supported",
                        (long long) p->layer_bytes, p->ctas,
                        (long long) (p->cta_bytes - p->head_offset), MOST_BYTES, INT_MAX);
    for (int i = 0; i < GEN_HEAD; i++)
        chunks += (int64_t) p->phase[i].cta_blocks * p->phase[i].spans;
    chunks = chunks * p->model.L + (int64_t) head->cta_blocks * head->spans;
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
    if ((int64_t) p->context * p->model.E > MOST_HEAD_ELEMS)
        return gen_fail(err, MK_EUNSUPPORTED,
                        "plan: context is %d; with head_dim %d at most %d tokens "
                        "are supported",
                        p->context, p->model.E, MOST_HEAD_ELEMS / p->model.E);
    if ((int64_t) p->prefill_tokens * p->x_elems * 2 > MOST_BYTES)
        return gen_fail(err, MK_EINVAL,
                        "plan: prefill_tokens is %d; with %d columns at most %d are supported",
                        p->prefill_tokens, p->x_elems, MOST_BYTES / (p->x_elems * 2) / 16 * 16);
    return 0;
}

static int check_plan(const struct gen_plan *p, struct mk_err *err)
{
    struct gen_plan fit = *p;
    int rc = check_choices(p, err);

    if (rc == 0)
        rc = check_counts(p, err);
    if (rc)
        return rc;
    if (p->smem_bytes > p->gpu.smem_block)
        return gen_fail(err, MK_EINVAL,
                        "plan: decode needs %d bytes of shared memory, %d of them beside the ring, "
                        "and a block of %s has %d; %d stages of %d bytes would fit",
                        p->smem_bytes, fixed_smem(&fit), p->gpu.name, p->gpu.smem_block,
                        stages_that_fit(&fit), p->stage_bytes);
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

    p->pf_x_cols = p->x_elems;
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
    rc = read_settings(out, plan_file, set_list, &set, err);
    if (rc)
        return rc;
    choose_decode(out, set);
    plan_streams(out);
    plan_vectors(out);
    plan_hops(out);
    choose_prefill(out, set);
    choose_ring(out, set);
    plan_prefill(out);
    rc = check_plan(out, err);
    return rc ? rc : gen_plan_check(out, err);
}
