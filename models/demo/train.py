#!/usr/bin/env python3
"""Make the demo model: a Qwen3 of 5 M parameters that writes English prose.

  train.py prepare --out DATA               no GPU: texts, tokenizer, token ids
  train.py train --data DATA --out MODEL    one GPU, minutes: weights, config, references

The texts are public-domain novels that Debian packages carry (see PACKAGES); prepare
fetches them with `apt-get download` and needs tokenizers and numpy.  train needs torch,
transformers, tokenizers and safetensors.
"""
import argparse
import json
import math
import re
import shutil
import struct
import subprocess
import time
import zlib
from pathlib import Path

import numpy as np

# package -> the file in it: an R data file (.rdb) or plain text
PACKAGES = {
    "r-cran-janeaustenr": "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
    "r-cran-tokenizers": "usr/lib/R/site-library/tokenizers/data/Rdata.rdb",
    "golang-github-jdkato-prose-dev":
        "usr/share/gocode/src/github.com/jdkato/prose/testdata/sherlock.txt",
}
END = "<|endoftext|>"
SPECIAL = [END, "<|im_start|>", "<|im_end|>"]
VOCAB = 2048
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
              r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
HELD_OUT = 50           # every 50th chapter is for validation

SEQUENCE = 512
PROMPTS = [
    "It was a dark and stormy night, and",
    "\"My dear Watson,\" said Holmes,",
    "She had never been so happy in her life as",
    "The captain stood upon the deck and looked",
    "\"I cannot believe it,\" cried Elizabeth;",
    "Mr. Knightley walked into the room, and",
    "The letter was short:",
    "When they came to the house, the old lady",
]
REFERENCES = 6          # so many of the prompts have a greedy reference
REFERENCE_TOKENS = 48


# ---------------------------------------------------------------- prepare

