#!/usr/bin/env bash
# Score LIFT on the diagonal at the epochs given, or at all that have a checkpoint.
#
#   ./scripts/eval_lift.sh [EPOCH...]
#
# Settings come from the environment: METRICS, NUM_IMAGES, SEEDS, WEIGHTS, FORCE, DEVICE, ...
set -euo pipefail
source "$(dirname "$0")/common.sh"
check_epochs "$@"
setup_environment requirements.txt

evaluate lift diagonal "$@"
