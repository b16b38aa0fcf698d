#!/usr/bin/env bash
# Compute the error map of LIFT checkpoints, raw or (EMA=1) EMA weights, and draw it.
#
#   ./scripts/compute_heatmap.sh EPOCH...
#
# Settings come from the environment: GRID, K, HEATMAP_IMAGES, NUM_STEPS, MAX_JUMP, EMA, FORCE, DEVICE, ...
set -euo pipefail
source "$(dirname "$0")/common.sh"
setup_environment requirements.txt

if [[ $# == 0 ]]; then
    echo "error: name the epochs, for example: ./scripts/compute_heatmap.sh 200 400" >&2
    exit 2
fi
for epoch in "$@"; do
    flags=(--checkpoint "$CHECKPOINT_DIR/lift_dual_timestep_${epoch}ep.pth" --output "$(heatmap_name "$epoch")")
    flags+=(--grid "$GRID" --K "$K" --num_images "$HEATMAP_IMAGES" --num_steps "$NUM_STEPS" --max_jump "$MAX_JUMP")
    [[ $EMA == 0 ]] || flags+=(--ema)
    [[ $FORCE == 0 ]] || flags+=(--force)
    python compute_heatmap_30.py "${flags[@]}" "${hardware_flags[@]}"
done
