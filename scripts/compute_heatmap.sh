#!/usr/bin/env bash
# Compute the error map of LIFT checkpoints, raw or (EMA=1) EMA weights, and draw it.
#
#   ./scripts/compute_heatmap.sh EPOCH...
#
# Settings come from the environment: GRID, K, HEATMAP_IMAGES, NUM_STEPS, MAX_JUMP, FACTOR, EMA, FORCE, ...
set -euo pipefail
source "$(dirname "$0")/common.sh"
[[ $# != 0 ]] || refuse "name the epochs, such as 200 400"
check_epochs "$@"
setup_environment requirements.txt

for epoch in "$@"; do
    flags=(--checkpoint "$CHECKPOINT_DIR/lift_dual_timestep_${epoch}ep.pth" --output "$(heatmap_name "$epoch")")
    flags+=(--grid "$GRID" --K "$K" --num_images "$HEATMAP_IMAGES" --grid_spacing "$GRID_SPACING")
    flags+=("${path_flags[@]}")
    [[ $EMA == 0 ]] || flags+=(--ema)
    [[ $FORCE == 0 ]] || flags+=(--force)
    python compute_heatmap_30.py "${flags[@]}" "${hardware_flags[@]}"
done
