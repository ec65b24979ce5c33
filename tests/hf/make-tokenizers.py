#!/usr/bin/env python3
"""Make tests/tokenizers/: small tokenizers of each kind that we read, and their goldens.

Usage: make-tokenizers.py [OUTPUT_FOLDER]        (default: tests/tokenizers beside this script)

Needs the Python package `tokenizers` (0.23 made the files in the repository).  The same
version gives the same bytes.  For each kind KIND/tokenizer.json and KIND/golden are written.
A line of golden:  hex of the UTF-8 text <TAB> ids <TAB> ids when the text of special tokens
is ordinary text (encode_special_tokens), both without what the post-processor adds.
A line of utf8.golden:  hex of any bytes <TAB> hex of bytes.decode(errors="replace").
A line of nfc.golden:  hex of a text <TAB> hex of what the library's NFC makes of it.
"""
import json
import os
import random
import sys
import unicodedata

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers, processors, trainers

QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

# Ranges whose characters every library knows.
SCRIPTS = [(0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x17F), (0x250, 0x2AF), (0x391, 0x3A1),
           (0x3B1, 0x3C9), (0x410, 0x44F), (0x531, 0x556), (0x561, 0x586), (0x5D0, 0x5EA),
           (0x621, 0x63A), (0x641, 0x64A), (0x710, 0x72F), (0x780, 0x7A5), (0x905, 0x939),
           (0x985, 0x98C), (0xA05, 0xA0A), (0xA85, 0xA8B), (0xB05, 0xB0C), (0xB85, 0xB8A),
           (0xC05, 0xC0C), (0xC85, 0xC8C), (0xD05, 0xD0C), (0xD85, 0xD96), (0xE01, 0xE30),
           (0xE81, 0xE82), (0xF40, 0xF47), (0x1000, 0x1020), (0x10D0, 0x10F0), (0x1100, 0x1112),
           (0x1200, 0x1206), (0x13A0, 0x13F4), (0x1401, 0x1420), (0x1681, 0x169A),
           (0x16A0, 0x16EA), (0x1780, 0x17A0), (0x1820, 0x1842), (0x2C80, 0x2CE3),
           (0x2D30, 0x2D60), (0x3041, 0x3096), (0x30A1, 0x30FA), (0x3105, 0x312D),
           (0x4E00, 0x4E80), (0xA000, 0xA040), (0xAC00, 0xAC60), (0x10330, 0x10340),
           (0x10400, 0x10420), (0x12000, 0x12040), (0x13000, 0x13040), (0x1D400, 0x1D440),
           (0x20000, 0x20040)]
MARKS = [0x300, 0x301, 0x302, 0x303, 0x307, 0x308, 0x30A, 0x316, 0x323, 0x327, 0x328, 0x345,
         0x34F, 0x358, 0x5B0, 0x5BC, 0x64B, 0x651, 0x93C, 0x94D, 0x9BE, 0xB57, 0xE34, 0xE48,
         0xF71, 0xF72, 0x1161, 0x11A8, 0x3099, 0x309A, 0x20D0, 0x1D165]
DIGITS = [0x30, 0x37, 0xB2, 0xBD, 0x660, 0x6F5, 0x967, 0x9E9, 0xE52, 0x2070, 0x2155, 0x2167,
          0x2460, 0x24F5, 0x2776, 0x3007, 0x3021, 0x3220, 0xFF15, 0x10107, 0x1D7D8, 0x1F100]
SPACES = [0x9, 0xA, 0xB, 0xC, 0xD, 0x20, 0x85, 0xA0, 0x1680, 0x180E, 0x2000, 0x2003, 0x2007,
          0x200A, 0x200B, 0x200C, 0x200D, 0x2028, 0x2029, 0x202F, 0x205F, 0x2060, 0x3000, 0xFEFF,
          0x1C, 0x1F]
SIGNS = [0x21, 0x22, 0x24, 0x27, 0x28, 0x2D, 0x2E, 0x2F, 0x3C, 0x3E, 0x40, 0x5F, 0x7B, 0x7C, 0x7D,
         0x0, 0x1B, 0x7F, 0x80, 0xA1, 0xAD, 0xD7, 0x17F, 0x212A, 0x212B, 0x2019, 0x2026, 0x20AC,
         0x2126, 0x2192, 0x221E, 0x2329, 0x2764, 0xFE0F, 0x1F3FD, 0x1F600, 0x1F468, 0x1F1E9,
         0x1F1EA, 0x1F680, 0xE000, 0xFDD0, 0xFFFD, 0xFFFF, 0xF900, 0xFA10, 0xFB01, 0xFB1D,
         0x1D15E, 0x2F800, 0x10FFFF]