def fetch(package, member, folder):
    """The path of MEMBER of a Debian package, downloaded and unpacked under FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = folder / package
    if not (tree / member).exists():
        # in the folder itself: apt-get download writes to the current one
        subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True)
        deb = next(folder.glob(package + "_*.deb"))
        subprocess.run(["dpkg-deb", "-x", deb, tree], check=True)
    return tree / member


def r_strings(data):
    """The character vectors of an R lazy-load file, one text each.

    A record is a 4-byte size and a zlib stream; inside: "X\\n", three version words, the
    name of the encoding, the type word, the length, then per string type, size, bytes."""
    at = 0
    while at < len(data):
        unzip = zlib.decompressobj()
        record = unzip.decompress(data[at + 4:])
        at = len(data) - len(unzip.unused_data)
        p = 18 + struct.unpack_from(">i", record, 14)[0]
        count, = struct.unpack_from(">i", record, p + 4)
        p += 8
        lines = []
        for _ in range(count):
            size = max(0, struct.unpack_from(">i", record, p + 4)[0])    # -1: NA
            lines.append(record[p + 8:p + 8 + size].decode())
            p += 8 + size
        yield "\n".join(lines)


def books(folder):
    for package, member in PACKAGES.items():
        path = fetch(package, member, folder)
        if path.suffix == ".rdb":
            yield from r_strings(path.read_bytes())
        else:
            yield path.read_text(encoding="utf-8")


HEADING = re.compile(r"^(?:(?:CHAPTER|Chapter) (?:\d+|[IVXL]+)\b.*"
                     r"|VOLUME [IVX]+|Epilogue"
                     r"|(?:ADVENTURE )?[IVX]+\.(?: [A-Z' -]+)?)$", re.M)
TAIL = re.compile(r"^(?:\*\*\* ?END OF|End of (?:the )?Project|A NOTE ON THE TEXT"
                  r"|THE END$|FINIS$|Finis$)", re.M)


def chapters(book):
    """The chapters of a book as lists of paragraphs; titles, headings, notes and verse
    are left out, hard-wrapped lines joined."""
    book = book.replace("\r", "").replace("\t", " ")
    tail = TAIL.search(book)
    if tail:
        book = book[:tail.start()]
    for chapter in HEADING.split(book)[1:]:
        paragraphs = []
        for block in re.split(r"\n[ \n]*\n", chapter.strip("\n")):
            lines = block.split("\n")
            indented = all(line.startswith("   ") for line in lines)
            text = re.sub(r"\s+", " ", block.replace("_", "")).strip()
            if not indented and re.search("[a-z]", text) and text[0] != "[" \
                    and "*" not in text:
                paragraphs.append(text)
        if sum(map(len, paragraphs)) > 400:
            yield paragraphs


def make_tokenizer(texts):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, \
        pre_tokenizers, processors, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.post_processor = processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens(SPECIAL)       # the last ids, as in Qwen
    assert tokenizer.get_vocab_size() == VOCAB
    return tokenizer


def tokenizer_config(tokenizer):
    added = {str(tokenizer.token_to_id(t)): {
        "content": t, "lstrip": False, "normalized": False, "rstrip": False,
        "single_word": False, "special": True} for t in SPECIAL}
    return {"add_bos_token": False, "add_prefix_space": False,
            "added_tokens_decoder": added, "additional_special_tokens": SPECIAL[1:],
            "bos_token": None, "clean_up_tokenization_spaces": False, "eos_token": END,
            "errors": "replace", "model_max_length": 1024, "pad_token": END,
            "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": None}


def prepare(args):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    texts = ["\n\n".join(c) for b in books(Path(args.packages)) for c in chapters(b)]
    (out / "corpus.txt").write_text("".join(t + "\n" + END + "\n" for t in texts))

    tokenizer = make_tokenizer(texts)
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", tokenizer_config(tokenizer))

    parts = {"tokens": [], "held-out": []}
    for i, encoding in enumerate(tokenizer.encode_batch([t + END for t in texts])):
        parts["held-out" if i % HELD_OUT == HELD_OUT // 2 else "tokens"] += encoding.ids
    for name, ids in parts.items():
        np.save(out / (name + ".npy"), np.array(ids, dtype=np.uint16))
    size = sum(len(t.encode()) for t in texts)
    count = sum(len(ids) for ids in parts.values())
    print(f"{len(texts)} chapters, {size} bytes, {count} tokens ({size / count:.2f} bytes each), "
          f"{len(parts['held-out'])} of them held out")


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------- train

# What is trained, in this order.  The text is small, so a model of the final size learns
# it by heart before it learns English: a wider teacher with much dropout is trained
# first, and the student learns half from the text, half from the teacher's
# distribution at each position.  The plain run is the fall-back and the yardstick.
SMALL = dict(hidden_size=256, num_hidden_layers=6, num_attention_heads=4,
             num_key_value_heads=2, head_dim=64, intermediate_size=768)
WIDE = dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=4, head_dim=64, intermediate_size=1536)
RECIPES = [
    # name, shape, epochs, share of the time, dropout, weight decay, learning rate, role
    ("plain", SMALL, 40, 1, 0.10, 0.1, 3e-3, "candidate"),
    ("teacher-1", WIDE, 50, 3, 0.30, 0.3, 1.5e-3, "teacher"),
    ("teacher-2", WIDE, 70, 3, 0.40, 0.3, 1.5e-3, "teacher"),
    ("student", SMALL, 200, 4, 0.05, 0.1, 3e-3, "student"),
]


def config_json(shape):
    """config.json with the keys that Qwen's own files have."""
    return {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": VOCAB - 3, "eos_token_id": VOCAB - 3,
            "head_dim": shape["head_dim"], "hidden_act": "silu",
            "hidden_size": shape["hidden_size"], "initializer_range": 0.02,
            "intermediate_size": shape["intermediate_size"],
            "max_position_embeddings": 1024,
            "max_window_layers": shape["num_hidden_layers"], "model_type": "qwen3",
            "num_attention_heads": shape["num_attention_heads"],
            "num_hidden_layers": shape["num_hidden_layers"],
            "num_key_value_heads": shape["num_key_value_heads"],
            "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000,
            "sliding_window": None, "tie_word_embeddings": True,
            "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
            "vocab_size": VOCAB}


