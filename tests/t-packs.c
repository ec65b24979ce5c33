/* t-packs.c - packs for all parts of a GPU product: which kernels are written, and which of them the
   engine takes on a part with other clusters, without a compiler.  The GPU is the fake driver's, and
   so is the compiler. */
#include "config.h"

#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "runtime/engine.h"
#include "runtime/key.h"
#include "runtime/product.h"

enum { CONTEXT = 256 };

static int compiles, no_nvrtc;
static struct mk_err err;
static char base[] = "/tmp/t-packs-XXXXXX";
static char pack[64], warning[4096];
static int warnings;
static struct gen_model model;

/* ---- What stands for m4 and NVRTC ------------------------------------------ */

int gen_emit(const char *params, char **src, struct mk_err *e)
{
    *src = strdup(params);
    return *src ? 0 : gen_fail(e, MK_ENOMEM, "no memory");
}

const char *gen_templates_digest(void)
{
    return "0123";
}

int rt_nvrtc_open(const char **version, struct mk_err *e)
{
    if (version)
        *version = "13.0";
    return no_nvrtc ? gen_fail(e, MK_ETOOL, "no NVRTC here") : 0;
}

int rt_nvrtc_knows(int arch)
{
    return arch > 0;
}

char *rt_nvrtc_options(int arch)
{
    return strdup(arch == 90 ? "-90" : "-");
}

/* The head of a cubin for sm_90 with one section: as much of one as is looked at. */
int rt_nvrtc_compile(const char *src, const char *name, int arch, const char *options,
                     unsigned char **cubin, size_t *size, char **log, struct mk_err *e)
{
    const uint16_t machine = 190, shentsize = 64, shnum = 1;
    const uint64_t shoff = 64, offset = 128, section = 128;
    const uint32_t flags = 0x6005a04;
    unsigned char *p = calloc(1, 256);

    (void) src, (void) name, (void) arch, (void) options, (void) log, (void) e;
    compiles++;
    memcpy(p, "\177ELF\2\1\1\0\10", 9);
    memcpy(p + 18, &machine, 2);
    memcpy(p + 40, &shoff, 8);
    memcpy(p + 48, &flags, 4);
    memcpy(p + 58, &shentsize, 2);
    memcpy(p + 60, &shnum, 2);
    p[64 + 4] = 1;
    memcpy(p + 64 + 24, &offset, 8);
    memcpy(p + 64 + 32, &section, 8);
    *cubin = p;
    *size = 256;
    return 0;
}

/* ---- Helpers ----------------------------------------------------------------- */

/* The fake driver lies beside this program, or in a .libs folder. */
static int find_fake(char *path, size_t size)
{
    static const char *const folders[] = {"", ".libs/", "../.libs/"};
    char exe[3000];
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);

    while (n > 0 && exe[n - 1] != '/')
        n--;
    exe[n > 0 ? n : 0] = 0;
    for (int i = 0; i < 3; i++) {
        snprintf(path, size, "%s%slibfakecuda.so", exe, folders[i]);
        if (access(path, R_OK) == 0)
            return 1;
    }
    return 0;
}

/* 2 KV heads and 32 units of the MLP: work for more groups than there are clusters. */
static void read_model(void)
{
    static const char text[] =
        "{\"model_type\": \"qwen3\", \"hidden_act\": \"silu\", \"hidden_size\": 256, "
        "\"intermediate_size\": 1024, \"max_position_embeddings\": 512, \"num_attention_heads\": 4, "
        "\"num_hidden_layers\": 2, \"num_key_value_heads\": 2, \"rms_norm_eps\": 1e-06, "
        "\"torch_dtype\": \"bfloat16\", \"vocab_size\": 1000, \"attention_bias\": false, "
        "\"head_dim\": 64, \"rope_theta\": 1000000, \"tie_word_embeddings\": true}";

    CHECKF(gen_model_parse(text, strlen(text), "packed", &model, &err) == 0, "%s", err.text);
}

static void on_warning(void *user, const char *text)
{
    (void) user;
    warnings++;
    snprintf(warning, sizeof warning, "%s", text);
}

static void start_over(void)
{
    char command[128];

    snprintf(command, sizeof command, "rm -rf %s/pack %s/cache", base, base);
    CHECK(system(command) == 0);
    compiles = no_nvrtc = 0;
}

/* From here on it is another machine, which cannot compile. */
static void ship_pack(void)
{
    char command[128];

    snprintf(command, sizeof command, "rm -rf %s/cache", base);
    CHECK(system(command) == 0);
    no_nvrtc = 1;
}

static int entries(void)
{
    DIR *d = opendir(pack);
    struct dirent *e;
    int n = 0;

    while (d && (e = readdir(d)))
        n += e->d_name[0] != '.';
    if (d)
        closedir(d);
    return n;
}