WORDS = """the of and to in that it was he she you his her with as had not for at on is I all
be but they said there could would little time when what out about then down up into very some
river mountain stone light water house garden letter window morning evening thousand question
answer remember understand nothing something everything themselves although however because
between through against without within another never always perhaps suddenly quietly slowly"""
CODE = ["for (int i = 0; i < n; i++) {\n    sum += a[i] * b[i];\n}\n",
        "def main(argv):\n    if len(argv) != 2:\n        return 1\n\n\n",
        "#include <stdio.h>\r\n\r\nint main(void)\r\n{\r\n\treturn 0;\r\n}\r\n",
        "SELECT name, COUNT(*) FROM t WHERE x >= 3.14159 GROUP BY name;",
        "https://example.org/a/b?c=d&e=%20f#g", "x_1 = {'a': [1, 2, 3], \"b\": None}"]


def word(rng):
    lo, hi = rng.choice(SCRIPTS)
    return "".join(chr(rng.randint(lo, hi)) for _ in range(rng.randint(1, 7)))


def noise(rng, n):
    """Random characters of all sorts, marks and spaces in runs."""
    out = []
    while len(out) < n:
        kind = rng.choice([SPACES, SIGNS, DIGITS, MARKS, None, None])
        if kind is None:
            lo, hi = rng.choice(SCRIPTS)
            out.append(chr(rng.randint(lo, hi)))
        else:
            out += [chr(rng.choice(kind)) for _ in range(rng.randint(1, 3))]
    return "".join(out)


def corpus():
    rng = random.Random(1)
    words = WORDS.split()
    lines = list(CODE) * 8
    for _ in range(1500):
        lines.append(" ".join(rng.choice(words) for _ in range(rng.randint(3, 14))).capitalize()
                     + rng.choice([".", "!", "?", "...", ",", ";", "\n", "'s", "'ll", " 1984"]))
    for _ in range(300):
        lines.append(" ".join(word(rng) for _ in range(6)))
    for _ in range(200):
        lines.append(noise(rng, 20))
    for _ in range(100):
        lines.append(str(rng.randint(0, 10 ** rng.randint(1, 9))) + " " * rng.randint(1, 20))
    return lines


HARD = ["", " ", "  ", "\n", "\r\n", "\t\t", "a", " a", "a ", " a ", "a  b", "a   b", "\n\n\n",
        " \n \n ", "a\n\n b", "   \n   x", "x   \n", "tabs\t\tand \t mixed", "\u00a0\u00a0x",
        "\u180e\u180ex \u180e", "\u0085x\u0085 y", "a\u2028b\u2029c", "\u200bzero\u200dwidth\ufeff",
        "I'm you're HE'LL they'Ve we'd it'S 'twas don't", "'\u017f \u017ftop '\u017ftop",
        "1 12 123 1234 12345 123456789", "3.14159 -1e-9 0xFF 1,000,000", "x1y22z333",
        "\u0661\u0662\u0663 \u00bd\u00b2\u00b3 \u2167\u2168 \u2460\u2461 \u3007\u4e00",
        "cafe\u0301 caf\u00e9 CAFE\u0301", "A\u030a \u00c5 \u212b", "\u1100\u1161\u11a8 \uac01",
        "\u0344 \u0958 \u2126 \ufb01 \u1e9b\u0323", "q\u0307\u0323 q\u0323\u0307",
        "a" + "\u0301" * 40, "\u0323\u0301" * 20, "\u0301lone", "e\u0301\u0301\u0327\u0328\u0345",
        "\U0001d15e \U0001d157\U0001d165 \u0f43 \u0f42\u0fb7 \u0f73", "\U0002f800\uf900",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f44b\U0001f3fd",
        "\u2764\ufe0f \u263a\ufe0f", "\u4f60\u597d\uff0c\u4e16\u754c\uff01", "\u3053\u3093\u306b",
        "\u041f\u0440\u0438\u0432\u0435\u0442", "\u05e9\u05c1\u05dc\u05d5\u05dd",
        "\u0627\u0644\u0633\u064e\u0651\u0644\u0627\u0645", "\u0928\u092e\u0938\u094d\u0924\u0947",
        "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\u10d2\u10d0\u10db", "\u1218\u1230",
        "\u0000\u0001\u001f\u007f\u0080", "\ufffd\ufffe\uffff", "\U0010ffff\ue000",
        "a" * 300, "ab" * 200, " " * 300, "\n" * 100, " \n" * 80, "-" * 200, "1" * 101,
        "x" + " " * 50 + "y", " " * 50 + "\n" + " " * 50 + "z", "=" * 20 + "\r\n" * 10,
        "!!!???\n\n...", " !\r\n\r\n?", "(a)[b]{c}<d>", "a_b__c___", "snake_case CamelCase",
        "$100 \u20ac5 \u00a37", "#tag @user a@b.c", "\\n \\t \\\\", "\"quoted\" \u201ccurly\u201d",
        "don\u2019t", "naive na\u00efve nai\u0308ve", "\u1e69 s\u0323\u0307 s\u0307\u0323",
        # younger than the tables of the library's NFC (Unicode 9)
        "x\u0345\u1df9 x\u1df9\u0323\u0301", "a\u08d3\u0301 a\u0301\u1abf\u0323",
        "\U00011935\U00011930 \U00011938", "e\U0001e130\u0301"]


