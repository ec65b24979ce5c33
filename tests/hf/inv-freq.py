#!/usr/bin/env python3
"""Print tests/inv-freq.txt: inv_freq of every carried and toy model as Hugging Face computes it.

    tests/hf/inv-freq.py > tests/inv-freq.txt      (run at the top of the source tree)
"""
import glob
import os

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

rotary = {"llama": LlamaRotaryEmbedding, "qwen2": Qwen2RotaryEmbedding,
          "qwen3": Qwen3RotaryEmbedding}
print("# Model folder, E/2, and the bits of each float32 of inv_freq.")
print(f"# Written by tests/hf/inv-freq.py with transformers {transformers.__version__}, "
      f"torch {torch.__version__.split('+')[0]}.")
for path in sorted(glob.glob("models/*/config.json") + glob.glob("tests/toy/*/config.json")):
    folder = os.path.dirname(path)
    if not (os.path.exists(f"{folder}/SOURCE") or folder.startswith("tests/")):
        continue
    config = transformers.AutoConfig.from_pretrained(folder)
    inv_freq = rotary[config.model_type](config).inv_freq.float()
    bits = " ".join(f"{x:08x}" for x in inv_freq.view(torch.int32).tolist())
    print(folder, len(inv_freq), bits)
