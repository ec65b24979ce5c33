t_need({|PLAN_PREFILL_SMEM_BYTES|}, {|PLAN_GEMM_M|}, {|PLAN_FLASH_N|}, {|PLAN_PF_X|})m4_dnl
t_section({|Prefill: shared memory, scratch, grid barrier|})

constexpr int PREFILL_WARPS = 8;
constexpr int PREFILL_THREADS = PREFILL_WARPS * 32;
constexpr int PREFILL_TOKENS = PLAN_PREFILL_TOKENS; // of a launch at most
constexpr int FEW_TOKENS = 64; // up to here the weight read is the floor: read ahead
constexpr int MOST_STAGES = PLAN_MOST_STAGES; // of a pipeline of copies
constexpr int WORK_BYTES = PLAN_PREFILL_SMEM_BYTES - 1024;

struct Prefill_shared {
    alignas(128) unsigned char work[WORK_BYTES]; // stages of copies, or partial sums
    mk_args args;
};
static_assert(sizeof(Prefill_shared) <= PLAN_PREFILL_SMEM_BYTES, "the plan's shared memory is too small");

t_shared({|Prefill_shared|}, {|G|})

// Scratch, in bytes from its start.  Activations lie in blocks of 8 tokens, like weights in
// blocks of 8 rows: units along the columns, and the same columns in each of their 4 tiles.
constexpr u64 PF_RESID = PLAN_PF_RESID; // float [T][D]: the residual stream
constexpr u64 PF_X = PLAN_PF_X; // norms, in blocks; then q, half [T][H][E]
constexpr u64 PF_Y = PF_X + (u64)PREFILL_TOKENS * PLAN_PF_X_COLS * 2; // attention; then MLP products
constexpr u64 PF_QKV = PLAN_PF_QKV; // float [T][H + 2 K][E]: before norm and rotation
static_assert(D % 8 == 0 && F % 8 == 0 && H % K == 0 && PREFILL_TOKENS % 8 == 0, "shapes");
static_assert(Qkv::UNITS * 32 <= PLAN_PF_X_COLS && O::UNITS * 32 <= PLAN_PF_X_COLS && H * E <= PLAN_PF_X_COLS
              && Down::UNITS * 32 <= PLAN_PF_X_COLS, "the plan's activations are too narrow");

static __device__ __forceinline__ float *prefill_resid() { return (float *)(G->args.scratch + PF_RESID); }
static __device__ __forceinline__ float *prefill_raw() { return (float *)(G->args.scratch + PF_QKV); }
static __device__ __forceinline__ unsigned char *prefill_x() { return G->args.scratch + PF_X; }
static __device__ __forceinline__ unsigned char *prefill_y() { return G->args.scratch + PF_Y; }

// Where columns COL, which is even, and COL + 1 of token TOKEN lie in activations of UNITS units.
template <int UNITS>
static __device__ __forceinline__ u32 activation_at(u32 token, u32 col)
{
    const u32 tile = token / 8 * (UNITS * 4) + col / 32 * 4 + col % 8 / 2; // see pair_column
    return tile * 128 + token % 8 * 16 + col % 32 / 8 * 4;
}

// All writes of all CTAs before it are seen by all after it.  COUNT: arrivals that it waits for.
static __device__ __noinline__ void grid_barrier(u32 count)
{
    __syncthreads();
    if (threadIdx.x == 0) {
        Watch watch;
        u32 seen;
        add_release(G->args.barrier, 1);
        while ((int)((seen = load_acquire(G->args.barrier)) - count) < 0)
            watch.poll(G->args.fault, AT_GRID, count, seen);
    }
    __syncthreads();
}

t_section({|Prefill: embedding and norms, a warp per token|})

// What tile TILE of an activation has of a vector of D floats; zeros behind it.
static __device__ __forceinline__ void load_tile(float2 (&pair)[4], const float *from, int tile)
{
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        const int col = pair_column(tile, i);
        pair[i] = make_float2(0.0f, 0.0f);
        if (D % 32 == 0 || col < D)
            pair[i] = *(const float2 *)(from + col);
    }
}

// x = resid / rms * weight.
static __device__ __forceinline__ void prefill_norm_row(int token, const float *weight)
{
    const int lane = threadIdx.x % 32;
    const float *row = prefill_resid() + (u64)token * D;
    float sum = 0.0f;
    #pragma unroll 4
    for (int tile = lane; tile < Qkv::UNITS * 4; tile += 32) {
        float2 r[4];
        load_tile(r, row, tile);
        #pragma unroll
        for (int i = 0; i < 4; i++)
            sum += r[i].x * r[i].x + r[i].y * r[i].y;
    }
    #pragma unroll
    for (int i = 16; i; i /= 2)
        sum += __shfl_xor_sync(~0u, sum, i);
    const float scale = rsqrtf(sum * (1.0f / D) + EPS);
    #pragma unroll 4
    for (int tile = lane; tile < Qkv::UNITS * 4; tile += 32) {
        float2 r[4], w[4];
        u32 x[4];
        load_tile(r, row, tile);
        load_tile(w, weight, tile);
        #pragma unroll
        for (int i = 0; i < 4; i++)
            x[i] = pack(r[i].x * scale * w[i].x, r[i].y * scale * w[i].y);
        *late((uint4 *)(prefill_x() + activation_at<Qkv::UNITS>(token, pair_column(tile, 0))))
            = make_uint4(x[0], x[1], x[2], x[3]);
    }
}

