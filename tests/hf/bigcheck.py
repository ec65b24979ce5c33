#!/usr/bin/env python3
"""Whole models with random weights against Hugging Face, as tests/bigcheck.sh calls it.

Usage: bigcheck.py [--bin FOLDER] [--device gpu|cpu] [--models FOLDER] TASK...
    TASK      check:NAME or rollout:NAME, where FOLDER/NAME/config.json is a model
    --bin     where mkrun and .libs/libmk.so were built (default: .)
    --device  of both sides (default gpu); cpu is for toys: --models tests/toy
    --models  default: $MK_MODELS_DIR, or models

The reference is Hugging Face in fp32 on the checkpoint's bf16 weights, eager attention, no
TF32.  The yardstick is Hugging Face in bf16 with its default attention on the same checkpoint:
over the same rows our mean KL divergence from the reference and our mean NLL error may be
1.1 times the yardstick's, our largest logit error 1.25 times; that last number is the stated
error.  A token that we chose may lie below the reference's best by twice the stated error:
so it is the best wherever the margin is larger.  Elsewhere it may be another one about as
often as the yardstick's choice is.
  check    logits of 256 decode steps (mkrun --logits); then for prompts of many lengths the
           logits after prefill and after 16 greedy tokens on top of it (libmk), the same
           tokens from mkrun, and the first answer again, bit for bit, over a used KV cache
  rollout  4000 greedy tokens to the very end of the context, twice, and the reference over
           all of them; the logits of the last 256 decode steps

Exit status: 0, 1 (a check failed), 77 (no GPU, or no torch or transformers: the reason is
printed).  Files go to a folder under $TMPDIR that is removed; it needs room for two copies of
the largest checkpoint."""
import argparse
import ctypes
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
try:
    import numpy as np
except ImportError as e:
    print(f"bigcheck.py: skipped: {e}")
    sys.exit(77)

SEED = 20240229
DECODE = 256                    # teacher-forced decode steps
PROMPTS = [17, 64, 513, 2048, 4000]
GREEDY = 16                     # tokens after each prompt
BEFORE_ROLLOUT = 96             # tokens; the 4000 others of the context are generated
TAIL = 256                      # rows at the end of a rollout whose logits are compared
CONTEXT = 4096
KL_RATIO, NLL_RATIO, LOGIT_RATIO, UNLIKE_RATIO = 1.1, 1.1, 1.25, 1.1
FEW = 4                         # tokens: counts of 16 scatter
TINY = 1e-7                     # fp32 noise of KL and NLL
CHUNK = 128                     # rows of logits at a time
TIME_LIMIT = 400                # seconds for one program


# ---- Our side in a process of its own: libmk through ctypes, without torch


class Err(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int), ("text", ctypes.c_char * 4096)]


class Options(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("device", ctypes.c_char_p),
                ("cubin_path", ctypes.c_char_p), ("plan_file", ctypes.c_char_p),
                ("set", ctypes.c_void_p), ("threads", ctypes.c_int),
                ("progress", ctypes.c_void_p), ("warn", ctypes.c_void_p),
                ("user", ctypes.c_void_p)]


class Info(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("name", ctypes.c_char_p),
                ("device", ctypes.c_char_p), ("vocab", ctypes.c_int),
                ("max_context", ctypes.c_int), ("has_tokenizer", ctypes.c_int),
                ("has_chat", ctypes.c_int), ("weight_bytes", ctypes.c_int64)]


class Stats(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("load_s", ctypes.c_double),
                ("kernel_s", ctypes.c_double), ("kernel_from", ctypes.c_int),
                ("first_token_s", ctypes.c_double), ("prefill_tokens", ctypes.c_int),
                ("prefill_s", ctypes.c_double), ("decode_tokens", ctypes.c_int),
                ("decode_s", ctypes.c_double)]


