#!/usr/bin/env bash
# Teach the model of the digits demo to prefer its drawings of the right digit, by DPO, in a few
# minutes on two CPU cores. Run the demo first (`make demo`).
#
# Usage: bash examples/dpo/run.sh [DEMO_RUN] [RUN]
#
# SEED=1 is the seed of everything that is drawn at random. QUICK=1 trains a few steps and draws
# little, so the model learns nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."
BASE=${1:-runs/digits}
RUN=${2:-runs/dpo}
SEED=${SEED:-1}
HERE=examples/dpo
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH=examples/digits:examples/sft${PYTHONPATH:+:$PYTHONPATH}  # the judge, and how to ask
data=() train=() measure=() holdout=0.1
if [ -n "${QUICK:-}" ]; then
    data=(--requests 30)
    train=(training.steps=4 training.global_batch_size=4 optimizer.lr_warmup_steps=2)
    measure=(--drawings 10 --captions 4)
    holdout=0.2
fi
started=$SECONDS
say() { printf '\n== %s  (%ss)\n' "$1" "$((SECONDS - started))"; }

say "1. Pairs: let the model draw, and let an SVM say which drawings show the digit asked for"
python $HERE/make_pairs.py "$BASE/exported" --output "$RUN/data" --seed "$SEED" "${data[@]}"

say "2. Token files: both answers of a pair become one document"
chameleon preprocess "$RUN/data/pairs.jsonl" --tokenizer "$BASE/tokenizer" \
    --output "$RUN/tokens/pairs" --holdout "$holdout" --image-root "$RUN/data"

say "3. Preference tuning: the reference is the demo's model, which is also where the run starts"
chameleon train $HERE/dpo.yaml --start-from "$BASE" \
    training.seed="$SEED" variables.run="$RUN" logging.run_dir="$RUN" "${train[@]}"
chameleon evaluate-loss "$RUN"

say "4. Count the right drawings before and after, and see whether anything else got worse"
rm -rf "$RUN/exported"
chameleon convert "$RUN/checkpoints" "$RUN/exported" --to hf
python $HERE/compare.py "$BASE/exported" "$RUN/exported" --pictures "$BASE/data" \
    --seed "$SEED" --output "$RUN/figures.json" "${measure[@]}"
say "Done: see figures.json in $RUN, and the rewards with 'chameleon report $RUN'"
