#!/usr/bin/env bash
# Train the baseline, LIFT, or both: side by side on two GPUs, one after the other elsewhere.
#
#   ./scripts/train.sh [baseline|lift|both]
#
# Settings come from the environment (scripts/common.sh lists them), for example
#   DATASET=path/to/images EPOCHS=400 HIDDEN_DIMS=32,64,128,256 ./scripts/train.sh lift
set -euo pipefail
source "$(dirname "$0")/common.sh"
setup_environment requirements.txt

train() {
    local script=$1
    shift
    local flags=(--dataset "$DATASET" --resolution "$RESOLUTION" --hidden_dims "$HIDDEN_DIMS" --epochs "$EPOCHS")
    flags+=(--batch_size "$BATCH_SIZE" --lr "$LR" --ema_decay "$EMA_DECAY" --save_every "$SAVE_EVERY")
    flags+=(--seed "$SEED" --output_dir "$CHECKPOINT_DIR" --log_dir "$LOG_DIR")
    [[ -z $LIMIT ]] || flags+=(--limit "$LIMIT")
    # shellcheck disable=SC2086
    python "$script" "${flags[@]}" "${hardware_flags[@]}" "$@" $TRAIN_ARGS
}

case "${1:-both}" in
    baseline) train train_baseline.py ;;
    lift) train train_lift.py ;;
    both)
        gpus=$(python -c "import torch; print(torch.cuda.device_count())")
        if [[ $gpus -ge 2 && -z $DEVICE ]]; then
            train train_baseline.py --device 0 &
            baseline=$!
            train train_lift.py --device 1 || { wait "$baseline"; exit 1; }
            wait "$baseline"
        else
            train train_baseline.py
            train train_lift.py
        fi
        ;;
    *)
        echo "error: unknown model '$1'; choose baseline, lift or both." >&2
        exit 2
        ;;
esac
