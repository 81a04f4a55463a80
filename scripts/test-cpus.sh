#!/bin/sh
# Kernels for lesser CPUs than this one: the library's unit tests at every level that this CPU has.
set -eu
cd "$(dirname "$0")/.."

# What a lesser level lacks is checked at a higher one.
skipped=${GGRAFT_SKIPPED:-}
unset GGRAFT_SKIPPED

messages=$(mktemp)
trap 'rm -f "$messages"' EXIT
${CARGO:-cargo} test --lib --no-run --message-format json-render-diagnostics >"$messages"
# The last message about an executable is the one about the tests.
tests=$(sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' "$messages" | tail -n 1)
# That of the tests, if they have built it: by itself it would be built with other features of what it depends on, and all of ggraft once more.
ggraft=${CARGO_TARGET_DIR:-target}/debug/ggraft
[ -x "$ggraft" ] || ${CARGO:-cargo} build --bin ggraft
levels=$("$ggraft" --version | sed -n 's/^CPU levels: \(.*\) (.*/\1/p')
[ -n "$levels" ] || { echo "no CPU level is known" >&2; exit 1; }
for level in $levels; do
    echo "== $level"
    GGRAFT_CPU=$level "$tests" --quiet
done
case $levels in
*amx | *i8mm) ;;
*)
    why="skipped: kernels of higher levels than $level (needs another CPU)"
    echo "$why" >&2
    [ -z "$skipped" ] || echo "$why" >>"$skipped"
    ;;
esac