/* Write the pack of the H200, with choices SET; returns how many kernels that are. */
static int write_pack(const char *const *set)
{
    struct gen_gpu h200;
    const struct rt_product product = {&model, &h200, CONTEXT, "none", set};
    int n = 0;

    CHECK(gen_gpu_read("h200", &h200, &err) == 0);
    CHECKF(rt_product_pack(&product, pack, NULL, NULL, &n, &err) == 0, "%s", err.text);
    return n;
}

/* Take the kernel for N clusters (0: none) out of the pack. */
static void remove_part(int n)
{
    struct gen_gpu g;
    struct gen_plan plan;
    struct rt_key key;
    char command[512];
    FILE *f;

    CHECK(gen_gpu_read("h200", &g, &err) == 0);
    for (int i = 1; i < 5; i++)
        g.clusters[i] = n;
    CHECK(gen_plan_make(&model, &g, CONTEXT, NULL, NULL, &plan, &err) == 0);
    CHECK(rt_key_make(&plan, 90, &key, &err) == 0);
    snprintf(command, sizeof command, "%s/params", base);
    f = fopen(command, "w");
    CHECK(f && fputs(key.params, f) >= 0 && fclose(f) == 0);
    snprintf(command, sizeof command,
             "for e in %s/*; do if cmp -s $e/params.m4 %s/params; then rm -r $e; exit 0; fi; done; "
             "exit 1", pack, base);
    CHECKF(system(command) == 0, "no kernel for %d clusters in the pack", n);
    rt_key_free(&key);
}

/* A GPU of 132 SMs that holds N clusters of any size. */
static struct rt_engine *open_part(int n, const struct rt_weights *w)
{
    const struct rt_engine_options options = {.cubin_path = pack, .warn = on_warning,
                                              .plan_file = "none"};
    struct rt_engine *e = NULL;
    char settings[64];

    snprintf(settings, sizeof settings, "arch=90,sms=132,clusters=%d", n);
    setenv("FAKE_CUDA", settings, 1);
    CHECKF(rt_engine_open(&model, w, &options, &e, &err) == 0, "%s", err.text);
    warnings = 0;
    warning[0] = 0;
    return e;
}

/* Make a session on E: clusters WANT (0: a kernel without them) from FROM. */
static void check_session(struct rt_engine *e, int want, int from)
{
    struct rt_session *s;
    const int rc = rt_session_make(e, CONTEXT, &s, &err);

    CHECKF(rc == 0, "%s", err.text);
    if (rc)
        return;
    CHECKF(rt_session_kernel_from(s) == from, "from %d, not %d", rt_session_kernel_from(s), from);
    CHECKF(rt_session_plan(s)->cluster == (want > 0), "cluster is %d", rt_session_plan(s)->cluster);
    CHECKF(rt_session_plan(s)->groups == (want ? want : 16) && rt_session_plan(s)->group == 8,
           "%d groups, not %d", rt_session_plan(s)->groups, want);
    rt_session_free(s);
}

/* A part with N clusters and no compiler takes the kernel for WANT; with WARNED warnings. */
static void check_part(int n, int want, int warned)
{
    struct rt_weights *w = NULL;
    struct rt_engine *e;

    CHECK(rt_weights_random(&model, 1, &w, &err) == 0);
    e = open_part(n, w);
    check_session(e, want, RT_FROM_PACK);
    CHECKF(warnings == warned, "%d clusters: %d warnings, the last: %s", n, warnings, warning);
    check_session(e, want, RT_FROM_PACK);       /* the weights lie as the first one's kernel wants */
    CHECKF(warnings == warned, "%d clusters: a second session warns again: %s", n, warning);
    rt_engine_close(e);
    rt_weights_close(w);
}

/* ---- Tests -------------------------------------------------------------------- */

static void test_parts(void)
{
    static const int most[] = {0, 66, 32, 16, 8}, fewest[] = {0, 66, 29, 13, 5};
    struct gen_gpu g, part;

    CHECK(gen_gpu_read("h200", &g, &err) == 0);
    for (int i = 0; i < 4; i++) {
        CHECK(gen_gpu_part(&g, i, &part) == 0 && part.sms == 132 && part.clusters[0] == 132);
        for (int k = 1; k < 5; k++) {
            const int want = most[k] - i > fewest[k] ? most[k] - i : fewest[k];
            CHECKF(part.clusters[k] == want, "part %d has %d clusters of %d, not %d", i,
                   part.clusters[k], 1 << k, want);
        }
    }
    CHECK(gen_gpu_part(&g, 4, &part) == 0 && !part.clusters[1] && !part.clusters[3]);
    CHECK(gen_gpu_part(&g, 5, &part) == -1);
    CHECK(gen_gpu_read("h100", &g, &err) == 0 && gen_gpu_part(&g, 1, &part) == 0 &&
          part.clusters[3] == 15);
    CHECK(gen_gpu_host(90, &g) == 0 && gen_gpu_part(&g, 0, &part) == 0 &&
          part.clusters[2] == g.clusters[2]);
    CHECK(gen_gpu_part(&g, 1, &part) == 0 && !part.clusters[2] && gen_gpu_part(&g, 2, &part) == -1);
    CHECK(gen_gpu_read("a100", &g, &err) == 0 && gen_gpu_part(&g, 0, &part) == 0 &&
          gen_gpu_part(&g, 1, &part) == -1);
}

