#!/bin/sh
# The library's unit tests, compiled for lesser CPUs than this one: first without AVX-512 (the kernels for AVX2), then without AVX
# (the portable ones, no fused multiply-add). Only the library is compiled anew: ggml and the other crates stay as they are.
set -eu
cd "$(dirname "$0")/.."

if [ "$(uname -m)" != x86_64 ]; then
    why="skipped: kernels for lesser CPUs than this one (needs x86-64)"
    echo "$why" >&2
    [ -z "${GGRAFT_SKIPPED:-}" ] || echo "$why" >>"$GGRAFT_SKIPPED"
    exit 0
fi
# What the lesser CPUs lack is checked on this one.
unset GGRAFT_SKIPPED

messages=$(mktemp)
trap 'rm -f "$messages"' EXIT
for feature in avx512f avx; do
    echo "== without $feature"
    ${CARGO:-cargo} rustc --lib --profile test --message-format json-render-diagnostics -- -C target-feature=-$feature >"$messages"
    # The last message about an executable is the one about the tests.
    tests=$(sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' "$messages" | tail -n 1)
    "$tests" --quiet
done