// VEC: where the norm begins in args.vec.
static __device__ __noinline__ void prefill_norm(int vec)
{
    const int warp = threadIdx.x / 32;
    #pragma unroll 1
    for (int token = warp * PREFILL_CTAS + blockIdx.x; token < G->args.n; token += PREFILL_WARPS * PREFILL_CTAS)
        prefill_norm_row(token, G->args.vec + vec);
}

// resid = the embeddings; x = their norms.
static __device__ __noinline__ void prefill_embed()
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    #pragma unroll 1
    for (int token = warp * PREFILL_CTAS + blockIdx.x; token < G->args.n; token += PREFILL_WARPS * PREFILL_CTAS) {
        const int id = G->args.tokens[token];
        float *row = prefill_resid() + (u64)token * D;
        #pragma unroll 4
        for (int tile = lane; tile < Head::UNITS * 4; tile += 32) { // the lane that reads them in the norm
t_if(MODEL_TIED, {|            // row id % 8 of the head's block id / 8
            const uint4 q = *(const uint4 *)(G->args.stream + place(Head::rows(0, id / 8), Head::columns(0, tile / 4))
                                             + tile % 4 * 128 + id % 8 * 16);
            const u32 v[4] = {q.x, q.y, q.z, q.w};
|})m4_dnl
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                const int col = pair_column(tile, i);
                if (D % 32 == 0 || col < D) {
t_if(MODEL_TIED, {|                    *late((float2 *)(row + col)) = make_float2(low(v[i]), high(v[i]));|}, {|                    const u32 v = *(const u32 *)(G->args.embed + (u64)id * D + col);
                    *late((float2 *)(row + col)) = make_float2(low(v), high(v));|})
                }
            }
        }
        prefill_norm_row(token, G->args.vec + VEC_ATTN_NORM);
    }
}

t_section({|Prefill: activations x weights|})

// A CTA makes TOKENS x 8 BLOCKS outputs at once.  WM x WN warps share them out; WK such groups
// each take every WK-th unit of the columns, and their sums are added up in the end.
template <int TOKENS_, int BLOCKS_, int COLS_, int WM_, int WN_, int STAGES_>
struct Tile {
    static constexpr int TOKENS = TOKENS_, BLOCKS = BLOCKS_, COLS = COLS_; // columns of a stage
    static constexpr int WM = WM_, WN = WN_, WK = PREFILL_WARPS / (WM_ * WN_);
    static constexpr int UNITS = COLS / 32, M16 = TOKENS / 16 / WM, N8 = BLOCKS / WN; // of a stage; of a warp
    static constexpr int X_BYTES = TOKENS * COLS * 2, STAGE_BYTES = X_BYTES + BLOCKS * COLS * 16;
    static constexpr int FIT = WORK_BYTES / STAGE_BYTES, STAGES = FIT < STAGES_ ? FIT : STAGES_;
    // Copies of 16 bytes: of a thread, and how many blocks all threads take at a time.
    static constexpr int X_COPIES = TOKENS * COLS / 8 / PREFILL_THREADS;
    static constexpr int W_COPIES = BLOCKS * COLS / PREFILL_THREADS;
    static constexpr int PASS = PREFILL_THREADS / COLS;
    static_assert(X_COPIES * PREFILL_THREADS * 8 == TOKENS * COLS && W_COPIES * PREFILL_THREADS == BLOCKS * COLS
                  && PASS * COLS == PREFILL_THREADS, "copies");
    static_assert(M16 * WM * 16 == TOKENS && N8 * WN == BLOCKS && UNITS % WK == 0 && STAGES >= 2, "tile");
    static_assert(WK == 1 || WK * TOKENS * BLOCKS * 32 <= WORK_BYTES, "partial sums");
};
typedef Tile<PLAN_GEMM_M, PLAN_GEMM_N / 8, PLAN_GEMM_K, 2, 4, PLAN_GEMM_STAGES> Wide;
typedef Tile<64, 8, 64, 2, 2, MOST_STAGES> Middle;

// For at most 16 tokens: tiles so narrow that every CTA has one, as far as stages fit.
template <class P>
struct Narrow_blocks {
    static constexpr int FIT = (WORK_BYTES / 4 / 512 - 16) / 8, MOST = (FIT < 2 ? 2 : FIT > 8 ? 8 : FIT) / P::STEP;
    static constexpr int MINE = (P::BLOCKS / P::STEP + PREFILL_CTAS - 1) / PREFILL_CTAS, ROUNDS = (MINE + MOST - 1) / MOST;
    static constexpr int BLOCKS = (MINE + ROUNDS - 1) / ROUNDS * P::STEP;
};
template <class P> using Narrow = Tile<16, Narrow_blocks<P>::BLOCKS, 256, 1, 1, MOST_STAGES>;

