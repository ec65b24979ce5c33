#!/bin/sh
# mkbench on the GPU with a toy model: every row is there, was checked and is right, as a table
# and as JSON; stages have cycles; wrong positions are refused.  MK_BIN is the folder of the
# programs; default: the one that the test runs in.
set -u

: "${srcdir:=tests}"
srcdir=$(cd "$srcdir" && pwd)
bin=$(cd "${MK_BIN:-.}" && pwd)
unset MK_CUBIN_PATH 2>/dev/null || :
LC_ALL=C
export LC_ALL
toy=$srcdir/toy/toy-qwen3

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
failed=0

fail() { echo "failed: $*"; failed=1; }

if ! "$bin/mkgen" --arch native --print-gpu >"$tmp/gpu" 2>"$tmp/err"; then
    echo "SKIP: $(sed "s/^mkgen: //" "$tmp/err")"
    exit 77
fi

# ---- The JSON ----

json_by_python()
{
    python3 - "$1" <<'PY'
import json, sys
report = json.load(open(sys.argv[1]))
for key in "gpu", "driver", "date", "read_method":
    assert isinstance(report[key], str) and report[key], key
assert report["read_gbps"] > 0
rows = report["rows"]
got = [(row["phase"], row.get("pos", row.get("tokens"))) for row in rows]
assert got == [("decode", 1), ("decode", 64), ("prefill", 16), ("prefill", 100)], got
for row in rows:
    assert row["model"] == "toy-qwen3"
    assert row["correct"] is True, row["verdict"]
    assert 0 < row["ms_min"] <= row["ms_median"] <= row["ms_max"]
    for key in "tok_s", "bytes", "gbps", "pct_of_measured":
        assert row[key] > 0, key
PY
}

json_by_grep()
{
    [ "$(grep -c '"correct": true' "$1")" = 4 ] && ! grep -q '"correct": false' "$1" &&
        grep -q '"read_gbps": [1-9]' "$1" && [ "$(grep -c '"ms_median": ' "$1")" = 4 ]
}

check_json()
{
    if command -v python3 >/dev/null 2>&1; then
        json_by_python "$1"
    else
        json_by_grep "$1"
    fi || fail "$1: $(cat "$1")"
}

bench()
{
    "$bin/mkbench" "$toy" --random-weights --pos 1,64 --prefill 16,100 --tokens 8 --runs 3 "$@" \
        >"$tmp/out" 2>"$tmp/err" </dev/null || fail "mkbench $*: $(cat "$tmp/err" "$tmp/out")"
}

bench --json "$tmp/report.json"
[ -s "$tmp/report.json" ] && check_json "$tmp/report.json"
[ "$(grep -c -E '^(decode|prefill) .* correct \(8 tokens' "$tmp/out")" = 4 ] ||
    fail "the table has not four correct rows: $(cat "$tmp/out")"
bench --json - --seed 7
cp "$tmp/out" "$tmp/seed7.json"
check_json "$tmp/seed7.json"

# ---- The stages of decode ----

bench --stages
for stage in EMBED QKV ATTN O MLP DOWN HEAD NEXT; do
    [ "$(grep -c -E "^ +$stage +[1-9]" "$tmp/out")" = 2 ] ||
        fail "not two rows with cycles of $stage: $(cat "$tmp/out")"
done
[ "$(grep -c -E '^ +predicted [1-9][0-9.]* us a token, .* measured [-+]' "$tmp/out")" = 2 ] ||
    fail "not two predictions: $(cat "$tmp/out")"
[ "$(grep -c -E '^ +all +[1-9][0-9]* +\( *[0-9]+\) +[1-9][0-9]* +[-+][0-9]+ %' "$tmp/out")" = 2 ] ||
    fail "the stages are not added up beside what was predicted: $(cat "$tmp/out")"
[ "$(grep -c -E '^(decode|prefill) .* correct \(8 tokens' "$tmp/out")" = 4 ] ||
    fail "with clocks, the table has not four correct rows: $(cat "$tmp/out")"

# ---- What does not fit ----

if "$bin/mkbench" "$toy" --random-weights --pos 505 --prefill none --tokens 8 >"$tmp/out" 2>"$tmp/err"
then
    fail "decode beyond the context is measured"
fi
[ -s "$tmp/out" ] && fail "an error, and something on stdout: $(cat "$tmp/out")"

exit $failed
