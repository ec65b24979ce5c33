t_section({|MLP|})

// silu(x W_gate) * (x W_up) goes to hop MLP.  Gate and up blocks come in turn.
static __device__ __noinline__ void mlp(int layer)
{
    const u32 tag = layer_tag(layer);
    const u32 chunk = layer_chunk(layer) + phase_chunks<Qkv>() + phase_chunks<O>();
    multiply<Mlp>(chunk, [&](int first, int n, const float (*part)[WARPS]) {
        const int row = threadIdx.x, warp = threadIdx.x / 32;
        if (warp * 8 < n) {
            float value = 0.0f;
            if (row < n * 4) {
                const float gate = row_total(part, row / 8 * 16 + row % 8);
                const float up = row_total(part, row / 8 * 16 + 8 + row % 8);
                value = gate / (1.0f + __expf(-gate)) * up * MLP_SCALE;
            }
            send_blocks(S->args.exchange + HOP_MLP, tag, n / 2 - warp * 4, value,
                        [&](int b) { return my_block<Mlp>(first + warp * 8 + b * 2) / 2; });
        }
    });
}

// x = the product; then its projection goes to hop DOWN.
static __device__ __noinline__ void mlp_down(int layer)
{
    const u32 tag = layer_tag(layer);
    consumer_barrier(); // x is free
    await_x<F>(S->args.exchange + HOP_MLP, tag, AT_MLP);
    multiply_send<Down>(layer_chunk(layer + 1) - phase_chunks<Down>(), HOP_DOWN, tag,
                        1.0f / MLP_SCALE);
}

