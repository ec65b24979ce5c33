t_section({|Attention over the KV cache, whose tiles are dealt to the ranks, or to those of a team|})

// One head's E values, 2 x E/64 a lane: pair i of a lane is dimensions lane + 32 i and that
// plus E/2, which rotate together.
struct Head_values {
    static constexpr int PAIRS = E / 64;
    float a[PAIRS], b[PAIRS];

    __device__ __forceinline__ void load(const float *from)
    {
        #pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            a[i] = from[threadIdx.x % 32 + i * 32];
            b[i] = from[threadIdx.x % 32 + i * 32 + E / 2];
        }
    }
    // To rms 1, times WEIGHT.
    __device__ __forceinline__ void norm(const Head_values &weight)
    {
        float sum = 0.0f;
        #pragma unroll
        for (int i = 0; i < PAIRS; i++)
            sum += a[i] * a[i] + b[i] * b[i];
        #pragma unroll
        for (int i = 16; i; i /= 2)
            sum += __shfl_xor_sync(~0u, sum, i);
        const float scale = rsqrtf(sum * (1.0f / E) + EPS);
        #pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            a[i] *= scale * weight.a[i];
            b[i] *= scale * weight.b[i];
        }
    }
    // As halves.
    __device__ __forceinline__ void store(half *to, float scale) const
    {
        #pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const int e = threadIdx.x % 32 + i * 32;
            to[e] = to_half(a[i] * scale);
            to[e + E / 2] = to_half(b[i] * scale);
        }
    }
    // By the angles whose cosines and sines are ROPE[E/2][2].
    __device__ __forceinline__ void rotate(const float2 (&rope)[PAIRS])
    {
        #pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const float x = a[i], y = b[i];
            a[i] = x * rope[i].x - y * rope[i].y;
            b[i] = y * rope[i].x + x * rope[i].y;
        }
    }
};

// What rows are normed and rotated with, read before they come.
struct Attention_constants {
    float2 rope[Head_values::PAIRS];
t_if(MODEL_QK_NORM, {|    Head_values q_norm, k_norm;
|})m4_dnl

    __device__ __forceinline__ void load(int pos, const float *vec)
    {
        #pragma unroll
        for (int i = 0; i < Head_values::PAIRS; i++)
            rope[i] = ((const float2 *)S->args.rope)[(u64)pos * (E / 2) + threadIdx.x % 32 + i * 32];
t_if(MODEL_QK_NORM, {|        q_norm.load(vec + VEC_Q_NORM);
        k_norm.load(vec + VEC_K_NORM);
|})m4_dnl
    }
};

// From S->qkv: queries to S->q, normed, rotated, times log2(e) / sqrt(E).  The rank whose tile has
// position POS takes its key and value to S->now.
static __device__ __forceinline__ void attn_rows(int pos, const Attention_constants &c)
{
    const int warp = threadIdx.x / 32;
    const bool writes = has_tile(pos);
    #pragma unroll 1
    for (int i = warp; i < my_heads() * (RATIO + 2); i += WARPS) {
        const int head = i / (RATIO + 2), j = i % (RATIO + 2), which = j - RATIO; // key or value
        if (which >= 0 && !writes)
            continue;
        Head_values x;
        x.load(S->qkv[head][j]);
        if (which < 1) { // not a value
t_if(MODEL_QK_NORM, {|            Head_values weight;
            #pragma unroll
            for (int i = 0; i < Head_values::PAIRS; i++) {
                weight.a[i] = which < 0 ? c.q_norm.a[i] : c.k_norm.a[i];
                weight.b[i] = which < 0 ? c.q_norm.b[i] : c.k_norm.b[i];
            }
            x.norm(weight);
|})m4_dnl
            x.rotate(c.rope);
        }
        x.store(which < 0 ? S->q[head * RATIO + j] : S->now[head][which], which < 0 ? SOFTMAX_SCALE : 1.0f);
    }
}

