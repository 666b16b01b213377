#!/usr/bin/env bash
# Pictures that keep their shape: data, tokenizers with grids, token files, training, and what the
# model then draws. It takes a few minutes on one CPU core.
#
# Usage: bash examples/shapes/run.sh [RUN_FOLDER]
#
# SEED=1 is the seed of everything that is drawn at random. QUICK=1 runs the same commands in about
# a minute; the model then learns nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."
RUN=${1:-runs/shapes}
SEED=${SEED:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
data=() image=() train=() measure=()
if [ -n "${QUICK:-}" ]; then
    data=(--count 90)
    image=(training.steps=10 training.lr_warmup_steps=2)
    train=(training.steps=10 optimizer.lr_warmup_steps=2)
    measure=(--count 18)
fi
started=$SECONDS
say() { printf '\n== %s  (%ss)\n' "$1" "$((SECONDS - started))"; }

say "1. Data: make wide, square and tall pictures with captions"
python examples/shapes/make_pictures.py --output "$RUN/data" --seed "$SEED" "${data[@]}"

say "2. Tokenizers: a vocabulary with grids of at most 32 codes, up to twice as long as wide"
chameleon tokenizer text "$RUN/data/documents.jsonl" --output "$RUN/tokenizer" \
    --vocab-size 384 --image-codes 64 --image-grids 32 --largest-ratio 2
chameleon tokenizer image "$RUN/data/pictures" --output "$RUN/tokenizer" \
    --config examples/shapes/image.yaml --seed "$SEED" "${image[@]}"

say "3. Token files: each picture in the grid that is nearest to its shape"
chameleon preprocess "$RUN/data/documents.jsonl" --tokenizer "$RUN/tokenizer" \
    --output "$RUN/tokens/documents" --workers 1

say "4. Training"
chameleon train examples/shapes/train.yaml training.seed="$SEED" variables.inputs="$RUN" \
    logging.run_dir="$RUN" "${train[@]}"

say "5. Drawing: one picture of a shape that is asked for, then many by their captions"
chameleon generate "$RUN" --prompt "a wide picture of a red circle" --force image --size 2:1 \
    --output "$RUN/drawn"
python examples/shapes/measure.py "$RUN" --seed "$SEED" "${measure[@]}"
say "Done: open $RUN/shapes.html"
