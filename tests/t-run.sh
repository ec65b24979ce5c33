#!/bin/sh
# mkrun end to end, with the demo model on the CPU: prompts from everywhere, answers, sampling,
# logits, chat, what Ctrl-C and a closed pipe do, and errors.  Wrong options are in t-cli.sh.
# MK_BIN is the folder of the programs; default: the one that the test runs in.
set -u

: "${srcdir:=tests}"
srcdir=$(cd "$srcdir" && pwd)
bin=$(cd "${MK_BIN:-.}" && pwd)
: "${MK_MODELS_DIR:=$(cd "$srcdir/../models" && pwd)}"
unset MK_CUBIN_PATH MK_VERBOSE 2>/dev/null || :
LC_ALL=C
export LC_ALL

demo=$MK_MODELS_DIR/demo
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp" || exit 1
checks=0
failed=0

fail() { echo "failed: $*"; failed=$((failed + 1)); }

# check TEXT COMMAND...: COMMAND succeeds.
check()
{
    text=$1
    shift
    checks=$((checks + 1))
    "$@" || fail "$text"
}

# run STATUS ARG...: mkrun on the CPU; stdout to out, stderr to err.
run()
{
    want=$1
    shift
    checks=$((checks + 1))
    "$bin/mkrun" --device cpu "$@" >out 2>err
    got=$?
    [ $got = "$want" ] || fail "mkrun $*: exit status $got, not $want: $(cat err)"
}

# says MESSAGE ARG...: it fails, and the message is all there is.
says()
{
    message=$1
    shift
    run 1 "$@" </dev/null
    printf 'mkrun: %s\n' "$message" >want
    cmp -s want err || fail "mkrun $*: it says
$(cat err)
and should say
$(cat want)"
    [ ! -s out ] || fail "mkrun $*: an error, and something on stdout"
}

# same TEXT: the answer is that in the file greedy.
same() { check "$1: $(cat out)" cmp -s out greedy; }
other() { checks=$((checks + 1)); cmp -s out greedy && fail "$1"; }
has() { check "no '$1' in $2: $(head -c 600 "$2")" grep -q -e "$1" "$2"; }

# ---- Prompts ----

# reference KEY: that line of the first reference, without the key.
reference() { sed -n "s/^$1 //p" "$srcdir/demo-reference.txt" | head -n 1; }
prompt=$(reference prompt)

run 0 "$demo" -p "$prompt" -n 48
cp out greedy
checks=$((checks + 1))
[ "$(cat out)" = "$(printf '%b' "$(reference text)")" ] || fail "not the reference's text: $(cat out)"
check "something on stderr: $(cat err)" [ ! -s err ]
printf '%s\n' "$prompt" >file
run 0 "$demo" -f file -n 48
same '-f'
run 0 "$demo" -f - -n 48 <file
same '-f -'
run 0 "$demo" -n 48 <file
same 'standard input'
run 0 "$demo" --max-tokens=48 --prompt="$prompt" --context 64 --threads 2
same 'a smaller context'
reference tokens >ids
reference next >next
run 0 "$demo" --ids ids -n 48
same '--ids'
run 0 "$demo" --ids ids -n 48 --print-ids
check "--print-ids: $(cat out)" cmp -s out next
run 0 "$demo" -p "$prompt" -n 0 -c 20 --print-ids
check "up to the end of the context: $(cat out)" [ "$(wc -w <out)" = 9 ]
# A special token in the prompt is one token, in a raw prompt it is text.
run 0 "$demo" -p 'a<|im_end|>b' -n 1 --stats
has '^prefill  2 tokens in ' err
run 0 "$demo" -p 'a<|im_end|>b' --raw -n 1 --stats
has '^prefill  [0-9]* tokens in ' err
check "--raw: $(cat err)" [ "$(sed -n 's/^prefill  \([0-9]*\) .*/\1/p' err)" -gt 4 ]

# ---- Answers ----

