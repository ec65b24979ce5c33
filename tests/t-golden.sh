#!/bin/sh
# The emitted source of toy models, byte for byte: each family, both forms of unrolling, the
# primitives of each kind of architecture, the emulated GPU's; and what must hold for all of it:
# clean text, the same bytes twice, forms that differ only in how layers follow each other, kernels of
# the emulated GPU that differ from a GPU's only in their primitives.
# `make update-golden` (t-golden.sh update) rewrites the files in tests/golden; their
# difference is part of a change's review.
set -u
LC_ALL=C
export LC_ALL

: "${srcdir:=tests}"
golden=$srcdir/golden
mode=${1-check}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
failed=0

fail() { echo "failed: $*"; failed=1; }

# absent WHAT GREP-OPTION... FILE: no line matches
absent()
{
    what=$1
    shift
    ! grep -n "$@" >"$tmp/found" || fail "$what: $(head -n 3 "$tmp/found")"
}

# clean FILE: the rules for emitted text
clean()
{
    tab=$(printf '\t')
    absent "$1: a tab" "$tab" "$tmp/$1"
    absent "$1: blanks at a line's end" ' $' "$tmp/$1"
    absent "$1: not ASCII" '[^ -~]' "$tmp/$1"
    absent "$1: a line directive or a header" -E '^ *# *(line|include)' "$tmp/$1"
    absent "$1: a date" -E '(19|20)[0-9][0-9][-/][01][0-9]|__(DATE|TIME)__' "$tmp/$1"
    absent "$1: a path" -E '/(tmp|home|usr|root|work)/|[a-z]+\.m4' "$tmp/$1"
    absent "$1: this folder" -F "$(pwd)" "$tmp/$1"
    absent "$1: a macro" -E '(^|[^A-Za-z0-9_])(m4|t|PLAN|MODEL|GPU|ABI)_[A-Za-z]' "$tmp/$1"
    awk -v name="$1" 'NR == 1 && $0 == "" { print name ": begins with an empty line"; bad = 1 }
        $0 == "" && last == "" && NR > 1 { print name ":" NR ": two empty lines"; bad = 1 }
        { last = $0 } END { if (last == "") { print name ": ends with an empty line"; bad = 1 } exit bad }' \
        "$tmp/$1" || failed=1
    [ -z "$(tail -c 1 "$tmp/$1")" ] || fail "$1: no newline at the end"
    case $1 in # a C++ compiler has to learn the words of CUDA first
    *-host-*) sed '1,/^$/d; /^\/\/ Kernels of /,$!d' "$tmp/$1" ;;
    *) cat "$tmp/$1" ;;
    esac | head -n 1 | grep -q '^// Kernels of toy-.* Written by mkgen ' || fail "$1: its first line"
}

# golden MODEL GPU FORM [WITH SETTING...]; GPU may be host-sm_XX; WITH: a word for the settings
golden()
{
    name=$1-$2-$3${4:+-$4}.cu
    case $2 in
    host-*) gpu="--arch host --emulate ${2#host-}" ;;
    *) gpu="--gpu $2" ;;
    esac
    model=$1 form=$3
    shift 3
    for setting; do
        [ "${setting#*=}" = "$setting" ] || gpu="$gpu --set $setting"
    done
    set -- "$model" "$gpu" "$form"
    ./mkgen -q --model "$srcdir/toy/$1" $gpu --set "unroll_layers=$3" -o "$tmp/$name" ||
        { fail "mkgen $name"; return; }
    ./mkgen -q --model "$srcdir/toy/$1/config.json" $gpu --set "unroll_layers=$3" -o - |
        cmp - "$tmp/$name" || fail "$name: not the same bytes twice"
    clean "$name"
    if [ "$mode" = update ]; then
        cmp -s "$tmp/$name" "$golden/$name" || { cp "$tmp/$name" "$golden/$name"; echo "wrote $golden/$name"; }
    elif [ ! -f "$golden/$name" ]; then
        fail "there is no $golden/$name; make update-golden writes it"
    elif ! diff -u "$golden/$name" "$tmp/$name" >"$tmp/diff"; then
        fail "$name is not what it was; if that is meant: make update-golden"
        head -n 60 "$tmp/diff"
    fi
}

# Without the two functions that go through the layers in one form or the other.
without_layers()
{
    awk '/^static .* void (layers|prefill)\(\)$/ { skip = 1; n++ }
        !skip { print } /^}/ { skip = 0 } END { exit n != 2 }' "$1" || fail "$1: where are its layers?"
}

# Without the primitives, and the three lines that say what C++ cannot say as CUDA does.
without_primitives()
{
    awk '/^\/\/ ---- / { skip = /The words of CUDA|---- Primitives|Where libmkhost enters/ }
        /^\/\/ Kernels of / { skip = 0 }
        /^#define OFFSET\(|^#define [SG] \(|^extern __shared__ / { n++; next }
        !skip { print } END { exit n != 3 }' "$1" || fail "$1: where does it touch hardware?"
}

# same_kernel MODEL ARCH FORM HOPS: the emulated GPU gets the kernel of the GPU
same_kernel()
{
    for gpu in "" "--arch host --emulate"; do
        ./mkgen -q --model "$srcdir/toy/$1" ${gpu:---arch} "$2" --set ctas=4 --set group=2 \
            --set "unroll_layers=$3" --set "cluster=$4" -o "$tmp/kernel.cu" || fail "mkgen $1 $gpu $2"
        without_primitives "$tmp/kernel.cu" >"$tmp/kernel${gpu:+-host}"
    done
    diff "$tmp/kernel" "$tmp/kernel-host" || fail "$1 $2 $3 $4: the host's kernel is not the GPU's"
}

[ "$mode" = check ] || mkdir -p "$golden"
golden toy-qwen3 h200 list
golden toy-qwen3 h200 loop
golden toy-qwen3-e128 b200 list
golden toy-qwen2 a100 list
golden toy-llama t4 loop
golden toy-smol rtx4090 list
golden toy-qwen3 host-sm_90 list
golden toy-smol h200 list teams ctas=18 group=2 chunk_bytes=4096 team_from=80

for form in list loop; do
    without_layers "$tmp/toy-qwen3-h200-$form.cu" >"$tmp/$form"
done
diff "$tmp/list" "$tmp/loop" || fail "the list and the loop differ in more than their layers"
[ "$(grep -c '// layer 0[012]$' "$tmp/toy-qwen3-h200-list.cu")" = 6 ] || fail "the list does not name 2 x 3 layers"
for form in 'list 1' 'loop 3'; do # one is the producer's
    [ "$(grep -c 'for (int layer = 0; layer < L' "$tmp/toy-qwen3-h200-${form% *}.cu")" = "${form#* }" ] ||
        fail "the ${form% *} has not ${form#* } loops over layers"
done

same_kernel toy-qwen3 sm_75 list l2
same_kernel toy-qwen2 sm_80 loop l2
same_kernel toy-llama sm_90 list cluster
same_kernel toy-llama sm_90 loop l2
same_kernel toy-smol sm_100 loop l2
same_kernel toy-qwen3-e128 sm_120 list l2

# A golden that no line above writes.
for file in "$golden"/*; do
    if [ -f "$tmp/${file##*/}" ]; then
        continue
    elif [ "$mode" = update ]; then
        rm -f "$file" && echo "removed $file"
    else
        fail "$file is not written any more: make update-golden removes it"
    fi
done
exit $failed
