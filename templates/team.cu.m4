t_need({|PLAN_TEAM|}, {|PLAN_TEAM_FROM|})m4_dnl
t_section({|Teams: groups that share a head's positions|})

t_if(PLAN_TEAM > 1, {|// Far on, where few groups have heads, a head's positions are dealt to the ranks of a team: the group that has the
// head, and helpers, which have none.  A helper reads the head's rows of q, k and v in that group's streams and does
// what that group does, for other positions; then it tells the group what it has found.  A launch is far or not as
// a whole: a tile of the cache is always copied by who writes its rows, or an earlier launch has written them.
constexpr int TEAM = PLAN_TEAM; // groups
constexpr int FAR = PLAN_TEAM_FROM; // where a far launch begins, or further on
static_assert(FAR / KV_TILE + 1 >= TEAM * GROUP, "far on, every CTA of a team has a tile");
static_assert(K * TEAM <= GROUPS && MOST_HEADS == 1, "a team has one head");
static __device__ __forceinline__ bool is_far() { return S->args.pos >= FAR; }

// The group to whose heads this group attends.
static __device__ __forceinline__ int head_group()
{
    return is_far() && my_group() < K * TEAM ? my_group() % K : my_group();
}

// CTAs to which the tiles of a head are dealt, how often TILES go round them, and where this one stands.
static __device__ __forceinline__ int dealt_to() { return is_far() ? TEAM * GROUP : GROUP; }
static __device__ __forceinline__ int rounds_of(int tiles) { return is_far() ? tiles / (TEAM * GROUP) : tiles / GROUP; }
static __device__ __forceinline__ int my_place() { return (is_far() ? my_group() / K * GROUP : 0) + my_rank(); }|}, {|// This plan has none: a head's positions are dealt to the ranks of the group that has it.
static __device__ __forceinline__ int head_group() { return my_group(); }
static __device__ __forceinline__ int dealt_to() { return GROUP; }
static __device__ __forceinline__ int rounds_of(int tiles) { return tiles / GROUP; }
static __device__ __forceinline__ int my_place() { return my_rank(); }|})

static __device__ __forceinline__ int my_heads() { return share_of(head_group()).heads; }

// The tiles that this CTA has of each of its heads, up to the one of position POS.
static __device__ __forceinline__ int my_tiles(int pos)
{
    return rounds_of(pos / KV_TILE - my_place() + dealt_to());
}

// Has this CTA the tile of position POS itself?
static __device__ __forceinline__ bool has_tile(int pos)
{
    return pos / KV_TILE - rounds_of(pos / KV_TILE) * dealt_to() == my_place();
}

