t_section({|Pack: a matrix into the streams|})

// Where block BLOCK of a phase lies.  PHASE: where the phase begins in the first stream.
template <class P, class Byte>
static __device__ __forceinline__ Byte *block_at(Byte *phase, int block)
{
    const int dealt = block / P::STEP;
    return phase + dealt % CTAS * CTA_BYTES
         + (u64)(dealt / CTAS * P::STEP + block % P::STEP) * P::BLOCK_BYTES;
}

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

// 8 columns of row ROW from column COL on; zeros outside the matrix.
static __device__ __forceinline__ uint4 source_piece(const mk_pack_args &args, int row, int col)
{
    float v[8];
    #pragma unroll
    for (int i = 0; i < 8; i++) {
        v[i] = 0.0f;
        if (row < args.rows && col + i < args.cols)
            v[i] = source_value(args, (u64)row * args.cols + col + i);
    }
    return make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
}

// Threads take pieces of 16 bytes in the order in which a block has them: tile, then row.
template <class P>
static __device__ __forceinline__ void pack_phase(const mk_pack_args &args, u64 offset)
{
    constexpr int PIECES = P::UNITS * 32; // of a block
    const int blocks = (args.rows + 7) / 8;
    #pragma unroll 1
    for (u64 i = blockIdx.x * blockDim.x + threadIdx.x; i < (u64)blocks * PIECES; i += gridDim.x * blockDim.x) {
        const int block = (int)(i / PIECES), piece = (int)(i % PIECES);
        unsigned char *to = block_at<P>(args.stream + offset, args.block0 + block * args.block_step);
        ((uint4 *)to)[piece] = source_piece(args, block * 8 + piece % 8, piece / 8 * 8);
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
    const u64 layer = args.layer * LAYER_BYTES;
    if (args.plain)
        pack_plain(args);
    else if (args.phase == 0)
        pack_phase<Qkv>(args, layer + QKV_OFFSET);
    else if (args.phase == 1)
        pack_phase<O>(args, layer + O_OFFSET);
    else if (args.phase == 2)
        pack_phase<Mlp>(args, layer + MLP_OFFSET);
    else if (args.phase == 3)
        pack_phase<Down>(args, layer + DOWN_OFFSET);
    else
        pack_phase<Head>(args, HEAD_OFFSET);
}

