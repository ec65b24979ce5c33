/* matrix.c - fragments and products of ldmatrix, mma and wgmma. */
#include "runtime/host/matrix.h"
#include <string.h>

static float float_of(uint32_t bits)
{
    float x;

    memcpy(&x, &bits, sizeof x);
    return x;
}

static uint32_t bits_of(float x)
{
    uint32_t bits;

    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* ---- Halves */

/* Without branches, so that loops over it are vectorised: they are half the time of an mma. */
static inline float half_float(int bf16, uint32_t x)
{
    uint32_t bits = (x & 0x7fff) << 13, sign = (x & 0x8000) << 16, exponent = x & 0x7c00;
    uint32_t normal = bits + ((exponent == 0x7c00) + 1) * (112u << 23);
    uint32_t subnormal = bits_of(float_of(bits + (113u << 23)) - 0x1p-14f);
    uint32_t is_normal = 0u - (exponent != 0);

    return float_of(bf16 ? x << 16 : (normal & is_normal) | (subnormal & ~is_normal) | sign);
}

float host_to_float(int bf16, uint16_t x)
{
    return half_float(bf16, x);
}

/* X / 2^SHIFT, to nearest even. */
static uint32_t shift_round(uint32_t x, int shift)
{
    uint32_t rest = x & ((1u << shift) - 1), middle = 1u << (shift - 1);

    x >>= shift;
    return x + (rest > middle || (rest == middle && (x & 1)));
}

uint16_t host_from_float(int bf16, float x)
{
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff, y;
    int exponent = (int) (size >> 23) - 112;    /* in fp16 */

    if (size > 0x7f800000)
        return 0x7fff;
    if (bf16)
        y = shift_round(size, 16);
    else if (exponent >= 31)
        y = 0x7c00;
    else if (exponent > 0)
        y = shift_round(size - (112u << 23), 13);       /* may carry up to infinity */
    else if (exponent > -11)
        y = shift_round((size & 0x7fffff) | 0x800000, 14 - exponent);
    else
        y = 0;
    return (uint16_t) (sign | y);
}

/* ---- ldmatrix */

void host_ldmatrix(uint32_t out[32][4], const uint16_t rows[32][8], int transposed)
{
    for (int lane = 0; lane < 32; lane++) {
        int line = lane / 4, pair = lane % 4 * 2;

        for (int i = 0; i < 4; i++) {
            const uint16_t (*m)[8] = rows + i * 8;
            uint32_t low = transposed ? m[pair][line] : m[line][pair];
            uint32_t high = transposed ? m[pair + 1][line] : m[line][pair + 1];

            out[lane][i] = low | high << 16;
        }
    }
}

/* ---- Products */

typedef double pair __attribute__((vector_size(16)));

/* A row of eight columns, in the registers that every machine has. */
struct eight {
    pair v[4];
};

/* c + sum, rounded once. */
static inline float add(float c, double sum)
{
    float x = (float) (c + sum);

    return x == x ? x : float_of(0x7fffffff);
}

/* One row of a times eight columns of b. */
static inline void multiply_row(int k, const double *a, const struct eight *b, struct eight *out)
{
    pair v0 = {0}, v1 = {0}, v2 = {0}, v3 = {0};

    for (int i = 0; i < k; i++) {
        v0 += a[i] * b[i].v[0];
        v1 += a[i] * b[i].v[1];
        v2 += a[i] * b[i].v[2];
        v3 += a[i] * b[i].v[3];
    }
    *out = (struct eight) {{v0, v1, v2, v3}};
}

/* The lower and upper halves of FROM[0..N-1]. */
static inline void unpack(int bf16, int n, const uint32_t *from, float *restrict low,
                          float *restrict high)
{
    for (int i = 0; i < n; i++) {
        low[i] = half_float(bf16, from[i] & 0xffff);
        high[i] = half_float(bf16, from[i] >> 16);
    }
}

/* Fragments, 9.7.14.5.7 (k 8) and 9.7.14.5.8 (k 16): register r of a lane has two columns of row
   lane / 4 of a (r odd: + 8), from column lane % 4 * 2 (r >= 2: + 8) on; two rows of column
   lane / 4 of b, from row lane % 4 * 2 (r = 1: + 8) on; one of row lane / 4 (r >= 2: + 8) of c,
   in column lane % 4 * 2 + r % 2. */
static inline __attribute__((always_inline))
void multiply(int k, int bf16, float c[32][4], const uint32_t a[32][4],
              const uint32_t b[32][2])
{
    float a_low[32][4], a_high[32][4], b_low[32][2], b_high[32][2];
    double rows[16][16];
    struct eight columns[16];

    unpack(bf16, 128, a[0], a_low[0], a_high[0]);
    unpack(bf16, 64, b[0], b_low[0], b_high[0]);
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < k; j += 2) {
            int lane = i % 8 * 4 + j % 8 / 2, r = i / 8 + j / 8 * 2;

            rows[i][j] = a_low[lane][r];
            rows[i][j + 1] = a_high[lane][r];
        }
    for (int i = 0; i < k; i += 2)
        for (int j = 0; j < 8; j++) {
            int lane = j * 4 + i % 8 / 2, r = i / 8;

            columns[i].v[j / 2][j % 2] = b_low[lane][r];
            columns[i + 1].v[j / 2][j % 2] = b_high[lane][r];
        }
    for (int i = 0; i < 16; i++) {
        struct eight sum;

        multiply_row(k, rows[i], columns, &sum);
        for (int j = 0; j < 8; j++) {
            float *to = &c[i % 8 * 4 + j / 2][i / 8 * 2 + j % 2];
            *to = add(*to, sum.v[j / 2][j % 2]);
        }
    }
}