class Engine:
    """A model and one context of it."""

    def __init__(self, lib, folder, device, context):
        self.lib = ctypes.CDLL(lib)
        self.err = Err()
        self.model, self.context = ctypes.c_void_p(), ctypes.c_void_p()
        self.info = Info(size=ctypes.sizeof(Info))
        self.stats = Stats(size=ctypes.sizeof(Stats))
        options = Options(size=ctypes.sizeof(Options), device=device.encode())
        self.call("mk_open", folder.encode(), ctypes.byref(options), ctypes.byref(self.model))
        self.call("mk_model_info", self.model, ctypes.byref(self.info))
        self.call("mk_context_make", self.model, context, ctypes.byref(self.context))
        self.call("mk_context_stats", self.context, ctypes.byref(self.stats))

    def call(self, name, *arguments):
        if getattr(self.lib, name)(*arguments, ctypes.byref(self.err)):
            sys.exit(f"{name}: {self.err.text.decode()}")

    def append(self, ids):
        self.call("mk_append", self.context, (ctypes.c_int32 * len(ids))(*ids), len(ids))

    def logits(self, row):
        self.call("mk_logits", self.context, row.ctypes.data_as(ctypes.c_void_p))

    def rows(self, ids, prefill, greedy):
        """Logits after each of ids[prefill-1:] and after each of the greedy tokens that follow;
        and those tokens, with the last one's successor."""
        chosen = []
        n = len(ids) - prefill + 1 + greedy
        out = np.empty((n, self.info.vocab), np.float32)
        self.call("mk_truncate", self.context, 0)
        self.append(ids[:prefill])
        for i in range(n):
            self.logits(out[i])
            follow = ids[prefill + i:prefill + i + 1]
            if not follow:
                chosen.append(int(out[i].argmax()))
                follow = chosen[-1:]
            if i < n - 1:
                self.append(follow)
        return out, chosen

    def close(self):
        self.lib.mk_context_free(self.context)
        self.lib.mk_close(self.model)


def engine_main(path):
    """Do the jobs of the file PATH; rows go to JOB.npy beside it, the rest to stdout."""
    work = json.loads(pathlib.Path(path).read_text())
    e = Engine(work["lib"], work["folder"], work["device"], work["context"])
    chosen = []
    for k, job in enumerate(work["jobs"]):
        rows, ids = e.rows(**job)
        np.save(pathlib.Path(path).parent / f"{k}.npy", rows)
        chosen.append(ids)
    print(json.dumps({"chosen": chosen, "load_s": e.stats.load_s, "kernel_s": e.stats.kernel_s,
                      "kernel_from": e.stats.kernel_from, "device": e.info.device.decode(),
                      "weight_bytes": e.info.weight_bytes}))
    e.close()


class Ours:
    """mkrun and libmk on one checkpoint."""

    def __init__(self, options, folder, scratch, context):
        self.bin = pathlib.Path(options.bin).resolve()
        self.folder, self.scratch = folder, scratch
        self.device, self.context = options.device, context

    def run(self, command):
        p = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=TIME_LIMIT)
        if p.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: exit status {p.returncode}")
        return p.stdout

    def mkrun(self, ids, *arguments):
        path = self.scratch / "ids.txt"
        path.write_text(" ".join(map(str, ids)) + "\n")
        return self.run([self.bin / "mkrun", self.folder, "--ids", path, "--device", self.device,
                         "--context", str(self.context), *arguments])

    def decode_logits(self, ids):
        path = self.scratch / "decode.npy"
        self.mkrun(ids, "--logits", path)
        return np.load(path)

    def answer(self, ids, n):
        out = self.mkrun(ids, "-n", str(n), "--ignore-end", "--print-ids")
        return [int(x) for x in out.split()]

    def library(self, jobs):
        """Returns the rows of every job, and what the process says."""
        work = {"lib": str(self.bin / ".libs" / "libmk.so"), "folder": str(self.folder),
                "device": self.device, "context": self.context, "jobs": jobs}
        path = self.scratch / "jobs.json"
        path.write_text(json.dumps(work))
        said = json.loads(self.run([sys.executable, __file__, "--engine", path]))
        return [np.load(self.scratch / f"{k}.npy") for k in range(len(jobs))], said


