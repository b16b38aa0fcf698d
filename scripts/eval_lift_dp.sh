#!/usr/bin/env bash
# Score LIFT along the optimal paths DP-64 and DP-Total, computing the error maps that are missing.
#
#   ./scripts/eval_lift_dp.sh [EPOCH...]
#
# Settings come from the environment: METRICS, NUM_IMAGES, SEEDS, EMA, FORCE, GRID, K, DEVICE, ...
set -euo pipefail
source "$(dirname "$0")/common.sh"
setup_environment requirements.txt

epochs=("$@")
[[ $# != 0 ]] || mapfile -t epochs < <(lift_epochs)
for epoch in "${epochs[@]}"; do
    [[ -e $(heatmap_name "$epoch") && $FORCE == 0 ]] || ./scripts/compute_heatmap.sh "$epoch"
done
evaluate lift "dp_64 dp_total" "${epochs[@]}"