template <class T>
static __device__ __forceinline__ int tile_count(int blocks)
{
    return ((G->args.n + T::TOKENS - 1) / T::TOKENS) * ((blocks + T::BLOCKS - 1) / T::BLOCKS);
}

// What a thread copies of one tile: the same 16 bytes of every PASS-th block, stage after stage.
template <class P, class T>
struct Tile_source {
    const unsigned char *x, *stream;
    Block_place w[T::W_COPIES];
    Unit_place columns; // of the next stage
    int layer, piece, tokens, blocks; // 16 bytes of a block; how far the first is from the end
    u32 to; // of the first stage

    __device__ __forceinline__ Tile_source(const unsigned char *from, int of_layer, int token0, int block0)
    {
        const int first = threadIdx.x / T::COLS;
        layer = of_layer;
        piece = threadIdx.x % T::COLS;
        x = from + (token0 / 8 + first) * P::BLOCK_BYTES + piece * 16;
        stream = G->args.stream + piece % 32 * 16;
        tokens = G->args.n - (token0 + first * 8 + piece % 8);
        blocks = P::BLOCKS - (block0 + first);
        #pragma unroll
        for (int i = 0; i < T::W_COPIES; i++)
            w[i] = P::rows(layer, blocks > i * T::PASS ? block0 + first + i * T::PASS : 0);
        columns = P::columns(layer, piece / 32);
        to = shared_address(G->work) + threadIdx.x * 16;
    }
    // The next chunk; zeros for tokens, blocks and columns that do not exist.
    __device__ __forceinline__ void copy(int stage, int chunk)
    {
        const u32 at = to + stage * T::STAGE_BYTES;
        const int unit = chunk * T::UNITS + piece / 32;
        const bool inside = P::UNITS % T::UNITS == 0 || unit < P::UNITS;
        #pragma unroll
        for (int i = 0; i < T::X_COPIES; i++)
            copy16(at + i * (PREFILL_THREADS * 16), x + i * (T::PASS * P::BLOCK_BYTES) + chunk * (T::COLS * 16),
                   inside && tokens > i * (T::PASS * 8) ? 16 : 0);
        #pragma unroll
        for (int i = 0; i < T::W_COPIES; i++)
            copy16(at + T::X_BYTES + i * (PREFILL_THREADS * 16), stream + place(w[i], columns),
                   inside && blocks > i * T::PASS ? 16 : 0);
        columns.nth += T::UNITS;
        if (columns.nth >= columns.units) // in another group, or split by rows
            columns = P::columns(layer, unit + T::UNITS);
    }
};

// sum += this warp's part of a stage.  LANE_X, LANE_W: what the lane gives ldmatrix.
template <class T>
static __device__ __forceinline__ void multiply_stage(float (&sum)[T::M16][T::N8][4], u32 lane_x, u32 lane_w)
{
    #pragma unroll
    for (int unit = 0; unit < T::UNITS; unit += T::WK) {
        u32 w[T::N8][4];
        #pragma unroll
        for (int j = 0; j < T::N8; j++)
            ldmatrix(w[j], lane_w + j * (T::COLS * 16) + unit * 512);
        #pragma unroll
        for (int step = 0; step < 2; step++) {
            #pragma unroll
            for (int i = 0; i < T::M16; i++) {
                u32 x[4];
                ldmatrix(x, lane_x + i * (T::COLS * 32) + unit * 512 + step * 256);
                #pragma unroll
                for (int j = 0; j < T::N8; j++)
                    mma(sum[i][j], x[0], x[1], x[2], x[3], w[j][step * 2], w[j][step * 2 + 1]);
            }
        }
    }
}

// All columns of one tile: a lane has sum[i][j][0..1] of token lane / 4 of its 16, rows
// lane % 4 * 2 and + 1 of its 8; [2..3] of token + 8.
template <class P, class T>
static __device__ __forceinline__ void multiply_tile(float (&sum)[T::M16][T::N8][4], Tile_source<P, T> &source)
{
    constexpr int CHUNKS = (P::UNITS + T::UNITS - 1) / T::UNITS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int wm = warp % T::WM, wn = warp / T::WM % T::WN, wk = warp / (T::WM * T::WN);
    const u32 lane_x = shared_address(G->work) + (wm * T::M16 * 2 + lane / 8 % 2) * (T::COLS * 16)
                     + wk * 512 + lane / 16 * 128 + lane % 8 * 16;
    const u32 lane_w = shared_address(G->work) + T::X_BYTES + wn * T::N8 * (T::COLS * 16) + wk * 512 + lane * 16;

    #pragma unroll
    for (int i = 0; i < T::M16; i++)
        #pragma unroll
        for (int j = 0; j < T::N8; j++)
            #pragma unroll
            for (int c = 0; c < 4; c++)
                sum[i][j][c] = 0.0f;
    __syncthreads(); // the stages are free
    #pragma unroll
    for (int i = 0; i < T::STAGES - 1; i++) {
        if (i < CHUNKS)
            source.copy(i, i);
        copy_commit();
    }
    int stage = 0, next = T::STAGES - 1; // to multiply; to fill
    #pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        copy_wait<T::STAGES - 2>();
        __syncthreads(); // all threads' copies are here, and stage NEXT is free
        if (chunk + T::STAGES - 1 < CHUNKS)
            source.copy(next, chunk + T::STAGES - 1);
        copy_commit();
        multiply_stage<T>(sum, lane_x + stage * T::STAGE_BYTES, lane_w + stage * T::STAGE_BYTES);
        stage = stage + 1 < T::STAGES ? stage + 1 : 0;
        next = next + 1 < T::STAGES ? next + 1 : 0;
    }
}

