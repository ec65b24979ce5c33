/* expect.h - what the kernels of tests/prims.cu must give: for tests/t-prims.c. */
#ifndef TESTS_EXPECT_H
#define TESTS_EXPECT_H
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include "runtime/host/matrix.h"

enum { PRIMS_IN = 8192, PRIMS_OUT = 32768, PRIMS_ROUNDS = 40, PRIMS_FIRST = 16 };

struct prims_context {
    int family, fp16, cluster, threads; /* of the plan: PLAN_FAMILY ... PLAN_THREADS */
};

struct prims_test {
    const char *name;
    int family;                         /* the first that has it */
    int ctas, threads;                  /* threads 0: PLAN_THREADS + 32 */
    int cluster, wgmma;                 /* needs clusters (2 of them are launched); needs sm_90a */
    int halves;                         /* the input: 0 any words, 1 halves of about 1 */
    int (*check)(const struct prims_context *c, const uint32_t *in, const uint32_t *out, char *why,
                 size_t size);
};

static uint64_t prims_state;

static uint32_t prims_random(void)
{
    prims_state = prims_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t) (prims_state >> 32);
}

/* Small integers: every order of the sums gives the same. */
static uint16_t prims_half(int fp16)
{
    return host_from_float(!fp16, (float) (int) (prims_random() % 17) - 8.0f);
}

static void prims_input(const struct prims_test *t, const struct prims_context *c, uint32_t *in)
{
    prims_state = 1;
    for (int i = 0; i < PRIMS_IN; i++)
        in[i] = t->halves ? prims_half(c->fp16) | (uint32_t) prims_half(c->fp16) << 16
                          : prims_random();
    if (!strcmp(t->name, "test_mma"))
        for (int i = 0; i < 16 * 32; i++)
            for (int j = 6; j < 10; j++) {
                float x = (float) (int) (prims_random() % 1001) - 500.0f;
                memcpy(&in[i * 10 + j], &x, sizeof x);
            }
}

static uint32_t prims_bits(float x)
{
    uint32_t bits;

    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* OUT[i] is WANT. */
static int prims_same(int i, const uint32_t *out, uint32_t want, char *why, size_t size)
{
    if (out[i] == want)
        return 1;
    snprintf(why, size, "word %d is %08x, not %08x", i, out[i], want);
    return 0;
}

#define CHECKER(name)                                                                              \
    static int name(const struct prims_context *c, const uint32_t *in, const uint32_t *out,        \
                    char *why, size_t size)
#define SAME(i, want)                                                                              \
    do {                                                                                           \
        if (!prims_same(i, out, want, why, size))                                                  \
            return 0;                                                                              \
    } while (0)
#define UNUSED (void) c, (void) in

static int prims_zero(int n, const uint32_t *out, char *why, size_t size)
{
    for (int i = 0; i < n; i++)
        SAME(i, 0);
    return 1;
}

CHECKER(zero32) { UNUSED; return prims_zero(32, out, why, size); }
CHECKER(zero64) { UNUSED; return prims_zero(64, out, why, size); }
CHECKER(zero256) { UNUSED; return prims_zero(256, out, why, size); }
CHECKER(zero_all) { UNUSED; return prims_zero(c->threads + 32, out, why, size); }

CHECKER(shuffle)
{
    UNUSED;
    for (int t = 0; t < 64; t++) {
        int warp = t / 32 * 32, lane = t % 32;

        SAME(t * 6, (uint32_t) (warp + 5) * 3);
        SAME(t * 6 + 1, (uint32_t) (warp + (lane + 1) % 32));
        SAME(t * 6 + 2, (uint32_t) (warp * 32 + 31 * 16));
        SAME(t * 6 + 3, prims_bits((float) (warp + (lane ^ 31))));
        SAME(t * 6 + 4, 7);
        SAME(t * 6 + 5, (uint32_t) (warp + 31 - lane) << 8);
    }
    return 1;
}

CHECKER(ballot)
{
    (void) c;
    for (int t = 0; t < 64; t++)
        for (int i = 0; i < 2; i++) {
            uint32_t want = 0;

            for (int lane = 0; lane < 32; lane++)
                want |= (in[lane] >> (t / 32 + i) & 1) << lane;
            SAME(t * 2 + i, want);
        }
    return 1;
}

CHECKER(ldmatrix)
{
    uint16_t rows[32][8];
    uint32_t want[32][4];

    UNUSED;
    for (int i = 0; i < 32; i++)
        for (int j = 0; j < 8; j++)
            rows[i][j] = (uint16_t) (i * 8 + j);
    for (int transposed = 0; transposed < 2; transposed++) {
        host_ldmatrix(want, (const uint16_t (*)[8]) rows, transposed);
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++)
                SAME(lane * 8 + transposed * 4 + i, want[lane][i]);
    }
    return 1;
}

