#!/bin/sh
# The kernels for AArch64: on such a machine at every level that its CPU has, on x86-64 under emulation as on CPUs that have more and more of them.
# Debian and Ubuntu: installs the cross compiler and QEMU if they are missing. Arguments are other tests to run at the highest level (conformance, parity,
# session, text): those that start the ggraft command cannot be emulated.
set -eu
cd "$(dirname "$0")/.."
target=aarch64-unknown-linux-gnu
cargo=${CARGO:-cargo}

if [ "$(uname -m)" = aarch64 ]; then
    levels=$($cargo run --quiet --bin ggraft -- --version | sed -n 's/^CPU levels: \(.*\) (.*/\1/p')
    [ -n "$levels" ] || { echo "no CPU level is known" >&2; exit 1; }
    for level in $levels; do
        echo "== $level"
        GGRAFT_CPU=$level $cargo test --lib -- kernels
    done
    for test in "$@"; do $cargo test --test "$test"; done
    exit 0
fi

missing=""
need() { # COMMAND PACKAGES
    command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
need aarch64-linux-gnu-gcc "gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
need qemu-aarch64 qemu-user
if [ -n "$missing" ]; then
    root=""
    [ "$(id -u)" = 0 ] || root="sudo"
    echo "installing$missing"
    $root env DEBIAN_FRONTEND=noninteractive apt-get update -qq >/dev/null
    # shellcheck disable=SC2086 # a list of packages
    $root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi
rustup target add $target

# ggml for no CPU in particular: .cargo/config.toml asks for this machine's.
export CFLAGS="" CXXFLAGS=""
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
export CXX_aarch64_unknown_linux_gnu=aarch64-linux-gnu-g++
export BINDGEN_EXTRA_CLANG_ARGS_aarch64_unknown_linux_gnu="--sysroot=/usr/aarch64-linux-gnu -I/usr/aarch64-linux-gnu/include"

# Runs tests, `--lib` or `--test NAME`, as on a CPU of QEMU's.
tests() { # CPU TESTS [ARGUMENTS]
    cpu=$1
    what=$2
    shift 2
    echo "== $cpu: $what"
    # shellcheck disable=SC2086 # two words
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu $cpu" \
        $cargo test --target $target $what -- "$@"
}

# Neither of the two, dot products, and products of matrices, too.
for cpu in cortex-a72 neoverse-n1 max; do
    tests $cpu --lib kernels
done
for test in "$@"; do
    tests max "--test $test"
done
