/* t-gpu.c - GPU profiles: the built-in ones, files of them, and architecture names. */
#include "tests/check.h"
#include "gen/gpu.h"
#include <sys/stat.h>
#include <unistd.h>

static char scratch[] = "/tmp/t-gpu-XXXXXX";
static char path[256];

static void write_file(const void *text, size_t len)
{
    FILE *f = fopen(path, "w");

    if (!f || fwrite(text, 1, len, f) != len || fclose(f)) {
        perror(path);
        exit(1);
    }
}

static void test_profiles(void)
{
    static const char *const want[] = {"h200", "h100", "a100", "l4", "rtx3090", "rtx4090",
                                       "rtx5090", "b200", "t4"};
    struct gen_gpu g, again;
    struct mk_err err;
    const char *name;
    char *text;

    for (size_t i = 0; i < sizeof(want) / sizeof(want[0]); i++)
        CHECKF(gen_gpu_read(want[i], &g, &err) == 0, "%s", want[i]);
    for (int i = 0; (name = gen_gpu_profile(i)); i++) {
        memset(&g, 0, sizeof(g));
        memset(&again, 0, sizeof(again));
        CHECK(gen_gpu_read(name, &g, &err) == 0);
        CHECK_STR(g.name, name);
        CHECK(g.sms > 0 && g.clusters[0] == g.sms && g.mem_gbps > 0 && g.clock_mhz > 0);
        /* What a block may have of an SM's shared memory: all but 1 KiB since sm_80. */
        CHECK(g.smem_block == g.smem_sm - (g.arch == 75 ? 0 : 1024));
        text = gen_gpu_print(&g);
        CHECK(text != NULL);
        write_file(text, strlen(text));
        CHECKF(gen_gpu_read(path, &again, &err) == 0, "%s", err.text);
        CHECKF(!memcmp(&g, &again, sizeof(g)), "%s: printed and read back, it differs", name);
        free(text);
    }
    CHECK(gen_gpu_profile(-1) == NULL && gen_gpu_profile(1000) == NULL);
}

static void test_h200(void)
{
    struct gen_gpu g;
    char *text;

    CHECK(gen_gpu_read("h200", &g, NULL) == 0);
    text = gen_gpu_print(&g);
    CHECK_STR(text,
              "# GPU profile: sizes in bytes, mem_gbps in 1e9 bytes per second,\n"
              "# clusters of 1, 2, 4, 8 and 16 CTAs that fit at once (0: none, or not known)\n"
              "name = h200\narch = 90\nsms = 132\nsmem_block = 232448\nsmem_sm = 233472\n"
              "l2_bytes = 62914560\nclock_mhz = 1980\nmem_gbps = 4800\n"
              "mem_bytes = 141000000000\nclusters = 132 66 30 15 7\n");
    free(text);
}

static void test_defaults(void)
{
    static const struct {
        int arch;
        const char *name;
    } want[] = {{75, "t4"}, {80, "a100"}, {86, "rtx3090"}, {87, "orin"}, {89, "rtx4090"},
                {90, "h200"}, {100, "b200"}, {103, "b300"}, {110, "thor"}, {120, "rtx5090"},
                {121, "gb10"}};
    const int n = sizeof(want) / sizeof(want[0]), *archs = gen_gpu_archs();
    struct gen_gpu g;
    struct mk_err err;

    for (int i = 0; i < n; i++) {
        CHECK(archs[i] == want[i].arch);
        CHECK(gen_gpu_default(want[i].arch, &g, &err) == 0);
        CHECK_STR(g.name, want[i].name);
        CHECK(g.arch == want[i].arch);
    }
    CHECK(archs[n] == 0);
    CHECK(gen_gpu_default(70, &g, &err) == MK_EUNSUPPORTED);
    CHECK_STR(err.text, "architecture 70 is not supported; known are 75, 80, 86, 87, 89, 90, 100, "
                        "103, 110, 120, 121");
    CHECK(gen_gpu_default(0, &g, &err) == MK_EUNSUPPORTED);
}