// This position's keys and values, of all heads of the group, to the cache.
static __device__ __forceinline__ void attn_keep(half *cache, int pos)
{
    const Share mine = share_of(head_group());
    for (int i = threadIdx.x; i < mine.heads * 2 * (E / 8); i += THREADS) {
        const int head = i / (2 * (E / 8)), which = i / (E / 8) % 2, e = i % (E / 8) * 8;
        *late((uint4 *)(cache + (mine.head0 + head) * KV_HEAD + which * KV_VALUE + kv_at(pos, e))) =
            *(const uint4 *)(S->now[head][which] + e);
    }
t_if(PLAN_FAMILY >= 90, {|    fence_async_global(); // the copy engine will read it
|})m4_dnl
}

// One warp's sums for up to 8 query heads: columns of the mma, whose rows are positions, then
// dimensions.  A lane has heads lane % 4 * 2 and + 1.
struct Attention {
    u32 q[E / 32][4];
    float out[E / 16][4], top[2], mass[2]; // dimensions lane / 4, + 8 of each 16; mass: of the lane's positions

    // QUERIES: of the first head; HEADS of them.
    __device__ __forceinline__ void start(const half *queries, int heads)
    {
        const int lane = threadIdx.x % 32;
        const u32 from = shared_address(queries + min(lane % 8, heads - 1) * E) + lane / 8 * 16;
        #pragma unroll
        for (int i = 0; i < E / 32; i++)
            ldmatrix(q[i], from + i * 64);
        #pragma unroll
        for (int i = 0; i < E / 16; i++)
            out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;
        top[0] = top[1] = -1e30f;
        mass[0] = mass[1] = 0.0f;
    }

    // P: positions lane / 4 and + 8 of two heads; as the right operand: two positions of a head.
    static __device__ __forceinline__ u32 turn(u32 p)
    {
        const int lane = threadIdx.x % 32, from = lane % 4 * 8 + lane / 8;
        const u32 a = __shfl_sync(~0u, p, from), b = __shfl_sync(~0u, p, from + 4);
        return lane / 4 % 2 ? a >> 16 | (b & 0xffff0000) : (a & 0xffff) | b << 16;
    }

    // Attend to 16 positions whose keys and values lie at KEYS and VALUES; those from COUNT on are not there: what
    // lies in their place may not even be numbers.
    __device__ __forceinline__ void attend(u32 keys, u32 values, int count)
    {
        const int lane = threadIdx.x % 32, even = lane % 4 * 2;
        const u32 key_at = keys + lane / 8 % 2 * (E * 16) + lane / 16 * 128 + lane % 8 * 16;
        const u32 value_at = values + lane / 16 * (E * 16) + lane / 8 % 2 * 128 + lane % 8 * 16;
        const u32 there[2] = {(even < count ? 0xffff : 0) | (even + 1 < count ? 0xffff0000 : 0),
                              (even + 8 < count ? 0xffff : 0) | (even + 9 < count ? 0xffff0000 : 0)};
        float s[2][4] = {};
        #pragma unroll
        for (int i = 0; i < E / 16; i++) {
            u32 key[4];
            ldmatrix(key, key_at + i * 256);
            mma(s[i % 2], key[0], key[1], key[2], key[3], q[i / 2][i % 2 * 2], q[i / 2][i % 2 * 2 + 1]);
        }
        float p[2][2], keep[2]; // [head][position]
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            const float a = lane / 4 < count ? s[0][h] + s[1][h] : -1e30f;
            const float b = lane / 4 + 8 < count ? s[0][h + 2] + s[1][h + 2] : -1e30f;
            float best = fmaxf(top[h], fmaxf(a, b));
            #pragma unroll
            for (int i = 4; i < 32; i *= 2)
                best = fmaxf(best, __shfl_xor_sync(~0u, best, i));
            keep[h] = exp2_approx(top[h] - best);
            p[h][0] = exp2_approx(a - best);
            p[h][1] = exp2_approx(b - best);
            mass[h] = mass[h] * keep[h] + (p[h][0] + p[h][1]);
            top[h] = best;
        }
        const u32 p0 = turn(pack(p[0][0], p[1][0])), p1 = turn(pack(p[0][1], p[1][1]));
        #pragma unroll
        for (int i = 0; i < E / 16; i++) {
            u32 value[4];
            ldmatrix_transposed(value, value_at + i * 256);
            #pragma unroll
            for (int c = 0; c < 4; c++)
                out[i][c] *= keep[c % 2];
            mma(out[i], value[0] & there[0], value[1] & there[0], value[2] & there[1], value[3] & there[1], p0, p1);
        }
    }

    // Leave them for HEADS heads from FIRST on.
    __device__ __forceinline__ void leave(int first, int heads)
    {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            const int head = lane % 4 * 2 + h;
            #pragma unroll
            for (int i = 4; i < 32; i *= 2)
                mass[h] += __shfl_xor_sync(~0u, mass[h], i);
            if (head < heads) {
                #pragma unroll
                for (int i = 0; i < E / 16; i++) {
                    S->out[warp][first + head][i * 16 + lane / 4] = out[i][h];
                    S->out[warp][first + head][i * 16 + lane / 4 + 8] = out[i][h + 2];
                }
                if (lane < 4) {
                    S->top[warp][first + head] = top[h];
                    S->mass[warp][first + head] = mass[h];
                }
            }
        }
    }
};

