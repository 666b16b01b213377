#!/usr/bin/env bash
# Watch a model overfit: 240 icons, and 60 that it never sees. Some minutes on one CPU core.
# Each command below can also be run on its own.
#
# Usage: bash examples/icons/run.sh [RUN_FOLDER]
set -euo pipefail
cd "$(dirname "$0")/../.."
RUN=runs/icons
[ -z "${1:-}" ] || RUN=$1
HERE=examples/icons
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

python $HERE/make_documents.py --output "$RUN/data"
chameleon tokenizer text "$RUN"/data/trained.jsonl \
    --output "$RUN/tokenizer" --vocab-size 400 --image-codes 64
chameleon tokenizer image "$RUN"/data/trained.jsonl \
    --output "$RUN/tokenizer" --config digits training.steps=300
for name in trained held_out; do
    chameleon preprocess "$RUN/data/$name.jsonl" --tokenizer "$RUN/tokenizer" --output "$RUN/tokens/$name"
done
chameleon train $HERE/train.yaml variables.inputs="$RUN"
chameleon evaluate-loss "$RUN"
chameleon plot "$RUN" --keys loss_text,loss_image --smooth 10 --output "$RUN/curves.png"
