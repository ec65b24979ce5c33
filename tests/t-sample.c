/* t-sample.c - the choice of a token: a slow reference, statistics, ties, odd numbers. */
#include "runtime/sample.h"
#include "tests/check.h"

static uint64_t state = 1;

static uint64_t random64(void)
{
    state += 0x9E3779B97F4A7C15u;
    return rt_sample_hash(state, 1, 2);
}

static float uniform(void)
{
    return (float)(random64() >> 40) * 0x1p-24f;
}

static void check_hash(void)
{
    CHECK(rt_sample_hash(0, 0, 0) == 0xe220a8397b1dcdafu);     /* splitmix64's first output */
    CHECK(rt_sample_hash(1, 2, 3) == 0x12e80ffcfbbbd251u);
    CHECK(rt_sample_hash(UINT64_MAX, UINT32_MAX, UINT32_MAX) == 0xb4d055fcf2cbbd7bu);
    CHECK(rt_sample_hash(1234567, 4000, 151935) == 0x8eb30934a8552151u);
}

static void check_greedy(void)
{
    struct mk_sampling s = {.size = sizeof s, .top_p = 1};
    float a[] = {1, 3, 3, 2}, b[] = {-INFINITY, -5, -5}, c[] = {NAN, 1, NAN, 2}, d[] = {0.0f};
    float e[] = {-0.0f, 0.0f}, f[] = {NAN, NAN}, g[] = {1, INFINITY, INFINITY};

    CHECK(rt_sample(a, 4, &s, 0) == 1);         /* the first of equals */
    CHECK(rt_sample(b, 3, &s, 0) == 1);
    CHECK(rt_sample(c, 4, &s, 0) == 3);
    CHECK(rt_sample(d, 1, &s, 0) == 0);
    CHECK(rt_sample(e, 2, &s, 0) == 0);
    CHECK(rt_sample(f, 2, &s, 0) == 0);
    CHECK(rt_sample(g, 3, &s, 0) == 1);
    s.top_k = 1;                                /* greedy wins over top-k and top-p */
    s.top_p = 0.1f;
    CHECK(rt_sample(a, 4, &s, 0) == 1);
}

/* ---- The rule of sample.h, as slow as it reads ---- */

static uint64_t mass(const float *logits, int i, float max, float temperature)
{
    return (uint64_t)(expf((logits[i] - max) / temperature) * 1099511627776.0f);
}

static int descending(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;

    return x > y ? -1 : x < y;
}

static float kth_largest(const float *logits, int V, int k)
{
    float *sorted = malloc(sizeof *sorted * (size_t)V), x;

    memcpy(sorted, logits, sizeof *sorted * (size_t)V);
    qsort(sorted, (size_t)V, sizeof *sorted, descending);
    x = sorted[k - 1];
    free(sorted);
    return x;
}

/* The top-p threshold: from the largest logit down, until the mass is enough. */
static float nucleus(const float *logits, int V, float floor, float temperature, float p)
{
    float max = kth_largest(logits, V, 1);
    uint64_t total = 0, need, have = 0;

    for (int i = 0; i < V; i++)
        total += logits[i] >= floor ? mass(logits, i, max, temperature) : 0;
    need = (uint64_t)((double)p * (double)total);
    need = need ? need : 1;
    for (int k = 1; ; k++) {
        float t = kth_largest(logits, V, k);

        have = 0;
        for (int i = 0; i < V; i++)
            have += logits[i] >= t ? mass(logits, i, max, temperature) : 0;
        if (have >= need)
            return t;
    }
}

static int32_t reference(const float *logits, int V, const struct mk_sampling *s, int position)
{
    float keep = -INFINITY, best_score = 0;
    int32_t best = -1;

    if (s->top_k >= 1 && s->top_k < V)
        keep = kth_largest(logits, V, s->top_k);
    if (s->top_p < 1)
        keep = nucleus(logits, V, keep, s->temperature, s->top_p);
    for (int i = 0; i < V; i++) {
        uint64_t h = rt_sample_hash(s->seed, (uint32_t)position, (uint32_t)i);
        float u = (float)(h >> 41) / 8388608.0f + 1 / 16777216.0f;
        float score = logits[i] / s->temperature + -logf(-logf(u));

        if (logits[i] >= keep && (best < 0 || score > best_score)) {
            best = i;
            best_score = score;
        }
    }
    return best;
}

static void random_case(int n)
{
    int V = 1 + (int)(random64() % 60), position = (int)(random64() % 5000);
    float logits[60], step = n % 3 ? 0.0f : 0.5f;      /* every third case is full of ties */
    struct mk_sampling s = {
        .size = sizeof s,
        .temperature = 0.05f + 2 * uniform(),
        .top_k = random64() % 2 ? (int)(random64() % (uint64_t)(V + 1)) : 0,
        .top_p = random64() % 2 ? 1.0f : uniform() + 1e-7f,
        .seed = random64(),
    };
    int32_t got, want;

    for (int i = 0; i < V; i++) {
        logits[i] = 20 * uniform() - 10;
        if (step)
            logits[i] = step * roundf(logits[i] / step);
        if (random64() % 16 == 0)
            logits[i] = -INFINITY;
    }
    logits[0] = 0;                              /* something finite */
    got = rt_sample(logits, V, &s, position);
    want = reference(logits, V, &s, position);
    CHECKF(got == want, "case %d: V %d, T %g, k %d, p %g: got %d, want %d", n, V, s.temperature,
           s.top_k, s.top_p, (int)got, (int)want);
    CHECK(rt_sample(logits, V, &s, position) == got);
}