def samples(specials):
    rng = random.Random(2)
    words = WORDS.split()
    out = list(HARD) + CODE
    for s in specials:
        out += [s, s + s, " " + s + " ", "a" + s + "b", s[:-1], s[1:], s + "\n", "  \n" + s + "  x",
                "e" + s + "\u0301", "_" + s, s + "7 " + s + ".", s.upper(), s[: len(s) // 2] + s]
    for _ in range(60):
        out.append(" ".join(rng.choice(words) for _ in range(rng.randint(1, 9))))
    for _ in range(60):
        out.append(" ".join(word(rng) for _ in range(rng.randint(1, 5))))
    for i in range(120):
        out.append(noise(rng, 3 + i // 6))
    for _ in range(40):
        out.append("".join(rng.choice([rng.choice(specials), noise(rng, 2), " ", rng.choice(words)])
                           for _ in range(6)))
    for _ in range(30):
        out.append("".join(chr(c) for c in (rng.randrange(0x110000) for _ in range(12))
                           if not 0xD800 <= c <= 0xDFFF and long_known(chr(c))))
    return out


def long_known(c):
    """Assigned in Unicode 3.2, so that every library knows it."""
    return unicodedata.ucd_3_2_0.category(c) != "Cn"


def train(tok, size, alphabet, specials=()):
    tok.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=list(specials),
        show_progress=False))
    return tok


def full_alphabet():
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def special(text, **flags):
    return AddedToken(text, special=True, normalized=False, **flags)


def qwen():
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    train(tok, 2000, full_alphabet())
    tok.add_tokens([special("<|endoftext|>"), special("<|im_start|>"), special("<|im_end|>"),
                    AddedToken("<tool_call>", normalized=False),
                    AddedToken("<think>", normalized=False),
                    AddedToken("</think>", normalized=False)])
    return tok, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "<think>"]


def llama3():
    tok = Tokenizer(models.BPE(ignore_merges=True))
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    train(tok, 2200, full_alphabet())
    tok.add_special_tokens([special(s) for s in [
        "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>", "<|reserved_special_token_10|>", "<|start_header_id|>",
        "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]])
    bos = "<|begin_of_text|>"
    tok.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single=bos + " $A", pair=bos + " $A " + bos + " $B:1",
                                      special_tokens=[(bos, tok.token_to_id(bos))])])
    return tok, [bos, "<|eot_id|>", "<|reserved_special_token_1|>", "<|start_header_id|>"]


def smollm():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tok.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>"]
    train(tok, 1500, full_alphabet(), [special(s) for s in specials])
    return tok, specials


def gpt2():
    """GPT-2's, with each flag that an added token can have, a prefix space, and bytes that
    have no token: those of control characters."""
    tok = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(trim_offsets=True)
    train(tok, 900, [], [special("<|endoftext|>"), special("<unk>")])
    tok.add_tokens([special("<mask>", lstrip=True), special("<r>", rstrip=True),
                    special("<both>", lstrip=True, rstrip=True),
                    special("<word>", single_word=True),
                    AddedToken("caf\u00e9", normalized=True),
                    AddedToken("one", single_word=True, normalized=True),
                    AddedToken("<mas", normalized=False), AddedToken("<mask><m", normalized=True),
                    AddedToken(" both", normalized=True, rstrip=True)])
    return tok, ["<|endoftext|>", "<mask>", "<r>", "<both>", "<word>", "cafe\u0301", "one",
                 "<mask><m", " both", "\u24b6<word>", "<word>\u0301"]


def steps():
    """Every kind of pre-tokenizer step that is read, and every way to cut."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("_", "removed"),
        pre_tokenizers.Split(Regex(r"\S+|[\x{20}\x09]{1,3}|\n"), "removed", invert=True),
        pre_tokenizers.Split(Regex(r"(?=\p{Lu})|e*|\.?"), "isolated"),
        pre_tokenizers.Split(Regex(r"\p{^L}++(?<!\-)|(?>\p{M}*)"), "isolated", invert=True),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)])
    tok.decoder = decoders.ByteLevel()
    train(tok, 600, full_alphabet(), [special("<s>")])
    return tok, ["<s>"]


def without_some_letters(text):
    """Take control bytes' letters out of the vocabulary, and what is made of them; spell
    merges as strings."""
    doc = json.loads(text)
    gone = {chr(0x100 + b) for b in range(32) if b not in (9, 10, 13)}
    model = doc["model"]
    kept = [t for t in sorted(model["vocab"], key=model["vocab"].get) if not set(t) & gone]
    ids = {t: i for i, t in enumerate(kept)}
    model["merges"] = ["#version: 0.2"] + [a + " " + b for a, b in model["merges"]
                                           if not set(a + b) & gone]
    model["vocab"] = ids
    free = len(ids)
    for t in doc["added_tokens"]:
        t["id"] = ids.get(t["content"], free)
        free += t["id"] == free
    return json.dumps(doc, ensure_ascii=True, indent=1) + "\n"


def write_lines(path, rows):
    with open(path, "w", encoding="ascii") as f:
        for row in rows:
            f.write("\t".join(row) + "\n")


def broken_utf8(rng):
    """Bytes that are nearly UTF-8: pieces of characters, and bytes at the ends of ranges."""
    edges = [0, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1,
             0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF]
    out = b""
    for _ in range(rng.randint(1, 8)):
        whole = rng.choice("a\u00e9\u4e00\ud7ff\ue000\uffff\U00010000\U0010ffff").encode()
        out += rng.choice([whole, whole[:rng.randint(0, 4)], whole[1:],
                           bytes(rng.choice(edges) for _ in range(rng.randint(1, 4)))])
    return out


def write_unicode(folder):
    rng = random.Random(4)
    rows = []
    for _ in range(400):
        b = broken_utf8(rng)
        rows.append((b.hex(), b.decode(errors="replace").encode().hex()))
    write_lines(os.path.join(folder, "utf8.golden"), rows)
    texts = [s for s in HARD if s] + [noise(rng, 3 + i // 10) for i in range(200)]
    texts += ["a" + "".join(chr(rng.choice(MARKS)) for _ in range(30)) for _ in range(40)]
    write_lines(os.path.join(folder, "nfc.golden"),
                [(s.encode().hex(), normalizers.NFC().normalize_str(s).encode().hex())
                 for s in texts])


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    out = sys.argv[1] if len(sys.argv) > 1 else os.path.join(here, "..", "tokenizers")
    for make in (qwen, llama3, smollm, gpt2, steps):
        folder = os.path.join(out, make.__name__)
        os.makedirs(folder, exist_ok=True)
        tok, specials = make()
        text = tok.to_str() + "\n"
        if make is gpt2:
            text = without_some_letters(text)
        with open(os.path.join(folder, "tokenizer.json"), "w", encoding="utf-8") as f:
            f.write(text)
        tok = Tokenizer.from_str(text)
        rows = [[s.encode().hex()] for s in samples(specials)]
        for plain in (False, True):
            tok.encode_special_tokens = plain
            for row, s in zip(rows, samples(specials)):
                ids = tok.encode(s, add_special_tokens=False).ids
                row.append(" ".join(map(str, ids)))
        write_lines(os.path.join(folder, "golden"), rows)
    write_unicode(out)


main()