/* The H200's own 15 clusters, 16, 14, 13, and none. */
static void test_writing(void)
{
    start_over();
    CHECK(write_pack(NULL) == 5 && compiles == 5 && entries() == 5);
    CHECK(write_pack(NULL) == 5 && compiles == 5 && entries() == 5);
    start_over();
    CHECK(write_pack((const char *[]){"cluster=l2", NULL}) == 1 && entries() == 1);
    start_over();
    CHECK(write_pack((const char *[]){"ctas=120", NULL}) == 2 && entries() == 2);
    start_over();
    CHECK(write_pack((const char *[]){"cluster=cluster", NULL}) == 4 && entries() == 4);
}

static void test_taking(void)
{
    start_over();
    write_pack(NULL);
    ship_pack();
    for (int n = 13; n <= 16; n++)
        check_part(n, n, 0);
    check_part(0, 0, 0);
    check_part(12, 0, 1);
    CHECK_STR(warning, "no pack has the kernel of packed for 12 clusters, or for fewer; the one without "
              "is used");
    remove_part(16);
    check_part(16, 15, 1);
    CHECK_STR(warning, "no pack has the kernel of packed for 16 clusters of 8 CTAs; the one for 15 is "
              "used");
    remove_part(15);
    remove_part(14);
    check_part(15, 13, 1);
    CHECK_STR(warning, "no pack has the kernel of packed for 15 clusters of 8 CTAs; the one for 13 is "
              "used");
    remove_part(13);
    check_part(15, 0, 1);
    check_part(16, 0, 1);
}

/* A compiler makes the kernel for this part; without it and without any that fits, the error is the
   first one, and the engine is as it was. */
static void test_compiling(void)
{
    struct rt_weights *w = NULL;
    struct rt_engine *e;
    struct rt_session *s;

    start_over();
    write_pack(NULL);
    remove_part(0);
    CHECK(rt_weights_random(&model, 1, &w, &err) == 0);
    ship_pack();
    e = open_part(12, w);
    CHECK(rt_session_make(e, CONTEXT, &s, &err) == MK_ETOOL && !s);
    CHECKF(strstr(err.text, "no pack in ") && strstr(err.text, "no NVRTC here"), "%s", err.text);
    CHECK(warnings == 0);
    no_nvrtc = 0;
    check_session(e, 12, RT_FROM_COMPILER);
    CHECK(warnings == 0 && compiles == 6);
    rt_engine_close(e);
    no_nvrtc = 1;
    e = open_part(13, w);
    check_session(e, 13, RT_FROM_PACK);
    rt_engine_close(e);
    rt_weights_close(w);
}

/* An error that another kernel would have too is told, and ends the choice. */
static void test_error(void)
{
    struct rt_weights *w = NULL;
    struct rt_engine *e;
    struct rt_session *s;

    start_over();
    write_pack(NULL);
    ship_pack();
    remove_part(16);
    CHECK(rt_weights_random(&model, 1, &w, &err) == 0);
    e = open_part(16, w);
    setenv("FAKE_CUDA", "arch=90,sms=132,clusters=16,cuModuleLoadData=200", 1);
    CHECK(rt_session_make(e, CONTEXT, &s, &err) == MK_EUNSUPPORTED && !s);
    CHECKF(strstr(err.text, "CUDA_ERROR_INVALID_IMAGE"), "%s", err.text);
    setenv("FAKE_CUDA", "arch=90,sms=132,clusters=16", 1);
    check_session(e, 15, RT_FROM_PACK);
    rt_engine_close(e);
    rt_weights_close(w);
}

int main(void)
{
    char path[4096], cache[64];

    if (!find_fake(path, sizeof path))
        SKIP("libfakecuda.so was not built");
    setenv("MK_CUDA_DRIVER", path, 1);
    if (!mkdtemp(base))
        return 1;
    snprintf(pack, sizeof pack, "%s/pack", base);
    snprintf(cache, sizeof cache, "%s/cache", base);
    setenv("MK_CACHE_DIR", cache, 1);
    read_model();
    test_parts();
    test_writing();
    test_taking();
    test_compiling();
    test_error();
    snprintf(path, sizeof path, "rm -rf %s", base);
    CHECK(system(path) == 0);
    return check_done();
}