/* ---- Statistics ---- */

enum { DRAWS = 40000 };

/* Pearson's statistic of DRAWS choices among N logits against P; the draws go over seeds,
   or over the positions of one seed. */
static double chi_square(const float *logits, int n, struct mk_sampling s, const double *p,
                         int over_seeds)
{
    int seen[64] = {0};
    double chi = 0;

    for (int i = 0; i < DRAWS; i++) {
        s.seed = over_seeds ? (uint64_t)i : 42;
        seen[rt_sample(logits, n, &s, over_seeds ? 100 : i)]++;
    }
    for (int i = 0; i < n; i++) {
        double expected = p[i] * DRAWS;

        if (p[i] == 0) {
            CHECKF(seen[i] == 0, "id %d was chosen and is outside top-k or top-p", i);
            continue;
        }
        chi += (seen[i] - expected) * (seen[i] - expected) / expected;
    }
    return chi;
}

/* The exact softmax over the KEPT largest of N descending logits. */
static void softmax(const float *logits, int n, int kept, double temperature, double *p)
{
    double sum = 0;

    for (int i = 0; i < n; i++) {
        p[i] = i < kept ? exp(logits[i] / temperature) : 0;
        sum += p[i];
    }
    for (int i = 0; i < n; i++)
        p[i] /= sum;
}

static void check_statistics(void)
{
    static const float logits[10] = {3, 2.5f, 2.2f, 2, 1.5f, 1.4f, 1, 0, -0.5f, -1};
    static const struct {
        float temperature, top_p;
        int top_k, kept;
    } cases[] = {
        {1, 1, 0, 10}, {0.7f, 1, 0, 10}, {2, 1, 0, 10}, {1, 1, 3, 3}, {0.8f, 1, 1, 1},
        {1, 0.5f, 0, 2},        /* 0.324 + 0.197 >= 0.5 */
        {1, 0.9f, 6, 5},        /* 0.351 0.213 0.158 0.129 0.078 | 0.071: 0.929 at five */
        {1, 0.01f, 0, 1}, {1, 1, 10, 10}, {1, 1, 400, 10},
    };
    double p[10];

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct mk_sampling s = {.size = sizeof s, .temperature = cases[i].temperature,
                                .top_k = cases[i].top_k, .top_p = cases[i].top_p};

        softmax(logits, 10, cases[i].kept, cases[i].temperature, p);
        for (int over = 0; over < 2; over++) {
            double chi = chi_square(logits, 10, s, p, over);

            /* 99.9 % of such sums with 9 degrees of freedom are below 27.9 */
            CHECKF(chi < 27.9, "case %zu: chi square %g", i, chi);
        }
    }
}

/* Equal logits at the threshold of top-k stay, all of them. */
static void check_ties(void)
{
    float logits[] = {1, 5, 3, 3, 3, 0};
    struct mk_sampling s = {.size = sizeof s, .temperature = 1, .top_k = 2, .top_p = 1};
    int seen[6] = {0};

    for (s.seed = 0; s.seed < 2000; s.seed++)
        seen[rt_sample(logits, 6, &s, 7)]++;
    CHECK(seen[0] == 0 && seen[5] == 0 && seen[1] > 0);
    CHECK(seen[2] > 0 && seen[3] > 0 && seen[4] > 0);
}

/* 150,000 hopeless ids must stay hopeless: none may draw an infinite g. */
static void check_large(void)
{
    enum { V = 151936 };
    float *logits = malloc(V * sizeof *logits);
    struct mk_sampling s = {.size = sizeof s, .temperature = 1, .top_p = 1};
    int wrong = 0;

    for (int i = 0; i < V; i++)
        logits[i] = -30;
    logits[V - 1] = 0;
    for (s.seed = 0; s.seed < 200; s.seed++)
        wrong += rt_sample(logits, V, &s, (int)s.seed) != V - 1;
    CHECKF(wrong == 0, "%d of 200 draws took a token of probability 1e-13", wrong);
    s.top_k = 50;
    s.top_p = 0.95f;
    CHECK(rt_sample(logits, V, &s, 3) == V - 1);
    free(logits);
}

/* Numbers that a broken model makes give some id, and no undefined behaviour. */
static void check_odd(void)
{
    float odd[][4] = {{NAN, NAN, NAN, NAN}, {NAN, 1, 2, NAN}, {INFINITY, 1, 2, 3},
                      {-INFINITY, -INFINITY, -INFINITY, -INFINITY}, {3e38f, -3e38f, 0, NAN},
                      {INFINITY, INFINITY, -INFINITY, NAN}};
    struct mk_sampling s = {.size = sizeof s, .seed = 5};

    for (size_t i = 0; i < sizeof odd / sizeof odd[0]; i++)
        for (int k = 0; k < 5; k++)
            for (int p = 0; p < 3; p++) {
                int32_t id;

                s.temperature = 1e-6f;
                s.top_k = k;
                s.top_p = p == 0 ? 1e-30f : p == 1 ? 0.5f : 1;
                id = rt_sample(odd[i], 4, &s, 9);
                CHECK(id >= 0 && id < 4);
                CHECK(i == 0 || !isnan(odd[i][id]));
            }
}

int main(void)
{
    check_hash();
    check_greedy();
    for (int n = 0; n < 20000; n++)
        random_case(n);
    check_statistics();
    check_ties();
    check_large();
    check_odd();
    return check_done();
}
