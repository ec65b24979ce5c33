#!/bin/sh
# mktune on the emulated GPU with a toy model: the file that it writes is a plan file with its
# provenance, and gives the tokens of the default plan; candidates that hang, that are wrong and that
# do not fit are passed over; several choices are moved at once, and what hangs on one is found anew; a
# budget ends it; what cannot be written is an error, and a signal leaves nothing.  MK_BIN is the folder of the programs; default: the one that the test runs in.
set -u

: "${srcdir:=tests}"
srcdir=$(cd "$srcdir" && pwd)
bin=$(cd "${MK_BIN:-.}" && pwd)
unset MK_CUBIN_PATH 2>/dev/null || :
LC_ALL=C
export LC_ALL
toy=$srcdir/toy/tiny-llama

have() { command -v "$1" >/dev/null 2>&1; }
[ -e "$bin/libmkhost.la" ] || { echo "SKIP: built without the emulated GPU"; exit 77; }
have c++ || have g++ || have clang++ || { echo "SKIP: no C++ compiler"; exit 77; }

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp" || exit 1
failed=0
fail() { echo "failed: $*"; failed=1; }

# tune STATUS ARG...: stdout to out, stderr to err.
tune()
{
    want=$1
    shift
    "$bin/mktune" "$toy" --random-weights --device host:sm_90 --positions 1,20 --tokens 4 --runs 3 \
        "$@" >out 2>err </dev/null
    got=$?
    [ $got = "$want" ] || fail "mktune $*: exit status $got, not $want: $(cat err out)"
}
has() { grep -q -e "$1" "$2" || fail "no '$1' in $2: $(cat "$2")"; }
says() { "$bin/mktune" "$@" >out 2>err </dev/null; [ $? = "$status" ] && has "$message" err; }

# ---- Candidates that are no good ----

mkdir models
# How fast the emulation is depends on what else the machine does: nothing is dropped for that.
tune 0 --drop 1000000 -k fault=none,hang -k dtype=fp16 -k stages=1000,4 --out=models/some.plan
has '^default  *[0-9.]*  *[0-9.]*  *+0\.0 %' out
has '^fault=hang .* failed: the kernel of tiny-llama made no progress' out
has '^dtype=fp16 .* WRONG: a logit at position' out
has '^stages=4  *[0-9.]*  *[0-9.]* ' out
if grep -q 'stages=1000' out; then fail "a plan that is refused was measured"; fi
if grep -q -e '^fault' -e '^dtype' models/some.plan; then fail "a bad choice was taken: $(cat models/some.plan)"; fi
has '^# candidates: [3-9] measured, .* [1-9] wrong, [1-9] failed$' models/some.plan
has '^# command: .* --out=models/some.plan$' models/some.plan

# ---- One that is ----

# A CTA alone is what the emulation is fastest with, by far; but its times are noisy.
for try in 1 2 3 4 5 6; do
    tune 0 --runs 5 -k ctas=1 -o best.plan
    if grep -q '^ctas = 1$' best.plan; then break; fi
done
has '^ctas=1 .* better$' out
has '^best, again ' out
has '^mktune: found a better plan after [0-9]* s; wrote best.plan$' err
[ "$(wc -l <err)" = 1 ] || fail "more than one line on stderr: $(cat err)"
for line in 'Plan of tiny-llama on host-sm_90, found by mktune' 'gpu: host sm_90, sm_90, 16 SMs' \
    'driver: CUDA [0-9]' 'date: 20[0-9-]*T[0-9:]*Z$' 'mkgen: [0-9.]*, templates [0-9a-f]*$' \
    'position 1: [0-9.]* tok/s with the default plan, [0-9.]* with this one (+' \
    'position 20: ' 'candidates: [0-9]* measured, [1-9]' 'command: mktune .* -o best.plan$'; do
    has "^# $line" best.plan
done
has '^\[choices\]$' best.plan
has '^ctas = 1$' best.plan
has '^unroll_layers = list$' best.plan

# ---- Several at once ----

# With chunks of 32 KiB six stages fit: there is such a plan only if no 8 of them stay in flight.
joint='ctas=1 inflight=8 inflight_hop=8'
for try in 1 2 3 4 5 6; do
    tune 0 --runs 5 --drop 1000000 --try "$joint" -k chunk_bytes=32768 -k inflight/inflight_hop=9/10,2/1 \
        -o "$tmp/joint.plan"
    if [ "$(grep -c -x -e 'ctas = 1' -e 'inflight = 8' -e 'inflight_hop = 8' joint.plan)" = 3 ]; then break; fi
done
for line in 'ctas = 1' 'inflight = 8' 'inflight_hop = 8' 'chunk_bytes = 16384'; do
    has "^$line\$" joint.plan
done
has "^# command: mktune tiny-llama .* --try \"$joint\" .* -o joint.plan\$" joint.plan
[ "$(sed -n '/^default /,/ better$/p' out | sed -n 2p)" = "$joint" ] || fail "not tried first: $(cat out)"
has '^chunk_bytes=32768  *[0-9.]*  *[0-9.]* ' out
has '^inflight=2 inflight_hop=1  *[0-9.]*  *[0-9.]* ' out
if grep -q '^inflight=9' out; then fail "a plan that is refused was measured"; fi

