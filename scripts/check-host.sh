#!/bin/sh
# libggraft_host without a libllama of its own, in an application of llama.cpp: examples/c/host.c, linked with the libllama that the tests have built.
set -eu
cd "$(dirname "$0")/.."
target="${CARGO_TARGET_DIR:-target}"
"${CARGO:-cargo}" build --package ggraft-host-c
library="$target/debug/libggraft_host.so"
if nm -D "$library" | grep -E ' (llama|ggml|gguf)_'; then
    echo "error: $library has or wants functions of llama.cpp" >&2
    exit 1
fi
# The newest, if there are several.
# shellcheck disable=SC2012 # names that cargo has made
llama="$(ls -t "$target"/debug/build/llama-cpp-sys-2-*/out/lib/libllama.a | head -n 1)"
lib="$(dirname "$llama")"
cc -std=c11 -Wall -Wextra -Werror -pedantic -Iinclude -isystem "$lib/../include" -c examples/c/host.c -o "$target/debug/c-host.o"
c++ "$target/debug/c-host.o" -L"$target/debug" -lggraft_host -Wl,-rpath,"$(cd "$target" && pwd)/debug" \
    -L"$lib" -lllama -lggml -lggml-cpu -lggml-base -lpthread -ldl -lm -o "$target/debug/c-host"
"$target/debug/c-host" models/tinylm-q8_0.gguf models/peft/persona_pirate-prefix models/peft/persona_butler-prefix_proj
