t_section({|q, k, v = x W (+ bias)|})

// Rows of blocks FIRST .. FIRST + N - 1 of this CTA go to all ranks of the group.
static __device__ __forceinline__ void finish_qkv(int layer, int bias, int first, int n, const float *part, float factor)
{
    const int row = threadIdx.x, warp = threadIdx.x / 32;
    const auto at = [&](int b) { return (first + warp * 4 + b) * GROUP + my_rank(); };
    if (warp * 4 < n) {
        float value = row < n * 8 ? row_total(part, row) * factor : 0.0f;
t_if(MODEL_QKV_BIAS, {|        if (row < n * 8)
            value += S->args.vec[bias + Qkv::block(share_of(my_group()).head0, at(row / 8 % 4)) * 8 + row % 8];
|})m4_dnl
t_if(PLAN_CLUSTER > 1, {|        give_floats(&S->qkv[0][0][0], QKV_HERE, n - warp * 4, value, at);|}, {|        give_blocks(qkv_hop(), layer_tag(layer), n - warp * 4, value, at);|})
    }
}

