#!/bin/sh
# Installs what the build needs and is missing: cmake, make, a C++ compiler, libclang (for bindgen), rustfmt and clippy.
# Debian and Ubuntu only; elsewhere it says what to install. Does nothing, and needs no root, when all is there.
set -eu

missing=""
need() { # COMMAND PACKAGE
    command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
need cmake cmake
need make make
need cc gcc
need c++ g++
find /usr/lib /usr/local/lib "${LIBCLANG_PATH:-/nonexistent}" -name 'libclang*.so*' 2>/dev/null | grep -q 'libclang[-.0-9]*\.so' ||
    missing="$missing libclang-dev"

if [ -n "$missing" ]; then
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "error: please install:$missing" >&2
        exit 1
    fi
    root=""
    [ "$(id -u)" = 0 ] || root="sudo"
    echo "installing$missing"
    $root env DEBIAN_FRONTEND=noninteractive apt-get update -qq >/dev/null
    # shellcheck disable=SC2086 # a list of packages
    $root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi

if ! command -v cargo >/dev/null 2>&1; then
    echo "error: cargo is missing: install Rust with rustup, then open a new shell" >&2
    exit 1
fi
