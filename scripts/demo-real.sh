#!/usr/bin/env bash
# SmolLM2-135M-Instruct: a chat, then a prefix trained for two minutes on descriptions of restaurants, and what it changed.
set -euo pipefail
cd "$(dirname "$0")/.."

ggraft=${CARGO_TARGET_DIR:-target}/release/ggraft
model=$(scripts/fetch-models.sh models/real smollm2)
tasks=models/tasks/e2e
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
fact='name : The Golden Curry | food : Indian | price range : cheap | area : riverside | family friendly : yes\n'

describe() { # what follows is given to ggraft run
    "$ggraft" run -m "$model" -e -p "$fact" -n 48 --temp 0 --quiet "$@" | head -n 3
    echo
}

echo "== a chat"
echo "> Name three fruits."
"$ggraft" run -m "$model" --chat -p "Name three fruits." -n 64 --temp 0 --quiet
echo
echo
echo "== the model alone continues: $fact"
describe
echo
echo "== a prefix is trained on restaurant descriptions, for about two minutes"
"$ggraft" train -m "$model" --method prefix --data "$tasks/train.jsonl" --valid "$tasks/valid.jsonl" -o "$out/e2e.gguf" \
    --steps 40 --eval-every 20 --checkpoint-every never
echo
echo "== the same with the prefix, $(wc -c <"$out/e2e.gguf") bytes"
describe -a "$out/e2e.gguf"
