#!/bin/sh
# Whole models with random weights against Hugging Face on the GPU, a rollout to the end of
# the context, and every carried model compiled for every architecture.
# PART=i/n: every n-th task from the i-th on; without PART all of them.
# Needs a GPU and Python with torch, transformers and safetensors for all but the compilations;
# a part that could check nothing, for want of them, exits with 77.
set -u

: "${srcdir:=tests}" "${PART:=1/1}" "${PYTHON:=python3}"
i=${PART%/*}
n=${PART#*/}
case $i$n in
*[!0-9]*) i=0 ;;
esac
if [ -z "$i" ] || [ -z "$n" ] || [ "$PART" != "$i/$n" ] || [ "$i" -lt 1 ] || [ "$i" -gt "$n" ]; then
    echo "bigcheck: PART is i/n with 1 <= i <= n, as in PART=2/3, not '$PART'" >&2
    exit 2
fi

k=0 models='' compile=''
for task in check:qwen3-0.6b rollout:qwen3-0.6b check:qwen2.5-0.5b check:llama-3.2-1b \
    compile:1/2 check:smollm2-135m compile:2/2; do
    if [ $((k % n + 1)) = "$i" ]; then
        case $task in
        compile:*) compile="$compile ${task#*:}" ;;
        *) models="$models $task" ;;
        esac
    fi
    k=$((k + 1))
done
echo "bigcheck, part $PART:$models${compile:+, compilations$compile}"

# $1 is what ran, $2 its exit status.
failed=0 skipped=0 passed=0
count()
{
    case $2 in
    0) passed=$((passed + 1)) ;;
    77) skipped=$((skipped + 1)) ;;
    *) failed=$((failed + 1)); echo "bigcheck: $1: exit status $2" ;;
    esac
}

if [ -n "$models" ]; then
    # shellcheck disable=SC2086
    "$PYTHON" "$srcdir/hf/bigcheck.py" --bin . $models
    count 'whole models' $?
fi
for part in $compile; do
    echo
    echo "== compile: part $part of all models on all architectures"
    PART=$part MK_COMPILE_ALL=1 tests/t-compile
    count "t-compile $part" $?
done

echo
echo "bigcheck, part $PART: $passed passed, $failed failed, $skipped skipped"
[ $failed = 0 ] || exit 1
[ $passed != 0 ] || [ $skipped = 0 ] || exit 77
