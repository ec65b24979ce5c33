/* t-matrix.c - ldmatrix, mma and wgmma of the host against products of whole matrices, whose
   elements are placed by the manual's formulas. */
#include "runtime/host/matrix.h"
#include "tests/check.h"

static uint64_t state = 1;

static uint32_t random32(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t) (state >> 32);
}

static uint32_t bits_of(float x)
{
    uint32_t bits;

    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* ---- Halves */

/* The value of finite bits, by the definition of the formats. */
static double value_of(int bf16, uint16_t x)
{
    int exponent = bf16 ? x >> 7 & 0xff : x >> 10 & 0x1f, fraction = bf16 ? x & 0x7f : x & 0x3ff;
    int digits = bf16 ? 7 : 10, bias = bf16 ? 127 : 15;
    double size = exponent ? ldexp(fraction + (1 << digits), exponent - bias - digits)
                           : ldexp(fraction, 1 - bias - digits);

    return x & 0x8000 ? -size : size;
}

static void check_halves(int bf16)
{
    uint32_t infinite = bf16 ? 0x7f80 : 0x7c00;
    int wrong = 0;

    for (uint32_t i = 0; i < 0x10000; i++) {
        uint16_t x = (uint16_t) i;
        float f = host_to_float(bf16, x);

        if ((i & 0x7fff) > infinite)
            wrong += f == f || host_from_float(bf16, f) != 0x7fff;
        else if ((i & 0x7fff) == infinite)
            wrong += f != (i & 0x8000 ? -INFINITY : INFINITY) || host_from_float(bf16, f) != x;
        else
            wrong += f != (float) value_of(bf16, x) || !signbit(f) != !(i & 0x8000)
                  || host_from_float(bf16, f) != x;
    }
    CHECKF(!wrong, "%d of the halves", wrong);

    wrong = 0;
    for (uint32_t i = 0; i + 1 < infinite; i++) {       /* between neighbours */
        double low = value_of(bf16, (uint16_t) i), high = value_of(bf16, (uint16_t) (i + 1));
        float middle = (float) ((low + high) / 2);
        uint16_t even = (uint16_t) (i + (i & 1));

        wrong += host_from_float(bf16, middle) != even
              || host_from_float(bf16, -middle) != (even | 0x8000)
              || host_from_float(bf16, nextafterf(middle, 0)) != i
              || host_from_float(bf16, nextafterf(middle, INFINITY)) != i + 1;
    }
    CHECKF(!wrong, "%d of the middles", wrong);
}

static void check_large(void)
{
    CHECK(host_from_float(0, 65519.0f) == 0x7bff);      /* below the middle to 2^16 */
    CHECK(host_from_float(0, 65520.0f) == 0x7c00);
    CHECK(host_from_float(0, -1e30f) == 0xfc00);
    CHECK(host_from_float(0, 0x1p-149f) == 0);
    CHECK(host_from_float(0, -0x1p-26f) == 0x8000);
    CHECK(host_from_float(1, 3.4028235e38f) == 0x7f80);
    CHECK(host_from_float(1, 0x1p-149f) == 0);
    CHECK(host_from_float(0, -NAN) == 0x7fff);
}

/* ---- ldmatrix */

static void check_ldmatrix(void)
{
    uint16_t rows[32][8];
    uint32_t out[32][4];
    int wrong = 0;

    for (int i = 0; i < 32; i++)
        for (int j = 0; j < 8; j++)
            rows[i][j] = (uint16_t) (i * 8 + j);
    for (int trans = 0; trans < 2; trans++) {
        host_ldmatrix(out, rows, trans);
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++)
                for (int half = 0; half < 2; half++) {  /* 9.7.14.5.15, figures of the fragments */
                    int row = lane / 4, col = lane % 4 * 2 + half;
                    int want = trans ? i * 64 + col * 8 + row : i * 64 + row * 8 + col;

                    wrong += (int) (out[lane][i] >> half * 16 & 0xffff) != want;
                }
    }
    CHECKF(!wrong, "%d elements", wrong);
}

/* ---- mma */

struct shape {
    uint16_t a[64][16], b[16][256];
    float c[64][256];
};