run 0 "$demo" -p "$prompt" -n 48 --stats
same '--stats'
has '^load     [0-9.]* s, kernel 0.00 s (none: on the CPU)$' err
has '^prefill  10 tokens in [0-9.]* ms, [0-9]* tok/s$' err
has '^first    token after [0-9.]* ms$' err
has '^decode   47 tokens in [0-9.]* ms, [0-9.]* tok/s$' err
check "--stats: $(cat err)" [ "$(wc -l <err)" = 4 ]
run 0 "$demo" -p "$prompt" -n 48 --set warps=4
same '--set'
has '^mkrun: warning: --plan and --set choose the kernel of a GPU; the CPU has none$' err
run 0 "$demo" -p "$prompt" -n 48 --temp 0.8 --top-k 1
same '--top-k 1'
run 0 "$demo" -p "$prompt" -n 48 --temp 0.8 --top-p 0.000001
same '--top-p 0.000001'
run 0 "$demo" -p "$prompt" -n 48 --temp 0.8 --seed 7
other '--temp 0.8 is greedy'
cp out greedy
run 0 "$demo" -p "$prompt" -n 48 --temp 0.8 --seed 7
same 'one seed twice'
run 0 "$demo" -p "$prompt" -n 48 --temp 0.8 --seed 8
other 'two seeds, one text'
run 0 "$demo" -p "$prompt" -n 48 --temp 0.8 --seed 7 --top-k 5 --top-p 0.5
other '--top-k 5 --top-p 0.5 change nothing'

# ---- Logits ----

run 0 "$demo" --ids ids --logits logits.npy
check "--logits prints: $(cat out err)" [ ! -s out -a ! -s err ]
check "size of the .npy file" [ "$(wc -c <logits.npy)" = $((128 + 11 * 2048 * 4)) ]
printf '\223NUMPY\001\000v\000' >magic
head -c 10 logits.npy >out
check ".npy magic" cmp -s out magic
head -c 128 logits.npy | tail -c 118 >out
has "^{'descr': '[<>]f4', 'fortran_order': False, 'shape': (11, 2048), } *$" out
run 0 "$demo" -p "$prompt" -c 11 --logits again.npy
check "--logits of a text and of its ids differ" cmp logits.npy again.npy
says 'no/such/x.npy: No such file or directory' "$demo" --ids ids --logits no/such/x.npy
if [ -w /dev/full ]; then
    says '/dev/full: No space left on device' "$demo" --ids ids --logits /dev/full
    checks=$((checks + 1))
    "$bin/mkrun" --device cpu "$demo" -p x -n 5 >/dev/full 2>err && fail "mkrun >/dev/full succeeds"
    has '^mkrun: standard output: No space left on device$' err
fi

# ---- Errors ----

hint="(--context; this model's maximum is 1024)"
says "the prompt has 11 tokens, the context holds 10 $hint" "$demo" -p "$prompt" -c 10
says "the prompt has 11 tokens and fills the context of 11; there is no room for an answer $hint" \
    "$demo" -p "$prompt" -c 11
i=0
while [ $i -lt 1025 ]; do
    echo 5
    i=$((i + 1))
done >many
says "the prompt has 1025 tokens, the context holds 1024 $hint" "$demo" --ids many
says 'context is 1025; demo takes 1..1024 tokens' "$demo" -p x -c 1025
says '--prompt: the prompt is empty, and there is nothing to continue' "$demo" -p ''
says 'standard input: the prompt is empty, and there is nothing to continue' "$demo"
: >empty
says 'empty: the prompt is empty, and there is nothing to continue' "$demo" -f empty
says '--prompt: the prompt is empty, and there is nothing to answer' "$demo" --chat -p ''
printf 'ab\377z' >latin
says 'latin: the text is not UTF-8 at byte 2' "$demo" -f latin
says '--prompt: the text is not UTF-8 at byte 2' "$demo" -p "$(cat latin)"
says 'the message is not UTF-8 at byte 2' "$demo" --chat -f latin
says 'none: No such file or directory' "$demo" -f none
echo '2048' >bad
says 'token 0 is 2048; demo has ids 0..2047' "$demo" --ids bad
says 'top_k is 3000; it must be in 0..2048' "$demo" -p x --top-k 3000 --temp 1
says 'none: no such folder' none -p x
says 'file: not a folder' file -p x
mkdir folder
says 'folder/config.json: cannot open: No such file or directory' folder -p x
cp "$demo/config.json" folder/
says 'folder: has neither model.safetensors nor model.safetensors.index.json' folder -p x
ln -s "$demo/model.safetensors" folder/
says 'folder has no tokenizer.json; give token ids with --ids' folder -p x
# The same model with marks that no chat template of ours has.
sed 's/<|im_start|>/<|im_begin|>/g' "$demo/tokenizer.json" >folder/tokenizer.json
says 'folder has no chat template; without --chat the text is continued' folder --chat
run 0 folder -p "$prompt" -n 5
has night out

# ---- Chat ----

printf 'Who are you?\n  \nAnd I?\n/reset\nWho are you?\n/quit\nAnd I?\n' |
    run 0 "$demo" --chat -n 12 --ignore-end --print-ids
