#!/usr/bin/env bash
# Draw the figures of error maps that exist, raw or (EMA=1) EMA weights.
#
#   ./scripts/plot_heatmap.sh EPOCH...
set -euo pipefail
source "$(dirname "$0")/common.sh"
setup_environment requirements.txt

if [[ $# == 0 ]]; then
    echo "error: name the epochs, for example: ./scripts/plot_heatmap.sh 200 400" >&2
    exit 2
fi
for epoch in "$@"; do
    python compute_heatmap_30.py --plot_only --output "$(heatmap_name "$epoch")" \
        --num_steps "$NUM_STEPS" --max_jump "$MAX_JUMP"
done