# ---- Hugging Face's side


def random_tensor(name, shape, rng):
    """Normal numbers, of such sizes that greedy text does not repeat one token: with 0.02
    everywhere attention is nearly uniform and layers hardly change the residual stream.  Rows
    of the vocabulary differ in length, or few tokens would have a margin to speak of."""
    def normal(*shape):
        return torch.randn(shape, generator=rng, device=rng.device)

    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 1.5 + 0.3 * normal(*shape)
    if "norm" in name:
        return 1 + 0.2 * normal(*shape)
    if name.endswith("bias"):
        return 0.3 * normal(*shape)
    if "embed_tokens" in name or "lm_head" in name:
        return 0.02 * normal(*shape) * torch.exp(0.3 * normal(shape[0], 1))
    wide = ("q_proj.weight", "k_proj.weight", "gate_proj.weight", "up_proj.weight")
    return (0.04 if name.endswith(wide) else 0.02) * normal(*shape)


def make_checkpoint(source, folder, device):
    """Random weights in bf16 for SOURCE/config.json."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(source))
    rng = torch.Generator(device).manual_seed(SEED)
    tensors = {}
    for name, p in model.named_parameters():
        tensors[name] = random_tensor(name, p.shape, rng).to(torch.bfloat16).cpu()
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", folder / "config.json")
    return sum(t.numel() for t in tensors.values())


class Reference:
    """One Hugging Face model, its logits in pieces."""

    def __init__(self, folder, device, dtype, attention):
        self.device = device
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention).to(device).eval()
        assert next(self.model.parameters()).dtype == dtype
        assert self.model.model.rotary_emb.inv_freq.dtype == torch.float32

    def hidden(self, ids):
        with torch.no_grad():
            ids = torch.tensor([ids], device=self.device)
            return self.model.model(input_ids=ids, use_cache=False).last_hidden_state[0]

    def head(self, hidden):
        with torch.no_grad():
            return self.model.lm_head(hidden).float()


class Errors:
    """Differences of logits to the reference's, over any number of rows."""

    def __init__(self):
        self.n = 0
        self.kl = self.nll = self.worst = 0.0

    def add(self, reference, logits, follow):
        p = torch.log_softmax(reference.double(), -1)
        q = torch.log_softmax(logits.double(), -1)
        self.n += len(p)
        self.kl += (p.exp() * (p - q)).sum().item()
        self.nll += (p - q).gather(-1, follow[:, None]).abs().sum().item()
        worst = (logits - reference).abs().max().item()
        self.worst = worst if math.isnan(worst) else max(self.worst, worst)


class Comparison:
    """The reference, the yardstick and ours, row by row of one sequence."""

    def __init__(self, hf):
        self.hf = hf
        self.yard, self.ours = Errors(), Errors()
        self.regret = 0.0       # the reference's best minus its logit of the token that follows
        self.unlike = self.yard_unlike = 0      # tokens that are not the reference's best

    def add(self, ids, first, ours, greedy_from):
        """OURS [n][V] follow ids[first], ids[first+1] ..; None: only the tokens are looked at.
        Tokens of IDS from index GREEDY_FROM on were chosen by us."""
        exact, rounded = (m.hidden(ids)[first:] for m in self.hf)
        n = len(exact) if ours is None else len(ours)
        follow = torch.tensor(ids[first + 1:] + [0], device=exact.device)
        margins = []
        for a in range(0, n, CHUNK):
            b = min(a + CHUNK, n)
            reference, yardstick = self.hf[0].head(exact[a:b]), self.hf[1].head(rounded[a:b])
            self.yard.add(reference, yardstick, follow[a:b])
            if ours is not None:
                self.ours.add(reference, torch.from_numpy(ours[a:b]).to(reference), follow[a:b])
            top = reference.topk(2).values
            regret = top[:, 0] - reference.gather(-1, follow[a:b, None])[:, 0]
            chosen = torch.arange(a, b, device=regret.device) + first + 1
            chosen = (chosen >= greedy_from) & (chosen < len(ids))
            margins += (top[:, 0] - top[:, 1])[chosen].tolist()
            self.unlike += (regret[chosen] > 0).sum().item()
            best = yardstick.argmax(-1) == reference.argmax(-1)
            self.yard_unlike += (~best[chosen]).sum().item()
            self.regret = max([self.regret, *regret[chosen].tolist()])
        self.margins = np.array(margins)

    def stated_error(self):
        return LOGIT_RATIO * self.yard.worst