def make_model(shape, device):
    from transformers import Qwen3Config, Qwen3ForCausalLM
    config = Qwen3Config.from_dict(config_json(shape))
    config._attn_implementation = "sdpa"
    return Qwen3ForCausalLM(config).float().to(device)      # fp32 master weights


def add_dropout(model, rate):
    """Qwen3 has none: drop parts of the embedding and of what each block adds.  RATE is a
    tensor, so that setting it to 0 for validation compiles nothing anew."""
    import torch

    def drop(module, inputs, output):
        keep = (torch.rand_like(output, dtype=torch.float32) >= rate) / (1 - rate)
        return output * keep.to(output.dtype)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def make_forwards(model, args):
    """Two functions ids [B, T] -> logits [B, T, V] with bf16 products: as it is, and
    compiled for training batches where that works."""
    import torch

    def forward(ids):
        with torch.autocast(args.device, dtype=torch.bfloat16):
            return model(input_ids=ids, use_cache=False).logits

    if args.eager:
        return forward, forward
    fast = torch.compile(forward, dynamic=False)
    try:
        ids = torch.zeros(args.batch, SEQUENCE, dtype=torch.long, device=args.device)
        fast(ids).float().mean().backward()
        model.zero_grad(set_to_none=True)
        return forward, fast
    except Exception as error:
        print("torch.compile failed, going on without it:", str(error)[:300], flush=True)
        return forward, forward