/* Random halves; KIND 0: of about 1, 1: of any finite size, 2: subnormal, 3: with NaN and inf. */
static uint16_t random_half(int bf16, int kind)
{
    uint32_t sign = random32() & 0x8000, infinite = bf16 ? 0x7f80 : 0x7c00;

    if (kind == 3 && random32() % 50 == 0)
        return (uint16_t) (sign | infinite | (random32() % 2 ? 0 : 1 + random32() % 0x7f));
    if (kind == 2)
        return (uint16_t) (sign | random32() % (bf16 ? 0x80 : 0x400));
    if (kind == 1)
        return (uint16_t) (sign | random32() % infinite);
    return host_from_float(bf16, (float) (int32_t) random32() * 0x1p-31f);
}

static void fill(struct shape *s, int m, int n, int k, int bf16, int kind)
{
    for (int i = 0; i < m; i++)
        for (int j = 0; j < k; j++)
            s->a[i][j] = random_half(bf16, kind);
    for (int i = 0; i < k; i++)
        for (int j = 0; j < n; j++)
            s->b[i][j] = random_half(bf16, kind);
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++)
            s->c[i][j] = kind == 2 && !bf16 ? (float) (int32_t) random32() * 0x1p-75f
                                            : (float) (int32_t) random32() * 0x1p-30f;
}

static float product(const struct shape *s, int row, int col, int k, int bf16)
{
    double sum = 0;

    for (int i = 0; i < k; i++)
        sum += (double) host_to_float(bf16, s->a[row][i]) * host_to_float(bf16, s->b[i][col]);
    return (float) (s->c[row][col] + sum);
}

/* The same bits, or both a NaN as the tensor cores make it. */
static int same(float got, float want)
{
    return bits_of(got) == (want == want ? bits_of(want) : 0x7fffffff);
}

static int a_row(int lane, int i) { return lane / 4 + ((i & 2) ? 8 : 0); }
static int a_col(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i >= 4 ? 8 : 0); }
static int b_row(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i >= 2 ? 8 : 0); }
static int c_row(int lane, int i) { return lane / 4 + (i >= 2 ? 8 : 0); }
static int c_col(int lane, int i) { return lane % 4 * 2 + (i & 1); }

static void check_mma(int k, int bf16, int kind)
{
    static struct shape s;
    uint32_t a[32][4] = {{0}}, b[32][2] = {{0}};
    float c[32][4];
    int wrong = 0;

    fill(&s, 16, 8, k, bf16, kind);
    for (int lane = 0; lane < 32; lane++) {     /* 9.7.14.5.7 and 9.7.14.5.8 */
        for (int i = 0; i < k / 2; i++)
            a[lane][i / 2] |= (uint32_t) s.a[a_row(lane, i)][a_col(lane, i)] << i % 2 * 16;
        for (int i = 0; i < k / 4; i++)
            b[lane][i / 2] |= (uint32_t) s.b[b_row(lane, i)][lane / 4] << i % 2 * 16;
        for (int i = 0; i < 4; i++)
            c[lane][i] = s.c[c_row(lane, i)][c_col(lane, i)];
    }
    host_mma(k, bf16, c, (const uint32_t (*)[4]) a, (const uint32_t (*)[2]) b);
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++)
            wrong += !same(c[lane][i], product(&s, c_row(lane, i), c_col(lane, i), k, bf16));
    CHECKF(!wrong, "k %d, bf16 %d, kind %d: %d of 128 sums", k, bf16, kind, wrong);
}

/* ldmatrix brings what mma takes: A as it lies, and B with the columns of B as rows. */
static void check_together(void)
{
    static struct shape s;
    uint16_t rows[32][8];
    uint32_t a[32][4], q[32][4], b[32][2];
    float c[32][4] = {{0}};
    int wrong = 0;

    fill(&s, 16, 8, 16, 1, 0);
    memset(s.c, 0, sizeof s.c);
    for (int i = 0; i < 32; i++)
        memcpy(rows[i], &s.a[i % 16][i / 16 * 8], sizeof rows[i]);
    host_ldmatrix(a, (const uint16_t (*)[8]) rows, 0);
    for (int i = 0; i < 32; i++)
        for (int j = 0; j < 8; j++)
            rows[i][j] = i < 16 ? s.b[i / 8 * 8 + j][i % 8] : 0;
    host_ldmatrix(q, (const uint16_t (*)[8]) rows, 0);
    for (int lane = 0; lane < 32; lane++)
        memcpy(b[lane], q[lane], sizeof b[lane]);
    host_mma(16, 1, c, (const uint32_t (*)[4]) a, (const uint32_t (*)[2]) b);
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++)
            wrong += !same(c[lane][i], product(&s, c_row(lane, i), c_col(lane, i), 16, 1));
    CHECKF(!wrong, "%d of 128 sums", wrong);
}

/* ---- wgmma */

