/* gpu.c - see gpu.h. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE             /* open_memstream, strsep */
#endif
#include "gen/gpu.h"
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define KIB(n) ((n) * 1024)
#define MIB(n) ((int64_t)(n) << 20)
#define GB(n) ((int64_t)(n) * 1000000000)

/* Where the figures are from:
   arch, smem_block, smem_sm  CUDA C++ Programming Guide, "Compute Capabilities", the table of
            technical specifications; shared memory of a block is that of the SM less 1 KiB
            (75: all of it).
   sms, l2_bytes, clock_mhz (boost), mem_gbps, mem_bytes (decimal GB as sold)
            h200 h100 a100 t4 l4 b200 b300: NVIDIA's data sheet and architecture white paper of
            the product (SXM form where there is one; a100: the one of 80 GB);
            rtx3090 rtx4090 rtx5090: the Ampere GA102, Ada and Blackwell RTX white papers;
            orin thor: Jetson AGX Orin 64 GB and Jetson AGX Thor module data sheets;
            gb10: DGX Spark data sheet.
   h200     SMs, L2, clock and the clusters that fit with full shared memory were measured on
            one part; others of that product may hold fewer clusters.  No other GPU was at
            hand: their clusters stand at one CTA each, and a running program asks the driver.
   b300     clock and L2 are taken from b200. */
static const struct gen_gpu profiles[] = {
    {"h200", 90, 132, KIB(227), KIB(228), MIB(60), 1980, 4800, GB(141), {132, 66, 30, 15, 7}, 0},
    {"h100", 90, 132, KIB(227), KIB(228), MIB(50), 1980, 3350, GB(80), {132}, 0},
    {"a100", 80, 108, KIB(163), KIB(164), MIB(40), 1410, 2039, GB(80), {108}, 0},
    {"l4", 89, 58, KIB(99), KIB(100), MIB(48), 2040, 300, GB(24), {58}, 0},
    {"rtx3090", 86, 82, KIB(99), KIB(100), MIB(6), 1695, 936, GB(24), {82}, 0},
    {"rtx4090", 89, 128, KIB(99), KIB(100), MIB(72), 2520, 1008, GB(24), {128}, 0},
    {"rtx5090", 120, 170, KIB(99), KIB(100), MIB(96), 2407, 1792, GB(32), {170}, 0},
    {"b200", 100, 148, KIB(227), KIB(228), MIB(126), 1965, 8000, GB(180), {148}, 0},
    {"b300", 103, 148, KIB(227), KIB(228), MIB(126), 1965, 8000, GB(288), {148}, 0},
    {"t4", 75, 40, KIB(64), KIB(64), MIB(4), 1590, 320, GB(16), {40}, 0},
    {"orin", 87, 16, KIB(163), KIB(164), MIB(4), 1300, 204, GB(64), {16}, 0},
    {"thor", 110, 20, KIB(227), KIB(228), MIB(32), 1575, 273, GB(128), {20}, 0},
    {"gb10", 121, 48, KIB(99), KIB(100), MIB(24), 2418, 273, GB(128), {48}, 0},
};
enum { N_PROFILES = sizeof(profiles) / sizeof(profiles[0]) };

static const int archs[] = {75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121, 0};
static const char *const defaults[] = {"t4", "a100", "rtx3090", "orin", "rtx4090", "h200", "b200",
                                       "b300", "thor", "rtx5090", "gb10"};
_Static_assert(sizeof(defaults) / sizeof(defaults[0]) + 1 == sizeof(archs) / sizeof(archs[0]),
               "a default for each architecture");

/* The keys of a profile file that hold one number, in the order of printing. */
struct key {
    const char *name;
    size_t offset;
    int wide;                   /* int64_t, else int */
    int64_t lo, hi;
};
static const struct key keys[] = {
    {"arch", offsetof(struct gen_gpu, arch), 0, 75, 121},
    {"sms", offsetof(struct gen_gpu, sms), 0, 1, 1024},
    {"smem_block", offsetof(struct gen_gpu, smem_block), 0, KIB(16), KIB(1024)},
    {"smem_sm", offsetof(struct gen_gpu, smem_sm), 0, KIB(16), KIB(1024)},
    {"l2_bytes", offsetof(struct gen_gpu, l2_bytes), 1, 0, (int64_t)1 << 40},
    {"clock_mhz", offsetof(struct gen_gpu, clock_mhz), 0, 1, 10000},
    {"mem_gbps", offsetof(struct gen_gpu, mem_gbps), 0, 1, 1000000},
    {"mem_bytes", offsetof(struct gen_gpu, mem_bytes), 1, 0, (int64_t)1 << 50},
};
enum { N_KEYS = sizeof(keys) / sizeof(keys[0]), KEY_NAME = N_KEYS, KEY_CLUSTERS,
       MAX_FILE = 65536 };

