t_need({|PLAN_CLASSES|}, {|PLAN_PAIRS|}, {|PLAN_SETS|})m4_dnl
t_section({|Places: who has which weights, and where|})

// A block is 8 rows of a matrix, a pair is 2 blocks.  A unit is 8 rows x 32 columns: 4 tiles of 8 x 8,
// 128 bytes each, what one ldmatrix.x4 reads.  Tile j has columns 2 j and 2 j + 1 of each 8 of
// the 32, so that lane t of 4 multiplies columns 8 t .. 8 t + 7, which lie side by side in x.
//
// A stream has what one CTA reads of a token, in that order (but see Teams).  Q, K, V, the MLP's gate and up (their
// blocks in turn) and the head are split by rows: whole blocks, dealt to the ranks of the group (the
// head: to all CTAs) in turn.  O and DOWN are split by columns, as the group's heads and MLP
// units are; pairs of rows are dealt to the ranks in turn.  A rank's pairs are a set for each warp once
// around; of a set all pairs of one unit come first, then those of the next.
static __device__ __forceinline__ int my_group() { return blockIdx.x / GROUP; }
static __device__ __forceinline__ int my_rank() { return blockIdx.x % GROUP; }

static __device__ __forceinline__ Share share(int nth, int head0, int heads, int unit0, int units, int o,
                                              int mlp, int down, int layer)
{
    return {head0 + nth * heads, heads, unit0 + nth * units, units, o, mlp, down, layer};
}

static __device__ __forceinline__ Share share_of(int group)
{
t_for({|CLASS|}, 0, PLAN_CLASSES - 2, {|    if (group < t_class(FIRST, CLASS + 1))
        return share(group - t_class(FIRST, CLASS), t_class(SHARE, CLASS));
|})m4_dnl
    return share(group - t_class(FIRST, PLAN_CLASSES - 1), t_class(SHARE, PLAN_CLASSES - 1));
}

// Which group has KV head HEAD, or MLP unit UNIT.
static __device__ __forceinline__ int group_of_head(int head)
{
    constexpr int FEW = K / GROUPS, MANY = FEW + 1, WITH_MANY = K % GROUPS; // heads; groups
    return head < WITH_MANY * MANY ? head / MANY : WITH_MANY + (head - WITH_MANY * MANY) / (FEW ? FEW : 1);
}

static __device__ __forceinline__ int group_of_unit(int unit)
{
t_for({|CLASS|}, 0, PLAN_CLASSES - 2, {|    if (unit < t_class(UNIT, CLASS + 1))
        return t_class(FIRST, CLASS) + (unit - t_class(UNIT, CLASS)) / t_class(UNITS, CLASS);
|})m4_dnl
    return t_class(FIRST, PLAN_CLASSES - 1) + (unit - t_class(UNIT, PLAN_CLASSES - 1)) / t_class(UNITS, PLAN_CLASSES - 1);
}

// A rank's pairs of D rows.
constexpr int PAIRS = PLAN_PAIRS;
constexpr int SETS = PLAN_SETS; // of a rank
constexpr int SET_PAIRS = PLAN_SET_PAIRS; // of a set at most: one for each warp
static __device__ __forceinline__ int rank_pairs(int rank) { return (PAIRS - rank + GROUP - 1) / GROUP; }

// The set of a rank's NTH pair.
struct Set {
    int first, pairs; // of the rank
};
static __device__ __forceinline__ Set set_of(int rank, int nth)
{
    const int n = rank_pairs(rank);
    if (SETS == 1)
        return {0, n};
    const int few = n / SETS, many = few + 1, with_many = n % SETS;
    return nth < with_many * many ? Set{nth / many * many, many}
                                  : Set{with_many * many + (nth - with_many * many) / few * few, few};
}

// Tile TILE of a row, counted along its units, has columns of 4 pairs: pair I is this one and the next.
static __device__ __forceinline__ int pair_column(int tile, int i) { return tile / 4 * 32 + i * 8 + tile % 4 * 2; }

// A phase is one matrix-vector product: four of a layer, and the head.
template <int ROWS_, int UNITS_, int BLOCKS_, int STEP_, int SPANS_, int SPAN_UNITS_>
struct Phase {
    static constexpr int ROWS = ROWS_;
    static constexpr int UNITS = UNITS_; // of a block, in all groups
    static constexpr int BLOCKS = BLOCKS_; // of all CTAs
    static constexpr int STEP = STEP_; // blocks that stay together
    static constexpr int SPANS = SPANS_; // by rows: chunks of a block; by columns: 0
    static constexpr int SPAN_UNITS = SPAN_UNITS_; // of a chunk at most
    static constexpr int BLOCK_BYTES = UNITS_ * 512; // of all columns
};

// A block's place without its columns, and a unit's without its rows: the address of both is
// block.at + unit.at + block.first * unit.units + block.stride * unit.nth.
struct Block_place {
    u64 at;
    int first, stride;
};
struct Unit_place {
    u64 at;
    int units, nth;
};
static __device__ __forceinline__ u64 place(const Block_place &block, const Unit_place &unit)
{
    return block.at + unit.at + (u64)(block.first * unit.units) + (u64)(block.stride * unit.nth);
}

