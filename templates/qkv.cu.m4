t_section({|q, k, v = x W (+ bias)|})

// Where block B of this CTA stands in its group.
static __device__ __forceinline__ int qkv_place(int b) { return b * GROUP + my_rank(); }

t_if(MODEL_QKV_BIAS, {|// What is added to the row that this thread finishes, of blocks FIRST .. FIRST + N - 1 of this CTA; the vector begins
// at args.vec[BIAS].
static __device__ __forceinline__ float qkv_bias(int bias, int first, int n)
{
    const int block = Qkv::block(share_of(head_group()).head0, qkv_place(first + threadIdx.x / 8));
    return threadIdx.x < n * 8 ? S->args.vec[bias + block * 8 + threadIdx.x % 8] : 0.0f;
}

|})m4_dnl
// Rows of blocks FIRST .. FIRST + N - 1 of this CTA go to all ranks of the group, EXTRA added.
static __device__ __forceinline__ void finish_qkv(int layer, float extra, int first, int n, const float *part, float factor)
{
    const int row = threadIdx.x, warp = threadIdx.x / 32;
    const auto at = [&](int b) { return qkv_place(first + warp * 4 + b); };
    if (warp * 4 < n) {
        const float value = row < n * 8 ? row_total(part, row) * factor + extra : 0.0f;
t_if(PLAN_CLUSTER > 1, {|        give_floats(&S->qkv[0][0][0], QKV_HERE, n - warp * 4, value, at);|}, {|        give_blocks(qkv_hop(), layer_tag(layer), n - warp * 4, value, at);|})
    }
}