check "three answers: $(cat out)" [ "$(wc -l <out)" = 3 ]
check "after /reset: $(cat out)" [ "$(sed -n 1p out)" = "$(sed -n 3p out)" ]
first=$(sed -n 1p out)
run 0 "$demo" --chat -n 12 --ignore-end --print-ids -p 'Who are you?'
check "--chat -p: $(cat out)" [ "$(cat out)" = "$first" ]
run 0 "$demo" --chat --system 'Be brief.' -n 12 --ignore-end --print-ids -p 'Who are you?'
check "--system changes nothing" [ "$(cat out)" != "$first" ]
# A turn that does not fit is refused; the conversation goes on.
printf 'Who are you, and what do you think of the sea, the sky and all the rest?\nHi\n' |
    run 1 "$demo" --chat -c 24 -n 2 --print-ids
check "the turn that fits: $(cat out)" [ "$(wc -w <out)" = 2 ]
has '^mkrun: the conversation has [0-9]* tokens with this turn, the context holds 24 (--context); /reset starts anew$' err
printf 'Hi\0there\nHi\n' | run 1 "$demo" --chat -n 2 --print-ids
check "the turn without a zero byte: $(cat out)" [ "$(wc -w <out)" = 2 ]
has '^mkrun: standard input: byte 2 of the line: a zero byte$' err

# ---- Signals ----

# interrupted SIGNAL: a long answer gets SIGNAL after its first words; status is in the file status.
interrupted()
{
    {
        sh -c 'echo $$ >pid; exec "$@"' sh "$bin/mkrun" --device cpu "$demo" -p "$prompt" -n 0 \
            --ignore-end --threads 1 2>err
        echo $? >status
    } | {
        head -c 20 >out
        kill "-$1" "$(cat pid)"
        cat >>out
    }
    check "SIG$1: it said nothing" [ "$(wc -c <out)" -ge 20 ]
    check "SIG$1: exit status $(cat status), not $2" [ "$(cat status)" = "$2" ]
    check "SIG$1: it ran on" [ "$(wc -c <out)" -lt "$(wc -c <whole)" ]
    # The shell may say "Terminated".
    check "SIG$1: $(cat err)" [ -z "$(grep mkrun err)" ]
}

run 0 "$demo" -p "$prompt" -n 0 --ignore-end --threads 1
cp out whole
if sh -c 'kill -INT $$; :'; then
    echo 'Ctrl-C is not tried: SIGINT is ignored here'
else
    interrupted INT 130
    head -c "$(($(wc -c <out) - 1))" out >cut
    head -c "$(wc -c <cut)" whole >begin
    check "SIGINT: other text, or no newline at its end" cmp -s cut begin

    # In a chat it stops the answer, and the next question is answered.
    mkfifo questions
    : >out
    {
        echo 'Who are you?'
        while ! [ -s out ]; do sleep 0.05; done
        printf '/reset\nWho are you?\n'
    } >questions &
    {
        sh -c 'echo $$ >pid; exec "$@"' sh "$bin/mkrun" --device cpu "$demo" --chat -n 600 \
            --ignore-end --print-ids --threads 1 <questions 2>err
        echo $? >status
    } | {
        head -c 20 >>out
        kill -INT "$(cat pid)"
        cat >>out
    }
    wait $!
    check "chat: exit status $(cat status)" [ "$(cat status)" = 0 ]
    check "chat: $(wc -l <out) answers, not 2" [ "$(wc -l <out)" = 2 ]
    check "chat: the stopped answer has all words" [ "$(sed -n 1p out | wc -w)" -lt 600 ]
    check "chat: the next answer lacks words" [ "$(sed -n 2p out | wc -w)" = 600 ]
    case $(sed -n 2p out) in
    "$(sed -n 1p out) "*) ;;
    *) fail "chat: the stopped answer was another" ;;
    esac
fi
interrupted TERM 143

# ---- A closed pipe ----

{
    "$bin/mkrun" --device cpu "$demo" -p "$prompt" -n 0 --ignore-end --threads 1 2>err
    echo $? >status
} | head -c 20 >out
case $(cat status) in
141) check "SIGPIPE: $(cat err)" [ ! -s err ] ;;
1) has '^mkrun: standard output: Broken pipe$' err ;;
*) fail "a closed pipe: exit status $(cat status)" ;;
esac
{
    trap '' PIPE
    "$bin/mkrun" --device cpu "$demo" -p "$prompt" -n 0 --ignore-end --threads 1 2>err
    echo $? >status
} | head -c 20 >out
check "a closed pipe without SIGPIPE: exit status $(cat status)" [ "$(cat status)" = 1 ]
has '^mkrun: standard output: Broken pipe$' err

echo "$checks checks, $failed failed"
[ $failed = 0 ]
