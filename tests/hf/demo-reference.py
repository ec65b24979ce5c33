#!/usr/bin/env python3
"""Write tests/demo-reference.txt, which a test in C reads without a JSON parser, from
models/demo/greedy-reference.json (written by models/demo/train.py).

Run at the top of the source tree after the demo model was trained anew."""
import json


def line(key, values):
    return key + " " + " ".join(str(v) for v in values) + "\n"


with open("models/demo/greedy-reference.json", encoding="utf-8") as f:
    references = json.load(f)
with open("tests/demo-reference.txt", "w", encoding="utf-8") as f:
    f.write("# made by tests/hf/demo-reference.py; \\n in a text is a newline\n")
    for r in references:
        assert "\n" not in r["prompt"] and "\\" not in r["prompt"] + r["text"]
        f.write(f"prompt {r['prompt']}\n")
        f.write(line("tokens", r["prompt_ids"]))
        f.write(line("next", r["ids"]))
        f.write(line("margins", r["margins"]))
        f.write("text " + r["text"].replace("\n", "\\n") + "\n")
