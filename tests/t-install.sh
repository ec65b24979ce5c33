#!/bin/sh
# The installed package: files, symbols, header, pkg-config, manual pages, and an application
# built against it that generates text - with a GPU also from a warm cache and from a pack.
set -eu

: "${srcdir:=tests}" "${MAKE:=make}" "${CC:=cc}" "${SAN_CFLAGS:=}"
unset MAKEFLAGS MAKELEVEL MAKEOVERRIDES MK_CUBIN_PATH MK_M4 2>/dev/null || :
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
failed=0
dest=$tmp/dest

fail() { echo "failed: $*"; failed=1; }
have() { command -v "$1" >/dev/null 2>&1; }

for tool in ranlib nm "${CC%% *}" pkg-config; do
    have "$tool" || { echo "SKIP: no $tool here to install and build with"; exit 77; }
done

# ---- What make install leaves ----

$MAKE install DESTDIR="$dest" >"$tmp/log" 2>&1 || { cat "$tmp/log"; exit 1; }
header=$(find "$dest" -name mk.h)
lib=$(dirname "$(find "$dest" -name libmk.a)")
bin=$(dirname "$(find "$dest" -name mkgen -type f)")
man=$(dirname "$(find "$dest" -name mkgen.1)")
prefix=${bin%/bin}
for file in lib/libmk.so lib/libmk.a lib/pkgconfig/mkgen.pc include/mk.h \
    share/mkgen/models/qwen3-0.6b/config.json share/mkgen/models/demo/model.safetensors; do
    [ -e "$prefix/$file" ] || fail "$file is not installed"
done
if [ -e libmkhost.la ]; then # built where Boost.Context is
    host=$(find "$dest" -name libmkhost.so)
    [ "$host" = "$lib/mkgen/libmkhost.so" ] || fail "libmkhost.so is installed in '$host'"
    [ "$(find "$dest" -name 'libmkhost*' | wc -l)" -le 2 ] || fail "libmkhost has more than one file"
fi
[ "$(find "$dest" -name '*.h' | wc -l)" = 1 ] || fail "headers other than mk.h are installed"

nm -D --defined-only "$lib/libmk.so" | awk '$2 != "A" { print $NF }' | sed 's/@.*//' >"$tmp/symbols"
grep -q '^mk_generate$' "$tmp/symbols" || fail "libmk.so does not export mk_generate"
if grep -v '^mk_' "$tmp/symbols"; then
    fail "libmk.so exports the symbols above"
fi
nm -g --defined-only "$lib/libmk.a" | awk 'NF == 3 { print $NF }' >"$tmp/symbols"
grep -q '^mk_generate$' "$tmp/symbols" || fail "libmk.a does not have mk_generate"
if grep -v '^mk_' "$tmp/symbols"; then
    fail "libmk.a has the global symbols above"
fi

# ---- The header in C99 and C++, alone ----

echo '#include <mk.h>' >"$tmp/h.c"
cp "$tmp/h.c" "$tmp/h.cc"
$CC -std=c99 -pedantic -Wall -Wextra -Werror -fsyntax-only -I"${header%/*}" "$tmp/h.c" ||
    fail "mk.h is no clean C99"
if have c++; then
    c++ -std=c++11 -pedantic -Wall -Wextra -Werror -fsyntax-only -I"${header%/*}" "$tmp/h.cc" ||
        fail "mk.h is no clean C++"
fi

# ---- Programs and their manual pages ----

for program in mkgen mkrun mkbench mktune; do
    version=$("$bin/$program" --version) || fail "$program --version"
    case $version in
    "$program "[0-9]*.[0-9]*.[0-9]*) ;;
    *) fail "$program --version says '$version'" ;;
    esac
    "$bin/$program" --help >"$tmp/help" || fail "$program --help"
    grep -q "^Usage: $program " "$tmp/help" || fail "$program --help does not begin with its usage"
    page=$man/$program.1
    [ -s "$page" ] || { fail "no manual page of $program"; continue; }
    for option in $(grep -o -e '--[a-z][a-z0-9-]*' "$tmp/help" | sort -u); do
        grep -q -e "Fl -${option#--}\>" "$page" || fail "$program.1 does not mention $option"
    done
    if have mandoc; then
        mandoc -T lint -W warning "$page" || fail "$program.1 has warnings"
    elif have man && man --version 2>&1 | grep -q man-db; then
        warnings=$(LC_ALL=C.UTF-8 MANROFFSEQ='' man --warnings -l "$page" 2>&1 >/dev/null)
        [ -z "$warnings" ] || fail "$program.1: $warnings"
    fi
done

MK_MODELS_DIR=$prefix/share/mkgen/models
export MK_MODELS_DIR
(cd "$tmp" && "$bin/mkgen" --list-models | grep -q '^qwen3-0.6b ') ||
    fail "the installed mkgen does not know qwen3-0.6b"

