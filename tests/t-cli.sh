#!/bin/sh
# The three programs from outside: exact messages and exit codes of wrong use, lists,
# printed GPUs that read back, the same bytes twice, files whole or absent, Ctrl-C.
# MK_BIN is the folder of the programs; default: the one that the test runs in.
set -u

: "${srcdir:=tests}"
srcdir=$(cd "$srcdir" && pwd)
bin=$(cd "${MK_BIN:-.}" && pwd)
: "${MK_MODELS_DIR:=$(cd "$srcdir/../models" && pwd)}"
export MK_MODELS_DIR
unset MK_CUBIN_PATH MK_NVRTC_FLAGS MK_VERBOSE MK_CUDA_DRIVER 2>/dev/null || :
LC_ALL=C
export LC_ALL

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp" || exit 1
checks=0
failed=0

fail() { echo "failed: $*"; failed=$((failed + 1)); }

# run STATUS PROGRAM ARG...: stdout to out, stderr to err.
run()
{
    want=$1 program=$2
    shift 2
    checks=$((checks + 1))
    "$bin/$program" "$@" >out 2>err </dev/null
    got=$?
    [ $got = "$want" ] || fail "$program $*: exit status $got, not $want: $(cat err)"
}

# says STATUS PROGRAM MESSAGE ARG...: the whole of stderr is "PROGRAM: MESSAGE", and after wrong
# usage (2) the line that points to --help; nothing is on stdout.
says()
{
    status=$1 who=$2 message=$3
    shift 3
    run "$status" "$who" "$@"
    {
        printf '%s: %s\n' "$who" "$message"
        [ "$status" != 2 ] || printf "Try '%s --help' for more information.\n" "$who"
    } >want
    cmp -s want err || fail "$who $*: it says
$(cat err)
and should say
$(cat want)"
    [ ! -s out ] || fail "$who $*: an error, and something on stdout"
}

has()
{
    grep -q -e "$1" "$2" || fail "$3: no '$1' in: $(head -c 600 "$2" | tr -cd '[:print:]\n')"
}

# no_gpu STATUS PROGRAM ARG...: as run, on a machine without a driver.
no_gpu()
{
    MK_CUDA_DRIVER=$tmp/no-libcuda.so
    export MK_CUDA_DRIVER
    run "$@"
    unset MK_CUDA_DRIVER
}

toy=$srcdir/toy/toy-qwen3

# ---- Every program ----

for program in mkgen mkrun mkbench mktune; do
    run 0 $program --help
    has "^Usage: $program " out "$program --help"
    has '^Example: ' out "$program --help"
    [ ! -s err ] || fail "$program --help writes to stderr"
    awk 'length > 90 { exit 1 }' out || fail "$program --help has long lines"
    run 0 $program --version
    grep -q -x -e "$program [0-9]*\.[0-9]*\.[0-9]*" out || fail "$program --version: $(cat out)"
    says 2 $program "unrecognized option '--bogus'" --bogus
    says 2 $program "invalid option -- 'Z'" -Z
    says 2 $program "option '--set' requires an argument" --set
    says 2 $program "--context: '0' is not an integer from 1 to 16777216" --context 0
    says 2 $program "--context: '1e3' is not an integer from 1 to 16777216" --context 1e3
    says 2 $program "--context: ' 7' is not an integer from 1 to 16777216" --context ' 7'
    says 2 $program "--context: '' is not an integer from 1 to 16777216" --context ''
    says 2 $program "--context: '99999999999999999999' is not an integer from 1 to 16777216" \
        --context 99999999999999999999
    if [ -w /dev/full ]; then
        "$bin/$program" --help >/dev/full 2>err
        [ $? = 1 ] || fail "$program --help >/dev/full does not fail"
        grep -q -x -e "$program: standard output: No space left on device" err ||
            fail "$program --help >/dev/full: $(cat err)"
    fi
done

# ---- mkgen: wrong use ----

says 2 mkgen '--model is missing; --list-models names those that are carried'
says 2 mkgen '--model is missing; --list-models names those that are carried' --arch sm_90
says 2 mkgen "'qwen3-0.6b' is not an option; the model is given with --model" qwen3-0.6b
says 2 mkgen '--output takes one architecture, not 2' -m "$toy" -a 80 -a 90 -o x.cu
says 2 mkgen '--cubin takes one architecture, not 2; --pack takes several' \
    -m "$toy" -a 80 -a 90 --cubin x.cubin
