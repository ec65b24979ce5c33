#!/bin/sh
# A bounded share of the storms: every world under seeds, the kernels with faults that must be
# caught, and some of both under the sanitizers.  `make storm` is the long one.
set -u

bin=$(cd "${MK_BIN:-tests}" && pwd)
failed=0 skipped=0

# run WHAT PROGRAM OPTION...
run()
{
    what=$1 begin=$(date +%s)
    shift
    echo "== $what"
    program=$bin/$1
    shift
    "$program" "$@"
    case $? in
    0) ;;
    77) skipped=1 ;;
    *) failed=1 ;;
    esac
    echo "== $what: $(($(date +%s) - begin)) s"
}

# The same, with a sanitizer: a tree that has one in all its programs does not build these.
run_sanitized()
{
    if [ -x "$bin/$2" ]; then
        run "$@"
    else
        echo "== $1: $2 is not built here"
    fi
}

run 'schedules' mkstorm --seeds 1
run 'planted faults' mkstorm --faults
run_sanitized 'address and undefined-behaviour sanitizers' mkstorm-asan --world 13 --seeds 1
run_sanitized 'undefined-behaviour sanitizer alone' mkstorm-ubsan --world 5 --seeds 1
run_sanitized 'thread sanitizer: planted races, and the sound kernels of their worlds' mkstorm-tsan --faults
[ $failed = 0 ] || exit 1
[ $skipped = 0 ] || exit 77