// Tiles of x W, dealt to CTAs in turn, for blocks FIRST .. LAST-1 of phase P of LAYER.  WRITE(token, block,
// sums, READ(token, block)) takes the sums of P::STEP blocks as multiply_tile leaves them; TOKEN is
// the lane's.
template <class P, class T, class Read, class Write>
static __device__ __forceinline__ void multiply_tiles(const unsigned char *x, int layer, int first, int last,
                                                      Read read, Write write)
{
    constexpr int PARTS = T::M16 * T::N8, STEP = P::STEP; // of a warp
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp % (T::WM * T::WN);
    const int wm = warp % T::WM, wn = warp / T::WM % T::WN, wk = warp / (T::WM * T::WN);
    const int token_tiles = (G->args.n + T::TOKENS - 1) / T::TOKENS, tiles = tile_count<T>(last - first);
    #pragma unroll 1
    for (int tile = blockIdx.x; tile < tiles; tile += PREFILL_CTAS) {
        const int token0 = tile % token_tiles * T::TOKENS, block0 = first + tile / token_tiles * T::BLOCKS;
        const int token = token0 + wm * (T::M16 * 16) + lane / 4, block = block0 + wn * T::N8;
        Tile_source<P, T> source(x, layer, token0, block0);
        float sum[T::M16][T::N8][4];
        multiply_tile<P, T>(sum, source);
        if (T::WK == 1) {
            #pragma unroll
            for (int i = 0; i < T::M16; i++) {
                float4 before[T::N8]; // all reads before the first write
                #pragma unroll
                for (int j = 0; j < T::N8; j += STEP)
                    before[j] = read(token + i * 16, block + j);
                #pragma unroll
                for (int j = 0; j < T::N8; j += STEP)
                    write(token + i * 16, block + j, &sum[i][j], before[j]);
            }
        } else {
            float4 *part = (float4 *)G->work + lane; // [WK][WM * WN][PARTS][32]
            __syncthreads(); // the stages are free
            #pragma unroll
            for (int i = 0; i < PARTS; i++) {
                const float (&c)[4] = sum[i / T::N8][i % T::N8];
                part[(warp * PARTS + i) * 32] = make_float4(c[0], c[1], c[2], c[3]);
            }
            __syncthreads();
            #pragma unroll 1
            for (int i = wk * STEP; i < PARTS; i += T::WK * STEP) {
                const int part_token = token + i / T::N8 * 16, part_block = block + i % T::N8;
                const float4 before = read(part_token, part_block);
                float total[STEP][4] = {};
                #pragma unroll
                for (int j = 0; j < STEP; j++) {
                    #pragma unroll
                    for (int k = 0; k < T::WK; k++) {
                        const float4 add = part[((k * T::WM * T::WN + group) * PARTS + i + j) * 32];
                        total[j][0] += add.x;
                        total[j][1] += add.y;
                        total[j][2] += add.z;
                        total[j][3] += add.w;
                    }
                }
                write(part_token, part_block, total, before);
            }
        }
    }
}

// With few tokens: bring bytes FROM .. TO-1 of LAYER, in the stream of decode's CTA of this number, as near as L2.
static __device__ __forceinline__ void read_ahead(int layer, const Share &mine, int from, int to)
{
    const unsigned char *at = G->args.stream + blockIdx.x * CTA_BYTES + LAYERS_OFFSET + (u64)layer * mine.layer;
    if (G->args.n <= FEW_TOKENS && blockIdx.x < CTAS)
        for (int i = from + threadIdx.x * 64; i < to; i += PREFILL_THREADS * 64)
            prefetch_l2(at + i);
}

// x W, by the tile that suits the number of tokens.  A round of middle tiles takes 7/20 of the time of a
// round of wide ones.
template <class P, class Read, class Write>
static __device__ __forceinline__ void multiply_rows(const unsigned char *x, int layer, int first, int last,
                                                     Read read, Write write)
{
    const int wide = (tile_count<Wide>(last - first) + PREFILL_CTAS - 1) / PREFILL_CTAS;
    const int middle = (tile_count<Middle>(last - first) + PREFILL_CTAS - 1) / PREFILL_CTAS;
    if (G->args.n <= Narrow<P>::TOKENS)
        multiply_tiles<P, Narrow<P>>(x, layer, first, last, read, write);
    else if (middle * 7 < wide * 20)
        multiply_tiles<P, Middle>(x, layer, first, last, read, write);
    else
        multiply_tiles<P, Wide>(x, layer, first, last, read, write);
}