says 2 mkgen '--gpu names one GPU, --arch 2 architectures' -m "$toy" -a 80 -a 90 -g h200
says 2 mkgen '--print-gpu writes nothing else' -a 90 --print-gpu --dump-plan
says 2 mkgen '--output - and --dump-plan both want standard output' \
    -m "$toy" -a 90 -o - --dump-plan
says 2 mkgen '--output - and --compile both want standard output' -m "$toy" -a 90 -o - --compile
says 2 mkgen '--cubin: a file is needed, not standard output' -m "$toy" -a 90 --cubin -
says 2 mkgen '--emulate is for --arch host' -m "$toy" --emulate sm_90
says 2 mkgen '--emulate is for --arch host' -m "$toy" -a all --emulate sm_90
says 2 mkgen '--gpu names a GPU, --arch host an emulated one' -m "$toy" -a host -g h200
run 2 mkgen -m "$toy" -a host --emulate sm_99
has '^mkgen: --emulate: .*sm_99.*90.*121' err 'an unknown architecture to emulate'
says 1 mkgen '--gpu a100 is sm_80, --arch says sm_90' -m "$toy" -a sm_90 -g a100
says 1 mkgen '--gpu h200 and --arch native name two GPUs' -m "$toy" -a native -g h200
run 2 mkgen -m "$toy" -a sm_99
has '^mkgen: --arch: .*sm_99.*90.*121' err 'an unknown architecture'
run 1 mkgen -m no-such-model -a 90
has '^mkgen: no-such-model: .*qwen3-0.6b' err 'an unknown model'
run 1 mkgen -m "$toy" -a 90 -g no-such-gpu
has '^mkgen: .*no-such-gpu.*h200' err 'an unknown GPU'
run 1 mkgen -m "$toy" -a 90 -s no_such_key=1
has '^mkgen: .*no_such_key' err 'an unknown plan key'
run 1 mkgen -m "$toy" -a 90 -s split_min=64 # of an earlier kernel
has '^mkgen: .*split_min' err 'a plan key that is gone'
says 1 mkgen 'plan: ctas is 20; it must be a multiple of group, 8' \
    -m "$toy" -a 90 -q -s ctas=20 -s group=8
says 1 mkgen 'plan: cluster is cluster; sm_80 has l2 only' -m "$toy" -a 80 -q -s cluster=cluster
run 1 mkgen -m "$toy" -a 90 -s unroll_layers
has '^mkgen: .*unroll_layers' err 'a plan key without a value'
run 1 mkgen -m "$toy" -a 90 -p no-such.plan
has '^mkgen: .*no-such.plan' err 'a plan file that is not there'
no_gpu 1 mkgen -m "$toy" -a native
has '^mkgen: --arch native (say --arch sm_XX to generate for a GPU that is not here): ' err native
[ -z "$(ls ./*.cu* 2>/dev/null)" ] || fail "a failed mkgen left a file: $(ls)"

# ---- mkgen: lists and GPUs ----

run 0 mkgen --list-models
for model in qwen3-0.6b qwen3-8b qwen2.5-7b llama-3.1-8b smollm2-135m; do
    has "^$model " out --list-models
done
run 0 mkgen --list-gpus
has '^h200 *sm_90 ' out --list-gpus
awk '{ print $1 }' out >gpus
run 0 mkgen --list-keys
for key in 'ctas .*1\.\.' 'group .*1\.\.16' 'cluster .*l2|cluster' 'balance .*0\.\.' \
    'unroll_layers .*list|loop' 'timing .*off|on'; do
    has "^$key" out --list-keys
done
for gpu in $(cat gpus); do
    run 0 mkgen --gpu "$gpu" --print-gpu
    cp out "$gpu.gpu"
    run 0 mkgen --gpu "$gpu.gpu" --print-gpu
    cmp -s out "$gpu.gpu" || fail "--gpu $gpu --print-gpu is not read back as it was"
done
run 0 mkgen --arch all --print-gpu
[ "$(grep -c '^arch = ' out)" = 11 ] || fail "--arch all is not 11 architectures"
run 0 mkgen --arch host --print-gpu
has '^name = host-sm_90$' out 'the emulated GPU'
run 0 mkgen --arch host --emulate 75 --print-gpu
has '^name = host-sm_75$' out 'the emulated GPU of sm_75'
printf 'sms = many\n' >bad.gpu
run 1 mkgen --gpu bad.gpu --print-gpu
has '^mkgen: bad.gpu:1: ' err 'a bad GPU file'

