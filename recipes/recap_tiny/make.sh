#!/usr/bin/env bash
# Makes recap-tiny from the recordings, captions and teacher in DATA: recipes/recap_tiny/make.sh DATA WORK [OPTION...]
#
# OPTION: of `python -m recipes.recap_tiny.prepare`, such as --folds 1 2 3 4. A stage that is finished is not run again;
# one that was stopped is continued.
set -euo pipefail
data=$1 work=$2
shift 2
mkdir -p "$work"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" TOKENIZERS_PARALLELISM=false
threads=(--num-threads "$OMP_NUM_THREADS")

stage() {
  local name=$1
  shift
  [ -e "$work/$name.done" ] && return
  local start=$SECONDS
  "$@"
  echo "$name: $(((SECONDS - start) / 60)) minutes" | tee "$work/$name.done"
}

recap() { python -m recap_cli "$@"; }

clap() { # NAME START OPTION...
  local name=$1 start=$2
  shift 2
  recap pretrain clap --dataset audiofolder --data-dir "$work/pairs" --clap "$start" \
    --caption-classes "$work/caption_classes.csv" --validation-split none --dropout 0.1 \
    --feature-cache "$work/features" --output-dir "$work/$name" --resume "${threads[@]}" "$@"
}

# YAMNet's weights, compared with the published file on real recordings.
stage tower recap convert yamnet "$data/teacher/yamnet.tflite" "$work/tower" \
  --recordings "$data"/recordings/esc50/*_1_1[0-2]*.ogg
stage prepare python -m recipes.recap_tiny.prepare "$data" "$work" --teacher "$work/tower" "$@"
# The text tower learns first, with the audio tower as it is; then all layers.
stage clap-text clap clap-text "$work/tower" --freeze audio_model --vocab-size 6000 --batch-size 160 --max-steps 1500 \
  --learning-rate 5e-4 --captions-per-clip 1 --save-steps 250
stage clap clap clap "$work/clap-text" --class-loss-weight 0.1 --random-gain-db 12 --mask-bins 8 --mask-frames 60 \
  --batch-size 64 --max-steps 750 --learning-rate 1e-4 --warmup-steps 10 --save-steps 20
language_model() { # NAME OPTION...
  local name=$1
  shift
  recap pretrain language-model --dataset "$work/corpus.txt" "$work/datastore.txt" --clap "$work/clap" \
    --validation-split none --batch-size 32 --num-retrieved 5 --save-steps 200 \
    --output-dir "$work/$name" --resume "${threads[@]}" "$@"
}

stage language-model-start language_model language-model-start --num-train-epochs 1 --vocab-size 6000 --num-layers 4 \
  --width 256 --num-heads 4 --max-positions 320 --learning-rate 1e-3 --dropout 0.1
# Prompts of one to five captions: a user's datastore may have one that fits.
stage language-model language_model language-model --decoder "$work/language-model-start" --num-train-epochs 2 \
  --vary-num-retrieved --draw-from 10 --retrieval-diversity 0.7 --learning-rate 8e-4 --warmup-steps 50 --dropout 0 \
  --prompt-weight 0.05 --seed 1
stage captioner recap train --dataset audiofolder --data-dir "$work/train" --clap "$work/clap" \
  --decoder "$work/language-model" --datastore "$work/datastore.txt" --audio-position-embedding sinusoidal \
  --validation-split none --num-retrieved 5 --draw-from 8 --vary-num-retrieved --retrieval-diversity 0.7 \
  --audio-dropout 0.1 --prompt-dropout 0.1 --share-prompts --batch-size 160 --max-steps 2500 --learning-rate 1e-3 \
  --warmup-steps 50 --lr-scheduler-type cosine --feature-cache "$work/states" --save-steps 100 \
  --output-dir "$work/captioner" --resume "${threads[@]}"
