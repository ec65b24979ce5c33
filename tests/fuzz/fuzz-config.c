/* fuzz-config.c - config.json from strangers: never a crash, a hang or an unset error, and
   whatever is accepted is in range and gives finite numbers. */
#include "tests/fuzz/fuzz.h"
#include "gen/model.h"
#include <math.h>

static void need(int ok)
{
    if (!ok)
        abort();
}

static void check_model(const struct gen_model *m)
{
    need(m->name[0] && strlen(m->name) < sizeof(m->name));
    need(m->D > 0 && m->H > 0 && m->K > 0 && m->H % m->K == 0 && m->F > 0 && m->V > 0 && m->L > 0);
    need((m->E == 64 || m->E == 128) && m->D % 8 == 0 && m->F % 8 == 0 && m->max_context > 0);
    need(m->eps > 0 && m->rope_theta > 1 && m->n_end >= 0 && m->n_end <= 8);
    need(gen_model_params_read(m) > 0 && gen_model_params(m) >= gen_model_params_read(m));
    for (int i = 0; i < m->n_end; i++)
        need(m->end[i] >= 0 && m->end[i] < m->V);
    for (int i = 0; i < m->E / 2; i++) {
        float f = gen_model_inv_freq(m, i);

        need(isfinite(f) && f > 0 && f <= 1);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct mk_err err = {0, ""};
    struct gen_model m;
    int rc = gen_model_parse((const char *)data, size, "fuzz/config.json", &m, &err);

    if (rc == 0)
        check_model(&m);
    else
        need((rc == MK_EFORMAT || rc == MK_EUNSUPPORTED) && err.code == rc &&
             strstr(err.text, "fuzz/config.json: ") == err.text);
    return 0;
}

static const char *const words[] = {
    "\"hidden_size\"", "\"num_attention_heads\"", "\"num_key_value_heads\"", "\"head_dim\"",
    "\"vocab_size\"", "\"rope_parameters\"", "\"rope_scaling\"", "\"rope_type\"", "\"llama3\"",
    "\"eos_token_id\"", "\"layer_types\"", "\"quantization_config\"", "[[[[[[[[[[[[[[[[[[[[",
    "{\"a\":{\"a\":{\"a\":", "\\ud800", "\\", "/*", "NaN", "1e-400", "0x10", NULL
};

/* Nested 256 levels, and exactly 64, the limit. */
#define X16(x) x x x x x x x x x x x x x x x x
static const char deep[] = X16(X16("[")), edge[] = X16("[[[[") X16("]]]]");
static const struct fuzz_seed seeds[] = {
    {deep, sizeof(deep) - 1}, {edge, sizeof(edge) - 1}, {"", 0}, {"{}", 2}, {NULL, 0}
};

FUZZ_MAIN(seeds, words, "toy/toy-qwen3/config.json", "toy/toy-qwen3-e128/config.json",
          "toy/toy-qwen2/config.json", "toy/toy-llama/config.json", "toy/toy-smol/config.json",
          NULL)
