t_section({|Pack: a matrix into the streams|})

static __device__ __forceinline__ float fp16_value(u16 x)
{
    const u32 magnitude = (u32)(x & 0x7fff) << 13, sign = (u32)(x & 0x8000) << 16;
    const float value = __uint_as_float(magnitude) * 0x1p112f; // exact, subnormals too
    return __uint_as_float(sign | (magnitude < 0x7c00u << 13 ? __float_as_uint(value) : magnitude | 0x7f800000));
}

// A made weight: near normal, 0.02 wide, from a hash of its index.
static __device__ __forceinline__ float made_value(u64 key, u64 index)
{
    u64 z = key + 0x9E3779B97F4A7C15ull * index;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    const int sum = (int)((z & 0xffff) + (z >> 16 & 0xffff) + (z >> 32 & 0xffff) + (z >> 48));
    return __fmul_rn(__fmul_rn((float)(sum - 131070), 1.0f / 37837.0f), 0.02f);
}

// Element INDEX of the matrix, before it is rounded.
static __device__ __forceinline__ float source_value(const mk_pack_args &args, u64 index)
{
    if (!args.src)
        return made_value(args.key, index);
    if (args.dtype == 0)
        return __uint_as_float((u32)((const u16 *)args.src)[index] << 16);
    if (args.dtype == 1)
        return fp16_value(((const u16 *)args.src)[index]);
    return ((const float *)args.src)[index];
}

// What tile TILE has of row ROW; zeros outside the matrix.
static __device__ __forceinline__ uint4 source_piece(const mk_pack_args &args, int row, int tile)
{
    u32 pair[4];
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        const int col = pair_column(tile, i);
        const u64 at = (u64)row * args.cols + col;
        const float a = row < args.rows && col < args.cols ? source_value(args, at) : 0.0f;
        const float b = row < args.rows && col + 1 < args.cols ? source_value(args, at + 1) : 0.0f;
        pair[i] = pack(a, b);
    }
    return make_uint4(pair[0], pair[1], pair[2], pair[3]);
}

// Threads take pieces of 16 bytes in the order in which a unit has them: tile, then row.
template <class P>
static __device__ __forceinline__ void pack_phase(const mk_pack_args &args)
{
    constexpr int PIECES = P::UNITS * 32; // of a block
    const int blocks = (args.rows + 7) / 8;
    #pragma unroll 1
    for (u64 i = blockIdx.x * blockDim.x + threadIdx.x; i < (u64)blocks * PIECES; i += gridDim.x * blockDim.x) {
        const int block = (int)(i / PIECES), piece = (int)(i % PIECES);
        unsigned char *to = args.stream + place(P::rows(args.layer, args.block0 + block * args.block_step),
                                                P::columns(args.layer, piece / 32));
        ((uint4 *)to)[piece % 32] = source_piece(args, block * 8 + piece % 8, piece / 8);
    }
}

// Row-major, from row row0 on.
static __device__ __forceinline__ void pack_plain(const mk_pack_args &args)
{
    half *to = args.plain + (u64)args.row0 * args.cols;
    #pragma unroll 1
    for (u64 i = blockIdx.x * blockDim.x + threadIdx.x; i < (u64)args.rows * args.cols; i += gridDim.x * blockDim.x)
        to[i] = to_half(source_value(args, i));
}

// Any grid and block.
extern "C" __global__ void mk_pack(const __grid_constant__ mk_pack_args args)
{
    if (args.plain)
        pack_plain(args);
    else if (args.phase == 0)
        pack_phase<Qkv>(args);
    else if (args.phase == 1)
        pack_phase<O>(args);
    else if (args.phase == 2)
        pack_phase<Mlp>(args);
    else if (args.phase == 3)
        pack_phase<Down>(args);
    else
        pack_phase<Head>(args);
}