void host_mma(int k, int bf16, float c[32][4], const uint32_t a[32][4], const uint32_t b[32][2])
{
    if (k == 8 && bf16)
        multiply(8, 1, c, a, b);
    else if (k == 8)
        multiply(8, 0, c, a, b);
    else if (bf16)
        multiply(16, 1, c, a, b);
    else
        multiply(16, 0, c, a, b);
}

/* ---- wgmma */

/* A descriptor's matrix (9.7.15.5.1.2.2), read as rows of m or n and columns of k. */
struct matrix {
    uint32_t start, leading, stride;    /* bytes */
    int swizzle;                        /* 0, 1: 128 bytes, 2: 64 bytes, 3: 32 bytes */
    int along_k;                        /* what lies together in memory */
};

static enum host_wgmma_result decode(uint64_t descriptor, int transposed, struct matrix *m)
{
    m->start = (uint32_t) (descriptor & 0x3fff) << 4;
    m->leading = (uint32_t) (descriptor >> 16 & 0x3fff) << 4;
    m->stride = (uint32_t) (descriptor >> 32 & 0x3fff) << 4;
    m->swizzle = (int) (descriptor >> 62);
    m->along_k = !transposed;
    if (descriptor & 0x3ff1c000c000c000u)
        return HOST_WGMMA_DESCRIPTOR;
    return m->swizzle && (descriptor >> 49 & 7) ? HOST_WGMMA_DESCRIPTOR : HOST_WGMMA_DONE;
}

/* Where 8 elements lie that follow each other in memory: LINE counts along the other dimension,
   GROUP eights along this one.  The canonical layouts of 9.7.15.5.1.2.1.3: eight lines are a group
   of lines; each line of a group is 16 bytes without swizzle, else as wide as the pattern. */
static uint32_t place(const struct matrix *m, int line, int group)
{
    int wide = m->swizzle ? 16 >> m->swizzle : 1;       /* eights of a line */
    uint32_t lines = (uint32_t) line / 8, inside = (uint32_t) line % 8 * 16 * (uint32_t) wide;
    uint32_t far = (uint32_t) (group / wide), near = (uint32_t) (group % wide) * 16, at;

    if (m->along_k || m->swizzle)
        at = m->start + lines * m->stride + inside + far * m->leading + near;
    else        /* interleaved: the two strides change places */
        at = m->start + lines * m->leading + inside + far * m->stride + near;
    return at ^ (at >> 7 & (uint32_t) (wide - 1)) << 4;
}

/* The ROWS x 16 elements of a matrix. */
static enum host_wgmma_result read(const struct matrix *m, int rows, int bf16, double (*out)[16],
                                   const unsigned char *shared, size_t size)
{
    int lines = m->along_k ? rows : 16, groups = (m->along_k ? 16 : rows) / 8;

    for (int line = 0; line < lines; line++)
        for (int group = 0; group < groups; group++) {
            uint32_t at = place(m, line, group);
            uint16_t x[8];

            if (at + (size_t) 16 > size)
                return HOST_WGMMA_BOUNDS;
            memcpy(x, shared + at, sizeof x);
            for (int i = 0; i < 8; i++) {
                int along = group * 8 + i;
                double value = half_float(bf16, x[i]);

                if (m->along_k)
                    out[line][along] = value;
                else
                    out[along][line] = value;
            }
        }
    return HOST_WGMMA_DONE;
}

/* D's fragment, 9.7.15.5.1.1.1: thread t has rows t / 32 * 16 + t % 32 / 4 and + 8, of each eight
   columns those from t % 4 * 2 on. */
static void add_row(float *const d[128], int row, int column, const struct eight *sum)
{
    int thread = row / 16 * 32 + row % 8 * 4, first = column / 2 + row % 16 / 8 * 2;

    for (int j = 0; j < 8; j++) {
        float *to = &d[thread + j / 2][first + j % 2];
        *to = add(*to, sum->v[j / 2][j % 2]);
    }
}

enum host_wgmma_result host_wgmma(int n, int bf16, int trans_a, int trans_b, float *const d[128],
                                  uint64_t a, uint64_t b, const unsigned char *shared, size_t size)
{
    double rows[64][16], columns[256][16];
    struct matrix ma, mb;
    enum host_wgmma_result rc;

    if (n < 8 || n > 256 || n % 8)
        return HOST_WGMMA_N;
    if ((rc = decode(a, trans_a, &ma)) || (rc = decode(b, trans_b, &mb)))
        return rc;
    if ((rc = read(&ma, 64, bf16, rows, shared, size))
        || (rc = read(&mb, n, bf16, columns, shared, size)))
        return rc;
    for (int column = 0; column < n; column += 8) {
        struct eight tile[16];

        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 8; j++)
                tile[i].v[j / 2][j % 2] = columns[column + j][i];
        for (int row = 0; row < 64; row++) {
            struct eight sum;

            multiply_row(16, rows[row], tile, &sum);
            add_row(d, row, column, &sum);
        }
    }
    return HOST_WGMMA_DONE;
}