const char *gen_gpu_profile(int i)
{
    return i >= 0 && i < N_PROFILES ? profiles[i].name : NULL;
}

const int *gen_gpu_archs(void)
{
    return archs;
}

static int find_profile(const char *name, struct gen_gpu *out)
{
    for (int i = 0; i < N_PROFILES; i++) {
        if (!strcmp(profiles[i].name, name)) {
            *out = profiles[i];
            return 0;
        }
    }
    return -1;
}

/* "75, 80, ..." */
static const char *list_archs(char *buf, size_t size)
{
    size_t n = 0;

    for (int i = 0; archs[i] && n < size; i++)
        n += (size_t)snprintf(buf + n, size - n, "%s%d", i ? ", " : "", archs[i]);
    return buf;
}

int gen_gpu_default(int arch, struct gen_gpu *out, struct mk_err *err)
{
    char list[128];

    for (int i = 0; archs[i]; i++) {
        if (archs[i] == arch && find_profile(defaults[i], out) == 0)
            return 0;
    }
    return gen_fail(err, MK_EUNSUPPORTED, "architecture %d is not supported; known are %s", arch,
                    list_archs(list, sizeof(list)));
}

int gen_gpu_host(int arch, struct gen_gpu *out)
{
    enum { SMS = 16 };
    int rc = gen_gpu_default(arch, out, NULL);

    if (rc)
        return rc;
    snprintf(out->name, sizeof(out->name), "host-sm_%d", arch);
    out->host = 1;
    out->sms = SMS;
    for (int i = 0; i < 5; i++)
        out->clusters[i] = i == 0 || arch >= 90 ? SMS >> i : 0;
    return 0;
}

/* Clusters of SIZE that the parts of a product with SMS SMs hold: most and fewest. */
static void part_clusters(int sms, int size, int *most, int *fewest)
{
    enum { GPC = 18 };
    const int gpcs = (sms + GPC - 1) / GPC, full = GPC / size;
    const int spare = (GPC - full * size + 2) / 2 * 2;  /* SMs that a GPC lacks when it holds one fewer */

    *most = gpcs * full < sms / size ? gpcs * full : sms / size;
    *fewest = gpcs * full - (gpcs * GPC - sms) / spare;
    if (*fewest > *most)
        *fewest = *most;
}

int gen_gpu_part(const struct gen_gpu *g, int i, struct gen_gpu *out)
{
    int parts = 0;

    *out = *g;
    for (int k = 1; k < 5; k++) {
        int most, fewest;

        part_clusters(g->sms, 1 << k, &most, &fewest);
        if (g->arch != 90 || g->host)
            most = fewest = g->clusters[k];
        if (!most)
            continue;
        parts = parts > most - fewest + 1 ? parts : most - fewest + 1;
        out->clusters[k] = most - i > fewest ? most - i : fewest;
    }
    if (i == parts)
        memset(out->clusters + 1, 0, sizeof(out->clusters) - sizeof(out->clusters[0]));
    return i <= parts ? 0 : -1;
}

int gen_gpu_arch(const char *text, int *arch, struct mk_err *err)
{
    const char *s = strncmp(text, "sm_", 3) ? text : text + 3;
    size_t digits = strspn(s, "0123456789");
    const char *rest = s + digits;
    int n = digits >= 2 && digits <= 3 && *s != '0' ? atoi(s) : 0;
    char list[128];

    /* "a" and "f" name feature sets, which exist from 90 on */
    if (n && (!*rest || (n >= 90 && (!strcmp(rest, "a") || !strcmp(rest, "f"))))) {
        for (int i = 0; archs[i]; i++) {
            if (archs[i] == n) {
                *arch = n;
                return 0;
            }
        }
    }
    return gen_fail(err, MK_EUNSUPPORTED, "architecture \"%.40s\" is not supported; known are "
                    "sm_ and one of %s", text, list_archs(list, sizeof(list)));
}

/* ---- Profile files ------------------------------------------------------- */

struct file {
    const char *path;
    int line;
    unsigned seen;              /* bit K: key K was there */
    struct mk_err *err;
};

static int64_t get(const struct gen_gpu *g, const struct key *k)
{
    const char *p = (const char *)g + k->offset;

    return k->wide ? *(const int64_t *)p : *(const int *)p;
}

