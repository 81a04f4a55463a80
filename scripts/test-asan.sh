#!/bin/sh
# The kernels' tests under AddressSanitizer: operands are exactly as large as the kernels say that they must be, so reading or writing beyond them is seen.
# ggml, in C++, is not instrumented, nor are the tiles in assembly. Arguments go to the tests.
set -eu
cd "$(dirname "$0")/.."

target=x86_64-unknown-linux-gnu
runtime=$(rustc --print target-libdir --target $target 2>/dev/null)/librustc-stable_rt.asan.a
if [ "$(uname -sm)" != "Linux x86_64" ] || [ ! -e "$runtime" ]; then
    why="skipped: kernels under AddressSanitizer (needs Linux on x86-64, and Rust's runtime for it)"
    echo "$why" >&2
    [ -z "${GGRAFT_SKIPPED:-}" ] || echo "$why" >>"$GGRAFT_SKIPPED"
    exit 0
fi
# Sanitizers are options of nightly compilers; this lets a stable one take them. Doctests and proc macros stay as they are.
export RUSTC_BOOTSTRAP=1
export RUSTFLAGS="-Z sanitizer=address"
# A folder of its own: other flags would build everything else again, there and back.
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/asan"
# What tests leave to the end of the process is no leak of the kernels'.
export ASAN_OPTIONS="${ASAN_OPTIONS:-detect_leaks=0}"
exec "${CARGO:-cargo}" test --lib --target $target kernels "$@"
