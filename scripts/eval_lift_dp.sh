#!/usr/bin/env bash
# Score LIFT along optimal paths: the published DP-64 and DP-Total, the best diagonal and the best path by denoising
# error (kl_diagonal, kl). Error maps that exist with these settings are kept.
#
#   ./scripts/eval_lift_dp.sh [EPOCH...]
#
# Settings come from the environment: METRICS, NUM_IMAGES, SEEDS, WEIGHTS, FORCE, GRID, K, DEVICE, ...
set -euo pipefail
source "$(dirname "$0")/common.sh"
check_epochs "$@"
setup_environment requirements.txt

epochs=("$@")
[[ $# != 0 ]] || mapfile -t epochs < <(lift_epochs)
for epoch in "${epochs[@]}"; do
    ./scripts/compute_heatmap.sh "$epoch"
done
evaluate lift "dp_64 dp_total kl_diagonal kl" "${epochs[@]}"
