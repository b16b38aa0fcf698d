#!/usr/bin/env bash
# Train the baseline, LIFT, or both: side by side on two GPUs, one after the other elsewhere.
#
#   ./scripts/train.sh [baseline|lift|both]
#
# Settings come from the environment (scripts/common.sh lists them), for example
#   DATASET=path/to/images EPOCHS=400 HIDDEN_DIMS=32,64,128,256 ./scripts/train.sh lift
set -euo pipefail
source "$(dirname "$0")/common.sh"
model=${1:-both}
[[ $model =~ ^(baseline|lift|both)$ ]] || refuse "unknown model '$model'"
[[ $# -le 1 ]] || refuse "unknown argument '$2'"
setup_environment requirements.txt

train() {
    local script=$1
    shift
    local flags=(--dataset "$DATASET" --resolution "$RESOLUTION" --hidden_dims "$HIDDEN_DIMS" --epochs "$EPOCHS")
    flags+=(--batch_size "$BATCH_SIZE" --lr "$LR" --ema_decay "$EMA_DECAY" --save_every "$SAVE_EVERY")
    flags+=(--seed "$SEED" --output_dir "$CHECKPOINT_DIR" --log_dir "$LOG_DIR")
    [[ -z $LIMIT ]] || flags+=(--limit "$LIMIT")
    # shellcheck disable=SC2086
    exec python "$script" "${flags[@]}" "${hardware_flags[@]}" "$@" $TRAIN_ARGS
}

case "$model" in
    baseline) train train_baseline.py ;;
    lift) train train_lift.py ;;
    both)
        gpus=$(python -c "import torch; print(torch.cuda.device_count())")
        if [[ $gpus -ge 2 && -z $DEVICE ]]; then
            train train_baseline.py --device 0 &
            baseline=$!
            # An interrupt does not reach jobs in the background.
            trap 'kill "$baseline"; exit 130' INT TERM
            (train train_lift.py --device 1) || {
                echo "LIFT stopped; the baseline goes on" >&2
                wait "$baseline"
                exit 1
            }
            wait "$baseline"
        else
            (train train_baseline.py)
            (train train_lift.py)
        fi
        ;;
esac