// Of one layer of a matrix that is split by rows: block LOCAL of GROUP's share, which begins at
// BEGIN of a layer.
static __device__ __forceinline__ Block_place row_place(int group, int local, int step, int begin, int layer_bytes,
                                                        int layer, int block_bytes)
{
    const int dealt = local / step;
    return {(u64)(group * GROUP + dealt % GROUP) * CTA_BYTES + LAYERS_OFFSET + (u64)layer * layer_bytes + begin
            + (u64)(dealt / GROUP * step + local % step) * block_bytes, 0, 512};
}

// The same of a matrix that is split by columns; the group is the unit's.
static __device__ __forceinline__ Block_place column_place(int block)
{
    const int rank = block / 2 % GROUP, nth = block / 2 / GROUP;
    const Set set = set_of(rank, nth);
    return {(u64)rank * CTA_BYTES + LAYERS_OFFSET + (nth - set.first) * 1024 + block % 2 * 512,
            set.first * 1024, set.pairs * 1024};
}

// q, k and v rows, of all heads in turn.
struct Qkv : Phase<PLAN_QKV> {
    static constexpr int HEAD = E / 8, GROUPED = (RATIO + 2) * HEAD; // blocks of a head; with its key and value
    // Blocks of this CTA, in its order, of HEADS heads.
    static __device__ __forceinline__ int mine(int heads) { return (heads * GROUPED - my_rank() + GROUP - 1) / GROUP; }
    // Where block LOCAL of a group whose first head is HEAD0 stands among all blocks.
    static __device__ __forceinline__ int block(int head0, int local)
    {
        const int head = head0 + local / GROUPED, in = local % GROUPED;
        return in < RATIO * HEAD ? head * (RATIO * HEAD) + in
                                 : (H + (in / HEAD - RATIO) * K + head) * HEAD + in % HEAD;
    }
    static __device__ __forceinline__ Block_place rows(int layer, int block)
    {
        const int q = H * HEAD, kv = block - q; // key and value blocks
        const int head = block < q ? block / (RATIO * HEAD) : kv / HEAD % K;
        const int in = block < q ? block % (RATIO * HEAD) : (RATIO + kv / (K * HEAD)) * HEAD + kv % HEAD;
        const int group = group_of_head(head);
        const Share mine = share_of(group);
        return row_place(group, (head - mine.head0) * GROUPED + in, 1, 0, mine.layer, layer, BLOCK_BYTES);
    }
    static __device__ __forceinline__ Unit_place columns(int, int unit) { return {(u64)unit * 512, 0, 0}; }
};

// Gate and up, their blocks in turn.
struct Mlp : Phase<PLAN_MLP> {
    static __device__ __forceinline__ int mine() // a unit has 4 blocks of gate and as many of up
    {
        return (share_of(my_group()).units * 4 - my_rank() + GROUP - 1) / GROUP * 2;
    }
    static __device__ __forceinline__ Block_place rows(int layer, int block)
    {
        const int group = group_of_unit(block / 8);
        const Share mine = share_of(group);
        return row_place(group, block - mine.unit0 * 8, 2, mine.mlp, mine.layer, layer, BLOCK_BYTES);
    }
    static __device__ __forceinline__ Unit_place columns(int, int unit) { return {(u64)unit * 512, 0, 0}; }
};

// Attention output -> residual.
struct O : Phase<PLAN_O> {
    static constexpr int HEAD_UNITS = RATIO * E / 32; // of a KV head's queries
    static __device__ __forceinline__ Block_place rows(int, int block) { return column_place(block); }
    static __device__ __forceinline__ Unit_place columns(int layer, int unit)
    {
        const int group = group_of_head(unit / HEAD_UNITS);
        const Share mine = share_of(group);
        return {(u64)(group * GROUP) * CTA_BYTES + (u64)layer * mine.layer + mine.o, mine.heads * HEAD_UNITS,
                unit - mine.head0 * HEAD_UNITS};
    }
};

// MLP product -> residual.
struct Down : Phase<PLAN_DOWN> {
    static __device__ __forceinline__ Block_place rows(int, int block) { return column_place(block); }
    static __device__ __forceinline__ Unit_place columns(int layer, int unit)
    {
        const int group = group_of_unit(unit);
        const Share mine = share_of(group);
        return {(u64)(group * GROUP) * CTA_BYTES + (u64)layer * mine.layer + mine.down, mine.units,
                unit - mine.unit0};
    }
};

// Logits; at the start of the streams.
struct Head : Phase<PLAN_HEAD> {
    static __device__ __forceinline__ int mine() { return (BLOCKS - (int)blockIdx.x + CTAS - 1) / CTAS; }
    static __device__ __forceinline__ Block_place rows(int, int block)
    {
        return {(u64)(block % CTAS) * CTA_BYTES + (u64)(block / CTAS) * BLOCK_BYTES, 0, 512};
    }
    static __device__ __forceinline__ Unit_place columns(int, int unit) { return {(u64)unit * 512, 0, 0}; }
};

// The KV cache of a head: tiles of KV_TILE positions, keys and then values of each; these lie in blocks
// of 8 positions, 8 x 8 elements (128 bytes) side by side along the head.
constexpr int KV_TILE_ELEMS = KV_TILE * E * 2;
static __device__ __forceinline__ u64 kv_at(int pos, int e)
{
    return (u64)(pos / KV_TILE) * KV_TILE_ELEMS + pos % KV_TILE / 8 * (E * 8) + e / 8 * 64 + pos % 8 * 8 + e % 8;
}
constexpr int KV_VALUE = KV_TILE * E; // elements from a key to its value