// Tiles that the warps of a CTA attend to at once, 16 positions each.
constexpr int PARTS = KV_TILE / 16; // of a tile
constexpr int TURN = WARPS / PARTS > 0 && WARPS / PARTS <= STAGES ? WARPS / PARTS : 1;

// The first warps, which have cached positions before POS.
static __device__ __forceinline__ int attending_warps(int pos)
{
    const int before = my_tiles(pos) - 1; // tiles, all of whose positions are cached; of the last one:
    const int cached = max(0, pos - (my_place() + before * dealt_to()) * KV_TILE);
    return before < 0 ? 0 : min(TURN * PARTS, before * PARTS + min(PARTS, (cached + 15) / 16));
}

// What each query of HEAD makes of this position itself; the last warps have the fewest others.
static __device__ __forceinline__ void attn_now(int head)
{
    #pragma unroll 1
    for (int query = WARPS - 1 - threadIdx.x / 32; query < RATIO; query += WARPS) {
        const half *q = S->q[head * RATIO + query], *key = S->now[head][0];
        float sum = 0.0f;
        #pragma unroll
        for (int i = 0; i < E / 64; i++) {
            const u32 a = *(const u32 *)(q + i * 64 + threadIdx.x % 32 * 2);
            const u32 b = *(const u32 *)(key + i * 64 + threadIdx.x % 32 * 2);
            sum += low(a) * low(b) + high(a) * high(b);
        }
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0)
            S->score[query] = sum;
    }
}

// Each warp attends to its share of this CTA's tiles of head HEAD of the group, from chunk CHUNK on, 16 positions
// at a time, and leaves its sums.  Returns the next chunk.
static __device__ __forceinline__ u32 attn_head(u32 chunk, int head, int pos)
{
    constexpr int QUERIES = (RATIO + 7) / 8; // 8 query heads
    const int warp = threadIdx.x / 32, tiles = my_tiles(pos), part = warp % PARTS, mine = warp / PARTS;
    const bool attends = warp < attending_warps(pos);
    Attention a[QUERIES];
    if (attends)
        #pragma unroll
        for (int i = 0; i < QUERIES; i++)
            a[i].start(S->q[head * RATIO + i * 8], min(RATIO - i * 8, 8));
    #pragma unroll 1
    for (int tile = 0; tile < tiles; tile += TURN) {
        const int n = min(TURN, tiles - tile); // this warp takes tile MINE of these
        const int first = (my_place() + (tile + mine) * dealt_to()) * KV_TILE + part * 16; // position
        const unsigned char *keys = S->ring[(chunk + mine) % STAGES] + part * (E * 32);
        wait_landed(chunk + n);
        if (mine < n && first < pos)
            #pragma unroll
            for (int i = 0; i < QUERIES; i++)
                a[i].attend(shared_address(keys), shared_address(keys + KV_VALUE * 2), pos - first);
        release_chunks(chunk, n);
        chunk += n;
    }
    if (attends)
        #pragma unroll
        for (int i = 0; i < QUERIES; i++)
            a[i].leave(i * 8, min(RATIO - i * 8, 8));
    return chunk;
}