# ---- mkgen: what it writes ----

run 0 mkgen -m "$toy" -a 90 --dump-plan -q
for section in choices groups phases hops memory predicted; do
    has "^\[$section\]$" out --dump-plan
done
[ -z "$(ls ./*.cu 2>/dev/null)" ] || fail "--dump-plan wrote a source that nobody asked for"

# ---- Plans that lie beside carried models ----

has '^# choices: the generator.s own$' out --dump-plan
mkdir -p here/models/other-name
cp "$toy/config.json" here/models/other-name/
printf '# found by hand\n[choices]\nbalance = 100\nwarps = 4\n' >here/models/other-name/h200.plan
carried() { MK_MODELS_DIR=$tmp/here/models run "$@"; }

carried 0 mkgen -m "$toy" -a 90 --dump-plan -q
has "^# choices: $tmp/here/models/other-name/h200.plan, carried for this model and GPU$" out 'a carried plan'
has '^balance = 100$' out 'a carried plan'
[ ! -s err ] || fail "a carried plan is told of on stderr: $(cat err)"
carried 0 mkgen -m "$toy" -a 90 -o k.cu
has "^plan: $tmp/here/models/other-name/h200.plan$" err 'a carried plan'
carried 0 mkgen -m "$toy" -a 90 --dump-plan -q --set timing=on
has '^# choices: .*/h200.plan, carried for this model and GPU, and --set$' out 'clocks are no choice'
has '^timing = on$' out 'clocks beside a carried plan'
carried 0 mkgen -m "$toy" -a 90 --dump-plan -q --set warps=8
has '^# choices: the generator.s own, and --set$' out 'a carried plan and --set'
has '^balance = 0$' out 'a carried plan and --set'
carried 0 mkgen -m "$toy" -a 90 --dump-plan -q --plan none
has '^# choices: the generator.s own$' out '--plan none'
has '^balance = 0$' out '--plan none'
printf 'balance = 25\n' >my.plan
carried 0 mkgen -m "$toy" -a 90 --dump-plan -q --plan my.plan
has '^# choices: my.plan$' out '--plan'
carried 0 mkgen -m "$srcdir/toy/toy-llama" -a 90 --dump-plan -q
has '^# choices: the generator.s own$' out 'another shape'
carried 0 mkgen -m "$toy" -a 80 --dump-plan -q
has '^# choices: the performance model.s group=4$' out 'another GPU'
has '^group = 4$' out 'another GPU'
carried 0 mkgen -m "$toy" -a 80 -o k.cu
has '^plan: the performance model.s group=4$' err 'another GPU'
# One that does not fit is not used, and told of.
for bad in 'nonsense = 1' 'stages = 60' 'no line' 'ctas = 1000'; do
    printf '%s\n' "$bad" >here/models/other-name/h200.plan
    carried 0 mkgen -m "$toy" -a 90 --dump-plan -q
    has '^mkgen: warning: the plan carried for toy-qwen3 on h200 is not used: ' err "$bad"
    has '^# choices: the generator.s own$' out "$bad"
    [ "$(wc -l <err)" = 1 ] || fail "$bad: more than one line: $(cat err)"
done
rm -r here/models/other-name/h200.plan
mkdir here/models/other-name/h200.plan
carried 0 mkgen -m "$toy" -a 90 --dump-plan -q
has 'is not used: .*/h200.plan: not a regular file$' err 'a folder as a carried plan'
rm -r here k.cu

