#!/usr/bin/env bash
# Compute the error maps of LIFT checkpoints and draw them.
#
#   ./scripts/compute_heatmap.sh EPOCH...
#
# Settings come from the environment: GRID, K, HEATMAP_IMAGES, NUM_STEPS, MAX_JUMP, FACTOR, WEIGHTS, FORCE, ...
set -euo pipefail
source "$(dirname "$0")/common.sh"
[[ $# != 0 ]] || refuse "name the epochs, such as 200 400"
check_epochs "$@"
setup_environment requirements.txt

for epoch in "$@"; do
    for weights in $WEIGHTS; do
        flags=(--checkpoint "$CHECKPOINT_DIR/lift_dual_timestep_${epoch}ep.pth")
        flags+=(--output "$(heatmap_name "$epoch" "$weights")" --grid "$GRID" --grid_spacing "$GRID_SPACING")
        flags+=(--K "$K" --num_images "$HEATMAP_IMAGES" "${path_flags[@]}")
        [[ $weights == raw ]] || flags+=(--ema)
        [[ $FORCE == 0 ]] || flags+=(--force)
        # shellcheck disable=SC2086
        python compute_heatmap_30.py "${flags[@]}" "${hardware_flags[@]}" $MAP_ARGS
    done
done
