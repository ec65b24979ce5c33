#!/bin/sh
# A bounded share of the storms: every world under seeds, the kernels with faults that must be
# caught, and some of both under the sanitizers.  `make storm SEEDS=10000` is the long one.
set -u

bin=$(cd "${MK_BIN:-tests}" && pwd)
failed=0

# run WHAT PROGRAM OPTION...
run()
{
    what=$1 begin=$(date +%s)
    shift
    echo "== $what"
    [ -x "$bin/$1" ] || { echo "not built here"; return; }
    program=$bin/$1
    shift
    "$program" "$@" || {
        rc=$?
        [ $rc = 77 ] && exit 77
        failed=1
    }
    echo "== $what: $(($(date +%s) - begin)) s"
}

run 'schedules' mkstorm --seeds 2
run 'planted faults' mkstorm --faults
run 'address and undefined-behaviour sanitizers' mkstorm-asan --every 4 --seeds 1
run 'undefined-behaviour sanitizer alone' mkstorm-ubsan --world 5 --seeds 1
run 'thread sanitizer' mkstorm-tsan --every 4 --seeds 1
run 'planted races' mkstorm-tsan --faults
exit $failed