CHECKER(mma)
{
    for (int n = 0; n < 16; n++) {
        uint32_t a[32][4], b[32][2];
        float d[32][4];

        for (int lane = 0; lane < 32; lane++) {
            const uint32_t *from = in + (n * 32 + lane) * 10;
            memcpy(a[lane], from, sizeof a[lane]);
            memcpy(b[lane], from + 4, sizeof b[lane]);
            memcpy(d[lane], from + 6, sizeof d[lane]);
        }
        host_mma(16, !c->fp16, d, (const uint32_t (*)[4]) a, (const uint32_t (*)[2]) b);
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++)
                SAME((n * 32 + lane) * 4 + i, prims_bits(d[lane][i]));
    }
    return 1;
}

/* pack keeps fp16 finite. */
static uint16_t prims_pack(int fp16, uint32_t bits)
{
    float x;

    memcpy(&x, &bits, sizeof x);
    if (fp16 && x == x)
        x = fminf(fmaxf(x, -65504.0f), 65504.0f);
    return host_from_float(!fp16, x);
}

/* Equal, or both NaN. */
static int prims_value(int i, const uint32_t *out, float want, char *why, size_t size)
{
    float got;

    memcpy(&got, &out[i], sizeof got);
    return (got != got && want != want) || prims_same(i, out, prims_bits(want), why, size);
}

CHECKER(convert)
{
    for (int i = 0; i < 1024; i++) {
        uint32_t a = in[i * 2], b = in[i * 2 + 1];

        SAME(i * 3, prims_pack(c->fp16, a) | (uint32_t) prims_pack(c->fp16, b) << 16);
        if (!prims_value(i * 3 + 1, out, host_to_float(!c->fp16, (uint16_t) a), why, size)
            || !prims_value(i * 3 + 2, out, host_to_float(!c->fp16, (uint16_t) (a >> 16)), why, size))
            return 0;
    }
    return 1;
}

CHECKER(barrier)
{
    UNUSED;
    for (int i = 0; i < c->threads + 32; i++)
        SAME(i, i < c->threads ? 0 : PRIMS_ROUNDS);
    return 1;
}

CHECKER(flags)
{
    UNUSED;
    SAME(0, PRIMS_ROUNDS);
    SAME(1, 0);
    return 1;
}

CHECKER(atomic_add)
{
    UNUSED;
    SAME(0, 512);
    SAME(1, 0);
    SAME(2, 0);
    return 1;
}

CHECKER(mbarrier)
{
    UNUSED;
    SAME(0, 0);
    SAME(1, 1);
    SAME(2, 1);
    SAME(3, 0);
    for (int i = 4; i < 36; i++)
        SAME(i, 0);
    return 1;
}

CHECKER(transactions)
{
    (void) c;
    SAME(0, 0);
    SAME(17, 1);
    SAME(18, 0);
    for (int i = 0; i < 48; i++)
        SAME(i < 16 ? 1 + i : 3 + i, in[i]);
    return 1;
}

CHECKER(bulk)
{
    (void) c;
    for (int r = 0; r < PRIMS_ROUNDS; r++) {
        uint32_t sum = 0;

        for (int i = 0; i < 4 * (1 + r * 37 % 256); i++)
            sum += in[r * 16 + i];
        SAME(r, sum);
    }
    return 1;
}

