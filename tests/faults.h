/* faults.h - faults to be planted in emitted kernels: slips that a person could make, each an edit of the
   text of one world's kernel. */
#ifndef FAULTS_H
#define FAULTS_H
#include "runtime/cxx.h"

static const struct fault {
    int world; /* of mkstorm: where it shows */
    int seeds; /* that are allowed, after the calm run; 0: the calm run must show it */
    int race;  /* hardly any order of events shows it: ThreadSanitizer does */
    const char *text;
    struct rt_plant plant;
} faults[] = {
    /* ---- Barriers that are not there ---- */
    {0, 20, 0, "warps multiply by x before all of it is written",
     {"x-not-awaited", {{"    consumer_barrier(); // x is there\n", "", 1}}}},
    {0, 20, 0, "rows are added up before all warps have left their sums",
     {"sums-not-awaited", {{"        consumer_barrier();\n        finish(", "        finish(", 1}}}},
    {9, 40, 0, "the next attention task begins while the last one is being sent",
     {"work-space-not-free", {{"        consumer_barrier(); // the work space is free\n", "", 1}}}},
    {0, 20, 0, "q and k are normed before all their words are in shared memory",
     {"raw-rows-not-awaited", {{"    });\n    consumer_barrier();\n\n    #pragma unroll 1\n    for (int i = warp;",
                               "    });\n\n    #pragma unroll 1\n    for (int i = warp;", 1}}}},
    {0, 20, 0, "attention begins before q, key and value are rotated",
     {"q-not-awaited", {{"    consumer_barrier();\n}\n\n// The keys and values that",
                        "}\n\n// The keys and values that", 1}}}},
    {0, 20, 0, "attention is sent before all warps have left theirs",
     {"attn-not-awaited", {{"        consumer_barrier();\n        attn_send(", "        attn_send(", 1}}}},
    {0, 20, 0, "the norm's sum is taken before all warps have left theirs",
     {"norm-not-awaited", {{"        S->sum[threadIdx.x / 32] = value;\n    consumer_barrier();\n",
                           "        S->sum[threadIdx.x / 32] = value;\n", 1}}}},
    {0, 0, 1, "a warp leaves its candidate where the last ones are being read",
     {"best-not-free", {{"    consumer_barrier(); // S->best is free\n", "", 1}}}},
    {0, 40, 0, "the sampler's bins are cleared while the last digit is being chosen",
     {"bins-not-free", {{"    consumer_barrier(); // S->hist is free\n", "", 1}}}},
    {0, 40, 0, "all CTAs' counts are added to bins that are not cleared yet",
     {"bins-not-awaited", {{"    consumer_barrier();\n    const auto at = [&](int word) { return hop + word; };\n"
                           "    await_words<CTAS * 16>",
                           "    const auto at = [&](int word) { return hop + word; };\n"
                           "    await_words<CTAS * 16>", 1}}}},
    {0, 20, 0, "warps begin the next token before it is known",
     {"token-not-awaited", {{"    consumer_barrier();\n    return !load_flag(&S->done);",
                            "    return !load_flag(&S->done);", 1}}}},
    {0, 20, 0, "the token is counted before all have read the count",
     {"counted-early", {{"    Best best = head();\n",
                         "    Best best = head();\n    if (threadIdx.x == 0)\n        S->index++;\n", 1},
                        {"        const int i = S->index + 1;\n", "        const int i = S->index;\n", 1}}}},
    {0, 20, 0, "prefill: stages are multiplied before all threads' copies are there",
     {"stages-not-awaited", {{"        __syncthreads(); // all threads' copies are here, and stage NEXT is free\n"
                             "        if (chunk", "        if (chunk", 1}}}},
    {0, 40, 0, "prefill: the next tile's copies land in stages that are being read",
     {"stages-not-free", {{"    __syncthreads(); // the stages are free\n    #pragma unroll\n"
                          "    for (int i = 0; i < T::STAGES - 1", "    #pragma unroll\n"
                          "    for (int i = 0; i < T::STAGES - 1", 1}}}},
    {0, 40, 0, "prefill: sums of warps are added up before they are all there",
     {"parts-not-awaited", {{"            }\n            __syncthreads();\n            #pragma unroll 1\n"
                            "            for (int i = wk",
                            "            }\n            #pragma unroll 1\n            for (int i = wk", 1}}}},
    {10, 20, 0, "prefill: attention reads keys and values before all threads' copies are there",
     {"flash-not-awaited", {{"            __syncthreads(); // all threads' copies are here, and stage NEXT is free\n"
                            "            if (ahead", "            if (ahead", 1}}}},

    /* ---- The grid barrier ---- */
    {0, 20, 0, "prefill: attention begins before all keys are rotated: one grid barrier missing",
     {"grid-barrier-missing", {{"    prefill_rotate(0, 0, 0);\n    grid_barrier(count += CTAS);\n",
                               "    prefill_rotate(0, 0, 0);\n", 1}}}},
    {0, 40, 0, "a CTA comes to the grid barrier before its other warps have written",
     {"grid-barrier-early", {{"    __syncthreads();\n    if (threadIdx.x == 0) {\n        Watch watch;",
                             "    if (threadIdx.x == 0) {\n        Watch watch;", 1}}}},
    {0, 20, 0, "warps leave the grid barrier before its first thread does",
     {"grid-barrier-left", {{"AT_GRID, count, seen);\n    }\n    __syncthreads();\n",
                            "AT_GRID, count, seen);\n    }\n", 1}}}},
    {0, 20, 0, "a CTA comes to the grid barrier with nothing that orders its writes before",
     {"grid-barrier-relaxed", {{"{ mkhost_add_release(p, v); }",
                                "{ __atomic_fetch_add(p, v, __ATOMIC_RELAXED); mkhost_changed(p); }", 1}}}},
    {0, 20, 0, "the grid barrier's counter is set to zero inside the kernel",
     {"grid-barrier-reset", {{"        add_release(G->args.barrier, 1);\n",
                              "        count = CTAS;\n        add_release(G->args.barrier, 1);\n", 1},
                             {"AT_GRID, count, seen);\n", "AT_GRID, count, seen);\n        if (blockIdx.x == 0)\n"
                              "            store_system(G->args.barrier, 0);\n", 1}}}},

    /* ---- Words and tags ---- */
    {0, 0, 0, "the tag of a word is not checked",
     {"tag-not-checked", {{"            all = wrong == 0;\n", "            all = true;\n", 1}}}},
    {0, 40, 0, "the split merge checks the sums' tag, not that of maximum and sum",
     {"scale-not-checked", {{"while (part.tag != tag || scale.tag != tag) {", "while (part.tag != tag) {", 1}}}},
    {0, 20, 0, "the split merge waits with a maximum that it read before it waited",
     {"stale-maximum", {{"while (part.tag != tag || scale.tag != tag) {", "while (part.tag != tag) {", 1},
                        {"                scale = load_word(scale_at);\n", "", 1}}}},
    {12, 0, 0, "the split merge scales sums by a maximum of the step before",
     {"stale-merge", {{" i) * theirs;\n            best = top;\n", " i) * theirs;\n", 1}}}},
    {0, 20, 0, "a word is stored as four values that may be seen one by one",
     {"torn-word", {{"    mkhost_store(p, &w, sizeof w, sizeof w, false);",
                     "    mkhost_store(p, &w, sizeof w, 4, false);", 1}}}},
    {0, 20, 0, "the sampler's counts go to the same words for every digit",
     {"counts-reused", {{"HOP_COUNT + tag % 2 * (CTAS * 16);", "HOP_COUNT;", 1}}}},
    {0, 20, 0, "all layers of a token have the same tag",
     {"tag-of-layer", {{"S->index * TOKEN_TAGS + layer;", "S->index * TOKEN_TAGS;", 1}}}},
    {0, 20, 0, "all tokens of a launch have the same tags",
     {"tag-of-token", {{"    return S->args.epoch + S->index * TOKEN_TAGS + layer;",
                        "    return S->args.epoch + layer;", 1}}}},
    {7, 0, 0, "tags with a parity bit are compared as signed numbers, which fails when they wrap",
     {"tag-wraps", {{"    return S->args.epoch + S->index * TOKEN_TAGS + layer;",
                     "    return (S->args.epoch + S->index * TOKEN_TAGS + layer) * 2;", 1},
                    {"wrong |= w[i].tag ^ tag;", "wrong |= (int)w[i].tag < (int)tag;", 1}}}},
    {0, 20, 0, "a word of the last block is never sent",
     {"word-not-sent", {{"if (lane < 12 && block < n)", "if (lane < 11 && block < n)", 1}}}},

    /* ---- The weight ring ---- */
    {0, 0, 0, "consumers wait for the wrong phase of a stage",
     {"ring-phase", {{"mbarrier_try_wait(full, use & 1)", "mbarrier_try_wait(full, (use + 1) & 1)", 1}}}},
    {0, 20, 0, "the producer waits for the wrong phase of a free stage",
     {"ring-free-phase", {{"mbarrier_test_wait(free, (use - 1) & 1)", "mbarrier_test_wait(free, use & 1)", 1}}}},
    {3, 20, 0, "the producer does not wait for a free stage",
     {"ring-not-free", {{"const bool go = chunk - landed < most && gate_free(&S->free[stage], chunk / STAGES);",
                         "const bool go = chunk - landed < most;", 1}}}},
    {3, 20, 0, "a stage is released before it is read",
     {"released-early", {{"            wait_landed(chunk + b);\n",
                          "            wait_landed(chunk + b);\n"
                          "        if (lane < N)\n"
                          "            gate_release(&S->free[(chunk + lane) % STAGES]);\n", 1},
                         {"        __syncwarp();\n        if (lane < N)\n"
                          "            gate_release(&S->free[(chunk + lane) % STAGES]);\n", "", 1}}}},
    {3, 20, 0, "a stage is free before the first warp has released it",
     {"released-by-few", {{"mbarrier_init(free, WARPS);", "mbarrier_init(free, WARPS - 1);", 1},
                          {"        if (lane < N)\n            gate_release(",
                           "        if (lane < N && warp)\n            gate_release(", 1}}}},
    {1, 20, 0, "a stage counts as landed when its cp.asyncs are on their way",
     {"landed-early", {{"    mbarrier_arrive_copied(full);\n", "    mbarrier_arrive(full);\n", 1}}}},
    {0, 20, 0, "the copy engine is told of 16 bytes fewer than it brings",
     {"expects-too-few", {{"mbarrier_arrive_expect(full, bytes);", "mbarrier_arrive_expect(full, bytes - 16);",
                           1}}}},
    {0, 0, 0, "no fence between making the mbarriers and the copy engine",
     {"no-proxy-fence", {{"{\n    fence_async_proxy();\n}", "{\n}", 1}}}},
    {9, 40, 0, "the producer leaves while copies are on their way",
     {"no-drain", {{"    drain();\n", "", 1}}}},
    {2, 40, 0, "sm_75: a stage counts as landed when one lane has written its part",
     {"filled-by-one", {{"    __syncwarp();\n    if (lane == 0) {\n        __threadfence_block();\n",
                         "    if (lane == 0) {\n        __threadfence_block();\n", 1}}}},
    {0, 40, 0, "prefill: one more group of cp.async may be on its way than the stage needs",
     {"group-off-by-one", {{"copy_wait<T::STAGES - 2>();", "copy_wait<T::STAGES - 1>();", 1}}}},
    {10, 40, 0, "prefill: the same in its attention",
     {"flash-group", {{"copy_wait<FLASH_STAGES - 2>();", "copy_wait<FLASH_STAGES - 1>();", 1}}}},

    /* ---- Sums ---- */
    {0, 0, 0, "the last warp's partial sum is lost",
     {"sum-lost", {{"    for (int i = 0; i < WARPS; i++)\n        total += part[row][i];",
                    "    for (int i = 0; i < WARPS - 1; i++)\n        total += part[row][i];", 1}}}},
    {0, 0, 0, "the projection is added to the residual twice",
     {"double-add", {{"                *r += word_value(got, i);\n",
                      "                *r += word_value(got, i);\n                *r += word_value(got, i);\n",
                      1}}}},
    {0, 0, 0, "prefill: every CTA adds the whole projection to the one residual",
     {"all-add", {{"    for (int tile = blockIdx.x; tile < tiles; tile += CTAS) {",
                   "    for (int tile = 0; tile < tiles; tile++) {", 1}}}},
    {3, 0, 0, "warps multiply units that the chunk does not have",
     {"units-past-end", {{"if ((i + 1) * WARPS <= units || i * WARPS + warp < units) {", "if (true) {", 1}}}},
    {3, 0, 0, "columns behind the end of x are not zero",
     {"x-not-padded", {{"    pad_x(D);\n", "", 1}}}},

    /* ---- Rows and splits ---- */
    {0, 0, 0, "one CTA has a block of rows too many",
     {"rows-off-by-one", {{"((int)blockIdx.x < DEALT % CTAS)", "((int)blockIdx.x <= DEALT % CTAS)", 1}}}},
    {0, 0, 0, "gate and up blocks are dealt one by one",
     {"rows-of-step", {{"    return (local / P::STEP * CTAS + blockIdx.x) * P::STEP + local % P::STEP;",
                        "    return local * CTAS + blockIdx.x;", 1}}}},
    {0, 0, 0, "the attention's splits share a position",
     {"split-from", {{"const int from = (int)((long long)(pos + 1) * split / splits);",
                      "const int from = (int)((long long)pos * split / splits);", 1}}}},
    {0, 0, 0, "the attention's last split ends a position early",
     {"split-to", {{"const int to = (int)((long long)(pos + 1) * (split + 1) / splits);",
                    "const int to = (int)((long long)pos * (split + 1) / splits);", 1}}}},
    {0, 0, 0, "prefill: a token does not see its own position",
     {"causal-mask", {{"if (j * 8 + lane % 4 * 2 + c % 2 > last[c / 2])",
                       "if (j * 8 + lane % 4 * 2 + c % 2 >= last[c / 2])", 1}}}},

    /* ---- Rows of the KV cache ---- */
    {7, 40, 0, "a row of the cache is written late: no fences between it and the next token's reads",
     {"row-late", {{"        fence_gpu(); // this CTA's cache rows before the word that lets others read them\n",
                    "", 1},
                   {"    block_best(best);\n    fence_gpu();\n}", "    block_best(best);\n}", 1}}}},
    {0, 20, 0, "the row of this position is read ahead from the cache, which has it later",
     {"row-read-early", {{"min(min(row(base, r), to - 1), pos - 1)", "min(row(base, r), to - 1)", 1},
                         {"if (min(Rows::row(base, r), to - 1) == pos) {",
                          "if (min(Rows::row(base, r), to - 1) > pos) {", 1}}}},

    /* ---- The token ---- */
    {0, 0, 0, "the best of a warp is looked for in half of its lanes",
     {"argmax-lanes", {{"    for (int i = 16; i; i /= 2)\n        best = better(",
                        "    for (int i = 8; i; i /= 2)\n        best = better(", 1}}}},
    {6, 0, 0, "the best of a warp by a tree that halves 24 lanes: 12, 6, 3, 1",
     {"argmax-tree", {{"    for (int i = 16; i; i /= 2)\n        best = better(",
                       "    for (int i = 12; i; i /= 2)\n        best = better(", 1}}}},
    {9, 0, 0, "the best of the warps is looked for in every other one",
     {"argmax-warps", {{"    for (int i = 0; i < WARPS; i++)\n        best = better(",
                        "    for (int i = 0; i < WARPS; i += 2)\n        best = better(", 1}}}},
    {0, 0, 0, "the sampler's bins are not cleared",
     {"bins-not-cleared", {{"    consumer_barrier(); // S->hist is free\n    if (threadIdx.x < 80)\n"
                            "        S->hist[threadIdx.x / 5][threadIdx.x % 5] = 0;\n",
                            "    consumer_barrier(); // S->hist is free\n", 1}}}},
    {7, 40, 0, "each CTA looks at the cancel word for itself",
     {"canceled-apart", {{"    if (blockIdx.x == 0 && threadIdx.x % 32 == 0)\n        store_flag(&S->canceled",
                          "    if (threadIdx.x % 32 == 0)\n        store_flag(&S->canceled", 1},
                         {"if (best.canceled || i ==", "if (load_flag(&S->canceled) || i ==", 1}}}},
    {0, 0, 0, "a launch runs one token more than it is asked for, past the end of the context",
     {"launch-overruns", {{"|| i == S->args.n ||", "|| i == S->args.n + 1 ||", 1},
                          {"        if (i < S->args.n)\n", "        if (i <= S->args.n)\n", 1},
                          {"S->filled < S->args.n * token_chunks()",
                           "S->filled < (S->args.n + 1) * token_chunks()", 1}}}},

    /* ---- What other kernels got wrong in the model ---- */
    {0, 0, 0, "rotation by theta 10,000, which this model does not have",
     {"rope-theta", {{"        rope[i] = ((const float2 *)S->args.rope)[(u64)pos * (E / 2) + lane + i * 32];\n",
                      "    {\n        const float angle = pos * exp2f((lane + i * 32) * (-13.2877124f * 2 / E));\n"
                      "        rope[i] = make_float2(__builtin_cosf(angle), __builtin_sinf(angle));\n    }\n", 1}}}},
    {0, 0, 0, "rotation the other way round",
     {"rope-sign", {{"            a[i] = x * rope[i].x - y * rope[i].y;\n            b[i] = y * rope[i].x + x * rope[i].y;",
                     "            a[i] = x * rope[i].x + y * rope[i].y;\n            b[i] = y * rope[i].x - x * rope[i].y;",
                     1}}}},
    {0, 0, 0, "no norm of queries and keys",
     {"qk-norm-dropped", {{"            x.norm(q_norm);\n", "", 1},
                          {"                x.norm(k_norm);\n", "", 1},
                          {"                x[i].norm(q_norm);\n", "", 1},
                          {"                x[i].norm(k_norm);\n", "", 1}}}},

    /* ---- Races that no order of events shows, or hardly any ---- */
    {5, 10, 1, "the sampler reads logits that another warp has not written yet",
     {"logits-not-awaited", {{"    consumer_barrier(); // the logits are written\n", "", 1}}}},
    {0, 0, 0, "a stage is released with nothing that orders the other lanes' reads before it",
     {"no-syncwarp", {{"        __syncwarp();\n        if (lane < N)\n            gate_release(",
                       "        if (lane < N)\n            gate_release(", 1}}}},
    {2, 10, 1, "sm_75: no fence between a stage's bytes and the count that tells of them",
     {"no-fill-fence", {{"        __threadfence_block();\n        atomicAdd(&full->count, 1);",
                         "        atomicAdd(&full->count, 1);", 1}}}},
    {2, 10, 1, "sm_75: no fence between reading that a stage has landed and reading it",
     {"no-landed-fence", {{"    bool landed = (int)(load_volatile(&full->count) - use) > 0;\n"
                           "    __threadfence_block();\n",
                           "    bool landed = (int)(load_volatile(&full->count) - use) > 0;\n", 1}}}},
    {10, 10, 1, "no fence between a row of the cache and the word that lets others read it",
     {"no-row-release", {{"        fence_gpu(); // this CTA's cache rows before the word that lets others read"
                          " them\n", "", 1}}}},
    {10, 10, 1, "no fence between reading that all CTAs have come this far and reading their rows",
     {"no-row-fence", {{"    block_best(best);\n    fence_gpu();\n}", "    block_best(best);\n}", 1}}}},
};
enum { FAULTS = sizeof faults / sizeof *faults };
#endif