// resid += y W * SCALE.
template <class P>
static __device__ __forceinline__ void multiply_add(int layer, float scale)
{
    const auto pair = [&](int token, int block) {
        return (float2 *)(prefill_resid() + (u64)token * D + block * 8) + threadIdx.x % 4;
    };
    multiply_rows<P>(prefill_y(), layer, 0, P::BLOCKS, [&](int token, int block) {
        float2 a = make_float2(0.0f, 0.0f), b = a;
        if (block < P::BLOCKS && token < G->args.n)
            a = *pair(token, block);
        if (block < P::BLOCKS && token + 8 < G->args.n)
            b = *pair(token + 8, block);
        return make_float4(a.x, a.y, b.x, b.y);
    }, [&](int token, int block, const float (*sum)[4], float4 before) {
        if (block < P::BLOCKS && token < G->args.n)
            *late(pair(token, block)) = make_float2(before.x + sum[0][0] * scale, before.y + sum[0][1] * scale);
        if (block < P::BLOCKS && token + 8 < G->args.n)
            *late(pair(token + 8, block)) = make_float2(before.z + sum[0][2] * scale, before.w + sum[0][3] * scale);
    });
}

t_section({|Prefill: q, k, v|})

// q, k and v before norm and rotation, from block FIRST on.  BIAS: where it begins in args.vec.
static __device__ __noinline__ void prefill_qkv(int layer, int first, int bias)
{
    const Share mine = share_of(my_group());
    multiply_rows<Qkv>(prefill_x(), layer, first, Qkv::BLOCKS, [&](int, int block) {
        float2 add = make_float2(0.0f, 0.0f);
t_if(MODEL_QKV_BIAS, {|        if (block < Qkv::BLOCKS)
            add = ((const float2 *)(G->args.vec + bias))[block * 4 + threadIdx.x % 4];
|})m4_dnl
        return make_float4(add.x, add.y, add.x, add.y);
    }, [&](int token, int block, const float (*sum)[4], float4 add) {
        float2 *to = (float2 *)(prefill_raw() + (u64)token * ((H + 2 * K) * E) + block * 8) + threadIdx.x % 4;
        if (block < Qkv::BLOCKS && token < G->args.n)
            *late(to) = make_float2(sum[0][0] + add.x, sum[0][1] + add.y);
        if (block < Qkv::BLOCKS && token + 8 < G->args.n)
            *late(to + 8 * ((H + 2 * K) * E / 2)) = make_float2(sum[0][2] + add.z, sum[0][3] + add.w);
    });
    read_ahead(layer, mine, mine.o, mine.mlp);
}

// Norm and rotation: heads FIRST .. H-1 of q to x, times log2(e) / sqrt(E); k and v to the cache.
// A warp takes BATCH heads of a token.
static __device__ __noinline__ void prefill_rotate(int layer_vec, u64 layer_cache, int first)
{
    constexpr int BATCH = 4;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float *vec = G->args.vec + layer_vec;
    half *cache = G->args.kv + layer_cache;
    const int batches = (H + 2 * K - first + BATCH - 1) / BATCH, tasks = G->args.n * batches;
t_if(MODEL_QK_NORM, {|    Head_values q_norm, k_norm;
    q_norm.load(vec + VEC_Q_NORM);
    k_norm.load(vec + VEC_K_NORM);
|})m4_dnl
    #pragma unroll 1
    for (int task = warp * PREFILL_CTAS + blockIdx.x; task < tasks; task += PREFILL_WARPS * PREFILL_CTAS) {
        const int token = task / batches, head0 = first + task % batches * BATCH, pos = G->args.pos + token;
        const float *raw = prefill_raw() + (u64)token * ((H + 2 * K) * E);
        Head_values x[BATCH];
        float2 rope[Head_values::PAIRS];
        #pragma unroll
        for (int i = 0; i < BATCH; i++)
            x[i].load(raw + min(head0 + i, H + 2 * K - 1) * E);
        #pragma unroll
        for (int i = 0; i < Head_values::PAIRS; i++)
            rope[i] = ((const float2 *)G->args.rope)[(u64)pos * (E / 2) + lane + i * 32];
        #pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int head = head0 + i;
            if (head >= H + 2 * K)
                break;
            half *to;
            float scale = 1.0f;
            int apart = 8 * 8; // elements from one tile of the row to the next
            if (head < H) {
t_if(MODEL_QK_NORM, {|                x[i].norm(q_norm);
|})m4_dnl
                x[i].rotate(rope);
                to = (half *)prefill_x() + ((u64)token * H + head) * E;
                apart = 8;
                scale = SOFTMAX_SCALE;
            } else if (head < H + K) {
t_if(MODEL_QK_NORM, {|                x[i].norm(k_norm);
|})m4_dnl
                x[i].rotate(rope);
                to = cache + (head - H) * KV_HEAD + kv_at(pos, 0);
            } else {
                to = cache + (head - H - K) * KV_HEAD + kv_at(pos, 0) + KV_VALUE;
            }
            to += lane / 8 * apart + lane % 8;
            #pragma unroll
            for (int j = 0; j < Head_values::PAIRS; j++) {
                *late(to + j * 4 * apart) = to_half(x[i].a[j] * scale);
                *late(to + (j * 4 + E / 16) * apart) = to_half(x[i].b[j] * scale);
            }
        }
    }
}

