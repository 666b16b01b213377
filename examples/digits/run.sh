#!/usr/bin/env bash
# The whole demo: data, tokenizers, token files, training, export and report.
# Each command below can also be run on its own.
#
# Usage: bash examples/digits/run.sh [RUN_FOLDER]
#
# IMAGE_FROM=FOLDER takes the image tokenizer that another library saved in FOLDER, for 16 x 16
# pixels, in place of training one.
#
# SEED=1 is the seed of everything that is drawn at random. QUICK=1 runs the same commands in a
# minute or two; the model then learns nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."
RUN=${1:-runs/digits}
SEED=${SEED:-1}
HERE=examples/digits
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
data=(--variants 16) image=() train=()
if [ -n "${QUICK:-}" ]; then
    data=(--variants 1 --sums 100 --texts 100 --chats 100)
    image=(training.steps=20)
    train=(training.steps=20 optimizer.lr_warmup_steps=2)
fi
started=$SECONDS
say() { printf '\n== %s  (%ss)\n' "$1" "$((SECONDS - started))"; }

say "1. Data: make handwritten digits with captions, sums, plain text and conversations"
python $HERE/make_documents.py --output "$RUN/data" --seed "$SEED" "${data[@]}"

say "2. Tokenizers: train one vocabulary for text and image codes"
if [ -n "${IMAGE_FROM:-}" ]; then
    chameleon tokenizer image --from "$IMAGE_FROM" --resolution 16 --output "$RUN/tokenizer"
else
    OMP_NUM_THREADS=2 chameleon tokenizer image "$RUN/data/train_images" \
        --output "$RUN/tokenizer" --config digits --seed "$SEED" "${image[@]}"
fi
chameleon tokenizer text "$RUN"/data/{pairs,sums,text,chats,quality}.jsonl \
    --output "$RUN/tokenizer" --vocab-size 512

say "3. Token files: turn the documents into tokens"
for name in pairs sums text chats quality; do
    chameleon preprocess "$RUN/data/$name.jsonl" --tokenizer "$RUN/tokenizer" \
        --output "$RUN/tokens/$name" --workers 2
done

say "4. Training: two processes with tensor and sequence parallelism"
torchrun --standalone --local-addr localhost --nproc-per-node 2 \
    -m megatron_chameleon train $HERE/train.yaml \
    training.seed="$SEED" variables.inputs="$RUN" logging.run_dir="$RUN" "${train[@]}"

say "5. Export: convert the checkpoint to the Hugging Face format"
rm -rf "$RUN/exported"
chameleon convert "$RUN/checkpoints" "$RUN/exported" --to hf

say "6. Report: measure captions and drawings"
OMP_NUM_THREADS=2 python $HERE/report.py "$RUN" --seed "$SEED"
say "Done: open $RUN/report/index.html"