t_if(PLAN_CLUSTER > 1, {||}, {|// Hop PART: of a rank and query head of this group E values, then their maximum and sum.
constexpr int PART_WORDS = E / 8 * 3 + 1;
static __device__ __forceinline__ Word *part_hop(int rank)
{
    return S->args.exchange + HOP_PART + (my_group() * GROUP + rank) * (MOST_HEADS * RATIO * PART_WORDS);
}

|})m4_dnl
// Merge what the first warps, WARPS of them, have left for the queries of HEAD, and what HAS_NOW says is here of this
// position; send it to all ranks.
static __device__ __forceinline__ void attn_send(int head, u32 tag, int warps, bool has_now)
{
t_if(PLAN_CLUSTER > 1, {|    constexpr int VALUES = 4, WORDS = E / 4;
    constexpr int MANY = THREADS / (RATIO * WORDS), SHARES = MANY < 1 ? 1 : MANY > GROUP ? GROUP : MANY; // of the ranks|}, {|    constexpr int VALUES = 3, WORDS = E / 8 * 3;|})
    #pragma unroll 1
    for (int i = threadIdx.x; i < RATIO * WORDS t_if(PLAN_CLUSTER > 1, {|* SHARES|}); i += THREADS) {
        const int query = i / WORDS % RATIO, word = i % WORDS;
        const int e = t_if(PLAN_CLUSTER > 1, {|word * 4|}, {|word_first(word)|});
        float best = has_now ? S->score[query] : -1e30f, sum = 0.0f, out[VALUES] = {}, top[WARPS];
        alignas(16) float values[WARPS][VALUES];
        #pragma unroll
        for (int w = 0; w < WARPS; w++) { // all that may be there is read at once
            top[w] = w < warps ? S->top[w][query] : -1e30f;
            best = fmaxf(best, top[w]);
t_if(PLAN_CLUSTER > 1, {|            *(uint4 *)values[w] = *(const uint4 *)(S->out[w][query] + e);|}, {|            #pragma unroll
            for (int v = 0; v < VALUES; v++)
                values[w][v] = S->out[w][query][min(e + v, E - 1)];|})
        }
        if (has_now) {
            sum = exp2_approx(S->score[query] - best);
            #pragma unroll
            for (int v = 0; v < VALUES; v++)
                out[v] = low(S->now[head][1][min(e + v, E - 1)]) * sum;
        }
        #pragma unroll
        for (int w = 0; w < WARPS; w++)
            if (w < warps) {
                const float scale = exp2_approx(top[w] - best);
                sum += S->mass[w][query] * scale;
                #pragma unroll
                for (int v = 0; v < VALUES; v++)
                    out[v] += values[w][v] * scale;
            }
t_if(PLAN_CLUSTER > 1, {|        float *to = S->part[my_rank()][head * RATIO + query];
        for (int rank = i / (RATIO * WORDS); rank < GROUP; rank += SHARES)
            give(to + e, PART_HERE, rank, __float_as_uint(out[0]), __float_as_uint(out[1]), __float_as_uint(out[2]),
                 __float_as_uint(out[3]));
        if (i < RATIO * WORDS && word < GROUP)
            give(to + E, PART_HERE, word, __float_as_uint(best), __float_as_uint(sum), 0, 0);|}, {|        Word *to = part_hop(my_rank()) + (head * RATIO + query) * PART_WORDS;
        store_word(to + word, __float_as_uint(out[0]), __float_as_uint(out[1]), __float_as_uint(out[2]), tag);
        if (word == 0)
            store_word(to + WORDS, __float_as_uint(best), __float_as_uint(sum), 0, tag);|})
    }
}

// Attend to my tiles of each head, and send what they give.
static __device__ __forceinline__ void attn_tiles(int layer, u64 layer_cache, int vec)
{
    const int pos = S->args.pos + S->index, heads = my_heads();
    u32 chunk = my_chunk();
    Attention_constants constants;
    constants.load(pos, S->args.vec + vec);
t_if(PLAN_CLUSTER > 1, {|    await_landing(QKV_HERE, heads * (RATIO + 2) * E * 4, layer, AT_QKV);|}, {|    await_blocks<GROUP_QKV>(&S->qkv[0][0][0], qkv_hop(), heads * Qkv::GROUPED, layer_tag(layer), AT_QKV);
    consumer_barrier();|})t_lap(QKV_HOP)
    if (!my_tiles(pos))
        return;
    attn_rows(pos, constants);t_lap(ROWS)
    const bool has_now = has_tile(pos);
    #pragma unroll 1
    for (int head = 0; head < heads; head++) {
        consumer_barrier(); // queries and this position's row are there; what the warps left has been sent
        if (has_now)
            attn_now(head);
        chunk = attn_head(chunk, head, pos);
        consumer_barrier();t_lap(ATTN)
        attn_send(head, layer_tag(layer), attending_warps(pos), has_now);t_lap(PART)
    }
    if (has_now)
        attn_keep(S->args.kv + layer_cache, pos);
    take_chunks(chunk);
}

t_if(PLAN_TEAM > 1, {|constexpr int TEAM_WORDS = RATIO * E / 2; // of a helper: a pair of outputs each, and the logarithm of their mass
static __device__ __forceinline__ Word *team_hop(int member)
{
    return S->args.exchange + HOP_TEAM + (head_group() * (TEAM - 1) + member - 1) * TEAM_WORDS;
}

// Add to OUT, pair PAIR of the head's outputs, what the helpers have found.  MASS: log2 of the sum of OUT's exponentials.
static __device__ __forceinline__ void add_helpers(float (&out)[2], float mass, int pair, u32 tag)
{
    Word w[TEAM - 1];
    Watch watch;
    for (bool all = false; !all;) {
        u32 wrong = 0, seen = tag;
        #pragma unroll
        for (int i = 0; i < TEAM - 1; i++)
            w[i] = load_word(team_hop(i + 1) + pair);
        #pragma unroll
        for (int i = 0; i < TEAM - 1; i++) {
            seen = w[i].tag != tag ? w[i].tag : seen;
            wrong |= w[i].tag ^ tag;
        }
        all = wrong == 0;
        if (!all)
            watch.poll(S->args.fault, AT_TEAM, tag, seen);
    }
    float best = mass;
    #pragma unroll
    for (int i = 0; i < TEAM - 1; i++)
        best = fmaxf(best, word_value(w[i], 2));
    float sum = exp2_approx(mass - best);
    out[0] *= sum;
    out[1] *= sum;
    #pragma unroll
    for (int i = 0; i < TEAM - 1; i++) {
        const float scale = exp2_approx(word_value(w[i], 2) - best);
        sum += scale;
        out[0] += word_value(w[i], 0) * scale;
        out[1] += word_value(w[i], 1) * scale;
    }
    out[0] = __fdividef(out[0], sum);
    out[1] = __fdividef(out[1], sum);
}

|})m4_dnl
// y = the sums of all ranks that have positions, merged and divided; far on, of all in the team, whose helpers send
// theirs instead.
t_if(PLAN_TEAM > 1, {|template <bool FAR_ON>
|})m4_dnl
static __device__ __forceinline__ void attn_merge(int layer)
{
    const int near = min(GROUP, (S->args.pos + S->index) / KV_TILE + 1); // ranks that have tiles
t_if(PLAN_TEAM > 1, {|    const int heads = FAR_ON ? 1 : share_of(my_group()).heads, ranks = FAR_ON ? GROUP : near;|}, {|    const int heads = my_heads(), ranks = near;|})
t_if(PLAN_CLUSTER > 1, {|    await_landing(PART_HERE, ranks * heads * RATIO * (E + 4) * 4, layer, AT_PART);t_lap(PART_HOP)
    #pragma unroll 1
    for (int i = threadIdx.x; i < heads * RATIO * (E / 2); i += THREADS) {
        const int query = i / (E / 2), e = i % (E / 2) * 2;
        float best = -1e30f, sum = 0.0f, out[2] = {}, top[GROUP];
        float2 values[GROUP];
        #pragma unroll
        for (int rank = 0; rank < GROUP; rank++) { // all that may be there is read at once
            top[rank] = rank < ranks ? S->part[rank][query][E] : -1e30f;
            best = fmaxf(best, top[rank]);
            values[rank] = *(const float2 *)(S->part[rank][query] + e);
        }
        #pragma unroll
        for (int rank = 0; rank < GROUP; rank++)
            if (rank < ranks) {
                const float scale = exp2_approx(top[rank] - best);
                sum += S->part[rank][query][E + 1] * scale;
                out[0] += values[rank].x * scale;
                out[1] += values[rank].y * scale;
            }
        out[0] = __fdividef(out[0], sum);
        out[1] = __fdividef(out[1], sum);
t_if(PLAN_TEAM > 1, {|        if (FAR_ON) {
            const float mass = best + log2_approx(sum);
            if (my_group() >= K) { // a helper
                if (i % GROUP == my_rank())
                    store_word(team_hop(my_group() / K) + i, __float_as_uint(out[0]), __float_as_uint(out[1]),
                               __float_as_uint(mass), layer_tag(layer));
                continue;
            }
            add_helpers(out, mass, i, layer_tag(layer));
        }
|})m4_dnl
        *(u32 *)(S->y + query * E + e) = pack(out[0], out[1]);
    }|}, {|    const u32 tag = layer_tag(layer);
    hold(1);
    #pragma unroll 1
    for (int i = threadIdx.x; i < heads * RATIO * (E / 8 * 3); i += THREADS) {
        const int query = i / (E / 8 * 3), word = i % (E / 8 * 3);
        float best = -1e30f, sum = 0.0f, out[3] = {};
        #pragma unroll 1
        for (int rank = 0; rank < ranks; rank++) {
            const Word *from = part_hop(rank) + query * PART_WORDS;
            Word part = load_word(from + word), scale = load_word(from + PART_WORDS - 1);
            Watch watch;
            while (part.tag != tag || scale.tag != tag) {
                watch.poll(S->args.fault, AT_PART, tag, part.tag);
                part = load_word(from + word);
                scale = load_word(from + PART_WORDS - 1);
            }
            const float higher = fmaxf(best, word_value(scale, 0));
            const float mine = exp2_approx(best - higher), theirs = exp2_approx(word_value(scale, 0) - higher);
            best = higher;
            sum = sum * mine + (word_value(scale, 1) + word_value(scale, 2)) * theirs; // the last is 0, to use all of it
            #pragma unroll
            for (int v = 0; v < 3; v++)
                out[v] = out[v] * mine + word_value(part, v) * theirs;
        }
        for (int v = 0; v < word_count(word); v++)
            S->y[query * E + word_first(word) + v] = to_half(__fdividef(out[v], sum));
    }
    hold(0);|})
    consumer_barrier();t_lap(MERGE)
}

// LAYER_CACHE and VEC: where the layer's cache and vectors begin.
t_stage void attn(int layer, u64 layer_cache, int vec)
{
    if (my_heads())
        attn_tiles(layer, layer_cache, vec);
t_if(PLAN_TEAM > 1, {|    if (my_heads() && is_far()) // here are registers for it; who reads weights ahead has few
        attn_merge<true>(layer);
|})m4_dnl
}