CHECKER(copies)
{
    (void) c;
    for (int t = 0; t < 64; t++) {
        for (int g = 0; g < 4; g++)
            SAME(t * 6 + g, in[g * 256 + t * 4]);
        SAME(t * 6 + 4, in[768 + (t + 1) % 64 * 4 + 3]);
        SAME(t * 6 + 5, 0);
    }
    return 1;
}

CHECKER(claim)
{
    UNUSED;
    SAME(512, 1);
    SAME(513, 1);
    return 1;
}

CHECKER(system_words)
{
    UNUSED;
    for (int i = 0; i < 4; i++)
        SAME(i, (uint32_t) i);
    SAME(4, 0x89abcdef);
    SAME(5, 0x1234567);
    return 1;
}

CHECKER(cluster)
{
    UNUSED;
    if (!prims_zero(c->cluster * 2 * 64, out, why, size))
        return 0;
    for (int i = 0; i < c->cluster * 2; i++)
        SAME(2048 + i, (uint32_t) (i % c->cluster));
    return 1;
}

CHECKER(wgmma)
{
    const uint16_t *a = (const uint16_t *) in, *b = a + 64 * 16;
    int first = 0;

    for (int sums = 4; sums <= 64; sums = sums == 8 ? 32 : sums * 2) {
        for (int t = 0; t < 128; t++)
            for (int i = 0; i < sums; i++) {
                int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, col = i / 4 * 8 + t % 4 * 2 + i % 2;
                double sum = 0;

                for (int k = 0; k < 16; k++)
                    sum += (double) host_to_float(!c->fp16, a[row * 16 + k])
                         * host_to_float(!c->fp16, b[col * 16 + k]);
                SAME((first + i) * 128 + t, prims_bits((float) (row - col + sum)));
                SAME((first + sums + i) * 128 + t, prims_bits((float) sum));
            }
        first += sums * 2;
    }
    return 1;
}

static const struct prims_test prims_tests[] = {
    {"test_shuffle", 75, 1, 64, 0, 0, 0, shuffle},
    {"test_ballot", 75, 1, 64, 0, 0, 0, ballot},
    {"test_sync_warp", 75, 1, 64, 0, 0, 0, zero64},
    {"test_ldmatrix", 75, 1, 32, 0, 0, 0, ldmatrix},
    {"test_mma", 75, 1, 32, 0, 0, 1, mma},
    {"test_convert", 75, 1, 64, 0, 0, 0, convert},
    {"test_timer", 75, 1, 32, 0, 0, 0, zero32},
    {"test_barrier", 75, 1, 0, 0, 0, 0, barrier},
    {"test_flags", 75, 1, 64, 0, 0, 0, flags},
    {"test_atomic_add", 75, 1, 64, 0, 0, 0, atomic_add},
    {"test_mbarrier", 80, 1, 64, 0, 0, 0, mbarrier},
    {"test_transactions", 90, 1, 32, 0, 0, 0, transactions},
    {"test_bulk", 90, 1, 64, 0, 0, 0, bulk},
    {"test_copies", 75, 1, 64, 0, 0, 0, copies},
    {"test_ring", 75, 1, 0, 0, 0, 0, zero_all},
    {"test_words", 75, 4, 64, 0, 0, 0, zero256},
    {"test_release", 75, 4, 64, 0, 0, 0, zero256},
    {"test_fence", 75, 4, 64, 0, 0, 0, zero256},
    {"test_grid", 75, 4, 64, 0, 0, 0, zero256},
    {"test_own_copies", 75, 4, 64, 0, 0, 0, zero256},
    {"test_same_words", 75, 4, 64, 0, 0, 0, zero256},
    {"test_claim", 75, 4, 64, 0, 0, 0, claim},
    {"test_system", 75, 4, 64, 0, 0, 0, system_words},
    {"test_cluster", 90, 0, 64, 1, 0, 0, cluster},
    {"test_wgmma", 90, 1, 128, 0, 1, 1, wgmma},
    {NULL, 0, 0, 0, 0, 0, 0, NULL}};
#endif
