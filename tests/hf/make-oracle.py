#!/usr/bin/env python3
"""Make the goldens of t-oracle: logits of Hugging Face's fp32 models on the CPU.

Usage: tests/hf/make-oracle.py [NAME...]      (in the source tree; needs torch and transformers)

Two kinds of models, both a few layers:
  tests/toy/NAME/config.json  weights made from a counter hash (rt_weights_value), rounded to
                              the resident type: no checkpoint has to be kept
  tests/hf/NAME/              a small random checkpoint, written by this script: with larger
                              weights, so that attention is sharp, and with biases and norm
                              weights far from 0 and 1
For each of them tests/hf/NAME.golden, little-endian:
  int32  n tokens, n rows, vocabulary size, resident type (0 bf16, 1 fp16, 2 fp32)
  int32  tokens [n]
  int32  positions of the rows [rows]
  float  logits [rows][V]
"""
import json
import pathlib
import shutil
import sys

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

HERE = pathlib.Path(__file__).resolve().parent
N_TOKENS = 48
ROWS = [0, 1, 15, 16, 31, 47]
SEED = 20240229
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

# toy -> resident type
TOYS = {"toy-qwen3": 0, "toy-qwen2": 1, "toy-llama": 0, "toy-smol": 2, "toy-qwen3-e128": 0}

SIZES = dict(hidden_size=72, num_hidden_layers=2, intermediate_size=104, vocab_size=200,
             num_attention_heads=2, num_key_value_heads=1, head_dim=64, rms_norm_eps=1e-6,
             max_position_embeddings=256, hidden_act="silu", initializer_range=0.15,
             bos_token_id=None, eos_token_id=1)
# checkpoint -> stored (and resident) type, how many bytes a shard may have, config
CHECKPOINTS = {
    "tiny-llama-sharded": (0, "160KB", dict(
        SIZES, model_type="llama", tie_word_embeddings=False, num_key_value_heads=2,
        rope_parameters=dict(rope_type="llama3", rope_theta=10000.0, factor=4.0,
                             low_freq_factor=1.0, high_freq_factor=4.0,
                             original_max_position_embeddings=64))),
    "tiny-qwen2-fp16": (1, "5GB", dict(
        SIZES, model_type="qwen2", tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0))),
    "tiny-qwen3-fp32": (2, "5GB", dict(
        SIZES, model_type="qwen3", tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0))),
}

# The order of enum rt_tensor in runtime/weights.h.
TENSORS = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
           "input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight",
           "self_attn.v_proj.weight", "self_attn.q_proj.bias", "self_attn.k_proj.bias",
           "self_attn.v_proj.bias", "self_attn.q_norm.weight", "self_attn.k_norm.weight",
           "self_attn.o_proj.weight", "post_attention_layernorm.weight", "mlp.gate_proj.weight",
           "mlp.up_proj.weight", "mlp.down_proj.weight"]


def made_weights(name, count):
    """rt_weights_value for indices 0 .. count-1 of the tensor NAME, as fp32."""
    layer = 0
    if name.startswith("model.layers."):
        layer, name = name[len("model.layers."):].split(".", 1)
    mask = (1 << 64) - 1
    golden = 0x9E3779B97F4A7C15
    key = (SEED + golden * (TENSORS.index(name) * 4096 + int(layer) + 1)) & mask
    with np.errstate(over="ignore"):
        z = np.uint64(key) + np.uint64(golden) * np.arange(count, dtype=np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    quarters = sum((z >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48))
    normal = (quarters.astype(np.int64) - 131070).astype(np.float32)
    normal = normal * (np.float32(1) / np.float32(37837))
    scaled = normal * np.float32(0.02)
    return np.float32(1) + scaled if "norm" in name else scaled


def build(config):
    config._attn_implementation = "eager"
    torch.manual_seed(SEED)
    return AutoModelForCausalLM.from_config(config).to(torch.float32).eval()


def rounded(model, resident):
    """Round every parameter of MODEL to the resident type, and back to fp32."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(DTYPES[resident]).to(torch.float32))


def write_golden(name, model, resident):
    vocab = model.config.vocab_size
    rng = np.random.default_rng(SEED)
    tokens = rng.integers(0, vocab, N_TOKENS)
    with torch.no_grad():
        logits = model(torch.tensor(tokens[None]), use_cache=False).logits[0].numpy()
    with open(HERE / f"{name}.golden", "wb") as f:
        np.array([N_TOKENS, len(ROWS), vocab, resident], dtype="<i4").tofile(f)
        tokens.astype("<i4").tofile(f)
        np.array(ROWS, dtype="<i4").tofile(f)
        logits[ROWS].astype("<f4").tofile(f)
    print(f"{name}: logits up to {np.abs(logits).max():.3f}")


def make_toy(name):
    path = HERE.parent / "toy" / name / "config.json"
    model = build(AutoConfig.from_pretrained(path.parent))
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(torch.from_numpy(made_weights(key, p.numel()).reshape(p.shape)))
    rounded(model, TOYS[name])
    write_golden(name, model, TOYS[name])


def make_checkpoint(name):
    resident, shard, keys = CHECKPOINTS[name]
    keys = dict(keys)
    config = AutoConfig.for_model(keys.pop("model_type"), **keys)
    model = build(config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" in key:
                p.uniform_(0.5, 1.5)
            elif key.endswith("bias"):
                p.normal_(0, 0.5)
    rounded(model, resident)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    write_golden(name, model, resident)
    model.to(DTYPES[resident]).save_pretrained(folder, max_shard_size=shard)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for path in folder.iterdir():
        path.chmod(0o644)
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers_version")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main():
    for name in sys.argv[1:] or [*TOYS, *CHECKPOINTS]:
        make_toy(name) if name in TOYS else make_checkpoint(name)


main()