class Table:
    """Every number beside its limit."""

    def __init__(self, title):
        self.failed = 0
        print(f"{title}\n{'':44}{'ours':>12}{'limit':>12}{'HF bf16':>12}", flush=True)

    def row(self, what, value, limit, yardstick=None):
        ok = value <= limit                     # false for NaN
        self.failed += not ok
        yardstick = "" if yardstick is None else f"{yardstick:12.4g}"
        print(f"{what:44}{value:12.4g}{limit:12.4g}{yardstick:>12}{'' if ok else '  FAILED'}",
              flush=True)

    def note(self, text):
        print(f"  {text}", flush=True)

    def errors(self, what, c):
        n, yard, ours = c.ours.n, c.yard, c.ours
        self.row(f"{what}: mean KL", ours.kl / n, KL_RATIO * yard.kl / n + TINY, yard.kl / n)
        self.row(f"{what}: mean NLL error", ours.nll / n, NLL_RATIO * yard.nll / n + TINY,
                 yard.nll / n)
        self.row(f"{what}: largest logit error", ours.worst, c.stated_error(), yard.worst)

    def tokens(self, what, c):
        limit = 2 * c.stated_error()
        self.row(f"{what}: below the best by", c.regret, limit)
        self.row(f"{what}: not the best", c.unlike, UNLIKE_RATIO * c.yard_unlike + FEW,
                 c.yard_unlike)
        self.note(f"{len(c.margins)} tokens, {(c.margins > limit).sum()} with a margin above "
                  f"{limit:.3g}")


# ---- Tasks


class Bench:
    """A checkpoint, both Hugging Face models and ours; the folder goes with it."""

    def __init__(self, options, name):
        start = time.monotonic()
        source = pathlib.Path(options.models) / name
        self.scratch = pathlib.Path(tempfile.mkdtemp(prefix="bigcheck-"))
        try:
            device = "cuda" if options.device == "gpu" else "cpu"
            folder = self.scratch / name
            n = make_checkpoint(source, folder, device)
            self.config = transformers.AutoConfig.from_pretrained(source)
            self.context = min(CONTEXT, self.config.max_position_embeddings)
            self.ours = Ours(options, folder, self.scratch, self.context)
            self.hf = (Reference(folder, device, torch.float32, "eager"),
                       Reference(folder, device, torch.bfloat16, "sdpa"))
            print(f"{name}: {n / 1e6:.0f} M random weights, context {self.context}, "
                  f"made and read in {time.monotonic() - start:.1f} s", flush=True)
        except BaseException:
            self.close()
            raise

    def random_ids(self, n):
        return np.random.default_rng(SEED).integers(0, self.config.vocab_size, n).tolist()

    def close(self):
        self.hf = None
        shutil.rmtree(self.scratch)


def check_decode(b, table):
    ids = b.random_ids(min(DECODE, b.context))
    c = Comparison(b.hf)
    logits = b.ours.decode_logits(ids)
    assert logits.shape == (len(ids), b.config.vocab_size) and logits.dtype == np.float32
    c.add(ids, 0, logits[:-1], len(ids))
    table.errors(f"{len(ids) - 1} decode steps", c)