t_section({|Prefill: causal attention over the KV cache|})

// A task is a KV head and FLASH_ROWS queries: row r of the head is token r / RATIO, query head
// r % RATIO of its group.  A warp has 16 rows.  Keys and values come in stages of FLASH_POSITIONS.
constexpr int FLASH_ROWS = PLAN_FLASH_M;
constexpr int FLASH_POSITIONS = PLAN_FLASH_N;
constexpr int FLASH_BYTES = FLASH_POSITIONS * E * 2; // keys of a stage; the values follow
constexpr int FLASH_FIT = WORK_BYTES / (FLASH_BYTES * 2), FLASH_STAGES = FLASH_FIT < 4 ? FLASH_FIT : 4;
static_assert(FLASH_ROWS == PREFILL_WARPS * 16 && FLASH_STAGES >= 2, "attention tile");

// Positions FIRST .. FIRST + FLASH_POSITIONS - 1 of a head to a stage, zeros from END on.  Keys and
// values lie there as in a tile of the cache.
static __device__ __forceinline__ void flash_copy(u32 stage, const half *cache, int first, int end)
{
    constexpr int PASS = PREFILL_THREADS / E * 8; // positions at a time
    const int from = first + threadIdx.x / E * 8; // of this thread's block
    const half *piece = cache + threadIdx.x % E * 8;
    const u32 to = stage + threadIdx.x * 16;
    static_assert(FLASH_POSITIONS % PASS == 0, "copies");
    #pragma unroll
    for (int i = 0; i < FLASH_POSITIONS / PASS; i++) {
        const half *key = piece + kv_at(from + i * PASS, 0);
        const int bytes = from + i * PASS + (int)threadIdx.x % 8 < end ? 16 : 0;
        copy16(to + i * (PREFILL_THREADS * 16), key, bytes);
        copy16(to + FLASH_BYTES + i * (PREFILL_THREADS * 16), key + KV_VALUE, bytes);
    }
}

// One warp's 16 queries, and what they have seen.  A lane has rows lane / 4 and + 8.
struct Flash {
    u32 q[E / 16][4];
    float out[E / 8][4];
    float top[2], sum[2]; // sum: of the lane's positions

    // Queries of rows FIRST .. FIRST + 15 of ROWS.
    __device__ __forceinline__ void start(const half *queries, int first, int rows, int head)
    {
        const int lane = threadIdx.x % 32;
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = min(first + lane / 4 + i * 8, rows - 1);
            const u32 *from = (const u32 *)(queries + ((u64)(row / RATIO) * H + head * RATIO + row % RATIO) * E)
                            + lane % 4;
            #pragma unroll
            for (int k = 0; k < E / 16; k++) {
                q[k][i] = from[k * 8];
                q[k][i + 2] = from[k * 8 + 4];
            }
            top[i] = -1e30f;
            sum[i] = 0.0f;
        }
        #pragma unroll
        for (int e = 0; e < E / 8; e++)
            #pragma unroll
            for (int c = 0; c < 4; c++)
                out[e][c] = 0.0f;
    }

    // Attend to the positions of STAGE.  MASK: leave out those beyond LAST, counted from the
    // stage's first position.
    __device__ __forceinline__ void attend(u32 stage, bool mask, const int (&last)[2])
    {
        const int lane = threadIdx.x % 32;
        const u32 values = stage + FLASH_BYTES + lane / 8 % 2 * (E * 16) + lane / 16 * 128 + lane % 8 * 16;
        float s[FLASH_POSITIONS / 8][4];
        #pragma unroll
        for (int j = 0; j < FLASH_POSITIONS / 8; j++) {
            #pragma unroll
            for (int c = 0; c < 4; c++)
                s[j][c] = 0.0f;
            #pragma unroll
            for (int k = 0; k < E / 32; k++) {
                u32 key[4];
                ldmatrix(key, stage + j * (E * 16) + k * 512 + lane * 16);
                mma(s[j], q[k * 2][0], q[k * 2][1], q[k * 2][2], q[k * 2][3], key[0], key[1]);
                mma(s[j], q[k * 2 + 1][0], q[k * 2 + 1][1], q[k * 2 + 1][2], q[k * 2 + 1][3], key[2], key[3]);
            }
        }
        if (mask) {
            #pragma unroll
            for (int j = 0; j < FLASH_POSITIONS / 8; j++)
                #pragma unroll
                for (int c = 0; c < 4; c++)
                    if (j * 8 + lane % 4 * 2 + c % 2 > last[c / 2])
                        s[j][c] = -1e30f;
        }
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            float best = top[i];
            #pragma unroll
            for (int j = 0; j < FLASH_POSITIONS / 8; j++)
                best = fmaxf(best, fmaxf(s[j][i * 2], s[j][i * 2 + 1]));
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
            const float keep = exp2f(top[i] - best);
            top[i] = best;
            sum[i] *= keep;
            #pragma unroll
            for (int e = 0; e < E / 8; e++) {
                out[e][i * 2] *= keep;
                out[e][i * 2 + 1] *= keep;
            }
            #pragma unroll
            for (int j = 0; j < FLASH_POSITIONS / 8; j++) {
                s[j][i * 2] = exp2f(s[j][i * 2] - best);
                s[j][i * 2 + 1] = exp2f(s[j][i * 2 + 1] - best);
                sum[i] += s[j][i * 2] + s[j][i * 2 + 1];
            }
        }
        #pragma unroll
        for (int k = 0; k < FLASH_POSITIONS / 16; k++) {
            const u32 p0 = pack(s[k * 2][0], s[k * 2][1]), p1 = pack(s[k * 2][2], s[k * 2][3]);
            const u32 p2 = pack(s[k * 2 + 1][0], s[k * 2 + 1][1]), p3 = pack(s[k * 2 + 1][2], s[k * 2 + 1][3]);
            #pragma unroll
            for (int e = 0; e < E / 16; e++) {
                u32 value[4];
                ldmatrix_transposed(value, values + k * (E * 32) + e * 256);
                mma(out[e * 2], p0, p1, p2, p3, value[0], value[1]);
                mma(out[e * 2 + 1], p0, p1, p2, p3, value[2], value[3]);
            }
        }
    }

    // Divide, and write the rows that exist: a lane has what one tile of each unit has of a row.
    __device__ __forceinline__ void finish(unsigned char *y, int first, int rows, int head)
    {
        const int lane = threadIdx.x % 32;
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = first + lane / 4 + i * 8;
            sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
            sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
            const float scale = 1.0f / sum[i];
            if (row < rows) {
                const int col = (head * RATIO + row % RATIO) * E + lane % 4 * 2;
                unsigned char *to = y + activation_at<O::UNITS>(row / RATIO, col);
                #pragma unroll
                for (int unit = 0; unit < E / 32; unit++) {
                    u32 pair[4];
                    #pragma unroll
                    for (int j = 0; j < 4; j++)
                        pair[j] = pack(out[unit * 4 + j][i * 2] * scale, out[unit * 4 + j][i * 2 + 1] * scale);
                    *late((uint4 *)(to + unit * 512)) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
                }
            }
        }
    }
};

