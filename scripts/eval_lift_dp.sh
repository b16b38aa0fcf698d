#!/usr/bin/env bash
# Score LIFT along the optimal paths DP-64 and DP-Total; error maps that exist with these settings are kept.
#
#   ./scripts/eval_lift_dp.sh [EPOCH...]
#
# Settings come from the environment: METRICS, NUM_IMAGES, SEEDS, EMA, FORCE, GRID, K, DEVICE, ...
set -euo pipefail
source "$(dirname "$0")/common.sh"
check_epochs "$@"
setup_environment requirements.txt

epochs=("$@")
[[ $# != 0 ]] || mapfile -t epochs < <(lift_epochs)
for epoch in "${epochs[@]}"; do
    ./scripts/compute_heatmap.sh "$epoch"
done
evaluate lift "dp_64 dp_total" "${epochs[@]}"