def check_prefill(b, table):
    lengths = [n for n in PROMPTS if n + GREEDY < b.context] + [b.context - GREEDY]
    ids = b.random_ids(b.context)
    # The first once more at the end: the KV cache then holds the rows of the others.
    jobs = [{"ids": ids[:n], "prefill": n, "greedy": GREEDY} for n in lengths + lengths[:1]]
    rows, said = b.ours.library(jobs)
    for k, n in enumerate(lengths):
        chosen = said["chosen"][k]
        c = Comparison(b.hf)
        c.add(ids[:n] + chosen[:GREEDY], n - 1, rows[k], n)
        table.errors(f"prompt {n}", c)
        table.tokens(f"prompt {n}: greedy", c)
        answer = b.ours.answer(ids[:n], GREEDY)
        table.row(f"prompt {n}: tokens unlike mkrun's",
                  sum(x != y for x, y in zip(chosen[:GREEDY], answer, strict=True)), 0)
    table.row(f"prompt {lengths[0]} again: bits that differ",
              (rows[0].view(np.uint32) != rows[-1].view(np.uint32)).sum(), 0)
    note_loading(table, said)


def note_loading(table, said):
    gb, seconds = said["weight_bytes"] / 1e9, said["load_s"]
    speed = f", {gb / seconds:.2f} GB/s" if seconds else ""
    how = ["no kernel", "kernel compiled", "kernel from the cache", "kernel from a pack"]
    table.note(f"{said['device']}: {gb:.2f} GB loaded in {seconds:.2f} s{speed}; "
               f"{how[said['kernel_from']]}, {said['kernel_s']:.2f} s")


def task_check(b):
    table = Table("logits and greedy tokens")
    check_decode(b, table)
    check_prefill(b, table)
    return table.failed


def task_rollout(b):
    prompt = b.random_ids(BEFORE_ROLLOUT)
    n = b.context - len(prompt)
    table = Table(f"{n} greedy tokens after {len(prompt)}, the context full")
    first, second = b.ours.answer(prompt, n), b.ours.answer(prompt, n)
    table.row("tokens missing", n - len(first), 0)
    table.row("tokens unlike in the second run",
              sum(x != y for x, y in zip(first, second)) + abs(len(first) - len(second)), 0)
    ids = prompt + first
    c = Comparison(b.hf)
    c.add(ids, 0, None, len(prompt))
    table.tokens("rollout", c)
    table.note(f"{len(set(first))} different tokens")
    rows, said = b.ours.library([{"ids": ids, "prefill": len(ids) - TAIL + 1, "greedy": 0}])
    c = Comparison(b.hf)
    c.add(ids, len(ids) - TAIL, rows[0], len(ids))
    table.errors(f"last {TAIL} steps", c)
    note_loading(table, said)
    return table.failed


def run_task(options, kind, name):
    """Returns how many checks failed; a program that fails is one."""
    start = time.monotonic()
    print(f"\n== {kind} {name}", flush=True)
    try:
        b = Bench(options, name)
        try:
            return {"check": task_check, "rollout": task_rollout}[kind](b)
        finally:
            b.close()
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as e:
        print(f"{kind} {name}: {e}  FAILED", flush=True)
        return 1
    finally:
        print(f"  {time.monotonic() - start:.0f} s", flush=True)


def skip(reason):
    print(f"bigcheck.py: skipped: {reason}")
    sys.exit(77)


def load_packages(device):
    global torch, transformers, safetensors
    try:
        import safetensors.torch
        import torch
        import transformers
    except ImportError as e:
        skip(f"needs the Python packages torch, transformers and safetensors: {e}")
    if device == "gpu" and not torch.cuda.is_available():
        skip("no GPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    transformers.utils.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{torch.cuda.get_device_name() if device == 'gpu' else 'CPU'}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", default=".")
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--models", default=os.environ.get("MK_MODELS_DIR", "models"))
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("task", nargs="*")
    options = parser.parse_args()
    if options.engine:
        return engine_main(options.engine)
    tasks = [t.partition(":") for t in options.task]
    for kind, _, name in tasks:
        if kind not in ("check", "rollout") or not name:
            parser.error(f"'{kind}:{name}': a task is check:NAME or rollout:NAME")
    load_packages(options.device)
    failed = sum(run_task(options, kind, name) for kind, _, name in tasks)
    print(f"\n{failed} checks failed" if failed else "\nall checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
