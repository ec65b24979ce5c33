/* sample.h - choose a token from logits; the device does the same in templates/sample.cu.m4. */
#ifndef RT_SAMPLE_H
#define RT_SAMPLE_H
#include <stdint.h>
#include "runtime/mk.h"

/* The rule, in order (LOGITS[V], M their maximum):
   1. temperature 0: the smallest id among the largest logits.
   2. mass of id i: p_i = (uint64) (expf((logits[i] - M) / temperature) * 2^40), truncated.
   3. top_k in 1..V-1: keep every id whose logit is >= the k-th largest logit (ties stay).
   4. top_p < 1: among those, with total mass S, keep every id whose logit is >= the
      largest threshold t for which the mass of the ids with logit >= t is at least
      (uint64) ((double) top_p * S).
   5. the kept id with the largest logits[i] / temperature + g_i, smallest id on a tie,
      where g_i = -logf(-logf(u_i)), u_i = (rt_sample_hash(seed, position, i) >> 41) * 2^-23 + 2^-24
      (exact in float and never 0 or 1: with one bit more, u rounds to 1 and g to infinity once in
      2^24 draws, which in a vocabulary of 150,000 is a random token every hundred).
   Masses are integers, so that sums do not depend on their order.  -0 equals 0.  NaN is below
   every number.  (uint64) ((double) top_p * S) is at least 1: the largest logit always stays.
   Position is the number of tokens before the chosen one. */
int32_t rt_sample(const float *logits, int V, const struct mk_sampling *s, int position);

/* splitmix64's finaliser over the mix of its arguments:
   z = seed + 0x9E3779B97F4A7C15 * ((uint64) position << 32 | id) + 0x9E3779B97F4A7C15;
   z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9; z = (z ^ z >> 27) * 0x94D049BB133111EB; return z ^ z >> 31. */
uint64_t rt_sample_hash(uint64_t seed, uint32_t position, uint32_t id);
#endif
