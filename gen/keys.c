/* keys.c - see keys.h. */
#include "config.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "gen/gen.h"
#include "gen/keys.h"

struct key {
    const char *name;
    size_t offset;     /* of an int in struct gen_plan */
    int lo, hi;        /* range; with NAMES: 0 .. number of names - 1 */
    const char *names; /* "list|loop" or NULL */
    const char *text;
};

static const struct key keys[] = {
    {"ctas", AT(ctas), 1, GEN_MOST_CTAS, NULL,
     "CTAs of decode; at most the SMs, a multiple of group"},
    {"group", AT(group), 1, GEN_MOST_GROUP, NULL,
     "CTAs that share KV heads and a slice of the MLP; at most hidden_size / 16"},
    {"cluster", AT(cluster), 0, 1, "l2|cluster",
     "hops inside a group: through L2, or over distributed shared memory"},
    {"balance", AT(balance), 0, 1000, NULL,
     "percent of attention's bytes that count when the MLP is shared out"},
    {"warps", AT(warps), 4, 8, NULL, "consumer warps of a decode CTA; two more keep the ring full"},
    {"chunk_bytes", AT(chunk_bytes), 512, 65536, NULL, "longest chunk of the weight ring"},
    {"stages", AT(stages), 2, 31, NULL, "stages of the weight ring"},
    {"inflight", AT(inflight), 1, 31, NULL, "chunks in flight at most"},
    {"inflight_heads", AT(inflight_heads), 1, 31, NULL,
     "the same of q, k, v and O, which only groups with KV heads read, or far on their helpers"},
    {"inflight_hop", AT(inflight_hop), 1, 31, NULL, "chunks in flight while a hop is awaited"},
    {"team_from", AT(team_from), 0, INT_MAX, NULL,
     "position from which groups without KV heads help those that have them; 0: never"},
    {"early", AT(early), 0, 1, "x|sums",
     "what is awaited with the next weights in registers: x, or already the sums that make it"},
    {"round_blocks", AT(round_blocks), 2, 16, NULL, "blocks of 8 rows between two barriers; even"},
    {"tokens_per_launch", AT(tokens_per_launch), 1, 1024, NULL,
     "tokens of one decode launch at most"},
    {"prefill_ctas", AT(prefill_ctas), 1, GEN_MOST_CTAS, NULL, "CTAs of prefill; at most the SMs"},
    {"prefill_tokens", AT(prefill_tokens), 16, 8192, NULL,
     "tokens of one prefill launch at most; a multiple of 16"},
    {"gemm_m", AT(gemm_m), 64, 128, NULL, "prefill tile: tokens"},
    {"gemm_n", AT(gemm_n), 64, 128, NULL, "prefill tile: rows"},
    {"gemm_k", AT(gemm_k), 32, 64, NULL, "prefill tile: columns"},
    {"gemm_stages", AT(gemm_stages), 2, 8, NULL, "prefill tile: copy stages"},
    {"flash_m", AT(flash_m), 128, 128, NULL, "prefill attention tile: queries"},
    {"flash_n", AT(flash_n), 32, 64, NULL, "prefill attention tile: positions"},
    {"unroll_layers", AT(unroll_layers), 0, 2, "list|loop|inline",
     "layers as a list of calls, as a loop, or inline, for measurements: that compiles for minutes"},
    {"dtype", AT(dtype), 0, 1, "bf16|fp16", "resident type of weights and KV cache"},
    {"fault", AT(fault), 0, 1, "none|hang", "for tests: a CTA that never answers"},
    {"epoch0", AT(epoch0), 1, INT_MAX, NULL, "for tests: first tag of the exchange"},
    {"timing", AT(timing), 0, 1, "off|on",
     "count the cycles of decode's stages (mkbench --stages)"},
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

int gen_keys_has(unsigned long set, size_t offset)
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

int gen_keys_read(struct gen_plan *p, const char *plan_file, const char *const *set_list,
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