# ---- The file ----

"$bin/mkgen" --model "$toy" --arch host --plan best.plan --dump-plan -q >dump 2>err ||
    fail "mkgen refuses the plan: $(cat err)"
sed -n '/^\[choices\]/,$p' best.plan | grep = >choices
while read -r line; do
    grep -q -x -e "$line" dump || fail "'$line' is not in the dump of the plan"
done <choices
[ "$(wc -l <choices)" = 11 ] || fail "not 11 choices: $(cat best.plan)"
echo 3 5 7 >ids
for plan in none best.plan; do
    "$bin/mkrun" "$srcdir/hf/tiny-llama-sharded" --device host:sm_90 --plan $plan \
        --ids ids --print-ids --ignore-end -n 4 >"ids.$plan" 2>err || fail "mkrun --plan $plan: $(cat err)"
done
[ -s ids.none ] && cmp -s ids.none ids.best.plan || fail "other tokens: $(cat ids.none ids.best.plan)"

# ---- Nothing better, standard output, the default name, a budget ----

tune 0 -k balance=0 -o -
has '^# position 1: \([0-9.]*\) tok/s with the default plan, \1 with this one (+0.0 %)$' out
has "^balance = 0\$" out
if grep -q -e '^default' -e '^ctas' out; then fail "the table, or CTAs, in the plan: $(cat out)"; fi
has 'the default plan is best after .*; wrote -$' err
tune 0 --budget 1
[ "$(grep -c = out)" = 0 ] || fail "candidates after the budget: $(cat out)"
has 'wrote tiny-llama-host-sm_90.plan$' err
has '^# candidates: 0 measured' tiny-llama-host-sm_90.plan

# ---- What is refused ----

status=2
message='the model is missing'; says
message="'x' is too much: one model"; says "$toy" x
message="--device: 'cpu' is not gpu, 0, host or host:sm_XX"; says "$toy" -d cpu
message="--budget: '0' is not an integer from 1 to 1000000"; says "$toy" -b 0
message='--positions none leaves nothing to measure'; says "$toy" -p none
tune 2 -k nonsense=1
has "^mktune: --knob: 'nonsense' is no plan choice (mkgen --list-keys)" err
tune 2 -k epoch0
has "^mktune: --knob: epoch0 needs values, like epoch0=A,B" err
tune 2 -k "stages=2$(printf ',%.0s' 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 \
    26 27 28 29 30 31 32)"
has '^mktune: --knob: stages has more than 32 values' err
tune 2 -k warps/nonsense=4/1
has "^mktune: --knob: 'nonsense' is no plan choice" err
tune 2 -k warps/ctas=4/1,8
has '^mktune: --knob: warps/ctas=4/1,8: a value is not for as many choices$' err
tune 2 --try 'warps=6 nonsense=1'
has "^mktune: --try 'warps=6 nonsense=1': unknown plan key \"nonsense\" (mkgen --list-keys)\$" err
tune 2 --try 'warps=6' --try 'inflight=1 inflight_hop=2'
has "^mktune: --try 'inflight=1 inflight_hop=2': plan: inflight is 1, " err
tune 2 --set warps=4 --try 'warps=6 inflight=1'
has "^mktune: --try 'warps=6 inflight=1': --set warps=4 holds for all candidates$" err
[ ! -s out ] || fail "a bad candidate was found late: $(cat out)"
tune 1 --set stages=1000
has '^mktune: --set: stages is "1000"' err
status=1
message='97 tokens of context are needed for these positions'; says "$toy" -r -p 93 -n 4
message='none/x.plan: No such file or directory'; says "$toy" -r -o none/x.plan
message='no checkpoint (--random-weights makes one): '; says "$toy" -d host -o x.plan
mkdir folder
message='folder: Is a directory'; says "$toy" -r -o folder
message='^mktune: '
MK_CUDA_DRIVER=$tmp/none says "$toy" -r -o x.plan
"$bin/mktune" --list-knobs | grep -q '^inflight/inflight_hop  *2/1,' || fail "--list-knobs"

# ---- A signal ----

"$bin/mktune" "$toy" -r -d host:sm_90 -p 1 -n 64 --runs 1000 -o x.plan >out 2>err </dev/null &
pid=$!
tries=0
while ! ls | grep -q '^x\.plan\.tmp' && [ $tries -lt 100 ]; do
    sleep 0.1
    tries=$((tries + 1))
done
sleep 0.3
children=$(ps -o pid= --ppid $pid 2>/dev/null)
kill -TERM $pid
wait $pid
[ $? = 143 ] || fail "a signal ends it with another status"
sleep 0.3
for child in $children; do
    case $(ps -o stat= -p "$child" 2>/dev/null) in '' | Z*) ;; *) fail "process $child is left" ;; esac
done
[ -z "$(ls | grep '^x\.plan')" ] || fail "a signal left $(ls | grep '^x\.plan')"

exit $failed
