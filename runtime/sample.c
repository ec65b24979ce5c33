/* sample.c - choose a token from logits without allocating: the top-k and top-p
   thresholds are found by four passes of 256 bins over order-preserving keys. */
#include "runtime/sample.h"
#include <math.h>
#include <string.h>

#define MASS_ONE 1099511627776.0f       /* 2^40: the mass of the largest logit */

/* What decides which ids stay: those with key >= KEEP. */
struct choice {
    const float *logits;
    int V;
    float max, temperature;
    uint32_t keep;
};

uint64_t rt_sample_hash(uint64_t seed, uint32_t position, uint32_t id)
{
    const uint64_t golden = 0x9E3779B97F4A7C15u;
    uint64_t z = seed + golden * ((uint64_t)position << 32 | id) + golden;

    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* A key that orders as the float does; NaN is 0, below -infinity. */
static uint32_t key_of(float x)
{
    uint32_t u;

    if (isnan(x))
        return 0;
    x += 0.0f;                          /* -0 becomes 0 */
    memcpy(&u, &x, sizeof u);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

static uint64_t mass_of(const struct choice *c, int i)
{
    float p = expf((c->logits[i] - c->max) / c->temperature) * MASS_ONE;

    return p >= 1.0f && p <= MASS_ONE ? (uint64_t)p : 0;   /* NaN has none */
}

/* The largest key for which the ids with such a key or a larger one weigh at least
   NEED, among the ids that are kept now.  An id weighs 1, or its mass when BY_MASS. */
static uint32_t threshold(const struct choice *c, uint64_t need, int by_mass)
{
    uint32_t prefix = 0;
    uint64_t above = 0;

    for (int shift = 24; shift >= 0; shift -= 8) {
        uint64_t bins[256] = {0};
        int bin = 255;

        for (int i = 0; i < c->V; i++) {
            uint32_t key = key_of(c->logits[i]);

            /* shifted in 64 bits: the first pass has no prefix, and 32 is too far for a uint32_t */
            if (key >= c->keep && ((uint64_t)(key ^ prefix) >> (shift + 8)) == 0)
                bins[key >> shift & 255] += by_mass ? mass_of(c, i) : 1;
        }
        while (bin > 0 && above + bins[bin] < need)
            above += bins[bin--];
        prefix |= (uint32_t)bin << shift;
    }
    return prefix;
}

static uint64_t kept_mass(const struct choice *c)
{
    uint64_t sum = 0;

    for (int i = 0; i < c->V; i++)
        if (key_of(c->logits[i]) >= c->keep)
            sum += mass_of(c, i);
    return sum;
}

static float gumbel(uint64_t seed, int position, int id)
{
    uint64_t h = rt_sample_hash(seed, (uint32_t)position, (uint32_t)id) >> 41;
    float u = (float)h * 0x1p-23f + 0x1p-24f;

    return -logf(-logf(u));
}

int32_t rt_sample(const float *logits, int V, const struct mk_sampling *s, int position)
{
    struct choice c = {logits, V, logits[0], s->temperature, 0};
    int32_t best = 0;
    float best_score = 0;
    int found = 0;

    for (int i = 1; i < V; i++)
        if (key_of(logits[i]) > key_of(logits[best]))
            best = i;
    if (s->temperature == 0.0f)
        return best;
    c.max = logits[best];
    if (s->top_k >= 1 && s->top_k < V)
        c.keep = threshold(&c, (uint64_t)s->top_k, 0);
    if (s->top_p < 1.0f) {
        uint64_t need = (uint64_t)((double)s->top_p * (double)kept_mass(&c));

        c.keep = threshold(&c, need ? need : 1, 1);
    }
    for (int i = 0; i < V; i++) {
        float score;

        if (key_of(logits[i]) < c.keep || isnan(logits[i]))
            continue;
        score = logits[i] / s->temperature + gumbel(s->seed, position, i);
        if (!found || score > best_score) {
            found = 1;
            best_score = score;
            best = i;
        }
    }
    return best;
}