/* The emulated GPU is the default one, but for its name and its few SMs. */
static void test_host(void)
{
    struct gen_gpu g, real;
    char *text;

    for (const int *arch = gen_gpu_archs(); *arch; arch++) {
        char name[32];

        CHECK(gen_gpu_host(*arch, &g) == 0 && gen_gpu_default(*arch, &real, NULL) == 0);
        snprintf(name, sizeof(name), "host-sm_%d", *arch);
        CHECK_STR(g.name, name);
        CHECK(g.host == 1 && real.host == 0 && g.arch == *arch && g.sms == 16);
        CHECK(g.smem_block == real.smem_block && g.mem_gbps == real.mem_gbps);
        CHECK(g.clusters[0] == 16 && g.clusters[2] == 4 * (*arch >= 90) && g.clusters[4] == (*arch >= 90));
    }
    CHECK(gen_gpu_host(70, &g) == MK_EUNSUPPORTED);
    CHECK(gen_gpu_host(90, &g) == 0);
    text = gen_gpu_print(&g);
    CHECK(text && strstr(text, "name = host-sm_90\n") && !strstr(text, "host = "));
    free(text);
}

static void test_arch_names(void)
{
    static const struct {
        const char *text;
        int arch;
    } want[] = {{"sm_90", 90}, {"sm_90a", 90}, {"90", 90}, {"90a", 90}, {"sm_75", 75},
                {"sm_100f", 100}, {"121", 121}, {"sm_120a", 120},
                {"", 0}, {"sm_", 0}, {"sm_91", 0}, {"sm_80a", 0}, {"sm_90b", 0}, {"sm_90 ", 0},
                {"SM_90", 0}, {"sm_sm_90", 0}, {"-90", 0}, {"+90", 0}, {" 90", 0}, {"090", 0},
                {"9.0", 0}, {"4294967386", 0}, {"sm_90aa", 0}, {"native", 0}, {"70", 0}};

    for (size_t i = 0; i < sizeof(want) / sizeof(want[0]); i++) {
        struct mk_err err;
        int arch = -1, rc = gen_gpu_arch(want[i].text, &arch, &err);

        CHECKF(rc == (want[i].arch ? 0 : MK_EUNSUPPORTED) &&
               arch == (want[i].arch ? want[i].arch : -1), "\"%s\": %d %d", want[i].text, rc, arch);
        if (!strcmp(want[i].text, "sm_91"))
            CHECK_STR(err.text, "architecture \"sm_91\" is not supported; known are sm_ and one "
                                "of 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121");
    }
}

/* A file of TEXT fails with CODE, and the text is PATH and WANT. */
static void check_file(const char *text, size_t len, int code, const char *want)
{
    struct gen_gpu g;
    struct mk_err err = {0, ""};
    char whole[1024];

    write_file(text, len);
    CHECKF(gen_gpu_read(path, &g, &err) == code, "%s", err.text);
    snprintf(whole, sizeof(whole), "%s%s", code ? path : "", want);
    CHECK_STR(err.text, whole);
}

#define FIRST "name = my-gpu\narch=90\r\n\n  sms = 10 # ten\nsmem_block = 100000\n" \
              "smem_sm = 102400\nl2_bytes = 0\nclock_mhz = 1000\n"
#define LAST "mem_gbps = 100\n"
#define CASE(text, code, want) check_file(text, sizeof(text) - 1, code, want)