demo=$MK_MODELS_DIR/demo
if [ -e libmkhost.la ] && have c++ && have m4; then
    # A plan beside an installed model is found, and one that does not fit is told of.
    host_run()
    {
        (cd "$tmp" && unset MK_HOST_DRIVER && MK_CACHE_DIR=$tmp/host-cache "$bin/mkrun" "$demo" \
            --device host -p It -n 1) >"$tmp/host.out" 2>"$tmp/host.err" ||
            fail "the installed mkrun does not run on the emulated GPU: $(cat "$tmp/host.err")"
    }
    for choice in 'ctas = 2' 'nonsense = 1'; do
        echo "$choice" >"$demo/host-sm_90.plan"
        (cd "$tmp" && "$bin/mkgen" --model demo --arch host --dump-plan) >"$tmp/plan" 2>"$tmp/plan.err"
        host_run
        case $choice in
        ctas*)
            grep -q '^# choices: .*/demo/host-sm_90.plan, carried' "$tmp/plan" ||
                fail "the plan beside an installed model is not found: $(cat "$tmp/plan.err")"
            grep -q '^ctas = 2$' "$tmp/plan" || fail "the plan beside an installed model is not used"
            cp "$tmp/host.out" "$tmp/planned.out"
            ! grep -q plan "$tmp/host.err" || fail "a good plan: $(cat "$tmp/host.err")"
            ;;
        *)
            for file in plan host; do
                grep -q 'warning: the plan carried for demo on host-sm_90 is not used: .*"nonsense"' \
                    "$tmp/$file.err" 2>/dev/null || fail "a bad plan is not told of in $file.err"
            done
            cmp -s "$tmp/host.out" "$tmp/planned.out" || fail "another plan, another token"
            ;;
        esac
    done
    rm -f "$demo/host-sm_90.plan"
fi

# ---- An application, built as a user would ----

flags=$(PKG_CONFIG_PATH=$lib/pkgconfig pkg-config --define-variable=prefix="$prefix" \
    --cflags --libs mkgen)
$CC -Wall -Wextra -Werror $SAN_CFLAGS "$srcdir/example/example.c" $flags -o "$tmp/example" ||
    { fail "the example does not build"; exit 1; }
LD_LIBRARY_PATH=$lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH

# run NAME KERNEL COMMAND...: the example must write text and have its kernel from KERNEL.
run()
{
    name=$1 kernel=$2
    shift 2
    if ! "$@" >"$tmp/$name.out" 2>"$tmp/$name.err"; then
        fail "the example, $name: $(cat "$tmp/$name.err")"
        return
    fi
    echo "$name: $(cat "$tmp/$name.out")"
    [ "$(wc -c <"$tmp/$name.out")" -gt 40 ] || fail "the example, $name: hardly any text"
    grep -q "^kernel: $kernel" "$tmp/$name.err" || fail "the example, $name: $(cat "$tmp/$name.err")"
}
prompt='The old man looked at the sea and'

if "$tmp/example" "$tmp/none" "$prompt" >/dev/null 2>"$tmp/err"; then
    fail "the example takes a model folder that is not there"
fi
grep -q "$tmp/none" "$tmp/err" || fail "the missing folder is not named: $(cat "$tmp/err")"

if ! "$bin/mkgen" --print-gpu >/dev/null 2>"$tmp/gpu"; then
    run cpu 'none: CPU' "$tmp/example" "$demo" "$prompt"
    echo "runs from a cold cache, a warm cache and a pack are skipped: $(cat "$tmp/gpu")"
    exit $failed
fi

MK_CACHE_DIR=$tmp/cache
export MK_CACHE_DIR
run cold compiled "$tmp/example" "$demo" "$prompt"
# No m4 and no NVRTC from here on.
mkdir "$tmp/empty"
bare="env PATH=$tmp/empty MK_M4=$tmp/empty/m4 MK_NVRTC=$tmp/empty/libnvrtc.so"
run warm cache $bare "$tmp/example" "$demo" "$prompt"
(cd "$tmp" && "$bin/mkgen" -q --model "$demo" --arch native --pack "$tmp/pack") ||
    fail "mkgen --pack"
rm -rf "$tmp/cache"
: >"$tmp/file"          # a folder in it cannot be made, not even by root
bare="$bare MK_CACHE_DIR=$tmp/file/cache HOME=$tmp/file"
if $bare "$tmp/example" "$demo" "$prompt" >/dev/null 2>"$tmp/err"; then
    fail "the example runs without a cache, a pack, m4 and NVRTC"
fi
grep -q -e m4 -e NVRTC "$tmp/err" || fail "what is missing is not named: $(cat "$tmp/err")"
run pack pack $bare MK_CUBIN_PATH="$tmp/pack" "$tmp/example" "$demo" "$prompt"
cmp "$tmp/cold.out" "$tmp/warm.out" && cmp "$tmp/cold.out" "$tmp/pack.out" ||
    fail "the three runs wrote different texts"
exit $failed