emission()
{
    run 0 mkgen -m "$toy" -a sm_90 -o -
    [ -s err ] || fail "no summary on stderr"
    [ -s out ] || fail "no source on stdout"
    cp out first.cu
    run 0 mkgen --model "$toy/config.json" --arch 90 --gpu h200 -q -o -
    [ ! -s err ] || fail "-q: $(cat err)"
    cmp -s out first.cu || fail "two runs give different bytes"

    mkdir other && cd other || exit 1
    run 0 mkgen -m "$toy" -a 90 -q
    cmp -s toy-qwen3-sm_90.cu ../first.cu || fail "the default file is not what -o - gives"
    [ "$(ls)" = "$(printf 'err\nout\ntoy-qwen3-sm_90.cu')" ] || fail "files left over: $(ls)"
    run 0 mkgen -m "$toy" -a 80 -a 75 -q
    [ -s toy-qwen3-sm_80.cu ] && [ -s toy-qwen3-sm_75.cu ] || fail "two architectures: $(ls)"
    run 0 mkgen -m "$toy" -a host -q
    run 0 mkgen -m "$toy" -a host --emulate 75 -q
    [ -s toy-qwen3-host-sm_90.cu ] && [ -s toy-qwen3-host-sm_75.cu ] || fail "--arch host: $(ls)"
    cmp -s toy-qwen3-host-sm_90.cu ../first.cu && fail "--arch host gives the GPU's source"
    cat >cxx <<'EOT'
#!/bin/sh
case $* in *--version) echo 'a compiler';; *) cp kernel.cu kernel.so;; esac
EOT
    chmod +x cxx
    MK_HOST_CXX=./cxx MK_CACHE_DIR=$PWD/cache
    export MK_HOST_CXX MK_CACHE_DIR
    run 0 mkgen -m "$toy" -a host -q --compile --cubin kernel.so
    has '/toy-qwen3-host-sm_90-.*: [0-9]* bytes, compiled in' out '--arch host --compile'
    cmp -s kernel.so toy-qwen3-host-sm_90.cu || fail "--arch host --compile compiles other text"
    run 0 mkgen -m "$toy" -a host -q --compile
    has 'found in the cache' out '--arch host --compile, again'
    unset MK_HOST_CXX MK_CACHE_DIR
    rm -r cache
    ln -s toy-qwen3-sm_80.cu link.cu
    run 0 mkgen -m "$toy" -a 90 -q -o link.cu
    [ -L link.cu ] && cmp -s toy-qwen3-sm_80.cu ../first.cu || fail "a link was replaced"
    cd .. || exit 1

    says 1 mkgen 'no/such/folder/x.cu: No such file or directory' -m "$toy" -a 90 -q \
        -o no/such/folder/x.cu
    if [ -w /dev/full ]; then
        says 1 mkgen '/dev/full: No space left on device' -m "$toy" -a 90 -q -o /dev/full
    fi
}

if command -v "${MK_M4:-m4}" >/dev/null; then
    emission
else
    echo "what is emitted is not looked at: no m4"
fi

# ---- mkrun ----

says 2 mkrun "the model's folder is missing"
says 2 mkrun "'hello' is too much: one model folder, and the prompt after -p" . hello
says 2 mkrun 'only one of --prompt, --file and --ids can be used' . -p a -f b
says 2 mkrun '--chat and --ids do not go together' . --chat --ids b
says 2 mkrun '--chat and --raw do not go together' . --chat --raw
says 2 mkrun '--chat and --logits do not go together' . --chat --logits x.npy
says 2 mkrun '--system needs --chat' . --system 'Be brief.' -p a
says 2 mkrun "--max-tokens: '-1' is not an integer from 0 to 16777216" . -n -1
says 2 mkrun "--temp: '-0.5' is not a number from 0 to 100" . --temp -0.5
says 2 mkrun "--temp: 'nan' is not a number from 0 to 100" . --temp nan
says 2 mkrun "--top-k: 'many' is not an integer from 0 to 16777216" . --top-k many
says 2 mkrun "--top-p: '1.5' is not a number from 0 to 1" . --top-p 1.5
says 2 mkrun '--top-p: must be above 0' . --top-p 0
says 2 mkrun "--seed: '-3' is not an integer from 0 to 2^64 - 1" . --seed -3
says 2 mkrun "--device: 'tpu' is not gpu, cpu, host, host:sm_XX or auto" . --device tpu
says 1 mkrun 'device host:sm_91: architecture "sm_91" is not supported; known are sm_ and one of'\
' 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121' . --device host:sm_91
MK_HOST_DRIVER=no-libmkhost.so
export MK_HOST_DRIVER
says 1 mkrun 'the emulated device cannot be opened (no-libmkhost.so: cannot open shared object'\
' file: No such file or directory)' "$srcdir/../models/demo" --device host -p x
unset MK_HOST_DRIVER
run 1 mkrun no-such-folder -p hello
has '^mkrun: .*no-such-folder' err 'a model folder that is not there'
run 1 mkrun "$toy" --device cpu -p hello
has '^mkrun: .*toy-qwen3' err 'a model folder without weights'

# A model without a tokenizer: token ids in, token ids and logits out.
tiny=$srcdir/hf/tiny-qwen3-fp32
if [ -f "$tiny/model.safetensors" ]; then
    echo '1 2, 3
