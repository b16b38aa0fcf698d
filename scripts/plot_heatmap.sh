#!/usr/bin/env bash
# Draw the figures of error maps that exist, of the kinds of weights that WEIGHTS names.
#
#   ./scripts/plot_heatmap.sh EPOCH...
set -euo pipefail
source "$(dirname "$0")/common.sh"
[[ $# != 0 ]] || refuse "name the epochs, such as 200 400"
check_epochs "$@"
setup_environment requirements.txt

for epoch in "$@"; do
    for weights in $WEIGHTS; do
        python compute_heatmap_30.py --plot_only --output "$(heatmap_name "$epoch" "$weights")" "${path_flags[@]}"
    done
done
