#!/bin/sh
# The emitted source of toy models, byte for byte: each family, both forms of unrolling, the
# primitives of each kind of architecture.  `make update-golden` (t-golden.sh update)
# rewrites the files in tests/golden; their difference is part of a change's review.
set -u

: "${srcdir:=tests}"
golden=$srcdir/golden
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
failed=0

# golden MODEL ARCH FORM
golden()
{
    name=$1-sm_$2-$3.cu
    ./mkgen -q --model "$srcdir/toy/$1" --arch "sm_$2" --set "unroll_layers=$3" -o "$tmp/$name" ||
        { failed=1; return; }
    if [ "$mode" = update ]; then
        cmp -s "$tmp/$name" "$golden/$name" && return
        cp "$tmp/$name" "$golden/$name" && echo "wrote $golden/$name"
    elif ! diff -u "$golden/$name" "$tmp/$name" >"$tmp/diff"; then
        echo "failed: $name is not what it was; if that is meant: make update-golden"
        head -n 60 "$tmp/diff"
        failed=1
    fi
}

mode=${1-check}
[ "$mode" = check ] || mkdir -p "$golden"
golden toy-qwen3 90 list
golden toy-qwen3 90 loop
golden toy-qwen3-e128 100 list
golden toy-qwen2 80 list
golden toy-llama 75 loop
golden toy-smol 120 list
exit $failed