static void set(struct gen_gpu *g, const struct key *k, int64_t v)
{
    char *p = (char *)g + k->offset;

    if (k->wide)
        *(int64_t *)p = v;
    else
        *(int *)p = (int)v;
}

/* A decimal integer in LO..HI at *S, which moves behind it. */
static int number(const char **s, int64_t lo, int64_t hi, int64_t *out)
{
    char *end;

    if (!isdigit((unsigned char)**s))
        return -1;
    errno = 0;
    *out = strtoll(*s, &end, 10);
    if (errno || *out < lo || *out > hi || (*end && *end != ' ' && *end != '\t'))
        return -1;
    *s = end + strspn(end, " \t");
    return 0;
}

static int take_name(struct file *f, const char *value, struct gen_gpu *g)
{
    size_t n = strspn(value, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-");

    if (!n || value[n] || n >= sizeof(g->name) || value[0] == '-' || value[0] == '.')
        return gen_fail(f->err, MK_EFORMAT, "%s:%d: key \"name\": expected 1 to %zu characters "
                        "of [A-Za-z0-9._-], found \"%.60s\"", f->path, f->line,
                        sizeof(g->name) - 1, value);
    memcpy(g->name, value, n + 1);
    return 0;
}

static int take_clusters(struct file *f, const char *value, struct gen_gpu *g)
{
    const char *s = value;
    int64_t v;

    for (int i = 0; i < 5; i++) {
        if (number(&s, 0, 1024, &v))
            return gen_fail(f->err, MK_EFORMAT, "%s:%d: key \"clusters\": expected 5 integers "
                            "from 0 to 1024, found \"%.60s\"", f->path, f->line, value);
        g->clusters[i] = (int)v;
    }
    if (*s)
        return gen_fail(f->err, MK_EFORMAT, "%s:%d: key \"clusters\": more than 5 integers",
                        f->path, f->line);
    return 0;
}

static int take_number(struct file *f, const struct key *k, const char *value, struct gen_gpu *g)
{
    const char *s = value;
    int64_t v;

    if (number(&s, k->lo, k->hi, &v) || *s)
        return gen_fail(f->err, MK_EFORMAT, "%s:%d: key \"%s\": expected an integer from %lld to "
                        "%lld, found \"%.60s\"", f->path, f->line, k->name, (long long)k->lo,
                        (long long)k->hi, value);
    set(g, k, v);
    return 0;
}

static int take(struct file *f, const char *key, const char *value, struct gen_gpu *g)
{
    int k = 0;

    while (k < N_KEYS && strcmp(keys[k].name, key))
        k++;
    if (!strcmp(key, "name"))
        k = KEY_NAME;
    else if (!strcmp(key, "clusters"))
        k = KEY_CLUSTERS;
    else if (k == N_KEYS)
        return gen_fail(f->err, MK_EFORMAT, "%s:%d: key \"%.60s\" is not known", f->path, f->line,
                        key);
    if (f->seen & 1u << k)
        return gen_fail(f->err, MK_EFORMAT, "%s:%d: key \"%s\" stands there twice", f->path,
                        f->line, key);
    f->seen |= 1u << k;
    if (k == KEY_NAME)
        return take_name(f, value, g);
    if (k == KEY_CLUSTERS)
        return take_clusters(f, value, g);
    return take_number(f, &keys[k], value, g);
}

static char *strip(char *s)
{
    size_t n;

    s += strspn(s, " \t\r");
    n = strlen(s);
    while (n && strchr(" \t\r", s[n - 1]))
        s[--n] = '\0';
    return s;
}

static int take_line(struct file *f, char *line, struct gen_gpu *g)
{
    char *equals;

    line[strcspn(line, "#")] = '\0';
    line = strip(line);
    if (!*line)
        return 0;
    equals = strchr(line, '=');
    if (!equals)
        return gen_fail(f->err, MK_EFORMAT, "%s:%d: expected \"key = value\", found \"%.60s\"",
                        f->path, f->line, line);
    *equals = '\0';
    return take(f, strip(line), strip(equals + 1), g);
}

/* What one line alone cannot show. */
static int check_whole(const struct file *f, const struct gen_gpu *g)
{
    char list[128];
    int i = 0;

    for (int k = 0; k < N_KEYS; k++) {
        if (!(f->seen & 1u << k) && strcmp(keys[k].name, "mem_bytes"))
            return gen_fail(f->err, MK_EFORMAT, "%s: key \"%s\" is missing", f->path,
                            keys[k].name);
    }
    if (!(f->seen & 1u << KEY_NAME))
        return gen_fail(f->err, MK_EFORMAT, "%s: key \"name\" is missing", f->path);
    while (archs[i] && archs[i] != g->arch)
        i++;
    if (!archs[i])
        return gen_fail(f->err, MK_EFORMAT, "%s: key \"arch\": expected one of %s, found %d",
                        f->path, list_archs(list, sizeof(list)), g->arch);
    if (g->smem_block > g->smem_sm)
        return gen_fail(f->err, MK_EFORMAT, "%s: key \"smem_block\": %d is more than smem_sm, %d",
                        f->path, g->smem_block, g->smem_sm);
    for (i = 0; i < 5; i++) {
        if (g->clusters[i] << i > g->sms)
            return gen_fail(f->err, MK_EFORMAT, "%s: key \"clusters\": %d clusters of %d are more "
                            "than %d SMs", f->path, g->clusters[i], 1 << i, g->sms);
    }
    return 0;
}

static int parse(const char *path, char *text, struct gen_gpu *out, struct mk_err *err)
{
    struct file f = {path, 0, 0, err};
    struct gen_gpu g = {0};
    int rc = 0;

    for (char *next = text; next && rc == 0;) {
        char *line = strsep(&next, "\n");

        f.line++;
        rc = take_line(&f, line, &g);
    }
    if (rc == 0 && !(f.seen & 1u << KEY_CLUSTERS))
        g.clusters[0] = g.sms;
    if (rc == 0)
        rc = check_whole(&f, &g);
    if (rc == 0)
        *out = g;
    return rc;
}

static int fail_unknown(const char *where, struct mk_err *err)
{
    char list[512];
    size_t n = 0;

    for (int i = 0; i < N_PROFILES && n < sizeof(list); i++)
        n += (size_t)snprintf(list + n, sizeof(list) - n, "%s%s", i ? ", " : "",
                              profiles[i].name);
    return gen_fail(err, MK_ENOENT, "%.500s: no such file, and no GPU profile of that name; "
                    "known are: %s", where, list);
}

int gen_gpu_read(const char *where, struct gen_gpu *out, struct mk_err *err)
{
    char text[MAX_FILE + 1];
    struct stat st;
    ssize_t n = 0;
    size_t len = 0;
    int fd, rc;

    if (find_profile(where, out) == 0)
        return 0;
    fd = open(where, O_RDONLY | O_CLOEXEC | O_NONBLOCK);        /* do not wait for a FIFO */
    if (fd < 0 && (errno == ENOENT || errno == ENOTDIR))
        return fail_unknown(where, err);
    if (fd < 0)
        return gen_fail(err, MK_EIO, "%s: cannot open: %s", where, strerror(errno));
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) {
        close(fd);
        return gen_fail(err, MK_EIO, "%s: not a regular file", where);
    }
    while (len < MAX_FILE && (n = read(fd, text + len, MAX_FILE - len)) > 0)
        len += (size_t)n;
    text[len] = '\0';
    if (n < 0)
        rc = gen_fail(err, MK_EIO, "%s: cannot read: %s", where, strerror(errno));
    else if (len == MAX_FILE)
        rc = gen_fail(err, MK_EFORMAT, "%s: not a GPU profile: %d bytes or more", where, MAX_FILE);
    else if (strlen(text) != len)
        rc = gen_fail(err, MK_EFORMAT, "%s: not a GPU profile: it holds zero bytes", where);
    else
        rc = parse(where, text, out, err);
    close(fd);
    return rc;
}

char *gen_gpu_print(const struct gen_gpu *g)
{
    char *text = NULL;
    size_t size;
    FILE *f = open_memstream(&text, &size);
    int bad;

    if (!f)
        return NULL;
    fprintf(f, "# GPU profile: sizes in bytes, mem_gbps in 1e9 bytes per second,\n"
               "# clusters of 1, 2, 4, 8 and 16 CTAs that fit at once (0: none, or not known)\n"
               "name = %s\n", g->name);
    for (int k = 0; k < N_KEYS; k++)
        fprintf(f, "%s = %lld\n", keys[k].name, (long long)get(g, &keys[k]));
    fprintf(f, "clusters = %d %d %d %d %d\n", g->clusters[0], g->clusters[1], g->clusters[2],
            g->clusters[3], g->clusters[4]);
    bad = ferror(f);
    if (fclose(f) || bad) {
        free(text);
        return NULL;
    }
    return text;
}
