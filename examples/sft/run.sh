#!/usr/bin/env bash
# Fine-tune the model of the digits demo on conversations, in a few minutes on two CPU cores.
# Run the demo first (`make demo`). Each command below can also be run on its own.
#
# Usage: bash examples/sft/run.sh [DEMO_RUN] [RUN]
#
# SEED=1 is the seed of everything that is drawn at random. QUICK=1 takes a minute: the model learns
# nothing, and is asked questions only at the end.
set -euo pipefail
cd "$(dirname "$0")/../.."
BASE=${1:-runs/digits}
RUN=${2:-runs/sft}
SEED=${SEED:-1}
HERE=examples/sft
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH=examples/digits${PYTHONPATH:+:$PYTHONPATH}  # measure.py imports the demo's judge
data=() train=() measure=()
workers=2
holdout=0.02
if [ -n "${QUICK:-}" ]; then
    data=(--count 60)
    train=(training.steps=6 optimizer.lr_warmup_steps=2)
    measure=(--questions 8 --drawings 1)
    workers=1 holdout=0.2
fi
started=$SECONDS
say() { printf '\n== %s  (%ss)\n' "$1" "$((SECONDS - started))"; }

say "1. Conversations: make questions about digits, requests for drawings, and dialogues of both"
python $HERE/make_chats.py --pictures "$BASE/data" --output "$RUN/data" --seed "$SEED" "${data[@]}"

say "2. Token files: mark the answers, and keep images in prompts whole"
for name in questions drawings dialogues; do
    chameleon preprocess "$RUN/data/$name.jsonl" --tokenizer "$BASE/tokenizer" \
        --output "$RUN/tokens/$name" --holdout "$holdout" --workers "$workers" --image-root "$BASE/data"
done
chameleon inspect "$RUN/tokens/dialogues" --html "$RUN/dialogues.html"

say "3. Before fine-tuning: ask the demo's model"
[ -n "${QUICK:-}" ] || OMP_NUM_THREADS=2 python $HERE/measure.py "$BASE" --data "$RUN/data" --pictures "$BASE/data" --output "$RUN/before.json" "${measure[@]}"

say "4. Fine-tuning: two processes start from the demo's weights, with the loss on answers only"
torchrun --standalone --local-addr localhost --nproc-per-node 2 \
    -m megatron_chameleon train $HERE/digits.yaml --start-from "$BASE" \
    training.seed="$SEED" variables.run="$RUN" logging.run_dir="$RUN" "${train[@]}"

say "5. After fine-tuning: ask the same questions"
rm -rf "$RUN/exported"
chameleon convert "$RUN/checkpoints" "$RUN/exported" --to hf
OMP_NUM_THREADS=2 python $HERE/measure.py "$RUN/exported" --data "$RUN/data" --pictures "$BASE/data" --output "$RUN/after.json" "${measure[@]}"

if [ -z "${QUICK:-}" ]; then
    say "6. Examples: ask the model yourself"
    pictures=("$BASE"/data/heldout_images/*.png)
    chameleon generate "$RUN/exported" --chat --image "${pictures[0]}" --prompt "What digit is this? Answer in a word."
    chameleon generate "$RUN/exported" --chat --prompt "Draw a seven." --output "$RUN/drawn"
fi
say "Done: see before.json, after.json and dialogues.html in $RUN"