// y = attention of the queries in x.  The longest tasks go first; every other round is dealt
// backwards, so that all CTAs get about the same.
static __device__ __noinline__ void prefill_attn(u64 layer_cache)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int pos = G->args.pos, end = pos + G->args.n, rows = G->args.n * RATIO;
    const int tiles = (rows + FLASH_ROWS - 1) / FLASH_ROWS;
    const u32 work = shared_address(G->work);
    #pragma unroll 1
    for (int round = 0; round * PREFILL_CTAS < tiles * K; round++) {
        const int task = round * PREFILL_CTAS + (round % 2 ? PREFILL_CTAS - 1 - (int)blockIdx.x : (int)blockIdx.x);
        if (task >= tiles * K)
            continue;
        const int head = task % K, tile0 = (tiles - 1 - task / K) * FLASH_ROWS, first = tile0 + warp * 16;
        const half *cache = G->args.kv + layer_cache + head * KV_HEAD;
        // The last positions that the tile, the warp's first and last row, and the lane's rows see.
        const int tile_last = pos + min(tile0 + FLASH_ROWS - 1, rows - 1) / RATIO;
        const int warp_first = pos + first / RATIO, warp_last = pos + (first + 15) / RATIO;
        const int stages = tile_last / FLASH_POSITIONS + 1;
        Flash flash;
        flash.start((const half *)prefill_x(), first, rows, head);
        __syncthreads(); // the stages are free
        #pragma unroll
        for (int i = 0; i < FLASH_STAGES - 1; i++) {
            if (i < stages)
                flash_copy(work + i * (FLASH_BYTES * 2), cache, i * FLASH_POSITIONS, end);
            copy_commit();
        }
        int now = 0, next = FLASH_STAGES - 1; // to attend to; to fill
        #pragma unroll 1
        for (int i = 0; i < stages; i++) {
            const int from = i * FLASH_POSITIONS, ahead = from + (FLASH_STAGES - 1) * FLASH_POSITIONS;
            copy_wait<FLASH_STAGES - 2>();
            __syncthreads(); // all threads' copies are here, and stage NEXT is free
            if (ahead <= tile_last)
                flash_copy(work + next * (FLASH_BYTES * 2), cache, ahead, end);
            copy_commit();
            if (first < rows && from <= warp_last) {
                const int row = first + lane / 4;
                const int last[2] = {pos + row / RATIO - from, pos + (row + 8) / RATIO - from};
                flash.attend(work + now * (FLASH_BYTES * 2), from + FLASH_POSITIONS - 1 > warp_first, last);
            }
            now = now + 1 < FLASH_STAGES ? now + 1 : 0;
            next = next + 1 < FLASH_STAGES ? next + 1 : 0;
        }
        flash.finish(prefill_y(), first, rows, head);
    }
}

t_section({|Prefill: projections and MLP|})

