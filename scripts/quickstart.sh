#!/usr/bin/env bash
# Set up, then run the whole main job on built-in images of animals: 7 to 16 minutes on 2 CPU cores.
#
#   ./scripts/quickstart.sh
#
# It is train.sh and eval_all.sh with other settings, each of which the environment can override as usual: models of
# 3.6 million parameters at 32x32, LIFT with the residual pair. The score needs no downloaded weights. Run again, it finds
# what is done and goes on from there.
set -euo pipefail

export DATASET=${DATASET:-synthetic} RESOLUTION=${RESOLUTION:-32} LIMIT=${LIMIT:-2048}
export HIDDEN_DIMS=${HIDDEN_DIMS:-16,32,64,128} EPOCHS=${EPOCHS:-16} SAVE_EVERY=${SAVE_EVERY:-${EPOCHS:-16}}
export BATCH_SIZE=${BATCH_SIZE:-16} LR=${LR:-2e-3} EMA_DECAY=${EMA_DECAY:-0.995} METRICS=${METRICS:-swd}
export NUM_IMAGES=${NUM_IMAGES:-192} SEEDS=${SEEDS:-"42 43 44"} K=${K:-1} HEATMAP_IMAGES=${HEATMAP_IMAGES:-16}
export NUM_STEPS=${NUM_STEPS:-18} PATHS=${PATHS:-image_diagonal kl_diagonal kl}
export GRID_SPACING=${GRID_SPACING:-uniform_log_snr} MAP_ARGS=${MAP_ARGS:---maps mse --seen_only}
export RUN=${RUN:-quickstart} TRAIN_ARGS=${TRAIN_ARGS:---preset improved --lr_schedule cosine --resume auto}
export LIFT_ARGS=${LIFT_ARGS:---representation residual}
source "$(dirname "$0")/common.sh"
[[ $# == 0 ]] || refuse "unknown argument '$1'"

# train.sh ends with 0 when it is stopped, and what it has not trained cannot be scored.
trap 'exit 130' INT
./scripts/train.sh both
./scripts/eval_all.sh --ema

cat <<END

look at    $RESULTS_DIR/samples_${EPOCHS}ep_ema.png   training images, and samples of equal seeds below them
           $RESULTS_DIR/report.html              all of it on one page
try next   DATASET=my_images RUN=mine ./scripts/quickstart.sh       your own pictures, of any size
           EPOCHS=50 RUN=longer ./scripts/quickstart.sh             longer training, better images
           ./scripts/train.sh --help                                the published experiment, on a GPU
END