enum { PATTERN = 1024, MATRIX = 96 * 1024, SHARED = PATTERN + 2 * MATRIX };

/* A layout of a matrix whose rows are m or n: where element (row, k) lies, in bytes from the
   matrix's start, which is a multiple of 1024.  The canonical layouts, 9.7.15.5.1.2.1.3. */
struct layout {
    int swizzle, trans;
    uint32_t leading, stride;
};

static uint32_t swizzled(int mode, uint32_t at)
{
    if (mode == 1)
        return at ^ (at & 0x380) >> 3;          /* 128 bytes: bits 7-9 into 4-6 */
    if (mode == 2)
        return at ^ (at & 0x180) >> 3;
    return mode == 3 ? at ^ (at & 0x080) >> 3 : at;
}

static uint32_t place(const struct layout *l, int row, int k)
{
    static const int width[] = {8, 64, 32, 16}; /* elements, in memory order, of one line */
    uint32_t w = (uint32_t) width[l->swizzle], r = (uint32_t) row, c = (uint32_t) k, at;

    if (!l->trans && !l->swizzle)
        at = r % 8 * 16 + r / 8 * l->stride + c % 8 * 2 + c / 8 * l->leading;
    else if (!l->trans)
        at = r % 8 * w * 2 + r / 8 * l->stride + c * 2;
    else if (!l->swizzle)
        at = r % 8 * 2 + r / 8 * l->stride + c % 8 * 16 + c / 8 * l->leading;
    else
        at = r % w * 2 + r / w * l->leading + c % 8 * w * 2 + c / 8 * l->stride;
    return swizzled(l->swizzle, at);
}

static uint64_t descriptor(const struct layout *l, uint32_t start)
{
    return (uint64_t) l->swizzle << 62 | (uint64_t) (l->stride >> 4) << 32
         | (uint64_t) (l->leading >> 4) << 16 | (start & 0x3ffff) >> 4;
}

/* Strides that leave gaps, so that a wrong one is seen. */
static struct layout layout_of(int swizzle, int trans, int rows)
{
    struct layout l = {swizzle, trans, 0, 0};
    uint32_t pattern = swizzle ? 2048u >> swizzle : 128, groups = (uint32_t) rows / 8;

    if (!trans) {
        l.stride = pattern + (swizzle ? pattern : 16);
        l.leading = swizzle ? 16 : groups * l.stride + 48;
    } else {
        l.stride = swizzle ? pattern * 2 : 160;
        l.leading = swizzle ? pattern * 5 : groups * l.stride + 48;
    }
    return l;
}

/* The registers of all threads, and the pointers that host_wgmma takes. */
struct registers {
    float d[128][128], *to[128];
};

static void put(unsigned char *shared, uint32_t at, uint16_t x)
{
    memcpy(shared + at, &x, sizeof x);
}