static __device__ __noinline__ void prefill_o(int layer)
{
    const Share mine = share_of(my_group());
    multiply_add<O>(layer, 1.0f);
    read_ahead(layer, mine, mine.mlp, mine.down);
}

static __device__ __forceinline__ float silu_product(float gate, float up)
{
    return __fdividef(gate, 1.0f + __expf(-gate)) * up * MLP_SCALE;
}

// y = silu(x W_gate) * (x W_up).  Gate and up blocks come in turn; y is padded with zeros up to
// whole units.
static __device__ __noinline__ void prefill_mlp(int layer)
{
    const Share mine = share_of(my_group());
    multiply_rows<Mlp>(prefill_x(), layer, 0, Down::UNITS * 8, [](int, int) {
        return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }, [&](int token, int block, const float (*sum)[4], float4) {
        u32 product[2];
        #pragma unroll
        for (int i = 0; i < 2; i++)
            product[i] = pack(silu_product(sum[0][i * 2], sum[1][i * 2]),
                              silu_product(sum[0][i * 2 + 1], sum[1][i * 2 + 1]));
        unsigned char *to = prefill_y() + activation_at<Down::UNITS>(token, block * 4 + threadIdx.x % 4 * 2);
        if (block < Down::UNITS * 8 && token < G->args.n)
            *late((u32 *)to) = product[0];
        if (block < Down::UNITS * 8 && token + 8 < G->args.n)
            *late((u32 *)(to + Down::UNITS * 512)) = product[1]; // in the next block of tokens
    });
    read_ahead(layer, mine, mine.down, mine.layer);
}

static __device__ __noinline__ void prefill_down(int layer)
{
    const Share mine = share_of(my_group());
    multiply_add<Down>(layer, 1.0f / MLP_SCALE);
    read_ahead(layer + 1, mine, 0, mine.o); // q, k, v
}

t_section({|Prefill: the kernel|})

// Run args.tokens[0 .. args.n-1] at positions args.pos on, for their keys and values.  The last
// layer needs neither queries nor what follows them.
static __device__ __forceinline__ void prefill()
{
    const Share mine = share_of(my_group());
    u32 count = 0;

    read_ahead(0, mine, 0, mine.o);
    prefill_embed();
    grid_barrier(count += PREFILL_CTAS);
t_if(PLAN_UNROLL == 0, {|t_for({|LAYER|}, 0, MODEL_L - 2, {|
    t_note({|layer t_2d(LAYER)|})
    prefill_qkv(LAYER, 0, PLAN_VEC_AT(LAYER, BIAS));
    grid_barrier(count += PREFILL_CTAS);
    prefill_rotate(PLAN_VEC_AT(LAYER, START), PLAN_KV_AT(LAYER), 0);
    grid_barrier(count += PREFILL_CTAS);
    prefill_attn(PLAN_KV_AT(LAYER));
    grid_barrier(count += PREFILL_CTAS);
    prefill_o(LAYER);
    grid_barrier(count += PREFILL_CTAS);
    prefill_norm(PLAN_VEC_AT(LAYER, MLP_NORM));
    grid_barrier(count += PREFILL_CTAS);
    prefill_mlp(LAYER);
    grid_barrier(count += PREFILL_CTAS);
    prefill_down(LAYER);
    grid_barrier(count += PREFILL_CTAS);
    prefill_norm(PLAN_VEC_AT(LAYER, NEXT_NORM));
    grid_barrier(count += PREFILL_CTAS);
|})|}, {|    #pragma unroll 1
    for (int layer = 0; layer < L - 1; layer++) {
        const int vec = layer * VEC_LAYER;
        prefill_qkv(layer, 0, vec + VEC_BIAS);
        grid_barrier(count += PREFILL_CTAS);
        prefill_rotate(vec, layer * KV_LAYER, 0);
        grid_barrier(count += PREFILL_CTAS);
        prefill_attn(layer * KV_LAYER);
        grid_barrier(count += PREFILL_CTAS);
        prefill_o(layer);
        grid_barrier(count += PREFILL_CTAS);
        prefill_norm(vec + VEC_MLP_NORM);
        grid_barrier(count += PREFILL_CTAS);
        prefill_mlp(layer);
        grid_barrier(count += PREFILL_CTAS);
        prefill_down(layer);
        grid_barrier(count += PREFILL_CTAS);
        prefill_norm(vec + VEC_LAYER + VEC_ATTN_NORM);
        grid_barrier(count += PREFILL_CTAS);
    }
|})m4_dnl

    t_note({|layer t_2d(m4_eval(MODEL_L - 1))|})
    prefill_qkv(m4_eval(MODEL_L - 1), H * E / 8, PLAN_VEC_AT(MODEL_L - 1, BIAS));
    grid_barrier(count += PREFILL_CTAS);
    prefill_rotate(PLAN_VEC_AT(MODEL_L - 1, START), PLAN_KV_AT(MODEL_L - 1), H);
}

extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 1) mk_prefill(const __grid_constant__ mk_args args)
{
    if (threadIdx.x == 0)
        G->args = args;
    __syncthreads();
    prefill();
}