class Windows:
    """Batches of positions: each epoch cuts the text anew at a random phase.  Half of the
    windows begin at a paragraph, as prompts do."""

    def __init__(self, tokens, paragraph, batch):
        import torch
        self.tokens, self.batch = tokens, batch
        breaks = torch.nonzero(tokens[:-SEQUENCE - 2] == paragraph).flatten() + 1
        self.paragraphs = torch.cat([breaks.new_zeros(1), breaks])
        self.steps_per_epoch = max(1, (len(tokens) - 1) // SEQUENCE // batch)
        self.left = None

    def next(self):
        import torch
        if self.left is None or len(self.left) < self.batch:
            phase = int(torch.randint(SEQUENCE, ()))
            starts = torch.arange(phase, len(self.tokens) - SEQUENCE, SEQUENCE,
                                  device=self.tokens.device)
            self.left = starts[torch.randperm(len(starts), device=starts.device)]
        starts, self.left = self.left[:self.batch], self.left[self.batch:]
        near = torch.searchsorted(self.paragraphs, starts, right=True) - 1
        snap = torch.rand(len(starts), device=starts.device) < 0.5
        starts = torch.where(snap, self.paragraphs[near], starts)
        return starts[:, None] + torch.arange(SEQUENCE, device=starts.device)


def held_out_loss(forward, tokens, batch):
    """Mean loss over the held-out chapters, in nats a token."""
    import torch
    import torch.nn.functional as nn
    total = count = 0
    starts = torch.arange(0, len(tokens) - SEQUENCE, SEQUENCE, device=tokens.device)
    at = starts[:, None] + torch.arange(SEQUENCE, device=tokens.device)
    with torch.no_grad():
        for some in at.split(batch):
            logits = forward(tokens[some]).float()
            total += nn.cross_entropy(logits.flatten(0, 1), tokens[some + 1].flatten(),
                                      reduction="sum").item()
            count += some.numel()
    return total / count


def train_one(recipe, data, soft, end, part, args):
    """Train by one recipe until its epochs are over, or PART of the time that is left
    until END when all is compiled.
    Returns (model with the best averaged weights, forward, held-out loss)."""
    import torch
    import torch.nn.functional as nn
    name, shape, epochs, _, dropout, decay, peak, role = recipe
    tokens, held_out, paragraph = data
    model = make_model(shape, args.device)
    rate = torch.zeros((), device=args.device)
    add_dropout(model, rate)
    compiling = time.time()
    forward, fast = make_forwards(model, args)
    weights = [p for p in model.parameters()]
    average = [p.detach().clone() for p in weights]
    best, best_loss = [a.clone() for a in average], math.inf
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in weights if p.ndim > 1], "weight_decay": decay},
         {"params": [p for p in weights if p.ndim == 1], "weight_decay": 0.0}],
        lr=peak, betas=(0.9, 0.98), fused=args.device == "cuda")
    windows = Windows(tokens, paragraph, args.batch)
    steps = max(1, epochs * windows.steps_per_epoch)
    count = sum(p.numel() for p in weights)
    start = time.time()
    seconds = max(1e-9, part * (end - start))
    print(f"\n{name}: {count / 1e6:.2f} M parameters, at most {steps} steps, "
          f"{seconds:.0f} s, compiled in {start - compiling:.0f} s", flush=True)

    step, report = 0, max(1, min(100, steps // 10))
    done = 0.0
    while done < 1 and step < steps:
        done = max(step / steps, (time.time() - start) / seconds)
        factor = min(1, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(
            math.pi * min(1, done))))
        for group in optimizer.param_groups:
            group["lr"] = peak * factor
        rate.fill_(dropout)
        at = windows.next()
        logits = fast(tokens[at]).float().flatten(0, 1)
        loss = nn.cross_entropy(logits, tokens[at + 1].flatten())
        if role == "student":
            loss = 0.5 * loss + 0.5 * nn.cross_entropy(logits, soft[at.flatten()].float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        step += 1
        torch._foreach_lerp_(average, [p.detach() for p in weights],
                             max(0.005, 1 / (step + 1)))
        if step % report == 0 or step == steps or done >= 1:
            now = [p.detach().clone() for p in weights]
            set_weights(weights, average)
            rate.fill_(0)
            held = held_out_loss(forward, held_out, args.batch)
            set_weights(weights, now)
            if held < best_loss:
                best, best_loss = [a.clone() for a in average], held
            print(f"{name} step {step} loss {loss.item():.4f} held out {held:.4f} "
                  f"({(time.time() - start) / step * 1e3:.1f} ms a step)", flush=True)
            if held > best_loss + 0.1:
                print(f"{name}: learning by heart now, stopped", flush=True)
                break
    set_weights(weights, best)
    rate.fill_(0)
    return model, forward, best_loss


def set_weights(weights, values):
    import torch
    with torch.no_grad():
        torch._foreach_copy_(weights, values)


def add_soft(soft, forward, tokens, part, batch):
    """soft[i] += part * (the model's distribution of token i + 1).  Windows overlap by
    half, and the second half counts, so that each position has a context."""
    import torch
    half = SEQUENCE // 2
    starts = torch.arange(0, len(tokens) - SEQUENCE, half, device=tokens.device)
    starts = torch.cat([starts, starts.new_tensor([len(tokens) - SEQUENCE - 1])])
    at = starts[:, None] + torch.arange(SEQUENCE, device=tokens.device)
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    with torch.no_grad():
        for some in at.split(batch):
            chance = torch.softmax(forward(tokens[some]).float(), -1)
            keep = torch.zeros_like(some, dtype=torch.bool)
            keep[:, half:] = True
            keep[some[:, 0] == 0] = True
            keep &= ~done[some]
            soft[some[keep]] += (part * chance[keep]).to(soft.dtype)
            done[some[keep]] = True


def train(args):
    import torch
    from tokenizers import Tokenizer
    end = time.time() + 60 * args.minutes
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    data, out = Path(args.data), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    paragraph = tokenizer.token_to_id("\u010a\u010a")       # "\n\n" in byte-level letters
    load = lambda name: torch.from_numpy(
        np.load(data / name).astype(np.int64)[:args.tokens]).to(args.device)
    tokens, held_out = load("tokens.npy"), load("held-out.npy")

    teachers = sum(r[-1] == "teacher" for r in RECIPES)
    soft = torch.zeros(len(tokens), VOCAB, dtype=torch.bfloat16, device=args.device)
    model, model_loss = None, math.inf
    for i, recipe in enumerate(RECIPES):
        part = recipe[3] / sum(r[3] for r in RECIPES[i:])
        trained, forward, loss = train_one(
            recipe, (tokens, held_out, paragraph), soft, end, part, args)
        print(f"{recipe[0]}: held-out loss {loss:.4f}", flush=True)
        if recipe[-1] == "teacher":
            add_soft(soft, forward, tokens, 1 / teachers, args.batch)
        elif loss < model_loss:
            model, model_loss = trained, loss
    save(model, data, out)
    check(data, out, tokenizer)


def save(model, data, out):
    import torch
    from safetensors.torch import save_file
    tensors = {name: value.detach().to("cpu", torch.bfloat16).contiguous()
               for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    write_json(out / "config.json", config_json(SMALL))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (data / name).resolve() != (out / name).resolve():
            shutil.copyfile(data / name, out / name)


def check(data, out, tokenizer):
    """Load what was saved, on the CPU in fp32: held-out loss, samples, references."""
    import torch
    from transformers import Qwen3ForCausalLM
    model = Qwen3ForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    held_out = torch.from_numpy(np.load(data / "held-out.npy").astype(np.int64))
    forward = lambda ids: model(input_ids=ids, use_cache=False).logits
    loss = held_out_loss(forward, held_out, 8)
    text = tokenizer.decode(held_out.tolist(), skip_special_tokens=False)
    bits = loss * len(held_out) / len(text.encode()) / math.log(2)
    print(f"\nsaved model: held-out loss {loss:.4f} nats a token, {bits:.3f} bits a byte")

    references = []
    random = torch.Generator().manual_seed(1)
    for prompt in PROMPTS:
        ids, margins = continue_text(forward, tokenizer, prompt, REFERENCE_TOKENS, 0, None)
        references.append({"prompt": prompt, "prompt_ids": tokenizer.encode(prompt).ids,
                           "ids": ids, "margins": margins, "text": tokenizer.decode(ids)})
        warm, _ = continue_text(forward, tokenizer, prompt, 80, 0.8, random)
        print(f"\n[{prompt}]\ngreedy: {tokenizer.decode(ids)!r}\n"
              f"0.8:    {tokenizer.decode(warm)!r}")
    write_json(out / "greedy-reference.json", references[:REFERENCES])
    print("\nsmallest margin of the references:",
          min(min(r["margins"]) for r in references[:REFERENCES]))


def continue_text(forward, tokenizer, prompt, count, temperature, random):
    """COUNT tokens after PROMPT, fewer when the text ends, and at each step by how much
    the best logit beats the second."""
    import torch
    start = tokenizer.encode(prompt).ids
    ids, margins = list(start), []
    with torch.no_grad():
        while len(margins) < count:
            logits = forward(torch.tensor([ids]))[0, -1].float()
            first, second = torch.topk(logits, 2).values.tolist()
            if temperature:
                chance = torch.softmax(logits / temperature, -1)
                ids.append(int(torch.multinomial(chance, 1, generator=random)))
            else:
                ids.append(int(logits.argmax()))
            margins.append(round(first - second, 6))
            if ids[-1] == VOCAB - 3:
                break
    return ids[len(start):], margins


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sub = parser.add_subparsers(required=True)
    p = sub.add_parser("prepare", help="make corpus, tokenizer and token ids")
    p.add_argument("--out", required=True)
    p.add_argument("--packages", default="/tmp/demo-packages",
                   help="where Debian packages are downloaded and unpacked")
    p.set_defaults(run=prepare)
    p = sub.add_parser("train", help="train, save and sample the model")
    p.add_argument("--data", required=True)
    p.add_argument("--out", required=True)
    p.add_argument("--minutes", type=float, default=7)
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    p.add_argument("--batch", type=int, default=64, help=f"windows of {SEQUENCE} tokens")
    p.add_argument("--tokens", type=int, default=None, help="use so many only (smoke test)")
    p.add_argument("--eager", action="store_true", help="do not use torch.compile")
    p.add_argument("--seed", type=int, default=1)
    p.set_defaults(run=train)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
