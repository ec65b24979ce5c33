t_section({|MLP: silu(x W_gate) * (x W_up)|})

// Products of blocks FIRST .. FIRST + N - 1 of this CTA, gate and up in turn, go to all ranks of the group.
static __device__ __forceinline__ void finish_mlp(int layer, int first, int n, const float *part, float factor)
{
    const int row = threadIdx.x, warp = threadIdx.x / 32;
    if (warp * 8 < n) {
        float value = 0.0f;
        if (row < n * 4) {
            const float gate = row_total(part, row / 8 * 16 + row % 8) * factor;
            const float up = row_total(part, row / 8 * 16 + 8 + row % 8) * factor;
            value = __fdividef(gate, 1.0f + __expf(-gate)) * up * MLP_SCALE;
        }
        const auto at = [&](int b) { return (first / 2 + warp * 4 + b) * GROUP + my_rank(); };
t_if(PLAN_CLUSTER > 1, {|        give_halves(S->act, MLP_HERE, n / 2 - warp * 4, value, at);|}, {|        give_blocks(mlp_hop(), layer_tag(layer), n / 2 - warp * 4, value, at);|})
    }
}

// The group's products, in S->act.
static __device__ __forceinline__ void await_product(int layer, int units)
{
t_if(PLAN_CLUSTER > 1, {|    await_landing(MLP_HERE, units * 64, layer, AT_MLP);|}, {|    await_blocks<MOST_UNITS * 4>(S->act, mlp_hop(), units * 4, layer_tag(layer), AT_MLP);
    consumer_barrier();|})
t_lap(MLP_HOP)
}