static int d_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
static int d_col(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

static void check_wgmma(int n, int bf16, const struct layout *la, const struct layout *lb, int kind)
{
    static struct shape s;
    static struct registers r;
    static unsigned char shared[SHARED];
    uint32_t a = PATTERN, b = PATTERN + MATRIX;
    int wrong = 0, rc;

    memset(shared, 0xff, sizeof shared);        /* a NaN */
    fill(&s, 64, n, 16, bf16, kind);
    for (int k = 0; k < 16; k++) {
        for (int i = 0; i < 64; i++)
            put(shared, a + place(la, i, k), s.a[i][k]);
        for (int i = 0; i < n; i++)
            put(shared, b + place(lb, i, k), s.b[k][i]);
    }
    for (int t = 0; t < 128; t++) {
        r.to[t] = r.d[t];
        for (int i = 0; i < n / 2; i++)
            r.d[t][i] = s.c[d_row(t, i)][d_col(t, i)];
    }
    rc = host_wgmma(n, bf16, la->trans, lb->trans, r.to, descriptor(la, a), descriptor(lb, b),
                    shared, sizeof shared);
    CHECKF(rc == 0, "n %d: result %d", n, rc);
    for (int t = 0; t < 128; t++)
        for (int i = 0; i < n / 2; i++)
            wrong += !same(r.d[t][i], product(&s, d_row(t, i), d_col(t, i), 16, bf16));
    CHECKF(!wrong, "n %d, bf16 %d, swizzles %d %d, transposed %d %d: %d sums", n, bf16, la->swizzle,
           lb->swizzle, la->trans, lb->trans, wrong);
}

static void check_wgmma_layouts(void)
{
    for (int n = 8; n <= 256; n += 8)
        for (int mode = 0; mode < 8; mode++) {  /* of B; A goes through all of them meanwhile */
            int other = (mode + n / 8) % 8;
            struct layout a = layout_of(other % 4, other / 4, 64);
            struct layout b = layout_of(mode % 4, mode / 4, n);

            check_wgmma(n, n / 8 % 2, &a, &b, n % 32 / 8);
        }
}

/* The second 16 columns of a swizzled matrix begin 32 bytes on, inside the pattern. */
static void check_wgmma_step(void)
{
    static unsigned char shared[8192 + 1024];
    static struct registers r;
    const struct layout l = {1, 0, 16, 1024}, eight = {0, 0, 128, 256};
    int wrong = 0;

    for (int row = 0; row < 64; row++)
        for (int k = 0; k < 64; k++)
            put(shared, place(&l, row, k), host_from_float(1, k == 16 ? (float) row : 0));
    for (int k = 0; k < 16; k++)
        for (int col = 0; col < 8; col++)
            put(shared, 8192 + place(&eight, col, k), host_from_float(1, k == 0 ? 1 : 0));
    for (int t = 0; t < 128; t++)
        r.to[t] = r.d[t];
    CHECK(host_wgmma(8, 1, 0, 0, r.to, descriptor(&l, 32), descriptor(&eight, 8192), shared,
                     sizeof shared) == HOST_WGMMA_DONE);
    for (int t = 0; t < 128; t++)
        for (int i = 0; i < 4; i++)
            wrong += r.d[t][i] != (float) d_row(t, i);
    CHECKF(!wrong, "%d sums", wrong);
}

static void check_wgmma_refused(void)
{
    static struct registers r;
    static unsigned char shared[8192];
    const struct layout l = {0, 0, 128, 256};
    int touched = 0;
    uint64_t a = descriptor(&l, 0), b = descriptor(&l, 2048);

    for (int t = 0; t < 128; t++)
        r.to[t] = r.d[t];
    CHECK(host_wgmma(8, 1, 0, 0, r.to, a, b, shared, 2048 + 256) == HOST_WGMMA_DONE);
    CHECK(host_wgmma(8, 1, 0, 0, r.to, a, b, shared, 2048 + 255) == HOST_WGMMA_BOUNDS);
    CHECK(host_wgmma(8, 1, 0, 0, r.to, b, a, shared, 4095) == HOST_WGMMA_BOUNDS);
    CHECK(host_wgmma(8, 1, 0, 0, r.to, a, b, shared, 0) == HOST_WGMMA_BOUNDS);
    CHECK(host_wgmma(256, 1, 0, 0, r.to, a, a | (uint64_t) 0x3fff << 32, shared, sizeof shared)
          == HOST_WGMMA_BOUNDS);
    CHECK(host_wgmma(0, 1, 0, 0, r.to, a, b, shared, sizeof shared) == HOST_WGMMA_N);
    CHECK(host_wgmma(12, 1, 0, 0, r.to, a, b, shared, sizeof shared) == HOST_WGMMA_N);
    CHECK(host_wgmma(264, 1, 0, 0, r.to, a, b, shared, sizeof shared) == HOST_WGMMA_N);
    CHECK(host_wgmma(8, 1, 0, 0, r.to, a | 1u << 14, b, shared, sizeof shared)
          == HOST_WGMMA_DESCRIPTOR);
    CHECK(host_wgmma(8, 1, 0, 0, r.to, a, b | (uint64_t) 1 << 52, shared, sizeof shared)
          == HOST_WGMMA_DESCRIPTOR);
    CHECK(host_wgmma(8, 1, 0, 0, r.to, a, b | (uint64_t) 1 << 62 | (uint64_t) 1 << 49, shared,
                     sizeof shared) == HOST_WGMMA_DESCRIPTOR);
    for (int t = 0; t < 128; t++)
        for (int i = 0; i < 128; i++)
            touched += r.d[t][i] != 0;
    CHECK(!touched);
}

int main(void)
{
    check_halves(0);
    check_halves(1);
    check_large();
    check_ldmatrix();
    for (int k = 8; k <= 16; k += 8)
        for (int bf16 = 0; bf16 < 2; bf16++)
            for (int kind = 0; kind < 4; kind++)
                for (int round = 0; round < 20; round++)
                    check_mma(k, bf16, kind);
    check_together();
    check_wgmma_layouts();
    check_wgmma_step();
    check_wgmma_refused();
    return check_done();
}
