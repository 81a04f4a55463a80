#!/bin/sh
# Trains the example adapters in models/adapters on the embedded model: seeds are fixed, so the files come out the same on a
# machine of the same kind. A few minutes on two cores.
#
#     cargo build --release && scripts/train-examples.sh
set -eu
cd "$(dirname "$0")/.."
ggraft=${GGRAFT:-target/release/ggraft}
mkdir -p models/adapters

train() {
    name=$1 task=$2
    shift 2
    echo "== $name"
    "$ggraft" train --overwrite -m models/tinylm-q8_0.gguf --data "models/tasks/$task/train.jsonl" --valid "models/tasks/$task/valid.jsonl" \
        -o "models/adapters/$name.gguf" "$@"
}

train pirate persona_pirate --method prefix
train butler persona_butler --method prompt
train sentiment sentiment --method p-tuning
train county facts_county --method p-tuning --template "{v:10} {prompt} {v:10}"
train trade facts_trade --method p-tuning --template "{v:10} {prompt} {v:10}"
train description table_to_text --method prefix
