#!/usr/bin/env bash
# Set up, then run the whole main job on the built-in images with small models: under 10 minutes on 2 CPU cores.
#
#   ./scripts/quickstart.sh
#
# It is train.sh and eval_all.sh with other settings, each of which the environment can override as usual. The
# score needs no downloaded weights. Run again, it finds what is done and goes on from there.
set -euo pipefail

export DATASET=${DATASET:-synthetic} RESOLUTION=${RESOLUTION:-32} LIMIT=${LIMIT:-1024}
export HIDDEN_DIMS=${HIDDEN_DIMS:-8,16,32,64} EPOCHS=${EPOCHS:-12} SAVE_EVERY=${SAVE_EVERY:-12}
export BATCH_SIZE=${BATCH_SIZE:-16} LR=${LR:-2e-3} EMA_DECAY=${EMA_DECAY:-0.99} METRICS=${METRICS:-swd}
export NUM_IMAGES=${NUM_IMAGES:-128} SEEDS=${SEEDS:-"42 43 44"} K=${K:-1} HEATMAP_IMAGES=${HEATMAP_IMAGES:-4}
export CHECKPOINT_DIR=${CHECKPOINT_DIR:-checkpoints/quickstart} RESULTS_DIR=${RESULTS_DIR:-results/quickstart}
export LOG_DIR=${LOG_DIR:-logs/quickstart} TRAIN_ARGS=${TRAIN_ARGS:---resume auto}
source "$(dirname "$0")/common.sh"
[[ $# == 0 ]] || refuse "unknown argument '$1'"

# train.sh ends with 0 when it is stopped, and what it has not trained cannot be scored.
trap 'exit 130' INT
./scripts/train.sh both
./scripts/eval_all.sh --ema