static void test_files(void)
{
    struct gen_gpu g;

    CASE(FIRST LAST, 0, "");
    CHECK(gen_gpu_read(path, &g, NULL) == 0);
    CHECK(g.sms == 10 && g.clusters[0] == 10 && g.clusters[1] == 0 && g.mem_bytes == 0);
    CASE(FIRST "mem_gbps = 100", 0, "");
    CASE(FIRST LAST "clusters = 10 5 2 1 0", 0, "");
    CASE(FIRST, MK_EFORMAT, ": key \"mem_gbps\" is missing");
    CASE("", MK_EFORMAT, ": key \"arch\" is missing");
    CASE(FIRST LAST "colour = red\n", MK_EFORMAT, ":10: key \"colour\" is not known");
    CASE(FIRST LAST "sms = 11\n", MK_EFORMAT, ":10: key \"sms\" stands there twice");
    CASE("sms\n", MK_EFORMAT, ":1: expected \"key = value\", found \"sms\"");
    CASE("\nsms = 0\n", MK_EFORMAT,
         ":2: key \"sms\": expected an integer from 1 to 1024, found \"0\"");
    CASE("sms = 1e3\n", MK_EFORMAT,
         ":1: key \"sms\": expected an integer from 1 to 1024, found \"1e3\"");
    CASE("sms = \n", MK_EFORMAT, ":1: key \"sms\": expected an integer from 1 to 1024, found \"\"");
    CASE("sms = 1 2\n", MK_EFORMAT,
         ":1: key \"sms\": expected an integer from 1 to 1024, found \"1 2\"");
    CASE("mem_bytes = 99999999999999999999\n", MK_EFORMAT, ":1: key \"mem_bytes\": expected an "
         "integer from 0 to 1125899906842624, found \"99999999999999999999\"");
    CASE("name = ../x\n", MK_EFORMAT, ":1: key \"name\": expected 1 to 31 characters of "
         "[A-Za-z0-9._-], found \"../x\"");
    CASE("name = a`b'\n", MK_EFORMAT, ":1: key \"name\": expected 1 to 31 characters of "
         "[A-Za-z0-9._-], found \"a`b'\"");
    CASE("clusters = 1 2 3\n", MK_EFORMAT, ":1: key \"clusters\": expected 5 integers from 0 to "
         "1024, found \"1 2 3\"");
    CASE("clusters = 1 2 3 4 5 6\n", MK_EFORMAT, ":1: key \"clusters\": more than 5 integers");
    CASE(FIRST LAST "clusters = 10 5 3 1 0", MK_EFORMAT,
         ": key \"clusters\": 3 clusters of 4 are more than 10 SMs");
    CASE("name = x\narch = 88\nsms = 1\nsmem_block = 16384\nsmem_sm = 16384\nl2_bytes = 0\n"
         "clock_mhz = 1\n" LAST, MK_EFORMAT, ": key \"arch\": expected one of 75, 80, 86, 87, 89, "
         "90, 100, 103, 110, 120, 121, found 88");
    CASE("name = x\narch = 90\nsms = 1\nsmem_block = 20000\nsmem_sm = 16384\nl2_bytes = 0\n"
         "clock_mhz = 1\n" LAST, MK_EFORMAT, ": key \"smem_block\": 20000 is more than smem_sm, "
         "16384");
    CASE("sms = 1\n\0sms = 2\n", MK_EFORMAT, ": not a GPU profile: it holds zero bytes");
}

static void test_bad_places(void)
{
    struct gen_gpu g;
    struct mk_err err;
    char *big = malloc(65536);

    CHECK(gen_gpu_read("no-such-gpu", &g, &err) == MK_ENOENT);
    CHECK_STR(err.text, "no-such-gpu: no such file, and no GPU profile of that name; known are: "
              "h200, h100, a100, l4, rtx3090, rtx4090, rtx5090, b200, b300, t4, orin, thor, gb10");
    CHECK(gen_gpu_read("", &g, &err) == MK_ENOENT);
    CHECK(gen_gpu_read(scratch, &g, &err) == MK_EIO);
    memset(big, '\n', 65536);
    write_file(big, 65536);
    CHECK(gen_gpu_read(path, &g, &err) == MK_EFORMAT);
    CHECK(strstr(err.text, ": not a GPU profile: 65536 bytes or more") != NULL);
    free(big);
    unlink(path);
    mkfifo(path, 0600);
    CHECK(gen_gpu_read(path, &g, &err) == MK_EIO);
}

int main(void)
{
    if (!mkdtemp(scratch)) {
        perror(scratch);
        return 1;
    }
    snprintf(path, sizeof(path), "%s/x.gpu", scratch);
    test_profiles();
    test_h200();
    test_defaults();
    test_host();
    test_arch_names();
    test_files();
    test_bad_places();
    unlink(path);
    rmdir(scratch);
    return check_done();
}
