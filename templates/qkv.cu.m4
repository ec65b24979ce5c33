t_section({|q, k, v = x W (+ bias)|})

// Sends the rows [H][E], [K][E], [K][E] to hop QKV.
static __device__ __noinline__ void qkv(int layer{||}t_if(MODEL_QKV_BIAS, {|, int bias|}))
{
    const u32 tag = layer_tag(layer);
    multiply<Qkv>(layer_chunk(layer), [&](int first, int n, const float (*part)[WARPS]) {
        const int row = threadIdx.x, warp = threadIdx.x / 32;
        if (warp * 4 < n) {
            float value = 0.0f;
            if (row < n * 8) {
                value = row_total(part, row);
t_if(MODEL_QKV_BIAS, {|                value += S->args.vec[bias + my_block<Qkv>(first + row / 8) * 8 + row % 8];
|})m4_dnl
            }
            send_blocks(S->args.exchange + HOP_QKV, tag, n - warp * 4, value,
                        [&](int b) { return my_block<Qkv>(first + warp * 4 + b); });
        }
    });
}