4' >ids
    says 1 mkrun "$tiny has no tokenizer.json; give token ids with --ids" "$tiny" --device cpu -p x
    says 1 mkrun "$tiny has no chat template; without --chat the text is continued" \
        "$tiny" --device cpu --chat
    run 0 mkrun "$tiny" --device cpu --ids ids -n 5 --ignore-end --stats
    [ "$(wc -w <out)" -eq 5 ] || fail "five token ids: $(cat out)"
    has '^decode *4 tokens' err --stats
    cp out five
    run 0 mkrun "$tiny" --device cpu --ids ids -n 5 --ignore-end
    cmp -s out five || fail "the second run gave other tokens"
    run 0 mkrun "$tiny" --device cpu --ids ids --logits logits.npy
    [ "$(head -c 6 logits.npy | tail -c 5)" = NUMPY ] || fail "no .npy file"
    vocab=$(sed -n 's/.*"vocab_size": *\([0-9]*\).*/\1/p' "$tiny/config.json")
    [ "$(wc -c <logits.npy)" -eq $((128 + 4 * 4 * vocab)) ] || fail "size of the .npy file"
    has "'descr': '.f4', 'fortran_order': False, 'shape': (4, $vocab), }" logits.npy header
    says 1 mkrun 'standard input: the prompt is empty, and there is nothing to continue' \
        "$tiny" --device cpu --ids -
    max=$(sed -n 's/.*"max_position_embeddings": *\([0-9]*\).*/\1/p' "$tiny/config.json")
    hint="(--context; this model's maximum is $max)"
    says 1 mkrun "the prompt has 4 tokens and fills the context of 4;\
 there is no room for an answer $hint" "$tiny" --device cpu --ids ids -c 4
    says 1 mkrun "the prompt has 4 tokens, the context holds 3 $hint" \
        "$tiny" --device cpu --ids ids -c 3
    echo '1 2 three' >bad
    says 1 mkrun 'bad: byte 4: not a token id' "$tiny" --device cpu --ids bad
    echo "1 $vocab" >bad
    run 1 mkrun "$tiny" --device cpu --ids bad --logits bad.npy
    has "^mkrun: .*$vocab" err 'a token id that is too large'
    [ -z "$(ls bad.npy* 2>/dev/null)" ] || fail "a failed --logits left a file"

    # Ended half-way: nothing stays but, perhaps, the whole file.
    seq 1 150 >many
    "$bin/mkrun" "$tiny" --device cpu --ids many --logits cut.npy 2>err &
    pid=$!
    tries=0
    while [ -z "$(ls cut.npy* 2>/dev/null)" ] && [ $tries -lt 100 ]; do
        sleep 0.05
        tries=$((tries + 1))
    done
    kill $pid 2>/dev/null
    wait $pid 2>/dev/null
    case $(ls cut.npy* 2>/dev/null) in
    '') ;;
    cut.npy) [ "$(wc -c <cut.npy)" -eq $((128 + 4 * 150 * vocab)) ] || fail "half an .npy file" ;;
    *) fail "left over: $(ls cut.npy*)" ;;
    esac
fi

# ---- mkbench ----

says 2 mkbench 'the model is missing'
says 2 mkbench "'x' is too much: one model" qwen3-0.6b x
says 2 mkbench '--pos none and --prefill none leave nothing to measure' \
    qwen3-0.6b --pos none --prefill none
for list in x 1,x 1, ,1 1,,2 1:2 -1 '' 99999999999; do
    says 2 mkbench "--pos: '$list' is not a list of integers from 0 to 16777216, like 1,200,1024" \
        qwen3-0.6b --pos "$list"
done
says 2 mkbench "--prefill: '0' is not a list of integers from 1 to 16777216, like 1,200,1024" \
    qwen3-0.6b --prefill 0
says 1 mkbench "50064 tokens of context are needed for these positions and lengths,\
 the model's maximum is 40960" qwen3-0.6b -r --pos 50000
says 1 mkbench '1088 tokens of context are needed for these positions and lengths,'\
' --context says 1000' qwen3-0.6b -r --pos 1024 --prefill none -c 1000
says 1 mkbench '--context 50000: the maximum of qwen3-0.6b is 40960' qwen3-0.6b -r -c 50000
says 1 mkbench 'none/x.json: No such file or directory' "$toy" -r --json none/x.json
no_gpu 1 mkbench "$toy" -r --json x.json
has '^mkbench: ' err 'mkbench without a GPU'
[ -z "$(ls | grep '^x\.json')" ] || fail "mkbench without a GPU wrote JSON"

echo "$checks checks, $failed failed"
[ $failed = 0 ]
